// Certificates from a real ACME server: Pebble validates both challenges over the network, its DNS leads every name here.
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { type AddressInfo, createServer } from "node:net";
import { join, resolve as resolvePath } from "node:path";
import { connect } from "node:tls";
import { Hono } from "hono";
import { TestNode, TestServer } from "../src/control/testing.ts";
import { AcmeCertificates, type AcmeOptions } from "../src/net/acme.ts";
import { type Certificate, type Listener, listen } from "../src/net/listener.ts";
import { createLogger } from "../src/net/logger.ts";
import { certificate, freePort, skip, tempDir, until } from "./lib/mesh.ts";
import { Secrets } from "./lib/secrets.ts";

setDefaultTimeout(300_000);
const absent = Bun.which("pebble") && Bun.which("pebble-challtestsrv") ? null : "pebble (the Debian package) is absent";
const isSkipped = skip(absent);
const NAME = "weft.example.com";
const DAY = 86_400_000;

const dir = tempDir("acme");
const children: Bun.Subprocess[] = [];
let directoryUrl = "";
let ca = "";
let tlsPort = 0;
let httpPort = 0;
let roots = "";

beforeAll(async () => {
  if (isSkipped) return;
  const [api, management, dns, dnsApi] = await Promise.all([freePort(), freePort(), freePort(), freePort()]);
  [httpPort, tlsPort] = [await freePort(), await freePort()];
  const own = await certificate(dir.path, "127.0.0.1");
  const config = join(dir.path, "pebble.json");
  const pebble = {
    listenAddress: `127.0.0.1:${api}`,
    managementListenAddress: `127.0.0.1:${management}`,
    certificate: own.cert,
    privateKey: own.key,
    httpPort,
    tlsPort,
    certificateValidityPeriod: (90 * DAY) / 1000,
  };
  writeFileSync(config, JSON.stringify({ pebble }));
  const off = ["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", ""];
  const start = (...command: string[]) =>
    children.push(
      Bun.spawn(command, {
        env: { ...process.env, PEBBLE_VA_NOSLEEP: "1", PEBBLE_WFE_NONCEREJECT: "0" },
        stdout: "ignore",
        stderr: "ignore",
      }),
    );
  start("pebble-challtestsrv", "-dns01", `127.0.0.1:${dns}`, "-management", `127.0.0.1:${dnsApi}`, ...off);
  start("pebble", "-config", config, "-dnsserver", `127.0.0.1:${dns}`);
  directoryUrl = `https://127.0.0.1:${api}/dir`;
  ca = readFileSync(own.ca, "utf8");
  const get = (url: string) => fetch(url, { tls: { ca }, signal: AbortSignal.timeout(5000) });
  await until("Pebble answers", async () => (await get(directoryUrl)).ok);
  roots = await (await get(`https://127.0.0.1:${management}/roots/0`)).text();
});
afterAll(async () => {
  for (const child of children) {
    child.kill("SIGKILL");
    await child.exited;
  }
  dir[Symbol.dispose]();
});

function make(name: string, more: Partial<AcmeOptions> = {}) {
  const lines: string[] = [];
  const acme = new AcmeCertificates({
    directoryUrl,
    email: "",
    hostname: NAME,
    cacheDir: join(dir.path, name),
    challenge: "HTTP-01",
    ca,
    log: createLogger({ level: "info", format: "text", write: (line) => lines.push(line) }),
    now: Date.now,
    ...more,
  });
  return { acme, lines };
}

async function serve(options: Parameters<typeof listen>[0]): Promise<Listener & AsyncDisposable> {
  const listener = await listen(options);
  return { ...listener, [Symbol.asyncDispose]: () => listener.close() };
}

/** The certificate that a client sees who trusts Pebble's roots alone. */
function seenBy(port: number): Promise<X509Certificate> {
  return new Promise((resolve, reject) => {
    const socket = connect({ host: "127.0.0.1", port, servername: NAME, ca: roots }, () => {
      const shown = new X509Certificate(socket.getPeerCertificate().raw);
      socket.destroy();
      resolve(shown);
    });
    socket.on("error", reject);
  });
}

const app = new Hono().get("/", (c) => c.text("hello"));

test.skipIf(isSkipped)(
  "HTTP-01: a certificate is obtained, kept for its owner alone, used again at the next start, and renewed before it ends",
  async () => {
    let now = Date.now();
    const { acme } = make("http", { now: () => now, email: "ops@example.com" });
    await using plain = await serve({ host: "127.0.0.1", port: httpPort, app: acme.app, upgrades: {} });
    const first = await acme.current();
    await using secure = await serve({ host: "127.0.0.1", port: tlsPort, app, upgrades: {}, tls: first });
    await expect(seenBy(tlsPort)).rejects.toThrow();
    const used: Certificate[] = [];
    const use = (certificate: Certificate) => {
      used.push(certificate);
      secure.setCertificate(certificate);
    };
    await acme.look(use);
    const issued = await seenBy(tlsPort);
    expect([issued.subjectAltName, used.length]).toEqual([`DNS:${NAME}`, 1]);
    const folder = join(dir.path, "http");
    expect(statSync(folder).mode & 0o777).toBe(0o700);
    expect(readdirSync(folder).sort()).toEqual(["account.key", `${NAME}.pem`]);
    for (const file of readdirSync(folder)) expect(statSync(join(folder, file)).mode & 0o777).toBe(0o600);

    // A restart asks for nothing, until a third of the 90 days is left.
    const again = make("http", { now: () => now }).acme;
    expect(await again.current()).toEqual(used[0]!);
    now += 59 * DAY;
    await again.look(use);
    expect(used).toHaveLength(1);
    now += 2 * DAY;
    await acme.look(use);
    expect(used).toHaveLength(2);
    expect((await seenBy(tlsPort)).serialNumber).not.toBe(issued.serialNumber);

    // What is no challenge goes to HTTPS.
    const elsewhere = await fetch(`http://127.0.0.1:${plain.port}/admin?a=b`, { redirect: "manual" });
    expect([elsewhere.status, elsewhere.headers.get("Location")]).toEqual([308, `https://${NAME}/admin?a=b`]);
    expect((await fetch(`http://127.0.0.1:${plain.port}/.well-known/acme-challenge/x`)).status).toBe(404);
  },
);

test.skipIf(isSkipped)("TLS-ALPN-01: the challenge is answered on the TLS port itself", async () => {
  const { acme, lines } = make("alpn", { challenge: "TLS-ALPN-01" });
  // Nothing can be written in its place: the certificate is used all the same, and not asked for again.
  mkdirSync(join(dir.path, "alpn", `${NAME}.pem.new`));
  const tls = await acme.current();
  const challenge = (name: string) => acme.challengeFor(name);
  await using secure = await serve({ host: "127.0.0.1", port: tlsPort, app, upgrades: {}, tls, challenge });
  await acme.start((certificate) => secure.setCertificate(certificate));
  acme.close();
  expect((await seenBy(tlsPort)).subjectAltName).toBe(`DNS:${NAME}`);
  expect(acme.challengeFor(NAME)).toBeNull();
  expect(lines.filter((line) => line.includes("cannot be kept"))).toHaveLength(1);
  await acme.look(() => expect.unreachable());
  expect(lines.join("")).not.toContain("PRIVATE KEY");
});

test("a certificate that was cut off on the disk keeps no server down: it is said, and another will be asked for", async () => {
  const { acme, lines } = make("cut");
  writeFileSync(join(dir.path, "cut", `${NAME}.pem`), "-----BEGIN PRIVATE KEY-----\nx\n-----BEGIN CERTIFICATE-----\n");
  const { cert } = await acme.current();
  expect(new X509Certificate(cert).subject).toBe("CN=ACME challenge");
  expect(lines.join("")).toContain("cannot be used, another is asked for");
});

test.skipIf(isSkipped)(
  "a refusal is logged, asked again with growing pauses, and leaves the certificate in use",
  async () => {
    // Nothing listens on the port where Pebble looks for the answer.
    const { acme, lines } = make("refused");
    const use = () => expect.unreachable();
    expect(await acme.look(use)).toBe(60_000);
    expect(await acme.look(use)).toBe(120_000);
    expect(lines).toHaveLength(2);
    expect(lines[0]).toContain(`no certificate for ${NAME} from ${directoryUrl}, next attempt in 1 min`);
    expect(lines[0]).toContain("connection refused");
    expect(existsSync(join(dir.path, "refused", `${NAME}.pem`))).toBe(false);
  },
);

/** TCP to a TLS port, as a client that trusts Pebble's roots alone and asks for the name. */
async function bridge(port: number) {
  const server = createServer((near) => {
    const far = connect({ host: "127.0.0.1", port, servername: NAME, ca: roots });
    near.pipe(far).pipe(near);
    for (const [one, other] of [
      [near, far],
      [far, near],
    ] as const) {
      one.on("error", () => {});
      one.on("close", () => other.destroy());
    }
  });
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    [Symbol.dispose]: () => void server.close(),
  };
}

test.skipIf(isSkipped)(
  "a certificate is renewed while nodes are connected: their streams go on, others find the new one",
  async () => {
    let now = Date.now();
    const { acme } = make("renewed", { challenge: "TLS-ALPN-01", now: () => now });
    await using server = await TestServer.start();
    const { app, upgrades } = server.control;
    const challenge = (name: string) => acme.challengeFor(name);
    await using secure = await serve({
      ...{ host: "127.0.0.1", port: tlsPort, app, upgrades, challenge },
      tls: await acme.current(),
    });
    const use = (certificate: Certificate) => secure.setCertificate(certificate);
    await acme.look(use);
    const before = await seenBy(tlsPort);
    using way = await bridge(tlsPort);
    const key = await server.key({ aclTags: ["tag:a"], reusable: true });
    const [first, second] = [new TestNode(way.url, "first"), new TestNode(way.url, "second")];
    // The listener waits for them.
    using _nodes = {
      [Symbol.dispose]: () => {
        for (const node of [first, second]) node.close();
      },
    };
    expect(await first.register({ authKey: key })).toMatchObject({ Error: "" });
    const map = await first.stream();

    now += 61 * DAY;
    await acme.look(use);
    expect((await seenBy(tlsPort)).serialNumber).not.toBe(before.serialNumber);
    expect(await second.register({ authKey: key })).toMatchObject({ Error: "" });
    await until("the open stream tells of the node that came with the new certificate", async () => map.peer("second"));
    expect(map.ended).toBe(false);
    expect(map.messages.filter((message) => message.Node)).toHaveLength(1);
  },
);

for (const kind of ["HTTP-01", "TLS-ALPN-01"])
  test.skipIf(isSkipped)(
    `a whole box by its configuration, ${kind}: it has a certificate when it is ready, and keeps it`,
    async () => {
      const [data, file] = [join(dir.path, `box-${kind}`), join(dir.path, `${kind}.yaml`)];
      writeFileSync(
        file,
        `listen_addr: 127.0.0.1:${tlsPort}
server_url: https://${NAME}:${tlsPort}
data_dir: ${data}
acme_url: ${directoryUrl}
acme_ca_path: ${join(dir.path, "ca.pem")}
tls_letsencrypt_hostname: ${NAME}
tls_letsencrypt_challenge_type: ${kind}
tls_letsencrypt_listen: 127.0.0.1:${httpPort}
`,
      );
      const run = resolvePath(import.meta.dir, "../tools/run.ts");
      const serials: string[] = [];
      let log = "";
      for (let start = 0; start < 2; start++) {
        const box = Bun.spawn([process.execPath, run, "box", "-c", file, "--stun", "off"], {
          stdin: "ignore",
          stdout: "pipe",
          stderr: "pipe",
        });
        children.push(box);
        const errors = new Response(box.stderr).text();
        const { value } = await box.stdout.getReader().read();
        if (!value) throw new Error(`the box ended: ${await errors}`);
        const seen = await seenBy(tlsPort);
        expect([seen.subjectAltName, seen.issuer.includes("Pebble")]).toEqual([`DNS:${NAME}`, true]);
        serials.push(seen.serialNumber);
        using way = await bridge(tlsPort);
        expect(await (await fetch(`${way.url}/key?v=140`)).json()).toMatchObject({
          publicKey: expect.stringMatching(/^mkey:[0-9a-f]{64}$/),
        });
        box.kill("SIGTERM");
        expect(await box.exited).toBe(0);
        log += await errors;
      }
      expect(serials[1]).toBe(serials[0]!);
      expect(log.match(/a certificate for weft.example.com is in use/g)).toHaveLength(1);
      const secrets = new Secrets();
      secrets.addPrivateKeys("box", data);
      expect(secrets.names.join()).toMatch(/account.key.*weft.example.com.pem/);
      expect(secrets.foundIn({ log })).toEqual([]);
    },
  );
