import { expect, test } from "bun:test";
import { Turns } from "./map-turns.ts";
import { until } from "./testing.ts";

function party(turns: Turns, names: string) {
  const begun: string[] = [];
  const guests = new Map([...names].map((name) => [name, { begin: () => begun.push(name) }]));
  for (const guest of guests.values()) turns.enter(guest);
  return { begun, leave: (name: string) => turns.leave(guests.get(name)!) };
}

/** Whoever is let in is so after this turn of the event loop. */
const turn = () => new Promise((done) => setImmediate(done));

test("so many at a time, in their order, the next when one is served or has gone away", async () => {
  const turns = new Turns(2, 60_000);
  const { begun, leave } = party(turns, "abcdef");
  expect(begun.join("")).toBe("ab");
  leave("b");
  await turn();
  expect(begun.join("")).toBe("abc");
  leave("d");
  leave("d");
  await turn();
  expect(begun.join("")).toBe("abc");
  leave("a");
  leave("c");
  await turn();
  expect(begun.join("")).toBe("abcef");
  turns.close();
});

test("of many who go away together none is begun for another that goes", async () => {
  const turns = new Turns(2, 60_000);
  const { begun, leave } = party(turns, "abcdef");
  for (const name of "abcde") leave(name);
  await turn();
  expect(begun.join("")).toBe("abf");
  turns.close();
});

test("who comes does not overtake those who wait", async () => {
  const turns = new Turns(1, 60_000);
  const { begun, leave } = party(turns, "ab");
  leave("a");
  turns.enter({ begin: () => begun.push("c") });
  await turn();
  expect(begun.join("")).toBe("ab");
  leave("b");
  await turn();
  expect(begun.join("")).toBe("abc");
  turns.close();
});

test("who is slow holds up the others for a while and no longer", async () => {
  const turns = new Turns(1, 20);
  const { begun } = party(turns, "abc");
  expect(begun.join("")).toBe("a");
  await until(() => begun.join("") === "abc", "the others");
  turns.close();
});

test("guests who are served at once are all let in, and others run between them", async () => {
  const turns = new Turns(1, 60_000);
  const order: string[] = [];
  const guests = Array.from({ length: 8 }, (_, i) => ({
    begin() {
      const end = performance.now() + 4;
      while (performance.now() < end);
      order.push(`${i}`);
      if (i === 0) setImmediate(() => order.push("a request"));
      turns.leave(this);
    },
  }));
  // All are there before the first begins.
  const first = { begin: () => {} };
  turns.enter(first);
  for (const guest of guests) turns.enter(guest);
  turns.leave(first);
  await until(() => order.includes("7"), "the last one");
  expect(order.filter((name) => name !== "a request").join("")).toBe("01234567");
  expect(order.slice(0, order.indexOf("7"))).toContain("a request");
  turns.close();
});
