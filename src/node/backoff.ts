// How long to wait before trying again: fast at first, then doubling, randomised so that a thousand nodes do not come back
// in the same instant.

const FIRST_MS = 100;
/** Never more than this between two attempts. */
export const MAX_BACKOFF_MS = 15_000;

export class Backoff {
  private ceiling = FIRST_MS;

  /** @param random uniform in [0, 1) */
  constructor(private readonly random: () => number) {}

  /** Milliseconds to wait now: between half and all of a ceiling that doubles with each call. */
  next(): number {
    const wait = this.ceiling * (0.5 + this.random() / 2);
    this.ceiling = Math.min(this.ceiling * 2, MAX_BACKOFF_MS);
    return wait;
  }

  reset(): void {
    this.ceiling = FIRST_MS;
  }
}
