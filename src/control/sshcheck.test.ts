// SSH between nodes: what the rules let in, and check mode over the real protocol. Scenarios of spec/headscale-features.md,
// section 22.9, by their names.
import { expect, test } from "bun:test";
import { rmSync } from "node:fs";
import type { SSHAction } from "./policy/index.ts";
import { makeSettings, type TestNode, TestServer, until } from "./testing.ts";

const SETTINGS = makeSettings({ policy: { mode: "database", path: "" } });
const HOUR = 3_600_000;
const members = ["alice", "bob"];
const open = { acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }], tagOwners: { "tag:server": [] } };
const check = (more: object = {}) => ({
  ...open,
  ssh: [
    {
      action: "check",
      src: ["autogroup:member"],
      dst: ["autogroup:self", "tag:server"],
      users: ["root", "autogroup:nonroot"],
      ...more,
    },
  ],
});

/** Alice has a laptop (1) and a desktop (2), bob a phone (3); server (4) is tagged. */
class Home implements AsyncDisposable {
  now = 1_700_000_000_000;
  nodes: TestNode[] = [];
  server!: TestServer;

  static async start(policy: object): Promise<Home> {
    const home = new Home();
    home.server = await TestServer.start({ settings: SETTINGS, now: () => home.now });
    await home.set(policy);
    const keys = [];
    for (const name of members) {
      const user = await home.server.user(name);
      keys.push(
        await home.server.key({ user, reusable: true, expiration: new Date(home.now + 900 * HOUR).toISOString() }),
      );
    }
    const tagged = await home.server.key({
      aclTags: ["tag:server"],
      expiration: new Date(home.now + HOUR).toISOString(),
    });
    for (const [name, key] of [
      ["laptop", keys[0]!],
      ["desktop", keys[0]!],
      ["phone", keys[1]!],
      ["server", tagged],
    ] as const)
      home.nodes.push(await home.server.join(name, key));
    return home;
  }

  async set(policy: object): Promise<void> {
    await this.server.control.policies.set(JSON.stringify(policy), { by: "test" });
  }

  /** What a target is told to do with a session; `path` when it was told where to ask again. */
  async ask(
    from: number,
    to: number,
    user = "root",
    path = `https://unused/machine/ssh/action/${from}/to/${to}?local_user=${user}`,
  ) {
    const url = new URL(path);
    const { status, body } = await this.nodes[to - 1]!.client.request(
      { method: "GET", path: url.pathname + url.search },
      1 << 16,
      120_000,
    );
    const text = new TextDecoder().decode(body);
    return status === 200 ? (JSON.parse(text) as SSHAction) : { refused: `${status} ${text}` };
  }

  /** A session that waits: its id, and the answer to come. */
  async hold(from: number, to: number, user = "root") {
    const { id, next } = await this.begin(from, to, user);
    return { id, next, verdict: this.ask(from, to, user, next) };
  }

  /** A session of which the client has not asked again yet. */
  async begin(from: number, to: number, user = "root") {
    const held = (await this.ask(from, to, user)) as SSHAction;
    const [, id] = /http:\/\/control\.test\/auth\/(hskey-authreq-[0-9a-f]{24})\n/.exec(held.message ?? "")!;
    return { id: id!, next: held.holdAndDelegate! };
  }

  /** Ends the server and starts another on the same data. */
  async restart(): Promise<void> {
    for (const node of this.nodes) node.close();
    await this.server.stop();
    this.server = await TestServer.start({ settings: SETTINGS, now: () => this.now, dataDir: this.server.dataDir });
    this.nodes = this.nodes.map((node) => this.server.node(node.hostname, node.machinePrivate));
  }

  async approve(id: string, userId: number | null = null): Promise<void> {
    await this.server.control.logins.approve(id, userId);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const node of this.nodes) node.close();
    await this.server.stop();
    rmSync(this.server.dataDir, { recursive: true, force: true });
  }
}

const accepted = {
  accept: true,
  allowAgentForwarding: true,
  allowLocalPortForwarding: true,
  allowRemotePortForwarding: true,
};

test("a suspended user gets no session, old approvals or not, and approves none; they hold again when he is restored", async () => {
  await using home = await Home.start(check());
  const first = await home.hold(1, 4);
  await home.approve(first.id, 1);
  expect(await first.verdict).toEqual(accepted);
  const { id, verdict } = await home.hold(2, 4);
  await until(() => home.server.control.stats().streams > 0, "the session to wait");
  await home.server.admin("POST", "/user/1/suspend");
  expect(await home.ask(1, 4)).toMatchObject({ reject: true });
  await expect(home.approve(id, 1)).rejects.toThrow("the user alice is suspended");
  // An administrator's word for a session that waits is no way in either, before the user is restored.
  await home.approve(id);
  expect(await verdict).toMatchObject({ reject: true });
  await home.server.admin("POST", "/user/1/restore");
  expect(await home.ask(1, 4)).toEqual(accepted);
  expect(await home.ask(2, 4)).toEqual(accepted);
});

test("CheckModeCLI: a session waits with an address, goes on when it is approved, and the pair may come again", async () => {
  await using home = await Home.start(check());
  const { id, verdict } = await home.hold(1, 4);
  expect(home.server.control.logins.get(id)!.request).toEqual({
    kind: "ssh-check",
    sourceNodeId: 1,
    targetNodeId: 4,
    localUser: "root",
  });
  await home.approve(id);
  expect(await verdict).toEqual(accepted);
  expect(await home.ask(1, 4)).toEqual(accepted);
  // Of this pair, and of no other.
  for (const [from, to] of [
    [1, 2],
    [2, 4],
    [3, 4],
  ] as const)
    expect(await home.ask(from, to)).toHaveProperty("holdAndDelegate");
});

test("CheckModeNegativeCLI: a session that is refused does not go on, and the next one has to wait again", async () => {
  await using home = await Home.start(check());
  const { id, verdict } = await home.hold(1, 4);
  await home.server.control.logins.reject(id);
  expect(await verdict).toMatchObject({
    reject: true,
    message: expect.stringContaining("an administrator has refused"),
  });
  expect(await home.ask(1, 4)).toHaveProperty("holdAndDelegate");
});

test("CheckModeOIDC: who owns the source may approve, nobody else", async () => {
  await using home = await Home.start(check());
  const { id, verdict } = await home.hold(1, 4);
  await expect(home.approve(id, 2)).rejects.toThrow("which belongs to somebody else");
  await home.approve(id, 1);
  expect(await verdict).toEqual(accepted);
});

test("CheckModeUnapprovedTimeout: a session that nobody approves in time is refused", async () => {
  await using home = await Home.start(check());
  const { verdict } = await home.hold(1, 4);
  await until(() => home.server.control.stats().streams === 1, "the target to wait");
  // What the same connection asks next is answered later.
  await home.ask(3, 4);
  home.now += SETTINGS.login.expiry + 1000;
  await home.server.control.tick();
  expect(await verdict).toMatchObject({ reject: true, message: expect.stringContaining("in time") });
});

test("CheckModeCheckPeriodCLI: an approval counts for the period of the rule, also over a restart, and not longer", async () => {
  await using home = await Home.start(check({ checkPeriod: "2h" }));
  const { id, verdict } = await home.hold(1, 4);
  await home.approve(id);
  expect(await verdict).toEqual(accepted);
  home.now += HOUR;
  await home.restart();
  expect(await home.ask(1, 4)).toEqual(accepted);
  home.now += HOUR;
  expect(await home.ask(1, 4)).toHaveProperty("holdAndDelegate");
});

test("checkPeriod always: every session is asked for", async () => {
  await using home = await Home.start(check({ checkPeriod: "always" }));
  const { id, verdict } = await home.hold(1, 4);
  await home.approve(id);
  expect(await verdict).toEqual(accepted);
  expect(await home.ask(1, 4)).toHaveProperty("holdAndDelegate");
});

test("CheckModeAutoApprove: two sessions that wait for the same pair both go on, each with its own approval", async () => {
  await using home = await Home.start(check());
  const [one, two] = [await home.hold(1, 4), await home.hold(1, 4, "ubuntu")];
  expect(one.id).not.toBe(two.id);
  await home.approve(one.id);
  expect(await one.verdict).toEqual(accepted);
  // A third needs nobody, while the second still waits.
  expect(await home.ask(1, 4, "ubuntu")).toEqual(accepted);
  await home.server.control.logins.reject(two.id);
  expect(await two.verdict).toMatchObject({ reject: true });
});

test("CheckModeSessionLossReDelegates: a session that the server does not know any more is asked for anew; one that waits outlives a restart", async () => {
  await using home = await Home.start(check());
  const first = await home.hold(1, 4);
  first.verdict.catch(() => {});
  await home.restart();
  const again = home.ask(1, 4, "root", first.next);
  await home.approve(first.id);
  expect(await again).toEqual(accepted);
  await home.set(open);
  await home.set(check());
  const lost = first.next.replace(/auth_id=.*/, `auth_id=hskey-authreq-${"0".repeat(24)}`);
  const held = (await home.ask(1, 4, "root", lost)) as SSHAction;
  expect(held.holdAndDelegate).toContain("auth_id=hskey-authreq-");
  expect(held.holdAndDelegate).not.toBe(lost);
});

test("a policy that changes the rule asks anew, one that does not touch it does not, and what is not allowed any more is refused", async () => {
  await using home = await Home.start(check());
  const { id, verdict } = await home.hold(1, 4);
  await home.approve(id);
  expect(await verdict).toEqual(accepted);
  await home.set({ ...check(), hosts: { unrelated: "192.0.2.1" } });
  expect(await home.ask(1, 4)).toEqual(accepted);
  await home.set(check({ users: ["root"] }));
  const { id: second, verdict: secondVerdict } = await home.hold(1, 4);
  // What was once approved under the rule is forgotten, also when the rule comes back.
  await home.set(check());
  expect(await home.ask(1, 4)).toHaveProperty("holdAndDelegate");
  // One that waits is told.
  await home.set(open);
  expect(await secondVerdict).toMatchObject({ reject: true, message: expect.stringContaining("does not allow") });
  await expect(home.approve(second)).rejects.toThrow("has been refused already");
  expect(await home.ask(1, 4)).toMatchObject({ reject: true, message: expect.stringContaining("does not allow") });
  await home.set({ ...open, ssh: [{ ...check().ssh[0]!, action: "accept" }] });
  expect(await home.ask(1, 4)).toEqual(accepted);
});

test("only the target may ask, only of nodes that exist and that a rule names", async () => {
  await using home = await Home.start(check());
  const path = "https://unused/machine/ssh/action/1/to/4?local_user=root";
  expect(await home.ask(1, 3, "root", path)).toEqual({ refused: "404 node not found" });
  expect(await home.ask(1, 1, "root", path)).toEqual({ refused: "404 node not found" });
  expect(await home.ask(99, 4)).toMatchObject({ reject: true });
  expect(await home.ask(1, 4, "")).toMatchObject({ refused: expect.stringContaining("400") });
  expect(await home.ask(1, 4, "a".repeat(200))).toMatchObject({ refused: expect.stringContaining("400") });
  expect(await home.ask(4, 4)).toMatchObject({ reject: true, message: expect.stringContaining("does not allow") });
  // The session of another pair or login cannot be used.
  const { id, next, verdict } = await home.hold(1, 4);
  await home.approve(id);
  await verdict;
  for (const other of [next.replace("/1/to", "/3/to"), next.replace("local_user=root", "local_user=ubuntu")]) {
    const answer = (await home.ask(1, 4, "root", other)) as SSHAction;
    expect(answer.accept ? "accepted" : answer.holdAndDelegate).not.toBe("accepted");
  }
});

test("a node that leaves, or gets another owner, leaves no approval behind", async () => {
  await using home = await Home.start(check());
  const { id, verdict } = await home.hold(1, 4);
  await home.approve(id);
  await verdict;
  await home.server.admin("DELETE", "/node/1");
  await home.server.control.tick();
  const { Database } = await import("bun:sqlite");
  await home.server.stop();
  const database = new Database(`${home.server.dataDir}/weft.sqlite`);
  expect(database.query("SELECT count(*) AS n FROM documents WHERE kind = 'sshcheck'").get()).toEqual({ n: 0 });
  database.close();
});
