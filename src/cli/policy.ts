// `weft policy`: the policy of a control server, read, checked, set and asked about (docs/policy.md), through its API, or, when
// it is not running, in its database.
import { readFileSync } from "node:fs";
import type { z } from "zod";
import type { PolicyComparison, PolicyExplanation, PolicyHistory } from "../control/api/v1-policy.ts";
import { checkPolicyAlone, lineAt, PolicyError, parsePolicy } from "../control/policy/index.ts";
import { type OfflinePolicies, openPoliciesOffline } from "../control/policy-offline.ts";
import { AdminClient, CONNECTION_FLAGS, NoServer } from "./admin-client.ts";
import { type Flags, nearest, parseFlags, UsageError } from "./flags.ts";
import { parseFormat, printable, serialize, showTime, table } from "./output.ts";
import { configOf } from "./serve.ts";

const BYPASS = "bypass-server-and-access-database-directly";

const USAGE = `Usage: bun run weft policy COMMAND

  get                  prints the policy in force, byte for byte
  set -f FILE          puts another in force (policy.mode database); refused when it is wrong or fails its own tests
  check -f FILE        what is wrong with a policy; without a server its users are those that it names
  history              versions that are kept, newest first
  why SRC DST:PORT     which rule lets a connection through, or what came nearest. SRC and DST are nodes, users, groups,
                       tags, autogroups, hosts or addresses
  try -f FILE          what a policy would change, pair by pair; nothing is changed

  -f, --file FILE      the policy, HuJSON; - is standard input
  --proto NAME         for why: tcp (default), udp, icmp, or another protocol
  -o, --output FORMAT  json, json-line or yaml
  -c, --config FILE    configuration of the server
  --data DIR           data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --socket PATH        its admin socket (default DIR/weft.sock)
  --address URL        a control server elsewhere, with --api-key KEY; --timeout 30s, --insecure
  --${BYPASS}
                       opens the database of a server that is not running`;

export const FLAGS = {
  file: { kind: "string", short: "f" },
  proto: "string",
  output: { kind: "string", short: "o" },
  ...CONNECTION_FLAGS,
  force: "boolean",
  [BYPASS]: "boolean",
  help: { kind: "boolean", short: "h" },
} as const;
type PolicyFlags = Flags<typeof FLAGS>;

/** What a command did: `value` for programs, `text` for people, printed as it is. */
interface Result {
  value: unknown;
  text: string;
}

/** Where the answers come from. */
interface Source {
  get(): Promise<{ policy: string; updatedAt: string | null }>;
  set(text: string): Promise<{ policy: string; updatedAt: string | null }>;
  check(text: string): Promise<void>;
  history(): Promise<z.output<typeof PolicyHistory>>;
  why(question: { src: string; dst: string; proto?: string | undefined }): Promise<z.output<typeof PolicyExplanation>>;
  try(text: string): Promise<z.output<typeof PolicyComparison>>;
  close(): Promise<void>;
}

interface Verb {
  aliases: readonly string[];
  /** Words behind the verb. */
  words: number;
  run(source: Source, flags: PolicyFlags): Promise<Result>;
}

const VERBS: Record<string, Verb> = {
  get: {
    aliases: ["show", "view", "fetch"],
    words: 0,
    async run(source) {
      const value = await source.get();
      return { value, text: value.policy };
    },
  },
  set: {
    aliases: ["put", "update"],
    words: 0,
    async run(source, flags) {
      return { value: await withPlaces(flags, (text) => source.set(text)), text: "Policy updated.\n" };
    },
  },
  check: {
    aliases: [],
    words: 0,
    async run(source, flags) {
      let alone = "";
      await withPlaces(flags, async (text) => {
        try {
          await source.check(text);
        } catch (error) {
          if (!(error instanceof NoServer)) throw error;
          checkPolicyAlone(text);
          alone = " (checked without a server: its users are those that it names)";
        }
      });
      return { value: {}, text: `${flags.file}: the policy is fine${alone}\n` };
    },
  },
  history: {
    aliases: ["versions", "log"],
    words: 0,
    async run(source) {
      const { versions } = await source.history();
      const rows = versions.map(({ version, updatedAt, by, etag, policy }) => [
        version,
        showTime(updatedAt, ""),
        by,
        etag.slice(0, 12),
        String(Buffer.byteLength(policy)),
      ]);
      return { value: versions, text: `${table(["Version", "Updated", "By", "ETag", "Bytes"], rows)}\n` };
    },
  },
  why: {
    aliases: ["explain"],
    words: 2,
    async run(source, flags) {
      const [, , src, dst] = flags._;
      if (src === undefined || dst === undefined)
        throw new UsageError("which connection? `weft policy why SRC DST:PORT`");
      const value = await source.why({ src, dst, proto: flags.proto });
      return { value, text: explanation(src, dst, value) };
    },
  },
  try: {
    aliases: ["diff"],
    words: 0,
    async run(source, flags) {
      const value = await withPlaces(flags, (text) => source.try(text));
      return { value, text: comparison(value) };
    },
  },
};

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft policy", argv, FLAGS, USAGE, 4);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const [, word] = flags._;
  const found = Object.entries(VERBS).find(([name, { aliases }]) => name === word || aliases.includes(word ?? ""));
  if (!found) {
    const near = word === undefined ? null : nearest(word, Object.keys(VERBS));
    throw new UsageError(
      word === undefined
        ? `policy needs one of ${Object.keys(VERBS).join(", ")} behind it (weft policy --help)`
        : `unknown command "policy ${word}"${near ? `: did you mean "policy ${near}"?` : ""} (weft policy --help lists them)`,
    );
  }
  const [name, verb] = found;
  if (flags._.length > 2 + verb.words)
    throw new UsageError(`policy ${name} does not know what ${JSON.stringify(flags._.at(-1))} means`);
  const format = parseFormat(flags.output);
  const source = flags[BYPASS] ? await offline(flags) : online(flags);
  try {
    const { value, text } = await verb.run(source, flags);
    // A policy goes into files as it is; a terminal, and what else is said of nodes by their names, is another matter.
    const isExact = name === "get" && !process.stdout.isTTY;
    const shown = isExact ? text : printable(text);
    process.stdout.write(format === "table" ? shown : `${serialize(value, format)}\n`);
    return 0;
  } catch (error) {
    if (!(error instanceof PolicyError)) throw error;
    console.error(printable(error.message));
    return 1;
  } finally {
    await source.close();
  }
}

function online(flags: PolicyFlags): Source {
  const api = AdminClient.open(flags, process.env, (line) => console.error(line));
  return {
    get: () => api.call("GET", "/v1/policy"),
    set: (policy) => api.call("PUT", "/v1/policy", { policy }),
    check: async (policy) => void (await api.call("POST", "/v1/policy/check", { policy })),
    history: () => api.call("GET", "/v1/policy/history"),
    why: (question) => api.call("POST", "/v1/policy/why", question),
    try: (policy) => api.call("POST", "/v1/policy/try", { policy }),
    close: async () => {},
  };
}

async function offline(flags: PolicyFlags): Promise<Source> {
  const { dataDir, settings } = configOf({
    ...(flags.config !== undefined && { config: flags.config }),
    ...(flags.data !== undefined && { data: flags.data }),
  });
  const stored: OfflinePolicies = await openPoliciesOffline({
    dataDir,
    settings: { ...settings, policy: { mode: "database", path: "" } },
  });
  const { policies } = stored;
  const shown = ({ text, updatedAt }: { text: string; updatedAt: number | null }) => ({
    policy: text,
    updatedAt: timeOf(updatedAt),
  });
  return {
    get: async () => shown(policies.current()),
    set: async (text) => shown(await policies.set(text, { by: "command line, server not running" })),
    check: async (text) => policies.check(text),
    history: async () => ({
      versions: policies.history().map(({ version, text, updatedAt, by, etag }) => ({
        version: String(version),
        ...shown({ text, updatedAt }),
        by,
        etag,
      })),
    }),
    why: async (question) => stored.access().why(question),
    try: async (text) => stored.access().try(text),
    close: () => stored.close(),
  };
}

function timeOf(millis: number | null): string | null {
  return millis === null ? null : new Date(millis).toISOString();
}

// ---- the policy as a file ----

/** Does something with the policy of --file. Its errors become "FILE:LINE:COLUMN: …" with the line below. Throws PolicyError. */
async function withPlaces<T>({ file }: PolicyFlags, work: (text: string) => Promise<T>): Promise<T> {
  if (file === undefined) throw new UsageError("which policy? Give --file FILE");
  const text = readPolicy(file);
  try {
    // What needs no server to be said is said with its place; which groups an identity provider has, only the server knows.
    parsePolicy(text, () => true);
    return await work(text);
  } catch (error) {
    if (error instanceof NoServer || error instanceof UsageError) throw error;
    const placed = error instanceof PolicyError ? error.describe() : (error as Error).message;
    const [, line, column, message] = /^line (\d+), column (\d+): (.*)$/s.exec(placed) ?? [];
    if (line === undefined || column === undefined) {
      if (error instanceof PolicyError || placed.startsWith("test(s) failed"))
        throw new PolicyError(`${file}: ${placed}`);
      throw error;
    }
    const place = { line: Number(line), column: Number(column) };
    throw new PolicyError(`${file}:${line}:${column}: ${message}\n    ${lineAt(text, place)}`);
  }
}

function readPolicy(file: string): string {
  try {
    return readFileSync(file === "-" ? 0 : file, "utf8");
  } catch (error) {
    throw new Error(`the policy file ${file} cannot be read: ${(error as Error).message}`);
  }
}

// ---- answers for people ----

function explanation(src: string, dst: string, value: z.output<typeof PolicyExplanation>): string {
  const { verdict, protocol, pairs, allowed, complete, rules, denied, nearest: near } = value;
  const what = `${src} ${verdict === "denied" ? "may not reach" : "may reach"} ${dst} by ${protocol}`;
  const many = pairs === 1 ? "" : ` (${allowed} of ${complete ? "" : "the first "}${pairs} pairs)`;
  const lines = [`${what}${many}`];
  for (const { rule, pairs: count, examples } of rules) {
    lines.push(
      "",
      rule ? `${rule.section}[${rule.index}], line ${rule.place.line}:` : "The policy has no rules: all may reach all.",
    );
    if (rule) lines.push(`    ${rule.line}`);
    if (pairs > 1) lines.push(`  lets ${count} ${count === 1 ? "pair" : "pairs"} through, like`);
    for (const example of examples) lines.push(`    ${example}`);
  }
  if (denied.length > 0) {
    if (allowed > 0)
      lines.push("", `Nothing lets ${pairs - allowed} through, like`, ...denied.map((pair) => `    ${pair}`));
    lines.push(
      "",
      near.length > 0 ? `For ${denied[0]}, these came nearest:` : "No rule has to do with either of them.",
    );
    for (const { rule, misses } of near)
      lines.push(`  ${rule.section}[${rule.index}], line ${rule.place.line}: ${misses.join("; ")}`, `    ${rule.line}`);
  }
  return `${lines.join("\n")}\n`;
}

type Group = z.output<typeof PolicyComparison>["pairs"][number]["src"];

function comparison({ same, complete, nodes, peers, pairs, changes }: z.output<typeof PolicyComparison>): string {
  if (same) return `It would change nothing for the ${nodes} nodes.\n`;
  const lines: string[] = [];
  for (const { src, dst, pairs: count, opened, closed } of pairs) {
    lines.push(`${group(src)} -> ${group(dst)}${count > 1 ? ` (${count} pairs)` : ""}`);
    lines.push(...opened.map((word) => `  + ${word}`), ...closed.map((word) => `  - ${word}`));
  }
  for (const { nodes: some, added, removed } of changes) {
    lines.push(group(some), ...added.map((word) => `  + ${word}`), ...removed.map((word) => `  - ${word}`));
  }
  lines.push("", `Pairs of nodes that see each other: ${peers.before} before, ${peers.after} after.`);
  if (!complete) lines.push("This is not all: the policies differ too much for everything to be compared and listed.");
  return `${lines.join("\n")}\n`;
}

function group({ count, names }: Group): string {
  return count > names.length ? `${names.join(", ")} and ${count - names.length} more` : names.join(", ");
}
