import { afterAll, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Logger, SILENT } from "../net/logger.ts";
import { PolicyError } from "./policy/index.ts";
import { PolicyStoreError } from "./policy-store.ts";
import { makeSettings, TestServer, until } from "./testing.ts";

const folder = mkdtempSync(join(tmpdir(), "weft-policies-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const DATABASE = { settings: makeSettings({ policy: { mode: "database", path: "" } }) };
const fileMode = (path: string) => ({ settings: makeSettings({ policy: { mode: "file", path } }) });
const CLOSED = '// nobody\n{\n\t"acls": [ ], /* yet */\n}\n';
const by = "alice";

test("a policy that is set is in force at once, kept byte for byte, and there again after a restart", async () => {
  const dataDir = mkdtempSync(join(folder, "restart-"));
  let at = 1000;
  {
    await using server = await TestServer.start({ ...DATABASE, dataDir: join(dataDir, "a"), now: () => at });
    const { policies } = server.control;
    expect(policies.current()).toMatchObject({ version: 0, text: "", updatedAt: null });
    const authKey = await server.key({ user: await server.user("alice"), reusable: true });
    const map = await (await server.join("a", authKey)).stream();
    await server.join("b", authKey);
    await until(() => map.peers.size === 1, "the peer");
    at = 2000;
    await policies.set(CLOSED, { by });
    await until(() => map.peers.size === 0, "the peer to go");
    await server.stop();
    const again = await TestServer.start({ ...DATABASE, dataDir: server.dataDir, now: () => at });
    try {
      const etag = createHash("sha256").update(CLOSED).digest("hex");
      expect(again.control.policies.current()).toEqual({ version: 1, text: CLOSED, updatedAt: 2000, by, etag });
      const node = again.node("c");
      await node.register({ authKey });
      expect((await node.stream()).filters!.base).toEqual([]);
    } finally {
      await again.stop();
    }
  }
});

test("setting an identical policy makes no version and sends nothing", async () => {
  await using server = await TestServer.start(DATABASE);
  const { policies } = server.control;
  const map = await (await server.join("a", await server.key({ user: await server.user("alice") }))).stream();
  await policies.set(CLOSED, { by });
  await until(() => map.filters?.base?.length === 0, "the policy");
  const before = map.messages.length;
  expect(await policies.set(CLOSED, { by: "bob" })).toMatchObject({ version: 1, by });
  // Other bytes are another version, even when they mean the same.
  expect(await policies.set(`${CLOSED} `, { by: "bob" })).toMatchObject({ version: 2, by: "bob" });
  await server.user("carol");
  expect(map.messages.length).toBe(before);
  expect(policies.history().map(({ version }) => version)).toEqual([2, 1]);
});

test("who changes a policy that another one has changed meanwhile is told so, and overwrites nothing", async () => {
  await using server = await TestServer.start(DATABASE);
  const { policies } = server.control;
  await policies.set("{}", { by, ifMatch: "ts-default" });
  await expect(policies.set(CLOSED, { by, ifMatch: "ts-default" })).rejects.toBeInstanceOf(PolicyStoreError);
  const { etag } = policies.current();
  // Both start from the same version: one of them wins.
  const both = [CLOSED, '{"acls": [], "groups": {}}'].map((text) => policies.set(text, { by, ifMatch: `"${etag}"` }));
  const [first, second] = await Promise.allSettled(both);
  expect(first).toMatchObject({ status: "fulfilled", value: { version: 2, text: CLOSED } });
  expect(second).toMatchObject({ status: "rejected", reason: { kind: "conflict" } });
  expect((second as PromiseRejectedResult).reason.message).toContain("version 2, set by alice");
  expect(policies.current().text).toBe(CLOSED);
  expect(await policies.set("{}", { by, ifMatch: "*" })).toMatchObject({ version: 3 });
});

test("a policy that is wrong or fails its tests is refused, and the one in force stays", async () => {
  await using server = await TestServer.start(DATABASE);
  const { policies } = server.control;
  await policies.set(CLOSED, { by });
  await expect(policies.set('{\n  "acl": []\n}', { by })).rejects.toMatchObject({ place: { line: 2, column: 3 } });
  await server.user("u1");
  await expect(policies.set('{"acls": [], "tests": [{"src": "u1@", "accept": ["u1@:22"]}]}', { by })).rejects.toThrow(
    "test(s) failed",
  );
  expect(() => policies.check('{"acls": [')).toThrow(PolicyError);
  expect(policies.current()).toMatchObject({ version: 1, text: CLOSED });
});

test("history is bounded in number and in bytes, and the newest version is always kept", async () => {
  await using server = await TestServer.start(DATABASE);
  const { policies } = server.control;
  const long = (n: number) => `{} // ${String(n).padStart(3, "0")} ${"x".repeat((1 << 20) - 20)}`;
  for (let n = 1; n <= 20; n++) await policies.set(long(n), { by });
  expect(policies.history().map(({ version }) => version)).toEqual([...Array(16).keys()].map((i) => 20 - i));
  for (let n = 0; n < 120; n++) await policies.set(`{} // ${n}`, { by });
  expect(policies.history()).toHaveLength(100);
  expect(policies.history()[0]).toMatchObject({ version: 140, text: "{} // 119" });
}, 120_000);

test("a policy file is read at the start and again on demand; it cannot be set, and a wrong one changes nothing", async () => {
  const path = join(folder, "policy.hujson");
  writeFileSync(path, CLOSED);
  const lines: string[] = [];
  const notes: string[] = [];
  const requestLog: Logger = { ...SILENT, info: (line) => void notes.push(line) };
  await using server = await TestServer.start({ ...fileMode(path), log: (line) => lines.push(line), requestLog });
  const { policies } = server.control;
  expect(policies.current()).toMatchObject({ version: 0, text: CLOSED, by: `the file ${path}` });
  await expect(policies.set("{}", { by })).rejects.toMatchObject({ kind: "read-only" });
  const map = await (await server.join("a", await server.key({ user: await server.user("alice") }))).stream();
  expect(map.filters!.base).toEqual([]);
  writeFileSync(path, '{ "acls": [ }');
  policies.reloadLogged();
  expect(lines.at(-1)).toContain("is not used, the one before stays: line 1, column 13");
  expect(policies.current().text).toBe(CLOSED);
  writeFileSync(path, "{} // open");
  policies.reloadLogged();
  expect(notes.at(-1)).toBe(`policy ${path} is in force`);
  expect(lines).toHaveLength(1);
  await until(() => map.filters?.base?.length === 1, "the open policy");
});

test("a server does not start with a stored policy that it cannot use, and says how to get out", async () => {
  const dataDir = join(folder, "broken");
  await using server = await TestServer.start({ ...DATABASE, dataDir });
  await server.user("alice");
  await server.control.policies.set('{"groups": {"group:a": ["alice@"]}, "acls": []}', { by });
  await server.control.close();
  const { Database } = await import("bun:sqlite");
  const database = new Database(join(dataDir, "weft.sqlite"));
  database.run(`UPDATE documents SET value = '{"text":"{\\n  \\"acl\\": 1}","by":"bob","at":1}' WHERE kind = 'policy'`);
  database.close();
  await expect(TestServer.start({ ...DATABASE, dataDir })).rejects.toThrow(
    /^the stored policy \(version 1, set by bob\) cannot be used: line 2, column 3: json: unknown field "acl"\n.*--bypass-server-and-access-database-directly/,
  );
  const file = join(folder, "wrong.hujson");
  writeFileSync(file, '{\n  "acl": []\n}');
  await expect(TestServer.start(fileMode(file))).rejects.toThrow(
    `the policy of the file ${file} cannot be used: line 2, column 3: json: unknown field "acl"`,
  );
  await expect(TestServer.start(fileMode(join(folder, "none")))).rejects.toThrow("cannot be read");
});
