// Pre-auth keys: "hskey-auth-<12 hex>-<64 hex>". The first part finds the record, the second is 256 random bits of which
// the store holds SHA-256 alone: it cannot be guessed, so it needs no slow hash.
import { createHash } from "node:crypto";
import { constantTimeEqual, hex, unhex } from "../crypto/keys.ts";
import type { Millis, Model, PreAuthKeyRecord } from "./model.ts";

const FORM = /^hskey-auth-([0-9a-f]{12})-([0-9a-f]{64})$/;

function hashOf(secret: string): Uint8Array {
  return createHash("sha256").update(secret).digest();
}

/** `random`: 38 bytes. The text is shown once and never stored. */
export function mintKey(random: Uint8Array): { text: string; prefix: string; hash: string } {
  const prefix = hex(random.subarray(0, 6));
  const secret = hex(random.subarray(6, 38));
  return { text: `hskey-auth-${prefix}-${secret}`, prefix, hash: hex(hashOf(secret)) };
}

/** The record that this text proves possession of; null when there is none. */
export function findKey(model: Model, text: string): PreAuthKeyRecord | null {
  const match = FORM.exec(text);
  if (!match) return null;
  const record = model.keyByPrefix(match[1]!);
  const expected = record ? unhex(record.hash) : null;
  return record && expected && constantTimeEqual(hashOf(match[2]!), expected) ? record : null;
}

/** Why a key does not let a node in now; null when it does. For `RegisterResponse.Error`. */
export function keyProblem(key: PreAuthKeyRecord, now: Millis): string | null {
  if (key.expiration !== null && key.expiration <= now)
    return "this pre-auth key has expired: ask for a new one (weft preauthkeys create)";
  if (key.used && !key.reusable)
    return "this pre-auth key was for one use and has been used: ask for a new one (weft preauthkeys create)";
  return null;
}

/** The key in lists: "hskey-auth-<prefix>-***". */
export function maskedKey(key: PreAuthKeyRecord): string {
  return `hskey-auth-${key.prefix}-***`;
}
