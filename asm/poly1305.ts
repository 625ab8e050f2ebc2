// Poly1305 (RFC 8439 section 2.5) with 64-bit limbs and 64x64 -> 128-bit products.
//
// h = h0 + 2^64 h1 + 2^128 h2, r = r0 + 2^64 r1. r1 is a multiple of 4, so 2^128 r1 = s1 (mod 2^130 - 5) with
// s1 = 5 r1 / 4. h2 stays unreduced between blocks; what stands above bit 130 is folded in at the start of the next.
import { wideAdd, wideHi, wideMul } from "./wide";

// The one running computation: r0, r1, s1, h0, h1, h2, then the 16 bytes of s that finish the tag.
const STATE = memory.data(64, 64);
/** Place of it, for ./chacha20. */
export const POLY1305_STATE: usize = STATE;
const PARTIAL = memory.data(16, 16);

/** Starts a tag with the 32-byte one-time key (r, s) at `key`. */
export function poly1305Init(key: usize): void {
  const r1 = load<u64>(key, 8) & 0x0ffffffc0ffffffc;
  store<u64>(STATE, load<u64>(key) & 0x0ffffffc0fffffff);
  store<u64>(STATE, r1, 8);
  store<u64>(STATE, r1 + (r1 >> 2), 16);
  store<u64>(STATE, 0, 24);
  store<u64>(STATE, 0, 32);
  store<u64>(STATE, 0, 40);
  v128.store(STATE, v128.load(key, 16), 48);
}

/** Absorbs `blocks` blocks of 16 bytes. `top` is the bit above each block: 1, or 0 for a block that carries its own. */
export function poly1305Blocks(p: usize, blocks: i32, top: u32): void {
  const high = <u64>top;
  const r0 = load<u64>(STATE);
  const r1 = load<u64>(STATE, 8);
  const s1 = load<u64>(STATE, 16);
  let h0 = load<u64>(STATE, 24);
  let h1 = load<u64>(STATE, 32);
  let h2 = load<u64>(STATE, 40);
  const end = p + ((<usize>blocks) << 4);
  while (p < end) {
    const fold = (h2 >> 2) + (h2 & ~3);
    h2 &= 3;
    // The message word before `fold`: h0 is ready earlier than h2, so the chain between blocks is shorter.
    h0 = wideAdd(h0, 0, load<u64>(p), 0);
    const c = wideHi();
    h0 = wideAdd(h0, c, fold, 0);
    const carry = wideHi();
    h1 = wideAdd(h1, h2, load<u64>(p, 8), high);
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
    p += 16;
  }
  store<u64>(STATE, h0, 24);
  store<u64>(STATE, h1, 32);
  store<u64>(STATE, h2, 40);
}

/** Absorbs `length` bytes as RFC 8439's AEAD does: the last block is filled up with zeros. Reads only those bytes. */
export function poly1305Padded(p: usize, length: i32): void {
  poly1305Blocks(p, length >> 4, 1);
  const rest = length & 15;
  if (rest == 0) return;
  v128.store(PARTIAL, i64x2.splat(0));
  memory.copy(PARTIAL, p + (<usize>(length - rest)), <usize>rest);
  poly1305Blocks(PARTIAL, 1, 1);
}

/** Absorbs `length` bytes as plain Poly1305 does, and ends the message: a last partial block is ended by a one bit. */
export function poly1305Message(p: usize, length: i32): void {
  poly1305Blocks(p, length >> 4, 1);
  const rest = length & 15;
  if (rest == 0) return;
  v128.store(PARTIAL, i64x2.splat(0));
  memory.copy(PARTIAL, p + (<usize>(length - rest)), <usize>rest);
  store<u8>(PARTIAL + (<usize>rest), 1);
  poly1305Blocks(PARTIAL, 1, 0);
}

/** Absorbs the AEAD's last block: the two lengths in bytes. */
export function poly1305Lengths(aadLength: i32, length: i32): void {
  store<u64>(PARTIAL, <u64>aadLength);
  store<u64>(PARTIAL, <u64>length, 8);
  poly1305Blocks(PARTIAL, 1, 1);
}

/** Writes the 16-byte tag and wipes the key. */
export function poly1305Finish(tag: usize): void {
  let h0 = load<u64>(STATE, 24);
  let h1 = load<u64>(STATE, 32);
  let h2 = load<u64>(STATE, 40);
  // h < 2^131 after this fold.
  h0 = wideAdd(h0, 0, (h2 >> 2) + (h2 & ~3), 0);
  let c = wideHi();
  h2 &= 3;
  h1 = wideAdd(h1, h2, c, 0);
  h2 = wideHi();
  // h + 5 - 2^130 is the answer if h >= 2^130 - 5; the choice is made by a mask.
  const g0 = wideAdd(h0, 0, 5, 0);
  c = wideHi();
  const g1 = wideAdd(h1, h2, c, 0);
  const mask: u64 = 0 - (wideHi() >> 2);
  h0 = (h0 & ~mask) | (g0 & mask);
  h1 = (h1 & ~mask) | (g1 & mask);
  h0 = wideAdd(h0, 0, load<u64>(STATE, 48), 0);
  c = wideHi();
  h1 = h1 + load<u64>(STATE, 56) + c;
  store<u64>(tag, h0);
  store<u64>(tag, h1, 8);
  const zero = i64x2.splat(0);
  v128.store(STATE, zero);
  v128.store(STATE, zero, 16);
  v128.store(STATE, zero, 32);
  v128.store(STATE, zero, 48);
}
