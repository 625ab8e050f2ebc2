// `bun run test [bun test arguments]`: every test, then the reasons for skips and one line `N passed, N failed, N skipped`.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { root } from "./setup.ts";

export async function main(argv: string[]): Promise<number> {
  const dir = mkdtempSync(join(tmpdir(), "weft-test-"));
  const report = join(dir, "junit.xml");
  const child = Bun.spawn([process.execPath, "test", "--reporter=junit", `--reporter-outfile=${report}`, ...argv], {
    cwd: root,
    stdin: "ignore",
    stdout: "inherit",
    stderr: "pipe",
    env: process.env,
  });
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => child.kill(signal));
  try {
    const reasons = await relay(child.stderr);
    const code = await child.exited;
    const { passed, failed, skipped } = count(report);
    if (reasons.size) console.log(`\nSkipped, because:\n${[...reasons].map((reason) => `  ${reason}`).join("\n")}`);
    console.log(`\n${passed} passed, ${failed} failed, ${skipped} skipped`);
    return failed > 0 || passed === 0 ? code || 1 : code;
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

/** Copies the runner's output line by line and gathers the lines `SKIP: reason` that tests print. */
async function relay(stream: ReadableStream<Uint8Array>): Promise<Set<string>> {
  const reasons = new Set<string>();
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
  return reasons;
}

/** Counts from the junit report's root element; nothing counts as passed when there is no report. */
function count(report: string): { passed: number; failed: number; skipped: number } {
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
