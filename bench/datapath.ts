// `bun run bench datapath`: whole tunnels between two network namespaces of this machine, both ends and both ends of the load
// on its cores. The programs take turns: each round measures every program once, beginning with another one.
import { existsSync, realpathSync, rmSync } from "node:fs";
import { ping } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { type Implementation, WgEnd } from "../test/lib/wg.ts";
import { type LoadOptions, load } from "./lib/iperf.ts";
import { MESH_MTU, mesh } from "./lib/mesh.ts";
import type { BenchOptions, DatapathCase } from "./lib/options.ts";
import { quartiles, type Report } from "./lib/report.ts";
import { cannotTunnel, type Tunnel, talks, tunnel, wire, wireguards } from "./lib/tunnels.ts";
import { inTurns } from "./lib/turns.ts";
import { MOST_SEGMENTS, udpLoad } from "./lib/udp.ts";

const DEFAULT_MTU = 1420;
const ROUNDS = 5;
const MTUS = [1280, 1420, 4000, 9000];
const NO_USO: [Implementation, string[]] = ["weft", ["--no-tun-uso"]];
const OFFLOADS = ["--no-tun-tso", "--no-tun-uso", "--no-udp-gso", "--no-udp-gro"];

/** What does not decide a target to the last percent takes part in so many rounds only. */
const SIDE_ROUNDS = 3;

/** Seconds of each load. iperf3 takes whole ones. */
interface Durations {
  tcp: number;
  modest: number;
  small: number;
  pings: number;
}
const FULL: Durations = { tcp: 2, modest: 2, small: 1, pings: 500 };
const QUICK: Durations = { tcp: 1, modest: 1, small: 1, pings: 20 };

/** Something to send through: a tunnel of one program, or the bare wire. */
interface Subject {
  impl: string;
  from: Host;
  to: Host;
  address: string;
  /** The tunnel's processes. */
  pids: number[];
}

export async function run(options: BenchOptions, report: Report): Promise<void> {
  if (cannotTunnel) {
    report.note(`everything is left out: ${cannotTunnel}`);
    return;
  }
  await using lab = await Lab.create("bench");
  const programs = wireguards(options, report);
  const rounds = options.rounds ?? (options.quick ? 1 : ROUNDS);
  const wanted = (name: DatapathCase) => options.only?.includes(name) ?? true;
  if (wanted("wireguard")) await race(lab, programs, rounds, options, report);
  if (options.quick) report.note("--quick leaves the mesh (Weft nodes beside tailscaled) out");
  else if (wanted("mesh") && options.mtu === null) await raceMesh(lab, rounds, options, report);
  if (wanted("udp")) await raceUdp(lab, programs, rounds, options, report);
  if (wanted("mtu") && options.mtu === null) await raceMtus(lab, programs, rounds, options, report);
  if (wanted("variants")) await variants(lab, rounds, options, report);
  if (wanted("start")) await startUp(lab, programs, rounds, options, report);
  // Its hosts meet at a router, over veths as they come.
  if (wanted("fairness") && !options.segment) await fairness(lab, programs, rounds, options, report);
}

function label(what: string, { segment }: BenchOptions): string {
  return segment ? `${what}, single packets` : what;
}

async function race(
  lab: Lab,
  programs: Implementation[],
  rounds: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const mtu = options.mtu ?? DEFAULT_MTU;
  await using stack = new AsyncDisposableStack();
  const subjects: Subject[] = [];
  for (const program of programs) {
    const on = await wire(lab, program, options);
    if (subjects.length === 0) subjects.push({ impl: "raw veth", from: on.a, to: on.b, address: on.ipB, pids: [] });
    const { impl, a, b } = stack.use(await tunnel(on, program, { mtu }));
    await talks(a.host, b.ip4, impl);
    subjects.push({ impl, from: a.host, to: b.host, address: b.ip4, pids: [a.pid, b.pid] });
  }
  const name = label(`WireGuard, MTU ${mtu}`, options);
  await inTurns(subjects, rounds, name, report, (subject) => measure(subject, name, options, report));
}

async function raceMesh(lab: Lab, rounds: number, options: BenchOptions, report: Report): Promise<void> {
  await using daemons = await mesh(lab, options, report);
  const subjects = daemons.pairs.map(
    ({ impl, a, b }): Subject => ({
      impl,
      from: a.host,
      to: b.host,
      address: b.ip4,
      pids: [a.process.pid, b.process.pid],
    }),
  );
  const name = label(`mesh, MTU ${MESH_MTU}`, options);
  await inTurns(subjects, rounds, name, report, (subject) => measure(subject, name, options, report));
}

async function measure(subject: Subject, name: string, { quick }: BenchOptions, report: Report): Promise<void> {
  const { impl, from, to, address, pids } = subject;
  const time = quick ? QUICK : FULL;
  const add = (metric: string, unit: string, value: number) => report.add({ case: name, impl, metric, unit }, value);
  const through = (seconds: number, more: Partial<LoadOptions>) => load({ from, to, address, seconds, pids, ...more });
  const tunneled = pids.length > 0;

  const idle = await ping(from, address, { count: time.pings, intervalMs: 2 });
  add("ping p50, idle", "ms", idle.p50);
  add("ping p99, idle", "ms", idle.p99);

  const one = await through(time.tcp, {});
  if (tunneled) add("cores that others used, during TCP x1", "cores", one.others);
  add("TCP x1", "Mb/s", one.mbps);
  // That the others run at all is shown.
  if (quick && impl !== "weft") return;
  if (tunneled) {
    add("TCP x1 per CPU-second", "Mb", one.megabits / one.cpu);
    add("TCP x1 per CPU-second of the machine", "Mb", one.megabits / one.machine);
  }
  const beside = ping(from, address, { count: time.tcp * 40, intervalMs: 20, timeoutMs: 2000 });
  const four = await through(time.tcp, { streams: 4 });
  add("TCP x4", "Mb/s", four.mbps);
  add("ping p99, during TCP x4", "ms", (await beside).p99);
  if (!tunneled) return;
  add("TCP x4 per CPU-second", "Mb", four.megabits / four.cpu);

  const modest = await through(time.modest, { udp: { mbps: 200, bytes: 1200 } });
  add("200 Mb/s of 1200-byte UDP", "cores", modest.cpu / modest.seconds);
  add("200 Mb/s of 1200-byte UDP, lost", "%", lossOf(modest));
  for (const bytes of quick ? [64] : [64, 300]) {
    const small = await through(time.small, { udp: { mbps: 0, bytes } });
    add(`${bytes}-byte UDP`, "packets/s", small.packets / small.seconds);
    add(`${bytes}-byte UDP per CPU-second`, "packets", small.packets / small.cpu);
  }
}

function lossOf({ packets, lost }: { packets: number; lost: number }): number {
  return (100 * lost) / Math.max(1, packets + lost);
}

/** A tunnel of each program, and one of Weft without UDP superpackets on its TUN device. */
async function tunnels(
  lab: Lab,
  name: string,
  programs: Implementation[],
  mtu: number,
  options: BenchOptions,
  stack: AsyncDisposableStack,
): Promise<Tunnel[]> {
  const all: [Implementation, string[]][] = [...programs.map((impl): [Implementation, string[]] => [impl, []]), NO_USO];
  const out: Tunnel[] = [];
  for (const [i, [impl, flags]] of (options.quick ? all.slice(0, 1) : all).entries()) {
    const on = await wire(lab, `${name}${i}`, { segment: options.segment, mtu });
    const made = stack.use(await tunnel(on, impl, { mtu, flags }));
    await talks(made.a.host, made.b.ip4, made.impl);
    out.push(made);
  }
  return out;
}

/** UDP as fast as it arrives, of programs that send superpackets and of those that send single datagrams. */
async function raceUdp(
  lab: Lab,
  programs: Implementation[],
  rounds: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const mtu = options.mtu ?? DEFAULT_MTU;
  const name = label(`UDP, MTU ${mtu}`, options);
  await using stack = new AsyncDisposableStack();
  const ends = await tunnels(lab, "udp", programs, mtu, options, stack);
  await inTurns(ends, Math.min(rounds, SIDE_ROUNDS), name, report, async (on) => {
    await fullUdp(on, mtu, MOST_SEGMENTS, "superpackets", name, options, report);
    await fullUdp(on, mtu, 1, "single datagrams", name, options, report);
  });
}

async function fullUdp(
  on: Tunnel,
  mtu: number,
  segments: number,
  what: string,
  name: string,
  { quick }: BenchOptions,
  report: Report,
): Promise<void> {
  const seconds = quick ? 0.3 : 1;
  const udp = await udpLoad({ ...through(on), mtu, seconds, segments, pids: [on.a.pid, on.b.pid] });
  const add = (metric: string, unit: string, value: number) =>
    report.add({ case: name, impl: on.impl, metric: `UDP, ${what}${metric}`, unit }, value);
  add("", "Mb/s", udp.mbps);
  add(" per CPU-second", "Mb", udp.megabits / udp.cpu);
  add(", lost", "%", udp.lost);
}

/** From the smallest MTU of IPv6 to jumbo frames, over a wire that takes them, beside the fastest of the others. */
async function raceMtus(
  lab: Lab,
  programs: Implementation[],
  rounds: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const fast = programs.filter((impl) => impl === "weft" || impl === "wireguard-go");
  for (const mtu of options.quick ? MTUS.slice(-1) : MTUS) {
    const name = label(`from MTU to MTU: ${mtu}`, options);
    await using stack = new AsyncDisposableStack();
    const ends = await tunnels(lab, `mtu${mtu}-`, fast, mtu, options, stack);
    await inTurns(ends, Math.min(rounds, SIDE_ROUNDS), name, report, async (on) => {
      const add = (metric: string, unit: string, value: number) =>
        report.add({ case: name, impl: on.impl, metric, unit }, value);
      const tcp = await load({ ...through(on), seconds: 1, pids: [on.a.pid, on.b.pid] });
      add("TCP x1", "Mb/s", tcp.mbps);
      add("TCP x1 per CPU-second", "Mb", tcp.megabits / tcp.cpu);
      await fullUdp(on, mtu, MOST_SEGMENTS, "superpackets", name, options, report);
    });
  }
}

/** Weft with each offload turned off, and on more threads, on both ends, beside Weft as it comes. */
async function variants(lab: Lab, rounds: number, options: BenchOptions, report: Report): Promise<void> {
  const mtu = options.mtu ?? DEFAULT_MTU;
  const name = label(`variants of Weft, MTU ${mtu}`, options);
  const on = await wire(lab, "variant", options);
  const flagSets = options.quick
    ? [OFFLOADS]
    : [[], ["--workers", "2"], ["--workers", "4"], ...OFFLOADS.map((flag) => [flag]), OFFLOADS];
  const seconds = options.quick ? QUICK.tcp : FULL.tcp;
  const contestants = flagSets.map((flags) => ({
    flags,
    impl: flags === OFFLOADS ? "weft without any offload" : ["weft", ...flags].join(" "),
  }));
  await inTurns(contestants, Math.min(rounds, SIDE_ROUNDS), name, report, async ({ impl, flags }) => {
    await using ends = await tunnel(on, "weft", { mtu, flags });
    const { a, b } = ends;
    await talks(a.host, b.ip4, impl);
    const common = { ...through(ends), pids: [a.pid, b.pid] };
    const add = (metric: string, unit: string, value: number) => report.add({ case: name, impl, metric, unit }, value);
    const tcp = await load({ ...common, seconds });
    add("TCP x1", "Mb/s", tcp.mbps);
    add("TCP x1 per CPU-second", "Mb", tcp.megabits / tcp.cpu);
    const udp = await load({ ...common, seconds: 1, udp: { mbps: 200, bytes: 1200 } });
    add("200 Mb/s of 1200-byte UDP", "cores", udp.cpu / udp.seconds);
  });
}

/** From the start of the processes to full speed. */
async function startUp(
  lab: Lab,
  programs: Implementation[],
  rounds: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const mtu = options.mtu ?? DEFAULT_MTU;
  const name = label(`start, MTU ${mtu}`, options);
  const on = await wire(lab, "start", options);
  const contestants = racing(programs, options);
  await inTurns(contestants, Math.min(rounds, SIDE_ROUNDS), name, report, async ({ impl }) => {
    const add = (metric: string, unit: string, value: number) => report.add({ case: name, impl, metric, unit }, value);
    {
      const socket = untilSocket(on.a);
      await using ends = await tunnel(on, impl, { mtu });
      add("process start to configuration socket", "ms", await socket);
      const seconds = options.quick ? 2 : 4;
      const { intervals } = await load({ ...through(ends), seconds, interval: 0.1 });
      const [, full] = quartiles(intervals.slice(10));
      const first = intervals.slice(0, 10);
      const mean = first.reduce((a, b) => a + b, 0) / first.length;
      add("TCP x1 in the first second, of full speed", "%", (100 * mean) / full);
      const reached = intervals.findIndex((mbps) => mbps >= 0.8 * full);
      add("first packet to 80 % of full speed", "ms", (reached < 0 ? intervals.length : reached) * 100);
    }
    await using ends = await tunnel(on, impl, { mtu });
    const udp = await load({ ...through(ends), seconds: 1, udp: { mbps: 100, bytes: 1200 } });
    add("lost of 100 Mb/s UDP in the first second", "%", lossOf(udp));
  });
}

/** Quick: Weft shows that it runs. */
function racing(programs: Implementation[], { quick }: BenchOptions): { impl: Implementation }[] {
  return (quick ? programs.slice(0, 1) : programs).map((impl) => ({ impl }));
}

function through({ a, b }: { a: WgEnd; b: WgEnd }): Pick<LoadOptions, "from" | "to" | "address"> {
  return { from: a.host, to: b.host, address: b.ip4 };
}

/** Milliseconds until the WireGuard configuration socket on this host is there. */
async function untilSocket(host: Host): Promise<number> {
  // An absolute link would lead out of the host's files again.
  const path = `/proc/${host.holderPid}/root${realpathSync("/var/run")}/wireguard/w${process.pid}.sock`;
  rmSync(path, { force: true });
  const start = performance.now();
  while (!existsSync(path)) {
    if (performance.now() - start > 20_000) throw new Error(`bench: ${path} does not appear`);
    await Bun.sleep(1);
  }
  return performance.now() - start;
}

/** One hub and eight others: one floods the hub, the other seven want 5 Mb/s each. */
async function fairness(
  lab: Lab,
  programs: Implementation[],
  rounds: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const mtu = options.mtu ?? DEFAULT_MTU;
  const count = options.quick ? 3 : 8;
  const name = `${count} peers, one floods, MTU ${mtu}`;
  const hosts: Host[] = [];
  for (let i = 0; i <= count; i++) hosts.push(await lab.host(`fair${i}`));
  await inTurns(racing(programs, options), Math.min(rounds, SIDE_ROUNDS), name, report, async ({ impl }, round) => {
    await using stack = new AsyncDisposableStack();
    const ends = await Promise.all(hosts.map((host, i) => WgEnd.start(host, i + 1, impl)));
    for (const end of ends) {
      stack.use(end);
      end.host.netlink.setLink(end.device, { mtu });
    }
    const [hub, ...spokes] = ends as [WgEnd, ...WgEnd[]];
    for (const spoke of spokes) {
      await hub.knows(spoke, { endpoint: spoke.outer4 });
      await spoke.knows(hub, { endpoint: hub.outer4 });
      await talks(spoke.host, hub.ip4, impl);
    }
    const seconds = options.quick ? 1 : 4;
    const [flooder, ...quiet] = spokes as [WgEnd, ...WgEnd[]];
    const to = { to: hub.host, address: hub.ip4 };
    const pinger = quiet[round % quiet.length]!;
    const [flood, trips, ...modest] = await Promise.all([
      load({ from: flooder.host, ...to, seconds: seconds + 2, udp: { mbps: 0, bytes: 1200 } }),
      Bun.sleep(500).then(() => ping(pinger.host, hub.ip4, { count: seconds * 50, intervalMs: 20, timeoutMs: 2000 })),
      ...quiet.map((end, i) =>
        load({ from: end.host, ...to, port: 5301 + i, seconds: seconds + 1, udp: { mbps: 5, bytes: 1200 } }),
      ),
    ]);
    const add = (metric: string, unit: string, value: number) => report.add({ case: name, impl, metric, unit }, value);
    add("the flood, as received", "Mb/s", flood.mbps);
    add("the slowest of the others at 5 Mb/s", "Mb/s", Math.min(...modest.map((result) => result.mbps)));
    add("ping p99 of one of the others", "ms", trips.p99);
  });
}
