import { expect, test } from "bun:test";
import fc from "fast-check";
import { Timers } from "./timers.ts";

test("the earliest deadline is on top, whatever is set, moved and taken away", () => {
  const step = fc.record({ key: fc.nat(20), at: fc.oneof(fc.nat(1000), fc.constant(Number.POSITIVE_INFINITY)) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
      const timers = new Timers<number>();
      const plain = new Map<number, number>();
      for (const { key, at } of steps) {
        timers.set(key, at, `timer ${key}`);
        if (at === Number.POSITIVE_INFINITY) plain.delete(key);
        else plain.set(key, at);
        expect(timers.size).toBe(plain.size);
        const top = timers.peek();
        expect(top?.at).toBe(plain.size === 0 ? undefined : Math.min(...plain.values()));
        if (top) expect([plain.get(top.key), top.reason]).toEqual([top.at, `timer ${top.key}`]);
      }
    }),
    { numRuns: 200, seed: 20 },
  );
});
