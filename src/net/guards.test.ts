import { expect, test } from "bun:test";
import { Hono } from "hono";
import { hostGuard, securityHeaders } from "./guards.ts";

function app(): Hono {
  const hono = new Hono();
  hono.use(securityHeaders, hostGuard(["Weft.example.com"], ["/key", "/derp"]));
  hono.get("/own", (c) => c.text("own", 200, { "Content-Security-Policy": "default-src 'none'" }));
  hono.all("*", (c) => c.text("page"));
  return hono;
}

async function status(path: string, host: string): Promise<number> {
  return (await app().request(`http://x${path}`, { headers: { Host: host } })).status;
}

test("only the server's own names open its pages; addresses cannot be rebound, programs may use any name", async () => {
  for (const host of [
    "weft.example.com",
    "WEFT.example.com:443",
    "weft.example.com.",
    "localhost:8080",
    "127.0.0.1:8080",
  ])
    expect([host, await status("/", host)]).toEqual([host, 200]);
  expect(await status("/", "[2001:db8::1]:8080")).toBe(200);
  for (const host of ["evil.example", "weft.example.com.evil.example", "127.0.0.1.evil.example", "", "0x7f.1"])
    expect([host, await status("/", host)]).toEqual([host, 421]);
  expect(await status("/key", "internal-name")).toBe(200);
  expect(await status("/derp/probe", "internal-name")).toBe(200);
  expect(await status("/keys", "internal-name")).toBe(421);
});

test("every answer carries the security headers; a route's own word stays", async () => {
  const page = await app().request("http://x/", { headers: { Host: "localhost" } });
  expect(Object.fromEntries(page.headers)).toMatchObject({
    "x-frame-options": "DENY",
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
  });
  expect((await app().request("http://x/", { headers: { Host: "evil" } })).headers.get("X-Frame-Options")).toBe("DENY");
  const own = await app().request("http://x/own", { headers: { Host: "localhost" } });
  expect(own.headers.get("Content-Security-Policy")).toBe("default-src 'none'");
});
