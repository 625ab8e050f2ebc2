// Every combination of offloads, at both ends and at one: what goes in comes out, over TCP by hash, over UDP all of it and in
// order; MTU 1280 to 9000, IPv4 and IPv6 inside and outside, one Worker and two.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { transferHash, udpFlow } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { cannotUseNamespaces, skip } from "./lib/mesh.ts";
import { WgEnd } from "./lib/wg.ts";

const OFFLOADS = ["--no-tun-tso", "--no-tun-uso", "--no-udp-gso", "--no-udp-gro"];
const COMBINATIONS = Array.from({ length: 1 << OFFLOADS.length }, (_, set) =>
  OFFLOADS.filter((_, i) => set & (1 << i)),
);
const MTUS = [1280, 1420, 9000];
/** The outer packet's headers: IPv6 40, UDP 8, WireGuard 32. */
const OVERHEAD = 80;
/** Over TCP, for each combination, all MTUs together. */
const BYTES = 200 << 20;
/** Fewer than the queue of a TUN device holds, whoever is held up: then all of them come. */
const DATAGRAMS = 400;

const noWg = Bun.which("wg") === null ? "wg is missing: apt-get install wireguard-tools" : null;

describe.skipIf(skip(cannotUseNamespaces ?? noWg))("offloads", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`of${process.pid}`);
    const mtu = Math.max(...MTUS) + OVERHEAD;
    h1 = await lab.host("one", { mtu });
    h2 = await lab.host("two", { mtu });
  });
  afterAll(() => lab?.close());

  const workers = (n: number) => ["--workers", `${n}`];

  async function meet(a: WgEnd, b: WgEnd, outer: "outer4" | "outer6"): Promise<void> {
    await Promise.all([a.knows(b, { endpoint: b[outer] }), b.knows(a, { endpoint: a[outer] })]);
  }

  /** `bytes` over TCP at all MTUs together. Directions and families change places from one MTU to the next. */
  async function traffic(
    [a, b]: [WgEnd, WgEnd],
    mtus: number[],
    bytes: number,
    merges: [boolean, boolean],
  ): Promise<void> {
    for (const [i, mtu] of mtus.entries()) {
      for (const end of [a, b]) end.host.netlink.setLink(end.device, { mtu });
      const [from, to, merged] = i % 2 ? [b, a, merges[0]] : [a, b, merges[1]];
      const [address, back] = i % 2 ? [to.ip6, from.ip4] : [to.ip4, from.ip6];
      const share = Math.ceil(bytes / mtus.length);
      expect(await transferHash(from.host, to.host, share, { address })).toMatchObject({ ok: true, bytes: share });
      // Superpackets of a program that has segmentation offload one way, single datagrams the other.
      const flow = { mbps: 100, amount: { packets: DATAGRAMS } };
      const both = () =>
        Promise.all([
          udpFlow(from.host, to.host, { ...flow, address, size: mtu - 48, segments: 16 }),
          udpFlow(to.host, from.host, { ...flow, address: back, size: 500 }),
        ]);
      let flows = await both();
      // A busy machine may lose a datagram now and then; what an offload loses, it loses each time.
      for (let again = 0; again < 2 && flows.some(({ got }) => got.received < DATAGRAMS); again++) {
        for (const { got } of flows) expect({ mtu, got }).toMatchObject({ mtu, got: { late: 0, wrong: 0 } });
        flows = await both();
      }
      const all = { sent: DATAGRAMS, got: { received: DATAGRAMS, late: 0, wrong: 0 } };
      expect({ mtu, flows }).toMatchObject({ mtu, flows: [all, all] });
      expect({ mtu, merged: flows[0].got.merged > 0 }).toEqual({ mtu, merged });
    }
  }

  for (const [i, off] of COMBINATIONS.entries()) {
    test(`off: ${off.map((flag) => flag.slice(5)).join(", ") || "none"}`, async () => {
      const [one, two] = i % 2 ? [1, 2] : [2, 1];
      const outer = i % 2 ? "outer6" : "outer4";
      const merges = !off.includes("--no-tun-uso");
      await using a = await WgEnd.start(h1, 1, "weft", [...off, ...workers(one)]);
      {
        await using b = await WgEnd.start(h2, 2, "weft", [...off, ...workers(two)]);
        await meet(a, b, outer);
        await traffic([a, b], MTUS, BYTES, [merges, merges]);
      }
      // The other end has all of them.
      await using b = await WgEnd.start(h2, 2, "weft", workers(one));
      await meet(a, b, outer);
      for (const ends of [
        [a, b],
        [b, a],
      ] as [WgEnd, WgEnd][])
        await traffic(ends, [MTUS[i % MTUS.length]!], BYTES / 20, ends[1] === b ? [merges, true] : [true, merges]);
    }, 300_000);
  }
});
