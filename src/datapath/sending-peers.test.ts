// Device and sender apart, as two threads are: what one says reaches the other late, in order. Hours of a virtual clock.
import { describe, expect, test } from "bun:test";
import { Asm } from "../crypto/wasm.ts";
import type { Output } from "../wireguard/device.ts";
import type { Sealer } from "../wireguard/sealer.ts";
import { joined, seededRandom, TestNode, testPacket } from "../wireguard/test-link.ts";
import { SendingPeers } from "./sending-peers.ts";

const HOUR = 3_600_000;
const MAX_PEERS = 16;

type Words = { due: number; run: (now: number) => void }[];

/** In order: nothing overtakes what was said before. */
function late(words: Words, due: number, run: (now: number) => void): void {
  words.push({ due: Math.max(words.at(-1)?.due ?? 0, due), run });
}

/** A node whose sender has another module instance with another memory. */
class SplitNode extends TestNode {
  readonly sender: SendingPeers;
  readonly senderAsm: Asm;
  /** Session and counter of every message that was sealed. */
  readonly nonces: { session: number; counter: bigint }[] = [];
  readonly #sealed: Extract<Output, { type: "send" }>[] = [];
  readonly #toSender: Words;
  readonly #toDevice: Words = [];
  readonly #clock: { now: number };
  readonly #lag: () => number;

  constructor(name: number, lag: () => number) {
    // The device speaks while it is constructed.
    const queue: Words = [];
    const clock = { now: 0 };
    let sender!: SendingPeers;
    const say = (run: (now: number) => void) => late(queue, clock.now + lag(), run);
    const sealer: Sealer = {
      install: (session, peer, local, remote, key) => {
        const copy = key.slice();
        say(() => sender.install(session, peer, local, remote, copy));
      },
      wipe: (session) => say(() => sender.wipe(session)),
      use: (peer, session, ms) => say((now) => sender.use(peer, session, ms, now)),
      dropStaged: (peer) => say(() => sender.dropStaged(peer)),
      forget: () => {},
      allow: () => {},
      disallow: () => {},
    };
    super(name, { sealer, maxPeers: MAX_PEERS });
    this.#toSender = queue;
    this.#clock = clock;
    this.#lag = lag;
    this.senderAsm = Asm.create(64);
    sender = new SendingPeers(this.senderAsm, MAX_PEERS, 1420, {
      reachable: (slot) => this.device.peerBySlot(slot)?.endpoint != null,
      send: (slot, message) => this.#seal(slot, message.slice()),
      sent: (slot, session, packets, bytes, high) =>
        this.#tell((now) => this.device.told(slot, session, high, packets, bytes, now)),
    });
    this.sender = sender;
  }

  #seal(slot: number, data: Uint8Array): void {
    const view = new DataView(data.buffer);
    this.nonces.push({ session: view.getUint32(4, true), counter: view.getBigUint64(8, true) });
    this.#sealed.push({ type: "send", slot, data });
  }

  #tell(run: (now: number) => void): void {
    late(this.#toDevice, this.#clock.now + this.#lag(), run);
  }

  /** What is due of what the two have said to each other. */
  exchange(now: number): void {
    this.#clock.now = now;
    while ((this.#toDevice[0]?.due ?? Infinity) <= now) this.#toDevice.shift()!.run(now);
    while ((this.#toSender[0]?.due ?? Infinity) <= now) this.#toSender.shift()!.run(now);
    this.sender.settle(now);
  }

  override send(id: number, now: number, size = 60, slot = this.peer.slot): Uint8Array | null {
    this.exchange(now);
    const packet = testPacket(id, size);
    const session = this.sender.prepareSend(slot, now);
    if (session < 0) {
      this.sender.stage(slot, packet);
      for (const wanted of this.sender.wanted) this.#tell((at) => this.device.want(wanted, at));
      this.sender.wanted.clear();
      return null;
    }
    const p = this.senderAsm.exports.heapBase() + 32 * 65536;
    const padded = (size + 15) & ~15;
    this.senderAsm.u8.fill(0, p, p + padded);
    this.senderAsm.u8.set(packet, p);
    if (this.senderAsm.exports.sessionSeal(session, p, padded) === 0) throw new Error("the session cannot seal");
    this.sender.sent(slot, 1, padded + 32);
    this.#seal(slot, this.senderAsm.u8.slice(p - 16, p + padded + 16));
    return null;
  }

  override messages(): Extract<Output, { type: "send" }>[] {
    const own = super.messages();
    return [...own, ...this.#sealed.splice(0)];
  }

  protected override keepalive(slot: number, session: number): void {
    late(this.#toSender, this.#clock.now + this.#lag(), (now) => this.sender.keepalive(slot, session, now));
  }
}

function nodes(lag: number, seed: number): [SplitNode, SplitNode] {
  const random = seededRandom(seed);
  const some = () => random() * lag;
  return [new SplitNode(1, some), new SplitNode(3, some)];
}

function noNonceTwice(node: SplitNode): number {
  const next = new Map<number, bigint>();
  for (const { session, counter } of node.nonces) {
    expect(counter).toBe(next.get(session) ?? 0n);
    next.set(session, counter + 1n);
  }
  return next.size;
}

describe("an hour with device and sender apart", () => {
  for (const lag of [0, 5, 60]) {
    test(`words up to ${lag} ms late: every packet once and in order, dozens of rekeys, no nonce twice`, () => {
      const [a, b] = nodes(lag, 7 + lag);
      const { net } = joined(a, b, { delay: 20 });
      net.record = false;
      let sent = 0;
      net.every(10, 0, HOUR, (now) => {
        a.exchange(now);
        b.exchange(now);
        if (now % 100 !== 0) return;
        net.send(a, sent++);
        net.send(b, sent++);
      });
      net.run(HOUR + 10_000);
      for (const [node, parity] of [
        [b, 0],
        [a, 1],
      ] as const) {
        expect(node.arrived).toEqual(Array.from({ length: sent / 2 }, (_, i) => 2 * i + parity));
        expect(node.drops).toEqual([]);
        expect(node.handshakes.length).toBeGreaterThanOrEqual(29);
        expect(noNonceTwice(node)).toBeGreaterThanOrEqual(29);
      }
    }, 120_000);
  }

  test("one-sided traffic: the receiver answers with keepalives, nobody initiates out of turn", () => {
    const [a, b] = nodes(5, 3);
    const { net } = joined(a, b, { delay: 15 });
    let sent = 0;
    net.every(5, 0, HOUR, (now) => {
      a.exchange(now);
      b.exchange(now);
      if (now % 250 === 0) net.send(a, sent++);
    });
    net.run(HOUR);
    expect(b.arrived.length).toBe(sent - 1);
    expect(a.keepalives).toBeGreaterThan(300);
    const initiations = net.sent.filter(({ message }) => message[0] === 1);
    expect(initiations.length).toBe(30);
    expect(initiations.every(({ from }) => from === a)).toBe(true);
    noNonceTwice(b);
  }, 120_000);

  test("the sender's counter decides when to rekey", () => {
    const [a, b] = nodes(5, 9);
    const { net } = joined(a, b, { delay: 15 });
    net.every(5, 0, 30_000, (now) => {
      a.exchange(now);
      b.exchange(now);
      if (now % 1000 === 0) net.send(a, now);
    });
    net.run(10_500);
    const sessions = () => new Set(a.nonces.map(({ session }) => session)).size;
    expect(sessions()).toBe(1);
    const session = a.sender.prepareSend(a.peer.slot, net.now);
    a.senderAsm.view.setBigUint64(a.senderAsm.exports.sessionAddress(session) + 16, 2n ** 60n, true);
    net.run(15_000);
    expect(sessions()).toBe(2);
    expect(b.arrived.length).toBe(15);
    expect(b.drops).toEqual([]);
  });

  test("nobody answers: what waits is dropped when the device gives up, and a removed peer's session seals no more", () => {
    const [a, b] = nodes(0, 5);
    const { net } = joined(a, b, { delay: 15 });
    net.filter = () => false;
    net.send(a, 1);
    net.every(50, 0, 200_000, (now) => a.exchange(now));
    net.run(150_000);
    net.filter = () => true;
    net.send(a, 2);
    net.run(160_000);
    expect(b.arrived).toEqual([2]);
    const { slot } = a.peer;
    const session = a.sender.prepareSend(slot, net.now);
    expect(session).toBeGreaterThanOrEqual(0);
    // The device's own table opens on it, and never seals.
    const own = a.asm.alloc(64) + 16;
    expect(a.asm.exports.sessionPeer(session)).toBe(slot);
    expect(a.asm.exports.sessionSeal(session, own, 16)).toBe(0);
    a.configure({ peers: [{ publicKey: b.publicKey, remove: true }] }, net.now);
    net.run(161_000);
    expect(a.sender.prepareSend(slot, net.now)).toBe(-1);
    const p = a.senderAsm.exports.heapBase() + 32 * 65536;
    expect(a.senderAsm.exports.sessionSeal(session, p, 16)).toBe(0);
  });
});
