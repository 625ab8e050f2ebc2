// PostgreSQL through Kysely and Bun.SQL, on one connection. The connection holds an advisory lock, so there is one server at
// a time; it is also the one on which every change is written, so a server that has lost the lock cannot write.
//
// A lost connection fails the commands under way; the next one connects again. What is in the model was read once, so a
// reconnecting server must know that nobody else wrote meanwhile: who opens the database leaves a mark, and finds it again.
import { randomUUID } from "node:crypto";
import { type ReservedSQL, SQL } from "bun";
import {
  CompiledQuery,
  type DatabaseConnection,
  type Dialect,
  type Driver,
  Kysely,
  PostgresAdapter,
  PostgresIntrospector,
  PostgresQueryCompiler,
  type QueryResult,
  sql,
} from "kysely";
import type { Tables } from "./schema.ts";
import { backupName, type Engine, UncertainCommit } from "./store-engine.ts";

export interface PostgresSettings {
  type: "postgres";
  /** Name or address of the server, or the folder of its unix socket. */
  host: string;
  port: number;
  database: string;
  user: string;
  /** "" for none. */
  password: string;
  /** As libpq's sslmode. */
  ssl: "disable" | "allow" | "prefer" | "require" | "verify-ca" | "verify-full";
}

/** First half of the advisory lock's key ("weft"); the second is the schema's. */
const LOCK = 0x77656674;
/** Milliseconds for a connection to come about, and for the answer to one statement. */
const CONNECT_TIMEOUT = 5_000;
const STATEMENT_TIMEOUT = 15_000;
/** Milliseconds to wait for another server's lock. */
const LOCK_TIMEOUT = 1_000;
/** Row of `counters` that names who opened the database last. */
const HOLDER = "holder";

/** One connection to the database, or to the folder of its socket; without a password where none is set. */
export function connectionOf({ host, port, database, user, password, ssl }: PostgresSettings) {
  return {
    adapter: "postgres",
    ...(host.startsWith("/") ? { path: host, port } : { hostname: host, port, tls: ssl }),
    database,
    username: user,
    ...(password !== "" && { password }),
    max: 1,
  } as const;
}

export async function openPostgres(settings: PostgresSettings): Promise<Engine> {
  const driver = new BunPostgresDriver(settings);
  const db = new Kysely<Tables>({ dialect: new BunPostgresDialect(driver) });
  try {
    // So that a server that is not there, or a second one, is told of before anything else happens.
    await sql`select 1`.execute(db);
  } catch (error) {
    await db.destroy();
    throw error;
  }
  return {
    db,
    dialect: "postgres",
    place: driver.place,
    backup: (schema) => backup(db, `backup_${backupName(schema, new Date())}`.toLowerCase().replaceAll("-", "_")),
    claim: async () => {
      const holder = randomUUID();
      await db
        .insertInto("counters")
        .values({ name: HOLDER, value: holder })
        .onConflict((conflict) => conflict.column("name").doUpdateSet({ value: holder }))
        .execute();
      driver.holder = holder;
    },
    snapshot: null,
    // SQLSTATE: bad data, broken constraints, and what is too large or complex.
    isRefusal: (error) => /^(22|23|54)/.test(String((error as { errno?: unknown }).errno ?? "")),
  };
}

/** Copies of all tables beside them: in one transaction, with the rights that migrations need anyway. */
async function backup(db: Kysely<Tables>, prefix: string): Promise<string> {
  const tables = await db.introspection.getTables({ withInternalKyselyTables: true });
  const names = tables.map((table) => table.name).filter((name) => !name.startsWith("backup_"));
  await db.transaction().execute(async (tx) => {
    for (const name of names) {
      // PostgreSQL cuts longer names off, silently.
      const copy = `${prefix}_${name}`.slice(0, 63);
      await sql`create table ${sql.table(copy)} as table ${sql.table(name)}`.execute(tx);
    }
  });
  return `tables ${prefix}_*`;
}

class BunPostgresDialect implements Dialect {
  constructor(private readonly driver: Driver) {}
  createAdapter = () => new PostgresAdapter();
  createDriver = () => this.driver;
  createIntrospector = (db: Kysely<never>) => new PostgresIntrospector(db);
  createQueryCompiler = () => new PostgresQueryCompiler();
}

/** PostgreSQL refuses the character 0, which a client may put into a host name: it must not spoil a whole transaction. */
function storable(value: unknown): unknown {
  return typeof value === "string" ? value.replaceAll("\0", "\uFFFD") : value;
}

class Session implements DatabaseConnection {
  private lost: Error | null = null;

  constructor(
    private readonly pool: SQL,
    private readonly connection: ReservedSQL,
    private readonly place: string,
  ) {}

  get isLost(): boolean {
    return this.lost !== null;
  }

  async executeQuery<R>({ sql: text, parameters }: CompiledQuery): Promise<QueryResult<R>> {
    if (this.lost) throw this.lost;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => reject(new Error(`no answer for ${STATEMENT_TIMEOUT / 1000} s`)), STATEMENT_TIMEOUT);
    });
    try {
      const rows = await Promise.race([this.connection.unsafe(text, parameters.map(storable) as never[]), late]);
      const { count, command } = rows as unknown as { count: number | null; command: string | null };
      return {
        rows: [...rows] as R[],
        ...(/^(INSERT|UPDATE|DELETE)/.test(command ?? "") && { numAffectedRows: BigInt(count ?? 0) }),
      };
    } catch (error) {
      // A refusal of the statement has an SQLSTATE; of those, classes 57P and 08 tell of the connection's end.
      const state = (error as { errno?: unknown }).errno;
      if (typeof state === "string" && !/^(57P|08)/.test(state)) throw error;
      throw this.discard(error as Error);
    } finally {
      clearTimeout(timer);
    }
  }

  // biome-ignore lint/correctness/useYield: the store reads whole tables
  async *streamQuery<R>(): AsyncIterableIterator<QueryResult<R>> {
    throw new Error("rows are not streamed from PostgreSQL");
  }

  /** The server takes back what was not committed when it sees the connection end. */
  discard(reason: Error): Error {
    this.lost ??= new Error(
      `the connection to ${this.place} was lost (${reason.message}): it is made again with the next change`,
    );
    this.pool.close({ timeout: 0 }).catch(() => {});
    return this.lost;
  }
}

class BunPostgresDriver implements Driver {
  /** The mark that this server has left; null until then. */
  holder: string | null = null;
  readonly place: string;
  private session: Session | null = null;
  /** Resolves when whoever has the connection gives it back. */
  private turn: Promise<void> = Promise.resolve();
  private readonly release = new WeakMap<DatabaseConnection, () => void>();

  constructor(private readonly settings: PostgresSettings) {
    this.place = `the PostgreSQL database ${settings.database} at ${settings.host}`;
  }

  async init(): Promise<void> {}

  async acquireConnection(): Promise<DatabaseConnection> {
    const before = this.turn;
    let release = () => {};
    this.turn = new Promise((resolve) => {
      release = resolve;
    });
    await before;
    try {
      if (!this.session || this.session.isLost) this.session = await this.connect();
      this.release.set(this.session, release);
      return this.session;
    } catch (error) {
      release();
      throw error;
    }
  }

  async releaseConnection(connection: DatabaseConnection): Promise<void> {
    this.release.get(connection)?.();
  }

  async beginTransaction(connection: DatabaseConnection): Promise<void> {
    await connection.executeQuery(CompiledQuery.raw("begin"));
  }

  async commitTransaction(connection: DatabaseConnection): Promise<void> {
    try {
      await connection.executeQuery(CompiledQuery.raw("commit"));
    } catch (error) {
      if ((connection as Session).isLost) throw new UncertainCommit((error as Error).message);
      throw error;
    }
  }

  async rollbackTransaction(connection: DatabaseConnection): Promise<void> {
    const session = connection as Session;
    if (session.isLost) return;
    await session.executeQuery(CompiledQuery.raw("rollback")).catch((error: Error) => session.discard(error));
  }

  async destroy(): Promise<void> {
    await this.turn;
    this.session?.discard(new Error("the store was closed"));
    this.session = null;
  }

  private async connect(): Promise<Session> {
    const pool = new SQL({
      ...connectionOf(this.settings),
      idleTimeout: 0,
      maxLifetime: 0,
      connectionTimeout: CONNECT_TIMEOUT / 1000,
    });
    let session: Session;
    try {
      session = new Session(pool, await pool.reserve(), this.place);
    } catch (error) {
      pool.close({ timeout: 0 }).catch(() => {});
      throw new Error(`${this.place} cannot be reached: ${(error as Error).message}`);
    }
    try {
      await this.prepare(session);
      return session;
    } catch (error) {
      session.discard(error as Error);
      throw error;
    }
  }

  private async prepare(session: Session): Promise<void> {
    // What is acknowledged must be on disk, whatever the server's default is; a partner that is gone must free the lock.
    await session.executeQuery(
      CompiledQuery.raw(
        "select set_config('synchronous_commit', 'on', false), set_config('tcp_keepalives_idle', '10', false), set_config('tcp_keepalives_interval', '5', false), set_config('tcp_keepalives_count', '3', false)",
      ),
    );
    await this.lock(session);
    if (this.holder === null) return;
    const found = await session.executeQuery<{ value: string }>(
      CompiledQuery.raw("select value from counters where name = $1", [HOLDER]),
    );
    if (found.rows[0]?.value !== this.holder)
      throw new Error(`another control server has used ${this.place} since this one read it: restart this one`);
  }

  /** A server that has just ended may hold the lock for a moment. */
  private async lock(session: Session): Promise<void> {
    const end = performance.now() + LOCK_TIMEOUT;
    for (;;) {
      const { rows } = await session.executeQuery<{ taken: boolean }>(
        CompiledQuery.raw("select pg_try_advisory_lock($1, hashtext(current_schema())) as taken", [LOCK]),
      );
      if (rows[0]?.taken) return;
      if (performance.now() > end)
        throw new Error(`another control server uses ${this.place}: stop it, or give this one a database of its own`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}
