// Disco: the messages by which two nodes find and confirm a path (spec/datapath-wire.md part 4). Big-endian.
//
//   envelope   0  6   54 53 f0 9f 92 ac
//              6  32  sender's disco public key
//             38  24  nonce, random
//             62  ..  NaCl box (XSalsa20-Poly1305) of the message: sender's private to recipient's public disco key
//
//   message    0  u8  type
//              1  u8  version, 0
//              2  ..  body; bytes behind it are ignored
//
//   01 Ping                 txid 12, sender's node key 32, padding zeros (12 bytes alone: a very old peer)
//   02 Pong                 txid 12, where the ping was seen to come from: address
//   03 CallMeMaybe          addresses of the sender: "ping me there"
//   04 BindUDPRelay         bind: VNI u32, generation u32, remote disco key 32, challenge 32
//   05   ...Challenge       bind
//   06   ...Answer          bind
//   07 CallMeMaybeVia       relay endpoint
//   08 AllocateUDPRelay     two disco keys 32, generation u32
//   09   ...Response        generation u32, relay endpoint
//
//   address         IP 16 (IPv4 is mapped), port u16
//   relay endpoint  server disco key 32, two client disco keys 32, Lamport id u64, VNI u32, bind lifetime u64 ns,
//                   steady-state lifetime u64 ns, one or more addresses
import { boxOpen, boxSeal } from "../crypto/box.ts";
import { type AddrPort, formatAddrPort, parseAddrPort, to16, unmap } from "./ip.ts";

const DISCO_KEY_LENGTH = 32;
export const DISCO_NONCE_LENGTH = 24;
export const DISCO_TXID_LENGTH = 12;
/** Addresses of one message that are read; what is beyond is ignored. */
export const DISCO_MAX_ADDRESSES = 100;

const MAGIC = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
const HEADER = MAGIC.length + DISCO_KEY_LENGTH + DISCO_NONCE_LENGTH;
const BOX_OVERHEAD = 16;
const MESSAGE_HEADER = 2;
const MAX_LENGTH = 65535;
const ADDRESS_LENGTH = 18;
const BIND_LENGTH = 72;
const RELAY_ENDPOINT_LENGTH = 124;

const TYPE = {
  ping: 1,
  pong: 2,
  callMeMaybe: 3,
  bind: 4,
  bindChallenge: 5,
  bindAnswer: 6,
  callMeMaybeVia: 7,
  allocateRequest: 8,
  allocateResponse: 9,
} as const;

export interface DiscoPing {
  type: "ping";
  /** 12 bytes. */
  txid: Uint8Array;
  /** Absent from very old peers. */
  nodeKey?: Uint8Array;
  /** Bytes of padding; makes a probe for the path MTU. */
  padding: number;
}

export interface DiscoPong {
  type: "pong";
  txid: Uint8Array;
  /** Source of the ping as the answerer saw it; 127.3.3.40:<region> when it came by relay. */
  source: AddrPort;
}

export interface DiscoCallMeMaybe {
  type: "callMeMaybe";
  addresses: AddrPort[];
}

/** The three messages of the bind handshake with a UDP relay server. */
export interface DiscoBind {
  type: "bind" | "bindChallenge" | "bindAnswer";
  vni: number;
  generation: number;
  remoteKey: Uint8Array;
  challenge: Uint8Array;
}

export interface UDPRelayEndpoint {
  serverKey: Uint8Array;
  clientKeys: [Uint8Array, Uint8Array];
  lamportId: bigint;
  vni: number;
  /** Nanoseconds. */
  bindLifetime: bigint;
  /** Nanoseconds. */
  steadyStateLifetime: bigint;
  addresses: AddrPort[];
}

/** Null endpoint: a version that we do not know. */
export interface DiscoCallMeMaybeVia {
  type: "callMeMaybeVia";
  endpoint: UDPRelayEndpoint | null;
}

export interface DiscoAllocateRequest {
  type: "allocateRequest";
  /** Null: a version that we do not know. */
  clientKeys: [Uint8Array, Uint8Array] | null;
  generation: number;
}

export interface DiscoAllocateResponse {
  type: "allocateResponse";
  generation: number;
  endpoint: UDPRelayEndpoint | null;
}

export type DiscoMessage =
  | DiscoPing
  | DiscoPong
  | DiscoCallMeMaybe
  | DiscoBind
  | DiscoCallMeMaybeVia
  | DiscoAllocateRequest
  | DiscoAllocateResponse;

/** True when the bytes begin like a disco envelope: what tells them from WireGuard on UDP and on the relay. */
export function isDisco(packet: Uint8Array): boolean {
  if (packet.length < HEADER) return false;
  for (let i = 0; i < MAGIC.length; i++) if (packet[i] !== MAGIC[i]) return false;
  return true;
}

/** The sender's disco key of an envelope for which `isDisco` holds: a view, not a copy. */
export function discoSender(packet: Uint8Array): Uint8Array {
  return packet.subarray(MAGIC.length, MAGIC.length + DISCO_KEY_LENGTH);
}

/**
 * The envelope around an encoded message. `shared` is boxBeforeNM of our private and the peer's public disco key; the
 * 24-byte nonce must never repeat under it: take it from a CSPRNG.
 */
export function sealDisco(shared: Uint8Array, sender: Uint8Array, nonce: Uint8Array, message: Uint8Array): Uint8Array {
  const out = new Uint8Array(HEADER + BOX_OVERHEAD + message.length);
  out.set(MAGIC);
  out.set(sender, MAGIC.length);
  out.set(nonce, MAGIC.length + DISCO_KEY_LENGTH);
  out.set(boxSeal(shared, nonce, message), HEADER);
  return out;
}

/** Null: no disco envelope, the box does not open (another key), or the message is unknown or cut short. */
export function openDisco(shared: Uint8Array, packet: Uint8Array): DiscoMessage | null {
  if (!isDisco(packet) || packet.length < HEADER + BOX_OVERHEAD + MESSAGE_HEADER || packet.length > MAX_LENGTH)
    return null;
  const message = boxOpen(shared, packet.subarray(HEADER - DISCO_NONCE_LENGTH, HEADER), packet.subarray(HEADER));
  return message ? parseDiscoMessage(message) : null;
}

export function encodePing(ping: Omit<DiscoPing, "type">): Uint8Array {
  const key = ping.nodeKey?.length ?? 0;
  const out = message(TYPE.ping, DISCO_TXID_LENGTH + key + ping.padding);
  out.set(ping.txid, MESSAGE_HEADER);
  if (ping.nodeKey) out.set(ping.nodeKey, MESSAGE_HEADER + DISCO_TXID_LENGTH);
  return out;
}

/** Throws RangeError when `source` is no address and port. */
export function encodePong(pong: Omit<DiscoPong, "type">): Uint8Array {
  const out = message(TYPE.pong, DISCO_TXID_LENGTH + ADDRESS_LENGTH);
  out.set(pong.txid, MESSAGE_HEADER);
  putAddress(out, MESSAGE_HEADER + DISCO_TXID_LENGTH, pong.source);
  return out;
}

/** At most DISCO_MAX_ADDRESSES are sent. Throws RangeError when one is no address and port. */
export function encodeCallMeMaybe(addresses: readonly AddrPort[]): Uint8Array {
  const listed = addresses.slice(0, DISCO_MAX_ADDRESSES);
  const out = message(TYPE.callMeMaybe, listed.length * ADDRESS_LENGTH);
  for (const [i, address] of listed.entries()) putAddress(out, MESSAGE_HEADER + i * ADDRESS_LENGTH, address);
  return out;
}

/** What stands inside the box. Null: unknown type, or too short for its type. */
export function parseDiscoMessage(bytes: Uint8Array): DiscoMessage | null {
  if (bytes.length < MESSAGE_HEADER || bytes.length > MAX_LENGTH) return null;
  const version = bytes[1]!;
  const body = bytes.subarray(MESSAGE_HEADER);
  switch (bytes[0]) {
    case TYPE.ping:
      return parsePing(body);
    case TYPE.pong:
      if (body.length < DISCO_TXID_LENGTH + ADDRESS_LENGTH) return null;
      return { type: "pong", txid: body.slice(0, DISCO_TXID_LENGTH), source: addressAt(body, DISCO_TXID_LENGTH) };
    case TYPE.callMeMaybe: {
      const sound = version === 0 && body.length % ADDRESS_LENGTH === 0;
      return { type: "callMeMaybe", addresses: sound ? addressesFrom(body, 0) : [] };
    }
    case TYPE.bind:
      return parseBind("bind", body);
    case TYPE.bindChallenge:
      return parseBind("bindChallenge", body);
    case TYPE.bindAnswer:
      return parseBind("bindAnswer", body);
    case TYPE.callMeMaybeVia: {
      if (version !== 0) return { type: "callMeMaybeVia", endpoint: null };
      const endpoint = parseRelayEndpoint(body);
      return endpoint && { type: "callMeMaybeVia", endpoint };
    }
    case TYPE.allocateRequest: {
      if (version !== 0) return { type: "allocateRequest", clientKeys: null, generation: 0 };
      if (body.length < 2 * DISCO_KEY_LENGTH + 4) return null;
      return {
        type: "allocateRequest",
        clientKeys: [body.slice(0, 32), body.slice(32, 64)],
        generation: viewOf(body).getUint32(64),
      };
    }
    case TYPE.allocateResponse: {
      if (version !== 0) return { type: "allocateResponse", generation: 0, endpoint: null };
      if (body.length < 4) return null;
      const endpoint = parseRelayEndpoint(body.subarray(4));
      return endpoint && { type: "allocateResponse", generation: viewOf(body).getUint32(0), endpoint };
    }
    default:
      return null;
  }
}

function parsePing(body: Uint8Array): DiscoPing | null {
  if (body.length < DISCO_TXID_LENGTH) return null;
  const txid = body.slice(0, DISCO_TXID_LENGTH);
  const withKey = DISCO_TXID_LENGTH + DISCO_KEY_LENGTH;
  if (body.length < withKey) return { type: "ping", txid, padding: body.length - DISCO_TXID_LENGTH };
  return { type: "ping", txid, nodeKey: body.slice(DISCO_TXID_LENGTH, withKey), padding: body.length - withKey };
}

function parseBind(type: DiscoBind["type"], body: Uint8Array): DiscoBind | null {
  if (body.length < BIND_LENGTH) return null;
  const view = viewOf(body);
  return {
    type,
    vni: view.getUint32(0),
    generation: view.getUint32(4),
    remoteKey: body.slice(8, 40),
    challenge: body.slice(40, 72),
  };
}

function parseRelayEndpoint(body: Uint8Array): UDPRelayEndpoint | null {
  if (body.length < RELAY_ENDPOINT_LENGTH + ADDRESS_LENGTH) return null;
  const view = viewOf(body);
  return {
    serverKey: body.slice(0, 32),
    clientKeys: [body.slice(32, 64), body.slice(64, 96)],
    lamportId: view.getBigUint64(96),
    vni: view.getUint32(104),
    bindLifetime: view.getBigUint64(108),
    steadyStateLifetime: view.getBigUint64(116),
    addresses: addressesFrom(body, RELAY_ENDPOINT_LENGTH),
  };
}

function addressesFrom(body: Uint8Array, from: number): AddrPort[] {
  const addresses: AddrPort[] = [];
  for (
    let at = from;
    at + ADDRESS_LENGTH <= body.length && addresses.length < DISCO_MAX_ADDRESSES;
    at += ADDRESS_LENGTH
  ) {
    addresses.push(addressAt(body, at));
  }
  return addresses;
}

function addressAt(body: Uint8Array, at: number): AddrPort {
  return formatAddrPort(unmap(body.slice(at, at + 16)), (body[at + 16]! << 8) | body[at + 17]!);
}

function putAddress(out: Uint8Array, at: number, text: AddrPort): void {
  const address = parseAddrPort(text);
  if (!address) throw new RangeError(`${JSON.stringify(text)} is no address and port such as 192.0.2.1:41641`);
  out.set(to16(address.ip), at);
  out[at + 16] = address.port >> 8;
  out[at + 17] = address.port & 0xff;
}

function message(type: number, length: number): Uint8Array {
  const out = new Uint8Array(MESSAGE_HEADER + length);
  out[0] = type;
  return out;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
