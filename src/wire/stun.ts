// STUN (RFC 5389), the subset that relays and nodes speak: one Binding request, one Binding success response.
//
//   message   0  u16  type: 0x0001 request, 0x0101 success response
//             2  u16  length of the attributes, a multiple of 4
//             4  u32  cookie 0x2112a442
//             8  12   transaction id
//            20  ...  attributes: u16 type, u16 length, value padded with zeros to 4 bytes
//
//   request   SOFTWARE (0x8022) "tailnode", then FINGERPRINT (0x8028) = CRC-32 of all before it, XOR 0x5354554e; 40 bytes
//   response  XOR-MAPPED-ADDRESS (0x0020): 0, family (1 IPv4, 2 IPv6), port XOR 0x2112, address XOR cookie || transaction id
//
// spec/derp-wire.md section 15. Numbers are big-endian.
import { crc32 } from "node:zlib";
import { type IP, unmap } from "./ip.ts";

export const STUN_PORT = 3478;
export const STUN_TXID_LENGTH = 12;
const STUN_REQUEST_LENGTH = 40;

const HEADER = 20;
const REQUEST = 0x0001;
const SUCCESS = 0x0101;
const COOKIE = 0x2112a442;
const MAPPED_ADDRESS = 0x0001;
const XOR_MAPPED_ADDRESS = 0x0020;
const XOR_MAPPED_ADDRESS_ALT = 0x8020;
const SOFTWARE = 0x8022;
const FINGERPRINT = 0x8028;
const FINGERPRINT_XOR = 0x5354554e;
const SOFTWARE_NAME = new TextEncoder().encode("tailnode");
/** One Ethernet frame is far more than any answer needs. */
const MAX_LENGTH = 1500;

export interface StunResponse {
  /** 12 bytes; the caller matches it with a request of its own. */
  txid: Uint8Array;
  /** Where the server saw the request come from: 4 or 16 bytes. */
  ip: IP;
  port: number;
}

/** True when the datagram is recognisably STUN: what tells it apart from WireGuard and disco on one UDP port. */
export function isStun(datagram: Uint8Array): boolean {
  return (
    datagram.length >= HEADER &&
    (datagram[0]! & 0xc0) === 0 &&
    datagram[4] === 0x21 &&
    datagram[5] === 0x12 &&
    datagram[6] === 0xa4 &&
    datagram[7] === 0x42
  );
}

/** The Binding request with this 12-byte transaction id, which must be unpredictable: 40 bytes. */
export function encodeStunRequest(txid: Uint8Array): Uint8Array {
  const out = new Uint8Array(STUN_REQUEST_LENGTH);
  const view = header(out, REQUEST, txid);
  view.setUint16(20, SOFTWARE);
  view.setUint16(22, SOFTWARE_NAME.length);
  out.set(SOFTWARE_NAME, 24);
  view.setUint16(32, FINGERPRINT);
  view.setUint16(34, 4);
  view.setUint32(36, fingerprint(out.subarray(0, 32)));
  return out;
}

/**
 * The transaction id of a Binding request from a node: SOFTWARE is "tailnode", and a correct FINGERPRINT is the last
 * attribute. Null for everything else, which a server drops in silence so that it is no reflector for the public.
 */
export function parseStunRequest(datagram: Uint8Array): Uint8Array | null {
  if (!isStun(datagram) || datagram.length > MAX_LENGTH) return null;
  const view = viewOf(datagram);
  if (view.getUint16(0) !== REQUEST) return null;
  let isNode = false;
  let last = 0;
  let lastAt = 0;
  const wellFormed = eachAttribute(view, (type, at, length) => {
    last = type;
    lastAt = at;
    if (type === SOFTWARE) isNode = equal(datagram.subarray(at, at + length), SOFTWARE_NAME);
    else if (type === FINGERPRINT && length !== 4) last = 0;
  });
  if (!wellFormed || !isNode || last !== FINGERPRINT || lastAt + 4 !== datagram.length) return null;
  if (view.getUint32(lastAt) !== fingerprint(datagram.subarray(0, lastAt - 4))) return null;
  return datagram.slice(8, HEADER);
}

/** The answer to the request with this transaction id that came from ip:port: 32 bytes for IPv4 and IPv4-mapped, else 44. */
export function encodeStunResponse(txid: Uint8Array, ip: IP, port: number): Uint8Array {
  const address = unmap(ip);
  const out = new Uint8Array(HEADER + 8 + address.length);
  const view = header(out, SUCCESS, txid);
  view.setUint16(20, XOR_MAPPED_ADDRESS);
  view.setUint16(22, 4 + address.length);
  out[25] = address.length === 4 ? 1 : 2;
  view.setUint16(26, port ^ (COOKIE >>> 16));
  for (let i = 0; i < address.length; i++) out[28 + i] = address[i]! ^ out[4 + i]!;
  return out;
}

/**
 * The address in a Binding success response, of any server: XOR-MAPPED-ADDRESS, its old number 0x8020, or else
 * MAPPED-ADDRESS. Unknown attributes and bytes behind the message are ignored. Null when there is none.
 */
export function parseStunResponse(datagram: Uint8Array): StunResponse | null {
  if (!isStun(datagram) || datagram.length > MAX_LENGTH) return null;
  const view = viewOf(datagram);
  if (view.getUint16(0) !== SUCCESS) return null;
  const txid = datagram.slice(8, HEADER);
  let xored: StunResponse | null = null;
  let plain: StunResponse | null = null;
  const wellFormed = eachAttribute(view, (type, at, length) => {
    const isXored = type === XOR_MAPPED_ADDRESS || type === XOR_MAPPED_ADDRESS_ALT;
    if (!isXored && type !== MAPPED_ADDRESS) return;
    const size = datagram[at + 1] === 1 ? 4 : datagram[at + 1] === 2 ? 16 : 0;
    if (size === 0 || length < 4 + size) return;
    const ip = datagram.slice(at + 4, at + 4 + size);
    const port = view.getUint16(at + 2);
    if (isXored) {
      for (let i = 0; i < size; i++) ip[i]! ^= datagram[4 + i]!;
      xored ??= { txid, ip, port: port ^ (COOKIE >>> 16) };
    } else {
      plain ??= { txid, ip, port };
    }
  });
  return wellFormed ? (xored ?? plain) : null;
}

/** Calls back with type, offset of the value and its length. False when an attribute or the message is cut short. */
function eachAttribute(view: DataView, visit: (type: number, at: number, length: number) => void): boolean {
  const end = HEADER + view.getUint16(2);
  if (end > view.byteLength) return false;
  let at = HEADER;
  while (at < end) {
    if (at + 4 > end) return false;
    const length = view.getUint16(at + 2);
    const next = at + 4 + ((length + 3) & ~3);
    if (next > end) return false;
    visit(view.getUint16(at), at + 4, length);
    at = next;
  }
  return true;
}

function header(out: Uint8Array, type: number, txid: Uint8Array): DataView {
  if (txid.length !== STUN_TXID_LENGTH) throw new RangeError(`a STUN transaction id has 12 bytes, not ${txid.length}`);
  const view = viewOf(out);
  view.setUint16(0, type);
  view.setUint16(2, out.length - HEADER);
  view.setUint32(4, COOKIE);
  out.set(txid, 8);
  return view;
}

function fingerprint(before: Uint8Array): number {
  return (crc32(before) ^ FINGERPRINT_XOR) >>> 0;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function equal(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}
