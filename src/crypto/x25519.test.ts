import { describe, expect, test } from "bun:test";
import { x25519 as noble } from "@noble/curves/ed25519.js";
import { bytes, Seeded, vectors } from "./test-support.ts";
import { Asm } from "./wasm.ts";
import { generatePrivateKey, x25519, x25519Public } from "./x25519.ts";

const ALICE = bytes("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a");
const ALICE_PUBLIC = bytes("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a");
const BOB = bytes("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
const BOB_PUBLIC = bytes("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");

describe("RFC 7748", () => {
  test.each([
    [
      "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
      "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
      "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ],
    [
      "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
      "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
      "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ],
  ])("5.2: scalar %s", (scalar, point, result) => {
    expect(x25519(bytes(scalar), bytes(point))!.toHex()).toBe(result);
  });

  test("5.2: 1 and 1,000 iterations", () => {
    let k = bytes(`09${"00".repeat(31)}`);
    let u = k;
    for (let i = 1; i <= 1000; i++) {
      [k, u] = [x25519(k, u)!, k];
      if (i === 1) expect(k.toHex()).toBe("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079");
    }
    expect(k.toHex()).toBe("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51");
  });

  test("6.1: both sides find the same secret", () => {
    expect(x25519Public(ALICE)).toEqual(ALICE_PUBLIC);
    expect(x25519Public(BOB)).toEqual(BOB_PUBLIC);
    const secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";
    expect(x25519(ALICE, BOB_PUBLIC)!.toHex()).toBe(secret);
    expect(x25519(BOB, ALICE_PUBLIC)!.toHex()).toBe(secret);
  });
});

interface WycheproofX25519 {
  numberOfTests: number;
  testGroups: {
    tests: { tcId: number; public: string; private: string; shared: string; result: string; flags: string[] }[];
  }[];
}

test("every case of wycheproof-x25519.json: the secret, or null where it is all zeros", () => {
  const { numberOfTests, testGroups } = vectors<WycheproofX25519>("wycheproof-x25519.json");
  const zero = "00".repeat(32);
  let [seen, refused] = [0, 0];
  for (const group of testGroups)
    for (const c of group.tests) {
      seen++;
      if (c.shared === zero) refused++;
      const secret = x25519(bytes(c.private), bytes(c.public))?.toHex() ?? null;
      expect({ tcId: c.tcId, secret }).toEqual({ tcId: c.tcId, secret: c.shared === zero ? null : c.shared });
    }
  expect(seen).toBe(numberOfTests);
  expect(refused).toBeGreaterThan(20);
});

test("random and extreme keys, against an independent implementation", () => {
  const random = new Seeded(7);
  const extreme = (first: string, rest: string, last: string) => bytes(first + rest.repeat(30) + last);
  const points = [
    extreme("ec", "ff", "7f"),
    extreme("ee", "ff", "7f"),
    extreme("ff", "ff", "7f"),
    extreme("ff", "ff", "ff"),
    extreme("09", "00", "80"),
    extreme("02", "00", "00"),
  ];
  for (let i = 0; i < 60; i++) {
    const key = random.bytes(32);
    const point = points[i] ?? random.bytes(32);
    let expected: Uint8Array | null = null;
    try {
      expected = noble.getSharedSecret(key, point);
    } catch {
      // The oracle throws on small order.
    }
    expect(x25519(key, point)).toEqual(expected);
    expect(x25519Public(key)).toEqual(noble.getPublicKey(key));
  }
});

test("points of small order give null, whatever the private key", () => {
  const random = new Seeded(8);
  for (const point of [
    "00".repeat(32),
    `01${"00".repeat(31)}`,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    `ec${"ff".repeat(30)}7f`,
    `ed${"ff".repeat(30)}7f`,
    `ee${"ff".repeat(30)}7f`,
  ])
    expect(x25519(random.bytes(32), bytes(point))).toBeNull();
});

test("the result may overwrite an input, and no secret stays in the instance's memory", () => {
  const asm = Asm.create(64);
  const [key, point] = [asm.alloc(32), asm.alloc(32)];
  for (const out of [key, point]) {
    asm.u8.set(ALICE, key);
    asm.u8.set(BOB_PUBLIC, point);
    expect(asm.exports.x25519(out, key, point)).toBe(1);
    expect(asm.u8.slice(out, out + 32).toHex()).toBe(x25519(ALICE, BOB_PUBLIC)!.toHex());
  }
  asm.u8.fill(0, key, point + 32);
  const memory = Buffer.from(asm.u8.slice());
  expect(memory.includes(ALICE.subarray(8, 16))).toBe(false);
  expect(memory.includes(x25519(ALICE, BOB_PUBLIC)!.subarray(0, 8))).toBe(false);
});

test("new private keys are clamped and come from the given source", () => {
  const source = (n: number) => new Uint8Array(n).fill(0xff);
  expect(generatePrivateKey(source).toHex()).toBe(`f8${"ff".repeat(30)}7f`);
  expect(() => generatePrivateKey(() => new Uint8Array(16))).toThrow("16 bytes");
});

test("keys of another size say so", () => {
  expect(() => x25519(new Uint8Array(31), BOB_PUBLIC)).toThrow("X25519 private key has 31 bytes, it must have 32");
  expect(() => x25519(ALICE, new Uint8Array(33))).toThrow("X25519 public key has 33 bytes, it must have 32");
  expect(() => x25519Public(new Uint8Array(0))).toThrow("has 0 bytes");
});
