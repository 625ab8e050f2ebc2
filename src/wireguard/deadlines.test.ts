import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadlines } from "./deadlines.ts";

test("agrees with a scan of all deadlines, whatever is set, moved, and taken away (property)", () => {
  const due = fc.oneof(
    { weight: 5, arbitrary: fc.integer({ min: 0, max: 50 }) },
    { weight: 1, arbitrary: fc.constant(Infinity) },
  );
  const step = fc.record({ slot: fc.nat(12), due, pop: fc.boolean() });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
      const deadlines = new Deadlines();
      const slow = new Map<number, number>();
      for (const { slot, due, pop } of steps) {
        deadlines.set(slot, due);
        slow.set(slot, due);
        const earliest = Math.min(...slow.values());
        expect(deadlines.next()).toBe(earliest);
        expect(deadlines.due(earliest - 1)).toBe(-1);
        if (!pop || earliest === Infinity) continue;
        const first = deadlines.due(earliest);
        expect(slow.get(first)).toBe(earliest);
        deadlines.set(first, Infinity);
        slow.set(first, Infinity);
      }
    }),
  );
});

test("comes out in order", () => {
  const deadlines = new Deadlines();
  const times = Array.from({ length: 1000 }, (_, i) => (i * 7919) % 1009);
  for (const [slot, due] of times.entries()) deadlines.set(slot, due + 5000);
  for (const [slot, due] of times.entries()) deadlines.set(slot, due);
  const order: number[] = [];
  for (let slot = deadlines.due(2000); slot >= 0; slot = deadlines.due(2000)) {
    order.push(times[slot]!);
    deadlines.set(slot, Infinity);
  }
  expect(order).toEqual([...times].sort((x, y) => x - y));
  expect(deadlines.next()).toBe(Infinity);
});
