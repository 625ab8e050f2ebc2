// kill -9 at any moment loses nothing that was acknowledged, and leaves no half change: a control server under load by
// administrators and by nodes that register is killed, started again on what it has left, and asked for everything.
import { describe, expect, test } from "bun:test";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join, resolve } from "node:path";
import { text } from "node:stream/consumers";
import type { ApiNode, ApiPreAuthKey, ApiUser } from "../src/control/api/shapes.ts";
import type { StoreSettings } from "../src/control/store.ts";
import { TestNode } from "../src/control/testing.ts";
import { skip, tempDir, until } from "./lib/mesh.ts";
import { cannotRunPostgres, PostgresServer } from "./lib/postgres.ts";

const CHILD = resolve(import.meta.dir, "lib/control-child.ts");
const ADMINISTRATORS = 4;

/** A server in a process of its own. */
class Server {
  private constructor(
    private readonly child: Bun.Subprocess<"pipe", "pipe", "inherit">,
    readonly socket: string,
    readonly url: string,
  ) {}

  static async start(dataDir: string, store: unknown): Promise<Server> {
    const child = Bun.spawn([process.execPath, CHILD, dataDir, JSON.stringify(store)], {
      stdin: "pipe",
      stdout: "pipe",
      stderr: "inherit",
    });
    const { value } = await child.stdout.getReader().read();
    if (!value) throw new Error(`the server did not start: exit status ${await child.exited}`);
    const port = new TextDecoder().decode(value).trim();
    return new Server(child, join(dataDir, "weft.sock"), `http://127.0.0.1:${port}`);
  }

  async admin<T>(method: string, path: string, body?: unknown): Promise<T> {
    const init = { method, unix: this.socket, ...(body !== undefined && { body: JSON.stringify(body) }) };
    const response = await fetch(`http://weft${path.startsWith("/api/") ? path : `/api/v1${path}`}`, init);
    if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`);
    return (await response.json()) as T;
  }

  async kill(): Promise<void> {
    this.child.kill("SIGKILL");
    await this.child.exited;
  }
}

/** What was acknowledged: name to what the answer said. */
class Acknowledged {
  readonly users = new Map<string, ApiUser>();
  readonly keys = new Map<string, ApiPreAuthKey>();
  /** Node key to the id of the pre-auth key that it was let in with. */
  readonly registered = new Map<string, string>();
  private names = 0;

  get count(): number {
    return this.users.size + this.keys.size + this.registered.size;
  }

  /** As of now. */
  copy(): Acknowledged {
    const copy = new Acknowledged();
    for (const part of ["users", "keys", "registered"] as const)
      for (const [key, value] of this[part]) copy[part].set(key, value as never);
    return copy;
  }

  /** One administrator, and the nodes that he lets in, until the server is gone. */
  async work(server: Server, times = Number.POSITIVE_INFINITY): Promise<void> {
    for (let i = 0; i < times; i++) {
      const name = `user-${++this.names}`;
      const { user } = await server.admin<{ user: ApiUser }>("POST", "/user", { name });
      this.users.set(name, user);
      const { preAuthKey } = await server.admin<{ preAuthKey: ApiPreAuthKey }>("POST", "/preauthkey", {
        user: user.id,
      });
      this.keys.set(preAuthKey.id, preAuthKey);
      const node = new TestNode(server.url, `host-${this.names}`);
      try {
        const answer = await node.register({ authKey: preAuthKey.key });
        if (answer.MachineAuthorized) this.registered.set(node.nodeKey, preAuthKey.id);
      } finally {
        node.close();
      }
    }
  }

  /** What a webhook must have told of it. */
  messages(): string[] {
    return [...this.users.keys()].map((name) => `User ${name} was added`);
  }

  /** All of it is there, and what is there beyond it is whole. `reusable`: ids of keys that may have let several nodes in. */
  async check(server: Server, reusable: readonly string[] = []): Promise<void> {
    const { users } = await server.admin<{ users: ApiUser[] }>("GET", "/user");
    const { preAuthKeys } = await server.admin<{ preAuthKeys: ApiPreAuthKey[] }>("GET", "/preauthkey");
    const { nodes } = await server.admin<{ nodes: ApiNode[] }>("GET", "/node");
    expect(users.length).toBeGreaterThanOrEqual(this.users.size);
    const byName = new Map(users.map((user) => [user.name, user]));
    for (const [name, { id }] of this.users) expect([name, byName.get(name)?.id]).toEqual([name, id]);
    const keys = new Map(preAuthKeys.map((key) => [key.id, key]));
    for (const id of this.keys.keys()) expect([id, keys.has(id)]).toEqual([id, true]);
    const byKey = new Map(nodes.map((node) => [node.nodeKey, node]));
    for (const [nodeKey, keyId] of this.registered)
      expect([nodeKey, byKey.get(nodeKey)?.preAuthKey?.id]).toEqual([nodeKey, keyId]);
    // Each key lets one node in: a node without its used key, or the other way round, would be half a change.
    const used = preAuthKeys.filter((key) => key.used).map((key) => key.id);
    const single = (ids: string[]) => ids.filter((id) => !reusable.includes(id)).toSorted();
    expect(single(nodes.map((node) => node.preAuthKey!.id))).toEqual(single(used));
    expect(new Set(nodes.flatMap((node) => node.ipAddresses)).size).toBe(nodes.length * 2);
  }
}

/** Loads the server until `end` is due: in the middle of something that differs from round to round. */
async function loadUntil(server: Server, acknowledged: Acknowledged, round: number, end: () => Promise<void>) {
  const due = acknowledged.count + ((round * 5) % 23);
  const work = Array.from({ length: ADMINISTRATORS }, () => acknowledged.work(server).catch(() => {}));
  await until("the server has worked", () => acknowledged.count >= due, 60, 1);
  await Bun.sleep((round * 37) % 11);
  await end();
  await Promise.all(work);
}

/** Who takes webhooks, but refuses every third request. Not by Bun.serve: servers of other tests have replaced its Response. */
async function hookReceiver() {
  const told = new Set<string>();
  let requests = 0;
  const server = createServer(async (request, response) => {
    const events = JSON.parse(await text(request)) as { message: string }[];
    if (++requests % 3 === 0) response.statusCode = 503;
    else for (const { message } of events) told.add(message);
    response.end();
  });
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://127.0.0.1:${port}/`,
    told,
    [Symbol.dispose]() {
      server.closeAllConnections();
      server.close();
    },
  };
}

async function killRounds(rounds: number, dataDir: string, store: StoreSettings | { type: "sqlite"; path: "" }) {
  const acknowledged = new Acknowledged();
  using hook = await hookReceiver();
  for (let round = 0; round < rounds; round++) {
    const server = await Server.start(dataDir, store);
    if (round === 0)
      await server.admin("POST", "/api/v2/tailnet/-/webhooks", {
        endpointUrl: hook.url,
        subscriptions: ["userCreated"],
      });
    if (round % 10 === 0) await acknowledged.check(server);
    await loadUntil(server, acknowledged, round, () => server.kill());
  }
  const last = await Server.start(dataDir, store);
  await acknowledged.check(last);
  await until("webhooks have told all of it", () => acknowledged.messages().every((message) => hook.told.has(message)));
  await last.kill();
  // Otherwise nothing was shown.
  expect(acknowledged.users.size).toBeGreaterThan(rounds);
  expect(acknowledged.registered.size).toBeGreaterThan(rounds / 2);
}

test("SQLite: killed a hundred times under load, the server has lost nothing that it acknowledged", async () => {
  using folder = tempDir("kill");
  await killRounds(100, folder.path, { type: "sqlite", path: "" });
}, 300_000);

/** A command of `weft` in a process of its own; what it printed. */
async function weft(...argv: string[]): Promise<string> {
  const run = resolve(import.meta.dir, "../tools/run.ts");
  const child = Bun.spawn([process.execPath, run, "weft", ...argv], { stdout: "pipe", stderr: "inherit" });
  const text = await new Response(child.stdout).text();
  expect([argv[0], await child.exited]).toEqual([argv[0], 0]);
  return text;
}

test("SQLite: what is restored from a backup made under load has all that was acknowledged before; its nodes go on", async () => {
  using folder = tempDir("backup");
  const [data, restored, file] = ["data", "restored", "weft.backup"].map((name) => join(folder.path, name)) as [
    string,
    string,
    string,
  ];
  const acknowledged = new Acknowledged();
  let before = acknowledged;
  const server = await Server.start(data, { type: "sqlite", path: "" });
  const { user } = await server.admin<{ user: ApiUser }>("POST", "/user", { name: "owner" });
  const key = { user: user.id, reusable: true };
  const { preAuthKey } = await server.admin<{ preAuthKey: ApiPreAuthKey }>("POST", "/preauthkey", key);
  const [web, db] = [new TestNode(server.url, "web"), new TestNode(server.url, "db")];
  for (const node of [web, db]) await node.register({ authKey: preAuthKey.key });
  await loadUntil(server, acknowledged, 20, async () => {
    before = acknowledged.copy();
    expect(await weft("backup", file, "--socket", server.socket)).toContain("the database, noise_private.key");
    const count = acknowledged.count;
    await until("the server works on", () => acknowledged.count > count, 60, 1);
    await server.kill();
  });
  for (const node of [web, db]) node.close();
  expect(before.count).toBeGreaterThan(0);
  await weft("restore", file, "--data", restored);
  const again = await Server.start(restored, { type: "sqlite", path: "" });
  await before.check(again, [preAuthKey.id]);
  const client = new TestNode(again.url, "web", web.machinePrivate);
  client.nodeKey = web.nodeKey;
  expect((await client.stream()).peer("db")?.Key).toBe(db.nodeKey);
  client.close();
  await again.kill();
}, 300_000);

describe.skipIf(skip(cannotRunPostgres))("PostgreSQL", () => {
  test("killed under load, the server has lost nothing that it acknowledged", async () => {
    await using postgres = await PostgresServer.start();
    using folder = tempDir("kill");
    await killRounds(10, folder.path, await postgres.database());
  }, 300_000);

  test("when the database server crashes under load, nothing acknowledged is lost either", async () => {
    await using postgres = await PostgresServer.start();
    using folder = tempDir("kill");
    const acknowledged = new Acknowledged();
    const server = await Server.start(folder.path, await postgres.database());
    for (let round = 0; round < 5; round++) {
      await loadUntil(server, acknowledged, round, () => postgres.kill());
      await postgres.run();
      await acknowledged.work(server, 3);
      await acknowledged.check(server);
    }
    await server.kill();
    expect(acknowledged.registered.size).toBeGreaterThan(5);
  }, 300_000);
});
