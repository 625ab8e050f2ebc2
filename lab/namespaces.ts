// Which processes live in a network namespace, and their end.
import { readdirSync, readlinkSync } from "node:fs";

/** How long a killed process may take to disappear. */
const KILL_DEADLINE_MS = 5000;

/** "net:[4026532177]": the same for every process in that namespace while it exists. */
export function netnsId(fd: number): string {
  return readlinkSync(`/proc/self/fd/${fd}`);
}

/** Every process, but this one, whose network namespace is one of `ids`. Zombies have none. */
export function processesIn(ids: ReadonlySet<string>): number[] {
  const found: number[] = [];
  for (const entry of readdirSync("/proc")) {
    const pid = Number(entry);
    if (!Number.isInteger(pid) || pid === process.pid) continue;
    try {
      if (ids.has(readlinkSync(`/proc/${pid}/ns/net`))) found.push(pid);
    } catch {
      // Ended meanwhile, or not ours to look at.
    }
  }
  return found;
}

/**
 * Kills every process in the namespaces, also what daemonized, until none is left. Whoever calls holds the namespaces
 * open: a freed one's id may be given to a stranger's. Returns those that did not end in time.
 */
export async function killProcessesIn(ids: ReadonlySet<string>): Promise<number[]> {
  const deadline = performance.now() + KILL_DEADLINE_MS;
  for (;;) {
    const left = processesIn(ids);
    if (left.length === 0 || performance.now() > deadline) return left;
    for (const pid of left) {
      try {
        process.kill(pid, "SIGKILL");
      } catch {
        // Ended meanwhile.
      }
    }
    await Bun.sleep(5);
  }
}
