// What the sender Worker knows of peers and sessions, and packets that wait for a session: it does for the sender what
// prepareSend, stage and sent of the Device do for a Worker that has all. No I/O, no clock.
import type { Asm } from "../crypto/wasm.ts";
import { paddedLength, TRANSPORT_HEADER_SIZE, TRANSPORT_OVERHEAD } from "../wire/wireguard.ts";
import { MAX_STAGED_BYTES, MAX_STAGED_PACKETS } from "../wireguard/constants.ts";
import { sessionTableSlots } from "../wireguard/sessions.ts";
import "../wireguard/asm.ts";

const MAX_PACKET = 65535 - TRANSPORT_OVERHEAD - 16;
const EMPTY = new Uint8Array(0);

export interface SendingHooks {
  /** There is a way to the peer. */
  reachable(slot: number): boolean;
  /** A message to send; the bytes are a view that changes later. */
  send(slot: number, message: Uint8Array, now: number): void;
  /** Data was sealed; `counterHigh`: high 32 bits of the session's next counter. */
  sent(slot: number, session: number, packets: number, bytes: number, counterHigh: number): void;
}

export class SendingPeers {
  mtu: number;
  /** Peers that wait for a session: the device is to be asked. The owner takes them out. */
  readonly wanted = new Set<number>();
  readonly #asm: Asm;
  readonly #hooks: SendingHooks;
  /** By peer: the session to send on or -1, and until when. */
  readonly #session: Int32Array;
  readonly #until: Float64Array;
  readonly #staged = new Map<number, Uint8Array[]>();
  #stagedBytes = 0;
  /** Peers whose packets may be able to go now. */
  readonly #resumed = new Set<number>();
  readonly #keys: number;
  readonly #scratch: number;

  /** Takes the session table of this module instance. */
  constructor(asm: Asm, maxPeers: number, mtu: number, hooks: SendingHooks) {
    this.#asm = asm;
    this.#hooks = hooks;
    this.mtu = mtu;
    this.#session = new Int32Array(maxPeers).fill(-1);
    this.#until = new Float64Array(maxPeers);
    const sessions = sessionTableSlots(maxPeers);
    asm.exports.sessionTableInit(asm.alloc(asm.exports.sessionTableSize(sessions), 64), sessions);
    this.#keys = asm.alloc(64, 16);
    this.#scratch = asm.alloc(65536 + 64, 64);
  }

  // --- packets

  /** The session on which a batch to this peer may be sealed now, or -1: then `stage` the packets. */
  prepareSend(slot: number, now: number): number {
    const session = this.#session[slot]!;
    if (session < 0 || now >= this.#until[slot]! || !this.#hooks.reachable(slot)) return -1;
    if (this.#staged.has(slot)) this.#flushStaged(slot, session, now);
    return this.#staged.has(slot) ? -1 : session;
  }

  /** Keeps a copy of an IP packet until there is a session. Of a peer that has too many the oldest goes. */
  stage(slot: number, packet: Uint8Array): void {
    if (packet.length > MAX_PACKET || this.#stagedBytes + packet.length > MAX_STAGED_BYTES) return;
    let staged = this.#staged.get(slot);
    if (!staged) {
      staged = [];
      this.#staged.set(slot, staged);
    }
    staged.push(packet.slice());
    this.#stagedBytes += packet.length;
    if (staged.length > MAX_STAGED_PACKETS) this.#stagedBytes -= staged.shift()!.length;
    this.wanted.add(slot);
  }

  /** After a batch of data to this peer was sealed: `bytes` of whole messages. */
  sent(slot: number, packets: number, bytes: number): void {
    const session = this.#session[slot]!;
    if (session < 0) return;
    const counterHigh = this.#asm.exports.sessionSendCounterHi(session) >>> 0;
    this.#hooks.sent(slot, session, packets, bytes, counterHigh);
  }

  #flushStaged(slot: number, session: number, now: number): void {
    const staged = this.#staged.get(slot) ?? [];
    let done = 0;
    for (const packet of staged) {
      if (!this.#seal(slot, session, packet, now)) break;
      done++;
      this.#stagedBytes -= packet.length;
      this.sent(slot, 1, paddedLength(packet.length, this.mtu) + TRANSPORT_OVERHEAD);
    }
    if (done === staged.length) this.#staged.delete(slot);
    else this.#staged.set(slot, staged.slice(done));
  }

  /** One packet by itself. False when the session cannot seal any more. */
  #seal(slot: number, session: number, packet: Uint8Array, now: number): boolean {
    const { u8, exports } = this.#asm;
    const p = this.#scratch + TRANSPORT_HEADER_SIZE;
    const length = paddedLength(packet.length, this.mtu);
    u8.set(packet, p);
    u8.fill(0, p + packet.length, p + length);
    if (exports.sessionSeal(session, p, length) === 0) return false;
    this.#hooks.send(slot, u8.subarray(this.#scratch, this.#scratch + length + TRANSPORT_OVERHEAD), now);
    return true;
  }

  // --- what the device says

  install(session: number, peer: number, localIndex: number, remoteIndex: number, key: Uint8Array): void {
    const { u8, exports } = this.#asm;
    u8.set(key, this.#keys);
    exports.sessionInstall(session, this.#keys, this.#keys + 32, localIndex, remoteIndex, peer);
    u8.fill(0, this.#keys, this.#keys + 32);
  }

  wipe(session: number): void {
    const { exports } = this.#asm;
    const peer = exports.sessionPeer(session);
    if (this.#session[peer] === session) this.#session[peer] = -1;
    exports.sessionWipe(session);
  }

  use(slot: number, session: number, ms: number, now: number): void {
    this.#session[slot] = session;
    this.#until[slot] = now + ms;
    this.#resumed.add(slot);
  }

  dropStaged(slot: number): void {
    for (const packet of this.#staged.get(slot) ?? []) this.#stagedBytes -= packet.length;
    this.#staged.delete(slot);
    this.wanted.delete(slot);
  }

  keepalive(slot: number, session: number, now: number): void {
    // Better what waits than nothing.
    if (this.#staged.has(slot)) this.#resumed.add(slot);
    else this.#seal(slot, session, EMPTY, now);
  }

  /** A way to the peer may have been found. */
  resume(slot: number): void {
    this.#resumed.add(slot);
  }

  /** After all that the device said: what waited for it goes out. */
  settle(now: number): void {
    for (const slot of this.#resumed) if (this.#staged.has(slot)) this.prepareSend(slot, now);
    this.#resumed.clear();
  }
}
