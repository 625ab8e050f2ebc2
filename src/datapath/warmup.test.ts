import { expect, test } from "bun:test";
import { Asm } from "../crypto/wasm.ts";
import { ASM_DROPS } from "./asm.ts";
import { warmUpDatapath } from "./warmup.ts";

test("it uses what packets use, and leaves nothing behind", () => {
  const asm = Asm.create(64);
  const calls: Record<string, number> = {};
  const spied = new Proxy(asm.exports, {
    get(target, name: string) {
      calls[name] = (calls[name] ?? 0) + 1;
      return target[name as keyof typeof target];
    },
  });
  const { u8, view } = asm;
  warmUpDatapath({ exports: spied, u8, view, alloc: (bytes: number) => asm.alloc(bytes) } as unknown as Asm);
  // How often is a matter of time.
  for (const name of ["aeadSeal", "aeadOpen", "splitWrite", "groAdd", "groFlush"])
    expect(calls[name]).toBeGreaterThan(0);
  const { exports, u32 } = asm;
  // The superpacket was cut and merged again, and nothing waits.
  expect(u32[(exports.splitPtr() >> 2) + 2]).toBe(8);
  expect(u32[(exports.groPtr() >> 2) + 1]).toBe(8);
  expect([exports.groPending(), exports.groFlush()]).toEqual([0, 0]);
  for (let i = 0; i < ASM_DROPS.length; i++) expect(u32[(exports.dropCounters() >> 2) + i]).toBe(0);
});
