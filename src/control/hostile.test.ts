// What hostile strangers and hostile nodes may send, against a running server: it answers the others all the while.
import { expect, test } from "bun:test";
import { join } from "node:path";
import { randomBytes } from "../crypto/keys.ts";
import type * as tc from "../wire/tailcfg.ts";
import { Store } from "./store.ts";
import { RawClient, type TestNode, TestServer, until, WebSocketNode } from "./testing.ts";

const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");

/** An HTTP/2 frame (RFC 9113, section 4.1). */
function frame(type: number, flags: number, stream: number, body: Uint8Array = new Uint8Array()): Buffer {
  const bytes = Buffer.alloc(9 + body.length);
  bytes.writeUIntBE(body.length, 0, 3);
  bytes[3] = type;
  bytes[4] = flags;
  bytes.writeUInt32BE(stream, 5);
  bytes.set(body, 9);
  return bytes;
}

/** A header field that no table has (RFC 7541, section 6.2.2). */
function field(name: string, value: string): Buffer {
  const text = (part: string) => Buffer.concat([Buffer.of(part.length), Buffer.from(part)]);
  return Buffer.concat([Buffer.of(0), text(name), text(value)]);
}

const REQUEST = Buffer.concat([
  ...[field(":method", "POST"), field(":scheme", "https"), field(":authority", "x"), field(":path", "/machine/map")],
]);

/** A node that asks again and again is served while `attack` runs. */
async function servedDuring(node: TestNode, attack: Promise<unknown>): Promise<number> {
  let isOver = false;
  const over = attack.finally(() => {
    isOver = true;
  });
  let served = 0;
  do {
    expect((await node.lite()).status).toBe(200);
    served++;
    // Slower than a node may ask (pace.ts).
    await Bun.sleep(100);
  } while (!isOver);
  await over;
  return served;
}

const FLOODS: Record<string, (n: number) => Buffer> = {
  pings: () => frame(6, 0, 0, Buffer.alloc(8)),
  settings: () => frame(4, 0, 0),
  "requests that are taken back at once": (n) =>
    Buffer.concat([frame(1, 4, 2 * n + 1, REQUEST), frame(3, 0, 2 * n + 1, Buffer.of(0, 0, 0, 8))]),
  "a head that never ends": (n) => (n === 0 ? frame(1, 0, 1, REQUEST) : frame(9, 0, 1, field("a", "b".repeat(100)))),
};

for (const [name, next] of Object.entries(FLOODS))
  test(`a stranger floods HTTP/2 with ${name} and reads nothing: his connection ends, a node is served meanwhile`, async () => {
    await using server = await TestServer.start();
    const node = await server.join("node", await server.key({ user: await server.user("alice") }));
    const stranger = await RawClient.connect(server);
    const { sealer } = await stranger.handshake(server);
    stranger.socket.pause();
    stranger.socket.write(sealer.seal(Buffer.concat([PREFACE, frame(4, 0, 0)])));
    const flood = async () => {
      const end = performance.now() + 90_000;
      for (let n = 0; server.control.stats().connections > 1 || n === 0; ) {
        if (performance.now() > end) throw new Error("the server puts up with it");
        const frames = Array.from({ length: 200 }, () => next(n++));
        // Without waiting for the server to take it, so that all of it is in its hands when it reads.
        stranger.socket.write(sealer.seal(Buffer.concat(frames)));
        await Bun.sleep(0);
        if (n > 2_000_000) throw new Error(`the server has taken ${n} frames`);
      }
    };
    expect(await servedDuring(node, flood())).toBeGreaterThan(0);
    stranger.socket.destroy();
  }, 120_000);

/** The client has no word for PATCH, which is what some endpoints want. */
type Method = "POST";
const PATCH = "PATCH" as Method;
const deep = (open: string, close: string) => open.repeat(10_000) + close.repeat(10_000);

test("JSON of 1 MiB, of depth 10,000 and of the wrong shape at every endpoint of machines: a refusal, and never a fault", async () => {
  const faults: string[] = [];
  await using server = await TestServer.start({ log: (line) => faults.push(line) });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const node = await server.join("node", authKey);
  const { nodeKey } = node;
  const stranger = server.node("stranger");
  const hostile = [
    deep("[", "]"),
    `{"a":${deep("[", "]")}}`,
    `{"NodeKey":"${nodeKey}","Version":138,"Hostinfo":{"a":${deep("[", "]")}},"Update":{"custom:a":${deep("[", "]")}}}`,
    `{"NodeKey":"${nodeKey}","Version":138,"Update":${deep('{"custom:a":', "}").replace(":}", ":1}")}}`,
    `{"NodeKey":"${nodeKey}","Version":138,"Hostinfo":{${`"k":"${"x".repeat(100)}",`.repeat(9000)}"z":1}}`,
    `{"NodeKey":"${nodeKey}","Version":138,"Endpoints":[${'"192.0.2.1:1",'.repeat(60_000)}"x"]}`,
    `{"NodeKey":"${nodeKey}","Version":138,"__proto__":{"Stream":true},"constructor":{"prototype":{"polluted":1}}}`,
    `{"NodeKey":"${nodeKey}","Version":1e308,"Audience":[],"Name":{},"Feature":7,"Action":null,"Subsys":[]}`,
    `"${"x".repeat(1_048_000)}"`,
    "x".repeat(1_048_577),
    "",
  ];
  const endpoints: [method: Method, path: string][] = [
    ...["register", "map", "update-health", "audit-log", "feature/query", "set-dns", "id-token"].map(
      (name): [Method, string] => ["POST", `/machine/${name}`],
    ),
    [PATCH, "/machine/set-device-attr"],
    ["POST", "/machine/ping-response?id=1"],
    ["POST", "/machine/webclient/init/1/to/2"],
  ];
  for (const [method, path] of endpoints)
    for (const [i, body] of hostile.entries())
      for (const who of [node, stranger]) {
        const { status } = await who.client.request({ method, path, body }, 1 << 24, 60_000);
        expect({ path, i, isFault: status >= 500 }).toEqual({ path, i, isFault: false });
      }
  expect(faults.filter((line) => line.includes("failed"))).toEqual([]);
  expect(({} as Record<string, unknown>).polluted).toBeUndefined();
  expect((await (await server.join("later", authKey)).stream()).peers.size).toBe(1);
}, 120_000);

test("a node that names another's key, or none, is told nothing at any endpoint", async () => {
  await using server = await TestServer.start();
  const [alice, bob] = [await server.user("alice"), await server.user("bob")];
  const victim = await server.join("victim", await server.key({ user: alice }));
  const thief = await server.join("thief", await server.key({ user: bob }));
  const ask = async (method: Method, path: string, more: object) => {
    const body = JSON.stringify({ Version: 138, NodeKey: victim.nodeKey, ...more });
    return (await thief.client.request({ method, path: `/machine/${path}`, body }, 1 << 20, 60_000)).status;
  };
  expect(await ask("POST", "map", { OmitPeers: true })).toBe(404);
  expect(await ask("POST", "map", { Stream: true })).toBe(404);
  expect(await ask("POST", "update-health", { Subsys: "x", Error: "y" })).toBe(404);
  expect(await ask("POST", "audit-log", { Action: "DISCONNECT_NODE" })).toBe(404);
  expect(await ask("POST", "feature/query", { Feature: "serve" })).toBe(404);
  expect(await ask("POST", "set-dns", { Name: "_acme-challenge.victim.net.test", Type: "TXT", Value: "x" })).toBe(404);
  expect(await ask("POST", "id-token", { Audience: "x" })).toBe(404);
  expect(await ask(PATCH, "set-device-attr", { Update: { "custom:a": 1 } })).toBe(404);
  const check = await thief.client.request(
    { method: "GET", path: "/machine/ssh/action/2/to/1?local_user=root" },
    1 << 20,
    60_000,
  );
  expect(check.status).toBe(404);
  expect(server.control.health.list()).toEqual({});
  expect((await victim.stream()).self?.Name).toBe("victim.net.test.");
});

test("hostile Hostinfo reaches peers and administrators as what it should have been", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const watcher = await (await server.join("watcher", authKey)).stream();
  const name = "\u001b]0;evil\u0007\u001b[2J\u009b31m\u202egnp.exe\u2066\n1 | admin";
  const hostinfos = [
    `{"Hostname":${JSON.stringify(name)},"OS":${JSON.stringify(name)},"DistroVersion":[],"Package":{}}`,
    `{"Hostname":"a","NetInfo":{"DERPLatency":[1,2],"PreferredDERP":"1","__proto__":{"polluted":1}},"RoutableIPs":{}}`,
    `{"Hostname":"b","NetInfo":{"DERPLatency":{"__proto__":1,"1-v4":"x","constructor-v4":1},"PreferredDERP":1e300}}`,
    `{"Hostname":"c","RoutableIPs":[7,null,{},"0.0.0.0/99"],"Services":{"0":1},"sshHostKeys":"x","Location":[]}`,
    `{"Hostname":"d","Distro":["x"],"DistroVersion":1,"ShieldsUp":"yes","__proto__":{"polluted":1}}`,
    `{"Hostname":"${"e".repeat(60_000)}","DeviceModel":"\\ud800\\u0000"}`,
  ];
  for (const [i, hostinfo] of hostinfos.entries()) {
    const node = await server.join(`n${i}`, authKey);
    const body = `{"Version":138,"NodeKey":"${node.nodeKey}","OmitPeers":true,"Hostinfo":${hostinfo}}`;
    expect((await node.post("/machine/map", body)).status).toBe(200);
  }
  await until(() => watcher.peers.size === hostinfos.length && watcher.peer("e".repeat(63)), "all of them");
  const peer = watcher.peer("0-evil-2j-31m-gnp-exe-1-admin") as tc.Node;
  expect(peer.Hostinfo).toEqual({ Hostname: name, OS: name });
  for (const { HomeDERP, Hostinfo } of watcher.peers.values()) {
    expect(HomeDERP).toBeUndefined();
    expect(Hostinfo?.RoutableIPs).toBeUndefined();
  }
  for (const path of ["v1/node", "v2/tailnet/-/devices?fields=all"]) {
    const response = await fetch(`http://weft/api/${path}`, { unix: server.control.adminSocket });
    expect(response.status).toBe(200);
    expect(await response.text()).not.toMatch(/[\u0000-\u001f]/);
  }
  expect(({} as Record<string, unknown>).polluted).toBeUndefined();
});

test("a name in the store that is none of DNS leaves out that peer alone, and says so", async () => {
  const lines: string[] = [];
  await using first = await TestServer.start();
  const authKey = await first.key({ user: await first.user("alice"), reusable: true });
  const nodes = [await first.join("a", authKey), await first.join("b", authKey), await first.join("c", authKey)];
  await first.stop();
  const store = await Store.open({ type: "sqlite", path: join(first.dataDir, "weft.sqlite") });
  const b = (await store.load()).nodes!.find(({ givenName }) => givenName === "b")!;
  await store.write([{ nodes: [{ ...b, givenName: "b".repeat(300) }] }]);
  await store.close();
  await using again = await TestServer.start({ dataDir: first.dataDir, log: (line) => lines.push(line) });
  const a = again.node("a", nodes[0]!.machinePrivate);
  a.nodeKey = nodes[0]!.nodeKey;
  const map = await a.stream();
  expect([...map.peers.values()].map(({ Name }) => Name)).toEqual(["c.net.test."]);
  expect(lines.filter((line) => line.includes("name of node 2"))).toHaveLength(1);
  await again.admin("POST", "/node/2/rename/good");
  await until(() => map.peer("good"), "the peer with its new name");
});

test("a node that opens a map stream and never reads while 1,000 changes happen: others are told, its own changes merge", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  // One machine may not ask so often (pace.ts).
  const writers = await Promise.all(Array.from({ length: 10 }, (_, i) => server.join(`writer-${i}`, authKey)));
  const bystander = await (await server.join("bystander", authKey)).stream();
  const reader = await WebSocketNode.connect(server);
  const request = { Version: 138, NodeKey: `nodekey:${"7".repeat(64)}`, Hostinfo: { Hostname: "reader" } };
  await reader.request("/machine/register", { ...request, Auth: { AuthKey: authKey } });
  const stream = reader.open("/machine/map", { ...request, Stream: true });
  stream.pause();
  await until(() => server.control.stats().maps === 2, "the stream to be open");
  // The windows of this client hold 64 KiB: a dozen of such messages.
  const filler = "x".repeat(5_000);
  const model = (n: number) => `${filler}${n}.`;
  for (let n = 0; n < 1000; n++) {
    const hostinfo = { Hostname: `writer-${n % 10}`, DeviceModel: model(n) } as tc.Hostinfo;
    expect((await writers[n % 10]!.lite({ Hostinfo: hostinfo })).status).toBe(200);
  }
  await until(() => bystander.peer("writer-9")?.Hostinfo?.DeviceModel === model(999), "the bystander to know the last");
  let text = "";
  for await (const chunk of stream) {
    text += chunk.toString("latin1");
    if (text.includes(model(999))) break;
  }
  expect(text.split(filler).length - 1).toBeLessThan(60);
  expect(bystander.ended).toBe(false);
  reader.close();
}, 120_000);

test("strangers who hold as many connections as there may be make room for others, and push out no node at work", async () => {
  await using server = await TestServer.start({ maxConnections: 6 });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const atWork = await (await server.join("a", authKey)).stream();
  const strangers = Array.from({ length: 12 }, () => server.node("x", randomBytes(32)));
  for (const node of strangers) await node.client.request({ method: "GET", path: "/machine/whoami" }, 1000, 60_000);
  expect(server.control.stats().connections).toBeLessThanOrEqual(6);
  await server.join("b", authKey);
  await until(() => atWork.peer("b"), "the node at work to hear of the new one");
});
