// The device's end of the link to the sender Worker: what the sender must know goes there as records in one ring, in the
// order in which it happened; what the sender did comes back in another. Keys to send with are in no other memory than the
// sender's, and the flows that it has let out are known here before a reply can be read from the socket.
import { eventfdWake } from "../../ffi/eventfd.ts";
import type { Asm } from "../crypto/wasm.ts";
import type { IP } from "../wire/ip.ts";
import type { Device } from "../wireguard/device.ts";
import type { Sealer } from "../wireguard/sealer.ts";
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
  type Link,
  type Sockets,
} from "./messages.ts";
import { PATH_RECORD, type PeerPaths } from "./peer-paths.ts";
import { Ring } from "./ring.ts";
import "./asm.ts";

export class SenderLink implements Sealer {
  /** The sender's counters as of the last fence. */
  readonly stats: Float64Array;
  readonly #asm: Asm;
  readonly #box: Mailbox;
  readonly #from: Ring;
  readonly #wakeFd: number;
  readonly #flow: number;
  readonly #record = new Uint8Array(160);
  readonly #view = new DataView(this.#record.buffer);
  readonly #read = new Uint32Array(16);
  readonly #fences: { number: number; then: () => void }[] = [];
  #nextFence = 1;
  #device!: Device;
  #paths!: PeerPaths;
  #active!: (slot: number, now: number) => void;

  constructor(asm: Asm, link: Link) {
    this.#asm = asm;
    this.#box = new Mailbox(new Ring(link.toSender, true));
    this.#from = new Ring(link.toReceiver);
    this.#wakeFd = link.senderWakeFd;
    this.#flow = asm.alloc(64);
    this.stats = new Float64Array(link.stats);
  }

  /** `active`: user data goes to this peer. */
  serve(device: Device, paths: PeerPaths, active: (slot: number, now: number) => void): void {
    this.#device = device;
    this.#paths = paths;
    this.#active = active;
    paths.onChange = (slot) => this.#path(slot);
  }

  // --- to the sender

  install(session: number, peer: number, localIndex: number, remoteIndex: number, key: Uint8Array): void {
    this.#words(session, peer, localIndex, remoteIndex);
    this.#record.set(key, 16);
    this.#post(LINK_SESSION, 48);
    this.#record.fill(0, 16, 48);
  }

  wipe(session: number): void {
    this.#words(session);
    this.#post(LINK_WIPE, 4);
  }

  use(peer: number, session: number, ms: number): void {
    this.#words(peer, session);
    this.#view.setFloat64(8, ms, true);
    this.#post(LINK_USE, 16);
  }

  dropStaged(peer: number): void {
    this.#words(peer);
    this.#post(LINK_DROP, 4);
  }

  forget(peer: number): void {
    this.#paths.clear(peer);
  }

  allow(ip: IP, bits: number, peer: number): void {
    this.#prefix(LINK_ALLOW, ip, bits, peer);
  }

  disallow(ip: IP, bits: number): void {
    this.#prefix(LINK_DISALLOW, ip, bits, 0);
  }

  keepalive(peer: number, session: number): void {
    this.#words(peer, session);
    this.#post(LINK_KEEPALIVE, 8);
  }

  filter(on: boolean): void {
    this.#words(on ? 1 : 0);
    this.#post(LINK_FILTER, 4);
  }

  mtu(mtu: number): void {
    this.#words(mtu);
    this.#post(LINK_MTU, 4);
  }

  sockets({ fd4, fd6, gso4, gso6 }: Sockets): void {
    this.#words(fd4, fd6, gso4 ? 1 : 0, gso6 ? 1 : 0);
    this.#post(LINK_SOCKETS, 16);
  }

  /** Calls `then` when all that was said before has taken effect in the sender, and its counters are here. */
  fence(then: () => void): void {
    const number = this.#nextFence++;
    this.#fences.push({ number, then });
    this.#words(number);
    this.#post(LINK_FENCE, 4);
  }

  close(): void {
    this.#post(LINK_CLOSE, 0);
    this.flush();
  }

  /** Records wait for room in the ring: `flush` again soon. */
  get backlog(): boolean {
    return this.#box.backlog;
  }

  /** Wakes the sender if there is something for it. */
  flush(): void {
    this.#box.flush();
    if (!this.#box.posted) return;
    this.#box.posted = false;
    eventfdWake(this.#wakeFd);
  }

  #path(slot: number): void {
    this.#words(slot);
    const key = this.#device.peerBySlot(slot)?.publicKey;
    if (key) this.#record.set(key, 4);
    else this.#record.fill(0, 4, 36);
    this.#paths.record(slot, this.#record.subarray(36, 36 + PATH_RECORD));
    this.#post(LINK_PATH, 36 + PATH_RECORD);
  }

  #prefix(kind: number, ip: IP, bits: number, peer: number): void {
    this.#words(peer);
    this.#record[4] = bits;
    this.#record.set(ip, 5);
    this.#post(kind, 5 + ip.length);
  }

  #words(...values: number[]): void {
    values.forEach((value, i) => {
      this.#view.setUint32(4 * i, value, true);
    });
  }

  #post(kind: number, length: number): void {
    this.#box.post(kind, this.#record.subarray(0, length));
  }

  // --- from the sender

  /** Takes over what the sender did; before received packets are looked at, and before timers run. */
  drain(now: number): void {
    for (;;) {
      const record = this.#from.read(this.#read);
      if (record < 0) return;
      this.#take(record >>> 16, now);
    }
  }

  #take(kind: number, now: number): void {
    const words = this.#read;
    const a = words[0]!;
    switch (kind) {
      case LINK_SENT:
        this.#device.told(a, words[1]!, words[4]!, words[2]!, words[3]!, now);
        this.#active(a, now);
        return;
      case LINK_WANT:
        this.#device.want(a, now);
        this.#active(a, now);
        return;
      case LINK_FLOW:
        this.#asm.u32.set(this.#read, this.#flow >> 2);
        this.#asm.exports.filterLearn(this.#flow);
        return;
      case LINK_SOURCE_GONE:
        this.#paths.clearSource(a);
        return;
      case LINK_FENCED:
        while (this.#fences.length > 0 && this.#fences[0]!.number <= a) this.#fences.shift()!.then();
    }
  }
}
