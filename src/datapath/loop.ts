// The loop of the datapath Worker: sleeps in epoll_wait on TUN, UDP sockets and the eventfd of the main thread.
//
// Per wake: timers, commands and relayed messages, UDP (it drains what peers sent before we add to it), TUN; then everything
// that came up leaves. Nothing is allocated per packet: views, runs, message headers are made once.
import { receiveMessageOnPort } from "node:worker_threads";
import { EPOLL_EVENT_DATA, EPOLL_EVENT_SIZE, EPOLLIN, epollAdd, epollDelete, epollWait } from "../../ffi/epoll.ts";
import { EINTR } from "../../ffi/errno.ts";
import { eventfdDrain, eventfdWake } from "../../ffi/eventfd.ts";
import { addressOf } from "../../ffi/libc.ts";
import { SOCKADDR_ROOM, writeSockaddr } from "../../ffi/msg.ts";
import { randomBytes } from "../crypto/keys.ts";
import { Asm } from "../crypto/wasm.ts";
import { type IP, parseAddrPort } from "../wire/ip.ts";
import { Device, type Output } from "../wireguard/device.ts";
import type { DatapathStats, DeviceDump, FilterConfig } from "./api.ts";
import { ASM_DROPS } from "./asm.ts";
import { Crew } from "./crew.ts";
import { compileFilter, layOutFilter } from "./filter.ts";
import { FILTER_BYTES, MAX_ALLOWED_IPS, MAX_PEERS, MEMORY_PAGES } from "./limits.ts";
import {
  type Reply as Answer,
  type Command,
  RING_ACTIVITY,
  RING_DATAGRAM,
  RING_HANDSHAKE,
  RING_RELAY,
  SENDER_STATS,
  type Sockets,
  type WorkerSetup,
} from "./messages.ts";
import { PeerPaths } from "./peer-paths.ts";
import { Receiver, type Reply } from "./receive.ts";
import { Ring } from "./ring.ts";
import { SenderLink } from "./sender-link.ts";
import { Transmitter } from "./transmit.ts";
import { TunReader } from "./tun-reader.ts";
import { warmUpDatapath } from "./warmup.ts";

const TOKEN_WAKE = 0;
const TOKEN_V4 = 1;
const TOKEN_V6 = 2;
const TOKEN_TUN = 3;
const EVENTS = 4;
const RELAYED = 64;
const ACTIVITY_MS = 1000;

export class Loop {
  readonly crew: Crew | null;
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
  /** Null: another Worker reads the TUN and sends, at the other end of the link. */
  readonly #tun: TunReader | null;
  readonly #link: SenderLink | null;
  readonly #filterTable: number;
  readonly #address: number;
  readonly #record = new Uint8Array(64);
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
    warmUpDatapath(asm);
    this.#asm = asm;
    this.#base = addressOf(asm.u8);
    const link = setup.link && new SenderLink(asm, setup.link);
    this.#link = link;
    this.#device = new Device({
      asm,
      random: randomBytes,
      mode,
      unixOffset: Date.now() - performance.now(),
      mtu,
      maxPeers: MAX_PEERS,
      maxAllowedIPs: MAX_ALLOWED_IPS,
      ...(link && { sealer: link }),
    });
    this.crew = setup.helpers > 0 ? new Crew(asm, setup.helpers) : null;
    this.#paths = new PeerPaths(asm, mode, MAX_PEERS);
    const activity = mode === "mesh" ? (slot: number, now: number) => this.#activity(slot, now) : () => {};
    link?.serve(this.#device, this.#paths, activity);
    this.#lastActivity = new Float64Array(mode === "mesh" ? MAX_PEERS : 0).fill(Number.NEGATIVE_INFINITY);
    this.#tx = new Transmitter(
      asm,
      this.#base,
      this.#device,
      this.#paths,
      {
        drain: (now) => this.#drain(now, null),
        relay: (slot, start, length) => this.#relay(slot, start, length),
        activity,
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
        arrived: (now) => link?.drain(now),
      },
      tun,
      this.crew,
    );
    this.#toMain = new Ring(setup.toMain);
    this.#toWorker = new Ring(setup.toWorker);
    this.#events = asm.alloc(EVENTS * EPOLL_EVENT_SIZE);
    this.#tun = link ? null : new TunReader(asm, this.#base, tun);
    this.#filterTable = asm.alloc(FILTER_BYTES);
    this.#address = asm.alloc(SOCKADDR_ROOM);
    this.#epoll = setup.epollFd;
    epollAdd(this.#epoll, setup.wakeFd, EPOLLIN, TOKEN_WAKE);
    if (!link) epollAdd(this.#epoll, tun.fd, EPOLLIN, TOKEN_TUN);
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
    const link = this.#link;
    try {
      while (!this.#closing) {
        const due = device.nextTimeout();
        const wait = due === Number.POSITIVE_INFINITY ? -1 : Math.max(0, Math.ceil(due - performance.now()));
        const busy = this.#rx.backlog || this.#tun?.backlog;
        const timeout = busy ? 0 : link?.backlog ? 1 : Math.min(wait, 1 << 30);
        const n = epollWait(this.#epoll, this.#base + this.#events, EVENTS, timeout);
        if (n < 0 && n !== -EINTR) throw new Error(`epoll_wait failed with errno ${-n}`);
        const now = performance.now();
        device.unixOffset = Date.now() - now;
        link?.drain(now);
        if (due <= now) device.handleTimeout(now);
        let ready = 0;
        for (let i = 0; i < n; i++)
          ready |= 1 << view.getUint32(this.#events + i * EPOLL_EVENT_SIZE + EPOLL_EVENT_DATA, true);
        if (ready & (1 << TOKEN_WAKE)) this.#woken(now);
        const fd4 = ready & (1 << TOKEN_V4) ? this.#sockets.fd4 : -1;
        const fd6 = ready & (1 << TOKEN_V6) ? this.#sockets.fd6 : -1;
        if (fd4 >= 0 || fd6 >= 0 || this.#rx.backlog) this.#rx.read(fd4, fd6, now);
        if (ready & (1 << TOKEN_TUN) || this.#tun?.backlog) this.#tun?.read(this.#tx, performance.now());
        this.#tx.flush(now);
        link?.flush();
        if (this.#notify) {
          this.#notify = false;
          Atomics.notify(this.#toMain.words, 0);
        }
      }
    } finally {
      this.#tx.close();
      this.#asm.exports.sessionWipeAll();
    }
  }

  // --- what the device says

  #drain(now: number, reply: Reply | null): void {
    for (const output of this.#device.drain()) {
      if (output.type === "send") this.#output(output, now, reply);
      else if (output.type === "keepalive") {
        if (reply) this.#replyFrom(output.slot, reply);
        this.#link?.keepalive(output.slot, output.session);
      } else if (output.type === "forgetSource") this.#paths.clearSource(output.slot);
      else this.#handshake(output.slot, output.ms, output.initiator);
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
    if (reply) this.#replyFrom(slot, reply);
    this.#tx.message(slot, data, now);
  }

  #replyFrom(slot: number, reply: Reply): void {
    if (this.#setup.mode !== "wg") return;
    this.#paths.follow(slot, this.#device.peerBySlot(slot));
    if (this.#paths.isFrom(slot, reply.name, reply.nameLength)) this.#paths.setSource(slot, reply.control);
  }

  // --- to the main thread

  #toMainRing(kind: number, head: Uint8Array, body?: Uint8Array): void {
    this.#toMain.write(kind, head, body);
    this.#notify = true;
  }

  #relay(slot: number, start: number, length: number): void {
    const peer = this.#device.peerBySlot(slot);
    if (!peer) return;
    this.#toMain.writeFrom(RING_RELAY, peer.publicKey, this.#asm.u32, start, length);
    this.#notify = true;
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
      const record = this.#toWorker.read(this.#asm.u32, this.#rx.relayRoom >> 2);
      if (record < 0) return;
      this.#rx.relayed(record & 0xffff, now);
    }
    // More is there: the descriptors get their turn first.
    if (!this.#toWorker.empty) eventfdWake(this.#setup.wakeFd);
  }

  #command(command: Command, now: number): void {
    if (command.type === "close") {
      this.#closing = true;
      this.#link?.close();
    } else if (command.type === "mtu") {
      this.#device.mtu = command.mtu;
      this.#tx.mtu = command.mtu;
      this.#link?.mtu(command.mtu);
    } else if (command.type === "path") {
      const peer = this.#device.peerByKey(command.peer);
      if (!peer) return;
      this.#device.setPath(peer.slot, command.path, now);
      this.#paths.follow(peer.slot, peer);
    } else this.#answer(command, now);
  }

  #answer(command: Extract<Command, { id: number }>, now: number): void {
    const { id } = command;
    const { port } = this.#setup;
    const done = (value?: DeviceDump | DatapathStats) =>
      port.postMessage({ type: "done", id, ...(value && { value }) } satisfies Answer);
    try {
      if (command.type === "configure") {
        this.#device.configure(command.update, now);
        // The sender has paths only from here.
        if (this.#link) for (const { publicKey } of command.update.peers ?? []) this.#followKey(publicKey);
        if (command.sockets) this.#adopt(command.sockets);
      } else if (command.type === "filter") this.#setFilter(command.filter);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      port.postMessage({ type: "failed", id, reason } satisfies Answer);
      return;
    }
    this.#everywhere(() => {
      if (command.type === "dump") done(this.#device.dump());
      else if (command.type === "stats") done(this.#stats());
      else done();
    });
  }

  /** Calls `then` when what was done so far has taken effect in the sender too. */
  #everywhere(then: () => void): void {
    if (this.#link) this.#link.fence(then);
    else then();
  }

  #followKey(key: Uint8Array): void {
    const peer = this.#device.peerByKey(key);
    if (peer) this.#paths.follow(peer.slot, peer);
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
    this.#link?.sockets(sockets);
    this.#watchSockets();
  }

  #setFilter(filter: FilterConfig | null): void {
    this.#filterSkipped = 0;
    if (filter === null) {
      this.#link?.filter(false);
      this.#asm.exports.filterSet(0);
      return;
    }
    const compiled = compileFilter(filter);
    const table = layOutFilter(compiled, this.#filterTable);
    if (table.length > FILTER_BYTES)
      throw new RangeError(`the packet filter takes ${table.length} bytes: at most ${FILTER_BYTES} are possible`);
    this.#asm.u8.set(table, this.#filterTable);
    this.#asm.exports.filterSet(this.#filterTable);
    this.#link?.filter(true);
    this.#filterSkipped = compiled.skippedBad + compiled.skippedCaps;
  }

  #stats(): DatapathStats {
    const { exports, u32 } = this.#asm;
    const counters = exports.dropCounters() >> 2;
    const dropped: Record<string, number> = {};
    const sender = this.#link?.stats;
    const sent = (name: (typeof SENDER_STATS)[number]) => sender?.[SENDER_STATS.indexOf(name)] ?? 0;
    ASM_DROPS.forEach((name, i) => {
      dropped[name] = u32[counters + i]! + (sender?.[SENDER_STATS.length + i] ?? 0);
    });
    for (const [name, n] of Object.entries(this.#rx.dropped)) dropped[`rx-${name}`] = n;
    dropped["tx-failed"] = this.#tx.v4.failed + this.#tx.v6.failed + sent("failed");
    dropped["tx-unsealed"] = this.#tx.unsealed + sent("unsealed");
    dropped["ring-full"] = this.#toMain.dropped + sent("lost");
    dropped["filter-entries-skipped"] = this.#filterSkipped;
    const { tun } = this.#setup;
    const { gro } = this.#sockets;
    return {
      tunRxPackets: this.#tx.packets + sent("packets"),
      tunTxPackets: this.#rx.tunPackets,
      udpRxPackets: this.#rx.udpPackets,
      udpTxPackets: this.#tx.v4.sentPackets + this.#tx.v6.sentPackets + sent("sent"),
      helped: (this.crew?.helped ?? 0) + sent("helped"),
      dropped,
      offload: {
        tunTso: tun.tso && this.#rx.coalesces.tcp,
        tunUso: tun.uso && this.#rx.coalesces.udp,
        udpGso: sender ? sent("gso") === 1 : this.#tx.v4.gso || this.#tx.v6.gso,
        udpGro: gro,
      },
    };
  }
}
