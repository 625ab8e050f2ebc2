import { expect, test } from "bun:test";
import { createHmac } from "node:crypto";
import fc from "fast-check";
import {
  decodeMessage,
  encodeName,
  encodeTxtQuery,
  encodeTxtUpdate,
  isSignedBy,
  signMessage,
  type TsigKey,
  txtValues,
} from "./dns.ts";

const hexOf = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const key: TsigKey = {
  name: "weft",
  algorithm: "hmac-sha256",
  mac: (data) => new Uint8Array(createHmac("sha256", "secret").update(data).digest()),
};
const equal = (a: Uint8Array, b: Uint8Array) => Buffer.from(a).equals(b);

/** A response with one TXT answer, its name compressed to the question's. */
function answer(strings: string[]): Uint8Array {
  const data = Buffer.concat(strings.map((text) => Buffer.concat([Buffer.of(text.length), Buffer.from(text)])));
  const query = Buffer.from(encodeTxtQuery(7, "_acme-challenge.Host.net.test."));
  query.writeUInt16BE(0x8400, 2);
  query.writeUInt16BE(1, 6);
  const record = Buffer.from([0xc0, 0x0c, 0, 16, 0, 1, 0, 0, 0, 30, data.length >> 8, data.length & 255]);
  return new Uint8Array(Buffer.concat([query, record, data]));
}

test("an update takes all TXT records of the name away and adds one, byte for byte as RFC 2136 has it", () => {
  const message = encodeTxtUpdate(0x1234, { zone: "z.test", name: "a.z.test", value: "hi", ttl: 30 });
  expect(hexOf(message)).toBe(
    "1234" +
      "2800" +
      "0001" +
      "0000" +
      "0002" +
      "0000" +
      "017a0474657374000006" +
      "0001" +
      "0161017a047465737400" +
      "0010" +
      "00ff" +
      "00000000" +
      "0000" +
      "0161017a047465737400" +
      "0010" +
      "0001" +
      "0000001e" +
      "0003" +
      "026869",
  );
});

test("the values of an answer are read through compressed names, strings of one record put together", () => {
  const message = decodeMessage(answer(["tok", "en"]));
  expect(message).toMatchObject({ id: 7, rcode: 0, isResponse: true });
  expect(txtValues(message, "_acme-challenge.host.net.test")).toEqual(["token"]);
  expect(txtValues(message, "other.net.test")).toEqual([]);
});

test("a signature covers the message, the request's signature and the time", () => {
  const request = encodeTxtQuery(7, "x.test");
  const { signed, mac } = signMessage(request, key, 1_700_000_000);
  expect(decodeMessage(signed).additional).toHaveLength(1);
  // A server signs its answer over the request's MAC before it.
  const plain = answer(["v"]);
  const covering: TsigKey = { ...key, mac: (data) => key.mac(Buffer.concat([Buffer.of(0, mac.length), mac, data])) };
  const response = signMessage(plain, covering, 1_700_000_010).signed;
  const check = (bytes: Uint8Array, now = 1_700_000_020, by = key, over = mac) =>
    isSignedBy(bytes, by, over, now, equal);
  expect(check(response)).toBe(true);
  expect(check(response, 1_700_000_311)).toBe(false);
  expect(check(response, undefined, { ...key, name: "other" })).toBe(false);
  expect(
    check(response, undefined, {
      ...key,
      mac: (data) => new Uint8Array(createHmac("sha256", "else").update(data).digest()),
    }),
  ).toBe(false);
  expect(check(response, undefined, key, new Uint8Array(32))).toBe(false);
  expect(check(plain)).toBe(false);
  for (let i = 2; i < response.length; i++) {
    const forged = response.slice();
    forged[i]! ^= 1;
    // Case of names is not signed, and class and TTL of the signature's own record say nothing.
    if (check(forged)) expect(forged.length - i).toBeLessThan(80);
  }
});

test("names that are none are refused", () => {
  expect(hexOf(encodeName("A.b."))).toBe("0161016200");
  expect(hexOf(encodeName(""))).toBe("00");
  for (const name of ["a..b", `${"a".repeat(64)}.b`, `${"a.".repeat(127)}abc`])
    expect(() => encodeName(name)).toThrow(RangeError);
});

test("garbage, cut messages and names that chase their tails throw nothing but RangeError", () => {
  const whole = answer(["token"]);
  const loop = whole.slice();
  loop.set([0xc0, 0x0c], 12);
  expect(() => decodeMessage(loop)).toThrow(RangeError);
  for (let i = 0; i < whole.length; i++) expect(() => decodeMessage(whole.subarray(0, i))).toThrow(RangeError);
  const safe = (bytes: Uint8Array) => {
    try {
      txtValues(decodeMessage(bytes), "x");
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
    }
    expect(isSignedBy(bytes, key, new Uint8Array(32), 0, equal)).toBe(false);
  };
  fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), safe), { numRuns: 2000, seed: 1 });
  fc.assert(
    fc.property(fc.nat(whole.length - 1), fc.nat(255), (at, value) => {
      const bent = whole.slice();
      bent[at] = value;
      safe(bent);
    }),
    { numRuns: 2000, seed: 1 },
  );
});
