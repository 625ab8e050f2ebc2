// What becomes of a machine that registers again: spec/headscale-features.md, section 7.5, row by row, and section 22.3.
import { expect, test } from "bun:test";
import { once } from "node:events";
import { loginIdOf } from "./login.ts";
import { makeSettings, type RegisterOptions, type TestNode, TestServer, until, WebSocketNode } from "./testing.ts";

const LOGOUT = "1970-01-01T00:02:03Z";
const START = Date.parse("2030-01-01T00:00:00Z");
const HOUR = 3_600_000;
const DAY = 24 * HOUR;

/** A clock that tests turn, and a server by it, with 30 days for node keys. */
async function withClock(more: { needsApproval?: boolean; log?: (line: string) => void } = {}) {
  const clock = { now: START };
  const settings = makeSettings();
  settings.node.expiry = 30 * DAY;
  settings.node.needsApproval = more.needsApproval ?? false;
  const server = await TestServer.start({ settings, now: () => clock.now, ...(more.log && { log: more.log }) });
  const key = (options: Record<string, unknown>) =>
    server.key({ reusable: true, expiration: new Date(START + 400 * DAY).toISOString(), ...options });
  return { clock, server, key, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

async function login(server: TestServer, node: TestNode, user: number, options: RegisterOptions = {}) {
  const url = (await node.register(options)).AuthURL!;
  await server.control.logins.complete(loginIdOf(url)!, user, "cli");
  return node.register({ ...options, followup: url });
}

/** A request to /api/v2 on the admin socket. */
async function v2<T>(server: TestServer, path: string, body: unknown): Promise<T> {
  const response = await fetch(`http://weft/api/v2${path}`, {
    method: "POST",
    unix: server.control.adminSocket,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  expect(response.status).toBe(200);
  return (await response.json()) as T;
}

const idOf = async (node: TestNode) => (await node.stream()).self!.ID;
const expiryOf = async (node: TestNode) => Date.parse((await node.stream()).self?.KeyExpiry ?? "never");

test("logout: an expiry in the past is now, never the year that the client wrote; the answer is that the key has expired", async () => {
  await using t = await withClock();
  const node = await t.server.join("a", await t.key({ user: await t.server.user("alice") }));
  expect(await node.register({ expiry: LOGOUT })).toMatchObject({ NodeKeyExpired: true });
  const { nodes } = await t.server.admin<{ nodes: { expiry: string }[] }>("GET", "/node");
  expect(Date.parse(nodes[0]!.expiry)).toBe(START);
  // With a key at hand as well: logging out comes first.
  const other = await t.server.join("b", await t.key({ user: 1 }));
  const authKey = await t.key({ user: 1 });
  expect(await other.register({ expiry: LOGOUT, authKey })).toMatchObject({ NodeKeyExpired: true });
});

test("an expiry that comes later than the present one is refused with 400, and nothing changes", async () => {
  await using t = await withClock();
  const node = await t.server.join("a", await t.key({ user: await t.server.user("alice") }));
  expect(node.register({ expiry: new Date(START + 31 * DAY).toISOString() })).rejects.toThrow("400: the expiry of a");
  expect(await expiryOf(node)).toBe(START + 30 * DAY);
  expect(await node.register({ expiry: new Date(START + DAY).toISOString() })).toMatchObject({ Error: "" });
  expect(await expiryOf(node)).toBe(START + DAY);
});

test("a restart changes nothing: no key, no login, the zero time is no expiry, and time does not put it off", async () => {
  await using t = await withClock();
  const node = await t.server.join("a", await t.key({ user: await t.server.user("alice") }));
  t.clock.now += 5 * DAY;
  expect(await node.register()).toMatchObject({ Error: "", AuthURL: "", MachineAuthorized: true });
  expect(await expiryOf(node)).toBe(START + 30 * DAY);
});

test("TestAuthKeyDeleteKey, a container that restarts (#2830): a key that is used, expired, revoked or gone locks nobody out", async () => {
  await using t = await withClock();
  const user = await t.server.user("alice");
  const single = await t.key({ user, reusable: false });
  const node = await t.server.join("a", single);
  expect((await t.server.node("b").register({ authKey: single })).Error).toContain("has been used");
  expect(await node.register({ authKey: single })).toMatchObject({ Error: "", MachineAuthorized: true });
  await t.server.admin("POST", "/preauthkey/expire", { id: 1 });
  expect(await node.register({ authKey: single })).toMatchObject({ Error: "", MachineAuthorized: true });
  await t.server.admin("DELETE", "/preauthkey?id=1");
  expect(await node.register({ authKey: single })).toMatchObject({ Error: "", MachineAuthorized: true });
  expect(await idOf(node)).toBe(1);
});

test("an expired node without a key gets an address to sign in at, also under its old node key, and comes back to itself", async () => {
  await using t = await withClock();
  const alice = await t.server.user("alice");
  const node = await t.server.join("a", await t.key({ user: alice }));
  t.clock.now += 30 * DAY;
  await t.server.control.tick();
  expect(await login(t.server, node, alice)).toMatchObject({ Error: "", MachineAuthorized: true });
  expect([await idOf(node), await expiryOf(node)]).toEqual([1, START + 60 * DAY]);
});

test("an expired node whose old key somebody else signs in with is left alone, and the newcomer has a node of his own", async () => {
  await using t = await withClock();
  const [alice, bob] = [await t.server.user("alice"), await t.server.user("bob")];
  const node = await t.server.join("a", await t.key({ user: alice }));
  t.clock.now += 30 * DAY;
  expect(await login(t.server, node, bob)).toMatchObject({ Error: "", User: { ID: bob } });
  expect(await idOf(node)).toBe(2);
  const { nodes } = await t.server.admin<{ nodes: { nodeKey: string }[] }>("GET", "/node");
  expect(nodes.map(({ nodeKey }) => nodeKey === node.nodeKey)).toEqual([false, true]);
});

test("TestAuthKeyLogoutAndReloginSameUserExpiredKey: an expired key is no way back, a new one is, and routes are kept (#2896)", async () => {
  await using t = await withClock();
  const user = await t.server.user("alice");
  const authKey = await t.key({ user });
  const node = await t.server.join("a", authKey);
  await node.lite({ Hostinfo: { Hostname: "a", RoutableIPs: ["10.1.0.0/16"] } });
  await t.server.admin("POST", "/node/1/approve_routes", { routes: ["10.1.0.0/16"] });
  await node.register({ expiry: LOGOUT });
  node.rotate();
  await t.server.admin("POST", "/preauthkey/expire", { id: 1 });
  expect((await node.register({ authKey })).Error).toMatch(/expired|revoked/);
  expect(await node.register({ authKey: await t.key({ user }) })).toMatchObject({ Error: "" });
  expect(await idOf(node)).toBe(1);
  const { nodes } = await t.server.admin<{ nodes: { approvedRoutes: string[] }[] }>("GET", "/node");
  expect(nodes[0]!.approvedRoutes).toEqual(["10.1.0.0/16"]);
});

test("TestAuthKeyLogoutAndReloginNewUser: a node for each user, and each comes back to the own one", async () => {
  const lines: string[] = [];
  await using t = await withClock({ log: (line) => lines.push(line) });
  const keys = [await t.key({ user: await t.server.user("alice") }), await t.key({ user: await t.server.user("bob") })];
  const node = t.server.node("a");
  const ids: number[] = [];
  for (const authKey of [keys[0]!, keys[1]!, keys[0]!, keys[1]!]) {
    expect(await node.register({ authKey })).toMatchObject({ Error: "", MachineAuthorized: true });
    ids.push((await idOf(node))!);
    await node.register({ expiry: LOGOUT });
    node.rotate();
  }
  expect(ids).toEqual([1, 2, 1, 2]);
  expect(lines.filter((line) => line.includes("joins once more, with another owner than its node 1"))).toHaveLength(1);
});

test("a node key of another machine is refused and logged, and those who try on and on have to wait; a right key from the same address does not", async () => {
  const lines: string[] = [];
  await using t = await withClock({ log: (line) => lines.push(line) });
  const authKey = await t.key({ user: await t.server.user("alice") });
  const node = await t.server.join("a", authKey);
  const thief = t.server.node("thief");
  const made = `hskey-auth-${"0".repeat(12)}-${"0".repeat(64)}`;
  thief.nodeKey = node.nodeKey;
  expect((await thief.register({ authKey })).Error).toContain("belongs to another machine");
  expect(lines.join("\n")).toContain("presented the node key of node 1");
  thief.rotate();
  for (let i = 0; i < 5; i++) expect((await thief.register({ authKey: made })).Error).toContain("does not know");
  expect(thief.register({ authKey: made })).rejects.toThrow("429: too many wrong pre-auth keys");
  const socket = await WebSocketNode.connect(t.server);
  const stream = socket.open("/machine/register", { Version: 138, NodeKey: thief.nodeKey, Auth: { AuthKey: made } });
  const [headers] = (await once(stream, "response")) as [Record<string, string>];
  expect(headers).toMatchObject({ ":status": 429, "retry-after": "1" });
  socket.close();
  expect(lines.join("\n")).toContain("wrong attempts at the pre-auth key");
  // Whoever is in stays in.
  expect(await node.register({ authKey })).toMatchObject({ Error: "" });
  expect(await thief.register({ authKey })).toMatchObject({ Error: "" });
  expect(lines.filter((line) => line.includes("presented a pre-auth key that never was"))).toHaveLength(5);
});

test("a login that began while a node key was nobody's cannot take it from the machine that has it since", async () => {
  await using t = await withClock();
  const user = await t.server.user("alice");
  const authKey = await t.key({ user });
  const node = await t.server.join("a", authKey);
  await t.server.admin("DELETE", "/node/1");
  const thief = t.server.node("thief");
  thief.nodeKey = node.nodeKey;
  const url = (await thief.register()).AuthURL!;
  expect(await node.register({ authKey })).toMatchObject({ Error: "" });
  const id = await idOf(node);
  await expect(t.server.control.logins.complete(loginIdOf(url)!, user, "cli")).rejects.toThrow("another machine");
  expect((await thief.register({ followup: url })).Error).toContain("belongs to another machine");
  expect(await idOf(node)).toBe(id);
  expect(t.server.control.stats().nodes).toBe(1);
});

test("keys: the server's expiry is the most that a client gets; tagged nodes have none", async () => {
  await using t = await withClock();
  const user = await t.server.user("alice");
  const authKey = await t.key({ user });
  const ask = async (days: number | null, key = authKey) => {
    const node = t.server.node("a");
    await node.register({ authKey: key, ...(days !== null && { expiry: new Date(START + days * DAY).toISOString() }) });
    return expiryOf(node);
  };
  expect(await ask(null)).toBe(START + 30 * DAY);
  expect(await ask(7)).toBe(START + 7 * DAY);
  expect(await ask(300)).toBe(START + 30 * DAY);
  expect(await ask(7, await t.key({ user, aclTags: ["tag:web"] }))).toBeNaN();
});

test("a machine that registers many times at once, by key and by login, is one node", async () => {
  await using t = await withClock();
  const alice = await t.server.user("alice");
  const authKey = await t.key({ user: alice, reusable: false });
  const node = t.server.node("a");
  const url = (await node.register()).AuthURL!;
  const waiting = node.register({ followup: url });
  const [byLogin, ...byKey] = await Promise.all([
    t.server.control.logins.complete(loginIdOf(url)!, alice, "cli"),
    ...[1, 2, 3].map(() => node.register({ authKey })),
  ]);
  expect([byLogin.id, ...byKey.map((answer) => answer.Error)]).toEqual([1, "", "", ""]);
  expect(await waiting).toMatchObject({ Error: "" });
  expect(t.server.control.stats().nodes).toBe(1);
});

test("approval of machines: a new node waits, sees nobody, is seen by nobody, and the relay does not know it, until it is let in", async () => {
  const lines: string[] = [];
  await using t = await withClock({ needsApproval: true, log: (line) => lines.push(line) });
  const user = await t.server.user("alice");
  const create = { reusable: false, preauthorized: true, tags: ["tag:server"] };
  const { key: preapproved } = await v2<{ key: string }>(t.server, "/tailnet/-/keys", {
    capabilities: { devices: { create } },
  });
  const trusted = await t.server.join("trusted", preapproved);
  const map = await trusted.stream();
  const node = t.server.node("a");
  expect(await node.register({ authKey: await t.key({ user }) })).toMatchObject({
    Error: "",
    MachineAuthorized: false,
  });
  const waiting = await node.stream();
  expect(waiting.self).toMatchObject({ MachineAuthorized: false });
  expect(waiting.self?.Expired).toBeUndefined();
  expect([...waiting.peers.keys(), ...map.peers.keys()]).toEqual([]);
  const admits = () => t.server.control.verifyNode(Buffer.from(node.nodeKey.slice("nodekey:".length), "hex"));
  expect(admits()).toBe(false);
  expect(lines.join("\n")).toContain("node 2 (a) waits for an administrator");

  const authorize = (authorized: boolean) => v2(t.server, "/device/2/authorized", { authorized });
  await authorize(true);
  await until(
    () => waiting.self?.MachineAuthorized && waiting.peer("trusted") && map.peer("a"),
    "both to see each other",
  );
  expect(admits()).toBe(true);
  // A new login keeps the approval; and it can be taken back.
  await node.register({ expiry: LOGOUT });
  node.rotate();
  expect(await node.register({ authKey: await t.key({ user }) })).toMatchObject({ MachineAuthorized: true });
  await authorize(false);
  await until(() => !map.peer("a"), "the peer to be gone");
  // An administrator who lets a machine in by hand has approved it.
  const byHand = t.server.node("b");
  expect(await login(t.server, byHand, user)).toMatchObject({ MachineAuthorized: true });
});
