import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { createServer } from "node:net";
import { asNobody, noNetns, noUnprivileged, TestNetns, until } from "../ffi/testing.ts";
import { ping, rss, tcpThroughput, transferHash, udpEcho } from "./measure.ts";
import { processesIn } from "./namespaces.ts";
import { type Host, Lab } from "./network.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

/** What arrives may be late; what does not is waited for shortly. */
const ALL = { count: 3, intervalMs: 10, timeoutMs: 30_000 };
const NONE = { count: 1, intervalMs: 10, timeoutMs: 300 };

describe.skipIf(noNetns)("a lab of two hosts", () => {
  let lab: Lab;
  let a: Host;
  let b: Host;
  beforeAll(async () => {
    if (noNetns) return;
    lab = await Lab.create("test");
    a = await lab.host("a");
    b = await lab.host("b");
  });
  afterAll(async () => {
    await lab?.close();
  });

  test("they ping each other over IPv4 and IPv6", async () => {
    for (const [from, to] of [
      [a, b.ip4],
      [b, a.ip4],
      [a, b.ip6],
      [b, a.ip6],
    ] as const) {
      const result = await ping(from, to, ALL);
      expect(result).toMatchObject({ sent: 3, received: 3 });
      expect(result.min).toBeGreaterThan(0);
      expect(result.p50).toBeGreaterThanOrEqual(result.min);
      expect(result.max).toBeGreaterThanOrEqual(result.p99);
    }
  });

  test("there is no way out to the machine", async () => {
    const server = createServer((socket) => socket.end());
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    try {
      const connect = `require("node:net").connect(${port}, process.argv.at(-1)).on("connect", () => process.exit(0)).on("error", (error) => { console.log(error.code); process.exit(1); });`;
      const result = await a.run([process.execPath, "-e", connect, "--", "127.0.0.1"]);
      expect(result).toMatchObject({ code: 1, stdout: "ECONNREFUSED\n" });
      expect((await ping(a, "203.0.113.1", NONE)).received).toBe(0);
    } finally {
      server.close();
    }
    expect(
      lab.router
        .links()
        .map((link) => link.name)
        .sort(),
    ).toEqual(["h1", "h2", "lo"]);
  });

  test("throughput is measured with each tool", async () => {
    const own = await tcpThroughput(a, b, { seconds: 0.3, tool: "weft" });
    expect(own).toMatchObject({ tool: "weft" });
    expect(own.bytes).toBeGreaterThan(1e6);
    expect(own.mbps).toBeCloseTo((own.bytes * 8) / own.seconds / 1e6, 5);
    if (Bun.which("iperf3") === null) return;
    const iperf = await tcpThroughput(b, a, { seconds: 1, address: a.ip6 });
    expect(iperf).toMatchObject({ tool: "iperf3" });
    expect(iperf.bytes).toBeGreaterThan(1e6);
  });

  test("a transfer arrives byte for byte", async () => {
    const over4 = await transferHash(a, b, 5_000_001);
    expect(over4).toMatchObject({ ok: true, bytes: 5_000_001 });
    const over6 = await transferHash(b, a, 5_000_001, { address: a.ip6 });
    // The same deterministic bytes.
    expect(over6).toMatchObject({ ok: true, sent: over4.sent });
    expect((await transferHash(a, b, 5_000_000)).sent).not.toBe(over4.sent);
  });

  test("a measurement that cannot be made is a sentence, not a hang", async () => {
    await expect(transferHash(a, b, 1000, { address: "203.0.113.9" })).rejects.toThrow(/^tcp-sink on b: /);
    await expect(ping(a, "nonsense", NONE)).rejects.toThrow('ping on a: ping: "nonsense" is not an IP address');
  });

  test("blocked UDP is blocked, both ways and in both families, and nothing else is", async () => {
    const udp = async (from: Host, to: Host, address: string, timeoutMs: number) =>
      (await udpEcho(from, to, 3, 200, { address, timeoutMs })).received;
    const all = (ms: number) =>
      Promise.all([udp(a, b, b.ip4, ms), udp(b, a, a.ip4, ms), udp(a, b, b.ip6, ms), udp(b, a, a.ip6, ms)]);
    expect(await udpEcho(a, b, 100, 1200, ALL)).toEqual({ sent: 100, received: 100, loss: 0 });
    const cases: [Host?, Host?][] = [[], [a], [a, b]];
    for (const hosts of cases) {
      lab.blockUdp(...hosts);
      lab.blockUdp(...hosts);
      expect(await all(150)).toEqual([0, 0, 0, 0]);
      expect((await transferHash(a, b, 100_000)).ok).toBe(true);
      expect((await transferHash(a, b, 100_000, { address: b.ip6 })).ok).toBe(true);
      lab.unblockUdp(...hosts);
      lab.unblockUdp(...hosts);
      expect(lab.router.rules()).toHaveLength(5);
    }
    expect(await all(ALL.timeoutMs)).toEqual([3, 3, 3, 3]);
  });

  test("a cable can be taken out and put in", async () => {
    a.link("down");
    await until("no carrier", () => a.netlink.link("eth0")?.running === false);
    expect((await ping(b, a.ip4, NONE)).received).toBe(0);
    expect(a.netlink.interfaceAddresses().map((address) => address.ip)).toContain(a.ip4);
    a.link("up");
    await until("the carrier", () => a.netlink.link("eth0")?.running);
    for (const ip of [a.ip4, a.ip6])
      expect((await ping(b, ip, { ...ALL, timeoutMs: 10_000 })).received).toBeGreaterThan(0);
  });

  test("an address can be added and taken away, also one from elsewhere", async () => {
    for (const prefix of ["10.77.1.77/24", "192.0.2.7/32", "fd77:0:0:1::77/64", "2001:db8::7/128"]) {
      const ip = prefix.split("/")[0]!;
      a.addAddress(prefix);
      await until("the address", () => a.netlink.isLocal(ip));
      expect((await ping(b, ip, ALL)).received).toBe(3);
      a.removeAddress(prefix);
      expect((await ping(b, ip, NONE)).received).toBe(0);
    }
  });

  test("each host has files of its own, and the machine keeps its", async () => {
    const mark = `weft-lab-${process.pid}`;
    const write = `echo a > /run/${mark}; echo a > /var/run/${mark}.2; echo a > /etc/${mark}; pwd`;
    expect(await a.run(["sh", "-c", write], { cwd: "/tmp" })).toMatchObject({ code: 0, stdout: "/tmp\n", stderr: "" });
    const list = `cat /run/${mark} /run/${mark}.2 /etc/${mark} 2>/dev/null; cat /etc/passwd | head -c 4`;
    expect((await a.run(["sh", "-c", list])).stdout).toBe("a\na\na\nroot");
    expect((await b.run(["sh", "-c", list])).stdout).toBe("root");
    for (const path of [`/run/${mark}`, `/etc/${mark}`]) expect(existsSync(path)).toBe(false);
  });

  test("a program has its own process id, its status and its time", async () => {
    const child = a.exec(["sleep", "60"]);
    expect(readFileSync(`/proc/${child.pid}/stat`, "utf8").split(" ")[4]).toBe(String(child.pid));
    await until("the exec", () => readFileSync(`/proc/${child.pid}/comm`, "utf8") === "sleep\n");
    child.kill("SIGTERM");
    await child.exited;
    expect(child.signalCode).toBe("SIGTERM");
    expect(rss(child.pid)).toBe(0);
    expect(rss(process.pid) / (process.memoryUsage().rss / 1024)).toBeCloseTo(1, 0);
    expect(await a.run(["sh", "-c", "echo out; echo err >&2; exit 7"])).toEqual({
      code: 7,
      stdout: "out\n",
      stderr: "err\n",
      timedOut: false,
    });
    expect(await a.run(["sh", "-c", "kill -9 $$"])).toMatchObject({ code: 137, timedOut: false });
    expect(await a.run(["sh", "-c", "sleep 60 & sleep 60"], { timeoutMs: 50 })).toMatchObject({
      code: 137,
      timedOut: true,
    });
    expect((await a.run(["cat"], { stdin: new TextEncoder().encode("hello") })).stdout).toBe("hello");
    expect((await a.run(["printenv", "X"], { env: { PATH: process.env.PATH, X: "y" } })).stdout).toBe("y\n");
  });

  test("a name is taken once", async () => {
    await expect(lab.host("a")).rejects.toThrow("the lab has a host a already");
  });
});

/** Network namespaces that some process of this machine is in. */
function namespaces(): Set<string> {
  const found = new Set<string>();
  for (const pid of readdirSync("/proc").filter((entry) => /^\d+$/.test(entry))) {
    try {
      found.add(readlinkSync(`/proc/${pid}/ns/net`));
    } catch {
      // Ended meanwhile.
    }
  }
  return found;
}

const alive = (pid: number) => {
  try {
    return !readFileSync(`/proc/${pid}/stat`, "utf8").includes(") Z ");
  } catch {
    return false;
  }
};

describe.skipIf(noNetns)("the end of a lab", () => {
  test("by close: no process, no descriptor, no namespace is left", async () => {
    const descriptors = () => readdirSync("/proc/self/fd").length;
    const before = descriptors();
    const lab = await Lab.create();
    const a = await lab.host("a");
    await lab.host("b", { privateFiles: false });
    const ids = new Set(
      [lab.routerNetns, ...lab.hosts.map((host) => host.netns)].map((fd) => readlinkSync(`/proc/self/fd/${fd}`)),
    );
    // One that daemonized, one that ignores signals.
    await a.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"]);
    const stubborn = a.exec(["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 600; done"]);
    const inside = await until("the programs", () => (processesIn(ids).length >= 4 ? processesIn(ids) : null));
    await lab.close();
    await lab.close();
    expect(inside.filter(alive)).toEqual([]);
    expect(await stubborn.exited).toBe(137);
    expect([...namespaces()].filter((id) => ids.has(id))).toEqual([]);
    await until("the descriptors", () => descriptors() <= before);
    await expect(lab.host("c")).rejects.toThrow("is closed");
  });

  for (const signal of ["SIGKILL", "SIGTERM"] as const) {
    test(`by ${signal} to its process: nothing is left`, async () => {
      const script = `
        import { readlinkSync } from "node:fs";
        import { Lab } from ${JSON.stringify(`${import.meta.dir}/network.ts`)};
        import { processesIn } from ${JSON.stringify(`${import.meta.dir}/namespaces.ts`)};
        const lab = await Lab.create();
        const a = await lab.host("a");
        a.exec(["sleep", "600"]);
        await a.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"]);
        const ids = new Set([lab.routerNetns, a.netns].map((fd) => readlinkSync("/proc/self/fd/" + fd)));
        console.log(JSON.stringify({ ids: [...ids], pids: processesIn(ids) }));
        setInterval(() => {}, 1000);`;
      const owner = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe", stderr: "inherit" });
      const { value } = await owner.stdout.getReader().read();
      const { ids, pids } = JSON.parse(new TextDecoder().decode(value)) as { ids: string[]; pids: number[] };
      expect(pids.length).toBeGreaterThanOrEqual(3);
      expect(pids.every(alive)).toBe(true);
      owner.kill(signal);
      await owner.exited;
      await until("the end of all", () => !pids.some(alive));
      await until("the end of the namespaces", () => !ids.some((id) => namespaces().has(id)));
    });
  }
});

describe("a lab without rights", () => {
  test.skipIf(noUnprivileged)("says what it needs", async () => {
    using netns = new TestNetns();
    const code = `await Lab.create().then(() => console.log("made"), (error) => console.log(error.message));`;
    expect(await asNobody(netns, { Lab: `${import.meta.dir}/network.ts` }, code)).toBe(
      "make a network namespace: not permitted (EPERM): a lab of network namespaces needs root, or a user namespace: " +
        "run it under `unshare -Urnm`\n",
    );
  });
});
