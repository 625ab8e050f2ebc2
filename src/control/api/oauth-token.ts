// The token endpoint of OAuth 2.0 (RFC 6749, sections 2.3, 3.2, 4.4 and 5): a client shows its id and secret, in the form or
// as Basic, and gets an access token for an hour. Errors have the RFC's fields and those of the API.
import type { Context } from "hono";
import { z } from "zod";
import { clientAddress } from "../../net/client-address.ts";
import { CommandError } from "../errors.ts";
import { basic, type Credentials, noteGuess } from "./authenticate.ts";
import { type Operation, operation } from "./operation.ts";

const FORM = "application/x-www-form-urlencoded";
const MAX_FORM = 16 * 1024;
const CODES: Record<number, string> = { 401: "invalid_client", 403: "invalid_scope", 429: "temporarily_unavailable" };

export function tokenOperation(credentials: Credentials): Operation {
  return operation({
    method: "post",
    path: "/oauth/token",
    id: "getAccessToken",
    tag: "OAuth",
    summary: "An access token for a client (grant_type=client_credentials; client_id, client_secret, scope, tags)",
    anonymous: true,
    textBody: [FORM],
    body: z.string(),
    response: z.object({
      access_token: z.string(),
      token_type: z.literal("Bearer"),
      expires_in: z.int(),
      scope: z.string(),
    }),
    async handle({ body, c }) {
      c.header("Cache-Control", "no-store");
      try {
        return await issue(body, c, credentials);
      } catch (error) {
        if (!(error instanceof CommandError)) throw error;
        const { status, message, data, retryAfter } = error;
        const code = (data as string | undefined) ?? CODES[status] ?? "invalid_request";
        throw new CommandError(status, message, { error: code, error_description: message }, retryAfter);
      }
    },
  });
}

async function issue(body: string, c: Context, credentials: Credentials) {
  const { oauth, attempts } = credentials;
  if (body.length > MAX_FORM) throw new CommandError(400, `the form is longer than ${MAX_FORM} bytes`);
  const form = new URLSearchParams(body);
  const grant = form.get("grant_type") ?? "client_credentials";
  if (grant !== "client_credentials")
    throw new CommandError(400, "grant_type must be client_credentials", "unsupported_grant_type");
  const [, encoded] = /^Basic +(\S+)$/i.exec((c.req.header("Authorization") ?? "").slice(0, 1024)) ?? [];
  const shown = encoded ? basic(encoded) : null;
  const id = form.get("client_id") || decode(shown?.user ?? "");
  const secret = form.get("client_secret") || decode(shown?.password ?? "");
  if (secret === "") throw new CommandError(401, "client_id and client_secret are missing");
  const client = oauth.authenticate(id, secret);
  if (!client) {
    noteGuess(c, "OAuth client secret", credentials);
    throw new CommandError(401, "this OAuth client is not known here, or its secret is another");
  }
  attempts.succeeded(clientAddress(c));
  const words = (name: string) => {
    const text = form.get(name)?.trim() ?? "";
    return text === "" ? null : text.split(/[\s,]+/);
  };
  const { text, expiresIn, scopes } = await oauth.issue(client, words("scope"), words("tags"));
  return { access_token: text, token_type: "Bearer" as const, expires_in: expiresIn, scope: scopes.join(" ") };
}

/** In Basic, both are form-encoded first (RFC 6749, section 2.3.1). */
function decode(text: string): string {
  try {
    return decodeURIComponent(text.replaceAll("+", " "));
  } catch {
    return text;
  }
}
