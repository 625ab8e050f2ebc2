import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { SO_RCVBUFFORCE, SO_SNDBUFFORCE, UDP_GRO, UDP_SEGMENT } from "./constants.ts";
import { EAGAIN, EHOSTUNREACH, EMSGSIZE, SysError } from "./errno.ts";
import { addressOf, closeFd, libc } from "./libc.ts";
import {
  addrPortAt,
  CONTROL_ROOM,
  emptyControl,
  MMSGHDR_LEN,
  MMSGHDR_SIZE,
  MSGHDR_CONTROLLEN,
  MSGHDR_FLAGS,
  parseControl,
  SOCKADDR_ROOM,
  sockaddrOf,
  writeIovec,
  writeMsghdr,
  writePktinfo4Cmsg,
  writePktinfo6Cmsg,
  writeSegmentCmsg,
} from "./msg.ts";
import { noNetns, noUnprivileged, TestNetns, until } from "./testing.ts";
import {
  localPort,
  openUdp,
  openUdpPair,
  recvfrom,
  recvmmsg,
  sendmmsg,
  sendto,
  setMark,
  UDP_BUFFER_BYTES,
  type UdpOptions,
  type UdpSocket,
} from "./udp.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

// One message each way, in WebAssembly memory.
const memory = new WebAssembly.Memory({ initial: 4, maximum: 4, shared: true });
const base = addressOf(memory.buffer);
const bytes = new Uint8Array(memory.buffer);
const view = new DataView(memory.buffer);
const HEADER = 0;
const IOVEC = 1024;
const NAME = 2048;
const CONTROL = 3072;
const DATA = 65536;
const DATA_ROOM = 65536;

function send(from: UdpSocket, to: string, data: Uint8Array, writeControl: (at: number) => number = () => 0): number {
  const sockaddr = sockaddrOf(to);
  bytes.set(sockaddr, NAME);
  bytes.set(data, DATA);
  writeIovec(view, IOVEC, base + DATA, data.length);
  const length = writeControl(CONTROL);
  const control = length === 0 ? 0 : base + CONTROL;
  writeMsghdr(view, HEADER, base + NAME, sockaddr.length, base + IOVEC, 1, control, length);
  return sendmmsg(from.fd, base + HEADER, 1);
}

function receive(socket: UdpSocket) {
  bytes.fill(0, DATA);
  writeIovec(view, IOVEC, base + DATA, DATA_ROOM);
  writeMsghdr(view, HEADER, base + NAME, SOCKADDR_ROOM, base + IOVEC, 1, base + CONTROL, CONTROL_ROOM);
  const count = recvmmsg(socket.fd, base + HEADER, 1);
  if (count <= 0) return null;
  const control = emptyControl();
  parseControl(view, CONTROL, view.getUint32(HEADER + MSGHDR_CONTROLLEN, true), control);
  return {
    from: addrPortAt(view, NAME),
    data: bytes.slice(DATA, DATA + view.getUint32(HEADER + MMSGHDR_LEN, true)),
    control,
    flags: view.getInt32(HEADER + MSGHDR_FLAGS, true),
  };
}

/** Loopback delivers at once, unless the machine is busy. */
const arrival = (socket: UdpSocket) => until("a datagram", () => receive(socket));

const pattern = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff);

function sockets(netns: TestNetns, ...options: UdpOptions[]) {
  const open = options.map((each) => netns.run(() => openUdp(each)));
  return { open, [Symbol.dispose]: () => open.forEach((socket) => void closeFd(socket.fd)) };
}

describe.skipIf(noNetns)("UDP sockets", () => {
  for (const family of [4, 6] as const) {
    const loopback = family === 4 ? "127.0.0.1" : "[::1]";

    test(`a GSO send arrives as one GRO datagram: IPv${family}`, async () => {
      using netns = new TestNetns();
      using pair = sockets(netns, { family }, { family });
      const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
      expect(sender).toMatchObject({ gso: true, gro: true, family });
      const data = pattern(40 * 1200 + 500);
      const to = `${loopback}:${receiver.port}`;
      expect(send(sender, to, data, (at) => writeSegmentCmsg(view, at, 1200))).toBe(1);
      const got = await arrival(receiver);
      expect(got.control.segmentSize).toBe(1200);
      expect(got.from).toBe(`${loopback}:${sender.port}`);
      expect(got.flags).toBe(0);
      expect(Bun.hash(got.data)).toBe(Bun.hash(data));
      expect(receive(receiver)).toBeNull();
    });

    test(`without GRO the same send arrives as single datagrams: IPv${family}`, async () => {
      using netns = new TestNetns();
      using pair = sockets(netns, { family }, { family, gro: false });
      const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
      expect(receiver.gro).toBe(false);
      send(sender, `${loopback}:${receiver.port}`, pattern(3000), (at) => writeSegmentCmsg(view, at, 1200));
      const got = [await arrival(receiver), await arrival(receiver), await arrival(receiver)];
      expect(got.map((each) => each.data.length)).toEqual([1200, 1200, 600]);
      expect(got.map((each) => each.control.segmentSize)).toEqual([0, 0, 0]);
      expect(receive(receiver)).toBeNull();
    });

    test(`the local address of a datagram is known and can be the source of the answer: IPv${family}`, async () => {
      using netns = new TestNetns();
      const [first, second, far] =
        family === 4 ? ["10.1.0.1", "10.1.0.2", "10.1.0.3"] : ["fd01::1", "fd01::2", "fd01::3"];
      for (const ip of [first, second, far] as string[]) {
        netns.netlink.addAddress({ link: "lo", prefix: `${ip}/${family === 4 ? 32 : 128}` });
        await until("the address", () => netns.netlink.isLocal(ip));
      }
      const text = (ip: string | undefined, port: number) => (family === 4 ? `${ip}:${port}` : `[${ip}]:${port}`);
      using pair = sockets(netns, { family, pktinfo: true }, { family, address: far! });
      const [server, client] = pair.open as [UdpSocket, UdpSocket];
      for (const ip of [second, first]) {
        expect(send(client, text(ip, server.port), pattern(10))).toBe(1);
        const got = await arrival(server);
        expect(got.control.ifindex).toBe(1);
        const sticky = (at: number) => {
          if (family === 4) return writePktinfo4Cmsg(view, at, 0, got.control.local4);
          // The received bytes lie where the control message to send is being written.
          bytes.copyWithin(CONTROL + 512, got.control.local6At, got.control.local6At + 16);
          return writePktinfo6Cmsg(view, at, 0, CONTROL + 512);
        };
        expect(send(server, text(far, client.port), pattern(10), sticky)).toBe(1);
        expect((await arrival(client)).from).toBe(text(ip, server.port));
      }
    });
  }

  test("several datagrams go and come in one call", async () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 4 }, { family: 4, gro: false });
    const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
    const sockaddr = sockaddrOf(`127.0.0.1:${receiver.port}`);
    bytes.set(sockaddr, NAME);
    for (let i = 0; i < 8; i++) {
      bytes.fill(i + 1, DATA + i * 2000, DATA + i * 2000 + 100 + i);
      writeIovec(view, IOVEC + i * 16, base + DATA + i * 2000, 100 + i);
      writeMsghdr(view, HEADER + i * MMSGHDR_SIZE, base + NAME, 16, base + IOVEC + i * 16, 1, 0, 0);
    }
    expect(sendmmsg(sender.fd, base + HEADER, 8)).toBe(8);
    const layOut = () => {
      for (let i = 0; i < 10; i++) {
        writeIovec(view, IOVEC + i * 16, base + DATA + i * 2000, 2000);
        writeMsghdr(view, HEADER + i * MMSGHDR_SIZE, 0, 0, base + IOVEC + i * 16, 1, 0, 0);
      }
    };
    const got: [number, number][] = [];
    let calls = 0;
    await until("eight datagrams", () => {
      layOut();
      const count = recvmmsg(receiver.fd, base + HEADER, 10);
      calls++;
      for (let i = 0; i < count; i++) {
        const length = view.getUint32(HEADER + i * MMSGHDR_SIZE + MMSGHDR_LEN, true);
        got.push([length, bytes[DATA + i * 2000 + length - 1]!]);
      }
      return got.length === 8;
    });
    expect(got).toEqual(Array.from({ length: 8 }, (_, i) => [100 + i, i + 1]));
    expect(calls).toBeLessThan(8);
    expect(recvmmsg(receiver.fd, base + HEADER, 10)).toBe(-EAGAIN);
  });

  test("a pair has one port in both families, and a port in use is a sentence", () => {
    using netns = new TestNetns();
    const { v4, v6 } = netns.run(() => openUdpPair({}));
    try {
      expect(v4?.port).toBeGreaterThan(0);
      expect(v6?.port).toBe(v4!.port);
      expect(localPort(v6!.fd)).toBe(v4!.port);
      expect(() => netns.run(() => openUdpPair({ port: v4!.port }))).toThrow(
        `bind UDP 0.0.0.0:${v4!.port}: address or port in use (EADDRINUSE)`,
      );
    } finally {
      for (const socket of [v4, v6]) if (socket) closeFd(socket.fd);
    }
  });

  test("a port that only IPv4 has free is passed over when the kernel chooses, and its socket closed", () => {
    using netns = new TestNetns();
    // Of a range of two ports IPv6 has one taken.
    netns.run(() => writeFileSync("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001"));
    const taken = [40000].map((port) => netns.run(() => openUdp({ family: 6, port })));
    const opened: number[] = taken.map((socket) => socket.fd);
    try {
      // The kernel's choice is random: it fails once in 2^64 runs.
      const { v4, v6 } = netns.run(() => openUdpPair({}));
      opened.push(v4!.fd, v6!.fd);
      expect([v4?.port, v6?.port]).toEqual([40001, 40001]);
    } finally {
      opened.forEach(closeFd);
    }
  });

  test("falls back by itself from each option that the kernel refuses", () => {
    using netns = new TestNetns();
    const refuses = (...names: number[]): NonNullable<UdpOptions["calls"]> => ({
      // A level that no kernel knows leaves the errno of a refusal.
      getsockopt: (fd, level, name, value, length) =>
        libc.getsockopt(fd, names.includes(name) ? 9999 : level, name, value, length),
      setsockopt: (fd, level, name, value, length) =>
        libc.setsockopt(fd, names.includes(name) ? 9999 : level, name, value, length),
    });
    using open = sockets(
      netns,
      { family: 4, calls: refuses(UDP_SEGMENT) },
      { family: 6, calls: refuses(UDP_GRO) },
      { family: 4, calls: refuses(SO_SNDBUFFORCE, SO_RCVBUFFORCE) },
    );
    expect(open.open[0]).toMatchObject({ gso: false, gro: true });
    expect(open.open[1]).toMatchObject({ gso: true, gro: false });
    // The kernel doubles what it grants, for its own use.
    const allowed = (name: string) =>
      2 * Math.min(UDP_BUFFER_BYTES, Number(readFileSync(`/proc/sys/net/core/${name}`)));
    expect(open.open[2]).toMatchObject({ sendBuffer: allowed("wmem_max"), receiveBuffer: allowed("rmem_max") });
  });

  test("buffers are of the size that was asked for", () => {
    using netns = new TestNetns();
    using open = sockets(netns, { family: 4, bufferBytes: 16384 });
    expect(open.open[0]).toMatchObject({ sendBuffer: 2 * 16384, receiveBuffer: 2 * 16384 });
  });

  test.skipIf(noUnprivileged)("buffers are seven megabytes by force of real root", () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 4 });
    expect(pair.open[0]).toMatchObject({ sendBuffer: 2 * UDP_BUFFER_BYTES, receiveBuffer: 2 * UDP_BUFFER_BYTES });
  });

  test("each offload can be left off", () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 6, gso: false, gro: false });
    expect(pair.open[0]).toMatchObject({ gso: false, gro: false, pktinfo: false });
  });

  test("the mark steers the route", () => {
    using netns = new TestNetns();
    netns.netlink.addRule({ family: 4, priority: 100, fwmark: 0x80000, fwmask: 0xff0000, table: 77 });
    netns.netlink.addRoute({ dst: "10.5.0.0/16", type: "unreachable", table: 77 });
    netns.netlink.addRoute({ dst: "10.5.0.0/16", dev: "lo" });
    using pair = sockets(netns, { family: 4, mark: 0x80000 });
    const socket = pair.open[0]!;
    expect(sendto(socket.fd, sockaddrOf("10.5.0.1:9"), pattern(4))).toBe(-EHOSTUNREACH);
    setMark(socket.fd, 0);
    expect(sendto(socket.fd, sockaddrOf("10.5.0.1:9"), pattern(4))).toBe(4);
  });

  test("single datagrams for the slow paths", async () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 6, gro: false }, { family: 6, gro: false });
    const [a, b] = pair.open as [UdpSocket, UdpSocket];
    const room = new Uint8Array(2000);
    expect(recvfrom(b.fd, room)).toBeNull();
    expect(sendto(a.fd, sockaddrOf(`[::1]:${b.port}`), pattern(1300))).toBe(1300);
    expect(await until("a datagram", () => recvfrom(b.fd, room))).toEqual({ from: `[::1]:${a.port}`, length: 1300 });
    expect(room.subarray(0, 1300)).toEqual(pattern(1300));
    expect(sendto(a.fd, sockaddrOf(`[::1]:${b.port}`), pattern(65530))).toBe(-EMSGSIZE);
    expect(() => recvfrom(-1, room)).toThrow(SysError);
  });

  test("a GSO segment above the MTU is refused, so that the caller can fall back", async () => {
    using netns = new TestNetns();
    netns.netlink.setLink("lo", { mtu: 1500 });
    using pair = sockets(netns, { family: 4 }, { family: 4 });
    const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
    const to = `127.0.0.1:${receiver.port}`;
    expect(send(sender, to, pattern(6000), (at) => writeSegmentCmsg(view, at, 2000))).toBe(-EMSGSIZE);
    expect(send(sender, to, pattern(2000))).toBe(1);
    expect((await arrival(receiver)).data.length).toBe(2000);
  });

  test("an address of the wrong family is a sentence", () => {
    using netns = new TestNetns();
    expect(() => netns.run(() => openUdp({ family: 4, address: "::1" }))).toThrow(
      'bind a UDP socket: "::1" is not an IPv4 address (EINVAL)',
    );
  });
});
