// `bun run bench memory`: resident memory (VmRSS) of the process of each program: with a tunnel that is up and idle, while and after
// TCP x4 runs through it, and with 1,000 peers. The larger of a tunnel's two ends counts. `--minutes 10` shows whether it grows,
// minute by minute.
import { rss } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import { type Implementation, WgEnd } from "../test/lib/wg.ts";
import { identity, keyText } from "./lib/initiations.ts";
import { load } from "./lib/iperf.ts";
import type { BenchOptions } from "./lib/options.ts";
import { quartiles, type Report } from "./lib/report.ts";
import { cannotTunnel, configure, talks, tunnel, type Wire, wire, wireguards } from "./lib/tunnels.ts";
import { inTurns } from "./lib/turns.ts";

const DEFAULT_MTU = 1420;
const PEERS = 1000;
/** From the start, or the first packets, to what counts as idle. */
const SETTLE_MS = 2500;
const SAMPLES_PER_MINUTE = 60;

export async function run(options: BenchOptions, report: Report): Promise<void> {
  if (cannotTunnel) {
    report.note(`everything is left out: ${cannotTunnel}`);
    return;
  }
  await using lab = await Lab.create("bench");
  const on = await wire(lab, "memory", options);
  const installed = wireguards(options, report);
  const programs = options.quick ? installed.slice(0, 2) : installed;
  const peers = Array.from(
    { length: PEERS },
    (_, i) =>
      `[Peer]\nPublicKey = ${keyText(identity(`peer ${i}`).publicKey)}\nAllowedIPs = 10.100.${i >> 8}.${i & 255}/32\n`,
  );
  const contestants = programs.map((impl) => ({ impl }));
  const rounds = options.rounds ?? 1;
  await inTurns(contestants, rounds, "load", report, ({ impl }) => underLoad(on, impl, options, report));
  await inTurns(contestants, rounds, "many peers", report, ({ impl }) => manyPeers(on, impl, peers, options, report));
}

function megabytes(kilobytes: number): number {
  return kilobytes / 1024;
}

async function underLoad(on: Wire, impl: Implementation, options: BenchOptions, report: Report): Promise<void> {
  const { quick } = options;
  const seconds = quick ? 1 : Math.max(1, Math.round((options.minutes ?? 1) * 60));
  await using ends = await tunnel(on, impl, { mtu: options.mtu ?? DEFAULT_MTU });
  const { a, b } = ends;
  await talks(a.host, b.ip4, impl);
  await Bun.sleep(quick ? 100 : SETTLE_MS);
  const now = () => megabytes(Math.max(rss(a.pid), rss(b.pid)));
  const add = (metric: string, ...values: number[]) =>
    report.add({ case: `tunnel, MTU ${options.mtu ?? DEFAULT_MTU}`, impl, metric, unit: "MB" }, ...values);
  add("idle", now());

  const own = () => megabytes(Math.max(...[a, b].map(({ pid }) => rss(pid) - rss(pid, "RssFile"))));
  const samples: number[] = [];
  const ownSamples: number[] = [];
  const sample = () => {
    samples.push(now());
    ownSamples.push(own());
  };
  const timer = setInterval(sample, quick ? 100 : 60_000 / SAMPLES_PER_MINUTE);
  try {
    await load({ from: a.host, to: b.host, address: b.ip4, seconds, streams: 4 });
  } finally {
    clearInterval(timer);
  }
  const after = now();
  add("while TCP x4 runs", ...samples);
  add(`after ${seconds} s of TCP x4`, after);
  add("most at any time", Math.max(...samples, after));
  const minutes = Math.round(samples.length / SAMPLES_PER_MINUTE);
  for (let minute = 0; minutes > 1 && minute < minutes; minute++)
    add(
      `in minute ${minute + 1} of TCP x4`,
      ...samples.slice(minute * SAMPLES_PER_MINUTE, (minute + 1) * SAMPLES_PER_MINUTE),
    );
  // Flat: the last fifth of the time beside the fifth that follows the half.
  const part = (of: number[], from: number) => {
    const first = Math.floor(of.length * from);
    return quartiles(of.slice(first, Math.max(first + 1, Math.ceil(of.length * (from + 0.2)))))[1];
  };
  add("growth in the second half", part(samples, 0.8) - part(samples, 0.5));
  add("growth in the second half, without the program's code", part(ownSamples, 0.8) - part(ownSamples, 0.5));
}

async function manyPeers(
  on: Wire,
  impl: Implementation,
  peers: string[],
  { quick }: BenchOptions,
  report: Report,
): Promise<void> {
  await using end = await WgEnd.start(on.a, 1, impl);
  await configure(end, peers);
  await Bun.sleep(quick ? 100 : SETTLE_MS);
  report.add({ case: `${PEERS} peers configured`, impl, metric: "idle", unit: "MB" }, megabytes(rss(end.pid)));
}
