import { expect, test } from "bun:test";
import { warmUp } from "./warmup.ts";
import { Asm } from "./wasm.ts";

/** An instance that counts its sealed packets. */
function counting(): { asm: Asm; sealed: () => number } {
  const asm = Asm.create(16);
  let sealed = 0;
  const aeadSeal: typeof asm.exports.aeadSeal = (...args) => {
    sealed++;
    asm.exports.aeadSeal(...args);
  };
  const counted = {
    u8: asm.u8,
    alloc: (bytes: number) => asm.alloc(bytes),
    exports: { ...asm.exports, aeadSeal },
  } as unknown as Asm;
  return { asm: counted, sealed: () => sealed };
}

test("seals at least as often as the compiler counts, and for as long as it compiles", () => {
  const { asm, sealed } = counting();
  let time = 0;
  warmUp(asm, { least: 5, now: () => time++ });
  const few = sealed();
  expect(few).toBeGreaterThan(1500);

  const longer = counting();
  time = 0;
  warmUp(longer.asm, { least: 1000, most: 2000, now: () => time++ });
  expect(longer.sealed()).toBeGreaterThan(few);
});

test("ends when it has taken too long, and leaves no packet behind", () => {
  const { asm, sealed } = counting();
  let time = 0;
  warmUp(asm, { least: 25, most: 100, now: () => (time += 40) });
  expect(sealed()).toBeGreaterThan(0);
  expect(sealed()).toBeLessThan(100);
  const free = asm.alloc(64);
  expect(asm.u8.subarray(free - 1424, free).every((byte) => byte === 0)).toBe(true);
});
