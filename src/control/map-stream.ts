// One open map stream: frames on an HTTP/2 response, one writer, keep-alives
// (spec/ts2021-control-protocol.md, section 11; research/control-on-bun.md, pitfalls 1 and 6).
//
// While the client does not read, nothing is queued: changes mark peers in the view, and the message that brings all of them
// is made when the client has taken the one before. A full netmap goes out piece by piece, as the client takes it; the
// pieces are shared with other streams (map-frames.ts), so one that waits costs next to nothing.
import type { ServerHttp2Stream } from "node:http2";
import type { MapResponse, PingRequest } from "../wire/tailcfg.ts";
import { encodeFrame, encodeMessage } from "./map-frames.ts";
import type { Model } from "./model.ts";
import type { TailnetConfig, View } from "./netmap.ts";

/** Milliseconds between the last message and a keep-alive, and how much longer it may take, at random. */
export const KEEP_ALIVE = { every: 50_000, jitter: 9_000 };
/**
 * Milliseconds between messages of one stream, when `streams` are open: the first change goes out at once, those that
 * follow on its heels merge, the more the more readers there are. Half a second at most: a deletion must be told in one.
 */
function paceOf(streams: number): number {
  return Math.min(500, 50 + streams / 2);
}
/** Bytes that may lie in Node's buffer before the writer waits for the client. */
const HIGH_WATER = 64 * 1024;

/** The same bytes each time: clients compare them and skip decoding. */
const KEEP_ALIVE_FRAMES = new Map([true, false].map((zstd) => [zstd, encodeFrame({ KeepAlive: true }, zstd)]));

export interface MapStreamOptions {
  stream: ServerHttp2Stream;
  view: View;
  model: Model;
  zstd: boolean;
  /** Null: the client wants none. */
  keepAlive: { every: number; jitter: number } | null;
  /** How many map streams are open. */
  openStreams: () => number;
  now: () => number;
  /** 0 to 1. */
  random: () => number;
  /** Called once, however the stream ends. */
  onClose(): void;
}

export class MapStream {
  private lastWrite = Number.NEGATIVE_INFINITY;
  private paceTimer: ReturnType<typeof setTimeout> | null = null;
  private keepAliveTimer: ReturnType<typeof setTimeout> | null = null;
  private waitsForDrain = false;
  /** Pieces of a message of which the beginning is under way. */
  private rest: Uint8Array[] = [];
  private ended = false;

  constructor(private readonly options: MapStreamOptions) {
    const { stream } = options;
    stream.on("drain", () => {
      this.waitsForDrain = false;
      this.sendPieces();
      this.poke();
    });
    stream.on("close", () => this.onClose());
    stream.respond({ ":status": 200, "content-type": "application/octet-stream" });
    this.write();
    this.armKeepAlive();
  }

  get nodeId(): number {
    return this.options.view.nodeId;
  }

  /** A node changed: this stream's client may have to hear of it at the next `poke`. */
  mark(nodeId: number): void {
    this.options.view.mark(nodeId);
  }

  /** What the whole tailnet is told is another: so is this client at the next `poke`. */
  configure(config: TailnetConfig): void {
    this.options.view.configure(config);
  }

  /** Writes what is due, now or when the client and the pace allow. */
  poke(): void {
    if (this.ended || this.waitsForDrain || this.paceTimer || !this.options.view.hasWork) return;
    const wait = this.lastWrite + paceOf(this.options.openStreams()) - this.options.now();
    if (wait <= 0) this.write();
    else
      this.paceTimer = setTimeout(() => {
        this.paceTimer = null;
        this.write();
      }, wait);
  }

  /** Puts a question to the client at once. False: it cannot be sent, because the client does not read. */
  ping(request: PingRequest): boolean {
    const { stream, zstd } = this.options;
    if (this.ended || this.waitsForDrain || stream.destroyed || stream.closed) return false;
    this.send(encodeFrame({ PingRequest: request }, zstd));
    return true;
  }

  /** Ends the stream, after a last message if there is one. */
  end(last?: MapResponse): void {
    if (this.ended) return;
    this.ended = true;
    this.stopTimers();
    const { stream, zstd } = this.options;
    if (stream.destroyed || stream.closed) return;
    for (const piece of [...this.rest, ...(last ? encodeMessage(last, zstd) : [])]) stream.write(piece);
    stream.end();
  }

  private write(): void {
    const { view, model, zstd, now, stream } = this.options;
    if (this.ended || this.waitsForDrain || stream.destroyed || stream.closed) return;
    const message = view.next(model, now());
    if (message) this.send(...encodeMessage(message, zstd));
  }

  /** `pieces` of one message. Only while nothing waits. */
  private send(...pieces: Uint8Array[]): void {
    this.lastWrite = this.options.now();
    this.rest = pieces;
    this.sendPieces();
    this.armKeepAlive();
  }

  private sendPieces(): void {
    const { stream } = this.options;
    let sent = 0;
    while (sent < this.rest.length && !this.waitsForDrain) {
      stream.write(this.rest[sent++]!);
      this.waitsForDrain = stream.writableLength > HIGH_WATER;
    }
    this.rest = this.rest.slice(sent);
  }

  private armKeepAlive(): void {
    const { keepAlive, random } = this.options;
    if (!keepAlive) return;
    if (this.keepAliveTimer) clearTimeout(this.keepAliveTimer);
    this.keepAliveTimer = setTimeout(
      () => {
        // A client that still has bytes to read needs none.
        if (this.waitsForDrain) this.armKeepAlive();
        else this.send(KEEP_ALIVE_FRAMES.get(this.options.zstd)!);
      },
      keepAlive.every + random() * keepAlive.jitter,
    );
  }

  private stopTimers(): void {
    if (this.paceTimer) clearTimeout(this.paceTimer);
    if (this.keepAliveTimer) clearTimeout(this.keepAliveTimer);
    this.paceTimer = null;
    this.keepAliveTimer = null;
  }

  private onClose(): void {
    this.ended = true;
    this.stopTimers();
    this.options.onClose();
  }
}
