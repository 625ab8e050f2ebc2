// asm/ecn.ts and its callers: the ECN field across the tunnel.
import { beforeEach, describe, expect, test } from "bun:test";
import { Asm } from "../crypto/wasm.ts";
import { parseIP } from "../wire/ip.ts";
import "./asm.ts";
import "../wireguard/asm.ts";
import { ASM_DROPS } from "./asm.ts";
import { checksumsOk, ipPacket, tcp } from "./packets.fixture.ts";

const asm = Asm.create(64);
const { exports, u8, u32 } = asm;
const PEER = 3;
const buffer = asm.alloc(1 << 17) + 64;
exports.trieInit(asm.alloc(exports.trieSize(16)), 16);
const sessions = asm.alloc(exports.sessionTableSize(4));
exports.sessionTableInit(sessions, 4);

const bytes = (text: string) => parseIP(text)!;
const addresses = { 4: ["10.0.0.1", "10.0.0.2"], 6: ["fd00::1", "fd00::2"] } as const;
for (const family of [4, 6] as const) {
  const prefix = bytes(addresses[family][0]);
  u8.set(prefix, buffer);
  exports.trieInsert(buffer, family === 4 ? 8 : 16, family, PEER);
}
const keys = asm.alloc(64);
u8.fill(7, keys, keys + 64);
exports.sessionInstall(1, keys, keys + 32, 1, 1, PEER);

function packet(family: 4 | 6, tos: number, payload: number): Uint8Array {
  const [src, dst] = addresses[family];
  const transport = tcp({ sport: 1, dport: 2, payload: new Uint8Array(payload).fill(5) });
  return ipPacket({ src: bytes(src), dst: bytes(dst), proto: 6, tos, transport });
}

function tosOf(p: Uint8Array): number {
  return p[0]! >> 4 === 4 ? p[1]! : ((p[0]! & 15) << 4) | (p[1]! >> 4);
}

function dropped(name: (typeof ASM_DROPS)[number]): number {
  return u32[(exports.dropCounters() >> 2) + ASM_DROPS.indexOf(name)]!;
}

/** What comes out of the tunnel when `inner` arrives in a datagram with this ECN field; null: nothing. */
function arrives(inner: Uint8Array, outerEcn: number): Uint8Array | null {
  u8.set(inner, buffer + 16);
  const padded = (inner.length + 15) & ~15;
  u8.fill(0, buffer + 16 + inner.length, buffer + 16 + padded);
  expect(exports.sessionSeal(1, buffer + 16, padded)).toBe(1);
  exports.rxEcn(outerEcn);
  expect(exports.rxOpen(buffer, padded + 32, padded + 32, 0)).toBe(padded + 32);
  exports.rxEcn(0);
  return exports.groFlush() === 1 ? u8.slice(buffer + 16, buffer + 16 + inner.length) : null;
}

beforeEach(() => {
  exports.groSetup(1, 1, 1, 0, 0);
});

for (const family of [4, 6] as const) {
  describe(`IPv${family}`, () => {
    test("the field after decapsulation is what RFC 6040 says; DSCP and checksums stay right", () => {
      // [inner][outer] -> field, or null: dropped
      const table = [
        [0, 0, 0, null],
        [1, 1, 1, 3],
        [2, 1, 2, 3],
        [3, 3, 3, 3],
      ];
      for (let inner = 0; inner < 4; inner++) {
        for (let outer = 0; outer < 4; outer++) {
          const before = dropped("rx-ecn");
          const result = arrives(packet(family, 0xb8 | inner, 100), outer);
          expect([inner, outer, result && tosOf(result)]).toEqual([
            inner,
            outer,
            table[inner]![outer] === null ? null : 0xb8 | table[inner]![outer]!,
          ]);
          if (result) expect(checksumsOk(result)).toBe(true);
          expect(dropped("rx-ecn") - before).toBe(result ? 0 : 1);
        }
      }
    });

    test("the field of what leaves is known", () => {
      for (let ecn = 0; ecn < 4; ecn++) {
        const inner = packet(family, 0x20 | ecn, 900);
        u8.set(inner, buffer);
        expect(exports.txPrepare(buffer, inner.length, 0)).toBe(PEER);
        expect(u32[(exports.splitPtr() >> 2) + 10]).toBe(ecn);
      }
    });
  });
}
