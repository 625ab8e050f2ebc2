// XOR of key stream into data, for ciphers that compute four 64-byte blocks in the four lanes of vectors.

// The two-input shuffles below, as pairs of swizzles: an index of 0x80 gives 0.
const MASKS = memory.data<u32>([
  0x03020100, 0x80808080, 0x07060504, 0x80808080, // 0: a0 . a1 .
  0x80808080, 0x03020100, 0x80808080, 0x07060504, // 16: . b0 . b1
  0x0b0a0908, 0x80808080, 0x0f0e0d0c, 0x80808080, // 32: a2 . a3 .
  0x80808080, 0x0b0a0908, 0x80808080, 0x0f0e0d0c, // 48: . b2 . b3
  0x03020100, 0x07060504, 0x80808080, 0x80808080, // 64: a0 a1 . .
  0x80808080, 0x80808080, 0x03020100, 0x07060504, // 80: . . b0 b1
  0x0b0a0908, 0x0f0e0d0c, 0x80808080, 0x80808080, // 96: a2 a3 . .
  0x80808080, 0x80808080, 0x0b0a0908, 0x0f0e0d0c, // 112: . . b2 b3
]);

// @ts-ignore: decorator
@inline
function pick(x: v128, y: v128, m: usize): v128 {
  return v128.or(i8x16.relaxed_swizzle(x, v128.load(m)), i8x16.relaxed_swizzle(y, v128.load(m, 16)));
}

/**
 * XORs four words (a..d) of the four blocks into p, p+64, p+128, p+192. JavaScriptCore makes the same instructions of
 * v128.shuffle, but keeps its eight masks in registers, through the rounds of the cipher as well.
 */
// @ts-ignore: decorator
@inline
export function xorRow(p: usize, a: v128, b: v128, c: v128, d: v128): void {
  const m = MASKS;
  const ab0 = pick(a, b, m);
  const ab2 = pick(a, b, m + 32);
  const cd0 = pick(c, d, m);
  const cd2 = pick(c, d, m + 32);
  v128.store(p, v128.xor(v128.load(p), pick(ab0, cd0, m + 64)));
  v128.store(p, v128.xor(v128.load(p, 64), pick(ab0, cd0, m + 96)), 64);
  v128.store(p, v128.xor(v128.load(p, 128), pick(ab2, cd2, m + 64)), 128);
  v128.store(p, v128.xor(v128.load(p, 192), pick(ab2, cd2, m + 96)), 192);
}

/** p[0..n-1] ^= from[0..n-1], in steps of 16: changes up to 15 bytes behind p+n and reads as many behind from+n. */
export function xorStream(p: usize, from: usize, n: i32): void {
  const end = p + (<usize>n);
  for (; p < end; p += 16, from += 16) v128.store(p, v128.xor(v128.load(p), v128.load(from)));
}
