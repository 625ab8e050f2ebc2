// A byte stream inside Noise records: what node:http2 runs on in a node (spec/ts2021-control-protocol.md, sections 5 to 7;
// research/control-on-bun.md, pitfalls 5 and 6). The control server's end is noise-http2.ts.
//
// The Duplex owns the socket from the moment of construction: destroying one destroys the other, and nothing is left
// behind when the peer vanishes. Back-pressure goes both ways: a full socket holds the write callback, a full reader
// pauses the socket.
import { Duplex } from "node:stream";
import { EarlyPayloadReader, encodeEarlyPayload, type NoiseKeys, RecordOpener, RecordSealer } from "../wire/noise.ts";
import type { EarlyNoise } from "../wire/tailcfg.ts";

interface CommonOptions {
  /** TCP or TLS, taken over from HTTP/1.1. */
  socket: Duplex;
  keys: NoiseKeys;
  /** Bytes that the HTTP parser or the handshake had already read: they are the beginning of the records. */
  head?: Uint8Array;
}

export type NoiseDuplexOptions =
  | (CommonOptions & {
      role: "server";
      /** Goes out as it is before the first record: the 101 head and the handshake response, in one write. */
      preamble?: Uint8Array;
      /** Sealed as the first record, in the same write. */
      early?: EarlyNoise;
    })
  | (CommonOptions & {
      role: "client";
      /** Called at most once, before any byte of the stream. */
      onEarlyPayload?: (early: EarlyNoise) => void;
    });

/**
 * Bytes that wait for the peer to read. What HTTP/2's windows let out stays far below it; replies that the peer provokes
 * (to pings) have no window.
 */
const MAX_BACKLOG = 8 * 1024 * 1024;

export class NoiseDuplex extends Duplex {
  private readonly socket: Duplex;
  private readonly sealer: RecordSealer;
  private readonly opener: RecordOpener;
  /** Client only, until the first bytes have been looked at. */
  private earlyReader: EarlyPayloadReader | null = null;
  private readonly onEarlyPayload: ((early: EarlyNoise) => void) | undefined;
  /** The callback of the write that the socket could not take at once. */
  private waiting: ((error?: Error | null) => void) | null = null;

  constructor(options: NoiseDuplexOptions) {
    super({ allowHalfOpen: false });
    this.socket = options.socket;
    this.sealer = new RecordSealer(options.keys.send);
    this.opener = new RecordOpener(options.keys.receive);
    // Whoever uses the stream learns of errors by 'close'; without a listener an error would end the process.
    this.on("error", () => {});

    const { socket } = this;
    socket.on("error", (error: Error) => this.destroy(error));
    socket.on("close", () => this.destroy());
    socket.on("end", () => this.onSocketEnd());
    socket.on("drain", () => this.releaseWrite());

    if (options.role === "server") {
      const parts = [options.preamble ?? new Uint8Array(0)];
      if (options.early) parts.push(this.sealer.seal(encodeEarlyPayload(options.early)));
      const first = Buffer.concat(parts);
      if (first.length > 0) socket.write(first);
    } else {
      this.earlyReader = new EarlyPayloadReader();
      this.onEarlyPayload = options.onEarlyPayload;
    }
    if (options.head && options.head.length > 0) this.onSocketData(options.head);
    socket.on("data", (chunk: Uint8Array) => this.onSocketData(chunk));
    if (socket.destroyed) this.destroy();
  }

  override _read(): void {
    this.socket.resume();
  }

  override _write(chunk: Uint8Array, _encoding: BufferEncoding, callback: (error?: Error | null) => void): void {
    this.send(chunk, callback);
  }

  override _writev(
    chunks: { chunk: Uint8Array; encoding: BufferEncoding }[],
    callback: (error?: Error | null) => void,
  ): void {
    this.send(Buffer.concat(chunks.map(({ chunk }) => chunk)), callback);
  }

  override _final(callback: (error?: Error | null) => void): void {
    this.socket.end();
    callback();
  }

  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    const waiting = this.waiting;
    this.waiting = null;
    waiting?.(error ?? new Error("the connection was closed"));
    this.socket.destroy();
    callback(error);
  }

  private send(plaintext: Uint8Array, callback: (error?: Error | null) => void): void {
    let records: Uint8Array;
    try {
      records = this.sealer.seal(plaintext);
    } catch (error) {
      callback(error as Error);
      return;
    }
    // A sealed record that does not leave would break the counter: the socket takes all or is destroyed.
    if (this.socket.write(records)) callback();
    else this.waiting = callback;
  }

  private releaseWrite(): void {
    const waiting = this.waiting;
    this.waiting = null;
    waiting?.();
  }

  private onSocketData(chunk: Uint8Array): void {
    if (this.destroyed) return;
    if (this.writableLength > MAX_BACKLOG) {
      this.destroy(new Error("the peer asks for more and more, and reads nothing"));
      return;
    }
    let wantsMore = true;
    try {
      for (const plaintext of this.opener.push(chunk)) wantsMore = this.deliver(plaintext) && wantsMore;
    } catch (error) {
      this.destroy(error as Error);
      return;
    }
    if (!wantsMore) this.socket.pause();
  }

  private deliver(plaintext: Uint8Array): boolean {
    if (!this.earlyReader) return this.push(plaintext);
    const first = this.earlyReader.push(plaintext);
    if (!first) return true;
    this.earlyReader = null;
    if (first.early) this.onEarlyPayload?.(first.early);
    return first.rest.length === 0 || this.push(first.rest);
  }

  /** What was received is still handed over; then everything goes. */
  private onSocketEnd(): void {
    if (this.destroyed) return;
    if (this.readableLength === 0) {
      this.destroy();
      return;
    }
    this.once("end", () => this.destroy());
    this.push(null);
  }
}
