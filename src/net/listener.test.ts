import { expect, test } from "bun:test";
import { once } from "node:events";
import { connect } from "node:net";
import { connect as tlsConnect } from "node:tls";
import { Hono } from "hono";
import { clientAddress, clientAddressOf, parseTrustedProxies } from "./client-address.ts";
import { type Listener, type ListenOptions, listen, refuseUpgrade } from "./listener.ts";
import { createLogger } from "./logger.ts";

function app(): Hono {
  const hono = new Hono();
  hono.get("/", (c) => c.text("hello"));
  hono.post("/size", async (c) => c.text(String((await c.req.arrayBuffer()).byteLength)));
  hono.get("/broken", () => {
    throw new Error("secret");
  });
  return hono;
}

async function serve(more: Partial<ListenOptions> = {}): Promise<Listener & AsyncDisposable> {
  const listener = await listen({ host: "127.0.0.1", port: 0, app: app(), upgrades: {}, ...more });
  return { ...listener, [Symbol.asyncDispose]: () => listener.close() };
}

/** What a raw client hears until the server closes. */
function talk(port: number, bytes: string | Uint8Array, secure = false): Promise<string> {
  return new Promise((resolve, reject) => {
    let heard = "";
    const socket = secure
      ? tlsConnect({ host: "127.0.0.1", port, rejectUnauthorized: false })
      : connect(port, "127.0.0.1");
    const timer = setTimeout(() => {
      socket.destroy();
      reject(new Error(`still open, heard ${JSON.stringify(heard)}`));
    }, 120_000);
    socket.on("data", (chunk) => {
      heard += chunk.toString("latin1");
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      clearTimeout(timer);
      resolve(heard);
    });
    if (bytes.length > 0) socket.write(bytes);
  });
}

/** Self-signed for 127.0.0.1, a hundred years. */
const TLS = {
  key: `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgtIstcZ81Ly5CAh9j
CFG6bmve077Hhb5oTSQHmtAZVOWhRANCAAQgQrhmUtBDObWy9lEJuTi/A6QekoZe
FCaJeTnZjyuxOPqmhGVur/jrCQSUaPUyFtT1IZj/ES7oaUC61RaOL0IX
-----END PRIVATE KEY-----
`,
  cert: `-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIURc/uqmfnDzwsaNuCZD6Di399dAUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJd2VmdC50ZXN0MCAXDTI2MTEyMTA4Mjc1M1oYDzIxMjYxMDI4
MDgyNzUzWjAUMRIwEAYDVQQDDAl3ZWZ0LnRlc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQgQrhmUtBDObWy9lEJuTi/A6QekoZeFCaJeTnZjyuxOPqmhGVur/jr
CQSUaPUyFtT1IZj/ES7oaUC61RaOL0IXo28wbTAdBgNVHQ4EFgQUeoph5r1nnE/5
ciwuKU3+W3lR24UwHwYDVR0jBBgwFoAUeoph5r1nnE/5ciwuKU3+W3lR24UwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARggl3ZWZ0LnRlc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgS7I6E+DQZmnDT2by6G4f2OIJO2L7Kra64KW7YDOxwNICIQD0
cToVCjuqVKii81qKJHPZyoSavhn10T3UqEBseFRcvw==
-----END CERTIFICATE-----
`,
};

/** The same for another name. */
const OTHER = {
  key: `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgze/CcvaanobwvNOi
kmDfkr7BWQtYjacmfxkGmscR1BChRANCAASlxHJ5RE2Wqss55UBYuIt6RqLEAkFg
SqocIy/shiyJa4iu4S3j2gJdWc2F9t0J+IknHD5Kbs7Io99rmtZSyiDx
-----END PRIVATE KEY-----
`,
  cert: `-----BEGIN CERTIFICATE-----
MIIBlzCCAT6gAwIBAgIUacHLwRyFsxSA5J1uVqCzxpuXMYswCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKb3RoZXIudGVzdDAgFw0yNjExMjExMTA5MjBaGA8yMTI2MTAy
ODExMDkyMFowFTETMBEGA1UEAwwKb3RoZXIudGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABKXEcnlETZaqyznlQFi4i3pGosQCQWBKqhwjL+yGLIlriK7hLePa
Al1ZzYX23Qn4iSccPkpuzsij32ua1lLKIPGjajBoMB0GA1UdDgQWBBQojRChLFW7
Bt1x+YD0NW/zyxBPujAfBgNVHSMEGDAWgBQojRChLFW7Bt1x+YD0NW/zyxBPujAP
BgNVHRMBAf8EBTADAQH/MBUGA1UdEQQOMAyCCm90aGVyLnRlc3QwCgYIKoZIzj0E
AwIDRwAwRAIgVCCWMlm/tOwcHe801NK7rQRsE3CSAKvk1tR3a2XsLpwCIDl48Voo
vwtv15fLJ25kEqv2ObRrDesEKWqWf1Lywzj6
-----END CERTIFICATE-----
`,
};

async function isAlive(port: number): Promise<boolean> {
  return (await fetch(`http://127.0.0.1:${port}/`).then((r) => r.text())) === "hello";
}

test("serves the app, bounds bodies, and keeps its errors to itself", async () => {
  const logged: Record<string, unknown>[] = [];
  const log = createLogger({ level: "info", format: "json", write: (line) => logged.push(JSON.parse(line)) });
  await using server = await serve({ limits: { bodyBytes: 1000 }, log });
  const url = `http://127.0.0.1:${server.port}`;
  expect(await isAlive(server.port)).toBe(true);
  expect(await (await fetch(`${url}/size`, { method: "POST", body: "x".repeat(1000) })).text()).toBe("1000");
  expect((await fetch(`${url}/size`, { method: "POST", body: "x".repeat(1001) })).status).toBe(413);
  const stream = new ReadableStream({
    pull(controller) {
      controller.enqueue(new Uint8Array(600));
    },
  });
  const endless = await fetch(`${url}/size`, { method: "POST", body: stream }).catch(() => null);
  expect(endless === null || endless.status === 413).toBe(true);
  const broken = await fetch(`${url}/broken`);
  const id = broken.headers.get("X-Request-Id");
  expect(id).toMatch(/^[0-9a-f]{20}$/);
  expect([broken.status, await broken.text()]).toEqual([500, `internal error, request ${id}`]);
  expect(logged).toEqual([expect.objectContaining({ level: "error", request: id, client: "127.0.0.1" })]);
  expect(logged[0]?.error).toContain("Error: secret");
  expect(await isAlive(server.port)).toBe(true);
});

/** Sends pieces, and waits after each of them for what is to be heard by then. */
async function converse(port: number, turns: [bytes: string, heard: RegExp][], pause = 0): Promise<void> {
  const socket = connect(port, "127.0.0.1");
  let heard = "";
  try {
    for (const [bytes, expected] of turns) {
      socket.write(bytes);
      const deadline = performance.now() + 60_000;
      while (!expected.test(heard)) {
        if (socket.destroyed || performance.now() > deadline)
          throw new Error(`no ${expected}, heard ${JSON.stringify(heard)}`);
        await Promise.race([once(socket, "data"), once(socket, "close"), Bun.sleep(60_000)]).then((data) => {
          heard += Array.isArray(data) && data[0] instanceof Uint8Array ? data[0].toString() : "";
        });
      }
      await Bun.sleep(pause);
    }
  } finally {
    socket.destroy();
  }
}

test("an answer that does not wait for the body reaches a client that goes on sending, and the connection stays", async () => {
  const refusing = app().post("/refuse", (c) => c.text("no", 401));
  await using server = await serve({ app: refusing, limits: { bodyBytes: 1000 } });
  const half = "x".repeat(1_500_000);
  const chunk = `${half.length.toString(16)}\r\n${half}\r\n`;
  const forms = [
    [`Content-Length: ${half.length * 2}`, half, half],
    ["Transfer-Encoding: chunked", chunk, `${chunk}0\r\n\r\n`],
  ] as const;
  const talks = ["/size", "/refuse"].flatMap((path) =>
    forms.map(([header, first, rest]) =>
      converse(
        server.port,
        [
          [`POST ${path} HTTP/1.1\r\nHost: x\r\n${header}\r\n\r\n${first}`, /^HTTP\/1.1 4(13|01)/],
          [`${rest}GET / HTTP/1.1\r\nHost: x\r\n\r\n`, /hello$/],
        ],
        // A slow client: longer than the half second that the HTTP library would wait for it.
        600,
      ),
    ),
  );
  await Promise.all(talks);
});

test("a body without end behind its answer, or one that stops, is cut off", async () => {
  await using server = await serve({ limits: { bodyBytes: 1000, requestTimeout: 1000 } });
  const { port } = server;
  const stopped = await talk(port, "POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\nab");
  expect(stopped).toContain("413");
  const endless = connect(port, "127.0.0.1");
  endless.on("error", () => {});
  const closed = new Promise((resolve) => endless.on("close", resolve));
  const piece = new Uint8Array(1 << 20);
  const pump = () => {
    while (!endless.destroyed && endless.write(piece));
  };
  endless.on("drain", pump);
  endless.write("POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n");
  pump();
  await closed;
  expect(await isAlive(port)).toBe(true);
});

test("who sends garbage, a head that is too long or never ends, or a body that never comes is cut off", async () => {
  await using server = await serve({ limits: { headBytes: 4096, headTimeout: 1000, requestTimeout: 1500 } });
  const { port } = server;
  const attempts = await Promise.all([
    talk(port, "\x16\x03\x01\x02\x00\x01\x00\xff\xff\n\n"),
    talk(port, crypto.getRandomValues(new Uint8Array(5000))),
    talk(port, `GET / HTTP/1.1\r\nHost: x\r\nA: ${"a".repeat(10_000)}\r\n\r\n`),
    talk(port, "GET / HTTP/1.1\r\nHost: x\r\n"),
    talk(port, ""),
    talk(port, "POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab"),
    talk(port, "POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
  ]);
  for (const heard of attempts) expect(heard).not.toContain("200 OK");
  expect(await isAlive(port)).toBe(true);
});

test("an upgrade takes the socket, with what came behind the head, and no limit of HTTP touches it any more", async () => {
  const heads: string[] = [];
  await using server = await serve({
    limits: { headTimeout: 1000, requestTimeout: 1000, connections: 1 },
    upgrades: {
      "/take": (_request, socket, head) => {
        heads.push(Buffer.from(head).toString());
        socket.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n");
        setTimeout(() => socket.end("late answer"), 1500);
      },
      "/throws": () => {
        throw new Error("no");
      },
      "/refuses": (_request, socket) => refuseUpgrade(socket, 400, "not like this"),
    },
  });
  const request = (path: string) => `POST ${path} HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n`;
  const first = talk(server.port, `${request("/take?a=b")}early`);
  while (heads.length === 0) await Bun.sleep(1);
  // The first has left HTTP, so there is room for another.
  const second = talk(server.port, `${request("/take")}early`);
  for (const heard of await Promise.all([first, second])) {
    expect(heard).toStartWith("HTTP/1.1 101 ");
    expect(heard).toEndWith("late answer");
  }
  expect(heads).toEqual(["early", "early"]);
  expect(await talk(server.port, request("/throws"))).toBe("");
  expect(await talk(server.port, request("/refuses"))).toMatch(/^HTTP\/1.1 400 .*not like this\n$/s);
  expect(await talk(server.port, request("/constructor"))).toMatch(/^HTTP\/1.1 404 /);
});

test("the same over TLS: app, upgrades, garbage and half heads", async () => {
  await using server = await serve({
    tls: TLS,
    limits: { headTimeout: 1000, requestTimeout: 1500 },
    upgrades: {
      "/take": (_request, socket, head) => socket.end(`HTTP/1.1 101 X\r\n\r\n${Buffer.from(head)}`),
    },
  });
  const { port } = server;
  const isServing = async () => {
    const response = await fetch(`https://127.0.0.1:${port}/`, { tls: { rejectUnauthorized: false } });
    return (await response.text()) === "hello";
  };
  expect(await isServing()).toBe(true);
  const upgrade = "POST /take HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nearly";
  expect(await talk(port, upgrade, true)).toEndWith("\r\n\r\nearly");
  expect(await talk(port, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")).not.toContain("200");
  expect(await talk(port, "GET / HTTP/1.1\r\nHost: x\r\n", true)).not.toContain("200");
  expect(await talk(port, "\0\x01garbage\r\n\r\n", true)).not.toContain("200");
  expect(await isServing()).toBe(true);
});

test("over TLS, who never shakes hands is cut off, and an upgrade outlives every limit of HTTP", async () => {
  await using server = await serve({
    tls: TLS,
    limits: { headTimeout: 1000, requestTimeout: 1000, keepAliveTimeout: 1000, connections: 2 },
    upgrades: {
      "/take": (_request, socket) => {
        socket.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n");
        setTimeout(() => socket.end("late answer"), 1500);
      },
    },
  });
  expect(await talk(server.port, "")).toBe("");
  const upgrade = "POST /take HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n";
  const heard = await Promise.all([1, 2].map(() => talk(server.port, upgrade, true)));
  for (const answer of heard) expect(answer).toEndWith("late answer");
});

test("an answer may take longer than its request might", async () => {
  const slow = new Hono();
  slow.get("/", async (c) => {
    await Bun.sleep(1500);
    return c.text("at last");
  });
  await using server = await serve({ app: slow, limits: { headTimeout: 1000, requestTimeout: 1000 } });
  expect(await (await fetch(`http://127.0.0.1:${server.port}/`)).text()).toBe("at last");
});

/** Common name, ALPN and TLS version of a handshake. */
function shakeHands(port: number, options: { servername?: string; alpn?: string; maxVersion?: "TLSv1.1" }) {
  return new Promise<[string, string | false | null, string | null]>((resolve, reject) => {
    const { alpn, ...more } = options;
    const socket = tlsConnect(
      { host: "127.0.0.1", port, rejectUnauthorized: false, ...(alpn && { ALPNProtocols: [alpn] }), ...more },
      () => {
        const { subject } = socket.getPeerCertificate();
        resolve([String(subject.CN), socket.alpnProtocol, socket.getProtocol()]);
        socket.destroy();
      },
    );
    socket.on("error", reject);
  });
}

test("a certificate is replaced while connections stay; one that is none is refused; old TLS is too", async () => {
  await using server = await serve({ tls: TLS });
  const open = tlsConnect({ host: "127.0.0.1", port: server.port, rejectUnauthorized: false });
  await new Promise((resolve) => open.once("secureConnect", resolve));
  expect(await shakeHands(server.port, {})).toEqual(["weft.test", false, "TLSv1.3"]);
  expect(() => server.setCertificate({ cert: "x", key: "y" })).toThrow("cannot be used");
  expect(await shakeHands(server.port, {})).toEqual(["weft.test", false, "TLSv1.3"]);
  server.setCertificate(OTHER);
  expect(await shakeHands(server.port, {})).toEqual(["other.test", false, "TLSv1.3"]);
  expect(await shakeHands(server.port, { servername: "weft.test" })).toEqual(["other.test", false, "TLSv1.3"]);
  open.write("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  expect(String(await new Promise((resolve) => open.once("data", resolve)))).toContain("200 OK");
  open.destroy();
  expect(shakeHands(server.port, { maxVersion: "TLSv1.1" })).rejects.toThrow();
});

test("the ACME challenge is answered by name and ALPN, and reaches no app", async () => {
  await using server = await serve({ tls: TLS, challenge: (name) => (name === "other.test" ? OTHER : null) });
  expect(await shakeHands(server.port, { servername: "other.test", alpn: "acme-tls/1" })).toEqual([
    "other.test",
    "acme-tls/1",
    "TLSv1.3",
  ]);
  expect(await shakeHands(server.port, { servername: "weft.test", alpn: "http/1.1" })).toEqual([
    "weft.test",
    "http/1.1",
    "TLSv1.3",
  ]);
});

test("requests and upgrades know their client behind a trusted proxy", async () => {
  const who = new Hono();
  who.get("/", (c) => c.text(clientAddress(c)));
  const upgrades: ListenOptions["upgrades"] = { "/take": (request, socket) => socket.end(clientAddressOf(request)) };
  const ask = async (trusted: string[]) => {
    await using server = await serve({ app: who, upgrades, trustedProxies: parseTrustedProxies(trusted) });
    const headers = { "X-Forwarded-For": "1.1.1.1, 198.51.100.4" };
    const plain = await (await fetch(`http://127.0.0.1:${server.port}/`, { headers })).text();
    const head = "GET /take HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade";
    return [plain, await talk(server.port, `${head}\r\nX-Forwarded-For: 1.1.1.1, 198.51.100.4\r\n\r\n`)];
  };
  expect(await ask(["127.0.0.0/8"])).toEqual(["198.51.100.4", "198.51.100.4"]);
  expect(await ask([])).toEqual(["127.0.0.1", "127.0.0.1"]);
});

test("strangers with half a head make room for others; when all are at work, one more is turned away", async () => {
  const busy = app();
  let working = 0;
  let finish = () => {};
  const finished = new Promise<void>((resolve) => {
    finish = resolve;
  });
  busy.get("/slow", async (c) => {
    working++;
    await finished;
    return c.text("done");
  });
  const limits = { connections: 3, headTimeout: 60_000, requestTimeout: 60_000 };
  await using server = await serve({ app: busy, limits });
  const { port } = server;
  let gone = 0;
  const strangers = Array.from({ length: 20 }, () => connect(port, "127.0.0.1"));
  for (const socket of strangers) {
    socket.on("error", () => {});
    socket.on("close", () => gone++);
    socket.write("GET / HTTP/1.1\r\n");
  }
  expect(await isAlive(port)).toBe(true);
  const deadline = performance.now() + 60_000;
  while (gone < 17 && performance.now() < deadline) await Bun.sleep(5);
  expect(gone).toBeGreaterThanOrEqual(17);

  const slow = Array.from({ length: 3 }, () =>
    talk(port, "GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
  );
  while (working < 3 && performance.now() < deadline) await Bun.sleep(5);
  expect(await talk(port, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).toBe("");
  finish();
  for (const answer of await Promise.all(slow)) expect(answer).toEndWith("done");
  for (const socket of strangers) socket.destroy();
});

test("who reads no answers loses the place when another needs it", async () => {
  const large = app();
  const begun = new Set<string>();
  large.get("/large/:who", (c) => {
    begun.add(c.req.param("who"));
    return c.text("x".repeat(1 << 20));
  });
  await using server = await serve({ app: large, limits: { connections: 3, answerTimeout: 100 } });
  const { port } = server;
  let gone = 0;
  const deaf = Array.from({ length: 3 }, () => connect(port, "127.0.0.1"));
  for (const [i, socket] of deaf.entries()) {
    socket.pause();
    socket.on("error", () => {});
    socket.on("close", () => gone++);
    socket.write(`GET /large/${i} HTTP/1.1\r\nHost: x\r\n\r\n`.repeat(50));
  }
  const deadline = performance.now() + 60_000;
  while (begun.size < 3 && performance.now() < deadline) await Bun.sleep(5);
  let isServed = false;
  while (!isServed && performance.now() < deadline) isServed = await isAlive(port).catch(() => false);
  expect([isServed, gone < 3]).toEqual([true, true]);
  for (const socket of deaf) socket.destroy();
});

test("a port in use and an address of another machine are told in one sentence", async () => {
  await using server = await serve();
  expect(serve({ port: server.port })).rejects.toThrow("is in use by another program");
  expect(serve({ host: "192.0.2.1" })).rejects.toThrow("is not an address of this machine");
  expect(serve({ tls: { cert: "nonsense", key: "nonsense" } })).rejects.toThrow(
    "TLS certificate or key cannot be used",
  );
});

test("closing ends idle connections at once", async () => {
  const server = await listen({ host: "127.0.0.1", port: 0, app: app(), upgrades: {} });
  const idle = connect(server.port, "127.0.0.1");
  const ended = new Promise((resolve) => idle.on("close", () => resolve("ended")));
  idle.write("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
  // Only when the answer is here the connection is idle.
  await new Promise((resolve) => idle.once("data", resolve));
  await server.close();
  expect(await ended).toBe("ended");
});
