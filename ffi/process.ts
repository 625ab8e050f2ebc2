// What a process asks of the kernel for itself.
import { check, libc, orErrno } from "./libc.ts";

export const PR_SET_PDEATHSIG = 1;
export const PR_SET_DUMPABLE = 4;

/**
 * The kernel sends `signal` to this process when the parent's thread that started it ends. Returns false when the parent
 * `expectedParent` is gone already: then no signal will come, and the caller should end.
 */
export function dieWithParent(signal: number, expectedParent?: number): boolean {
  check(libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "ask for a signal at the parent's end");
  return expectedParent === undefined || libc.getppid() === expectedParent;
}

/** No core dump, no ptrace by others of the same user: for a process that holds keys. */
export function forbidDumps(): void {
  check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "forbid core dumps");
}

/** Sends `signal` to every process of the group that `leader` leads. False when there is none left. */
export function killGroup(leader: number, signal: number): boolean {
  return orErrno(libc.kill(-leader, signal)) === 0;
}
