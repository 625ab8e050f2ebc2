import { afterEach, describe, expect, test } from "bun:test";
import type { AddressInfo } from "node:net";
import { createServer, type Server, type Socket } from "node:net";
import { hex, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey, x25519Public } from "../crypto/x25519.ts";
import {
  encodeFrame,
  encodeHealth,
  encodePeerGone,
  encodePing,
  encodeRecvPacket,
  encodeRestarting,
  encodeServerKey,
  FrameDecoder,
  FrameType,
  type ServerInfo,
  ServerLogin,
} from "../wire/derp.ts";
import type { DERPNode } from "../wire/tailcfg.ts";
import { DerpClient, type DerpClientOptions, TokenBucket } from "./derp-client.ts";
import { derpPort, dialTargets } from "./derp-dial.ts";

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

async function until(condition: () => boolean, what: string, ms = 60_000): Promise<void> {
  const deadline = performance.now() + ms;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`within ${ms} ms it did not happen that ${what}`);
    await Bun.sleep(2);
  }
}

/** A relay of which the test says what it does. */
class FakeRelay {
  readonly server: Server;
  sockets: Socket[] = [];
  /** Heads of requests. */
  requests: string[] = [];
  /** "type:payload in hex" of the frames behind ClientInfo, of all connections. */
  frames: string[] = [];
  logins = 0;
  /** Null: ServerInfo is withheld. */
  info: Partial<ServerInfo> | null = {};
  /** Sent instead of the answer to the upgrade. */
  instead: Uint8Array | null = null;
  readonly #privateKey = generatePrivateKey(randomBytes);
  readonly publicKey = x25519Public(this.#privateKey);

  constructor() {
    this.server = createServer((socket) => this.#serve(socket));
    cleanups.push(() => this.stop());
  }

  async listen(port = 0): Promise<this> {
    await new Promise<void>((resolve) => this.server.listen(port, "127.0.0.1", resolve));
    return this;
  }

  get node(): DERPNode {
    return { Name: "1a", RegionID: 1, HostName: "127.0.0.1", DERPPort: (this.server.address() as AddressInfo).port };
  }

  says(...frames: Uint8Array[]): void {
    this.sockets.at(-1)!.write(Buffer.concat(frames));
  }

  stop(): void {
    this.server.close();
    for (const socket of this.sockets) socket.destroy();
  }

  #serve(socket: Socket): void {
    this.sockets.push(socket);
    socket.on("error", () => {});
    const login = new ServerLogin(this.#privateKey, this.publicKey);
    const decoder = new FrameDecoder(new Int32Array(256).fill(1 << 20));
    let head: string | null = "";
    socket.on("data", (chunk: Uint8Array) => {
      if (head !== null) {
        head += Buffer.from(chunk).toString("latin1");
        if (!head.endsWith("\r\n\r\n")) return;
        this.requests.push(head);
        head = null;
        const answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
        socket.write(this.instead ?? Buffer.concat([Buffer.from(answer), login.greeting]));
        return;
      }
      decoder.feed(chunk, (type, buf, at, end) => {
        const payload = buf.subarray(at + 5, end);
        if (type === FrameType.ClientInfo) {
          login.receiveClientInfo(payload);
          this.logins++;
          if (this.info) socket.write(login.serverInfo(randomBytes(24), this.info));
        } else {
          this.frames.push(`${type}:${hex(payload)}`);
        }
        return true;
      });
    });
  }
}

function connect(nodes: DERPNode[], options: Partial<DerpClientOptions> = {}) {
  const packets: string[] = [];
  const gone: string[] = [];
  const client = new DerpClient({
    privateKey: generatePrivateKey(randomBytes),
    region: { RegionID: 1, Nodes: nodes },
    insecureHttp: true,
    onPacket: (source, packet) => packets.push(`${hex(source)} ${hex(packet)}`),
    onPeerGone: (key, reason) => gone.push(`${hex(key)} ${reason}`),
    ...options,
  });
  cleanups.push(() => client.close());
  return { client, packets, gone };
}

const KEY = new Uint8Array(32).fill(0xaa);

describe("the client", () => {
  test("asks as the reference does, and names the ideal node only on another one", async () => {
    const relay = await new FakeRelay().listen();
    const { client } = connect([relay.node]);
    await until(() => client.state.connected, "it connects");
    expect(relay.requests[0]).toStartWith(
      `GET /derp HTTP/1.1\r\nHost: 127.0.0.1:${relay.node.DERPPort}\r\nUpgrade: DERP\r\n`,
    );
    expect(relay.requests[0]).not.toContain("Ideal-Node");
    expect(client.state.node).toBe("1a");

    // Of the nodes before: one only does STUN, the other one refuses connections.
    const dead = await new FakeRelay().listen();
    const ideal = { ...dead.node, Name: "1x" };
    dead.stop();
    const second = connect([{ ...relay.node, Name: "1s", STUNOnly: true }, ideal, { ...relay.node, Name: "1b" }]);
    await until(() => second.client.state.connected, "it connects to the third");
    expect(relay.requests[1]).toContain("\r\nIdeal-Node: 1x\r\n");
    expect(second.client.state.node).toBe("1b");
  });

  test("does not wait for ServerInfo to send, but counts as connected only then", async () => {
    const relay = await new FakeRelay().listen();
    relay.info = null;
    const { client } = connect([relay.node]);
    client.notePreferred(true);
    client.send(KEY, Uint8Array.of(1));
    await until(() => relay.frames.length === 2, "both frames arrive");
    expect(relay.frames).toEqual([`7:01`, `4:${hex(KEY)}01`]);
    expect(client.state.connected).toBe(false);
  });

  test("answers Ping, takes both forms of PeerGone, skips what it does not know", async () => {
    const relay = await new FakeRelay().listen();
    const { client, packets, gone } = connect([relay.node]);
    await until(() => client.state.connected, "it connects");
    relay.says(
      encodePing(Uint8Array.from([1, 2, 3, 4, 5, 6, 7, 8])),
      encodePing(new Uint8Array(7)),
      encodeServerKey(relay.publicKey),
      encodeFrame(0x77, new Uint8Array(100_000)),
      encodeFrame(FrameType.PeerGone, KEY),
      encodePeerGone(KEY, 1),
      encodeHealth("disk full"),
      encodeRecvPacket(KEY, Uint8Array.of(5)),
    );
    await until(() => packets.length === 1 && relay.frames.length === 1, "all is read");
    expect(relay.frames).toEqual(["19:0102030405060708"]);
    expect(gone).toEqual([`${hex(KEY)} 0`, `${hex(KEY)} 1`]);
    expect(packets).toEqual([`${hex(KEY)} 05`]);
    expect(client.state).toMatchObject({ health: "disk full", connected: true });
    relay.says(encodeHealth(""));
    await until(() => client.state.health === "", "the relay is well again");
  });

  test("obeys the relay's token bucket", async () => {
    const relay = await new FakeRelay().listen();
    relay.info = { tokenBucketBytesPerSecond: 1, tokenBucketBytesBurst: 300 };
    const { client } = connect([relay.node]);
    await until(() => client.state.connected, "it connects");
    const accepted = Array.from({ length: 5 }, () => client.send(KEY, new Uint8Array(63)));
    expect(accepted).toEqual([true, true, true, false, false]);
    expect(client.stats.dropped).toBe(2);
  });

  test("gives a silent relay up, says so, and comes back", async () => {
    const relay = await new FakeRelay().listen();
    const states: string[] = [];
    const { client } = connect([relay.node], {
      receiveTimeout: 60,
      onState: (state) => states.push(state.lastError ?? (state.connected ? "connected" : "off")),
    });
    await until(() => relay.logins >= 2, "it logs in again");
    await until(() => states.length >= 3, "it tells");
    expect(states.slice(0, 3)).toEqual(["connected", "the DERP server sent nothing for 0.06 s", "connected"]);
    client.close();
    expect(client.state.connected).toBe(false);
  });

  test("waits as long as a restarting relay asks", async () => {
    const relay = await new FakeRelay().listen();
    const { client } = connect([relay.node]);
    await until(() => client.state.connected, "it connects");
    relay.says(encodeRestarting({ reconnectIn: 300, tryFor: 1000 }));
    relay.sockets.at(-1)!.end();
    await until(() => !client.state.connected, "it notices");
    const lostAt = performance.now();
    await until(() => client.state.connected, "it is back");
    expect(performance.now() - lostAt).toBeGreaterThan(250);
  });

  test("renews its connection on request; pings fail when it is lost", async () => {
    const relay = await new FakeRelay().listen();
    const { client } = connect([relay.node]);
    await expect(client.ping()).rejects.toThrow("not connected");
    await until(() => client.state.connected, "it connects");
    const ping = client.ping();
    client.reconnect();
    await expect(ping).rejects.toThrow("lost its connection");
    await until(() => relay.logins === 2 && client.state.connected, "it connects anew");
  });

  test("what is no DERP server is named", async () => {
    const cases: [answer: string, error: string][] = [
      ["HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"],
      ["SSH-2.0-x\r\n\r\n", "does not speak HTTP"],
      ["HTTP/1.1 101 OK\r\nUpgrade: DERP\r\n\r\n\x06\0\0\0\0", "does not begin with its key"],
      [`HTTP/1.1 101 OK\r\nUpgrade: DERP\r\n\r\n\x01\0\0\0\x28${"x".repeat(40)}`, "magic"],
      [`HTTP/1.1 101 OK\r\nUpgrade: DERP\r\n\r\n\x01\x7f\0\0\0`, "more than its maximum"],
    ];
    for (const [answer, error] of cases) {
      const relay = await new FakeRelay().listen();
      relay.instead = Buffer.from(answer, "latin1");
      const { client } = connect([relay.node]);
      await until(() => client.state.lastError !== null, "it says what is wrong");
      expect(client.state.lastError).toContain(error);
      client.close();
      relay.stop();
    }
    const { client } = connect([]);
    await until(() => client.state.lastError !== null, "it says what is wrong");
    expect(client.state.lastError).toBe("DERP region 1 has no node to connect to");
  });

  test("does not grow while there is no relay", () => {
    const dead = { Name: "1a", RegionID: 1, HostName: "127.0.0.1", DERPPort: 1 };
    const { client } = connect([dead]);
    for (let i = 0; i < 1000; i++) expect(client.send(KEY, new Uint8Array(1000))).toBe(true);
    expect(client.stats.dropped).toBe(1000 - 32);
  });
});

describe("pure parts", () => {
  test("the token bucket fills at its rate up to its burst", () => {
    const bucket = new TokenBucket(1000, 500, 0);
    expect(bucket.take(500, 0)).toBe(true);
    expect(bucket.take(1, 0)).toBe(false);
    expect(bucket.take(100, 100)).toBe(true);
    expect(bucket.take(500, 10_000)).toBe(true);
    expect(bucket.take(1, 10_000)).toBe(false);
  });

  test("which addresses of a node are dialled", () => {
    const targets = (node: Partial<DERPNode>) =>
      dialTargets({ Name: "1a", RegionID: 1, HostName: "derp.example.com", ...node }).map(
        (t) => `${t.family} ${t.host}`,
      );
    expect(targets({})).toEqual(["4 derp.example.com", "6 derp.example.com"]);
    expect(targets({ IPv4: "192.0.2.1", IPv6: "2001:db8::1" })).toEqual(["4 192.0.2.1", "6 2001:db8::1"]);
    expect(targets({ IPv4: "192.0.2.1", IPv6: "none" })).toEqual(["4 192.0.2.1"]);
    expect(targets({ IPv4: "none", IPv6: "none" })).toEqual([]);
    expect(targets({ HostName: "192.0.2.1" })).toEqual(["4 192.0.2.1"]);
    expect(targets({ HostName: "2001:db8::1" })).toEqual(["6 2001:db8::1"]);
    expect(targets({ HostName: "192.0.2.1", IPv6: "2001:db8::1" })).toEqual(["4 192.0.2.1", "6 2001:db8::1"]);
    expect(targets({ IPv4: "2001:db8::1", IPv6: "none" })).toEqual([]);
  });

  test("ports: of the map, else 443, or 3340 without TLS", () => {
    const node = { Name: "1a", RegionID: 1, HostName: "x" };
    expect([derpPort(node, false), derpPort(node, true)]).toEqual([443, 3340]);
    expect([derpPort({ ...node, DERPPort: 8443 }, false), derpPort({ ...node, DERPPort: 80 }, true)]).toEqual([
      8443, 80,
    ]);
  });
});
