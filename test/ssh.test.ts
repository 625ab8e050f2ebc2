// SSH between official clients: scenarios of spec/headscale-features.md, section 22.9, by their names. The sessions are real:
// tailscaled's own SSH server, the ssh of this machine, and `tailscale ssh`.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, type Member, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { OPERATORS, Secrets, shownBy } from "./lib/secrets.ts";

const noSSH = Bun.which("ssh") ? null : "ssh is absent (package openssh-client)";

interface Session {
  code: number;
  out: string;
  err: string;
}

const OPEN = {
  tagOwners: { "tag:server": [] },
  acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }],
};
const all = ["root", "autogroup:nonroot"];
const REFUSED = "does not permit you to SSH";

describe.skipIf(skip(cannotUseNamespaces, noSSH, missing([["tailscaled", "1.102.5"]])))(
  "SSH between official clients",
  () => {
    const dir = tempDir("ssh");
    const file = join(dir.path, "policy.hujson");
    let lab: Lab;
    let box: Box;
    let laptop: Member;
    let desktop: Member;
    let phone: Member;
    let server: Member;
    const secrets = new Secrets();

    const set = async (policy: object): Promise<void> => {
      writeFileSync(file, JSON.stringify({ ...OPEN, ...policy }));
      await box.admin("policy", "set", "-f", file);
    };
    /** `then` sees what the session has printed so far. */
    const open = async (
      from: Member,
      to: Member,
      user: string,
      then?: (text: string) => void,
      seconds = 90,
    ): Promise<Session> => {
      const options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
        "ConnectTimeout=10",
      ];
      const child = from.host.exec([
        ...["timeout", `${seconds}`, "ssh", "-F", "none", ...options.flatMap((option) => ["-o", option])],
        ...[`${user}@${to.ip4}`, "echo", "here is $(id -un)"],
      ]);
      let err = "";
      const reading = (async () => {
        const decoder = new TextDecoder();
        for await (const chunk of child.stderr as unknown as AsyncIterable<Uint8Array>) {
          err += decoder.decode(chunk);
          then?.(err);
        }
      })();
      const out = await new Response(child.stdout).text();
      await reading;
      return { code: await child.exited, out: out.trim(), err };
    };
    const inside = (user: string) => ({ code: 0, out: `here is ${user}` });
    /** A policy takes a moment to reach the target. */
    const comesIn = (from: Member, to: Member, user = "root") =>
      until(`${from.name} gets into ${to.name} as ${user}`, async () => {
        const session = await open(from, to, user);
        if (session.code !== 0) throw new Error(session.err);
        expect(session).toMatchObject(inside(user));
        return true;
      });
    const isRefused = (from: Member, to: Member, user = "root") =>
      until(`${from.name} is refused at ${to.name} as ${user}`, async () => {
        const { code, err } = await open(from, to, user);
        if (code === 0 || !err.includes(REFUSED)) throw new Error(`${code} ${err}`);
        return true;
      });
    /** A session that waits: the id of its login, and how it ends. */
    const waiting = async (from: Member, to: Member, seconds = 90): Promise<{ id: string; end: Promise<Session> }> => {
      const { promise, resolve } = Promise.withResolvers<string>();
      const end = open(
        from,
        to,
        "root",
        (text) => {
          const [id] = /hskey-authreq-[0-9a-f]{24}(?=\s)/.exec(text) ?? [];
          if (id) resolve(id);
        },
        seconds,
      );
      const id = await Promise.race([promise, end.then(({ code, err }) => `${code} ${err}`)]);
      if (!id.startsWith("hskey-")) throw new Error(`the session did not wait: ${id}`);
      return { id, end };
    };

    beforeAll(async () => {
      lab = await Lab.create("ssh");
      const boxHost = await lab.host("box");
      const tls = await certificate(dir.path, boxHost.ip4);
      const env = { SSL_CERT_FILE: tls.ca };
      box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy-mode", "database", ...OPERATORS] });
      await set({});
      const key = async (...args: string[]) =>
        secrets.addKey(
          `pre-auth key ${args}`,
          (await box.admin<{ key: string }>("preauthkeys", "create", "--reusable", ...args)).key,
        );
      const user = async (name: string, ...args: string[]) =>
        `${(await box.admin<{ id: string }>("users", "create", name, ...args)).id}`;
      const alice = await key("--user", await user("alice", "-e", "nobody@example.com"));
      const bob = await key("--user", await user("bob", "-e", "bob@example.com"));
      const tagged = await key("--tags", "tag:server");
      const members: [Member, string][] = [];
      for (const [name, authKey] of Object.entries({ laptop: alice, desktop: alice, phone: bob, server: tagged }))
        members.push([new Tailscaled(await lab.host(name), join(dir.path, name), "1.102.5", env), authKey]);
      await Promise.all(
        members.map(async ([member, authKey]) => {
          await member.up(box.url, authKey);
          const result = await member.host.run(member.cli("set", "--ssh", "--accept-risk=all"));
          if (result.code !== 0) throw new Error(result.stderr);
        }),
      );
      [laptop, desktop, phone, server] = members.map(([member]) => member) as [Member, Member, Member, Member];
    }, 300_000);

    afterAll(async () => {
      await Promise.all([laptop, desktop, phone, server].map((member) => member?.stop()));
      await box?.stop();
      await lab?.close();
      dir[Symbol.dispose]();
    }, 300_000);

    test("SSHNoSSHConfigured: without rules nobody gets in", async () => {
      await isRefused(laptop, server);
      await isRefused(laptop, desktop);
    }, 300_000);

    test("SSHOneUserToAll: alice gets into every machine of hers and the tagged one, bob into none", async () => {
      await set({
        ssh: [{ action: "accept", src: ["alice@"], dst: ["tag:server", "autogroup:self"], users: ["root"] }],
      });
      await comesIn(laptop, server);
      await comesIn(laptop, desktop);
      expect(await open(laptop, server, "nobody")).toMatchObject({ err: expect.stringContaining(REFUSED) });
      await isRefused(phone, server);
      await isRefused(laptop, phone);
      const { code, stdout } = await laptop.host.run(laptop.cli("ssh", "root@server", "echo", "by tailscale"));
      expect({ code, stdout }).toEqual({ code: 0, stdout: "by tailscale\n" });
    }, 300_000);

    test("SSHMultipleUsersAllToAll: members get into tagged machines, as whom the rule says", async () => {
      await set({ ssh: [{ action: "accept", src: ["autogroup:member"], dst: ["tag:server"], users: all }] });
      await comesIn(phone, server);
      await comesIn(laptop, server);
      await isRefused(server, laptop);
    }, 300_000);

    test("SSHUserOnlyIsolation, SSHAutogroupSelf: one's own machines and nobody else's", async () => {
      await set({ ssh: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self"], users: ["root"] }] });
      await comesIn(laptop, desktop);
      await isRefused(laptop, phone);
      await isRefused(phone, desktop);
      await isRefused(phone, server);
    }, 300_000);

    test("SSHIsBlockedInACL: an SSH rule opens no port", async () => {
      await set({
        acls: [{ action: "accept", src: ["alice@"], dst: ["tag:server:80"] }],
        ssh: [{ action: "accept", src: ["alice@"], dst: ["tag:server"], users: ["root"] }],
      });
      await until("the packet filter is in force", async () =>
        (await open(laptop, server, "root")).err.includes("timed out"),
      );
    }, 300_000);

    test("SSHLocalpart: a user gets in under the local part of the mail address", async () => {
      await set({
        ssh: [{ action: "accept", src: ["autogroup:member"], dst: ["tag:server"], users: ["localpart:*@example.com"] }],
      });
      await isRefused(laptop, server, "root");
      await isRefused(phone, server, "nobody");
      // The login itself ends at once: the account has no shell. It was let in, though.
      await until(
        "laptop is let in as nobody",
        async () => !(await open(laptop, server, "nobody")).err.includes(REFUSED),
      );
    }, 300_000);

    const check = (more: object = {}) =>
      set({ ssh: [{ action: "check", src: ["autogroup:member"], dst: ["tag:server"], users: ["root"], ...more }] });

    test("SSHCheckModeCLI, SSHCheckModeCheckPeriodCLI: a session waits for approval, the next ones need none, also after a restart of the server", async () => {
      await check();
      const { id, end } = await until("a session waits", () => waiting(laptop, server));
      await box.admin("auth", "approve", "--auth-id", id);
      expect(await end).toMatchObject(inside("root"));
      await box.stop();
      await box.start();
      await comesIn(laptop, server);
      // Somebody else's session waits all the same.
      const other = await until("another session waits", () => waiting(phone, server));
      await box.admin("auth", "reject", "--auth-id", other.id);
      expect((await other.end).code).not.toBe(0);
    }, 300_000);

    test("SSHCheckModeCheckPeriodCLI, SSHCheckModeUnapprovedTimeout: an approval ends with its period; a session that nobody approves in time is refused", async () => {
      const config = join(dir.path, "short.yaml");
      writeFileSync(config, "tuning: { register_cache_expiration: 12s }\n");
      await box.stop();
      await box.start("--config", config);
      const rule = { action: "check", dst: ["tag:server"], users: ["root"] };
      await set({
        ssh: [
          { ...rule, src: ["bob@"], checkPeriod: "15s" },
          { ...rule, src: ["alice@"], checkPeriod: "1h" },
        ],
      });
      const one = await until("a session waits", () => waiting(phone, server));
      await box.admin("auth", "approve", "--auth-id", one.id);
      expect(await one.end).toMatchObject(inside("root"));
      expect(await open(phone, server, "root")).toMatchObject(inside("root"));
      // Meanwhile another one is left alone.
      const { id, end } = await until("a session waits", () => waiting(laptop, server));
      expect(await end).toMatchObject({ out: "", err: expect.stringContaining("nobody has approved") });
      await expect(box.admin("auth", "approve", "--auth-id", id)).rejects.toThrow("has expired");
      const two = await until("the period is over", () => waiting(phone, server));
      await box.admin("auth", "reject", "--auth-id", two.id);
      expect((await two.end).code).not.toBe(0);
      await box.stop();
      await box.start();
    }, 300_000);

    test("a policy that changes while a session waits: without a rule for it the session ends, under another rule it goes on when it is approved", async () => {
      await check();
      const one = await until("a session waits", () => waiting(laptop, server));
      await set({});
      expect(await one.end).toMatchObject({ out: "", err: expect.stringContaining("the policy does not allow") });
      await expect(box.admin("auth", "approve", "--auth-id", one.id)).rejects.toThrow("has been refused already");
      await check({ checkPeriod: "1h" });
      const two = await until("a session waits", () => waiting(laptop, server));
      await check({ checkPeriod: "2h" });
      await box.admin("auth", "approve", "--auth-id", two.id);
      expect(await two.end).toMatchObject(inside("root"));
      // By the rule that was in force when it was approved.
      await comesIn(laptop, server);
    }, 300_000);

    test("SSHCheckModeNegativeCLI: a session that is refused ends, and the next one waits again", async () => {
      await check({ checkPeriod: "always" });
      const one = await until("a session waits", () => waiting(laptop, server));
      await box.admin("auth", "reject", "--auth-id", one.id);
      const { code, err } = await one.end;
      expect(code).not.toBe(0);
      expect(err).toContain("an administrator has refused");
      const two = await until("the next session waits", () => waiting(laptop, server));
      await box.admin("auth", "approve", "--auth-id", two.id);
      expect(await two.end).toMatchObject(inside("root"));
      const three = await until("the next session waits", () => waiting(laptop, server));
      await box.admin("auth", "reject", "--auth-id", three.id);
      await three.end;
    }, 300_000);

    test("SSHCheckModeSessionLossReDelegates: a session that waits outlives a restart of the server", async () => {
      await check();
      const { id, end } = await until("a session waits", () => waiting(laptop, server));
      await box.stop("SIGKILL");
      await box.start();
      await box.admin("auth", "approve", "--auth-id", id);
      expect(await end).toMatchObject(inside("root"));
    }, 300_000);

    test("no secret of all this is in the box's log, in its metrics or on its operators' pages", async () => {
      secrets.addPrivateKeys("box", box.data);
      for (const member of [laptop, desktop, phone, server]) secrets.addPrivateKeys(member.name, member.dir);
      const shown = await shownBy(box);
      expect(secrets.foundIn(shown)).toEqual([]);
      expect(shown.log).toContain("GET /machine/ssh/action/");
    }, 300_000);
  },
);
