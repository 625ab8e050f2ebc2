// `bun run bench [PART]`: what is claimed about speed, measured beside the programs that people would use instead.
//
// A part is a module with `run(options, report)`: it adds samples to the report; here they become the table on standard
// output and the file of --json. Parts that are no race bring their own `main`.
import { UsageError } from "../src/cli/flags.ts";
import { commit, machine } from "./lib/machine.ts";
import { type BenchOptions, OPTIONS_USAGE, parseOptions } from "./lib/options.ts";
import { progress, Report, type ReportFile, rowsTable, writeReport } from "./lib/report.ts";

interface Part {
  run(options: BenchOptions, report: Report): Promise<void>;
}

interface Command {
  main(argv: string[]): Promise<number>;
}

const parts: Record<string, { what: string; load: () => Promise<Part> }> = {
  crypto: {
    what: "AEAD, X25519, BLAKE2s and NaCl box beside OpenSSL, node:crypto and @noble",
    load: () => import("./crypto.ts"),
  },
  packets: {
    what: "what a packet costs in wasm, stage by stage: checksum, split, seal, open, coalesce",
    load: () => import("./packets.ts"),
  },
  datapath: {
    what: "whole tunnels beside wireguard-go, gotatun, boringtun and tailscaled: TCP, UDP, ping, CPU, start, fairness",
    load: () => import("./datapath.ts"),
  },
  handshake: {
    what: "handshakes per second as responder, one core",
    load: () => import("./handshake.ts"),
  },
  memory: {
    what: "resident memory: idle, under load, with 1,000 peers; flat or not with --minutes",
    load: () => import("./memory.ts"),
  },
  filter: {
    what: "the packet filter with 1 to 1,000 rules beside none",
    load: () => import("./filter.ts"),
  },
};

const commands: Record<string, { what: string; load: () => Promise<Command> }> = {
  report: {
    what: "write the results of --json files into docs/performance.md",
    load: () => import("./publish.ts"),
  },
  control: {
    what: "a control server under thousands of simulated nodes: join, changes, churn, reconnect storm; Weft or any other",
    load: () => import("./control.ts"),
  },
  "timing-leak": {
    what: "t-test of the primitives' times: do they depend on secrets (dudect's method)",
    load: () => import("./timing-leak.ts"),
  },
  soak: {
    what: "WireGuard tunnels for real minutes across real rekeys, with every implementation installed",
    load: () => import("./soak.ts"),
  },
};

const ALL = "every part, one after the other, whole tunnels over both kinds of veth";

function list(): string {
  const lines = (entries: Record<string, { what: string }>) =>
    Object.entries(entries).map(([name, { what }]) => `  ${name.padEnd(12)}${what}`);
  return [
    "usage: bun run bench PART [flags]",
    "parts:",
    ...lines(parts),
    `  ${"all".padEnd(12)}${ALL}`,
    "not races, with flags of their own (--help):",
    ...lines(commands),
    "flags of parts:",
    OPTIONS_USAGE,
  ].join("\n");
}

export async function main(argv: string[]): Promise<number> {
  const [name, ...rest] = argv;
  if (!name || name === "--help" || name === "help") {
    console.log(list());
    return 0;
  }
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (command) return (await command.load()).main(rest);
  if (name !== "all" && !Object.hasOwn(parts, name)) {
    const known = [...Object.keys(parts), "all", ...Object.keys(commands)].join(", ");
    throw new UsageError(`there is no part ${JSON.stringify(name)}; known are: ${known}`);
  }
  const options = parseOptions(name, rest);
  if (!options) {
    console.log(`bun run bench ${name}: ${parts[name]?.what ?? ALL}\n${OPTIONS_USAGE}`);
    return 0;
  }
  if (options.quick) progress("--quick: this shows that it runs, not how fast");
  const reports: Report[] = [];
  for (const part of name === "all" ? Object.keys(parts) : [name]) {
    const report = new Report(part);
    reports.push(report);
    const { run } = await parts[part]!.load();
    await run(options, report);
    if (name === "all" && part === "datapath" && !options.segment) await run({ ...options, segment: true }, report);
    console.log(`${rowsTable(report.rows())}\n`);
  }
  if (options.json !== null) writeReport(options.json, collect(argv, reports));
  return 0;
}

function collect(argv: string[], reports: Report[]): ReportFile {
  return {
    commit: commit(),
    command: argv.filter((arg, i) => !/^--?json/.test(arg) && !/^--?json$/.test(argv[i - 1] ?? "")).join(" "),
    date: new Date().toISOString(),
    machine: machine(),
    versions: Object.assign({ bun: Bun.version }, ...reports.map((report) => report.versions)),
    notes: reports.flatMap((report) => report.notes.map((note) => `${report.part}: ${note}`)),
    rows: reports.flatMap((report) => report.rows()),
  };
}
