// The door to the session table in wasm memory (asm/session.ts), and the index table: which index belongs to which peer
// and to what, a handshake that waits for its response or a session (spec/datapath-wire.md 1.7).
import { wipe } from "../crypto/keys.ts";
import type { Asm } from "../crypto/wasm.ts";
import type { TransportKeys } from "./handshake.ts";
import type { Sealer } from "./sealer.ts";
import "./asm.ts";

/** One current, one next, three retired, one handshake. */
const SESSIONS_PER_PEER = 6;

/** A power of two that holds the sessions of so many peers. */
export function sessionTableSlots(maxPeers: number): number {
  return 2 ** Math.ceil(Math.log2(maxPeers * SESSIONS_PER_PEER));
}

export interface Session {
  /** Place in the table; the low bits of `localIndex`. */
  readonly slot: number;
  readonly localIndex: number;
  readonly peerSlot: number;
  /** False while the index only belongs to a handshake. */
  live: boolean;
  initiator: boolean;
  /** ms; when the keys were derived. */
  created: number;
  /** Told by a sealer. */
  sendCounterHigh: number;
}

export class SessionTable {
  readonly #asm: Asm;
  readonly #random: (n: number) => Uint8Array;
  readonly #slots: (Session | null)[];
  readonly #free: number[] = [];
  /** 64 bytes for keys on their way into the table. */
  readonly #keys: number;
  readonly #sealer: Sealer | null;

  /** `size`: a power of two. With a `sealer` this table only opens: keys to send with go there. */
  constructor(asm: Asm, random: (n: number) => Uint8Array, size: number, sealer: Sealer | null = null) {
    this.#asm = asm;
    this.#sealer = sealer;
    this.#random = random;
    this.#slots = new Array(size).fill(null);
    for (let slot = size - 1; slot >= 0; slot--) this.#free.push(slot);
    this.#keys = asm.alloc(64, 16);
    asm.exports.sessionTableInit(asm.alloc(asm.exports.sessionTableSize(size), 64), size);
  }

  static memoryNeeded(asm: Asm, size: number): number {
    return asm.exports.sessionTableSize(size) + 64 + 64;
  }

  /** A fresh index for a handshake. Throws when all are taken, which the number of peers rules out. */
  reserve(peerSlot: number): Session {
    const slot = this.#free.pop();
    if (slot === undefined) throw new Error(`WireGuard: all ${this.#slots.length} session slots are taken`);
    const random = this.#random(4);
    const high = new DataView(random.buffer, random.byteOffset, 4).getUint32(0, true);
    const mask = this.#slots.length - 1;
    const localIndex = ((high & ~mask) | slot) >>> 0;
    const session: Session = {
      slot,
      localIndex,
      peerSlot,
      live: false,
      initiator: false,
      created: 0,
      sendCounterHigh: 0,
    };
    this.#slots[slot] = session;
    return session;
  }

  /** Makes a reserved index a session. `keys` are wiped. */
  install(session: Session, keys: TransportKeys, remoteIndex: number, initiator: boolean, now: number): void {
    const { u8, exports } = this.#asm;
    if (this.#sealer) this.#sealer.install(session.slot, session.peerSlot, session.localIndex, remoteIndex, keys.send);
    else u8.set(keys.send, this.#keys);
    u8.set(keys.receive, this.#keys + 32);
    wipe(keys.send);
    wipe(keys.receive);
    exports.sessionInstall(
      session.slot,
      this.#keys,
      this.#keys + 32,
      session.localIndex,
      remoteIndex,
      session.peerSlot,
    );
    u8.fill(0, this.#keys, this.#keys + 64);
    if (this.#sealer) exports.sessionNeverSeal(session.slot);
    session.live = true;
    session.initiator = initiator;
    session.created = now;
  }

  /** Wipes the keys and gives the index back. */
  release(session: Session): void {
    if (this.#slots[session.slot] !== session) return;
    if (session.live) {
      this.#asm.exports.sessionWipe(session.slot);
      this.#sealer?.wipe(session.slot);
    }
    session.live = false;
    this.#slots[session.slot] = null;
    this.#free.push(session.slot);
  }

  /** By the index that the peer put into a message. */
  find(localIndex: number): Session | null {
    const session = this.#slots[localIndex & (this.#slots.length - 1)];
    return session?.localIndex === localIndex ? session : null;
  }

  bySlot(slot: number): Session | null {
    return this.#slots[slot] ?? null;
  }

  /** Indices in use, sessions and handshakes. */
  get used(): number {
    return this.#slots.length - this.#free.length;
  }

  /** False when the counter is used up; a sealer of its own sees to that itself. */
  canSend(session: Session): boolean {
    if (this.#sealer) return session.live;
    return this.#asm.exports.sessionCanSend(session.slot) === 1;
  }

  /** High 32 bits of the counter of the next message; with a sealer, as it last told. */
  sendCounterHigh(session: Session): number {
    if (this.#sealer) return session.sendCounterHigh;
    return this.#asm.exports.sessionSendCounterHi(session.slot) >>> 0;
  }
}
