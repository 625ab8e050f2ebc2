// ChaCha20 (RFC 8439 section 2.3), four blocks at a time.
//
// Vertical layout: a v128 holds one word of the state, lane i belongs to block i, so that a quarter-round is 12 plain
// vector operations on four blocks. The state in memory is 16 v128 (256 bytes): the 16 words, each in four lanes, the
// counter word as n, n+1, n+2, n+3.
//
// JavaScriptCore compiles vector shifts badly, so the rotations are made of a swizzle, 16-bit multiplies and masks, with
// constants from a table. The first row of the state stays in memory during the rounds: that leaves the 16 vector
// registers to the 12 other words (10 % faster). All this was measured; change it only with numbers.
//
// relaxed_swizzle gets no index from 16 to 127, and relaxed_q15mulr never -32768 twice: nothing here depends on what an
// engine does in the relaxed cases.
import { xorRow } from "./lanes";

/** Bytes of an expanded state. */
export const CHACHA20_STATE_SIZE: i32 = 256;

const TABLE = memory.data<u32>([
  0x01000302, 0x05040706, 0x09080b0a, 0x0d0c0f0e, // 0: the swizzle that swaps 16-bit halves
  0x02010003, 0x06050407, 0x0a09080b, 0x0e0d0c0f, // 16: the swizzle that rotates by 8
  0x10001000, 0x10001000, 0x10001000, 0x10001000, // 32: << 12
  0xfff0fff0, 0xfff0fff0, 0xfff0fff0, 0xfff0fff0, // 48: >> 4 in three steps
  0x08000800, 0x08000800, 0x08000800, 0x08000800,
  0x0fff0fff, 0x0fff0fff, 0x0fff0fff, 0x0fff0fff,
  0x00800080, 0x00800080, 0x00800080, 0x00800080, // 96: << 7
  0xff01ff03, 0xff05ff07, 0xff09ff0b, 0xff0dff0f, // 112: >> 9 in two steps
  0x3fff3fff, 0x3fff3fff, 0x3fff3fff, 0x3fff3fff,
]);

// The first row of the state during the rounds.
const ROW_A = memory.data(64, 64);

// @ts-ignore: decorator
@inline
function rotl16(x: v128, t: usize): v128 {
  return i8x16.relaxed_swizzle(x, v128.load(t));
}

// @ts-ignore: decorator
@inline
function rotl12(x: v128, t: usize): v128 {
  // Per 16-bit half: own bits << 12, and the other half's >> 4. q15mulr rounds: the bits that would are masked away.
  const other = v128.and(i8x16.relaxed_swizzle(x, v128.load(t)), v128.load(t, 48));
  const low = v128.and(i16x8.relaxed_q15mulr_s(other, v128.load(t, 64)), v128.load(t, 80));
  return v128.or(i16x8.mul(x, v128.load(t, 32)), low);
}

// @ts-ignore: decorator
@inline
function rotl8(x: v128, t: usize): v128 {
  return i8x16.relaxed_swizzle(x, v128.load(t, 16));
}

// @ts-ignore: decorator
@inline
function rotl7(x: v128, t: usize): v128 {
  // Per 16-bit half: own bits << 7, and the other half's >> 9, which is its upper byte >> 1: b * 16383 / 32768, rounded.
  const other = i8x16.relaxed_swizzle(x, v128.load(t, 112));
  return v128.or(i16x8.mul(x, v128.load(t, 96)), i16x8.relaxed_q15mulr_s(other, v128.load(t, 128)));
}

/** Expands a 32-byte key into a state; counter and nonce are set by `chacha20Nonce`. */
export function chacha20Key(state: usize, key: usize): void {
  v128.store(state, i32x4.splat(0x61707865));
  v128.store(state, i32x4.splat(0x3320646e), 16);
  v128.store(state, i32x4.splat(0x79622d32), 32);
  v128.store(state, i32x4.splat(0x6b206574), 48);
  for (let i: usize = 0; i < 32; i += 4) v128.store(state + (i << 2), i32x4.splat(load<i32>(key + i)), 64);
}

/** Sets block counter and nonce (three words as read little-endian). */
export function chacha20Nonce(state: usize, counter: u32, n0: u32, n1: u32, n2: u32): void {
  v128.store(state, i32x4.add(i32x4.splat(counter), i32x4(0, 1, 2, 3)), 192);
  v128.store(state, i32x4.splat(n0), 208);
  v128.store(state, i32x4.splat(n1), 224);
  v128.store(state, i32x4.splat(n2), 240);
}

/** XORs the next `passes` times 256 bytes of key stream into p and advances the counter. */
export function chacha20Xor(state: usize, p: usize, passes: i32): void {
  const t = TABLE;
  const a = ROW_A;
  for (; passes > 0; passes--) {
    v128.store(a, v128.load(state));
    v128.store(a, v128.load(state, 16), 16);
    v128.store(a, v128.load(state, 32), 32);
    v128.store(a, v128.load(state, 48), 48);
    let x4 = v128.load(state, 64);
    let x5 = v128.load(state, 80);
    let x6 = v128.load(state, 96);
    let x7 = v128.load(state, 112);
    let x8 = v128.load(state, 128);
    let x9 = v128.load(state, 144);
    let x10 = v128.load(state, 160);
    let x11 = v128.load(state, 176);
    let x12 = v128.load(state, 192);
    let x13 = v128.load(state, 208);
    let x14 = v128.load(state, 224);
    let x15 = v128.load(state, 240);
    for (let round = 0; round < 10; round++) {
      // Columns.
      v128.store(a, i32x4.add(v128.load(a), x4));
      v128.store(a, i32x4.add(v128.load(a, 16), x5), 16);
      v128.store(a, i32x4.add(v128.load(a, 32), x6), 32);
      v128.store(a, i32x4.add(v128.load(a, 48), x7), 48);
      x12 = rotl16(v128.xor(x12, v128.load(a)), t);
      x13 = rotl16(v128.xor(x13, v128.load(a, 16)), t);
      x14 = rotl16(v128.xor(x14, v128.load(a, 32)), t);
      x15 = rotl16(v128.xor(x15, v128.load(a, 48)), t);
      x8 = i32x4.add(x8, x12);
      x9 = i32x4.add(x9, x13);
      x10 = i32x4.add(x10, x14);
      x11 = i32x4.add(x11, x15);
      x4 = rotl12(v128.xor(x4, x8), t);
      x5 = rotl12(v128.xor(x5, x9), t);
      x6 = rotl12(v128.xor(x6, x10), t);
      x7 = rotl12(v128.xor(x7, x11), t);
      v128.store(a, i32x4.add(v128.load(a), x4));
      v128.store(a, i32x4.add(v128.load(a, 16), x5), 16);
      v128.store(a, i32x4.add(v128.load(a, 32), x6), 32);
      v128.store(a, i32x4.add(v128.load(a, 48), x7), 48);
      x12 = rotl8(v128.xor(x12, v128.load(a)), t);
      x13 = rotl8(v128.xor(x13, v128.load(a, 16)), t);
      x14 = rotl8(v128.xor(x14, v128.load(a, 32)), t);
      x15 = rotl8(v128.xor(x15, v128.load(a, 48)), t);
      x8 = i32x4.add(x8, x12);
      x9 = i32x4.add(x9, x13);
      x10 = i32x4.add(x10, x14);
      x11 = i32x4.add(x11, x15);
      x4 = rotl7(v128.xor(x4, x8), t);
      x5 = rotl7(v128.xor(x5, x9), t);
      x6 = rotl7(v128.xor(x6, x10), t);
      x7 = rotl7(v128.xor(x7, x11), t);
      // Diagonals.
      v128.store(a, i32x4.add(v128.load(a), x5));
      v128.store(a, i32x4.add(v128.load(a, 16), x6), 16);
      v128.store(a, i32x4.add(v128.load(a, 32), x7), 32);
      v128.store(a, i32x4.add(v128.load(a, 48), x4), 48);
      x15 = rotl16(v128.xor(x15, v128.load(a)), t);
      x12 = rotl16(v128.xor(x12, v128.load(a, 16)), t);
      x13 = rotl16(v128.xor(x13, v128.load(a, 32)), t);
      x14 = rotl16(v128.xor(x14, v128.load(a, 48)), t);
      x10 = i32x4.add(x10, x15);
      x11 = i32x4.add(x11, x12);
      x8 = i32x4.add(x8, x13);
      x9 = i32x4.add(x9, x14);
      x5 = rotl12(v128.xor(x5, x10), t);
      x6 = rotl12(v128.xor(x6, x11), t);
      x7 = rotl12(v128.xor(x7, x8), t);
      x4 = rotl12(v128.xor(x4, x9), t);
      v128.store(a, i32x4.add(v128.load(a), x5));
      v128.store(a, i32x4.add(v128.load(a, 16), x6), 16);
      v128.store(a, i32x4.add(v128.load(a, 32), x7), 32);
      v128.store(a, i32x4.add(v128.load(a, 48), x4), 48);
      x15 = rotl8(v128.xor(x15, v128.load(a)), t);
      x12 = rotl8(v128.xor(x12, v128.load(a, 16)), t);
      x13 = rotl8(v128.xor(x13, v128.load(a, 32)), t);
      x14 = rotl8(v128.xor(x14, v128.load(a, 48)), t);
      x10 = i32x4.add(x10, x15);
      x11 = i32x4.add(x11, x12);
      x8 = i32x4.add(x8, x13);
      x9 = i32x4.add(x9, x14);
      x5 = rotl7(v128.xor(x5, x10), t);
      x6 = rotl7(v128.xor(x6, x11), t);
      x7 = rotl7(v128.xor(x7, x8), t);
      x4 = rotl7(v128.xor(x4, x9), t);
    }
    xorRow(
      p,
      i32x4.add(v128.load(a), v128.load(state)),
      i32x4.add(v128.load(a, 16), v128.load(state, 16)),
      i32x4.add(v128.load(a, 32), v128.load(state, 32)),
      i32x4.add(v128.load(a, 48), v128.load(state, 48)),
    );
    xorRow(
      p + 16,
      i32x4.add(x4, v128.load(state, 64)),
      i32x4.add(x5, v128.load(state, 80)),
      i32x4.add(x6, v128.load(state, 96)),
      i32x4.add(x7, v128.load(state, 112)),
    );
    xorRow(
      p + 32,
      i32x4.add(x8, v128.load(state, 128)),
      i32x4.add(x9, v128.load(state, 144)),
      i32x4.add(x10, v128.load(state, 160)),
      i32x4.add(x11, v128.load(state, 176)),
    );
    xorRow(
      p + 48,
      i32x4.add(x12, v128.load(state, 192)),
      i32x4.add(x13, v128.load(state, 208)),
      i32x4.add(x14, v128.load(state, 224)),
      i32x4.add(x15, v128.load(state, 240)),
    );
    v128.store(state, i32x4.add(v128.load(state, 192), i32x4.splat(4)), 192);
    p += 256;
  }
  const zero = i64x2.splat(0);
  v128.store(a, zero);
  v128.store(a, zero, 16);
  v128.store(a, zero, 32);
  v128.store(a, zero, 48);
}
