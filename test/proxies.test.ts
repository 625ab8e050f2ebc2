// Real proxies in front of a box, with the configurations of docs/proxies.md: official clients join through each over TLS,
// and the box knows whom it speaks to.
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { chromium } from "playwright-core";
import { Daemon } from "../lab/daemon.ts";
import { type Host, Lab } from "../lab/network.ts";
import { TestServer, WebSocketNode } from "../src/control/testing.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  certificate,
  freePort,
  pathIs,
  skip,
  Tailscaled,
  tempDir,
  until,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { secretPart } from "./lib/secrets.ts";

setDefaultTimeout(300_000);
const page = readFileSync(resolve(import.meta.dir, "../docs/proxies.md"), "utf8");

/** The configuration on the page in this language, with the test's own addresses and files. */
function configuration(language: string, replace: Record<string, string>): string {
  let text = new RegExp(`\`\`\`${language}\n(.*?)\`\`\``, "s").exec(page)?.[1] ?? "";
  if (text === "") throw new Error(`docs/proxies.md has no block of ${language}`);
  for (const [from, to] of Object.entries(replace)) text = text.replaceAll(from, to);
  return text;
}

/** nginx with these contents of its http block, all its files in one folder. */
function nginx(dir: string, http: string): string[] {
  const file = join(dir, "nginx.conf");
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${dir}/${name};`);
  writeFileSync(
    file,
    `user root;\npid ${dir}/nginx.pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n${paths.join("\n")}\n${http}\n}\n`,
  );
  return ["nginx", "-e", "stderr", "-p", dir, "-c", file, "-g", "daemon off;"];
}

interface Files {
  dir: string;
  replace: Record<string, string>;
}

const PROXIES: Record<string, (files: Files) => string[]> = {
  nginx: ({ dir, replace }) => nginx(dir, configuration("nginx", replace)),
  caddy: ({ dir, replace }) => {
    const file = join(dir, "Caddyfile");
    const options = `{\n  admin off\n  auto_https disable_redirects\n  default_sni ${replace["weft.example.com"]}\n}\n`;
    writeFileSync(file, options + configuration("caddyfile", replace));
    return ["caddy", "run", "--adapter", "caddyfile", "--config", file];
  },
};

async function joinThrough(name: string, lab: Lab, dir: string): Promise<void> {
  const host = await lab.host("front");
  const cert = await certificate(dir, host.ip4);
  const url = `https://${host.ip4}`;
  const box = await Box.start(host, join(dir, "box"), {
    args: ["--url", url, "--trusted-proxies", host.ip4, "--log-level", "debug", "--log-format", "json"],
  });
  const replace = {
    "weft.example.com": host.ip4,
    "127.0.0.1:8080": box.listen,
    "/etc/ssl/weft/fullchain.pem": cert.cert,
    "/etc/ssl/weft/key.pem": cert.key,
  };
  const proxy = startProxy(host, PROXIES[name]!({ dir, replace }), dir);
  const env = { SSL_CERT_FILE: cert.ca };
  const [a, b] = [
    new Tailscaled(await lab.host("ta"), join(dir, "ta"), "1.102.5", env),
    new Tailscaled(await lab.host("tb"), join(dir, "tb"), "1.102.5", env),
  ];
  // So that what they exchange goes through the proxy, too.
  lab.blockUdp();
  const key = await box.key();
  await Promise.all([a.up(url, key), b.up(url, key)]);
  await pathIs("relay", a, b);
  await answers(a.host, b.ip4);

  const events = box.process
    .output()
    .split("\n")
    .filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line) as { msg: string; client?: string; request?: string });
  const maps = events.filter(({ msg }) => msg.startsWith("POST /machine/map of mkey:"));
  expect(new Set(maps.map(({ client }) => client))).toEqual(new Set([a.host.ip4, b.host.ip4]));
  for (const { request } of maps) expect(request).toMatch(/^[0-9a-f]{20}$/);
  expect(box.log).not.toContain(secretPart(key));
  expect(proxy.exitCode).toBeNull();
}

function startProxy(host: Host, command: string[], dir: string): Daemon {
  return new Daemon(host, command, { XDG_DATA_HOME: dir, XDG_CONFIG_HOME: dir });
}

const noOfficial = missing([["tailscaled", "1.102.5"]]);
describe("official clients join and meet through a proxy", () => {
  for (const name of Object.keys(PROXIES)) {
    const absent = Bun.which(name) ? null : `${name} (the Debian package) is absent`;
    test.skipIf(skip(cannotUseNamespaces, noOfficial, absent))(name, async () => {
      using dir = tempDir(`proxy-${name}`);
      await using lab = await Lab.create(`proxy-${name}`);
      await joinThrough(name, lab, dir.path);
    });
  }
});

const CHROMIUM = "/usr/bin/chromium";
const noBrowser = existsSync(CHROMIUM) ? null : `${CHROMIUM} is absent (apt package chromium)`;
const noNginx = Bun.which("nginx") ? null : "nginx (the Debian package) is absent";
const dir = tempDir("proxy-get");
afterAll(() => dir[Symbol.dispose]());

test.skipIf(skip(noNginx))(
  "a web UI is served beside the API, from the box's own address, and works in a browser; one of another origin does not",
  async () => {
    using files = tempDir("proxy-ui");
    await using server = await TestServer.start();
    const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
    for (const name of ["index", "users"]) writeFileSync(join(files.path, `${name}.html`), name);
    const port = await freePort();
    const ui = configuration("nginx-ui", { "/srv/headscale-ui": files.path });
    const command = nginx(
      files.path,
      `server { listen 127.0.0.1:${port}; ${ui} location / { proxy_pass ${server.url}; } }`,
    );
    const child = Bun.spawn(command, { stdout: "ignore", stderr: "ignore" });
    try {
      const get = async (path: string, init?: RequestInit): Promise<[number, string]> => {
        const answer = await fetch(`http://127.0.0.1:${port}${path}`, init);
        return [answer.status, await answer.text()];
      };
      await until("nginx answers", async () => (await get("/health"))[0] === 200);
      for (const [path, page] of [
        ["/web/", "index"],
        ["/web/users.html", "users"],
        ["/web/users", "users"],
        ["/web/devices/7", "index"],
      ] as const)
        expect([path, ...(await get(path))]).toEqual([path, 200, page]);
      expect((await get("/api/v1/user"))[0]).toBe(401);
      const headers = { Authorization: `Bearer ${apiKey}` };
      expect(await get("/api/v1/user", { headers })).toEqual([200, expect.stringContaining('"users"')]);
      if (skip(noBrowser)) return;

      // In a browser: what UIs do, with the headers of the browser's own.
      const node = await server.join("web", await server.key({ user: await server.user("alice"), reusable: true }));
      await node.lite({ Hostinfo: { Hostname: "web", OS: "linux", RoutableIPs: ["10.0.0.0/8"] } });
      const browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-gpu"] });
      try {
        const page = await browser.newPage();
        const ask = (origin: string, method: string, path: string, body?: object) =>
          page.evaluate(
            async ([url, method, key, body]) => {
              const headers = { Authorization: `Bearer ${key}` };
              const answer = await fetch(url, { method, headers, ...(body && { body }) });
              return { status: answer.status, body: await answer.json() };
            },
            [`${origin}/api/v1${path}`, method, apiKey, body && JSON.stringify(body)] as const,
          );
        await page.goto(`http://127.0.0.1:${port}/web/users`);
        const api = async (method: string, path: string, body?: object) => {
          const answer = await ask("", method, path, body);
          expect([path, answer.status]).toEqual([path, 200]);
          return answer.body;
        };
        expect(await api("GET", "/user")).toMatchObject({ users: [{ id: "1", name: "alice" }] });
        expect(await api("GET", "/node")).toMatchObject({ nodes: [{ id: "1", availableRoutes: ["10.0.0.0/8"] }] });
        const { preAuthKey } = await api("POST", "/preauthkey", { user: "1", reusable: false });
        expect(await server.node("second").register({ authKey: preAuthKey.key })).toMatchObject({ Error: "" });
        await api("POST", "/node/1/rename/front");
        await api("POST", "/node/1/approve_routes", { routes: ["10.0.0.0/8"] });
        expect((await api("GET", "/node")).nodes[0]).toMatchObject({
          givenName: "front",
          approvedRoutes: ["10.0.0.0/8"],
        });
        // Another origin is not let in, with the same key.
        await page.goto(`http://localhost:${port}/web/`);
        expect((await ask("", "GET", "/user")).status).toBe(200);
        await expect(ask(`http://127.0.0.1:${port}`, "GET", "/user")).rejects.toThrow("Failed to fetch");
      } finally {
        await browser.close();
      }
    } finally {
      child.kill();
      await child.exited;
    }
  },
);

test.skipIf(skip(noNginx))(
  "a client that speaks WebSockets joins through a proxy that allows only GET; POST does not pass",
  async () => {
    await using server = await TestServer.start();
    const port = await freePort();
    const location = configuration("nginx-get-only", { "127.0.0.1:8080": new URL(server.url).host });
    const child = Bun.spawn(nginx(dir.path, `server { listen 127.0.0.1:${port}; ${location} }`), {
      stdout: "ignore",
      stderr: "ignore",
    });
    try {
      const url = `http://127.0.0.1:${port}`;
      await until("nginx answers", async () => (await fetch(`${url}/key?v=140`)).ok);
      expect((await fetch(`${url}/ts2021`, { method: "POST" })).status).toBe(403);
      const node = await WebSocketNode.connect({ url, control: server.control });
      const nodeKey = `nodekey:${"7".repeat(64)}`;
      const authKey = await server.key({ aclTags: ["tag:a"] });
      const body = { Version: 138, NodeKey: nodeKey, Auth: { AuthKey: authKey }, Hostinfo: { Hostname: "browser" } };
      expect(JSON.parse(await node.request("/machine/register", body))).toMatchObject({ MachineAuthorized: true });
      node.open("/machine/map", { Version: 138, NodeKey: nodeKey, Stream: true, Hostinfo: { Hostname: "browser" } });
      await until("its map stream is open", () => server.control.stats().maps === 1);
      node.close();
    } finally {
      child.kill();
      await child.exited;
    }
  },
);
