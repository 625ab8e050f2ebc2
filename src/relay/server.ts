// The DERP server's rules without sockets: who is connected, where a packet goes, what waits, what is dropped, and who
// is told that a peer left. spec/derp-wire.md sections 8 to 13.
//
// A connection is a Transport below and `receive`, `drained`, `closed` above. Every input carries `now` in milliseconds;
// `flush` ends a batch of inputs, and `tick` lets time pass. Bytes handed to `receive` belong to the relay: a packet is
// not copied, its frame is rewritten in place from SendPacket to RecvPacket.
import { constantTimeEqual, hex, unhex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  type ClientInfo,
  DerpError,
  encodeKeepAlive,
  encodePeerGone,
  encodePeerPresent,
  encodePing,
  encodePong,
  FRAME_HEADER,
  FrameDecoder,
  FrameType,
  isDisco,
  KEEPALIVE_MS,
  KEY_LENGTH,
  MAX_PACKET,
  NONCE_LENGTH,
  PeerGoneReason,
  PresentFlag,
  putFrameHeader,
  RELAY_LIMITS,
  ServerLogin,
} from "../wire/derp.ts";
import { parseIP, unmap } from "../wire/ip.ts";
import { PacketQueue as BoundedQueue } from "./queue.ts";
import { Counters, type DropReason } from "./stats.ts";

/** What carries one connection's bytes. */
export interface Transport {
  /** Takes the bytes for good. False: they wait here; nothing more is written until `drained` is called. */
  write(bytes: Uint8Array): boolean;
  /** Stops and resumes the calls of `receive`. */
  pause(): void;
  resume(): void;
  /** Ends the connection at once. `closed` need not be called for it. */
  close(): void;
}

export interface RemoteAddress {
  /** Text; IPv4-mapped IPv6 counts as IPv4. */
  ip: string;
  port: number;
}

export interface RelayLimits {
  /** Connections, logged in or not. Default 65536. */
  connections: number;
  /** Connections that are not logged in yet: all, and of one IPv4 address or IPv6 /64. Defaults 4096 and 256. */
  halfOpen: number;
  halfOpenPerAddress: number;
  /** Milliseconds. Defaults 10 s to log in; 2 s, for mesh peers 30 s, until the kernel has taken what was written. */
  loginMs: number;
  writeMs: number;
  meshWriteMs: number;
  /** Packets that wait for one client, of disco and of everything else. Default 32 each. */
  queueDepth: number;
}

export interface RelayServerOptions {
  /** The relay's own Curve25519 key, 32 bytes. */
  privateKey: Uint8Array;
  /** `n` unpredictable bytes. */
  random: (n: number) => Uint8Array;
  /** Whether this node may use the relay; asked once, at login. Absent: every node may. */
  verify?: ((nodeKey: Uint8Array, ip: string) => boolean | Promise<boolean>) | undefined;
  /** 32 bytes that relays of one region share. Absent: nobody is a mesh peer. */
  meshKey?: Uint8Array | undefined;
  limits?: Partial<RelayLimits> | undefined;
}

const DEFAULT_LIMITS: RelayLimits = {
  connections: 65_536,
  halfOpen: 4096,
  halfOpenPerAddress: 256,
  loginMs: 10_000,
  writeMs: 2000,
  meshWriteMs: 30_000,
  queueDepth: 32,
};
const KEEPALIVE_JITTER_MS = 5000;
/** A silent client that can answer pings gets one in place of a keep-alive, and this long to show that it lives. */
const ANSWER_MS = 30_000;
/** One write to the transport: large enough to spread the cost of the call, small enough for the write deadline. */
const WRITE_BYTES = 65_536;
/** PeerGone(not here): burst and tokens a second, for each sender. */
const NOT_HERE_BURST = 3;
const NOT_HERE_PER_MS = 1 / 1000;
/** Frames other than packets that may wait for one client; for a mesh peer they carry the presence of all peers. */
const MAX_NOTICES = 1024;
const MAX_MESH_NOTICES = 1 << 18;
/** Bytes that a client may pipeline behind its ClientInfo while its admission is being decided. */
const MAX_PIPELINED = 262_144;
/** A change of home this soon after connecting is the first choice, not a move. */
const HOME_SETTLE_MS = 5000;
const KEEPALIVE = encodeKeepAlive();
const FIRST_FRAME = "the first DERP frame of a client must be ClientInfo";

/** One key of the region, for as long as it has a connection. */
interface Peer {
  id: string;
  key: Uint8Array;
  /** In the order of registration. */
  conns: RelayConnection[];
  /** Where packets to this key go: the connection that spoke last. */
  active: RelayConnection;
  /** Connections that received from this key and are told once when it leaves. */
  recipients: Set<RelayConnection>;
}

export class RelayServer {
  readonly publicKey: Uint8Array;
  readonly counters = new Counters();
  readonly limits: RelayLimits;
  readonly #options: RelayServerOptions;
  readonly #meshKey: Uint8Array | null;
  readonly #peers = new Map<string, Peer>();
  readonly #conns = new Set<RelayConnection>();
  readonly #watchers = new Set<RelayConnection>();
  readonly #halfOpen = new Map<string, number>();
  #halfOpenTotal = 0;
  /** Connections with something to write since the last flush. */
  #dirty: RelayConnection[] = [];
  #spoken = 0;
  #now = 0;
  #isClosed = false;

  constructor(options: RelayServerOptions) {
    if (options.privateKey.length !== KEY_LENGTH)
      throw new RangeError(`the relay's private key has ${options.privateKey.length} bytes, not 32`);
    if (options.meshKey && options.meshKey.length !== KEY_LENGTH)
      throw new RangeError(`the mesh key has ${options.meshKey.length} bytes, not 32`);
    this.#options = options;
    this.publicKey = x25519Public(options.privateKey);
    this.limits = { ...DEFAULT_LIMITS, ...options.limits };
    this.#meshKey = options.meshKey?.some((byte) => byte !== 0) ? options.meshKey : null;
  }

  /**
   * A new connection, greeted with ServerKey. Null when it is one too many; the caller then closes it.
   * `notIdeal`: the client says by its Ideal-Node header that it wanted another node.
   */
  accept(transport: Transport, remote: RemoteAddress, now: number, notIdeal = false): RelayConnection | null {
    this.#now = now;
    const bucket = addressBucket(remote.ip);
    const sameAddress = this.#halfOpen.get(bucket) ?? 0;
    if (
      this.#isClosed ||
      this.#conns.size >= this.limits.connections ||
      this.#halfOpenTotal >= this.limits.halfOpen ||
      sameAddress >= this.limits.halfOpenPerAddress
    ) {
      this.counters.logins_busy++;
      return null;
    }
    this.#halfOpen.set(bucket, sameAddress + 1);
    this.#halfOpenTotal++;
    this.counters.accepts++;
    const conn = new RelayConnection(this, transport, remote, bucket, notIdeal, now);
    this.#conns.add(conn);
    conn.greet(new ServerLogin(this.#options.privateKey, this.publicKey));
    return conn;
  }

  /** Writes out what the inputs since the last flush gave to write. */
  flush(now: number): void {
    this.#now = now;
    const dirty = this.#dirty;
    if (dirty.length === 0) return;
    this.#dirty = [];
    for (const conn of dirty) conn.flushDirty();
  }

  /** Keep-alives and deadlines. Call it twice a second or so. */
  tick(now: number): void {
    this.#now = now;
    for (const conn of this.#conns) conn.tick(now);
    this.flush(now);
  }

  /** Ends all connections of this key, for instance of a node that was deleted. Returns how many. */
  disconnect(key: Uint8Array): number {
    const peer = this.#peers.get(keyId(key, 0));
    if (!peer) return 0;
    const conns = [...peer.conns];
    for (const conn of conns) conn.close();
    return conns.length;
  }

  /** Keys that are connected. */
  get size(): number {
    return this.#peers.size;
  }

  stats(): Record<string, number> {
    let dupKeys = 0;
    let dupConns = 0;
    for (const { conns } of this.#peers.values()) {
      if (conns.length < 2) continue;
      dupKeys++;
      dupConns += conns.length;
    }
    let home = 0;
    let notIdeal = 0;
    for (const conn of this.#conns) {
      if (conn.isHome) home++;
      if (conn.notIdeal && conn.isReady) notIdeal++;
    }
    return {
      ...this.counters.snapshot(),
      gauge_current_connections: this.#conns.size,
      gauge_current_home_connections: home,
      gauge_current_notideal_connections: notIdeal,
      gauge_clients_total: this.#peers.size,
      gauge_clients_local: this.#peers.size,
      gauge_clients_remote: 0,
      gauge_current_dup_client_keys: dupKeys,
      gauge_current_dup_client_conns: dupConns,
      gauge_watchers: this.#watchers.size,
      gauge_half_open: this.#halfOpenTotal,
    };
  }

  /** Ends everything; further connections are refused. */
  close(): void {
    this.#isClosed = true;
    for (const conn of [...this.#conns]) conn.close();
  }

  // ---- for RelayConnection ----

  /** @internal */
  get now(): number {
    return this.#now;
  }

  /** @internal */
  setNow(now: number): void {
    this.#now = now;
  }

  /** @internal */
  random(n: number): Uint8Array {
    return this.#options.random(n);
  }

  /** @internal */
  verify(key: Uint8Array, ip: string): boolean | Promise<boolean> {
    try {
      return this.#options.verify?.(key, ip) ?? true;
    } catch {
      return false;
    }
  }

  /** @internal Whether ClientInfo proves a mesh peer. */
  isMeshKey(text: string | undefined): boolean {
    if (!this.#meshKey || !text || !/^[0-9a-fA-F]{64}$/.test(text)) return false;
    const given = unhex(text);
    return given !== null && constantTimeEqual(given, this.#meshKey);
  }

  /** @internal */
  find(buf: Uint8Array, at: number): Peer | undefined {
    return this.#peers.get(keyId(buf, at));
  }

  /** @internal */
  markDirty(conn: RelayConnection): void {
    this.#dirty.push(conn);
  }

  /** @internal */
  loggedIn(conn: RelayConnection): void {
    this.#endHalfOpen(conn);
  }

  /** @internal The connection takes part from now on, and packets to its key go to it. */
  register(conn: RelayConnection, key: Uint8Array): Peer {
    const id = keyId(key, 0);
    let peer = this.#peers.get(id);
    if (peer) {
      this.counters.counter_total_dup_client_conns++;
      peer.conns.push(conn);
      peer.active = conn;
    } else {
      peer = { id, key, conns: [conn], active: conn, recipients: new Set() };
      this.#peers.set(id, peer);
    }
    conn.spokeAt = ++this.#spoken;
    if (this.#watchers.size > 0) {
      const frame = conn.presentFrame(key);
      for (const watcher of this.#watchers) watcher.notify(frame);
    }
    return peer;
  }

  /** @internal A frame came from one of several connections with the same key: the last speaker is the active one. */
  spoke(conn: RelayConnection, peer: Peer): void {
    conn.spokeAt = ++this.#spoken;
    peer.active = conn;
  }

  /** @internal */
  watch(conn: RelayConnection): void {
    if (this.#watchers.has(conn)) return;
    this.#watchers.add(conn);
    for (const peer of this.#peers.values()) conn.notify(peer.active.presentFrame(peer.key));
  }

  /** @internal */
  remove(conn: RelayConnection, peer: Peer | null): void {
    this.#conns.delete(conn);
    this.#watchers.delete(conn);
    this.#endHalfOpen(conn);
    if (!peer) return;
    peer.conns = peer.conns.filter((other) => other !== conn);
    if (peer.conns.length > 0) {
      if (peer.active === conn) peer.active = peer.conns.reduce((a, b) => (b.spokeAt > a.spokeAt ? b : a));
      return;
    }
    this.#peers.delete(peer.id);
    const frame = encodePeerGone(peer.key, PeerGoneReason.Disconnected);
    const told = new Set([...peer.recipients, ...this.#watchers]);
    peer.recipients.clear();
    for (const recipient of told) {
      recipient.forget(peer);
      if (recipient.notify(frame)) this.counters.peer_gone_disconnected_frames++;
    }
  }

  #endHalfOpen(conn: RelayConnection): void {
    if (!conn.endHalfOpen()) return;
    this.#halfOpenTotal--;
    const left = this.#halfOpen.get(conn.bucket)! - 1;
    if (left > 0) this.#halfOpen.set(conn.bucket, left);
    else this.#halfOpen.delete(conn.bucket);
  }
}

/** One connection. The caller's methods are `receive`, `drained`, `closed` and `close`. */
export class RelayConnection {
  readonly remote: RemoteAddress;
  /** The client's node key, once it has proven it. */
  key: Uint8Array | null = null;
  isMesh = false;
  isHome = false;
  readonly notIdeal: boolean;
  /** @internal Order among the connections of one key. */
  spokeAt = 0;
  /** @internal What the limit of half-open connections counts by. */
  readonly bucket: string;

  readonly #server: RelayServer;
  readonly #counters: Counters;
  readonly #transport: Transport;
  readonly #connectedAt: number;
  readonly #decoder = new FrameDecoder(RELAY_LIMITS);
  readonly #sink = (type: number, buf: Uint8Array, at: number, end: number) => this.#frame(type, buf, at, end);
  #state: "login" | "verifying" | "ready" | "closed" = "login";
  #isHalfOpen = true;
  #login: ServerLogin | null = null;
  #info: ClientInfo | null = null;
  #peer: Peer | null = null;
  /** Read but not yet looked at, while admission is being decided. */
  #pipelined: Uint8Array[] = [];
  #pipelinedBytes = 0;

  #data: PacketQueue | null = null;
  #disco: PacketQueue | null = null;
  /** PeerGone, PeerPresent, Pong, KeepAlive. */
  #notices: Uint8Array[] = [];
  #isPongWaiting = false;
  #isDirty = false;
  /** When the transport began to hold bytes back; -1 while it takes them. */
  #blockedSince = -1;
  #keepAliveAt = Number.POSITIVE_INFINITY;
  #keepAliveEvery = KEEPALIVE_MS;
  /** When the client was last heard, and until when it must be heard again. */
  #heardAt = 0;
  #answerBy = Number.POSITIVE_INFINITY;
  #lastSource: Peer | null = null;
  readonly #subscriptions = new Set<Peer>();
  #notHereTokens = NOT_HERE_BURST;
  #notHereAt = 0;

  /** @internal */
  constructor(
    server: RelayServer,
    transport: Transport,
    remote: RemoteAddress,
    bucket: string,
    notIdeal: boolean,
    now: number,
  ) {
    this.#server = server;
    this.#counters = server.counters;
    this.#transport = transport;
    this.remote = remote;
    this.bucket = bucket;
    this.notIdeal = notIdeal;
    this.#connectedAt = now;
  }

  get isReady(): boolean {
    return this.#state === "ready";
  }

  get isClosed(): boolean {
    return this.#state === "closed";
  }

  /** Bytes from the client, which the relay may keep and overwrite. Call the server's `flush` after a batch of these. */
  receive(chunk: Uint8Array, now: number): void {
    this.#server.setNow(now);
    this.#heardAt = now;
    this.#answerBy = Number.POSITIVE_INFINITY;
    this.#receive(chunk);
  }

  /** The transport takes bytes again. */
  drained(now: number): void {
    this.#server.setNow(now);
    this.#blockedSince = -1;
    this.#flush();
  }

  /** The transport has ended by itself. */
  closed(now: number): void {
    this.#server.setNow(now);
    this.close();
    this.#server.flush(now);
  }

  /** Ends the connection and tells those who have to know. */
  close(): void {
    if (this.#state === "closed") return;
    this.#state = "closed";
    this.isHome = false;
    this.#transport.close();
    for (const peer of this.#subscriptions) peer.recipients.delete(this);
    this.#subscriptions.clear();
    this.#dropAll(this.#data, false);
    this.#dropAll(this.#disco, true);
    this.#notices = [];
    this.#pipelined = [];
    this.#server.remove(this, this.#peer);
  }

  // ---- input ----

  #receive(chunk: Uint8Array): void {
    if (this.#state === "verifying") {
      this.#keepForLater(chunk);
      return;
    }
    try {
      if (this.#state === "closed") return;
      const skipped = this.#decoder.skipped;
      const used = this.#decoder.feed(chunk, this.#sink);
      this.#counters.unknown_frames += this.#decoder.skipped - skipped;
      if (this.#state === "login" && this.#decoder.skipped > 0) throw new DerpError(FIRST_FRAME);
      // The state may have changed meanwhile, which the type checker does not see.
      if (used < chunk.length && (this.#state as string) === "verifying") this.#keepForLater(chunk.subarray(used));
    } catch (error) {
      if (!(error instanceof DerpError)) throw error;
      if (this.#state === "ready") this.#counters.protocol_errors++;
      else this.#counters.logins_malformed++;
      this.close();
    }
  }

  #keepForLater(chunk: Uint8Array): void {
    if (chunk.length === 0) return;
    this.#pipelinedBytes += chunk.length;
    if (this.#pipelinedBytes <= MAX_PIPELINED) {
      this.#pipelined.push(chunk);
      return;
    }
    this.#counters.logins_malformed++;
    this.close();
  }

  #frame(type: number, buf: Uint8Array, at: number, end: number): boolean {
    if (this.#state === "login") {
      if (type !== FrameType.ClientInfo) throw new DerpError(FIRST_FRAME);
      this.#clientInfo(buf.subarray(at + FRAME_HEADER, end));
      return this.isReady;
    }
    const peer = this.#peer!;
    if (peer.conns.length > 1 && peer.active !== this) this.#server.spoke(this, peer);
    switch (type) {
      case FrameType.SendPacket:
        this.#sendPacket(buf, at, end);
        break;
      case FrameType.ForwardPacket:
        this.#forwardPacket(buf, at, end);
        break;
      case FrameType.NotePreferred:
        exactly("NotePreferred", end - at - FRAME_HEADER, 1);
        this.#notePreferred(buf[at + FRAME_HEADER] !== 0);
        break;
      case FrameType.Ping:
        this.#ping(buf.subarray(at + FRAME_HEADER, end));
        break;
      case FrameType.Pong:
        // That it came is all that counts.
        break;
      case FrameType.WatchConns:
        this.#requireMesh("WatchConns");
        // A relay that dialled itself has nothing to learn.
        if (!equalKeys(peer.key, this.#server.publicKey)) this.#server.watch(this);
        break;
      case FrameType.ClosePeer:
        this.#requireMesh("ClosePeer");
        exactly("ClosePeer", end - at - FRAME_HEADER, KEY_LENGTH);
        this.#server.disconnect(buf.subarray(at + FRAME_HEADER, end));
        break;
      default:
        this.#counters.unknown_frames++;
    }
    return this.#state === "ready";
  }

  #sendPacket(buf: Uint8Array, at: number, end: number): void {
    const from = at + FRAME_HEADER + KEY_LENGTH;
    if (end < from) throw new DerpError("DERP frame SendPacket is shorter than a key");
    const disco = isDisco(buf, from, end);
    this.#countReceived(disco, end - from);
    const target = this.#server.find(buf, at + FRAME_HEADER);
    if (!target) {
      this.#counters.drop("unknown_dest", disco, end - from);
      if (disco) this.#notHere(buf.slice(at + FRAME_HEADER, from));
      return;
    }
    buf[at] = FrameType.RecvPacket;
    buf.set(this.#peer!.key, at + FRAME_HEADER);
    target.active.enqueue(buf, at, end, this.#peer!, disco);
  }

  #forwardPacket(buf: Uint8Array, at: number, end: number): void {
    this.#requireMesh("ForwardPacket");
    const source = at + FRAME_HEADER;
    const destination = source + KEY_LENGTH;
    const from = destination + KEY_LENGTH;
    if (end < from) throw new DerpError("DERP frame ForwardPacket is shorter than two keys");
    if (end - from > MAX_PACKET) throw new DerpError(`DERP frame ForwardPacket carries more than ${MAX_PACKET} bytes`);
    const disco = isDisco(buf, from, end);
    this.#countReceived(disco, end - from);
    this.#counters.packets_forwarded_in++;
    const target = this.#server.find(buf, destination);
    if (!target) {
      this.#counters.drop("unknown_dest_on_fwd", disco, end - from);
      return;
    }
    // The source key takes the destination's place, and a new header stands before it.
    buf.copyWithin(destination, source, destination);
    const start = destination - FRAME_HEADER;
    putFrameHeader(buf, start, FrameType.RecvPacket, end - destination);
    target.active.enqueue(buf, start, end, this.#server.find(buf, destination) ?? null, disco);
  }

  #countReceived(disco: boolean, bytes: number): void {
    this.#counters.packets_received++;
    this.#counters.bytes_received += bytes;
    if (disco) this.#counters.packets_received_disco++;
    else this.#counters.packets_received_other++;
  }

  #notHere(destination: Uint8Array): void {
    const now = this.#server.now;
    const earned = (now - this.#notHereAt) * NOT_HERE_PER_MS;
    this.#notHereTokens = Math.min(NOT_HERE_BURST, this.#notHereTokens + earned);
    this.#notHereAt = now;
    if (this.#notHereTokens < 1) return;
    this.#notHereTokens--;
    if (this.notify(encodePeerGone(destination, PeerGoneReason.NotHere))) this.#counters.peer_gone_not_here_frames++;
  }

  #notePreferred(home: boolean): void {
    if (home === this.isHome) return;
    this.isHome = home;
    if (this.#server.now - this.#connectedAt <= HOME_SETTLE_MS) return;
    if (home) this.#counters.home_moves_in++;
    else this.#counters.home_moves_out++;
  }

  #ping(payload: Uint8Array): void {
    if (payload.length < 8) throw new DerpError(`DERP frame Ping has ${payload.length} bytes, fewer than 8`);
    this.#counters.got_ping++;
    if (this.#isPongWaiting) return;
    this.#isPongWaiting = this.notify(encodePong(payload.subarray(0, 8)));
    if (this.#isPongWaiting) this.#counters.sent_pong++;
  }

  #requireMesh(frame: string): void {
    if (!this.isMesh) throw new DerpError(`DERP frame ${frame} needs the mesh key, which this client did not show`);
  }

  // ---- login ----

  /** @internal */
  greet(login: ServerLogin): void {
    this.#login = login;
    this.#write(login.greeting);
  }

  #clientInfo(payload: Uint8Array): void {
    const { clientKey, info } = this.#login!.receiveClientInfo(payload);
    this.key = clientKey;
    this.#info = info;
    this.isMesh = this.#server.isMeshKey(info.meshKey);
    const verdict = this.isMesh || this.#server.verify(clientKey, this.remote.ip);
    if (typeof verdict === "boolean") {
      this.#admit(verdict);
      return;
    }
    this.#state = "verifying";
    this.#transport.pause();
    const decided = (allowed: boolean) => {
      if (this.#state !== "verifying") return;
      this.#admit(allowed);
      this.#server.flush(this.#server.now);
    };
    verdict.then(decided, () => decided(false));
  }

  #admit(allowed: boolean): void {
    if (!allowed) {
      this.#counters.logins_refused++;
      this.close();
      return;
    }
    const server = this.#server;
    const wasVerifying = this.#state === "verifying";
    this.#state = "ready";
    server.loggedIn(this);
    this.#decoder.expectLargeFrames();
    this.#write(this.#login!.serverInfo(server.random(NONCE_LENGTH)));
    this.#login = null;
    const jitter = ((server.random(1)[0] ?? 0) / 256) * KEEPALIVE_JITTER_MS;
    this.#keepAliveEvery = KEEPALIVE_MS + jitter;
    this.#keepAliveAt = server.now + this.#keepAliveEvery;
    this.#notHereAt = server.now;
    this.#peer = server.register(this, this.key!);
    if (!wasVerifying) return;
    this.#transport.resume();
    const pipelined = this.#pipelined;
    this.#pipelined = [];
    for (const chunk of pipelined) this.#receive(chunk);
  }

  /** @internal True once, for the connection that was half-open until now. */
  endHalfOpen(): boolean {
    const was = this.#isHalfOpen;
    this.#isHalfOpen = false;
    return was;
  }

  // ---- output ----

  /** @internal A packet for this client. Never waits: when the queue is full its oldest packet goes. */
  enqueue(buf: Uint8Array, start: number, end: number, source: Peer | null, disco: boolean): void {
    const queue = this.#queue(disco);
    if (queue.full) this.#flush();
    if (this.#state === "closed") {
      this.#counters.drop("gone_disconnected", disco, end - start - FRAME_HEADER - KEY_LENGTH);
      return;
    }
    if (queue.full) this.#dropHead(queue, "queue_head", disco);
    queue.push(buf, start, end, source, this.#server.now);
    this.#touch();
  }

  /** Made when first needed: most connections never see disco through the relay, or are idle. */
  #queue(disco: boolean): PacketQueue {
    const depth = this.#server.limits.queueDepth;
    if (disco) {
      this.#disco ??= new PacketQueue(depth);
      return this.#disco;
    }
    this.#data ??= new PacketQueue(depth);
    return this.#data;
  }

  /** @internal A frame other than a packet. False when it was dropped because too many wait. */
  notify(frame: Uint8Array): boolean {
    if (this.#state !== "ready") return false;
    if (this.#notices.length >= (this.isMesh ? MAX_MESH_NOTICES : MAX_NOTICES)) {
      // A watcher that misses a change is wrong for good: end it, and it starts anew with a full list.
      if (this.isMesh) this.close();
      return false;
    }
    this.#notices.push(frame);
    this.#touch();
    return true;
  }

  /** @internal */
  presentFrame(key: Uint8Array): Uint8Array {
    const ip = parseIP(this.remote.ip);
    const special =
      (this.isMesh ? PresentFlag.Mesh : 0) |
      (this.#info?.isProber ? PresentFlag.Prober : 0) |
      (this.notIdeal ? PresentFlag.NotIdeal : 0);
    return encodePeerPresent({
      key,
      ip: ip && unmap(ip),
      port: ip ? this.remote.port : 0,
      flags: special || PresentFlag.Regular,
    });
  }

  /** @internal */
  forget(peer: Peer): void {
    this.#subscriptions.delete(peer);
    if (this.#lastSource === peer) this.#lastSource = null;
  }

  /** @internal */
  tick(now: number): void {
    if (this.#isHalfOpen && now - this.#connectedAt >= this.#server.limits.loginMs) {
      this.#counters.logins_timed_out++;
      this.close();
      return;
    }
    if (this.#blockedSince >= 0) {
      const { writeMs, meshWriteMs } = this.#server.limits;
      if (now - this.#blockedSince < (this.isMesh ? meshWriteMs : writeMs)) return;
      this.#counters.sclient_write_timeouts++;
      this.close();
      return;
    }
    if (now >= this.#answerBy) {
      this.#counters.clients_vanished++;
      this.close();
      return;
    }
    if (now < this.#keepAliveAt) return;
    this.#keepAliveAt = now + this.#keepAliveEvery;
    if (!this.#info?.canAckPings || now - this.#heardAt < KEEPALIVE_MS) {
      this.notify(KEEPALIVE);
      return;
    }
    // A host that vanished never closes its connection, and the kernel takes a quarter of an hour to give up on it.
    this.notify(encodePing(this.#server.random(8)));
    this.#answerBy = now + ANSWER_MS;
  }

  /** @internal */
  flushDirty(): void {
    this.#isDirty = false;
    this.#flush();
    if (this.#blockedSince < 0) return;
    this.#data?.detach();
    this.#disco?.detach();
  }

  #touch(): void {
    if (this.#isDirty) return;
    this.#isDirty = true;
    this.#server.markDirty(this);
  }

  #flush(): void {
    while (this.#state !== "closed" && this.#blockedSince < 0) {
      const batch = this.#takeBatch();
      if (!batch) return;
      this.#write(batch);
    }
  }

  #write(bytes: Uint8Array): void {
    if (!this.#transport.write(bytes) && this.#blockedSince < 0) this.#blockedSince = this.#server.now;
  }

  /** Up to WRITE_BYTES and one frame of what waits, in one piece. Frames that lie side by side are not copied. */
  #takeBatch(): Uint8Array | null {
    const batch = new Batch();
    if (this.#disco) this.#takePackets(batch, this.#disco);
    if (this.#data) this.#takePackets(batch, this.#data);
    let taken = 0;
    while (taken < this.#notices.length && batch.bytes < WRITE_BYTES) {
      const notice = this.#notices[taken++]!;
      batch.add(notice, 0, notice.length);
    }
    if (taken === this.#notices.length) {
      if (taken > 0) this.#notices = [];
      this.#isPongWaiting = false;
    } else {
      this.#notices = this.#notices.slice(taken);
    }
    return batch.take();
  }

  #takePackets(batch: Batch, queue: PacketQueue): void {
    const now = this.#server.now;
    while (queue.length > 0 && batch.bytes < WRITE_BYTES) {
      const source = queue.source;
      if (source !== this.#lastSource) this.#subscribe(source);
      batch.add(queue.buf, queue.start, queue.end);
      this.#counters.sent(queue.end - queue.start - FRAME_HEADER - KEY_LENGTH, now - queue.time);
      queue.shift();
    }
  }

  /** This client gets a packet from `source`, and so wants to hear when `source` leaves. */
  #subscribe(source: Peer | null): void {
    this.#lastSource = source;
    if (!source || source.conns.length === 0) return;
    source.recipients.add(this);
    this.#subscriptions.add(source);
  }

  #dropAll(queue: PacketQueue | null, disco: boolean): void {
    while (queue && queue.length > 0) this.#dropHead(queue, "gone_disconnected", disco);
  }

  #dropHead(queue: PacketQueue, reason: DropReason, disco: boolean): void {
    this.#counters.drop(reason, disco, queue.end - queue.start - FRAME_HEADER - KEY_LENGTH);
    queue.shift();
  }
}

/** What waits for one client; the source is null when it is connected to another relay of the region. */
class PacketQueue extends BoundedQueue<Peer | null> {}

/** Byte ranges to be written as one. */
class Batch {
  bytes = 0;
  #bufs: Uint8Array[] = [];
  #starts: number[] = [];
  #ends: number[] = [];

  add(buf: Uint8Array, start: number, end: number): void {
    this.bytes += end - start;
    const last = this.#bufs.length - 1;
    if (last >= 0 && this.#bufs[last] === buf && this.#ends[last] === start) {
      this.#ends[last] = end;
      return;
    }
    this.#bufs.push(buf);
    this.#starts.push(start);
    this.#ends.push(end);
  }

  take(): Uint8Array | null {
    if (this.#bufs.length === 0) return null;
    if (this.#bufs.length === 1) return this.#bufs[0]!.subarray(this.#starts[0]!, this.#ends[0]!);
    const out = Buffer.allocUnsafeSlow(this.bytes);
    let at = 0;
    for (let i = 0; i < this.#bufs.length; i++) {
      out.set(this.#bufs[i]!.subarray(this.#starts[i]!, this.#ends[i]!), at);
      at += this.#ends[i]! - this.#starts[i]!;
    }
    return out;
  }
}

/** The 32 bytes at `at` as a map key. */
function keyId(buf: Uint8Array, at: number): string {
  return latin1.call(buf as Buffer, at, at + KEY_LENGTH);
}
const latin1 = (Buffer.prototype as unknown as { latin1Slice(this: Buffer, start: number, end: number): string })
  .latin1Slice;

/** Half-open connections are counted by IPv4 address or by IPv6 /64. */
function addressBucket(text: string): string {
  const parsed = parseIP(text);
  if (!parsed) return text;
  const ip = unmap(parsed);
  return hex(ip.length === 4 ? ip : ip.subarray(0, 8));
}

function equalKeys(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

function exactly(name: string, length: number, expected: number): void {
  if (length !== expected) throw new DerpError(`DERP frame ${name} has ${length} bytes instead of ${expected}`);
}
