import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import type { MapResponse, Node, PeerChange } from "../wire/tailcfg.ts";
import { filterRules, homeRegion, keyExpired, type Netmap, NetmapSession, sortedPeers } from "./netmap.ts";

const self: Node = { ID: 1, Key: "nodekey:self", Name: "me.", Addresses: ["100.64.0.1/32"] };
const peer = (ID: number, more: Partial<Node> = {}): Node => ({
  ID,
  Key: `nodekey:${ID}`,
  Name: `p${ID}.`,
  Addresses: [`100.64.0.${ID}/32`],
  Endpoints: [],
  ...more,
});
const NOW = Date.parse("2026-05-01T00:00:00Z");

function session(...messages: MapResponse[]): NetmapSession {
  const out = new NetmapSession();
  out.apply({ Node: self }, NOW);
  for (const message of messages) out.apply(message, NOW);
  return out;
}
const map = (...messages: MapResponse[]): Netmap => session(...messages).netmap!;
const ids = (netmap: Netmap) => sortedPeers(netmap).map(({ ID }) => ID);

describe("the first message", () => {
  test("must carry the self node; keep-alives before it are no message", () => {
    const out = new NetmapSession();
    out.apply({ KeepAlive: true }, NOW);
    expect(out.netmap).toBeNull();
    expect(() => out.apply({ Peers: [peer(2)] }, NOW)).toThrow("has no node for this machine");
    expect(() => out.apply({ Node: { ID: 0, Key: "nodekey:x" } }, NOW)).toThrow();
  });

  test("says that everything changed: what an earlier stream said is void", () => {
    const change = new NetmapSession().apply({ Node: self }, NOW);
    expect(Object.values(change).every(Boolean)).toBe(true);
  });

  test("without a filter nothing is let in", () => {
    expect(filterRules(map())).toEqual([]);
  });
});

describe("peers", () => {
  test("a non-empty list is the complete one, and makes the other fields void; an empty one changes nothing", () => {
    expect(
      ids(map({ Peers: [peer(3), peer(2)] }, { Peers: [peer(4)], PeersRemoved: [4], PeersChanged: [peer(5)] })),
    ).toEqual([4]);
    expect(ids(map({ Peers: [peer(2)] }, { Peers: [] }))).toEqual([2]);
  });

  test("removed, then changed, then seen, online and patch, in one message", () => {
    const out = map(
      { Peers: [peer(2, { Online: true })] },
      {
        PeersRemoved: [2],
        PeersChanged: [peer(2, { Cap: 1 }), peer(3)],
        OnlineChange: { "3": false },
        PeerSeenChange: { "2": true },
        PeersChangedPatch: [{ NodeID: 3, Online: true, DERPRegion: 9 }],
      },
    );
    expect(out.peers.get(2)).toMatchObject({ Cap: 1, LastSeen: new Date(NOW).toISOString() });
    expect(out.peers.get(2)?.Online).toBeUndefined();
    expect(out.peers.get(3)).toMatchObject({ Online: true, HomeDERP: 9 });
  });

  test("a patch changes what it names and nothing else", () => {
    const old = peer(2, {
      HomeDERP: 1,
      Cap: 5,
      Endpoints: ["192.0.2.1:1"],
      DiscoKey: "discokey:a",
      CapMap: { x: null },
    });
    const patched = (patch: Partial<PeerChange>) =>
      map({ Peers: [old] }, { PeersChangedPatch: [{ NodeID: 2, ...patch }] }).peers.get(2);
    expect(patched({})).toEqual(old);
    expect(patched({ DERPRegion: 0, Cap: 0, Endpoints: [] })).toEqual(old);
    expect(patched({ DERPRegion: null, CapMap: null, Endpoints: null, Key: null, Online: null })).toEqual(old);
    expect(patched({ DERPRegion: 3 })).toEqual({ ...old, HomeDERP: 3 });
    expect(patched({ Endpoints: ["192.0.2.9:9"] })?.Endpoints).toEqual(["192.0.2.9:9"]);
    expect(patched({ CapMap: {} })?.CapMap).toEqual({});
    const rotated = { Key: "nodekey:new", DiscoKey: "discokey:b", KeyExpiry: "0001-01-01T00:00:00Z" };
    expect(patched(rotated)).toEqual({ ...old, ...rotated });
  });

  test("a patch for a peer that was not sent is lost", () => {
    const out = session();
    expect(out.apply({ PeersChangedPatch: [{ NodeID: 9, Online: true }] }, NOW).peers).toBe(false);
    expect(out.netmap?.peers.size).toBe(0);
  });

  test("the disco key of an offline peer that is older than what is known is ignored", () => {
    const old = peer(2, { DiscoKey: "discokey:new", LastSeen: "2026-05-01T00:00:00Z" });
    const patch = { NodeID: 2, Online: false, LastSeen: "2026-04-01T00:00:00Z", DiscoKey: "discokey:old" };
    expect(map({ Peers: [old] }, { PeersChangedPatch: [patch] }).peers.get(2)?.DiscoKey).toBe("discokey:new");
    const later = { ...patch, LastSeen: "2026-05-02T00:00:00Z" };
    expect(map({ Peers: [old] }, { PeersChangedPatch: [later] }).peers.get(2)?.DiscoKey).toBe("discokey:old");
  });

  test("seen false means unknown", () => {
    const out = map({ Peers: [peer(2, { LastSeen: "2026-01-01T00:00:00Z" })] }, { PeerSeenChange: { "2": false } });
    expect(out.peers.get(2)?.LastSeen).toBeUndefined();
  });
});

describe("packet filters", () => {
  const rule = (ip: string) => ({ SrcIPs: [ip], DstPorts: [] });

  test("the single one is the one named base; [] blocks all; absent is unchanged", () => {
    expect(filterRules(map({ PacketFilter: [rule("a")] }, { PacketFilter: null }, {}))).toEqual([rule("a")]);
    expect(filterRules(map({ PacketFilter: [rule("a")] }, { PacketFilter: [] }))).toEqual([]);
    expect(filterRules(map({ PacketFilter: [rule("a")] }, { PacketFilters: { base: [rule("b")] } }))).toEqual([
      rule("b"),
    ]);
  });

  test("named ones stand in the order of their names; null deletes one, * all, before the rest of the message", () => {
    const both = map({ PacketFilters: { z: [rule("z")], a: [rule("a")] } });
    expect(filterRules(both)).toEqual([rule("a"), rule("z")]);
    expect(
      filterRules(map({ PacketFilters: { z: [rule("z")], a: [rule("a")] } }, { PacketFilters: { a: null } })),
    ).toEqual([rule("z")]);
    const replaced = map({ PacketFilters: { z: [rule("z")] } }, { PacketFilters: { b: [rule("b")], "*": null } });
    expect(filterRules(replaced)).toEqual([rule("b")]);
  });
});

describe("the rest", () => {
  test("a DERP map replaces the old one; without regions only HomeParams change; null regions are dropped", () => {
    const region = { RegionID: 1, RegionCode: "r", Nodes: [{ Name: "1a", RegionID: 1, HostName: "h" }] };
    const first = { DERPMap: { Regions: { "1": region, "2": null } } };
    expect(Object.keys(map(first).derpMap.Regions ?? {})).toEqual(["1"]);
    const scored = map(first, { DERPMap: { HomeParams: { RegionScore: { "1": 0.5 } } } }).derpMap;
    expect(scored.Regions?.["1"]).toEqual(region);
    expect(scored.HomeParams?.RegionScore).toEqual({ "1": 0.5 });
    expect(map(first, { DERPMap: { Regions: {} } }).derpMap.Regions).toEqual({});
  });

  test("health and display messages", () => {
    expect(map({ Health: ["a"] }, {}).health).toEqual(["a"]);
    expect(map({ Health: ["a"] }, { Health: [] }).health).toEqual([]);
    const text = { Title: "t", Text: "x" };
    expect([
      ...map({ DisplayMessages: { a: text, b: text } }, { DisplayMessages: { a: null } }).displayMessages.keys(),
    ]).toEqual(["b"]);
    expect(map({ DisplayMessages: { a: text } }, { DisplayMessages: { "*": null } }).displayMessages.size).toBe(0);
  });

  test("home relay: the number, or the legacy address", () => {
    expect(homeRegion(peer(2, { HomeDERP: 4, DERP: "127.3.3.40:9" }))).toBe(4);
    expect(homeRegion(peer(2, { DERP: "127.3.3.40:9" }))).toBe(9);
    expect(homeRegion(peer(2, { DERP: "10.0.0.1:9" }))).toBe(0);
  });

  test("key expiry: zero time is never", () => {
    expect(keyExpired(peer(2, { KeyExpiry: "0001-01-01T00:00:00Z" }), NOW)).toBe(false);
    expect(keyExpired(peer(2, { KeyExpiry: "2026-04-30T23:59:59.123456789Z" }), NOW)).toBe(true);
    expect(keyExpired(peer(2, { Expired: true }), NOW)).toBe(true);
  });
});

// ---- properties ----

const fields = fc.record(
  {
    HomeDERP: fc.integer({ min: 1, max: 5 }),
    Cap: fc.integer({ min: 1, max: 200 }),
    Online: fc.boolean(),
    Endpoints: fc.array(fc.constantFrom("192.0.2.1:1", "192.0.2.2:2"), { minLength: 1, maxLength: 2 }),
    DiscoKey: fc.constantFrom("discokey:a", "discokey:b"),
    KeyExpiry: fc.constantFrom("0001-01-01T00:00:00Z", "2030-01-01T00:00:00Z"),
  },
  { requiredKeys: ["HomeDERP", "Cap", "Online", "Endpoints", "DiscoKey", "KeyExpiry"] },
);
const tailnet = fc
  .dictionary(fc.integer({ min: 2, max: 6 }).map(String), fields)
  .map((nodes) => new Map(Object.entries(nodes).map(([id, more]) => [Number(id), peer(Number(id), more)])));

/** The smallest message from one set of peers to another, chosen by `style` among the forms that the protocol has. */
function delta(from: Map<number, Node>, to: Map<number, Node>, style: number): MapResponse {
  const message: Required<Pick<MapResponse, "PeersRemoved" | "PeersChanged" | "PeersChangedPatch">> = {
    PeersRemoved: [...from.keys()].filter((id) => !to.has(id)),
    PeersChanged: [],
    PeersChangedPatch: [],
  };
  const OnlineChange: Record<string, boolean> = {};
  for (const [id, node] of to) {
    const old = from.get(id);
    if (!old || style % 3 === 0) {
      message.PeersChanged!.push(node);
      continue;
    }
    const { HomeDERP, Cap, Endpoints, DiscoKey, KeyExpiry, Online } = node;
    const rest: Partial<PeerChange> = style % 3 === 1 ? { Online: Online! } : {};
    if (style % 3 === 2) OnlineChange[String(id)] = Online!;
    message.PeersChangedPatch!.push({
      NodeID: id,
      ...rest,
      ...(HomeDERP === old.HomeDERP ? {} : { DERPRegion: HomeDERP! }),
      ...(Cap === old.Cap ? { Cap: 0 } : { Cap: Cap! }),
      ...(JSON.stringify(Endpoints) === JSON.stringify(old.Endpoints) ? {} : { Endpoints: Endpoints! }),
      ...(DiscoKey === old.DiscoKey ? {} : { DiscoKey: DiscoKey! }),
      ...(KeyExpiry === old.KeyExpiry ? {} : { KeyExpiry: KeyExpiry! }),
    });
  }
  return { ...message, OnlineChange };
}

test("applying deltas gives what the full map gives", () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(tailnet, fc.nat(8)), { minLength: 1, maxLength: 6 }), (steps) => {
      const incremental = session();
      let before = new Map<number, Node>();
      for (const [after, style] of steps) {
        incremental.apply(delta(before, after, style), NOW);
        const full = map(after.size > 0 ? { Peers: [...after.values()] } : {});
        expect(sortedPeers(incremental.netmap!)).toEqual(sortedPeers(full));
        before = after;
      }
    }),
    { numRuns: 200 },
  );
});

test("whatever JSON a server sends, the netmap stays one that can be read", () => {
  const json = fc.jsonValue({ maxDepth: 3 });
  const names = [
    "Node",
    "Peers",
    "PeersChanged",
    "PeersRemoved",
    "PeersChangedPatch",
    "PeerSeenChange",
    "OnlineChange",
  ];
  const more = ["DERPMap", "DNSConfig", "PacketFilter", "PacketFilters", "UserProfiles", "Health", "DisplayMessages"];
  const message = fc.dictionary(fc.constantFrom(...names, ...more, "Domain", "CollectServices"), json);
  const damaged = fc.record({
    Peers: fc.array(
      fc.oneof(json, fc.record({ ID: fc.integer({ min: 2, max: 4 }), Key: fc.string(), Addresses: json })),
    ),
    PeersChangedPatch: fc.array(fc.oneof(json, fc.record({ NodeID: fc.integer({ min: 2, max: 4 }), Endpoints: json }))),
  });
  fc.assert(
    fc.property(fc.array(fc.oneof(message, damaged), { maxLength: 4 }), (messages) => {
      const netmap = map(...(messages as MapResponse[]));
      for (const node of [netmap.self, ...sortedPeers(netmap)]) {
        expect(node.ID).toBeGreaterThan(0);
        for (const list of [node.Addresses, node.Endpoints, node.AllowedIPs ?? []])
          for (const item of list ?? []) expect(typeof item).toBe("string");
      }
      expect(Array.isArray(filterRules(netmap))).toBe(true);
    }),
    { numRuns: 300 },
  );
});
