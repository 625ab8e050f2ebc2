// The journal of the model: the same queries, through Kysely, on SQLite (store-sqlite.ts) and PostgreSQL
// (store-postgres.ts). What `write` has resolved is on disk. One server at a time, as long as the store is open.
import type { Kysely, Transaction } from "kysely";
import { type Migration, Migrator } from "kysely/migration";
import { isHeadscale } from "./headscale.ts";
import type { Change, Counters, DocumentChange, NodeRecord, UserRecord } from "./model.ts";
import { type Dialect, migrationsOf, type NodesTable, type Tables } from "./schema.ts";
import { type Engine, RefusedChange } from "./store-engine.ts";
import { openPostgres, type PostgresSettings } from "./store-postgres.ts";
import { openSqlite, type SqliteSettings } from "./store-sqlite.ts";

export type StoreSettings = SqliteSettings | PostgresSettings;

export interface StoreOptions {
  /** For what an operator should know of: a backup that was made. */
  log?: (line: string) => void;
  migrations?: (dialect: Dialect) => Record<string, Migration>;
}

/** Lists of a write are cut into pieces of this many rows: SQLite bounds the parameters of one statement. */
const ROWS_PER_STATEMENT = 500;

function rowOf(node: NodeRecord): NodesTable {
  return {
    id: node.id,
    machine_key: node.machineKey,
    node_key: node.nodeKey,
    disco_key: node.discoKey,
    user_id: node.userId,
    tags: JSON.stringify(node.tags),
    hostname: node.hostname,
    given_name: node.givenName,
    name_from_host: Number(node.nameFromHost),
    ipv4: node.ipv4 || null,
    ipv6: node.ipv6 || null,
    endpoints: JSON.stringify(node.endpoints),
    hostinfo: JSON.stringify(node.hostinfo),
    home_derp: node.homeDerp,
    cap: node.cap,
    ephemeral: Number(node.ephemeral),
    register_method: node.registerMethod,
    authorized: Number(node.authorized),
    approved_routes: JSON.stringify(node.approvedRoutes),
    attributes: JSON.stringify(node.attributes),
    auth_key_id: node.authKeyId,
    expiry: node.expiry,
    created_at: node.createdAt,
    last_seen: node.lastSeen,
  };
}

/** 64-bit integers come from PostgreSQL as text. */
function millis(value: number | null): number | null {
  return value === null ? null : Number(value);
}

function nodeOf(row: NodesTable): NodeRecord {
  return {
    id: row.id,
    machineKey: row.machine_key,
    nodeKey: row.node_key,
    discoKey: row.disco_key,
    userId: row.user_id,
    tags: JSON.parse(row.tags),
    hostname: row.hostname,
    givenName: row.given_name,
    nameFromHost: row.name_from_host === 1,
    ipv4: row.ipv4 ?? "",
    ipv6: row.ipv6 ?? "",
    endpoints: JSON.parse(row.endpoints),
    hostinfo: JSON.parse(row.hostinfo),
    homeDerp: row.home_derp,
    cap: row.cap,
    ephemeral: row.ephemeral === 1,
    registerMethod: row.register_method as NodeRecord["registerMethod"],
    authorized: row.authorized === 1,
    approvedRoutes: JSON.parse(row.approved_routes),
    attributes: JSON.parse(row.attributes),
    authKeyId: row.auth_key_id,
    expiry: millis(row.expiry),
    createdAt: Number(row.created_at),
    lastSeen: millis(row.last_seen),
    online: false,
    expired: false,
    suspended: false,
  };
}

export class Store {
  private readonly db: Kysely<Tables>;

  private constructor(private readonly engine: Engine) {
    this.db = engine.db;
  }

  /** Opens or makes the database and brings its schema up to date, after a backup. Throws with one sentence. */
  static async open(settings: StoreSettings, options: StoreOptions = {}): Promise<Store> {
    const engine = settings.type === "sqlite" ? openSqlite(settings) : await openPostgres(settings);
    try {
      await migrate(engine, options);
      await engine.claim();
    } catch (error) {
      await engine.db.destroy();
      throw error;
    }
    return new Store(engine);
  }

  /** Everything, as one Change to an empty model. */
  async load(): Promise<Change> {
    const users = await this.db.selectFrom("users").selectAll().execute();
    const keys = await this.db.selectFrom("pre_auth_keys").selectAll().execute();
    const nodes = await this.db.selectFrom("nodes").selectAll().execute();
    const documents = await this.db.selectFrom("documents").selectAll().orderBy("kind").orderBy("id").execute();
    const counters = await this.db.selectFrom("counters").selectAll().execute();
    const value = (name: keyof Counters) => counters.find((row) => row.name === name)?.value;
    return {
      users: users.map((row) => ({
        id: row.id,
        name: row.name,
        displayName: row.display_name,
        email: row.email,
        profilePicUrl: row.profile_pic_url,
        provider: row.provider,
        providerId: row.provider_id,
        groups: JSON.parse(row.groups),
        role: row.role as UserRecord["role"],
        status: row.status as UserRecord["status"],
        createdAt: Number(row.created_at),
      })),
      keys: keys.map((row) => ({
        id: row.id,
        prefix: row.prefix,
        hash: row.hash,
        userId: row.user_id,
        reusable: row.reusable === 1,
        ephemeral: row.ephemeral === 1,
        used: row.used === 1,
        tags: JSON.parse(row.tags),
        description: row.description,
        preauthorized: row.preauthorized === 1,
        expiration: millis(row.expiration),
        revokedAt: millis(row.revoked_at),
        createdAt: Number(row.created_at),
      })),
      nodes: nodes.map(nodeOf),
      documents: documents.map(
        (row) => ({ kind: row.kind, id: row.id, value: JSON.parse(row.value) }) as DocumentChange,
      ),
      counters: {
        lastUser: Number(value("lastUser") ?? 0),
        lastKey: Number(value("lastKey") ?? 0),
        lastNode: Number(value("lastNode") ?? 0),
        lastIPv4: value("lastIPv4") ?? "",
        lastIPv6: value("lastIPv6") ?? "",
      },
    };
  }

  /**
   * Writes the changes, in their order, in one transaction. When it resolves they are durable; when it rejects none is.
   * Throws RefusedChange when the others could be written without that one.
   */
  async write(changes: Change[]): Promise<void> {
    await this.db.transaction().execute(async (tx) => {
      for (const [index, change] of changes.entries()) {
        try {
          await writeChange(tx, change);
        } catch (error) {
          throw this.engine.isRefusal(error) ? new RefusedChange(index, (error as Error).message) : error;
        }
      }
    });
  }

  /** Writes everything into a new SQLite file, while the store is in use; null where the database has tools of its own. */
  get snapshot(): ((path: string) => Promise<void>) | null {
    return this.engine.snapshot;
  }

  /** What to call the database in messages. */
  get place(): string {
    return this.engine.place;
  }

  /** Whether a question to the database is answered now. */
  async answers(): Promise<boolean> {
    try {
      await this.db.selectFrom("counters").select("name").limit(1).execute();
      return true;
    } catch {
      return false;
    }
  }

  async close(): Promise<void> {
    await this.db.destroy();
  }
}

async function writeChange(tx: Transaction<Tables>, change: Change): Promise<void> {
  await removeRows(tx, "nodes", change.nodesRemoved);
  for (const user of change.users ?? []) {
    const row = {
      id: user.id,
      name: user.name,
      display_name: user.displayName,
      email: user.email,
      profile_pic_url: user.profilePicUrl,
      provider: user.provider,
      provider_id: user.providerId,
      groups: JSON.stringify(user.groups),
      role: user.role,
      status: user.status,
      created_at: user.createdAt,
    };
    await tx
      .insertInto("users")
      .values(row)
      .onConflict((conflict) => conflict.column("id").doUpdateSet(row))
      .execute();
  }
  for (const key of change.keys ?? []) {
    const row = {
      id: key.id,
      prefix: key.prefix,
      hash: key.hash,
      user_id: key.userId,
      reusable: Number(key.reusable),
      ephemeral: Number(key.ephemeral),
      used: Number(key.used),
      tags: JSON.stringify(key.tags),
      description: key.description,
      preauthorized: Number(key.preauthorized),
      expiration: key.expiration,
      revoked_at: key.revokedAt,
      created_at: key.createdAt,
    };
    await tx
      .insertInto("pre_auth_keys")
      .values(row)
      .onConflict((conflict) => conflict.column("id").doUpdateSet(row))
      .execute();
  }
  for (const node of change.nodes ?? []) {
    const row = rowOf(node);
    await tx
      .insertInto("nodes")
      .values(row)
      .onConflict((conflict) => conflict.column("id").doUpdateSet(row))
      .execute();
  }
  await removeRows(tx, "pre_auth_keys", change.keysRemoved);
  await removeRows(tx, "users", change.usersRemoved);
  for (const { kind, id, value } of change.documents ?? []) {
    if (value === null) await tx.deleteFrom("documents").where("kind", "=", kind).where("id", "=", id).execute();
    else {
      const row = { kind, id, value: JSON.stringify(value) };
      await tx
        .insertInto("documents")
        .values(row)
        .onConflict((conflict) => conflict.columns(["kind", "id"]).doUpdateSet(row))
        .execute();
    }
  }
  for (const [name, value] of Object.entries(change.counters ?? {})) {
    const row = { name, value: String(value) };
    await tx
      .insertInto("counters")
      .values(row)
      .onConflict((conflict) => conflict.column("name").doUpdateSet(row))
      .execute();
  }
}

async function removeRows(
  tx: Transaction<Tables>,
  table: "nodes" | "pre_auth_keys" | "users",
  ids: number[] = [],
): Promise<void> {
  for (let at = 0; at < ids.length; at += ROWS_PER_STATEMENT) {
    await tx
      .deleteFrom(table)
      .where("id", "in", ids.slice(at, at + ROWS_PER_STATEMENT))
      .execute();
  }
}

async function migrate(engine: Engine, { log, migrations = migrationsOf }: StoreOptions): Promise<void> {
  const { db, place } = engine;
  const known = migrations(engine.dialect);
  const tables = (await db.introspection.getTables({ withInternalKyselyTables: true })).map(({ name }) => name);
  if (isHeadscale(tables))
    throw new Error(
      `${place} is Headscale's, which keeps another schema: give Weft a database of its own, and take over what is in this one with \`weft import\``,
    );
  const applied = tables.includes("kysely_migration") ? await appliedMigrations(db) : [];
  const unknown = applied.find((name) => !(name in known));
  if (unknown !== undefined)
    throw new Error(
      `${place} was written by a newer Weft (its schema has "${unknown}"): run that version, or restore a backup that was made before the upgrade`,
    );
  const last = applied.at(-1);
  if (last !== undefined && applied.length < Object.keys(known).length) {
    const where = await engine.backup(last);
    log?.(`the schema of ${place} is brought up to date; what it was before is kept in ${where}`);
  }
  const { error } = await new Migrator({ db, provider: { getMigrations: async () => known } }).migrateToLatest();
  if (error)
    throw new Error(
      `the schema of ${place} could not be brought up to date, it stays as it was: ${(error as Error).message ?? error}`,
    );
}

/** Names of the migrations that the database has seen, in their order. */
async function appliedMigrations(db: Kysely<Tables>): Promise<string[]> {
  const rows = await (db as unknown as Kysely<{ kysely_migration: { name: string } }>)
    .selectFrom("kysely_migration")
    .select("name")
    .orderBy("name")
    .execute();
  return rows.map((row) => row.name);
}
