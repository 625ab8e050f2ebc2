import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { loginIdOf } from "../login.ts";
import type { ControlSettings, OidcSettings } from "../settings.ts";
import { makeOidc, makeSettings, type TestNode, TestServer, until } from "../testing.ts";
import { Browser, CLIENT, IdentityProvider } from "./testing.ts";

const ORIGIN = "http://control.test";
const CALLBACKS = ["/oidc/callback", "/oidc/second/callback"].map((path) => ORIGIN + path);
const ALICE = {
  name: "Alice Liddell",
  preferred_username: "alice",
  email: "alice@example.com",
  email_verified: true,
  picture: "https://example.com/alice.png",
};

// Several servers and a provider in one test: on a busy machine that takes a while.
setDefaultTimeout(120_000);

let idp: IdentityProvider;
beforeAll(async () => {
  idp = await IdentityProvider.start({
    redirectUris: CALLBACKS,
    accounts: {
      alice: ALICE,
      bob: { name: "Bob", preferred_username: "7 of 9", email: "bob@other.org", email_verified: false },
      eve: { ...ALICE, email_verified: "true", email: "Eve@Example.com", groups: "staff" },
      dora: { email: "dora@example.com", email_verified: "false", groups: ["staff", "ops"] },
    },
  });
});
afterAll(() => idp[Symbol.asyncDispose]());

function provider(more: Partial<OidcSettings> = {}): OidcSettings {
  return makeOidc({ issuer: idp.issuer, clientId: CLIENT.id, clientSecret: CLIENT.secret, ...more });
}

const withProvider = (more: Partial<OidcSettings> = {}, settings: Partial<ControlSettings> = {}) =>
  TestServer.start({ settings: makeSettings({ oidc: [provider(more)], ...settings }) });

const browserOf = (server: TestServer) => new Browser({ [ORIGIN]: server.url });

async function startLogin(node: TestNode, tags: string[] = []): Promise<string> {
  const url = (await node.register({ tags })).AuthURL ?? "";
  expect(loginIdOf(url)).not.toBeNull();
  return url;
}

const usersOf = async (server: TestServer) =>
  (await server.admin<{ users: Record<string, string>[] }>("GET", "/user")).users;

test("without identity providers the page shows the very command that lets the machine in, and needs no script", async () => {
  await using server = await TestServer.start();
  const node = server.node("<b>Joe's</b> laptop");
  const url = await startLogin(node);
  const seen = await browserOf(server).open(url);
  expect(seen.status).toBe(200);
  expect(seen.text).toContain(`<code>weft auth register --auth-id ${loginIdOf(url)} --user USERNAME</code>`);
  expect(seen.text).toContain("&lt;b&gt;Joe");
  expect(seen.text).not.toMatch(/<script|https?:\/\//i);
  const policy = seen.headers.get("content-security-policy") ?? "";
  expect(policy).toContain("default-src 'none'");
  expect(policy).toContain("frame-ancestors 'none'");
  expect(Object.fromEntries(seen.headers)).toMatchObject({
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
  });
});

test("whoever guesses addresses has to wait longer and longer; one that exists opens all the same", async () => {
  await using server = await TestServer.start();
  const url = await startLogin(server.node("a"));
  const browser = browserOf(server);
  const guesses: number[] = [];
  for (let i = 0; i < 8; i++)
    guesses.push((await browser.open(`${ORIGIN}/register/hskey-authreq-${"0".repeat(23)}${i}`)).status);
  expect(guesses).toEqual([404, 404, 404, 404, 404, 404, 429, 429]);
  const refused = await browser.open(`${ORIGIN}/register/hskey-authreq-${"0".repeat(24)}`);
  expect([refused.status, Number(refused.headers.get("retry-after"))]).toEqual([429, 1]);
  expect((await browser.open(url)).status).toBe(200);
  // Anybody can start a login: its address buys no further guesses.
  expect((await browser.open(`${ORIGIN}/register/hskey-authreq-${"0".repeat(24)}`)).status).toBe(429);
});

test("a user signs in at the provider, sees which machine is about to join, and lets it in", async () => {
  await using server = await withProvider();
  const laptop = server.node("laptop");
  const url = await startLogin(laptop);
  const waiting = laptop.register({ followup: url });
  const browser = browserOf(server);
  const question = await browser.signIn(url, "alice");
  expect(question.text).toContain("Alice Liddell (alice@example.com)");
  expect(question.text).toContain("<dd>laptop</dd>");
  expect(question.text).toMatch(/<dd>([0-9a-f]{4} ){7}[0-9a-f]{4}<\/dd>/);
  expect(server.control.stats().nodes).toBe(0);
  const done = await browser.submit(question, { answer: "yes" });
  expect(done.text).toContain("connected as laptop");
  expect(await waiting).toMatchObject({
    Error: "",
    MachineAuthorized: true,
    Login: { LoginName: "alice@example.com", DisplayName: "Alice Liddell" },
  });
  expect(await usersOf(server)).toEqual([
    expect.objectContaining({
      name: "alice",
      displayName: "Alice Liddell",
      email: "alice@example.com",
      profilePicUrl: "https://example.com/alice.png",
      provider: "oidc",
      providerId: `${idp.issuer}/alice`,
    }),
  ]);
  const request = idp.requests.at(-1)!;
  expect(request.get("code_challenge_method")).toBe("S256");
  expect(request.get("code_challenge")).toMatch(/^[\w-]{43}$/);
  // State and nonce: of this browser alone, out of reach for scripts, and gone afterwards.
  const own = browser.setCookies.filter((line) => line.startsWith("weft_") && !line.includes("Max-Age=0"));
  expect(own.length).toBeGreaterThanOrEqual(3);
  for (const line of own) expect(line).toMatch(/; HttpOnly; SameSite=Lax/);
  expect([...browser.cookies.get(ORIGIN)!.keys()]).toEqual([]);
  // The address is used up.
  expect((await browser.open(url)).text).toContain("approved already");
});

test("profile and role are refreshed at every login, and the same subject stays the same user and node", async () => {
  await using server = await withProvider({ roles: { auditor: ["staff"] } });
  const laptop = server.node("laptop");
  const join = async (account: string) => {
    const url = await startLogin(laptop);
    const waiting = laptop.register({ followup: url });
    const browser = browserOf(server);
    const done = await browser.submit(await browser.signIn(url, account), { answer: "yes" });
    expect(done.text).toContain("connected as");
    return (await waiting).User?.ID;
  };
  const first = await join("alice");
  expect(await laptop.register({ expiry: "1970-01-01T00:02:03Z" })).toMatchObject({ NodeKeyExpired: true });
  laptop.rotate();
  idp.accounts.alice = { ...ALICE, name: "Alice Hargreaves", groups: ["staff"] };
  try {
    expect(await join("alice")).toBe(first);
  } finally {
    idp.accounts.alice = ALICE;
  }
  expect((await laptop.stream()).self).toMatchObject({ ID: 1, Addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"] });
  expect(await usersOf(server)).toEqual([
    expect.objectContaining({ displayName: "Alice Hargreaves", role: "auditor" }),
  ]);
  expect(server.admin("POST", "/user/1/role", { role: "owner" })).rejects.toThrow("oidc.roles");
  // Somebody else on the same machine: another node, and the first one back finds her own again.
  await laptop.register({ expiry: "1970-01-01T00:02:03Z" });
  laptop.rotate();
  expect(await join("eve")).not.toBe(first);
  await laptop.register({ expiry: "1970-01-01T00:02:03Z" });
  laptop.rotate();
  expect(await join("alice")).toBe(first);
  expect((await laptop.stream()).self?.ID).toBe(1);
  expect((await usersOf(server))[0]).toMatchObject({ role: "member" });
  expect(server.control.stats().nodes).toBe(2);
});

test("a suspended user is told so after the provider, before anything is asked; restored, the same login goes on", async () => {
  const log: string[] = [];
  const settings = makeSettings({ oidc: [provider()] });
  await using server = await TestServer.start({ settings, log: (line) => log.push(line) });
  const join = async (name: string) => {
    const url = await startLogin(server.node(name));
    return { url, page: await browserOf(server).signIn(url, "alice") };
  };
  const browser = browserOf(server);
  const question = await browser.signIn(await startLogin(server.node("laptop")), "alice");
  await browser.submit(question, { answer: "yes" });
  await server.admin("POST", "/user/1/suspend");
  const { url, page } = await join("phone");
  expect([page.status, page.text]).toEqual([403, expect.stringContaining("alice@example.com is suspended")]);
  expect(page.text).not.toContain("<form");
  expect(log.at(-1)).toContain("was not let in: the user alice@example.com is suspended");
  await server.admin("POST", "/user/1/restore");
  const again = browserOf(server);
  // Suspended between the question and the answer.
  const late = await again.signIn(url, "alice");
  await server.admin("POST", "/user/1/suspend");
  const refused = await again.submit(late, { answer: "yes" });
  expect([refused.status, refused.text]).toEqual([403, expect.stringContaining("is suspended")]);
  expect(server.control.stats().nodes).toBe(1);
  expect(await usersOf(server)).toMatchObject([{ status: "suspended" }]);
});

test("several tabs: each login goes its own way, whichever comes back first", async () => {
  await using server = await withProvider();
  const [a, b] = [server.node("a"), server.node("b")];
  const [urlA, urlB] = [await startLogin(a), await startLogin(b)];
  const browser = browserOf(server);
  const [formA, formB] = [await browser.open(urlA), await browser.open(urlB)];
  expect(idp.requests.at(-1)!.get("state")).not.toBe(idp.requests.at(-2)!.get("state"));
  const finish = async (page: Awaited<ReturnType<Browser["open"]>>) => {
    let next = page;
    while (next.text.includes('name="prompt"'))
      next = await browser.submit(next, next.text.includes('name="login"') ? { login: "alice", password: "x" } : {});
    return browser.submit(next, { answer: "yes" });
  };
  expect((await finish(formB)).text).toContain("connected as b");
  expect((await finish(formA)).text).toContain("connected as a");
});

test("a stranger who opens logins without end pushes out none of another's that are under way", async () => {
  await using server = await withProvider({}, { login: { expiry: 900_000, maxPending: 3 } });
  const url = await startLogin(server.node("a"));
  const browser = browserOf(server);
  const form = await browser.open(url);
  const { port, pathname } = Object.assign(new URL(url), { port: new URL(server.url).port });
  const strangers = Array.from(
    { length: 20 },
    () =>
      new Promise<number>((resolve, reject) => {
        const options = { host: "127.0.0.1", port, path: pathname, localAddress: "127.0.0.2" };
        get(options, (response) => resolve(response.resume().statusCode ?? 0)).on("error", reject);
      }),
  );
  expect(new Set(await Promise.all(strangers))).toEqual(new Set([302]));
  let next = form;
  while (next.text.includes('name="prompt"'))
    next = await browser.submit(next, next.text.includes('name="login"') ? { login: "alice", password: "x" } : {});
  expect((await browser.submit(next, { answer: "yes" })).text).toContain("connected as a");
});

test("behind https the cookies are for https alone", async () => {
  const serverUrl = ORIGIN.replace("http:", "https:");
  await using server = await withProvider({}, { serverUrl });
  const browser = new Browser({ [serverUrl]: server.url });
  await browser.open((await server.node("a").register()).AuthURL!);
  const own = browser.setCookies.filter((line) => line.startsWith("weft_"));
  expect(own).toHaveLength(2);
  for (const line of own) expect(line).toMatch(/; HttpOnly; Secure; SameSite=Lax/);
});

test("what comes back to another browser, twice, or with another state is not believed", async () => {
  await using server = await withProvider();
  const url = await startLogin(server.node("a"));
  const [browser, other] = [browserOf(server), browserOf(server)];
  const question = await browser.signIn(url, "alice");
  const callback = question.url;
  expect(new URL(callback).pathname).toBe("/oidc/callback");
  for (const who of [browser, other]) expect((await who.open(callback)).status).toBe(400);
  expect((await browser.open(`${ORIGIN}/oidc/callback?state=abcdefgh&code=x`)).status).toBe(400);
  // The form: from another browser, from another site, without its token, for another login.
  expect((await other.submit(question, { answer: "yes" })).status).toBe(403);
  const action = `${ORIGIN}/register/confirm/${loginIdOf(url)}`;
  expect((await browser.open(action, { answer: "yes" })).status).toBe(403);
  expect((await browser.open(action, { answer: "yes", token: "0".repeat(64) })).status).toBe(403);
  const token = /name="token" value="([0-9a-f]{64})"/.exec(question.text)![1]!;
  expect((await browser.open(action, { answer: "yes", token }, { Origin: "http://evil.test" })).status).toBe(403);
  const elsewhere = await startLogin(server.node("b"));
  const wrong = `${ORIGIN}/register/confirm/${loginIdOf(elsewhere)}`;
  expect((await browser.open(wrong, { answer: "yes", token })).status).toBe(403);
  expect(server.control.stats().nodes).toBe(0);
  // And all the while the right one works.
  expect((await browser.submit(question, { answer: "yes" })).text).toContain("connected as a");
});

test("who finds a machine on the page that is not hers refuses it, and the machine is told", async () => {
  await using server = await withProvider();
  const node = server.node("a");
  const url = await startLogin(node);
  const waiting = node.register({ followup: url });
  const browser = browserOf(server);
  const done = await browser.submit(await browser.signIn(url, "alice"), { answer: "no" });
  expect(done.text).toContain("not let in");
  expect((await waiting).Error).toContain("refused this login");
  expect(await usersOf(server)).toEqual([]);
});

test("a form that another site has sent is refused, and the form of the page itself is taken, also without an origin", async () => {
  await using server = await withProvider();
  const node = server.node("a");
  const url = await startLogin(node);
  const browser = browserOf(server);
  const asks = await browser.signIn(url, "alice");
  const action = new URL(/<form[^>]* action="([^"]*)"/.exec(asks.text)![1]!, asks.url).href;
  const token = /name="token" value="([^"]*)"/.exec(asks.text)![1]!;
  const send = (headers: Record<string, string>) => browser.open(action, { token, answer: "yes" }, headers);
  for (const headers of [{ "Sec-Fetch-Site": "cross-site", Origin: "null" }, { Origin: "https://other.test" }])
    expect((await send(headers)).status).toBe(403);
  expect((await send({ "Sec-Fetch-Site": "same-origin", Origin: "null" })).text).toContain("is connected as");
});

test("who passes the filters is asked to confirm, who does not is told why", async () => {
  await using server = await withProvider({ allowedDomains: ["example.com"], allowedGroups: ["staff"] });
  const url = await startLogin(server.node("a"));
  for (const [account, status, text] of [
    ["eve", 200, "Let this machine in?"],
    ["dora", 403, "no verified mail address"],
    ["alice", 403, "none of the groups"],
  ] as const) {
    const page = await browserOf(server).signIn(url, account);
    expect([account, page.status, page.text.includes(text)]).toEqual([account, status, true]);
  }
});

test("claims as providers write them: a group alone, verified as a text, names that are no user names, mail that does not count", async () => {
  await using server = await withProvider();
  for (const account of ["eve", "bob", "dora"]) {
    const node = server.node(account);
    const url = await startLogin(node);
    const browser = browserOf(server);
    await browser.submit(await browser.signIn(url, account), { answer: "yes" });
    const LoginName = account === "eve" ? "Eve@Example.com" : `${idp.issuer}/${account}`;
    expect(await node.register({ followup: url })).toMatchObject({ Error: "", Login: { LoginName } });
  }
  const [eve, bob, dora] = await usersOf(server);
  expect(eve).toMatchObject({ name: "alice", email: "Eve@Example.com" });
  // Who has no name here is shown, listed and found by what the client shows.
  const shown = `${idp.issuer}/bob`;
  expect(bob).toMatchObject({ name: shown, email: "", displayName: "Bob", providerId: shown });
  expect(dora).toMatchObject({ name: `${idp.issuer}/dora`, email: "", displayName: "" });
  const { nodes } = await server.admin<{ nodes: { name: string }[] }>("GET", `/node?user=${encodeURIComponent(shown)}`);
  expect(nodes.map(({ name }) => name)).toEqual(["bob"]);
});

test("groups of the claim count in the policy as of the last login: they own tags, and lose them", async () => {
  const dir = mkdtempSync(join(tmpdir(), "weft-groups-"));
  try {
    const path = join(dir, "policy.hujson");
    writeFileSync(path, JSON.stringify({ tagOwners: { "tag:web": ["group:ops"] }, grants: [] }));
    await using server = await withProvider({}, { policy: { mode: "file", path } });
    const outcome = async (groups: unknown) => {
      idp.accounts.frank = { ...ALICE, email: "frank@example.com", groups };
      const url = await startLogin(server.node("a"), ["tag:web"]);
      const browser = browserOf(server);
      return (await browser.submit(await browser.signIn(url, "frank"), { answer: "yes" })).text;
    };
    expect(await outcome(["staff", "ops"])).toContain("connected as");
    expect(await outcome(["staff"])).toContain("requested tags [tag:web] are invalid or not permitted");
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
});

test("PKCE plain and off, and further parameters of the request", async () => {
  for (const pkce of ["plain", "off"] as const) {
    await using server = await withProvider({ pkce, extraParams: { domain_hint: "example.com" } });
    const browser = browserOf(server);
    const page = await browser.signIn(await startLogin(server.node("a")), "alice");
    expect(page.text).toContain("Let this machine in?");
    const request = idp.requests.findLast((parameters) => parameters.has("redirect_uri"))!;
    expect(request.get("code_challenge_method")).toBe(pkce === "off" ? null : "plain");
    expect(request.get("domain_hint")).toBe("example.com");
  }
});

test("the node key expires with the token where that is asked for, else as the server says; a client may ask for less", async () => {
  const now = Date.now();
  const day = 24 * 60 * 60_000;
  const expiryOf = async (useExpiryFromToken: boolean, expiry?: string) => {
    const settings = makeSettings();
    await using server = await withProvider({ useExpiryFromToken }, { node: { ...settings.node, expiry: 30 * day } });
    const node = server.node("a");
    const url = (await node.register({ ...(expiry && { expiry }) })).AuthURL!;
    const browser = browserOf(server);
    await browser.submit(await browser.signIn(url, "alice"), { answer: "yes" });
    return Date.parse((await node.stream()).self!.KeyExpiry!) - now;
  };
  const hour = 60 * 60_000;
  expect(Math.abs((await expiryOf(true)) - hour)).toBeLessThan(60_000);
  expect(Math.abs((await expiryOf(false)) - 30 * day)).toBeLessThan(60_000);
  const tomorrow = new Date(now + day).toISOString();
  expect(Math.abs((await expiryOf(false, tomorrow)) - day)).toBeLessThan(60_000);
  expect(Math.abs((await expiryOf(true, tomorrow)) - hour)).toBeLessThan(60_000);
});

test("two providers stand side by side: the page asks which, and their users are different ones", async () => {
  await using second = await IdentityProvider.start({ redirectUris: CALLBACKS, accounts: { alice: ALICE } });
  const oidc = [provider(), provider({ id: "second", name: "Second & Co", issuer: second.issuer })];
  await using server = await TestServer.start({ settings: makeSettings({ oidc }) });
  const ids: (number | undefined)[] = [];
  for (const id of ["oidc", "second"]) {
    const node = server.node("a");
    const url = await startLogin(node);
    const browser = browserOf(server);
    const choice = await browser.open(url);
    expect(choice.text).toContain("Sign in with Example");
    expect(choice.text).toContain("Sign in with Second &amp; Co");
    expect(choice.text).toContain("weft auth register");
    await browser.submit(await browser.signIn(`${url}/with/${id}`, "alice"), { answer: "yes" });
    ids.push((await node.register({ followup: url })).User?.ID);
  }
  expect(new Set(ids).size).toBe(2);
  const callback = await browserOf(server).open(`${ORIGIN}/register/hskey-authreq-${"0".repeat(24)}/with/oidc`);
  expect(callback.status).toBe(404);
});

test("a provider that is away keeps the server down, or nodes are let in by command line until it is back", async () => {
  const dead = "http://127.0.0.1:1";
  await expect(withProvider({ issuer: dead })).rejects.toThrow("cannot be used");
  const lines: string[] = [];
  let now = Date.now();
  await using late = await IdentityProvider.start({ redirectUris: CALLBACKS, accounts: { alice: ALICE } });
  const { issuer } = late;
  await late[Symbol.asyncDispose]();
  const oidc = [provider({ issuer, onlyStartIfAvailable: false })];
  await using server = await TestServer.start({
    settings: makeSettings({ oidc }),
    now: () => now,
    log: (line) => lines.push(line),
  });
  expect(lines.join()).toContain("weft auth register");
  const url = await startLogin(server.node("a"));
  const browser = browserOf(server);
  expect((await browser.open(url)).text).toContain("weft auth register --auth-id");
  await using _back = await IdentityProvider.start({
    port: Number(new URL(issuer).port),
    redirectUris: CALLBACKS,
    accounts: { alice: ALICE },
  });
  now += 11_000;
  expect((await browser.signIn(url, "alice")).text).toContain("Let this machine in?");
});

test.each([
  [
    "an SSH session",
    { kind: "ssh-check", sourceNodeId: 1, targetNodeId: 1, localUser: "root" },
    "Allow this SSH session?",
  ],
  [
    "a web client",
    { kind: "web-client", sourceNodeId: 1, targetNodeId: 1 },
    "Let this browser change the machine&#39;s",
  ],
] as const)(
  "%s is allowed by the owner of the machine that it comes from, and by nobody else",
  async (_, request, asked) => {
    await using server = await withProvider();
    const laptop = server.node("laptop");
    const joinUrl = await startLogin(laptop);
    const browser = browserOf(server);
    await browser.submit(await browser.signIn(joinUrl, "alice"), { answer: "yes" });
    const { logins } = server.control;
    // Whether the policy allows it is the business of sshcheck.ts.
    logins.onCheckApproved = () => ({});
    const { id, url } = await logins.start(request);
    const stranger = await browserOf(server).signIn(url, "eve");
    expect([stranger.status, stranger.text.includes("somebody else")]).toEqual([403, true]);
    const owner = browserOf(server);
    const question = await owner.signIn(url, "alice");
    expect(question.text).toContain(asked);
    expect((await owner.submit(question, { answer: "yes" })).text).toContain("The session goes on");
    expect(logins.get(id)?.verdict).toEqual({ approved: true, userId: 1 });
  },
);

test("an approved machine of a tailnet with approval of machines is told that it waits", async () => {
  const settings = makeSettings();
  await using server = await withProvider({}, { node: { ...settings.node, needsApproval: true } });
  const node = server.node("a");
  const url = await startLogin(node);
  const waiting = node.register({ followup: url });
  const browser = browserOf(server);
  const done = await browser.submit(await browser.signIn(url, "alice"), { answer: "yes" });
  expect(done.text).toContain("waits for an administrator");
  expect(await waiting).toMatchObject({ Error: "", MachineAuthorized: false });
  await until(() => server.control.stats().nodes === 1, "the node");
});
