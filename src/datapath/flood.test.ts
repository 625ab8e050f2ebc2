// Who floods delays and loses its own alone. UDP sockets on loopback stand for the network and for the TUN.
import { afterAll, expect, test } from "bun:test";
import { O_RDWR } from "../../ffi/constants.ts";
import { addressOf, closeFd, cstring, libc } from "../../ffi/libc.ts";
import { sockaddrOf } from "../../ffi/msg.ts";
import { openUdp, sendto } from "../../ffi/udp.ts";
import { Asm } from "../crypto/wasm.ts";
import { parseIP } from "../wire/ip.ts";
import type { Device } from "../wireguard/device.ts";
import { ASM_DROPS } from "./asm.ts";
import { ipPacket, udp } from "./packets.fixture.ts";
import { PeerPaths } from "./peer-paths.ts";
import { Receiver } from "./receive.ts";
import type { Transmitter } from "./transmit.ts";
import { TunReader } from "./tun-reader.ts";
import "../wireguard/asm.ts";

const LARGE_BYTES = 32_000;
/** More of the large ones than there are buffers for. */
const FLOOD = 80;

const from = openUdp({ family: 4, address: "127.0.0.1" });
const sockets = [openUdp({ family: 4, address: "127.0.0.1" }), openUdp({ family: 4, address: "127.0.0.1" })] as const;
const sink = libc.open(cstring("/dev/null"), O_RDWR, 0);
const tooSmall = sockets[0].receiveBuffer < 2 * FLOOD * LARGE_BYTES;
if (tooSmall) console.error("SKIP: only root may have a socket buffer that holds a flood");
afterAll(() => {
  for (const { fd } of [from, ...sockets]) closeFd(fd);
  closeFd(sink);
});

function setUp() {
  const asm = Asm.create(256);
  const dropped = (name: (typeof ASM_DROPS)[number]) =>
    asm.u32[(asm.exports.dropCounters() >> 2) + ASM_DROPS.indexOf(name)]!;
  return { asm, base: addressOf(asm.u8), dropped };
}

function send(to: { port: number }, data: Uint8Array): void {
  expect(sendto(from.fd, sockaddrOf(`127.0.0.1:${to.port}`), data)).toBe(data.length);
}

function receiver() {
  const { asm, base, dropped } = setUp();
  const { exports, u8 } = asm;
  exports.sessionTableInit(asm.alloc(exports.sessionTableSize(4)), 4);
  exports.trieInit(asm.alloc(exports.trieSize(4)), 4);
  const p = asm.alloc(1 << 17) + 64;
  // Sessions 1 and 2 are those of the peers 1 and 2, each with itself.
  for (const slot of [1, 2]) exports.sessionInstall(slot, p, p, slot, slot, slot);
  const got: Record<number, number> = { 1: 0, 2: 0 };
  const device = {
    mode: "mesh",
    received: (slot: number, _session: number, packets: number) => {
      got[slot]! += packets;
    },
  } as unknown as Device;
  const rx = new Receiver(
    asm,
    base,
    device,
    new PeerPaths(asm, "mesh", 4),
    { datagram: () => {}, drain: () => {}, arrived: () => {} },
    { fd: sink, vnetHeader: true, tso: true, uso: true },
  );
  const message = (peer: number, bytes: number) => {
    expect(exports.sessionSeal(peer, p, bytes)).toBe(1);
    send(sockets[0], u8.slice(p - 16, p + bytes + 16));
  };
  return { rx, got, message, dropped };
}

test.skipIf(tooSmall)(
  "a peer that floods does not hold up another one's messages in the socket, and loses what does not fit",
  () => {
    const { rx, got, message, dropped } = receiver();
    message(2, 64);
    for (let i = 0; i < FLOOD; i++) message(1, LARGE_BYTES);
    message(2, 64);
    rx.read(sockets[0].fd, -1, performance.now());
    expect(got[2]).toBe(2);
    expect(got[1]).toBeLessThan(FLOOD);
    while (rx.backlog) rx.read(sockets[0].fd, -1, performance.now());
    expect(dropped("rx-queue")).toBeGreaterThan(0);
    expect(got[1]! + dropped("rx-queue")).toBe(FLOOD);
  },
);

test.skipIf(tooSmall)("a peer alone loses nothing: what does not fit waits in the socket", () => {
  const { rx, got, message, dropped } = receiver();
  for (let i = 0; i < FLOOD; i++) message(1, LARGE_BYTES);
  for (let i = 0; i < FLOOD && got[1]! < FLOOD; i++) rx.read(sockets[0].fd, -1, performance.now());
  expect([got[1], dropped("rx-queue")]).toEqual([FLOOD, 0]);
});

for (const flows of [1, 2]) {
  test.skipIf(tooSmall)(
    `of ${flows === 1 ? "one flow nothing is lost" : "two flows the one that floods loses its own, and the other goes first"}`,
    () => {
      const { asm, base, dropped } = setUp();
      const reader = new TunReader(asm, base, { fd: sockets[1].fd, vnetHeader: false });
      const sizes: number[] = [];
      const tx = { packet: (_p: number, length: number) => sizes.push(length) } as unknown as Transmitter;
      const [src, dst] = [parseIP("10.0.0.1")!, parseIP("10.0.0.2")!];
      const packet = (port: number, bytes: number) =>
        send(sockets[1], ipPacket({ src, dst, proto: 17, transport: udp(port, 53, new Uint8Array(bytes)) }));
      if (flows === 2) packet(2000, 10);
      for (let i = 0; i < FLOOD; i++) packet(1000, LARGE_BYTES);
      if (flows === 2) packet(2000, 10);
      reader.read(tx, performance.now());
      for (let i = 0; i < FLOOD && (reader.backlog || sizes.length < FLOOD); i++) reader.read(tx, performance.now());
      const large = sizes.filter((size) => size > LARGE_BYTES);
      expect(large.length + dropped("tun-queue")).toBe(FLOOD);
      if (flows === 1) expect(dropped("tun-queue")).toBe(0);
      else {
        expect(sizes.slice(0, 2)).toEqual([38, 38]);
        expect(dropped("tun-queue")).toBeGreaterThan(0);
      }
    },
  );
}
