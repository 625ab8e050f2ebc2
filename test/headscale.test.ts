// Weft nodes as guests: joined to an official headscale, relayed by an official derper, beside an official client.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { transferHash } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { derpMapOf, startDerper } from "./lib/derper.ts";
import {
  answers,
  cannotUseNamespaces,
  type Member,
  pathIs,
  skip,
  stillRuns,
  Tailscaled,
  tempDir,
  until,
  WeftNode,
} from "./lib/mesh.ts";
import { missing, peer } from "./lib/peers.ts";

const absent = missing([["headscale"], ["derper", "1.102.5"], ["tailscaled", "1.102.5"]]);

async function startHeadscale(host: Host, dir: string, derp: Host): Promise<{ url: string; key: string }> {
  const url = `http://${host.ip4}:8080`;
  await Bun.write(join(dir, "derp.yaml"), derpMapOf(derp));
  const config = join(dir, "config.yaml");
  await Bun.write(
    config,
    `server_url: ${url}
listen_addr: ${host.ip4}:8080
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:50443
unix_socket: ${join(dir, "headscale.sock")}
noise: { private_key_path: ${join(dir, "noise.key")} }
prefixes: { v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48" }
database: { type: sqlite, sqlite: { path: ${join(dir, "db.sqlite")} } }
derp: { server: { enabled: false }, urls: [], paths: [${join(dir, "derp.yaml")}], auto_update_enabled: false }
dns: { magic_dns: true, base_domain: lab.internal, override_local_dns: false, nameservers: { global: [] } }
disable_check_updates: true
log: { level: info }
`,
  );
  const headscale = peer("headscale")!;
  const server = new Daemon(host, [headscale, "-c", config, "serve"]);
  const cli = async (...args: string[]) => {
    const result = await host.run([headscale, "-c", config, ...args]);
    if (result.code !== 0)
      throw new Error(
        `headscale ${args.join(" ")}: ${result.stderr}${result.stdout}; server: ${server.output().slice(-800)}`,
      );
    return result.stdout;
  };
  await until("headscale answers", async () => {
    await stillRuns("headscale", server);
    return (await cli("users", "create", "lab")) !== "";
  });
  const users = JSON.parse(await cli("users", "list", "-o", "json")) as { id: number | string }[];
  const key = JSON.parse(
    await cli("preauthkeys", "create", "--user", `${users[0]!.id}`, "--reusable", "-o", "json"),
  ) as { key: string };
  return { url, key: key.key };
}

async function reaches(a: Member, b: Member): Promise<void> {
  for (const ip of [b.ip4, b.ip6]) await answers(a.host, ip);
}

if (skip(cannotUseNamespaces, absent)) test.skip("Weft nodes joined to an official headscale", () => {});
else {
  describe("Weft nodes joined to an official headscale 0.28", () => {
    const dir = tempDir("headscale");
    let lab: Lab;
    let members: Member[] = [];

    beforeAll(async () => {
      lab = await Lab.create("headscale");
      const derp = await lab.host("derp");
      const { ca } = await startDerper(derp, dir.path);
      const { url, key } = await startHeadscale(await lab.host("hs"), dir.path, derp);
      const env = { SSL_CERT_FILE: ca };
      members = [
        new WeftNode(await lab.host("wa"), join(dir.path, "wa"), env),
        new WeftNode(await lab.host("wb"), join(dir.path, "wb"), env),
        new Tailscaled(await lab.host("ta"), join(dir.path, "ta"), "1.102.5", env),
      ];
      await Promise.all(members.map((m) => m.up(url, key)));
      for (const m of members)
        await until(`${m.name} sees the others`, async () => Object.keys((await m.status())?.Peer ?? {}).length === 2);
    }, 300_000);

    afterAll(async () => {
      await lab?.close();
      dir[Symbol.dispose]();
    });

    test("reach each other and the official client directly", async () => {
      const [wa, wb, ta] = members as [Member, Member, Member];
      await pathIs("direct", wa, wb);
      await pathIs("direct", wa, ta);
      await reaches(wa, wb);
      await reaches(wa, ta);
      await reaches(ta, wb);
    }, 300_000);

    test("are relayed by the official derper when UDP is blocked", async () => {
      const [wa, wb, ta] = members as [Member, Member, Member];
      lab.blockUdp();
      await pathIs("relay", wa, wb);
      await pathIs("relay", wa, ta);
      await reaches(wa, wb);
      await reaches(ta, wa);
      const result = await transferHash(wa.host, wb.host, 10 << 20, { address: wb.ip4 });
      expect(result.ok).toBe(true);
    }, 300_000);
  });
}
