// One peer's paths: its candidate addresses, which of them a pong has confirmed, how long that is trusted, and when to
// ping (spec/datapath-wire.md part 5).
//
//   no best        relay only
//   best           a pong confirmed the address. Trusted for 6.5 s after each pong: UDP only. Not trusted: UDP and relay
//   heartbeat      every 3 s while user data was sent within 45 s: ping of best, and search while there is something to gain
//   search         ping of all candidates, each at most every 5 s, and a CallMeMaybe so that the peer opens its NAT to us
//
// The machine holds no socket and no clock: it asks its `PeerHost` to send and to be woken.
import type { AddrPort } from "../wire/ip.ts";
import { isBetter, type Quality } from "./quality.ts";

export const SESSION_ACTIVE_MS = 45_000;
const HEARTBEAT_MS = 3000;
const TRUST_MS = 6500;
const UPGRADE_MS = 60_000;
const GOOD_ENOUGH_MS = 5;
export const PING_TIMEOUT_MS = 5000;
const DISCOVERY_PING_MS = 5000;
/** Least time between two pings that answer a ping while no path is trusted. */
const PING_BACK_MS = 1000;
const MAX_CANDIDATES = 100;
/** More pings than this are never under way to one peer, whatever it asks for. */
const MAX_OUTSTANDING = 256;

const NEVER = Number.NEGATIVE_INFINITY;
const NO_TIMER = Number.POSITIVE_INFINITY;

/**
 * How packets to a peer travel now: the datapath's PeerPath, with the relay region when `relay` is set. UDP alone: a
 * trusted direct path. Both: the address is not trusted (any more), send on both ways. Neither: no way is known.
 */
export interface PathToPeer {
  udp?: AddrPort;
  relay?: boolean;
  region?: number;
}

/** What a peer asks of the manager. */
export interface PeerHost {
  /** False: not possible at all (no key, no socket of the family). */
  sendPing(peer: Peer, to: AddrPort, now: number): boolean;
  /** Sends our addresses to the peer over its relay, after a ReSTUN when they are old. */
  callMeMaybe(peer: Peer, now: number): void;
  /** The region over which the peer is reached, 0 when there is none. */
  relayRegion(peer: Peer): number;
  pathChanged(peer: Peer, path: PathToPeer): void;
  /** Infinity takes the timer away. */
  setTimer(peer: Peer, at: number, reason: string): void;
  /** The checked, canonical form; null when the address may not be a candidate. */
  candidate(address: AddrPort): AddrPort | null;
}

interface Candidate {
  /** In the netmap now. */
  inNetmap: boolean;
  /** In the last CallMeMaybe. */
  called: boolean;
  /** When a ping came from there. */
  pingedAt: number;
  /** Transaction of that ping, as text. */
  pingTxid: string;
  /** When we last pinged it. */
  lastPing: number;
  /** When we last did so because a ping came from there. */
  pingedBackAt: number;
}

export class Peer {
  /** Counts resets: an answer to a ping of an earlier epoch confirms nothing. */
  epoch = 0;
  /** Pings under way. */
  outstanding = 0;
  discoKey: Uint8Array | null = null;
  /** `discoKey` in hex, "" for none. */
  discoText = "";
  homeRegion = 0;
  /** Relay region over which the peer was last heard, 0 is none: the way back while the home is not connected. */
  heardRegion = 0;
  lastSend = NEVER;
  readonly #host: PeerHost;
  readonly #candidates = new Map<AddrPort, Candidate>();
  #best: Quality | null = null;
  #trustUntil = NEVER;
  /** Sends to best that the kernel refused since the last pong. */
  #sendFailures = 0;
  #lastFullPing = NEVER;
  #heartbeatAt = NO_TIMER;
  #path: PathToPeer = {};

  constructor(
    readonly nodeKey: Uint8Array,
    /** `nodeKey` in hex. */
    readonly text: string,
    host: PeerHost,
  ) {
    this.#host = host;
  }

  get best(): Readonly<Quality> | null {
    return this.#best;
  }

  get path(): Readonly<PathToPeer> {
    return this.#path;
  }

  get candidates(): AddrPort[] {
    return [...this.#candidates.keys()];
  }

  isTrusted(now: number): boolean {
    return this.#best !== null && now < this.#trustUntil;
  }

  isActive(now: number): boolean {
    return now - this.lastSend <= SESSION_ACTIVE_MS;
  }

  /** The netmap's addresses: those that are gone and were known by nothing else are forgotten (5.3 b). */
  setNetmapEndpoints(endpoints: readonly AddrPort[], now: number): void {
    const listed = new Set<AddrPort>();
    for (const text of endpoints.slice(0, MAX_CANDIDATES)) {
      const address = this.#host.candidate(text);
      if (address) listed.add(address);
    }
    for (const [address, candidate] of this.#candidates) {
      if (listed.has(address) || !candidate.inNetmap) continue;
      candidate.inNetmap = false;
      this.#forgetUnless(address, candidate.called || this.#pingedRecently(candidate, now));
    }
    for (const address of listed) {
      const candidate = this.#learn(address, now);
      if (candidate) candidate.inNetmap = true;
    }
    this.#settle(now);
  }

  /** User data went to the peer (5.4). */
  noteSend(now: number): void {
    this.lastSend = now;
    if (!this.isTrusted(now)) this.#search(now, true);
    if (this.#heartbeatAt === NO_TIMER) this.#heartbeatAt = now + HEARTBEAT_MS;
    this.#settle(now);
  }

  /**
   * A valid ping came from this address: it becomes a candidate (5.3). True when it is a copy of the last ping from there,
   * which deserves no second pong.
   */
  handlePing(from: AddrPort, txid: string, now: number): boolean {
    const address = this.#candidates.has(from) ? from : this.#host.candidate(from);
    const candidate = address && this.#learn(address, now);
    if (!candidate) return false;
    const duplicate = candidate.pingTxid === txid;
    candidate.pingTxid = txid;
    candidate.pingedAt = now;
    // The peer's NAT is open to us from this moment: an earlier ping of ours was lost there, the next is 5 s away.
    if (this.isActive(now) && !this.isTrusted(now) && now - candidate.pingedBackAt >= PING_BACK_MS) {
      candidate.pingedBackAt = now;
      this.#ping(address, candidate, now);
    }
    return duplicate;
  }

  /** The peer asks to be pinged at these addresses (5.6). */
  handleCallMeMaybe(addresses: readonly AddrPort[], now: number): void {
    const listed = new Set<AddrPort>();
    for (const text of addresses) {
      const address = this.#host.candidate(text);
      if (address) listed.add(address);
    }
    for (const [address, candidate] of this.#candidates) candidate.called &&= listed.has(address);
    this.#expire(now);
    for (const address of listed) {
      const candidate = this.#learn(address, now);
      if (candidate) candidate.called = true;
    }
    for (const candidate of this.#candidates.values()) candidate.lastPing = NEVER;
    this.#search(now, false);
    this.#settle(now);
  }

  /** A pong over UDP answered the ping that went to `to` (5.7). */
  handlePong(to: AddrPort, latency: number, now: number): void {
    if (!this.#candidates.has(to)) return;
    const confirmed: Quality = { address: to, latency };
    if (!this.#best || !this.isTrusted(now) || isBetter(confirmed, this.#best)) this.#best = confirmed;
    if (this.#best.address === to) {
      this.#best.latency = latency;
      this.#trustUntil = now + TRUST_MS;
      this.#sendFailures = 0;
    }
    this.#settle(now);
  }

  /** No pong within 5 s for a ping that went to `to`. */
  handlePingTimeout(to: AddrPort, now: number): void {
    if (this.#best?.address === to && !this.isTrusted(now)) this.#clearBest();
    this.#settle(now);
  }

  /**
   * The kernel did not send to this address: the path over it is dead (5.4.6). Once may be a full buffer, so the first
   * time the relay is taken as well, and the next data tries again; the second time the path is given up.
   */
  handleSendFailed(to: AddrPort, now: number): void {
    const candidate = this.#candidates.get(to);
    if (!candidate || this.#best?.address !== to) return;
    this.#sendFailures++;
    if (this.#sendFailures > 1) this.#clearBest();
    else this.#trustUntil = NEVER;
    candidate.lastPing = NEVER;
    this.#settle(now);
  }

  /** Our own network changed: nothing that was learnt holds (5.7). An active peer is searched anew at once. */
  reset(now: number): void {
    this.epoch++;
    this.#clearBest();
    for (const candidate of this.#candidates.values()) candidate.pingTxid = "";
    this.doubt(now);
  }

  /** The path may be void: the relay carries the data as well until a pong has confirmed it anew. */
  doubt(now: number): void {
    this.#trustUntil = NEVER;
    for (const candidate of this.#candidates.values()) candidate.lastPing = NEVER;
    if (this.isActive(now)) this.#search(now, true);
    this.#settle(now);
  }

  /** The peer restarted, it has a new disco key: only the netmap's addresses remain. */
  setDiscoKey(key: Uint8Array | null, text: string, now: number): void {
    this.discoKey = key;
    this.discoText = text;
    const inNetmap = [...this.#candidates].filter(([, candidate]) => candidate.inNetmap);
    this.#candidates.clear();
    for (const [address] of inNetmap) this.#learn(address, now)!.inNetmap = true;
    this.reset(now);
  }

  handleTimeout(now: number): void {
    if (now >= this.#heartbeatAt) this.#heartbeat(now);
    this.#settle(now);
  }

  /** Tells the datapath when the path is another than before: the trust ran out, the relay changed. */
  refreshPath(now: number): void {
    const path: PathToPeer = {};
    const trusted = this.isTrusted(now);
    if (this.#best) path.udp = this.#best.address;
    const region = trusted ? 0 : this.#host.relayRegion(this);
    if (region !== 0) {
      path.relay = true;
      path.region = region;
    }
    const old = this.#path;
    if (old.udp === path.udp && old.region === path.region) return;
    this.#path = path;
    this.#host.pathChanged(this, path);
  }

  /** For a CLI ping: the addresses worth a ping regardless of when they were pinged last. */
  pingTargets(now: number): AddrPort[] {
    return this.#best && this.isTrusted(now) ? [this.#best.address] : this.candidates;
  }

  /** Notes a ping that did not come out of this machine, for the 5 s between two pings of a candidate. */
  notePinged(address: AddrPort, now: number): void {
    const candidate = this.#candidates.get(address);
    if (candidate) candidate.lastPing = now;
  }

  #heartbeat(now: number): void {
    if (!this.isActive(now)) {
      this.#heartbeatAt = NO_TIMER;
      return;
    }
    this.#heartbeatAt = now + HEARTBEAT_MS;
    const best = this.#best && this.#candidates.get(this.#best.address);
    if (this.#best && best) this.#ping(this.#best.address, best, now);
    if (this.#wantsSearch(now)) this.#search(now, true);
  }

  #wantsSearch(now: number): boolean {
    if (!this.#best || !this.isTrusted(now)) return true;
    if (this.#best.latency <= GOOD_ENOUGH_MS) return false;
    return now - this.#lastFullPing >= UPGRADE_MS;
  }

  #search(now: number, callMeMaybe: boolean): void {
    this.#lastFullPing = now;
    this.#expire(now);
    let pinged = false;
    for (const [address, candidate] of this.#candidates) {
      if (now - candidate.lastPing < DISCOVERY_PING_MS) continue;
      if (this.#ping(address, candidate, now)) pinged = true;
    }
    if (pinged && callMeMaybe && this.#host.relayRegion(this) !== 0) this.#host.callMeMaybe(this, now);
  }

  #ping(address: AddrPort, candidate: Candidate, now: number): boolean {
    if (this.outstanding >= MAX_OUTSTANDING || !this.#host.sendPing(this, address, now)) return false;
    candidate.lastPing = now;
    return true;
  }

  #learn(address: AddrPort, now: number): Candidate | null {
    const known = this.#candidates.get(address);
    if (known) return known;
    if (this.#candidates.size >= MAX_CANDIDATES) this.#expire(now);
    if (this.#candidates.size >= MAX_CANDIDATES) return null;
    const candidate = {
      inNetmap: false,
      called: false,
      pingedAt: NEVER,
      pingTxid: "",
      lastPing: NEVER,
      pingedBackAt: NEVER,
    };
    this.#candidates.set(address, candidate);
    return candidate;
  }

  /**
   * Forgets the candidates that no list holds (5.3 a) and that no ping came from for a while (5.3 c). A best path that
   * pongs confirm now is alive all the same.
   */
  #expire(now: number): void {
    for (const [address, candidate] of this.#candidates) {
      const alive = this.#best?.address === address && this.isTrusted(now);
      this.#forgetUnless(
        address,
        candidate.inNetmap || candidate.called || alive || this.#pingedRecently(candidate, now),
      );
    }
  }

  #pingedRecently(candidate: Candidate, now: number): boolean {
    return now - candidate.pingedAt <= SESSION_ACTIVE_MS;
  }

  #forgetUnless(address: AddrPort, kept: boolean): void {
    if (kept) return;
    this.#candidates.delete(address);
    if (this.#best?.address === address) this.#clearBest();
  }

  #clearBest(): void {
    this.#best = null;
    this.#trustUntil = NEVER;
    this.#sendFailures = 0;
  }

  /** After every event: the path as it is now, and the next moment at which time alone changes something. */
  #settle(now: number): void {
    this.refreshPath(now);
    const trustEnds = this.isTrusted(now) ? this.#trustUntil : NO_TIMER;
    if (this.#heartbeatAt <= trustEnds) this.#host.setTimer(this, this.#heartbeatAt, "heartbeat");
    else this.#host.setTimer(this, trustEnds, "trust ends");
  }
}
