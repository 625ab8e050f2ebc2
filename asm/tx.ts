// From the TUN: what must be known about a packet, or superpacket, before it is split and sealed.
import {
  countDrop,
  DROP_TUN_FILTER,
  DROP_TUN_MALFORMED,
  DROP_TUN_NO_PEER,
  DROP_TUN_OFFLOAD,
  DROP_TUN_QUEUE,
} from "./counters";
import { ecnOf, relieve } from "./ecn";
import { filterOn, filterOut } from "./filter";
import { parsePacket, parseWhole, pDst, pTotal, pVersion, splitEcn, splitPrepare, splitSkip } from "./packet";
import { trieLookup4, trieLookup6 } from "./trie";

let queueStands: i32 = 0;

/** The queue stands: of the next packets one has to go, or to be marked. */
export function txRelieve(): void {
  queueStands = 1;
}

/** 1 while no packet was found to go. */
export function txStands(): i32 {
  return queueStands;
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
  if (queueStands != 0) {
    const how = relieve(p, pTotal());
    if (how != 0) {
      queueStands = 0;
      if (how == 2) {
        countDrop(DROP_TUN_QUEUE);
        if (n == 1) return -1;
        splitSkip();
      }
    }
  }
  splitEcn(ecnOf(p));
  return slot;
}
