// Pre-auth keys: "hskey-auth-<12 hex>-<64 hex>" (secret.ts), and whether one lets a node in.
import type { Millis, Model, PreAuthKeyRecord } from "./model.ts";
import { mintSecret, provesSecret, type SecretRecord, splitSecret } from "./secret.ts";
import { suspensionProblem } from "./users.ts";

/** `random`: SECRET_BYTES bytes. The text is shown once and never stored. */
export function mintKey(random: Uint8Array): SecretRecord & { text: string } {
  return mintSecret("hskey-auth", random);
}

/** The record that this text proves possession of; null when there is none. */
export function findKey(model: Model, text: string): PreAuthKeyRecord | null {
  const parts = splitSecret("hskey-auth", text);
  const record = parts ? model.keyByPrefix(parts.prefix) : undefined;
  return parts && record && provesSecret(record, parts.secret) ? record : null;
}

/** Why a key does not let a node in now; null when it does. For `RegisterResponse.Error`. */
export function keyProblem(model: Model, key: PreAuthKeyRecord, now: Millis): string | null {
  if (key.revokedAt !== null) return "this pre-auth key has been revoked: ask for a new one (weft preauthkeys create)";
  if (key.expiration !== null && key.expiration <= now)
    return "this pre-auth key has expired: ask for a new one (weft preauthkeys create)";
  if (key.used && !key.reusable)
    return "this pre-auth key was for one use and has been used: ask for a new one (weft preauthkeys create)";
  return key.userId === null ? null : suspensionProblem(model.users.get(key.userId));
}

/** The key in lists: "hskey-auth-<prefix>-***". */
export function maskedKey(key: PreAuthKeyRecord): string {
  return `hskey-auth-${key.prefix}-***`;
}
