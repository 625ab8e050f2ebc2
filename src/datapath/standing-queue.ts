// When to drop, so that a queue in the kernel before this process (the TUN's ring, a socket's buffer) stays short. It is FIFO
// and of unknown length; what we see is whether it ran empty. One that has not been empty for INTERVAL_MS is standing: it
// adds delay and no throughput. Then one packet is dropped (or marked, when its sender understands ECN), and the next ones
// at intervals that shrink with the square root of their number, until the queue runs empty: CoDel's law (RFC 8289), which
// takes from a sender no more than what makes it slow down.

/** A queue that empties within this time is a burst. */
const INTERVAL_MS = 100;
/** The law starts where it stopped when the queue stands again so soon. */
const MEMORY_MS = 4 * INTERVAL_MS;

/** So many drops in a row slow down any sender that minds them. */
const PATIENCE = 10;

export class StandingQueue {
  /** Packets dropped or marked. */
  drops = 0;
  #next = Number.POSITIVE_INFINITY;
  #count = 0;
  #lastDrop = Number.NEGATIVE_INFINITY;

  /** It was found (almost) empty. */
  empty(): void {
    this.#next = Number.POSITIVE_INFINITY;
  }

  /** More is in it than was taken at once. */
  stands(now: number): void {
    if (this.#next !== Number.POSITIVE_INFINITY) return;
    this.#count = now - this.#lastDrop < MEMORY_MS ? this.#count >> 1 : 0;
    this.#next = now + INTERVAL_MS;
  }

  /** It goes on standing though packets went one by one: whoever fills it does not listen. */
  get unresponsive(): boolean {
    return this.#next !== Number.POSITIVE_INFINITY && this.#count >= PATIENCE;
  }

  /** Whether the next packet that can be spared has to go. */
  due(now: number): boolean {
    return now >= this.#next;
  }

  /** It has gone. */
  dropped(now: number): void {
    this.drops++;
    this.#count++;
    this.#lastDrop = now;
    this.#next = now + INTERVAL_MS / Math.sqrt(this.#count);
  }
}
