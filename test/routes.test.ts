// Subnet routers, fail-over and exit nodes with official clients: packets really cross them (spec/headscale-features.md,
// sections 11 and 22.8).
//
//   client, routers, box and "internet" in the lab; behind both routers a site that the lab cannot reach:
//   near  10.99.1.1 -- 10.99.1.2  \
//                                   192.168.50.10, fd50::10
//   far   10.99.2.1 -- 10.99.2.2  /
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { type Host, Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

interface ListedNode {
  id: string;
  ipAddresses: string[];
  approvedRoutes: string[];
  subnetRoutes: string[];
}

const SITE = ["192.168.50.0/24", "fd50::/64"];
const SITE_4 = "192.168.50.10";
const SITE_6 = "fd50::10";
const INTERNET_4 = "203.0.113.9";
const INTERNET_6 = "2001:db8:77::9";
/** Tells who asks. */
const ECHO = `Bun.serve({ hostname: "::", port: 8000, fetch: (request, server) => new Response(server.requestIP(request).address) });`;

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("routes of official clients", () => {
  const dir = tempDir("routes");
  const daemons: Daemon[] = [];
  let lab: Lab;
  let box: Box;
  let site: Host;
  let near: Tailscaled;
  let far: Tailscaled;
  let client: Tailscaled;

  const shell = async (host: Host, command: string): Promise<void> => {
    const { code, stderr } = await host.run(["sh", "-ec", command]);
    if (code !== 0) throw new Error(`${command} on ${host.name}: ${stderr}`);
  };
  const run = async (member: Tailscaled, ...args: string[]): Promise<string> => {
    const { code, stdout, stderr } = await member.host.run(member.cli(...args));
    if (code !== 0) throw new Error(`${args.join(" ")} on ${member.name}: ${stderr}${stdout}`);
    return stdout;
  };
  const nodeOf = async (member: Tailscaled): Promise<ListedNode> => {
    const nodes = await box.admin<ListedNode[]>("nodes", "list");
    return nodes.find(({ ipAddresses }) => ipAddresses.includes(member.ip4))!;
  };
  const approve = async (member: Tailscaled, ...routes: string[]): Promise<void> => {
    await box.admin("nodes", "approve-routes", "-i", (await nodeOf(member)).id, "-r", routes.join());
  };
  /** Whom the echo sees when a host asks it; null when there is no answer within a second. */
  const seenBy = async (from: Host, ip: string): Promise<string | null> => {
    const url = `http://${ip.includes(":") ? `[${ip}]` : ip}:8000`;
    const code = `console.log(await (await fetch(${JSON.stringify(url)}, { signal: AbortSignal.timeout(1000) })).text())`;
    const { code: status, stdout } = await from.run([process.execPath, "-e", code]);
    return status === 0 ? stdout.trim().replace(/^::ffff:/, "") : null;
  };
  const seenAs = (from: Host, ip: string, wanted: string | null, seconds = 20) =>
    until(
      `${ip} sees ${from.name} as ${wanted}`,
      async () => {
        const seen = await seenBy(from, ip);
        if (seen !== wanted) throw new Error(`now as ${seen}`);
        return true;
      },
      seconds,
    );
  const primary = () =>
    until("the route has a router", async () => {
      const [a, b] = await Promise.all([nodeOf(near), nodeOf(far)]);
      return a.subnetRoutes.includes(SITE[0]!) ? "near" : b.subnetRoutes.includes(SITE[0]!) ? "far" : null;
    });

  /** A wire between a router and the site. */
  async function wire(router: Host, n: number): Promise<void> {
    router.netlink.addLink({ kind: "veth", name: "lan0", peer: { name: `lan${n}`, netnsFd: site.netns } });
    await shell(
      router,
      `ip link set lan0 up; ip addr add 10.99.${n}.1/30 dev lan0; ip addr add fd99:${n}::1/64 dev lan0 nodad
      ip route add 192.168.50.0/24 via 10.99.${n}.2; echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`,
    );
    await shell(
      site,
      `ip link set lan${n} up; ip addr add 10.99.${n}.2/30 dev lan${n}; ip addr add fd99:${n}::2/64 dev lan${n} nodad`,
    );
    await shell(
      router,
      `ip -6 route add fd50::/64 via fd99:${n}::2 dev lan0; ip -6 route replace default via ${router.gateway6} dev eth0`,
    );
  }

  beforeAll(async () => {
    lab = await Lab.create("routes");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    const config = join(dir.path, "config.yaml");
    await Bun.write(config, "node:\n  routes:\n    ha:\n      probe_interval: 2s\n      probe_timeout: 1s\n");
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--config", config] });
    const internet = await lab.host("internet");
    internet.addAddress(`${INTERNET_4}/32`);
    internet.addAddress(`${INTERNET_6}/128`);
    site = await lab.host("site");
    near = new Tailscaled(await lab.host("near"), join(dir.path, "near"), "1.102.5", env);
    far = new Tailscaled(await lab.host("far"), join(dir.path, "far"), "1.80.3", env);
    client = new Tailscaled(await lab.host("client"), join(dir.path, "client"), "1.102.5", env);
    await shell(site, `ip link del eth0; ip addr add ${SITE_4}/32 dev lo; ip addr add ${SITE_6}/128 dev lo nodad`);
    await wire(near.host, 1);
    await wire(far.host, 2);
    for (const host of [site, internet]) daemons.push(new Daemon(host, [process.execPath, "-e", ECHO]));
    const key = await box.key();
    await Promise.all([near, far, client].map((member) => member.up(box.url, key)));
    await Promise.all([
      ...[near, far].map((member) => run(member, "set", `--advertise-routes=${SITE.join()}`)),
      run(client, "set", "--accept-routes"),
    ]);
  }, 120_000);

  afterAll(async () => {
    await Promise.all([near, far, client].map((member) => member?.stop()));
    for (const daemon of daemons) daemon.kill();
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 60_000);

  test("a subnet is reached through its router as soon as it is approved, in both families, and no longer than that", async () => {
    await until("the box knows what is advertised", async () => {
      const { availableRoutes } = (await nodeOf(near)) as ListedNode & { availableRoutes: string[] };
      return availableRoutes.length === 2;
    });
    expect(await seenBy(client.host, SITE_4)).toBeNull();
    await approve(near, ...SITE);
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await seenAs(client.host, SITE_6, "fd99:1::1");
    await approve(near);
    await seenAs(client.host, SITE_4, null);
  }, 60_000);

  test("a router that is killed is replaced in seconds, and does not take its subnet back when it is there again", async () => {
    await approve(near, ...SITE);
    await approve(far, ...SITE);
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await near.stop("SIGKILL");
    await seenAs(client.host, SITE_4, "10.99.2.1", 10);
    expect(await primary()).toBe("far");
    await near.start();
    await near.running();
    await until("the box has the router back", () => box.process.output().includes("(near) answers again"));
    expect(await primary()).toBe("far");
    await seenAs(client.host, SITE_4, "10.99.2.1");
  }, 90_000);

  test("a router whose cable is pulled is replaced in seconds, without a word of its own", async () => {
    far.host.link("down");
    await seenAs(client.host, SITE_4, "10.99.1.1", 15);
    expect(await primary()).toBe("near");
    far.host.link("up");
    await seenAs(client.host, SITE_6, "fd99:1::1");
  }, 60_000);

  test("an exit node carries what goes to the internet, in both families, for those who choose it", async () => {
    await run(near, "set", "--advertise-exit-node");
    await until("the exit node is advertised", async () => (await run(near, "debug", "prefs")).includes("0.0.0.0/0"));
    await approve(near, ...SITE, "0.0.0.0/0");
    expect((await nodeOf(near)).approvedRoutes).toContain("::/0");
    await until("the client is offered the exit node", async () =>
      (await run(client, "exit-node", "list")).includes("near"),
    );
    await seenAs(client.host, INTERNET_4, client.host.ip4);
    await run(client, "set", "--exit-node=near");
    await seenAs(client.host, INTERNET_4, near.host.ip4);
    await seenAs(client.host, INTERNET_6, near.host.ip6);
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await run(client, "set", "--exit-node=");
    await seenAs(client.host, INTERNET_6, client.host.ip6);
  }, 90_000);

  test("a node is asked by the server: whether it is there, how it reaches another one, and what its client says", async () => {
    const { id } = await nodeOf(client);
    const found = await box.admin<{ latencySeconds: number }>("debug", "ping", "-i", id);
    expect(found.latencySeconds).toBeGreaterThan(0);
    const path = await box.admin<{ error: string; latencySeconds: number }>("debug", "ping", "-i", id, near.ip4);
    expect(path).toMatchObject({ error: "", latencySeconds: expect.any(Number) });
    const prefs = await box.admin<{ status: number; body: string }>("debug", "c2n", "-i", id, "/debug/prefs");
    expect(prefs.status).toBe(200);
    expect(JSON.parse(prefs.body)).toMatchObject({ RouteAll: true });
  }, 60_000);
});
