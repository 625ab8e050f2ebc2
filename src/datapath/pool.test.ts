import { expect, test } from "bun:test";
import { Asm } from "../crypto/wasm.ts";
import { BufferPool, SMALL_BYTES } from "./pool.ts";

test("buffers do not overlap, are aligned, and are handed out once until they come back", () => {
  const asm = Asm.create(64);
  const pool = new BufferPool(asm, 3, 65536, 4);
  const ranges: [number, number][] = [];
  for (let i = 0; i < pool.count; i++) {
    const at = pool.at(i);
    expect(at % 16).toBe(0);
    ranges.push([at - 16, at + (i < pool.large ? 65536 : SMALL_BYTES)]);
  }
  ranges.sort((a, b) => a[0] - b[0]);
  for (let i = 1; i < ranges.length; i++) expect(ranges[i]![0]).toBeGreaterThanOrEqual(ranges[i - 1]![1]);
  expect(ranges.at(-1)![1]).toBeLessThanOrEqual(asm.u8.length);
  const taken = [pool.takeLarge(), pool.takeLarge(), pool.takeLarge()];
  expect([...taken].sort()).toEqual([0, 1, 2]);
  expect([pool.takeLarge(), pool.hasLarge]).toEqual([-1, false]);
  pool.release(taken[1]!);
  expect(pool.takeLarge()).toBe(taken[1]!);
});

test("a packet moves to a small buffer with the header before it, while there are small ones", () => {
  const asm = Asm.create(64);
  const pool = new BufferPool(asm, 1, 65536, 2);
  const large = pool.takeLarge();
  const from = pool.at(large);
  for (let i = -16; i < SMALL_BYTES; i++) asm.u8[from + i] = i & 0xff;
  const small = pool.shrink(large, SMALL_BYTES);
  const to = pool.at(small);
  expect(asm.u8.slice(to - 16, to + SMALL_BYTES)).toEqual(asm.u8.slice(from - 16, from + SMALL_BYTES));
  expect(pool.shrink(large, 100)).toBeGreaterThan(0);
  expect([pool.hasSmall, pool.shrink(large, 100)]).toEqual([false, -1]);
  pool.release(small);
  expect(pool.shrink(large, 1)).toBe(small);
});
