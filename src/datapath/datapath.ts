// The datapath as the main thread sees it: makes device, sockets and Worker, and carries commands and packets across.
import { availableParallelism } from "node:os";
import { MessageChannel, type MessagePort, Worker } from "node:worker_threads";
import { epollCreate } from "../../ffi/epoll.ts";
import { eventfdCreate, eventfdWake } from "../../ffi/eventfd.ts";
import { closeFd } from "../../ffi/libc.ts";
import { sockaddrOf } from "../../ffi/msg.ts";
import { Netlink, NetlinkMonitor } from "../../ffi/netlink.ts";
import { openTun, type Tun } from "../../ffi/tun.ts";
import { openUdpPair, sendto, setMark, type UdpSocket } from "../../ffi/udp.ts";
import { type AddrPort, formatAddrPort } from "../wire/ip.ts";
import type {
  Datapath,
  DatapathEvents,
  DatapathOptions,
  DatapathStats,
  DeviceDump,
  DeviceUpdate,
  FilterConfig,
  Key,
  PeerPath,
} from "./api.ts";
import { ASM_DROPS } from "./asm.ts";
import {
  type Command,
  type CrewSetup,
  type HelperSetup,
  type Link,
  type Reply,
  RING_ACTIVITY,
  RING_DATAGRAM,
  RING_HANDSHAKE,
  RING_RELAY,
  RING_RELAY_IN,
  SENDER_STATS,
  type SenderSetup,
  type Sockets,
  type WorkerSetup,
} from "./messages.ts";
import { RING_MAX_PAYLOAD, Ring } from "./ring.ts";

const RING_BYTES = { wg: 1 << 14, mesh: 1 << 20 };
const LINK_RING_BYTES = 1 << 18;
/** From so many processors on, sending and receiving have a thread each. */
const SPLIT_FROM = 3;
/** Two that carry packets, and two helpers for the ciphers of each: then the kernel's calls take longer than they. */
export const MAX_WORKERS = 6;
const CLOSE_DEADLINE_MS = 2000;
/** Records taken from the ring before other work of the main thread gets its turn. */
const RING_BATCH = 256;

interface SocketPair {
  v4: UdpSocket | null;
  v6: UdpSocket | null;
}

/** Resolves once the Worker runs. Throws one sentence when the device or the port cannot be had. */
export async function startDatapath(options: DatapathOptions, events: DatapathEvents): Promise<Datapath> {
  const workers = options.workers ?? (availableParallelism() >= SPLIT_FROM ? 2 : 1);
  if (!Number.isInteger(workers) || workers < 1)
    throw new RangeError(`the datapath cannot run on ${workers} workers: give 1 to ${MAX_WORKERS}`);
  const offload = options.offload ?? {};
  const tso = offload.tunTso ?? true;
  const uso = offload.tunUso ?? true;
  const tun = openTun({ name: options.tun, vnetHeader: tso || uso, tso, uso });
  let sockets: SocketPair | null = null;
  try {
    using netlink = new Netlink();
    netlink.setLink(tun.index, { mtu: options.mtu });
    sockets = openSockets(options, options.port, options.fwmark ?? 0);
    const datapath = new MainDatapath(options, events, tun, sockets, Math.min(workers, MAX_WORKERS));
    await datapath.started;
    return datapath;
  } catch (error) {
    if (sockets) closeSockets(sockets);
    closeFd(tun.fd);
    throw error;
  }
}

function openSockets(options: DatapathOptions, port: number, mark: number): SocketPair {
  return openUdpPair({
    port,
    mark,
    gso: options.offload?.udpGso ?? true,
    gro: options.offload?.udpGro ?? true,
    pktinfo: options.mode === "wg",
    tos: true,
  });
}

function closeSockets({ v4, v6 }: SocketPair): void {
  if (v4) closeFd(v4.fd);
  if (v6) closeFd(v6.fd);
}

function describe({ v4, v6 }: SocketPair): Sockets {
  return {
    fd4: v4?.fd ?? -1,
    fd6: v6?.fd ?? -1,
    gso4: v4?.gso ?? false,
    gso6: v6?.gso ?? false,
    gro: (v4?.gro ?? true) && (v6?.gro ?? true),
  };
}

function portOf({ v4, v6 }: SocketPair): number {
  return (v4 ?? v6)!.port;
}

interface Waiting {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
}

class MainDatapath implements Datapath {
  readonly tunName: string;
  readonly tunIndex: number;
  readonly started: Promise<void>;
  readonly #options: DatapathOptions;
  readonly #events: DatapathEvents;
  readonly #tun: Tun;
  #sockets: SocketPair;
  #mark: number;
  readonly #epollFd = epollCreate();
  readonly #wakeFd: number;
  readonly #toMain: Ring;
  readonly #toWorker: Ring;
  readonly #record = new Uint8Array(RING_MAX_PAYLOAD + 1);
  readonly #recordWords = new Uint32Array(this.#record.buffer);
  readonly #ringWords: Int32Array[] = [];
  readonly #port: MessagePort;
  readonly #worker: Worker;
  /** The other Worker, where there are two. */
  readonly #sender: SenderThread | null = null;
  /** Helpers of both. */
  readonly #helpers: { worker: Worker; port: MessagePort }[] = [];
  readonly #monitor: NetlinkMonitor;
  readonly #waiting = new Map<number, Waiting>();
  #nextId = 1;
  /** Workers that have not said that they are ready. */
  #starting = 1;
  /** The device's Worker has closed. */
  #closed = false;
  /** Configurations run one after the other: each may change the sockets. */
  #configuring: Promise<unknown> = Promise.resolve();
  #queued = 0;
  #state: "starting" | "running" | "closing" | "closed" = "starting";
  readonly #addresses = new Map<AddrPort, Uint8Array>();
  #readySettled!: { resolve: () => void; reject: (error: Error) => void };
  #ended!: () => void;
  readonly #end: Promise<void>;

  constructor(options: DatapathOptions, events: DatapathEvents, tun: Tun, sockets: SocketPair, workers: number) {
    this.#options = options;
    this.#events = events;
    this.#tun = tun;
    this.tunName = tun.name;
    this.tunIndex = tun.index;
    this.#sockets = sockets;
    this.#mark = options.fwmark ?? 0;
    this.#wakeFd = eventfdCreate();
    this.#toMain = new Ring(RING_BYTES[options.mode]);
    this.#toWorker = new Ring(RING_BYTES[options.mode]);
    const { port1, port2 } = new MessageChannel();
    this.#port = port1;
    this.started = new Promise((resolve, reject) => {
      this.#readySettled = { resolve, reject };
    });
    this.#end = new Promise((resolve) => {
      this.#ended = resolve;
    });
    port1.on("message", (reply: Reply) => this.#reply(reply));
    const { fd, vnetHeader, tso, uso } = tun;
    const helpers = Math.max(0, workers - 2);
    this.#starting += helpers;
    if (workers > 1) {
      const sender = new SenderThread(this.#wakeFd, {
        helpers: Math.ceil(helpers / 2),
        mtu: options.mtu,
        tun: { fd, vnetHeader },
        sockets: describe(sockets),
        toMain: new Ring(RING_BYTES[options.mode]).buffer,
      });
      sender.worker.on("error", (error) => this.#fatal(`the datapath failed: ${messageOf(error)}`));
      sender.worker.on("exit", () => this.#senderEnded(sender, "the datapath failed: its sending thread has ended"));
      sender.port.on("message", (reply: Reply) => {
        if (reply.type === "fatal") this.#fatal(reply.reason);
        else if (reply.type === "closed")
          this.#senderEnded(sender, "the datapath failed: its sending thread has closed");
        else if (reply.type === "ready") this.#ready(reply.crew);
      });
      this.#sender = sender;
      this.#starting++;
      void this.#watchRing(new Ring(sender.toMain));
    }
    const setup: WorkerSetup = {
      role: "device",
      helpers: Math.floor(helpers / 2),
      link: this.#sender?.link ?? null,
      mode: options.mode,
      mtu: options.mtu,
      tun: { fd, vnetHeader, tso, uso },
      sockets: describe(sockets),
      epollFd: this.#epollFd,
      wakeFd: this.#wakeFd,
      toMain: this.#toMain.buffer,
      toWorker: this.#toWorker.buffer,
      port: port2,
    };
    this.#worker = new Worker(new URL("./worker.ts", import.meta.url), { workerData: setup, transferList: [port2] });
    this.#worker.on("error", (error) => this.#fatal(`the datapath failed: ${messageOf(error)}`));
    this.#worker.on("exit", () => this.#fatal("the datapath failed: its thread has ended"));
    // The MTU may be changed by others (wg-quick does).
    this.#monitor = new NetlinkMonitor((event) => {
      if (event.kind === "link" && event.change === "new" && event.value.index === tun.index)
        this.#send({ type: "mtu", mtu: event.value.mtu });
    });
    void this.#watchRing(this.#toMain);
  }

  port(): number {
    return portOf(this.#sockets);
  }

  configure(update: DeviceUpdate): Promise<void> {
    const result = this.#configuring.then(() => this.#configure(update));
    this.#queue(result);
    return result;
  }

  #queue(step: Promise<unknown>): void {
    this.#queued++;
    this.#configuring = step
      .catch(() => {})
      .finally(() => {
        this.#queued--;
      });
  }

  async #configure(update: DeviceUpdate): Promise<void> {
    const mark = update.fwmark ?? this.#mark;
    const wanted = update.listenPort;
    // 0 asks for another port; the one that we have already is no change.
    const rebind = wanted !== undefined && wanted !== portOf(this.#sockets);
    const sockets = rebind ? openSockets(this.#options, wanted, mark) : null;
    const marked = sockets ? null : this.#sockets;
    try {
      if (marked && mark !== this.#mark) setMarks(marked, mark);
      await this.#ask({ type: "configure", update, sockets: sockets && describe(sockets) });
    } catch (error) {
      if (marked && mark !== this.#mark) setMarks(marked, this.#mark);
      if (sockets) closeSockets(sockets);
      throw error;
    }
    this.#mark = mark;
    if (!sockets) return;
    closeSockets(this.#sockets);
    this.#sockets = sockets;
  }

  async dump(): Promise<DeviceDump> {
    const dump = (await this.#ask({ type: "dump" })) as DeviceDump;
    return { ...dump, listenPort: portOf(this.#sockets), fwmark: this.#mark };
  }

  async stats(): Promise<DatapathStats> {
    const stats = (await this.#ask({ type: "stats" })) as DatapathStats;
    stats.dropped["relay-ring-full"] = this.#toWorker.dropped;
    return stats;
  }

  async setFilter(filter: FilterConfig | null): Promise<void> {
    await this.#ask({ type: "filter", filter });
  }

  setPath(peer: Key, path: PeerPath): void {
    const send = () => this.#send({ type: "path", peer, path });
    // A peer that is being configured must be there first.
    if (this.#queued === 0) send();
    else this.#queue(this.#configuring.then(send));
  }

  relayIn(peer: Key, data: Uint8Array): void {
    if (this.#state !== "running" || this.#options.mode !== "mesh") return;
    if (this.#toWorker.write(RING_RELAY_IN, peer, data)) eventfdWake(this.#wakeFd);
  }

  sendDatagram(to: AddrPort, data: Uint8Array): boolean {
    if (this.#state !== "running") return false;
    let address = this.#addresses.get(to);
    if (!address) {
      address = sockaddrOf(to);
      if (this.#addresses.size >= 1024) this.#addresses.clear();
      this.#addresses.set(to, address);
    }
    const socket = address.length === 16 ? this.#sockets.v4 : this.#sockets.v6;
    return socket !== null && sendto(socket.fd, address, data) === data.length;
  }

  async close(): Promise<void> {
    if (this.#state === "running" || this.#state === "starting") {
      this.#send({ type: "close" });
      this.#state = "closing";
      const timer = setTimeout(() => this.#finish(), CLOSE_DEADLINE_MS);
      await this.#end;
      clearTimeout(timer);
    } else await this.#end;
  }

  // --- the Worker

  #send(command: Command): void {
    if (this.#state === "closed") return;
    this.#port.postMessage(command);
    eventfdWake(this.#wakeFd);
  }

  #ask(
    command:
      | { type: "dump" | "stats" }
      | { type: "filter"; filter: FilterConfig | null }
      | {
          type: "configure";
          update: DeviceUpdate;
          sockets: Sockets | null;
        },
  ): Promise<unknown> {
    if (this.#state === "closed" || this.#state === "closing")
      return Promise.reject(new Error(`the datapath of ${this.tunName} is closed`));
    const id = this.#nextId++;
    const result = new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
    });
    this.#send({ ...command, id } as Command);
    return result;
  }

  #reply(reply: Reply): void {
    switch (reply.type) {
      case "ready":
        this.#ready(reply.crew);
        return;
      case "done":
      case "failed": {
        const waiting = this.#waiting.get(reply.id);
        this.#waiting.delete(reply.id);
        if (reply.type === "done") waiting?.resolve(reply.value);
        else waiting?.reject(new Error(reply.reason));
        return;
      }
      case "closed":
        this.#closed = true;
        if (!this.#sender || this.#sender.ended) this.#finish();
        return;
      case "fatal":
        this.#fatal(reply.reason);
    }
  }

  /** A Worker is ready; `crew`: what its helpers need. */
  #ready(crew: CrewSetup | null): void {
    for (const part of crew?.parts ?? []) this.#recruit(crew!, part);
    if (--this.#starting > 0) return;
    if (this.#state === "starting") this.#state = "running";
    this.#readySettled.resolve();
  }

  #recruit({ memory, words, table }: CrewSetup, part: HelperSetup["part"]): void {
    const { port1, port2 } = new MessageChannel();
    const workerData: HelperSetup = { role: "helper", memory, words, table, part, port: port2 };
    const worker = new Worker(new URL("./worker.ts", import.meta.url), { workerData, transferList: [port2] });
    worker.on("error", (error) => this.#fatal(`the datapath failed: ${messageOf(error)}`));
    worker.on("exit", () => this.#fatal("the datapath failed: a thread of its ciphers has ended"));
    port1.on("message", (reply: Reply) => {
      if (reply.type === "fatal") this.#fatal(reply.reason);
      else if (reply.type === "ready") this.#ready(null);
    });
    this.#helpers.push({ worker, port: port1 });
  }

  /** It ends when the device says so, and that when it closes itself. */
  #senderEnded(sender: SenderThread, reason: string): void {
    sender.ended = true;
    if (this.#state !== "closing") this.#fatal(reason);
    else if (this.#closed) this.#finish();
  }

  #fatal(reason: string): void {
    const state = this.#state;
    if (this.#isClosed()) return;
    this.#finish();
    // While it starts, startDatapath reports it and closes what it has opened.
    if (state === "starting") this.#readySettled.reject(new Error(reason));
    else if (state === "running") this.#events.onFatal?.(reason);
  }

  #isClosed(): boolean {
    return this.#state === "closed";
  }

  #finish(): void {
    if (this.#isClosed()) return;
    const started = this.#state !== "starting";
    this.#state = "closed";
    this.#monitor.close();
    this.#port.close();
    for (const waiting of this.#waiting.values())
      waiting.reject(new Error(`the datapath of ${this.tunName} was closed`));
    this.#waiting.clear();
    for (const words of this.#ringWords) Atomics.notify(words, 0);
    const helpers = this.#helpers.map(({ worker, port }) => {
      port.close();
      return worker.terminate();
    });
    void Promise.allSettled([this.#worker.terminate(), this.#sender?.terminate(), ...helpers]).finally(() => {
      this.#sender?.close();
      closeFd(this.#epollFd);
      closeFd(this.#wakeFd);
      if (started) {
        closeSockets(this.#sockets);
        closeFd(this.#tun.fd);
      }
      this.#ended();
    });
  }

  // --- the ring

  async #watchRing(ring: Ring): Promise<void> {
    const { words } = ring;
    this.#ringWords.push(words);
    while (!this.#isClosed()) {
      const head = Atomics.load(words, 0);
      let batch = 0;
      while (!this.#isClosed() && batch++ < RING_BATCH) {
        const record = ring.read(this.#recordWords);
        if (record < 0) break;
        this.#take(record >>> 16, this.#record.subarray(0, record & 0xffff));
      }
      if (!ring.empty) {
        await new Promise((resolve) => setImmediate(resolve));
        continue;
      }
      const wait = Atomics.waitAsync(words, 0, head);
      if (wait.async) await wait.value;
    }
  }

  #take(kind: number, bytes: Uint8Array): void {
    const events = this.#events;
    if (kind === RING_DATAGRAM) {
      const end = 3 + bytes[0]!;
      events.onDatagram?.(formatAddrPort(bytes.slice(3, end), (bytes[1]! << 8) | bytes[2]!), bytes.slice(end));
      return;
    }
    const peer = bytes.slice(0, 32);
    if (kind === RING_RELAY) events.onRelay?.(peer, bytes.slice(32));
    else if (kind === RING_ACTIVITY) events.onActivity?.(peer);
    else if (kind === RING_HANDSHAKE) {
      const ms = new DataView(bytes.buffer, bytes.byteOffset + 32, 8).getFloat64(0, true);
      events.onHandshake?.(peer, ms, bytes[40] === 1);
    }
  }
}

/** The Worker that sends (sender.ts), and what it shares with the one that has the device. */
class SenderThread {
  readonly worker: Worker;
  readonly port: MessagePort;
  readonly link: Link;
  readonly toMain: SharedArrayBuffer;
  readonly #epollFd = epollCreate();
  ended = false;

  constructor(receiverWakeFd: number, setup: Pick<SenderSetup, "helpers" | "mtu" | "tun" | "sockets" | "toMain">) {
    this.link = {
      toSender: new Ring(LINK_RING_BYTES).buffer,
      toReceiver: new Ring(LINK_RING_BYTES).buffer,
      senderWakeFd: eventfdCreate(),
      receiverWakeFd,
      stats: new SharedArrayBuffer(8 * (SENDER_STATS.length + ASM_DROPS.length)),
    };
    this.toMain = setup.toMain;
    const { port1, port2 } = new MessageChannel();
    this.port = port1;
    const workerData: SenderSetup = { role: "sender", ...setup, link: this.link, epollFd: this.#epollFd, port: port2 };
    this.worker = new Worker(new URL("./worker.ts", import.meta.url), { workerData, transferList: [port2] });
  }

  terminate(): Promise<number> {
    this.port.close();
    return this.worker.terminate();
  }

  /** After the Worker has ended. */
  close(): void {
    closeFd(this.#epollFd);
    closeFd(this.link.senderWakeFd);
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function setMarks({ v4, v6 }: SocketPair, mark: number): void {
  if (v4) setMark(v4.fd, mark);
  if (v6) setMark(v6.fd, mark);
}
