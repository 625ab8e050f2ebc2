import { describe, expect, test } from "bun:test";
import { createServer as createHttp2Server, connect as http2Connect, type ServerHttp2Stream } from "node:http2";
import { createConnection, createServer, type Socket } from "node:net";
import { Duplex } from "node:stream";
import type { NoiseKeys } from "../wire/noise.ts";
import { MAX_PLAINTEXT, RecordSealer } from "../wire/noise.ts";
import { NoiseDuplex } from "./noise-duplex.ts";

const a = new Uint8Array(32).fill(1);
const b = new Uint8Array(32).fill(2);
const clientKeys: NoiseKeys = { send: a, receive: b, handshakeHash: new Uint8Array(32) };
const serverKeys: NoiseKeys = { send: b, receive: a, handshakeHash: new Uint8Array(32) };

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not within a minute: ${what}`);
    await Bun.sleep(2);
  }
}

/** Two ends of a loopback TCP connection. */
async function tcpPair(): Promise<{ client: Socket; server: Socket } & AsyncDisposable> {
  const listener = createServer({ allowHalfOpen: true });
  await new Promise<void>((resolve) => listener.listen(0, "127.0.0.1", resolve));
  const accepted = new Promise<Socket>((resolve) => listener.once("connection", resolve));
  const client = createConnection({ port: (listener.address() as { port: number }).port, host: "127.0.0.1" });
  const server = await accepted;
  return {
    client,
    server,
    async [Symbol.asyncDispose]() {
      client.destroy();
      server.destroy();
      listener.close();
    },
  };
}

/** A socket whose other end is the test: it takes what is written only when told to. */
class StuckSocket extends Duplex {
  written: Uint8Array[] = [];
  paused = 0;
  full = false;
  override _read(): void {}
  override write(chunk: unknown): boolean {
    this.written.push(chunk as Uint8Array);
    return !this.full;
  }
  override pause(): this {
    this.paused++;
    return super.pause();
  }
}

describe("a stream in Noise records", () => {
  test("carries bytes both ways, after preamble and early payload, in one write", async () => {
    await using pair = await tcpPair();
    const early = { nodeKeyChallenge: `chalpub:${"0f".repeat(32)}` };
    let seen: unknown;
    // The preamble stands for the 101 head, which the upgrade takes off before the client's Duplex is made.
    const server = new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys, early });
    const client = new NoiseDuplex({
      role: "client",
      socket: pair.client,
      keys: clientKeys,
      onEarlyPayload: (payload) => {
        seen = payload;
      },
    });
    const got: Uint8Array[] = [];
    client.on("data", (chunk: Uint8Array) => got.push(chunk));
    server.on("data", (chunk: Uint8Array) => server.write(chunk));
    const sent = new Uint8Array(100_000).map((_, i) => i * 7);
    client.write(sent);
    await until(() => Buffer.concat(got).length === sent.length, "the echo");
    expect(Buffer.concat(got).equals(sent)).toBe(true);
    expect(seen).toEqual(early);
  });

  test("bytes that came with the handshake are the beginning of the stream", async () => {
    await using pair = await tcpPair();
    const head = new RecordSealer(a).seal(Uint8Array.of(1, 2, 3));
    const server = new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys, head });
    const got: Uint8Array[] = [];
    server.on("data", (chunk: Uint8Array) => got.push(chunk));
    await until(() => got.length > 0, "the head");
    expect(Buffer.concat(got)).toEqual(Buffer.from([1, 2, 3]));
  });

  test("the preamble leaves before anything else, together with the early payload", () => {
    const socket = new StuckSocket();
    const early = { nodeKeyChallenge: "chalpub:00" };
    const preamble = new TextEncoder().encode("HTTP/1.1 101\r\n\r\n");
    new NoiseDuplex({ role: "server", socket, keys: serverKeys, preamble, early }).destroy();
    expect(socket.written.length).toBe(1);
    expect(Buffer.from(socket.written[0]!).subarray(0, preamble.length).equals(preamble)).toBe(true);
    expect(socket.written[0]![preamble.length]).toBe(4);
  });

  test("a full socket holds the write callback until it drains", async () => {
    const socket = new StuckSocket();
    const duplex = new NoiseDuplex({ role: "client", socket, keys: clientKeys });
    socket.full = true;
    let done = 0;
    duplex.write(Uint8Array.of(1), () => done++);
    duplex.write(Uint8Array.of(2), () => done++);
    await Bun.sleep(5);
    expect(done).toBe(0);
    expect(socket.written.length).toBe(1);
    socket.full = false;
    socket.emit("drain");
    await until(() => done === 2, "both writes");
    duplex.destroy();
  });

  test("a held write callback is released when the stream is destroyed", async () => {
    const socket = new StuckSocket();
    const duplex = new NoiseDuplex({ role: "client", socket, keys: clientKeys });
    socket.full = true;
    let error: unknown = "not called";
    duplex.write(Uint8Array.of(1), (e) => {
      error = e;
    });
    duplex.destroy();
    await until(() => error !== "not called", "the callback");
    expect(error).toBeInstanceOf(Error);
    expect(socket.destroyed).toBe(true);
  });

  test("a reader that does not read pauses the socket", () => {
    const socket = new StuckSocket();
    const duplex = new NoiseDuplex({ role: "server", socket, keys: serverKeys });
    const sealer = new RecordSealer(a);
    for (let i = 0; i < 40; i++) socket.emit("data", sealer.seal(new Uint8Array(MAX_PLAINTEXT)));
    expect(socket.paused).toBeGreaterThan(0);
    expect(duplex.readableLength).toBe(40 * MAX_PLAINTEXT);
    duplex.destroy();
  });

  test("a broken record destroys stream and socket, without an uncaught error", async () => {
    await using pair = await tcpPair();
    const server = new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys });
    pair.client.on("error", () => {});
    pair.client.write(Uint8Array.of(4, 0, 16, ...new Uint8Array(16)));
    await until(() => server.destroyed && pair.server.destroyed, "destruction");
  });

  test("the end of the socket ends the stream, even when the socket could stay half open", async () => {
    await using pair = await tcpPair();
    const server = new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys });
    let closed = false;
    server.on("close", () => {
      closed = true;
    });
    pair.client.end();
    await until(() => closed && pair.server.destroyed, "the stream's close");
  });

  test("what came before the end is still delivered to a slow reader", async () => {
    await using pair = await tcpPair();
    const server = new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys });
    pair.client.end(new RecordSealer(a).seal(Uint8Array.of(9)));
    await until(() => server.readableLength === 1, "the byte");
    await Bun.sleep(5);
    const got: Uint8Array[] = [];
    server.on("data", (chunk: Uint8Array) => got.push(chunk));
    await until(() => server.destroyed, "destruction");
    expect(Buffer.concat(got)).toEqual(Buffer.from([9]));
  });
});

test("node:http2 runs over it, both roles, with large bodies and a stream that stays open", async () => {
  await using pair = await tcpPair();
  const http2 = createHttp2Server();
  http2.on("stream", (stream: ServerHttp2Stream, headers) => {
    stream.respond({ ":status": 200 });
    if (headers[":path"] === "/open") {
      stream.write("first");
      return;
    }
    let bytes = 0;
    stream.on("data", (chunk: Uint8Array) => {
      bytes += chunk.length;
    });
    stream.on("end", () => stream.end(Buffer.alloc(bytes, 7)));
  });
  http2.emit("connection", new NoiseDuplex({ role: "server", socket: pair.server, keys: serverKeys }));
  const duplex = new NoiseDuplex({ role: "client", socket: pair.client, keys: clientKeys });
  const session = http2Connect("https://control", { createConnection: () => duplex });
  try {
    const open = session.request({ ":path": "/open" });
    let opened = "";
    open.on("data", (chunk: Uint8Array) => {
      opened += new TextDecoder().decode(chunk);
    });
    open.end();
    await until(() => opened === "first", "the open stream's first bytes");
    const post = session.request({ ":method": "POST", ":path": "/echo" });
    let bytes = 0;
    let ended = false;
    post.on("data", (chunk: Uint8Array) => {
      bytes += chunk.length;
    });
    post.on("end", () => {
      ended = true;
    });
    post.end(Buffer.alloc(1_000_000, 1));
    await until(() => ended, "the echo's end");
    expect(bytes).toBe(1_000_000);
  } finally {
    session.destroy();
    duplex.destroy();
  }
});
