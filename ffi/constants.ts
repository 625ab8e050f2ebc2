// Linux ABI constants that the files of this folder share, under their C names. Those that one file alone needs stand in
// that file. Everything here is the same on x86-64 and aarch64 (both use the generic socket and ioctl numbers) except the
// table ARCH. constants.test.ts compares the x86-64 values with the C headers of the machine that runs the test.
// Source: the Linux UAPI headers' published values; measured in research/datapath-ffi.md part 4.

export const O_RDONLY = 0;
export const O_RDWR = 2;
export const O_CREAT = 0x40;
export const O_NONBLOCK = 0x800;
export const O_CLOEXEC = 0x80000;

export const AF_INET = 2;
export const AF_INET6 = 10;
export const AF_NETLINK = 16;

export const SOCK_DGRAM = 2;
export const SOCK_RAW = 3;
export const SOCK_NONBLOCK = 0x800;
export const SOCK_CLOEXEC = 0x80000;

export const SOL_SOCKET = 1;
export const SO_SNDBUF = 7;
export const SO_RCVBUF = 8;
export const SO_PEERCRED = 17;
export const SO_SNDBUFFORCE = 32;
export const SO_RCVBUFFORCE = 33;
export const SO_MARK = 36;

export const IPPROTO_IP = 0;
export const IPPROTO_ICMP = 1;
export const IPPROTO_UDP = 17;
export const IPPROTO_IPV6 = 41;
export const IPPROTO_ICMPV6 = 58;

export const IP_TOS = 1;
export const IP_PKTINFO = 8;
export const IP_RECVTOS = 13;
export const IP_MTU_DISCOVER = 10;
export const IP_PMTUDISC_DONT = 0;
export const IPV6_MTU_DISCOVER = 23;
export const IPV6_PMTUDISC_DONT = 0;
export const IPV6_V6ONLY = 26;
export const IPV6_RECVPKTINFO = 49;
export const IPV6_RECVTCLASS = 66;
export const IPV6_TCLASS = 67;
export const IPV6_PKTINFO = 50;

/** Level of the two socket options and control messages below. */
export const SOL_UDP = 17;
/** Send: u16 segment size. */
export const UDP_SEGMENT = 103;
/** Socket option: enable (i32). Received control message: i32 segment size. */
export const UDP_GRO = 104;

export const MSG_DONTWAIT = 0x40;
export const MSG_TRUNC = 0x20;

export interface ArchTable {
  /** struct epoll_event: packed on x86-64 alone. */
  EPOLL_EVENT_SIZE: number;
  EPOLL_EVENT_DATA: number;
  O_DIRECTORY: number;
  O_NOFOLLOW: number;
}

export const ARCH: Record<"x64" | "arm64", ArchTable> = {
  x64: { EPOLL_EVENT_SIZE: 12, EPOLL_EVENT_DATA: 4, O_DIRECTORY: 0x10000, O_NOFOLLOW: 0x20000 },
  arm64: { EPOLL_EVENT_SIZE: 16, EPOLL_EVENT_DATA: 8, O_DIRECTORY: 0x4000, O_NOFOLLOW: 0x8000 },
};

/** The row of ARCH for the machine that runs; throws one sentence elsewhere than on Linux x86-64 or aarch64. */
export function arch(): ArchTable {
  if (process.platform !== "linux" || !(process.arch === "x64" || process.arch === "arm64")) {
    throw new Error(
      `Weft drives the kernel of Linux on x64 or arm64; this is ${process.platform} on ${process.arch}: run it there`,
    );
  }
  return ARCH[process.arch];
}
