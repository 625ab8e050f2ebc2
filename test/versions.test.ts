// The oldest client that is served, and what an older one is told. The others meet 1.80.3 and 1.102.5.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { ping } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import { TestServer } from "../src/control/testing.ts";
import { MIN_CAPABILITY_VERSION } from "../src/wire/tailcfg.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  certificate,
  pathIs,
  skip,
  Tailscaled,
  tempDir,
  until,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

test("a client that is too old is told so, with the version that would do, when it signs in and when it asks for the netmap", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ aclTags: ["tag:a"] });
  const node = server.node("old");
  const sentence = `this client is too old for this control server (capability version ${MIN_CAPABILITY_VERSION - 1}, the oldest supported is ${MIN_CAPABILITY_VERSION}, Tailscale 1.62): update it`;
  const version = MIN_CAPABILITY_VERSION - 1;
  await expect(node.register({ authKey, version })).rejects.toThrow(`400: ${sentence}`);
  expect((await node.register({ authKey, version: MIN_CAPABILITY_VERSION })).MachineAuthorized).toBe(true);
  expect(await node.lite({ Version: version })).toMatchObject({ status: 400, text: sentence });
  expect((await node.lite({ Version: MIN_CAPABILITY_VERSION })).status).toBe(200);
});

const absent = missing([
  ["tailscaled", "1.62.1"],
  ["tailscaled", "1.102.5"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("tailscaled 1.62.1", () => {
  const dir = tempDir("versions");
  let lab: Lab;
  let box: Box;
  let oldest: Tailscaled;
  let current: Tailscaled;
  let web: Daemon;

  const set = async (...acls: object[]): Promise<void> => {
    writeFileSync(join(dir.path, "policy.hujson"), JSON.stringify({ acls }));
    await box.admin("policy", "set", "-f", join(dir.path, "policy.hujson"));
  };
  /** Whether the oldest one's ports are open for the other one. */
  const portsAre = (...wanted: boolean[]) =>
    until(`ports 8000 and 8001 are open: ${wanted}`, async () => {
      const code = `for (const port of [8000, 8001])
        console.log(await fetch("http://${oldest.ip4}:" + port, { signal: AbortSignal.timeout(1000) }).then((r) => r.ok, () => false));`;
      const { stdout } = await current.host.run([process.execPath, "-e", code]);
      expect(
        stdout
          .trim()
          .split("\n")
          .map((line) => line === "true"),
      ).toEqual(wanted);
      return true;
    });

  const reach = () =>
    until("they reach each other", async () => {
      const { received } = await ping(oldest.host, current.ip4, { count: 2, intervalMs: 50 });
      return received === 2;
    });

  beforeAll(async () => {
    lab = await Lab.create("versions");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy-mode", "database"] });
    oldest = new Tailscaled(await lab.host("oldest"), join(dir.path, "oldest"), "1.62.1", env);
    current = new Tailscaled(await lab.host("current"), join(dir.path, "current"), "1.102.5", env);
    const key = await box.key();
    await Promise.all([oldest.up(box.url, key), current.up(box.url, key)]);
    const serve = `for (const port of [8000, 8001]) Bun.serve({ hostname: "::", port, fetch: () => new Response("here") });`;
    web = new Daemon(oldest.host, [process.execPath, "-e", serve]);
  }, 300_000);

  afterAll(async () => {
    web?.kill();
    await Promise.all([oldest?.stop(), current?.stop()]);
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("joins, is reached directly and by the relay, and keeps to each policy as it comes", async () => {
    await pathIs("direct", oldest, current);
    await answers(oldest.host, current.ip6);
    await portsAre(true, true);
    await set({ action: "accept", src: ["*"], dst: [`${oldest.ip4}:8000`] });
    await portsAre(true, false);
    lab.blockUdp();
    await pathIs("relay", oldest, current);
    await portsAre(true, false);
    lab.unblockUdp();
    await set();
    await until("they know nothing of each other", async () => {
      const peers = await Promise.all([oldest.peer(current), current.peer(oldest)]);
      return peers.every((peer) => peer === null);
    });
    await set({ action: "accept", src: ["*"], dst: ["*:*"] });
    await reach();
  }, 300_000);

  test("is told of names and of who is there, also after a restart of the server", async () => {
    const nodes = await box.admin<{ id: string; name: string }[]>("nodes", "list");
    const { id } = nodes.find(({ name }) => name === "current")!;
    const sees = (what: string, check: (peer: { DNSName: string; Online: boolean }) => boolean) =>
      until(`it sees the other one ${what}`, async () => {
        const peer = await oldest.peer(current);
        return peer !== null && check(peer);
      });
    await box.admin("nodes", "rename", "-i", id, "renamed");
    await sees("under its new name", ({ DNSName }) => DNSName.startsWith("renamed."));
    await box.stop("SIGKILL");
    await box.start();
    await current.stop();
    await sees("gone", ({ Online }) => !Online);
    await current.start();
    await current.running();
    await sees("back", ({ Online }) => Online);
    await reach();
  }, 300_000);
});
