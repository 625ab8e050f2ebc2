// Compiles the packet filter that the control server sends into the table that asm/filter.ts evaluates (layout there).
//
// Entries follow ts2021 spec part 18: an address, a masked prefix, an inclusive range "a-b", "*" for both families; sources
// also "cap:NAME", which never matches here. An entry that is wrong is skipped and counted: its rule may match nothing.
import { compareIP, formatPrefix, type IP, maskPrefix, parseIP, parsePrefix } from "../wire/ip.ts";
import type { FilterRule } from "../wire/tailcfg.ts";
import type { FilterConfig } from "./api.ts";

/** First and last address, of one family. */
export interface Range {
  first: IP;
  last: IP;
}

interface Destination extends Range {
  firstPort: number;
  lastPort: number;
}

export interface CompiledRule {
  /** Protocol numbers. */
  protocols: number[];
  /** Sorted and merged, IPv4 before IPv6. */
  sources: Range[];
  destinations: Destination[];
}

export interface CompiledFilter {
  rules: CompiledRule[];
  local: Range[];
  /** Entries that can never match: "cap:" sources. */
  skippedCaps: number;
  /** Entries that are wrong. */
  skippedBad: number;
}

/** TCP, UDP, ICMP, ICMPv6. */
const DEFAULT_PROTOCOLS = [6, 17, 1, 58];
const HEADER = 32;
const MATCH = 64;
/** Rules whose bounds lie together, and the bytes of these. */
const GROUP = 8;
const BOUNDS = 96;

/** Null when the text is no address set. "*" gives two ranges. */
export function parseRanges(text: string): Range[] | null {
  if (text === "*") {
    return [
      { first: new Uint8Array(4), last: new Uint8Array(4).fill(255) },
      { first: new Uint8Array(16), last: new Uint8Array(16).fill(255) },
    ];
  }
  const dash = text.indexOf("-");
  if (dash > 0) {
    const first = parseIP(text.slice(0, dash));
    const last = parseIP(text.slice(dash + 1));
    if (!first || !last || first.length !== last.length || compareIP(first, last) > 0) return null;
    return [{ first, last }];
  }
  const prefix = parsePrefix(text);
  if (!prefix) return null;
  if (formatPrefix(maskPrefix(prefix)) !== formatPrefix(prefix)) return null;
  return [prefixRange(prefix.ip, prefix.bits)];
}

function prefixRange(ip: IP, bits: number): Range {
  const first = maskPrefix({ ip, bits }).ip;
  const last = first.slice();
  for (let i = 0; i < last.length; i++) last[i]! |= 0xff >> Math.min(8, Math.max(0, bits - i * 8));
  return { first, last };
}

/** Sorted, with overlapping ones made one. */
export function mergeRanges(ranges: Range[]): Range[] {
  const sorted = [...ranges].sort((a, b) => compareIP(a.first, b.first));
  const out: Range[] = [];
  for (const range of sorted) {
    const top = out.at(-1);
    if (top && top.last.length === range.first.length && compareIP(range.first, top.last) <= 0) {
      if (compareIP(range.last, top.last) > 0) top.last = range.last;
    } else out.push({ ...range });
  }
  return out;
}

export function compileFilter(config: FilterConfig): CompiledFilter {
  const out: CompiledFilter = { rules: [], local: [], skippedCaps: 0, skippedBad: 0 };
  const local: Range[] = [];
  for (const text of config.local) {
    const prefix = parsePrefix(text);
    if (prefix) local.push(prefixRange(prefix.ip, prefix.bits));
    else out.skippedBad++;
  }
  out.local = mergeRanges(local);
  for (const rule of config.rules) {
    const compiled = compileRule(rule, out);
    if (compiled) out.rules.push(compiled);
  }
  return out;
}

function compileRule(rule: FilterRule, count: { skippedCaps: number; skippedBad: number }): CompiledRule | null {
  const sources: Range[] = [];
  for (const text of rule.SrcIPs ?? []) {
    if (text.startsWith("cap:")) {
      count.skippedCaps++;
      continue;
    }
    const ranges = parseRanges(text);
    if (ranges) sources.push(...ranges);
    else count.skippedBad++;
  }
  const destinations: Destination[] = [];
  for (const entry of rule.DstPorts ?? []) {
    const ranges = parseRanges(entry.IP);
    const { First: firstPort, Last: lastPort } = entry.Ports;
    if (ranges && isPort(firstPort) && isPort(lastPort) && firstPort <= lastPort) {
      for (const range of ranges) destinations.push({ ...range, firstPort, lastPort });
    } else count.skippedBad++;
  }
  const protocols = rule.IPProto?.length ? rule.IPProto : DEFAULT_PROTOCOLS;
  const known = protocols.filter((p) => Number.isInteger(p) && p >= 0 && p <= 255);
  count.skippedBad += protocols.length - known.length;
  if (sources.length === 0 || destinations.length === 0 || known.length === 0) return null;
  return { protocols: known, sources: mergeRanges(sources), destinations };
}

function isPort(n: number): boolean {
  return Number.isInteger(n) && n >= 0 && n <= 65535;
}

/** The table's bytes as they must lie at the address `base` (a multiple of 16). */
export function layOutFilter(filter: CompiledFilter, base: number): Uint8Array {
  // Rules of one policy share their sources: equal lists are stored once.
  const lists = new Map<string, { at4: number; n4: number; at6: number; n6: number }>();
  const chunks: { at: number; write: (view: DataView, at: number) => void }[] = [];
  const bounds = HEADER + MATCH * filter.rules.length;
  let size = bounds + BOUNDS * Math.ceil(filter.rules.length / GROUP);
  const place = (bytes: number, write: (view: DataView, at: number) => void): number => {
    const at = (size + 7) & ~7;
    size = at + bytes;
    chunks.push({ at, write });
    return at;
  };
  const placeRanges = (ranges: Range[]) => {
    const key = ranges.map((r) => `${r.first}-${r.last}`).join("|");
    let list = lists.get(key);
    if (!list) {
      const v4 = ranges.filter((r) => r.first.length === 4);
      const v6 = ranges.filter((r) => r.first.length === 16);
      list = {
        at4: place(v4.length * 8, (view, at) => {
          v4.forEach((r, i) => {
            putRange(view, at + i * 8, r);
          });
        }),
        n4: v4.length,
        at6: place(v6.length * 32, (view, at) => {
          v6.forEach((r, i) => {
            putRange(view, at + i * 32, r);
          });
        }),
        n6: v6.length,
      };
      lists.set(key, list);
    }
    return list;
  };
  const placeDestinations = (list: Destination[], stride: number) =>
    place(list.length * stride, (view, at) => {
      list.forEach((d, i) => {
        putRange(view, at + i * stride, d);
        const ports = at + i * stride + (stride === 12 ? 8 : 32);
        view.setUint16(ports, d.firstPort, true);
        view.setUint16(ports + 2, d.lastPort, true);
      });
    });

  const local = placeRanges(filter.local);
  const matches = filter.rules.map((rule) => {
    const v4 = rule.destinations.filter((d) => d.first.length === 4);
    const v6 = rule.destinations.filter((d) => d.first.length === 16);
    const to4 = placeDestinations(v4, 12);
    const to6 = placeDestinations(v6, 40);
    return { rule, sources: placeRanges(rule.sources), to4, n4: v4.length, to6, n6: v6.length };
  });

  const out = new Uint8Array((size + 7) & ~7);
  const view = new DataView(out.buffer);
  const words = (at: number, ...values: number[]) => {
    values.forEach((value, i) => {
      view.setUint32(at + i * 4, value, true);
    });
  };
  words(0, base + local.at4, local.n4, base + local.at6, local.n6, base + HEADER, matches.length, base + bounds);
  matches.forEach(({ rule, sources, to4, n4, to6, n6 }, i) => {
    const at = HEADER + i * MATCH;
    for (const protocol of rule.protocols) out[at + (protocol >> 3)]! |= 1 << (protocol & 7);
    words(at + 32, base + sources.at4, sources.n4, base + sources.at6, sources.n6, base + to4, n4, base + to6, n6);
  });
  filter.rules.forEach((rule, i) => {
    putBounds(view, bounds + BOUNDS * Math.floor(i / GROUP), i % GROUP, rule);
  });
  for (const chunk of chunks) chunk.write(view, chunk.at);
  return out;
}

/** Ports and IPv4 sources between which rule number `i` of its group may match. */
function putBounds(view: DataView, at: number, i: number, { destinations, sources }: CompiledRule): void {
  let [first, last] = [65535, 0];
  for (const { firstPort, lastPort } of destinations) {
    first = Math.min(first, firstPort);
    last = Math.max(last, lastPort);
  }
  view.setUint16(at + i * 2, first, true);
  view.setUint16(at + 16 + i * 2, last, true);
  // Sorted, IPv4 first. Without any, the bounds are such that nothing lies between.
  const [lowest, highest] = [sources[0]!, sources.findLast((range) => range.first.length === 4)];
  view.setUint32(at + 32 + i * 4, highest ? number4(lowest.first) : 0xffffffff, true);
  view.setUint32(at + 64 + i * 4, highest ? number4(highest.last) : 0, true);
}

function number4(ip: IP): number {
  return new DataView(ip.buffer, ip.byteOffset, 4).getUint32(0);
}

/** As numbers: 4 bytes each, or high and low words of 8 bytes each. */
function putRange(view: DataView, at: number, range: Range): void {
  const width = range.first.length;
  [range.first, range.last].forEach((ip, side) => {
    const from = new DataView(ip.buffer, ip.byteOffset, width);
    if (width === 4) view.setUint32(at + side * 4, from.getUint32(0), true);
    else {
      view.setBigUint64(at + side * 16, from.getBigUint64(0), true);
      view.setBigUint64(at + side * 16 + 8, from.getBigUint64(8), true);
    }
  });
}
