// ECN and DSCP across a tunnel (RFC 6040, and as WireGuard in the kernel does): the router between both ends looks at the outer
// headers and marks them, programs at both ends set and read the inner ones.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { withNetns } from "../ffi/netns.ts";
import { ping, transferHash, udpFlow } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { cannotUseNamespaces, skip } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { type Implementation, WgEnd } from "./lib/wg.ts";

const tools = ["wg", "nft"].filter((tool) => Bun.which(tool) === null).join(", ");
const noTools = tools && `${tools} missing: apt-get install wireguard-tools nftables`;

/** Expedited forwarding. */
const DSCP = 46 << 2;
const FIELDS = { "not-ect": 0, ect1: 1, ect0: 2, ce: 3 } as const;
type Field = keyof typeof FIELDS;
const DATAGRAMS = 200;

describe.skipIf(skip(cannotUseNamespaces ?? (noTools || null)))("ECN and DSCP", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  beforeAll(async () => {
    lab = await Lab.create(`ecn${process.pid}`);
    h1 = await lab.host("one");
    h2 = await lab.host("two");
  });
  afterAll(() => lab?.close());

  /** Runs nft on the router. */
  function nft(script: string): string {
    const args = ["nft", "-j", "-f", "-"];
    const { stdout, stderr, exitCode } = withNetns(lab.routerNetns, () =>
      Bun.spawnSync(args, { stdin: new TextEncoder().encode(script) }),
    );
    if (exitCode !== 0) throw new Error(`nft: ${stderr}`);
    return stdout.toString();
  }

  /** Counts what passes the router by its ECN field, and what has a DSCP; `mark` is what is done to it after. */
  function route(mark = ""): void {
    const rules = ["ip", "ip6"].flatMap((ip) => [
      ...Object.keys(FIELDS).map((field) => `${ip} ecn ${field} counter name "of-${field}"`),
      `${ip} dscp != 0 counter name "of-dscp"`,
      ...(mark ? [mark.replaceAll("IP", ip)] : []),
    ]);
    nft(`table inet marks {}
      delete table inet marks
      table inet marks {
        ${[...Object.keys(FIELDS), "dscp"].map((name) => `counter of-${name} {}`).join("\n")}
        chain forward { type filter hook forward priority 0; meta l4proto != udp accept
          ${rules.join("\n")}
        }
      }`);
  }

  function counted(): Record<Field | "dscp", number> {
    const { nftables } = JSON.parse(nft("list counters table inet marks")) as {
      nftables: { counter?: { name: string; packets: number } }[];
    };
    const pairs = nftables.flatMap(({ counter }) => (counter ? [[counter.name.slice(3), counter.packets]] : []));
    return Object.fromEntries(pairs) as Record<Field | "dscp", number>;
  }

  async function pair(
    impls: [Implementation, Implementation],
    flags: string[],
    outer: "outer4" | "outer6",
  ): Promise<[WgEnd, WgEnd]> {
    const start = (host: Host, i: 0 | 1) => WgEnd.start(host, i + 1, impls[i], impls[i] === "weft" ? flags : []);
    const [a, b] = await Promise.all([start(h1, 0), start(h2, 1)]);
    await Promise.all([a.knows(b, { endpoint: b[outer] }), b.knows(a, { endpoint: a[outer] })]);
    expect((await ping(h1, b.ip4, { count: 1, timeoutMs: 30_000 })).received).toBe(1);
    return [a, b];
  }

  /** The ToS bytes with which a flow arrives. */
  async function sees(from: WgEnd, to: WgEnd, address: string, tos: number, segments: number) {
    const amount = { packets: DATAGRAMS };
    const { got } = await udpFlow(from.host, to.host, { address, tos, segments, size: 1200, mbps: 50, amount });
    expect(got).toMatchObject({ received: DATAGRAMS, late: 0, wrong: 0 });
    return got.tos;
  }
  const all = (tos: number) => ({ [tos]: DATAGRAMS });

  for (const [workers, outer, inner] of [
    ["1", "outer4", "ip6"],
    ["2", "outer6", "ip4"],
  ] as const) {
    test(`Weft, --workers ${workers}: the outer header has the inner ECN field and no DSCP; what routers mark comes out`, async () => {
      const [a, b] = await pair(["weft", "weft"], ["--workers", workers], outer);
      await using stack = new AsyncDisposableStack();
      for (const end of [a, b]) stack.use(end);
      for (const segments of [1, 16]) {
        for (const field of Object.keys(FIELDS) as Field[]) {
          route();
          expect(await sees(a, b, b[inner], DSCP | FIELDS[field], segments)).toEqual(all(DSCP | FIELDS[field]));
          const outside = counted();
          expect(outside[field]).toBeGreaterThan(0);
          const rest = Object.entries(outside).filter(([name]) => name !== field && name !== "not-ect");
          expect(rest.filter(([, packets]) => packets > 0)).toEqual([]);
        }
        // A router whose queue is long.
        route("IP ecn { ect0, ect1 } IP ecn set ce");
        for (const field of ["ect0", "ect1"] as const)
          expect(await sees(a, b, b[inner], DSCP | FIELDS[field], segments)).toEqual(all(DSCP | FIELDS.ce));
        expect(await sees(a, b, b[inner], DSCP, segments)).toEqual(all(DSCP));
        // It marks one of three superpackets, or packets.
        route("IP ecn ect0 numgen inc mod 3 0 IP ecn set ce");
        const some = await sees(a, b, b[inner], FIELDS.ect0, segments);
        expect(Object.keys(some)).toEqual([`${FIELDS.ect0}`, `${FIELDS.ce}`]);
      }
      // One that marks what must not be marked: a sender that does not know ECN would never hear of it, so it is lost.
      route("IP ecn set ce");
      const pings = { count: 3, intervalMs: 20 };
      expect((await ping(h1, b[inner], { ...pings, timeoutMs: 100 })).received).toBe(0);
      route();
      expect((await ping(h1, b[inner], { ...pings, timeoutMs: 30_000 })).received).toBe(3);
    }, 300_000);
  }

  test("TCP with ECN hears of the marks, and its bytes are right", async () => {
    const [a, b] = await pair(["weft", "weft"], [], "outer4");
    await using stack = new AsyncDisposableStack();
    for (const end of [a, b]) stack.use(end);
    for (const host of [h1, h2])
      expect((await host.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/tcp_ecn"])).code).toBe(0);
    const heard = async () => {
      const [names, values] = (await h1.run(["grep", "^TcpExt", "/proc/net/netstat"])).stdout.split("\n");
      return Number(values!.split(" ")[names!.split(" ").indexOf("TCPDeliveredCE")]);
    };
    route();
    const before = await heard();
    expect(await transferHash(h1, h2, 20 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(counted().ect0).toBeGreaterThan(0);
    expect(await heard()).toBe(before);
    route("IP ecn ect0 numgen inc mod 20 0 IP ecn set ce");
    expect(await transferHash(h1, h2, 20 << 20, { address: b.ip4 })).toMatchObject({ ok: true });
    expect(await heard()).toBeGreaterThan(before);
  }, 300_000);

  for (const [implementation, program] of [
    ["wireguard-go", "wireguard"],
    ["boringtun", "boringtun-cli"],
    ["gotatun", "gotatun"],
  ] as [Implementation, string][]) {
    // They put no ECN field into the outer header and ignore the one that arrives there.
    test.skipIf(skip(missing([[program]])))(
      `${implementation}: inner fields arrive as they were sent`,
      async () => {
        const [a, b] = await pair(["weft", implementation], [], "outer4");
        await using stack = new AsyncDisposableStack();
        for (const end of [a, b]) stack.use(end);
        for (const tos of [DSCP, DSCP | FIELDS.ect0, FIELDS.ect1, FIELDS.ce]) {
          route();
          expect([tos, await sees(a, b, b.ip4, tos, 16)]).toEqual([tos, all(tos)]);
          expect([tos, await sees(b, a, a.ip6, tos, 16)]).toEqual([tos, all(tos)]);
          expect(counted()).toMatchObject({ dscp: 0 });
        }
      },
      300_000,
    );
  }
});
