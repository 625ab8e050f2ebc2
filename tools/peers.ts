// `bun run peers [--list]`: builds the official programs that the tests meet, pinned (test/lib/peers.ts, test/peers/*),
// through the ordinary Go and Rust registries, into a cache outside the tree. A valid cache is used as it is.
import { copyFileSync, existsSync, mkdirSync, renameSync, rmSync } from "node:fs";
import { basename, join } from "node:path";
import { installDir, moduleDir, type PeerSource, sources } from "../test/lib/peers.ts";

export async function main(argv: string[]): Promise<number> {
  const unknown = argv.find((arg) => arg !== "--list" && arg !== "--help");
  if (unknown) {
    console.error(`weft peers: unknown argument ${JSON.stringify(unknown)}; usage: bun run peers [--list]`);
    return 2;
  }
  if (argv.includes("--help")) {
    console.log(
      "usage: bun run peers [--list]\nBuilds the official programs for the tests; --list only says what is there.",
    );
    return 0;
  }
  if (argv.includes("--list")) {
    for (const s of sources) console.log(`${s.name} ${s.version}\t${complete(s) ? installDir(s) : "not built"}`);
    return 0;
  }
  let failed = false;
  for (const source of sources) if (!(await installOrRetry(source))) failed = true;
  return failed ? 1 : 0;
}

/** The network fails now and then, and what has been downloaded is kept: a second attempt goes on from there. */
async function installOrRetry(source: PeerSource): Promise<boolean> {
  if ((await install(source)) !== "failed") return true;
  console.error("peers: once more in 10 s…");
  await Bun.sleep(10_000);
  return (await install(source)) !== "failed";
}

const complete = (source: PeerSource) =>
  source.programs.every((program) => existsSync(join(installDir(source), program)));

/** "absent": the language's tools are not there, which is no failure: the tests that want this peer skip. */
async function install(source: PeerSource): Promise<"ready" | "absent" | "failed"> {
  const label = `${source.name} ${source.version}`;
  if (complete(source)) {
    console.error(`peers: ${label} is in the cache`);
    return "ready";
  }
  const tool = "go" in source.from ? "go" : "cargo";
  if (!works(tool)) {
    console.error(`peers: ${label} needs ${tool}, which is not installed here; tests that want it will skip`);
    return "absent";
  }
  console.error(`peers: building ${label}…`);
  const started = Date.now();
  const target = installDir(source);
  // Built beside the target and renamed when whole: a cut-off build never looks complete.
  const temporary = `${target}.${process.pid}.part`;
  mkdirSync(temporary, { recursive: true });
  const cwd = moduleDir(source) ?? temporary;
  const env = {
    ...process.env,
    ...("go" in source.from ? { GOFLAGS: "-mod=readonly", CGO_ENABLED: "0", ...source.from.env } : {}),
  };
  try {
    const build = Bun.spawn(command(source, temporary), {
      cwd,
      env,
      stdout: "pipe",
      stderr: "pipe",
    });
    const [stdout, stderr, code] = await Promise.all([
      new Response(build.stdout).text(),
      new Response(build.stderr).text(),
      build.exited,
    ]);
    if (code !== 0) {
      console.error(
        `peers: ${label} did not build (${tool} exit ${code}):\n${`${stdout}${stderr}`.trim().split("\n").slice(-15).join("\n")}`,
      );
      return "failed";
    }
    if ("crate" in source.from)
      for (const program of source.programs) renameSync(join(temporary, "bin", program), join(temporary, program));
    for (const file of ("go" in source.from && source.from.support) || []) {
      const root = Bun.spawnSync(["go", "env", "GOROOT"], { cwd, env }).stdout.toString().trim();
      copyFileSync(join(root, file), join(temporary, basename(file)));
    }
    rmSync(target, { recursive: true, force: true });
    renameSync(temporary, target);
    console.error(`peers: built ${label} in ${Math.round((Date.now() - started) / 1000)} s`);
    return "ready";
  } finally {
    rmSync(temporary, { recursive: true, force: true });
  }
}

/** Being on the PATH is not enough: a rustup proxy without a toolchain runs nothing. */
function works(tool: "go" | "cargo"): boolean {
  const args = tool === "go" ? ["version"] : ["--version"];
  return (
    Bun.which(tool) !== null && Bun.spawnSync([tool, ...args], { stdout: "ignore", stderr: "ignore" }).exitCode === 0
  );
}

function command(source: PeerSource, out: string): string[] {
  if ("go" in source.from)
    return ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", `${out}/`, ...source.from.packages];
  return [
    "cargo",
    "install",
    source.from.crate,
    "--version",
    `=${source.version}`,
    "--locked",
    "--root",
    out,
    "--target-dir",
    join(out, "target"),
  ];
}
