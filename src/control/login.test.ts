import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { loginIdOf } from "./login.ts";
import { makeSettings, type TestNode, TestServer, until } from "./testing.ts";

const URL_FORM = /^http:\/\/control\.test\/register\/(hskey-authreq-[0-9a-f]{24})$/;

/** A machine that has been told where to sign in. */
async function startLogin(node: TestNode): Promise<{ url: string; id: string }> {
  const url = (await node.register()).AuthURL ?? "";
  expect(url).toMatch(URL_FORM);
  return { url, id: loginIdOf(url)! };
}

const isWaiting = (server: TestServer, count: number) =>
  until(() => server.control.stats().streams === count, `${count} open requests`);

test("a machine without a key is told where to sign in, and waits until somebody has done so", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  const laptop = server.node("laptop");
  const { url, id } = await startLogin(laptop);
  const answer = laptop.register({ followup: url });
  await isWaiting(server, 1);
  expect(server.control.stats().nodes).toBe(0);
  const node = await server.control.logins.complete(id, alice, "cli");
  expect(await answer).toMatchObject({
    AuthURL: "",
    Error: "",
    MachineAuthorized: true,
    Login: { LoginName: "alice" },
  });
  expect(node).toMatchObject({ userId: alice, nodeKey: laptop.nodeKey, registerMethod: "cli", givenName: "laptop" });
  expect((await laptop.stream()).self).toMatchObject({ ID: node.id, User: alice, MachineAuthorized: true });
  // Once is enough, and nothing is left that waits.
  expect(server.control.logins.complete(id, alice, "cli")).rejects.toThrow("approved already");
  expect(server.control.logins.list()).toEqual([]);
});

test("a verdict that comes before the question is the answer to it", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  const [a, b] = [server.node("a"), server.node("b")];
  const [first, second] = [await startLogin(a), await startLogin(b)];
  await server.control.logins.complete(first.id, alice, "cli");
  await server.control.logins.reject(second.id);
  expect(await a.register({ followup: first.url })).toMatchObject({ AuthURL: "", Error: "", MachineAuthorized: true });
  expect((await b.register({ followup: second.url })).Error).toContain("refused this login");
  const again = await b.register({ followup: second.url });
  expect(again.Error ?? "").toBe("");
  expect(again.AuthURL).toMatch(URL_FORM);
  expect(again.AuthURL).not.toBe(second.url);
  expect(server.control.stats().nodes).toBe(1);
});

test("a login that is refused while the machine waits ends its waiting with the reason", async () => {
  await using server = await TestServer.start();
  const node = server.node("a");
  const { url, id } = await startLogin(node);
  const answer = node.register({ followup: url });
  await isWaiting(server, 1);
  await server.control.logins.reject(id, "not this one");
  expect((await answer).Error).toBe("not this one");
});

test("who asks for a login that never was, or is another machine's, gets one of his own", async () => {
  await using server = await TestServer.start();
  const [a, thief] = [server.node("a"), server.node("thief")];
  const { url, id } = await startLogin(a);
  const unknown = `http://control.test/register/hskey-authreq-${"0".repeat(24)}`;
  for (const followup of [unknown, "nonsense", url]) {
    const { AuthURL, Error: problem } = await thief.register({ followup });
    expect(problem ?? "").toBe("");
    expect(AuthURL).toMatch(URL_FORM);
    expect(AuthURL).not.toBe(url);
  }
  await server.control.logins.complete(id, await server.user("alice"), "cli");
  expect((await thief.register({ followup: url })).AuthURL).toMatch(URL_FORM);
  expect(server.control.stats().nodes).toBe(1);
});

test("logins are bounded: the one that has to go leaves its waiting client with a new address", async () => {
  const settings = makeSettings({ login: { expiry: 60_000, maxPending: 2 } });
  await using server = await TestServer.start({ settings });
  const [a, b, c] = [server.node("a"), server.node("b"), server.node("c")];
  const first = await startLogin(a);
  const waiting = a.register({ followup: first.url });
  await isWaiting(server, 1);
  const second = await startLogin(b);
  // b does not wait: it goes first.
  const third = await startLogin(c);
  expect(server.control.logins.get(second.id)).toBeNull();
  const alsoWaiting = c.register({ followup: third.url });
  await isWaiting(server, 2);
  await startLogin(b);
  const { AuthURL } = await waiting;
  expect(AuthURL).toMatch(URL_FORM);
  expect(AuthURL).not.toBe(first.url);
  expect(server.control.logins.list()).toHaveLength(2);
  c.close();
  await alsoWaiting.catch(() => {});
});

test("one machine that asks again and again keeps eight logins, and pushes nobody else out", async () => {
  await using server = await TestServer.start();
  const other = await startLogin(server.node("other"));
  const node = server.node("a");
  const urls: string[] = [];
  for (let i = 0; i < 12; i++) urls.push((await startLogin(node)).url);
  expect(new Set(urls).size).toBe(12);
  expect(server.control.logins.list()).toHaveLength(9);
  expect(server.control.logins.get(other.id)).not.toBeNull();
});

test("a flood of machines that want in pushes out nobody who waits, stays bounded, and the rest goes on", async () => {
  const settings = makeSettings({ login: { expiry: 60_000, maxPending: 50 } });
  await using server = await TestServer.start({ settings });
  const alice = await server.user("alice");
  const member = await server.join("member", await server.key({ user: alice }));
  const map = await member.stream();
  const honest = server.node("honest");
  const { url, id } = await startLogin(honest);
  const waiting = honest.register({ followup: url });
  await isWaiting(server, 2);
  const flood = Array.from({ length: 10 }, async (_, i) => {
    const node = server.node(`flood-${i}`);
    for (let n = 0; n < 30; n++) {
      node.rotate();
      await startLogin(node);
    }
  });
  expect((await member.lite({ Endpoints: ["192.0.2.1:1"] })).status).toBe(200);
  await Promise.all(flood);
  expect(server.control.logins.list()).toHaveLength(50);
  await server.control.logins.complete(id, alice, "cli");
  expect(await waiting).toMatchObject({ Error: "", AuthURL: "" });
  await until(() => map.peer("honest"), "the new peer");
});

test("a login expires: its client gets a new address, and nobody can complete it", async () => {
  let now = Date.parse("2030-01-01T00:00:00Z");
  await using server = await TestServer.start({ now: () => now });
  const alice = await server.user("alice");
  const node = server.node("a");
  const { url, id } = await startLogin(node);
  const waiting = node.register({ followup: url });
  await isWaiting(server, 1);
  now += 15 * 60_000;
  expect(server.control.logins.complete(id, alice, "cli")).rejects.toThrow("has expired");
  await server.control.tick();
  const { AuthURL } = await waiting;
  expect(AuthURL).toMatch(URL_FORM);
  expect(AuthURL).not.toBe(url);
});

test("a client that goes away does not take its login with it", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  const node = server.node("a");
  const { url, id } = await startLogin(node);
  const gone = node.register({ followup: url }).catch(() => null);
  await isWaiting(server, 1);
  node.client.close();
  await gone;
  await isWaiting(server, 0);
  await server.control.logins.complete(id, alice, "cli");
  expect(server.control.stats().nodes).toBe(1);
});

test("of two logins that one machine started either will do, and the other is over with it", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  const node = server.node("a");
  const first = await startLogin(node);
  const second = await startLogin(node);
  const waiting = node.register({ followup: second.url });
  await isWaiting(server, 1);
  await server.control.logins.complete(first.id, alice, "cli");
  expect(await waiting).toMatchObject({ Error: "", AuthURL: "", MachineAuthorized: true });
  expect(server.control.logins.list()).toEqual([]);
});

test("a restart of the server ends no login", async () => {
  const dataDir = mkdtempSync(join(tmpdir(), "weft-login-"));
  try {
    const before = await TestServer.start({ dataDir });
    const alice = await before.user("alice");
    const node = before.node("a");
    const { url, id } = await startLogin(node);
    await before.stop();
    await using after = await TestServer.start({ dataDir });
    const again = after.node("a", node.machinePrivate);
    again.nodeKey = node.nodeKey;
    const waiting = again.register({ followup: url });
    await isWaiting(after, 1);
    await after.control.logins.complete(id, alice, "cli");
    expect(await waiting).toMatchObject({ Error: "", MachineAuthorized: true });
  } finally {
    rmSync(dataDir, { recursive: true, force: true });
  }
});

test("SSH sessions wait in the same way: approved with what that changes, and never taken for a machine", async () => {
  await using server = await TestServer.start();
  const { logins } = server.control;
  const request = { kind: "ssh-check", sourceNodeId: 1, targetNodeId: 2, localUser: "root" } as const;
  const approved: unknown[] = [];
  logins.onCheckApproved = (check, userId) => {
    approved.push([check, userId]);
    return {};
  };
  const { id, url } = await logins.start(request);
  expect(url).toBe(`http://control.test/auth/${id}`);
  expect(logins.complete(id, await server.user("alice"), "cli")).rejects.toThrow("is an SSH session");
  const waiting = logins.wait(id, new AbortController().signal);
  await logins.approve(id, 1);
  expect(await waiting).toEqual({ approved: true, userId: 1 });
  expect(approved).toEqual([[request, 1]]);
  const machine = await startLogin(server.node("a"));
  expect(logins.approve(machine.id)).rejects.toThrow("weft auth register");
});
