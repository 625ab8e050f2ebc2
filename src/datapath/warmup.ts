// Runs what every packet meets until the engine has compiled it, before the first packet comes (src/crypto/warmup.ts).
import { warmUp } from "../crypto/warmup.ts";
import type { Asm } from "../crypto/wasm.ts";
import "./asm.ts";

const HEADERS = 40;
const PAYLOAD = 1380;
const SEGMENTS = 8;
const SUPERPACKET = HEADERS + SEGMENTS * PAYLOAD;
const STRIDE = HEADERS + PAYLOAD + 28;
const LEAST_ROUNDS = 150;
const LEAST_MS = 15;
const MOST_MS = 60;

/** Ciphers, splitting, checksums and coalescing. Takes about 40 ms, and 32 KiB of the instance's memory. */
export function warmUpDatapath(asm: Asm): void {
  warmUp(asm);
  const { exports, u8, view } = asm;
  const vnet = asm.alloc(32 << 10);
  const p = vnet + 16;
  const out = p + ((SUPERPACKET + 63) & ~63);
  // A TCP superpacket from 0.0.0.0 to 0.0.0.0: virtio_net_hdr, IPv4, TCP with ACK.
  u8[p - 10] = 1;
  u8[p - 9] = 1;
  view.setUint16(p - 6, PAYLOAD, true);
  view.setUint16(p - 4, 20, true);
  view.setUint16(p - 2, 16, true);
  u8[p] = 0x45;
  view.setUint16(p + 2, SUPERPACKET);
  u8[p + 8] = 64;
  u8[p + 9] = 6;
  u8[p + 32] = 0x50;
  u8[p + 33] = 0x10;
  const start = performance.now();
  for (let round = 0, elapsed = 0; elapsed < MOST_MS && (elapsed < LEAST_MS || round < LEAST_ROUNDS); round++) {
    exports.txFlow(p, SUPERPACKET);
    exports.parsePacket(p, SUPERPACKET);
    exports.splitPrepare(p, p - 10);
    exports.splitWrite(out, 0, SEGMENTS, STRIDE, HEADERS + PAYLOAD, HEADERS + PAYLOAD);
    for (let i = 0; i < SEGMENTS; i++) exports.groAdd(out + i * STRIDE, HEADERS + PAYLOAD);
    exports.groFlush();
    elapsed = performance.now() - start;
  }
}
