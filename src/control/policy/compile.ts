// Policy + tailnet -> what each node is told: packet filter, SSH rules, capabilities, peers, and the routes of each peer.
// Everything is decided when a compiled policy is made or, for one node, when it is asked for. Pure.
import { createHash } from "node:crypto";
import type * as tc from "../../wire/tailcfg.ts";
import { addressNumber, covers, INTERNET, parseRange, type Range, RangeSet } from "./addresses.ts";
import { Bits } from "./bits.ts";
import { type Place, PolicyError } from "./error.ts";
import { isAutogroup } from "./parse.ts";
import { isExitRoute, Resolver, type SubnetRoute } from "./resolve.ts";
import { Compiler, itemsAt, Meter, type NamedSources, type Reuse, type Rule } from "./rules.ts";
import { checkSSHSize, hasSSHCheck, type SSHDecision, sshDecisionFor, sshMembership, sshRulesFor } from "./ssh.ts";
import type { Policy, PolicyNode, PortRange, Selector, SSHRule, Tailnet } from "./types.ts";

export interface PeerView {
  /** Addresses and routes, as prefixes. */
  allowedIPs: string[];
  /** Subnet routes that lead to this peer; never exit routes. */
  primaryRoutes: string[];
  capMap: tc.CapMap;
}

const ALLOW_ALL = { src: [{ kind: "any", text: "*" }], dst: [{ kind: "any", text: "*" }] } as const;

/** Where anybody may have an account; so may every name that ends in ".github". */
const SHARED_DOMAINS = new Set([
  "passkey",
  "github",
  "gmail.com",
  "googlemail.com",
  "outlook.com",
  "hotmail.com",
  "live.com",
  "icloud.com",
  "yahoo.com",
]);

/** "user:*@domain" and "localpart:*@domain" may name only domains of this tailnet. */
function checkDomains(resolver: Resolver): void {
  const known = resolver.domains();
  if (!known) return;
  const check = (domain: string, place: Place | null): void => {
    if (known.has(domain)) return;
    const isShared = SHARED_DOMAINS.has(domain) || domain.endsWith(".github");
    const what = isShared ? "a shared domain" : "not associated with this Tailnet";
    throw new PolicyError(`${domain} is ${what} and cannot be used in user:*@<domain> expressions`, place);
  };
  const checkAll = (selectors: readonly Selector[], place: Place | null): void => {
    for (const selector of selectors) if (selector.kind === "domain") check(selector.domain, place);
  };
  const { accesses, ssh, nodeAttributes, tagOwners, approvers } = resolver.policy;
  for (const { src, dst, place } of accesses ?? []) checkAll([...src, ...dst], place);
  for (const { src, dst, localDomains, place } of ssh) {
    checkAll([...src, ...dst], place);
    for (const domain of localDomains) check(domain, place);
  }
  for (const { target, place } of nodeAttributes) checkAll(target, place);
  for (const owners of tagOwners.values()) checkAll(owners, null);
  for (const route of approvers.routes) checkAll(route.approvers, null);
  checkAll(approvers.exitNode, null);
}

const NO_ROUTES: ReadonlyMap<string, number> = new Map();

/** Where "funnel" may listen. */
const FUNNEL_PORTS = "https://tailscale.com/cap/funnel-ports?ports=443,8443,10000";

function portsOf(ports: readonly PortRange[]): tc.PortRange[] {
  return ports.map(({ first, last }) => ({ First: first, Last: last }));
}

function prefixOf(address: string): string {
  return `${address}/${address.includes(":") ? 128 : 32}`;
}

export class Compiled {
  readonly resolver: Resolver;
  readonly rules: readonly Rule[];
  /** Addresses among the destinations of each rule. */
  readonly destinations: readonly RangeSet[];
  private readonly named: NamedSources;
  private readonly capabilityLists: readonly tc.CapMap[];
  /** Nodes whose IPv4 address is not to be used. */
  readonly onlyIPv6: Bits;
  private readonly circles = new Map<string, Bits>();
  private readonly carriers = new Map<string, ReadonlyMap<string, number>>();

  /**
   * Throws PolicyError: a name that means two users, a foreign mail domain, or a policy that expands without end. A tailnet
   * that has changed under a policy in force is not `strict`: what a name cannot mean any more is nobody's.
   */
  constructor(
    readonly policy: Policy,
    tailnet: Tailnet,
    strict = true,
    /** The same policy before some nodes changed, if that saves work. */
    before: { compiled: Compiled; changed: ReadonlySet<number> } | null = null,
  ) {
    this.resolver = new Resolver(policy, tailnet, strict);
    const meter = new Meter();
    for (const [name, conditions] of policy.postures)
      meter.spend((conditions.length * this.resolver.nodes.length) >>> 3, `postures[${JSON.stringify(name)}]`, null);
    const compiler = new Compiler(this.resolver, meter, before && this.reusable(before.compiled, before.changed));
    this.named = compiler.named;
    const accesses = policy.accesses ?? [
      {
        ...ALLOW_ALL,
        section: "acls" as const,
        index: 0,
        place: { line: 1, column: 1 },
        postures: [],
        openings: [{ protocol: null, dst: [{ selector: ALLOW_ALL.dst[0], ports: [{ first: 0, last: 65535 }] }] }],
        capabilities: null,
        via: [],
      },
    ];
    for (const access of accesses) compiler.add(access);
    this.rules = compiler.rules.filter((rule) => rule.source.texts.length > 0);
    this.destinations = this.rules.map(({ addresses }) => RangeSet.of(addresses.map(({ range }) => range)));
    if (strict) checkDomains(this.resolver);
    this.capabilityLists = this.attributes(meter);
    checkSSHSize(this.resolver);
    this.onlyIPv6 = policy.disableIPv4 ? this.resolver.all : new Bits(this.resolver.nodes.length);
    if (!policy.disableIPv4 && policy.nodeAttributes.length > 0)
      for (const [i, list] of this.capabilityLists.entries())
        if (Object.hasOwn(list, "disable-ipv4")) this.onlyIPv6.add(i);
  }

  /** Nodes keep their numbers as long as none goes and new ones come last. */
  private reusable(before: Compiled, changed: ReadonlySet<number>): Reuse | null {
    const old = before.resolver.nodes;
    const { nodes } = this.resolver;
    if (old.some(({ id }, i) => nodes[i]?.id !== id)) return null;
    const indexes = [...changed].flatMap((id) => this.resolver.indexOf(id) ?? []);
    return { named: before.named, changed: Bits.of(nodes.length, indexes) };
  }

  private index(nodeId: number): number {
    const i = this.resolver.indexOf(nodeId);
    if (i === undefined) throw new RangeError(`node ${nodeId} is not in the tailnet that the policy was compiled for`);
    return i;
  }

  // ---- packet filter ----

  /** What may come into a node and the routes behind it. Empty: nothing. */
  packetFilter(nodeId: number): tc.FilterRule[] {
    const i = this.index(nodeId);
    const out: tc.FilterRule[] = [];
    for (const rule of this.rules) {
      if (!rule.targets.has(i)) continue;
      const filter = rule.capabilities ? this.capabilityRule(rule, i) : this.portRule(rule, i);
      if (filter) out.push(filter);
    }
    return out;
  }

  /** Equal for equal packet filters, also across compilations; much cheaper than the filter, whose sources are long. */
  packetFilterDigest(nodeId: number): string {
    const i = this.index(nodeId);
    const parts = this.rules
      .filter((rule) => rule.targets.has(i))
      .map((rule) => {
        const filter = rule.capabilities ? this.capabilityRule(rule, i) : this.portRule(rule, i);
        return filter && { ...filter, SrcIPs: rule.source.digest };
      });
    return createHash("sha256").update(JSON.stringify(parts)).digest("base64");
  }

  private portRule(rule: Rule, i: number): tc.FilterRule | null {
    const own = this.resolver.addressesOf(i);
    const dstPorts: tc.NetPortRange[] = [];
    for (const item of itemsAt(rule, i, this.resolver)) {
      const texts = item.text !== null ? [item.text] : rule.internet.includes(item) ? INTERNET.texts() : own;
      for (const IP of texts) for (const Ports of portsOf(item.ports)) dstPorts.push({ IP, Ports });
    }
    if (dstPorts.length === 0) return null;
    return {
      SrcIPs: rule.source.texts,
      DstPorts: dstPorts,
      ...(rule.protocol !== null && { IPProto: [rule.protocol] }),
    };
  }

  private capabilityRule(rule: Rule, i: number): tc.FilterRule | null {
    const items = itemsAt(rule, i, this.resolver);
    const dsts = this.resolver.addressesOf(i).filter((address) => {
      const n = addressNumber(address)!;
      return items.some(({ range }) => !range || covers(range, { first: n, last: n }));
    });
    if (dsts.length === 0) return null;
    return {
      SrcIPs: rule.source.texts,
      CapGrant: [{ Dsts: dsts.map(prefixOf), CapMap: { ...(rule.capabilities as tc.CapMap) } }],
    };
  }

  // ---- peers and their routes ----

  /** Ids of the nodes that a node may know of: some rule lets one of both reach the other. Ascending. */
  peers(nodeId: number): number[] {
    const i = this.index(nodeId);
    return [...this.circle(nodeId)].filter((peer) => peer !== i).map((peer) => this.resolver.nodes[peer]!.id);
  }

  /** Indexes of a node's peers, with or without its own. Nodes under the same rules share one set. */
  circle(nodeId: number): Bits {
    const { key, from, to } = this.membership(this.index(nodeId));
    let seen = this.circles.get(key);
    if (!seen) {
      seen = new Bits(this.resolver.nodes.length);
      for (const { targets } of from) seen.addAll(targets);
      for (const { source } of to) seen.addAll(source.nodes);
      this.circles.set(key, seen);
    }
    return seen;
  }

  /** Rules that a node is a source of, and those that it enforces. The key is the same for nodes under the same rules. */
  private membership(i: number): { key: string; from: Rule[]; to: Rule[] } {
    const from: Rule[] = [];
    const to: Rule[] = [];
    let key = "";
    for (let r = 0; r < this.rules.length; r++) {
      const rule = this.rules[r]!;
      const isSource = rule.source.nodes.has(i);
      const isTarget = rule.targets.has(i);
      if (isSource) from.push(rule);
      if (isTarget) to.push(rule);
      if (isSource || isTarget) key += `${r}${isSource ? "s" : ""}${isTarget ? "t" : ""}`;
    }
    return { key, from, to };
  }

  /** Peers of a viewer that are more, or less, than a node with two addresses. */
  specialPeers(viewerId: number): Map<number, PeerView> {
    const viewer = this.index(viewerId);
    const visible = this.circle(viewerId);
    const candidates = new Bits(this.resolver.nodes.length);
    candidates.addAll(this.withoutIPv4(viewer) ? this.resolver.all : this.onlyIPv6);
    for (const router of this.carriersFor(viewer).values()) candidates.add(router);
    for (const exit of this.resolver.exits) if (this.mayExitBy(viewer, exit)) candidates.add(exit);
    candidates.delete(viewer);
    const out = new Map<number, PeerView>();
    for (const i of candidates) {
      const { id } = this.resolver.nodes[i]!;
      if (visible.has(i)) out.set(id, this.peerView(viewerId, id));
    }
    return out;
  }

  /** Which router carries each subnet route for one viewer. Routes that it has no use for are absent. */
  private carriersFor(i: number): ReadonlyMap<string, number> {
    if (this.resolver.routes.length === 0) return NO_ROUTES;
    // Routers are told of the routes that they serve themselves.
    const key = this.resolver.nodes[i]!.routes.length > 0 ? `node ${i}` : this.membership(i).key;
    let found = this.carriers.get(key);
    if (!found) {
      const entries = this.resolver.routes.map((route) => [route.text, this.carrier(i, route)] as const);
      found = new Map(entries.filter((entry): entry is readonly [string, number] => entry[1] !== null));
      this.carriers.set(key, found);
    }
    return found;
  }

  private carrier(i: number, { range, routers, primary }: SubnetRoute): number | null {
    // Routers of a prefix know of its primary.
    let plain = routers.includes(i);
    const eligible = new Set<number>();
    for (const [r, rule] of this.rules.entries()) {
      if (plain) break;
      const outward = rule.source.nodes.has(i) && (rule.everywhere.length > 0 || this.destinations[r]!.overlaps(range));
      if (outward && rule.via.length === 0) plain = true;
      else if (outward) for (const router of routers) if (this.resolver.hasTag(router, rule.via)) eligible.add(router);
      // What may come from behind a router must find its way back.
      if (rule.targets.has(i) && rule.source.ranges.overlaps(range)) plain = true;
    }
    if (plain || eligible.has(primary)) return primary;
    return eligible.size > 0 ? Math.min(...eligible) : null;
  }

  private mayExitBy(i: number, exit: number): boolean {
    return (
      this.resolver.exits.has(exit) &&
      this.rules.some(
        (rule) =>
          rule.exit && rule.source.nodes.has(i) && (rule.via.length === 0 || this.resolver.hasTag(exit, rule.via)),
      )
    );
  }

  /** Subnet routes that a viewer has a use for, each with its router. */
  routesOf(viewerId: number): ReadonlyMap<string, number> {
    return this.carriersFor(this.index(viewerId));
  }

  /** Exit nodes that a viewer may use. */
  exitsOf(viewerId: number): number[] {
    const viewer = this.index(viewerId);
    return [...this.resolver.exits].filter((exit) => exit !== viewer && this.mayExitBy(viewer, exit));
  }

  /** The nodes behind which an address lies for a viewer: the router of its longest prefix, else usable exit nodes. */
  routersFor(viewerId: number, address: string): number[] {
    const viewer = this.index(viewerId);
    const n = addressNumber(address);
    if (n === null) return [];
    const holds = this.resolver.routes
      .filter(({ text, range }) => range.first <= n && n <= range.last && this.carriersFor(viewer).has(text))
      .sort((a, b) => (a.range.last - a.range.first < b.range.last - b.range.first ? -1 : 1));
    if (holds.length > 0) return [this.carriersFor(viewer).get(holds[0]!.text)!];
    return INTERNET.has(n) ? [...this.resolver.exits].filter((exit) => this.mayExitBy(viewer, exit)) : [];
  }

  /** Whether a node's IPv4 address is not to be used. */
  withoutIPv4(i: number): boolean {
    return this.onlyIPv6.has(i);
  }

  private ownAddresses(i: number, viewer: number): string[] {
    const addresses = this.resolver.addressesOf(i);
    const only6 = this.withoutIPv4(i) || this.withoutIPv4(viewer);
    return addresses.filter((address) => !only6 || address.includes(":")).map(prefixOf);
  }

  /** A peer as one viewer sees it. */
  peerView(viewerId: number, peerId: number): PeerView {
    const viewer = this.index(viewerId);
    const peer = this.index(peerId);
    const primaryRoutes = [...this.carriersFor(viewer)].filter(([, router]) => router === peer).map(([text]) => text);
    const exit = this.mayExitBy(viewer, peer) ? this.resolver.nodes[peer]!.routes.filter(isExitRoute) : [];
    return {
      allowedIPs: [...this.ownAddresses(peer, viewer), ...primaryRoutes, ...exit],
      primaryRoutes,
      capMap: exit.length > 0 ? { "suggest-exit-node": null } : {},
    };
  }

  /** A node as it sees itself: all of its approved routes, and those among them that it is primary for. */
  selfView(nodeId: number): PeerView {
    const i = this.index(nodeId);
    const routes = this.resolver.nodes[i]!.routes;
    const primary = this.resolver.routes.filter((route) => route.primary === i).map(({ text }) => text);
    return {
      allowedIPs: [...this.ownAddresses(i, i), ...routes],
      primaryRoutes: primary,
      capMap: this.capabilityLists[i]!,
    };
  }

  // ---- capabilities ----

  /** What `nodeAttrs` and the switches of the policy give a node. */
  capabilities(nodeId: number): tc.CapMap {
    return this.capabilityLists[this.index(nodeId)]!;
  }

  private attributes(meter: Meter): tc.CapMap[] {
    const { policy, resolver } = this;
    const common: tc.CapMap = {};
    if (policy.randomizeClientPort) common["randomize-client-port"] = null;
    if (policy.oneCGNAT !== null) common[`one-cgnat?v=${policy.oneCGNAT}`] = null;
    if (policy.nodeAttributes.length === 0) return resolver.nodes.map(() => common);
    const lists = resolver.nodes.map((): tc.CapMap => ({ ...common }));
    for (const { target, attributes, app, index, place } of policy.nodeAttributes) {
      const nodes = new Bits(resolver.nodes.length);
      for (const selector of target) nodes.addAll(resolver.targets(selector));
      meter.spend(nodes.count * (attributes.length + Object.keys(app).length), `nodeAttrs[${index}]`, place);
      for (const i of nodes) {
        const list = lists[i]!;
        for (const name of attributes) {
          set(list, name, null);
          if (name !== "funnel") continue;
          set(list, FUNNEL_PORTS, null);
          if (!resolver.tailnet.https) set(list, "https://tailscale.com/cap/warn-funnel-no-https", null);
        }
        for (const [name, values] of Object.entries(app)) {
          const before = Object.hasOwn(list, name) ? (list[name] ?? []) : [];
          set(list, name, values === null ? null : [...before, ...values]);
        }
      }
    }
    return lists;
  }

  /** Where `ipPool` wants the addresses of a new node to come from; empty: anywhere. */
  addressPools(node: Pick<PolicyNode, "userId" | "tags">): Range[] {
    return this.policy.nodeAttributes
      .filter(({ ipPool, target }) => ipPool.length > 0 && target.some((selector) => this.means(selector, node)))
      .flatMap(({ ipPool }) => ipPool);
  }

  /** Whether a selector stands for a node by its owner or tags. */
  private means(selector: Selector, node: Pick<PolicyNode, "userId" | "tags">): boolean {
    const tagged = node.tags.length > 0;
    if (selector.kind === "any") return true;
    if (selector.kind === "tag") return node.tags.includes(selector.name);
    if (isAutogroup(selector, "tagged")) return tagged;
    return !tagged && node.userId !== null && (this.resolver.users(selector)?.has(node.userId) ?? false);
  }

  // ---- SSH ----

  /** In the order in which the client tries them. */
  sshRules(nodeId: number): SSHRule[] {
    return sshRulesFor(this.resolver, this.index(nodeId));
  }

  /** What decides on a session of `login`; null: it is refused. */
  sshDecision(sourceId: number, targetId: number, login: string): SSHDecision | null {
    return sshDecisionFor(this.resolver, this.index(sourceId), this.index(targetId), login);
  }

  /** Equal for nodes that all SSH entries treat alike, but for whose they are. */
  sshMembership(nodeId: number): string {
    return sshMembership(this.resolver, this.index(nodeId));
  }

  /** Whether the check rule with this digest is about these two nodes. */
  hasSSHCheck(sourceId: number, targetId: number, rule: string): boolean {
    return hasSSHCheck(this.resolver, this.index(sourceId), this.index(targetId), rule);
  }

  /** Routes that a node advertises and that `autoApprovers` approves by themselves. */
  autoApproved(node: Pick<PolicyNode, "userId" | "tags">, advertised: readonly string[]): string[] {
    const approves = (selector: Selector): boolean => this.means(selector, node);
    const { routes, exitNode } = this.policy.approvers;
    return advertised.filter((text) => {
      // Exit routes are a pair and have their own list; a prefix of 0 bits among the routes approves nothing.
      if (isExitRoute(text)) return exitNode.some(approves);
      const range = parseRange(text);
      return range !== null && routes.some((entry) => covers(entry.range, range) && entry.approvers.some(approves));
    });
  }
}

function set(list: tc.CapMap, name: string, values: unknown[] | null): void {
  Object.defineProperty(list, name, { value: values, enumerable: true, writable: true, configurable: true });
}
