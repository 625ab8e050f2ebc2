// WireGuard messages: bytes <-> values (spec/datapath-wire.md 1.2). All integers are little-endian; the type is a u32, so
// bytes 1 to 3 are zero. The three handshake messages have exactly one length each.
//
//   Initiation, 148    0 type 1 | 4 sender u32 | 8 ephemeral 32 | 40 static 32+16 | 88 timestamp 12+16 | 116 mac1 16 | 132 mac2 16
//   Response, 92       0 type 2 | 4 sender u32 | 8 receiver u32 | 12 ephemeral 32 | 44 empty 0+16 | 60 mac1 16 | 76 mac2 16
//   Cookie reply, 64   0 type 3 | 4 receiver u32 | 8 nonce 24 | 32 cookie 16+16
//   Transport, 32 + n  0 type 4 | 4 receiver u32 | 8 counter u64 | 16 packet n+16
//
// mac1 and mac2 of an initiation or response are its last 32 bytes: mac1 covers everything before itself, mac2
// everything before itself.

export const TYPE_INITIATION = 1;
export const TYPE_RESPONSE = 2;
export const TYPE_COOKIE_REPLY = 3;
export const TYPE_TRANSPORT = 4;

export const INITIATION_SIZE = 148;
export const RESPONSE_SIZE = 92;
export const COOKIE_REPLY_SIZE = 64;
export const TRANSPORT_HEADER_SIZE = 16;
/** Header and tag: what a transport message adds to its padded packet; also the size of a keepalive. */
export const TRANSPORT_OVERHEAD = 32;
export const MAC_SIZE = 16;

const TIMESTAMP_SIZE = 12;
/** TAI64 label of the Unix epoch: 2^62 and ten leap seconds. */
const TAI64_EPOCH = 0x400000000000000an;

/** Fields of parsed messages are views into the message; `sender` and `receiver` are u32 indices. */
export interface Initiation {
  sender: number;
  ephemeral: Uint8Array;
  encryptedStatic: Uint8Array;
  encryptedTimestamp: Uint8Array;
}

export interface Response {
  sender: number;
  receiver: number;
  ephemeral: Uint8Array;
  encryptedNothing: Uint8Array;
}

export interface CookieReply {
  receiver: number;
  nonce: Uint8Array;
  encryptedCookie: Uint8Array;
}

/** 1 to 4, or 0 when the bytes are no WireGuard message by their type and length. */
export function messageType(bytes: Uint8Array): number {
  if (bytes.length < 4 || bytes[1] !== 0 || bytes[2] !== 0 || bytes[3] !== 0) return 0;
  switch (bytes[0]) {
    case TYPE_INITIATION:
      return bytes.length === INITIATION_SIZE ? TYPE_INITIATION : 0;
    case TYPE_RESPONSE:
      return bytes.length === RESPONSE_SIZE ? TYPE_RESPONSE : 0;
    case TYPE_COOKIE_REPLY:
      return bytes.length === COOKIE_REPLY_SIZE ? TYPE_COOKIE_REPLY : 0;
    case TYPE_TRANSPORT:
      return bytes.length >= TRANSPORT_OVERHEAD ? TYPE_TRANSPORT : 0;
    default:
      return 0;
  }
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Null when type or length is wrong; the same holds for the other parsers. */
export function parseInitiation(bytes: Uint8Array): Initiation | null {
  if (messageType(bytes) !== TYPE_INITIATION) return null;
  return {
    sender: viewOf(bytes).getUint32(4, true),
    ephemeral: bytes.subarray(8, 40),
    encryptedStatic: bytes.subarray(40, 88),
    encryptedTimestamp: bytes.subarray(88, 116),
  };
}

export function parseResponse(bytes: Uint8Array): Response | null {
  if (messageType(bytes) !== TYPE_RESPONSE) return null;
  const view = viewOf(bytes);
  return {
    sender: view.getUint32(4, true),
    receiver: view.getUint32(8, true),
    ephemeral: bytes.subarray(12, 44),
    encryptedNothing: bytes.subarray(44, 60),
  };
}

export function parseCookieReply(bytes: Uint8Array): CookieReply | null {
  if (messageType(bytes) !== TYPE_COOKIE_REPLY) return null;
  return {
    receiver: viewOf(bytes).getUint32(4, true),
    nonce: bytes.subarray(8, 32),
    encryptedCookie: bytes.subarray(32, 64),
  };
}

/** The message with both MACs still zero. */
export function buildInitiation(message: Initiation): Uint8Array {
  const out = new Uint8Array(INITIATION_SIZE);
  out[0] = TYPE_INITIATION;
  viewOf(out).setUint32(4, message.sender, true);
  out.set(message.ephemeral, 8);
  out.set(message.encryptedStatic, 40);
  out.set(message.encryptedTimestamp, 88);
  return out;
}

/** The message with both MACs still zero. */
export function buildResponse(message: Response): Uint8Array {
  const out = new Uint8Array(RESPONSE_SIZE);
  out[0] = TYPE_RESPONSE;
  const view = viewOf(out);
  view.setUint32(4, message.sender, true);
  view.setUint32(8, message.receiver, true);
  out.set(message.ephemeral, 12);
  out.set(message.encryptedNothing, 44);
  return out;
}

export function buildCookieReply(message: CookieReply): Uint8Array {
  const out = new Uint8Array(COOKIE_REPLY_SIZE);
  out[0] = TYPE_COOKIE_REPLY;
  viewOf(out).setUint32(4, message.receiver, true);
  out.set(message.nonce, 8);
  out.set(message.encryptedCookie, 32);
  return out;
}

/** What mac1 of an initiation or response covers; with `macOffset(m) + 16` the same for mac2. */
export function macOffset(message: Uint8Array): number {
  return message.length - 2 * MAC_SIZE;
}

export function mac1Of(message: Uint8Array): Uint8Array {
  return message.subarray(message.length - 2 * MAC_SIZE, message.length - MAC_SIZE);
}

export function mac2Of(message: Uint8Array): Uint8Array {
  return message.subarray(message.length - MAC_SIZE);
}

/** TAI64N of a Unix time in nanoseconds: 8 bytes of seconds and 4 of nanoseconds, big-endian, so that order is byte order. */
export function tai64n(unixNanoseconds: bigint): Uint8Array {
  const out = new Uint8Array(TIMESTAMP_SIZE);
  const view = viewOf(out);
  view.setBigUint64(0, TAI64_EPOCH + unixNanoseconds / 1_000_000_000n, false);
  view.setUint32(8, Number(unixNanoseconds % 1_000_000_000n), false);
  return out;
}

/**
 * Length of a packet padded to a multiple of 16, but not beyond the MTU (0: no MTU). A packet longer than the MTU is
 * padded by its last MTU-sized unit.
 */
export function paddedLength(length: number, mtu: number): number {
  if (mtu === 0) return (length + 15) & ~15;
  const last = length > mtu ? length % mtu : length;
  return length - last + Math.min((last + 15) & ~15, mtu);
}
