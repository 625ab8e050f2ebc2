import { expect, test } from "bun:test";
import { type TestNode, TestServer, until } from "./testing.ts";

async function ask(node: TestNode, path: string) {
  const { status, text } = await node.post(`/machine/webclient/${path}`, "");
  return {
    status,
    text,
    json: status === 200 ? (JSON.parse(text) as { ID: string; URL: string; Complete?: true }) : null,
  };
}

/** Nodes 1 and 2 of alice, 3 of bob, 4 with a tag. */
async function tailnet() {
  const server = await TestServer.start();
  const alice = await server.key({ user: await server.user("alice"), reusable: true });
  const bob = await server.key({ user: await server.user("bob") });
  const nodes: TestNode[] = [];
  for (const [name, key] of [
    ["laptop", alice],
    ["box", alice],
    ["other", bob],
    ["tagged", await server.key({ aclTags: ["tag:web"] })],
  ] as const)
    nodes.push(await server.join(name, key));
  return { server, nodes, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

test("a browser may change a node's settings when somebody has agreed; who refuses is heard, too", async () => {
  await using t = await tailnet();
  const box = t.nodes[1]!;
  const { json } = await ask(box, "init/1/to/2");
  expect(json!.URL).toBe(`http://control.test/auth/${json!.ID}`);
  const page = await fetch(`${t.server.url}/auth/${json!.ID}`, { headers: { Host: "control.test" } });
  const html = await page.text();
  for (const word of ["wants to change a machine", "laptop", "box", `weft auth approve --auth-id ${json!.ID}`])
    expect(html).toContain(word);
  // Not as a machine that joins.
  expect((await fetch(`${t.server.url}/register/${json!.ID}`, { headers: { Host: "control.test" } })).status).toBe(404);
  await expect(t.server.control.logins.complete(json!.ID, 1, "cli")).rejects.toThrow("is a session of a web client");
  const waiting = ask(box, `wait/1/to/2/${json!.ID}`);
  await t.server.admin("POST", "/auth/approve", { authId: json!.ID });
  expect(await waiting).toMatchObject({ status: 200, json: { Complete: true } });

  const second = (await ask(box, "init/1/to/2")).json!;
  const refused = ask(box, `wait/1/to/2/${second.ID}`);
  await t.server.admin("POST", "/auth/reject", { authId: second.ID });
  expect(await refused).toMatchObject({ status: 403, text: expect.stringContaining("is refused") });
});

test("only the node itself asks, for its owner's machines; a tagged node for anybody's", async () => {
  await using t = await tailnet();
  const [laptop, box, other, tagged] = t.nodes as [TestNode, TestNode, TestNode, TestNode];
  const status = async (node: TestNode, path: string) => (await ask(node, path)).status;
  expect(await status(laptop, "init/1/to/2")).toBe(404);
  expect(await status(box, "init/3/to/2")).toBe(403);
  expect(await status(box, "init/4/to/2")).toBe(403);
  expect(await status(box, "init/9/to/2")).toBe(404);
  expect(await status(box, "init/1/to/x")).toBe(404);
  const { ID } = (await ask(tagged, "init/3/to/4")).json!;
  // Another pair's session says nothing here.
  expect(await status(tagged, `wait/1/to/4/${ID}`)).toBe(404);
  expect(await status(other, `wait/3/to/4/${ID}`)).toBe(404);
  expect(await status(tagged, "wait/3/to/4/hskey-authreq-000000000000000000000000")).toBe(404);
  const ssh = await t.server.control.logins.start({
    kind: "ssh-check",
    sourceNodeId: 3,
    targetNodeId: 4,
    localUser: "root",
  });
  expect(await status(tagged, `wait/3/to/4/${ssh.id}`)).toBe(404);
  await t.server.control.logins.approve(ID, 2);
  await until(() => t.server.control.logins.get(ID)?.verdict, "the verdict");
  expect(await status(tagged, `wait/3/to/4/${ID}`)).toBe(200);
});
