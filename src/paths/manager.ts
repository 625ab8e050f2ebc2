// PathManager: which way packets to each peer go. Disco, netcheck, own endpoints, home relay.
//
// It does no I/O. The caller feeds it events with `now` (milliseconds of a monotonic clock, fractions welcome), then
// carries out the actions of `drain()`, then sleeps until `nextTimeout().at` and calls `handleTimeout(now)`. Drain after
// every input: nothing else makes the queue shorter.
//
//   start          new PathManager({ random }); setKeys; setLocalAddresses; setDerpMap; setPeers. Any order works.
//   from the map   setDerpMap, setPeers | updatePeer | removePeer, setControlAlive
//   from sockets   handleDatagram (all that Datapath.onDatagram hands over), sendFailed (Datapath.sendDatagram was false)
//   from relays    handleRelayed (before the datapath: true means it was disco), relayState, relayHeard, peerGone
//   from datapath  noteSend (Datapath.onActivity), noteRelaySend (Datapath.onRelay)
//   from the host  setLocalAddresses, networkChanged
//   answers        resolve -> resolved, httpProbe -> httpProbeResult
//
//   actions        udp         send from the datapath's socket
//                  relay       send to the node over the region's connection; queue it for a moment while that connects
//                  path        Datapath.setPath(peer, path); with path.relay its messages go over path.region
//                  endpoints   own addresses for MapRequest.Endpoints and EndpointTypes
//                  home        the home region changed (0: none): NotePreferred on the connections, netinfo follows
//                  netinfo     for Hostinfo.NetInfo
//                  connect     keep a connection to this region (and re-connect by yourself) until `disconnect`
//                  resolve     look up A and AAAA of a relay's host name
//                  httpProbe   time GET https://host/derp/latency-check
//                  pong        the end of a `ping` of the CLI
//                  log         debug: a peer's path, why a netcheck runs; info: the home; warn: this node has no relay
//
// Rules: spec/datapath-wire.md parts 4 to 7, spec/derp-wire.md 19.2. UDP relays (Geneve) and hard NAT are not here yet:
// their messages parse and are ignored.
import { boxBeforeNM } from "../crypto/box.ts";
import { constantTimeEqual, hex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  DISCO_NONCE_LENGTH,
  DISCO_TXID_LENGTH,
  type DiscoMessage,
  discoSender,
  encodeCallMeMaybe,
  encodePing,
  encodePong,
  isDisco,
  openDisco,
  sealDisco,
} from "../wire/disco.ts";
import { type AddrPort, formatAddrPort, type Prefix, parseAddrPort, parseIP, parsePrefix } from "../wire/ip.ts";
import { isStun, parseStunResponse } from "../wire/stun.ts";
import type { DERPMap, DERPRegion, EndpointType, NetInfo } from "../wire/tailcfg.ts";
import { isLoopback, isUnicast, isWithin } from "./address.ts";
import {
  buildEndpoints,
  type EndpointList,
  isUnroutedLinkLocal,
  type LocalAddresses,
  RememberedEndpoints,
} from "./endpoints.ts";
import {
  chooseHome,
  derpRegions,
  measurableRegions,
  Netcheck,
  NetcheckHistory,
  type NetcheckReport,
  probeTarget,
} from "./netcheck.ts";
import { type PathToPeer, Peer, PING_TIMEOUT_MS, SESSION_ACTIVE_MS } from "./peer.ts";
import { RelayConnections } from "./relays.ts";
import { Timers } from "./timers.ts";

/** A peer of the netmap. */
export interface PeerInfo {
  /** 32 bytes. */
  nodeKey: Uint8Array;
  /** 32 bytes; null or zeros: it speaks no disco and is reached by relay only. */
  discoKey: Uint8Array | null;
  endpoints: readonly AddrPort[];
  /** Region id, 0 is none. */
  homeDerp: number;
}

export type PathAction =
  | { type: "udp"; to: AddrPort; data: Uint8Array }
  | { type: "relay"; region: number; to: Uint8Array; data: Uint8Array }
  | { type: "path"; peer: Uint8Array; path: PathToPeer }
  | { type: "endpoints"; endpoints: AddrPort[]; types: EndpointType[] }
  | { type: "home"; region: number }
  | { type: "netinfo"; netInfo: NetInfo }
  | { type: "connect"; region: number }
  | { type: "disconnect"; region: number }
  | { type: "resolve"; host: string }
  | { type: "httpProbe"; region: number }
  | ({ type: "pong" } & PingResult)
  | { type: "log"; level: "debug" | "info" | "warn"; message: string };

/** How a CLI ping ended: by an answer over UDP or over a relay, or with a reason. */
export type PingResult =
  | { id: number; peer: Uint8Array; ok: true; latency: number; via: { udp: AddrPort } | { region: number } }
  | { id: number; peer: Uint8Array; ok: false; error: string };

export interface PathManagerOptions {
  /** A CSPRNG in the daemon; seeded in tests. */
  random: (n: number) => Uint8Array;
  /** The UDP port is configured rather than picked by the kernel. Default false. */
  fixedPort?: boolean;
  /** Addresses inside a tailnet are neither announced nor pinged: a tunnel in the tunnel would look like a direct path. */
  tailnetPrefixes?: readonly string[];
}

/** For status displays (spec/datapath-wire.md 5.12). */
export interface PeerStatus {
  /** The direct address, when it is trusted now. */
  address: AddrPort | null;
  /** Milliseconds, of `address`. */
  latency: number | null;
  /** Region of the relay path, 0 is none. */
  region: number;
  /** User data went to it within 45 s. */
  active: boolean;
}

const TAILNET_PREFIXES = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];
const FRESH_ENDPOINTS_MS = 27_000;
const RESTUN_MIN_MS = 20_000;
const RESTUN_SPREAD_MS = 6000;
/** Triggers that may come often (a relay that fails again and again) are at least this far apart. */
const RESTUN_SPACING_MS = 2000;
const FULL_NETCHECK_MS = 300_000;
const RESOLVE_AGAIN_MS = 300_000;
const MAX_CLI_PINGS = 64;
const NEVER = Number.NEGATIVE_INFINITY;
const NO_TIMER = Number.POSITIVE_INFINITY;

interface PendingPing {
  peer: Peer;
  epoch: number;
  /** Region when it went by relay. */
  to: AddrPort | number;
  sentAt: number;
  cli: CliPing | null;
}

interface CliPing {
  id: number;
  peer: Peer;
  /** Pings under way; at none it has failed. */
  outstanding: number;
}

interface ResolvedHost {
  /** Undefined until DNS has answered. */
  ips: readonly string[] | undefined;
  askedAt: number;
}

export class PathManager {
  readonly #random: (n: number) => Uint8Array;
  readonly #fixedPort: boolean;
  readonly #tailnet: readonly Prefix[];
  #actions: PathAction[] = [];

  #nodeKey = new Uint8Array(32);
  #discoPrivate: Uint8Array | null = null;
  #discoPublic = new Uint8Array(32);
  /** Disco key in hex -> precomputed box key. */
  readonly #shared = new Map<string, Uint8Array>();

  readonly #peers = new Map<string, Peer>();
  readonly #byDisco = new Map<string, Set<Peer>>();
  readonly #timers = new Timers<Peer>();
  /** By transaction id, in order of time: all pings wait equally long. */
  readonly #pings = new Map<string, PendingPing>();
  readonly #cliPings = new Set<CliPing>();

  #derpMap: DERPMap = {};
  #hasDerpMap = false;
  readonly #relays: RelayConnections;
  #controlAlive = true;
  /** Picks the relay when nothing could be measured: the same one for the life of the process. */
  readonly #fallback: number;
  #warnedHomeless = false;

  #local: LocalAddresses | null = null;
  #netcheck: Netcheck | null = null;
  #netcheckAgain: "no" | "incremental" | "full" = "no";
  #needFull = true;
  /** The running check has been noted to be without answers. */
  #silenceNoted = false;
  #lastFull = NEVER;
  readonly #history = new NetcheckHistory();
  readonly #remembered = new RememberedEndpoints();
  readonly #hosts = new Map<string, ResolvedHost>();
  #restunAt = NO_TIMER;
  #restunReason = "";
  #lastSend = NEVER;

  #endpoints: EndpointList = { endpoints: [], types: [] };
  #endpointsAt = NEVER;
  #publishedEndpoints = "";
  #publishedNetInfo = "";
  readonly #callMeMaybeLater = new Set<Peer>();

  constructor(options: PathManagerOptions) {
    this.#random = options.random;
    this.#fixedPort = options.fixedPort ?? false;
    this.#tailnet = (options.tailnetPrefixes ?? TAILNET_PREFIXES).map((text) => {
      const prefix = parsePrefix(text);
      if (!prefix) throw new RangeError(`${JSON.stringify(text)} is no prefix such as 100.64.0.0/10`);
      return prefix;
    });
    this.#relays = new RelayConnections((type, region) => this.#actions.push({ type, region }));
    this.#fallback = this.#randomFraction();
  }

  /** What is to be done now, in this order. The queue is empty afterwards. */
  drain(): PathAction[] {
    const actions = this.#actions;
    if (actions.length > 0) this.#actions = [];
    return actions;
  }

  /** Null: nothing happens by time alone. */
  nextTimeout(): { at: number; reason: string } | null {
    let at = NO_TIMER;
    let reason = "";
    const consider = (candidate: number, why: string) => {
      if (candidate < at) {
        at = candidate;
        reason = why;
      }
    };
    const peer = this.#timers.peek();
    if (peer) consider(peer.at, peer.reason);
    for (const ping of this.#pings.values()) {
      consider(ping.sentAt + PING_TIMEOUT_MS, "ping timeout");
      break;
    }
    if (this.#netcheck) consider(this.#netcheck.nextTimeout(), "netcheck");
    consider(this.#restunAt, `ReSTUN: ${this.#restunReason}`);
    consider(this.#relays.checkAt, "idle relays");
    return at === NO_TIMER ? null : { at, reason };
  }

  handleTimeout(now: number): void {
    for (const [txid, ping] of this.#pings) {
      if (now < ping.sentAt + PING_TIMEOUT_MS) break;
      this.#pingTimedOut(txid, ping, now);
    }
    for (let due = this.#timers.peek(); due && due.at <= now; due = this.#timers.peek()) due.key.handleTimeout(now);
    if (this.#netcheck && this.#netcheck.nextTimeout() <= now) {
      this.#netcheck.handleTimeout(now);
      this.#netcheckProgress(now);
    }
    if (this.#restunAt <= now) {
      const { reason } = this.#scheduleRestun(NO_TIMER, "");
      if (reason !== "periodic" || this.#isBlind() || this.#isActive(now)) this.#restun(reason, now);
    }
    this.#relays.handleTimeout(now);
  }

  // ---- configuration ----

  /** Both 32 bytes. A new disco key makes all learnt paths void. */
  setKeys(keys: { nodeKey: Uint8Array; discoPrivate: Uint8Array }, now: number): void {
    this.#nodeKey = keys.nodeKey.slice();
    if (this.#discoPrivate && constantTimeEqual(this.#discoPrivate, keys.discoPrivate)) return;
    this.#discoPrivate = keys.discoPrivate.slice();
    this.#discoPublic = x25519Public(keys.discoPrivate).slice();
    this.#shared.clear();
    for (const peer of this.#peers.values()) peer.reset(now);
    this.#restun("keys", now);
  }

  /** This node's disco key for MapRequest.DiscoKey: 32 bytes, zeros before `setKeys`. */
  get discoKey(): Uint8Array {
    return this.#discoPublic;
  }

  /** The whole map, or HomeParams alone when Regions is absent. Connections of changed regions are closed. */
  setDerpMap(map: DERPMap, now: number): void {
    const old = this.#derpMap;
    const regions = map.Regions ? soundRegions(map.Regions) : (old.Regions ?? {});
    const homeParams = map.HomeParams ?? old.HomeParams;
    this.#derpMap = homeParams ? { Regions: regions, HomeParams: homeParams } : { Regions: regions };
    this.#hasDerpMap = true;
    for (const id of this.#relays.regions) {
      if (JSON.stringify(old.Regions?.[String(id)]) === JSON.stringify(regions[String(id)])) continue;
      this.#relays.drop(id);
      for (const peer of this.#peers.values()) if (peer.heardRegion === id) peer.heardRegion = 0;
      if (id !== this.#relays.home) continue;
      if (this.#knowsRegion(id)) this.#relays.noteWrite(id, now);
      else this.#setHome(0, now);
    }
    for (const peer of this.#peers.values()) peer.refreshPath(now);
    // With one region there is nothing to measure first.
    if (measurableRegions(this.#derpMap, 0).length === 1) this.#fallBackHome(now);
    this.#needFull = true;
    this.#restun("DERP map", now);
  }

  /** The complete list: peers that are not in it are forgotten. */
  setPeers(peers: readonly PeerInfo[], now: number): void {
    const kept = new Set<string>();
    for (const peer of peers) {
      this.updatePeer(peer, now);
      kept.add(hex(peer.nodeKey));
    }
    for (const [text, peer] of this.#peers) if (!kept.has(text)) this.#remove(peer, text);
  }

  /** A new or changed peer. */
  updatePeer(info: PeerInfo, now: number): void {
    const text = hex(info.nodeKey);
    let peer = this.#peers.get(text);
    if (!peer) {
      peer = new Peer(info.nodeKey.slice(), text, this.#peerHost);
      this.#peers.set(text, peer);
    }
    peer.homeRegion = info.homeDerp;
    const disco = info.discoKey?.some((byte) => byte !== 0) ? hex(info.discoKey) : "";
    // First the addresses: a changed disco key leaves only those of the netmap.
    peer.setNetmapEndpoints(info.endpoints, now);
    if (disco !== peer.discoText) {
      this.#unlinkDisco(peer);
      if (disco !== "") this.#linkDisco(disco, peer);
      peer.setDiscoKey(disco === "" ? null : info.discoKey!.slice(), disco, now);
    }
    peer.refreshPath(now);
  }

  removePeer(nodeKey: Uint8Array): void {
    const text = hex(nodeKey);
    const peer = this.#peers.get(text);
    if (peer) this.#remove(peer, text);
  }

  /**
   * Addresses of the interfaces (without the tailnet device) and the ports of the UDP sockets. When an address is gone,
   * paths may have gone with it: they are confirmed anew while the relay helps. Other ports count as `networkChanged`.
   */
  setLocalAddresses(ips: readonly string[], port4: number, port6: number | undefined, now: number): void {
    const old = this.#local;
    // Link-local IPv6 comes and goes with every virtual interface.
    const usable = ips.filter((text) => {
      const ip = parseIP(text);
      return ip !== null && isUnicast(ip) && !isUnroutedLinkLocal(ip) && !isWithin(this.#tailnet, ip);
    });
    this.#local = { ips: usable, port4, ...(port6 === undefined ? {} : { port6 }) };
    const moved6 = old?.port6 !== undefined && port6 !== undefined && old.port6 !== port6;
    if (old && (old.port4 !== port4 || moved6)) {
      this.networkChanged(now);
    } else if (old?.ips.some((ip) => !usable.includes(ip))) {
      this.#forgetNetwork("an address is gone", now);
      for (const peer of this.#peers.values()) peer.doubt(now);
    } else if (!old || !sameSet(old.ips, usable)) {
      if (this.#endpointsAt !== NEVER) this.#updateEndpoints(now);
      this.#restun("addresses", now);
    }
  }

  /** Routes or interfaces changed: all that was learnt about the way out is void. Relays are the caller's to re-connect. */
  networkChanged(now: number): void {
    this.#forgetNetwork("network change", now);
    for (const peer of this.#peers.values()) peer.reset(now);
  }

  #forgetNetwork(reason: string, now: number): void {
    this.#remembered.clear();
    this.#history.clear();
    this.#endpointsAt = NEVER;
    this.#netcheck = null;
    this.#needFull = true;
    this.#restun(reason, now);
  }

  /** While control is away the home stays: nobody would learn of a new one. */
  setControlAlive(alive: boolean): void {
    this.#controlAlive = alive;
  }

  // ---- what comes in ----

  /** Disco or an answer of a STUN server; anything else is dropped in silence. */
  handleDatagram(from: AddrPort, data: Uint8Array, now: number): void {
    if (isDisco(data)) {
      this.#handleDisco(data, from, now);
      return;
    }
    if (!this.#netcheck || !isStun(data)) return;
    const response = parseStunResponse(data);
    if (!response || !this.#netcheck.handleStun(response, now)) return;
    if (isUnicast(response.ip)) this.#remembered.note(formatAddrPort(response.ip, response.port), now);
    this.#netcheckProgress(now);
  }

  /** A packet that the relay delivered. True: it was disco, the datapath has nothing to do with it. */
  handleRelayed(region: number, source: Uint8Array, data: Uint8Array, now: number): boolean {
    this.#relays.noteHeard(region, now);
    const peer = this.#peers.get(hex(source));
    if (peer && peer.heardRegion !== region) {
      peer.heardRegion = region;
      peer.refreshPath(now);
    }
    if (!isDisco(data)) return false;
    if (peer) this.#handleDisco(data, { region, peer }, now);
    return true;
  }

  /** The connection to the region is up, or it broke. */
  relayState(region: number, connected: boolean, now: number): void {
    this.#relays.setState(region, connected);
    for (const peer of this.#peers.values()) {
      if (!connected && peer.heardRegion === region) peer.heardRegion = 0;
      if (peer.heardRegion !== 0 || peer.homeRegion === region) peer.refreshPath(now);
    }
    if (!connected) this.#restunSoon("relay connection lost", now);
  }

  /** Any frame of the relay, a keep-alive too: the region is alive. */
  relayHeard(region: number, now: number): void {
    this.#relays.noteHeard(region, now);
  }

  /** The relay says that it does not have this peer (any more). */
  peerGone(region: number, nodeKey: Uint8Array, now: number): void {
    const peer = this.#peers.get(hex(nodeKey));
    if (peer?.heardRegion !== region) return;
    peer.heardRegion = 0;
    peer.refreshPath(now);
  }

  /** User data went to the peer; once a second is enough. */
  noteSend(nodeKey: Uint8Array, now: number): void {
    const peer = this.#peers.get(hex(nodeKey));
    if (!peer) return;
    this.#lastSend = now;
    if (this.#restunAt === NO_TIMER && !this.#netcheck) this.#resumeRestun(now);
    peer.noteSend(now);
    const region = peer.path.region;
    if (region) this.#relays.noteWrite(region, now);
  }

  /** The datapath handed over a message for the relay: its connection is wanted, even for handshakes and keepalives. */
  noteRelaySend(region: number, now: number): void {
    if (this.#knowsRegion(region)) this.#relays.noteWrite(region, now);
  }

  /** The kernel refused to send to this address: unreachable, or no such family. */
  sendFailed(to: AddrPort, now: number): void {
    if (this.#netcheck) {
      this.#netcheck.handleSendFailed(to, now);
      this.#netcheckProgress(now);
    }
    for (const peer of this.#pingedAt(to)) peer.handleSendFailed(to, now);
  }

  /** DNS answered `resolve`; an empty list when it failed. */
  resolved(host: string, ips: readonly string[], now: number): void {
    const known = this.#hosts.get(host);
    if (!known) return;
    if (ips.length > 0 || known.ips === undefined) known.ips = ips.slice(0, 16);
    if (!this.#netcheck) return;
    this.#netcheck.handleResolved(now);
    this.#netcheckProgress(now);
  }

  /** The HTTPS probe of a region took `ms`, or failed (null). */
  httpProbeResult(region: number, ms: number | null, now: number): void {
    if (!this.#netcheck) return;
    this.#netcheck.httpProbeResult(region, ms, now);
    this.#netcheckProgress(now);
  }

  /**
   * A CLI ping: over the relay unless a direct path is trusted, and over UDP. The first answer, or the failure after 5 s,
   * comes as one `pong` action with this id.
   */
  ping(nodeKey: Uint8Array, id: number, now: number): void {
    const peer = this.#peers.get(hex(nodeKey));
    const fail = (error: string) => this.#actions.push({ type: "pong", id, peer: nodeKey, ok: false, error });
    if (!peer) return void fail("no such peer in the netmap");
    if (!peer.discoKey) return void fail("the peer has published no disco key");
    if (!this.#discoPrivate) return void fail("this node has no keys yet");
    if (this.#cliPings.size >= MAX_CLI_PINGS) return void fail(`${MAX_CLI_PINGS} pings are under way already`);
    const cli: CliPing = { id, peer, outstanding: 0 };
    this.noteSend(nodeKey, now);
    for (const to of peer.pingTargets(now)) {
      if (this.#sendPing(peer, to, now, cli)) peer.notePinged(to, now);
    }
    const region = peer.isTrusted(now) ? 0 : this.#relayRegion(peer);
    if (region !== 0) this.#sendPing(peer, region, now, cli);
    if (cli.outstanding === 0) return void fail("no way to the peer: it has neither an address nor a relay");
    this.#cliPings.add(cli);
  }

  // ---- what others show ----

  get home(): number {
    return this.#relays.home;
  }

  get endpoints(): readonly AddrPort[] {
    return this.#endpoints.endpoints;
  }

  /** The last finished netcheck. */
  get report(): NetcheckReport | null {
    return this.#history.last;
  }

  /** Null: no such peer. */
  peerStatus(nodeKey: Uint8Array, now: number): PeerStatus | null {
    const peer = this.#peers.get(hex(nodeKey));
    if (!peer) return null;
    const best = peer.isTrusted(now) ? peer.best : null;
    return {
      address: best?.address ?? null,
      latency: best?.latency ?? null,
      region: this.#relayRegion(peer),
      active: peer.isActive(now),
    };
  }

  /** A full netcheck now (CLI). Its report is in `report` when `netcheckRunning` is false again. */
  startNetcheck(now: number): void {
    this.#needFull = true;
    this.#restun("asked for", now);
  }

  get netcheckRunning(): boolean {
    return this.#netcheck !== null;
  }

  // ---- disco ----

  #handleDisco(data: Uint8Array, from: AddrPort | { region: number; peer: Peer }, now: number): void {
    const text = hex(discoSender(data));
    const peers = this.#byDisco.get(text);
    if (!peers) return;
    const shared = this.#sharedKey(text, discoSender(data));
    const message = shared && openDisco(shared, data);
    if (!message) return;
    if (typeof from === "string") this.#handleDirect(message, from, peers, now);
    else if (from.peer.discoText === text) this.#handleOverRelay(message, from.region, from.peer, now);
  }

  #handleDirect(message: DiscoMessage, from: AddrPort, peers: Set<Peer>, now: number): void {
    if (message.type === "ping") {
      // Several nodes may share a disco key (profiles on one machine): the address is a candidate for each of them.
      const [first] = peers;
      const named = message.nodeKey ? this.#peers.get(hex(message.nodeKey)) : undefined;
      const sender = named && peers.has(named) ? named : first!;
      const txid = txidText(message.txid);
      let duplicate = false;
      for (const peer of peers) {
        const seen = peer.handlePing(from, txid, now);
        if (peer === sender) duplicate = seen;
      }
      if (!duplicate) this.#sendUDP(sender, from, encodePong({ txid: message.txid, source: from }));
    } else if (message.type === "pong") {
      this.#handlePong(message.txid, peers, null, now);
    }
  }

  #handleOverRelay(message: DiscoMessage, region: number, peer: Peer, now: number): void {
    if (message.type === "ping") {
      this.#sendRelay(peer, region, encodePong({ txid: message.txid, source: relayAddress(region) }), now);
    } else if (message.type === "pong") {
      this.#handlePong(message.txid, new Set([peer]), region, now);
    } else if (message.type === "callMeMaybe") {
      peer.handleCallMeMaybe(message.addresses, now);
    }
  }

  /** `region` null: it came over UDP. A pong confirms a path only when it took the same kind of way as its ping. */
  #handlePong(id: Uint8Array, peers: Set<Peer>, region: number | null, now: number): void {
    const txid = txidText(id);
    const ping = this.#pings.get(txid);
    if (!ping || !peers.has(ping.peer) || (typeof ping.to === "number") !== (region !== null)) return;
    this.#forgetPing(txid, ping);
    const latency = now - ping.sentAt;
    const { peer, to, cli } = ping;
    if (cli && this.#cliPings.delete(cli)) {
      const via = typeof to === "number" ? { region: to } : { udp: to };
      this.#actions.push({ type: "pong", id: cli.id, peer: peer.nodeKey, ok: true, latency, via });
    }
    if (typeof to === "string" && ping.epoch === peer.epoch) peer.handlePong(to, latency, now);
  }

  #pingTimedOut(txid: string, ping: PendingPing, now: number): void {
    this.#forgetPing(txid, ping);
    const { peer, to, cli } = ping;
    if (cli && cli.outstanding === 0 && this.#cliPings.delete(cli)) {
      const error = `no answer within ${PING_TIMEOUT_MS / 1000} seconds`;
      this.#actions.push({ type: "pong", id: cli.id, peer: peer.nodeKey, ok: false, error });
    }
    const current = this.#peers.get(peer.text) === peer && ping.epoch === peer.epoch;
    if (current && typeof to === "string") peer.handlePingTimeout(to, now);
  }

  #forgetPing(txid: string, ping: PendingPing): void {
    this.#pings.delete(txid);
    ping.peer.outstanding--;
    if (ping.cli) ping.cli.outstanding--;
  }

  /** To an address, or over a region. */
  #sendPing(peer: Peer, to: AddrPort | number, now: number, cli: CliPing | null): boolean {
    if (typeof to === "string" && to.startsWith("[") && this.#local?.port6 === undefined) return false;
    const txid = this.#random(DISCO_TXID_LENGTH);
    const message = encodePing({ txid, nodeKey: this.#nodeKey, padding: 0 });
    const sent = typeof to === "number" ? this.#sendRelay(peer, to, message, now) : this.#sendUDP(peer, to, message);
    if (!sent) return false;
    this.#pings.set(txidText(txid), { peer, epoch: peer.epoch, to, sentAt: now, cli });
    peer.outstanding++;
    if (cli) cli.outstanding++;
    return true;
  }

  #sendUDP(peer: Peer, to: AddrPort, message: Uint8Array): boolean {
    const data = this.#seal(peer, message);
    if (data) this.#actions.push({ type: "udp", to, data });
    return data !== null;
  }

  #sendRelay(peer: Peer, region: number, message: Uint8Array, now: number): boolean {
    const data = this.#seal(peer, message);
    if (!data) return false;
    this.#relays.noteWrite(region, now);
    this.#actions.push({ type: "relay", region, to: peer.nodeKey, data });
    return true;
  }

  #seal(peer: Peer, message: Uint8Array): Uint8Array | null {
    const shared = peer.discoKey && this.#sharedKey(peer.discoText, peer.discoKey);
    return shared ? sealDisco(shared, this.#discoPublic, this.#random(DISCO_NONCE_LENGTH), message) : null;
  }

  #sharedKey(text: string, key: Uint8Array): Uint8Array | null {
    const known = this.#shared.get(text);
    if (known || !this.#discoPrivate) return known ?? null;
    const shared = boxBeforeNM(this.#discoPrivate, key);
    if (shared) this.#shared.set(text, shared);
    return shared;
  }

  #linkDisco(text: string, peer: Peer): void {
    const peers = this.#byDisco.get(text);
    if (peers) peers.add(peer);
    else this.#byDisco.set(text, new Set([peer]));
  }

  #unlinkDisco(peer: Peer): void {
    const peers = this.#byDisco.get(peer.discoText);
    if (!peers) return;
    peers.delete(peer);
    if (peers.size > 0) return;
    this.#byDisco.delete(peer.discoText);
    this.#shared.delete(peer.discoText);
  }

  #remove(peer: Peer, text: string): void {
    this.#peers.delete(text);
    this.#unlinkDisco(peer);
    this.#timers.delete(peer);
    this.#callMeMaybeLater.delete(peer);
  }

  /** The peers that have a ping under way to this address. */
  #pingedAt(to: AddrPort): Set<Peer> {
    const peers = new Set<Peer>();
    for (const ping of this.#pings.values()) if (ping.to === to) peers.add(ping.peer);
    return peers;
  }

  readonly #peerHost = {
    sendPing: (peer: Peer, to: AddrPort, now: number): boolean => this.#sendPing(peer, to, now, null),
    relayRegion: (peer: Peer): number => this.#relayRegion(peer),
    setTimer: (peer: Peer, at: number, reason: string): void => this.#timers.set(peer, at, reason),
    callMeMaybe: (peer: Peer, now: number): void => {
      if (now - this.#endpointsAt <= FRESH_ENDPOINTS_MS) {
        this.#sendCallMeMaybe(peer, now);
        return;
      }
      this.#callMeMaybeLater.add(peer);
      this.#restun("CallMeMaybe needs fresh endpoints", now);
    },
    pathChanged: (peer: Peer, path: PathToPeer): void => {
      this.#actions.push({ type: "path", peer: peer.nodeKey, path });
      this.#log("debug", `peer ${peer.text.slice(0, 8)}: ${describePath(path)}`);
    },
    candidate: (text: AddrPort): AddrPort | null => {
      const address = parseAddrPort(text);
      if (!address || address.port === 0 || !isUnicast(address.ip) || isUnroutedLinkLocal(address.ip)) return null;
      if (isWithin(this.#tailnet, address.ip)) return null;
      return formatAddrPort(address.ip, address.port);
    },
  };

  #sendCallMeMaybe(peer: Peer, now: number): void {
    const region = this.#relayRegion(peer);
    if (region !== 0) this.#sendRelay(peer, region, encodeCallMeMaybe(this.#endpoints.endpoints), now);
  }

  // ---- relays ----

  /** The home of the peer; while that is not connected, a connected region over which the peer was heard. */
  #relayRegion(peer: Peer): number {
    const home = this.#knowsRegion(peer.homeRegion) ? peer.homeRegion : 0;
    if (home !== 0 && this.#relays.isConnected(home)) return home;
    if (peer.heardRegion !== 0 && this.#relays.isConnected(peer.heardRegion)) return peer.heardRegion;
    return home;
  }

  #knowsRegion(region: number): boolean {
    return region > 0 && Boolean(this.#derpMap.Regions?.[String(region)]);
  }

  #setHome(region: number, now: number): void {
    if (region === this.#relays.home) return;
    this.#log("info", region === 0 ? "no home relay" : `home relay is region ${region}`);
    this.#relays.setHome(region, now);
    this.#actions.push({ type: "home", region });
    this.#publishNetInfo();
  }

  /** Nothing could be measured: keep the home, else take the region that chance gave this process. */
  #fallBackHome(now: number): void {
    if (this.#relays.home !== 0) return;
    const regions = measurableRegions(this.#derpMap, 0);
    const region = regions[Math.floor(this.#fallback * regions.length)];
    if (region) this.#setHome(region.RegionID, now);
    else if (!this.#warnedHomeless) this.#log("warn", "the DERP map has no region that can be this node's home relay");
    this.#warnedHomeless = !region;
  }

  // ---- netcheck and own endpoints ----

  #isActive(now: number): boolean {
    return now - this.#lastSend <= SESSION_ACTIVE_MS;
  }

  #restun(reason: string, now: number): void {
    if (!this.#discoPrivate || !this.#local || !this.#hasDerpMap) return;
    if (this.#netcheck) {
      if (this.#needFull) this.#netcheckAgain = "full";
      else if (this.#netcheckAgain === "no") this.#netcheckAgain = "incremental";
      return;
    }
    this.#log("debug", `netcheck: ${reason}`);
    this.#scheduleRestun(NO_TIMER, "");
    const last = this.#history.last;
    const full = this.#needFull || now - this.#lastFull >= FULL_NETCHECK_MS;
    this.#needFull = false;
    this.#silenceNoted = false;
    if (full) this.#lastFull = now;
    this.#resolveHosts(now);
    const { has4, has6 } = this.#families();
    const home = this.#relays.home;
    this.#netcheck = new Netcheck(
      {
        regions: measurableRegions(this.#derpMap, home),
        has4,
        has6,
        home,
        last: full ? null : last,
        random: this.#random,
        resolve: (host) => this.#hosts.get(host)?.ips,
        emit: (action) => this.#actions.push(action),
      },
      now,
    );
    this.#netcheckProgress(now);
  }

  /** Returns what was scheduled before. */
  #scheduleRestun(at: number, reason: string): { reason: string } {
    const before = { reason: this.#restunReason };
    this.#restunAt = at;
    this.#restunReason = reason;
    return before;
  }

  #restunSoon(reason: string, now: number): void {
    const at = now + RESTUN_SPACING_MS;
    if (at < this.#restunAt) this.#scheduleRestun(at, reason);
  }

  #restunPeriodically(from: number): void {
    this.#scheduleRestun(from + RESTUN_MIN_MS + RESTUN_SPREAD_MS * this.#randomFraction(), "periodic");
  }

  /** Activity after a pause, in which no ReSTUN ran. */
  #resumeRestun(now: number): void {
    const last = this.#history.last?.at ?? NEVER;
    if (now - last > RESTUN_MIN_MS + RESTUN_SPREAD_MS) this.#restun("activity after a pause", now);
    else this.#restunPeriodically(last);
  }

  #netcheckProgress(now: number): void {
    const netcheck = this.#netcheck;
    if (!netcheck) return;
    if (netcheck.silent && !this.#silenceNoted) {
      // UDP seems blocked: be reachable by relay, and at the addresses that are known, before the check is through.
      this.#silenceNoted = true;
      this.#fallBackHome(now);
      this.#updateEndpoints(now);
    }
    const report = netcheck.report();
    if (!report) return;
    this.#netcheck = null;
    this.#history.add(report, now);
    this.#applyReport(report, now);
    const again = this.#netcheckAgain;
    this.#netcheckAgain = "no";
    if (again === "full") this.#needFull = true;
    if (again !== "no") this.#restunSoon("asked for while one ran", now);
    else if (this.#isActive(now) || this.#isBlind()) this.#restunPeriodically(now);
  }

  /** There are relays, but the last check reached none of them. */
  #isBlind(): boolean {
    return this.#history.last?.latency.size === 0 && measurableRegions(this.#derpMap, this.#relays.home).length > 0;
  }

  #applyReport(report: NetcheckReport, now: number): void {
    const home = this.#relays.home;
    const homeHeardAt = this.#relays.heardAt(home);
    const choice = chooseHome({ history: this.#history, report, map: this.#derpMap, home, homeHeardAt, now });
    if (choice === 0) this.#fallBackHome(now);
    else if (home === 0 || this.#controlAlive) this.#setHome(choice, now);
    this.#updateEndpoints(now);
    this.#publishNetInfo();
  }

  #updateEndpoints(now: number): void {
    if (!this.#local) return;
    this.#endpoints = buildEndpoints({
      report: this.#history.last,
      remembered: this.#remembered.list(now),
      local: this.#local,
      fixedPort: this.#fixedPort,
      exclude: this.#tailnet,
    });
    this.#endpointsAt = now;
    const published = [...this.#endpoints.endpoints].sort().join(" ");
    if (published !== this.#publishedEndpoints) {
      this.#publishedEndpoints = published;
      const { endpoints, types } = this.#endpoints;
      this.#actions.push({ type: "endpoints", endpoints: [...endpoints], types: [...types] });
    }
    const waiting = [...this.#callMeMaybeLater];
    this.#callMeMaybeLater.clear();
    for (const peer of waiting) this.#sendCallMeMaybe(peer, now);
  }

  #publishNetInfo(): void {
    const report = this.#history.last;
    const info: NetInfo = {
      WorkingUDP: report?.udp ?? false,
      WorkingIPv6: report?.ipv6 ?? false,
      OSHasIPv6: report?.osHasIPv6 ?? this.#families().has6,
      HavePortMap: false,
      PreferredDERP: this.#relays.home,
      ...(report?.mappingVaries == null ? {} : { MappingVariesByDestIP: report.mappingVaries }),
    };
    // Latencies differ in every report: they alone are no news.
    const published = JSON.stringify(info);
    if (published === this.#publishedNetInfo) return;
    this.#publishedNetInfo = published;
    const latency: Record<string, number> = {};
    for (const [region, ms] of report?.latency4 ?? []) latency[`${region}-v4`] = ms / 1000;
    for (const [region, ms] of report?.latency6 ?? []) latency[`${region}-v6`] = ms / 1000;
    this.#actions.push({ type: "netinfo", netInfo: { ...info, DERPLatency: latency } });
  }

  /** Loopback counts when there is nothing else; without any address IPv4 is tried all the same. */
  #families(): { has4: boolean; has6: boolean } {
    const all = (this.#local?.ips ?? []).map((text) => parseIP(text)!);
    const far = all.filter((ip) => !isLoopback(ip));
    const ips = far.length > 0 ? far : all;
    return {
      has4: ips.length === 0 || ips.some((ip) => ip.length === 4),
      has6: this.#local?.port6 !== undefined && ips.some((ip) => ip.length === 16),
    };
  }

  /** Asks for the addresses of the relays' host names that are unknown or old. */
  #resolveHosts(now: number): void {
    const wanted = new Set<string>();
    for (const region of derpRegions(this.#derpMap)) for (const host of hostNames(region)) wanted.add(host);
    for (const host of this.#hosts.keys()) if (!wanted.has(host)) this.#hosts.delete(host);
    for (const host of wanted) {
      const known = this.#hosts.get(host);
      if (known && now - known.askedAt < RESOLVE_AGAIN_MS && known.ips?.length !== 0) continue;
      this.#hosts.set(host, { ips: known?.ips?.length ? known.ips : undefined, askedAt: now });
      this.#actions.push({ type: "resolve", host });
    }
  }

  #randomFraction(): number {
    const bytes = this.#random(4);
    return new DataView(bytes.buffer, bytes.byteOffset, 4).getUint32(0) / 2 ** 32;
  }

  #log(level: "debug" | "info" | "warn", message: string): void {
    this.#actions.push({ type: "log", level, message });
  }
}

/** Without the regions and nodes that are null or nameless. */
function soundRegions(regions: Record<string, DERPRegion | null>): Record<string, DERPRegion> {
  const sound: Record<string, DERPRegion> = {};
  for (const [id, region] of Object.entries(regions)) {
    if (!region) continue;
    sound[id] = { ...region, Nodes: (region.Nodes ?? []).filter((node) => typeof node?.HostName === "string") };
  }
  return sound;
}

function hostNames(region: DERPRegion): string[] {
  const names: string[] = [];
  for (const node of region.Nodes ?? []) {
    for (const family of [4, 6] as const) {
      const target = probeTarget(node, family);
      if (target && "host" in target) names.push(target.host);
    }
  }
  return names;
}

/** How a relay path looks in a Pong. */
function relayAddress(region: number): AddrPort {
  return `127.3.3.40:${region & 0xffff}`;
}

function describePath(path: PathToPeer): string {
  const relay = path.region ? `relay ${path.region}` : "";
  if (path.udp) return relay ? `${path.udp} unconfirmed, and ${relay}` : `direct ${path.udp}`;
  return relay || "no path";
}

function sameSet(a: readonly string[], b: readonly string[]): boolean {
  return a.length === b.length && a.every((item) => b.includes(item));
}

function txidText(txid: Uint8Array): string {
  return String.fromCharCode(...txid);
}
