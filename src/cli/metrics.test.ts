import { expect, test } from "bun:test";
import { createDebug } from "../control/debug.ts";
import { TestNode, TestServer } from "../control/testing.ts";
import { randomBytes } from "../crypto/keys.ts";
import { listen } from "../net/listener.ts";
import { createRelay } from "../relay/index.ts";
import { loadConfig } from "./config.ts";
import { createMetricsApp } from "./metrics.ts";

async function start() {
  const server = await TestServer.start();
  const relay = createRelay({ privateKey: randomBytes(32) });
  const config = loadConfig({ env: { HEADSCALE_CLI_API_KEY: "hskey-api-abc-geheim", HEADSCALE_CLI_ADDRESS: "x" } });
  const app = createMetricsApp(config, { control: server.control, relay });
  return {
    server,
    app,
    /** Value of one line of the metrics. */
    async metric(line: string): Promise<number> {
      const found = (await (await app.request("/metrics")).text()).split("\n").find((l) => l.startsWith(`${line} `));
      return Number(found?.slice(line.length + 1));
    },
    async [Symbol.asyncDispose]() {
      relay.close();
      await server[Symbol.asyncDispose]();
    },
  };
}

test("nodes, streams, messages, registrations, failures and writes are counted, in Headscale's names where they fit", async () => {
  await using it = await start();
  const node = new TestNode(it.server.url, "a");
  await node.register({ authKey: "hskey-auth-000000000000-wrong" });
  await node.register({ authKey: await it.server.key({ aclTags: ["tag:a"] }) });
  const map = await node.stream();
  expect(map.self?.Name).toStartWith("a.");
  expect(await it.metric('weft_nodes{state="online"}')).toBe(1);
  expect(await it.metric("headscale_nodestore_nodes")).toBe(1);
  expect(await it.metric("weft_map_streams")).toBe(1);
  expect(await it.metric("weft_noise_connections")).toBeGreaterThan(0);
  expect(await it.metric('headscale_mapresponse_sent_total{type="full",status="ok"}')).toBe(1);
  expect(await it.metric('weft_registrations_total{outcome="ok"}')).toBe(1);
  expect(await it.metric('weft_registrations_total{outcome="refused"}')).toBe(1);
  expect(await it.metric('weft_login_failures_total{what="pre-auth key"}')).toBe(1);
  expect(await it.metric('weft_machine_requests_total{endpoint="map"}')).toBe(1);
  expect(await it.metric("weft_journal_write_seconds_count")).toBeGreaterThan(1);
  expect(await it.metric("headscale_nodestore_batch_size_count")).toBeGreaterThan(1);
  expect(await it.metric('headscale_nodestore_operations_total{operation="put"}')).toBeGreaterThan(0);
  expect(await it.metric("headscale_nodestore_queue_depth")).toBe(0);
  expect(await it.metric('headscale_mapresponse_generated_total{response_type="full"}')).toBe(1);
  expect(await it.metric("process_resident_memory_bytes")).toBeGreaterThan(1e6);
  expect(await it.metric("process_cpu_seconds_total")).toBeGreaterThan(0);
  expect(await it.metric("process_open_fds")).toBeGreaterThan(2);
  expect(await it.metric("derp_bytes_received")).toBe(0);
  expect(await it.metric('derp_packets_dropped{reason="queue_head",kind="disco"}')).toBe(0);
  node.close();
  const deadline = performance.now() + 60_000;
  const ended = () => it.metric('headscale_mapresponse_ended_total{reason="client"}');
  while ((await ended()) !== 1 && performance.now() < deadline) await Bun.sleep(10);
  expect(await ended()).toBe(1);
});

test("the metrics are what Prometheus reads: each name typed once, no label of a node or address", async () => {
  await using it = await start();
  const text = await (await it.app.request("/metrics")).text();
  const types = [...text.matchAll(/^# TYPE (\S+) (counter|gauge|histogram|summary)$/gm)].map(([, name]) => name!);
  expect(new Set(types).size).toBe(types.length);
  for (const line of text.split("\n").filter((l) => l && !l.startsWith("#"))) {
    expect(line).toMatch(/^[a-zA-Z_:][\w:]*(\{[^{}]*\})? (-?[\d.e+-]+|Nan|\+Inf)$/i);
    expect(line).not.toMatch(/mkey:|nodekey:|127\.0\.0\.1/);
  }
});

test("debug pages: for people and programs, without secrets", async () => {
  await using it = await start();
  const node = new TestNode(it.server.url, "a");
  await node.register({ authKey: await it.server.key({ aclTags: ["tag:a"] }) });
  await node.stream();
  const json = async (path: string) =>
    (await it.app.request(path, { headers: { Accept: "application/json" } })).json() as Promise<
      Record<string, unknown>[] & Record<string, unknown>
    >;
  const pages = (await json("/debug/")) as unknown as { path: string }[];
  expect(pages.map(({ path }) => path.slice(7))).toEqual(
    expect.arrayContaining([
      "overview",
      "config",
      "policy",
      "routes",
      "derp",
      "map-streams",
      "logins",
      "connections",
      "relay",
      "nodes",
    ]),
  );
  const ofNode = ["netmap", "filter", "ssh"].map((name) => `/debug/${name}`);
  for (const path of pages.map(({ path }) => (ofNode.includes(path) ? `${path}?node=1` : path))) {
    const page = await it.app.request(path);
    expect([path, page.status, page.headers.get("Content-Type")]).toEqual([path, 200, "text/html; charset=UTF-8"]);
    const text = (await page.text()) + JSON.stringify(await json(path));
    expect(text).not.toMatch(/geheim|privkey:|hskey-auth-/);
  }
  expect(await json("/debug/overview")).toMatchObject({ nodes: 1, maps: 1 });
  expect(await json("/debug/nodes")).toMatchObject([{ name: "a", online: true }]);
  expect(await json("/debug/map-streams")).toMatchObject([{ node: 1 }]);
  expect(await json("/debug/connections")).toMatchObject([
    { machineKey: expect.stringMatching(/^mkey:[0-9a-f]{64}$/), address: "127.0.0.1" },
  ]);
  expect((await json("/debug/config")).set).toMatchObject({ "cli.api_key": "***" });
  node.close();
});

test("the debug page shows what one node is told, and long lists in parts", async () => {
  await using it = await start();
  const key = await it.server.key({ aclTags: ["tag:a"], reusable: true });
  const [a, b] = [new TestNode(it.server.url, "a"), new TestNode(it.server.url, "b")];
  for (const node of [a, b]) await node.register({ authKey: key });
  const json = async (path: string) =>
    (await it.app.request(path, { headers: { Accept: "application/json" } })).json() as Promise<
      Record<string, unknown>
    >;
  expect(await json("/debug/netmap?node=1")).toMatchObject({
    Node: { ID: 1, Name: "a.net.test." },
    Peers: [{ ID: 2, Name: "b.net.test." }],
    DNSConfig: { Proxied: true },
  });
  expect(await json("/debug/filter?node=2")).toMatchObject([{ SrcIPs: ["*"], DstPorts: [expect.anything()] }]);
  expect(await json("/debug/ssh?node=1")).toEqual([] as never);
  for (const query of ["?node=9", "?node=x", "?node=9999999999999999"])
    expect((await it.app.request(`/debug/netmap${query}`)).status).toBe(404);
  expect(await (await it.app.request("/debug/netmap")).text()).toContain('<input name="node"');
  const nodes = await it.app.request("/debug/nodes?from=1", { headers: { Accept: "application/json" } });
  expect([nodes.headers.get("X-Total-Count"), await nodes.json()]).toEqual(["2", [expect.objectContaining({ id: 2 })]]);
  for (const node of [a, b]) node.close();
});

test("a list of many is cut, with a way to the rest", async () => {
  const app = createDebug({ many: { title: "Many", read: () => Array.from({ length: 1200 }, (_, i) => `<${i}>`) } });
  const read = async (query: string) => (await app.request(`/debug/many${query}`)).text();
  const first = await read("");
  expect([first.includes("&lt;499&gt;"), first.includes("&lt;500&gt;")]).toEqual([true, false]);
  expect(first).toContain('<a href="?from=500">The other 700</a>');
  const last = await read("?from=1000");
  expect([last.includes("&lt;1199&gt;"), last.includes("The other")]).toEqual([true, false]);
});

test("HTTP requests are counted by route and class of status, whatever strangers write into a path", async () => {
  await using it = await start();
  const ask = (path: string, headers = {}) => fetch(`${it.server.url}${path}`, { headers });
  const { apiKey } = await it.server.admin<{ apiKey: string }>("POST", "/apikey", {});
  const auth = { Authorization: `Bearer ${apiKey}` };
  await it.server.user("alice");
  for (let i = 0; i < 3; i++) {
    await ask("/health");
    await ask(`/api/v1/node/${i}`, auth);
    await ask(`/api/v1/nothing${i}`, auth);
    await ask(`/stranger-${i}`);
  }
  await ask("/api/v1/user");
  await ask("/api/v1/user", auth);
  const count = (route: string, status: string) =>
    it.metric(`weft_http_request_seconds_count{route="${route}",status="${status}"}`);
  expect(await count("/health", "2xx")).toBe(3);
  expect(await count("/api/v1/node/:id", "4xx")).toBe(3);
  expect(await count("/api/v1/*", "4xx")).toBe(3);
  expect(await count("/*", "4xx")).toBe(3);
  expect([await count("/api/v1/user", "4xx"), await count("/api/v1/user", "2xx")]).toEqual([1, 1]);
  expect(await (await it.app.request("/metrics")).text()).not.toMatch(/stranger|nothing/);
});

test("the debug page is for private addresses only", async () => {
  await using it = await start();
  const listener = await listen({
    host: "127.0.0.1",
    port: 0,
    app: it.app,
    upgrades: {},
    trustedProxies: [{ ip: Uint8Array.of(127, 0, 0, 1), bits: 32 }],
  });
  const status = async (from: string) =>
    (await fetch(`http://127.0.0.1:${listener.port}/debug/`, { headers: { "X-Forwarded-For": from } })).status;
  expect([await status("192.168.1.1"), await status("100.64.0.9"), await status("203.0.113.1")]).toEqual([
    200, 200, 403,
  ]);
  await listener.close();
});
