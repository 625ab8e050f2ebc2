// `bun run bench packets`: what a packet costs in wasm, stage by stage, without the kernel: the budget of the datapath.
// Nanoseconds per packet in batches of 46. Stages that destroy their input have it put back each time; what that costs is
// measured beside them and taken off.
import { BATCH, Engine } from "./lib/engine.ts";
import { race } from "./lib/micro.ts";
import type { BenchOptions } from "./lib/options.ts";
import { progress, quartiles, type Report } from "./lib/report.ts";

const SIZES = [64, 300, 1420];

export async function run(options: BenchOptions, report: Report): Promise<void> {
  for (const protocol of ["tcp", "udp"] as const) {
    for (const size of SIZES) {
      progress(`packets: ${protocol} of ${size} bytes`);
      await stages(new Engine(size, protocol), `${protocol.toUpperCase()}, ${size} bytes`, options, report);
    }
  }
  await helped(options, report);
}

/** What a second thread brings, batch after batch (`--workers`). */
async function helped(options: BenchOptions, report: Report): Promise<void> {
  progress("packets: one helper");
  const size = SIZES.at(-1)!;
  const engine = new Engine(size, "tcp");
  await using crew = await engine.recruit();
  const ns = await race(
    {
      seal: () => engine.seal(),
      "seal, with one helper": () => engine.sealWith(crew),
      "put back": () => engine.restore(),
      open: () => {
        engine.restore();
        engine.openOnly();
      },
      "open, with one helper": () => {
        engine.restore();
        engine.openWith(crew);
      },
    },
    options,
  );
  const [, back] = quartiles(ns["put back"]);
  for (const metric of ["seal", "seal, with one helper", "open", "open, with one helper"] as const) {
    const less = metric.startsWith("open") ? back : 0;
    report.add(
      { case: `two threads, ${size} bytes`, impl: "weft", metric, unit: "ns/packet" },
      ...ns[metric].map((sample) => (sample - less) / BATCH),
    );
  }
}

async function stages(engine: Engine, name: string, options: BenchOptions, report: Report): Promise<void> {
  const ns = await race(
    {
      checksum: () => engine.checksum(),
      split: () => engine.split(),
      seal: () => engine.seal(),
      transmit: () => {
        engine.split();
        engine.seal();
      },
      "put back": () => engine.restore(),
      open: () => {
        engine.restore();
        engine.openOnly();
      },
      receive: () => {
        engine.restore();
        engine.open();
        engine.flush();
      },
      coalesce: () => {
        engine.split();
        engine.coalesce();
      },
    },
    options,
  );
  const middle = (samples: number[]) => quartiles(samples)[1];
  const add = (metric: string, samples: number[], less = 0) =>
    report.add(
      { case: name, impl: "weft", metric, unit: "ns/packet" },
      ...samples.map((sample) => Math.max(0, sample - less) / BATCH),
    );
  report.add({ case: name, impl: "weft", metric: "checksum of one packet", unit: "ns/packet" }, ...ns.checksum);
  add("look up, split with checksums", ns.split);
  add("seal", ns.seal);
  add("transmit: all of it", ns.transmit);
  const back = middle(ns["put back"]);
  add("open with replay window", ns.open, back);
  add("verify checksums and coalesce", ns.coalesce, middle(ns.split));
  add("receive: open, source, coalesce", ns.receive, back);
}
