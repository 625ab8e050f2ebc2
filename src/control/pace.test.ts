import { expect, test } from "bun:test";
import { Paces } from "./pace.ts";

const LIMITS = { burst: 10, perSecond: 2, machines: 3 };

test("so many at once, so many a second from then on; others are not concerned, and the log names the machine once", () => {
  const lines: string[] = [];
  const paces = new Paces((line) => lines.push(line), LIMITS);
  const ask = (now: number, machine = "mkey:a", cost = 1) => paces.take(machine, cost, now);
  expect(Array.from({ length: 12 }, () => ask(0))).toEqual([...Array(10).fill(0), 500, 500]);
  expect(ask(0, "mkey:b")).toBe(0);
  expect([ask(250), ask(500), ask(500), ask(1500), ask(1500), ask(1500)]).toEqual([250, 0, 500, 0, 0, 500]);
  expect(lines).toEqual(["mkey:a asks more than 10 times at once and 2 times a second: it has to wait"]);
  // What costs more waits longer, and takes nothing while it does.
  expect([ask(2000, "mkey:a", 4), ask(2000), ask(4000, "mkey:a", 4)]).toEqual([1500, 0, 0]);
  // After peace it is as at first; a clock that goes back gives nothing.
  expect(Array.from({ length: 11 }, () => ask(60_000)).filter((wait) => wait > 0)).toEqual([500]);
  expect(lines).toHaveLength(2);
  expect(ask(0)).toBe(500);
});

test("the machine that asked longest ago is forgotten first", () => {
  const paces = new Paces(() => {}, { ...LIMITS, burst: 1 });
  for (const machine of ["a", "b", "c", "a", "d"]) paces.take(machine, 1, 0);
  expect(["a", "c", "d", "b"].map((machine) => paces.take(machine, 1, 0) > 0)).toEqual([true, true, true, false]);
});
