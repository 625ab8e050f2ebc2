// Whose request this is. A reverse proxy says so in a header; headers are believed only from proxies that the operator named
// (`trusted_proxies`), because anybody can write them. Of X-Forwarded-For it is the rightmost hop that is not such a proxy:
// proxies append to it, so what stands further left came from the client. X-Real-IP and True-Client-IP, which a proxy that
// appends passes on as it got them, count only without X-Forwarded-For.
import type { IncomingMessage } from "node:http";
import type { Context } from "hono";
import { formatIP, type IP, type Prefix, parseIP, parsePrefix, prefixContains, unmap } from "../wire/ip.ts";

export type TrustedProxies = readonly Prefix[];

/** From CIDRs or addresses. Throws with one sentence; "everybody" is refused, since then every header would be believed. */
export function parseTrustedProxies(texts: readonly string[]): TrustedProxies {
  return texts.map((text) => {
    const prefix = parsePrefix(text);
    if (!prefix)
      throw new Error(`trusted proxy ${JSON.stringify(text)} is not an address or prefix: write it as 192.0.2.0/24`);
    if (prefix.bits === 0)
      throw new Error(`trusted proxy ${text} would believe the headers of everybody: name the proxies' own addresses`);
    return prefix;
  });
}

const known = new WeakMap<IncomingMessage, string>();

/** The listener says for each request, before anything else sees it, who sent it. */
export function noteClient(request: IncomingMessage, trusted: TrustedProxies): void {
  known.set(request, resolve(request, trusted));
}

/** Address of the client, in canonical text; "" over a unix socket. */
export function clientAddress(c: Context): string {
  const request = (c.env as { incoming?: IncomingMessage } | undefined)?.incoming;
  return request ? clientAddressOf(request) : "";
}

/** The same of a request or upgrade outside Hono. */
export function clientAddressOf(request: IncomingMessage): string {
  return known.get(request) ?? resolve(request, []);
}

function resolve(request: IncomingMessage, trusted: TrustedProxies): string {
  const direct = parseIP(request.socket.remoteAddress ?? "");
  if (!direct) return "";
  const peer = unmap(direct);
  const isTrusted = (ip: IP) => trusted.some((prefix) => prefixContains(prefix, ip));
  return formatIP(isTrusted(peer) ? (claimed(request, isTrusted) ?? peer) : peer);
}

/** What a trusted proxy says. Null when it says nothing that is an address. */
function claimed(request: IncomingMessage, isTrusted: (ip: IP) => boolean): IP | null {
  const header = (name: string) => [request.headers[name] ?? []].flat().join(",");
  const forwarded = header("x-forwarded-for");
  if (forwarded.trim() === "") return parseHop(header("x-real-ip")) ?? parseHop(header("true-client-ip"));
  let nearest: IP | null = null;
  for (const hop of forwarded.split(",").reverse()) {
    const ip = parseHop(hop);
    // What is left of something unreadable cannot be judged either.
    if (!ip) break;
    nearest = ip;
    if (!isTrusted(ip)) break;
  }
  return nearest;
}

/** "192.0.2.1", "2001:db8::1", and with a port as some proxies write it: "192.0.2.1:4711", "[2001:db8::1]:4711". */
function parseHop(text: string): IP | null {
  const trimmed = text.trim();
  const host = /^\[([^\]]+)\](?::\d+)?$/.exec(trimmed)?.[1] ?? trimmed.replace(/^(\d+(?:\.\d+){3}):\d+$/, "$1");
  const ip = parseIP(host);
  return ip && unmap(ip);
}
