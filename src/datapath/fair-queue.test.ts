import { expect, test } from "bun:test";
import fc from "fast-check";
import { Asm } from "../crypto/wasm.ts";
import "./asm.ts";
import { FairQueue } from "./fair-queue.ts";
import { ipPacket, udp } from "./packets.fixture.ts";

/** Everything that waits, in the order of its turn. */
function drain(queue: FairQueue): number[] {
  const out: number[] = [];
  for (let buffer = queue.shift(); buffer >= 0; buffer = queue.shift()) out.push(buffer);
  return out;
}

test("nothing waits: -1, again and again", () => {
  const queue = new FairQueue(4, 4);
  expect([queue.shift(), queue.shift(), queue.dropFromLongest(), queue.empty]).toEqual([-1, -1, -1, true]);
});

test("who comes anew goes before the backlog of another", () => {
  const queue = new FairQueue(4, 100);
  for (let i = 0; i < 50; i++) queue.push(0, i, 65536);
  for (let i = 0; i < 5; i++) expect(queue.shift()).toBe(i);
  queue.push(1, 99, 100);
  expect(queue.shift()).toBe(99);
  expect(queue.shift()).toBe(5);
});

test("two that always have something share by bytes, whatever the size of their packets", () => {
  const queue = new FairQueue(2, 3000);
  const bytes = [0, 0];
  for (let i = 0; i < 100; i++) queue.push(0, i, 60_000);
  for (let i = 100; i < 3000; i++) queue.push(1, i, 1000);
  while (bytes[0]! + bytes[1]! < 4_000_000) {
    const buffer = queue.shift();
    bytes[buffer < 100 ? 0 : 1]! += buffer < 100 ? 60_000 : 1000;
  }
  expect(Math.abs(bytes[0]! - bytes[1]!)).toBeLessThan(130_000);
});

test("the key that holds most bytes loses its oldest", () => {
  const queue = new FairQueue(3, 10);
  for (let i = 0; i < 5; i++) queue.push(0, i, 100);
  queue.push(1, 5, 2000);
  queue.push(1, 6, 2000);
  expect([queue.dropFromLongest(), queue.dropFromLongest(), queue.dropFromLongest()]).toEqual([5, 6, 0]);
  expect(drain(queue).sort()).toEqual([1, 2, 3, 4]);
  expect([queue.empty, queue.active]).toEqual([true, 0]);
});

test("any pushes, turns and drops: each buffer comes out once, in order for its key, and nothing stays", () => {
  const step = fc.oneof(
    fc.record({ key: fc.nat(4), bytes: fc.integer({ min: 1, max: 70_000 }) }),
    fc.constant("shift" as const),
    fc.constant("drop" as const),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 120 }), (steps) => {
      const queue = new FairQueue(5, 120);
      const keyOf: number[] = [];
      const out: number[] = [];
      for (const s of steps) {
        if (s === "shift") out.push(queue.shift());
        else if (s === "drop") out.push(queue.dropFromLongest());
        else queue.push(s.key, keyOf.push(s.key) - 1, s.bytes);
      }
      out.push(...drain(queue));
      const came = out.filter((buffer) => buffer >= 0);
      expect([...came].sort((a, b) => a - b)).toEqual(keyOf.map((_, i) => i));
      for (let key = 0; key < 5; key++) {
        const of = came.filter((buffer) => keyOf[buffer] === key);
        expect(of).toEqual([...of].sort((a, b) => a - b));
      }
      expect([queue.empty, queue.active]).toEqual([true, 0]);
    }),
  );
});

test("packets of one flow have one number, others another; any bytes give a number below 1024", () => {
  const asm = Asm.create(64);
  const p = asm.alloc(4096);
  const flow = (packet: Uint8Array) => {
    asm.u8.set(packet, p);
    return asm.exports.txFlow(p, packet.length);
  };
  const make = (host: number, sport: number, payload: number, fragment = 0x4000) =>
    ipPacket({
      src: Uint8Array.of(10, 0, 0, 1),
      dst: Uint8Array.of(10, 0, 0, host),
      proto: 17,
      fragment,
      transport: udp(sport, 53, new Uint8Array(payload)),
    });
  expect(flow(make(2, 1000, 10))).toBe(flow(make(2, 1000, 900)));
  const numbers = new Set(Array.from({ length: 200 }, (_, i) => flow(make(2 + (i % 50), 1000 + i, 10))));
  expect(numbers.size).toBeGreaterThan(150);
  // Fragments stay together: only the first has ports.
  expect(flow(make(2, 1, 64, 0x2000))).toBe(flow(make(2, 2, 64, 0x2008)));
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 80 }), (bytes) => {
      const number = flow(bytes);
      expect(number).toBeGreaterThanOrEqual(0);
      expect(number).toBeLessThan(1024);
    }),
  );
});
