// Who asks the API: whoever may open the admin socket, the holder of an API key, or an OAuth client by its token.
import { CommandError } from "../errors.ts";

const SCOPE_NAMES = [
  "all",
  "auth_keys",
  "oauth_keys",
  "devices:core",
  "devices:routes",
  "devices:posture_attributes",
  "policy_file",
  "feature_settings",
  "account_settings",
  "users",
  "dns",
  "webhooks",
] as const;

/** "devices:core" to read and write, "devices:core:read" to read. */
export type Scope = (typeof SCOPE_NAMES)[number] | `${(typeof SCOPE_NAMES)[number]}:read`;

export const SCOPES: readonly Scope[] = SCOPE_NAMES.flatMap((name): Scope[] => [name, `${name}:read`]);

/** Scopes under which nodes or keys of nodes can be made: their holder must be bound to tags. */
export const TAG_BOUND: readonly Scope[] = ["all", "devices:core", "auth_keys"];

export interface Caller {
  kind: "socket" | "api-key" | "oauth" | "nobody";
  /** For the log and the policy's history. */
  name: string;
  /** Null: all of them. */
  scopes: readonly Scope[] | null;
  /** Of an OAuth client; else empty. */
  tags: readonly string[];
}

export const SOCKET_CALLER: Caller = { kind: "socket", name: "the admin socket", scopes: null, tags: [] };

/** Of what needs no credential. */
export const NOBODY: Caller = { kind: "nobody", name: "nobody", scopes: [], tags: [] };

/** Whether these scopes hold that one: writing includes reading, "all" includes everything. */
export function covers(held: readonly Scope[] | null, wanted: Scope): boolean {
  if (held === null) return true;
  const isRead = wanted.endsWith(":read");
  const write = isRead ? wanted.slice(0, -":read".length) : wanted;
  return held.some(
    (scope) => scope === wanted || scope === write || scope === "all" || (isRead && scope === "all:read"),
  );
}

/** Throws CommandError when the caller may not. */
export function requireScope(caller: Caller, scope: Scope): void {
  if (!covers(caller.scopes, scope))
    throw new CommandError(403, `this token does not have the scope "${scope}", which this needs`);
}
