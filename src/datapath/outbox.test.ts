import { afterEach, expect, test } from "bun:test";
import { SOL_SOCKET } from "../../ffi/constants.ts";
import { addressOf, closeFd, libc } from "../../ffi/libc.ts";
import { openUdp, recvfrom, type UdpSocket } from "../../ffi/udp.ts";
import { Asm } from "../crypto/wasm.ts";
import { Outbox } from "./outbox.ts";
import { PeerPaths } from "./peer-paths.ts";

const SO_NO_CHECK = 11;
const asm = Asm.create(64);
const base = addressOf(asm.u8);
const data = asm.alloc(1 << 20);
const open: UdpSocket[] = [];

function socket(options: Partial<Parameters<typeof openUdp>[0]> = {}): UdpSocket {
  const made = openUdp({ family: 4, address: "127.0.0.1", gro: false, ...options });
  open.push(made);
  return made;
}

afterEach(() => {
  for (const { fd } of open.splice(0)) closeFd(fd);
});

/** Everything that lies in the socket's buffer: length and first byte of each datagram. */
function received(from: UdpSocket): [number, number][] {
  const into = new Uint8Array(65536);
  const out: [number, number][] = [];
  for (let next = recvfrom(from.fd, into); next; next = recvfrom(from.fd, into)) out.push([next.length, into[0]!]);
  return out;
}

/** `count` datagrams of `size` bytes in a row, numbered; the last has `last`. */
function fill(at: number, count: number, size: number): void {
  for (let i = 0; i < count; i++) asm.u8.fill(i + 1, at + i * size, at + (i + 1) * size);
}

function outbox(to: UdpSocket | string, from = socket()): { box: Outbox; paths: PeerPaths } {
  const paths = new PeerPaths(asm, "wg", 4);
  paths.setUdp(0, typeof to === "string" ? to : `127.0.0.1:${to.port}`);
  return { paths, box: new Outbox(asm, base, from.fd, true, paths) };
}

test("a row leaves as datagrams of one size and a shorter last one, more than 64 of them too", () => {
  const to = socket();
  const { box } = outbox(to);
  fill(data, 150, 400);
  box.add(0, data, 150, 400, 33);
  box.flush();
  expect(received(to)).toEqual(Array.from({ length: 150 }, (_, i) => [i === 149 ? 33 : 400, i + 1]));
  expect([box.sentPackets, box.failed, box.gso]).toEqual([150, 0, true]);
});

test("segmentation refused by the socket: it is turned off, and everything arrives all the same", () => {
  const to = socket();
  const from = socket();
  // Without checksums the kernel refuses UDP_SEGMENT with EINVAL.
  expect(libc.setsockopt(from.fd, SOL_SOCKET, SO_NO_CHECK, new Int32Array([1]), 4)).toBe(0);
  const { box } = outbox(to, from);
  fill(data, 10, 200);
  box.add(0, data, 1, 200, 200);
  box.add(0, data, 10, 200, 7);
  box.add(0, data, 2, 200, 200);
  box.flush();
  expect(received(to)).toEqual([
    [200, 1],
    ...Array.from({ length: 10 }, (_, i): [number, number] => [i === 9 ? 7 : 200, i + 1]),
    [200, 1],
    [200, 2],
  ]);
  expect([box.sentPackets, box.failed, box.gso]).toEqual([13, 0, false]);
  box.add(0, data, 3, 200, 200);
  box.flush();
  expect(received(to).length).toBe(3);
});

test("without segmentation for one peer the others keep it, until its address changes", () => {
  const to = socket();
  const { box, paths } = outbox(to);
  paths.noGso[0] = 1;
  fill(data, 3, 20000);
  box.add(0, data, 3, 20000, 20000);
  box.flush();
  expect(received(to).map(([length]) => length)).toEqual([20000, 20000, 20000]);
  expect(box.gso).toBe(true);
  paths.setUdp(0, "127.0.0.1:9");
  expect(paths.noGso[0]).toBe(0);
});

test("a message that cannot go does not stop the others", () => {
  const to = socket();
  const { box, paths } = outbox(to);
  paths.setUdp(1, "255.255.255.255:9");
  fill(data, 2, 100);
  box.add(0, data, 1, 100, 100);
  box.add(1, data, 1, 100, 100);
  box.add(0, data + 100, 1, 100, 100);
  box.flush();
  expect(received(to)).toEqual([
    [100, 1],
    [100, 2],
  ]);
  expect([box.sentPackets, box.failed]).toEqual([2, 1]);
});

test("a source address that is gone is forgotten, and the message leaves without it", () => {
  const to = socket();
  const { box, paths } = outbox(to, openAny());
  const control = { segmentSize: 0, ifindex: 0, local6At: 0, local4: 0x010200c0, tos: 0 };
  for (const count of [1, 5]) {
    paths.setSource(0, control);
    expect(paths.controlLength[0]).toBe(32);
    fill(data, count, 100);
    box.add(0, data, count, 100, 100);
    box.flush();
    expect(received(to).length).toBe(count);
    expect(paths.controlLength[0]).toBe(0);
  }
  expect([box.failed, box.gso]).toEqual([0, true]);
});

function openAny(): UdpSocket {
  return socket({ address: "0.0.0.0" });
}
