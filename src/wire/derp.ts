// DERP: packets relayed between peers that are addressed by their node keys. Frames, their bodies, and the login.
//
//   frame        0  u8   type
//                1  u32  payload length, without these 5 bytes
//                5  ...  payload
//
//   01 ServerKey      magic 8 "DERP" U+1F511, server key 32           relay -> client, always the first
//   02 ClientInfo     client key 32, nonce 24, box(JSON)              client -> relay, its first
//   03 ServerInfo     nonce 24, box(JSON)                             relay -> client
//   04 SendPacket     destination key 32, packet                      client -> relay
//   05 RecvPacket     source key 32, packet                           relay -> client
//   06 KeepAlive      empty                                           relay -> client
//   07 NotePreferred  u8 1 home, 0 not                                client -> relay
//   08 PeerGone       key 32, reason u8                               relay -> client
//   09 PeerPresent    key 32, ip 16, port u16, flags u8               relay -> mesh peer
//   0a ForwardPacket  source key 32, destination key 32, packet       mesh peer -> relay
//   10 WatchConns     empty                                           mesh peer -> relay
//   11 ClosePeer      key 32                                          mesh peer -> relay
//   12 Ping, 13 Pong  8 opaque bytes                                  both
//   14 Health         UTF-8 text, empty is well                       relay -> client
//   15 Restarting     reconnect in u32 ms, try for u32 ms             relay -> client
//
// Box is the NaCl box between the client's node key and the relay's key. Unknown types are skipped. Numbers are
// big-endian. spec/derp-wire.md sections 2 to 5.
import { boxBeforeNM, boxOpen, boxSeal } from "../crypto/box.ts";
import { type IP, to16, unmap } from "./ip.ts";

export const DERP_VERSION = 2;
export const FRAME_HEADER = 5;
export const KEY_LENGTH = 32;
export const NONCE_LENGTH = 24;
/** The largest packet that a relay carries, in bytes. */
export const MAX_PACKET = 65536;
/** The largest frame payload that a client reads, in bytes. */
export const MAX_CLIENT_FRAME = 1 << 20;
/** Receive timeout of clients and twice the nominal keep-alive interval of relays. */
export const KEEPALIVE_MS = 60_000;

export const FrameType = {
  ServerKey: 0x01,
  ClientInfo: 0x02,
  ServerInfo: 0x03,
  SendPacket: 0x04,
  RecvPacket: 0x05,
  KeepAlive: 0x06,
  NotePreferred: 0x07,
  PeerGone: 0x08,
  PeerPresent: 0x09,
  ForwardPacket: 0x0a,
  WatchConns: 0x10,
  ClosePeer: 0x11,
  Ping: 0x12,
  Pong: 0x13,
  Health: 0x14,
  Restarting: 0x15,
} as const;

export const PeerGoneReason = { Disconnected: 0x00, NotHere: 0x01 } as const;

/** Bits of PeerPresent's flags. Zero means a relay that does not supply them. */
export const PresentFlag = { Regular: 1, Mesh: 2, Prober: 4, NotIdeal: 8 } as const;

const MAGIC = Uint8Array.of(0x44, 0x45, 0x52, 0x50, 0xf0, 0x9f, 0x94, 0x91);
const DISCO_MAGIC = Uint8Array.of(0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac);
/** Magic 6, sender's disco key 32, nonce 24: less cannot be disco. */
const DISCO_MIN = 62;
const BOX_OVERHEAD = 16;
const utf8 = new TextEncoder();
const fromUtf8 = new TextDecoder("utf-8", { fatal: false });

/** The peer broke the protocol; the message is one sentence, and the connection must end. */
export class DerpError extends Error {
  override name = "DerpError";
}

// ---- decoder ----

/** Largest payload per frame type; -1 for types that are skipped. */
export type FrameLimits = Int32Array;

function limits(entries: [type: number, max: number][]): FrameLimits {
  const table = new Int32Array(256).fill(-1);
  for (const [type, max] of entries) table[type] = max;
  return table;
}

/** What a relay reads. ClientInfo may have 262,144 bytes by the protocol; the longest real one has some 200. */
export const RELAY_LIMITS: FrameLimits = limits([
  [FrameType.ClientInfo, 16_384],
  [FrameType.SendPacket, KEY_LENGTH + MAX_PACKET],
  [FrameType.NotePreferred, 1],
  [FrameType.ForwardPacket, 2 * KEY_LENGTH + MAX_PACKET],
  [FrameType.WatchConns, 0],
  [FrameType.ClosePeer, KEY_LENGTH],
  [FrameType.Ping, 1000],
  [FrameType.Pong, 1000],
]);

/** What a client reads. */
export const CLIENT_LIMITS: FrameLimits = limits([
  [FrameType.ServerKey, 1024],
  [FrameType.ServerInfo, MAX_CLIENT_FRAME],
  [FrameType.RecvPacket, KEY_LENGTH + MAX_PACKET],
  [FrameType.KeepAlive, 1024],
  [FrameType.PeerGone, 1024],
  [FrameType.PeerPresent, 1024],
  [FrameType.Ping, 1024],
  [FrameType.Pong, 1024],
  [FrameType.Health, 65_536],
  [FrameType.Restarting, 1024],
]);

/**
 * One whole frame: its header starts at `buf[at]`, its payload is `buf[at + 5 .. end]`. The bytes lie either in the
 * chunk that was fed or in a buffer made for this frame; the sink may keep them and may write into them.
 * Return false to stop: bytes behind the frame are left unread.
 */
export type FrameSink = (type: number, buf: Uint8Array, at: number, end: number) => boolean;

/**
 * Cuts a byte stream into frames. Holds at most one partial frame, and of that no more than twice what has arrived,
 * unless `expect` says that full-size frames are welcome. Skipped frames are never held.
 */
export class FrameDecoder {
  #limits: FrameLimits;
  #maxSkip: number;
  /** The frame under assembly, header included; its first `#have` bytes are there. */
  #partial = new Uint8Array(FRAME_HEADER);
  #have = 0;
  #skip = 0;
  #eager = false;
  /** Frames of unknown types so far. */
  skipped = 0;

  /** `maxSkip`: the longest frame of an unknown type that is tolerated, in bytes. */
  constructor(limits: FrameLimits, maxSkip = 0xffff_ffff) {
    this.#limits = limits;
    this.#maxSkip = maxSkip;
  }

  /** The peer is known by now: make room for a whole frame as soon as its length is read. */
  expectLargeFrames(): void {
    this.#eager = true;
  }

  /** Bytes of memory that the frame under assembly takes. */
  get buffered(): number {
    return this.#partial.length;
  }

  /** Gives `sink` each whole frame of the stream. Returns how many bytes of `chunk` were used. Throws DerpError. */
  feed(chunk: Uint8Array, sink: FrameSink): number {
    const size = chunk.length;
    let at = 0;
    while (at < size) {
      if (this.#skip > 0) {
        const take = Math.min(this.#skip, size - at);
        this.#skip -= take;
        at += take;
        continue;
      }
      if (this.#have > 0) {
        at += this.#assemble(chunk, at);
        if (this.#have < FRAME_HEADER) return at;
        const frame = this.#partial;
        const total = this.#total(frame, 0);
        if (total < 0) {
          this.#reset();
          continue;
        }
        if (this.#have < total) continue;
        this.#reset();
        if (!sink(frame[0]!, frame, 0, total)) return at;
        continue;
      }
      if (size - at < FRAME_HEADER) {
        at += this.#assemble(chunk, at);
        return at;
      }
      const total = this.#total(chunk, at);
      if (total < 0) {
        at += FRAME_HEADER;
        continue;
      }
      if (size - at < total) {
        this.#grow(total, size - at);
        this.#partial.set(chunk.subarray(at), 0);
        this.#have = size - at;
        return size;
      }
      const start = at;
      at += total;
      if (!sink(chunk[start]!, chunk, start, at)) return at;
    }
    return at;
  }

  /** Length of the frame at `at` with its header; -1 when it is to be skipped, which is noted. */
  #total(buf: Uint8Array, at: number): number {
    const type = buf[at]!;
    const length = ((buf[at + 1]! << 24) | (buf[at + 2]! << 16) | (buf[at + 3]! << 8) | buf[at + 4]!) >>> 0;
    const max = this.#limits[type]!;
    if (max >= 0) {
      if (length <= max) return FRAME_HEADER + length;
      throw new DerpError(`DERP frame 0x${byteHex(type)} has ${length} bytes, more than its maximum of ${max}`);
    }
    if (length > this.#maxSkip)
      throw new DerpError(
        `DERP frame of unknown type 0x${byteHex(type)} has ${length} bytes, more than ${this.#maxSkip}`,
      );
    this.#skip = length;
    this.skipped++;
    return -1;
  }

  /** Moves bytes of `chunk` into the frame under assembly, up to its end or to the end of its header. */
  #assemble(chunk: Uint8Array, at: number): number {
    const total = this.#have < FRAME_HEADER ? FRAME_HEADER : this.#total(this.#partial, 0);
    const take = Math.min(total - this.#have, chunk.length - at);
    this.#grow(total, this.#have + take);
    this.#partial.set(chunk.subarray(at, at + take), this.#have);
    this.#have += take;
    return take;
  }

  #grow(total: number, need: number): void {
    if (this.#partial.length >= need) return;
    const size = this.#eager ? total : Math.min(total, Math.max(2 * need, 256));
    const bigger = new Uint8Array(size);
    bigger.set(this.#partial.subarray(0, this.#have));
    this.#partial = bigger;
  }

  #reset(): void {
    this.#have = 0;
    this.#partial = new Uint8Array(FRAME_HEADER);
  }
}

// ---- frames ----

/** Writes the 5 bytes of a frame header. */
export function putFrameHeader(out: Uint8Array, at: number, type: number, length: number): void {
  out[at] = type;
  out[at + 1] = length >>> 24;
  out[at + 2] = length >>> 16;
  out[at + 3] = length >>> 8;
  out[at + 4] = length;
}

/** A frame whose payload is the parts one after another. */
export function encodeFrame(type: number, ...parts: Uint8Array[]): Uint8Array {
  let length = 0;
  for (const part of parts) length += part.length;
  const out = new Uint8Array(FRAME_HEADER + length);
  putFrameHeader(out, 0, type, length);
  let at = FRAME_HEADER;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

export function encodeServerKey(serverKey: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.ServerKey, MAGIC, serverKey);
}

export function encodeSendPacket(destination: Uint8Array, packet: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.SendPacket, destination, packet);
}

export function encodeRecvPacket(source: Uint8Array, packet: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.RecvPacket, source, packet);
}

export function encodeForwardPacket(source: Uint8Array, destination: Uint8Array, packet: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.ForwardPacket, source, destination, packet);
}

export function encodeKeepAlive(): Uint8Array {
  return encodeFrame(FrameType.KeepAlive);
}

export function encodeNotePreferred(home: boolean): Uint8Array {
  return encodeFrame(FrameType.NotePreferred, Uint8Array.of(home ? 1 : 0));
}

export function encodeWatchConns(): Uint8Array {
  return encodeFrame(FrameType.WatchConns);
}

export function encodeClosePeer(key: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.ClosePeer, key);
}

/** `data`: 8 bytes, which the Pong repeats. */
export function encodePing(data: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.Ping, data);
}

export function encodePong(data: Uint8Array): Uint8Array {
  return encodeFrame(FrameType.Pong, data);
}

export function encodePeerGone(key: Uint8Array, reason: number): Uint8Array {
  return encodeFrame(FrameType.PeerGone, key, Uint8Array.of(reason));
}

/** Relays of old send no reason: that means disconnected. */
export function decodePeerGone(payload: Uint8Array): { key: Uint8Array; reason: number } {
  atLeast("PeerGone", payload, KEY_LENGTH);
  return { key: payload.subarray(0, KEY_LENGTH), reason: payload[KEY_LENGTH] ?? PeerGoneReason.Disconnected };
}

export interface PeerPresent {
  key: Uint8Array;
  /** 4 or 16 bytes; null when the relay does not know. */
  ip: IP | null;
  port: number;
  /** Bits of PresentFlag. */
  flags: number;
}

export function encodePeerPresent(peer: PeerPresent): Uint8Array {
  const tail = new Uint8Array(19);
  if (peer.ip) tail.set(to16(peer.ip), 0);
  tail[16] = peer.port >>> 8;
  tail[17] = peer.port;
  tail[18] = peer.flags;
  return encodeFrame(FrameType.PeerPresent, peer.key, tail);
}

/** Accepts the forms of older relays: key alone (32 bytes), and without flags (50 bytes). */
export function decodePeerPresent(payload: Uint8Array): PeerPresent {
  atLeast("PeerPresent", payload, KEY_LENGTH);
  const key = payload.subarray(0, KEY_LENGTH);
  if (payload.length < 50) return { key, ip: null, port: 0, flags: 0 };
  const ip = payload.slice(32, 48);
  const known = ip.some((byte) => byte !== 0);
  return { key, ip: known ? unmap(ip) : null, port: (payload[48]! << 8) | payload[49]!, flags: payload[50] ?? 0 };
}

export function encodeHealth(problem: string): Uint8Array {
  return encodeFrame(FrameType.Health, utf8.encode(problem));
}

/** The relay's problem in words; empty when it is well. */
export function decodeHealth(payload: Uint8Array): string {
  return fromUtf8.decode(payload);
}

export interface Restarting {
  /** When to reconnect, milliseconds from now. */
  reconnectIn: number;
  /** For how long to try, milliseconds. */
  tryFor: number;
}

export function encodeRestarting(restarting: Restarting): Uint8Array {
  const body = new Uint8Array(8);
  const view = new DataView(body.buffer);
  view.setUint32(0, restarting.reconnectIn);
  view.setUint32(4, restarting.tryFor);
  return encodeFrame(FrameType.Restarting, body);
}

export function decodeRestarting(payload: Uint8Array): Restarting {
  atLeast("Restarting", payload, 8);
  const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
  return { reconnectIn: view.getUint32(0), tryFor: view.getUint32(4) };
}

/** What relays and statistics count as disco: at least 62 bytes that begin with its magic. */
export function isDisco(buf: Uint8Array, at: number, end: number): boolean {
  if (end - at < DISCO_MIN) return false;
  for (let i = 0; i < DISCO_MAGIC.length; i++) if (buf[at + i] !== DISCO_MAGIC[i]) return false;
  return true;
}

function atLeast(name: string, payload: Uint8Array, length: number): void {
  if (payload.length < length)
    throw new DerpError(`DERP frame ${name} has ${payload.length} bytes, fewer than its minimum of ${length}`);
}

function byteHex(byte: number): string {
  return byte.toString(16).padStart(2, "0");
}

// ---- bodies of the login ----

export interface ClientInfo {
  version: number;
  /** 64 hex digits. */
  meshKey?: string;
  canAckPings: boolean;
  isProber: boolean;
  /** Free text for statistics. */
  appName?: string;
}

export interface ServerInfo {
  version: number;
  /** The client limits its own sends to this rate; 0 is no limit. */
  tokenBucketBytesPerSecond: number;
  tokenBucketBytesBurst: number;
}

function encodeClientInfo(info: Partial<ClientInfo>): Uint8Array {
  const json = {
    ...(info.meshKey ? { meshKey: info.meshKey } : {}),
    version: info.version ?? DERP_VERSION,
    CanAckPings: info.canAckPings ?? true,
    ...(info.isProber ? { IsProber: true } : {}),
    ...(info.appName ? { AppName: info.appName } : {}),
  };
  return utf8.encode(JSON.stringify(json));
}

function decodeClientInfo(plaintext: Uint8Array): ClientInfo {
  const fields = jsonObject("ClientInfo", plaintext);
  const meshKey = fields.get("meshkey");
  const appName = fields.get("appname");
  return {
    version: whole(fields.get("version")),
    ...(typeof meshKey === "string" ? { meshKey } : {}),
    canAckPings: fields.get("canackpings") === true,
    isProber: fields.get("isprober") === true,
    ...(typeof appName === "string" ? { appName } : {}),
  };
}

function encodeServerInfo(info: Partial<ServerInfo>): Uint8Array {
  const rate = info.tokenBucketBytesPerSecond ?? 0;
  const json = {
    version: info.version ?? DERP_VERSION,
    ...(rate > 0
      ? {
          TokenBucketBytesPerSecond: rate,
          TokenBucketBytesBurst: info.tokenBucketBytesBurst || KEY_LENGTH + MAX_PACKET,
        }
      : {}),
  };
  return utf8.encode(JSON.stringify(json));
}

function decodeServerInfo(plaintext: Uint8Array): ServerInfo {
  const fields = jsonObject("ServerInfo", plaintext);
  return {
    version: whole(fields.get("version")),
    tokenBucketBytesPerSecond: whole(fields.get("tokenbucketbytespersecond")),
    tokenBucketBytesBurst: whole(fields.get("tokenbucketbytesburst")),
  };
}

/** Field names in lower case, since the reference matches them without regard to case. */
function jsonObject(name: string, plaintext: Uint8Array): Map<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(fromUtf8.decode(plaintext));
  } catch {
    throw new DerpError(`DERP ${name} is not JSON`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new DerpError(`DERP ${name} is not a JSON object`);
  return new Map(Object.entries(value).map(([key, field]) => [key.toLowerCase(), field]));
}

/** A whole number from 0 to 2^53 - 1; everything else counts as 0. */
function whole(value: unknown): number {
  return typeof value === "number" && Number.isSafeInteger(value) && value > 0 ? value : 0;
}

// ---- login ----

/** The relay's side of a login: greet, read ClientInfo, answer with ServerInfo. Nonces are handed in. */
export class ServerLogin {
  /** The first frame on the connection, sent before anything is read. */
  readonly greeting: Uint8Array;
  #privateKey: Uint8Array;
  #shared: Uint8Array | null = null;

  constructor(privateKey: Uint8Array, publicKey: Uint8Array) {
    this.#privateKey = privateKey;
    this.greeting = encodeServerKey(publicKey);
  }

  /** Proves that the client holds the key that it claims. Throws DerpError; the relay then closes without a word. */
  receiveClientInfo(payload: Uint8Array): { clientKey: Uint8Array; info: ClientInfo } {
    atLeast("ClientInfo", payload, KEY_LENGTH + NONCE_LENGTH);
    const clientKey = payload.slice(0, KEY_LENGTH);
    const shared = boxBeforeNM(this.#privateKey, clientKey);
    const nonce = payload.subarray(KEY_LENGTH, KEY_LENGTH + NONCE_LENGTH);
    const plaintext = shared && boxOpen(shared, nonce, payload.subarray(KEY_LENGTH + NONCE_LENGTH));
    if (!plaintext) throw new DerpError("DERP ClientInfo does not open under the key that it claims");
    const info = decodeClientInfo(plaintext);
    this.#shared = shared;
    return { clientKey, info };
  }

  /** The ServerInfo frame. `nonce`: 24 random bytes. */
  serverInfo(nonce: Uint8Array, info: Partial<ServerInfo> = {}): Uint8Array {
    if (!this.#shared) throw new Error("ServerInfo needs a ClientInfo first");
    return encodeFrame(FrameType.ServerInfo, nonce, boxSeal(this.#shared, nonce, encodeServerInfo(info)));
  }
}

/**
 * The client's side of a login. A client that knows the relay's key beforehand (fast start) sends `clientInfo` at once
 * and later skips ServerKey; otherwise ServerKey must be the first frame that it reads.
 */
export class ClientLogin {
  #privateKey: Uint8Array;
  #publicKey: Uint8Array;
  #serverKey: Uint8Array | null;
  #shared: Uint8Array | null = null;

  constructor(keys: { privateKey: Uint8Array; publicKey: Uint8Array; serverKey?: Uint8Array }) {
    this.#privateKey = keys.privateKey;
    this.#publicKey = keys.publicKey;
    this.#serverKey = keys.serverKey ?? null;
  }

  /** The relay's key, once known. */
  get serverKey(): Uint8Array | null {
    return this.#serverKey;
  }

  /** Reads the payload of the ServerKey frame. Throws DerpError, also when the key is another than the known one. */
  receiveServerKey(payload: Uint8Array): void {
    atLeast("ServerKey", payload, MAGIC.length + KEY_LENGTH);
    if (!MAGIC.every((byte, i) => payload[i] === byte))
      throw new DerpError("DERP ServerKey does not begin with the DERP magic");
    const key = payload.slice(MAGIC.length, MAGIC.length + KEY_LENGTH);
    if (this.#serverKey && !this.#serverKey.every((byte, i) => key[i] === byte))
      throw new DerpError("the DERP server presents another key than the one expected of it");
    this.#serverKey = key;
  }

  /** The ClientInfo frame. `nonce`: 24 random bytes. */
  clientInfo(nonce: Uint8Array, info: Partial<ClientInfo> = {}): Uint8Array {
    if (!this.#serverKey) throw new Error("ClientInfo needs the server's key first");
    this.#shared = boxBeforeNM(this.#privateKey, this.#serverKey);
    if (!this.#shared) throw new DerpError("the DERP server presents a key that no secret can be shared with");
    return encodeFrame(
      FrameType.ClientInfo,
      this.#publicKey,
      nonce,
      boxSeal(this.#shared, nonce, encodeClientInfo(info)),
    );
  }

  /** Opens ServerInfo, the proof that the relay holds its key. Throws DerpError. */
  receiveServerInfo(payload: Uint8Array): ServerInfo {
    atLeast("ServerInfo", payload, NONCE_LENGTH + BOX_OVERHEAD);
    const nonce = payload.subarray(0, NONCE_LENGTH);
    const plaintext = this.#shared && boxOpen(this.#shared, nonce, payload.subarray(NONCE_LENGTH));
    if (!plaintext) throw new DerpError("DERP ServerInfo does not open under the server's key");
    return decodeServerInfo(plaintext);
  }
}
