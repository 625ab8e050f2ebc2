// The server's side of one HTTP/2 connection (RFC 9113), as the control protocol needs it inside Noise: requests come in,
// answers go out, some of them stay open for days. Bytes in by `receive`, frames out by `Http2Peer.send`; no I/O, no clock.
//
//   preface   "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", then a SETTINGS frame                                        section 3.4
//   frame     u24be length | u8 type | u8 flags | u32be stream (top bit ignored) | length bytes                      4.1
//
//   0 DATA            [u8 padding] | bytes | padding           END_STREAM 0x1, PADDED 0x8                            6.1
//   1 HEADERS         [u8 padding] [u32be, u8: priority] | HPACK | padding
//                                                              END_STREAM, END_HEADERS 0x4, PADDED, PRIORITY 0x20    6.2
//   2 PRIORITY        5 bytes, ignored                                                                               6.3
//   3 RST_STREAM      u32be code                                                                                     6.4
//   4 SETTINGS        { u16be id | u32be value }…              ACK 0x1                                               6.5
//   5 PUSH_PROMISE    never from a client                                                                            6.6
//   6 PING            8 bytes                                  ACK                                                   6.7
//   7 GOAWAY          u32be last stream | u32be code | text                                                          6.8
//   8 WINDOW_UPDATE   u32be increment (31 bits)                                                                      6.9
//   9 CONTINUATION    HPACK                                    END_HEADERS                                          6.10
//   others            ignored                                                                                        4.1
//
// What a peer can make this side hold or do is bounded (section 10.5): see LIMITS. Whoever exceeds one gets GOAWAY.
import { Buffer } from "node:buffer";
import { encodeHeaderBlock, type HeaderField, HeaderListTooLarge, HpackDecoder, HpackError } from "./hpack.ts";

const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const FRAME_HEADER = 9;

const DATA = 0;
const HEADERS = 1;
const PRIORITY = 2;
const RST_STREAM = 3;
const SETTINGS = 4;
const PUSH_PROMISE = 5;
const PING = 6;
const GOAWAY = 7;
const WINDOW_UPDATE = 8;
const CONTINUATION = 9;

const ACK = 0x1;
const END_STREAM = 0x1;
const END_HEADERS = 0x4;
const PADDED = 0x8;
const WITH_PRIORITY = 0x20;

const SETTINGS_ENABLE_PUSH = 2;
const SETTINGS_MAX_CONCURRENT_STREAMS = 3;
const SETTINGS_INITIAL_WINDOW_SIZE = 4;
const SETTINGS_MAX_FRAME_SIZE = 5;
const SETTINGS_MAX_HEADER_LIST_SIZE = 6;

/** Section 7. */
export const H2_ERROR = {
  NO_ERROR: 0,
  PROTOCOL_ERROR: 1,
  INTERNAL_ERROR: 2,
  FLOW_CONTROL_ERROR: 3,
  STREAM_CLOSED: 5,
  FRAME_SIZE_ERROR: 6,
  REFUSED_STREAM: 7,
  CANCEL: 8,
  COMPRESSION_ERROR: 9,
  ENHANCE_YOUR_CALM: 11,
} as const;

/** Windows and frame size before anything was agreed (section 6.5.2). */
const DEFAULT_WINDOW = 65_535;
const MAX_WINDOW = 2 ** 31 - 1;
const MAX_FRAME = 16_384;
/** What a client may send of one body before more is allowed; allowed again as it is taken. */
const STREAM_WINDOW = 1 << 20;

export const LIMITS = {
  /** Open at a time; one more is refused. */
  streams: 100,
  /** Bytes of a header block, compressed, and of its fields as HPACK counts them. */
  headerList: 64 * 1024,
  /** CONTINUATION frames of one header block. */
  continuations: 32,
  /** Frames in a row that bring nothing forward: PING, SETTINGS, PRIORITY, empty DATA, for streams that are over … */
  idleFrames: 10_000,
  /** Frames that we owe while the peer does not read. */
  unreadReplies: 1_000,
  /** Requests taken back by the client, less those that were answered. */
  resets: 1_000,
  /** Bytes of answers that wait for the client, in all. */
  pending: 32 << 20,
} as const;

/** What the connection needs of the world. */
export interface Http2Peer {
  /** Bytes for the other side, in order; they are shared and must be taken or copied before this returns. */
  send(bytes: Uint8Array): void;
  /** All that was sent must go out now. */
  flush(): void;
  /** A request's fields; `:method` and `:path` are there. Its body, if any, follows after this returns. */
  request(stream: Http2Stream, headers: Headers): void;
  /** The answer to `ping`. */
  pong(): void;
  /** The connection is over; `send` has had the last words. */
  end(): void;
}

export type Headers = ReadonlyMap<string, string>;

/** The connection cannot go on. */
class ConnectionError extends Error {
  constructor(
    readonly code: number,
    message: string,
  ) {
    super(message);
  }
}

/** One request and its answer. Everything may be called at any time; on a stream that is over it does nothing. */
export class Http2Stream {
  /** Of the request's body. The bytes may be kept. */
  onData: ((bytes: Uint8Array) => void) | null = null;
  /** The request is complete. */
  onEnd: (() => void) | null = null;
  /** What `write` could not send at once has been sent. */
  onDrain: (() => void) | null = null;
  /** @internal */ readonly pending: Uint8Array[] = [];
  /** @internal */ sendWindow: number;
  /** @internal Bytes that came and were not yet allowed again. */ taken = 0;
  /** @internal */ isEnding = false;
  /** @internal */ isLocalOver = false;
  /** @internal */ isRemoteOver = false;
  /** @internal */ expected: number | null = null;
  /** @internal */ received = 0;
  private readonly closeListeners: (() => void)[] = [];
  private over = false;
  private answered = false;

  constructor(
    private readonly connection: Http2Connection,
    /** @internal */ readonly id: number,
    private readonly method: string,
    sendWindow: number,
  ) {
    this.sendWindow = sendWindow;
  }

  /** Nothing more can be sent. */
  get isClosed(): boolean {
    return this.over || this.isEnding;
  }

  get isAnswered(): boolean {
    return this.answered;
  }

  /** Calls `then` when the client has come to what was sent until now. */
  whenReached(then: () => void): void {
    if (!this.isClosed) this.connection.ping(then);
  }

  /** Called once, when both sides are done or either has broken off. */
  onClose(listener: () => void): void {
    if (this.over) listener();
    else this.closeListeners.push(listener);
  }

  /** The head of the answer; with `body` the whole of it. */
  respond(status: number, headers: Record<string, string> = {}, body?: Uint8Array): void {
    if (this.isClosed || this.answered) return;
    this.answered = true;
    // These have no body, whatever it would be.
    const isEmpty = this.method === "HEAD" || status === 204 || status === 304 || body?.length === 0;
    this.connection.cork();
    this.connection.sendHead(this, status, headers, isEmpty);
    if (body && !isEmpty) this.end(body);
    this.connection.uncork();
  }

  /** False: not all of it went out. It waits, and `onDrain` tells when it has gone; nothing should be written until then. */
  write(bytes: Uint8Array): boolean {
    if (this.isClosed || !this.answered) return true;
    return this.connection.sendData(this, bytes);
  }

  /** What is written from here on goes out together, at the latest at `uncork`: one for each `cork`. */
  cork(): void {
    this.connection.cork();
  }

  uncork(): void {
    this.connection.uncork();
  }

  end(bytes?: Uint8Array): void {
    if (this.isClosed || !this.answered) return;
    this.isEnding = true;
    this.connection.sendData(this, bytes ?? EMPTY);
  }

  /** Breaks off. */
  reset(code: number): void {
    if (!this.over) this.connection.resetStream(this, code);
  }

  /** @internal */
  close(): void {
    if (this.over) return;
    this.over = true;
    this.pending.length = 0;
    for (const listener of this.closeListeners.splice(0)) listener();
  }
}

/** A header block of which CONTINUATION frames are awaited. */
interface OpenBlock {
  id: number;
  endsStream: boolean;
  parts: Uint8Array[];
  length: number;
}

const EMPTY: Uint8Array = new Uint8Array(0);
/** The header of the frame that is just being sent. */
const head = Buffer.alloc(FRAME_HEADER);

export class Http2Connection {
  private readonly streams = new Map<number, Http2Stream>();
  private readonly hpack = new HpackDecoder();
  private state: "preface" | "settings" | "open" | "over" = "preface";
  /** A frame of which the rest is to come; `have` bytes of it are there. */
  private held = EMPTY;
  private have = 0;
  private block: OpenBlock | null = null;
  /** Streams that this side has broken off lately: what the client had already sent for them is passed over (section 5.1). */
  private readonly brokenOff: number[] = [];
  /** The last request of the client that was looked at. */
  private lastId = 0;
  private peerWindow = DEFAULT_WINDOW;
  private sendWindow = DEFAULT_WINDOW;
  /** Bytes that came and were not yet allowed again. */
  private taken = 0;
  private isBlocked = false;
  private corks = 0;
  private pendingBytes = 0;
  private idleFrames = 0;
  private unreadReplies = 0;
  private resets = 0;
  /** What waits for the answer to a PING of ours, in their order. */
  private readonly pings: (() => void)[] = [];

  constructor(private readonly peer: Http2Peer) {}

  /** Our settings: once, before anything else. */
  start(): void {
    const settings = [
      [SETTINGS_MAX_CONCURRENT_STREAMS, LIMITS.streams],
      [SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW],
      [SETTINGS_MAX_HEADER_LIST_SIZE, LIMITS.headerList],
    ] as const;
    const payload = Buffer.alloc(settings.length * 6);
    for (const [i, [id, value]] of settings.entries()) {
      payload.writeUInt16BE(id, i * 6);
      payload.writeUInt32BE(value, i * 6 + 2);
    }
    this.sendFrame(SETTINGS, 0, 0, payload);
    this.flush();
  }

  get openStreams(): number {
    return this.streams.size;
  }

  receive(bytes: Uint8Array): void {
    this.cork();
    try {
      this.parse(bytes);
    } catch (error) {
      if (error instanceof ConnectionError) this.fail(error.code, error.message);
      else if (error instanceof HpackError) this.fail(H2_ERROR.COMPRESSION_ERROR, error.message);
      else if (error instanceof HeaderListTooLarge) this.fail(H2_ERROR.ENHANCE_YOUR_CALM, error.message);
      else throw error;
    } finally {
      this.uncork();
    }
  }

  /** The way out is full: answers wait from here on. */
  pause(): void {
    this.isBlocked = true;
  }

  /** There is room again. */
  resume(): void {
    if (this.state === "over") return;
    this.isBlocked = false;
    this.unreadReplies = 0;
    this.cork();
    this.pump();
    this.uncork();
  }

  ping(then: () => void = () => {}): void {
    if (this.state === "over") return;
    this.pings.push(then);
    this.sendFrame(PING, 0, 0, new Uint8Array(8));
    this.flush();
  }

  /** The connection is gone: all streams are over. */
  close(): void {
    this.state = "over";
    for (const stream of this.streams.values()) {
      this.streams.delete(stream.id);
      stream.close();
    }
  }

  /** @internal */
  cork(): void {
    this.corks++;
  }

  /** @internal */
  uncork(): void {
    this.corks--;
    this.flush();
  }

  /** @internal */
  sendHead(stream: Http2Stream, status: number, headers: Record<string, string>, isLast: boolean): void {
    const fields: HeaderField[] = [[":status", `${status}`], ...Object.entries(headers)];
    const block = encodeHeaderBlock(fields);
    if (block.length > MAX_FRAME) throw new RangeError(`the head of an answer has ${block.length} bytes`);
    this.sendFrame(HEADERS, END_HEADERS | (isLast ? END_STREAM : 0), stream.id, block);
    if (!isLast) return;
    stream.isEnding = true;
    this.finishLocal(stream);
  }

  /** @internal True: all of it is on its way. */
  sendData(stream: Http2Stream, bytes: Uint8Array): boolean {
    if (bytes.length > 0) {
      stream.pending.push(bytes);
      this.pendingBytes += bytes.length;
    }
    this.pumpStream(stream);
    this.flush();
    if (this.pendingBytes > LIMITS.pending) this.fail(H2_ERROR.ENHANCE_YOUR_CALM, "too many bytes of answers wait");
    return stream.pending.length === 0;
  }

  /** @internal */
  resetStream(stream: Http2Stream, code: number): void {
    this.sendReset(stream.id, code);
    this.forget(stream);
    this.flush();
  }

  // What comes in ------------------------------------------------------------------------------------------------------

  private parse(bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length && this.state !== "over"; ) {
      if (this.have === 0) {
        // Frames that lie here in one piece are read where they are.
        const need = this.unitLength(bytes, at);
        if (bytes.length - at >= need) {
          this.unit(bytes.subarray(at, at + need));
          at += need;
          continue;
        }
        this.held = new Uint8Array(need);
      }
      const take = Math.min(this.held.length - this.have, bytes.length - at);
      this.held.set(bytes.subarray(at, at + take), this.have);
      at += take;
      this.have += take;
      if (this.have < this.held.length) return;
      const need = this.unitLength(this.held, 0);
      const unit = this.held;
      if (need > unit.length) {
        this.held = new Uint8Array(need);
        this.held.set(unit);
      } else {
        this.held = EMPTY;
        this.have = 0;
        this.unit(unit);
      }
    }
  }

  /** Bytes of the preface or frame that begins here, as far as its header is there. */
  private unitLength(bytes: Uint8Array, at: number): number {
    if (this.state === "preface") {
      // A stranger to the protocol is known by the first byte.
      if (bytes[at] !== PREFACE[0]) throw new ConnectionError(H2_ERROR.PROTOCOL_ERROR, "this is no HTTP/2");
      return PREFACE.length;
    }
    if (bytes.length - at < FRAME_HEADER) return FRAME_HEADER;
    const length = (bytes[at]! << 16) | (bytes[at + 1]! << 8) | bytes[at + 2]!;
    if (length > MAX_FRAME) throw new ConnectionError(H2_ERROR.FRAME_SIZE_ERROR, `a frame claims ${length} bytes`);
    return FRAME_HEADER + length;
  }

  private unit(bytes: Uint8Array): void {
    if (this.state === "preface") {
      if (!PREFACE.equals(bytes)) throw new ConnectionError(H2_ERROR.PROTOCOL_ERROR, "this is no HTTP/2");
      this.state = "settings";
      return;
    }
    const type = bytes[3]!;
    const flags = bytes[4]!;
    const id = readU32(bytes, 5) & MAX_WINDOW;
    const payload = bytes.subarray(FRAME_HEADER);
    if (this.state === "settings") {
      if (type !== SETTINGS || flags & ACK) protocolError("the first frame is no SETTINGS");
      this.state = "open";
    }
    if (this.block && (type !== CONTINUATION || id !== this.block.id)) protocolError("a header block is interrupted");
    switch (type) {
      case DATA:
        this.onData(id, flags, payload);
        break;
      case HEADERS:
        this.onHeaders(id, flags, payload);
        break;
      case PRIORITY:
        if (id === 0) protocolError("PRIORITY without a stream");
        if (payload.length !== 5) frameSizeError("PRIORITY", payload);
        this.idle();
        break;
      case RST_STREAM:
        this.onReset(id, payload);
        break;
      case SETTINGS:
        this.onSettings(id, flags, payload);
        break;
      case PUSH_PROMISE:
        protocolError("PUSH_PROMISE from a client");
        break;
      case PING:
        this.onPing(id, flags, payload);
        break;
      case GOAWAY:
        if (id !== 0) protocolError("GOAWAY on a stream");
        if (payload.length < 8) frameSizeError("GOAWAY", payload);
        // What is open goes on; the client closes when it is done.
        this.idle();
        break;
      case WINDOW_UPDATE:
        this.onWindowUpdate(id, payload);
        break;
      case CONTINUATION:
        this.onContinuation(flags, payload);
        break;
      default:
        this.idle();
    }
  }

  private onData(id: number, flags: number, payload: Uint8Array): void {
    if (id === 0) protocolError("DATA without a stream");
    this.checkNotIdle(id, "DATA");
    // What comes is taken at once and allowed again, padding and what is for a stream that is over included: so neither
    // window is ever smaller than half, and no frame exceeds it.
    this.taken += payload.length;
    if (this.taken > DEFAULT_WINDOW / 2) {
      this.sendWindowUpdate(0, this.taken);
      this.taken = 0;
    }
    const bytes = unpad(flags, payload);
    const stream = this.streams.get(id);
    if (!stream || stream.isRemoteOver) {
      this.idle();
      if (stream) this.resetStream(stream, H2_ERROR.STREAM_CLOSED);
      else if (!this.brokenOff.includes(id)) this.sendReset(id, H2_ERROR.STREAM_CLOSED);
      return;
    }
    stream.taken += payload.length;
    stream.received += bytes.length;
    if (bytes.length > 0) {
      this.idleFrames = 0;
      stream.onData?.(bytes);
    } else this.idle();
    if (flags & END_STREAM) this.onRemoteEnd(stream);
    else if (stream.taken > STREAM_WINDOW / 2) {
      this.sendWindowUpdate(id, stream.taken);
      stream.taken = 0;
    }
  }

  private onHeaders(id: number, flags: number, payload: Uint8Array): void {
    if (id % 2 === 0) protocolError(`HEADERS on stream ${id}`);
    let fragment = unpad(flags, payload);
    if (flags & WITH_PRIORITY) {
      if (fragment.length < 5) frameSizeError("HEADERS", payload);
      fragment = fragment.subarray(5);
    }
    this.block = { id, endsStream: (flags & END_STREAM) !== 0, parts: [fragment], length: fragment.length };
    if (flags & END_HEADERS) this.onBlock(this.block);
  }

  private onContinuation(flags: number, payload: Uint8Array): void {
    const { block } = this;
    if (!block) protocolError("CONTINUATION without a header block");
    block.parts.push(payload);
    block.length += payload.length;
    if (block.length > LIMITS.headerList || block.parts.length > LIMITS.continuations)
      throw new ConnectionError(H2_ERROR.ENHANCE_YOUR_CALM, "a header block does not end");
    if (flags & END_HEADERS) this.onBlock(block);
  }

  private onBlock({ id, endsStream, parts }: OpenBlock): void {
    this.block = null;
    // In any case: the table must stay what the client thinks it is.
    const fields = this.hpack.decode(parts.length === 1 ? parts[0]! : Buffer.concat(parts), LIMITS.headerList);
    if (id > this.lastId) {
      this.onRequest(id, endsStream, fields);
      return;
    }
    this.idle();
    const stream = this.streams.get(id);
    if (!stream) {
      if (this.brokenOff.includes(id)) return;
      throw new ConnectionError(H2_ERROR.STREAM_CLOSED, `HEADERS on stream ${id}, which is over`);
    }
    // Trailers (section 8.1): nobody here asks for what they say.
    if (stream.isRemoteOver) this.resetStream(stream, H2_ERROR.STREAM_CLOSED);
    else if (!endsStream || fields.some(([name]) => name.startsWith(":")))
      this.resetStream(stream, H2_ERROR.PROTOCOL_ERROR);
    else this.onRemoteEnd(stream);
  }

  private onRequest(id: number, endsStream: boolean, fields: HeaderField[]): void {
    this.lastId = id;
    if (this.streams.size >= LIMITS.streams) {
      this.idle();
      this.sendReset(id, H2_ERROR.REFUSED_STREAM);
      return;
    }
    const headers = requestHeaders(fields);
    if (!headers) {
      this.idle();
      this.sendReset(id, H2_ERROR.PROTOCOL_ERROR);
      return;
    }
    this.idleFrames = 0;
    const stream = new Http2Stream(this, id, headers.get(":method")!, this.peerWindow);
    const length = headers.get("content-length");
    if (length !== undefined) stream.expected = Number(length);
    this.streams.set(id, stream);
    this.peer.request(stream, headers);
    if (endsStream && this.streams.has(id)) this.onRemoteEnd(stream);
  }

  private onRemoteEnd(stream: Http2Stream): void {
    if (stream.expected !== null && stream.expected !== stream.received) {
      this.resetStream(stream, H2_ERROR.PROTOCOL_ERROR);
      return;
    }
    stream.isRemoteOver = true;
    stream.onEnd?.();
    this.closeIfDone(stream);
  }

  private onReset(id: number, payload: Uint8Array): void {
    if (payload.length !== 4) frameSizeError("RST_STREAM", payload);
    if (id === 0) protocolError("RST_STREAM without a stream");
    this.checkNotIdle(id, "RST_STREAM");
    const stream = this.streams.get(id);
    if (!stream) {
      this.idle();
      return;
    }
    this.forget(stream);
    if (++this.resets > LIMITS.resets)
      throw new ConnectionError(H2_ERROR.ENHANCE_YOUR_CALM, "too many requests were taken back");
  }

  private onSettings(id: number, flags: number, payload: Uint8Array): void {
    if (id !== 0) protocolError("SETTINGS on a stream");
    if (payload.length % 6 !== 0 || (flags & ACK && payload.length > 0)) frameSizeError("SETTINGS", payload);
    this.idle();
    if (flags & ACK) return;
    let window = this.peerWindow;
    for (let at = 0; at < payload.length; at += 6) {
      const setting = (payload[at]! << 8) | payload[at + 1]!;
      const value = readU32(payload, at + 2);
      if (setting === SETTINGS_ENABLE_PUSH && value > 1) protocolError(`SETTINGS_ENABLE_PUSH is ${value}`);
      if (setting === SETTINGS_MAX_FRAME_SIZE && (value < MAX_FRAME || value >= 1 << 24))
        protocolError(`SETTINGS_MAX_FRAME_SIZE is ${value}`);
      if (setting !== SETTINGS_INITIAL_WINDOW_SIZE) continue;
      if (value > MAX_WINDOW)
        throw new ConnectionError(H2_ERROR.FLOW_CONTROL_ERROR, `SETTINGS_INITIAL_WINDOW_SIZE is ${value}`);
      window = value;
    }
    for (const stream of this.streams.values()) {
      stream.sendWindow += window - this.peerWindow;
      if (stream.sendWindow > MAX_WINDOW)
        throw new ConnectionError(H2_ERROR.FLOW_CONTROL_ERROR, "SETTINGS make a window overflow");
    }
    this.peerWindow = window;
    this.sendFrame(SETTINGS, ACK, 0);
    this.pump();
  }

  private onPing(id: number, flags: number, payload: Uint8Array): void {
    if (id !== 0) protocolError("PING on a stream");
    if (payload.length !== 8) frameSizeError("PING", payload);
    this.idle();
    if (flags & ACK) {
      this.pings.shift()?.();
      this.peer.pong();
    } else this.sendFrame(PING, ACK, 0, payload);
  }

  private onWindowUpdate(id: number, payload: Uint8Array): void {
    if (payload.length !== 4) frameSizeError("WINDOW_UPDATE", payload);
    const increment = readU32(payload, 0) & MAX_WINDOW;
    this.idle();
    if (id === 0) {
      if (increment === 0) protocolError("WINDOW_UPDATE of 0");
      this.sendWindow += increment;
      if (this.sendWindow > MAX_WINDOW)
        throw new ConnectionError(H2_ERROR.FLOW_CONTROL_ERROR, "the connection's window overflows");
      this.pump();
      return;
    }
    this.checkNotIdle(id, "WINDOW_UPDATE");
    const stream = this.streams.get(id);
    if (!stream) return;
    stream.sendWindow += increment;
    if (increment === 0) this.resetStream(stream, H2_ERROR.PROTOCOL_ERROR);
    else if (stream.sendWindow > MAX_WINDOW) this.resetStream(stream, H2_ERROR.FLOW_CONTROL_ERROR);
    else this.pumpAndTell(stream);
  }

  /** A frame about a stream that no request has opened yet. */
  private checkNotIdle(id: number, type: string): void {
    if (id % 2 === 0 || id > this.lastId) protocolError(`${type} on stream ${id}, which was never opened`);
  }

  private idle(): void {
    if (++this.idleFrames > LIMITS.idleFrames)
      throw new ConnectionError(H2_ERROR.ENHANCE_YOUR_CALM, "too many frames that bring nothing forward");
  }

  // What goes out ------------------------------------------------------------------------------------------------------

  /** All that waits and may go now. */
  private pump(): void {
    for (const stream of this.streams.values()) this.pumpAndTell(stream);
  }

  private pumpAndTell(stream: Http2Stream): void {
    if (stream.pending.length === 0) return;
    this.pumpStream(stream);
    if (stream.pending.length === 0 && !stream.isClosed) stream.onDrain?.();
  }

  private pumpStream(stream: Http2Stream): void {
    const { pending } = stream;
    while (!this.isBlocked) {
      const first = pending[0];
      if (!first) {
        if (stream.isEnding && !stream.isLocalOver) {
          this.sendFrame(DATA, END_STREAM, stream.id);
          this.finishLocal(stream);
        }
        return;
      }
      const length = Math.min(first.length, MAX_FRAME, this.sendWindow, stream.sendWindow);
      if (length <= 0) return;
      const isWhole = length === first.length;
      const isLast = isWhole && pending.length === 1 && stream.isEnding;
      this.sendWindow -= length;
      stream.sendWindow -= length;
      this.pendingBytes -= length;
      this.idleFrames = 0;
      if (isWhole) pending.shift();
      else pending[0] = first.subarray(length);
      this.sendFrame(DATA, isLast ? END_STREAM : 0, stream.id, isWhole ? first : first.subarray(0, length));
      if (isLast) this.finishLocal(stream);
    }
  }

  private finishLocal(stream: Http2Stream): void {
    stream.isLocalOver = true;
    this.closeIfDone(stream);
  }

  private closeIfDone(stream: Http2Stream): void {
    if (!stream.isLocalOver || !stream.isRemoteOver) return;
    this.resets = Math.max(0, this.resets - 1);
    this.forget(stream);
  }

  private forget(stream: Http2Stream): void {
    this.streams.delete(stream.id);
    for (const { length } of stream.pending) this.pendingBytes -= length;
    stream.close();
  }

  private flush(): void {
    if (this.corks === 0) this.peer.flush();
  }

  private sendReset(id: number, code: number): void {
    this.brokenOff.push(id);
    if (this.brokenOff.length > LIMITS.streams) this.brokenOff.shift();
    this.sendFrame(RST_STREAM, 0, id, u32(code));
  }

  private sendWindowUpdate(id: number, increment: number): void {
    this.sendFrame(WINDOW_UPDATE, 0, id, u32(increment));
  }

  private sendFrame(type: number, flags: number, id: number, payload?: Uint8Array): void {
    if (this.state === "over") return;
    const length = payload?.length ?? 0;
    head[0] = length >> 16;
    head[1] = length >> 8;
    head[2] = length;
    head[3] = type;
    head[4] = flags;
    head.writeUInt32BE(id, 5);
    this.peer.send(head);
    if (payload) this.peer.send(payload);
    if (this.isBlocked && type !== DATA && ++this.unreadReplies > LIMITS.unreadReplies)
      this.fail(H2_ERROR.ENHANCE_YOUR_CALM, "too many answers are not read");
  }

  private fail(code: number, message: string): void {
    if (this.state === "over") return;
    const text = Buffer.from(message.slice(0, 200));
    this.unreadReplies = 0;
    this.sendFrame(GOAWAY, 0, 0, Buffer.concat([u32(this.lastId), u32(code), text]));
    this.close();
    this.peer.flush();
    this.peer.end();
  }
}

function protocolError(message: string): never {
  throw new ConnectionError(H2_ERROR.PROTOCOL_ERROR, message);
}

function frameSizeError(type: string, payload: Uint8Array): never {
  throw new ConnectionError(H2_ERROR.FRAME_SIZE_ERROR, `${type} of ${payload.length} bytes`);
}

function unpad(flags: number, payload: Uint8Array): Uint8Array {
  if (!(flags & PADDED)) return payload;
  const padding = payload[0];
  if (padding === undefined) return frameSizeError("a padded frame", payload);
  if (padding >= payload.length) protocolError("a frame is nothing but padding, and more");
  return payload.subarray(1, payload.length - padding);
}

/** Fields that speak of an HTTP/1.1 connection (section 8.2.2). */
const CONNECTION_FIELDS = new Set(["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"]);
const PSEUDO_FIELDS = new Set([":method", ":scheme", ":authority", ":path"]);

/** Null: malformed (sections 8.2 and 8.3). Of a field that is repeated, the values are joined by commas. */
function requestHeaders(fields: HeaderField[]): Headers | null {
  const headers = new Map<string, string>();
  let isRegular = false;
  for (const [name, value] of fields) {
    if (/[\0\r\n]|^[ \t]|[ \t]$/.test(value)) return null;
    if (name.startsWith(":")) {
      if (isRegular || !PSEUDO_FIELDS.has(name) || headers.has(name)) return null;
      headers.set(name, value);
      continue;
    }
    isRegular = true;
    if (!/^[!-9;-@[-~]+$/.test(name) || CONNECTION_FIELDS.has(name)) return null;
    if (name === "te" && value !== "trailers") return null;
    if (name === "content-length" && (headers.has(name) || !/^\d{1,15}$/.test(value))) return null;
    const before = headers.get(name);
    headers.set(name, before === undefined ? value : `${before}, ${value}`);
  }
  if (!headers.get(":method") || !headers.get(":path") || !headers.has(":scheme")) return null;
  return headers;
}

function readU32(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}

function u32(value: number): Uint8Array {
  return Uint8Array.of(value >>> 24, value >>> 16, value >>> 8, value);
}
