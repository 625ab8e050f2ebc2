import { expect, test } from "bun:test";
import fc from "fast-check";
import { parseIP } from "./ip.ts";
import { encodeStunRequest, encodeStunResponse, isStun, parseStunRequest, parseStunResponse } from "./stun.ts";

const hex = (text: string) => Uint8Array.from(Buffer.from(text, "hex"));
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const TXID = hex("000102030405060708090a0b");
const REQUEST = hex("000100142112a442000102030405060708090a0b802200087461696c6e6f6465802800048aabad90");
const RESPONSE = hex("0101000c2112a442000102030405060708090a0b002000080001a147e112a643");
const V4 = parseIP("192.0.2.1")!;
const V6 = parseIP("2001:db8::1234")!;

test("the request is the published vector, and the server reads its transaction id", () => {
  expect(text(encodeStunRequest(TXID))).toBe(text(REQUEST));
  expect(text(parseStunRequest(REQUEST)!)).toBe(text(TXID));
});

test("the response for 192.0.2.1:32853 is the published vector, both ways", () => {
  expect(text(encodeStunResponse(TXID, V4, 32853))).toBe(text(RESPONSE));
  expect(parseStunResponse(RESPONSE)).toEqual({ txid: TXID, ip: V4, port: 32853 });
});

test("an IPv4-mapped source is reported as family 1, an IPv6 one as family 2 in 44 bytes", () => {
  expect(text(encodeStunResponse(TXID, parseIP("::ffff:192.0.2.1")!, 32853))).toBe(text(RESPONSE));
  const v6 = encodeStunResponse(TXID, V6, 41641);
  expect(v6.length).toBe(44);
  expect(v6[25]).toBe(2);
  expect(parseStunResponse(v6)).toEqual({ txid: TXID, ip: V6, port: 41641 });
});

test("the server ignores requests without the node's SOFTWARE, without a right last FINGERPRINT, and all that is not one", () => {
  const software = REQUEST.slice();
  software[24]! ^= 1;
  const crc = REQUEST.slice();
  crc[39]! ^= 1;
  const bare = hex("000100002112a442000102030405060708090a0b");
  const trailing = new Uint8Array([...REQUEST, 0]);
  // FINGERPRINT first and SOFTWARE last.
  const swapped = hex("000100142112a442000102030405060708090a0b802800048aabad90802200087461696c6e6f6465");
  for (const bad of [software, crc, bare, trailing, swapped, RESPONSE, REQUEST.subarray(0, 39), new Uint8Array(0)])
    expect(parseStunRequest(bad)).toBeNull();
});

test("the client understands other servers: extra attributes, the old number, MAPPED-ADDRESS alone, bytes behind the message", () => {
  const software = "8022000361626300";
  const mapped = "000100080001fffe0a000001";
  const xored = "002000080001a147e112a643";
  const message = (attributes: string) =>
    hex(`0101${(attributes.length / 2).toString(16).padStart(4, "0")}2112a442000102030405060708090a0b${attributes}`);
  const port = (attributes: string) => parseStunResponse(message(attributes))?.port;
  expect(port(software + mapped + xored)).toBe(32853);
  expect(port(`8020${xored.slice(4)}`)).toBe(32853);
  expect(port(mapped)).toBe(0xfffe);
  expect(port(software)).toBeUndefined();
  expect(parseStunResponse(new Uint8Array([...RESPONSE, 1, 2, 3]))?.port).toBe(32853);
  expect(parseStunResponse(RESPONSE.subarray(0, 31))).toBeNull();
  expect(parseStunResponse(REQUEST)).toBeNull();
});

test("a response survives the round trip for every address and port", () => {
  const ip = fc.oneof(fc.uint8Array({ minLength: 4, maxLength: 4 }), fc.constant(V6));
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 12, maxLength: 12 }), ip, fc.nat(65535), (txid, address, port) => {
      expect(parseStunResponse(encodeStunResponse(txid, address, port))).toEqual({ txid, ip: address, port });
      expect(parseStunRequest(encodeStunRequest(txid))).toEqual(txid);
    }),
    { numRuns: 200 },
  );
});

test("random and damaged datagrams never throw, and no damaged request passes", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
      isStun(bytes);
      parseStunRequest(bytes);
      parseStunResponse(bytes);
    }),
    { numRuns: 500 },
  );
  fc.assert(
    fc.property(fc.constantFrom(REQUEST, RESPONSE), fc.nat(39), fc.integer({ min: 1, max: 255 }), (from, at, flip) => {
      const bytes = from.slice();
      const i = at % bytes.length;
      bytes[i]! ^= flip;
      expect(parseStunRequest(bytes)).toBeNull();
      parseStunResponse(bytes);
    }),
    { numRuns: 500 },
  );
});
