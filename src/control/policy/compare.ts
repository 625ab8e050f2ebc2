// `weft policy try -f NEW`: what a new policy would change, pair by pair, before it is in force.
//
// Nodes that every rule of both policies treats alike are one class, so the work grows with the classes and with the rules
// between them, not with the pairs of nodes. It is bounded; what was not compared is said.
import { createHash } from "node:crypto";
import { addressNumber, covers, INTERNET, isEverything, parseRange, type Range } from "./addresses.ts";
import type { Compiled } from "./compile.ts";
import { PolicyError } from "./error.ts";
import { formatPorts } from "./explain.ts";
import { allOrNone, hasPorts, isPing, protocolName } from "./ports.ts";
import { holdsAddress, itemsAt, type Rule } from "./rules.ts";
import { admitsLogin } from "./ssh.ts";
import { ALL_PORTS, type Policy, type PolicyNode, type PortRange, type SSHRule } from "./types.ts";

/** Steps of comparing: pairs of classes times the rules between them. */
const MAX_STEPS = 3_000_000;
/** Of them for each part of a route that has ports of its own. */
const PART_STEPS = 10;
/** Sources and destinations of all rules of both, each counted at each node. */
const MAX_MARKS = 5_000_000;
const MAX_ROWS = 500;
const MAX_NAMES = 8;
/** Parts of one route that are compared with each other. */
const MAX_PARTS = 100;
/** Words of what a row opens, and of what it closes. */
const MAX_WORDS = 100;

const MAX_EXCEPTIONS = 3;

// Behind the name of a protocol: a part of a route, or all of it without some parts.
const TO = " to ";
const BUT = " but not to ";

/** Some nodes: how many, and the names of the first. */
export interface NodeGroup {
  readonly count: number;
  readonly names: string[];
}

/** What sources gain and lose at targets. */
export interface PairChange {
  readonly src: NodeGroup;
  /** Nodes, or a route, or the internet. */
  readonly dst: NodeGroup;
  readonly pairs: number;
  /** Like "tcp 22, 80-90", "capability example.com/x", "ssh root (check)". "IPv4 only" where the families differ. */
  readonly opened: string[];
  readonly closed: string[];
}

export interface NodeChange {
  readonly nodes: NodeGroup;
  /** Capabilities of the node itself, its addresses, its routes. */
  readonly added: string[];
  readonly removed: string[];
}

export interface Comparison {
  readonly same: boolean;
  /** False: not everything was compared, or there are more rows than are listed. */
  readonly complete: boolean;
  readonly nodes: number;
  /** Pairs of nodes that see each other. */
  readonly peers: { readonly before: number; readonly after: number };
  readonly pairs: PairChange[];
  readonly changes: NodeChange[];
}

/** What one class may do at another: ports by protocol, and anything else ("ssh root", "capability x") in words. */
interface Openings {
  readonly ports: Map<string, readonly PortRange[]>;
  readonly words: Map<string, Set<string>>;
}

const noOpenings = (): Openings => ({ ports: new Map(), words: new Map() });

interface Side {
  readonly compiled: Compiled;
  /** Rules that a class is a source of. */
  readonly from: number[][];
  /** Rules that a class enforces. */
  readonly to: number[][];
  /** SSH rules at a class, each with the classes that may use it. */
  readonly ssh: { rule: SSHRule; sources: Set<number> }[][];
}

/** Both are of the same nodes. Throws PolicyError when they are too large. */
export function compare(before: Compiled, after: Compiled): Comparison {
  return new Comparer(before, after).run();
}

class Comparer {
  private readonly nodes: readonly PolicyNode[];
  /** Nodes of each class; the first of them stands for all. */
  private readonly classes: number[][];
  private steps = 0;
  private complete = true;
  private readonly rows = new Map<
    string,
    { src: number[][]; dst: Map<string, NodeGroup>; pairs: number; change: Delta }
  >();

  constructor(
    private readonly before: Compiled,
    private readonly after: Compiled,
  ) {
    this.nodes = before.resolver.nodes;
    this.classes = this.classify();
  }

  run(): Comparison {
    const sides = [this.side(this.before), this.side(this.after)] as const;
    const reachable = (side: Side, a: number): number[] =>
      side.from[a]!.flatMap((r) => {
        const targets = this.enforcers(side)[r]!;
        this.charge(targets.size);
        return this.complete ? [...targets] : [];
      });
    for (const a of this.classes.keys()) {
      const sshTargets = sides.flatMap(({ ssh }) =>
        [...ssh.keys()].filter((b) => ssh[b]!.some(({ sources }) => sources.has(a))),
      );
      const targets = new Set([...sides.flatMap((side) => reachable(side, a)), ...sshTargets]);
      for (const b of targets) this.comparePair(sides, a, b);
      this.compareRoutes(sides, a);
      if (!this.complete) break;
    }
    const changes = this.nodeChanges();
    const pairs = this.listed();
    const peers = { before: this.countPeers(this.before), after: this.countPeers(this.after) };
    const same = this.complete && pairs.length === 0 && changes.length === 0;
    return { same, complete: this.complete, nodes: this.nodes.length, peers, pairs, changes };
  }

  // ---- classes ----

  /** Nodes by what all rules, routes and attributes say of them. Throws PolicyError. */
  private classify(): number[][] {
    const marks = this.nodes.map((node): string[] => [JSON.stringify([node.ipv4 !== "", node.ipv6 !== ""])]);
    let size = 0;
    for (const compiled of [this.before, this.after]) {
      const { resolver } = compiled;
      for (const [r, rule] of compiled.rules.entries()) {
        size += rule.source.nodes.count + rule.targets.count;
        if (size > MAX_MARKS)
          throw new PolicyError(
            `the policies say too much about ${this.nodes.length} nodes to be compared: more than ${MAX_MARKS} sources and destinations`,
          );
        for (const i of rule.source.nodes) {
          const addresses = resolver.addressesOf(i).map((text) => (holdsAddress(rule.source, text) ? 1 : 0));
          marks[i]!.push(`s${r}:${addresses.join("")}`);
        }
        for (const [i, items] of rule.items)
          marks[i]!.push(`t${r}:${items.map(({ order, range }) => order + this.covered(i, range)).join()}`);
        if (rule.everywhere.length > 0 || rule.internet.length > 0)
          for (const i of rule.targets) marks[i]!.push(`e${r}`);
      }
      for (const [i, { id, routes }] of resolver.nodes.entries()) {
        const { capMap, primaryRoutes } = compiled.selfView(id);
        marks[i]!.push(this.sshMark(compiled, i), JSON.stringify([routes, capMap, primaryRoutes]));
      }
    }
    const classes = new Map<string, number[]>();
    for (const [i, mark] of marks.entries()) {
      const key = createHash("sha256").update(mark.join("\n")).digest("base64");
      const members = classes.get(key);
      if (members) members.push(i);
      else classes.set(key, [i]);
    }
    return [...classes.values()];
  }

  /** Which addresses of a node a destination means. */
  private covered(i: number, range: Range | null): string {
    if (!range) return "";
    const inside = this.before.resolver.addressesOf(i).map((text) => {
      const n = addressNumber(text)!;
      return range.first <= n && n <= range.last ? 1 : 0;
    });
    return `/${inside.join("")}`;
  }

  private sshMark(compiled: Compiled, i: number): string {
    return compiled.policy.ssh.length === 0 ? "" : compiled.sshMembership(this.nodes[i]!.id);
  }

  private readonly enforcing = new WeakMap<Side, Set<number>[]>();

  /** For each rule, the classes that enforce it. */
  private enforcers(side: Side): Set<number>[] {
    let found = this.enforcing.get(side);
    if (!found) {
      found = side.compiled.rules.map(() => new Set<number>());
      for (const [b, rules] of side.to.entries()) for (const r of rules) found[r]!.add(b);
      this.enforcing.set(side, found);
    }
    return found;
  }

  private side(compiled: Compiled): Side {
    const from: number[][] = this.classes.map(() => []);
    const to: number[][] = this.classes.map(() => []);
    for (const [r, rule] of compiled.rules.entries()) {
      for (const [c, [i]] of this.classes.entries()) {
        if (rule.source.nodes.has(i!)) from[c]!.push(r);
        if (rule.targets.has(i!)) to[c]!.push(r);
      }
    }
    const byAddress = new Map<string, number>();
    for (const [c, [i]] of this.classes.entries())
      for (const address of compiled.resolver.addressesOf(i!)) byAddress.set(address, c);
    const ssh = this.classes.map(([i]) =>
      compiled.policy.ssh.length === 0 || !this.complete
        ? []
        : compiled.sshRules(this.nodes[i!]!.id).map((rule) => {
            this.charge(rule.principals.length);
            return { rule, sources: new Set(rule.principals.flatMap(({ nodeIP }) => byAddress.get(nodeIP) ?? [])) };
          }),
    );
    return { compiled, from, to, ssh };
  }

  private charge(steps: number): void {
    this.steps += steps;
    if (this.steps > MAX_STEPS) this.complete = false;
  }

  // ---- pairs ----

  private comparePair(sides: readonly [Side, Side], a: number, b: number): void {
    const [source, target] = [this.classes[a]!, this.classes[b]!];
    const count = a === b ? source.length * (source.length - 1) : source.length * target.length;
    if (count === 0 || !this.complete) return;
    const change = differenceOf(this.openings(sides[0], a, b), this.openings(sides[1], a, b));
    if (change) this.record(a, this.groupOf(target), count, change);
  }

  /** What a node of one class may do at a node of another. */
  private openings(side: Side, a: number, b: number): Openings {
    const { compiled, from, ssh } = side;
    const { resolver } = compiled;
    const [i, j] = [this.classes[a]![0]!, this.classes[b]![0]!];
    const sources = resolver.addressesOf(i);
    const targets = resolver.addressesOf(j);
    const out = noOpenings();
    const enforcers = this.enforcers(side);
    for (const r of from[a]!) {
      this.charge(1);
      if (!enforcers[r]!.has(b)) continue;
      const rule = compiled.rules[r]!;
      const items = itemsAt(rule, j, resolver).filter((item) => !rule.internet.includes(item));
      this.charge(items.length);
      for (const item of items) {
        const families = sources.flatMap((source) =>
          holdsAddress(rule.source, source)
            ? targets.filter((target) => {
                const n = addressNumber(target)!;
                const meant = !item.range || (item.range.first <= n && n <= item.range.last);
                return meant && source.includes(":") === target.includes(":");
              })
            : [],
        );
        for (const family of new Set(families.map(familyOf))) openRule(out, rule, item.ports, family);
      }
    }
    for (const { rule, sources: classes } of ssh[b]!) {
      if (!classes.has(a)) continue;
      const how = rule.action.holdAndDelegate ? "check" : "accept";
      for (const login of Object.keys(rule.sshUsers)) {
        if (login !== "*" && !admitsLogin(rule, login)) continue;
        const who = login === "*" ? "any login but root" : login;
        // The first rule that fits decides.
        if (!out.words.has(`ssh ${who}`)) addWord(out, `ssh ${who}`, how);
      }
    }
    return out;
  }

  /** Subnet routes and exit nodes, as one node of the class sees them. */
  private compareRoutes(sides: readonly [Side, Side], a: number): void {
    const viewer = this.nodes[this.classes[a]![0]!]!.id;
    const [before, after] = sides.map((side) => this.routes(side, a, viewer)) as [
      Map<string, Openings>,
      Map<string, Openings>,
    ];
    for (const route of new Set([...before.keys(), ...after.keys()])) {
      const [was, is] = [before.get(route) ?? noOpenings(), after.get(route) ?? noOpenings()];
      this.charge(PART_STEPS * (was.ports.size + is.ports.size));
      if (!this.complete) return;
      const change = differenceOf(was, is);
      if (change) this.record(a, { count: 1, names: [route] }, this.classes[a]!.length, change);
    }
  }

  private routes({ compiled, from }: Side, a: number, viewer: number): Map<string, Openings> {
    const out = new Map<string, Openings>();
    const { resolver } = compiled;
    const rules = from[a]!.map((r) => compiled.rules[r]!).filter(({ capabilities }) => !capabilities);
    const sources = resolver.addressesOf(this.classes[a]![0]!);
    /** What `router` enforces for the class; `family`: of the way, null for both. */
    const enforced = function* (this: Comparer, router: number, family: Family | null) {
      for (const rule of rules) {
        this.charge(1);
        if (!rule.targets.has(router)) continue;
        const families = sources
          .filter((source) => (family === null || familyOf(source) === family) && holdsAddress(rule.source, source))
          .map(familyOf);
        if (families.length === 0) continue;
        const items = itemsAt(rule, router, resolver);
        this.charge(items.length);
        for (const item of items) yield { rule, item, isInternet: rule.internet.includes(item), families };
      }
    }.bind(this);
    for (const [text, router] of compiled.routesOf(viewer)) {
      const { range } = resolver.routes.find((route) => route.text === text)!;
      const openings = noOpenings();
      addWord(openings, "route", `by ${nameOf(resolver.nodes[router]!)}`);
      for (const { rule, item, isInternet } of enforced(router, familyOf(text))) {
        if (isInternet ? INTERNET.covers(range) : item.text === "*") openRule(openings, rule, item.ports, null);
        if (!item.range || item.range.first > range.last || range.first > item.range.last) continue;
        const whole = item.range.first <= range.first && range.last <= item.range.last;
        openRule(openings, rule, item.ports, null, whole ? "" : TO + item.text);
      }
      out.set(`route ${text}`, openings);
    }
    const exits = compiled.exitsOf(viewer);
    if (exits.length > 0) {
      const openings = noOpenings();
      for (const exit of exits.slice(0, MAX_NAMES)) addWord(openings, "exit node", nameOf(resolver.nodes[exit]!));
      for (const exit of exits)
        for (const { rule, item, isInternet, families } of enforced(exit, null)) {
          const whole = isInternet || item.text === "*";
          const fitting = item.range ? families.filter((family) => family === familyOf(item.text!)) : families;
          for (const family of whole || (item.range && isEverything(item.range)) ? fitting : [])
            openRule(openings, rule, item.ports, family);
          if (item.range && !isEverything(item.range) && fitting.length > 0 && INTERNET.covers(item.range))
            openRule(openings, rule, item.ports, familyOf(item.text!), TO + item.text);
        }
      out.set("the internet", openings);
    }
    return out;
  }

  /** Rows with the same sources and the same change are one. */
  private record(a: number, dst: NodeGroup, pairs: number, change: Delta): void {
    const key = JSON.stringify([a, change]);
    const row = this.rows.get(key) ?? { src: [this.classes[a]!], dst: new Map(), pairs: 0, change };
    this.rows.set(key, row);
    row.dst.set(dst.names.join(), dst);
    row.pairs += pairs;
  }

  private listed(): PairChange[] {
    // What several classes of sources gain or lose at the same targets is one row, too.
    const joined = new Map<string, { src: number[][]; dst: NodeGroup[]; pairs: number; change: Delta }>();
    for (const { src, dst, pairs, change } of this.rows.values()) {
      const key = JSON.stringify([[...dst.keys()].sort(), change]);
      const row = joined.get(key);
      if (row) {
        row.src.push(...src);
        row.pairs += pairs;
      } else joined.set(key, { src: [...src], dst: [...dst.values()], pairs, change });
    }
    const rows = [...joined.values()].sort((a, b) => b.pairs - a.pairs);
    if (rows.length > MAX_ROWS) this.complete = false;
    return rows.slice(0, MAX_ROWS).map(({ src, dst, pairs, change }) => ({
      src: this.groupOf(src.flat()),
      dst: {
        count: dst.reduce((sum, { count }) => sum + count, 0),
        names: dst.flatMap(({ names }) => names).slice(0, MAX_NAMES),
      },
      pairs,
      opened: change.opened,
      closed: change.closed,
    }));
  }

  private groupOf(nodes: readonly number[]): NodeGroup {
    const sorted = [...nodes].sort((a, b) => a - b);
    return { count: sorted.length, names: sorted.slice(0, MAX_NAMES).map((i) => nameOf(this.nodes[i]!)) };
  }

  // ---- nodes by themselves ----

  private nodeChanges(): NodeChange[] {
    const rows = new Map<string, { nodes: number[]; added: string[]; removed: string[] }>();
    for (const members of this.classes) {
      const { id } = this.nodes[members[0]!]!;
      const [before, after] = [this.before, this.after].map((compiled) => wordsOf(compiled, id)) as [
        string[],
        string[],
      ];
      const added = after.filter((word) => !before.includes(word));
      const removed = before.filter((word) => !after.includes(word));
      if (added.length + removed.length === 0) continue;
      const key = JSON.stringify([added, removed]);
      const row = rows.get(key);
      if (row) row.nodes.push(...members);
      else rows.set(key, { nodes: [...members], added, removed });
    }
    if (rows.size > MAX_ROWS) this.complete = false;
    return [...rows.values()]
      .slice(0, MAX_ROWS)
      .map(({ nodes, added, removed }) => ({ nodes: this.groupOf(nodes), added, removed }));
  }

  private countPeers(compiled: Compiled): number {
    let sum = 0;
    for (const members of this.classes) {
      const circle = compiled.circle(this.nodes[members[0]!]!.id);
      sum += members.length * circle.count - members.filter((i) => circle.has(i)).length;
    }
    return sum / 2;
  }
}

type Family = "IPv4" | "IPv6";

/** Of an address or a prefix. */
function familyOf(text: string): Family {
  return text.includes(":") ? "IPv6" : "IPv4";
}

function nameOf(node: PolicyNode): string {
  return node.name ?? `node ${node.id}`;
}

/** `family` null: of a route, which has one. */
function openRule(
  out: Openings,
  { protocol, capabilities }: Rule,
  ports: readonly PortRange[],
  family: Family | null,
  suffix = "",
): void {
  const only = (family === null ? "" : ` ${family}`) + suffix;
  if (capabilities) {
    for (const [name, values] of Object.entries(capabilities))
      addWord(out, `capability ${name}${only}`, values === null ? "" : JSON.stringify(values));
    return;
  }
  // Pings are let in whatever the ports.
  const names = protocol === null ? ["tcp", "udp", "icmp"] : [isPing(protocol) ? "icmp" : protocolName(protocol)];
  for (const name of names) {
    const key = `${name}${only}`;
    const opened = name === "icmp" ? [ALL_PORTS] : hasPorts(protocol) ? ports : allOrNone(ports);
    if (opened.length > 0) out.ports.set(key, union([...(out.ports.get(key) ?? []), ...opened]));
  }
}

function addWord(out: Openings, name: string, word: string): void {
  const words = out.words.get(name);
  if (words) words.add(word);
  else out.words.set(name, new Set([word]));
}

// ---- sets of ports ----

function union(ports: readonly PortRange[]): PortRange[] {
  const out: PortRange[] = [];
  for (const { first, last } of [...ports].sort((a, b) => a.first - b.first)) {
    const top = out.at(-1);
    if (top && first <= top.last + 1) out[out.length - 1] = { first: top.first, last: Math.max(top.last, last) };
    else out.push({ first, last });
  }
  return out;
}

/** Both are unions. */
function without(ports: readonly PortRange[], others: readonly PortRange[]): PortRange[] {
  let rest = [...ports];
  for (const hole of others)
    rest = rest.flatMap(({ first, last }) => {
      if (hole.last < first || last < hole.first) return [{ first, last }];
      const left = first < hole.first ? [{ first, last: hole.first - 1 }] : [];
      return hole.last < last ? [...left, { first: hole.last + 1, last }] : left;
    });
  return rest;
}

// ---- differences in words ----

interface Delta {
  readonly opened: string[];
  readonly closed: string[];
}

/** Null: both are the same. */
function differenceOf(before: Openings, after: Openings): Delta | null {
  const [was, is] = [spread(before, after), spread(after, before)];
  const opened = moreIn(is, was);
  const closed = moreIn(was, is);
  return opened.length + closed.length === 0 ? null : { opened, closed };
}

/** The name of what is open to all of a route, of what is open to a part of it; null: it is no part. */
function wholeOf(name: string): string | null {
  const at = name.indexOf(TO);
  return at < 0 ? null : name.slice(0, at);
}

/** To each part that either names, with all that is open to it: by its own name, by those of wider parts and by the route's. */
function spread(openings: Openings, other: Openings): Openings {
  const names = new Set([...openings.ports.keys(), ...other.ports.keys()]);
  const parts = [...names].flatMap((name) => {
    const whole = wholeOf(name);
    return whole === null ? [] : [{ name, whole }];
  });
  if (parts.length === 0) return openings;
  const ranges =
    parts.length > MAX_PARTS ? [] : parts.map(({ name, whole }) => parseRange(name.slice(whole.length + TO.length))!);
  const ports = new Map(openings.ports);
  for (const [i, { name, whole }] of parts.entries()) {
    const open = [openings.ports.get(whole) ?? [], openings.ports.get(name) ?? []];
    for (const [j, range] of ranges.entries())
      if (i !== j && parts[j]!.whole === whole && covers(range, ranges[i]!))
        open.push(openings.ports.get(parts[j]!.name) ?? []);
    ports.set(name, union(open.flat()));
  }
  return { ...openings, ports };
}

/** What is in one and not in the other, like "tcp, udp 22, 80"; with the family where it is not both. */
function moreIn(one: Openings, other: Openings): string[] {
  const parts = new Map<string, string>();
  for (const [name, ports] of one.ports) {
    const more = without(ports, other.ports.get(name) ?? []);
    if (more.length > 0) parts.set(name, formatPorts(more));
  }
  // A part that changes as all of its route does is not worth a word.
  const narrow = [...one.ports.keys()].flatMap((name) => {
    const whole = wholeOf(name);
    return whole === null ? [] : [{ name, whole }];
  });
  for (const whole of new Set(narrow.map((each) => each.whole))) {
    const changed = parts.get(whole);
    if (changed === undefined) continue;
    const [same, others] = [true, false].map((isSame) =>
      narrow.filter((each) => each.whole === whole && (parts.get(each.name) === changed) === isSame),
    ) as [typeof narrow, typeof narrow];
    for (const { name } of same) parts.delete(name);
    if (others.length === 0) continue;
    const more = others.length > MAX_EXCEPTIONS ? ` and ${others.length - MAX_EXCEPTIONS} other parts` : "";
    const named = others.slice(0, MAX_EXCEPTIONS).map(({ name }) => name.slice(whole.length + TO.length));
    parts.delete(whole);
    parts.set(`${whole}${BUT}${named.join(", ")}${more}`, changed);
  }
  for (const [name, words] of one.words) {
    const more = [...words].filter((word) => !other.words.get(name)?.has(word));
    if (more.length > 0) parts.set(name, more.sort().join(", "));
  }
  // Protocols with the same ports, and families with the same words, are said once.
  const merged = new Map<string, string[]>();
  for (const [name, words] of parts) {
    const [, base, family = "", suffix = ""] = /^(.*?)( IPv[46])?( to \S+| but not to .*)?$/s.exec(name)!;
    const twin = family && name.replace(family, family === " IPv4" ? " IPv6" : " IPv4");
    const both = twin !== "" && parts.get(twin) === words;
    if (both && family === " IPv6") continue;
    const rest = suffix + (family && !both && !suffix.startsWith(TO) ? ` (${family.trim()} only)` : "");
    const isPort = !one.words.has(name);
    const key = isPort && base !== "icmp" ? `\0${words}${rest}` : phrase(base!, isPort ? "" : words) + rest;
    merged.set(key, [...(merged.get(key) ?? []), base!]);
  }
  const words = [...merged].map(([key, names]) => (key.startsWith("\0") ? `${names.join(", ")} ${key.slice(1)}` : key));
  const more = words.length - MAX_WORDS;
  return more > 0 ? [...words.sort().slice(0, MAX_WORDS), `and ${more} more`] : words.sort();
}

function phrase(name: string, words: string): string {
  if (words === "") return name;
  return name.startsWith("ssh") ? `${name} (${words})` : `${name} ${words}`;
}

function wordsOf(compiled: Compiled, id: number): string[] {
  const { allowedIPs, primaryRoutes, capMap } = compiled.selfView(id);
  const { ipv4, ipv6 } = compiled.resolver.nodes[compiled.resolver.indexOf(id)!]!;
  // Own addresses differ in nodes that are alike.
  const own: Readonly<Record<string, string>> = {
    [`${ipv4}/32`]: "its IPv4 address",
    [`${ipv6}/128`]: "its IPv6 address",
  };
  return [
    ...Object.entries(capMap).map(([name, values]) => (values ? `${name} ${JSON.stringify(values)}` : name)),
    ...allowedIPs.map((prefix) => own[prefix] ?? `route ${prefix}`),
    ...primaryRoutes.map((prefix) => `primary route ${prefix}`),
    ...relayWords(compiled.policy.derpMap),
  ];
}

/** What a policy changes in the relays, the same for all nodes. */
function relayWords(derpMap: Policy["derpMap"]): string[] {
  if (!derpMap) return [];
  const regions = Object.entries(derpMap.Regions ?? {}).map(([id, region]) =>
    region
      ? `relay region ${id} (${(region.Nodes ?? []).map((node) => node.HostName).join(", ")})`
      : `no relay region ${id}`,
  );
  return [...(derpMap.omitDefaultRegions ? ["none of the server's own relays"] : []), ...regions];
}
