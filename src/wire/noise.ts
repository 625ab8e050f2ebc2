// Noise of ts2021: the handshake between a node and its control server, and the records after it
// (spec/ts2021-control-protocol.md, sections 4 to 6).
//
//   Noise_IK_25519_ChaChaPoly_BLAKE2s, prologue "Tailscale Control Protocol v<version>", both payloads empty.
//
//   initiation   u16be version | 0x01 | u16be 96 | e_i 32 | sealed machine key 48 | tag 16            101 bytes
//   response     0x02 | u16be 48 | e_r 32 | tag 16                                                     51 bytes
//   error        0x03 | u16be n | n bytes of text, unauthenticated; the connection ends
//   record       0x04 | u16be n | n bytes: ciphertext and tag; the whole frame is at most 4096 bytes
//   early        ff ff ff 'T' 'S' | u32be n | JSON; optional, the first plaintext from server to client
//
// A record's nonce is 4 zero bytes and a 64-bit counter, BIG-endian (Noise itself says little-endian), from 0 in each
// direction. No associated data, no rekeying. Record boundaries carry no meaning; an empty record is legal.
// No I/O and no randomness here: ephemeral keys are handed in.
import { chacha20poly1305Open, chacha20poly1305Seal, chacha20poly1305SealInto } from "../crypto/aead.ts";
import { blake2s, hkdfBlake2s } from "../crypto/blake2s.ts";
import { x25519, x25519Public } from "../crypto/x25519.ts";
import type { EarlyNoise } from "./tailcfg.ts";

export const INITIATION_LENGTH = 101;
export const RESPONSE_LENGTH = 51;
export const MAX_FRAME = 4096;
const HEADER = 3;
const TAG = 16;
/** Most plaintext bytes of one record. */
export const MAX_PLAINTEXT = MAX_FRAME - HEADER - TAG;

const TYPE_INITIATION = 1;
const TYPE_RESPONSE = 2;
const TYPE_ERROR = 3;
const TYPE_RECORD = 4;

const EARLY_MAGIC = Uint8Array.of(0xff, 0xff, 0xff, 0x54, 0x53);
const EARLY_HEADER = EARLY_MAGIC.length + 4;
/** The protocol allows 10 MiB; what servers send is a hundred bytes. */
export const MAX_EARLY_PAYLOAD = 64 * 1024;

/** The other side broke the protocol, or has other keys than we think. The connection is beyond repair. */
export class NoiseError extends Error {
  override name = "NoiseError";
}

/** What a completed handshake leaves behind, named from the holder's side. 32 bytes each. */
export interface NoiseKeys {
  send: Uint8Array;
  receive: Uint8Array;
  /** Channel binding; the same on both sides. */
  handshakeHash: Uint8Array;
}

const PROTOCOL = new TextEncoder().encode("Noise_IK_25519_ChaChaPoly_BLAKE2s");
const EMPTY: Uint8Array = new Uint8Array(0);
const ZERO_NONCE = new Uint8Array(12);

/** The running hash and chaining key. A key made by `mixDH` seals or opens exactly one message. */
class SymmetricState {
  h = blake2s(PROTOCOL);
  private ck = this.h;
  private k: Uint8Array = EMPTY;

  constructor(version: number) {
    this.mixHash(new TextEncoder().encode(`Tailscale Control Protocol v${version}`));
  }

  mixHash(data: Uint8Array): void {
    this.h = blake2s(concat(this.h, data));
  }

  mixDH(privateKey: Uint8Array, publicKey: Uint8Array): void {
    const shared = x25519(privateKey, publicKey);
    if (!shared) throw new NoiseError("Noise handshake: the other side sent a public key of low order");
    [this.ck, this.k] = hkdfBlake2s(this.ck, shared, 2) as [Uint8Array, Uint8Array];
  }

  sealAndMix(plaintext: Uint8Array): Uint8Array {
    const sealed = chacha20poly1305Seal(this.k, ZERO_NONCE, plaintext, this.h);
    this.mixHash(sealed);
    return sealed;
  }

  /** Null when the tag is wrong. */
  openAndMix(sealed: Uint8Array): Uint8Array | null {
    const plaintext = chacha20poly1305Open(this.k, ZERO_NONCE, sealed, this.h);
    if (plaintext) this.mixHash(sealed);
    return plaintext;
  }

  /** [initiator to responder, responder to initiator]. */
  split(): [Uint8Array, Uint8Array] {
    return hkdfBlake2s(this.ck, EMPTY, 2) as [Uint8Array, Uint8Array];
  }
}

export interface InitiatorOptions {
  /** Capability version of the node, 0 to 65535. */
  version: number;
  machinePrivate: Uint8Array;
  /** 32 fresh random bytes. */
  ephemeralPrivate: Uint8Array;
  /** The server's key as `/key` told it. */
  controlPublic: Uint8Array;
}

/** The node's side: send `initiation`, then hand the server's 51 bytes to `finish`, once. */
export class NoiseInitiator {
  /** 101 bytes. */
  readonly initiation: Uint8Array;
  private readonly state: SymmetricState;

  constructor(private readonly options: InitiatorOptions) {
    const { version, machinePrivate, ephemeralPrivate, controlPublic } = options;
    const state = new SymmetricState(version);
    this.state = state;
    state.mixHash(controlPublic);
    const ephemeral = x25519Public(ephemeralPrivate);
    state.mixHash(ephemeral);
    state.mixDH(ephemeralPrivate, controlPublic);
    const sealedMachine = state.sealAndMix(x25519Public(machinePrivate));
    state.mixDH(machinePrivate, controlPublic);
    const tag = state.sealAndMix(EMPTY);
    const header = Uint8Array.of(version >> 8, version & 0xff, TYPE_INITIATION, 0, INITIATION_LENGTH - 5);
    this.initiation = concat(header, ephemeral, sealedMachine, tag);
  }

  /** `response`: the whole frame. Throws NoiseError. */
  finish(response: Uint8Array): NoiseKeys {
    if (response.length !== RESPONSE_LENGTH || response[0] !== TYPE_RESPONSE || readU16(response, 1) !== 48)
      throw new NoiseError(`Noise handshake: expected a response of ${RESPONSE_LENGTH} bytes, got ${response.length}`);
    const { machinePrivate, ephemeralPrivate } = this.options;
    const ephemeral = response.subarray(HEADER, HEADER + 32);
    this.state.mixHash(ephemeral);
    this.state.mixDH(ephemeralPrivate, ephemeral);
    this.state.mixDH(machinePrivate, ephemeral);
    if (!this.state.openAndMix(response.subarray(HEADER + 32)))
      throw new NoiseError("Noise handshake: the server does not hold the key that its /key page names");
    const [send, receive] = this.state.split();
    return { send, receive, handshakeHash: this.state.h };
  }
}

/** The first frame that a server answers, cut from the bytes that have come so far. */
export type HandshakeReply = { response: Uint8Array; rest: Uint8Array } | { error: string };

/** Null while bytes are missing. Throws NoiseError when this can be neither a response nor an error frame. */
export function readHandshakeReply(buffered: Uint8Array): HandshakeReply | null {
  if (buffered.length < HEADER) return null;
  const type = buffered[0];
  const length = readU16(buffered, 1);
  if (type !== TYPE_RESPONSE && type !== TYPE_ERROR)
    throw new NoiseError(`Noise handshake: the server answered with a frame of type ${type}`);
  if (type === TYPE_RESPONSE && length !== RESPONSE_LENGTH - HEADER)
    throw new NoiseError(`Noise handshake: the server's response claims ${length} bytes instead of 48`);
  if (length > MAX_FRAME - HEADER)
    throw new NoiseError(`Noise handshake: the server's error message claims ${length} bytes`);
  const end = HEADER + length;
  if (buffered.length < end) return null;
  if (type === TYPE_ERROR) return { error: new TextDecoder().decode(buffered.subarray(HEADER, end)) };
  return { response: buffered.slice(0, end), rest: buffered.slice(end) };
}

/** The frame that tells a client why its handshake failed. Unauthenticated; close the connection after it. */
export function encodeHandshakeError(message: string): Uint8Array {
  const text = new TextEncoder().encode(message).subarray(0, MAX_FRAME - HEADER);
  return concat(Uint8Array.of(TYPE_ERROR, text.length >> 8, text.length & 0xff), text);
}

export interface ResponderOptions {
  /** 101 bytes, as the client's X-Tailscale-Handshake header carries them. */
  initiation: Uint8Array;
  controlPrivate: Uint8Array;
  /** 32 fresh random bytes. */
  ephemeralPrivate: Uint8Array;
}

export interface Responded {
  /** 51 bytes for the client. */
  response: Uint8Array;
  /** Who called: any machine key completes a handshake, so this authenticates and authorises nothing by itself. */
  machinePublic: Uint8Array;
  /** The client's capability version: not judged here. */
  version: number;
  keys: NoiseKeys;
}

/** The server's side, in one step. Throws NoiseError. */
export function respondToInitiation(options: ResponderOptions): Responded {
  const { initiation, controlPrivate, ephemeralPrivate } = options;
  if (initiation.length !== INITIATION_LENGTH)
    throw new NoiseError(`Noise handshake: an initiation has ${INITIATION_LENGTH} bytes, not ${initiation.length}`);
  if (initiation[2] !== TYPE_INITIATION || readU16(initiation, 3) !== INITIATION_LENGTH - 5)
    throw new NoiseError("Noise handshake: the header of the initiation is wrong");
  const version = readU16(initiation, 0);
  const state = new SymmetricState(version);
  state.mixHash(x25519Public(controlPrivate));
  const clientEphemeral = initiation.subarray(5, 37);
  state.mixHash(clientEphemeral);
  state.mixDH(controlPrivate, clientEphemeral);
  const machinePublic = state.openAndMix(initiation.subarray(37, 85));
  if (!machinePublic) throw new NoiseError("Noise handshake: the initiation was not made for this server's key");
  state.mixDH(controlPrivate, machinePublic);
  if (!state.openAndMix(initiation.subarray(85)))
    throw new NoiseError("Noise handshake: the client does not hold the machine key that it names");
  const ephemeral = x25519Public(ephemeralPrivate);
  state.mixHash(ephemeral);
  state.mixDH(ephemeralPrivate, clientEphemeral);
  state.mixDH(ephemeralPrivate, machinePublic);
  const tag = state.sealAndMix(EMPTY);
  const [receive, send] = state.split();
  const header = Uint8Array.of(TYPE_RESPONSE, 0, RESPONSE_LENGTH - HEADER);
  return {
    response: concat(header, ephemeral, tag),
    machinePublic,
    version,
    keys: { send, receive, handshakeHash: state.h },
  };
}

/** Counter of one direction as a nonce: 4 zero bytes, then 64 bits big-endian. 2^53 records are 30 exabytes. */
class RecordNonce {
  private readonly bytes = new Uint8Array(12);
  private readonly view = new DataView(this.bytes.buffer);
  private counter = 0;

  next(): Uint8Array {
    if (this.counter === Number.MAX_SAFE_INTEGER) throw new NoiseError("Noise: the record counter is used up");
    this.view.setUint32(4, Math.floor(this.counter / 2 ** 32));
    this.view.setUint32(8, this.counter >>> 0);
    this.counter++;
    return this.bytes;
  }
}

/** Plaintext to records, for one direction of one connection. */
export class RecordSealer {
  private readonly nonce = new RecordNonce();

  constructor(private readonly key: Uint8Array) {}

  /** All records of `plaintext`, one after the other. Every byte must reach the wire, in order, or the connection ends. */
  seal(plaintext: Uint8Array): Uint8Array {
    const out = new Uint8Array(sealedLength(plaintext.length));
    this.sealInto(plaintext, out);
    return out;
  }

  /** As `seal`, to the beginning of `out`. Returns how many bytes that are: `sealedLength`. */
  sealInto(plaintext: Uint8Array, out: Uint8Array): number {
    let at = 0;
    for (let from = 0; from < plaintext.length; from += MAX_PLAINTEXT) {
      const isWhole = plaintext.length <= MAX_PLAINTEXT;
      const part = isWhole ? plaintext : plaintext.subarray(from, from + MAX_PLAINTEXT);
      const sealed = chacha20poly1305SealInto(this.key, this.nonce.next(), part, out, at + HEADER);
      out[at] = TYPE_RECORD;
      out[at + 1] = sealed >> 8;
      out[at + 2] = sealed & 0xff;
      at += HEADER + sealed;
    }
    return at;
  }
}

/** Bytes of all records of so many bytes of plaintext. */
export function sealedLength(plaintext: number): number {
  return plaintext + Math.ceil(plaintext / MAX_PLAINTEXT) * (HEADER + TAG);
}

/** Records to plaintext, for one direction. Holds at most one unfinished frame (4096 bytes). */
export class RecordOpener {
  private readonly nonce = new RecordNonce();
  /** Room for a frame, while one is unfinished: thousands of connections lie idle. */
  private partial = EMPTY;
  private have = 0;

  constructor(private readonly key: Uint8Array) {}

  /** The plaintexts that `chunk` completes, without empty ones. Throws NoiseError; nothing may be pushed after that. */
  push(chunk: Uint8Array): Uint8Array[] {
    const out: Uint8Array[] = [];
    let at = 0;
    if (this.have > 0) {
      at = this.fill(chunk, 0, HEADER);
      if (this.have < HEADER) return out;
      const end = frameEnd(this.partial, 0);
      at = this.fill(chunk, at, end);
      if (this.have < end) return out;
      this.have = 0;
      this.open(this.partial.subarray(HEADER, end), out);
      this.partial = EMPTY;
    }
    while (chunk.length - at >= HEADER) {
      const end = frameEnd(chunk, at);
      if (chunk.length < at + end) break;
      this.open(chunk.subarray(at + HEADER, at + end), out);
      at += end;
    }
    this.have = chunk.length - at;
    if (this.have > 0) {
      this.partial = new Uint8Array(MAX_FRAME);
      this.partial.set(chunk.subarray(at));
    }
    return out;
  }

  /** Copies from `chunk` until `upTo` bytes are held; returns the offset behind what was taken. */
  private fill(chunk: Uint8Array, at: number, upTo: number): number {
    const take = Math.max(0, Math.min(upTo - this.have, chunk.length - at));
    this.partial.set(chunk.subarray(at, at + take), this.have);
    this.have += take;
    return at + take;
  }

  private open(sealed: Uint8Array, out: Uint8Array[]): void {
    const plaintext = chacha20poly1305Open(this.key, this.nonce.next(), sealed);
    if (!plaintext) throw new NoiseError("Noise: a record does not decrypt");
    if (plaintext.length > 0) out.push(plaintext);
  }
}

/** Length of the whole frame whose header stands at `at`. */
function frameEnd(bytes: Uint8Array, at: number): number {
  if (bytes[at] !== TYPE_RECORD) throw new NoiseError(`Noise: expected a record, got a frame of type ${bytes[at]}`);
  const length = readU16(bytes, at + 1);
  if (length < TAG || HEADER + length > MAX_FRAME) throw new NoiseError(`Noise: a record claims ${length} bytes`);
  return HEADER + length;
}

export function encodeEarlyPayload(early: EarlyNoise): Uint8Array {
  const json = new TextEncoder().encode(JSON.stringify(early));
  const out = new Uint8Array(EARLY_HEADER + json.length);
  out.set(EARLY_MAGIC);
  new DataView(out.buffer).setUint32(EARLY_MAGIC.length, json.length);
  out.set(json, EARLY_HEADER);
  return out;
}

/** The client's look at the first plaintext bytes: an early payload is taken out, everything else is the stream. */
export class EarlyPayloadReader {
  private buffered: Uint8Array = EMPTY;

  /**
   * Null while it is undecided; then, once, the payload (null: the server sent none) and the bytes behind it, which
   * begin the HTTP/2 stream. Throws NoiseError.
   */
  push(chunk: Uint8Array): { early: EarlyNoise | null; rest: Uint8Array } | null {
    this.buffered = concat(this.buffered, chunk);
    const bytes = this.buffered;
    for (let i = 0; i < Math.min(bytes.length, EARLY_MAGIC.length); i++)
      if (bytes[i] !== EARLY_MAGIC[i]) return { early: null, rest: bytes };
    if (bytes.length < EARLY_HEADER) return null;
    const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(EARLY_MAGIC.length);
    if (length > MAX_EARLY_PAYLOAD) throw new NoiseError(`Noise: the early payload claims ${length} bytes`);
    if (bytes.length < EARLY_HEADER + length) return null;
    const early = parseEarly(bytes.subarray(EARLY_HEADER, EARLY_HEADER + length));
    return { early, rest: bytes.slice(EARLY_HEADER + length) };
  }
}

function parseEarly(json: Uint8Array): EarlyNoise {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder().decode(json));
  } catch {
    throw new NoiseError("Noise: the early payload is no JSON");
  }
  const challenge = (value as Partial<EarlyNoise> | null)?.nodeKeyChallenge;
  return { nodeKeyChallenge: typeof challenge === "string" ? challenge : "" };
}

function readU16(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 8) | bytes[at + 1]!;
}

function concat(...parts: Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
