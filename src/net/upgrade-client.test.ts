import { afterEach, describe, expect, test } from "bun:test";
import { createServer, type Server, type Socket } from "node:net";
import fc from "fast-check";
import { dialUpgrade, type Upgraded, UpgradeRefused } from "./upgrade-client.ts";

const servers: { server: Server; sockets: Set<Socket> }[] = [];
afterEach(() => {
  for (const { server, sockets } of servers.splice(0)) {
    for (const socket of sockets) socket.destroy();
    server.close();
  }
});

/** A TCP server; its URL. */
async function serve(onConnection: (socket: Socket) => void): Promise<URL> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => {});
    socket.on("close", () => sockets.delete(socket));
    socket.resume();
    onConnection(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  servers.push({ server, sockets });
  return new URL(`http://127.0.0.1:${(server.address() as { port: number }).port}`);
}

const dial = (url: URL, more: { timeout?: number; signal?: AbortSignal } = {}): Promise<Upgraded> =>
  dialUpgrade({ url, method: "POST", path: "/up", protocol: "proto", timeout: 60_000, ...more });
const OK = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: Proto\r\nX-A:  b \r\n\r\n";

test("the request is what was asked for; bytes behind the head come with the socket, also in single bytes", async () => {
  let seen = "";
  const url = await serve((socket) => {
    socket.once("data", async (chunk: Buffer) => {
      seen = chunk.toString();
      for (const byte of `${OK}\x00\x01`) {
        socket.write(byte, "latin1");
        await Bun.sleep(0);
      }
    });
  });
  const { socket, head, headers } = await dialUpgrade({
    url,
    method: "POST",
    path: "/up",
    protocol: "proto",
    headers: { "X-Key": "v" },
    timeout: 60_000,
  });
  expect(seen).toBe(
    `POST /up HTTP/1.1\r\nHost: ${url.host}\r\nUpgrade: proto\r\nConnection: upgrade\r\nX-Key: v\r\nContent-Length: 0\r\n\r\n`,
  );
  expect(headers.get("x-a")).toBe("b");
  const got = [...head];
  socket.on("data", (chunk: Uint8Array) => got.push(...chunk));
  socket.resume();
  const deadline = Date.now() + 60_000;
  while (got.length < 2 && Date.now() < deadline) await Bun.sleep(2);
  expect(got).toEqual([0, 1]);
  socket.destroy();
});

describe("no upgrade is one sentence", () => {
  const answers: [string, string, string][] = [
    [
      "another status",
      "HTTP/1.1 404 Not Found\r\n\r\nno such\r\npage",
      "with status 404 instead of an upgrade (no such page)",
    ],
    ["a page", "HTTP/1.1 200 OK\r\n\r\n<html>", "with status 200 instead of an upgrade"],
    ["another protocol", "HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n", "with status 101 instead of an upgrade"],
    ["an endless header", `HTTP/1.1 101 X\r\nA: ${"a".repeat(20_000)}`, "with an endless header"],
    ["another language", "220 mail ready\r\n\r\n", "does not speak HTTP"],
  ];
  for (const [what, answer, sentence] of answers)
    test(what, async () => {
      const url = await serve((socket) => socket.write(answer));
      await expect(dial(url)).rejects.toThrow(sentence);
    });

  test("a closed connection, silence, a closed port, a call-off", async () => {
    const closing = await serve((socket) => socket.end());
    await expect(dial(closing)).rejects.toThrow("closed the connection before it answered /up");
    const silent = await serve(() => {});
    await expect(dial(silent, { timeout: 50 })).rejects.toThrow("did not answer /up within 0.05 s");
    await expect(dial(silent, { signal: AbortSignal.timeout(20) })).rejects.toThrow("was called off");
    await expect(dial(new URL("http://127.0.0.1:1"))).rejects.toThrow("cannot connect to http://127.0.0.1:1");
  });

  test("the status can be asked for", async () => {
    const url = await serve((socket) => socket.write("HTTP/1.1 503 Busy\r\n\r\n"));
    const error = await dial(url).catch((e: unknown) => e);
    expect(error).toBeInstanceOf(UpgradeRefused);
    expect((error as UpgradeRefused).status).toBe(503);
  });
});

test("any bytes lead to a sentence or an upgrade, and leave no socket behind", async () => {
  let next: Uint8Array = new Uint8Array(0);
  const url = await serve((socket) => socket.end(next));
  const damaged = fc.tuple(fc.nat(OK.length - 1), fc.integer({ min: 0, max: 255 })).map(([at, byte]) => {
    const bytes = Buffer.from(OK);
    bytes[at] = byte;
    return Uint8Array.from(bytes);
  });
  await fc.assert(
    fc.asyncProperty(fc.oneof(fc.uint8Array({ maxLength: 300 }), damaged), async (bytes) => {
      next = bytes;
      try {
        (await dial(url)).socket.destroy();
      } catch (error) {
        expect((error as Error).message).not.toMatch(/\n/);
      }
    }),
    { numRuns: 80 },
  );
  const deadline = Date.now() + 60_000;
  while (servers[0]!.sockets.size > 0 && Date.now() < deadline) await Bun.sleep(5);
  expect(servers[0]!.sockets.size).toBe(0);
});
