import { afterAll, afterEach, beforeEach, expect, type Mock, spyOn, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { makeSettings, TestServer } from "../control/testing.ts";
import { main } from "./policy.ts";

const folder = mkdtempSync(join(tmpdir(), "weft-policy-cli-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let stdout: Mock<typeof process.stdout.write>;
let stderr: Mock<typeof console.error>;
beforeEach(() => {
  stdout = spyOn(process.stdout, "write").mockImplementation(() => true);
  stderr = spyOn(console, "error").mockImplementation(() => {});
});
afterEach(() => {
  stdout.mockRestore();
  stderr.mockRestore();
});

/** What a command prints; throws what it throws. */
async function weft(...argv: string[]): Promise<{ status: number; out: string; err: string }> {
  stdout.mockClear();
  stderr.mockClear();
  const status = await main(["policy", ...argv]);
  return { status, out: stdout.mock.calls.map(([text]) => text).join(""), err: stderr.mock.calls.flat().join("\n") };
}

function file(text: string): string {
  const path = join(folder, "policy.hujson");
  writeFileSync(path, text);
  return path;
}

const POLICY = `// who may do what
{
  "tagOwners": { "tag:server": [] },
  "acls": [
    { "action": "accept", "src": ["alice@"], "dst": ["tag:server:22"] }, // shells
  ],
}
`;

test("what a policy says of itself does not drive the terminal of who asks about it", async () => {
  await using server = await start();
  const data = ["--data", server.dataDir];
  const hostile = POLICY.replace("// shells", "// \u001b[2J\u202eshells");
  await server.control.policies.set(hostile, { by: "\u001b]0;x\u0007" });
  const why = await weft("why", "alice@", "tag:server:22", ...data);
  expect(why.out).toContain("// ?[2J?shells");
  expect((await weft("history", ...data)).out).not.toContain("\u001b");
  // A file gets what is there.
  expect((await weft("get", ...data)).out).toBe(hostile);
});

/** Alice has a laptop, bob a phone; a tagged server. */
async function start(): Promise<TestServer> {
  const server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  for (const [user, host] of [
    ["alice", "laptop"],
    ["bob", "phone"],
  ] as const)
    await server.join(host, await server.key({ user: await server.user(user) }));
  await server.control.policies.set('{"tagOwners": {"tag:server": []}}', { by: "test" });
  await server.join("server", await server.key({ aclTags: ["tag:server"] }));
  return server;
}

test("a policy is set and got byte for byte, its versions are listed, and a wrong one is shown with its place", async () => {
  await using server = await start();
  const data = ["--data", server.dataDir];
  expect(await weft("set", "-f", file(POLICY), ...data)).toEqual({ status: 0, out: "Policy updated.\n", err: "" });
  expect((await weft("get", ...data)).out).toBe(POLICY);
  expect(JSON.parse((await weft("get", "-o", "json", ...data)).out)).toMatchObject({ policy: POLICY });
  const history = (await weft("history", ...data)).out.split("\n");
  expect(history).toHaveLength(4);
  expect(history[1]).toMatch(/^2 .* \d+$/);
  const path = file('{\n  "acls": [{ "action": "accept", "src": ["nobody"], "dst": ["*:*"] }],\n}');
  for (const verb of ["check", "set", "try"]) {
    expect(await weft(verb, "-f", path, ...data)).toEqual({
      status: 1,
      out: "",
      err: `${path}:2:42: src=host not found: "nobody"\n    "acls": [{ "action": "accept", "src": ["nobody"], "dst": ["*:*"] }],`,
    });
  }
  const failing = file('{"acls": [], "tests": [{"src": "alice@", "accept": ["alice@:22"]}]}');
  expect((await weft("set", "-f", failing, ...data)).err).toBe(
    `${failing}: test(s) failed\n  alice@: address "alice@:22": want: Accept, got: Drop`,
  );
  const failingSSH = file(
    '{"acls": [], "ssh": [], "sshTests": [{"src": "alice@", "dst": ["alice@"], "accept": ["root"]}]}',
  );
  const refused = await weft("set", "-f", failingSSH, ...data);
  expect([refused.status, refused.err]).toEqual([1, expect.stringContaining("test(s) failed")]);
  expect((await weft("get", ...data)).out).toBe(POLICY);
});

test("why names the rule with its line, or what came nearest", async () => {
  await using server = await start();
  const data = ["--data", server.dataDir];
  await weft("set", "-f", file(POLICY), ...data);
  const rule = '{ "action": "accept", "src": ["alice@"], "dst": ["tag:server:22"] }, // shells';
  expect((await weft("why", "laptop", "server:22", ...data)).out).toBe(
    `laptop may reach server:22 by tcp\n\nacls[0], line 5:\n    ${rule}\n    laptop (100.64.0.1) -> server (100.64.0.3)\n`,
  );
  expect((await weft("why", "phone", "server:22", ...data)).out).toBe(
    "phone may not reach server:22 by tcp\n\nFor phone (100.64.0.2) -> server (100.64.0.3), these came nearest:\n" +
      `  acls[0], line 5: its src does not hold phone (100.64.0.2)\n    ${rule}\n`,
  );
  expect((await weft("why", "autogroup:member", "tag:server:22", ...data)).out).toStartWith(
    "autogroup:member may reach tag:server:22 by tcp (1 of 2 pairs)\n",
  );
  expect(JSON.parse((await weft("why", "laptop", "server:80", "-o", "json", ...data)).out)).toMatchObject({
    verdict: "denied",
    nearest: [{ rule: { index: 0 }, misses: ["its ports are 22"] }],
  });
  await expect(weft("why", "laptop", "ghost:22", ...data)).rejects.toThrow('"ghost" is no address, node, user');
  await expect(weft("why", "laptop", ...data)).rejects.toThrow("which connection?");
});

test("try shows what a policy would change, and changes nothing", async () => {
  await using server = await start();
  const data = ["--data", server.dataDir];
  await weft("set", "-f", file(POLICY), ...data);
  const next = POLICY.replace("alice@", "bob@");
  expect((await weft("try", "-f", file(next), ...data)).out).toBe(
    [
      "laptop -> server",
      "  - icmp",
      "  - tcp, udp 22",
      "phone -> server",
      "  + icmp",
      "  + tcp, udp 22",
      "",
      "Pairs of nodes that see each other: 1 before, 1 after.",
      "",
    ].join("\n"),
  );
  expect((await weft("try", "-f", file(`${POLICY}// the same`), ...data)).out).toBe(
    "It would change nothing for the 3 nodes.\n",
  );
  expect((await weft("get", ...data)).out).toBe(POLICY);
});

test("past a server that does not run, the database itself is read, asked and set", async () => {
  await using server = await start();
  const data = ["--data", server.dataDir];
  const bypass = [...data, "--bypass-server-and-access-database-directly"];
  await weft("set", "-f", file(POLICY), ...data);
  await expect(weft("get", ...bypass)).rejects.toThrow(/in use|locked|another/);
  await server.control.close();
  await expect(weft("get", ...data)).rejects.toThrow("no control server answers");
  expect((await weft("get", ...bypass)).out).toBe(POLICY);
  expect((await weft("check", "-f", file("{}"), ...bypass)).out).toContain("the policy is fine\n");
  expect((await weft("why", "laptop", "server:22", ...bypass)).out).toStartWith("laptop may reach server:22 by tcp\n");
  expect((await weft("try", "-f", file('{"acls": []}'), ...bypass)).out).toContain("  - tcp, udp 22\n");
  expect((await weft("set", "-f", file('{"acls": 1}'), ...bypass)).status).toBe(1);
  expect((await weft("set", "-f", file("{} // new"), ...bypass)).out).toBe("Policy updated.\n");
  const again = await TestServer.start({
    settings: makeSettings({ policy: { mode: "database", path: "" } }),
    dataDir: server.dataDir,
  });
  expect(again.control.policies.current()).toMatchObject({ version: 3, text: "{} // new" });
  await again.stop();
});

test("without a server, check knows the users that the policy names, and says so", async () => {
  const none = ["--data", join(folder, "none")];
  const acls = '"acls": [{"action": "accept", "src": ["alice@"], "dst": ["bob@:22"]}]';
  const good = file(`{${acls}, "tests": [{"src": "alice@", "accept": ["bob@:22"]}]}`);
  expect(await weft("check", "-f", good, ...none)).toEqual({
    status: 0,
    out: `${good}: the policy is fine (checked without a server: its users are those that it names)\n`,
    err: "",
  });
  const bad = file(`{${acls}, "tests": [{"src": "bob@", "accept": ["alice@:22"]}]}`);
  expect(await weft("check", "-f", bad, ...none)).toEqual({
    status: 1,
    out: "",
    err: `${bad}: test(s) failed\n  bob@: address "alice@:22": want: Accept, got: Drop`,
  });
  await expect(weft("check")).rejects.toThrow("which policy? Give --file FILE");
  await expect(weft("chekc")).rejects.toThrow('did you mean "policy check"?');
  await expect(weft()).rejects.toThrow("policy needs one of");
  await expect(weft("get", "x")).rejects.toThrow('does not know what "x" means');
});
