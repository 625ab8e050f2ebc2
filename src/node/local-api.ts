// The local API: HTTP/1.1 on the daemon's unix socket, for the command line (spec/node-features.md, sections 5 and 6).
//
//   GET   status?peers=false   Status                GET   prefs       Prefs
//   PATCH prefs                MaskedPrefs -> Prefs  POST  start       { AuthKey, UpdatePrefs } -> 204
//   POST  logout               204                   POST  ping?ip=    PingResult
//   GET   derpmap              DERPMap               GET   whois?addr= { Node, UserProfile }
//   POST  netcheck             Report                POST  shutdown    204, then the daemon ends
//
// Everyone on this host may read; root and the daemon's own user may write, by SO_PEERCRED. A request with Origin, Referer
// or a foreign Host comes from a web page that was led here, and is refused.
import { chmodSync, existsSync, mkdirSync, unlinkSync } from "node:fs";
import { createServer as createHttpServer, type IncomingMessage, type ServerResponse } from "node:http";
import { createConnection, createServer, type Server, type Socket } from "node:net";
import { dirname } from "node:path";
import { type Credentials, peerCredentials } from "../../ffi/unix.ts";

const PREFIX = "/localapi/v0/";
/** The name that clients put into Host. */
export const LOCAL_API_HOST = "local-tailscaled.sock";
const MAX_BODY = 1024 * 1024;
const REQUEST_TIMEOUT = 30_000;

/** A request that cannot be done; `status` is the answer's. */
export class ApiError extends Error {
  override name = "ApiError";
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

export interface ApiRequest {
  method: string;
  /** Behind "/localapi/v0/". */
  path: string;
  query: URLSearchParams;
  /** Parsed JSON; undefined without a body. */
  body: unknown;
  /** The caller may change things. */
  canWrite: boolean;
}

/** Undefined answers 204, anything else is sent as JSON. Throws ApiError. */
export type ApiHandler = (request: ApiRequest) => Promise<unknown>;

/** Whether a daemon answers on this socket. */
export function isSocketAlive(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ path });
    const end = (alive: boolean) => {
      socket.destroy();
      resolve(alive);
    };
    socket.on("connect", () => end(true));
    socket.on("error", () => end(false));
  });
}

export class LocalApi {
  private constructor(
    private readonly server: Server,
    private readonly sockets: Set<Socket>,
    private readonly path: string,
  ) {}

  /** Throws with one sentence when another daemon has the socket or it cannot be made. */
  static async listen(path: string, handler: ApiHandler): Promise<LocalApi> {
    if (existsSync(path)) {
      if (await isSocketAlive(path))
        throw new Error(`a daemon is running already on ${path}: stop it, or give this one another --socket`);
      unlinkSync(path);
    }
    const http = createHttpServer({ requestTimeout: REQUEST_TIMEOUT }, (request, response) => {
      void answer(request, response, handler);
    });
    const sockets = new Set<Socket>();
    const server = createServer((socket) => {
      sockets.add(socket);
      socket.on("close", () => sockets.delete(socket));
      socket.on("error", () => socket.destroy());
      credentials.set(socket, credentialsOf(socket));
      http.emit("connection", socket);
    });
    try {
      mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
    } catch (error) {
      throw new Error(`the folder of the socket ${path} cannot be made: ${(error as Error).message}`);
    }
    await new Promise<void>((resolve, reject) => {
      server.once("error", (error: NodeJS.ErrnoException) =>
        reject(new Error(`cannot listen on the socket ${path}: ${error.message}`)),
      );
      server.listen(path, () => resolve());
    });
    chmodSync(path, 0o666);
    return new LocalApi(server, sockets, path);
  }

  /** Ends open requests and removes the socket. */
  close(): void {
    for (const socket of this.sockets) socket.destroy();
    this.server.close();
    try {
      unlinkSync(this.path);
    } catch {
      // Closing the server has removed it already.
    }
  }
}

const credentials = new WeakMap<object, Credentials | null>();

function credentialsOf(socket: Socket): Credentials | null {
  try {
    return peerCredentials(socket);
  } catch {
    return null;
  }
}

function mayWrite(socket: object): boolean {
  const who = credentials.get(socket);
  return who !== null && who !== undefined && (who.uid === 0 || who.uid === process.getuid?.());
}

async function answer(request: IncomingMessage, response: ServerResponse, handler: ApiHandler): Promise<void> {
  response.setHeader("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'");
  response.setHeader("X-Frame-Options", "DENY");
  response.setHeader("X-Content-Type-Options", "nosniff");
  try {
    const { headers } = request;
    if (headers.origin || headers.referer || (headers.host && headers.host !== LOCAL_API_HOST))
      throw new ApiError(403, "invalid localapi request");
    const url = new URL(request.url ?? "/", `http://${LOCAL_API_HOST}`);
    if (!url.pathname.startsWith(PREFIX)) throw new ApiError(404, "not found");
    const result = await handler({
      method: request.method ?? "GET",
      path: url.pathname.slice(PREFIX.length),
      query: url.searchParams,
      body: await readJson(request),
      canWrite: mayWrite(request.socket),
    });
    if (result === undefined) {
      response.writeHead(204).end();
      return;
    }
    response.writeHead(200, { "Content-Type": "application/json" }).end(`${JSON.stringify(result, null, "\t")}\n`);
  } catch (error) {
    const status = error instanceof ApiError ? error.status : 500;
    const { message } = error as Error;
    response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify({ error: message }));
  }
}

async function readJson(request: IncomingMessage): Promise<unknown> {
  const parts: Uint8Array[] = [];
  let total = 0;
  for await (const chunk of request) {
    total += (chunk as Uint8Array).length;
    if (total > MAX_BODY) throw new ApiError(413, `the request body is longer than ${MAX_BODY} bytes`);
    parts.push(chunk as Uint8Array);
  }
  if (total === 0) return undefined;
  try {
    return JSON.parse(Buffer.concat(parts).toString("utf8"));
  } catch {
    throw new ApiError(400, "the request body is no JSON");
  }
}
