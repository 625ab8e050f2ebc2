// Message structures of the socket calls, and writers that lay them out in memory that the kernel reads in place. Little
// endian and LP64, the same on x86-64 and aarch64.
//
//   iovec      16 bytes: base ptr 0, len u64 8
//   msghdr     56 bytes: name ptr 0, namelen u32 8, iov ptr 16, iovlen u64 24, control ptr 32, controllen u64 40, flags i32 48
//   mmsghdr    64 bytes: msghdr 0, msg_len u32 56
//   cmsghdr    16 bytes: len u64 0 (header and data), level i32 8, type i32 12; data at 16; the next at the next multiple of 8
//   sockaddr_in   16 bytes: family u16 0, port u16 big endian 2, address 4
//   sockaddr_in6  28 bytes: family u16 0, port u16 big endian 2, flowinfo u32 4, address 8, scope id u32 24
//
// Control messages, by level and type:
//   SOL_UDP 17, UDP_SEGMENT 103   sent: u16 segment size (len 18, space 24)
//   SOL_UDP 17, UDP_GRO 104       received: i32 segment size (len 20, space 24)
//   IPPROTO_IP 0, IP_PKTINFO 8    in_pktinfo, 12 bytes (len 28, space 32): ifindex i32 0, spec_dst 4, addr 8. Received:
//                                 spec_dst is the local address. Sent: spec_dst is the source, ifindex 0 leaves the route free
//   IPPROTO_IP 0, IP_TOS 1         received: u8 (len 17); sent: i32 (len 20), space 24
//   IPPROTO_IPV6 41, IPV6_TCLASS 67    i32 (len 20, space 24), both ways
//   IPPROTO_IPV6 41, IPV6_PKTINFO 50   in6_pktinfo, 20 bytes (len 36, space 40): address 0, ifindex u32 16, both ways
//
// Writers take a DataView of the memory and offsets in it. Pointers inside the structures are absolute: `base` (from
// `addressOf(memory.buffer)`) plus the offset.
import { type AddrPort, formatAddrPort, type IP, parseAddrPort } from "../src/wire/ip.ts";
import {
  AF_INET,
  AF_INET6,
  IP_PKTINFO,
  IP_TOS,
  IPPROTO_IP,
  IPPROTO_IPV6,
  IPV6_PKTINFO,
  IPV6_TCLASS,
  SOL_UDP,
  UDP_GRO,
  UDP_SEGMENT,
} from "./constants.ts";
import { buffer } from "./libc.ts";

export const IOVEC_SIZE = 16;
export const IOVEC_BASE = 0;
export const IOVEC_LEN = 8;

export const MSGHDR_SIZE = 56;
export const MSGHDR_NAME = 0;
export const MSGHDR_NAMELEN = 8;
export const MSGHDR_IOV = 16;
export const MSGHDR_IOVLEN = 24;
export const MSGHDR_CONTROL = 32;
export const MSGHDR_CONTROLLEN = 40;
export const MSGHDR_FLAGS = 48;

export const MMSGHDR_SIZE = 64;
export const MMSGHDR_LEN = 56;

export const CMSGHDR_SIZE = 16;
export const CMSG_LEVEL = 8;
export const CMSG_TYPE = 12;

export const SOCKADDR_IN_SIZE = 16;
export const SOCKADDR_IN6_SIZE = 28;
/** Room for either, a multiple of 16. */
export const SOCKADDR_ROOM = 32;

/** Room that each control message takes. */
export const CMSG_SPACE_TOS = 24;
export const CMSG_SPACE_SEGMENT = 24;
export const CMSG_SPACE_PKTINFO4 = 32;
export const CMSG_SPACE_PKTINFO6 = 40;
/** Room for all that `parseControl` reads or the writers write on one message. */
export const CONTROL_ROOM = 96;

const TWO_32 = 0x1_0000_0000;

/** A 64-bit pointer or length, from a number below 2^53. */
export function writeU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value >>> 0, true);
  view.setUint32(at + 4, Math.floor(value / TWO_32), true);
}

export function writeIovec(view: DataView, at: number, address: number, length: number): void {
  writeU64(view, at + IOVEC_BASE, address);
  writeU64(view, at + IOVEC_LEN, length);
}

/** All addresses absolute; 0 for none. Fits the msghdr at the head of an mmsghdr; msg_len is not touched. */
export function writeMsghdr(
  view: DataView,
  at: number,
  name: number,
  nameLength: number,
  iov: number,
  iovCount: number,
  control: number,
  controlLength: number,
): void {
  writeU64(view, at + MSGHDR_NAME, name);
  writeU64(view, at + MSGHDR_NAMELEN, nameLength);
  writeU64(view, at + MSGHDR_IOV, iov);
  writeU64(view, at + MSGHDR_IOVLEN, iovCount);
  writeU64(view, at + MSGHDR_CONTROL, control);
  writeU64(view, at + MSGHDR_CONTROLLEN, controlLength);
  writeU64(view, at + MSGHDR_FLAGS, 0);
}

function writeCmsghdr(view: DataView, at: number, dataLength: number, level: number, type: number): void {
  writeU64(view, at, CMSGHDR_SIZE + dataLength);
  view.setInt32(at + CMSG_LEVEL, level, true);
  view.setInt32(at + CMSG_TYPE, type, true);
}

/** UDP_SEGMENT: the kernel cuts the payload into datagrams of `segmentSize`. Returns the space taken, 24. */
export function writeSegmentCmsg(view: DataView, at: number, segmentSize: number): number {
  writeCmsghdr(view, at, 2, SOL_UDP, UDP_SEGMENT);
  writeU64(view, at + CMSGHDR_SIZE, segmentSize);
  return CMSG_SPACE_SEGMENT;
}

/** ToS byte or traffic class of an outgoing datagram, `family` 4 or 6. Returns the space taken, 24. */
export function writeTosCmsg(view: DataView, at: number, family: 4 | 6, tos: number): number {
  if (family === 4) writeCmsghdr(view, at, 4, IPPROTO_IP, IP_TOS);
  else writeCmsghdr(view, at, 4, IPPROTO_IPV6, IPV6_TCLASS);
  writeU64(view, at + CMSGHDR_SIZE, tos);
  return CMSG_SPACE_TOS;
}

/** Source address of an IPv4 datagram, the 4 bytes as `parseControl` gave them (`local4`). Returns the space taken, 32. */
export function writePktinfo4Cmsg(view: DataView, at: number, ifindex: number, local4: number): number {
  writeCmsghdr(view, at, 12, IPPROTO_IP, IP_PKTINFO);
  view.setInt32(at + CMSGHDR_SIZE, ifindex, true);
  view.setUint32(at + CMSGHDR_SIZE + 4, local4, true);
  writeU64(view, at + CMSGHDR_SIZE + 8, 0);
  return CMSG_SPACE_PKTINFO4;
}

/** Source address of an IPv6 datagram: 16 bytes at `addressAt` of the same view. Returns the space taken, 40. */
export function writePktinfo6Cmsg(view: DataView, at: number, ifindex: number, addressAt: number): number {
  writeCmsghdr(view, at, 20, IPPROTO_IPV6, IPV6_PKTINFO);
  for (let i = 0; i < 16; i += 4) view.setUint32(at + CMSGHDR_SIZE + i, view.getUint32(addressAt + i, true), true);
  writeU64(view, at + CMSGHDR_SIZE + 16, ifindex);
  return CMSG_SPACE_PKTINFO6;
}

/** What the control messages of a received datagram say. One object is filled again and again. */
export interface Control {
  /** UDP_GRO segment size; 0: one datagram. */
  segmentSize: number;
  /** Interface it came in on; 0: not said. */
  ifindex: number;
  /** IPv4: local address as the 4 bytes read little endian; 0: not said. */
  local4: number;
  /** IPv6: offset of the 16 bytes of the local address in the view; 0: not said. */
  local6At: number;
  /** ToS byte or traffic class: its lower two bits are the ECN field. */
  tos: number;
}

export function emptyControl(): Control {
  return { segmentSize: 0, ifindex: 0, local4: 0, local6At: 0, tos: 0 };
}

/** Reads `length` bytes (msg_controllen after recvmmsg) of control messages at `at` into `out`. Unknown ones are skipped. */
export function parseControl(view: DataView, at: number, length: number, out: Control): void {
  out.segmentSize = 0;
  out.ifindex = 0;
  out.local4 = 0;
  out.local6At = 0;
  out.tos = 0;
  const end = at + length;
  let p = at;
  while (p + CMSGHDR_SIZE <= end) {
    const len = view.getUint32(p, true);
    if (len < CMSGHDR_SIZE || p + len > end) return;
    const level = view.getInt32(p + CMSG_LEVEL, true);
    const type = view.getInt32(p + CMSG_TYPE, true);
    const data = p + CMSGHDR_SIZE;
    if (level === SOL_UDP && type === UDP_GRO && len >= CMSGHDR_SIZE + 4) {
      out.segmentSize = view.getInt32(data, true);
    } else if (level === IPPROTO_IP && type === IP_PKTINFO && len >= CMSGHDR_SIZE + 12) {
      out.ifindex = view.getInt32(data, true);
      out.local4 = view.getUint32(data + 4, true);
    } else if (level === IPPROTO_IPV6 && type === IPV6_PKTINFO && len >= CMSGHDR_SIZE + 20) {
      out.local6At = data;
      out.ifindex = view.getUint32(data + 16, true);
    } else if (len > CMSGHDR_SIZE) {
      const isTos = (level === IPPROTO_IP && type === IP_TOS) || (level === IPPROTO_IPV6 && type === IPV6_TCLASS);
      if (isTos) out.tos = view.getUint8(data);
    }
    p += (len + 7) & ~7;
  }
}

/** sockaddr_in or sockaddr_in6 at `at`. Returns its length, 16 or 28. */
export function writeSockaddr(view: DataView, at: number, ip: IP, port: number, scopeId = 0): number {
  if (ip.length === 4) {
    view.setUint16(at, AF_INET, true);
    view.setUint16(at + 2, port, false);
    for (let i = 0; i < 4; i++) view.setUint8(at + 4 + i, ip[i]!);
    writeU64(view, at + 8, 0);
    return SOCKADDR_IN_SIZE;
  }
  view.setUint16(at, AF_INET6, true);
  view.setUint16(at + 2, port, false);
  view.setUint32(at + 4, 0, true);
  for (let i = 0; i < 16; i++) view.setUint8(at + 8 + i, ip[i]!);
  view.setUint32(at + 24, scopeId, true);
  return SOCKADDR_IN6_SIZE;
}

/** Address and port of the sockaddr at `at`, copied; null for another family. */
export function readSockaddr(view: DataView, at: number): { ip: IP; port: number; scopeId: number } | null {
  const family = view.getUint16(at, true);
  if (family !== AF_INET && family !== AF_INET6) return null;
  const ip = new Uint8Array(family === AF_INET ? 4 : 16);
  const from = at + (family === AF_INET ? 4 : 8);
  for (let i = 0; i < ip.length; i++) ip[i] = view.getUint8(from + i);
  return {
    ip,
    port: view.getUint16(at + 2, false),
    scopeId: family === AF_INET6 ? view.getUint32(at + 24, true) : 0,
  };
}

/** Bytes of a sockaddr_in or sockaddr_in6 for "192.0.2.1:41641". Throws a sentence when the text is not an address. */
export function sockaddrOf(address: AddrPort): Uint8Array<ArrayBuffer> {
  const parsed = parseAddrPort(address);
  if (!parsed)
    throw new RangeError(
      `${JSON.stringify(address)} is not an address and port: write 192.0.2.1:41641 or [2001:db8::1]:41641`,
    );
  const out = buffer(parsed.ip.length === 4 ? SOCKADDR_IN_SIZE : SOCKADDR_IN6_SIZE);
  writeSockaddr(new DataView(out.buffer), 0, parsed.ip, parsed.port);
  return out;
}

/** Text of the sockaddr at `at`, canonical; null for another family. */
export function addrPortAt(view: DataView, at: number): AddrPort | null {
  const address = readSockaddr(view, at);
  return address && formatAddrPort(address.ip, address.port);
}
