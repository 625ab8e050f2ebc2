import { expect, test } from "bun:test";
import fc from "fast-check";
import { IdSet } from "./idset.ts";
import { Model, type NodeRecord } from "./model.ts";
import { labelOf, labelProblem, tagProblem, uniqueLabel, userNameProblem } from "./names.ts";
import { TestServer, until } from "./testing.ts";

test("host names become DNS labels", () => {
  const cases: [string, string][] = [
    ["Joe's Mac mini", "joes-mac-mini"],
    ["Test@Host", "test-host"],
    ["mail.server", "mail-server"],
    ["日本", "node"],
    ["", "node"],
    ["--x--", "x"],
    ["a".repeat(100), "a".repeat(63)],
  ];
  for (const [host, label] of cases) expect(labelOf(host)).toBe(label);
});

test("any host name becomes a label that an administrator could have chosen", () => {
  fc.assert(
    fc.property(fc.string({ unit: "grapheme", maxLength: 200 }), (name) => labelProblem(labelOf(name)) === null),
    { seed: 1 },
  );
});

test("a taken label gets a number, also when it is as long as labels may be", () => {
  const model = new Model();
  const long = "x".repeat(63);
  const node = (id: number, givenName: string) =>
    ({ id, givenName, nodeKey: `k${id}`, machineKey: "m", ipv4: `${id}`, ipv6: "", tags: [] }) as unknown as NodeRecord;
  model.apply({ nodes: [node(1, "a"), node(2, "a-1"), node(3, long)] });
  expect(uniqueLabel(model, "a")).toBe("a-2");
  expect(uniqueLabel(model, "a", 1)).toBe("a");
  expect(uniqueLabel(model, "b")).toBe("b");
  expect(uniqueLabel(model, long)).toBe(`${"x".repeat(61)}-1`);
});

test("who calls himself like another is told so, and so is the log, until an administrator or the host chooses a name", async () => {
  const log: string[] = [];
  let now = Date.UTC(2026, 0, 1);
  await using server = await TestServer.start({ log: (line) => log.push(line), now: () => now });
  const key = await server.key({ user: await server.user("alice"), reusable: true, expiration: null });
  const first = await (await server.join("Web", key)).stream();
  const other = await server.join("web", key);
  const map = await other.stream();
  const told = () => map.messages.flatMap(({ DisplayMessages }) => Object.entries(DisplayMessages ?? {}));
  expect(map.messages[0]!.DisplayMessages).toEqual({
    "weft-name-taken": {
      Title: "Another machine had the name of this one",
      Text: "This machine is web-1 here, because another one was web already. To choose another name: weft nodes rename -i 2 NAME",
      Severity: "low",
    },
  });
  expect(first.messages[0]!.DisplayMessages).toBeUndefined();
  const line = 'node 2 calls itself "web", but node 1 has the name web: it is web-1 (weft nodes rename -i 2 NAME)';
  expect(log).toEqual([line]);
  await other.lite({ Hostinfo: { Hostname: "db-1" } });
  await until(() => told().some(([id, warning]) => id === "weft-name-taken" && warning === null), "the warning to go");
  // Who goes to and fro fills no log.
  await other.lite({ Hostinfo: { Hostname: "web" } });
  expect(log).toEqual([line]);
  await other.lite({ Hostinfo: { Hostname: "db" } });
  now += 60_000;
  await other.lite({ Hostinfo: { Hostname: "WEB" } });
  expect(log).toEqual([line, line.replace('"web"', '"WEB"')]);
  await server.admin("POST", "/node/2/rename/shop-1");
  await until(() => told().at(-1)?.[1] === null, "the warning to go");
  expect(log).toHaveLength(2);
});

test("names and tags that are wrong are called wrong", () => {
  for (const bad of ["", "-a", "a-", "a.b", "A", "ä", "a".repeat(64)]) expect(labelProblem(bad)).toBeString();
  for (const bad of ["web", "tag:", "tag:A", "tag:a b", "tag:1a"]) expect(tagProblem(bad)).toBeString();
  expect(tagProblem("tag:web-1")).toBeNull();
  for (const bad of ["", "a", "1a", "a b", "a@b@c", "a/b"]) expect(userNameProblem(bad)).toBeString();
  for (const good of ["alice", "alice@example.com", "a.b-c_d"]) expect(userNameProblem(good)).toBeNull();
});

test("a set of ids is a set", () => {
  const id = fc.oneof(fc.nat(3000), fc.nat(2 ** 40));
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.boolean(), id), { maxLength: 200 }), (steps) => {
      const set = new IdSet();
      const reference = new Set<number>();
      for (const [add, value] of steps) {
        if (add) {
          set.add(value);
          reference.add(value);
        } else {
          set.delete(value);
          reference.delete(value);
        }
      }
      for (const [, value] of steps) expect(set.has(value)).toBe(reference.has(value));
    }),
    { seed: 1 },
  );
});
