import { describe, expect, test } from "bun:test";
import { isBetter } from "./quality.ts";

const better = (a: string, aLatency: number, b: string, bLatency: number) =>
  isBetter({ address: a, latency: aLatency }, { address: b, latency: bLatency });

const PUBLIC = "198.51.100.1:1";
const OTHER = "198.51.100.2:1";

describe("5.7: which of two confirmed paths is better", () => {
  test("the faster of two equal kinds", () => {
    expect(better(PUBLIC, 10, OTHER, 20)).toBe(true);
    expect(better(OTHER, 20, PUBLIC, 10)).toBe(false);
  });

  test("one percent is noise", () => {
    expect(better(PUBLIC, 99, OTHER, 100)).toBe(false);
    expect(better(PUBLIC, 97, OTHER, 100)).toBe(true);
  });

  test("equal latency moves nothing, also when both are zero", () => {
    expect(better(PUBLIC, 5, OTHER, 5)).toBe(false);
    expect(better(PUBLIC, 0, OTHER, 0)).toBe(false);
  });

  test("the same address is never better than itself", () => {
    expect(better(PUBLIC, 1, PUBLIC, 100)).toBe(false);
  });

  test("IPv6 wins a draw, and loses when it is more than ten percent slower", () => {
    expect(better("[2001:db8::1]:1", 10, PUBLIC, 10)).toBe(true);
    expect(better("[2001:db8::1]:1", 10.5, PUBLIC, 10)).toBe(true);
    expect(better("[2001:db8::1]:1", 12, PUBLIC, 10)).toBe(false);
  });

  test("near beats far: loopback, link-local, private, public", () => {
    const order = ["127.0.0.1:1", "169.254.3.4:1", "192.168.1.2:1", PUBLIC];
    for (let i = 0; i < order.length; i++) {
      for (let j = i + 1; j < order.length; j++) {
        expect(better(order[i]!, 10, order[j]!, 10)).toBe(true);
        expect(better(order[j]!, 10, order[i]!, 10)).toBe(false);
      }
    }
    expect(better("[fd00::1]:1", 10, "10.0.0.1:1", 10)).toBe(true);
  });

  test("a private path that is much slower than the public one loses", () => {
    expect(better(PUBLIC, 10, "192.168.1.2:1", 40)).toBe(true);
  });
});
