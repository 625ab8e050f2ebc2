// 10^8 bytes through transmitter, UDP sockets on loopback, and receiver, in this thread: what the hot path leaves on the heap.

import { heapStats } from "bun:jsc";
import { afterAll, expect, test } from "bun:test";
import { O_RDWR } from "../../ffi/constants.ts";
import { addressOf, closeFd, cstring, libc } from "../../ffi/libc.ts";
import { openUdp } from "../../ffi/udp.ts";
import { Asm } from "../crypto/wasm.ts";
import type { Device } from "../wireguard/device.ts";
import { ipPacket, TSO4, tcp, vnetHeader } from "./packets.fixture.ts";
import { PeerPaths } from "./peer-paths.ts";
import { Receiver } from "./receive.ts";
import { Transmitter } from "./transmit.ts";
import "../wireguard/asm.ts";

const MTU = 1420;
const BYTES = 1e8;
const sockets = [
  openUdp({ family: 4, address: "127.0.0.1" }),
  openUdp({ family: 4, address: "127.0.0.1", tos: true }),
] as const;
// The vnet header and all: a writev to it succeeds.
const sink = libc.open(cstring("/dev/null"), O_RDWR, 0);
afterAll(() => {
  for (const { fd } of sockets) closeFd(fd);
  closeFd(sink);
});

test("nothing is allocated for each packet", async () => {
  const asm = Asm.create((64 << 20) >> 16);
  const { exports, u8 } = asm;
  const base = addressOf(asm.u8);
  exports.sessionTableInit(asm.alloc(exports.sessionTableSize(4)), 4);
  exports.trieInit(asm.alloc(exports.trieSize(4)), 4);
  const p = asm.alloc(1 << 17) + 16;
  u8.set([10, 0, 0, 0], p);
  exports.trieInsert(p, 8, 4, 0);
  u8.fill(7, p, p + 64);
  exports.sessionInstall(1, p, p + 32, 1, 1, 0);
  let received = 0;
  const device = {
    mode: "mesh",
    prepareSend: () => 1,
    stage: () => {},
    sent: () => {},
    peerBySlot: () => ({ path: { udp: `127.0.0.1:${sockets[1].port}`, relay: false } }),
    received: (_slot: number, _session: number, data: number) => {
      received += data;
    },
  } as unknown as Device;
  const paths = new PeerPaths(asm, "mesh", 4);
  const hooks = { drain: () => {}, relay: () => {}, activity: () => {} };
  const tx = new Transmitter(asm, base, device, paths, hooks, {
    mtu: MTU,
    fd4: sockets[0].fd,
    fd6: -1,
    gso4: sockets[0].gso,
    gso6: false,
  });
  const rx = new Receiver(
    asm,
    base,
    device,
    paths,
    { datagram: () => {}, drain: () => {}, arrived: () => {} },
    {
      fd: sink,
      vnetHeader: true,
      tso: true,
      uso: true,
    },
  );

  const payload = 40 * (MTU - 40);
  const addresses = { src: Uint8Array.of(10, 0, 0, 1), dst: Uint8Array.of(10, 0, 0, 2) };
  const superpacket = ipPacket({
    ...addresses,
    proto: 6,
    transport: tcp({ sport: 1, dport: 2, payload: new Uint8Array(payload) }),
  });
  const header = vnetHeader({ flags: 1, type: TSO4, size: MTU - 40, start: 20, offset: 16 });
  let sent = 0;
  const move = (bytes: number) => {
    for (let moved = 0; moved < bytes; moved += payload) {
      u8.set(header, p - 10);
      u8.set(superpacket, p);
      tx.packet(p, superpacket.length, p - 10, moved);
      tx.flush(moved);
      sent += 40;
      rx.read(sockets[1].fd, -1, performance.now());
      while (rx.backlog) rx.read(-1, -1, performance.now());
    }
  };
  // Compiled and warm first.
  move(BYTES / 2);
  // A collection in between would hide what was allocated: then the run says nothing and is made again. Garbage for each
  // packet (2 MB for one object each) makes every run grow or be collected.
  let grown = Number.NaN;
  for (let attempt = 0; attempt < 3 && Number.isNaN(grown); attempt++) {
    Bun.gc(true);
    const collected = new WeakRef({});
    // A weak reference keeps its object until the end of the turn in which it was made.
    await Bun.sleep(1);
    const before = heapStats().heapCapacity;
    move(BYTES);
    const after = heapStats().heapCapacity;
    if (collected.deref()) grown = after - before;
  }
  expect(tx.v4.sentPackets).toBe(sent);
  expect(received).toBe(sent);
  expect(grown).toBeLessThan(1 << 20);
}, 120_000);
