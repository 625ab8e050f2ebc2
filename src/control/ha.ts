// Which router serves a subnet that several could: an election by prefix among the nodes that are online, not expired and
// not known to be sick; the lowest id wins and keeps the route while it can (spec/headscale-features.md, section 11).
// Exit routes are never elected: every exit node is offered. Pure.
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
