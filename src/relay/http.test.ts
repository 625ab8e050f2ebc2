import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { type Socket, connect as tcpConnect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { connect as tlsConnect } from "node:tls";
import fc from "fast-check";
import { WebSocket } from "ws";
import { hex, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey, x25519Public } from "../crypto/x25519.ts";
import { parseTrustedProxies, type TrustedProxies } from "../net/client-address.ts";
import { DerpClient, type DerpClientOptions } from "../net/derp-client.ts";
import { checkPin } from "../net/derp-dial.ts";
import { type Listener, listen } from "../net/listener.ts";
import {
  CLIENT_LIMITS,
  ClientLogin,
  encodeFrame,
  encodeSendPacket,
  FrameDecoder,
  FrameType,
  MAX_CLIENT_FRAME,
} from "../wire/derp.ts";
import { createRelay, type Relay, type RelayOptions } from "./http.ts";

setDefaultTimeout(120_000);

const cert = selfSigned();
const schemes = cert ? (["http", "https"] as const) : (["http"] as const);
if (!cert) console.error("SKIP: relay over TLS: the openssl program is needed to make a certificate");

function selfSigned(): { cert: string; key: string; pin: string } | null {
  const dir = mkdtempSync(join(tmpdir(), "weft-relay-"));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  try {
    const args = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=relay";
    const names = "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:relay.test";
    const files = ["-keyout", join(dir, "key.pem"), "-out", join(dir, "cert.pem"), "-addext", names];
    if (Bun.spawnSync(["openssl", ...args.split(" "), ...files]).exitCode !== 0) return null;
  } catch {
    return null;
  }
  const pem = readFileSync(join(dir, "cert.pem"), "utf8");
  const der = Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ""), "base64");
  const pin = new Bun.CryptoHasher("sha256").update(der).digest("hex");
  return { cert: pem, key: readFileSync(join(dir, "key.pem"), "utf8"), pin };
}

/** A relay behind the listener that it has in the box. */
class Served implements AsyncDisposable {
  readonly #clients: DerpClient[] = [];
  readonly #raw: Socket[] = [];
  private constructor(
    readonly relay: Relay,
    readonly listener: Listener,
    readonly isTls: boolean,
  ) {}

  static async start(
    scheme: "http" | "https",
    options: Partial<RelayOptions> = {},
    port = 0,
    trustedProxies: TrustedProxies = [],
  ): Promise<Served> {
    const relay = createRelay({ privateKey: generatePrivateKey(randomBytes), ...options });
    const tls = scheme === "https" ? { tls: { cert: cert!.cert, key: cert!.key } } : {};
    const { app, upgrades } = relay;
    const listener = await listen({ host: "127.0.0.1", port, app, upgrades, trustedProxies, ...tls });
    return new Served(relay, listener, scheme === "https");
  }

  get url(): string {
    return `${this.isTls ? "https" : "http"}://127.0.0.1:${this.listener.port}`;
  }

  region(node: Record<string, unknown> = {}) {
    const first = { Name: "1a", RegionID: 1, HostName: "127.0.0.1", DERPPort: this.listener.port, ...node };
    return { RegionID: 1, Nodes: [first] };
  }

  client(options: Partial<DerpClientOptions> = {}): Peer {
    const privateKey = options.privateKey ?? generatePrivateKey(randomBytes);
    const packets: string[] = [];
    const gone: string[] = [];
    const client = new DerpClient({
      privateKey,
      region: this.region(),
      insecureHttp: !this.isTls,
      ...(this.isTls ? { tls: { ca: cert!.cert } } : {}),
      onPacket: (source, packet) => packets.push(`${hex(source)} ${hex(packet)}`),
      onPeerGone: (key, reason) => gone.push(`${hex(key)} ${reason}`),
      ...options,
    });
    this.#clients.push(client);
    return { client, key: x25519Public(privateKey), packets, gone };
  }

  async connected(options: Partial<DerpClientOptions> = {}): Promise<Peer> {
    const peer = this.client(options);
    await until(() => peer.client.state.connected, "the client connects");
    return peer;
  }

  /** A bare connection after TCP and TLS. */
  async raw(): Promise<Socket> {
    const { port } = this.listener;
    const socket = this.isTls
      ? tlsConnect({ host: "127.0.0.1", port, ca: cert!.cert, servername: "localhost" })
      : tcpConnect(port, "127.0.0.1");
    socket.on("error", () => {});
    this.#raw.push(socket);
    await new Promise((resolve) => socket.once(this.isTls ? "secureConnect" : "connect", resolve));
    return socket;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.#clients) client.close();
    for (const socket of this.#raw) socket.destroy();
    this.relay.close();
    await this.listener.close();
  }
}

interface Peer {
  client: DerpClient;
  key: Uint8Array;
  packets: string[];
  gone: string[];
}

async function until(condition: () => boolean, what: string, ms = 60_000): Promise<void> {
  const deadline = performance.now() + ms;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`within ${ms} ms it did not happen that ${what}`);
    await Bun.sleep(2);
  }
}

/** Reads raw frames from a socket; the HTTP head, if one is expected, goes to `head`. */
class Reader {
  head = "";
  frames: { type: number; payload: Uint8Array }[] = [];
  isEnded = false;
  readonly #decoder = new FrameDecoder(CLIENT_LIMITS, MAX_CLIENT_FRAME);
  #inHead: boolean;
  constructor(socket: Socket, expectHead: boolean) {
    this.#inHead = expectHead;
    socket.on("data", (chunk: Uint8Array) => this.#data(new Uint8Array(chunk)));
    socket.on("end", () => (this.isEnded = true));
    socket.on("close", () => (this.isEnded = true));
  }
  #data(chunk: Uint8Array): void {
    if (this.#inHead) {
      this.head += Buffer.from(chunk).toString("latin1");
      const end = this.head.indexOf("\r\n\r\n");
      if (end < 0) return;
      chunk = new Uint8Array(Buffer.from(this.head.slice(end + 4), "latin1"));
      this.head = this.head.slice(0, end);
      this.#inHead = false;
    }
    this.#decoder.feed(chunk, (type, buf, at, end) => this.frames.push({ type, payload: buf.slice(at + 5, end) }) > 0);
  }
  types(): number[] {
    return this.frames.map((frame) => frame.type);
  }
}

const REQUEST = "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n";
const WS_REQUEST = `${REQUEST.replace("DERP", "websocket")}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: derp\r\n`;

function loginFrames(relay: Relay, privateKey = generatePrivateKey(randomBytes)) {
  const publicKey = x25519Public(privateKey);
  const login = new ClientLogin({ privateKey, publicKey, serverKey: relay.publicKey });
  return { publicKey, clientInfo: login.clientInfo(randomBytes(24)) };
}

for (const scheme of schemes) {
  describe(`over ${scheme}`, () => {
    test("two nodes exchange packets of every size, ping, and hear of each other's end", async () => {
      await using served = await Served.start(scheme);
      const [a, b] = [await served.connected(), await served.connected()];
      const sizes = [0, 1, 148, 1452, 16_384, 65_536];
      for (const size of sizes) {
        const packet = randomBytes(size);
        expect(a.client.send(b.key, packet)).toBe(true);
        await until(() => b.packets.length > 0, `a packet of ${size} bytes arrives`);
        expect(b.packets.splice(0)).toEqual([`${hex(a.key)} ${hex(packet)}`]);
      }
      expect(a.client.send(b.key, new Uint8Array(65_537))).toBe(false);
      expect(await a.client.ping()).toBeGreaterThan(0);
      a.client.close();
      expect(a.client.state.connected).toBe(false);
      await until(() => b.gone.length > 0, "b hears that a is gone");
      expect(b.gone).toEqual([`${hex(a.key)} 0`]);
      expect(a.client.send(b.key, new Uint8Array(1))).toBe(false);
    });

    test("100 MB in both directions at once keep their order and content", async () => {
      await using served = await Served.start(scheme);
      const total = 800;
      const seen = [0, 0];
      let wrong = 0;
      const body = randomBytes(65_536);
      const check = (index: number) => (_source: Uint8Array, packet: Uint8Array) => {
        const number = new DataView(packet.buffer, packet.byteOffset).getUint32(0);
        if (number !== seen[index] || Buffer.compare(packet.subarray(4), body.subarray(4)) !== 0) wrong++;
        seen[index]!++;
      };
      const a = await served.connected({ onPacket: check(0) });
      const b = await served.connected({ onPacket: check(1) });
      for (let i = 0; i < total; i++) {
        new DataView(body.buffer, body.byteOffset).setUint32(0, i);
        a.client.send(b.key, body);
        b.client.send(a.key, body);
        // A relay drops when a receiver is slow, so this sender waits for what it sent.
        if (i % 8 === 7) await until(() => seen[0]! > i && seen[1]! > i, `packet ${i} arrives`);
      }
      await until(() => seen[0] === total && seen[1] === total, "all packets arrive");
      expect(wrong).toBe(0);
    });

    test("fast start: no HTTP answer, the relay's key first, and ClientInfo in the same flight as the request", async () => {
      await using served = await Served.start(scheme);
      const socket = await served.raw();
      const reader = new Reader(socket, false);
      const { clientInfo, publicKey } = loginFrames(served.relay);
      const packet = encodeSendPacket(publicKey, Uint8Array.of(1, 2));
      socket.write(Buffer.concat([Buffer.from(`${REQUEST}Derp-Fast-Start: 1\r\n\r\n`), clientInfo, packet]));
      await until(() => reader.frames.length === 3, "three frames arrive");
      expect(reader.types()).toEqual([FrameType.ServerKey, FrameType.ServerInfo, FrameType.RecvPacket]);
      expect(hex(reader.frames[0]!.payload)).toBe(`44455250f09f9491${hex(served.relay.publicKey)}`);
    });

    test("the plain upgrade answers 101 with the key in hex", async () => {
      await using served = await Served.start(scheme);
      const socket = await served.raw();
      const reader = new Reader(socket, true);
      socket.write(`${REQUEST.replace("DERP", "dErP")}Derp-Fast-Start: true\r\n\r\n`);
      await until(() => reader.frames.length === 1, "the greeting arrives");
      expect(reader.head.split("\r\n")).toEqual([
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: DERP",
        "Connection: Upgrade",
        "Derp-Version: 2",
        `Derp-Public-Key: ${hex(served.relay.publicKey)}`,
      ]);
      socket.write(loginFrames(served.relay).clientInfo);
      await until(() => reader.frames.length === 2, "ServerInfo arrives");
    });

    test("WebSocket with protocol derp carries the same frames, cut anyhow; text is refused", async () => {
      await using served = await Served.start(scheme);
      const b = await served.connected();
      const ws = new WebSocket(`${served.url.replace("http", "ws")}/derp`, "derp", { rejectUnauthorized: false });
      ws.binaryType = "nodebuffer";
      const frames: number[] = [];
      const decoder = new FrameDecoder(CLIENT_LIMITS, MAX_CLIENT_FRAME);
      ws.on("message", (data) => {
        decoder.feed(new Uint8Array(data as Buffer), (type) => frames.push(type) > 0);
      });
      let closed = 0;
      ws.on("close", (code) => {
        closed = code;
      });
      await new Promise((resolve) => ws.once("open", resolve));
      expect(ws.protocol).toBe("derp");
      const { clientInfo, publicKey } = loginFrames(served.relay);
      const stream = Buffer.concat([clientInfo, encodeSendPacket(b.key, Uint8Array.of(7))]);
      for (let at = 0; at < stream.length; at += 50) ws.send(stream.subarray(at, at + 50));
      await until(() => b.packets.length === 1, "the packet of the WebSocket arrives");
      b.client.send(publicKey, Uint8Array.of(8));
      await until(() => frames.length === 3, "the answer arrives");
      expect(frames).toEqual([FrameType.ServerKey, FrameType.ServerInfo, FrameType.RecvPacket]);
      expect(served.relay.stats().websocket_accepts).toBe(1);
      ws.send("text");
      await until(() => closed > 0, "the WebSocket is closed");
      expect(closed).toBe(1003);
      await until(() => served.relay.stats().gauge_clients_total === 1, "the relay forgets it");
      // One that goes away without a word.
      const gone = new WebSocket(`${served.url.replace("http", "ws")}/derp`, "derp", { rejectUnauthorized: false });
      await new Promise((resolve) => gone.once("open", resolve));
      gone.send(loginFrames(served.relay).clientInfo);
      await until(() => served.relay.stats().gauge_clients_total === 2, "the relay knows it");
      gone.terminate();
      await until(() => served.relay.stats().gauge_clients_total === 1, "the relay forgets it as well");
    });

    test("Upgrade: websocket without the protocol is the raw form of ancient clients", async () => {
      await using served = await Served.start(scheme);
      const socket = await served.raw();
      const reader = new Reader(socket, true);
      socket.write(`${REQUEST.replace("DERP", "WebSocket")}\r\n`);
      await until(() => reader.frames.length === 1, "the greeting arrives");
      expect(reader.head).toStartWith("HTTP/1.1 101 ");
    });

    test("any other upgrade, and none, is 426", async () => {
      await using served = await Served.start(scheme);
      const socket = await served.raw();
      let text = "";
      let isClosed = false;
      socket.on("data", (chunk: Uint8Array) => {
        text += Buffer.from(chunk).toString();
      });
      socket.on("close", () => {
        isClosed = true;
      });
      socket.write(`${REQUEST.replace("DERP", "h2c")}\r\n`);
      await until(() => isClosed, "the connection is closed");
      expect(text).toStartWith("HTTP/1.1 426 Upgrade Required\r\n");
      expect(text).toEndWith("DERP requires connection upgrade\n");
      const plain = await fetch(`${served.url}/derp`, { tls: { rejectUnauthorized: false } });
      expect(plain.status).toBe(426);
    });

    test("a client that reads nothing costs its sender nothing, holds little memory, and is ended", async () => {
      await using served = await Served.start(scheme, { limits: { writeMs: 3000 } });
      const stalled = await served.raw();
      const reader = new Reader(stalled, false);
      const { clientInfo, publicKey } = loginFrames(served.relay);
      stalled.write(Buffer.concat([Buffer.from(`${REQUEST}Derp-Fast-Start: 1\r\n\r\n`), clientInfo]));
      await until(() => reader.frames.length === 2, "the client that will stall is logged in");
      stalled.pause();
      const [sender, other] = [await served.connected(), await served.connected()];
      const packet = randomBytes(60_000);
      Bun.gc(true);
      const before = process.memoryUsage().rss;
      let most = 0;
      let sent = 0;
      await until(() => {
        for (let i = 0; i < 16; i++) if (sender.client.send(publicKey, packet)) sent++;
        // What is held counts, not what waits to be collected.
        Bun.gc(true);
        most = Math.max(most, process.memoryUsage().rss);
        return served.relay.stats().sclient_write_timeouts === 1;
      }, "the stalled client is ended");
      expect(sent * packet.length).toBeGreaterThan(20_000_000);
      expect(most - before).toBeLessThan(50_000_000);
      const dropped = served.relay.stats()['packets_dropped{reason="queue_head",kind="other"}']!;
      expect(dropped).toBeGreaterThan(100);
      expect(sender.client.state.connected).toBe(true);
      sender.client.send(other.key, Uint8Array.of(1));
      await until(() => other.packets.length === 1, "the sender still reaches others");
      await until(() => sender.gone.length === 0 && served.relay.stats().gauge_clients_total === 2, "it is forgotten");
    });

    test("who does not log in in time, and who talks nonsense, is closed; the relay goes on", async () => {
      await using served = await Served.start(scheme, { limits: { loginMs: 200 } });
      const silent = await served.raw();
      const reader = new Reader(silent, true);
      silent.write(`${REQUEST}\r\n`);
      await until(() => reader.isEnded, "the silent one is closed");
      expect(served.relay.stats().logins_timed_out).toBe(1);
      const [a, b] = [await served.connected(), await served.connected()];

      await fc.assert(
        fc.asyncProperty(
          fc.array(
            fc.oneof(
              fc.uint8Array({ maxLength: 400 }),
              fc
                .tuple(fc.nat(0x16), fc.uint8Array({ maxLength: 300 }))
                .map(([type, payload]) => encodeFrame(type, payload)),
            ),
            { maxLength: 5 },
          ),
          fc.constantFrom("login", "raw", "bare", "websocket", "bad websocket"),
          async (chunks, how) => {
            const socket = await served.raw();
            socket.resume();
            if (how === "login" || how === "raw") socket.write(`${REQUEST}Derp-Fast-Start: 1\r\n\r\n`);
            if (how === "websocket") socket.write(`${WS_REQUEST}Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n`);
            if (how === "bad websocket") socket.write(`${WS_REQUEST}Sec-WebSocket-Key: x\r\n\r\n`);
            if (how === "login") socket.write(loginFrames(served.relay).clientInfo);
            for (const chunk of chunks) socket.write(chunk);
            await Bun.sleep(1);
            socket.destroy();
          },
        ),
        { numRuns: 60 },
      );
      a.client.send(b.key, Uint8Array.of(1));
      await until(() => b.packets.length === 1, "the relay still serves");
      await until(() => served.relay.stats().gauge_current_connections === 2, "all strangers are forgotten");
      expect(served.relay.stats().gauge_half_open).toBe(0);
    });

    test("the node comes back by itself when the relay restarts, still at home, with its newest packets", async () => {
      await using served = await Served.start(scheme);
      const { port } = served.listener;
      const [a, b] = [await served.connected(), await served.connected()];
      a.client.notePreferred(true);
      await until(() => served.relay.stats().gauge_current_home_connections === 1, "the relay knows a's home");
      served.relay.close();
      await served.listener.close();
      await until(() => !a.client.state.connected && !b.client.state.connected, "both notice");
      await until(() => a.client.state.lastError?.includes("cannot connect") ?? false, "a says why");
      for (let i = 0; i < 40; i++) a.client.send(a.key, Uint8Array.of(i));
      expect(a.client.stats.dropped).toBe(8);
      await using again = await Served.start(scheme, {}, port);
      await until(() => a.client.state.connected && b.client.state.connected, "both are back");
      expect(a.client.state.lastError).toBeNull();
      await until(() => again.relay.stats().gauge_current_home_connections === 1, "a is at home again");
      await until(() => a.packets.length === 32, "what waited goes out");
      expect(a.packets).toEqual(Array.from({ length: 32 }, (_, i) => `${hex(a.key)} ${hex(Uint8Array.of(i + 8))}`));
      a.client.send(b.key, Uint8Array.of(99));
      await until(() => b.packets.at(-1) === `${hex(a.key)} 63`, "packets flow again");
      a.client.close();
      b.client.close();
    });
  });
}

test("probe endpoints answer as netcheck and captive portal detection expect", async () => {
  await using served = await Served.start("http");
  for (const path of ["/derp/probe", "/derp/latency-check"]) {
    for (const method of ["GET", "HEAD"]) {
      const answer = await fetch(served.url + path, { method });
      expect(answer.status).toBe(200);
      expect(answer.headers.get("access-control-allow-origin")).toBe("*");
      expect(await answer.text()).toBe("");
    }
    const post = await fetch(served.url + path, { method: "POST" });
    expect([post.status, await post.text()]).toEqual([405, "bogus probe method\n"]);
  }
  const challenge = { "X-Tailscale-Challenge": "ts_192.0.2.1" };
  const portal = await fetch(`${served.url}/generate_204?t=1`, { headers: challenge });
  expect(portal.status).toBe(204);
  expect(portal.headers.get("x-tailscale-response")).toBe("response ts_192.0.2.1");
  expect(portal.headers.get("cache-control")).toContain("no-store");
  for (const bad of ["a b", "x".repeat(65), "é"])
    expect(
      (
        await fetch(`${served.url}/generate_204`, {
          headers: { "X-Tailscale-Challenge": Buffer.from(bad).toString("latin1") },
        })
      ).headers.get("x-tailscale-response"),
    ).toBeNull();
  expect(await (await fetch(`${served.url}/robots.txt`)).text()).toContain("Disallow: /");
  const home = await fetch(`${served.url}/`);
  expect(home.headers.get("x-frame-options")).toBe("DENY");
  expect(await home.text()).toContain("relay");
});

test("the verifier gets the source address, and a refused client keeps saying so without being connected", async () => {
  const asked = new Set<string>();
  await using served = await Served.start("http", {
    verify: async (_key, ip) => {
      asked.add(ip);
      return false;
    },
  });
  const peer = served.client();
  await until(() => (served.relay.stats().logins_refused ?? 0) >= 2, "it is refused twice");
  expect([...asked]).toEqual(["127.0.0.1"]);
  expect(peer.client.state.connected).toBe(false);
  expect(peer.client.state.lastError).toContain("closed the connection");
});

test("too many half-open connections are answered 503", async () => {
  await using served = await Served.start("http", { limits: { halfOpenPerAddress: 1 } });
  const first = await served.raw();
  const reader = new Reader(first, true);
  first.write(`${REQUEST}\r\n`);
  await until(() => reader.frames.length === 1, "the first is greeted");
  const second = await served.raw();
  let answer = "";
  second.on("data", (chunk: Uint8Array) => {
    answer += Buffer.from(chunk).toString();
  });
  second.write(`${REQUEST}\r\n`);
  await until(() => second.destroyed, "the second is closed");
  expect(answer).toStartWith("HTTP/1.1 503 ");
});

test("behind a trusted proxy half-open connections count for the address that it names", async () => {
  await using served = await Served.start(
    "http",
    { limits: { halfOpenPerAddress: 1 } },
    0,
    parseTrustedProxies(["127.0.0.1"]),
  );
  const ask = async (client: string): Promise<string> => {
    const socket = await served.raw();
    let answer = "";
    socket.on("data", (chunk: Uint8Array) => {
      answer += Buffer.from(chunk).toString("latin1");
    });
    socket.write(`${REQUEST}X-Forwarded-For: ${client}\r\n\r\n`);
    await until(() => answer.includes("\r\n"), "an answer");
    return answer.slice(0, 12);
  };
  expect(await ask("192.0.2.1")).toBe("HTTP/1.1 101");
  expect(await ask("192.0.2.2")).toBe("HTTP/1.1 101");
  expect(await ask("192.0.2.1")).toBe("HTTP/1.1 503");
});

test("disconnect() ends a node's connection", async () => {
  await using served = await Served.start("http");
  const [a, b] = [await served.connected(), await served.connected()];
  b.client.send(a.key, Uint8Array.of(1));
  await until(() => a.packets.length === 1, "a knows b");
  expect(served.relay.disconnect(b.key)).toBe(1);
  await until(() => a.gone.length === 1, "a hears that b is gone");
});

describe.skipIf(!cert)("certificates", () => {
  const attempt = async (options: Partial<DerpClientOptions>, node: Record<string, unknown> = {}): Promise<string> => {
    await using served = await Served.start("https");
    const { client } = served.client({ region: served.region(node), tls: {}, ...options });
    await until(() => client.state.connected || client.state.lastError !== null, "it connects or says why not");
    return client.state.lastError ?? "connected";
  };

  test("unknown issuer is refused; a given root, a name of its own, a pin, and the test settings are accepted", async () => {
    const ca = { tls: { ca: cert!.cert } };
    expect(await attempt({})).toContain("self signed certificate");
    expect(await attempt(ca)).toBe("connected");
    expect(await attempt(ca, { HostName: "relay.test", IPv4: "127.0.0.1", IPv6: "none" })).toBe("connected");
    expect(await attempt(ca, { HostName: "other.test", IPv4: "127.0.0.1", IPv6: "none" })).toContain("other.test");
    const named = { HostName: "other.test", IPv4: "127.0.0.1", IPv6: "none", CertName: "relay.test" };
    expect(await attempt(ca, named)).toBe("connected");
    expect(await attempt({}, { CertName: `sha256-raw:${cert!.pin}` })).toBe("connected");
    expect(await attempt({}, { CertName: `sha256-raw:${"0".repeat(64)}` })).toContain("instead of 000");
    expect(await attempt({}, { ...named, CertName: `sha256-raw:${cert!.pin}` })).toContain(
      "not made out to other.test",
    );
    expect(await attempt({}, { InsecureForTests: true })).toBe("connected");
    expect(await attempt({ tls: { insecure: true } })).toBe("connected");
  });

  test("a pinned certificate counts only while it is valid", () => {
    const der = Buffer.from(cert!.cert.replace(/-----[^-]+-----|\s/g, ""), "base64");
    expect(checkPin(der, cert!.pin, "127.0.0.1", new Date())).toBeNull();
    expect(checkPin(der, cert!.pin, "127.0.0.1", new Date(Date.now() + 31 * 86_400_000))).toContain("valid from");
    expect(checkPin(undefined, cert!.pin, "127.0.0.1", new Date())).toContain("no certificate");
  });
});
