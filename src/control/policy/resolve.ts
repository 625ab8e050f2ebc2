// Selectors of a policy -> users, nodes and addresses of a tailnet. Nodes are numbered by their place in the tailnet,
// sorted by id; sets of them are bitmaps.
import {
  addressNumber,
  EVERYTHING,
  overlaps,
  parseRange,
  type Range,
  RangeSet,
  TAILNET,
  tailnetRanges,
} from "./addresses.ts";
import { Bits } from "./bits.ts";
import { PolicyError } from "./error.ts";
import { postureTest } from "./postures.ts";
import { rolesOf } from "./selectors.ts";
import type { Policy, PolicyNode, PolicyUser, Selector, Tailnet } from "./types.ts";

export interface SubnetRoute {
  readonly text: string;
  readonly range: Range;
  /** All nodes that serve it, lowest id first. */
  readonly routers: readonly number[];
  readonly primary: number;
}

export function isExitRoute(text: string): boolean {
  return text === "0.0.0.0/0" || text === "::/0";
}

function lower(text: string): string {
  return text.toLowerCase();
}

function domainOf(email: string): string {
  return lower(email.slice(email.lastIndexOf("@") + 1));
}

export class Resolver {
  readonly nodes: readonly PolicyNode[];
  readonly all: Bits;
  readonly tagged: Bits;
  readonly routes: readonly SubnetRoute[];
  /** Nodes with an approved exit route. */
  readonly exits: Bits;
  private readonly indexes = new Map<number, number>();
  private readonly subnets: { node: number; range: Range }[] = [];
  /** Every address of a node, ascending. Made when somebody asks: many policies name no address. */
  private sortedAddresses: { n: bigint; node: number }[] | null = null;
  private readonly byUser = new Map<number, number[]>();
  private readonly byTag = new Map<string, number[]>();
  private readonly usersByName = new Map<string, PolicyUser[]>();
  private readonly usersByProvider = new Map<string, PolicyUser>();
  private readonly claimed = new Map<string, number[]>();
  private readonly usersById = new Map<number, PolicyUser>();
  private readonly cache = new Map<string, Bits>();
  private readonly groups = new Map<string, ReadonlySet<number>>();
  private readonly postures = new Map<string, Bits>();
  /** Where addresses of nodes come from. */
  readonly own: RangeSet;

  constructor(
    readonly policy: Policy,
    readonly tailnet: Tailnet,
    /** Whether a name that means two users is an error; else it means nobody. */
    private readonly strict = true,
  ) {
    this.own = tailnet.prefixes ? tailnetRanges(tailnet.prefixes) : TAILNET;
    this.nodes = [...tailnet.nodes].sort((a, b) => a.id - b.id);
    this.all = Bits.all(this.nodes.length);
    this.tagged = new Bits(this.nodes.length);
    this.exits = new Bits(this.nodes.length);
    const routers = new Map<string, number[]>();
    for (const [i, node] of this.nodes.entries()) {
      this.indexes.set(node.id, i);
      if (node.tags.length > 0) this.tagged.add(i);
      else if (node.userId !== null) append(this.byUser, node.userId, i);
      for (const tag of node.tags) if (this.byTag.get(tag)?.at(-1) !== i) append(this.byTag, tag, i);
      for (const route of node.routes) {
        if (isExitRoute(route)) this.exits.add(i);
        else if (routers.get(route)?.at(-1) !== i) append(routers, route, i);
      }
    }
    this.routes = [...routers].flatMap(([text, serving]) => {
      const range = parseRange(text);
      if (!range) return [];
      for (const node of serving) this.subnets.push({ node, range });
      const elected = this.indexes.get(tailnet.primaries?.get(text) ?? -1);
      const primary = elected !== undefined && serving.includes(elected) ? elected : serving[0]!;
      return [{ text, range, routers: serving, primary }];
    });
    for (const user of tailnet.users) {
      this.usersById.set(user.id, user);
      if (user.providerId) this.usersByProvider.set(lower(user.providerId), user);
      for (const group of new Set(user.groups)) append(this.claimed, group, user.id);
      // "name@" and the mail address. Who has the name of another's address is that user as well: then it is ambiguous.
      const names = new Set([lower(`${user.name}@`), ...(user.email ? [lower(user.email)] : [])]);
      if (user.name.includes("@")) names.add(lower(user.name));
      for (const name of names) append(this.usersByName, name, user);
    }
  }

  indexOf(nodeId: number): number | undefined {
    return this.indexes.get(nodeId);
  }

  user(id: number | null): PolicyUser | undefined {
    return id === null ? undefined : this.usersById.get(id);
  }

  /** Untagged nodes of a user. */
  nodesOfUser(userId: number): readonly number[] {
    return this.byUser.get(userId) ?? [];
  }

  isSubnetRouter(node: number, range: Range): boolean {
    return this.subnets.some((subnet) => subnet.node === node && overlaps(subnet.range, range));
  }

  addressesOf(node: number): string[] {
    const { ipv4, ipv6 } = this.nodes[node]!;
    return [...(ipv4 ? [ipv4] : []), ...(ipv6 ? [ipv6] : [])];
  }

  hasTag(node: number, tags: readonly string[]): boolean {
    return this.nodes[node]!.tags.some((tag) => tags.includes(tag));
  }

  private get addresses(): { n: bigint; node: number }[] {
    this.sortedAddresses ??= this.nodes
      .flatMap(({ ipv4, ipv6 }, node) =>
        [addressNumber(ipv4), addressNumber(ipv6)].flatMap((n) => (n === null ? [] : [{ n, node }])),
      )
      .sort((a, b) => (a.n < b.n ? -1 : 1));
    return this.sortedAddresses;
  }

  /** Nodes that hold an address of the range, each once. */
  nodesIn(range: Range): number[] {
    const { addresses } = this;
    let low = 0;
    let high = addresses.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (addresses[middle]!.n < range.first) low = middle + 1;
      else high = middle;
    }
    const found = new Set<number>();
    for (let i = low; i < addresses.length && addresses[i]!.n <= range.last; i++) {
      found.add(addresses[i]!.node);
    }
    return [...found];
  }

  /** Nodes that serve a route which overlaps the range, each once. */
  routersOf(range: Range): number[] {
    return [...new Set(this.subnets.filter((subnet) => overlaps(subnet.range, range)).map(({ node }) => node))];
  }

  /** Whom a selector that stands for users means; null: it stands for something else. */
  users(selector: Selector): ReadonlySet<number> | null {
    switch (selector.kind) {
      case "user": {
        const provided = this.usersByProvider.get(lower(selector.token));
        if (provided) return new Set([provided.id]);
        const users = this.usersByName.get(lower(selector.token)) ?? [];
        if (users.length > 1 && !this.strict) return new Set();
        if (users.length > 1) {
          throw new PolicyError(
            `${JSON.stringify(selector.text)} means ${users.length} users: write the mail address of one`,
          );
        }
        return new Set(users.map(({ id }) => id));
      }
      case "domain":
        return new Set(
          this.tailnet.users.filter(({ email }) => domainOf(email) === selector.domain).map(({ id }) => id),
        );
      case "group": {
        let found = this.groups.get(selector.name);
        if (!found) {
          const members = (this.policy.groups.get(selector.name) ?? []).flatMap((member) => [...this.users(member)!]);
          found = new Set([...members, ...(this.claimed.get(selector.name) ?? [])]);
          this.groups.set(selector.name, found);
        }
        return found;
      }
      case "autogroup": {
        const roles = rolesOf(selector.name);
        if (selector.name === "autogroup:member") return new Set(this.usersById.keys());
        return (
          roles && new Set(this.tailnet.users.filter(({ role }) => role && roles.includes(role)).map(({ id }) => id))
        );
      }
      default:
        return null;
    }
  }

  /** Nodes that a selector means by who they are; null for those that stand for addresses. */
  identity(selector: Selector): Bits | null {
    if (selector.kind === "any" || selector.kind === "range" || selector.kind === "ipset") return null;
    if (selector.kind === "autogroup" && selector.name === "autogroup:danger-all") return null;
    let found = this.cache.get(selector.text);
    if (!found) {
      found = this.identify(selector);
      this.cache.set(selector.text, found);
    }
    return found;
  }

  private identify(selector: Selector): Bits {
    const size = this.nodes.length;
    if (selector.kind === "tag") return Bits.of(size, this.byTag.get(selector.name) ?? []);
    if (selector.kind === "autogroup" && selector.name === "autogroup:tagged") return this.tagged;
    const users = this.users(selector) ?? new Set<number>();
    return Bits.of(
      size,
      [...users].flatMap((id) => this.nodesOfUser(id)),
    );
  }

  /** The addresses that a selector means; "*" is the tailnet and all approved subnet routes. */
  ranges(selector: Selector): RangeSet {
    switch (selector.kind) {
      case "any":
        return RangeSet.of([...this.own.ranges, ...this.routes.map(({ range }) => range)]);
      case "range":
        return RangeSet.of([selector.range]);
      case "ipset":
        return this.policy.ipsets.get(selector.name) ?? RangeSet.EMPTY;
      case "autogroup":
        return selector.name === "autogroup:danger-all" ? EVERYTHING : RangeSet.EMPTY;
      default:
        return RangeSet.EMPTY;
    }
  }

  /** Nodes that a selector names, by identity or by one of their own addresses. */
  targets(selector: Selector): Bits {
    if (selector.kind === "any") return this.all;
    const named = this.identity(selector);
    if (named) return named;
    return Bits.of(
      this.nodes.length,
      this.ranges(selector).ranges.flatMap((range) => this.nodesIn(range)),
    );
  }

  /** Nodes that meet one of these postures. */
  meeting(postures: readonly string[]): Bits {
    const fit = new Bits(this.nodes.length);
    for (const name of postures) {
      let found = this.postures.get(name);
      if (!found) {
        const meets = postureTest(this.policy.postures.get(name) ?? []);
        found = Bits.of(
          this.nodes.length,
          [...this.nodes.keys()].filter((i) => meets(this.nodes[i]!)),
        );
        this.postures.set(name, found);
      }
      fit.addAll(found);
    }
    return fit;
  }

  /** Mail domains that "localpart:*@domain" may name. Null: nobody has one, nothing is known. */
  domains(): ReadonlySet<string> | null {
    if (this.tailnet.domains) return new Set(this.tailnet.domains.map(lower));
    const known = new Set(
      this.tailnet.users.filter(({ email }) => email.includes("@")).map(({ email }) => domainOf(email)),
    );
    return known.size === 0 ? null : known;
  }
}

function append<K, V>(map: Map<K, V[]>, key: K, value: V): void {
  const list = map.get(key);
  if (list) list.push(value);
  else map.set(key, [value]);
}
