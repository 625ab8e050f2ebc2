// The HTTP APIs: one implementation for the admin socket, whose callers may do everything, and for the public listener,
// whose callers show a key.
import { type Context, Hono } from "hono";
import { Attempts } from "../../net/ratelimit.ts";
import { ApiKeys } from "../apikeys.ts";
import { Commands } from "../commands.ts";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { Logins } from "../login.ts";
import { OAuthClients } from "../oauth.ts";
import type { Webhooks } from "../webhooks.ts";
import { authenticate } from "./authenticate.ts";
import { type Caller, SCOPES, SOCKET_CALLER } from "./caller.ts";
import { describedBy } from "./docs.ts";
import type { ApiDescription } from "./openapi.ts";
import { type MountOptions, mount } from "./operation.ts";
import { Problem } from "./shapes.ts";
import { operationsV1 } from "./v1.ts";
import { absentV2, operationsV2, renderErrorV2 } from "./v2.ts";
import { ErrorV2 } from "./v2-shapes.ts";

/** What the operations of all APIs work on. */
export interface ApiParts {
  commands: Commands;
  logins: Logins;
  apiKeys: ApiKeys;
  oauth: OAuthClients;
  webhooks: Webhooks;
}

export interface Apis {
  /** For the admin socket. */
  local: Hono;
  /** For the public listener. */
  remote: Hono;
  /** Forgets keys and tokens that are long over. */
  sweep(): Promise<void>;
}

const BEARER = {
  bearer: { type: "http", scheme: "bearer", description: "An API key: `weft apikeys create`." },
};

export function createApis(context: ControlContext, logins: Logins, webhooks: Webhooks): Apis {
  const parts: ApiParts = {
    commands: new Commands(context),
    logins,
    apiKeys: new ApiKeys(context),
    oauth: new OAuthClients(context),
    webhooks,
  };
  const attempts = new Attempts({
    what: "API key",
    log: (line) => context.log(line),
    count: (what) => context.metrics.loginFailures.add(what),
  });
  const { apiKeys, oauth } = parts;
  const credentials = { apiKeys, oauth, attempts, now: () => context.now(), log: (line: string) => context.log(line) };
  const v1: ApiDescription = {
    title: "Weft API, version 1",
    description: "What the command line does, in the shapes of Headscale's API.",
    version: "1",
    base: "/api/v1",
    operations: operationsV1(context, parts),
    error: { schema: Problem, type: "application/problem+json" },
    securitySchemes: BEARER,
  };
  const v2: ApiDescription = {
    title: "Weft API, version 2",
    description: "What makes sense here of Tailscale's public API, in its shapes. The tailnet is always `-`.",
    version: "2",
    base: "/api/v2",
    operations: operationsV2(context, parts, credentials),
    error: { schema: ErrorV2, type: "application/json" },
    securitySchemes: {
      ...BEARER,
      basic: { type: "http", scheme: "basic", description: "The key or token as user name." },
      oauth: {
        type: "oauth2",
        flows: {
          clientCredentials: {
            tokenUrl: "/api/v2/oauth/token",
            scopes: Object.fromEntries(SCOPES.map((scope) => [scope, ""])),
          },
        },
      },
    },
  };
  const log = (line: string) => context.log(line);
  const note = (line: string) => context.note(line);
  const app = (who: (c: Context) => Caller) => {
    const forV1 = (c: Context) => {
      const caller = who(c);
      if (caller.kind === "oauth") throw new CommandError(403, "OAuth tokens are for /api/v2: this API takes API keys");
      return caller;
    };
    return new Hono()
      .route("/", describedBy(v1))
      .route("/", describedBy(v2))
      .route("/", mount({ ...v1, authenticate: forV1, renderError: renderProblem, log, note }))
      .route("/", mount({ ...v2, authenticate: who, renderError: renderErrorV2, absent: absentV2, log, note }));
  };
  return {
    local: app(() => SOCKET_CALLER),
    remote: app((c) => authenticate(c, credentials)),
    async sweep() {
      await parts.commands.sweep();
      await oauth.sweep();
    },
  };
}

/** Title, and the number that gRPC has for it. */
const KINDS: Record<number, [title: string, code: number]> = {
  400: ["Bad Request", 3],
  401: ["Unauthorized", 16],
  403: ["Forbidden", 7],
  404: ["Not Found", 5],
  409: ["Conflict", 6],
  412: ["Precondition Failed", 9],
  413: ["Content Too Large", 11],
  429: ["Too Many Requests", 8],
  501: ["Not Implemented", 12],
};

/** RFC 7807, and what Headscale's errors had before it did so. */
const renderProblem: MountOptions["renderError"] = (c, status, message, data) => {
  const [title, code] = KINDS[status] ?? ["Internal Server Error", 13];
  const body = {
    type: "about:blank",
    title,
    status,
    detail: message,
    code,
    message,
    details: [],
    ...(data !== undefined && { errors: data }),
  };
  return c.body(JSON.stringify(body), status as 400, { "Content-Type": "application/problem+json" });
};
