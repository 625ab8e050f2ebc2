import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { EMSGSIZE, SysError } from "./errno.ts";
import { addressOf, closeFd } from "./libc.ts";
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
import { noNetns, TestNetns } from "./testing.ts";
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

const pattern = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff);

function sockets(netns: TestNetns, ...options: UdpOptions[]) {
  const open = options.map((each) => netns.run(() => openUdp(each)));
  return { open, [Symbol.dispose]: () => open.forEach((socket) => void closeFd(socket.fd)) };
}

describe.skipIf(noNetns)("UDP sockets", () => {
  for (const family of [4, 6] as const) {
    const loopback = family === 4 ? "127.0.0.1" : "[::1]";

    test(`a GSO send arrives as one GRO datagram: IPv${family}`, () => {
      using netns = new TestNetns();
      using pair = sockets(netns, { family }, { family });
      const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
      expect(sender).toMatchObject({ gso: true, gro: true, family });
      const data = pattern(40 * 1200 + 500);
      const to = `${loopback}:${receiver.port}`;
      expect(send(sender, to, data, (at) => writeSegmentCmsg(view, at, 1200))).toBe(1);
      const got = receive(receiver);
      expect(got?.control.segmentSize).toBe(1200);
      expect(got?.from).toBe(`${loopback}:${sender.port}`);
      expect(got?.flags).toBe(0);
      expect(got && Bun.hash(got.data)).toBe(Bun.hash(data));
      expect(receive(receiver)).toBeNull();
    });

    test(`without GRO the same send arrives as single datagrams: IPv${family}`, () => {
      using netns = new TestNetns();
      using pair = sockets(netns, { family }, { family, gro: false });
      const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
      expect(receiver.gro).toBe(false);
      send(sender, `${loopback}:${receiver.port}`, pattern(3000), (at) => writeSegmentCmsg(view, at, 1200));
      const got = [receive(receiver), receive(receiver), receive(receiver), receive(receiver)];
      expect(got.map((each) => each?.data.length)).toEqual([1200, 1200, 600, undefined]);
      expect(got.map((each) => each?.control.segmentSize)).toEqual([0, 0, 0, undefined]);
    });

    test(`the local address of a datagram is known and can be the source of the answer: IPv${family}`, () => {
      using netns = new TestNetns();
      const [first, second, far] =
        family === 4 ? ["10.1.0.1", "10.1.0.2", "10.1.0.3"] : ["fd01::1", "fd01::2", "fd01::3"];
      for (const ip of [first, second, far]) {
        netns.netlink.addAddress({ link: "lo", prefix: `${ip}/${family === 4 ? 32 : 128}` });
      }
      const text = (ip: string | undefined, port: number) => (family === 4 ? `${ip}:${port}` : `[${ip}]:${port}`);
      using pair = sockets(netns, { family, pktinfo: true }, { family, address: far! });
      const [server, client] = pair.open as [UdpSocket, UdpSocket];
      for (const ip of [second, first]) {
        expect(send(client, text(ip, server.port), pattern(10))).toBe(1);
        const got = receive(server)!;
        expect(got.control.ifindex).toBe(1);
        const sticky = (at: number) => {
          if (family === 4) return writePktinfo4Cmsg(view, at, 0, got.control.local4);
          // The received bytes lie where the control message to send is being written.
          bytes.copyWithin(CONTROL + 512, got.control.local6At, got.control.local6At + 16);
          return writePktinfo6Cmsg(view, at, 0, CONTROL + 512);
        };
        expect(send(server, text(far, client.port), pattern(10), sticky)).toBe(1);
        expect(receive(client)?.from).toBe(text(ip, server.port));
      }
    });
  }

  test("several datagrams go and come in one call", () => {
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
    bytes.fill(0, DATA);
    for (let i = 0; i < 10; i++) {
      writeIovec(view, IOVEC + i * 16, base + DATA + i * 2000, 2000);
      writeMsghdr(view, HEADER + i * MMSGHDR_SIZE, 0, 0, base + IOVEC + i * 16, 1, 0, 0);
    }
    expect(recvmmsg(receiver.fd, base + HEADER, 10)).toBe(8);
    for (let i = 0; i < 8; i++) {
      expect(view.getUint32(HEADER + i * MMSGHDR_SIZE + MMSGHDR_LEN, true)).toBe(100 + i);
      expect(bytes[DATA + i * 2000 + 99 + i]).toBe(i + 1);
    }
    expect(recvmmsg(receiver.fd, base + HEADER, 10)).toBe(-11);
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

  test("buffers are seven megabytes by force, or what is allowed without", () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 4 }, { family: 4, force: false, bufferBytes: 4096 * 4 });
    const [forced, plain] = pair.open as [UdpSocket, UdpSocket];
    expect(forced).toMatchObject({ sendBuffer: 2 * UDP_BUFFER_BYTES, receiveBuffer: 2 * UDP_BUFFER_BYTES });
    expect(plain).toMatchObject({ sendBuffer: 2 * 4096 * 4, receiveBuffer: 2 * 4096 * 4 });
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
    expect(sendto(socket.fd, sockaddrOf("10.5.0.1:9"), pattern(4))).toBe(-113);
    setMark(socket.fd, 0);
    expect(sendto(socket.fd, sockaddrOf("10.5.0.1:9"), pattern(4))).toBe(4);
  });

  test("single datagrams for the slow paths", () => {
    using netns = new TestNetns();
    using pair = sockets(netns, { family: 6, gro: false }, { family: 6, gro: false });
    const [a, b] = pair.open as [UdpSocket, UdpSocket];
    const room = new Uint8Array(2000);
    expect(recvfrom(b.fd, room)).toBeNull();
    expect(sendto(a.fd, sockaddrOf(`[::1]:${b.port}`), pattern(1300))).toBe(1300);
    expect(recvfrom(b.fd, room)).toEqual({ from: `[::1]:${a.port}`, length: 1300 });
    expect(room.subarray(0, 1300)).toEqual(pattern(1300));
    expect(sendto(a.fd, sockaddrOf(`[::1]:${b.port}`), pattern(65530))).toBe(-EMSGSIZE);
    expect(() => recvfrom(-1, room)).toThrow(SysError);
  });

  test("a GSO segment above the MTU is refused, so that the caller can fall back", () => {
    using netns = new TestNetns();
    netns.netlink.setLink("lo", { mtu: 1500 });
    using pair = sockets(netns, { family: 4 }, { family: 4 });
    const [sender, receiver] = pair.open as [UdpSocket, UdpSocket];
    const to = `127.0.0.1:${receiver.port}`;
    expect(send(sender, to, pattern(6000), (at) => writeSegmentCmsg(view, at, 2000))).toBe(-EMSGSIZE);
    expect(send(sender, to, pattern(2000))).toBe(1);
    expect(receive(receiver)?.data.length).toBe(2000);
  });

  test("an address of the wrong family is a sentence", () => {
    using netns = new TestNetns();
    expect(() => netns.run(() => openUdp({ family: 4, address: "::1" }))).toThrow(
      'bind a UDP socket: "::1" is not an IPv4 address (EINVAL)',
    );
  });
});
