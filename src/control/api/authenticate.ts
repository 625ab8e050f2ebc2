// Who is behind an HTTP request: API keys as Bearer, or as the user name of Basic as Tailscale's clients send them, and
// access tokens of OAuth clients. Guessing costs time (net/ratelimit.ts); a secret that is good, or was once, is no guess
// and never waits for those of its neighbours.
import type { Context } from "hono";
import { clientAddress } from "../../net/client-address.ts";
import type { Attempts } from "../../net/ratelimit.ts";
import type { ApiKeys } from "../apikeys.ts";
import { CommandError } from "../errors.ts";
import type { OAuthClients } from "../oauth.ts";
import type { Caller } from "./caller.ts";

export interface Credentials {
  apiKeys: ApiKeys;
  oauth: OAuthClients;
  attempts: Attempts;
  now(): number;
  log(line: string): void;
}

/** Throws CommandError: 401, or 429 to a wrong key while this address must wait. */
export function authenticate(c: Context, { apiKeys, oauth, attempts, now, log }: Credentials): Caller {
  const text = credential(c.req.header("Authorization") ?? "", c.req.header("Sec-Fetch-Site"));
  if (text === null)
    throw new CommandError(401, "this needs an API key: send it as `Authorization: Bearer KEY` (weft apikeys create)");
  const caller = text.startsWith("hskey-oauthtok-") ? byToken(oauth, text) : byKey(apiKeys, text);
  if (caller === null) {
    noteGuess(c, "key", { attempts, now, log });
    throw new CommandError(401, "this API key or token is not known here: check that it was copied whole");
  }
  if (caller === "expired")
    throw new CommandError(401, "this API key or token has expired: make a new one (weft apikeys create)");
  attempts.succeeded(clientAddress(c));
  return caller;
}

/** A wrong secret was shown. Throws CommandError 429 while the address must wait. */
export function noteGuess(
  c: Context,
  what: string,
  { attempts, now, log }: Omit<Credentials, "apiKeys" | "oauth">,
): void {
  const address = clientAddress(c);
  const wait = attempts.wait(address, now());
  if (wait > 0) {
    const message = `too many wrong keys from your address: try again in ${Math.ceil(wait / 1000)} s`;
    throw new CommandError(429, message, undefined, wait);
  }
  attempts.failed(address, now());
  log(`API: a wrong ${what} from ${address}`);
}

function byKey(apiKeys: ApiKeys, text: string): Caller | "expired" | null {
  const record = apiKeys.authenticate(text);
  if (record === null || record === "expired") return record;
  return { kind: "api-key", name: `API key ${record.id}`, scopes: null, tags: [] };
}

function byToken(oauth: OAuthClients, text: string): Caller | "expired" | null {
  const bearer = oauth.bearer(text);
  if (bearer === null || bearer === "expired") return bearer;
  const { client, scopes, tags } = bearer;
  return { kind: "oauth", name: `OAuth client ${client.prefix}`, scopes, tags };
}

/**
 * Null when there is none. Browsers send what they know of Basic by themselves, also where another site asks them to:
 * `site` says so, and then it counts for nothing.
 */
function credential(header: string, site: string | undefined): string | null {
  const [, scheme, value] = /^(Bearer|Basic) +(\S+)$/i.exec(header.slice(0, 1024)) ?? [];
  if (!scheme || !value) return null;
  if (scheme.toLowerCase() === "bearer") return value;
  if (site === "cross-site" || site === "same-site") return null;
  return basic(value).user || null;
}

/** User name and password of a Basic credential. */
export function basic(value: string): { user: string; password: string } {
  const [user = "", ...password] = Buffer.from(value, "base64").toString("utf8").split(":");
  return { user, password: password.join(":") };
}
