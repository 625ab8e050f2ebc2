// Bytes of a fixed generator (xorshift32), so that a run can be repeated.

/** `length`: a multiple of 4. */
export function seededBytes(length: number): Buffer {
  const words = new Uint32Array(length / 4);
  let state = 0x2545f491;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state;
  }
  return Buffer.from(words.buffer);
}
