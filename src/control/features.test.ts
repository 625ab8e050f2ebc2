import { expect, test } from "bun:test";
import { Hono } from "hono";
import { createLocalJWKSet, type JSONWebKeySet, jwtVerify } from "jose";
import type { ControlContext } from "./context.ts";
import { addFeatures, clientAudit } from "./features.ts";
import { MachineRouter } from "./machine.ts";
import { type Change, Model } from "./model.ts";
import { parseResponse } from "./pings.ts";
import { makeNode, makeSettings, makeUser, TestServer, until } from "./testing.ts";

async function joined(server: TestServer, name = "a") {
  const node = await server.join(name, await server.key({ user: await server.user(`owner-${name}`) }));
  return { node, map: await node.stream() };
}

async function ask(node: Awaited<ReturnType<typeof joined>>["node"], method: string, path: string, body: unknown) {
  const { status, body: answer } = await node.client.request(
    { method: method as "POST", path, body: JSON.stringify(body) },
    1 << 20,
    5000,
  );
  return { status, text: new TextDecoder().decode(answer) };
}

test("an id token says who the node is, holds for five minutes, and is proved by the published keys, whichever signs", async () => {
  let now = Date.now();
  await using server = await TestServer.start({ now: () => now });
  const { node } = await joined(server);
  const token = async (audience: string) => {
    const { status, text } = await ask(node, "POST", "/machine/id-token", {
      NodeKey: node.nodeKey,
      Audience: audience,
    });
    if (status !== 200) throw new Error(`${status}: ${text}`);
    return JSON.parse(text).id_token as string;
  };
  const get = async <T>(path: string) => (await (await fetch(server.url + path)).json()) as T;
  const verify = async (jwt: string) => {
    const { issuer, jwks_uri } = await get<{ issuer: string; jwks_uri: string }>("/.well-known/openid-configuration");
    const jwks = await get<JSONWebKeySet>(new URL(jwks_uri).pathname);
    const options = { issuer, audience: "https://vault.test", currentDate: new Date(now) };
    return (await jwtVerify(jwt, createLocalJWKSet(jwks), options)).payload;
  };
  const first = await token("https://vault.test");
  const { jti, ...claims } = await verify(first);
  const iat = Math.floor(now / 1000);
  expect(jti).toBeString();
  expect(claims).toEqual({
    ...{ sub: "a.net.test", iss: "http://control.test", aud: "https://vault.test", iat, nbf: iat, exp: iat + 300 },
    ...{ key: node.nodeKey, addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"], nid: 1, node: "a.net.test" },
    ...{ domain: "net.test", user: "owner-a", uid: 1 },
  });
  expect(JSON.stringify(await get("/.well-known/jwks.json"))).not.toContain('"d"');
  now += 31 * 24 * 3600_000;
  const second = await token("https://vault.test");
  const kid = (jwt: string) => JSON.parse(Buffer.from(jwt.split(".")[0]!, "base64url").toString()).kid as string;
  expect(kid(second)).not.toBe(kid(first));
  await verify(second);
  expect((await get<JSONWebKeySet>("/.well-known/jwks.json")).keys).toHaveLength(2);
  now += 31 * 24 * 3600_000;
  await token("https://vault.test");
  const kids = (await get<JSONWebKeySet>("/.well-known/jwks.json")).keys.map((key) => key.kid);
  expect(kids).toContain(kid(second));
  expect(kids).not.toContain(kid(first));
  await expect(token("")).rejects.toThrow("400: Audience is missing");
});

test("what names a node needs the machine of that node", async () => {
  await using server = await TestServer.start();
  const { node } = await joined(server, "a");
  const { node: thief } = await joined(server, "b");
  for (const [method, path] of [
    ["POST", "/machine/id-token"],
    ["POST", "/machine/set-dns"],
    ["POST", "/machine/audit-log"],
    ["POST", "/machine/feature/query"],
    ["POST", "/machine/update-health"],
    ["PATCH", "/machine/set-device-attr"],
  ] as const) {
    const body = { NodeKey: node.nodeKey, Audience: "x", Update: {} };
    expect(await ask(thief, method, path, body)).toEqual({ status: 404, text: "node not found" });
  }
});

test("attributes that a node tells of itself are stored, bounded, and decide in postures", async () => {
  const settings = makeSettings({ policy: { mode: "database", path: "" } });
  await using server = await TestServer.start({ settings });
  const { node, map } = await joined(server, "a");
  const { map: other } = await joined(server, "b");
  await server.control.policies.set(
    JSON.stringify({
      postures: { "posture:lab": ["custom:tier == 'lab'"] },
      acls: [{ action: "accept", src: ["owner-a@"], dst: ["owner-b@:22"], srcPosture: ["posture:lab"] }],
    }),
    { by: "test" },
  );
  await until(() => map.peers.size === 0 && other.peers.size === 0, "the policy");
  const set = (Update: unknown) => ask(node, "PATCH", "/machine/set-device-attr", { NodeKey: node.nodeKey, Update });
  expect((await set({ "custom:tier": "lab", "custom:n": 5, "custom:b": true })).status).toBe(200);
  await until(() => map.peers.size === 1 && other.peers.size === 1, "the peers");
  expect((await set({ "custom:tier": null })).status).toBe(200);
  await until(() => map.peers.size === 0 && other.peers.size === 0, "the peers to go");
  expect((await set({ "node:os": "linux" })).text).toContain("it must be custom:NAME");
  expect((await set({ "custom:x": "y".repeat(257) })).status).toBe(400);
  expect((await set({ "custom:x": {} })).status).toBe(400);
  expect((await set([])).status).toBe(400);
  const many = Object.fromEntries(Array.from({ length: 99 }, (_, i) => [`custom:k${i}`, i]));
  expect((await set(many)).text).toContain("at most 100 attributes");
});

test("audit entries are kept, the oldest go first; health is kept until it is well", async () => {
  const lines: string[] = [];
  await using server = await TestServer.start({ log: (line) => void lines.push(line) });
  const { node } = await joined(server);
  const entry = {
    NodeKey: node.nodeKey,
    Action: "DISCONNECT_NODE",
    Details: 'lunch "\n',
    Timestamp: "2026-09-01T10:00:00Z",
  };
  expect((await ask(node, "POST", "/machine/audit-log", entry)).status).toBe(200);
  expect(lines.at(-1)).toBe('node 1 (a) tells "DISCONNECT_NODE": "lunch \\"\\n"');
  const health = (subsystem: string, problem: string) =>
    ask(node, "POST", "/machine/update-health", { NodeKey: node.nodeKey, Subsys: subsystem, Error: problem });
  expect((await health("dns", "no resolver")).status).toBe(204);
  await health("router", "no table");
  await health("router", "");
  for (let i = 0; i < 40; i++) await health(`s${i}`, "x");
  const kept = server.control.health.list()["1"]!;
  expect(kept.dns).toBe("no resolver");
  expect(kept.router).toBeUndefined();
  expect(Object.keys(kept)).toHaveLength(32);
  await server.admin("DELETE", "/node/1");
  expect(server.control.health.list()).toEqual({});
});

test("features are told to be there or not, with a text for the user; whoami names the node", async () => {
  await using server = await TestServer.start();
  const { node } = await joined(server);
  const query = async (Feature: string) =>
    JSON.parse((await ask(node, "POST", "/machine/feature/query", { NodeKey: node.nodeKey, Feature })).text);
  expect(await query("serve")).toMatchObject({ Complete: false, Text: expect.stringContaining("DNS provider") });
  expect(await query("funnel")).toMatchObject({ Complete: false, Text: expect.stringContaining("Funnel") });
  expect((await ask(node, "GET", "/machine/whoami", undefined)).text).toContain("node 1: a.net.test, 100.64.0.1");
  const dns = await ask(node, "POST", "/machine/set-dns", {
    NodeKey: node.nodeKey,
    Name: "_acme-challenge.a.net.test",
    Type: "TXT",
    Value: "v",
  });
  expect(dns).toMatchObject({ status: 403, text: expect.stringContaining("no DNS provider") });
});

test("a node is asked over its map stream, and only its own machine may answer", async () => {
  await using server = await TestServer.start();
  const { node, map } = await joined(server, "a");
  const { node: other } = await joined(server, "b");
  const questions = () => map.messages.flatMap(({ PingRequest }) => PingRequest ?? []);
  const answer = async (who: typeof node, text: string, count = 1) => {
    const question = await until(() => questions()[count - 1], "the question");
    const { pathname, search } = new URL(question.URL!);
    await who.client.request({ method: "POST", path: pathname + search, body: text }, 1000, 60_000);
    return question;
  };
  const { pings } = server.control;
  const asked = pings.c2n(1, { method: "GET", path: "/echo" }, 2000);
  await answer(other, "HTTP/1.1 200 OK\r\n\r\nstolen");
  const question = await answer(node, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-A: b\r\n\r\nmine");
  expect(question.Types).toBe("c2n");
  expect(Buffer.from(question.Payload!, "base64").toString()).toStartWith("GET /echo HTTP/1.1\r\nHost: node\r\n");
  const { status, headers, body } = await asked;
  expect([status, headers["x-a"], Buffer.from(body).toString()]).toEqual([200, "b", "mine"]);

  const pinged = pings.ping(1, "disco", "100.64.0.2", 2000);
  expect(await answer(node, '{"Type":"disco","LatencySeconds":0.01}', 2)).toMatchObject({
    Types: "disco",
    IP: "100.64.0.2",
  });
  expect((await pinged).LatencySeconds).toBe(0.01);

  const there = pings.head(1, 2000);
  const head = await until(() => questions()[2], "the third question");
  const { pathname, search } = new URL(head.URL!);
  expect((await fetch(server.url + pathname + search, { method: "HEAD" })).status).toBe(200);
  expect(await there).toBeGreaterThanOrEqual(0);
  expect((await fetch(server.url + pathname + search, { method: "HEAD" })).status).toBe(404);

  await expect(pings.head(1, 20)).rejects.toThrow("node 1 did not answer within 20 ms");
  await expect(pings.head(99, 20)).rejects.toThrow("node 99 has no connection");
});

test("HTTP responses of nodes are read by length, in chunks and to the end; others are refused", () => {
  const parse = (text: string) => {
    const response = parseResponse(Buffer.from(text));
    return response && Buffer.from(response.body).toString();
  };
  expect(parse("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc")).toBe("ab");
  expect(parse("HTTP/1.0 404 Not Found\r\n\r\nabc")).toBe("abc");
  expect(parse("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")).toBe(
    "abcde",
  );
  for (const wrong of [
    "",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 abc\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\nabc",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n",
  ])
    expect(parse(wrong)).toBeNull();
});

test("a node that tells without end pushes out its own audit entries alone", async () => {
  const model = new Model();
  const nodes = [1, 2].map((id) => makeNode(id, { userId: 1 }));
  model.apply({ users: [makeUser(1)], nodes });
  const journal = { commit: async (change: Change) => void model.apply(change) };
  const ctx = { model, journal, now: () => 0, log: () => {} } as unknown as ControlContext;
  const machines = new MachineRouter();
  addFeatures(ctx, machines, new Hono());
  const { handler, params } = machines.find("POST", "/machine/audit-log")!;
  const tell = (id: number, details: number) => {
    const { nodeKey, machineKey } = nodes[id - 1]!;
    const body = Buffer.from(JSON.stringify({ NodeKey: nodeKey, Action: "X", Details: String(details) }));
    const connection = { machineKey, version: 138, address: "" };
    return handler({ connection, params, query: new URLSearchParams(), body, signal: new AbortController().signal });
  };
  for (let i = 0; i < 3; i++) await tell(1, i);
  for (let i = 0; i < 1100; i++) await tell(2, i);
  const kept = clientAudit(ctx);
  expect(kept).toHaveLength(1000);
  expect(kept.filter(({ nodeId }) => nodeId === 1).map(({ details }) => details)).toEqual(["2", "1", "0"]);
  expect([kept[0]!.details, kept.at(-4)!.details]).toEqual(["1099", "103"]);
});
