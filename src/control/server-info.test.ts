import { expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Hono } from "hono";
import type { DERPMap } from "../wire/tailcfg.ts";
import { addServerInfo, commitOf, type ServerInfo } from "./server-info.ts";
import { TestServer } from "./testing.ts";

function app(more: Partial<ServerInfo> = {}): Hono {
  const hono = new Hono();
  addServerInfo(hono, { healthy: async () => true, derpMap: () => ({}), now: () => 0, ...more });
  return hono;
}

test("health follows the store, here and in the API", async () => {
  const good = await app().request("/health");
  expect([good.status, good.headers.get("Content-Type"), await good.text()]).toEqual([
    200,
    "application/health+json",
    '{"status":"pass"}',
  ]);
  const bad = await app({ healthy: async () => false }).request("/health");
  expect([bad.status, await bad.text()]).toEqual([500, '{"status":"fail"}']);
  await using server = await TestServer.start();
  expect((await fetch(`${server.url}/health`)).status).toBe(200);
  expect(await server.admin<unknown>("GET", "/health")).toEqual({ databaseConnectivity: true });
  await server.control.close();
  expect((await fetch(`${server.url}/health`)).status).toBe(500);
});

test("version, icon, robots and the captive portal's challenge", async () => {
  expect(await (await app().request("/version")).json()).toMatchObject({
    version: expect.stringMatching(/^weft-\d+\.\d+\.\d+/),
  });
  expect((await app().request("/favicon.ico")).headers.get("Content-Type")).toBe("image/svg+xml");
  expect(await (await app().request("/robots.txt")).text()).toContain("Disallow: /");
  const portal = await app().request("/generate_204", { headers: { "X-Tailscale-Challenge": "ts_1" } });
  expect([portal.status, portal.headers.get("X-Tailscale-Response")]).toEqual([204, "response ts_1"]);
  const forged = await app().request("/generate_204", { headers: { "X-Tailscale-Challenge": "a b" } });
  expect(forged.headers.get("X-Tailscale-Response")).toBeNull();
});

test("the commit of a checkout is known by its branch, loose or packed, or by itself; of anything else there is none", () => {
  const root = mkdtempSync(join(tmpdir(), "weft-commit-"));
  const [a, b] = ["a".repeat(40), "b".repeat(40)];
  try {
    expect(commitOf(root)).toBe("");
    mkdirSync(join(root, ".git/refs/heads"), { recursive: true });
    writeFileSync(join(root, ".git/HEAD"), "ref: refs/heads/main\n");
    expect(commitOf(root)).toBe("");
    writeFileSync(
      join(root, ".git/packed-refs"),
      `# pack-refs with: peeled\n${b} refs/heads/main2\n${a} refs/heads/main\n`,
    );
    expect(commitOf(root)).toBe(a);
    writeFileSync(join(root, ".git/refs/heads/main"), `${b}\n`);
    expect(commitOf(root)).toBe(b);
    writeFileSync(join(root, ".git/HEAD"), `${a}\n`);
    expect(commitOf(root)).toBe(a);
    writeFileSync(join(root, ".git/HEAD"), "<script>\n");
    expect(commitOf(root)).toBe("");
  } finally {
    rmSync(root, { recursive: true });
  }
});

test("bootstrap DNS names the relays' addresses, asks once in ten minutes, and nothing else", async () => {
  let asked = 0;
  let now = 0;
  const region = { RegionID: 1, RegionCode: "a", RegionName: "A" };
  const node = (Name: string, HostName: string) => ({ Name, RegionID: 1, HostName });
  const map: DERPMap = { Regions: { 1: { ...region, Nodes: [node("a", "192.0.2.1"), node("b", "2001:db8::1")] } } };
  const derpMap = () => {
    asked++;
    return map;
  };
  const hono = app({ derpMap, now: () => now });
  for (const at of [0, 599_999, 600_000]) {
    now = at;
    expect(await (await hono.request("/bootstrap-dns?q=evil.example")).json()).toEqual({
      "192.0.2.1": ["192.0.2.1"],
      "2001:db8::1": ["2001:db8::1"],
    });
  }
  expect(asked).toBe(2);
});
