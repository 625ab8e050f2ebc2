// One TCP port for everything: HTTP/1.1 (or HTTPS) with a Hono app behind it, and connections that leave HTTP by an upgrade
// (ts2021, DERP, WebSocket). Strangers reach this: what they may send before it means something is bounded.
//
//   head          16 KiB, within 10 s of the connection (of the answer before, 60 s); then the whole request within 30 s
//   body          2 MiB and 64 KiB (a policy of 1 MiB as a JSON string), and what its reader allows; what comes behind an answer that did not wait for the body is read within the same 30 s, up to 32 MiB
//   connections   8192 that have not become an upgrade; for one more, the one goes that has been without a whole head for longest,
//                 or that has had a request for longest, if that is more than a minute: who reads no answer holds no place
// An upgraded socket leaves all of these behind: whoever takes it sets the limits of its protocol.
//
// TLS ends in a node:tls server, which hands plain sockets to node:http: its certificate can be replaced while it runs, and it
// answers the ACME challenge of ALPN "acme-tls/1" (RFC 8737). Everything else gets http/1.1, which upgrades need.
import { createServer as createHttpServer, type IncomingMessage, type Server } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { Duplex } from "node:stream";
import { createSecureContext, createServer as createTlsServer, type TLSSocket } from "node:tls";
import { createAdaptorServer } from "@hono/node-server";
import { Hono, type MiddlewareHandler } from "hono";
import { bodyLimit } from "hono/body-limit";
import { clientAddress, clientAddressOf, noteClient, type TrustedProxies } from "./client-address.ts";
import { type Logger, newRequestId, requestId, SILENT, whileServing } from "./logger.ts";

/** Takes over the socket. `head`: bytes that came behind the request's head. */
export type UpgradeHandler = (request: IncomingMessage, socket: Socket, head: Uint8Array) => void;

/** PEM texts; `cert` is a chain. */
export interface Certificate {
  cert: string;
  key: string;
}

export interface ListenOptions {
  /** IP address. */
  host: string;
  /** 0 asks the kernel. */
  port: number;
  /** The port speaks TLS. */
  tls?: Certificate;
  /** ALPN "acme-tls/1": the certificate that answers the challenge for a name; null: there is none. */
  challenge?: (name: string) => Certificate | null;
  /** Whose word about the client's address is taken. Default: nobody's. */
  trustedProxies?: TrustedProxies;
  log?: Logger;
  app: Hono;
  /** By path without query. Any other upgrade is refused with 404. */
  upgrades: Record<string, UpgradeHandler>;
  /** Overrides, for tests. */
  limits?: Partial<ListenLimits>;
}

export interface ListenLimits {
  headBytes: number;
  bodyBytes: number;
  /** Milliseconds. */
  headTimeout: number;
  requestTimeout: number;
  keepAliveTimeout: number;
  /** What a request may take where another connection wants its place. */
  answerTimeout: number;
  connections: number;
}

const LIMITS: ListenLimits = {
  headBytes: 16 * 1024,
  bodyBytes: (2 * 1024 + 64) * 1024,
  headTimeout: 10_000,
  requestTimeout: 30_000,
  keepAliveTimeout: 60_000,
  answerTimeout: 60_000,
  connections: 8192,
};

export interface Listener {
  host: string;
  port: number;
  /** New connections get this certificate. Throws when it cannot be used; then the one before stays. */
  setCertificate(certificate: Certificate): void;
  /** Stops accepting and closes what is still HTTP. Upgraded sockets belong to whoever took them. */
  close(): Promise<void>;
}

/** Resolves when the port answers. Rejects with one sentence. */
export async function listen(options: ListenOptions): Promise<Listener> {
  const limits = { ...LIMITS, ...options.limits };
  const log = options.log ?? SILENT;
  const trusted = options.trustedProxies ?? [];
  const server = createAdaptorServer({
    fetch: guarded(options.app, limits, log).fetch,
    createServer: createHttpServer,
    // It gives a client half a second; `drain` below gives it the time of a request.
    autoCleanupIncoming: false,
    serverOptions: { maxHeaderSize: limits.headBytes },
  }) as Server;
  server.timeout = 0;

  const patience = new Patience(limits);
  const take = (socket: Duplex) => {
    socket.on("error", () => {});
    if (!patience.makeRoom()) socket.destroy();
    else patience.begin(socket);
  };
  server.on("clientError", (_error, socket: Duplex) => socket.destroy());
  // A body that is cut off raises an error on the request; without a listener it would end the process.
  server.prependListener("request", (request, response) => {
    request.on("error", () => {});
    response.on("error", () => {});
    noteClient(request, trusted);
    patience.request(request, response);
    response.once("finish", () => drain(request));
  });
  server.on("upgrade", (request: IncomingMessage, socket: Socket, head: Buffer) => {
    patience.end(socket);
    request.on("error", () => {});
    socket.on("error", () => {});
    noteClient(request, trusted);
    const path = (request.url ?? "").split("?", 1)[0]!;
    const handler = Object.hasOwn(options.upgrades, path) ? options.upgrades[path] : undefined;
    if (!handler) {
      refuseUpgrade(socket, 404, "nothing can be upgraded here");
      return;
    }
    whileServing({ request: newRequestId(), client: clientAddressOf(request) }, () => {
      try {
        handler(request, socket, head);
      } catch (error) {
        log.error(`the upgrade of ${path} failed`, { error: describe(error) });
        socket.destroy();
      }
    });
  });

  const front = options.tls ? tlsFront(options, options.tls, limits, server, take) : server.on("connection", take);
  await new Promise<void>((resolve, reject) => {
    front.once("error", (error: NodeJS.ErrnoException) => reject(new Error(listenProblem(options, error))));
    front.listen(options.port, options.host, resolve);
  }).catch((error) => {
    patience.close();
    throw error;
  });
  front.on("error", () => {});
  const address = front.address() as AddressInfo;
  return {
    host: address.address,
    port: address.port,
    setCertificate: (certificate) => {
      if (!("setSecureContext" in front)) throw new Error("this port does not speak TLS");
      checkCertificate(certificate);
      front.setSecureContext(tlsOptions(certificate));
    },
    close: () =>
      new Promise((resolve) => {
        front.close(() => resolve());
        patience.close();
      }),
  };
}

/** What holds for every request, whatever app answers it: id, log, size, and errors that say nothing to strangers. */
function guarded(inner: Hono, limits: ListenLimits, log: Logger): Hono {
  const app = new Hono();
  const logged: MiddlewareHandler = (c, next) => {
    const request = newRequestId();
    return whileServing({ request, client: clientAddress(c) }, async () => {
      const started = performance.now();
      await next();
      c.header("X-Request-Id", request);
      const ms = Math.round(performance.now() - started);
      log.debug(`${c.req.method} ${c.req.path}`, { status: c.res.status, ms });
    });
  };
  app.use(logged);
  app.use(bodyLimit({ maxSize: limits.bodyBytes, onError: (c) => c.text("the request body is too large", 413) }));
  app.route("/", inner);
  app.onError((error, c) => {
    log.error(`${c.req.method} ${c.req.path} failed`, { error: describe(error) });
    return c.text(`internal error, request ${requestId()}`, 500);
  });
  return app;
}

/** With its stack: a handler that throws is a defect, and the log is where it is looked for. */
function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

function tlsOptions({ cert, key }: Certificate) {
  return { cert, key, minVersion: "TLSv1.2" } as const;
}

/** Throws with one sentence when a server cannot use it. */
export function checkCertificate(certificate: Certificate): void {
  try {
    createSecureContext(tlsOptions(certificate));
  } catch (error) {
    throw new Error(`the TLS certificate or key cannot be used: ${(error as Error).message}`);
  }
}

const ACME_ALPN = "acme-tls/1";

function tlsFront(
  options: ListenOptions,
  certificate: Certificate,
  limits: ListenLimits,
  server: Server,
  take: (socket: Duplex) => void,
) {
  checkCertificate(certificate);
  const { challenge } = options;
  const front = createTlsServer(
    {
      ...tlsOptions(certificate),
      handshakeTimeout: limits.headTimeout,
      ALPNProtocols: challenge ? ["http/1.1", ACME_ALPN] : ["http/1.1"],
      ...(challenge && {
        SNICallback: (
          name: string,
          done: (error: Error | null, context?: ReturnType<typeof createSecureContext>) => void,
        ) => {
          const answer = challenge(name);
          done(null, answer ? createSecureContext(tlsOptions(answer)) : undefined);
        },
      }),
    },
    (socket: TLSSocket) => {
      // The handshake was all that the challenge asked for.
      if (socket.alpnProtocol === ACME_ALPN) socket.destroy();
      else server.emit("connection", socket);
    },
  );
  front.on("connection", take);
  front.on("tlsClientError", (_error, socket: Duplex) => socket.destroy());
  return front;
}

/** How long each connection may take for what it does now: the one clock of connections that are still HTTP. */
class Patience {
  readonly #deadlines = new Map<Duplex, number>();
  /** Those of which a whole head is awaited, longest first: strangers who hold many of them must not shut others out. */
  readonly #headless = new Set<Duplex>();
  /** Those with a request, and since when; longest first. */
  readonly #working = new Map<Duplex, number>();
  readonly #timer: ReturnType<typeof setInterval>;

  constructor(private readonly limits: ListenLimits) {
    this.#timer = setInterval(() => this.#look(), Math.min(1000, limits.headTimeout / 4));
  }

  /** False: there are too many, and all of them are at work. */
  makeRoom(): boolean {
    if (this.#deadlines.size < this.limits.connections) return true;
    const [headless] = this.#headless;
    const oldest = headless ?? this.#stuck();
    if (!oldest) return false;
    this.end(oldest);
    oldest.destroy();
    return true;
  }

  begin(socket: Duplex): void {
    this.#wait(socket, this.limits.headTimeout);
    socket.on("close", () => this.end(socket));
  }

  /** The head is there; then the body, then the answer (which may take its time), then the wait for the next head. */
  request(request: IncomingMessage, response: NodeJS.EventEmitter): void {
    const { socket, headers } = request;
    this.#headless.delete(socket);
    this.#working.delete(socket);
    this.#working.set(socket, performance.now());
    const isWhole = headers["transfer-encoding"] === undefined && !Number(headers["content-length"] ?? 0);
    this.#set(socket, isWhole ? Number.POSITIVE_INFINITY : this.limits.requestTimeout);
    request.once("end", () => this.#set(socket, Number.POSITIVE_INFINITY));
    // A body that nobody wanted (drain) still has the request's time.
    response.once("close", () => {
      if (request.complete) this.#wait(socket, this.limits.keepAliveTimeout);
      else request.once("end", () => this.#wait(socket, this.limits.keepAliveTimeout));
    });
  }

  end(socket: Duplex): void {
    this.#headless.delete(socket);
    this.#working.delete(socket);
    this.#deadlines.delete(socket);
  }

  close(): void {
    clearInterval(this.#timer);
    for (const socket of this.#deadlines.keys()) socket.destroy();
  }

  /** A connection that has had a request for too long. */
  #stuck(): Duplex | undefined {
    const [first] = this.#working;
    return first && performance.now() - first[1] >= this.limits.answerTimeout ? first[0] : undefined;
  }

  /** For a head. */
  #wait(socket: Duplex, ms: number): void {
    if (socket.destroyed) return;
    this.#working.delete(socket);
    this.#headless.add(socket);
    this.#set(socket, ms);
  }

  #set(socket: Duplex, ms: number): void {
    if (!socket.destroyed) this.#deadlines.set(socket, performance.now() + ms);
  }

  #look(): void {
    const now = performance.now();
    for (const [socket, deadline] of this.#deadlines) if (deadline <= now) socket.destroy();
  }
}

/** Bytes of a body that are read behind an answer that did not wait for it. */
const MAX_DRAIN = 32 * 1024 * 1024;

/**
 * Reads what is left of a body after its answer (413, 401 …): were the connection closed on a client that still sends, the
 * reset would take the answer from it.
 */
export function drain(request: IncomingMessage): void {
  if (request.complete || request.destroyed) return;
  let bytes = 0;
  // Whoever read before may have stopped half-way, and would hold the rest back.
  request.removeAllListeners("data");
  request.on("data", (chunk: Uint8Array) => {
    bytes += chunk.length;
    if (bytes > MAX_DRAIN) request.socket.destroy();
  });
  request.resume();
}

/** Answers an upgrade request in plain HTTP and closes. */
export function refuseUpgrade(socket: Duplex, status: number, message: string): void {
  const reasons: Record<number, string> = {
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    503: "Service Unavailable",
  };
  const body = `${message}\n`;
  endSoon(
    socket,
    `HTTP/1.1 ${status} ${reasons[status] ?? "Error"}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`,
  );
}

/** Milliseconds that a peer has to take the last bytes and to close. */
const LINGER = 2_000;

/** The last word to a stranger, who may never close his end: the socket is gone soon after in any case. */
export function endSoon(socket: Duplex, last: string | Uint8Array): void {
  socket.on("error", () => {});
  socket.resume();
  socket.end(last);
  const timer = setTimeout(() => socket.destroy(), LINGER);
  timer.unref();
  socket.on("close", () => clearTimeout(timer));
}

function listenProblem({ host, port }: ListenOptions, error: NodeJS.ErrnoException): string {
  const where = `${host.includes(":") ? `[${host}]` : host}:${port}`;
  switch (error.code) {
    case "EADDRINUSE":
      return `${where} is in use by another program: stop it, or choose another address with --listen`;
    case "EADDRNOTAVAIL":
      return `${host} is not an address of this machine: choose one that \`ip address\` shows, with --listen`;
    case "EACCES":
      return `${where} needs the right to bind a port below 1024: run as root, or choose another port with --listen`;
    default:
      return `cannot listen on ${where}: ${error.message}`;
  }
}
