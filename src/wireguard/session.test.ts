import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Asm } from "../crypto/wasm.ts";
import { OPEN_BAD_TAG, OPEN_FIRST, OPEN_NO_SESSION, OPEN_NOT_TRANSPORT, OPEN_REPLAY, OPEN_TOO_SHORT } from "./asm.ts";
import { SessionTable } from "./sessions.ts";
import { key, seededBytes, seededRandom } from "./test-link.ts";

const REJECT_AFTER_MESSAGES = 2n ** 64n - 2n ** 13n - 1n;
const SEND_COUNTER = 16;

/** Two ends of one session in one table: `out` seals what `in` opens. */
function ends() {
  const asm = Asm.create();
  const table = new SessionTable(asm, seededBytes(1), 16);
  const [outEnd, inEnd] = [table.reserve(3), table.reserve(5)];
  table.install(outEnd, { send: key(1), receive: key(2) }, inEnd.localIndex, true, 0);
  table.install(inEnd, { send: key(2), receive: key(1) }, outEnd.localIndex, false, 0);
  const p = asm.alloc(70_000);
  const seal = (counter?: bigint, length = 0): Uint8Array => {
    if (counter !== undefined) setCounter(asm, outEnd.slot, counter);
    for (let i = 0; i < length; i++) asm.u8[p + 64 + i] = i & 0xff;
    if (asm.exports.sessionSeal(outEnd.slot, p + 64, length) !== 1) throw new Error("seal refused");
    return asm.u8.slice(p + 48, p + 48 + length + 32);
  };
  const open = (message: Uint8Array): number => {
    asm.u8.set(message, p + 64);
    return asm.exports.sessionOpen(p + 64, message.length);
  };
  return { asm, table, outEnd, inEnd, p, seal, open };
}

function setCounter(asm: Asm, slot: number, counter: bigint): void {
  asm.view.setBigUint64(asm.exports.sessionAddress(slot) + SEND_COUNTER, counter, true);
}

describe("sealing and opening", () => {
  test("a packet arrives in place, with the flag of a first message only once", () => {
    const { asm, inEnd, p, seal, open } = ends();
    const message = seal(undefined, 100);
    expect(message.subarray(0, 4)).toEqual(Uint8Array.of(4, 0, 0, 0));
    expect(new DataView(message.buffer).getUint32(4, true)).toBe(inEnd.localIndex);
    expect(open(message)).toBe(inEnd.slot | OPEN_FIRST);
    expect(asm.u8.slice(p + 80, p + 180)).toEqual(Uint8Array.from({ length: 100 }, (_, i) => i));
    expect(open(seal())).toBe(inEnd.slot);
    expect(asm.exports.sessionPeer(inEnd.slot)).toBe(5);
  });

  test("a run of packets has one counter each", () => {
    const { asm, outEnd, inEnd, p, open } = ends();
    for (let i = 0; i < 5; i++) asm.u8.fill(i + 1, p + 1000 + i * 200, p + 1000 + i * 200 + 64);
    expect(asm.exports.sessionSealRun(outEnd.slot, p + 1000, 5, 200, 64)).toBe(5);
    expect(asm.exports.sessionSendCounterLo(outEnd.slot)).toBe(5);
    const messages = Array.from({ length: 5 }, (_, i) => asm.u8.slice(p + 984 + i * 200, p + 984 + i * 200 + 96));
    for (const [i, message] of messages.entries()) {
      expect(message[8]).toBe(i);
      expect(open(message)).toBe(inEnd.slot | (i === 0 ? OPEN_FIRST : 0));
      expect(asm.u8.slice(p + 80, p + 144)).toEqual(new Uint8Array(64).fill(i + 1));
    }
  });

  test("sealing writes 16 bytes before and behind the packet, and nothing else", () => {
    const { asm, outEnd, p } = ends();
    for (const length of [0, 1, 16, 191, 192, 1420]) {
      asm.u8.fill(0xaa, p, p + 2048);
      asm.exports.sessionSeal(outEnd.slot, p + 100, length);
      expect(asm.u8.slice(p, p + 84).every((byte) => byte === 0xaa)).toBe(true);
      expect(asm.u8.slice(p + 116 + length, p + 2048).every((byte) => byte === 0xaa)).toBe(true);
    }
  });

  test("counts packets and bytes of whole messages", () => {
    const { asm, outEnd, inEnd, seal, open } = ends();
    open(seal(undefined, 48));
    open(seal(undefined, 16));
    const [sender, receiver] = [asm.exports.sessionAddress(outEnd.slot), asm.exports.sessionAddress(inEnd.slot)];
    expect([asm.view.getBigUint64(sender + 48, true), asm.view.getBigUint64(sender + 56, true)]).toEqual([2n, 128n]);
    expect([asm.view.getBigUint64(receiver + 32, true), asm.view.getBigUint64(receiver + 40, true)]).toEqual([
      2n,
      128n,
    ]);
  });

  test("the counter's last value is REJECT_AFTER_MESSAGES - 1, for sender and receiver", () => {
    const { asm, outEnd, inEnd, p, seal, open } = ends();
    const last = seal(REJECT_AFTER_MESSAGES - 1n);
    expect(asm.exports.sessionCanSend(outEnd.slot)).toBe(0);
    asm.u8.fill(0x55, p, p + 200);
    expect(asm.exports.sessionSeal(outEnd.slot, p + 64, 16)).toBe(0);
    expect(asm.u8.slice(p, p + 200).every((byte) => byte === 0x55)).toBe(true);
    setCounter(asm, outEnd.slot, REJECT_AFTER_MESSAGES - 2n);
    expect(asm.exports.sessionSealRun(outEnd.slot, p + 64, 4, 100, 16)).toBe(2);
    expect(open(last)).toBe(inEnd.slot | OPEN_FIRST);
    const beyond = last.slice();
    new DataView(beyond.buffer).setBigUint64(8, REJECT_AFTER_MESSAGES, true);
    expect(open(beyond)).toBe(OPEN_REPLAY);
  });
});

describe("dropped without a trace", () => {
  test("truncated, of another type, with set reserved bytes", () => {
    const { seal, open, inEnd } = ends();
    const message = seal(undefined, 64);
    for (let length = 0; length < 32; length++) expect(open(message.subarray(0, length))).toBe(OPEN_TOO_SHORT);
    for (let length = 32; length < 96; length++) expect(open(message.subarray(0, length))).toBe(OPEN_BAD_TAG);
    for (const at of [0, 1, 2, 3]) {
      const odd = message.slice();
      odd[at]! ^= 1;
      expect(open(odd)).toBe(OPEN_NOT_TRANSPORT);
    }
    expect(open(message)).toBe(inEnd.slot | OPEN_FIRST);
  });

  test("every flipped bit; the message itself still opens", () => {
    const { seal, open, inEnd } = ends();
    const message = seal(undefined, 32);
    for (let bit = 32; bit < message.length * 8; bit++) {
      const odd = message.slice();
      odd[bit >> 3]! ^= 1 << (bit & 7);
      expect([OPEN_BAD_TAG, OPEN_NO_SESSION]).toContain(open(odd));
    }
    expect(open(message)).toBe(inEnd.slot | OPEN_FIRST);
  });

  test("grown by any length up to that of a datagram", () => {
    const { seal, open } = ends();
    const message = seal(undefined, 16);
    for (const extra of [1, 16, 1000, 65_000]) {
      const longer = new Uint8Array(message.length + extra);
      longer.set(message);
      expect(open(longer)).toBe(OPEN_BAD_TAG);
    }
  });

  test("the right slot with wrong high bits, and a session that was wiped", () => {
    const { table, inEnd, seal, open } = ends();
    const message = seal();
    const guess = message.slice();
    new DataView(guess.buffer).setUint32(4, inEnd.localIndex ^ 0x8000_0000, true);
    expect(open(guess)).toBe(OPEN_NO_SESSION);
    table.release(inEnd);
    expect(open(message)).toBe(OPEN_NO_SESSION);
  });

  test("a forged counter far ahead does not move the window", () => {
    const { inEnd, seal, open } = ends();
    const message = seal();
    const forged = message.slice();
    new DataView(forged.buffer).setBigUint64(8, 1_000_000n, true);
    expect(open(forged)).toBe(OPEN_BAD_TAG);
    expect(open(message)).toBe(inEnd.slot | OPEN_FIRST);
  });

  test("random bytes: no crash, no session moves", () => {
    const { asm, inEnd, open } = ends();
    const before = asm.u8.slice(asm.exports.sessionAddress(inEnd.slot), asm.exports.sessionAddress(inEnd.slot) + 1088);
    const random = seededBytes(7);
    const dice = seededRandom(8);
    for (let i = 0; i < 3000; i++) {
      const message = random(Math.floor(dice() * 200));
      if (message.length >= 16 && i % 2) {
        message.set([4, 0, 0, 0]);
        if (i % 4 === 3) new DataView(message.buffer).setUint32(4, inEnd.localIndex, true);
      }
      expect(open(message)).toBeLessThan(0);
    }
    const after = asm.u8.slice(asm.exports.sessionAddress(inEnd.slot), asm.exports.sessionAddress(inEnd.slot) + 1088);
    expect(after).toEqual(before);
  });
});

describe("replay window", () => {
  /** Slow and obvious: remembers everything. */
  class Reference {
    #last = -1n;
    readonly #seen = new Set<bigint>();
    accept(counter: bigint): boolean {
      if (counter >= REJECT_AFTER_MESSAGES || this.#seen.has(counter)) return false;
      if (this.#last - counter > 8128n) return false;
      this.#seen.add(counter);
      if (counter > this.#last) this.#last = counter;
      return true;
    }
  }

  function check(counters: bigint[]): void {
    const reference = new Reference();
    const { seal, open } = shared;
    shared.reset();
    for (const counter of counters) {
      const accepted = open(seal(counter)) >= 0;
      expect([counter, accepted]).toEqual([counter, reference.accept(counter)]);
    }
  }

  const shared = (() => {
    const all = ends();
    const reset = () => {
      all.table.install(all.inEnd, { send: key(2), receive: key(1) }, all.outEnd.localIndex, false, 0);
    };
    return { ...all, reset };
  })();

  test("named cases: edges of the window, of blocks and of the ring", () => {
    check([0n, 0n, 1n, 63n, 64n, 64n, 63n, 2n, 8127n, 8128n, 0n, 1n, 8129n, 0n, 3n]);
    check([8128n, 0n, 0n]);
    check([8129n, 0n, 1n]);
    check([8191n, 63n, 62n, 8192n, 64n, 63n, 16384n, 8256n, 8255n]);
    check([1n << 40n, 1n, (1n << 40n) - 8128n, (1n << 40n) - 8129n]);
    check([REJECT_AFTER_MESSAGES - 1n, 0n, REJECT_AFTER_MESSAGES - 2n, REJECT_AFTER_MESSAGES - 1n]);
  });

  test("random walks agree with a reference that remembers everything", () => {
    const step = fc.oneof(
      { weight: 6, arbitrary: fc.bigInt({ min: -20n, max: 20n }) },
      { weight: 3, arbitrary: fc.bigInt({ min: -8200n, max: 8200n }) },
      { weight: 1, arbitrary: fc.bigInt({ min: 0n, max: 100_000n }) },
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 80 }), fc.bigInt({ min: 0n, max: 2n ** 33n }), (steps, start) => {
        let at = start;
        check(
          steps.map((by) => {
            at = at + by < 0n ? 0n : at + by;
            return at;
          }),
        );
      }),
      { numRuns: 150 },
    );
  });
});

describe("index table", () => {
  test("indices are unique, found in one step, and unpredictable above the slot", () => {
    const table = new SessionTable(Asm.create(), seededBytes(2), 16);
    const sessions = Array.from({ length: 16 }, (_, i) => table.reserve(i));
    expect(new Set(sessions.map((session) => session.localIndex)).size).toBe(16);
    expect(new Set(sessions.map((session) => session.localIndex >>> 4)).size).toBe(16);
    for (const session of sessions) expect(table.find(session.localIndex)).toBe(session);
    expect(table.find(sessions[0]!.localIndex ^ 16)).toBeNull();
    expect(() => table.reserve(16)).toThrow("all 16 session slots are taken");
    table.release(sessions[9]!);
    expect(table.find(sessions[9]!.localIndex)).toBeNull();
    const again = table.reserve(1);
    expect(again.slot).toBe(sessions[9]!.slot);
    expect(again.localIndex).not.toBe(sessions[9]!.localIndex);
    table.release(sessions[9]!);
    expect(table.find(again.localIndex)).toBe(again);
  });

  test("a released session leaves only zeros", () => {
    const { asm, table, outEnd } = ends();
    const [from, to] = [asm.exports.sessionAddress(outEnd.slot), asm.exports.sessionAddress(outEnd.slot + 1)];
    expect(asm.u8.slice(from, to).toHex()).toContain(key(1).toHex());
    table.release(outEnd);
    expect(asm.u8.slice(from, to).every((byte) => byte === 0)).toBe(true);
  });
});
