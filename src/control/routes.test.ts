import { expect, test } from "bun:test";
import fc from "fast-check";
import type * as tc from "../wire/tailcfg.ts";
import { PolicyAccess } from "./access.ts";
import { Routing } from "./ha.ts";
import { type Change, Model, type NodeRecord } from "./model.ts";
import { View } from "./netmap.ts";
import { parsePolicy } from "./policy/index.ts";
import { AutoApprover, activeRoutes, advertisedRoutes, approveRoutes, routesOf } from "./routes.ts";
import { makeConfig, makeNode, makeUser } from "./testing.ts";

const CONFIG = makeConfig();

/** A tailnet without a server around it. */
class Tailnet {
  readonly model = new Model();
  readonly access: PolicyAccess;
  readonly approver: AutoApprover;

  constructor(nodes: NodeRecord[], policy = "") {
    this.model.apply({ users: [makeUser(1), makeUser(2)], nodes });
    this.access = new PolicyAccess(this.model, parsePolicy(policy));
    this.approver = new AutoApprover(this.model);
    this.approve();
  }

  commit(change: Change): void {
    const effect = this.model.apply(change);
    this.access.onApplied(effect);
    this.approver.onApplied(effect);
  }

  approve(): void {
    this.commit({ nodes: this.approver.take(this.access.approvals) });
  }

  edit(id: number, more: Partial<NodeRecord>): void {
    this.commit({ nodes: [{ ...this.model.nodes.get(id)!, ...more }] });
    this.approve();
  }

  get context() {
    const journal = { commit: async (change: Change) => this.commit(change) };
    return { model: this.model, access: this.access, journal } as unknown as Parameters<typeof approveRoutes>[0];
  }

  routes(id: number) {
    return routesOf(this.context, this.model.nodes.get(id)!);
  }

  /** AllowedIPs beyond its addresses that a viewer has of each peer. */
  seen(viewer: number): Record<number, string[]> {
    const { Peers } = new View(viewer, CONFIG, this.access).next(this.model, 0)!;
    return Object.fromEntries((Peers ?? []).map((peer) => [peer.ID, beyondAddresses(peer)]));
  }
}

function beyondAddresses(node: tc.Node): string[] {
  return node.AllowedIPs!.filter((prefix) => !node.Addresses!.includes(prefix));
}

function router(id: number, advertised: string[], more: Partial<NodeRecord> = {}): NodeRecord {
  return makeNode(id, { online: true, hostinfo: { OS: "linux", RoutableIPs: advertised }, ...more });
}

test("what a node advertises is masked, sorted and bounded, and nonsense in it is passed over", () => {
  const list: unknown[] = [
    "10.1.2.3/8",
    "::/0",
    7,
    "10.0.0.0/8",
    "nowhere",
    "fd7a:115c:a1e0:b1a:0:7:a01:0/112",
    "0.0.0.0/0",
  ];
  const node = makeNode(1, { hostinfo: { RoutableIPs: list as string[] } });
  expect(advertisedRoutes(node)).toEqual(["0.0.0.0/0", "10.0.0.0/8", "::/0", "fd7a:115c:a1e0:b1a:0:7:a01:0/112"]);
  const many = Array.from({ length: 5000 }, (_, i) => `10.${i >> 8}.${i & 255}.0/24`);
  expect(advertisedRoutes(makeNode(1, { hostinfo: { RoutableIPs: many } }))).toHaveLength(1024);
  expect(advertisedRoutes(makeNode(1, { hostinfo: { RoutableIPs: "10.0.0.0/8" as unknown as string[] } }))).toEqual([]);
});

test("an approval replaces the one before, masks, and takes both exit routes for one", async () => {
  const tailnet = new Tailnet([router(1, ["10.0.0.0/8", "192.168.0.0/16", "0.0.0.0/0", "::/0"])]);
  const approve = (...prefixes: string[]) => approveRoutes(tailnet.context, 1, prefixes);
  expect((await approve("192.168.7.0/16", "10.0.0.0/8")).approvedRoutes).toEqual(["10.0.0.0/8", "192.168.0.0/16"]);
  expect(tailnet.routes(1)).toMatchObject({ serving: ["10.0.0.0/8", "192.168.0.0/16"], exit: false });
  expect((await approve("::/0")).approvedRoutes).toEqual(["0.0.0.0/0", "::/0"]);
  expect(tailnet.routes(1)).toMatchObject({ serving: ["0.0.0.0/0", "::/0"], exit: true });
  expect((await approve()).approvedRoutes).toEqual([]);
  expect(tailnet.routes(1).serving).toEqual([]);
  await expect(approve("10.0.0.0")).rejects.toThrow('"10.0.0.0" is no route: give a CIDR');
  await expect(approve("10.0.0.0/33")).rejects.toThrow("is no route");
  await expect(approveRoutes(tailnet.context, 9, [])).rejects.toThrow("there is no node 9");
  await expect(approve(...Array.from({ length: 1025 }, () => "10.0.0.0/8"))).rejects.toThrow("1025 routes are more");
});

test("peers get approved routes only, and an approved route that is not advertised any more goes at once", () => {
  const tailnet = new Tailnet([router(1, ["10.0.0.0/8", "192.168.0.0/16"]), makeNode(2)]);
  expect(tailnet.seen(2)).toEqual({ 1: [] });
  tailnet.edit(1, { approvedRoutes: ["10.0.0.0/8", "172.16.0.0/12"] });
  expect(tailnet.seen(2)).toEqual({ 1: ["10.0.0.0/8"] });
  tailnet.edit(1, { hostinfo: { RoutableIPs: ["192.168.0.0/16", "172.16.0.0/12"] } });
  expect(tailnet.seen(2)).toEqual({ 1: ["172.16.0.0/12"] });
});

test("an open map stream learns of routes as they are approved, move and go, each as one changed peer", () => {
  const shared = { approvedRoutes: ["10.0.0.0/8"] };
  const tailnet = new Tailnet([router(1, ["10.0.0.0/8"], shared), router(2, ["10.0.0.0/8"]), makeNode(3)]);
  const view = new View(3, CONFIG, tailnet.access);
  view.next(tailnet.model, 0);
  const next = (id: number, more: Partial<NodeRecord>) => {
    tailnet.edit(id, more);
    const message = view.next(tailnet.model, 0);
    return Object.fromEntries((message?.PeersChanged ?? []).map((peer) => [peer.ID, beyondAddresses(peer)]));
  };
  expect(next(2, shared)).toEqual({ 2: [] });
  expect(next(1, { online: false })).toEqual({ 1: [], 2: ["10.0.0.0/8"] });
  expect(next(1, { online: true })).toEqual({});
  expect(next(2, { approvedRoutes: [] })).toEqual({ 1: ["10.0.0.0/8"], 2: [] });
});

test("overlapping routes are elected by themselves: each prefix has one router, and all exit nodes are offered", () => {
  const routes = ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "::/0"];
  const tailnet = new Tailnet([
    router(1, routes, { approvedRoutes: ["10.0.0.0/8", "0.0.0.0/0", "::/0"] }),
    router(2, routes, { approvedRoutes: ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "::/0"] }),
    makeNode(3),
  ]);
  expect(tailnet.seen(3)).toEqual({ 1: ["10.0.0.0/8", "0.0.0.0/0", "::/0"], 2: ["10.1.0.0/16", "0.0.0.0/0", "::/0"] });
  const peers = new View(3, CONFIG, tailnet.access).next(tailnet.model, 0)!.Peers!;
  expect(peers.map((peer) => peer.PrimaryRoutes)).toEqual([["10.0.0.0/8"], ["10.1.0.0/16"]]);
  expect(peers.every((peer) => peer.CapMap !== undefined && "suggest-exit-node" in peer.CapMap!)).toBe(true);
  const self = new View(2, CONFIG, tailnet.access).next(tailnet.model, 0)!.Node!;
  expect(self.PrimaryRoutes).toEqual(["10.1.0.0/16"]);
  expect(beyondAddresses(self)).toEqual(["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "::/0"]);
});

const APPROVING = JSON.stringify({
  tagOwners: { "tag:router": [] },
  autoApprovers: { routes: { "10.0.0.0/8": ["tag:router"] }, exitNode: ["user2@"] },
});

test("what the policy approves is stored, adds to what an administrator approved, and outlives the rule", () => {
  const tagged = { userId: null, tags: ["tag:router"] };
  const tailnet = new Tailnet(
    [
      router(1, ["10.1.0.0/16", "192.168.0.0/16"], { ...tagged, approvedRoutes: ["172.16.0.0/12"] }),
      router(2, ["10.2.0.0/16", "0.0.0.0/0", "::/0"], { userId: 2 }),
    ],
    APPROVING,
  );
  const stored = (id: number) => tailnet.model.nodes.get(id)!.approvedRoutes;
  expect(stored(1)).toEqual(["10.1.0.0/16", "172.16.0.0/12"]);
  expect(stored(2)).toEqual(["0.0.0.0/0", "::/0"]);
  tailnet.access.replace("{}");
  tailnet.approve();
  expect([stored(1), stored(2)]).toEqual([
    ["10.1.0.0/16", "172.16.0.0/12"],
    ["0.0.0.0/0", "::/0"],
  ]);
  tailnet.edit(1, { hostinfo: { RoutableIPs: ["10.3.0.0/16"] } });
  expect(stored(1)).toEqual(["10.1.0.0/16", "172.16.0.0/12"]);
  tailnet.access.replace(APPROVING);
  tailnet.approve();
  expect(stored(1)).toEqual(["10.1.0.0/16", "10.3.0.0/16", "172.16.0.0/12"]);
});

test("a route that an administrator takes from the policy stays taken until the node, its tags or the policy change", () => {
  const tailnet = new Tailnet([router(1, ["10.1.0.0/16"], { userId: null, tags: ["tag:router"] })], APPROVING);
  const approved = () => tailnet.model.nodes.get(1)!.approvedRoutes;
  expect(approved()).toEqual(["10.1.0.0/16"]);
  tailnet.edit(1, { approvedRoutes: [] });
  tailnet.edit(1, { endpoints: ["192.0.2.1:1"] });
  expect(approved()).toEqual([]);
  tailnet.edit(1, { hostinfo: { RoutableIPs: ["10.1.0.0/16", "10.2.0.0/16"] } });
  expect(approved()).toEqual(["10.1.0.0/16", "10.2.0.0/16"]);
});

test("a node that has not been let in serves nothing and sees nobody", () => {
  const tailnet = new Tailnet([
    router(1, ["10.0.0.0/8"], { approvedRoutes: ["10.0.0.0/8"], authorized: false }),
    makeNode(2),
  ]);
  const view = new View(2, CONFIG, tailnet.access);
  expect(view.next(tailnet.model, 0)!.Peers).toBeUndefined();
  expect(new View(1, CONFIG, tailnet.access).next(tailnet.model, 0)!.Peers).toBeUndefined();
  tailnet.edit(1, { authorized: true });
  const [peer] = view.next(tailnet.model, 0)!.PeersChanged!;
  expect(beyondAddresses(peer!)).toEqual(["10.0.0.0/8"]);
});

const ROUTES = ["10.0.0.0/8", "10.1.0.0/16", "fd00::/64"];

test("each subnet has one router: sticky while it can serve, else the lowest that can, else the one before", () => {
  const edit = fc.record({
    id: fc.integer({ min: 1, max: 5 }),
    what: fc.constantFrom("online", "offline", "expired", "renewed", "healthy", "sick", "advertise", "remove"),
    routes: fc.subarray(ROUTES),
  });
  let moves = 0;
  fc.assert(
    fc.property(fc.array(edit, { maxLength: 60, size: "max" }), (edits) => {
      const model = new Model();
      const routing = new Routing(model);
      const sick = new Set<number>();
      let before = new Map<string, number>();
      let generation = routing.generation;
      for (const { id, what, routes } of edits) {
        const node = model.nodes.get(id) ?? router(id, [], { approvedRoutes: ROUTES });
        if (what === "healthy" || what === "sick") {
          if (!model.nodes.has(id)) continue;
          routing.setHealthy(id, what === "healthy");
          if (what === "healthy") sick.delete(id);
          else sick.add(id);
        } else if (what === "remove") routing.onApplied(model.apply({ nodesRemoved: [id] }));
        else {
          const more = {
            online: { online: true },
            offline: { online: false },
            expired: { expired: true },
            renewed: { expired: false },
            advertise: { hostinfo: { RoutableIPs: routes } },
          }[what];
          routing.onApplied(model.apply({ nodes: [{ ...node, ...more }] }));
        }
        if (!model.nodes.get(id)?.online) sick.delete(id);
        for (const route of ROUTES) {
          const serve = [...model.nodes.values()].filter((each) => activeRoutes(each).includes(route));
          const ids = serve.map((each) => each.id).sort((a, b) => a - b);
          const online = ids.filter((each) => model.nodes.get(each)!.online && !model.nodes.get(each)!.expired);
          const able = online.filter((each) => !sick.has(each));
          const last = before.get(route);
          const best = able.length > 0 ? able : online.length > 0 ? online : ids;
          const want = last !== undefined && best.includes(last) ? last : best[0];
          expect(routing.primaries.get(route)).toBe(want);
          if (last !== undefined && want !== undefined && last !== want) moves++;
        }
        const changed = JSON.stringify([...before].sort()) !== JSON.stringify([...routing.primaries].sort());
        if (changed) expect(routing.generation).toBeGreaterThan(generation);
        generation = routing.generation;
        before = new Map(routing.primaries);
      }
    }),
    { numRuns: 300, seed: 1 },
  );
  expect(moves).toBeGreaterThan(100);
});

test("a router that advertises ever other routes keeps what it serves approved, and no more than a node may have", () => {
  const policy = '{ "autoApprovers": { "routes": { "10.0.0.0/8": ["user1@"] }, "exitNode": ["user1@"] } }';
  const net = new Tailnet([router(1, [], { userId: 1 })], policy);
  for (let round = 0; round < 4; round++) {
    const advertised = Array.from({ length: 1022 }, (_, i) => `10.${round * 8 + (i >> 8)}.${i & 255}.0/24`);
    net.edit(1, { hostinfo: { RoutableIPs: [...advertised, "0.0.0.0/0", "::/0"] } });
    expect(net.routes(1)).toMatchObject({ exit: true });
    expect(net.routes(1).serving).toHaveLength(1024);
    expect(net.routes(1).approved).toHaveLength(1024);
  }
});
