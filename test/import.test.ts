// From an official Headscale to Weft: the same address, the same clients, nobody signs in again.
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Lab } from "../lab/network.ts";
import { main } from "../src/cli/import.ts";
import type { ApiNode } from "../src/control/api/shapes.ts";
import { readHeadscale, tailnetOf } from "../src/control/headscale.ts";
import { Model } from "../src/control/model.ts";
import { findKey, keyProblem } from "../src/control/preauthkey.ts";
import { Store, type StoreSettings } from "../src/control/store.ts";
import { TestServer } from "../src/control/testing.ts";
import { startDerper } from "./lib/derper.ts";
import { Headscale } from "./lib/headscale.ts";
import { answers, Box, cannotUseNamespaces, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { cannotRunPostgres, PostgresServer } from "./lib/postgres.ts";

const SECRET = "4ehRzTHBZS1EmIQP6LWBJFCPvgYHeuY9PvV2HE8_LvNFM4J2fL3r78-7OBp7cKLg";
const digits = (n: number) => n.toString(16).padStart(64, "0");

/** A database as Headscale 0.28 writes it, statement by statement. */
function headscaleDump(dialect: "sqlite" | "postgres"): string[] {
  const [id, time, flag, bytes] =
    dialect === "sqlite"
      ? ["integer primary key autoincrement", "datetime", "numeric", "blob"]
      : ["bigserial primary key", "timestamptz", "boolean", "bytea"];
  const hash = Buffer.from(Bun.password.hashSync(SECRET, { algorithm: "bcrypt", cost: 4 })).toString("hex");
  const blob = dialect === "sqlite" ? `x'${hash}'` : `decode('${hash}', 'hex')`;
  const at = "'2026-11-21 17:40:46.223937294+00:00'";
  const never = "'0001-01-01 00:00:00+00:00'";
  const node = (n: number, columns: Record<string, string>) => {
    const all: Record<string, string> = {
      id: `${n}`,
      machine_key: `'mkey:${digits(n)}'`,
      node_key: `'nodekey:${digits(n)}'`,
      disco_key: `'discokey:${digits(0)}'`,
      hostname: `'Host ${n}'`,
      given_name: `'host-${n}'`,
      host_info: `'{"OS":"linux","Hostname":"Host ${n}","NetInfo":{"PreferredDERP":900}}'`,
      ipv4: `'100.64.0.${n}'`,
      user_id: "1",
      register_method: "'cli'",
      expiry: never,
      created_at: at,
      ...columns,
    };
    return `insert into nodes (${Object.keys(all)}) values (${Object.values(all)})`;
  };
  return [
    "create table migrations (id text primary key)",
    `create table users (id ${id}, created_at ${time}, updated_at ${time}, deleted_at ${time}, name text, display_name text, email text, provider_identifier text, provider text, profile_pic_url text)`,
    `create table pre_auth_keys (id ${id}, key text, prefix text, hash ${bytes}, user_id integer, reusable ${flag}, ephemeral ${flag}, used ${flag}, tags text, created_at ${time}, expiration ${time})`,
    `create table api_keys (id ${id}, prefix text, hash ${bytes}, created_at ${time}, expiration ${time}, last_seen ${time})`,
    `create table nodes (id ${id}, machine_key text, node_key text, disco_key text, endpoints text, host_info text, ipv4 text, ipv6 text, hostname text, given_name varchar(63), user_id integer, register_method text, tags text, auth_key_id integer, expiry ${time}, last_seen ${time}, approved_routes text, created_at ${time}, updated_at ${time}, deleted_at ${time})`,
    `create table policies (id ${id}, created_at ${time}, updated_at ${time}, deleted_at ${time}, data text)`,
    `insert into users (id, name, display_name, email, created_at) values (1, 'alice', 'Alice', 'alice@example.com', ${at})`,
    `insert into users (id, name, provider_identifier, provider, created_at) values (2, 'bob', 'https://id.example.com/auth0%7C7', 'oidc', ${at})`,
    `insert into users (id, name, created_at, deleted_at) values (3, 'gone', ${at}, ${at})`,
    `insert into pre_auth_keys (id, prefix, hash, user_id, reusable, ephemeral, used, tags, expiration, created_at) values (4, 'aJVbK-CjICJe', ${blob}, 1, true, true, true, '[]', '2027-11-21 00:00:00+00:00', ${at})`,
    `insert into pre_auth_keys (id, key, prefix, user_id, reusable, ephemeral, used) values (5, '0123456789', '', 1, true, false, false)`,
    `insert into api_keys (id, prefix, hash, created_at, expiration) values (6, 'eQSkv8TQxDGV', ${blob}, ${at}, ${never})`,
    node(1, { approved_routes: `'["10.0.0.1/8"]'`, ipv6: "'fd7a:115c:a1e0::1'", auth_key_id: "4" }),
    node(2, { tags: `'["tag:b","tag:a"]'`, given_name: "'chosen'", user_id: "null", expiry: at }),
    node(3, { expiry: at, disco_key: `'discokey:${digits(3)}'`, last_seen: at, given_name: "'host-3-k2j8x0ab'" }),
    node(4, { machine_key: "''" }),
    node(5, { ipv4: "'100.64.0.1'" }),
    node(6, { deleted_at: at }),
    `insert into policies (id, data, updated_at) values (1, '{"old": 1}', ${at}), (2, '// newest\n{"acls": []}', ${at})`,
  ];
}

async function expectTailnet(store: StoreSettings): Promise<void> {
  const now = Date.parse("2026-12-01T00:00:00Z");
  const { change, notes } = tailnetOf((await readHeadscale(store)).rows!, now);
  const { users = [], nodes = [], keys = [], documents = [], counters } = change;
  const created = Date.parse("2026-11-21T17:40:46.223Z");
  expect(users.map(({ id, name, email, provider, providerId }) => [id, name, email, provider, providerId])).toEqual([
    [1, "alice", "alice@example.com", "", ""],
    [2, "bob", "", "oidc", "https://id.example.com/auth0|7"],
  ]);
  expect(
    nodes.map((node) => [
      node.id,
      node.givenName,
      node.nameFromHost,
      node.userId,
      node.tags,
      node.expiry,
      node.expired,
    ]),
  ).toEqual([
    [1, "host-1", true, 1, [], null, false],
    [2, "chosen", false, null, ["tag:a", "tag:b"], null, false],
    [3, "host-3-k2j8x0ab", true, 1, [], created, true],
  ]);
  const [first, , third] = nodes;
  expect(first).toMatchObject({
    machineKey: `mkey:${digits(1)}`,
    nodeKey: `nodekey:${digits(1)}`,
    discoKey: "",
    ipv4: "100.64.0.1",
    ipv6: "fd7a:115c:a1e0::1",
    approvedRoutes: ["10.0.0.0/8"],
    ephemeral: true,
    authKeyId: 4,
    homeDerp: 900,
    createdAt: created,
    lastSeen: null,
  });
  expect([third!.discoKey, third!.lastSeen]).toEqual([`discokey:${digits(3)}`, created]);
  expect(keys).toMatchObject([{ id: 4, userId: 1, reusable: true, ephemeral: true, used: true, createdAt: created }]);
  expect(counters).toMatchObject({ lastKey: 5, lastNode: 6, lastIPv4: "100.64.0.3", lastIPv6: "fd7a:115c:a1e0::1" });
  expect(documents.map(({ kind, id }) => [kind, id])).toEqual([
    ["apikey", "eQSkv8TQxDGV"],
    ["policy", "1"],
    ["sequence", "apikey"],
  ]);
  expect(documents[0]!.value).toMatchObject({ id: 6, expiration: null });
  expect(documents[1]!.value).toEqual({ text: '// newest\n{"acls": []}', by: "Headscale", at: created });
  expect(notes).toEqual([
    "1 pre-auth keys in clear text, of Headscale before 0.28, are left out: make new ones",
    "node 4 (Host 4) is left out: it has no keys",
    "node 5 (Host 5) is left out: its address 100.64.0.1 is none, or another node's",
  ]);

  const model = new Model();
  model.apply(change);
  const text = `hskey-auth-aJVbK-CjICJe-${SECRET}`;
  expect(findKey(model, `${text.slice(0, -1)}h`)).toBeNull();
  for (const _ of [1, 2]) expect(keyProblem(model, findKey(model, text)!, now)).toBeNull();
  expect(findKey(model, `${text.slice(0, -1)}h`)).toBeNull();
}

test("Headscale's SQLite file: who and what is in it, each value as it is meant", async () => {
  using dir = tempDir("import");
  const path = join(dir.path, "db.sqlite");
  const database = new Database(path);
  database.run("pragma journal_mode = wal");
  for (const statement of headscaleDump("sqlite")) database.run(statement);
  await expect(readHeadscale({ type: "sqlite", path })).rejects.toThrow("a server has it open: stop it first");
  database.close();
  await expectTailnet({ type: "sqlite", path });

  await expect(Store.open({ type: "sqlite", path })).rejects.toThrow("is Headscale's, which keeps another schema");
  const again = new Database(path);
  expect(again.query("select name from sqlite_master where name like 'kysely%'").all()).toEqual([]);
  again.run("alter table nodes drop column tags");
  again.close();
  await expect(readHeadscale({ type: "sqlite", path })).rejects.toThrow("a Headscale before 0.28");
  await expect(readHeadscale({ type: "sqlite", path: `${path}x` })).rejects.toThrow("there is no such file");
});

test.skipIf(skip(cannotRunPostgres))("Headscale's PostgreSQL database gives the same", async () => {
  await using server = await PostgresServer.start();
  const settings = await server.database();
  for (const statement of headscaleDump("postgres")) await server.query(statement, settings.database);
  await expectTailnet(settings);
  await expect(Store.open(settings)).rejects.toThrow("is Headscale's, which keeps another schema");
});

test("weft import: an empty tailnet takes it over with the Noise key, and says what does not fit; another one refuses", async () => {
  using dir = tempDir("import");
  const file = (name: string) => join(dir.path, name);
  const database = new Database(file("db.sqlite"));
  for (const statement of headscaleDump("sqlite")) database.run(statement);
  database.close();
  mkdirSync(file("weft"));
  writeFileSync(file("weft/noise_private.key"), `privkey:${digits(7)}\n`, { mode: 0o600 });
  writeFileSync(
    file("headscale.yaml"),
    "server_url: https://hs.example.com\nnoise: {private_key_path: noise.key}\ndatabase: {type: sqlite, sqlite: {path: db.sqlite}}\ndns: {base_domain: tail.example.net}\n",
  );
  writeFileSync(
    file("weft.yaml"),
    "server_url: https://weft.example.com\ndata_dir: weft\nprefixes: {v4: 100.65.0.0/16}\ndns: {base_domain: tail.example.net}\n",
  );
  const run = (from: string) => {
    const said: unknown[] = [];
    const log = console.log;
    console.log = (line) => said.push(line);
    return main([file(from), "-c", file("weft.yaml")])
      .then(() => said)
      .finally(() => {
        console.log = log;
      });
  };
  await expect(run("headscale.yaml")).rejects.toThrow("the Noise key cannot be read");
  writeFileSync(file("noise.key"), `privkey:${digits(8)}`, { mode: 0o600 });
  const lines = await run("headscale.yaml");
  expect(lines).toEqual([
    `2 users, 3 nodes, 1 pre-auth keys, 1 API keys and the policy are in ${file("weft/weft.sqlite")}`,
    `its Noise key is ${file("weft/noise_private.key")} now; the one before, which no node knew, is ${file("weft/noise_private.key.replaced")}`,
    expect.stringContaining("1 pre-auth keys in clear text"),
    expect.stringContaining("node 4"),
    expect.stringContaining("node 5"),
    "3 addresses like 100.64.0.1 are outside of prefixes.v4 of the configuration: set it as Headscale has it",
    "1 addresses like fd7a:115c:a1e0::1 are outside of prefixes.v6 of the configuration: set it as Headscale has it",
    "the policy was in the database: set policy.mode to database, or it is not in force",
    "nodes look for https://hs.example.com, and server_url is https://weft.example.com: they must be the same",
  ]);
  expect(readFileSync(file("weft/noise_private.key"), "utf8")).toBe(`privkey:${digits(8)}\n`);
  expect(statSync(file("weft/noise_private.key")).mode & 0o777).toBe(0o600);
  await expect(run("headscale.yaml")).rejects.toThrow("has users, nodes or pre-auth keys already");
  const store = await Store.open({ type: "sqlite", path: file("weft/weft.sqlite") });
  expect((await store.load()).nodes).toHaveLength(3);
  await store.close();
});

test.skipIf(skip(cannotRunPostgres))(
  "weft import: a tailnet of Weft goes from SQLite to PostgreSQL and back, whole",
  async () => {
    await using server = await PostgresServer.start();
    using dir = tempDir("import");
    const file = (name: string) => join(dir.path, name);
    const { host, database, user } = await server.database();
    const postgres = `database: {type: postgres, postgres: {host: ${host}, name: ${database}, user: ${user}}}`;
    for (const [name, more] of [
      ["a", ""],
      ["b", postgres],
      ["c", ""],
    ])
      writeFileSync(file(`${name}.yaml`), `server_url: https://weft.example.com\ndata_dir: ${name}\n${more}\n`);
    const first = await TestServer.start({ dataDir: file("a") });
    const key = await first.key({ user: String(await first.user("alice")), reusable: true });
    const node = await first.join("web", key);
    await first.admin("POST", "/node/1/rename/front");
    await first.admin("POST", "/apikey", {});
    await expect(main([file("a.yaml"), "-c", file("b.yaml")])).rejects.toThrow("a server has it open: stop it first");
    await first.stop();
    const dump = async (path: string) => {
      const store = await Store.open({ type: "sqlite", path });
      const all = await store.load();
      await store.close();
      return all;
    };
    const before = await dump(file("a/weft.sqlite"));
    const log = console.log;
    console.log = () => {};
    try {
      await main([file("a/weft.sqlite"), "-c", file("b.yaml")]);
      await main([file("b.yaml"), "-c", file("c.yaml")]);
    } finally {
      console.log = log;
    }
    expect(await dump(file("c/weft.sqlite"))).toEqual(before);
    expect(before.nodes).toMatchObject([{ givenName: "front", nodeKey: node.nodeKey }]);
    const keyFile = (name: string) => readFileSync(file(`${name}/noise_private.key`), "utf8");
    expect([keyFile("b"), keyFile("c")]).toEqual([keyFile("a"), keyFile("a")]);

    const other = new Database(file("other.sqlite"));
    other.run("create table notes (text text)");
    other.close();
    await expect(main([file("other.sqlite"), "-c", file("b.yaml")])).rejects.toThrow(
      "neither of Headscale nor of Weft",
    );
    const untouched = new Database(file("other.sqlite"), { readonly: true });
    expect(untouched.query("select name from sqlite_master").all()).toEqual([{ name: "notes" }]);
    untouched.close();
  },
);

const absent = missing([["headscale"], ["derper", "1.102.5"], ["tailscaled", "1.102.5"]]);
const run = resolve(import.meta.dir, "../tools/run.ts");

describe.skipIf(skip(cannotUseNamespaces, absent))("A tailnet moves from an official headscale 0.28", () => {
  const dir = tempDir("import");
  let lab: Lab;
  let headscale: Headscale;
  const clients: Tailscaled[] = [];
  let key = "";
  let apiKey = "";

  beforeAll(async () => {
    lab = await Lab.create("import");
    const derp = await lab.host("derp");
    const { ca } = await startDerper(derp, dir.path);
    headscale = await Headscale.start(await lab.host("hs"), dir.path, derp);
    const policy =
      '{ "tagOwners": { "tag:web": ["lab@"] }, "acls": [{ "action": "accept", "src": ["*"], "dst": ["*:*"] }] }';
    await Bun.write(join(dir.path, "policy.hujson"), policy);
    await headscale.cli("policy", "set", "-f", join(dir.path, "policy.hujson"));
    key = await headscale.key();
    apiKey = (await headscale.cli("apikeys", "create")).trim();
    for (const name of ["ta", "tb", "late"])
      clients.push(new Tailscaled(await lab.host(name), join(dir.path, name), "1.102.5", { SSL_CERT_FILE: ca }));
    const [ta, tb] = clients as [Tailscaled, Tailscaled];
    await ta.up(headscale.url, key);
    await tb.up(headscale.url, key);
    await headscale.cli("nodes", "rename", "-i", "1", "first");
    await headscale.cli("nodes", "tag", "-i", "2", "-t", "tag:web");
  }, 300_000);

  afterAll(async () => {
    await lab?.close();
    dir[Symbol.dispose]();
  });

  test("its nodes go on without a login, and its pre-auth keys and API keys work", async () => {
    const [ta, tb, late] = clients as [Tailscaled, Tailscaled, Tailscaled];
    const { host } = headscale;
    const data = join(dir.path, "weft");
    const take = () => host.run([process.execPath, run, "weft", "import", headscale.config, "--data", data]);
    const early = await take();
    expect([early.code, early.stderr]).toEqual([1, expect.stringContaining("a server has it open: stop it first")]);
    const before = JSON.parse(await headscale.cli("nodes", "list", "-o", "json")) as { node_key: string }[];
    await headscale.stop();
    const { code, stdout, stderr } = await take();
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toContain("1 users, 2 nodes, 1 pre-auth keys, 1 API keys and the policy are in");

    const args = ["--policy-mode", "database", "--base-domain", "lab.internal"];
    const box = await Box.start(host, data, { args });
    expect(box.url).toBe(headscale.url);
    // They come back by themselves, on trust in the same Noise key.
    const nodes = await until("both nodes are back", async () => {
      const all = await box.admin<ApiNode[]>("nodes", "list");
      return all.every(({ online }) => online) ? all : null;
    });
    for (const client of [ta, tb]) expect((await client.status())?.BackendState).toBe("Running");
    await answers(ta.host, tb.ip4);
    expect(nodes.map(({ id, givenName, tags, user }) => [id, givenName, tags, user.name])).toEqual([
      ["1", "first", [], "lab"],
      ["2", "tb", ["tag:web"], "tagged-devices"],
    ]);
    expect(nodes.map(({ nodeKey }) => nodeKey)).toEqual(before.map(({ node_key }) => node_key));
    expect(nodes.map(({ ipAddresses }) => ipAddresses)).toEqual([
      [ta.ip4, ta.ip6],
      [tb.ip4, tb.ip6],
    ]);

    await late.up(headscale.url, key);
    expect([ta.ip4, tb.ip4]).not.toContain(late.ip4);
    const remote = ["--address", headscale.url, "--api-key", apiKey, "users", "list", "-o", "json-line"];
    const listed = await host.run([process.execPath, run, "weft", ...remote]);
    expect([listed.code, listed.stdout]).toEqual([0, expect.stringContaining('"name":"lab"')]);
  }, 300_000);
});
