// `bun run weft`: the administrator's verbs go to the control server, the others to the node, the rest are done here.
import { ADMIN_USAGE, adminMain, commandOf, isAdminCommand } from "./admin.ts";
import { CONNECTION_FLAGS } from "./admin-client.ts";
import { NOUNS } from "./admin-verbs.ts";
import type { Completable } from "./completion.ts";
import { nearest, UsageError } from "./flags.ts";

/** What stands behind a word of the command line: for help, for completion, and for what was mistyped. */
export interface Command {
  /** What may follow the word. */
  usage: string;
  about: string;
  /** Words of which one follows. */
  words?: readonly string[];
  aliases?: readonly string[];
  /** What it, or each of its words, takes. */
  flags?(): Promise<object>;
  main(argv: string[]): Promise<number>;
}

const POLICY_WORDS = ["get", "set", "check", "history", "why", "try"];

/** Done here, without or beside a server. Their arguments come without the word itself. */
export const LOCAL: Readonly<Record<string, Command>> = {
  serve: {
    usage: "[-c FILE] [flags]",
    about: "runs a server: a box, or control alone where the configuration says that relays are elsewhere",
    flags: async () => (await import("./serve-verb.ts")).FLAGS,
    main: async (argv) => (await import("./serve-verb.ts")).main(argv),
  },
  configtest: {
    usage: "[-c FILE]",
    about: "reads the configuration, its certificates and policy, and says what is wrong",
    flags: async () => (await import("./configtest.ts")).FLAGS,
    main: async (argv) => (await import("./configtest.ts")).main(argv),
  },
  health: {
    usage: "[--address URL]",
    about: "whether a control server works; exit status 0 or 1",
    flags: async () => (await import("./health.ts")).FLAGS,
    main: async (argv) => (await import("./health.ts")).main(argv),
  },
  backup: {
    usage: "FILE",
    about: "saves the database and the keys of the control server that runs here in one file",
    flags: async () => (await import("./backup.ts")).FLAGS,
    main: async (argv) => (await import("./backup.ts")).main(argv),
  },
  restore: {
    usage: "FILE",
    about: "puts a backup into the data folder of a control server that does not run",
    flags: async () => (await import("./restore.ts")).FLAGS,
    main: async (argv) => (await import("./restore.ts")).main(argv),
  },
  import: {
    usage: "SOURCE",
    about: "takes over the tailnet of a Headscale or of another Weft: its configuration file, or its SQLite database",
    flags: async () => (await import("./import.ts")).FLAGS,
    main: async (argv) => (await import("./import.ts")).main(argv),
  },
  generate: {
    usage: "private-key",
    about: "prints a new private key",
    words: ["private-key"],
    aliases: ["gen"],
    flags: async () => (await import("./generate.ts")).FLAGS,
    main: async (argv) => (await import("./generate.ts")).main(argv),
  },
  completion: {
    usage: "bash|zsh|fish",
    about: "prints what makes the shell complete commands: source <(weft completion bash)",
    words: ["bash", "zsh", "fish"],
    main: async (argv) => (await import("./completion.ts")).main(argv, await allCommands()),
  },
};

/** These take their whole argument list. */
const POLICY: Command = {
  usage: "get | set -f FILE | check -f FILE | history | why SRC DST:PORT | try -f FILE",
  about: "the policy of a control server (docs/policy.md)",
  words: POLICY_WORDS,
  flags: async () => (await import("./policy.ts")).FLAGS,
  main: async (argv) => (await import("./policy.ts")).main(argv),
};

const NODE_USAGE: Readonly<Record<string, string>> = {
  up: "",
  down: "",
  logout: "",
  status: "",
  ping: "HOST",
  ip: "",
  netcheck: "",
  version: "",
};

/** Every first word. */
export function commandNames(): string[] {
  return [...Object.keys(NOUNS), ...Object.keys({ ...LOCAL, policy: POLICY }), ...Object.keys(NODE_USAGE)];
}

/** Every first word, with the words and flags that may follow. For the completion. */
export async function allCommands(): Promise<Completable[]> {
  const flagsOf = (spec: object) => Object.keys(spec).map((name) => (name.length === 1 ? `-${name}` : `--${name}`));
  const here = Object.entries({ ...LOCAL, policy: POLICY }).map(async ([name, { words = [], aliases = [], flags }]) => {
    const taken = flagsOf((await flags?.()) ?? {});
    return {
      name,
      aliases,
      words: words.map((word) => ({ name: word, aliases: [] })),
      flags: (word: string) => (word === "" && words.length > 0 ? [] : taken),
    };
  });
  const node: Readonly<Record<string, object>> = (await import("./client.ts")).FLAGS;
  return [
    ...Object.entries(NOUNS).map(([name, { aliases, verbs }]) => ({
      name,
      aliases,
      words: Object.entries(verbs).map(([verb, { aliases: short }]) => ({ name: verb, aliases: short })),
      flags: (word: string) => (verbs[word] ? flagsOf({ ...verbs[word].flags, ...CONNECTION_FLAGS, output: 0 }) : []),
    })),
    ...(await Promise.all(here)),
    ...Object.keys(NODE_USAGE).map((name) => ({
      name,
      aliases: [],
      words: [],
      flags: () => flagsOf(node[name] ?? {}),
    })),
  ];
}

const USAGE = `Usage: bun run weft [flags] COMMAND

On the control server (--data DIR, --socket PATH, -c FILE, or --address URL; -o json|json-line|yaml):
${ADMIN_USAGE}
  policy ${POLICY.usage}

A server:
${Object.entries(LOCAL)
  .map(([name, { usage, about }]) => `  ${`${name} ${usage}`.padEnd(28)} ${about}`)
  .join("\n")}

On a node (--socket PATH, default /run/weft/weft.sock):
  ${Object.entries(NODE_USAGE)
    .map(([name, usage]) => `${name} ${usage}`.trim())
    .join(" | ")}

\`weft COMMAND --help\` says more.`;

export async function main(argv: string[]): Promise<number> {
  const command = commandOf(argv);
  const known = commandNames();
  if (command === undefined) {
    if (argv.some((arg) => /^(-h|--?help)$/.test(arg))) {
      console.log(USAGE);
      return 0;
    }
    throw new UsageError(`which command? It is one of ${known.join(", ")}`);
  }
  if (isAdminCommand(command)) return adminMain(argv);
  if (command === "policy") return POLICY.main(argv);
  const [, local] =
    Object.entries(LOCAL).find(([name, { aliases }]) => name === command || aliases?.includes(command)) ?? [];
  if (local) return local.main(argv.toSpliced(argv.indexOf(command), 1));
  if (Object.hasOwn(NODE_USAGE, command)) return (await import("./client.ts")).main(argv);
  const near = nearest(command, known);
  throw new UsageError(
    `unknown command ${JSON.stringify(command)}${near ? `: did you mean "${near}"?` : ""} (weft --help lists them)`,
  );
}
