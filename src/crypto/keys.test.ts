import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  constantTimeEqual,
  formatKey,
  hex,
  isZeroKey,
  type KeyKind,
  parseKey,
  randomBytes,
  unhex,
  wipe,
} from "./keys.ts";

const KINDS: KeyKind[] = ["mkey", "nodekey", "discokey", "privkey", "chalpub", "nlpub"];
const key32 = fc.uint8Array({ minLength: 32, maxLength: 32 });
const plain = (bytes: Uint8Array | null) => (bytes ? [...bytes] : null);

describe("Tailscale's text forms", () => {
  test("a node key as tailscaled prints it", () => {
    const bytes = Uint8Array.from({ length: 32 }, (_, i) => i + 0xe0);
    const text = "nodekey:e0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";
    expect(formatKey("nodekey", bytes)).toBe(text);
    expect(parseKey("nodekey", text)).toEqual(bytes);
    expect(parseKey("nodekey", `nodekey:${text.slice(8).toUpperCase()}`)).toEqual(bytes);
  });

  test.each(KINDS)("%s: what is formatted is parsed, and by no other kind", (kind) => {
    fc.assert(
      fc.property(key32, (bytes) => {
        const text = formatKey(kind, bytes);
        expect(text).toBe(`${kind}:${hex(bytes)}`);
        for (const other of KINDS) expect(plain(parseKey(other, text))).toEqual(other === kind ? plain(bytes) : null);
      }),
      { numRuns: 50 },
    );
  });

  test("the zero key has a text form like any other", () => {
    const zero = new Uint8Array(32);
    expect(parseKey("mkey", formatKey("mkey", zero))).toEqual(zero);
    expect(isZeroKey(zero)).toBe(true);
    for (let i = 0; i < 32; i++) {
      const one = new Uint8Array(32);
      one[i] = 0x80;
      expect(isZeroKey(one)).toBe(false);
    }
  });

  test("anything else is null", () => {
    const digits = "ab".repeat(32);
    for (const text of [
      "",
      ":",
      "nodekey:",
      digits,
      `nodekey${digits}`,
      `nodekey:${digits.slice(1)}`,
      `nodekey:${digits}0`,
      `nodekey:${digits}00`,
      `nodekey:${digits.slice(1)}g`,
      `nodekey:${digits.slice(1)} `,
      `nodekey: ${digits.slice(1)}`,
      `nodekey:${digits.slice(1)}\n`,
      `nodekey:${digits.slice(1)}\u0661`,
      `NODEKEY:${digits}`,
      ` nodekey:${digits}`,
    ])
      expect(parseKey("nodekey", text)).toBeNull();
    fc.assert(
      fc.property(fc.string({ maxLength: 80 }), (text) => parseKey("nodekey", text) === null),
      { numRuns: 300 },
    );
  });

  test("a key of another size is not formatted", () => {
    expect(() => formatKey("discokey", new Uint8Array(31))).toThrow("discokey has 31 bytes, it must have 32");
  });
});

test("hex: round trip, and null for what is not hex", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 100 }), (bytes) => {
      expect(plain(unhex(hex(bytes)))).toEqual(plain(bytes));
      expect(plain(unhex(hex(bytes).toUpperCase()))).toEqual(plain(bytes));
    }),
    { numRuns: 100 },
  );
  for (const bad of ["0", "0g", "0x00", " 00", "00\n", "é0"]) expect(unhex(bad)).toBeNull();
});

test("constantTimeEqual is equality", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 40 }), fc.nat(), fc.integer({ min: 0, max: 7 }), (bytes, at, bit) => {
      expect(constantTimeEqual(bytes, bytes.slice())).toBe(true);
      expect(constantTimeEqual(bytes, Uint8Array.of(...bytes, 0))).toBe(false);
      if (bytes.length === 0) return;
      const other = bytes.slice();
      other[at % bytes.length]! ^= 1 << bit;
      expect(constantTimeEqual(bytes, other)).toBe(false);
    }),
    { numRuns: 200 },
  );
});

test("wipe overwrites all it is given", () => {
  const [a, b] = [Uint8Array.of(1, 2, 3), new Uint8Array(40).fill(9)];
  wipe(a, b);
  expect([...a, ...b].every((byte) => byte === 0)).toBe(true);
});

test("randomBytes gives the length asked for, also beyond 64 KiB, and not the same twice", () => {
  for (const n of [0, 1, 32, 65536, 65537, 200_000]) expect(randomBytes(n).length).toBe(n);
  expect(hex(randomBytes(32))).not.toBe(hex(randomBytes(32)));
  expect(
    randomBytes(200_000)
      .subarray(131_072)
      .some((byte) => byte !== 0),
  ).toBe(true);
});
