// Questions to a node over its map stream (spec/ts2021-control-protocol.md, section 21): is it there, how does it reach
// another one, and HTTP requests to itself (C2N). The node answers at /machine/ping-response, through Noise or plainly; a
// random id in the URL ties the answer to the question.
import type * as tc from "../wire/tailcfg.ts";
import { CommandError } from "./errors.ts";

/** Questions that wait for an answer, of all nodes together. */
const MAX_WAITING = 4096;
const PING_RESPONSE = "/machine/ping-response";

export type PingType = "disco" | "TSMP" | "ICMP" | "peerapi";

export interface C2NRequest {
  method: "GET" | "POST";
  /** With the query: "/debug/health". */
  path: string;
  body?: Uint8Array;
}

export interface C2NResponse {
  status: number;
  headers: Record<string, string>;
  body: Uint8Array;
}

export interface PingsOptions {
  serverUrl: string;
  random(n: number): Uint8Array;
  /** Milliseconds. */
  now(): number;
  /** Puts the question on the node's map stream; false when it has none, or does not read it. */
  send(nodeId: number, request: tc.PingRequest): boolean;
  /** Whether a node is of this machine. */
  owns(machineKey: string, nodeId: number): boolean;
}

interface Waiting {
  nodeId: number;
  answered(body: Uint8Array): void;
  timer: ReturnType<typeof setTimeout>;
}

export class Pings {
  private readonly waiting = new Map<string, Waiting>();

  constructor(private readonly options: PingsOptions) {}

  /** Sends a question. `answered` is called when the answer comes within `timeout` milliseconds; else nothing happens. */
  ask(nodeId: number, question: tc.PingRequest, timeout: number, answered: (body: Uint8Array) => void): boolean {
    if (this.waiting.size >= MAX_WAITING) return false;
    const id = Buffer.from(this.options.random(16)).toString("hex");
    const URL = `${this.options.serverUrl}${PING_RESPONSE}?id=${id}`;
    if (!this.options.send(nodeId, { ...question, URL, URLIsNoise: true })) return false;
    const timer = setTimeout(() => this.waiting.delete(id), timeout);
    this.waiting.set(id, { nodeId, answered, timer });
    return true;
  }

  /** An answer. False: nobody waits for it. `machineKey` null: it did not come through Noise. */
  answer(id: string, machineKey: string | null, body: Uint8Array): boolean {
    const waiting = this.waiting.get(id);
    if (!waiting || (machineKey !== null && !this.options.owns(machineKey, waiting.nodeId))) return false;
    this.waiting.delete(id);
    clearTimeout(waiting.timer);
    waiting.answered(body);
    return true;
  }

  /** Milliseconds until the node had answered. Throws CommandError. */
  async head(nodeId: number, timeout: number): Promise<number> {
    const start = this.options.now();
    await this.wait(nodeId, {}, timeout);
    return this.options.now() - start;
  }

  /** What the node finds when it pings an address of the tailnet. Throws CommandError. */
  async ping(nodeId: number, type: PingType, ip: string, timeout: number): Promise<tc.PingResponse> {
    const body = await this.wait(nodeId, { Types: type, IP: ip }, timeout);
    try {
      const answer: unknown = JSON.parse(new TextDecoder().decode(body));
      if (typeof answer === "object" && answer !== null && !Array.isArray(answer)) return answer as tc.PingResponse;
    } catch {}
    throw new CommandError(409, `node ${nodeId} answered something that is no ping response`);
  }

  /** An HTTP request that the node's client answers itself. Throws CommandError. */
  async c2n(nodeId: number, { method, path, body }: C2NRequest, timeout: number): Promise<C2NResponse> {
    if (!/^\/[!-~]{0,500}$/.test(path)) throw new CommandError(400, "a C2N path begins with / and has no blanks");
    const head = `${method} ${path} HTTP/1.1\r\nHost: node\r\nC2n-Handler-Timeout: ${timeout}ms\r\n`;
    const length = body ? `Content-Length: ${body.length}\r\n` : "";
    const request = Buffer.concat([Buffer.from(`${head}${length}\r\n`), body ?? new Uint8Array()]);
    const answer = await this.wait(nodeId, { Types: "c2n", Payload: request.toString("base64") }, timeout);
    const response = parseResponse(answer);
    if (!response) throw new CommandError(409, `node ${nodeId} answered something that is no HTTP response`);
    return response;
  }

  private wait(nodeId: number, question: tc.PingRequest, timeout: number): Promise<Uint8Array> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new CommandError(409, `node ${nodeId} did not answer within ${timeout} ms`)),
        timeout,
      );
      const sent = this.ask(nodeId, question, timeout, (body) => {
        clearTimeout(timer);
        resolve(body);
      });
      if (sent) return;
      clearTimeout(timer);
      reject(new CommandError(409, `node ${nodeId} has no connection to this server that it reads`));
    });
  }

  /** Nobody waits for anything any more. */
  close(): void {
    for (const { timer } of this.waiting.values()) clearTimeout(timer);
    this.waiting.clear();
  }
}

/** An HTTP/1.1 response as bytes: with Content-Length, in chunks, or until the end. Null when it is none. */
export function parseResponse(bytes: Uint8Array): C2NResponse | null {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = buffer.indexOf("\r\n\r\n");
  if (end < 0) return null;
  const [first = "", ...lines] = buffer.subarray(0, end).toString("latin1").split("\r\n");
  const status = /^HTTP\/1\.[01] (\d{3})(?: |$)/.exec(first)?.[1];
  if (!status) return null;
  const headers: Record<string, string> = Object.create(null);
  for (const line of lines) {
    const colon = line.indexOf(":");
    if (colon < 1) return null;
    headers[line.slice(0, colon).toLowerCase()] = line.slice(colon + 1).trim();
  }
  const rest = buffer.subarray(end + 4);
  const chunked = headers["transfer-encoding"]?.toLowerCase() === "chunked";
  const length = headers["content-length"];
  if (!chunked && length !== undefined && !(/^\d{1,9}$/.test(length) && Number(length) <= rest.length)) return null;
  const body = chunked ? dechunk(rest) : length === undefined ? rest : rest.subarray(0, Number(length));
  return body && { status: Number(status), headers, body: Uint8Array.from(body) };
}

function dechunk(buffer: Buffer): Buffer | null {
  const chunks: Buffer[] = [];
  for (let at = 0; ; ) {
    const end = buffer.indexOf("\r\n", at);
    const digits = end < 0 ? undefined : /^([0-9a-fA-F]{1,7})(?:;|$)/.exec(buffer.toString("latin1", at, end))?.[1];
    if (digits === undefined) return null;
    const size = Number.parseInt(digits, 16);
    if (size === 0) return Buffer.concat(chunks);
    const data = buffer.subarray(end + 2, end + 2 + size);
    at = end + 4 + size;
    if (data.length < size || buffer.toString("latin1", at - 2, at) !== "\r\n") return null;
    chunks.push(data);
  }
}
