// `weft import SOURCE`: takes over what a Headscale that does not run any more has in its database (control/headscale.ts), or
// another Weft, from one kind of database into the other.
import { closeSync, existsSync, openSync, readFileSync, readSync, renameSync } from "node:fs";
import { dirname, join } from "node:path";
import { prepareDataDir } from "../control/datadir.ts";
import { type HeadscaleTailnet, readHeadscale, tailnetOf } from "../control/headscale.ts";
import { openStore } from "../control/index.ts";
import type { Change } from "../control/model.ts";
import { PolicyError, parsePolicy } from "../control/policy/index.ts";
import { Store, type StoreSettings } from "../control/store.ts";
import { databaseFiles } from "../control/store-sqlite.ts";
import { parseKey } from "../crypto/keys.ts";
import { writeAtomically } from "../net/keyfile.ts";
import { parseIP, parsePrefix, prefixContains } from "../wire/ip.ts";
import { loadConfig, type ServerConfig } from "./config.ts";
import { parseFlags, UsageError } from "./flags.ts";
import { own } from "./restore.ts";
import { makeFolderOf } from "./serve.ts";

const USAGE = `Usage: bun run weft import SOURCE [flags]

Takes over users, nodes, pre-auth keys, API keys and the policy of a Headscale (0.28 or later), and its Noise key, so that its
nodes go on without a login; or everything of another Weft, between SQLite and PostgreSQL. SOURCE is the configuration file
of that server, or its SQLite database, which stays as it is. Neither server may run, and the one here has no users yet.

  -c, --config FILE   configuration of the server here
  --data DIR          its data folder (default $WEFT_DATA or /var/lib/weft)
  --noise-key FILE    the Noise key of SOURCE (default: as its configuration says, or noise_private.key beside the database)`;

export const FLAGS = {
  config: { kind: "string", short: "c" },
  data: "string",
  "noise-key": "string",
  help: { kind: "boolean", short: "h" },
} as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft import", argv, FLAGS, USAGE, 1);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const [from] = flags._;
  if (from === undefined) throw new UsageError("which Headscale? `weft import /etc/headscale/config.yaml`");
  const config = loadConfig({
    config: flags.config,
    overrides: { data_dir: { flag: "--data", value: flags.data } },
  });
  const source = sourceOf(from, flags["noise-key"]);
  for (const line of await takeOver(source, config)) console.log(line);
  return 0;
}

interface Source {
  store: StoreSettings;
  noiseKeyPath: string;
  /** Its own configuration; null: the database was named alone. */
  config: ServerConfig | null;
}

function sourceOf(path: string, noiseKey: string | undefined): Source {
  if (startOf(path) === "SQLite format 3\0")
    return {
      store: { type: "sqlite", path },
      noiseKeyPath: noiseKey ?? join(dirname(path), "noise_private.key"),
      config: null,
    };
  // What is set for the server here says nothing about that one.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => name.startsWith("HEADSCALE_")));
  const config = loadConfig({ config: path, env });
  const { store: named } = config.settings;
  const isDefault = named.type === "sqlite" && named.path === "";
  const store = isDefault ? { type: "sqlite" as const, path: join(config.dataDir, "weft.sqlite") } : named;
  return { store, noiseKeyPath: noiseKey ?? config.noiseKeyPath, config };
}

/** The first 16 bytes of a file. */
function startOf(path: string): string {
  const bytes = new Uint8Array(16);
  try {
    const file = openSync(path, "r");
    readSync(file, bytes);
    closeSync(file);
  } catch (error) {
    throw new UsageError(`${path} cannot be read: ${(error as Error).message}`);
  }
  return new TextDecoder("latin1").decode(bytes);
}

/** What was done, in lines. Throws with one sentence; then nobody is on the server here as before. */
async function takeOver(source: Source, config: ServerConfig): Promise<string[]> {
  const { settings, dataDir, noiseKeyPath } = config;
  const { change, notes } = await read(source.store);
  const key = noiseKeyOf(source.noiseKeyPath);
  prepareDataDir(dataDir);
  const store = await openStore({ dataDir, settings });
  let lines: string[];
  try {
    const { users, nodes, keys } = await store.load();
    const there = (users?.length ?? 0) + (nodes?.length ?? 0) + (keys?.length ?? 0);
    if (there > 0)
      throw new Error(
        `${store.place} has users, nodes or pre-auth keys already: a tailnet is taken over into an empty one`,
      );
    // Nobody knows the key of an empty tailnet.
    lines = putNoiseKey(noiseKeyPath, key, dataDir);
    await store.write([change]);
    lines = [`${countsOf(change)} are in ${store.place}`, ...lines];
  } finally {
    await store.close();
  }
  if (settings.store.type === "sqlite")
    for (const file of databaseFiles(settings.store.path || join(dataDir, "weft.sqlite"))) own(file, dataDir);
  return [...lines, ...notes, ...advice(change, source.config, config)];
}

async function read(settings: StoreSettings): Promise<HeadscaleTailnet> {
  const { tables, rows } = await readHeadscale(settings);
  if (rows) return tailnetOf(rows, Date.now());
  const place = settings.type === "sqlite" ? settings.path : settings.database;
  if (!["kysely_migration", "counters", "documents"].every((name) => tables.includes(name)))
    throw new Error(`${place} is a database neither of Headscale nor of Weft`);
  const store = await Store.open(settings);
  try {
    return { change: await store.load(), notes: [] };
  } finally {
    await store.close();
  }
}

function noiseKeyOf(path: string): string {
  let text: string;
  try {
    text = readFileSync(path, "utf8").trim();
  } catch (error) {
    throw new Error(
      `the Noise key cannot be read, without which every node would have to log in again: ${(error as Error).message}; name it with --noise-key`,
    );
  }
  if (!parseKey("privkey", text)) throw new Error(`${path} is no Noise key: it must hold "privkey:" and 64 hex digits`);
  return text;
}

function putNoiseKey(path: string, key: string, dataDir: string): string[] {
  const isThere = existsSync(path);
  if (isThere && readFileSync(path, "utf8").trim() === key) return [];
  makeFolderOf(path);
  if (isThere) renameSync(path, `${path}.replaced`);
  writeAtomically(path, `${key}\n`);
  own(path, dataDir);
  return [`its Noise key is ${path} now${isThere ? `; the one before, which no node knew, is ${path}.replaced` : ""}`];
}

function countsOf({ users = [], nodes = [], keys = [], documents = [] }: Change): string {
  const of = (kind: string) => documents.filter((document) => document.kind === kind).length;
  const counts = [`${users.length} users`, `${nodes.length} nodes`, `${keys.length} pre-auth keys`];
  return `${counts.join(", ")}, ${of("apikey")} API keys and ${of("policy") === 0 ? "no" : "the"} policy`;
}

/** What in the configuration here does not fit to what was taken over. */
function advice({ nodes = [], documents = [] }: Change, theirs: ServerConfig | null, ours: ServerConfig): string[] {
  const { prefixes, policy, baseDomain } = ours.settings;
  const lines: string[] = [];
  for (const family of ["v4", "v6"] as const) {
    const prefix = prefixes[family] === null ? null : parsePrefix(prefixes[family]);
    const outside = nodes
      .map((node) => (family === "v4" ? node.ipv4 : node.ipv6))
      .filter((ip) => {
        const address = ip === "" ? null : parseIP(ip);
        return address && !(prefix && prefixContains(prefix, address));
      });
    if (outside.length > 0)
      lines.push(
        `${outside.length} addresses like ${outside[0]} are outside of prefixes.${family} of the configuration: set it as Headscale has it`,
      );
  }
  const stored = documents
    .filter((document) => document.kind === "policy")
    .toSorted((a, b) => Number(b.id) - Number(a.id))[0];
  if (stored && policy.mode === "file")
    lines.push("the policy was in the database: set policy.mode to database, or it is not in force");
  if (stored?.value && "text" in stored.value) {
    try {
      parsePolicy(stored.value.text, () => true);
    } catch (error) {
      if (!(error instanceof PolicyError)) throw error;
      lines.push(
        `the policy has to be changed before the server starts (weft policy set --bypass-server-and-access-database-directly -f FILE): ${error.describe()}`,
      );
    }
  }
  if (theirs === null) return lines;
  if (theirs.url.origin !== ours.url.origin)
    lines.push(`nodes look for ${theirs.url.origin}, and server_url is ${ours.url.origin}: they must be the same`);
  if (theirs.settings.baseDomain !== baseDomain)
    lines.push(`names of nodes ended in ${theirs.settings.baseDomain}, and dns.base_domain is ${baseDomain}`);
  if (theirs.settings.policy.path !== "" && policy.path !== theirs.settings.policy.path)
    lines.push(`its policy is the file ${theirs.settings.policy.path}: name it as policy.path, or set it`);
  return lines;
}
