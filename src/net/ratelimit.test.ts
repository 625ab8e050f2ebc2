import { expect, test } from "bun:test";
import { Attempts } from "./ratelimit.ts";

const MINUTE = 60_000;

test("a few mistakes cost nothing, then each further one doubles the wait, up to a quarter of an hour", () => {
  const attempts = new Attempts({ what: "API key" });
  for (let i = 0; i < 5; i++) {
    attempts.failed("192.0.2.1", 0);
    expect(attempts.wait("192.0.2.1", 0)).toBe(0);
  }
  const waits: number[] = [];
  let now = 0;
  for (let i = 0; i < 12; i++) {
    attempts.failed("192.0.2.1", now);
    waits.push(attempts.wait("192.0.2.1", now));
    expect(attempts.wait("192.0.2.1", now + waits.at(-1)! - 1)).toBe(1);
    now += waits.at(-1)!;
    expect(attempts.wait("192.0.2.1", now)).toBe(0);
  }
  expect(waits).toEqual([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900].map((s) => s * 1000));
  expect(attempts.wait("192.0.2.2", now)).toBe(0);
});

test("success and an hour of peace wipe the slate", () => {
  const attempts = new Attempts({ what: "API key" });
  const fail = (times: number, now: number) => {
    for (let i = 0; i < times; i++) attempts.failed("192.0.2.1", now);
  };
  fail(6, 0);
  attempts.succeeded("192.0.2.1");
  expect(attempts.wait("192.0.2.1", 0)).toBe(0);
  fail(5, 0);
  expect(attempts.wait("192.0.2.1", 0)).toBe(0);
  fail(5, 61 * MINUTE);
  expect(attempts.wait("192.0.2.1", 61 * MINUTE)).toBe(0);
});

test("a host cannot use its /64 of IPv6 addresses, nor IPv4 in IPv6, to start anew", () => {
  const attempts = new Attempts({ what: "API key" });
  for (let i = 0; i < 6; i++) attempts.failed(`2001:db8:0:1::${i}`, 0);
  expect(attempts.wait("2001:db8:0:1:ffff::1", 0)).toBe(1000);
  expect(attempts.wait("2001:db8:0:2::1", 0)).toBe(0);
  for (let i = 0; i < 6; i++) attempts.failed("::ffff:192.0.2.1", 0);
  expect(attempts.wait("192.0.2.1", 0)).toBe(1000);
});

test("failures from everywhere make strangers wait, but not who succeeded before", () => {
  const logged: string[] = [];
  const attempts = new Attempts({ what: "login id", log: (line) => logged.push(line) });
  attempts.succeeded("198.51.100.1");
  for (let i = 0; i < 300; i++) {
    expect(attempts.wait("203.0.113.9", i)).toBe(0);
    attempts.failed(`10.0.${i >> 8}.${i & 255}`, i);
  }
  expect(attempts.wait("203.0.113.9", 1000)).toBe(MINUTE - 1000);
  expect(attempts.wait("198.51.100.1", 1000)).toBe(0);
  expect(attempts.wait("203.0.113.9", MINUTE)).toBe(0);
  expect(logged).toEqual([expect.stringContaining("300 wrong attempts at the login id from all addresses")]);
});

test("memory stays bounded when a million addresses fail and succeed, and the newest are remembered", () => {
  const attempts = new Attempts({ what: "key", limits: { addresses: 100, totalFailures: Number.POSITIVE_INFINITY } });
  for (let i = 0; i < 1_000_000; i += 250) attempts.succeeded(`10.${i >> 16}.${(i >> 8) & 255}.${i & 255}`);
  for (let round = 0; round < 6; round++) for (let i = 0; i < 150; i++) attempts.failed(`10.9.0.${i}`, 0);
  // 150 addresses in turn never stay among 100; the next 100 do.
  expect(attempts.wait("10.9.0.149", 0)).toBe(0);
  for (let round = 0; round < 6; round++) for (let i = 0; i < 100; i++) attempts.failed(`10.8.0.${i}`, 0);
  expect(attempts.wait("10.8.0.0", 0)).toBe(1000);
});

test("each refusal is logged with address, count and wait", () => {
  const logged: string[] = [];
  const counted: string[] = [];
  const attempts = new Attempts({
    what: "API key",
    log: (line) => logged.push(line),
    count: (what) => counted.push(what),
  });
  for (let i = 0; i < 7; i++) attempts.failed("192.0.2.1", 0);
  expect(counted).toEqual(Array(7).fill("API key"));
  expect(logged).toEqual([
    "192.0.2.1: 6 wrong attempts at the API key, the next is refused for 1000 ms",
    "192.0.2.1: 7 wrong attempts at the API key, the next is refused for 2000 ms",
  ]);
});
