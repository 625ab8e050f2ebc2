// The part of the node that carries traffic: the datapath, the choice of paths, the relay connections and the router, wired
// to each other. The daemon tells it who the node and its peers are; it tells the daemon what the control server should know.
//
//   UDP     datapath -> disco and STUN -> PathManager -> datapath.sendDatagram
//   relay   datapath.onRelay -> DerpClient;  DerpClient -> disco -> PathManager, else -> datapath.relayIn
//   netmap  filter first, then keys and peers, then paths and routes: nothing passes before there is a rule for it
import { lookup } from "node:dns/promises";
import { Netlink, NetlinkMonitor } from "../../ffi/netlink.ts";
import { hex, randomBytes } from "../crypto/keys.ts";
import type { Datapath, DeviceDump, FilterConfig, PeerPath, PeerUpdate } from "../datapath/api.ts";
import { startDatapath } from "../datapath/datapath.ts";
import { DerpClient } from "../net/derp-client.ts";
import { requestPlain } from "../net/ts2021-client.ts";
import { type PathAction, PathManager, type PeerStatus, type PingResult } from "../paths/manager.ts";
import type { NetcheckReport } from "../paths/netcheck.ts";
import type { DERPMap, DERPRegion, NetInfo, PrefixText } from "../wire/tailcfg.ts";
import { FWMARK_BYPASS, Router, TUNNEL_MTU } from "./router.ts";
import type { PeerView } from "./view.ts";

/** Changes of interfaces come in bursts. */
const INTERFACE_SETTLE_MS = 200;
const HTTP_PROBE_TIMEOUT = 3000;
const MAX_PROBE_ANSWER = 64 * 1024;

export interface EngineOptions {
  tun: string;
  /** UDP port, 0 lets the kernel choose. */
  port: number;
  discoPrivate: Uint8Array;
}

export interface EngineEvents {
  onEndpoints(endpoints: string[], types: number[]): void;
  onNetInfo(netInfo: NetInfo): void;
  /** A relay connected or was lost, or a session came up: the backend state may be another now. */
  onLiveness(): void;
  /** A relay connected, or the host's addresses changed: what could not be reached may be reachable now. */
  onWayOut(): void;
  /** The datapath ended by itself. */
  onFatal(reason: string): void;
  log(level: "info" | "debug", message: string): void;
}

/** Everything that the netmap and the prefs decide. */
export interface EngineConfig {
  nodePrivate: Uint8Array;
  nodePublic: Uint8Array;
  addresses: PrefixText[];
  peers: PeerView[];
  filter: FilterConfig;
  derpMap: DERPMap;
  /** Origin of the control server: a relay there is spoken to in its scheme. */
  controlUrl: URL;
}

/** What the datapath was told of a peer. */
export interface AppliedPeer {
  key: Uint8Array;
  allowedIPs: readonly string[];
  /** In hex, "" for none. */
  disco: string;
}

/**
 * The WireGuard sections that lead from one set of peers to another, by node key in hex. A disco key is made anew at each
 * start of a node: a peer that has another one has restarted and knows nothing of its sessions, so it is taken out and put
 * in again (`renewed`) and the next packet begins a handshake, instead of being lost until WireGuard's timers notice.
 */
export function peerUpdates(
  before: ReadonlyMap<string, AppliedPeer>,
  after: ReadonlyMap<string, AppliedPeer>,
): { updates: PeerUpdate[]; renewed: { key: Uint8Array; text: string }[] } {
  const removals: PeerUpdate[] = [];
  const additions: PeerUpdate[] = [];
  const renewed: { key: Uint8Array; text: string }[] = [];
  for (const [text, { key }] of before) if (!after.has(text)) removals.push({ publicKey: key, remove: true });
  for (const [text, { key, allowedIPs, disco }] of after) {
    const old = before.get(text);
    const restarted = old !== undefined && old.disco !== "" && disco !== "" && old.disco !== disco;
    if (restarted) {
      removals.push({ publicKey: key, remove: true });
      renewed.push({ key, text });
    } else if (old && old.allowedIPs.join() === allowedIPs.join()) {
      continue;
    }
    additions.push({ publicKey: key, replaceAllowedIPs: true, allowedIPs: [...allowedIPs] });
  }
  // Removals first: an address may move from a peer that goes to one that comes.
  return { updates: [...removals, ...additions], renewed };
}

export class Engine {
  private readonly paths: PathManager;
  private readonly router: Router;
  private readonly monitor: NetlinkMonitor;
  private readonly derps = new Map<number, DerpClient>();
  private config: EngineConfig | null = null;
  /** Node key in hex -> what the datapath has for it. */
  private peers = new Map<string, AppliedPeer>();
  /** Node key in hex -> the path that PathManager chose last. */
  private readonly chosenPaths = new Map<string, PeerPath>();
  private appliedFilter = "";
  /** As JSON; nothing is told of a map without regions before there was one with some. */
  private appliedDerpMap = JSON.stringify({ Regions: {} });
  private timer: ReturnType<typeof setTimeout> | undefined;
  private timerAt = Number.POSITIVE_INFINITY;
  private settle: ReturnType<typeof setTimeout> | undefined;
  private pumping = false;
  private knownAddresses = "";
  /** Node key in hex -> milliseconds from the initiation to the latest session. */
  private readonly handshakeMs = new Map<string, number>();
  private handshakes = 0;
  private pingId = 0;
  private readonly pings = new Map<number, (result: PingResult) => void>();
  private closed = false;

  /** Makes the device. Throws with one sentence, and leaves nothing behind then. */
  static async start(options: EngineOptions, events: EngineEvents): Promise<Engine> {
    let engine: Engine | null = null;
    const datapath = await startDatapath(
      { tun: options.tun, mtu: TUNNEL_MTU, port: options.port, fwmark: FWMARK_BYPASS, mode: "mesh" },
      {
        onDatagram: (from, data) => engine?.input((paths, now) => paths.handleDatagram(from, data, now)),
        onRelay: (peer, data) => engine?.sendByRelay(peer, data),
        onActivity: (peer) => engine?.input((paths, now) => paths.noteSend(peer, now)),
        onHandshake: (peer, ms, initiator) => engine?.noteHandshake(peer, ms, initiator),
        onFatal: (reason) => events.onFatal(reason),
      },
    );
    try {
      engine = new Engine(datapath, options, events);
      return engine;
    } catch (error) {
      await datapath.close();
      throw error;
    }
  }

  private constructor(
    private readonly datapath: Datapath,
    private readonly options: EngineOptions,
    private readonly events: EngineEvents,
  ) {
    this.paths = new PathManager({ random: randomBytes, fixedPort: options.port !== 0 });
    this.router = new Router(datapath.tunIndex, (message) => events.log("info", message));
    this.monitor = new NetlinkMonitor((event) => {
      if ("value" in event && "index" in event.value && event.value.index === datapath.tunIndex) return;
      if (event.kind === "rule" && event.change === "new") return;
      clearTimeout(this.settle);
      this.settle = setTimeout(() => this.hostChanged(), INTERFACE_SETTLE_MS);
    });
    this.readInterfaces();
  }

  get tunName(): string {
    return this.datapath.tunName;
  }

  get port(): number {
    return this.datapath.port();
  }

  /** A relay is connected, or a peer has answered a handshake. */
  get live(): boolean {
    return this.handshakes > 0 || [...this.derps.values()].some((derp) => derp.state.connected);
  }

  get home(): number {
    return this.paths.home;
  }

  get endpoints(): readonly string[] {
    return this.paths.endpoints;
  }

  /** Makes this the configuration; calls must not overlap. */
  async configure(config: EngineConfig): Promise<void> {
    const before = this.config;
    this.config = config;
    const filter = JSON.stringify(config.filter);
    if (filter !== this.appliedFilter) {
      await this.datapath.setFilter(config.filter);
      this.appliedFilter = filter;
    }
    if (!before || hex(before.nodePrivate) !== hex(config.nodePrivate)) {
      await this.datapath.configure({ privateKey: config.nodePrivate });
      this.replaceRelays();
      this.input((paths, now) =>
        paths.setKeys({ nodeKey: config.nodePublic, discoPrivate: this.options.discoPrivate }, now),
      );
    }
    await this.configurePeers(config.peers);
    const derpMap = JSON.stringify(config.derpMap);
    const peers = config.peers.map(({ nodeKey, discoKey, endpoints, homeRegion }) => ({
      nodeKey,
      discoKey,
      endpoints,
      homeDerp: homeRegion,
    }));
    this.input((paths, now) => {
      if (derpMap !== this.appliedDerpMap) paths.setDerpMap(config.derpMap, now);
      paths.setPeers(peers, now);
    });
    this.appliedDerpMap = derpMap;
    this.router.configure({ addresses: config.addresses, routes: config.peers.flatMap((peer) => peer.allowedIPs) });
  }

  /** The present configuration without anything that carries traffic; null when there never was one. */
  idleConfig(): EngineConfig | null {
    return (
      this.config && {
        ...this.config,
        addresses: [],
        peers: [],
        filter: { rules: [], local: [] },
        derpMap: { Regions: {} },
      }
    );
  }

  setControlAlive(alive: boolean): void {
    this.paths.setControlAlive(alive);
  }

  peerStatus(nodeKey: Uint8Array): PeerStatus | null {
    return this.paths.peerStatus(nodeKey, performance.now());
  }

  /** Null before the first session with this peer. */
  handshakeTime(nodeKey: Uint8Array): number | null {
    return this.handshakeMs.get(hex(nodeKey)) ?? null;
  }

  dump(): Promise<DeviceDump> {
    return this.datapath.dump();
  }

  /** A disco ping; resolves within a few seconds. */
  ping(nodeKey: Uint8Array): Promise<PingResult> {
    const id = ++this.pingId;
    return new Promise((resolve) => {
      this.pings.set(id, resolve);
      this.input((paths, now) => paths.ping(nodeKey, id, now));
    });
  }

  /** A full netcheck; null when it did not finish in time. */
  async netcheck(timeout: number): Promise<NetcheckReport | null> {
    const began = performance.now();
    this.input((paths, now) => paths.startNetcheck(now));
    const running = () => this.paths.netcheckRunning || (this.paths.report?.at ?? 0) < began;
    while (running() && performance.now() - began < timeout && !this.closed) await Bun.sleep(50);
    return running() ? null : this.paths.report;
  }

  /** Removes routes, rules, addresses and the device. */
  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    clearTimeout(this.timer);
    clearTimeout(this.settle);
    this.monitor.close();
    for (const derp of this.derps.values()) derp.close();
    this.derps.clear();
    this.router.close();
    await this.datapath.close();
  }

  private async configurePeers(views: PeerView[]): Promise<void> {
    const next = new Map<string, AppliedPeer>();
    for (const { nodeKey, discoKey, allowedIPs } of views)
      next.set(hex(nodeKey), { key: nodeKey, allowedIPs, disco: discoKey ? hex(discoKey) : "" });
    const { updates, renewed } = peerUpdates(this.peers, next);
    if (updates.length > 0) await this.datapath.configure({ peers: updates });
    this.peers = next;
    for (const text of this.chosenPaths.keys()) if (!next.has(text)) this.chosenPaths.delete(text);
    for (const text of this.handshakeMs.keys()) if (!next.has(text)) this.handshakeMs.delete(text);
    for (const { key, text } of renewed) {
      const path = this.chosenPaths.get(text);
      if (path) this.datapath.setPath(key, path);
    }
  }

  // ---- the loop around PathManager ----

  /** Feeds PathManager and carries out what it wants. */
  private input(feed: (paths: PathManager, now: number) => void): void {
    if (this.closed) return;
    feed(this.paths, performance.now());
    this.pump();
  }

  private pump(): void {
    // Carrying out an action may feed PathManager again: the loop below sees what comes of it.
    if (this.pumping) return;
    this.pumping = true;
    try {
      for (let actions = this.paths.drain(); actions.length > 0; actions = this.paths.drain())
        for (const action of actions) this.act(action);
    } finally {
      this.pumping = false;
    }
    this.arm();
  }

  /** Sees to it that `handleTimeout` runs in time. A timer that fires early does no harm, so a later one is not set anew. */
  private arm(): void {
    const next = this.paths.nextTimeout();
    if (!next || next.at >= this.timerAt) return;
    clearTimeout(this.timer);
    this.timerAt = next.at;
    const wait = Math.max(0, Math.ceil(next.at - performance.now()));
    this.timer = setTimeout(() => {
      this.timerAt = Number.POSITIVE_INFINITY;
      this.input((paths, now) => paths.handleTimeout(now));
    }, wait);
  }

  private act(action: PathAction): void {
    switch (action.type) {
      case "udp":
        if (!this.datapath.sendDatagram(action.to, action.data)) this.paths.sendFailed(action.to, performance.now());
        break;
      case "relay":
        this.derps.get(action.region)?.send(action.to, action.data);
        break;
      case "path": {
        const { udp, relay } = action.path;
        const path = { ...(udp ? { udp } : {}), ...(relay ? { relay } : {}) };
        this.chosenPaths.set(hex(action.peer), path);
        this.datapath.setPath(action.peer, path);
        break;
      }
      case "endpoints":
        this.events.onEndpoints(action.endpoints, action.types);
        break;
      case "home":
        for (const [region, derp] of this.derps) derp.notePreferred(region === action.region);
        break;
      case "netinfo":
        this.events.onNetInfo(action.netInfo);
        break;
      case "connect":
        this.connectRelay(action.region);
        break;
      case "disconnect":
        this.derps.get(action.region)?.close();
        this.derps.delete(action.region);
        break;
      case "resolve":
        void this.resolve(action.host);
        break;
      case "httpProbe":
        void this.httpProbe(action.region);
        break;
      case "pong":
        this.pings.get(action.id)?.(action);
        this.pings.delete(action.id);
        break;
      case "log":
        this.events.log(action.level === "debug" ? "debug" : "info", action.message);
        break;
    }
  }

  // ---- relays ----

  private region(id: number): DERPRegion | null {
    return this.config?.derpMap.Regions?.[String(id)] ?? null;
  }

  private connectRelay(id: number): void {
    const region = this.region(id);
    if (!region || !this.config || this.derps.has(id)) return;
    const derp: DerpClient = new DerpClient({
      region,
      insecureHttp: speaksPlainHttp(region, this.config.controlUrl),
      privateKey: this.config.nodePrivate,
      onPacket: (source, packet) => this.receiveFromRelay(id, source, packet),
      onPeerGone: (key) => this.input((paths, now) => paths.peerGone(id, key, now)),
      onState: ({ connected, lastError }) => {
        if (this.derps.get(id) !== derp) return;
        if (lastError) this.events.log("debug", `relay ${region.RegionCode || id}: ${lastError}`);
        this.input((paths, now) => paths.relayState(id, connected, now));
        this.events.onLiveness();
        if (connected) this.events.onWayOut();
      },
    });
    this.derps.set(id, derp);
    derp.notePreferred(this.paths.home === id);
  }

  /** After a change of the network: a connection that no longer answers is made anew at once. */
  private checkRelays(): void {
    for (const derp of this.derps.values()) if (derp.state.connected) derp.ping().catch(() => derp.reconnect());
  }

  /** The relays know a node by its key: a new key needs new connections. */
  private replaceRelays(): void {
    for (const [region, derp] of [...this.derps]) {
      derp.close();
      this.derps.delete(region);
      this.input((paths, now) => paths.relayState(region, false, now));
      this.connectRelay(region);
    }
  }

  private receiveFromRelay(region: number, source: Uint8Array, packet: Uint8Array): void {
    let isDisco = false;
    this.input((paths, now) => {
      isDisco = paths.handleRelayed(region, source, packet, now);
    });
    if (!isDisco) this.datapath.relayIn(source, packet);
  }

  private sendByRelay(peer: Uint8Array, data: Uint8Array): void {
    const region = this.paths.peerStatus(peer, performance.now())?.region ?? 0;
    if (region === 0) return;
    // Before the packet: this is what opens the connection when there is none.
    this.input((paths, now) => paths.noteRelaySend(region, now));
    this.derps.get(region)?.send(peer, data);
  }

  private noteHandshake(peer: Uint8Array, ms: number, initiator: boolean): void {
    this.handshakes++;
    this.handshakeMs.set(hex(peer), ms);
    const role = initiator ? "initiator" : "responder";
    this.events.log("debug", `session with ${hex(peer).slice(0, 8)} in ${ms.toFixed(1)} ms (${role})`);
    if (this.handshakes === 1) this.events.onLiveness();
  }

  private async resolve(host: string): Promise<void> {
    const found = await lookup(host, { all: true }).catch(() => []);
    const ips = found.map(({ address }) => address);
    this.input((paths, now) => paths.resolved(host, ips, now));
  }

  private async httpProbe(id: number): Promise<void> {
    const region = this.region(id);
    const node = region?.Nodes?.find(({ STUNOnly }) => !STUNOnly);
    let ms: number | null = null;
    if (region && node && this.config) {
      const plain = speaksPlainHttp(region, this.config.controlUrl);
      const port = node.DERPPort || (plain ? 80 : 443);
      const url = new URL(`${plain ? "http" : "https"}://${node.HostName}:${port}/derp/latency-check`);
      const began = performance.now();
      const signal = AbortSignal.timeout(HTTP_PROBE_TIMEOUT);
      const answered = await requestPlain(url, "GET", MAX_PROBE_ANSWER, HTTP_PROBE_TIMEOUT, signal).catch(() => null);
      if (answered) ms = performance.now() - began;
    }
    this.input((paths, now) => paths.httpProbeResult(id, ms, now));
  }

  // ---- the host's addresses ----

  private hostChanged(): void {
    if (this.closed) return;
    this.router.restoreRules();
    this.readInterfaces();
  }

  private readInterfaces(): void {
    if (this.closed) return;
    try {
      using netlink = new Netlink();
      const addresses = netlink.interfaceAddresses().filter((address) => address.index !== this.datapath.tunIndex);
      const usable = addresses.filter(({ up, tentative, deprecated }) => up && !tentative && !deprecated);
      const ips = [...new Set(usable.map(({ ip }) => ip))].sort();
      const port = this.datapath.port();
      const hasIPv6 = addresses.some(({ ip }) => ip.includes(":"));
      this.input((paths, now) => paths.setLocalAddresses(ips, port, hasIPv6 ? port : undefined, now));
      const text = ips.join();
      if (this.knownAddresses !== "" && text !== this.knownAddresses) {
        this.checkRelays();
        this.events.onWayOut();
      }
      this.knownAddresses = text;
    } catch (error) {
      this.events.log("info", `the interfaces cannot be read: ${(error as Error).message}`);
    }
  }
}

/**
 * A DERP map has no word for a relay without TLS. Behind a control server that has none itself, such a relay is the one on
 * the server's own port and whichever is marked InsecureForTests; TS_DEBUG_USE_DERP_HTTP=1 means all of them, as with the
 * official client.
 */
export function speaksPlainHttp(region: DERPRegion, controlUrl: URL): boolean {
  if (process.env.TS_DEBUG_USE_DERP_HTTP === "1") return true;
  if (controlUrl.protocol !== "http:") return false;
  const controlPort = Number(controlUrl.port || 80);
  const host = controlUrl.hostname.replace(/^\[|\]$/g, "");
  return (region.Nodes ?? []).some(
    ({ STUNOnly, HostName, DERPPort, InsecureForTests }) =>
      !STUNOnly && (InsecureForTests === true || (HostName === host && (DERPPort || 443) === controlPort)),
  );
}
