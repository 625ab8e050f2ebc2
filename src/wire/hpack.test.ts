import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { encodeHeaderBlock, type HeaderField, HeaderListTooLarge, HpackDecoder, HpackError } from "./hpack.ts";

const bytes = (hex: string) => Uint8Array.from(Buffer.from(hex.replaceAll(" ", ""), "hex"));
const REQUEST: HeaderField[] = [
  [":method", "GET"],
  [":scheme", "http"],
  [":path", "/"],
  [":authority", "www.example.com"],
];
const THIRD: HeaderField[] = [
  [":method", "GET"],
  [":scheme", "https"],
  [":path", "/index.html"],
  [":authority", "www.example.com"],
  ["custom-key", "custom-value"],
];

describe("the examples of RFC 7541, appendix C", () => {
  const decode = (hex: string) => new HpackDecoder().decode(bytes(hex), 10_000);

  test("C.2: one field of each kind", () => {
    expect(decode("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572")).toEqual([
      ["custom-key", "custom-header"],
    ]);
    expect(decode("040c 2f73 616d 706c 652f 7061 7468")).toEqual([[":path", "/sample/path"]]);
    expect(decode("1008 7061 7373 776f 7264 0673 6563 7265 74")).toEqual([["password", "secret"]]);
    expect(decode("82")).toEqual([[":method", "GET"]]);
  });

  const requests: Record<string, [string, string, string]> = {
    "C.3: requests without Huffman code": [
      "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
      "8286 84be 5808 6e6f 2d63 6163 6865",
      "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
    ],
    "C.4: requests with Huffman code": [
      "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
      "8286 84be 5886 a8eb 1064 9cbf",
      "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
    ],
  };
  for (const [name, [first, second, third]] of Object.entries(requests))
    test(name, () => {
      const decoder = new HpackDecoder();
      expect(decoder.decode(bytes(first), 10_000)).toEqual(REQUEST);
      expect(decoder.decode(bytes(second), 10_000)).toEqual([...REQUEST, ["cache-control", "no-cache"]]);
      expect(decoder.decode(bytes(third), 10_000)).toEqual(THIRD);
    });

  const first: HeaderField[] = [
    [":status", "302"],
    ["cache-control", "private"],
    ["date", "Mon, 21 Oct 2013 20:13:21 GMT"],
    ["location", "https://www.example.com"],
  ];
  const second: HeaderField[] = [[":status", "307"], ...first.slice(1)];
  const third: HeaderField[] = [
    [":status", "200"],
    ["cache-control", "private"],
    ["date", "Mon, 21 Oct 2013 20:13:22 GMT"],
    ["location", "https://www.example.com"],
    ["content-encoding", "gzip"],
    ["set-cookie", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"],
  ];
  const responses: Record<string, [string, string, string]> = {
    "C.5: responses in a table of 256 bytes, which evicts": [
      `4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 474d 546e
       1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d`,
      "4803 3330 37c1 c0bf",
      `88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970 7738 666f 6f3d
       4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 3630 303b 2076 6572
       7369 6f6e 3d31`,
    ],
    "C.6: the same with Huffman code": [
      `4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 63c7 8f0b
       97c8 e9ae 82ae 43d3`,
      "4883 640e ffc1 c0bf",
      `88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 b335 dfdf
       cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07`,
    ],
  };
  for (const [name, blocks] of Object.entries(responses))
    test(name, () => {
      const decoder = new HpackDecoder(256);
      const decoded = blocks.map((block) => decoder.decode(bytes(block.replaceAll("\n", "")), 10_000));
      expect(decoded).toEqual([first, second, third]);
    });
});

test("every byte goes through the Huffman code: what Go's encoder made of 0 to 255 is read", () => {
  const encoded = bytes(HUFFMAN_OF_ALL_BYTES);
  const block = Uint8Array.of(0x00, 1, 0x61, 0xff, ...varint(encoded.length - 127), ...encoded);
  const [[, value]] = new HpackDecoder().decode(block, 10_000) as [HeaderField];
  expect([...value].map((character) => character.charCodeAt(0))).toEqual([...Array(256).keys()]);
});

test("what the encoder makes is read as it was, and the decoder's table stays empty", () => {
  const text = fc.string({ unit: "binary-ascii", maxLength: 200 });
  const known = fc.constantFrom(":status", "content-type", "retry-after", "x-other");
  const value = fc.oneof(fc.constantFrom("200", "404", "gzip, deflate"), text);
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.oneof(known, text), value), { maxLength: 20 }), (fields) => {
      const decoder = new HpackDecoder();
      expect(decoder.decode(encodeHeaderBlock(fields), 1 << 20)).toEqual(fields);
      expect(() => decoder.decode(bytes("be"), 100)).toThrow("no table has an entry 62");
    }),
    { numRuns: 200 },
  );
});

describe("blocks that are wrong", () => {
  const cases: Record<string, string> = {
    "index 0": "80",
    "an index that no table has": "be",
    "a name that no table has": "7e 00",
    "an integer without an end": "ff ff ff ff ff ff ff ff ff ff",
    "an integer of four bytes of zeros and more": "ff 80 80 80 80 80 80 00",
    "a string beyond the block": "00 7f 61",
    "the end within a field": "40",
    "a table larger than was offered": "3f e2 1f",
    "a size update behind a field": "82 20",
    "padding of a whole byte": "00 01 61 82 1f ff",
    "padding with a zero": "00 01 61 81 18",
    "the end-of-string symbol": "00 01 61 84 ff ff ff ff",
  };
  for (const [name, block] of Object.entries(cases))
    test(`${name}: refused`, () => {
      expect(() => new HpackDecoder().decode(bytes(block), 10_000)).toThrow(HpackError);
    });

  test("a few bytes that stand for very many are refused before they are unpacked", () => {
    const decoder = new HpackDecoder();
    const value = "x".repeat(3900);
    decoder.decode(Uint8Array.of(0x40, 1, 0x61, ...varintString(value)), 10_000);
    expect(() => decoder.decode(new Uint8Array(16_000).fill(0xbe), 65_536)).toThrow(HeaderListTooLarge);
  });

  test("anything at all is read or refused, with a table that stays within its bounds", () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 200 }), { maxLength: 5 }), (blocks) => {
        const decoder = new HpackDecoder();
        try {
          for (const block of blocks) decoder.decode(block, 65_536);
        } catch (error) {
          if (!(error instanceof HpackError) && !(error instanceof HeaderListTooLarge)) throw error;
        }
        const { entries } = decoder as unknown as { entries: HeaderField[] };
        const size = entries.reduce((sum, [name, value]) => sum + name.length + value.length + 32, 0);
        expect(size).toBeLessThanOrEqual(4096);
      }),
      { numRuns: 2000 },
    );
  });
});

function varint(value: number): number[] {
  return value < 128 ? [value] : [(value & 127) | 128, ...varint(value >> 7)];
}

function varintString(text: string): number[] {
  return [0x7f, ...varint(text.length - 127), ...Buffer.from(text)];
}

const HUFFMAN_OF_ALL_BYTES = [
  "ffc7fffd8fffffe2fffffe3fffffe4fffffe5fffffe6fffffe7fffffe8ffffeafffffff3fffffa7fffffabffffffdfffffebfffffecfffff",
  "edfffffeefffffefffffff0ffffff1ffffff2fffffffbfffffcffffffd3fffffd7fffffdbfffffdffffffe3fffffe7fffffebfffffed4fe3",
  "f9ffaffcabf1febfafefe7fdfd2cbb00089969b71d79fb9f7fff20ffbff3ff50ddbd7f061c58f265cd9f469d5af66dddbf871e5f9cff7ff7",
  "fffc3ff9ffe45fff4719242cb34e6e9d68a6a3d7dac426defe3cfaf7fffbfe7ffbffdffffffcfffe6ffff4bfff9ffffa3fffd3ffff53fffd",
  "5ffffb3fffeb7fffdaffffb7ffff73fffeeffffdeffffebffffbfffffd9ffffdbfffebffffe0ffffeeffffc3ffff8bffff1ffffe4fffee7f",
  "ffb1ffff97fffd9ffffcdffff9fffffbffffdafffeeffff4ffffb7fffee7fffe8ffffd3fffdeffffd5fffeeffffbdffffe1fffdfffff7fff",
  "ff5ffffecffff07fff87fffe0ffff17fffedffff87ffff77fffeffffeaffff8bfffe3ffff93ffff87fffcbffff37ffff1fffff83ffffe1ff",
  "febfffe3ffff3fffff2ffffa3ffffd9fffff17ffffc7fffff27ffffdefffffbffffff2fffff8fffffb7fff97fff8fffffe6fffffc1fffff8",
  "7ffffe7fffffc5ffffe5fffe4ffff2fffffd1fffff4ffffffefffffe3fffffc9fffff97fffb3ffffcffffb7fffcdffff4ffff9ffffd1ffff",
  "cffffeaffffafffffddffffeffffff4fffff5fffffabffffa7ffffd7fffff9bffffecfffffb7fffff3fffffe8fffffd3fffffabfffff5fff",
  "ffff7ffffecfffffdbfffffbbfffff7ffffff0fffffbbf",
].join("");
