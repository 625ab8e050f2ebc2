// Which router serves a subnet that several could: an election by prefix among the nodes that are online, not expired and
// not known to be sick; the lowest id wins and keeps the route while it can (spec/headscale-features.md, section 11).
// Exit routes are never elected: every exit node is offered.
//
// Routers that share a subnet are probed: each is asked in every round, and one that does not answer in time is sick until
// it does. Being well again wins nothing back; a new map stream clears all. Pure: time is handed in.
import type { Effect, Model, NodeRecord } from "./model.ts";
import { activeRoutes, isExitRoute } from "./routes.ts";

export class Routing {
  /** Grows when any node's routes, the addresses of a router, or an election change. */
  generation = 0;
  private readonly known = new Map<number, { key: string; able: boolean }>();
  private readonly routers = new Map<string, Set<number>>();
  private readonly elected = new Map<string, number>();
  private readonly sick = new Set<number>();

  constructor(private readonly model: Model) {
    for (const node of model.nodes.values()) this.look(node.id, node);
  }

  /** Prefix -> id of the node that serves it. */
  get primaries(): ReadonlyMap<string, number> {
    return this.elected;
  }

  primaryRoutes(nodeId: number): string[] {
    const node = this.model.nodes.get(nodeId);
    return node ? activeRoutes(node).filter((route) => this.elected.get(route) === nodeId) : [];
  }

  /** Nodes with active routes. */
  get nodes(): Iterable<number> {
    return this.known.keys();
  }

  /** Nodes that share a subnet with another one that is online, too. Ascending. */
  contested(): number[] {
    const ids = new Set<number>();
    for (const routers of this.routers.values()) {
      const online = [...routers].filter((id) => this.isOnline(id));
      if (online.length > 1) for (const id of online) ids.add(id);
    }
    return [...ids].sort((a, b) => a - b);
  }

  isHealthy(nodeId: number): boolean {
    return !this.sick.has(nodeId);
  }

  /** A sick node serves only what nobody else could. */
  setHealthy(nodeId: number, healthy: boolean): void {
    if (this.isHealthy(nodeId) === healthy) return;
    if (healthy) this.sick.delete(nodeId);
    else this.sick.add(nodeId);
    for (const [route, routers] of this.routers) if (routers.has(nodeId)) this.elect(route, routers);
  }

  onApplied(effect: Effect): void {
    for (const id of effect.nodes) this.look(id, this.model.nodes.get(id));
  }

  private look(id: number, node: NodeRecord | undefined): void {
    const routes = node ? activeRoutes(node) : [];
    const before = this.known.get(id);
    if (!node?.online) this.sick.delete(id);
    const key = routes.length > 0 ? JSON.stringify([node!.ipv4, node!.ipv6, ...routes]) : "";
    const able = routes.length > 0 && this.isOnline(id);
    if (key === (before?.key ?? "") && able === (before?.able ?? false)) return;
    if (key !== before?.key) this.generation++;
    if (key === "") this.known.delete(id);
    else this.known.set(id, { key, able });
    const subnets = new Set(routes.filter((route) => !isExitRoute(route)));
    for (const route of subnets) if (!this.routers.has(route)) this.routers.set(route, new Set());
    for (const [route, routers] of this.routers) {
      if (subnets.has(route)) routers.add(id);
      else if (!routers.delete(id)) continue;
      this.elect(route, routers);
    }
  }

  private elect(route: string, routers: Set<number>): void {
    const last = this.elected.get(route);
    if (routers.size === 0) {
      this.routers.delete(route);
      this.elected.delete(route);
      return;
    }
    const ids = [...routers].sort((a, b) => a - b);
    const online = ids.filter((id) => this.isOnline(id));
    const able = online.filter((id) => this.isHealthy(id));
    const best = [able, online, ids].find((candidates) => candidates.length > 0)!;
    const next = last !== undefined && best.includes(last) ? last : best[0]!;
    if (next === last) return;
    this.elected.set(route, next);
    this.generation++;
  }

  private isOnline(id: number): boolean {
    const node = this.model.nodes.get(id)!;
    return node.online && !node.expired;
  }
}

export interface ProberOptions {
  /** Milliseconds between the rounds. */
  interval: number;
  /** Milliseconds that a router has to answer. */
  timeout: number;
}

/** When which router is asked, and which one has failed to answer. */
export class Prober {
  private nextRound = Number.NEGATIVE_INFINITY;
  /** By node: the number of the question, and when the answer is late. */
  private readonly open = new Map<number, { question: number; late: number }>();
  private questions = 0;

  constructor(private readonly options: ProberOptions) {}

  /** `routers`: those that share a subnet. Returns whom to ask now, and who is sick. */
  step(now: number, routers: readonly number[]): { ask: { nodeId: number; question: number }[]; sick: number[] } {
    const sick: number[] = [];
    const probed = new Set(routers);
    for (const [nodeId, { late }] of this.open) {
      if (probed.has(nodeId) && late > now) continue;
      this.open.delete(nodeId);
      if (probed.has(nodeId)) sick.push(nodeId);
    }
    const ask: { nodeId: number; question: number }[] = [];
    if (now >= this.nextRound) {
      this.nextRound = now + this.options.interval;
      for (const nodeId of routers) {
        if (this.open.has(nodeId)) continue;
        const question = ++this.questions;
        this.open.set(nodeId, { question, late: now + this.options.timeout });
        ask.push({ nodeId, question });
      }
    }
    return { ask, sick };
  }

  /** An answer came. True: in time, the router is well. */
  answered(nodeId: number, question: number, now: number): boolean {
    const asked = this.open.get(nodeId);
    if (asked?.question !== question || asked.late <= now) return false;
    this.open.delete(nodeId);
    return true;
  }

  /** The router has a new map stream: what it was asked on the old one counts no more. */
  connected(nodeId: number): void {
    this.open.delete(nodeId);
  }

  /** The router's map stream has ended: unless it comes back in the time that an answer may take, it is sick. */
  disconnected(nodeId: number, now: number): void {
    if (!this.open.has(nodeId)) this.open.set(nodeId, { question: ++this.questions, late: now + this.options.timeout });
  }

  /** When `step` has something to do, at the latest. */
  get wakeAt(): number {
    return Math.min(this.nextRound, ...[...this.open.values()].map(({ late }) => late));
  }
}
