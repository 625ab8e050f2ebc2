// Builds IP packets for tests, by slow and plain means: the checksums here are the reference for those of asm/packet.ts.
import type { IP } from "../wire/ip.ts";

export interface PacketSpec {
  src: IP;
  dst: IP;
  proto: number;
  /** Whole transport segment; its checksum is filled in for TCP, UDP, ICMP and ICMPv6. */
  transport: Uint8Array;
  tos?: number;
  ttl?: number;
  id?: number;
  /** Flags and fragment offset, 16 bits (IPv4). */
  fragment?: number;
}

export function concat(...parts: Uint8Array[]): Uint8Array {
  return Uint8Array.from(parts.flatMap((part) => [...part]));
}

/** RFC 1071, byte by byte; big-endian result, not inverted. */
export function slowSum(bytes: Uint8Array, start = 0): number {
  let sum = start;
  for (let i = 0; i < bytes.length; i += 2) {
    sum += (bytes[i]! << 8) | (bytes[i + 1] ?? 0);
    sum = (sum & 0xffff) + (sum >>> 16);
  }
  return sum;
}

function pseudoHeader(src: IP, dst: IP, proto: number, length: number): Uint8Array {
  return concat(src, dst, Uint8Array.of(0, proto, length >> 8, length & 0xff));
}

const CHECKSUM_AT: Record<number, number> = { 6: 16, 17: 6, 1: 2, 58: 2 };

/** The transport segment with the right checksum. */
function withChecksum(spec: PacketSpec): Uint8Array {
  const at = CHECKSUM_AT[spec.proto];
  const out = spec.transport.slice();
  if (at === undefined || out.length < at + 2) return out;
  out[at] = 0;
  out[at + 1] = 0;
  const pseudo = spec.proto === 1 ? 0 : slowSum(pseudoHeader(spec.src, spec.dst, spec.proto, out.length));
  let value = ~slowSum(out, pseudo) & 0xffff;
  if (value === 0 && spec.proto === 17) value = 0xffff;
  out[at] = value >> 8;
  out[at + 1] = value & 0xff;
  return out;
}

export function ipPacket(spec: PacketSpec): Uint8Array {
  const body = withChecksum(spec);
  if (spec.src.length === 4) {
    const header = new Uint8Array(20);
    const view = new DataView(header.buffer);
    header[0] = 0x45;
    header[1] = spec.tos ?? 0;
    view.setUint16(2, 20 + body.length);
    view.setUint16(4, spec.id ?? 0);
    view.setUint16(6, spec.fragment ?? 0x4000);
    header[8] = spec.ttl ?? 64;
    header[9] = spec.proto;
    header.set(spec.src, 12);
    header.set(spec.dst, 16);
    view.setUint16(10, ~slowSum(header) & 0xffff);
    return concat(header, body);
  }
  const header = new Uint8Array(40);
  header[0] = 0x60 | ((spec.tos ?? 0) >> 4);
  header[1] = ((spec.tos ?? 0) & 15) << 4;
  new DataView(header.buffer).setUint16(4, body.length);
  header[6] = spec.proto;
  header[7] = spec.ttl ?? 64;
  header.set(spec.src, 8);
  header.set(spec.dst, 24);
  return concat(header, body);
}

export interface TcpSpec {
  sport: number;
  dport: number;
  seq?: number;
  ack?: number;
  flags?: number;
  window?: number;
  options?: Uint8Array;
  payload?: Uint8Array;
}

export function tcp(spec: TcpSpec): Uint8Array {
  const options = spec.options ?? new Uint8Array(0);
  const header = new Uint8Array(20);
  const view = new DataView(header.buffer);
  view.setUint16(0, spec.sport);
  view.setUint16(2, spec.dport);
  view.setUint32(4, spec.seq ?? 0);
  view.setUint32(8, spec.ack ?? 0);
  header[12] = ((20 + options.length) >> 2) << 4;
  header[13] = spec.flags ?? 0x10;
  view.setUint16(14, spec.window ?? 1000);
  return concat(header, options, spec.payload ?? new Uint8Array(0));
}

export function udp(sport: number, dport: number, payload: Uint8Array): Uint8Array {
  const header = new Uint8Array(8);
  const view = new DataView(header.buffer);
  view.setUint16(0, sport);
  view.setUint16(2, dport);
  view.setUint16(4, 8 + payload.length);
  return concat(header, payload);
}

export const TSO4 = 1;
export const TSO6 = 4;
export const USO = 5;

export function vnetHeader(fields: {
  flags?: number;
  type?: number;
  headerLength?: number;
  size?: number;
  start?: number;
  offset?: number;
}): Uint8Array {
  const out = new Uint8Array(10);
  const view = new DataView(out.buffer);
  out[0] = fields.flags ?? 0;
  out[1] = fields.type ?? 0;
  view.setUint16(2, fields.headerLength ?? 0, true);
  view.setUint16(4, fields.size ?? 0, true);
  view.setUint16(6, fields.start ?? 0, true);
  view.setUint16(8, fields.offset ?? 0, true);
  return out;
}

/** Whether IP header and transport checksums are right. */
export function checksumsOk(packet: Uint8Array): boolean {
  const v4 = packet[0]! >> 4 === 4;
  const header = v4 ? (packet[0]! & 15) * 4 : 40;
  if (v4 && slowSum(packet.subarray(0, header)) !== 0xffff) return false;
  const src = v4 ? packet.subarray(12, 16) : packet.subarray(8, 24);
  const dst = v4 ? packet.subarray(16, 20) : packet.subarray(24, 40);
  const proto = v4 ? packet[9]! : packet[6]!;
  const body = packet.subarray(header);
  return slowSum(body, slowSum(pseudoHeader(src, dst, proto, body.length))) === 0xffff;
}
