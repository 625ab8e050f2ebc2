import { afterAll, expect, test } from "bun:test";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { TestServer } from "../control/testing.ts";
import { allCommands, LOCAL } from "./weft.ts";

const RUN = resolve(import.meta.dir, "../../tools/run.ts");
const folder = mkdtempSync(join(tmpdir(), "weft-cli-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

async function weft(...argv: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
  const child = Bun.spawn([process.execPath, RUN, "weft", ...argv], {
    stdout: "pipe",
    stderr: "pipe",
    stdin: "ignore",
  });
  const [stdout, stderr] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  return { status: await child.exited, stdout, stderr };
}

function write(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text, { mode: 0o600 });
  return path;
}

test("configtest names what is wrong with configuration, certificates, secrets and policy", async () => {
  write("policy.hujson", '{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}');
  const good = write("good.yaml", "server_url: https://weft.example.com\npolicy:\n  path: policy.hujson\n");
  expect(await weft("configtest", "-c", good)).toEqual({ status: 0, stdout: `${good}: all is right\n`, stderr: "" });
  const wrong = async (name: string, text: string) => {
    const { status, stdout, stderr } = await weft("configtest", "--config", write(name, text));
    expect([status, stdout]).toEqual([2, ""]);
    return stderr;
  };
  expect(await wrong("a.yaml", "server_urll: x\n")).toContain(
    'a.yaml:1: unknown key "server_urll": did you mean "server_url"?',
  );
  expect(await wrong("b.yaml", "tls_cert_path: no.pem\ntls_key_path: no.key\n")).toContain("the TLS certificate");
  write("bad.hujson", '{"acls": [\n  {"action": "accept", "src": ["group:x"], "dst": 5}]}');
  expect(await wrong("c.yaml", "policy: {path: bad.hujson}\n")).toMatch(/bad\.hujson: .*line 2/);
  chmodSync(write("secret", "x"), 0o644);
  const oidc = "oidc:\n  issuer: https://id.example.com\n  client_id: a\n  client_secret_path: secret\n";
  expect(await wrong("d.yaml", oidc)).toContain("everybody on this machine may use it (mode 644)");
}, 120_000);

test("the example configuration and the service of packaging/ are right", async () => {
  const packaging = resolve(import.meta.dir, "../../packaging");
  expect(await weft("configtest", "-c", packaging.concat("/config.example.yaml"))).toMatchObject({
    status: 0,
    stderr: "",
  });
  const unit = readFileSync(join(packaging, "weft.service"), "utf8");
  const commands = [...unit.matchAll(/^Exec\w+=\S+ run weft (\S+) (--\S+)/gm)].map(([, verb, flag]) => [verb, flag]);
  expect(commands).toEqual([
    ["configtest", "--config"],
    ["serve", "--config"],
  ]);
});

test("health: 0 while the server works, 1 when nobody answers", async () => {
  await using server = await TestServer.start();
  const socket = server.control.adminSocket;
  expect(await weft("health", "--socket", socket)).toEqual({ status: 0, stdout: "ok\n", stderr: "" });
  expect(JSON.parse((await weft("health", "--socket", socket, "-o", "json")).stdout)).toEqual({
    databaseConnectivity: true,
  });
  const gone = await weft("health", "--data", folder);
  expect([gone.status, gone.stdout]).toEqual([1, ""]);
  expect(gone.stderr).toContain("no control server answers at");
}, 120_000);

test("version: for people and for programs", async () => {
  const { version } = JSON.parse(readFileSync(resolve(import.meta.dir, "../../package.json"), "utf8"));
  expect((await weft("version")).stdout).toStartWith(`${version}\n`);
  const about = JSON.parse((await weft("version", "-o", "json")).stdout);
  expect(about).toEqual({ short: version, long: version, version });
  expect((await weft("version", "-o", "xml")).status).toBe(2);
}, 120_000);

test("generate prints a new private key each time", async () => {
  const [first, second] = [await weft("generate", "private-key"), await weft("gen", "private-key")];
  expect(first.stdout).toMatch(/^privkey:[0-9a-f]{64}\n$/);
  expect(second.stdout).toMatch(/^privkey:[0-9a-f]{64}\n$/);
  expect(second.stdout).not.toBe(first.stdout);
  const json = JSON.parse((await weft("generate", "private-key", "-o", "json")).stdout);
  expect(json).toEqual({ private_key: expect.stringMatching(/^privkey:[0-9a-f]{64}$/) });
  expect((await weft("generate", "keys")).status).toBe(2);
}, 120_000);

test("-c FILE before a command that reads no configuration does no harm: scripts give it to all", async () => {
  for (const [word, ...more] of [["version"], ["generate", "private-key"], ["completion", "bash"]] as const)
    expect(await weft("-c", "/none.yaml", word, ...more)).toMatchObject({ status: 0, stderr: "" });
}, 120_000);

/** What bash offers behind these words. */
async function completed(...words: string[]): Promise<string[]> {
  const script = write("weft.bash", (await weft("completion", "bash")).stdout);
  const program = `source ${script}; COMP_WORDS=(weft ${words.map((word) => `'${word}'`).join(" ")}); COMP_CWORD=${words.length}; _weft; printf '%s\\n' "\${COMPREPLY[@]}"`;
  return (await Bun.$`bash -c ${program}`.text()).trim().split("\n");
}

test("the completion knows every command, verb and flag, in a real bash", async () => {
  expect(await completed("")).toEqual((await allCommands()).map(({ name }) => name));
  expect(await completed("preauth")).toEqual(["preauthkeys"]);
  expect(await completed("nodes", "re")).toContain("rename");
  expect(await completed("preauthkeys", "create", "--reus")).toEqual(["--reusable"]);
  // Short forms, of the noun, of the verb, of both.
  expect(await completed("node", "re")).toContain("rename");
  expect(await completed("pre", "create", "--reus")).toEqual(["--reusable"]);
  expect(await completed("nodes", "ls", "--addr")).toEqual(["--address"]);
  expect(await completed("gen", "private-key", "--out")).toEqual(["--output"]);
  expect(await completed("completion", "")).toEqual(["bash", "zsh", "fish"]);
  expect(await completed("policy", "why", "--pro")).toEqual(["--proto"]);
  expect(await completed("up", "--login")).toEqual(["--login-server"]);
  expect(await completed("up", "--reset", "--host")).toEqual(["--hostname"]);
  expect(await completed("serve", "--tls")).toEqual(["--tls-cert", "--tls-key"]);
  expect(await completed("nodes", "list", "--addr")).toEqual(["--address"]);
  expect(await completed("policy", "")).toEqual(["get", "set", "check", "history", "why", "try"]);
  const fish = (await weft("completion", "fish")).stdout;
  for (const { name } of await allCommands()) expect(fish).toContain(` -a ${name}\n`);
}, 120_000);

test("every command of its own has help; a mistyped one is recognised", async () => {
  const overview = (await weft("--help")).stdout;
  for (const name of Object.keys(LOCAL)) {
    const { status, stdout } = await weft(name, "--help");
    expect([name, status]).toEqual([name, 0]);
    expect(stdout).toStartWith(`Usage: bun run weft ${name}`);
    expect(overview).toContain(`  ${name} `);
  }
  expect((await weft("confgtest")).stderr).toContain('did you mean "configtest"?');
}, 120_000);

test("serve goes by the configuration: box, or control with relays elsewhere", async () => {
  const config = (more: string) =>
    write(
      "serve.yaml",
      `data_dir: data\nlisten_addr: 127.0.0.1:1\nserver_url: http://127.0.0.1:1\nlog:\n  level: fatal\n${more}`,
    );
  const serve = async (more: string) => (await weft("serve", "-c", config(more), "--stun", "off")).stderr;
  // Port 1 cannot be had by an ordinary user; for root it can, so the key file stands in the way.
  write("broken.key", "junk");
  expect(await serve("derp: {server: {enabled: true, private_key_path: broken.key}}")).toContain(
    "broken.key is damaged",
  );
  expect(await serve("derp: {server: {enabled: false}}")).toContain("clients need a relay");
  expect(await serve("noise: {private_key_path: broken.key}\nderp: {urls: ['http://127.0.0.1:1/map']}")).toContain(
    "broken.key is damaged",
  );
}, 120_000);
