import { expect, test } from "bun:test";
import { Sim, type SimHost, SimNat, setRegionUp } from "./sim.ts";

test("a hundred nodes, a third of them behind NATs, ten virtual minutes with failures: data flows, paths are direct", () => {
  const sim = new Sim(42);
  const region = sim.addRegion(1, ["203.0.113.1"]);
  sim.delay = () => 3;
  sim.loss = 0.01;
  const hosts: SimHost[] = [];
  for (let i = 0; i < 100; i++) {
    const nat = i % 3 === 0 ? new SimNat(`192.0.2.${i + 1}`) : undefined;
    const ips = nat ? ["192.168.1.2"] : [`198.51.100.${i + 1}`];
    const host = sim.addHost(`h${i}`, { ips, ...(nat ? { nat, lan: `lan${i}` } : {}) });
    host.keepActions = false;
    hosts.push(host);
  }
  sim.run(2000);
  sim.meet(...hosts);
  const idle = sim.udpPackets;
  sim.run(20_000);
  // 9900 pairs know each other, and nobody says a word.
  expect(sim.udpPackets).toBe(idle);

  const partners = (minute: number) =>
    hosts.slice(0, 50).map((host, i) => [host, hosts[(i + 1 + minute * 7) % 100]!] as const);
  const sent: { from: SimHost; to: SimHost; number: number }[] = [];
  const say = (from: SimHost, to: SimHost) => sent.push({ from, to, number: from.send(to) });
  for (let minute = 0; minute < 10; minute++) {
    for (const [a, b] of partners(minute)) {
      for (let t = 0; t < 50_000; t += 5000) {
        sim.at(t, () => say(a, b));
        sim.at(t + 10, () => say(b, a));
      }
    }
    if (minute === 3) for (const host of hosts.slice(0, 20)) host.udpBlocked = true;
    if (minute === 5) for (const host of hosts.slice(0, 20)) host.udpBlocked = false;
    if (minute === 6) setRegionUp(sim, region, false);
    if (minute === 6) sim.at(5000, () => setRegionUp(sim, region, true));
    if (minute === 7) for (const host of hosts.slice(45, 60)) host.start();
    sim.run(60_000);
    if (minute === 4 || minute === 9) {
      const wanted = partners(minute).filter(([a, b]) => !a.udpBlocked && !b.udpBlocked);
      // The last word was 10 s ago, its trust goes on while the heartbeat does.
      const direct = wanted.filter(([a, b]) => a.pathTo(b).udp && b.pathTo(a).udp);
      expect(direct.length).toBe(wanted.length);
    }
  }
  const lost = sent.filter(({ from, to, number }) => !to.seen.has(`${from.name}|${number}`));
  // One datagram in a hundred is lost on the links; the failures add little, for most of the time there are two ways.
  expect(sent.length).toBe(10_000);
  expect(lost.length).toBeLessThan(sent.length * 0.015);
}, 120_000);
