// From the TUN to the network: superpackets are split into runs, a run is sealed in one call and leaves as few messages.
//
// A run is a row of datagrams for one session, all of one size but the last, which may be shorter and then ends it; and all
// with the same ECN field, which the outer header repeats (RFC 6040; DSCP is not shown to those in between). It lies
// in the arena just as it goes on the wire:
//   header 16 | plaintext, zero-padded to 16 within the MTU | tag 16 || header 16 | ...
// Runs grow over several reads of the TUN, until 64 KB wait or the TUN is empty.
import type { Asm } from "../crypto/wasm.ts";
import type { Peer } from "../wireguard/peer.ts";
import { type Crew, SHARED_BYTES } from "./crew.ts";
import { Outbox } from "./outbox.ts";
import type { PeerPaths } from "./peer-paths.ts";
import "./asm.ts";

const OVERHEAD = 32;
const HEADER = 16;
/** Sealed bytes that wait at most: more does not pay, and fills the caches. */
const FLUSH_BYTES = 64 << 10;
const ARENA_BYTES = 192 << 10;
const MAX_RUNS = 512;

/** What is known of the peers here: the Device, or the copy of another thread (sender.ts). */
export interface Peers {
  prepareSend(slot: number, now: number): number;
  stage(slot: number, packet: Uint8Array, now: number): void;
  sent(slot: number, packets: number, bytes: number, now: number): void;
  peerBySlot(slot: number): Peer | null;
}

export interface TransmitHooks {
  /** Hands what the device has to send to `message`: it goes before the data that waits. */
  drain(now: number): void;
  /** A sealed message for the relay: `length` bytes at `start` of the wasm memory. */
  relay(slot: number, start: number, length: number): void;
  /** User data goes to this peer. */
  activity(slot: number, now: number): void;
}

export class Transmitter {
  readonly v4: Outbox;
  readonly v6: Outbox;
  mtu: number;
  packets = 0;
  /** Packets whose session ended between look-up and sealing, and relay-only ones that found the ring full. */
  unsealed = 0;
  readonly #asm: Asm;
  readonly #device: Peers;
  readonly #paths: PeerPaths;
  readonly #hooks: TransmitHooks;
  readonly #arena: number;
  readonly #split: number;
  #end: number;
  #runs = 0;
  readonly #slot = new Int32Array(MAX_RUNS);
  readonly #ecn = new Uint8Array(MAX_RUNS);
  readonly #session = new Int32Array(MAX_RUNS);
  readonly #start = new Int32Array(MAX_RUNS);
  readonly #count = new Int32Array(MAX_RUNS);
  readonly #stride = new Int32Array(MAX_RUNS);
  readonly #last = new Int32Array(MAX_RUNS);
  readonly #sealed = new Int32Array(MAX_RUNS);
  readonly #crew: Crew | null;

  constructor(
    asm: Asm,
    base: number,
    device: Peers,
    paths: PeerPaths,
    hooks: TransmitHooks,
    options: { mtu: number; fd4: number; fd6: number; gso4: boolean; gso6: boolean },
    crew: Crew | null = null,
  ) {
    this.#crew = crew;
    this.#asm = asm;
    this.#device = device;
    this.#paths = paths;
    this.#hooks = hooks;
    this.mtu = options.mtu;
    this.v4 = new Outbox(asm, base, options.fd4, options.gso4, paths);
    this.v6 = new Outbox(asm, base, options.fd6, options.gso6, paths);
    // Behind the arena there is room for one more datagram of any size.
    this.#arena = asm.alloc(ARENA_BYTES + (65536 << 1));
    this.#split = asm.exports.splitPtr() >> 2;
    this.#end = this.#arena;
  }

  /** One read of the TUN: `length` bytes at `p`, its vnet header at `vnet` (0: none). */
  packet(p: number, length: number, vnet: number, now: number): void {
    const { exports, u32 } = this.#asm;
    const slot = exports.txPrepare(p, length, vnet);
    if (slot < 0) return;
    const n = u32[this.#split + 2]!;
    const segment = u32[this.#split + 5]!;
    const last = u32[this.#split + 6]!;
    this.packets += n;
    const session = this.#device.prepareSend(slot, now);
    if (session < 0) {
      this.#stage(slot, n, segment, last, now);
      return;
    }
    const padded = this.#padded(segment);
    const lastPadded = this.#padded(last);
    const stride = padded + OVERHEAD;
    const ecn = u32[this.#split + 10]!;
    for (let first = 0; first < n; ) {
      if (this.#end + stride > this.#arena + ARENA_BYTES || this.#runs === MAX_RUNS) this.flush(now);
      const room = Math.max(1, Math.floor((this.#arena + ARENA_BYTES - this.#end) / stride));
      const count = Math.min(n - first, room);
      const lastBytes = (first + count === n ? lastPadded : padded) + OVERHEAD;
      const at = this.#place(slot, session, ecn, count, stride, lastBytes);
      exports.splitWrite(at + HEADER, first, count, stride, padded, lastPadded);
      first += count;
    }
    if (this.#end - this.#arena >= FLUSH_BYTES) this.flush(now);
  }

  /** Zero padding to a multiple of 16, not beyond the MTU (spec/datapath-wire.md 1.10). */
  #padded(length: number): number {
    const up = (length + 15) & ~15;
    return length > this.mtu ? up : Math.min(up, this.mtu);
  }

  /** Room for `count` datagrams, in the last run when they continue it. Returns where they begin. */
  #place(slot: number, session: number, ecn: number, count: number, stride: number, last: number): number {
    const r = this.#runs - 1;
    if (r >= 0 && this.#slot[r] === slot && this.#session[r] === session && this.#ecn[r] === ecn && this.#isOpen(r)) {
      if (stride === this.#stride[r]! || (count === 1 && last < this.#stride[r]!)) {
        const at = this.#end;
        this.#count[r]! += count;
        this.#last[r] = last;
        this.#end += (count - 1) * stride + last;
        return at;
      }
    }
    const at = (this.#end + 15) & ~15;
    const i = this.#runs++;
    this.#slot[i] = slot;
    this.#session[i] = session;
    this.#ecn[i] = ecn;
    this.#start[i] = at;
    this.#count[i] = count;
    // A single datagram is its own measure: others of the same size may follow.
    this.#stride[i] = count === 1 ? last : stride;
    this.#last[i] = last;
    this.#end = at + (count - 1) * stride + last;
    return at;
  }

  /** No shorter datagram has ended it, and nothing lies behind it. */
  #isOpen(r: number): boolean {
    const stride = this.#stride[r]!;
    return this.#last[r] === stride && this.#start[r]! + this.#count[r]! * stride === this.#end;
  }

  /** No session yet: the device keeps plain packets, bounded, until there is one. */
  #stage(slot: number, n: number, segment: number, last: number, now: number): void {
    const { exports, u8 } = this.#asm;
    const scratch = this.#arena + ARENA_BYTES + HEADER;
    for (let i = 0; i < n; i++) {
      const length = i === n - 1 ? last : segment;
      exports.splitWrite(scratch, i, 1, 0, length, length);
      this.#device.stage(slot, u8.subarray(scratch, scratch + length), now);
    }
    this.#hooks.activity(slot, now);
  }

  /** Seals and sends all that waits. */
  flush(now: number): void {
    this.#hooks.drain(now);
    const crew = this.#end - this.#arena >= SHARED_BYTES ? this.#crew : null;
    for (let r = 0; r < this.#runs; r++) this.#seal(r, crew);
    crew?.finish();
    for (let r = 0; r < this.#runs; r++) this.#leave(r, now);
    this.v4.flush();
    this.v6.flush();
    this.#runs = 0;
    this.#end = this.#arena;
  }

  /** Run `r`; with a crew it is sealed after `finish`. */
  #seal(r: number, crew: Crew | null): void {
    const session = this.#session[r]!;
    const p = this.#start[r]! + HEADER;
    const count = this.#count[r]!;
    const stride = this.#stride[r]!;
    const last = this.#last[r]!;
    const full = last < stride ? count - 1 : count;
    let sealed = full > 0 ? this.#sealRun(session, p, full, stride, stride, crew) : 0;
    if (sealed === full && full < count) sealed += this.#sealRun(session, p + full * stride, 1, stride, last, crew);
    this.#sealed[r] = sealed;
    this.unsealed += count - sealed;
  }

  #sealRun(session: number, p: number, n: number, stride: number, bytes: number, crew: Crew | null): number {
    if (crew) return crew.seal(session, p, n, stride, bytes - OVERHEAD);
    return this.#asm.exports.sessionSealRun(session, p, n, stride, bytes - OVERHEAD);
  }

  /** Run `r` is sealed. */
  #leave(r: number, now: number): void {
    const slot = this.#slot[r]!;
    const sealed = this.#sealed[r]!;
    const stride = this.#stride[r]!;
    if (sealed === 0) return;
    const lastBytes = sealed === this.#count[r]! ? this.#last[r]! : stride;
    this.#device.sent(slot, sealed, (sealed - 1) * stride + lastBytes, now);
    this.#hooks.activity(slot, now);
    this.#send(slot, this.#start[r]!, sealed, stride, lastBytes, this.#ecn[r]!);
  }

  #send(slot: number, start: number, count: number, stride: number, last: number, ecn: number): void {
    this.#paths.follow(slot, this.#device.peerBySlot(slot));
    const { nameLength, relay } = this.#paths;
    if (relay[slot]) {
      for (let i = 0; i < count; i++) this.#hooks.relay(slot, start + i * stride, i === count - 1 ? last : stride);
    }
    if (nameLength[slot] === 16) this.v4.add(slot, start, count, stride, last, ecn);
    else if (nameLength[slot] === 28) this.v6.add(slot, start, count, stride, last, ecn);
  }

  /**
   * One message that the device made (handshake, keepalive, what was staged). To the peer's paths; or, with the sockaddr
   * at `name`, to that address. It leaves with the next `flush`.
   */
  message(slot: number, data: Uint8Array, now: number, name = 0, nameLength = 0): void {
    if (this.#end + data.length + 16 > this.#arena + ARENA_BYTES) this.flush(now);
    const at = (this.#end + 15) & ~15;
    this.#asm.u8.set(data, at);
    this.#end = at + data.length;
    if (name === 0) this.#send(slot, at, 1, data.length, data.length, 0);
    else if (nameLength === 16) this.v4.addTo(slot, name, nameLength, at, data.length);
    else this.v6.addTo(slot, name, nameLength, at, data.length);
  }

  close(): void {
    this.v4.close();
    this.v6.close();
  }
}
