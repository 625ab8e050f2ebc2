// X25519 (RFC 7748 section 5): Montgomery ladder over GF(2^255 - 19).
//
// A field element is five u64 limbs of 51 bits at 40 bytes of memory. Products leave limbs below 2^52; add and sub do
// not carry, so their results (below 2^54) go into a product next, never into another sub. No branch and no address
// depends on a secret: the swap is a mask, the inversion a fixed chain.
import { wideAdd, wideHi, wideMul } from "./wide";

const MASK: u64 = 0x7ffffffffffff;
const LIMBS: usize = 40;

// All field elements of the ladder and the scalar; wiped after use.
const SCRATCH = memory.data(672, 64);
const X1: usize = SCRATCH;
const X2: usize = SCRATCH + 40;
const Z2: usize = SCRATCH + 80;
const X3: usize = SCRATCH + 120;
const Z3: usize = SCRATCH + 160;
const A: usize = SCRATCH + 200;
const B: usize = SCRATCH + 240;
const C: usize = SCRATCH + 280;
const D: usize = SCRATCH + 320;
const AA: usize = SCRATCH + 360;
const BB: usize = SCRATCH + 400;
const E: usize = SCRATCH + 440;
const T0: usize = SCRATCH + 480;
const T1: usize = SCRATCH + 520;
const T2: usize = SCRATCH + 560;
const T3: usize = SCRATCH + 600;
const SCALAR: usize = SCRATCH + 640;

/**
 * out = X25519(scalar, point), 32 bytes each; `out` may be one of the inputs. 0: the result is all zeros (the point has
 * small order), as RFC 7748 section 6.1 wants it checked; else 1.
 */
export function x25519(out: usize, scalar: usize, point: usize): i32 {
  memory.copy(SCALAR, scalar, 32);
  store<u8>(SCALAR, load<u8>(SCALAR) & 248);
  store<u8>(SCALAR, (load<u8>(SCALAR, 31) & 127) | 64, 31);
  fromBytes(X1, point);
  set(X2, 1);
  set(Z2, 0);
  memory.copy(X3, X1, LIMBS);
  set(Z3, 1);

  let swap: u64 = 0;
  for (let t = 254; t >= 0; t--) {
    const bit: u64 = (load<u8>(SCALAR + (t >> 3)) >> (t & 7)) & 1;
    swap ^= bit;
    conditionalSwap(X2, X3, swap);
    conditionalSwap(Z2, Z3, swap);
    swap = bit;

    add(A, X2, Z2);
    sub(B, X2, Z2);
    add(C, X3, Z3);
    sub(D, X3, Z3);
    mul(D, D, A);
    mul(C, C, B);
    square(AA, A);
    square(BB, B);
    add(X3, D, C);
    square(X3, X3);
    sub(Z3, D, C);
    square(Z3, Z3);
    mul(Z3, Z3, X1);
    mul(X2, AA, BB);
    sub(E, AA, BB);
    mulSmallAdd(T0, E, AA);
    mul(Z2, E, T0);
  }
  conditionalSwap(X2, X3, swap);
  conditionalSwap(Z2, Z3, swap);

  invert(Z2);
  mul(X2, X2, Z2);
  const any = toBytes(out, X2);
  memory.fill(SCRATCH, 0, 672);
  return any != 0 ? 1 : 0;
}

/** out = X25519(scalar, 9): the public key of a private key. */
export function x25519Base(out: usize, scalar: usize): void {
  x25519(out, scalar, BASE);
}

const BASE = memory.data<u64>([9, 0, 0, 0]);

function set(r: usize, value: u64): void {
  store<u64>(r, value);
  store<u64>(r, 0, 8);
  store<u64>(r, 0, 16);
  store<u64>(r, 0, 24);
  store<u64>(r, 0, 32);
}

// Bit 255 is ignored; values from p up are taken as they are (RFC 7748 section 5).
function fromBytes(r: usize, p: usize): void {
  const w0 = load<u64>(p);
  const w1 = load<u64>(p, 8);
  const w2 = load<u64>(p, 16);
  const w3 = load<u64>(p, 24);
  store<u64>(r, w0 & MASK);
  store<u64>(r, ((w0 >> 51) | (w1 << 13)) & MASK, 8);
  store<u64>(r, ((w1 >> 38) | (w2 << 26)) & MASK, 16);
  store<u64>(r, ((w2 >> 25) | (w3 << 39)) & MASK, 24);
  store<u64>(r, (w3 >> 12) & MASK, 32);
}

// Writes the value reduced below p; returns the OR of the four words.
function toBytes(out: usize, a: usize): u64 {
  let a0 = load<u64>(a);
  let a1 = load<u64>(a, 8);
  let a2 = load<u64>(a, 16);
  let a3 = load<u64>(a, 24);
  let a4 = load<u64>(a, 32);
  // Two rounds of carries bring every limb to 51 bits and the value below 2p.
  for (let i = 0; i < 2; i++) {
    a1 += a0 >> 51;
    a0 &= MASK;
    a2 += a1 >> 51;
    a1 &= MASK;
    a3 += a2 >> 51;
    a2 &= MASK;
    a4 += a3 >> 51;
    a3 &= MASK;
    a0 += 19 * (a4 >> 51);
    a4 &= MASK;
  }
  // q = 1 if the value is p or more: that is the carry out of value + 19.
  let q = (a0 + 19) >> 51;
  q = (a1 + q) >> 51;
  q = (a2 + q) >> 51;
  q = (a3 + q) >> 51;
  q = (a4 + q) >> 51;
  a0 += 19 * q;
  a1 += a0 >> 51;
  a0 &= MASK;
  a2 += a1 >> 51;
  a1 &= MASK;
  a3 += a2 >> 51;
  a2 &= MASK;
  a4 += a3 >> 51;
  a3 &= MASK;
  a4 &= MASK;
  const w0 = a0 | (a1 << 51);
  const w1 = (a1 >> 13) | (a2 << 38);
  const w2 = (a2 >> 26) | (a3 << 25);
  const w3 = (a3 >> 39) | (a4 << 12);
  store<u64>(out, w0);
  store<u64>(out, w1, 8);
  store<u64>(out, w2, 16);
  store<u64>(out, w3, 24);
  return w0 | w1 | w2 | w3;
}

function conditionalSwap(a: usize, b: usize, bit: u64): void {
  const mask: u64 = 0 - bit;
  for (let i: usize = 0; i < LIMBS; i += 8) {
    const x = load<u64>(a + i);
    const y = load<u64>(b + i);
    const t = mask & (x ^ y);
    store<u64>(a + i, x ^ t);
    store<u64>(b + i, y ^ t);
  }
}

// @ts-ignore: decorator
@inline
function add(r: usize, a: usize, b: usize): void {
  store<u64>(r, load<u64>(a) + load<u64>(b));
  store<u64>(r, load<u64>(a, 8) + load<u64>(b, 8), 8);
  store<u64>(r, load<u64>(a, 16) + load<u64>(b, 16), 16);
  store<u64>(r, load<u64>(a, 24) + load<u64>(b, 24), 24);
  store<u64>(r, load<u64>(a, 32) + load<u64>(b, 32), 32);
}

// a - b + 2p: b's limbs are below 2^52 - 38.
// @ts-ignore: decorator
@inline
function sub(r: usize, a: usize, b: usize): void {
  store<u64>(r, load<u64>(a) + 0xfffffffffffda - load<u64>(b));
  store<u64>(r, load<u64>(a, 8) + 0xffffffffffffe - load<u64>(b, 8), 8);
  store<u64>(r, load<u64>(a, 16) + 0xffffffffffffe - load<u64>(b, 16), 16);
  store<u64>(r, load<u64>(a, 24) + 0xffffffffffffe - load<u64>(b, 24), 24);
  store<u64>(r, load<u64>(a, 32) + 0xffffffffffffe - load<u64>(b, 32), 32);
}

// Low word of (h:l) + a * b; wideHi() is its high word.
// @ts-ignore: decorator
@inline
function mac(l: u64, h: u64, a: u64, b: u64): u64 {
  const pl = wideMul(a, b);
  const ph = wideHi();
  return wideAdd(l, h, pl, ph);
}

// Carries the five 128-bit columns once around and stores limbs below 2^51 + 2^17.
// @ts-ignore: decorator
@inline
function carry(
  r: usize,
  l0: u64, h0: u64, l1: u64, h1: u64, l2: u64, h2: u64, l3: u64, h3: u64, l4: u64, h4: u64,
): void {
  l1 = wideAdd(l1, h1, (l0 >> 51) | (h0 << 13), 0);
  h1 = wideHi();
  l2 = wideAdd(l2, h2, (l1 >> 51) | (h1 << 13), 0);
  h2 = wideHi();
  l3 = wideAdd(l3, h3, (l2 >> 51) | (h2 << 13), 0);
  h3 = wideHi();
  l4 = wideAdd(l4, h4, (l3 >> 51) | (h3 << 13), 0);
  h4 = wideHi();
  // The top carry is below 2^62: times 19 it needs 128 bits.
  const t = wideMul((l4 >> 51) | (h4 << 13), 19);
  const th = wideHi();
  const r0 = wideAdd(t, th, l0 & MASK, 0);
  const r0h = wideHi();
  store<u64>(r, r0 & MASK);
  store<u64>(r, (l1 & MASK) + ((r0 >> 51) | (r0h << 13)), 8);
  store<u64>(r, l2 & MASK, 16);
  store<u64>(r, l3 & MASK, 24);
  store<u64>(r, l4 & MASK, 32);
}

// r = a * b
function mul(r: usize, a: usize, b: usize): void {
  const a0 = load<u64>(a);
  const a1 = load<u64>(a, 8);
  const a2 = load<u64>(a, 16);
  const a3 = load<u64>(a, 24);
  const a4 = load<u64>(a, 32);
  const b0 = load<u64>(b);
  const b1 = load<u64>(b, 8);
  const b2 = load<u64>(b, 16);
  const b3 = load<u64>(b, 24);
  const b4 = load<u64>(b, 32);
  const c1 = b1 * 19;
  const c2 = b2 * 19;
  const c3 = b3 * 19;
  const c4 = b4 * 19;
  let l0 = wideMul(a0, b0);
  let h0 = wideHi();
  l0 = mac(l0, h0, a1, c4);
  h0 = wideHi();
  l0 = mac(l0, h0, a2, c3);
  h0 = wideHi();
  l0 = mac(l0, h0, a3, c2);
  h0 = wideHi();
  l0 = mac(l0, h0, a4, c1);
  h0 = wideHi();
  let l1 = wideMul(a0, b1);
  let h1 = wideHi();
  l1 = mac(l1, h1, a1, b0);
  h1 = wideHi();
  l1 = mac(l1, h1, a2, c4);
  h1 = wideHi();
  l1 = mac(l1, h1, a3, c3);
  h1 = wideHi();
  l1 = mac(l1, h1, a4, c2);
  h1 = wideHi();
  let l2 = wideMul(a0, b2);
  let h2 = wideHi();
  l2 = mac(l2, h2, a1, b1);
  h2 = wideHi();
  l2 = mac(l2, h2, a2, b0);
  h2 = wideHi();
  l2 = mac(l2, h2, a3, c4);
  h2 = wideHi();
  l2 = mac(l2, h2, a4, c3);
  h2 = wideHi();
  let l3 = wideMul(a0, b3);
  let h3 = wideHi();
  l3 = mac(l3, h3, a1, b2);
  h3 = wideHi();
  l3 = mac(l3, h3, a2, b1);
  h3 = wideHi();
  l3 = mac(l3, h3, a3, b0);
  h3 = wideHi();
  l3 = mac(l3, h3, a4, c4);
  h3 = wideHi();
  let l4 = wideMul(a0, b4);
  let h4 = wideHi();
  l4 = mac(l4, h4, a1, b3);
  h4 = wideHi();
  l4 = mac(l4, h4, a2, b2);
  h4 = wideHi();
  l4 = mac(l4, h4, a3, b1);
  h4 = wideHi();
  l4 = mac(l4, h4, a4, b0);
  h4 = wideHi();
  carry(r, l0, h0, l1, h1, l2, h2, l3, h3, l4, h4);
}

// r = a * a
function square(r: usize, a: usize): void {
  const a0 = load<u64>(a);
  const a1 = load<u64>(a, 8);
  const a2 = load<u64>(a, 16);
  const a3 = load<u64>(a, 24);
  const a4 = load<u64>(a, 32);
  const d0 = a0 * 2;
  const d1 = a1 * 2;
  const d2 = a2 * 2;
  const d3 = a3 * 2;
  const c3 = a3 * 19;
  const c4 = a4 * 19;
  let l0 = wideMul(a0, a0);
  let h0 = wideHi();
  l0 = mac(l0, h0, d1, c4);
  h0 = wideHi();
  l0 = mac(l0, h0, d2, c3);
  h0 = wideHi();
  let l1 = wideMul(d0, a1);
  let h1 = wideHi();
  l1 = mac(l1, h1, d2, c4);
  h1 = wideHi();
  l1 = mac(l1, h1, a3, c3);
  h1 = wideHi();
  let l2 = wideMul(d0, a2);
  let h2 = wideHi();
  l2 = mac(l2, h2, a1, a1);
  h2 = wideHi();
  l2 = mac(l2, h2, d3, c4);
  h2 = wideHi();
  let l3 = wideMul(d0, a3);
  let h3 = wideHi();
  l3 = mac(l3, h3, d1, a2);
  h3 = wideHi();
  l3 = mac(l3, h3, a4, c4);
  h3 = wideHi();
  let l4 = wideMul(d0, a4);
  let h4 = wideHi();
  l4 = mac(l4, h4, d1, a3);
  h4 = wideHi();
  l4 = mac(l4, h4, a2, a2);
  h4 = wideHi();
  carry(r, l0, h0, l1, h1, l2, h2, l3, h3, l4, h4);
}

// r = 121665 * a + b, the curve's (A - 2) / 4.
function mulSmallAdd(r: usize, a: usize, b: usize): void {
  const l0 = mac(load<u64>(b), 0, load<u64>(a), 121665);
  const h0 = wideHi();
  const l1 = mac(load<u64>(b, 8), 0, load<u64>(a, 8), 121665);
  const h1 = wideHi();
  const l2 = mac(load<u64>(b, 16), 0, load<u64>(a, 16), 121665);
  const h2 = wideHi();
  const l3 = mac(load<u64>(b, 24), 0, load<u64>(a, 24), 121665);
  const h3 = wideHi();
  const l4 = mac(load<u64>(b, 32), 0, load<u64>(a, 32), 121665);
  const h4 = wideHi();
  carry(r, l0, h0, l1, h1, l2, h2, l3, h3, l4, h4);
}

function squares(r: usize, a: usize, n: i32): void {
  square(r, a);
  for (let i = 1; i < n; i++) square(r, r);
}

// a = a^(p - 2) = a^(2^255 - 21): 254 squarings and 11 products.
function invert(a: usize): void {
  square(T0, a); // 2
  squares(T1, T0, 2); // 8
  mul(T1, a, T1); // 9
  mul(T0, T0, T1); // 11
  square(T2, T0); // 22
  mul(T1, T1, T2); // 2^5 - 1
  squares(T2, T1, 5);
  mul(T1, T2, T1); // 2^10 - 1
  squares(T2, T1, 10);
  mul(T2, T2, T1); // 2^20 - 1
  squares(T3, T2, 20);
  mul(T2, T3, T2); // 2^40 - 1
  squares(T2, T2, 10);
  mul(T1, T2, T1); // 2^50 - 1
  squares(T2, T1, 50);
  mul(T2, T2, T1); // 2^100 - 1
  squares(T3, T2, 100);
  mul(T2, T3, T2); // 2^200 - 1
  squares(T2, T2, 50);
  mul(T1, T2, T1); // 2^250 - 1
  squares(T1, T1, 5); // 2^255 - 2^5
  mul(a, T1, T0); // 2^255 - 21
}
