import { describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { dropZeroData, lowerWideArithmetic, relocate } from "../../tools/build.ts";
import { blake2s } from "./blake2s.ts";
import {
  AEAD_STATE_SIZE,
  Asm,
  ATTACH_BYTES,
  BLAKE2S_STATE_SIZE,
  defaultAsm,
  instantiate,
  loadModule,
  missingFeature,
  PAGE_SIZE,
} from "./wasm.ts";

const EMPTY_MODULE = Uint8Array.of(0, 0x61, 0x73, 0x6d, 1, 0, 0, 0);

describe("an instance", () => {
  test("has the memory asked for, shared, and hands it out aligned and zeroed until it is used up", () => {
    const asm = Asm.create(32);
    expect(asm.u8.length).toBe(32 * PAGE_SIZE);
    expect(asm.u8.buffer).toBeInstanceOf(SharedArrayBuffer);
    expect(asm.u32.length).toBe(8 * PAGE_SIZE);
    const a = asm.alloc(1);
    const b = asm.alloc(100, 4096);
    const c = asm.alloc(3, 1);
    expect(a).toBeGreaterThanOrEqual(asm.exports.heapBase());
    expect(a % 64).toBe(0);
    expect(b % 4096).toBe(0);
    expect(b).toBeGreaterThan(a);
    expect(c).toBe(b + 100);
    asm.view.setUint32(b, 0x01020304, true);
    expect([asm.u8[b], asm.u32[b / 4]]).toEqual([4, 0x01020304]);
    const rest = asm.free;
    expect(() => asm.alloc(rest + 1, 1)).toThrow(`${rest + 1} bytes do not fit`);
    expect(asm.alloc(rest, 1)).toBe(c + 3);
    expect(asm.free).toBe(0);
    expect(() => asm.alloc(1)).toThrow("create the instance with more pages");
  });

  test("two instances share nothing", () => {
    const [a, b] = [Asm.create(16), Asm.create(16)];
    const p = a.alloc(64);
    expect(b.alloc(64)).toBe(p);
    a.u8[p] = 1;
    expect(b.u8[p]).toBe(0);
  });

  test("a size that is not possible says so", () => {
    for (const pages of [0, 15, 65537, 1.5, Number.NaN])
      expect(() => Asm.create(pages)).toThrow(`Asm.create: ${pages} pages: give a whole number from 16 to 65536`);
  });

  test("the thread's own is made once", () => {
    expect(defaultAsm()).toBe(defaultAsm());
  });

  test("state sizes are those of the module", () => {
    const exports = Asm.create().exports as unknown as Record<string, WebAssembly.Global>;
    expect(exports.AEAD_STATE_SIZE!.value).toBe(AEAD_STATE_SIZE);
    expect(exports.BLAKE2S_STATE_SIZE!.value).toBe(BLAKE2S_STATE_SIZE);
  });

  test("works in a Worker, from its own copy of the module", async () => {
    const door = fileURLToPath(new URL("./blake2s.ts", import.meta.url));
    const folder = mkdtempSync(join(tmpdir(), "weft-worker-"));
    const script = join(folder, "worker.ts");
    writeFileSync(
      script,
      `import { blake2s } from ${JSON.stringify(door)};\npostMessage(blake2s(new Uint8Array(3)).toHex());\n`,
    );
    const worker = new Worker(script);
    try {
      const digest = await new Promise<string>((resolve, reject) => {
        worker.onmessage = (event) => resolve(event.data as string);
        worker.onerror = (event) => reject(new Error(event.message));
      });
      expect(digest).toBe(blake2s(new Uint8Array(3)).toHex());
    } finally {
      worker.terminate();
      rmSync(folder, { recursive: true });
    }
  });
});

describe("several instances on one memory", () => {
  test("a further instance touches only the part that it was given", () => {
    const first = Asm.create(64);
    const [before, part, after] = [first.alloc(4096), first.alloc(2 * ATTACH_BYTES), first.alloc(4096)];
    const second = Asm.attach(first.memory, part, 2 * ATTACH_BYTES);
    first.u8.fill(0xa5, before, before + 4096);
    first.u8.fill(0xa5, after, after + 4096);
    const outside = () =>
      Bun.hash(first.u8.slice(0, part)) ^ Bun.hash(first.u8.subarray(part + 2 * ATTACH_BYTES).slice());
    const hash = outside();

    const x = second.exports;
    const p = second.alloc(4096);
    expect(p).toBeGreaterThanOrEqual(part);
    expect(second.free).toBeLessThan(2 * ATTACH_BYTES);
    expect(() => second.alloc(2 * ATTACH_BYTES)).toThrow("do not fit");
    x.aeadInit(p, p + 512);
    x.aeadSealNonce(p + 1024, 1420, p, p + 600, p + 512, 40);
    expect(x.aeadOpenNonce(p + 1024, 1420, p, p + 600, p + 512, 40)).toBe(1);
    expect(x.aeadOpenNonce(p + 1024, 1421, p, p + 600, p + 512, 40)).toBe(0);
    x.xaeadSeal(p + 1024, 1420, p, p + 600, p + 512, 40);
    x.boxSeal(p + 1024, 1420, p, p + 600);
    expect(x.boxOpen(p + 1024, 1420, p, p + 600)).toBe(1);
    x.hmacBlake2s(p, p, 40, p + 1024, 1420);
    x.x25519Base(p, p + 1024);
    x.x25519(p, p + 1024, p);
    expect(outside()).toBe(hash);
    // And the first still computes right: its tables are its own.
    expect(first.exports.heapBase()).toBeLessThan(part);
    first.exports.blake2s(before, 32, 0, 0, before, 0);
    expect(first.u8.slice(before, before + 32).toHex()).toBe(blake2s(new Uint8Array(0)).toHex());
  });

  test("a Worker attaches to a memory that it was sent, and both compute at the same time", async () => {
    const asm = Asm.create(64);
    const part = asm.alloc(ATTACH_BYTES);
    const folder = mkdtempSync(join(tmpdir(), "weft-attach-"));
    const script = join(folder, "worker.ts");
    const rounds = 2000;
    writeFileSync(
      script,
      `import { Asm } from ${JSON.stringify(fileURLToPath(new URL("./wasm.ts", import.meta.url)))};
      self.onmessage = ({ data: { memory, part, bytes, rounds } }) => {
        const asm = Asm.attach(memory, part, bytes);
        const p = asm.alloc(4096);
        asm.exports.aeadInit(p, p + 512);
        let bad = 0;
        for (let i = 0; i < rounds; i++) {
          asm.exports.aeadSeal(p + 1024, 1420, p, i, 0);
          bad += 1 - asm.exports.aeadOpen(p + 1024, 1420, p, i, 0);
        }
        postMessage(bad);
      };`,
    );
    const worker = new Worker(script);
    try {
      const answer = new Promise<number>((resolve, reject) => {
        worker.onmessage = (event) => resolve(event.data as number);
        worker.onerror = (event) => reject(new Error(event.message));
      });
      let answered = false;
      void answer.finally(() => (answered = true)).catch(() => {});
      worker.postMessage({ memory: asm.memory, part, bytes: ATTACH_BYTES, rounds });
      const p = asm.alloc(4096);
      asm.exports.aeadInit(p, p + 512);
      let bad = 0;
      while (!answered) {
        for (let i = 0; i < 100; i++) {
          asm.exports.aeadSeal(p + 1024, 1420, p, i, 0);
          bad += 1 - asm.exports.aeadOpen(p + 1024, 1420, p, i, 0);
        }
        await new Promise((resolve) => setImmediate(resolve));
      }
      expect([await answer, bad]).toEqual([0, 0]);
    } finally {
      worker.terminate();
      rmSync(folder, { recursive: true });
    }
  });

  test("a part that cannot be says so", () => {
    const { memory } = Asm.create(32);
    for (const [start, bytes] of [
      [0, ATTACH_BYTES],
      [100, ATTACH_BYTES],
      [64, ATTACH_BYTES - 1],
      [64, 32 * PAGE_SIZE],
    ] as const)
      expect(() => Asm.attach(memory, start, bytes)).toThrow(`Asm.attach: ${bytes} bytes at ${start}`);
  });
});

describe("what cannot work is said in one sentence", () => {
  function inFile(content: Uint8Array | string, check: (path: string) => void): void {
    const folder = mkdtempSync(join(tmpdir(), "weft-wasm-"));
    try {
      const path = join(folder, "weft.wasm");
      writeFileSync(path, content);
      check(path);
    } finally {
      rmSync(folder, { recursive: true });
    }
  }

  test("this engine has all features", () => {
    expect(missingFeature(WebAssembly.validate)).toBeNull();
  });

  test("an engine without one of them", () => {
    // Engines differ in which probe they refuse: each probe in turn, in the order in which they are asked.
    const features = ["SIMD", "relaxed SIMD", "wide arithmetic", "shared memory"];
    for (const [lacking, name] of features.entries()) {
      let asked = 0;
      const message = missingFeature((bytes) => WebAssembly.validate(bytes) && asked++ !== lacking);
      expect(message).toContain(`lacks WebAssembly ${name}, which Weft's cryptography needs: use Bun 1.4.5`);
    }
  });

  test("no file", () => {
    expect(() => loadModule("/nowhere/weft.wasm")).toThrow("/nowhere/weft.wasm is missing: run `bun run build`");
  });

  test("a file that is no module", () => {
    inFile("<html>", (path) => expect(() => loadModule(path)).toThrow("is not a WebAssembly module"));
    inFile(EMPTY_MODULE.subarray(0, 6), (path) => expect(() => loadModule(path)).toThrow("run `bun run build`"));
  });

  test("a module that is not Weft's", () => {
    const memory = new WebAssembly.Memory({ initial: 64, maximum: 64, shared: true });
    inFile(EMPTY_MODULE, (path) =>
      expect(() => instantiate(loadModule(path), memory)).toThrow(
        "build/weft.wasm has no function heapBase: it is another version or not Weft's",
      ),
    );
    // (import "x" "y" (func))
    const importing = [2, 7, 1, 1, 0x78, 1, 0x79, 0, 0];
    inFile(Uint8Array.of(...EMPTY_MODULE, 1, 4, 1, 0x60, 0, 0, ...importing), (path) =>
      expect(() => instantiate(loadModule(path), memory)).toThrow("does not fit this version"),
    );
  });
});

describe("the build's steps after asc", () => {
  const wat = [
    "(module",
    ' (import "env" "memory" (memory $0 16 65536 shared))',
    ' (import "wide" "mul" (func $asm/wide/wideMul (param i64 i64) (result i64)))',
    ' (import "wide" "hi" (func $asm/wide/wideHi (result i64)))',
    ' (data $0 (i32.const 8) "\\00\\00\\00")',
    ' (data $1 (i32.const 64) "\\00\\01\\00")',
    " (func $a (param $0 i64) (result i64)",
    "  (local $1 i64)",
    "  local.get $0",
    "  local.get $0",
    "  call $asm/wide/wideMul",
    "  local.set $1",
    "  call $asm/wide/wideHi",
    "  call $asm/wide/wideHigher",
    " )",
    " (func $asm/wide/wideHigher (param $0 i64) (result i64)",
    "  local.get $0",
    " )",
    ")",
  ].join("\n");

  test("pseudo calls become opcodes, the high word a local of the functions that use it", () => {
    expect(lowerWideArithmetic(wat).split("\n").slice(4, 17)).toEqual([
      " (func $a (param $0 i64) (result i64) (local $wide-hi i64)",
      "  (local $1 i64)",
      "  local.get $0",
      "  local.get $0",
      "  i64.mul_wide_u",
      "  local.set $wide-hi",
      "  local.set $1",
      "  local.get $wide-hi",
      "  call $asm/wide/wideHigher",
      " )",
      " (func $asm/wide/wideHigher (param $0 i64) (result i64)",
      "  local.get $0",
      " )",
    ]);
    expect(() => lowerWideArithmetic(wat.replaceAll('"mul"', '"div"'))).toThrow("asm/ imports wide.div");
  });

  test("static data lies at env.base", () => {
    const linked = [
      "(module",
      ' (import "env" "memory" (memory $0 65536 65536 shared))',
      ' (import "wide" "hi" (func $hi (result i64)))',
      " (global $size i32 (i32.const 64))",
      " (global $table i32 (i32.const 1543503872))",
      ' (data $0 (i32.const 1543503872) "\\01")',
      " (func $a (result i32)",
      "  i32.const 1543503888",
      "  v128.load offset=16 align=1",
      "  i32.const 64",
      " )",
      ")",
    ].join("\n");
    expect(relocate(linked).split("\n")).toEqual([
      "(module",
      ' (import "env" "memory" (memory $0 16 65536 shared))',
      ' (import "wide" "hi" (func $hi (result i64)))',
      ' (import "env" "base" (global $base i32))',
      " (global $static-16 i32 (i32.add (global.get $base) (i32.const 16)))",
      " (global $size i32 (i32.const 64))",
      " (global $table i32 (i32.add (global.get $base) (i32.const 0)))",
      ' (data $0 (offset (i32.add (global.get $base) (i32.const 0))) "\\01")',
      " (func $a (result i32)",
      "  global.get $static-16",
      "  v128.load offset=16 align=1",
      "  i32.const 64",
      " )",
      ")",
    ]);
    expect(() => relocate(linked.replace("  i32.const 1543503888", "  i64.const 1543503888"))).toThrow("64-bit number");
  });

  test("data that is all zeros is left out", () => {
    const kept = dropZeroData(wat);
    expect(kept).not.toContain("(data $0");
    expect(kept).toContain('(data $1 (i32.const 64) "\\00\\01\\00")');
  });
});
