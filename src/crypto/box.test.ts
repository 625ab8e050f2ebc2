import { describe, expect, test } from "bun:test";
import { hsalsa, xsalsa20poly1305 as noble } from "@noble/ciphers/salsa.js";
import { BOX_OVERHEAD, boxBeforeNM, boxOpen, boxSeal } from "./box.ts";
import { MAX_MESSAGE } from "./scratch.ts";
import { bytes, Seeded } from "./test-support.ts";
import { Asm } from "./wasm.ts";
import { x25519Public } from "./x25519.ts";

const repeated = (byte: number) => new Uint8Array(32).fill(byte);
const counting = (n: number) => Uint8Array.from({ length: n }, (_, i) => i);
const ascii = (text: string) => new TextEncoder().encode(text);

describe("published boxes", () => {
  test("Cryptography in NaCl, section 10", () => {
    const shared = boxBeforeNM(
      bytes("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"),
      bytes("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"),
    )!;
    expect(shared.toHex()).toBe("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389");
    const nonce = bytes("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37");
    const message = bytes(
      "be075fc53c81f2d5cf141316ebeb0c7b5228c52a4c62cbd44b66849b64244ffce5ecbaaf33bd751a1ac728d45e6c61296cdc3c01233561f41db66cce314adb310e3be8250c46f06dceea3a7fa1348057e2f6556ad6b1318a024a838f21af1fde048977eb48f59ffd4924ca1c60902e52f0a089bc76897040e082f937763848645e0705",
    );
    const boxed = boxSeal(shared, nonce, message);
    expect(boxed.toHex()).toBe(
      "f3ffc7703f9400e52a7dfb4b3d3305d98e993b9f48681273c29650ba32fc76ce48332ea7164d96a4476fb8c531a1186ac0dfc17c98dce87b4da7f011ec48c97271d2c20f9b928fe2270d6fb863d51738b48eeee314a7cc8ab932164548e526ae90224368517acfeabd6bb3732bc0e9da99832b61ca01b6de56244a9e88d5f9b37973f622a43d14a6599b1f654cb45a74e355a5",
    );
    expect(boxOpen(shared, nonce, boxed)).toEqual(message);
  });

  test("a disco ping (specification of the data path, 12.2)", () => {
    const [sender, recipient] = [repeated(5), repeated(6)];
    expect(x25519Public(sender).toHex()).toBe("50a61409b1ddd0325e9b16b700e719e9772c07000b1bd7786e907c653d20495d");
    expect(x25519Public(recipient).toHex()).toBe("f5b2d6e60f9477e310c2982daaa6c9136c108a1777c5947e448fa37d68174557");
    const shared = boxBeforeNM(sender, x25519Public(recipient))!;
    expect(boxBeforeNM(recipient, x25519Public(sender))).toEqual(shared);
    const ping = bytes("0100000102030405060708090a0ba4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209");
    expect(boxSeal(shared, counting(24), ping).toHex()).toBe(
      "cf985ce2f97c0cd05475eae48f06b6d9f36bfa24284fdb3110d922917a6ab79669823ded91e0d7e625c45637873b2e19aac9d3ca409c7ab621341c012d85",
    );
  });

  test("a DERP login (specification of DERP, 22)", () => {
    const [client, server] = [repeated(1), repeated(7)];
    const shared = boxBeforeNM(client, x25519Public(server))!;
    expect(boxSeal(shared, counting(24), ascii('{"version":2,"CanAckPings":true}')).toHex()).toBe(
      "f6f43a092d02dcf21b8c91178bc634f2280a6ddbeb106fc7bf2b4614946171659d54bc7d992f3fcb7378ae22f749c2d0",
    );
    const info = boxOpen(shared, counting(24), bytes("a86f96d32d68b47c2484e8c240413d6a280a6ddbeb106fc7bf2b4614c5"));
    expect(new TextDecoder().decode(info!)).toBe('{"version":2}');
  });
});

test("every length up to 600 and some large ones, against an independent implementation", () => {
  const random = new Seeded(15);
  const lengths = Array.from({ length: 601 }, (_, n) => n);
  for (let i = 0; i < 20; i++) lengths.push(random.below(65536));
  for (const n of lengths) {
    const [key, nonce, message] = [random.bytes(32), random.bytes(24), random.bytes(n)];
    const boxed = noble(key, nonce).encrypt(message);
    expect(Buffer.from(boxed).equals(boxSeal(key, nonce, message))).toBe(true);
    expect(Buffer.from(message).equals(boxOpen(key, nonce, boxed)!)).toBe(true);
  }
});

test("in place at every alignment, nothing outside changes; a refused box stays as it was", () => {
  const asm = Asm.create(64);
  const [key, nonce, buffer] = [asm.alloc(32), asm.alloc(24), asm.alloc(2048)];
  const random = new Seeded(16);
  asm.u8.set(random.bytes(56), key);
  const oracle = () => noble(asm.u8.slice(key, key + 32), asm.u8.slice(nonce, nonce + 24));
  for (let i = 0; i < 64; i++) {
    const message = random.bytes([0, 1, 16, 46, 223, 224, 225, 480, 1000][i % 9]!);
    const p = buffer + 64 + i;
    const size = BOX_OVERHEAD + message.length;
    asm.u8.fill(0xa5, buffer, buffer + 2048);
    asm.u8.set(message, p + BOX_OVERHEAD);
    asm.exports.boxSeal(p, message.length, key, nonce);
    const expected = new Uint8Array(2048).fill(0xa5);
    expected.set(oracle().encrypt(message), p - buffer);
    expect(asm.u8.slice(buffer, buffer + 2048)).toEqual(expected);
    const flipped = p + random.below(size);
    asm.u8[flipped]! ^= 4;
    expected[flipped - buffer]! ^= 4;
    expect(asm.exports.boxOpen(p, message.length, key, nonce)).toBe(0);
    expect(asm.u8.slice(buffer, buffer + 2048)).toEqual(expected);
    asm.u8[flipped]! ^= 4;
    expect(asm.exports.boxOpen(p, message.length, key, nonce)).toBe(1);
    expect(asm.u8.slice(p + BOX_OVERHEAD, p + size)).toEqual(message);
    expect(asm.u8.slice(p + size, buffer + 2048)).toEqual(expected.slice(p + size - buffer));
  }
});

test("HSalsa20, and the key of a box, against an independent implementation", () => {
  const asm = Asm.create(64);
  const [key, input, out] = [asm.alloc(32), asm.alloc(16), asm.alloc(32)];
  const random = new Seeded(17);
  const words = (b: Uint8Array) => new Uint32Array(b.slice().buffer);
  const sigma = words(ascii("expand 32-byte k"));
  for (let i = 0; i < 50; i++) {
    const [k, n] = [random.bytes(32), random.bytes(16)];
    asm.u8.set(k, key);
    asm.u8.set(n, input);
    const expected = new Uint32Array(8);
    hsalsa(sigma, words(k), words(n), expected);
    asm.exports.hsalsa20(out, key, input);
    expect(asm.u8.slice(out, out + 32)).toEqual(new Uint8Array(expected.buffer));
  }
});

test("a flipped bit anywhere in a box is refused", () => {
  const random = new Seeded(18);
  for (const n of [0, 1, 15, 16, 17, 46, 224, 225, 300]) {
    const [key, nonce, message] = [random.bytes(32), random.bytes(24), random.bytes(n)];
    const boxed = boxSeal(key, nonce, message);
    for (let i = 0; i < boxed.length; i++) {
      const bit = 1 << random.below(8);
      boxed[i]! ^= bit;
      if (boxOpen(key, nonce, boxed)) throw new Error(`accepted: length ${n}, byte ${i}`);
      boxed[i]! ^= bit;
    }
    expect(boxOpen(key, nonce, boxed)).toEqual(message);
  }
});

test("bad input: short boxes and small-order keys are null, wrong sizes say so", () => {
  for (let n = 0; n < BOX_OVERHEAD; n++) expect(boxOpen(repeated(1), counting(24), new Uint8Array(n))).toBeNull();
  expect(boxBeforeNM(repeated(1), new Uint8Array(32))).toBeNull();
  expect(() => boxSeal(repeated(1).subarray(1), counting(24), ascii("x"))).toThrow("box key has 31 bytes");
  expect(() => boxOpen(repeated(1), counting(12), new Uint8Array(20))).toThrow("box nonce has 12 bytes");
  expect(() => boxSeal(repeated(1), counting(24), new Uint8Array(MAX_MESSAGE + 1))).toThrow("at most 1048576");
});
