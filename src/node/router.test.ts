import { afterAll, beforeAll, expect, test } from "bun:test";
import { closeFd } from "../../ffi/libc.ts";
import { Netlink } from "../../ffi/netlink.ts";
import { createNetns, withNetns } from "../../ffi/netns.ts";
import { cleanUp, Router } from "./router.ts";

const isRoot = process.getuid?.() === 0;
if (!isRoot) process.stderr.write("SKIP: the router's tests need root\n");

let netns = -1;
let netlink: Netlink;
let device = 0;
beforeAll(() => {
  if (!isRoot) return;
  netns = createNetns();
  netlink = withNetns(netns, () => new Netlink());
  netlink.addLink({ name: "w0", kind: "veth", peer: { name: "w1" } });
  netlink.setLink("w1", { up: true });
  device = netlink.link("w0")!.index;
});
afterAll(() => {
  if (!isRoot) return;
  netlink.close();
  closeFd(netns);
});

const seen: string[] = [];
const open = () => withNetns(netns, () => new Router(device, (message) => seen.push(message)));
const addresses = () =>
  netlink
    .addresses(device)
    .filter(({ scope }) => scope === 0)
    .map(({ ip, bits }) => `${ip}/${bits}`)
    .sort();
const routes = () =>
  ([4, 6] as const).flatMap((family) => netlink.routes({ family, table: 53 }).map(({ dst }) => dst)).sort();
const rules = () =>
  ([4, 6] as const).flatMap((family) =>
    netlink
      .rules({ family })
      .filter(({ priority }) => priority >= 5300 && priority < 5400)
      .map((rule) => `${family} ${rule.priority} ${rule.fwmark ?? 0} ${rule.action} ${rule.table}`),
  );
/** Without the kernel's own link-local routes, which come when an interface is up. */
const mainRoutes = () =>
  ([4, 6] as const)
    .flatMap((family) => netlink.routes({ family, table: 254 }).map(({ dst }) => dst))
    .filter((dst) => dst !== "fe80::/64");

test.skipIf(!isRoot)("addresses, routes and rules become exactly what is asked for, and vanish with close", () => {
  const router = open();
  expect(netlink.link("w0")).toMatchObject({ up: true, mtu: 1280 });
  router.configure({
    addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"],
    routes: ["100.64.0.2/32", "100.64.0.3/32", "fd7a:115c:a1e0::2/128"],
  });
  expect(addresses()).toEqual(["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]);
  expect(routes()).toEqual(["100.64.0.2/32", "100.64.0.3/32", "fd7a:115c:a1e0::2/128"]);
  expect(rules()).toEqual([
    "4 5310 524288 lookup 254",
    "4 5330 524288 lookup 253",
    "4 5350 524288 unreachable 0",
    "4 5370 0 lookup 53",
    "6 5310 524288 lookup 254",
    "6 5330 524288 lookup 253",
    "6 5350 524288 unreachable 0",
    "6 5370 0 lookup 53",
  ]);
  expect(mainRoutes()).toEqual([]);

  router.configure({ addresses: ["100.64.0.9/32"], routes: ["100.64.0.3/32", "100.64.0.4/32"] });
  expect(addresses()).toEqual(["100.64.0.9/32"]);
  expect(routes()).toEqual(["100.64.0.3/32", "100.64.0.4/32"]);

  router.close();
  expect([addresses(), routes(), rules()]).toEqual([[], [], []]);
  expect(seen).toEqual([]);
});

test.skipIf(!isRoot)("rules that a killed daemon left are cleaned up; those of a living one stay", () => {
  const router = open();
  router.configure({ addresses: ["100.64.0.1/32"], routes: ["100.64.0.2/32", "fd7a:115c:a1e0::2/128"] });
  cleanUp(netlink);
  expect(rules()).toHaveLength(8);
  // The process is killed: its device, and with that its routes, go.
  for (const dst of routes()) netlink.deleteRoute({ dst, table: 53 });
  cleanUp(netlink);
  expect(rules()).toEqual([]);
  cleanUp(netlink);
});

test.skipIf(!isRoot)("rules that someone else removed come back", () => {
  const router = open();
  netlink.deleteRule({ family: 4, priority: 5370, table: 53 });
  router.restoreRules();
  expect(rules()).toHaveLength(8);
  router.close();
});

test.skipIf(!isRoot)("a route that the kernel refuses is said, and the others are made", () => {
  const router = open();
  router.configure({ addresses: [], routes: ["100.64.0.5/32", "nonsense", "100.64.0.6/32"] });
  expect(routes()).toEqual(["100.64.0.5/32", "100.64.0.6/32"]);
  expect(seen.join()).toContain("nonsense");
  router.close();
});
