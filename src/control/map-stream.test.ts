import { expect, test } from "bun:test";
import { Http2Connection, type Http2Stream } from "../wire/h2.ts";
import { encodeHeaderBlock } from "../wire/hpack.ts";
import { MapStream } from "./map-stream.ts";
import { Sweep } from "./map-sweep.ts";
import { Turns } from "./map-turns.ts";
import type { Model } from "./model.ts";
import type { View } from "./netmap.ts";

const HEADERS = 1;
const SETTINGS = 4;
const PING = 6;
const WINDOW_UPDATE = 8;

function frame(type: number, flags: number, id: number, payload: Uint8Array = new Uint8Array(0)): Buffer {
  const head = Buffer.alloc(9);
  head.writeUIntBE(payload.length, 0, 3);
  head[3] = type;
  head[4] = flags;
  head.writeUInt32BE(id, 5);
  return Buffer.concat([head, payload]);
}

/** A client whose socket takes everything, and which reads when it is told to. */
function client() {
  let opened: Http2Stream | null = null;
  let sent = 0;
  const connection = new Http2Connection({
    send: (bytes) => {
      sent += bytes.length;
    },
    flush: () => {},
    request: (stream) => {
      opened = stream;
    },
    pong: () => {},
    end: () => {},
  });
  connection.start();
  // Windows of 4 MB, as official clients have them.
  const settings = Buffer.of(0, 4, 0, 0x40, 0, 0);
  const fields = encodeHeaderBlock([
    [":method", "POST"],
    [":scheme", "https"],
    [":path", "/machine/map"],
  ]);
  const preface = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  const start = [
    frame(SETTINGS, 0, 0, settings),
    frame(WINDOW_UPDATE, 0, 0, Buffer.of(0, 0x40, 0, 0)),
    frame(HEADERS, 0x5, 1, fields),
  ];
  connection.receive(Buffer.concat([preface, ...start]));
  return {
    stream: opened!,
    sent: () => sent,
    reads: () => connection.receive(frame(PING, 0x1, 0, new Uint8Array(8))),
  };
}

const turn = () => new Promise((done) => setImmediate(done));

test("a full netmap has its turn until the client has read it, not only until the socket has taken it", async () => {
  const turns = new Turns(1, 60_000);
  const sweep = new Sweep();
  const open = () => {
    const { stream, sent, reads } = client();
    const view = {
      nodeId: 1,
      next: () => ({ Domain: "x".repeat(100_000) }),
      hasWork: () => false,
    } as unknown as View;
    const mapStream = new MapStream({
      stream,
      view,
      model: {} as Model,
      zstd: false,
      keepAlive: null,
      sweep,
      turns,
      now: () => 0,
      random: () => 0,
      onSent: () => {},
      onClose: () => {},
    });
    return { mapStream, sent, reads };
  };
  const first = open();
  const second = open();
  const third = open();
  expect(first.sent()).toBeGreaterThan(100_000);
  await turn();
  expect(second.sent()).toBeLessThan(200);
  first.reads();
  await turn();
  expect(second.sent()).toBeGreaterThan(100_000);
  expect(third.sent()).toBeLessThan(200);
  // Whoever goes away has had his turn.
  second.mapStream.end();
  await turn();
  expect(third.sent()).toBeGreaterThan(100_000);
  turns.close();
  sweep.close();
});
