import { expect, test } from "bun:test";
import { zstdCompressSync } from "node:zlib";
import fc from "fast-check";
import { decodeMapFrame, MapFrameReader, MapStreamError } from "./map-stream.ts";

function frame(body: Uint8Array): Uint8Array {
  const out = new Uint8Array(4 + body.length);
  new DataView(out.buffer).setUint32(0, body.length, true);
  out.set(body, 4);
  return out;
}

test("frames come back over any division into chunks", () => {
  const cut = fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 8 });
  fc.assert(
    fc.property(fc.array(fc.uint8Array({ maxLength: 60 }), { maxLength: 6 }), cut, (bodies, cuts) => {
      const stream = Buffer.concat(bodies.map(frame));
      const reader = new MapFrameReader();
      const out: Uint8Array[] = [];
      for (let at = 0, i = 0; at < stream.length; i++) {
        const end = at + cuts[i % cuts.length]!;
        out.push(...reader.push(stream.subarray(at, end)));
        at = end;
      }
      expect(out.map((bytes) => [...bytes])).toEqual(bodies.map((bytes) => [...bytes]));
    }),
  );
});

test("the length is little-endian, and one above the limit is refused before anything is kept", () => {
  expect(new MapFrameReader().push(Uint8Array.of(1, 0, 0, 0, 9))).toEqual([Uint8Array.of(9)]);
  expect(() => new MapFrameReader(1000).push(Uint8Array.of(0xe9, 3, 0, 0))).toThrow("1001 bytes");
  expect(() => new MapFrameReader().push(Uint8Array.of(0xff, 0xff, 0xff, 0xff))).toThrow(MapStreamError);
});

test("a message is one zstd frame of a JSON object", () => {
  const bytes = zstdCompressSync('{"KeepAlive":true}');
  expect(decodeMapFrame(bytes, true)).toEqual({ KeepAlive: true });
  expect(decodeMapFrame(new TextEncoder().encode('{"Seq":1}'), false)).toEqual({ Seq: 1 });
  for (const text of ["[]", "null", "7", "{", ""])
    expect(() => decodeMapFrame(zstdCompressSync(text), true)).toThrow(MapStreamError);
});

test("a bomb is refused", () => {
  const bomb = zstdCompressSync(new Uint8Array(300 * 1024 * 1024));
  expect(bomb.length).toBeLessThan(100_000);
  expect(() => decodeMapFrame(bomb, true)).toThrow("does not decompress");
});

test("garbage is a MapStreamError, never anything else", () => {
  const good = zstdCompressSync(JSON.stringify({ Domain: "x".repeat(100) }));
  const flipped = fc.nat(good.length * 8 - 1).map((bit) => {
    const bytes = Uint8Array.from(good);
    bytes[bit >> 3]! ^= 1 << (bit & 7);
    return bytes;
  });
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 80 }), flipped), fc.boolean(), (bytes, compressed) => {
      try {
        expect(typeof decodeMapFrame(bytes, compressed)).toBe("object");
      } catch (error) {
        expect(error).toBeInstanceOf(MapStreamError);
      }
    }),
  );
});
