import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { EBADFD, EIO, SysError } from "./errno.ts";
import { echoRequest, internetChecksum, parseEchoReply, stripIpHeader } from "./icmp.ts";
import { type Address, addressOf, closeFd, type Libc, libc } from "./libc.ts";
import { writeIovec } from "./msg.ts";
import { asNobody, noNetns, noUnprivileged, TestNetns, until } from "./testing.ts";
import {
  badInterfaceName,
  IFF_VNET_HDR,
  openTun,
  TUN_READ_SIZE,
  TUNSETIFF,
  TUNSETOFFLOAD,
  type Tun,
  type TunOptions,
  tunRead,
  tunWrite,
  tunWritev,
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_NET_HDR_GSO_TCPV4,
  VNET_HEADER_SIZE,
} from "./tun.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

const CHILD = `${import.meta.dir}/../lab/child.ts`;

/** A namespace with a TUN device that is up and has `prefix`. */
function tunnel(prefix: string, options: Partial<TunOptions> = {}) {
  const netns = new TestNetns();
  const tun = netns.run(() => openTun({ name: "weft0", ...options }));
  netns.netlink.setLink(tun.name, { up: true, mtu: 1280 });
  netns.netlink.addAddress({ link: tun.name, prefix });
  return {
    netns,
    tun,
    [Symbol.dispose]() {
      closeFd(tun.fd);
      netns[Symbol.dispose]();
    },
  };
}

function ipv4(protocol: number, source: number[], destination: number[], payload: Uint8Array): Uint8Array {
  const packet = new Uint8Array(20 + payload.length);
  const view = new DataView(packet.buffer);
  packet.set([0x45, 0]);
  view.setUint16(2, packet.length);
  packet.set([64, protocol], 8);
  packet.set(source, 12);
  packet.set(destination, 16);
  view.setUint16(10, internetChecksum(packet.subarray(0, 20)));
  packet.set(payload, 20);
  return packet;
}

/** Reads until a packet satisfies `wanted`: the kernel says things of its own as well. */
async function readPacket(
  tun: Tun,
  wanted: (ip: Uint8Array) => boolean,
): Promise<{ header: Uint8Array; ip: Uint8Array }> {
  const memory = new Uint8Array(TUN_READ_SIZE);
  const skip = tun.vnetHeader ? VNET_HEADER_SIZE : 0;
  return await until("a packet on the TUN device", () => {
    const length = tunRead(tun.fd, memory, memory.length);
    if (length < skip) return null;
    const ip = memory.slice(skip, length);
    return wanted(ip) ? { header: memory.slice(0, skip), ip } : null;
  });
}

function refusal(options: TunOptions): SysError {
  try {
    closeFd(openTun(options).fd);
  } catch (error) {
    if (error instanceof SysError) return error;
    throw error;
  }
  throw new Error("the kernel took it");
}

describe.skipIf(noNetns)("a TUN device", () => {
  test("carries packets: an echo request goes in, the kernel's reply comes out", async () => {
    for (const vnetHeader of [true, false]) {
      using it = tunnel("10.9.0.1/24", { vnetHeader });
      expect(it.tun).toMatchObject({ name: "weft0", vnetHeader });
      expect(it.netns.netlink.link("weft0")?.index).toBe(it.tun.index);

      const data = new TextEncoder().encode("weft");
      const request = ipv4(1, [10, 9, 0, 2], [10, 9, 0, 1], echoRequest(4, 0x1234, 7, data));
      // In WebAssembly memory, gathered from two pieces, as the datapath does.
      const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });
      const bytes = new Uint8Array(memory.buffer);
      const base = addressOf(memory.buffer);
      const header = vnetHeader ? VNET_HEADER_SIZE : 0;
      bytes.set(request.subarray(0, 24), 1000 + header);
      bytes.set(request.subarray(24), 5000);
      const view = new DataView(memory.buffer);
      writeIovec(view, 0, base + 1000, header + 24);
      writeIovec(view, 16, base + 5000, request.length - 24);
      expect(tunWritev(it.tun.fd, base, 2)).toBe(header + request.length);

      const reply = await readPacket(it.tun, (ip) => ip[0] === 0x45 && ip[9] === 1);
      expect(Array.from(reply.ip.subarray(12, 20))).toEqual([10, 9, 0, 1, 10, 9, 0, 2]);
      const icmp = stripIpHeader(reply.ip)!;
      expect(parseEchoReply(4, icmp)).toEqual({ identifier: 0x1234, sequence: 7 });
      expect(new TextDecoder().decode(icmp.subarray(8))).toBe("weft");
    }
  });

  test("hands over a TCP super-packet, and takes it: a transfer between two namespaces over two devices", async () => {
    using a = tunnel("10.9.0.1/24");
    using b = tunnel("10.9.0.2/24");
    expect(a.tun).toMatchObject({ checksum: true, tso: true });
    const bytes = 3_000_000;
    const spawn = (netns: TestNetns, ...args: string[]) =>
      netns.run(() => Bun.spawn([process.execPath, CHILD, ...args], { stdout: "pipe", stderr: "inherit" }));
    const sink = spawn(b.netns, "tcp-sink", "10.9.0.2", "hash");
    const lines = sink.stdout.getReader();
    const line = async () => JSON.parse(new TextDecoder().decode((await lines.read()).value));
    const source = spawn(a.netns, "tcp-source", "10.9.0.2", String((await line()).port), "bytes", String(bytes));

    let superPackets = 0;
    let running = true;
    const buffer = new Uint8Array(TUN_READ_SIZE);
    const view = new DataView(buffer.buffer);
    const carry = (from: Tun, to: Tun) => {
      for (;;) {
        const length = tunRead(from.fd, buffer, buffer.length);
        if (length <= 0) return;
        const gsoSize = view.getUint16(4, true);
        if (buffer[1] === VIRTIO_NET_HDR_GSO_TCPV4 && length > 2 * 1280 && gsoSize > 0 && gsoSize <= 1240) {
          expect(buffer[0]! & VIRTIO_NET_HDR_F_NEEDS_CSUM).toBe(VIRTIO_NET_HDR_F_NEEDS_CSUM);
          superPackets++;
        }
        tunWrite(to.fd, buffer, length);
      }
    };
    const wire = (async () => {
      while (running) {
        carry(a.tun, b.tun);
        carry(b.tun, a.tun);
        await Bun.sleep(0);
      }
    })();
    try {
      const received = await line();
      const sent = JSON.parse(await new Response(source.stdout).text());
      expect(received).toMatchObject({ bytes, hash: sent.hash });
      expect(superPackets).toBeGreaterThan(10);
    } finally {
      running = false;
      await wire;
      for (const child of [sink, source]) child.kill("SIGKILL");
      await Promise.all([sink.exited, source.exited]);
    }
  });

  test("gives up each offload that is not wanted or not there, and says so", () => {
    using netns = new TestNetns();
    const cases: [Partial<TunOptions>, Partial<Tun>][] = [
      [{ uso: false }, { vnetHeader: true, checksum: true, tso: true, uso: false }],
      [
        { tso: false, uso: false },
        { vnetHeader: true, checksum: false, tso: false, uso: false },
      ],
      [{ vnetHeader: false }, { vnetHeader: false, checksum: false, tso: false, uso: false }],
    ];
    for (const [options, outcome] of cases) {
      const tun = netns.run(() => openTun({ name: "weft%d", ...options }));
      expect(tun).toMatchObject({ name: "weft0", ...outcome });
      closeFd(tun.fd);
    }
  });

  test("falls back by itself from each offload that the kernel refuses", () => {
    using netns = new TestNetns();
    // An interface that is neither TUN nor TAP, and an offload that no kernel has, leave the errno of a refusal: EINVAL.
    const refused = (fd: number, request: number) =>
      libc.ioctl(fd, request, request === TUNSETIFF ? new Uint8Array(40) : 0x8000_0000);
    const kernel =
      (refuses: (request: number, argument: Address) => boolean): Libc["ioctl"] =>
      (fd, request, argument) =>
        refuses(request, argument) ? refused(fd, request) : libc.ioctl(fd, request, argument);
    const flagsOf = (argument: Address) => (argument instanceof Uint8Array ? argument[17]! << 8 : 0);
    const offload = (mask: number) => (request: number, argument: Address) =>
      request === TUNSETOFFLOAD && (Number(argument) & mask) !== 0;
    const cases: [Libc["ioctl"], Partial<Tun>][] = [
      [kernel(offload(0x60)), { vnetHeader: true, checksum: true, tso: true, uso: false }],
      [kernel(offload(0xff)), { vnetHeader: true, checksum: false, tso: false, uso: false }],
      [
        kernel((request, argument) => request === TUNSETIFF && (flagsOf(argument) & IFF_VNET_HDR) !== 0),
        { vnetHeader: false, checksum: false, tso: false, uso: false },
      ],
    ];
    for (const [ioctl, outcome] of cases) {
      const tun = netns.run(() => openTun({ name: "weft0", ioctl }));
      expect(tun).toMatchObject({ name: "weft0", ...outcome });
      closeFd(tun.fd);
    }
  });

  test("says in one sentence why it cannot be had", () => {
    using netns = new TestNetns();
    const first = netns.run(() => openTun({ name: "weft0" }));
    try {
      netns.run(() => {
        expect(refusal({ name: "weft0" }).message).toBe(
          "create the TUN device weft0: another process holds it: stop that one, or choose another name (EBUSY)",
        );
        expect(refusal({ name: "lo" }).message).toContain("an interface of another kind has that name");
        const absent = refusal({ name: "weft1", device: "/dev/net/absent" });
        expect(absent.code).toBe("ENOENT");
        expect(absent.message).toContain("run `modprobe tun`");
      });
    } finally {
      closeFd(first.fd);
    }
  });

  test.skipIf(noUnprivileged)("without the right to make one: says what is missing", async () => {
    using netns = new TestNetns();
    const code = `try { openTun({ name: "weft0" }); console.log("made"); } catch (error) { console.log(error.message); }`;
    const said = await asNobody(netns, { openTun: `${import.meta.dir}/tun.ts` }, code);
    // Which of the two depends on the mode of the device.
    expect(said).toMatch(
      /^create the TUN device weft0: CAP_NET_ADMIN is missing|^open \/dev\/net\/tun: permission denied/,
    );
  });

  test("that is down refuses writes, and one that was deleted says so", () => {
    using it = tunnel("10.9.0.1/24");
    const packet = new Uint8Array(VNET_HEADER_SIZE + 40);
    packet[VNET_HEADER_SIZE] = 0x45;
    it.netns.netlink.setLink("weft0", { up: false });
    expect(tunWrite(it.tun.fd, packet, packet.length)).toBe(-EIO);
    it.netns.netlink.deleteLink("weft0");
    expect(tunRead(it.tun.fd, packet, packet.length)).toBe(-EBADFD);
    expect(tunWrite(it.tun.fd, packet, packet.length)).toBe(-EBADFD);
  });

  test("closing it removes it", () => {
    using netns = new TestNetns();
    const tun = netns.run(() => openTun({ name: "weft0" }));
    expect(netns.netlink.link("weft0")?.kind).toBe("tun");
    closeFd(tun.fd);
    expect(netns.netlink.link("weft0")).toBeNull();
  });
});

describe("device names", () => {
  test("that the kernel would cut or refuse are refused with the reason", () => {
    expect(badInterfaceName("weft0")).toBeNull();
    expect(badInterfaceName("")).toBeNull();
    expect(badInterfaceName("a".repeat(15))).toBeNull();
    expect(badInterfaceName("a".repeat(16))).toContain("has 16 bytes: at most 15");
    expect(badInterfaceName("ääääääää")).toContain("has 16 bytes");
    for (const name of ["a/b", "a b", "a:1", ".", "..", "a\n", "a\0"])
      expect(badInterfaceName(name)).toContain("refuses");
    expect(() => openTun({ name: "a/b" })).toThrow(/^create a TUN device: the device name "a\/b" holds/);
  });
});
