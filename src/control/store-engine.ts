// What the store wants of a database: queries through Kysely, migrations in one transaction, a copy of everything before them.
import type { Kysely } from "kysely";
import type { Dialect, Tables } from "./schema.ts";

export interface Engine {
  readonly db: Kysely<Tables>;
  readonly dialect: Dialect;
  /** What to call it in messages: a path, or database and server. */
  readonly place: string;
  /** Copies everything, named by the schema that it has and the time; returns where to. */
  backup(schema: string): Promise<string>;
  /** Writes all that is committed into a new SQLite file, while the store is in use. Null: the database has tools of its own for that. */
  readonly snapshot: ((path: string) => Promise<void>) | null;
  /** Called once the schema is the newest: from here on the store is this server's. */
  claim(): Promise<void>;
  /** Whether this error of a statement is about what it says (a name that is taken, a value out of range), not about the database. */
  isRefusal(error: unknown): boolean;
}

/** The database takes everything but this one change. */
export class RefusedChange extends Error {
  override name = "RefusedChange";
  constructor(
    /** Among those that were to be written. */
    readonly index: number,
    message: string,
  ) {
    super(message);
  }
}

/** The database did not say whether it holds what was to be committed. */
export class UncertainCommit extends Error {
  override name = "UncertainCommit";
}

/** "0001-foundation-20260131T235959Z": for names of backups, which sort by schema and time. */
export function backupName(schema: string, now: Date): string {
  return `${schema}-${now.toISOString().replace(/[-:]|\.\d+/g, "")}`;
}
