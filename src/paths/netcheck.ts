// Netcheck: what the network lets this node do, and how far each relay region is (spec/datapath-wire.md part 7).
//
//   plan     which STUN server is asked when, full (every region) or incremental (the nearest three and the home)
//   run      sends the probes, collects the answers, stops as soon as more would add little; without any answer it asks
//            for HTTPS probes, because UDP may be blocked
//   report   what was found
//   home     which region this node is reachable through, with hysteresis so that noise does not move it
//
// Pure: time is `now` in milliseconds, datagrams and probes go to the `emit` that the caller gives.
import type { AddrPort } from "../wire/ip.ts";
import { formatAddrPort, parseIP, unmap } from "../wire/ip.ts";
import { encodeStunRequest, STUN_PORT, STUN_TXID_LENGTH, type StunResponse } from "../wire/stun.ts";
import type { DERPMap, DERPNode, DERPRegion } from "../wire/tailcfg.ts";

const STUN_WINDOW_MS = 3000;
const BUDGET_MS = 5000;
/** Without a single answer for this long UDP is taken for blocked: ask over HTTPS, take a relay meanwhile. */
const SILENCE_MS = 1000;
const ENOUGH_REGIONS = 3;
/** The least time that the slower ones get after the answers that suffice. */
const MIN_GRACE_MS = 50;
const DEFAULT_LATENCY_MS = 200;
const MAX_REGIONS = 256;
const MAX_NODES = 16;

const HISTORY_MS = 305_000;
const MAX_HISTORY = 64;
/** Below this gain, or this share of gain, the home stays. */
const HOME_MIN_GAIN_MS = 10;
const HOME_GAIN_SHARE = 2 / 3;
const HEARD_RECENTLY_MS = 8000;
const HEARD_KEEPS_HOME_MS = 120_000;

export type Family = 4 | 6;

export interface NetcheckReport {
  /** When the check began. */
  at: number;
  /** Any STUN answer came. */
  udp: boolean;
  ipv4: boolean;
  ipv6: boolean;
  /** The kernel took datagrams for this family. */
  ipv4CanSend: boolean;
  ipv6CanSend: boolean;
  osHasIPv6: boolean;
  /** Two servers saw different addresses; null while fewer than two answered. */
  mappingVaries: boolean | null;
  globalV4: AddrPort | null;
  globalV6: AddrPort | null;
  /** How many answers named each public address. */
  globals: Map<AddrPort, number>;
  /** Region -> milliseconds, the least of its probes. By STUN, or by HTTPS when no STUN answer came at all. */
  latency: Map<number, number>;
  latency4: Map<number, number>;
  latency6: Map<number, number>;
}

export interface Probe {
  region: number;
  node: DERPNode;
  family: Family;
  /** Milliseconds after the start. */
  delay: number;
}

export interface PlanInput {
  regions: readonly DERPRegion[];
  has4: boolean;
  has6: boolean;
  /** 0 is none. */
  home: number;
  /** Null, or without latencies: the plan is a full one. */
  last: NetcheckReport | null;
}

export type NetcheckAction =
  | { type: "udp"; to: AddrPort; data: Uint8Array }
  /** Measure `GET /derp/latency-check` of the region over HTTPS and answer with `httpProbeResult`. */
  | { type: "httpProbe"; region: number };

/** Regions that count for home and latency, by id. A region with neither a node nor a positive id is dropped. */
export function measurableRegions(map: DERPMap, home: number): DERPRegion[] {
  return derpRegions(map)
    .filter((region) => !region.NoMeasureNoHome && (!region.Avoid || region.RegionID === home))
    .slice(0, MAX_REGIONS);
}

export function derpRegions(map: DERPMap): DERPRegion[] {
  return Object.values(map.Regions ?? {})
    .filter((region): region is DERPRegion => region !== null && region.RegionID > 0 && (region.Nodes ?? []).length > 0)
    .sort((a, b) => a.RegionID - b.RegionID);
}

export function planProbes(input: PlanInput): Probe[] {
  const last = input.last;
  return last && last.latency.size > 0 ? incrementalPlan(input, last) : fullPlan(input);
}

function fullPlan({ regions, has4, has6 }: PlanInput): Probe[] {
  const probes: Probe[] = [];
  for (const region of regions) {
    for (let k = 0; k < 3; k++) {
      if (has4) addProbe(probes, region, k, 4, k * 100);
      if (has6) addProbe(probes, region, k, 6, k * 100);
    }
  }
  return probes;
}

function incrementalPlan({ regions, has4, has6, home }: PlanInput, last: NetcheckReport): Probe[] {
  const distance = (region: DERPRegion) => last.latency.get(region.RegionID) ?? Number.POSITIVE_INFINITY;
  const sorted = [...regions].sort((a, b) => distance(a) - distance(b) || a.RegionID - b.RegionID);
  const probes: Probe[] = [];
  for (const [rank, region] of sorted.entries()) {
    const isHome = region.RegionID === home;
    if (rank >= ENOUGH_REGIONS && !isHome) continue;
    const tries = isHome ? 4 : rank < 2 ? 2 : 1;
    const both = isHome || rank < 2;
    const latency = last.latency.get(region.RegionID) ?? DEFAULT_LATENCY_MS;
    for (let t = 0; t < tries; t++) {
      const delay = t * 1.2 * latency + (t > 1 ? t * 50 : 0);
      const alternate = rank % 2 === 0 ? 4 : 6;
      const want4 = has4 && (both || !has6 || alternate === 4);
      const want6 = has6 && (both || !has4 || alternate === 6) && (t === 0 || last.ipv6);
      if (want4) addProbe(probes, region, t, 4, delay);
      if (want6) addProbe(probes, region, t, 6, delay);
    }
  }
  return probes;
}

function addProbe(probes: Probe[], region: DERPRegion, k: number, family: Family, delay: number): void {
  const nodes = (region.Nodes ?? []).slice(0, MAX_NODES);
  const node = nodes[k % nodes.length];
  if (!node || node.STUNPort === -1 || probeTarget(node, family) === null) return;
  probes.push({ region: region.RegionID, node, family, delay });
}

/** Where a probe goes. */
export type ProbeTarget = { ip: string } | { host: string } | null;

/** The literal address of a relay node in this family, or the host name to ask DNS for, or null: it has none. */
export function probeTarget(node: DERPNode, family: Family): ProbeTarget {
  const test = node.STUNTestIP ? parseIP(node.STUNTestIP) : null;
  if (test) return familyOf(test) === family ? { ip: node.STUNTestIP! } : null;
  const field = family === 4 ? node.IPv4 : node.IPv6;
  if (field) {
    const literal = parseIP(field);
    return literal && familyOf(literal) === family ? { ip: field } : null;
  }
  const host = parseIP(node.HostName);
  if (host) return familyOf(host) === family ? { ip: node.HostName } : null;
  return node.HostName ? { host: node.HostName } : null;
}

function familyOf(ip: Uint8Array): Family {
  return unmap(ip).length === 4 ? 4 : 6;
}

interface Outstanding {
  probe: Probe;
  sentAt: number;
}

/** One check. Drive it with `handleTimeout` at `nextTimeout()` until `report()` is there. */
export class Netcheck {
  readonly full: boolean;
  readonly #started: number;
  readonly #regions: readonly number[];
  readonly #random: (n: number) => Uint8Array;
  readonly #resolve: (host: string) => readonly string[] | undefined;
  readonly #emit: (action: NetcheckAction) => void;
  /** Not yet sent, by time. */
  #waiting: Probe[];
  /** Due, but the name of the server is not resolved yet. */
  #unresolved: Probe[] = [];
  readonly #outstanding = new Map<string, Outstanding>();
  /** "<region>-<family>" that have an answer. */
  readonly #answered = new Set<string>();
  readonly #http = new Map<number, number | null>();
  readonly #refused = { 4: 0, 6: 0 };
  readonly #found: NetcheckReport;
  #stopAt: number;
  #silent = false;
  #finished = false;

  constructor(
    options: PlanInput & {
      random: (n: number) => Uint8Array;
      /** Addresses of a host; undefined while DNS has not answered, empty when there are none. */
      resolve: (host: string) => readonly string[] | undefined;
      emit: (action: NetcheckAction) => void;
    },
    now: number,
  ) {
    this.full = !options.last || options.last.latency.size === 0;
    this.#started = now;
    this.#random = options.random;
    this.#resolve = options.resolve;
    this.#emit = options.emit;
    this.#waiting = planProbes(options).sort((a, b) => a.delay - b.delay);
    const planned = new Set(this.#waiting.map((probe) => probe.region));
    // Without any STUN server the regions are still there to be measured over HTTPS.
    this.#regions = planned.size > 0 ? [...planned] : options.regions.map((region) => region.RegionID);
    this.#stopAt = now + STUN_WINDOW_MS;
    this.#found = {
      at: now,
      udp: false,
      ipv4: false,
      ipv6: false,
      ipv4CanSend: options.has4,
      ipv6CanSend: options.has6,
      osHasIPv6: options.has6,
      mappingVaries: null,
      globalV4: null,
      globalV6: null,
      globals: new Map(),
      latency: new Map(),
      latency4: new Map(),
      latency6: new Map(),
    };
    this.handleTimeout(now);
  }

  /** Null while the check runs. */
  report(): NetcheckReport | null {
    return this.#finished ? this.#found : null;
  }

  /** True once UDP must be taken for blocked. The check goes on. */
  get silent(): boolean {
    return this.#silent;
  }

  nextTimeout(): number {
    if (this.#finished) return Number.POSITIVE_INFINITY;
    const probed = this.#http.size === this.#regions.length;
    let at = this.#found.udp || !this.#silent || probed ? this.#stopAt : this.#started + BUDGET_MS;
    const probe = this.#waiting[0];
    if (probe) at = Math.min(at, this.#started + probe.delay);
    if (!this.#silent && !this.#found.udp) at = Math.min(at, this.#started + SILENCE_MS);
    return at;
  }

  handleTimeout(now: number): void {
    if (this.#finished) return;
    while (this.#waiting[0] && this.#started + this.#waiting[0].delay <= now) this.#fire(this.#waiting.shift()!, now);
    if (!this.#found.udp && !this.#silent && (now >= this.#started + SILENCE_MS || this.#hopeless())) this.#goSilent();
    this.#finishIfDone(now);
  }

  /** False: no probe of this check has that transaction id. */
  handleStun(response: StunResponse, now: number): boolean {
    const key = txidKey(response.txid);
    const sent = this.#outstanding.get(key);
    if (!sent || this.#finished) return false;
    this.#outstanding.delete(key);
    const { probe } = sent;
    const ip = unmap(response.ip);
    // A server that answers with the other family has a translator between us: the address is of no use to peers.
    if ((ip.length === 4 ? 4 : 6) !== probe.family || response.port === 0) return true;
    this.#note(probe, now - sent.sentAt, formatAddrPort(ip, response.port));
    if (this.#found.latency.size >= Math.min(ENOUGH_REGIONS, this.#regions.length)) {
      const slowest = Math.max(...this.#found.latency.values());
      this.#stopAt = Math.min(this.#stopAt, now + Math.max(MIN_GRACE_MS, slowest * (this.full ? 2 : 1)));
    }
    this.#finishIfDone(now);
    return true;
  }

  /** A name was resolved, or could not be. */
  handleResolved(now: number): void {
    const waiting = this.#unresolved;
    this.#unresolved = [];
    for (const probe of waiting) this.#fire(probe, now);
    this.handleTimeout(now);
  }

  /** The kernel refused a datagram to this address. */
  handleSendFailed(to: AddrPort, now: number): void {
    if (this.#finished) return;
    for (const [key, sent] of this.#outstanding) {
      if (this.#address(sent.probe) !== to) continue;
      this.#outstanding.delete(key);
      this.#refused[sent.probe.family]++;
    }
    // Once may be a full buffer.
    if (this.#refused[4] > 1 && !this.#found.ipv4) this.#found.ipv4CanSend = false;
    if (this.#refused[6] > 1 && !this.#found.ipv6) this.#found.ipv6CanSend = false;
    this.handleTimeout(now);
  }

  /** Milliseconds, or null when the region did not answer over HTTPS. */
  httpProbeResult(region: number, ms: number | null, now: number): void {
    if (this.#finished || !this.#silent || !this.#regions.includes(region)) return;
    this.#http.set(region, ms);
    this.#finishIfDone(now);
  }

  #fire(probe: Probe, now: number): void {
    if (this.#addsNothing(probe)) return;
    const to = this.#address(probe);
    if (to === undefined) this.#unresolved.push(probe);
    if (!to) return;
    const txid = this.#random(STUN_TXID_LENGTH);
    this.#outstanding.set(txidKey(txid), { probe, sentAt: now });
    this.#emit({ type: "udp", to, data: encodeStunRequest(txid) });
  }

  #addsNothing({ region, family }: Probe): boolean {
    if (this.#answered.has(`${region}-${family}`)) return true;
    if (family === 4 ? !this.#found.ipv4CanSend : !this.#found.ipv6CanSend) return true;
    if (!this.#found.latency.has(region)) return false;
    return family === 6 ? this.#found.ipv6 : this.#found.mappingVaries !== null;
  }

  /** Undefined: DNS has not answered. Null: this node has no address in the family. */
  #address({ node, family }: Probe): AddrPort | null | undefined {
    const target = probeTarget(node, family);
    if (!target) return null;
    const port = node.STUNPort || STUN_PORT;
    if (port < 1 || port > 65535) return null;
    const ips = "ip" in target ? [target.ip] : this.#resolve(target.host);
    if (!ips) return undefined;
    for (const text of ips) {
      const ip = parseIP(text);
      if (ip && familyOf(ip) === family) return formatAddrPort(ip, port);
    }
    return null;
  }

  #note({ region, family }: Probe, latency: number, global: AddrPort): void {
    const found = this.#found;
    this.#answered.add(`${region}-${family}`);
    found.udp = true;
    const least = (map: Map<number, number>) => map.set(region, Math.min(latency, map.get(region) ?? latency));
    least(found.latency);
    least(family === 4 ? found.latency4 : found.latency6);
    found.globals.set(global, (found.globals.get(global) ?? 0) + 1);
    if (family === 6) {
      found.ipv6 = true;
      found.globalV6 ??= global;
      return;
    }
    found.ipv4 = true;
    if (found.globalV4 && found.globalV4 !== global) found.mappingVaries = true;
    else if (found.globalV4) found.mappingVaries ??= false;
    found.globalV4 ??= global;
  }

  /** Nothing was sent and nothing will be. */
  #hopeless(): boolean {
    return this.#waiting.length === 0 && this.#unresolved.length === 0 && this.#outstanding.size === 0;
  }

  #goSilent(): void {
    this.#silent = true;
    for (const region of this.#regions) this.#emit({ type: "httpProbe", region });
  }

  #finishIfDone(now: number): void {
    if (this.#finished) return;
    if (this.#found.udp) {
      const complete = this.#waiting.every((probe) => this.#addsNothing(probe)) && this.#allAnswered();
      if (now < this.#stopAt && !complete) return;
    } else {
      const probed = this.#silent && this.#http.size === this.#regions.length;
      const stunOver = this.#hopeless() || now >= this.#started + STUN_WINDOW_MS;
      if (!(probed && stunOver) && now < this.#started + BUDGET_MS) return;
      for (const [region, ms] of this.#http) if (ms !== null) this.#found.latency.set(region, ms);
    }
    this.#finished = true;
  }

  #allAnswered(): boolean {
    if (this.#unresolved.length > 0) return false;
    for (const { probe } of this.#outstanding.values()) {
      if (!this.#answered.has(`${probe.region}-${probe.family}`)) return false;
    }
    return true;
  }
}

/** Reports of the last five minutes: one bad measurement does not move the home. */
export class NetcheckHistory {
  #reports: NetcheckReport[] = [];

  get last(): NetcheckReport | null {
    return this.#reports.at(-1) ?? null;
  }

  add(report: NetcheckReport, now: number): void {
    this.#reports = this.#reports.filter((old) => now - old.at <= HISTORY_MS).slice(1 - MAX_HISTORY);
    this.#reports.push(report);
  }

  clear(): void {
    this.#reports = [];
  }

  /** The least latency of the region within the history. */
  best(region: number): number | undefined {
    let least: number | undefined;
    for (const report of this.#reports) {
      const ms = report.latency.get(region);
      if (ms !== undefined && (least === undefined || ms < least)) least = ms;
    }
    return least;
  }
}

/**
 * The region to be reached through, 0 when nothing is known: the nearest by the history, but the present home stays while
 * it is alive and the gain is small (spec/datapath-wire.md 7.5). `history` already holds `report`.
 */
export function chooseHome(options: {
  history: NetcheckHistory;
  report: NetcheckReport;
  map: DERPMap;
  home: number;
  /** When a frame was last received from the home relay. */
  homeHeardAt: number;
  now: number;
}): number {
  const { report, history, home, homeHeardAt, now } = options;
  const scores = options.map.HomeParams?.RegionScore ?? {};
  const scaled = (region: number, ms: number) => {
    const score = scores[String(region)] ?? 0;
    return score > 0 ? ms * score : ms;
  };
  let best = 0;
  let bestLatency = Number.POSITIVE_INFINITY;
  for (const region of [...report.latency.keys()].sort((a, b) => a - b)) {
    const definition = options.map.Regions?.[String(region)];
    if (!definition || definition.NoMeasureNoHome || definition.Avoid) continue;
    const latency = scaled(region, history.best(region)!);
    if (latency < bestLatency) {
      best = region;
      bestLatency = latency;
    }
  }
  if (home === 0 || !options.map.Regions?.[String(home)]) return best;
  if (best === 0) return now - homeHeardAt <= HEARD_KEEPS_HOME_MS ? home : 0;
  if (best === home) return home;
  const current = report.latency.get(home);
  const heard = homeHeardAt >= report.at || now - homeHeardAt <= HEARD_RECENTLY_MS;
  if (current === undefined && !heard) return best;
  const homeLatency = current === undefined ? 0 : scaled(home, current);
  if (homeLatency - bestLatency < HOME_MIN_GAIN_MS) return home;
  if (bestLatency > homeLatency * HOME_GAIN_SHARE) return home;
  return best;
}

function txidKey(txid: Uint8Array): string {
  return String.fromCharCode(...txid);
}
