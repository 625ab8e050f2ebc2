// The pages at the addresses that machines and SSH sessions hand to people (login.ts):
//
//   GET  /register/<id>, /auth/<id>             without identity providers: the command that an administrator runs;
//                                               with one: on to it; with several: which?
//   GET  /register/<id>/with/<provider>, …      to that provider. State and nonce go into cookies of the browser, named by
//                                               the start of the state, so that several tabs do not disturb each other
//   GET  /oidc/callback, /oidc/<provider>/callback   back from it: shows what is about to be let in. An address can be sent
//                                               to somebody else, who would sign in for a stranger's machine unawares
//   POST /register/confirm/<id>, /auth/confirm/<id>  that page's form, with a token that is in a cookie as well
import { type Context, Hono } from "hono";
import { deleteCookie, getCookie, setCookie } from "hono/cookie";
import { html } from "hono/html";
import { constantTimeEqual, hex } from "../../crypto/keys.ts";
import { clientAddress } from "../../net/client-address.ts";
import { securityHeaders } from "../../net/guards.ts";
import { Attempts } from "../../net/ratelimit.ts";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import { type Logins, ofGreediest, type PendingLogin } from "../login.ts";
import type { Millis, UserRecord } from "../model.ts";
import { type Challenge, type Identity, Provider, ProviderError, refusalOf, userFrom } from "../oidc.ts";
import { suspensionProblem } from "../users.ts";
import { notice, page, secured } from "./layout.ts";

/** Milliseconds between leaving for the provider and the last click. */
const SESSION = 60 * 60_000;
const NAME_LENGTH = 6;

interface Journey {
  loginId: string;
  provider: Provider;
  challenge: Challenge;
  startedAt: Millis;
  /** Of the browser. */
  address: string;
}

interface Confirmation {
  loginId: string;
  provider: Provider;
  identity: Identity;
  startedAt: Millis;
  /** Of the browser. */
  address: string;
}

const WORDS = {
  register: { waits: "A machine wants to join", question: "Let this machine in?" },
  "ssh-check": { waits: "An SSH session waits", question: "Allow this SSH session?" },
  "web-client": {
    waits: "A browser wants to change a machine's settings",
    question: "Let this browser change the machine's settings?",
  },
} as const;

export class LoginPages {
  readonly app = new Hono();
  readonly providers: readonly Provider[];
  /** By state. */
  private readonly journeys = new Map<string, Journey>();
  /** By token. */
  private readonly confirmations = new Map<string, Confirmation>();
  private readonly attempts: Attempts;
  private readonly isSecure: boolean;

  constructor(
    private readonly ctx: ControlContext,
    private readonly logins: Logins,
  ) {
    const { serverUrl, oidc } = ctx.settings;
    this.isSecure = serverUrl.startsWith("https:");
    this.attempts = new Attempts({
      what: "login id",
      log: (line) => ctx.log(line),
      count: (what) => ctx.metrics.loginFailures.add(what),
    });
    this.providers = oidc.map(
      (settings) => new Provider(settings, `${serverUrl}${callbackPath(settings.id)}`, (line) => ctx.log(line)),
    );
    const { app } = this;
    for (const path of ["/register/*", "/auth/*", "/oidc/*"]) app.use(path, securityHeaders, secured);
    for (const kind of ["register", "auth"]) {
      app.get(`/${kind}/:id`, (c) => this.begin(c));
      app.get(`/${kind}/:id/with/:provider`, (c) => this.leave(c, c.req.param("provider")));
      app.post(`/${kind}/confirm/:id`, (c) => this.confirm(c));
    }
    for (const provider of this.providers)
      app.get(callbackPath(provider.settings.id), (c) => this.comeBack(c, provider));
  }

  /** Looks for the identity providers. Throws ProviderError when one that must be there is not. */
  async start(): Promise<void> {
    await Promise.all(
      this.providers.map((provider) =>
        provider.settings.onlyStartIfAvailable ? provider.find() : provider.isReady(this.ctx.now()),
      ),
    );
  }

  private async begin(c: Context): Promise<Response> {
    const login = await this.find(c);
    if (login instanceof Response) return login;
    const now = this.ctx.now();
    const answers = await Promise.all(this.providers.map((provider) => provider.isReady(now)));
    const ready = this.providers.filter((_, i) => answers[i]);
    if (ready.length === 1 && this.providers.length === 1) return this.leave(c, ready[0]!.settings.id);
    const kind = login.request.kind === "register" ? "register" : "auth";
    const command =
      kind === "register"
        ? `weft auth register --auth-id ${login.id} --user USERNAME`
        : `weft auth approve --auth-id ${login.id}`;
    const choice = ready.map(
      ({ settings }) =>
        html`<a class="button" href="/${kind}/${login.id}/with/${settings.id}">Sign in with ${settings.name}</a>`,
    );
    return page(
      c,
      200,
      WORDS[login.request.kind].waits,
      html`${this.description(login)}
${ready.length > 0 ? html`<p>${choice}</p>` : ""}
${this.providers.length > ready.length ? html`<p>An identity provider does not answer at present.</p>` : ""}
<p>${ready.length > 0 ? "Or let" : "Let"} an administrator run this on the server:</p>
<pre><code>${command}</code></pre>`,
    );
  }

  private async leave(c: Context, providerId: string): Promise<Response> {
    const login = await this.find(c);
    if (login instanceof Response) return login;
    const provider = this.providers.find(({ settings }) => settings.id === providerId);
    if (!provider) return notice(c, 404, "No such provider", "This server knows no identity provider of that name.");
    const now = this.ctx.now();
    if (!(await provider.isReady(now)))
      return notice(
        c,
        503,
        "Try again",
        `${provider.settings.name} does not answer at present. Try again in a minute.`,
      );
    const challenge = provider.challenge();
    const url = await provider.authorizationUrl(challenge);
    this.remember(this.journeys, challenge.state, {
      loginId: login.id,
      provider,
      challenge,
      startedAt: now,
      address: clientAddress(c),
    });
    const [stateName, nonceName] = cookieNames(challenge.state);
    this.setCookie(c, stateName, challenge.state);
    this.setCookie(c, nonceName, challenge.nonce);
    return c.redirect(url, 302);
  }

  private async comeBack(c: Context, provider: Provider): Promise<Response> {
    const state = c.req.query("state") ?? "";
    const journey = this.journeys.get(state);
    const [stateName, nonceName] = cookieNames(state);
    const isOwn =
      journey !== undefined &&
      journey.provider === provider &&
      journey.startedAt + SESSION > this.ctx.now() &&
      sameText(getCookie(c, stateName), journey.challenge.state) &&
      sameText(getCookie(c, nonceName), journey.challenge.nonce);
    if (!isOwn)
      return notice(
        c,
        400,
        "Start again",
        "This login was not started in this browser, or too long ago: open the machine's address again.",
      );
    this.journeys.delete(state);
    for (const name of [stateName, nonceName]) deleteCookie(c, name, { path: "/" });
    let identity: Identity;
    try {
      identity = await provider.identify(new URL(c.req.url), journey.challenge);
    } catch (error) {
      if (!(error instanceof ProviderError)) throw error;
      this.ctx.log(error.message);
      return notice(c, 502, "Not signed in", `${error.message}.`);
    }
    const known = this.ctx.model.userByProviderId(identity.providerId);
    const refusal = refusalOf(identity, provider.settings) ?? suspensionProblem(known);
    if (refusal) {
      this.ctx.log(`${identity.providerId} (${identity.email}) was not let in: ${refusal}`);
      return notice(c, 403, "Not allowed", `Sorry, ${refusal}.`);
    }
    // Not sooner: anybody gets a right address by starting a login, and with it could guess at others without a pause.
    this.attempts.succeeded(clientAddress(c));
    const login = this.logins.get(journey.loginId);
    if (!login || login.verdict) return gone(c, login);
    const problem = this.ownerProblem(login, identity);
    if (problem) return notice(c, 403, "Not yours", problem);
    const token = hex(this.ctx.random(32));
    this.remember(this.confirmations, token, {
      loginId: login.id,
      provider,
      identity,
      startedAt: this.ctx.now(),
      address: clientAddress(c),
    });
    this.setCookie(c, confirmCookie(token), token);
    const kind = login.request.kind === "register" ? "register" : "auth";
    return page(
      c,
      200,
      WORDS[login.request.kind].question,
      html`<p>You are signed in as <strong>${nameOf(identity)}</strong>. Continue only if you have started this yourself, just now.</p>
${this.description(login)}
<form method="post" action="/${kind}/confirm/${login.id}">
<input type="hidden" name="token" value="${token}">
<button class="main" name="answer" value="yes">${kind === "register" ? "Connect it" : "Allow it"}</button>
<button name="answer" value="no">This was not me</button>
</form>`,
    );
  }

  private async confirm(c: Context): Promise<Response> {
    const id = c.req.param("id") ?? "";
    const form = await c.req.parseBody();
    const token = typeof form.token === "string" ? form.token : "";
    const confirmation = this.confirmations.get(token);
    const isOwn =
      confirmation?.loginId === id &&
      confirmation.startedAt + SESSION > this.ctx.now() &&
      sameText(getCookie(c, confirmCookie(token)), token) &&
      this.isSentByOwnPage(c);
    if (!isOwn)
      return notice(
        c,
        403,
        "Start again",
        "This form does not belong to a login of this browser: open the machine's address again.",
      );
    this.confirmations.delete(token);
    deleteCookie(c, confirmCookie(token), { path: "/" });
    const login = this.logins.get(id);
    if (!login || login.verdict) return gone(c, login);
    const { identity, provider } = confirmation;
    try {
      if (form.answer !== "yes") {
        await this.logins.reject(id, `${nameOf(identity)} has refused this login`);
        return notice(c, 200, "Refused", "It was not let in. You can close this page.");
      }
      const user = await this.save(identity);
      if (login.request.kind === "register") {
        const expiry = provider.settings.useExpiryFromToken ? identity.expiry : null;
        const node = await this.logins.complete(id, user.id, "oidc", expiry);
        if (!node.authorized)
          return notice(
            c,
            200,
            "Almost there",
            "Your machine is known now, and waits for an administrator to approve it.",
          );
        return notice(c, 200, "Connected", `Your machine is connected as ${node.givenName}. You can close this page.`);
      }
      const problem = this.ownerProblem(login, identity);
      if (problem) return notice(c, 403, "Not yours", problem);
      await this.logins.approve(id, user.id);
      return notice(c, 200, "Allowed", "The session goes on. You can close this page.");
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      return notice(c, error.status === 404 ? 404 : 403, "Not let in", `${error.message}.`);
    }
  }

  /** Browsers say "null" for the origin of a form on a page that gives no referrer; what they all say is where it was sent from. */
  private isSentByOwnPage(c: Context): boolean {
    const site = c.req.header("sec-fetch-site");
    const origin = c.req.header("origin") ?? "null";
    return (
      (site === undefined || site === "same-origin") && (origin === "null" || origin === this.ctx.settings.serverUrl)
    );
  }

  /** Only the owner of the machine that an SSH session comes from can let it in. */
  private ownerProblem({ request }: PendingLogin, { providerId }: Identity): string | null {
    if (request.kind === "register") return null;
    const owner = this.ctx.model.nodes.get(request.sourceNodeId)?.userId;
    const user = this.ctx.model.userByProviderId(providerId);
    return user && owner === user.id
      ? null
      : "Only the user whose machine this session comes from can allow it, and that is somebody else.";
  }

  /** The profile is refreshed at every login. */
  private async save(identity: Identity): Promise<UserRecord> {
    const { model, journal } = this.ctx;
    const known = model.userByProviderId(identity.providerId);
    const user = userFrom(identity, known, model.counters.lastUser + 1, this.ctx.now());
    await journal.commit({ users: [user], ...(!known && { counters: { lastUser: user.id } }) });
    return user;
  }

  /** The login of this address; or the answer for those who guess, or come too late. */
  private async find(c: Context): Promise<PendingLogin | Response> {
    const address = clientAddress(c);
    const login = this.logins.get(c.req.param("id") ?? "");
    const isRegister = c.req.path.startsWith("/register/");
    if (login && (login.request.kind === "register") === isRegister) return login.verdict ? gone(c, login) : login;
    const now = this.ctx.now();
    const wait = this.attempts.wait(address, now);
    if (wait > 0) {
      c.header("Retry-After", `${Math.ceil(wait / 1000)}`);
      return notice(c, 429, "Too many attempts", "Too many wrong addresses were tried. Wait a while, then try again.");
    }
    this.attempts.failed(address, now);
    return gone(c, null);
  }

  private description({ request }: PendingLogin) {
    const { model } = this.ctx;
    if (request.kind !== "register") {
      const nameOfNode = (id: number) => model.nodes.get(id)?.givenName ?? `node ${id}`;
      return html`<dl>
<dt>from</dt><dd>${nameOfNode(request.sourceNodeId)}</dd>
<dt>to</dt><dd>${nameOfNode(request.targetNodeId)}</dd>
${request.kind === "ssh-check" ? html`<dt>as</dt><dd>${request.localUser}</dd>` : ""}
</dl>`;
    }
    const { Hostname, OS, RequestTags } = request.input.hostinfo;
    return html`<dl>
<dt>name</dt><dd>${shown(Hostname) || "(none)"}</dd>
<dt>system</dt><dd>${shown(OS) || "(unknown)"}</dd>
<dt>machine key</dt><dd>${fingerprint(request.machineKey)}</dd>
${RequestTags && RequestTags.length > 0 ? html`<dt>tags</dt><dd>${shown(RequestTags.join(", "))}</dd>` : ""}
</dl>`;
  }

  /** Who opens many pushes out none but his own. */
  private remember<T extends { startedAt: Millis; address: string }>(map: Map<string, T>, key: string, value: T): void {
    for (const [old, { startedAt }] of map) {
      if (startedAt + SESSION > value.startedAt) break;
      map.delete(old);
    }
    if (map.size >= this.ctx.settings.login.maxPending)
      map.delete(ofGreediest([...map], ({ address }) => address)[0]![0]);
    map.set(key, value);
  }

  private setCookie(c: Context, name: string, value: string): void {
    const options = { path: "/", httpOnly: true, sameSite: "Lax", secure: this.isSecure } as const;
    setCookie(c, name, value, { ...options, maxAge: SESSION / 1000 });
  }
}

function callbackPath(id: string): string {
  return id === "oidc" ? "/oidc/callback" : `/oidc/${id}/callback`;
}

function cookieNames(state: string): [string, string] {
  const start = /^[\w-]+$/.test(state) ? state.slice(0, NAME_LENGTH) : "none";
  return [`weft_state_${start}`, `weft_nonce_${start}`];
}

/** By token, not by login: the same address may be open in two tabs. */
function confirmCookie(token: string): string {
  return `weft_confirm_${/^[0-9a-f]+$/.test(token) ? token.slice(0, NAME_LENGTH) : "none"}`;
}

function sameText(given: string | undefined, expected: string): boolean {
  const encode = (value: string) => new TextEncoder().encode(value);
  return given !== undefined && constantTimeEqual(encode(given), encode(expected));
}

function nameOf({ displayName, email, name, providerId }: Identity): string {
  const known = email || name || providerId;
  return displayName && displayName !== known ? `${displayName} (${known})` : known;
}

/** The machine key as people compare it: its first 128 bits in groups. `tailscale debug` shows the key itself. */
function fingerprint(machineKey: string): string {
  return (machineKey.slice("mkey:".length).slice(0, 32).match(/.{4}/g) ?? []).join(" ");
}

/** What a stranger's machine says of itself, on one line and not too long. */
function shown(value: string | undefined | null): string {
  return (value ?? "").replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "").slice(0, 100);
}

function gone(c: Context, login: PendingLogin | null): Response | Promise<Response> {
  if (login?.verdict?.approved) return notice(c, 200, "Done", "This was approved already. You can close this page.");
  if (login?.verdict) return notice(c, 410, "Refused", "This was refused already. Start again on the machine.");
  return notice(c, 404, "Not found", "Nothing waits under this address, or not any more. Start again on the machine.");
}
