// Scenarios: hosts in a simulated internet (sim.ts). The names carry the rule of spec/datapath-wire.md that they show.
import { describe, expect, test } from "bun:test";
import { boxBeforeNM } from "../crypto/box.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { encodeCallMeMaybe, encodePing, encodePong, openDisco, sealDisco } from "../wire/disco.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import { type PathAction, PathManager } from "./manager.ts";
import { Sim, type SimHost, SimNat, seededRandom, setRegionUp } from "./sim.ts";

const A = "198.51.100.1";
const B = "198.51.100.2";

/** Two public hosts and one relay region, joined, idle for a while. */
function pair(options: { a?: string[]; b?: string[]; seed?: number } = {}) {
  const sim = new Sim(options.seed ?? 1);
  const region = sim.addRegion(1, ["203.0.113.1"]);
  const a = sim.addHost("a", { ips: options.a ?? [A] });
  const b = sim.addHost("b", { ips: options.b ?? [B] });
  sim.run(2000);
  sim.meet(a, b);
  sim.run(1000);
  return { sim, region, a, b };
}

function talk(sim: Sim, a: SimHost, b: SimHost, duration: number, interval = 100): void {
  a.stream(b, interval, duration);
  b.stream(a, interval, duration);
  sim.run(0);
}

function connect(sim: Sim, a: SimHost, b: SimHost): number {
  return sim.until(() => a.isDirect(b) && b.isDirect(a), 5000);
}

const ofType = <T extends PathAction["type"]>(host: SimHost, type: T) =>
  host.actions.filter((action): action is Extract<PathAction, { type: T }> => action.type === type);

/** Numbers of a's packets that never reached b. */
function missing(a: SimHost, b: SimHost, numbers: number[]): number[] {
  return numbers.filter((number) => !b.seen.has(`${a.name}|${number}`));
}

describe("two nodes that can reach each other", () => {
  test("the first data goes by relay, a direct path stands within a second", () => {
    const { sim, a, b } = pair();
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
    talk(sim, a, b, 5000);
    expect(connect(sim, a, b)).toBeLessThan(1000);
    expect(b.arrivals[0]!.via).toBe("relay");
    sim.run(3000);
    expect(b.arrivals.at(-1)!.via).toBe("udp");
    expect(a.pathTo(b)).toEqual({ udp: `${B}:41641` });
  });

  test("no packet of the first minute is lost, whatever way it takes", () => {
    const { sim, a, b } = pair();
    const numbers: number[] = [];
    for (let t = 0; t < 60_000; t += 50) sim.at(t, () => numbers.push(a.send(b)));
    sim.run(61_000);
    expect(missing(a, b, numbers)).toEqual([]);
  });

  test("a path is used only after a pong confirmed it", () => {
    const { sim, a, b } = pair();
    const before = a.actions.length;
    a.send(b);
    const pings = a.actions.slice(before).filter((action) => action.type === "udp");
    expect(pings.length).toBe(1);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
    // Half a round trip: the ping is there, no pong is back.
    sim.run(15);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
    sim.run(10);
    expect(a.pathTo(b)).toEqual({ udp: `${B}:41641` });
  });

  test("data on an address is no proof: only pongs make a path (checklist 3)", () => {
    const { sim, a, b } = pair();
    a.receiveUDP(`${B}:41641`, Uint8Array.of(4, 1, 0, 0, 0, 0, 0, 9));
    sim.run(100);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
  });

  test("both behind NATs: STUN, CallMeMaybe over the relay, and the path is direct", () => {
    const sim = new Sim(3);
    sim.addRegion(1, ["203.0.113.1"]);
    const a = sim.addHost("a", { ips: ["192.168.1.2"], nat: new SimNat("198.51.100.10"), lan: "home" });
    const b = sim.addHost("b", { ips: ["192.168.1.2"], nat: new SimNat("198.51.100.20"), lan: "office" });
    sim.run(2000);
    sim.meet(a, b);
    sim.run(60_000);
    expect(a.endpoints).toEqual(["198.51.100.10:20000", "192.168.1.2:41641"]);
    talk(sim, a, b, 5000);
    expect(connect(sim, a, b)).toBeLessThan(1000);
    expect(a.pathTo(b).udp).toBe("198.51.100.20:20000");
  });

  test("in one LAN behind one NAT: the private addresses win", () => {
    const sim = new Sim(4);
    sim.addRegion(1, ["203.0.113.1"]);
    const nat = new SimNat("198.51.100.10");
    sim.delay = (_, to) => (to.startsWith("192.168.") ? 1 : 15);
    const a = sim.addHost("a", { ips: ["192.168.1.2"], nat, lan: "home" });
    const b = sim.addHost("b", { ips: ["192.168.1.3"], nat, lan: "home" });
    sim.run(2000);
    sim.meet(a, b);
    talk(sim, a, b, 5000);
    connect(sim, a, b);
    expect(a.pathTo(b).udp).toBe("192.168.1.3:41641");
  });
});

describe("the path breaks and comes back", () => {
  test("UDP blocked: both ways within 7 s, relay alone within 12 s; the data goes on", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 120_000);
    connect(sim, a, b);
    sim.run(10_000);
    a.udpBlocked = true;
    const noticed = sim.until(() => a.pathTo(b).relay === true && b.pathTo(a).relay === true, 7000);
    const left = sim.until(() => !a.pathTo(b).udp && !b.pathTo(a).udp, 12_000 - noticed);
    expect(noticed + left).toBeLessThanOrEqual(12_000);
    const count = b.arrivals.length;
    sim.run(5000);
    expect(b.arrivals.length - count).toBe(50);
    expect(b.arrivals.slice(count).every((arrival) => arrival.via === "relay")).toBe(true);
  });

  test("from the moment that the trust is gone no packet is lost, nor when UDP comes back", () => {
    const { sim, a, b } = pair();
    a.stream(b, 1000, 30_000);
    sim.run(10_000);
    a.udpBlocked = true;
    sim.until(() => a.pathTo(b).relay === true, 7000);
    const numbers: number[] = [];
    for (let t = 0; t < 60_000; t += 50) sim.at(t, () => numbers.push(a.send(b)));
    sim.run(20_000);
    a.udpBlocked = false;
    sim.run(42_000);
    expect(missing(a, b, numbers)).toEqual([]);
    expect(a.isDirect(b)).toBe(true);
  });

  test("UDP unblocked: direct again within seconds, by itself", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 200_000);
    connect(sim, a, b);
    a.udpBlocked = true;
    sim.run(60_000);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
    a.udpBlocked = false;
    expect(connect(sim, a, b)).toBeLessThanOrEqual(6000);
  });

  test("a lossy link keeps its direct path", () => {
    const { sim, a, b } = pair();
    sim.loss = 0.1;
    talk(sim, a, b, 120_000);
    sim.until(() => a.isDirect(b) && b.isDirect(a), 20_000);
    let direct = 0;
    for (let i = 0; i < 100; i++) {
      sim.run(1000);
      if (a.pathTo(b).udp) direct++;
    }
    expect(direct).toBeGreaterThan(95);
  });

  test("the kernel cannot send to the best address: the relay helps at once, a second later the path is given up (5.4.6)", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 60_000);
    connect(sim, a, b);
    a.options.ips = [];
    sim.until(() => !a.isDirect(b), 3100);
    expect(a.pathTo(b)).toEqual({ udp: `${B}:41641`, relay: true, region: 1 });
    sim.until(() => a.pathTo(b).udp === undefined, 1100);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
  });

  test("one refused datagram, a full buffer, does not cost the path", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 60_000);
    connect(sim, a, b);
    for (let i = 0; i < 10; i++) {
      a.manager.sendFailed(`${B}:41641`, sim.now);
      a.pump();
      sim.until(() => a.isDirect(b), 1100);
      sim.run(5000);
    }
  });

  test("the relay stops for a minute: a direct path does not notice, a relayed one goes on afterwards", () => {
    const { sim, region, a, b } = pair();
    talk(sim, a, b, 120_000);
    connect(sim, a, b);
    setRegionUp(sim, region, false);
    sim.run(30_000);
    expect(a.isDirect(b)).toBe(true);
    a.udpBlocked = true;
    sim.run(30_000);
    setRegionUp(sim, region, true);
    sim.run(1000);
    const count = b.arrivals.length;
    sim.run(2000);
    expect(b.arrivals.slice(count).map((arrival) => arrival.via)).toContain("relay");
  });
});

describe("changes of the hosts", () => {
  test("the peer restarts with a new disco key: its learnt path goes, the new one comes (checklist 8)", () => {
    const { sim, a, b } = pair();
    a.stream(b, 100, 60_000);
    sim.until(() => a.isDirect(b), 5000);
    b.start();
    // Control has told a: the path is void at once.
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
    expect(sim.until(() => a.isDirect(b), 6000)).toBeLessThan(6000);
    const count = b.arrivals.length;
    sim.run(1000);
    expect(b.arrivals.length).toBeGreaterThan(count);
  });

  test("we restart: the peer that goes on sending finds the way to our new self", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 60_000);
    connect(sim, a, b);
    a.start();
    sim.until(() => a.isDirect(b) && b.isDirect(a), 6000);
  });

  test("an old pong for the old self confirms nothing", () => {
    const { sim, a, b } = pair();
    a.send(b);
    sim.run(15);
    // The pong is on its way when the network changes.
    a.manager.networkChanged(sim.now);
    sim.dead.add(`${B}:41641`);
    a.pump();
    sim.run(30);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 1 });
  });

  test("one side moves to another address: endpoints published, direct again, and nothing to the old place", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 120_000);
    connect(sim, a, b);
    b.setAddresses(["198.51.100.77"]);
    // Until it is known which paths went with the address the relay helps.
    expect(b.pathTo(a)).toEqual({ udp: `${A}:41641`, relay: true, region: 1 });
    const took = sim.until(
      () => a.pathTo(b).udp === "198.51.100.77:41641" && !a.pathTo(b).relay && b.isDirect(a),
      12_000,
    );
    expect(took).toBeLessThan(12_000);
    expect(b.endpoints).toEqual(["198.51.100.77:41641"]);
    sim.run(1000);
    const before = ofType(a, "udp").length;
    sim.run(20_000);
    const targets = new Set(
      ofType(a, "udp")
        .slice(before)
        .map((action) => action.to),
    );
    expect([...targets].sort()).toEqual(["198.51.100.77:41641", "203.0.113.1:3478"]);
  });

  test("an address that no path needs goes: a round trip later all is as before, and nothing was lost", () => {
    const { sim, a, b } = pair({ a: [A, "172.17.0.1"] });
    const numbers: number[] = [];
    for (let t = 0; t < 20_000; t += 7) sim.at(t, () => numbers.push(a.send(b)));
    sim.run(5000);
    a.setAddresses([A]);
    expect(sim.until(() => a.isDirect(b), 100)).toBeLessThanOrEqual(20);
    sim.run(20_000);
    expect(missing(a, b, numbers)).toEqual([]);
  });

  test("link-local IPv6 that comes and goes with containers is no news", () => {
    const { sim, a } = pair();
    const before = a.actions.length;
    a.setAddresses([A, "fe80::1234"]);
    a.setAddresses([A]);
    sim.run(1000);
    expect(a.actions.length).toBe(before);
  });

  test("an address more is published, and disturbs no path", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 60_000);
    connect(sim, a, b);
    a.setAddresses([A, "192.168.7.7"]);
    expect(a.isDirect(b)).toBe(true);
    expect(ofType(a, "endpoints").at(-1)!.endpoints).toEqual([`${A}:41641`, "192.168.7.7:41641"]);
  });

  test("IPv4 and IPv6: IPv6 wins at equal latency, IPv4 when it is faster (5.7)", () => {
    for (const [slow6, winner] of [
      [10, `[2001:db8::2]:41641`],
      [20, `${B}:41641`],
    ] as const) {
      const { sim, a, b } = pair({ a: [A, "2001:db8::1"], b: [B, "2001:db8::2"] });
      sim.delay = (from) => (from.startsWith("[") ? slow6 : 10);
      talk(sim, a, b, 60_000);
      connect(sim, a, b);
      sim.run(1000);
      expect(a.pathTo(b).udp).toBe(winner);
    }
  });

  test("the better address fails: the other takes over, the relay bridges", () => {
    const { sim, a, b } = pair({ a: [A, "2001:db8::1"], b: [B, "2001:db8::2"] });
    talk(sim, a, b, 60_000);
    connect(sim, a, b);
    sim.run(1000);
    sim.dead.add("[2001:db8::2]:41641");
    sim.until(() => a.pathTo(b).udp === `${B}:41641` && a.isDirect(b), 12_000);
  });

  test("without an IPv6 address that leads out, STUN asks over IPv4 only", () => {
    const sim = new Sim(14);
    sim.addRegion(1, ["203.0.113.1", "2001:db8:f::1"]);
    const a = sim.addHost("a", { ips: [A, "::1", "fe80::1"] });
    sim.run(5000);
    expect(ofType(a, "udp").map((action) => action.to)).toEqual(["203.0.113.1:3478"]);
  });

  test("a node without an IPv6 socket never pings IPv6", () => {
    const { sim, a, b } = pair({ b: [B, "2001:db8::2"] });
    talk(sim, a, b, 10_000);
    sim.run(10_000);
    expect(ofType(a, "udp").filter((action) => action.to.startsWith("["))).toEqual([]);
  });
});

describe("5.5: heartbeat", () => {
  test("every 3 s while data flows; 45 s after the last data nothing is sent any more, not even STUN", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 10_000);
    sim.run(10_000);
    const during = ofType(a, "udp").length;
    sim.run(46_000);
    expect(ofType(a, "udp").length - during).toBeGreaterThan(10);
    // b's last heartbeat is answered, then there is silence.
    sim.run(10_000);
    const [ours, theirs, packets] = [a.actions.length, b.actions.length, sim.udpPackets];
    sim.run(3_600_000);
    expect([sim.udpPackets, ofType(a, "udp").length, b.actions.length]).toEqual([
      packets,
      ofType(a, "udp").length,
      theirs,
    ]);
    expect(a.actions.length).toBe(ours);
    expect(a.manager.nextTimeout()).toBeNull();
  });

  test("after the pause the old address is used beside the relay until a pong confirms it anew", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 5000);
    sim.run(120_000);
    expect(a.pathTo(b)).toEqual({ udp: `${B}:41641`, relay: true, region: 1 });
    a.send(b);
    expect(sim.until(() => a.isDirect(b), 100)).toBeLessThanOrEqual(20);
    expect(b.arrivals.at(-1)).toMatchObject({ from: a, via: "udp" });
  });

  test("one side only sends: its path stays direct although the other never pings (5.3 c)", () => {
    const sim = new Sim(5);
    sim.addRegion(1, ["203.0.113.1"]);
    const a = sim.addHost("a", { ips: ["192.168.1.2"], nat: new SimNat("198.51.100.10"), lan: "home" });
    const b = sim.addHost("b", { ips: [B] });
    sim.run(2000);
    sim.meet(a, b);
    b.stream(a, 500, 300_000);
    sim.until(() => b.isDirect(a), 5000);
    let relayed = 0;
    for (let t = 0; t < 290; t++) {
      sim.run(1000);
      if (!b.isDirect(a)) relayed++;
    }
    expect(relayed).toBe(0);
  });

  test("a good path is not searched again; a slow one once a minute", () => {
    for (const [delay, searches] of [
      [2, 0],
      [3, 2],
    ] as const) {
      const { sim, a, b } = pair();
      // Announced, but in another LAN.
      b.options.lan = "elsewhere";
      b.setAddresses([B, "192.168.9.9"]);
      sim.run(1000);
      sim.delay = () => delay;
      talk(sim, a, b, 200_000);
      connect(sim, a, b);
      sim.run(20_000);
      const pings = () => ofType(a, "udp").filter((action) => action.to === "192.168.9.9:41641").length;
      const before = pings();
      sim.run(125_000);
      expect(pings() - before).toBe(searches);
    }
  });
});

describe("5.4 and 5.6: search and CallMeMaybe", () => {
  test("while no path is found every candidate is pinged about every 5 s, and CallMeMaybe goes with it", () => {
    const { sim, a, b } = pair();
    b.udpBlocked = true;
    a.stream(b, 200, 60_000);
    sim.run(60_000);
    const pings = ofType(a, "udp").filter((action) => action.to === `${B}:41641`).length;
    expect(pings).toBeGreaterThanOrEqual(10);
    expect(pings).toBeLessThanOrEqual(13);
    const calls = ofType(a, "relay").filter((action) => action.data[0] === 0x54).length;
    expect(calls).toBeGreaterThanOrEqual(9);
    expect(calls).toBeLessThanOrEqual(pings);
  });

  test("own endpoints older than 27 s: first a ReSTUN, then CallMeMaybe with what it found", () => {
    const { sim, a, b } = pair();
    b.udpBlocked = true;
    sim.run(60_000);
    const before = a.actions.length;
    a.send(b);
    const disco = () => a.actions.slice(before).filter((action) => action.type === "relay");
    expect(a.actions.slice(before).some((action) => action.type === "udp" && action.to === "203.0.113.1:3478")).toBe(
      true,
    );
    expect(disco()).toEqual([]);
    sim.run(30);
    expect(disco().length).toBe(1);
  });

  test("an answered CallMeMaybe pings at once, and does not call back", () => {
    const { sim, a, b } = pair();
    a.send(b);
    const before = b.actions.length;
    sim.run(2000);
    const sent = b.actions.slice(before);
    expect(sent.filter((action) => action.type === "relay")).toEqual([]);
    expect(sent.filter((action) => action.type === "udp").length).toBeGreaterThan(0);
    // b sends nothing by itself, so it has no heartbeat: after the trust ends, there is nothing.
    sim.run(60_000);
    expect(b.manager.nextTimeout()).toBeNull();
  });
});

/** One manager by hand, with a peer whose disco key we hold. */
function lone() {
  const random = seededRandom(11);
  const manager = new PathManager({ random });
  const ours = random(32);
  const theirs = random(32);
  const nodeKey = random(32);
  const peer = { nodeKey, discoKey: x25519Public(theirs), endpoints: [`${B}:41641`], homeDerp: 1 };
  const map: DERPMap = {
    Regions: {
      "1": { RegionID: 1, Nodes: [{ Name: "1a", RegionID: 1, HostName: "d.test", IPv4: "203.0.113.1", IPv6: "none" }] },
    },
  };
  manager.setKeys({ nodeKey: random(32), discoPrivate: ours }, 0);
  manager.setLocalAddresses([A], 41641, undefined, 0);
  manager.setDerpMap(map, 0);
  manager.setPeers([peer], 0);
  manager.relayState(1, true, 0);
  manager.drain();
  const shared = boxBeforeNM(theirs, x25519Public(ours))!;
  const seal = (message: Uint8Array, sender = theirs) => sealDisco(shared, x25519Public(sender), random(24), message);
  const ping = (txid: number, key: Uint8Array | null = nodeKey) =>
    seal(encodePing({ txid: new Uint8Array(12).fill(txid), padding: 0, ...(key ? { nodeKey: key } : {}) }));
  const open = (action: PathAction) => {
    if (action.type !== "udp" && action.type !== "relay") return null;
    return openDisco(shared, action.data);
  };
  /** Every disco message among the actions drained now, with where it goes. */
  const sent = () =>
    manager.drain().flatMap((action) => {
      const message = open(action);
      if (!message) return [];
      const to = action.type === "udp" ? action.to : action.type === "relay" ? action.region : "";
      return [{ to, message }];
    });
  const targets = () => sent().map(({ to }) => to);
  return { manager, random, nodeKey, peer, map, shared, seal, ping, sent, targets };
}

describe("4.3: what is answered", () => {
  test("every valid ping, even when idle, to its very source, with the source as seen", () => {
    const { manager, ping, sent } = lone();
    manager.handleDatagram("192.0.2.50:777", ping(1), 5);
    expect(sent()).toEqual([
      { to: "192.0.2.50:777", message: { type: "pong", txid: new Uint8Array(12).fill(1), source: "192.0.2.50:777" } },
    ]);
  });

  test("a copy of the last ping from one place gets no second pong; from another place it does", () => {
    const { manager, ping, targets } = lone();
    for (const from of ["192.0.2.50:1", "192.0.2.50:1", "192.0.2.50:2"]) manager.handleDatagram(from, ping(1), 5);
    expect(targets()).toEqual(["192.0.2.50:1", "192.0.2.50:2"]);
    manager.handleDatagram("192.0.2.50:1", ping(2), 6);
    expect(targets()).toEqual(["192.0.2.50:1"]);
  });

  test("a ping without a node key, of a very old peer, is answered too", () => {
    const { manager, ping, targets } = lone();
    manager.handleDatagram("192.0.2.50:1", ping(1, null), 5);
    expect(targets()).toEqual(["192.0.2.50:1"]);
  });

  test("a ping over the relay is answered over the relay, with the pseudo address of the region", () => {
    const { manager, nodeKey, ping, sent } = lone();
    expect(manager.handleRelayed(1, nodeKey, ping(3), 5)).toBe(true);
    expect(sent()).toEqual([
      { to: 1, message: { type: "pong", txid: new Uint8Array(12).fill(3), source: "127.3.3.40:1" } },
    ]);
  });

  test("unknown senders, stale boxes and relayed disco of a stranger are dropped in silence", () => {
    const { manager, random, nodeKey, ping, seal, sent } = lone();
    manager.handleDatagram("192.0.2.50:1", seal(encodePing({ txid: random(12), padding: 0 }), random(32)), 5);
    const broken = ping(1);
    broken[broken.length - 1]! ^= 1;
    manager.handleDatagram("192.0.2.50:1", broken, 5);
    expect(manager.handleRelayed(1, random(32), ping(1), 5)).toBe(true);
    manager.updatePeer({ nodeKey, discoKey: x25519Public(random(32)), endpoints: [], homeDerp: 1 }, 5);
    manager.handleDatagram("192.0.2.50:1", ping(1), 6);
    expect(sent()).toEqual([]);
  });

  test("CallMeMaybe counts only when the relay brought it", () => {
    const { manager, nodeKey, seal, targets } = lone();
    const call = seal(encodeCallMeMaybe(["192.0.2.77:7"]));
    manager.handleDatagram("192.0.2.50:1", call, 5);
    expect(targets()).toEqual([]);
    manager.handleRelayed(1, nodeKey, call, 6);
    expect(targets()).toEqual([`${B}:41641`, "192.0.2.77:7"]);
  });

  test("a pong that came by relay does not confirm a UDP path", () => {
    const { manager, nodeKey, seal, sent } = lone();
    manager.noteSend(nodeKey, 10);
    const [ping] = sent();
    expect(ping?.message.type).toBe("ping");
    const txid = ping?.message.type === "ping" ? ping.message.txid : new Uint8Array(12);
    const pong = seal(encodePong({ txid, source: `${A}:41641` }));
    manager.handleRelayed(1, nodeKey, pong, 20);
    expect(manager.peerStatus(nodeKey, 20)?.address).toBeNull();
    manager.handleDatagram(`${B}:41641`, pong, 30);
    expect(manager.peerStatus(nodeKey, 30)).toMatchObject({ address: `${B}:41641`, latency: 20, active: true });
    // The same pong again is nobody's.
    manager.networkChanged(40);
    manager.handleDatagram(`${B}:41641`, pong, 50);
    expect(manager.peerStatus(nodeKey, 50)?.address).toBeNull();
  });

  test("two nodes with one disco key: the address becomes a candidate of both, one pong goes out", () => {
    const { manager, peer, random, ping, sent, targets } = lone();
    const twin = { ...peer, nodeKey: random(32), endpoints: [] };
    manager.updatePeer(twin, 1);
    manager.handleDatagram("192.0.2.50:1", ping(1), 5);
    expect(targets()).toEqual(["192.0.2.50:1"]);
    manager.noteSend(twin.nodeKey, 6);
    expect(targets()).toContain("192.0.2.50:1");
    // Whether a ping is a copy is the business of the node that it names: here the first, the newcomer has seen none.
    manager.updatePeer({ ...twin, nodeKey: random(32) }, 7);
    manager.handleDatagram("192.0.2.50:1", ping(1), 8);
    expect(sent().filter(({ message }) => message.type === "pong")).toEqual([]);
  });

  test("what the relay brings counts only with the disco key of the node that sent it", () => {
    const { manager, peer, random, nodeKey, seal, targets } = lone();
    const other = { ...peer, nodeKey: random(32), discoKey: x25519Public(random(32)), endpoints: ["192.0.2.66:6"] };
    manager.updatePeer(other, 1);
    manager.handleRelayed(1, other.nodeKey, seal(encodeCallMeMaybe(["192.0.2.77:7"])), 6);
    expect(manager.drain().filter((action) => action.type === "udp")).toEqual([]);
    manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(["192.0.2.77:7"])), 6);
    expect(targets()).toEqual([`${B}:41641`, "192.0.2.77:7"]);
  });

  test("packets that are not disco are the datapath's", () => {
    const { manager, nodeKey } = lone();
    expect(manager.handleRelayed(1, nodeKey, Uint8Array.of(4, 0, 0, 0, 1), 5)).toBe(false);
  });
});

describe("5.3: candidates", () => {
  test("a: an address of a CallMeMaybe lives until the next one lacks it", () => {
    const { manager, nodeKey, seal, targets } = lone();
    manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(["192.0.2.77:7", "192.0.2.78:7"])), 5);
    targets();
    manager.noteSend(nodeKey, 100_000);
    expect(targets().sort()).toEqual(["192.0.2.77:7", "192.0.2.78:7", `${B}:41641`].sort());
    manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(["192.0.2.78:7"])), 100_001);
    expect(targets().sort()).toEqual(["192.0.2.78:7", `${B}:41641`].sort());
  });

  test("b: an address of the netmap alone goes when the netmap drops it", () => {
    const { manager, peer, nodeKey, targets } = lone();
    manager.updatePeer({ ...peer, endpoints: ["192.0.2.60:1"] }, 5);
    manager.noteSend(nodeKey, 6);
    expect(targets()).toEqual(["192.0.2.60:1"]);
  });

  test("c: an address that a ping came from goes 45 s after the last ping", () => {
    const { manager, nodeKey, ping, targets } = lone();
    manager.handleDatagram("192.0.2.50:1", ping(1), 1000);
    targets();
    manager.noteSend(nodeKey, 45_000);
    expect(targets()).toContain("192.0.2.50:1");
    manager.noteSend(nodeKey, 51_000);
    expect(targets()).not.toContain("192.0.2.50:1");
  });

  test("c: an address that pongs confirm stays although no ping comes from it any more", () => {
    const { manager, peer, nodeKey, ping, seal, sent } = lone();
    manager.updatePeer({ ...peer, endpoints: [] }, 5);
    manager.handleDatagram("192.0.2.50:1", ping(1), 1000);
    for (let now = 1000; now < 150_000; now += 1000) {
      manager.noteSend(nodeKey, now);
      for (let due = manager.nextTimeout(); due && due.at <= now; due = manager.nextTimeout())
        manager.handleTimeout(now);
      for (const { to, message } of sent()) {
        if (message.type !== "ping") continue;
        expect(to).toBe("192.0.2.50:1");
        manager.handleDatagram(
          "192.0.2.50:1",
          seal(encodePong({ txid: message.txid, source: `${A}:41641` })),
          now + 20,
        );
      }
      expect(manager.peerStatus(nodeKey, now + 20)?.address).toBe("192.0.2.50:1");
    }
  });

  test("deleting the best address deletes the path", () => {
    const { manager, peer, nodeKey, seal, sent } = lone();
    manager.noteSend(nodeKey, 10);
    const [ping] = sent();
    if (ping?.message.type !== "ping") throw new Error("no ping went out");
    manager.handleDatagram(`${B}:41641`, seal(encodePong({ txid: ping.message.txid, source: `${A}:41641` })), 20);
    const paths = () => manager.drain().flatMap((action) => (action.type === "path" ? [action.path] : []));
    expect(paths()).toEqual([{ udp: `${B}:41641` }]);
    manager.updatePeer({ ...peer, endpoints: ["192.0.2.60:1"] }, 30);
    expect(paths()).toEqual([{ relay: true, region: 1 }]);
  });

  test("another disco key: what the old self called for or pinged from is forgotten, the netmap's addresses stay", () => {
    const { manager, peer, random, nodeKey, ping, seal } = lone();
    manager.handleDatagram("192.0.2.50:1", ping(1), 5);
    manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(["192.0.2.77:7"])), 6);
    manager.updatePeer({ ...peer, discoKey: x25519Public(random(32)) }, 7);
    manager.drain();
    manager.noteSend(nodeKey, 8);
    expect(manager.drain().flatMap((action) => (action.type === "udp" ? [action.to] : []))).toEqual([`${B}:41641`]);
  });

  test("invalid, link-local and tailnet addresses are never candidates", () => {
    const { manager, peer, nodeKey, seal, targets } = lone();
    const bad = [
      "nonsense",
      "192.0.2.1:0",
      "0.0.0.0:1",
      "224.0.0.1:5",
      "100.64.0.9:41641",
      "[fe80::1]:1",
      "[ff02::1]:1",
    ];
    manager.updatePeer({ ...peer, endpoints: bad }, 5);
    manager.noteSend(nodeKey, 6);
    manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(bad.slice(1))), 7);
    expect(targets()).toEqual([]);
  });

  test("a peer that pings from ten thousand ports is answered each time, and memory stays bounded", () => {
    const { manager, nodeKey, ping, sent, targets } = lone();
    for (let i = 0; i < 10_000; i++)
      manager.handleDatagram(`192.0.${i >> 8}.${i & 255}:9`, ping(i & 255), 10 + i / 1000);
    expect(sent().filter(({ message }) => message.type === "pong").length).toBe(10_000);
    manager.noteSend(nodeKey, 30);
    expect(targets().length).toBe(100);
  });

  test("a peer that calls for pings without end gets a bounded number", () => {
    const { manager, nodeKey, seal, targets } = lone();
    const addresses = Array.from({ length: 100 }, (_, i) => `192.0.2.${i + 1}:1`);
    for (let i = 0; i < 100; i++) manager.handleRelayed(1, nodeKey, seal(encodeCallMeMaybe(addresses)), 10 + i);
    expect(targets().length).toBeLessThanOrEqual(256);
  });
});

describe("5.9: CLI ping", () => {
  test("an idle peer: the relay and the direct address are tried, the first answer counts, and a path comes of it", () => {
    const { sim, a, b } = pair();
    a.manager.ping(b.nodeKey, 7, sim.now);
    a.pump();
    sim.run(1000);
    expect(a.pongs).toEqual([
      { type: "pong", id: 7, peer: b.nodeKey, ok: true, latency: 20, via: { udp: `${B}:41641` } },
    ] as never);
    expect(a.isDirect(b)).toBe(true);
  });

  test("UDP blocked: it comes back by relay", () => {
    const { sim, a, b } = pair();
    b.udpBlocked = true;
    a.manager.ping(b.nodeKey, 8, sim.now);
    a.pump();
    sim.run(6000);
    expect(a.pongs).toEqual([
      { type: "pong", id: 8, peer: b.nodeKey, ok: true, latency: 40, via: { region: 1 } },
    ] as never);
  });

  test("a trusted direct path: the relay is left alone", () => {
    const { sim, region, a, b } = pair();
    talk(sim, a, b, 2000);
    sim.run(3000);
    const before = region.packets;
    a.manager.ping(b.nodeKey, 9, sim.now);
    a.pump();
    sim.run(1000);
    expect(a.pongs.at(-1)).toMatchObject({ id: 9, ok: true, via: { udp: `${B}:41641` } });
    expect(region.packets).toBe(before);
  });

  test("too many at a time: refused, and possible again when they are over", () => {
    const { manager, nodeKey } = lone();
    const failures = () => manager.drain().flatMap((action) => (action.type === "pong" ? [action.id] : []));
    for (let id = 0; id < 66; id++) manager.ping(nodeKey, id, 10);
    expect(failures()).toEqual([64, 65]);
    manager.handleTimeout(5010);
    expect(failures().length).toBe(64);
    manager.ping(nodeKey, 99, 5011);
    expect(failures()).toEqual([]);
  });

  test("nobody answers: one failure after 5 s; no such peer, no way: at once", () => {
    const { sim, a, b } = pair();
    b.manager.setPeers([], sim.now);
    a.manager.ping(b.nodeKey, 1, sim.now);
    a.manager.ping(new Uint8Array(32), 2, sim.now);
    a.manager.updatePeer({ ...b.info(), endpoints: [], homeDerp: 0 }, sim.now);
    a.manager.ping(b.nodeKey, 3, sim.now);
    a.pump();
    expect(a.pongs.map((pong) => [pong.id, pong.ok])).toEqual([
      [2, false],
      [3, false],
    ]);
    sim.run(5100);
    expect(a.pongs.at(-1)).toMatchObject({ id: 1, ok: false, error: "no answer within 5 seconds" });
    expect(a.pongs.length).toBe(3);
  });
});

describe("relays", () => {
  /** Region 1 is near a, region 2 near b. */
  function twoRegions() {
    const sim = new Sim(6);
    const near = sim.addRegion(1, ["203.0.113.1"]);
    const far = sim.addRegion(2, ["203.0.113.2"]);
    sim.delay = (from, to) => {
      const pairOf = `${from} ${to}`;
      if (pairOf.includes("203.0.113.1:") && pairOf.includes(A)) return 5;
      if (pairOf.includes("203.0.113.2:") && pairOf.includes(B)) return 5;
      return 40;
    };
    const a = sim.addHost("a", { ips: [A] });
    const b = sim.addHost("b", { ips: [B] });
    sim.run(5000);
    sim.meet(a, b);
    sim.run(1000);
    return { sim, near, far, a, b };
  }

  test("each node's home is the region near it, and the peer is reached over its own", () => {
    const { a, b } = twoRegions();
    expect([a.home, b.home]).toEqual([1, 2]);
    expect(a.pathTo(b)).toEqual({ relay: true, region: 2 });
    expect(b.pathTo(a)).toEqual({ relay: true, region: 1 });
  });

  test("a peer's region is connected when there is data, the answers come back over it, and it is closed after a minute", () => {
    const { sim, a, b } = twoRegions();
    a.udpBlocked = true;
    a.stream(b, 100, 5000);
    expect(ofType(a, "connect").map((action) => action.region)).toEqual([1]);
    sim.run(3000);
    expect(ofType(a, "connect").map((action) => action.region)).toEqual([1, 2]);
    expect(b.arrivals.length).toBeGreaterThan(20);
    // b has no connection to region 1: it answers where it heard a.
    expect(b.pathTo(a)).toEqual({ relay: true, region: 2 });
    b.send(a);
    sim.run(1000);
    expect(a.arrivals.length).toBe(1);
    expect(ofType(b, "connect").map((action) => action.region)).toEqual([2]);
    sim.run(120_000);
    expect(ofType(a, "disconnect").map((action) => action.region)).toEqual([2]);
  });

  test("the relay says that the peer is gone: the way back is forgotten, its home remains", () => {
    const { sim, a, b } = twoRegions();
    a.udpBlocked = true;
    a.send(b);
    sim.run(2000);
    expect(b.pathTo(a).region).toBe(2);
    b.manager.peerGone(2, a.nodeKey, sim.now);
    b.pump();
    expect(b.pathTo(a)).toEqual({ relay: true, region: 1 });
  });

  test("5.4.5: a peer without a known home is reached over the region where it was heard", () => {
    const { manager, nodeKey, peer } = lone();
    manager.updatePeer({ ...peer, homeDerp: 0 }, 1);
    manager.drain();
    manager.handleRelayed(1, nodeKey, Uint8Array.of(4, 0, 0, 0), 2);
    expect(manager.drain().filter((action) => action.type === "path")).toEqual([
      { type: "path", peer: nodeKey, path: { relay: true, region: 1 } },
    ]);
  });

  /** Our home is region 1; the peer's is 2, and we hear it over 1. */
  function heard() {
    const all = lone();
    const node = (id: number) => ({
      Name: `${id}a`,
      RegionID: id,
      HostName: "d.test",
      IPv4: `203.0.113.${id}`,
      IPv6: "none",
    });
    const map: DERPMap = {
      Regions: { ...all.map.Regions, "2": { RegionID: 2, Nodes: [node(2)] } },
    };
    all.manager.setDerpMap(map, 1);
    all.manager.updatePeer({ ...all.peer, homeDerp: 2 }, 2);
    all.manager.drain();
    const region = () => all.manager.peerStatus(all.nodeKey, 50)?.region;
    expect(region()).toBe(2);
    all.manager.handleRelayed(1, all.nodeKey, Uint8Array.of(4, 0, 0, 0), 3);
    expect(region()).toBe(1);
    return { ...all, map, region };
  }

  test("as soon as the peer's home is connected it is used, not the way back", () => {
    const { manager, nodeKey, region } = heard();
    manager.noteRelaySend(2, 4);
    expect(manager.drain()).toContainEqual({ type: "connect", region: 2 });
    expect(region()).toBe(1);
    manager.relayState(2, true, 5);
    expect(region()).toBe(2);
    expect(manager.drain().filter((action) => action.type === "path")).toEqual([
      { type: "path", peer: nodeKey, path: { relay: true, region: 2 } },
    ]);
  });

  test("a way back ends with its connection, also when that is made anew", () => {
    const broken = heard();
    broken.manager.relayState(1, false, 5);
    broken.manager.relayState(1, true, 6);
    expect(broken.region()).toBe(2);
    const changed = heard();
    const one = { ...changed.map.Regions!["1"]!, RegionName: "renamed" };
    changed.manager.setDerpMap({ Regions: { ...changed.map.Regions, "1": one } }, 5);
    changed.manager.relayState(1, true, 6);
    expect(changed.region()).toBe(2);
  });

  test("data for a peer connects its region before there is a message to carry", () => {
    const { manager, nodeKey, peer, map } = heard();
    manager.peerGone(1, nodeKey, 4);
    manager.updatePeer({ ...peer, endpoints: [], homeDerp: 2 }, 5);
    manager.setDerpMap(map, 6);
    manager.drain();
    manager.noteSend(nodeKey, 7);
    expect(manager.drain()).toContainEqual({ type: "connect", region: 2 });
  });

  test("one region only: it is the home at once, before anything is measured", () => {
    const random = seededRandom(5);
    const manager = new PathManager({ random });
    manager.setKeys({ nodeKey: random(32), discoPrivate: random(32) }, 0);
    manager.setDerpMap(lone().map, 0);
    const actions = manager.drain();
    expect(actions).toContainEqual({ type: "home", region: 1 });
    expect(actions).toContainEqual({ type: "connect", region: 1 });
    expect(actions.find((action) => action.type === "netinfo")).toMatchObject({ netInfo: { PreferredDERP: 1 } });
  });

  test("UDP blocked from the start, three regions: a home within 1.5 s; then the nearest by HTTPS", () => {
    const sim = new Sim(9);
    for (const [id, delay] of [
      [1, 50],
      [2, 8],
      [3, 90],
    ] as const) {
      sim.addRegion(id, [`203.0.113.${id}`]).delay = delay;
    }
    const a = sim.addHost("a", { ips: [A] });
    a.udpBlocked = true;
    expect(sim.until(() => a.home !== 0 && a.endpoints.length > 0, 1500)).toBeLessThanOrEqual(1500);
    sim.run(4000);
    expect(a.home).toBe(2);
    expect(ofType(a, "netinfo").at(-1)!.netInfo).toMatchObject({ WorkingUDP: false, PreferredDERP: 2 });
  });

  test("nothing answers at all: the same region for the life of the process, and another try every 20 to 26 s", () => {
    const sim = new Sim(10);
    const regions = [1, 2, 3, 4].map((id) => sim.addRegion(id, [`203.0.113.${id}`]));
    for (const region of regions) region.up = false;
    const a = sim.addHost("a", { ips: [A] });
    sim.run(1500);
    const { home } = a;
    expect(home).toBeGreaterThan(0);
    sim.run(60_000);
    expect(a.home).toBe(home);
    for (const region of regions) setRegionUp(sim, region, true);
    sim.run(32_000);
    expect(a.manager.report?.udp).toBe(true);
  });

  test("the home moves when another region is clearly nearer, and stays when control is away", () => {
    const { sim, a, b } = twoRegions();
    a.stream(b, 500, 400_000);
    const far = sim.delay;
    sim.delay = (from, to) => (`${from} ${to}`.includes("203.0.113.1:") ? 100 : far(from, to) === 5 ? 5 : 10);
    a.manager.setControlAlive(false);
    sim.run(330_000);
    expect(a.home).toBe(1);
    a.manager.setControlAlive(true);
    sim.run(30_000);
    expect(a.home).toBe(2);
    expect(ofType(a, "netinfo").at(-1)!.netInfo.PreferredDERP).toBe(2);
  });

  test("a changed region is connected anew and stays the home; a removed one is left", () => {
    const { sim, a } = twoRegions();
    const before = a.actions.length;
    const map = sim.derpMap();
    map.Regions!["1"] = { ...map.Regions!["1"]!, RegionName: "renamed" };
    a.manager.setDerpMap(map, sim.now);
    a.pump();
    const types = a.actions.slice(before).filter((action) => action.type === "connect" || action.type === "disconnect");
    expect(types).toEqual([
      { type: "disconnect", region: 1 },
      { type: "connect", region: 1 },
    ]);
    expect(a.home).toBe(1);
    delete map.Regions!["1"];
    a.manager.setDerpMap({ Regions: { "2": map.Regions!["2"]! } }, sim.now);
    a.pump();
    sim.run(1000);
    expect(a.home).toBe(2);
  });

  test("a map with holes: null regions, null and nameless nodes, no nodes at all", () => {
    const { manager, map } = lone();
    const broken = JSON.parse(
      '{"2":null,"3":{"RegionID":3},"4":{"RegionID":4,"Nodes":[null,{"Name":"4a","RegionID":4}]}}',
    );
    manager.setDerpMap({ Regions: { ...broken, "1": map.Regions!["1"]! } }, 5);
    expect(manager.home).toBe(1);
    manager.setDerpMap({ Regions: broken }, 6);
    for (let due = manager.nextTimeout(); due && due.at < 60_000; due = manager.nextTimeout())
      manager.handleTimeout(due.at);
    expect(manager.home).toBe(0);
    expect(manager.drain().filter((action) => action.type === "log" && action.level === "warn").length).toBe(1);
  });

  test("new HomeParams alone leave the regions as they are", () => {
    const { sim, a } = twoRegions();
    const before = a.actions.length;
    a.manager.setDerpMap({ HomeParams: { RegionScore: { "1": 100 } } }, sim.now);
    a.pump();
    expect(a.actions.slice(before).filter((action) => action.type === "disconnect")).toEqual([]);
    sim.run(2000);
    expect(a.home).toBe(2);
  });

  test("a relay named by a host name is looked up, again after a failure", () => {
    const sim = new Sim(12);
    const region = sim.addRegion(1, ["203.0.113.1"], { HostName: "derp.test", IPv4: "", IPv6: "none" });
    region.up = false;
    const a = sim.addHost("a", { ips: [A] });
    sim.run(6000);
    expect(ofType(a, "resolve").map((action) => action.host)).toEqual(["derp.test"]);
    expect(a.manager.report?.udp).toBe(false);
    sim.dns.set("derp.test", ["203.0.113.1"]);
    setRegionUp(sim, region, true);
    sim.run(30_000);
    expect(a.manager.report?.udp).toBe(true);
    expect(ofType(a, "resolve").length).toBe(2);
  });
});

describe("6.3 and 6.4: own endpoints and ReSTUN", () => {
  test("published once they are known, again only when the set changes", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 300_000);
    sim.run(300_000);
    expect(ofType(a, "endpoints").length).toBe(1);
    expect(ofType(a, "netinfo").length).toBe(2);
  });

  test("every 20 to 26 s while there is activity", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 600_000, 1000);
    sim.run(600_000);
    const stun = ofType(a, "udp").filter((action) => action.to.endsWith(":3478")).length;
    expect(stun).toBeGreaterThanOrEqual(600 / 27);
    expect(stun).toBeLessThanOrEqual(600 / 19 + 2);
  });

  test("a relay connection that breaks again and again does not make a storm of netchecks", () => {
    const { sim, a } = pair();
    const before = ofType(a, "udp").length;
    for (let i = 0; i < 1000; i++) {
      a.manager.relayState(1, i % 2 === 1, sim.now);
      a.pump();
      sim.run(10);
    }
    expect(ofType(a, "udp").length - before).toBeLessThanOrEqual(6);
  });

  test("a changing network while a check runs starts a new one, and old answers do not count", () => {
    const sim = new Sim(13);
    sim.addRegion(1, ["203.0.113.1"]);
    const a = sim.addHost("a", { ips: [A] });
    sim.run(10);
    a.setAddresses(["198.51.100.99"]);
    sim.run(500);
    expect(a.endpoints).toEqual(["198.51.100.99:41641"]);
  });

  test("a netcheck on request", () => {
    const { sim, a } = pair();
    const before = a.manager.report;
    a.manager.startNetcheck(sim.now);
    expect(a.manager.netcheckRunning).toBe(true);
    a.pump();
    sim.run(1000);
    expect(a.manager.netcheckRunning).toBe(false);
    expect(a.manager.report).not.toBe(before);
  });
});

describe("peers come and go", () => {
  test("a removed peer is silent, its timers are gone, and its packets are dropped", () => {
    const { sim, a, b } = pair();
    talk(sim, a, b, 5000);
    connect(sim, a, b);
    sim.run(3000);
    a.manager.removePeer(b.nodeKey);
    a.pump();
    const before = ofType(a, "udp").filter((action) => action.to.startsWith(B)).length;
    sim.run(30_000);
    expect(ofType(a, "udp").filter((action) => action.to.startsWith(B)).length).toBe(before);
    expect(a.manager.peerStatus(b.nodeKey, sim.now)).toBeNull();
  });

  test("a peer without a disco key is reached by relay alone", () => {
    const { manager, nodeKey, peer, targets } = lone();
    manager.updatePeer({ ...peer, discoKey: null }, 1);
    manager.noteSend(nodeKey, 2);
    expect(targets()).toEqual([]);
    expect(manager.peerStatus(nodeKey, 2)).toEqual({ address: null, latency: null, region: 1, active: true });
    manager.updatePeer({ ...peer, discoKey: new Uint8Array(32) }, 3);
    manager.noteSend(nodeKey, 4);
    expect(targets()).toEqual([]);
  });

  test("five thousand idle peers: no timer, no packet", () => {
    const { manager, random, peer } = lone();
    const peers = Array.from({ length: 5000 }, () => ({ ...peer, nodeKey: random(32), discoKey: random(32) }));
    manager.setPeers(peers, 5);
    const actions = manager.drain();
    expect(actions.filter((action) => action.type === "path").length).toBe(5000);
    expect(actions.some((action) => action.type === "udp" || action.type === "relay")).toBe(false);
    manager.setPeers(peers, 6);
    expect(manager.drain()).toEqual([]);
    // What is left is the netcheck that nobody answers here.
    for (let now = 0; manager.netcheckRunning; now = manager.nextTimeout()!.at) manager.handleTimeout(now);
    manager.handleTimeout(20_000);
    expect(manager.nextTimeout()?.reason).toBe("ReSTUN: periodic");
  });
});
