// Subnet routes and exit nodes (docs/routes.md).
//
//   advertised   what the node asks to serve: Hostinfo.RoutableIPs
//   approved     what an administrator or the policy lets it serve: stored, kept when the node stops to advertise it
//   active       both: what it is ready to serve. Of several nodes with one subnet, ha.ts elects who does
//
// Routes are canonical text everywhere: masked, IPv4 before IPv6, sorted, each once.
import { compareIP, formatPrefix, maskPrefix, type Prefix, parsePrefix } from "../wire/ip.ts";
import type { Hostinfo } from "../wire/tailcfg.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import { type Effect, isAdmitted, type Model, type NodeRecord } from "./model.ts";

/** The default route of both families: what an exit node serves. They come and go as a pair. */
const EXIT_ROUTES: readonly string[] = ["0.0.0.0/0", "::/0"];
/** Of one node, advertised or approved. What it advertises beyond that is not looked at. */
const MAX_ROUTES = 1024;

export interface NodeRoutes {
  advertised: readonly string[];
  approved: readonly string[];
  /** Subnets that this node is elected for, and the exit routes that it offers. */
  serving: readonly string[];
  /** It is an exit node that others may be offered. */
  exit: boolean;
}

export function isExitRoute(route: string): boolean {
  return EXIT_ROUTES.includes(route);
}

/** Canonical, sorted, each once. */
function canonical(prefixes: readonly Prefix[]): string[] {
  const sorted = prefixes.map(maskPrefix).sort((a, b) => compareIP(a.ip, b.ip) || a.bits - b.bits);
  return [...new Set(sorted.map(formatPrefix))];
}

const advertised = new WeakMap<Hostinfo, readonly string[]>();

export function advertisedRoutes({ hostinfo }: NodeRecord): readonly string[] {
  let routes = advertised.get(hostinfo);
  if (!routes) {
    // From the network: whatever is no prefix is passed over.
    const list: unknown = hostinfo.RoutableIPs ?? [];
    const texts: unknown[] = Array.isArray(list) ? list.slice(0, MAX_ROUTES) : [];
    routes = canonical(
      texts.map((text) => (typeof text === "string" ? parsePrefix(text) : null)).filter((prefix) => prefix !== null),
    );
    advertised.set(hostinfo, routes);
  }
  return routes;
}

const active = new WeakMap<NodeRecord, readonly string[]>();

/** Advertised and approved, of a node that has been let in. */
export function activeRoutes(node: NodeRecord): readonly string[] {
  let routes = active.get(node);
  if (!routes) {
    const approved = new Set(node.approvedRoutes);
    routes = isAdmitted(node) ? advertisedRoutes(node).filter((route) => approved.has(route)) : [];
    active.set(node, routes);
  }
  return routes;
}

/** What an administrator wrote, canonical, with the other family's exit route beside one. Throws CommandError. */
function parseRoutes(prefixes: readonly string[]): string[] {
  if (prefixes.length > MAX_ROUTES)
    throw new CommandError(400, `${prefixes.length} routes are more than the ${MAX_ROUTES} that one node may have`);
  const parsed = prefixes.map((text) => {
    const prefix = text.includes("/") ? parsePrefix(text) : null;
    if (!prefix)
      throw new CommandError(400, `"${text.slice(0, 100)}" is no route: give a CIDR, for example 10.0.0.0/24 or ::/0`);
    return prefix;
  });
  const isExit = parsed.some((prefix) => isExitRoute(formatPrefix(maskPrefix(prefix))));
  return canonical(isExit ? [...parsed, ...EXIT_ROUTES.map((text) => parsePrefix(text)!)] : parsed);
}

/**
 * Replaces the approved routes of a node. They need not be advertised yet. Durable when it resolves.
 * Throws CommandError.
 */
export async function approveRoutes(
  ctx: ControlContext,
  nodeId: number,
  prefixes: readonly string[],
): Promise<NodeRecord> {
  const approvedRoutes = parseRoutes(prefixes);
  const node = ctx.model.nodes.get(nodeId);
  if (!node) throw new CommandError(404, `there is no node ${nodeId}: weft nodes list shows those that exist`);
  await ctx.journal.commit({ nodes: [{ ...node, approvedRoutes }] });
  return ctx.model.nodes.get(nodeId) ?? { ...node, approvedRoutes };
}

export function routesOf(ctx: ControlContext, node: NodeRecord): NodeRoutes {
  const exits = activeRoutes(node).filter(isExitRoute);
  return {
    advertised: advertisedRoutes(node),
    approved: node.approvedRoutes,
    serving: [...ctx.access.routing.primaryRoutes(node.id), ...exits],
    exit: exits.length > 0,
  };
}

/** What is approved of a node, with more. Where that is too much, routes go that it does not advertise. */
function withMore(node: NodeRecord, more: readonly string[]): string[] {
  const present = new Set(advertisedRoutes(node));
  const kept = [...node.approvedRoutes].sort((a, b) => Number(present.has(b)) - Number(present.has(a)));
  return parseRoutes([...more, ...kept].slice(0, MAX_ROUTES));
}

/** Of a node's advertised routes, those that the policy approves by itself. */
export type Approvals = (node: NodeRecord) => readonly string[];

/**
 * Stores what the policy approves: when a node advertises other routes or gets another owner or tags, and when the policy
 * is another. Approval only adds; what an administrator took away stays so until one of these happens.
 */
export class AutoApprover {
  /** What the approval of each router was decided by. */
  private readonly decided = new Map<number, string>();
  private readonly due = new Set<number>();
  private approvals: Approvals | null = null;

  constructor(private readonly model: Model) {}

  onApplied(effect: Effect): void {
    for (const id of effect.nodes) this.due.add(id);
    // Groups and names of a user decide about its nodes.
    if (effect.undo.users || effect.undo.usersRemoved) for (const id of this.decided.keys()) this.due.add(id);
  }

  /** Nodes with more approved routes than they have now. `approvals` null: there is no policy. */
  take(approvals: Approvals | null): NodeRecord[] {
    if (approvals !== this.approvals) {
      this.approvals = approvals;
      this.decided.clear();
      for (const node of this.model.nodes.values()) if (advertisedRoutes(node).length > 0) this.due.add(node.id);
    }
    const changed: NodeRecord[] = [];
    for (const id of this.due) {
      const node = this.model.nodes.get(id);
      if (!node || advertisedRoutes(node).length === 0) this.decided.delete(id);
      else if (this.approvals && this.isUndecided(node)) {
        const more = this.approvals(node).filter((route) => !node.approvedRoutes.includes(route));
        if (more.length > 0) changed.push({ ...node, approvedRoutes: withMore(node, more) });
      }
    }
    this.due.clear();
    return changed;
  }

  private isUndecided(node: NodeRecord): boolean {
    const user = node.userId === null ? null : this.model.users.get(node.userId);
    const owner = user && [user.id, user.name, user.email, user.groups, user.role];
    const key = JSON.stringify([advertisedRoutes(node), node.tags, owner]);
    if (this.decided.get(node.id) === key) return false;
    this.decided.set(node.id, key);
    return true;
  }
}
