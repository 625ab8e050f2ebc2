// Every row of spec/headscale-features.md, section 22.10, by its name there; the users of the policy own tag:owned and
// tag:second, nobody here owns tag:unowned.
import { expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { loginIdOf } from "./login.ts";
import { type MapReader, makeSettings, type RegisterOptions, type TestNode, TestServer, until } from "./testing.ts";

const POLICY = JSON.stringify({
  tagOwners: {
    "tag:owned": ["alice@"],
    "tag:second": ["group:ops"],
    "tag:chained": ["tag:second"],
    "tag:unowned": ["bob@"],
    "tag:nobody": [],
  },
  groups: { "group:ops": ["alice@"] },
  grants: [{ src: ["*"], dst: ["*"], ip: ["*"] }],
});
const TAGGED = 2147455555;

class Tagging implements AsyncDisposable {
  private constructor(
    readonly server: TestServer,
    readonly alice: number,
    private readonly dir: string,
  ) {}

  static async start(policy = POLICY): Promise<Tagging> {
    const dir = mkdtempSync(join(tmpdir(), "weft-tags-"));
    const path = join(dir, "policy.hujson");
    writeFileSync(path, policy);
    const server = await TestServer.start({ settings: makeSettings({ policy: { mode: "file", path } }) });
    await server.user("bob");
    return new Tagging(server, await server.user("alice"), dir);
  }

  key(tags: string[], user: number | null = this.alice): Promise<string> {
    return this.server.key({ ...(user !== null && { user }), aclTags: tags, reusable: true });
  }

  /** By web login of alice, with whatever the client asks for. Null: refused at the login itself; else what the client hears. */
  async login(node: TestNode, options: RegisterOptions = {}, user = this.alice): Promise<string> {
    const url = (await node.register(options)).AuthURL!;
    const waiting = node.register({ ...options, followup: url });
    const done = this.server.control.logins.complete(loginIdOf(url)!, user, "cli");
    const refusal = await done.then(() => "").catch((error: Error) => error.message);
    expect((await waiting).Error).toBe(refusal);
    return refusal;
  }

  async setTags(id: number, tags: string[]): Promise<string> {
    return this.server.admin("POST", `/node/${id}/tags`, { tags }).then(
      () => "",
      (error: Error) => error.message,
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server[Symbol.asyncDispose]();
    rmSync(this.dir, { recursive: true, force: true });
  }
}

const tagsAre = (map: MapReader, tags: string[]) =>
  until(() => JSON.stringify(map.self?.Tags ?? []) === JSON.stringify(tags), `the tags ${tags}`);

/** As `tailscale up --force-reauth` does it: a new node key, with the old one named. */
function forceReauth(node: TestNode): RegisterOptions {
  return { oldNodeKey: node.rotate() };
}

for (const [name, tags] of [
  ["RequestDifferentTag", ["tag:second"]],
  ["RequestNonExistentTag", ["tag:missing"]],
  ["RequestUnownedTag", ["tag:unowned"]],
] as const) {
  test(`AuthKeyWithTag${name}, AuthKeyWithoutTag${name}: a key gives its own tags and no others`, async () => {
    await using t = await Tagging.start();
    for (const authKey of [await t.key(["tag:owned"]), await t.key([])]) {
      const { Error: problem } = await t.server.node("a").register({ authKey, tags: [...tags] });
      expect(problem).toContain(`requested tags [${tags[0]}] are invalid or not permitted`);
    }
    expect(t.server.control.stats().nodes).toBe(0);
  });
}

test("AuthKeyWithTagNoAdvertiseFlag: the tags of the key are inherited, asked for or not", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key(["tag:owned"]);
  for (const tags of [[], ["tag:owned"]]) {
    const node = t.server.node("a");
    expect(await node.register({ authKey, tags })).toMatchObject({ Error: "", User: { ID: TAGGED } });
    expect((await node.stream()).self).toMatchObject({ Tags: ["tag:owned"], User: TAGGED });
  }
});

test("AuthKeyWithTagCannotAddViaCLI, CannotChangeViaCLI: what a client asks for later changes nothing", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key(["tag:owned"]);
  const node = await t.server.join("a", authKey);
  const map = await node.stream();
  for (const tags of [["tag:owned", "tag:second"], ["tag:second"], []]) {
    expect(await node.register({ tags })).toMatchObject({ Error: "" });
    expect(await node.register({ tags, authKey })).toMatchObject({ Error: "" });
    await node.lite({ Hostinfo: { Hostname: "a", RequestTags: tags } });
    expect((await node.stream()).self?.Tags).toEqual(["tag:owned"]);
  }
  expect(map.messages.flatMap((message) => message.Node?.Tags ?? []).every((tag) => tag === "tag:owned")).toBe(true);
});

test("AuthKeyWithTagAdminOverrideReauthPreserves, CLICannotModifyAdminTags: an administrator's choice outlives a new login by the same key", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key(["tag:owned"]);
  const node = await t.server.join("a", authKey);
  expect(await t.setTags(1, ["tag:unowned"])).toBe("");
  // A container restarts with the key that it was made with; a person asks for a new login with it.
  expect(await node.register({ authKey })).toMatchObject({ Error: "" });
  expect(await node.register({ ...forceReauth(node), authKey })).toMatchObject({ Error: "" });
  expect((await node.stream()).self).toMatchObject({ ID: 1, Tags: ["tag:unowned"] });
  expect(await node.register({ tags: ["tag:owned"] })).toMatchObject({ Error: "" });
  expect((await node.stream()).self?.Tags).toEqual(["tag:unowned"]);
});

test("AuthKeyWithoutTag{CannotRequestTags, RegisterNoTags, CannotAddViaCLI}: the node is its user's", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key([]);
  expect((await t.server.node("x").register({ authKey, tags: ["tag:owned"] })).Error).toContain("not permitted");
  const node = await t.server.join("a", authKey);
  expect(await node.register({ tags: ["tag:owned"] })).toMatchObject({ Error: "", User: { ID: t.alice } });
  expect((await node.stream()).self).toMatchObject({ User: t.alice });
  expect((await node.stream()).self?.Tags).toBeUndefined();
});

test("AuthKeyWithoutTagCLINoOpAfterAdmin{WithReset, WithEmptyAdvertise}, CLICannotReduceAdminMultiTag", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key([]);
  const node = await t.server.join("a", authKey);
  expect(await t.setTags(1, ["tag:second", "tag:owned"])).toBe("");
  for (const tags of [[], ["tag:owned"]]) {
    expect(await node.register({ tags })).toMatchObject({ Error: "" });
    await node.lite({ Hostinfo: { Hostname: "a", RequestTags: tags } });
    expect((await node.stream()).self).toMatchObject({ Tags: ["tag:owned", "tag:second"], User: TAGGED });
  }
  // Nor does a new login by the key that the node was made with.
  expect(await node.register({ ...forceReauth(node), authKey })).toMatchObject({ Error: "" });
  expect((await node.stream()).self).toMatchObject({ ID: 1, Tags: ["tag:owned", "tag:second"] });
});

test("UserLoginOwnedTagAtRegistration: the policy gives the tag to the user, to her group, or to the owner of a tag that owns it", async () => {
  await using t = await Tagging.start();
  for (const tags of [["tag:owned"], ["tag:second"], ["tag:chained"], ["tag:owned", "tag:second"]]) {
    const node = t.server.node("a");
    expect(await t.login(node, { tags })).toBe("");
    const { self } = await node.stream();
    expect(self).toMatchObject({ Tags: tags, User: TAGGED });
    expect(self?.KeyExpiry).toBeUndefined();
  }
});

test("UserLogin{NonExistentTagAtRegistration, UnownedTagAtRegistration}: refused, and the client hears which", async () => {
  await using t = await Tagging.start();
  const cases: [string[], string][] = [
    [["tag:missing"], "[tag:missing]"],
    [["tag:unowned"], "[tag:unowned]"],
    [["tag:nobody"], "[tag:nobody]"],
    [["tag:owned", "tag:unowned"], "[tag:unowned]"],
    [["nonsense"], "[nonsense]"],
  ];
  for (const [tags, named] of cases)
    expect(await t.login(t.server.node("a"), { tags })).toStartWith(
      `requested tags ${named} are invalid or not permitted`,
    );
  expect(t.server.control.stats().nodes).toBe(0);
});

test("UserLogin{AddTagViaCLIReauth, RemoveTagViaCLIReauth}: a new login sets the tags that are asked for", async () => {
  await using t = await Tagging.start();
  const node = t.server.node("a");
  for (const tags of [[], ["tag:owned"], ["tag:owned", "tag:second"], ["tag:second"]]) {
    const reauth = t.server.control.stats().nodes === 0 ? {} : forceReauth(node);
    expect(await t.login(node, { ...reauth, tags })).toBe("");
    const { self } = await node.stream();
    expect([self?.ID, self?.Tags ?? []]).toEqual([1, tags]);
  }
});

test("UserLogin{CLINoOpAfterAdminAssignment, CLICannotRemoveAdminTags}: without a new login nothing changes", async () => {
  await using t = await Tagging.start();
  const node = t.server.node("a");
  expect(await t.login(node, { tags: ["tag:owned"] })).toBe("");
  expect(await t.setTags(1, ["tag:second"])).toBe("");
  for (const tags of [["tag:owned"], []]) {
    expect(await node.register({ tags })).toMatchObject({ Error: "", AuthURL: "" });
    expect((await node.stream()).self?.Tags).toEqual(["tag:second"]);
  }
});

test("UserLoginReauthWithEmptyTagsRemovesAllTags (#2979): the node is its user's again, same id and addresses", async () => {
  await using t = await Tagging.start();
  const node = t.server.node("a");
  expect(await t.login(node, { tags: ["tag:owned", "tag:second"] })).toBe("");
  const watcher = await t.server.join("watcher", await t.key([]));
  const map = await watcher.stream();
  expect(await t.login(node, { ...forceReauth(node), tags: [] })).toBe("");
  const { self } = await node.stream();
  expect(self).toMatchObject({ ID: 1, User: t.alice, Addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"] });
  expect(self?.Tags).toBeUndefined();
  await until(() => map.peer("a")?.User === t.alice && !map.peer("a")?.Tags, "the peer to hear of it");
  expect(map.profiles.get(t.alice)).toMatchObject({ LoginName: "alice" });
});

test("AdminAPI{CannotSetNonExistentTag, CanSetUnownedTag, CannotRemoveAllTags, CannotSetInvalidFormat}", async () => {
  await using t = await Tagging.start();
  await t.server.join("a", await t.key([]));
  expect(await t.setTags(1, ["tag:missing"])).toContain(
    "400 requested tags [tag:missing] are invalid or not permitted",
  );
  expect(await t.setTags(1, ["tag:nobody"])).toBe("");
  expect(await t.setTags(1, [])).toContain("400 the tags of a node cannot all be taken away");
  for (const wrong of ["web", "tag:", "tag:A B", "tag:Über"]) expect(await t.setTags(1, [wrong])).toStartWith("400 ");
  expect(await t.setTags(99, ["tag:owned"])).toStartWith("404 ");
  const [node] = (await t.server.admin<{ nodes: { tags: string[] }[] }>("GET", "/node")).nodes;
  expect(node?.tags).toEqual(["tag:nobody"]);
});

test("Issue2978ReproTagReplacement: the node itself and its peers see each replacement at once, expiry and owner with it", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key([]);
  const [a, b] = [await t.server.join("a", authKey), await t.server.join("b", authKey)];
  await a.register({ expiry: new Date(Date.now() + 3_600_000).toISOString() });
  const [mapA, mapB] = [await a.stream(), await b.stream()];
  expect(mapA.self?.KeyExpiry).toBeString();
  for (const tags of [["tag:owned"], ["tag:second"], ["tag:owned", "tag:second"], ["tag:unowned"]]) {
    expect(await t.setTags(1, tags)).toBe("");
    await tagsAre(mapA, tags);
    await until(() => mapB.peer("a")?.Tags?.join() === tags.join(), "the peer's view");
    expect(mapA.self).toMatchObject({ User: TAGGED });
    expect(mapA.self?.KeyExpiry).toBeUndefined();
    expect(mapA.self?.CapMap).toBeDefined();
  }
});

test("AuthKeyWithoutUser{InheritsTags, RejectsAdvertisedTags}: keys of tags alone", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key(["tag:owned"], null);
  expect((await t.server.node("x").register({ authKey, tags: ["tag:second"] })).Error).toContain("not permitted");
  const node = await t.server.join("a", authKey);
  expect((await node.stream()).self).toMatchObject({ Tags: ["tag:owned"], User: TAGGED });
});

test("AuthKeyConvertToUserViaCLIRegister (#3038): a node of a key of tags becomes a user's by a login on the machine", async () => {
  await using t = await Tagging.start();
  const node = await t.server.join("a", await t.key(["tag:owned"], null));
  expect(await t.login(node, { ...forceReauth(node), tags: [] })).toBe("");
  expect((await node.stream()).self).toMatchObject({ ID: 1, User: t.alice });
  expect((await node.stream()).self?.Tags).toBeUndefined();
});

test("a container restarts with the key of tags that it joined with, and stays what a person has made of it since", async () => {
  await using t = await Tagging.start();
  const authKey = await t.key(["tag:owned"], null);
  const node = await t.server.join("a", authKey);
  expect(await t.login(node, { ...forceReauth(node), tags: [] })).toBe("");
  expect(await node.register({ authKey })).toMatchObject({ Error: "", User: { ID: t.alice } });
  expect((await node.stream()).self?.Tags).toBeUndefined();
  // Another key is somebody's word of today, and so is the first one for a new node key.
  expect(await node.register({ authKey: await t.key(["tag:second"], null) })).toMatchObject({ User: { ID: TAGGED } });
  expect((await node.stream()).self?.Tags).toEqual(["tag:second"]);
  expect(await t.login(node, { ...forceReauth(node), tags: [] })).toBe("");
  node.rotate();
  expect(await node.register({ authKey })).toMatchObject({ Error: "", User: { ID: TAGGED } });
  expect((await node.stream()).self).toMatchObject({ ID: 1, Tags: ["tag:owned"] });
});

test("a login on a machine with a tagged node that lives on, under a key of another profile, makes a node of its own", async () => {
  await using t = await Tagging.start();
  const node = await t.server.join("a", await t.key(["tag:owned"]));
  node.rotate();
  expect(await t.login(node)).toBe("");
  expect((await node.stream()).self).toMatchObject({ ID: 2, User: t.alice });
  expect(t.server.control.stats().nodes).toBe(2);
});

test("where there is no policy, keys and administrators may use any tag, and users own none", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  await server.join("a", await server.key({ user: alice }));
  expect(await server.admin("POST", "/node/1/tags", { tags: ["tag:any"] })).toMatchObject({
    node: { tags: ["tag:any"] },
  });
  const node = server.node("b");
  const url = (await node.register({ tags: ["tag:any"] })).AuthURL!;
  expect(server.control.logins.complete(loginIdOf(url)!, alice, "cli")).rejects.toThrow("not permitted");
});
