import { afterEach, beforeEach, expect, test } from "bun:test";
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { connect as tlsConnect } from "node:tls";
import { Secrets } from "../../test/lib/secrets.ts";
import { TestNode, until } from "../control/testing.ts";
import { formatKey, randomBytes } from "../crypto/keys.ts";

const RUN = resolve(import.meta.dir, "../../tools/run.ts");
let folder = "";
const running: Bun.Subprocess[] = [];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "weft-box-"));
});
afterEach(async () => {
  for (const child of running.splice(0)) {
    child.kill("SIGKILL");
    await child.exited;
  }
  rmSync(folder, { recursive: true, force: true });
});

interface Outcome {
  status: number;
  stdout: string;
  stderr: string;
}

async function run(...argv: string[]): Promise<Outcome> {
  const child = Bun.spawn([process.execPath, RUN, ...argv], { stdout: "pipe", stderr: "pipe", stdin: "ignore" });
  running.push(child);
  const [stdout, stderr] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  return { status: await child.exited, stdout, stderr };
}

/** The administrator's command line on this test's data folder. */
async function weft(...argv: string[]): Promise<Outcome> {
  return run("weft", "--data", join(folder, "data"), ...argv);
}

function freePort(): Promise<number> {
  return new Promise((resolvePort) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolvePort(port));
    });
  });
}

interface Box {
  url: string;
  child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  ready: string;
}

async function startBox(...more: string[]): Promise<Box> {
  const url = `http://127.0.0.1:${await freePort()}`;
  const argv = [
    "box",
    "--data",
    join(folder, "data"),
    "--listen",
    url.slice(7),
    "--url",
    url,
    "--stun",
    "off",
    ...more,
  ];
  const child = Bun.spawn([process.execPath, RUN, ...argv], { stdout: "pipe", stderr: "pipe", stdin: "ignore" });
  running.push(child);
  const reader = child.stdout.getReader();
  let ready = "";
  while (!ready.includes("\n")) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`the box ended: ${await new Response(child.stderr).text()}`);
    ready += new TextDecoder().decode(value);
  }
  return { url, child, ready };
}

/** One sentence on standard error, nothing on standard output, no stack trace. */
function expectSentence(outcome: Outcome, status: number, text: string): void {
  expect(outcome.stderr).toContain(text);
  expect(outcome.stderr).not.toMatch(/\n\s+at /);
  expect(outcome.stderr.trim().split("\n").at(-1)).toContain(text);
  expect([outcome.status, outcome.stdout]).toEqual([status, ""]);
}

test("a box says when it is ready, answers at once, keeps its data to itself, and ends in order", async () => {
  const box = await startBox();
  expect(box.ready).toContain(`box ready: ${box.url}`);
  expect((await fetch(`${box.url}/key?v=140`)).status).toBe(200);
  expect((await fetch(`${box.url}/derp/probe`)).status).toBe(200);
  expect(statSync(join(folder, "data")).mode & 0o777).toBe(0o700);
  for (const file of readdirSync(join(folder, "data")))
    expect([file, statSync(join(folder, "data", file)).mode & 0o777]).toEqual([file, 0o600]);
  await weft("users", "create", "alice");
  const { stdout } = await weft("preauthkeys", "create", "--user", "1");
  const node = new TestNode(box.url, "a");
  await node.register({ authKey: stdout.trim() });
  const map = await node.stream();
  const started = performance.now();
  box.child.kill("SIGTERM");
  expect(await box.child.exited).toBe(0);
  expect(performance.now() - started).toBeLessThan(4000);
  expect(map.self?.Name).toBe("a.weft.internal.");
  node.close();
});

test("what was acknowledged survives kill -9 at any moment", async () => {
  let box = await startBox();
  await weft("users", "create", "alice");
  const key = (await weft("preauthkeys", "create", "--user", "1", "--reusable")).stdout.trim();
  const single = (await weft("preauthkeys", "create", "--user", "1")).stdout.trim();
  const nodes = Array.from({ length: 30 }, (_, i) => new TestNode(box.url, `n${i}`));
  const acknowledged: TestNode[] = [];
  for (const [i, node] of nodes.entries()) {
    node.register({ authKey: i === 0 ? single : key }).then(
      ({ Error: refused }) => refused === "" && acknowledged.push(node),
      () => {}, // The rest loses its server.
    );
  }
  while (acknowledged.length < 5) await Bun.sleep(1);
  box.child.kill("SIGKILL");
  await box.child.exited;
  for (const node of nodes) node.close();
  box = await startBox();
  const { stdout } = await weft("nodes", "list", "-o", "json");
  const stored = new Set((JSON.parse(stdout) as { nodeKey: string }[]).map((node) => node.nodeKey));
  for (const node of acknowledged) expect(stored).toContain(node.nodeKey);
  const late = new TestNode(box.url, "late");
  if (acknowledged.some((node) => node.hostname === "n0"))
    expect((await late.register({ authKey: single })).Error).toContain("has been used");
  late.close();
}, 120_000);

test("users, keys and nodes: results alone on standard output, for people and for programs", async () => {
  const box = await startBox();
  expect((await weft("users", "create", "alice", "-d", "Alice", "--email", "a@example.com")).stdout).toBe(
    "User created\n",
  );
  expectSentence(await weft("users", "create", "alice"), 1, 'a user named "alice" already exists');
  const list = await run("weft", "users", "list", `--data=${join(folder, "data")}`);
  expect(list.stdout.split("\n")[0]).toMatch(/^ID \| Name +\| Username \| Email +\| Created +\| Role +\| Status$/);
  expect(list.stdout.split("\n")[1]).toMatch(
    /^1 +\| Alice \| alice +\| a@example.com \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| member +\| active$/,
  );
  const bob = JSON.parse((await weft("-o", "json", "users", "create", "bob")).stdout);
  expect(bob).toMatchObject({ id: "2", name: "bob" });
  expect(Bun.YAML.parse((await weft("users", "ls", "-n", "bob", "--output", "yaml")).stdout)).toEqual([bob]);
  expect((await weft("users", "destroy", "--identifier", "2", "--force")).stdout).toBe("User destroyed\n");
  expectSentence(await weft("users", "destroy", "-n", "bob"), 1, 'there is no user "bob"');

  const plain = await weft("preauthkeys", "create", "--user", "1", "--reusable", "--ephemeral", "-e", "24h");
  expect(plain.stdout).toMatch(/^hskey-auth-[0-9a-f]{12}-[0-9a-f]{64}\n$/);
  const before = Date.now();
  const tagged = JSON.parse(
    (await weft("preauthkeys", "create", "-u", "alice", "--tags", "tag:web,tag:db", "-e", "90d", "-o", "json")).stdout,
  );
  expect(tagged).toMatchObject({ id: "2", reusable: false, ephemeral: false, aclTags: ["tag:web", "tag:db"] });
  expect(tagged.key).toMatch(/^hskey-auth-[0-9a-f]{12}-[0-9a-f]{64}$/);
  expect(Math.abs(Date.parse(tagged.expiration) - before - 90 * 86_400_000)).toBeLessThan(60_000);
  const keys = await weft("preauthkeys", "list");
  expect(keys.stdout).toContain(`${plain.stdout.slice(0, 23)}-***`);
  expect(keys.stdout).not.toContain(plain.stdout.trim());
  expectSentence(await weft("preauthkeys", "create"), 1, "needs a user, tags, or both");
  expectSentence(await weft("preauthkeys", "create", "--user", "alicia"), 1, 'did you mean "alice"?');

  const node = new TestNode(box.url, "Joe's Mac mini");
  await node.register({ authKey: plain.stdout.trim() });
  const nodes = await weft("nodes", "list");
  expect(nodes.stdout.split("\n")[0]!.split(/ +\| +/)).toEqual(
    "ID,Hostname,Name,MachineKey,NodeKey,User,Tags,IP addresses,Ephemeral,Last seen,Expiration,Connected,Expired".split(
      ",",
    ),
  );
  expect(nodes.stdout).toContain("| Joe's Mac mini | joes-mac-mini |");
  expect(nodes.stdout).toContain("| 100.64.0.1, fd7a:115c:a1e0::1 | true");
  expect((await weft("nodes", "rename", "--identifier", "1", "mini")).stdout).toBe("Node renamed\n");
  const renamed = JSON.parse((await weft("nodes", "list", "-o", "json-line")).stdout);
  expect(renamed).toMatchObject([
    {
      id: "1",
      givenName: "mini",
      name: "Joe's Mac mini",
      ipAddresses: ["100.64.0.1", "fd7a:115c:a1e0::1"],
      user: { name: "alice" },
    },
  ]);
  expect((await weft("nodes", "expire", "-i", "1")).stdout).toBe("Node expired\n");
  expect((await weft("nodes", "list", "--user", "alice")).stdout).toMatch(/\| yes\n$/);
  expect((await weft("nodes", "delete", "-i", "1", "--force")).stdout).toBe("Node deleted\n");
  expectSentence(await weft("nodes", "delete", "-i", "1"), 1, "there is no node 1");
  expect((await weft("preauthkeys", "expire", "--id", "1")).stdout).toBe("Key expired\n");
  const late = new TestNode(box.url, "late");
  expect((await late.register({ authKey: plain.stdout.trim() })).Error).toContain("expired");
  node.close();
  late.close();
}, 120_000);

test("mistakes of an operator: one sentence that says what, which value, and what to do", async () => {
  const box = await startBox();
  const data = join(folder, "data");
  const other = join(folder, "other");
  expectSentence(await weft("nodes", "lst"), 2, 'did you mean "nodes list"?');
  expectSentence(await weft("nodse", "list"), 2, 'did you mean "nodes"?');
  expectSentence(await weft("preauthkeys", "create", "--usr", "1"), 2, "did you mean --user?");
  expectSentence(await weft("nodes", "list", "-o", "xml"), 2, "json, json-line, yaml");
  expectSentence(await run("weft", "nodes", "list", "--data", other), 1, "no control server answers at");

  const port = new URL(box.url).port;
  const tryBox = (...argv: string[]) => run("box", "--stun", "off", "--url", "http://127.0.0.1:1", ...argv);
  expectSentence(await tryBox("--data", data, "--listen", "127.0.0.1:1"), 1, "another control server has");
  expectSentence(await tryBox("--data", other, "--listen", `127.0.0.1:${port}`), 1, `127.0.0.1:${port} is in use`);
  expectSentence(await tryBox("--data", other, "--listen", "localhost"), 2, '"localhost" is not an address and port');
  expectSentence(await tryBox("--data", other, "--lisen", "x"), 2, "did you mean --listen?");
  expectSentence(await tryBox("--data", other, "--tls-cert", "/nope"), 2, "--tls-cert and --tls-key go together");
  expectSentence(
    await tryBox("--data", other, "--tls-cert", "/nope", "--tls-key", "/nope"),
    1,
    "the TLS certificate /nope cannot be read",
  );
  expectSentence(await tryBox("--data", other, "--base-domain", "127.0.0.1"), 2, "--base-domain");
  expectSentence(await run("box", "--data", other, "--url", "ftp://x"), 2, "must start with https:// or http://");
  expectSentence(await run("box", "--data", other, "--url", "https://x/y"), 2, "scheme, host and port alone");
  expectSentence(await run("control", "--data", other), 2, "either --relay-url URL or --derp-map FILE");
  writeFileSync(join(folder, "map.json"), '{"Regions":{"1":{"RegionID":2}}}');
  expectSentence(await run("control", "--data", other, "--derp-map", join(folder, "map.json")), 1, "Regions.1");
  mkdirSync(other, { recursive: true });
  writeFileSync(join(other, "derp_private.key"), "junk");
  expectSentence(await tryBox("--data", other, "--listen", "127.0.0.1:1"), 1, "derp_private.key is damaged");
  writeFileSync(join(folder, "file"), "");
  expectSentence(await tryBox("--data", join(folder, "file")), 1, "there is a file in its place");
  expectSentence(await tryBox("--data", "/proc/weft"), 1, "cannot be used");
}, 120_000);

test("plain HTTP on a public name is warned about, on a private address it is not", async () => {
  const warned = await run("box", "--data", "/proc/weft", "--stun", "off", "--url", "http://weft.example.com");
  expect(warned.stderr).toContain("plain HTTP on a public name");
  expect(warned.stderr).toContain("--tls-cert FILE --tls-key FILE");
  const quiet = await run("box", "--data", "/proc/weft", "--stun", "off", "--url", "http://192.168.1.1:8080");
  expect(quiet.stderr).not.toContain(" warn ");
  const secure = await run("box", "--data", "/proc/weft", "--stun", "off", "--url", "https://weft.example.com");
  expect(secure.stderr).not.toContain(" warn ");
});

test("control and relay apart: the relay asks the control server whom to admit", async () => {
  const [controlPort, relayPort] = [await freePort(), await freePort()];
  const data = join(folder, "data");
  const start = async (...argv: string[]) => {
    const child = Bun.spawn([process.execPath, RUN, ...argv], { stdout: "pipe", stderr: "pipe", stdin: "ignore" });
    running.push(child);
    const { value } = await child.stdout.getReader().read();
    return new TextDecoder().decode(value);
  };
  const relayUrl = `http://127.0.0.1:${relayPort}`;
  const url = `http://127.0.0.1:${controlPort}`;
  expect(
    await start(
      "control",
      "--data",
      data,
      "--listen",
      `127.0.0.1:${controlPort}`,
      "--url",
      url,
      "--relay-url",
      relayUrl,
    ),
  ).toStartWith(`control ready: ${url}`);
  expect(
    await start(
      "relay",
      "--data",
      join(folder, "relay"),
      "--listen",
      `127.0.0.1:${relayPort}`,
      "--verify-url",
      url,
      "--stun",
      "off",
    ),
  ).toStartWith("relay ready: ");
  await weft("users", "create", "alice");
  const node = new TestNode(url, "a");
  await node.register({ authKey: (await weft("preauthkeys", "create", "-u", "1")).stdout.trim() });
  const map = await node.stream();
  expect(map.messages[0]!.DERPMap).toMatchObject({
    Regions: { "999": { Nodes: [{ HostName: "127.0.0.1", DERPPort: relayPort, InsecureForTests: true }] } },
  });
  const ask = async (nodeKey: string) =>
    (
      (await (
        await fetch(`${url}/verify`, { method: "POST", body: JSON.stringify({ NodePublic: nodeKey }) })
      ).json()) as {
        Allow: boolean;
      }
    ).Allow;
  expect(await ask(node.nodeKey)).toBe(true);
  expect(await ask(formatKey("nodekey", randomBytes(32)))).toBe(false);
  expect((await fetch(`${relayUrl}/derp/probe`)).status).toBe(200);
  node.close();
});

test("a policy file is in force from the start, read again on SIGHUP, and kept when the new one is wrong", async () => {
  const policy = join(folder, "policy.hujson");
  writeFileSync(policy, '{ "acls": [] } // closed');
  const box = await startBox("--policy", policy);
  await weft("users", "create", "alice");
  const { stdout } = await weft("preauthkeys", "create", "--user", "1", "--reusable");
  const nodes = [new TestNode(box.url, "a"), new TestNode(box.url, "b")];
  for (const node of nodes) await node.register({ authKey: stdout.trim() });
  const [a, b] = await Promise.all(nodes.map((node) => node.stream()));
  expect([a!.peers.size, b!.peers.size, a!.filters?.base]).toEqual([0, 0, []]);

  const errors = box.child.stderr.getReader();
  let log = "";
  const hangup = async (text: string, answer: string) => {
    writeFileSync(policy, text);
    box.child.kill("SIGHUP");
    while (!log.includes(answer)) log += new TextDecoder().decode((await errors.read()).value);
  };
  await hangup(
    '{ "acls": [ { "action": "accept" "src": [] } ] }',
    "is not used, the one before stays: line 1, column 34",
  );
  await hangup('{ "acls": [{ "action": "accept", "src": ["*"], "dst": ["*:*"] }] }', "is in force");
  await until(() => a!.peer("b") && b!.peer("a"), "both to see each other");
  for (const node of nodes) node.close();
});

test("a box by its file: TLS that is replaced while it runs, hosts, ids, metrics, and no secret in the log", async () => {
  const pair = (name: string) => {
    const files = { cert: join(folder, `${name}.pem`), key: join(folder, `${name}.key`) };
    const made = Bun.spawnSync([
      ...["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"],
      ...["-keyout", files.key, "-out", files.cert, "-subj", `/CN=${name}`],
    ]);
    expect(made.exitCode).toBe(0);
    return files;
  };
  const [first, second] = [pair("first"), pair("second")];
  copyFileSync(first.cert, join(folder, "tls.pem"));
  copyFileSync(first.key, join(folder, "tls.key"));
  const [port, metricsPort] = [await freePort(), await freePort()];
  const file = join(folder, "config.yaml");
  const oidcSecret = "0idc-geheim-0idc";
  writeFileSync(join(folder, "secret"), oidcSecret, { mode: 0o600 });
  writeFileSync(
    file,
    `server_url: https://weft.example.com:${port}
listen_addr: 127.0.0.1:${port}
metrics_listen_addr: 127.0.0.1:${metricsPort}
data_dir: data
tls_cert_path: tls.pem
tls_key_path: tls.key
log: {level: trace, format: json}
oidc:
  issuer: http://127.0.0.1:1
  client_id: weft
  client_secret_path: secret
  only_start_if_oidc_is_available: false
`,
  );
  const child = Bun.spawn([process.execPath, RUN, "weft", "serve", "-c", file, "--stun", "off"], {
    stdout: "pipe",
    stderr: "pipe",
    stdin: "ignore",
  });
  running.push(child);
  const log = new Response(child.stderr).text();
  const ready = await child.stdout.getReader().read();
  expect(new TextDecoder().decode(ready.value)).toStartWith(`box ready: https://weft.example.com:${port}`);

  const nameOf = () =>
    new Promise<string>((resolveName, reject) => {
      const socket = tlsConnect({ host: "127.0.0.1", port, rejectUnauthorized: false }, () => {
        resolveName(String(socket.getPeerCertificate().subject.CN));
        socket.destroy();
      });
      socket.on("error", reject);
    });
  expect(await nameOf()).toBe("first");
  copyFileSync(second.cert, join(folder, "tls.pem"));
  copyFileSync(second.key, join(folder, "tls.key"));
  child.kill("SIGHUP");
  const deadline = performance.now() + 60_000;
  while ((await nameOf()) !== "second" && performance.now() < deadline) await Bun.sleep(20);
  expect(await nameOf()).toBe("second");

  const get = (path: string, headers: Record<string, string> = {}) =>
    fetch(`https://127.0.0.1:${port}${path}`, { headers, tls: { rejectUnauthorized: false } });
  const evil = await get("/apple", { Host: "evil.example" });
  expect([evil.status, evil.headers.get("X-Frame-Options")]).toEqual([421, "DENY"]);
  const page = await get("/apple", { Host: "weft.example.com" });
  expect([page.status, page.headers.get("X-Content-Type-Options")]).toEqual([200, "nosniff"]);
  const requestId = page.headers.get("X-Request-Id")!;
  expect((await get("/key?v=140", { Host: "evil.example" })).status).toBe(200);
  expect(await (await fetch(`http://127.0.0.1:${metricsPort}/metrics`)).text()).toContain("weft_map_streams 0");
  const config = await fetch(`http://127.0.0.1:${metricsPort}/debug/config`);
  expect(await config.text()).not.toContain(oidcSecret);

  // Every kind of secret is made, and used rightly and wrongly.
  await weft("users", "create", "alice");
  const authKey = (await weft("preauthkeys", "create", "--user", "1")).stdout.trim();
  const apiKey = (await weft("apikeys", "create")).stdout.trim();
  const wrongKey = `${apiKey.slice(0, -4)}AAAA`;
  for (const key of [apiKey, wrongKey])
    await get("/api/v1/node", { Authorization: `Bearer ${key}`, Host: "weft.example.com" });
  child.kill("SIGTERM");
  expect(await child.exited).toBe(0);
  const text = await log;
  const secrets = new Secrets();
  secrets.add("OIDC secret", oidcSecret);
  for (const [name, key] of Object.entries({ authKey, apiKey, wrongKey })) secrets.addKey(name, key);
  for (const path of ["data", "tls.key", "first.key"]) secrets.addPrivateKeys(path, join(folder, path));
  expect(secrets.foundIn({ log: text })).toEqual([]);
  const events = text
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(events).toContainEqual(
    expect.objectContaining({
      msg: "GET /apple",
      request: requestId,
      client: "127.0.0.1",
      status: 200,
      level: "debug",
    }),
  );
}, 120_000);
