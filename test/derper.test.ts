// The official DERP server and Weft: Weft's client on it, its STUN, and it as a mesh client of Weft's relay.
import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { hex, randomBytes } from "../src/crypto/keys.ts";
import { generatePrivateKey, x25519Public } from "../src/crypto/x25519.ts";
import { DerpClient, type DerpClientOptions } from "../src/net/derp-client.ts";
import { listen } from "../src/net/listener.ts";
import { createRelay, metaCertificate } from "../src/relay/index.ts";
import { encodeStunRequest, parseStunResponse } from "../src/wire/stun.ts";
import type { DERPNode } from "../src/wire/tailcfg.ts";
import { freePort } from "./lib/mesh.ts";
import { missing, peer } from "./lib/peers.ts";

setDefaultTimeout(300_000);
const absent = missing([["derper", "1.102.5"]]);
if (absent) console.error(`SKIP: official derper: ${absent}`);

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function until(condition: () => boolean, what: string, ms = 60_000): Promise<void> {
  const deadline = performance.now() + ms;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`within ${ms} ms it did not happen that ${what}`);
    await Bun.sleep(5);
  }
}

function tempDir(): string {
  const dir = mkdtempSync(join(tmpdir(), "weft-derper-"));
  cleanups.push(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

async function startDerper(dir: string, args: string[], env: Record<string, string> = {}) {
  const port = await freePort();
  const stunPort = await freePort();
  const common = ["-a", `127.0.0.1:${port}`, "-http-port", "-1", "-stun-port", `${stunPort}`];
  const command = [peer("derper", "1.102.5")!, ...common, "-c", join(dir, "derper.key"), ...args];
  const run = async () => {
    const child = Bun.spawn(command, {
      env: { ...process.env, TS_NO_LOGS_NO_SUPPORT: "1", ...env },
      stdout: "ignore",
      stderr: "pipe",
    });
    const derper = { output: "", kill: () => child.kill("SIGKILL"), exited: child.exited };
    cleanups.push(async () => {
      derper.kill();
      await child.exited;
    });
    void (async () => {
      const decoder = new TextDecoder();
      for await (const chunk of child.stderr) derper.output += decoder.decode(chunk, { stream: true });
    })();
    await until(() => {
      if (child.exitCode !== null) throw new Error(`derper ended: ${derper.output}`);
      return derper.output.includes("serving on");
    }, "derper serves");
    return derper;
  };
  return { port, stunPort, run, first: await run() };
}

function connect(node: DERPNode, options: Partial<DerpClientOptions> = {}) {
  const privateKey = generatePrivateKey(randomBytes);
  const packets: string[] = [];
  const gone: string[] = [];
  const client = new DerpClient({
    privateKey,
    region: { RegionID: 900, Nodes: [node] },
    onPacket: (source, packet) => packets.push(`${hex(source)} ${hex(packet)}`),
    onPeerGone: (key, reason) => gone.push(`${hex(key)} ${reason}`),
    ...options,
  });
  cleanups.push(() => client.close());
  return { client, key: x25519Public(privateKey), packets, gone };
}
type Peer = ReturnType<typeof connect>;

async function exchange(a: Peer, b: Peer): Promise<void> {
  // derper says that a client is in before others can reach it; who has its pong is.
  await Promise.all([a.client.ping(), b.client.ping()]);
  for (const size of [0, 1, 1452, 65_536]) {
    for (const [from, to] of [
      [a, b],
      [b, a],
    ] as const) {
      const packet = randomBytes(size);
      from.client.send(to.key, packet);
      await until(() => to.packets.length > 0, `a packet of ${size} bytes arrives`);
      expect(to.packets.splice(0)).toEqual([`${hex(from.key)} ${hex(packet)}`]);
    }
  }
}

const both = (a: Peer, b: Peer, connected: boolean) => () =>
  a.client.state.connected === connected && b.client.state.connected === connected;

test.skipIf(absent !== null)("over TLS with the pin that derper prints; both come back after its kill -9", async () => {
  const dir = tempDir();
  const derper = await startDerper(dir, ["-certmode", "manual", "-certdir", dir, "-hostname", "127.0.0.1"]);
  await until(() => derper.first.output.includes("CertName"), "derper prints its pin");
  const printed = JSON.parse(/\{.*"CertName".*\}/.exec(derper.first.output)![0]) as DERPNode;
  const node = { ...printed, DERPPort: derper.port };
  const [a, b] = [connect(node), connect(node)];
  await until(both(a, b, true), "both connect");
  await exchange(a, b);
  expect(await a.client.ping()).toBeGreaterThan(0);
  a.client.notePreferred(true);

  const stranger = connect({ ...node, CertName: `sha256-raw:${"0".repeat(64)}` });
  await until(() => stranger.client.state.lastError !== null, "a wrong pin is refused");
  expect(stranger.client.state.lastError).toContain("cannot be trusted");

  derper.first.kill();
  await until(both(a, b, false), "both notice");
  await derper.first.exited;
  await derper.run();
  await until(both(a, b, true), "both are back");
  await exchange(a, b);

  const nobody = x25519Public(generatePrivateKey(randomBytes));
  const disco = randomBytes(100);
  disco.set([0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac]);
  a.client.send(nobody, disco);
  await until(() => a.gone.length > 0, "derper says that nobody is there");
  b.client.close();
  await until(() => a.gone.length > 1, "derper says that b left");
  expect(a.gone).toEqual([`${hex(nobody)} 1`, `${hex(b.key)} 0`]);
});

test.skipIf(absent !== null)("over plain HTTP, and its STUN server", async () => {
  const derper = await startDerper(tempDir(), []);
  const node = { Name: "1", RegionID: 900, HostName: "127.0.0.1", DERPPort: derper.port };
  const [a, b] = [connect(node, { insecureHttp: true }), connect(node, { insecureHttp: true })];
  await until(both(a, b, true), "both connect");
  await exchange(a, b);

  const answers: Uint8Array[] = [];
  const socket = await Bun.udpSocket({
    hostname: "127.0.0.1",
    port: 0,
    socket: { data: (_socket, data) => void answers.push(new Uint8Array(data)) },
  });
  cleanups.push(() => socket.close());
  const txid = randomBytes(12);
  await until(() => {
    // derper may still be binding its UDP port.
    if (answers.length === 0) socket.send(encodeStunRequest(txid), derper.stunPort, "127.0.0.1");
    return answers.length > 0;
  }, "STUN answers");
  expect(parseStunResponse(answers[0]!)).toEqual({ txid, ip: Uint8Array.from([127, 0, 0, 1]), port: socket.port });
});

const openssl = Bun.which("openssl");
const meshRefusal = absent ?? (process.getuid?.() !== 0 ? "port 443 needs root" : openssl ? null : "no openssl");
if (meshRefusal && !absent) console.error(`SKIP: derper as a mesh client of Weft's relay: ${meshRefusal}`);

// The mesh client of derper is the official Go client: it logs in to Weft's relay, watches, and forwards.
test.skipIf(meshRefusal !== null)(
  "derper meshes with Weft's relay: a packet given to it reaches a client here",
  async () => {
    const dir = tempDir();
    // An address of 127/8 of its own, since derper dials port 443.
    const host = `127.${(process.pid >> 16) & 0x7f}.${(process.pid >> 8) & 0xff}.${process.pid & 0xff}`;
    const files = ["-keyout", join(dir, "key.pem"), "-out", join(dir, "cert.pem")];
    const names = ["-subj", "/CN=relay.test", "-addext", "subjectAltName=DNS:relay.test"];
    const made = Bun.spawnSync([
      openssl!,
      "req",
      "-x509",
      "-newkey",
      "rsa:2048",
      "-nodes",
      "-days",
      "2",
      ...files,
      ...names,
    ]);
    expect(made.exitCode).toBe(0);
    const [cert, key] = [readFileSync(join(dir, "cert.pem"), "utf8"), readFileSync(join(dir, "key.pem"), "utf8")];
    const meshKey = randomBytes(32);
    writeFileSync(join(dir, "mesh.key"), `${hex(meshKey)}\n`);

    const relay = createRelay({ privateKey: generatePrivateKey(randomBytes), meshKey });
    const chain = cert + metaCertificate(relay.publicKey, Date.now());
    const tls = { cert: chain, key };
    const listener = await listen({ host, port: 443, app: relay.app, upgrades: relay.upgrades, tls });
    cleanups.push(async () => {
      relay.close();
      await listener.close();
    });
    const here = connect(
      { Name: "w", RegionID: 900, HostName: "relay.test", IPv4: host, IPv6: "none" },
      { tls: { ca: cert } },
    );
    const mesh = ["-mesh-psk-file", join(dir, "mesh.key"), "-mesh-with", `relay.test/${host}`];
    const derper = await startDerper(dir, mesh, { SSL_CERT_FILE: join(dir, "cert.pem") });
    const node = { Name: "d", RegionID: 900, HostName: "127.0.0.1", DERPPort: derper.port };
    const there = connect(node, { insecureHttp: true });
    await until(both(here, there, true), "both connect, each to its own relay");
    await until(() => relay.stats().gauge_watchers === 1, "derper watches this relay");
    for (const size of [0, 148, 65_536]) {
      const packet = randomBytes(size);
      await until(() => {
        // Until derper has read who is here, it drops.
        const has = here.packets.includes(`${hex(there.key)} ${hex(packet)}`);
        if (!has) there.client.send(here.key, packet);
        return has;
      }, `a packet of ${size} bytes crosses the mesh`);
    }
    expect(relay.stats().packets_forwarded_in).toBeGreaterThanOrEqual(3);
    here.client.close();
    await until(() => relay.stats().gauge_clients_total === 1, "only derper is left here");
  },
);
