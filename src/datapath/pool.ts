// Buffers of two sizes in wasm memory, by number: few that hold a superpacket, many that hold one packet. What turns out to be
// small is moved, so that thousands of packets may wait in little memory.
import type { Asm } from "../crypto/wasm.ts";

/** Bytes that a small buffer holds. */
export const SMALL_BYTES = 2048;
/** Room before each buffer, as it is handed out, that moves along: headers are written there. */
const HEAD = 16;

export class BufferPool {
  /** Numbers below are large buffers. */
  readonly large: number;
  readonly count: number;
  readonly #asm: Asm;
  readonly #largeBase: number;
  readonly #largeBytes: number;
  readonly #smallBase: number;
  readonly #freeLarge: Int32Array;
  readonly #freeSmall: Int32Array;
  #largeCount: number;
  #smallCount: number;

  constructor(asm: Asm, large: number, largeBytes: number, small: number) {
    this.#asm = asm;
    this.large = large;
    this.count = large + small;
    this.#largeBytes = (HEAD + largeBytes + 63) & ~63;
    this.#largeBase = asm.alloc(large * this.#largeBytes, 4096) + HEAD;
    this.#smallBase = asm.alloc(small * (HEAD + SMALL_BYTES), 4096) + HEAD;
    // The ones used last come again first: they are in the caches.
    this.#freeLarge = Int32Array.from({ length: large }, (_, i) => large - 1 - i);
    this.#freeSmall = Int32Array.from({ length: small }, (_, i) => large + small - 1 - i);
    this.#largeCount = large;
    this.#smallCount = small;
  }

  /** Where a buffer begins; 16-aligned, with 16 writable bytes before. */
  at(buffer: number): number {
    return buffer < this.large
      ? this.#largeBase + buffer * this.#largeBytes
      : this.#smallBase + (buffer - this.large) * (HEAD + SMALL_BYTES);
  }

  /** -1: none is left. */
  takeLarge(): number {
    return this.#largeCount === 0 ? -1 : this.#freeLarge[--this.#largeCount]!;
  }

  get hasLarge(): boolean {
    return this.#largeCount > 0;
  }

  get hasSmall(): boolean {
    return this.#smallCount > 0;
  }

  release(buffer: number): void {
    if (buffer < this.large) this.#freeLarge[this.#largeCount++] = buffer;
    else this.#freeSmall[this.#smallCount++] = buffer;
  }

  /** Copies `length` bytes (at most SMALL_BYTES), and what stands before them, into a small buffer; -1: none is left. */
  shrink(buffer: number, length: number): number {
    if (this.#smallCount === 0) return -1;
    const small = this.#freeSmall[--this.#smallCount]!;
    const from = this.at(buffer) - HEAD;
    this.#asm.u8.copyWithin(this.at(small) - HEAD, from, from + HEAD + length);
    return small;
  }
}
