// Tailscale's client for browsers, built for WebAssembly, on a Weft box: it reaches control server and relay by WebSockets only
// (spec/headscale-features.md, section 22: TestTS2021WASMClientUnderNode, TestTS2021WebSocketGET, TestDERPServerWebsocketScenario).
import { expect, test } from "bun:test";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { Lab } from "../lab/network.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  certificate,
  skip,
  stillRuns,
  Tailscaled,
  tempDir,
  until,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const absent = missing([["tailscaled", "1.102.5"], ["wasm"], ["wasm_exec.js"]]);

test.skipIf(skip(cannotUseNamespaces, absent))(
  "the client for browsers joins, and it and a native client reach each other through the relay",
  async () => {
    using dir = tempDir("websocket");
    await using lab = await Lab.create("websocket");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    // It probes relays on port 443 only.
    const box = await Box.start(boxHost, join(dir.path, "box"), { tls, port: 443 });
    const web = new Tailscaled(await lab.host("web"), join(dir.path, "web"), "1.102.5", { SSL_CERT_FILE: tls.ca });
    const key = await box.key();
    await web.up(box.url, key);
    const serve = `Bun.serve({ hostname: "${web.ip4}", port: 8000, fetch: (request, server) => new Response("hello, " + server.requestIP(request).address) })`;
    new Daemon(web.host, [process.execPath, "-e", serve]);
    const script = join(import.meta.dir, "lib/wasm-client.ts");
    const browser = new Daemon(
      await lab.host("browser"),
      [process.execPath, script, box.url, key, `http://${web.ip4}:8000`],
      { NODE_EXTRA_CA_CERTS: tls.ca },
    );
    const seen = <T>(what: string) =>
      until(`the browser's client is told of its ${what}`, async () => {
        await stillRuns("it", browser);
        const lines = [...browser.output().matchAll(/^seen (.*)$/gm)].map((match) => JSON.parse(match[1]!) as object);
        return lines.findLast((line) => what in line) as T | undefined;
      });
    const { addresses } = await seen<{ addresses: string[] }>("addresses");
    const ip = addresses.find((address) => !address.includes(":"))!;
    expect(await seen("peers")).toMatchObject({ peers: ["web.weft.internal."] });
    expect(await seen("status")).toEqual({ status: 200, text: `hello, ${ip}` });
    expect(browser.output()).toContain(`websocket: connected to https://${boxHost.ip4}/derp`);
    await answers(web.host, ip);
    const nodes = await box.admin<{ name: string; online: boolean }[]>("nodes", "list");
    expect(nodes.find(({ name }) => name === "browser")).toMatchObject({ online: true });
    browser.kill();
    await Promise.all([web.stop(), box.stop()]);
  },
  300_000,
);
