// API keys, "hskey-api-<12 hex>-<64 hex>" (secret.ts): whoever holds one may do everything over HTTP that an administrator
// may do at the socket, until it expires.
import type { ApiApiKey } from "./api/shapes.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Millis } from "./model.ts";
import { timeText } from "./netmap.ts";
import { mintSecret, provesSecret, SECRET_BYTES, type SecretRecord, splitSecret } from "./secret.ts";
import { nextId } from "./sequence.ts";

export interface ApiKeyRecord extends SecretRecord {
  id: number;
  createdAt: Millis;
  /** Null: never. */
  expiration: Millis | null;
  /** Null: never used. Up to a minute old. */
  lastSeen: Millis | null;
}

declare module "./model.ts" {
  interface Documents {
    /** By prefix. */
    apikey: ApiKeyRecord;
  }
}

const KIND = "hskey-api";
const DEFAULT_LIFETIME = 90 * 24 * 60 * 60_000;
/** Milliseconds between two writes of when a key was used. */
const SEEN_EVERY = 60_000;
const MAX_KEYS = 10_000;

/** By id, or by the public part of the key's text. */
export interface KeyReference {
  id?: number | undefined;
  prefix?: string | undefined;
}

export class ApiKeys {
  constructor(private readonly context: ControlContext) {}

  /** Oldest first. */
  list(): ApiKeyRecord[] {
    return [...this.context.model.documents("apikey").values()].sort((a, b) => a.id - b.id);
  }

  /** `expiration` null: never expires. The text is given this once. */
  async create(expiration?: Millis | null): Promise<{ record: ApiKeyRecord; text: string }> {
    const { model, journal, now, random } = this.context;
    const createdAt = now();
    if (expiration && expiration <= createdAt)
      throw new CommandError(400, `the key would have expired already, at ${timeText(expiration)}`);
    if (model.documents("apikey").size >= MAX_KEYS)
      throw new CommandError(409, `there are ${MAX_KEYS} API keys: delete some first`);
    const { text, prefix, hash } = mintSecret(KIND, random(SECRET_BYTES));
    const { id, taken } = nextId(model, "apikey");
    const record: ApiKeyRecord = {
      id,
      prefix,
      hash,
      createdAt,
      expiration: expiration === undefined ? createdAt + DEFAULT_LIFETIME : expiration,
      lastSeen: null,
    };
    await journal.commit({ documents: [taken, { kind: "apikey", id: prefix, value: record }] });
    return { record, text };
  }

  async expire(reference: KeyReference): Promise<void> {
    const record = this.find(reference);
    const now = this.context.now();
    if (record.expiration === null || record.expiration > now) await this.put({ ...record, expiration: now });
  }

  async delete(reference: KeyReference): Promise<void> {
    const { prefix } = this.find(reference);
    await this.context.journal.commit({ documents: [{ kind: "apikey", id: prefix, value: null }] });
  }

  /** Whose text this is: "expired" when it was good once, null when it is none of ours. Notes that it was used. */
  authenticate(text: string): ApiKeyRecord | "expired" | null {
    const parts = splitSecret(KIND, text);
    const record = parts ? this.context.model.documents("apikey").get(parts.prefix) : undefined;
    if (!parts || !record || !provesSecret(record, parts.secret)) return null;
    const now = this.context.now();
    if (record.expiration !== null && record.expiration <= now) return "expired";
    if (record.lastSeen === null || now - record.lastSeen >= SEEN_EVERY)
      this.put({ ...record, lastSeen: now }).catch((error: Error) => this.context.log(error.message));
    return record;
  }

  private put(record: ApiKeyRecord): Promise<void> {
    return this.context.journal.commit({ documents: [{ kind: "apikey", id: record.prefix, value: record }] });
  }

  private find({ id, prefix }: KeyReference): ApiKeyRecord {
    if ((id === undefined) === (prefix === undefined))
      throw new CommandError(400, "name the API key by its id or by its prefix: one of the two");
    const wanted = prefix?.replace(/^hskey-api-/, "").slice(0, 12);
    const found = this.list().find((record) => (id === undefined ? record.prefix === wanted : record.id === id));
    if (!found)
      throw new CommandError(
        404,
        `there is no API key ${id === undefined ? "with this prefix" : id}: weft apikeys list shows those that exist`,
      );
    return found;
  }
}

export function apiApiKey(record: ApiKeyRecord): ApiApiKey {
  return {
    id: String(record.id),
    prefix: `${KIND}-${record.prefix}`,
    expiration: record.expiration === null ? null : timeText(record.expiration),
    createdAt: timeText(record.createdAt),
    lastSeen: record.lastSeen === null ? null : timeText(record.lastSeen),
  };
}
