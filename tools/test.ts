// `bun run test [bun test arguments]`: every test, then the reasons for skips and one line `N passed, N failed, N skipped`.
// Unit tests run first, then test/ (namespaces, official peers). With WEFT_TEST_BUILD_PEERS=1 (CI) the official programs are
// built beside the unit tests, and one that does not build is a failure.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { root } from "./setup.ts";

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

/** For tests that name none of their own. It ends what hangs; a slow machine is no failure. */
const TIMEOUT_MS = 300_000;

const children = new Set<Bun.Subprocess>();

export async function main(argv: string[]): Promise<number> {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.on(signal, () => {
      for (const child of children) child.kill(signal);
    });
  }
  const total: Counts = { passed: 0, failed: 0, skipped: 0 };
  const reasons = new Set<string>();
  const add = (counts: Counts) => {
    for (const key of ["passed", "failed", "skipped"] as const) total[key] += counts[key];
  };

  if (argv.length) {
    add(await bunTest(argv, reasons));
  } else {
    const peers = process.env.WEFT_TEST_BUILD_PEERS === "1" ? buildPeers() : null;
    add(await bunTest(["./src", "./ffi", "./lab"], reasons));
    if (peers && (await peers) !== 0) total.failed++;
    add(await bunTest(["./test"], reasons));
  }
  if (reasons.size) console.log(`\nSkipped, because:\n${[...reasons].map((reason) => `  ${reason}`).join("\n")}`);
  console.log(`\n${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  return total.failed > 0 || total.passed === 0 ? 1 : 0;
}

async function buildPeers(): Promise<number> {
  const child = Bun.spawn([process.execPath, "tools/run.ts", "peers"], {
    cwd: root,
    stdin: "ignore",
    stdout: "inherit",
    stderr: "inherit",
  });
  children.add(child);
  return child.exited.finally(() => children.delete(child));
}

/** One `bun test` run. Its exit status counts too: a crash of the runner is a failure even when the report looks clean. */
async function bunTest(args: string[], reasons: Set<string>): Promise<Counts> {
  const dir = mkdtempSync(join(tmpdir(), "weft-test-"));
  const report = join(dir, "junit.xml");
  const child = Bun.spawn(
    [process.execPath, "test", `--timeout=${TIMEOUT_MS}`, "--reporter=junit", `--reporter-outfile=${report}`, ...args],
    {
      cwd: root,
      stdin: "ignore",
      stdout: "inherit",
      stderr: "pipe",
    },
  );
  children.add(child);
  try {
    await copy(child.stderr, reasons);
    const code = await child.exited;
    const counts = count(report);
    if (code !== 0 && counts.failed === 0) counts.failed = 1;
    return counts;
  } finally {
    children.delete(child);
    rmSync(dir, { recursive: true, force: true });
  }
}

/** Copies the runner's output and gathers the lines `SKIP: reason` that tests print. */
async function copy(stream: ReadableStream<Uint8Array>, reasons: Set<string>): Promise<void> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of stream) {
    process.stderr.write(chunk);
    rest += decoder.decode(chunk, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      const at = line.indexOf("SKIP: ");
      if (at >= 0) reasons.add(line.slice(at + 6).trim());
    }
  }
}

/** Counts from the junit report's root element. */
function count(report: string): Counts {
  let text = "";
  try {
    text = readFileSync(report, "utf8");
  } catch {
    return { passed: 0, failed: 1, skipped: 0 };
  }
  const head = /<testsuites\b[^>]*>/.exec(text)?.[0] ?? "";
  const attribute = (name: string) => Number(new RegExp(`\\b${name}="(\\d+)"`).exec(head)?.[1] ?? 0);
  const failed = attribute("failures") + attribute("errors");
  const skipped = attribute("skipped");
  return { passed: attribute("tests") - failed - skipped, failed, skipped };
}
