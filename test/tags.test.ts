// Tags as official clients meet them: by key, by login, by an administrator. Scenarios of spec/headscale-features.md, section
// 22.10, by their names; every rule of theirs in more detail: src/control/tags.test.ts.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { Lab } from "../lab/network.ts";
import type { ApiNode } from "../src/control/api/shapes.ts";
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

const POLICY = JSON.stringify({
  tagOwners: { "tag:owned": ["alice@"], "tag:second": ["alice@"], "tag:unowned": ["bob@"] },
  acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }],
});
const REFUSED = /requested tags \[tag:\w+\] are invalid or not permitted/;

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("tags of official clients", () => {
  const dir = tempDir("tags");
  let lab: Lab;
  let box: Box;
  let byKey: Member;
  let byLogin: Member;
  /** What the client program itself trusts, in its environment. */
  let trust = "";

  const nodes = () => box.admin<ApiNode[]>("nodes", "list");
  const nodeOf = async (member: Member): Promise<ApiNode> => {
    const ips = (await member.status())?.TailscaleIPs ?? [];
    const found = (await nodes()).find(({ ipAddresses }) => ipAddresses.some((ip) => ips.includes(ip)));
    if (!found) throw new Error(`no node has an address of ${member.name}`);
    return found;
  };
  /** On the server, and as the client sees itself. */
  const tagsAre = (member: Member, ...tags: string[]) =>
    until(`the tags of ${member.name} are ${tags.join() || "none"}`, async () => {
      const self = (await member.status())!.Self as unknown as { Tags?: string[] };
      const seen = [(await nodeOf(member)).tags, self.Tags ?? []].map((each) => each.join());
      if (seen.some((each) => each !== tags.join())) throw new Error(`now ${seen.join(" and ")}`);
      return true;
    });
  const setTags = async (member: Member, ...tags: string[]) =>
    box.admin("nodes", "tag", "-i", (await nodeOf(member)).id, "-t", tags.join());
  const keyOf = async (user: string | null, ...tags: string[]): Promise<string> => {
    const owner = user === null ? [] : ["--user", user];
    const tagged = tags.length === 0 ? [] : ["--tags", tags.join()];
    return (await box.admin<{ key: string }>("preauthkeys", "create", "--reusable", ...owner, ...tagged)).key;
  };
  const command = (member: Member, ...flags: string[]) =>
    member.cli(
      "up",
      `--login-server=${box.url}`,
      `--hostname=${member.name}`,
      "--accept-dns=false",
      "--reset",
      "--timeout=50s",
      ...flags,
    );
  const advertise = (tags: string[]) => `--advertise-tags=${tags.join()}`;
  /** `tailscale up`, and what it says when that is no success. */
  const up = async (member: Member, ...flags: string[]): Promise<string> => {
    const { code, stdout, stderr } = await member.host.run(["env", trust, ...command(member, ...flags)]);
    return code === 0 ? "" : `${stderr}${stdout}`;
  };
  /** A client that is up asks for other tags: it has nothing against that. */
  const ask = async (member: Member, ...tags: string[]): Promise<void> => {
    expect(await up(member, advertise(tags))).toBe("");
    const { stdout } = await member.host.run(member.cli("debug", "prefs"));
    expect((JSON.parse(stdout) as { AdvertiseTags: string[] | null }).AdvertiseTags ?? []).toEqual(tags);
  };
  /** The machine is as one that never was here. */
  const forget = async (member: Member): Promise<void> => {
    const known = (await member.status())?.TailscaleIPs?.length ? await nodeOf(member).catch(() => null) : null;
    await member.host.run(member.cli("logout"));
    await until("it is logged out", async () => (await member.status())?.BackendState === "NeedsLogin");
    if (known) await box.admin("nodes", "delete", "-i", known.id, "--force");
  };
  /** `tailscale up` without a key; an administrator lets it in as alice's. What the administrator is told when that fails. */
  const login = async (member: Member, ...flags: string[]): Promise<string> => {
    const child = new Daemon(member.host, command(member, ...flags));
    const id = await until(`${member.name} is told where to sign in`, async () => {
      await stillRuns("up", child);
      return /\/register\/(hskey-authreq-[0-9a-f]{24})/.exec(child.output())?.[1];
    });
    const refusal = await box.admin("auth", "register", "--auth-id", id, "--user", "alice").then(
      () => "",
      (error: Error) => error.message,
    );
    if (refusal) child.kill();
    const code = await child.exited;
    if (refusal) await member.restart();
    else expect([code, child.output()]).toEqual([0, expect.any(String)]);
    return refusal;
  };

  beforeAll(async () => {
    lab = await Lab.create("tags");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    trust = `SSL_CERT_FILE=${tls.ca}`;
    const policy = join(dir.path, "policy.hujson");
    writeFileSync(policy, POLICY);
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy", policy] });
    for (const name of ["alice", "bob"]) await box.admin("users", "create", name);
    byKey = new Tailscaled(await lab.host("bykey"), join(dir.path, "bykey"), "1.102.5", env);
    byLogin = new Tailscaled(await lab.host("bylogin"), join(dir.path, "bylogin"), "1.80.3", env);
    await Promise.all([byKey.start(), byLogin.start()]);
  }, 300_000);

  afterAll(async () => {
    await Promise.all([byKey?.stop(), byLogin?.stop()]);
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("AuthKeyWith{Tag, outTag}Request{DifferentTag, NonExistentTag, UnownedTag}, AuthKeyWithoutTagCannotRequestTags, AuthKeyWithoutUserRejectsAdvertisedTags: a key gives its own tags and no others", async () => {
    for (const key of [await keyOf("alice", "tag:owned"), await keyOf("alice"), await keyOf(null, "tag:owned")]) {
      for (const tag of ["tag:second", "tag:missing", "tag:unowned"])
        expect(await up(byKey, `--auth-key=${key}`, advertise([tag]))).toMatch(REFUSED);
    }
    expect(await nodes()).toEqual([]);
    await byKey.restart();
  }, 300_000);

  test("an OAuth client in place of a pre-auth key: the official client gets itself a key for the tags of the client, no others", async () => {
    const made = await box.admin<{ key: string }>("oauth-clients", "create", "-s", "auth_keys", "-t", "tag:owned");
    const secret = (attributes: string) =>
      `--auth-key=${made.key.replace(/^hs/, "ts")}?baseURL=${encodeURIComponent(box.url)}${attributes}`;
    expect(await up(byKey, secret(""), advertise(["tag:unowned"]))).toMatch(/tag:unowned/);
    expect(await up(byKey, secret("&ephemeral=false"), advertise(["tag:owned"]))).toBe("");
    await tagsAre(byKey, "tag:owned");
    expect(await nodeOf(byKey)).toMatchObject({ ephemeral: false, preAuthKey: { used: true, reusable: false } });
    await forget(byKey);
  }, 300_000);

  test("AuthKeyWithTag{NoAdvertiseFlag, CannotAddViaCLI, CannotChangeViaCLI, AdminOverrideReauthPreserves, CLICannotModifyAdminTags}", async () => {
    const key = await keyOf("alice", "tag:owned");
    expect(await up(byKey, `--auth-key=${key}`)).toBe("");
    await tagsAre(byKey, "tag:owned");
    for (const tags of [["tag:owned", "tag:second"], ["tag:second"]]) {
      await ask(byKey, ...tags);
      await tagsAre(byKey, "tag:owned");
    }
    await setTags(byKey, "tag:unowned");
    await tagsAre(byKey, "tag:unowned");
    const { id } = await nodeOf(byKey);
    expect(await up(byKey, `--auth-key=${key}`, "--force-reauth")).toBe("");
    await tagsAre(byKey, "tag:unowned");
    await ask(byKey, "tag:owned");
    await tagsAre(byKey, "tag:unowned");
    expect((await nodeOf(byKey)).id).toBe(id);
  }, 300_000);

  test("AuthKeyWithoutTag{RegisterNoTags, CannotAddViaCLI, CLINoOpAfterAdminWithReset, CLINoOpAfterAdminWithEmptyAdvertise, CLICannotReduceAdminMultiTag}", async () => {
    await forget(byKey);
    const key = await keyOf("alice");
    expect(await up(byKey, `--auth-key=${key}`)).toBe("");
    await tagsAre(byKey);
    await ask(byKey, "tag:owned");
    await tagsAre(byKey);
    await setTags(byKey, "tag:owned", "tag:second");
    await tagsAre(byKey, "tag:owned", "tag:second");
    expect(await up(byKey)).toBe("");
    await tagsAre(byKey, "tag:owned", "tag:second");
    for (const tags of [[], ["tag:owned"]]) {
      await ask(byKey, ...tags);
      await tagsAre(byKey, "tag:owned", "tag:second");
    }
  }, 300_000);

  test("AuthKeyWithoutUserInheritsTags, AuthKeyConvertToUserViaCLIRegister (#3038)", async () => {
    await forget(byKey);
    expect(await up(byKey, `--auth-key=${await keyOf(null, "tag:owned")}`)).toBe("");
    await tagsAre(byKey, "tag:owned");
    const { id, user } = await nodeOf(byKey);
    expect(user.name).toBe("tagged-devices");
    expect(await login(byKey, "--force-reauth", advertise([]))).toBe("");
    await tagsAre(byKey);
    expect(await nodeOf(byKey)).toMatchObject({ id, user: { name: "alice" } });
  }, 300_000);

  test("UserLogin{NonExistentTag, UnownedTag, OwnedTag}AtRegistration: who does not own the tag is refused", async () => {
    for (const tag of ["tag:missing", "tag:unowned"])
      expect(await login(byLogin, advertise([tag]), "--force-reauth")).toMatch(REFUSED);
    expect(await login(byLogin, advertise(["tag:owned"]), "--force-reauth")).toBe("");
    await tagsAre(byLogin, "tag:owned");
  }, 300_000);

  test("UserLogin{AddTagViaCLIReauth, RemoveTagViaCLIReauth, ReauthWithEmptyTagsRemovesAllTags (#2979)}: a new login sets the tags that it asks for", async () => {
    const { id } = await nodeOf(byLogin);
    for (const tags of [["tag:owned", "tag:second"], ["tag:second"], []]) {
      expect(await login(byLogin, advertise(tags), "--force-reauth")).toBe("");
      await tagsAre(byLogin, ...tags);
    }
    expect(await nodeOf(byLogin)).toMatchObject({ id, user: { name: "alice" } });
  }, 300_000);

  test("UserLogin{CLINoOpAfterAdminAssignment, CLICannotRemoveAdminTags}: without a new login nothing changes", async () => {
    await setTags(byLogin, "tag:second");
    await tagsAre(byLogin, "tag:second");
    for (const tags of [["tag:owned"], []]) {
      await ask(byLogin, ...tags);
      await tagsAre(byLogin, "tag:second");
    }
  }, 300_000);

  test("AdminAPI{CannotSetNonExistentTag, CanSetUnownedTag, CannotRemoveAllTags, CannotSetInvalidFormat}, Issue2978ReproTagReplacement: the client and its peer see each replacement", async () => {
    await expect(setTags(byLogin, "tag:missing")).rejects.toThrow(REFUSED);
    await setTags(byLogin, "tag:unowned");
    await tagsAre(byLogin, "tag:unowned");
    await expect(setTags(byLogin)).rejects.toThrow();
    await expect(setTags(byLogin, "owned")).rejects.toThrow("is not a tag");
    for (const tags of [["tag:owned"], ["tag:second"], ["tag:owned", "tag:second"]]) {
      await setTags(byLogin, ...tags);
      await tagsAre(byLogin, ...tags);
      await byLogin.running();
      await until("the peer sees it", async () => {
        const peer = (await byKey.peer(byLogin)) as unknown as { Tags?: string[] } | null;
        return peer?.Tags?.join() === tags.join();
      });
    }
  }, 300_000);
});
