// What protects people who look at a server's pages with a browser.
import type { MiddlewareHandler } from "hono";
import { parseIP } from "../wire/ip.ts";

/** No page is shown in a frame, guessed at by content, or named to other sites. A route may say more. */
const SECURITY_HEADERS: [string, string][] = [
  ["X-Frame-Options", "DENY"],
  ["Content-Security-Policy", "frame-ancestors 'none'"],
  ["X-Content-Type-Options", "nosniff"],
  ["Referrer-Policy", "no-referrer"],
];

export const securityHeaders: MiddlewareHandler = async (c, next) => {
  await next();
  for (const [name, value] of SECURITY_HEADERS) if (!c.res.headers.has(name)) c.header(name, value);
};

/**
 * Refuses requests by a name that is not this server's (DNS rebinding: a hostile page whose name suddenly leads here). An
 * address or "localhost" cannot be such a name. `machines`: paths for programs, which find the server by any name.
 */
export function hostGuard(names: readonly string[], machines: readonly string[] = []): MiddlewareHandler {
  const allowed = new Set(["localhost", ...names.map((name) => name.toLowerCase())]);
  const isForMachines = (path: string) => machines.some((prefix) => path === prefix || path.startsWith(`${prefix}/`));
  return async (c, next) => {
    const host = hostOf(c.req.header("Host") ?? "");
    if (allowed.has(host) || parseIP(host) || isForMachines(c.req.path)) return next();
    return c.text("this server has another name; its operator can add this one to allowed_hosts", 421);
  };
}

/** "[2001:db8::1]:8080" is "2001:db8::1". */
function hostOf(header: string): string {
  return header
    .replace(/:\d{1,5}$/, "")
    .replace(/^\[(.*)\]$/, "$1")
    .replace(/\.$/, "")
    .toLowerCase();
}
