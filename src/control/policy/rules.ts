// Entries of `grants` and `acls` -> rules: who (a source, resolved), what (protocol and ports, or capabilities), and which
// nodes enforce it. Rules with the same sources, protocol and routers are one, as the hosted service merges them.
import { createHash } from "node:crypto";
import { addressNumber, EVERYTHING, formatRange, INTERNET, isEverything, type Range, RangeSet } from "./addresses.ts";
import { Bits } from "./bits.ts";
import { type Place, PolicyError } from "./error.ts";
import { isAutogroup } from "./parse.ts";
import type { Resolver } from "./resolve.ts";
import type { Access, CapabilityValues, PortRange, Selector } from "./types.ts";

/** Sources and destinations that all rules of a policy may have together, each counted at each node that it reaches. */
const MAX_ENTRIES = 4_000_000;
/** Entries that addresses as a destination count for: they are kept with each rule. */
const ADDRESS_COST = 4;

/** Bounds what a policy expands to. */
export class Meter {
  private entries = 0;

  /** Throws PolicyError. `where`: the entry of the policy that is being expanded. */
  spend(count: number, where: string, place: Place | null): void {
    this.entries += count;
    if (this.entries <= MAX_ENTRIES) return;
    throw new PolicyError(
      `the policy expands to more than ${MAX_ENTRIES} sources and destinations at ${where}: use fewer or wider ones`,
      place,
    );
  }
}

export interface Source {
  /** As in SrcIPs: sorted, each once. Packet filters share it; nobody changes it. */
  readonly texts: string[];
  /** Nodes that may use the rule: named, by their address, or for a route that they serve. */
  readonly nodes: Bits;
  /** Address parts of the source. */
  readonly ranges: RangeSet;
  /** Equal sources share one object. */
  readonly id: number;
  /** Of `texts`, for comparisons across compilations. */
  readonly digest: string;
}

/** A destination as one node enforces it. */
export interface Item {
  /** Its place in the rule. */
  readonly order: number;
  /** "*", an address, a prefix or a range; null: the node's own addresses. */
  readonly text: string | null;
  readonly range: Range | null;
  readonly ports: readonly PortRange[];
  readonly access: Access;
}

export interface Rule {
  readonly source: Source;
  readonly protocol: number | null;
  readonly via: readonly string[];
  /** Of a rule about capabilities, which opens no port. */
  readonly capabilities: Readonly<Record<string, CapabilityValues>> | null;
  readonly items: Map<number, Item[]>;
  /** "*" as destination: at every node. */
  readonly everywhere: Item[];
  /** autogroup:internet as destination: at exit nodes. */
  readonly internet: Item[];
  /** Opens the internet, all of it or an IP set's part: exit nodes may be used. */
  exit: boolean;
  /** Addresses as destinations, whether or not a node enforces them. */
  readonly addresses: (Item & { readonly range: Range })[];
  /** Nodes that enforce the rule. */
  readonly targets: Bits;
  /** What was put into it, in order: the same in two compilations when the rule says the same to the same target. */
  readonly parts: string[];
  size: number;
}

/** Sources that consist of nodes alone, by what they were made from. */
export type NamedSources = ReadonlyMap<string, { readonly nodes: Bits; readonly source: Source }>;

/** What is left of the compilation before a change of some nodes, whose numbering still holds. */
export interface Reuse {
  readonly named: NamedSources;
  /** Nodes that were added or changed. */
  readonly changed: Bits;
}

/** Capabilities that the other side must know of, too. */
const COMPANIONS: Readonly<Record<string, string>> = {
  "tailscale.com/cap/drive": "tailscale.com/cap/drive-sharer",
  "tailscale.com/cap/relay": "tailscale.com/cap/relay-target",
};

/** Addresses as a destination. */
interface AddressPlace {
  readonly text: string;
  readonly range: Range;
  /** Nodes that serve a route to them. */
  readonly routers: readonly number[];
  /** Nodes that have them. */
  readonly holders: readonly number[];
  readonly isInternet: boolean;
}

const NO_PORTS: readonly PortRange[] = [];

/** A user with nodes: as a source, and all of them. */
interface Owner {
  readonly owner: number;
  readonly source: Source;
  readonly nodes: readonly number[];
}

export class Compiler {
  readonly rules: Rule[] = [];
  private readonly sources = new Map<string, Source>();
  private readonly bySelectors = new Map<string, Source>();
  private readonly merged = new Map<string, Rule>();
  readonly named = new Map<string, { nodes: Bits; source: Source }>();
  private readonly ownersBySource = new Map<string, readonly Owner[]>();
  private readonly places = new Map<string, readonly AddressPlace[]>();
  private part = "";

  constructor(
    private readonly resolver: Resolver,
    private readonly meter: Meter,
    private readonly reuse: Reuse | null = null,
  ) {}

  private charge(count: number, { section, index, place }: Access): void {
    this.meter.spend(count, `${section}[${index}]`, place);
  }

  add(access: Access): void {
    this.part = `${access.section}${access.index}`;
    const plain = access.dst.filter((selector) => !isAutogroup(selector, "self"));
    const self = plain.length < access.dst.length;
    // What goes to a user's own nodes is a rule for each user.
    const owners = self ? this.owners(access) : [];
    const source = plain.length > 0 ? this.source(access.src, access) : null;
    for (const { protocol, dst } of access.openings) {
      const rule = source && this.rule(source, protocol, access.via, access);
      for (const { selector, ports } of dst) {
        if (isAutogroup(selector, "self")) continue;
        if (rule && source!.texts.length > 0) this.place(rule, selector, ports, access);
      }
      for (const { source: own, nodes } of owners) {
        const ownRule = this.rule(own, protocol, [], access);
        for (const { selector, ports } of dst) {
          if (isAutogroup(selector, "self")) this.placeAt(ownRule, nodes, ports, access);
        }
      }
    }
    if (access.capabilities) this.addCapabilities(access, access.capabilities, plain, owners);
  }

  private addCapabilities(
    access: Access,
    capabilities: Readonly<Record<string, CapabilityValues>>,
    plain: readonly Selector[],
    owners: readonly Owner[],
  ): void {
    const companions = Object.keys(capabilities)
      .filter((name) => Object.hasOwn(COMPANIONS, name))
      .sort()
      .map((name) => ({ [COMPANIONS[name]!]: null }));
    if (plain.length > 0) {
      const rule = this.newRule(this.source(access.src, access), null, access.via, capabilities, access);
      if (rule.source.texts.length > 0) for (const selector of plain) this.place(rule, selector, NO_PORTS, access);
      // Behind a router is nobody who could be told.
      for (const companion of access.via.length === 0 ? companions : []) {
        const back = this.newRule(this.source(plain, access, false), null, [], companion, access);
        if (back.source.texts.length === 0) continue;
        if (access.postures.length > 0) this.placeAt(back, [...rule.source.nodes], NO_PORTS, access);
        else for (const selector of access.src) this.place(back, selector, NO_PORTS, access);
      }
    }
    for (const { owner, source, nodes } of owners) {
      const rule = this.newRule(source, null, [], capabilities, access);
      this.placeAt(rule, nodes, NO_PORTS, access);
      for (const companion of companions) {
        const bits = Bits.of(this.resolver.nodes.length, nodes);
        const back = this.newRule(
          this.sourceOfNodes(bits, access, `companion of ${owner}`),
          null,
          [],
          companion,
          access,
        );
        this.placeAt(back, [...source.nodes], NO_PORTS, access);
      }
    }
  }

  // ---- sources ----

  private qualifies(access: Access): Bits | null {
    return access.postures.length === 0 ? null : this.resolver.meeting(access.postures);
  }

  private source(selectors: readonly Selector[], access: Access, postures = true): Source {
    const key = JSON.stringify([selectors.map(({ text }) => text).sort(), postures ? access.postures : []]);
    const known = this.bySelectors.get(key);
    if (known) return known;
    const fit = postures ? this.qualifies(access) : null;
    const { resolver } = this;
    const identities = selectors.map((selector) => resolver.identity(selector));
    if (!fit && identities.every((named) => named !== null)) {
      const named = new Bits(resolver.nodes.length);
      for (const each of identities) named.addAll(each!);
      const source = this.sourceOfNodes(named, access, key);
      this.bySelectors.set(key, source);
      return source;
    }
    const nodes = new Bits(resolver.nodes.length);
    const texts = new Set<string>();
    const ranges: Range[] = [];
    const nameNode = (node: number): void => {
      if (fit && !fit.has(node)) return;
      nodes.add(node);
      for (const text of resolver.addressesOf(node)) texts.add(text);
    };
    for (const selector of selectors) {
      if (isAutogroup(selector, "danger-all") && !fit) {
        texts.add("*");
        nodes.addAll(resolver.all);
        ranges.push(...EVERYTHING.ranges);
        continue;
      }
      const named = fit ? resolver.targets(selector) : resolver.identity(selector);
      if (named) {
        for (const node of named) nameNode(node);
        continue;
      }
      if (selector.kind === "any") {
        nodes.addAll(resolver.all);
        for (const { text } of resolver.routes) texts.add(text);
      }
      const set = resolver.ranges(selector);
      for (const range of set.ranges) ranges.push(range);
      // "*" lists routes one by one, also where one covers another.
      for (const text of selector.kind === "any" ? resolver.own.texts() : set.texts()) texts.add(text);
      for (const range of selector.kind === "any" ? [] : set.ranges) {
        for (const node of resolver.nodesIn(range)) nodes.add(node);
        for (const node of resolver.routersOf(range)) nodes.add(node);
      }
    }
    const source = this.intern([...texts], nodes, RangeSet.of(ranges), access);
    this.bySelectors.set(key, source);
    return source;
  }

  /** `key`: what the nodes stand for. */
  private sourceOfNodes(nodes: Bits, access: Access, key: string): Source {
    const done = this.named.get(key);
    if (done) return done.source;
    const before = this.reuse?.named.get(key);
    const isSame = before?.nodes.equals(nodes) && !nodes.overlaps(this.reuse!.changed);
    const source = isSame
      ? this.known({ ...before!.source, nodes }, access)
      : this.intern(
          [...nodes].flatMap((node) => this.resolver.addressesOf(node)),
          nodes,
          RangeSet.EMPTY,
          access,
        );
    this.named.set(key, { nodes, source });
    return source;
  }

  private intern(list: string[], nodes: Bits, ranges: RangeSet, access: Access): Source {
    const texts = list.sort();
    const digest = createHash("sha256").update(texts.join(",")).digest("base64");
    return this.known({ texts, nodes, ranges, id: 0, digest }, access);
  }

  /** Equal sources are one object. */
  private known(source: Source, access: Access): Source {
    const known = this.sources.get(source.digest);
    // One that is known has cost the work of finding it, too.
    this.charge(known ? source.texts.length >>> 1 : source.texts.length, access);
    if (known) return known;
    const fresh = { ...source, id: this.sources.size };
    this.sources.set(source.digest, fresh);
    return fresh;
  }

  /** For autogroup:self: each user among the sources, and that user's own nodes. */
  private owners(access: Access): readonly Owner[] {
    const key = JSON.stringify([access.src.map(({ text }) => text), access.postures]);
    let owners = this.ownersBySource.get(key);
    if (!owners) {
      owners = this.findOwners(access);
      this.ownersBySource.set(key, owners);
    }
    return owners;
  }

  private findOwners(access: Access): Owner[] {
    const fit = this.qualifies(access);
    const users = new Set<number>();
    for (const selector of access.src) {
      const some =
        selector.kind === "any" ? this.resolver.tailnet.users.map(({ id }) => id) : this.resolver.users(selector);
      for (const id of some ?? []) users.add(id);
    }
    return [...users]
      .sort((a, b) => a - b)
      .map((id): Owner => {
        const nodes = this.resolver.nodesOfUser(id);
        // A bitmap of the nodes, and what stands around it.
        this.charge(4 + (this.resolver.nodes.length >>> 9), access);
        const fitting = fit ? nodes.filter((node) => fit.has(node)) : nodes;
        const bits = Bits.of(this.resolver.nodes.length, fitting);
        return { owner: id, source: this.sourceOfNodes(bits, access, `${id} ${access.postures.join(" ")}`), nodes };
      })
      .filter(({ source }) => source.texts.length > 0);
  }

  // ---- rules ----

  private rule(source: Source, protocol: number | null, via: readonly string[], access: Access): Rule {
    const key = `${source.id} ${protocol} ${via.length > 1 ? [...via].sort().join() : via}`;
    let rule = this.merged.get(key);
    if (!rule) {
      rule = this.newRule(source, protocol, via, null, access);
      this.merged.set(key, rule);
    }
    return rule;
  }

  private newRule(
    source: Source,
    protocol: number | null,
    via: readonly string[],
    capabilities: Readonly<Record<string, CapabilityValues>> | null,
    access: Access,
  ): Rule {
    // Each rule has two bitmaps of the nodes.
    this.charge(this.resolver.nodes.length >>> 7, access);
    const rule: Rule = {
      source,
      protocol,
      via,
      capabilities,
      items: new Map(),
      everywhere: [],
      internet: [],
      exit: false,
      addresses: [],
      targets: new Bits(this.resolver.nodes.length),
      parts: [],
      size: 0,
    };
    this.rules.push(rule);
    return rule;
  }

  private put(rule: Rule, node: number, item: Item): void {
    this.charge(Math.max(1, item.ports.length), item.access);
    const items = rule.items.get(node);
    if (items) items.push(item);
    else rule.items.set(node, [item]);
    rule.targets.add(node);
  }

  /** Named nodes: both of their addresses. */
  private placeAt(rule: Rule, nodes: Iterable<number>, ports: readonly PortRange[], access: Access): void {
    rule.parts.push(this.part);
    const item: Item = { order: rule.size++, text: null, range: null, ports, access };
    for (const node of nodes) this.put(rule, node, item);
  }

  private place(rule: Rule, selector: Selector, ports: readonly PortRange[], access: Access): void {
    const { resolver } = this;
    rule.parts.push(this.part, selector.text);
    const viaFits = (node: number): boolean => rule.via.length === 0 || resolver.hasTag(node, rule.via);
    if (isAutogroup(selector, "internet")) {
      this.charge(ports.length, access);
      rule.exit = true;
      rule.internet.push({ order: rule.size++, text: null, range: null, ports, access });
      for (const node of resolver.exits) if (viaFits(node)) rule.targets.add(node);
      return;
    }
    if (selector.kind === "any" || isAutogroup(selector, "danger-all")) {
      this.charge(ports.length * resolver.nodes.length, access);
      rule.exit = true;
      rule.everywhere.push({ order: rule.size++, text: "*", range: null, ports, access });
      for (const node of resolver.all) if (viaFits(node)) rule.targets.add(node);
      return;
    }
    const named = resolver.identity(selector);
    if (named) {
      // A way through routers is about what lies behind them.
      if (rule.via.length === 0) this.placeAt(rule, named, ports, access);
      return;
    }
    const places = this.placesOf(selector);
    this.charge(ADDRESS_COST * places.length, access);
    for (const { text, range, routers, holders, isInternet } of places) {
      const item = { order: rule.size++, text, range, ports, access };
      rule.addresses.push(item);
      if (isInternet && (selector.kind === "ipset" || isEverything(range))) rule.exit = true;
      if (routers.length + holders.length === 0 && !isInternet) continue;
      const nodes = new Set(routers.filter(viaFits));
      if (rule.via.length === 0) for (const node of holders) nodes.add(node);
      if (isInternet) for (const node of resolver.exits) if (viaFits(node)) nodes.add(node);
      for (const node of nodes) this.put(rule, node, item);
    }
  }

  /** The addresses that a selector means, and who has to do with them. */
  private placesOf(selector: Selector): readonly AddressPlace[] {
    let places = this.places.get(selector.text);
    if (!places) {
      const { resolver } = this;
      places = resolver.ranges(selector).ranges.map((range) => ({
        text: formatRange(range),
        range,
        routers: resolver.routersOf(range),
        holders: resolver.nodesIn(range),
        isInternet: INTERNET.covers(range) || isEverything(range),
      }));
      this.places.set(selector.text, places);
    }
    return places;
  }
}

/** Whether packets from an address of a node, as text, are among the sources. */
export function holdsAddress({ texts, ranges }: Source, address: string): boolean {
  if (texts[0] === "*" || ranges.has(addressNumber(address)!)) return true;
  let low = 0;
  let high = texts.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (texts[middle]! < address) low = middle + 1;
    else high = middle;
  }
  return texts[low] === address;
}

/** What `node` enforces of a rule, in the order of the policy. */
export function itemsAt(rule: Rule, node: number, resolver: Resolver): Item[] {
  const out = [...(rule.items.get(node) ?? [])];
  if (rule.targets.has(node)) {
    out.push(...rule.everywhere);
    if (resolver.exits.has(node)) out.push(...rule.internet);
  }
  return out.sort((a, b) => a.order - b.order);
}
