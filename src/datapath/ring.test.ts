import { expect, test } from "bun:test";
import fc from "fast-check";
import { Ring } from "./ring.ts";

test("records come out as they went in, whatever wraps; what does not fit is dropped and counted", () => {
  const step = fc.oneof(
    fc.nat(200).map((size) => ({ write: size })),
    fc.constant({ write: -1 }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
      const writer = new Ring(512);
      const reader = new Ring(writer.buffer);
      const into = new Uint8Array(65536);
      const words = new Uint32Array(into.buffer);
      const expected: { kind: number; bytes: number[] }[] = [];
      let dropped = 0;
      steps.forEach(({ write }, i) => {
        if (write >= 0) {
          const bytes = Uint8Array.from({ length: write }, (_, k) => i + k);
          const cut = write >> 1;
          if (writer.write(i & 7, bytes.subarray(0, cut), bytes.subarray(cut)))
            expected.push({ kind: i & 7, bytes: [...bytes] });
          else dropped++;
          return;
        }
        expect(reader.empty).toBe(expected.length === 0);
        const record = reader.read(words);
        const want = expected.shift();
        const got = { kind: record >>> 16, bytes: [...into.subarray(0, record & 0xffff)] };
        expect(record < 0 ? undefined : got).toEqual(want);
      });
      expect(writer.dropped).toBe(dropped);
    }),
    { numRuns: 200 },
  );
});

test("positions may pass 2^31 and 2^32", () => {
  for (const start of [0x7ffffff0, -16]) {
    const ring = new Ring(256);
    Atomics.store(ring.words, 0, start);
    Atomics.store(ring.words, 1, start);
    const into = new Uint32Array(1);
    for (let i = 0; i < 100; i++) {
      expect(ring.write(1, Uint8Array.of(i, 2, 3))).toBe(true);
      expect(ring.read(into)).toBe(0x1_0003);
      expect(into[0]! & 0xff).toBe(i);
    }
  }
});

test("a full ring takes what fits exactly, and nothing more", () => {
  const ring = new Ring(64);
  expect(ring.write(1, new Uint8Array(60))).toBe(true);
  expect(ring.write(1, new Uint8Array(0))).toBe(false);
  ring.read(new Uint32Array(25));
  expect(ring.write(1, new Uint8Array(61))).toBe(false);
  expect(ring.write(1, new Uint8Array(0))).toBe(true);
});

test("a body is taken from memory as it lies there, also around the end of the ring", () => {
  const ring = new Ring(256);
  const memory = Uint32Array.from({ length: 64 }, (_, i) => i * 0x01010101);
  const bytes = new Uint8Array(memory.buffer);
  const into = new Uint8Array(256);
  const head = Uint8Array.from({ length: 32 }, (_, i) => 200 + i);
  for (let i = 0; i < 100; i++) {
    // Aligned to 4 as a rule, and once in a while not.
    const start = i % 64;
    const length = 60 + (i % 41);
    expect(ring.writeFrom(2, head, memory, start, length)).toBe(true);
    expect(ring.read(new Uint32Array(into.buffer))).toBe(0x2_0000 + 32 + length);
    expect([...into.subarray(0, 32 + length)]).toEqual([...head, ...bytes.subarray(start, start + length)]);
  }
});
