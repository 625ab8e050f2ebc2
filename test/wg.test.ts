// `bun run wg` and bin/weft-wg as people use them: wg(8), wg-quick(8), other implementations, over real TUN devices.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { ping, transferHash, udpEcho } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { cannotUseNamespaces, skip, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { type Implementation, WEFT_WG, WgEnd } from "./lib/wg.ts";

const MB = 1 << 20;
const noTools = ["wg", "wg-quick", "ip"].filter((tool) => Bun.which(tool) === null).join(", ") || null;
const cannot = cannotUseNamespaces ?? (noTools && `${noTools} missing: apt-get install wireguard-tools iproute2`);

async function reaches(from: WgEnd, to: WgEnd): Promise<void> {
  for (const ip of [to.ip4, to.ip6]) {
    const { received } = await ping(from.host, ip, { count: 3, intervalMs: 30, timeoutMs: 30_000 });
    expect({ to: ip, received }).toEqual({ to: ip, received: 3 });
  }
}

async function moves(from: WgEnd, to: WgEnd, bytes: number, address: string): Promise<void> {
  expect(await transferHash(from.host, to.host, bytes, { address })).toMatchObject({ ok: true, bytes });
}

async function echoes(from: WgEnd, to: WgEnd, address: string): Promise<void> {
  for (const size of [8, 1200, 3000]) {
    expect(await udpEcho(from.host, to.host, 20, size, { address, timeoutMs: 30_000 })).toMatchObject({
      sent: 20,
      received: 20,
    });
  }
}

const ends = (resource: { exited: Promise<number> }, seconds: number) =>
  Promise.race([resource.exited, Bun.sleep(seconds * 1000).then(() => "still running")]);

describe.skipIf(skip(cannot))("weft wg", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`wg${process.pid}`);
    h1 = await lab.host("one");
    h2 = await lab.host("two");
  });
  afterAll(() => lab?.close());

  test.each(["1", "2"])(
    "two ends of %s Workers: IPv4 and IPv6 inside and outside, TCP by hash, UDP both ways, preshared key, roaming",
    async (workers) => {
      await using a = await WgEnd.start(h1, 1, "weft", ["--workers", workers]);
      await using b = await WgEnd.start(h2, 2, "weft", ["--workers", workers]);
      await a.knows(b, { endpoint: b.outer4 });
      await b.knows(a);
      await reaches(a, b);
      await moves(a, b, 50 * MB, b.ip4);
      await moves(b, a, 10 * MB, a.ip6);
      await echoes(a, b, b.ip4);
      await echoes(b, a, a.ip6);

      // IPv6 outside: the other side follows.
      await a.knows(b, { endpoint: b.outer6 });
      await reaches(a, b);
      expect(await b.endpoint()).toBe(a.outer6);
      await moves(a, b, 5 * MB, b.ip6);
      await moves(b, a, 5 * MB, a.ip4);

      // A new port on one side: the other follows the next packet.
      await a.must(a.wg("set", a.device, "listen-port", "40000"));
      await reaches(a, b);
      expect(await b.endpoint()).toBe(`[${h1.ip6}]:40000`);
      await reaches(b, a);

      // Keys that differ keep them apart; the same one joins them again.
      const psk = (await a.wg("genpsk")).stdout;
      await a.knows(b, { presharedKey: psk, endpoint: b.outer4 });
      await a.must(a.wg("set", a.device, "peer", b.publicKey, "remove"));
      await a.knows(b, { presharedKey: psk, endpoint: b.outer4 });
      expect((await ping(h1, b.ip4, { count: 1, timeoutMs: 500 })).received).toBe(0);
      await b.knows(a, { presharedKey: psk });
      await reaches(a, b);

      const [line] = (await a.must(a.wg("show", a.device, "dump"))).trim().split("\n").slice(1);
      const [key, shared, , , handshake, rx, tx, keepalive] = line!.split("\t");
      expect([key, shared, keepalive]).toEqual([b.publicKey, psk.trim(), "off"]);
      expect(Math.abs(Date.now() / 1000 - Number(handshake))).toBeLessThan(300);
      expect(Number(rx)).toBeGreaterThan(300);
      expect(Number(tx)).toBeGreaterThan(300);
    },
    300_000,
  );

  test("answers leave from the local address to which the peer wrote", async () => {
    await using a = await WgEnd.start(h1, 1);
    await using b = await WgEnd.start(h2, 2);
    const other = h2.ip4.replace(/\d+$/, "9");
    const other6 = h2.ip6.replace(/2$/, "9");
    h2.addAddress(`${other}/24`);
    h2.addAddress(`${other6}/64`);
    try {
      await b.knows(a);
      for (const endpoint of [`${other}:${b.port}`, `[${other6}]:${b.port}`]) {
        await a.knows(b, { endpoint });
        await reaches(a, b);
        await reaches(b, a);
        expect(await a.endpoint()).toBe(endpoint);
      }
      // The address goes: the tunnel goes on from another one.
      h2.removeAddress(`${other6}/64`);
      await reaches(b, a);
      expect(await a.endpoint()).toBe(b.outer6);
    } finally {
      h2.removeAddress(`${other}/24`);
    }
  }, 300_000);

  test("persistent keepalive opens the tunnel without traffic", async () => {
    await using a = await WgEnd.start(h1, 1);
    await using b = await WgEnd.start(h2, 2);
    await b.knows(a);
    await a.knows(b, { endpoint: b.outer4, keepalive: 1 });
    await until("a handshake", async () => (await b.endpoint()) === a.outer4);
    await a.must(
      a.wg("set", a.device, "fwmark", "0x1234", "peer", b.publicKey, "allowed-ips", `${b.ip4}/32,10.9.0.0/16`),
    );
    expect((await a.wg("show", a.device, "fwmark")).stdout).toBe("0x1234\n");
    expect((await a.wg("show", a.device, "allowed-ips")).stdout).toBe(`${b.publicKey}\t${b.ip4}/32 10.9.0.0/16\n`);
    expect((await ping(h1, b.ip4, { count: 2, intervalMs: 30, timeoutMs: 30_000 })).received).toBe(2);
    expect((await ping(h1, b.ip6, { count: 1, timeoutMs: 300 })).received).toBe(0);
  }, 300_000);

  test("garbage on the port and on the socket: the tunnel goes on", async () => {
    await using a = await WgEnd.start(h1, 1);
    await using b = await WgEnd.start(h2, 2);
    await a.knows(b, { endpoint: b.outer4 });
    await b.knows(a);
    await reaches(a, b);
    const script = `
      const socket = await Bun.udpSocket({});
      for (let i = 0; i < 3000; i++) {
        const bytes = crypto.getRandomValues(new Uint8Array([1, 31, 32, 64, 92, 148, 1400][i % 7]));
        if (i % 2) bytes.set([1 + (i >> 1) % 4, 0, 0, 0].slice(0, bytes.length));
        socket.send(bytes, ${b.port}, "${h2.ip4}");
      }
      socket.close();
      for (const text of ["\\0".repeat(100000), "set=1\\nprivate_key=x\\n\\n", "get=1\\n".repeat(1000), "set=1\\npublic_key="]) {
        const net = require("node:net").connect("/var/run/wireguard/${a.device}.sock");
        net.on("error", () => {});
        net.end(text);
        net.resume();
        await new Promise((resolve) => net.on("close", resolve));
      }`;
    expect(await h1.run([process.execPath, "-e", script])).toMatchObject({ code: 0 });
    await reaches(b, a);
    await reaches(a, b);
    expect((await a.wg("show", a.device)).code).toBe(0);
  }, 300_000);

  test("it ends when told to, when its device is deleted, when its socket is removed, and leaves nothing behind", async () => {
    const socket = (end: WgEnd) => h1.run(["ls", "-ld", "/var/run/wireguard", `/var/run/wireguard/${end.device}.sock`]);
    for (const how of ["SIGTERM", "SIGINT", "ip link del", "rm"]) {
      await using a = await WgEnd.start(h1, 1);
      const { stdout } = await socket(a);
      expect(stdout).toMatch(/^drwx------.*\nsrw------- /);
      if (how === "rm") await h1.run(["rm", `/var/run/wireguard/${a.device}.sock`]);
      else if (how === "ip link del") h1.netlink.deleteLink(a.device);
      else void a.stop(how as NodeJS.Signals);
      expect([how, await ends(a, 60)]).toEqual([how, 0]);
      expect(h1.netlink.link(a.device)).toBeNull();
      expect((await socket(a)).code).not.toBe(0);
    }
  }, 300_000);

  test("mistakes end in one sentence", async () => {
    await using a = await WgEnd.start(h1, 1);
    const cases: [string[], RegExp][] = [
      [[a.device], /another process holds it/],
      [["-f", a.device], /another process holds it/],
      [["lo"], /another kind has that name/],
      [["a-very-long-device-name"], /at most 15/],
      [[], /name of the device is missing/],
      [["--mtu", "5", "x0"], /--mtu takes a number/],
      [["--bogus", "x0"], /unknown flag "--bogus"/],
      [["x0", "x1"], /unexpected argument "x1"/],
    ];
    for (const [args, expected] of cases) {
      const { code, stderr, stdout } = await h1.run([WEFT_WG, ...args]);
      expect([args, code !== 0, stdout, stderr.trim().split("\n").length]).toEqual([args, true, "", 1]);
      expect(stderr).toMatch(expected);
    }
    expect((await a.wg("set", a.device, "listen-port", "0")).code).toBe(0);
    const taken = await h1.exec(
      [process.execPath, "-e", `await Bun.udpSocket({ port: 40404, hostname: "0.0.0.0" }); console.log("bound")`],
      { stderr: "ignore" },
    );
    try {
      for await (const _ of taken.stdout) break;
      const { code, stderr } = await a.wg("set", a.device, "listen-port", "40404");
      expect([code, stderr]).toEqual([1, "Unable to modify interface: Address already in use\n"]);
      expect((await a.wg("show", a.device, "listen-port")).stdout).not.toContain("40404");
    } finally {
      taken.kill("SIGKILL");
    }
  }, 300_000);

  test("weft-wg works through a link and from anywhere, in the background", async () => {
    using dir = tempDir("wg");
    symlinkSync(WEFT_WG, join(dir.path, "link"));
    mkdirSync(join(dir.path, "sub"));
    symlinkSync("../link", join(dir.path, "sub", "again"));
    const name = `v${process.pid}`;
    const started = await h1.run(["./sub/again", name], { cwd: dir.path });
    expect(started).toMatchObject({ code: 0, stdout: "", stderr: "" });
    expect((await h1.run(["wg", "show", name])).code).toBe(0);
    h1.netlink.deleteLink(name);
    const sock = `/var/run/wireguard/${name}.sock`;
    await until("the socket to go", async () => (await h1.run(["ls", sock])).code !== 0);
    expect((await h1.run([WEFT_WG, name], { env: { ...process.env, WEFT_BUN: "/bin/false" } })).stderr).toContain(
      "WEFT_BUN",
    );
  }, 300_000);

  test("wg-quick up and down", async () => {
    await using b = await WgEnd.start(h2, 2);
    using dir = tempDir("wgquick");
    const name = `q${process.pid}`;
    const conf = join(dir.path, `${name}.conf`);
    const key = (await b.wg("genkey")).stdout.trim();
    const publicKey = (await b.wgIn(key, "pubkey")).stdout.trim();
    writeFileSync(
      conf,
      `[Interface]\nPrivateKey = ${key}\nAddress = 10.200.0.7/24, fd20::7/64\nMTU = 1380\n\n` +
        `[Peer]\nPublicKey = ${b.publicKey}\nAllowedIPs = 10.200.0.0/24, fd20::/64\nEndpoint = ${b.outer6}\nPersistentKeepalive = 25\n`,
      { mode: 0o600 },
    );
    await b.must(b.wg("set", b.device, "peer", publicKey, "allowed-ips", "10.200.0.7/32,fd20::7/128"));
    const env = { ...process.env, WG_QUICK_USERSPACE_IMPLEMENTATION: WEFT_WG };
    const up = await h1.run(["wg-quick", "up", conf], { env });
    expect(up).toMatchObject({ code: 0 });
    expect(h1.netlink.link(name)).toMatchObject({ up: true, mtu: 1380 });
    for (const ip of [b.ip4, b.ip6]) expect((await ping(h1, ip, { count: 2, timeoutMs: 30_000 })).received).toBe(2);
    expect(await transferHash(h1, h2, 5 * MB, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(await h1.run(["wg-quick", "down", conf], { env })).toMatchObject({ code: 0 });
    expect(h1.netlink.link(name)).toBeNull();
    await until("the socket to go", async () => (await h1.run(["ls", `/var/run/wireguard/${name}.sock`])).code !== 0);
  }, 300_000);

  for (const [implementation, program] of [
    ["wireguard-go", "wireguard"],
    ["boringtun", "boringtun-cli"],
    ["gotatun", "gotatun"],
  ] as [Implementation, string][]) {
    describe.skipIf(skip(missing([[program]])))(implementation, () => {
      test("initiates, and is initiated to: IPv4, IPv6, TCP, UDP, preshared key", async () => {
        for (const initiator of ["weft", implementation] as const) {
          await using weft = await WgEnd.start(h1, 1);
          await using other = await WgEnd.start(h2, 2, implementation);
          const presharedKey = (await weft.wg("genpsk")).stdout;
          const [first, second] = initiator === "weft" ? [weft, other] : [other, weft];
          await second.knows(first, { presharedKey });
          await first.knows(second, { presharedKey, endpoint: initiator === "weft" ? second.outer4 : second.outer6 });
          await reaches(first, second);
          await reaches(second, first);
          await moves(weft, other, 5 * MB, other.ip4);
          await moves(other, weft, 5 * MB, weft.ip6);
          await echoes(weft, other, other.ip4);
        }
      }, 300_000);
    });
  }
});
