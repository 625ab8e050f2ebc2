// Which addresses a node gets: free ones of the tailnet's prefixes, in order (those that were never given first) or at random.
//
// Never given: the network and broadcast address of IPv4, the first address of an IPv6 prefix, 100.100.100.100 and
// fd7a:115c:a1e0::53 (services of the client itself), and 100.115.92.0/23 (ChromeOS). Of an IPv6 prefix the first /64 is
// used: the rest of fd7a:115c:a1e0::/48 holds blocks with meanings of their own (spec/ts2021-control-protocol.md, section 0.3).
import { formatIP, parseIP, parsePrefix } from "../wire/ip.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Counters, NodeRecord } from "./model.ts";
import { addressNumber, parseRange, type Range, RangeSet, textOf } from "./policy/addresses.ts";

const RESERVED = RangeSet.of(
  ["100.100.100.100", "100.115.92.0/23", "fd7a:115c:a1e0::53"].map((text) => parseRange(text)!),
);
/** Random picks before the search goes on in order from the last of them. */
const PICKS = 32;

type Random = (n: number) => Uint8Array;

/** The addresses of a prefix that may be given. */
export function usable(prefix: string): RangeSet {
  const { ip, bits } = parsePrefix(prefix)!;
  const { first, last } = parseRange(prefix)!;
  if (ip.length === 16) {
    const end = bits < 64 ? first + (1n << 64n) - 1n : last;
    return RangeSet.of([{ first: first < end ? first + 1n : first, last: end }]).without(RESERVED);
  }
  const hasEnds = bits < 31;
  return RangeSet.of([{ first: hasEnds ? first + 1n : first, last: hasEnds ? last - 1n : last }]).without(RESERVED);
}

function isV6(range: Range): boolean {
  return textOf(range.first).includes(":");
}

/** The first free address after `last`, wrapping round once; null when every address is taken. */
function nextFree(space: RangeSet, last: bigint, isTaken: (ip: string) => boolean): string | null {
  const { ranges } = space;
  const after = ranges.flatMap((range) =>
    range.last > last ? [{ first: range.first > last ? range.first : last + 1n, last: range.last }] : [],
  );
  const before = ranges.filter((range) => range.first <= last);
  for (const { first, last: end } of [...after, ...before]) {
    for (let n = first; n <= end; n++) {
      const text = textOf(n);
      if (!isTaken(text)) return text;
    }
  }
  return null;
}

function randomNumber(space: RangeSet, random: Random): bigint {
  const size = space.ranges.reduce((sum, { first, last }) => sum + last - first + 1n, 0n);
  let left = BigInt(`0x${Buffer.from(random(24)).toString("hex")}`) % size;
  for (const { first, last } of space.ranges) {
    if (left <= last - first) return first + left;
    left -= last - first + 1n;
  }
  return space.ranges[0]!.first;
}

/** A free address of `space`, or null. `last`: the one given before, "" for none. */
export function pickAddress(
  space: RangeSet,
  how: { allocation: "sequential" | "random"; last: string; random: Random; isTaken: (ip: string) => boolean },
): string | null {
  if (space.isEmpty) return null;
  let from = how.last === "" ? -1n : addressNumber(how.last)!;
  if (how.allocation === "random") {
    for (let i = 0; i < PICKS; i++) {
      from = randomNumber(space, how.random);
      const text = textOf(from);
      if (!how.isTaken(text)) return text;
    }
  }
  return nextFree(space, from, how.isTaken);
}

export interface Addresses {
  ipv4: string;
  ipv6: string;
  counters: Partial<Counters>;
}

type Owner = Pick<NodeRecord, "userId" | "tags">;

/** One address of each family that the tailnet has, from the pools that the policy names for such a node, or a reason. */
export function allocate(ctx: ControlContext, owner: Owner): Addresses | { problem: string } {
  const { v4, v6 } = ctx.settings.prefixes;
  const { lastIPv4, lastIPv6 } = ctx.model.counters;
  const ipv4 = v4 === null ? "" : one(ctx, owner, v4, lastIPv4);
  const ipv6 = v6 === null ? "" : one(ctx, owner, v6, lastIPv6);
  if (ipv4 === null || ipv6 === null)
    return { problem: `every address of ${ipv4 === null ? v4 : v6} is taken: delete nodes that are not used any more` };
  return { ipv4, ipv6, counters: { ...(ipv4 && { lastIPv4: ipv4 }), ...(ipv6 && { lastIPv6: ipv6 }) } };
}

/** `also`: addresses that are as good as given. */
function one(
  ctx: ControlContext,
  owner: Owner,
  prefix: string,
  last: string,
  also?: ReadonlySet<string>,
): string | null {
  const whole = usable(prefix);
  const wanted = ctx.access.addressPools(owner).filter((pool) => isV6(pool) === prefix.includes(":"));
  // What of a pool lies beyond the tailnet's prefix is nobody's.
  const space = wanted.length > 0 ? whole.without(whole.without(RangeSet.of(wanted))) : whole;
  return pickAddress(space, {
    allocation: ctx.settings.prefixes.allocation,
    last,
    random: ctx.random,
    isTaken: (ip) => ctx.model.hasAddress(ip) || (also?.has(ip) ?? false),
  });
}

/** Gives a node this IPv4 address. Throws CommandError. */
export async function assignIPv4(ctx: ControlContext, node: NodeRecord, text: string): Promise<void> {
  const ip = parseIP(text);
  const { v4 } = ctx.settings.prefixes;
  if (ip?.length !== 4) throw new CommandError(400, `${JSON.stringify(text.slice(0, 60))} is no IPv4 address`);
  if (v4 === null) throw new CommandError(400, "this tailnet has no IPv4 addresses (prefixes.v4 of the configuration)");
  const ipv4 = formatIP(ip);
  if (!usable(v4).has(addressNumber(ipv4)!))
    throw new CommandError(400, `${ipv4} is not an address of ${v4} that nodes may have`);
  if (ipv4 === node.ipv4) return;
  if (ctx.model.hasAddress(ipv4)) throw new CommandError(409, `${ipv4} belongs to another node`);
  await ctx.journal.commit({ nodes: [{ ...node, ipv4 }] });
}

/** What `backfillAddresses` did to one node. */
export interface Backfilled {
  nodeId: number;
  givenName: string;
  added: string[];
  removed: string[];
}

/**
 * Gives every node an address of each family that the tailnet has by now, and takes those of a family that it has no more.
 * Durable when it resolves. Throws CommandError when the addresses do not suffice; then nothing has changed.
 */
export async function backfillAddresses(ctx: ControlContext): Promise<Backfilled[]> {
  const { v4, v6 } = ctx.settings.prefixes;
  const taken = new Set<string>();
  const counters: Partial<Counters> = {};
  const done: Backfilled[] = [];
  const nodes: NodeRecord[] = [];
  for (const node of ctx.model.sortedNodes()) {
    const next = { ...node };
    for (const [family, prefix, last] of [
      ["ipv4", v4, "lastIPv4"],
      ["ipv6", v6, "lastIPv6"],
    ] as const) {
      if (prefix === null) next[family] = "";
      else if (node[family] === "") {
        const ip = one(ctx, node, prefix, counters[last] ?? ctx.model.counters[last], taken);
        if (ip === null)
          throw new CommandError(409, `${prefix} has no address left for node ${node.id} (${node.givenName})`);
        next[family] = ip;
        taken.add(ip);
        counters[last] = ip;
      }
    }
    const added = [next.ipv4, next.ipv6].filter((ip) => ip !== "" && ip !== node.ipv4 && ip !== node.ipv6);
    const removed = [node.ipv4, node.ipv6].filter((ip) => ip !== "" && ip !== next.ipv4 && ip !== next.ipv6);
    if (added.length + removed.length === 0) continue;
    nodes.push(next);
    done.push({ nodeId: node.id, givenName: node.givenName, added, removed });
  }
  if (nodes.length > 0) await ctx.journal.commit({ nodes, counters });
  return done;
}
