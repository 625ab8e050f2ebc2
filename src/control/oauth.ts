// OAuth clients, "hskey-client-<12 hex>-<64 hex>", and the access tokens that they get for an hour each by the grant
// "client_credentials" (RFC 6749, section 4.4): for programs that need less than everything. A client has scopes, and tags
// that bound which keys it may make. Both secrets are 256 random bits (secret.ts).
import { covers, SCOPES, type Scope, TAG_BOUND } from "./api/caller.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { DocumentChange, Millis } from "./model.ts";
import { tagProblem } from "./names.ts";
import { mintSecret, provesSecret, SECRET_BYTES, type SecretRecord, splitSecret } from "./secret.ts";

export interface OAuthClientRecord extends SecretRecord {
  scopes: readonly Scope[];
  tags: readonly string[];
  description: string;
  createdAt: Millis;
  updatedAt: Millis;
  /** Up to a minute old; null: never used. */
  lastSeen: Millis | null;
}

/** By its own prefix. */
export interface OAuthTokenRecord extends SecretRecord {
  /** Prefix of its client. */
  client: string;
  scopes: readonly Scope[];
  tags: readonly string[];
  expiration: Millis;
}

declare module "./model.ts" {
  interface Documents {
    /** By prefix, which is the client's id. */
    oauthclient: OAuthClientRecord;
    oauthtoken: OAuthTokenRecord;
  }
}

export interface ClientInput {
  scopes: readonly string[];
  tags: readonly string[];
  description: string;
}

const TOKEN_LIFETIME = 60 * 60_000;
const MAX_CLIENTS = 1_000;
/** Of one client. */
const MAX_TOKENS = 1_000;
const MAX_DESCRIPTION = 200;

export class OAuthClients {
  constructor(private readonly context: ControlContext) {}

  /** Oldest first. */
  list(): OAuthClientRecord[] {
    return [...this.context.model.documents("oauthclient").values()].sort(
      (a, b) => a.createdAt - b.createdAt || a.prefix.localeCompare(b.prefix),
    );
  }

  get(id: string): OAuthClientRecord | undefined {
    return this.context.model.documents("oauthclient").get(id);
  }

  /** The secret's text is given this once; the client's id is its prefix. */
  async create(input: ClientInput): Promise<{ record: OAuthClientRecord; text: string }> {
    const { model, random, now } = this.context;
    if (model.documents("oauthclient").size >= MAX_CLIENTS)
      throw new CommandError(409, `there are ${MAX_CLIENTS} OAuth clients: delete some first`);
    const checked = checkClient(input);
    const { text, prefix, hash } = mintSecret("hskey-client", random(SECRET_BYTES));
    const record = { ...checked, prefix, hash, createdAt: now(), updatedAt: now(), lastSeen: null };
    await this.put(record);
    return { record, text };
  }

  /** Tokens that it has keep what they were given until they expire, but never exceed what the client may now. */
  async update(id: string, input: ClientInput): Promise<OAuthClientRecord> {
    const record = { ...this.find(id), ...checkClient(input), updatedAt: this.context.now() };
    await this.put(record);
    return record;
  }

  /** Its tokens end with it. */
  async delete(id: string): Promise<void> {
    this.find(id);
    const tokens = this.tokensOf(id).map(
      ([prefix]): DocumentChange => ({ kind: "oauthtoken", id: prefix, value: null }),
    );
    await this.context.journal.commit({ documents: [{ kind: "oauthclient", id, value: null }, ...tokens] });
  }

  /**
   * The client that this secret belongs to; null when there is none, or it is not the one named. Official clients take
   * a secret in place of a pre-auth key only by Tailscale's own prefix, and then name a client that they made up.
   */
  authenticate(id: string | undefined, text: string): OAuthClientRecord | null {
    const isOfClient = text.startsWith("tskey-client-");
    const parts = splitSecret("hskey-client", isOfClient ? text.replace(/^ts/, "hs") : text);
    if (!parts || (!isOfClient && id !== undefined && id !== "" && id !== parts.prefix)) return null;
    const record = this.get(parts.prefix);
    return record && provesSecret(record, parts.secret) ? record : null;
  }

  /**
   * A token for an hour. `scopes` and `tags`: a part of what the client may, null for all of it.
   * Throws CommandError.
   */
  async issue(
    client: OAuthClientRecord,
    scopes: readonly string[] | null,
    tags: readonly string[] | null,
  ): Promise<{ text: string; expiresIn: number; scopes: readonly Scope[] }> {
    const granted = scopes === null ? client.scopes : checkScopes(scopes);
    const excess = granted.find((scope) => !covers(client.scopes, scope));
    if (excess) throw new CommandError(403, `this client does not have the scope "${excess}"`);
    const bound = tags === null ? client.tags : checkTags(tags);
    this.requireOwned(client.tags, bound);
    requireTags(granted, bound);
    const now = this.context.now();
    const alive = this.tokensOf(client.prefix).filter(([, token]) => token.expiration > now);
    if (alive.length >= MAX_TOKENS)
      throw new CommandError(
        429,
        `this client has ${MAX_TOKENS} tokens: use those for the hour that they are good for`,
      );
    const { text, prefix, hash } = mintSecret("hskey-oauthtok", this.context.random(SECRET_BYTES));
    const value = {
      prefix,
      hash,
      client: client.prefix,
      scopes: granted,
      tags: bound,
      expiration: now + TOKEN_LIFETIME,
    };
    await this.context.journal.commit({
      documents: [
        { kind: "oauthtoken", id: prefix, value },
        { kind: "oauthclient", id: client.prefix, value: { ...client, lastSeen: now } },
      ],
    });
    return { text, expiresIn: TOKEN_LIFETIME / 1000, scopes: granted };
  }

  /** What the bearer of this token may: "expired" when it was good once, null when it is none of ours. */
  bearer(
    text: string,
  ): { client: OAuthClientRecord; scopes: readonly Scope[]; tags: readonly string[] } | "expired" | null {
    const parts = splitSecret("hskey-oauthtok", text);
    const token = parts ? this.context.model.documents("oauthtoken").get(parts.prefix) : undefined;
    if (!parts || !token || !provesSecret(token, parts.secret)) return null;
    const client = this.get(token.client);
    if (!client || token.expiration <= this.context.now()) return "expired";
    return {
      client,
      scopes: token.scopes.filter((scope) => covers(client.scopes, scope)),
      tags: token.tags.filter((tag) => this.owns(client.tags, tag)),
    };
  }

  /** Throws CommandError when one of `wanted` is neither among `owned` nor owned by one of them (tagOwners). */
  requireOwned(owned: readonly string[], wanted: readonly string[]): void {
    const refused = wanted.find((tag) => !this.owns(owned, tag));
    if (refused)
      throw new CommandError(
        403,
        `"${refused}" is not a tag of this client: it has ${owned.join(", ") || "none"}, and no tag of those owns it (tagOwners)`,
      );
  }

  private owns(owned: readonly string[], tag: string): boolean {
    return owned.includes(tag) || this.context.access.mayClaim(tag, { tags: owned });
  }

  /** Forgets tokens that are over. */
  async sweep(): Promise<void> {
    const now = this.context.now();
    const gone = [...this.context.model.documents("oauthtoken")].filter(([, token]) => token.expiration <= now);
    if (gone.length === 0) return;
    await this.context.journal.commit({
      documents: gone.map(([id]): DocumentChange => ({ kind: "oauthtoken", id, value: null })),
    });
  }

  private tokensOf(client: string): [string, OAuthTokenRecord][] {
    return [...this.context.model.documents("oauthtoken")].filter(([, token]) => token.client === client);
  }

  private find(id: string): OAuthClientRecord {
    const record = this.get(id);
    if (!record)
      throw new CommandError(
        404,
        `there is no OAuth client ${JSON.stringify(id.slice(0, 40))}: weft oauth-clients list shows those that exist`,
      );
    return record;
  }

  private put(record: OAuthClientRecord): Promise<void> {
    return this.context.journal.commit({ documents: [{ kind: "oauthclient", id: record.prefix, value: record }] });
  }
}

function checkClient({ scopes, tags, description }: ClientInput) {
  const checked = { scopes: checkScopes(scopes), tags: checkTags(tags), description };
  if (checked.scopes.length === 0)
    throw new CommandError(400, `an OAuth client needs a scope at least, of ${SCOPES.join(", ")}`);
  if (description.length > MAX_DESCRIPTION)
    throw new CommandError(400, `the description has more than ${MAX_DESCRIPTION} characters`);
  requireTags(checked.scopes, checked.tags);
  return checked;
}

function checkScopes(names: readonly string[]): Scope[] {
  return [...new Set(names)].map((name) => {
    const scope = SCOPES.find((known) => known === name);
    if (!scope) throw new CommandError(400, `"${name.slice(0, 60)}" is not a scope: there are ${SCOPES.join(", ")}`);
    return scope;
  });
}

function checkTags(tags: readonly string[]): string[] {
  const problem = tags.map(tagProblem).find((found) => found !== null);
  if (problem) throw new CommandError(400, problem);
  return [...new Set(tags)];
}

/** Whoever can make nodes, or keys for them, must say whose they are: an OAuth client is no user. */
function requireTags(scopes: readonly Scope[], tags: readonly string[]): void {
  const bound = scopes.find((scope) => TAG_BOUND.includes(scope));
  if (bound && tags.length === 0)
    throw new CommandError(400, `the scope "${bound}" needs tags: what is made with it belongs to them`);
}
