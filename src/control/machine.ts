// The endpoints inside Noise (spec/ts2021-control-protocol.md, sections 8 to 11 and 22): requests of machines, by HTTP/2.
//
// Any machine key completes a handshake, so strangers reach this: bodies are bounded, and a node key counts only together
// with the machine key that registered it.
import { constants, type IncomingHttpHeaders, type ServerHttp2Stream } from "node:http2";
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

/** What the control server does for machines. Both throw BadRequest. */
export interface MachineHandlers {
  /** `signal`: the client has gone away, so nobody waits for the answer any more. */
  register(body: Uint8Array, connection: Connection, signal: AbortSignal): Promise<RegisterResponse>;
  /** Answers on the stream. */
  map(body: Uint8Array, connection: Connection, stream: ServerHttp2Stream): Promise<void>;
}

/** Features whose endpoints clients ask for, and that this server does not have. */
const ABSENT: Record<string, string> = {
  "POST /machine/set-dns": "this control server cannot set DNS records",
  "POST /machine/feature/query": "this control server does not offer this feature",
  "POST /machine/id-token": "this control server issues no id tokens",
  "PATCH /machine/set-device-attr": "this control server keeps no device attributes",
  "POST /machine/audit-log": "this control server keeps no audit log of clients",
};

export async function handleMachineRequest(
  stream: ServerHttp2Stream,
  headers: IncomingHttpHeaders,
  connection: Connection,
  handlers: MachineHandlers,
): Promise<void> {
  const path = (headers[":path"] ?? "").split("?", 1)[0]!;
  const route = `${headers[":method"]} ${path}`;
  try {
    switch (route) {
      case "POST /machine/register": {
        const gone = new AbortController();
        stream.on("close", () => gone.abort());
        const response = await handlers.register(await readBody(stream), connection, gone.signal);
        respond(stream, 200, JSON.stringify(response), "application/json");
        return;
      }
      case "POST /machine/map":
        await handlers.map(await readBody(stream), connection, stream);
        return;
      case "POST /machine/update-health":
        await readBody(stream);
        respond(stream, 204);
        return;
      case "HEAD /machine/ping-response":
        respond(stream, 200);
        return;
      case "GET /machine/whoami":
        respond(stream, 200, `${connection.machineKey} (capability version ${connection.version})\n`);
        return;
      default:
        if (Object.hasOwn(ABSENT, route)) throw new BadRequest(ABSENT[route]!, 501);
        throw new BadRequest("no such endpoint", 404);
    }
  } catch (error) {
    if (error instanceof BadRequest) respond(stream, error.status, error.message);
    else respond(stream, 500, "internal error: the operator finds the reason in the log");
    if (!(error instanceof BadRequest) && !(error instanceof Abandoned)) throw error;
  }
}

/** Throws BadRequest when the client is older than this server can serve. */
export function checkVersion(version: number): void {
  if (version < MIN_CAPABILITY_VERSION)
    throw new BadRequest(
      `this client is too old for this control server (capability version ${version}, the oldest supported is ${MIN_CAPABILITY_VERSION}, Tailscale 1.80): update it`,
    );
}

/** The client went away before its request was complete. */
class Abandoned extends Error {}

export function respond(
  stream: ServerHttp2Stream,
  status: number,
  body = "",
  type = "text/plain; charset=utf-8",
): void {
  if (stream.destroyed || stream.closed || stream.headersSent) return;
  stream.respond({ ":status": status, ...(body && { "content-type": type }) });
  stream.end(body);
}

let bodiesReceiving = 0;

function readBody(stream: ServerHttp2Stream): Promise<Uint8Array> {
  return new Promise((resolve, reject) => {
    const chunks: Uint8Array[] = [];
    let length = 0;
    const timer = setTimeout(() => refuse(new BadRequest("the request body did not arrive in time")), BODY_TIMEOUT);
    const settle = () => {
      clearTimeout(timer);
      stream.removeListener("data", onData);
      bodiesReceiving -= length;
      length = 0;
    };
    const refuse = (error: BadRequest) => {
      settle();
      stream.resume();
      const linger = setTimeout(() => stream.close(constants.NGHTTP2_CANCEL), REFUSED_LINGER);
      stream.on("close", () => clearTimeout(linger));
      reject(error);
    };
    const onData = (chunk: Uint8Array) => {
      length += chunk.length;
      bodiesReceiving += chunk.length;
      chunks.push(chunk);
      if (length > MAX_BODY) refuse(new BadRequest(`the request body exceeds ${MAX_BODY} bytes`, 413));
      else if (bodiesReceiving > MAX_BODIES) refuse(new BadRequest("the server is busy: try again later", 503));
    };
    stream.on("data", onData);
    stream.on("end", () => {
      settle();
      resolve(Buffer.concat(chunks));
    });
    stream.on("close", () => {
      settle();
      reject(new Abandoned());
    });
  });
}
