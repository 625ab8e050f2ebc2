import { Database } from "bun:sqlite";
import { expect, test } from "bun:test";
import { createHmac } from "node:crypto";
import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { client } from "./api/testing.ts";
import { Journal } from "./journal.ts";
import { Model } from "./model.ts";
import { makeNode, makeSettings, makeUser, TestServer, until } from "./testing.ts";
import { surplusOf, type WebhookEvent } from "./webhooks.ts";

const T = "/api/v2/tailnet/-";
const settings = makeSettings({ policy: { mode: "database", path: "" } });

interface Posted {
  body: string;
  signature: string;
}

/** Somebody who takes webhooks, or answers what it is told to. */
async function receiver() {
  const posted: Posted[] = [];
  const answers: number[] = [];
  const server = createServer(async (request, response) => {
    const body = Buffer.concat(await request.toArray()).toString();
    posted.push({ body, signature: String(request.headers["tailscale-webhook-signature"] ?? "") });
    response.writeHead(answers.shift() ?? 200).end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const events = () =>
    posted.flatMap(({ body }) => JSON.parse(body) as { type: string; message: string; data: object }[]);
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/hook`,
    posted,
    answers,
    events,
    types: () => events().map(({ type }) => type),
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Numbers of the events that a server which has ended has left. */
function rowsOf(dataDir: string): number[] {
  using database = new Database(join(dataDir, "weft.sqlite"));
  const rows = database.query("SELECT id FROM documents WHERE kind = 'webhookevent'").all() as { id: string }[];
  return rows.map(({ id }) => Number(id)).sort((a, b) => a - b);
}

async function start(options: Parameters<typeof TestServer.start>[0] = {}) {
  const server = await TestServer.start({ settings, ...options });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", { expiration: null });
  const api = client(server, apiKey);
  const hook = async (endpointUrl: string, subscriptions: string[], providerType?: string) =>
    (await api("POST", `${T}/webhooks`, { endpointUrl, subscriptions, providerType })).body as {
      endpointId: string;
      secret: string;
    };
  return { server, api, hook, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

test("who subscribed hears of nodes, users and the policy, signed with the secret that only the first answer has", async () => {
  await using to = await receiver();
  await using s = await start();
  const { endpointId, secret } = await s.hook(to.url, ["categoryTailnetManagement"]);
  expect(secret).toMatch(new RegExp(`^hskey-webhook-${endpointId}-[0-9a-f]{64}$`));
  expect((await s.api("GET", `/api/v2/webhooks/${endpointId}`)).text).not.toContain(secret);
  const user = await s.server.user("alice");
  await s.server.join("web", await s.server.key({ user }));
  await s.server.admin("PUT", "/policy", { policy: '{"acls": []}' });
  await s.api("PATCH", `${T}/settings`, { devicesApprovalOn: true });
  await s.server.node("late").register({ authKey: await s.server.key({ user }) });
  await s.api("POST", "/api/v2/device/2/authorized", { authorized: true });
  await s.api("POST", "/api/v2/users/1/role", { role: "admin" });
  for (const verb of ["suspend", "restore"]) await s.api("POST", `/api/v2/users/1/${verb}`);
  await s.server.admin("POST", "/node/1/expire", { expiry: new Date().toISOString() });
  await s.server.control.tick();
  await s.server.admin("DELETE", "/node/2");
  const wanted = [
    "userCreated",
    "nodeCreated",
    "policyUpdate",
    "nodeCreated",
    "nodeNeedsApproval",
    "nodeApproved",
    "userRoleUpdated",
    "userSuspended",
    "userRestored",
    "nodeKeyExpired",
    "nodeDeleted",
  ];
  await until(() => to.types().length >= wanted.length, "all events");
  expect(to.types()).toEqual(wanted);
  expect(to.events()[1]).toMatchObject({
    version: 1,
    tailnet: "net.test",
    message: "Node web.net.test was added",
    data: { nodeID: "1", deviceName: "web.net.test", managedBy: "alice" },
  });
  expect(to.events()[2]).toMatchObject({
    data: { oldPolicy: "", newPolicy: '{"acls": []}', actor: "the admin socket" },
  });
  for (const { body, signature } of to.posted) {
    const [, at, v1] = /^t=(\d+),v1=([0-9a-f]{64})$/.exec(signature)!;
    expect(v1).toBe(createHmac("sha256", secret).update(`${at}.${body}`).digest("hex"));
  }
});

test("each hears of what it asked for, chat services in a sentence; after its end nothing", async () => {
  await using nodes = await receiver();
  await using chat = await receiver();
  await using s = await start();
  const { endpointId } = await s.hook(nodes.url, ["nodeCreated"]);
  await s.hook(chat.url, ["userCreated", "userDeleted"], "slack");
  const user = await s.server.user("alice");
  await s.server.join("web", await s.server.key({ user }));
  await s.server.user("bob");
  await s.server.admin("DELETE", "/user/2");
  const said = () => chat.posted.map(({ body }) => (JSON.parse(body) as { text: string }).text).join("\n");
  await until(() => said().split("\n").length >= 3, "the chat");
  await until(() => nodes.posted.length > 0, "the node");
  expect(nodes.types()).toEqual(["nodeCreated"]);
  expect(said()).toBe("User alice was added\nUser bob was added\nUser bob was deleted");
  expect((await s.api("PATCH", `/api/v2/webhooks/${endpointId}`, { subscriptions: ["nodeDeleted"] })).status).toBe(200);
  await s.server.admin("DELETE", "/node/1");
  await until(() => nodes.types().length > 1, "the deletion");
  expect((await s.api("DELETE", `/api/v2/webhooks/${endpointId}`)).status).toBe(200);
  expect((await s.api("POST", `/api/v2/webhooks/${endpointId}/test`)).status).toBe(404);
  expect(
    (await s.api("POST", `${T}/webhooks`, { endpointUrl: "ftp://x", subscriptions: ["nodeCreated"] })).status,
  ).toBe(400);
  expect((await s.api("POST", `${T}/webhooks`, { endpointUrl: nodes.url, subscriptions: ["everything"] })).status).toBe(
    400,
  );
});

test("what was not taken comes again, in order and signed anew; the server does not wait for it", async () => {
  await using to = await receiver();
  to.answers.push(503);
  await using s = await start();
  await s.hook(to.url, ["userCreated"]);
  await s.server.user("alice");
  await until(() => to.posted.length === 1, "the first attempt");
  await s.server.user("bob");
  await until(() => to.posted.length > 1, "the second attempt");
  await until(() => to.events().length >= 3, "all of it");
  expect(to.events().map(({ message }) => message)).toEqual([
    "User alice was added",
    "User alice was added",
    "User bob was added",
  ]);
});

test("what waits for a receiver that is away is bounded, in number and size: the oldest goes first", () => {
  const small = Array.from({ length: 1003 }, () => ({ size: 10 }));
  expect([surplusOf([]), surplusOf(small.slice(0, 1000)), surplusOf(small)]).toEqual([0, 0, 3]);
  const large = Array.from({ length: 10 }, () => ({ size: 1_000_000 }));
  expect([surplusOf(large.slice(0, 8)), surplusOf(large)]).toEqual([0, 2]);
});

test("an event is stored with what it tells: a server that was killed tells it after its next start, and then no more", async () => {
  await using to = await receiver();
  to.answers.push(...Array(50).fill(503));
  const folder = mkdtempSync(join(tmpdir(), "weft-webhooks-"));
  try {
    {
      await using s = await start();
      await s.hook(to.url, ["categoryTailnetManagement"]);
      await s.server.user("alice");
      await s.server.admin("PUT", "/policy", { policy: '{"acls": []}' });
      await s.server.join("web", await s.server.key({ user: 1 }));
      await s.server.admin("POST", "/node/1/expire", { expiry: new Date(Date.now() + 1).toISOString() });
      await Bun.sleep(2);
      await s.server.control.tick();
      await until(() => to.posted.length > 0, "the first attempt");
      await s.server.user("bob");
      // What kill -9 would leave.
      cpSync(s.server.dataDir, folder, { recursive: true, filter: (path) => !path.endsWith(".sock") });
    }
    to.posted.length = 0;
    to.answers.length = 0;
    const wanted = ["userCreated", "policyUpdate", "nodeCreated", "nodeKeyExpired", "userCreated"];
    const next = await TestServer.start({ settings, dataDir: folder });
    await until(() => to.types().length >= wanted.length, "what waited");
    expect(to.types()).toEqual(wanted);
    await next.user("carol");
    await until(() => to.types().length > wanted.length, "the next event");
    await next.stop();
    await using again = await TestServer.start({ settings, dataDir: folder });
    await again.user("dora");
    const said = () => to.events().map(({ message }) => message);
    await until(() => said().includes("User dora was added"), "the last event");
    expect(said().filter((message) => message === "User bob was added")).toHaveLength(1);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});

test("what nobody has taken for a day is dropped, and the log says so; what a change tells goes when it is undone", async () => {
  await using to = await receiver();
  to.answers.push(503);
  let now = Date.parse("2027-01-01T00:00:00Z");
  const log: string[] = [];
  await using s = await start({ now: () => now, log: (line) => log.push(line) });
  const { endpointId } = await s.hook(to.url, ["userCreated"]);
  await s.server.user("alice");
  await until(() => to.posted.length === 1, "the first attempt");
  now += 86_400_000 - 1;
  await s.server.user("bob");
  now += 1;
  await until(() => to.posted.length === 2, "the second attempt");
  expect(to.events().map(({ message }) => message)).toEqual(["User alice was added", "User bob was added"]);
  expect(log).toEqual([
    `webhook ${endpointId}: ${new URL(to.url).host} has taken nothing for a day, 1 event is dropped`,
  ]);

  const model = new Model();
  const refuse = async () => {
    throw new Error("disk full");
  };
  const event = { webhook: "x", event: {} as WebhookEvent };
  const journal = new Journal(model, refuse, {
    companions: ({ nodes }) => (nodes.length > 0 ? [{ kind: "webhookevent", id: "1", value: event }] : []),
    onApplied: () => {},
    onDurable: () => {},
  });
  const change = journal.commit({ users: [makeUser(1)], nodes: [makeNode(1)] });
  expect(model.documents("webhookevent").get("1")).toEqual(event);
  await expect(change).rejects.toThrow("disk full");
  expect([model.documents("webhookevent").size, model.nodes.size]).toEqual([0, 0]);
});

test("events of a receiver that never answers push each other out, and go with it; the log says so once", async () => {
  await using to = await receiver();
  to.answers.push(...Array(50).fill(503));
  const log: string[] = [];
  const folder = mkdtempSync(join(tmpdir(), "weft-webhooks-"));
  try {
    const s = await start({ log: (line) => log.push(line), dataDir: folder });
    const { endpointId } = await s.hook(to.url, ["userCreated"]);
    const names = Array.from({ length: 1020 }, (_, i) => `user-${i}`);
    for (let at = 0; at < names.length; at += 60)
      await Promise.all(names.slice(at, at + 60).map((name) => s.server.user(name)));
    await s.server.stop();
    expect(rowsOf(folder)).toEqual(Array.from({ length: 1000 }, (_, i) => 21 + i));
    expect(log.filter((line) => line.includes("the oldest is dropped"))).toHaveLength(1);
    const again = await TestServer.start({ settings, dataDir: folder });
    const path = `http://weft/api/v2/webhooks/${endpointId}`;
    expect((await fetch(path, { method: "DELETE", unix: again.control.adminSocket })).status).toBe(200);
    await again.stop();
    expect(rowsOf(folder)).toEqual([]);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});

test("a key that expires within a day is told once, when the day begins; what was so at the start is no news", async () => {
  await using to = await receiver();
  let now = Date.parse("2027-01-01T00:00:00Z");
  await using s = await start({ now: () => now });
  const user = await s.server.user("alice");
  const key = await s.server.key({ user, reusable: true, expiration: null });
  await s.server.join("web", key);
  await s.server.admin("POST", "/node/1/expire", { expiry: "2027-01-03T00:00:00Z" });
  await s.hook(to.url, ["nodeKeyExpiringInOneDay"]);
  for (const step of [0, 86_400_000 - 1, 1, 5_000, 5_000]) {
    now += step;
    await s.server.control.tick();
  }
  await until(() => to.posted.length > 0, "the warning");
  await s.api("POST", `/api/v2/webhooks/${(await s.hook(to.url, ["nodeDeleted"])).endpointId}/test`);
  await until(() => to.types().includes("test"), "the test event");
  expect(to.types()).toEqual(["nodeKeyExpiringInOneDay", "test"]);
});
