import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { constants as osConstants, tmpdir } from "node:os";
import { join } from "node:path";
import * as constants from "./constants.ts";
import * as epoll from "./epoll.ts";
import * as errno from "./errno.ts";
import * as msg from "./msg.ts";
import * as netns from "./netns.ts";
import * as process_ from "./process.ts";
import * as rtnetlink from "./rtnetlink.ts";
import * as tun from "./tun.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

const HEADERS = `
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <linux/fib_rules.h>
#include <linux/if.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <linux/udp.h>
#include <linux/veth.h>
#include <linux/virtio_net.h>
#define SOL_UDP IPPROTO_UDP
`;

// Younger than the oldest headers that a builder may have.
const OPTIONAL = new Set(["TUN_F_USO4", "TUN_F_USO6"]);

// Ours that are layout, not C macros; checked by LAYOUT instead.
const NOT_IN_C = new Set([
  "VNET_HEADER_SIZE",
  "TUN_READ_SIZE",
  "EPOLL_EVENT_SIZE",
  "EPOLL_EVENT_DATA",
  "NLMSGHDR_SIZE",
  "RTATTR_SIZE",
  "IFINFOMSG_SIZE",
  "IFADDRMSG_SIZE",
  "RTMSG_SIZE",
]);

const LAYOUT: [string, number, string][] = [
  ["IOVEC_SIZE", msg.IOVEC_SIZE, "sizeof(struct iovec)"],
  ["IOVEC_BASE", msg.IOVEC_BASE, "offsetof(struct iovec, iov_base)"],
  ["IOVEC_LEN", msg.IOVEC_LEN, "offsetof(struct iovec, iov_len)"],
  ["MSGHDR_SIZE", msg.MSGHDR_SIZE, "sizeof(struct msghdr)"],
  ["MSGHDR_NAME", msg.MSGHDR_NAME, "offsetof(struct msghdr, msg_name)"],
  ["MSGHDR_NAMELEN", msg.MSGHDR_NAMELEN, "offsetof(struct msghdr, msg_namelen)"],
  ["MSGHDR_IOV", msg.MSGHDR_IOV, "offsetof(struct msghdr, msg_iov)"],
  ["MSGHDR_IOVLEN", msg.MSGHDR_IOVLEN, "offsetof(struct msghdr, msg_iovlen)"],
  ["MSGHDR_CONTROL", msg.MSGHDR_CONTROL, "offsetof(struct msghdr, msg_control)"],
  ["MSGHDR_CONTROLLEN", msg.MSGHDR_CONTROLLEN, "offsetof(struct msghdr, msg_controllen)"],
  ["MSGHDR_FLAGS", msg.MSGHDR_FLAGS, "offsetof(struct msghdr, msg_flags)"],
  ["MMSGHDR_SIZE", msg.MMSGHDR_SIZE, "sizeof(struct mmsghdr)"],
  ["MMSGHDR_LEN", msg.MMSGHDR_LEN, "offsetof(struct mmsghdr, msg_len)"],
  ["CMSGHDR_SIZE", msg.CMSGHDR_SIZE, "sizeof(struct cmsghdr)"],
  ["CMSG_LEVEL", msg.CMSG_LEVEL, "offsetof(struct cmsghdr, cmsg_level)"],
  ["CMSG_TYPE", msg.CMSG_TYPE, "offsetof(struct cmsghdr, cmsg_type)"],
  ["CMSG_SPACE_SEGMENT", msg.CMSG_SPACE_SEGMENT, "CMSG_SPACE(sizeof(unsigned short))"],
  ["CMSG_SPACE_PKTINFO4", msg.CMSG_SPACE_PKTINFO4, "CMSG_SPACE(sizeof(struct in_pktinfo))"],
  ["CMSG_SPACE_PKTINFO6", msg.CMSG_SPACE_PKTINFO6, "CMSG_SPACE(sizeof(struct in6_pktinfo))"],
  ["in_pktinfo.ipi_spec_dst", 4, "offsetof(struct in_pktinfo, ipi_spec_dst)"],
  ["in6_pktinfo.ipi6_ifindex", 16, "offsetof(struct in6_pktinfo, ipi6_ifindex)"],
  ["SOCKADDR_IN_SIZE", msg.SOCKADDR_IN_SIZE, "sizeof(struct sockaddr_in)"],
  ["SOCKADDR_IN6_SIZE", msg.SOCKADDR_IN6_SIZE, "sizeof(struct sockaddr_in6)"],
  ["sockaddr_in6.sin6_addr", 8, "offsetof(struct sockaddr_in6, sin6_addr)"],
  ["sockaddr_in6.sin6_scope_id", 24, "offsetof(struct sockaddr_in6, sin6_scope_id)"],
  ["VNET_HEADER_SIZE", tun.VNET_HEADER_SIZE, "sizeof(struct virtio_net_hdr)"],
  ["virtio_net_hdr.gso_type", 1, "offsetof(struct virtio_net_hdr, gso_type)"],
  ["virtio_net_hdr.csum_start", 6, "offsetof(struct virtio_net_hdr, csum_start)"],
  ["ifreq", 40, "sizeof(struct ifreq)"],
  ["ifreq.ifr_flags", 16, "offsetof(struct ifreq, ifr_flags)"],
  ["sockaddr_nl", 12, "sizeof(struct sockaddr_nl)"],
  ["NLMSGHDR_SIZE", rtnetlink.NLMSGHDR_SIZE, "sizeof(struct nlmsghdr)"],
  ["RTATTR_SIZE", rtnetlink.RTATTR_SIZE, "sizeof(struct rtattr)"],
  ["IFINFOMSG_SIZE", rtnetlink.IFINFOMSG_SIZE, "sizeof(struct ifinfomsg)"],
  ["IFADDRMSG_SIZE", rtnetlink.IFADDRMSG_SIZE, "sizeof(struct ifaddrmsg)"],
  ["RTMSG_SIZE", rtnetlink.RTMSG_SIZE, "sizeof(struct rtmsg)"],
  ["fib_rule_hdr", rtnetlink.RTMSG_SIZE, "sizeof(struct fib_rule_hdr)"],
  ["ucred", 12, "sizeof(struct ucred)"],
];

function ourConstants(): Map<string, number> {
  const out = new Map<string, number>();
  for (const module of [constants, epoll, errno, netns, process_, rtnetlink, tun]) {
    for (const [name, value] of Object.entries(module)) {
      if (typeof value === "number" && /^[A-Z][A-Z0-9_]+$/.test(name) && !NOT_IN_C.has(name)) out.set(name, value);
    }
  }
  return out;
}

/** What the headers of this machine say: value by C expression; an OPTIONAL name that they lack is left out. */
function ask(expressions: Iterable<string>): Map<string, number> {
  const lines = Array.from(expressions, (expression) => {
    const print = `printf("%s=%lld\\n", ${JSON.stringify(expression)}, (long long)(${expression}));`;
    return OPTIONAL.has(expression) ? `#ifdef ${expression}\n${print}\n#endif` : print;
  });
  const folder = mkdtempSync(join(tmpdir(), "weft-constants-"));
  try {
    writeFileSync(join(folder, "a.c"), `${HEADERS}\nint main(void) {\n${lines.join("\n")}\nreturn 0;\n}\n`);
    const compiled = Bun.spawnSync(["cc", "-w", "-o", "a", "a.c"], { cwd: folder });
    if (compiled.exitCode !== 0) throw new Error(compiled.stderr.toString());
    const text = Bun.spawnSync([join(folder, "a")]).stdout.toString();
    return new Map(
      text
        .trim()
        .split("\n")
        .map((line) => {
          const at = line.lastIndexOf("=");
          return [line.slice(0, at), Number(line.slice(at + 1))] as const;
        }),
    );
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const cannot =
  Bun.which("cc") === null ? "no C compiler" : process.arch !== "x64" ? `the machine is ${process.arch}` : null;
if (cannot !== null) process.stderr.write(`SKIP: constants against the C headers of x86-64: ${cannot}\n`);

describe("constants of the kernel's interface", () => {
  test.skipIf(cannot !== null)("are those of this machine's C headers on x86-64", () => {
    const ours = ourConstants();
    expect(ours.size).toBeGreaterThan(150); // all modules were found;
    const theirs = ask(ours.keys());
    const missing = [...ours.keys()].filter((name) => !theirs.has(name) && !OPTIONAL.has(name));
    expect(missing).toEqual([]);
    for (const [name, value] of theirs)
      expect({ name, value: ours.get(name)! >>> 0 }).toEqual({ name, value: value >>> 0 });
  });

  test.skipIf(cannot !== null)("structures are laid out as this machine's C compiler does on x86-64", () => {
    const theirs = ask(LAYOUT.map(([, , expression]) => expression));
    for (const [name, ours, expression] of LAYOUT) {
      expect({ name, value: ours }).toEqual({ name, value: theirs.get(expression)! });
    }
    const x64 = ask(["sizeof(struct epoll_event)", "offsetof(struct epoll_event, data)", "O_DIRECTORY", "O_NOFOLLOW"]);
    const { EPOLL_EVENT_SIZE, EPOLL_EVENT_DATA, O_DIRECTORY, O_NOFOLLOW } = constants.ARCH.x64;
    expect([...x64.values()]).toEqual([EPOLL_EVENT_SIZE, EPOLL_EVENT_DATA, O_DIRECTORY, O_NOFOLLOW]);
  });

  // No aarch64 headers here: the literal values of the ABI, written down independently of the table.
  test("are those of aarch64 where it differs from x86-64", () => {
    expect(constants.ARCH.arm64).toEqual({
      EPOLL_EVENT_SIZE: 16,
      EPOLL_EVENT_DATA: 8,
      O_DIRECTORY: 16384,
      O_NOFOLLOW: 32768,
    });
  });

  test("are the generic ones that aarch64 shares", () => {
    expect(constants).toMatchObject({
      O_NONBLOCK: 0o4000,
      O_CLOEXEC: 0o2000000,
      O_CREAT: 0o100,
      SOL_SOCKET: 1,
      SO_SNDBUF: 7,
      SO_RCVBUF: 8,
      SO_PEERCRED: 17,
      SO_SNDBUFFORCE: 32,
      SO_RCVBUFFORCE: 33,
      SO_MARK: 36,
      UDP_SEGMENT: 103,
      UDP_GRO: 104,
      AF_INET6: 10,
    });
    expect(tun).toMatchObject({
      TUNSETIFF: 0x400454ca,
      TUNSETOFFLOAD: 0x400454d0,
      TUNSETVNETHDRSZ: 0x400454d8,
      VNET_HEADER_SIZE: 10,
    });
    expect(msg).toMatchObject({ MSGHDR_SIZE: 56, MMSGHDR_SIZE: 64, IOVEC_SIZE: 16, CMSGHDR_SIZE: 16 });
  });

  test("errno names are those of the runtime's own table", () => {
    for (const [name, value] of Object.entries(osConstants.errno)) {
      // Two names for one number: ours is the first.
      if (name === "EWOULDBLOCK" || name === "ENOTSUP" || name === "EDEADLOCK") continue;
      expect(errno.errnoName(value)).toBe(name);
    }
  });

  test("arch() is the row of the machine that runs", () => {
    expect(constants.arch()).toBe(constants.ARCH[process.arch as "x64" | "arm64"]);
  });
});
