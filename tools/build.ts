// bun tools/build.ts: compiles asm/ to build/weft.wasm. Nothing is done when the sources and the compiler are unchanged.
//
//   asm/*.ts --asc -O0--> text --wide arithmetic, relocation--> text --wasm-as--> build/weft.wasm
//
// Relocation: instances share a memory (one per Worker), so each must have static data of its own. The module imports
// `env.base`, and everything static (scratch and tables) lies at base, base + 1, ...; asc links it to LINK_BASE, where
// no other number of asm/ is.
//
// -O0 is on purpose: Binaryen's optimiser undoes the register layout of the kernels and costs a factor 1.4 in
// JavaScriptCore. Only node: modules are imported here, so that the runner can load this file before anything is
// installed.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "..");
const ASM = join(ROOT, "asm");
const OUT = join(ROOT, "build");
const WASM = join(OUT, "weft.wasm");
const STAMP = join(OUT, "weft.wasm.stamp");

/** Least memory, in 64 KiB pages, that a host must give: room for the static data below `heapBase()`. */
const INITIAL_PAGES = 16;
const MAXIMUM_PAGES = 65536;

/** Address to which asc links the static data; in the finished module they stand at `env.base` instead. */
const LINK_BASE = 0x5c000000;
/** Every number from LINK_BASE up to here is an address: there is less static data than this. */
const LINK_END = LINK_BASE + (INITIAL_PAGES << 16);

const ASC_FLAGS = [
  "-O0",
  ...["--runtime", "stub"],
  ...["--enable", "simd"],
  ...["--enable", "relaxed-simd"],
  ...["--enable", "threads"],
  "--importMemory",
  "--sharedMemory",
  // asc wants the static data to be inside; `relocate` declares the true size.
  ...["--initialMemory", String(MAXIMUM_PAGES)],
  ...["--maximumMemory", String(MAXIMUM_PAGES)],
  ...["--memoryBase", String(LINK_BASE)],
  "--noAssert",
  ...["--uncheckedBehavior", "always"],
];

const WASM_AS_FLAGS = [
  "simd",
  "relaxed-simd",
  "threads",
  "bulk-memory",
  "multivalue",
  "wide-arithmetic",
  "extended-const",
].map((feature) => `--enable-${feature}`);

/**
 * Builds build/weft.wasm if asm/, this file or the compiler changed since the last build. Several processes may build
 * at once: the result appears by rename. Throws an Error whose message is fit for the user.
 */
export async function build(): Promise<void> {
  if (upToDate()) return;
  const stamp = sourceHash();
  mkdirSync(OUT, { recursive: true });
  const temporary = join(OUT, `weft.${process.pid}.${Date.now()}`);
  const wat = `${temporary}.wat`;
  const wasm = `${temporary}.wasm`;
  try {
    await runTool("assemblyscript/bin/asc.js", ["asm/index.ts", ...ASC_FLAGS, "--textFile", wat], "asc refused asm/");
    writeFileSync(wat, relocate(dropZeroData(lowerWideArithmetic(readFileSync(wat, "utf8")))));
    await runTool("binaryen/bin/wasm-as", [wat, ...WASM_AS_FLAGS, "-o", wasm], "wasm-as refused the compiled asm/");
    renameSync(wasm, WASM);
    writeFileSync(`${temporary}.stamp`, stamp);
    renameSync(`${temporary}.stamp`, STAMP);
  } finally {
    for (const end of [".wat", ".wasm", ".stamp"]) rmSync(temporary + end, { force: true });
  }
}

/** True when build/weft.wasm is made from these sources by this compiler. */
export function upToDate(): boolean {
  return existsSync(WASM) && existsSync(STAMP) && readFileSync(STAMP, "utf8") === sourceHash();
}

function sourceHash(): string {
  const hash = createHash("sha256");
  const sources = readdirSync(ASM)
    .filter((name) => name.endsWith(".ts"))
    .sort();
  for (const path of [
    ...sources.map((name) => join(ASM, name)),
    import.meta.path,
    join(ROOT, "node_modules/assemblyscript/package.json"),
    join(ROOT, "node_modules/binaryen/package.json"),
  ]) {
    if (!existsSync(path)) throw new Error(`build: ${path} is missing: run \`bun install\` first`);
    const content = readFileSync(path);
    hash.update(`${path.slice(ROOT.length)} ${content.length}\n`).update(content);
  }
  return hash.digest("hex");
}

async function runTool(script: string, args: string[], refusal: string): Promise<void> {
  const child = Bun.spawn([process.execPath, join(ROOT, "node_modules", script), ...args], {
    cwd: ROOT,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const [out, err, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (status === 0) return;
  const said = `${err}\n${out}`.trim() || `exit status ${status}, no output`;
  throw new Error(`build: ${refusal}:\n${said}`);
}

/**
 * Replaces the calls of the pseudo imports wide.mul, wide.add and wide.hi (asm/wide.ts) in asc's text output by
 * opcodes: the high word stays in a local of the calling function.
 */
export function lowerWideArithmetic(wat: string): string {
  const calls = new Map<string, string>();
  const lines: string[] = [];
  for (const line of wat.split("\n")) {
    const pseudo = /^ \(import "wide" "(\w+)" \(func (\S+) /.exec(line);
    if (!pseudo) lines.push(line);
    else calls.set(`call ${pseudo[2]}`, pseudo[1]!);
  }
  const out: string[] = [];
  let header = -1;
  let declared = true;
  for (const line of lines) {
    if (line.startsWith(" (func ")) {
      header = out.length;
      declared = false;
    }
    const pseudo = calls.get(line.trim());
    if (pseudo === undefined) {
      out.push(line);
      continue;
    }
    if (!declared) {
      out[header] += " (local $wide-hi i64)";
      declared = true;
    }
    if (pseudo === "mul") out.push("  i64.mul_wide_u", "  local.set $wide-hi");
    else if (pseudo === "add") out.push("  i64.add128", "  local.set $wide-hi");
    else if (pseudo === "hi") out.push("  local.get $wide-hi");
    else throw new Error(`build: asm/ imports wide.${pseudo}, which does not exist: use mul, add or hi`);
  }
  return out.join("\n");
}

/** Drops data segments that are all zeros (static scratch): a new memory is zeroed. */
export function dropZeroData(wat: string): string {
  return wat.replace(/^ \(data \S+ \(i32\.const \d+\) "(?:\\00)*"\)\n/gm, "");
}

/**
 * Makes the static data of asc's text output relative to the imported global `env.base`: addresses in globals and data
 * segments become sums, addresses in functions become reads of a global that holds the sum. The size of the imported
 * memory is set as well.
 */
export function relocate(wat: string): string {
  const sum = (address: number) => `(i32.add (global.get $base) (i32.const ${address - LINK_BASE}))`;
  const isAddress = (text: string) => Number(text) >= LINK_BASE && Number(text) < LINK_END;
  const inFunctions = new Map<number, string>();
  const lines: string[] = [];
  let afterImports = 0;
  for (const line of wat.split("\n")) {
    if (line.startsWith(" (import ")) afterImports = lines.length + 1;
    const constant = /\((i32|i64)\.const (\d+)\)/.exec(line) ?? /^\s+(i32|i64)\.const (\d+)$/.exec(line);
    if (!constant || !isAddress(constant[2]!)) {
      lines.push(line);
      continue;
    }
    const address = Number(constant[2]);
    if (constant[1] === "i64") throw new Error(`build: asm/ computes a 64-bit number from a static address: ${line}`);
    if (line.startsWith(" (global ")) lines.push(line.replace(constant[0], sum(address)));
    else if (line.startsWith(" (data ")) lines.push(line.replace(constant[0], `(offset ${sum(address)})`));
    else {
      const name = `$static-${address - LINK_BASE}`;
      inFunctions.set(address, name);
      lines.push(line.replace(/i32\.const \d+/, `global.get ${name}`));
    }
  }
  const globals = [...inFunctions].map(([address, name]) => ` (global ${name} i32 ${sum(address)})`);
  lines.splice(afterImports, 0, ' (import "env" "base" (global $base i32))', ...globals);
  return lines
    .join("\n")
    .replace(
      /^ \(import "env" "memory" \(memory (\S+) .*$/m,
      ` (import "env" "memory" (memory $1 ${INITIAL_PAGES} ${MAXIMUM_PAGES} shared))`,
    );
}

/** The command: exit status. */
export async function main(_argv: string[]): Promise<number> {
  try {
    await build();
    return 0;
  } catch (error) {
    process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
    return 1;
  }
}

if (import.meta.main) process.exit(await main(process.argv.slice(2)));
