import { describe, expect, test } from "bun:test";
import type { Node } from "../wire/tailcfg.ts";
import { type AppliedPeer, peerUpdates, speaksPlainHttp } from "./engine.ts";
import { NetmapSession } from "./netmap.ts";
import { findPeer, magicDnsSuffix, peerViews, selfAddresses } from "./view.ts";

const key = (n: number) => `nodekey:${n.toString(16).padStart(64, "0")}`;
const NOW = Date.parse("2026-05-01T00:00:00Z");

function netmap(peers: Node[], self: Partial<Node> = {}) {
  const session = new NetmapSession();
  const Node = { ID: 1, Key: key(1), Name: "me.net.example.", Addresses: ["100.64.0.1/32", "fd7a::1/128"], ...self };
  session.apply({ Node, Peers: peers }, NOW);
  return session.netmap!;
}
const peer = (ID: number, more: Partial<Node> = {}): Node => ({
  ID,
  Key: key(ID),
  Name: `p${ID}.net.example.`,
  Addresses: [`100.64.0.${ID}/32`, `fd7a::${ID}/128`],
  ...more,
});
const allowed = (peers: Node[]) =>
  peerViews(netmap(peers), NOW).map(({ node, allowedIPs }) => [node.ID, ...allowedIPs]);

describe("allowed IPs", () => {
  test("are the peer's own addresses, whatever routes it serves", () => {
    const routes = ["100.64.0.2/32", "fd7a::2/128", "10.0.0.0/8", "0.0.0.0/0", "192.0.2.1/32"];
    expect(allowed([peer(2, { AllowedIPs: routes })])).toEqual([[2, "100.64.0.2/32", "fd7a::2/128"]]);
  });

  test("absent AllowedIPs are the addresses, an empty list is none", () => {
    expect(allowed([peer(2)])).toEqual([[2, "100.64.0.2/32", "fd7a::2/128"]]);
    expect(allowed([peer(2, { AllowedIPs: [] })])).toEqual([[2]]);
  });

  test("an address that is ours, or another peer's already, goes to nobody else", () => {
    const thief = peer(3, { Addresses: ["100.64.0.1/32", "100.64.0.2/32", "100.64.0.3/32"] });
    expect(allowed([peer(2), thief])).toEqual([
      [2, "100.64.0.2/32", "fd7a::2/128"],
      [3, "100.64.0.3/32"],
    ]);
  });

  test("wider prefixes and garbage are no addresses", () => {
    expect(allowed([peer(2, { Addresses: ["100.64.0.0/10", "x", "100.64.0.2/33", "100.64.0.9/32"] })])).toEqual([
      [2, "100.64.0.9/32"],
    ]);
    expect(selfAddresses(netmap([], { Addresses: ["100.64.0.0/10", "100.64.0.7/32"] }))).toEqual(["100.64.0.7/32"]);
  });
});

test("expired peers and those without a key carry no traffic", () => {
  const peers = [
    peer(2, { Expired: true }),
    peer(3, { KeyExpiry: "2026-04-01T00:00:00Z" }),
    peer(4, { Key: key(0) }),
    peer(5, { Key: "x" }),
    peer(6),
  ];
  expect(peerViews(netmap(peers), NOW).map(({ node }) => node.ID)).toEqual([6]);
});

test("a peer is found by address, name, and full name with or without the dot", () => {
  const map = netmap([peer(2), peer(3)]);
  for (const target of ["100.64.0.3", "fd7a::3", "p3", "P3", "p3.net.example", "p3.net.example."])
    expect(findPeer(map, target)?.ID).toBe(3);
  expect(findPeer(map, "p")).toBeNull();
  expect(magicDnsSuffix(map)).toBe("net.example");
});

describe("WireGuard sections", () => {
  const of = (n: number, allowedIPs: string[], disco: string): [string, AppliedPeer] => [
    String(n),
    { key: Uint8Array.of(n), allowedIPs, disco },
  ];

  test("nothing changes for nothing; a new peer, a gone one and other addresses each give theirs", () => {
    const before = new Map([of(1, ["a"], "d1"), of(2, ["b"], "d2")]);
    expect(peerUpdates(before, before)).toEqual({ updates: [], renewed: [] });
    const after = new Map([of(2, ["a"], "d2"), of(3, ["c"], "")]);
    expect(peerUpdates(before, after).updates).toEqual([
      { publicKey: Uint8Array.of(1), remove: true },
      { publicKey: Uint8Array.of(2), replaceAllowedIPs: true, allowedIPs: ["a"] },
      { publicKey: Uint8Array.of(3), replaceAllowedIPs: true, allowedIPs: ["c"] },
    ]);
  });

  test("another disco key is a restart: the peer loses its session; the first disco key is none", () => {
    const changed = peerUpdates(new Map([of(1, ["a"], "d1")]), new Map([of(1, ["a"], "d2")]));
    expect(changed.updates).toEqual([
      { publicKey: Uint8Array.of(1), remove: true },
      { publicKey: Uint8Array.of(1), replaceAllowedIPs: true, allowedIPs: ["a"] },
    ]);
    expect(changed.renewed).toEqual([{ key: Uint8Array.of(1), text: "1" }]);
    expect(peerUpdates(new Map([of(1, ["a"], "")]), new Map([of(1, ["a"], "d1")])).updates).toEqual([]);
  });
});

test("a relay is spoken to in plain HTTP only beside a control server that has no TLS itself", () => {
  const region = (more: object) => ({
    RegionID: 1,
    Nodes: [{ Name: "1a", RegionID: 1, HostName: "10.0.0.1", DERPPort: 8080, ...more }],
  });
  expect(speaksPlainHttp(region({}), new URL("http://10.0.0.1:8080"))).toBe(true);
  expect(speaksPlainHttp(region({}), new URL("https://10.0.0.1:8080"))).toBe(false);
  expect(speaksPlainHttp(region({ DERPPort: 443 }), new URL("http://10.0.0.1:8080"))).toBe(false);
  expect(speaksPlainHttp(region({ HostName: "other" }), new URL("http://10.0.0.1:8080"))).toBe(false);
  expect(speaksPlainHttp(region({ HostName: "other", InsecureForTests: true }), new URL("http://10.0.0.1:8080"))).toBe(
    true,
  );
  expect(speaksPlainHttp(region({ InsecureForTests: true }), new URL("https://10.0.0.1:8080"))).toBe(false);
});
