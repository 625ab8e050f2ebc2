import { expect, test } from "bun:test";
import { StandingQueue } from "./standing-queue.ts";

/** Times at which packets went, with a packet every 0.1 ms of a queue that stands from `from` to `until`. */
function drops(queue: StandingQueue, from: number, until: number): number[] {
  const out: number[] = [];
  for (let now = from; now < until; now += 0.1) {
    queue.stands(now);
    if (!queue.due(now)) continue;
    queue.dropped(now);
    out.push(now);
  }
  return out;
}

test("bursts that are over soon cost nothing", () => {
  const queue = new StandingQueue();
  for (let begin = 0; begin < 2000; begin += 100) {
    expect(drops(queue, begin, begin + 99)).toEqual([]);
    queue.empty();
  }
  expect(queue.drops).toBe(0);
});

test("while the queue stands packets go, one by one, at shrinking intervals", () => {
  const queue = new StandingQueue();
  drops(queue, 0, 400);
  expect(queue.unresponsive).toBe(false);
  queue.empty();
  const times = drops(queue, 10_000, 12_000).map((time) => time - 10_000);
  expect(queue.unresponsive).toBe(true);
  expect(times[0]).toBeCloseTo(100, 0);
  const gaps = times.slice(1).map((time, i) => time - times[i]!);
  expect(gaps[0]).toBeCloseTo(100, 0);
  expect(gaps[3]).toBeCloseTo(50, 0);
  expect(gaps[15]).toBeCloseTo(25, 0);
  expect(times.length).toBeGreaterThan(80);
  expect(times.length).toBeLessThan(130);
});

test("empty: nothing goes until it stands again for as long; soon after, the law goes on where it was", () => {
  const queue = new StandingQueue();
  drops(queue, 0, 1200);
  queue.empty();
  expect(queue.due(1e6)).toBe(false);
  const [first, second] = drops(queue, 1250, 1450);
  expect(first).toBeCloseTo(1350, 0);
  expect(second! - first!).toBeLessThan(30);
  queue.empty();
  const [later, next] = drops(queue, 5000, 5300);
  expect(later).toBeCloseTo(5100, 0);
  expect(next! - later!).toBeCloseTo(100, 0);
});

test("a packet that may not go leaves the next one due", () => {
  const queue = new StandingQueue();
  queue.stands(0);
  queue.stands(90);
  for (const now of [101, 110]) expect(queue.due(now)).toBe(true);
});
