// `weft backup FILE`: everything that a control server cannot make anew, taken while it runs (control/backup.ts).
import { closeSync, existsSync, fsyncSync, openSync, renameSync, rmSync, statSync, writeSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { type BackupContents, readBackup } from "../control/backup.ts";
import { AdminClient } from "./admin-client.ts";
import { parseFlags, UsageError } from "./flags.ts";

const USAGE = `Usage: bun run weft backup FILE [flags]

Writes the database of the control server that runs here, as of now, and its keys into one file (mode 0600), whole or not at
all. Whoever has it can pose as this server. \`weft restore FILE\` puts it back. FILE "-" is standard output.

  -c, --config FILE  configuration: where the admin socket is
  --data DIR         data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --socket PATH      its admin socket (default DIR/weft.sock)
  --timeout 10m      how long it may take
  --force            FILE may be there: it is replaced`;

const TIMEOUT = 10 * 60_000;

export const FLAGS = {
  config: { kind: "string", short: "c" },
  data: "string",
  socket: "string",
  timeout: "duration",
  force: "boolean",
  help: { kind: "boolean", short: "h" },
} as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft backup", argv, FLAGS, USAGE, 1);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const [file] = flags._;
  if (file === undefined) throw new UsageError('where to? `weft backup FILE`, or "-" for standard output');
  const { force, timeout = TIMEOUT, ...reach } = flags;
  const api = AdminClient.open({ ...reach, timeout, here: true }, process.env, (line) => console.error(line));
  if (file === "-") {
    for await (const piece of api.download("/v1/backup")) await print(piece);
    return 0;
  }
  const path = resolve(file);
  if (existsSync(path) && !force) throw new UsageError(`${file} is there already: choose another name, or --force`);
  const contents = await save(api.download("/v1/backup"), path);
  console.log(describe(file, statSync(path).size, contents));
  return 0;
}

/** Resolves when whoever reads it has it: the process ends after the last piece. */
function print(piece: Uint8Array): Promise<void> {
  return new Promise((resolve, reject) => {
    const failed = (error: Error) => reject(new Error(`the backup is not whole: standard output: ${error.message}`));
    process.stdout.once("error", failed);
    process.stdout.write(piece, (error) => {
      if (error) return failed(error);
      process.stdout.off("error", failed);
      resolve();
    });
  });
}

async function save(pieces: AsyncIterable<Uint8Array>, path: string): Promise<BackupContents> {
  const partial = join(dirname(path), `.${basename(path)}.${process.pid}.partial`);
  const problem = (error: unknown) => new Error(`${path} cannot be written: ${(error as Error).message}`);
  const file = attempt(() => openSync(partial, "wx", 0o600), problem);
  try {
    try {
      for await (const piece of pieces) attempt(() => writeWhole(file, piece), problem);
      attempt(() => fsyncSync(file), problem);
    } finally {
      closeSync(file);
    }
    const contents = readBackup(partial);
    attempt(() => renameSync(partial, path), problem);
    return contents;
  } catch (error) {
    rmSync(partial, { force: true });
    throw error;
  }
}

function attempt<T>(step: () => T, problem: (error: unknown) => Error): T {
  try {
    return step();
  } catch (error) {
    throw problem(error);
  }
}

function writeWhole(file: number, bytes: Uint8Array): void {
  for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at);
}

function describe(file: string, size: number, { about, keys }: BackupContents): string {
  const parts = [...(about.hasDatabase ? ["the database"] : []), ...keys.keys()];
  return [
    `${file}: ${parts.join(", ")} of ${about.serverUrl} (${size} bytes)`,
    ...(about.hasDatabase ? [] : [`${about.place} is not in it: save that with pg_dump`]),
    ...about.elsewhere.map((path) => `not in it: ${path}`),
  ].join("\n");
}
