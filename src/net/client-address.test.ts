import { expect, test } from "bun:test";
import type { IncomingMessage } from "node:http";
import fc from "fast-check";
import { Hono } from "hono";
import { clientAddress, clientAddressOf, noteClient, parseTrustedProxies } from "./client-address.ts";

function seen(remoteAddress: string | undefined, headers: Record<string, string>, trusted: string[] = []): string {
  const request = { socket: { remoteAddress }, headers } as unknown as IncomingMessage;
  noteClient(request, parseTrustedProxies(trusted));
  return clientAddressOf(request);
}

const LOCAL = ["127.0.0.1", "10.0.0.0/8", "2001:db8:ff::/48"];

test("headers of somebody who is no trusted proxy mean nothing", () => {
  const lies = { "x-forwarded-for": "1.1.1.1", "x-real-ip": "1.1.1.1", "true-client-ip": "1.1.1.1" };
  expect(seen("203.0.113.7", lies)).toBe("203.0.113.7");
  expect(seen("203.0.113.7", lies, LOCAL)).toBe("203.0.113.7");
  expect(seen("::ffff:203.0.113.7", lies, LOCAL)).toBe("203.0.113.7");
});

test("of X-Forwarded-For the rightmost hop that is no trusted proxy is the client", () => {
  const via = (chain: string, from = "127.0.0.1") => seen(from, { "x-forwarded-for": chain }, LOCAL);
  expect(via("198.51.100.4")).toBe("198.51.100.4");
  expect(via("1.1.1.1, 198.51.100.4, 10.1.2.3")).toBe("198.51.100.4");
  expect(via("1.1.1.1,198.51.100.4:4711 , 2001:db8:ff::7", "::ffff:10.0.0.1")).toBe("198.51.100.4");
  expect(via("[2001:db8::1]:443")).toBe("2001:db8::1");
  // All of them are proxies: the first of them asked by itself.
  expect(via("10.9.9.9, 10.1.1.1")).toBe("10.9.9.9");
});

test("what cannot be read ends the chain: nothing further left is believed", () => {
  const via = (chain: string) => seen("127.0.0.1", { "x-forwarded-for": chain }, LOCAL);
  expect(via("1.1.1.1, unknown")).toBe("127.0.0.1");
  expect(via("1.1.1.1, unknown, 10.1.1.1")).toBe("10.1.1.1");
  expect(via("1.1.1.1, 999.1.1.1")).toBe("127.0.0.1");
});

test("X-Real-IP and True-Client-IP of a trusted proxy count where it sends no X-Forwarded-For", () => {
  expect(seen("10.0.0.1", { "x-real-ip": "198.51.100.4" }, LOCAL)).toBe("198.51.100.4");
  expect(seen("10.0.0.1", { "true-client-ip": "2001:DB8::1" }, LOCAL)).toBe("2001:db8::1");
  expect(seen("10.0.0.1", { "x-real-ip": "1.1.1.1", "x-forwarded-for": "198.51.100.4" }, LOCAL)).toBe("198.51.100.4");
  expect(seen("10.0.0.1", { "x-real-ip": "nonsense" }, LOCAL)).toBe("10.0.0.1");
  expect(seen("10.0.0.1", {}, LOCAL)).toBe("10.0.0.1");
});

test("trusting everybody is refused, and so is what is no prefix", () => {
  expect(() => parseTrustedProxies(["0.0.0.0/0"])).toThrow("would believe the headers of everybody");
  expect(() => parseTrustedProxies(["::/0"])).toThrow("would believe the headers of everybody");
  expect(() => parseTrustedProxies(["10.0.0.0/33"])).toThrow('trusted proxy "10.0.0.0/33" is not an address or prefix');
  expect(() => parseTrustedProxies(["proxy.example.com"])).toThrow("is not an address or prefix");
});

test("a unix socket has no address, and a handler may ask in any case", async () => {
  expect(seen(undefined, { "x-forwarded-for": "1.1.1.1" }, LOCAL)).toBe("");
  const app = new Hono();
  app.get("/", (c) => c.text(`<${clientAddress(c)}>`));
  expect(await (await app.request("/")).text()).toBe("<>");
});

test("whatever the header, the answer is an address, and never one to the left of an untrusted hop", () => {
  const hop = fc.oneof(fc.ipV4(), fc.ipV6(), fc.string({ maxLength: 20 }), fc.constant("10.1.1.1"));
  fc.assert(
    fc.property(fc.array(hop, { maxLength: 6 }), fc.ipV4(), (chain, last) => {
      const answer = seen("127.0.0.1", { "x-forwarded-for": [...chain, last].join(",") }, LOCAL);
      const isProxy = last.startsWith("10.") || last === "127.0.0.1";
      if (isProxy) expect(answer).toMatch(/^[0-9a-f:.]+$/);
      else expect(answer).toBe(last);
    }),
    { numRuns: 500 },
  );
});
