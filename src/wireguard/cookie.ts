// mac1, mac2 and cookies (spec/datapath-wire.md 1.5; WireGuard paper section 5.4.4, 5.4.7). mac1 proves that the sender
// knows our public key and costs no curve operation to check; under load mac2 proves that the sender receives at the
// address that it sends from.
import { xchacha20poly1305Open, xchacha20poly1305Seal } from "../crypto/aead.ts";
import { blake2s } from "../crypto/blake2s.ts";
import { constantTimeEqual, wipe } from "../crypto/keys.ts";
import { buildCookieReply, type CookieReply, MAC_SIZE, mac1Of, mac2Of, macOffset } from "../wire/wireguard.ts";
import { COOKIE_REFRESH_TIME } from "./constants.ts";

const LABEL_MAC1 = new TextEncoder().encode("mac1----");
const LABEL_COOKIE = new TextEncoder().encode("cookie--");

function labelled(label: Uint8Array, publicKey: Uint8Array): Uint8Array {
  const joined = new Uint8Array(label.length + publicKey.length);
  joined.set(label);
  joined.set(publicKey, label.length);
  return blake2s(joined);
}

function mac(key: Uint8Array, data: Uint8Array): Uint8Array {
  return blake2s(data, { key, length: MAC_SIZE });
}

/** The receiving side: checks MACs of messages for us and makes cookie replies. */
export class CookieChecker {
  readonly #mac1Key: Uint8Array;
  readonly #cookieKey: Uint8Array;
  readonly #random: (n: number) => Uint8Array;
  #secret: Uint8Array | null = null;
  #secretMade = 0;

  constructor(publicKey: Uint8Array, random: (n: number) => Uint8Array) {
    this.#mac1Key = labelled(LABEL_MAC1, publicKey);
    this.#cookieKey = labelled(LABEL_COOKIE, publicKey);
    this.#random = random;
  }

  checkMac1(message: Uint8Array): boolean {
    return constantTimeEqual(mac(this.#mac1Key, message.subarray(0, macOffset(message))), mac1Of(message));
  }

  /** `source`: address and port as bytes; any encoding, as only we read it. */
  checkMac2(message: Uint8Array, source: Uint8Array, now: number): boolean {
    if (!this.#secret || now - this.#secretMade >= COOKIE_REFRESH_TIME) return false;
    const cookie = mac(this.#secret, source);
    return constantTimeEqual(mac(cookie, message.subarray(0, message.length - MAC_SIZE)), mac2Of(message));
  }

  /** `sender` is the sender index of `message`. */
  reply(message: Uint8Array, sender: number, source: Uint8Array, now: number): Uint8Array {
    if (!this.#secret || now - this.#secretMade >= COOKIE_REFRESH_TIME) {
      if (this.#secret) wipe(this.#secret);
      this.#secret = this.#random(32);
      this.#secretMade = now;
    }
    return this.seal(mac(this.#secret, source), mac1Of(message), sender, this.#random(24));
  }

  /** The cookie reply itself, apart from where cookie and nonce come from. */
  seal(cookie: Uint8Array, mac1: Uint8Array, receiver: number, nonce: Uint8Array): Uint8Array {
    const encryptedCookie = xchacha20poly1305Seal(this.#cookieKey, nonce, cookie, mac1);
    return buildCookieReply({ receiver, nonce, encryptedCookie });
  }
}

/** The sending side, one per peer: writes MACs into our messages and keeps the cookie that the peer gave us. */
export class CookieJar {
  readonly #mac1Key: Uint8Array;
  readonly #cookieKey: Uint8Array;
  #lastMac1: Uint8Array | null = null;
  #cookie: Uint8Array | null = null;
  #received = 0;

  constructor(remotePublicKey: Uint8Array) {
    this.#mac1Key = labelled(LABEL_MAC1, remotePublicKey);
    this.#cookieKey = labelled(LABEL_COOKIE, remotePublicKey);
  }

  /** Fills in mac1, and mac2 when there is a fresh cookie. */
  sign(message: Uint8Array, now: number): void {
    const mac1 = mac(this.#mac1Key, message.subarray(0, macOffset(message)));
    mac1Of(message).set(mac1);
    this.#lastMac1 = mac1;
    if (!this.#cookie) return;
    if (now - this.#received >= COOKIE_REFRESH_TIME) this.wipe();
    else mac2Of(message).set(mac(this.#cookie, message.subarray(0, message.length - MAC_SIZE)));
  }

  /** False when the reply answers nothing that we sent. The cookie is used from the next message on. */
  accept(reply: CookieReply, now: number): boolean {
    if (!this.#lastMac1) return false;
    const cookie = xchacha20poly1305Open(this.#cookieKey, reply.nonce, reply.encryptedCookie, this.#lastMac1);
    if (!cookie) return false;
    this.#lastMac1 = null;
    this.#cookie = cookie;
    this.#received = now;
    return true;
  }

  wipe(): void {
    if (this.#cookie) wipe(this.#cookie);
    this.#cookie = null;
  }
}
