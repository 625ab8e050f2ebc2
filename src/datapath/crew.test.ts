// Helpers for the ciphers do what their owner would do alone: the same bytes, the same verdicts; nothing of a key is left.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { MessageChannel, type MessagePort, Worker } from "node:worker_threads";
import fc from "fast-check";
import { AEAD_STATE_SIZE, Asm } from "../crypto/wasm.ts";
import { ASM_DROPS } from "./asm.ts";
import { Crew, SHARED_BYTES } from "./crew.ts";
import type { HelperSetup, Reply } from "./messages.ts";
import { ipPacket, tcp } from "./packets.fixture.ts";
import "../wireguard/asm.ts";

const SESSION = 1;
const PEER = 3;
const ROOM = 256 << 10;
const HEADER = 16;
const OVERHEAD = 32;

/** One session whose messages it opens itself, and room for a batch. */
function engine() {
  const asm = Asm.create((16 << 20) >> 16);
  const { exports, u8 } = asm;
  exports.sessionTableInit(asm.alloc(exports.sessionTableSize(4)), 4);
  exports.trieInit(asm.alloc(exports.trieSize(8)), 8);
  const keys = asm.alloc(64);
  u8.set([10, 0, 0, 0], keys);
  exports.trieInsert(keys, 8, 4, PEER);
  u8.fill(7, keys, keys + 64);
  exports.sessionInstall(SESSION, keys, keys + 32, SESSION, SESSION, PEER);
  u8.fill(0, keys, keys + 64);
  exports.groSetup(1, 1, 1, 0, 0);
  return { asm, exports, u8, p: asm.alloc(ROOM) };
}

class HelperThread {
  readonly worker: Worker;
  readonly port: MessagePort;
  readonly replies: Reply[] = [];

  constructor({ setup }: Crew, i: number) {
    const { memory, words, parts, table } = setup;
    const { port1, port2 } = new MessageChannel();
    const workerData: HelperSetup = { role: "helper", memory, words, table, part: parts[i]!, port: port2 };
    this.port = port1;
    this.port.on("message", (reply: Reply) => this.replies.push(reply));
    this.worker = new Worker(new URL("./worker.ts", import.meta.url), { workerData, transferList: [port2] });
  }

  async until(type: Reply["type"]): Promise<Reply> {
    const deadline = performance.now() + 60_000;
    for (;;) {
      const found = this.replies.find((reply) => reply.type === type);
      if (found) return found;
      if (performance.now() > deadline) throw new Error(`no ${type} within a minute`);
      await Bun.sleep(5);
    }
  }

  async end(): Promise<void> {
    this.port.close();
    await this.worker.terminate();
  }
}

describe("a crew of two", () => {
  const ours = engine();
  const alone = engine();
  const crew = new Crew(ours.asm, 2);
  const helpers = [0, 1].map((i) => new HelperThread(crew, i));
  beforeAll(async () => {
    for (const helper of helpers) await helper.until("ready");
  });
  afterAll(() => Promise.all(helpers.map((helper) => helper.end())));

  /** Until a helper has taken part in it: they may have been held up. */
  function helped(action: () => void): void {
    const before = crew.helped;
    for (const deadline = performance.now() + 60_000; crew.helped === before; action())
      if (performance.now() > deadline) throw new Error("no helper has helped within 10 s");
  }

  test("seals what its owner alone would seal, byte for byte: each counter once, nothing beside the messages", () => {
    const runs = fc.array(fc.record({ n: fc.integer({ min: 1, max: 60 }), blocks: fc.integer({ min: 0, max: 90 }) }), {
      minLength: 1,
      maxLength: 5,
    });
    const check = () =>
      fc.assert(
        fc.property(runs, fc.integer(), (batch, seed) => {
          for (const { u8, p } of [ours, alone]) for (let i = 0; i < ROOM; i++) u8[p + i] = (i * 31 + seed) >> 3;
          let at = HEADER;
          for (const { n, blocks } of batch) {
            const length = 16 * blocks;
            const stride = length + OVERHEAD;
            if (at + n * stride > ROOM) break;
            expect(crew.seal(SESSION, ours.p + at, n, stride, length)).toBe(n);
            expect(alone.exports.sessionSealRun(SESSION, alone.p + at, n, stride, length)).toBe(n);
            at += n * stride + 48;
          }
          crew.finish();
          expect(Buffer.compare(ours.u8.slice(ours.p, ours.p + ROOM), alone.u8.slice(alone.p, alone.p + ROOM))).toBe(0);
          for (const get of ["sessionSendCounterLo", "sessionSendCounterHi"] as const)
            expect(ours.exports[get](SESSION)).toBe(alone.exports[get](SESSION));
        }),
        { numRuns: 25 },
      );
    helped(check);
  });

  test("more pieces than its ring has room for", () => {
    const n = 2500;
    for (const { u8, p } of [ours, alone]) u8.fill(1, p, p + ROOM);
    for (let i = 0; i < n; i++) {
      expect(crew.seal(SESSION, ours.p + HEADER + i * 96, 1, 96, 64)).toBe(1);
      expect(alone.exports.sessionSeal(SESSION, alone.p + HEADER + i * 96, 64)).toBe(1);
    }
    crew.finish();
    expect(Buffer.compare(ours.u8.slice(ours.p, ours.p + ROOM), alone.u8.slice(alone.p, alone.p + ROOM))).toBe(0);
  });

  test("a session that is used up seals nothing, and leaves the plaintext alone", () => {
    ours.exports.sessionNeverSeal(SESSION);
    ours.u8.fill(9, ours.p, ours.p + ROOM);
    expect(crew.seal(SESSION, ours.p + HEADER, 40, 1456, 1424)).toBe(0);
    crew.finish();
    expect(ours.u8.subarray(ours.p, ours.p + ROOM).every((byte) => byte === 9)).toBe(true);
  });

  test("opens as its owner alone would: forged, replayed, foreign and other messages among them", () => {
    const size = 1424;
    const segment = size + OVERHEAD;
    const count = 40;
    const packet = ipPacket({
      src: Uint8Array.of(10, 0, 0, 1),
      dst: Uint8Array.of(10, 0, 0, 2),
      proto: 6,
      transport: tcp({ sport: 1, dport: 2, payload: new Uint8Array(size - 40).fill(5) }),
    });
    const length = (count - 1) * segment + OVERHEAD + 96;
    expect(length).toBeGreaterThan(SHARED_BYTES);
    const row = (sealed: number): Uint8Array => {
      const { u8, exports, p } = alone;
      u8.fill(0, p, p + ROOM);
      for (let i = 0; i < count; i++) {
        u8.set(packet, p + i * segment + HEADER);
        expect(exports.sessionSeal(SESSION, p + i * segment + HEADER, i === count - 1 ? 96 : size)).toBe(1);
      }
      const bytes = u8.slice(p, p + length);
      bytes[3 * segment + 700]! ^= 1; // forged
      bytes.copyWithin(9 * segment, 8 * segment, 9 * segment); // replayed
      bytes[12 * segment + 5]! ^= 1; // of no session
      if (sealed % 2) bytes[20 * segment] = 1; // a handshake: rxOpen stops there
      return bytes;
    };
    const open = (of: typeof ours, bytes: Uint8Array, verdicts: (p: number) => number) => {
      const { exports, u8, asm, p } = of;
      u8.set(bytes, p);
      exports.rxVerdicts(verdicts(p));
      const counters = exports.dropCounters() >> 2;
      const before = asm.u32.slice(counters, counters + ASM_DROPS.length);
      const accounts = exports.rxAccounts() >> 2;
      const seen: unknown[] = [];
      for (let from = 0; from < length; ) {
        from = exports.rxOpen(p, length, segment, from);
        const n = exports.rxAccountCount();
        seen.push(
          from,
          Array.from(asm.u32.slice(accounts, accounts + 6 * n)).map((word, i) => (i % 6 === 5 ? 0 : word)),
        );
        if (exports.groFull()) exports.groFlush();
        else if (from < length) from += segment;
      }
      exports.rxVerdicts(0);
      const writes = exports.groFlush();
      const after = asm.u32.slice(counters, counters + ASM_DROPS.length);
      return { seen, writes, dropped: after.map((n, i) => n - before[i]!), bytes: u8.slice(p, p + length) };
    };
    let sealed = 0;
    helped(() => {
      const bytes = row(sealed++);
      const expected = open(alone, bytes, () => 0);
      expect(expected.dropped[ASM_DROPS.indexOf("rx-bad-tag")]).toBe(1);
      expect(expected.dropped[ASM_DROPS.indexOf("rx-replay")]).toBe(1);
      expect(expected.dropped[ASM_DROPS.indexOf("rx-no-session")]).toBe(1);
      const result = open(ours, bytes, (p) => {
        const verdicts = crew.open(p, length, segment);
        expect(verdicts).toBeGreaterThan(0);
        return verdicts;
      });
      expect({ ...result, bytes: null }).toEqual({ ...expected, bytes: null });
      // The replayed one was opened too, and is dropped all the same.
      for (const of of [expected, result]) of.bytes.fill(0, 9 * segment, 10 * segment);
      expect(Buffer.compare(result.bytes, expected.bytes)).toBe(0);
    });
    expect(crew.open(ours.p, SHARED_BYTES - 1, segment)).toBe(0);
    expect(crew.open(ours.p, 60_000, 33)).toBe(0);
  });

  test("nobody keeps a copy of a key", () => {
    // What is the same in each state of this key: it begins behind the constants.
    const { asm, exports, u8 } = ours;
    const from = exports.sessionTableBase();
    const to = from + exports.sessionTableSize(4);
    const key = Buffer.alloc(128, 7);
    const memory = Buffer.from(u8.slice());
    const found: number[] = [];
    for (let at = memory.indexOf(key); at >= 0; at = memory.indexOf(key, at + AEAD_STATE_SIZE)) found.push(at);
    expect(found.length).toBeGreaterThan(0);
    expect(found.filter((at) => at < from || at >= to)).toEqual([]);
    exports.sessionWipeAll();
    expect(Buffer.from(asm.u8.slice()).indexOf(key)).toBe(-1);
  });
});

test("an owner whose helpers never come does all of it alone", () => {
  const { asm, exports, p } = engine();
  const crew = new Crew(asm, 2);
  expect(crew.seal(SESSION, p + HEADER, 40, 1456, 1424)).toBe(40);
  crew.finish();
  for (let i = 0; i < 40; i++) expect(exports.sessionOpen(p + i * 1456, 1456) & 0xff).toBe(SESSION);
  expect(crew.helped).toBe(0);
});

test("a helper that breaks says so in one sentence", async () => {
  const { asm } = engine();
  const crew = new Crew(asm, 1);
  const helper = new HelperThread(crew, 0);
  try {
    await helper.until("ready");
    // A piece beyond the memory.
    const words = new Int32Array(crew.setup.words);
    words.set([1, 1, asm.memory.buffer.byteLength, 1, 1456, 1424], 16);
    Atomics.store(words, 0, 1);
    Atomics.notify(words, 0);
    expect(await helper.until("fatal")).toEqual({
      type: "fatal",
      reason: expect.stringMatching(/^the datapath failed: [^\n]+$/),
    });
  } finally {
    await helper.end();
  }
}, 120_000);
