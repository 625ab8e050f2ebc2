// The real `weft` program on a box that runs: scenarios of spec/headscale-features.md, section 22.6, by their names there, each
// locally by the socket and from elsewhere by URL and key. Then the same actions by Headscale's own command line on a
// Headscale, whose shapes are those of Weft. Every rule of the verbs in more detail: src/cli/admin.test.ts, policy.test.ts.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { TestNode } from "../src/control/testing.ts";
import { freePort, skip, tempDir, until } from "./lib/mesh.ts";
import { missing, peer } from "./lib/peers.ts";

const RUN = resolve(import.meta.dir, "../tools/run.ts");
const POLICY =
  '// ours\n{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}], "tagOwners": {"tag:web": []}}\n';
const WRONG = '{"acls": [{"action": "accept", "src": ["group:none"], "dst": ["*:*"]}]}';
const SSH_TEST = JSON.stringify({
  sshTests: [{ src: "alice@", dst: ["tag:web"], accept: ["root"] }],
  tagOwners: { "tag:web": [] },
});
const ALICE = {
  name: "alice",
  displayName: "Alice A.",
  email: "a@example.com",
  profilePicUrl: "https://a.example/a.png",
};
const DETAILS = ["-d", ALICE.displayName, "-e", ALICE.email, "-p", ALICE.profilePicUrl];

interface Ended {
  code: number;
  stdout: string;
  stderr: string;
}

async function program(command: string[], env: Record<string, string> = {}): Promise<Ended> {
  const options = { stdin: "ignore", stdout: "pipe", stderr: "pipe", env: { ...process.env, ...env } } as const;
  const child = Bun.spawn(command, options);
  const [stdout, stderr] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  return { code: await child.exited, stdout, stderr };
}

const dir = tempDir("cli");
const file = (name: string) => join(dir.path, name);
const children: Bun.Subprocess[] = [];
const nodes: TestNode[] = [];
let url = "";
let key = "";

const here = (...args: string[]) => program([process.execPath, RUN, "weft", "--data", file("data"), ...args]);
const there = (...args: string[]) =>
  program([process.execPath, RUN, "weft", ...args], { WEFT_CLI_ADDRESS: url, WEFT_CLI_API_KEY: key });
/** What the program prints as JSON, from here and from elsewhere by turns. */
let turn = 0;
async function weft<T>(...args: string[]): Promise<T> {
  const { code, stdout, stderr } = await (turn++ % 2 ? there : here)(...args, "-o", "json");
  if (code !== 0) throw new Error(`weft ${args.join(" ")} ended with ${code}: ${stderr}`);
  return JSON.parse(stdout) as T;
}
/** One sentence on standard error, nothing on standard output, the same from here and from elsewhere. */
async function refused(args: string[], code: number, ...words: string[]): Promise<void> {
  const ended = await Promise.all([here(...args), there(...args)]);
  for (const { code: status, stdout, stderr } of ended) {
    expect([args, status, stdout]).toEqual([args, code, ""]);
    expect(stderr).not.toMatch(/^\s+at /m);
    for (const word of words) expect(stderr.trim().split("\n").at(-1)).toContain(word);
  }
}
async function joinAs(name: string, server: string, authKey: string): Promise<TestNode> {
  const node = new TestNode(server, name);
  nodes.push(node);
  expect((await node.register({ authKey })).MachineAuthorized).toBe(true);
  const { status } = await node.lite({ Hostinfo: { OS: "linux", Hostname: name, RoutableIPs: ["10.0.0.0/8"] } });
  expect(status).toBe(200);
  return node;
}

beforeAll(async () => {
  writeFileSync(file("policy.hujson"), POLICY);
  writeFileSync(file("wrong.hujson"), WRONG);
  writeFileSync(file("ssh.hujson"), SSH_TEST);
  const address = `127.0.0.1:${await freePort()}`;
  url = `http://${address}`;
  const flags = [
    "--data",
    file("data"),
    "--listen",
    address,
    "--url",
    url,
    "--stun",
    "off",
    "--policy-mode",
    "database",
  ];
  children.push(Bun.spawn([process.execPath, RUN, "box", ...flags], { stdout: "ignore", stderr: "ignore" }));
  await until("the box answers", async () => (await fetch(`${url}/health`)).ok);
  key = (await here("apikeys", "create")).stdout.trim();
});

afterAll(async () => {
  for (const node of nodes) node.close();
  for (const child of children) child.kill();
  await Promise.all(children.map((child) => child.exited));
  dir[Symbol.dispose]();
});

test("User, UserCreate, UserValidation: made, found, renamed and refused alike from here and from elsewhere", async () => {
  // Elsewhere nothing is told without a key.
  const nobody = await program([process.execPath, RUN, "weft", "users", "list", "--address", url]);
  expect([nobody.code, nobody.stderr]).toEqual([2, expect.stringContaining("asks for an API key")]);
  expect(await weft<object>("users", "create", "alice", ...DETAILS)).toMatchObject({ id: "1", ...ALICE });
  expect(await weft<object>("users", "create", "robert")).toMatchObject({ id: "2", name: "robert" });
  expect(await weft<object>("users", "rename", "-i", "2", "-r", "bob")).toMatchObject({ id: "2", name: "bob" });
  for (const filter of [
    ["-i", "1"],
    ["-n", "alice"],
    ["-e", ALICE.email],
  ])
    expect(await weft<object[]>("users", "list", ...filter)).toEqual([expect.objectContaining(ALICE)]);
  await refused(["users", "create", "alice"], 1, '"alice" already exists');
  await refused(["users", "create", "a b"], 1, "a b");
  await refused(["users", "create"], 2, "users create");
  await refused(["users", "rename", "-n", "carol", "-r", "x"], 1, "carol");
  await refused(["users", "destroy", "-i", "9", "--force"], 1, "9");
  expect(await weft<object>("users", "destroy", "-i", "2", "--force")).toEqual({});
  expect(await weft<object[]>("users", "list")).toHaveLength(1);
}, 300_000);

test("PreAuthKey{, WithoutExpiry, ReusableEphemeral, Delete, Validation}, ApiKey, ApiKeyValidation: the secret once, the rest in lists", async () => {
  type Key = { id: string; key: string; expiration: string; used: boolean };
  const made = await weft<Key>("preauthkeys", "create", "-u", "1", "--reusable", "-e", "24h");
  expect(made).toMatchObject({ id: "1", reusable: true, ephemeral: false, used: false, user: ALICE });
  const tagged = await weft<Key>("preauthkeys", "create", "--tags", "tag:web", "--ephemeral");
  expect(tagged).toMatchObject({ id: "2", reusable: false, ephemeral: true, user: null, aclTags: ["tag:web"] });
  const listed = await weft<Key[]>("preauthkeys", "list");
  expect(listed.map(({ id }) => id)).toEqual(["1", "2"]);
  for (const { key } of listed) expect(key).toMatch(/^hskey-auth-[0-9a-f]{12}-\*\*\*$/);
  await weft("preauthkeys", "expire", "--id", "2");
  expect(Date.parse((await weft<Key[]>("preauthkeys", "list"))[1]!.expiration)).toBeLessThanOrEqual(Date.now());
  await weft("preauthkeys", "delete", "--id", "2", "--force");
  await refused(["preauthkeys", "delete", "--id", "2", "--force"], 1, "2");
  await refused(["preauthkeys", "create", "-u", "77"], 1, "77");
  await refused(["preauthkeys", "create", "-u", "1", "--tags", "web"], 1, "web");
  await refused(["preauthkeys", "create", "-u", "1", "-e", "soon"], 2, "soon");

  const second = await weft<string>("apikeys", "create", "-e", "1h");
  const keys = await weft<{ id: string; prefix: string }[]>("apikeys", "list");
  const { id, prefix } = keys.find((each) => second.startsWith(each.prefix))!;
  await weft("apikeys", "expire", "--prefix", prefix);
  await weft("apikeys", "delete", "--id", id, "--force");
  expect(await weft<object[]>("apikeys", "list")).toHaveLength(1);
  await refused(["apikeys", "expire", "--id", id], 1, id);
  await refused(["apikeys", "delete", "--id", id, "--prefix", prefix, "--force"], 2, "apikeys delete");
  expect(JSON.stringify([listed, keys])).not.toContain(made.key.slice(-64));
}, 300_000);

test("Policy, PolicyCheck, PolicyBrokenConfig, SSHTestsRejectFailingPolicy: byte for byte, or refused with the place", async () => {
  await weft("policy", "check", "-f", file("policy.hujson"));
  await weft("policy", "set", "-f", file("policy.hujson"));
  for (const command of [here, there]) expect((await command("policy", "get")).stdout.trimEnd()).toBe(POLICY.trimEnd());
  await refused(["policy", "set", "-f", file("wrong.hujson")], 1, "group:none");
  await refused(["policy", "check", "-f", file("ssh.hujson")], 1, "tag:web");
  await refused(["policy", "set", "-f", file("none.hujson")], 1, "none.hujson");
  expect(await weft<object>("policy", "get")).toMatchObject({ policy: expect.stringContaining("// ours") });
}, 300_000);

test("Node{, Expire, ExpireFlags, Rename, Tag, Route, BackfillIPs, Validation}, PreAuthKeyCorrectUserLoggedIn, AuthValidation, TaggedNodesCLIOutput", async () => {
  const { key: authKey } = await weft<{ key: string }>("preauthkeys", "create", "-u", "alice", "--reusable");
  await joinAs("web", url, authKey);
  await joinAs("db", url, authKey);
  type Node = { id: string; givenName: string; expiry: string | null };
  const [web, db] = await weft<Node[]>("nodes", "list", "-u", "alice");
  expect(web).toMatchObject({ name: "web", user: ALICE, availableRoutes: ["10.0.0.0/8"], approvedRoutes: [] });
  const nodeId = web!.id;
  const routed = await weft<object>("nodes", "approve-routes", "-i", nodeId, "-r", "10.0.0.0/8");
  expect(routed).toMatchObject({ approvedRoutes: ["10.0.0.0/8"] });
  expect(await weft<object[]>("nodes", "list-routes", "-i", nodeId)).toEqual([routed]);
  expect(await weft<object>("nodes", "rename", "-i", nodeId, "shop")).toMatchObject({ name: "web", givenName: "shop" });
  const future = "2031-01-01T00:00:00.000Z";
  expect(await weft<object>("nodes", "expire", "-i", nodeId, "-e", future)).toMatchObject({ expiry: future });
  expect(await weft<object>("nodes", "expire", "-i", nodeId, "--disable")).toMatchObject({ expiry: null });
  expect(Date.parse((await weft<Node>("nodes", "expire", "-i", nodeId)).expiry!)).toBeLessThanOrEqual(Date.now());
  const tagged = await weft<object>("nodes", "tag", "-i", nodeId, "-t", "tag:web");
  expect(tagged).toMatchObject({ tags: ["tag:web"], user: { name: "tagged-devices" } });
  expect(await weft<object>("nodes", "backfillips", "--force")).toEqual({ changes: [] });
  for (const command of [here, there])
    expect((await command("nodes", "list")).stdout).toMatch(/shop .* tagged-devices \| tag:web/);

  await refused(["nodes", "rename", "-i", nodeId, "Not_A_Label"], 1, "not a DNS label");
  await refused(["nodes", "rename", "-i", nodeId, "db"], 1, "taken");
  await refused(["nodes", "tag", "-i", nodeId, "-t", "web"], 1, '"web" is not a tag');
  await refused(["nodes", "approve-routes", "-i", nodeId], 2, "approve-routes");
  await refused(["nodes", "expire", "-i", nodeId, "-e", "soon"], 2, "soon");
  await refused(["nodes", "delete", "-i", "99", "--force"], 1, "99");
  await refused(["nodes", "list-routes", "-i", "99"], 1, "99");

  // A machine that waits, by either word for it.
  for (const [digit, words] of [
    ["a", ["auth", "register", "--auth-id"]],
    ["b", ["nodes", "register", "-k"]],
  ] as const) {
    const id = `hskey-authreq-${digit.repeat(24)}`;
    await weft("debug", "create-node", "--name", `fake-${digit}`, "-u", "alice", "-k", id);
    const registered = await weft<object>(...words, id, "-u", "alice");
    expect(registered).toMatchObject({ name: `fake-${digit}`, registerMethod: "REGISTER_METHOD_CLI", user: ALICE });
    await refused([...words, id, "-u", "alice"], 1, id);
  }
  await refused(["auth", "register", "--auth-id", "hskey-authreq-0", "-u", "alice"], 1, "hskey-authreq-0");
  await refused(["auth", "approve"], 2, "--auth-id");
  await refused(["users", "destroy", "-n", "alice", "--force"], 1, "still has");
  await weft("nodes", "delete", "-i", db!.id, "--force");
  expect(await weft<object[]>("nodes", "list")).toHaveLength(3);
}, 300_000);

test("OAuthClient, OAuthClientValidation", async () => {
  const create = ["oauth-clients", "create", "-s", "devices:core", "-t", "tag:web", "-d", "operator"];
  const made = await weft<{ id: string; key: string }>(...create);
  const [listed] = await weft<{ id: string; key?: string }[]>("oauth-clients", "list");
  expect(listed).toMatchObject({ id: made.id, scopes: ["devices:core"], tags: ["tag:web"], description: "operator" });
  expect(JSON.stringify(listed)).not.toContain(made.key);
  await refused(["oauth-clients", "create"], 2, "which scopes");
  await refused(["oauth-clients", "create", "-s", "everything"], 1, "everything");
  await refused(["oauth-clients", "create", "-s", "devices:core"], 1, "tag");
  await weft("oauth-clients", "delete", "-i", made.id, "--force");
  await refused(["oauth-clients", "delete", "-i", made.id, "--force"], 1, made.id);
}, 300_000);

test("ServerInfo: a running server is healthy, and what is listed is the same in every form, from here and from elsewhere", async () => {
  expect((await here("health")).code).toBe(0);
  for (const list of [
    ["users", "list"],
    ["nodes", "list"],
    ["nodes", "list-routes"],
    ["preauthkeys", "list"],
  ]) {
    const json = await here(...list, "-o", "json");
    expect([json.code, (JSON.parse(json.stdout) as object[]).length]).toEqual([0, expect.any(Number)]);
    expect((JSON.parse(json.stdout) as object[]).length).toBeGreaterThan(0);
    expect((await there(...list, "-o", "json")).stdout).toBe(json.stdout);
    const line = (await there(...list, "-o", "json-line")).stdout;
    expect(line.trimEnd()).not.toContain("\n");
    expect(JSON.parse(line)).toEqual(JSON.parse(json.stdout));
    // Times in YAML are times.
    const yaml = Bun.YAML.parse((await there(...list, "-o", "yaml")).stdout);
    expect(JSON.parse(JSON.stringify(yaml))).toEqual(JSON.parse(json.stdout));
    const table = (await here(...list)).stdout;
    expect(table.trimEnd().split("\n").length).toBe((JSON.parse(json.stdout) as object[]).length + 1);
    expect((await there(...list)).stdout).toBe(table);
  }
  const wrong = { WEFT_CLI_ADDRESS: url, WEFT_CLI_API_KEY: `${key.slice(0, -64)}${"0".repeat(64)}` };
  const refusedList = await program([process.execPath, RUN, "weft", "nodes", "list"], wrong);
  expect([refusedList.code, refusedList.stdout]).toEqual([1, ""]);
}, 300_000);

const noHeadscale = missing([["headscale"]]);
describe.skipIf(skip(noHeadscale))("beside the command line and API of a Headscale 0.28", () => {
  let its = "";
  let itsKey = "";

  const headscale = (...args: string[]) => program([peer("headscale")!, "-c", file("headscale.yaml"), ...args]);
  const json = async (...args: string[]): Promise<unknown> => {
    const { code, stdout, stderr } = await headscale(...args, "-o", "json");
    if (code !== 0) throw new Error(`headscale ${args.join(" ")} ended with ${code}: ${stderr}${stdout}`);
    return JSON.parse(stdout);
  };
  const api = async (server: string, credential: string, method: string, path: string, body?: object) => {
    const init = { method, headers: { Authorization: `Bearer ${credential}` } };
    const answer = await fetch(`${server}/api/v1/${path}`, { ...init, ...(body && { body: JSON.stringify(body) }) });
    return { ok: answer.ok, body: (await answer.json()) as Record<string, unknown> };
  };

  beforeAll(async () => {
    const [port, grpc, stun] = [await freePort(), await freePort(), await freePort()];
    its = `http://127.0.0.1:${port}`;
    const relay = `{ enabled: true, region_id: 999, region_code: x, region_name: X, stun_listen_addr: "127.0.0.1:${stun}", private_key_path: ${file("derp.key")} }`;
    writeFileSync(
      file("headscale.yaml"),
      `server_url: ${its}
listen_addr: 127.0.0.1:${port}
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:${grpc}
unix_socket: ${file("headscale.sock")}
noise: { private_key_path: ${file("headscale.key")} }
prefixes: { v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48" }
database: { type: sqlite, sqlite: { path: ${file("headscale.sqlite")} } }
derp: { server: ${relay}, urls: [], paths: [], auto_update_enabled: false }
dns: { magic_dns: true, base_domain: weft.internal, override_local_dns: false, nameservers: { global: [] } }
policy: { mode: database }
disable_check_updates: true
`,
    );
    const command = [peer("headscale")!, "-c", file("headscale.yaml"), "serve"];
    children.push(Bun.spawn(command, { stdout: "ignore", stderr: "ignore" }));
    await until("headscale answers", async () => (await fetch(`${its}/health`)).ok);
    itsKey = (await json("apikeys", "create")) as string;
    // The same on both, whatever the tests above have left.
    for (const [server, create] of [
      [url, weft],
      [its, json],
    ] as const) {
      const { id } = (await create("users", "create", "carol", ...DETAILS)) as { id: string | number };
      const { key: authKey } = (await create("preauthkeys", "create", "-u", `${id}`, "--reusable")) as { key: string };
      const node = await joinAs("shop", server, authKey);
      await node.stream();
    }
  }, 300_000);

  /** As the API has it: names in camel case, ids and times as strings, methods by name. */
  function inApiForm(value: unknown): unknown {
    if (Array.isArray(value)) return value.map(inApiForm);
    if (typeof value !== "object" || value === null) return value;
    if ("seconds" in value) return new Date(Number(value.seconds) * 1000).toISOString();
    return Object.fromEntries(
      Object.entries(value).map(([name, each]) => [
        name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase()),
        name === "id" || name === "register_method" ? String(each) : inApiForm(each),
      ]),
    );
  }
  /** `a.b[]: string` for each value; what is not set has any type. */
  function fieldsOf(value: unknown, path = ""): Map<string, string> {
    if (Array.isArray(value))
      return new Map([[path, "list"], ...(value.length ? fieldsOf(value[0], `${path}[]`) : [])]);
    if (typeof value !== "object" || value === null) return new Map([[path, value === null ? "null" : typeof value]]);
    return new Map(Object.entries(value).flatMap(([name, each]) => [...fieldsOf(each, `${path}.${name}`)]));
  }
  /** What is there in Headscale's is there in Weft's, with the same type. */
  function hasAllOf(what: string, ours: unknown, theirs: unknown): void {
    const [own, wanted] = [fieldsOf(ours), fieldsOf(theirs)];
    expect(wanted.size).toBeGreaterThan(0);
    for (const [path, type] of wanted) {
      const found = own.get(path);
      const isNothing = found === "null" || type === "null";
      expect([what, path, isNothing ? "null" : found]).toEqual([what, path, isNothing ? "null" : type]);
    }
  }
  /** The last of a list: that of this test. */
  const last = (list: unknown) => (list as object[]).at(-1);

  test("what its command line prints as JSON, Weft's prints too, under the names of the API", async () => {
    const both = async (what: string, ...args: string[]): Promise<[unknown, unknown]> => {
      const pair = [await weft<unknown>(...args), inApiForm(await json(...args))] as [unknown, unknown];
      hasAllOf(
        what,
        Array.isArray(pair[0]) ? last(pair[0]) : pair[0],
        Array.isArray(pair[1]) ? last(pair[1]) : pair[1],
      );
      return pair;
    };
    for (const list of ["users", "nodes", "preauthkeys", "apikeys"]) await both(list, list, "list");
    await both("health", "health");
  }, 300_000);

  test("answers of the API have all of its fields, of the same types", async () => {
    const ids = [last(await weft("nodes", "list")), inApiForm(last(await json("nodes", "list")))] as { id: string }[];
    const users = [last(await weft("users", "list")), inApiForm(last(await json("users", "list")))] as { id: string }[];
    const both = async (method: string, path: (node: string, user: string) => string, body?: object, list?: string) => {
      const servers = [
        [url, key],
        [its, itsKey],
      ] as const;
      const answers = await Promise.all(
        servers.map(([server, credential], i) => api(server, credential, method, path(ids[i]!.id, users[i]!.id), body)),
      );
      const [ours, theirs] = answers.map((answer) => (list ? last(answer.body[list]) : answer.body));
      expect([path("ID", "ID"), ...answers.map(({ ok }) => ok)]).toEqual([
        path("ID", "ID"),
        answers[0]!.ok,
        answers[0]!.ok,
      ]);
      if (Object.keys(theirs!).length > 0) hasAllOf(`${method} ${path("ID", "ID")}`, ours, theirs);
      return answers[0]!.ok;
    };
    const done = async (...args: Parameters<typeof both>) =>
      expect([args[0], args[1]("ID", "ID"), await both(...args)]).toEqual([args[0], args[1]("ID", "ID"), true]);
    await done("POST", (node) => `node/${node}/approve_routes`, { routes: ["10.0.0.0/8"] });
    await done("GET", () => "user", undefined, "users");
    await done("GET", () => "node", undefined, "nodes");
    await done("GET", (node) => `node/${node}`);
    await done("GET", () => "apikey", undefined, "apiKeys");
    await done("POST", () => "user", { name: "dave", displayName: "D", email: "d@example.com", pictureUrl: "" });
    await done("POST", (node) => `node/${node}/rename/renamed`);
    await done("PUT", () => "policy", { policy: POLICY });
    await done("GET", () => "policy");
    await done("POST", (node) => `node/${node}/tags`, { tags: ["tag:web"] });
    await done("POST", (node) => `node/${node}/expire`);
    await done("POST", () => "apikey", { expiration: new Date(Date.now() + 3_600_000).toISOString() });
    await done("POST", () => "preauthkey", {
      aclTags: ["tag:web"],
      reusable: true,
      expiration: new Date(Date.now() + 3_600_000).toISOString(),
    });
    await done("GET", () => "preauthkey", undefined, "preAuthKeys");
    await done("GET", () => "health");
    await done("DELETE", (node) => `node/${node}`);
    expect(await both("POST", () => "user", { name: "dave" })).toBe(false);
    expect(await both("GET", () => "node/999")).toBe(false);
  }, 300_000);
});
