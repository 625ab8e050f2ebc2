// SQLite in one file through Kysely. What a transaction has committed is on disk (WAL, synchronous FULL). One server at a
// time: the file is held under an exclusive lock as long as it is open.
import { Database } from "bun:sqlite";
import { chmodSync, closeSync, existsSync, fsyncSync, mkdirSync, openSync, renameSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { Kysely, SqliteAdapter, SqliteDialect, sql } from "kysely";
import type { Tables } from "./schema.ts";
import { backupName, type Engine } from "./store-engine.ts";

export interface SqliteSettings {
  type: "sqlite";
  /** The file; its folder also gets the folder of backups. */
  path: string;
}

/** Unlike what Kysely says of it, SQLite takes back changes of a schema, too: an interrupted migration leaves no trace. */
class TransactionalAdapter extends SqliteAdapter {
  override get supportsTransactionalDdl(): boolean {
    return true;
  }
}

/** bun:sqlite as Kysely's SQLite dialect wants it. */
class BunSqliteDialect extends SqliteDialect {
  constructor(database: Database) {
    super({
      database: {
        close: () => database.close(),
        prepare: (sql: string) => {
          const statement = database.query(sql);
          return {
            reader: statement.columnNames.length > 0,
            all: (parameters: readonly unknown[]) => statement.all(...(parameters as never[])),
            run: (parameters: readonly unknown[]) => statement.run(...(parameters as never[])),
            iterate: (parameters: readonly unknown[]) =>
              statement.iterate(...(parameters as never[])) as IterableIterator<unknown>,
          };
        },
      },
    });
  }

  override createAdapter(): SqliteAdapter {
    return new TransactionalAdapter();
  }
}

/** Opens or makes the file. Throws with one sentence. */
export function openSqlite({ path }: SqliteSettings): Engine {
  const database = openDatabase(path);
  const db = new Kysely<Tables>({ dialect: new BunSqliteDialect(database) });
  return {
    db,
    dialect: "sqlite",
    place: path,
    backup: async (schema) =>
      backup(database, join(dirname(path), "backups"), `${backupName(schema, new Date())}.sqlite`),
    // Through Kysely, which waits for the transaction that is under way.
    snapshot: async (path) => {
      await sql`VACUUM INTO ${path}`.execute(db);
    },
    // Migrations that make a table anew need foreign keys off; they count from here on.
    claim: async () => {
      database.run("PRAGMA foreign_keys = ON");
    },
    isRefusal: (error) => /^SQLITE_(CONSTRAINT|TOOBIG|MISMATCH|RANGE)/.test((error as { code?: string }).code ?? ""),
  };
}

function openDatabase(path: string): Database {
  let database: Database | null = null;
  try {
    database = new Database(path, { create: true });
    chmodSync(path, 0o600);
    // Exclusive first: WAL then keeps its index in memory and the lock is taken with the first access.
    database.run("PRAGMA locking_mode = EXCLUSIVE");
    database.run("PRAGMA journal_mode = WAL");
    database.run("PRAGMA synchronous = FULL");
    database.run("BEGIN IMMEDIATE");
    database.run("COMMIT");
    return database;
  } catch (error) {
    database?.close();
    throw new Error(openProblem(path, error as Error & { code?: string }), { cause: error });
  }
}

/** Files of a database. What one of them says beside another database's is written into that when it is opened. */
const PARTS = ["", "-wal", "-shm", "-journal"];

/** The files of a database that are there, perhaps without the database itself. */
export function databaseFiles(path: string): string[] {
  return PARTS.map((part) => path + part).filter((file) => existsSync(file));
}

/** Moves a database out of the way, whole or damaged. Throws with one sentence when a server has it open. */
export function moveAside(path: string, to: string): void {
  let database: Database | null = null;
  try {
    if (existsSync(path)) {
      database = openDatabase(path);
      // All of it into the one file.
      database.run("PRAGMA journal_mode = DELETE");
    }
  } catch (error) {
    const { code } = (error as { cause?: { code?: unknown } }).cause ?? {};
    if (!/^SQLITE_(NOTADB|CORRUPT)/.test(String(code))) throw error;
  }
  // Held while it moves. Its own journal goes when it is closed.
  if (existsSync(path)) renameSync(path, to);
  database?.close();
  moveFiles(path, to);
}

/** Of a database that nobody has open. */
export function moveFiles(path: string, to: string): void {
  for (const part of PARTS) if (existsSync(path + part)) renameSync(path + part, to + part);
}

function backup(database: Database, folder: string, name: string): string {
  const path = join(folder, name);
  const partial = `${path}.partial`;
  try {
    if (!existsSync(folder)) mkdirSync(folder, { mode: 0o700 });
    if (existsSync(partial)) rmSync(partial);
    // SQLite writes into an empty file that is there, so nobody else can ever read the copy.
    closeSync(openSync(partial, "wx", 0o600));
    database.query("VACUUM INTO ?").run(partial);
    const file = openSync(partial, "r+");
    fsyncSync(file);
    closeSync(file);
    renameSync(partial, path);
    return path;
  } catch (error) {
    throw new Error(
      `${path} cannot be written, and without a backup the schema is not changed: ${(error as Error).message}`,
    );
  }
}

function openProblem(path: string, error: Error & { code?: string }): string {
  const code = String(error.code ?? "");
  if (code.startsWith("SQLITE_BUSY"))
    return `another control server has ${path} open: stop it, or give this one a data folder of its own with --data`;
  if (code === "SQLITE_NOTADB" || code.startsWith("SQLITE_CORRUPT"))
    return `${path} is not an intact SQLite database: restore it from a backup, or move it away to start afresh`;
  if (code.startsWith("SQLITE_READONLY") || code.startsWith("SQLITE_CANTOPEN") || code === "EACCES" || code === "EPERM")
    return `${path} cannot be written: check the owner and the mode of the data folder`;
  return `${path} cannot be opened: ${error.message}`;
}
