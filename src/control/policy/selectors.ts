// Words of the policy language that stand for users, nodes and addresses.
import { parseRange } from "./addresses.ts";
import type { Policy, Role, Selector } from "./types.ts";

export type Definitions = Pick<Policy, "groups" | "hosts" | "tagOwners" | "ipsets" | "isForeignGroup">;

const ROLE_GROUPS: Readonly<Record<string, readonly Role[]>> = {
  "autogroup:owner": ["owner"],
  "autogroup:admin": ["owner", "admin"],
  "autogroup:it-admin": ["it-admin"],
  "autogroup:network-admin": ["network-admin"],
  "autogroup:billing-admin": ["billing-admin"],
  "autogroup:auditor": ["auditor"],
};

const AUTOGROUPS = new Set([
  ...Object.keys(ROLE_GROUPS),
  "autogroup:member",
  "autogroup:tagged",
  "autogroup:self",
  "autogroup:internet",
  "autogroup:danger-all",
  "autogroup:shared",
]);

/** Users who belong to an autogroup by their role; null: no such autogroup. */
export function rolesOf(autogroup: string): readonly Role[] | null {
  return ROLE_GROUPS[autogroup] ?? null;
}

/** Throws an Error with the bare sentence; callers add the place. */
export function parseSelector(word: string, known: Definitions): Selector {
  const text = word.trim();
  if (text === "*") return { kind: "any", text };
  if (text.startsWith("autogroup:")) {
    const name = text === "autogroup:members" ? "autogroup:member" : text;
    if (!AUTOGROUPS.has(name)) throw new Error(`autogroup not found: ${JSON.stringify(text)}`);
    return { kind: "autogroup", name, text };
  }
  if (text.startsWith("group:")) {
    if (!known.groups.has(text) && !known.isForeignGroup(text))
      throw new Error(`group not found: ${JSON.stringify(text)}`);
    return { kind: "group", name: text, text };
  }
  if (text.startsWith("tag:")) {
    if (!known.tagOwners.has(text)) throw new Error(`tag not found: ${JSON.stringify(text)}`);
    return { kind: "tag", name: text, text };
  }
  if (text.startsWith("ipset:")) {
    if (!known.ipsets.has(text)) throw new Error(`ipset not found: ${JSON.stringify(text)}`);
    return { kind: "ipset", name: text, text };
  }
  if (text.startsWith("user:*@")) {
    const domain = text.slice("user:*@".length).toLowerCase();
    if (domain === "") throw new Error(`${JSON.stringify(text)} names no domain`);
    return { kind: "domain", domain, text };
  }
  const host = known.hosts.get(text.startsWith("host:") ? text.slice("host:".length) : text);
  if (host) return { kind: "range", range: host, text };
  if (text.includes("@") && !/^(user|localpart):/.test(text)) return { kind: "user", token: text, text };
  const range = parseRange(text);
  if (range) return { kind: "range", range, text };
  if (text.includes(":")) throw new Error("host name must not contain colon (:)");
  throw new Error(`host not found: ${JSON.stringify(text)}`);
}

/** Whether autogroup:self may stand beside this source: it must stand for users. */
export function standsForUsers(selector: Selector): boolean {
  switch (selector.kind) {
    case "user":
    case "domain":
    case "group":
      return true;
    case "autogroup":
      return selector.name === "autogroup:member" || rolesOf(selector.name) !== null;
    default:
      return false;
  }
}
