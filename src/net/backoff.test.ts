import { expect, test } from "bun:test";
import { Backoff } from "./backoff.ts";

test("at once, then doubling to the ceiling with up to half taken off; reset begins anew", () => {
  const full = new Backoff(5000);
  const delays = Array.from({ length: 10 }, () => full.next(0));
  expect(delays).toEqual([0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
  const half = new Backoff(5000);
  half.next(1);
  expect(half.next(1)).toBe(50);
  full.reset();
  expect(full.next(0)).toBe(0);
});
