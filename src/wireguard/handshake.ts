// The Noise handshake of WireGuard, Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s (spec/datapath-wire.md 1.1, 1.3, 1.4; WireGuard
// paper section 5.4). Functions from keys and bytes to keys and bytes: no state of a peer, no randomness. MACs are added
// by cookie.ts.
//
// Names: S static, E ephemeral, _i initiator, _r responder; ck the chaining key, h the running hash.
import { chacha20poly1305Open, chacha20poly1305Seal } from "../crypto/aead.ts";
import { blake2s, hkdfBlake2s } from "../crypto/blake2s.ts";
import { unhex, wipe } from "../crypto/keys.ts";
import { x25519, x25519Public } from "../crypto/x25519.ts";
import { buildInitiation, buildResponse, type Initiation, type Response } from "../wire/wireguard.ts";

const EMPTY = new Uint8Array(0);
const NONCE_ZERO = new Uint8Array(12);
/** HASH("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"). */
export const INITIAL_CHAINING_KEY = unhex("60e26daef327efc02ec335e2a025d2d016eb4206f87277f52d38d1988b78cd36")!;
/** HASH(initial chaining key || "WireGuard v1 zx2c4 Jason@zx2c4.com"). */
export const INITIAL_HASH = unhex("2211b361081ac566691243db458ad5322d9c6c662293e8b70ee19c65ba079ef3")!;

/** Our key pair. */
export interface Identity {
  privateKey: Uint8Array;
  publicKey: Uint8Array;
}

/** Transport keys, 32 bytes each. */
export interface TransportKeys {
  send: Uint8Array;
  receive: Uint8Array;
}

/** What the initiator keeps until the response. */
export interface InitiatorState {
  chainingKey: Uint8Array;
  hash: Uint8Array;
  ephemeralPrivate: Uint8Array;
}

/** What the responder knows after opening the static key of an initiation. */
export interface ResponderState {
  chainingKey: Uint8Array;
  hash: Uint8Array;
  remoteStatic: Uint8Array;
  remoteEphemeral: Uint8Array;
}

function mixHash(hash: Uint8Array, data: Uint8Array): Uint8Array {
  const joined = new Uint8Array(hash.length + data.length);
  joined.set(hash);
  joined.set(data, hash.length);
  return blake2s(joined);
}

/** KDF1: replaces the chaining key; the old one is wiped, unless it is the constant start. */
function mixKey(state: { chainingKey: Uint8Array }, input: Uint8Array): void {
  const [next] = hkdfBlake2s(state.chainingKey, input, 1);
  forget(state.chainingKey);
  state.chainingKey = next!;
}

/** KDF2: replaces the chaining key and returns an AEAD key. */
function mixKeyAndDerive(state: { chainingKey: Uint8Array }, input: Uint8Array): Uint8Array {
  const [next, key] = hkdfBlake2s(state.chainingKey, input, 2);
  forget(state.chainingKey);
  state.chainingKey = next!;
  return key!;
}

function forget(chainingKey: Uint8Array): void {
  if (chainingKey !== INITIAL_CHAINING_KEY) wipe(chainingKey);
}

/** `shared` is wiped. False when it is null: an all-zero shared secret. */
function mixShared(state: { chainingKey: Uint8Array }, shared: Uint8Array | null): boolean {
  if (!shared) return false;
  mixKey(state, shared);
  wipe(shared);
  return true;
}

function sealAndMix(state: { hash: Uint8Array }, key: Uint8Array, plaintext: Uint8Array): Uint8Array {
  const sealed = chacha20poly1305Seal(key, NONCE_ZERO, plaintext, state.hash);
  wipe(key);
  state.hash = mixHash(state.hash, sealed);
  return sealed;
}

/** Null, and the hash as it was, when the tag is wrong. */
function openAndMix(state: { hash: Uint8Array }, key: Uint8Array, sealed: Uint8Array): Uint8Array | null {
  const plaintext = chacha20poly1305Open(key, NONCE_ZERO, sealed, state.hash);
  wipe(key);
  if (plaintext) state.hash = mixHash(state.hash, sealed);
  return plaintext;
}

export interface InitiationInput {
  identity: Identity;
  remoteStatic: Uint8Array;
  /** DH(s_i, S_r), which is the same for every handshake with this peer. */
  staticShared: Uint8Array;
  /** Kept in the state: the caller gives it away. */
  ephemeralPrivate: Uint8Array;
  sender: number;
  /** TAI64N, 12 bytes. */
  timestamp: Uint8Array;
}

/** Null when the peer's static key is a point of low order. */
export function createInitiation(input: InitiationInput): { message: Uint8Array; state: InitiatorState } | null {
  const state: InitiatorState = {
    chainingKey: INITIAL_CHAINING_KEY,
    hash: mixHash(INITIAL_HASH, input.remoteStatic),
    ephemeralPrivate: input.ephemeralPrivate,
  };
  const ephemeral = x25519Public(input.ephemeralPrivate);
  mixKey(state, ephemeral);
  state.hash = mixHash(state.hash, ephemeral);
  const es = x25519(input.ephemeralPrivate, input.remoteStatic);
  if (!es) return null;
  const staticKey = mixKeyAndDerive(state, es);
  wipe(es);
  const encryptedStatic = sealAndMix(state, staticKey, input.identity.publicKey);
  const timestampKey = mixKeyAndDerive(state, input.staticShared);
  const encryptedTimestamp = sealAndMix(state, timestampKey, input.timestamp);
  return { message: buildInitiation({ sender: input.sender, ephemeral, encryptedStatic, encryptedTimestamp }), state };
}

/** First half of reading an initiation: who sends it. Null when it was not sealed for us. */
export function openInitiationStatic(message: Initiation, identity: Identity): ResponderState | null {
  const state: ResponderState = {
    chainingKey: INITIAL_CHAINING_KEY,
    hash: mixHash(INITIAL_HASH, identity.publicKey),
    remoteStatic: EMPTY,
    remoteEphemeral: message.ephemeral.slice(),
  };
  mixKey(state, state.remoteEphemeral);
  state.hash = mixHash(state.hash, state.remoteEphemeral);
  const es = x25519(identity.privateKey, state.remoteEphemeral);
  if (!es) return null;
  const key = mixKeyAndDerive(state, es);
  wipe(es);
  const remoteStatic = openAndMix(state, key, message.encryptedStatic);
  if (!remoteStatic) return null;
  state.remoteStatic = remoteStatic;
  return state;
}

/** Second half: the sender proves that it holds its static key. The TAI64N timestamp, or null. */
export function openInitiationTimestamp(
  message: Initiation,
  state: ResponderState,
  staticShared: Uint8Array,
): Uint8Array | null {
  const key = mixKeyAndDerive(state, staticShared);
  return openAndMix(state, key, message.encryptedTimestamp);
}

export interface ResponseInput {
  state: ResponderState;
  ephemeralPrivate: Uint8Array;
  presharedKey: Uint8Array;
  sender: number;
  receiver: number;
}

/** Uses `state` and the ephemeral key up (both are wiped). Null when the initiator's ephemeral or static key is of low order. */
export function createResponse(input: ResponseInput): { message: Uint8Array; keys: TransportKeys } | null {
  const { state } = input;
  const ephemeral = x25519Public(input.ephemeralPrivate);
  state.hash = mixHash(state.hash, ephemeral);
  mixKey(state, ephemeral);
  const complete =
    mixShared(state, x25519(input.ephemeralPrivate, state.remoteEphemeral)) &&
    mixShared(state, x25519(input.ephemeralPrivate, state.remoteStatic));
  wipe(input.ephemeralPrivate);
  if (!complete) {
    forget(state.chainingKey);
    return null;
  }
  const key = mixPresharedKey(state, input.presharedKey);
  const encryptedNothing = sealAndMix(state, key, EMPTY);
  const [first, second] = deriveTransportKeys(state);
  return {
    message: buildResponse({ sender: input.sender, receiver: input.receiver, ephemeral, encryptedNothing }),
    keys: { send: second, receive: first },
  };
}

/** Null when the response does not belong to `state`, which then is unchanged and may still meet its real response. */
export function consumeResponse(
  message: Response,
  initiator: InitiatorState,
  identity: Identity,
  presharedKey: Uint8Array,
): TransportKeys | null {
  const ephemeral = message.ephemeral.slice();
  const state = { chainingKey: initiator.chainingKey.slice(), hash: mixHash(initiator.hash, ephemeral) };
  mixKey(state, ephemeral);
  const complete =
    mixShared(state, x25519(initiator.ephemeralPrivate, ephemeral)) &&
    mixShared(state, x25519(identity.privateKey, ephemeral));
  if (!complete) {
    wipe(state.chainingKey);
    return null;
  }
  const key = mixPresharedKey(state, presharedKey);
  if (!openAndMix(state, key, message.encryptedNothing)) {
    wipe(state.chainingKey);
    return null;
  }
  const [first, second] = deriveTransportKeys(state);
  return { send: first, receive: second };
}

export function wipeInitiator(state: InitiatorState): void {
  wipe(state.chainingKey);
  wipe(state.hash);
  wipe(state.ephemeralPrivate);
}

function mixPresharedKey(state: { chainingKey: Uint8Array; hash: Uint8Array }, presharedKey: Uint8Array): Uint8Array {
  const [next, tau, key] = hkdfBlake2s(state.chainingKey, presharedKey, 3);
  wipe(state.chainingKey);
  state.chainingKey = next!;
  state.hash = mixHash(state.hash, tau!);
  wipe(tau!);
  return key!;
}

function deriveTransportKeys(state: { chainingKey: Uint8Array }): [Uint8Array, Uint8Array] {
  const [first, second] = hkdfBlake2s(state.chainingKey, EMPTY, 2);
  wipe(state.chainingKey);
  return [first!, second!];
}
