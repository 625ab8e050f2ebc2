// The administrator's verbs of `bun run weft`: users, preauthkeys and nodes in Headscale's words, over the control server's
// unix socket (spec/headscale-features.md, section 3).
import { join } from "node:path";
import { createInterface } from "node:readline/promises";
import type { ApiNode, ApiPreAuthKey, ApiUser } from "../control/api/shapes.ts";
import { type FlagSpec, type Flags, nearest, parseFlags, UsageError } from "./flags.ts";
import { parseFormat, serialize, showTime, table } from "./output.ts";
import { defaultDataDir } from "./serve.ts";

export const ADMIN_USAGE = `  users create NAME [-d DISPLAY-NAME] [-e EMAIL] [-p PICTURE-URL]
  users list [-i ID] [-n NAME] [-e EMAIL]
  users destroy -i ID | -n NAME
  preauthkeys create [-u USER] [--reusable] [--ephemeral] [--tags tag:a,tag:b] [-e 24h]
  preauthkeys list [-u USER]
  preauthkeys expire --id ID
  nodes list [-u USER]
  nodes expire -i ID [-e TIME | --disable]
  nodes rename -i ID NEW-NAME
  nodes delete -i ID`;

const USAGE = `Usage: bun run weft [--data DIR | --socket PATH] [-o json|json-line|yaml] COMMAND

${ADMIN_USAGE}

  --data DIR     data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --socket PATH  its admin socket (default DIR/weft.sock)
  --force        ask no questions`;

const GLOBAL = {
  data: "string",
  socket: "string",
  output: { kind: "string", short: "o" },
  force: "boolean",
  help: { kind: "boolean", short: "h" },
} as const satisfies Record<string, FlagSpec["kind"] | FlagSpec>;

/** What a command did: `value` for programs, `text` for people. */
interface Result {
  value: unknown;
  text: string;
}

type GlobalFlags = Flags<typeof GLOBAL>;
interface Verb {
  aliases: string[];
  run(api: Api, argv: string[], command: string): Promise<Result>;
}

const TEXT = "string";
const identifier = { kind: TEXT, short: "i" } as const;
const user = { kind: TEXT, short: "u" } as const;

const users: Record<string, Verb> = {
  create: {
    aliases: ["c", "new"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 1, {
        "display-name": { kind: TEXT, short: "d" },
        email: { kind: TEXT, short: "e" },
        "picture-url": { kind: TEXT, short: "p" },
      });
      const name = flags._[0];
      if (name === undefined) throw new UsageError("which user? `users create NAME`");
      const body = { name, displayName: flags["display-name"], email: flags.email, pictureUrl: flags["picture-url"] };
      const created = await api.call<{ user: ApiUser }>("POST", "/user", body);
      return { value: created.user, text: "User created" };
    },
  },
  list: {
    aliases: ["ls", "show"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 0, {
        identifier,
        name: { kind: TEXT, short: "n" },
        email: { kind: TEXT, short: "e" },
      });
      const query = new URLSearchParams();
      if (flags.identifier !== undefined) query.set("id", flags.identifier);
      if (flags.name !== undefined) query.set("name", flags.name);
      if (flags.email !== undefined) query.set("email", flags.email);
      const { users } = await api.call<{ users: ApiUser[] }>("GET", `/user?${query}`);
      const rows = users.map((u) => [u.id, u.displayName, u.name, u.email, showTime(u.createdAt, "")]);
      return { value: users, text: table(["ID", "Name", "Username", "Email", "Created"], rows) };
    },
  },
  destroy: {
    aliases: ["delete"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 1, { identifier, name: { kind: TEXT, short: "n" } });
      const wanted = flags.identifier ?? flags.name ?? flags._[0];
      if (wanted === undefined) throw new UsageError("which user? `users destroy -i ID` or `users destroy -n NAME`");
      const found = await api.findUser(wanted, flags.identifier === undefined);
      await api.confirm(flags, `Destroy the user "${found.name}" (ID ${found.id})?`);
      return { value: await api.call("DELETE", `/user/${found.id}`), text: "User destroyed" };
    },
  },
};

const preauthkeys: Record<string, Verb> = {
  create: {
    aliases: ["c", "new"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 0, {
        user,
        reusable: "boolean",
        ephemeral: "boolean",
        tags: "list",
        expiration: { kind: "duration", short: "e" },
      });
      const owner = flags.user === undefined ? undefined : (await api.findUser(flags.user, true)).id;
      const lifetime = flags.expiration ?? 3_600_000;
      if (lifetime <= 0) throw new UsageError("--expiration must be a time from now, for example 24h");
      const { preAuthKey } = await api.call<{ preAuthKey: ApiPreAuthKey }>("POST", "/preauthkey", {
        user: owner,
        reusable: flags.reusable ?? false,
        ephemeral: flags.ephemeral ?? false,
        aclTags: flags.tags ?? [],
        expiration: new Date(Date.now() + lifetime).toISOString(),
      });
      return { value: preAuthKey, text: preAuthKey.key };
    },
  },
  list: {
    aliases: ["ls", "show"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 0, { user });
      const owner = flags.user === undefined ? undefined : (await api.findUser(flags.user, true)).id;
      const { preAuthKeys } = await api.call<{ preAuthKeys: ApiPreAuthKey[] }>("GET", "/preauthkey");
      const keys = preAuthKeys.filter((key) => owner === undefined || key.user?.id === owner);
      const rows = keys.map((key) => [
        key.id,
        key.key,
        String(key.reusable),
        String(key.ephemeral),
        String(key.used),
        showTime(key.expiration, "-"),
        showTime(key.createdAt, "-"),
        key.aclTags.length > 0 ? key.aclTags.join(",") : (key.user?.name ?? "-"),
      ]);
      const header = ["ID", "Key/Prefix", "Reusable", "Ephemeral", "Used", "Expiration", "Created", "Owner"];
      return { value: keys, text: table(header, rows) };
    },
  },
  expire: {
    aliases: ["revoke", "exp", "e"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 1, { id: identifier });
      const wanted = flags.id ?? flags._[0];
      if (wanted === undefined) throw new UsageError("which key? `preauthkeys expire --id ID`");
      const id = /^\d+$/.test(wanted) ? wanted : await api.findKey(wanted);
      return { value: await api.call("POST", "/preauthkey/expire", { id }), text: "Key expired" };
    },
  },
};

const nodes: Record<string, Verb> = {
  list: {
    aliases: ["ls", "show"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 0, { user });
      const query = flags.user === undefined ? "" : `?${new URLSearchParams({ user: flags.user })}`;
      const { nodes } = await api.call<{ nodes: ApiNode[] }>("GET", `/node${query}`);
      return { value: nodes, text: nodesTable(nodes) };
    },
  },
  expire: {
    aliases: ["logout", "exp", "e"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 1, {
        identifier,
        expiry: { kind: TEXT, short: "e" },
        disable: { kind: "boolean", short: "d" },
      });
      const id = wantedNode(flags.identifier ?? flags._[0], "expire");
      if (flags.expiry !== undefined && Number.isNaN(Date.parse(flags.expiry)))
        throw new UsageError(
          `--expiry ${JSON.stringify(flags.expiry)} is not a time: write it as 2027-01-31T12:00:00Z`,
        );
      const body = flags.disable
        ? { disableExpiry: true }
        : { expiry: new Date(flags.expiry === undefined ? Date.now() : Date.parse(flags.expiry)).toISOString() };
      const { node } = await api.call<{ node: ApiNode }>("POST", `/node/${id}/expire`, body);
      return { value: node, text: flags.disable ? "Node expiry disabled" : "Node expired" };
    },
  },
  rename: {
    aliases: [],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 2, { identifier });
      const [first, second] = flags._;
      const id = wantedNode(flags.identifier ?? first, "rename");
      const name = flags.identifier === undefined ? second : first;
      if (name === undefined) throw new UsageError("which name? `nodes rename -i ID NEW-NAME`");
      const path = `/node/${id}/rename/${encodeURIComponent(name)}`;
      const { node } = await api.call<{ node: ApiNode }>("POST", path);
      return { value: node, text: "Node renamed" };
    },
  },
  delete: {
    aliases: ["del"],
    async run(api, argv, command) {
      const flags = api.parse(command, argv, 1, { identifier });
      const id = wantedNode(flags.identifier ?? flags._[0], "delete");
      const { node } = await api.call<{ node: ApiNode }>("GET", `/node/${id}`);
      await api.confirm(flags, `Delete the node "${node.givenName}" (ID ${node.id})?`);
      return { value: await api.call("DELETE", `/node/${id}`), text: "Node deleted" };
    },
  },
};

const nouns: Record<string, { aliases: string[]; verbs: Record<string, Verb> }> = {
  users: { aliases: ["user"], verbs: users },
  preauthkeys: { aliases: ["preauthkey", "authkey", "pre"], verbs: preauthkeys },
  nodes: { aliases: ["node"], verbs: nodes },
};

/** Flags of all commands that take a value: they may stand before the command. */
const VALUE_FLAGS = new Set(
  "data socket output o user u expiration e tags identifier i id name n email display-name d picture-url p expiry".split(
    " ",
  ),
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

function named<T extends { aliases: string[] }>(table: Record<string, T>, word: string): [string, T] | undefined {
  return Object.entries(table).find(([name, entry]) => name === word || entry.aliases.includes(word));
}

export function isAdminCommand(word: string): boolean {
  return named(nouns, word) !== undefined;
}

export const ADMIN_COMMANDS = Object.keys(nouns);

export async function adminMain(argv: string[]): Promise<number> {
  const [nounWord, verbWord] = wordsOf(argv);
  const found = named(nouns, nounWord?.word ?? "");
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
  const api = new Api();
  const result = await verb[1].run(api, rest, `weft ${noun} ${verb[0]}`).catch((error: unknown) => {
    if (error instanceof HelpWanted) return null;
    throw error;
  });
  if (!result) console.log(USAGE);
  else console.log(api.format === "table" ? result.text : serialize(result.value, api.format));
  return 0;
}

class HelpWanted extends Error {}

/** The control server behind its socket, with the flags that every command has. */
class Api {
  format: ReturnType<typeof parseFormat> = "table";
  private socket = "";

  parse<const S extends Record<string, FlagSpec["kind"] | FlagSpec>>(
    command: string,
    argv: string[],
    positional: number,
    spec: S,
  ): Flags<S> & GlobalFlags {
    const flags = parseFlags(command, argv, { ...GLOBAL, ...spec }, USAGE, positional) as Flags<S> & GlobalFlags;
    if (flags.help) throw new HelpWanted();
    this.format = parseFormat(flags.output);
    this.socket = flags.socket ?? join(flags.data ?? defaultDataDir(), "weft.sock");
    return flags;
  }

  async call<T = unknown>(method: string, path: string, body?: unknown): Promise<T> {
    let response: Response;
    try {
      response = await fetch(`http://weft/api/v1${path}`, {
        method,
        unix: this.socket,
        ...(body !== undefined && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }),
      });
    } catch {
      throw new Error(
        `no control server answers at ${this.socket}: start one (bun run box --data DIR), or name its data folder with --data DIR`,
      );
    }
    const answer = (await response.json().catch(() => null)) as (T & { detail?: string }) | null;
    if (!response.ok) throw new Error(answer?.detail ?? `the control server answered ${response.status}`);
    if (answer === null) throw new Error(`${this.socket} does not speak the control server's API`);
    return answer;
  }

  /** By id, or by name where that is allowed. */
  async findUser(wanted: string, byName: boolean): Promise<ApiUser> {
    const { users } = await this.call<{ users: ApiUser[] }>("GET", "/user");
    const found = users.find((one) => one.id === wanted) ?? users.find((one) => byName && one.name === wanted);
    if (found) return found;
    const near = nearest(
      wanted,
      users.map((one) => one.name),
    );
    throw new Error(
      `there is no user ${JSON.stringify(wanted)}${near ? `: did you mean "${near}"?` : ": `weft users list` shows those that exist"}`,
    );
  }

  /** Id of the pre-auth key whose text, or masked text, this is. */
  async findKey(text: string): Promise<string> {
    const prefix = /^hskey-auth-([0-9a-f]{12})(-|$)/.exec(text)?.[1];
    const { preAuthKeys } = await this.call<{ preAuthKeys: ApiPreAuthKey[] }>("GET", "/preauthkey");
    const found = preAuthKeys.find((key) => prefix !== undefined && key.key.startsWith(`hskey-auth-${prefix}-`));
    if (!found) throw new Error("there is no such pre-auth key: `weft preauthkeys list` shows those that exist");
    return found.id;
  }

  /** Asks a person at a terminal; scripts are taken at their word. */
  async confirm(flags: GlobalFlags, question: string): Promise<void> {
    if (flags.force || !process.stdin.isTTY || !process.stderr.isTTY) return;
    const terminal = createInterface({ input: process.stdin, output: process.stderr });
    const answer = await terminal.question(`${question} [y/N] `);
    terminal.close();
    if (!/^y(es)?$/i.test(answer.trim())) throw new Error("nothing was changed");
  }
}

function wantedNode(text: string | undefined, verb: string): string {
  if (text === undefined) throw new UsageError(`which node? \`nodes ${verb} -i ID\``);
  if (!/^\d{1,15}$/.test(text))
    throw new UsageError(`${JSON.stringify(text)} is not the ID of a node: \`weft nodes list\` shows them`);
  return text;
}

function nodesTable(list: ApiNode[]): string {
  const header =
    "ID,Hostname,Name,MachineKey,NodeKey,User,Tags,IP addresses,Ephemeral,Last seen,Expiration,Connected,Expired".split(
      ",",
    );
  const rows = list.map((node) => [
    node.id,
    node.name,
    node.givenName,
    shortKey(node.machineKey),
    shortKey(node.nodeKey),
    node.user.name,
    node.tags.join(","),
    node.ipAddresses.join(", "),
    String(node.ephemeral),
    showTime(node.lastSeen, "-"),
    showTime(node.expiry, "N/A"),
    node.online ? "online" : "offline",
    node.expiry !== null && Date.parse(node.expiry) <= Date.now() ? "yes" : "no",
  ]);
  return table(header, rows);
}

/** "[AbCdE]", as Tailscale's tools abbreviate keys. */
function shortKey(text: string): string {
  const digits = text.slice(text.indexOf(":") + 1);
  return `[${Buffer.from(digits, "hex").toString("base64").slice(0, 5)}]`;
}
