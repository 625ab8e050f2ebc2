// Netmaps under a policy, whatever happens to the tailnet: what a client has put together from deltas is at each step what a
// client that comes anew is told, and nobody is ever told of a peer that he may not see. Who may see whom is worked out a
// second time here, rule by rule and pair by pair.
import { expect, test } from "bun:test";
import fc from "fast-check";
import type * as tc from "../wire/tailcfg.ts";
import { PolicyAccess } from "./access.ts";
import { type Change, Model, type NodeRecord, type UserRecord } from "./model.ts";
import { type TailnetConfig, View } from "./netmap.ts";
import { parsePolicy } from "./policy/index.ts";
import { DERP_MAP, digits, Mirror, makeConfig, makeNode, makeUser } from "./testing.ts";

const USERS = [1, 2, 3];
const TAGS = ["tag:a", "tag:b"];
const ROUTE = "10.1.0.0/16";
const SELECTORS = [
  "*",
  ...TAGS,
  ...USERS.map((id) => `user${id}@`),
  "autogroup:member",
  "autogroup:tagged",
  "autogroup:admin",
] as const;
const ROLES = ["member", "admin", "owner", "auditor"] as const;

type Users = ReadonlyMap<number, UserRecord>;

interface Rule {
  src: string;
  dst: string;
}

function policyText(rules: readonly Rule[]): string {
  return JSON.stringify({
    tagOwners: Object.fromEntries(TAGS.map((tag) => [tag, []])),
    acls: rules.map(({ src, dst }) => ({ action: "accept", src: [src], dst: [`${dst}:22`] })),
    ssh: rules
      .filter(({ dst }) => TAGS.includes(dst))
      .map(({ dst }) => ({ action: "accept", src: ["autogroup:member"], dst: [dst], users: ["root"] })),
  });
}

function selects(selector: string, node: NodeRecord, users: Users): boolean {
  const isTagged = node.tags.length > 0;
  if (selector === "*") return true;
  if (selector === "autogroup:member") return !isTagged;
  if (selector === "autogroup:tagged") return isTagged;
  if (selector === "autogroup:admin") return !isTagged && ["admin", "owner"].includes(users.get(node.userId!)!.role);
  return isTagged ? node.tags.includes(selector) : selector === `user${node.userId}@`;
}

function maySee(rules: readonly Rule[], a: NodeRecord, b: NodeRecord, users: Users): boolean {
  const isShutOut = ({ authorized, userId }: NodeRecord) =>
    !authorized || (userId !== null && users.get(userId)!.status === "suspended");
  if (isShutOut(a) || isShutOut(b)) return false;
  const reaches = (from: NodeRecord, to: NodeRecord) =>
    rules.some(({ src, dst }) => selects(src, from, users) && selects(dst, to, users));
  return reaches(a, b) || reaches(b, a);
}

/** A client, with what is no matter of peers, too. */
class Client extends Mirror {
  derp: tc.DERPMap | undefined;
  ssh: unknown;
  readonly warnings = new Map<string, tc.DisplayMessage>();
  constructor(readonly view: View) {
    super();
  }

  read(model: Model): tc.MapResponse | null {
    const message = this.view.next(model, 0);
    if (!message) return null;
    this.apply(message);
    if (message.DERPMap) this.derp = message.DERPMap;
    if (message.SSHPolicy) this.ssh = message.SSHPolicy;
    for (const [id, warning] of Object.entries(message.DisplayMessages ?? {})) {
      if (warning) this.warnings.set(id, warning);
      else this.warnings.delete(id);
    }
    return message;
  }

  /** Endpoints, relay and the like a node knows better than the server. */
  get knowledge() {
    const { Name, User, Key, KeyExpiry, Addresses, AllowedIPs, PrimaryRoutes, Tags } = this.self!;
    const { Expired, MachineAuthorized, CapMap } = this.self!;
    return {
      self: {
        Name,
        User,
        Key,
        KeyExpiry,
        Addresses,
        AllowedIPs,
        PrimaryRoutes,
        Tags,
        Expired,
        MachineAuthorized,
        CapMap,
      },
      peers: [...this.peers].sort(([a], [b]) => a - b),
      filters: this.filters,
      dns: this.dns,
      derp: this.derp,
      ssh: this.ssh,
      warnings: this.warnings,
    };
  }
}

type Edit = (node: NodeRecord, salt: number) => Partial<NodeRecord>;

const EDITS: Record<string, Edit> = {
  endpoint: (_, salt) => ({ endpoints: salt % 5 === 0 ? [] : [`192.0.2.${salt % 256}:1`] }),
  relay: (_, salt) => ({ homeDerp: salt % 3 }),
  key: ({ id }, salt) => ({ nodeKey: `nodekey:${digits(id * 1_000_003 + salt)}` }),
  online: (_, salt) => (salt % 2 === 0 ? { online: true } : { online: false, lastSeen: salt * 1000 }),
  expiry: (_, salt) => ({ expiry: salt % 3 === 0 ? null : salt * 1000, expired: salt % 2 === 0 }),
  rename: ({ id }, salt) => ({ givenName: `name-${id}-${salt}`, nameFromHost: false }),
  tag: (_, salt) => ({ tags: [TAGS[salt % TAGS.length]!], userId: null }),
  owner: (_, salt) => ({ tags: [], userId: USERS[salt % USERS.length]! }),
  approval: (_, salt) => ({ authorized: salt % 3 > 0 }),
  advertise: ({ hostinfo }, salt) => ({ hostinfo: { ...hostinfo, RoutableIPs: salt % 3 === 0 ? [] : [ROUTE] } }),
  route: (_, salt) => ({ approvedRoutes: salt % 3 === 0 ? [] : [ROUTE] }),
  services: (_, salt) => ({ hostinfo: { OS: "linux", Services: [{ Proto: "peerapi4", Port: salt }] } }),
  attribute: (_, salt) => ({ attributes: { "custom:x": salt } }),
};

type Step =
  | { kind: "join"; salt: number }
  | { kind: "leave"; which: number }
  | { kind: "edit"; which: number; edit: string; salt: number }
  | { kind: "user"; which: number; salt: number }
  | { kind: "policy"; rules: Rule[] }
  | { kind: "config"; salt: number };

const rule = fc.record({ src: fc.constantFrom(...SELECTORS), dst: fc.constantFrom(...SELECTORS) });
const rules = fc.array(rule, { maxLength: 3 });
const salt = fc.nat(1000);
const which = fc.nat();
const of = <K extends Step["kind"]>(kind: K) => ({ kind: fc.constant(kind) });
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 3, arbitrary: fc.record({ ...of("join"), salt }) },
  { weight: 1, arbitrary: fc.record({ ...of("leave"), which }) },
  {
    weight: 8,
    arbitrary: fc.record({ ...of("edit"), which, edit: fc.constantFrom(...Object.keys(EDITS)), salt }),
  },
  { weight: 2, arbitrary: fc.record({ ...of("user"), which, salt }) },
  { weight: 1, arbitrary: fc.record({ ...of("policy"), rules }) },
  { weight: 1, arbitrary: fc.record({ ...of("config"), salt }) },
);

/** A tailnet, its clients, and which of them have read everything. */
class World {
  readonly model = new Model();
  readonly clients = new Map<number, Client>();
  private access: PolicyAccess;
  private config: TailnetConfig = makeConfig();
  private lastId = 0;

  constructor(private rules: readonly Rule[]) {
    this.model.apply({ users: USERS.map((id) => makeUser(id)) });
    this.access = new PolicyAccess(this.model, parsePolicy(policyText(rules)));
  }

  private commit(change: Change): void {
    const effect = this.model.apply(change);
    this.access.onApplied(effect);
  }

  act(action: Step): void {
    const ids = [...this.model.nodes.keys()];
    const chosen = "which" in action && ids.length > 0 ? this.model.nodes.get(ids[action.which % ids.length]!)! : null;
    if (action.kind === "join") {
      const id = ++this.lastId;
      this.commit({
        nodes: [makeNode(id, EDITS[action.salt % 2 === 0 ? "owner" : "tag"]!(makeNode(id), action.salt))],
      });
      this.clients.set(id, new Client(new View(id, this.config, this.access)));
    } else if (action.kind === "policy") {
      this.rules = action.rules;
      this.access.replace(policyText(action.rules));
    } else if (action.kind === "config") {
      const dns = { ...this.config.dns, ExtraRecords: [{ Name: "x.test", Value: `192.0.2.${action.salt % 256}` }] };
      const derpMap = { ...DERP_MAP, OmitDefaultRegions: action.salt % 2 === 0 };
      this.config = { ...this.config, ...(action.salt % 3 > 0 && { dns }), ...(action.salt % 3 < 2 && { derpMap }) };
      for (const { view } of this.clients.values()) view.configure(this.config);
    } else if (action.kind === "user") {
      const id = USERS[action.which % USERS.length]!;
      const role = ROLES[action.salt % ROLES.length]!;
      const status = action.salt % 3 === 0 ? "suspended" : "active";
      this.commit({ users: [makeUser(id, { displayName: `User ${action.salt}`, role, status })] });
    } else if (chosen && action.kind === "leave") {
      this.commit({ nodesRemoved: [chosen.id] });
      this.clients.delete(chosen.id);
    } else if (chosen && action.kind === "edit") {
      this.commit({ nodes: [{ ...chosen, ...EDITS[action.edit]!(chosen, action.salt) }] });
    }
  }

  /** One client reads what is due: it hears of nobody whom it may not see, and knows what one that comes anew is told. */
  check(id: number, client: Client): void {
    const message = client.read(this.model);
    const { users } = this.model;
    const self = this.model.nodes.get(id)!;
    const told = [
      ...(message?.Peers ?? []).map((peer) => peer.ID!),
      ...(message?.PeersChanged ?? []).map((peer) => peer.ID!),
      ...(message?.PeersChangedPatch ?? []).map((patch) => patch!.NodeID),
    ];
    for (const peer of told)
      expect([id, peer, maySee(this.rules, self, this.model.nodes.get(peer)!, users)]).toEqual([id, peer, true]);
    const visible = [...this.model.nodes.values()].filter(
      (peer) => peer.id !== id && maySee(this.rules, self, peer, users),
    );
    expect([...client.peers.keys()].sort((a, b) => a - b)).toEqual(
      visible.map((peer) => peer.id).sort((a, b) => a - b),
    );

    const fresh = new Client(new View(id, this.config, this.access));
    fresh.read(this.model);
    expect(client.knowledge).toEqual(fresh.knowledge);
    for (const [userId, profile] of fresh.profiles) expect(client.profiles.get(userId)).toEqual(profile);
    expect(client.view.next(this.model, 0)).toBeNull();
  }
}

test("deltas add up to the full netmap at each step, and nobody hears of a peer that he may not see", () => {
  fc.assert(
    fc.property(rules, fc.array(fc.tuple(step, fc.nat(7)), { maxLength: 40, size: "max" }), (first, steps) => {
      const world = new World(first);
      for (const [action, reading] of steps) {
        world.act(action);
        // Some read after each step, others wait and get several changes in one message.
        for (const [id, client] of world.clients) if ((id + reading) % 3 === 0) world.check(id, client);
      }
      for (const [id, client] of world.clients) world.check(id, client);
    }),
    { numRuns: 300, seed: 1 },
  );
});
