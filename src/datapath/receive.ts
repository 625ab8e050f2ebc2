// From the network to the TUN: datagrams are opened in place, merged, and written without a copy.
//
// The socket's buffer is emptied first, and then peers take turns, known by the session that a message names: one that
// floods delays itself alone. What is not a transport message is a peer of its own.
import { EAGAIN, EBADFD, EINVAL } from "../../ffi/errno.ts";
import {
  CONTROL_ROOM,
  type Control,
  emptyControl,
  IOVEC_SIZE,
  MMSGHDR_LEN,
  MMSGHDR_SIZE,
  MSGHDR_CONTROLLEN,
  MSGHDR_FLAGS,
  MSGHDR_NAMELEN,
  parseControl,
  readSockaddr,
  SOCKADDR_ROOM,
  writeIovec,
  writeMsghdr,
} from "../../ffi/msg.ts";
import { tunWritev } from "../../ffi/tun.ts";
import { recvmmsg } from "../../ffi/udp.ts";
import type { Asm } from "../crypto/wasm.ts";
import { formatAddrPort, type IP } from "../wire/ip.ts";
import type { Device, Source } from "../wireguard/device.ts";
import { ASM_DROPS } from "./asm.ts";
import type { Crew } from "./crew.ts";
import { FairQueue } from "./fair-queue.ts";
import { MAX_PEERS } from "./limits.ts";
import type { PeerPaths } from "./peer-paths.ts";
import { BufferPool, SMALL_BYTES } from "./pool.ts";

const KEY_BYTES = 32;
/** Rows of datagrams, and datagrams, that wait at most. */
const LARGE = 48;
const SMALL = 1024;
/** Messages that one call may bring. */
const VLEN = 16;
const BUFFER_BYTES = 65536;
/** After so long the other descriptors get their turn. */
const TURN_MS = 0.5;
/** The sockets and the time are looked at after so many bytes; each message counts as COST bytes more. */
const STRIDE = 128 << 10;
const COST = 1024;
const MSG_TRUNC = 0x20;
const TYPE_TRANSPORT = 4;
/** Magic and the sender's key. */
const DISCO_MIN = 38;

/** The TUN was deleted by somebody else. */
export class DeviceGone extends Error {}

export interface ReceiveHooks {
  /** A datagram that is not WireGuard: `length` bytes at `p` (mesh mode). */
  datagram(ip: IP, port: number, p: number, length: number): void;
  /** Sends what the device has to say; answers may leave from the local address that `reply` names. */
  drain(now: number, reply: Reply | null): void;
  /** Datagrams were read and are about to be looked at. */
  arrived(now: number): void;
}

/** The datagram that is being answered: its sockaddr in wasm memory and its control messages. */
export interface Reply {
  name: number;
  nameLength: number;
  control: Control;
}

export class Receiver {
  udpPackets = 0;
  tunPackets = 0;
  readonly dropped = { truncated: 0, unknown: 0, handshake: 0, "tun-write": 0 };
  readonly #asm: Asm;
  readonly #base: number;
  readonly #device: Device;
  readonly #paths: PeerPaths;
  readonly #hooks: ReceiveHooks;
  readonly #mode: "wg" | "mesh";
  readonly #tun: { fd: number; vnetHeader: boolean };
  #gro: { tcp: boolean; udp: boolean };
  readonly #messages: number;
  /** For each buffer the header that receives into it. */
  readonly #templates: number;
  readonly #names: number;
  readonly #controls: number;
  readonly #pool: BufferPool;
  readonly #relayRoom: number;
  readonly #accounts: number;
  readonly #writes: number;
  readonly #waiting = new FairQueue(MAX_PEERS + 1, LARGE + SMALL);
  /** The counter of messages dropped because all buffers were taken. */
  readonly #overflow: number;
  /** Headers that are ready to receive, and the buffer of each. */
  #ready = 0;
  readonly #buffer = new Int32Array(VLEN);
  readonly #served = new Int32Array(LARGE + SMALL);
  // by buffer
  readonly #length = new Int32Array(LARGE + SMALL);
  readonly #nameLength = new Uint8Array(LARGE + SMALL);
  readonly #controlLength = new Uint8Array(LARGE + SMALL);
  readonly #crew: Crew | null;
  readonly #reply: Reply = { name: 0, nameLength: 0, control: emptyControl() };

  constructor(
    asm: Asm,
    base: number,
    device: Device,
    paths: PeerPaths,
    hooks: ReceiveHooks,
    tun: { fd: number; vnetHeader: boolean; tso: boolean; uso: boolean },
    crew: Crew | null = null,
  ) {
    this.#crew = crew;
    this.#asm = asm;
    this.#base = base;
    this.#device = device;
    this.#paths = paths;
    this.#hooks = hooks;
    this.#mode = device.mode;
    this.#tun = tun;
    this.#gro = { tcp: tun.tso, udp: tun.uso };
    this.#messages = asm.alloc(VLEN * MMSGHDR_SIZE);
    this.#templates = asm.alloc(LARGE * MMSGHDR_SIZE);
    this.#overflow = (asm.exports.dropCounters() >> 2) + ASM_DROPS.indexOf("rx-queue");
    const iovecs = asm.alloc(LARGE * IOVEC_SIZE);
    this.#names = asm.alloc((LARGE + SMALL) * SOCKADDR_ROOM);
    this.#controls = asm.alloc((LARGE + SMALL) * CONTROL_ROOM);
    this.#pool = new BufferPool(asm, LARGE, BUFFER_BYTES, SMALL);
    this.#relayRoom = asm.alloc(BUFFER_BYTES + 64, 4096);
    for (let i = 0; i < LARGE; i++) {
      writeIovec(asm.view, iovecs + i * IOVEC_SIZE, base + this.#pool.at(i), BUFFER_BYTES);
      writeMsghdr(
        asm.view,
        this.#templates + i * MMSGHDR_SIZE,
        base + this.#names + i * SOCKADDR_ROOM,
        SOCKADDR_ROOM,
        base + iovecs + i * IOVEC_SIZE,
        1,
        base + this.#controls + i * CONTROL_ROOM,
        CONTROL_ROOM,
      );
    }
    this.#accounts = asm.exports.rxAccounts() >> 2;
    this.#writes = asm.exports.groPtr() >> 2;
    this.#setGro();
  }

  get coalesces(): { tcp: boolean; udp: boolean } {
    return this.#gro;
  }

  #setGro(): void {
    const high = Math.floor(this.#base / 0x1_0000_0000);
    this.#asm.exports.groSetup(
      this.#tun.vnetHeader ? 1 : 0,
      this.#gro.tcp ? 1 : 0,
      this.#gro.udp ? 1 : 0,
      this.#base | 0,
      high,
    );
  }

  /** Messages wait here: `read` must be called again soon. */
  get backlog(): boolean {
    return !this.#waiting.empty;
  }

  /** Takes what the sockets have (-1: not this one), for about TURN_MS from `now` on. */
  read(fd4: number, fd6: number, now: number): void {
    for (let time = now; time < now + TURN_MS; time = performance.now()) {
      if (fd4 >= 0 && this.#fill(fd4)) fd4 = -1;
      if (fd6 >= 0 && this.#fill(fd6)) fd6 = -1;
      this.#hooks.arrived(now);
      if (!this.#serve(now) && fd4 < 0 && fd6 < 0) return;
    }
  }

  /** Handles about STRIDE bytes of what waits. False when nothing is left. */
  #serve(now: number): boolean {
    let served = 0;
    let buffer = 0;
    for (let cost = 0; cost < STRIDE; ) {
      buffer = this.#waiting.shift();
      if (buffer < 0) break;
      cost += this.#message(buffer, now) + COST;
      this.#served[served++] = buffer;
    }
    this.#flush();
    // Not before they are written: the coalescer points into them.
    while (served > 0) this.#pool.release(this.#served[--served]!);
    return buffer >= 0;
  }

  /**
   * Empties a socket's buffer, as far as there is room; true when it is empty.
   */
  #fill(fd: number): boolean {
    for (let left = LARGE + SMALL; left > 0; ) {
      while (this.#ready < VLEN && this.#prepare(this.#ready)) this.#ready++;
      if (this.#ready === 0) return false;
      const asked = this.#ready;
      const n = recvmmsg(fd, this.#base + this.#messages, asked);
      if (n === -EAGAIN) return true;
      // Errors of earlier sends (ICMP) surface here too: the next call goes on.
      if (n <= 0) {
        left--;
        continue;
      }
      for (let i = 0; i < n; i++) this.#enqueue(i);
      // The headers that are left come first.
      this.#ready = asked - n;
      for (let i = 0; i < n && i < this.#ready; i++) this.#moveHeader(asked - 1 - i, i);
      if (n < asked) return true;
      left -= n;
    }
    return false;
  }

  /** Makes header `i` ready to receive into a free buffer. False when there is none. */
  #prepare(i: number): boolean {
    while (!this.#pool.hasLarge) if (!this.#dropOne()) return false;
    const buffer = this.#pool.takeLarge();
    this.#buffer[i] = buffer;
    const from = this.#templates + buffer * MMSGHDR_SIZE;
    this.#asm.u8.copyWithin(this.#messages + i * MMSGHDR_SIZE, from, from + MMSGHDR_SIZE);
    return true;
  }

  /**
   * Makes room where several peers have something waiting: what stays in the socket's buffer waits behind the flood of any.
   * One peer alone may wait there, which loses nothing.
   */
  #dropOne(): boolean {
    if (this.#waiting.active < 2) return false;
    const oldest = this.#waiting.dropFromLongest();
    if (oldest < 0) return false;
    this.#pool.release(oldest);
    this.#asm.u32[this.#overflow]!++;
    return true;
  }

  #moveHeader(from: number, to: number): void {
    const at = this.#messages + from * MMSGHDR_SIZE;
    this.#asm.u8.copyWithin(this.#messages + to * MMSGHDR_SIZE, at, at + MMSGHDR_SIZE);
    this.#buffer[to] = this.#buffer[from]!;
  }

  /** What header `i` has received waits for the turn of its peer. */
  #enqueue(i: number): void {
    const { view, exports } = this.#asm;
    const at = this.#messages + i * MMSGHDR_SIZE;
    let buffer = this.#buffer[i]!;
    const length = view.getUint32(at + MMSGHDR_LEN, true);
    const truncated = (view.getInt32(at + MSGHDR_FLAGS, true) & MSG_TRUNC) !== 0;
    if (truncated) this.dropped.truncated++;
    if (truncated || length === 0) {
      this.#pool.release(buffer);
      return;
    }
    const nameLength = view.getUint32(at + MSGHDR_NAMELEN, true);
    const controlLength = view.getUint32(at + MSGHDR_CONTROLLEN, true);
    const peer = exports.rxPeer(this.#pool.at(buffer), length);
    if (length <= SMALL_BYTES) buffer = this.#shrink(buffer, length, nameLength, controlLength);
    this.#length[buffer] = length;
    this.#nameLength[buffer] = nameLength;
    this.#controlLength[buffer] = controlLength;
    this.#waiting.push(peer < 0 ? MAX_PEERS : peer, buffer, length + COST);
  }

  /** Moves a short message to a small buffer, if there is one. */
  #shrink(large: number, length: number, nameLength: number, controlLength: number): number {
    const buffer = this.#pool.shrink(large, length);
    if (buffer < 0) return large;
    this.#pool.release(large);
    const { u8 } = this.#asm;
    const name = this.#names + large * SOCKADDR_ROOM;
    u8.copyWithin(this.#names + buffer * SOCKADDR_ROOM, name, name + nameLength);
    const control = this.#controls + large * CONTROL_ROOM;
    u8.copyWithin(this.#controls + buffer * CONTROL_ROOM, control, control + controlLength);
    return buffer;
  }

  #message(buffer: number, now: number): number {
    const reply = this.#reply;
    const length = this.#length[buffer]!;
    reply.name = this.#names + buffer * SOCKADDR_ROOM;
    reply.nameLength = this.#nameLength[buffer]!;
    const control = this.#controls + buffer * CONTROL_ROOM;
    parseControl(this.#asm.view, control, this.#controlLength[buffer]!, reply.control);
    const p = this.#pool.at(buffer);
    const segment = reply.control.segmentSize || length;
    const verdicts = this.#crew?.open(p, length, segment) ?? 0;
    if (verdicts !== 0) this.#asm.exports.rxVerdicts(verdicts);
    this.#datagrams(p, length, segment, reply, now);
    if (verdicts !== 0) this.#asm.exports.rxVerdicts(0);
    return length;
  }

  /** Where to put what the relay delivered: the sender's key, 32 bytes, then its message. BUFFER_BYTES long. */
  get relayRoom(): number {
    return this.#relayRoom;
  }

  /** `length` bytes of key and message are in `relayRoom`. */
  relayed(length: number, now: number): void {
    const message = length - KEY_BYTES;
    if (message <= 0) return;
    this.#datagrams(this.relayRoom + KEY_BYTES, message, message, null, now);
    this.#flush();
  }

  /** `length` bytes at `p` are datagrams of `segment` bytes, the last maybe shorter. Without `reply` from the relay. */
  #datagrams(p: number, length: number, segment: number, reply: Reply | null, now: number): void {
    const { exports, u32, view } = this.#asm;
    exports.rxEcn(reply ? reply.control.tos & 3 : 0);
    this.udpPackets += Math.ceil(length / segment);
    for (let from = 0; from < length; ) {
      from = exports.rxOpen(p, length, segment, from);
      const count = exports.rxAccountCount();
      for (let a = 0; a < count; a++) {
        const at = this.#accounts + a * 6;
        const slot = u32[at + 1]!;
        this.#device.received(slot, u32[at]!, u32[at + 2]!, u32[at + 3]!, u32[at + 4]!, now);
        if (reply && this.#mode === "wg") this.#roam(slot, reply);
      }
      if (from >= length) return;
      const n = Math.min(segment, length - from);
      if (exports.groFull()) this.#flush();
      else if (n < 32 || view.getUint32(p + from, true) !== TYPE_TRANSPORT) {
        this.#other(p + from, n, reply, now);
        from += n;
      }
    }
  }

  /** The endpoint follows authenticated packets, and so does the local address that we answer from. */
  #roam(slot: number, reply: Reply): void {
    const peer = this.#device.peerBySlot(slot);
    if (!peer) return;
    this.#paths.follow(slot, peer);
    if (!this.#paths.isFrom(slot, reply.name, reply.nameLength)) {
      const from = readSockaddr(this.#asm.view, reply.name);
      if (!from) return;
      this.#device.roam(slot, formatAddrPort(from.ip, from.port));
      this.#paths.follow(slot, peer);
    }
    this.#paths.setSource(slot, reply.control);
  }

  /** Anything but a transport message (spec/datapath-wire.md 3.1). Without `reply` the relay brought it. */
  #other(p: number, n: number, reply: Reply | null, now: number): void {
    const { u8, view } = this.#asm;
    let source: Source;
    if (reply) {
      const from = readSockaddr(view, reply.name);
      if (!from) return;
      if (this.#mode === "mesh" && isForMain(view, p, n)) {
        this.#hooks.datagram(from.ip, from.port, p, n);
        return;
      }
      source = { kind: "udp", addr: formatAddrPort(from.ip, from.port) };
    } else source = { kind: "relay", peer: u8.slice(this.relayRoom, this.relayRoom + KEY_BYTES) };
    if (n < 64 || n > 148 || view.getUint32(p, true) >= TYPE_TRANSPORT) {
      this.dropped.unknown++;
      return;
    }
    if (this.#device.handleHandshake(u8.subarray(p, p + n), source, now) !== null) this.dropped.handshake++;
    this.#hooks.drain(now, reply);
  }

  /** Writes what was merged to the TUN. */
  #flush(): void {
    const { exports, u32 } = this.#asm;
    const n = exports.groFlush();
    for (let i = 0; i < n; i++) {
      const iov = u32[this.#writes + 2 * i]!;
      const count = u32[this.#writes + 2 * i + 1]!;
      const result = tunWritev(this.#tun.fd, this.#base + iov, count);
      if (result >= 0) this.tunPackets += count;
      else this.#refused(-result, iov, count);
    }
  }

  #refused(code: number, iov: number, count: number): void {
    if (code === EBADFD) throw new DeviceGone();
    this.dropped["tun-write"] += count;
    // A kernel that does not take merged packets of this kind: go on without.
    if (code !== EINVAL || count === 1) return;
    const vnet = this.#asm.view.getUint32(iov, true) - (this.#base >>> 0);
    if (this.#asm.u8[(vnet >>> 0) + 1] === 5) this.#gro.udp = false;
    else this.#gro.tcp = false;
    this.#setGro();
  }
}

/** STUN, or disco: for the main thread. */
function isForMain(view: DataView, p: number, n: number): boolean {
  const first = view.getUint32(p, true);
  if (n >= 20 && (first & 0xc0) === 0 && ((first >> 8) & 0xff) === 1 && view.getUint32(p + 4) === 0x2112a442)
    return true;
  return n >= DISCO_MIN && view.getUint32(p) === 0x5453f09f && view.getUint16(p + 4) === 0x92ac;
}
