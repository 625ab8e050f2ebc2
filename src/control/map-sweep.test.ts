import { expect, test } from "bun:test";
import { Sweep } from "./map-sweep.ts";
import { until } from "./testing.ts";

const reader = (work: () => void = () => {}) => {
  const self = {
    written: 0,
    isDue: false,
    write: () => {
      self.written++;
      work();
    },
  };
  return self;
};

test("readers that are named together are written to once each, and again when they are named again", async () => {
  const sweep = new Sweep();
  const readers = [reader(), reader(), reader()];
  for (const _ of [1, 2]) for (const one of readers) sweep.add(one);
  expect(readers.map(({ written }) => written)).toEqual([0, 0, 0]);
  await until(() => readers.every(({ written }) => written === 1), "the sweep");
  // In the rest after it: they merge.
  for (const _ of [1, 2]) for (const one of readers) sweep.add(one);
  await until(() => readers.every(({ written }) => written === 2), "the next sweep");
  sweep.close();
});

test("who is named while a sweep is on waits for the next one, and others run between its slices", async () => {
  const sweep = new Sweep();
  const spin = () => {
    const end = performance.now() + 6;
    while (performance.now() < end);
  };
  const order: string[] = [];
  const late = reader(() => order.push("late"));
  const readers = Array.from({ length: 6 }, (_, i) =>
    reader(() => {
      spin();
      order.push(`${i}`);
      if (i === 0) sweep.add(late);
      if (i === 1) setImmediate(() => order.push("a request"));
    }),
  );
  for (const one of readers) sweep.add(one);
  await until(() => late.written === 1, "the late one");
  expect(order.filter((name) => name !== "a request")).toEqual(["0", "1", "2", "3", "4", "5", "late"]);
  expect(order.indexOf("a request")).toBeLessThan(order.indexOf("5"));
  sweep.close();
});

test("a reader that has gone is not written to", async () => {
  const sweep = new Sweep();
  const [gone, other] = [reader(), reader()];
  sweep.add(gone);
  sweep.add(other);
  sweep.remove(gone);
  await until(() => other.written === 1, "the other");
  expect(gone.written).toBe(0);
  sweep.close();
});
