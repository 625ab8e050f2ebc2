// Operations of an HTTP API: one description of each, of which come the route with its checks and the OpenAPI document
// (openapi.ts). What a request says is parsed by its schemas before the operation sees it.
import { type Context, Hono } from "hono";
import { bodyLimit } from "hono/body-limit";
import type { z } from "zod";
import { CommandError } from "../errors.ts";
import { type Caller, NOBODY, requireScope, type Scope } from "./caller.ts";

export type Method = "get" | "post" | "put" | "patch" | "delete";

interface Described {
  method: Method;
  /** "/node/{id}/rename/{newName}", below the API's base path. */
  path: string;
  /** Unique in its API. */
  id: string;
  tag: string;
  summary: string;
  /** What an OAuth token must hold for it; absent: nothing, or what the operation asks for itself. */
  scope?: Scope;
  /** It changes nothing, though its method could. */
  asks?: true;
  /** It takes no credential of the API. */
  anonymous?: true;
  /** Media types of a body that is taken as text, in place of JSON. */
  textBody?: readonly string[];
  /** Bytes of a body. Default: MAX_BODY. */
  maxBody?: number;
  /** Media types beside JSON of an answer. */
  textResponse?: readonly string[];
}

interface Schemas<P, Q, B, R> {
  params?: P;
  query?: Q;
  body?: B;
  response: R;
}

export interface Input<P, Q, B> {
  params: P;
  query: Q;
  body: B;
  caller: Caller;
  c: Context;
}

type Answer<R> = R | Response | Promise<R | Response>;

export interface Operation extends Described, Schemas<z.ZodObject, z.ZodObject, z.ZodType, z.ZodType> {
  run(caller: Caller, c: Context): Promise<unknown>;
}

/** Types of `handle` follow from the schemas. */
export function operation<
  P extends z.ZodObject = z.ZodObject,
  Q extends z.ZodObject = z.ZodObject,
  B extends z.ZodType = z.ZodType,
  R extends z.ZodType = z.ZodType,
>(
  description: Described &
    Schemas<P, Q, B, R> & { handle(input: Input<z.output<P>, z.output<Q>, z.output<B>>): Answer<z.input<R>> },
): Operation {
  const { handle, ...described } = description;
  const { params, query, body, textBody } = described;
  return {
    ...described,
    async run(caller, c) {
      return handle({
        params: params ? check(params, c.req.param(), "path") : ({} as z.output<P>),
        query: query ? check(query, c.req.query(), "query") : ({} as z.output<Q>),
        body: body ? check(body, await read(c, textBody !== undefined), "") : (undefined as z.output<B>),
        caller,
        c,
      });
    },
  };
}

function check<T extends z.ZodType>(schema: T, value: unknown, where: string): z.output<T> {
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  const field = issue.path.map(String).join(".").slice(0, 100);
  const place = [where, field].filter((part) => part !== "").join(" ") || "the request body";
  throw new CommandError(400, `${place}: ${issue.message.slice(0, 300)}`);
}

/** Whatever Content-Type says: the UIs that were written for Headscale send none. Nothing is an empty object. */
async function read(c: Context, isText: boolean): Promise<unknown> {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await c.req.arrayBuffer());
  } catch {
    throw new CommandError(400, "the request body is not UTF-8, or was cut off");
  }
  if (isText) return text;
  if (text === "") return {};
  try {
    return JSON.parse(text);
  } catch {
    throw new CommandError(400, "the request body is not JSON");
  }
}

export interface MountOptions {
  base: string;
  operations: readonly Operation[];
  /** Whose request it is. Throws CommandError. */
  authenticate(c: Context): Caller;
  /** The error in the shape of this API. */
  renderError(c: Context, status: number, message: string, data?: unknown): Response;
  /** Why something is not there that callers may look for. */
  absent?(path: string): string | null;
  log(line: string): void;
  /** For the record: who changed what. */
  note(line: string): void;
}

/** Bytes of a request body. */
const MAX_BODY = 1024 * 1024;
/** Of one with a whole policy in a JSON string: 1 MiB, of which each character may have a backslash. */
export const POLICY_BODY = (2 * 1024 + 64) * 1024;

/** The routes, and an answer for every other path below `base`. */
export function mount(options: MountOptions): Hono {
  const app = new Hono().basePath(options.base);
  const fail = (c: Context, error: unknown): Response => {
    if (error instanceof CommandError) {
      if (error.retryAfter > 0) c.header("Retry-After", String(Math.ceil(error.retryAfter / 1000)));
      if (error.status === 401) c.header("WWW-Authenticate", `Bearer realm="weft"`);
      return options.renderError(c, error.status, error.message, error.data);
    }
    options.log(`${c.req.method} ${c.req.routePath} failed: ${error instanceof Error ? error.message : String(error)}`);
    return options.renderError(c, 500, "internal error: the server's log says more");
  };
  app.onError((error, c) => fail(c, error));
  // A longer fixed path before the pattern that would match it, too: Hono takes the first that was registered.
  for (const entry of [...options.operations].sort((a, b) => parameters(a.path) - parameters(b.path))) {
    const { maxBody = MAX_BODY } = entry;
    const path = entry.path.replace(/\{(\w+)\}/g, ":$1");
    const limit = bodyLimit({
      maxSize: maxBody,
      onError: (c) => options.renderError(c, 413, `the request body is longer than ${maxBody} bytes`),
    });
    app.on(entry.method, path, async (c) => {
      try {
        // Before any of the body is read.
        const caller = entry.anonymous ? NOBODY : options.authenticate(c);
        if (entry.scope) requireScope(caller, entry.scope);
        let answer: unknown;
        const tooLarge = await limit(c, async () => {
          answer = await entry.run(caller, c);
        });
        answer = tooLarge ?? answer;
        const isDone = !(answer instanceof Response) || answer.ok;
        if (isDone && entry.method !== "get" && !entry.asks && !entry.anonymous)
          options.note(`${caller.name}: ${entry.id} ${c.req.path.slice(0, 300)}${madeBy(answer)}`);
        return answer instanceof Response ? answer : c.json(answer as object);
      } catch (error) {
        return fail(c, error);
      }
    });
  }
  app.all("/*", (c) => {
    const reason = options.absent?.(c.req.path) ?? null;
    if (reason !== null) return options.renderError(c, 501, reason);
    return options.renderError(c, 404, `there is no ${c.req.method} ${c.req.path.slice(0, 200)}`);
  });
  return app;
}

/** What an answer is about, for the record: " (user 5)". */
function madeBy(answer: unknown): string {
  if (typeof answer !== "object" || answer === null || answer instanceof Response) return "";
  const named = (value: unknown): value is { id: unknown } =>
    typeof value === "object" && value !== null && "id" in value;
  if (named(answer)) return ` (${answer.id})`;
  const [kind, about] = Object.entries(answer).find(([, value]) => named(value)) ?? [];
  return named(about) ? ` (${kind} ${about.id})` : "";
}

function parameters(path: string): number {
  return path.split("{").length;
}
