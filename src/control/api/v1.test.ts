import { expect, test } from "bun:test";
import { createLogger } from "../../net/logger.ts";
import { makeSettings, TestServer } from "../testing.ts";
import type { ApiApiKey, ApiNode, ApiPreAuthKey, ApiUser } from "./shapes.ts";
import { client } from "./testing.ts";

async function withKey(server: TestServer) {
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  return { apiKey, api: client(server, apiKey) };
}

test("without a key nothing is told: neither data, nor what exists", async () => {
  await using server = await TestServer.start();
  await server.user("alice");
  const wrong = `hskey-api-${"0".repeat(12)}-${"0".repeat(64)}`;
  for (const [key, path] of [
    [undefined, "/api/v1/user"],
    [undefined, "/api/v1/node/1"],
    [wrong, "/api/v1/user"],
    ["", "/api/v1/apikey"],
    ["alice", "/api/v1/policy"],
  ] as const) {
    const { status, type, body } = await client(server, key)("GET", path);
    expect([path, status, type]).toEqual([path, 401, "application/problem+json"]);
    expect(Object.keys(body).sort()).toEqual(["code", "detail", "details", "message", "status", "title", "type"]);
    expect(JSON.stringify(body)).not.toContain("alice");
  }
});

test("an API key lets everything of the socket be done over HTTP, until it expires", async () => {
  await using server = await TestServer.start();
  const { apiKey, api } = await withKey(server);
  expect(apiKey).toMatch(/^hskey-api-[0-9a-f]{12}-[0-9a-f]{64}$/);
  expect((await api("GET", "/api/v1/health")).body).toEqual({ databaseConnectivity: true });
  const created = await api("POST", "/api/v1/user", { name: "alice", email: "a@example.com" });
  expect(created).toMatchObject({ status: 200, body: { user: { id: "1", name: "alice", email: "a@example.com" } } });
  expect((await api("POST", "/api/v1/user", { name: "alice" })).status).toBe(409);
  expect((await api("POST", "/api/v1/user/1/rename/bob")).body).toMatchObject({ user: { id: "1", name: "bob" } });
  expect((await api("POST", "/api/v1/user/1/rename/-")).status).toBe(400);
  expect((await api("POST", "/api/v1/user/9/rename/carol")).status).toBe(404);
  const [key] = (await api("GET", "/api/v1/apikey")).body.apiKeys as ApiApiKey[];
  expect(apiKey.startsWith(key!.prefix)).toBe(true);
  expect(key!.lastSeen).not.toBeNull();
  expect(JSON.stringify(await api("GET", "/api/v1/apikey"))).not.toContain(apiKey.slice(-64));
  expect((await api("POST", "/api/v1/apikey/expire", { prefix: key!.prefix })).status).toBe(200);
  const after = await api("GET", "/api/v1/user");
  expect([after.status, after.body.detail]).toEqual([401, expect.stringContaining("has expired")]);
});

test("an API key is named by id, by prefix in all its forms, and by nothing else", async () => {
  await using server = await TestServer.start();
  const keys = await Promise.all(
    Array.from({ length: 4 }, () => server.admin<{ apiKey: string }>("POST", "/apikey", {})),
  );
  const { apiKeys } = await server.admin<{ apiKeys: ApiApiKey[] }>("GET", "/apikey");
  expect(apiKeys.map(({ id }) => id)).toEqual(["1", "2", "3", "4"]);
  const text = (id: number) => keys.find(({ apiKey }) => apiKey.startsWith(apiKeys[id - 1]!.prefix))!.apiKey;
  await server.admin("DELETE", `/apikey/${text(1).slice(10, 22)}`);
  await server.admin("DELETE", `/apikey/${apiKeys[1]!.prefix}`);
  await server.admin("DELETE", "/apikey/-?id=3");
  expect(server.admin("DELETE", "/apikey/-?id=3")).rejects.toThrow("404");
  expect(server.admin("POST", "/apikey/expire", {})).rejects.toThrow("400");
  expect(server.admin("POST", "/apikey/expire", { id: 4, prefix: "0" })).rejects.toThrow("400");
  // UIs that know only the key itself send it whole.
  await server.admin("POST", "/apikey/expire", { prefix: text(4) });
  expect((await client(server, text(4))("GET", "/api/v1/user")).status).toBe(401);
  expect((await client(server, text(1))("GET", "/api/v1/user")).status).toBe(401);
  const made = await server.admin<{ apiKey: string }>("POST", "/apikey", { expiration: null });
  const last = (await server.admin<{ apiKeys: ApiApiKey[] }>("GET", "/apikey")).apiKeys.at(-1)!;
  expect([last.id, last.expiration, made.apiKey.startsWith(last.prefix)]).toEqual(["5", null, true]);
});

test("API keys survive a restart, and when they were used is written at most once a minute", async () => {
  let now = Date.parse("2026-11-21T12:00:00Z");
  const first = await TestServer.start({ now: () => now });
  const { apiKey, api } = await withKey(first);
  const seen = async () => (await first.admin<{ apiKeys: ApiApiKey[] }>("GET", "/apikey")).apiKeys[0]!.lastSeen;
  expect(await seen()).toBeNull();
  await api("GET", "/api/v1/user");
  expect(await seen()).toBe("2026-11-21T12:00:00.000Z");
  now += 59_000;
  await api("GET", "/api/v1/user");
  expect(await seen()).toBe("2026-11-21T12:00:00.000Z");
  now += 1_000;
  await api("GET", "/api/v1/user");
  expect(await seen()).toBe("2026-11-21T12:01:00.000Z");
  await first.stop();
  const store = Buffer.from(await Bun.file(`${first.dataDir}/weft.sqlite`).bytes());
  expect([store.includes(apiKey.slice(10, 22)), store.includes(apiKey.slice(-64))]).toEqual([true, false]);
  await using second = await TestServer.start({ dataDir: first.dataDir, now: () => now });
  expect((await client(second, apiKey)("GET", "/api/v1/user")).status).toBe(200);
  now += 90 * 24 * 3_600_000;
  expect((await client(second, apiKey)("GET", "/api/v1/user")).status).toBe(401);
});

test("wrong keys cost time and are logged, without the key; a right key from the same address never waits", async () => {
  const now = Date.parse("2026-11-21T12:00:00Z");
  const lines: string[] = [];
  await using server = await TestServer.start({ now: () => now, log: (line) => lines.push(line) });
  const { apiKey, api } = await withKey(server);
  const secret = "5".repeat(64);
  const guess = client(server, `hskey-api-${"1".repeat(12)}-${secret}`);
  const statuses: number[] = [];
  for (let i = 0; i < 8; i++) statuses.push((await guess("GET", "/api/v1/user")).status);
  expect(statuses).toEqual([401, 401, 401, 401, 401, 401, 429, 429]);
  const token = await fetch(`${server.url}/api/v2/oauth/token`, {
    method: "POST",
    body: "client_id=x&client_secret=y",
  });
  expect([token.status, Number(token.headers.get("Retry-After"))]).toEqual([429, 1]);
  expect((await api("GET", "/api/v1/user")).status).toBe(200);
  expect(lines.filter((line) => line.includes("wrong key from 127.0.0.1"))).toHaveLength(6);
  expect(lines.join("\n")).not.toContain(secret);
  expect(lines.join("\n")).not.toContain(apiKey.slice(-64));
});

test("a node is tagged, gets routes, expires and is deleted over HTTP", async () => {
  await using server = await TestServer.start();
  const { api } = await withKey(server);
  const user = await server.user("alice");
  await server.join("web", await server.key({ user, reusable: true }));
  const node = async (method: string, path: string, body?: unknown) =>
    (await api(method, `/api/v1/node/1${path}`, body)).body.node as ApiNode;
  expect(await node("GET", "")).toMatchObject({
    givenName: "web",
    user: { name: "alice" },
    authorized: true,
    tags: [],
  });
  expect((await node("POST", "/approve_routes", { routes: ["10.1.2.3/8", "0.0.0.0/0"] })).approvedRoutes).toEqual([
    "0.0.0.0/0",
    "10.0.0.0/8",
    "::/0",
  ]);
  expect((await api("POST", "/api/v1/node/1/approve_routes", { routes: ["x"] })).status).toBe(400);
  expect((await api("POST", "/api/v1/node/1/tags", { tags: [] })).status).toBe(400);
  expect(await node("POST", "/tags", { tags: ["tag:web"] })).toMatchObject({
    tags: ["tag:web"],
    user: { id: "2147455555", name: "tagged-devices" },
  });
  expect((await node("POST", "/expire", {})).expiry).not.toBeNull();
  expect((await node("POST", "/expire", { disableExpiry: true })).expiry).toBeNull();
  expect((await node("POST", "/rename/front")).givenName).toBe("front");
  expect((await api("DELETE", "/api/v1/node/1")).body).toEqual({});
  expect((await api("GET", "/api/v1/node/1")).status).toBe(404);
  expect((await api("GET", "/api/v1/node/x")).status).toBe(400);
  expect((await api("GET", "/api/v1/node?user=alice")).body).toEqual({ nodes: [] });
  expect((await api("GET", "/api/v1/node?user=nobody")).status).toBe(404);
  expect((await api("GET", "/api/v1/user?id=0")).body.users).toHaveLength(1);
  expect((await api("GET", "/api/v1/user?id=9")).body).toEqual({ users: [] });
});

test("a pre-auth key is told once, never expires when asked for, and is deleted without its nodes", async () => {
  await using server = await TestServer.start();
  const { api } = await withKey(server);
  await server.user("alice");
  const create = async (body: unknown) =>
    (await api("POST", "/api/v1/preauthkey", body)).body.preAuthKey as ApiPreAuthKey;
  const key = await create({ user: "1", reusable: true, expiration: null });
  expect(key).toMatchObject({ id: "1", expiration: null, used: false, user: { id: "1" } });
  await create({ user: "alice" });
  await create({ aclTags: ["tag:web"] });
  expect((await api("POST", "/api/v1/preauthkey", { user: "nobody" })).status).toBe(404);
  const list = async (query = "") =>
    ((await api("GET", `/api/v1/preauthkey${query}`)).body.preAuthKeys as ApiPreAuthKey[]).map(({ id, key }) => [
      id,
      key,
    ]);
  expect((await list()).map(([id]) => id)).toEqual(["1", "2", "3"]);
  expect((await list("?user=alice")).map(([id]) => id)).toEqual(["1", "2"]);
  expect(await list("?user=nobody")).toEqual([]);
  const masked = (await list())[0]![1]!;
  expect(masked).toBe(`${key.key.slice(0, 23)}-***`);
  await server.join("web", key.key);
  expect((await api("DELETE", "/api/v1/preauthkey?id=1")).status).toBe(200);
  expect((await api("DELETE", "/api/v1/preauthkey?id=1")).status).toBe(404);
  expect((await api("GET", "/api/v1/node/1")).body).toMatchObject({ node: { name: "web", preAuthKey: null } });
  const second = (await list())[0]![1]!;
  expect((await api("POST", "/api/v1/preauthkey/expire", { key: second })).status).toBe(200);
  const expired = ((await api("GET", "/api/v1/preauthkey")).body.preAuthKeys as ApiPreAuthKey[])[0]!;
  expect(Date.parse(expired.expiration!)).toBeLessThanOrEqual(Date.now());
});

test("lists are whole, or in pages that miss nothing", async () => {
  await using server = await TestServer.start();
  const { api } = await withKey(server);
  for (let i = 0; i < 7; i++) await server.user(`user-${i}`);
  const ids = (body: Record<string, unknown>) => (body.users as ApiUser[]).map(({ id }) => id);
  const whole = (await api("GET", "/api/v1/user")).body;
  expect([ids(whole), "nextPageToken" in whole]).toEqual([["1", "2", "3", "4", "5", "6", "7"], false]);
  const pages: string[][] = [];
  for (let token: unknown = "0"; token !== undefined; ) {
    const { body } = await api("GET", `/api/v1/user?limit=3&pageToken=${token}`);
    pages.push(ids(body));
    token = body.nextPageToken;
  }
  expect(pages).toEqual([["1", "2", "3"], ["4", "5", "6"], ["7"]]);
  expect((await api("GET", "/api/v1/user?limit=-1")).status).toBe(400);
  expect((await api("GET", "/api/v1/user?pageToken=x")).status).toBe(400);
});

test("the policy is read, checked and set, with the place of what is wrong", async () => {
  await using server = await TestServer.start({
    settings: makeSettings({ policy: { mode: "database", path: "" } }),
  });
  const { api } = await withKey(server);
  expect((await api("GET", "/api/v1/policy")).body).toEqual({ policy: "", updatedAt: null });
  const policy = '{\n  // all\n  "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],\n}';
  expect((await api("POST", "/api/v1/policy/check", { policy })).body).toEqual({});
  const bad = await api("PUT", "/api/v1/policy", { policy: '{\n  "acl": []\n}' });
  expect([bad.status, bad.body.detail]).toEqual([400, expect.stringContaining("line 2")]);
  expect((await api("PUT", "/api/v1/policy", { policy })).body).toMatchObject({ policy });
  const { body } = await api("GET", "/api/v1/policy");
  expect(body.policy).toBe(policy);
  expect(Number.isNaN(Date.parse(body.updatedAt as string))).toBe(false);
});

test("who sets the policy in place of one that another has replaced meanwhile overwrites nothing", async () => {
  await using server = await TestServer.start({
    settings: makeSettings({ policy: { mode: "database", path: "" } }),
  });
  const { api } = await withKey(server);
  const set = (policy: string, ifMatch: string) => api("PUT", "/api/v1/policy", { policy }, { "If-Match": ifMatch });
  const etag = async () => (await api("GET", "/api/v1/policy")).headers.get("ETag")!;
  const none = await etag();
  const first = await set('{"acls": []}', none);
  expect([first.status, first.headers.get("ETag")]).toEqual([200, await etag()]);
  const late = await set("{}", none);
  expect([late.status, late.type]).toEqual([412, "application/problem+json"]);
  expect(late.body.detail).toContain("the policy is another one by now (version 1, set by API key 1)");
  expect((await set("{}", '"ts-default"')).status).toBe(412);
  expect((await api("GET", "/api/v1/policy")).body.policy).toBe('{"acls": []}');
  expect((await set("{}", await etag())).status).toBe(200);
});

test("the log says who changed what, who joined and who left; not who only asked, nor a secret", async () => {
  const lines: string[] = [];
  const requestLog = createLogger({ level: "info", format: "text", write: (line) => lines.push(line.slice(25)) });
  await using server = await TestServer.start({
    requestLog,
    settings: makeSettings({ policy: { mode: "database", path: "" } }),
  });
  const { api, apiKey } = await withKey(server);
  await api("POST", "/api/v1/user", { name: "alice" });
  await api("POST", "/api/v1/user", { name: "alice" });
  await api("GET", "/api/v1/user");
  await api("POST", "/api/v1/policy/check", { policy: "{}" });
  const authKey = await server.key({ user: "1", reusable: true });
  const node = await server.join("laptop", authKey);
  await node.lite();
  await node.register({ authKey });
  const gone = await server.join("phone", await server.key({ user: "1", ephemeral: true }));
  for (const each of [node, gone]) await each.register({ expiry: "1970-01-01T00:00:01Z" });
  await api("DELETE", "/api/v1/node/1");
  await api("DELETE", `/api/v1/apikey/${apiKey}`);
  const said = lines.map((line) => line.trimEnd().replace(/ (request|client)=\S+/g, ""));
  expect(said).toEqual([
    "info the admin socket: createApiKey /api/v1/apikey",
    "info API key 1: createUser /api/v1/user (user 1)",
    "info the admin socket: createPreAuthKey /api/v1/preauthkey (preAuthKey 1)",
    "info node 1 (laptop) of alice has joined",
    "info the admin socket: createPreAuthKey /api/v1/preauthkey (preAuthKey 2)",
    "info node 2 (phone) of alice has joined",
    "info node 1 (laptop) of alice has logged out",
    "info node 2 (phone) of alice has logged out",
    "info API key 1: deleteNode /api/v1/node/1",
    expect.stringMatching(/^info API key 1: deleteApiKey \/api\/v1\/apikey\/hskey-api-\w+-\*\*\*$/),
  ]);
  expect(lines[1]).toMatch(/ request=\w+ client=127\.0\.0\.1\n$/);
  expect(lines[3]).toMatch(/ client=127\.0\.0\.1\n$/);
});

test("what the API is, and a page to try it, are told to anybody, without a script from elsewhere", async () => {
  await using server = await TestServer.start();
  const anybody = client(server);
  const json = await anybody("GET", "/api/v1/openapi.json");
  expect(json.body.openapi).toBe("3.1.0");
  const paths = json.body.paths as Record<string, Record<string, { operationId: string }>>;
  expect(paths["/node/{id}/tags"]?.post?.operationId).toBe("setTags");
  const yaml = await anybody("GET", "/api/v1/openapi.yaml");
  expect(Bun.YAML.parse(yaml.text)).toEqual(json.body);
  // Every reference leads somewhere.
  const schemas = (json.body.components as { schemas: Record<string, unknown> }).schemas;
  const references = [...JSON.stringify(json.body).matchAll(/"\$ref":"#\/components\/schemas\/(\w+)"/g)];
  expect(references.length).toBeGreaterThan(20);
  for (const [, name] of references) expect(Object.keys(schemas)).toContain(name!);
  const page = (await anybody("GET", "/api/v1/docs")).text;
  const sources = [...page.matchAll(/(?:src|href)="(\/[^"]+)"/g)].map(([, source]) => source!);
  expect(sources.length).toBe(3);
  for (const source of sources) {
    const { status, text } = await anybody("GET", source);
    expect([source.startsWith("/api/v1/docs/"), status, text.length > 40]).toEqual([true, 200, true]);
  }
  expect(page).not.toMatch(/<script>|https?:/);
});

test("what is too large, no JSON, or of another type is refused with a reason", async () => {
  await using server = await TestServer.start();
  const { api } = await withKey(server);
  const detail = async (body: unknown) => {
    const { status, body: answer } = await api("POST", "/api/v1/user", body);
    return [status, answer.detail];
  };
  expect(await detail("{")).toEqual([400, "the request body is not JSON"]);
  expect(await detail("[]")).toEqual([400, expect.stringContaining("the request body: ")]);
  expect(await detail({ name: 1 })).toEqual([400, expect.stringContaining("name: ")]);
  expect(await detail({ name: "x".repeat(2000) })).toEqual([400, expect.stringContaining("name: ")]);
  expect(await detail(`{"name":${"[".repeat(10_000)}${"]".repeat(10_000)}}`)).toEqual([
    400,
    expect.stringContaining("name: "),
  ]);
  expect((await detail(`{"name":"${"x".repeat(1 << 20)}"}`))[0]).toBe(413);
  expect((await api("GET", "/api/v1/nothing")).status).toBe(404);
  expect((await api("PATCH", "/api/v1/user")).status).toBe(404);
});

test("a policy of a whole MiB is set, though JSON needs twice as much for it; of other bodies a MiB is read", async () => {
  await using server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const { api } = await withKey(server);
  const rest = '{"acls": []}';
  const policy = `${"\n".repeat((1 << 20) - rest.length)}${rest}`;
  expect((await api("PUT", "/api/v1/policy", { policy })).status).toBe(200);
  expect((await api("GET", "/api/v1/policy")).body.policy).toBe(policy);
  expect(await api("POST", "/api/v1/policy/check", { policy: `${policy} ` })).toMatchObject({ status: 400 });
  expect((await api("PUT", "/api/v1/policy", { policy: "x".repeat(2_200_000) })).status).toBe(413);
  expect((await api("POST", "/api/v1/user", { name: "x".repeat(1 << 20) })).status).toBe(413);
  const strange = client(server, `hskey-api-${"1".repeat(12)}-${"2".repeat(64)}`);
  expect((await strange("PUT", "/api/v1/policy", "x".repeat(2_000_000))).status).toBe(401);
});
