// Secrets that this server hands out: "<kind>-<12 hex>-<64 hex>". The middle part finds the record, the last is 256 random
// bits of which the store holds SHA-256 alone: it cannot be guessed, so it needs no slow hash. Those that Headscale has made
// are of other letters (base64url) and, when they were taken over from its database, known by a bcrypt hash.
import { createHash } from "node:crypto";
import { constantTimeEqual, hex, unhex } from "../crypto/keys.ts";

export type SecretKind = "hskey-auth" | "hskey-api" | "hskey-client" | "hskey-oauthtok";

/** What a record keeps of its secret. */
export interface SecretRecord {
  /** 12 characters, public. */
  prefix: string;
  /** SHA-256 of the secret part, hex; or, of Headscale's, "$2a$…". */
  hash: string;
}

/** Bytes that `mintSecret` wants. */
export const SECRET_BYTES = 38;

/** `random`: SECRET_BYTES bytes. The text is shown once and never stored. */
export function mintSecret(kind: SecretKind, random: Uint8Array): SecretRecord & { text: string } {
  const prefix = hex(random.subarray(0, 6));
  const secret = hex(random.subarray(6, SECRET_BYTES));
  return { text: `${kind}-${prefix}-${secret}`, prefix, hash: hex(hashOf(secret)) };
}

/** The two parts of a secret of this kind; null when the text has another form. */
export function splitSecret(kind: SecretKind, text: string): { prefix: string; secret: string } | null {
  const start = `${kind}-`;
  if (text.length !== start.length + 77 || !text.startsWith(start)) return null;
  const match = /^([\w-]{12})-([\w-]{64})$/.exec(text.slice(start.length));
  return match && { prefix: match[1]!, secret: match[2]! };
}

/** SHA-256 of secrets that were proved once, by their bcrypt hashes, which take 70 ms each. */
const proved = new Map<string, Uint8Array>();

/** Whether `secret` is the one that the record was made with; without a record, false after the same work. */
export function provesSecret(record: SecretRecord | undefined, secret: string): boolean {
  if (record?.hash.startsWith("$2") && !proved.has(record.hash)) {
    if (!Bun.password.verifySync(secret, record.hash)) return false;
    proved.set(record.hash, hashOf(secret));
  }
  const expected = record ? (proved.get(record.hash) ?? unhex(record.hash)) : null;
  const isEqual = constantTimeEqual(hashOf(secret), expected ?? new Uint8Array(32));
  return expected !== null && isEqual;
}

function hashOf(secret: string): Uint8Array {
  return createHash("sha256").update(secret).digest();
}
