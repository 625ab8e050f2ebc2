// The datapath in mesh mode, over real TUN devices in namespaces: paths, relay ring, datagrams, filter, activity.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { ping, transferHash, udpEcho } from "../../lab/measure.ts";
import { type Host, Lab } from "../../lab/network.ts";
import { hex } from "../crypto/keys.ts";
import { Node, reaches, until } from "./node.fixture.ts";

const root = process.getuid?.() === 0;
if (!root) console.error("SKIP: network namespaces need root");

describe.skipIf(!root)("datapath in mesh mode", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`dp${process.pid}`);
    h1 = await lab.host("one");
    h2 = await lab.host("two");
  });
  afterAll(() => lab?.close());

  test("packets wait for a path; then by relay, by both, by UDP, each in both directions", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    await a.knows(b);
    await b.knows(a);
    a.onRelay = (peer, data) => hex(peer) === hex(b.publicKey) && b.dp.relayIn(a.publicKey, data);
    b.onRelay = (peer, data) => hex(peer) === hex(a.publicKey) && a.dp.relayIn(b.publicKey, data);
    const waiting = ping(h1, b.ip4, { count: 1, timeoutMs: 60_000 });
    await until("activity", () => a.activity.includes(hex(b.publicKey)));
    expect(a.relayed).toBe(0);
    a.dp.setPath(b.publicKey, { relay: true });
    b.dp.setPath(a.publicKey, { relay: true });
    expect((await waiting).received).toBe(1);
    await reaches(a, b);
    await reaches(b, a);
    expect(await transferHash(h1, h2, 2 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(a.relayed).toBeGreaterThan(1000);
    expect(a.handshakes).toMatchObject([{ initiator: true }]);
    expect(b.handshakes).toMatchObject([{ initiator: false }]);

    // Not trusted yet: both ways, and copies are dropped by the replay window.
    a.dp.setPath(b.publicKey, { relay: true, udp: b.udp });
    await reaches(a, b);
    expect((await b.dp.stats()).dropped["rx-replay"]).toBeGreaterThan(0);

    a.dp.setPath(b.publicKey, { udp: b.udp });
    b.dp.setPath(a.publicKey, { udp: a.udp });
    await reaches(a, b);
    const before = a.relayed + b.relayed;
    expect(await transferHash(h1, h2, 20 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(await udpEcho(h2, h1, 20, 2000, { address: a.ip6 })).toMatchObject({ received: 20 });
    expect(a.relayed + b.relayed).toBe(before);
    const stats = await a.dp.stats();
    expect(stats.udpTxPackets).toBeGreaterThan(10000);
    expect(stats.offload).toEqual({ tunTso: true, tunUso: true, udpGso: true, udpGro: true });

    // In a mesh nobody roams: data from another address does not move the path.
    expect((await b.dp.dump()).peers[0]).toMatchObject({ allowedIPs: [`${a.ip4}/32`, `${a.ip6}/128`] });
    // At most once a second.
    const [seen, since] = [a.activity.length, performance.now()];
    await ping(h1, b.ip4, { count: 30, intervalMs: 10 });
    expect(a.activity.length - seen).toBeLessThanOrEqual(2 + Math.floor((performance.now() - since) / 1000));
  }, 120_000);

  test("three nodes, every pair at once: flows that alternate reach whom they are for", async () => {
    const h3 = await lab.host("three");
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    await using c = await Node.start(h3, 3);
    const all = [a, b, c];
    for (const x of all) {
      for (const y of all) {
        if (x === y) continue;
        await x.knows(y);
        x.dp.setPath(y.publicKey, { udp: y === b ? `[${y.host.ip6}]:${y.dp.port()}` : y.udp });
      }
    }
    const pairs = all.flatMap((x) => all.filter((y) => y !== x).map((y) => [x, y] as const));
    const results = await Promise.all(
      pairs.map(([x, y], i) => transferHash(x.host, y.host, 3 << 20, { address: i % 2 ? y.ip4 : y.ip6 })),
    );
    expect(results.every((r) => r.ok)).toBe(true);
    for (const { dp } of all)
      expect((await dp.stats()).dropped).toMatchObject({ "rx-source": 0, "rx-bad-tag": 0, "tx-unsealed": 0 });
  }, 120_000);

  test("a link that is too narrow for segmentation offload, and a host without IPv6", async () => {
    const narrow = await lab.host("narrow", { mtu: 1300 });
    await narrow.run([
      "sh",
      "-c",
      "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6",
    ]);
    await using a = await Node.start(narrow, 4, {}, false);
    await using b = await Node.start(h2, 2);
    await a.knows(b);
    await b.knows(a);
    a.dp.setPath(b.publicKey, { udp: b.udp });
    b.dp.setPath(a.publicKey, { udp: a.udp });
    expect(await transferHash(narrow, h2, 3 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(await transferHash(h2, narrow, 3 << 20, { address: a.ip4 })).toMatchObject({ ok: true });
    const { offload } = await a.dp.stats();
    expect(offload.udpGso).toBe(true);
  }, 120_000);

  test("disco and STUN go to the main thread, other datagrams do not; sendDatagram leaves from the same port", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    const disco = new Uint8Array(124).fill(7);
    disco.set([0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac]);
    const stun = new Uint8Array(20);
    stun.set([0x01, 0x01, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    for (const data of [new Uint8Array(1), new Uint8Array(200).fill(9), disco.subarray(0, 37), disco, stun]) {
      expect(a.dp.sendDatagram(b.udp, data)).toBe(true);
    }
    expect(a.dp.sendDatagram(`[${h2.ip6}]:${b.dp.port()}`, disco)).toBe(true);
    await until("three datagrams", () => b.datagrams.length >= 3);
    expect(b.datagrams.map((d) => [d.from, d.data.length])).toEqual([
      [a.udp, 124],
      [a.udp, 20],
      [`[${h1.ip6}]:${a.dp.port()}`, 124],
    ]);
    expect(b.datagrams[0]!.data).toEqual(disco);
    expect((await b.dp.stats()).dropped["rx-unknown"]).toBe(3);
    expect(() => a.dp.sendDatagram("nonsense", disco)).toThrow("not an address and port");
  }, 120_000);

  test("the filter lets in what the rules say, and replies", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    await a.knows(b);
    await b.knows(a);
    a.dp.setPath(b.publicKey, { udp: b.udp });
    b.dp.setPath(a.publicKey, { udp: a.udp });
    await reaches(a, b);
    await b.dp.setFilter({ rules: [], local: [b.ip4, b.ip6] });
    expect((await ping(h1, b.ip4, { count: 2, intervalMs: 20, timeoutMs: 200 })).received).toBe(0);
    await reaches(b, a);
    expect(await transferHash(h2, h1, 1 << 20, { address: a.ip4 })).toMatchObject({ ok: true });
    expect(await udpEcho(h2, h1, 10, 500, { address: a.ip4 })).toMatchObject({ received: 10 });
    expect((await b.dp.stats()).dropped["rx-filter"]).toBeGreaterThan(1);
    await b.dp.setFilter({
      rules: [{ SrcIPs: [a.ip4], DstPorts: [{ IP: b.ip4, Ports: { First: 0, Last: 65535 } }] }],
      local: [b.ip4, b.ip6],
    });
    expect(await transferHash(h1, h2, 1 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect((await ping(h1, b.ip6, { count: 1, timeoutMs: 200 })).received).toBe(0);
    await b.dp.setFilter(null);
    await reaches(a, b);
  }, 120_000);

  test("a packet from an address that is not the peer's is dropped", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    await a.knows(b);
    await b.knows(a);
    a.dp.setPath(b.publicKey, { udp: b.udp });
    b.dp.setPath(a.publicKey, { udp: a.udp });
    await reaches(a, b);
    await b.dp.configure({
      peers: [{ publicKey: a.publicKey, replaceAllowedIPs: true, allowedIPs: [`${a.ip6}/128`] }],
    });
    expect((await ping(h1, b.ip4, { count: 2, intervalMs: 20, timeoutMs: 200 })).received).toBe(0);
    await until("both to be dropped", async () => (await b.dp.stats()).dropped["rx-source"] === 2);
    expect((await ping(h1, b.ip6, { count: 1, timeoutMs: 10_000 })).received).toBe(1);
  }, 120_000);

  test("a wrong configuration is refused in one sentence, and nothing of it takes effect", async () => {
    await using a = await Node.start(h1, 1);
    const port = a.dp.port();
    const wrong = a.dp.configure({ listenPort: 40123, peers: [{ publicKey: new Uint8Array(31) }] });
    expect(await wrong.catch((error: Error) => error.message)).toMatch(/^[^\n]+$/);
    expect(a.dp.port()).toBe(port);
    expect((await a.dp.dump()).peers).toEqual([]);
  }, 120_000);

  test("configurations and paths take effect in the order of their calls", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    const ways = [a.dp, b.dp].map((dp, i) => {
      const other = i === 0 ? b : a;
      const steps = [
        dp.configure({ fwmark: 7 + i }),
        dp.configure({ peers: [{ publicKey: other.publicKey, allowedIPs: [`${other.ip4}/32`, `${other.ip6}/128`] }] }),
      ];
      dp.setPath(other.publicKey, { udp: "192.0.2.1:9" });
      dp.setPath(other.publicKey, { relay: true });
      return Promise.all(steps);
    });
    a.onRelay = (_peer, data) => b.dp.relayIn(a.publicKey, data);
    b.onRelay = (_peer, data) => a.dp.relayIn(b.publicKey, data);
    await Promise.all(ways);
    await reaches(a, b);
  }, 120_000);

  test("the device is deleted: onFatal says so; close leaves no device", async () => {
    await using a = await Node.start(h1, 1);
    h1.netlink.deleteLink("d1");
    await until("onFatal", () => a.fatal !== null);
    expect(a.fatal).toBe("the TUN device was deleted");
    await expect(a.dp.dump()).rejects.toThrow("closed");
    const b = await Node.start(h1, 2);
    expect(h1.netlink.link("d2")).toMatchObject({ mtu: 1280 });
    await b.dp.close();
    expect(h1.netlink.link("d2")).toBeNull();
    await b.dp.close();
  }, 120_000);

  test("a flood of messages for a peer without a session, and a slow relay: memory and rings stay bounded", async () => {
    await using a = await Node.start(h1, 1);
    await using b = await Node.start(h2, 2);
    await a.knows(b);
    a.dp.setPath(b.publicKey, { relay: true });
    Bun.gc(true);
    const before = process.memoryUsage().rss;
    const script = `const s = await Bun.udpSocket({}); const data = new Uint8Array(1200);
      for (let i = 0; i < 20000; i++) { s.send(data, 9, "${b.ip4}"); if (i % 500 === 0) await Bun.sleep(1); } s.close();`;
    expect(await h1.run([process.execPath, "-e", script])).toMatchObject({ code: 0 });
    for (let i = 0; i < 3000; i++) a.dp.relayIn(b.publicKey, new Uint8Array(1400));
    // Each was looked at, or counted as one for which there was no room.
    const seen = async () => {
      const { dropped, udpRxPackets } = await a.dp.stats();
      return dropped["relay-ring-full"]! + udpRxPackets;
    };
    await until("every message to be accounted for", async () => (await seen()) === 3000);
    Bun.gc(true);
    expect(process.memoryUsage().rss - before).toBeLessThan(64 << 20);
  }, 120_000);
});
