// How long to wait before trying again: fast at first, then doubling, randomised so that a thousand nodes do not come back
// in the same instant.
const FIRST_MS = 100;

/** Delays between attempts: none before the second, then doubling from 0.1 s up to `max`, each shortened by up to half. */
export class Backoff {
  #failures = 0;

  /** `max` in milliseconds. */
  constructor(readonly max: number) {}

  /** `random`: from 0 to 1. Milliseconds. */
  next(random: number): number {
    const attempt = this.#failures++;
    if (attempt === 0) return 0;
    const full = Math.min(this.max, FIRST_MS * 2 ** Math.min(attempt - 1, 20));
    return full * (1 - random / 2);
  }

  reset(): void {
    this.#failures = 0;
  }
}
