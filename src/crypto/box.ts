// NaCl box ("Cryptography in NaCl"; disco messages and the DERP login): X25519, HSalsa20, XSalsa20-Poly1305.
// boxed = 16-byte tag || ciphertext. The nonce has 24 bytes.
import { checkLength, checkMessage, doorScratch, type Scratch } from "./scratch.ts";
import { x25519 } from "./x25519.ts";

export const BOX_OVERHEAD = 16;
const BOX_NONCE_SIZE = 24;
const KEY_SIZE = 32;

/** The key that both sides share, for `boxSeal` and `boxOpen`. Null: the public key has small order, refuse the peer. */
export function boxBeforeNM(privateKey: Uint8Array, publicKey: Uint8Array): Uint8Array | null {
  const secret = x25519(privateKey, publicKey);
  if (!secret) return null;
  const s = doorScratch();
  s.u8.set(secret, s.key);
  secret.fill(0);
  s.u8.fill(0, s.nonce, s.nonce + 16);
  s.asm.exports.hsalsa20(s.out, s.key, s.nonce);
  s.u8.fill(0, s.key, s.key + KEY_SIZE);
  return take(s, s.out, KEY_SIZE);
}

/** Seals `message` (at most 1 MiB). Throws a RangeError on a wrong size. */
export function boxSeal(shared: Uint8Array, nonce: Uint8Array, message: Uint8Array): Uint8Array {
  checkMessage("message", message.length);
  const s = place(shared, nonce);
  s.u8.set(message, s.message + BOX_OVERHEAD);
  s.asm.exports.boxSeal(s.message, message.length, s.key, s.nonce);
  s.u8.fill(0, s.key, s.key + KEY_SIZE);
  return take(s, s.message, message.length + BOX_OVERHEAD);
}

/** The message in what `boxSeal` made. Null: forged, damaged, or another key or nonce. */
export function boxOpen(shared: Uint8Array, nonce: Uint8Array, boxed: Uint8Array): Uint8Array | null {
  const length = boxed.length - BOX_OVERHEAD;
  checkMessage("message", length);
  const s = place(shared, nonce);
  if (length < 0) return null;
  s.u8.set(boxed, s.message);
  const ok = s.asm.exports.boxOpen(s.message, length, s.key, s.nonce);
  s.u8.fill(0, s.key, s.key + KEY_SIZE);
  return ok ? take(s, s.message + BOX_OVERHEAD, length) : null;
}

function place(shared: Uint8Array, nonce: Uint8Array): Scratch {
  checkLength("box key", shared, KEY_SIZE);
  checkLength("box nonce", nonce, BOX_NONCE_SIZE);
  const s = doorScratch();
  s.u8.set(shared, s.key);
  s.u8.set(nonce, s.nonce);
  return s;
}

function take(s: Scratch, at: number, length: number): Uint8Array {
  const result = new Uint8Array(length);
  result.set(s.u8.subarray(at, at + length));
  s.u8.fill(0, at, at + length);
  return result;
}
