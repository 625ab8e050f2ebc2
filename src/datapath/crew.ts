// Helpers for the ciphers (docs/architecture.md, "More cores"): Workers that seal and open pieces of a large batch, side by
// side with the Worker whose batch it is, their owner, in the owner's memory. The owner alone takes counters, moves replay
// windows and changes sessions, and it does nothing else until all pieces are done: so there is nothing to lock, and order is
// what it was. A helper that comes late finds the owner at work on the pieces that nobody has begun.
//
//   i32 words   0 pieces posted, 1 pieces begun, 2 pieces done (all wrap at 2^32), 3 pieces that helpers did
//   from 16 on  a ring of pieces, 8 words each: kind, then the arguments of sessionSealPiece or sessionOpenPiece

import { warmUp } from "../crypto/warmup.ts";
import { Asm, type AsmExports, ATTACH_BYTES } from "../crypto/wasm.ts";
import type { CrewSetup, HelperSetup } from "./messages.ts";
import "../wireguard/asm.ts";

const POSTED = 0;
const BEGUN = 1;
const DONE = 2;
const HELPED = 3;
const RING = 16;
const PIECE = 8;
/** A power of two. */
const PIECES = 1024;
const SEAL = 1;
const OPEN = 2;

/** A smaller batch is done by its owner alone before a helper is awake: sealing takes about 1 us for 1 KB. */
export const SHARED_BYTES = 24 << 10;
/** A piece: what the owner waits for at the end is less than one. */
const PIECE_BYTES = 8 << 10;
/** Datagrams of one buffer that are shared at most. */
const MAX_DATAGRAMS = 512;
/** A helper that has nothing to do looks for so long, the gap between two batches under load, before it sleeps. */
const HELPER_SPIN_MS = 0.1;
/** So long the owner looks for the last pieces before it sleeps: a helper may have lost its processor. */
const OWNER_SPIN_MS = 0.05;
/** What a helper's instance takes of its owner's memory. */
const HELPER_BYTES = ATTACH_BYTES + (64 << 10);

/** Takes a piece that nobody has begun: its place, or -1. */
function begin(words: Int32Array): number {
  for (;;) {
    const i = Atomics.load(words, BEGUN);
    if (i === Atomics.load(words, POSTED)) return -1;
    if (Atomics.compareExchange(words, BEGUN, i, (i + 1) | 0) === i) return RING + (i & (PIECES - 1)) * PIECE;
  }
}

function perform(words: Int32Array, at: number, exports: AsmExports): void {
  const a = words[at + 1]!;
  const b = words[at + 2]!;
  const c = words[at + 3]!;
  const d = words[at + 4]!;
  const e = words[at + 5]!;
  if (words[at] === SEAL) exports.sessionSealPiece(a, b, c, d, e);
  else exports.sessionOpenPiece(a, b, c, d, e, words[at + 6]!);
  // Who sees it sees all that the piece has written.
  const done = (Atomics.add(words, DONE, 1) + 1) | 0;
  if (done === Atomics.load(words, POSTED)) Atomics.notify(words, DONE);
}

/** The owner's side. */
export class Crew {
  /** For the main thread, which starts the helpers. */
  readonly setup: CrewSetup;
  readonly #asm: Asm;
  readonly #words = new Int32Array(new SharedArrayBuffer(4 * (RING + PIECES * PIECE)));
  readonly #verdicts: number;
  readonly #helpers: number;
  /** Pieces before this one are done. */
  #from = 0;

  /** The session table is there. */
  constructor(asm: Asm, helpers: number) {
    this.#asm = asm;
    this.#helpers = helpers;
    this.#verdicts = asm.alloc(MAX_DATAGRAMS);
    this.setup = {
      memory: asm.memory,
      words: this.#words.buffer as SharedArrayBuffer,
      parts: Array.from({ length: helpers }, () => ({ start: asm.alloc(HELPER_BYTES), bytes: HELPER_BYTES })),
      table: { base: asm.exports.sessionTableBase(), slots: asm.exports.sessionTableSlots() },
    };
  }

  /** Pieces that helpers did, modulo 2^32. */
  get helped(): number {
    return Atomics.load(this.#words, HELPED) >>> 0;
  }

  /** As `sessionSealRun`; the messages are sealed after `finish`. */
  seal(session: number, p: number, n: number, stride: number, length: number): number {
    const taken = this.#asm.exports.sessionTakeRun(session, p, n, stride, length);
    const most = Math.max(1, Math.floor(PIECE_BYTES / (length + 1)));
    for (let first = 0; first < taken; first += most)
      this.#post(SEAL, session, p + first * stride, Math.min(most, taken - first), stride, length, 0);
    return taken;
  }

  /**
   * Opens the datagrams of `segment` bytes at `p`, `length` bytes in all. Returns the verdicts for `rxVerdicts`, or 0: too
   * little to share.
   */
  open(p: number, length: number, segment: number): number {
    const count = Math.ceil(length / segment);
    if (length < SHARED_BYTES || count > MAX_DATAGRAMS) return 0;
    const most = Math.max(1, Math.floor(PIECE_BYTES / segment));
    for (let first = 0; first < count; first += most)
      this.#post(OPEN, p, length, segment, first, Math.min(most, count - first), this.#verdicts);
    this.finish();
    return this.#verdicts;
  }

  #post(kind: number, a: number, b: number, c: number, d: number, e: number, f: number): void {
    const words = this.#words;
    const i = words[POSTED]!;
    if (((i - this.#from) | 0) === PIECES) this.finish();
    const at = RING + (i & (PIECES - 1)) * PIECE;
    words[at] = kind;
    words[at + 1] = a;
    words[at + 2] = b;
    words[at + 3] = c;
    words[at + 4] = d;
    words[at + 5] = e;
    words[at + 6] = f;
    // Before it the piece, and the bytes that it is about.
    Atomics.store(words, POSTED, (i + 1) | 0);
  }

  /** Returns when all pieces are done. */
  finish(): void {
    const words = this.#words;
    const { exports } = this.#asm;
    const posted = words[POSTED]!;
    Atomics.notify(words, POSTED, this.#helpers);
    for (let at = begin(words); at >= 0; at = begin(words)) perform(words, at, exports);
    const end = performance.now() + OWNER_SPIN_MS;
    for (;;) {
      const done = Atomics.load(words, DONE);
      if (done === posted) break;
      // Should a helper have died the main thread ends us too.
      if (performance.now() > end) Atomics.wait(words, DONE, done);
    }
    this.#from = posted;
  }
}

/** A helper Worker. */
export class Helper {
  readonly #words: Int32Array;
  readonly #asm: Asm;

  constructor({ memory, words, part, table }: HelperSetup) {
    this.#words = new Int32Array(words);
    this.#asm = Asm.attach(memory, part.start, part.bytes);
    this.#asm.exports.sessionTableInit(table.base, table.slots);
    warmUp(this.#asm);
  }

  /** Until the main thread ends it. */
  run(): never {
    const words = this.#words;
    const { exports } = this.#asm;
    for (let end = 0; ; ) {
      const posted = Atomics.load(words, POSTED);
      const at = begin(words);
      if (at >= 0) {
        perform(words, at, exports);
        Atomics.add(words, HELPED, 1);
        end = performance.now() + HELPER_SPIN_MS;
      } else if (performance.now() > end) Atomics.wait(words, POSTED, posted);
    }
  }
}
