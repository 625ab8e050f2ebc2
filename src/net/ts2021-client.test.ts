import { expect, test } from "bun:test";
import { createServer } from "node:http";
import { createServer as createHttp2 } from "node:http2";
import type { AddressInfo } from "node:net";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { respondToInitiation } from "../wire/noise.ts";
import { NoiseDuplex } from "./noise-duplex.ts";
import { ControlUnreachable, Ts2021Client } from "./ts2021-client.ts";

/** A control server that does the handshake, speaks HTTP/2, and never answers: `end` says how its connections end. */
function silentServer(end: (duplex: NoiseDuplex, socket: NodeJS.WritableStream & { destroy(): void }) => void) {
  const controlPrivate = randomBytes(32);
  const http = createServer((_, response) =>
    response.end(JSON.stringify({ publicKey: formatKey("mkey", x25519Public(controlPrivate)) })),
  );
  const http2 = createHttp2();
  http2.on("session", (session) => session.on("error", () => {}));
  http2.on("stream", (stream) => stream.on("error", () => {}));
  http.on("upgrade", (request, socket, head) => {
    const initiation = Buffer.from(request.headers["x-tailscale-handshake"] as string, "base64");
    const { keys, response } = respondToInitiation({ initiation, controlPrivate, ephemeralPrivate: randomBytes(32) });
    const switching =
      "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n";
    const duplex = new NoiseDuplex({
      role: "server",
      socket,
      keys,
      head,
      preamble: Buffer.concat([Buffer.from(switching), response]),
    });
    http2.emit("connection", duplex);
    end(duplex, socket);
  });
  return new Promise<{ url: string; close(): void }>((resolve) =>
    http.listen(0, "127.0.0.1", () =>
      resolve({ url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`, close: () => http.close() }),
    ),
  );
}

for (const [how, end] of [
  ["at once", (_, socket) => socket.destroy()],
  ["in order, at once", (_, socket) => socket.end()],
  ["after a moment", (_, socket) => setTimeout(() => socket.destroy(), 20)],
  ["in order, after a moment", (_, socket) => setTimeout(() => socket.end(), 20)],
] as [string, Parameters<typeof silentServer>[0]][]) {
  test(`a connection that ends ${how} settles what was asked on it`, async () => {
    const server = await silentServer(end);
    const clients = Array.from(
      { length: 8 },
      () => new Ts2021Client({ serverUrl: server.url, machinePrivate: randomBytes(32), version: 140, randomBytes }),
    );
    try {
      const outcomes = await Promise.all(
        clients.map((client) =>
          Promise.race([
            client
              .request({ method: "POST", path: "/machine/register", body: "{}" }, 1024, 120_000)
              .catch((error) => error),
            Bun.sleep(60_000).then(() => "it hangs"),
          ]),
        ),
      );
      for (const outcome of outcomes) expect(outcome).toBeInstanceOf(ControlUnreachable);
    } finally {
      for (const client of clients) client.close();
      server.close();
    }
  });
}
