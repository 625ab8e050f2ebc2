// From the TUN: what must be known about a packet, or superpacket, before it is split and sealed.
import { countDrop, DROP_TUN_FILTER, DROP_TUN_MALFORMED, DROP_TUN_NO_PEER, DROP_TUN_OFFLOAD } from "./counters";
import { filterOn, filterOut } from "./filter";
import { parsePacket, parseWhole, pDst, pVersion, splitPrepare } from "./packet";
import { trieLookup4, trieLookup6 } from "./trie";

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
  if (splitPrepare(p, vnet) == 0) {
    countDrop(DROP_TUN_OFFLOAD);
    return -1;
  }
  return slot;
}
