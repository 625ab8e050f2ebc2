// From the TUN: what must be known about a packet, or superpacket, before it is split and sealed.
import {
  countDrop,
  DROP_TUN_FILTER,
  DROP_TUN_MALFORMED,
  DROP_TUN_NO_PEER,
  DROP_TUN_OFFLOAD,
} from "./counters";
import { ecnOf } from "./ecn";
import { filterOn, filterOut } from "./filter";
import { PROTO_SCTP, PROTO_TCP, PROTO_UDP, parsePacket, parseWhole, pDst, pVersion, splitEcn, splitPrepare } from "./packet";
import { trieLookup4, trieLookup6 } from "./trie";

/**
 * A number below 1024 for the flow of the packet of `len` bytes at `p`: what belongs together (addresses, protocol, ports)
 * has the same one.
 */
export function txFlow(p: usize, len: i32): i32 {
  let mix: u64 = 0;
  let at: i32 = 0;
  if (len >= 28 && load<u8>(p) >> 4 == 4) {
    const fragment = (load<u16>(p, 6) & 0xff3f) != 0;
    mix = load<u64>(p, 12) + <u64>load<u8>(p, 9);
    if (!fragment) at = <i32>(load<u8>(p) & 15) << 2;
  } else if (len >= 48 && load<u8>(p) >> 4 == 6) {
    mix = load<u64>(p, 8) + rotl<u64>(load<u64>(p, 16), 17) + rotl<u64>(load<u64>(p, 24), 31) + load<u64>(p, 32);
    mix = rotl<u64>(mix, 7) + <u64>load<u8>(p, 6);
    at = 40;
  }
  const proto = at == 40 ? <i32>load<u8>(p, 6) : <i32>load<u8>(p, 9);
  const hasPorts = proto == PROTO_TCP || proto == PROTO_UDP || proto == PROTO_SCTP;
  if (at > 0 && hasPorts && at + 4 <= len) mix ^= <u64>load<u32>(p + <usize>at) << 16;
  mix = mix * 0x9e3779b97f4a7c15;
  mix = (mix ^ (mix >> 29)) * 0xbf58476d1ce4e5b9;
  return <i32>(mix >> 54);
}

/**
 * Looks at the packet of `len` bytes at `p` that came with the vnet header at `vnet` (0: none): headers, destination,
 * filter. Returns the peer's slot and leaves the split ready (`splitPtr`), or -1: dropped and counted.
 */
export function txPrepare(p: usize, len: i32, vnet: usize): i32 {
  if (!parsePacket(p, len)) {
    // Without a filter nobody needs to understand more than addresses and length.
    if (filterOn() || (vnet != 0 && load<u8>(vnet, 1) != 0) || !parseWhole(p, len)) {
      countDrop(DROP_TUN_MALFORMED);
      return -1;
    }
  }
  const slot = pVersion() == 4 ? trieLookup4(pDst()) : trieLookup6(pDst());
  if (slot < 0) {
    countDrop(DROP_TUN_NO_PEER);
    return -1;
  }
  if (!filterOut()) {
    countDrop(DROP_TUN_FILTER);
    return -1;
  }
  const n = splitPrepare(p, vnet);
  if (n == 0) {
    countDrop(DROP_TUN_OFFLOAD);
    return -1;
  }
  splitEcn(ecnOf(p));
  return slot;
}
