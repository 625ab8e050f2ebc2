// The server's end of a ts2021 connection: Noise records on a socket, HTTP/2 inside (src/wire/h2.ts), and nothing between
// (spec/ts2021-control-protocol.md, sections 5 to 7; research/control-on-bun.md, pitfalls 5 to 7).
//
// What one turn writes is collected, sealed and given to the socket as one write: a small message on a map stream is one
// record and one system call. The buffers for it are shared by all connections, since a write is over before the next
// begins. A socket that is full holds back answers; what it has taken is in the hands of the runtime.
import { Buffer } from "node:buffer";
import type { Duplex } from "node:stream";
import { type Headers, Http2Connection, type Http2Stream } from "../wire/h2.ts";
import {
  encodeEarlyPayload,
  MAX_PLAINTEXT,
  type NoiseKeys,
  RecordOpener,
  RecordSealer,
  sealedLength,
} from "../wire/noise.ts";
import type { EarlyNoise } from "../wire/tailcfg.ts";
import { endSoon } from "./listener.ts";

export interface NoiseHttp2Options {
  /** TCP or TLS, taken over from HTTP/1.1, or a WebSocket. Must have copied what it is given when `write` returns, unless it was busy before. */
  socket: Duplex;
  keys: NoiseKeys;
  /** A request's fields. Its body follows after this returns. */
  onRequest(stream: Http2Stream, headers: Headers): void;
  onPong(): void;
  /** Called once, when the connection is over, whoever ended it. */
  onClose(): void;
}

/** How a connection begins. */
export interface Beginning {
  /** Goes out as it is before the first record: the 101 head and the handshake response. */
  preamble: Uint8Array;
  early: EarlyNoise | null;
  /** Bytes that the HTTP parser had already read: they are the beginning of the records. */
  head: Uint8Array;
}

/** Records that go out in one write. */
const MAX_RECORDS = 16;
const plaintext = new Uint8Array(MAX_RECORDS * MAX_PLAINTEXT);
const records = Buffer.allocUnsafeSlow(sealedLength(plaintext.length));
/** Whose bytes lie in `plaintext`, and how many. */
let writer: NoiseHttp2 | null = null;
let used = 0;

export class NoiseHttp2 {
  /** Received so far: a sign of life. */
  bytesRead = 0;
  private readonly socket: Duplex;
  private readonly sealer: RecordSealer;
  private readonly opener: RecordOpener;
  private readonly http2: Http2Connection;
  private readonly onClose: () => void;
  private isOver = false;

  constructor({ socket, keys, onRequest, onPong, onClose }: NoiseHttp2Options) {
    this.socket = socket;
    this.onClose = onClose;
    this.sealer = new RecordSealer(keys.send);
    this.opener = new RecordOpener(keys.receive);
    this.http2 = new Http2Connection({
      send: (bytes) => this.append(bytes),
      flush: () => this.flush(),
      request: onRequest,
      pong: onPong,
      end: () => this.endAfter(),
    });
    socket.on("error", () => this.destroy());
    socket.on("close", () => this.destroy());
    socket.on("end", () => this.destroy());
    socket.on("drain", () => this.http2.resume());
  }

  /** To be called once, when whoever asked for this connection knows it. */
  start({ preamble, early, head }: Beginning): void {
    const { socket } = this;
    // Handshake, early payload and SETTINGS are one write.
    socket.cork();
    if (preamble.length > 0) socket.write(preamble);
    if (early) this.append(encodeEarlyPayload(early));
    this.http2.start();
    socket.uncork();
    if (head.length > 0) this.receive(head);
    socket.on("data", (chunk: Uint8Array) => this.receive(chunk));
    if (socket.destroyed) this.destroy();
  }

  get openStreams(): number {
    return this.http2.openStreams;
  }

  ping(): void {
    this.http2.ping();
  }

  destroy(): void {
    if (this.close()) this.socket.destroy();
  }

  private receive(chunk: Uint8Array): void {
    if (this.isOver) return;
    this.bytesRead += chunk.length;
    let opened: Uint8Array[];
    try {
      opened = this.opener.push(chunk);
    } catch {
      this.destroy();
      return;
    }
    for (const bytes of opened) this.http2.receive(bytes);
  }

  private append(bytes: Uint8Array): void {
    if (this.isOver) return;
    if (writer !== this) {
      writer?.flush();
      writer = this;
    }
    for (let at = 0; at < bytes.length; ) {
      const take = Math.min(bytes.length - at, plaintext.length - used);
      plaintext.set(take === bytes.length ? bytes : bytes.subarray(at, at + take), used);
      at += take;
      used += take;
      if (used === plaintext.length) this.write();
    }
  }

  private flush(): void {
    if (writer === this) this.write();
  }

  private write(): void {
    const length = used;
    used = 0;
    if (length === 0 || this.isOver) return;
    const sealed = records.subarray(0, this.sealer.sealInto(plaintext.subarray(0, length), records));
    const { socket } = this;
    // A busy socket keeps what it is given; the others have copied it when this returns.
    if (!socket.write(socket.writableLength > 0 ? Buffer.from(sealed) : sealed)) this.http2.pause();
  }

  /** HTTP/2 has said its last word. */
  private endAfter(): void {
    if (this.close()) endSoon(this.socket, "");
  }

  private close(): boolean {
    if (this.isOver) return false;
    this.isOver = true;
    this.http2.close();
    this.onClose();
    return true;
  }
}
