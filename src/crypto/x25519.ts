// X25519 (RFC 7748). Keys are 32 bytes; private keys are clamped when used, so any 32 random bytes are one.
import { checkLength, doorScratch } from "./scratch.ts";

export const KEY_SIZE = 32;

/**
 * The shared secret. Null: it is all zeros, which a public key of small order forces; the peer must be refused
 * (RFC 7748 section 6.1). Throws a RangeError when a key has not 32 bytes.
 */
export function x25519(privateKey: Uint8Array, publicKey: Uint8Array): Uint8Array | null {
  checkLength("X25519 private key", privateKey, KEY_SIZE);
  checkLength("X25519 public key", publicKey, KEY_SIZE);
  const s = doorScratch();
  const { asm, u8 } = s;
  u8.set(privateKey, s.key);
  u8.set(publicKey, s.nonce);
  const ok = asm.exports.x25519(s.out, s.key, s.nonce);
  const result = ok ? copyOut(u8, s.out) : null;
  u8.fill(0, s.key, s.key + KEY_SIZE);
  return result;
}

/** The public key of a private key. */
export function x25519Public(privateKey: Uint8Array): Uint8Array {
  checkLength("X25519 private key", privateKey, KEY_SIZE);
  const s = doorScratch();
  const { asm, u8 } = s;
  u8.set(privateKey, s.key);
  asm.exports.x25519Base(s.out, s.key);
  u8.fill(0, s.key, s.key + KEY_SIZE);
  return copyOut(u8, s.out);
}

/** A new private key, clamped, from a source of random bytes (`randomBytes` of keys.ts). */
export function generatePrivateKey(random: (n: number) => Uint8Array): Uint8Array {
  const key = random(KEY_SIZE).slice();
  checkLength("random source: X25519 private key", key, KEY_SIZE);
  key[0]! &= 248;
  key[31] = (key[31]! & 127) | 64;
  return key;
}

function copyOut(u8: Uint8Array, at: number): Uint8Array {
  const result = new Uint8Array(KEY_SIZE);
  result.set(u8.subarray(at, at + KEY_SIZE));
  u8.fill(0, at, at + KEY_SIZE);
  return result;
}
