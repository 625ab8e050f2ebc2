// One TCP port for everything: HTTP/1.1 (or HTTPS) with a Hono app behind it, and connections that leave HTTP by an upgrade
// (ts2021, DERP, WebSocket). Strangers reach this: what they may send before it means something is bounded.
//
//   head          16 KiB and 10 s from the first byte to the last; then the whole request within 30 s
//   body          1 MiB
//   connections   4096 that have not become an upgrade; more are closed at once
// An upgraded socket leaves all of these behind: whoever takes it sets the limits of its protocol.
import { createServer as createHttpServer, type IncomingMessage, type Server } from "node:http";
import { createServer as createHttpsServer } from "node:https";
import type { AddressInfo, Socket } from "node:net";
import type { Duplex } from "node:stream";
import { createAdaptorServer } from "@hono/node-server";
import { Hono } from "hono";
import { bodyLimit } from "hono/body-limit";

/** Takes over the socket. `head`: bytes that came behind the request's head. */
export type UpgradeHandler = (request: IncomingMessage, socket: Socket, head: Uint8Array) => void;

export interface ListenOptions {
  /** IP address. */
  host: string;
  /** 0 asks the kernel. */
  port: number;
  /** PEM texts. */
  tls?: { cert: string; key: string };
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
  connections: number;
}

const LIMITS: ListenLimits = {
  headBytes: 16 * 1024,
  bodyBytes: 1024 * 1024,
  headTimeout: 10_000,
  requestTimeout: 30_000,
  keepAliveTimeout: 60_000,
  connections: 4096,
};

export interface Listener {
  host: string;
  port: number;
  /** Stops accepting and closes what is still HTTP. Upgraded sockets belong to whoever took them. */
  close(): Promise<void>;
}

/** Resolves when the port answers. Rejects with one sentence. */
export async function listen(options: ListenOptions): Promise<Listener> {
  const limits = { ...LIMITS, ...options.limits };
  const app = new Hono();
  app.use(bodyLimit({ maxSize: limits.bodyBytes, onError: (c) => c.text("the request body is too large", 413) }));
  app.route("/", options.app);
  app.onError((_error, c) => c.text("internal error", 500));

  const serverOptions = {
    maxHeaderSize: limits.headBytes,
    headersTimeout: limits.headTimeout,
    requestTimeout: limits.requestTimeout,
    keepAliveTimeout: limits.keepAliveTimeout,
    connectionsCheckingInterval: Math.min(1000, limits.headTimeout / 4),
  };
  const server = createAdaptorServer({
    fetch: app.fetch,
    ...(options.tls
      ? {
          createServer: createHttpsServer,
          serverOptions: { ...serverOptions, ...options.tls, ALPNProtocols: ["http/1.1"] },
        }
      : { createServer: createHttpServer, serverOptions }),
  }) as Server;

  const http = new Set<Duplex>();
  server.on(options.tls ? "secureConnection" : "connection", (socket: Duplex) => {
    socket.on("error", () => {});
    if (http.size >= limits.connections) {
      socket.destroy();
      return;
    }
    http.add(socket);
    socket.on("close", () => http.delete(socket));
  });
  server.on("clientError", (_error, socket: Duplex) => socket.destroy());
  server.on("tlsClientError", (_error, socket: Duplex) => socket.destroy());
  // A body that is cut off raises an error on the request; without a listener it would end the process.
  server.prependListener("request", (request, response) => {
    request.on("error", () => {});
    response.on("error", () => {});
  });
  server.on("upgrade", (request: IncomingMessage, socket: Socket, head: Buffer) => {
    http.delete(socket);
    request.on("error", () => {});
    socket.on("error", () => {});
    const path = (request.url ?? "").split("?", 1)[0]!;
    const handler = Object.hasOwn(options.upgrades, path) ? options.upgrades[path] : undefined;
    if (!handler) {
      refuseUpgrade(socket, 404, "nothing can be upgraded here");
      return;
    }
    try {
      handler(request, socket, head);
    } catch {
      socket.destroy();
    }
  });

  await new Promise<void>((resolve, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => reject(new Error(listenProblem(options, error))));
    server.listen(options.port, options.host, resolve);
  });
  server.on("error", () => {});
  const address = server.address() as AddressInfo;
  return {
    host: address.address,
    port: address.port,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of http) socket.destroy();
      }),
  };
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
  socket.end(
    `HTTP/1.1 ${status} ${reasons[status] ?? "Error"}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`,
  );
}

function listenProblem({ host, port, tls }: ListenOptions, error: NodeJS.ErrnoException): string {
  const where = `${host.includes(":") ? `[${host}]` : host}:${port}`;
  switch (error.code) {
    case "EADDRINUSE":
      return `${where} is in use by another program: stop it, or choose another address with --listen`;
    case "EADDRNOTAVAIL":
      return `${host} is not an address of this machine: choose one that \`ip address\` shows, with --listen`;
    case "EACCES":
      return `${where} needs the right to bind a port below 1024: run as root, or choose another port with --listen`;
    default:
      return tls && !error.syscall
        ? `the TLS certificate or key cannot be used: ${error.message}`
        : `cannot listen on ${where}: ${error.message}`;
  }
}
