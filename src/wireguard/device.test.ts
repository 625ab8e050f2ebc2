import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Asm } from "../crypto/wasm.ts";
import { x25519, x25519Public } from "../crypto/x25519.ts";
import { mac2Of, messageType, tai64n } from "../wire/wireguard.ts";
import { OPEN_NO_SESSION } from "./asm.ts";
import type { DeviceUpdate } from "./config.ts";
import { CookieJar } from "./cookie.ts";
import { Device, type Source } from "./device.ts";
import { createInitiation } from "./handshake.ts";
import { key, seededBytes, seededRandom, TestNode, testPacket, testPair, UNIX_OFFSET } from "./test-link.ts";

const udp = (addr: string): Source => ({ kind: "udp", addr });
const ELSEWHERE = udp("198.51.100.7:7");

/** An initiation from `a` to `b` with everything chosen by hand. */
function forge(
  a: TestNode,
  b: TestNode,
  options: { unix?: number; ephemeral?: number; jar?: CookieJar; now?: number } = {},
) {
  const { unix = UNIX_OFFSET, ephemeral = 77, jar = new CookieJar(b.publicKey), now = 0 } = options;
  const { message } = createInitiation({
    identity: { privateKey: a.privateKey, publicKey: a.publicKey },
    remoteStatic: b.publicKey,
    staticShared: x25519(a.privateKey, b.publicKey)!,
    ephemeralPrivate: key(ephemeral),
    sender: 0x1000 + ephemeral,
    timestamp: tai64n(BigInt(unix) * 1_000_000n),
  })!;
  jar.sign(message, now);
  return message;
}

/** All that could change by a message that is to be dropped. */
function stateOf(node: TestNode): unknown {
  return {
    dump: node.device.dump(),
    sessions: node.device.sessionCount,
    timeout: node.device.nextTimeout(),
    peers: Array.from(node.device.peers(), (peer) => ({
      current: peer.current && { ...peer.current },
      next: peer.next && { ...peer.next },
      handshake: peer.handshake?.session.localIndex,
      timers: [...peer.timers],
    })),
  };
}

/** `a` and `b` with a session since 30 ms, and one message of each type that was really sent. */
function captured() {
  const pair = testPair();
  pair.net.send(pair.a, 1);
  pair.net.run(1000);
  const [initiation, response, transport] = [1, 2, 4].map(
    (type) => pair.net.sent.find((sent) => messageType(sent.message) === type)!.message,
  );
  return { ...pair, initiation: initiation!, response: response!, transport: transport! };
}

describe("messages that must be dropped leave no trace", () => {
  test("every type, replayed", () => {
    const { a, b, initiation, response, transport } = captured();
    const [stateA, stateB] = [stateOf(a), stateOf(b)];
    expect(b.device.handleHandshake(initiation, udp(a.addr), 2000)).toBe("replayed");
    expect(a.device.handleHandshake(response, udp(b.addr), 2000)).toBe("no-handshake");
    expect(b.deliver(transport, udp(a.addr), 2000)).toBe(false);
    expect([stateOf(a), stateOf(b)]).toEqual([stateA, stateB]);
    expect([...a.device.drain(), ...b.device.drain()]).toEqual([]);
  });

  test("every handshake type, cut short, grown, and with every byte changed", () => {
    const { a, b } = testPair();
    a.send(1, 0);
    const initiation = a.messages()[0]!.data;
    const fresh = stateOf(b);
    for (let length = 0; length < initiation.length; length++) {
      expect(b.device.handleHandshake(initiation.subarray(0, length), ELSEWHERE, 1000)).toBe("malformed");
    }
    for (const extra of [1, 100, 65_000]) {
      const long = new Uint8Array(initiation.length + extra);
      long.set(initiation);
      expect(b.device.handleHandshake(long, ELSEWHERE, 1000)).toBe("malformed");
    }
    for (let i = 0; i < 132; i++) {
      const odd = initiation.slice();
      odd[i]! ^= 0x10;
      expect(["malformed", "mac1"]).toContain(b.device.handleHandshake(odd, ELSEWHERE, 1000)!);
    }
    expect(stateOf(b)).toEqual(fresh);
    expect(b.device.drain()).toEqual([]);

    expect(b.device.handleHandshake(initiation, udp(a.addr), 1000)).toBeNull();
    const response = b.messages()[0]!.data;
    const waiting = stateOf(a);
    for (let i = 0; i < 76; i++) {
      const odd = response.slice();
      odd[i]! ^= 0x10;
      expect(["malformed", "mac1"]).toContain(a.device.handleHandshake(odd, ELSEWHERE, 1000)!);
    }
    expect(stateOf(a)).toEqual(waiting);
    expect(a.device.handleHandshake(response, udp(b.addr), 1000)).toBeNull();
  });

  test("changed messages with a right mac1: the AEADs refuse, and the real ones still work", () => {
    const { a, b } = testPair();
    a.send(1, 0);
    const initiation = a.messages()[0]!.data;
    const fresh = stateOf(b);
    for (let i = 8; i < 116; i += 3) {
      const odd = initiation.slice();
      odd[i]! ^= 0x10;
      new CookieJar(b.publicKey).sign(odd, 0);
      expect(b.device.handleHandshake(odd, ELSEWHERE, 1000)).toBe("bad-handshake");
    }
    expect(stateOf(b)).toEqual(fresh);
    expect(b.device.handleHandshake(initiation, udp(a.addr), 1000)).toBeNull();
    const response = b.messages()[0]!.data;
    const waiting = stateOf(a);
    for (let i = 12; i < 60; i += 3) {
      const odd = response.slice();
      odd[i]! ^= 0x10;
      new CookieJar(a.publicKey).sign(odd, 0);
      expect(a.device.handleHandshake(odd, ELSEWHERE, 1000)).toBe("bad-handshake");
    }
    expect(stateOf(a)).toEqual(waiting);
    expect(a.device.handleHandshake(response, udp(b.addr), 1000)).toBeNull();
  });

  test("an initiation with an old timestamp, also one that was held back while later ones came", () => {
    const { a, b } = testPair();
    expect(b.device.handleHandshake(forge(a, b, { unix: UNIX_OFFSET + 5000 }), udp(a.addr), 0)).toBeNull();
    for (const unix of [UNIX_OFFSET + 5000, UNIX_OFFSET + 4999, 0]) {
      expect(b.device.handleHandshake(forge(a, b, { unix, ephemeral: 78 }), udp(a.addr), 1000)).toBe("replayed");
    }
    expect(b.device.handleHandshake(forge(a, b, { unix: UNIX_OFFSET + 5001 }), udp(a.addr), 1000)).toBeNull();
  });

  test("initiations of one peer less than 20 ms apart", () => {
    const { a, b } = testPair();
    const at = (unix: number, now: number) =>
      b.device.handleHandshake(forge(a, b, { unix: UNIX_OFFSET + unix }), udp(a.addr), now);
    expect([at(1, 100), at(2, 119), at(3, 119.9), at(4, 120), at(5, 130)]).toEqual([
      null,
      "flood",
      "flood",
      null,
      "flood",
    ]);
  });

  test("a stranger, and a peer that was removed", () => {
    const { a, b } = testPair();
    const stranger = new TestNode(9);
    expect(b.device.handleHandshake(forge(stranger, b), ELSEWHERE, 0)).toBe("unknown-peer");
    b.configure({ peers: [{ publicKey: a.publicKey, remove: true }] });
    expect(b.device.handleHandshake(forge(a, b), ELSEWHERE, 0)).toBe("unknown-peer");
    expect(b.device.drain()).toEqual([]);
  });

  test("a device without private key", () => {
    const { a, b } = testPair();
    b.configure({ privateKey: new Uint8Array(32) });
    expect(b.device.handleHandshake(forge(a, b), ELSEWHERE, 0)).toBe("no-private-key");
    b.send(1, 0);
    expect([b.device.drain(), b.device.publicKey]).toEqual([[], null]);
  });

  test("random bytes of any length and type: nothing is sent, nothing moves", () => {
    const { a, b } = captured();
    const before = stateOf(b);
    const dice = seededRandom(3);
    const random = seededBytes(4);
    const sizes = [148, 92, 64];
    for (let i = 0; i < 3000; i++) {
      const type = Math.floor(dice() * 6);
      const message = random(dice() < 0.7 ? (sizes[type - 1] ?? 148) : Math.floor(dice() * 300));
      message.set([type, 0, 0, 0].slice(0, message.length));
      if (message.length === 64) new DataView(message.buffer).setUint32(4, b.peer.current!.localIndex, true);
      expect(b.device.handleHandshake(message, dice() < 0.5 ? ELSEWHERE : udp(a.addr), 1000 + i)).not.toBeNull();
    }
    expect(stateOf(b)).toEqual(before);
    expect(b.device.drain()).toEqual([]);
  });

  test("random changes of real messages are dropped or harmless (property)", () => {
    const { a, b, initiation, response, transport } = captured();
    const [stateA, stateB] = [stateOf(a), stateOf(b)];
    const message = fc.constantFrom(initiation, response, transport);
    const edits = fc.array(fc.tuple(fc.nat(200), fc.nat(255)), { minLength: 1, maxLength: 5 });
    fc.assert(
      fc.property(message, edits, fc.nat(160), (original, edits, length) => {
        const changed = original.slice(0, length % 4 ? undefined : length);
        for (const [at, value] of edits) if (at < changed.length) changed[at] = value;
        expect(a.deliver(changed, ELSEWHERE, 2000)).toBe(false);
        expect(b.deliver(changed, ELSEWHERE, 2000)).toBe(false);
      }),
      { numRuns: 500 },
    );
    expect([stateOf(a), stateOf(b)]).toEqual([stateA, stateB]);
  });
});

describe("under load", () => {
  /** Messages with a right mac1, as anybody can make who knows the public key, until b is under load. */
  function flood(b: TestNode, now: number): void {
    const stranger = new TestNode(99);
    const message = forge(stranger, b);
    for (let i = 0; i < 130; i++) b.device.handleHandshake(message, udp(`203.0.113.${i % 100}:9`), now);
    b.device.drain();
  }

  test("an initiation is answered by a cookie, and the retry that carries it by a response", () => {
    const { a, b, net } = testPair();
    net.every(200, 0, 6000, (now) => flood(b, now));
    net.run(0);
    net.send(a, 1);
    net.run(100);
    expect(b.drops).toEqual(["under-load"]);
    const cookie = net.sent.find((sent) => messageType(sent.message) === 3)!;
    expect([cookie.from, cookie.message.length]).toEqual([b, 64]);
    expect(b.arrived).toEqual([]);
    // Having a cookie does not trigger a retry.
    net.run(4900);
    expect(net.sent.filter((sent) => sent.from === a).length).toBe(1);
    net.run(5400);
    expect(b.arrived).toEqual([1]);
    const retry = net.sent.filter((sent) => messageType(sent.message) === 1)[1]!;
    expect(mac2Of(retry.message)).not.toEqual(new Uint8Array(16));
  });

  test("a cookie is worth nothing from another address, and a made-up mac2 never", () => {
    const { a, b } = testPair();
    flood(b, 0);
    const jar = new CookieJar(b.publicKey);
    expect(b.device.handleHandshake(forge(a, b, { jar }), udp(a.addr), 1)).toBe("under-load");
    const [reply] = b.messages();
    expect(reply).toMatchObject({ slot: -1, to: udp(a.addr) });
    // The jar takes it as the peer would.
    expect(
      jar.accept({ receiver: 0, nonce: reply!.data.slice(8, 32), encryptedCookie: reply!.data.slice(32) }, 1),
    ).toBe(true);
    const signed = forge(a, b, { jar, unix: UNIX_OFFSET + 50, now: 2 });
    expect(b.device.handleHandshake(signed, ELSEWHERE, 2)).toBe("under-load");
    expect(b.device.handleHandshake(signed, udp("192.0.2.1:51821"), 2)).toBe("under-load");
    const madeUp = signed.slice();
    mac2Of(madeUp).fill(7);
    expect(b.device.handleHandshake(madeUp, udp(a.addr), 2)).toBe("under-load");
    expect(b.device.handleHandshake(signed, udp(a.addr), 2)).toBeNull();
  });

  test("who has a cookie gets 5 at once and 20 a second", () => {
    const { a, b } = testPair();
    flood(b, 0);
    const jar = new CookieJar(b.publicKey);
    b.device.handleHandshake(forge(a, b, { jar }), udp(a.addr), 0);
    const reply = b.messages()[0]!.data;
    jar.accept({ receiver: 0, nonce: reply.slice(8, 32), encryptedCookie: reply.slice(32) }, 0);
    const results = Array.from({ length: 8 }, (_, i) =>
      b.device.handleHandshake(forge(a, b, { jar, unix: UNIX_OFFSET + i + 1 }), udp(a.addr), 1),
    );
    expect(results.slice(0, 5)).not.toContain("rate-limit");
    expect(results.slice(5)).toEqual(["rate-limit", "rate-limit", "rate-limit"]);
    const later = forge(a, b, { jar, unix: UNIX_OFFSET + 100 });
    expect(b.device.handleHandshake(later, udp(a.addr), 52)).toBeNull();
  });

  test("it passes: a second after the flood no cookie is asked for", () => {
    const { a, b } = testPair();
    flood(b, 0);
    expect(b.device.handleHandshake(forge(a, b), udp(a.addr), 999)).toBe("under-load");
    expect(b.device.handleHandshake(forge(a, b), udp(a.addr), 2500)).toBeNull();
  });
});

describe("preshared keys", () => {
  test("the same on both sides: connected; different ones: never", () => {
    const { b, net, a } = testPair({}, { presharedKey: key(42) });
    net.send(a, 1);
    net.run(1000);
    expect(b.arrived).toEqual([1]);

    const other = testPair({}, { presharedKey: key(42) });
    other.b.configure({ peers: [{ publicKey: other.a.publicKey, presharedKey: key(43) }] });
    other.net.send(other.a, 1);
    other.net.run(20_000);
    expect([other.b.arrived, other.a.peer.current]).toEqual([[], null]);
    expect(new Set(other.a.drops)).toEqual(new Set(["bad-handshake"]));

    // 32 zero bytes take it away; both without one fit again.
    for (const [node, peer] of [
      [other.a, other.b],
      [other.b, other.a],
    ] as const) {
      node.configure({ peers: [{ publicKey: peer.publicKey, presharedKey: new Uint8Array(32) }] }, other.net.now);
    }
    other.net.run(30_000);
    expect(other.b.arrived).toEqual([1]);
  });
});

describe("keys of the device", () => {
  test("a new private key ends all sessions; the old key is worth nothing, the new one connects", () => {
    const { a, b, net, transport } = captured();
    const late = b.send(5, net.now)!;
    a.configure({ privateKey: key(8) }, net.now);
    expect(a.device.sessionCount).toBe(0);
    expect(a.deliver(late, udp(b.addr), net.now)).toBe(false);
    expect(a.drops.at(-1)).toBe(OPEN_NO_SESSION);
    expect(transport.length).toBe(96);
    net.send(a, 6);
    net.run(net.now + 7000);
    expect(b.drops.at(-1)).toBe("unknown-peer");
    b.configure({ peers: [{ publicKey: x25519Public(key(8)), allowedIPs: ["10.0.0.8/32"] }] }, net.now);
    net.run(net.now + 7000);
    expect(b.arrived).toEqual([1, 6]);
  });

  test("the same private key again changes nothing", () => {
    const { a, net } = captured();
    const before = stateOf(a);
    a.configure({ privateKey: a.privateKey.slice() }, net.now);
    expect(stateOf(a)).toEqual(before);
  });

  test("our own public key is no peer: not when it is configured, and not when the key comes later", () => {
    const node = new TestNode(1);
    node.configure({ peers: [{ publicKey: node.publicKey, allowedIPs: ["10.0.0.0/8"] }, { publicKey: key(5) }] });
    expect(node.device.dump().peers.map((peer) => peer.publicKey)).toEqual([key(5)]);
    node.configure({ peers: [{ publicKey: x25519Public(key(6)), allowedIPs: ["10.0.0.0/8"] }] });
    expect(node.device.peerCount).toBe(2);
    node.configure({ privateKey: key(6) });
    expect(node.device.dump().peers.map((peer) => peer.publicKey)).toEqual([key(5)]);
    expect(node.device.allowedIPs.size).toBe(0);
  });

  test("timestamps go on rising when the wall clock is set back", () => {
    const { a, b, net } = testPair();
    net.send(a, 1);
    net.run(1000);
    a.device.unixOffset -= 86_400_000;
    net.at(125_000, () => net.send(a, 2));
    net.run(126_000);
    expect(b.drops).toEqual([]);
    expect(a.handshakes.length).toBe(2);
  });
});

describe("sending", () => {
  test("a session at its message limit sends no more: the packet waits for the next session", () => {
    const { a, b, net } = captured();
    const counter = a.asm.exports.sessionAddress(a.peer.current!.slot) + 16;
    a.asm.view.setBigUint64(counter, 2n ** 64n - 2n ** 13n - 2n, true);
    net.now = 6000;
    expect(a.device.prepareSend(0, net.now)).toBeGreaterThanOrEqual(0);
    net.send(a, 2);
    expect(a.device.prepareSend(0, net.now)).toBe(-1);
    net.send(a, 3);
    net.run(7000);
    expect(b.arrived).toEqual([1, 2, 3]);
    expect(a.handshakes.length).toBe(2);
  });

  test("a session that is 180 s old neither sends nor receives", () => {
    const { a, b, net } = captured();
    const message = b.send(9, net.now)!;
    expect(a.device.prepareSend(0, 180_019)).toBeGreaterThanOrEqual(0);
    expect(a.device.prepareSend(0, 180_020)).toBe(-1);
    a.device.handleTimeout(180_020);
    expect(a.deliver(message, udp(b.addr), 180_020)).toBe(false);
  });

  test("at most 128 packets wait, the oldest goes first", () => {
    const { a, b, net } = testPair();
    for (let id = 1; id <= 200; id++) net.send(a, id);
    expect(a.peer.staged.length).toBe(128);
    net.run(1000);
    expect(b.arrived).toEqual(Array.from({ length: 128 }, (_, i) => i + 73));
    expect(a.peer.staged.length).toBe(0);
  });

  test("what waits for all peers together is bounded", () => {
    const node = new TestNode(1, { maxPeers: 64 });
    const peers = Array.from({ length: 40 }, (_, i) => ({ publicKey: x25519Public(key(100 + i)) }));
    node.configure({ peers });
    const packet = new Uint8Array(60_000).fill(0x45);
    for (const peer of node.device.peers()) for (let i = 0; i < 128; i++) node.device.stage(peer.slot, packet, 0);
    const held = Array.from(node.device.peers()).reduce((sum, peer) => sum + peer.staged.length * packet.length, 0);
    expect(held).toBeGreaterThan(31 << 20);
    expect(held).toBeLessThanOrEqual(32 << 20);
    // And comes free again.
    for (const peer of peers) node.configure({ peers: [{ ...peer, remove: true }, peer] });
    node.device.stage(node.peer.slot, packet, 0);
    expect(node.peer.staged.length).toBe(1);
  });

  test("packets that were staged are padded to 16, but not beyond the MTU", () => {
    const { a, b, net } = testPair();
    for (const size of [61, 1409, 1420]) net.send(a, size, size);
    net.run(1000);
    expect(b.arrived).toEqual([61, 1409, 1420]);
    const sizes = net.sent.filter((sent) => messageType(sent.message) === 4).map((sent) => sent.message.length);
    expect(sizes).toEqual([64 + 32, 1420 + 32, 1420 + 32]);
  });

  test("bytes are counted as wg(8) does: whole messages, handshakes included, the same on both ends", () => {
    const { a, b, net } = testPair();
    net.send(a, 1);
    net.run(5000);
    net.send(b, 2, 1000);
    net.run(30_000);
    const [one, two] = [a.device.dump().peers[0]!, b.device.dump().peers[0]!];
    // Initiation, packet of 64, keepalive; response and packet of 1008.
    expect(one.txBytes).toBe(148 + 96 + 32);
    expect(one.rxBytes).toBe(92 + 1008 + 32);
    expect([two.rxBytes, two.txBytes]).toEqual([one.txBytes, one.rxBytes]);
    expect(one.lastHandshake).toBe(UNIX_OFFSET + 20);
    expect(two.lastHandshake).toBe(UNIX_OFFSET + 30);
  });

  test("with no endpoint nothing is sent; as soon as there is one, it is", () => {
    const { a, b, net } = testPair();
    a.configure({ peers: [{ publicKey: b.publicKey, remove: true }, { publicKey: b.publicKey }] });
    net.send(a, 1);
    net.run(7000);
    expect(net.sent).toEqual([]);
    a.configure({ peers: [{ publicKey: b.publicKey, endpoint: b.addr }] }, net.now);
    net.run(7100);
    expect(b.arrived).toEqual([1]);
  });
});

describe("mesh", () => {
  const relay = (node: TestNode): Source => ({ kind: "relay", peer: node.publicKey });

  function meshPair() {
    const [a, b] = [new TestNode(1, { mode: "mesh" }), new TestNode(3, { mode: "mesh" })];
    a.configure({ peers: [{ publicKey: b.publicKey, allowedIPs: ["100.64.0.3/32"] }] });
    b.configure({ peers: [{ publicKey: a.publicKey, allowedIPs: ["100.64.0.1/32"] }] });
    return { a, b };
  }

  test("packets wait for a path, and go when it comes, over the relay", () => {
    const { a, b } = meshPair();
    expect(a.send(1, 0)).toBeNull();
    a.device.handleTimeout(3000);
    expect(a.messages()).toEqual([]);
    a.device.setPath(0, { relay: true }, 3000);
    const [initiation] = a.messages();
    expect(initiation).toMatchObject({ type: "send", slot: 0 });
    expect(initiation?.to).toBeUndefined();
    expect(b.deliver(initiation!.data, relay(a), 3010)).toBe(true);

    // b has no path yet: the answer goes the way the question came.
    const [response, ...more] = b.messages();
    expect([response?.to, more]).toEqual([relay(a), []]);
    expect(a.deliver(response!.data, relay(b), 3020)).toBe(true);
    expect(b.deliver(a.messages()[0]!.data, relay(a), 3030)).toBe(true);
    expect(b.arrived).toEqual([1]);
    expect(b.messages()).toEqual([]);
    expect(b.handshakes).toEqual([{ type: "handshake", slot: 0, ms: 20, initiator: false }]);
  });

  test("a response goes by the path and the way the initiation came, but not twice the same way", () => {
    const { a, b } = meshPair();
    const answer = (path: Parameters<Device["setPath"]>[1], from: Source, unix: number) => {
      b.device.setPath(0, path, unix);
      b.device.handleHandshake(forge(a, b, { unix: UNIX_OFFSET + unix }), from, unix);
      return b.messages().map((message) => message.to ?? "path");
    };
    const [here, there] = ["192.0.2.1:41641", "192.0.2.9:41641"];
    expect(answer({ udp: here }, udp(here), 1000)).toEqual(["path"]);
    expect(answer({ udp: here }, udp(there), 2000)).toEqual(["path", udp(there)]);
    expect(answer({ udp: here }, relay(a), 3000)).toEqual(["path", relay(a)]);
    expect(answer({ udp: here, relay: true }, relay(a), 4000)).toEqual(["path"]);
    expect(answer({ relay: true }, udp(here), 5000)).toEqual(["path", udp(here)]);
    expect(answer({}, udp(here), 6000)).toEqual([udp(here)]);
  });

  test("a relay that names another sender than the message does: dropped, whatever the message", () => {
    const { a, b } = meshPair();
    const stranger = new TestNode(9);
    a.device.setPath(0, { relay: true }, 0);
    b.device.setPath(0, { relay: true }, 0);
    a.send(1, 0);
    const initiation = a.messages()[0]!.data;
    expect(b.device.handleHandshake(initiation, relay(stranger), 0)).toBe("wrong-relay-peer");
    expect(b.device.handleHandshake(initiation, relay(a), 0)).toBeNull();
    const response = b.messages()[0]!.data;
    expect(a.device.handleHandshake(response, relay(stranger), 0)).toBe("wrong-relay-peer");
    const cookie = new Uint8Array(64);
    cookie.set([3]);
    cookie.set(initiation.subarray(4, 8), 4);
    expect(a.device.handleHandshake(cookie, relay(stranger), 0)).toBe("wrong-relay-peer");
    expect(a.device.handleHandshake(cookie, relay(b), 0)).toBe("bad-cookie");
    expect(a.device.handleHandshake(response, relay(b), 0)).toBeNull();
  });

  test("authenticated packets do not move the path, and copies by both ways count once", () => {
    const { a, b } = meshPair();
    const path = { udp: "192.0.2.3:1", relay: true };
    a.device.setPath(0, path, 0);
    a.send(1, 0);
    b.deliver(a.messages()[0]!.data, udp("198.51.100.1:5"), 10);
    const response = b.messages()[0]!.data;
    expect(a.deliver(response, udp("198.51.100.3:5"), 20)).toBe(true);
    expect(a.deliver(response, relay(b), 21)).toBe(false);
    const data = a.messages()[0]!.data;
    expect([b.deliver(data, udp("198.51.100.1:5"), 30), b.deliver(data, relay(a), 31)]).toEqual([true, false]);
    expect(b.arrived).toEqual([1]);
    expect(a.device.peerBySlot(0)?.path).toEqual(path);
    expect([a.device.peerBySlot(0)?.endpoint, b.device.peerBySlot(0)?.path]).toEqual([null, {}]);
    expect(a.device.dump().peers[0]?.endpoint).toBe("192.0.2.3:1");
  });

  test("when the path goes away, packets wait; when it comes back they go on the same session", () => {
    const { a, b } = meshPair();
    a.device.setPath(0, { relay: true }, 0);
    a.send(1, 0);
    b.deliver(a.messages()[0]!.data, relay(a), 0);
    a.deliver(b.messages()[0]!.data, relay(b), 0);
    b.deliver(a.messages()[0]!.data, relay(a), 0);
    a.device.setPath(0, {}, 1000);
    expect(a.send(2, 1000)).toBeNull();
    expect(a.messages()).toEqual([]);
    a.device.setPath(0, { udp: "192.0.2.3:1" }, 2000);
    const messages = a.messages();
    expect(messages.length).toBe(1);
    expect(b.deliver(messages[0]!.data, udp("192.0.2.1:1"), 2000)).toBe(true);
    expect(b.arrived).toEqual([1, 2]);
  });
});

describe("configuration", () => {
  const peerKey = (n: number) => x25519Public(key(n));

  test("get gives back what set took", () => {
    const node = new TestNode(1);
    node.configure({
      listenPort: 51820,
      fwmark: 0xca6c,
      peers: [
        { publicKey: peerKey(2), presharedKey: key(7), endpoint: "[2001:DB8::0:1]:51820", persistentKeepalive: 25 },
        { publicKey: peerKey(3), allowedIPs: ["10.1.2.3/8", "fd00::1", "0.0.0.0/0"] },
      ],
    });
    const none = { presharedKey: new Uint8Array(32), endpoint: null, lastHandshake: 0, rxBytes: 0, txBytes: 0 };
    expect(node.device.dump()).toEqual({
      privateKey: key(1),
      listenPort: 51820,
      fwmark: 0xca6c,
      peers: [
        {
          ...none,
          publicKey: peerKey(2),
          presharedKey: key(7),
          endpoint: "[2001:db8::1]:51820",
          persistentKeepalive: 25,
          allowedIPs: [],
          // Its keepalive has started a handshake.
          txBytes: 148,
        },
        {
          ...none,
          publicKey: peerKey(3),
          persistentKeepalive: 0,
          allowedIPs: ["10.0.0.0/8", "fd00::1/128", "0.0.0.0/0"],
        },
      ],
    });
  });

  test("update_only, remove, replace_allowed_ips, replace_peers, and taking one prefix away", () => {
    const node = new TestNode(1);
    const peers = () => node.device.dump().peers.map((peer) => [peer.publicKey[0], peer.allowedIPs]);
    const [two, three] = [peerKey(2)[0], peerKey(3)[0]];
    node.configure({ peers: [{ publicKey: peerKey(2), updateOnly: true, allowedIPs: ["10.0.0.0/8"] }] });
    expect(peers()).toEqual([]);
    node.configure({ peers: [{ publicKey: peerKey(2), allowedIPs: ["10.0.0.0/8", "11.0.0.0/8"] }] });
    node.configure({ peers: [{ publicKey: peerKey(2), updateOnly: true, allowedIPs: ["-11.0.0.0/8", "12.0.0.0/8"] }] });
    expect(peers()).toEqual([[two, ["10.0.0.0/8", "12.0.0.0/8"]]]);
    node.configure({ peers: [{ publicKey: peerKey(3), allowedIPs: ["10.0.0.0/8", "-12.0.0.0/8"] }] });
    expect(peers()).toEqual([
      [two, ["12.0.0.0/8"]],
      [three, ["10.0.0.0/8"]],
    ]);
    node.configure({ peers: [{ publicKey: peerKey(3), replaceAllowedIPs: true, allowedIPs: ["fd00::/8"] }] });
    expect(peers()).toEqual([
      [two, ["12.0.0.0/8"]],
      [three, ["fd00::/8"]],
    ]);
    node.configure({
      peers: [
        { publicKey: peerKey(2), remove: true },
        { publicKey: peerKey(9), remove: true },
      ],
    });
    expect(peers()).toEqual([[three, ["fd00::/8"]]]);
    node.configure({ replacePeers: true, peers: [{ publicKey: peerKey(2) }] });
    expect(peers()).toEqual([[two, []]]);
    expect(node.device.allowedIPs.size).toBe(0);
  });

  test("a wrong value anywhere: one sentence, and nothing of the update has happened", () => {
    const { a, b } = captured();
    const before = stateOf(a);
    const good: DeviceUpdate = { privateKey: key(9), listenPort: 1, fwmark: 2, replacePeers: true };
    const wrong: [DeviceUpdate, string][] = [
      [{ privateKey: new Uint8Array(31) }, "the private key has 31 bytes: give 32"],
      [{ listenPort: 65536 }, "the listen port is 65536: give a whole number from 0 to 65535"],
      [{ fwmark: -1 }, "the fwmark is -1: give a whole number from 0 to 4294967295"],
      [{ peers: [{ publicKey: new Uint8Array(33) }] }, "the public key has 33 bytes: give 32"],
      [{ peers: [{ publicKey: "x" as unknown as Uint8Array }] }, "the public key is not a byte array"],
      [{ peers: [{ publicKey: b.publicKey, presharedKey: new Uint8Array(0) }] }, "the preshared key has 0 bytes"],
      [
        { peers: [{ publicKey: b.publicKey, endpoint: "example.org:1" }] },
        'the endpoint "example.org:1" is no address',
      ],
      [{ peers: [{ publicKey: b.publicKey, endpoint: "192.0.2.1:0" }] }, 'the endpoint "192.0.2.1:0" is no address'],
      [{ peers: [{ publicKey: b.publicKey, persistentKeepalive: 65536 }] }, "interval is 65536"],
      [{ peers: [{ publicKey: b.publicKey, persistentKeepalive: 1.5 }] }, "interval is 1.5"],
      [
        { peers: [{ publicKey: b.publicKey, allowedIPs: ["10.0.0.0/33"] }] },
        'the allowed IP "10.0.0.0/33" is no prefix',
      ],
      [{ peers: [{ publicKey: b.publicKey, allowedIPs: ["-", "10.0.0.0/8"] }] }, 'the allowed IP "-" is no prefix'],
    ];
    for (const [update, message] of wrong) {
      const peers = [{ publicKey: peerKey(50), allowedIPs: ["10.0.0.0/8"] }, ...(update.peers ?? [])];
      expect(() => a.configure({ ...good, ...update, peers })).toThrow(message);
      expect(stateOf(a)).toEqual(before);
    }
  });

  test("too many peers or allowed IPs: refused as a whole; what fits exactly is taken", () => {
    const node = new TestNode(1, { maxPeers: 4, maxAllowedIPs: 6 });
    const peers = [10, 11, 12, 13].map((n) => ({ publicKey: peerKey(n), allowedIPs: [`10.0.${n}.0/24`] }));
    node.configure({ peers });
    const before = stateOf(node);
    expect(() => node.configure({ peers: [{ publicKey: peerKey(20) }] })).toThrow(
      "too many peers: this device holds 4",
    );
    const six = Array.from({ length: 6 }, (_, i) => `10.1.${i}.0/24`);
    const tooMany = { publicKey: peerKey(10), allowedIPs: six };
    expect(() => node.configure({ fwmark: 5, peers: [tooMany] })).toThrow("too many allowed IPs: this device holds 6");
    expect(stateOf(node)).toEqual(before);

    node.configure({ peers: [{ publicKey: peerKey(13), remove: true }, { publicKey: peerKey(20) }] });
    expect(node.device.peerCount).toBe(4);
    // Prefixes that move or were there before do not count twice.
    node.configure({
      peers: [{ publicKey: peerKey(10), allowedIPs: ["10.0.10.0/24", "10.0.11.0/24", "10.0.12.0/24"] }],
    });
    node.configure({ peers: [{ publicKey: peerKey(10), replaceAllowedIPs: true, allowedIPs: six }] });
    expect(node.device.allowedIPs.size).toBe(6);
    node.configure({ replacePeers: true, peers });
    expect(node.device.allowedIPs.size).toBe(4);
  });

  test("a removed peer leaves no key behind, and its slot serves the next one", () => {
    const { a, b, net } = captured();
    const { slot } = a.peer;
    a.device.stage(slot, testPacket(1), net.now);
    a.configure({ peers: [{ publicKey: b.publicKey, remove: true }] }, net.now);
    expect([a.device.sessionCount, a.device.nextTimeout(), a.device.peerBySlot(slot)]).toEqual([0, Infinity, null]);
    const from = a.asm.exports.sessionTableBase();
    const table = a.asm.u8.subarray(from, from + a.asm.exports.sessionTableSize(128));
    expect(table.every((byte) => byte === 0)).toBe(true);
    // Reports that come too late for it are ignored.
    a.device.sent(slot, 1, 100, net.now);
    a.device.received(slot, 0, 1, 0, 100, net.now);
    expect(a.device.prepareSend(slot, net.now)).toBe(-1);
    a.configure({ peers: [{ publicKey: peerKey(50) }] }, net.now);
    expect(a.device.peerByKey(peerKey(50))?.slot).toBe(slot);
    expect(a.device.dump().peers[0]?.txBytes).toBe(0);
  });

  test("one Asm serves one device, and takes as much memory as it says", () => {
    const asm = Asm.create(256);
    const before = asm.free;
    const needed = Device.memoryNeeded(asm, 1000, 5000);
    const options = {
      asm,
      random: seededBytes(1),
      mode: "wg",
      unixOffset: 0,
      maxPeers: 1000,
      maxAllowedIPs: 5000,
    } as const;
    const device = new Device(options);
    expect(before - asm.free).toBeLessThanOrEqual(needed);
    expect(before - asm.free).toBeGreaterThan(needed - 1024);
    expect(() => new Device(options)).toThrow("this Asm already serves a WireGuard device");
    const peers = Array.from({ length: 1000 }, (_, i) => ({
      publicKey: Uint8Array.from({ length: 32 }, (_, at) => (at === 0 ? i & 0xff : at === 1 ? i >> 8 : 9)),
      endpoint: `198.18.${i >> 8}.${i & 0xff}:51820`,
      allowedIPs: [`10.9.${i >> 8}.${i & 0xff}`, `fd00::${i.toString(16)}`],
    }));
    device.configure({ privateKey: key(1), peers }, 0);
    expect(device.allowedIPs.lookup(Uint8Array.of(10, 9, 3, 231))).toBe(device.peerByKey(peers[999]!.publicKey)!.slot);
    // All at once, with every peer at its own time afterwards.
    for (const peer of device.peers()) device.stage(peer.slot, testPacket(1), peer.slot);
    expect(device.drain().length).toBe(1000);
    let fired = 0;
    for (let now = 0; now < 5000 + 333 + 1000; now = device.nextTimeout()) {
      device.handleTimeout(now);
      fired += device.drain().filter((output) => output.type === "send").length;
    }
    expect(fired).toBe(1000);
  });
});
