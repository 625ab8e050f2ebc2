// Protection against floods of handshakes (spec/datapath-wire.md 1.5): when are we under load, and how many messages may
// one source send then. Tables are bounded, time comes as an argument.

/** Handshake messages per second that are worked off without noticing: some 10 % of a core. */
const DRAIN_PER_SECOND = 250;
/** Messages above that rate which make us "under load". */
const LOAD_LIMIT = 128;
/** Being under load sticks for so long after the last time that it was true. */
const STICKY = 1_000;

const TOKENS_PER_SECOND = 20;
const BURST = 5;
const MAX_SOURCES = 4096;

/** A backlog that fills by one with every handshake message and drains at a fixed rate. */
export class LoadMeter {
  #backlog = 0;
  #updated = 0;
  #loadedUntil = Number.NEGATIVE_INFINITY;

  /** Counts one message that would cost curve operations; true when we are under load. */
  add(now: number): boolean {
    const drained = ((now - this.#updated) / 1000) * DRAIN_PER_SECOND;
    this.#updated = now;
    this.#backlog = Math.min(Math.max(0, this.#backlog - drained) + 1, 2 * LOAD_LIMIT);
    if (this.#backlog > LOAD_LIMIT) this.#loadedUntil = now + STICKY;
    return now < this.#loadedUntil;
  }
}

interface Bucket {
  tokens: number;
  updated: number;
}

/** A token bucket per source: 20 messages a second, bursts of 5. A source that finds the table full is refused. */
export class RateLimiter {
  readonly #buckets = new Map<string, Bucket>();

  allow(source: string, now: number): boolean {
    const bucket = this.#buckets.get(source);
    if (!bucket) {
      if (this.#buckets.size >= MAX_SOURCES) this.#sweep(now);
      if (this.#buckets.size >= MAX_SOURCES) return false;
      this.#buckets.set(source, { tokens: BURST - 1, updated: now });
      return true;
    }
    bucket.tokens = Math.min(BURST, bucket.tokens + ((now - bucket.updated) / 1000) * TOKENS_PER_SECOND);
    bucket.updated = now;
    if (bucket.tokens < 1) return false;
    bucket.tokens--;
    return true;
  }

  get size(): number {
    return this.#buckets.size;
  }

  /** A bucket that is full again says nothing. */
  #sweep(now: number): void {
    for (const [source, bucket] of this.#buckets) {
      if (bucket.tokens + ((now - bucket.updated) / 1000) * TOKENS_PER_SECOND >= BURST) this.#buckets.delete(source);
    }
  }
}
