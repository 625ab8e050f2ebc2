// Runs the ciphers until the engine has compiled them: JavaScriptCore interprets a function first, then compiles it
// twice, beside its use. A packet costs 200 us in the interpreter and 1.4 us after about 20 ms and 1,000 calls. Done
// before the first packet, no burst meets the slow time.
import { AEAD_STATE_SIZE, type Asm } from "./wasm.ts";

const SIZES = [1420, 64];
const BATCH = 8;
/** Calls after which the counters of the tiers are past, and the time that the compiler threads need besides. */
const LEAST_ROUNDS = 120;
const LEAST_MS = 25;

/** Takes `least` ms on a free core and never much more than `most`. Uses 2 KiB of the instance's memory. */
export function warmUp(asm: Asm, { least = LEAST_MS, most = 100, now = () => performance.now() } = {}): void {
  const x = asm.exports;
  const state = asm.alloc(AEAD_STATE_SIZE);
  const packet = asm.alloc(SIZES[0]! + 16);
  // The key is public: it seals zeros that nobody sees.
  x.aeadInit(state, packet);
  const start = now();
  for (let round = 0, elapsed = 0; elapsed < most && (elapsed < least || round < LEAST_ROUNDS); round++) {
    for (const size of SIZES)
      for (let i = 0; i < BATCH; i++) {
        x.aeadSeal(packet, size, state, i, 0);
        x.aeadOpen(packet, size, state, i, 0);
      }
    elapsed = now() - start;
  }
  asm.u8.fill(0, packet, packet + SIZES[0]! + 16);
}
