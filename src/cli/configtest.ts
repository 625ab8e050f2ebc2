// `weft configtest`: everything that can be wrong with a configuration before a server starts with it.
import { readFileSync } from "node:fs";
import { PolicyError, parsePolicy } from "../control/policy/index.ts";
import type { ServerConfig } from "./config.ts";
import { parseFlags, UsageError } from "./flags.ts";
import { configOf } from "./serve.ts";
import { readTls } from "./tls.ts";

const USAGE = `Usage: bun run weft configtest [-c FILE]

Reads the configuration as a server would, with its certificates, secrets and policy. Exit status 0 when all is right, 2 when
something is not.

  -c, --config FILE    the configuration (default $WEFT_CONFIG, $HEADSCALE_CONFIG, or /etc/weft/config.yaml if it is there)`;

export const FLAGS = { config: { kind: "string", short: "c" }, help: { kind: "boolean", short: "h" } } as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft configtest", argv, FLAGS, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const config = configOf(flags);
  for (const warning of config.warnings) console.error(`warning: ${warning}`);
  try {
    checkFiles(config);
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
  console.log(`${config.file ?? "the configuration (no file)"}: all is right`);
  return 0;
}

/** Throws with one sentence. */
function checkFiles({ tls, settings }: ServerConfig): void {
  if (tls && "certPath" in tls) readTls(tls);
  const { mode, path } = settings.policy;
  if (mode === "database" || path === "") return;
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    throw new Error(`policy.path ${path} cannot be read: ${(error as Error).message}`);
  }
  try {
    // Which groups a provider will claim is not known here.
    parsePolicy(text, () => true);
  } catch (error) {
    throw error instanceof PolicyError ? new Error(`${path}: ${error.describe()}`) : error;
  }
}
