// The life of official clients on a Weft box: scenarios of spec/headscale-features.md, section 22, by their names there.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { ping } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, type Member, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

interface ListedNode {
  id: string;
  name: string;
  givenName: string;
  ipAddresses: string[];
  user: { name: string };
  online: boolean;
  expiry: string | null;
  approvedRoutes: string[];
  subnetRoutes: string[];
}

const EPHEMERAL_TIMEOUT = 3;

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("official clients on a Weft box", () => {
  const dir = tempDir("interop");
  let lab: Lab;
  let box: Box;
  let key: string;
  let current: Member;
  let old: Member;

  const nodes = () => box.admin<ListedNode[]>("nodes", "list");
  const nodeOf = async (member: Member): Promise<ListedNode> => {
    const found = (await nodes()).find(({ ipAddresses }) => ipAddresses.includes(member.ip4));
    if (!found) throw new Error(`no node has the address of ${member.name}`);
    return found;
  };
  const up = (member: Member, authKey: string, ...more: string[]) =>
    member.run(
      "up",
      `--login-server=${box.url}`,
      `--auth-key=${authKey}`,
      `--hostname=${member.name}`,
      "--accept-dns=false",
      "--timeout=50s",
      ...more,
    );
  const reach = async (from: Member, to: Member): Promise<void> => {
    await until(`${from.name} reaches ${to.name}`, async () => {
      const { received } = await ping(from.host, to.ip4, { count: 2, intervalMs: 20 });
      return received === 2;
    });
  };
  const sees = (from: Member, ip: string, what: string, check: (peer: Record<string, unknown> | null) => boolean) =>
    until(`${from.name} sees ${ip} ${what}`, async () => {
      const status = await from.status();
      const peer = Object.values(status?.Peer ?? {}).find(({ TailscaleIPs }) => TailscaleIPs?.includes(ip)) ?? null;
      if (!status || !check(peer as Record<string, unknown> | null)) throw new Error(`now ${JSON.stringify(peer)}`);
      return true;
    });

  const health = async (member: Member): Promise<string> => {
    const status = (await member.status()) as { Health?: string[] | null } | null;
    return (status?.Health ?? []).join("\n");
  };

  beforeAll(async () => {
    lab = await Lab.create("interop");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    box = await Box.start(boxHost, join(dir.path, "box"), {
      tls,
      args: ["--ephemeral-timeout", `${EPHEMERAL_TIMEOUT}s`],
      // Expiry and ephemeral nodes are to go by the same clock wherever the server stands (EphemeralInAlternateTimezone).
      env: { TZ: "America/Los_Angeles", WEFT_CLIENTS_LATEST_VERSION: "1.102.5" },
    });
    current = new Tailscaled(await lab.host("current"), join(dir.path, "current"), "1.102.5", env);
    old = new Tailscaled(await lab.host("old"), join(dir.path, "old"), "1.80.3", env);
    key = await box.key();
    await Promise.all([current.up(box.url, key), old.up(box.url, key)]);
  }, 300_000);

  afterAll(async () => {
    await Promise.all([current?.stop(), old?.stop()]);
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("a client that is behind is told of the version that the operator named, and no other", async () => {
    await until("the old client has heard of it", async () => (await health(old)).includes("1.102.5"));
    expect(await health(current)).not.toContain("1.102.5");
  });

  test("TestPingAllByIP, TestPingAllByIPManyUpDown: down and up again, three times", async () => {
    await reach(current, old);
    for (let i = 0; i < 3; i++) {
      await (i % 2 ? current : old).run("down");
      await (i % 2 ? current : old).run("up");
    }
    await Promise.all([current.running(), old.running()]);
    await reach(current, old);
    await reach(old, current);
  }, 300_000);

  test("TestPingAllByHostname: names are known to both clients", async () => {
    for (const [from, name] of [
      [current, "old"],
      [old, "current"],
    ] as const)
      await until(`${from.name} has a pong`, async () =>
        (await from.run("ping", "--c=1", "--until-direct=false", name)).includes(`pong from ${name}`),
      );
  });

  test("TestTaildrop: files between nodes of one user, both ways, byte by byte", async () => {
    for (const [from, to] of [
      [current, old],
      [old, current],
    ] as const) {
      const sent = join(dir.path, `from-${from.name}.bin`);
      const inbox = join(dir.path, `inbox-${to.name}`);
      mkdirSync(inbox, { recursive: true });
      writeFileSync(sent, crypto.getRandomValues(new Uint8Array(60_000)));
      await until(`${from.name} sends a file to ${to.name}`, async () => {
        await from.run("file", "cp", sent, `${to.ip4}:`);
        return true;
      });
      await to.run("file", "get", "--wait=true", "--conflict=overwrite", inbox);
      expect(readFileSync(join(inbox, `from-${from.name}.bin`))).toEqual(readFileSync(sent));
    }
  }, 300_000);

  test("TestUpdateHostnameFromClient: the name follows the client, an administrator's name sticks, clashes get a suffix", async () => {
    const { id } = await nodeOf(current);
    await current.run("set", "--hostname=Joe's Mac mini");
    await until("the name has followed", async () => (await nodeOf(current)).givenName === "joes-mac-mini");
    expect((await nodeOf(current)).name).toBe("Joe's Mac mini");
    await sees(old, current.ip4, "under its new name", (peer) => String(peer?.DNSName).startsWith("joes-mac-mini."));
    await current.run("set", "--hostname=old");
    await until(
      "the name is another than that of the other node",
      async () => (await nodeOf(current)).givenName === "old-1",
    );
    await box.admin("nodes", "rename", "-i", id, "chosen");
    await current.run("set", "--hostname=current");
    await until("the host's name is known", async () => (await nodeOf(current)).name === "current");
    expect((await nodeOf(current)).givenName).toBe("chosen");
    await sees(old, current.ip4, "under the administrator's name", (peer) =>
      String(peer?.DNSName).startsWith("chosen."),
    );
  }, 300_000);

  test("TestExpireNode, TestSetNodeExpiryInFuture, TestDisableNodeExpiry", async () => {
    const { id } = await nodeOf(old);
    const future = new Date(Date.now() + 3_600_000).toISOString();
    await box.admin("nodes", "expire", "-i", id, "-e", future);
    // Clients show whole seconds.
    const isIt = (peer: Record<string, unknown> | null) =>
      Math.abs(Date.parse(String(peer?.KeyExpiry)) - Date.parse(future)) <= 1000;
    await sees(current, old.ip4, "with its expiry", isIt);
    await until("the client warns its user", async () => (await health(old)).includes("is cut off at"));
    // The newer client has its warnings as messages, which are taken back one by one.
    const { id: other } = await nodeOf(current);
    await box.admin("nodes", "expire", "-i", other, "-e", future);
    await until("the newer client warns, too", async () => (await health(current)).includes("is cut off at"));
    await box.admin("nodes", "expire", "-i", other, "--disable");
    await until("it warns no more", async () => !(await health(current)).includes("is cut off at"));
    await box.admin("nodes", "expire", "-i", id, "--disable");
    expect((await nodeOf(old)).expiry).toBeNull();
    await box.admin("nodes", "expire", "-i", id);
    await sees(current, old.ip4, "expired", (peer) => peer?.Expired === true);
    await until(
      "the client knows that it needs a login",
      async () => (await old.status())?.BackendState === "NeedsLogin",
    );
    await up(old, key, "--force-reauth");
    await old.running();
    expect((await nodeOf(old)).id).toBe(id);
    await reach(current, old);
  }, 300_000);

  test("TestAuthKeyLogoutAndReloginSameUser: id and addresses stay", async () => {
    const before = await nodeOf(current);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    await up(current, key);
    await current.running();
    expect(await nodeOf(current)).toMatchObject({ id: before.id, ipAddresses: before.ipAddresses });
    await reach(current, old);
  }, 300_000);

  test("TestAuthKeyLogoutAndReloginSameUserExpiredKey: refused, with the reason, and the next key is taken", async () => {
    const user = (await nodeOf(current)).user.name;
    const made = await box.admin<{ id: string; key: string }>("preauthkeys", "create", "--user", user, "--reusable");
    await box.admin("preauthkeys", "expire", "--id", made.id);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    await expect(up(current, made.key)).rejects.toThrow("expired");
    await current.restart();
    await up(current, key);
    await current.running();
  }, 300_000);

  /** Whose machine it is, as the client says. */
  const ownerOf = async (member: Member): Promise<string | undefined> => {
    const { Self, User } = (await member.status()) as unknown as {
      Self: { UserID: number };
      User: Record<string, { LoginName: string }>;
    };
    return User[Self.UserID]?.LoginName;
  };

  test("TestAuthKeyLogoutAndReloginNewUser, PreAuthKeyCorrectUserLoggedIn: a node of its own for the new user, the former one is kept", async () => {
    const before = await nodeOf(current);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    const other = await box.key();
    await up(current, other);
    await current.running();
    const after = await nodeOf(current);
    expect(after.id).not.toBe(before.id);
    expect(after.user.name).not.toBe(before.user.name);
    expect(await ownerOf(current)).toBe(after.user.name);
    expect((await nodes()).map(({ id }) => id)).toContain(before.id);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    await up(current, key);
    await current.running();
    expect((await nodeOf(current)).id).toBe(before.id);
    expect(await ownerOf(current)).toBe(before.user.name);
  }, 300_000);

  test("TestAuthKeyLogoutAndReloginRoutesPreserved (#2896): approved routes are served again after a new login", async () => {
    const route = "10.99.0.0/24";
    await current.run("set", `--advertise-routes=${route}`);
    const { id } = await nodeOf(current);
    await box.admin("nodes", "approve-routes", "-i", id, "-r", route);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    await up(current, key, `--advertise-routes=${route}`);
    await current.running();
    await until("the route is served again", async () => (await nodeOf(current)).subnetRoutes.includes(route));
    expect(await nodeOf(current)).toMatchObject({ id, approvedRoutes: [route] });
    await sees(old, current.ip4, "with the route", (peer) => (peer?.PrimaryRoutes as string[])?.includes(route));
    await current.run("set", "--advertise-routes=");
  }, 300_000);

  test("TestAuthKeyDeleteKey (#2830): a node outlives its key, also over a restart of the client", async () => {
    const { name } = (await nodeOf(current)).user;
    const made = await box.admin<{ id: string; key: string }>("preauthkeys", "create", "--user", name);
    await current.run("logout");
    await until("it is logged out", async () => (await current.status())?.BackendState === "NeedsLogin");
    await up(current, made.key);
    await current.running();
    const before = await nodeOf(current);
    await box.admin("preauthkeys", "delete", "--id", made.id);
    await current.stop();
    await current.start();
    await current.running();
    expect((await nodeOf(current)).id).toBe(before.id);
    await reach(old, current);
  }, 300_000);

  test("TestAPIAuthenticationBypass, …Curl (#2809): from elsewhere, without a good key, the API tells nothing but 401", async () => {
    const name = (await nodeOf(current)).user.name;
    const good = await box.admin<string>("apikeys", "create");
    const paths = ["user", "node", "node/1", "preauthkey", "apikey", "policy"];
    const ask = async (path: string, ...authorization: string[]): Promise<{ status: string; body: string }> => {
      const header = authorization.flatMap((value) => ["-H", `Authorization: ${value}`]);
      const curl = ["curl", "-s", "--cacert", join(dir.path, "ca.pem"), "-w", "\\n%{http_code}", ...header];
      const { stdout } = await old.host.run([...curl, `${box.url}${path}`]);
      const end = stdout.lastIndexOf("\n");
      return { status: stdout.slice(end + 1), body: stdout.slice(0, end) };
    };
    expect(await ask("/api/v1/user", `Bearer ${good}`)).toEqual({ status: "200", body: expect.stringContaining(name) });
    const secret = good.slice(0, -64);
    const tries: string[][] = [[], ["Bearer "], ["Bearer x"], [`Bearer ${secret}${"0".repeat(64)}`], [`Basic ${good}`]];
    for (const authorization of tries) {
      for (const path of [...paths.map((each) => `/api/v1/${each}`), "/api/v2/tailnet/-/devices"]) {
        const { status, body } = await ask(path, ...authorization);
        // Who guesses keys is told to wait after some.
        expect([path, ["401", "429"].includes(status)]).toEqual([path, true]);
        for (const told of [name, current.ip4, "hskey-"]) expect(body).not.toContain(told);
      }
    }
  }, 300_000);

  test("TestNodeOnlineStatus: offline some seconds after it is gone, online as soon as it is back", async () => {
    await old.run("down");
    await sees(current, old.ip4, "offline", (peer) => peer?.Online === false);
    expect((await nodeOf(old)).online).toBe(false);
    await old.run("up");
    await sees(current, old.ip4, "online", (peer) => peer?.Online === true);
  }, 300_000);

  test("TestEphemeral, EphemeralInAlternateTimezone, Ephemeral2006DeletedTooQuickly: it stays while it is back in time, and goes when it is away", async () => {
    const ephemeral = await box.key("--ephemeral");
    const guest = new Tailscaled(await lab.host("guest"), join(dir.path, "guest"), "1.102.5", {
      SSL_CERT_FILE: join(dir.path, "ca.pem"),
    });
    await guest.up(box.url, ephemeral);
    const { id } = await nodeOf(guest);
    await sees(current, guest.ip4, "at all", (peer) => peer !== null);
    // Away for longer than the timeout would be, if it ran from the first moment and not from going offline.
    await guest.stop("SIGKILL");
    await Bun.sleep(EPHEMERAL_TIMEOUT * 1000 + 1000);
    await guest.start();
    await guest.running();
    expect((await nodeOf(guest)).id).toBe(id);
    await reach(current, guest);
    await guest.stop("SIGKILL");
    await until("the box has deleted it", async () => !(await nodes()).some((node) => node.id === id));
    await sees(current, guest.ip4, "no more", (peer) => peer === null);
  }, 300_000);

  test("a container: without a TUN device, signing in at each start with the same key for one use, it is the same node after kill -9, and none on an empty disk", async () => {
    const env = { SSL_CERT_FILE: join(dir.path, "ca.pem") };
    const host = await lab.host("container");
    const container = new Tailscaled(host, join(dir.path, "container"), "1.102.5", env);
    container.tun = "userspace-networking";
    container.flags = ["--socks5-server=127.0.0.1:1055"];
    const { name } = (await nodeOf(current)).user;
    const once = (await box.admin<{ key: string }>("preauthkeys", "create", "--user", name)).key;
    await container.up(box.url, once);
    const { id } = await nodeOf(container);
    // What comes in for it goes to its loopback, and it goes out by a proxy.
    const serve = (on: Member, ip: string) =>
      new Daemon(on.host, [
        process.execPath,
        "-e",
        `Bun.serve({ hostname: "${ip}", port: 8000, fetch: () => new Response("${on.name}") })`,
      ]);
    const webs = [serve(container, "127.0.0.1"), serve(current, current.ip4)];
    const asks = (from: Member, ip: string, wanted: string, ...flags: string[]) =>
      until(`${from.name} asks ${wanted}`, async () => {
        const { stdout } = await from.host.run(["curl", "-s", "-m", "5", ...flags, `http://${ip}:8000`]);
        return stdout === wanted;
      });
    await asks(current, container.ip4, "container");
    await asks(container, current.ip4, "current", "--socks5", "127.0.0.1:1055");
    for (const web of webs) web.kill();
    await container.stop("SIGKILL");
    await container.up(box.url, once);
    expect((await nodeOf(container)).id).toBe(id);
    await container.stop();
    const empty = new Tailscaled(host, join(dir.path, "empty"), "1.102.5", env);
    await empty.start();
    await expect(up(empty, once)).rejects.toThrow("has been used");
    await empty.stop();
  }, 300_000);

  test("Test2118DeletingOnlineNodePanics: a node that is deleted while it is there is gone at once, and everything goes on", async () => {
    const guest = new Tailscaled(await lab.host("brief"), join(dir.path, "brief"), "1.80.3", {
      SSL_CERT_FILE: join(dir.path, "ca.pem"),
    });
    await guest.up(box.url, key);
    await reach(guest, current);
    const { id } = await nodeOf(guest);
    await box.admin("nodes", "delete", "-i", id, "--force");
    await sees(current, guest.ip4, "no more", (peer) => peer === null);
    await until("the client knows", async () => (await guest.status())?.BackendState === "NeedsLogin");
    expect((await nodes()).map((node) => node.id)).not.toContain(id);
    await up(guest, key, "--force-reauth");
    await guest.running();
    expect((await nodeOf(guest)).id).not.toBe(id);
    await reach(guest, current);
    await guest.stop();
  }, 300_000);
});
