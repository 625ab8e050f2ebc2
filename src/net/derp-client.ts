// The node's connection to one DERP region: stays connected, sends and receives packets by node key.
//
//   connecting --TCP, TLS, upgrade, ServerKey--> logging in --ClientInfo sent: packets flow--> --ServerInfo--> connected
//   any end of the connection --back-off--> connecting
//
// spec/derp-wire.md sections 5, 12 and 19. When to open and close connections is the caller's matter.
import type { Duplex } from "node:stream";
import { randomBytes as systemRandom } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  CLIENT_LIMITS,
  ClientLogin,
  DerpError,
  decodeHealth,
  decodePeerGone,
  decodeRestarting,
  encodeNotePreferred,
  encodePing,
  encodePong,
  encodeSendPacket,
  FRAME_HEADER,
  FrameDecoder,
  FrameType,
  KEEPALIVE_MS,
  KEY_LENGTH,
  MAX_CLIENT_FRAME,
  MAX_PACKET,
  NONCE_LENGTH,
  type Restarting,
} from "../wire/derp.ts";
import { Backoff } from "./backoff.ts";
import { type DerpDialOptions, dialRegion } from "./derp-dial.ts";

export interface DerpState {
  connected: boolean;
  /** When `connected` last changed, by the clock `now`, in milliseconds. */
  since: number;
  /** The DERP node in use, its name in the DERP map; null while not connected. */
  node: string | null;
  /** Why the last connection ended or did not come about; null after a success. */
  lastError: string | null;
  /** The problem that the relay reports of itself; empty when it is well. */
  health: string;
}

export interface DerpClientOptions extends DerpDialOptions {
  /** The node's WireGuard private key, 32 bytes. */
  privateKey: Uint8Array;
  /** A packet came. Both arrays are the callee's to keep. */
  onPacket: (source: Uint8Array, packet: Uint8Array) => void;
  /** `reason`: PeerGoneReason. */
  onPeerGone?: (key: Uint8Array, reason: number) => void;
  onState?: (state: DerpState) => void;
  /** Clock in milliseconds that never goes back, and the source of nonces. */
  now?: () => number;
  random?: (n: number) => Uint8Array;
  /** Without any frame for this long the connection is dead. Milliseconds, default 120 s. */
  receiveTimeout?: number;
}

export interface DerpClientStats {
  sent: number;
  received: number;
  /** Packets that were too long, over the relay's rate, or pushed out of the queue by newer ones. */
  dropped: number;
}

const QUEUE_DEPTH = 32;
const CONNECT_TIMEOUT_MS = 10_000;
const PING_TIMEOUT_MS = 5000;
const MAX_PINGS = 16;
const BACKOFF_MAX_MS = 5000;
/** A connection that lived this long was a good one. */
const GOOD_CONNECTION_MS = 10_000;
/** However long a relay says that its restart takes, look for it after this. */
const MAX_RESTART_WAIT_MS = 30_000;
const MAX_HEALTH_LENGTH = 500;

export class DerpClient {
  readonly #options: DerpClientOptions;
  readonly #publicKey: Uint8Array;
  readonly #now: () => number;
  readonly #random: (n: number) => Uint8Array;
  readonly #abort = new AbortController();
  readonly #backoff = new Backoff(BACKOFF_MAX_MS);
  readonly #pings = new Map<string, (error: Error | null) => void>();
  readonly stats: DerpClientStats = { sent: 0, received: 0, dropped: 0 };
  #state: DerpState;
  #session: Session | null = null;
  /** SendPacket frames, oldest first. */
  #queue: Uint8Array[] = [];
  #isFlushDue = false;
  #bucket: TokenBucket | null = null;
  #isHome = false;
  #restarting: Restarting | null = null;
  #wake: (() => void) | null = null;

  /** Begins to connect at once, and goes on until `close`. */
  constructor(options: DerpClientOptions) {
    this.#options = options;
    this.#now = options.now ?? (() => performance.now());
    this.#random = options.random ?? systemRandom;
    this.#publicKey = x25519Public(options.privateKey);
    this.#state = { connected: false, since: this.#now(), node: null, lastError: null, health: "" };
    void this.#run();
  }

  get state(): DerpState {
    return this.#state;
  }

  /** Queues a packet for the node with this key. False when it was dropped; true is no promise that it arrives. */
  send(destination: Uint8Array, packet: Uint8Array): boolean {
    const size = FRAME_HEADER + KEY_LENGTH + packet.length;
    const tooMuch = this.#bucket && !this.#bucket.take(size, this.#now());
    if (this.#abort.signal.aborted || packet.length > MAX_PACKET || tooMuch) {
      this.stats.dropped++;
      return false;
    }
    if (this.#queue.length >= QUEUE_DEPTH) this.#flush();
    if (this.#queue.length >= QUEUE_DEPTH) {
      this.#queue.shift();
      this.stats.dropped++;
    }
    this.#queue.push(encodeSendPacket(destination, packet));
    if (!this.#isFlushDue && this.#session) {
      this.#isFlushDue = true;
      // What this turn of the event loop sends goes out in one write.
      setImmediate(() => {
        this.#isFlushDue = false;
        this.#flush();
      });
    }
    return true;
  }

  /** Tells the relay whether it is this node's home, now and after each reconnect. */
  notePreferred(home: boolean): void {
    if (home === this.#isHome) return;
    this.#isHome = home;
    this.#session?.write(encodeNotePreferred(home));
  }

  /** Milliseconds to the relay and back. Rejects when not connected and after 5 s. */
  ping(): Promise<number> {
    const session = this.#session;
    if (!session || !this.#state.connected) return Promise.reject(new Error(`${this.#name} is not connected`));
    if (this.#pings.size >= MAX_PINGS)
      return Promise.reject(new Error(`${this.#name} has ${MAX_PINGS} pings under way`));
    const data = this.#random(8);
    const id = key(data);
    const sentAt = this.#now();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => settle(new Error(`${this.#name} did not answer a ping within 5 s`)),
        PING_TIMEOUT_MS,
      );
      const settle = (error: Error | null) => {
        clearTimeout(timer);
        this.#pings.delete(id);
        if (error) reject(error);
        else resolve(this.#now() - sentAt);
      };
      this.#pings.set(id, settle);
      session.write(encodePing(data));
    });
  }

  /** Gives the present connection up for a new one, for instance after a change of networks. */
  reconnect(): void {
    this.#backoff.reset();
    this.#session?.end("the connection was renewed");
    this.#wake?.();
  }

  close(): void {
    if (this.#abort.signal.aborted) return;
    this.#abort.abort();
    this.#session?.end("the connection was closed");
    this.#wake?.();
    this.#queue = [];
    this.#setState({ connected: false, node: null });
  }

  get #name(): string {
    return `DERP region ${this.#options.region.RegionID}`;
  }

  async #run(): Promise<void> {
    const { signal } = this.#abort;
    while (!signal.aborted) {
      const error = await this.#connectOnce();
      if (signal.aborted) return;
      this.#setState({ connected: false, node: null, lastError: error });
      const advised = this.#restarting?.reconnectIn ?? 0;
      this.#restarting = null;
      const random = this.#random(1)[0]! / 256;
      await this.#sleep(Math.max(this.#backoff.next(random), Math.min(advised, MAX_RESTART_WAIT_MS)));
    }
  }

  async #sleep(ms: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#wake = null;
  }

  /** One connection from dialling to its end. Returns why it ended. */
  async #connectOnce(): Promise<string> {
    let startedAt = 0;
    try {
      const { socket, head, node } = await dialRegion(this.#options, CONNECT_TIMEOUT_MS, this.#abort.signal);
      startedAt = this.#now();
      const session = new Session(socket, {
        login: new ClientLogin({ privateKey: this.#options.privateKey, publicKey: this.#publicKey }),
        now: this.#now,
        random: this.#random,
        receiveTimeout: this.#options.receiveTimeout ?? 2 * KEEPALIVE_MS,
        onLogin: () => {
          this.#session = session;
          if (this.#isHome) session.write(encodeNotePreferred(true));
          this.#flush();
        },
        onFrame: (type, buf, at, end) => this.#frame(session, node.Name, type, buf, at, end),
        onDrain: () => this.#flush(),
      });
      return await session.run(head);
    } catch (error) {
      return error instanceof Error ? error.message : String(error);
    } finally {
      this.#session = null;
      this.#bucket = null;
      for (const settle of [...this.#pings.values()]) settle(new Error(`${this.#name} lost its connection`));
      if (startedAt > 0 && this.#now() - startedAt >= GOOD_CONNECTION_MS) this.#backoff.reset();
    }
  }

  #flush(): void {
    if (!this.#session?.isWritable || this.#queue.length === 0) return;
    this.stats.sent += this.#queue.length;
    this.#session.write(this.#queue.length === 1 ? this.#queue[0]! : Buffer.concat(this.#queue));
    this.#queue = [];
  }

  #frame(session: Session, node: string, type: number, buf: Uint8Array, at: number, end: number): void {
    const payload = buf.subarray(at + FRAME_HEADER, end);
    switch (type) {
      case FrameType.RecvPacket:
        if (payload.length < KEY_LENGTH) throw new DerpError("DERP frame RecvPacket is shorter than a key");
        this.stats.received++;
        this.#options.onPacket(payload.subarray(0, KEY_LENGTH), payload.subarray(KEY_LENGTH));
        break;
      case FrameType.ServerInfo: {
        const info = session.login.receiveServerInfo(payload);
        const { tokenBucketBytesPerSecond: rate, tokenBucketBytesBurst: burst } = info;
        this.#bucket = rate > 0 ? new TokenBucket(rate, burst, this.#now()) : null;
        this.#setState({ connected: true, node, lastError: null, health: "" });
        break;
      }
      case FrameType.PeerGone: {
        const gone = decodePeerGone(payload);
        this.#options.onPeerGone?.(gone.key, gone.reason);
        break;
      }
      case FrameType.Ping:
        // Shorter ones are ignored, as the reference does. One that cannot be written now would answer too late anyway.
        if (payload.length >= 8 && session.isWritable) session.write(encodePong(payload.subarray(0, 8)));
        break;
      case FrameType.Pong:
        if (payload.length >= 8) this.#pings.get(key(payload.subarray(0, 8)))?.(null);
        break;
      case FrameType.Health:
        this.#setState({ health: decodeHealth(payload).slice(0, MAX_HEALTH_LENGTH) });
        break;
      case FrameType.Restarting:
        this.#restarting = decodeRestarting(payload);
        break;
      default:
        // KeepAlive, PeerPresent, and ServerKey once more after a fast start: nothing to do.
        break;
    }
  }

  #setState(change: Partial<Omit<DerpState, "since">>): void {
    const before = this.#state;
    const since = change.connected !== undefined && change.connected !== before.connected ? this.#now() : before.since;
    this.#state = { ...before, ...change, since };
    this.#options.onState?.(this.#state);
  }
}

// ---- one connection ----

interface SessionEvents {
  login: ClientLogin;
  now: () => number;
  random: (n: number) => Uint8Array;
  receiveTimeout: number;
  /** ClientInfo has been written: packets may follow. */
  onLogin: () => void;
  onFrame: (type: number, buf: Uint8Array, at: number, end: number) => void;
  onDrain: () => void;
}

class Session {
  readonly login: ClientLogin;
  readonly #socket: Duplex;
  readonly #events: SessionEvents;
  readonly #decoder = new FrameDecoder(CLIENT_LIMITS, MAX_CLIENT_FRAME);
  readonly #written = () => this.#afterWrite();
  readonly #sink = (type: number, buf: Uint8Array, at: number, end: number) => this.#frame(type, buf, at, end);
  #isLoggedIn = false;
  #isBlocked = false;
  #hasEnded = false;
  #heardAt = 0;
  #resolve: (reason: string) => void = () => {};

  constructor(socket: Duplex, events: SessionEvents) {
    this.#socket = socket;
    this.#events = events;
    this.login = events.login;
  }

  get isWritable(): boolean {
    return this.#isLoggedIn && !this.#isBlocked && !this.#hasEnded;
  }

  /** Resolves with the reason when the connection has ended. `head`: bytes that were read behind the upgrade. */
  run(head: Uint8Array): Promise<string> {
    const { receiveTimeout, now } = this.#events;
    this.#heardAt = now();
    const check = () => {
      const left = receiveTimeout - (now() - this.#heardAt);
      if (left <= 0) this.end(`the DERP server sent nothing for ${receiveTimeout / 1000} s`);
      else timer = setTimeout(check, left);
    };
    let timer = setTimeout(check, receiveTimeout);
    const loginTimer = setTimeout(() => {
      if (!this.#isLoggedIn) this.end("the DERP server did not greet within 10 s");
    }, CONNECT_TIMEOUT_MS);
    return new Promise<string>((resolve) => {
      this.#resolve = resolve;
      this.#socket.on("error", (error: Error) => this.end(`the connection to the DERP server broke: ${error.message}`));
      this.#socket.on("end", () => this.end("the DERP server closed the connection"));
      this.#socket.on("close", () => this.end("the DERP server closed the connection"));
      this.#socket.on("data", (chunk: Uint8Array) => this.#receive(chunk));
      if (head.length > 0) this.#receive(head);
      this.#socket.resume();
    }).finally(() => {
      clearTimeout(timer);
      clearTimeout(loginTimer);
    });
  }

  write(bytes: Uint8Array): void {
    if (this.#hasEnded) return;
    this.#socket.write(bytes, this.#written);
    this.#isBlocked = this.#socket.writableLength > 0;
  }

  end(reason: string): void {
    if (this.#hasEnded) return;
    this.#hasEnded = true;
    this.#socket.destroy();
    this.#resolve(reason);
  }

  #receive(chunk: Uint8Array): void {
    if (this.#hasEnded) return;
    this.#heardAt = this.#events.now();
    try {
      this.#decoder.feed(chunk, this.#sink);
    } catch (error) {
      if (!(error instanceof DerpError)) throw error;
      this.end(error.message);
    }
  }

  #frame(type: number, buf: Uint8Array, at: number, end: number): boolean {
    if (this.#isLoggedIn) {
      this.#events.onFrame(type, buf, at, end);
      return !this.#hasEnded;
    }
    if (type !== FrameType.ServerKey) throw new DerpError("the DERP server does not begin with its key");
    this.login.receiveServerKey(buf.subarray(at + FRAME_HEADER, end));
    this.write(this.login.clientInfo(this.#events.random(NONCE_LENGTH)));
    this.#isLoggedIn = true;
    this.#decoder.expectLargeFrames();
    this.#events.onLogin();
    return !this.#hasEnded;
  }

  #afterWrite(): void {
    if (!this.#isBlocked || this.#hasEnded || this.#socket.writableLength > 0) return;
    this.#isBlocked = false;
    this.#events.onDrain();
  }
}

// ---- pure parts ----

/** The rate at which a relay wants to be sent to. */
export class TokenBucket {
  #tokens: number;
  #at: number;

  constructor(
    readonly bytesPerSecond: number,
    readonly burst: number,
    now: number,
  ) {
    this.#tokens = burst;
    this.#at = now;
  }

  /** False when `bytes` are too many just now; then none are taken. */
  take(bytes: number, now: number): boolean {
    this.#tokens = Math.min(this.burst, this.#tokens + ((now - this.#at) * this.bytesPerSecond) / 1000);
    this.#at = now;
    if (bytes > this.#tokens) return false;
    this.#tokens -= bytes;
    return true;
  }
}

function key(bytes: Uint8Array): string {
  return bytes.join();
}
