import { describe, expect, test } from "bun:test";
import { Asm } from "../crypto/wasm.ts";
import { formatPrefix, type IP, maskPrefix, type Prefix, parseIP, parsePrefix, prefixContains } from "../wire/ip.ts";
import { AllowedIPs } from "./allowed-ips.ts";
import { seededRandom } from "./test-link.ts";

const ip = (text: string): IP => parseIP(text)!;
const prefix = (text: string): Prefix => parsePrefix(text)!;

function table(entries: Record<string, number>, capacity = 64): AllowedIPs {
  const allowed = new AllowedIPs(Asm.create(), capacity);
  for (const [text, slot] of Object.entries(entries)) allowed.insert(prefix(text), slot);
  return allowed;
}

describe("longest prefix", () => {
  test("IPv4 from /0 to /32", () => {
    const allowed = table({ "0.0.0.0/0": 1, "10.0.0.0/8": 2, "10.1.0.0/16": 3, "10.1.2.3/32": 4, "192.168.4.0/24": 5 });
    const answers = {
      "8.8.8.8": 1,
      "10.9.9.9": 2,
      "10.1.9.9": 3,
      "10.1.2.3": 4,
      "10.1.2.2": 3,
      "192.168.4.255": 5,
      "192.168.5.0": 1,
    };
    for (const [text, slot] of Object.entries(answers)) expect([text, allowed.lookup(ip(text))]).toEqual([text, slot]);
  });

  test("IPv6 on both sides of bit 64, and apart from IPv4", () => {
    const allowed = table({
      "fd7a::/16": 1,
      "fd7a:115c::/64": 2,
      "fd7a:115c::8000:0:0:0/65": 3,
      "fd7a:115c::1/128": 4,
    });
    const answers = { "fd7a:1::": 1, "fd7a:115c::2": 2, "fd7a:115c::8000:0:0:1": 3, "fd7a:115c::1": 4, "fd7b::": -1 };
    for (const [text, slot] of Object.entries(answers)) expect([text, allowed.lookup(ip(text))]).toEqual([text, slot]);
    expect(allowed.lookup(ip("253.122.0.1"))).toBe(-1);
    allowed.insert(prefix("::/0"), 9);
    expect(allowed.lookup(ip("fd7b::"))).toBe(9);
    expect(allowed.lookup(ip("1.2.3.4"))).toBe(-1);
  });

  test("an empty table knows nobody", () => {
    expect(table({}).lookup(ip("10.0.0.1"))).toBe(-1);
    expect(table({}).lookup(ip("::1"))).toBe(-1);
  });
});

describe("changes", () => {
  test("a prefix belongs to one peer: the last who was given it", () => {
    const allowed = table({ "10.0.0.0/24": 1 });
    allowed.insert(prefix("10.0.0.7/24"), 2);
    expect(allowed.lookup(ip("10.0.0.1"))).toBe(2);
    expect(allowed.list(1)).toEqual([]);
    expect(allowed.list(2)).toEqual(["10.0.0.0/24"]);
    allowed.remove(prefix("10.0.0.0/24"), 1);
    expect(allowed.lookup(ip("10.0.0.1"))).toBe(2);
    allowed.remove(prefix("10.0.0.0/24"), 2);
    expect(allowed.lookup(ip("10.0.0.1"))).toBe(-1);
  });

  test("removal of a peer uncovers what lay below its prefixes", () => {
    const allowed = table({ "10.0.0.0/8": 1, "10.1.0.0/16": 2, "fd00::/8": 2, "10.2.0.0/16": 2, "10.1.1.0/24": 3 });
    allowed.removeAll(2);
    expect([ip("10.1.2.3"), ip("10.2.0.0"), ip("10.1.1.1"), ip("fd00::1")].map((a) => allowed.lookup(a))).toEqual([
      1, 1, 3, -1,
    ]);
    expect(allowed.size).toBe(2);
  });

  test("a full table is an error and changes nothing; freed nodes are used again", () => {
    const allowed = table({}, 4);
    for (let round = 0; round < 50; round++) {
      for (let i = 0; i < 4; i++) allowed.insert(prefix(`10.${round}.${i * 64}.0/24`), i);
      expect(() => allowed.insert(prefix("11.0.0.0/8"), 5)).toThrow("the table is full, it holds 4 prefixes");
      expect(allowed.lookup(ip("11.0.0.1"))).toBe(-1);
      expect(allowed.lookup(ip(`10.${round}.192.9`))).toBe(3);
      for (let i = 0; i < 4; i++) allowed.removeAll(i);
    }
  });

  test("the trie itself refuses bad arguments and says when it is full", () => {
    const asm = Asm.create();
    const { exports } = asm;
    exports.trieInit(asm.alloc(exports.trieSize(2)), 2);
    const p = asm.alloc(16);
    asm.u8.set([10, 0, 0, 0], p);
    expect(exports.trieInsert(p, 33, 4, 0)).toBe(-1);
    expect(exports.trieInsert(p, 129, 6, 0)).toBe(-1);
    expect(exports.trieInsert(p, 8, 5, 0)).toBe(-1);
    expect(exports.trieInsert(p, 8, 4, -1)).toBe(-1);
    expect(exports.trieRemove(p, 33, 4)).toBe(-1);
    expect(exports.trieInsert(p, 8, 4, 7)).toBe(1);
    asm.u8.set([11, 0, 0, 0], p);
    expect(exports.trieInsert(p, 8, 4, 8)).toBe(0);
    expect(exports.trieFree()).toBe(1);
    expect(exports.trieLookup4(p)).toBe(-1);
    asm.u8.set([10, 1, 0, 0], p);
    expect(exports.trieInsert(p, 16, 4, 8)).toBe(1);
    expect(exports.trieLookup4(p)).toBe(8);
    expect(exports.trieRemoveSlot(7)).toBe(1);
    asm.u8.set([10, 2, 0, 0], p);
    expect(exports.trieLookup4(p)).toBe(-1);
    expect(exports.trieFree()).toBe(1);
  });
});

test("random changes and lookups agree with a slow list", () => {
  const dice = seededRandom(42);
  const upTo = (n: number) => Math.floor(dice() * n);
  const asm = Asm.create();
  const allowed = new AllowedIPs(asm, 600);
  const list = new Map<string, { prefix: Prefix; slot: number }>();
  // Few distinct bytes, so that prefixes nest and collide.
  const randomIP = () => Uint8Array.from({ length: dice() < 0.5 ? 4 : 16 }, () => [0, 1, 128, 255][upTo(4)]!);
  const slow = (address: IP): number => {
    let best = -1;
    let slot = -1;
    for (const entry of list.values()) {
      if (entry.prefix.bits > best && prefixContains(entry.prefix, address))
        [best, slot] = [entry.prefix.bits, entry.slot];
    }
    return slot;
  };
  for (let i = 0; i < 4000; i++) {
    const address = randomIP();
    const entry = maskPrefix({ ip: address, bits: upTo(address.length * 8 + 1) });
    const slot = upTo(12);
    const what = dice();
    if (what < 0.55 && list.size < 600) {
      allowed.insert(entry, slot);
      list.set(formatPrefix(entry), { prefix: entry, slot });
    } else if (what < 0.98 && list.size > 0) {
      const victim = [...list.values()][upTo(list.size)]!;
      allowed.remove(victim.prefix, victim.slot);
      list.delete(formatPrefix(victim.prefix));
    } else {
      if (what < 0.99) allowed.removeAll(slot);
      else for (const text of allowed.list(slot)) allowed.remove(prefix(text), slot);
      for (const [key, held] of list) if (held.slot === slot) list.delete(key);
    }
    const wanted = randomIP();
    expect(allowed.lookup(wanted)).toBe(slow(wanted));
    expect(allowed.lookup(address)).toBe(slow(address));
  }
  expect(allowed.size).toBe(list.size);
  for (let slot = 0; slot < 12; slot++) {
    const held = [...list].filter(([, entry]) => entry.slot === slot).map(([key]) => key);
    expect(allowed.list(slot).sort()).toEqual(held.sort());
    // Every node comes back in the end, whichever way the prefixes go.
    expect(asm.exports.trieRemoveSlot(slot)).toBe(held.length);
  }
  expect(asm.exports.trieFree()).toBe(1200);
});
