import { describe, expect, test } from "bun:test";
import { blake2s as noble } from "@noble/hashes/blake2.js";
import { hmac as nobleHmac } from "@noble/hashes/hmac.js";
import { blake2s, hkdfBlake2s, hmacBlake2s } from "./blake2s.ts";
import { MAX_MESSAGE } from "./scratch.ts";
import { bytes, Seeded, vectors } from "./test-support.ts";
import { Asm, BLAKE2S_STATE_SIZE } from "./wasm.ts";

const ascii = (text: string) => new TextEncoder().encode(text);

describe("RFC 7693", () => {
  test("appendix B: abc", () => {
    expect(blake2s(ascii("abc")).toHex()).toBe("508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982");
  });

  test("appendix E: the self-test over output and input lengths, keyed and not", () => {
    const sequence = (length: number, seed: number) => {
      let a = Math.imul(0xdead4bad, seed) >>> 0;
      let b = 1;
      return Uint8Array.from({ length }, () => {
        const t = (a + b) >>> 0;
        [a, b] = [b, t];
        return t >>> 24;
      });
    };
    const digests: Uint8Array[] = [];
    for (const length of [16, 20, 28, 32])
      for (const n of [0, 3, 64, 65, 255, 1024]) {
        const data = sequence(n, n);
        digests.push(blake2s(data, { length }), blake2s(data, { length, key: sequence(length, length) }));
      }
    expect(blake2s(Buffer.concat(digests)).toHex()).toBe(
      "6a411f08ce25adcdfb02aba641451cec53c598b24f4fc787fbdc88797f4c1dfe",
    );
  });
});

test("every case of blake2s.json", () => {
  const cases = vectors<[number, string, string, string][]>("blake2s.json");
  expect(cases.length).toBe(257);
  const counting = (n: number) => Uint8Array.from({ length: n }, (_, i) => i);
  for (const [n, plain, keyed32, keyed16] of cases) {
    const data = counting(n);
    expect(blake2s(data).toHex()).toBe(plain);
    expect(blake2s(data, { key: counting(32) }).toHex()).toBe(keyed32);
    expect(blake2s(data, { key: counting(16), length: 16 }).toHex()).toBe(keyed16);
  }
});

test("random lengths, keys and digest sizes, against an independent implementation", () => {
  const random = new Seeded(9);
  for (let i = 0; i < 400; i++) {
    const data = random.bytes(i < 350 ? i : random.below(65536));
    const key = random.bytes(i % 33);
    const length = 1 + (i % 32);
    // The oracle wants an empty key to be left out.
    const expected = noble(data, key.length ? { key, dkLen: length } : { dkLen: length });
    expect(blake2s(data, { key, length })).toEqual(expected);
  }
});

test("HMAC with keys of every length around the block, in parts and as a whole", () => {
  const random = new Seeded(10);
  for (let n = 0; n <= 130; n++) {
    const [key, data] = [random.bytes(n), random.bytes(random.below(300))];
    const expected = nobleHmac(noble, key, data);
    const cut = random.below(data.length + 1);
    expect(hmacBlake2s(key, data)).toEqual(expected);
    expect(hmacBlake2s(key, data.subarray(0, cut), data.subarray(cut))).toEqual(expected);
  }
});

test("key derivation: each output is the HMAC that WireGuard's KDF defines", () => {
  const [salt, ikm] = [new Seeded(11).bytes(32), new Seeded(12).bytes(32)];
  const t0 = nobleHmac(noble, salt, ikm);
  const t1 = nobleHmac(noble, t0, Uint8Array.of(1));
  const t2 = nobleHmac(noble, t0, Uint8Array.of(...t1, 2));
  const t3 = nobleHmac(noble, t0, Uint8Array.of(...t2, 3));
  expect(hkdfBlake2s(salt, ikm, 1)).toEqual([t1]);
  expect(hkdfBlake2s(salt, ikm, 2)).toEqual([t1, t2]);
  expect(hkdfBlake2s(salt, ikm, 3)).toEqual([t1, t2, t3]);
  expect(hkdfBlake2s(salt, new Uint8Array(0), 2)[0]).toEqual(
    nobleHmac(noble, nobleHmac(noble, salt, new Uint8Array(0)), Uint8Array.of(1)),
  );
});

test("WireGuard's initial chaining key and hash", () => {
  const chainingKey = blake2s(ascii("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"));
  expect(chainingKey.toHex()).toBe("60e26daef327efc02ec335e2a025d2d016eb4206f87277f52d38d1988b78cd36");
  expect(blake2s(Buffer.concat([chainingKey, ascii("WireGuard v1 zx2c4 Jason@zx2c4.com")])).toHex()).toBe(
    "2211b361081ac566691243db458ad5322d9c6c662293e8b70ee19c65ba079ef3",
  );
});

test("a message that comes in pieces of any size, from any address", () => {
  const asm = Asm.create(64);
  const [state, out, data] = [asm.alloc(BLAKE2S_STATE_SIZE), asm.alloc(32), asm.alloc(4096)];
  const random = new Seeded(13);
  for (let round = 0; round < 64; round++) {
    const message = random.bytes(random.below(1000));
    const from = data + round;
    asm.u8.set(message, from);
    asm.exports.blake2sInit(state, 32, 0, 0);
    for (let at = 0; at < message.length; ) {
      const n = Math.min(random.below(150), message.length - at);
      asm.exports.blake2sUpdate(state, from + at, n);
      at += n;
    }
    asm.exports.blake2sFinal(state, out);
    expect(asm.u8.slice(out, out + 32)).toEqual(noble(message));
  }
});

test("data beyond the scratch is hashed in pieces", () => {
  const data = new Uint8Array(MAX_MESSAGE + 77).fill(3);
  expect(blake2s(data, { key: Uint8Array.of(1) })).toEqual(noble(data, { key: Uint8Array.of(1) }));
});

test("sizes that BLAKE2s does not have say so", () => {
  expect(() => blake2s(ascii(""), { length: 0 })).toThrow("BLAKE2s digest of 0 bytes");
  expect(() => blake2s(ascii(""), { length: 33 })).toThrow("BLAKE2s digest of 33 bytes");
  expect(() => blake2s(ascii(""), { length: 1.5 })).toThrow("BLAKE2s digest of 1.5 bytes");
  expect(() => blake2s(ascii(""), { key: bytes("00".repeat(33)) })).toThrow("BLAKE2s key has 33 bytes");
  expect(() => hmacBlake2s(ascii("k"), new Uint8Array(MAX_MESSAGE), ascii("x"))).toThrow("HMAC message has 1048577");
});

test("keys do not stay in the instance's memory", async () => {
  const { doorScratch } = await import("./scratch.ts");
  const key = new Seeded(14).bytes(32);
  blake2s(ascii("message"), { key });
  hmacBlake2s(key, ascii("message"));
  const memory = Buffer.from(doorScratch().u8.slice());
  expect(memory.includes(key.subarray(4, 12))).toBe(false);
  expect(memory.includes(key.map((byte) => byte ^ 0x36).subarray(4, 12))).toBe(false);
  expect(memory.includes(key.map((byte) => byte ^ 0x5c).subarray(4, 12))).toBe(false);
});
