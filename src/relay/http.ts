// The relay on HTTP: takes connections over from the listener and carries their bytes to and from the rules in server.ts.
//
//   GET /derp, Upgrade: DERP                         101, then raw frames; with Derp-Fast-Start: 1 no HTTP answer at all
//   GET /derp, Upgrade: websocket, protocol derp     WebSocket, binary messages as a byte stream
//   GET /derp, Upgrade: websocket alone              ancient clients: as Upgrade: DERP
//   /derp/probe, /derp/latency-check                 latency measurement
//   /generate_204                                    captive portal detection
//
// spec/derp-wire.md sections 6 and 14.
import type { IncomingMessage } from "node:http";
import type { Socket } from "node:net";
import type { Duplex } from "node:stream";
import { Hono } from "hono";
import { type WebSocket, WebSocketServer } from "ws";
import { hex, randomBytes } from "../crypto/keys.ts";
import { clientAddressOf } from "../net/client-address.ts";
import { DERP_VERSION } from "../wire/derp.ts";
import { type RelayConnection, type RelayLimits, RelayServer, type Transport } from "./server.ts";

export interface RelayOptions {
  /** The relay's own Curve25519 key, 32 bytes. */
  privateKey: Uint8Array;
  /** Whether this node may use the relay, asked once at login. Absent: every node may. A rejection means no. */
  verify?: ((nodeKey: Uint8Array, ip: string) => boolean | Promise<boolean>) | undefined;
  /** 32 bytes that the relays of one region share. */
  meshKey?: Uint8Array | undefined;
  limits?: Partial<RelayLimits> | undefined;
  /** Milliseconds of a clock that never goes back. */
  now?: (() => number) | undefined;
}

/** Takes a connection over in the `upgrade` event of node:http; `head` is what was read behind the request. */
export type Upgrade = (request: IncomingMessage, socket: Duplex, head: Uint8Array) => void;

export interface Relay {
  /** Everything but the connections themselves. */
  app: Hono;
  upgrades: { "/derp": Upgrade };
  publicKey: Uint8Array;
  /** Counts and gauges by name, see stats.ts. */
  stats(): Record<string, number>;
  /** Ends all connections of a node, for instance when it was deleted. Returns how many. */
  disconnect(nodeKey: Uint8Array): number;
  close(): void;
}

const TICK_MS = 500;
/** The largest WebSocket message that is read; messages carry no meaning, so this bounds memory only. */
const MAX_MESSAGE = 1 << 20;
const WS_UNSUPPORTED = 1003;
const CHALLENGE = /^[A-Za-z0-9.\-_:]{1,64}$/;

export function createRelay(options: RelayOptions): Relay {
  const now = options.now ?? (() => performance.now());
  const server = new RelayServer({
    privateKey: options.privateKey,
    random: randomBytes,
    verify: options.verify,
    meshKey: options.meshKey,
    limits: options.limits,
  });
  const sockets = new WebSocketServer({
    noServer: true,
    perMessageDeflate: false,
    maxPayload: MAX_MESSAGE,
    clientTracking: false,
    handleProtocols: (offered) => (offered.has("derp") ? "derp" : false),
  });
  const timer = setInterval(() => server.tick(now()), TICK_MS);
  timer.unref();

  /** Starts a connection on a transport. Null when the relay has too many. */
  function begin(transport: Transport, request: IncomingMessage): RelayConnection | null {
    // Behind a trusted proxy the client's own address; the port is the proxy's then, and nobody can say a better one.
    const remote = { ip: clientAddressOf(request), port: request.socket.remotePort ?? 0 };
    return server.accept(transport, remote, now(), request.headers["ideal-node"] !== undefined);
  }

  function feed(conn: RelayConnection, chunk: Uint8Array): void {
    const at = now();
    conn.receive(chunk, at);
    server.flush(at);
  }

  function takeRaw(request: IncomingMessage, socket: Socket, head: Uint8Array): void {
    const isFastStart = request.headers["derp-fast-start"] === "1";
    const preamble = isFastStart ? "" : switchingProtocols(server.publicKey);
    const transport = new SocketTransport(socket, preamble, () => conn?.drained(now()));
    const conn = begin(transport, request);
    if (!conn) {
      refuse(socket, 503, "the relay has too many connections that are not logged in, try again later");
      return;
    }
    if (isFastStart) server.counters.fast_starts++;
    socket.setTimeout(0);
    socket.setNoDelay(true);
    const ended = () => conn.closed(now());
    socket.on("end", ended);
    socket.on("close", ended);
    socket.on("data", (chunk: Uint8Array) => feed(conn, chunk));
    if (head.length > 0) feed(conn, new Uint8Array(head));
    socket.resume();
  }

  function takeWebSocket(request: IncomingMessage, socket: Socket, head: Uint8Array): void {
    sockets.handleUpgrade(request, socket, Buffer.from(head), (ws) => {
      const transport = new WebSocketTransport(ws, socket, () => conn?.drained(now()));
      const conn = begin(transport, request);
      ws.on("error", () => ws.terminate());
      if (!conn) {
        ws.terminate();
        return;
      }
      ws.on("close", () => conn.closed(now()));
      ws.on("message", (data: Buffer | ArrayBuffer | Buffer[], isBinary: boolean) => {
        if (isBinary) {
          feed(
            conn,
            data instanceof ArrayBuffer ? new Uint8Array(data) : Array.isArray(data) ? Buffer.concat(data) : data,
          );
          return;
        }
        ws.close(WS_UNSUPPORTED, "DERP messages are binary");
        conn.closed(now());
      });
      server.counters.websocket_accepts++;
    });
  }

  const upgrade: Upgrade = (request, duplex, head) => {
    // node:http and node:https hand over a net.Socket or its TLS kind; their types say less.
    const socket = duplex as Socket;
    socket.on("error", () => socket.destroy());
    const protocol = (request.headers.upgrade ?? "").toLowerCase();
    const subprotocols = (request.headers["sec-websocket-protocol"] ?? "").split(",").map((name) => name.trim());
    if (protocol === "websocket" && subprotocols.includes("derp")) takeWebSocket(request, socket, head);
    else if (protocol === "websocket" || protocol === "derp") takeRaw(request, socket, head);
    else refuse(socket, 426, UPGRADE_REQUIRED);
  };

  return {
    app: createApp(),
    upgrades: { "/derp": upgrade },
    publicKey: server.publicKey,
    stats: () => server.stats(),
    disconnect: (nodeKey) => {
      const ended = server.disconnect(nodeKey);
      server.flush(now());
      return ended;
    },
    close: () => {
      clearInterval(timer);
      server.close();
      sockets.close();
    },
  };
}

// ---- transports ----

class SocketTransport implements Transport {
  readonly #socket: Socket;
  readonly #onDrain: () => void;
  readonly #written = () => this.#afterWrite();
  #preamble: string;
  #isBlocked = false;

  /** `preamble` goes out in front of the first bytes, in the same write. */
  constructor(socket: Socket, preamble: string, onDrain: () => void) {
    this.#socket = socket;
    this.#preamble = preamble;
    this.#onDrain = onDrain;
  }

  write(bytes: Uint8Array): boolean {
    if (this.#socket.destroyed) return true;
    if (this.#preamble) {
      bytes = Buffer.concat([Buffer.from(this.#preamble, "latin1"), bytes]);
      this.#preamble = "";
    }
    this.#socket.write(bytes, this.#written);
    this.#isBlocked = this.#socket.writableLength > 0;
    return !this.#isBlocked;
  }

  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  close(): void {
    this.#socket.destroy();
  }

  #afterWrite(): void {
    if (!this.#isBlocked || this.#socket.destroyed || this.#socket.writableLength > 0) return;
    this.#isBlocked = false;
    this.#onDrain();
  }
}

class WebSocketTransport implements Transport {
  readonly #ws: WebSocket;
  readonly #socket: Socket;
  readonly #onDrain: () => void;
  readonly #sent = () => this.#afterSend();
  #isBlocked = false;

  constructor(ws: WebSocket, socket: Socket, onDrain: () => void) {
    this.#ws = ws;
    this.#socket = socket;
    this.#onDrain = onDrain;
  }

  write(bytes: Uint8Array): boolean {
    if (this.#ws.readyState !== this.#ws.OPEN) return true;
    this.#ws.send(bytes, { binary: true }, this.#sent);
    this.#isBlocked = this.#ws.bufferedAmount > 0;
    return !this.#isBlocked;
  }

  pause(): void {
    this.#ws.pause();
  }

  resume(): void {
    this.#ws.resume();
  }

  close(): void {
    if (this.#ws.readyState === this.#ws.OPEN) this.#ws.terminate();
    this.#socket.destroy();
  }

  #afterSend(): void {
    if (!this.#isBlocked || this.#ws.bufferedAmount > 0) return;
    this.#isBlocked = false;
    this.#onDrain();
  }
}

// ---- HTTP ----

const UPGRADE_REQUIRED = "DERP requires connection upgrade";
const PAGE_HEADERS = {
  "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
  "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
  "X-Frame-Options": "DENY",
  "X-Content-Type-Options": "nosniff",
};
const HOME_PAGE = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Weft relay</title></head>
<body><h1>Weft relay</h1>
<p>This is a DERP server: it passes encrypted packets between the nodes of a mesh that cannot reach each other directly.</p>
</body></html>
`;

function createApp(): Hono {
  const app = new Hono();
  for (const path of ["/derp/probe", "/derp/latency-check"])
    app.all(path, (c) => {
      if (c.req.method !== "GET" && c.req.method !== "HEAD") return c.text("bogus probe method\n", 405);
      return c.body("", 200, { "Access-Control-Allow-Origin": "*" });
    });
  app.all("/derp", (c) => c.text(`${UPGRADE_REQUIRED}\n`, 426));
  app.all("/generate_204", (c) => {
    const challenge = c.req.header("X-Tailscale-Challenge") ?? "";
    if (CHALLENGE.test(challenge)) c.header("X-Tailscale-Response", `response ${challenge}`);
    c.header("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0");
    return c.body(null, 204);
  });
  app.get("/robots.txt", (c) => c.text("User-agent: *\nDisallow: /\n"));
  app.get("/", (c) => c.html(HOME_PAGE, 200, PAGE_HEADERS));
  return app;
}

function switchingProtocols(publicKey: Uint8Array): string {
  return [
    "HTTP/1.1 101 Switching Protocols",
    "Upgrade: DERP",
    "Connection: Upgrade",
    `Derp-Version: ${DERP_VERSION}`,
    `Derp-Public-Key: ${hex(publicKey)}`,
    "\r\n",
  ].join("\r\n");
}

const STATUS_TEXT = { 426: "Upgrade Required", 503: "Service Unavailable" };

function refuse(socket: Socket, status: keyof typeof STATUS_TEXT, reason: string): void {
  const head = `HTTP/1.1 ${status} ${STATUS_TEXT[status]}\r\nContent-Type: text/plain; charset=utf-8\r\n`;
  const text = `${head}Content-Length: ${reason.length + 1}\r\nConnection: close\r\n\r\n${reason}\n`;
  socket.end(text, () => socket.destroy());
}
