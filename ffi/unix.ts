// Unix sockets and lock files: who is at the other end, and whether another process is already here.
//
//   struct ucred 12 bytes: pid i32 0, uid u32 4, gid u32 8
//
// Descriptors of the runtime's sockets: a node:net socket of Bun has `_handle.fd`; a socket that node:http accepted itself
// has none. A server that must know its peers therefore listens with node:net, asks here, and hands the connection over:
//
//   const server = net.createServer((socket) => {
//     if (peerCredentials(socket).uid !== 0) return socket.destroy();
//     httpServer.emit("connection", socket);    // req.socket is this socket
//   });
import type { Socket } from "node:net";
import { O_CLOEXEC, O_CREAT, O_RDWR, SO_PEERCRED, SOL_SOCKET } from "./constants.ts";
import { EAGAIN, EBADF, EINTR } from "./errno.ts";
import { check, closeFd, cstring, libc, orErrno, SysError } from "./libc.ts";

export interface Credentials {
  pid: number;
  uid: number;
  gid: number;
}

/** The process that connected (as it was when it did), from a connected unix socket. Throws SysError. */
export function peerCredentials(socket: Socket | number): Credentials {
  const fd = typeof socket === "number" ? socket : socketFd(socket);
  const cred = new Uint32Array(3);
  const what = "read the credentials of a unix socket's peer";
  check(libc.getsockopt(fd, SOL_SOCKET, SO_PEERCRED, cred, new Uint32Array([12])), what);
  return { pid: cred[0]! | 0, uid: cred[1]!, gid: cred[2]! };
}

/** Descriptor of a node:net socket. Throws SysError EBADF when it is closed, or is one that node:http accepted. */
export function socketFd(socket: Socket): number {
  const fd = (socket as unknown as { _handle?: { fd?: unknown } | null })._handle?.fd;
  if (typeof fd !== "number" || fd < 0) throw new SysError(EBADF, "find a socket's descriptor", "it is closed");
  return fd;
}

const LOCK_EX = 2;
const LOCK_NB = 4;

export interface Lock extends Disposable {
  release(): void;
}

/**
 * Takes the exclusive lock on the file at `path`, which is made (0600) if need be. Null when another process, or another
 * part of this one, holds it. The lock ends with `release` or with the process, however it dies; the file stays.
 * Throws SysError when the file cannot be opened.
 */
export function lockFile(path: string): Lock | null {
  const fd = check(libc.open(cstring(path), O_RDWR | O_CREAT | O_CLOEXEC, 0o600), `open the lock file ${path}`);
  for (;;) {
    const result = orErrno(libc.flock(fd, LOCK_EX | LOCK_NB));
    if (result === 0) break;
    if (result === -EINTR) continue;
    closeFd(fd);
    if (result === -EAGAIN) return null;
    throw new SysError(-result, `lock ${path}`);
  }
  let held = true;
  const release = () => {
    if (held) closeFd(fd);
    held = false;
  };
  return { release, [Symbol.dispose]: release };
}
