// For the tests of this folder: the vector files, and randomness that is the same in every run.
import { readFileSync } from "node:fs";

/** A file of test/vectors, parsed. */
export function vectors<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`../../test/vectors/${name}`, import.meta.url), "utf8")) as T;
}

/** Bytes from hex; spaces are ignored. */
export function bytes(hex: string): Uint8Array {
  return Uint8Array.fromHex(hex.replaceAll(/\s/g, ""));
}

/** A stream of numbers that depends on the seed only (a 32-bit xorshift; not for secrets). */
export class Seeded {
  #state: number;

  constructor(seed: number) {
    this.#state = seed | 1;
  }

  word(): number {
    let x = this.#state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#state = x;
    return x >>> 0;
  }

  /** 0 .. bound-1. */
  below(bound: number): number {
    return this.word() % bound;
  }

  bytes(n: number): Uint8Array<ArrayBuffer> {
    return Uint8Array.from({ length: n }, () => this.word() >>> 11);
  }
}
