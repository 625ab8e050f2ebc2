import { expect, test } from "bun:test";
import { makeSettings, TestServer, until } from "../testing.ts";
import type { ApiPreAuthKey } from "./shapes.ts";
import { client } from "./testing.ts";
import type { ApiDevice, ApiKeyV2 } from "./v2-shapes.ts";

const T = "/api/v2/tailnet/-";
const POLICY = `{
  // Who may give whom which tag.
  "tagOwners": {"tag:operator": [], "tag:k8s": ["tag:operator"], "tag:other": []},
  "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}`;

async function start(policy?: string) {
  const server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  if (policy) await server.admin("PUT", "/policy", { policy });
  return { server, apiKey, api: client(server, apiKey), [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

/** An OAuth client, and what it can do with all of its scopes. */
async function oauthClient({ server, api }: Awaited<ReturnType<typeof start>>, scopes: string[], tags: string[] = []) {
  const made = await api("POST", `${T}/keys`, { keyType: "client", scopes, tags, description: "for a test" });
  const { id, key } = made.body as unknown as ApiKeyV2;
  const token = async (more: Record<string, string> = {}) =>
    client(server)(
      "POST",
      "/api/v2/oauth/token",
      `${new URLSearchParams({ client_id: id, client_secret: key!, ...more })}`,
    );
  const bearer = client(server, (await token()).body.access_token as string);
  return { made, id, secret: key!, token, bearer };
}

test("errors have Tailscale's shape; another tailnet than - does not exist", async () => {
  await using s = await start();
  expect((await client(s.server)("GET", `${T}/devices`)).body).toEqual({ message: expect.any(String), status: 401 });
  expect((await s.api("GET", "/api/v2/tailnet/example.com/devices")).body).toMatchObject({ status: 404 });
  expect((await s.api("GET", "/api/v2/device/77")).body).toEqual({ message: 'there is no device "77"', status: 404 });
  expect((await s.api("GET", "/api/v2/device/abc")).status).toBe(404);
  const basic = Buffer.from(`${s.apiKey}:`).toString("base64");
  const asBasic = await client(s.server)("GET", `${T}/devices`, undefined, { Authorization: `Basic ${basic}` });
  expect(asBasic.body).toEqual({ devices: [] });
  // A browser that knows the key, for a page of its own and for one of another site.
  for (const [site, status] of [
    ["same-origin", 200],
    ["none", 200],
    ["cross-site", 401],
    ["same-site", 401],
  ] as const) {
    const headers = { Authorization: `Basic ${basic}`, "Sec-Fetch-Site": site };
    expect((await client(s.server)("GET", `${T}/devices`, undefined, headers)).status).toBe(status);
  }
});

test("the policy file: HuJSON or JSON, with ETag and If-Match", async () => {
  await using s = await start();
  const hujson = { Accept: "application/hujson" };
  const first = await s.api("GET", `${T}/acl`, undefined, hujson);
  expect([first.type, first.text]).toEqual([
    "application/hujson",
    expect.stringContaining("everybody reaches everybody"),
  ]);
  const set = (ifMatch: string, body = POLICY) => s.api("POST", `${T}/acl`, body, { ...hujson, "If-Match": ifMatch });
  expect((await set('"0000"')).status).toBe(412);
  expect((await set('"ts-default"')).text).toBe(POLICY);
  expect((await set('"ts-default"', POLICY.replace("Who", "who"))).status).toBe(412);
  const now = await s.api("GET", `${T}/acl`, undefined, hujson);
  expect([now.text, now.headers.get("ETag")]).toEqual([POLICY, `"${new Bun.SHA256().update(POLICY).digest("hex")}"`]);
  const json = await s.api("GET", `${T}/acl`, undefined, { Accept: "application/json" });
  expect(json.body).toEqual(JSON.parse(JSON.stringify(Bun.JSON5.parse(POLICY))));
  expect((await set(now.headers.get("ETag")!, POLICY.replace("Who", "who"))).status).toBe(200);
  expect((await set(now.headers.get("ETag")!, POLICY)).status).toBe(412);
  expect((await s.api("POST", `${T}/acl`, '{"acls": 1}')).body).toMatchObject({ status: 400 });
  expect((await s.api("POST", `${T}/acl/validate`, POLICY)).body).toEqual({});
  const failing = `{"acls": [], "tests": [{"src": "*", "accept": ["100.64.0.1:22"]}]}`;
  const { body } = await s.api("POST", `${T}/acl/validate`, failing);
  expect(body).toMatchObject({ message: expect.any(String), data: [{ user: "*", errors: [expect.any(String)] }] });
  expect((await s.api("POST", `${T}/acl`, failing)).body).toMatchObject({ data: body.data, status: 400 });
  const ofPresent = '[{"src": "100.64.0.1", "accept": ["100.64.0.2:22"]}]';
  expect((await s.api("POST", `${T}/acl/validate`, ofPresent)).body).toEqual({});
});

test("a device is read in full, named, tagged, routed, approved and deleted", async () => {
  await using s = await start(POLICY);
  const user = await s.server.user("alice");
  const node = await s.server.join("web", await s.server.key({ user, reusable: true }));
  await s.server.join("db", await s.server.key({ aclTags: ["tag:k8s"] }));
  await node.lite({
    Endpoints: ["192.0.2.1:41641"],
    Hostinfo: {
      OS: "linux",
      Hostname: "web",
      IPNVersion: "1.80.3",
      RoutableIPs: ["10.0.0.0/8"],
      Distro: "debian",
      NetInfo: { PreferredDERP: 1, WorkingUDP: true, DERPLatency: { "1-v4": 0.004, "1-v6": 0.003, x: 1 } },
    },
  });
  const device = async (query = "") => (await s.api("GET", `/api/v2/device/1${query}`)).body as unknown as ApiDevice;
  const plain = await device();
  expect(plain).toMatchObject({
    id: "1",
    nodeId: "1",
    name: "web.net.test",
    hostname: "web",
    user: "alice",
    os: "linux",
    clientVersion: "1.80.3",
    authorized: true,
    keyExpiryDisabled: true,
    expires: "0001-01-01T00:00:00Z",
    addresses: ["100.64.0.1", "fd7a:115c:a1e0::1"],
  });
  expect([plain.tags, plain.enabledRoutes, plain.clientConnectivity]).toEqual([undefined, undefined, undefined]);
  expect(await device("?fields=all")).toMatchObject({
    advertisedRoutes: ["10.0.0.0/8"],
    enabledRoutes: [],
    clientConnectivity: { endpoints: ["192.0.2.1:41641"], latency: { "1": { latencyMs: 3, preferred: true } } },
    distro: { name: "debian" },
  });
  const post = async (path: string, body: unknown) => (await s.api("POST", `/api/v2/device/1${path}`, body)).status;
  expect(await post("/routes", { routes: ["10.0.0.0/8"] })).toBe(200);
  expect((await s.api("GET", "/api/v2/device/1/routes")).body).toEqual({
    advertisedRoutes: ["10.0.0.0/8"],
    enabledRoutes: ["10.0.0.0/8"],
  });
  expect(await post("/name", { name: "front.net.test" })).toBe(200);
  expect((await device()).name).toBe("front.net.test");
  expect(await post("/name", { name: "db" })).toBe(409);
  expect(await post("/name", { name: "" })).toBe(200);
  expect((await device()).name).toBe("web.net.test");
  expect(await post("/key", { keyExpiryDisabled: false })).toBe(200);
  expect(Date.parse((await device()).expires)).toBeGreaterThan(Date.now() + 179 * 86_400_000);
  expect(await post("/authorized", { authorized: false })).toBe(200);
  expect((await device()).authorized).toBe(false);
  expect(await post("/authorized", { authorized: true })).toBe(200);
  expect(await post("/tags", { tags: [] })).toBe(200);
  expect((await device()).user).toBe("alice");
  expect(await post("/attributes/custom:tier", { value: "prod", expiry: "0001-01-01T00:00:00Z", comment: "" })).toBe(
    200,
  );
  expect(await post("/attributes/node:os", { value: "plan9" })).toBe(400);
  expect((await s.api("GET", "/api/v2/device/1/attributes")).body.attributes).toMatchObject({ "custom:tier": "prod" });
  expect((await s.api("DELETE", "/api/v2/device/1/attributes/custom:tier")).status).toBe(200);
  expect((await s.api("GET", "/api/v2/device/1/attributes")).body.attributes).not.toHaveProperty("custom:tier");
  expect(await post("/tags", { tags: ["tag:other"] })).toBe(200);
  expect(await device()).toMatchObject({ user: "tagged-devices", tags: ["tag:other"] });
  const list = async (query: string) =>
    ((await s.api("GET", `${T}/devices${query}`)).body.devices as ApiDevice[]).map(({ hostname }) => hostname);
  expect(await list("")).toEqual(["web", "db"]);
  expect(await list("?tags=tag:k8s")).toEqual(["db"]);
  expect(await list("?tags=tag:k8s&tags=tag:other&isEphemeral=false")).toEqual(["web", "db"]);
  expect(await list("?isEphemeral=true")).toEqual([]);
  expect((await s.api("GET", `${T}/devices?colour=red`)).status).toBe(400);
  expect((await s.api("DELETE", "/api/v2/device/1")).status).toBe(200);
  expect(await list("")).toEqual(["db"]);
});

test("a device's address is another of the tailnet's, and its peers know it at once", async () => {
  await using s = await start();
  const key = await s.server.key({ user: await s.server.user("alice"), reusable: true });
  const watcher = await (await s.server.join("watcher", key)).stream();
  await s.server.join("web", key);
  const set = async (ipv4: string) => (await s.api("POST", "/api/v2/device/2/ip", { ipv4 })).status;
  expect(await set("100.64.0.77")).toBe(200);
  await until(() => watcher.peer("web")?.Addresses?.includes("100.64.0.77/32"), "the new address");
  expect((await s.api("GET", "/api/v2/device/2")).body.addresses).toContain("100.64.0.77");
  for (const [ipv4, status] of [
    ["100.64.0.77", 200],
    ["100.64.0.1", 409],
    ["192.0.2.1", 400],
    ["100.100.100.100", 400],
    ["fd7a:115c:a1e0::9", 400],
    ["web", 400],
  ] as const)
    expect([ipv4, await set(ipv4)]).toEqual([ipv4, status]);
});

test("a name that an administrator has set is no node's to set, anywhere, until the last of it is taken away", async () => {
  await using server = await TestServer.start();
  const api = client(server, (await server.admin<{ apiKey: string }>("POST", "/apikey", {})).apiKey);
  const key = await server.key({ user: await server.user("alice"), reusable: true });
  const [one, two] = [await server.join("one", key), await server.join("two", key)];
  const tell = async (node: typeof one, Update: object) => {
    const body = { Version: 138, NodeKey: node.nodeKey, Update };
    const request = { method: "PATCH" as "POST", path: "/machine/set-device-attr", body: JSON.stringify(body) };
    return (await node.client.request(request, 1 << 20, 60_000)).status;
  };
  const of = async (id: number) => {
    const { attributes } = (await api("GET", `/api/v2/device/${id}/attributes`)).body as { attributes: object };
    return Object.entries(attributes).filter(([name]) => name.startsWith("custom:"));
  };
  const path = (id: number) => `/api/v2/device/${id}/attributes/custom:trusted`;
  expect(await tell(two, { "custom:trusted": true, "custom:desk": 7 })).toBe(200);
  expect((await api("POST", path(1), { value: true })).status).toBe(200);
  expect([await of(1), await of(2)]).toEqual([[["custom:trusted", true]], [["custom:desk", 7]]]);
  for (const node of [one, two])
    for (const value of [true, null]) expect(await tell(node, { "custom:desk": 8, "custom:trusted": value })).toBe(403);
  expect([await of(1), await of(2)]).toEqual([[["custom:trusted", true]], [["custom:desk", 7]]]);
  await api("POST", path(2), { value: false });
  await api("DELETE", path(1));
  expect(await tell(one, { "custom:trusted": true })).toBe(403);
  await api("DELETE", path(2));
  expect(await tell(one, { "custom:trusted": true })).toBe(200);
});

test("attributes are what was set and what the node says; those for a time end with it", async () => {
  let now = Date.parse("2027-01-01T00:00:00Z");
  await using server = await TestServer.start({ now: () => now });
  const api = client(server, (await server.admin<{ apiKey: string }>("POST", "/apikey", {})).apiKey);
  const node = await server.join("web", await server.key({ user: await server.user("alice"), expiration: null }));
  await node.lite({ Hostinfo: { Hostname: "web", OS: "linux", IPNVersion: "1.102.5-t1" } });
  const set = (name: string, body: object) => api("POST", `/api/v2/device/1/attributes/custom:${name}`, body);
  const read = async () => (await api("GET", "/api/v2/device/1/attributes")).body;
  await set("tier", { value: "prod" });
  const expiry = "2027-01-01T01:00:00+00:00";
  expect((await set("oncall", { value: true, expiry })).body).toMatchObject({
    attributes: { "custom:tier": "prod", "custom:oncall": true, "node:os": "linux", "node:tsVersion": "1.102.5" },
    expiries: { "custom:oncall": "2027-01-01T01:00:00.000Z" },
  });
  expect((await set("late", { value: 1, expiry: "2026-12-31T23:59:59Z" })).status).toBe(400);
  expect((await set("never", { value: 1, expiry: "tomorrow" })).status).toBe(400);
  now += 3_600_000 - 1;
  await server.control.tick();
  expect((await read()).attributes).toMatchObject({ "custom:oncall": true });
  now += 1;
  await server.control.tick();
  expect((await read()).attributes).not.toHaveProperty("custom:oncall");
  expect((await read()).expiries).toEqual({});
  // What is set anew without an end has none.
  await set("oncall", { value: true, expiry: "2027-02-01T00:00:00Z" });
  await set("oncall", { value: true });
  now += 60 * 86_400_000;
  await server.control.tick();
  expect((await read()).attributes).toMatchObject({ "custom:oncall": true, "custom:tier": "prod" });
});

test("users are deleted with their devices, suspended and restored; all are approved", async () => {
  await using s = await start();
  await s.server.join("web", await s.server.key({ user: await s.server.user("alice") }));
  await s.server.user("bob");
  const post = async (path: string) => (await s.api("POST", `/api/v2/users/${path}`)).status;
  const seen = async (path: string, field: string) => (await s.api("GET", path)).body[field];
  expect([await post("1/approve"), await post("9/approve")]).toEqual([200, 404]);
  expect([await post("1/suspend"), await post("1/suspend"), await post("9/suspend")]).toEqual([200, 200, 404]);
  expect(await seen("/api/v2/users/1", "status")).toBe("suspended");
  expect(await seen(`${T}/keys/1`, "invalid")).toBe(true);
  expect([await post("1/restore"), await post("9/restore")]).toEqual([200, 404]);
  expect(await seen("/api/v2/users/1", "status")).toBe("active");
  expect((await (await oauthClient(s, ["users:read"])).bearer("POST", "/api/v2/users/1/suspend")).status).toBe(403);
  expect([await post("1/delete"), await post("2/delete"), await post("2/delete")]).toEqual([200, 200, 404]);
  expect([(await s.api("GET", "/api/v2/device/1")).status, s.server.control.stats().nodes]).toEqual([404, 0]);
});

test("what the hosted service has and this server has not is refused with the reason", async () => {
  await using s = await start();
  for (const path of [`${T}/acl/preview`, `${T}/services/svc:web`, `${T}/logging/network/stream`]) {
    const { status, body } = await s.api("GET", path);
    expect([path, status, String(body.message).length > 20]).toEqual([path, 501, true]);
  }
  expect((await s.api("GET", `${T}/nonsense`)).status).toBe(404);
});

test("users are told with their devices", async () => {
  await using s = await start();
  const user = await s.server.user("alice");
  await s.server.user("bob");
  await (await s.server.join("web", await s.server.key({ user }))).stream();
  expect((await s.api("GET", "/api/v2/users/1")).body).toMatchObject({
    id: "1",
    loginName: "alice",
    deviceCount: 1,
    currentlyConnected: true,
    status: "active",
  });
  expect((await s.api("GET", `${T}/users?role=member`)).body.users).toHaveLength(2);
  expect((await s.api("GET", `${T}/users?role=owner`)).body.users).toEqual([]);
  expect((await s.api("GET", "/api/v2/users/9")).status).toBe(404);

  const reader = await oauthClient(s, ["users:read"]);
  const promote = (api: typeof s.api, role: string, user = "1") => api("POST", `/api/v2/users/${user}/role`, { role });
  expect((await promote(reader.bearer, "owner")).status).toBe(403);
  expect([await promote(s.api, "emperor"), await promote(s.api, "admin", "9")].map((r) => r.status)).toEqual([
    400, 404,
  ]);
  expect((await promote(s.api, "it-admin")).status).toBe(200);
  expect((await s.api("GET", `${T}/users?role=it-admin`)).body.users).toMatchObject([{ id: "1" }]);
});

test("a pre-auth key made here lets a node in, and is revoked for good", async () => {
  await using s = await start(POLICY);
  const create = (more: object) =>
    s.api("POST", `${T}/keys`, { description: "ci", expirySeconds: 3600, capabilities: { devices: { create: more } } });
  expect((await create({ reusable: true })).status).toBe(400);
  const made = (await create({ reusable: true, preauthorized: true, tags: ["tag:k8s"] })).body as unknown as ApiKeyV2;
  expect(made).toMatchObject({
    id: "1",
    keyType: "auth",
    description: "ci",
    expirySeconds: 3600,
    invalid: false,
    capabilities: { devices: { create: { reusable: true, ephemeral: false, preauthorized: true, tags: ["tag:k8s"] } } },
  });
  await s.server.join("pod", made.key!);
  const read = async () => (await s.api("GET", `${T}/keys/1`)).body as unknown as ApiKeyV2;
  expect((await read()).key).toBeUndefined();
  expect((await s.api("DELETE", `${T}/keys/1`)).status).toBe(200);
  expect(await read()).toMatchObject({ invalid: true, revoked: expect.any(String) });
  expect((await s.api("GET", `${T}/keys?all=true`)).body.keys).toMatchObject([{ id: "1", invalid: true }]);
  const [listed] = (await s.server.admin<{ preAuthKeys: ApiPreAuthKey[] }>("GET", "/preauthkey")).preAuthKeys;
  expect(Date.parse(listed!.expiration!)).toBeLessThanOrEqual(Date.now());
  const refused = await s.server.node("late").register({ authKey: made.key! });
  expect(refused.Error).toContain("revoked");
  expect((await s.api("DELETE", `${T}/keys/9`)).status).toBe(404);
});

test("a revoked key is known for a week, and then forgotten; its nodes stay", async () => {
  let now = Date.now();
  const settings = makeSettings({ policy: { mode: "database", path: "" } });
  await using server = await TestServer.start({ settings, now: () => now });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  const api = client(server, apiKey);
  const capabilities = { devices: { create: { reusable: true, tags: ["tag:a"] } } };
  const made = (await api("POST", `${T}/keys`, { capabilities })).body as unknown as ApiKeyV2;
  await server.join("web", made.key!);
  await api("DELETE", `${T}/keys/1`);
  now += settings.preAuthKeys.revokedRetention - 1;
  await server.control.tick();
  expect((await api("GET", `${T}/keys/1`)).status).toBe(200);
  now += 1;
  await server.control.tick();
  expect((await api("GET", `${T}/keys/1`)).status).toBe(404);
  expect((await api("GET", "/api/v2/device/1")).status).toBe(200);
});

test("a token is good for an hour, for what its client may, and for the part of it that was asked for", async () => {
  await using s = await start(POLICY);
  const c = await oauthClient(s, ["devices:core", "users:read"], ["tag:operator"]);
  expect(c.made.body).toMatchObject({
    keyType: "client",
    scopes: ["devices:core", "users:read"],
    tags: ["tag:operator"],
  });
  expect(c.secret).toMatch(/^hskey-client-[0-9a-f]{12}-[0-9a-f]{64}$/);
  expect((await c.token()).body).toEqual({
    access_token: expect.stringMatching(/^hskey-oauthtok-[0-9a-f]{12}-[0-9a-f]{64}$/),
    token_type: "Bearer",
    expires_in: 3600,
    scope: "devices:core users:read",
  });
  expect((await c.bearer("GET", `${T}/users`)).status).toBe(200);
  const part = client(
    s.server,
    (await c.token({ scope: "devices:core:read", tags: "tag:k8s" })).body.access_token as string,
  );
  expect((await part("GET", `${T}/devices`)).status).toBe(200);
  expect((await part("DELETE", "/api/v2/device/1")).status).toBe(403);
  expect((await part("GET", `${T}/users`)).status).toBe(403);
  expect((await c.token({ scope: "dns" })).body).toMatchObject({ error: "invalid_scope", status: 403 });
  expect((await c.token({ tags: "tag:other" })).status).toBe(403);
  expect((await c.token({ grant_type: "password" })).body).toMatchObject({
    error: "unsupported_grant_type",
    status: 400,
  });
  expect((await c.token({ client_secret: `${c.secret.slice(0, -1)}x` })).body).toMatchObject({
    error: "invalid_client",
  });
  const basic = Buffer.from(`${c.id}:${c.secret}`).toString("base64");
  const byBasic = await client(s.server)("POST", "/api/v2/oauth/token", "grant_type=client_credentials", {
    Authorization: `Basic ${basic}`,
  });
  expect(byBasic.status).toBe(200);
  const ofClient = { client_id: "some-client-id", client_secret: c.secret.replace(/^hs/, "ts") };
  expect((await c.token(ofClient)).status).toBe(200);
  expect((await c.token({ ...ofClient, client_secret: c.secret })).status).toBe(401);
  expect((await c.token({ ...ofClient, client_secret: `${ofClient.client_secret.slice(0, -1)}x` })).status).toBe(401);
  // Headscale's API and its keys are for administrators.
  expect((await c.bearer("GET", "/api/v1/node")).status).toBe(403);
});

test("tokens end with their hour, their client, and what the client may", async () => {
  let now = Date.now();
  const server = await TestServer.start({ now: () => now });
  await using s = {
    server,
    apiKey: "",
    api: client(server, (await server.admin<{ apiKey: string }>("POST", "/apikey", {})).apiKey),
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
  const c = await oauthClient(s, ["users", "dns"]);
  const users = async () => (await c.bearer("GET", `${T}/users`)).status;
  expect(await users()).toBe(200);
  expect((await s.api("PUT", `${T}/keys/${c.id}`, { keyType: "client", scopes: ["dns"] })).status).toBe(200);
  expect(await users()).toBe(403);
  expect((await s.api("PUT", `${T}/keys/${c.id}`, { keyType: "client", scopes: ["users"] })).status).toBe(200);
  expect(await users()).toBe(200);
  now += 3_599_000;
  expect(await users()).toBe(200);
  now += 1_000;
  expect(await users()).toBe(401);
  const again = client(server, (await c.token()).body.access_token as string);
  expect((await again("GET", `${T}/users`)).status).toBe(200);
  expect((await s.api("DELETE", `${T}/keys/${c.id}`)).status).toBe(200);
  expect((await again("GET", `${T}/users`)).status).toBe(401);
  expect((await c.token()).status).toBe(401);
});

test("a client makes keys for tags that it has or owns, and hands on no more than it may", async () => {
  await using s = await start(POLICY);
  expect((await s.api("POST", `${T}/keys`, { keyType: "client", scopes: ["auth_keys"] })).status).toBe(400);
  expect((await s.api("POST", `${T}/keys`, { keyType: "client", scopes: ["everything"] })).status).toBe(400);
  expect((await s.api("POST", `${T}/keys`, { keyType: "client", scopes: [] })).status).toBe(400);
  const c = await oauthClient(s, ["auth_keys", "oauth_keys", "devices:core"], ["tag:operator"]);
  const key = async (tags: string[]) =>
    (await c.bearer("POST", `${T}/keys`, { capabilities: { devices: { create: { tags } } } })).status;
  expect([await key(["tag:operator"]), await key(["tag:k8s"]), await key(["tag:other"]), await key([])]).toEqual([
    200, 200, 403, 400,
  ]);
  const give = async (scopes: string[], tags: string[]) =>
    (await c.bearer("POST", `${T}/keys`, { keyType: "client", scopes, tags })).status;
  expect([await give(["devices:core:read"], []), await give(["all"], ["tag:k8s"])]).toEqual([200, 403]);
  expect([await give(["auth_keys"], ["tag:k8s"]), await give(["auth_keys"], ["tag:other"])]).toEqual([200, 403]);
  // What the client loses, its tokens lose as well.
  const narrow = await oauthClient(s, ["auth_keys"], ["tag:operator", "tag:other"]);
  const other = async () =>
    (await narrow.bearer("POST", `${T}/keys`, { capabilities: { devices: { create: { tags: ["tag:other"] } } } }))
      .status;
  expect(await other()).toBe(200);
  const less = { keyType: "client", scopes: ["auth_keys"], tags: ["tag:operator"] };
  expect((await s.api("PUT", `${T}/keys/${narrow.id}`, less)).status).toBe(200);
  expect(await other()).toBe(403);
  await s.server.join("pod", await s.server.key({ aclTags: ["tag:k8s"] }));
  const retag = async (tags: string[]) => (await c.bearer("POST", "/api/v2/device/1/tags", { tags })).status;
  expect([await retag(["tag:operator"]), await retag(["tag:other"])]).toEqual([200, 403]);
});

test("a client takes away keys that it could have made; keys of users need the scope of everything", async () => {
  await using s = await start(POLICY);
  await s.server.key({ user: await s.server.user("alice") });
  await s.server.key({ aclTags: ["tag:k8s"] });
  await s.server.key({ aclTags: ["tag:other"] });
  const narrow = await oauthClient(s, ["auth_keys"], ["tag:operator"]);
  const revoke = async (caller: typeof narrow, id: number) => (await caller.bearer("DELETE", `${T}/keys/${id}`)).status;
  expect([await revoke(narrow, 1), await revoke(narrow, 2), await revoke(narrow, 3)]).toEqual([403, 200, 403]);
  const invalid = async (id: number) => (await s.api("GET", `${T}/keys/${id}`)).body.invalid;
  expect([await invalid(1), await invalid(2), await invalid(3)]).toEqual([false, true, false]);
  expect(await revoke(await oauthClient(s, ["all"], ["tag:operator"]), 1)).toBe(200);
  expect(await invalid(1)).toBe(true);
});

test("each scope opens what belongs to it and nothing else; :read only reads", async () => {
  await using s = await start();
  const probes: [scope: string, method: string, path: string, body?: unknown][] = [
    ["policy_file", "POST", `${T}/acl`, POLICY],
    ["policy_file:read", "GET", `${T}/acl`],
    ["feature_settings", "PATCH", `${T}/settings`, {}],
    ["feature_settings:read", "GET", `${T}/settings`],
    ["account_settings", "PATCH", `${T}/contacts/support`, { email: "ops@example.com" }],
    ["account_settings:read", "GET", `${T}/contacts`],
    ["devices:core", "POST", "/api/v2/device/1/authorized", { authorized: true }],
    ["devices:core:read", "GET", `${T}/devices`],
    ["devices:routes", "POST", "/api/v2/device/1/routes", { routes: [] }],
    ["devices:routes:read", "GET", "/api/v2/device/1/routes"],
    ["users:read", "GET", `${T}/users`],
    ["auth_keys:read", "GET", `${T}/keys/1`],
    ["dns", "POST", `${T}/dns/preferences`, { magicDNS: true }],
    ["dns:read", "GET", `${T}/dns/preferences`],
    ["webhooks", "POST", `${T}/webhooks`, { endpointUrl: "http://127.0.0.1:9/", subscriptions: ["nodeCreated"] }],
    ["webhooks:read", "GET", `${T}/webhooks`],
  ];
  await s.server.join("web", await s.server.key({ user: await s.server.user("alice") }));
  for (const scope of ["all", "all:read", ...probes.map(([needed]) => needed)]) {
    const { bearer } = await oauthClient(s, [scope], ["tag:operator"]);
    const opened: string[] = [];
    for (const [needed, method, path, body] of probes)
      if ((await bearer(method, path, body)).status === 200) opened.push(needed);
    const expected = probes
      .map(([needed]) => needed)
      .filter(
        (needed) =>
          scope === "all" ||
          needed === scope ||
          needed === `${scope}:read` ||
          (scope === "all:read" && needed.endsWith(":read")),
      );
    expect([scope, opened]).toEqual([scope, expected]);
  }
});

test("every operation needs a scope, but those that look at the scopes themselves and the one that gives tokens", async () => {
  await using s = await start();
  const { paths } = (await s.api("GET", "/api/v2/openapi.json")).body as {
    paths: Record<string, Record<string, { operationId: string; description?: string }>>;
  };
  const open = Object.values(paths)
    .flatMap((methods) => Object.values(methods))
    .filter(({ description }) => !description?.includes("scope"))
    .map(({ operationId }) => operationId);
  expect(open.sort()).toEqual(["createKey", "deleteKey", "getAccessToken", "getKey", "listTailnetKeys"]);
  const nothing = await oauthClient(s, ["dns:read"]);
  const key = (await s.api("POST", `${T}/keys`, { capabilities: { devices: { create: { tags: ["tag:a"] } } } })).body;
  for (const [method, path, body] of [
    ["GET", `${T}/keys`],
    ["GET", `${T}/keys/${key.id}`],
    ["GET", `${T}/keys/${nothing.id}`],
    ["DELETE", `${T}/keys/${key.id}`],
    ["DELETE", `${T}/keys/${nothing.id}`],
    ["GET", `${T}/keys/none`],
    ["POST", `${T}/keys`, { capabilities: { devices: { create: { tags: ["tag:a"] } } } }],
    ["POST", `${T}/keys`, { keyType: "client", scopes: ["dns:read"] }],
    ["PUT", `${T}/keys/${nothing.id}`, { keyType: "client", scopes: ["dns"] }],
  ] as const)
    expect([method, path, (await nothing.bearer(method, path, body)).status]).toEqual([method, path, 403]);
});
