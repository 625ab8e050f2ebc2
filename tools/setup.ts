// What every verb needs before it can run: the pinned Bun, the packages of bun.lock and the built WASM module. Nothing here
// may import a package: in a fresh clone there is none yet.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";

export const root = resolve(import.meta.dir, "..");
const state = join(root, ".weft");

/** A failure that the user can act on: `message` is one sentence, printed without a stack. */
class SetupError extends Error {}

/** Brings the checkout to a runnable state. Does nothing, in about a millisecond, when it is there already. */
export async function setup(): Promise<void> {
  checkBun();
  if (isReady()) return;
  await withLock(async () => {
    install();
    const { build, upToDate } = await import("./build.ts");
    if (!upToDate()) process.stderr.write("weft: building the WASM module…\n");
    await build();
    rememberBun();
  });
}

function checkBun(): void {
  const wanted = (JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as { engines: { bun: string } }).engines
    .bun;
  if (Bun.version !== wanted) {
    throw new SetupError(
      `Weft is pinned to Bun ${wanted}, and this is Bun ${Bun.version}: use \`npx -y bun@${wanted} run …\`.`,
    );
  }
}

/** The packages are in place: the stamp holds the hash of the lock file that they were installed from. */
function lockHash(): string {
  const hash = createHash("sha256");
  for (const file of ["bun.lock", "package.json"]) hash.update(readFileSync(join(root, file)));
  return hash.digest("hex");
}

const installStamp = join(root, "node_modules", ".weft-lock");

function installed(): boolean {
  return existsSync(installStamp) && readFileSync(installStamp, "utf8") === lockHash();
}

/** True when nothing is left to do. Nothing is written to find out: a tree that root has set up serves every user. */
function isReady(): boolean {
  if (!installed()) return false;
  const { upToDate } = require("./build.ts") as typeof import("./build.ts");
  return upToDate() && existsSync(join(state, "bun"));
}

function install(): void {
  if (installed()) return;
  process.stderr.write("weft: installing packages…\n");
  const run = Bun.spawnSync([process.execPath, "install", "--frozen-lockfile", "--no-progress"], {
    cwd: root,
    stdout: "pipe",
    stderr: "pipe",
  });
  if (run.exitCode !== 0) {
    const detail = `${run.stderr}`.trim().split("\n").slice(-3).join(" · ");
    throw new SetupError(
      `\`bun install --frozen-lockfile\` failed in ${root} (${detail}): check the network and the package registry, then run it again.`,
    );
  }
  writeFileSync(installStamp, lockHash());
}

/** bin/weft-wg looks here when `bun` is not on its PATH. */
function rememberBun(): void {
  mkdirSync(state, { recursive: true });
  writeFileSync(join(state, "bun"), `${process.execPath}\n`);
}

/** Two verbs started at once in a fresh clone must not install over each other. */
async function withLock(work: () => Promise<void>): Promise<void> {
  const lock = join(state, "setup.lock");
  mkdirSync(state, { recursive: true });
  const deadline = Date.now() + 300_000;
  for (;;) {
    try {
      mkdirSync(lock);
      writeFileSync(join(lock, "pid"), `${process.pid}`);
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    }
    if (abandoned(lock)) rmSync(lock, { recursive: true, force: true });
    else if (Date.now() > deadline)
      throw new SetupError(
        `another \`bun run\` has been setting up this checkout for five minutes: end it, then remove ${lock}.`,
      );
    else await Bun.sleep(100);
  }
  try {
    await work();
  } finally {
    rmSync(lock, { recursive: true, force: true });
  }
}

function abandoned(lock: string): boolean {
  try {
    const pid = Number(readFileSync(join(lock, "pid"), "utf8"));
    return !existsSync(`/proc/${pid}`);
  } catch {
    try {
      return Date.now() - statSync(lock).mtimeMs > 5000;
    } catch {
      return false;
    }
  }
}
