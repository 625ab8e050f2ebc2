// Subnet routers, fail-over, exit nodes, and policies about them, with official clients: packets really cross them
// (spec/headscale-features.md, sections 11 and 22.8, by the names there).
//
//   clients, routers, box and "internet" in the lab; behind both routers a site that the lab cannot reach:
//   near  10.99.1.1 -- 10.99.1.2  \
//                                   192.168.50.10, fd50::10, 192.168.60.10
//   far   10.99.2.1 -- 10.99.2.2  /
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { type Host, Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, shell, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
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
/** More of the site, which nobody approves by hand. */
const ANNEX = "192.168.60.0/24";
const ANNEX_4 = "192.168.60.10";
const INTERNET_4 = "203.0.113.9";
const INTERNET_6 = "2001:db8:77::9";
const OPEN = 8000;
const CLOSED = 8001;
/** Tells who asks. */
const ECHO = `for (const port of [${OPEN}, ${CLOSED}])
  Bun.serve({ hostname: "::", port, fetch: (request, server) => new Response(server.requestIP(request).address) });`;
/** alice has the client, bob the other one; the routers are nobody's. */
const POLICY = {
  tagOwners: { "tag:near": [], "tag:far": [] },
  groups: { "group:routing": ["bob@"] },
  hosts: { web: `${SITE_4}/32` },
};
const EVERYTHING = { acls: [{ action: "accept", src: ["*"], dst: ["*:*", "autogroup:internet:*"] }] };

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
  let other: Tailscaled;

  const nodeOf = async (member: Tailscaled): Promise<ListedNode> => {
    const nodes = await box.admin<ListedNode[]>("nodes", "list");
    return nodes.find(({ ipAddresses }) => ipAddresses.includes(member.ip4))!;
  };
  const set = async (policy: object): Promise<void> => {
    await Bun.write(join(dir.path, "policy.hujson"), JSON.stringify({ ...POLICY, ...policy }));
    await box.admin("policy", "set", "-f", join(dir.path, "policy.hujson"));
  };
  const approve = async (member: Tailscaled, ...routes: string[]): Promise<void> => {
    await box.admin("nodes", "approve-routes", "-i", (await nodeOf(member)).id, "-r", routes.join());
  };
  /** Whom the echo sees when a host asks it; null when there is no answer within a second. */
  const seenBy = async (from: Host, ip: string, port = OPEN): Promise<string | null> => {
    const url = `http://${ip.includes(":") ? `[${ip}]` : ip}:${port}`;
    const code = `console.log(await (await fetch(${JSON.stringify(url)}, { signal: AbortSignal.timeout(1000) })).text())`;
    const { code: status, stdout } = await from.run([process.execPath, "-e", code]);
    return status === 0 ? stdout.trim().replace(/^::ffff:/, "") : null;
  };
  const seenAs = (from: Host, ip: string, wanted: string | null) =>
    until(`${ip} sees ${from.name} as ${wanted}`, async () => {
      const seen = await seenBy(from, ip);
      if (seen !== wanted) throw new Error(`now as ${seen}`);
      return true;
    });
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
      ip route add 192.168.50.0/24 via 10.99.${n}.2; ip route add ${ANNEX} via 10.99.${n}.2; echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`,
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
    await Bun.write(config, "node:\n  routes:\n    ha:\n      probe_interval: 4s\n      probe_timeout: 3s\n");
    box = await Box.start(boxHost, join(dir.path, "box"), {
      tls,
      args: ["--config", config, "--policy-mode", "database"],
    });
    await set(EVERYTHING);
    const internet = await lab.host("internet");
    internet.addAddress(`${INTERNET_4}/32`);
    internet.addAddress(`${INTERNET_6}/128`);
    site = await lab.host("site");
    near = new Tailscaled(await lab.host("near"), join(dir.path, "near"), "1.102.5", env);
    far = new Tailscaled(await lab.host("far"), join(dir.path, "far"), "1.80.3", env);
    client = new Tailscaled(await lab.host("client"), join(dir.path, "client"), "1.102.5", env);
    other = new Tailscaled(await lab.host("other"), join(dir.path, "other"), "1.80.3", env);
    await shell(
      site,
      `ip link del eth0; ip addr add ${SITE_4}/32 dev lo; ip addr add ${ANNEX_4}/32 dev lo; ip addr add ${SITE_6}/128 dev lo nodad`,
    );
    await wire(near.host, 1);
    await wire(far.host, 2);
    for (const host of [site, internet]) daemons.push(new Daemon(host, [process.execPath, "-e", ECHO]));
    const key = async (...args: string[]) => (await box.admin<{ key: string }>("preauthkeys", "create", ...args)).key;
    const user = async (name: string) => `${(await box.admin<{ id: string }>("users", "create", name)).id}`;
    await Promise.all([
      near.up(box.url, await key("--tags", "tag:near")),
      far.up(box.url, await key("--tags", "tag:far")),
      client.up(box.url, await key("--user", await user("alice"))),
      other.up(box.url, await key("--user", await user("bob"))),
    ]);
    await Promise.all([
      ...[near, far].map((member) => member.run("set", `--advertise-routes=${SITE.join()}`)),
      ...[client, other].map((member) => member.run("set", "--accept-routes")),
    ]);
  }, 300_000);

  afterAll(async () => {
    await Promise.all([near, far, client, other].map((member) => member?.stop()));
    for (const daemon of daemons) daemon.kill();
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("EnablingRoutes, SubnetRouterMultiNetwork: a subnet is reached through its router as soon as it is approved, in both families, and no longer than that", async () => {
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
  }, 300_000);

  test("HASubnetRouterFailover: a router that is killed is replaced in seconds, and does not take its subnet back when it is there again", async () => {
    await approve(near, ...SITE);
    await approve(far, ...SITE);
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await near.stop("SIGKILL");
    await seenAs(client.host, SITE_4, "10.99.2.1");
    expect(await primary()).toBe("far");
    await near.start();
    await near.running();
    const { id } = await nodeOf(near);
    await until("the box has the router back", () => box.admin("debug", "ping", "-i", id));
    expect(await primary()).toBe("far");
    await seenAs(client.host, SITE_4, "10.99.2.1");
  }, 300_000);

  test("HASubnetRouterPingFailover, HASubnetRouterFailoverCablePull: a router whose cable is pulled is replaced in seconds, without a word of its own", async () => {
    far.host.link("down");
    await seenAs(client.host, SITE_4, "10.99.1.1");
    expect(await primary()).toBe("near");
    far.host.link("up");
    await seenAs(client.host, SITE_6, "fd99:1::1");
  }, 300_000);

  test("EnablingExitRoutes, SubnetRouterMultiNetworkExitNode: an exit node carries what goes to the internet, in both families, for those who choose it", async () => {
    await near.run("set", "--advertise-exit-node");
    await until("the exit node is advertised", async () => (await near.run("debug", "prefs")).includes("0.0.0.0/0"));
    await approve(near, ...SITE, "0.0.0.0/0");
    expect((await nodeOf(near)).approvedRoutes).toContain("::/0");
    await until("the client is offered the exit node", async () =>
      (await client.run("exit-node", "list")).includes("near"),
    );
    await seenAs(client.host, INTERNET_4, client.host.ip4);
    await client.run("set", "--exit-node=near");
    await seenAs(client.host, INTERNET_4, near.host.ip4);
    await seenAs(client.host, INTERNET_6, near.host.ip6);
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await client.run("set", "--exit-node=");
    await seenAs(client.host, INTERNET_6, client.host.ip6);
  }, 300_000);

  test("HASubnetRouterFailoverBothOffline: with both routers gone there is no way, and the first that is back is the way", async () => {
    await Promise.all([near.stop("SIGKILL"), far.stop("SIGKILL")]);
    await seenAs(client.host, SITE_4, null);
    await far.start();
    await far.running();
    await seenAs(client.host, SITE_4, "10.99.2.1");
    await near.start();
    await near.running();
    expect(await primary()).toBe("far");
    await far.stop();
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await far.start();
    await far.running();
  }, 300_000);

  test("GrantViaSubnetSteering: each user's packets take the router that the grant names, and the other one as soon as it says so", async () => {
    const steer = (alice: string, bob: string) =>
      set({
        grants: [
          { src: ["alice@"], dst: SITE, ip: ["*"], via: [alice] },
          { src: ["bob@"], dst: SITE, ip: ["*"], via: [bob] },
        ],
      });
    await steer("tag:near", "tag:far");
    await seenAs(client.host, SITE_4, "10.99.1.1");
    await seenAs(other.host, SITE_4, "10.99.2.1");
    await steer("tag:far", "tag:near");
    await seenAs(client.host, SITE_6, "fd99:2::1");
    await seenAs(other.host, SITE_6, "fd99:1::1");
  }, 300_000);

  test("SubnetRouteACL, SubnetRouteACLFiltering: who may reach a machine of the subnet on one port reaches that and no more, others do not know the way", async () => {
    const router = { action: "accept", src: ["alice@", "bob@"], dst: ["tag:near:*", "tag:far:*"] };
    await set({ acls: [router, { action: "accept", src: ["alice@"], dst: [`web:${OPEN}`] }] });
    const routesOf = async (member: Tailscaled): Promise<string[]> => {
      const peers = Object.values((await member.status())!.Peer!) as unknown as { PrimaryRoutes?: string[] }[];
      return peers.flatMap(({ PrimaryRoutes }) => PrimaryRoutes ?? []);
    };
    // The policy before was another one: what is closed now was open.
    await until("the policy is in force on all of them", async () => {
      expect(await routesOf(client)).toEqual([SITE[0]!]);
      expect(await routesOf(other)).toEqual([]);
      expect(await seenBy(client.host, SITE_4)).not.toBeNull();
      expect(await seenBy(client.host, SITE_4, CLOSED)).toBeNull();
      expect(await seenBy(client.host, SITE_6)).toBeNull();
      expect(await seenBy(other.host, SITE_4)).toBeNull();
      return true;
    });
  }, 300_000);

  test("ExitRoutesWithAutogroupInternetACL: who may reach the internet is offered the exit node, and reaches no subnet by it; who may not is not", async () => {
    await set({
      acls: [
        { action: "accept", src: ["alice@"], dst: ["autogroup:internet:*"] },
        { action: "accept", src: ["bob@"], dst: ["tag:near:*"] },
      ],
    });
    await until("alice is offered the exit node", async () => (await client.run("exit-node", "list")).includes("near"));
    await until("bob sees the router", async () => (await other.peer(near)) !== null);
    await until("bob is offered none", async () => {
      await expect(other.run("exit-node", "list")).rejects.toThrow("no exit nodes found");
      return true;
    });
    await client.run("set", "--exit-node=near");
    await seenAs(client.host, INTERNET_4, near.host.ip4);
    expect(await seenBy(client.host, SITE_4)).toBeNull();
    await client.run("set", "--exit-node=");
  }, 300_000);

  test("AutoApproveMultiNetwork: routes of those whom the policy names need nobody's approval, nor do smaller ones; those of others wait", async () => {
    const approved = (member: Tailscaled, ...routes: string[]) =>
      until(`${routes} of ${member.name} are approved`, async () => {
        const { approvedRoutes } = await nodeOf(member);
        if (!routes.every((route) => approvedRoutes.includes(route))) throw new Error(`now ${approvedRoutes}`);
        return true;
      });
    const smaller = "192.168.60.16/28";
    const routes = { [ANNEX]: ["tag:far"], "192.168.61.0/24": ["group:routing"], "192.168.62.0/24": ["alice@"] };
    await set({ ...EVERYTHING, autoApprovers: { routes, exitNode: ["tag:far"] } });
    await near.run("set", `--advertise-routes=${ANNEX}`);
    await other.run("set", "--advertise-routes=192.168.61.0/24,192.168.62.0/24");
    await client.run("set", "--advertise-routes=192.168.61.0/24,192.168.62.0/24");
    await far.run("set", `--advertise-routes=${ANNEX},${smaller}`, "--advertise-exit-node");
    await approved(far, ANNEX, smaller, "0.0.0.0/0", "::/0");
    await approved(other, "192.168.61.0/24");
    await approved(client, "192.168.62.0/24");
    expect((await nodeOf(other)).approvedRoutes).not.toContain("192.168.62.0/24");
    expect((await nodeOf(client)).approvedRoutes).not.toContain("192.168.61.0/24");
    expect((await nodeOf(near)).approvedRoutes).not.toContain(ANNEX);
    await seenAs(client.host, ANNEX_4, "10.99.2.1");
    // A route that waits is approved as soon as the policy says so; one that is approved stays so without it.
    await set({ ...EVERYTHING, autoApprovers: { routes: { [ANNEX]: ["tag:near"] } } });
    await approved(near, ANNEX);
    await approved(far, ANNEX);
    await far.stop();
    await seenAs(client.host, ANNEX_4, "10.99.1.1");
  }, 300_000);

  test("a node is asked by the server: whether it is there, how it reaches another one, and what its client says", async () => {
    const { id } = await nodeOf(client);
    const found = await box.admin<{ latencySeconds: number }>("debug", "ping", "-i", id);
    expect(found.latencySeconds).toBeGreaterThan(0);
    const path = await box.admin<{ error: string; latencySeconds: number }>("debug", "ping", "-i", id, near.ip4);
    expect(path).toMatchObject({ error: "", latencySeconds: expect.any(Number) });
    const prefs = await box.admin<{ status: number; body: string }>("debug", "c2n", "-i", id, "/debug/prefs");
    expect(prefs.status).toBe(200);
    expect(JSON.parse(prefs.body)).toMatchObject({ RouteAll: true });
  }, 300_000);
});
