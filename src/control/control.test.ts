import { expect, test } from "bun:test";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { Cable, makeSettings, TestNode, TestServer, until, WebSocketNode } from "./testing.ts";

test("two nodes join with one reusable key, see each other, and hear of changes as patches", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const a = await server.join("web", authKey);
  expect((await a.lite({ Endpoints: ["192.0.2.1:41641"] })).status).toBe(200);
  const mapA = await a.stream();
  expect(mapA.self).toMatchObject({
    ID: 1,
    StableID: "1",
    Name: "web.net.test.",
    User: 1,
    Key: a.nodeKey,
    Addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"],
    AllowedIPs: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"],
    MachineAuthorized: true,
    Online: true,
  });
  expect(mapA.messages[0]).toMatchObject({
    Domain: "net.test",
    CollectServices: false,
    Debug: { DisableLogTail: true },
    PacketFilters: { base: [{ SrcIPs: ["*"], DstPorts: [{ IP: "*", Ports: { First: 0, Last: 65535 } }] }] },
    DNSConfig: { Domains: ["net.test"], Proxied: true },
    UserProfiles: [{ ID: 1, LoginName: "alice", DisplayName: "alice" }],
  });
  expect(mapA.messages[0]!.Peers).toBeUndefined();

  const b = await server.join("web", authKey);
  const peer = await until(() => mapA.peer("web-1"), "the second node");
  expect(peer).toMatchObject({ ID: 2, Online: false, Key: b.nodeKey });
  const mapB = await b.stream();
  expect(mapB.peer("web")).toMatchObject({ Endpoints: ["192.0.2.1:41641"], DiscoKey: a.discoKey, Online: true });
  await until(() => mapA.peer("web-1")?.Online, "the second node to be online");

  const before = mapB.messages.length;
  await a.lite({
    Endpoints: ["192.0.2.9:1"],
    Hostinfo: { OS: "linux", Hostname: "web", NetInfo: { PreferredDERP: 1 } },
  });
  await until(() => mapB.peer("web")?.HomeDERP === 1, "the home relay");
  expect(mapB.messages.slice(before)).toEqual([
    { PeersChangedPatch: [{ NodeID: 1, Endpoints: ["192.0.2.9:1"], DERPRegion: 1 }] },
  ]);
});

test("a small update without NetInfo keeps the home relay, and a stream request overwrites nothing", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const mapB = await b.stream();
  const hostinfo = { OS: "linux", Hostname: "a" };
  await a.lite({ Endpoints: ["192.0.2.1:1"], Hostinfo: { ...hostinfo, NetInfo: { PreferredDERP: 7 } } });
  await a.lite({ Endpoints: ["192.0.2.1:1", "192.0.2.2:2"], Hostinfo: hostinfo });
  await until(() => mapB.peer("a")?.Endpoints?.length === 2, "the endpoints");
  expect(mapB.peer("a")?.HomeDERP).toBe(7);
  const stale = { DiscoKey: formatKey("discokey", new Uint8Array(32)), Endpoints: ["198.51.100.1:9"] };
  await a.stream({ ...stale, Hostinfo: { OS: "windows", Hostname: "old" } });
  await until(() => mapB.peer("a")?.Online, "a to be online");
  expect(mapB.peer("a")).toMatchObject({
    DiscoKey: a.discoKey,
    Endpoints: ["192.0.2.1:1", "192.0.2.2:2"],
    HomeDERP: 7,
  });
});

test("what nothing is known of is taken from the stream request: some clients send no small update", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  await a.stream({ Endpoints: ["192.0.2.1:1"], Hostinfo: { NetInfo: { PreferredDERP: 3 } } });
  const mapB = await b.stream();
  expect(mapB.peer("a")).toMatchObject({ DiscoKey: a.discoKey, Endpoints: ["192.0.2.1:1"], HomeDERP: 3 });
});

test("keep-alives come when nothing else does, in identical bytes; raw JSON is served to who asks for it", async () => {
  await using server = await TestServer.start({ keepAlive: { every: 20, jitter: 5 } });
  const a = await server.join("a", await server.key({ user: await server.user("alice") }));
  const map = await a.stream();
  await until(() => map.frames.length >= 3, "keep-alives");
  expect(map.messages.slice(1, 3)).toEqual([{ KeepAlive: true }, { KeepAlive: true }]);
  expect(Buffer.compare(map.frames[1]!, map.frames[2]!)).toBe(0);
  const raw = await a.stream({ Compress: "" });
  await until(() => raw.messages.length >= 2, "a raw keep-alive");
  expect(Buffer.from(raw.frames[1]!).toString()).toBe('{"KeepAlive":true}');
  const silent = await a.stream({ KeepAlive: false });
  await until(() => raw.ended, "the replaced stream to end");
  expect(silent.messages).toHaveLength(1);
});

test("a new stream replaces the old one, and the old one's end does not take the node offline", async () => {
  await using server = await TestServer.start({ offlineGrace: 30 });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const mapB = await b.stream();
  const first = await a.stream();
  await until(() => mapB.peer("a")?.Online, "a to be online");
  const second = await a.stream();
  await until(() => first.ended, "the first stream to end");
  expect(server.control.stats().maps).toBe(2);
  const c = await server.join("c", authKey);
  await until(() => second.peer("c") && mapB.peer("c"), "both streams to tell of c");
  await c.stream();
  await Bun.sleep(60); // longer than the grace: nothing may happen in it
  expect(mapB.messages.some((m) => m.PeersChangedPatch?.some((patch) => patch?.Online === false))).toBe(false);
  a.close();
  await until(() => mapB.peer("a")?.Online === false, "a to be offline");
  expect(mapB.peer("a")?.LastSeen).toBeString();
  await until(() => server.control.stats().connections === 2, "a's connection to be forgotten");
});

test("a peer that vanished without a word is noticed", async () => {
  const liveness = { interval: 50, pingAfter: 100, pingTimeout: 1000 };
  await using server = await TestServer.start({ offlineGrace: 10, liveness });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  await using cable = await Cable.to(server.listener.port);
  const a = new TestNode(cable.url, "a");
  server.nodes.push(a);
  await a.register({ authKey });
  const b = await server.join("b", authKey);
  const mapB = await b.stream();
  const mapA = await a.stream();
  await until(() => mapB.peer("a")?.Online, "a to be online");
  cable.cut();
  expect(mapA.ended).toBe(false);
  await until(() => mapB.peer("a")?.Online === false, "a to be given up");
  expect(mapB.ended).toBe(false);
});

test("an idle connection without requests is closed", async () => {
  await using server = await TestServer.start({ liveness: { interval: 10, idleTimeout: 300 } });
  const node = server.node("x");
  const { status } = await node.client.request({ method: "GET", path: "/machine/whoami" }, 1000, 60_000);
  expect(status).toBe(200);
  await until(() => server.control.stats().connections === 0, "the connection to be closed");
});

test("a node on the web speaks over a WebSocket: no early payload, the same answers", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice") });
  const socket = await WebSocketNode.connect(server);
  const registered = await socket.request("/machine/register", {
    Version: 138,
    NodeKey: formatKey("nodekey", randomBytes(32)),
    Auth: { AuthKey: authKey },
    Hostinfo: { Hostname: "browser" },
  });
  expect(JSON.parse(registered)).toMatchObject({ Error: "", MachineAuthorized: true });
  expect(server.control.stats()).toMatchObject({ connections: 1, nodes: 1 });
  socket.close();
  await until(() => server.control.stats().connections === 0, "the connection to be forgotten");
});

test("pre-auth keys: unknown, expired, used up, and one use that ten nodes race for", async () => {
  await using server = await TestServer.start();
  const user = await server.user("alice");
  const unknown = `hskey-auth-${"0".repeat(12)}-${"0".repeat(64)}`;
  expect((await server.node("x").register({ authKey: unknown })).Error).toContain("does not know this pre-auth key");
  expect((await server.node("x").register({ authKey: "nonsense" })).Error).toContain("does not know this pre-auth key");

  const expiring = await server.key({ user });
  await server.admin("POST", "/preauthkey/expire", { id: 1 });
  expect((await server.node("x").register({ authKey: expiring })).Error).toContain("expired");

  const single = await server.key({ user });
  const wrongSecret = `${single.slice(0, -1)}${single.endsWith("0") ? "1" : "0"}`;
  expect((await server.node("x").register({ authKey: wrongSecret })).Error).toContain("does not know");
  const racers = Array.from({ length: 10 }, (_, i) => server.node(`racer-${i}`));
  const answers = await Promise.all(racers.map((racer) => racer.register({ authKey: single })));
  expect(answers.filter((answer) => !answer.Error)).toHaveLength(1);
  expect(answers.filter((answer) => answer.Error?.includes("has been used"))).toHaveLength(9);
  expect(server.control.stats().nodes).toBe(1);
});

test("one machine that registers twice at once becomes one node and uses one key once", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice") });
  const node = server.node("x");
  const answers = await Promise.all([1, 2, 3].map(() => node.register({ authKey })));
  expect(answers.map((answer) => answer.Error)).toEqual(["", "", ""]);
  expect(server.control.stats().nodes).toBe(1);
  // A container that restarts with its state presents the used key again.
  expect((await node.register({ authKey })).Error).toBe("");
});

test("a node key belongs to the machine that registered it", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const a = await server.join("a", authKey);
  const thief = server.node("thief");
  thief.nodeKey = a.nodeKey;
  expect((await thief.register({ authKey })).Error).toContain("belongs to another machine");
  expect((await thief.register({ expiry: "1970-01-01T00:02:03Z" })).Error).toContain("belongs to another machine");
  expect(await thief.lite()).toEqual({ status: 404, text: "node not found" });
  expect(thief.stream()).rejects.toThrow("404");
  const rotating = server.node("rotating");
  expect((await rotating.register({ oldNodeKey: a.nodeKey })).AuthURL).toContain("/register/");
  expect((await a.lite()).status).toBe(200);
});

test("logout expires the node; the same key is told to change, and a new one comes back to the same id and address", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const mapB = await b.stream();
  expect(await a.register({ expiry: "1970-01-01T00:02:03Z" })).toMatchObject({ NodeKeyExpired: true });
  await until(() => mapB.peer("a")?.Expired, "a to be expired");
  expect(await a.register({ authKey })).toMatchObject({ NodeKeyExpired: true });
  const expired = await a.stream();
  expect(expired.self).toMatchObject({ Expired: true, MachineAuthorized: false });
  const oldNodeKey = a.rotate();
  expect((await a.register({ oldNodeKey })).AuthURL).toContain("/register/");
  expect(await a.register({ oldNodeKey, authKey })).toMatchObject({ Error: "", MachineAuthorized: true });
  await until(() => mapB.peer("a")?.Key === a.nodeKey && !mapB.peer("a")?.Expired, "a to be back");
  expect((await a.stream()).self).toMatchObject({ ID: 1, Addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"] });
});

test("a node key is rotated with OldNodeKey: same id and addresses, peers get one patch with everything", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  await a.lite({ Endpoints: ["192.0.2.1:1"] });
  const mapB = await b.stream();
  const before = mapB.messages.length;
  const oldNodeKey = a.rotate();
  expect(await a.register({ oldNodeKey, authKey })).toMatchObject({ Error: "", MachineAuthorized: true });
  await until(() => mapB.peer("a")?.Key === a.nodeKey, "the new key");
  expect(mapB.messages.slice(before)).toEqual([
    {
      PeersChangedPatch: [
        {
          NodeID: 1,
          Key: a.nodeKey,
          DiscoKey: a.discoKey,
          Endpoints: ["192.0.2.1:1"],
          KeyExpiry: "0001-01-01T00:00:00Z",
        },
      ],
    },
  ]);
});

test("an expiry can be brought forward by the node and by the administrator, never put off by the node", async () => {
  let now = Date.parse("2030-01-01T00:00:00Z");
  await using server = await TestServer.start({ now: () => now });
  const authKey = await server.key({
    user: await server.user("alice"),
    reusable: true,
    expiration: "2030-02-01T00:00:00Z",
  });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const mapA = await a.stream();
  const mapB = await b.stream();
  expect(await a.register({ expiry: "2030-01-01T02:00:00Z" })).toMatchObject({ Error: "" });
  expect(a.register({ expiry: "2030-01-01T03:00:00Z" })).rejects.toThrow("400: the expiry of a node key can be");
  await until(() => mapB.peer("a")?.KeyExpiry === "2030-01-01T02:00:00.000Z", "the expiry at the peer");
  await until(() => mapA.self?.KeyExpiry === "2030-01-01T02:00:00.000Z", "the expiry at the node");
  now = Date.parse("2030-01-01T02:00:00Z");
  await server.control.tick();
  await until(() => mapA.self?.Expired && mapB.peer("a")?.Expired, "the expiry to be told");
  await server.admin("POST", "/node/1/expire", { disableExpiry: true });
  await until(() => !mapA.self?.Expired && !mapB.peer("a")?.Expired && !mapA.self?.KeyExpiry, "the extension");
});

test("tags come from the key; asked for without it they are refused; a tagged key makes a user's node tagged", async () => {
  await using server = await TestServer.start();
  const user = await server.user("alice");
  const plain = await server.key({ user, reusable: true });
  const tagged = await server.key({ aclTags: ["tag:web", "tag:db"], reusable: true });
  expect((await server.node("x").register({ authKey: plain, tags: ["tag:web"] })).Error).toContain("not permitted");
  expect((await server.node("x").register({ authKey: tagged, tags: ["tag:other"] })).Error).toContain("tag:other");
  const a = server.node("a");
  expect(await a.register({ authKey: tagged, tags: ["tag:web"] })).toMatchObject({
    Login: { ID: 2147455555, LoginName: "tagged-devices" },
  });
  const b = await server.join("b", plain);
  const mapB = await b.stream();
  expect(mapB.peer("a")).toMatchObject({ Tags: ["tag:web", "tag:db"], User: 2147455555 });
  expect(mapB.profiles.get(2147455555)).toMatchObject({ LoginName: "tagged-devices" });
  const mapA = await a.stream();
  expect(await b.register({ authKey: tagged })).toMatchObject({ Error: "", User: { ID: 2147455555 } });
  await until(() => mapA.peer("b")?.Tags?.length === 2 && mapB.self?.Tags?.length === 2, "b to be tagged");
});

test("ephemeral nodes go when they log out, and when they were away too long", async () => {
  let now = Date.parse("2030-01-01T00:00:00Z");
  const settings = makeSettings();
  settings.node.ephemeralTimeout = 60_000;
  await using server = await TestServer.start({ now: () => now, settings, offlineGrace: 5 });
  const user = await server.user("alice");
  const expiration = "2030-02-01T00:00:00Z";
  const lasting = await server.key({ user, reusable: true, expiration });
  const ephemeral = await server.key({ user, reusable: true, ephemeral: true, expiration });
  const keeper = await server.join("keeper", lasting);
  const map = await keeper.stream();
  const leaver = await server.join("leaver", ephemeral);
  const sleeper = await server.join("sleeper", ephemeral);
  const byRequest = server.node("by-request");
  await byRequest.register({ authKey: lasting, ephemeral: true });
  await until(() => map.peers.size === 3, "three peers");
  await leaver.register({ expiry: "1970-01-01T00:02:03Z" });
  await until(() => !map.peer("leaver"), "the leaver to be gone");
  const mapSleeper = await sleeper.stream();
  now += 61_000;
  await server.control.tick();
  await until(() => !map.peer("by-request"), "the one that never came to be gone");
  expect(map.peer("sleeper")).toBeDefined();
  mapSleeper.stream.close();
  sleeper.close();
  await until(() => map.peer("sleeper")?.Online === false, "the sleeper to be offline");
  await server.control.tick();
  expect(map.peer("sleeper")).toBeDefined();
  now += 61_000;
  await server.control.tick();
  await until(() => !map.peer("sleeper"), "the sleeper to be gone");
  expect(server.control.stats().nodes).toBe(1);
});

test("a deleted node disappears at its peers, is told that its key is over, and cannot come back with it", async () => {
  const removed: string[] = [];
  await using server = await TestServer.start({ onNodeRemoved: (key) => removed.push(formatKey("nodekey", key)) });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  const [mapA, mapB] = [await a.stream(), await b.stream()];
  await server.admin("DELETE", "/node/1");
  await until(() => !mapB.peer("a"), "a to disappear", 1000);
  await until(() => mapA.ended, "a's stream to end");
  expect(mapA.self).toMatchObject({ Expired: true, MachineAuthorized: false });
  expect(Date.parse(mapA.self!.KeyExpiry!)).toBeLessThan(Date.now());
  expect(removed).toEqual([a.nodeKey]);
  expect(await a.lite()).toEqual({ status: 404, text: "node not found" });
  expect((await a.register()).AuthURL).toContain("/register/");
  expect(server.control.verifyNode(Buffer.from(a.nodeKey.slice(8), "hex"))).toBe(false);
  expect(server.control.verifyNode(Buffer.from(b.nodeKey.slice(8), "hex"))).toBe(true);
  // Ids are not used again.
  await a.register({ authKey });
  await until(() => mapB.peer("a")?.ID === 3, "a under a new id");
});

test("rename: an administrator's name sticks, a host's name follows", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("Joe's Mac mini", authKey), await server.join("b", authKey)];
  const [mapA, mapB] = [await a.stream(), await b.stream()];
  expect(mapA.self?.Name).toBe("joes-mac-mini.net.test.");
  await a.lite({ Hostinfo: { Hostname: "other" } });
  await until(() => mapB.peer("other") && mapA.self?.Name === "other.net.test.", "the host's new name");
  await server.admin("POST", "/node/1/rename/chosen");
  await until(() => mapB.peer("chosen") && mapA.self?.Name === "chosen.net.test.", "the chosen name");
  await a.lite({ Hostinfo: { Hostname: "third" } });
  await a.lite({ Endpoints: ["192.0.2.77:1"] });
  await until(() => mapB.peer("chosen")?.Endpoints, "the next change");
  expect(server.admin("POST", "/node/1/rename/b")).rejects.toThrow("409");
  expect(server.admin("POST", "/node/1/rename/Upper")).rejects.toThrow("400");
});

test("a user who is renamed has the new name at all who see her nodes, at once and without a word about the nodes", async () => {
  await using server = await TestServer.start();
  const [alice, bob] = [await server.user("alice"), await server.user("bob")];
  const a = await server.join("a", await server.key({ user: alice }));
  const b = await server.join("b", await server.key({ user: bob }));
  const [mapA, mapB] = [await a.stream(), await b.stream()];
  await until(() => mapB.peer("a")?.Online, "a to be online");
  const before = mapB.messages.length;
  await server.admin("POST", `/user/${alice}/rename/alicia`);
  for (const map of [mapA, mapB]) await until(() => map.profiles.get(alice)?.LoginName === "alicia", "the new name");
  expect(mapB.messages.slice(before)).toEqual([
    { UserProfiles: [{ ID: alice, LoginName: "alicia", DisplayName: "alicia" }] },
  ]);
});

test("one-shot and read-only requests answer one map; a read-only one changes nothing", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const [a, b] = [await server.join("a", authKey), await server.join("b", authKey)];
  await a.lite({ Endpoints: ["192.0.2.1:1"] });
  const once = await b.client.stream({
    method: "POST",
    path: "/machine/map",
    body: JSON.stringify(b.mapRequest({ Compress: "", ReadOnly: true, Endpoints: ["192.0.2.66:1"] })),
  });
  const parts: Uint8Array[] = [];
  for await (const chunk of once.chunks) parts.push(chunk);
  const body = Buffer.concat(parts);
  expect(body.readUInt32LE(0)).toBe(body.length - 4);
  expect(JSON.parse(body.subarray(4).toString()).Peers).toHaveLength(1);
  const mapA = await a.stream();
  expect(mapA.peer("b")?.Endpoints).toBeUndefined();
  expect(mapA.peer("b")?.Online).toBe(false);
});

test("everything that was acknowledged is there after a restart", async () => {
  const first = await TestServer.start();
  const authKey = await first.key({ user: await first.user("alice"), reusable: true });
  const machines = [await first.join("a", authKey), await first.join("b", authKey)];
  await machines[0]!.lite({ Endpoints: ["192.0.2.1:1"], Hostinfo: { Hostname: "a", NetInfo: { PreferredDERP: 5 } } });
  await first.admin("DELETE", "/node/2");
  const key = first.control.noisePublicKey;
  await first.stop();

  await using second = await TestServer.start({ dataDir: first.dataDir });
  expect(second.control.noisePublicKey).toEqual(key);
  const c = await second.join("c", authKey);
  const map = await c.stream();
  expect(map.self).toMatchObject({ ID: 3, Addresses: ["100.64.0.3/32", "fd7a:115c:a1e0::3/128"] });
  expect(map.peer("a")).toMatchObject({
    ID: 1,
    Key: machines[0]!.nodeKey,
    DiscoKey: machines[0]!.discoKey,
    Endpoints: ["192.0.2.1:1"],
    HomeDERP: 5,
    Online: false,
  });
  expect(map.peers.size).toBe(1);
});
