import { expect, test } from "bun:test";
import { isPrivate } from "./private.ts";

test("private, shared, link-local and loopback addresses, also inside IPv6; nothing else", () => {
  for (const address of [
    "127.0.0.1",
    "::1",
    "10.1.2.3",
    "172.31.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "fd7a::1",
    "fe80::1",
    "::ffff:10.0.0.1",
  ])
    expect([address, isPrivate(address)]).toEqual([address, true]);
  for (const address of ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2001:db8::1", "::ffff:8.8.8.8", "localhost", ""])
    expect([address, isPrivate(address)]).toEqual([address, false]);
});
