import { expect, test } from "bun:test";
import { Backoff, MAX_BACKOFF_MS } from "./backoff.ts";

test("waits double from 0.1 s to the ceiling, each between half and all; reset begins anew", () => {
  const longest = new Backoff(() => 1);
  const shortest = new Backoff(() => 0);
  const waits = Array.from({ length: 12 }, () => [shortest.next(), longest.next()] as const);
  expect(waits.slice(0, 4)).toEqual([
    [50, 100],
    [100, 200],
    [200, 400],
    [400, 800],
  ]);
  expect(waits.at(-1)).toEqual([MAX_BACKOFF_MS / 2, MAX_BACKOFF_MS]);
  longest.reset();
  expect(longest.next()).toBe(100);
});
