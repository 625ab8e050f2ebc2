// The administrator's part of `bun run weft`: finds the verb (admin-verbs.ts), reaches the control server (admin-client.ts),
// prints the result.
import { createInterface } from "node:readline/promises";
import { AdminClient, CONNECTION_FLAGS } from "./admin-client.ts";
import { NOUNS, type Noun, type Session, type Verb } from "./admin-verbs.ts";
import { type FlagSpec, type Flags, nearest, parseFlags, UsageError } from "./flags.ts";
import { parseFormat, printable, serialize } from "./output.ts";

/** One line for each command. */
export const ADMIN_USAGE = Object.entries(NOUNS)
  .flatMap(([noun, { verbs }]) =>
    Object.entries(verbs).map(([verb, { usage }]) => `  ${noun} ${verb} ${usage}`.trimEnd()),
  )
  .join("\n");

const USAGE = `Usage: bun run weft [flags] COMMAND

${ADMIN_USAGE}

  -c, --config FILE  configuration: where the socket is, or the server elsewhere (default $WEFT_CONFIG, or the usual places)
  --data DIR     data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --socket PATH  its admin socket (default DIR/weft.sock)
  --address URL  a control server elsewhere ($WEFT_CLI_ADDRESS), with
  --api-key KEY  a key that it made ($WEFT_CLI_API_KEY); HEADSCALE_CLI_… are read, too
  --timeout 5s   how long to wait for it
  --insecure     whoever shows whatever certificate is believed
  -o json|json-line|yaml
  --force        ask no questions`;

const GLOBAL = {
  ...CONNECTION_FLAGS,
  output: { kind: "string", short: "o" },
  force: "boolean",
  help: { kind: "boolean", short: "h" },
} as const satisfies Record<string, FlagSpec["kind"] | FlagSpec>;

/** Flags of all commands that take a value: they may stand before the command. */
const VALUE_FLAGS = new Set(
  [GLOBAL, ...Object.values(NOUNS).flatMap(({ verbs }) => Object.values(verbs).map(({ flags }) => flags))]
    .flatMap((spec) => Object.entries<FlagSpec["kind"] | FlagSpec>(spec))
    .map(([name, entry]) => ({ name, ...(typeof entry === "string" ? { kind: entry, short: undefined } : entry) }))
    .filter(({ kind }) => kind !== "boolean")
    .flatMap(({ name, short }) => (short === undefined ? [name] : [name, short])),
);

/** The words of a command line that are neither flags nor values of flags, with their places. */
function wordsOf(argv: string[]): { word: string; at: number }[] {
  const words: { word: string; at: number }[] = [];
  for (let at = 0; at < argv.length; at++) {
    const arg = argv[at]!;
    if (arg.startsWith("-") && arg !== "-") {
      if (!arg.includes("=") && VALUE_FLAGS.has(arg.replace(/^--?/, ""))) at++;
    } else words.push({ word: arg, at });
  }
  return words;
}

/** The command that an argument list names: its first word that is no flag. */
export function commandOf(argv: string[]): string | undefined {
  return wordsOf(argv)[0]?.word;
}

function named<T extends Noun | Verb>(table: Readonly<Record<string, T>>, word: string): [string, T] | undefined {
  return Object.entries(table).find(([name, entry]) => name === word || entry.aliases.includes(word));
}

export function isAdminCommand(word: string): boolean {
  return named(NOUNS, word) !== undefined;
}

export async function adminMain(argv: string[]): Promise<number> {
  const [nounWord, verbWord] = wordsOf(argv);
  const found = named(NOUNS, nounWord?.word ?? "");
  if (!found) throw new UsageError(`which command? ${USAGE}`);
  const [noun, { verbs }] = found;
  const verb = verbWord && named(verbs, verbWord.word);
  if (!verb || !verbWord) {
    if (argv.some((arg) => /^(-h|--?help)$/.test(arg))) {
      console.log(USAGE);
      return 0;
    }
    const known = Object.keys(verbs);
    const near = verbWord && nearest(verbWord.word, known);
    throw new UsageError(
      verbWord
        ? `unknown command "${noun} ${verbWord.word}"${near ? `: did you mean "${noun} ${near}"?` : ""} (${noun} has ${known.join(", ")})`
        : `${noun} needs one of ${known.join(", ")} behind it`,
    );
  }
  const rest = argv.filter((_, at) => at !== nounWord?.at && at !== verbWord.at);
  const [name, { flags: spec, positional, run, usage }] = verb;
  const command = `weft ${noun} ${name}`;
  const flags = parseFlags(command, rest, { ...GLOBAL, ...spec }, USAGE, positional) as Flags<typeof GLOBAL>;
  if (flags.help) {
    console.log(`Usage: bun run ${command} ${usage}\n\n${USAGE}`);
    return 0;
  }
  const format = parseFormat(flags.output);
  const api = AdminClient.open(flags, process.env, (line) => console.error(line));
  const result = await run({ api, confirm: confirmUnless(flags.force) }, flags);
  console.log(format === "table" ? printable(result.text) : serialize(result.value, format));
  return 0;
}

/** Asks a person at a terminal; scripts are taken at their word. */
function confirmUnless(force: boolean | undefined): Session["confirm"] {
  return async (question) => {
    if (force || !process.stdin.isTTY || !process.stderr.isTTY) return;
    const terminal = createInterface({ input: process.stdin, output: process.stderr });
    const answer = await terminal.question(`${question} [y/N] `);
    terminal.close();
    if (!/^y(es)?$/i.test(answer.trim())) throw new Error("nothing was changed");
  };
}
