import { describe, expect, test } from "bun:test";
import { connect, constants } from "node:http2";
import { Duplex } from "node:stream";
import fc from "fast-check";
import { H2_ERROR, Http2Connection, type Http2Peer, type Http2Stream, LIMITS } from "./h2.ts";
import { encodeHeaderBlock, type HeaderField } from "./hpack.ts";

const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const NONE = new Uint8Array(0);
const [DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION] = [
  ...Array(10).keys(),
] as [number, number, number, number, number, number, number, number, number, number];
const [END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY] = [1, 1, 4, 8, 0x20];

interface Frame {
  type: number;
  flags: number;
  id: number;
  payload: Buffer;
}

function frame(type: number, flags: number, id: number, payload: Uint8Array = NONE): Buffer {
  const bytes = Buffer.alloc(9 + payload.length);
  bytes.writeUIntBE(payload.length, 0, 3);
  bytes[3] = type;
  bytes[4] = flags;
  bytes.writeUInt32BE(id, 5);
  bytes.set(payload, 9);
  return bytes;
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function setting(id: number, value: number): Buffer {
  return Buffer.concat([Buffer.of(0, id), u32(value)]);
}

const GET: HeaderField[] = [
  [":method", "GET"],
  [":scheme", "https"],
  [":path", "/a"],
];
const POST: HeaderField[] = [[":method", "POST"], ...GET.slice(1)];

function request(id: number, fields: HeaderField[] = GET, flags = END_HEADERS | END_STREAM): Buffer {
  return frame(HEADERS, flags, id, encodeHeaderBlock(fields));
}

/** A server that does what the test says; what it sent is cut into frames. */
class Server implements Http2Peer {
  readonly connection = new Http2Connection(this);
  readonly requests: {
    stream: Http2Stream;
    headers: ReadonlyMap<string, string>;
    body: Buffer[];
    isComplete: boolean;
  }[] = [];
  ended = 0;
  pongs = 0;
  flushes = 0;
  onRequest: (stream: Http2Stream) => void = () => {};
  private sent: Buffer[] = [];

  constructor(isOpen = true) {
    this.connection.start();
    if (isOpen) this.connection.receive(Buffer.concat([PREFACE, frame(SETTINGS, 0, 0)]));
    if (isOpen) this.take();
  }

  send(bytes: Uint8Array): void {
    this.sent.push(Buffer.from(bytes));
  }
  flush(): void {
    this.flushes++;
  }
  end(): void {
    this.ended++;
  }
  pong(): void {
    this.pongs++;
  }
  request(stream: Http2Stream, headers: ReadonlyMap<string, string>): void {
    const seen = { stream, headers, body: [] as Buffer[], isComplete: false };
    this.requests.push(seen);
    stream.onData = (bytes) => seen.body.push(Buffer.from(bytes));
    stream.onEnd = () => {
      seen.isComplete = true;
    };
    this.onRequest(stream);
  }

  receive(...frames: Uint8Array[]): this {
    this.connection.receive(Buffer.concat(frames));
    return this;
  }

  take(): Frame[] {
    const bytes = Buffer.concat(this.sent.splice(0));
    const frames: Frame[] = [];
    for (let at = 0; at < bytes.length; ) {
      const length = bytes.readUIntBE(at, 3);
      const payload = bytes.subarray(at + 9, at + 9 + length);
      expect(payload.length).toBe(length);
      frames.push({ type: bytes[at + 3]!, flags: bytes[at + 4]!, id: bytes.readUInt32BE(at + 5), payload });
      at += 9 + length;
    }
    return frames;
  }

  /** The code of the GOAWAY that ended the connection; null: it goes on. */
  goaway(): number | null {
    const last = this.take().findLast(({ type }) => type === GOAWAY);
    expect(this.ended).toBe(last ? 1 : 0);
    return last ? last.payload.readUInt32BE(4) : null;
  }

  resets(): [id: number, code: number][] {
    return this.take()
      .filter(({ type }) => type === RST_STREAM)
      .map(({ id, payload }) => [id, payload.readUInt32BE(0)]);
  }

  get stream(): Http2Stream {
    return this.requests.at(-1)!.stream;
  }
}

describe("a connection", () => {
  test("begins with the settings of both sides, and acknowledges", () => {
    const server = new Server(false);
    expect(server.take().map(({ type, flags }) => [type, flags])).toEqual([[SETTINGS, 0]]);
    server.receive(PREFACE, frame(SETTINGS, 0, 0, setting(4, 1 << 22)));
    expect(server.take()).toEqual([{ type: SETTINGS, flags: ACK, id: 0, payload: Buffer.alloc(0) }]);
    server.receive(frame(SETTINGS, ACK, 0));
    expect(server.goaway()).toBeNull();
  });

  test("takes a request byte by byte, with padding, priority and continuations", () => {
    const server = new Server(false);
    const block = encodeHeaderBlock([...POST, ["content-length", "5"], ["x", "1"], ["x", "2"]]);
    const first = Buffer.concat([Buffer.of(3), u32(0), Buffer.of(7), block.subarray(0, 4), Buffer.alloc(3)]);
    const bytes = Buffer.concat([
      PREFACE,
      frame(SETTINGS, 0, 0),
      frame(HEADERS, PADDED | WITH_PRIORITY, 1, first),
      frame(CONTINUATION, 0, 1, block.subarray(4, 9)),
      frame(CONTINUATION, END_HEADERS, 1, block.subarray(9)),
      frame(DATA, PADDED, 1, Buffer.from("\x02abc\0\0")),
      frame(DATA, END_STREAM, 1, Buffer.from("de")),
    ]);
    for (const byte of bytes) server.connection.receive(Uint8Array.of(byte));
    const [{ headers, body, isComplete }] = server.requests as [(typeof server.requests)[0]];
    expect(Object.fromEntries(headers)).toMatchObject({ ":method": "POST", ":path": "/a", x: "1, 2" });
    expect([Buffer.concat(body).toString(), isComplete]).toEqual(["abcde", true]);
  });

  test("answers in one flush, and the stream is over when both sides are done", () => {
    const server = new Server();
    let closed = 0;
    server.onRequest = (stream) => stream.onClose(() => closed++);
    server.receive(request(1));
    const before = server.flushes;
    server.stream.respond(200, { "content-type": "text/plain" }, Buffer.from("hello"));
    expect(server.flushes).toBe(before + 1);
    const [head, body, ...rest] = server.take();
    expect([head!.type, head!.flags, body!.type, body!.flags]).toEqual([HEADERS, END_HEADERS, DATA, END_STREAM]);
    expect([body!.payload.toString(), rest.length, closed, server.connection.openStreams]).toEqual(["hello", 0, 1, 0]);
    // Nothing more can be said.
    server.stream.respond(500);
    server.stream.end();
    server.stream.reset(H2_ERROR.CANCEL);
    expect([server.stream.write(Buffer.from("x")), server.take()]).toEqual([true, []]);
  });

  test("answers to HEAD, and those without content, end with their head", () => {
    const server = new Server();
    server.receive(request(1, [[":method", "HEAD"], ...GET.slice(1)]));
    server.stream.respond(200, {}, Buffer.from("hidden"));
    server.receive(request(3));
    server.stream.respond(204);
    expect(server.take().map(({ type, flags }) => [type, flags])).toEqual([
      [HEADERS, END_HEADERS | END_STREAM],
      [HEADERS, END_HEADERS | END_STREAM],
    ]);
  });

  test("PINGs are answered, and answers to ours are told", () => {
    const server = new Server();
    server.receive(frame(PING, 0, 0, Buffer.from("12345678")), frame(PING, ACK, 0, Buffer.alloc(8)));
    expect(server.take()).toEqual([{ type: PING, flags: ACK, id: 0, payload: Buffer.from("12345678") }]);
    server.connection.ping();
    expect([server.pongs, server.take().map(({ type, flags }) => [type, flags])]).toEqual([1, [[PING, 0]]]);
  });

  test("what was sent has come to the client when it answers the PING behind it, not one before", () => {
    const server = new Server();
    server.receive(request(1));
    const reached: string[] = [];
    const answer = () => server.receive(frame(PING, ACK, 0, Buffer.alloc(8)));
    server.stream.respond(200);
    server.connection.ping();
    server.take();
    server.stream.write(Buffer.from("a"));
    server.stream.whenReached(() => reached.push("a"));
    server.stream.write(Buffer.from("b"));
    server.stream.whenReached(() => reached.push("b"));
    expect(server.take().map(({ type }) => type)).toEqual([DATA, PING, DATA, PING]);
    answer();
    expect(reached).toEqual([]);
    answer();
    expect(reached).toEqual(["a"]);
    answer();
    answer();
    expect([reached, server.pongs]).toEqual([["a", "b"], 4]);
  });

  test("trailers end a request; frames of types unknown, GOAWAY and what comes late for a stream are passed over", () => {
    const server = new Server();
    server.receive(request(1, POST, END_HEADERS), frame(DATA, 0, 1, Buffer.from("a")), request(1, [["x", "y"]]));
    expect(server.requests[0]!.isComplete).toBe(true);
    server.stream.reset(H2_ERROR.CANCEL);
    expect(server.resets()).toEqual([[1, H2_ERROR.CANCEL]]);
    const late = [
      frame(DATA, 0, 1, Buffer.from("b")),
      frame(RST_STREAM, 0, 1, u32(8)),
      frame(WINDOW_UPDATE, 0, 1, u32(1)),
    ];
    server.receive(...late, request(1, [["x", "z"]]), frame(PRIORITY, 0, 5, Buffer.alloc(5)), frame(99, 255, 7));
    server.receive(frame(GOAWAY, 0, 0, Buffer.alloc(8)), request(3));
    expect([server.goaway(), server.requests.length]).toEqual([null, 2]);
  });

  test("what comes for a stream that ended in order is answered, and a second head for it ends the connection", () => {
    const server = new Server().receive(request(1));
    server.stream.respond(204);
    server.receive(frame(DATA, 0, 1, Buffer.from("a")), frame(DATA, 0, 1, Buffer.from("b")));
    expect(server.resets()).toEqual([[1, H2_ERROR.STREAM_CLOSED]]);
    server.receive(request(3));
    server.stream.respond(204);
    expect(server.receive(request(3)).goaway()).toBe(H2_ERROR.STREAM_CLOSED);
  });

  test("a client that takes its request back: the answer's writer hears of it", () => {
    const server = new Server();
    let closed = false;
    server.receive(request(1));
    server.stream.onClose(() => {
      closed = true;
    });
    server.receive(frame(RST_STREAM, 0, 1, u32(8)));
    expect([closed, server.stream.isClosed, server.connection.openStreams]).toEqual([true, true, 0]);
    server.stream.onClose(() => {
      closed = false;
    });
    expect(closed).toBe(false);
  });
});

describe("flow control", () => {
  test("an answer waits for the window of its stream, and of the connection, and tells when it has gone", () => {
    const server = new Server();
    server.receive(frame(SETTINGS, 0, 0, setting(4, 10)), request(1));
    let drained = 0;
    server.stream.onDrain = () => drained++;
    server.stream.respond(200);
    server.take();
    const data = () => Buffer.concat(server.take().flatMap(({ type, payload }) => (type === DATA ? [payload] : [])));
    expect(server.stream.write(Buffer.alloc(25, "a"))).toBe(false);
    expect(data().length).toBe(10);
    server.receive(frame(WINDOW_UPDATE, 0, 1, u32(10)));
    expect([data().length, drained]).toEqual([10, 0]);
    // The window of all streams grows by the difference, and may become negative.
    server.receive(frame(SETTINGS, 0, 0, setting(4, 0)), frame(WINDOW_UPDATE, 0, 1, u32(10)));
    expect(data().length).toBe(0);
    server.receive(frame(SETTINGS, 0, 0, setting(4, 1 << 20)));
    expect([data().length, drained]).toEqual([5, 1]);
    expect(server.stream.write(Buffer.alloc(100_000, "b"))).toBe(false);
    expect(data().length).toBe(65_535 - 25);
    server.stream.end(Buffer.from("c"));
    server.receive(frame(WINDOW_UPDATE, 0, 0, u32(1 << 20)));
    expect([data().length, server.stream.isClosed, server.connection.openStreams]).toEqual([100_001 - 65_510, true, 0]);
  });

  test("while the way out is full answers wait, and the end of a stream with them", () => {
    const server = new Server();
    server.receive(request(1));
    server.stream.respond(200);
    server.take();
    server.connection.pause();
    expect(server.stream.write(Buffer.from("a"))).toBe(false);
    server.stream.end();
    expect(server.take()).toEqual([]);
    server.connection.resume();
    expect(server.take().map(({ flags, payload }) => [flags, payload.toString()])).toEqual([[END_STREAM, "a"]]);
  });

  test("a client that keeps to its windows never has to stop: what was taken is allowed again", () => {
    const server = new Server();
    server.receive(request(1, POST, END_HEADERS));
    const chunk = Buffer.alloc(16_384);
    let [allowed, allowedOnStream] = [65_535, 1 << 20];
    for (let n = 0; n < 100; n++) {
      expect(Math.min(allowed, allowedOnStream)).toBeGreaterThanOrEqual(chunk.length);
      allowed -= chunk.length;
      allowedOnStream -= chunk.length;
      server.receive(frame(DATA, 0, 1, chunk));
      for (const { id, payload } of server.take()) {
        if (id === 0) allowed += payload.readUInt32BE(0);
        else allowedOnStream += payload.readUInt32BE(0);
      }
    }
    expect(server.goaway()).toBeNull();
  });

  for (const [name, frames, code] of [
    ["the connection's", [frame(WINDOW_UPDATE, 0, 0, u32(2 ** 31 - 1))], H2_ERROR.FLOW_CONTROL_ERROR],
    [
      "all streams' by SETTINGS",
      [
        request(1),
        frame(WINDOW_UPDATE, 0, 1, u32(2 ** 31 - 1 - 65_535)),
        frame(SETTINGS, 0, 0, setting(4, 2 ** 31 - 1)),
      ],
      H2_ERROR.FLOW_CONTROL_ERROR,
    ],
  ] as const)
    test(`a window that overflows, ${name}: the connection ends`, () => {
      expect(new Server().receive(...frames).goaway()).toBe(code);
    });

  test("a window that overflows, a stream's own: that stream ends", () => {
    const server = new Server().receive(request(1), frame(WINDOW_UPDATE, 0, 1, u32(2 ** 31 - 1)));
    expect(server.resets()).toEqual([[1, H2_ERROR.FLOW_CONTROL_ERROR]]);
    expect(server.ended).toBe(0);
  });

  test("answers that nobody fetches are bounded", () => {
    const server = new Server();
    server.receive(frame(SETTINGS, 0, 0, setting(4, 0)));
    const big = new Uint8Array(LIMITS.pending / 8);
    for (let id = 1; id < 2 * 8; id += 2) {
      server.receive(request(id));
      server.stream.respond(200, {}, big);
    }
    expect(server.goaway()).toBeNull();
    server.receive(request(99));
    server.stream.respond(200, {}, big);
    expect(server.goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
  });
});

describe("what breaks the protocol ends the connection with the right code", () => {
  const { PROTOCOL_ERROR, FRAME_SIZE_ERROR, COMPRESSION_ERROR, ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR } = H2_ERROR;
  const cases: Record<string, [frames: Uint8Array[], code: number]> = {
    "a frame of more than 16 KiB": [[Buffer.of(0, 0x40, 1, 0, 0, 0, 0, 0, 1)], FRAME_SIZE_ERROR],
    "DATA without a stream": [[frame(DATA, 0, 0)], PROTOCOL_ERROR],
    "DATA on a stream that was never opened": [[frame(DATA, 0, 1)], PROTOCOL_ERROR],
    "DATA that is all padding": [[request(1, POST, END_HEADERS), frame(DATA, PADDED, 1, Buffer.of(1))], PROTOCOL_ERROR],
    "DATA without its padding length": [[request(1, POST, END_HEADERS), frame(DATA, PADDED, 1)], FRAME_SIZE_ERROR],
    "HEADERS on stream 0": [[request(0)], PROTOCOL_ERROR],
    "HEADERS on a stream of the server": [[request(2)], PROTOCOL_ERROR],
    "HEADERS with half a priority": [[frame(HEADERS, WITH_PRIORITY | END_HEADERS, 1, u32(0))], FRAME_SIZE_ERROR],
    "a block interrupted by another frame": [
      [frame(HEADERS, 0, 1), frame(PING, 0, 0, Buffer.alloc(8))],
      PROTOCOL_ERROR,
    ],
    "a block continued on another stream": [[frame(HEADERS, 0, 1), frame(CONTINUATION, 4, 3)], PROTOCOL_ERROR],
    "CONTINUATION of nothing": [[frame(CONTINUATION, END_HEADERS, 1)], PROTOCOL_ERROR],
    "PRIORITY without a stream": [[frame(PRIORITY, 0, 0, Buffer.alloc(5))], PROTOCOL_ERROR],
    "PRIORITY of a wrong length": [[frame(PRIORITY, 0, 1, Buffer.alloc(4))], FRAME_SIZE_ERROR],
    "RST_STREAM without a stream": [[frame(RST_STREAM, 0, 0, u32(0))], PROTOCOL_ERROR],
    "RST_STREAM of a wrong length": [[request(1), frame(RST_STREAM, 0, 1)], FRAME_SIZE_ERROR],
    "RST_STREAM on a stream that was never opened": [[frame(RST_STREAM, 0, 1, u32(0))], PROTOCOL_ERROR],
    "SETTINGS on a stream": [[frame(SETTINGS, 0, 1)], PROTOCOL_ERROR],
    "SETTINGS of a wrong length": [[frame(SETTINGS, 0, 0, Buffer.alloc(5))], FRAME_SIZE_ERROR],
    "an acknowledgement with content": [[frame(SETTINGS, ACK, 0, setting(4, 1))], FRAME_SIZE_ERROR],
    "SETTINGS_ENABLE_PUSH of 2": [[frame(SETTINGS, 0, 0, setting(2, 2))], PROTOCOL_ERROR],
    "SETTINGS_INITIAL_WINDOW_SIZE of 2^31": [[frame(SETTINGS, 0, 0, setting(4, 2 ** 31))], FLOW_CONTROL_ERROR],
    "SETTINGS_MAX_FRAME_SIZE of 1": [[frame(SETTINGS, 0, 0, setting(5, 1))], PROTOCOL_ERROR],
    PUSH_PROMISE: [[frame(PUSH_PROMISE, 4, 1, u32(2))], PROTOCOL_ERROR],
    "PING on a stream": [[frame(PING, 0, 1, Buffer.alloc(8))], PROTOCOL_ERROR],
    "PING of a wrong length": [[frame(PING, 0, 0, Buffer.alloc(7))], FRAME_SIZE_ERROR],
    "GOAWAY on a stream": [[frame(GOAWAY, 0, 1, Buffer.alloc(8))], PROTOCOL_ERROR],
    "GOAWAY of a wrong length": [[frame(GOAWAY, 0, 0, Buffer.alloc(7))], FRAME_SIZE_ERROR],
    "WINDOW_UPDATE of 0": [[frame(WINDOW_UPDATE, 0, 0, u32(0))], PROTOCOL_ERROR],
    "WINDOW_UPDATE of a wrong length": [[frame(WINDOW_UPDATE, 0, 0)], FRAME_SIZE_ERROR],
    "WINDOW_UPDATE on a stream that was never opened": [[frame(WINDOW_UPDATE, 0, 1, u32(1))], PROTOCOL_ERROR],
    "a block that does not decode": [[frame(HEADERS, END_HEADERS, 1, Buffer.of(0xff))], COMPRESSION_ERROR],
    "fields that unpack to more than 64 KiB": [
      [
        request(1),
        frame(
          HEADERS,
          END_HEADERS,
          3,
          Buffer.concat([
            Buffer.of(0x40, 1, 0x61, 0x7f, 0x80 | (3000 & 127), 3000 >> 7),
            Buffer.alloc(3127, "x"),
            Buffer.alloc(100, 0xbe),
          ]),
        ),
      ],
      ENHANCE_YOUR_CALM,
    ],
  };
  for (const [name, [frames, code]] of Object.entries(cases))
    test(name, () => {
      const server = new Server().receive(...frames);
      expect(server.goaway()).toBe(code);
      expect(server.connection.openStreams).toBe(0);
      // Nothing is heard or said any more.
      server.receive(frame(PING, 0, 0, Buffer.alloc(8)));
      expect(server.take()).toEqual([]);
    });

  test("another protocol, and a first frame that is no SETTINGS", () => {
    expect(new Server(false).receive(Buffer.from("GET / HTTP/1.1\r\n")).goaway()).toBe(PROTOCOL_ERROR);
    expect(new Server(false).receive(Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r")).goaway()).toBe(PROTOCOL_ERROR);
    expect(new Server(false).receive(PREFACE, frame(PING, 0, 0, Buffer.alloc(8))).goaway()).toBe(PROTOCOL_ERROR);
    expect(new Server(false).receive(PREFACE, frame(SETTINGS, ACK, 0)).goaway()).toBe(PROTOCOL_ERROR);
  });
});

describe("a request that is malformed is refused, the others go on", () => {
  const cases: Record<string, HeaderField[]> = {
    "no method": GET.slice(1),
    "no path": GET.slice(0, 2),
    "an empty path": [...GET.slice(0, 2), [":path", ""]],
    "no scheme": [GET[0]!, GET[2]!],
    "a path twice": [...GET, [":path", "/b"]],
    "a pseudo-field behind others": [["x", "y"], ...GET],
    "a pseudo-field of answers": [...GET, [":status", "200"]],
    "upper case": [...GET, ["X", "y"]],
    "a name with a blank": [...GET, ["x y", "z"]],
    "an empty name": [...GET, ["", "z"]],
    "a line break in a value": [...GET, ["x", "y\r\nz: 1"]],
    "a blank before a value": [...GET, ["x", " y"]],
    connection: [...GET, ["connection", "close"]],
    "transfer-encoding": [...GET, ["transfer-encoding", "chunked"]],
    te: [...GET, ["te", "gzip"]],
    "two lengths": [...GET, ["content-length", "1"], ["content-length", "1"]],
    "a length that is none": [...GET, ["content-length", "-1"]],
    "a length without a body": [...GET, ["content-length", "1"]],
  };
  for (const [name, fields] of Object.entries(cases))
    test(name, () => {
      const server = new Server().receive(request(1, fields));
      expect(server.resets()).toEqual([[1, H2_ERROR.PROTOCOL_ERROR]]);
      server.receive(request(3));
      expect(server.requests.at(-1)!.isComplete).toBe(true);
    });

  test("a body shorter or longer than its length, a body behind its end, trailers that are none", () => {
    const length: HeaderField = ["content-length", "3"];
    const { PROTOCOL_ERROR, STREAM_CLOSED } = H2_ERROR;
    const server = new Server().receive(
      request(1, [...POST, length], END_HEADERS),
      frame(DATA, END_STREAM, 1, Buffer.from("ab")),
      request(3, [...POST, length], END_HEADERS),
      frame(DATA, END_STREAM, 3, Buffer.from("abcd")),
      request(5),
      frame(DATA, 0, 5, Buffer.from("a")),
      request(7),
      request(7, [["x", "y"]]),
      request(9, POST, END_HEADERS),
      request(9, [["x", "y"]], END_HEADERS),
      request(11, POST, END_HEADERS),
      request(11, [[":path", "/"]]),
    );
    expect(server.resets()).toEqual([
      [1, PROTOCOL_ERROR],
      [3, PROTOCOL_ERROR],
      [5, STREAM_CLOSED],
      [7, STREAM_CLOSED],
      [9, PROTOCOL_ERROR],
      [11, PROTOCOL_ERROR],
    ]);
  });
});

describe("floods", () => {
  const count = LIMITS.idleFrames + 1;
  const dull: Record<string, () => Buffer> = {
    PING: () => frame(PING, 0, 0, Buffer.alloc(8)),
    SETTINGS: () => frame(SETTINGS, 0, 0),
    "acknowledged SETTINGS": () => frame(SETTINGS, ACK, 0),
    PRIORITY: () => frame(PRIORITY, 0, 1, Buffer.alloc(5)),
    "empty DATA": () => frame(DATA, 0, 1),
    WINDOW_UPDATE: () => frame(WINDOW_UPDATE, 0, 0, u32(1)),
    "frames of unknown types": () => frame(200, 0, 0),
    "trailers of a request that was refused": () => request(3, [["x", "y"]]),
    "DATA on streams that are over": () => frame(DATA, 0, 3, Buffer.from("a")),
  };
  for (const [name, next] of Object.entries(dull))
    test(`${name}, even if the answers are read: ENHANCE_YOUR_CALM`, () => {
      const server = new Server().receive(request(1, POST, END_HEADERS), request(3));
      server.stream.reset(H2_ERROR.CANCEL);
      server.receive(...Array.from({ length: count - 2 }, next));
      expect(server.goaway()).toBeNull();
      server.receive(next(), next(), next());
      expect(server.goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
    });

  test("PINGs on a connection at work never add up", () => {
    const server = new Server().receive(request(1));
    server.stream.respond(200);
    for (let n = 0; n < 3; n++) {
      server.receive(...Array.from({ length: LIMITS.idleFrames - 10 }, dull.PING!));
      server.stream.write(Buffer.from("news"));
    }
    expect(server.goaway()).toBeNull();
  });

  test("PINGs whose answers are not read", () => {
    const server = new Server();
    server.connection.pause();
    server.receive(...Array.from({ length: LIMITS.unreadReplies }, dull.PING!));
    expect(server.ended).toBe(0);
    server.receive(dull.PING!());
    expect(server.goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
  });

  test("requests that are taken back at once; those that are answered count against it", () => {
    const taken = (id: number) => Buffer.concat([request(id), frame(RST_STREAM, 0, id, u32(8))]);
    const server = new Server();
    let id = 1;
    const next = () => {
      id += 2;
      return id;
    };
    for (let n = 0; n < LIMITS.resets; n++) server.receive(taken(next()));
    server.receive(request(next()));
    server.stream.respond(204);
    server.receive(taken(next()));
    expect(server.goaway()).toBeNull();
    expect(server.receive(taken(next())).goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
  });

  test("more streams than allowed are refused one by one", () => {
    const server = new Server();
    for (let n = 0; n <= LIMITS.streams; n++) server.receive(request(2 * n + 1));
    expect(server.resets()).toEqual([[2 * LIMITS.streams + 1, H2_ERROR.REFUSED_STREAM]]);
    expect(server.requests.length).toBe(LIMITS.streams);
  });

  test("a head that never ends, in large pieces and in empty ones", () => {
    const field = encodeHeaderBlock([["a", "b".repeat(8000)]]);
    const large = new Server().receive(
      frame(HEADERS, 0, 1),
      ...Array.from({ length: 9 }, () => frame(CONTINUATION, 0, 1, field)),
    );
    expect(large.goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
    const empty = new Server().receive(
      frame(HEADERS, 0, 1),
      ...Array.from({ length: 40 }, () => frame(CONTINUATION, 0, 1)),
    );
    expect(empty.goaway()).toBe(H2_ERROR.ENHANCE_YOUR_CALM);
  });
});

test("any sequence of frames, cut anywhere, leaves a connection that goes on or ends once, within its bounds", () => {
  const anyFrame = fc
    .tuple(
      fc.nat(10),
      fc.constantFrom(0, 1, 4, 5, 8, 9, 0x25, 0x2d, 255),
      fc.constantFrom(0, 1, 1, 3, 5, 7, 2, 2 ** 31 - 1),
      fc.oneof(
        fc.uint8Array({ maxLength: 40 }),
        fc.constantFrom(encodeHeaderBlock(POST), encodeHeaderBlock(GET), u32(1), u32(2 ** 31 - 1), setting(4, 3)),
      ),
    )
    .map(([type, flags, id, payload]) => frame(type, flags, id, payload));
  const answer = fc.constantFrom("none", "whole", "open", "reset");
  fc.assert(
    fc.property(fc.array(anyFrame, { maxLength: 30 }), fc.integer({ min: 1, max: 50 }), answer, (frames, cut, how) => {
      const server = new Server();
      let open = 0;
      server.onRequest = (stream) => {
        open++;
        stream.onClose(() => open--);
        if (how === "whole") stream.respond(200, { a: "b" }, Buffer.alloc(50));
        if (how === "open") stream.respond(200);
        if (how === "open") stream.write(Buffer.alloc(20));
        if (how === "reset") stream.reset(H2_ERROR.CANCEL);
      };
      const bytes = Buffer.concat(frames);
      for (let at = 0; at < bytes.length; at += cut) server.connection.receive(bytes.subarray(at, at + cut));
      expect(server.ended).toBeLessThanOrEqual(1);
      server.goaway();
      expect(server.connection.openStreams).toBe(open);
      server.connection.close();
      expect([open, server.connection.openStreams]).toEqual([0, 0]);
    }),
    { numRuns: 1500 },
  );
});

test("the runtime's own client posts, reads large answers slowly, holds streams open and takes requests back", async () => {
  const duplex: Duplex = new Duplex({
    read() {},
    write: (chunk: Buffer, _encoding, done) => {
      connection.receive(chunk);
      done();
    },
  });
  const closed: string[] = [];
  const connection = new Http2Connection({
    send: (bytes) => duplex.push(Buffer.from(bytes)),
    flush: () => {},
    pong: () => {},
    end: () => duplex.push(null),
    request: (stream, headers) => {
      const path = headers.get(":path")!;
      let bytes = 0;
      stream.onClose(() => closed.push(path));
      stream.onData = (chunk) => {
        bytes += chunk.length;
      };
      stream.onEnd = () => {
        if (path === "/open") {
          stream.respond(200, { "content-type": "application/octet-stream" });
          stream.write(Buffer.from("first"));
        } else stream.respond(200, { "x-answer": headers.get("x-question") ?? "" }, Buffer.alloc(bytes, 7));
      };
    },
  });
  connection.start();
  const session = connect("http://unused", { createConnection: () => duplex });
  const ask = (path: string, body: Buffer, headers = {}) => {
    const stream = session.request({ ":method": "POST", ":path": path, ...headers });
    stream.end(body);
    return stream;
  };
  const open = ask("/open", Buffer.alloc(0));
  const first = await new Promise<Buffer>((resolve) => open.once("data", resolve));
  expect(first.toString()).toBe("first");
  const answers = Array.from({ length: 5 }, async (_, i) => {
    const stream = ask(`/${i}`, Buffer.alloc(300_000 * i, i), { "x-question": `q${"ü".repeat(i).length}` });
    const head = new Promise<Record<string, unknown>>((resolve) => stream.once("response", resolve));
    let bytes = 0;
    for await (const chunk of stream) bytes += (chunk as Buffer).length;
    return [(await head)[":status"], (await head)["x-answer"], bytes];
  });
  expect(await Promise.all(answers)).toEqual(Array.from({ length: 5 }, (_, i) => [200, `q${i}`, 300_000 * i]));
  open.close(constants.NGHTTP2_CANCEL);
  await new Promise((resolve) => open.once("close", resolve));
  await new Promise<void>((resolve, reject) => session.ping((error) => (error ? reject(error) : resolve())));
  expect(closed).toContain("/open");
  expect(connection.openStreams).toBe(0);
  session.destroy();
});
