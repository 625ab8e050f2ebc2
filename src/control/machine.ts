// The endpoints inside Noise (spec/ts2021-control-protocol.md, sections 8 to 11 and 22): requests of machines, by HTTP/2.
//
// Any machine key completes a handshake, so strangers reach this: bodies are bounded, and a node key counts only together
// with the machine key that registered it.
import { Buffer } from "node:buffer";
import { H2_ERROR, type Headers, type Http2Stream } from "../wire/h2.ts";
import { MIN_CAPABILITY_VERSION, type RegisterResponse } from "../wire/tailcfg.ts";
import { BadRequest } from "./requests.ts";
import type { Connection } from "./ts2021.ts";

const MAX_BODY = 1024 * 1024;
/** Milliseconds for a whole request body. */
const BODY_TIMEOUT = 30_000;
/** Bytes of all request bodies that are being received: strangers may open many streams. */
const MAX_BODIES = 64 * 1024 * 1024;
/** Milliseconds that a client has to stop sending what was refused. */
const REFUSED_LINGER = 5_000;
/** Milliseconds before those who ask too often hear so: a client that asks again at once must not keep the server busy. */
const HASTE_PAUSE = 1_000;

/** What the control server does for machines. All throw BadRequest. */
export interface MachineHandlers {
  /** Before anything is read of a request: 429 to a machine that asks too often. */
  admit(connection: Connection): void;
  /** `signal`: the client has gone away, so nobody waits for the answer any more. */
  register(body: Uint8Array, connection: Connection, signal: AbortSignal): Promise<RegisterResponse>;
  /** Answers on the stream. */
  map(body: Uint8Array, connection: Connection, stream: Http2Stream): Promise<void>;
  router: MachineRouter;
}

export interface MachineRequest {
  connection: Connection;
  /** Values of the segments of the path that the route calls ":name". */
  params: Readonly<Record<string, string>>;
  query: URLSearchParams;
  body: Uint8Array;
  /** Aborted when the client has gone away, so that nobody waits for the answer any more. */
  signal: AbortSignal;
}

export type MachineAnswer = { json: unknown } | { status: number; text?: string };
/** Throws BadRequest. */
export type MachineHandler = (request: MachineRequest) => MachineAnswer | Promise<MachineAnswer>;

interface Route {
  method: string;
  segments: readonly string[];
  handler: MachineHandler;
}

/** The endpoints beside register and map: each part of the server adds its own. */
export class MachineRouter {
  private readonly routes: Route[] = [];

  /** `path`: "/machine/thing/:id". */
  on(method: string, path: string, handler: MachineHandler): this {
    this.routes.push({ method, segments: path.split("/"), handler });
    return this;
  }

  /** Null: there is no such endpoint. */
  find(method: string, path: string): { handler: MachineHandler; params: Record<string, string> } | null {
    const given = path.split("/");
    for (const { method: wanted, segments, handler } of this.routes) {
      if (wanted !== method || segments.length !== given.length) continue;
      const params: Record<string, string> = {};
      const fits = segments.every((segment, i) => {
        if (!segment.startsWith(":")) return segment === given[i];
        params[segment.slice(1)] = given[i]!;
        return given[i] !== "";
      });
      if (fits) return { handler, params };
    }
    return null;
  }
}

export async function handleMachineRequest(
  stream: Http2Stream,
  headers: Headers,
  connection: Connection,
  handlers: MachineHandlers,
): Promise<void> {
  const [path, query = ""] = headers.get(":path")!.split("?", 2) as [string, string?];
  const method = headers.get(":method")!;
  const gone = new AbortController();
  stream.onClose(() => gone.abort());
  try {
    handlers.admit(connection);
    switch (`${method} ${path}`) {
      case "POST /machine/register": {
        const response = await handlers.register(await readBody(stream), connection, gone.signal);
        respond(stream, 200, JSON.stringify(response), "application/json");
        return;
      }
      case "POST /machine/map":
        await handlers.map(await readBody(stream), connection, stream);
        return;
      default: {
        const route = handlers.router.find(method, path);
        if (!route) throw new BadRequest("no such endpoint", 404);
        const body = method === "HEAD" ? new Uint8Array() : await readBody(stream);
        const { handler, params } = route;
        const request = { connection, params, query: new URLSearchParams(query), body, signal: gone.signal };
        const answer = await handler(request);
        if ("json" in answer) respond(stream, 200, JSON.stringify(answer.json), "application/json");
        else respond(stream, answer.status, answer.text);
      }
    }
  } catch (error) {
    if (error instanceof BadRequest) {
      const { retryAfter } = error;
      if (error.status === 429) await pause(gone.signal);
      respond(stream, error.status, error.message, undefined, retryAfter > 0 ? { "retry-after": `${retryAfter}` } : {});
    } else respond(stream, 500, "internal error: the operator finds the reason in the log");
    if (!(error instanceof BadRequest) && !(error instanceof Abandoned)) throw error;
  }
}

/** Meanwhile the body that nobody wants is thrown away as it comes. */
function pause(gone: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, HASTE_PAUSE);
    gone.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}

/** Throws BadRequest when the client is older than this server can serve. */
export function checkVersion(version: number): void {
  if (version < MIN_CAPABILITY_VERSION)
    throw new BadRequest(
      `this client is too old for this control server (capability version ${version}, the oldest supported is ${MIN_CAPABILITY_VERSION}, Tailscale 1.62): update it`,
    );
}

/** The client went away before its request was complete. */
class Abandoned extends Error {}

export function respond(
  stream: Http2Stream,
  status: number,
  body = "",
  type = "text/plain; charset=utf-8",
  headers: Record<string, string> = {},
): void {
  stream.respond(status, { ...(body && { "content-type": type }), ...headers }, Buffer.from(body));
}

let bodiesReceiving = 0;

function readBody(stream: Http2Stream): Promise<Uint8Array> {
  return new Promise((resolve, reject) => {
    const chunks: Uint8Array[] = [];
    let length = 0;
    const timer = setTimeout(() => refuse(new BadRequest("the request body did not arrive in time")), BODY_TIMEOUT);
    const settle = () => {
      clearTimeout(timer);
      stream.onData = null;
      stream.onEnd = null;
      bodiesReceiving -= length;
      length = 0;
    };
    const refuse = (error: BadRequest) => {
      settle();
      const linger = setTimeout(() => stream.reset(H2_ERROR.CANCEL), REFUSED_LINGER);
      stream.onClose(() => clearTimeout(linger));
      reject(error);
    };
    stream.onData = (chunk) => {
      length += chunk.length;
      bodiesReceiving += chunk.length;
      chunks.push(chunk);
      if (length > MAX_BODY) refuse(new BadRequest(`the request body exceeds ${MAX_BODY} bytes`, 413));
      else if (bodiesReceiving > MAX_BODIES) refuse(new BadRequest("the server is busy: try again later", 503));
    };
    stream.onEnd = () => {
      settle();
      resolve(Buffer.concat(chunks));
    };
    stream.onClose(() => {
      settle();
      reject(new Abandoned());
    });
  });
}
