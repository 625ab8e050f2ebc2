import { describe, expect, test } from "bun:test";
import { chacha20poly1305 as noble, xchacha20poly1305 as nobleX } from "@noble/ciphers/chacha.js";
import {
  chacha20poly1305Open,
  chacha20poly1305Seal,
  TAG_SIZE,
  xchacha20poly1305Open,
  xchacha20poly1305Seal,
} from "./aead.ts";
import { MAX_MESSAGE } from "./scratch.ts";
import { bytes, Seeded, vectors } from "./test-support.ts";
import { AEAD_STATE_SIZE, Asm } from "./wasm.ts";

const SUNSCREEN = new TextEncoder().encode(
  "Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.",
);

const asm = Asm.create(64);
const x = asm.exports;
const argument = asm.alloc(256);
const state = asm.alloc(AEAD_STATE_SIZE);
const nonceAt = asm.alloc(64);
const buffer = asm.alloc(70_000);

function put(at: number, content: Uint8Array): number {
  asm.u8.set(content, at);
  return at;
}

function get(at: number, length: number): string {
  return asm.u8.slice(at, at + length).toHex();
}

function sequence(first: number, length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => first + i);
}

describe("ChaCha20 in RFC 8439", () => {
  function stream(key: Uint8Array, counter: number, nonce: Uint8Array, message: Uint8Array): string {
    x.chacha20Key(state, put(argument, key));
    const words = new DataView(nonce.buffer, nonce.byteOffset);
    x.chacha20Nonce(state, counter, words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true));
    put(buffer, new Uint8Array(1024));
    put(buffer, message);
    x.chacha20Xor(state, buffer, Math.ceil(message.length / 256));
    return get(buffer, message.length);
  }

  test("2.3.2: the block of key 00..1f, counter 1", () => {
    expect(stream(sequence(0, 32), 1, bytes("000000090000004a00000000"), new Uint8Array(64))).toBe(
      "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4ed2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    );
  });

  test("2.4.2: a text over two blocks", () => {
    expect(stream(sequence(0, 32), 1, bytes("000000000000004a00000000"), SUNSCREEN)).toBe(
      "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42874d",
    );
  });

  test("A.1 #1 and #2: zero key and nonce, counters 0 and 1", () => {
    expect(stream(new Uint8Array(32), 0, new Uint8Array(12), new Uint8Array(128))).toBe(
      "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586" +
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    );
  });

  test("more than one pass gives the same stream as single passes with their counters", () => {
    const whole = stream(sequence(7, 32), 9, sequence(1, 12), new Uint8Array(1024));
    const parts = [0, 1, 2, 3].map((i) => stream(sequence(7, 32), 9 + 4 * i, sequence(1, 12), new Uint8Array(256)));
    expect(whole).toBe(parts.join(""));
  });
});

describe("Poly1305 in RFC 8439", () => {
  const zeros = (n: number) => "00".repeat(n);
  const ones = (n: number) => "ff".repeat(n);
  const cases: [name: string, key: string, message: string, tag: string][] = [
    [
      "2.5.2",
      "85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b",
      new TextEncoder().encode("Cryptographic Forum Research Group").toHex(),
      "a8061dc1305136c6c22b8baf0c0127a9",
    ],
    ["A.3 #1, all zero", zeros(32), zeros(64), zeros(16)],
    ["A.3 #7, 2^130 - 5 wraps", `02${zeros(31)}`, ones(16), `03${zeros(15)}`],
    ["A.3 #8, the addition of s wraps", `02${zeros(15)}${ones(16)}`, `02${zeros(15)}`, `03${zeros(15)}`],
    ["A.3 #9, carries through", `01${zeros(31)}`, `${ones(16)}f0${ones(15)}11${zeros(15)}`, `05${zeros(15)}`],
    ["A.3 #10, exactly p", `01${zeros(31)}`, `${ones(16)}fb${"fe".repeat(15)}${"01".repeat(16)}`, zeros(16)],
    ["A.3 #11, p - 1", `02${zeros(31)}`, `fd${ones(15)}`, `fa${ones(15)}`],
    [
      "A.3 #12",
      `01${zeros(7)}04${zeros(23)}`,
      "e33594d7505e43b900000000000000003394d7505e4379cd01000000000000000000000000000000000000000000000001000000000000000000000000000000",
      "14000000000000005500000000000000",
    ],
    [
      "A.3 #13",
      `01${zeros(7)}04${zeros(23)}`,
      "e33594d7505e43b900000000000000003394d7505e4379cd010000000000000000000000000000000000000000000000",
      `13${zeros(15)}`,
    ],
  ];
  test.each(cases)("%s", (_name, key, message, tag) => {
    x.poly1305Init(put(argument, bytes(key)));
    x.poly1305Message(put(buffer, bytes(message)), message.length / 2);
    x.poly1305Finish(nonceAt);
    expect(get(nonceAt, 16)).toBe(tag);
  });
});

describe("the AEADs' published examples", () => {
  const aad = bytes("50515253c0c1c2c3c4c5c6c7");

  test("RFC 8439 2.8.2", () => {
    const sealed = chacha20poly1305Seal(sequence(0x80, 32), bytes("070000004041424344454647"), SUNSCREEN, aad);
    expect(sealed.toHex()).toBe(
      "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d26586cec64b6116" +
        "1ae10b594f09e26a7e902ecbd0600691",
    );
  });

  test("RFC 8439 A.5, opening", () => {
    const opened = chacha20poly1305Open(
      bytes("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"),
      bytes("000000000102030405060708"),
      bytes(
        "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c8559797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e99040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b02709beead9d67890cbb22392336fea1851f38",
      ),
      bytes("f33388860000000000004e91"),
    );
    expect(new TextDecoder().decode(opened!)).toBe(
      "Internet-Drafts are draft documents valid for a maximum of six months and may be updated, replaced, or obsoleted by other documents at any time. It is inappropriate to use Internet-Drafts as reference material or to cite them other than as /“work in progress./”",
    );
  });

  test("XChaCha draft 2.2.1: HChaCha20", () => {
    put(argument, sequence(0, 32));
    x.hchacha20(buffer, argument, put(nonceAt, bytes("000000090000004a0000000031415927")));
    expect(get(buffer, 32)).toBe("82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc");
  });

  test("XChaCha draft A.3.1", () => {
    const sealed = xchacha20poly1305Seal(sequence(0x80, 32), sequence(0x40, 24), SUNSCREEN, aad);
    expect(sealed.toHex()).toBe(
      "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff921f9664c97637da9768812f615c68b13b52e" +
        "c0875924c1c7987947deafd8780acf49",
    );
  });
});

interface WycheproofAead {
  numberOfTests: number;
  testGroups: {
    ivSize: number;
    tests: {
      tcId: number;
      key: string;
      iv: string;
      aad: string;
      msg: string;
      ct: string;
      tag: string;
      result: "valid" | "invalid";
    }[];
  }[];
}

describe.each([
  { file: "wycheproof-chacha20_poly1305.json", nonceSize: 12, seal: chacha20poly1305Seal, open: chacha20poly1305Open },
  {
    file: "wycheproof-xchacha20_poly1305.json",
    nonceSize: 24,
    seal: xchacha20poly1305Seal,
    open: xchacha20poly1305Open,
  },
])("$file", ({ file, nonceSize, seal, open }) => {
  test("every case", () => {
    const { numberOfTests, testGroups } = vectors<WycheproofAead>(file);
    let seen = 0;
    for (const group of testGroups)
      for (const c of group.tests) {
        seen++;
        const [key, nonce, aad, message] = [bytes(c.key), bytes(c.iv), bytes(c.aad), bytes(c.msg)] as const;
        const sealed = bytes(c.ct + c.tag);
        if (nonce.length !== nonceSize) {
          expect(c.result).toBe("invalid");
          expect(() => seal(key, nonce, message, aad)).toThrow(`AEAD nonce has ${nonce.length} bytes`);
          expect(() => open(key, nonce, sealed, aad)).toThrow(`AEAD nonce has ${nonce.length} bytes`);
          continue;
        }
        const valid = c.result === "valid";
        const mine = seal(key, nonce, message, aad).toHex();
        expect({ tcId: c.tcId, sealsAlike: mine === sealed.toHex() }).toEqual({ tcId: c.tcId, sealsAlike: valid });
        const opened = open(key, nonce, sealed, aad)?.toHex() ?? null;
        expect({ tcId: c.tcId, opened }).toEqual({ tcId: c.tcId, opened: valid ? c.msg : null });
      }
    expect(seen).toBe(numberOfTests);
  });
});

// Every length up to 300, then the neighbours of the kernels' steps, then some at random up to the largest datagram.
function lengths(random: Seeded): number[] {
  const chosen = new Set<number>();
  for (let n = 0; n <= 300; n++) chosen.add(n);
  for (const edge of [320, 384, 448, 704, 960, 1216, 1280, 1420, 1472, 2048, 4096, 8192, 16384, 65280, 65472, 65519])
    for (const d of [-17, -16, -15, -1, 0, 1, 15, 16]) chosen.add(edge + d);
  for (let i = 0; i < 20; i++) chosen.add(random.below(65536));
  chosen.add(65535);
  return [...chosen];
}

describe("against an independent implementation", () => {
  test("packets in place: every alignment, counters over 32 bits, not a byte outside message and tag", () => {
    const random = new Seeded(1);
    const GUARD = 80;
    for (const length of lengths(random)) {
      const key = random.bytes(32);
      const message = random.bytes(length);
      const [lo, hi] = [random.word(), random.word()];
      const nonce = new Uint8Array(12);
      new DataView(nonce.buffer).setUint32(4, lo, true);
      new DataView(nonce.buffer).setUint32(8, hi, true);
      const sealed = Buffer.from(noble(key, nonce).encrypt(message));
      x.aeadInit(state, put(argument, key));
      const alignments = length <= 300 ? 64 : 5;
      for (let i = 0; i < alignments; i++) {
        const p = buffer + 128 + (length <= 300 ? i : random.below(64));
        const all = asm.u8.subarray(p - GUARD, p + length + TAG_SIZE + GUARD);
        all.fill(0xa5);
        asm.u8.set(message, p);
        x.aeadSeal(p, length, state, lo, hi);
        if (!sealed.equals(asm.u8.subarray(p, p + length + TAG_SIZE)))
          throw new Error(`sealed otherwise: length ${length}, address ${p}`);
        if (x.aeadOpen(p, length, state, lo, hi) !== 1) throw new Error(`not opened: length ${length}, address ${p}`);
        if (!Buffer.from(message).equals(asm.u8.subarray(p, p + length)))
          throw new Error(`opened otherwise: length ${length}, address ${p}`);
        if (!sealed.subarray(length).equals(asm.u8.subarray(p + length, p + length + TAG_SIZE)))
          throw new Error(`tag changed by opening: length ${length}, address ${p}`);
        for (let g = 0; g < GUARD; g++)
          if (all[g] !== 0xa5 || all[all.length - 1 - g] !== 0xa5)
            throw new Error(`wrote outside: length ${length}, address ${p}`);
      }
    }
  });

  test("the general doors: AAD of every length to 80, messages of all sizes", () => {
    const random = new Seeded(2);
    const sizes = lengths(random);
    for (const [i, length] of sizes.entries()) {
      const [key, nonce, nonceX] = [random.bytes(32), random.bytes(12), random.bytes(24)];
      const aad = random.bytes(i % 81);
      const message = random.bytes(length);
      const sealed = noble(key, nonce, aad).encrypt(message);
      const sealedX = nobleX(key, nonceX, aad).encrypt(message);
      const results = [
        chacha20poly1305Seal(key, nonce, message, aad),
        chacha20poly1305Open(key, nonce, sealed, aad)!,
        xchacha20poly1305Seal(key, nonceX, message, aad),
        xchacha20poly1305Open(key, nonceX, sealedX, aad)!,
      ];
      const expected = [sealed, message, sealedX, message];
      for (const [k, result] of results.entries())
        if (!Buffer.from(expected[k]!).equals(result)) throw new Error(`result ${k}: length ${length}, AAD ${i % 81}`);
    }
  });
});

describe("forgeries", () => {
  test("a flipped bit anywhere in ciphertext, tag or AAD is refused", () => {
    const random = new Seeded(3);
    for (const length of [0, 1, 15, 16, 17, 63, 192, 193, 449, 705, 960]) {
      const [key, nonce, nonceX, aad] = [random.bytes(32), random.bytes(12), random.bytes(24), random.bytes(21)];
      const message = random.bytes(length);
      for (const [open, n, sealed] of [
        [chacha20poly1305Open, nonce, chacha20poly1305Seal(key, nonce, message, aad)],
        [xchacha20poly1305Open, nonceX, xchacha20poly1305Seal(key, nonceX, message, aad)],
      ] as const) {
        for (const input of [sealed, aad])
          for (let i = 0; i < input.length; i++) {
            const bit = 1 << random.below(8);
            input[i]! ^= bit;
            if (open(key, n, sealed, aad)) throw new Error(`accepted: length ${length}, byte ${i}`);
            input[i]! ^= bit;
          }
        expect(open(key, n, sealed, aad)).toEqual(message);
      }
    }
  });

  test("of a refused packet no byte of plaintext is left; tag and neighbours stay what they were", () => {
    const random = new Seeded(4);
    x.aeadInit(state, put(argument, random.bytes(32)));
    for (const length of [0, 1, 16, 191, 192, 193, 448, 449, 705, 960, 1420]) {
      const forged = random.bytes(length + TAG_SIZE + 32);
      put(buffer, forged);
      expect(x.aeadOpen(buffer + 16, length, state, 5, 0)).toBe(0);
      forged.fill(0, 16, 16 + length);
      expect(get(buffer, forged.length)).toBe(forged.toHex());
    }
  });

  test("another counter, key or nonce is refused", () => {
    const [key, nonce] = [sequence(1, 32), sequence(2, 12)];
    const sealed = chacha20poly1305Seal(key, nonce, SUNSCREEN);
    expect(chacha20poly1305Open(key, sequence(3, 12), sealed)).toBeNull();
    expect(chacha20poly1305Open(sequence(2, 32), nonce, sealed)).toBeNull();
    expect(chacha20poly1305Open(key, nonce, sealed, Uint8Array.of(0))).toBeNull();
  });
});

describe("the doors' bounds", () => {
  test("shorter than a tag is refused like a forgery", () => {
    for (let n = 0; n < TAG_SIZE; n++) {
      expect(chacha20poly1305Open(sequence(0, 32), sequence(0, 12), new Uint8Array(n))).toBeNull();
      expect(xchacha20poly1305Open(sequence(0, 32), sequence(0, 24), new Uint8Array(n))).toBeNull();
    }
  });

  test("a wrong key size and a message beyond 1 MiB say so", () => {
    expect(() => chacha20poly1305Seal(sequence(0, 31), sequence(0, 12), SUNSCREEN)).toThrow("AEAD key has 31 bytes");
    const huge = new Uint8Array(MAX_MESSAGE + 1);
    expect(() => chacha20poly1305Seal(sequence(0, 32), sequence(0, 12), huge)).toThrow("at most 1048576");
    expect(() => xchacha20poly1305Seal(sequence(0, 32), sequence(0, 24), SUNSCREEN, huge)).toThrow("AAD has 1048577");
    const largest = new Uint8Array(MAX_MESSAGE);
    const sealed = chacha20poly1305Seal(sequence(0, 32), sequence(0, 12), largest);
    expect(chacha20poly1305Open(sequence(0, 32), sequence(0, 12), sealed)).toEqual(largest);
  });

  test("key, key stream and plaintext do not stay in the instance's memory", async () => {
    const { doorScratch } = await import("./scratch.ts");
    const [key, nonce, message] = [new Seeded(5).bytes(32), sequence(0, 12), new Seeded(6).bytes(700)];
    const sealed = chacha20poly1305Seal(key, nonce, message);
    chacha20poly1305Open(key, nonce, sealed);
    xchacha20poly1305Seal(key, sequence(0, 24), message);
    const memory = Buffer.from(doorScratch().u8.slice());
    const keyStream = message.map((byte, i) => byte ^ sealed[i]!);
    expect(memory.includes(key.subarray(0, 8))).toBe(false);
    expect(memory.includes(message.subarray(100, 116))).toBe(false);
    for (let i = 0; i + 8 <= keyStream.length; i += 4)
      expect(memory.includes(keyStream.subarray(i, i + 8))).toBe(false);
  });
});
