// ChaCha20 (RFC 8439 section 2.3), four blocks at a time.
//
// Vertical layout: a v128 holds one word of the state, lane i belongs to block i, so that a quarter-round is 12 plain
// vector operations on four blocks. The state in memory is 16 v128 (256 bytes): the 16 words, each in four lanes, the
// counter word as n, n+1, n+2, n+3.
//
// What decides here is latency: on Zen 5 a vector operation takes two cycles, so that a quarter-round's chain, not the
// number of instructions, sets the pace; loads come next. So the first row of the state stays in memory during the
// rounds (the 12 other words, the two swizzles and two temporaries fill the 16 vector registers), and each sum goes from
// its register straight into the next operation. Rotations by 7 and 12 are shifts: JavaScriptCore makes four
// instructions of each, but three of them are off the chain. Measured; change it only with numbers.
//
// For eight blocks at a time (`chacha20Poly1305x8`) the whole state lies in memory instead, and latency is hidden: of
// the eight quarter-rounds of a step none waits for another. What decides is the number of instructions, so a
// multiplication takes the place of a shift where it is one instruction instead of four. Two quarter-rounds at a time,
// no more: their values, the constants and the temporaries are what fits into 16 registers.
//
// relaxed_swizzle gets no index from 16 to 127, and relaxed_q15mulr_s no -32768 twice: nothing here depends on what an
// engine does in the relaxed cases.
import { xorRow } from "./lanes";
import { POLY1305_STATE } from "./poly1305";
import { wideAdd, wideHi, wideMul } from "./wide";

/** Bytes of an expanded state. */
export const CHACHA20_STATE_SIZE: i32 = 256;

const TABLE = memory.data<u32>([
  0x01000302, 0x05040706, 0x09080b0a, 0x0d0c0f0e, // the swizzle that swaps 16-bit halves
  0x02010003, 0x06050407, 0x0a09080b, 0x0e0d0c0f, // the swizzle that rotates by 8
]);

// The first row of the state during the rounds.
const ROW_A = memory.data(64, 64);
// The working state of eight blocks: the 16 words of blocks 0 to 3, then those of blocks 4 to 7.
const WORK = memory.data(512, 64);
// Written in each round: what is read after the rounds must not be kept in registers through them, of which there are
// none left. A store that might change ROW_A keeps the compiler from doing so.
const FENCE = memory.data(16, 16);

// @ts-ignore: decorator
@inline
function rotl12(x: v128): v128 {
  return v128.or(i32x4.shl(x, 12), i32x4.shr_u(x, 20));
}

// @ts-ignore: decorator
@inline
function rotl7(x: v128): v128 {
  return v128.or(i32x4.shl(x, 7), i32x4.shr_u(x, 25));
}

// rotl12 in fewer instructions and with more latency.
// @ts-ignore: decorator
@inline
function mulRotl12(x: v128): v128 {
  return v128.or(i32x4.mul(x, i32x4.splat(4096)), i32x4.shr_u(x, 20));
}

// rotl7 likewise, by 16-bit halves: each goes up by 7, and from below comes the highest byte of the other one, shifted
// right by 1: (n * 16383 + 16384) >> 15 is n >> 1 for each byte n.
// @ts-ignore: decorator
@inline
function mulRotl7(x: v128): v128 {
  const high = i8x16.relaxed_swizzle(x, i8x16(3, -1, 1, -1, 7, -1, 5, -1, 11, -1, 9, -1, 15, -1, 13, -1));
  return v128.or(i16x8.mul(x, i16x8.splat(128)), i16x8.relaxed_q15mulr_s(high, i16x8.splat(16383)));
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

/** Zeroes 256 bytes. */
export function clear256(p: usize): void {
  const zero = i64x2.splat(0);
  for (const end = p + 256; p < end; p += 64) {
    v128.store(p, zero);
    v128.store(p, zero, 16);
    v128.store(p, zero, 32);
    v128.store(p, zero, 48);
  }
}

/** XORs the next `passes` times 256 bytes of key stream into p and advances the counter. */
export function chacha20Xor(state: usize, p: usize, passes: i32): void {
  chacha20Poly1305(state, p, passes, 0, 0);
}

/**
 * `chacha20Xor`, and in each of its passes Poly1305 absorbs `pairs` (0..10) times 32 bytes, from q on. They are read
 * before that pass writes. Poly1305 is ./poly1305's running computation, and so is the arithmetic, which stands here
 * once more because the two have to be one loop.
 */
export function chacha20Poly1305(state: usize, p: usize, passes: i32, q: usize, pairs: i32): void {
  const a = ROW_A;
  const fence = FENCE;
  const swap = v128.load(TABLE);
  const by8 = v128.load(TABLE, 16);
  const m = POLY1305_STATE;
  const r0 = load<u64>(m);
  const r1 = load<u64>(m, 8);
  const s1 = load<u64>(m, 16);
  let h0 = load<u64>(m, 24);
  let h1 = load<u64>(m, 32);
  let h2 = load<u64>(m, 40);
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
    let t: v128;
    let round = 0;
    do {
      // Columns.
      t = i32x4.add(v128.load(a), x4);
      v128.store(a, t);
      x12 = i8x16.relaxed_swizzle(v128.xor(x12, t), swap);
      t = i32x4.add(v128.load(a, 16), x5);
      v128.store(a, t, 16);
      x13 = i8x16.relaxed_swizzle(v128.xor(x13, t), swap);
      t = i32x4.add(v128.load(a, 32), x6);
      v128.store(a, t, 32);
      x14 = i8x16.relaxed_swizzle(v128.xor(x14, t), swap);
      t = i32x4.add(v128.load(a, 48), x7);
      v128.store(a, t, 48);
      x15 = i8x16.relaxed_swizzle(v128.xor(x15, t), swap);
      x8 = i32x4.add(x8, x12);
      x4 = rotl12(v128.xor(x4, x8));
      x9 = i32x4.add(x9, x13);
      x5 = rotl12(v128.xor(x5, x9));
      x10 = i32x4.add(x10, x14);
      x6 = rotl12(v128.xor(x6, x10));
      x11 = i32x4.add(x11, x15);
      x7 = rotl12(v128.xor(x7, x11));
      t = i32x4.add(v128.load(a), x4);
      v128.store(a, t);
      x12 = i8x16.relaxed_swizzle(v128.xor(x12, t), by8);
      t = i32x4.add(v128.load(a, 16), x5);
      v128.store(a, t, 16);
      x13 = i8x16.relaxed_swizzle(v128.xor(x13, t), by8);
      t = i32x4.add(v128.load(a, 32), x6);
      v128.store(a, t, 32);
      x14 = i8x16.relaxed_swizzle(v128.xor(x14, t), by8);
      t = i32x4.add(v128.load(a, 48), x7);
      v128.store(a, t, 48);
      x15 = i8x16.relaxed_swizzle(v128.xor(x15, t), by8);
      x8 = i32x4.add(x8, x12);
      x4 = rotl7(v128.xor(x4, x8));
      x9 = i32x4.add(x9, x13);
      x5 = rotl7(v128.xor(x5, x9));
      x10 = i32x4.add(x10, x14);
      x6 = rotl7(v128.xor(x6, x10));
      x11 = i32x4.add(x11, x15);
      x7 = rotl7(v128.xor(x7, x11));
      // Diagonals.
      t = i32x4.add(v128.load(a), x5);
      v128.store(a, t);
      x15 = i8x16.relaxed_swizzle(v128.xor(x15, t), swap);
      t = i32x4.add(v128.load(a, 16), x6);
      v128.store(a, t, 16);
      x12 = i8x16.relaxed_swizzle(v128.xor(x12, t), swap);
      t = i32x4.add(v128.load(a, 32), x7);
      v128.store(a, t, 32);
      x13 = i8x16.relaxed_swizzle(v128.xor(x13, t), swap);
      t = i32x4.add(v128.load(a, 48), x4);
      v128.store(a, t, 48);
      x14 = i8x16.relaxed_swizzle(v128.xor(x14, t), swap);
      x10 = i32x4.add(x10, x15);
      x5 = rotl12(v128.xor(x5, x10));
      x11 = i32x4.add(x11, x12);
      x6 = rotl12(v128.xor(x6, x11));
      x8 = i32x4.add(x8, x13);
      x7 = rotl12(v128.xor(x7, x8));
      x9 = i32x4.add(x9, x14);
      x4 = rotl12(v128.xor(x4, x9));
      t = i32x4.add(v128.load(a), x5);
      v128.store(a, t);
      x15 = i8x16.relaxed_swizzle(v128.xor(x15, t), by8);
      t = i32x4.add(v128.load(a, 16), x6);
      v128.store(a, t, 16);
      x12 = i8x16.relaxed_swizzle(v128.xor(x12, t), by8);
      t = i32x4.add(v128.load(a, 32), x7);
      v128.store(a, t, 32);
      x13 = i8x16.relaxed_swizzle(v128.xor(x13, t), by8);
      t = i32x4.add(v128.load(a, 48), x4);
      v128.store(a, t, 48);
      x14 = i8x16.relaxed_swizzle(v128.xor(x14, t), by8);
      x10 = i32x4.add(x10, x15);
      x5 = rotl7(v128.xor(x5, x10));
      x11 = i32x4.add(x11, x12);
      x6 = rotl7(v128.xor(x6, x11));
      x8 = i32x4.add(x8, x13);
      x7 = rotl7(v128.xor(x7, x8));
      x9 = i32x4.add(x9, x14);
      x4 = rotl7(v128.xor(x4, x9));
      store<i32>(fence, round);
      if (round < pairs) {
        const end = q + 32;
        do {
        const fold = (h2 >> 2) + (h2 & ~3);
        h2 &= 3;
        h0 = wideAdd(h0, 0, load<u64>(q), 0);
        const c = wideHi();
        h0 = wideAdd(h0, c, fold, 0);
        const carry = wideHi();
        h1 = wideAdd(h1, h2, load<u64>(q, 8), 1);
        h2 = wideHi();
        h1 = wideAdd(h1, h2, carry, 0);
        h2 = wideHi();

        const al = wideMul(h0, r0);
        const ah = wideHi();
        const bl = wideMul(h1, s1);
        const bh = wideHi();
        const dl = wideAdd(al, ah, bl, bh);
        const dh = wideHi();
        const el = wideMul(h0, r1);
        const eh = wideHi();
        const fl = wideMul(h1, r0);
        const fh = wideHi();
        const gl = wideAdd(el, eh, fl, fh);
        const gh = wideHi();
        h0 = dl;
        h1 = wideAdd(gl, gh, h2 * s1, 0);
        const kh = wideHi();
        h1 = wideAdd(h1, kh, dh, 0);
        h2 = h2 * r0 + wideHi();
        q += 16;
        } while (q < end);
      }
    } while (++round < 10);
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
  store<u64>(m, h0, 24);
  store<u64>(m, h1, 32);
  store<u64>(m, h2, 40);
  const zero = i64x2.splat(0);
  v128.store(a, zero);
  v128.store(a, zero, 16);
  v128.store(a, zero, 32);
  v128.store(a, zero, 48);
}

/**
 * XORs 512 bytes of key stream into p and advances the counter by 8; meanwhile Poly1305 absorbs `bytes` (0..640, a
 * multiple of 16) from q on, before anything is written to p. Otherwise as `chacha20Poly1305`.
 */
export function chacha20Poly1305x8(state: usize, p: usize, q: usize, bytes: i32): void {
  const swap = v128.load(TABLE);
  const by8 = v128.load(TABLE, 16);
  const m = POLY1305_STATE;
  const r0 = load<u64>(m);
  const r1 = load<u64>(m, 8);
  const s1 = load<u64>(m, 16);
  let h0 = load<u64>(m, 24);
  let h1 = load<u64>(m, 32);
  let h2 = load<u64>(m, 40);
  const last = q + (<usize>bytes);
  copy256(WORK, state);
  copy256(WORK + 256, state);
  const counter = i32x4.add(v128.load(state, 192), i32x4.splat(4));
  v128.store(WORK + 256, counter, 192);
  let round = 0;
  do {
    for (let w = WORK; w <= WORK + 256; w += 256) {
      // Columns 0 and 1.
      let a = v128.load(w, 0);
      let e = v128.load(w, 16);
      let b = v128.load(w, 64);
      let f = v128.load(w, 80);
      let c = v128.load(w, 128);
      let g = v128.load(w, 144);
      let d = v128.load(w, 192);
      let h = v128.load(w, 208);
      a = i32x4.add(a, b);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), swap);
      e = i32x4.add(e, f);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), swap);
      c = i32x4.add(c, d);
      b = v128.xor(b, c);
      g = i32x4.add(g, h);
      f = v128.xor(f, g);
      b = mulRotl12(b);
      f = mulRotl12(f);
      a = i32x4.add(a, b);
      v128.store(w, a, 0);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), by8);
      e = i32x4.add(e, f);
      v128.store(w, e, 16);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), by8);
      v128.store(w, d, 192);
      c = i32x4.add(c, d);
      v128.store(w, c, 128);
      b = v128.xor(b, c);
      v128.store(w, h, 208);
      g = i32x4.add(g, h);
      v128.store(w, g, 144);
      f = v128.xor(f, g);
      v128.store(w, mulRotl7(b), 64);
      v128.store(w, mulRotl7(f), 80);
      // Columns 2 and 3.
      a = v128.load(w, 32);
      e = v128.load(w, 48);
      b = v128.load(w, 96);
      f = v128.load(w, 112);
      c = v128.load(w, 160);
      g = v128.load(w, 176);
      d = v128.load(w, 224);
      h = v128.load(w, 240);
      a = i32x4.add(a, b);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), swap);
      e = i32x4.add(e, f);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), swap);
      c = i32x4.add(c, d);
      b = v128.xor(b, c);
      g = i32x4.add(g, h);
      f = v128.xor(f, g);
      b = mulRotl12(b);
      f = mulRotl12(f);
      a = i32x4.add(a, b);
      v128.store(w, a, 32);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), by8);
      e = i32x4.add(e, f);
      v128.store(w, e, 48);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), by8);
      v128.store(w, d, 224);
      c = i32x4.add(c, d);
      v128.store(w, c, 160);
      b = v128.xor(b, c);
      v128.store(w, h, 240);
      g = i32x4.add(g, h);
      v128.store(w, g, 176);
      f = v128.xor(f, g);
      v128.store(w, mulRotl7(b), 96);
      v128.store(w, mulRotl7(f), 112);
    }
    for (let w = WORK; w <= WORK + 256; w += 256) {
      // Diagonals 0 and 1.
      let a = v128.load(w, 0);
      let e = v128.load(w, 16);
      let b = v128.load(w, 80);
      let f = v128.load(w, 96);
      let c = v128.load(w, 160);
      let g = v128.load(w, 176);
      let d = v128.load(w, 240);
      let h = v128.load(w, 192);
      a = i32x4.add(a, b);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), swap);
      e = i32x4.add(e, f);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), swap);
      c = i32x4.add(c, d);
      b = v128.xor(b, c);
      g = i32x4.add(g, h);
      f = v128.xor(f, g);
      b = mulRotl12(b);
      f = mulRotl12(f);
      a = i32x4.add(a, b);
      v128.store(w, a, 0);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), by8);
      e = i32x4.add(e, f);
      v128.store(w, e, 16);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), by8);
      v128.store(w, d, 240);
      c = i32x4.add(c, d);
      v128.store(w, c, 160);
      b = v128.xor(b, c);
      v128.store(w, h, 192);
      g = i32x4.add(g, h);
      v128.store(w, g, 176);
      f = v128.xor(f, g);
      v128.store(w, mulRotl7(b), 80);
      v128.store(w, mulRotl7(f), 96);
      // Diagonals 2 and 3.
      a = v128.load(w, 32);
      e = v128.load(w, 48);
      b = v128.load(w, 112);
      f = v128.load(w, 64);
      c = v128.load(w, 128);
      g = v128.load(w, 144);
      d = v128.load(w, 208);
      h = v128.load(w, 224);
      a = i32x4.add(a, b);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), swap);
      e = i32x4.add(e, f);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), swap);
      c = i32x4.add(c, d);
      b = v128.xor(b, c);
      g = i32x4.add(g, h);
      f = v128.xor(f, g);
      b = mulRotl12(b);
      f = mulRotl12(f);
      a = i32x4.add(a, b);
      v128.store(w, a, 32);
      d = i8x16.relaxed_swizzle(v128.xor(d, a), by8);
      e = i32x4.add(e, f);
      v128.store(w, e, 48);
      h = i8x16.relaxed_swizzle(v128.xor(h, e), by8);
      v128.store(w, d, 208);
      c = i32x4.add(c, d);
      v128.store(w, c, 128);
      b = v128.xor(b, c);
      v128.store(w, h, 224);
      g = i32x4.add(g, h);
      v128.store(w, g, 144);
      f = v128.xor(f, g);
      v128.store(w, mulRotl7(b), 112);
      v128.store(w, mulRotl7(f), 64);
    }
    let end = q + 64;
    if (end > last) end = last;
    while (q < end) {
      const fold = (h2 >> 2) + (h2 & ~3);
      h2 &= 3;
      h0 = wideAdd(h0, 0, load<u64>(q), 0);
      const c = wideHi();
      h0 = wideAdd(h0, c, fold, 0);
      const carry = wideHi();
      h1 = wideAdd(h1, h2, load<u64>(q, 8), 1);
      h2 = wideHi();
      h1 = wideAdd(h1, h2, carry, 0);
      h2 = wideHi();

      const al = wideMul(h0, r0);
      const ah = wideHi();
      const bl = wideMul(h1, s1);
      const bh = wideHi();
      const dl = wideAdd(al, ah, bl, bh);
      const dh = wideHi();
      const el = wideMul(h0, r1);
      const eh = wideHi();
      const fl = wideMul(h1, r0);
      const fh = wideHi();
      const gl = wideAdd(el, eh, fl, fh);
      const gh = wideHi();
      h0 = dl;
      h1 = wideAdd(gl, gh, h2 * s1, 0);
      const kh = wideHi();
      h1 = wideAdd(h1, kh, dh, 0);
      h2 = h2 * r0 + wideHi();
      q += 16;
    }
  } while (++round < 10);
  addXor(p, WORK, state);
  v128.store(state, counter, 192);
  addXor(p + 256, WORK + 256, state);
  v128.store(state, i32x4.add(counter, i32x4.splat(4)), 192);
  store<u64>(m, h0, 24);
  store<u64>(m, h1, 32);
  store<u64>(m, h2, 40);
  clear256(WORK);
  clear256(WORK + 256);
}

// @ts-ignore: decorator
@inline
function copy256(to: usize, from: usize): void {
  for (const end = from + 256; from < end; from += 64, to += 64) {
    v128.store(to, v128.load(from));
    v128.store(to, v128.load(from, 16), 16);
    v128.store(to, v128.load(from, 32), 32);
    v128.store(to, v128.load(from, 48), 48);
  }
}

// The end of four blocks: XORs the sum of the state before the rounds and the one after them, at w, into p.
// @ts-ignore: decorator
@inline
function addXor(p: usize, w: usize, state: usize): void {
  for (const end = p + 64; p < end; p += 16, w += 64, state += 64) {
    xorRow(
      p,
      i32x4.add(v128.load(w), v128.load(state)),
      i32x4.add(v128.load(w, 16), v128.load(state, 16)),
      i32x4.add(v128.load(w, 32), v128.load(state, 32)),
      i32x4.add(v128.load(w, 48), v128.load(state, 48)),
    );
  }
}
