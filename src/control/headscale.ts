// What Headscale's database says (its schema of 0.28 and later: spec/headscale-features.md, section 8), as one Change to an
// empty tailnet: users, nodes with their keys, addresses and routes, pre-auth keys, API keys, the policy. It is only read.
//
//   node keys, ids, addresses   as they are: with Headscale's Noise key, nodes go on without a login
//   secrets                     as bcrypt hashes, which secret.ts proves as well
//   OAuth clients and tokens, keys in clear text of Headscale before 0.28: left out, each with a note
import { Database } from "bun:sqlite";
import { existsSync } from "node:fs";
import { SQL } from "bun";
import { parseKey } from "../crypto/keys.ts";
import { formatPrefix, maskPrefix, parsePrefix } from "../wire/ip.ts";
import type { Hostinfo } from "../wire/tailcfg.ts";
import { type Change, type DocumentChange, type Millis, Model, type NodeRecord, type RegisterMethod } from "./model.ts";
import { labelOf, labelProblem, tagProblem, uniqueLabel } from "./names.ts";
import { addressNumber } from "./policy/addresses.ts";
import { MAX_POLICY_BYTES } from "./policy/hujson.ts";
import { homeDerpOf } from "./requests.ts";
import type { StoreSettings } from "./store.ts";
import { connectionOf, type PostgresSettings } from "./store-postgres.ts";

type Row = Record<string, unknown>;

const TABLES = ["users", "pre_auth_keys", "api_keys", "nodes", "policies"] as const;
/** Where they exist: of Headscale 0.30, and of every database with AUTOINCREMENT. */
const MORE_TABLES = ["oauth_clients", "sqlite_sequence"] as const;
type Table = (typeof TABLES)[number] | (typeof MORE_TABLES)[number];

/** Rows as the database has them, by id; those that are marked as deleted, too. */
export type HeadscaleRows = Record<Table, Row[]>;

/** Columns without which it is the database of another program, or of an older Headscale. */
const NEEDED: Partial<Record<Table, readonly string[]>> = {
  users: ["provider_identifier"],
  pre_auth_keys: ["prefix", "hash"],
  nodes: ["machine_key", "node_key", "approved_routes", "tags"],
};

export interface HeadscaleDatabase {
  tables: readonly string[];
  /** Null: it is another program's. */
  rows: HeadscaleRows | null;
}

export interface HeadscaleTailnet {
  change: Change;
  /** What was left out or changed on the way, each one sentence. */
  notes: string[];
}

/** Whether these are the tables of Headscale, in which Weft must not write. */
export function isHeadscale(tables: readonly string[]): boolean {
  return ["migrations", "pre_auth_keys", "api_keys", "nodes"].every((name) => tables.includes(name));
}

// ---- reading ----

/** What is in a database. Throws with one sentence, also when a server has the SQLite file open. */
export async function readHeadscale(store: StoreSettings): Promise<HeadscaleDatabase> {
  const place = store.type === "sqlite" ? store.path : `the PostgreSQL database ${store.database} at ${store.host}`;
  try {
    return store.type === "sqlite" ? readSqlite(store.path) : await readPostgres(store);
  } catch (error) {
    throw new Error(`${place} cannot be taken over: ${(error as Error).message}`);
  }
}

function readSqlite(path: string): HeadscaleDatabase {
  if (!existsSync(path)) throw new Error("there is no such file");
  const database = new Database(path, { readwrite: true, create: false });
  try {
    // Taken with the first look, and not to be had while another program has the file open.
    database.run("PRAGMA locking_mode = EXCLUSIVE");
    const names = database.query<{ name: string }, []>("select name from sqlite_master where type = 'table'").all();
    return rowsOf(
      names.map(({ name }) => name),
      (table) => database.query<Row, []>(`select * from ${table}`).all(),
      (table) => {
        const columns = database.query<{ name: string }, []>(`pragma table_info(${table})`).all();
        return columns.map(({ name }) => name);
      },
    );
  } catch (error) {
    if (String((error as { code?: unknown }).code).startsWith("SQLITE_BUSY"))
      throw new Error("a server has it open: stop it first");
    throw error;
  } finally {
    database.close();
  }
}

async function readPostgres(settings: PostgresSettings): Promise<HeadscaleDatabase> {
  const sql = new SQL(connectionOf(settings));
  try {
    const columns: { table_name: string; column_name: string }[] = await sql.unsafe(
      "select table_name, column_name from information_schema.columns where table_schema = current_schema()",
    );
    const names = [...new Set(columns.map(({ table_name }) => table_name))];
    const found = new Map<string, Row[]>();
    for (const table of [...TABLES, ...MORE_TABLES])
      if (names.includes(table)) found.set(table, [...(await sql.unsafe(`select * from ${table}`))]);
    return rowsOf(
      names,
      (table) => found.get(table)!,
      (table) => columns.filter(({ table_name }) => table_name === table).map(({ column_name }) => column_name),
    );
  } finally {
    await sql.close({ timeout: 0 });
  }
}

function rowsOf(
  names: readonly string[],
  rows: (table: Table) => Row[],
  columns: (table: Table) => string[],
): HeadscaleDatabase {
  if (!isHeadscale(names)) return { tables: names, rows: null };
  for (const [table, needed] of Object.entries(NEEDED)) {
    const missing = needed.find((name) => !columns(table as Table).includes(name));
    if (missing !== undefined)
      throw new Error(
        `its table ${table} has no column ${missing}: it was written by a Headscale before 0.28; start that version once, which brings it up to date`,
      );
  }
  const all = [...TABLES, ...MORE_TABLES].map((table) => {
    const found = names.includes(table) ? rows(table) : [];
    return [table, found.sort((a, b) => Number(a.id) - Number(b.id))];
  });
  return { tables: names, rows: Object.fromEntries(all) as HeadscaleRows };
}

// ---- values, which SQLite and PostgreSQL give in different types ----

function textOf(value: unknown): string {
  if (value instanceof Uint8Array) return new TextDecoder().decode(value);
  return typeof value === "string" ? value : "";
}

function flagOf(value: unknown): boolean {
  return value === true || Number(value) === 1;
}

const TIME = /^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,3})?)\d* ?(Z|[+-]\d\d:?\d\d)/;

/** Null for what is not set, for which Headscale also writes the year 1. */
function timeOf(value: unknown): Millis | null {
  const [, day, clock, zone] = TIME.exec(textOf(value)) ?? [];
  const millis = value instanceof Date ? value.getTime() : Date.parse(`${day}T${clock}${zone}`);
  return Number.isNaN(millis) || millis <= 0 ? null : millis;
}

function jsonOf(value: unknown): unknown {
  try {
    return JSON.parse(textOf(value));
  } catch {
    return null;
  }
}

function listOf(value: unknown): string[] {
  const list = jsonOf(value);
  return Array.isArray(list) ? list.filter((item): item is string => typeof item === "string") : [];
}

function routesOf(value: unknown): string[] {
  const masked = listOf(value).flatMap((text) => {
    const prefix = parsePrefix(text);
    return prefix ? [formatPrefix(maskPrefix(prefix))] : [];
  });
  return [...new Set(masked)].sort();
}

function tagsOf(value: unknown): string[] {
  return [...new Set(listOf(value).filter((tag) => tagProblem(tag) === null))].sort();
}

/** As oidc.ts writes it: Headscale writes the same as a URL, in which a "|" of the subject is "%7C". */
function providerIdOf(value: unknown): string {
  const text = textOf(value);
  try {
    return decodeURI(text);
  } catch {
    return text;
  }
}

// ---- meaning ----

const METHODS: readonly string[] = ["authkey", "cli", "oidc"];
const NEW_KEY = /^[\w-]{12}$/;

function isAlive(row: Row): boolean {
  return !row.deleted_at;
}

/** Pure. `now`: of records that say nothing about when they were made. */
export function tailnetOf(rows: HeadscaleRows, now: Millis): HeadscaleTailnet {
  const notes: string[] = [];
  const users = rows.users.filter(isAlive).map((row) => ({
    id: Number(row.id),
    name: textOf(row.name),
    displayName: textOf(row.display_name),
    email: textOf(row.email),
    profilePicUrl: textOf(row.profile_pic_url),
    provider: textOf(row.provider_identifier) === "" ? "" : "oidc",
    providerId: providerIdOf(row.provider_identifier),
    groups: [],
    role: "member" as const,
    status: "active" as const,
    createdAt: timeOf(row.created_at) ?? now,
  }));
  const isUser = (id: unknown): id is number => users.some((user) => user.id === Number(id));
  const usable = rows.pre_auth_keys.filter((row) => NEW_KEY.test(textOf(row.prefix)));
  const old = rows.pre_auth_keys.length - usable.length;
  if (old > 0) notes.push(`${old} pre-auth keys in clear text, of Headscale before 0.28, are left out: make new ones`);
  const keys = usable.map((row) => ({
    id: Number(row.id),
    prefix: textOf(row.prefix),
    hash: textOf(row.hash),
    userId: isUser(row.user_id) ? Number(row.user_id) : null,
    reusable: flagOf(row.reusable),
    ephemeral: flagOf(row.ephemeral),
    used: flagOf(row.used),
    tags: tagsOf(row.tags),
    description: textOf(row.description),
    preauthorized: false,
    expiration: timeOf(row.expiration),
    revokedAt: timeOf(row.revoked),
    createdAt: timeOf(row.created_at) ?? now,
  }));
  const model = new Model();
  model.apply({ users, keys });
  const ephemeralKeys = new Set(rows.pre_auth_keys.filter((row) => flagOf(row.ephemeral)).map(({ id }) => Number(id)));
  for (const row of rows.nodes.filter(isAlive)) {
    const node = nodeOf(row, model, ephemeralKeys.has(Number(row.auth_key_id)), now);
    const problem = typeof node === "string" ? node : problemOf(node, model);
    if (problem !== null) notes.push(`node ${row.id} (${textOf(row.hostname)}) is left out: ${problem}`);
    else model.apply({ nodes: [node as NodeRecord] });
  }
  const { documents, left } = documentsOf(rows, now);
  if (rows.oauth_clients.length > 0)
    notes.push(`${rows.oauth_clients.length} OAuth clients are left out: make new ones (weft oauth-clients create)`);
  const nodes = model.sortedNodes();
  const lastId = (table: Table) =>
    Math.max(
      0,
      ...rows[table].map(({ id }) => Number(id)),
      ...rows.sqlite_sequence.filter(({ name }) => name === table).map(({ seq }) => Number(seq)),
    );
  const lastAddress = (addresses: string[]) =>
    addresses
      .filter((ip) => ip !== "")
      .reduce((last, ip) => (last === "" || addressNumber(ip)! > addressNumber(last)! ? ip : last), "");
  const counters = {
    lastUser: lastId("users"),
    lastKey: lastId("pre_auth_keys"),
    lastNode: lastId("nodes"),
    lastIPv4: lastAddress(nodes.map(({ ipv4 }) => ipv4)),
    lastIPv6: lastAddress(nodes.map(({ ipv6 }) => ipv6)),
  };
  const apiKeys: DocumentChange = { kind: "sequence", id: "apikey", value: lastId("api_keys") };
  return { change: { users, keys, nodes, documents: [...documents, apiKeys], counters }, notes: [...notes, ...left] };
}

/** The node, or why it is none. */
function nodeOf(row: Row, model: Model, ephemeral: boolean, now: Millis): NodeRecord | string {
  const { machine_key: machineKey, node_key: nodeKey, disco_key: discoKey } = row;
  if (!isKey("mkey", machineKey) || !isKey("nodekey", nodeKey)) return "it has no keys";
  const tags = tagsOf(row.tags);
  const hostname = textOf(row.hostname);
  const stated = textOf(row.given_name);
  const label = labelOf(hostname);
  const method = textOf(row.register_method);
  const hostinfo = hostinfoOf(row.host_info);
  const expiry = tags.length > 0 ? null : timeOf(row.expiry);
  const userId = model.users.has(Number(row.user_id)) ? Number(row.user_id) : null;
  if (userId === null && tags.length === 0) return "it has neither a user nor tags";
  return {
    id: Number(row.id),
    machineKey,
    nodeKey,
    discoKey: isKey("discokey", discoKey) ? discoKey : "",
    userId: tags.length > 0 ? null : userId,
    tags,
    hostname,
    givenName: uniqueLabel(model, labelProblem(stated) === null ? stated : labelOf(stated || hostname)),
    // Headscale makes names unique by a number, or, before 0.29, by random letters.
    nameFromHost: stated === label || new RegExp(`^${label}-[a-z0-9]{1,8}$`).test(stated),
    ipv4: textOf(row.ipv4),
    ipv6: textOf(row.ipv6),
    endpoints: listOf(row.endpoints),
    hostinfo,
    homeDerp: homeDerpOf(hostinfo) ?? 0,
    cap: 0,
    ephemeral,
    registerMethod: METHODS.includes(method) ? (method as RegisterMethod) : "cli",
    authorized: true,
    approvedRoutes: routesOf(row.approved_routes),
    attributes: {},
    authKeyId: model.keys.has(Number(row.auth_key_id)) ? Number(row.auth_key_id) : null,
    expiry,
    createdAt: timeOf(row.created_at) ?? now,
    lastSeen: timeOf(row.last_seen),
    online: false,
    expired: expiry !== null && expiry <= now,
    suspended: false,
  };
}

function isKey(kind: "mkey" | "nodekey" | "discokey", text: unknown): text is string {
  const key = typeof text === "string" ? parseKey(kind, text) : null;
  return key?.some((byte) => byte !== 0) ?? false;
}

function hostinfoOf(value: unknown): Hostinfo {
  const info = jsonOf(value);
  return typeof info === "object" && info !== null && !Array.isArray(info) ? (info as Hostinfo) : {};
}

/** Why it cannot stand beside those that are there; null when it can. */
function problemOf(node: NodeRecord, model: Model): string | null {
  const holder = model.nodeByKey(node.nodeKey);
  if (holder) return `node ${holder.id} has the same node key`;
  if (node.ipv4 === "" && node.ipv6 === "") return "it has no address";
  const taken = [node.ipv4, node.ipv6].find((ip) => ip !== "" && (addressNumber(ip) === null || model.hasAddress(ip)));
  return taken === undefined ? null : `its address ${taken} is none, or another node's`;
}

function documentsOf(rows: HeadscaleRows, now: Millis): { documents: DocumentChange[]; left: string[] } {
  const left: string[] = [];
  const usable = rows.api_keys.filter((row) => NEW_KEY.test(textOf(row.prefix)));
  if (usable.length < rows.api_keys.length)
    left.push(
      `${rows.api_keys.length - usable.length} API keys of Headscale before 0.28 are left out: make new ones (weft apikeys create)`,
    );
  const documents = usable.map((row): DocumentChange => {
    const value = {
      id: Number(row.id),
      prefix: textOf(row.prefix),
      hash: textOf(row.hash),
      createdAt: timeOf(row.created_at) ?? now,
      expiration: timeOf(row.expiration),
      lastSeen: timeOf(row.last_seen),
    };
    return { kind: "apikey", id: value.prefix, value };
  });
  const policy = rows.policies.findLast(isAlive);
  const text = textOf(policy?.data);
  if (Buffer.byteLength(text) > MAX_POLICY_BYTES) left.push("the policy is left out: it is too large");
  else if (policy && text !== "")
    documents.push({
      kind: "policy",
      id: "1",
      value: { text, by: "Headscale", at: timeOf(policy.updated_at) ?? now },
    });
  return { documents, left };
}
