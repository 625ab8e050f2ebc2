// One open map stream: frames on an HTTP/2 response, one writer, keep-alives
// (spec/ts2021-control-protocol.md, section 11; research/control-on-bun.md, pitfalls 1 and 6).
//
// While the client does not read, nothing is queued: the view knows what was told last, and the message that brings all since
// is made when the client has taken the one before. A full netmap goes out piece by piece, as the client takes it; the
// pieces are shared with other streams (map-frames.ts), so one that waits costs next to nothing.
import type { Http2Stream } from "../wire/h2.ts";
import type { MapResponse, PingRequest } from "../wire/tailcfg.ts";
import { encodeFrame, encodeMessage } from "./map-frames.ts";
import type { Reader, Sweep } from "./map-sweep.ts";
import type { Guest, Turns } from "./map-turns.ts";
import type { MapMessage } from "./metrics.ts";
import type { Model } from "./model.ts";
import type { TailnetConfig, View } from "./netmap.ts";

/** Milliseconds between the last message and a keep-alive, and how much longer it may take, at random. */
export const KEEP_ALIVE = { every: 50_000, jitter: 9_000 };

/** The same bytes each time: clients compare them and skip decoding. */
const KEEP_ALIVE_FRAMES = new Map([true, false].map((zstd) => [zstd, encodeFrame({ KeepAlive: true }, zstd)]));

const NOTHING: readonly Uint8Array[] = [];

export interface MapStreamOptions {
  stream: Http2Stream;
  view: View;
  model: Model;
  zstd: boolean;
  /** Null: the client wants none. */
  keepAlive: { every: number; jitter: number } | null;
  /** Decides when this stream is written to. */
  sweep: Sweep;
  /** Decides when it gets its first message. */
  turns: Turns;
  now: () => number;
  /** 0 to 1. */
  random: () => number;
  /** A message went out. */
  onSent(kind: MapMessage): void;
  /** Called once, however the stream ends. */
  onClose(): void;
}

export class MapStream implements Reader, Guest {
  isDue = false;
  private lastWrite = Number.NEGATIVE_INFINITY;
  private keepAliveTimer: ReturnType<typeof setTimeout> | null = null;
  private waitsForDrain = false;
  /** Pieces of a message of which the beginning is under way. */
  private rest: readonly Uint8Array[] = NOTHING;
  private ended = false;
  /** The first message has not begun, is on its way, is sent, and has come to the client. */
  private turn: "awaited" | "on" | "sent" | "over" = "awaited";

  constructor(private readonly options: MapStreamOptions) {
    const { stream } = options;
    stream.onDrain = () => {
      this.waitsForDrain = false;
      this.sendPieces();
      this.poke();
    };
    stream.onClose(() => this.onClose());
    options.turns.enter(this);
    // Whoever has to wait sees that the request was heard.
    this.respond();
  }

  begin(): void {
    this.turn = "on";
    this.write();
    this.armKeepAlive();
  }

  get nodeId(): number {
    return this.options.view.nodeId;
  }

  /** For the debug page. */
  get state(): { node: number; lastMessage: string; isWaitingForClient: boolean; hasMore: boolean } {
    const { view, model } = this.options;
    const lastMessage = Number.isFinite(this.lastWrite) ? new Date(this.lastWrite).toISOString() : "";
    return { node: view.nodeId, lastMessage, isWaitingForClient: this.waitsForDrain, hasMore: view.hasWork(model) };
  }

  /** What the whole tailnet is told is another: so is this client at the next `poke`. */
  configure(config: TailnetConfig): void {
    this.options.view.configure(config);
  }

  /** Has what is due written as soon as the client and the load allow. */
  poke(): void {
    const { view, model, sweep } = this.options;
    if (this.turn !== "awaited" && !this.ended && !this.waitsForDrain && view.hasWork(model)) sweep.add(this);
  }

  /** Puts a question to the client at once. False: it cannot be sent, because the client does not read. */
  ping(request: PingRequest): boolean {
    const { stream, zstd } = this.options;
    if (this.turn === "awaited" || this.ended || this.waitsForDrain || stream.isClosed) return false;
    this.send(encodeMessage({ PingRequest: request }, zstd), "ping");
    return true;
  }

  /** Ends the stream, after a last message if there is one. */
  end(last?: MapResponse): void {
    if (this.ended) return;
    this.ended = true;
    this.stopTimers();
    const { stream, zstd } = this.options;
    if (stream.isClosed) return;
    for (const piece of [...this.rest, ...(last ? encodeMessage(last, zstd) : [])]) stream.write(piece);
    stream.end();
  }

  /** Writes what is due. For the sweep. */
  write(): void {
    const { view, model, zstd, now, stream } = this.options;
    if (this.ended || this.waitsForDrain || stream.isClosed) return;
    const message = view.next(model, now());
    const isFirst = this.lastWrite === Number.NEGATIVE_INFINITY;
    if (message) this.send(encodeMessage(message, zstd), isFirst ? "full" : "change");
  }

  /** `pieces` of one message. Only while nothing waits. */
  private send(pieces: readonly Uint8Array[], kind: MapMessage): void {
    this.lastWrite = this.options.now();
    this.rest = pieces;
    this.sendPieces();
    this.options.onSent(kind);
  }

  private sendPieces(): void {
    const { stream } = this.options;
    const { rest } = this;
    let sent = 0;
    const put = (until: number): void => {
      while (sent < until && !this.waitsForDrain) this.waitsForDrain = !stream.write(rest[sent++]!);
    };
    stream.cork();
    this.respond();
    put(rest.length > 1 ? rest.length - 1 : rest.length);
    stream.uncork();
    // The last of several stays behind when those before have filled the socket: its drain says that they are taken.
    put(rest.length);
    this.rest = sent < rest.length ? rest.slice(sent) : NOTHING;
    if (this.turn === "on" && this.rest.length === 0 && !this.waitsForDrain) {
      this.turn = "sent";
      stream.whenReached(() => this.leave());
    }
  }

  private respond(): void {
    const { stream } = this.options;
    if (!stream.isAnswered) stream.respond(200, { "content-type": "application/octet-stream" });
  }

  private leave(): void {
    this.turn = "over";
    this.options.turns.leave(this);
  }

  /** The timer runs on while messages go out, and looks at the time of the last one when it is due. */
  private armKeepAlive(): void {
    const { keepAlive, random, now } = this.options;
    if (!keepAlive) return;
    const every = keepAlive.every + random() * keepAlive.jitter;
    const wait = (delay: number): void => {
      this.keepAliveTimer = setTimeout(() => {
        const silence = now() - this.lastWrite;
        // A client that still has bytes to read needs none.
        if (this.waitsForDrain) wait(every);
        else if (silence < every) wait(every - silence);
        else {
          this.send([KEEP_ALIVE_FRAMES.get(this.options.zstd)!], "keepalive");
          this.armKeepAlive();
        }
      }, delay);
    };
    wait(every);
  }

  private stopTimers(): void {
    this.leave();
    this.options.sweep.remove(this);
    if (this.keepAliveTimer) clearTimeout(this.keepAliveTimer);
    this.keepAliveTimer = null;
  }

  private onClose(): void {
    this.ended = true;
    this.stopTimers();
    this.options.onClose();
  }
}
