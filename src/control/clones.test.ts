import { expect, test } from "bun:test";
import { Clones } from "./clones.ts";
import { TestServer, until } from "./testing.ts";

test("five take-overs within a minute are too many, and are told once", () => {
  const clones = new Clones();
  const [one, other] = [{}, {}];
  const takeOver = (i: number) => clones.isSuspicious(1, i % 2 ? other : one, i > 0, i * 1000);
  expect([0, 1, 2, 3, 4, 5, 6, 7].map(takeOver)).toEqual([false, false, false, false, false, true, false, false]);
  // A machine that roams now and then, one that opens streams on one connection, and one whose streams had ended before.
  for (let i = 0; i < 20; i++) {
    expect(clones.isSuspicious(2, {}, true, i * 30_000)).toBe(false);
    expect(clones.isSuspicious(3, one, true, i * 1000)).toBe(false);
    expect(clones.isSuspicious(4, {}, false, i * 1000)).toBe(false);
  }
});

test("two machines with the same keys fight for one node, and the operator is told which; a machine of its own is not", async () => {
  const lines: string[] = [];
  await using server = await TestServer.start({ log: (line) => lines.push(line) });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const original = await server.join("original", authKey);
  const copy = server.node("copy", original.machinePrivate);
  copy.nodeKey = original.nodeKey;
  const honest = await server.join("honest", authKey);
  for (let i = 0; i < 8; i++) await honest.stream();
  expect(lines.filter((line) => line.includes("same keys"))).toEqual([]);
  await original.stream();
  for (let i = 0; i < 3; i++) {
    await copy.stream();
    await original.stream();
  }
  await until(() => lines.some((line) => line.includes("same keys")), "a line in the log");
  expect(lines.filter((line) => line.includes("same keys"))).toHaveLength(1);
  expect(lines.join("\n")).toContain("node 1 (original)");
});
