// Sets of IP addresses as sorted ranges on one number line: IPv4 below 2^32, IPv6 from 2^128 on. Text as Go's netipx
// prints an IPSet: an address, a prefix where a range is one, "first-last" otherwise.
import { formatIP, type IP, maskPrefix, parseIP, parsePrefix } from "../../wire/ip.ts";

/** Both ends are inside; they are of one family. */
export interface Range {
  readonly first: bigint;
  readonly last: bigint;
}

const V6 = 1n << 128n;

function numberOf(ip: IP): bigint {
  let n = 0n;
  for (const byte of ip) n = (n << 8n) | BigInt(byte);
  return ip.length === 16 ? V6 | n : n;
}

export function textOf(n: bigint): string {
  const bytes = new Uint8Array(n >= V6 ? 16 : 4);
  for (let i = bytes.length - 1, rest = n; i >= 0; i--, rest >>= 8n) bytes[i] = Number(rest & 255n);
  return formatIP(bytes);
}

/** Reading IPv6 text takes most of a compilation, and it is the same text each time. */
const numbers = new Map<string, bigint>();
const MAX_NUMBERS = 20_000;

export function addressNumber(text: string): bigint | null {
  let n = numbers.get(text);
  if (n === undefined) {
    const ip = parseIP(text);
    if (!ip) return null;
    n = numberOf(ip);
    if (numbers.size >= MAX_NUMBERS) numbers.clear();
    numbers.set(text, n);
  }
  return n;
}

/** An address, a prefix (its host bits are dropped) or "first-last". Null when wrong. */
export function parseRange(text: string): Range | null {
  const dash = text.indexOf("-");
  if (dash > 0) {
    const first = addressNumber(text.slice(0, dash));
    const last = addressNumber(text.slice(dash + 1));
    return first === null || last === null || first > last || first >= V6 !== last >= V6 ? null : { first, last };
  }
  const prefix = parsePrefix(text);
  if (!prefix) return null;
  const first = numberOf(maskPrefix(prefix).ip);
  return { first, last: first + (1n << BigInt(prefix.ip.length * 8 - prefix.bits)) - 1n };
}

function prefixBits({ first, last }: Range): number | null {
  const size = last - first + 1n;
  if ((size & (size - 1n)) !== 0n || (first & (size - 1n)) !== 0n) return null;
  return (first >= V6 ? 128 : 32) - (size.toString(2).length - 1);
}

export function formatRange(range: Range): string {
  if (range.first === range.last) return textOf(range.first);
  const bits = prefixBits(range);
  return bits === null ? `${textOf(range.first)}-${textOf(range.last)}` : `${textOf(range.first)}/${bits}`;
}

export function isIPv6({ first }: Range): boolean {
  return first >= V6;
}

export function overlaps(a: Range, b: Range): boolean {
  return a.first <= b.last && b.first <= a.last;
}

export function covers(outer: Range, inner: Range): boolean {
  return outer.first <= inner.first && inner.last <= outer.last;
}

/** Sorted ranges that neither overlap nor touch. */
export class RangeSet {
  private constructor(readonly ranges: readonly Range[]) {}

  static readonly EMPTY = new RangeSet([]);

  static of(ranges: readonly Range[]): RangeSet {
    if (ranges.length === 0) return RangeSet.EMPTY;
    const sorted = [...ranges].sort((a, b) => (a.first < b.first ? -1 : a.first > b.first ? 1 : 0));
    const out: Range[] = [];
    for (const range of sorted) {
      const top = out.at(-1);
      // IPv4 and IPv6 never touch: 2^32 and 2^128 are far apart.
      if (!top || range.first > top.last + 1n) out.push(range);
      else if (range.last > top.last) out[out.length - 1] = { first: top.first, last: range.last };
    }
    return new RangeSet(out);
  }

  without(other: RangeSet): RangeSet {
    const out: Range[] = [];
    let i = 0;
    for (const range of this.ranges) {
      let first = range.first;
      while (i > 0 && other.ranges[i - 1]!.last >= first) i--;
      for (; i < other.ranges.length && other.ranges[i]!.first <= range.last; i++) {
        const hole = other.ranges[i]!;
        if (hole.last < first) continue;
        if (hole.first > first) out.push({ first, last: hole.first - 1n });
        first = hole.last + 1n;
      }
      if (first <= range.last) out.push({ first, last: range.last });
    }
    return new RangeSet(out);
  }

  get isEmpty(): boolean {
    return this.ranges.length === 0;
  }

  /** The first range whose end is not below `n`. */
  private from(n: bigint): Range | undefined {
    let low = 0;
    let high = this.ranges.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.ranges[middle]!.last < n) low = middle + 1;
      else high = middle;
    }
    return this.ranges[low];
  }

  has(n: bigint): boolean {
    const range = this.from(n);
    return range !== undefined && range.first <= n;
  }

  overlaps(range: Range): boolean {
    const hit = this.from(range.first);
    return hit !== undefined && hit.first <= range.last;
  }

  covers(range: Range): boolean {
    const hit = this.from(range.first);
    return hit !== undefined && covers(hit, range);
  }

  texts(): string[] {
    return this.ranges.map(formatRange);
  }
}

function setOf(...texts: string[]): RangeSet {
  return RangeSet.of(texts.map((text) => parseRange(text)!));
}

/** ChromeOS keeps these for itself. */
const CHROME_OS = setOf("100.115.92.0/23");

/** What "*" means as a source, but for routes: the addresses of nodes. */
export function tailnetRanges(prefixes: readonly string[]): RangeSet {
  return setOf(...prefixes).without(CHROME_OS);
}

/** Where nothing else is chosen. */
export const TAILNET: RangeSet = tailnetRanges(["100.64.0.0/10", "fd7a:115c:a1e0::/48"]);

/**
 * autogroup:internet: what a client takes for the internet behind an exit node. Not more is left out: an exit node answers
 * DNS for those who may reach 0.0.0.0 or 2000:: (tailscale, ipn/ipnlocal/peerapi.go and local.go).
 */
export const INTERNET: RangeSet = setOf("0.0.0.0/0", "2000::/3").without(
  setOf("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4"),
);

/** autogroup:danger-all. */
export const EVERYTHING: RangeSet = setOf("0.0.0.0/0", "::/0");

/** Whether a range is all of its family. */
export function isEverything(range: Range): boolean {
  return EVERYTHING.ranges.some((all) => covers(range, all));
}
