// XSalsa20-Poly1305, the NaCl box after its key agreement (cr.yp.to "Cryptography in NaCl" sections 5, 7, 8, 9):
// HSalsa20, Salsa20 with four blocks at a time as in ./chacha20, and the secretbox.
//
// secretbox(key, nonce24): subkey = HSalsa20(key, nonce[0..15]); key stream = Salsa20(subkey, nonce[16..23]); its first
// 32 bytes are the Poly1305 key of the ciphertext, the rest covers the message. The tag stands in front.
import { xorRow, xorStream } from "./lanes";
import { poly1305Finish, poly1305Init, poly1305Message } from "./poly1305";

// Salsa20's state matrix, as in ./chacha20: 16 words, each in four lanes; word 8 is the block counter.
const STATE = memory.data(256, 64);
const STREAM = memory.data(272, 64);
const SUBKEY = memory.data(32, 16);
const TAG = memory.data(16, 16);

const FIRST: i32 = 224;

// @ts-ignore: decorator
@inline
function rotl(x: v128, n: i32): v128 {
  return v128.or(i32x4.shl(x, n), i32x4.shr_u(x, 32 - n));
}

/** HSalsa20: derives the 32-byte `out` from a 32-byte key and a 16-byte input. `out` may be one of them. */
export function hsalsa20(out: usize, key: usize, input: usize): void {
  salsa20Key(key);
  const in0 = load<u32>(input);
  const in1 = load<u32>(input, 4);
  const in2 = load<u32>(input, 8);
  const in3 = load<u32>(input, 12);
  v128.store(STATE, i32x4.splat(in0), 96);
  v128.store(STATE, i32x4.splat(in1), 112);
  v128.store(STATE, i32x4.splat(in2), 128);
  v128.store(STATE, i32x4.splat(in3), 144);
  salsa20Stream();
  // Words 0, 5, 10, 15, 6..9 of the first block, without the addition of the initial state.
  store<u32>(out, load<u32>(STREAM) - 0x61707865);
  store<u32>(out, load<u32>(STREAM, 20) - 0x3320646e, 4);
  store<u32>(out, load<u32>(STREAM, 40) - 0x79622d32, 8);
  store<u32>(out, load<u32>(STREAM, 60) - 0x6b206574, 12);
  store<u32>(out, load<u32>(STREAM, 24) - in0, 16);
  store<u32>(out, load<u32>(STREAM, 28) - in1, 20);
  store<u32>(out, load<u32>(STREAM, 32) - in2, 24);
  store<u32>(out, load<u32>(STREAM, 36) - in3, 28);
  memory.fill(STATE, 0, 256);
  memory.fill(STREAM, 0, 272);
}

/**
 * Seals in place: the message stands at p+16 .. p+15+len, the tag is written to p. The 16 bytes behind the message must
 * be memory too: they are overwritten for a moment and restored.
 */
export function boxSeal(p: usize, len: i32, key: usize, nonce: usize): void {
  begin(key, nonce);
  crypt(p + 16, len);
  poly1305Message(p + 16, len);
  poly1305Finish(p);
}

/**
 * Opens in place what `boxSeal` made; `len` does not count the tag. 1: the message stands at p+16. 0: the tag is wrong,
 * nothing has changed. Memory as `boxSeal`.
 */
export function boxOpen(p: usize, len: i32, key: usize, nonce: usize): i32 {
  begin(key, nonce);
  poly1305Message(p + 16, len);
  poly1305Finish(TAG);
  const differs = v128.any_true(v128.xor(v128.load(p), v128.load(TAG)));
  v128.store(TAG, i64x2.splat(0));
  if (differs) {
    memory.fill(STATE, 0, 256);
    memory.fill(STREAM, 0, 272);
    return 0;
  }
  crypt(p + 16, len);
  return 1;
}

// Sets STATE for (key, nonce), puts the first 256 bytes of key stream into STREAM, and starts the tag.
function begin(key: usize, nonce: usize): void {
  hsalsa20(SUBKEY, key, nonce);
  salsa20Key(SUBKEY);
  memory.fill(SUBKEY, 0, 32);
  v128.store(STATE, i32x4.splat(load<i32>(nonce, 16)), 96);
  v128.store(STATE, i32x4.splat(load<i32>(nonce, 20)), 112);
  v128.store(STATE, i32x4(0, 1, 2, 3), 128);
  v128.store(STATE, i32x4.splat(0), 144);
  salsa20Stream();
  poly1305Init(STREAM);
}

function crypt(p: usize, len: i32): void {
  const end = p + (<usize>len);
  const behind = v128.load(end);
  if (len <= FIRST) {
    xorStream(p, STREAM + 32, len);
  } else {
    xorStream(p, STREAM + 32, FIRST);
    p += FIRST;
    len -= FIRST;
    const passes = len >> 8;
    salsa20Xor(STATE, p, passes);
    const rest = len & 255;
    if (rest != 0) {
      salsa20Stream();
      xorStream(p + ((<usize>passes) << 8), STREAM, rest);
    }
  }
  v128.store(end, behind);
  memory.fill(STATE, 0, 256);
  memory.fill(STREAM, 0, 272);
}

function salsa20Key(key: usize): void {
  v128.store(STATE, i32x4.splat(0x61707865));
  v128.store(STATE, i32x4.splat(0x3320646e), 80);
  v128.store(STATE, i32x4.splat(0x79622d32), 160);
  v128.store(STATE, i32x4.splat(0x6b206574), 240);
  for (let i: usize = 0; i < 16; i += 4) {
    v128.store(STATE + (i << 2), i32x4.splat(load<i32>(key + i)), 16);
    v128.store(STATE + (i << 2), i32x4.splat(load<i32>(key + i, 16)), 176);
  }
}

function salsa20Stream(): void {
  memory.fill(STREAM, 0, 256);
  salsa20Xor(STATE, STREAM, 1);
}

// XORs the next `passes` times 256 bytes of key stream into p and advances the counter.
function salsa20Xor(state: usize, p: usize, passes: i32): void {
  for (; passes > 0; passes--) {
    let x0 = v128.load(state);
    let x1 = v128.load(state, 16);
    let x2 = v128.load(state, 32);
    let x3 = v128.load(state, 48);
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
      x4 = v128.xor(x4, rotl(i32x4.add(x0, x12), 7));
      x9 = v128.xor(x9, rotl(i32x4.add(x5, x1), 7));
      x14 = v128.xor(x14, rotl(i32x4.add(x10, x6), 7));
      x3 = v128.xor(x3, rotl(i32x4.add(x15, x11), 7));
      x8 = v128.xor(x8, rotl(i32x4.add(x4, x0), 9));
      x13 = v128.xor(x13, rotl(i32x4.add(x9, x5), 9));
      x2 = v128.xor(x2, rotl(i32x4.add(x14, x10), 9));
      x7 = v128.xor(x7, rotl(i32x4.add(x3, x15), 9));
      x12 = v128.xor(x12, rotl(i32x4.add(x8, x4), 13));
      x1 = v128.xor(x1, rotl(i32x4.add(x13, x9), 13));
      x6 = v128.xor(x6, rotl(i32x4.add(x2, x14), 13));
      x11 = v128.xor(x11, rotl(i32x4.add(x7, x3), 13));
      x0 = v128.xor(x0, rotl(i32x4.add(x12, x8), 18));
      x5 = v128.xor(x5, rotl(i32x4.add(x1, x13), 18));
      x10 = v128.xor(x10, rotl(i32x4.add(x6, x2), 18));
      x15 = v128.xor(x15, rotl(i32x4.add(x11, x7), 18));
      x1 = v128.xor(x1, rotl(i32x4.add(x0, x3), 7));
      x6 = v128.xor(x6, rotl(i32x4.add(x5, x4), 7));
      x11 = v128.xor(x11, rotl(i32x4.add(x10, x9), 7));
      x12 = v128.xor(x12, rotl(i32x4.add(x15, x14), 7));
      x2 = v128.xor(x2, rotl(i32x4.add(x1, x0), 9));
      x7 = v128.xor(x7, rotl(i32x4.add(x6, x5), 9));
      x8 = v128.xor(x8, rotl(i32x4.add(x11, x10), 9));
      x13 = v128.xor(x13, rotl(i32x4.add(x12, x15), 9));
      x3 = v128.xor(x3, rotl(i32x4.add(x2, x1), 13));
      x4 = v128.xor(x4, rotl(i32x4.add(x7, x6), 13));
      x9 = v128.xor(x9, rotl(i32x4.add(x8, x11), 13));
      x14 = v128.xor(x14, rotl(i32x4.add(x13, x12), 13));
      x0 = v128.xor(x0, rotl(i32x4.add(x3, x2), 18));
      x5 = v128.xor(x5, rotl(i32x4.add(x4, x7), 18));
      x10 = v128.xor(x10, rotl(i32x4.add(x9, x8), 18));
      x15 = v128.xor(x15, rotl(i32x4.add(x14, x13), 18));
    }
    xorRow(p, i32x4.add(x0, v128.load(state)), i32x4.add(x1, v128.load(state, 16)), i32x4.add(x2, v128.load(state, 32)), i32x4.add(x3, v128.load(state, 48)));
    xorRow(p + 16, i32x4.add(x4, v128.load(state, 64)), i32x4.add(x5, v128.load(state, 80)), i32x4.add(x6, v128.load(state, 96)), i32x4.add(x7, v128.load(state, 112)));
    xorRow(p + 32, i32x4.add(x8, v128.load(state, 128)), i32x4.add(x9, v128.load(state, 144)), i32x4.add(x10, v128.load(state, 160)), i32x4.add(x11, v128.load(state, 176)));
    xorRow(p + 48, i32x4.add(x12, v128.load(state, 192)), i32x4.add(x13, v128.load(state, 208)), i32x4.add(x14, v128.load(state, 224)), i32x4.add(x15, v128.load(state, 240)));
    v128.store(state, i32x4.add(v128.load(state, 128), i32x4.splat(4)), 128);
    p += 256;
  }
}
