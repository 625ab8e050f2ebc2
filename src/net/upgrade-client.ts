// The client's side of an HTTP/1.1 upgrade: connect, ask, and hand over the socket. ts2021 and DERP begin this way.
// Written on bare sockets because what follows the 101 head must not pass through an HTTP parser.
//
//   <method> <path> HTTP/1.1 CRLF Host, Upgrade, Connection and the caller's headers CRLF CRLF
//   HTTP/1.1 101 … CRLF headers CRLF CRLF <bytes of the new protocol>
import { readFileSync } from "node:fs";
import { createConnection, isIP, type Socket } from "node:net";
import type { Duplex } from "node:stream";
import { type ConnectionOptions, connect as tlsConnect } from "node:tls";
import { readPreface } from "./read-preface.ts";

const MAX_HEAD = 16 * 1024;
const MAX_ERROR_BODY = 200;

export interface UpgradeRequest {
  /** "http:" or "https:", host, port. Path and credentials of the URL are not used. */
  url: URL;
  method: "GET" | "POST";
  path: string;
  /** Token of the Upgrade header. */
  protocol: string;
  headers?: Record<string, string>;
  /** Milliseconds for name, connection, TLS and answer together. */
  timeout: number;
  signal?: AbortSignal;
  /** TLS name (SNI and certificate) instead of the host. */
  serverName?: string;
  /** False: take any certificate, because the protocol inside authenticates the server. Default true. */
  verifyCertificate?: boolean;
  /** A connected TCP socket to use instead of dialling one. It belongs to the request from then on. */
  socket?: Socket;
  /** How certificates are checked, when the defaults above do not do. */
  tls?: Pick<ConnectionOptions, "ca" | "checkServerIdentity">;
}

export interface Upgraded {
  socket: Duplex;
  /** Bytes behind the 101 head. */
  head: Uint8Array;
  /** Names in lower case. */
  headers: Map<string, string>;
}

/** The server answered, but not with 101. */
export class UpgradeRefused extends Error {
  override name = "UpgradeRefused";
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

/** Resolves with a paused socket without listeners. Rejects with one sentence; nothing is left open then. */
export async function dialUpgrade(request: UpgradeRequest): Promise<Upgraded> {
  const { url, path, timeout, signal } = request;
  const calledOff = `connecting to ${url.origin} was called off`;
  if (signal?.aborted) throw new Error(calledOff);
  const socket = open(request);
  socket.write(formatRequest(request));
  const answer = await readPreface(socket, {
    parse: (buffered) => parseAnswer(buffered, request),
    timeout,
    signal,
    errors: {
      late: `${url.origin} did not answer ${path} within ${timeout / 1000} s`,
      closed: `${url.origin} closed the connection before it answered ${path}`,
      broken: (reason) => `cannot connect to ${url.origin}: ${reason}`,
      calledOff,
    },
  });
  return { socket, ...answer };
}

/** Null while the head is not complete. Throws with one sentence when it is no upgrade. */
function parseAnswer(buffered: Uint8Array, { url, path, protocol }: UpgradeRequest): Omit<Upgraded, "socket"> | null {
  const end = Buffer.from(buffered.buffer, buffered.byteOffset, buffered.length).indexOf("\r\n\r\n");
  if (end < 0 || end > MAX_HEAD) {
    if (buffered.length > MAX_HEAD) throw new Error(`${url.origin} answered ${path} with an endless header`);
    return null;
  }
  const head = parseHead(buffered.subarray(0, end));
  if (!head) throw new Error(`${url.origin} does not speak HTTP on that port`);
  if (head.status === 101 && head.headers.get("upgrade")?.toLowerCase() === protocol.toLowerCase())
    return { head: buffered.slice(end + 4), headers: head.headers };
  const body = new TextDecoder().decode(buffered.subarray(end + 4, end + 4 + MAX_ERROR_BODY));
  const text = body.replace(/\s+/g, " ").trim();
  const detail = text && !/[\0-\x1f]|<html/i.test(text) ? ` (${text})` : "";
  const message = `${url.origin} answered ${path} with status ${head.status} instead of an upgrade${detail}`;
  throw new UpgradeRefused(message, head.status);
}

function open(request: UpgradeRequest): Duplex {
  const { url } = request;
  const secure = url.protocol === "https:";
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const port = url.port ? Number(url.port) : secure ? 443 : 80;
  if (!secure) return request.socket ?? createConnection({ host, port });
  const name = request.serverName ?? host;
  return tlsConnect({
    ...(request.socket ? { socket: request.socket } : { host, port }),
    ...(isIP(name) ? {} : { servername: name }),
    rejectUnauthorized: request.verifyCertificate ?? true,
    ...trustedRoots(),
    ...request.tls,
  });
}

/** SSL_CERT_FILE names the roots to trust instead of the built-in ones, as Go programs do it. */
export function trustedRoots(): { ca?: string } {
  const file = process.env.SSL_CERT_FILE;
  if (!file) return {};
  try {
    return { ca: readFileSync(file, "utf8") };
  } catch (error) {
    throw new Error(`SSL_CERT_FILE=${file} cannot be read: ${(error as Error).message}`);
  }
}

function formatRequest({ url, method, path, protocol, headers = {} }: UpgradeRequest): string {
  const lines = [`${method} ${path} HTTP/1.1`, `Host: ${url.host}`, `Upgrade: ${protocol}`, "Connection: upgrade"];
  for (const [name, value] of Object.entries(headers)) lines.push(`${name}: ${value}`);
  if (method === "POST") lines.push("Content-Length: 0");
  return `${lines.join("\r\n")}\r\n\r\n`;
}

function parseHead(bytes: Uint8Array): { status: number; headers: Map<string, string> } | null {
  const [statusLine, ...lines] = new TextDecoder("latin1").decode(bytes).split("\r\n");
  const match = /^HTTP\/1\.[01] (\d{3})(?: |$)/.exec(statusLine ?? "");
  if (!match) return null;
  const headers = new Map<string, string>();
  for (const line of lines) {
    const colon = line.indexOf(":");
    if (colon > 0) headers.set(line.slice(0, colon).trim().toLowerCase(), line.slice(colon + 1).trim());
  }
  return { status: Number(match[1]), headers };
}
