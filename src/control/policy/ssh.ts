// Entries of `ssh` -> SSHPolicy rules of one node (spec/ts2021-control-protocol.md, section 20).
import { Bits } from "./bits.ts";
import { isAutogroup } from "./parse.ts";
import { meetsPosture } from "./postures.ts";
import type { Resolver } from "./resolve.ts";
import type { SSHAction, SSHEntry, SSHRule } from "./types.ts";

const DELEGATE = "https://unused/machine/ssh/action/$SRC_NODE_ID/to/$DST_NODE_ID?local_user=$LOCAL_USER";

function actionOf(entry: SSHEntry, resolver: Resolver): SSHAction {
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
  if (entry.action === "check") return { holdAndDelegate: DELEGATE, ...recording };
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

function sourcesOf(entry: SSHEntry, resolver: Resolver): Bits {
  const nodes = new Bits(resolver.nodes.length);
  for (const selector of entry.src) nodes.addAll(resolver.targets(selector));
  if (entry.postures.length === 0) return nodes;
  const { postures } = resolver.policy;
  const fit = [...nodes].filter((i) =>
    entry.postures.some((name) => meetsPosture(resolver.nodes[i]!, postures.get(name) ?? [])),
  );
  return Bits.of(resolver.nodes.length, fit);
}

function rulesOf(entry: SSHEntry, node: number, resolver: Resolver): SSHRule[] {
  const sources = sourcesOf(entry, resolver);
  const owner = resolver.tagged.has(node) ? null : resolver.nodes[node]!.userId;
  const own = owner === null ? [] : resolver.nodesOfUser(owner).filter((i) => sources.has(i));
  const named = entry.dst.some((selector) => !isAutogroup(selector, "self") && resolver.targets(selector).has(node));
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
    const email = resolver.user(id)?.email ?? "";
    const at = email.lastIndexOf("@");
    if (at > 0 && entry.localDomains.includes(email.slice(at + 1).toLowerCase())) {
      const local = email.slice(0, at);
      out.push(...rule(nodes, { [local]: local }));
    }
  }
  return out;
}

/** Check rules come first: the client takes the first that fits. */
export function sshRulesFor(resolver: Resolver, node: number): SSHRule[] {
  const { ssh } = resolver.policy;
  const ordered = [
    ...ssh.filter(({ action }) => action === "check"),
    ...ssh.filter(({ action }) => action === "accept"),
  ];
  return ordered.flatMap((entry) => rulesOf(entry, node, resolver));
}
