// Control server and relay on hosts of their own: the relay, Weft's or an official one, asks the control server whom to admit.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join, resolve } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { Lab } from "../lab/network.ts";
import { publicMapOf, startDerper } from "./lib/derper.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  type Member,
  pathIs,
  skip,
  Tailscaled,
  tempDir,
  until,
  WeftNode,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

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
    }, 300_000);

    afterAll(async () => {
      await lab?.close();
      dir[Symbol.dispose]();
    });

    test("nodes find each other with the relay's STUN, and go through the relay when UDP is blocked", async () => {
      await pathIs("direct", a, b);
      lab.blockUdp();
      await pathIs("relay", a, b);
      await answers(a.host, b.ip6);
    }, 300_000);
  });
}

const absent = missing([
  ["derper", "1.102.5"],
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);
describe.skipIf(skip(cannotUseNamespaces, absent))("control and an official derper", () => {
  test("TestDERPVerifyEndpoint, PingAllByIPPublicDERP: it is in the map of a URL, admits the nodes of the tailnet, which meet with and through it, and no strangers", async () => {
    using dir = tempDir("verify");
    await using lab = await Lab.create("verify");
    const [controlHost, derpHost, stranger] = [
      await lab.host("control"),
      await lab.host("derp"),
      await lab.host("stranger"),
    ];
    const file = (name: string) => join(dir.path, name);
    const map = new Daemon(derpHost, [
      process.execPath,
      "-e",
      `Bun.serve({ hostname: "${derpHost.ip4}", port: 8000, fetch: () => Response.json(${JSON.stringify(publicMapOf(derpHost))}) });
      console.log("ready");`,
    ]);
    await until("the map is there", () => map.output().includes("ready"));
    await Bun.write(
      file("config.yaml"),
      `derp: { server: { enabled: false }, urls: ["http://${derpHost.ip4}:8000/derpmap/default"] }\n`,
    );
    const control = await Box.start(controlHost, file("control"), {
      verb: "control",
      args: ["--config", file("config.yaml")],
    });
    const verify = ["-verify-client-url", `${control.url}/verify`, "-verify-client-url-fail-open=false"];
    const derper = await startDerper(derpHost, dir.path, ...verify);
    const env = { SSL_CERT_FILE: derper.ca };
    const members: [Member, Member, Member] = [
      new Tailscaled(await lab.host("official"), file("official"), "1.102.5", env),
      new Tailscaled(await lab.host("old"), file("old"), "1.80.3", env),
      new WeftNode(await lab.host("weft"), file("weft"), env),
    ];
    const [official, old, weft] = members;
    const key = await control.key();
    await Promise.all(members.map((member) => member.up(control.url, key)));
    await pathIs("direct", official, old);
    lab.blockUdp();
    for (const [one, other] of [
      [official, old],
      [old, weft],
      [weft, official],
    ] as const) {
      await pathIs("relay", one, other);
      await answers(one.host, other.ip4);
      await answers(other.host, one.ip6);
    }

    const client = resolve(import.meta.dir, "../src/net/derp-client.ts");
    const code = `
      const { DerpClient } = await import(${JSON.stringify(client)});
      const node = { Name: "900a", RegionID: 900, HostName: "${derpHost.ip4}", DERPPort: 443 };
      const tls = { ca: await Bun.file(${JSON.stringify(derper.ca)}).text() };
      new DerpClient({ privateKey: crypto.getRandomValues(new Uint8Array(32)), region: { RegionID: 900, Nodes: [node] }, tls,
        onPacket() {}, onState: ({ connected, lastError }) => { console.log(connected, lastError); if (connected || lastError) process.exit(); } });`;
    const { stdout } = await stranger.run([process.execPath, "-e", code]);
    expect(stdout).toStartWith("false");
    expect(derper.process.output()).toMatch(
      new RegExp(`admission controller: .*${stranger.ip4.replaceAll(".", "\\.")}.* not allowed`),
    );

    map.kill();
    await Promise.all([...members.map((member) => member.stop()), control.stop()]);
  }, 300_000);
});
