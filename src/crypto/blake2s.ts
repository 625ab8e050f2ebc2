// BLAKE2s (RFC 7693), HMAC (RFC 2104) over it, and the key derivation of Noise ("HKDF") and WireGuard (KDF1..KDF3):
// t0 = HMAC(salt, ikm); t1 = HMAC(t0, 01); t2 = HMAC(t0, t1 || 02); t3 = HMAC(t0, t2 || 03).
import { checkMessage, doorScratch, MAX_MESSAGE } from "./scratch.ts";

const HASH_SIZE = 32;
const BLOCK_SIZE = 64;

/** Keyed with up to 32 bytes (empty is unkeyed), 1 to 32 bytes out (default 32). Throws a RangeError outside of that. */
export interface Blake2sOptions {
  key?: Uint8Array;
  length?: number;
}

/** The digest of `data`, which may be of any length. */
export function blake2s(data: Uint8Array, { key, length = HASH_SIZE }: Blake2sOptions = {}): Uint8Array {
  if (!Number.isInteger(length) || length < 1 || length > HASH_SIZE)
    throw new RangeError(`BLAKE2s digest of ${length} bytes: 1 to ${HASH_SIZE} are possible`);
  const keyLength = key?.length ?? 0;
  if (keyLength > HASH_SIZE)
    throw new RangeError(`BLAKE2s key has ${keyLength} bytes, at most ${HASH_SIZE} are possible`);
  const s = doorScratch();
  const { asm, u8 } = s;
  if (key) u8.set(key, s.key);
  if (data.length <= MAX_MESSAGE) {
    u8.set(data, s.message);
    asm.exports.blake2s(s.out, length, s.key, keyLength, s.message, data.length);
  } else {
    asm.exports.blake2sInit(s.state, length, s.key, keyLength);
    for (let at = 0; at < data.length; at += MAX_MESSAGE) {
      const part = data.subarray(at, at + MAX_MESSAGE);
      u8.set(part, s.message);
      asm.exports.blake2sUpdate(s.state, s.message, part.length);
    }
    asm.exports.blake2sFinal(s.state, s.out);
  }
  if (key) u8.fill(0, s.key, s.key + HASH_SIZE);
  return u8.slice(s.out, s.out + length);
}

/** HMAC-BLAKE2s-256 of the concatenation of `parts` (1 MiB at most together): 32 bytes. */
export function hmacBlake2s(key: Uint8Array, ...parts: Uint8Array[]): Uint8Array {
  const s = doorScratch();
  const { asm, u8 } = s;
  const shortKey = key.length > BLOCK_SIZE ? blake2s(key) : key;
  checkMessage(
    "HMAC message",
    parts.reduce((sum, part) => sum + part.length, 0),
  );
  u8.set(shortKey, s.key);
  let end = s.message;
  for (const part of parts) {
    u8.set(part, end);
    end += part.length;
  }
  asm.exports.hmacBlake2s(s.out, s.key, shortKey.length, s.message, end - s.message);
  u8.fill(0, s.key, s.key + BLOCK_SIZE);
  u8.fill(0, s.message, end);
  const result = u8.slice(s.out, s.out + HASH_SIZE);
  u8.fill(0, s.out, s.out + HASH_SIZE);
  return result;
}

/** The first `n` outputs, 32 bytes each, of the key derivation. */
export function hkdfBlake2s(salt: Uint8Array, ikm: Uint8Array, n: 1 | 2 | 3): Uint8Array[] {
  checkMessage("key material", ikm.length);
  const shortSalt = salt.length > BLOCK_SIZE ? blake2s(salt) : salt;
  const s = doorScratch();
  const { asm, u8 } = s;
  u8.set(shortSalt, s.key);
  u8.set(ikm, s.message);
  asm.exports.hkdfBlake2s(s.aad, n, s.key, shortSalt.length, s.message, ikm.length);
  const outputs: Uint8Array[] = [];
  for (let i = 0; i < n; i++) outputs.push(u8.slice(s.aad + i * HASH_SIZE, s.aad + (i + 1) * HASH_SIZE));
  u8.fill(0, s.key, s.key + BLOCK_SIZE);
  u8.fill(0, s.message, s.message + ikm.length);
  u8.fill(0, s.aad, s.aad + n * HASH_SIZE);
  return outputs;
}
