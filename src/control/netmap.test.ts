import { expect, test } from "bun:test";
import fc from "fast-check";
import { PolicyAccess } from "./access.ts";
import { type Change, Model, type NodeRecord } from "./model.ts";
import { type Access, circleOf, View } from "./netmap.ts";
import { parsePolicy } from "./policy/index.ts";
import { digits, Mirror, makeConfig, makeNode, makeUser } from "./testing.ts";

const CONFIG = makeConfig();

/** Changes as they occur: of one field group or several, by the kind of field. */
const edits: fc.Arbitrary<(node: NodeRecord, salt: number) => Partial<NodeRecord>> = fc.constantFrom(
  (_: NodeRecord, salt: number) => ({ endpoints: [`192.0.2.${salt % 256}:1`] }),
  () => ({ endpoints: [] }),
  (_: NodeRecord, salt: number) => ({ homeDerp: salt % 3 }),
  (_: NodeRecord, salt: number) => ({ discoKey: salt % 4 === 0 ? "" : `discokey:${digits(salt)}` }),
  (node: NodeRecord, salt: number) => ({ nodeKey: `nodekey:${digits(node.id * 1_000_003 + salt)}` }),
  (_: NodeRecord, salt: number) => ({ cap: 113 + (salt % 30) }),
  () => ({ online: true }),
  (_: NodeRecord, salt: number) => ({ online: false, lastSeen: salt * 1000 }),
  (_: NodeRecord, salt: number) => ({ expiry: salt % 3 === 0 ? null : salt * 1000 }),
  (_: NodeRecord, salt: number) => ({ expired: salt % 2 === 0 }),
  (_: NodeRecord, salt: number) => ({ givenName: `name-${salt}`, nameFromHost: false }),
  (_: NodeRecord, salt: number) => ({ tags: [`tag:t${salt % 3}`], userId: null }),
  (_: NodeRecord, salt: number) => ({ tags: [], userId: 1 + (salt % 2) }),
  (_: NodeRecord, salt: number) => ({ hostinfo: { OS: "linux", Services: [{ Proto: "peerapi4", Port: salt }] } }),
  (_: NodeRecord, salt: number) => ({ hostinfo: { OS: "linux", NetInfo: { PreferredDERP: salt } } }),
  (_: NodeRecord, salt: number) => ({
    hostinfo: { OS: "linux", RoutableIPs: ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "::/0"].slice(salt % 4) },
  }),
  (_: NodeRecord, salt: number) => ({ approvedRoutes: ["0.0.0.0/0", "10.0.0.0/8", "::/0"].slice(salt % 4) }),
  (_: NodeRecord, salt: number) => ({ authorized: salt % 3 > 0 }),
  (_: NodeRecord, salt: number) => ({ ipv4: `100.64.1.${salt % 250}` }),
);

type Step =
  | { kind: "add" }
  | { kind: "edit"; which: number; edit: (node: NodeRecord, salt: number) => Partial<NodeRecord>; salt: number }
  | { kind: "remove"; which: number }
  | { kind: "read"; which: number };

const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 2, arbitrary: fc.constant<Step>({ kind: "add" }) },
  {
    weight: 6,
    arbitrary: fc.record({ kind: fc.constant("edit" as const), which: fc.nat(), edit: edits, salt: fc.nat(1000) }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("remove" as const), which: fc.nat() }) },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant("read" as const), which: fc.nat() }) },
);

const USERS = [1, 2].map((id) => makeUser(id));

function openAccess(model: Model): PolicyAccess {
  return new PolicyAccess(model, parsePolicy(""));
}

/** Everything is open between nodes that may see each other. */
function hiding(model: Model, sees: (peer: NodeRecord) => boolean): Access {
  const has = (id: number) => sees(model.nodes.get(id)!);
  const open = openAccess(model);
  return {
    era: 1,
    epochOf: () => 1,
    sees: (_viewer, peer) => has(peer),
    circle: () => circleOf([...model.nodes.keys()].filter(has).sort((a, b) => a - b)),
    decide: (id) => open.decide(id),
    roleCapabilities: (node) => open.roleCapabilities(node),
  };
}

/** What the node is told of itself; endpoints, relay and the like it knows better than the server. */
function selfIdentity(mirror: Mirror) {
  const { Name, User, Key, KeyExpiry, Addresses, AllowedIPs, Tags, Expired, MachineAuthorized, CapMap } = mirror.self!;
  const { PrimaryRoutes } = mirror.self!;
  return { Name, User, Key, KeyExpiry, Addresses, AllowedIPs, PrimaryRoutes, Tags, Expired, MachineAuthorized, CapMap };
}

test("the sum of the deltas is the full netmap, whatever changes and however long a reader waits", () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80, size: "max" }), (steps) => {
      const model = new Model();
      model.apply({ users: USERS });
      const clients = new Map<number, { view: View; mirror: Mirror }>();
      let lastId = 0;
      const access = openAccess(model);
      const commit = (change: Change) => {
        const effect = model.apply(change);
        access.onApplied(effect);
      };
      const read = (id: number) => {
        const client = clients.get(id)!;
        const message = client.view.next(model, 0);
        if (message) client.mirror.apply(message);
      };
      for (const action of steps) {
        const ids = [...model.nodes.keys()];
        if (action.kind === "add") {
          const id = ++lastId;
          commit({ nodes: [makeNode(id)] });
          clients.set(id, { view: new View(id, CONFIG, access), mirror: new Mirror() });
        } else if (ids.length > 0) {
          const id = ids[action.which % ids.length]!;
          const node = model.nodes.get(id)!;
          if (action.kind === "edit") commit({ nodes: [{ ...node, ...action.edit(node, action.salt) }] });
          else if (action.kind === "read") read(id);
          else {
            commit({ nodesRemoved: [id] });
            clients.delete(id);
          }
        }
      }
      for (const [id, { view, mirror }] of clients) {
        read(id);
        expect(view.next(model, 0)).toBeNull();
        const fresh = new Mirror();
        fresh.apply(new View(id, CONFIG, access).next(model, 0)!);
        expect([...mirror.peers.entries()].sort(([a], [b]) => a - b)).toEqual([...fresh.peers.entries()]);
        expect(selfIdentity(mirror)).toEqual(selfIdentity(fresh));
        for (const [userId, profile] of fresh.profiles) expect(mirror.profiles.get(userId)).toEqual(profile);
      }
    }),
    { numRuns: 500, seed: 1 },
  );
});

test("a change that peers cannot see makes no message", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2)] });
  const view = new View(1, CONFIG, openAccess(model));
  view.next(model, 0);
  const hostinfo = { OS: "linux", BackendLogID: "secret", NetInfo: { DERPLatency: { "1-v4": 0.02 } } };
  model.apply({ nodes: [makeNode(2, { hostinfo })] });
  expect(view.next(model, 0)).toBeNull();
});

test("apps show every node's owner as an administrator until a user has a role, and then who is one", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2, { userId: 2 })] });
  const access = openAccess(model);
  const views = [1, 2].map((id) => new View(id, CONFIG, access));
  const commit = (change: Change) => {
    const effect = model.apply(change);
    access.onApplied(effect);
  };
  const told = () =>
    views.map((view) => {
      const capMap = view.hasWork(model) ? view.next(model, 0)?.Node?.CapMap : undefined;
      return capMap && ["is-admin", "is-owner"].filter((name) => `https://tailscale.com/cap/${name}` in capMap);
    });
  expect(told()).toEqual([["is-admin"], ["is-admin"]]);
  commit({ users: [makeUser(1, { role: "owner" })] });
  expect(told()).toEqual([["is-admin", "is-owner"], []]);
  commit({ users: [makeUser(2, { role: "admin" })] });
  expect(told()).toEqual([undefined, ["is-admin"]]);
  commit({ nodes: [makeNode(1, { userId: null, tags: ["tag:x"] })] });
  expect(told()).toEqual([[], undefined]);
  commit({ users: [makeUser(1), makeUser(2)] });
  expect(told()).toEqual([["is-admin"], undefined]);
});

test("a peer that came and went while the reader waited is never spoken of", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1)] });
  const view = new View(1, CONFIG, openAccess(model));
  view.next(model, 0);
  model.apply({ nodes: [makeNode(2)] });
  model.apply({ nodesRemoved: [2] });
  expect(view.next(model, 0)).toBeNull();
});

test("nodes that may not see each other learn nothing, and what becomes visible comes whole", () => {
  const model = new Model();
  const tagged = { tags: ["tag:x"], userId: null };
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2), makeNode(3, tagged)] });
  const view = new View(
    1,
    CONFIG,
    hiding(model, (peer) => peer.tags.length > 0),
  );
  expect(view.next(model, 0)!.Peers!.map((peer) => peer.ID)).toEqual([3]);
  model.apply({ nodes: [makeNode(2, { endpoints: ["192.0.2.1:1"] })] });
  expect(view.next(model, 0)).toBeNull();
  model.apply({ nodes: [makeNode(2, { ...tagged, endpoints: ["192.0.2.1:1"] }), makeNode(3)] });
  const message = view.next(model, 0)!;
  expect(message.PeersChanged!.map((peer) => peer.ID)).toEqual([2]);
  expect(message.PeersRemoved).toEqual([3]);
});

test("a peer that was hidden for a while comes back whole, and is not told gone twice", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2)] });
  let hidden = false;
  const view = new View(
    1,
    CONFIG,
    hiding(model, () => !hidden),
  );
  view.next(model, 0);
  const touch = () => model.apply({ nodes: [{ ...model.nodes.get(2)! }] });
  hidden = true;
  touch();
  expect(view.next(model, 0)).toEqual({ PeersRemoved: [2] });
  touch();
  expect(view.next(model, 0)).toBeNull();
  hidden = false;
  touch();
  expect(view.next(model, 0)?.PeersChanged?.map((peer) => peer.ID)).toEqual([2]);
});

test("nodes that swap names and addresses in one change are both found afterwards", () => {
  const model = new Model();
  const [a, b] = [makeNode(1), makeNode(2)];
  model.apply({ nodes: [a, b] });
  const swapped = [
    { ...a, givenName: b.givenName, ipv4: b.ipv4, nodeKey: b.nodeKey },
    { ...b, givenName: a.givenName, ipv4: a.ipv4, nodeKey: a.nodeKey },
  ];
  const { undo } = model.apply({ nodes: swapped });
  expect([model.nodeByName("host-1")?.id, model.nodeByName("host-2")?.id]).toEqual([2, 1]);
  expect([model.nodeByKey(a.nodeKey)?.id, model.nodeByKey(b.nodeKey)?.id]).toEqual([2, 1]);
  expect(model.hasAddress(a.ipv4) && model.hasAddress(b.ipv4)).toBe(true);
  model.apply(undo);
  expect([model.nodeByName("host-1"), model.nodeByName("host-2")]).toEqual([a, b]);
});

test("what was undone is as if it had never been", () => {
  fc.assert(
    fc.property(
      fc.array(fc.tuple(edits, fc.nat(1000), fc.integer({ min: 1, max: 4 })), { maxLength: 12, size: "max" }),
      (list) => {
        const model = new Model();
        model.apply({ users: USERS, nodes: [1, 2, 3].map((id) => makeNode(id)) });
        const before = JSON.stringify(model.sortedNodes());
        const undos = list.map(([edit, salt, id]) => {
          const node = model.nodes.get(id) ?? makeNode(id);
          const change: Change =
            salt % 5 === 0 ? { nodesRemoved: [id] } : { nodes: [{ ...node, ...edit(node, salt) }] };
          return model.apply(change).undo;
        });
        for (const undo of undos.reverse()) model.apply(undo);
        expect(JSON.stringify(model.sortedNodes())).toBe(before);
        for (const node of model.nodes.values()) {
          expect(model.nodeByKey(node.nodeKey)).toBe(node);
          expect(model.nodeByName(node.givenName)).toBe(node);
          expect(model.hasAddress(node.ipv4)).toBe(true);
          expect(model.nodesOfMachine(node.machineKey)).toEqual([node]);
        }
      },
    ),
    { numRuns: 200, seed: 1 },
  );
});

test("a reader that slept through thousands of changes hears the sum of them", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [1, 2, 3, 4].map((id) => makeNode(id)) });
  const access = openAccess(model);
  const [slow, quick] = [new View(1, CONFIG, access), new View(1, CONFIG, access)];
  for (const view of [slow, quick]) view.next(model, 0);
  const wholly = { slow: new Set<string>(), quick: new Set<string>() };
  const read = (name: "slow" | "quick", view: View) => {
    const message = view.next(model, 0);
    for (const { ID } of message?.PeersChanged ?? []) wholly[name].add(`changed ${ID}`);
    for (const id of message?.PeersRemoved ?? []) wholly[name].add(`removed ${id}`);
    return message?.PeersChangedPatch?.map((patch) => [patch!.NodeID, patch!.Endpoints]);
  };
  model.apply({ nodes: [makeNode(5)] });
  model.apply({ nodesRemoved: [2] });
  read("quick", quick);
  for (let i = 1; i <= 5000; i++) model.apply({ nodes: [{ ...model.nodes.get(3)!, endpoints: [`192.0.2.1:${i}`] }] });
  expect(model.changedSince(1)).toBeNull();
  expect(slow.hasWork(model)).toBe(true);
  expect(read("slow", slow)).toEqual([[3, ["192.0.2.1:5000"]]]);
  expect(read("quick", quick)).toEqual([[3, ["192.0.2.1:5000"]]]);
  expect(wholly.slow).toEqual(new Set(["changed 5", "removed 2"]));
  expect(wholly.quick).toEqual(wholly.slow);
  expect(slow.hasWork(model)).toBe(false);
});

test("views that are told the same share the message, those that see something else do not", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [1, 2, 3, 4].map((id) => makeNode(id)) });
  const access = openAccess(model);
  const views = [1, 2, 3].map((id) => new View(id, CONFIG, access));
  for (const view of views) view.next(model, 0);
  model.apply({ nodes: [{ ...model.nodes.get(4)!, endpoints: ["192.0.2.1:1"] }] });
  const [first, second] = views.map((view) => view.next(model, 0));
  expect(first?.PeersChangedPatch?.length).toBe(1);
  expect(second).toBe(first!);
  model.apply({ nodes: [{ ...model.nodes.get(1)!, endpoints: ["192.0.2.2:1"] }, makeNode(5)] });
  const [own, other, last] = views.map((view) => view.next(model, 0));
  expect(own?.PeersChangedPatch).toBeUndefined();
  expect(other?.PeersChangedPatch?.map((patch) => patch!.NodeID)).toEqual([1]);
  expect(last).toBe(other!);
});
