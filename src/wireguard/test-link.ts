// For tests: WireGuard devices on a simulated network with a virtual clock. A node does what the datapath does: it seals
// and opens data packets in wasm memory and reports batches to its Device. Nothing here knows real time or real chance.
import { Asm } from "../crypto/wasm.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { messageType, TRANSPORT_OVERHEAD, TYPE_TRANSPORT } from "../wire/wireguard.ts";
import { OPEN_SLOT_MASK } from "./asm.ts";
import type { DeviceUpdate, PeerUpdate } from "./config.ts";
import { Device, type DeviceOptions, type Drop, type Output, type Source } from "./device.ts";

/** 2024-01-01. */
export const UNIX_OFFSET = 1_704_067_200_000;

/** xorshift128: numbers in [0, 1). */
export function seededRandom(seed: number): () => number {
  let [a, b, c, d] = [seed | 1, 0x9e3779b9, 0x243f6a88, seed ^ 0xb7e15162];
  const next = () => {
    const t = a ^ (a << 11);
    [a, b, c] = [b, c, d];
    d = d ^ (d >>> 19) ^ t ^ (t >>> 8);
    return (d >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 16; i++) next();
  return next;
}

export function seededBytes(seed: number): (n: number) => Uint8Array {
  const next = seededRandom(seed);
  return (n) => Uint8Array.from({ length: n }, () => Math.floor(next() * 256));
}

export const key = (byte: number): Uint8Array => new Uint8Array(32).fill(byte);

/** An IPv4 packet of `size` bytes which carries a number; the rest is derived from it, so that damage would show. */
export function testPacket(id: number, size = 60): Uint8Array {
  const packet = new Uint8Array(size);
  packet[0] = 0x45;
  const view = new DataView(packet.buffer);
  view.setUint16(2, size);
  view.setUint32(20, id);
  for (let i = 24; i < size; i++) packet[i] = (id * 31 + i) & 0xff;
  return packet;
}

/** What a device said, with what became of its messages. */
export class TestNode {
  readonly device: Device;
  readonly asm: Asm;
  readonly privateKey: Uint8Array;
  readonly publicKey: Uint8Array;
  readonly addr: string;
  /** Numbers of the packets that arrived, in order of arrival. */
  arrived: number[] = [];
  keepalives = 0;
  /** Reasons of `sessionOpen` and of `handleHandshake` for which messages were dropped. */
  drops: (number | Drop)[] = [];
  handshakes: Extract<Output, { type: "handshake" }>[] = [];
  forgotten = 0;
  readonly #buffer: number;

  constructor(name: number, options: Partial<DeviceOptions> = {}) {
    this.asm = Asm.create();
    this.privateKey = key(name);
    this.publicKey = x25519Public(this.privateKey);
    this.addr = `192.0.2.${name}:51820`;
    this.device = new Device({
      asm: this.asm,
      random: seededBytes(name),
      mode: "wg",
      unixOffset: UNIX_OFFSET,
      maxPeers: 16,
      mtu: 1420,
      ...options,
    });
    this.#buffer = this.asm.alloc(65536 + 256, 64);
    this.device.configure({ privateKey: this.privateKey }, 0);
  }

  /** The first (for most tests: the only) peer. */
  get peer() {
    return this.device.peers()[Symbol.iterator]().next().value!;
  }

  configure(update: DeviceUpdate, now = 0): void {
    this.device.configure(update, now);
  }

  addPeer(other: TestNode, extra: Partial<PeerUpdate> = {}, now = 0): void {
    const peer = { publicKey: other.publicKey, endpoint: other.addr, allowedIPs: [`10.0.0.${other.privateKey[0]}`] };
    this.configure({ peers: [{ ...peer, ...extra }] }, now);
  }

  /** Sends one packet as the datapath does; a finished transport message, or null: it was staged. */
  send(id: number, now: number, size = 60, slot = this.peer.slot): Uint8Array | null {
    const packet = testPacket(id, size);
    const session = this.device.prepareSend(slot, now);
    const p = this.#buffer + 64;
    const padded = (size + 15) & ~15;
    if (session >= 0) {
      this.asm.u8.set(packet, p);
      this.asm.u8.fill(0, p + size, p + padded);
      if (this.asm.exports.sessionSeal(session, p, padded) === 1) {
        const message = this.asm.u8.slice(p - 16, p + padded + 16);
        this.device.sent(slot, 1, message.length, now);
        return message;
      }
    }
    this.device.stage(slot, packet, now);
    return null;
  }

  /** A datagram arrives. True: it was accepted. */
  deliver(message: Uint8Array, from: Source, now: number): boolean {
    if (messageType(message) !== TYPE_TRANSPORT) {
      const drop = this.device.handleHandshake(message, from, now);
      if (drop) this.drops.push(drop);
      return drop === null;
    }
    const p = this.#buffer + 64;
    this.asm.u8.set(message, p);
    const result = this.asm.exports.sessionOpen(p, message.length);
    if (result < 0) {
      this.drops.push(result);
      return false;
    }
    const session = result & OPEN_SLOT_MASK;
    const slot = this.asm.exports.sessionPeer(session);
    const length = message.length - TRANSPORT_OVERHEAD;
    if (length === 0) this.keepalives++;
    else this.#accept(this.asm.u8.slice(p + 16, p + 16 + length));
    this.device.received(slot, session, length > 0 ? 1 : 0, length > 0 ? 0 : 1, message.length, now);
    if (from.kind === "udp") this.device.roam(slot, from.addr);
    return true;
  }

  #accept(padded: Uint8Array): void {
    const view = new DataView(padded.buffer, padded.byteOffset);
    const size = view.getUint16(2);
    const id = view.getUint32(20);
    const expected = testPacket(id, size);
    if (!expected.every((byte, i) => byte === padded[i])) throw new Error(`packet ${id} arrived damaged`);
    if (padded.subarray(size).some((byte) => byte !== 0)) throw new Error(`packet ${id} is not padded with zeros`);
    this.arrived.push(id);
  }

  /** For nodes with a sealer of their own. */
  protected keepalive(_slot: number, _session: number): void {
    throw new Error("only a sealer has keepalives to send");
  }

  /** Messages to send; the other outputs are noted. */
  messages(): Extract<Output, { type: "send" }>[] {
    const messages: Extract<Output, { type: "send" }>[] = [];
    for (const output of this.device.drain()) {
      if (output.type === "send") messages.push(output);
      else if (output.type === "handshake") this.handshakes.push(output);
      else if (output.type === "keepalive") this.keepalive(output.slot, output.session);
      else this.forgotten++;
    }
    return messages;
  }
}

export interface LinkOptions {
  /** ms one way. */
  delay?: number;
  /** Added at random: above the distance of packets it reorders them. */
  jitter?: number;
  /** Share of datagrams that are lost. */
  loss?: number;
  /** Share of datagrams that arrive twice. */
  duplicate?: number;
  seed?: number;
}

interface Flight {
  at: number;
  order: number;
  to: TestNode;
  from: Source;
  message: Uint8Array;
}

interface Event {
  at: number;
  run: (now: number) => void;
}

/** Nodes that reach each other by their addresses. */
export class TestNetwork {
  now = 0;
  /** All messages that were sent, with their time: what an observer on the link sees. */
  readonly sent: { at: number; from: TestNode; message: Uint8Array }[] = [];
  /** Decides about single messages before the dice do: false drops. */
  filter: (message: Uint8Array, from: TestNode) => boolean = () => true;
  /** Memory of `sent` for long runs. */
  record = true;
  readonly #nodes: TestNode[];
  readonly #link: Required<LinkOptions>;
  readonly #random: () => number;
  #flights: Flight[] = [];
  #events: Event[] = [];
  #order = 0;

  constructor(nodes: TestNode[], link: LinkOptions = {}) {
    this.#nodes = nodes;
    this.#link = { delay: 10, jitter: 0, loss: 0, duplicate: 0, seed: 1, ...link };
    this.#random = seededRandom(this.#link.seed);
  }

  /** Calls `run` when the clock reaches `at`. */
  at(at: number, run: (now: number) => void): void {
    this.#events.push({ at, run });
  }

  /** Calls `run` every `interval` ms from `from` to `until`. */
  every(interval: number, from: number, until: number, run: (now: number) => void): void {
    const step = (now: number) => {
      run(now);
      if (now + interval <= until) this.at(now + interval, step);
    };
    this.at(from, step);
  }

  /** One packet from node to node. */
  send(node: TestNode, id: number, size?: number): void {
    const message = node.send(id, this.now, size);
    if (message) this.#launch(node, node.peer.endpoint!, message);
    this.#collect(node);
  }

  /** Puts what a node wants to send on its way. */
  flush(): void {
    for (const node of this.#nodes) this.#collect(node);
  }

  /** Sends bytes from anywhere to the node with that address. */
  inject(to: TestNode, message: Uint8Array, addr = "198.51.100.1:1"): void {
    to.deliver(message, { kind: "udp", addr }, this.now);
    this.#collect(to);
  }

  /** Lets the clock run up to `until`. */
  run(until: number): void {
    this.flush();
    for (;;) {
      const flight = earliest(this.#flights);
      const event = earliest(this.#events);
      const timeouts = this.#nodes.map((node) => node.device.nextTimeout());
      const at = Math.min(flight?.at ?? Infinity, event?.at ?? Infinity, ...timeouts);
      if (at > until) break;
      this.now = Math.max(this.now, at);
      if (flight?.at === at) {
        this.#flights.splice(this.#flights.indexOf(flight), 1);
        flight.to.deliver(flight.message, flight.from, this.now);
        this.#collect(flight.to);
      } else if (event?.at === at) {
        this.#events.splice(this.#events.indexOf(event), 1);
        event.run(this.now);
        this.flush();
      } else {
        const node = this.#nodes[timeouts.indexOf(at)]!;
        node.device.handleTimeout(this.now);
        this.#collect(node);
      }
    }
    this.now = until;
  }

  /** For a node that was started anew under its old address. */
  replace(old: TestNode, node: TestNode): void {
    this.#nodes[this.#nodes.indexOf(old)] = node;
    this.#flights = this.#flights.filter((flight) => flight.to !== old);
  }

  #collect(node: TestNode): void {
    for (const { slot, data, to } of node.messages()) {
      const addr = to?.kind === "udp" ? to.addr : node.device.peerBySlot(slot)?.endpoint;
      if (addr) this.#launch(node, addr, data);
    }
  }

  #launch(from: TestNode, addr: string, message: Uint8Array): void {
    if (this.record) this.sent.push({ at: this.now, from, message });
    const to = this.#nodes.find((node) => node.addr === addr);
    if (!to || !this.filter(message, from) || this.#random() < this.#link.loss) return;
    const copies = this.#random() < this.#link.duplicate ? 2 : 1;
    for (let i = 0; i < copies; i++) {
      const at = this.now + this.#link.delay + this.#random() * this.#link.jitter;
      this.#flights.push({ at, order: this.#order++, to, from: { kind: "udp", addr: from.addr }, message });
    }
  }
}

function earliest<E extends { at: number; order?: number }>(events: E[]): E | undefined {
  let first: E | undefined;
  for (const event of events) {
    if (!first || event.at < first.at || (event.at === first.at && (event.order ?? 0) < (first.order ?? 0)))
      first = event;
  }
  return first;
}

/** Two nodes which know each other. */
export function testPair(
  link?: LinkOptions,
  peer: Partial<PeerUpdate> = {},
): { a: TestNode; b: TestNode; net: TestNetwork } {
  return joined(new TestNode(1), new TestNode(3), link, peer);
}

/** Two nodes get to know each other. */
export function joined<A extends TestNode, B extends TestNode>(
  a: A,
  b: B,
  link?: LinkOptions,
  peer: Partial<PeerUpdate> = {},
): { a: A; b: B; net: TestNetwork } {
  a.addPeer(b, peer);
  b.addPeer(a, peer);
  return { a, b, net: new TestNetwork([a, b], link) };
}
