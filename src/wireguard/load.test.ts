import { expect, test } from "bun:test";
import { LoadMeter, RateLimiter } from "./load.ts";

test("a steady 200 handshakes a second are no load, a burst of 129 is, for one second", () => {
  const steady = new LoadMeter();
  for (let now = 0; now < 60_000; now += 5) expect(steady.add(now)).toBe(false);

  const burst = new LoadMeter();
  const answers = Array.from({ length: 129 }, () => burst.add(0));
  expect(answers.indexOf(true)).toBe(128);
  expect(burst.add(999)).toBe(true);
  expect(burst.add(1001)).toBe(false);
});

test("the load of an endless flood is forgotten as fast as that of a short one", () => {
  const meter = new LoadMeter();
  for (let now = 0; now < 10_000; now += 0.1) meter.add(now);
  expect(meter.add(10_900)).toBe(true);
  expect(meter.add(12_500)).toBe(false);
});

test("a source has a burst of 5, then 20 a second; others have their own", () => {
  const limiter = new RateLimiter();
  const allowed = Array.from({ length: 7 }, () => limiter.allow("a", 0));
  expect(allowed).toEqual([true, true, true, true, true, false, false]);
  expect(limiter.allow("b", 0)).toBe(true);
  let passed = 0;
  for (let now = 1; now <= 10_000; now++) if (limiter.allow("a", now)) passed++;
  expect(passed).toBe(200);
});

test("the table is bounded: refused when it is full of active sources, swept when they are idle", () => {
  const limiter = new RateLimiter();
  for (let i = 0; i < 4096; i++) expect(limiter.allow(`s${i}`, 0)).toBe(true);
  expect(limiter.allow("one more", 1)).toBe(false);
  expect(limiter.size).toBe(4096);
  expect(limiter.allow("one more", 1000)).toBe(true);
  expect(limiter.size).toBe(1);
});
