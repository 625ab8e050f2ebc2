// 128-bit arithmetic (the WebAssembly wide-arithmetic proposal), which AssemblyScript does not know. These are not
// real imports: tools/build.ts turns each call into its opcode (i64.mul_wide_u, i64.add128), keeps the high word in a
// local, and turns `wideHi()` into a read of that local. So `wideHi()` is valid only after `wideMul` or `wideAdd` in
// the same function, and belongs to the last of them.

/** Low 64 bits of a * b. */
// @ts-ignore: decorator
@external("wide", "mul")
export declare function wideMul(a: u64, b: u64): u64;

/** Low 64 bits of (ah:al) + (bh:bl). */
// @ts-ignore: decorator
@external("wide", "add")
export declare function wideAdd(al: u64, ah: u64, bl: u64, bh: u64): u64;

/** High 64 bits of the last wideMul or wideAdd. */
// @ts-ignore: decorator
@external("wide", "hi")
export declare function wideHi(): u64;
