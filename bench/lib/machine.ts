// What a result depends on: the machine, the checkout, and who took part.
import { readFileSync } from "node:fs";
import { arch, cpus, release, totalmem } from "node:os";
import { resolve } from "node:path";

const root = resolve(import.meta.dir, "../..");

export function machine(): Record<string, string> {
  const cores = cpus();
  const governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  const flags = /^flags\s*:(.*)$/m.exec(read("/proc/cpuinfo"))?.[1] ?? "";
  const vectors = ["avx512f", "avx2", "asimd"].find((flag) => flags.includes(flag));
  return {
    cpu: cores[0]?.model.trim() ?? "unknown",
    cores: `${cores.length}`,
    arch: arch(),
    ...(vectors && { vectors }),
    memory: `${Math.round(totalmem() / 2 ** 30)} GiB`,
    kernel: release(),
    ...(governor && { governor }),
    ...(flags.includes("hypervisor") && { virtual: "yes" }),
  };
}

/** "-dirty": files that are tracked differ from the commit. */
export function commit(): string {
  const git = (...args: string[]) => Bun.spawnSync(["git", "-C", root, ...args], { stdout: "pipe", stderr: "ignore" });
  try {
    const head = git("rev-parse", "--short=12", "HEAD");
    if (head.exitCode !== 0) return "unknown";
    const dirty = git("status", "--porcelain", "--untracked-files=no").stdout.length > 0;
    return head.stdout.toString().trim() + (dirty ? "-dirty" : "");
  } catch {
    return "unknown";
  }
}

/** First line of what a program says about its version, or null when it is not there. */
export function programVersion(command: string[]): string | null {
  if (Bun.which(command[0]!) === null) return null;
  const { stdout } = Bun.spawnSync(command, { stdout: "pipe", stderr: "ignore" });
  return stdout.toString().split("\n")[0]?.trim() || null;
}

/** Version of an installed package. */
export function packageVersion(name: string): string {
  return (JSON.parse(readFileSync(`${root}/node_modules/${name}/package.json`, "utf8")) as { version: string }).version;
}

function read(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch {
    return "";
  }
}
