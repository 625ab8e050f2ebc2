import { afterEach, expect, test } from "bun:test";
import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { dnsConfigOf, dnsFor, ExtraRecordsFile, parseRecords, reverseZones } from "./dns.ts";
import type { DnsSettings, ExtraRecord } from "./settings.ts";
import { makeConfig, makeNode, makeSettings, TestServer, until } from "./testing.ts";

function dns(more: Partial<DnsSettings>, extra: ExtraRecord[] = []) {
  const settings = makeSettings();
  return dnsConfigOf({ ...settings, dns: { ...settings.dns, ...more } }, extra);
}

const folders: string[] = [];
function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "weft-dns-"));
  folders.push(path);
  return path;
}
afterEach(() => {
  for (const path of folders.splice(0)) rmSync(path, { recursive: true, force: true });
});

test("MagicDNS answers the base domain and the reverse zones itself: empty lists, which no client loses", () => {
  const config = dns({});
  expect(config).toMatchObject({ Proxied: true, Domains: ["net.test"], ExitNodeFilteredSet: [".net.test"] });
  const zones = Object.keys(config.Routes!);
  expect(zones).toHaveLength(65);
  expect(zones).toContain("64.100.in-addr.arpa");
  expect(zones).toContain("127.100.in-addr.arpa");
  expect(zones).toContain("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa");
  expect(new Set(Object.values(config.Routes!).map((list) => JSON.stringify(list)))).toEqual(new Set(["[]"]));
  expect(config.Resolvers ?? config.FallbackResolvers).toBeUndefined();
  expect(dns({ magicDns: false })).toMatchObject({ Proxied: false, Routes: {} });
});

test("reverse zones follow the tailnet's prefixes, cut at labels", () => {
  expect(reverseZones({ v4: "100.64.0.0/16", v6: null })).toEqual(["64.100.in-addr.arpa"]);
  expect(reverseZones({ v4: "100.99.4.0/23", v6: null })).toEqual(["4.99.100.in-addr.arpa", "5.99.100.in-addr.arpa"]);
  expect(reverseZones({ v4: null, v6: "fd7a:115c:a1e0:8000::/50" })).toEqual([
    "8.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa",
    "9.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa",
    "a.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa",
    "b.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa",
  ]);
});

test("nameservers replace the local ones or stand in for them; split domains, search order, exit nodes", () => {
  const nameservers = ["1.1.1.1", "https://dns.example/dns-query"];
  const replacing = dns({
    overrideLocalDns: true,
    nameservers,
    split: { "Corp.Example.": ["10.0.0.53"] },
    searchDomains: ["corp.example"],
    useWithExitNode: ["10.0.0.53"],
  });
  expect(replacing.Resolvers).toEqual([{ Addr: "1.1.1.1" }, { Addr: "https://dns.example/dns-query" }]);
  expect(replacing.FallbackResolvers).toBeUndefined();
  expect(replacing.Routes!["corp.example"]).toEqual([{ Addr: "10.0.0.53", UseWithExitNode: true }]);
  expect(replacing.Domains).toEqual(["net.test", "corp.example"]);
  expect(dns({ nameservers }).FallbackResolvers).toHaveLength(2);
  expect(dns({ nameservers }).Resolvers).toBeUndefined();
});

test("names of extra records that no other route covers are routed to the client itself, unless it is asked for all", () => {
  const extra = [
    { name: "grafana.net.test", type: "A", value: "100.64.0.3" },
    { name: "wiki.example.", type: "", value: "fd7a:115c:a1e0::3" },
    { name: "x.corp.example", type: "A", value: "100.64.0.4" },
  ];
  const split = { "corp.example": ["10.0.0.53"] };
  const config = dns({ split }, extra);
  expect(config.ExtraRecords).toEqual([
    { Name: "grafana.net.test", Type: "A", Value: "100.64.0.3" },
    { Name: "wiki.example", Type: "", Value: "fd7a:115c:a1e0::3" },
    { Name: "x.corp.example", Type: "A", Value: "100.64.0.4" },
  ]);
  const named = (routes: object) => Object.keys(routes).filter((name) => !name.endsWith(".arpa"));
  expect(named(config.Routes!)).toEqual(["corp.example", "wiki.example"]);
  expect(named(dns({ overrideLocalDns: true, nameservers: ["9.9.9.9"] }, extra).Routes!)).toEqual([]);
});

test("NextDNS is told of the device and asked for the profile that the node's attributes name", () => {
  const shared = dns({ nameservers: ["https://dns.nextdns.io/abc123", "https://dns.nextdns.io.evil.example/x"] });
  const config = makeConfig({ dns: shared });
  const addresses = (capMap: Record<string, null>) =>
    dnsFor(config, makeNode(5), capMap).FallbackResolvers!.map(({ Addr }) => Addr);
  const device = "device_name=host-5&device_model=linux&device_ip=100.64.0.5";
  const other = "https://dns.nextdns.io.evil.example/x";
  expect(addresses({})).toEqual([`https://dns.nextdns.io/abc123?${device}`, other]);
  expect(addresses({ "nextdns:zed": null, "nextdns:kids": null })).toEqual([
    `https://dns.nextdns.io/kids?${device}`,
    other,
  ]);
  expect(addresses({ "nextdns:no-device-info": null, "nextdns:../x": null })).toEqual([
    "https://dns.nextdns.io/abc123",
    other,
  ]);
});

test("a node is told of no more than the shared configuration, unless it can get a certificate", () => {
  const config = makeConfig();
  expect(dnsFor(config, makeNode(1), {})).toBe(config.dns);
  expect(dnsFor({ ...config, certificates: true }, makeNode(1), {}).CertDomains).toEqual(["host-1.net.test"]);
});

test("extra records that clients would pass over are refused with the reason", () => {
  const parse = (...records: object[]) => parseRecords(JSON.stringify(records));
  expect(parse({ name: "a.test", value: "100.64.0.1" }, { name: "b.test", type: "aaaa", value: "FD7A::1" })).toEqual([
    { name: "a.test", type: "", value: "100.64.0.1" },
    { name: "b.test", type: "AAAA", value: "fd7a::1" },
  ]);
  expect(() => parse({ name: "a.test", type: "CNAME", value: "b.test" })).toThrow('the types A and AAAA, not "CNAME"');
  expect(() => parse({ name: "a.test", type: "AAAA", value: "100.64.0.1" })).toThrow("no address for type AAAA");
  expect(() => parse({ name: "a..test", value: "100.64.0.1" })).toThrow("no DNS name");
  expect(() => parse({ name: "a.test", value: "100.64.0.1", ttl: 5 })).toThrow("record 0");
  expect(() => parseRecords("{}")).toThrow("expected array");
  expect(() => parseRecords("[")).toThrow("it is not JSON");
});

test("the file of extra records may be edited, replaced, removed and made anew; while it is wrong the last ones hold", async () => {
  const path = join(folder(), "records.json");
  const write = (...values: string[]) =>
    writeFileSync(path, JSON.stringify(values.map((value) => ({ name: "x.test", type: "A", value }))));
  write("100.64.0.1");
  const seen: string[] = [];
  const lines: string[] = [];
  const file = new ExtraRecordsFile({
    path,
    changed: (records) => void seen.push(records.map(({ value }) => value).join()),
    log: (line) => void lines.push(line),
    note: () => {},
    every: 20,
  });
  try {
    expect(seen).toEqual(["100.64.0.1"]);
    write("100.64.0.1", "100.64.0.2");
    await until(() => seen.at(-1) === "100.64.0.1,100.64.0.2", "the edit");
    writeFileSync(path, '[{"name": 5}]');
    await until(() => lines.some((line) => line.includes("the extra records before stay in force")), "the complaint");
    rmSync(path);
    await until(() => lines.some((line) => line.includes("cannot be read")), "the second complaint");
    expect(seen).toHaveLength(2);
    write("100.64.0.3");
    await until(() => seen.at(-1) === "100.64.0.3", "the new file");
    writeFileSync(`${path}.new`, JSON.stringify([{ name: "x.test", value: "100.64.0.4" }]));
    renameSync(`${path}.new`, path);
    await until(() => seen.at(-1) === "100.64.0.4", "the replaced file");
  } finally {
    file.close();
  }
  expect(
    () => new ExtraRecordsFile({ path: `${path}.none`, changed: () => {}, log: () => {}, note: () => {} }),
  ).toThrow("cannot be read");
});

test("an open map stream hears of new extra records alone, and not when they are the same", async () => {
  const path = join(folder(), "records.json");
  writeFileSync(path, "[]");
  const settings = makeSettings();
  await using server = await TestServer.start({
    settings: { ...settings, dns: { ...settings.dns, extraRecordsPath: path } },
  });
  const node = await server.join("a", await server.key({ user: await server.user("alice") }));
  const map = await node.stream();
  expect(map.dns!.ExtraRecords).toBeUndefined();
  writeFileSync(path, JSON.stringify([{ name: "x.net.test", type: "A", value: "100.64.0.9" }]));
  await until(() => map.dns!.ExtraRecords?.length === 1, "the record");
  expect(Object.keys(map.messages.at(-1)!)).toEqual(["DNSConfig"]);
});
