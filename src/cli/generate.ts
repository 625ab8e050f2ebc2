// `weft generate private-key`: a Curve25519 private key in the text form of key files, for instance for the Noise key.
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey } from "../crypto/x25519.ts";
import { IGNORED_CONFIG, parseFlags, UsageError } from "./flags.ts";
import { parseFormat, serialize } from "./output.ts";

const USAGE = `Usage: bun run weft generate private-key [-o json|json-line|yaml]

Prints a new private key, "privkey:" and 64 hex digits. A server makes its own where there is none.`;

export const FLAGS = {
  ...IGNORED_CONFIG,
  output: { kind: "string", short: "o" },
  help: { kind: "boolean", short: "h" },
} as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft generate", argv, FLAGS, USAGE, 1);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  if (flags._[0] !== "private-key") throw new UsageError("generate what? It is `weft generate private-key`");
  const format = parseFormat(flags.output);
  const key = formatKey("privkey", generatePrivateKey(randomBytes));
  console.log(format === "table" ? key : serialize({ private_key: key }, format));
  return 0;
}
