import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { unhex } from "../crypto/keys.ts";
import {
  buildCookieReply,
  buildInitiation,
  buildResponse,
  COOKIE_REPLY_SIZE,
  INITIATION_SIZE,
  mac1Of,
  mac2Of,
  messageType,
  paddedLength,
  parseCookieReply,
  parseInitiation,
  parseResponse,
  RESPONSE_SIZE,
  tai64n,
} from "./wireguard.ts";

const bytes = (n: number) => fc.uint8Array({ minLength: n, maxLength: n });
const index = fc.integer({ min: 0, max: 0xffff_ffff });

describe("what was built is parsed back", () => {
  test("initiation", () => {
    fc.assert(
      fc.property(index, bytes(32), bytes(48), bytes(28), (sender, ephemeral, encryptedStatic, encryptedTimestamp) => {
        const message = { sender, ephemeral, encryptedStatic, encryptedTimestamp };
        const built = buildInitiation(message);
        expect(built.length).toBe(148);
        expect(built.slice(0, 4)).toEqual(Uint8Array.of(1, 0, 0, 0));
        expect(built.slice(116)).toEqual(new Uint8Array(32));
        expect(parseInitiation(built)).toEqual(message);
      }),
    );
  });

  test("response", () => {
    fc.assert(
      fc.property(index, index, bytes(32), bytes(16), (sender, receiver, ephemeral, encryptedNothing) => {
        const message = { sender, receiver, ephemeral, encryptedNothing };
        const built = buildResponse(message);
        expect(built.length).toBe(92);
        expect(parseResponse(built)).toEqual(message);
      }),
    );
  });

  test("cookie reply", () => {
    fc.assert(
      fc.property(index, bytes(24), bytes(32), (receiver, nonce, encryptedCookie) => {
        const message = { receiver, nonce, encryptedCookie };
        const built = buildCookieReply(message);
        expect(built.length).toBe(64);
        expect(parseCookieReply(built)).toEqual(message);
      }),
    );
  });
});

test("fields stand where the protocol says, little-endian", () => {
  const response = buildResponse({
    sender: 0x55667788,
    receiver: 0x11223344,
    ephemeral: new Uint8Array(32).fill(0xee),
    encryptedNothing: new Uint8Array(16).fill(0xaa),
  });
  expect(response.toHex()).toBe(`020000008877665544332211${"ee".repeat(32)}${"aa".repeat(16)}${"00".repeat(32)}`);
  mac1Of(response).fill(1);
  mac2Of(response).fill(2);
  expect(response.subarray(60).toHex()).toBe("01".repeat(16) + "02".repeat(16));
});

describe("no message", () => {
  const sizes: [number, number][] = [
    [1, INITIATION_SIZE],
    [2, RESPONSE_SIZE],
    [3, COOKIE_REPLY_SIZE],
  ];

  test("handshake messages of any other length", () => {
    for (const [type, size] of sizes) {
      for (const length of [0, 3, 4, size - 1, size + 1, 65535]) {
        const message = new Uint8Array(length);
        message.set([type].slice(0, length));
        expect(messageType(message)).toBe(0);
      }
      const right = new Uint8Array(size);
      right[0] = type;
      expect(messageType(right)).toBe(type);
    }
  });

  test("a transport message without room for a tag", () => {
    const message = new Uint8Array(32);
    message[0] = 4;
    expect(messageType(message)).toBe(4);
    expect(messageType(message.subarray(0, 31))).toBe(0);
  });

  test("types 0 and 5, and reserved bytes that are not zero", () => {
    const message = new Uint8Array(148);
    expect(messageType(message)).toBe(0);
    message[0] = 5;
    expect(messageType(message)).toBe(0);
    for (const reserved of [1, 2, 3]) {
      const odd = new Uint8Array(148);
      odd[0] = 1;
      odd[reserved] = 1;
      expect(messageType(odd)).toBe(0);
      expect(parseInitiation(odd)).toBeNull();
    }
  });

  test("random bytes never throw, and only one parser accepts any", () => {
    const some = fc.tuple(fc.integer({ min: 0, max: 5 }), fc.uint8Array({ maxLength: 160 }));
    fc.assert(
      fc.property(some, ([type, body]) => {
        const message = Uint8Array.of(type, 0, 0, 0, ...body);
        const parsed = [parseInitiation, parseResponse, parseCookieReply].map((parse) => parse(message));
        const type2 = messageType(message);
        expect(parsed.map((value, i) => (value ? i + 1 : 0)).filter(Boolean)).toEqual(
          type2 >= 1 && type2 <= 3 ? [type2] : [],
        );
      }),
    );
  });
});

test("TAI64N: the label of a Unix time, ordered as bytes", () => {
  expect(tai64n(1_700_000_000n * 1_000_000_000n + 0x0100_0000n)).toEqual(unhex("400000006553f10a01000000")!);
  expect(Buffer.compare(tai64n(5_999_999_999n), tai64n(6_000_000_000n))).toBe(-1);
});

test("padding: to 16, not beyond the MTU, and by the last unit of what is longer than the MTU", () => {
  expect([0, 1, 15, 16, 17, 1419, 1420].map((length) => paddedLength(length, 1420))).toEqual([
    0, 16, 16, 16, 32, 1420, 1420,
  ]);
  expect(paddedLength(1421, 1420)).toBe(1436);
  expect(paddedLength(2840, 1420)).toBe(2840);
  expect(paddedLength(1419, 0)).toBe(1424);
});
