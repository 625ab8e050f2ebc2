// A queue of records between two threads in shared memory: one writes, one reads, nobody waits for the other.
//
//   i32 words   0 head: bytes written so far, 1 tail: bytes read so far (both wrap at 2^32, capacity is a power of two)
//   data        from byte 64 on: records of u32 kind << 24 | payload length, payload, padded to 4
//
// A record that does not fit is not written and the writer counts it: the newest is dropped.

const HEADER = 64;
const MAX_PAYLOAD = 0xffff;

export class Ring {
  readonly buffer: SharedArrayBuffer;
  readonly words: Int32Array<SharedArrayBuffer>;
  readonly #data: Uint8Array<SharedArrayBuffer>;
  readonly #u32: Uint32Array<SharedArrayBuffer>;
  readonly #capacity: number;
  /** Records that did not fit (on the writer's side). */
  dropped = 0;

  readonly #wipes: boolean;

  /**
   * A new ring of `capacity` bytes (a power of two), or the other end of an existing one. `wipes`: what was read is
   * overwritten, for rings that carry keys.
   */
  constructor(from: number | SharedArrayBuffer, wipes = false) {
    this.#wipes = wipes;
    this.buffer = typeof from === "number" ? new SharedArrayBuffer(HEADER + from) : from;
    this.words = new Int32Array(this.buffer, 0, 2);
    this.#data = new Uint8Array(this.buffer, HEADER);
    this.#u32 = new Uint32Array(this.buffer, HEADER);
    this.#capacity = this.#data.length;
  }

  /** Writes one record from the concatenation of both parts. False: no room, counted. */
  write(kind: number, head: Uint8Array, body?: Uint8Array): boolean {
    const at = this.#begin(kind, head.length + (body?.length ?? 0));
    if (at < 0) return false;
    this.#copyIn(at, head);
    if (body) this.#copyIn((at + head.length) & (this.#capacity - 1), body);
    return this.#commit(head.length + (body?.length ?? 0));
  }

  /**
   * `write` with `length` bytes at `start` of `memory` as the body, without a view of them: a thread that never returns to
   * its event loop collects views late. `head` is a multiple of 4 long.
   */
  writeFrom(kind: number, head: Uint8Array, memory: Uint32Array, start: number, length: number): boolean {
    const at = this.#begin(kind, head.length + length);
    if (at < 0) return false;
    this.#copyIn(at, head);
    if (start & 3) {
      const body = new Uint8Array(memory.buffer, memory.byteOffset + start, length);
      this.#copyIn((at + head.length) & (this.#capacity - 1), body);
      return this.#commit(head.length + length);
    }
    const mask = (this.#capacity >> 2) - 1;
    const to = ((at + head.length) & (this.#capacity - 1)) >> 2;
    const from = start >> 2;
    for (let i = 0; i < (length + 3) >> 2; i++) this.#u32[(to + i) & mask] = memory[from + i]!;
    return this.#commit(head.length + length);
  }

  /** Where the payload goes, or -1: no room, counted. */
  #begin(kind: number, length: number): number {
    const at = this.words[0]!;
    if (length > MAX_PAYLOAD || !this.fits(length)) {
      this.dropped++;
      return -1;
    }
    const mask = this.#capacity - 1;
    this.#u32[(at & mask) >> 2] = (kind << 24) | length;
    return (at + 4) & mask;
  }

  #commit(length: number): true {
    Atomics.store(this.words, 0, (this.words[0]! + 4 + ((length + 3) & ~3)) | 0);
    return true;
  }

  #copyIn(at: number, bytes: Uint8Array): void {
    const first = Math.min(bytes.length, this.#capacity - at);
    if (first === bytes.length) this.#data.set(bytes, at);
    else {
      this.#data.set(bytes.subarray(0, first), at);
      this.#data.set(bytes.subarray(first), 0);
    }
  }

  get empty(): boolean {
    return Atomics.load(this.words, 0) === this.words[1];
  }

  /** On the writer's side: everything was read. */
  get readerEmpty(): boolean {
    return Atomics.load(this.words, 1) === this.words[0];
  }

  /** A record of `length` bytes would find room. */
  fits(length: number): boolean {
    const used = (this.words[0]! - Atomics.load(this.words, 1)) >>> 0;
    return used + 4 + ((length + 3) & ~3) <= this.#capacity;
  }

  /**
   * Takes the oldest record: its bytes are copied to `into` from word `at` on (up to 3 bytes behind them are overwritten).
   * Returns kind * 2^16 + length, or -1 when there is none.
   */
  read(into: Uint32Array, at = 0): number {
    const tail = this.words[1]!;
    if (Atomics.load(this.words, 0) === tail) return -1;
    const mask = (this.#capacity >> 2) - 1;
    const from = (tail & (this.#capacity - 1)) >> 2;
    const header = this.#u32[from]!;
    const length = header & 0xffff;
    const words = (length + 3) >> 2;
    for (let i = 1; i <= words; i++) into[at + i - 1] = this.#u32[(from + i) & mask]!;
    if (this.#wipes) for (let i = 1; i <= words; i++) this.#u32[(from + i) & mask] = 0;
    Atomics.store(this.words, 1, (tail + 4 + 4 * words) | 0);
    return (header >>> 24) * 0x10000 + length;
  }
}

/** Most bytes that one record holds. */
export const RING_MAX_PAYLOAD = MAX_PAYLOAD;
