// A bounded queue of RecvPacket frames that wait for one client. Full: the oldest makes room (spec/derp-wire.md 8.3).

/**
 * Frames are ranges of buffers that nobody else writes to. `S` is what the relay knows of the sender.
 * Slots are allocated once, and nothing is allocated per packet.
 */
export class PacketQueue<S> {
  readonly capacity: number;
  length = 0;
  #head = 0;
  #bufs: (Uint8Array | null)[];
  #sources: (S | undefined)[];
  #starts: Int32Array;
  #ends: Int32Array;
  #times: Float64Array;

  constructor(capacity: number) {
    this.capacity = capacity;
    this.#bufs = new Array(capacity).fill(null);
    this.#sources = new Array(capacity).fill(undefined);
    this.#starts = new Int32Array(capacity);
    this.#ends = new Int32Array(capacity);
    this.#times = new Float64Array(capacity);
  }

  get full(): boolean {
    return this.length === this.capacity;
  }

  /** The caller makes room before. */
  push(buf: Uint8Array, start: number, end: number, source: S, now: number): void {
    if (this.full) throw new RangeError(`a queue of ${this.capacity} packets is full`);
    const slot = (this.#head + this.length) % this.capacity;
    this.#bufs[slot] = buf;
    this.#sources[slot] = source;
    this.#starts[slot] = start;
    this.#ends[slot] = end;
    this.#times[slot] = now;
    this.length++;
  }

  // The oldest frame. Only valid while length > 0.
  get buf(): Uint8Array {
    return this.#bufs[this.#head]!;
  }
  get source(): S {
    return this.#sources[this.#head] as S;
  }
  get start(): number {
    return this.#starts[this.#head]!;
  }
  get end(): number {
    return this.#ends[this.#head]!;
  }
  get time(): number {
    return this.#times[this.#head]!;
  }

  /** Forgets the oldest frame. */
  shift(): void {
    this.#bufs[this.#head] = null;
    this.#sources[this.#head] = undefined;
    this.#head = (this.#head + 1) % this.capacity;
    this.length--;
  }

  /** Copies each frame that keeps a much larger buffer alive, for frames that must wait. */
  detach(): void {
    for (let i = 0; i < this.length; i++) {
      const slot = (this.#head + i) % this.capacity;
      const buf = this.#bufs[slot]!;
      const size = this.#ends[slot]! - this.#starts[slot]!;
      if (buf.buffer.byteLength <= 2 * size) continue;
      this.#bufs[slot] = new Uint8Array(buf.subarray(this.#starts[slot]!, this.#ends[slot]!));
      this.#starts[slot] = 0;
      this.#ends[slot] = size;
    }
  }
}
