// Login by an identity provider in a real browser: official clients, oidc-provider and Chromium, each on a host of its own
// (spec/headscale-features.md, section 22.4: TestOIDCAuthenticationPingAll, TestOIDCMultipleOpenedLoginUrls,
// TestOIDCFollowUpUrl, TestOIDCReloginSameNodeNewUser, TestOIDCExpireNodesBasedOnTokenExpiry, TestOIDCExpiryAfterRestart;
// 22.9: TestSSHCheckModeOIDC).
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { ping } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { CLIENT } from "../src/control/pages/testing.ts";
import type { Visit } from "./lib/chromium.ts";
import { Box, cannotUseNamespaces, certificate, skip, stillRuns, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { OPERATORS, Secrets, shownBy } from "./lib/secrets.ts";

const CHROMIUM = "/usr/bin/chromium";
const noBrowser = existsSync(CHROMIUM) ? null : `${CHROMIUM} is absent (apt package chromium)`;
const absent = missing([["tailscaled", "1.102.5"]]);
const noSSH = Bun.which("ssh") ? null : "ssh is absent (package openssh-client)";

const POLICY = JSON.stringify({
  tagOwners: { "tag:server": [] },
  acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }],
  ssh: [{ action: "check", src: ["alice@example.com"], dst: ["tag:server"], users: ["root"] }],
});

interface ListedNode {
  id: string;
  ipAddresses: string[];
  user: { name: string; email: string; provider: string };
  expiry: string | null;
  registerMethod: string;
}

describe.skipIf(skip(cannotUseNamespaces, absent, noBrowser))("login in a real browser", () => {
  const dir = tempDir("browser");
  let lab: Lab;
  let box: Box;
  let provider: Daemon;
  let person: Host;
  let alice: Tailscaled;
  let bob: Tailscaled;
  let server: Tailscaled;
  const secrets = new Secrets();
  let visits = 0;

  const nodeOf = async (member: Tailscaled): Promise<ListedNode> => {
    const nodes = await box.admin<ListedNode[]>("nodes", "list");
    const found = nodes.find(({ ipAddresses }) => ipAddresses.includes(member.ip4));
    if (!found) throw new Error(`no node has the address of ${member.name}`);
    return found;
  };

  /** `tailscale up` without a key: the address that it prints, and its end. */
  const login = async (
    member: Tailscaled,
    ...more: string[]
  ): Promise<{ url: string; end: () => Promise<unknown> }> => {
    const child = new Daemon(
      member.host,
      member.cli("up", `--login-server=${box.url}`, `--hostname=${member.name}`, "--accept-dns=false", ...more),
    );
    const url = await until(
      `${member.name} is given an address`,
      () => /https:\/\/\S+\/register\/\S+/.exec(child.output())?.[0],
    );
    const end = async () => {
      const code = await Promise.race([child.exited, Bun.sleep(60_000).then(() => "no end in 60 s")]);
      if (code === "no end in 60 s")
        throw new Error(
          `up: ${child.output()}; daemon: ${member.process.output().slice(-6000)}; box: ${box.process.output().slice(-3000)}`,
        );
      return code;
    };
    return { url, end };
  };

  const visit = async (url: string, account: string, tabs = 1): Promise<Visit> => {
    const script = join(import.meta.dir, "lib/chromium.ts");
    const result = await person.run(["timeout", "120", process.execPath, script, url, account, `${tabs}`], {
      timeoutMs: 150_000,
    });
    if (result.code !== 0) throw new Error(`the browser: ${result.stderr.slice(-2000)}${result.stdout}`);
    const seen = JSON.parse(result.stdout) as Visit;
    for (const [name, value] of seen.secrets) if (value) secrets.add(`${name} ${visits}`, value);
    visits++;
    return seen;
  };

  beforeAll(async () => {
    lab = await Lab.create("browser");
    const boxHost = await lab.host("box");
    const providerHost = await lab.host("idp");
    person = await lab.host("person");
    const tls = await certificate(dir.path, boxHost.ip4);
    const issuer = `http://${providerHost.ip4}:9000`;
    const callback = `https://${boxHost.ip4}:8443/oidc/callback`;
    const script = join(import.meta.dir, "lib/idp.ts");
    provider = new Daemon(providerHost, [process.execPath, script, providerHost.ip4, "9000", callback, "3600"]);
    await until("the identity provider is ready", async () => {
      await stillRuns("it", provider);
      return provider.output().includes("ready");
    });
    const policy = join(dir.path, "policy.hujson");
    writeFileSync(policy, POLICY);
    const file = join(dir.path, "config.yaml");
    writeFileSync(
      file,
      `oidc:
  issuer: ${issuer}
  client_id: ${CLIENT.id}
  client_secret: ${JSON.stringify(CLIENT.secret)}
  scope: [openid, profile, email, groups]
  use_expiry_from_token: true
  pkce: { enabled: true }
policy: { mode: file, path: ${policy} }
`,
      { mode: 0o600 },
    );
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--config", file, ...OPERATORS] });
    const key = secrets.addKey("pre-auth key", await box.key("--tags", "tag:server"));
    const env = { SSL_CERT_FILE: tls.ca };
    alice = new Tailscaled(await lab.host("alice"), join(dir.path, "alice"), "1.102.5", env);
    bob = new Tailscaled(await lab.host("bob"), join(dir.path, "bob"), "1.102.5", env);
    server = new Tailscaled(await lab.host("server"), join(dir.path, "server"), "1.102.5", env);
    await Promise.all([alice.start(), bob.start(), server.up(box.url, key)]);
  }, 300_000);

  afterAll(async () => {
    await Promise.all([alice?.stop(), bob?.stop(), server?.stop()]);
    await box?.stop();
    provider?.kill("SIGTERM");
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("a person signs in, is asked about the machine, and it joins; nothing comes from elsewhere, nothing is refused by the browser", async () => {
    const { url, end } = await login(alice);
    const seen = await visit(url, "alice");
    expect(seen.question).toContain("alice");
    expect(seen.question).toContain("linux");
    expect(seen.answer).toContain("Connected");
    expect(seen.problems).toEqual([]);
    expect(seen.loaded.filter((address) => !address.endsWith("/favicon.ico"))).toEqual([]);
    expect(await end()).toBe(0);
    await alice.running();
    const node = await nodeOf(alice);
    expect(node).toMatchObject({
      registerMethod: "REGISTER_METHOD_OIDC",
      user: { name: "alice", email: "alice@example.com", provider: "oidc" },
    });
    const left = Date.parse(node.expiry!) - Date.now();
    expect(left).toBeGreaterThan(3_000_000);
    expect(left).toBeLessThanOrEqual(3_600_000);
    // ExpiryAfterRestart (#2862)
    await alice.stop();
    await alice.start();
    await alice.running();
    expect(await nodeOf(alice)).toMatchObject({ id: node.id, expiry: node.expiry });
  }, 300_000);

  test("with the same address in several tabs, the first one still works; the two machines reach each other", async () => {
    const { url, end } = await login(bob);
    expect((await visit(url, "bob", 3)).answer).toContain("Connected");
    expect(await end()).toBe(0);
    await bob.running();
    const { received } = await until("they reach each other", async () => {
      const result = await ping(alice.host, bob.ip4, { count: 2, intervalMs: 20 });
      return result.received === 2 ? result : null;
    });
    expect(received).toBe(2);
  }, 300_000);

  test.skipIf(skip(noSSH))(
    "TestSSHCheckModeOIDC: a session waits, also over a restart of the server, until its person has allowed it in the browser; nobody else can; the next one waits for nobody",
    async () => {
      const set = await server.host.run(server.cli("set", "--ssh", "--accept-risk=all"));
      expect(set.code).toBe(0);
      const options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
        "ConnectTimeout=10",
      ];
      const command = ["ssh", "-F", "none", ...options.flatMap((option) => ["-o", option]), `root@${server.ip4}`, "id"];
      const { session, url } = await until("a session waits", async () => {
        const session = new Daemon(alice.host, command);
        const shown = () => /https:\/\/\S+\/auth\/hskey-authreq-[0-9a-f]{24}(?=\s)/.exec(session.output())?.[0];
        await until("it ends or shows where to go", () => session.exitCode !== null || shown());
        const url = shown();
        if (!url) throw new Error(session.output());
        return { session, url };
      });
      await expect(visit(url, "bob")).rejects.toThrow("somebody else");
      await box.stop("SIGKILL");
      await box.start();
      const seen = await visit(url, "alice");
      expect(seen.question).toContain("Allow this SSH session?");
      expect(seen.answer).toContain("The session goes on");
      expect(seen.problems).toEqual([]);
      expect(await session.exited).toBe(0);
      expect(session.output()).toContain("uid=0(root)");
      await box.stop("SIGKILL");
      await box.start();
      await until("the next session is let in", async () => {
        const { code, stdout, stderr } = await alice.host.run(["timeout", "10", ...command]);
        expect(stderr).not.toContain("/auth/");
        return code === 0 && stdout.includes("uid=0(root)");
      });
    },
    300_000,
  );

  test("an address that waits no more leads nowhere, and the machine has a fresh one", async () => {
    const before = await nodeOf(alice);
    await alice.host.run(alice.cli("logout"));
    const first = await login(alice);
    await box.admin("auth", "reject", "--auth-id", /register\/(\S+)/.exec(first.url)![1]!);
    expect(await first.end()).toBe(1);
    await alice.restart();
    const second = await login(alice);
    expect(second.url).not.toBe(first.url);
    expect((await visit(second.url, "alice")).answer).toContain("Connected");
    expect(await second.end()).toBe(0);
    await alice.running();
    expect((await nodeOf(alice)).id).toBe(before.id);
  }, 300_000);

  test("another person signs in on the same machine: a node of its own", async () => {
    const before = await nodeOf(alice);
    await alice.host.run(alice.cli("logout"));
    const { url, end } = await login(alice);
    expect((await visit(url, "bob")).answer).toContain("Connected");
    expect(await end()).toBe(0);
    await alice.running();
    const after = await nodeOf(alice);
    expect(after.id).not.toBe(before.id);
    expect(after.user.name).toBe("bob");
  }, 300_000);

  test("no secret of all this, of API keys, nor of webhooks is in the box's log, in its metrics or on its operators' pages", async () => {
    // Somebody who takes what the box posts, but not at once.
    const receiver = new Daemon(person, [
      process.execPath,
      "-e",
      `let count = 0;
      Bun.serve({ hostname: "${person.ip4}", port: 9100, fetch(request) {
        const isTaken = count++ > 1;
        if (isTaken) console.log("took", new URL(request.url).pathname, request.headers.get("Tailscale-Webhook-Signature"));
        return new Response("", { status: isTaken ? 200 : 500 });
      } });
      console.log("ready");`,
    ]);
    await until("the receiver is ready", () => receiver.output().includes("ready"));
    const apiKey = secrets.addKey("API key", await box.admin<string>("apikeys", "create"));
    const wrongKey = secrets.addKey("wrong API key", `${apiKey.slice(0, -8)}deadbeef`);
    const path = secrets.add("address of a chat", `T0${crypto.randomUUID()}`);
    const code = `
      const api = (path, key, body) => fetch("${box.url}/api/v2" + path, {
        method: body ? "POST" : "GET", headers: { Authorization: "Bearer " + key },
        ...(body && { body: JSON.stringify(body) }), tls: { rejectUnauthorized: false } });
      const [key, wrong] = ${JSON.stringify([apiKey, wrongKey])};
      const subscriptions = ["userCreated"];
      const made = [];
      for (const webhook of [
        { endpointUrl: "http://${person.ip4}:9100/hook", subscriptions },
        { endpointUrl: "http://${person.ip4}:9100/${path}", subscriptions, providerType: "slack" },
      ]) made.push(await (await api("/tailnet/-/webhooks", key, webhook)).json());
      console.log(JSON.stringify({ made, refused: (await api("/tailnet/-/devices?key=" + wrong, wrong)).status }));`;
    const { stdout, stderr } = await person.run([process.execPath, "-e", code]);
    const { made, refused } = JSON.parse(stdout || stderr) as { made: { secret: string }[]; refused: number };
    expect(refused).toBe(401);
    for (const [i, { secret }] of made.entries()) secrets.addKey(`webhook ${i}`, secret);
    await box.admin("users", "create", "erin");
    await until("both were told of erin", () =>
      ["took /hook t=", `took /${path}`].every((line) => receiver.output().includes(line)),
    );

    secrets.add("OIDC client secret", CLIENT.secret);
    secrets.addPrivateKeys("box", box.data);
    secrets.addPrivateKeys("TLS", join(dir.path, "server.key"));
    for (const member of [alice, bob, server]) secrets.addPrivateKeys(member.name, member.dir);
    const shown = await shownBy(box);
    expect(secrets.foundIn(shown)).toEqual([]);
    for (const kind of ["code", "state", "weft_"])
      expect(secrets.names.join("\n")).toMatch(new RegExp(`^${kind}`, "m"));
    for (const text of ["GET /oidc/callback", "wrong key from", "webhook"]) expect(shown.log).toContain(text);
    receiver.kill();
  }, 300_000);
});
