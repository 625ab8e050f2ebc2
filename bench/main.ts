// `bun run bench [PART]`: what is claimed about speed, measured beside the programs that people would use instead.
//
// A part is a module with `run(options, report)`: it adds samples to the report; here they become the table on standard
// output and the file of --json. Parts that are no race bring their own `main`.
import { UsageError } from "../src/cli/flags.ts";
import { commit, machine } from "./lib/machine.ts";
import { type BenchOptions, OPTIONS_USAGE, parseOptions } from "./lib/options.ts";
import { progress, Report, rowsTable, writeReport } from "./lib/report.ts";

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
  soak: {
    what: "WireGuard tunnels for real minutes across real rekeys, with every implementation installed",
    load: () => import("./soak.ts"),
  },
};

function list(): string {
  const lines = (entries: Record<string, { what: string }>) =>
    Object.entries(entries).map(([name, { what }]) => `  ${name.padEnd(12)}${what}`);
  return [
    "usage: bun run bench PART [flags]",
    "parts:",
    ...lines(parts),
    "not races, with flags of their own (--help):",
    ...lines(commands),
    "flags:",
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
  const part = Object.hasOwn(parts, name) ? parts[name] : undefined;
  if (!part) {
    const known = [...Object.keys(parts), ...Object.keys(commands)].join(", ");
    throw new UsageError(`there is no part ${JSON.stringify(name)}; known are: ${known}`);
  }
  const options = parseOptions(name, rest);
  if (!options) {
    console.log(`bun run bench ${name}: ${part.what}\n${OPTIONS_USAGE}`);
    return 0;
  }
  if (options.quick) progress("--quick: this shows that it runs, not how fast");
  const report = new Report(name);
  await (await part.load()).run(options, report);
  const rows = report.rows();
  console.log(rowsTable(rows));
  if (options.json !== null) {
    writeReport(options.json, {
      commit: commit(),
      command: argv.join(" "),
      date: new Date().toISOString(),
      machine: machine(),
      versions: { bun: Bun.version, ...report.versions },
      notes: report.notes,
      rows,
    });
  }
  return 0;
}
