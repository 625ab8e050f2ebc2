import { describe, expect, test } from "bun:test";
import { parsePrefix } from "../wire/ip.ts";
import { EndpointType } from "../wire/tailcfg.ts";
import { buildEndpoints, RememberedEndpoints } from "./endpoints.ts";
import type { NetcheckReport } from "./netcheck.ts";

const report = (found: Partial<NetcheckReport>): NetcheckReport => ({
  at: 0,
  udp: true,
  ipv4: true,
  ipv6: false,
  ipv4CanSend: true,
  ipv6CanSend: false,
  osHasIPv6: false,
  mappingVaries: null,
  globalV4: null,
  globalV6: null,
  globals: new Map(),
  latency: new Map(),
  latency4: new Map(),
  latency6: new Map(),
  ...found,
});

const build = (
  ips: string[],
  found: Partial<NetcheckReport> | null = null,
  more: Partial<Parameters<typeof buildEndpoints>[0]> = {},
) =>
  buildEndpoints({
    report: found && report(found),
    remembered: [],
    local: { ips, port4: 41641, port6: 41642 },
    fixedPort: false,
    exclude: [parsePrefix("100.64.0.0/10")!],
    ...more,
  });

describe("6.3: the list of own endpoints", () => {
  test("STUN before interfaces; a duplicate keeps its first type", () => {
    const list = build(["198.51.100.7", "192.168.1.2"], { globalV4: "198.51.100.7:41641" });
    expect(list).toEqual({
      endpoints: ["198.51.100.7:41641", "192.168.1.2:41641"],
      types: [EndpointType.stun, EndpointType.local],
    });
  });

  test("other public addresses count only when two servers saw them, each behind the main one of its family", () => {
    const globals = new Map([
      ["203.0.113.5:1", 1],
      ["203.0.113.5:2", 2],
      ["203.0.113.5:3", 1],
      ["[2001:db8::5]:9", 1],
    ]);
    const list = build([], { globalV4: "203.0.113.5:1", globalV6: "[2001:db8::5]:9", globals });
    expect(list.endpoints).toEqual(["203.0.113.5:1", "203.0.113.5:2", "[2001:db8::5]:9"]);
  });

  test("a varying mapping and a configured port: the public address with the local port too", () => {
    const found = { globalV4: "203.0.113.5:1", mappingVaries: true };
    expect(build([], found, { fixedPort: true })).toEqual({
      endpoints: ["203.0.113.5:1", "203.0.113.5:41641"],
      types: [EndpointType.stun, EndpointType.stun4LocalPort],
    });
    expect(build([], found).endpoints).toEqual(["203.0.113.5:1"]);
  });

  test("IPv6 link-local, multicast, unspecified and tailnet addresses are not announced; IPv6 has its own port", () => {
    const list = build(["fe80::1", "ff02::1", "0.0.0.0", "100.100.1.2", "nonsense", "2001:db8::1", "10.0.0.1"]);
    expect(list.endpoints).toEqual(["[2001:db8::1]:41642", "10.0.0.1:41641"]);
  });

  test("without an IPv6 socket no IPv6 address is announced", () => {
    expect(build(["2001:db8::1"], null, { local: { ips: ["2001:db8::1"], port4: 1 } }).endpoints).toEqual([]);
  });

  test("loopback only when there is nothing else", () => {
    expect(build(["127.0.0.1", "::1"]).endpoints).toEqual(["127.0.0.1:41641", "[::1]:41642"]);
    expect(build(["127.0.0.1", "10.0.0.1"]).endpoints).toEqual(["10.0.0.1:41641"]);
  });

  test("a thousand interfaces make a bounded list", () => {
    const ips = Array.from({ length: 1000 }, (_, i) => `10.1.${i >> 8}.${i & 255}`);
    expect(build(ips).endpoints.length).toBe(100);
  });
});

describe("remembered endpoints", () => {
  test("live for 5 min 10 s, the newest first, at most 6 ports of one address", () => {
    const remembered = new RememberedEndpoints();
    for (let port = 1; port <= 9; port++) remembered.note(`203.0.113.5:${port}`, port * 1000);
    remembered.note("203.0.113.6:1", 10_000);
    remembered.note("203.0.113.5:1", 11_000);
    expect(remembered.list(12_000)).toEqual([
      "203.0.113.5:1",
      "203.0.113.6:1",
      ...[9, 8, 7, 6, 5].map((port) => `203.0.113.5:${port}`),
    ]);
    expect(remembered.list(10_000 + 310_001)).toEqual(["203.0.113.5:1"]);
    remembered.clear();
    expect(remembered.list(12_000)).toEqual([]);
  });

  test("a NAT that gives a new port each time does not grow it", () => {
    const remembered = new RememberedEndpoints();
    for (let i = 0; i < 10_000; i++) remembered.note(`203.0.${i >> 8}.${i & 255}:1`, i);
    expect(remembered.list(10_000).length).toBe(64);
  });
});
