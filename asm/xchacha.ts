// XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha section 2): HChaCha20 derives a key from the first 16 bytes of a 24-byte
// nonce; ChaCha20-Poly1305 goes on with that key and the nonce 00000000 || nonce[16..23].
import { aeadInit, aeadOpenWords, aeadSealWords } from "./aead";
import { chacha20Key, chacha20Xor } from "./chacha20";

const STATE = memory.data(256, 64);
const BLOCKS = memory.data(256, 64);
const SUBKEY = memory.data(32, 16);

/** HChaCha20: derives the 32-byte `out` from a 32-byte key and a 16-byte input. */
export function hchacha20(out: usize, key: usize, input: usize): void {
  chacha20Key(STATE, key);
  for (let i: usize = 0; i < 16; i += 4) v128.store(STATE + (i << 2), i32x4.splat(load<i32>(input + i)), 192);
  memory.fill(BLOCKS, 0, 256);
  chacha20Xor(STATE, BLOCKS, 1);
  // Words 0-3 and 12-15 of the first block, without the block function's last addition of the initial state.
  const last = i32x4.sub(v128.load(BLOCKS, 48), v128.load(input));
  v128.store(out, i32x4.sub(v128.load(BLOCKS), i32x4(0x61707865, 0x3320646e, 0x79622d32, 0x6b206574)));
  v128.store(out, last, 16);
  memory.fill(STATE, 0, 256);
  memory.fill(BLOCKS, 0, 256);
}

/** Seals in place with a 32-byte key, a 24-byte nonce and AAD. Memory as `aeadSeal`. */
export function xaeadSeal(p: usize, len: i32, key: usize, nonce: usize, aad: usize, aadLen: i32): void {
  begin(key, nonce);
  aeadSealWords(p, len, STATE, 0, load<u32>(nonce, 16), load<u32>(nonce, 20), aad, aadLen);
  memory.fill(STATE, 0, 256);
}

/** Opens what `xaeadSeal` made. Memory and result as `aeadOpen`. */
export function xaeadOpen(p: usize, len: i32, key: usize, nonce: usize, aad: usize, aadLen: i32): i32 {
  begin(key, nonce);
  const ok = aeadOpenWords(p, len, STATE, 0, load<u32>(nonce, 16), load<u32>(nonce, 20), aad, aadLen);
  memory.fill(STATE, 0, 256);
  return ok;
}

function begin(key: usize, nonce: usize): void {
  hchacha20(SUBKEY, key, nonce);
  aeadInit(STATE, SUBKEY);
  memory.fill(SUBKEY, 0, 32);
}
