import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readlinkSync } from "node:fs";
import { closeFd } from "./libc.ts";
import { createNetns, openNetns, withNetns } from "./netns.ts";
import { noNetns, TestNetns } from "./testing.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

const here = () => readlinkSync("/proc/thread-self/ns/net");

describe.skipIf(noNetns)("network namespaces", () => {
  test("a new one is empty, and the thread stays where it was", () => {
    const before = here();
    const fd = createNetns();
    try {
      expect(here()).toBe(before);
      const inside = withNetns(fd, here);
      expect(inside).not.toBe(before);
      expect(inside).toBe(readlinkSync(`/proc/self/fd/${fd}`));
    } finally {
      closeFd(fd);
    }
  });

  test("the thread comes back from one also after a throw, and from one within another", () => {
    const before = here();
    using a = new TestNetns();
    using b = new TestNetns();
    expect(() =>
      a.run((): number => {
        throw new Error("inside");
      }),
    ).toThrow("inside");
    expect(here()).toBe(before);
    const seen = a.run(() => {
      const first = here();
      const nested = b.run(here);
      return [first, nested, here()];
    });
    expect(seen[0]).toBe(seen[2]!);
    expect(seen[1]).not.toBe(seen[0]!);
    expect(here()).toBe(before);
  });

  test("a child that is started inside lives there, and can be found by its id", async () => {
    using netns = new TestNetns();
    const child = netns.run(() => Bun.spawn(["sleep", "60"]));
    try {
      const fd = openNetns(child.pid);
      expect(withNetns(fd, here)).toBe(netns.run(here));
      closeFd(fd);
    } finally {
      child.kill("SIGKILL");
      await child.exited;
    }
  });

  test("that of a process which is not there, or a descriptor of something else, is a sentence", () => {
    const before = here();
    expect(() => openNetns(0x7fff_ffff)).toThrow(
      /^open the network namespace \/proc\/2147483647\/ns\/net: no such file/,
    );
    expect(() => withNetns(0x7fff_0000, () => 1)).toThrow("enter a network namespace: bad file descriptor (EBADF)");
    expect(here()).toBe(before);
  });
});
