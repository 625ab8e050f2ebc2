// Control server and relay on hosts of their own: the relay asks the control server whom to admit.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join, resolve } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { ping } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, pathIs, skip, tempDir, until, WeftNode } from "./lib/mesh.ts";

const run = resolve(import.meta.dir, "../tools/run.ts");

if (skip(cannotUseNamespaces)) test.skip("control and relay apart", () => {});
else {
  describe("control and relay apart", () => {
    const dir = tempDir("separate");
    let lab: Lab;
    let relay: Daemon;
    let a: WeftNode;
    let b: WeftNode;

    beforeAll(async () => {
      lab = await Lab.create("separate");
      const [controlHost, relayHost] = [await lab.host("control"), await lab.host("relay")];
      const relayUrl = `http://${relayHost.ip4}:8081`;
      const control = await Box.start(controlHost, join(dir.path, "control"), {
        verb: "control",
        args: ["--relay-url", relayUrl],
      });
      const flags = ["--data", join(dir.path, "relay"), "--listen", `${relayHost.ip4}:8081`, "--url", relayUrl];
      relay = new Daemon(relayHost, [process.execPath, run, "relay", ...flags, "--verify-url", control.url]);
      await until("the relay is ready", () => relay.output().includes("relay ready"));
      a = new WeftNode(await lab.host("na"), join(dir.path, "a"));
      b = new WeftNode(await lab.host("nb"), join(dir.path, "b"));
      const key = await control.key();
      await Promise.all([a.up(control.url, key), b.up(control.url, key)]);
    }, 60_000);

    afterAll(async () => {
      await lab?.close();
      dir[Symbol.dispose]();
    });

    test("nodes find each other with the relay's STUN, and go through the relay when UDP is blocked", async () => {
      await pathIs("direct", a, b);
      lab.blockUdp();
      await pathIs("relay", a, b);
      expect((await ping(a.host, b.ip6, { count: 5, intervalMs: 50 })).received).toBe(5);
    }, 60_000);
  });
}
