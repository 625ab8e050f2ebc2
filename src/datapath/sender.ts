// The sender Worker, where the work is split (docs/architecture.md, "More cores"): TUN -> route -> split -> seal -> UDP, in
// a module instance and a memory of its own. It holds the keys to send with, which nobody else has, so no nonce can be used
// twice; it learns of sessions, paths and allowed IPs by records that it takes in the order in which the device wrote them.
import { EPOLL_EVENT_DATA, EPOLL_EVENT_SIZE, EPOLLIN, epollAdd, epollWait } from "../../ffi/epoll.ts";
import { EINTR } from "../../ffi/errno.ts";
import { eventfdDrain, eventfdWake } from "../../ffi/eventfd.ts";
import { addressOf } from "../../ffi/libc.ts";
import { Asm } from "../crypto/wasm.ts";
import { ASM_DROPS } from "./asm.ts";
import { Crew } from "./crew.ts";
import { layOutFilter } from "./filter.ts";
import { MAX_ALLOWED_IPS, MAX_PEERS, MEMORY_PAGES } from "./limits.ts";
import { Mailbox } from "./mailbox.ts";
import {
  LINK_ALLOW,
  LINK_CLOSE,
  LINK_DISALLOW,
  LINK_DROP,
  LINK_FENCE,
  LINK_FENCED,
  LINK_FILTER,
  LINK_FLOW,
  LINK_KEEPALIVE,
  LINK_MTU,
  LINK_PATH,
  LINK_SENT,
  LINK_SESSION,
  LINK_SOCKETS,
  LINK_SOURCE_GONE,
  LINK_USE,
  LINK_WANT,
  LINK_WIPE,
  RING_RELAY,
  SENDER_STATS,
  type SenderSetup,
} from "./messages.ts";
import { PeerPaths } from "./peer-paths.ts";
import { Ring } from "./ring.ts";
import { SendingPeers } from "./sending-peers.ts";
import { Transmitter } from "./transmit.ts";
import { TunReader } from "./tun-reader.ts";
import { warmUpDatapath } from "./warmup.ts";

const TOKEN_WAKE = 0;
const TOKEN_TUN = 1;
const EVENTS = 2;
const FLOW_SIZE = 40;
/** How long the device may wait for what only moves its timers and counts. */
const REPORT_MS = 50;

/** The copy of the peers' paths; what the kernel refuses is told to the device. */
class CopiedPaths extends PeerPaths {
  onSourceGone: (slot: number) => void = () => {};

  override clearSource(slot: number): void {
    if (this.controlLength[slot] !== 0) this.onSourceGone(slot);
    super.clearSource(slot);
  }
}

export class Sender {
  readonly crew: Crew | null;
  readonly #setup: SenderSetup;
  readonly #asm: Asm;
  readonly #base: number;
  readonly #from: Ring;
  readonly #box: Mailbox;
  readonly #toMain: Ring;
  readonly #paths: CopiedPaths;
  readonly #peers: SendingPeers;
  readonly #tx: Transmitter;
  readonly #tun: TunReader;
  readonly #epoll: number;
  readonly #events: number;
  readonly #address: number;
  readonly #emptyFilter: number;
  readonly #words = new Uint32Array(8);
  /** The first of them. */
  readonly #word = new Uint8Array(this.#words.buffer, 0, 4);
  readonly #read = new Uint8Array(256);
  readonly #readWords = new Uint32Array(this.#read.buffer);
  readonly #readView = new DataView(this.#read.buffer);
  readonly #stats: Float64Array;

  readonly #peerKeys: (Uint8Array | undefined)[] = [];
  /** When the device must know of what was told to it; Infinity: nothing was. */
  #reportDue = Number.POSITIVE_INFINITY;
  #filtering = false;
  #notify = false;
  #closing = false;

  constructor(setup: SenderSetup) {
    this.#setup = setup;
    const { mtu, tun, sockets, link } = setup;
    const asm = Asm.create(MEMORY_PAGES);
    warmUpDatapath(asm);
    this.#asm = asm;
    this.#base = addressOf(asm.u8);
    const { exports } = asm;
    exports.trieInit(asm.alloc(exports.trieSize(2 * MAX_ALLOWED_IPS), 64), 2 * MAX_ALLOWED_IPS);
    exports.filterShareFlows();
    this.#from = new Ring(link.toSender, true);
    this.#box = new Mailbox(new Ring(link.toReceiver));
    this.#toMain = new Ring(setup.toMain);
    this.#stats = new Float64Array(link.stats);
    this.#paths = new CopiedPaths(asm, "copy", MAX_PEERS);
    this.#paths.onSourceGone = (slot) => {
      this.#words[0] = slot;
      this.#box.post(LINK_SOURCE_GONE, this.#word);
    };
    this.#peers = new SendingPeers(asm, MAX_PEERS, mtu, {
      reachable: (slot) => this.#paths.nameLength[slot] !== 0 || this.#paths.relay[slot] !== 0,
      send: (slot, message, now) => this.#tx.message(slot, message, now),
      sent: (slot, session, packets, bytes, counterHigh) => this.#sent(slot, session, packets, bytes, counterHigh),
    });
    this.crew = setup.helpers > 0 ? new Crew(asm, setup.helpers) : null;
    this.#tx = new Transmitter(
      asm,
      this.#base,
      {
        prepareSend: (slot, now) => this.#peers.prepareSend(slot, now),
        stage: (slot, packet) => this.#peers.stage(slot, packet),
        sent: (slot, packets, bytes) => this.#peers.sent(slot, packets, bytes),
        peerBySlot: () => null,
      },
      this.#paths,
      {
        drain: () => this.#tellFlows(),
        relay: (slot, start, length) => this.#relay(slot, start, length),
        activity: () => {},
      },
      { mtu, ...sockets },
      this.crew,
    );
    this.#tun = new TunReader(asm, this.#base, tun);
    this.#events = asm.alloc(EVENTS * EPOLL_EVENT_SIZE);
    this.#address = asm.alloc(16);
    // Only what comes in is judged by rules; here it counts that there is a filter.
    const filter = layOutFilter({ rules: [], local: [], skippedBad: 0, skippedCaps: 0 }, 0).length;
    this.#emptyFilter = asm.alloc(filter);
    asm.u8.set(
      layOutFilter({ rules: [], local: [], skippedBad: 0, skippedCaps: 0 }, this.#emptyFilter),
      this.#emptyFilter,
    );
    this.#epoll = setup.epollFd;
    epollAdd(this.#epoll, link.senderWakeFd, EPOLLIN, TOKEN_WAKE);
    epollAdd(this.#epoll, tun.fd, EPOLLIN, TOKEN_TUN);
  }

  /** Until the device says close. Throws DeviceGone when the TUN has vanished. */
  run(): void {
    const { view } = this.#asm;
    try {
      while (!this.#closing) {
        const n = epollWait(this.#epoll, this.#base + this.#events, EVENTS, this.#wait());
        if (n < 0 && n !== -EINTR) throw new Error(`epoll_wait failed with errno ${-n}`);
        const now = performance.now();
        let ready = 0;
        for (let i = 0; i < n; i++)
          ready |= 1 << view.getUint32(this.#events + i * EPOLL_EVENT_SIZE + EPOLL_EVENT_DATA, true);
        if (ready & (1 << TOKEN_WAKE)) eventfdDrain(this.#setup.link.senderWakeFd);
        this.#takeAll(now);
        if (ready & (1 << TOKEN_TUN) || this.#tun.backlog) this.#tun.read(this.#tx, now);
        this.#tx.flush(now);
        this.#report(now);
      }
    } finally {
      this.#tx.close();
      this.#asm.exports.sessionWipeAll();
    }
  }

  #wait(): number {
    if (this.#tun.backlog) return 0;
    if (this.#box.backlog || this.#peers.wanted.size > 0) return 1;
    if (this.#reportDue === Number.POSITIVE_INFINITY) return -1;
    return Math.max(0, Math.ceil(this.#reportDue - performance.now()));
  }

  // --- what was sent

  /** The device must know before a reply can come: it looks here before it looks at what the socket brought. */
  #sent(slot: number, session: number, packets: number, bytes: number, counterHigh: number): void {
    const words = this.#words;
    words[0] = slot;
    words[1] = session;
    words[2] = packets;
    words[3] = bytes;
    words[4] = counterHigh;
    this.#box.tell(LINK_SENT, words, 0, 20);
  }

  #tellFlows(): void {
    if (!this.#filtering) return;
    const { exports, u32 } = this.#asm;
    const n = exports.filterTakeNews();
    const news = exports.filterNews();
    for (let i = 0; i < n; i++) this.#box.tell(LINK_FLOW, u32, news + i * FLOW_SIZE, FLOW_SIZE);
  }

  #relay(slot: number, start: number, length: number): void {
    const key = this.#peerKeys[slot];
    if (!key) return;
    this.#toMain.writeFrom(RING_RELAY, key, this.#asm.u32, start, length);
    this.#notify = true;
  }

  // --- to the device and the main thread

  #report(now: number): void {
    this.#box.flush();
    if (this.#peers.wanted.size > 0) {
      for (const slot of this.#peers.wanted) {
        this.#words[0] = slot;
        if (this.#box.tell(LINK_WANT, this.#words, 0, 4)) this.#peers.wanted.delete(slot);
      }
      this.#wake();
    }
    if (this.#box.posted) {
      this.#box.posted = false;
      if (this.#reportDue === Number.POSITIVE_INFINITY) this.#reportDue = now + REPORT_MS;
    }
    if (now >= this.#reportDue) {
      if (this.#box.empty) this.#reportDue = Number.POSITIVE_INFINITY;
      else this.#wake();
    }
    if (!this.#notify) return;
    this.#notify = false;
    Atomics.notify(this.#toMain.words, 0);
  }

  #wake(): void {
    this.#box.posted = false;
    this.#reportDue = Number.POSITIVE_INFINITY;
    eventfdWake(this.#setup.link.receiverWakeFd);
  }

  // --- from the device

  #takeAll(now: number): void {
    for (;;) {
      const record = this.#from.read(this.#readWords);
      if (record < 0) break;
      this.#take(record >>> 16, record & 0xffff, now);
    }
    this.#peers.settle(now);
  }

  #take(kind: number, length: number, now: number): void {
    const { exports, u8 } = this.#asm;
    const word = (i: number) => this.#readWords[i]!;
    switch (kind) {
      case LINK_SESSION:
        this.#peers.install(word(0), word(1), word(2), word(3), this.#read.subarray(16, 48));
        this.#read.fill(0, 16, 48);
        return;
      case LINK_WIPE:
        this.#peers.wipe(word(0));
        return;
      case LINK_USE:
        this.#peers.use(word(0), this.#readView.getInt32(4, true), this.#readView.getFloat64(8, true), now);
        return;
      case LINK_DROP:
        this.#peers.dropStaged(word(0));
        return;
      case LINK_PATH:
        this.#peerKeys[word(0)] = this.#read.slice(4, 36);
        this.#paths.adopt(word(0), this.#read.subarray(36, length));
        this.#peers.resume(word(0));
        return;
      case LINK_ALLOW:
      case LINK_DISALLOW: {
        const family = length === 9 ? 4 : 6;
        u8.set(this.#read.subarray(5, length), this.#address);
        if (kind === LINK_ALLOW) exports.trieInsert(this.#address, this.#read[4]!, family, word(0));
        else exports.trieRemove(this.#address, this.#read[4]!, family);
        return;
      }
      case LINK_KEEPALIVE:
        this.#peers.keepalive(word(0), word(1), now);
        return;
      case LINK_FILTER:
        this.#filtering = word(0) === 1;
        exports.filterSet(this.#filtering ? this.#emptyFilter : 0);
        return;
      case LINK_MTU:
        this.#tx.mtu = word(0);
        this.#peers.mtu = word(0);
        return;
      case LINK_SOCKETS:
        // What was said before goes to where it was said.
        this.#tx.flush(now);
        this.#tx.v4.replace(this.#readView.getInt32(0, true), word(2) === 1);
        this.#tx.v6.replace(this.#readView.getInt32(4, true), word(3) === 1);
        return;
      case LINK_FENCE: {
        this.#count();
        this.#words[0] = word(0);
        this.#box.post(LINK_FENCED, this.#word);
        this.#wake();
        return;
      }
      case LINK_CLOSE:
        this.#closing = true;
    }
  }

  #count(): void {
    const { v4, v6, packets, unsealed } = this.#tx;
    const values: Record<(typeof SENDER_STATS)[number], number> = {
      packets,
      sent: v4.sentPackets + v6.sentPackets,
      failed: v4.failed + v6.failed,
      unsealed,
      lost: this.#toMain.dropped,
      gso: v4.gso || v6.gso ? 1 : 0,
      helped: this.crew?.helped ?? 0,
    };
    SENDER_STATS.forEach((name, i) => {
      this.#stats[i] = values[name];
    });
    const drops = this.#asm.exports.dropCounters() >> 2;
    for (let i = 0; i < ASM_DROPS.length; i++) this.#stats[SENDER_STATS.length + i] = this.#asm.u32[drops + i]!;
  }
}
