import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { connect as tcpConnect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Duplex } from "node:stream";
import { connect as tlsConnect } from "node:tls";
import { Hono } from "hono";
import type { Http2Stream } from "../wire/h2.ts";
import { type NoiseKeys, RecordOpener, RecordSealer } from "../wire/noise.ts";
import { AcmeCertificates } from "./acme.ts";
import { listen } from "./listener.ts";
import { SILENT } from "./logger.ts";
import { NoiseHttp2 } from "./noise-http2.ts";

const a = new Uint8Array(32).fill(1);
const b = new Uint8Array(32).fill(2);
const serverKeys: NoiseKeys = { send: b, receive: a, handshakeHash: new Uint8Array(32) };
const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
/** SETTINGS, and WINDOW_UPDATE of the connection: windows of 16 MB. */
const WIDE = Buffer.from("00000604000000000000040100000000000408000000000001000000", "hex");
const EMPTY = new Uint8Array(0);

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not within a minute: ${what}`);
    await Bun.sleep(2);
  }
}

/** `GET /<path>` on stream `id`, all of it static or literal (RFC 7541). */
function get(id: number, path: string): Buffer {
  const block = Buffer.concat([Buffer.of(0x82, 0x87, 0x04, path.length), Buffer.from(path)]);
  return Buffer.concat([Buffer.of(0, 0, block.length, 1, 5, 0, 0, 0, id), block]);
}

/** What the whole DATA frames carry. */
function bodyIn(frames: Buffer): Buffer {
  const parts: Buffer[] = [];
  for (let at = 0; frames.length - at >= 9; ) {
    const end = at + 9 + frames.readUIntBE(at, 3);
    if (frames[at + 3] === 0) parts.push(frames.subarray(at + 9, end));
    at = end;
  }
  return Buffer.concat(parts);
}

/** A connection whose socket is the test: what is written is kept, opened again, and cut into frames. */
class Rig {
  readonly writes: Buffer[] = [];
  readonly streams: Http2Stream[] = [];
  full = false;
  closed = 0;
  onRequest: (stream: Http2Stream, path: string) => void = () => {};
  readonly socket: Duplex;
  readonly http2: NoiseHttp2;
  private readonly sealer = new RecordSealer(a);
  private readonly opener = new RecordOpener(b);

  constructor(preamble = EMPTY, early: { nodeKeyChallenge: string } | null = null) {
    this.socket = new Duplex({
      read() {},
      write: (chunk: Buffer, _encoding, done) => {
        this.writes.push(Buffer.from(chunk));
        if (this.full) this.socket.once("room", () => done());
        else done();
      },
      writev: (chunks, done) => {
        this.writes.push(Buffer.concat(chunks.map(({ chunk }) => chunk as Buffer)));
        done();
      },
    });
    this.http2 = new NoiseHttp2({
      socket: this.socket,
      keys: serverKeys,
      onRequest: (stream, headers) => {
        this.streams.push(stream);
        this.onRequest(stream, headers.get(":path")!);
      },
      onPong: () => {},
      onClose: () => this.closed++,
    });
    this.http2.start({ preamble, early, head: EMPTY });
    if (preamble.length === 0) this.receive(PREFACE, WIDE);
  }

  receive(...plaintext: Buffer[]): void {
    this.socket.emit("data", this.sealer.seal(Buffer.concat(plaintext)));
  }

  /** What went out since the last time. */
  plaintext(): Buffer {
    return Buffer.concat(this.writes.splice(0).flatMap((bytes) => this.opener.push(bytes)));
  }
}

test("101 head, handshake, early payload and SETTINGS are one write", () => {
  const preamble = Buffer.from("HTTP/1.1 101\r\n\r\n");
  const { writes } = new Rig(preamble, { nodeKeyChallenge: "chalpub:00" });
  expect(writes.length).toBe(1);
  expect(writes[0]!.subarray(0, preamble.length).equals(preamble)).toBe(true);
  const plaintext = Buffer.concat(new RecordOpener(b).push(writes[0]!.subarray(preamble.length)));
  expect(plaintext.toString("latin1")).toContain('{"nodeKeyChallenge":"chalpub:00"}');
  expect(plaintext.subarray(-27, -18).toString("hex")).toBe("000012040000000000");
});

test("a small message is one record in one write; a large one comes in the order and the size in which it was written", () => {
  const rig = new Rig();
  rig.receive(get(1, "/map"));
  rig.streams[0]!.respond(200);
  rig.plaintext();
  rig.streams[0]!.write(Buffer.from("delta"));
  expect(rig.writes.length).toBe(1);
  expect(rig.writes[0]!.length).toBe(3 + 9 + 5 + 16);
  expect(rig.plaintext().subarray(9).toString()).toBe("delta");
  const large = Buffer.alloc(60_000, "0123456789");
  rig.streams[0]!.write(large);
  expect(bodyIn(rig.plaintext()).equals(large)).toBe(true);
});

test("a handler that writes to another connection, and one that ends its own half-way: nobody gets the other's bytes", () => {
  const [first, second] = [new Rig(), new Rig()];
  first.receive(get(1, "/map"));
  first.streams[0]!.respond(200);
  first.plaintext();
  second.plaintext();
  second.onRequest = (stream, path) => {
    stream.respond(200, {}, Buffer.from("mine"));
    first.streams[0]!.write(Buffer.from("yours"));
    if (path === "/end") second.http2.destroy();
  };
  second.receive(get(1, "/both"));
  expect(first.plaintext().subarray(9).toString()).toBe("yours");
  expect(second.plaintext().toString("latin1")).toEndWith("mine");
  second.onRequest = (stream) => {
    stream.respond(200, {}, Buffer.from("never sent"));
    second.http2.destroy();
    first.streams[0]!.write(Buffer.from("mine alone"));
  };
  second.receive(get(3, "/end"));
  expect(first.plaintext().subarray(9).toString()).toBe("mine alone");
  expect([second.closed, second.socket.destroyed, second.plaintext().length]).toEqual([1, true, 0]);
});

test("a full socket holds answers back until it has drained", async () => {
  const rig = new Rig();
  rig.receive(get(1, "/map"));
  const [stream] = rig.streams as [Http2Stream];
  stream.respond(200);
  let drained = 0;
  stream.onDrain = () => drained++;
  rig.full = true;
  const message = Buffer.alloc(20_000, "x");
  let written = 0;
  while (stream.write(message)) written++;
  expect(written * message.length).toBeLessThan(200_000);
  const before = rig.writes.length;
  await Bun.sleep(5);
  expect([rig.writes.length, drained]).toEqual([before, 0]);
  // A reply goes into the socket's queue all the same, and others use the shared buffer meanwhile.
  rig.receive(Buffer.from("0000080600000000006162636465666768", "hex"));
  const other = new Rig();
  other.receive(get(1, "/other"));
  other.streams[0]!.respond(200, {}, Buffer.alloc(5000));
  rig.full = false;
  rig.socket.emit("room");
  await until(() => drained === 1, "the drain");
  const plaintext = rig.plaintext();
  expect(bodyIn(plaintext).length).toBe((written + 1) * message.length);
  expect(plaintext.toString("latin1")).toContain("abcdefgh");
});

test("a broken record, the socket's end and its error end all streams, once", async () => {
  const ends: ((rig: Rig) => void)[] = [
    ({ socket }) => socket.emit("data", Buffer.of(4, 0, 16, ...new Uint8Array(16))),
    ({ socket }) => socket.push(null),
    ({ socket }) => socket.destroy(new Error("reset")),
    ({ http2 }) => http2.destroy(),
  ];
  for (const end of ends) {
    const rig = new Rig();
    rig.receive(get(1, "/map"));
    let over = 0;
    rig.streams[0]!.onClose(() => over++);
    end(rig);
    await until(() => rig.socket.destroyed && rig.closed > 0, "the end");
    await Bun.sleep(2);
    expect([rig.closed, over, rig.http2.openStreams]).toEqual([1, 1, 0]);
  }
});

test("who breaks HTTP/2 hears why before the socket ends", async () => {
  const rig = new Rig();
  rig.plaintext();
  let ended = false;
  rig.socket.on("finish", () => {
    ended = true;
  });
  rig.receive(Buffer.of(0, 0, 0, 0, 0, 0, 0, 0, 0), get(1, "/late"));
  await until(() => ended, "the end of the socket");
  expect(rig.plaintext().toString("latin1")).toContain("DATA without a stream");
  expect([rig.closed, rig.streams.length]).toEqual([1, 0]);
});

/** Asks for `path` over a socket that the listener upgrades, and reads nothing of the answer before `read` is called. */
async function ask(port: number, isTls: boolean, path: string): Promise<{ read(length: number): Promise<Buffer> }> {
  const socket = isTls
    ? tlsConnect({ port, host: "127.0.0.1", rejectUnauthorized: false })
    : tcpConnect(port, "127.0.0.1");
  socket.on("error", () => {});
  await new Promise((resolve) => socket.once(isTls ? "secureConnect" : "connect", resolve));
  socket.write("GET /up HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n");
  let head = Buffer.alloc(0);
  const rest = await new Promise<Buffer>((resolve) => {
    const onData = (chunk: Buffer) => {
      head = Buffer.concat([head, chunk]);
      const end = head.indexOf("\r\n\r\n");
      if (end < 0) return;
      socket.removeListener("data", onData);
      socket.pause();
      resolve(head.subarray(end + 4));
    };
    socket.on("data", onData);
  });
  socket.write(new RecordSealer(a).seal(Buffer.concat([PREFACE, WIDE, get(1, path)])));
  return {
    read: async (length) => {
      const opener = new RecordOpener(b);
      const plaintext = opener.push(rest);
      let have = 0;
      socket.on("data", (chunk: Buffer) => {
        for (const bytes of opener.push(chunk)) {
          plaintext.push(bytes);
          have += bytes.length;
        }
      });
      socket.resume();
      const body = () => bodyIn(Buffer.concat(plaintext));
      await until(() => have >= length && body().length >= length, "the whole answer");
      socket.destroy();
      return body();
    },
  };
}

for (const isTls of [false, true])
  test(`clients that are slow to read large answers get them whole, one beside the other (${isTls ? "TLS" : "TCP"})`, async () => {
    const cacheDir = mkdtempSync(join(tmpdir(), "weft-noise-"));
    const names = { directoryUrl: "http://127.0.0.1", email: "", hostname: "weft.test", cacheDir };
    const certificates = new AcmeCertificates({ ...names, challenge: "TLS-ALPN-01", log: SILENT, now: Date.now });
    const pieces = 600;
    const piece = (who: string, n: number) => Buffer.alloc(20_000, `${who} ${n} `);
    const waiting = new Set<string>();
    await using listener = {
      ...(await listen({
        host: "127.0.0.1",
        port: 0,
        ...(isTls && { tls: await certificates.current() }),
        app: new Hono(),
        upgrades: {
          "/up": (_request, socket, head) =>
            new NoiseHttp2({
              socket,
              keys: serverKeys,
              onRequest: (stream, headers) => {
                const who = headers.get(":path")!;
                let n = 0;
                const go = () => {
                  while (n < pieces) if (!stream.write(piece(who, n++))) break;
                  if (n < pieces) waiting.add(who);
                };
                stream.onDrain = go;
                stream.respond(200);
                go();
              },
              onPong: () => {},
              onClose: () => {},
            }).start({
              preamble: Buffer.from("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
              early: null,
              head,
            }),
        },
      })),
      async [Symbol.asyncDispose]() {
        await this.close();
        rmSync(cacheDir, { recursive: true });
      },
    };
    const clients = await Promise.all(["/a", "/b", "/c"].map((path) => ask(listener.port, isTls, path)));
    await until(() => waiting.size === clients.length, "all answers to wait for their readers");
    const expected = ["/a", "/b", "/c"].map((who) =>
      Buffer.concat(Array.from({ length: pieces }, (_, n) => piece(who, n))),
    );
    const got = await Promise.all(clients.map((client, i) => client.read(expected[i]!.length)));
    for (const [i, bytes] of got.entries())
      expect([bytes.length, bytes.equals(expected[i]!)]).toEqual([expected[i]!.length, true]);
  }, 60_000);
