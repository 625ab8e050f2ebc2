// The flags that the parts of the suite share.
import { parseFlags, UsageError } from "../../src/cli/flags.ts";

/** What Weft is measured beside: user-space WireGuards (whole tunnels), and libraries (primitives). */
const RIVALS = ["wireguard-go", "tailscaled", "gotatun", "boringtun", "openssl", "noble"] as const;
export type Rival = (typeof RIVALS)[number];

const DATAPATH_CASES = ["wireguard", "mesh", "udp", "mtu", "variants", "start", "fairness"] as const;
export type DatapathCase = (typeof DATAPATH_CASES)[number];

export interface BenchOptions {
  /** A few seconds for each part: does it run at all. Its numbers are no measurement. */
  quick: boolean;
  /** File to write, null: none. */
  json: string | null;
  /** Whom to measure beside, as far as they are installed. */
  against: readonly Rival[];
  /** Whole tunnels: the outer veth carries single packets. */
  segment: boolean;
  /** MTU of the tunnels. Null: the part's own (1420; 1280 where tailscaled takes part). */
  mtu: number | null;
  /** How often the programs take turns. Null: the part's own. */
  rounds: number | null;
  /** Datapath: which of its cases. Null: all. */
  only: readonly DatapathCase[] | null;
  /** Memory: for how long TCP runs while resident memory is watched. Null: the part's own. */
  minutes: number | null;
}

export const OPTIONS_USAGE = `  --quick           a few seconds: shows that it runs; the numbers mean nothing
  --json FILE       write {commit, machine, versions, rows} to FILE as well
  --against LIST    of ${RIVALS.join(", ")} (default: all that are installed)
  --segment         whole tunnels: the veth carries single packets instead of segmentation offload's large ones
  --mtu N           whole tunnels: MTU inside (default 1420; 1280 beside tailscaled)
  --rounds N        how often the programs take turns (default: the part's own)
  --only LIST       datapath: of ${DATAPATH_CASES.join(", ")} (default: all)
  --minutes N       memory: for how long resident memory is watched under load (default 1)`;

const MTU_MIN = 1280;
const MTU_MAX = 9000;

/** Null: help was asked for. Throws UsageError. */
export function parseOptions(part: string, argv: readonly string[]): BenchOptions | null {
  const flags = parseFlags(
    `bench ${part}`,
    argv,
    {
      quick: "boolean",
      json: "string",
      against: "list",
      segment: "boolean",
      mtu: "number",
      rounds: "number",
      only: "list",
      minutes: "number",
      help: "boolean",
    },
    OPTIONS_USAGE,
  );
  if (flags.help) return null;
  const { mtu, rounds, minutes } = flags;
  if (mtu !== undefined && !(Number.isInteger(mtu) && mtu >= MTU_MIN && mtu <= MTU_MAX))
    throw new UsageError(`--mtu takes ${MTU_MIN} to ${MTU_MAX}, not ${mtu}`);
  if (rounds !== undefined && !(Number.isInteger(rounds) && rounds >= 1))
    throw new UsageError(`--rounds takes a whole number from 1 on, not ${rounds}`);
  if (minutes !== undefined && !(minutes > 0 && minutes <= 1440))
    throw new UsageError(`--minutes takes a number above 0, up to 1440, not ${minutes}`);
  return {
    quick: flags.quick ?? false,
    json: flags.json ?? null,
    against: flags.against?.map((name) => oneOf("--against", name, RIVALS)) ?? RIVALS,
    segment: flags.segment ?? false,
    mtu: mtu ?? null,
    rounds: rounds ?? null,
    only: flags.only?.map((name) => oneOf("--only", name, DATAPATH_CASES)) ?? null,
    minutes: minutes ?? null,
  };
}

function oneOf<T extends string>(flag: string, name: string, known: readonly T[]): T {
  const found = known.find((one) => one === name);
  if (!found) throw new UsageError(`${flag}: ${JSON.stringify(name)} is not known: ${known.join(", ")}`);
  return found;
}
