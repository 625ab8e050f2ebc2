// Known answers, computed by every new instance before it is used: a module or an engine that computes wrong must not
// seal a single packet. They run every kernel, long and short: whole passes, tails and both results of each opening.
// selftest.test.ts derives the same answers from independent implementations.
import type { Asm, AsmExports } from "./wasm.ts";

/** Inputs: keys and nonces are the bytes 0, 1, 2 ..., messages and AAD the bytes 0, 7, 14 ... (modulo 256). */
export const MESSAGE_SIZE = 1420;
export const AAD_SIZE = 13;
export const HMAC_KEY_SIZE = 40;

/** The last 16 bytes (BLAKE2s, X25519: all 32; box: the first 16) of the outputs, in hex. */
export const ANSWERS = {
  "ChaCha20-Poly1305": "5156e39441784f3ad31b0daa70dee445",
  "XChaCha20-Poly1305": "dee74b284969cb569846284dd6560a8a",
  "XSalsa20-Poly1305": "313d437f7fcd4e148d61e03056fbb35e",
  BLAKE2s: "b335da7b850e8fb4717524875ea4f7e886246c762e5a0cb968c83fa956f6d147",
  "HMAC-BLAKE2s": "4cae43efc5273a9d730438f99c69bc288ef7e6336d803d8e378be05b2d79e154",
  X25519: "df6baf6f6a43b9744fc5ef9dea1122782f9f696dc4a0d15c03c1787ee6d15e64",
};

type Algorithm = keyof typeof ANSWERS;

// Places of the arguments from the start of the host's memory, which nobody uses yet.
const STATE = 0;
const KEY = 256;
const NONCE = 320;
const AAD = 384;
const OUT = 448;
const MESSAGE = 512;
const END = MESSAGE + MESSAGE_SIZE + 64;

/** Throws an Error that names the algorithm when `asm` computes a wrong answer. Leaves the memory zeroed. */
export function selfTest(asm: Asm): void {
  const base = asm.exports.heapBase() >>> 0;
  const room = asm.u8.subarray(base, base + END);
  if (room.length < END)
    throw new Error(`build/weft.wasm needs more memory than ${asm.u8.length} bytes: give more pages`);
  const results = compute(asm.exports, base, room);
  room.fill(0);
  for (const [algorithm, answer] of Object.entries(ANSWERS)) {
    const result = results[algorithm as Algorithm];
    if (result !== answer)
      throw new Error(
        `self-test of ${algorithm} failed (${result}): build/weft.wasm or this engine computes wrong answers; ` +
          "run `bun run build` again and use Bun 1.4.5",
      );
  }
}

function compute(x: AsmExports, base: number, room: Uint8Array): Record<Algorithm, string> {
  const state = base + STATE;
  const key = base + KEY;
  const nonce = base + NONCE;
  const aad = base + AAD;
  const out = base + OUT;
  const message = base + MESSAGE;
  const reset = () => {
    room.fill(0);
    for (let i = 0; i < 64; i++) room[KEY + i] = room[NONCE + i] = i;
    for (let i = 0; i < AAD_SIZE; i++) room[AAD + i] = i * 7;
    for (let i = 0; i < MESSAGE_SIZE; i++) room[MESSAGE + i] = i * 7;
  };
  const text = (at: number, length: number) => room.slice(at, at + length).toHex();
  const isMessage = (at: number) => {
    for (let i = 0; i < MESSAGE_SIZE; i++) if (room[at + i] !== ((i * 7) & 255)) return false;
    return true;
  };
  // The tag of a sealed message, if opening refuses it with a changed tag and accepts it as it was.
  const sealed = (tagAt: number, messageAt: number, open: () => number) => {
    const tag = text(tagAt, 16);
    const before = room.slice();
    room[tagAt]! ^= 1;
    if (open()) return "accepts a wrong tag";
    room.set(before);
    return open() && isMessage(messageAt) ? tag : "refuses a right tag";
  };
  const result = {} as Record<Algorithm, string>;

  reset();
  x.aeadInit(state, key);
  x.aeadSealNonce(message, MESSAGE_SIZE, state, nonce, aad, AAD_SIZE);
  result["ChaCha20-Poly1305"] = sealed(MESSAGE + MESSAGE_SIZE, MESSAGE, () =>
    x.aeadOpenNonce(message, MESSAGE_SIZE, state, nonce, aad, AAD_SIZE),
  );

  reset();
  x.xaeadSeal(message, MESSAGE_SIZE, key, nonce, aad, AAD_SIZE);
  result["XChaCha20-Poly1305"] = sealed(MESSAGE + MESSAGE_SIZE, MESSAGE, () =>
    x.xaeadOpen(message, MESSAGE_SIZE, key, nonce, aad, AAD_SIZE),
  );

  reset();
  room.copyWithin(MESSAGE + 16, MESSAGE, MESSAGE + MESSAGE_SIZE);
  x.boxSeal(message, MESSAGE_SIZE, key, nonce);
  result["XSalsa20-Poly1305"] = sealed(MESSAGE, MESSAGE + 16, () => x.boxOpen(message, MESSAGE_SIZE, key, nonce));

  reset();
  x.blake2s(out, 32, key, 32, message, MESSAGE_SIZE);
  result.BLAKE2s = text(OUT, 32);
  x.hmacBlake2s(out, key, HMAC_KEY_SIZE, message, MESSAGE_SIZE);
  result["HMAC-BLAKE2s"] = text(OUT, 32);

  x.x25519Base(out, key);
  if (!x.x25519(out, nonce, out)) result.X25519 = "finds a zero secret";
  else result.X25519 = text(OUT, 32);
  return result;
}
