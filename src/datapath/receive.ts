// From the network to the TUN: what one recvmmsg brought is opened in place, merged, and written without a copy.
import { EAGAIN, EBADFD, EINTR, EINVAL } from "../../ffi/errno.ts";
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
import type { PeerPaths } from "./peer-paths.ts";
import { StandingQueue } from "./standing-queue.ts";
import "./asm.ts";

const KEY_BYTES = 32;
const BUFFERS = 64;
/** So many are used while each brings a row of datagrams: they stay in the caches. */
const FEW_BUFFERS = 16;
const BUFFER_BYTES = 65536;
/** After so long the other descriptors get their turn. */
const TURN_MS = 2;
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
  readonly #names: number;
  readonly #controls: number;
  readonly #buffers: number;
  readonly #accounts: number;
  readonly #writes: number;
  #vlen = FEW_BUFFERS;
  readonly #queue = new StandingQueue();
  readonly #reply: Reply = { name: 0, nameLength: 0, control: emptyControl() };

  constructor(
    asm: Asm,
    base: number,
    device: Device,
    paths: PeerPaths,
    hooks: ReceiveHooks,
    tun: { fd: number; vnetHeader: boolean; tso: boolean; uso: boolean },
  ) {
    this.#asm = asm;
    this.#base = base;
    this.#device = device;
    this.#paths = paths;
    this.#hooks = hooks;
    this.#mode = device.mode;
    this.#tun = tun;
    this.#gro = { tcp: tun.tso, udp: tun.uso };
    this.#messages = asm.alloc(BUFFERS * MMSGHDR_SIZE);
    const iovecs = asm.alloc(BUFFERS * IOVEC_SIZE);
    this.#names = asm.alloc(BUFFERS * SOCKADDR_ROOM);
    this.#controls = asm.alloc(BUFFERS * CONTROL_ROOM);
    // One more than the kernel fills: for what the relay brings.
    this.#buffers = asm.alloc((BUFFERS + 1) * BUFFER_BYTES, 4096);
    for (let i = 0; i < BUFFERS; i++) {
      writeIovec(asm.view, iovecs + i * IOVEC_SIZE, base + this.#buffers + i * BUFFER_BYTES, BUFFER_BYTES);
      writeMsghdr(
        asm.view,
        this.#messages + i * MMSGHDR_SIZE,
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

  /** Takes what a socket has, within bounds. */
  readSocket(fd: number, now: number): void {
    for (let time = now; ; ) {
      const vlen = this.#vlen;
      const n = recvmmsg(fd, this.#base + this.#messages, vlen);
      if (n === -EINTR) continue;
      // Errors of earlier sends (ICMP) surface here too: the next call goes on.
      if (n === -EAGAIN) break;
      if (n <= 0) continue;
      this.#hooks.arrived(now);
      let bytes = 0;
      const relieve = this.#queue.due(time);
      if (relieve) this.#asm.exports.rxRelieve();
      for (let i = 0; i < n; i++) bytes += this.#message(i, now);
      if (relieve && !this.#asm.exports.rxStands()) this.#queue.dropped(time);
      this.#flush();
      this.#vlen = n === vlen && bytes < n * 8192 ? BUFFERS : FEW_BUFFERS;
      if (n < vlen) break;
      time = performance.now();
      if (time > now + TURN_MS) {
        this.#queue.stands(time);
        return;
      }
    }
    this.#queue.empty();
  }

  #message(i: number, now: number): number {
    const { view } = this.#asm;
    const at = this.#messages + i * MMSGHDR_SIZE;
    const length = view.getUint32(at + MMSGHDR_LEN, true);
    const flags = view.getInt32(at + MSGHDR_FLAGS, true);
    const reply = this.#reply;
    reply.name = this.#names + i * SOCKADDR_ROOM;
    reply.nameLength = view.getUint32(at + MSGHDR_NAMELEN, true);
    parseControl(view, this.#controls + i * CONTROL_ROOM, view.getUint32(at + MSGHDR_CONTROLLEN, true), reply.control);
    view.setUint32(at + MSGHDR_NAMELEN, SOCKADDR_ROOM, true);
    view.setUint32(at + MSGHDR_CONTROLLEN, CONTROL_ROOM, true);
    view.setInt32(at + MSGHDR_FLAGS, 0, true);
    if (flags & MSG_TRUNC) this.dropped.truncated++;
    else if (length > 0)
      this.#datagrams(this.#buffers + i * BUFFER_BYTES, length, reply.control.segmentSize || length, reply, now);
    return length;
  }

  /** Where to put what the relay delivered: the sender's key, 32 bytes, then its message. BUFFER_BYTES long. */
  get relayRoom(): number {
    return this.#buffers + BUFFERS * BUFFER_BYTES;
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
