// The policy in force and the tailnet that it is applied to. Compiled when something that it depends on has changed and
// somebody asks: changes that come together are compiled together.
import { createHash } from "node:crypto";
import { formatPrefix, maskPrefix, parsePrefix } from "../wire/ip.ts";
import type { Effect, Model, NodeRecord, UserRecord } from "./model.ts";
import type { Access, Circle } from "./netmap.ts";
import type { Bits } from "./policy/bits.ts";
import {
  Compiled,
  type Policy,
  PolicyError,
  type PolicyNode,
  parsePolicy,
  runTests,
  type Tailnet,
} from "./policy/index.ts";

/** Nobody reaches anybody: what is left when a policy cannot be applied any more. */
const CLOSED = '{"acls": []}';

type Log = (line: string) => void;

/** "1.80.3-t1234" and the like: what postures compare. */
function attributesOf({ hostinfo }: NodeRecord): Record<string, string> {
  const version = /^\d+\.\d+\.\d+/.exec(hostinfo.IPNVersion ?? "")?.[0];
  return {
    ...(hostinfo.OS && { "node:os": hostinfo.OS.toLowerCase() }),
    ...(hostinfo.OSVersion && { "node:osVersion": hostinfo.OSVersion }),
    ...(version && {
      "node:tsVersion": version,
      "node:tsReleaseTrack": Number(version.split(".")[1]) % 2 === 0 ? "stable" : "unstable",
    }),
  };
}

function advertisedBy(node: NodeRecord): string[] {
  const prefixes = (node.hostinfo.RoutableIPs ?? []).slice(0, 1024).map((text) => parsePrefix(text));
  return [...new Set(prefixes.filter((prefix) => prefix !== null).map((prefix) => formatPrefix(maskPrefix(prefix))))];
}

/** What a policy depends on. Whether a router is online decides who serves its routes. */
function inputOf(node: NodeRecord): string {
  const routes = advertisedBy(node);
  const online = routes.length > 0 && node.online;
  return JSON.stringify([node.userId, node.tags, node.ipv4, node.ipv6, routes, online, attributesOf(node)]);
}

export class PolicyAccess implements Access {
  private compiled: Compiled | null = null;
  private generation = 0;
  private readonly circles = new WeakMap<Bits, Circle>();
  private readonly interned = new Map<string, WeakRef<Circle>>();
  private readonly differences = new WeakMap<Circle, WeakMap<Circle, readonly number[]>>();
  private readonly inputs = new Map<number, string>();
  private users: readonly UserRecord[] = [];
  /** Which router of a prefix was elected last: it keeps the route while it is online. */
  private primaries = new Map<string, number>();

  /** Throws PolicyError when the policy is wrong; tests that fail are logged, so that a server can start. */
  constructor(
    private readonly model: Model,
    private policy: Policy,
    private readonly log: Log = () => {},
  ) {
    new Compiled(policy, this.tailnet(policy));
    try {
      runTests(policy, this.tailnet(policy));
    } catch (error) {
      if (!(error instanceof PolicyError)) throw error;
      log(`warning: policy: ${error.describe()}`);
    }
    for (const node of model.nodes.values()) this.inputs.set(node.id, inputOf(node));
    this.users = [...model.users.values()];
  }

  /** Throws PolicyError, also when its own tests fail; then the policy in force stays. */
  replace(text: string): void {
    const policy = parsePolicy(text);
    new Compiled(policy, this.tailnet(policy));
    runTests(policy, this.tailnet(policy));
    if (policy.text === this.policy.text) return;
    this.policy = policy;
    this.compiled = null;
  }

  onApplied(effect: Effect): void {
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

  private tailnet(policy: Policy): Tailnet {
    const users = [...this.model.users.values()].map(({ id, name, email }) => ({ id, name, email }));
    const bare = [...this.model.nodes.values()].map((node): PolicyNode & { record: NodeRecord } => ({
      id: node.id,
      userId: node.userId,
      tags: node.tags,
      ipv4: node.ipv4,
      ipv6: node.ipv6,
      routes: [],
      attributes: attributesOf(node),
      record: node,
    }));
    const approve = new Compiled({ ...policy, accesses: [], ssh: [], nodeAttributes: [] }, { users, nodes: [] }, false);
    const nodes = bare.map(({ record, ...node }) => ({
      ...node,
      routes: approve.autoApproved(node, advertisedBy(record)),
    }));
    return { users, nodes, primaries: this.elect(nodes) };
  }

  private elect(nodes: readonly PolicyNode[]): Map<string, number> {
    const serving = new Map<string, number[]>();
    for (const { id, routes } of nodes)
      for (const route of routes) serving.set(route, [...(serving.get(route) ?? []), id]);
    const online = (id: number): boolean => this.model.nodes.get(id)!.online;
    return new Map(
      [...serving].map(([route, ids]) => {
        const last = this.primaries.get(route);
        const able = ids.filter(online).sort((a, b) => a - b);
        const keeps = last !== undefined && ids.includes(last) && (online(last) || able.length === 0);
        return [route, keeps ? last : (able[0] ?? Math.min(...ids))];
      }),
    );
  }

  private current(): Compiled {
    if (!this.compiled) {
      const tailnet = this.tailnet(this.policy);
      this.primaries = new Map(tailnet.primaries);
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
    this.current();
    return this.generation;
  }

  circle(viewer: number): Circle {
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

  decide(viewer: number) {
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
