// The work split over Workers, forced on: order, nonces, and changes while packets flow (docs/architecture.md, "More cores").
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { ping, rss, transferHash, udpEcho } from "../../lab/measure.ts";
import { type Host, Lab } from "../../lab/network.ts";
import { Node, reaches, until } from "./node.fixture.ts";

const root = process.getuid?.() === 0;
if (!root) console.error("SKIP: network namespaces need root");

const MB = 1 << 20;
const PINGS = { count: 300, intervalMs: 20, timeoutMs: 100 };
const ORDER = `${import.meta.dir}/order.fixture.ts`;

/** Both ends know each other and have their UDP paths. */
async function join(a: Node, b: Node): Promise<void> {
  await a.knows(b);
  await b.knows(a);
  a.dp.setPath(b.publicKey, { udp: b.udp });
  b.dp.setPath(a.publicKey, { udp: a.udp });
}

async function bothWays(a: Node, b: Node, bytes: number): Promise<void> {
  const results = await Promise.all([
    transferHash(a.host, b.host, bytes, { address: b.ip4 }),
    transferHash(b.host, a.host, bytes, { address: a.ip6 }),
  ]);
  expect(results).toMatchObject([
    { ok: true, bytes },
    { ok: true, bytes },
  ]);
}

interface Order {
  received: number;
  reordered: number;
  duplicates: number;
}

/** Numbered datagrams both ways at once; what each end saw. */
async function numbered(a: Node, b: Node, count: number, size: number, perMs: number): Promise<Order[]> {
  const pairs = [
    [a, b],
    [b, a],
  ] as const;
  const ends = pairs.map(([own, other]) => {
    const args = [own.ip4, other.ip4, 7001, count, size, perMs].map(String);
    const child = own.host.exec([process.execPath, ORDER, ...args], { stdin: "pipe", stderr: "inherit" });
    return { child, lines: child.stdout.pipeThrough(new TextDecoderStream()).getReader() };
  });
  // Each must have its port before the other sends.
  for (const { lines } of ends) expect((await lines.read()).value).toBe("bound\n");
  for (const { child } of ends) {
    child.stdin.write("\n");
    await child.stdin.flush();
  }
  return await Promise.all(ends.map(async ({ lines }) => JSON.parse((await lines.read()).value ?? "null") as Order));
}

/** Every data message that goes by the relay: its session and counter. Says what was wrong with one. */
class Counters {
  messages = 0;
  readonly wrong: string[] = [];
  readonly #next = new Map<number, bigint>();

  see(message: Uint8Array): void {
    const view = new DataView(message.buffer, message.byteOffset, message.length);
    if (message.length < 32 || view.getUint32(0, true) !== 4) return;
    this.messages++;
    const session = view.getUint32(4, true);
    const counter = view.getBigUint64(8, true);
    const next = this.#next.get(session) ?? 0n;
    if (counter !== next && this.wrong.length < 5) this.wrong.push(`session ${session}: ${counter} after ${next - 1n}`);
    this.#next.set(session, counter + 1n);
  }

  get sessions(): number {
    return this.#next.size;
  }
}

describe.skipIf(!root)("more Workers than one", () => {
  const options = { workers: 2 };
  /** Two, and two with two helpers each for their ciphers. */
  const some = [2, 6];
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`co${process.pid}`);
    h1 = await lab.host("one");
    h2 = await lab.host("two");
  });
  afterAll(() => lab?.close());

  test.each(some)(
    "%i Workers: 100 MB over TCP each way at once, by hash; against one Worker too; memory stays",
    async (workers) => {
      const options = { workers };
      await using a = await Node.start(h1, 1, options);
      await using b = await Node.start(h2, 2, options);
      await join(a, b);
      await bothWays(a, b, 100 * MB);
      Bun.gc(true);
      const before = rss(process.pid);
      await bothWays(a, b, 100 * MB);
      Bun.gc(true);
      expect(rss(process.pid) - before).toBeLessThan(20_000);
      for (const node of [a, b]) {
        const { dropped, offload, helped, ...counts } = await node.dp.stats();
        expect(helped > 1000).toBe(workers > 2);
        expect(dropped).toMatchObject({ "rx-source": 0, "rx-bad-tag": 0, "tx-unsealed": 0, "rx-replay": 0 });
        expect(offload).toEqual({ tunTso: true, tunUso: true, udpGso: true, udpGro: true });
        for (const count of Object.values(counts)) expect(count).toBeGreaterThan(100_000);
        const [peer] = (await node.dp.dump()).peers;
        expect(peer!.txBytes).toBeGreaterThan(200 * MB);
        expect(peer!.rxBytes).toBeGreaterThan(200 * MB);
      }
      await b.dp.close();
      await using c = await Node.start(h2, 2, { workers: 1 });
      await join(a, c);
      await bothWays(a, c, 20 * MB);
    },
    120_000,
  );

  test.each(some)(
    "%i Workers: numbered datagrams arrive in order and all of them, from the first one on, before there is a session",
    async (workers) => {
      const options = { workers };
      await using a = await Node.start(h1, 1, options);
      await using b = await Node.start(h2, 2, options);
      await a.knows(b);
      await b.knows(a);
      // The path comes when packets wait for it already.
      const ends = numbered(a, b, 3000, 400, 1);
      await until("activity", () => a.activity.length > 0 && b.activity.length > 0);
      a.dp.setPath(b.publicKey, { udp: b.udp });
      b.dp.setPath(a.publicKey, { udp: a.udp });
      const all = { received: 3000, reordered: 0, duplicates: 0 };
      expect(await ends).toEqual([all, all]);
      for (const size of [20, 1200])
        expect(await numbered(a, b, 2000, size, 2)).toMatchObject([{ reordered: 0 }, { reordered: 0 }]);
      for (const { dp } of [a, b])
        expect((await dp.stats()).dropped).toMatchObject({ "tx-unsealed": 0, "rx-replay": 0 });
    },
    120_000,
  );

  test.each(some)(
    "%i Workers: each nonce once and in order, over many sessions: by what the relay sees while peers are added anew",
    async (workers) => {
      const options = { workers };
      await using a = await Node.start(h1, 1, options);
      await using b = await Node.start(h2, 2, options);
      const fromA = new Counters();
      const fromB = new Counters();
      a.onRelay = (_peer, data) => {
        fromA.see(data);
        b.dp.relayIn(a.publicKey, data);
      };
      b.onRelay = (_peer, data) => {
        fromB.see(data);
        a.dp.relayIn(b.publicKey, data);
      };
      const meet = async (own: Node, other: Node) => {
        await own.knows(other);
        own.dp.setPath(other.publicKey, { relay: true });
      };
      await meet(a, b);
      await meet(b, a);
      let done = false;
      const traffic = bothWays(a, b, 8 * MB).finally(() => {
        done = true;
      });
      // TCP backs off: these ask for the next session at once, on either side.
      const pings = [ping(h1, b.ip4, PINGS), ping(h2, a.ip4, PINGS)];
      let rounds = 0;
      for (; !done && rounds < 30; rounds++) {
        const [own, other] = rounds % 2 ? [a, b] : [b, a];
        await own.dp.configure({ peers: [{ publicKey: other.publicKey, remove: true }] });
        await meet(own, other);
        const before = own.handshakes.length;
        await until("another session", () => done || own.handshakes.length > before);
        // Time for traffic on it.
        await Bun.sleep(30);
      }
      await traffic;
      await Promise.all(pings);
      for (const counters of [fromA, fromB]) {
        expect(counters.wrong).toEqual([]);
        expect(counters.messages).toBeGreaterThan(5000);
        expect(counters.sessions).toBeGreaterThan(5);
      }
    },
    120_000,
  );

  test("allowed IPs, paths, marks, filter and other peers change while TCP flows", async () => {
    const h3 = await lab.host("three");
    await using a = await Node.start(h1, 1, options);
    await using b = await Node.start(h2, 2, options);
    await using c = await Node.start(h3, 3, options);
    await join(a, b);
    await join(a, c);
    await reaches(a, b);
    let done = false;
    const traffic = bothWays(a, b, 60 * MB).finally(() => {
      done = true;
    });
    const everything = { rules: [{ SrcIPs: ["*"], DstPorts: [{ IP: "*", Ports: { First: 0, Last: 65535 } }] }] };
    let rounds = 0;
    for (; !done; rounds++) {
      const extra = Array.from({ length: 20 }, (_, i) => `10.${rounds % 200}.${i}.0/24`);
      const allowedIPs = [`${b.ip4}/32`, `${b.ip6}/128`, ...extra];
      await a.dp.configure({ peers: [{ publicKey: b.publicKey, replaceAllowedIPs: true, allowedIPs }] });
      await b.dp.setFilter(rounds % 2 ? null : { ...everything, local: [b.ip4, b.ip6] });
      await a.dp.setFilter(rounds % 2 ? { ...everything, local: [a.ip4, a.ip6] } : null);
      a.dp.setPath(b.publicKey, { udp: rounds % 2 ? b.udp : `[${b.host.ip6}]:${b.dp.port()}` });
      await a.dp.configure({ fwmark: rounds, peers: [{ publicKey: c.publicKey, remove: true }] });
      await join(a, c);
      await Bun.sleep(5);
    }
    await traffic;
    expect(rounds).toBeGreaterThan(5);
    await reaches(a, b);
    // What is configured now holds, in both Workers: the prefix of the last round is b's, that of the peer is c's.
    await a.dp.setFilter(null);
    expect((await ping(h1, c.ip4, { count: 1, timeoutMs: 10_000 })).received).toBe(1);
    const { peers } = await a.dp.dump();
    expect(peers.map((peer) => peer.allowedIPs.length).sort()).toEqual([2, 22]);
    await a.dp.configure({ peers: [{ publicKey: b.publicKey, remove: true }] });
    const { dropped } = await a.dp.stats();
    expect((await ping(h1, b.ip4, { count: 2, intervalMs: 20, timeoutMs: 100 })).received).toBe(0);
    const lost = async () => (await a.dp.stats()).dropped["tun-no-peer"]! - dropped["tun-no-peer"]!;
    await until("both to be dropped", async () => (await lost()) >= 2);
    expect(await lost()).toBe(2);
  }, 120_000);

  test("replies pass the filter from the first packet of a flow on, also of a thousand flows", async () => {
    await using a = await Node.start(h1, 1, options);
    await using b = await Node.start(h2, 2, options);
    await join(a, b);
    await reaches(a, b);
    await a.dp.setFilter({ rules: [], local: [a.ip4, a.ip6] });
    // Each round is a flow of its own, from a new port.
    for (let i = 0; i < 3; i++)
      expect(await udpEcho(h1, h2, 20, 300, { address: i % 2 ? b.ip6 : b.ip4 })).toMatchObject({ received: 20 });
    const script = `const got = new Set(); const sockets = [];
      const echo = process.argv[1];
      for (let i = 0; i < 400; i++) sockets.push(await Bun.udpSocket({ socket: { data() { got.add(i); } } }));
      for (let round = 0; round < 3; round++)
        for (const [i, s] of sockets.entries()) { s.send("x", 7002, echo); if (i % 8 === 0) await Bun.sleep(1); }
      const end = performance.now() + 60_000;
      while (got.size < 400 && performance.now() < end) await Bun.sleep(10);
      console.log(got.size); process.exit(0);`;
    const server = `const s = await Bun.udpSocket({ hostname: process.argv[1], port: 7002,
      socket: { data(socket, data, port, address) { socket.send(data, port, address); } } }); console.log("up");`;
    const echo = h2.exec([process.execPath, "-e", server, b.ip4], { stderr: "ignore" });
    try {
      await echo.stdout.getReader().read();
      const { stdout } = await h1.run([process.execPath, "-e", script, b.ip4]);
      expect(Number(stdout)).toBe(400);
    } finally {
      echo.kill("SIGKILL");
      await echo.exited;
    }
    expect((await ping(h2, a.ip4, { count: 1, timeoutMs: 200 })).received).toBe(0);
    const filtered = async () => (await a.dp.stats()).dropped["rx-filter"];
    await until("it to be dropped", async () => (await filtered()) !== 0);
    expect(await filtered()).toBe(1);
  }, 120_000);

  test.each(some)(
    "%i Workers: a device that is deleted is told once; closing leaves no descriptor and no device",
    async (workers) => {
      const options = { workers };
      const descriptors = () => readdirSync("/proc/self/fd").length;
      const before = descriptors();
      for (let i = 0; i < 3; i++) {
        const a = await Node.start(h1, 1, options);
        h1.netlink.deleteLink("d1");
        await until("onFatal", () => a.fatal !== null);
        expect(a.fatal).toBe("the TUN device was deleted");
        await expect(a.dp.dump()).rejects.toThrow("closed");
        await a.dp.close();
        const b = await Node.start(h1, 2, options);
        await Promise.all([b.dp.close(), b.dp.close()]);
        expect(b.fatal).toBeNull();
        expect(h1.netlink.link("d2")).toBeNull();
      }
      await until("descriptors to be closed", () => descriptors() <= before + 2);
    },
    120_000,
  );

  test("counts of workers that make no sense are refused", async () => {
    for (const workers of [0, -1, 1.5])
      await expect(Node.start(h1, 1, { workers })).rejects.toThrow(/workers: give 1 to 6/);
  });
});
