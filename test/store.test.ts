// The store on both databases: the same suite on SQLite and on a real PostgreSQL server that is started here.
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import type { Kysely } from "kysely";
import { Journal } from "../src/control/journal.ts";
import { type Change, Model } from "../src/control/model.ts";
import { migrationsOf } from "../src/control/schema.ts";
import { Store, type StoreOptions, type StoreSettings } from "../src/control/store.ts";
import { UncertainCommit } from "../src/control/store-engine.ts";
import type { PostgresSettings } from "../src/control/store-postgres.ts";
import { makeNode, makeSettings, makeUser, TestServer } from "../src/control/testing.ts";
import { skip, tempDir } from "./lib/mesh.ts";
import { cannotRunPostgres, PostgresServer } from "./lib/postgres.ts";

const FOUNDATION = resolve(import.meta.dir, "vectors/foundation.sqlite.zst");

const key = (id: number) => ({
  id,
  prefix: `prefix${id}`,
  hash: "hash",
  userId: 1,
  reusable: true,
  ephemeral: false,
  used: false,
  tags: ["tag:a"],
  description: "for “tests”",
  preauthorized: true,
  expiration: 1_763_722_800_123,
  revokedAt: null,
  createdAt: 1_763_722_800_000,
});

const document = (id: string, value: unknown) => ({ kind: "test", id, value }) as never;

/** What a store holds, after everything that a change can say. */
const CHANGES: Change[] = [
  {
    users: [makeUser(1, { groups: ["ops"], createdAt: 1_763_722_800_000, status: "suspended" }), makeUser(2)],
    counters: { lastUser: 2 },
  },
  {
    keys: [key(1), key(2)],
    documents: [document("a", { n: 1 }), document("b", ["ä"])],
    counters: { lastIPv4: "100.64.0.9" },
  },
  {
    nodes: [
      makeNode(1, { expiry: 1_763_722_800_123, authKeyId: 1, attributes: { "custom:a": true } }),
      makeNode(2, { endpoints: ["192.0.2.1:1"], hostinfo: { OS: "linux", Hostname: "nul \0 and ☃" } }),
      makeNode(3),
    ],
  },
  { nodes: [makeNode(2, { tags: ["tag:x"], userId: null, lastSeen: 5 })], nodesRemoved: [3], keysRemoved: [2] },
  { documents: [document("a", null), document("b", ["ö"])], users: [makeUser(2, { name: "renamed" })] },
];

const AFTER: Change = {
  users: [
    makeUser(1, { groups: ["ops"], createdAt: 1_763_722_800_000, status: "suspended" }),
    makeUser(2, { name: "renamed" }),
  ],
  keys: [key(1)],
  nodes: [
    makeNode(1, { expiry: 1_763_722_800_123, authKeyId: 1, attributes: { "custom:a": true } }),
    makeNode(2, { tags: ["tag:x"], userId: null, lastSeen: 5 }),
  ],
  documents: [document("b", ["ö"])],
  counters: { lastUser: 2, lastKey: 0, lastNode: 0, lastIPv4: "100.64.0.9", lastIPv6: "" },
};

function sorted(change: Change): Change {
  const byId = (a: { id: number }, b: { id: number }) => a.id - b.id;
  return { ...change, users: change.users!.toSorted(byId), nodes: change.nodes!.toSorted(byId) };
}

/** The migrations of today and one more. */
const withAnother = (up: (db: Kysely<unknown>) => Promise<void>): NonNullable<StoreOptions["migrations"]> => {
  return (dialect) => ({ ...migrationsOf(dialect), "9000-another": { up } });
};
const addColumn = (db: Kysely<unknown>) => db.schema.alterTable("users").addColumn("extra", "text").execute();

/** What every database must do. */
function suite(fresh: () => Promise<StoreSettings>): void {
  test("what was written is read again", async () => {
    const settings = await fresh();
    const store = await Store.open(settings);
    await store.write(CHANGES.slice(0, 3));
    for (const change of CHANGES.slice(3)) await store.write([change]);
    await store.close();
    const again = await Store.open(settings);
    expect(sorted(await again.load())).toEqual(AFTER);
    await again.close();
  });

  test("a write that fails in the middle leaves nothing, names the change, and the next one works", async () => {
    const settings = await fresh();
    const store = await Store.open(settings);
    await store.write([{ users: [makeUser(1)] }]);
    const refused = store.write([{ users: [makeUser(2)] }, { nodes: [makeNode(1, { userId: 99 })] }]);
    await expect(refused).rejects.toThrow(/foreign key/i);
    await expect(refused).rejects.toMatchObject({ name: "RefusedChange", index: 1 });
    // Columns of SQLite have no range.
    if (settings.type === "postgres") {
      const tooLarge = store.write([{ users: [makeUser(2)] }, { nodes: [makeNode(8, { cap: 2 ** 40 })] }]);
      await expect(tooLarge).rejects.toMatchObject({ name: "RefusedChange", index: 1 });
    }
    await store.write([{ nodes: [makeNode(7)] }]);
    const { users, nodes } = await store.load();
    expect(users).toEqual([makeUser(1)]);
    expect(nodes).toEqual([makeNode(7)]);
    await store.close();
  });

  test("a second server is told that there is one", async () => {
    const settings = await fresh();
    const store = await Store.open(settings);
    await expect(Store.open(settings)).rejects.toThrow("another control server");
    await store.write([{ users: [makeUser(1)] }]);
    await store.close();
    const next = await Store.open(settings);
    expect((await next.load()).users).toHaveLength(1);
    await next.close();
  });

  test("a migration that fails in the middle leaves the old schema and everything in it usable", async () => {
    const settings = await fresh();
    const store = await Store.open(settings);
    await store.write(CHANGES);
    await store.close();
    const failing = withAnother(async (db) => {
      await addColumn(db);
      await db.schema.dropTable("documents").execute();
      throw new Error("power cut");
    });
    await expect(Store.open(settings, { migrations: failing })).rejects.toThrow(
      "could not be brought up to date, it stays as it was: power cut",
    );
    const old = await Store.open(settings);
    expect(sorted(await old.load())).toEqual(AFTER);
    await old.close();
  });

  test("a newer schema is refused", async () => {
    const settings = await fresh();
    await (await Store.open(settings, { migrations: withAnother(addColumn) })).close();
    await expect(Store.open(settings)).rejects.toThrow('was written by a newer Weft (its schema has "9000-another")');
  });

  test("a character that a database cannot hold spoils no transaction", async () => {
    const store = await Store.open(await fresh());
    await store.write([{ users: [makeUser(1)] }, { nodes: [makeNode(1, { hostname: "a\0b" }), makeNode(2)] }]);
    expect((await store.load()).nodes!.map(({ hostname }) => /^a.b$/su.test(hostname))).toEqual([true, false]);
    await store.close();
  });

  test("in a tailnet of one family any number of nodes have no address of the other", async () => {
    using folder = tempDir("store");
    const prefixes = { v4: "100.64.0.0/10", v6: null, allocation: "sequential" as const };
    const settings = makeSettings({ store: await fresh(), prefixes });
    const server = await TestServer.start({ dataDir: folder.path, settings });
    const key = await server.key({ user: String(await server.user("alice")), reusable: true });
    for (const name of ["a", "b", "c"]) await server.join(name, key);
    await server.stop();
    const again = await TestServer.start({ dataDir: folder.path, settings });
    const { nodes } = await again.admin<{ nodes: { ipAddresses: string[] }[] }>("GET", "/node");
    expect(nodes.map(({ ipAddresses }) => ipAddresses)).toEqual([["100.64.0.1"], ["100.64.0.2"], ["100.64.0.3"]]);
    await again.stop();
  });

  test("a whole control server runs on it", async () => {
    const settings = await fresh();
    using folder = tempDir("store");
    const start = () => TestServer.start({ dataDir: folder.path, settings: makeSettings({ store: settings }) });
    const server = await start();
    const user = await server.user("alice");
    const node = await server.join("laptop", await server.key({ user: String(user), reusable: true }));
    await node.lite({ Endpoints: ["192.0.2.9:41641"] });
    await server.stop();
    const again = await start();
    const { nodes } = await again.admin<{ nodes: { name: string; user: { name: string } }[] }>("GET", "/node");
    expect(nodes.map(({ name, user }) => [name, user.name])).toEqual([["laptop", "alice"]]);
    await again.stop();
  });
}

describe("SQLite", () => {
  const folder = tempDir("store");
  afterAll(() => folder[Symbol.dispose]());
  let files = 0;
  const fresh = async () => ({ type: "sqlite" as const, path: join(folder.path, `${files++}`, "weft.sqlite") });
  suite(async () => {
    const settings = await fresh();
    mkdirSync(join(settings.path, ".."), { recursive: true });
    return settings;
  });

  test("a file of the foundation, with users, keys and nodes, is brought up to date after a backup", async () => {
    using dir = tempDir("foundation");
    const path = join(dir.path, "weft.sqlite");
    const original = join(dir.path, "original.sqlite");
    for (const file of [path, original]) writeFileSync(file, Bun.zstdDecompressSync(readFileSync(FOUNDATION)));
    const lines: string[] = [];
    const store = await Store.open({ type: "sqlite", path }, { log: (line) => lines.push(line) });
    const { users, keys, nodes, counters } = await store.load();
    await store.close();
    expect(
      users!.map(({ name, email, provider, providerId, groups }) => [name, email, provider, providerId, groups]),
    ).toEqual([
      ["alice", "", "", "", []],
      ["bob", "", "", "", []],
      ["carol", "carol@example.com", "", "", []],
    ]);
    expect(
      keys!.map(({ userId, reusable, ephemeral, used, tags, preauthorized, revokedAt }) => ({
        userId,
        reusable,
        ephemeral,
        used,
        tags,
        preauthorized,
        revokedAt,
      })),
    ).toEqual([
      { userId: 1, reusable: true, ephemeral: false, used: true, tags: [], preauthorized: false, revokedAt: null },
      { userId: 2, reusable: false, ephemeral: false, used: true, tags: [], preauthorized: false, revokedAt: null },
      {
        userId: 2,
        reusable: true,
        ephemeral: true,
        used: true,
        tags: ["tag:web"],
        preauthorized: false,
        revokedAt: null,
      },
    ]);
    expect(
      nodes!.map(({ id, givenName, userId, tags, ipv4, endpoints, authorized, approvedRoutes }) => [
        id,
        givenName,
        userId,
        tags,
        ipv4,
        endpoints,
        authorized,
        approvedRoutes,
      ]),
    ).toEqual([
      [1, "desk", 1, [], "100.64.0.1", ["192.0.2.1:41641", "[2001:db8::1]:41641"], true, []],
      [2, "bobs-desk", 2, [], "100.64.0.2", ["198.51.100.7:41641"], true, []],
      [3, "web-1", null, ["tag:web"], "100.64.0.3", [], true, []],
    ]);
    expect(counters).toMatchObject({ lastUser: 3, lastKey: 3, lastNode: 4, lastIPv4: "100.64.0.4" });

    const [name, ...others] = readdirSync(join(dir.path, "backups"));
    expect(others).toEqual([]);
    expect(name).toMatch(/^0001-foundation-\d{8}T\d{6}Z\.sqlite$/);
    const backup = join(dir.path, "backups", name!);
    expect(statSync(backup).mode & 0o777).toBe(0o600);
    expect(lines.join()).toContain(backup);
    const rows = (file: string, table: string) => {
      using database = new Database(file);
      return database.query(`select * from ${table} order by 1`).all();
    };
    for (const table of ["users", "pre_auth_keys", "nodes", "counters", "kysely_migration"])
      expect(rows(backup, table)).toEqual(rows(original, table));

    using migrated = new Database(path);
    expect(migrated.query("PRAGMA foreign_key_check").all()).toEqual([]);
    expect(migrated.query("PRAGMA integrity_check").get()).toEqual({ integrity_check: "ok" });
  });

  test("no backup where nothing changes, and no migration where no backup can be written", async () => {
    using dir = tempDir("backup");
    const settings = { type: "sqlite" as const, path: join(dir.path, "weft.sqlite") };
    for (const _ of [1, 2]) await (await Store.open(settings)).close();
    expect(readdirSync(dir.path).filter((name) => name === "backups")).toEqual([]);
    writeFileSync(join(dir.path, "backups"), "a file in its place");
    await expect(Store.open(settings, { migrations: withAnother(addColumn) })).rejects.toThrow(
      "without a backup the schema is not changed",
    );
    await (await Store.open(settings)).close();
  });
});

describe.skipIf(skip(cannotRunPostgres))("PostgreSQL", () => {
  let server: PostgresServer;
  beforeAll(async () => {
    server = await PostgresServer.start();
  });
  afterAll(() => server[Symbol.asyncDispose]());
  suite(() => server.database());

  /** A journal over a store, and what it loads again. */
  async function journalOn(settings: PostgresSettings) {
    const store = await Store.open(settings);
    const model = new Model();
    const journal = new Journal(model, (changes) => store.write(changes), { onApplied: () => {}, onDurable: () => {} });
    return { store, model, journal };
  }
  const endConnections = ({ database }: PostgresSettings) =>
    server.query(`select pg_terminate_backend(pid) from pg_stat_activity where datname = '${database}'`);

  test("before a migration every table is copied, in the same database", async () => {
    const settings = await server.database();
    const store = await Store.open(settings);
    await store.write([{ users: [makeUser(1)] }]);
    await store.close();
    const lines: string[] = [];
    const migrations = withAnother(addColumn);
    await (await Store.open(settings, { migrations, log: (line) => lines.push(line) })).close();
    const prefix = /backup_\w+_(?=\*)/.exec(lines.join())![0];
    const newest = Object.keys(migrationsOf("postgres")).at(-1)!.replaceAll("-", "_");
    expect(prefix).toMatch(new RegExp(`^backup_${newest}_\\d{8}t\\d{6}z_$`));
    const users = await server.query<{ name: string }>(`select * from ${prefix}users`, settings.database);
    expect(users.map(({ name }) => name)).toEqual(["user1"]);
    expect(users[0]).not.toHaveProperty("extra");
  });

  test("a lost connection fails what was under way in one sentence, and the next change finds the database again", async () => {
    const settings = await server.database();
    const { store, journal, model } = await journalOn(settings);
    await journal.commit({ users: [makeUser(1)] });
    await endConnections(settings);
    await expect(journal.commit({ users: [makeUser(2)] })).rejects.toThrow(
      /could not be stored: the connection to .* was lost/,
    );
    await journal.drained();
    expect([...model.users.keys()]).toEqual([1]);
    await journal.commit({ users: [makeUser(3)] });
    expect((await store.load()).users!.map(({ id }) => id)).toEqual([1, 3]);
    // Still the only server.
    await expect(Store.open(settings)).rejects.toThrow("another control server uses");
    await store.close();
  });

  test("while the database server is away commands are refused; nothing acknowledged is lost; then they work again", async () => {
    const settings = await server.database();
    const { store, journal } = await journalOn(settings);
    await journal.commit({ users: [makeUser(1)] });
    await server.kill();
    for (const id of [2, 3])
      await expect(journal.commit({ users: [makeUser(id)] })).rejects.toThrow(/^the change could not be stored: /);
    await journal.drained();
    await expect(journal.commit({ users: [makeUser(4)] })).rejects.toThrow("cannot be reached");
    await journal.drained();
    await server.run();
    await journal.commit({ users: [makeUser(5)] });
    expect((await store.load()).users!.map(({ id }) => id)).toEqual([1, 5]);
    await store.close();
  }, 300_000);

  test("a server whose database was used by another one meanwhile writes no more", async () => {
    const settings = await server.database();
    const { store, journal } = await journalOn(settings);
    await endConnections(settings);
    await expect(journal.commit({ users: [makeUser(1)] })).rejects.toThrow("was lost");
    await journal.drained();
    await (await Store.open(settings)).close();
    await expect(journal.commit({ users: [makeUser(2)] })).rejects.toThrow("another control server has used");
    await journal.drained();
    await store.close();
  });

  test("what cannot be reached is named", async () => {
    const settings = await server.database();
    await expect(Store.open({ ...settings, database: "absent" })).rejects.toThrow(
      /the PostgreSQL database absent at .* cannot be reached: database "absent" does not exist/,
    );
    await expect(Store.open({ ...settings, host: "/tmp/weft-no-such-folder" })).rejects.toThrow("cannot be reached");
  });
});

test("a change that was refused, though the database has it all the same, is undone there with the next one", async () => {
  const rows = new Map<number, string>();
  let answers = false;
  const model = new Model();
  const journal = new Journal(
    model,
    async (changes) => {
      for (const { users = [], usersRemoved = [] } of changes) {
        for (const user of users) rows.set(user.id, user.name);
        for (const id of usersRemoved) rows.delete(id);
      }
      if (!answers) throw new UncertainCommit("no answer");
    },
    { onApplied: () => {}, onDurable: () => {} },
  );
  answers = true;
  await journal.commit({ users: [makeUser(1, { name: "first" })] });
  answers = false;
  const lost = [
    journal.commit({ users: [makeUser(1, { name: "second" }), makeUser(2)] }),
    journal.commit({ usersRemoved: [2] }),
  ];
  for (const { status } of await Promise.allSettled(lost)) expect(status).toBe("rejected");
  expect(rows).toEqual(new Map([[1, "second"]]));
  await expect(journal.commit({ users: [makeUser(3)] })).rejects.toThrow("no answer");
  await journal.drained();
  answers = true;
  await journal.commit({ users: [makeUser(4)] });
  expect(rows).toEqual(new Map([...model.users].map(([id, { name }]) => [id, name])));
  expect([...rows.keys()].sort()).toEqual([1, 4]);
});
