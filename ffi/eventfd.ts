// eventfd: a 64-bit counter in the kernel that wakes a thread which sleeps in epoll_wait. Any thread of the process may
// write to it by its number.
import { O_CLOEXEC, O_NONBLOCK } from "./constants.ts";
import { buffer, check, libc } from "./libc.ts";

const one = buffer(8);
one[0] = 1;
const value = buffer(8);

/** A non-blocking, close-on-exec eventfd with count 0. */
export function eventfdCreate(): number {
  return check(libc.eventfd(0, O_NONBLOCK | O_CLOEXEC), "create an eventfd");
}

/** Adds 1: the descriptor becomes readable. A full counter (2^64 - 2 wakes unread) is readable anyway. */
export function eventfdWake(fd: number): void {
  libc.write(fd, one, 8);
}

/** Takes the count back to 0. False when it was 0 already. */
export function eventfdDrain(fd: number): boolean {
  return libc.read(fd, value, 8) === 8;
}
