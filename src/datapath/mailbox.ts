// The writing end of a ring between the two Workers of a datapath, for records that must arrive, in order: what does not
// fit waits here.
import type { Ring } from "./ring.ts";

const NOTHING = new Uint8Array(0);

export class Mailbox {
  /** Something was written since the reader was last woken; the owner wakes it. */
  posted = false;
  /** Records of `tell` that found no room. */
  lost = 0;
  readonly #ring: Ring;
  #waiting: { kind: number; bytes: Uint8Array }[] = [];

  constructor(ring: Ring) {
    this.#ring = ring;
  }

  /** Records wait for room: call `flush` again soon. */
  get backlog(): boolean {
    return this.#waiting.length > 0;
  }

  /** The reader has taken everything. */
  get empty(): boolean {
    return !this.backlog && this.#ring.readerEmpty;
  }

  post(kind: number, bytes: Uint8Array): void {
    this.posted = true;
    if (!this.backlog && this.#ring.fits(bytes.length)) this.#ring.write(kind, bytes);
    else this.#waiting.push({ kind, bytes: bytes.slice() });
  }

  /**
   * `length` bytes at `start` of `memory` (both aligned to 4), which may get lost when the reader does not keep up. False:
   * they did. Nothing is allocated.
   */
  tell(kind: number, memory: Uint32Array, start: number, length: number): boolean {
    if (this.backlog || !this.#ring.fits(length)) {
      this.lost++;
      return false;
    }
    this.posted = true;
    return this.#ring.writeFrom(kind, NOTHING, memory, start, length);
  }

  /** Moves what waits into the ring, as far as there is room. */
  flush(): void {
    if (!this.backlog) return;
    let done = 0;
    for (const { kind, bytes } of this.#waiting) {
      if (!this.#ring.fits(bytes.length)) break;
      this.#ring.write(kind, bytes);
      bytes.fill(0);
      done++;
    }
    this.#waiting = this.#waiting.slice(done);
    if (done > 0) this.posted = true;
  }
}
