// Keys as bytes and as text, and the small tools that handling them safely needs.
//
// Tailscale's text forms (KIND ":" and 64 lower-case hex digits):
//   mkey     machine key, public    nodekey  node key, public         discokey  disco key, public
//   privkey  any of them, private   chalpub  challenge key, public    nlpub     tailnet-lock key, public

/** What a key is: the prefix of its text form. */
export type KeyKind = "mkey" | "nodekey" | "discokey" | "privkey" | "chalpub" | "nlpub";

export const KEY_SIZE = 32;

/** "nodekey:<64 hex digits>". Throws a RangeError unless there are 32 bytes. */
export function formatKey(kind: KeyKind, bytes: Uint8Array): string {
  if (bytes.length !== KEY_SIZE) throw new RangeError(`${kind} has ${bytes.length} bytes, it must have ${KEY_SIZE}`);
  return `${kind}:${hex(bytes)}`;
}

/** The 32 bytes of a key in its text form; null if that is not what the text is. Upper-case hex is accepted. */
export function parseKey(kind: KeyKind, text: string): Uint8Array | null {
  if (text.length !== kind.length + 1 + 2 * KEY_SIZE || !text.startsWith(`${kind}:`)) return null;
  return unhex(text.slice(kind.length + 1));
}

/** True for a key of zeros only, which in Tailscale's protocols means "none". The time does not depend on the bytes. */
export function isZeroKey(bytes: Uint8Array): boolean {
  let any = 0;
  for (const byte of bytes) any |= byte;
  return any === 0;
}

/** Equality in a time that depends on the lengths only. Different lengths are unequal. */
export function constantTimeEqual(a: Uint8Array, b: Uint8Array): boolean {
  if (a.length !== b.length) return false;
  let differs = 0;
  for (let i = 0; i < a.length; i++) differs |= a[i]! ^ b[i]!;
  return differs === 0;
}

/** Overwrites secrets with zeros. */
export function wipe(...secrets: Uint8Array[]): void {
  for (const bytes of secrets) bytes.fill(0);
}

/** Lower-case hex. */
export function hex(bytes: Uint8Array): string {
  return bytes.toHex();
}

/** The bytes of a hex text of either case; null when a character is no hex digit or their number is odd. */
export function unhex(text: string): Uint8Array | null {
  if (text.length % 2 !== 0 || !/^[0-9a-fA-F]*$/.test(text)) return null;
  return Uint8Array.fromHex(text);
}

/** `n` bytes of the runtime's cryptographic random generator. The one place that asks it. */
export function randomBytes(n: number): Uint8Array {
  const bytes = new Uint8Array(n);
  // getRandomValues gives 64 KiB at most at a time.
  for (let at = 0; at < n; at += 65536) crypto.getRandomValues(bytes.subarray(at, Math.min(at + 65536, n)));
  return bytes;
}
