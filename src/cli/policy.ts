// `weft policy check -f FILE`: what is wrong with a policy, without a server. Users are those that the policy names; its
// tests run as on a tailnet where each of them and each tag has a node.
import { readFileSync } from "node:fs";
import { checkPolicyAlone, PolicyError } from "../control/policy/index.ts";
import { parseFlags, UsageError } from "./flags.ts";

const USAGE = `Usage: bun run weft policy check --file FILE

Reads a policy (HuJSON, docs/policy.md) and runs its tests. Exit status 1 when something is wrong.

  -f, --file FILE      the policy`;

function readPolicy(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new Error(`the policy file ${file} cannot be read: ${(error as Error).message}`);
  }
}

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft policy", argv, { help: "boolean", file: { kind: "string", short: "f" } }, USAGE, 2);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const [, verb] = flags._;
  if (verb !== "check") throw new UsageError("weft policy knows the command check (see `weft policy --help`)");
  if (flags.file === undefined) throw new UsageError("which policy? Give --file FILE");
  try {
    checkPolicyAlone(readPolicy(flags.file));
  } catch (error) {
    if (!(error instanceof PolicyError)) throw error;
    console.error(`${flags.file}: ${error.describe()}`);
    return 1;
  }
  console.log(`${flags.file}: the policy is fine`);
  return 0;
}
