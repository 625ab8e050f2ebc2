import { afterEach, beforeEach, expect, spyOn, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { makeSettings, TestServer } from "../control/testing.ts";
import { listen } from "../net/listener.ts";
import { adminMain, commandOf } from "./admin.ts";
import { UsageError } from "./flags.ts";

let server: TestServer;
beforeEach(async () => {
  server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
});
afterEach(() => server[Symbol.asyncDispose]());

/** What a command prints, as a person at the server sees it. */
async function local(...argv: string[]): Promise<string> {
  return run([...argv, "--socket", server.control.adminSocket]);
}

async function run(argv: string[]): Promise<string> {
  const printed: string[] = [];
  const log = spyOn(console, "log").mockImplementation((line: string) => void printed.push(line));
  try {
    expect(await adminMain(argv)).toBe(0);
  } finally {
    log.mockRestore();
  }
  return printed.join("\n");
}

async function json<T>(...argv: string[]): Promise<T> {
  return JSON.parse(await local("-o", "json", ...argv)) as T;
}

async function refusal(command: Promise<string>): Promise<{ status: number; message: string }> {
  const error = await command.then(
    () => new Error("it was done"),
    (refused: Error) => refused,
  );
  return { status: error instanceof UsageError ? 2 : 1, message: error.message };
}

test("users are made, renamed by id or name, and destroyed", async () => {
  await local("users", "create", "alice");
  expect(await json("users", "rename", "-i", "1", "-r", "bob")).toMatchObject({ id: "1", name: "bob" });
  expect(await local("user", "mv", "--name", "bob", "--new-name", "carol")).toBe("User renamed");
  expect(await refusal(local("users", "rename", "-n", "bob", "-r", "x2"))).toMatchObject({ status: 1 });
  expect(await refusal(local("users", "rename", "-i", "1"))).toMatchObject({ status: 2 });
  expect(await local("users", "delete", "carol", "--force")).toBe("User destroyed");
});

test("a node is tagged, gets routes, is shut out and let in", async () => {
  const key = await server.key({ user: await server.user("alice") });
  const node = await server.join("web", key);
  await node.lite({ Hostinfo: { Hostname: "web", OS: "linux", RoutableIPs: ["10.0.0.0/8", "192.168.1.0/24"] } });
  const approved = await json("nodes", "approve-routes", "-i", "1", "-r", "10.0.0.0/8,192.168.1.0/24");
  expect(approved).toMatchObject({ approvedRoutes: ["10.0.0.0/8", "192.168.1.0/24"] });
  expect(await local("nodes", "lsr")).toBe(
    [
      "ID | Hostname | Approved                   | Available                  | Serving (Primary)",
      "1  | web      | 10.0.0.0/8, 192.168.1.0/24 | 10.0.0.0/8, 192.168.1.0/24 | 10.0.0.0/8, 192.168.1.0/24",
    ].join("\n"),
  );
  expect(await json("node", "approve-routes", "-i", "1", "-r", "")).toMatchObject({ approvedRoutes: [] });
  expect(await refusal(local("nodes", "approve-routes", "-i", "1"))).toMatchObject({ status: 2 });
  expect(await refusal(local("nodes", "routes", "-i", "7"))).toMatchObject({ status: 1 });
  expect(await json("nodes", "authorize", "-i", "1", "--deny")).toMatchObject({ authorized: false });
  expect(await local("nodes", "approve", "1")).toBe("Node let in");
  expect(await json("nodes", "t", "-i", "1", "-t", "tag:web,tag:db")).toMatchObject({ tags: ["tag:db", "tag:web"] });
  expect(await refusal(local("nodes", "tag", "-i", "1", "-t", "web"))).toMatchObject({
    status: 1,
    message: expect.stringContaining('"web" is not a tag'),
  });
  expect(await refusal(local("nodes", "tag", "-i", "x", "-t", "tag:web"))).toMatchObject({ status: 2 });
  expect(await refusal(local("nodes", "expire", "-i", "1", "-d", "-e", "2030-01-01T00:00:00Z"))).toMatchObject({
    status: 2,
  });
});

test("UserCreateCommand, UserCommand, UserCommandValidation: what a user is told by, found by, and refused for", async () => {
  const details = ["-e", "alice@example.com", "-d", "Alice A.", "-p", "https://example.com/a.png"];
  const alice = {
    id: "1",
    name: "alice",
    email: "alice@example.com",
    displayName: "Alice A.",
    profilePicUrl: "https://example.com/a.png",
  };
  expect(await json("users", "create", "alice", ...details)).toMatchObject(alice);
  await local("users", "create", "bob");
  for (const filter of [
    ["-i", "1"],
    ["-n", "alice"],
    ["-e", "alice@example.com"],
  ]) {
    const found = await json<object[]>("users", "list", ...filter);
    expect([filter, found]).toEqual([filter, [expect.objectContaining(alice)]]);
  }
  expect(await json<object[]>("users", "list")).toHaveLength(2);
  expect(await local("users", "list", "-n", "bob", "-o", "yaml")).toContain("- id: ");
  const refused = [
    ["create", "alice"],
    ["create", "Not A Name!"],
    ["create", "carol", "-e", "not a mail"],
    ["create", "carol", "-e", "carol@two@example.com"],
    ["create", "carol", "-p", "not a url"],
    ["create", "carol", "-p", "javascript:alert(1)"],
    ["rename", "-i", "2", "-r", "alice"],
    ["destroy", "-i", "9", "--force"],
  ];
  for (const argv of refused) expect([argv, (await refusal(local("users", ...argv))).status]).toEqual([argv, 1]);
  for (const argv of [["create"], ["destroy", "--force"]])
    expect([argv, (await refusal(local("users", ...argv))).status]).toEqual([argv, 2]);
  await server.join("web", await server.key({ user: 1 }));
  expect((await refusal(local("users", "destroy", "-n", "alice", "--force"))).message).toContain("still has 1 node");
  expect(await json<object[]>("users", "list")).toHaveLength(2);
});

test("a user is suspended and restored, by name or id, and the list says so", async () => {
  await server.user("alice");
  expect(await json("users", "suspend", "alice")).toMatchObject({ id: "1", status: "suspended" });
  expect((await local("users", "list")).split("\n").at(-1)).toMatch(/ \| alice .* \| suspended$/);
  expect((await refusal(local("preauthkeys", "create", "-u", "alice"))).message).toContain("alice is suspended");
  expect(await local("users", "restore", "-i", "1")).toBe("User restored");
  expect(await json<object[]>("users", "list")).toMatchObject([{ status: "active" }]);
  expect((await refusal(local("users", "suspend", "-i", "9"))).status).toBe(1);
  expect((await refusal(local("users", "restore"))).status).toBe(2);
});

test("NodeCommand, NodeRenameCommand, TaggedNodesCLIOutput: nodes are listed by user, tagged ones as nobody's, renamed, and deleted", async () => {
  const [alice, bob] = [await server.user("alice"), await server.user("bob")];
  await server.join("web", await server.key({ user: alice }));
  await server.join("phone", await server.key({ user: bob }));
  await server.join("server", await server.key({ aclTags: ["tag:a", "tag:b"] }));
  const namesOf = async (...argv: string[]) =>
    (await json<{ name: string }[]>("nodes", "list", ...argv)).map(({ name }) => name);
  expect(await namesOf()).toEqual(["web", "phone", "server"]);
  expect(await namesOf("-u", "bob")).toEqual(["phone"]);
  const row = (await local("nodes", "list")).split("\n").find((line) => line.includes("server"))!;
  expect(row.split("|").map((cell) => cell.trim())).toEqual(
    expect.arrayContaining(["tagged-devices", "tag:a,tag:b", "100.64.0.3, fd7a:115c:a1e0::3", "N/A"]),
  );

  expect(await json("nodes", "rename", "-i", "1", "shop")).toMatchObject({ name: "web", givenName: "shop" });
  expect(await json("nodes", "rename", "2", "x".repeat(63))).toMatchObject({ givenName: "x".repeat(63) });
  for (const [name, reason] of [
    ["x".repeat(64), "1 to 63 characters"],
    ["Not_A_Label", "not a DNS label"],
    ["shop", "taken by node 1"],
  ] as const)
    expect(await refusal(local("nodes", "rename", "-i", "2", name))).toEqual({
      status: 1,
      message: expect.stringContaining(reason),
    });
  expect((await refusal(local("nodes", "rename", "-i", "2"))).status).toBe(2);

  expect(await json("nodes", "delete", "-i", "1", "--force")).toEqual({ Result: "Node deleted" });
  expect(await namesOf()).toEqual(["phone", "server"]);
  for (const verb of ["delete", "expire", "rename", "tag", "approve-routes"]) {
    const more = { rename: ["n"], tag: ["-t", "tag:a"], "approve-routes": ["-r", "10.0.0.0/8"] }[verb] ?? [];
    const { status, message } = await refusal(local("nodes", verb, "-i", "1", ...more, "--force"));
    expect([verb, status, message]).toEqual([verb, 1, expect.stringContaining("there is no node 1")]);
  }
});

test("NodeExpireCommand, NodeExpireFlags: now, at a time, never", async () => {
  await server.join("web", await server.key({ user: await server.user("alice") }));
  const inAnHour = new Date(Date.now() + 3_600_000).toISOString();
  expect(await json("nodes", "expire", "-i", "1", "-e", inAnHour)).toMatchObject({ expiry: inAnHour });
  expect(await local("nodes", "list")).toMatch(/\| no$/m);
  expect(await local("nodes", "expire", "-i", "1", "-e", inAnHour)).toBe("Node expiration updated");
  expect(await json("nodes", "expire", "-i", "1", "--disable")).toMatchObject({ expiry: null });
  const { expiry } = await json<{ expiry: string }>("nodes", "expire", "-i", "1");
  expect(Date.parse(expiry)).toBeLessThanOrEqual(Date.now());
  expect(await local("nodes", "list")).toMatch(/\| yes$/m);
  expect((await refusal(local("nodes", "expire", "-i", "1", "-e", "tomorrow"))).status).toBe(2);
});

test("PreAuthKeyCommand{, WithoutExpiry, ReusableEphemeral}, CorrectUserLoggedIn: for an hour and one use unless asked otherwise, and the node is the key's user's", async () => {
  const [, bob] = [await server.user("alice"), await server.user("bob")];
  type Key = { id: string; key: string; expiration: string };
  const left = ({ expiration }: Key) => Math.round((Date.parse(expiration) - Date.now()) / 60_000);
  const plain = await json<Key>("preauthkeys", "create", "-u", "alice");
  expect([left(plain), plain]).toEqual([60, expect.objectContaining({ reusable: false, ephemeral: false })]);
  const open = await json<Key>("preauthkeys", "create", "-u", `${bob}`, "--reusable", "--ephemeral", "-e", "24h");
  expect([left(open), open]).toEqual([24 * 60, expect.objectContaining({ reusable: true, ephemeral: true })]);
  await server.join("phone", open.key);
  expect(await json("nodes", "list")).toMatchObject([{ user: { name: "bob" }, ephemeral: true }]);
  for (const argv of [[], ["-u", "9"], ["-u", "alice", "--tags", "web"]])
    expect([argv, (await refusal(local("preauthkeys", "create", ...argv))).status]).toEqual([argv, 1]);
  expect((await refusal(local("preauthkeys", "create", "-u", "alice", "-e", "soon"))).status).toBe(2);
});

test("addresses that nodes lack are given once", async () => {
  await server.join("web", await server.key({ user: await server.user("alice") }));
  expect(await local("nodes", "backfillips")).toBe("Every node has the addresses that it should have");
  const { dataDir } = server;
  await server.stop();
  const settings = makeSettings();
  server = await TestServer.start({ dataDir, settings: { ...settings, prefixes: { ...settings.prefixes, v4: null } } });
  expect(await json("nodes", "backfillips")).toEqual({ changes: ["node 1 (web) lost 100.64.0.1"] });
  await server.stop();
  server = await TestServer.start({ dataDir });
  expect(await json("nodes", "backfillips")).toEqual({ changes: [expect.stringMatching(/^node 1 \(web\) got 100\./)] });
  expect(await local("nodes", "backfillips", "--force")).toBe("Every node has the addresses that it should have");
});

test("pre-auth keys and API keys are made once, listed without their secret, expired and deleted", async () => {
  await local("users", "create", "alice");
  const key = await local("preauthkeys", "create", "-u", "alice");
  const list = await local("preauthkeys", "ls");
  expect([list.includes(key.slice(0, 23)), list.includes(key)]).toEqual([true, false]);
  expect(await local("authkey", "expire", key)).toBe("Key expired");
  expect(await local("pre", "rm", "--id", "1")).toBe("Key deleted");
  expect(await refusal(local("pre", "delete", "--id", "1"))).toMatchObject({ status: 1 });
  expect(await refusal(local("pre", "delete"))).toMatchObject({ status: 2 });

  const apiKey = await local("apikeys", "create", "-e", "30d");
  expect(apiKey).toMatch(/^hskey-api-/);
  expect(await json("apikey", "create")).toMatch(/^hskey-api-/);
  const keys = await json<{ id: string; prefix: string; expiration: string }[]>("apikeys", "list");
  expect(keys.map(({ id }) => id)).toEqual(["1", "2"]);
  expect(Math.round((Date.parse(keys[0]!.expiration) - Date.now()) / 86_400_000)).toBe(30);
  expect(await local("apikeys", "ls")).not.toContain(apiKey);
  expect(await local("apikeys", "expire", "--id", "1")).toBe("Key expired");
  expect(await local("api", "delete", "--prefix", keys[0]!.prefix)).toBe("Key deleted");
  expect(await refusal(local("apikeys", "delete", "--id", "1", "--prefix", "x"))).toMatchObject({ status: 2 });
  expect(await refusal(local("apikeys", "expire", "--id", "9"))).toMatchObject({ status: 1 });
});

test("a machine that waits is registered or refused; a false one can be made to wait", async () => {
  await local("users", "create", "alice");
  const id = (n: number) => `hskey-authreq-${String(n).repeat(24)}`;
  for (const n of [1, 2, 3])
    await local("debug", "create-node", "--name", `host${n}`, "-u", "alice", "-k", id(n), "-r", "10.0.0.0/8");
  expect(await local("auth", "register", "--auth-id", id(1), "--user", "alice")).toBe("Node host1 registered");
  expect(await json("nodes", "register", "-u", "1", "-k", id(2))).toMatchObject({
    name: "host2",
    user: { name: "alice" },
    registerMethod: "REGISTER_METHOD_CLI",
    availableRoutes: ["10.0.0.0/8"],
  });
  expect(await local("auth", "reject", "--auth-id", id(3))).toBe("Login refused");
  expect(await refusal(local("auth", "register", "--auth-id", id(3), "-u", "alice"))).toMatchObject({ status: 1 });
  expect(await refusal(local("auth", "approve", "--auth-id", id(4)))).toMatchObject({ status: 1 });
  expect(await refusal(local("auth", "approve"))).toMatchObject({ status: 2 });
});

test("OAuth clients are made with scopes and tags, listed and deleted", async () => {
  const made = await json<{ id: string; key: string }>(
    "oauth-clients",
    "create",
    "-s",
    "auth_keys",
    "--scope",
    "devices:core",
    "-t",
    "tag:k8s",
    "-d",
    "operator",
  );
  expect(made.key).toMatch(new RegExp(`^hskey-client-${made.id}-`));
  const list = await local("oauth-clients", "list");
  expect(list).toContain(`${made.id} | operator    | auth_keys,devices:core | tag:k8s`);
  expect(list).not.toContain(made.key);
  expect(await refusal(local("oauth-clients", "create", "-s", "devices:core"))).toMatchObject({ status: 1 });
  expect(await refusal(local("oauth-clients", "create"))).toMatchObject({ status: 2 });
  expect(await json("oauthclient", "delete", "--id", made.id)).toEqual({ id: made.id });
  expect(await refusal(local("oauth-clients", "delete", "-i", made.id))).toMatchObject({ status: 1 });
});

test("from elsewhere by URL and key, from flags or environment, with the same results; without a good key nothing", async () => {
  await local("users", "create", "alice");
  const key = await local("apikeys", "create");
  const remote = (...argv: string[]) => run([...argv, "--address", server.url]);
  expect(await remote("users", "list", "--api-key", key)).toBe(await local("users", "list"));
  const saved = { ...process.env };
  try {
    for (const prefix of ["WEFT", "HEADSCALE"]) {
      process.env = { ...saved, [`${prefix}_CLI_ADDRESS`]: server.url, [`${prefix}_CLI_API_KEY`]: key };
      expect(await run(["users", "list", "-o", "yaml"])).toBe(await local("users", "list", "-o", "yaml"));
    }
  } finally {
    process.env = saved;
  }
  const folder = mkdtempSync(join(tmpdir(), "weft-admin-"));
  try {
    writeFileSync(join(folder, "key"), `${key}\n`, { mode: 0o600 });
    const config = join(folder, "config.yaml");
    writeFileSync(config, `cli:\n  address: ${server.url}\n  api_key_file: ${join(folder, "key")}\n`);
    expect(await run(["-c", config, "users", "list"])).toBe(await local("users", "list"));
    writeFileSync(join(folder, "key"), `${key.slice(0, -64)}${"0".repeat(64)}\n`);
    expect((await refusal(run(["-c", config, "users", "list"]))).message).toContain("not known here");
    writeFileSync(config, `unix_socket: ${server.control.adminSocket}\n`);
    expect(await run(["users", "list", "--config", config])).toBe(await local("users", "list"));
  } finally {
    rmSync(folder, { recursive: true });
  }
  for (const wrong of [`${key.slice(0, -1)}${key.endsWith("0") ? "1" : "0"}`, "hskey-api-1"]) {
    const { status, message } = await refusal(remote("users", "list", "--api-key", wrong));
    expect([status, message]).toEqual([1, expect.stringContaining("not known here")]);
  }
  expect(await refusal(remote("users", "list"))).toMatchObject({
    status: 2,
    message: expect.stringContaining("--api-key"),
  });
  expect(await refusal(remote("users", "list", "--socket", "/x"))).toMatchObject({ status: 2 });
  expect(await refusal(run(["users", "list", "--api-key", key]))).toMatchObject({ status: 2 });
  expect(await refusal(run(["users", "list", "--address", "ftp://x", "--api-key", key]))).toMatchObject({ status: 2 });
  expect(await refusal(run(["users", "list", "--address", "http://[", "--api-key", key]))).toMatchObject({ status: 2 });
});

const noOpenssl = Bun.which("openssl") === null;
if (noOpenssl) console.error("SKIP: openssl is absent: no certificate for the command line to doubt");
test.skipIf(noOpenssl)("a certificate that nobody vouches for is refused, unless --insecure says so", async () => {
  const folder = mkdtempSync(join(tmpdir(), "weft-admin-"));
  const [certFile, keyFile] = [join(folder, "cert"), join(folder, "key")];
  const args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
  Bun.spawnSync(["openssl", ...args, "-subj", "/CN=weft", "-keyout", keyFile, "-out", certFile]);
  const tls = { cert: await Bun.file(certFile).text(), key: await Bun.file(keyFile).text() };
  const { app, upgrades } = server.control;
  const listener = await listen({ host: "127.0.0.1", port: 0, tls, app, upgrades });
  try {
    const key = await local("apikeys", "create");
    const remote = ["users", "list", "--address", `127.0.0.1:${listener.port}`, "--api-key", key];
    expect(await refusal(run(remote))).toMatchObject({ status: 1, message: expect.stringContaining("--insecure") });
    expect(await run([...remote, "--insecure"])).toBe(await local("users", "list"));
  } finally {
    await listener.close();
    rmSync(folder, { recursive: true });
  }
});

test("who does not answer, answers something else, or not in time is named in a sentence", async () => {
  const folder = mkdtempSync(join(tmpdir(), "weft-admin-"));
  const sockets: { destroy(): void }[] = [];
  const stranger = createServer((socket) => {
    sockets.push(socket);
    socket.on("error", () => {});
    socket.once("data", (bytes) => {
      if (String(bytes).includes("/user")) socket.end("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    });
  });
  const path = join(folder, "s");
  await new Promise<void>((resolve) => stranger.listen(path, resolve));
  try {
    expect((await refusal(run(["users", "list", "--socket", join(folder, "none")]))).message).toContain(
      `no control server answers at ${join(folder, "none")}`,
    );
    expect((await refusal(run(["users", "list", "--socket", path]))).message).toContain("does not speak");
    expect((await refusal(run(["nodes", "list", "--socket", path, "--timeout", "50ms"]))).message).toBe(
      `${path} did not answer within 50 ms`,
    );
    const key = `hskey-api-${"0".repeat(12)}-${"0".repeat(64)}`;
    const secure = server.url.replace("http:", "https:");
    const wrong = await refusal(run(["users", "list", "--address", secure, "--api-key", key]));
    expect([wrong.status, wrong.message]).toEqual([
      1,
      expect.stringContaining(`no control server answers at ${secure}`),
    ]);
  } finally {
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => stranger.close(resolve));
    rmSync(folder, { recursive: true });
  }
});

test("every verb says how it is used, wherever its flags stand", async () => {
  expect(await run(["apikeys", "expire", "--help"])).toStartWith("Usage: bun run weft apikeys expire --id ID");
  expect(commandOf(["--address", "https://x", "-o", "json", "--api-key", "k", "apikeys", "list"])).toBe("apikeys");
  expect((await refusal(run(["apikeys", "lst"]))).message).toContain('did you mean "apikeys list"?');
  expect((await refusal(run(["oauth-clients"]))).message).toContain("create, list, delete");
});
