import { expect, test } from "bun:test";
import fc from "fast-check";
import { PolicyAccess } from "./access.ts";
import { type Change, Model, type NodeRecord } from "./model.ts";
import { View } from "./netmap.ts";
import { PolicyError, parsePolicy } from "./policy/index.ts";
import { passes } from "./policy/testing.ts";
import { AutoApprover } from "./routes.ts";
import { Mirror, makeConfig, makeNode as makeRecord, makeSettings, makeUser, TestServer, until } from "./testing.ts";

const CONFIG = makeConfig();
const USERS = [1, 2].map((id) => makeUser(id, { name: `u${id}`, email: `u${id}@example.com` }));

/** Online, at the relay of region 1, and of the two users in turn. */
function makeNode(id: number, more: Partial<NodeRecord> = {}): NodeRecord {
  return makeRecord(id, { userId: 1 + (id % 2), homeDerp: 1, online: true, ...more });
}

function peersOf(access: PolicyAccess, id: number): number[] {
  return access.circle(id).ids.filter((peer) => peer !== id);
}

function policyText(policy: object): string {
  return JSON.stringify({ tagOwners: { "tag:a": [], "tag:b": [] }, ...policy });
}

const OPEN = policyText({});
const POLICIES = [
  OPEN,
  policyText({ acls: [] }),
  policyText({ acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] }),
  policyText({ acls: [{ action: "accept", src: ["u1@"], dst: ["tag:a:22", "tag:b:80"] }], randomizeClientPort: true }),
  policyText({
    grants: [
      { src: ["*"], dst: ["10.9.0.0/16"], ip: ["*"] },
      { src: ["u2@"], dst: ["autogroup:internet"], ip: ["*"] },
    ],
    autoApprovers: { routes: { "10.0.0.0/8": ["tag:a", "tag:b"] }, exitNode: ["tag:a"] },
    nodeAttrs: [{ target: ["tag:b"], attr: ["disable-ipv4"] }],
    ssh: [{ action: "check", src: ["u1@"], dst: ["tag:b"], users: ["root"] }],
  }),
];

const edits: fc.Arbitrary<Partial<NodeRecord>> = fc.constantFrom<Partial<NodeRecord>>(
  { endpoints: ["192.0.2.9:1"] },
  { homeDerp: 2 },
  { online: false, lastSeen: 1000 },
  { online: true },
  { tags: ["tag:a"], userId: null },
  { tags: ["tag:b"], userId: null },
  { tags: [], userId: 1 },
  { tags: [], userId: 2 },
  { hostinfo: { OS: "linux", RoutableIPs: ["10.9.0.0/16"] } },
  { hostinfo: { OS: "linux", RoutableIPs: ["10.9.0.0/16", "0.0.0.0/0", "::/0"] } },
  { hostinfo: { OS: "linux" } },
);

type Step =
  | { kind: "add" | "remove" | "read"; which: number }
  | { kind: "edit"; which: number; edit: Partial<NodeRecord> }
  | { kind: "policy"; text: string };

const steps: fc.Arbitrary<Step[]> = fc.array(
  fc.oneof(
    fc.record({ kind: fc.constantFrom("add" as const, "remove" as const, "read" as const), which: fc.nat() }),
    fc.record({ kind: fc.constant("edit" as const), which: fc.nat(), edit: edits }),
    fc.record({ kind: fc.constant("policy" as const), text: fc.constantFrom(...POLICIES) }),
  ),
  { maxLength: 60, size: "max" },
);

/** A client that also keeps its SSH policy. */
class Client extends Mirror {
  sshPolicy: unknown = null;

  override apply(message: Parameters<Mirror["apply"]>[0]): void {
    super.apply(message);
    if (message.SSHPolicy) this.sshPolicy = message.SSHPolicy;
  }
}

test("under any policy the sum of the deltas is the full netmap, and nobody learns of a node that it may not see", () => {
  let hidden = 0;
  fc.assert(
    fc.property(steps, (list) => {
      const model = new Model();
      model.apply({ users: USERS });
      const access = new PolicyAccess(model, parsePolicy(OPEN));
      const approver = new AutoApprover(model);
      const clients = new Map<number, { view: View; client: Client }>();
      let lastId = 0;
      const commit = (change: Change) => {
        const effect = model.apply(change);
        access.onApplied(effect);
        approver.onApplied(effect);
      };
      const read = (id: number) => {
        const { view, client } = clients.get(id)!;
        const message = view.hasWork(model) ? view.next(model, 0) : null;
        if (!message) return;
        const seen = new Set(peersOf(access, id));
        for (const peer of [...(message.Peers ?? []), ...(message.PeersChanged ?? [])])
          expect(seen.has(peer.ID!)).toBe(true);
        for (const patch of message.PeersChangedPatch ?? []) expect(seen.has(patch!.NodeID)).toBe(true);
        client.apply(message);
        expect([...client.peers.keys()].sort((a, b) => a - b)).toEqual([...seen]);
        hidden += model.nodes.size - 1 - seen.size;
      };
      for (const step of list) {
        const ids = [...model.nodes.keys()];
        if (step.kind === "add") {
          const id = ++lastId;
          commit({ nodes: [makeNode(id)] });
          clients.set(id, { view: new View(id, CONFIG, access), client: new Client() });
        } else if (step.kind === "policy") {
          access.replace(step.text);
          commit({ nodes: approver.take(access.approvals) });
        } else if (ids.length > 0) {
          const id = ids[step.which % ids.length]!;
          if (step.kind === "read") read(id);
          else if (step.kind === "edit") {
            commit({ nodes: [{ ...model.nodes.get(id)!, ...step.edit }] });
            commit({ nodes: approver.take(access.approvals) });
          } else {
            commit({ nodesRemoved: [id] });
            clients.delete(id);
          }
        }
      }
      for (const [id, { view, client }] of clients) {
        read(id);
        expect(view.hasWork(model) && view.next(model, 0)).toBeFalsy();
        const fresh = new Client();
        fresh.apply(new View(id, CONFIG, access).next(model, 0)!);
        expect([...client.peers].sort(([a], [b]) => a - b)).toEqual([...fresh.peers]);
        expect(client.filters).toEqual(fresh.filters);
        expect(client.sshPolicy).toEqual(fresh.sshPolicy);
        for (const field of ["Addresses", "AllowedIPs", "PrimaryRoutes", "CapMap", "Tags", "User"] as const) {
          expect(client.self![field]).toEqual(fresh.self![field]);
        }
      }
    }),
    { numRuns: 300, seed: 1 },
  );
  expect(hidden).toBeGreaterThan(1000);
});

function viewOf(id: number, model: Model, access: PolicyAccess): Mirror {
  const mirror = new Mirror();
  mirror.apply(new View(id, CONFIG, access).next(model, 0)!);
  return mirror;
}

test("a route moves when its router goes away, and stays where it is when that one comes back", () => {
  const model = new Model();
  const router = (id: number) =>
    makeNode(id, {
      userId: null,
      tags: ["tag:a"],
      hostinfo: { RoutableIPs: ["10.9.0.0/16"] },
      approvedRoutes: ["10.9.0.0/16"],
    });
  model.apply({ users: USERS, nodes: [makeNode(1), router(2), router(3)] });
  const access = new PolicyAccess(model, parsePolicy(POLICIES.at(-1)!));
  const routerFor1 = () => [...viewOf(1, model, access).peers.values()].find((peer) => peer.PrimaryRoutes)?.ID;
  const set = (id: number, online: boolean) =>
    access.onApplied(model.apply({ nodes: [{ ...model.nodes.get(id)!, online }] }));
  expect(routerFor1()).toBe(2);
  set(2, false);
  expect(routerFor1()).toBe(3);
  set(2, true);
  expect(routerFor1()).toBe(3);
  set(2, false);
  set(3, false);
  expect(routerFor1()).toBe(3);
});

test("a change concerns those whose rules name the changed node, and nobody else", () => {
  const model = new Model();
  // Of user 1: 2, 4, 6; of user 2: 1, 3, 5.
  model.apply({ users: USERS, nodes: [1, 2, 3, 4, 5, 6].map((id) => makeNode(id)) });
  const access = new PolicyAccess(model, parsePolicy(POLICIES[2]!));
  let before = new Map<number, number>();
  const concerned = (change?: Change) => {
    if (change) access.onApplied(model.apply(change));
    const now = new Map([...model.nodes.keys()].map((id) => [id, access.epochOf(id)]));
    const ids = [...now].filter(([id, epoch]) => before.get(id) !== epoch).map(([id]) => id);
    before = now;
    return ids.sort((a, b) => a - b);
  };
  concerned();
  expect(concerned({ nodes: [makeNode(2, { endpoints: ["192.0.2.1:1"], online: false })] })).toEqual([]);
  access.replace(POLICIES[2]!);
  expect(concerned()).toEqual([]);
  expect(concerned({ nodes: [makeNode(8)] })).toEqual([2, 4, 6, 8].map((id) => id));
  expect(concerned({ nodes: [makeNode(8, { userId: 2 })] })).toEqual([1, 2, 3, 4, 5, 6, 8]);
  expect(concerned({ nodes: [makeNode(8, { userId: null, tags: ["tag:a"] })] })).toEqual([1, 3, 5, 8]);
  expect(concerned({ nodesRemoved: [2] })).toEqual([4, 6]);
  // Who comes, and new pictures of others, mean nothing to the policy; a word that means another user may concern anybody.
  expect(concerned({ users: [makeUser(9, { name: "u9" }), { ...USERS[1]!, displayName: "U" }] })).toEqual([]);
  expect(concerned({ users: [makeUser(7, { name: "u2", providerId: "idp/7" })] })).toEqual([1, 3, 4, 5, 6, 8]);
  expect(concerned({ users: [{ ...USERS[0]!, name: "other" }] })).toEqual([1, 3, 4, 5, 6, 8]);
  access.replace(POLICIES[0]!);
  expect(concerned()).toEqual([1, 3, 4, 5, 6, 8]);
});

test("a compilation that reuses the one before says the same as one from scratch", () => {
  let compared = 0;
  fc.assert(
    fc.property(steps, (list) => {
      const model = new Model();
      model.apply({ users: USERS });
      let text = POLICIES[2]!;
      const access = new PolicyAccess(model, parsePolicy(text));
      const answers = () =>
        [...model.nodes.keys()].map((id) => {
          const { filter, filterDigest, sshRules, self, special } = access.decide(id);
          const seen = [...model.nodes.keys()].filter((peer) => access.sees(id, peer)).sort((a, b) => a - b);
          expect(access.circle(id).ids.filter((peer) => model.nodes.has(peer))).toEqual(seen);
          return { filter: filter(), filterDigest, sshRules, self, special: [...special], seen };
        });
      let lastId = 0;
      for (const step of list) {
        const ids = [...model.nodes.keys()];
        const id = ids[(step.kind === "policy" ? 0 : step.which) % Math.max(1, ids.length)];
        if (step.kind === "policy") {
          text = step.text;
          access.replace(text);
        } else if (step.kind === "add") access.onApplied(model.apply({ nodes: [makeNode(++lastId)] }));
        else if (step.kind === "read") {
          const before = answers();
          text += " ";
          access.replace(text);
          expect(answers()).toEqual(before);
          compared += before.length;
        } else if (id === undefined) continue;
        else if (step.kind === "edit")
          access.onApplied(model.apply({ nodes: [{ ...model.nodes.get(id)!, ...step.edit }] }));
        else access.onApplied(model.apply({ nodesRemoved: [id] }));
        void access.era;
      }
    }),
    { numRuns: 100, seed: 2 },
  );
  expect(compared).toBeGreaterThan(300);
});

test("a name that comes to mean two users opens nothing to either, and the rest of the policy holds", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2), makeNode(3, { userId: null, tags: ["tag:a"] })] });
  const acls = ["u1@", "u2@"].map((user) => ({ action: "accept", src: [user], dst: ["tag:a:22"] }));
  const access = new PolicyAccess(model, parsePolicy(policyText({ acls })));
  expect(peersOf(access, 3)).toEqual([1, 2]);
  access.onApplied(model.apply({ users: [...USERS, { ...USERS[0]!, id: 3, email: "other@example.com" }] }));
  expect(peersOf(access, 3)).toEqual([1]);
  expect(() => access.replace(policyText({ acls: acls.slice(0, 1) }))).toThrow(PolicyError);
  expect(peersOf(access, 3)).toEqual([1]);
});

test("a policy whose tests fail does not come into force; a server that starts with one says so", () => {
  const model = new Model();
  model.apply({ users: USERS, nodes: [makeNode(1), makeNode(2)] });
  const failing = policyText({ acls: [], tests: [{ src: "u1@", accept: ["u2@:22"] }] });
  const lines: string[] = [];
  const access = new PolicyAccess(model, parsePolicy(failing), (line) => lines.push(line));
  expect(lines.join()).toContain("test(s) failed");
  expect(peersOf(access, 1)).toEqual([]);
  const open = new PolicyAccess(model, parsePolicy(OPEN));
  expect(() => open.replace(failing)).toThrow("test(s) failed");
  expect(peersOf(open, 1)).toEqual([2]);
});

test("a new policy reaches open map streams at once: peers go, filters close, and all comes back", async () => {
  await using server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const set = (text: string) => server.control.policies.set(text, { by: "test" });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const [mapA, mapB] = [await a.stream(), await b.stream()];
  await until(() => mapA.peer("b") && mapB.peer("a"), "both to see each other");
  const address = (map: Mirror) => map.self!.Addresses![0]!.split("/")[0]!;
  const open = (from: Mirror, to: Mirror) => passes(to.filters!.base!, address(from), address(to), 22);
  expect([open(mapA, mapB), open(mapB, mapA)]).toEqual([true, true]);

  await set('{"acls": []}');
  await until(() => mapA.peers.size === 0 && mapB.peers.size === 0, "both to be alone");
  expect(mapA.filters!.base).toEqual([]);
  expect(mapA.messages.at(-1)!.PeersRemoved).toHaveLength(1);

  await expect(set('{"acls": [{"action": "deny"}]}')).rejects.toThrow('action="deny" is not supported');
  const oneWay = `{"acls": [{"action": "accept", "src": ["${address(mapA)}"], "dst": ["${address(mapB)}:22"]}]}`;
  await set(oneWay);
  await until(() => mapA.peer("b") && mapB.peer("a"), "both to be back");
  expect([open(mapA, mapB), open(mapB, mapA)]).toEqual([true, false]);
});
