// A page of some other site can make its own name resolve to this server's address and then read what this server answers
// (DNS rebinding). So pages are served only under the name in `serverUrl`, "localhost", or a bare IP address: a name that
// somebody else controls is none of these.
import type { MiddlewareHandler } from "hono";
import { parseIP } from "../../wire/ip.ts";

/** "host", "host:port", "[v6]:port" -> the host, lower case. Null: it is nothing like that. */
function hostOf(header: string): string | null {
  const match = /^(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?$/i.exec(header);
  return match ? match[1]!.toLowerCase().replace(/^\[|\]$/g, "") : null;
}

export function onlyFor(serverUrl: string): MiddlewareHandler {
  const own = new URL(serverUrl).hostname.replace(/^\[|\]$/g, "");
  return async (c, next) => {
    const host = hostOf(c.req.header("host") ?? "");
    if (host === null || (host !== own && host !== "localhost" && parseIP(host) === null))
      return c.text(`this server is found at ${serverUrl}\n`, 421);
    return next();
  };
}
