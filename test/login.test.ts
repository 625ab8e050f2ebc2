// How official clients sign in: by an administrator's word, by an identity provider, with tags of their user, and where
// machines are approved. Scenarios of spec/headscale-features.md, sections 22.4, 22.5 and 22.10, by their names there.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { ping } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import {
  Box,
  cannotUseNamespaces,
  certificate,
  type Member,
  skip,
  stillRuns,
  Tailscaled,
  tempDir,
  until,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

interface ListedNode {
  id: string;
  givenName: string;
  ipAddresses: string[];
  user: { name: string };
  tags: string[];
  approvedRoutes: string[];
  subnetRoutes: string[];
  expiry: string | null;
  online: boolean;
}

/** Seconds that an id token lasts, and with it a node key. */
const TOKEN_SECONDS = 20;
const IDP_PORT = 9000;

const POLICY = JSON.stringify({
  tagOwners: { "tag:web": ["alice@example.com"], "tag:other": ["bob@example.com"] },
  grants: [{ src: ["*"], dst: ["*"], ip: ["*"] }],
});

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("official clients sign in to a Weft box", () => {
  const dir = tempDir("login");
  let lab: Lab;
  let box: Box;
  let strict: Box;
  let person: Host;
  let current: Member;
  let old: Member;
  let env: Record<string, string>;
  const users: Record<string, string> = {};

  const api = async <T>(to: Box, method: string, path: string, body?: unknown): Promise<T> => {
    const response = await fetch(`http://weft${path}`, {
      method,
      unix: join(to.data, "weft.sock"),
      headers: { "Content-Type": "application/json" },
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return JSON.parse(text || "null") as T;
  };
  const nodes = async (of = box) => (await api<{ nodes: ListedNode[] }>(of, "GET", "/api/v1/node")).nodes;
  const nodeOf = async (member: Member, of = box): Promise<ListedNode> => {
    const ips = (await member.status())?.TailscaleIPs ?? [];
    const found = (await nodes(of)).find(({ ipAddresses }) => ipAddresses.some((ip) => ips.includes(ip)));
    if (!found) throw new Error(`no node has an address of ${member.name}: ${ips}`);
    return found;
  };
  const stateIs = (member: Member, state: string, seconds = 60) =>
    until(
      `${member.name} is ${state}`,
      async () => {
        const now = (await member.status())?.BackendState;
        if (now !== state) throw new Error(`it is ${now}`);
        return true;
      },
      seconds,
      200,
    );

  /** `tailscale up` until it says where to sign in; `up` ends when somebody has. */
  const begin = async (member: Member, to: Box, ...flags: string[]): Promise<{ url: string; up: Daemon }> => {
    const up = new Daemon(
      member.host,
      member.cli(
        "up",
        `--login-server=${to.url}`,
        `--hostname=${member.name}`,
        "--accept-dns=false",
        "--reset",
        ...flags,
      ),
    );
    const url = await until(`${member.name} is told where to sign in`, async () => {
      await stillRuns("up", up);
      return /https?:\/\/\S+\/register\/hskey-authreq-[0-9a-f]{24}/.exec(up.output())?.[0] ?? null;
    });
    return { url, up };
  };
  const finished = async (member: Member, up: Daemon): Promise<void> => {
    const code = await Promise.race([up.exited, Bun.sleep(60_000).then(() => "no end in 60 s")]);
    if (code !== 0)
      throw new Error(
        `up on ${member.name} ended with ${code}: ${up.output()}; ${member.process.output().slice(-1500)}`,
      );
    await member.running();
  };
  /** An administrator lets the machine in. */
  const admit = (to: Box, url: string, user: string) =>
    api(to, "POST", "/api/v1/auth/register", { user, authId: url.slice(url.lastIndexOf("/") + 1) });
  const joinAs = async (member: Member, user: string, ...flags: string[]): Promise<void> => {
    const { url, up } = await begin(member, box, ...flags);
    await admit(box, url, users[user]!);
    await finished(member, up);
  };
  /** A person signs in at the identity provider, from a host of its own. */
  const signIn = async (url: string, account: string): Promise<string> => {
    const result = await person.run([process.execPath, resolve(import.meta.dir, "lib/browse.ts"), url, account], {
      env: { ...process.env, NODE_EXTRA_CA_CERTS: env.SSL_CERT_FILE! },
    });
    if (result.code !== 0) throw new Error(`no login as ${account}: ${result.stderr}`);
    return result.stdout;
  };
  const logout = async (member: Member): Promise<void> => {
    await member.host.run(member.cli("logout"));
    await stateIs(member, "NeedsLogin");
  };

  beforeAll(async () => {
    lab = await Lab.create("login");
    const boxHost = await lab.host("box");
    person = await lab.host("person");
    const tls = await certificate(dir.path, boxHost.ip4);
    env = { SSL_CERT_FILE: tls.ca };
    const redirects = [8443, 9443].map((port) => `https://${boxHost.ip4}:${port}/oidc/callback`);
    const idp = new Daemon(person, [
      process.execPath,
      resolve(import.meta.dir, "lib/idp.ts"),
      person.ip4,
      `${IDP_PORT}`,
      redirects.join(),
      `${TOKEN_SECONDS}`,
    ]);
    await until("the identity provider is ready", async () => {
      await stillRuns("it", idp);
      return idp.output().includes("identity provider ready");
    });
    const policy = join(dir.path, "policy.hujson");
    writeFileSync(policy, POLICY);
    const config = join(dir.path, "config.yaml");
    const provider = `oidc:
  issuer: http://${person.ip4}:${IDP_PORT}
  client_id: weft
  client_secret: "a secret: with + signs / in it"
`;
    writeFileSync(
      config,
      `${provider}  use_expiry_from_token: true
  scope: [openid, profile, email, groups]
  pkce: { enabled: true, method: S256 }
policy: { mode: file, path: ${policy} }
`,
      { mode: 0o600 },
    );
    const approving = join(dir.path, "approving.yaml");
    writeFileSync(
      approving,
      `${provider}node: { needs_approval: true, expiry: 180d }\ntuning: { register_cache_expiration: 10s }\n`,
      { mode: 0o600 },
    );
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--config", config] });
    strict = await Box.start(boxHost, join(dir.path, "strict"), {
      tls,
      port: 9443,
      args: ["--config", approving, "--stun", "off"],
    });
    current = new Tailscaled(await lab.host("current"), join(dir.path, "current"), "1.102.5", env);
    old = new Tailscaled(await lab.host("old"), join(dir.path, "old"), "1.80.3", env);
    for (const name of ["carol", "dave"])
      users[name] = (await api<{ user: { id: string } }>(box, "POST", "/api/v1/user", { name })).user.id;
    await Promise.all([current.start(), old.start()]);
  }, 300_000);

  afterAll(async () => {
    await Promise.all([current?.stop(), old?.stop()]);
    await Promise.all([box?.stop(), strict?.stop()]);
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("TestAuthWebFlowAuthenticationPingAll: an administrator lets both clients in, and they reach each other", async () => {
    await Promise.all([joinAs(current, "carol"), joinAs(old, "carol")]);
    await until("they reach each other", async () => {
      const there = await ping(current.host, old.ip4, { count: 2, intervalMs: 20 });
      const back = await ping(old.host, current.ip6, { count: 2, intervalMs: 20 });
      return there.received + back.received === 4;
    });
    expect((await nodeOf(old)).user.name).toBe("carol");
  }, 300_000);

  test("TestAuthWebFlowLogoutAndReloginSameUser: both keep their ids and addresses", async () => {
    const before = await Promise.all([nodeOf(current), nodeOf(old)]);
    await Promise.all([logout(current), logout(old)]);
    await Promise.all([joinAs(current, "carol"), joinAs(old, "carol")]);
    const after = await Promise.all([nodeOf(current), nodeOf(old)]);
    expect(after.map(({ id, ipAddresses }) => [id, ipAddresses])).toEqual(
      before.map(({ id, ipAddresses }) => [id, ipAddresses]),
    );
    expect(await nodes()).toHaveLength(2);
  }, 300_000);

  test("TestAuthWebFlowLogoutAndReloginNewUser: another user's node is another node, and the first comes back to hers", async () => {
    const first = await nodeOf(current);
    await logout(current);
    await joinAs(current, "dave");
    const second = await nodeOf(current);
    expect(second.id).not.toBe(first.id);
    expect(second.user.name).toBe("dave");
    await logout(current);
    await joinAs(current, "carol");
    expect(await nodeOf(current)).toMatchObject({ id: first.id, ipAddresses: first.ipAddresses });
    expect(await nodes()).toHaveLength(3);
  }, 300_000);

  test("TestAuthWebFlow, refused: the client says why", async () => {
    await logout(current);
    const { url, up } = await begin(current, box);
    await api(box, "POST", "/api/v1/auth/reject", { authId: url.slice(url.lastIndexOf("/") + 1) });
    await until("the client is told", async () => {
      const health = (await current.status()) as unknown as { Health: string[] | null };
      return /refused this login/.test(up.output() + JSON.stringify(health.Health) + current.process.output());
    });
    up.kill();
    await up.exited;
  }, 300_000);

  test("a login that waits goes on when the server has been restarted", async () => {
    const { id } = await nodeOf(old);
    await logout(old);
    const { url, up } = await begin(old, box);
    await box.stop();
    await box.start();
    // With the words of the page, on the server's command line.
    await box.admin("auth", "register", "--auth-id", url.slice(url.lastIndexOf("/") + 1), "--user", "carol");
    await finished(old, up);
    expect((await nodeOf(old)).id).toBe(id);
  }, 300_000);

  test("TestOIDCAuthenticationPingAll, WithPKCE, ACLPolicyOnJoin (#2888): signing in at the provider brings the client up, and it sees and is seen", async () => {
    const { url, up } = await begin(current, box, "--force-reauth");
    expect(await signIn(url, "alice")).toMatch(/^200 .*Connected/s);
    await finished(current, up);
    const node = await nodeOf(current);
    expect(node.user.name).toBe("alice");
    await until("the old client sees it", async () => (await old.peer(current)) !== null);
    await until("it sees the old client", async () => (await current.peer(old)) !== null);
    const rest = Date.parse(node.expiry!) - Date.now();
    expect(rest).toBeLessThanOrEqual(TOKEN_SECONDS * 1000);
  }, 300_000);

  test("TestOIDCExpireNodesBasedOnTokenExpiry: with the token the node key is over, and signing in again brings the same node back", async () => {
    const before = (await nodes()).find(({ user }) => user.name === "alice")!;
    await stateIs(current, "NeedsLogin", TOKEN_SECONDS + 60);
    const { url, up } = await begin(current, box);
    await signIn(url, "alice");
    await finished(current, up);
    expect(await nodeOf(current)).toMatchObject({ id: before.id, ipAddresses: before.ipAddresses });
  }, 300_000);

  test("TestOIDCReloginSameNodeNewUser, ReloginSameUserRoutesPreserved (#2896): three logins, two nodes, and the routes are still approved", async () => {
    const join = async (account: string) => {
      await logout(current);
      const { url, up } = await begin(current, box, "--advertise-routes=10.99.0.0/24");
      await signIn(url, account);
      await finished(current, up);
      return nodeOf(current);
    };
    const first = await join("alice");
    await api(box, "POST", `/api/v1/node/${first.id}/approve_routes`, { routes: ["10.99.0.0/24"] });
    const second = await join("bob");
    expect(second.id).not.toBe(first.id);
    expect(second).toMatchObject({ approvedRoutes: [], user: { name: "bob" } });
    const again = await join("alice");
    expect(again).toMatchObject({ id: first.id, ipAddresses: first.ipAddresses, approvedRoutes: ["10.99.0.0/24"] });
    await until("it serves the route", async () => (await nodeOf(current)).subnetRoutes.includes("10.99.0.0/24"));
  }, 300_000);

  test("TestTagsUserLogin…: owned tags make the machine tagged, others are refused, and --advertise-tags= gives it back to its user", async () => {
    const refused = await begin(current, box, "--force-reauth", "--advertise-tags=tag:other");
    expect(await signIn(refused.url, "alice")).toContain("requested tags [tag:other] are invalid or not permitted");
    expect(await refused.up.exited).toBe(1);
    expect(refused.up.output()).toContain("requested tags [tag:other] are invalid or not permitted");

    const owned = await begin(current, box, "--force-reauth", "--advertise-tags=tag:web");
    await signIn(owned.url, "alice");
    await finished(current, owned.up);
    expect(await nodeOf(current)).toMatchObject({ tags: ["tag:web"], expiry: null });
    const self = (await current.status())!.Self as unknown as { Tags: string[] };
    expect(self.Tags).toEqual(["tag:web"]);
    const { id } = await nodeOf(current);

    const back = await begin(current, box, "--force-reauth", "--advertise-tags=");
    await signIn(back.url, "alice");
    await finished(current, back.up);
    const node = await nodeOf(current);
    expect(node).toMatchObject({ id, tags: [] });
    expect(node.user.name).toBe("alice");
  }, 300_000);

  test("TestTagsAuthKeyWithoutUserInheritsTags, AuthKeyWithTagRequestDifferentTag, Issue2978, AdminOverrideReauthPreserves, AuthKeyConvertToUserViaCLIRegister (#3038)", async () => {
    await logout(current);
    const { preAuthKey } = await api<{ preAuthKey: { key: string } }>(box, "POST", "/api/v1/preauthkey", {
      aclTags: ["tag:web"],
      reusable: true,
    });
    const upByKey = (...flags: string[]) =>
      current.host.run(
        current.cli(
          "up",
          `--login-server=${box.url}`,
          `--auth-key=${preAuthKey.key}`,
          `--hostname=${current.name}`,
          ...["--accept-dns=false", "--reset", "--timeout=50s"],
          ...flags,
        ),
      );
    const tagsAre = (tags: string[]) =>
      until(`the client says that its tags are ${tags}`, async () => {
        const self = (await current.status())!.Self as unknown as { Tags?: string[] };
        if (JSON.stringify(self.Tags ?? []) !== JSON.stringify(tags)) throw new Error(`now ${self.Tags}`);
        return true;
      });
    expect((await upByKey()).code).toBe(0);
    await tagsAre(["tag:web"]);
    const { id } = await nodeOf(current);

    await api(box, "POST", `/api/v1/node/${id}/tags`, { tags: ["tag:other"] });
    await tagsAre(["tag:other"]);
    expect((await upByKey("--force-reauth")).code).toBe(0);
    expect(await nodeOf(current)).toMatchObject({ id, tags: ["tag:other"] });

    const other = await upByKey("--force-reauth", "--advertise-tags=tag:other");
    expect(other.code).not.toBe(0);
    expect(other.stderr + other.stdout).toContain("requested tags [tag:other] are invalid or not permitted");
    await current.restart();

    const { url, up } = await begin(current, box, "--force-reauth", "--advertise-tags=");
    await admit(box, url, users.carol!);
    await finished(current, up);
    const node = await nodeOf(current);
    expect(node.tags).toEqual([]);
    expect(node.user.name).toBe("carol");
  }, 300_000);

  test("TestOIDCFollowUpUrl: when its login has expired, the client has a fresh address by itself, which works", async () => {
    await logout(current);
    const { url, up } = await begin(current, strict, "--force-reauth");
    const addresses = () => new Set(up.output().match(/https:\/\/\S+\/register\/hskey-authreq-[0-9a-f]{24}/g));
    const fresh = await until("the client shows another address", () =>
      [...addresses()].find((other) => other !== url),
    );
    await expect(admit(strict, url, "1")).rejects.toThrow("404");
    await expect(signIn(url, "alice")).rejects.toThrow("no login as alice");
    await until(
      "alice has signed in at the address of the moment",
      async () => (await signIn([...addresses()].at(-1) ?? fresh, "alice")).startsWith("200 "),
      120,
    );
    const waiting = await until("her machine waits", async () => {
      return (await nodes(strict)).find(({ user }) => user.name === "alice");
    });
    await api(strict, "POST", `/api/v2/device/${waiting.id}/authorized`, { authorized: true });
    await finished(current, up);
    expect((await nodeOf(current, strict)).user.name).toBe("alice");
  }, 300_000);

  test("machine approval, a suspended user: the client shows that it waits, and goes on by itself when it is let in; ExpiryAfterRestart (#2862)", async () => {
    await logout(current);
    const { user } = await api<{ user: { id: string } }>(strict, "POST", "/api/v1/user", { name: "erin" });
    const key = async (more: Record<string, unknown>) =>
      (await api<{ preAuthKey: { key: string } }>(strict, "POST", "/api/v1/preauthkey", { user: user.id, ...more }))
        .preAuthKey.key;
    const up = new Daemon(
      current.host,
      current.cli(
        "up",
        `--login-server=${strict.url}`,
        `--auth-key=${await key({})}`,
        "--force-reauth",
        "--accept-dns=false",
      ),
    );
    await stateIs(current, "NeedsMachineAuth");
    await until("its user reads what to do", async () =>
      JSON.stringify(await current.status()).includes("weft nodes authorize -i "),
    );
    const waiting = (await nodes(strict)).find((node) => node.user.name === "erin");
    await api(strict, "POST", `/api/v2/device/${waiting!.id}/authorized`, { authorized: true });
    await finished(current, up);
    const node = await nodeOf(current, strict);
    expect(node.id).toBe(waiting!.id);
    expect(Math.abs(Date.parse(node.expiry!) - Date.now() - 180 * 24 * 3_600_000)).toBeLessThan(120_000);
    // Its user is suspended: the client says so, stays connected, and goes on without a login.
    await api(strict, "POST", `/api/v2/users/${user.id}/suspend`);
    await stateIs(current, "NeedsMachineAuth");
    await until("its user reads why", async () => JSON.stringify(await current.status()).includes("is suspended"));
    await api(strict, "POST", `/api/v2/users/${user.id}/restore`);
    await current.running();
    expect((await nodeOf(current, strict)).id).toBe(node.id);
    await current.stop();
    await current.start();
    await current.running();
    expect((await nodeOf(current, strict)).expiry).toBe(node.expiry);
  }, 300_000);
});
