// What a device knows about one peer. Only device.ts changes it.
import { wipe } from "../crypto/keys.ts";
import type { AddrPort } from "../wire/ip.ts";
import type { PeerPath } from "./config.ts";
import { MAX_STAGED_PACKETS } from "./constants.ts";
import { CookieJar } from "./cookie.ts";
import type { InitiatorState } from "./handshake.ts";
import type { Session } from "./sessions.ts";

/** Timers of a peer, in the order in which those that are due at the same time run. */
export const Timer = {
  /** Sessions that are 180 s old are wiped. */
  Expire: 0,
  /** Rule 9: all keys are wiped. */
  Wipe: 1,
  /** Rule 1: the initiation was not answered. */
  Retransmit: 2,
  /** Rule 2: we received data and sent nothing. */
  Keepalive: 3,
  /** Rule 3: we sent data and received nothing. */
  NewHandshake: 4,
  /** Rules 10 and 11. */
  Persistent: 5,
} as const;
export type Timer = (typeof Timer)[keyof typeof Timer];
const TIMERS = 6;

/** An initiation of ours that waits for its response. */
export interface PendingHandshake {
  state: InitiatorState;
  /** The reserved index, which becomes the session. */
  session: Session;
  /** ms; when the initiation was sent. */
  started: number;
}

export class Peer {
  readonly slot: number;
  readonly publicKey: Uint8Array;
  readonly presharedKey = new Uint8Array(32);
  /** Mode "wg": where the peer was last heard, or was configured to be. */
  endpoint: AddrPort | null = null;
  /** Mode "mesh". */
  path: PeerPath = {};
  /** Seconds; 0: off. */
  persistentKeepalive = 0;
  rxBytes = 0;
  txBytes = 0;
  /** ms on the device's clock; NaN: never. */
  lastHandshake = Number.NaN;

  /** The session that we send on. */
  current: Session | null = null;
  /** Made by our response; we send on it once the peer did. */
  next: Session | null = null;
  /** Sessions on which packets may still be on their way, newest first. */
  retired: Session[] = [];
  /** ms; when the initiation behind `next` came. */
  nextStarted = 0;

  handshake: PendingHandshake | null = null;
  /** DH of the two static keys; null: not computed yet. */
  staticShared: Uint8Array | null = null;
  readonly cookies: CookieJar;
  /** TAI64N of the last initiation that we accepted. */
  lastTimestamp: Uint8Array | null = null;
  lastInitiationReceived = Number.NEGATIVE_INFINITY;
  /** Unix nanoseconds in our last initiation. */
  lastTimestampSent = 0n;
  /** ms; an initiation or a response. */
  lastHandshakeSent = Number.NEGATIVE_INFINITY;
  attempts = 0;
  /** Rule 5 has initiated for the current session. */
  rekeyedOnReceive = false;

  /** Data came while the keepalive timer ran. */
  anotherKeepalive = false;
  /** Deadlines in ms by Timer; Infinity: off. */
  readonly timers = new Float64Array(TIMERS).fill(Number.POSITIVE_INFINITY);

  /** Packets that wait for a session, oldest first. */
  readonly staged: Uint8Array[] = [];

  constructor(slot: number, publicKey: Uint8Array) {
    this.slot = slot;
    this.publicKey = publicKey;
    this.cookies = new CookieJar(publicKey);
  }

  get nextDeadline(): number {
    let due = Number.POSITIVE_INFINITY;
    for (let i = 0; i < TIMERS; i++) if (this.timers[i]! < due) due = this.timers[i]!;
    return due;
  }

  /** Bytes that went out of the queue because of the new packet. */
  pushStaged(packet: Uint8Array): number {
    this.staged.push(packet);
    return this.staged.length > MAX_STAGED_PACKETS ? this.staged.shift()!.length : 0;
  }

  forgetStaticShared(): void {
    if (this.staticShared) wipe(this.staticShared);
    this.staticShared = null;
  }
}
