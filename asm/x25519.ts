// X25519 (RFC 7748 section 5): Montgomery ladder over GF(2^255 - 19).
//
// A field element is five u64 limbs of 51 bits at 40 bytes of memory. Products leave limbs below 2^51 + 2^15; add and sub
// do not carry, so their results (below 2^53) go into a product next, never into another sub. No branch and no address
// depends on a secret: the swap is a mask, the inversion a fixed chain.
//
// Each 64x64-bit product is made 2^13 times too large (one factor carries 2^9, the other 2^4): then its high word is what
// stands above bit 51 and belongs to the next limb, its low word >> 13 is the rest, and both are summed in 64 bits
// (below 2^61). Summing 128-bit columns instead takes 1.6 times as long: it is all moves and carries.
import { wideHi, wideMul } from "./wide";

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
  for (let t = 254; t >= 3; t--) {
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
    double();
    add(X3, D, C);
    square(X3, X3);
    sub(Z3, D, C);
    square(Z3, Z3);
    mul(Z3, Z3, X1);
  }
  conditionalSwap(X2, X3, swap);
  conditionalSwap(Z2, Z3, swap);
  // The three lowest bits of every scalar are zero: (X3 : Z3) is not needed any more.
  for (let t = 0; t < 3; t++) {
    add(A, X2, Z2);
    sub(B, X2, Z2);
    double();
  }

  invert(Z2);
  mul(X2, X2, Z2);
  const any = toBytes(out, X2);
  memory.fill(SCRATCH, 0, 672);
  return any != 0 ? 1 : 0;
}

// (X2 : Z2) = 2 (X2 : Z2), from their sum A and difference B.
// @ts-ignore: decorator
@inline
function double(): void {
  square(AA, A);
  square(BB, B);
  mul(X2, AA, BB);
  sub(E, AA, BB);
  mulSmallAdd(T0, E, AA);
  mul(Z2, E, T0);
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

// @ts-ignore: decorator
@inline
function conditionalSwap(a: usize, b: usize, bit: u64): void {
  const mask: u64 = 0 - bit;
  const t0 = mask & (load<u64>(a) ^ load<u64>(b));
  store<u64>(a, load<u64>(a) ^ t0);
  store<u64>(b, load<u64>(b) ^ t0);
  const t1 = mask & (load<u64>(a, 8) ^ load<u64>(b, 8));
  store<u64>(a, load<u64>(a, 8) ^ t1, 8);
  store<u64>(b, load<u64>(b, 8) ^ t1, 8);
  const t2 = mask & (load<u64>(a, 16) ^ load<u64>(b, 16));
  store<u64>(a, load<u64>(a, 16) ^ t2, 16);
  store<u64>(b, load<u64>(b, 16) ^ t2, 16);
  const t3 = mask & (load<u64>(a, 24) ^ load<u64>(b, 24));
  store<u64>(a, load<u64>(a, 24) ^ t3, 24);
  store<u64>(b, load<u64>(b, 24) ^ t3, 24);
  const t4 = mask & (load<u64>(a, 32) ^ load<u64>(b, 32));
  store<u64>(a, load<u64>(a, 32) ^ t4, 32);
  store<u64>(b, load<u64>(b, 32) ^ t4, 32);
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

// Takes the sums with their sign changed: of plain sums JavaScriptCore would make one tree of all ten terms of a limb, to
// be added up at the end, and spill them until then (7 % slower). Adds the high sums to the limbs that they belong to
// (2^255 = 19), carries once, all limbs at the same time, and stores.
// @ts-ignore: decorator
@inline
function carry(
  r: usize,
  l0: u64, l1: u64, l2: u64, l3: u64, l4: u64, h0: u64, h1: u64, h2: u64, h3: u64, h4: u64,
): void {
  l0 = 0 - (l0 + h4 * 19);
  l1 = 0 - (l1 + h0);
  l2 = 0 - (l2 + h1);
  l3 = 0 - (l3 + h2);
  l4 = 0 - (l4 + h3);
  store<u64>(r, (l0 & MASK) + (l4 >> 51) * 19);
  store<u64>(r, (l1 & MASK) + (l0 >> 51), 8);
  store<u64>(r, (l2 & MASK) + (l1 >> 51), 16);
  store<u64>(r, (l3 & MASK) + (l2 >> 51), 24);
  store<u64>(r, (l4 & MASK) + (l3 >> 51), 32);
}

// r = a * b
function mul(r: usize, a: usize, b: usize): void {
  const a0 = load<u64>(a) << 9;
  const a1 = load<u64>(a, 8) << 9;
  const a2 = load<u64>(a, 16) << 9;
  const a3 = load<u64>(a, 24) << 9;
  const a4 = load<u64>(a, 32) << 9;
  const b0 = load<u64>(b) << 4;
  const b1 = load<u64>(b, 8) << 4;
  const b2 = load<u64>(b, 16) << 4;
  const b3 = load<u64>(b, 24) << 4;
  const b4 = load<u64>(b, 32) << 4;
  const c1 = b1 * 19;
  const c2 = b2 * 19;
  const c3 = b3 * 19;
  const c4 = b4 * 19;
  let l0: u64 = 0 - (wideMul(a0, b0) >> 13);
  let h0: u64 = 0 - wideHi();
  l0 -= wideMul(a1, c4) >> 13;
  h0 -= wideHi();
  l0 -= wideMul(a2, c3) >> 13;
  h0 -= wideHi();
  l0 -= wideMul(a3, c2) >> 13;
  h0 -= wideHi();
  l0 -= wideMul(a4, c1) >> 13;
  h0 -= wideHi();
  let l1: u64 = 0 - (wideMul(a0, b1) >> 13);
  let h1: u64 = 0 - wideHi();
  l1 -= wideMul(a1, b0) >> 13;
  h1 -= wideHi();
  l1 -= wideMul(a2, c4) >> 13;
  h1 -= wideHi();
  l1 -= wideMul(a3, c3) >> 13;
  h1 -= wideHi();
  l1 -= wideMul(a4, c2) >> 13;
  h1 -= wideHi();
  let l2: u64 = 0 - (wideMul(a0, b2) >> 13);
  let h2: u64 = 0 - wideHi();
  l2 -= wideMul(a1, b1) >> 13;
  h2 -= wideHi();
  l2 -= wideMul(a2, b0) >> 13;
  h2 -= wideHi();
  l2 -= wideMul(a3, c4) >> 13;
  h2 -= wideHi();
  l2 -= wideMul(a4, c3) >> 13;
  h2 -= wideHi();
  let l3: u64 = 0 - (wideMul(a0, b3) >> 13);
  let h3: u64 = 0 - wideHi();
  l3 -= wideMul(a1, b2) >> 13;
  h3 -= wideHi();
  l3 -= wideMul(a2, b1) >> 13;
  h3 -= wideHi();
  l3 -= wideMul(a3, b0) >> 13;
  h3 -= wideHi();
  l3 -= wideMul(a4, c4) >> 13;
  h3 -= wideHi();
  let l4: u64 = 0 - (wideMul(a0, b4) >> 13);
  let h4: u64 = 0 - wideHi();
  l4 -= wideMul(a1, b3) >> 13;
  h4 -= wideHi();
  l4 -= wideMul(a2, b2) >> 13;
  h4 -= wideHi();
  l4 -= wideMul(a3, b1) >> 13;
  h4 -= wideHi();
  l4 -= wideMul(a4, b0) >> 13;
  h4 -= wideHi();
  carry(r, l0, l1, l2, l3, l4, h0, h1, h2, h3, h4);
}

// r = a * a
function square(r: usize, a: usize): void {
  const w0 = load<u64>(a);
  const w1 = load<u64>(a, 8);
  const w2 = load<u64>(a, 16);
  const w3 = load<u64>(a, 24);
  const w4 = load<u64>(a, 32);
  const a0 = w0 << 9;
  const a1 = w1 << 9;
  const a2 = w2 << 9;
  const a3 = w3 << 9;
  const a4 = w4 << 9;
  const d0 = w0 << 10;
  const d1 = w1 << 10;
  const d2 = w2 << 10;
  const d3 = w3 << 10;
  const b0 = w0 << 4;
  const b1 = w1 << 4;
  const b2 = w2 << 4;
  const b3 = w3 << 4;
  const b4 = w4 << 4;
  const c3 = b3 * 19;
  const c4 = b4 * 19;
  let l0: u64 = 0 - (wideMul(a0, b0) >> 13);
  let h0: u64 = 0 - wideHi();
  l0 -= wideMul(d1, c4) >> 13;
  h0 -= wideHi();
  l0 -= wideMul(d2, c3) >> 13;
  h0 -= wideHi();
  let l1: u64 = 0 - (wideMul(d0, b1) >> 13);
  let h1: u64 = 0 - wideHi();
  l1 -= wideMul(d2, c4) >> 13;
  h1 -= wideHi();
  l1 -= wideMul(a3, c3) >> 13;
  h1 -= wideHi();
  let l2: u64 = 0 - (wideMul(d0, b2) >> 13);
  let h2: u64 = 0 - wideHi();
  l2 -= wideMul(a1, b1) >> 13;
  h2 -= wideHi();
  l2 -= wideMul(d3, c4) >> 13;
  h2 -= wideHi();
  let l3: u64 = 0 - (wideMul(d0, b3) >> 13);
  let h3: u64 = 0 - wideHi();
  l3 -= wideMul(d1, b2) >> 13;
  h3 -= wideHi();
  l3 -= wideMul(a4, c4) >> 13;
  h3 -= wideHi();
  let l4: u64 = 0 - (wideMul(d0, b4) >> 13);
  let h4: u64 = 0 - wideHi();
  l4 -= wideMul(d1, b3) >> 13;
  h4 -= wideHi();
  l4 -= wideMul(a2, b2) >> 13;
  h4 -= wideHi();
  carry(r, l0, l1, l2, l3, l4, h0, h1, h2, h3, h4);
}

// r = 121665 * a + b, the curve's (A - 2) / 4.
function mulSmallAdd(r: usize, a: usize, b: usize): void {
  const l0: u64 = 0 - ((wideMul(load<u64>(a) << 9, 121665 << 4) >> 13) + load<u64>(b));
  const h0: u64 = 0 - wideHi();
  const l1: u64 = 0 - ((wideMul(load<u64>(a, 8) << 9, 121665 << 4) >> 13) + load<u64>(b, 8));
  const h1: u64 = 0 - wideHi();
  const l2: u64 = 0 - ((wideMul(load<u64>(a, 16) << 9, 121665 << 4) >> 13) + load<u64>(b, 16));
  const h2: u64 = 0 - wideHi();
  const l3: u64 = 0 - ((wideMul(load<u64>(a, 24) << 9, 121665 << 4) >> 13) + load<u64>(b, 24));
  const h3: u64 = 0 - wideHi();
  const l4: u64 = 0 - ((wideMul(load<u64>(a, 32) << 9, 121665 << 4) >> 13) + load<u64>(b, 32));
  const h4: u64 = 0 - wideHi();
  carry(r, l0, l1, l2, l3, l4, h0, h1, h2, h3, h4);
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
