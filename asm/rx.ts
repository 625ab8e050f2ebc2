// From the network: opens the transport messages of one received buffer and hands the packets to the coalescer.
import {
  countDrop,
  DROP_RX_BAD_TAG,
  DROP_RX_ECN,
  DROP_RX_FILTER,
  DROP_RX_MALFORMED,
  DROP_RX_NO_SESSION,
  DROP_RX_REPLAY,
  DROP_RX_SOURCE,
} from "./counters";
import { ecnDecapsulate } from "./ecn";
import { filterIn, filterOn } from "./filter";
import { groAdd, groFull, ipLength, parsePacket } from "./packet";
import { sessionAccept, sessionAddress, sessionPeer } from "./session";
import { trieLookup4, trieLookup6 } from "./trie";

// One account per run of messages on one session, u32: 0 session slot, 4 peer slot, 8 packets with data, 12 keepalives,
// 16 bytes of the messages, 20 unused.
const ACCOUNTS: i32 = 64;
const ACCOUNT: usize = 24;
const accounts: usize = memory.data(1536, 16);
let accountCount: i32 = 0;
let outerEcn: u32 = 0;
let verdicts: usize = 0;

export function rxAccounts(): usize {
  return accounts;
}

export function rxAccountCount(): i32 {
  return accountCount;
}

/**
 * The peer whose session the transport message of `len` bytes at `p` names; -1: none, or another message. Nothing is
 * authenticated yet.
 */
export function rxPeer(p: usize, len: i32): i32 {
  if (len < 32 || load<u32>(p) != 4) return -1;
  const index = load<u32>(p, 4);
  const s = sessionAddress(index);
  return load<u32>(s) == index && load<u32>(s, 12) != 0 ? load<i32>(s, 8) : -1;
}

/** The ECN field of the datagrams that `rxOpen` gets from now on. */
export function rxEcn(ecn: u32): void {
  outerEcn = ecn;
}

/** What `sessionOpenPiece` wrote about the datagrams that `rxOpen` gets from now on; 0: nobody has opened them. */
export function rxVerdicts(p: usize): void {
  verdicts = p;
}

/**
 * `len` bytes at `p` are datagrams of `segment` bytes, the last maybe shorter. Opens from offset `from` on, and checks
 * source and filter. Returns where it stopped: at the end, at a datagram that is no transport message (it is the host's),
 * or because accounts or coalescer are full: the host takes these and calls again. Accounts start afresh with each call.
 */
export function rxOpen(p: usize, len: i32, segment: i32, from: i32): i32 {
  accountCount = 0;
  let session: i32 = -1;
  let peer: i32 = -1;
  let account: usize = 0;
  while (from < len) {
    const n = min(segment, len - from);
    const m = p + <usize>from;
    if (n < 32 || load<u32>(m) != 4 || groFull()) return from;
    if (accountCount == ACCOUNTS) return from;
    const verdict = verdicts == 0 ? 0 : <i32>load<u8>(verdicts + <usize>(from / segment));
    from += n;
    const result = sessionAccept(m, n, verdict);
    if (result < 0) {
      countDrop(result == -5 ? DROP_RX_REPLAY : result == -4 ? DROP_RX_BAD_TAG : DROP_RX_NO_SESSION);
      continue;
    }
    if ((result & 0xffffff) != session) {
      session = result & 0xffffff;
      peer = <i32>sessionPeer(<u32>session);
      account = accounts + <usize>accountCount * ACCOUNT;
      accountCount++;
      store<i32>(account, session);
      store<i32>(account, peer, 4);
      store<i32>(account, 0, 8);
      store<i32>(account, 0, 12);
      store<i32>(account, 0, 16);
    }
    store<i32>(account, load<i32>(account, 16) + n, 16);
    if (n == 32) {
      store<i32>(account, load<i32>(account, 12) + 1, 12);
      continue;
    }
    store<i32>(account, load<i32>(account, 8) + 1, 8);
    deliver(m + 16, n - 32, peer);
  }
  return from;
}

function deliver(p: usize, len: i32, peer: i32): void {
  const total = ipLength(p, len);
  if (total == 0) {
    countDrop(DROP_RX_MALFORMED);
    return;
  }
  const owner = load<u8>(p) >> 4 == 4 ? trieLookup4(p + 12) : trieLookup6(p + 8);
  if (owner != peer) {
    countDrop(DROP_RX_SOURCE);
    return;
  }
  if (filterOn()) {
    if (!parsePacket(p, total)) {
      countDrop(DROP_RX_MALFORMED);
      return;
    }
    if (!filterIn()) {
      countDrop(DROP_RX_FILTER);
      return;
    }
  }
  if (outerEcn != 0 && !ecnDecapsulate(p, outerEcn)) {
    countDrop(DROP_RX_ECN);
    return;
  }
  groAdd(p, total);
}
