import { expect, test } from "bun:test";
import { chacha20poly1305, xchacha20poly1305 } from "@noble/ciphers/chacha.js";
import { xsalsa20poly1305 } from "@noble/ciphers/salsa.js";
import { x25519 } from "@noble/curves/ed25519.js";
import { blake2s } from "@noble/hashes/blake2.js";
import { hmac } from "@noble/hashes/hmac.js";
import { AAD_SIZE, ANSWERS, HMAC_KEY_SIZE, MESSAGE_SIZE, selfTest } from "./selftest.ts";
import { Asm, type AsmExports } from "./wasm.ts";

const counting = (n: number) => Uint8Array.from({ length: n }, (_, i) => i);
const sevens = (n: number) => Uint8Array.from({ length: n }, (_, i) => i * 7);

test("the known answers are those of independent implementations", () => {
  const [key, message, aad] = [counting(32), sevens(MESSAGE_SIZE), sevens(AAD_SIZE)];
  expect(ANSWERS).toEqual({
    "ChaCha20-Poly1305": chacha20poly1305(key, counting(12), aad).encrypt(message).slice(-16).toHex(),
    "XChaCha20-Poly1305": xchacha20poly1305(key, counting(24), aad).encrypt(message).slice(-16).toHex(),
    "XSalsa20-Poly1305": xsalsa20poly1305(key, counting(24)).encrypt(message).slice(0, 16).toHex(),
    BLAKE2s: blake2s(message, { key }).toHex(),
    "HMAC-BLAKE2s": hmac(blake2s, counting(HMAC_KEY_SIZE), message).toHex(),
    X25519: x25519.getSharedSecret(key, x25519.getPublicKey(key)).toHex(),
  });
});

test("a new instance passes and its memory is zero again", () => {
  const asm = Asm.create(64);
  const base = asm.exports.heapBase();
  expect(asm.u8.subarray(base).every((byte) => byte === 0)).toBe(true);
  selfTest(asm);
});

/** An instance in which one function is broken. */
function broken(name: keyof AsmExports, wrap: (right: (...args: number[]) => number) => (...args: number[]) => number) {
  const asm = Asm.create(64);
  const right = asm.exports[name] as (...args: number[]) => number;
  return { exports: { ...asm.exports, [name]: wrap(right) }, u8: asm.u8 } as unknown as Asm;
}

test("each way to be wrong is found and named", () => {
  const nothing = () => () => 0;
  const always =
    (right: (...args: number[]) => number) =>
    (...args: number[]) => {
      right(...args);
      return 1;
    };
  expect(() => selfTest(broken("aeadSealNonce", nothing))).toThrow("self-test of ChaCha20-Poly1305 failed");
  expect(() => selfTest(broken("aeadOpenNonce", nothing))).toThrow("ChaCha20-Poly1305 failed (refuses a right tag)");
  expect(() => selfTest(broken("aeadOpenNonce", always))).toThrow("ChaCha20-Poly1305 failed (accepts a wrong tag)");
  expect(() => selfTest(broken("xaeadSeal", nothing))).toThrow("self-test of XChaCha20-Poly1305 failed");
  expect(() => selfTest(broken("boxSeal", nothing))).toThrow("self-test of XSalsa20-Poly1305 failed");
  expect(() => selfTest(broken("boxOpen", always))).toThrow("XSalsa20-Poly1305 failed (accepts a wrong tag)");
  expect(() => selfTest(broken("blake2s", nothing))).toThrow("self-test of BLAKE2s failed");
  expect(() => selfTest(broken("hmacBlake2s", nothing))).toThrow("self-test of HMAC-BLAKE2s failed");
  expect(() => selfTest(broken("x25519", nothing))).toThrow("self-test of X25519 failed (finds a zero secret)");
  expect(() => selfTest(broken("x25519Base", nothing))).toThrow("self-test of X25519 failed");
});
