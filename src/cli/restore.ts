// `weft restore FILE`: puts a backup into the data folder of a control server that does not run (control/backup.ts).
import { chownSync, copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, statSync } from "node:fs";
import { basename, join } from "node:path";
import { type BackupContents, readBackup, stageDatabase } from "../control/backup.ts";
import { prepareDataDir } from "../control/datadir.ts";
import { backupName } from "../control/store-engine.ts";
import { databaseFiles, moveAside, moveFiles } from "../control/store-sqlite.ts";
import { writeAtomically } from "../net/keyfile.ts";
import { loadConfig, type ServerConfig } from "./config.ts";
import { parseFlags, UsageError } from "./flags.ts";
import { DERP_KEY } from "./open-control.ts";
import { makeFolderOf } from "./serve.ts";

const USAGE = `Usage: bun run weft restore FILE [flags]

Puts database and keys of a backup (\`weft backup\`) into the data folder. The server must not run. What is there already is
moved into DIR/backups, and only with --force.

  -c, --config FILE  configuration: where database and keys are
  --data DIR         data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --force            what is there is replaced`;

export const FLAGS = {
  config: { kind: "string", short: "c" },
  data: "string",
  force: "boolean",
  help: { kind: "boolean", short: "h" },
} as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft restore", argv, FLAGS, USAGE, 1);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const [file] = flags._;
  if (file === undefined) throw new UsageError("which backup? `weft restore FILE`");
  const config = loadConfig({
    config: flags.config,
    overrides: { data_dir: { flag: "--data", value: flags.data } },
  });
  const contents = readBackup(file);
  for (const line of restore(file, contents, config, flags.force ?? false)) console.log(line);
  return 0;
}

/** What was done, in lines. Throws with one sentence. */
function restore(file: string, { about, keys }: BackupContents, config: ServerConfig, force: boolean): string[] {
  const { store } = config.settings;
  if (about.hasDatabase !== (store.type === "sqlite"))
    throw new Error(
      about.hasDatabase
        ? `${file} holds an SQLite database, and the configuration names PostgreSQL (database.type)`
        : `${file} holds no database: it was in ${about.place}. Set database.type to postgres to restore the keys`,
    );
  prepareDataDir(config.dataDir);
  const database = store.type === "sqlite" ? store.path || join(config.dataDir, "weft.sqlite") : null;
  const places = new Map([
    ["noise_private.key", config.noiseKeyPath],
    [DERP_KEY, config.relay.keyPath],
  ]);
  const written = [...keys].flatMap(([name, content]) => {
    const path = places.get(name);
    const isThere = path !== undefined && existsSync(path);
    if (path === undefined || (isThere && readFileSync(path).equals(content))) return [];
    return [{ path, content, isThere }];
  });
  const files = database === null ? [] : databaseFiles(database);
  const inTheWay = [...files.slice(0, 1), ...written.filter(({ isThere }) => isThere).map(({ path }) => path)];
  if (inTheWay.length > 0 && !force)
    throw new Error(
      `${inTheWay.join(" and ")} would be replaced: say --force to move it into ${config.dataDir}/backups`,
    );
  const kept = join(config.dataDir, "backups");
  if (inTheWay.length > 0) mkdirSync(kept, { recursive: true, mode: 0o700 });
  const stamp = backupName("replaced", new Date());
  const aside = (path: string) => join(kept, `${stamp}-${basename(path)}`);
  if (database !== null) makeFolderOf(database);
  const staged = database !== null ? stageDatabase(file, database) : null;
  const undo: (() => void)[] = [];
  try {
    // Before anything else changes, because it fails when a server runs.
    if (database !== null && files.length > 0) {
      moveAside(database, aside(database));
      undo.unshift(() => moveFiles(aside(database), database));
    }
    for (const { path, content, isThere } of written) {
      makeFolderOf(path);
      // A copy, since it may lie on another file system.
      if (isThere) copyFileSync(path, aside(path));
      undo.unshift(() => (isThere ? copyFileSync(aside(path), path) : rmSync(path, { force: true })));
      writeAtomically(path, new TextDecoder().decode(content));
      own(path, config.dataDir);
    }
    if (database !== null && staged !== null) {
      own(staged, config.dataDir);
      renameSync(staged, database);
    }
  } catch (error) {
    for (const step of undo) step();
    if (staged !== null) rmSync(staged, { force: true });
    throw error;
  }
  return [
    `${about.serverUrl} as of ${about.createdAt} is restored in ${config.dataDir}${inTheWay.length > 0 ? `; what was there is in ${kept} (${stamp}-…)` : ""}`,
    ...(database === null ? [`its database was ${about.place}: restore that with pg_restore or psql`] : []),
    ...about.elsewhere.map((path) => `it also had ${path}`),
  ];
}

/** As root: to the one whose data folder it is. */
export function own(path: string, dataDir: string): void {
  if (process.getuid?.() !== 0) return;
  const { uid, gid } = statSync(dataDir);
  chownSync(path, uid, gid);
}
