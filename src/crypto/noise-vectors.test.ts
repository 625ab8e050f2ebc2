// Drives Noise's IK and IKpsk2 (the patterns of ts2021 and of WireGuard) with the doors of this folder alone, against
// published handshakes: what the protocol rooms build stands on primitives that are known to fit together.
import { describe, expect, test } from "bun:test";
import { chacha20poly1305Open, chacha20poly1305Seal } from "./aead.ts";
import { blake2s, hkdfBlake2s } from "./blake2s.ts";
import { bytes, vectors } from "./test-support.ts";
import { x25519, x25519Public } from "./x25519.ts";

type NoiseVector = {
  handshake: string;
  init_static: string;
  resp_static: string;
  gen_init_ephemeral: string;
  gen_resp_ephemeral: string;
  prologue?: string;
  preshared_key?: string;
  [message: `msg_${number}_${"payload" | "ciphertext"}`]: string;
};

type Key = Uint8Array;
interface Identity {
  privateKey: Key;
  publicKey: Key;
}

const concat = (...parts: Uint8Array[]) => new Uint8Array(Buffer.concat(parts));
const identity = (hex: string): Identity => ({ privateKey: bytes(hex), publicKey: x25519Public(bytes(hex)) });

/** Noise revision 34, section 5: CipherState and SymmetricState. */
class Symmetric {
  #chainingKey: Uint8Array;
  #hash: Uint8Array;
  #key: Uint8Array | null = null;
  #counter = 0;

  constructor(name: string) {
    const ascii = new TextEncoder().encode(name);
    this.#hash = ascii.length <= 32 ? concat(ascii, new Uint8Array(32 - ascii.length)) : blake2s(ascii);
    this.#chainingKey = this.#hash;
  }

  mixHash(data: Uint8Array): void {
    this.#hash = blake2s(concat(this.#hash, data));
  }

  mixKey(input: Uint8Array): void {
    [this.#chainingKey, this.#key] = hkdfBlake2s(this.#chainingKey, input, 2) as [Key, Key];
    this.#counter = 0;
  }

  mixKeyAndHash(input: Uint8Array): void {
    const [chainingKey, hash, key] = hkdfBlake2s(this.#chainingKey, input, 3) as [Key, Key, Key];
    [this.#chainingKey, this.#key, this.#counter] = [chainingKey, key, 0];
    this.mixHash(hash);
  }

  encrypt(plaintext: Uint8Array): Uint8Array {
    const sealed = chacha20poly1305Seal(this.#key!, nonce(this.#counter++), plaintext, this.#hash);
    this.mixHash(sealed);
    return sealed;
  }

  decrypt(sealed: Uint8Array): Uint8Array {
    const opened = chacha20poly1305Open(this.#key!, nonce(this.#counter++), sealed, this.#hash);
    if (!opened) throw new Error("handshake message refused");
    this.mixHash(sealed);
    return opened;
  }

  split(): [Key, Key] {
    return hkdfBlake2s(this.#chainingKey, new Uint8Array(0), 2) as [Key, Key];
  }
}

function nonce(counter: number): Uint8Array {
  const result = new Uint8Array(12);
  new DataView(result.buffer).setUint32(4, counter, true);
  return result;
}

const dh = (own: Identity, other: Key) => x25519(own.privateKey, other)!;

describe.each(
  vectors<NoiseVector[]>("noise-ik-ikpsk2-25519-chachapoly-blake2s.json").map((v, i) => [i, v.handshake, v] as const),
)("%i: %s", (_i, _name, vector) => {
  const psk = vector.preshared_key ? bytes(vector.preshared_key) : null;
  const initiator = identity(vector.init_static);
  const responder = identity(vector.resp_static);
  const ei = identity(vector.gen_init_ephemeral);
  const er = identity(vector.gen_resp_ephemeral);

  function begin(): Symmetric {
    const s = new Symmetric(vector.handshake);
    s.mixHash(bytes(vector.prologue ?? ""));
    s.mixHash(responder.publicKey);
    return s;
  }
  // In a handshake with a PSK every ephemeral key is mixed into the key too (section 9.2).
  const ephemeral = (s: Symmetric, key: Key) => {
    s.mixHash(key);
    if (psk) s.mixKey(key);
  };

  test("the initiator's and the responder's handshake, and four transport messages", () => {
    expect(psk !== null).toBe(vector.handshake.startsWith("Noise_IKpsk2"));
    const a = begin();
    const b = begin();

    // -> e, es, s, ss
    ephemeral(a, ei.publicKey);
    a.mixKey(dh(ei, responder.publicKey));
    const encryptedStatic = a.encrypt(initiator.publicKey);
    a.mixKey(dh(initiator, responder.publicKey));
    const first = concat(ei.publicKey, encryptedStatic, a.encrypt(bytes(vector.msg_0_payload!)));
    expect(first.toHex()).toBe(vector.msg_0_ciphertext!);

    const remoteEi = first.subarray(0, 32);
    ephemeral(b, remoteEi);
    b.mixKey(dh(responder, remoteEi));
    const remoteStatic = b.decrypt(first.subarray(32, 80));
    expect(remoteStatic).toEqual(initiator.publicKey);
    b.mixKey(dh(responder, remoteStatic));
    expect(b.decrypt(first.subarray(80)).toHex()).toBe(vector.msg_0_payload!);

    // <- e, ee, se (, psk)
    ephemeral(b, er.publicKey);
    b.mixKey(dh(er, remoteEi));
    b.mixKey(dh(er, remoteStatic));
    if (psk) b.mixKeyAndHash(psk);
    const second = concat(er.publicKey, b.encrypt(bytes(vector.msg_1_payload!)));
    expect(second.toHex()).toBe(vector.msg_1_ciphertext!);

    const remoteEr = second.subarray(0, 32);
    ephemeral(a, remoteEr);
    a.mixKey(dh(ei, remoteEr));
    a.mixKey(dh(initiator, remoteEr));
    if (psk) a.mixKeyAndHash(psk);
    expect(a.decrypt(second.subarray(32)).toHex()).toBe(vector.msg_1_payload!);

    const [toResponder, toInitiator] = a.split();
    expect(b.split()).toEqual([toResponder, toInitiator]);
    const counters = [0, 0];
    let transported = 0;
    for (let i = 2; vector[`msg_${i}_payload`] !== undefined; i++, transported++) {
      const direction = i % 2;
      const key = [toResponder, toInitiator][direction]!;
      const n = nonce(counters[direction]!++);
      const [payload, ciphertext] = [bytes(vector[`msg_${i}_payload`]!), bytes(vector[`msg_${i}_ciphertext`]!)];
      expect(chacha20poly1305Seal(key, n, payload)).toEqual(ciphertext);
      expect(chacha20poly1305Open(key, n, ciphertext)).toEqual(payload);
    }
    expect(transported).toBeGreaterThanOrEqual(2);
  });
});
