// Network namespaces. A namespace is a property of a thread: what changes here changes the calling thread alone, and
// sockets and TUN devices stay for ever in the namespace in which they were opened.
import { O_CLOEXEC, O_RDONLY } from "./constants.ts";
import { check, closeFd, cstring, libc } from "./libc.ts";

export const CLONE_NEWNET = 0x40000000;

/** Opens the network namespace of a process, or the one that a path names (/proc/PID/ns/net, a bind mount). */
export function openNetns(target: number | string): number {
  const path = typeof target === "number" ? `/proc/${target}/ns/net` : target;
  return check(libc.open(cstring(path), O_RDONLY | O_CLOEXEC, 0), `open the network namespace ${path}`);
}

/**
 * Runs `action` with this thread in the namespace `fd`, and comes back, also after a throw. `action` must be synchronous:
 * everything else that the thread does would move too.
 */
export function withNetns<T>(fd: number, action: () => T extends Promise<unknown> ? never : T): T {
  const home = openNetns("/proc/thread-self/ns/net");
  try {
    check(libc.setns(fd, CLONE_NEWNET), "enter a network namespace");
    try {
      return action();
    } finally {
      check(libc.setns(home, CLONE_NEWNET), "come back from a network namespace");
    }
  } finally {
    closeFd(home);
  }
}

/** A descriptor of a new, empty network namespace: loopback alone, and that down. This thread stays where it is. */
export function createNetns(): number {
  const home = openNetns("/proc/thread-self/ns/net");
  try {
    check(libc.unshare(CLONE_NEWNET), "make a network namespace");
    try {
      return openNetns("/proc/thread-self/ns/net");
    } finally {
      check(libc.setns(home, CLONE_NEWNET), "come back from a network namespace");
    }
  } finally {
    closeFd(home);
  }
}
