import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import fc from "fast-check";
import { chacha20poly1305Seal } from "../crypto/aead.ts";
import { hex, unhex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  EarlyPayloadReader,
  encodeEarlyPayload,
  encodeHandshakeError,
  MAX_EARLY_PAYLOAD,
  MAX_FRAME,
  MAX_PLAINTEXT,
  NoiseError,
  NoiseInitiator,
  RecordOpener,
  RecordSealer,
  readHandshakeReply,
  respondToInitiation,
} from "./noise.ts";

const run = (from: number) => Uint8Array.from({ length: 32 }, (_, i) => from + i);
const machinePrivate = run(0x01);
const machineEphemeral = run(0x21);
const controlPrivate = run(0x41);
const controlEphemeral = run(0x61);
const controlPublic = x25519Public(controlPrivate);

function handshake(version = 145) {
  const initiator = new NoiseInitiator({
    version,
    machinePrivate,
    ephemeralPrivate: machineEphemeral,
    controlPublic,
  });
  const responded = respondToInitiation({
    initiation: initiator.initiation,
    controlPrivate,
    ephemeralPrivate: controlEphemeral,
  });
  return { initiator, responded, keys: initiator.finish(responded.response) };
}

describe("vectors of the specification, section 27", () => {
  test("both messages, both keys and the hash are bit-exact", () => {
    const { initiator, responded, keys } = handshake();
    expect(hex(initiator.initiation)).toBe(
      "00910100605869aff450549732cbaaed5e5df9b30a6da31cb0e5742bad5ad4a1a768f1a67b" +
        "822e8514e6389169bdfd10afecae5bded9cda3f0157ac1d03cd3620b3bb73a8622af140d231efc6396f1c80598dc7289" +
        "c50e831342d4c8605e6d5bccc41fba65",
    );
    expect(hex(responded.response)).toBe(
      "020030244fe3b963e899dd295baffce248d3530f3a9a7479ba063002680ebfe7adad497cc147989eb24756280c2216d1f9d8e5",
    );
    expect(hex(responded.machinePublic)).toBe("07a37cbc142093c8b755dc1b10e86cb426374ad16aa853ed0bdfc0b2b86d1c7c");
    expect(responded.version).toBe(145);
    expect(hex(keys.handshakeHash)).toBe("321714d20086399690b1ca68b173c01de3145831416fd3a049c6db8a2eb99214");
    expect(hex(keys.send)).toBe("9d8a0c9bfad81a7ac34484c53c3b9e730edd3c0249faac7826a8cf9f4b9713b1");
    expect(hex(keys.receive)).toBe("5c591b6bc88039fb598c45334d246af59501be8061e51f3950afafc7d1fb28cb");
    expect(responded.keys).toEqual({
      send: keys.receive,
      receive: keys.send,
      handshakeHash: keys.handshakeHash,
    });
  });

  test("records count their nonce big-endian", () => {
    const { keys, responded } = handshake();
    const text = (s: string) => new TextEncoder().encode(s);
    const client = new RecordSealer(keys.send);
    expect(hex(client.seal(text("hello")))).toBe("04001507243be7982fab9bbb554647607dd6488c8e819717");
    expect(hex(client.seal(text("world")))).toBe("0400152f344fd3067de495a033667cfcf23c52496da03387");
    const server = new RecordSealer(responded.keys.send);
    expect(hex(server.seal(text("hello")))).toBe("040015f151e3d25a25eba7acb91362c6038c29237a5ab23e");
    expect(hex(server.seal(text("world")))).toBe("040015c23fb070da1e95ac64fa4e919bae496221e97e31b6");
  });
});

const vectorFile = `${import.meta.dir}/../../../shared/vectors/noise-ik-ikpsk2-25519-chachapoly-blake2s.json`;
if (!existsSync(vectorFile))
  process.stderr.write("SKIP: published Noise vectors: no folder shared/vectors beside the checkout\n");

test.skipIf(!existsSync(vectorFile))("IK of the published vectors: the same key schedule without a prologue", () => {
  // Their prologue is empty, ours never is: only the public parts that do not depend on it can agree.
  const vectors = JSON.parse(readFileSync(vectorFile, "utf8")) as Record<string, string>[];
  const vector = vectors.find((v) => v.handshake === "Noise_IK_25519_ChaChaPoly_BLAKE2s")!;
  const initiator = new NoiseInitiator({
    version: 1,
    machinePrivate: unhex(vector.init_static!)!,
    ephemeralPrivate: unhex(vector.gen_init_ephemeral!)!,
    controlPublic: x25519Public(unhex(vector.resp_static!)!),
  });
  expect(hex(initiator.initiation.subarray(5, 37))).toBe(vector.msg_0_ciphertext!.slice(0, 64));
  // The first encryption's key and nonce are those of the vector; only the associated data, so the tag, differs.
  expect(hex(initiator.initiation.subarray(37, 69))).toBe(vector.msg_0_ciphertext!.slice(64, 128));
});

describe("handshake with the wrong things", () => {
  test("another control key is noticed by the server", () => {
    const { initiation } = new NoiseInitiator({
      version: 145,
      machinePrivate,
      ephemeralPrivate: machineEphemeral,
      controlPublic: x25519Public(run(0x99)),
    });
    expect(() => respondToInitiation({ initiation, controlPrivate, ephemeralPrivate: controlEphemeral })).toThrow(
      "not made for this server's key",
    );
  });

  test("another version in the header is noticed as a decryption failure", () => {
    const { initiation } = handshake().initiator;
    const changed = initiation.slice();
    changed[1]! ^= 1;
    expect(() =>
      respondToInitiation({ initiation: changed, controlPrivate, ephemeralPrivate: controlEphemeral }),
    ).toThrow(NoiseError);
  });

  test("a public key of low order is refused on both sides", () => {
    const { initiator } = handshake();
    const initiation = initiator.initiation.slice();
    initiation.fill(0, 5, 37);
    const options = { initiation, controlPrivate, ephemeralPrivate: controlEphemeral };
    expect(() => respondToInitiation(options)).toThrow("low order");
    const response = new Uint8Array(51);
    response.set([2, 0, 48]);
    const fresh = new NoiseInitiator({
      version: 1,
      machinePrivate,
      ephemeralPrivate: machineEphemeral,
      controlPublic,
    });
    expect(() => fresh.finish(response)).toThrow("low order");
  });

  test("every flipped bit and every length is refused with a NoiseError", () => {
    const { initiation } = handshake().initiator;
    fc.assert(
      fc.property(fc.nat(initiation.length * 8 - 1), (bit) => {
        const changed = initiation.slice();
        changed[bit >> 3]! ^= 1 << (bit & 7);
        // X25519 ignores the top bit of a public key, so that flip shows in the hash instead: refused all the same.
        const options = { initiation: changed, controlPrivate, ephemeralPrivate: controlEphemeral };
        expect(() => respondToInitiation(options)).toThrow(NoiseError);
      }),
      { numRuns: 60 },
    );
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
        const options = { initiation: bytes, controlPrivate, ephemeralPrivate: controlEphemeral };
        expect(() => respondToInitiation(options)).toThrow(NoiseError);
      }),
      { numRuns: 60 },
    );
  });

  test("a server's error frame is its text; other frames and wrong lengths are refused", () => {
    const frame = encodeHandshakeError("no such key");
    expect(readHandshakeReply(frame.subarray(0, 5))).toBeNull();
    expect(readHandshakeReply(frame)).toEqual({ error: "no such key" });
    expect(() => readHandshakeReply(Uint8Array.of(4, 0, 48))).toThrow("type 4");
    expect(() => readHandshakeReply(Uint8Array.of(2, 0, 49))).toThrow("49 bytes");
    expect(() => readHandshakeReply(Uint8Array.of(3, 0xff, 0xff))).toThrow("65535 bytes");
    const { response } = handshake().responded;
    const reply = readHandshakeReply(Uint8Array.of(...response, 7, 8));
    expect(reply).toEqual({ response, rest: Uint8Array.of(7, 8) });
  });
});

describe("records", () => {
  const key = run(7);

  test("any plaintext comes back over any division into chunks; frames keep to 4096 bytes", () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ minLength: 1, maxLength: 9000, size: "max" }), { maxLength: 4 }),
        fc.array(fc.integer({ min: 1, max: 5000 }), { minLength: 1, maxLength: 10 }),
        (plaintexts, cuts) => {
          const sealer = new RecordSealer(key);
          const stream = Buffer.concat(plaintexts.map((p) => sealer.seal(p)));
          for (let at = 0; at < stream.length; at += 3 + stream.readUInt16BE(at + 1))
            expect(3 + stream.readUInt16BE(at + 1)).toBeLessThanOrEqual(MAX_FRAME);
          const opener = new RecordOpener(key);
          const out: Uint8Array[] = [];
          for (let at = 0, i = 0; at < stream.length; i++) {
            const end = at + cuts[i % cuts.length]!;
            out.push(...opener.push(stream.subarray(at, end)));
            at = end;
          }
          expect(Buffer.concat(out).equals(Buffer.concat(plaintexts))).toBe(true);
        },
      ),
      { numRuns: 40 },
    );
  });

  test("one full record, one byte more makes two", () => {
    expect(new RecordSealer(key).seal(new Uint8Array(MAX_PLAINTEXT)).length).toBe(MAX_FRAME);
    expect(new RecordSealer(key).seal(new Uint8Array(MAX_PLAINTEXT + 1)).length).toBe(MAX_FRAME + 20);
  });

  test("an empty record is skipped and counted", () => {
    const empty = Uint8Array.of(4, 0, 16, ...chacha20poly1305Seal(key, new Uint8Array(12), new Uint8Array(0)));
    const opener = new RecordOpener(key);
    expect(opener.push(empty)).toEqual([]);
    const sealer = new RecordSealer(key);
    sealer.seal(Uint8Array.of(1));
    expect(opener.push(sealer.seal(Uint8Array.of(2)))).toEqual([Uint8Array.of(2)]);
  });

  test("a replayed, reordered or changed record ends the stream", () => {
    const sealer = new RecordSealer(key);
    const [a, b] = [sealer.seal(Uint8Array.of(1)), sealer.seal(Uint8Array.of(2))];
    const opener = new RecordOpener(key);
    opener.push(a);
    expect(() => opener.push(a)).toThrow("does not decrypt");
    expect(() => new RecordOpener(key).push(b)).toThrow("does not decrypt");
  });

  test("garbage is refused, or waits for more; it never is plaintext", () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 5000 }), { maxLength: 3 }), (chunks) => {
        const opener = new RecordOpener(key);
        try {
          for (const chunk of chunks) expect(opener.push(chunk)).toEqual([]);
        } catch (error) {
          expect(error).toBeInstanceOf(NoiseError);
        }
      }),
    );
    for (const length of [0, 15, 4094, 65535])
      expect(() => new RecordOpener(key).push(Uint8Array.of(4, length >> 8, length & 255))).toThrow(`${length} bytes`);
  });
});

describe("early payload", () => {
  const early = { nodeKeyChallenge: `chalpub:${"ab".repeat(32)}` };

  test("is found at any division into chunks, and what follows is the stream", () => {
    const bytes = Uint8Array.of(...encodeEarlyPayload(early), 80, 82, 73);
    for (let cut = 1; cut < bytes.length; cut++) {
      const reader = new EarlyPayloadReader();
      const first = reader.push(bytes.subarray(0, cut));
      if (first) {
        expect(first.early).toEqual(early);
        continue;
      }
      const second = reader.push(bytes.subarray(cut))!;
      expect(second.early).toEqual(early);
      expect(second.rest).toEqual(Uint8Array.of(80, 82, 73));
    }
  });

  test("none: the first different byte decides, nothing is lost", () => {
    expect(new EarlyPayloadReader().push(Uint8Array.of(0, 0, 18))).toEqual({
      early: null,
      rest: Uint8Array.of(0, 0, 18),
    });
    const reader = new EarlyPayloadReader();
    expect(reader.push(Uint8Array.of(0xff, 0xff))).toBeNull();
    expect(reader.push(Uint8Array.of(1))).toEqual({ early: null, rest: Uint8Array.of(0xff, 0xff, 1) });
  });

  test("a payload that claims too much, or is no JSON, is refused", () => {
    const header = new Uint8Array(9);
    header.set([0xff, 0xff, 0xff, 0x54, 0x53]);
    new DataView(header.buffer).setUint32(5, MAX_EARLY_PAYLOAD + 1);
    expect(() => new EarlyPayloadReader().push(header)).toThrow(NoiseError);
    new DataView(header.buffer).setUint32(5, 1);
    expect(() => new EarlyPayloadReader().push(Uint8Array.of(...header, 0x7b))).toThrow("no JSON");
  });
});
