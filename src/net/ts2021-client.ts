// A node's connection to its control server: /key, the upgrade on /ts2021, Noise, and HTTP/2 inside
// (spec/ts2021-control-protocol.md, sections 1 to 7).
//
// One HTTP/2 session at a time, dialled when a request needs it and again after it was lost. Requests fail when the
// connection does; repeating them is the caller's business.
import { Buffer } from "node:buffer";
import { request as httpRequest } from "node:http";
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  connect as http2Connect,
  constants as http2Constants,
} from "node:http2";
import { request as httpsRequest } from "node:https";
import { isZeroKey, parseKey } from "../crypto/keys.ts";
import { NoiseInitiator, type NoiseKeys, readHandshakeReply } from "../wire/noise.ts";
import type { OverTLSPublicKeyResponse } from "../wire/tailcfg.ts";
import { NoiseDuplex } from "./noise-duplex.ts";
import { readPreface } from "./read-preface.ts";
import { dialUpgrade, trustedRoots, type Upgraded } from "./upgrade-client.ts";

const DIAL_TIMEOUT = 10_000;
const MAX_KEY_PAGE = 64 * 1024;
const PROTOCOL = "tailscale-control-protocol";
/** Bytes of a body that wait for their reader before the server is slowed down. */
const MAX_QUEUED = 1024 * 1024;
/**
 * What the server may send before we have read it, in bytes: to one stream, and on the connection, where HTTP/2 begins with
 * 64 KB. Headscale forgets a map stream that cannot be written to for some 50 ms.
 */
const STREAM_WINDOW = 4 * 1024 * 1024;
const CONNECTION_WINDOW = 16 * 1024 * 1024;
const { NGHTTP2_CANCEL, NGHTTP2_NO_ERROR } = http2Constants;

export interface Ts2021Options {
  /** "https://control.example.com" or "http://10.0.0.1:8080". A trailing slash is cut. */
  serverUrl: string;
  machinePrivate: Uint8Array;
  /** Capability version. */
  version: number;
  randomBytes: (n: number) => Uint8Array;
}

export interface ControlResponse {
  status: number;
  body: Uint8Array;
}

export interface ControlRequest {
  method: "GET" | "POST" | "HEAD";
  path: string;
  headers?: Record<string, string>;
  body?: Uint8Array | string;
  signal?: AbortSignal;
}

/** An answer whose body arrives over time. */
export interface ControlStream {
  status: number;
  /** Ends when the server ends the body; throws when the connection breaks or `close` was called. */
  chunks: AsyncIterable<Uint8Array>;
  close(): void;
}

/** The server could not be reached or broke the protocol; `message` is one sentence. */
export class ControlUnreachable extends Error {
  override name = "ControlUnreachable";
}

/**
 * The body of an answer. Listens from the beginning: a short answer is over before the one who asked is scheduled again,
 * and the runtime's own iterator then reports a premature close.
 */
class BodyQueue implements AsyncIterable<Uint8Array> {
  /** Called with the failure, if there is one before the body was asked for. */
  onFailure: (error: Error) => void = () => {};
  private readonly chunks: Uint8Array[] = [];
  private queued = 0;
  private ended = false;
  private error: Error | null = null;
  private wake: () => void = () => {};

  constructor(
    private readonly stream: ClientHttp2Stream,
    brokenOff: string,
  ) {
    stream.on("data", (chunk: Uint8Array) => {
      this.chunks.push(chunk);
      this.queued += chunk.length;
      if (this.queued > MAX_QUEUED) stream.pause();
      this.wake();
    });
    stream.on("end", () => {
      this.ended = true;
      this.wake();
    });
    stream.on("error", (error: Error) => this.fail(new ControlUnreachable(`${brokenOff}: ${error.message}`)));
    stream.on("aborted", () => this.fail(new ControlUnreachable(brokenOff)));
    stream.on("close", () => {
      if (stream.rstCode !== NGHTTP2_NO_ERROR) this.fail(new ControlUnreachable(brokenOff));
      // With a regular close "end" may still be on its way; after this turn it will not come any more.
      else setImmediate(() => this.fail(new ControlUnreachable(brokenOff)));
    });
  }

  fail(error: Error): void {
    if (this.ended || this.error) return;
    this.error = error;
    this.onFailure(error);
    this.wake();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array> {
    for (;;) {
      const chunk = this.chunks.shift();
      if (chunk) {
        this.queued -= chunk.length;
        if (this.queued <= MAX_QUEUED) this.stream.resume();
        yield chunk;
      } else if (this.error) {
        throw this.error;
      } else if (this.ended) {
        return;
      } else {
        await new Promise<void>((resolve) => {
          this.wake = resolve;
        });
      }
    }
  }
}

export class Ts2021Client {
  private readonly base: URL;
  private controlPublic: Uint8Array | null = null;
  private session: ClientHttp2Session | null = null;
  private dialing: Promise<ClientHttp2Session> | null = null;
  private readonly closed = new AbortController();

  constructor(private readonly options: Ts2021Options) {
    this.base = parseServerUrl(options.serverUrl);
  }

  /** The whole answer, at most `limit` bytes. Throws ControlUnreachable. */
  async request(request: ControlRequest, limit: number, timeout: number): Promise<ControlResponse> {
    const deadline = AbortSignal.timeout(timeout);
    const signal = request.signal ? AbortSignal.any([request.signal, deadline]) : deadline;
    try {
      const stream = await this.stream({ ...request, signal });
      const body = await readAll(stream.chunks, limit);
      if (!body) {
        stream.close();
        throw new ControlUnreachable(`${this.base.origin} answered ${request.path} with more than ${limit} bytes`);
      }
      return { status: stream.status, body };
    } catch (error) {
      if (!deadline.aborted || request.signal?.aborted) throw error;
      // A peer that vanished gives no sign: a late answer means that this connection is dead.
      this.drop();
      throw new ControlUnreachable(`${this.base.origin} did not answer ${request.path} within ${timeout / 1000} s`);
    }
  }

  /** Resolves when the headers are there. `signal` holds until the end of the body. Throws ControlUnreachable. */
  async stream(request: ControlRequest): Promise<ControlStream> {
    const session = await abortable(this.connect(), request.signal);
    let stream: ClientHttp2Stream;
    try {
      stream = session.request({
        ":method": request.method,
        ":path": request.path,
        ":scheme": "https",
        ":authority": this.base.host,
        ...request.headers,
      });
    } catch (error) {
      this.drop();
      throw new ControlUnreachable(`the connection to ${this.base.origin} was lost: ${(error as Error).message}`);
    }
    const body = new BodyQueue(stream, `${this.base.origin} broke off its answer to ${request.path}`);
    const close = () => stream.close(NGHTTP2_CANCEL);
    const onAbort = () => {
      close();
      body.fail(new ControlUnreachable(`the request for ${request.path} was called off`));
    };
    request.signal?.addEventListener("abort", onAbort, { once: true });
    stream.on("close", () => request.signal?.removeEventListener("abort", onAbort));
    if (request.signal?.aborted) onAbort();
    return new Promise((resolve, reject) => {
      body.onFailure = reject;
      // A connection that is killed right after it was made ends its streams in order, only without any answer.
      const unanswered = new ControlUnreachable(
        `${this.base.origin} closed the connection before it answered ${request.path}`,
      );
      stream.on("close", () => setImmediate(() => reject(unanswered)));
      stream.on("response", (headers) => resolve({ status: Number(headers[":status"]), chunks: body, close }));
      stream.end(request.body ?? "");
    });
  }

  /** Ends the connection; the next request dials again. */
  drop(): void {
    this.session?.destroy();
    this.session = null;
  }

  /** Asks /key again before the next dial: a server with a new key would refuse every handshake otherwise. */
  forgetServerKey(): void {
    this.controlPublic = null;
  }

  close(): void {
    this.closed.abort();
    this.drop();
  }

  private connect(): Promise<ClientHttp2Session> {
    if (this.session && !this.session.closed && !this.session.destroyed) return Promise.resolve(this.session);
    this.dialing ??= this.dial().finally(() => {
      this.dialing = null;
    });
    return this.dialing;
  }

  private async dial(): Promise<ClientHttp2Session> {
    try {
      const duplex = await this.handshake();
      const options = {
        createConnection: () => duplex,
        settings: { enablePush: false, initialWindowSize: STREAM_WINDOW },
        // Bun counts what arrives for a stream that is over, one frame for a request, and would end the session at 1000.
        maxSessionInvalidFrames: Number.MAX_SAFE_INTEGER,
      };
      const session = http2Connect(`https://${this.base.host}`, options);
      session.on("connect", () => session.setLocalWindowSize(CONNECTION_WINDOW));
      session.on("error", () => this.forget(session, duplex));
      session.on("goaway", () => this.forget(session, null));
      session.on("close", () => this.forget(session, duplex));
      duplex.on("close", () => {
        this.forget(session, null);
        session.destroy();
      });
      if (this.closed.signal.aborted) {
        session.destroy();
        duplex.destroy();
        throw new ControlUnreachable("the control connection was closed");
      }
      this.session = session;
      return session;
    } catch (error) {
      // A wrong server key shows as a failed handshake: ask for it anew next time.
      this.forgetServerKey();
      throw unreachable(this.base.origin, error as Error);
    }
  }

  private forget(session: ClientHttp2Session, duplex: NoiseDuplex | null): void {
    if (this.session === session) this.session = null;
    duplex?.destroy();
  }

  private async handshake(): Promise<NoiseDuplex> {
    this.controlPublic ??= await fetchControlKey(this.base, this.options.version, this.closed.signal);
    const initiator = new NoiseInitiator({
      version: this.options.version,
      machinePrivate: this.options.machinePrivate,
      ephemeralPrivate: this.options.randomBytes(32),
      controlPublic: this.controlPublic,
    });
    const upgraded = await dialUpgrade({
      url: this.base,
      method: "POST",
      path: "/ts2021",
      protocol: PROTOCOL,
      headers: { "X-Tailscale-Handshake": Buffer.from(initiator.initiation).toString("base64") },
      timeout: DIAL_TIMEOUT,
      signal: this.closed.signal,
      // The server proves itself by its Noise key, which came over verified TLS.
      verifyCertificate: false,
    });
    const { keys, rest } = await finishHandshake(upgraded, initiator, this.closed.signal);
    return new NoiseDuplex({ role: "client", socket: upgraded.socket, keys, head: rest });
  }
}

/** Throws with a sentence for the user. */
export function parseServerUrl(text: string): URL {
  let url: URL;
  try {
    url = new URL(text);
  } catch {
    throw new Error(`the login server ${JSON.stringify(text)} is no URL: give it as https://host or http://host:port`);
  }
  if (url.protocol !== "http:" && url.protocol !== "https:")
    throw new Error(`the login server ${JSON.stringify(text)} must begin with http:// or https://`);
  if (url.pathname !== "/" || url.search || url.hash || url.username)
    throw new Error(`the login server ${JSON.stringify(text)} must be scheme, host and port only`);
  return url;
}

/** `GET /key?v=N`: the server's Noise key. Throws ControlUnreachable. */
async function fetchControlKey(base: URL, version: number, signal: AbortSignal): Promise<Uint8Array> {
  const { status, body } = await httpGet(new URL(`/key?v=${version}`, base), MAX_KEY_PAGE, signal);
  if (status !== 200) throw new ControlUnreachable(`${base.origin}/key answered with status ${status}`);
  let page: OverTLSPublicKeyResponse | null;
  try {
    page = JSON.parse(new TextDecoder().decode(body));
  } catch {
    throw new ControlUnreachable(`${base.origin}/key is no JSON: is this a ts2021 control server?`);
  }
  const key = typeof page?.publicKey === "string" ? parseKey("mkey", page.publicKey) : null;
  if (!key || isZeroKey(key))
    throw new ControlUnreachable(`${base.origin}/key names no public key: is this a ts2021 control server?`);
  return key;
}

function httpGet(url: URL, limit: number, signal: AbortSignal): Promise<ControlResponse> {
  return requestPlain(url, "GET", limit, DIAL_TIMEOUT, signal);
}

/** A plain HTTP(S) request outside Noise with a bounded answer. Throws ControlUnreachable. */
export function requestPlain(
  url: URL,
  method: "GET" | "HEAD" | "POST",
  limit: number,
  timeout: number,
  signal: AbortSignal,
  body?: Uint8Array,
): Promise<ControlResponse> {
  const request = url.protocol === "https:" ? httpsRequest : httpRequest;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      outgoing.destroy();
      reject(new ControlUnreachable(`${url.origin} did not answer ${url.pathname} within ${timeout / 1000} s`));
    }, timeout);
    const fail = (error: Error) => {
      clearTimeout(timer);
      reject(unreachable(url.origin, error));
    };
    const outgoing = request(url, { method, signal, agent: false, ...trustedRoots() }, (answer) => {
      readAll(answer, limit).then((bytes) => {
        clearTimeout(timer);
        if (bytes) resolve({ status: answer.statusCode ?? 0, body: bytes });
        else {
          answer.destroy();
          reject(new ControlUnreachable(`${url.origin}${url.pathname} answered with more than ${limit} bytes`));
        }
      }, fail);
    });
    outgoing.on("error", fail);
    outgoing.end(body);
  });
}

/** Reads the server's handshake frame from the socket. Destroys the socket when it throws. */
function finishHandshake(
  { socket, head }: Upgraded,
  initiator: NoiseInitiator,
  signal: AbortSignal,
): Promise<{ keys: NoiseKeys; rest: Uint8Array }> {
  return readPreface(socket, {
    parse: (buffered) => {
      const reply = readHandshakeReply(buffered);
      if (!reply) return null;
      if ("error" in reply) throw new Error(`it refused the Noise handshake: ${reply.error}`);
      return { keys: initiator.finish(reply.response), rest: reply.rest };
    },
    timeout: DIAL_TIMEOUT,
    signal,
    head,
    errors: {
      late: "it did not finish the Noise handshake",
      closed: "it closed the connection in the Noise handshake",
      broken: (reason) => `the connection broke in the Noise handshake: ${reason}`,
      calledOff: "connecting to it was called off",
    },
  });
}

/** Null when there are more than `limit` bytes. */
async function readAll(chunks: AsyncIterable<Uint8Array>, limit: number): Promise<Uint8Array | null> {
  const parts: Uint8Array[] = [];
  let total = 0;
  for await (const chunk of chunks) {
    total += chunk.length;
    if (total > limit) return null;
    parts.push(chunk);
  }
  return Buffer.concat(parts);
}

function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(new ControlUnreachable("the request was called off"));
    if (signal.aborted) onAbort();
    signal.addEventListener("abort", onAbort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", onAbort));
  });
}

function unreachable(origin: string, error: Error): ControlUnreachable {
  if (error instanceof ControlUnreachable) return error;
  const message = error.message || String(error);
  return new ControlUnreachable(message.includes(origin) ? message : `control server ${origin}: ${message}`);
}
