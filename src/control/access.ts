// The policy in force and the tailnet that it is applied to. Compiled when something that it depends on has changed and
// somebody asks: changes that come together are compiled together.
import { createHash } from "node:crypto";
import { Routing } from "./ha.ts";
import type { Effect, Model, NodeRecord, UserRecord } from "./model.ts";
import type { Access, Circle, Decision } from "./netmap.ts";
import { OpenAccess } from "./open-access.ts";
import type { Range } from "./policy/addresses.ts";
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

type Log = (line: string) => void;

/** "1.80.3-t1234" and the like: what postures compare. */
function attributesOf({ hostinfo, attributes }: NodeRecord): Record<string, string | number | boolean> {
  const version = /^\d+\.\d+\.\d+/.exec(hostinfo.IPNVersion ?? "")?.[0];
  return {
    ...attributes,
    ...(hostinfo.OS && { "node:os": hostinfo.OS.toLowerCase() }),
    ...(hostinfo.OSVersion && { "node:osVersion": hostinfo.OSVersion }),
    ...(version && {
      "node:tsVersion": version,
      "node:tsReleaseTrack": Number(version.split(".")[1]) % 2 === 0 ? "stable" : "unstable",
    }),
  };
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

export class PolicyAccess implements Access {
  /** Who serves which routes. */
  readonly routing: Routing;
  /** What the policy in force approves by itself: another function when the policy is another. */
  approvals: Approvals;
  private compiled: Compiled | null = null;
  private readonly open: OpenAccess;
  private isOpen: boolean;
  private generation = 0;
  /** Of the routing, as of the last compilation. */
  private routed = -1;
  private readonly circles = new WeakMap<Bits, Circle>();
  private readonly interned = new Map<string, WeakRef<Circle>>();
  private readonly differences = new WeakMap<Circle, WeakMap<Circle, readonly number[]>>();
  private readonly inputs = new Map<number, string>();
  private users: readonly UserRecord[] = [];

  /** What of the policy does not fit this tailnet (a name of two users, a failed test) is logged, so that a server can start. */
  constructor(
    private readonly model: Model,
    private policy: Policy,
    private readonly log: Log = () => {},
    /** An identity provider may name groups that nobody has yet. */
    private readonly anyGroup = false,
  ) {
    this.routing = new Routing(model);
    this.open = new OpenAccess(model, this.routing);
    this.isOpen = saysNothing(policy);
    this.approvals = this.approvalsOf(policy);
    try {
      new Compiled(policy, this.tailnet(policy, true));
      runTests(policy, this.tailnet(policy, true));
    } catch (error) {
      if (!(error instanceof PolicyError)) throw error;
      log(`warning: policy: ${error.describe()}`);
    }
    for (const node of model.nodes.values()) this.inputs.set(node.id, inputOf(node));
    this.users = [...model.users.values()];
  }

  /** Reads a policy; groups that it does not define are known when some user has them from its identity provider. */
  private parse(text: string): Policy {
    const claimed = new Set([...this.model.users.values()].flatMap(({ groups }) => groups));
    return parsePolicy(text, (name) => this.anyGroup || claimed.has(name.slice("group:".length)));
  }

  /** All that can be wrong with a policy for this tailnet, its own tests among it. Throws PolicyError. */
  check(text: string): Policy {
    const policy = this.parse(text);
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
    this.generation++;
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
      this.compiled = null;
    }
    const users = [...this.model.users.values()];
    if (users.length !== this.users.length || users.some((user, i) => user !== this.users[i])) {
      this.users = users;
      this.compiled = null;
    }
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
    return [...this.model.users.values()].map(({ id, name, email, providerId, groups }) => ({
      id,
      name,
      email,
      providerId,
      groups: groups.map((group) => `group:${group}`),
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
      const active = activeRoutes(node);
      const more = approvals(node).filter((route) => !active.includes(route));
      return {
        id: node.id,
        name: node.givenName,
        userId: node.userId,
        tags: node.tags,
        ipv4: node.ipv4,
        ipv6: node.ipv6,
        routes: [...active, ...more],
        attributes: attributesOf(node),
      };
    });
    return { users: this.policyUsers(), nodes, primaries: this.routing.primaries };
  }

  private current(): Compiled {
    if (!this.compiled || this.routed !== this.routing.generation) {
      this.routed = this.routing.generation;
      const tailnet = this.tailnet(this.policy);
      try {
        this.compiled = new Compiled(this.policy, tailnet, false);
      } catch (error) {
        if (!(error instanceof PolicyError)) throw error;
        this.log(`the policy cannot be applied, nobody reaches anybody until it is replaced: ${error.describe()}`);
        this.compiled = new Compiled(parsePolicy(CLOSED), tailnet, false);
      }
      this.generation++;
    }
    return this.compiled;
  }

  get epoch(): number {
    if (!this.isOpen) this.current();
    else if (this.routed !== this.routing.generation) {
      this.routed = this.routing.generation;
      this.generation++;
    }
    return this.generation;
  }

  circle(viewer: number): Circle {
    if (this.isOpen) return this.open.circle;
    const compiled = this.current();
    const bits = compiled.circle(viewer);
    let circle = this.circles.get(bits);
    if (!circle) {
      circle = this.intern([...bits].map((i) => compiled.resolver.nodes[i]!.id));
      this.circles.set(bits, circle);
    }
    return circle;
  }

  /** Equal circles are one object, also after the next compilation: so most viewers find that nothing has changed. */
  private intern(ids: number[]): Circle {
    const key = createHash("sha256").update(ids.join()).digest("base64");
    const known = this.interned.get(key)?.deref();
    if (known) return known;
    const members = new Set(ids);
    const circle: Circle = { has: (id) => members.has(id), ids };
    if (this.interned.size > 10_000) {
      for (const [old, ref] of this.interned) if (!ref.deref()) this.interned.delete(old);
    }
    this.interned.set(key, new WeakRef(circle));
    return circle;
  }

  difference(a: Circle, b: Circle): readonly number[] {
    if (a === b) return [];
    // What is open to all has no list of its own that would stay true.
    if (a === this.open.circle || b === this.open.circle) {
      const [one, other] = a === this.open.circle ? [a, b] : [b, a];
      return one.ids.filter((id) => !other.has(id));
    }
    let of = this.differences.get(a);
    if (!of) {
      of = new WeakMap();
      this.differences.set(a, of);
    }
    let ids = of.get(b);
    if (!ids) {
      ids = [...a.ids.filter((id) => !b.has(id)), ...b.ids.filter((id) => !a.has(id))];
      of.set(b, ids);
    }
    return ids;
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

  decide(viewer: number): Decision {
    if (this.isOpen) return this.open.decide(viewer);
    const compiled = this.current();
    const { allowedIPs, primaryRoutes, capMap } = compiled.selfView(viewer);
    return {
      self: { allowedIPs, primaryRoutes, capMap },
      filter: () => compiled.packetFilter(viewer),
      filterDigest: compiled.packetFilterDigest(viewer),
      sshRules: compiled.sshRules(viewer),
      special: compiled.specialPeers(viewer),
    };
  }
}
