// The C library: the one place where Weft loads it, with exactly the functions that this folder calls.
//
// A pointer is a plain number (user space is below 2^47), or a typed array whose bytes the call reads or writes before it
// returns. Structures that hold pointers to other memory need `buffer` or WebAssembly memory: see there.
// Every result is i32: lengths here never reach 2^31, and a BigInt result would cost ten times the call.
// The module runs once per thread (main and each Worker), and so errno is each thread's own.
import { dlopen, type Pointer, ptr, toArrayBuffer } from "bun:ffi";
import { arch } from "./constants.ts";
import { SysError } from "./errno.ts";

export { SysError } from "./errno.ts";

/** An address, or bytes that live at least as long as the call. */
export type Address = number | Uint8Array | Int32Array | Uint32Array;

export interface Libc {
  open(path: Address, flags: number, mode: number): number;
  close(fd: number): number;
  read(fd: number, buffer: Address, length: number): number;
  write(fd: number, buffer: Address, length: number): number;
  writev(fd: number, iov: Address, count: number): number;
  ioctl(fd: number, request: number, argument: Address): number;
  socket(family: number, type: number, protocol: number): number;
  bind(fd: number, address: Address, length: number): number;
  getsockname(fd: number, address: Address, length: Address): number;
  getsockopt(fd: number, level: number, name: number, value: Address, length: Address): number;
  setsockopt(fd: number, level: number, name: number, value: Address, length: number): number;
  sendto(fd: number, data: Address, length: number, flags: number, address: Address, addressLength: number): number;
  recvfrom(fd: number, data: Address, length: number, flags: number, address: Address, addressLength: Address): number;
  recvmmsg(fd: number, messages: Address, count: number, flags: number, timeout: number): number;
  sendmmsg(fd: number, messages: Address, count: number, flags: number): number;
  epoll_create1(flags: number): number;
  epoll_ctl(epoll: number, operation: number, fd: number, event: Address): number;
  epoll_wait(epoll: number, events: Address, count: number, timeoutMs: number): number;
  eventfd(initial: number, flags: number): number;
  poll(fds: Address, count: number, timeoutMs: number): number;
  setns(fd: number, type: number): number;
  unshare(flags: number): number;
  madvise(address: Address, length: number, advice: number): number;
  flock(fd: number, operation: number): number;
  kill(pid: number, signal: number): number;
}

const SYMBOLS = {
  __errno_location: { args: [], returns: "ptr" },
  open: { args: ["ptr", "i32", "u32"], returns: "i32" },
  close: { args: ["i32"], returns: "i32" },
  read: { args: ["i32", "ptr", "u32"], returns: "i32" },
  write: { args: ["i32", "ptr", "u32"], returns: "i32" },
  writev: { args: ["i32", "ptr", "i32"], returns: "i32" },
  ioctl: { args: ["i32", "u32", "ptr"], returns: "i32" },
  socket: { args: ["i32", "i32", "i32"], returns: "i32" },
  bind: { args: ["i32", "ptr", "u32"], returns: "i32" },
  getsockname: { args: ["i32", "ptr", "ptr"], returns: "i32" },
  getsockopt: { args: ["i32", "i32", "i32", "ptr", "ptr"], returns: "i32" },
  setsockopt: { args: ["i32", "i32", "i32", "ptr", "u32"], returns: "i32" },
  sendto: { args: ["i32", "ptr", "u32", "i32", "ptr", "u32"], returns: "i32" },
  recvfrom: { args: ["i32", "ptr", "u32", "i32", "ptr", "ptr"], returns: "i32" },
  recvmmsg: { args: ["i32", "ptr", "u32", "i32", "ptr"], returns: "i32" },
  sendmmsg: { args: ["i32", "ptr", "u32", "i32"], returns: "i32" },
  epoll_create1: { args: ["i32"], returns: "i32" },
  epoll_ctl: { args: ["i32", "i32", "i32", "ptr"], returns: "i32" },
  epoll_wait: { args: ["i32", "ptr", "i32", "i32"], returns: "i32" },
  eventfd: { args: ["u32", "i32"], returns: "i32" },
  poll: { args: ["ptr", "u32", "i32"], returns: "i32" },
  setns: { args: ["i32", "i32"], returns: "i32" },
  unshare: { args: ["i32"], returns: "i32" },
  madvise: { args: ["ptr", "u64", "i32"], returns: "i32" },
  flock: { args: ["i32", "i32"], returns: "i32" },
  kill: { args: ["i32", "i32"], returns: "i32" },
} as const;

function load() {
  arch();
  const musl = `libc.musl-${process.arch === "x64" ? "x86_64" : "aarch64"}.so.1`;
  let last: unknown;
  for (const name of ["libc.so.6", musl]) {
    try {
      return dlopen(name, SYMBOLS).symbols;
    } catch (error) {
      last = error;
    }
  }
  throw new Error(`neither libc.so.6 nor ${musl} can be loaded: ${last instanceof Error ? last.message : last}`);
}

const symbols = load();

/** The raw functions: the C result, -1 on failure with the reason in `errno()`. */
export const libc: Libc = symbols as unknown as Libc;

const errnoView = new Int32Array(toArrayBuffer(symbols.__errno_location() as Pointer, 0, 4));

/** This thread's errno. Read it straight after the call that failed. */
export function errno(): number {
  return errnoView[0]!;
}

/** `result` as it is, or SysError when it is -1. `what` names the operation and its object: "open /dev/net/tun". */
export function check(result: number, what: string): number {
  if (result === -1) throw new SysError(errno(), what);
  return result;
}

/** `result` as it is, or minus errno when it is -1: for calls that fail as a matter of course (EAGAIN). */
export function orErrno(result: number): number {
  return result === -1 ? -errnoView[0]! : result;
}

/** The address of memory that stays where it is: a WebAssembly.Memory's buffer, a SharedArrayBuffer, or a `buffer`. */
export function addressOf(memory: ArrayBufferLike | Uint8Array): number {
  return ptr(memory instanceof Uint8Array ? memory : new Uint8Array(memory));
}

/** Zeroed bytes that never move, unlike a small `new Uint8Array(n)`, whose store moves when `.buffer` is first touched. */
export function buffer(bytes: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(new ArrayBuffer(bytes));
}

/** NUL-terminated UTF-8. Throws when `text` itself holds a NUL. */
export function cstring(text: string): Uint8Array {
  if (text.includes("\0")) throw new RangeError(`${JSON.stringify(text)} holds a NUL character: leave it out`);
  return new TextEncoder().encode(`${text}\0`);
}

/** Closes; an error of close(2) says nothing that a caller could act on. */
export function closeFd(fd: number): void {
  libc.close(fd);
}
