// `bun run check [--fix]`: types, lint and layer rules, and what must never be committed.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./setup.ts";

export async function main(argv: string[]): Promise<number> {
  const fix = argv.includes("--fix");
  const unknown = argv.find((arg) => arg !== "--fix");
  if (unknown) {
    console.error(`weft check: unknown argument ${JSON.stringify(unknown)}; usage: bun run check [--fix]`);
    return 2;
  }
  const bin = (name: string) => join(root, "node_modules", ".bin", name);
  const results = await Promise.all([
    run("types", [process.execPath, bin("tsc"), "--noEmit", "-p", root]),
    run("types of asm/", [process.execPath, bin("tsc"), "--noEmit", "-p", join(root, "asm")]),
    run("lint and layers", [
      bin("biome"),
      fix ? "check" : "ci",
      ...(fix ? ["--write"] : []),
      "--error-on-warnings",
      "--colors=off",
      root,
    ]),
  ]);
  const found = forbidden();
  for (const line of found) console.error(`check: ${line}`);
  const ok = results.every(Boolean) && found.length === 0;
  console.log(ok ? "check: types, lint, layer rules and lock file are right" : "check: failed");
  return ok ? 0 : 1;
}

async function run(what: string, command: string[]): Promise<boolean> {
  const child = Bun.spawn(command, { cwd: root, stdout: "pipe", stderr: "pipe" });
  const [out, err, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (code !== 0) process.stderr.write(`check: ${what} failed\n${out}${err}`);
  return code === 0;
}

/** A lock file with URLs, or a committed registry setting, installs from one machine's mirror only. */
function forbidden(): string[] {
  const found: string[] = [];
  if (/https?:\/\//.test(readFileSync(join(root, "bun.lock"), "utf8"))) {
    found.push("bun.lock holds a URL: delete it and run `bun install` against the default registry");
  }
  if (existsSync(join(root, ".npmrc"))) found.push(".npmrc must not be committed: it would name a registry");
  return found;
}
