// Noise connections of nodes: the upgrade on /ts2021 (POST, or WebSocket by GET), the handshake, HTTP/2 inside, and the
// watch over connections whose other end has vanished (spec/ts2021-control-protocol.md, sections 3 to 7;
// research/control-on-bun.md, pitfalls 4 to 10).
import { Buffer } from "node:buffer";
import type { IncomingMessage } from "node:http";
import { Duplex } from "node:stream";
import { type WebSocket, WebSocketServer } from "ws";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { clientAddressOf } from "../net/client-address.ts";
import { endSoon, refuseUpgrade, type UpgradeHandler } from "../net/listener.ts";
import { NoiseHttp2 } from "../net/noise-http2.ts";
import type { Headers, Http2Stream } from "../wire/h2.ts";
import { encodeHandshakeError, INITIATION_LENGTH, NoiseError, respondToInitiation } from "../wire/noise.ts";

export const PROTOCOL = "tailscale-control-protocol";
const HANDSHAKE_NAME = "X-Tailscale-Handshake";
/** Base64 of an initiation. */
const HANDSHAKE_TEXT = Math.ceil(INITIATION_LENGTH / 3) * 4;

/** How connections whose other end has vanished are found. Milliseconds. */
export interface Liveness {
  /** Between looks at all connections. */
  interval: number;
  /** A connection that was silent this long is asked for a sign of life, … */
  pingAfter: number;
  /** … and given up when none comes within this. */
  pingTimeout: number;
  /** A connection on which no request is open ends after this. Clients open another when they need it. */
  idleTimeout: number;
}
const LIVENESS: Liveness = { interval: 5_000, pingAfter: 20_000, pingTimeout: 15_000, idleTimeout: 120_000 };
/** Connections of one machine; the oldest goes when there are more. Clients pool by authority and need two or three. */
const MAX_PER_MACHINE = 8;
/** Connections of all machines; for one more, the one goes that has been silent for longest without a request. */
const MAX_CONNECTIONS = 20_000;

/**
 * When so many connections have ended, and half of all, they are about to come again. Most of what they held is no part of the
 * JavaScript heap, so the collector does not see how much it is.
 */
const MANY_ENDED = 200;

/** One Noise connection. */
export interface Connection {
  /** "mkey:…", proved by the handshake. */
  readonly machineKey: string;
  /** Capability version in the handshake's header. */
  readonly version: number;
  /** Of the client, as far as proxies in front are trusted; "" when unknown. */
  readonly address: string;
}

interface Watched extends Connection {
  http2: NoiseHttp2;
  bytesSeen: number;
  lastHeard: number;
  pingSince: number | null;
}

export interface NoiseServerOptions {
  privateKey: Uint8Array;
  now: () => number;
  liveness?: Partial<Liveness>;
  /** Default 20,000. */
  maxConnections?: number;
  /** A request inside Noise. Must answer or close the stream. */
  onRequest(stream: Http2Stream, headers: Headers, connection: Connection): void;
}

export class NoiseServer {
  private readonly webSockets: WebSocketServer;
  private readonly connections = new Set<Watched>();
  private readonly byMachine = new Map<string, Set<Watched>>();
  private readonly watch: ReturnType<typeof setInterval>;
  private readonly liveness: Liveness;
  private closed = false;
  /** Connections, since memory was collected for them. */
  private ended = 0;

  constructor(private readonly options: NoiseServerOptions) {
    this.liveness = { ...LIVENESS, ...options.liveness };
    this.webSockets = new WebSocketServer({
      noServer: true,
      maxPayload: 64 * 1024,
      perMessageDeflate: false,
      handleProtocols: (offered: Set<string>) => (offered.has(PROTOCOL) ? PROTOCOL : false),
    });
    this.watch = setInterval(() => this.look(), this.liveness.interval);
  }

  /** Counts, for tests and health. */
  get stats(): { connections: number; streams: number } {
    let streams = 0;
    for (const connection of this.connections) streams += connection.http2.openStreams;
    return { connections: this.connections.size, streams };
  }

  /** For the debug page. */
  list(): { machineKey: string; address: string; version: number; requests: number; silentMs: number }[] {
    const now = this.options.now();
    return [...this.connections].map(({ machineKey, address, version, http2, lastHeard }) => ({
      machineKey,
      address,
      version,
      requests: http2.openStreams,
      silentMs: now - lastHeard,
    }));
  }

  readonly upgrade: UpgradeHandler = (request, socket, head) => {
    if (this.closed) refuseUpgrade(socket, 503, "the server is stopping");
    else if (!this.makeRoom()) refuseUpgrade(socket, 503, "too many connections");
    else if (request.method === "GET") this.upgradeWebSocket(request, socket, head);
    else if (request.method === "POST") this.upgradePost(request, socket, head);
    else refuseUpgrade(socket, 405, "POST, or a WebSocket by GET");
  };

  close(): void {
    this.closed = true;
    clearInterval(this.watch);
    for (const { http2 } of this.connections) http2.destroy();
  }

  private upgradePost(request: IncomingMessage, socket: Duplex, head: Uint8Array): void {
    if (request.headers.upgrade?.toLowerCase() !== PROTOCOL) {
      refuseUpgrade(socket, 400, `the Upgrade header must be ${PROTOCOL}`);
      return;
    }
    const initiation = decodeInitiation(request.headers[HANDSHAKE_NAME.toLowerCase()]);
    if (!initiation) {
      refuseUpgrade(socket, 400, `${HANDSHAKE_NAME} must be a handshake of ${INITIATION_LENGTH} bytes in base64`);
      return;
    }
    const switching = Buffer.from(
      `HTTP/1.1 101 Switching Protocols\r\nUpgrade: ${PROTOCOL}\r\nConnection: upgrade\r\n\r\n`,
    );
    const challenge = formatKey("chalpub", x25519Public(randomBytes(32)));
    this.accept(request, initiation, socket, head, switching, { nodeKeyChallenge: challenge });
  }

  private upgradeWebSocket(request: IncomingMessage, socket: Duplex, head: Uint8Array): void {
    const query = new URL(request.url ?? "", "http://unused").searchParams;
    const initiation = decodeInitiation(query.get(HANDSHAKE_NAME) ?? undefined);
    const offered = (request.headers["sec-websocket-protocol"] ?? "").split(",").map((name) => name.trim());
    if (request.headers.upgrade?.toLowerCase() !== "websocket" || !offered.includes(PROTOCOL)) {
      refuseUpgrade(socket, 400, `this must be a WebSocket of the subprotocol ${PROTOCOL}`);
      return;
    }
    if (!initiation) {
      refuseUpgrade(socket, 400, `${HANDSHAKE_NAME} must be a handshake of ${INITIATION_LENGTH} bytes in base64`);
      return;
    }
    this.webSockets.handleUpgrade(request, socket, Buffer.from(head), (webSocket) => {
      this.accept(request, initiation, new WebSocketDuplex(webSocket), new Uint8Array(0), new Uint8Array(0), null);
    });
  }

  private accept(
    request: IncomingMessage,
    initiation: Uint8Array,
    socket: Duplex,
    head: Uint8Array,
    prefix: Uint8Array,
    early: { nodeKeyChallenge: string } | null,
  ): void {
    let responded: ReturnType<typeof respondToInitiation>;
    try {
      responded = respondToInitiation({
        initiation,
        controlPrivate: this.options.privateKey,
        ephemeralPrivate: randomBytes(32),
      });
    } catch (error) {
      const message = error instanceof NoiseError ? error.message : "the handshake failed";
      endSoon(socket, Buffer.concat([prefix, encodeHandshakeError(message)]));
      return;
    }
    const { now, onRequest } = this.options;
    const connection: Watched = {
      machineKey: formatKey("mkey", responded.machinePublic),
      version: responded.version,
      address: clientAddressOf(request),
      http2: new NoiseHttp2({
        socket,
        keys: responded.keys,
        onRequest: (stream, headers) => {
          connection.lastHeard = now();
          stream.onClose(() => {
            connection.lastHeard = now();
          });
          onRequest(stream, headers, connection);
        },
        onPong: () => {
          connection.pingSince = null;
          connection.lastHeard = now();
        },
        onClose: () => this.forget(connection),
      }),
      bytesSeen: 0,
      lastHeard: now(),
      pingSince: null,
    };
    this.connections.add(connection);
    this.limitMachine(connection);
    connection.http2.start({ preamble: Buffer.concat([prefix, responded.response]), early, head });
  }

  /** Strangers who hold connections must not shut others out. False: all are at work. */
  private makeRoom(): boolean {
    if (this.connections.size < (this.options.maxConnections ?? MAX_CONNECTIONS)) return true;
    let victim: Watched | null = null;
    for (const connection of this.connections)
      if (connection.http2.openStreams === 0 && (!victim || connection.lastHeard < victim.lastHeard))
        victim = connection;
    victim?.http2.destroy();
    return victim !== null;
  }

  private limitMachine(connection: Watched): void {
    const own = this.byMachine.get(connection.machineKey) ?? new Set();
    this.byMachine.set(connection.machineKey, own.add(connection));
    const [oldest] = own;
    if (own.size > MAX_PER_MACHINE) oldest!.http2.destroy();
  }

  /** A peer whose link is gone raises no event: silence is answered with a ping, and a missing answer with the end. */
  private look(): void {
    const now = this.options.now();
    for (const connection of this.connections) {
      const { http2 } = connection;
      if (http2.bytesRead !== connection.bytesSeen) {
        connection.bytesSeen = http2.bytesRead;
        connection.lastHeard = now;
        connection.pingSince = null;
      }
      const silence = now - connection.lastHeard;
      if (http2.openStreams === 0 && silence > this.liveness.idleTimeout) http2.destroy();
      else if (connection.pingSince !== null) {
        if (now - connection.pingSince > this.liveness.pingTimeout) http2.destroy();
      } else if (http2.openStreams > 0 && silence > this.liveness.pingAfter) {
        connection.pingSince = now;
        http2.ping();
      }
    }
  }

  private forget(connection: Watched): void {
    this.connections.delete(connection);
    if (++this.ended >= Math.max(MANY_ENDED, this.connections.size)) {
      this.ended = 0;
      setImmediate(() => Bun.gc(true));
    }
    const own = this.byMachine.get(connection.machineKey);
    own?.delete(connection);
    if (own?.size === 0) this.byMachine.delete(connection.machineKey);
  }
}

function decodeInitiation(value: string | string[] | undefined): Uint8Array | null {
  if (typeof value !== "string" || value.length !== HANDSHAKE_TEXT || !/^[A-Za-z0-9+/]+=*$/.test(value)) return null;
  const bytes = new Uint8Array(Buffer.from(value, "base64"));
  return bytes.length === INITIATION_LENGTH ? bytes : null;
}

/** The binary messages of a WebSocket as a byte stream; their boundaries mean nothing. */
class WebSocketDuplex extends Duplex {
  constructor(private readonly webSocket: WebSocket) {
    super({ allowHalfOpen: false });
    webSocket.binaryType = "nodebuffer";
    webSocket.on("message", (data, isBinary) => {
      if (!isBinary) {
        this.destroy();
        return;
      }
      if (!this.push(data as Buffer)) webSocket.pause();
    });
    webSocket.on("close", () => this.destroy());
    webSocket.on("error", (error) => this.destroy(error));
    this.on("error", () => {});
  }

  override _read(): void {
    if (this.webSocket.isPaused) this.webSocket.resume();
  }

  override _write(chunk: Uint8Array, _encoding: BufferEncoding, callback: (error?: Error | null) => void): void {
    // The chunk belongs to the writer, and what is sent may wait.
    this.webSocket.send(Buffer.from(chunk), { binary: true }, callback);
  }

  override _final(callback: (error?: Error | null) => void): void {
    this.webSocket.close();
    callback();
  }

  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    this.webSocket.terminate();
    callback(error);
  }
}
