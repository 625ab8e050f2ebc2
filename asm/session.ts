// WireGuard sessions in linear memory: find by index, seal, open, replay window (spec/datapath-wire.md 1.2, 1.7, 1.8).
//
// Transport message: u32 4 | u32 receiver index | u64 counter | ciphertext | tag 16, little-endian.
//
// The host gives one block of `sessionTableSize(n)` zeroed bytes. An index is `random high bits : slot`, so that the
// slot is found by a mask and an attacker still has to guess the rest. A session is
//
//   0   u32 local index       4   u32 remote index
//   8   u32 peer slot         12  u32 flags: 1 installed, 2 something was received
//   16  u64 next counter to send
//   24  u64 highest counter received
//   32  u64 packets received  40  u64 bytes received (whole messages)
//   48  u64 packets sent      56  u64 bytes sent
//   64  replay window: ring of 128 blocks of 64 counters, of which 127 count: 8128 packets
//   1088  AEAD state to send, then AEAD state to receive
//
// Several module instances may have this table on one memory (src/datapath/crew.ts): one of them takes counters, moves windows
// and changes sessions; while it waits, the others seal and open pieces of a batch for it. An AEAD state is written to
// when it is used, so each works on a copy of its own, which is wiped with each piece.
//
// There is no clock here: the host wipes a session when it is 180 s old, and an index that is reserved for a handshake
// has no session yet.
import { AEAD_STATE_SIZE, aeadInit, aeadOpen, aeadSeal } from "./aead";

const INSTALLED: u32 = 1;
const RECEIVED: u32 = 2;

const WINDOW: usize = 64;
const WINDOW_BYTES: usize = 1024;
const WINDOW_COUNTERS: u64 = 8128;
const SEND: usize = 1088;

const HEADER: i32 = 16;
const OVERHEAD: i32 = 32;
const TYPE_DATA: u32 = 4;

/** REJECT_AFTER_MESSAGES: 2^64 - 2^13 - 1. */
const COUNTER_LIMIT: u64 = 0xffff_ffff_ffff_dfff;

// Results of sessionOpen.
const FIRST: i32 = 1 << 24;
const SHORT: i32 = -1;
const NOT_DATA: i32 = -2;
const NO_SESSION: i32 = -3;
const BAD_TAG: i32 = -4;
const REPLAY: i32 = -5;

/** Of a datagram that another instance has tried to open. */
const OPENED: i32 = 1;
const REFUSED: i32 = 2;

// An AEAD state: AEAD_STATE_SIZE bytes.
const COPY = memory.data(256, 64);

let table: usize = 0;
let mask: u32 = 0;
/** No slot from here on has ever held a session. */
let used: u32 = 0;

// @ts-ignore: decorator
@inline
function sessionSize(): usize {
  return (SEND + 2 * <usize>AEAD_STATE_SIZE + 63) & ~63;
}

// @ts-ignore: decorator
@inline
function at(slot: u32): usize {
  return table + <usize>(slot & mask) * sessionSize();
}

/** Bytes for `maxSessions` (a power of two, at most 2^20). */
export function sessionTableSize(maxSessions: u32): usize {
  return <usize>maxSessions * sessionSize();
}

/** `base`: 64-aligned, `sessionTableSize(maxSessions)` zeroed bytes. There is one table per module instance. */
export function sessionTableInit(base: usize, maxSessions: u32): void {
  table = base;
  mask = maxSessions - 1;
}

/** 0 before `sessionTableInit`. */
export function sessionTableBase(): usize {
  return table;
}

export function sessionTableSlots(): u32 {
  return mask + 1;
}

/** Address of a session: for tests that look for remains of keys or set a counter. */
export function sessionAddress(slot: u32): usize {
  return at(slot);
}

/** `sendKey` and `recvKey` point at 32 bytes each, which the caller wipes. Low bits of `localIndex` must be `slot`. */
export function sessionInstall(
  slot: u32,
  sendKey: usize,
  recvKey: usize,
  localIndex: u32,
  remoteIndex: u32,
  peerSlot: u32,
): void {
  const s = at(slot);
  if ((slot & mask) >= used) used = (slot & mask) + 1;
  memory.fill(s, 0, sessionSize());
  store<u32>(s, localIndex);
  store<u32>(s, remoteIndex, 4);
  store<u32>(s, peerSlot, 8);
  store<u32>(s, INSTALLED, 12);
  aeadInit(s + SEND, sendKey);
  aeadInit(s + SEND + <usize>AEAD_STATE_SIZE, recvKey);
}

/** The session only opens: its counter is used up, so nothing is ever sealed on it here. */
export function sessionNeverSeal(slot: u32): void {
  store<u64>(at(slot), COUNTER_LIMIT, 16);
}

/** Zeroes the session, keys included. */
export function sessionWipe(slot: u32): void {
  memory.fill(at(slot), 0, sessionSize());
}

/** Zeroes every session: this thread is about to end. */
export function sessionWipeAll(): void {
  for (let slot: u32 = 0; slot < used; slot++) sessionWipe(slot);
}

export function sessionPeer(slot: u32): u32 {
  return load<u32>(at(slot), 8);
}

export function sessionSendCounterLo(slot: u32): u32 {
  return load<u32>(at(slot), 16);
}

export function sessionSendCounterHi(slot: u32): u32 {
  return load<u32>(at(slot), 20);
}

/** 1 while messages may still be sent: installed and below REJECT_AFTER_MESSAGES. */
export function sessionCanSend(slot: u32): i32 {
  const s = at(slot);
  return i32((load<u32>(s, 12) & INSTALLED) != 0 && load<u64>(s, 16) < COUNTER_LIMIT);
}

/** Takes a counter for `len` plaintext bytes at `p` and writes the header in front of them. 0: the session is gone or used up. */
// @ts-ignore: decorator
@inline
function take(s: usize, p: usize, len: i32): i32 {
  const counter = load<u64>(s, 16);
  if (!(load<u32>(s, 12) & INSTALLED) || counter >= COUNTER_LIMIT) return 0;
  store<u64>(s, counter + 1, 16);
  store<u32>(p - 16, TYPE_DATA);
  store<u32>(p - 12, load<u32>(s, 4));
  store<u64>(p - 8, counter);
  store<u64>(s, load<u64>(s, 48) + 1, 48);
  store<u64>(s, load<u64>(s, 56) + <u64>(len + OVERHEAD), 56);
  return 1;
}

/**
 * Seals `len` plaintext bytes (already padded) at `p` into a transport message that begins at p - 16 and is len + 32
 * bytes long: the 16 B before p and the 16 B behind the plaintext are written, nothing else. 1, or 0 when the session is
 * gone or used up: then nothing was touched.
 */
export function sessionSeal(slot: u32, p: usize, len: i32): i32 {
  const s = at(slot);
  if (!take(s, p, len)) return 0;
  aeadSeal(p, len, s + SEND, load<u32>(p - 8), load<u32>(p - 4));
  return 1;
}

/** Seals n plaintexts of `len` bytes at p, p + stride, ...; how many were sealed. */
export function sessionSealRun(slot: u32, p: usize, n: i32, stride: usize, len: i32): i32 {
  for (let i = 0; i < n; i++) {
    if (!sessionSeal(slot, p, len)) return i;
    p += stride;
  }
  return n;
}

/** The first half of `sessionSealRun`: counters and headers, for how many. `sessionSealPiece` does the rest. */
export function sessionTakeRun(slot: u32, p: usize, n: i32, stride: usize, len: i32): i32 {
  const s = at(slot);
  for (let i = 0; i < n; i++) {
    if (!take(s, p, len)) return i;
    p += stride;
  }
  return n;
}

/** Seals n plaintexts of `len` bytes at p, p + stride, ..., each with the counter in the header in front of it. */
export function sessionSealPiece(slot: u32, p: usize, n: i32, stride: usize, len: i32): void {
  const state = COPY;
  memory.copy(state, at(slot) + SEND, <usize>AEAD_STATE_SIZE);
  for (let i = 0; i < n; i++) {
    aeadSeal(p, len, state, load<u32>(p - 8), load<u32>(p - 4));
    p += stride;
  }
  memory.fill(state, 0, <usize>AEAD_STATE_SIZE);
}

/**
 * Of the datagrams of `segment` bytes that lie at `p`, `len` bytes in all, opens `count` from number `first` on, as far as
 * they have data and a session. Writes for each a byte at `verdicts` + its number: 0 not tried, 1 opened, 2 bad tag. The
 * rest, the replay window above all, is for `sessionAccept`.
 */
export function sessionOpenPiece(p: usize, len: i32, segment: i32, first: i32, count: i32, verdicts: usize): void {
  const state = COPY;
  let copied: usize = 0;
  for (let i = first; i < first + count; i++) {
    const from = i * segment;
    const m = p + <usize>from;
    const bytes = min(segment, len - from) - OVERHEAD;
    let verdict: i32 = 0;
    if (bytes > 0 && load<u32>(m) == TYPE_DATA) {
      const index = load<u32>(m, 4);
      const s = at(index);
      const counter = load<u64>(m, 8);
      if ((load<u32>(s, 12) & INSTALLED) != 0 && load<u32>(s) == index && counter < COUNTER_LIMIT) {
        if (s != copied) memory.copy(state, s + SEND + <usize>AEAD_STATE_SIZE, <usize>AEAD_STATE_SIZE);
        copied = s;
        verdict = aeadOpen(m + HEADER, bytes, state, <u32>counter, <u32>(counter >> 32)) ? OPENED : REFUSED;
      }
    }
    store<u8>(verdicts + <usize>i, verdict);
  }
  memory.fill(state, 0, <usize>AEAD_STATE_SIZE);
}

/**
 * Opens the transport message of `len` bytes at `p` in place: the plaintext is the len - 32 bytes at p + 16 (none: a
 * keepalive). Returns the session slot, plus 1 << 24 when this is the first message on the session; or a reason to drop:
 * -1 too short, -2 not a transport message, -3 no such session, -4 bad tag, -5 replayed or too old.
 */
export function sessionOpen(p: usize, len: i32): i32 {
  return sessionAccept(p, len, 0);
}

/** `sessionOpen` of a message that `sessionOpenPiece` has looked at; `verdict` as it wrote it. */
export function sessionAccept(p: usize, len: i32, verdict: i32): i32 {
  if (len < OVERHEAD) return SHORT;
  if (load<u32>(p) != TYPE_DATA) return NOT_DATA;
  const index = load<u32>(p, 4);
  const s = at(index);
  const flags = load<u32>(s, 12);
  if (!(flags & INSTALLED) || load<u32>(s) != index) return NO_SESSION;

  // Copies that came by two paths are common: look first, which saves opening them. Only a message with a good tag
  // moves the window.
  const counter = load<u64>(p, 8);
  if (counter >= COUNTER_LIMIT) return REPLAY;
  const last = load<u64>(s, 24);
  const block = s + WINDOW + ((<usize>(counter >> 6) & 127) << 3);
  const bit: u64 = (<u64>1) << (counter & 63);
  if (counter <= last && (last - counter > WINDOW_COUNTERS || (load<u64>(block) & bit) != 0)) return REPLAY;

  const bytes = len - OVERHEAD;
  if (verdict == 0) {
    if (!aeadOpen(p + HEADER, bytes, s + SEND + <usize>AEAD_STATE_SIZE, <u32>counter, <u32>(counter >> 32))) return BAD_TAG;
  } else if (verdict != OPENED) return BAD_TAG;

  if (counter > last) {
    advance(s + WINDOW, last >> 6, counter >> 6);
    store<u64>(s, counter, 24);
  }
  store<u64>(block, load<u64>(block) | bit);
  store<u32>(s, flags | RECEIVED, 12);
  store<u64>(s, load<u64>(s, 32) + 1, 32);
  store<u64>(s, load<u64>(s, 40) + <u64>len, 40);
  return <i32>(index & mask) | (flags & RECEIVED ? 0 : FIRST);
}

/** Clears the blocks behind `from` up to `to`: they will hold newer counters. */
function advance(window: usize, from: u64, to: u64): void {
  if (to - from >= 128) {
    memory.fill(window, 0, WINDOW_BYTES);
    return;
  }
  while (from < to) {
    from++;
    store<u64>(window + ((<usize>from & 127) << 3), 0);
  }
}
