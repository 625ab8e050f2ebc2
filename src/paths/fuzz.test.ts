// Whatever comes from the network: no exception, no path, no growth.
import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { boxBeforeNM, boxSeal } from "../crypto/box.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { encodeCallMeMaybe, encodePing, sealDisco } from "../wire/disco.ts";
import { encodeStunRequest, encodeStunResponse } from "../wire/stun.ts";
import { PathManager } from "./manager.ts";
import { seededRandom } from "./sim.ts";

const RUNS = { numRuns: 2000, seed: 20 };
const FROM = "192.0.2.9:41641";

function setUp() {
  const random = seededRandom(1);
  const [ours, theirs, nodeKey] = [random(32), random(32), random(32)];
  const manager = new PathManager({ random });
  manager.setKeys({ nodeKey: random(32), discoPrivate: ours }, 0);
  manager.setLocalAddresses(["198.51.100.1", "2001:db8::1"], 41641, 41641, 0);
  const node = { Name: "1a", RegionID: 1, HostName: "derp.test" };
  manager.setDerpMap({ Regions: { "1": { RegionID: 1, Nodes: [node] } } }, 0);
  manager.resolved("derp.test", ["203.0.113.1"], 0);
  manager.setPeers([{ nodeKey, discoKey: x25519Public(theirs), endpoints: [FROM], homeDerp: 1 }], 0);
  manager.noteSend(nodeKey, 1);
  const shared = boxBeforeNM(theirs, x25519Public(ours))!;
  const envelope = (message: Uint8Array) => sealDisco(shared, x25519Public(theirs), random(24), message);
  return { manager, random, nodeKey, shared, theirs, envelope };
}

const bytes = fc.uint8Array({ maxLength: 300 });

describe("bytes that nobody vouches for", () => {
  test("random datagrams, with the beginnings of disco, STUN and Geneve, say nothing and change nothing", () => {
    const { manager, nodeKey } = setUp();
    manager.drain();
    const before = manager.nextTimeout();
    const magic = fc.constantFrom(
      [],
      [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac],
      [1, 1, 0, 12, 0x21, 0x12, 0xa4, 0x42],
      [0, 0, 0x7a, 0x11],
    );
    fc.assert(
      fc.property(bytes, magic, fc.boolean(), (data, start, relayed) => {
        data.set(start.slice(0, data.length));
        if (relayed) manager.handleRelayed(1, nodeKey, data, 2);
        else manager.handleDatagram(FROM, data, 2);
      }),
      RUNS,
    );
    expect(manager.drain()).toEqual([]);
    expect(manager.nextTimeout()).toEqual(before);
  });

  test("a bit-flipped ping is never answered, whichever bit it is", () => {
    const { manager, random, nodeKey, envelope } = setUp();
    const ping = envelope(encodePing({ txid: random(12), nodeKey, padding: 3 }));
    manager.drain();
    for (let bit = 0; bit < ping.length * 8; bit++) {
      const broken = ping.slice();
      broken[bit >> 3]! ^= 1 << (bit & 7);
      manager.handleDatagram(FROM, broken, 2);
      manager.handleRelayed(1, nodeKey, broken, 2);
    }
    expect(manager.drain()).toEqual([]);
    manager.handleDatagram(FROM, ping, 2);
    expect(manager.drain().filter((action) => action.type === "udp" && action.to === FROM).length).toBe(2);
  });

  test("bit-flipped and truncated STUN answers never make an address of ours", () => {
    const { manager } = setUp();
    const sent = manager.drain().find((action) => action.type === "udp" && action.to === "203.0.113.1:3478");
    if (sent?.type !== "udp") throw new Error("no STUN request went out");
    const answer = encodeStunResponse(sent.data.slice(8, 20), Uint8Array.of(198, 51, 100, 1), 41641);
    for (let length = 0; length < answer.length; length++) manager.handleDatagram(FROM, answer.subarray(0, length), 2);
    manager.handleDatagram(FROM, encodeStunResponse(new Uint8Array(12), Uint8Array.of(6, 6, 6, 6), 6), 2);
    manager.handleDatagram(FROM, encodeStunRequest(sent.data.slice(8, 20)), 2);
    expect(manager.endpoints).toEqual([]);
    expect(manager.netcheckRunning).toBe(true);
    manager.handleDatagram(FROM, answer, 2);
    for (let i = 0; manager.netcheckRunning && i < 100; i++) manager.handleTimeout(manager.nextTimeout()!.at);
    expect(manager.endpoints[0]).toBe("198.51.100.1:41641");
  });
});

describe("a peer that may speak, and abuses it", () => {
  test("any message inside a valid box: no exception, and only pongs and bounded pings come of it", () => {
    const { manager, random, nodeKey, shared, theirs } = setUp();
    manager.drain();
    let now = 2;
    fc.assert(
      fc.property(fc.nat(12), fc.nat(2), bytes, fc.boolean(), fc.nat(65535), (type, version, body, relayed, port) => {
        const nonce = random(24);
        const boxed = boxSeal(shared, nonce, Uint8Array.of(type, version, ...body));
        const data = Uint8Array.of(0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac, ...x25519Public(theirs), ...nonce, ...boxed);
        now += 0.1;
        if (relayed) expect(manager.handleRelayed(1, nodeKey, data, now)).toBe(true);
        else manager.handleDatagram(`192.0.2.7:${port}`, data, now);
        const actions = manager.drain();
        expect(actions.length).toBeLessThan(260);
        for (const action of actions) expect(["udp", "relay", "path", "log"]).toContain(action.type);
      }),
      RUNS,
    );
    expect(manager.peerStatus(nodeKey, now)?.address).toBeNull();
  });

  test("ten minutes of calls and pings from everywhere: the work per second and the memory are bounded", () => {
    const { manager, random, nodeKey, envelope } = setUp();
    let sent = 0;
    let now = 10;
    for (let i = 0; i < 500; i++) {
      now += 1200;
      const port = 1 + (i % 60_000);
      manager.handleDatagram(`192.0.2.7:${port}`, envelope(encodePing({ txid: random(12), nodeKey, padding: 0 })), now);
      const addresses = Array.from({ length: 100 }, (_, k) => `198.18.${i & 255}.${k}:${port}`);
      manager.handleRelayed(1, nodeKey, envelope(encodeCallMeMaybe(addresses)), now);
      for (let due = manager.nextTimeout(); due && due.at <= now; due = manager.nextTimeout())
        manager.handleTimeout(now);
      sent += manager.drain().filter((action) => action.type === "udp").length;
    }
    // At most 256 pings are under way at any moment, each for 5 s; besides them one pong per ping.
    expect(sent / (now / 1000)).toBeLessThan(256 / 5 + 2);
    for (let due = manager.nextTimeout(); due && due.at <= now + 60_000; due = manager.nextTimeout()) {
      manager.handleTimeout(due.at);
      if (manager.drain().length > 1000) throw new Error("the queue grows");
    }
  }, 120_000);
});
