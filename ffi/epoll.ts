// epoll: sleep until one of several descriptors is ready. Level-triggered.
//
//   struct epoll_event   x86-64 (packed) 12 bytes: events u32 0, data u64 4
//                        aarch64         16 bytes: events u32 0, data u64 8
//
// `data` carries a token that the caller chooses; here its low 32 bits.
import { arch, O_CLOEXEC } from "./constants.ts";
import { type Address, buffer, check, libc, orErrno } from "./libc.ts";

export const EPOLLIN = 1;
export const EPOLLOUT = 4;

const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;

/** Bytes of one struct epoll_event, and where its token is. */
export const EPOLL_EVENT_SIZE = arch().EPOLL_EVENT_SIZE;
export const EPOLL_EVENT_DATA = arch().EPOLL_EVENT_DATA;

/** A close-on-exec epoll descriptor. */
export function epollCreate(): number {
  return check(libc.epoll_create1(O_CLOEXEC), "create an epoll set");
}

function control(epoll: number, operation: number, fd: number, events: number, token: number, what: string): void {
  const event = buffer(EPOLL_EVENT_SIZE);
  const view = new DataView(event.buffer);
  view.setUint32(0, events, true);
  view.setUint32(EPOLL_EVENT_DATA, token, true);
  check(libc.epoll_ctl(epoll, operation, fd, event), `${what} descriptor ${fd}`);
}

export function epollAdd(epoll: number, fd: number, events: number, token: number): void {
  control(epoll, EPOLL_CTL_ADD, fd, events, token, "watch");
}

export function epollDelete(epoll: number, fd: number): void {
  control(epoll, EPOLL_CTL_DEL, fd, 0, 0, "stop watching");
}

/**
 * Waits for at most `timeoutMs` (-1: for ever) and writes up to `count` events at `events`. Returns how many, or minus
 * errno: -EINTR when a signal or `worker.terminate()` came in between, and then the caller goes on.
 */
export function epollWait(epoll: number, events: Address, count: number, timeoutMs: number): number {
  return orErrno(libc.epoll_wait(epoll, events, count, timeoutMs));
}
