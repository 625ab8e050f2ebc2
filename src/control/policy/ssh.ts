// Entries of `ssh` -> SSHPolicy rules of one node (spec/ts2021-control-protocol.md, section 20).
import { createHash } from "node:crypto";
import { Bits } from "./bits.ts";
import { PolicyError } from "./error.ts";
import { isAutogroup } from "./parse.ts";
import type { Resolver } from "./resolve.ts";
import type { Policy, SSHAction, SSHEntry, SSHRule } from "./types.ts";

const DELEGATE = "https://unused/machine/ssh/action/$SRC_NODE_ID/to/$DST_NODE_ID?local_user=$LOCAL_USER";

/** 12 hours, where a rule does not say. */
const CHECK_PERIOD = 12 * 3_600_000;

/** What the policy says of one SSH session. */
export interface SSHDecision {
  action: "accept" | "check";
  /** Milliseconds for which an approval counts; 0: for one session. */
  period: number;
  /** What the target is told when the session may go on. */
  accept: SSHAction;
  /** Equal as long as the rule says the same. */
  rule: string;
}

function actionOf(entry: SSHEntry, resolver: Resolver, action: SSHEntry["action"] = entry.action): SSHAction {
  const recorders = entry.recorders.flatMap((tag) =>
    [...resolver.targets({ kind: "tag", name: tag, text: tag })].flatMap((node) =>
      resolver.addressesOf(node).map((address) => (address.includes(":") ? `[${address}]:80` : `${address}:80`)),
    ),
  );
  const recording: SSHAction =
    entry.recorders.length === 0
      ? {}
      : {
          recorders,
          ...(entry.enforceRecorder && {
            onRecordingFailure: {
              RejectSessionWithMessage: "# Session rejected: failed to start session recording.",
              TerminateSessionWithMessage: "# Session terminated: failed to record session.",
            },
          }),
        };
  if (action === "check") return { holdAndDelegate: DELEGATE, ...recording };
  return {
    accept: true,
    allowAgentForwarding: true,
    allowLocalPortForwarding: true,
    allowRemotePortForwarding: true,
    ...recording,
  };
}

/** Asked login -> local login: "=" the same, "" none. Root needs its own word. */
function loginsOf(logins: readonly string[]): Record<string, string> {
  const entries: [string, string][] = [["root", logins.includes("root") ? "root" : ""]];
  for (const login of logins) {
    if (login !== "root") entries.push(login === "autogroup:nonroot" ? ["*", "="] : [login, login]);
  }
  return Object.fromEntries(entries);
}

/** `find`, once for each entry and tailnet. */
function remembered(find: (entry: SSHEntry, resolver: Resolver) => Bits): typeof find {
  const byResolver = new WeakMap<Resolver, Map<SSHEntry, Bits>>();
  return (entry, resolver) => {
    let known = byResolver.get(resolver);
    if (!known) {
      known = new Map();
      byResolver.set(resolver, known);
    }
    let found = known.get(entry);
    if (!found) {
      found = find(entry, resolver);
      known.set(entry, found);
    }
    return found;
  };
}

/** Nodes that an entry lets in, somewhere. */
const sourcesOf = remembered(findSources);

/** Nodes that an entry names as destinations. */
const targetsOf = remembered(({ dst }, resolver) => {
  const nodes = new Bits(resolver.nodes.length);
  for (const selector of dst) if (!isAutogroup(selector, "self")) nodes.addAll(resolver.targets(selector));
  return nodes;
});

function findSources(entry: SSHEntry, resolver: Resolver): Bits {
  const nodes = new Bits(resolver.nodes.length);
  for (const selector of entry.src) nodes.addAll(resolver.targets(selector));
  if (entry.postures.length === 0) return nodes;
  const fit = resolver.meeting(entry.postures);
  return Bits.of(
    resolver.nodes.length,
    [...nodes].filter((i) => fit.has(i)),
  );
}

/** Sources of all entries together that one node may be told of. */
const MAX_SOURCES = 500_000;

/** Throws PolicyError. */
export function checkSSHSize(resolver: Resolver): void {
  let count = 0;
  for (const entry of resolver.policy.ssh) {
    count += sourcesOf(entry, resolver).count;
    if (count <= MAX_SOURCES) continue;
    throw new PolicyError(
      `the SSH rules expand to more than ${MAX_SOURCES} sources at ssh[${entry.index}]: use fewer or narrower ones`,
      entry.place,
    );
  }
}

/** The login that a user's mail address gives by "localpart:"; null: none. */
function localPart({ localDomains }: SSHEntry, userId: number | null, resolver: Resolver): string | null {
  const email = resolver.user(userId)?.email ?? "";
  const at = email.lastIndexOf("@");
  return at > 0 && localDomains.includes(email.slice(at + 1).toLowerCase()) ? email.slice(0, at) : null;
}

function rulesOf(entry: SSHEntry, node: number, resolver: Resolver): SSHRule[] {
  const sources = sourcesOf(entry, resolver);
  const owner = resolver.tagged.has(node) ? null : resolver.nodes[node]!.userId;
  const own = owner === null ? [] : resolver.nodesOfUser(owner).filter((i) => sources.has(i));
  const named = targetsOf(entry, resolver).has(node);
  const self = entry.dst.some((selector) => isAutogroup(selector, "self"));
  const action = actionOf(entry, resolver);
  const rule = (nodes: Iterable<number>, sshUsers: Record<string, string>): SSHRule[] => {
    const principals = [...nodes].flatMap((i) => resolver.addressesOf(i)).map((nodeIP) => ({ nodeIP }));
    if (principals.length === 0) return [];
    return [{ principals, sshUsers, action, ...(entry.acceptEnv.length > 0 && { acceptEnv: [...entry.acceptEnv] }) }];
  };
  const logins = loginsOf(entry.logins);
  if (entry.localDomains.length === 0) {
    if (named) return rule(sources, logins);
    return self ? rule(own, logins) : [];
  }
  // With "localpart:", each user has rules of its own, and its own nodes are always among the destinations.
  const users = named
    ? [...new Set([...sources].filter((i) => !resolver.tagged.has(i)).map((i) => resolver.nodes[i]!.userId!))]
    : own.length > 0
      ? [owner!]
      : [];
  const out = named
    ? rule(
        [...sources].filter((i) => resolver.tagged.has(i)),
        logins,
      )
    : [];
  for (const id of users.sort((a, b) => a - b)) {
    const nodes = resolver.nodesOfUser(id).filter((i) => sources.has(i));
    out.push(...rule(nodes, logins));
    const local = localPart(entry, id, resolver);
    if (local !== null) out.push(...rule(nodes, { [local]: local }));
  }
  return out;
}

const inOrder = new WeakMap<Policy, readonly SSHEntry[]>();

/** Check rules come first: the client takes the first that fits. */
function ordered(policy: Policy): readonly SSHEntry[] {
  let list = inOrder.get(policy);
  if (!list) {
    const { ssh } = policy;
    list = [...ssh.filter(({ action }) => action === "check"), ...ssh.filter(({ action }) => action === "accept")];
    inOrder.set(policy, list);
  }
  return list;
}

export function sshRulesFor(resolver: Resolver, node: number): SSHRule[] {
  return ordered(resolver.policy).flatMap((entry) => rulesOf(entry, node, resolver));
}

/** Whether a rule lets a login in: its own word, or that of all but root. */
export function admitsLogin({ sshUsers }: Pick<SSHRule, "sshUsers">, login: string): boolean {
  const local = Object.hasOwn(sshUsers, login) ? sshUsers[login]! : (sshUsers["*"] ?? "");
  return local !== "" && !(local === "=" && login === "root");
}

function digestOf({ action, src, dst, postures, logins, localDomains, checkPeriod }: SSHEntry): string {
  const words = [src, dst].map((selectors) => selectors.map(({ text }) => text));
  const text = JSON.stringify([action, words, postures, logins, localDomains, checkPeriod]);
  return createHash("sha256").update(text).digest("base64");
}

/** Whether an entry lets a login of one node into another, or any login (null): what `rulesOf` writes out, of one source. */
function admits(entry: SSHEntry, source: number, target: number, login: string | null, resolver: Resolver): boolean {
  const sources = sourcesOf(entry, resolver);
  if (!sources.has(source) || resolver.addressesOf(source).length === 0) return false;
  const ownerOf = (node: number) => (resolver.tagged.has(node) ? null : resolver.nodes[node]!.userId);
  const owner = ownerOf(source);
  const hasSelf = entry.localDomains.length > 0 || entry.dst.some((selector) => isAutogroup(selector, "self"));
  if (!targetsOf(entry, resolver).has(target) && !(hasSelf && owner !== null && owner === ownerOf(target)))
    return false;
  if (login === null || admitsLogin({ sshUsers: loginsOf(entry.logins) }, login)) return true;
  return entry.localDomains.length > 0 && login !== "" && login === localPart(entry, owner, resolver);
}

/** Entries that let a login of one node into another, or any login (null), in the order in which clients try them. */
function entriesFor(resolver: Resolver, source: number, target: number, login: string | null): SSHEntry[] {
  return ordered(resolver.policy).filter((entry) => admits(entry, source, target, login, resolver));
}

/** What the first entry that fits says about a login. */
export function sshVerdict(
  resolver: Resolver,
  source: number,
  target: number,
  login: string,
): SSHEntry["action"] | "deny" {
  const fitting = ordered(resolver.policy).find((entry) => admits(entry, source, target, login, resolver));
  return fitting?.action ?? "deny";
}

/** Nodes whose SSH rules name this one, or name it for its part in recording. */
export function sshNeighbours(resolver: Resolver, node: number): Bits {
  const found = new Bits(resolver.nodes.length);
  const { userId, tags } = resolver.nodes[node]!;
  for (const entry of resolver.policy.ssh) {
    const records = entry.recorders.some((tag) => tags.includes(tag));
    if (!records && !sourcesOf(entry, resolver).has(node)) continue;
    for (const selector of entry.dst) {
      if (!isAutogroup(selector, "self")) found.addAll(resolver.targets(selector));
      else if (records) found.addAll(resolver.all);
      else if (tags.length === 0 && userId !== null) for (const own of resolver.nodesOfUser(userId)) found.add(own);
    }
  }
  return found;
}

/** Equal for nodes that all entries treat alike. A user's nodes stand apart where whose they are matters. */
export function sshMembership(resolver: Resolver, node: number): string {
  const { userId, tags } = resolver.nodes[node]!;
  const marks = resolver.policy.ssh.map((entry) => {
    const source = sourcesOf(entry, resolver).has(node);
    const target = targetsOf(entry, resolver).has(node);
    const personal = entry.localDomains.length > 0 || entry.dst.some((selector) => isAutogroup(selector, "self"));
    return [source, target, personal && tags.length === 0 ? userId : null];
  });
  return JSON.stringify(marks);
}

export function sshDecisionFor(resolver: Resolver, source: number, target: number, login: string): SSHDecision | null {
  const entry = entriesFor(resolver, source, target, login)[0];
  if (!entry) return null;
  return {
    action: entry.action,
    period: entry.checkPeriod ?? CHECK_PERIOD,
    accept: actionOf(entry, resolver, "accept"),
    rule: digestOf(entry),
  };
}

/** Whether a check rule with this digest is about these two nodes. */
export function hasSSHCheck(resolver: Resolver, source: number, target: number, rule: string): boolean {
  return entriesFor(resolver, source, target, null).some((entry) => digestOf(entry) === rule);
}
