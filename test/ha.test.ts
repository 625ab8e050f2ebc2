// Several routers of the same subnets, official clients all, while packets keep crossing them: fail-over prefix by prefix, routers
// that are killed, cut off and taken from the network, an exit node that is chosen anew, and subnets with the same addresses
// (spec/headscale-features.md, sections 11 and 22.8). Two routers and policies about them: routes.test.ts.
//
//   client, routers, box and "internet" in the lab; behind router n, as 10.99.n.1, two sites that the lab cannot reach:
//   site  192.168.50.10, 192.168.60.10, 192.168.70.10   behind all three
//   twin  192.168.50.10                                 behind the third
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { type Host, Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, shell, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const SUBNETS = ["192.168.50.0/24", "192.168.60.0/24", "192.168.70.0/24"] as const;
const [A, B, C] = SUBNETS;
const INTERNET = "203.0.113.9";
const NOBODY = "nobody";
/** Tells where one is, and as whom. */
const ECHO = `Bun.serve({ hostname: "::", port: 8000, fetch: (request, server) =>
  new Response(process.argv[1] + " " + server.requestIP(request).address.replace("::ffff:", "")) });`;
/** Asks again and again, by a new connection each time, and prints each answer that is not the one before. */
const ASK = `
  let last;
  for (let once = process.argv[2] === "once"; ; await Bun.sleep(100)) {
    const url = "http://" + process.argv[1] + ":8000";
    const answer = await fetch(url, { signal: AbortSignal.timeout(1000), keepalive: false }).then((r) => r.text()).catch(() => "${NOBODY}");
    if (answer !== last) console.log((last = answer));
    if (once) break;
  }`;

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("several routers", () => {
  const dir = tempDir("ha");
  const daemons: Daemon[] = [];
  let lab: Lab;
  let box: Box;
  let routers: Tailscaled[] = [];
  let client: Tailscaled;

  const idOf = async (member: Tailscaled): Promise<string> => {
    const nodes = await box.admin<{ id: string; ipAddresses: string[] }[]>("nodes", "list");
    return nodes.find(({ ipAddresses }) => ipAddresses.includes(member.ip4))!.id;
  };
  const serve = async (member: Tailscaled, ...routes: string[]): Promise<void> => {
    await member.run("set", `--advertise-routes=${routes.join()}`);
    await box.admin("nodes", "approve-routes", "-i", await idOf(member), "-r", routes.join());
  };
  /** The routers of these prefixes, by number. */
  const serving = async (...prefixes: string[]): Promise<(number | null)[]> => {
    const nodes = await box.admin<{ name: string; subnetRoutes: string[] }[]>("nodes", "list");
    return prefixes.map((prefix) => {
      const [router, ...more] = nodes.filter(({ subnetRoutes }) => subnetRoutes.includes(prefix));
      if (more.length > 0) throw new Error(`${prefix} has several routers`);
      return router ? Number(router.name.slice(1)) : null;
    });
  };
  const answerOf = async (ip: string): Promise<string> =>
    (await client.host.run([process.execPath, "-e", ASK, ip, "once"])).stdout.trim();
  /** Packets of the client to these prefixes go through these routers. */
  const through = (numbers: number[], ...prefixes: string[]) =>
    until(`${prefixes} are reached through ${numbers}`, async () => {
      const found = await Promise.all(prefixes.map((prefix) => answerOf(prefix.replace("0/24", "10"))));
      expect(found).toEqual(numbers.map((n) => `site 10.99.${n}.1`));
      expect(await serving(...prefixes)).toEqual(numbers);
      return true;
    });
  const isWell = async (member: Tailscaled): Promise<void> => {
    const id = await idOf(member);
    await until(`${member.name} answers the box`, async () => (await box.admin("debug", "ping", "-i", id)) !== null);
  };
  /** The routers behind which the site answered as long as `during` took, in turn. `by` waits for the answer of one. */
  const answeredBy = async (during: (by: (n: number) => Promise<boolean>) => Promise<void>): Promise<string[]> => {
    const asking = new Daemon(client.host, [process.execPath, "-e", ASK, "192.168.50.10"]);
    try {
      await during((n) =>
        until(`the next answer is that of router ${n}`, () => asking.lastLine() === `site 10.99.${n}.1`),
      );
    } finally {
      asking.kill();
      await asking.exited;
    }
    const answers = asking
      .output()
      .trim()
      .split("\n")
      .filter((answer) => answer !== NOBODY);
    return answers.filter((answer, i) => answer !== answers[i - 1]);
  };
  /** Everything to and from the lab is dropped in silence: no connection ends. */
  const cut = (host: Host) =>
    shell(
      host,
      `nft 'add table inet cut; add chain inet cut in { type filter hook input priority -300; }; add chain inet cut out { type filter hook output priority -300; };
      add rule inet cut in iifname eth0 drop; add rule inet cut out oifname eth0 drop'`,
    );
  const mend = (host: Host) => shell(host, "nft delete table inet cut");

  /** A wire between a router and a site, and the way to the site's addresses. */
  async function wire(router: Host, to: Host, n: number, ...prefixes: string[]): Promise<void> {
    const name = `lan-${to.name}`;
    const third = to.name === "twin" ? 98 : 99;
    router.netlink.addLink({ kind: "veth", name, peer: { name: `lan${n}`, netnsFd: to.netns } });
    await shell(to, `ip link set lan${n} up; ip addr add 10.${third}.${n}.2/30 dev lan${n}`);
    await shell(
      router,
      `ip link set ${name} up; ip addr add 10.${third}.${n}.1/30 dev ${name}; echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`,
    );
    await shell(router, `ip -6 route replace default via ${router.gateway6} dev eth0`);
    for (const prefix of prefixes) await shell(router, `ip route replace ${prefix} via 10.${third}.${n}.2`);
  }

  beforeAll(async () => {
    lab = await Lab.create("ha");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    const config = join(dir.path, "config.yaml");
    await Bun.write(config, "node:\n  routes:\n    ha:\n      probe_interval: 4s\n      probe_timeout: 3s\n");
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--config", config] });
    const internet = await lab.host("internet");
    internet.addAddress(`${INTERNET}/32`);
    const [site, twin] = [await lab.host("site"), await lab.host("twin")];
    for (const host of [site, twin]) await shell(host, "ip link del eth0; ip addr add 192.168.50.10/32 dev lo");
    await shell(site, "ip addr add 192.168.60.10/32 dev lo; ip addr add 192.168.70.10/32 dev lo");
    const member = async (name: string, version: string) =>
      new Tailscaled(await lab.host(name), join(dir.path, name), version, env);
    routers = [await member("r1", "1.102.5"), await member("r2", "1.80.3"), await member("r3", "1.102.5")];
    client = await member("client", "1.102.5");
    for (const [i, { host }] of routers.entries()) await wire(host, site, i + 1, ...SUBNETS);
    for (const host of [site, twin, internet])
      daemons.push(new Daemon(host, [process.execPath, "-e", ECHO, host.name]));
    const key = await box.key();
    const joining = client.up(box.url, key);
    // In turn: the one with the lowest id is elected first.
    for (const router of routers) await router.up(box.url, key);
    await joining;
    await client.run("set", "--accept-routes");
  }, 300_000);

  afterAll(async () => {
    await Promise.all([...routers, client].map((member) => member?.stop()));
    for (const daemon of daemons) daemon.kill();
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("HASubnetRouterFailover: of three prefixes with two routers each, those of a router that is killed go to another one, the rest stays, and nothing comes back with it", async () => {
    const [r1, r2, r3] = routers as [Tailscaled, Tailscaled, Tailscaled];
    await serve(r1, A, B);
    await serve(r2, B, C);
    await serve(r3, A, C);
    await through([1, 1, 2], A, B, C);
    const answers = await answeredBy(async (by) => {
      await by(1);
      await r1.stop("SIGKILL");
      await through([3, 2, 2], A, B, C);
      await by(3);
      await r1.start();
      await r1.running();
      await isWell(r1);
      await through([3, 2, 2], A, B, C);
    });
    expect(answers).toEqual(["site 10.99.1.1", "site 10.99.3.1"]);
  }, 300_000);

  test("HASubnetRouterPingFailover: a router that is cut off without a word loses its subnets, whichever it is and however often", async () => {
    const [r1, , r3] = routers as [Tailscaled, Tailscaled, Tailscaled];
    const answers = await answeredBy(async (by) => {
      await by(3);
      for (const [gone, next] of [
        [r3, 1],
        [r1, 3],
      ] as const) {
        await cut(gone.host);
        await until(`the box has missed ${gone.name} before its connection has ended`, async () => {
          expect(await serving(A)).toEqual([next]);
          const nodes = await box.admin<{ name: string; online: boolean }[]>("nodes", "list");
          return nodes.find(({ name }) => name === gone.name)!.online;
        });
        await through([next, 2, 2], A, B, C);
        await by(next);
        await mend(gone.host);
        await isWell(gone);
      }
    });
    expect(answers).toEqual([3, 1, 3].map((n) => `site 10.99.${n}.1`));
  }, 300_000);

  test("HASubnetRouterFailoverDockerDisconnect (#3203): a router that is taken from the network and put back is the next one again", async () => {
    const [r1, , r3] = routers as [Tailscaled, Tailscaled, Tailscaled];
    await shell(r3.host, "ip link set eth0 down");
    await through([1, 2, 2], A, B, C);
    const { ip6, gateway4, gateway6 } = r3.host;
    await shell(
      r3.host,
      `ip link set eth0 up; ip addr add ${ip6}/64 dev eth0 nodad; ip route add default via ${gateway4}; ip -6 route replace default via ${gateway6} dev eth0`,
    );
    await isWell(r3);
    await r1.stop("SIGKILL");
    await through([3, 2, 2], A, B, C);
    await r1.start();
    await r1.running();
  }, 300_000);

  test("an exit node that is gone is replaced by the one that is chosen instead", async () => {
    const [r1, r2] = routers as [Tailscaled, Tailscaled, Tailscaled];
    const leavesAs = (host: Host | null) =>
      until(`the client goes out by ${host?.name ?? NOBODY}`, async () => {
        expect(await answerOf(INTERNET)).toBe(host ? `internet ${host.ip4}` : NOBODY);
        return true;
      });
    for (const router of [r1, r2]) {
      await router.run("set", "--advertise-exit-node", "--advertise-routes=");
      await box.admin("nodes", "approve-routes", "-i", await idOf(router), "-r", "0.0.0.0/0");
    }
    await until("both are offered", async () => /r1.*r2/s.test(await client.run("exit-node", "list")));
    await client.run("set", "--exit-node=r1");
    await leavesAs(r1.host);
    await r1.stop("SIGKILL");
    await leavesAs(null);
    await client.run("set", "--exit-node=r2");
    await leavesAs(r2.host);
    await client.run("set", "--exit-node=");
    await leavesAs(client.host);
    await r1.start();
    await r1.running();
  }, 300_000);

  test("4via6: two sites with the same addresses, each reached by its own number through its own router", async () => {
    const [r1, , r3] = routers as [Tailscaled, Tailscaled, Tailscaled];
    const twin = lab.hosts.find(({ name }) => name === "twin")!;
    await wire(r3.host, twin, 3, A);
    const via = async (site: number, prefix: string) => (await client.run("debug", "via", `${site}`, prefix)).trim();
    const routes = [await via(1, A), await via(7, A)] as const;
    expect(routes).toEqual(["fd7a:115c:a1e0:b1a:0:1:c0a8:3200/120", "fd7a:115c:a1e0:b1a:0:7:c0a8:3200/120"]);
    await r1.run("set", "--advertise-exit-node=false");
    await Promise.all([serve(r1, routes[0]), serve(r3, routes[1])]);
    for (const [number, wanted] of [
      [1, "site 10.99.1.1"],
      [7, "twin 10.98.3.1"],
    ] as const) {
      const address = (await via(number, "192.168.50.10/32")).replace("/128", "");
      await until(`${address} is ${wanted}`, async () => {
        expect(await answerOf(`[${address}]`)).toBe(wanted);
        return true;
      });
    }
  }, 300_000);
});
