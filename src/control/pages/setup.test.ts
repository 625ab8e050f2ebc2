import { expect, test } from "bun:test";
import { setupPages } from "./setup.ts";

const SERVER = "https://vpn.example.com";

test("the set-up pages name this server's own address and load nothing from elsewhere", async () => {
  const app = setupPages(SERVER);
  for (const path of ["/", "/windows", "/apple"]) {
    const response = await app.request(path);
    expect(response.status).toBe(200);
    expect(response.headers.get("content-security-policy")).toContain("default-src 'none'");
    const text = await response.text();
    expect(text).toContain(`tailscale login --login-server ${SERVER}`);
    expect(text.replaceAll(SERVER, "")).not.toMatch(/<script|https?:/);
  }
  const links = (await (await app.request("/")).text()).matchAll(/href="([^"]+)"/g);
  expect([...links].map(([, path]) => path)).toEqual(["/windows", "/apple", "/android"]);
});

test("phones have no terminal: their pages say where the app takes the address", async () => {
  const app = setupPages(SERVER);
  for (const [path, words] of [
    ["/android", "Use an alternate server"],
    ["/apple", "Use custom coordination server"],
  ] as const) {
    const response = await app.request(path);
    expect(response.headers.get("content-security-policy")).toContain("default-src 'none'");
    const text = await response.text();
    expect(text).toContain(words);
    expect(text).toContain(`<code>${SERVER}</code>`);
  }
});

test("profiles for Apple's systems: each variant of the client finds the address where it looks for it", async () => {
  const app = setupPages(SERVER);
  const payloads = {
    ios: "io.tailscale.ipn.ios",
    "macos-app-store": "io.tailscale.ipn.macos",
    "macos-standalone": "io.tailscale.ipn.macsys",
  };
  const seen = new Set<string>();
  for (const [name, type] of Object.entries(payloads)) {
    const response = await app.request(`/apple/${name}`);
    expect(response.headers.get("content-type")).toStartWith("application/x-apple-aspen-config");
    expect(response.headers.get("content-disposition")).toContain(".mobileconfig");
    const text = await response.text();
    expect(text).toContain(`<key>PayloadType</key><string>${type}</string>`);
    expect(text).toContain(`<key>ControlURL</key><string>${SERVER}</string>`);
    for (const [, uuid] of text.matchAll(/PayloadUUID<\/key><string>([^<]*)/g)) {
      expect(uuid).toMatch(/^[0-9A-F]{8}-[0-9A-F]{4}-8[0-9A-F]{3}-8[0-9A-F]{3}-[0-9A-F]{12}$/);
      seen.add(uuid!);
    }
    expect(await (await app.request(`/apple/${name}`)).text()).toBe(text);
  }
  // One of the whole, and one of each variant.
  expect(seen.size).toBe(4);
  expect((await app.request("/apple/watchos")).status).toBe(404);
});
