// Two devices on a simulated link: an hour of virtual time in seconds.
import { describe, expect, test } from "bun:test";
import { messageType } from "../wire/wireguard.ts";
import { type LinkOptions, TestNetwork, TestNode, testPair } from "./test-link.ts";

const HOUR = 3_600_000;

/** Traffic both ways for an hour; even numbers go from a to b, odd ones from b to a. */
function hour(link: LinkOptions, interval: number) {
  const pair = testPair(link);
  const { a, b, net } = pair;
  net.record = false;
  let sent = 0;
  let mostSessions = 0;
  net.every(interval, 100, HOUR, () => {
    net.send(a, sent++);
    net.send(b, sent++);
    mostSessions = Math.max(mostSessions, a.device.sessionCount, b.device.sessionCount);
  });
  net.run(HOUR + 30_000);
  const arrived = [...b.arrived, ...a.arrived];
  expect(b.arrived.every((id) => id % 2 === 0)).toBe(true);
  expect(a.arrived.every((id) => id % 2 === 1)).toBe(true);
  expect(new Set(arrived).size).toBe(arrived.length);
  return { ...pair, sent, arrived, mostSessions };
}

describe("an hour", () => {
  test("lossless: every packet arrives once and in order, across dozens of rekeys, when both start at once", () => {
    const { a, b, sent, arrived, mostSessions } = hour({ delay: 20 }, 100);
    expect(sent).toBeGreaterThan(70_000);
    expect(arrived.length).toBe(sent);
    for (const node of [a, b]) {
      expect(node.drops).toEqual([]);
      expect(node.arrived.every((id, i) => i === 0 || id > node.arrived[i - 1]!)).toBe(true);
      expect(node.handshakes.length).toBeGreaterThanOrEqual(29);
    }
    // Current, next, previous, and at most two more for a moment when both initiate.
    expect(mostSessions).toBeLessThanOrEqual(6);
  });

  test("lossless with latency beyond the sending interval: packets in flight across rekeys arrive", () => {
    const { sent, arrived } = hour({ delay: 700 }, 150);
    expect(arrived.length).toBe(sent);
  });

  test("reordered and duplicated: every packet once", () => {
    const { a, b, sent, arrived } = hour({ delay: 30, jitter: 400, duplicate: 0.1, seed: 5 }, 100);
    expect(arrived.length).toBe(sent);
    const disorder = b.arrived.filter((id, i) => i > 0 && id < b.arrived[i - 1]!).length;
    expect(disorder).toBeGreaterThan(1000);
    const replays = [...a.drops, ...b.drops].filter((drop) => drop === -5).length;
    expect(replays).toBeGreaterThan(5000);
  });

  test("a third of all datagrams lost: the session goes on and about two thirds arrive", () => {
    const { sent, arrived, a } = hour({ delay: 50, jitter: 100, loss: 0.33, duplicate: 0.02, seed: 9 }, 200);
    expect(arrived.length / sent).toBeGreaterThan(0.6);
    expect(arrived.length / sent).toBeLessThan(0.72);
    expect(a.handshakes.length).toBeGreaterThan(25);
  });

  test("one-sided traffic: the receiver answers with keepalives only, and nothing is lost", () => {
    const { a, b, net } = testPair({ delay: 15 });
    let sent = 0;
    net.every(250, 0, HOUR, () => net.send(a, sent++));
    net.run(HOUR + 1000);
    expect(b.arrived.length).toBe(sent);
    expect(a.arrived).toEqual([]);
    expect(a.keepalives).toBeGreaterThan(300);
    const rekeys = net.sent.filter((m) => messageType(m.message) === 1);
    expect(rekeys.length).toBe(30);
    expect(rekeys.every((m) => m.from === a)).toBe(true);
    expect(b.drops).toEqual([]);
  });

  test("the link is down for a minute every five: it heals each time", () => {
    const { a, b, net } = testPair({ delay: 10 });
    net.record = false;
    net.filter = () => net.now % 300_000 < 240_000;
    let sent = 0;
    net.every(1000, 0, HOUR, () => {
      net.send(a, sent++);
      net.send(b, sent++);
    });
    net.run(HOUR);
    // Four fifths of the time up, and some seconds until the next handshake.
    expect((a.arrived.length + b.arrived.length) / sent).toBeGreaterThan(0.74);
    for (const node of [a, b]) {
      expect(new Set(node.arrived).size).toBe(node.arrived.length);
      expect(node.arrived.at(-1)).toBeGreaterThan(sent - 150);
    }
  });
});

describe("both at once", () => {
  test("simultaneous initiations: both sides are connected after one round trip, nothing waits for a retry", () => {
    const { a, b, net } = testPair({ delay: 40 });
    net.send(a, 1);
    net.send(b, 2);
    net.run(200);
    expect([a.arrived, b.arrived]).toEqual([[2], [1]]);
    expect([a.drops, b.drops]).toEqual([[], []]);
    expect(net.sent.filter((m) => messageType(m.message) === 1).length).toBe(2);
    net.run(3000);
    net.send(a, 3);
    net.send(b, 4);
    net.run(3100);
    expect([a.arrived, b.arrived]).toEqual([
      [2, 4],
      [1, 3],
    ]);
  });

  test("a peer that forgets its own initiation when another comes, as wireguard-go does, still connects", () => {
    const { a, b, net } = testPair({ delay: 40 });
    // What such a peer would do to the response: not know it.
    net.filter = (message, from) => !(from === b && messageType(message) === 2);
    net.send(a, 1);
    net.send(b, 2);
    net.run(500);
    expect([a.arrived, b.arrived]).toEqual([[2], [1]]);
    expect(a.peer.current?.initiator).toBe(false);
  });
});

describe("restart", () => {
  test("a side that lost its sessions initiates when it sends, and is believed", () => {
    const { a, b, net } = testPair();
    net.send(a, 1);
    net.run(60_000);
    const again = new TestNode(3, { unixOffset: b.device.unixOffset });
    again.addPeer(a, {}, net.now);
    net.replace(b, again);
    net.send(again, 2);
    net.run(60_100);
    expect(a.arrived).toEqual([2]);
    net.send(a, 3);
    net.run(60_200);
    expect(again.arrived).toEqual([3]);
  });

  test("if it only listens, the other one notices after 15 s and connects anew", () => {
    const { a, b, net } = testPair();
    net.send(a, 1);
    net.run(60_000);
    const again = new TestNode(3);
    again.addPeer(a, {}, net.now);
    net.replace(b, again);
    net.every(1000, 60_000, 90_000, (now) => net.send(a, now));
    net.run(91_000);
    expect(again.arrived[0]).toBeGreaterThanOrEqual(74_000);
    expect(again.arrived[0]).toBeLessThanOrEqual(76_000);
    expect(again.arrived.at(-1)).toBe(90_000);
  });
});

test("a passive responder learns the endpoint of its peer, and follows it when it moves", () => {
  const a = new TestNode(1);
  const b = new TestNode(3);
  a.addPeer(b);
  b.configure({ peers: [{ publicKey: a.publicKey, allowedIPs: ["10.0.0.1/32"] }] });
  const net = new TestNetwork([a, b]);
  net.send(b, 1);
  net.run(1000);
  expect(a.arrived).toEqual([]);
  net.send(a, 2);
  net.run(2000);
  expect([a.arrived, b.arrived]).toEqual([[1], [2]]);
  expect(b.device.dump().peers[0]?.endpoint).toBe(a.addr);

  // The same node behind another address: one authenticated packet is enough, a forged one is not.
  const moved = "203.0.113.9:999";
  const message = a.send(3, net.now)!;
  const forged = message.slice();
  forged[20]! ^= 1;
  net.inject(b, forged, "203.0.113.66:666");
  expect(b.peer.endpoint).toBe(a.addr);
  net.inject(b, message, moved);
  expect(b.peer.endpoint).toBe(moved);
  expect(b.arrived).toEqual([2, 3]);
});

test("twenty devices in full mesh: every pair talks, and each keeps to its own", () => {
  const nodes = Array.from({ length: 20 }, (_, i) => new TestNode(i + 1, { maxPeers: 32 }));
  for (const node of nodes) for (const other of nodes) if (node !== other) node.addPeer(other);
  const net = new TestNetwork(nodes, { delay: 5, jitter: 3 });
  for (const node of nodes) {
    for (const peer of node.device.peers()) {
      const to = nodes.findIndex((other) => other.publicKey.toHex() === peer.publicKey.toHex());
      expect(node.device.allowedIPs.list(peer.slot)).toEqual([`10.0.0.${to + 1}/32`]);
      const id = nodes.indexOf(node) * 100 + to;
      net.at(1, (now) => expect(node.send(id, now, 60, peer.slot)).toBeNull());
    }
  }
  net.run(4000);
  nodes.forEach((node, to) => {
    const expected = nodes.map((_, from) => from * 100 + to).filter((id) => id !== to * 100 + to);
    expect(node.arrived.sort((x, y) => x - y)).toEqual(expected);
    expect(node.drops).toEqual([]);
  });
});
