// The part of this thread's default instance in which the doors put their arguments and find their results. The doors
// are synchronous, so one scratch serves all of them: each call lays out its arguments from the start.
import { type Asm, defaultAsm } from "./wasm.ts";

/** Longest message (bytes, tag included) that fits the doors. Longer ones have no use in any protocol of Weft. */
export const MAX_MESSAGE = 1 << 20;

/** Where fixed-size arguments go, byte offsets into the instance's memory. */
export interface Scratch {
  asm: Asm;
  u8: Uint8Array<SharedArrayBuffer>;
  /** 64 bytes each. */
  key: number;
  nonce: number;
  out: number;
  /** An AEAD or hash state. */
  state: number;
  /** MAX_MESSAGE bytes each, with 64 bytes to spare behind them. */
  aad: number;
  message: number;
}

let scratch: Scratch | undefined;

export function doorScratch(): Scratch {
  if (scratch) return scratch;
  const asm = defaultAsm();
  scratch = {
    asm,
    u8: asm.u8,
    key: asm.alloc(64),
    nonce: asm.alloc(64),
    out: asm.alloc(64),
    state: asm.alloc(256),
    aad: asm.alloc(MAX_MESSAGE + 64),
    message: asm.alloc(MAX_MESSAGE + 64),
  };
  return scratch;
}

/** Throws a RangeError unless `bytes` is exactly `length` long. */
export function checkLength(what: string, bytes: Uint8Array, length: number): void {
  if (bytes.length !== length) throw new RangeError(`${what} has ${bytes.length} bytes, it must have ${length}`);
}

/** Throws a RangeError when a message does not fit the scratch. */
export function checkMessage(what: string, length: number): void {
  if (length > MAX_MESSAGE) throw new RangeError(`${what} has ${length} bytes, at most ${MAX_MESSAGE} are possible`);
}
