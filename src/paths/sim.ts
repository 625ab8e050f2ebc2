// A simulated internet for tests: hosts with a PathManager each, NATs, links with delay and loss, blocked UDP, relay
// regions with STUN, and a clock that only moves when `run` says so. Everything is deterministic for one seed.
import { hex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { isDisco } from "../wire/disco.ts";
import { type AddrPort, parseAddrPort } from "../wire/ip.ts";
import { encodeStunResponse, isStun, parseStunRequest } from "../wire/stun.ts";
import type { DERPMap, DERPNode } from "../wire/tailcfg.ts";
import { isPrivate } from "./address.ts";
import { type PathAction, PathManager, type PeerInfo, type PingResult } from "./manager.ts";
import type { PathToPeer } from "./peer.ts";

interface SimEvent {
  at: number;
  order: number;
  run: () => void;
}

/** Deterministic bytes (SplitMix32). */
export function seededRandom(seed: number): (n: number) => Uint8Array {
  let state = seed >>> 0;
  return (n) => {
    const out = new Uint8Array(n);
    for (let i = 0; i < n; i++) {
      state = (state + 0x9e3779b9) >>> 0;
      let z = state ^ (state >>> 16);
      z = Math.imul(z, 0x21f0aaad);
      z ^= z >>> 15;
      z = Math.imul(z, 0x735a2d97);
      out[i] = (z ^ (z >>> 15)) & 0xff;
    }
    return out;
  };
}

/** A NAT with one public address: endpoint-independent mapping, and only those may answer who were spoken to. */
export class SimNat {
  nextPort = 20_000;
  /** Inner "host|address" -> public port. */
  readonly ports = new Map<string, number>();
  readonly inner = new Map<number, { host: SimHost; address: AddrPort; allowed: Set<AddrPort> }>();

  constructor(readonly publicIP: string) {}
}

class SimRegion {
  up = true;
  /** Milliseconds one way, unless the pair says otherwise. */
  delay = 10;
  stun = true;
  readonly connected = new Set<SimHost>();
  /** Packets and bytes that it carried. */
  packets = 0;

  constructor(
    readonly id: number,
    readonly ips: string[],
    readonly node: DERPNode,
  ) {}
}

export interface HostOptions {
  ips: string[];
  port?: number;
  nat?: SimNat;
  /** Hosts with private addresses reach each other there only within one LAN. */
  lan?: string;
}

export class Sim {
  now = 0;
  /** Milliseconds one way between two addresses. */
  delay: (from: AddrPort, to: AddrPort) => number = () => 10;
  /** 0 to 1, of UDP datagrams. */
  loss = 0;
  /** Addresses that no datagram reaches or leaves. */
  readonly dead = new Set<AddrPort>();
  readonly random: (n: number) => Uint8Array;
  readonly hosts: SimHost[] = [];
  readonly regions = new Map<number, SimRegion>();
  readonly dns = new Map<string, string[]>();
  udpPackets = 0;
  readonly #bound = new Map<AddrPort, SimHost>();
  readonly #nats = new Map<string, SimNat>();
  #events: SimEvent[] = [];
  #order = 0;

  constructor(seed = 1) {
    this.random = seededRandom(seed);
  }

  chance(): number {
    const bytes = this.random(4);
    return new DataView(bytes.buffer).getUint32(0) / 2 ** 32;
  }

  addRegion(id: number, ips: string[], node: Partial<DERPNode> = {}): SimRegion {
    const region = new SimRegion(id, ips, {
      Name: `${id}a`,
      RegionID: id,
      HostName: `derp${id}.test`,
      IPv4: ips.find((ip) => !ip.includes(":")) ?? "none",
      IPv6: ips.find((ip) => ip.includes(":")) ?? "none",
      ...node,
    });
    this.regions.set(id, region);
    return region;
  }

  derpMap(): DERPMap {
    const map: DERPMap = { Regions: {} };
    for (const region of this.regions.values()) {
      map.Regions![String(region.id)] = { RegionID: region.id, RegionCode: `r${region.id}`, Nodes: [region.node] };
    }
    return map;
  }

  addHost(name: string, options: HostOptions): SimHost {
    const host = new SimHost(this, name, options);
    this.hosts.push(host);
    this.bind(host);
    if (options.nat) this.#nats.set(options.nat.publicIP, options.nat);
    return host;
  }

  /** Gives all hosts each other as peers, as control would; endpoints and home follow as they are published. */
  meet(...hosts: SimHost[]): void {
    for (const host of hosts) host.knows = hosts.filter((other) => other !== host);
    for (const host of hosts) host.setPeers();
  }

  bind(host: SimHost): void {
    for (const [address, bound] of this.#bound) if (bound === host) this.#bound.delete(address);
    for (const address of host.addresses()) this.#bound.set(scoped(address, host.options.lan), host);
  }

  at(delay: number, run: () => void): void {
    const event = { at: this.now + Math.max(0, delay), order: this.#order++, run };
    const heap = this.#events;
    let i = heap.push(event) - 1;
    while (i > 0 && before(event, heap[(i - 1) >> 1]!)) {
      heap[i] = heap[(i - 1) >> 1]!;
      i = (i - 1) >> 1;
    }
    heap[i] = event;
  }

  /** Lets `ms` pass. */
  run(ms: number): void {
    const end = this.now + ms;
    while (this.#events[0] && this.#events[0].at <= end) {
      const event = this.#next();
      this.now = event.at;
      event.run();
    }
    this.now = end;
  }

  /** Lets time pass until the condition holds; returns the milliseconds that it took. Throws after `limit`. */
  until(condition: () => boolean, limit: number): number {
    const start = this.now;
    while (!condition()) {
      if (this.now - start >= limit) throw new Error(`not within ${limit} ms: ${condition}`);
      this.run(1);
    }
    return this.now - start;
  }

  sendUDP(host: SimHost, to: AddrPort, data: Uint8Array): void {
    const from = host.sourceFor(to);
    if (!from) {
      host.manager.sendFailed(to, this.now);
      return;
    }
    if (host.udpBlocked || this.dead.has(to) || this.dead.has(from) || this.chance() < this.loss) return;
    this.udpPackets++;
    const { nat, lan } = host.options;
    let source = from;
    const local = isLocal(to);
    if (nat && !local) source = this.#translate(nat, host, from, to);
    const deliver = this.#receiver(to, source, lan, local);
    if (deliver) this.at(this.delay(source, to), () => deliver(data));
  }

  #translate(nat: SimNat, host: SimHost, from: AddrPort, to: AddrPort): AddrPort {
    const key = `${host.name}|${from}`;
    let port = nat.ports.get(key);
    if (port === undefined) {
      port = nat.nextPort++;
      nat.ports.set(key, port);
      nat.inner.set(port, { host, address: from, allowed: new Set() });
    }
    nat.inner.get(port)!.allowed.add(to);
    return `${nat.publicIP}:${port}`;
  }

  #receiver(
    to: AddrPort,
    source: AddrPort,
    lan: string | undefined,
    local: boolean,
  ): ((data: Uint8Array) => void) | null {
    const host = this.#bound.get(local ? scoped(to, lan) : to);
    if (host) return (data) => host.receiveUDP(source, data);
    const colon = to.lastIndexOf(":");
    const ip = to.slice(0, colon);
    const nat = this.#nats.get(ip);
    if (nat) {
      const mapping = nat.inner.get(Number(to.slice(colon + 1)));
      if (!mapping?.allowed.has(source)) return null;
      return (data) => mapping.host.receiveUDP(source, data);
    }
    const bare = ip.startsWith("[") ? ip.slice(1, -1) : ip;
    for (const region of this.regions.values()) {
      if (!region.up || !region.stun || !region.ips.includes(bare)) continue;
      return (data) => this.#answerStun(to, source, data);
    }
    return null;
  }

  #answerStun(server: AddrPort, client: AddrPort, data: Uint8Array): void {
    const txid = parseStunRequest(data);
    if (!txid) return;
    const { ip, port } = parseAddrPort(client)!;
    const deliver = this.#receiver(client, server, undefined, false);
    if (deliver) this.at(this.delay(server, client), () => deliver(encodeStunResponse(txid, ip, port)));
  }

  #next(): SimEvent {
    const heap = this.#events;
    const first = heap[0]!;
    const last = heap.pop()!;
    if (heap.length === 0) return first;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && before(heap[child + 1]!, heap[child]!)) child++;
      if (!before(heap[child]!, last)) break;
      heap[i] = heap[child]!;
      i = child;
    }
    heap[i] = last;
    return first;
  }
}

function before(a: SimEvent, b: SimEvent): boolean {
  return a.at < b.at || (a.at === b.at && a.order < b.order);
}

function scoped(address: AddrPort, lan: string | undefined): string {
  return lan && isLocal(address) ? `${lan}|${address}` : address;
}

const locals = new Map<AddrPort, boolean>();

function isLocal(address: AddrPort): boolean {
  const known = locals.get(address);
  if (known !== undefined) return known;
  const local = isPrivate(parseAddrPort(address)!.ip);
  locals.set(address, local);
  return local;
}

/** One packet of user data that arrived. */
export interface Arrival {
  from: SimHost;
  number: number;
  via: "udp" | "relay";
  at: number;
}

export class SimHost {
  readonly nodeKey: Uint8Array;
  readonly keyText: string;
  manager!: PathManager;
  discoKey!: Uint8Array;
  udpBlocked = false;
  knows: SimHost[] = [];
  endpoints: AddrPort[] = [];
  home = 0;
  /** Newest last. */
  readonly actions: PathAction[] = [];
  keepActions = true;
  /** Peer's key in hex -> path that the manager gave. */
  readonly paths = new Map<string, PathToPeer>();
  readonly pongs: PingResult[] = [];
  readonly arrivals: Arrival[] = [];
  /** First arrivals only: the replay window drops copies. */
  readonly seen = new Set<string>();
  readonly #staged: { to: SimHost; number: number }[] = [];
  readonly #noted = new Map<SimHost, number>();
  #number = 0;
  #wakeAt = Number.POSITIVE_INFINITY;
  #process = 0;
  readonly #relays = new Map<number, { connected: boolean; queue: [Uint8Array, Uint8Array][] }>();

  constructor(
    readonly sim: Sim,
    readonly name: string,
    readonly options: HostOptions,
  ) {
    this.nodeKey = sim.random(32);
    this.keyText = hex(this.nodeKey);
    this.start();
  }

  /** Starts (or restarts) the daemon: a new manager with a new disco key. */
  start(): void {
    this.#process++;
    this.#wakeAt = Number.POSITIVE_INFINITY;
    this.#relays.clear();
    for (const region of this.sim.regions.values()) region.connected.delete(this);
    this.paths.clear();
    const { sim } = this;
    this.manager = new PathManager({ random: sim.random });
    const discoPrivate = sim.random(32);
    this.discoKey = x25519Public(discoPrivate);
    this.manager.setKeys({ nodeKey: this.nodeKey, discoPrivate }, sim.now);
    this.setAddresses(this.options.ips);
    this.manager.setDerpMap(sim.derpMap(), sim.now);
    this.setPeers();
    for (const host of sim.hosts) if (host.knows.includes(this)) host.setPeers();
  }

  addresses(): AddrPort[] {
    return this.options.ips.map((ip) => this.#addrPort(ip));
  }

  setAddresses(ips: string[]): void {
    this.options.ips = ips;
    this.sim.bind(this);
    const port6 = ips.some((ip) => ip.includes(":")) ? this.port : undefined;
    this.manager.setLocalAddresses(ips, this.port, port6, this.sim.now);
    this.pump();
  }

  get port(): number {
    return this.options.port ?? 41641;
  }

  setPeers(): void {
    this.manager.setPeers(
      this.knows.map((host) => host.info()),
      this.sim.now,
    );
    this.pump();
  }

  info(): PeerInfo {
    return { nodeKey: this.nodeKey, discoKey: this.discoKey, endpoints: this.endpoints, homeDerp: this.home };
  }

  sourceFor(to: AddrPort): AddrPort | null {
    const six = to.startsWith("[");
    const ips = this.options.ips.filter((ip) => ip.includes(":") === six);
    const local = isLocal(to);
    const ip = ips.find((ip) => isLocal(this.#addrPort(ip)) === local) ?? ips[0];
    return ip ? this.#addrPort(ip) : null;
  }

  /** One packet of user data; returns its number. */
  send(to: SimHost): number {
    const number = this.#number++;
    const noted = this.#noted.get(to) ?? Number.NEGATIVE_INFINITY;
    if (this.sim.now - noted >= 1000) {
      this.#noted.set(to, this.sim.now);
      this.manager.noteSend(to.nodeKey, this.sim.now);
      this.pump();
    }
    this.#carry(to, number);
    return number;
  }

  /** User data every `interval` ms for `duration` ms, from now on. */
  stream(to: SimHost, interval: number, duration: number): void {
    for (let t = 0; t < duration; t += interval) this.sim.at(t, () => this.send(to));
  }

  pathTo(host: SimHost): PathToPeer {
    return this.paths.get(host.keyText) ?? {};
  }

  isDirect(host: SimHost): boolean {
    const path = this.pathTo(host);
    return path.udp !== undefined && !path.relay;
  }

  receiveUDP(from: AddrPort, data: Uint8Array): void {
    if (this.udpBlocked) return;
    if (!isDisco(data) && !isStun(data)) {
      this.#arrived(data, "udp");
      return;
    }
    this.manager.handleDatagram(from, data, this.sim.now);
    this.pump();
  }

  receiveRelayed(region: SimRegion, source: Uint8Array, data: Uint8Array): void {
    if (!this.#relays.get(region.id)?.connected) return;
    const disco = this.manager.handleRelayed(region.id, source, data, this.sim.now);
    if (!disco) this.#arrived(data, "relay");
    this.pump();
  }

  /** The relay stopped or came back. */
  relayChanged(region: SimRegion): void {
    const connection = this.#relays.get(region.id);
    if (!connection) return;
    if (region.up) {
      this.#connect(region.id);
      return;
    }
    connection.connected = false;
    region.connected.delete(this);
    this.manager.relayState(region.id, false, this.sim.now);
    this.pump();
  }

  /** Carries out what the manager wants, and sets its alarm clock. */
  pump(): void {
    for (const action of this.manager.drain()) {
      if (this.keepActions) this.actions.push(action);
      this.#act(action);
    }
    const at = this.manager.nextTimeout()?.at ?? Number.POSITIVE_INFINITY;
    if (at >= this.#wakeAt) return;
    this.#wakeAt = at;
    const process = this.#process;
    this.sim.at(at - this.sim.now, () => {
      if (process !== this.#process || this.#wakeAt !== at) return;
      this.#wakeAt = Number.POSITIVE_INFINITY;
      this.manager.handleTimeout(this.sim.now);
      this.pump();
    });
  }

  #act(action: PathAction): void {
    const { sim } = this;
    switch (action.type) {
      case "udp":
        sim.sendUDP(this, action.to, action.data);
        break;
      case "relay":
        this.#relaySend(action.region, action.to, action.data);
        break;
      case "path": {
        const text = hex(action.peer);
        this.paths.set(text, action.path);
        for (const staged of this.#staged.splice(0)) this.#carry(staged.to, staged.number);
        break;
      }
      case "endpoints":
        this.endpoints = action.endpoints;
        this.#publish();
        break;
      case "home":
        this.home = action.region;
        this.#publish();
        break;
      case "connect":
        this.#relays.set(action.region, { connected: false, queue: [] });
        this.#connect(action.region);
        break;
      case "disconnect":
        this.#relays.delete(action.region);
        sim.regions.get(action.region)?.connected.delete(this);
        break;
      case "resolve": {
        const { manager } = this;
        sim.at(5, () => {
          manager.resolved(action.host, sim.dns.get(action.host) ?? [], sim.now);
          this.pump();
        });
        break;
      }
      case "httpProbe": {
        const region = sim.regions.get(action.region);
        const { manager } = this;
        const ms = region?.up ? 6 * region.delay : null;
        sim.at(ms ?? 1500, () => {
          manager.httpProbeResult(action.region, ms, sim.now);
          this.pump();
        });
        break;
      }
      case "pong":
        this.pongs.push(action);
        break;
    }
  }

  /** Control tells the others 50 ms later. */
  #publish(): void {
    const info = this.info();
    this.sim.at(50, () => {
      for (const host of this.sim.hosts) {
        if (!host.knows.includes(this)) continue;
        host.manager.updatePeer(info, this.sim.now);
        host.pump();
      }
    });
  }

  #connect(id: number): void {
    const region = this.sim.regions.get(id);
    const process = this.#process;
    if (!region) return;
    this.sim.at(4 * region.delay, () => {
      const connection = this.#relays.get(id);
      if (process !== this.#process || !connection || !region.up || connection.connected) return;
      connection.connected = true;
      region.connected.add(this);
      this.manager.relayState(id, true, this.sim.now);
      for (const [to, data] of connection.queue.splice(0)) this.#relaySend(id, to, data);
      this.pump();
    });
  }

  #relaySend(id: number, to: Uint8Array, data: Uint8Array): void {
    const region = this.sim.regions.get(id);
    const connection = this.#relays.get(id);
    if (!region || !connection) return;
    if (!connection.connected) {
      if (connection.queue.length < 32) connection.queue.push([to, data]);
      return;
    }
    const text = hex(to);
    this.sim.at(region.delay, () => {
      if (!region.up) return;
      region.packets++;
      for (const host of region.connected) {
        if (host.keyText === text) {
          this.sim.at(region.delay, () => host.receiveRelayed(region, this.nodeKey, data));
          return;
        }
      }
      this.sim.at(region.delay, () => {
        this.manager.peerGone(id, to, this.sim.now);
        this.pump();
      });
    });
  }

  #carry(to: SimHost, number: number): void {
    const path = this.pathTo(to);
    const data = new Uint8Array(8);
    data[0] = 4;
    data[1] = this.sim.hosts.indexOf(this);
    new DataView(data.buffer).setUint32(4, number);
    if (path.udp) this.sim.sendUDP(this, path.udp, data);
    if (path.relay) {
      this.manager.noteRelaySend(path.region!, this.sim.now);
      this.#relaySend(path.region!, to.nodeKey, data);
    }
    if (!path.udp && !path.relay && this.#staged.length < 256) this.#staged.push({ to, number });
  }

  #arrived(data: Uint8Array, via: "udp" | "relay"): void {
    const from = this.sim.hosts[data[1]!];
    if (!from) return;
    const number = new DataView(data.buffer, data.byteOffset).getUint32(4);
    const key = `${from.name}|${number}`;
    if (this.seen.has(key)) return;
    this.seen.add(key);
    this.arrivals.push({ from, number, via, at: this.sim.now });
  }

  #addrPort(ip: string): AddrPort {
    return ip.includes(":") ? `[${ip}]:${this.port}` : `${ip}:${this.port}`;
  }
}

/** Shuts a region down or brings it back, for all hosts. */
export function setRegionUp(sim: Sim, region: SimRegion, up: boolean): void {
  region.up = up;
  for (const host of sim.hosts) host.relayChanged(region);
}
