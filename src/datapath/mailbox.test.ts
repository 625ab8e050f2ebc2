import { expect, test } from "bun:test";
import { Mailbox } from "./mailbox.ts";
import { Ring } from "./ring.ts";

test("what does not fit waits and arrives in order; what may get lost does not overtake it; what was read is wiped", () => {
  const ring = new Ring(1024, true);
  const box = new Mailbox(ring);
  const reader = new Ring(ring.buffer, true);
  const into = new Uint32Array(64);
  const got: number[] = [];
  const read = () => {
    for (let record = reader.read(into); record >= 0; record = reader.read(into)) got.push(into[0]!);
  };
  const record = new Uint8Array(64);
  for (let i = 0; i < 100; i++) {
    new Uint32Array(record.buffer)[0] = i;
    record.fill(0xee, 4);
    box.post(1, record);
  }
  expect(box.backlog).toBe(true);
  expect(box.tell(1, new Uint32Array([999]), 0, 4)).toBe(false);
  expect(box.lost).toBe(1);
  expect(box.posted).toBe(true);
  let turns = 0;
  for (; !box.empty; turns++) {
    read();
    box.posted = false;
    box.flush();
    read();
  }
  expect(turns).toBeGreaterThan(3);
  expect(box.tell(2, new Uint32Array([7, 100]), 4, 4)).toBe(true);
  read();
  expect(got).toEqual([...Array.from({ length: 100 }, (_, i) => i), 100]);
  expect(new Uint8Array(ring.buffer).subarray(64).some((byte) => byte === 0xee)).toBe(false);
});
