// A WireGuard device: keys, peers, handshakes, sessions, timers (spec/datapath-wire.md parts 1 and 2). No I/O, no clock,
// no randomness of its own: calls bring bytes and `now` (milliseconds of a monotonic clock), `drain()` returns what to
// send, `nextTimeout()` says when to call `handleTimeout`.
//
// Data packets do not pass through here. The datapath seals them with asm `sessionSeal` on the session that
// `prepareSend` names and opens them with `sessionOpen`, in place in wasm memory, and reports each batch by `sent` and
// `received`. The session table and the trie live in the module instance: one Device per Asm.
import { constantTimeEqual, hex, isZeroKey, wipe } from "../crypto/keys.ts";
import type { Asm } from "../crypto/wasm.ts";
import { generatePrivateKey, x25519, x25519Public } from "../crypto/x25519.ts";
import { type AddrPort, parseAddrPort } from "../wire/ip.ts";
import {
  INITIATION_SIZE,
  messageType,
  paddedLength,
  parseCookieReply,
  parseInitiation,
  parseResponse,
  RESPONSE_SIZE,
  TRANSPORT_HEADER_SIZE,
  TRANSPORT_OVERHEAD,
  TYPE_COOKIE_REPLY,
  TYPE_INITIATION,
  TYPE_RESPONSE,
  tai64n,
} from "../wire/wireguard.ts";
import { AllowedIPs } from "./allowed-ips.ts";
import type { DeviceDump, DeviceUpdate, PeerDump, PeerPath } from "./config.ts";
import * as T from "./constants.ts";
import { CookieChecker } from "./cookie.ts";
import { Deadlines } from "./deadlines.ts";
import {
  consumeResponse,
  createInitiation,
  createResponse,
  type Identity,
  openInitiationStatic,
  openInitiationTimestamp,
  wipeInitiator,
} from "./handshake.ts";
import { LoadMeter, RateLimiter } from "./load.ts";
import { Peer, Timer } from "./peer.ts";
import type { Sealer } from "./sealer.ts";
import { type Session, SessionTable, sessionTableSlots } from "./sessions.ts";
import { checkUpdate, type DeviceChange, type PeerChange } from "./update.ts";

/** Where a message came from, or has to go. `peer` is the static key that the relay vouches for. */
export type Source = { kind: "udp"; addr: AddrPort } | { kind: "relay"; peer: Uint8Array };

export type Output =
  /**
   * A finished WireGuard message. Without `to` it goes by the peer's endpoint (wg) or path (mesh). `slot` is -1 when
   * the peer is not known, as for cookie replies, which always carry `to`.
   */
  | { type: "send"; slot: number; data: Uint8Array; to?: Source }
  /** A keepalive that the sealer must send on this session. */
  | { type: "keepalive"; slot: number; session: number }
  /** A session came up; `ms` from the initiation to here. */
  | { type: "handshake"; slot: number; ms: number; initiator: boolean }
  /** The peer is silent: do not insist on the source address and interface used so far. */
  | { type: "forgetSource"; slot: number };

/** Why `handleHandshake` dropped a message. */
export type Drop =
  | "malformed"
  | "no-private-key"
  | "mac1"
  | "under-load"
  | "rate-limit"
  | "unknown-peer"
  | "wrong-relay-peer"
  | "bad-handshake"
  | "replayed"
  | "flood"
  | "no-handshake"
  | "bad-cookie";

export interface DeviceOptions {
  asm: Asm;
  /** Cryptographically strong bytes. */
  random: (n: number) => Uint8Array;
  /** wg: endpoints follow authenticated packets. mesh: paths come by `setPath`. */
  mode: "wg" | "mesh";
  /** Unix time in ms minus `now`. */
  unixOffset: number;
  /** Inner MTU, beyond which nothing is padded; 0: none. */
  mtu?: number;
  /** Default 128. */
  maxPeers?: number;
  /** All peers together; default 8 for each peer. */
  maxAllowedIPs?: number;
  /** Another thread that seals: then `prepareSend` and `stage` are not for use, `want` and `told` are. */
  sealer?: Sealer;
}

const DEFAULT_MAX_PEERS = 128;
const ALLOWED_IPS_PER_PEER = 8;
const MAX_RETIRED = 3;
const SCRATCH_SIZE = 65536 + 64;
const MAX_PACKET = 65535 - TRANSPORT_OVERHEAD - 16;
/** Timestamps are blurred to 2^24 ns, about 17 ms: they are not to tell the exact time of our clock. */
const TIMESTAMP_STEP = 1n << 24n;
const SECOND_NS = 1_000_000_000n;
const TIMERS = Object.values(Timer);
const NOTHING: Output[] = [];
const EMPTY = new Uint8Array(0);

export class Device {
  readonly mode: "wg" | "mesh";
  readonly allowedIPs: AllowedIPs;
  /** May be corrected when the wall clock is set. */
  unixOffset: number;
  mtu: number;

  readonly #asm: Asm;
  readonly #random: (n: number) => Uint8Array;
  readonly #maxPeers: number;
  readonly #sessions: SessionTable;
  readonly #scratch: number;
  readonly #sealer: Sealer | null;

  #identity: Identity | null = null;
  #cookies: CookieChecker | null = null;
  #listenPort = 0;
  #fwmark = 0;

  readonly #byKey = new Map<string, Peer>();
  readonly #bySlot: (Peer | null)[] = [];
  readonly #freeSlots: number[] = [];
  readonly #deadlines = new Deadlines();
  readonly #load = new LoadMeter();
  readonly #limiter = new RateLimiter();
  #stagedBytes = 0;
  #outputs: Output[] = [];
  #jitter: Uint8Array = new Uint8Array(0);
  #jitterUsed = 0;

  constructor(options: DeviceOptions) {
    const { asm } = options;
    if (asm.exports.sessionTableBase() !== 0)
      throw new Error("this Asm already serves a WireGuard device: create another");
    this.#asm = asm;
    this.#random = options.random;
    this.mode = options.mode;
    this.unixOffset = options.unixOffset;
    this.mtu = options.mtu ?? 0;
    this.#maxPeers = options.maxPeers ?? DEFAULT_MAX_PEERS;
    this.#sealer = options.sealer ?? null;
    this.#sessions = new SessionTable(asm, options.random, sessionTableSlots(this.#maxPeers), this.#sealer);
    this.allowedIPs = new AllowedIPs(asm, options.maxAllowedIPs ?? this.#maxPeers * ALLOWED_IPS_PER_PEER, this.#sealer);
    this.#scratch = asm.alloc(SCRATCH_SIZE, 64);
  }

  /** Bytes of wasm memory that a device takes (most of them untouched until they are needed). */
  static memoryNeeded(asm: Asm, maxPeers = DEFAULT_MAX_PEERS, maxAllowedIPs = maxPeers * ALLOWED_IPS_PER_PEER): number {
    return (
      SessionTable.memoryNeeded(asm, sessionTableSlots(maxPeers)) +
      AllowedIPs.memoryNeeded(asm, maxAllowedIPs) +
      SCRATCH_SIZE +
      256
    );
  }

  /** Throws one sentence when the update is wrong; then nothing of it has taken effect. */
  configure(update: DeviceUpdate, now: number): void {
    const change = checkUpdate(update);
    const identity = change.privateKey ? identityOf(change.privateKey) : this.#identity;
    this.#checkCapacity(change, identity);

    if (change.listenPort !== null) this.#listenPort = change.listenPort;
    if (change.fwmark !== null) this.#fwmark = change.fwmark;
    if (change.privateKey) this.#setIdentity(identity);
    if (change.replacePeers) for (const peer of [...this.#byKey.values()]) this.#removePeer(peer);
    for (const peerChange of change.peers) this.#changePeer(peerChange, now);
    if (!change.privateKey) return;
    for (const peer of this.#byKey.values()) {
      if (peer.persistentKeepalive > 0) this.#sendKeepalive(peer, now);
      else this.#resume(peer, now);
    }
  }

  /** Keys are copies: the caller wipes them. */
  dump(): DeviceDump {
    return {
      privateKey: this.#identity?.privateKey.slice() ?? new Uint8Array(32),
      listenPort: this.#listenPort,
      fwmark: this.#fwmark,
      peers: Array.from(this.#byKey.values(), (peer) => this.#dumpPeer(peer)),
    };
  }

  /** Null: none is configured. */
  get publicKey(): Uint8Array | null {
    return this.#identity?.publicKey ?? null;
  }

  get peerCount(): number {
    return this.#byKey.size;
  }

  /** Session slots in use, handshakes included. */
  get sessionCount(): number {
    return this.#sessions.used;
  }

  peers(): Iterable<Peer> {
    return this.#byKey.values();
  }

  peerByKey(publicKey: Uint8Array): Peer | null {
    return this.#byKey.get(hex(publicKey)) ?? null;
  }

  peerBySlot(slot: number): Peer | null {
    return this.#bySlot[slot] ?? null;
  }

  /**
   * The session slot on which a batch to this peer may be sealed now, or -1: then `stage` the packets. `sessionSeal` may
   * still refuse in mid-batch when the session's counter runs out: stage the rest.
   */
  prepareSend(slot: number, now: number): number {
    const peer = this.#bySlot[slot];
    if (!peer || !this.#reachable(peer)) return -1;
    const session = this.#usable(peer, now);
    if (!session) return -1;
    if (peer.staged.length > 0) this.#flushStaged(peer, now);
    return session.slot;
  }

  /** Keeps a copy of an IP packet until there is a session, and starts a handshake unless one is under way. */
  stage(slot: number, packet: Uint8Array, now: number): void {
    const peer = this.#bySlot[slot];
    if (!peer || packet.length > MAX_PACKET || this.#stagedBytes + packet.length > T.MAX_STAGED_BYTES) return;
    this.#stagedBytes += packet.length;
    this.#stagedBytes -= peer.pushStaged(packet.slice());
    this.#flushStaged(peer, now);
  }

  /** The sealer has packets for this peer and no session: starts a handshake unless one is under way. */
  want(slot: number, now: number): void {
    const peer = this.#bySlot[slot];
    if (!peer || (this.#usable(peer, now) && this.#reachable(peer))) return;
    // It stands for what waits there: handshakes are repeated for it, and it leaves as a keepalive.
    if (peer.staged.length === 0) peer.pushStaged(EMPTY);
    this.#flushStaged(peer, now);
  }

  /**
   * What the sealer did: data for `sent`, and the high 32 bits of the session's next counter. Nothing when the session is
   * no longer this peer's.
   */
  told(slot: number, session: number, sendCounterHigh: number, packets: number, bytes: number, now: number): void {
    const known = this.#sessions.bySlot(session);
    if (!known?.live || known.peerSlot !== slot) return;
    known.sendCounterHigh = sendCounterHigh;
    this.sent(slot, packets, bytes, now);
  }

  /** After a batch of data to this peer was sealed: `bytes` of whole messages. Rules 3, 4, 10, 11. */
  sent(slot: number, packets: number, bytes: number, now: number): void {
    const peer = this.#bySlot[slot];
    if (!peer || packets === 0) return;
    this.#dataSent(peer, bytes, now);
  }

  /**
   * After a batch from this peer was opened on one session: `bytes` of whole messages that `sessionOpen` accepted. Rules
   * 2, 3, 5, 11, and promotion of a session that our response made.
   */
  received(slot: number, sessionSlot: number, data: number, keepalives: number, bytes: number, now: number): void {
    const peer = this.#bySlot[slot];
    const session = this.#sessions.bySlot(sessionSlot);
    if (!peer || !session?.live || session.peerSlot !== slot || data + keepalives === 0) return;
    peer.rxBytes += bytes;
    if (session === peer.next) this.#promote(peer, session, now);
    this.#anyReceived(peer, now);
    if (data > 0) {
      if (peer.timers[Timer.Keepalive] === Number.POSITIVE_INFINITY) {
        this.#arm(peer, Timer.Keepalive, now + T.KEEPALIVE_TIMEOUT);
      } else peer.anotherKeepalive = true;
    }
    const { current } = peer;
    if (!peer.rekeyedOnReceive && current?.initiator && now - current.created > T.REKEY_ON_RECEIVE_AFTER_TIME) {
      peer.rekeyedOnReceive = true;
      this.#initiate(peer, now, false);
    }
  }

  /** Handshake messages and cookie replies. Null: accepted. Bytes may be a view that changes later. */
  handleHandshake(bytes: Uint8Array, from: Source, now: number): Drop | null {
    const type = messageType(bytes);
    if (type !== TYPE_INITIATION && type !== TYPE_RESPONSE && type !== TYPE_COOKIE_REPLY) return "malformed";
    if (!this.#identity || !this.#cookies) return "no-private-key";
    const message = bytes.slice();
    if (type === TYPE_COOKIE_REPLY) return this.#cookieReply(message, from, now);
    if (!this.#cookies.checkMac1(message)) return "mac1";
    const refused = this.#checkLoad(this.#cookies, message, from, now);
    if (refused) return refused;
    return type === TYPE_INITIATION
      ? this.#initiation(this.#identity, message, from, now)
      : this.#response(this.#identity, message, from, now);
  }

  /** Mode "wg": an authenticated packet came from this address. */
  roam(slot: number, addr: AddrPort): void {
    const peer = this.#bySlot[slot];
    if (peer && this.mode === "wg") peer.endpoint = addr;
  }

  /** Mode "mesh": how packets to this peer travel from now on. */
  setPath(slot: number, path: PeerPath, now: number): void {
    const peer = this.#bySlot[slot];
    if (!peer) return;
    peer.path = path;
    this.#resume(peer, now);
  }

  /** What has come up to send or to tell since the last call, in order. */
  drain(): Output[] {
    if (this.#outputs.length === 0) return NOTHING;
    const outputs = this.#outputs;
    this.#outputs = [];
    return outputs;
  }

  /** Absolute time in ms on the clock of `now`; Infinity: nothing is due ever. */
  nextTimeout(): number {
    return this.#deadlines.next();
  }

  handleTimeout(now: number): void {
    for (;;) {
      const slot = this.#deadlines.due(now);
      if (slot < 0) return;
      const peer = this.#bySlot[slot]!;
      for (const timer of TIMERS) {
        if (peer.timers[timer]! > now) continue;
        peer.timers[timer] = Number.POSITIVE_INFINITY;
        this.#fire(peer, timer, now);
      }
      this.#deadlines.set(slot, peer.nextDeadline);
    }
  }

  // --- configuration

  /** The sizes that the tables would reach, before any of it is done. */
  #checkCapacity(change: DeviceChange, identity: Identity | null): void {
    const own = identity ? hex(identity.publicKey) : "";
    const peers = new Set<string>(change.replacePeers ? [] : this.#byKey.keys());
    peers.delete(own);
    const applied: { key: string; change: PeerChange }[] = [];
    let prefixes = change.replacePeers ? 0 : this.allowedIPs.size;
    for (const peer of change.peers) {
      const key = hex(peer.publicKey);
      if (key === own || (peer.updateOnly && !peer.remove && !peers.has(key))) continue;
      if (peer.remove) peers.delete(key);
      else {
        peers.add(key);
        prefixes += peer.allowedIPs.length;
      }
      applied.push({ key, change: peer });
      if (peers.size > this.#maxPeers) {
        throw new RangeError(`too many peers: this device holds ${this.#maxPeers}; remove some first`);
      }
    }
    if (prefixes > this.allowedIPs.capacity) this.#checkPrefixes(change, applied);
  }

  /** The exact count, for when the rough one is too high. */
  #checkPrefixes(change: DeviceChange, applied: { key: string; change: PeerChange }[]): void {
    const owner = new Map<string, string>();
    if (!change.replacePeers) {
      for (const [key, peer] of this.#byKey)
        for (const prefix of this.allowedIPs.list(peer.slot)) owner.set(prefix, key);
    }
    for (const { key, change: peer } of applied) {
      if (peer.remove || peer.replaceAllowedIPs) {
        for (const [prefix, holder] of owner) if (holder === key) owner.delete(prefix);
      }
      if (peer.remove) continue;
      for (const { prefix, remove } of peer.allowedIPs) {
        const text = AllowedIPs.key(prefix);
        if (!remove) owner.set(text, key);
        else if (owner.get(text) === key) owner.delete(text);
        if (owner.size > this.allowedIPs.capacity) {
          throw new RangeError(
            `too many allowed IPs: this device holds ${this.allowedIPs.capacity}; remove some first`,
          );
        }
      }
    }
  }

  #setIdentity(identity: Identity | null): void {
    const old = this.#identity;
    if (old && identity && constantTimeEqual(old.privateKey, identity.privateKey)) {
      wipe(identity.privateKey);
      return;
    }
    if (old) wipe(old.privateKey);
    this.#identity = identity;
    this.#cookies = identity ? new CookieChecker(identity.publicKey, this.#random) : null;
    for (const peer of this.#byKey.values()) {
      this.#wipeSessions(peer);
      peer.forgetStaticShared();
      peer.lastHandshakeSent = Number.NEGATIVE_INFINITY;
      peer.attempts = 0;
      peer.timers.fill(Number.POSITIVE_INFINITY);
      this.#deadlines.set(peer.slot, Number.POSITIVE_INFINITY);
    }
    const self = identity ? this.peerByKey(identity.publicKey) : null;
    if (self) this.#removePeer(self);
  }

  #changePeer(change: PeerChange, now: number): void {
    let peer = this.peerByKey(change.publicKey);
    if (change.remove) {
      if (peer) this.#removePeer(peer);
      return;
    }
    if (!peer) {
      const own = this.#identity?.publicKey;
      if (change.updateOnly || (own && constantTimeEqual(own, change.publicKey))) return;
      peer = this.#addPeer(change.publicKey);
    }
    if (change.presharedKey) peer.presharedKey.set(change.presharedKey);
    if (change.endpoint) peer.endpoint = change.endpoint;
    if (change.replaceAllowedIPs) this.allowedIPs.removeAll(peer.slot);
    for (const { prefix, remove } of change.allowedIPs) {
      if (remove) this.allowedIPs.remove(prefix, peer.slot);
      else this.allowedIPs.insert(prefix, peer.slot);
    }
    if (change.persistentKeepalive !== null) {
      const turnedOn = peer.persistentKeepalive === 0 && change.persistentKeepalive > 0;
      peer.persistentKeepalive = change.persistentKeepalive;
      this.#arm(peer, Timer.Persistent, Number.POSITIVE_INFINITY);
      if (turnedOn) this.#sendKeepalive(peer, now);
      else this.#traversal(peer, now);
    }
    this.#resume(peer, now);
  }

  #addPeer(publicKey: Uint8Array): Peer {
    const slot = this.#freeSlots.pop() ?? this.#bySlot.length;
    const peer = new Peer(slot, publicKey);
    this.#bySlot[slot] = peer;
    this.#byKey.set(hex(publicKey), peer);
    return peer;
  }

  #removePeer(peer: Peer): void {
    this.allowedIPs.removeAll(peer.slot);
    this.#dropStaged(peer);
    this.#wipeSessions(peer);
    peer.cookies.wipe();
    peer.forgetStaticShared();
    wipe(peer.presharedKey);
    this.#deadlines.set(peer.slot, Number.POSITIVE_INFINITY);
    this.#sealer?.forget(peer.slot);
    this.#byKey.delete(hex(peer.publicKey));
    this.#bySlot[peer.slot] = null;
    this.#freeSlots.push(peer.slot);
  }

  #dumpPeer(peer: Peer): PeerDump {
    return {
      publicKey: peer.publicKey.slice(),
      presharedKey: peer.presharedKey.slice(),
      endpoint: this.mode === "wg" ? peer.endpoint : (peer.path.udp ?? null),
      persistentKeepalive: peer.persistentKeepalive,
      allowedIPs: this.allowedIPs.list(peer.slot),
      lastHandshake: Number.isNaN(peer.lastHandshake) ? 0 : peer.lastHandshake + this.unixOffset,
      rxBytes: peer.rxBytes,
      txBytes: peer.txBytes,
    };
  }

  // --- handshakes

  #checkLoad(cookies: CookieChecker, message: Uint8Array, from: Source, now: number): Drop | null {
    if (!this.#load.add(now)) return null;
    const source = sourceBytes(from);
    if (!cookies.checkMac2(message, source, now)) {
      const sender = new DataView(message.buffer).getUint32(4, true);
      this.#outputs.push({
        type: "send",
        slot: -1,
        data: cookies.reply(message, sender, source, now),
        to: copySource(from),
      });
      return "under-load";
    }
    return this.#limiter.allow(limiterKey(from, source), now) ? null : "rate-limit";
  }

  #initiation(identity: Identity, bytes: Uint8Array, from: Source, now: number): Drop | null {
    const message = parseInitiation(bytes)!;
    const state = openInitiationStatic(message, identity);
    if (!state) return "bad-handshake";
    const peer = this.peerByKey(state.remoteStatic);
    if (!peer) return "unknown-peer";
    if (!mayCarry(from, peer)) return "wrong-relay-peer";
    const shared = this.#staticShared(peer, identity);
    if (!shared) return "bad-handshake";
    const timestamp = openInitiationTimestamp(message, state, shared);
    if (!timestamp) return "bad-handshake";
    if (peer.lastTimestamp && Buffer.compare(timestamp, peer.lastTimestamp) <= 0) return "replayed";
    if (now - peer.lastInitiationReceived < T.MIN_INITIATION_INTERVAL) return "flood";

    const session = this.#sessions.reserve(peer.slot);
    const response = createResponse({
      state,
      ephemeralPrivate: generatePrivateKey(this.#random),
      presharedKey: peer.presharedKey,
      sender: session.localIndex,
      receiver: message.sender,
    });
    if (!response) {
      this.#sessions.release(session);
      return "bad-handshake";
    }
    peer.lastTimestamp = timestamp;
    peer.lastInitiationReceived = now;
    this.#heard(peer, from, INITIATION_SIZE, now);

    this.#sessions.install(session, response.keys, message.sender, false, now);
    if (peer.next) this.#sessions.release(peer.next);
    peer.next = session;
    peer.nextStarted = now;
    this.#sessionDerived(peer, now);
    peer.lastHandshakeSent = now;
    peer.cookies.sign(response.message, now);
    this.#answer(peer, from, response.message);
    this.#anySent(peer, now);
    return null;
  }

  #response(identity: Identity, bytes: Uint8Array, from: Source, now: number): Drop | null {
    const message = parseResponse(bytes)!;
    const session = this.#sessions.find(message.receiver);
    const peer = session ? this.#bySlot[session.peerSlot] : null;
    const pending = peer?.handshake;
    if (!session || !peer || pending?.session !== session) return "no-handshake";
    if (!mayCarry(from, peer)) return "wrong-relay-peer";
    const keys = consumeResponse(message, pending.state, identity, peer.presharedKey);
    if (!keys) return "bad-handshake";
    this.#heard(peer, from, RESPONSE_SIZE, now);

    wipeInitiator(pending.state);
    peer.handshake = null;
    this.#sessions.install(session, keys, message.sender, true, now);
    if (peer.current) this.#retire(peer, peer.current);
    // The peer has this one from our response and may send on it before it has seen ours.
    if (peer.next) this.#retire(peer, peer.next);
    peer.next = null;
    this.#sendOn(peer, session, now);
    this.#sessionDerived(peer, now);
    this.#handshakeComplete(peer, now);
    this.#outputs.push({ type: "handshake", slot: peer.slot, ms: now - pending.started, initiator: true });
    this.#sendKeepalive(peer, now);
    return null;
  }

  #cookieReply(bytes: Uint8Array, from: Source, now: number): Drop | null {
    const message = parseCookieReply(bytes)!;
    const session = this.#sessions.find(message.receiver);
    const peer = session ? this.#bySlot[session.peerSlot] : null;
    if (!peer) return "no-handshake";
    if (!mayCarry(from, peer)) return "wrong-relay-peer";
    if (!peer.cookies.accept(message, now)) return "bad-cookie";
    peer.rxBytes += bytes.length;
    return null;
  }

  /** Sends an initiation, unless a handshake message went out less than 5 s ago (rule 7). */
  #initiate(peer: Peer, now: number, retry: boolean): void {
    const identity = this.#identity;
    if (!identity) return;
    if (!retry) peer.attempts = 0;
    if (now - peer.lastHandshakeSent < T.REKEY_TIMEOUT) {
      // If the last one was a response that got lost, nothing else would remember what waits here.
      const armed = peer.timers[Timer.Retransmit] !== Number.POSITIVE_INFINITY;
      if (peer.staged.length > 0 && !armed) this.#armRetransmit(peer, peer.lastHandshakeSent);
      return;
    }
    if (!this.#reachable(peer)) {
      // Tried again with the clock of a sent one; `#resume` is quicker when a way is found.
      if (peer.timers[Timer.Retransmit] === Number.POSITIVE_INFINITY) this.#armRetransmit(peer, now);
      return;
    }
    const staticShared = this.#staticShared(peer, identity);
    if (!staticShared) return;
    this.#dropHandshake(peer);
    const session = this.#sessions.reserve(peer.slot);
    const ephemeralPrivate = generatePrivateKey(this.#random);
    const initiation = createInitiation({
      identity,
      remoteStatic: peer.publicKey,
      staticShared,
      ephemeralPrivate,
      sender: session.localIndex,
      timestamp: this.#timestamp(peer, now),
    });
    if (!initiation) {
      wipe(ephemeralPrivate);
      this.#sessions.release(session);
      return;
    }
    peer.handshake = { state: initiation.state, session, started: now };
    peer.lastHandshakeSent = now;
    peer.cookies.sign(initiation.message, now);
    this.#emit(peer, initiation.message);
    this.#anySent(peer, now);
    this.#armRetransmit(peer, now);
  }

  /** Later than every timestamp that this peer had from us, even if the wall clock went back. */
  #timestamp(peer: Peer, now: number): Uint8Array {
    let unix = blur(BigInt(Math.floor(now + this.unixOffset)) * 1_000_000n);
    if (unix <= peer.lastTimestampSent) unix = blur(peer.lastTimestampSent + TIMESTAMP_STEP);
    peer.lastTimestampSent = unix;
    return tai64n(unix);
  }

  #staticShared(peer: Peer, identity: Identity): Uint8Array | null {
    peer.staticShared ??= x25519(identity.privateKey, peer.publicKey);
    return peer.staticShared;
  }

  /** A handshake message proved to be the peer's. */
  #heard(peer: Peer, from: Source, bytes: number, now: number): void {
    peer.rxBytes += bytes;
    if (this.mode === "wg" && from.kind === "udp") peer.endpoint = from.addr;
    this.#anyReceived(peer, now);
  }

  // --- sessions

  /** The session to send data on, if there is one that may. */
  #usable(peer: Peer, now: number): Session | null {
    const { current } = peer;
    if (!current || now - current.created >= T.REJECT_AFTER_TIME || !this.#sessions.canSend(current)) return null;
    return current;
  }

  #sendOn(peer: Peer, session: Session | null, now: number): void {
    if (peer.current === session) return;
    peer.current = session;
    this.#sealer?.use(
      peer.slot,
      session ? session.slot : -1,
      session ? session.created + T.REJECT_AFTER_TIME - now : 0,
    );
  }

  /** The first packet came on the session that our response made: from now on we send on it. */
  #promote(peer: Peer, session: Session, now: number): void {
    if (peer.current) this.#retire(peer, peer.current);
    this.#sendOn(peer, session, now);
    peer.next = null;
    this.#dropHandshake(peer);
    this.#handshakeComplete(peer, now);
    this.#outputs.push({ type: "handshake", slot: peer.slot, ms: now - peer.nextStarted, initiator: false });
    this.#flushStaged(peer, now);
  }

  /**
   * The protocol names one previous session. Some more are kept for what is still on its way (until they are 180 s old,
   * as any session): when both sides initiate at once, each sends on another one for a moment.
   */
  #retire(peer: Peer, session: Session): void {
    peer.retired.unshift(session);
    if (peer.retired.length > MAX_RETIRED) this.#sessions.release(peer.retired.pop()!);
  }

  #sessionDerived(peer: Peer, now: number): void {
    this.#arm(peer, Timer.Wipe, now + T.WIPE_AFTER_TIME);
    this.#armExpire(peer);
  }

  #handshakeComplete(peer: Peer, now: number): void {
    this.#arm(peer, Timer.Retransmit, Number.POSITIVE_INFINITY);
    peer.attempts = 0;
    peer.rekeyedOnReceive = false;
    peer.lastHandshake = now;
  }

  #dropHandshake(peer: Peer): void {
    if (!peer.handshake) return;
    wipeInitiator(peer.handshake.state);
    this.#sessions.release(peer.handshake.session);
    peer.handshake = null;
  }

  #wipeSessions(peer: Peer): void {
    this.#dropHandshake(peer);
    const sessions = [peer.current, peer.next, ...peer.retired];
    this.#sendOn(peer, null, 0);
    for (const session of sessions) if (session) this.#sessions.release(session);
    peer.next = null;
    peer.retired = [];
  }

  #expireSessions(peer: Peer, now: number): void {
    const expired = (session: Session | null): boolean => {
      if (!session || now - session.created < T.REJECT_AFTER_TIME) return false;
      this.#sessions.release(session);
      return true;
    };
    if (expired(peer.current)) this.#sendOn(peer, null, now);
    if (expired(peer.next)) peer.next = null;
    peer.retired = peer.retired.filter((session) => !expired(session));
    this.#armExpire(peer);
  }

  // --- sending

  #reachable(peer: Peer): boolean {
    return this.mode === "wg" ? peer.endpoint !== null : peer.path.udp !== undefined || peer.path.relay === true;
  }

  /** A way to the peer was found, or its configuration changed: what waited for that goes on. */
  #resume(peer: Peer, now: number): void {
    if (!this.#reachable(peer)) return;
    const waiting = peer.timers[Timer.Retransmit] !== Number.POSITIVE_INFINITY && !peer.handshake;
    if (peer.staged.length > 0) this.#flushStaged(peer, now);
    else if (waiting) this.#initiate(peer, now, false);
  }

  /** Seals and sends what waits, or starts a handshake for it. */
  #flushStaged(peer: Peer, now: number): void {
    if (peer.staged.length === 0) return;
    const session = this.#usable(peer, now);
    if (!session || !this.#reachable(peer)) {
      this.#initiate(peer, now, false);
      return;
    }
    let bytes = 0;
    for (;;) {
      const packet = peer.staged[0];
      const message = packet ? this.#seal(peer, session, packet) : null;
      if (!packet || !message) break;
      peer.staged.shift();
      this.#stagedBytes -= packet.length;
      bytes += message.type === "send" ? message.data.length : TRANSPORT_OVERHEAD;
      this.#outputs.push(message);
    }
    if (bytes > 0) this.#dataSent(peer, bytes, now);
    if (peer.staged.length > 0) this.#initiate(peer, now, false);
  }

  /** An empty message, or better what waits to be sent. Without a session this makes one. */
  #sendKeepalive(peer: Peer, now: number): void {
    if (peer.staged.length > 0) {
      this.#flushStaged(peer, now);
      return;
    }
    const session = this.#usable(peer, now);
    const message = session && this.#reachable(peer) ? this.#seal(peer, session, EMPTY) : null;
    if (!message) {
      this.#initiate(peer, now, false);
      return;
    }
    peer.txBytes += TRANSPORT_OVERHEAD;
    this.#outputs.push(message);
    this.#anySent(peer, now);
    this.#rekeyOnSend(peer, now);
  }

  /** Null when the session is used up. */
  #seal(peer: Peer, session: Session, packet: Uint8Array): (Output & { type: "send" | "keepalive" }) | null {
    if (this.#sealer) return { type: "keepalive", slot: peer.slot, session: session.slot };
    const { u8, exports } = this.#asm;
    const p = this.#scratch + TRANSPORT_HEADER_SIZE;
    const length = paddedLength(packet.length, this.mtu);
    u8.set(packet, p);
    u8.fill(0, p + packet.length, p + length);
    if (exports.sessionSeal(session.slot, p, length) === 0) {
      u8.fill(0, p, p + packet.length);
      return null;
    }
    const data = u8.slice(this.#scratch, this.#scratch + length + TRANSPORT_OVERHEAD);
    return { type: "send", slot: peer.slot, data };
  }

  #dropStaged(peer: Peer): void {
    this.#sealer?.dropStaged(peer.slot);
    for (const packet of peer.staged) this.#stagedBytes -= packet.length;
    peer.staged.length = 0;
  }

  #emit(peer: Peer, data: Uint8Array): void {
    peer.txBytes += data.length;
    this.#outputs.push({ type: "send", slot: peer.slot, data });
  }

  /** By the peer's path, and in a mesh also back where the question came from: that way is known to work just now. */
  #answer(peer: Peer, from: Source, data: Uint8Array): void {
    if (this.#reachable(peer)) this.#emit(peer, data);
    const { path } = peer;
    if (this.mode === "wg" || (from.kind === "udp" ? path.udp === from.addr : path.relay === true)) return;
    peer.txBytes += data.length;
    this.#outputs.push({ type: "send", slot: peer.slot, data, to: copySource(from) });
  }

  // --- timers

  #fire(peer: Peer, timer: Timer, now: number): void {
    switch (timer) {
      case Timer.Expire:
        this.#expireSessions(peer, now);
        return;
      case Timer.Wipe:
        this.#wipeSessions(peer);
        this.#dropStaged(peer);
        peer.cookies.wipe();
        return;
      case Timer.Retransmit:
        this.#retransmit(peer, now);
        return;
      case Timer.Keepalive: {
        const another = peer.anotherKeepalive;
        this.#sendKeepalive(peer, now);
        if (another) this.#arm(peer, Timer.Keepalive, now + T.KEEPALIVE_TIMEOUT);
        return;
      }
      case Timer.NewHandshake:
        this.#outputs.push({ type: "forgetSource", slot: peer.slot });
        this.#initiate(peer, now, false);
        return;
      case Timer.Persistent:
        this.#traversal(peer, now);
        this.#sendKeepalive(peer, now);
        return;
    }
  }

  /** Rule 1. */
  #retransmit(peer: Peer, now: number): void {
    if (peer.attempts > T.MAX_HANDSHAKE_ATTEMPTS) {
      this.#arm(peer, Timer.Keepalive, Number.POSITIVE_INFINITY);
      this.#dropStaged(peer);
      if (peer.timers[Timer.Wipe] === Number.POSITIVE_INFINITY) {
        this.#arm(peer, Timer.Wipe, now + T.WIPE_AFTER_TIME);
      }
      return;
    }
    peer.attempts++;
    this.#outputs.push({ type: "forgetSource", slot: peer.slot });
    this.#initiate(peer, now, true);
  }

  /** Rules 3, 4, 10, 11 for data that was sent. */
  #dataSent(peer: Peer, bytes: number, now: number): void {
    peer.txBytes += bytes;
    this.#anySent(peer, now);
    if (peer.timers[Timer.NewHandshake] === Number.POSITIVE_INFINITY) {
      this.#arm(peer, Timer.NewHandshake, now + T.KEEPALIVE_TIMEOUT + T.REKEY_TIMEOUT + this.#nextJitter());
    }
    this.#rekeyOnSend(peer, now);
  }

  /** Rules 4 and 6. */
  #rekeyOnSend(peer: Peer, now: number): void {
    const { current } = peer;
    if (!current) return;
    const old = current.initiator && now - current.created > T.REKEY_AFTER_TIME;
    if (old || this.#sessions.sendCounterHigh(current) >= T.REKEY_AFTER_MESSAGES_HIGH) this.#initiate(peer, now, false);
  }

  #anySent(peer: Peer, now: number): void {
    peer.timers[Timer.Keepalive] = Number.POSITIVE_INFINITY;
    peer.anotherKeepalive = false;
    this.#traversal(peer, now);
  }

  #anyReceived(peer: Peer, now: number): void {
    peer.timers[Timer.NewHandshake] = Number.POSITIVE_INFINITY;
    this.#traversal(peer, now);
  }

  /** Rule 11. */
  #traversal(peer: Peer, now: number): void {
    if (peer.persistentKeepalive > 0) peer.timers[Timer.Persistent] = now + peer.persistentKeepalive * 1000;
    this.#deadlines.set(peer.slot, peer.nextDeadline);
  }

  #arm(peer: Peer, timer: Timer, due: number): void {
    peer.timers[timer] = due;
    this.#deadlines.set(peer.slot, peer.nextDeadline);
  }

  #armRetransmit(peer: Peer, now: number): void {
    this.#arm(peer, Timer.Retransmit, now + T.REKEY_TIMEOUT + this.#nextJitter());
  }

  #armExpire(peer: Peer): void {
    let oldest = Number.POSITIVE_INFINITY;
    for (const session of [peer.current, peer.next, ...peer.retired]) {
      if (session) oldest = Math.min(oldest, session.created);
    }
    this.#arm(peer, Timer.Expire, oldest + T.REJECT_AFTER_TIME);
  }

  /** 0 to 333 ms. */
  #nextJitter(): number {
    if (this.#jitterUsed + 2 > this.#jitter.length) {
      this.#jitter = this.#random(128);
      this.#jitterUsed = 0;
    }
    const value = this.#jitter[this.#jitterUsed]! | (this.#jitter[this.#jitterUsed + 1]! << 8);
    this.#jitterUsed += 2;
    return value % (T.MAX_JITTER + 1);
  }
}

/** Null for 32 zero bytes. */
function identityOf(privateKey: Uint8Array): Identity | null {
  if (isZeroKey(privateKey)) return null;
  return { privateKey, publicKey: x25519Public(privateKey) };
}

function blur(nanoseconds: bigint): bigint {
  const fraction = nanoseconds % SECOND_NS;
  return nanoseconds - (fraction % TIMESTAMP_STEP);
}

/** A relay vouches for the static key of the sender: a message of anybody else in its name is not for us. */
function mayCarry(from: Source, peer: Peer): boolean {
  return from.kind === "udp" || constantTimeEqual(from.peer, peer.publicKey);
}

function copySource(from: Source): Source {
  return from.kind === "udp" ? { kind: "udp", addr: from.addr } : { kind: "relay", peer: from.peer.slice() };
}

/** Address and port, or the key: what a cookie is bound to. */
function sourceBytes(from: Source): Uint8Array {
  if (from.kind === "relay") return from.peer.slice();
  const parsed = parseAddrPort(from.addr);
  return parsed
    ? Uint8Array.of(...parsed.ip, parsed.port >> 8, parsed.port & 0xff)
    : new TextEncoder().encode(from.addr);
}

/** One IPv4 address, one IPv6 /64, one key behind the relay. */
function limiterKey(from: Source, source: Uint8Array): string {
  if (from.kind === "relay") return `relay ${hex(source)}`;
  return hex(source.length === 6 ? source.subarray(0, 4) : source.subarray(0, 8));
}
