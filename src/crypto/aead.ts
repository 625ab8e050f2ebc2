// ChaCha20-Poly1305 (RFC 8439) and XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha): sealed = ciphertext || 16-byte tag.
// For handshakes and control traffic; packets are sealed in place by asm/aead.ts.
import { checkLength, checkMessage, doorScratch, type Scratch } from "./scratch.ts";
import { AEAD_STATE_SIZE } from "./wasm.ts";

export const KEY_SIZE = 32;
export const TAG_SIZE = 16;
const NONCE_SIZE = 12;
const XNONCE_SIZE = 24;

const NO_AAD = new Uint8Array(0);

/**
 * Seals `plaintext` (at most 1 MiB) under a 32-byte key and a 12-byte nonce that was never used with it before.
 * Throws a RangeError on a wrong size.
 */
export function chacha20poly1305Seal(
  key: Uint8Array,
  nonce: Uint8Array,
  plaintext: Uint8Array,
  aad: Uint8Array = NO_AAD,
): Uint8Array {
  const s = place(key, nonce, NONCE_SIZE, plaintext, plaintext.length, aad);
  s.asm.exports.aeadInit(s.state, s.key);
  s.asm.exports.aeadSealNonce(s.message, plaintext.length, s.state, s.nonce, s.aad, aad.length);
  return take(s, plaintext.length + TAG_SIZE);
}

/** As `chacha20poly1305Seal`, into `out` from `at` on. Returns how many bytes that are. */
export function chacha20poly1305SealInto(
  key: Uint8Array,
  nonce: Uint8Array,
  plaintext: Uint8Array,
  out: Uint8Array,
  at: number,
): number {
  const length = plaintext.length + TAG_SIZE;
  if (at + length > out.length) throw new RangeError(`${out.length} bytes have no room for ${length} from ${at} on`);
  const s = place(key, nonce, NONCE_SIZE, plaintext, plaintext.length, NO_AAD);
  s.asm.exports.aeadInit(s.state, s.key);
  s.asm.exports.aeadSealNonce(s.message, plaintext.length, s.state, s.nonce, s.aad, 0);
  out.set(s.u8.subarray(s.message, s.message + length), at);
  s.u8.fill(0, s.message, s.message + length);
  wipeKey(s);
  return length;
}

/** Opens what `chacha20poly1305Seal` made. Null: forged, damaged, or another key, nonce or AAD. */
export function chacha20poly1305Open(
  key: Uint8Array,
  nonce: Uint8Array,
  sealed: Uint8Array,
  aad: Uint8Array = NO_AAD,
): Uint8Array | null {
  const length = sealed.length - TAG_SIZE;
  const s = place(key, nonce, NONCE_SIZE, sealed, length, aad);
  if (length < 0) return null;
  s.asm.exports.aeadInit(s.state, s.key);
  const ok = s.asm.exports.aeadOpenNonce(s.message, length, s.state, s.nonce, s.aad, aad.length);
  return ok ? take(s, length) : refuse(s);
}

/** As `chacha20poly1305Seal`, with a 24-byte nonce: long enough to be random. */
export function xchacha20poly1305Seal(
  key: Uint8Array,
  nonce: Uint8Array,
  plaintext: Uint8Array,
  aad: Uint8Array = NO_AAD,
): Uint8Array {
  const s = place(key, nonce, XNONCE_SIZE, plaintext, plaintext.length, aad);
  s.asm.exports.xaeadSeal(s.message, plaintext.length, s.key, s.nonce, s.aad, aad.length);
  return take(s, plaintext.length + TAG_SIZE);
}

/** Opens what `xchacha20poly1305Seal` made. Null: forged, damaged, or another key, nonce or AAD. */
export function xchacha20poly1305Open(
  key: Uint8Array,
  nonce: Uint8Array,
  sealed: Uint8Array,
  aad: Uint8Array = NO_AAD,
): Uint8Array | null {
  const length = sealed.length - TAG_SIZE;
  const s = place(key, nonce, XNONCE_SIZE, sealed, length, aad);
  if (length < 0) return null;
  const ok = s.asm.exports.xaeadOpen(s.message, length, s.key, s.nonce, s.aad, aad.length);
  return ok ? take(s, length) : refuse(s);
}

function place(
  key: Uint8Array,
  nonce: Uint8Array,
  nonceSize: number,
  message: Uint8Array,
  length: number,
  aad: Uint8Array,
): Scratch {
  checkLength("AEAD key", key, KEY_SIZE);
  checkLength("AEAD nonce", nonce, nonceSize);
  checkMessage("message", length);
  checkMessage("AAD", aad.length);
  const s = doorScratch();
  s.u8.set(key, s.key);
  s.u8.set(nonce, s.nonce);
  s.u8.set(message, s.message);
  s.u8.set(aad, s.aad);
  return s;
}

// The result, copied out; key and message do not stay behind.
function take(s: Scratch, length: number): Uint8Array {
  const result = new Uint8Array(length);
  result.set(s.u8.subarray(s.message, s.message + length));
  s.u8.fill(0, s.message, s.message + length);
  wipeKey(s);
  return result;
}

function refuse(s: Scratch): null {
  wipeKey(s);
  return null;
}

function wipeKey(s: Scratch): void {
  s.u8.fill(0, s.key, s.key + KEY_SIZE);
  s.u8.fill(0, s.state, s.state + AEAD_STATE_SIZE);
}
