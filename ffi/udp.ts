// UDP sockets with segmentation offload: one per family, many datagrams per call.
//
// The hot calls are `recvmmsg` and `sendmmsg` over arrays of mmsghdr that the caller laid out with msg.ts (layouts and control
// messages there). Before every recvmmsg, namelen and controllen of each header go back to the room they have.
// Sticky source: with `pktinfo` every datagram says to which local address and interface it came, and the same control
// message on a send chooses the source.
// GSO limits: at most 64 segments and 65000 bytes a message; a segment with its headers must fit the path's MTU (EMSGSIZE).
// On EIO, EINVAL or EMSGSIZE of a GSO send the caller sends the segments one by one and leaves GSO off for the socket.
import type { AddrPort } from "../src/wire/ip.ts";
import { parseIP } from "../src/wire/ip.ts";
import {
  AF_INET,
  AF_INET6,
  IP_MTU_DISCOVER,
  IP_PKTINFO,
  IP_PMTUDISC_DONT,
  IP_RECVTOS,
  IPPROTO_IP,
  IPPROTO_IPV6,
  IPV6_MTU_DISCOVER,
  IPV6_PMTUDISC_DONT,
  IPV6_RECVPKTINFO,
  IPV6_RECVTCLASS,
  IPV6_V6ONLY,
  MSG_DONTWAIT,
  SO_MARK,
  SO_RCVBUF,
  SO_RCVBUFFORCE,
  SO_SNDBUF,
  SO_SNDBUFFORCE,
  SOCK_CLOEXEC,
  SOCK_DGRAM,
  SOCK_NONBLOCK,
  SOL_SOCKET,
  SOL_UDP,
  UDP_GRO,
  UDP_SEGMENT,
} from "./constants.ts";
import { EADDRINUSE, EAFNOSUPPORT, EAGAIN, EINVAL } from "./errno.ts";
import { type Address, buffer, check, closeFd, type Libc, libc, orErrno, SysError } from "./libc.ts";
import { addrPortAt, SOCKADDR_IN6_SIZE, SOCKADDR_ROOM, writeSockaddr } from "./msg.ts";

/** What each socket buffer is asked to be, in bytes: a burst of 7 MiB is not lost while the loop is elsewhere. */
export const UDP_BUFFER_BYTES = 7 << 20;
/** Segments of one GSO message that every kernel with UDP_SEGMENT takes. */
export const UDP_MAX_SEGMENTS = 64;
/** Payload bytes of one GSO message that stay below the kernel's limit of 65507. */
export const UDP_MAX_GSO_BYTES = 65000;

/** How often the kernel may choose a port that the other family has taken. */
const PORT_TRIES = 64;

type OptionCalls = Pick<Libc, "getsockopt" | "setsockopt">;

export interface UdpOptions {
  family: 4 | 6;
  /** 0 (default) asks the kernel. */
  port?: number;
  /** Local address; default any. */
  address?: string;
  /** SO_MARK; 0 (default) is none. */
  mark?: number;
  /** False turns an offload off; default true, when the kernel has it. */
  gso?: boolean;
  gro?: boolean;
  /** Report the local address of each datagram. Default false. */
  pktinfo?: boolean;
  /** Report the ToS byte or traffic class of each datagram. Default false. */
  tos?: boolean;
  /** Wanted size of each buffer. Default UDP_BUFFER_BYTES. */
  bufferBytes?: number;
  /** For tests: a kernel that refuses. */
  calls?: OptionCalls;
}

export interface UdpSocket {
  /** Non-blocking, close-on-exec. */
  fd: number;
  family: 4 | 6;
  port: number;
  /** UDP_SEGMENT may be sent. */
  gso: boolean;
  /** UDP_GRO is on: a received datagram may be many (Control.segmentSize). */
  gro: boolean;
  pktinfo: boolean;
  /** As the kernel counts them: twice what was granted. */
  sendBuffer: number;
  receiveBuffer: number;
}

function setInt(fd: number, level: number, name: number, value: number, calls: OptionCalls = libc): number {
  return calls.setsockopt(fd, level, name, new Int32Array([value]), 4);
}

function getInt(fd: number, level: number, name: number, calls: OptionCalls = libc): number | null {
  const value = new Int32Array(1);
  return calls.getsockopt(fd, level, name, value, new Uint32Array([4])) === 0 ? value[0]! : null;
}

/** A bound socket. Throws SysError: EADDRINUSE, EAFNOSUPPORT when the kernel has no IPv6, EPERM for a mark. */
export function openUdp(options: UdpOptions): UdpSocket {
  const { family } = options;
  const af = family === 4 ? AF_INET : AF_INET6;
  const fd = check(libc.socket(af, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), `open an IPv${family} UDP socket`);
  try {
    if (family === 6) check(setInt(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1), "set IPV6_V6ONLY");
    // Outer packets may be fragmented on the way; a smaller path MTU must not stop them.
    if (family === 4) check(setInt(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT), "set IP_MTU_DISCOVER");
    else check(setInt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DONT), "set IPV6_MTU_DISCOVER");
    if (options.mark) setMark(fd, options.mark);
    const bytes = options.bufferBytes ?? UDP_BUFFER_BYTES;
    const calls = options.calls ?? libc;
    const sendBuffer = setBuffer(fd, SO_SNDBUFFORCE, SO_SNDBUF, bytes, calls);
    const receiveBuffer = setBuffer(fd, SO_RCVBUFFORCE, SO_RCVBUF, bytes, calls);
    const pktinfo = options.pktinfo ?? false;
    if (pktinfo && family === 4) check(setInt(fd, IPPROTO_IP, IP_PKTINFO, 1), "set IP_PKTINFO");
    if (pktinfo && family === 6) check(setInt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1), "set IPV6_RECVPKTINFO");
    if (options.tos && family === 4) check(setInt(fd, IPPROTO_IP, IP_RECVTOS, 1), "set IP_RECVTOS");
    if (options.tos && family === 6) check(setInt(fd, IPPROTO_IPV6, IPV6_RECVTCLASS, 1), "set IPV6_RECVTCLASS");
    const gso = (options.gso ?? true) && getInt(fd, SOL_UDP, UDP_SEGMENT, calls) !== null;
    const gro = (options.gro ?? true) && setInt(fd, SOL_UDP, UDP_GRO, 1, calls) === 0;
    bindUdp(fd, family, options.address ?? (family === 4 ? "0.0.0.0" : "::"), options.port ?? 0);
    return { fd, family, port: localPort(fd), gso, gro, pktinfo, sendBuffer, receiveBuffer };
  } catch (error) {
    closeFd(fd);
    throw error;
  }
}

/**
 * An IPv4 and an IPv6 socket on one port. A family that this machine has not is null; both absent is an error. Port 0: a
 * port that is free in both.
 */
export function openUdpPair(options: Omit<UdpOptions, "family" | "address">): {
  v4: UdpSocket | null;
  v6: UdpSocket | null;
} {
  for (let attempt = 0; ; attempt++) {
    const v4 = openIfPresent({ ...options, family: 4 });
    try {
      const v6 = openIfPresent({ ...options, family: 6, port: v4?.port ?? options.port ?? 0 });
      if (!v4 && !v6) throw new SysError(EAFNOSUPPORT, "open a UDP socket", "this machine has neither IPv4 nor IPv6");
      return { v4, v6 };
    } catch (error) {
      if (v4) closeFd(v4.fd);
      const again = !options.port && error instanceof SysError && error.errno === EADDRINUSE && attempt < PORT_TRIES;
      if (!again) throw error;
    }
  }
}

function openIfPresent(options: UdpOptions): UdpSocket | null {
  try {
    return openUdp(options);
  } catch (error) {
    if (error instanceof SysError && error.errno === EAFNOSUPPORT) return null;
    throw error;
  }
}

function setBuffer(fd: number, forced: number, plain: number, bytes: number, calls: OptionCalls): number {
  if (setInt(fd, SOL_SOCKET, forced, bytes, calls) !== 0) setInt(fd, SOL_SOCKET, plain, bytes);
  return getInt(fd, SOL_SOCKET, plain) ?? 0;
}

function bindUdp(fd: number, family: 4 | 6, address: string, port: number): void {
  const ip = parseIP(address);
  if (ip?.length !== (family === 4 ? 4 : 16)) {
    throw new SysError(EINVAL, "bind a UDP socket", `${JSON.stringify(address)} is not an IPv${family} address`);
  }
  const sockaddr = buffer(SOCKADDR_ROOM);
  const length = writeSockaddr(new DataView(sockaddr.buffer), 0, ip, port);
  const where = family === 4 ? `${address}:${port}` : `[${address}]:${port}`;
  check(libc.bind(fd, sockaddr, length), `bind UDP ${where}`);
}

/** The port that a socket is bound to. */
export function localPort(fd: number): number {
  const sockaddr = buffer(SOCKADDR_ROOM);
  check(libc.getsockname(fd, sockaddr, new Uint32Array([SOCKADDR_IN6_SIZE])), "read the port of a socket");
  return new DataView(sockaddr.buffer).getUint16(2, false);
}

/** SO_MARK of what this socket sends; 0 is none. Throws SysError (EPERM without CAP_NET_ADMIN). */
export function setMark(fd: number, mark: number): void {
  check(setInt(fd, SOL_SOCKET, SO_MARK, mark | 0), `set the mark 0x${(mark >>> 0).toString(16)} on a socket`);
}

/** Receives into up to `count` mmsghdr at `messages`, without waiting. How many were filled, or minus errno. */
export function recvmmsg(fd: number, messages: Address, count: number): number {
  return orErrno(libc.recvmmsg(fd, messages, count, MSG_DONTWAIT, 0));
}

/** Sends `count` mmsghdr at `messages`, without waiting. How many went out, or minus errno of the first one. */
export function sendmmsg(fd: number, messages: Address, count: number): number {
  return orErrno(libc.sendmmsg(fd, messages, count, MSG_DONTWAIT));
}

/** Sends one datagram to the sockaddr bytes (`sockaddrOf`). Bytes sent, or minus errno. For low rates. */
export function sendto(fd: number, sockaddr: Uint8Array, data: Uint8Array): number {
  return orErrno(libc.sendto(fd, data, data.length, MSG_DONTWAIT, sockaddr, sockaddr.length));
}

const fromAddress = buffer(SOCKADDR_ROOM);
const fromView = new DataView(fromAddress.buffer);
const fromLength = new Uint32Array(1);

/** Receives one datagram into `into`. Null when there is none; throws SysError for anything else. For low rates. */
export function recvfrom(fd: number, into: Uint8Array): { from: AddrPort; length: number } | null {
  fromLength[0] = SOCKADDR_ROOM;
  const length = orErrno(libc.recvfrom(fd, into, into.length, MSG_DONTWAIT, fromAddress, fromLength));
  if (length === -EAGAIN) return null;
  if (length < 0) throw new SysError(-length, "receive a datagram");
  const from = addrPortAt(fromView, 0);
  return from === null ? null : { from, length };
}
