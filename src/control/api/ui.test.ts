// The requests that three UIs written for Headscale make, as their sources have them, and what each of them reads in the
// answers: headscale-ui (no Content-Type, keys by their text), headplane (undici, keys by id) and headscale-admin (names of
// users in place of ids).
import { expect, test } from "bun:test";
import { makeSettings, TestServer } from "../testing.ts";
import { client } from "./testing.ts";

async function start() {
  const server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  const user = await server.user("alice");
  const node = await server.join("web", await server.key({ user, reusable: true }));
  await node.lite({ Hostinfo: { Hostname: "web", OS: "linux", RoutableIPs: ["10.0.0.0/8"] } });
  return { server, apiKey, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

/** Puts a machine among those that wait. */
function waiting(server: TestServer, digit: string): Promise<string> {
  const key = `hskey-authreq-${digit.repeat(24)}`;
  return server.admin("POST", "/debug/node", { user: "1", key, name: "laptop" }).then(() => key);
}

const NODE = {
  id: "1",
  name: "web",
  givenName: "web",
  lastSeen: null,
  ipAddresses: ["100.64.0.1", "fd7a:115c:a1e0::1"],
  tags: [],
  approvedRoutes: [],
  availableRoutes: ["10.0.0.0/8"],
  subnetRoutes: [],
  online: false,
  user: { id: "1", name: "alice", email: "" },
};

test("headscale-ui", async () => {
  await using s = await start();
  const send = client(s.server, s.apiKey);
  const api = async (method: string, path: string, body?: unknown) => {
    const json = body === undefined ? undefined : JSON.stringify(body);
    const answer = await send(method, `/api/v1${path}`, json, {
      Accept: "application/json",
      "Content-Type": "text/plain;charset=UTF-8",
    });
    expect([path, answer.status]).toEqual([path, 200]);
    return answer.body;
  };
  expect(await api("GET", "/user")).toMatchObject({
    users: [{ id: "1", name: "alice", createdAt: expect.any(String) }],
  });
  await api("POST", "/user", { name: "bob" });
  await api("POST", "/user/2/rename/carol");
  await api("DELETE", "/user/2");
  expect(await api("GET", "/node")).toMatchObject({ nodes: [NODE] });
  await api("POST", "/node/1/rename/front");
  await api("POST", "/node/1/approve_routes", { routes: ["10.0.0.0/8"] });
  await api("POST", "/node/1/tags", { tags: ["tag:web"] });
  const { preAuthKey } = (await api("POST", "/preauthkey", {
    user: "1",
    expiration: new Date(Date.now() + 3_600_000).toISOString(),
    reusable: true,
    ephemeral: false,
  })) as { preAuthKey: { key: string } };
  const { preAuthKeys } = (await api("GET", "/preauthkey?user=1")) as { preAuthKeys: { id: string; key: string }[] };
  const shown = preAuthKeys.find(({ key }) => preAuthKey.key.startsWith(key.replaceAll("*", "")))!;
  await api("POST", "/preauthkey/expire", { user: "1", key: shown.key });
  const registered = await api("POST", `/node/register?user=1&key=${await waiting(s.server, "1")}`);
  expect(registered).toMatchObject({ node: { name: "laptop", user: { id: "1" } } });
  const next = (await api("POST", "/apikey", { expiration: new Date(Date.now() + 86_400_000).toISOString() })) as {
    apiKey: string;
  };
  const { apiKeys } = (await api("GET", "/apikey")) as { apiKeys: { prefix: string; expiration: string }[] };
  await api("POST", "/apikey/expire", { prefix: apiKeys.find(({ prefix }) => next.apiKey.startsWith(prefix))!.prefix });
  await api("DELETE", "/node/1");
  // Its own words for what went wrong are those of the answer's `message`.
  const problem = await send("POST", "/api/v1/user", JSON.stringify({ name: "alice" }));
  expect([problem.status, problem.body.message]).toEqual([409, 'a user named "alice" already exists']);
});

test("headplane", async () => {
  await using s = await start();
  const send = client(s.server, s.apiKey);
  const api = async (method: string, path: string, body?: unknown) => {
    const headers = { Accept: "application/json", ...(body !== undefined && { "Content-Type": "application/json" }) };
    const answer = await send(method, `/api/v1/${path}`, body, headers);
    expect([path, answer.status]).toEqual([path, 200]);
    return answer.body;
  };
  // A number would be taken as a version of Headscale, and an old one as one without ids of keys.
  const { version } = (await client(s.server)("GET", "/version")).body;
  expect(/^v?\d+\.\d+\.\d+/.test(version as string)).toBe(false);
  expect((await client(s.server)("GET", "/health")).status).toBe(200);
  // Its login looks for the key that it was given, and wants to know how long it is good.
  const { apiKeys } = (await api("GET", "apikey")) as { apiKeys: { prefix: string; expiration: string }[] };
  const own = apiKeys.find(({ prefix }) => s.apiKey.startsWith(prefix.replaceAll("*", "")))!;
  expect(new Date(own.expiration).getTime()).toBeGreaterThan(Date.now());
  const refused = await client(s.server, `${s.apiKey.slice(0, -2)}zz`)("GET", "/api/v1/apikey");
  expect(refused.status).toBe(401);
  expect(await api("GET", "node")).toMatchObject({ nodes: [{ ...NODE, expiry: null, preAuthKey: { id: "1" } }] });
  expect(await api("GET", "node/1")).toMatchObject({ node: NODE });
  await api("POST", "user", { name: "bob", email: "b@example.com", displayName: "Bob", pictureUrl: "" });
  expect(await api("GET", "user?name=bob")).toMatchObject({ users: [{ id: "2", email: "b@example.com" }] });
  await api("POST", "user/2/rename/carol");
  await api("DELETE", "user/2");
  const key = await waiting(s.server, "2");
  expect(await api("POST", `node/register?user=alice&key=${key}`, { user: "alice", key })).toMatchObject({
    node: { name: "laptop" },
  });
  await api("POST", "node/1/rename/front");
  await api("POST", "node/1/approve_routes", { routes: ["10.0.0.0/8"] });
  await api("POST", "node/1/tags", { tags: ["tag:web"] });
  const tagless = await api("POST", "preauthkey", { user: "1", ephemeral: true, reusable: false, expiration: null });
  expect(tagless).toMatchObject({ preAuthKey: { id: "2", expiration: null, user: { id: "1" }, aclTags: [] } });
  const tagged = {
    ephemeral: false,
    reusable: true,
    expiration: new Date(Date.now() + 1e6).toISOString(),
    aclTags: ["tag:web"],
  };
  expect(await api("POST", "preauthkey", tagged)).toMatchObject({ preAuthKey: { user: null, aclTags: ["tag:web"] } });
  expect(((await api("GET", "preauthkey")).preAuthKeys as unknown[]).length).toBe(3);
  await api("POST", "preauthkey/expire", { id: "3" });
  expect(await api("GET", "policy")).toEqual({ policy: "", updatedAt: null });
  const policy = '{"acls": [] /* nothing */}';
  expect(await api("PUT", "policy", { policy })).toMatchObject({ policy, updatedAt: expect.any(String) });
  await api("POST", "node/1/expire");
  expect(((await api("GET", "node/1")).node as { expiry: string }).expiry).toEqual(expect.any(String));
  await api("DELETE", "node/1");
});

test("headscale-admin", async () => {
  await using s = await start();
  const send = client(s.server, s.apiKey);
  const api = async (method: string, path: string, body?: unknown) => {
    const json = method === "GET" || method === "DELETE" ? undefined : JSON.stringify(body ?? {});
    const answer = await send(method, `/api/v1${path}`, json, { Accept: "application/json" });
    expect([path, answer.status]).toEqual([path, 200]);
    // What has a code is an error to it.
    expect("code" in answer.body).toBe(false);
    return answer.body;
  };
  const { apiKeys } = (await api("GET", "/apikey")) as { apiKeys: { prefix: string; expiration: string }[] };
  expect(apiKeys.filter(({ prefix }) => s.apiKey.startsWith(prefix))[0]!.expiration).toEqual(expect.any(String));
  expect(await api("GET", "/user?id=1")).toMatchObject({ users: [{ name: "alice", displayName: "", provider: "" }] });
  expect(await api("GET", "/node")).toMatchObject({
    nodes: [{ ...NODE, registerMethod: "REGISTER_METHOD_AUTH_KEY", createdAt: expect.any(String) }],
  });
  const expiration = new Date(Date.now() + 3_600_000).toISOString();
  await api("POST", "/preauthkey", { user: "alice", reusable: true, ephemeral: false, expiration });
  const keys = (await api("GET", "/preauthkey?user=alice")).preAuthKeys as { user: unknown; key: string }[];
  expect(keys.length).toBe(2);
  await api("POST", "/preauthkey/expire", { user: keys[1]!.user, key: keys[1]!.key });
  await api("POST", "/node/1/rename/front");
  await api("POST", "/node/1/expire");
  await api("POST", "/node/1/tags", { tags: ["tag:web"] });
  await api("POST", `/node/register?user=alice&key=${await waiting(s.server, "3")}`);
  expect(await api("GET", "/policy")).toMatchObject({ policy: "" });
  await api("PUT", "/policy", { policy: '{"acls": []}' });
  // It knows an error by its code, and shows the message.
  const problem = await send("POST", "/api/v1/user", JSON.stringify({ name: "alice" }));
  expect(problem.body).toMatchObject({ code: 6, message: 'a user named "alice" already exists', details: [] });
  // It changes its key for a fresh one, and names the old one by its whole text.
  const { apiKey } = (await api("POST", "/apikey", { expiration })) as { apiKey: string };
  await api("POST", "/apikey/expire", { prefix: s.apiKey });
  expect((await send("GET", "/api/v1/user")).status).toBe(401);
  expect((await client(s.server, apiKey)("DELETE", "/api/v1/node/1")).status).toBe(200);
});
