// The policy in force and the tailnet that it is applied to. Compiled when something that it depends on has changed and
// somebody asks: changes that come together are compiled together.
import type * as tc from "../wire/tailcfg.ts";
import type { AttributeValue } from "./attributes.ts";
import { COUNTRY } from "./geoip.ts";
import { Routing } from "./ha.ts";
import type { Effect, Model, NodeRecord, UserRecord } from "./model.ts";
import { type Access, type Circle, circleOf, type Decision } from "./netmap.ts";
import { OpenAccess } from "./open-access.ts";
import type { Range } from "./policy/addresses.ts";
import { affectedBy } from "./policy/affected.ts";
import type { Bits } from "./policy/bits.ts";
import {
  type Comparison,
  Compiled,
  compare,
  type ExplainQuestion,
  type Explanation,
  explain,
  type Policy,
  PolicyError,
  type PolicyNode,
  type PolicyUser,
  parsePolicy,
  runTests,
  type SSHDecision,
  type Tailnet,
} from "./policy/index.ts";
import { Resolver } from "./policy/resolve.ts";
import { type Approvals, activeRoutes, advertisedRoutes } from "./routes.ts";

/** Nobody reaches anybody: what is left when a policy cannot be applied any more. */
const CLOSED = '{"acls": []}';

const NO_CAPABILITIES: tc.CapMap = {};
const ADMIN: tc.CapMap = { "https://tailscale.com/cap/is-admin": null };
const OWNER: tc.CapMap = { ...ADMIN, "https://tailscale.com/cap/is-owner": null };

type Log = (line: string) => void;

/** What postures compare: what was set of a node, and what it says of itself. */
export function attributesOf({ hostinfo, attributes }: NodeRecord): Record<string, AttributeValue> {
  // Of "1.80.3-t1234" and the like.
  const version = /^\d+\.\d+\.\d+/.exec(hostinfo.IPNVersion ?? "")?.[0];
  return {
    ...attributes,
    "node:tsAutoUpdate": hostinfo.AllowsUpdate === true,
    "node:tsStateEncrypted": hostinfo.StateEncrypted === true,
    ...(hostinfo.OS && { "node:os": hostinfo.OS.toLowerCase() }),
    ...(hostinfo.OSVersion && { "node:osVersion": hostinfo.OSVersion }),
    ...(version && {
      "node:tsVersion": version,
      "node:tsReleaseTrack": Number(version.split(".")[1]) % 2 === 0 ? "stable" : "unstable",
    }),
  };
}

const policyNodes = new WeakMap<NodeRecord, PolicyNode>();

/** A node as policies know it. Records are immutable, so each is read once. */
function policyNode(node: NodeRecord): PolicyNode {
  let found = policyNodes.get(node);
  if (!found) {
    const { id, givenName, userId, tags, ipv4, ipv6 } = node;
    found = {
      id,
      name: givenName,
      userId,
      tags,
      ipv4,
      ipv6,
      routes: activeRoutes(node),
      attributes: attributesOf(node),
    };
    policyNodes.set(node, found);
  }
  return found;
}

/** What a policy depends on, beside the routes. */
function inputOf(node: NodeRecord): string {
  return JSON.stringify([node.userId, node.tags, node.ipv4, node.ipv6, attributesOf(node)]);
}

/** Whether it restricts nothing and gives nothing: then nothing needs to be compiled. */
function saysNothing(policy: Policy): boolean {
  const { accesses, ssh, nodeAttributes, randomizeClientPort, disableIPv4, oneCGNAT } = policy;
  return !(accesses || ssh.length || nodeAttributes.length || randomizeClientPort || disableIPv4 || oneCGNAT !== null);
}

export interface AccessOptions {
  /** An identity provider may name groups that nobody has yet. */
  anyGroup?: boolean;
  /** Where addresses of nodes come from; Tailscale's ranges when absent. */
  prefixes?: readonly string[];
  /** Nodes can get certificates. */
  https?: boolean;
  /** The countries of nodes are known. */
  countries?: boolean;
}

export class PolicyAccess implements Access {
  /** Why the relays of a policy cannot be used; null when they can. */
  relayProblem: (derpMap: tc.DERPMap | null) => string | null = () => null;
  /** Who serves which routes. */
  readonly routing: Routing;
  /** What the policy in force approves by itself: another function when the policy is another. */
  approvals: Approvals;
  private compiled: Compiled | null = null;
  private readonly open: OpenAccess;
  private isOpen: boolean;
  /** Last epoch that was given out; that of all viewers; and those of some that were concerned after it. */
  private lastEpoch = 0;
  private eraStart = 0;
  private readonly epochs = new Map<number, number>();
  /** Nodes that are not yet as they should be in `compiled`. */
  private readonly changed = new Set<number>();
  /** Of the routing, as of the last compilation. */
  private routed = -1;
  private readonly circles = new WeakMap<Bits, Circle>();
  /** By node, of those that were asked about since the last compilation. */
  private readonly circlesOf = new Map<number, Circle>();
  private readonly inputs = new Map<number, string>();
  private users: readonly UserRecord[] = [];
  /** Whether somebody is more than a member. */
  private hasRoles = false;

  /** What of the policy does not fit this tailnet (a name of two users, a failed test) is logged, so that a server can start. */
  constructor(
    private readonly model: Model,
    private policy: Policy,
    private readonly log: Log = () => {},
    private readonly options: AccessOptions = {},
  ) {
    this.routing = new Routing(model);
    this.open = new OpenAccess(model, this.routing);
    this.isOpen = saysNothing(policy);
    this.approvals = this.approvalsOf(policy);
    try {
      this.checkPostures(policy);
      new Compiled(policy, this.tailnet(policy, true));
      runTests(policy, this.tailnet(policy, true));
    } catch (error) {
      if (!(error instanceof PolicyError)) throw error;
      log(`warning: policy: ${error.describe()}`);
    }
    for (const node of model.nodes.values()) this.inputs.set(node.id, inputOf(node));
    this.takeUsers();
  }

  /** Reads a policy; groups that it does not define are known when some user has them from its identity provider. */
  private parse(text: string): Policy {
    const claimed = new Set([...this.model.users.values()].flatMap(({ groups }) => groups));
    return parsePolicy(text, (name) => this.options.anyGroup || claimed.has(name.slice("group:".length)));
  }

  /** What a posture asks about addresses must be known, or it would shut everybody out. Throws PolicyError. */
  private checkPostures({ postures }: Policy): void {
    for (const [name, conditions] of postures) {
      const asked = conditions.find(
        ({ attribute }) => attribute.startsWith("ip:") && !(attribute === COUNTRY && this.options.countries),
      );
      if (!asked) continue;
      const { attribute } = asked;
      const why =
        attribute === COUNTRY
          ? "without a table of countries this server knows it of no node: name one (geoip.path)"
          : `of addresses nothing but ${COUNTRY} is known`;
      throw new PolicyError(`postures[${JSON.stringify(name)}]: ${attribute} cannot be compared, ${why}`);
    }
  }

  /** All that can be wrong with a policy for this tailnet, its own tests among it. Throws PolicyError. */
  check(text: string): Policy {
    const policy = this.parse(text);
    this.checkPostures(policy);
    const problem = this.relayProblem(policy.derpMap);
    if (problem) throw new PolicyError(problem);
    const tailnet = this.tailnet(policy, true);
    new Compiled(policy, tailnet);
    runTests(policy, tailnet);
    return policy;
  }

  /** Puts a checked policy in force. */
  put(policy: Policy): void {
    if (policy.text === this.policy.text) return;
    this.policy = policy;
    this.isOpen = saysNothing(policy);
    this.approvals = this.approvalsOf(policy);
    this.compiled = null;
    this.startEra();
  }

  /** Checks and puts. Throws PolicyError; then the policy in force stays. */
  replace(text: string): void {
    this.put(this.check(text));
  }

  onApplied(effect: Effect): void {
    this.routing.onApplied(effect);
    for (const id of effect.nodes) {
      const node = this.model.nodes.get(id);
      const input = node && inputOf(node);
      if (input === this.inputs.get(id)) continue;
      if (input === undefined) this.inputs.delete(id);
      else this.inputs.set(id, input);
      this.changed.add(id);
    }
    const { users: before = [], usersRemoved: added = [] } = effect.undo;
    if (before.length + added.length === 0) return;
    this.takeUsers();
    const isMoved = before.some((user) => this.changesMeaning(user, this.model.users.get(user.id)));
    if (isMoved || added.some((id) => this.changesMeaning(undefined, this.model.users.get(id)))) this.compiled = null;
  }

  private takeUsers(): void {
    this.users = [...this.model.users.values()];
    const hasRoles = this.users.some(({ role }) => role !== "member");
    if (hasRoles !== this.hasRoles) this.startEra();
    this.hasRoles = hasRoles;
  }

  /** Whether a word of the policy may mean another user now: somebody who comes or goes matters by a shared name alone. */
  private changesMeaning(before: UserRecord | undefined, after: UserRecord | undefined): boolean {
    const wordsOf = ({ name, email, providerId }: UserRecord): string[] =>
      [`${name}@`, name, email, providerId].map((word) => word.toLowerCase()).filter((word) => /[^@]/.test(word));
    if (before && after) {
      const form = (user: UserRecord) => JSON.stringify([wordsOf(user), user.groups, user.role]);
      return form(before) !== form(after);
    }
    const user = before ?? after;
    if (!user) return false;
    const words = new Set(wordsOf(user));
    return this.users.some((other) => other.id !== user.id && wordsOf(other).some((word) => words.has(word)));
  }

  /** What the policy in force changes in the DERP map. */
  get derpMap(): tc.DERPMap | null {
    return this.policy.derpMap;
  }

  /** Whether the policy knows this tag. Where there is no policy at all, any tag will do. */
  hasTag(tag: string): boolean {
    return this.policy.text === "" || this.policy.tagOwners.has(tag);
  }

  /** Whether tagOwners give a tag to a user, or to whoever has one of these tags. Who owns an owning tag owns as well. */
  mayClaim(tag: string, who: { userId?: number; tags?: readonly string[] }): boolean {
    const resolver = new Resolver(this.policy, { users: this.policyUsers(), nodes: [] }, false);
    const seen = new Set<string>();
    const owns = (name: string): boolean => {
      if (seen.has(name)) return false;
      seen.add(name);
      return (this.policy.tagOwners.get(name) ?? []).some((owner) => {
        if (owner.kind === "tag") return who.tags?.includes(owner.name) || owns(owner.name);
        return who.userId !== undefined && (resolver.users(owner)?.has(who.userId) ?? false);
      });
    };
    return owns(tag);
  }

  /** Where the policy wants the addresses of such a node to come from; empty: anywhere. */
  addressPools(owner: Pick<NodeRecord, "userId" | "tags">): Range[] {
    if (!this.policy.nodeAttributes.some(({ ipPool }) => ipPool.length > 0)) return [];
    return this.current().addressPools(owner);
  }

  private policyUsers(): PolicyUser[] {
    return [...this.model.users.values()].map(({ id, name, email, providerId, groups, role }) => ({
      id,
      name,
      email,
      providerId,
      groups: groups.map((group) => `group:${group}`),
      role,
    }));
  }

  private approvalsOf(policy: Policy): Approvals {
    const bare = { ...policy, accesses: [], ssh: [], nodeAttributes: [] };
    let users: readonly UserRecord[] = [];
    let compiled: Compiled | null = null;
    return (node) => {
      const { routes, exitNode } = policy.approvers;
      if (routes.length === 0 && exitNode.length === 0) return [];
      if (!compiled || users !== this.users) {
        users = this.users;
        compiled = new Compiled(bare, { users: this.policyUsers(), nodes: [] }, false);
      }
      return compiled.autoApproved(node, advertisedRoutes(node));
    };
  }

  /** `foreseeing`: with the routes that the policy will approve. */
  private tailnet(policy: Policy, foreseeing = false): Tailnet {
    const approvals = foreseeing ? this.approvalsOf(policy) : () => [];
    const nodes = [...this.model.nodes.values()].map((node): PolicyNode => {
      if (!foreseeing) return policyNode(node);
      const active = activeRoutes(node);
      const more = approvals(node).filter((route) => !active.includes(route));
      return { ...policyNode(node), routes: [...active, ...more] };
    });
    const { prefixes, https = false } = this.options;
    const primaries = this.routing.primaries;
    return { users: this.policyUsers(), nodes, primaries, https, ...(prefixes && { prefixes }) };
  }

  /** Any answer for any viewer may be another one from now on. */
  private startEra(): void {
    this.eraStart = ++this.lastEpoch;
    this.epochs.clear();
  }

  /** The policy applied to the tailnet of now. */
  private current(): Compiled {
    const isRouted = this.routed === this.routing.generation;
    if (this.compiled && isRouted && this.changed.size === 0) return this.compiled;
    this.routed = this.routing.generation;
    const before = isRouted ? this.compiled : null;
    const changed = new Set(this.changed);
    this.changed.clear();
    this.circlesOf.clear();
    this.compiled = this.compile(before && { compiled: before, changed });
    // A policy that cannot be applied, or could not be, is not the same before and after.
    const isSame = before?.policy === this.policy && this.compiled.policy === this.policy;
    const concerned = isSame ? affectedBy(before, this.compiled, changed) : null;
    if (!concerned) this.startEra();
    else {
      this.lastEpoch++;
      for (const id of concerned) this.epochs.set(id, this.lastEpoch);
      for (const id of changed) if (!this.model.nodes.has(id)) this.epochs.delete(id);
    }
    return this.compiled;
  }

  private compile(before: { compiled: Compiled; changed: ReadonlySet<number> } | null): Compiled {
    const tailnet = this.tailnet(this.policy);
    try {
      return new Compiled(this.policy, tailnet, false, before);
    } catch (error) {
      if (!(error instanceof PolicyError)) throw error;
      this.log(`the policy cannot be applied, nobody reaches anybody until it is replaced: ${error.describe()}`);
      return new Compiled(parsePolicy(CLOSED), tailnet, false);
    }
  }

  private settle(): void {
    if (!this.isOpen) this.current();
    else if (this.routed !== this.routing.generation) {
      this.routed = this.routing.generation;
      this.startEra();
    }
  }

  get era(): number {
    this.settle();
    return this.eraStart;
  }

  epochOf(viewer: number): number {
    this.settle();
    return this.epochs.get(viewer) ?? this.eraStart;
  }

  sees(viewer: number, peer: number): boolean {
    if (this.isOpen) return true;
    const compiled = this.current();
    // Sight is mutual, and after a change all viewers ask about the same few peers.
    let circle = this.circlesOf.get(peer);
    if (!circle) {
      if (compiled.resolver.indexOf(peer) === undefined) return false;
      circle = this.circle(peer);
      this.circlesOf.set(peer, circle);
    }
    return circle.set.has(viewer);
  }

  circle(viewer: number): Circle {
    if (this.isOpen) return this.open.circle;
    const compiled = this.current();
    const bits = compiled.circle(viewer);
    let circle = this.circles.get(bits);
    if (!circle) {
      circle = circleOf([...bits].map((i) => compiled.resolver.nodes[i]!.id));
      this.circles.set(bits, circle);
    }
    return circle;
  }

  /** Which rules let a connection through, or come nearest. Throws PolicyError when a word means nothing. */
  why(question: ExplainQuestion): Explanation {
    return explain(this.snapshot(), question);
  }

  /** What another policy would change. Throws PolicyError when it could not be set. */
  try(text: string): Comparison {
    const policy = this.check(text);
    return compare(this.snapshot(), new Compiled(policy, this.tailnet(policy, true), false));
  }

  /** The policy in force with names and routes of now. */
  private snapshot(): Compiled {
    return new Compiled(this.policy, this.tailnet(this.policy), false);
  }

  /** What decides on an SSH session of a login; null: it is refused. */
  sshDecision(sourceId: number, targetId: number, login: string): SSHDecision | null {
    return this.isOpen ? null : this.current().sshDecision(sourceId, targetId, login);
  }

  /** Whether the check rule with this digest is about these two nodes. */
  hasSSHCheck(sourceId: number, targetId: number, rule: string): boolean {
    return !this.isOpen && this.current().hasSSHCheck(sourceId, targetId, rule);
  }

  roleCapabilities({ userId }: NodeRecord): tc.CapMap {
    if (!this.hasRoles) return ADMIN;
    const role = userId === null ? undefined : this.model.users.get(userId)?.role;
    return role === "owner" ? OWNER : role === "admin" ? ADMIN : NO_CAPABILITIES;
  }

  decide(viewer: number): Decision {
    if (this.isOpen) return this.open.decide(viewer);
    const compiled = this.current();
    const { allowedIPs, primaryRoutes, capMap } = compiled.selfView(viewer);
    return {
      self: { allowedIPs, primaryRoutes, capMap },
      // Views outlive compilations.
      filter: () => this.current().packetFilter(viewer),
      filterDigest: compiled.packetFilterDigest(viewer),
      sshRules: compiled.sshRules(viewer),
      special: compiled.specialPeers(viewer),
    };
  }
}
