import { expect, test } from "bun:test";
import fc from "fast-check";
import { randomBytes } from "../crypto/keys.ts";
import { NoiseInitiator } from "../wire/noise.ts";
import {
  headerOf,
  initiator,
  RawClient,
  TestServer,
  HANDSHAKE_UPGRADE as UPGRADE,
  until,
  WebSocketNode,
} from "./testing.ts";

test("/key tells the Noise key to those who say a version that can use it", async () => {
  await using server = await TestServer.start();
  const page = await fetch(`${server.url}/key?v=138`);
  expect(await page.json()).toEqual({
    legacyPublicKey: `mkey:${"0".repeat(64)}`,
    publicKey: `mkey:${Buffer.from(server.control.noisePublicKey).toString("hex")}`,
  });
  for (const query of ["", "?v=", "?v=x", "?v=38", "?v=999999"])
    expect((await fetch(`${server.url}/key${query}`)).status).toBe(400);
  expect(await (await fetch(`${server.url}/health`)).json()).toEqual({ status: "pass" });
});

test("/verify admits registered nodes to the relay, nobody else, and bounds what it reads", async () => {
  await using server = await TestServer.start();
  const node = await server.join("a", await server.key({ user: await server.user("alice") }));
  const ask = async (body: string) => {
    const response = await fetch(`${server.url}/verify`, { method: "POST", body });
    return response.status === 200 ? ((await response.json()) as { Allow: boolean }).Allow : response.status;
  };
  expect(await ask(JSON.stringify({ NodePublic: node.nodeKey, Source: "192.0.2.1" }))).toBe(true);
  expect(await ask(JSON.stringify({ NodePublic: `nodekey:${"1".repeat(64)}` }))).toBe(false);
  for (const body of ["", "null", "[]", '{"NodePublic":7}', "garbage"]) expect(await ask(body)).toBe(false);
  expect(await ask("x".repeat(5000))).toBe(413);
  await node.register({ expiry: "1970-01-01T00:02:03Z" });
  expect(await ask(JSON.stringify({ NodePublic: node.nodeKey }))).toBe(false);
});

test("upgrades that are no handshake are refused in plain HTTP", async () => {
  await using server = await TestServer.start();
  const good = headerOf(initiator(server).initiation);
  const cases: [string, string][] = [
    [`POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: other\r\nConnection: upgrade\r\n${good}`, "400"],
    [`POST /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}`, "400"],
    [`POST /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}X-Tailscale-Handshake: !!!!\r\n`, "400"],
    [`POST /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}${headerOf(randomBytes(100))}`, "400"],
    [`PUT /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}${good}`, "405"],
    [`GET /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}${good}`, "400"],
    [`GET /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n`, "400"],
  ];
  for (const [head, status] of cases)
    expect(await (await RawClient.connect(server)).ask(head)).toStartWith(`HTTP/1.1 ${status} `);
  expect((await fetch(`${server.url}/ts2021`, { method: "POST" })).status).toBe(400);
  expect(server.control.stats().connections).toBe(0);
});

test("a handshake for another key ends with an error frame", async () => {
  await using server = await TestServer.start();
  const forAnother = new NoiseInitiator({
    version: 138,
    machinePrivate: randomBytes(32),
    ephemeralPrivate: randomBytes(32),
    controlPublic: (await import("../crypto/x25519.ts")).x25519Public(randomBytes(32)),
  });
  for (const initiation of [forAnother.initiation, randomBytes(101), new Uint8Array(101)]) {
    const head = `POST /ts2021 HTTP/1.1\r\nHost: x\r\n${UPGRADE}${headerOf(initiation)}`;
    const heard = await (await RawClient.connect(server)).ask(head);
    const frame = Buffer.from(heard.slice(heard.indexOf("\r\n\r\n") + 4), "latin1");
    expect(frame[0]).toBe(3);
    expect(frame.subarray(3).toString()).toStartWith("Noise handshake: ");
  }
  expect(server.control.stats().connections).toBe(0);
});

test("garbage in the records, and garbage instead of HTTP/2 inside them, end that connection and nothing else", async () => {
  await using server = await TestServer.start({ liveness: { interval: 10, idleTimeout: 1000 } });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const bystander = await (await server.join("bystander", authKey)).stream();
  const preface = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  const settings = Uint8Array.of(0, 0, 0, 4, 0, 0, 0, 0, 0);
  const http2Garbage = fc.oneof(
    fc.uint8Array({ maxLength: 200 }),
    fc.uint8Array({ maxLength: 400 }).map((bytes) => Buffer.concat([preface, bytes])),
    fc.uint8Array({ maxLength: 400 }).map((bytes) => Buffer.concat([preface, settings, bytes])),
    // A frame with a true header and nonsense in it: type, flags and stream of the fuzzer's choice.
    fc
      .tuple(fc.nat(9), fc.nat(255), fc.nat(5), fc.uint8Array({ maxLength: 60 }))
      .map(([type, flags, stream, body]) =>
        Buffer.concat([preface, settings, Uint8Array.of(0, 0, body.length, type, flags, 0, 0, 0, stream), body]),
      ),
  );
  const attack = fc.oneof(
    fc.record({ sealed: fc.constant(true), bytes: http2Garbage }),
    fc.record({ sealed: fc.constant(false), bytes: fc.uint8Array({ minLength: 1, maxLength: 300 }) }),
  );
  await fc.assert(
    fc.asyncProperty(attack, async ({ sealed, bytes }) => {
      const client = await RawClient.connect(server);
      const { sealer } = await client.handshake(server);
      client.socket.write(sealed ? sealer.seal(bytes) : bytes);
      client.socket.end();
    }),
    { numRuns: 150, seed: 1 },
  );
  await until(() => server.control.stats().connections === 1, "all but the bystander's connection to end");
  expect(server.control.stats()).toMatchObject({ maps: 1, streams: 1 });
  await server.join("later", authKey);
  await until(() => bystander.peer("later"), "the bystander to hear of a change");
});

test("requests that are wrong get a status and a sentence", async () => {
  await using server = await TestServer.start();
  const node = server.node("x");
  const ask = async (method: "GET" | "POST" | "HEAD", path: string, body = "") => {
    const answer = await node.client.request({ method, path, body }, 10_000, 60_000);
    return [answer.status, new TextDecoder().decode(answer.body)];
  };
  expect(await ask("POST", "/machine/register", "{")).toEqual([400, "the request body is not JSON"]);
  expect(await ask("POST", "/machine/map", "{}")).toEqual([400, "NodeKey is missing or zero"]);
  expect(await ask("POST", "/machine/register", "x".repeat(1_100_000))).toEqual([
    413,
    "the request body exceeds 1048576 bytes",
  ]);
  expect(await ask("POST", "/machine/map", JSON.stringify(node.mapRequest()))).toEqual([404, "node not found"]);
  expect(node.register({ version: 80 })).rejects.toThrow("400: this client is too old for this control server");
  expect((await ask("POST", "/machine/feature/query", "{}"))[0]).toBe(400);
  expect((await ask("POST", "/machine/tka/sign", "{}"))[0]).toBe(404);
  expect((await ask("POST", "/machine/tka/init/begin", "{}"))[0]).toBe(404);
  expect(await ask("POST", "/machine/update-health", "{}")).toEqual([204, ""]);
  expect(await ask("HEAD", "/machine/ping-response?id=1")).toEqual([200, ""]);
  expect((await ask("GET", "/machine/whoami"))[1]).toStartWith("mkey:");
  expect((await ask("GET", "/machine/register"))[0]).toBe(404);
});

test("one machine may hold several connections, but not any number", async () => {
  await using server = await TestServer.start();
  const machine = randomBytes(32);
  const nodes = Array.from({ length: 12 }, () => server.node("x", machine));
  for (const node of nodes) await node.client.request({ method: "GET", path: "/machine/whoami" }, 1000, 60_000);
  await until(() => server.control.stats().connections === 8, "the oldest connections to be closed");
});

test("a client that reads nothing costs no memory, and catches up with few messages when it reads again", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const writer = await server.join("writer", authKey);
  // This client's HTTP/2 windows hold 64 KB, one message.
  const reader = await WebSocketNode.connect(server);
  const nodeKey = `nodekey:${"7".repeat(64)}`;
  const hostinfo = { Hostname: "reader" };
  await reader.request("/machine/register", {
    Version: 138,
    NodeKey: nodeKey,
    Auth: { AuthKey: authKey },
    Hostinfo: hostinfo,
  });
  const stream = reader.open("/machine/map", { Version: 138, NodeKey: nodeKey, Stream: true, Hostinfo: hostinfo });
  stream.pause();
  await until(() => server.control.stats().maps === 1, "the stream to be open");
  const filler = "x".repeat(60_000);
  const changes = 25;
  for (let n = 0; n < changes; n++) {
    await writer.lite({ Hostinfo: { Hostname: "writer", DeviceModel: `${filler}${n}` } });
    await Bun.sleep(60); // Longer than the rest between messages: only the reader's slowness merges them.
  }
  let text = "";
  for await (const chunk of stream) {
    text += chunk.toString("latin1");
    if (text.includes(`${filler}${changes - 1}"`)) break;
  }
  const messages = text.split(filler).length - 1;
  expect(messages).toBeGreaterThan(2);
  expect(messages).toBeLessThan(15);
  reader.close();
});

test("a connection with thousands of requests goes on, and so does the map stream on it", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const node = await server.join("busy", authKey);
  const stream = await node.stream();
  // Most are told to wait (pace.ts).
  for (let round = 0; round < 15; round++)
    await Promise.all(Array.from({ length: 90 }, (_, i) => node.lite({ Endpoints: [`192.0.2.${i}:${1000 + round}`] })));
  expect(stream.ended).toBe(false);
  expect(server.control.stats()).toMatchObject({ connections: 1, maps: 1 });
}, 120_000);
