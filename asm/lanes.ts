// XOR of key stream into data, for ciphers that compute four 64-byte blocks in the four lanes of vectors.

/** XORs four words (a..d) of the four blocks into p, p+64, p+128, p+192. */
// @ts-ignore: decorator
@inline
export function xorRow(p: usize, a: v128, b: v128, c: v128, d: v128): void {
  const ab0 = v128.shuffle<i32>(a, b, 0, 4, 1, 5);
  const ab2 = v128.shuffle<i32>(a, b, 2, 6, 3, 7);
  const cd0 = v128.shuffle<i32>(c, d, 0, 4, 1, 5);
  const cd2 = v128.shuffle<i32>(c, d, 2, 6, 3, 7);
  v128.store(p, v128.xor(v128.load(p), v128.shuffle<i64>(ab0, cd0, 0, 2)));
  v128.store(p, v128.xor(v128.load(p, 64), v128.shuffle<i64>(ab0, cd0, 1, 3)), 64);
  v128.store(p, v128.xor(v128.load(p, 128), v128.shuffle<i64>(ab2, cd2, 0, 2)), 128);
  v128.store(p, v128.xor(v128.load(p, 192), v128.shuffle<i64>(ab2, cd2, 1, 3)), 192);
}

/** p[0..n-1] ^= from[0..n-1], in steps of 16: changes up to 15 bytes behind p+n and reads as many behind from+n. */
export function xorStream(p: usize, from: usize, n: i32): void {
  const end = p + (<usize>n);
  for (; p < end; p += 16, from += 16) v128.store(p, v128.xor(v128.load(p), v128.load(from)));
}
