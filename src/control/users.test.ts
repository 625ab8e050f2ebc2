import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { formatKey } from "../crypto/keys.ts";
import { Model } from "./model.ts";
import { activeRoutes } from "./routes.ts";
import { makeNode, makeUser, TestServer, until } from "./testing.ts";

const suspend = (server: TestServer, id: number) => server.admin("POST", `/user/${id}/suspend`);
const restore = (server: TestServer, id: number) => server.admin("POST", `/user/${id}/restore`);
const mayRelay = async (server: TestServer, nodeKey: string) => {
  const answer = await fetch(`${server.url}/verify`, { method: "POST", body: JSON.stringify({ NodePublic: nodeKey }) });
  return ((await answer.json()) as { Allow: boolean }).Allow;
};

test("the nodes of a suspended user are told so and lost by their peers at once, and come back with him, without a login", async () => {
  const log: string[] = [];
  const cutOff: string[] = [];
  const onNodeRemoved = (key: Uint8Array) => cutOff.push(formatKey("nodekey", key));
  await using server = await TestServer.start({ log: (line) => log.push(line), onNodeRemoved });
  const [alice, bob] = [await server.user("alice"), await server.user("bob")];
  const key = await server.key({ user: alice, reusable: true });
  const [phone, laptop] = [await server.join("phone", key), await server.join("laptop", key)];
  const web = await server.join("web", await server.key({ user: bob }));
  const build = await server.join("build", await server.key({ user: alice, aclTags: ["tag:ci"] }));
  const maps = { phone: await phone.stream(), laptop: await laptop.stream(), web: await web.stream() };
  await until(() => Object.values(maps).every(({ peers }) => peers.size === 3), "all to know all");

  await suspend(server, alice);
  await until(() => maps.phone.peers.size + maps.laptop.peers.size === 0, "them to lose all, each other among it");
  expect(maps.phone.self).toMatchObject({ MachineAuthorized: false });
  expect(maps.phone.messages.at(-1)!.DisplayMessages).toHaveProperty("weft-user-suspended");
  await until(() => maps.web.peers.size === 1, "bob to lose them");
  expect(maps.web.peer("build")).toBeDefined();
  expect(maps.web.messages.at(-1)!.PeersRemoved).toEqual([1, 2]);
  expect(cutOff).toEqual([phone.nodeKey, laptop.nodeKey]);
  expect([await mayRelay(server, phone.nodeKey), await mayRelay(server, build.nodeKey)]).toEqual([false, true]);
  // A restart of the client is no way back in, nor a login in its stead.
  expect(await phone.register()).toMatchObject({ MachineAuthorized: false });
  const token = await phone.post("/machine/id-token", { NodeKey: phone.nodeKey, CapVersion: 138, Audience: "x" });
  expect(token).toMatchObject({ status: 403, text: expect.stringContaining("suspended") });
  expect(log).toEqual([`user ${alice} (alice) was suspended by the admin socket: 2 nodes shut out`]);

  await restore(server, alice);
  await until(() => Object.values(maps).every(({ peers }) => peers.size === 3), "all to know all again");
  await until(() => maps.phone.self!.MachineAuthorized === true, "the phone to be let in");
  expect(maps.phone.messages.at(-1)!.DisplayMessages).toEqual({ "weft-user-suspended": null });
  expect([maps.phone.ended, maps.laptop.ended, maps.web.ended]).toEqual([false, false, false]);
  expect(await mayRelay(server, phone.nodeKey)).toBe(true);
  expect(await phone.register()).toMatchObject({ MachineAuthorized: true });
  expect(log.at(-1)).toBe(`user ${alice} (alice) was restored by the admin socket: 2 nodes let in again`);
});

test("a suspended user gets no machine in: by key, by key with tags, by an administrator's word, by a new node key", async () => {
  await using server = await TestServer.start();
  const alice = await server.user("alice");
  const key = await server.key({ user: alice, reusable: true });
  const tagged = await server.key({ user: alice, reusable: true, aclTags: ["tag:ci"] });
  const phone = await server.join("phone", key);
  await suspend(server, alice);
  for (const authKey of [key, tagged])
    expect((await server.node("new").register({ authKey })).Error).toContain("the user alice is suspended");
  phone.rotate();
  expect((await phone.register({ authKey: key })).Error).toContain("suspended");
  const late = server.node("late");
  const url = (await late.register()).AuthURL!;
  const authId = url.slice(url.lastIndexOf("/") + 1);
  const waiting = late.register({ followup: url });
  await expect(server.admin("POST", "/auth/register", { authId, user: "alice" })).rejects.toThrow("alice is suspended");
  expect((await waiting).Error).toContain("alice is suspended");
  expect(server.control.stats().nodes).toBe(1);
  await expect(server.key({ user: alice })).rejects.toThrow("alice is suspended");
  await restore(server, alice);
  expect(await phone.register({ authKey: key })).toMatchObject({ MachineAuthorized: true });
  await server.join("new", tagged);
});

test("a suspension outlives the server; a node that an administrator tags meanwhile is nobody's and goes on", async () => {
  const dataDir = mkdtempSync(join(tmpdir(), "weft-users-"));
  try {
    const before = await TestServer.start({ dataDir });
    const alice = await before.user("alice");
    const phone = await before.join("phone", await before.key({ user: alice }));
    await suspend(before, alice);
    await before.stop();
    await using server = await TestServer.start({ dataDir });
    expect(await mayRelay(server, phone.nodeKey)).toBe(false);
    await server.admin("POST", "/node/1/tags", { tags: ["tag:ci"] });
    expect(await mayRelay(server, phone.nodeKey)).toBe(true);
  } finally {
    rmSync(dataDir, { recursive: true, force: true });
  }
});

test("a suspended user's nodes serve no routes, and undoing it leaves no trace", () => {
  const model = new Model();
  const router = makeNode(1, { hostinfo: { RoutableIPs: ["10.0.0.0/8"] }, approvedRoutes: ["10.0.0.0/8"] });
  model.apply({ users: [makeUser(1), makeUser(2)], nodes: [router, makeNode(2, { userId: 2 })] });
  expect(activeRoutes(model.nodes.get(1)!)).toEqual(["10.0.0.0/8"]);
  const { nodes, undo } = model.apply({ users: [makeUser(1, { status: "suspended" })], nodes: [makeNode(3)] });
  expect([...model.nodes.values()].map(({ suspended }) => suspended)).toEqual([false, true, true]);
  expect(new Set(nodes)).toEqual(new Set([1, 3]));
  expect(activeRoutes(model.nodes.get(1)!)).toEqual([]);
  model.apply(undo);
  expect([...model.nodes.values()].sort((a, b) => a.id - b.id)).toEqual([router, makeNode(2, { userId: 2 })]);
});
