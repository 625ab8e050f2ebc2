// An official Headscale on a host of a test's network, with the user "lab".
import { join } from "node:path";
import { Daemon } from "../../lab/daemon.ts";
import type { Host } from "../../lab/network.ts";
import { derpMapOf } from "./derper.ts";
import { stillRuns, until } from "./mesh.ts";
import { peer } from "./peers.ts";

export class Headscale {
  readonly url: string;
  /** Its configuration file. */
  readonly config: string;
  private server: Daemon | null = null;

  private constructor(
    readonly host: Host,
    dir: string,
  ) {
    this.url = `http://${host.ip4}:8080`;
    this.config = join(dir, "headscale.yaml");
  }

  static async start(host: Host, dir: string, derp: Host): Promise<Headscale> {
    const headscale = new Headscale(host, dir);
    await Bun.write(join(dir, "derp.yaml"), derpMapOf(derp));
    await Bun.write(
      headscale.config,
      `server_url: ${headscale.url}
listen_addr: ${host.ip4}:8080
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:50443
unix_socket: ${join(dir, "headscale.sock")}
noise: { private_key_path: ${join(dir, "noise.key")} }
prefixes: { v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48" }
database: { type: sqlite, sqlite: { path: ${join(dir, "db.sqlite")} } }
policy: { mode: database }
derp: { server: { enabled: false }, urls: [], paths: [${join(dir, "derp.yaml")}], auto_update_enabled: false }
dns: { magic_dns: true, base_domain: lab.internal, override_local_dns: false, nameservers: { global: [] } }
disable_check_updates: true
log: { level: info }
`,
    );
    const server = new Daemon(host, [peer("headscale")!, "-c", headscale.config, "serve"]);
    headscale.server = server;
    await until("headscale answers", async () => {
      await stillRuns("headscale", server);
      return (await headscale.cli("users", "create", "lab")) !== "";
    });
    return headscale;
  }

  /** What its command line printed. Throws with what it says when it fails. */
  async cli(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.host.run([peer("headscale")!, "-c", this.config, ...args]);
    if (code !== 0)
      throw new Error(
        `headscale ${args.join(" ")}: ${stderr}${stdout}; server: ${this.server?.output().slice(-800) ?? ""}`,
      );
    return stdout;
  }

  /** A reusable pre-auth key of the user. */
  async key(): Promise<string> {
    const users = JSON.parse(await this.cli("users", "list", "-o", "json")) as { id: number | string }[];
    const made = await this.cli("preauthkeys", "create", "--user", `${users[0]!.id}`, "--reusable", "-o", "json");
    return (JSON.parse(made) as { key: string }).key;
  }

  async stop(): Promise<void> {
    this.server?.kill("SIGTERM");
    await this.server?.exited;
  }
}
