import { expect, test } from "bun:test";
import { linkFeatures, setLinkFeatures } from "./ethtool.ts";
import { noNetns, TestNetns } from "./testing.ts";

test.skipIf(noNetns)("features of a veth are read, changed and changed back", () => {
  using netns = new TestNetns();
  netns.netlink.addLink({ kind: "veth", name: "one", peer: { name: "two" } });
  const names = ["tx-udp-segmentation", "tx-tcp-segmentation", "tx-generic-segmentation", "rx-gro"];
  const read = (link: string) => names.map((name) => netns.run(() => linkFeatures(link))[name]);
  expect(read("one")).toEqual([true, true, true, false]);
  netns.run(() =>
    setLinkFeatures("one", { "tx-udp-segmentation": false, "tx-tcp-segmentation": false, "rx-gro": true }),
  );
  expect(read("one")).toEqual([false, false, true, true]);
  expect(read("two")).toEqual([true, true, true, false]);
  netns.run(() =>
    setLinkFeatures("one", { "tx-udp-segmentation": true, "tx-tcp-segmentation": true, "rx-gro": false }),
  );
  expect(read("one")).toEqual([true, true, true, false]);
});

test.skipIf(noNetns)("a device or a feature that is not there is an error", () => {
  using netns = new TestNetns();
  expect(() => netns.run(() => linkFeatures("none"))).toThrow("none");
  expect(() => netns.run(() => setLinkFeatures("lo", { "tx-warp": true }))).toThrow("tx-warp");
});
