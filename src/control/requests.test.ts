import { expect, test } from "bun:test";
import fc from "fast-check";
import { BadRequest, homeDerpOf, parseMap, parseRegister } from "./requests.ts";

const NODE_KEY = `nodekey:${"ab".repeat(32)}`;
const bytes = (value: unknown) => new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value));

test("a request as clients send it is taken apart", () => {
  const input = parseMap(
    bytes({
      Version: 138,
      Compress: "zstd",
      KeepAlive: true,
      NodeKey: NODE_KEY.toUpperCase().replace("NODEKEY", "nodekey"),
      DiscoKey: `discokey:${"0".repeat(64)}`,
      Stream: true,
      Hostinfo: { Hostname: "x" },
      Endpoints: ["192.0.2.1:41641", "[fe80::1%eth0]:1", "[fe80::1]:1", "[2001:db8::1]:2", "192.0.2.1:41641", "bad"],
      DebugFlags: [],
      Unknown: { any: "thing" },
    }),
  );
  expect(input).toEqual({
    version: 138,
    nodeKey: NODE_KEY,
    discoKey: "",
    hostinfo: { Hostname: "x" },
    endpoints: ["192.0.2.1:41641", "[2001:db8::1]:2"],
    stream: true,
    omitPeers: false,
    readOnly: false,
    keepAlive: true,
    zstd: true,
  });
});

test("the zero time is no expiry, whatever the fraction and zone; nanoseconds are understood", () => {
  const expiry = (text: unknown) => parseRegister(bytes({ NodeKey: NODE_KEY, Expiry: text })).expiry;
  expect(expiry("0001-01-01T00:00:00Z")).toBeNull();
  expect(expiry(null)).toBeNull();
  expect(expiry("1970-01-01T00:02:03Z")).toBe(123_000);
  expect(expiry("2030-01-01T01:00:00.123456789+01:00")).toBe(Date.UTC(2030, 0, 1) + 123);
  expect(() => expiry("tomorrow")).toThrow(BadRequest);
  expect(() => expiry("2030-99-01T00:00:00Z")).toThrow(BadRequest);
});

test("fields of the wrong form are refused with a sentence that names them", () => {
  const wrong: [unknown, RegExp][] = [
    ["", /not JSON/],
    ["[]", /not a JSON object/],
    ["null", /not a JSON object/],
    [{}, /NodeKey/],
    [{ NodeKey: `nodekey:${"0".repeat(64)}` }, /NodeKey/],
    [{ NodeKey: "nodekey:ab" }, /NodeKey/],
    [{ NodeKey: NODE_KEY, Version: "1" }, /Version/],
    [{ NodeKey: NODE_KEY, Version: 1e300 }, /Version/],
    // A column of PostgreSQL has 32 bits, and one row that it refuses spoils the transaction of others.
    [{ NodeKey: NODE_KEY, Version: 2 ** 31 }, /Version/],
    [{ NodeKey: NODE_KEY, Version: -1 }, /Version/],
    [{ NodeKey: NODE_KEY, Hostinfo: [] }, /Hostinfo/],
    [{ NodeKey: NODE_KEY, Hostinfo: { Hostname: 7 } }, /Hostname/],
    // No text, and none can be made of it.
    [{ NodeKey: NODE_KEY, Hostinfo: { IPNVersion: { toString: 1, valueOf: 1 } } }, /Hostinfo.IPNVersion is not a text/],
    [{ NodeKey: NODE_KEY, Hostinfo: { OSVersion: ["1"] } }, /Hostinfo.OSVersion is not a text/],
    [{ NodeKey: NODE_KEY, Hostinfo: { RequestTags: "tag:x" } }, /RequestTags/],
    [{ NodeKey: NODE_KEY, Hostinfo: { NetInfo: [1] } }, /NetInfo/],
    [{ NodeKey: NODE_KEY, Hostinfo: { Big: "x".repeat(70_000) } }, /exceeds/],
    [`{"NodeKey":"${NODE_KEY}","Hostinfo":${'{"a":'.repeat(40)}1${"}".repeat(40)}}`, /nested/],
    [{ NodeKey: NODE_KEY, Auth: "key" }, /Auth/],
    [{ NodeKey: NODE_KEY, Auth: { AuthKey: "x".repeat(2000) } }, /AuthKey/],
  ];
  for (const [body, message] of wrong) expect(() => parseRegister(bytes(body))).toThrow(message);
  expect(() => parseMap(bytes({ NodeKey: NODE_KEY, Endpoints: {} }))).toThrow(/Endpoints/);
  expect(() => parseMap(bytes({ NodeKey: NODE_KEY, Stream: "true" }))).toThrow(/Stream/);
  expect(() => parseRegister(Uint8Array.of(0x7b, 0xff, 0x7d))).toThrow(/not JSON/);
});

test("a home relay is one that a DERP map may have", () => {
  const home = (PreferredDERP: unknown) => homeDerpOf({ NetInfo: { PreferredDERP } as object });
  expect([900, 999_999_999].map(home)).toEqual([900, 999_999_999]);
  expect([0, -1, 1.5, 2 ** 31, 2 ** 53, 1e300, "1", null, []].map(home)).toEqual(Array(9).fill(0));
  expect(homeDerpOf({})).toBeNull();
});

test("whatever the bytes are, the answer is a value or a BadRequest", () => {
  const names = ["Version", "NodeKey", "OldNodeKey", "DiscoKey", "Auth", "Expiry", "Hostinfo", "Endpoints", "Stream"];
  const value = fc.oneof(fc.jsonValue(), fc.constant(NODE_KEY), fc.constant("0001-01-01T00:00:00Z"), fc.nat());
  const body = fc.oneof(
    fc.uint8Array({ maxLength: 300 }),
    fc.json().map(bytes),
    fc
      .dictionary(fc.constantFrom(...names), value, { maxKeys: 9 })
      .map((fields) => bytes({ NodeKey: NODE_KEY, ...fields })),
  );
  fc.assert(
    fc.property(body, (input) => {
      for (const parse of [parseRegister, parseMap]) {
        try {
          const { nodeKey } = parse(input);
          expect(nodeKey).toMatch(/^nodekey:[0-9a-f]{64}$/);
        } catch (error) {
          expect(error).toBeInstanceOf(BadRequest);
        }
      }
    }),
    { numRuns: 1000, seed: 1 },
  );
});
