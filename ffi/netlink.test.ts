import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync } from "node:fs";
import { SysError } from "./errno.ts";
import { Netlink, type NetlinkEvent, NetlinkMonitor, type RuleSpec } from "./netlink.ts";
import { asNobody, noNetns, noUnprivileged, TestNetns, until } from "./testing.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

const MAIN = 254;
/** RTPROT_STATIC: what Weft adds. */
const STATIC = 4;

function code(action: () => void): string {
  try {
    action();
    return "none";
  } catch (error) {
    if (error instanceof SysError) return error.code;
    throw error;
  }
}

describe.skipIf(noNetns)("links", () => {
  test("a veth pair is made, changed, renamed, and goes as a pair", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addLink({ kind: "veth", name: "a", mtu: 1400, txQueueLength: 77, peer: { name: "b", mtu: 1300 } });
    expect(netlink.link("a")).toMatchObject({ name: "a", kind: "veth", mtu: 1400, txQueueLength: 77, up: false });
    expect(netlink.link("b")).toMatchObject({ mtu: 1300, peer: netlink.link("a")!.index });
    expect(netlink.link("a")!.mac).toMatch(/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/);

    netlink.setLink("a", { up: true, mtu: 1280, txQueueLength: 500 });
    netlink.setLink(netlink.link("b")!.index, { up: true });
    expect(netlink.link("a")).toMatchObject({ up: true, mtu: 1280, txQueueLength: 500 });
    netlink.setLink("b", { up: false });
    netlink.setLink("b", { name: "renamed" });
    expect(netlink.link("b")).toBeNull();
    expect(
      netlink
        .links()
        .map((link) => link.name)
        .sort(),
    ).toEqual(["a", "lo", "renamed"]);
    expect(netlink.link("lo")).toMatchObject({ index: 1, loopback: true, up: true, kind: "" });

    netlink.deleteLink("a");
    expect(netlink.links().map((link) => link.name)).toEqual(["lo"]);
  });

  test("a veth's other end is made in another namespace, and a link moves there by descriptor", () => {
    using here = new TestNetns();
    using there = new TestNetns();
    here.netlink.addLink({ kind: "veth", name: "a", peer: { name: "eth0", netnsFd: there.fd } });
    expect(there.netlink.link("eth0")?.kind).toBe("veth");
    here.netlink.setLink("a", { netnsFd: there.fd, name: "moved" });
    expect(here.netlink.link("a")).toBeNull();
    expect(there.netlink.link("moved")?.kind).toBe("veth");
  });

  test("a link moves to the namespace of a process", async () => {
    using here = new TestNetns();
    using there = new TestNetns();
    const child = there.run(() => Bun.spawn(["sleep", "60"]));
    try {
      here.netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
      here.netlink.setLink("b", { netnsPid: child.pid });
      expect(there.netlink.link("b")?.kind).toBe("veth");
    } finally {
      child.kill("SIGKILL");
      await child.exited;
    }
  });

  test("a bridge takes links in and lets them go", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addLink({ kind: "bridge", name: "br0" });
    netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
    netlink.setLink("a", { master: "br0" });
    expect(netlink.link("a")?.master).toBe(netlink.link("br0")!.index);
    netlink.setLink("a", { master: 0 });
    expect(netlink.link("a")?.master).toBe(0);
  });

  test("a dummy is made where the kernel has them, and a refusal is a sentence", () => {
    using netns = new TestNetns();
    try {
      netns.netlink.addLink({ kind: "dummy", name: "d0" });
      expect(netns.netlink.link("d0")?.kind).toBe("dummy");
    } catch (error) {
      expect(String(error)).toContain("create the dummy d0: Unknown device type (EOPNOTSUPP)");
    }
  });

  test("errors name the object; an add and a delete can be repeated where that is asked for", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    const pair = { kind: "veth", name: "a", peer: { name: "b" } } as const;
    netlink.addLink(pair);
    expect(() => netlink.addLink(pair)).toThrow("create the veth a with b: exists already (EEXIST)");
    netlink.addLink(pair, { existsOk: true });
    expect(() => netlink.setLink("c", { up: true })).toThrow("look up the interface c: no such device (ENODEV)");
    expect(() => netlink.setLink("a", { mtu: 10 })).toThrow(/^change the interface a \(mtu 10\): .*\(EINVAL\)$/);
    netlink.deleteLink("a");
    expect(() => netlink.deleteLink("a")).toThrow("delete the interface a: no such device (ENODEV)");
    netlink.deleteLink("a", { missingOk: true });
    expect(() => netlink.deleteLink("a/b")).toThrow("holds a character that the kernel refuses");
    expect(() => netlink.deleteLink("")).toThrow("a device name may not be empty");
  });
});

describe.skipIf(noNetns)("addresses", () => {
  test("of both families are added, listed with their interface, and taken away", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
    netlink.setLink("a", { up: true });
    const prefixes = ["10.1.2.3/24", "fd00::5/64"];
    for (const prefix of prefixes) netlink.addAddress({ link: "a", prefix });
    const index = netlink.link("a")!.index;
    const own = netlink.addresses("a").filter((address) => address.scope === 0);
    expect(own.map(({ ip, bits }) => `${ip}/${bits}`)).toEqual(prefixes);
    // Usable at once: no duplicate address detection.
    expect(own.every((address) => address.index === index && !address.tentative)).toBe(true);
    expect(netlink.interfaceAddresses()).toContainEqual(
      expect.objectContaining({ name: "a", ip: "10.1.2.3", up: true, loopback: false, kind: "veth" }),
    );
    expect(netlink.interfaceAddresses()).toContainEqual(
      expect.objectContaining({ name: "lo", ip: "::1", loopback: true }),
    );

    for (const prefix of prefixes) {
      expect(code(() => netlink.addAddress({ link: "a", prefix }))).toBe("EEXIST");
      netlink.addAddress({ link: "a", prefix }, { existsOk: true });
      netlink.deleteAddress({ link: "a", prefix });
      expect(code(() => netlink.deleteAddress({ link: "a", prefix }))).toBe("EADDRNOTAVAIL");
      netlink.deleteAddress({ link: "a", prefix }, { missingOk: true });
      netlink.deleteAddress({ link: "gone", prefix }, { missingOk: true });
    }
    expect(netlink.addresses("a").filter((address) => address.scope === 0)).toEqual([]);
    expect(() => netlink.addAddress({ link: "a", prefix: "10.1.2.300/24" })).toThrow(
      'netlink: "10.1.2.300/24" is not a prefix: write 10.0.0.0/8 or fd00::/64 (EINVAL)',
    );
  });

  test("come with a route for their prefix, or without", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
    netlink.setLink("a", { up: true });
    netlink.addAddress({ link: "a", prefix: "10.1.0.1/24" });
    netlink.addAddress({ link: "a", prefix: "10.2.0.1/24", noPrefixRoute: true });
    expect(netlink.routes({ family: 4, table: MAIN }).map((route) => route.dst)).toEqual(["10.1.0.0/24"]);
  });
});

describe.skipIf(noNetns)("routes", () => {
  test("of every kind are added, listed and deleted", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
    netlink.setLink("a", { up: true });
    netlink.addAddress({ link: "a", prefix: "10.1.0.1/24" });
    netlink.addAddress({ link: "a", prefix: "fd01::1/64" });
    const index = netlink.link("a")!.index;
    // The kernel adds routes of its own (multicast, link-local) when it pleases.
    const own = () => netlink.routes().filter((route) => route.protocol === STATIC);
    const cases = [
      [
        { dst: "10.9.1.7/16", via: "10.1.0.9", metric: 5, table: 52, src: "10.1.0.1" },
        { dst: "10.9.0.0/16", via: "10.1.0.9", metric: 5, table: 52, src: "10.1.0.1", index, type: "unicast" },
      ],
      [
        { dst: "0.0.0.0/0", dev: "a", table: 100_000 },
        { dst: "0.0.0.0/0", index, table: 100_000, type: "unicast" },
      ],
      [
        { dst: "::/0", via: "fd01::9", dev: "a", metric: 7 },
        { dst: "::/0", via: "fd01::9", index, metric: 7, table: MAIN },
      ],
      [
        { dst: "192.0.2.0/24", via: "203.0.113.1", dev: "a", onlink: true },
        { dst: "192.0.2.0/24", via: "203.0.113.1", onlink: true },
      ],
      [
        { dst: "10.77.0.0/16", type: "unreachable" },
        { dst: "10.77.0.0/16", type: "unreachable" },
      ],
      [
        { dst: "10.78.0.0/16", type: "blackhole" },
        { dst: "10.78.0.0/16", type: "blackhole" },
      ],
      [
        { dst: "10.79.0.0/16", type: "throw", table: 52 },
        { dst: "10.79.0.0/16", type: "throw", table: 52 },
      ],
      [
        { dst: "fd77::/16", type: "unreachable" },
        { dst: "fd77::/16", type: "unreachable", family: 6 },
      ],
      [
        { dst: "fd78::/16", type: "throw", table: 52 },
        { dst: "fd78::/16", type: "throw", table: 52, family: 6 },
      ],
    ] as const;
    for (const [spec, listed] of cases) {
      const before = own().length;
      netlink.addRoute(spec);
      expect(netlink.routes()).toContainEqual(expect.objectContaining(listed));
      expect(code(() => netlink.addRoute(spec))).toBe("EEXIST");
      netlink.addRoute(spec, { existsOk: true });
      expect(own()).toHaveLength(before + 1);
      netlink.deleteRoute(spec);
      expect(own()).toHaveLength(before);
      expect(code(() => netlink.deleteRoute(spec))).toBe("ESRCH");
      netlink.deleteRoute(spec, { missingOk: true });
    }
  });

  test("are replaced in place", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    netlink.addRoute({ dst: "10.7.0.0/16", type: "blackhole" });
    netlink.addRoute({ dst: "10.7.0.0/16", dev: "lo" }, { replace: true });
    expect(netlink.routes({ family: 4, table: MAIN })).toMatchObject([
      { dst: "10.7.0.0/16", type: "unicast", index: 1 },
    ]);
  });

  test("a table of thousands is read whole", () => {
    using netns = new TestNetns();
    for (let i = 0; i < 3000; i++) {
      netns.netlink.addRoute({ dst: `10.${i >> 8}.${i & 255}.0/24`, type: "blackhole", table: 52 });
    }
    const listed = new Set(netns.netlink.routes({ table: 52 }).map((route) => route.dst));
    expect(listed.size).toBe(3000);
    expect(listed.has("10.11.183.0/24")).toBe(true);
  });

  test("what the kernel refuses is told in its own words", () => {
    using netns = new TestNetns();
    expect(() => netns.netlink.addRoute({ dst: "10.9.0.0/16", via: "203.0.113.1" })).toThrow(
      "add the route 10.9.0.0/16 via 203.0.113.1: Nexthop has invalid gateway (ENETUNREACH)",
    );
    expect(() => netns.netlink.addRoute({ dst: "10.9.0.0/16", via: "fd00::1" })).toThrow(
      '"fd00::1" is not an IPv4 address',
    );
  });
});

describe.skipIf(noNetns)("rules", () => {
  const cases: RuleSpec[] = [
    { family: 4, priority: 5210, fwmark: 0x80000, fwmask: 0xff0000, table: MAIN },
    { family: 4, priority: 5230, fwmark: 0x80000, fwmask: 0xff0000, action: "unreachable" },
    { family: 6, priority: 5270, table: 52 },
    { family: 6, priority: 1000, ipProtocol: 17, action: "blackhole", from: "fd00::/8", to: "fd01::/16" },
    { family: 4, priority: 1001, ipProtocol: 6, action: "prohibit", sourcePorts: [1, 5], destinationPorts: [53, 53] },
    { family: 4, priority: 32764, table: MAIN, suppressPrefixLength: 0 },
    { family: 4, priority: 32763, table: 51820, fwmark: 51820, invert: true },
    { family: 6, priority: 7, table: 52, iif: "lo", oif: "lo" },
  ];

  test("of every kind are added, listed and deleted", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    const standard = netlink.rules();
    expect(standard.map(({ family, priority }) => `${family}:${priority}`)).toEqual([
      "4:0",
      "4:32766",
      "4:32767",
      "6:0",
      "6:32766",
    ]);
    for (const rule of cases) {
      netlink.addRule(rule);
      expect(netlink.rules({ family: rule.family })).toContainEqual(expect.objectContaining(rule));
      expect(code(() => netlink.addRule(rule))).toBe("EEXIST");
      netlink.addRule(rule, { existsOk: true });
      netlink.deleteRule(rule);
      expect(netlink.rules()).toEqual(standard);
      expect(code(() => netlink.deleteRule(rule))).toBe("ENOENT");
      netlink.deleteRule(rule, { missingOk: true });
    }
  });

  test("what is listed can be deleted as it is", () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    for (const rule of cases) netlink.addRule(rule);
    for (const rule of netlink.rules()) if (rule.priority > 0 && rule.priority < 32766) netlink.deleteRule(rule);
    expect(netlink.rules()).toHaveLength(5);
  });

  test("a prefix of the other family is a sentence", () => {
    using netns = new TestNetns();
    expect(() => netns.netlink.addRule({ family: 4, priority: 1, from: "fd00::/8" })).toThrow(
      "its prefix is not an IPv4 one",
    );
  });
});

describe.skipIf(noNetns)("changes", () => {
  function watch(netns: TestNetns) {
    const events: NetlinkEvent[] = [];
    const monitor = netns.run(() => new NetlinkMonitor((event) => events.push(event)));
    return { events, close: () => monitor.close(), [Symbol.dispose]: () => monitor.close() };
  }

  test("of links, addresses, routes and rules are seen as they happen", async () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    using seen = watch(netns);
    const expectEvent = async (event: object) => {
      await until(JSON.stringify(event), () => seen.events.some((each) => Bun.deepMatch(event, each)));
      seen.events.length = 0;
    };
    netlink.addLink({ kind: "veth", name: "a", peer: { name: "b" } });
    await expectEvent({ kind: "link", change: "new", value: { name: "a", up: false } });
    netlink.setLink("a", { up: true });
    await expectEvent({ kind: "link", change: "new", value: { name: "a", up: true } });
    for (const [prefix, ip] of [
      ["10.1.0.1/24", "10.1.0.1"],
      ["fd00::1/64", "fd00::1"],
    ] as const) {
      netlink.addAddress({ link: "a", prefix });
      await expectEvent({ kind: "address", change: "new", value: { ip } });
    }
    for (const dst of ["10.7.0.0/16", "fd77::/16"]) {
      netlink.addRoute({ dst, type: "unreachable" });
      await expectEvent({ kind: "route", change: "new", value: { dst, type: "unreachable" } });
      netlink.deleteRoute({ dst, type: "unreachable" });
      await expectEvent({ kind: "route", change: "delete", value: { dst } });
    }
    for (const family of [4, 6] as const) {
      netlink.addRule({ family, priority: 77, action: "prohibit" });
      await expectEvent({ kind: "rule", change: "new", value: { family, priority: 77, action: "prohibit" } });
      netlink.deleteRule({ family, priority: 77, action: "prohibit" });
      await expectEvent({ kind: "rule", change: "delete", value: { family, priority: 77 } });
    }
    netlink.deleteAddress({ link: "a", prefix: "10.1.0.1/24" });
    await expectEvent({ kind: "address", change: "delete", value: { ip: "10.1.0.1", bits: 24 } });
    netlink.deleteLink("a");
    await expectEvent({ kind: "link", change: "delete", value: { name: "b" } });
  });

  test("a burst that overflows the queue is told, and what comes later is seen again", async () => {
    using netns = new TestNetns();
    const { netlink } = netns;
    using seen = watch(netns);
    // The event loop stands still meanwhile.
    for (let i = 0; i < 4000; i++) netlink.addRoute({ dst: `10.${i >> 8}.${i & 255}.0/24`, type: "blackhole" });
    await until("the overflow", () => seen.events.some((event) => event.kind === "overflow"));
    await until("the later change", () => {
      netlink.addRule({ family: 4, priority: 99, action: "prohibit" }, { existsOk: true });
      netlink.deleteRule({ family: 4, priority: 99, action: "prohibit" });
      return seen.events.some((event) => event.kind === "rule");
    });
  });

  test("none is delivered after close, and the descriptor is given back", async () => {
    using netns = new TestNetns();
    const count = () => readdirSync("/proc/self/fd").length;
    const before = count();
    for (let i = 0; i < 20; i++) {
      const seen = watch(netns);
      netns.netlink.addRule({ family: 4, priority: 55, action: "prohibit" });
      await until("an event", () => seen.events.length > 0);
      seen.close();
      seen.events.length = 0;
      netns.netlink.deleteRule({ family: 4, priority: 55, action: "prohibit" });
      await Bun.sleep(0);
      expect(seen.events).toEqual([]);
    }
    await until("the descriptors", () => count() <= before);
  });

  test("another namespace's are not seen", async () => {
    using netns = new TestNetns();
    using other = new TestNetns();
    using seen = watch(netns);
    other.netlink.addRule({ family: 4, priority: 55, action: "prohibit" });
    netns.netlink.addRule({ family: 4, priority: 56, action: "prohibit" });
    await until("an event", () => seen.events.length > 0);
    expect(seen.events).toMatchObject([{ kind: "rule", value: { priority: 56 } }]);
  });
});

test.skipIf(noUnprivileged)("a request without the right to make it says that it is not permitted", async () => {
  using netns = new TestNetns();
  const code = `
    try { new Netlink().addRule({ family: 4, priority: 1, action: "prohibit" }); } catch (error) { console.log(error.message); }`;
  expect(await asNobody(netns, { Netlink: `${import.meta.dir}/netlink.ts` }, code)).toBe(
    "add the rule (IPv4) priority 1 action prohibit: not permitted (EPERM)\n",
  );
});

test.skipIf(noNetns)("closing frees the descriptor", () => {
  using netns = new TestNetns();
  const open = () => netns.run(() => new Netlink());
  for (let i = 0; i < 2000; i++) open().close();
  using last = open();
  expect(last.links()).toHaveLength(1);
});
