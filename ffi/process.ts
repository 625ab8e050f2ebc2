// What a process asks of the kernel for itself.
import { readFileSync, readlinkSync } from "node:fs";
import { libc, orErrno } from "./libc.ts";

const MADV_DONTNEED = 4;

/**
 * Lets go of the pages of this program's code: what is still used comes back from the page cache, page by page, when it is
 * touched. Of Bun's own code (30 MB resident after start) most has to do with starting. Only what is executable and backed
 * by the program file is touched, which nobody writes to.
 */
export function releaseProgramCode(): void {
  const program = readlinkSync("/proc/self/exe");
  for (const line of readFileSync("/proc/self/maps", "utf8").split("\n")) {
    const match = /^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \d+ +(\/.*)$/.exec(line);
    if (match?.[3] !== program) continue;
    const start = Number.parseInt(match[1]!, 16);
    libc.madvise(start, Number.parseInt(match[2]!, 16) - start, MADV_DONTNEED);
  }
}

/** Sends `signal` to every process of the group that `leader` leads. False when there is none left. */
export function killGroup(leader: number, signal: number): boolean {
  return orErrno(libc.kill(-leader, signal)) === 0;
}
