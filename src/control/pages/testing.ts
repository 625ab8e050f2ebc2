// For tests: a real identity provider (oidc-provider) that believes every password, and a browser without script.
import { createHash, generateKeyPairSync, randomBytes } from "node:crypto";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { Provider } from "oidc-provider";

/** What the provider tells of an account beside its `sub`. */
export type AccountClaims = Record<string, unknown>;

export interface IdpOptions {
  /** IP address. */
  host?: string;
  /** 0 asks the kernel. */
  port?: number;
  /** Where it may send browsers back to. */
  redirectUris: string[];
  /** By subject, which is what one types into its login form. */
  accounts: Record<string, AccountClaims>;
  /** Seconds that id tokens last. */
  idTokenTtl?: number;
  pkceRequired?: boolean;
}

export const CLIENT = { id: "weft", secret: "a secret: with + signs / in it" };

export class IdentityProvider implements AsyncDisposable {
  private constructor(
    private readonly server: Server,
    readonly issuer: string,
    /** May be changed at any time. */
    readonly accounts: Record<string, AccountClaims>,
    /** Parameters of every authorization request. */
    readonly requests: URLSearchParams[],
  ) {}

  static async start(options: IdpOptions): Promise<IdentityProvider> {
    let handler: ReturnType<Provider["callback"]> | null = null;
    const requests: URLSearchParams[] = [];
    const server = createServer((request, response) => {
      const url = new URL(request.url ?? "", "http://unused");
      if (url.pathname === "/auth") requests.push(new URLSearchParams(url.searchParams));
      request.url = url.pathname + hashedChallenge(url).search;
      handler?.(request, response);
    });
    await new Promise<void>((resolve) => server.listen(options.port ?? 0, options.host ?? "127.0.0.1", resolve));
    const { address, port } = server.address() as AddressInfo;
    const issuer = `http://${address}:${port}`;
    const idp = new IdentityProvider(server, issuer, options.accounts, requests);
    const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
    const provider = new Provider(issuer, {
      clients: [
        {
          client_id: CLIENT.id,
          client_secret: CLIENT.secret,
          redirect_uris: options.redirectUris,
          grant_types: ["authorization_code"],
          response_types: ["code"],
        },
      ],
      jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), use: "sig", alg: "RS256", kid: "test" }] },
      cookies: { keys: [randomBytes(16).toString("hex")] },
      scopes: ["openid", "profile", "email", "groups"],
      claims: {
        openid: ["sub"],
        email: ["email", "email_verified"],
        profile: ["name", "preferred_username", "picture"],
        groups: ["groups"],
      },
      pkce: { required: () => options.pkceRequired ?? false },
      ttl: { IdToken: options.idTokenTtl ?? 3600, Interaction: 600, Session: 600, Grant: 600, AccessToken: 600 },
      findAccount: (_ctx, sub) =>
        idp.accounts[sub] && { accountId: sub, claims: async () => ({ sub, ...idp.accounts[sub] }) },
    });
    handler = provider.callback();
    return idp;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }
}

/** This provider knows no plain challenge: told the hash of one, it demands the very verifier that the plain one asks for. */
function hashedChallenge(url: URL): URL {
  if (url.searchParams.get("code_challenge_method") !== "plain") return url;
  const verifier = url.searchParams.get("code_challenge") ?? "";
  url.searchParams.set("code_challenge", createHash("sha256").update(verifier).digest("base64url"));
  url.searchParams.set("code_challenge_method", "S256");
  return url;
}

export interface Seen {
  url: string;
  status: number;
  text: string;
  headers: Headers;
}

interface Cookie {
  name: string;
  value: string;
  path: string;
}

/** Follows links and redirects, keeps cookies, sends forms. `hosts`: where origins of the tests are really found. */
export class Browser {
  /** By origin, then by path and name. */
  readonly cookies = new Map<string, Map<string, Cookie>>();
  /** Set-Cookie headers as they came. */
  readonly setCookies: string[] = [];

  constructor(private readonly hosts: Record<string, string> = {}) {}

  async open(url: string, form?: Record<string, string>, headers: Record<string, string> = {}): Promise<Seen> {
    let next = new URL(url);
    let body = form && new URLSearchParams(form).toString();
    for (let hops = 0; hops < 20; hops++) {
      const jar = this.cookies.get(next.origin) ?? new Map<string, Cookie>();
      this.cookies.set(next.origin, jar);
      const response = await fetch((this.hosts[next.origin] ?? next.origin) + next.pathname + next.search, {
        method: body === undefined ? "GET" : "POST",
        redirect: "manual",
        headers: {
          Host: next.host,
          Cookie: [...jar.values()]
            .filter(({ path }) => next.pathname.startsWith(path))
            .map(({ name, value }) => `${name}=${value}`)
            .join("; "),
          ...(body !== undefined && { "Content-Type": "application/x-www-form-urlencoded", Origin: next.origin }),
          ...headers,
        },
        ...(body !== undefined && { body }),
      });
      for (const line of response.headers.getSetCookie()) {
        this.setCookies.push(line);
        const [, name = "", value = ""] = /^([^=]+)=([^;]*)/.exec(line)!;
        const path = /;\s*path=([^;]*)/i.exec(line)?.[1] ?? "/";
        if (/max-age=0|expires=thu, 01 jan 1970/i.test(line)) jar.delete(`${path} ${name}`);
        else jar.set(`${path} ${name}`, { name, value, path });
      }
      const location = response.headers.get("location");
      if (location === null || response.status < 300 || response.status > 399)
        return { url: next.href, status: response.status, text: await response.text(), headers: response.headers };
      await response.arrayBuffer();
      next = new URL(location, next);
      body = undefined;
    }
    throw new Error(`too many redirects, the last to ${next}`);
  }

  /** Sends the form of a page, with what is hidden in it. */
  submit(page: Seen, fields: Record<string, string> = {}): Promise<Seen> {
    const action = /<form[^>]* action="([^"]*)"/.exec(page.text)?.[1];
    if (action === undefined) throw new Error(`no form on ${page.url}: ${page.status} ${page.text.slice(0, 500)}`);
    const hidden = [...page.text.matchAll(/<input type="hidden" name="([^"]*)" value="([^"]*)"/g)];
    const values = Object.fromEntries(hidden.map(([, name, value]) => [name!, value!]));
    return this.open(new URL(action, page.url).href, { ...values, ...fields });
  }

  /** From the address that a machine was given to the page that asks whether to let it in. */
  async signIn(url: string, account: string): Promise<Seen> {
    let page = await this.open(url);
    for (let steps = 0; steps < 3 && page.text.includes('name="prompt"'); steps++)
      page = await this.submit(page, page.text.includes('name="login"') ? { login: account, password: "x" } : {});
    return page;
  }
}
