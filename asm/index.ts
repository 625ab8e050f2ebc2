// The module build/weft.wasm: one line per file, its exports are the module's exports. Built by `bun tools/build.ts`.
//
// How to add a file asm/foo.ts:
// - Write AssemblyScript with raw memory access: `load<u32>(p, 8)`, `v128.store(p, x, 16)`; pointers are `usize`.
//   Compiled without optimiser (-O0): JavaScriptCore optimises, so keep values in locals and mark small helpers `@inline`.
// - No allocation: no `new`, no arrays, no strings, no closures, no classes with instances.
//   Static scratch: `const S = memory.data(bytes, align)` (zeroed), constant tables: `memory.data<u32>([...])`, both at
//   the top level of a file. All memory from `heapBase()` up belongs to the host, which passes pointers into it.
// - u64 and v128 are fine inside; exported functions take and return i32, u32 and usize only (an i64 would be a BigInt,
//   which is slow, and v128 cannot cross).
// - Other files of asm/ are imported as usual: `import { aeadSeal } from "./aead";`. 64x64-bit products: ./wide.
// - Add `export * from "./foo";` below, and the signatures to the `AsmExports` interface on the TypeScript side:
//   `declare module "../crypto/wasm.ts" { interface AsmExports { foo(p: number, n: number): number } }`.
// - Each thread has its own instance: functions need not be reentrant, scratch may be static. Several instances may
//   share one memory (Asm.attach): all that `memory.data` made, and every global variable, is each instance's own. That
//   is the build's doing: static data lies where the instance was told (`env.base`), so a static address is a number
//   only at run time. Take it once per function (`const t = TABLE;`), and do not compute u64 constants from it.
//   State that the instances are to share (tables, buffers) lies in the host's memory and comes as a pointer.

/** First address that belongs to the host, 64-aligned. */
export function heapBase(): usize {
  return (__heap_base + 63) & ~63;
}

export * from "./aead";
export * from "./chacha20";
export * from "./poly1305";
export * from "./session";
export * from "./trie";
export * from "./blake2s";
export * from "./x25519";
export * from "./packet";
export * from "./ecn";
export * from "./filter";
export * from "./counters";
export * from "./tx";
export * from "./rx";
export * from "./xchacha";
export * from "./salsa20";
