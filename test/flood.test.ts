// Many strangers at once: half-open upgrades, heads that never end, floods of registrations. The server answers the rest all
// the while. WEFT_FLOOD=10000 runs the full number (each connection takes two descriptors: `ulimit -n 30000`).
import { expect, setDefaultTimeout, test } from "bun:test";
import { connect, type Socket } from "node:net";
import { makeSettings, TestServer } from "../src/control/testing.ts";
import { until } from "./lib/mesh.ts";

setDefaultTimeout(300_000);
const COUNT = Number(process.env.WEFT_FLOOD ?? 600);

/** Connections that send `bytes` and then nothing, until `using` ends. */
class Strangers implements Disposable {
  private readonly sockets: Socket[] = [];
  open = 0;
  refused = 0;

  async add(port: number, count: number, bytes: string): Promise<void> {
    for (let left = count; left > 0; left -= 200) {
      await Promise.all(Array.from({ length: Math.min(200, left) }, () => this.one(port, bytes)));
    }
  }

  private one(port: number, bytes: string): Promise<void> {
    return new Promise((resolve) => {
      const socket = connect(port, "127.0.0.1", () => {
        this.open++;
        socket.write(bytes);
        resolve();
      });
      this.sockets.push(socket);
      socket.resume();
      socket.on("error", () => resolve());
      socket.on("close", () => {
        this.refused++;
      });
    });
  }

  [Symbol.dispose](): void {
    for (const socket of this.sockets) socket.destroy();
  }
}

/** A new node joins and gets its netmap; its peer hears of it. */
async function joins(server: TestServer, name: string, authKey: string): Promise<void> {
  const node = await server.join(name, authKey);
  const map = await node.stream();
  expect(map.self?.Name).toStartWith(`${name}.`);
  node.close();
}

const port = (server: TestServer) => Number(new URL(server.url).port);
const UPGRADE = "Host: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n";

test(`${COUNT} upgrades that stop after a wrong handshake, half a head, or nothing: a node joins all the same`, async () => {
  await using server = await TestServer.start();
  const key = await server.key({ aclTags: ["tag:a"], reusable: true });
  using strangers = new Strangers();
  const handshake = Buffer.alloc(101, 1).toString("base64");
  const kinds = [
    `POST /ts2021 HTTP/1.1\r\n${UPGRADE}X-Tailscale-Handshake: ${handshake}\r\n\r\n`,
    `POST /ts2021 HTTP/1.1\r\n${UPGRADE}`,
    "GET /key?v=140 HT",
    "",
  ];
  for (const [i, kind] of kinds.entries()) {
    await strangers.add(port(server), COUNT / kinds.length, kind);
    await joins(server, `n${i}`, key);
  }
  expect(strangers.open).toBe(COUNT);
  // Nobody is kept for longer than the time to finish a head.
  await until("all strangers are gone", () => strangers.refused === COUNT, 120);
  await joins(server, "after", key);
});

test("a flood of machines that ask for a login and never finish it: real nodes register, what waits stays bounded", async () => {
  await using server = await TestServer.start({
    settings: makeSettings({ login: { expiry: 900_000, maxPending: 50 } }),
  });
  const key = await server.key({ aclTags: ["tag:a"], reusable: true });
  const flooders = Array.from({ length: 20 }, (_, i) => server.node(`f${i}`));
  const flood = flooders.map(async (node) => {
    for (let n = 0; n < COUNT / 60; n++) {
      const { AuthURL } = await node.register({});
      expect(AuthURL).toContain("/register/hskey-authreq-");
    }
  });
  await joins(server, "second", key);
  await Promise.all(flood);
  expect(server.control.logins.list().length).toBeLessThanOrEqual(50);
  await joins(server, "third", key);
  for (const node of flooders) node.close();
});

test("a node that asks in a loop is told to wait, with every kind of request; its peers hear of each other meanwhile, and it is served again", async () => {
  const lines: string[] = [];
  await using server = await TestServer.start({ log: (line) => lines.push(line) });
  const key = await server.key({ aclTags: ["tag:a"], reusable: true });
  const looping = await server.join("looping", key);
  const kinds = [
    () => looping.lite({ Endpoints: [`192.0.2.1:${1 + Math.floor(Math.random() * 60_000)}`] }),
    () => looping.post("/machine/update-health", { NodeKey: looping.nodeKey, Subsys: "x", Error: "y" }),
    () => looping.post("/machine/register", { Version: 138, NodeKey: looping.nodeKey }),
    () => looping.post("/machine/map", looping.mapRequest({ ReadOnly: true })),
  ];
  const flood = Array.from({ length: 400 }, (_, i) => kinds[i % kinds.length]!().then(({ status }) => status));
  const [b, c] = [await server.join("b", key), await server.join("c", key)];
  const map = await c.stream();
  await b.lite({ Endpoints: ["198.51.100.7:41641"] });
  await until("the change", async () => map.peer("b")?.Endpoints?.includes("198.51.100.7:41641") ?? false, 20);
  const statuses = await Promise.all(flood);
  expect(new Set(statuses)).toEqual(new Set([200, 204, 429]));
  for (const kind of kinds.keys()) expect(statuses.filter((_, i) => i % kinds.length === kind)).toContain(429);
  expect(lines.filter((line) => line.includes("asks more than"))).toHaveLength(1);
  await until("it is served again", async () => (await looping.lite()).status === 200, 20);
});
