// `bun run wg --workers N` with the work forced onto many threads: what comes out, in which order, and how it ends when one
// of them breaks. Inside of the process src/datapath/cores.test.ts looks, at the ciphers crew.test.ts.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { resolve } from "node:path";
import { ping, transferHash, udpFlow } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { cannotUseNamespaces, skip, until } from "./lib/mesh.ts";
import { WgEnd } from "./lib/wg.ts";

const MB = 1 << 20;
const noWg = Bun.which("wg") === null ? "wg is missing: apt-get install wireguard-tools" : null;

/** A device that closes the epoll set of one of its Workers under it when it reads a line. */
const BREAKING = `
  import { readdirSync, readFileSync, readlinkSync } from "node:fs";
  import { closeFd } from ${JSON.stringify(resolve(import.meta.dir, "../ffi/libc.ts"))};
  import { main } from ${JSON.stringify(resolve(import.meta.dir, "../src/cli/wg.ts"))};
  const [watched, ...argv] = process.argv.slice(1);
  const link = (fd) => { try { return readlinkSync("/proc/self/fd/" + fd); } catch { return ""; } };
  // The runtime's own sets hold pointers as data, a Worker's small numbers.
  const watches = (fd) => {
    const targets = readFileSync("/proc/self/fdinfo/" + fd, "utf8").matchAll(/^tfd:\\s*(\\d+).*data:\\s*([0-9a-f]+)/gm);
    return [...targets].filter((m) => parseInt(m[2], 16) < 16).map((m) => link(m[1]));
  };
  process.stdin.once("data", () => {
    const sets = readdirSync("/proc/self/fd").filter((fd) => link(fd).includes("eventpoll"));
    const found = sets.find((fd) => watches(fd).some((target) => target.startsWith(watched)));
    if (found === undefined) throw new Error("no epoll set watches " + watched);
    closeFd(Number(found));
    console.log("closed");
  });
  process.exit(await main(argv));`;

describe.skipIf(skip(cannotUseNamespaces ?? noWg))("more threads", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`cores${process.pid}`);
    h1 = await lab.host("one");
    h2 = await lab.host("two");
  });
  afterAll(() => lab?.close());

  /** How often this host's TCP has found that segments overtook each other on the way; what was lost does not count. */
  async function overtaken(host: Host): Promise<number> {
    const [names, values] = (await host.run(["grep", "^TcpExt:", "/proc/net/netstat"])).stdout.split("\n");
    const counts = values!.split(" ");
    const found = names!.split(" ").flatMap((name, i) => (/^TCP.*Reorder$/.test(name) ? [Number(counts[i])] : []));
    expect(found.length).toBeGreaterThan(0);
    return found.reduce((sum, n) => sum + n, 0);
  }

  for (const workers of ["3", "4", "6"]) {
    test(`--workers ${workers}: 200 MB by hash, in order, also beside one Worker`, async () => {
      await using many = await WgEnd.start(h1, 1, "weft", ["--workers", workers]);
      for (const other of ["1", workers]) {
        await using b = await WgEnd.start(h2, 2, "weft", ["--workers", other]);
        await Promise.all([many.knows(b, { endpoint: b.outer4 }), b.knows(many, { endpoint: many.outer4 })]);
        expect(await transferHash(h1, h2, 100 * MB, { address: b.ip4 })).toMatchObject({ ok: true });
        expect(await transferHash(h2, h1, 100 * MB, { address: many.ip6 })).toMatchObject({ ok: true });
        expect([await overtaken(h1), await overtaken(h2)]).toEqual([0, 0]);
        const flow = { size: 1372, mbps: 0, amount: { packets: 50_000 }, segments: 47, address: b.ip4 };
        expect((await udpFlow(h1, h2, flow)).got).toMatchObject({ late: 0, wrong: 0 });
      }
    }, 300_000);
  }

  test("more than six are six, and it says so", async () => {
    const device = `x${process.pid}`;
    const child = h1.exec([process.execPath, "-e", BREAKING, "-", "--workers", "9", device], { stdout: "ignore" });
    await until("the device", () => h1.netlink.link(device) !== null);
    await until("its socket", async () => (await h1.run(["wg", "show", device])).code === 0);
    child.kill("SIGTERM");
    expect(await child.exited).toBe(0);
    expect(await new Response(child.stderr).text()).toBe(
      `ERROR: (${device}) --workers 9: more than 6 bring nothing, so 6 are used\n`,
    );
  }, 300_000);

  // Whoever has no TUN device to watch has the sockets.
  for (const [workers, watched] of [
    ["1", "/dev/net/tun"],
    ["2", "/dev/net/tun"],
    ["2", "socket:"],
    ["6", "/dev/net/tun"],
    ["6", "socket:"],
  ] as const) {
    test(`--workers ${workers}: when the Worker that watches ${watched} breaks the process ends in one sentence`, async () => {
      const device = `y${process.pid}`;
      const child = h1.exec([process.execPath, "-e", BREAKING, watched, "--workers", workers, device], {
        stdin: "pipe",
      });
      try {
        await until("its socket", async () => (await h1.run(["wg", "show", device])).code === 0);
        const port = Number((await h1.run(["wg", "show", device, "listen-port"])).stdout);
        h1.netlink.setLink(device, { up: true });
        h1.netlink.addAddress({ link: device, prefix: "10.201.0.1/24" });
        child.stdin.write("\n");
        await child.stdin.flush();
        for await (const _ of child.stdout) break;
        // Something to do for each Worker.
        const datagram = `(await Bun.udpSocket({})).send("x", ${port}, "127.0.0.1"); process.exit(0)`;
        const busy = [ping(h1, "10.201.0.2", { count: 1, timeoutMs: 100 }), h1.run([process.execPath, "-e", datagram])];
        expect(await Promise.race([child.exited, Bun.sleep(60_000).then(() => "it goes on")])).toBe(1);
        await Promise.allSettled(busy);
        // EBADF, or EINVAL when something else has got the number.
        expect(await new Response(child.stderr).text()).toMatch(
          new RegExp(`^ERROR: \\(${device}\\) the datapath failed: epoll_wait failed with errno (9|22)\n$`),
        );
        expect(h1.netlink.link(device)).toBeNull();
        expect((await h1.run(["ls", `/var/run/wireguard/${device}.sock`])).code).not.toBe(0);
      } finally {
        child.kill("SIGKILL");
      }
    }, 300_000);
  }
});
