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
    const length = head.length + (body?.length ?? 0);
    const size = 4 + ((length + 3) & ~3);
    const at = this.words[0]!;
    const used = (at - Atomics.load(this.words, 1)) >>> 0;
    if (length > MAX_PAYLOAD || used + size > this.#capacity) {
      this.dropped++;
      return false;
    }
    const mask = this.#capacity - 1;
    this.#u32[((at >>> 0) & mask) >> 2] = (kind << 24) | length;
    this.#copyIn((at + 4) & mask, head);
    if (body) this.#copyIn((at + 4 + head.length) & mask, body);
    Atomics.store(this.words, 0, (at + size) | 0);
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

  /** Takes the oldest record: its bytes are copied to `into`, its kind and length returned. Null when there is none. */
  read(into: Uint8Array): { kind: number; length: number } | null {
    const at = this.words[1]!;
    if (Atomics.load(this.words, 0) === at) return null;
    const mask = this.#capacity - 1;
    const header = this.#u32[((at >>> 0) & mask) >> 2]!;
    const length = header & 0xffff;
    const from = (at + 4) & mask;
    const first = Math.min(length, this.#capacity - from);
    into.set(this.#data.subarray(from, from + first));
    if (first < length) into.set(this.#data.subarray(0, length - first), first);
    if (this.#wipes) {
      this.#data.fill(0, from, from + first);
      this.#data.fill(0, 0, length - first);
    }
    Atomics.store(this.words, 1, (at + 4 + ((length + 3) & ~3)) | 0);
    return { kind: header >>> 24, length };
  }
}

/** Most bytes that one record holds. */
export const RING_MAX_PAYLOAD = MAX_PAYLOAD;
