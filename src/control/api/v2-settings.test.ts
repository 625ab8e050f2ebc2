// What can be chosen over /api/v2 in place of the configuration.
import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ControlSettings, DnsSettings } from "../settings.ts";
import { makeSettings, TestServer, until } from "../testing.ts";
import { client } from "./testing.ts";

const T = "/api/v2/tailnet/-";

function withDns(more: Partial<DnsSettings>): ControlSettings {
  const settings = makeSettings();
  return { ...settings, dns: { ...settings.dns, ...more } };
}

async function start(settings: ControlSettings, dataDir?: string) {
  const log: string[] = [];
  const server = await TestServer.start({
    settings,
    log: (line) => log.push(line),
    ...(dataDir !== undefined && { dataDir }),
  });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  return { server, log, api: client(server, apiKey), [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

const CONFIGURED = { nameservers: ["9.9.9.9"], split: { "corp.test": ["10.0.0.53"] }, searchDomains: ["corp.test"] };

test("DNS is read as it is configured", async () => {
  await using s = await start(withDns({ ...CONFIGURED, overrideLocalDns: true, useWithExitNode: ["10.0.0.53"] }));
  const get = async (what: string) => (await s.api("GET", `${T}/dns/${what}`)).body;
  expect(await get("nameservers")).toEqual({ dns: ["9.9.9.9"] });
  expect(await get("preferences")).toEqual({ magicDNS: true });
  expect(await get("searchpaths")).toEqual({ searchPaths: ["corp.test"] });
  expect(await get("split-dns")).toEqual({ "corp.test": ["10.0.0.53"] });
  expect(await get("configuration")).toEqual({
    nameservers: [{ address: "9.9.9.9" }],
    splitDNS: { "corp.test": [{ address: "10.0.0.53", useWithExitNode: true }] },
    searchPaths: ["corp.test"],
    preferences: { overrideLocalDNS: true, magicDNS: true },
  });
});

test("each part of DNS is set, and connected nodes have it at once", async () => {
  await using s = await start(withDns(CONFIGURED));
  const node = await s.server.join("web", await s.server.key({ user: await s.server.user("alice") }));
  const map = await node.stream();
  const told = (check: () => unknown, what: string) => until(() => Boolean(check()), what);
  const set = (method: string, what: string, body: unknown) => s.api(method, `${T}/dns/${what}`, body);
  expect((await set("POST", "nameservers", { dns: ["1.1.1.1", "https://doh.test/dns-query"] })).body).toEqual({
    dns: ["1.1.1.1", "https://doh.test/dns-query"],
    magicDNS: true,
  });
  await told(() => map.dns?.FallbackResolvers?.length === 2, "the name servers");
  expect((await set("POST", "searchpaths", { searchPaths: ["dev.test"] })).body).toEqual({ searchPaths: ["dev.test"] });
  await told(() => map.dns?.Domains?.includes("dev.test"), "the search domain");
  const patched = await set("PATCH", "split-dns", { "dev.test": ["10.1.0.53"], "corp.test": null });
  expect(patched.body).toEqual({ "dev.test": ["10.1.0.53"] });
  await told(() => map.dns?.Routes?.["dev.test"]?.[0]?.Addr === "10.1.0.53", "the route");
  expect(Object.keys(map.dns?.Routes ?? {})).not.toContain("corp.test");
  expect((await set("PUT", "split-dns", { "a.test": ["10.2.0.53"], "b.test": [] })).body).toEqual({
    "a.test": ["10.2.0.53"],
  });
  expect((await set("POST", "preferences", { magicDNS: false })).body).toEqual({ magicDNS: false });
  await told(() => map.dns?.Proxied === false, "the end of MagicDNS");
  const whole = {
    nameservers: [{ address: "8.8.8.8", useWithExitNode: true }, { address: "1.1.1.1" }],
    splitDNS: { "b.test": [{ address: "8.8.8.8", useWithExitNode: true }] },
    searchPaths: ["b.test"],
    preferences: { overrideLocalDNS: true, magicDNS: true },
  };
  const sorted = { ...whole, nameservers: [{ address: "1.1.1.1" }, { address: "8.8.8.8", useWithExitNode: true }] };
  expect((await set("POST", "configuration", whole)).body).toEqual(sorted);
  await told(() => map.dns?.Resolvers, "the resolvers in place of the node's own");
  expect(map.dns).toMatchObject({
    Resolvers: [{ Addr: "8.8.8.8", UseWithExitNode: true }, { Addr: "1.1.1.1" }],
    Proxied: true,
  });
  // What Go's client sends for a configuration that is gone.
  expect((await set("POST", "configuration", { preferences: {} })).body).toEqual({
    nameservers: [],
    splitDNS: {},
    searchPaths: [],
    preferences: { overrideLocalDNS: false, magicDNS: false },
  });
});

test("what is no address and no domain is refused by name, and changes nothing", async () => {
  await using s = await start(withDns(CONFIGURED));
  const wrong: [method: string, what: string, body: unknown, detail: string][] = [
    ["POST", "nameservers", { dns: ["9.9.9.9", "dns.test"] }, "dns.1: must be an IP address"],
    ["POST", "searchpaths", { searchPaths: ["a b"] }, "searchPaths.0: must be a domain"],
    ["PUT", "split-dns", { "..": ["9.9.9.9"] }, '".." is no domain'],
    ["PATCH", "split-dns", { "a.test": ["https://"] }, "a.test.0: must be an IP address"],
    ["POST", "configuration", { nameservers: [{ address: "x" }] }, "nameservers.0.address"],
    [
      "POST",
      "configuration",
      {
        nameservers: [{ address: "1.1.1.1" }],
        splitDNS: { "a.test": [{ address: "1.1.1.1", useWithExitNode: true }] },
      },
      "1.1.1.1 is listed with useWithExitNode and without",
    ],
  ];
  for (const [method, what, body, detail] of wrong) {
    const answer = await s.api(method, `${T}/dns/${what}`, body);
    expect([what, answer.status, answer.body.message]).toEqual([what, 400, expect.stringContaining(detail)]);
  }
  expect((await s.api("GET", `${T}/dns/nameservers`)).body).toEqual({ dns: ["9.9.9.9"] });
});

test("approval, updates and lifetime of keys are chosen for nodes that join; all else is refused by name", async () => {
  await using s = await start(makeSettings());
  const patch = (body: object) => s.api("PATCH", `${T}/settings`, body);
  expect((await s.api("GET", `${T}/settings`)).body).toMatchObject({
    devicesApprovalOn: false,
    devicesKeyDurationDays: 0,
    aclsExternallyManagedOn: true,
  });
  const user = await s.server.user("alice");
  const early = await s.server.join("early", await s.server.key({ user }));
  const map = await early.stream();
  expect(
    (await patch({ devicesApprovalOn: true, devicesAutoUpdatesOn: true, devicesKeyDurationDays: 30 })).body,
  ).toEqual(
    expect.objectContaining({ devicesApprovalOn: true, devicesAutoUpdatesOn: true, devicesKeyDurationDays: 30 }),
  );
  await until(() => map.self?.CapMap?.["default-auto-update"]?.[0] === true, "the node to hear of updates");
  await s.server.node("late").register({ authKey: await s.server.key({ user }) });
  const device = async (id: number) => (await s.api("GET", `/api/v2/device/${id}`)).body;
  expect((await device(1)).authorized).toBe(true);
  expect(await device(2)).toMatchObject({ authorized: false, keyExpiryDisabled: false });
  const left = Date.parse((await device(2)).expires as string) - Date.now();
  expect(left).toBeGreaterThan(29.9 * 86_400_000);
  expect(left).toBeLessThanOrEqual(30 * 86_400_000);
  expect((await patch({ devicesApprovalOn: false, devicesKeyDurationDays: 0 })).status).toBe(200);
  await s.server.join("last", await s.server.key({ user }));
  expect(await device(3)).toMatchObject({ authorized: true, keyExpiryDisabled: true });
  for (const [name, value] of Object.entries({
    aclsExternallyManagedOn: false,
    httpsEnabled: true,
    networkFlowLoggingOn: true,
    usersApprovalOn: true,
  })) {
    const answer = await patch({ [name]: value, devicesApprovalOn: true });
    expect([answer.status, answer.body.message]).toEqual([501, expect.stringContaining(name)]);
  }
  expect((await patch({ networkFlowLoggingOn: false, aclsExternalLink: null })).status).toBe(200);
  expect((await s.api("GET", `${T}/settings`)).body).toMatchObject({ devicesApprovalOn: false });
});

test("what was chosen survives a restart, until the configuration says something new", async () => {
  const dataDir = mkdtempSync(join(tmpdir(), "weft-chosen-"));
  try {
    const nameservers = async (settings: ControlSettings, more: (s: Awaited<ReturnType<typeof start>>) => unknown) => {
      const s = await start(settings, dataDir);
      try {
        await more(s);
        return { dns: (await s.api("GET", `${T}/dns/nameservers`)).body.dns, log: s.log };
      } finally {
        await s.server.stop();
      }
    };
    const chosen = ["1.1.1.1"];
    const first = await nameservers(withDns({ nameservers: ["9.9.9.9"] }), ({ api }) =>
      api("POST", `${T}/dns/nameservers`, { dns: chosen }),
    );
    expect(first).toEqual({ dns: chosen, log: [] });
    const again = await nameservers(withDns({ nameservers: ["9.9.9.9"], magicDns: false }), () => {});
    expect(again.dns).toEqual(chosen);
    expect(again.log).toEqual([expect.stringContaining("dns.nameservers.global")]);
    const edited = await nameservers(withDns({ nameservers: ["8.8.8.8"] }), () => {});
    expect(edited.dns).toEqual(["8.8.8.8"]);
    expect(edited.log).toEqual([
      expect.stringMatching(/the configuration says something new of dns\.nameservers\.global/),
    ]);
    // It is forgotten: the old value in the file does not bring it back.
    const back = await nameservers(withDns({ nameservers: ["9.9.9.9"] }), () => {});
    expect(back).toEqual({ dns: ["9.9.9.9"], log: [] });
    // What is chosen as it is configured is no choice.
    await nameservers(withDns({ nameservers: ["9.9.9.9"] }), async ({ api }) => {
      await api("POST", `${T}/dns/nameservers`, { dns: chosen });
      await api("POST", `${T}/dns/nameservers`, { dns: ["9.9.9.9"] });
    });
    expect((await nameservers(withDns({ nameservers: ["9.9.9.9"] }), () => {})).log).toEqual([]);
  } finally {
    rmSync(dataDir, { recursive: true, force: true });
  }
});
