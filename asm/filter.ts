// The packet filter: rules of the control server (ts2021 spec part 18), semantics of spec/datapath-wire.md part 11.2.
//
// The host writes a table into memory (src/datapath/filter.ts lays it out) and names it with `filterSet`; all u32 unless said:
//   header   0 local IPv4 ranges, 4 how many, 8 local IPv6 ranges, 12 how many, 16 matches, 20 how many, 24 bounds, 28 unused
//   match    64 bytes: 0 protocols, 256 bits; 32 source IPv4 ranges, 36 how many, 40 source IPv6 ranges, 44 how many,
//            48 destinations IPv4, 52 how many, 56 destinations IPv6, 60 how many
//   range    IPv4: first, last (numbers). IPv6: 32 bytes, first high u64, first low, last high, last low (numbers).
//            Sorted, not overlapping: searched by halves
//   destination   a range and after it the ports, first | last << 16: 12 bytes IPv4, 40 bytes IPv6 (4 unused)
//   bounds   96 bytes for each eight matches, 16-aligned: 0 lowest destination port of each, u16; 16 highest; 32 lowest IPv4
//            source of each; 64 highest. Who lies outside need not be looked at
// Pointers are offsets in this memory.
//
// A rule's verdict depends on source, destination, protocol and destination port alone, so verdicts are kept in a small
// table until the rules change. The flows that went out (UDP, SCTP) are the 512 latest, in the order of their last use.
import {
  be32,
  pDport,
  pDst,
  pFlags,
  pProto,
  PROTO_FRAGMENT,
  PROTO_ICMP,
  PROTO_ICMP6,
  PROTO_SCTP,
  PROTO_TCP,
  PROTO_TSMP,
  PROTO_UDP,
  pSport,
  pSrc,
  pVersion,
} from "./packet";

let table: usize = 0;

/** The table now in force; 0: everything passes. Remembered verdicts are void, recorded flows stay. */
export function filterSet(pointer: usize): void {
  table = pointer;
  memory.fill(verdicts, 0, VERDICTS * VERDICT_SIZE);
}

/** 1 while a table is in force. */
export function filterOn(): i32 {
  return table != 0 ? 1 : 0;
}

// ---- both directions -------------------------------------------------------------------------------------------------

/** Multicast and link-local destinations never cross the tunnel, except the metadata address 169.254.169.254. */
function forbiddenDestination(): bool {
  const d = pDst();
  if (pVersion() == 4) {
    const ip = be32(d);
    if (ip >> 28 == 14) return true;
    return ip >> 16 == 0xa9fe && ip != 0xa9fea9fe;
  }
  return load<u8>(d) == 0xff || (load<u8>(d) == 0xfe && (load<u8>(d, 1) & 0xc0) == 0x80);
}

/** Outbound check of the packet that `parsePacket` took. 1 passes; the flow is then remembered for replies. */
export function filterOut(): i32 {
  if (table == 0) return 1;
  if (forbiddenDestination()) return 0;
  const proto = pProto();
  if (proto == PROTO_UDP || proto == PROTO_SCTP) {
    flowKey(pSrc(), pDst(), pSport(), pDport(), proto);
    flowRecord();
  }
  return 1;
}

/** Inbound check of the packet that `parsePacket` took. 1 passes. */
export function filterIn(): i32 {
  if (table == 0) return 1;
  if (forbiddenDestination()) return 0;
  const proto = pProto();
  if (proto == PROTO_FRAGMENT) return 1;
  if (!isLocal()) return 0;
  const v4 = pVersion() == 4;
  if ((proto == PROTO_ICMP && v4) || (proto == PROTO_ICMP6 && !v4)) {
    return icmpReplyOrError(pFlags(), v4) || verdict(proto, 0, MATCH_ADDRESSES) ? 1 : 0;
  }
  if (proto == PROTO_TCP) {
    // Only a SYN without ACK opens a connection.
    if ((pFlags() & 0x12) != 2) return 1;
    return verdict(proto, pDport(), MATCH_PORT) ? 1 : 0;
  }
  if (proto == PROTO_UDP || proto == PROTO_SCTP) {
    flowKey(pDst(), pSrc(), pDport(), pSport(), proto);
    if (flowSeen()) return 1;
    return verdict(proto, pDport(), MATCH_PORT) ? 1 : 0;
  }
  if (proto == PROTO_TSMP) return 1;
  return verdict(proto, 0, MATCH_ALL_PORTS) ? 1 : 0;
}

/** Echo replies; destination unreachable, packet too big, time exceeded, parameter problem (RFC 792, 4443). */
function icmpReplyOrError(type: i32, v4: bool): bool {
  if (v4) return type == 0 || type == 3 || type == 11 || type == 12;
  return type == 129 || (type >= 1 && type <= 4);
}

function isLocal(): bool {
  return pVersion() == 4
    ? inRanges4(be32(pDst()), load<usize>(table), load<i32>(table, 4))
    : inRanges6(pDst(), load<usize>(table, 8), load<i32>(table, 12));
}

function inRanges4(ip: u32, ranges: usize, n: i32): bool {
  let low: i32 = 0;
  let high = n;
  while (low < high) {
    const middle = (low + high) >> 1;
    const r = ranges + (<usize>middle << 3);
    if (ip < load<u32>(r)) high = middle;
    else if (ip > load<u32>(r, 4)) low = middle + 1;
    else return true;
  }
  return false;
}

function inRanges6(address: usize, ranges: usize, n: i32): bool {
  const hi = bswap<u64>(load<u64>(address));
  const lo = bswap<u64>(load<u64>(address, 8));
  let low: i32 = 0;
  let high = n;
  while (low < high) {
    const middle = (low + high) >> 1;
    const r = ranges + (<usize>middle << 5);
    const side = compare6(hi, lo, r);
    if (side < 0) high = middle;
    else if (side > 0) low = middle + 1;
    else return true;
  }
  return false;
}

/** -1 below the range at `r`, 0 in it, 1 above. */
function compare6(hi: u64, lo: u64, r: usize): i32 {
  const firstHi = load<u64>(r);
  const lastHi = load<u64>(r, 16);
  if (hi < firstHi || (hi == firstHi && lo < load<u64>(r, 8))) return -1;
  if (hi > lastHi || (hi == lastHi && lo > load<u64>(r, 24))) return 1;
  return 0;
}

// ---- rules -----------------------------------------------------------------------------------------------------------

/** The protocol is named and the port is in the range. */
const MATCH_PORT: i32 = 0;
/** Addresses alone: whatever the rule's protocols and ports. */
const MATCH_ADDRESSES: i32 = 1;
/** The protocol is named and the rule covers all ports. */
const MATCH_ALL_PORTS: i32 = 2;

function matches(proto: i32, port: i32, how: i32): bool {
  const n = load<i32>(table, 20);
  let m = load<usize>(table, 16);
  let bounds = load<usize>(table, 24);
  const v4 = pVersion() == 4;
  const ports = i16x8.splat(<i16>port);
  const source = i32x4.splat(v4 ? <i32>be32(pSrc()) : 0);
  for (let left = n; left > 0; left -= 8, m += 512, bounds += 96) {
    // A bit for each of the eight that may match.
    let maybe: i32 = left < 8 ? (1 << left) - 1 : 255;
    if (how == MATCH_PORT) {
      maybe &= i16x8.bitmask(
        v128.and(i16x8.ge_u(ports, v128.load(bounds)), i16x8.le_u(ports, v128.load(bounds, 16))),
      );
    }
    if (v4 && maybe != 0) maybe &= sourceBounds(source, bounds + 32) | (sourceBounds(source, bounds + 48) << 4);
    for (; maybe != 0; maybe &= maybe - 1) {
      if (ruleMatches(m + (<usize>ctz(maybe) << 6), proto, port, how, v4)) return true;
    }
  }
  return false;
}

// @ts-ignore: decorator
@inline
function sourceBounds(source: v128, p: usize): i32 {
  return i32x4.bitmask(v128.and(i32x4.ge_u(source, v128.load(p)), i32x4.le_u(source, v128.load(p, 32))));
}

function ruleMatches(m: usize, proto: i32, port: i32, how: i32, v4: bool): bool {
  if (how != MATCH_ADDRESSES && ((<u32>load<u8>(m + <usize>(proto >> 3)) >> <u32>(proto & 7)) & 1) == 0) return false;
  return v4
    ? destination4(m, port, how) && inRanges4(be32(pSrc()), load<usize>(m, 32), load<i32>(m, 36))
    : destination6(m, port, how) && inRanges6(pSrc(), load<usize>(m, 40), load<i32>(m, 44));
}

function portsOk(ports: u32, port: i32, how: i32): bool {
  if (how == MATCH_ADDRESSES) return true;
  if (how == MATCH_ALL_PORTS) return ports == 0xffff0000;
  return <u32>port >= (ports & 0xffff) && <u32>port <= ports >> 16;
}

function destination4(m: usize, port: i32, how: i32): bool {
  const ip = be32(pDst());
  let d = load<usize>(m, 48);
  const end = d + <usize>(load<i32>(m, 52) * 12);
  for (; d < end; d += 12) {
    if (ip >= load<u32>(d) && ip <= load<u32>(d, 4) && portsOk(load<u32>(d, 8), port, how)) return true;
  }
  return false;
}

function destination6(m: usize, port: i32, how: i32): bool {
  const hi = bswap<u64>(load<u64>(pDst()));
  const lo = bswap<u64>(load<u64>(pDst(), 8));
  let d = load<usize>(m, 56);
  const end = d + <usize>(load<i32>(m, 60) * 40);
  for (; d < end; d += 40) {
    if (compare6(hi, lo, d) == 0 && portsOk(load<u32>(d, 32), port, how)) return true;
  }
  return false;
}

// ---- remembered verdicts ---------------------------------------------------------------------------------------------

// 512 entries of 48 bytes, direct mapped: 0 source, 16 destination (IPv4: first 4 bytes, rest zero), 32 protocol | version
// << 8 | used << 16, 36 port, 40 verdict.
const VERDICTS: usize = 512;
const VERDICT_SIZE: usize = 48;
const verdicts: usize = memory.data(24576, 16);

function verdict(proto: i32, port: i32, how: i32): bool {
  const s = pSrc();
  const d = pDst();
  const kind: u32 = 0x10000 | (<u32>pVersion() << 8) | <u32>proto;
  let s0: u64, s1: u64, d0: u64, d1: u64;
  if (pVersion() == 4) {
    s0 = <u64>load<u32>(s);
    d0 = <u64>load<u32>(d);
    s1 = 0;
    d1 = 0;
  } else {
    s0 = load<u64>(s);
    s1 = load<u64>(s, 8);
    d0 = load<u64>(d);
    d1 = load<u64>(d, 8);
  }
  const mix = (s0 ^ rotl<u64>(s1, 13) ^ rotl<u64>(d0, 29) ^ rotl<u64>(d1, 43) ^ <u64>kind ^ (<u64>port << 20)) * 0x9e3779b97f4a7c15;
  const e = verdicts + <usize>(mix >> 55) * VERDICT_SIZE;
  if (
    load<u64>(e) == s0 &&
    load<u64>(e, 8) == s1 &&
    load<u64>(e, 16) == d0 &&
    load<u64>(e, 24) == d1 &&
    load<u32>(e, 32) == kind &&
    load<i32>(e, 36) == port
  ) {
    return load<u32>(e, 40) != 0;
  }
  const ok = matches(proto, port, how);
  store<u64>(e, s0);
  store<u64>(e, s1, 8);
  store<u64>(e, d0, 16);
  store<u64>(e, d1, 24);
  store<u32>(e, kind, 32);
  store<i32>(e, port, 36);
  store<u32>(e, ok ? 1 : 0, 40);
  return ok;
}

// ---- flows that went out ---------------------------------------------------------------------------------------------

// Entry, 64 bytes: 0 source 16, 16 destination 16, 32 ports and protocol u64, 40 u16 older, 42 u16 newer, 44 u16 next in
// the bucket, 48 u32 see `tell`. Entries are numbered from 1, 0 is none.
const FLOWS: i32 = 512;
const FLOW_BUCKETS: i32 = 1024;
const flows: usize = memory.data(32832, 16); // (FLOWS + 1) x 64
const flowBuckets: usize = memory.data(2048, 16);
const key: usize = memory.data(48, 16);
let keyBucket: i32 = 0;
let flowCount: i32 = 0;
let newest: i32 = 0;
let oldest: i32 = 0;

function flowKey(src: usize, dst: usize, sport: i32, dport: i32, proto: i32): void {
  if (pVersion() == 4) {
    store<u64>(key, <u64>load<u32>(src));
    store<u64>(key, 0, 8);
    store<u64>(key, <u64>load<u32>(dst), 16);
    store<u64>(key, 0, 24);
  } else {
    store<u64>(key, load<u64>(src));
    store<u64>(key, load<u64>(src, 8), 8);
    store<u64>(key, load<u64>(dst), 16);
    store<u64>(key, load<u64>(dst, 8), 24);
  }
  store<u64>(key, (<u64>pVersion() << 48) | (<u64>proto << 32) | (<u64>dport << 16) | <u64>sport, 32);
  keyBucket = bucketOf(key);
}

function bucketOf(k: usize): i32 {
  const mix =
    (load<u64>(k) ^ rotl<u64>(load<u64>(k, 8), 13) ^ rotl<u64>(load<u64>(k, 16), 29) ^ rotl<u64>(load<u64>(k, 24), 43) ^
      rotl<u64>(load<u64>(k, 32), 7)) *
    0x9e3779b97f4a7c15;
  return <i32>(mix >> 54);
}

// @ts-ignore: decorator
@inline
function flow(i: i32): usize {
  return flows + (<usize>i << 6);
}

function flowFind(): i32 {
  let i = <i32>load<u16>(flowBuckets + (<usize>keyBucket << 1));
  while (i != 0) {
    const f = flow(i);
    if (
      load<u64>(f) == load<u64>(key) &&
      load<u64>(f, 8) == load<u64>(key, 8) &&
      load<u64>(f, 16) == load<u64>(key, 16) &&
      load<u64>(f, 24) == load<u64>(key, 24) &&
      load<u64>(f, 32) == load<u64>(key, 32)
    ) {
      return i;
    }
    i = <i32>load<u16>(f, 44);
  }
  return 0;
}

function unlinkAge(i: i32): void {
  const f = flow(i);
  const older = <i32>load<u16>(f, 40);
  const newer = <i32>load<u16>(f, 42);
  if (older != 0) store<u16>(flow(older), <u16>newer, 42);
  else oldest = newer;
  if (newer != 0) store<u16>(flow(newer), <u16>older, 40);
  else newest = older;
}

function makeNewest(i: i32): void {
  const f = flow(i);
  store<u16>(f, <u16>newest, 40);
  store<u16>(f, 0, 42);
  if (newest != 0) store<u16>(flow(newest), <u16>i, 42);
  else oldest = i;
  newest = i;
}

/** True when the key is among the flows; it is then the newest. */
function flowSeen(): bool {
  const i = flowFind();
  if (i == 0) return false;
  if (i != newest) {
    unlinkAge(i);
    makeNewest(i);
  }
  return true;
}

function flowRecord(): void {
  if (flowSeen()) {
    const f = flow(newest);
    if (sharing && told - load<u32>(f, 48) >= TELL_AGAIN) tell(f);
    return;
  }
  let i: i32;
  if (flowCount < FLOWS) {
    i = ++flowCount;
  } else {
    i = oldest;
    unlinkAge(i);
    const b = flowBuckets + (<usize>bucketOf(flow(i)) << 1);
    let at = <i32>load<u16>(b);
    if (at == i) {
      store<u16>(b, load<u16>(flow(i), 44));
    } else {
      while (<i32>load<u16>(flow(at), 44) != i) at = <i32>load<u16>(flow(at), 44);
      store<u16>(flow(at), load<u16>(flow(i), 44), 44);
    }
  }
  const f = flow(i);
  memory.copy(f, key, 40);
  const bucket = flowBuckets + (<usize>keyBucket << 1);
  store<u16>(f, load<u16>(bucket), 44);
  store<u16>(bucket, <u16>i);
  makeNewest(i);
  store<u32>(f, told - TELL_AGAIN, 48);
  if (sharing) tell(f);
}

// The thread that sends tells the one that receives of each new flow, and again of those in use before the other can have
// forgotten them. An entry has at 48 the count of what was told when it was told.
const NEWS: i32 = 1024;
const NEWS_SIZE: usize = 40;
const TELL_AGAIN: u32 = 128;
const news: usize = memory.data(40960, 16);
let newsCount: i32 = 0;
let told: u32 = 0;
let sharing: bool = false;

/** From now on the flows that go out are listed for `filterTakeNews`. */
export function filterShareFlows(): void {
  sharing = true;
}

/** Where the list lies: entries of 40 bytes, for `filterLearn` of another instance. */
export function filterNews(): usize {
  return news;
}

/** How many entries the list has; it starts afresh. At most 1024 fit: the rest is told when it is used again. */
export function filterTakeNews(): i32 {
  const n = newsCount;
  newsCount = 0;
  return n;
}

/** Remembers the flow that another instance has listed. */
export function filterLearn(entry: usize): void {
  memory.copy(key, entry, NEWS_SIZE);
  keyBucket = bucketOf(key);
  flowRecord();
}

function tell(f: usize): void {
  if (newsCount == NEWS) return;
  memory.copy(news + <usize>newsCount * NEWS_SIZE, f, NEWS_SIZE);
  newsCount++;
  told++;
  store<u32>(f, told, 48);
}

/** Forgets all flows (tests). */
export function filterForgetFlows(): void {
  memory.fill(flows, 0, <usize>(FLOWS + 1) << 6);
  memory.fill(flowBuckets, 0, <usize>FLOW_BUCKETS << 1);
  flowCount = 0;
  newest = 0;
  oldest = 0;
}
