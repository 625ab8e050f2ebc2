// Vectors of spec/datapath-wire.md 12.1: made with an independent implementation and accepted by wireguard-go.
import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { blake2s } from "../crypto/blake2s.ts";
import { unhex } from "../crypto/keys.ts";
import { Asm } from "../crypto/wasm.ts";
import { x25519, x25519Public } from "../crypto/x25519.ts";
import { mac2Of, parseCookieReply, parseInitiation, parseResponse, tai64n } from "../wire/wireguard.ts";
import { CookieChecker, CookieJar } from "./cookie.ts";
import {
  consumeResponse,
  createInitiation,
  createResponse,
  INITIAL_CHAINING_KEY,
  INITIAL_HASH,
  openInitiationStatic,
  openInitiationTimestamp,
} from "./handshake.ts";
import { SessionTable } from "./sessions.ts";
import { key, seededBytes } from "./test-link.ts";

const I = { privateKey: key(1), publicKey: x25519Public(key(1)) };
const R = { privateKey: key(3), publicKey: x25519Public(key(3)) };
const PSK: Uint8Array = new Uint8Array(32);
const SENDER_I = 0x11223344;
const SENDER_R = 0x55667788;
const TIMESTAMP = tai64n(1_700_000_000n * 1_000_000_000n + 0x0100_0000n);

const INITIATION =
  "0100000044332211ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59e071c69040941f890172e72e6662f05122ee15ef25b328c29cd11010e779aa94be3a4c127d2b7cb9f6534df390c0672bfa7aad9b6f56b72424358d2117d2f6cda560e2ac28cd19f439a25c8b0dd70ede48778bbc752053a49e0ea80800000000000000000000000000000000";
const RESPONSE =
  "020000008877665544332211ac01b2209e86354fb853237b5de0f4fab13c7fcbf433a61c019369617fecf10b81b07f6f2ffcbd56a2d5c44306c60fda37001e4a016c8785dd8dc2dd563c595c00000000000000000000000000000000";
const KEY_I_TO_R = "02ad1ecb69defe838091565beb4b66bf6c6b6f77c43e1239896e29723983f229";
const KEY_R_TO_I = "3ef1e593bd6f13d5cfc5f2e4468cd04bff82732a32d4a34128672abe2d3a68f6";
const KEEPALIVE = "040000008877665500000000000000006449d884899800d42608a4bd8206f08f";
const COOKIE_REPLY =
  "0300000044332211000102030405060708090a0b0c0d0e0f10111213141516176f8d683ea4117175c5853d8b6bc68b920a63195989f1bb77a04f0e1fc5665372";

const noRandom = (): Uint8Array => {
  throw new Error("no randomness is needed here");
};
const counting = (n: number) => Uint8Array.from({ length: n }, (_, i) => i);

function initiate(presharedStatic = x25519(I.privateKey, R.publicKey)!) {
  return createInitiation({
    identity: I,
    remoteStatic: R.publicKey,
    staticShared: presharedStatic,
    ephemeralPrivate: key(2),
    sender: SENDER_I,
    timestamp: TIMESTAMP,
  })!;
}

function respond(message: Uint8Array, presharedKey = PSK) {
  const parsed = parseInitiation(message)!;
  const state = openInitiationStatic(parsed, R)!;
  const timestamp = openInitiationTimestamp(parsed, state, x25519(R.privateKey, state.remoteStatic)!);
  const remoteStatic = state.remoteStatic.slice();
  const response = createResponse({
    state,
    ephemeralPrivate: key(4),
    presharedKey,
    sender: SENDER_R,
    receiver: SENDER_I,
  })!;
  return { ...response, timestamp, remoteStatic };
}

test("the initial chaining key and hash are the hashes of the protocol's names", () => {
  const text = new TextEncoder();
  expect(blake2s(text.encode("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))).toEqual(INITIAL_CHAINING_KEY);
  const identifier = text.encode("WireGuard v1 zx2c4 Jason@zx2c4.com");
  expect(blake2s(Uint8Array.of(...INITIAL_CHAINING_KEY, ...identifier))).toEqual(INITIAL_HASH);
});

describe("published handshake, bit by bit", () => {
  test("initiation", () => {
    const { message } = initiate();
    new CookieJar(R.publicKey).sign(message, 0);
    expect(message.toHex()).toBe(INITIATION);
    expect(new CookieChecker(R.publicKey, noRandom).checkMac1(message)).toBe(true);
    expect(new CookieChecker(I.publicKey, noRandom).checkMac1(message)).toBe(false);
  });

  test("response, after the responder learnt key and timestamp of the initiator", () => {
    const { message, timestamp, remoteStatic } = respond(unhex(INITIATION)!);
    new CookieJar(I.publicKey).sign(message, 0);
    expect(message.toHex()).toBe(RESPONSE);
    expect(timestamp).toEqual(TIMESTAMP);
    expect(remoteStatic.toHex()).toBe(I.publicKey.toHex());
  });

  test("transport keys, the same on both sides", () => {
    const { state } = initiate();
    const keys = consumeResponse(parseResponse(unhex(RESPONSE)!)!, state, I, PSK)!;
    expect(keys.send.toHex()).toBe(KEY_I_TO_R);
    expect(keys.receive.toHex()).toBe(KEY_R_TO_I);
    const other = respond(unhex(INITIATION)!).keys;
    expect(other.send.toHex()).toBe(KEY_R_TO_I);
    expect(other.receive.toHex()).toBe(KEY_I_TO_R);
  });

  test("first keepalive, sealed and opened by the session table", () => {
    const asm = Asm.create();
    const table = new SessionTable(asm, seededBytes(1), 16);
    const initiator = table.reserve(0);
    table.install(initiator, { send: unhex(KEY_I_TO_R)!, receive: unhex(KEY_R_TO_I)! }, SENDER_R, true, 0);
    const p = asm.alloc(256);
    expect(asm.exports.sessionSeal(initiator.slot, p + 16, 0)).toBe(1);
    expect(asm.u8.slice(p, p + 32).toHex()).toBe(KEEPALIVE);

    const responder = table.reserve(7);
    table.install(responder, { send: unhex(KEY_R_TO_I)!, receive: unhex(KEY_I_TO_R)! }, SENDER_I, false, 0);
    asm.view.setUint32(p + 4, responder.localIndex, true);
    expect(asm.exports.sessionOpen(p, 32)).toBe(responder.slot | (1 << 24));
    expect(asm.exports.sessionPeer(responder.slot)).toBe(7);
  });

  test("cookie reply, and mac2 of the same initiation sent again", () => {
    const message = unhex(INITIATION)!;
    const cookie = counting(16);
    const reply = new CookieChecker(R.publicKey, noRandom).seal(
      cookie,
      message.subarray(116, 132),
      SENDER_I,
      counting(24),
    );
    expect(reply.toHex()).toBe(COOKIE_REPLY);

    const jar = new CookieJar(R.publicKey);
    const { message: again } = initiate();
    jar.sign(again, 0);
    expect(jar.accept(parseCookieReply(reply)!, 0)).toBe(true);
    jar.sign(again, 1);
    expect(mac2Of(again).toHex()).toBe("55ec8a0f678e03d7df898ac1d1022167");
  });
});

describe("handshakes that fail", () => {
  test("other preshared keys: the response does not open, the right one still does afterwards", () => {
    const { message, state } = initiate();
    const wrong = respond(message, key(9));
    expect(consumeResponse(parseResponse(wrong.message)!, state, I, PSK)).toBeNull();
    const right = respond(message);
    expect(consumeResponse(parseResponse(right.message)!, state, I, PSK)?.send.toHex()).toBe(KEY_I_TO_R);
  });

  test("an initiation for somebody else", () => {
    expect(openInitiationStatic(parseInitiation(unhex(INITIATION)!)!, I)).toBeNull();
  });

  test("a peer whose static key is of low order", () => {
    expect(x25519(I.privateKey, new Uint8Array(32))).toBeNull();
    const input = { identity: I, remoteStatic: new Uint8Array(32), staticShared: key(1), ephemeralPrivate: key(2) };
    expect(createInitiation({ ...input, sender: 1, timestamp: TIMESTAMP })).toBeNull();
  });

  test("ephemeral keys of low order", () => {
    const initiation = unhex(INITIATION)!.fill(0, 8, 40);
    expect(openInitiationStatic(parseInitiation(initiation)!, R)).toBeNull();
    const response = unhex(RESPONSE)!.fill(0, 12, 44);
    expect(consumeResponse(parseResponse(response)!, initiate().state, I, PSK)).toBeNull();
  });

  test("any flipped bit in what the AEADs and hashes cover", () => {
    const { state } = initiate();
    fc.assert(
      fc.property(fc.integer({ min: 8 * 8, max: 116 * 8 - 1 }), (bit) => {
        const message = unhex(INITIATION)!;
        message[bit >> 3]! ^= 1 << (bit & 7);
        const parsed = parseInitiation(message)!;
        const opened = openInitiationStatic(parsed, R);
        // The top bit of an X25519 public key has no meaning in the curve operation, but is hashed.
        expect(
          opened && openInitiationTimestamp(parsed, opened, x25519(R.privateKey, opened.remoteStatic)!),
        ).toBeNull();
      }),
      { numRuns: 60 },
    );
    fc.assert(
      fc.property(fc.integer({ min: 12 * 8, max: 60 * 8 - 1 }), (bit) => {
        const message = unhex(RESPONSE)!;
        message[bit >> 3]! ^= 1 << (bit & 7);
        expect(consumeResponse(parseResponse(message)!, state, I, PSK)).toBeNull();
      }),
      { numRuns: 60 },
    );
  });
});

describe("cookies", () => {
  const source = Uint8Array.of(192, 0, 2, 1, 0x12, 0x34);

  function exchange(now = 0) {
    const checker = new CookieChecker(R.publicKey, seededBytes(5));
    const jar = new CookieJar(R.publicKey);
    const { message } = initiate();
    jar.sign(message, now);
    const reply = parseCookieReply(checker.reply(message, SENDER_I, source, now))!;
    return { checker, jar, message, reply };
  }

  test("a cookie makes mac2, which holds for its source only", () => {
    const { checker, jar, message, reply } = exchange();
    expect(checker.checkMac2(message, source, 1)).toBe(false);
    expect(jar.accept(reply, 1)).toBe(true);
    jar.sign(message, 2);
    expect(checker.checkMac2(message, source, 3)).toBe(true);
    expect(checker.checkMac2(message, Uint8Array.of(192, 0, 2, 1, 0x12, 0x35), 3)).toBe(false);
    expect(checker.checkMac2(message, Uint8Array.of(192, 0, 2, 2, 0x12, 0x34), 3)).toBe(false);
  });

  test("after 120 s neither side uses it", () => {
    const { checker, jar, message, reply } = exchange();
    jar.accept(reply, 0);
    jar.sign(message, 119_999);
    expect(checker.checkMac2(message, source, 119_999)).toBe(true);
    expect(checker.checkMac2(message, source, 120_000)).toBe(false);
    const { message: later } = initiate();
    jar.sign(later, 120_000);
    expect(mac2Of(later)).toEqual(new Uint8Array(16));
  });

  test("one reply for one message: a second, a changed or an unasked one is refused", () => {
    const { jar, reply } = exchange();
    expect(new CookieJar(R.publicKey).accept(reply, 0)).toBe(false);
    const changed = { ...reply, encryptedCookie: reply.encryptedCookie.slice() };
    changed.encryptedCookie[3]! ^= 1;
    expect(jar.accept(changed, 0)).toBe(false);
    expect(jar.accept(reply, 0)).toBe(true);
    expect(jar.accept(reply, 0)).toBe(false);
  });
});
