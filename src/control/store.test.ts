import { Database } from "bun:sqlite";
import { afterEach, beforeEach, expect, test } from "bun:test";
import { chmodSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { createControl } from "./index.ts";
import { Journal } from "./journal.ts";
import { type Change, Model } from "./model.ts";
import { Store } from "./store.ts";
import { RefusedChange } from "./store-engine.ts";
import { makeNode, makeSettings, makeUser } from "./testing.ts";

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "weft-store-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const OPTIONS = { settings: makeSettings() };

test("what was written is read again; a write that fails in the middle leaves nothing", async () => {
  const path = join(folder, "x.sqlite");
  const store = await Store.open({ type: "sqlite", path });
  expect(statSync(path).mode & 0o777).toBe(0o600);
  await store.write([{ users: [makeUser(1)], counters: { lastUser: 1, lastIPv4: "100.64.0.9" } }]);
  const orphan = {
    id: 1,
    prefix: "p",
    hash: "h",
    userId: 99,
    reusable: false,
    ephemeral: false,
    used: false,
    tags: [],
    description: "",
    preauthorized: false,
    revokedAt: null,
  };
  const broken: Change = { keys: [{ ...orphan, expiration: null, createdAt: 0 }] };
  expect(store.write([{ users: [makeUser(2)] }, broken])).rejects.toThrow("FOREIGN KEY");
  await store.close();
  const again = await Store.open({ type: "sqlite", path });
  expect(await again.load()).toEqual({
    users: [makeUser(1)],
    keys: [],
    nodes: [],
    documents: [],
    counters: { lastUser: 1, lastKey: 0, lastNode: 0, lastIPv4: "100.64.0.9", lastIPv6: "" },
  });
  await again.close();
});

test("the write-ahead log is synchronous and foreign keys hold", async () => {
  const path = join(folder, "x.sqlite");
  await (await Store.open({ type: "sqlite", path })).close();
  const database = new Database(path);
  expect(database.query("PRAGMA journal_mode").get()).toEqual({ journal_mode: "wal" });
  database.close();
});

test("a second server on the same data folder, a newer schema, and files that are damaged: one sentence each", async () => {
  const control = await createControl({ ...OPTIONS, dataDir: folder });
  expect(statSync(folder).mode & 0o777).toBe(0o700);
  expect(statSync(control.adminSocket).mode & 0o777).toBe(0o600);
  expect(createControl({ ...OPTIONS, dataDir: folder })).rejects.toThrow("another control server has");
  await control.close();

  const path = join(folder, "weft.sqlite");
  const database = new Database(path);
  database.run("INSERT INTO kysely_migration VALUES ('9999-from-the-future', '2099-01-01')");
  database.close();
  expect(createControl({ ...OPTIONS, dataDir: folder })).rejects.toThrow(
    'written by a newer Weft (its schema has "9999-from-the-future")',
  );

  writeFileSync(path, "this is no database, and long enough to be looked at as one".repeat(100));
  expect(createControl({ ...OPTIONS, dataDir: folder })).rejects.toThrow("not an intact SQLite database");
  rmSync(path);
  for (const damaged of ["", "privkey:12", `privkey:${"0".repeat(64)}`, `mkey:${"1".repeat(64)}`]) {
    writeFileSync(join(folder, "noise_private.key"), damaged, { mode: 0o600 });
    expect(createControl({ ...OPTIONS, dataDir: folder })).rejects.toThrow("noise_private.key is damaged");
  }
  writeFileSync(join(folder, "noise_private.key"), `privkey:${"1".repeat(64)}`);
  chmodSync(join(folder, "noise_private.key"), 0o644);
  expect(createControl({ ...OPTIONS, dataDir: folder })).rejects.toThrow("(mode 644): chmod 0640 or less");
  expect(createControl({ ...OPTIONS, dataDir: path })).rejects.toThrow("there is a file in its place");
  const deep = join(folder, "x".repeat(120));
  expect(createControl({ ...OPTIONS, dataDir: deep })).rejects.toThrow("too long for a unix socket");
});

test("commands of one turn are one transaction", async () => {
  const batches: Change[][] = [];
  let durable = 0;
  const write = async (changes: Change[]) => {
    batches.push(changes);
  };
  const model = new Model();
  const journal = new Journal(model, write, { onApplied: () => {}, onDurable: () => durable++ });
  await Promise.all([1, 2, 3].map((id) => journal.commit({ users: [makeUser(id)] })));
  expect(batches).toEqual([[{ users: [makeUser(1)] }, { users: [makeUser(2)] }, { users: [makeUser(3)] }]]);
  await journal.commit({ users: [makeUser(4)] });
  expect(batches).toHaveLength(2);
  expect(durable).toBe(2);
});

test("when the disk refuses, whatever was not durable is undone and its callers are told", async () => {
  let refuse = false;
  const model = new Model();
  const write = async () => {
    if (refuse) throw new Error("disk full");
  };
  const journal = new Journal(model, write, { onApplied: () => {}, onDurable: () => {} });
  await journal.commit({ users: [makeUser(1)] });
  refuse = true;
  const lost = [
    journal.commit({ users: [{ ...makeUser(1), name: "renamed" }, makeUser(2)] }),
    journal.commit({ usersRemoved: [1] }),
  ];
  expect(model.users.has(1)).toBe(false);
  for (const { status, reason } of (await Promise.allSettled(lost)) as PromiseRejectedResult[]) {
    expect(status).toBe("rejected");
    expect(String(reason)).toContain("could not be stored: disk full");
  }
  expect([...model.users.values()]).toEqual([makeUser(1)]);
  expect(model.userByName("user1")).toEqual(makeUser(1));
  expect(model.userByName("renamed")).toBeUndefined();
  refuse = false;
  await journal.commit({ users: [makeUser(3)] });
  expect([...model.users.keys()]).toEqual([1, 3]);
});

test("a change that the database refuses fails alone, with what was planned on the same records", async () => {
  const store = await Store.open({ type: "sqlite", path: join(folder, "x.sqlite") });
  const model = new Model();
  let durable = 0;
  const journal = new Journal(model, (changes) => store.write(changes), {
    onApplied: () => {},
    onDurable: () => durable++,
  });
  await journal.commit({ users: [makeUser(1)], nodes: [makeNode(1), makeNode(2)] });
  const orphan = makeNode(3, { userId: 99 });
  const outcomes = Promise.allSettled([
    journal.commit({ nodes: [makeNode(1, { hostname: "before" })] }),
    journal.commit({ nodes: [orphan, makeNode(2, { hostname: "with it" })] }),
    journal.commit({ users: [makeUser(2)] }),
    journal.commit({ nodes: [makeNode(2, { hostname: "on top of it" }), makeNode(4)] }),
    journal.commit({ nodesRemoved: [4] }),
    journal.commit({ nodes: [makeNode(5, { userId: 2 }), { ...orphan, id: 6 }] }),
    journal.commit({ nodes: [makeNode(1, { hostname: "after" })] }),
  ]);
  // Meanwhile its stream opens: no refusal undoes that.
  journal.applyVolatile({ nodes: [{ ...model.nodes.get(2)!, online: true }] });
  const statuses = (await outcomes).map(({ status }) => status === "fulfilled");
  expect(statuses).toEqual([true, false, true, false, false, false, true]);
  expect([...model.nodes.keys()].sort()).toEqual([1, 2]);
  expect([model.nodes.get(1)!.hostname, model.nodes.get(2)]).toEqual(["after", makeNode(2, { online: true })]);
  expect(model.users.has(2)).toBe(true);
  const { nodes, users } = await store.load();
  expect([nodes, users]).toEqual([
    [makeNode(1, { hostname: "after" }), makeNode(2)],
    [makeUser(1), makeUser(2)],
  ]);
  await store.close();
});

test("a change that nobody can be told of is none", async () => {
  const written: Change[] = [];
  const model = new Model();
  const onApplied = ({ removed }: { removed: unknown[] }) => {
    if (model.users.has(2) && removed.length === 0) throw new Error("a defect");
  };
  const journal = new Journal(model, async (changes) => void written.push(...changes), {
    onApplied,
    onDurable: () => {},
  });
  await journal.commit({ users: [makeUser(1)] });
  expect(() => journal.commit({ users: [makeUser(2)] })).toThrow("a defect");
  expect([...model.users.keys()]).toEqual([1]);
  await journal.commit({ users: [makeUser(3)] });
  expect(written).toEqual([{ users: [makeUser(1)] }, { users: [makeUser(3)] }]);
});

test("whatever the store refuses, and when: the model is what the store holds, and each caller hears what became of his change", async () => {
  const user = fc.record({ id: fc.integer({ min: 1, max: 6 }), name: fc.constantFrom("a", "b", "bad") });
  const users = fc.uniqueArray(user, { maxLength: 3, selector: ({ id }) => id });
  const change = fc
    .record({ users, usersRemoved: fc.array(fc.integer({ min: 1, max: 6 }), { maxLength: 1 }) })
    .filter((made) => !made.users.some(({ id }) => made.usersRemoved.includes(id)));
  // Turns of the event loop, each with changes that come together.
  const turns = fc.array(fc.array(change, { maxLength: 5 }), { maxLength: 6 });
  await fc.assert(
    fc.asyncProperty(turns, async (plan) => {
      let rows = new Map<number, string>();
      const model = new Model();
      const write = async (changes: Change[]) => {
        await new Promise((resolve) => setImmediate(resolve));
        const next = new Map(rows);
        for (const [index, { users = [], usersRemoved = [] }] of changes.entries()) {
          if (users.some(({ name }) => name === "bad")) throw new RefusedChange(index, "bad");
          for (const { id, name } of users) next.set(id, name);
          for (const id of usersRemoved) next.delete(id);
        }
        rows = next;
      };
      const journal = new Journal(model, write, { onApplied: () => {}, onDurable: () => {} });
      const outcomes: Promise<boolean>[] = [];
      for (const together of plan) {
        for (const { users, usersRemoved } of together) {
          const records = users.map(({ id, name }) => makeUser(id, { name }));
          const commit = journal.commit({ users: records, usersRemoved });
          outcomes.push(
            commit.then(
              () => true,
              () => false,
            ),
          );
        }
        await new Promise((resolve) => setImmediate(resolve));
      }
      const stored = await Promise.all(outcomes);
      await journal.drained();
      expect(new Map([...model.users].map(([id, { name }]) => [id, name]))).toEqual(rows);
      // What is bad never stays, and takes nothing with it where nothing is.
      const flat = plan.flat();
      for (const [i, { users }] of flat.entries())
        if (users.some(({ name }) => name === "bad")) expect(stored[i]).toBe(false);
      if (flat.every(({ users }) => users.every(({ name }) => name !== "bad"))) expect(stored).not.toContain(false);
    }),
    { numRuns: 300, seed: 1 },
  );
});
