// Every kind of secret is made and used, rightly and wrongly, while all is logged that can be: none of them is in the log, on a
// page for operators, in the metrics, in an answer of an API, or in what a failure says.
import { afterAll, beforeAll, expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Secrets } from "../../test/lib/secrets.ts";
import { loginIdOf } from "../control/login.ts";
import { Browser, CLIENT, IdentityProvider } from "../control/pages/testing.ts";
import { Store } from "../control/store.ts";
import { makeSettings, TestServer } from "../control/testing.ts";
import { type Listener, listen } from "../net/listener.ts";
import { createLogger } from "../net/logger.ts";
import { loadConfig } from "./config.ts";
import { createMetricsApp } from "./metrics.ts";

const ORIGIN = "http://control.test";
const TSIG = Buffer.from("geheim of the name server").toString("base64");
const PASSWORD = "geheim-of-the-database";
const OWN_API_KEY = "hskey-api-0123456789ab-geheim0command0line";

let folder = "";
let idp: IdentityProvider;
let server: TestServer;
let listener: Listener;
const lines: string[] = [];
const secrets = new Secrets();
/** What anybody, or an operator, was shown. */
const shown: string[] = [];

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "weft-secrets-"));
  idp = await IdentityProvider.start({
    redirectUris: [`${ORIGIN}/oidc/callback`],
    accounts: { alice: { preferred_username: "alice", email: "alice@example.com", email_verified: true } },
  });
  const log = createLogger({ level: "trace", format: "text", write: (line) => lines.push(line) });
  const file = join(folder, "config.yaml");
  writeFileSync(
    file,
    `server_url: ${ORIGIN}
oidc: { issuer: "${idp.issuer}", client_id: ${CLIENT.id}, client_secret: ${JSON.stringify(CLIENT.secret)} }
cli: { address: "${ORIGIN}", api_key: ${OWN_API_KEY} }
database: { type: postgres, postgres: { host: 127.0.0.1, port: 1, name: weft, user: weft, pass: ${PASSWORD} } }
dns: { base_domain: net.test, certificates: { provider: rfc2136, server: "127.0.0.1:1", tsig_name: weft, tsig_secret: ${TSIG} } }
`,
    { mode: 0o600 },
  );
  const config = loadConfig({ config: file, env: {} });
  const { oidc, dns, store } = config.settings;
  await Store.open(store).catch((error: Error) => shown.push(error.message));
  server = await TestServer.start({
    settings: makeSettings({ oidc, dns }),
    log: (line) => log.info(line),
    requestLog: log,
  });
  const { app, upgrades } = server.control;
  listener = await listen({ host: "127.0.0.1", port: 0, app, upgrades, log });
  const metrics = createMetricsApp(config, { control: server.control });
  for (const [name, secret] of Object.entries({ oidc: CLIENT.secret, tsig: TSIG, database: PASSWORD }))
    secrets.add(name, secret);
  secrets.addKey("own API key", OWN_API_KEY);
  secrets.addPrivateKeys("server", server.dataDir);
  await useAll();
  const json = { headers: { Accept: "application/json" } };
  const pages = (await (await metrics.request("/debug/", json)).json()) as { path: string }[];
  for (const path of ["/metrics", ...pages.flatMap((page) => page.path)])
    for (const options of [{}, json]) shown.push(await (await metrics.request(path, options)).text());
});
afterAll(async () => {
  await listener.close();
  await server[Symbol.asyncDispose]();
  await idp[Symbol.asyncDispose]();
  rmSync(folder, { recursive: true, force: true });
});

const ask = async (method: string, path: string, authorization: string, body?: unknown): Promise<string> => {
  const isForm = body instanceof URLSearchParams;
  const response = await fetch(`http://127.0.0.1:${listener.port}${path}`, {
    method,
    headers: { Authorization: authorization, ...(isForm && { "Content-Type": "application/x-www-form-urlencoded" }) },
    ...(body !== undefined && { body: isForm ? body.toString() : JSON.stringify(body) }),
  });
  return response.text();
};

async function useAll(): Promise<void> {
  // A machine joins by key, after wrong ones.
  const alice = await server.user("alice");
  const authKey = await server.key({ user: alice, reusable: true });
  secrets.addKey("pre-auth key", authKey);
  const wrong = `hskey-auth-${"ab".repeat(6)}-${randomBytes(32).toString("hex")}`;
  secrets.addKey("wrong pre-auth key", wrong);
  const node = server.node("a");
  for (const key of [wrong, authKey.slice(0, -2), authKey])
    shown.push(JSON.stringify(await node.register({ authKey: key })));
  secrets.add("machine key", Buffer.from(node.machinePrivate).toString("hex"));
  await node.stream();
  // It gets an id token, and no certificate.
  const idToken = (await node.post("/machine/id-token", { NodeKey: node.nodeKey, Audience: "x" })).text;
  secrets.add("id token", JSON.parse(idToken).id_token.split(".").at(-1));
  const record = { NodeKey: node.nodeKey, Name: "_acme-challenge.a.net.test", Type: "TXT", Value: "x" };
  shown.push((await node.post("/machine/set-dns", record)).text);
  // A person signs in; somebody else comes back from the provider with what is not theirs.
  const browser = new Browser({ [ORIGIN]: `http://127.0.0.1:${listener.port}` });
  const url = (await server.node("b").register()).AuthURL!;
  expect(loginIdOf(url)).not.toBeNull();
  const page = await browser.signIn(url, "alice");
  shown.push(await ask("GET", `/oidc/callback?code=x&state=${idp.requests.at(-1)!.get("state")}`, ""));
  expect((await browser.submit(page, { answer: "yes" })).text).toContain("connected as");
  for (const cookie of browser.setCookies) {
    const [, name, value] = /^(weft_[\w-]+)=([^;]+);/.exec(cookie) ?? [];
    if (name) secrets.add(`cookie ${name}`, value!);
  }
  // API keys, OAuth clients and their tokens.
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  secrets.addKey("API key", apiKey);
  const made = JSON.parse(
    await ask("POST", "/api/v2/tailnet/-/keys", `Bearer ${apiKey}`, {
      keyType: "client",
      scopes: ["all"],
      tags: ["tag:a"],
    }),
  ) as { id: string; key: string };
  secrets.addKey("OAuth secret", made.key);
  const grant = new URLSearchParams({ client_id: made.id, client_secret: made.key });
  const { access_token: token } = JSON.parse(await ask("POST", "/api/v2/oauth/token", "", grant));
  secrets.addKey("OAuth token", token);
  const wrongGrant = new URLSearchParams({ client_id: made.id, client_secret: `${made.key.slice(0, -2)}zz` });
  shown.push(await ask("POST", "/api/v2/oauth/token", "", wrongGrant));
  for (const key of [apiKey, token, `${apiKey.slice(0, -2)}zz`, `${token.slice(0, -2)}zz`]) {
    for (const version of ["v1", "v2"]) {
      const { paths } = JSON.parse(await ask("GET", `/api/${version}/openapi.json`, "")) as {
        paths: Record<string, object>;
      };
      for (const [path, operations] of Object.entries(paths)) {
        if (!("get" in operations)) continue;
        const whole = path.replace("{tailnet}", "-").replace(/\{\w+\}/g, "1");
        shown.push(await ask("GET", whole.startsWith("/api/") ? whole : `/api/${version}${whole}`, `Bearer ${key}`));
      }
    }
    shown.push(await ask("POST", "/api/v1/node/register?key=x", `Basic ${Buffer.from(`${key}:`).toString("base64")}`));
  }
}

test("no secret is in the log, on the operators' pages, in the metrics, in answers of the APIs or in errors", () => {
  expect(secrets.names.length).toBeGreaterThanOrEqual(15);
  expect(lines.length).toBeGreaterThan(100);
  const log = lines.join("\n");
  const seen = shown.join("\n");
  expect(secrets.foundIn({ log, "what was shown": seen })).toEqual([]);
  // What was looked through is what it should be.
  expect(log).toContain("presented a pre-auth key that never was");
  expect(log).toContain("gets no certificate");
  expect(log).toContain("GET /oidc/callback");
  expect(seen).toContain("the PostgreSQL database weft at 127.0.0.1 cannot be reached");
  expect(seen).toContain('"email":"alice@example.com"');
  expect(seen).toContain("weft_map_streams");
});
