// The loop of the datapath Worker: sleeps in epoll_wait on TUN, UDP sockets and the eventfd of the main thread.
//
// Per wake: timers, commands and relayed messages, UDP (it drains what peers sent before we add to it), TUN; then everything
// that came up leaves. Nothing is allocated per packet: views, runs, message headers are made once.
import { receiveMessageOnPort } from "node:worker_threads";
import {
  EPOLL_EVENT_DATA,
  EPOLL_EVENT_SIZE,
  EPOLLIN,
  epollAdd,
  epollCreate,
  epollDelete,
  epollWait,
} from "../../ffi/epoll.ts";
import { EAGAIN, EBADFD, EINTR } from "../../ffi/errno.ts";
import { eventfdDrain, eventfdWake } from "../../ffi/eventfd.ts";
import { addressOf, closeFd } from "../../ffi/libc.ts";
import { SOCKADDR_ROOM, writeSockaddr } from "../../ffi/msg.ts";
import { TUN_READ_SIZE, tunRead, VNET_HEADER_SIZE } from "../../ffi/tun.ts";
import { randomBytes } from "../crypto/keys.ts";
import { Asm } from "../crypto/wasm.ts";
import { type IP, parseAddrPort } from "../wire/ip.ts";
import { Device, type Output } from "../wireguard/device.ts";
import type { DatapathStats, FilterConfig } from "./api.ts";
import { ASM_DROPS } from "./asm.ts";
import { compileFilter, layOutFilter } from "./filter.ts";
import {
  type Reply as Answer,
  type Command,
  RING_ACTIVITY,
  RING_DATAGRAM,
  RING_HANDSHAKE,
  RING_RELAY,
  type Sockets,
  type WorkerSetup,
} from "./messages.ts";
import { PeerPaths } from "./peer-paths.ts";
import { DeviceGone, Receiver, type Reply } from "./receive.ts";
import { RING_MAX_PAYLOAD, Ring } from "./ring.ts";
import { Transmitter } from "./transmit.ts";

export const MAX_PEERS = 8192;
export const MAX_ALLOWED_IPS = 65536;
const FILTER_BYTES = 8 << 20;
/** Sessions, allowed IPs, filter, buffers: sizes are limits, and the kernel backs only the pages that are touched. */
const MEMORY_PAGES = (192 << 20) >> 16;

const TOKEN_WAKE = 0;
const TOKEN_V4 = 1;
const TOKEN_V6 = 2;
const TOKEN_TUN = 3;
const EVENTS = 4;
const TUN_READS = 128;
const RELAYED = 64;
const ACTIVITY_MS = 1000;

export class Loop {
  readonly #setup: WorkerSetup;
  readonly #asm: Asm;
  readonly #base: number;
  readonly #device: Device;
  readonly #paths: PeerPaths;
  readonly #tx: Transmitter;
  readonly #rx: Receiver;
  readonly #toMain: Ring;
  readonly #toWorker: Ring;
  readonly #epoll: number;
  readonly #events: number;
  readonly #tunBuffer: number;
  readonly #filterTable: number;
  readonly #address: number;
  readonly #record = new Uint8Array(64);
  readonly #relayed: Uint8Array;
  readonly #lastActivity: Float64Array;
  #sockets: Sockets;
  #filterSkipped = 0;
  #notify = false;
  #closing = false;

  constructor(setup: WorkerSetup) {
    this.#setup = setup;
    this.#sockets = setup.sockets;
    const { mode, mtu, tun, sockets } = setup;
    const asm = Asm.create(MEMORY_PAGES);
    this.#asm = asm;
    this.#base = addressOf(asm.u8);
    this.#device = new Device({
      asm,
      random: randomBytes,
      mode,
      unixOffset: Date.now() - performance.now(),
      mtu,
      maxPeers: MAX_PEERS,
      maxAllowedIPs: MAX_ALLOWED_IPS,
    });
    this.#paths = new PeerPaths(asm, mode, MAX_PEERS);
    this.#lastActivity = new Float64Array(mode === "mesh" ? MAX_PEERS : 0).fill(Number.NEGATIVE_INFINITY);
    this.#tx = new Transmitter(
      asm,
      this.#base,
      this.#device,
      this.#paths,
      {
        drain: (now) => this.#drain(now, null),
        relay: (slot, start, length) => this.#relay(slot, asm.u8.subarray(start, start + length)),
        activity: mode === "mesh" ? (slot, now) => this.#activity(slot, now) : () => {},
      },
      { mtu, ...sockets },
    );
    this.#rx = new Receiver(
      asm,
      this.#base,
      this.#device,
      this.#paths,
      {
        datagram: (ip, port, p, length) => this.#datagram(ip, port, p, length),
        drain: (now, reply) => this.#drain(now, reply),
      },
      tun,
    );
    this.#toMain = new Ring(setup.toMain);
    this.#toWorker = new Ring(setup.toWorker);
    this.#relayed = new Uint8Array(mode === "mesh" ? RING_MAX_PAYLOAD : 0);
    this.#events = asm.alloc(EVENTS * EPOLL_EVENT_SIZE);
    // The packet itself is aligned to 16, its vnet header lies right before it.
    this.#tunBuffer = asm.alloc(TUN_READ_SIZE + 64) + 16;
    this.#filterTable = asm.alloc(FILTER_BYTES);
    this.#address = asm.alloc(SOCKADDR_ROOM);
    this.#epoll = epollCreate();
    epollAdd(this.#epoll, setup.wakeFd, EPOLLIN, TOKEN_WAKE);
    epollAdd(this.#epoll, tun.fd, EPOLLIN, TOKEN_TUN);
    this.#watchSockets();
  }

  #watchSockets(): void {
    const { fd4, fd6 } = this.#sockets;
    if (fd4 >= 0) epollAdd(this.#epoll, fd4, EPOLLIN, TOKEN_V4);
    if (fd6 >= 0) epollAdd(this.#epoll, fd6, EPOLLIN, TOKEN_V6);
  }

  /** Until the main thread says close. Throws DeviceGone when the TUN has vanished. */
  run(): void {
    const { view } = this.#asm;
    const device = this.#device;
    try {
      while (!this.#closing) {
        const due = device.nextTimeout();
        const wait = due === Number.POSITIVE_INFINITY ? -1 : Math.max(0, Math.ceil(due - performance.now()));
        const n = epollWait(this.#epoll, this.#base + this.#events, EVENTS, Math.min(wait, 1 << 30));
        if (n < 0 && n !== -EINTR) throw new Error(`epoll_wait failed with errno ${-n}`);
        const now = performance.now();
        device.unixOffset = Date.now() - now;
        if (due <= now) device.handleTimeout(now);
        let ready = 0;
        for (let i = 0; i < n; i++)
          ready |= 1 << view.getUint32(this.#events + i * EPOLL_EVENT_SIZE + EPOLL_EVENT_DATA, true);
        if (ready & (1 << TOKEN_WAKE)) this.#woken(now);
        if (ready & (1 << TOKEN_V4)) this.#rx.readSocket(this.#sockets.fd4, now);
        if (ready & (1 << TOKEN_V6)) this.#rx.readSocket(this.#sockets.fd6, now);
        if (ready & (1 << TOKEN_TUN)) this.#readTun(now);
        this.#tx.flush(now);
        if (this.#notify) {
          this.#notify = false;
          Atomics.notify(this.#toMain.words, 0);
        }
      }
    } finally {
      this.#tx.close();
      closeFd(this.#epoll);
    }
  }

  #readTun(now: number): void {
    const { fd, vnetHeader } = this.#setup.tun;
    const vnet = vnetHeader ? VNET_HEADER_SIZE : 0;
    const p = this.#tunBuffer;
    for (let i = 0; i < TUN_READS; i++) {
      const n = tunRead(fd, this.#base + p - vnet, TUN_READ_SIZE);
      if (n <= vnet) {
        if (n === -EBADFD) throw new DeviceGone();
        if (n === -EAGAIN || n < 0) return;
        continue;
      }
      this.#tx.packet(p, n - vnet, vnet === 0 ? 0 : p - vnet, now);
    }
  }

  // --- what the device says

  #drain(now: number, reply: Reply | null): void {
    for (const output of this.#device.drain()) {
      if (output.type === "send") this.#output(output, now, reply);
      else if (output.type === "forgetSource") this.#paths.clearSource(output.slot);
      else if (output.type === "handshake") this.#handshake(output.slot, output.ms, output.initiator);
    }
  }

  #output(output: Extract<Output, { type: "send" }>, now: number, reply: Reply | null): void {
    const { slot, data, to } = output;
    if (to?.kind === "relay") {
      this.#toMainRing(RING_RELAY, to.peer, data);
      return;
    }
    if (to) {
      const address = parseAddrPort(to.addr);
      if (!address) return;
      const length = writeSockaddr(this.#asm.view, this.#address, address.ip, address.port);
      this.#tx.message(-1, data, now, this.#address, length);
      return;
    }
    if (reply && this.#setup.mode === "wg") {
      this.#paths.follow(slot, this.#device.peerBySlot(slot));
      if (this.#paths.isFrom(slot, reply.name, reply.nameLength)) this.#paths.setSource(slot, reply.control);
    }
    this.#tx.message(slot, data, now);
  }

  // --- to the main thread

  #toMainRing(kind: number, head: Uint8Array, body?: Uint8Array): void {
    this.#toMain.write(kind, head, body);
    this.#notify = true;
  }

  #relay(slot: number, data: Uint8Array): void {
    const peer = this.#device.peerBySlot(slot);
    if (peer) this.#toMainRing(RING_RELAY, peer.publicKey, data);
  }

  #activity(slot: number, now: number): void {
    if (now - this.#lastActivity[slot]! < ACTIVITY_MS) return;
    this.#lastActivity[slot] = now;
    const peer = this.#device.peerBySlot(slot);
    if (peer) this.#toMainRing(RING_ACTIVITY, peer.publicKey);
  }

  #handshake(slot: number, ms: number, initiator: boolean): void {
    const peer = this.#device.peerBySlot(slot);
    if (!peer) return;
    new DataView(this.#record.buffer).setFloat64(0, ms, true);
    this.#record[8] = initiator ? 1 : 0;
    this.#toMainRing(RING_HANDSHAKE, peer.publicKey, this.#record.subarray(0, 9));
  }

  #datagram(ip: IP, port: number, p: number, length: number): void {
    const head = this.#record.subarray(0, 3 + ip.length);
    head[0] = ip.length;
    head[1] = port >> 8;
    head[2] = port & 0xff;
    head.set(ip, 3);
    this.#toMainRing(RING_DATAGRAM, head, this.#asm.u8.subarray(p, p + length));
  }

  // --- from the main thread

  #woken(now: number): void {
    eventfdDrain(this.#setup.wakeFd);
    for (;;) {
      const received = receiveMessageOnPort(this.#setup.port);
      if (!received) break;
      this.#command(received.message as Command, now);
    }
    for (let i = 0; i < RELAYED; i++) {
      const record = this.#toWorker.read(this.#relayed);
      if (!record) return;
      if (record.length > 32)
        this.#rx.relayed(this.#relayed.slice(0, 32), this.#relayed.subarray(32, record.length), now);
    }
    // More is there: the descriptors get their turn first.
    if (!this.#toWorker.empty) eventfdWake(this.#setup.wakeFd);
  }

  #command(command: Command, now: number): void {
    if (command.type === "close") this.#closing = true;
    else if (command.type === "mtu") {
      this.#device.mtu = command.mtu;
      this.#tx.mtu = command.mtu;
    } else if (command.type === "path") {
      const peer = this.#device.peerByKey(command.peer);
      if (peer) this.#device.setPath(peer.slot, command.path, now);
    } else this.#answer(command, now);
  }

  #answer(command: Extract<Command, { id: number }>, now: number): void {
    const { id } = command;
    const { port } = this.#setup;
    let answer: Answer;
    try {
      if (command.type === "configure") {
        this.#device.configure(command.update, now);
        if (command.sockets) this.#adopt(command.sockets);
        answer = { type: "done", id };
      } else if (command.type === "dump") answer = { type: "done", id, value: this.#device.dump() };
      else if (command.type === "stats") answer = { type: "done", id, value: this.#stats() };
      else {
        this.#setFilter(command.filter);
        answer = { type: "done", id };
      }
    } catch (error) {
      answer = { type: "failed", id, reason: error instanceof Error ? error.message : String(error) };
    }
    port.postMessage(answer);
  }

  /**
   * Other sockets take over; the main thread closes the old ones when it has our answer. Commands run before anything
   * waits to be sent: what the same command made the device say leaves from the new port.
   */
  #adopt(sockets: Sockets): void {
    for (const fd of [this.#sockets.fd4, this.#sockets.fd6]) if (fd >= 0) epollDelete(this.#epoll, fd);
    this.#sockets = sockets;
    this.#tx.v4.replace(sockets.fd4, sockets.gso4);
    this.#tx.v6.replace(sockets.fd6, sockets.gso6);
    this.#watchSockets();
  }

  #setFilter(filter: FilterConfig | null): void {
    this.#filterSkipped = 0;
    if (filter === null) {
      this.#asm.exports.filterSet(0);
      return;
    }
    const compiled = compileFilter(filter);
    const table = layOutFilter(compiled, this.#filterTable);
    if (table.length > FILTER_BYTES)
      throw new RangeError(`the packet filter takes ${table.length} bytes: at most ${FILTER_BYTES} are possible`);
    this.#asm.u8.set(table, this.#filterTable);
    this.#asm.exports.filterSet(this.#filterTable);
    this.#filterSkipped = compiled.skippedBad + compiled.skippedCaps;
  }

  #stats(): DatapathStats {
    const { exports, u32 } = this.#asm;
    const counters = exports.dropCounters() >> 2;
    const dropped: Record<string, number> = {};
    ASM_DROPS.forEach((name, i) => {
      dropped[name] = u32[counters + i]!;
    });
    for (const [name, n] of Object.entries(this.#rx.dropped)) dropped[`rx-${name}`] = n;
    dropped["tx-failed"] = this.#tx.v4.failed + this.#tx.v6.failed;
    dropped["tx-unsealed"] = this.#tx.unsealed;
    dropped["ring-full"] = this.#toMain.dropped;
    dropped["filter-entries-skipped"] = this.#filterSkipped;
    const { tun } = this.#setup;
    const { gro } = this.#sockets;
    return {
      tunRxPackets: this.#tx.packets,
      tunTxPackets: this.#rx.tunPackets,
      udpRxPackets: this.#rx.udpPackets,
      udpTxPackets: this.#tx.v4.sentPackets + this.#tx.v6.sentPackets,
      dropped,
      offload: {
        tunTso: tun.tso && this.#rx.coalesces.tcp,
        tunUso: tun.uso && this.#rx.coalesces.udp,
        udpGso: this.#tx.v4.gso || this.#tx.v6.gso,
        udpGro: gro,
      },
    };
  }
}
