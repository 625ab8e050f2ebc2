// Inner IP packets: header parsing, Internet checksums, splitting of TUN superpackets, coalescing toward the TUN.
//
// Sources: RFC 791, 8200, 9293, 768, 1071 (checksum), 1858/3128 (tiny and overlapping fragments), 7112 (first fragment holds
// all headers); the kernel's virtio_net_hdr (uapi/linux/virtio_net.h), native byte order, 10 bytes:
//   0 u8  flags       1 = NEEDS_CSUM
//   1 u8  gso_type    0 none, 1 TCPv4, 4 TCPv6, 5 UDP_L4; 0x80 = ECN
//   2 u16 hdr_len     not trusted
//   4 u16 gso_size    payload bytes per segment
//   6 u16 csum_start  where the checksum starts; 8 u16 csum_offset from there
//
// Sums are kept over native 16-bit words and stored as they are: the Internet checksum does not depend on byte order.
// Results that are more than one number are left in static memory: `parsedPtr`, `splitPtr`, `groPtr`.

export const PROTO_ICMP: i32 = 1;
export const PROTO_TCP: i32 = 6;
export const PROTO_UDP: i32 = 17;
export const PROTO_ICMP6: i32 = 58;
export const PROTO_TSMP: i32 = 99;
export const PROTO_SCTP: i32 = 132;
/** Not a protocol number: a fragment other than the first. */
export const PROTO_FRAGMENT: i32 = 256;

const GSO_TCP4: u32 = 1;
const GSO_TCP6: u32 = 4;
const GSO_UDP: u32 = 5;
const VNET_LEN: usize = 10;

// What parsePacket found, i32 each: 0 version, 4 protocol, 8 transport offset, 12 total length, 16 source port,
// 20 destination port, 24 TCP flags or ICMP type, 28 source address, 32 destination address (pointers).
const parsed: usize = memory.data(48, 16);

// @ts-ignore: decorator
@inline
export function be16(p: usize): u32 {
  return <u32>bswap<u16>(load<u16>(p));
}

// @ts-ignore: decorator
@inline
export function be32(p: usize): u32 {
  return bswap<u32>(load<u32>(p));
}

// @ts-ignore: decorator
@inline
function setBe16(p: usize, value: u32): void {
  store<u16>(p, bswap<u16>(<u16>value));
}

export function parsedPtr(): usize {
  return parsed;
}
// @ts-ignore: decorator
@inline
export function pVersion(): i32 {
  return load<i32>(parsed);
}
// @ts-ignore: decorator
@inline
export function pProto(): i32 {
  return load<i32>(parsed, 4);
}
// @ts-ignore: decorator
@inline
export function pTransport(): i32 {
  return load<i32>(parsed, 8);
}
// @ts-ignore: decorator
@inline
export function pTotal(): i32 {
  return load<i32>(parsed, 12);
}
// @ts-ignore: decorator
@inline
export function pSport(): i32 {
  return load<i32>(parsed, 16);
}
// @ts-ignore: decorator
@inline
export function pDport(): i32 {
  return load<i32>(parsed, 20);
}
// @ts-ignore: decorator
@inline
export function pFlags(): i32 {
  return load<i32>(parsed, 24);
}
// @ts-ignore: decorator
@inline
export function pSrc(): usize {
  return load<usize>(parsed, 28);
}
// @ts-ignore: decorator
@inline
export function pDst(): usize {
  return load<usize>(parsed, 32);
}

/**
 * Length that the IP header claims: IPv4 total length, IPv6 payload length + 40. 0 when the version is neither 4 nor 6, the
 * header is not whole or the claim is more than `len`.
 */
export function ipLength(p: usize, len: i32): i32 {
  if (len < 20) return 0;
  const version = load<u8>(p) >> 4;
  if (version == 4) {
    const total = <i32>be16(p + 2);
    return total >= 20 && total <= len ? total : 0;
  }
  if (version == 6 && len >= 40) {
    const total = <i32>be16(p + 4) + 40;
    return total <= len ? total : 0;
  }
  return 0;
}

/** Parses IP and transport header. 1 and the results in `parsedPtr`, or 0 when the packet is not one that we understand. */
export function parsePacket(p: usize, len: i32): i32 {
  const total = ipLength(p, len);
  if (total == 0) return 0;
  store<i32>(parsed, total, 12);
  if (load<u8>(p) >> 4 == 4) {
    const header = <i32>(load<u8>(p) & 15) << 2;
    if (header < 20 || header > total) return 0;
    store<i32>(parsed, 4);
    store<usize>(parsed, p + 12, 28);
    store<usize>(parsed, p + 16, 32);
    const fragment = be16(p + 6);
    if ((fragment & 0x1fff) != 0) return laterFragment(<i32>(fragment & 0x1fff) << 3, header);
    return transport(p, header, total, <i32>load<u8>(p, 9));
  }
  store<i32>(parsed, 6);
  store<usize>(parsed, p + 8, 28);
  store<usize>(parsed, p + 24, 32);
  let next = <i32>load<u8>(p, 6);
  let at: i32 = 40;
  // Extension headers: at most eight, all inside the packet. A routing header that is not yet used up names another
  // final destination than the one we would check: refused.
  for (let i = 0; i <= 8; i++) {
    if (next != 0 && next != 43 && next != 44 && next != 60) return transport(p, at, total, next);
    if (at + 8 > total) return 0;
    const h = p + <usize>at;
    if (next == 44) {
      const fragment = be16(h + 2);
      if ((fragment & 0xfff8) != 0) return laterFragment(<i32>(fragment & 0xfff8), at + 8);
      at += 8;
    } else {
      if (next == 43 && load<u8>(h, 3) != 0) return 0;
      at += (<i32>load<u8>(h, 1) + 1) << 3;
    }
    if (at > total) return 0;
    next = <i32>load<u8>(h);
  }
  return 0;
}

/** Only version, addresses and length: for packets whose inside is nobody's business. 1, or 0 when even these are wrong. */
export function parseWhole(p: usize, len: i32): i32 {
  const total = ipLength(p, len);
  if (total == 0) return 0;
  const v4 = load<u8>(p) >> 4 == 4;
  store<i32>(parsed, v4 ? 4 : 6);
  store<i32>(parsed, -1, 4);
  store<i32>(parsed, 0, 8);
  store<i32>(parsed, total, 12);
  store<usize>(parsed, p + (v4 ? 12 : 8), 28);
  store<usize>(parsed, p + (v4 ? 16 : 24), 32);
  return 1;
}

/** A fragment that could overwrite the transport header of the first one is never honest (RFC 1858, 3128). */
function laterFragment(offset: i32, at: i32): i32 {
  if (offset < 64) return 0;
  store<i32>(parsed, PROTO_FRAGMENT, 4);
  store<i32>(parsed, at, 8);
  store<i32>(parsed, 0, 16);
  store<i32>(parsed, 0, 20);
  store<i32>(parsed, 0, 24);
  return 1;
}

function transport(p: usize, at: i32, total: i32, proto: i32): i32 {
  const t = p + <usize>at;
  const n = total - at;
  let sport: i32 = 0;
  let dport: i32 = 0;
  let flags: i32 = 0;
  if (proto == PROTO_TCP) {
    if (n < 20) return 0;
    const header = <i32>(load<u8>(t, 12) >> 4) << 2;
    if (header < 20 || header > n) return 0;
    sport = <i32>be16(t);
    dport = <i32>be16(t + 2);
    flags = <i32>load<u8>(t, 13);
  } else if (proto == PROTO_UDP || proto == PROTO_SCTP) {
    if (n < (proto == PROTO_UDP ? 8 : 12)) return 0;
    sport = <i32>be16(t);
    dport = <i32>be16(t + 2);
  } else if ((proto == PROTO_ICMP && pVersion() == 4) || (proto == PROTO_ICMP6 && pVersion() == 6)) {
    if (n < 8) return 0;
    flags = <i32>load<u8>(t);
  }
  store<i32>(parsed, proto, 4);
  store<i32>(parsed, at, 8);
  store<i32>(parsed, sport, 16);
  store<i32>(parsed, dport, 20);
  store<i32>(parsed, flags, 24);
  return 1;
}

// ---- checksums -------------------------------------------------------------------------------------------------------

/** Sum of the native 16-bit words of at most 65,535 bytes, not folded. An odd last byte counts as if followed by zero. */
export function sumWords(p: usize, len: i32): u64 {
  let a = i32x4.splat(0);
  let b = i32x4.splat(0);
  let c = i32x4.splat(0);
  let d = i32x4.splat(0);
  let n = len;
  while (n >= 64) {
    a = i32x4.add(a, i32x4.extadd_pairwise_i16x8_u(v128.load(p)));
    b = i32x4.add(b, i32x4.extadd_pairwise_i16x8_u(v128.load(p, 16)));
    c = i32x4.add(c, i32x4.extadd_pairwise_i16x8_u(v128.load(p, 32)));
    d = i32x4.add(d, i32x4.extadd_pairwise_i16x8_u(v128.load(p, 48)));
    p += 64;
    n -= 64;
  }
  while (n >= 16) {
    a = i32x4.add(a, i32x4.extadd_pairwise_i16x8_u(v128.load(p)));
    p += 16;
    n -= 16;
  }
  a = i32x4.add(i32x4.add(a, b), i32x4.add(c, d));
  let sum: u64 =
    <u64>(<u32>i32x4.extract_lane(a, 0)) +
    <u64>(<u32>i32x4.extract_lane(a, 1)) +
    <u64>(<u32>i32x4.extract_lane(a, 2)) +
    <u64>(<u32>i32x4.extract_lane(a, 3));
  while (n >= 4) {
    sum += <u64>load<u32>(p);
    p += 4;
    n -= 4;
  }
  if (n >= 2) {
    sum += <u64>load<u16>(p);
    p += 2;
    n -= 2;
  }
  if (n > 0) sum += <u64>load<u8>(p);
  return sum;
}

/** Folds to 16 bits, end-around carry. */
export function fold(sum: u64): u32 {
  sum = (sum & 0xffffffff) + (sum >> 32);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return <u32>((sum & 0xffff) + (sum >> 16)) & 0xffff;
}

/** Folded sum of `len` bytes (for tests and for callers outside the module). */
export function checksum(p: usize, len: i32): u32 {
  return fold(sumWords(p, len));
}

/** Sum of the pseudo header: addresses of the packet at `p`, protocol, transport length. */
// @ts-ignore: decorator
@inline
function pseudoSum(p: usize, version: i32, proto: i32, len: i32): u64 {
  const addresses = version == 4 ? sumWords(p + 12, 8) : sumWords(p + 8, 32);
  return addresses + (<u64>proto << 8) + <u64>bswap<u16>(<u16>len);
}

function ip4Checksum(p: usize, header: i32): void {
  store<u16>(p, 0, 10);
  store<u16>(p, <u16>~fold(sumWords(p, header)), 10);
}

// ---- superpackets from the TUN ---------------------------------------------------------------------------------------

// The packet that splitPrepare accepted, i32 each: 0 packet, 4 length, 8 segments, 12 header length, 16 gso size,
// 20 length of each segment but the last, 24 length of the last, 28 transport offset, 32 version, 36 protocol,
// 40 ECN field.
const split: usize = memory.data(48, 16);

export function splitPtr(): usize {
  return split;
}

/** Notes the ECN field of the prepared packet. */
export function splitEcn(ecn: u32): void {
  store<u32>(split, ecn, 40);
}

/**
 * Checks a packet from the TUN with its vnet header (`vnet` 0: the device has none); `parsePacket` must have accepted it.
 * Completes the checksum of a packet that is not segmented. Returns how many segments it makes, 0 when the header is wrong.
 */
export function splitPrepare(p: usize, vnet: usize): i32 {
  const len = pTotal();
  const type: u32 = vnet == 0 ? 0 : <u32>(load<u8>(vnet, 1) & 0x7f);
  store<usize>(split, p);
  store<i32>(split, len, 4);
  store<i32>(split, pVersion(), 32);
  store<i32>(split, pProto(), 36);
  store<i32>(split, pTransport(), 28);
  if (type == 0) {
    if (vnet != 0 && (load<u8>(vnet) & 1) != 0) {
      const start = <i32>load<u16>(vnet, 6);
      const field = start + <i32>load<u16>(vnet, 8);
      if (start < 20 || field + 2 > len) return 0;
      const at = p + <usize>field;
      let value = ~fold(sumWords(p + <usize>start, len - start)) & 0xffff;
      if (value == 0 && load<u16>(vnet, 8) == 6) value = 0xffff;
      store<u16>(at, <u16>value);
    }
    return whole(len);
  }
  const at = pTransport();
  if (<i32>load<u16>(vnet, 6) != at) return 0;
  let header = at + 8;
  if (type == GSO_UDP) {
    if (pProto() != PROTO_UDP || load<u16>(vnet, 8) != 6) return 0;
  } else {
    if (type != (pVersion() == 4 ? GSO_TCP4 : GSO_TCP6) || pProto() != PROTO_TCP || load<u16>(vnet, 8) != 16) return 0;
    header = at + (<i32>(load<u8>(p + <usize>at, 12) >> 4) << 2);
  }
  const gso = <i32>load<u16>(vnet, 4);
  const payload = len - header;
  if (gso == 0 || payload <= 0) return 0;
  const n = (payload + gso - 1) / gso;
  store<i32>(split, n, 8);
  store<i32>(split, header, 12);
  store<i32>(split, gso, 16);
  store<i32>(split, n == 1 ? len : header + gso, 20);
  store<i32>(split, header + payload - (n - 1) * gso, 24);
  return n;
}

function whole(len: i32): i32 {
  store<i32>(split, 1, 8);
  store<i32>(split, 0, 12);
  store<i32>(split, 0, 16);
  store<i32>(split, len, 20);
  store<i32>(split, len, 24);
  return 1;
}

/**
 * Writes segments first .. first + count - 1 of the prepared packet to `out`, `stride` bytes apart, each followed by zeros
 * up to `padded` bytes (the last segment of the packet: up to `lastPadded`).
 */
export function splitWrite(out: usize, first: i32, count: i32, stride: i32, padded: i32, lastPadded: i32): void {
  const p = load<usize>(split);
  const n = load<i32>(split, 8);
  const header = load<i32>(split, 12);
  const gso = load<i32>(split, 16);
  if (header == 0) {
    const len = load<i32>(split, 4);
    memory.copy(out, p, <usize>len);
    memory.fill(out + <usize>len, 0, <usize>(lastPadded - len));
    return;
  }
  const version = load<i32>(split, 32);
  const proto = load<i32>(split, 36);
  const at = load<i32>(split, 28);
  for (let i = first; i < first + count; i++) {
    const last = i == n - 1;
    const len = last ? load<i32>(split, 24) : load<i32>(split, 20);
    memory.copy(out, p, <usize>header);
    memory.copy(out + <usize>header, p + <usize>(header + i * gso), <usize>(len - header));
    const end = last ? lastPadded : padded;
    memory.fill(out + <usize>len, 0, <usize>(end - len));
    if (version == 4) {
      setBe16(out + 2, <u32>len);
      setBe16(out + 4, be16(p + 4) + <u32>i);
      ip4Checksum(out, <i32>(load<u8>(p) & 15) << 2);
    } else {
      setBe16(out + 4, <u32>(len - 40));
    }
    const t = out + <usize>at;
    const room = len - at;
    if (proto == PROTO_TCP) {
      store<u32>(t, bswap<u32>(be32(t + 4) + <u32>(i * gso)), 4);
      let flags = load<u8>(t, 13);
      if (!last) flags &= 0xf6; // FIN and PSH belong to the last segment
      if (i > 0) flags &= 0x7f; // CWR to the first
      store<u8>(t, flags, 13);
      store<u16>(t, 0, 16);
      store<u16>(t, <u16>~fold(sumWords(t, room) + pseudoSum(out, version, proto, room)), 16);
    } else {
      setBe16(t + 4, <u32>room);
      store<u16>(t, 0, 6);
      const value = ~fold(sumWords(t, room) + pseudoSum(out, version, proto, room)) & 0xffff;
      store<u16>(t, <u16>(value == 0 ? 0xffff : value), 6);
    }
    out += <usize>stride;
  }
}

// ---- coalescing toward the TUN ---------------------------------------------------------------------------------------

// One item is one write to the TUN: a packet alone, or a head with the payloads of the packets that continue its flow.
//   0 head, 4 head length, 8 header length, 12 transport offset, 16 segments, 20 payload of the first segment,
//   24 payload so far, 28 next sequence number, 32 state, 36 first link, 40 last link, 44 gso type
// state: bit 0 open, bit 1 head checksum verified.
export const GRO_ITEMS: i32 = 1024;
const GRO_LINKS: i32 = 2048;
const GRO_BUCKETS: u32 = 256;
const GRO_SEGMENTS: i32 = 128;
const items: usize = memory.data(65536, 16); // GRO_ITEMS x 64
const links: usize = memory.data(32768, 16); // GRO_LINKS x 16: payload, length, next
const iovs: usize = memory.data(49152, 16); // (GRO_ITEMS + GRO_LINKS) x 16, struct iovec
const writes: usize = memory.data(8192, 16); // GRO_ITEMS x 8: iovec, count
const buckets: usize = memory.data(512, 16); // GRO_BUCKETS x u16: item + 1

let itemCount: i32 = 0;
let linkCount: i32 = 0;
let groTcp: i32 = 1;
let groUdp: i32 = 1;
let groVnet: i32 = 1;
let memoryBase: u64 = 0;

/**
 * Which protocols are merged, and whether writes start with a vnet header (merging needs one); and the address of this
 * memory in the process, for the iovecs.
 */
export function groSetup(vnet: i32, tcp: i32, udp: i32, baseLow: u32, baseHigh: u32): void {
  memoryBase = (<u64>baseHigh << 32) | <u64>baseLow;
  groVnet = vnet;
  groTcp = vnet & tcp;
  groUdp = vnet & udp;
}

/** Where `groFlush` leaves its list: pairs of u32, offset of the struct iovec array and how many. */
export function groPtr(): usize {
  return writes;
}

/** 1 when another packet might not fit: flush before the next. */
export function groFull(): i32 {
  return itemCount >= GRO_ITEMS || linkCount >= GRO_LINKS ? 1 : 0;
}

export function groPending(): i32 {
  return itemCount;
}

// @ts-ignore: decorator
@inline
function item(i: i32): usize {
  return items + (<usize>i << 6);
}

/**
 * Adds a whole IP packet of `len` bytes (its header's own length) at `p`, with at least 10 writable bytes before it.
 * The bytes must stay where they are until the writes that `groFlush` lists are done.
 */
export function groAdd(p: usize, len: i32): void {
  let at: i32 = 0;
  let proto: i32 = 0;
  let version: i32 = 4;
  if (load<u8>(p) == 0x45) {
    if ((load<u8>(p, 6) & 0x3f) == 0 && load<u8>(p, 7) == 0) {
      at = 20;
      proto = <i32>load<u8>(p, 9);
    }
  } else if (load<u8>(p) >> 4 == 6) {
    version = 6;
    at = 40;
    proto = <i32>load<u8>(p, 6);
  }
  const t = p + <usize>at;
  const n = len - at;
  if (at == 0 || (proto == PROTO_TCP ? n < 20 : proto == PROTO_UDP ? n < 8 : true)) {
    newItem(p, len);
    return;
  }
  const addresses: u32 =
    version == 4
      ? load<u32>(p, 12) ^ (load<u32>(p, 16) << 1)
      : load<u32>(p, 16) ^ load<u32>(p, 20) ^ load<u32>(p, 32) ^ (load<u32>(p, 36) << 1);
  const hash = ((addresses ^ load<u32>(t) ^ <u32>proto) * 0x9e3779b1) >> 24;
  const bucket = buckets + (<usize>hash << 1);

  let header = at + 8;
  let eligible = false;
  if (proto == PROTO_TCP) {
    header = at + (<i32>(load<u8>(t, 12) >> 4) << 2);
    eligible = groTcp != 0 && (load<u8>(t, 13) & 0xf7) == 0x10 && header >= at + 20 && len > header;
  } else {
    eligible = groUdp != 0 && len > header && <i32>be16(t + 4) == n && load<u16>(t, 6) != 0;
  }
  if (!eligible) {
    // Whatever follows in this flow must not be merged with what came before this packet.
    store<u16>(bucket, 0);
    newItem(p, len);
    return;
  }
  const held = <i32>load<u16>(bucket);
  if (held != 0 && append(item(held - 1), p, len, header, at, version, proto)) return;

  const index = newItem(p, len);
  const it = item(index);
  store<i32>(it, header, 8);
  store<i32>(it, at, 12);
  store<i32>(it, len - header, 20);
  store<i32>(it, len - header, 24);
  store<i32>(it, 1, 32);
  if (proto == PROTO_TCP) {
    store<u32>(it, be32(t + 4) + <u32>(len - header), 28);
    store<u32>(it, version == 4 ? GSO_TCP4 : GSO_TCP6, 44);
    if ((load<u8>(t, 13) & 8) != 0) store<i32>(it, 0, 32);
  } else {
    store<u32>(it, GSO_UDP, 44);
  }
  store<u16>(bucket, <u16>(index + 1));
}

function newItem(p: usize, len: i32): i32 {
  const index = itemCount++;
  const it = item(index);
  store<usize>(it, p);
  store<i32>(it, len, 4);
  store<i32>(it, 1, 16);
  store<i32>(it, 0, 32);
  store<i32>(it, -1, 36);
  store<i32>(it, -1, 40);
  return index;
}

/** True when the packet was taken into the item. Everything that the kernel would replicate must be equal. */
function append(it: usize, p: usize, len: i32, header: i32, at: i32, version: i32, proto: i32): bool {
  const state = load<i32>(it, 32);
  if ((state & 1) == 0) return false;
  const h = load<usize>(it);
  const payload = len - header;
  const count = load<i32>(it, 16);
  if (header != load<i32>(it, 8) || at != load<i32>(it, 12)) return false;
  if (payload > load<i32>(it, 20) || count >= GRO_SEGMENTS) return false;
  if (header + load<i32>(it, 24) + payload > 65535) return false;
  if (version == 4) {
    // version, IHL, ToS; flags; TTL, protocol; both addresses
    if (load<u16>(p) != load<u16>(h) || load<u8>(p, 6) != load<u8>(h, 6) || load<u16>(p, 8) != load<u16>(h, 8)) return false;
    if (load<u64>(p, 12) != load<u64>(h, 12)) return false;
  } else {
    // version, traffic class, flow label; next header, hop limit; both addresses
    if (load<u32>(p) != load<u32>(h) || load<u16>(p, 6) != load<u16>(h, 6)) return false;
    if (load<u64>(p, 8) != load<u64>(h, 8) || load<u64>(p, 16) != load<u64>(h, 16)) return false;
    if (load<u64>(p, 24) != load<u64>(h, 24) || load<u64>(p, 32) != load<u64>(h, 32)) return false;
  }
  const t = p + <usize>at;
  const u = h + <usize>at;
  if (load<u32>(t) != load<u32>(u)) return false;
  let push = false;
  if (proto == PROTO_TCP) {
    if (be32(t + 4) != load<u32>(it, 28)) return false;
    // acknowledgement; data offset; window; urgent pointer; options
    if (load<u32>(t, 8) != load<u32>(u, 8) || load<u8>(t, 12) != load<u8>(u, 12)) return false;
    if (load<u16>(t, 14) != load<u16>(u, 14) || load<u16>(t, 18) != load<u16>(u, 18)) return false;
    for (let i: usize = 20; i < <usize>(header - at); i += 4) if (load<u32>(t + i) != load<u32>(u + i)) return false;
    push = (load<u8>(t, 13) & 8) != 0;
  }
  if ((state & 2) == 0) {
    if (!transportSumOk(h, load<i32>(it, 4), at, version, proto)) {
      store<i32>(it, 0, 32);
      return false;
    }
    store<i32>(it, state | 2, 32);
  }
  if (!transportSumOk(p, len, at, version, proto)) return false;

  const index = linkCount++;
  const link = links + (<usize>index << 4);
  store<usize>(link, p + <usize>header);
  store<i32>(link, payload, 4);
  store<i32>(link, -1, 8);
  if (load<i32>(it, 36) < 0) store<i32>(it, index, 36);
  else store<i32>(links + (<usize>load<i32>(it, 40) << 4), index, 8);
  store<i32>(it, index, 40);
  store<i32>(it, count + 1, 16);
  store<i32>(it, load<i32>(it, 24) + payload, 24);
  store<u32>(it, load<u32>(it, 28) + <u32>payload, 28);
  if (push) store<u8>(u, load<u8>(u, 13) | 8, 13);
  if (push || payload < load<i32>(it, 20)) store<i32>(it, 2, 32);
  return true;
}

function transportSumOk(p: usize, len: i32, at: i32, version: i32, proto: i32): bool {
  return fold(sumWords(p + <usize>at, len - at) + pseudoSum(p, version, proto, len - at)) == 0xffff;
}

/** Finishes the headers of what was added and lists the writes at `groPtr`, in order. Returns how many; starts afresh. */
export function groFlush(): i32 {
  const n = itemCount;
  let iov = iovs;
  for (let i = 0; i < n; i++) {
    const it = item(i);
    const p = load<usize>(it);
    const count = load<i32>(it, 16);
    const w = writes + (<usize>i << 3);
    store<usize>(w, iov);
    store<i32>(w, count, 4);
    if (count > 1) finish(it, p);
    if (groVnet != 0) {
      const vnet = p - VNET_LEN;
      store<u64>(vnet, 0);
      store<u16>(vnet, 0, 8);
      if (count > 1) {
        const at = load<i32>(it, 12);
        const type = load<u32>(it, 44);
        store<u8>(vnet, 1);
        store<u8>(vnet, <u8>type, 1);
        store<u16>(vnet, <u16>load<i32>(it, 8), 2);
        store<u16>(vnet, <u16>load<i32>(it, 20), 4);
        store<u16>(vnet, <u16>at, 6);
        store<u16>(vnet, type == GSO_UDP ? 6 : 16, 8);
      }
      store<u64>(iov, memoryBase + <u64>vnet);
      store<u64>(iov, <u64>load<i32>(it, 4) + <u64>VNET_LEN, 8);
    } else {
      store<u64>(iov, memoryBase + <u64>p);
      store<u64>(iov, <u64>load<i32>(it, 4), 8);
    }
    iov += 16;
    let link = load<i32>(it, 36);
    while (link >= 0) {
      const l = links + (<usize>link << 4);
      store<u64>(iov, memoryBase + <u64>load<usize>(l));
      store<u64>(iov, <u64>load<i32>(l, 4), 8);
      iov += 16;
      link = load<i32>(l, 8);
    }
  }
  itemCount = 0;
  linkCount = 0;
  memory.fill(buckets, 0, GRO_BUCKETS << 1);
  return n;
}

function finish(it: usize, p: usize): void {
  const at = load<i32>(it, 12);
  const total = load<i32>(it, 8) + load<i32>(it, 24);
  const t = p + <usize>at;
  const type = load<u32>(it, 44);
  let version: i32 = 4;
  if (load<u8>(p) >> 4 == 4) {
    setBe16(p + 2, <u32>total);
    ip4Checksum(p, 20);
  } else {
    version = 6;
    setBe16(p + 4, <u32>(total - 40));
  }
  // CHECKSUM_PARTIAL: the kernel finishes from the pseudo header's sum, not inverted.
  if (type == GSO_UDP) {
    setBe16(t + 4, <u32>(total - at));
    store<u16>(t, <u16>fold(pseudoSum(p, version, PROTO_UDP, total - at)), 6);
  } else {
    store<u16>(t, <u16>fold(pseudoSum(p, version, PROTO_TCP, total - at)), 16);
  }
}
