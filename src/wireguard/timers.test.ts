// Every timer rule of spec/datapath-wire.md 1.9, by its number, with a virtual clock.
import { describe, expect, test } from "bun:test";
import { messageType } from "../wire/wireguard.ts";
import { type TestNetwork, type TestNode, testPair } from "./test-link.ts";

const INITIATION = 1;
const RESPONSE = 2;
const TRANSPORT = 4;

/** Times at which a node sent messages of a type; keepalives and data apart by `size`. */
function times(net: TestNetwork, from: TestNode, type: number, size?: (bytes: number) => boolean): number[] {
  return net.sent
    .filter((sent) => sent.from === from && messageType(sent.message) === type && (!size || size(sent.message.length)))
    .map((sent) => sent.at);
}
const keepalive = (bytes: number) => bytes === 32;

/** A pair with a session that `a` initiated at 0 and which has been up since 20 ms; b has received packet 1. */
function connected(...args: Parameters<typeof testPair>) {
  const pair = testPair(...args);
  pair.net.send(pair.a, 1);
  pair.net.run(1000);
  expect(pair.b.arrived).toEqual([1]);
  return pair;
}

/** The session of `a` loses its peer: b forgets all, and a does not know. */
function silence(net: TestNetwork): void {
  net.filter = () => false;
}

describe("rule 1: an initiation that is not answered is sent again after 5 s and up to 333 ms", () => {
  test("with new keys and a later timestamp each time, without the source address used so far", () => {
    const { a, net } = testPair();
    silence(net);
    net.send(a, 1);
    net.run(30_000);
    const at = times(net, a, INITIATION);
    expect(at.length).toBeGreaterThanOrEqual(5);
    for (let i = 1; i < at.length; i++) {
      expect(at[i]! - at[i - 1]!).toBeGreaterThanOrEqual(5000);
      expect(at[i]! - at[i - 1]!).toBeLessThanOrEqual(5333);
    }
    expect(new Set(at.map((t, i) => (i ? t - at[i - 1]! : 0))).size).toBe(at.length);
    const ephemerals = net.sent.map((sent) => sent.message.slice(8, 40).toHex());
    expect(new Set(ephemerals).size).toBe(at.length);
    expect(a.forgotten).toBe(at.length - 1);
  });

  test("a lost response costs one retry, and then the packet arrives", () => {
    const { a, b, net } = testPair();
    let lost = 0;
    net.filter = (message) => messageType(message) !== RESPONSE || lost++ > 0;
    net.send(a, 1);
    net.run(4999);
    expect(b.arrived).toEqual([]);
    net.run(5400);
    expect(b.arrived).toEqual([1]);
    expect(b.drops).toEqual([]);
  });

  test("gives up when the attempts are more than 18: staged packets go, keys are wiped 540 s later", () => {
    const { a, net } = testPair();
    silence(net);
    net.send(a, 1);
    net.run(200_000);
    const at = times(net, a, INITIATION);
    // The first one and 19 retries: the 18th retry may still be answered.
    expect(at.length).toBe(20);
    expect(a.peer.staged.length).toBe(0);
    const gaveUp = at.at(-1)! + 5000;
    expect(a.device.nextTimeout()).toBeGreaterThanOrEqual(gaveUp + 540_000);
    expect(a.device.nextTimeout()).toBeLessThanOrEqual(gaveUp + 540_333);
    expect(a.peer.handshake).not.toBeNull();
    net.run(800_000);
    expect(a.peer.handshake).toBeNull();
    expect(a.device.sessionCount).toBe(0);
    expect(a.device.nextTimeout()).toBe(Number.POSITIVE_INFINITY);
  });

  test("new data starts the count anew", () => {
    const { a, net } = testPair();
    silence(net);
    net.every(20_000, 0, 190_000, () => net.send(a, 1));
    net.run(200_000);
    expect(times(net, a, INITIATION).length).toBeGreaterThan(35);
  });
});

describe("rule 2: who received data and had nothing to send for 10 s sends a keepalive", () => {
  test("10 s after the data, once", () => {
    const { a, b, net } = connected();
    net.run(60_000);
    expect(times(net, b, TRANSPORT)).toEqual([10_030]);
    expect(times(net, b, TRANSPORT, keepalive)).toEqual([10_030]);
    expect(a.keepalives).toBe(1);
    // A keepalive is not answered.
    expect(times(net, a, TRANSPORT, keepalive)).toEqual([]);
  });

  test("not if something was sent meanwhile", () => {
    const { a, b, net } = connected();
    net.at(9000, () => net.send(b, 2));
    net.run(18_000);
    expect(times(net, b, TRANSPORT, keepalive)).toEqual([]);
    expect(a.arrived).toEqual([2]);
    net.run(60_000);
    expect(times(net, a, TRANSPORT, keepalive)).toEqual([19_010]);
  });

  test("data while the timer runs makes it run once more", () => {
    const { a, b, net } = connected();
    net.at(4000, () => net.send(a, 2));
    net.run(60_000);
    expect(times(net, b, TRANSPORT, keepalive)).toEqual([10_030, 20_030]);
  });
});

describe("rule 3: who sent data and heard nothing for 15 s initiates", () => {
  test("15 s and up to 333 ms after the first data, forgetting the source address", () => {
    const { a, net } = connected();
    net.run(50_000);
    silence(net);
    net.at(60_000, () => net.send(a, 2));
    net.at(65_000, () => net.send(a, 3));
    net.run(80_000);
    const at = times(net, a, INITIATION).filter((t) => t > 1000);
    expect(at[0]).toBeGreaterThanOrEqual(75_000);
    expect(at[0]).toBeLessThanOrEqual(75_333);
    expect(a.forgotten).toBeGreaterThanOrEqual(1);
  });

  test("a keepalive from the peer is enough", () => {
    const { a, net } = connected();
    net.run(100_000);
    expect(times(net, a, INITIATION)).toEqual([0]);
  });

  test("sending keepalives does not arm it", () => {
    const { a, b, net } = connected();
    net.run(10_000);
    net.filter = (_, from) => from !== a;
    net.run(40_000);
    expect(times(net, b, TRANSPORT, keepalive)).toEqual([10_030]);
    expect(times(net, b, INITIATION)).toEqual([]);
  });
});

describe("rules 4 and 6: the initiator rekeys when it sends on a session older than 120 s", () => {
  test("the initiator does, with the first packet after 120 s", () => {
    const { a, b, net } = connected();
    net.at(119_900, () => net.send(a, 2));
    net.at(120_030, () => net.send(a, 3));
    net.run(121_000);
    expect(times(net, a, INITIATION)).toEqual([0, 120_030]);
    expect(b.arrived).toEqual([1, 2, 3]);
    expect(a.handshakes.length).toBe(2);
  });

  test("the responder never does by age: its traffic goes on until the initiator has something to send", () => {
    const { a, b, net } = connected();
    net.every(1000, 2000, 400_000, (now) => net.send(b, now));
    net.run(401_000);
    expect(times(net, b, INITIATION)).toEqual([]);
    const keepalives = times(net, a, TRANSPORT, keepalive);
    const rekeys = times(net, a, INITIATION).slice(1);
    expect(rekeys.length).toBe(3);
    for (const at of rekeys) expect(keepalives).toContain(at);
    expect(rekeys[0]).toBeGreaterThan(120_020);
    expect(a.arrived.length).toBe(399);
  });

  test("beyond 2^60 messages, whoever sends", () => {
    const { a, b, net } = connected();
    const counter = b.asm.exports.sessionAddress(b.peer.current!.slot) + 16;
    b.asm.view.setBigUint64(counter, 2n ** 60n - 2n, true);
    net.send(b, 2);
    net.run(9000);
    expect(times(net, b, INITIATION)).toEqual([]);
    net.send(b, 3);
    net.send(b, 4);
    net.run(12_000);
    expect(times(net, b, INITIATION)).toEqual([9000]);
    expect(a.arrived).toEqual([2, 3, 4]);
    expect(b.handshakes.map((h) => h.initiator)).toEqual([false, true]);
  });
});

describe("rule 5: the initiator rekeys when it receives on a session older than 165 s", () => {
  test("once in a session, however much arrives", () => {
    const { a, b, net } = connected();
    // b talks only towards the end: no keepalive of a falls due, with which rule 4 would come first.
    net.filter = (message) => messageType(message) !== INITIATION;
    net.every(200, 160_000, 168_000, (now) => net.send(b, now));
    net.run(164_900);
    expect(times(net, a, INITIATION)).toEqual([0]);
    net.run(168_000);
    const at = times(net, a, INITIATION).filter((t) => t > 0);
    expect(at.length).toBe(1);
    expect(at[0]).toBeGreaterThan(165_020);
    expect(at[0]).toBeLessThan(165_300);
  });
});

describe("rule 7: no initiation within 5 s of a handshake message", () => {
  test("whatever triggers it a second time", () => {
    const { a, net } = testPair();
    silence(net);
    net.send(a, 1);
    net.at(2000, () => net.send(a, 2));
    net.at(4900, () => net.send(a, 3));
    net.run(4999);
    expect(times(net, a, INITIATION)).toEqual([0]);
  });

  test("what waits behind a response that was lost goes out with an initiation 5 s after it", () => {
    const { a, b, net } = testPair();
    net.filter = (message) => messageType(message) !== RESPONSE;
    net.send(a, 1);
    net.at(1000, () => net.send(b, 2));
    net.at(4000, () => {
      // The initiator will not try again.
      a.configure({ peers: [{ publicKey: b.publicKey, remove: true }] }, net.now);
      a.addPeer(b, {}, net.now);
      net.filter = () => true;
    });
    net.run(5400);
    expect(times(net, b, INITIATION).length).toBe(1);
    expect(times(net, b, INITIATION)[0]).toBeGreaterThanOrEqual(5010);
    expect(a.arrived).toEqual([2]);
  });
});

describe("rule 8: the initiator sends at once when the response is there", () => {
  test("the staged packets, if there are any", () => {
    const { a, b, net } = testPair();
    net.send(a, 1);
    net.send(a, 2);
    net.run(100);
    expect(times(net, a, TRANSPORT)).toEqual([20, 20]);
    expect(b.arrived).toEqual([1, 2]);
    expect(b.keepalives).toBe(0);
    expect([a.handshakes, b.handshakes]).toEqual([
      [{ type: "handshake", slot: 0, ms: 20, initiator: true }],
      [{ type: "handshake", slot: 0, ms: 20, initiator: false }],
    ]);
  });

  test("else a keepalive, so that the responder may send on the new session", () => {
    const { a, b, net } = connected();
    net.at(130_000, () => net.send(a, 2));
    net.run(130_029);
    expect(times(net, a, TRANSPORT, keepalive)).toEqual([130_020]);
    expect(b.peer.current?.created).toBe(10);
    expect(b.peer.next?.created).toBe(130_010);
    net.run(130_030);
    expect(b.peer.current?.created).toBe(130_010);
    expect(b.peer.next).toBeNull();
    net.send(b, 3);
    net.run(130_100);
    expect(a.arrived).toEqual([3]);
    expect(b.handshakes.length).toBe(2);
  });
});

describe("rule 9: 540 s after the last session was made nothing secret is left", () => {
  test("sessions are zero in wasm memory at 180 s, the rest at 540 s", () => {
    const { a, b, net } = connected();
    const address = a.asm.exports.sessionAddress(a.peer.current!.slot);
    const size = a.asm.exports.sessionAddress(1) - a.asm.exports.sessionAddress(0);
    const bytes = () => a.asm.u8.subarray(address, address + size);
    net.run(180_019);
    expect(bytes().some((byte: number) => byte !== 0)).toBe(true);
    net.run(180_020);
    expect(bytes().every((byte: number) => byte === 0)).toBe(true);
    expect(a.peer.current).toBeNull();

    // A handshake that never came to its end is wiped too, 540 s after the session before it.
    silence(net);
    net.at(500_000, () => net.send(a, 2));
    net.run(540_000);
    const { state } = a.peer.handshake!;
    const secrets = [state.ephemeralPrivate, state.chainingKey, state.hash];
    expect(secrets.every((secret) => secret.some((byte: number) => byte !== 0))).toBe(true);
    net.run(540_020);
    expect(a.peer.handshake).toBeNull();
    expect(secrets.every((secret) => secret.every((byte: number) => byte === 0))).toBe(true);
    expect(a.device.sessionCount).toBe(0);
    expect(b.device.sessionCount).toBe(0);
  });

  test("no key of any session stays anywhere in the session table", () => {
    const { a, b, net } = connected();
    net.every(700, 2000, 400_000, (now) => net.send(now % 1400 ? a : b, now));
    net.run(2_000_000);
    for (const node of [a, b]) {
      const from = node.asm.exports.sessionTableBase();
      const table = node.asm.u8.subarray(from, from + node.asm.exports.sessionTableSize(128));
      expect(table.every((byte: number) => byte === 0)).toBe(true);
      expect(node.handshakes.length).toBeGreaterThan(3);
    }
  });
});

describe("rules 10 and 11: persistent keepalive", () => {
  test("connects by itself, and sends when 25 s passed without any packet in or out", () => {
    const { a, b, net } = testPair();
    a.configure({ peers: [{ publicKey: b.publicKey, persistentKeepalive: 25 }] });
    net.run(100_000);
    expect(times(net, a, INITIATION)).toEqual([0]);
    expect(times(net, a, TRANSPORT, keepalive)).toEqual([20, 25_020, 50_020, 75_020]);
    net.at(110_000, () => net.send(b, 7));
    net.run(119_000);
    // At 100.02 and then not before a's answer by rule 2, which counts as a packet too.
    expect(times(net, a, TRANSPORT, keepalive).slice(4)).toEqual([100_020]);
    net.run(146_000);
    // The last one found the session old enough for a rekey (rule 4).
    expect(times(net, a, TRANSPORT, keepalive).slice(5)).toEqual([120_010, 145_010, 145_030]);
  });

  test("goes on after the handshakes were given up", () => {
    const { a, net } = testPair({}, { persistentKeepalive: 60 });
    silence(net);
    net.run(300_000);
    expect(times(net, a, INITIATION).some((at) => at > 150_000)).toBe(true);
  });

  test("0 turns it off", () => {
    const { a, b, net } = testPair({}, { persistentKeepalive: 25 });
    net.run(30_000);
    for (const [node, other] of [
      [a, b],
      [b, a],
    ] as const) {
      node.configure({ peers: [{ publicKey: other.publicKey, persistentKeepalive: 0 }] }, net.now);
    }
    const count = net.sent.length;
    net.run(150_000);
    expect(net.sent.length).toBe(count);
  });
});

test("thousands of idle peers cost nothing: the next timeout is that of the one that is busy", () => {
  const { a, b, net } = connected();
  expect(a.device.nextTimeout()).toBe(Math.min(...a.peer.timers));
  net.run(400_000);
  expect(b.device.nextTimeout()).toBe(540_010);
  net.run(1_000_000);
  expect([a.device.nextTimeout(), b.device.nextTimeout()]).toEqual([Infinity, Infinity]);
});
