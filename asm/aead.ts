// ChaCha20-Poly1305 (RFC 8439 section 2.8), in place.
//
// Memory: `aeadSeal(p, len, ...)` turns len bytes at p into ciphertext and writes the tag to p+len .. p+len+15.
// Exactly the bytes p .. p+len+15 are read or written; nothing before p and nothing after the tag, not even for a
// moment. `aeadOpen` checks the tag first: on failure no byte has changed, on success p .. p+len-1 is plaintext and the
// tag stands as it was (while it runs, the 16 bytes of the tag are used as scratch). No alignment is needed.
//
// len may be 0; it is not checked (the caller bounds it). `state` comes from `aeadInit`, is written to by every
// call (counter and nonce), and may be used again for any number of packets.
//
// Two passes, cipher and MAC: fusing them showed no gain. The first four-block pass gives the Poly1305 key (block 0)
// and the key stream of the first 192 bytes.
import { CHACHA20_STATE_SIZE, chacha20Key, chacha20Nonce, chacha20Xor } from "./chacha20";
import { xorStream } from "./lanes";
import { poly1305Blocks, poly1305Finish, poly1305Init, poly1305Lengths, poly1305Padded } from "./poly1305";

/** Bytes of a key's state, which wants an alignment of 64. */
export const AEAD_STATE_SIZE: i32 = CHACHA20_STATE_SIZE;

const FIRST: i32 = 192;

// Key stream of one pass, and 16 bytes behind it because xorStream works in steps of 16.
const STREAM = memory.data(272, 64);
const TAG = memory.data(16, 16);

/** Expands the 32-byte key at `key` into `state`. */
export function aeadInit(state: usize, key: usize): void {
  chacha20Key(state, key);
}

/** Seals with WireGuard's nonce (4 zero bytes, then the counter, little-endian) and no AAD. */
export function aeadSeal(p: usize, len: i32, state: usize, counterLo: u32, counterHi: u32): void {
  aeadSealWords(p, len, state, 0, counterLo, counterHi, 0, 0);
}

/** Opens what `aeadSeal` made; `len` does not count the tag. 1: done. 0: the tag is wrong, nothing has changed. */
export function aeadOpen(p: usize, len: i32, state: usize, counterLo: u32, counterHi: u32): i32 {
  return aeadOpenWords(p, len, state, 0, counterLo, counterHi, 0, 0);
}

/** Seals with the 12-byte nonce at `nonce` and `aadLen` bytes of AAD at `aad`. Memory as `aeadSeal`. */
export function aeadSealNonce(p: usize, len: i32, state: usize, nonce: usize, aad: usize, aadLen: i32): void {
  aeadSealWords(p, len, state, load<u32>(nonce), load<u32>(nonce, 4), load<u32>(nonce, 8), aad, aadLen);
}

/** Opens what `aeadSealNonce` made. Memory and result as `aeadOpen`. */
export function aeadOpenNonce(p: usize, len: i32, state: usize, nonce: usize, aad: usize, aadLen: i32): i32 {
  return aeadOpenWords(p, len, state, load<u32>(nonce), load<u32>(nonce, 4), load<u32>(nonce, 8), aad, aadLen);
}

/** `aeadSealNonce` with the nonce as three little-endian words. */
export function aeadSealWords(
  p: usize, len: i32, state: usize, n0: u32, n1: u32, n2: u32, aad: usize, aadLen: i32,
): void {
  chacha20Nonce(state, 0, n0, n1, n2);
  stream(state);
  poly1305Init(STREAM);
  crypt(p, len, state);
  // The tag's place is free: zeros there fill up the last block of the ciphertext for Poly1305.
  const tag = p + (<usize>len);
  v128.store(tag, i64x2.splat(0));
  if (aadLen != 0) poly1305Padded(aad, aadLen);
  poly1305Blocks(p, (len + 15) >> 4, 1);
  poly1305Lengths(aadLen, len);
  poly1305Finish(tag);
}

/** `aeadOpenNonce` with the nonce as three little-endian words. */
export function aeadOpenWords(
  p: usize, len: i32, state: usize, n0: u32, n1: u32, n2: u32, aad: usize, aadLen: i32,
): i32 {
  chacha20Nonce(state, 0, n0, n1, n2);
  stream(state);
  poly1305Init(STREAM);
  const tag = p + (<usize>len);
  const received = v128.load(tag);
  v128.store(tag, i64x2.splat(0));
  if (aadLen != 0) poly1305Padded(aad, aadLen);
  poly1305Blocks(p, (len + 15) >> 4, 1);
  poly1305Lengths(aadLen, len);
  poly1305Finish(TAG);
  v128.store(tag, received);
  const differs = v128.any_true(v128.xor(received, v128.load(TAG)));
  // The right tag of a forged packet would let the sender forge it after all.
  v128.store(TAG, i64x2.splat(0));
  if (differs) {
    memory.fill(STREAM, 0, 272);
    return 0;
  }
  crypt(p, len, state);
  v128.store(tag, received);
  return 1;
}

// The next 256 bytes of key stream into STREAM.
function stream(state: usize): void {
  memory.fill(STREAM, 0, 256);
  chacha20Xor(state, STREAM, 1);
}

// XORs the message with the key stream: 192 bytes from the pass that made the Poly1305 key, whole passes in place, the
// rest by way of STREAM. Changes up to 15 bytes behind the message, which are the tag's place.
function crypt(p: usize, len: i32, state: usize): void {
  if (len <= FIRST) {
    xorStream(p, STREAM + 64, len);
  } else {
    xorStream(p, STREAM + 64, FIRST);
    p += FIRST;
    len -= FIRST;
    const passes = len >> 8;
    chacha20Xor(state, p, passes);
    const rest = len & 255;
    if (rest != 0) {
      stream(state);
      xorStream(p + ((<usize>passes) << 8), STREAM, rest);
    }
  }
  memory.fill(STREAM, 0, 272);
}
