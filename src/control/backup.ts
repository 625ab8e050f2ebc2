// Backups of a control server: one SQLite file with the database as of one moment and, in the table `weft_backup`, the keys
// by which nodes know this server, and a description of what it is.
import { Database } from "bun:sqlite";
import {
  chmodSync,
  closeSync,
  copyFileSync,
  createReadStream,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
} from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import manifest from "../../package.json" with { type: "json" };
import { migrationsOf } from "./schema.ts";
import type { Store } from "./store.ts";

const TABLE = "weft_backup";
const ABOUT = "about.json";
const MAX_KEY = 64 * 1024;

export interface BackupAbout {
  /** Version of Weft. */
  weft: string;
  createdAt: string;
  serverUrl: string;
  /** False: it stands in a database of its own, which `place` names. */
  hasDatabase: boolean;
  place: string;
  /** Files that belong to the server and are not in the backup. */
  elsewhere: readonly string[];
}

export interface BackupContents {
  about: BackupAbout;
  /** By name: "noise_private.key", "derp_private.key". */
  keys: ReadonlyMap<string, Uint8Array>;
}

export interface BackupParts {
  store: Pick<Store, "snapshot" | "place">;
  /** Paths of keys by name; one that is not there is left out. */
  keys: Readonly<Record<string, string>>;
  serverUrl: string;
  elsewhere: readonly string[];
  now: number;
}

/** Makes it in `path`, which must not exist, readable by its owner alone. */
export async function makeBackup(path: string, { store, keys, serverUrl, elsewhere, now }: BackupParts): Promise<void> {
  // SQLite writes into an empty file that is there, so nobody else can ever read it.
  closeSync(openSync(path, "wx", 0o600));
  await store.snapshot?.(path);
  const about: BackupAbout = {
    weft: manifest.version,
    createdAt: new Date(now).toISOString(),
    serverUrl,
    hasDatabase: store.snapshot !== null,
    place: store.place,
    elsewhere,
  };
  const rows: [name: string, content: Uint8Array][] = [[ABOUT, new TextEncoder().encode(JSON.stringify(about))]];
  for (const [name, file] of Object.entries(keys)) {
    const content = contentOf(file);
    if (content) rows.push([name, content]);
  }
  using database = new Database(path);
  database.run("PRAGMA journal_mode = DELETE");
  database.run("BEGIN");
  database.run(`CREATE TABLE ${TABLE} (name TEXT PRIMARY KEY, content BLOB NOT NULL)`);
  for (const [name, content] of rows) database.run(`INSERT INTO ${TABLE} VALUES (?, ?)`, [name, content]);
  database.run("COMMIT");
}

/** The same as bytes to send; `folder` has it for as long as it is being made. */
export async function streamBackup(
  folder: string,
  parts: BackupParts,
): Promise<{ size: number; body: ReadableStream }> {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const path = join(folder, "online.partial");
  // Of a server that died in the middle.
  rmSync(path, { force: true });
  try {
    await makeBackup(path, parts);
    const fd = openSync(path, "r");
    return {
      size: fstatSync(fd).size,
      body: Readable.toWeb(createReadStream("", { fd })) as unknown as ReadableStream,
    };
  } finally {
    // What is open stays readable.
    rmSync(path, { force: true });
  }
}

function contentOf(path: string): Uint8Array | null {
  try {
    return readFileSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return null;
    throw error;
  }
}

/** Reads and checks it. Throws with one sentence. */
export function readBackup(path: string): BackupContents {
  try {
    using database = new Database(path, { readonly: true });
    const [intact] = database.query<{ quick_check: string }, []>("PRAGMA quick_check(1)").all();
    if (intact?.quick_check !== "ok") throw new Error(`it is damaged: ${intact?.quick_check.slice(0, 200)}`);
    const tables = database.query<{ name: string }, []>("SELECT name FROM sqlite_master WHERE type = 'table'").all();
    if (!tables.some(({ name }) => name === TABLE)) throw new Error("it is a database, but no backup that Weft made");
    const rows = database
      .query<{ name: string; content: Uint8Array }, [number]>(
        `SELECT name, content FROM ${TABLE} WHERE length(content) <= ?`,
      )
      .all(MAX_KEY);
    const files = new Map(rows.map(({ name, content }) => [name, content]));
    const about = JSON.parse(new TextDecoder().decode(files.get(ABOUT))) as BackupAbout;
    files.delete(ABOUT);
    if (about.hasDatabase) refuseNewer(database, about);
    return { about, keys: files };
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const reason = code === "SQLITE_NOTADB" ? "it is no backup that Weft made" : message;
    throw new Error(`the backup ${path} cannot be used: ${reason}`);
  }
}

function refuseNewer(database: Database, { weft }: BackupAbout): void {
  const applied = database.query<{ name: string }, []>("SELECT name FROM kysely_migration").all();
  const known = migrationsOf("sqlite");
  if (applied.some(({ name }) => !(name in known)))
    throw new Error(`it was made by a newer Weft (${weft}): restore it with that version`);
}

/** Makes the backup's database beside `path`, on the disk; returns where. */
export function stageDatabase(backup: string, path: string): string {
  const staged = `${path}.restored`;
  try {
    copyFileSync(backup, staged);
    chmodSync(staged, 0o600);
    {
      using database = new Database(staged);
      // The keys leave no trace in what was their place.
      database.run("PRAGMA secure_delete = ON");
      database.run(`DROP TABLE ${TABLE}`);
    }
    const file = openSync(staged, "r+");
    fsyncSync(file);
    closeSync(file);
    return staged;
  } catch (error) {
    rmSync(staged, { force: true });
    throw new Error(`the database of the backup ${backup} cannot be written to ${staged}: ${(error as Error).message}`);
  }
}
