// `bun run bench filter`: what the packet filter costs a received packet: the receive path in wasm (open, replay window, source,
// filter, coalesce) with more and more rules, beside the same without a filter. Only the last rule lets the packets pass.
//
//   TCP          data of a connection: only its first packet is compared with the rules
//   UDP          one flow: the verdict is remembered
//   UDP, new     the verdicts are forgotten before each batch of 46
import { compileFilter, layOutFilter } from "../src/datapath/filter.ts";
import type { FilterRule } from "../src/wire/tailcfg.ts";
import { BATCH, Engine, LOCAL, PEER } from "./lib/engine.ts";
import { race } from "./lib/micro.ts";
import type { BenchOptions } from "./lib/options.ts";
import { progress, quartiles, type Report } from "./lib/report.ts";

const RULES = [1, 10, 100, 1000];
const SIZES = [64, 1420];
const TABLE_BYTES = 1 << 20;

export async function run(options: BenchOptions, report: Report): Promise<void> {
  for (const kind of ["TCP", "UDP", "UDP, new"] as const) {
    for (const size of SIZES) {
      progress(`filter: ${kind} of ${size} bytes`);
      await rules(kind, size, options, report);
    }
  }
}

async function rules(
  kind: "TCP" | "UDP" | "UDP, new",
  size: number,
  options: BenchOptions,
  report: Report,
): Promise<void> {
  const engine = new Engine(size, kind === "TCP" ? "tcp" : "udp");
  const room = engine.asm.alloc(TABLE_BYTES);
  const receive = () => {
    engine.restore();
    engine.open();
    engine.flush();
  };
  let inForce = -1;
  const contestant = (count: number) => () => {
    if (inForce !== count) {
      inForce = count;
      if (count > 0) layOut(engine, room, count);
      engine.filter(count === 0 ? 0 : room);
    } else if (kind === "UDP, new") engine.filter(count === 0 ? 0 : room);
    receive();
  };
  const counts = [0, ...RULES];
  const ns = await race(Object.fromEntries(counts.map((count) => [`${count}`, contestant(count)])), options);
  const title = (count: number) => (count === 0 ? "no filter" : count === 1 ? "1 rule" : `${count} rules`);
  const [, none] = quartiles(ns["0"]!);
  for (const count of counts) {
    const name = `${kind}, ${size} bytes: ${title(count)}`;
    const samples = ns[`${count}`]!;
    const of = { case: name, impl: "weft" };
    report.add({ ...of, metric: "received packet, in wasm", unit: "ns/packet" }, ...samples.map((t) => t / BATCH));
    if (count > 0)
      report.add({ ...of, metric: "cost against no filter", unit: "%" }, 100 * (quartiles(samples)[1] / none - 1));
  }
}

/** `count` rules for other sources and ports; the last one is ours. */
function layOut(engine: Engine, at: number, count: number): void {
  const rule = (i: number): FilterRule => {
    const ours = i === count - 1;
    return {
      SrcIPs: [ours ? `${PEER}/32` : `10.1.${i >> 8}.${i & 255}/32`],
      DstPorts: [{ IP: `${LOCAL}/32`, Ports: ours ? { First: 0, Last: 65535 } : { First: 1000 + i, Last: 1000 + i } }],
    };
  };
  const config = { local: [`${LOCAL}/32`], rules: Array.from({ length: count }, (_, i) => rule(i)) };
  const table = layOutFilter(compileFilter(config), at);
  if (table.length > TABLE_BYTES) throw new Error("bench: the table of rules does not fit");
  engine.asm.u8.set(table, at);
}
