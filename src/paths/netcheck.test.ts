import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { parseAddrPort } from "../wire/ip.ts";
import { parseStunRequest, type StunResponse } from "../wire/stun.ts";
import type { DERPMap, DERPRegion } from "../wire/tailcfg.ts";
import {
  chooseHome,
  measurableRegions,
  Netcheck,
  type NetcheckAction,
  NetcheckHistory,
  type NetcheckReport,
  type PlanInput,
  planProbes,
  probeTarget,
} from "./netcheck.ts";
import { seededRandom } from "./sim.ts";

const region = (id: number, nodes = 1, more: Partial<DERPRegion> = {}): DERPRegion => ({
  RegionID: id,
  Nodes: Array.from({ length: nodes }, (_, i) => ({
    Name: `${id}${"abcdef"[i]}`,
    RegionID: id,
    HostName: `derp${id}.test`,
    IPv4: `203.0.113.${id * 10 + i}`,
    IPv6: `2001:db8::${id}:${i}`,
  })),
  ...more,
});

const mapOf = (...regions: DERPRegion[]): DERPMap => ({
  Regions: Object.fromEntries(regions.map((r) => [String(r.RegionID), r])),
});

const reported = (latency: Record<number, number>, more: Partial<NetcheckReport> = {}): NetcheckReport => ({
  at: 0,
  udp: true,
  ipv4: true,
  ipv6: false,
  ipv4CanSend: true,
  ipv6CanSend: false,
  osHasIPv6: false,
  mappingVaries: null,
  globalV4: null,
  globalV6: null,
  globals: new Map(),
  latency: new Map(Object.entries(latency).map(([id, ms]) => [Number(id), ms])),
  latency4: new Map(),
  latency6: new Map(),
  ...more,
});

const summary = (input: PlanInput) =>
  planProbes(input).map((p) => `${p.region}/${p.node.Name}/v${p.family}@${Math.round(p.delay)}`);

describe("7.2: the probe plan", () => {
  test("full: three probes of each region and family, 100 ms apart, round the region's nodes", () => {
    expect(summary({ regions: [region(1, 2)], has4: true, has6: true, home: 0, last: null })).toEqual([
      "1/1a/v4@0",
      "1/1a/v6@0",
      "1/1b/v4@100",
      "1/1b/v6@100",
      "1/1a/v4@200",
      "1/1a/v6@200",
    ]);
  });

  test("a machine without IPv6 plans none", () => {
    const plan = summary({ regions: [region(1), region(2)], has4: true, has6: false, home: 0, last: null });
    expect(plan.length).toBe(6);
    expect(plan.every((probe) => probe.includes("/v4@"))).toBe(true);
  });

  test("incremental: the nearest three and the home, with fewer tries the farther they are", () => {
    const last = reported({ 1: 50, 2: 10, 3: 30, 4: 20, 5: 100 });
    const regions = [1, 2, 3, 4, 5].map((id) => region(id));
    expect(summary({ regions, has4: true, has6: false, home: 5, last })).toEqual([
      "2/2a/v4@0",
      "2/2a/v4@12",
      "4/4a/v4@0",
      "4/4a/v4@24",
      "3/3a/v4@0",
      "5/5a/v4@0",
      "5/5a/v4@120",
      "5/5a/v4@340",
      "5/5a/v4@510",
    ]);
  });

  test("incremental on a dual-stack machine: both families for the home and the nearest two, then they take turns", () => {
    const regions = [1, 2, 3].map((id) => region(id));
    const last = reported({ 1: 10, 2: 20, 3: 30 }, { ipv6: true });
    const plan = summary({ regions, has4: true, has6: true, home: 1, last });
    expect(plan.filter((p) => p.startsWith("1/")).length).toBe(8);
    expect(plan.filter((p) => p.startsWith("2/")).length).toBe(4);
    expect(plan.filter((p) => p.startsWith("3/"))).toEqual(["3/3a/v4@0"]);
    // IPv6 that did not work last time gets one try only.
    const without6 = summary({ regions, has4: true, has6: true, home: 1, last: { ...last, ipv6: false } });
    expect(without6.filter((p) => p.startsWith("1/") && p.includes("/v6@"))).toEqual(["1/1a/v6@0"]);
  });

  test("which regions are measured at all", () => {
    const map = mapOf(region(1), region(2, 1, { NoMeasureNoHome: true }), region(3, 1, { Avoid: true }), region(4, 0));
    map.Regions!["9"] = null;
    expect(measurableRegions(map, 0).map((r) => r.RegionID)).toEqual([1]);
    expect(measurableRegions(map, 3).map((r) => r.RegionID)).toEqual([1, 3]);
  });

  test("where a probe goes: STUNTestIP, the literal, the name; a family can be switched off", () => {
    const node = { Name: "1a", RegionID: 1, HostName: "derp.test" };
    expect(probeTarget({ ...node, IPv4: "192.0.2.1" }, 4)).toEqual({ ip: "192.0.2.1" });
    expect(probeTarget({ ...node, IPv4: "none" }, 4)).toBeNull();
    expect(probeTarget(node, 4)).toEqual({ host: "derp.test" });
    expect(probeTarget({ ...node, HostName: "192.0.2.7" }, 4)).toEqual({ ip: "192.0.2.7" });
    expect(probeTarget({ ...node, HostName: "192.0.2.7" }, 6)).toBeNull();
    expect(probeTarget({ ...node, IPv4: "192.0.2.1", STUNTestIP: "127.0.0.1" }, 4)).toEqual({ ip: "127.0.0.1" });
    expect(probeTarget({ ...node, STUNTestIP: "127.0.0.1" }, 6)).toBeNull();
  });
});

/** Drives one check by hand; `answer` says how many ms a server takes and what address it names, or null for silence. */
function drive(
  options: Partial<PlanInput> & { resolve?: (host: string) => string[] | undefined },
  answer: (server: string) => { ms: number; as: string } | null,
  http: (region: number) => number | null | undefined = () => undefined,
) {
  let now = 1000;
  const sent: string[] = [];
  const probed: number[] = [];
  const arriving: { at: number; run: () => void }[] = [];
  const queue: NetcheckAction[] = [];
  const check = new Netcheck(
    {
      regions: [region(1)],
      has4: true,
      has6: false,
      home: 0,
      last: null,
      random: seededRandom(7),
      resolve: () => undefined,
      emit: (action) => queue.push(action),
      ...options,
    },
    now,
  );
  const flush = () => {
    for (const action of queue.splice(0)) {
      if (action.type === "httpProbe") {
        probed.push(action.region);
        const ms = http(action.region);
        if (ms === undefined) continue;
        arriving.push({ at: now + (ms ?? 100), run: () => check.httpProbeResult(action.region, ms, now) });
        continue;
      }
      sent.push(`${action.to}@${now - 1000}`);
      const txid = parseStunRequest(action.data)!;
      const reply = answer(action.to);
      if (!reply) continue;
      const { ip, port } = parseAddrPort(reply.as)!;
      const response: StunResponse = { txid, ip, port };
      arriving.push({ at: now + reply.ms, run: () => check.handleStun(response, now) });
    }
    arriving.sort((a, b) => a.at - b.at);
  };
  const step = (): boolean => {
    if (check.report()) return false;
    const at = Math.min(check.nextTimeout(), arriving[0]?.at ?? Number.POSITIVE_INFINITY);
    expect(at).toBeLessThan(Number.POSITIVE_INFINITY);
    now = Math.max(now, at);
    if (arriving[0] && arriving[0].at <= now) arriving.shift()!.run();
    else check.handleTimeout(now);
    flush();
    return true;
  };
  flush();
  return {
    check,
    sent,
    probed,
    arriving,
    step,
    now: () => now - 1000,
    finish() {
      for (let i = 0; step(); i++) if (i > 10_000) throw new Error("the check does not end");
      return { report: check.report()!, took: now - 1000 };
    },
  };
}

describe("7.3: running a check", () => {
  test("one region answers: done at once, with latency and public address", () => {
    const { finish, sent } = drive({}, () => ({ ms: 20, as: "198.51.100.1:5000" }));
    const { report, took } = finish();
    expect(took).toBe(20);
    expect(sent).toEqual(["203.0.113.10:3478@0"]);
    expect(report).toMatchObject({
      udp: true,
      ipv4: true,
      ipv6: false,
      globalV4: "198.51.100.1:5000",
      mappingVaries: null,
    });
    expect(report.latency.get(1)).toBe(20);
    expect(report.latency4.get(1)).toBe(20);
  });

  test("the first answers are lost: later probes of the same set find it", () => {
    let n = 0;
    const { finish, sent } = drive({}, () => (n++ < 2 ? null : { ms: 20, as: "198.51.100.1:5000" }));
    expect(finish().took).toBe(220);
    expect(sent.length).toBe(3);
  });

  test("two servers see two addresses: the mapping varies; the same address: it does not", () => {
    const regions = [region(1), region(2)];
    const varying = drive({ regions }, (to) => ({
      ms: 20,
      as: to.includes(".10:") ? "198.51.100.1:1" : "198.51.100.1:2",
    }));
    expect(varying.finish().report).toMatchObject({ mappingVaries: true, globalV4: "198.51.100.1:1" });
    const steady = drive({ regions }, () => ({ ms: 20, as: "198.51.100.1:1" }));
    const { report } = steady.finish();
    expect(report.mappingVaries).toBe(false);
    expect(report.globals.get("198.51.100.1:1")).toBe(2);
  });

  test("three regions answered: the others get as long again as the slowest took, not the whole window", () => {
    const regions = [1, 2, 3, 4, 5].map((id) => region(id));
    const ms: Record<string, number> = { "203.0.113.10:3478": 10, "203.0.113.20:3478": 30, "203.0.113.30:3478": 60 };
    const { finish } = drive({ regions }, (to) => (ms[to] ? { ms: ms[to], as: "198.51.100.1:1" } : null));
    const { report, took } = finish();
    expect(took).toBe(60 + 120);
    expect([...report.latency.keys()].sort()).toEqual([1, 2, 3]);
  });

  test("a latency is the least that a region showed; IPv4 and IPv6 apart", () => {
    const { finish } = drive({ has6: true }, (to) =>
      to.startsWith("[") ? { ms: 10, as: "[2001:db8::99]:7" } : { ms: 25, as: "198.51.100.1:1" },
    );
    const { report } = finish();
    expect(report).toMatchObject({ ipv4: true, ipv6: true, globalV6: "[2001:db8::99]:7" });
    expect([report.latency.get(1), report.latency4.get(1), report.latency6.get(1)]).toEqual([10, 25, 10]);
  });

  test("no IPv6 behind the address: the check does not wait for it", () => {
    const { finish } = drive({ has6: true }, (to) => (to.startsWith("[") ? null : { ms: 20, as: "198.51.100.1:1" }));
    const { report, took } = finish();
    expect(took).toBeLessThanOrEqual(70);
    expect(report.ipv6).toBe(false);
  });

  test("the kernel refuses IPv6: noted, and no more of it is sent", () => {
    const run = drive({ has6: true, regions: [region(1), region(2)] }, (to) =>
      to.startsWith("[") ? null : { ms: 500, as: "198.51.100.1:1" },
    );
    for (const server of ["[2001:db8::1:0]:3478", "[2001:db8::2:0]:3478"]) run.check.handleSendFailed(server, 1000);
    const { report } = run.finish();
    expect(report).toMatchObject({ ipv6CanSend: false, ipv4CanSend: true });
    expect(run.sent.filter((to) => to.startsWith("[") && !to.endsWith("@0"))).toEqual([]);
  });

  test("an answer of the other family, of a foreign transaction or with port 0 is of no use", () => {
    const run = drive(
      {},
      () => ({ ms: 20, as: "[2001:db8::99]:7" }),
      () => null,
    );
    expect(run.check.handleStun({ txid: new Uint8Array(12), ip: Uint8Array.of(1, 2, 3, 4), port: 5 }, 1001)).toBe(
      false,
    );
    expect(run.finish().report.udp).toBe(false);
  });

  test("a server that must be looked up is asked as soon as its name is resolved", () => {
    let ips: string[] | undefined;
    const named = region(1, 1, { Nodes: [{ Name: "1a", RegionID: 1, HostName: "derp.test", IPv6: "none" }] });
    const run = drive({ regions: [named], resolve: () => ips }, () => ({ ms: 20, as: "198.51.100.1:1" }));
    while (run.now() < 200) run.step();
    expect(run.sent).toEqual([]);
    ips = ["2001:db8::5", "192.0.2.55"];
    run.check.handleResolved(1250);
    run.check.handleTimeout(1250);
    const { report } = run.finish();
    expect(run.sent[0]).toStartWith("192.0.2.55:3478@");
    expect(report.udp).toBe(true);
  });
});

describe("7.4: without any STUN answer", () => {
  test("HTTPS probes after a second; their times count, once the window for STUN is over", () => {
    const run = drive(
      { regions: [region(1), region(2)] },
      () => null,
      (id) => (id === 1 ? 80 : null),
    );
    while (!run.check.silent) run.step();
    expect(run.now()).toBe(1000);
    const { report, took } = run.finish();
    expect(run.probed).toEqual([1, 2]);
    expect(took).toBe(3000);
    expect(report.udp).toBe(false);
    expect([...report.latency]).toEqual([[1, 80]]);
  });

  test("HTTPS does not answer either: the check ends after five seconds with nothing", () => {
    const { report, took } = drive({}, () => null).finish();
    expect(took).toBe(5000);
    expect(report.latency.size).toBe(0);
  });

  test("a STUN answer that comes late still makes UDP work", () => {
    const { finish } = drive(
      {},
      () => ({ ms: 1500, as: "198.51.100.1:1" }),
      () => 80,
    );
    const { report } = finish();
    expect(report.udp).toBe(true);
    expect([...report.latency]).toEqual([[1, 1500]]);
  });

  test("no region has STUN: straight to HTTPS", () => {
    const off = region(1, 1, { Nodes: [{ Name: "1a", RegionID: 1, HostName: "derp.test", STUNPort: -1 }] });
    const { report, took } = drive(
      { regions: [off] },
      () => null,
      () => 40,
    ).finish();
    expect(took).toBe(40);
    expect([...report.latency]).toEqual([[1, 40]]);
  });

  test("no region at all: an empty report at once", () => {
    expect(drive({ regions: [] }, () => null).finish().took).toBe(0);
  });
});

test("whatever servers answer and when, a check ends within five seconds and with sound numbers", () => {
  const delay = fc.oneof(fc.constant(null), fc.integer({ min: 0, max: 6000 }));
  fc.assert(
    fc.property(
      fc.array(delay, { minLength: 1, maxLength: 6 }),
      fc.array(delay, { minLength: 6, maxLength: 6 }),
      fc.boolean(),
      (stun, http, has6) => {
        const regions = stun.map((_, i) => region(i + 1));
        const { report, took } = drive(
          { regions, has6 },
          (to) => {
            const match = /^(?:203\.0\.113\.(\d+)\d|\[2001:db8::(\d+):)/.exec(to)!;
            const ms = stun[Number(match[1] ?? match[2]) - 1];
            return ms == null ? null : { ms, as: to.startsWith("[") ? "[2001:db8::9]:9" : "198.51.100.1:9" };
          },
          (id) => http[id - 1],
        ).finish();
        expect(took).toBeLessThanOrEqual(5000);
        for (const [id, ms] of report.latency)
          expect([ms >= 0, ms <= 6000, id >= 1, id <= stun.length]).toEqual([true, true, true, true]);
        if (stun.every((ms) => ms === null || ms > 5000)) expect(report.udp).toBe(false);
        if (stun.some((ms) => ms !== null && ms < 500)) expect(report.udp).toBe(true);
      },
    ),
    { numRuns: 100, seed: 20 },
  );
});

describe("7.5: the home", () => {
  const map = mapOf(region(1), region(2), region(3));
  const choose = (
    latency: Record<number, number>,
    home: number,
    more: { heardAt?: number; before?: Record<number, number>[]; map?: DERPMap; now?: number } = {},
  ) => {
    const now = more.now ?? 1_000_000;
    const history = new NetcheckHistory();
    for (const [i, old] of (more.before ?? []).entries()) history.add(reported(old, { at: now - 60_000 + i }), now);
    const report = reported(latency, { at: now - 100 });
    history.add(report, now);
    return chooseHome({
      history,
      report,
      map: more.map ?? map,
      home,
      homeHeardAt: more.heardAt ?? Number.NEGATIVE_INFINITY,
      now,
    });
  };

  test("at first the nearest", () => {
    expect(choose({ 1: 30, 2: 20, 3: 40 }, 0)).toBe(2);
  });

  test("a gain below 10 ms, or below a third, does not move it", () => {
    expect(choose({ 1: 30, 2: 21 }, 1)).toBe(1);
    expect(choose({ 1: 100, 2: 70 }, 1)).toBe(1);
    expect(choose({ 1: 100, 2: 60 }, 1)).toBe(2);
    expect(choose({ 1: 25, 2: 10 }, 1)).toBe(2);
  });

  test("one bad measurement of the nearest does not move it: the least of five minutes counts", () => {
    expect(choose({ 1: 300, 2: 60 }, 1, { before: [{ 1: 20, 2: 60 }] })).toBe(1);
    // But only for five minutes.
    expect(choose({ 1: 300, 2: 60 }, 1)).toBe(2);
  });

  test("the home is missing in the report: it stays while frames come from it", () => {
    expect(choose({ 2: 20 }, 1)).toBe(2);
    expect(choose({ 2: 20 }, 1, { heardAt: 1_000_000 - 7000 })).toBe(1);
    expect(choose({ 2: 20 }, 1, { heardAt: 1_000_000 - 9000 })).toBe(2);
  });

  test("nothing answered: it stays for two minutes after the last frame, then the caller decides", () => {
    expect(choose({}, 1, { heardAt: 1_000_000 - 119_000 })).toBe(1);
    expect(choose({}, 1, { heardAt: 1_000_000 - 121_000 })).toBe(0);
    expect(choose({}, 0)).toBe(0);
  });

  test("a score favours a region", () => {
    const scored = { ...map, HomeParams: { RegionScore: { "3": 0.5 } } };
    expect(choose({ 1: 30, 3: 40 }, 0, { map: scored })).toBe(3);
  });

  test("regions to avoid are never chosen, and a home that left the map is left", () => {
    const avoided = mapOf(region(1, 1, { Avoid: true }), region(2));
    expect(choose({ 1: 5, 2: 50 }, 0, { map: avoided })).toBe(2);
    expect(choose({ 2: 50 }, 9, { heardAt: 1_000_000 })).toBe(2);
  });
});
