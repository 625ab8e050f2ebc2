// The door to build/weft.wasm: an instance with its own memory, made once per thread for the crypto doors beside this
// file, and by the datapath with as much memory as it needs; its Workers attach to that memory. The module needs SIMD, relaxed SIMD, wide arithmetic and
// shared memory, which Bun has; elsewhere the first use fails with a sentence that says what is missing.
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { selfTest } from "./selftest.ts";

/**
 * The module's functions. Pointers are byte offsets into the instance's memory, lengths are bytes. What each one does,
 * and to which bytes, stands in asm/. Rooms that add asm files add their signatures here by declaration merging.
 */
export interface AsmExports {
  /** First address that belongs to the host. */
  heapBase(): number;

  aeadInit(state: number, key: number): void;
  aeadSeal(p: number, len: number, state: number, counterLo: number, counterHi: number): void;
  aeadOpen(p: number, len: number, state: number, counterLo: number, counterHi: number): number;
  aeadSealNonce(p: number, len: number, state: number, nonce: number, aad: number, aadLen: number): void;
  aeadOpenNonce(p: number, len: number, state: number, nonce: number, aad: number, aadLen: number): number;
  chacha20Key(state: number, key: number): void;
  chacha20Nonce(state: number, counter: number, n0: number, n1: number, n2: number): void;
  chacha20Xor(state: number, p: number, passes: number): void;
  poly1305Init(key: number): void;
  poly1305Message(p: number, length: number): void;
  poly1305Finish(tag: number): void;

  hchacha20(out: number, key: number, input: number): void;
  xaeadSeal(p: number, len: number, key: number, nonce: number, aad: number, aadLen: number): void;
  xaeadOpen(p: number, len: number, key: number, nonce: number, aad: number, aadLen: number): number;

  blake2sInit(state: number, outLen: number, key: number, keyLen: number): void;
  blake2sUpdate(state: number, data: number, len: number): void;
  blake2sFinal(state: number, out: number): void;
  blake2s(out: number, outLen: number, key: number, keyLen: number, data: number, len: number): void;
  hmacBlake2s(out: number, key: number, keyLen: number, data: number, len: number): void;
  hkdfBlake2s(out: number, n: number, salt: number, saltLen: number, ikm: number, ikmLen: number): void;

  x25519(out: number, scalar: number, point: number): number;
  x25519Base(out: number, scalar: number): void;

  hsalsa20(out: number, key: number, input: number): void;
  boxSeal(p: number, len: number, key: number, nonce: number): void;
  boxOpen(p: number, len: number, key: number, nonce: number): number;
}

/** Bytes of the state that `aeadInit` fills; wants an alignment of 64. */
export const AEAD_STATE_SIZE = 256;
/** Bytes of the state that `blake2sInit` fills. */
export const BLAKE2S_STATE_SIZE = 128;

const PAGE = 65536;
const DEFAULT_PAGES = 64;
/** The module declares this much for its static data (tools/build.ts). */
const MIN_PAGES = 16;
const MAX_PAGES = 65536;
/** Room for the static data of any instance, and for its self-test. */
export const ATTACH_BYTES = MIN_PAGES * PAGE;

const WASM_PATH = fileURLToPath(new URL("../../build/weft.wasm", import.meta.url));

/** Where the first instance on a memory has its static data: address 0 is nobody's. */
const FIRST_BASE = 64;

/**
 * An instance of the module. `create` makes one with a memory of its own; `attach` makes a further one on the same
 * memory, in another thread as a rule. Each instance has static scratch and `alloc` of its own, in its own part of the
 * memory; what lies elsewhere (session tables, packet buffers) is the business of those who share it.
 */
export class Asm {
  readonly exports: AsmExports;
  readonly memory: WebAssembly.Memory;
  /** All of the memory, as bytes, as little-endian words, and for the rest. The buffer is shared and never moves. */
  readonly u8: Uint8Array<SharedArrayBuffer>;
  readonly u32: Uint32Array<SharedArrayBuffer>;
  readonly view: DataView<SharedArrayBuffer>;
  #next: number;
  readonly #end: number;

  private constructor(memory: WebAssembly.Memory, base: number, end: number) {
    module ??= loadModule(WASM_PATH);
    const exports = instantiate(module, memory, base);
    const buffer = memory.buffer as unknown as SharedArrayBuffer;
    this.exports = exports;
    this.memory = memory;
    this.u8 = new Uint8Array(buffer);
    this.u32 = new Uint32Array(buffer);
    this.view = new DataView(buffer);
    this.#next = exports.heapBase() >>> 0;
    this.#end = end;
    selfTest(this);
  }

  /**
   * A new instance, tested with known answers. `pages` is the size of its memory in pages of 64 KiB (16 to 65536), of
   * which the kernel backs only what is touched. Throws an Error with one sentence when the engine lacks a feature,
   * when the module is absent or not Weft's, or when it computes wrong answers.
   */
  static create(pages: number = DEFAULT_PAGES): Asm {
    if (!Number.isInteger(pages) || pages < MIN_PAGES || pages > MAX_PAGES)
      throw new RangeError(`Asm.create: ${pages} pages: give a whole number from ${MIN_PAGES} to ${MAX_PAGES}`);
    const memory = new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true });
    return new Asm(memory, FIRST_BASE, pages * PAGE);
  }

  /**
   * A further instance on the memory of another one (a Worker gets `memory` by postMessage). `start` .. `start + bytes`
   * is its part, which the other has given away with `alloc(bytes)` and nobody uses: static data first, `alloc` hands
   * out the rest. Nothing else is touched. Throws as `create`, and a RangeError when the part is too small
   * (ATTACH_BYTES suffice for an instance that allocates nothing).
   */
  static attach(memory: WebAssembly.Memory, start: number, bytes: number): Asm {
    if (start % 64 !== 0 || start < FIRST_BASE || start + bytes > memory.buffer.byteLength || bytes < ATTACH_BYTES)
      throw new RangeError(
        `Asm.attach: ${bytes} bytes at ${start}: give at least ${ATTACH_BYTES}, inside the memory, 64-aligned`,
      );
    return new Asm(memory, start, start + bytes);
  }

  /**
   * Takes `bytes` bytes, zeroed, from the host's part of the memory; they are never given back. `align` is a power of
   * two. Throws a RangeError when the memory is used up.
   */
  alloc(bytes: number, align = 64): number {
    const p = Math.ceil(this.#next / align) * align;
    if (p + bytes > this.#end)
      throw new RangeError(
        `Asm.alloc: ${bytes} bytes do not fit: ${p} of ${this.#end} are in use; create the instance with more pages`,
      );
    this.#next = p + bytes;
    return p;
  }

  /** Bytes of the host's part that `alloc` has not given out. */
  get free(): number {
    return this.#end - this.#next;
  }
}

let module: WebAssembly.Module | undefined;
let shared: Asm | undefined;

/** This thread's instance for the doors of src/crypto, made at first use. Throws as `Asm.create` does. */
export function defaultAsm(): Asm {
  shared ??= Asm.create(DEFAULT_PAGES);
  return shared;
}

/** Reads and compiles a module file. Exported for the tests of its messages. */
export function loadModule(path: string): WebAssembly.Module {
  const missing = missingFeature(WebAssembly.validate);
  if (missing) throw new Error(missing);
  if (!existsSync(path)) throw new Error(`${path} is missing: run \`bun run build\``);
  const bytes = readFileSync(path);
  try {
    return new WebAssembly.Module(bytes);
  } catch (error) {
    throw new Error(`${path} is not a WebAssembly module (${(error as Error).message}): run \`bun run build\``);
  }
}

/** Instantiates Weft's module; any other is refused. Exported for the tests of its messages. */
export function instantiate(
  module: WebAssembly.Module,
  memory: WebAssembly.Memory,
  base: number = FIRST_BASE,
): AsmExports {
  let exports: WebAssembly.Exports;
  try {
    exports = new WebAssembly.Instance(module, { env: { memory, base } }).exports;
  } catch (error) {
    throw new Error(`build/weft.wasm does not fit this version (${(error as Error).message}): run \`bun run build\``);
  }
  for (const name of ["heapBase", "aeadSeal", "aeadOpenNonce", "xaeadOpen", "hmacBlake2s", "x25519", "boxOpen"])
    if (typeof exports[name] !== "function")
      throw new Error(
        `build/weft.wasm has no function ${name}: it is another version or not Weft's; run \`bun run build\``,
      );
  return exports as unknown as AsmExports;
}

// One function each: () -> () { <the feature's opcode> }.
const FEATURES: { name: string; module: number[] }[] = [
  // v128.const 0; drop
  { name: "SIMD", module: probe([0x00, 0xfd, 0x0c, ...Array<number>(16).fill(0), 0x1a, 0x0b]) },
  // v128.const 0; v128.const 0; i8x16.relaxed_swizzle; drop
  {
    name: "relaxed SIMD",
    module: probe([
      0x00,
      ...[0xfd, 0x0c, ...Array<number>(16).fill(0)],
      ...[0xfd, 0x0c, ...Array<number>(16).fill(0)],
      ...[0xfd, 0x80, 0x02, 0x1a, 0x0b],
    ]),
  },
  // i64.const 0; i64.const 0; i64.mul_wide_u; drop; drop
  { name: "wide arithmetic", module: probe([0x00, 0x42, 0x00, 0x42, 0x00, 0xfc, 0x16, 0x1a, 0x1a, 0x0b]) },
  // (memory 1 1 shared)
  { name: "shared memory", module: [...header(), 0x05, 0x04, 0x01, 0x03, 0x01, 0x01] },
];

/** A sentence about the first WebAssembly feature that `validate` does not know, or null. */
export function missingFeature(validate: (bytes: Uint8Array<ArrayBuffer>) => boolean): string | null {
  const missing = FEATURES.find(({ module }) => !validate(new Uint8Array(module)));
  if (!missing) return null;
  const engine = typeof Bun === "undefined" ? "this JavaScript engine" : `Bun ${Bun.version} on ${process.arch}`;
  return `${engine} lacks WebAssembly ${missing.name}, which Weft's cryptography needs: use Bun 1.4.5 on x64 or arm64`;
}

function header(): number[] {
  return [0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00];
}

/** A module of one function () -> () with this body (locals included). */
function probe(body: number[]): number[] {
  return [
    ...header(),
    ...[0x01, 0x04, 0x01, 0x60, 0x00, 0x00],
    ...[0x03, 0x02, 0x01, 0x00],
    ...[0x0a, body.length + 2, 0x01, body.length, ...body],
  ];
}

export { PAGE as PAGE_SIZE };
