// The control server's API, as the command line reaches it: by the unix socket of this machine, or by URL and API key.
import type { ApiUser } from "../control/api/shapes.ts";
import { type Env, loadConfig, type ServerConfig } from "./config.ts";
import { type FlagSpec, nearest, UsageError } from "./flags.ts";
import { printable } from "./output.ts";

export interface Reach {
  config?: string;
  data?: string;
  socket?: string;
  address?: string;
  "api-key"?: string;
  insecure?: boolean;
  /** Milliseconds. */
  timeout?: number;
  /** Only the socket will do, whatever the configuration says of servers elsewhere. */
  here?: boolean;
}

type Method = "GET" | "POST" | "PUT" | "DELETE";

/** As the configuration has it. */
const DEFAULT_TIMEOUT = 5_000;

/** Nobody answers there. */
export class NoServer extends Error {}

/** Flags that say where the control server is. */
export const CONNECTION_FLAGS = {
  config: { kind: "string", short: "c" },
  data: "string",
  socket: "string",
  address: "string",
  "api-key": "string",
  timeout: "duration",
  insecure: "boolean",
} as const satisfies Record<string, FlagSpec["kind"] | FlagSpec>;

export class AdminClient {
  private constructor(
    /** For sentences. */
    private readonly where: string,
    private readonly base: string,
    private readonly init: BunFetchRequestInit,
    private readonly timeout: number,
  ) {}

  /** Flags win over environment and configuration. Throws UsageError. */
  static open(reach: Reach, env: Env, warn: (line: string) => void): AdminClient {
    const isLocal = reach.socket !== undefined || reach.data !== undefined;
    if (isLocal && reach.address !== undefined)
      throw new UsageError("--address is for a server elsewhere, --data and --socket for one here: give one of them");
    const isComplete = reach.socket !== undefined || (reach.address !== undefined && reach["api-key"] !== undefined);
    const config = isComplete && reach.config === undefined ? null : configFor(reach, env);
    const timeout = reach.timeout ?? config?.cli.timeout ?? DEFAULT_TIMEOUT;
    if (timeout <= 0) throw new UsageError("--timeout must be longer than nothing, for example 10s");
    const address = reach.address ?? (isLocal || reach.here ? "" : (config?.cli.address ?? ""));
    if (address === "") {
      if (reach["api-key"] !== undefined)
        throw new UsageError("--api-key needs --address: at the socket no key is asked for");
      const unix = reach.socket ?? config!.adminSocket.path;
      return new AdminClient(unix, "http://weft", { unix }, timeout);
    }
    const url = parseAddress(address);
    const key = reach["api-key"] ?? config?.cli.apiKey ?? "";
    if (key === "")
      throw new UsageError(
        `${url.origin} asks for an API key: give --api-key, or set WEFT_CLI_API_KEY (weft apikeys create, on the server, makes one)`,
      );
    if (/[^\x21-\x7e]/.test(key)) throw new UsageError("the API key has characters that no key has: copy it again");
    const isLoopback = /^(localhost|127\.|\[::1\])/.test(url.host);
    if (url.protocol === "http:" && !isLoopback)
      warn(`warning: the API key goes to ${url.host} in the clear, for everybody on the way to read: use https`);
    const init: BunFetchRequestInit = {
      headers: { Authorization: `Bearer ${key}` },
      // The key is for this server, wherever it would send us.
      redirect: "manual",
      ...((reach.insecure ?? config?.cli.insecure) && { tls: { rejectUnauthorized: false } }),
    };
    return new AdminClient(url.origin, url.origin, init, timeout);
  }

  /** `path` below /api, for example "/v1/user". Throws with one sentence. */
  async call<T = unknown>(method: Method, path: string, body?: unknown): Promise<T> {
    const { response, text } = await this.send(method, path, body, async (response) => ({
      response,
      text: await response.text(),
    }));
    const answer = parsed(text) as T | null;
    if (response.ok && answer !== null) return answer;
    throw this.refusal(response, text);
  }

  /** An answer that is no JSON, piece by piece. Throws with one sentence. */
  async *download(path: string): AsyncGenerator<Uint8Array> {
    const response = await this.send("POST", path, undefined, async (response) => response);
    if (!response.ok || !response.body) throw this.refusal(response, await response.text());
    yield* response.body as unknown as AsyncIterable<Uint8Array>;
  }

  private async send<T>(
    method: Method,
    path: string,
    body: unknown,
    read: (response: Response) => Promise<T>,
  ): Promise<T> {
    try {
      return await read(
        await fetch(`${this.base}/api${path}`, {
          ...this.init,
          method,
          signal: AbortSignal.timeout(this.timeout),
          ...(body !== undefined && {
            body: JSON.stringify(body),
            headers: { ...this.init.headers, "Content-Type": "application/json" },
          }),
        }),
      );
    } catch (error) {
      throw new NoServer(this.problem(error as Error & { code?: string }));
    }
  }

  private refusal(response: Response, text: string): Error {
    const answer = parsed(text) as { detail?: string; message?: string } | null;
    const detail = answer?.detail ?? answer?.message;
    // It may name nodes as strangers called them.
    if (detail) return new Error(printable(detail));
    const target = response.headers.get("Location");
    if (response.status >= 300 && response.status < 400 && target)
      return new Error(`${this.where} sends us on to ${target}: give that address, if it is your server`);
    return new Error(`${this.where} does not speak the control server's API: it answered ${response.status}`);
  }

  /** By id, or by name where that is allowed. */
  async findUser(wanted: string, byName: boolean): Promise<ApiUser> {
    const { users } = await this.call<{ users: ApiUser[] }>("GET", "/v1/user");
    const found = users.find((one) => one.id === wanted) ?? users.find((one) => byName && one.name === wanted);
    if (found) return found;
    const near = nearest(
      wanted,
      users.map((one) => one.name),
    );
    throw new Error(
      `there is no user ${JSON.stringify(wanted)}${near ? `: did you mean "${near}"?` : ": `weft users list` shows those that exist"}`,
    );
  }

  private problem(error: Error & { code?: string }): string {
    if (error.name === "TimeoutError") return `${this.where} did not answer within ${this.timeout} ms`;
    if (this.base === "http://weft")
      return `no control server answers at ${this.where}: start one (bun run box --data DIR), name its data folder with --data DIR, or one elsewhere with --address URL`;
    if (/CERT|SELF_SIGNED|ISSUER|ALTNAME/.test(error.code ?? ""))
      return `the certificate of ${this.where} is not to be trusted (${error.code}): check the address; --insecure goes without`;
    return `no control server answers at ${this.where}: ${error.message}`;
  }
}

/** Null when it is no JSON: whoever answers that is no control server, or something in front of it. */
function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function configFor({ config, data }: Reach, env: Env): ServerConfig {
  return loadConfig({ config, env, overrides: { data_dir: { flag: "--data", value: data } } });
}

/** "weft.example.com" is taken as https. */
function parseAddress(text: string): URL {
  const url = URL.parse(text.includes("://") ? text : `https://${text}`);
  if (!url || !/^https?:$/.test(url.protocol) || url.hostname === "")
    throw new UsageError(
      `--address ${JSON.stringify(text)} is no address of a server: write it as https://weft.example.com`,
    );
  if (url.pathname !== "/" || url.search || url.hash || url.username)
    throw new UsageError(`--address ${JSON.stringify(text)} must be scheme, host and port alone`);
  return url;
}
