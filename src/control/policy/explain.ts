// `weft policy why SRC DST:PORT` for people: SRC and DST may be nodes, users, groups, tags, hosts or addresses, so the answer
// is about pairs of nodes: which entries of the policy let how many of them through, and for the first that is not let
// through, which entries came nearest and what they miss.
import { addressNumber, covers, INTERNET, type Range, textOf } from "./addresses.ts";
import type { Compiled } from "./compile.ts";
import { type Place, PolicyError } from "./error.ts";
import { isAutogroup } from "./parse.ts";
import { opensPort, parseProtocol, protocolName, splitPorts } from "./ports.ts";
import { meetsPosture } from "./postures.ts";
import type { Resolver } from "./resolve.ts";
import { parseSelector } from "./selectors.ts";
import type { Access, PolicyNode, PortRange, Selector } from "./types.ts";
import { why } from "./why.ts";

/** Pairs that are looked at. */
const MAX_PAIRS = 2_000;
const MAX_EXAMPLES = 5;
const MAX_NEAREST = 3;
const TCP = 6;
const DEFAULT_PROTOCOLS = new Set([1, 6, 17, 58]);

export interface RuleRef {
  readonly section: "acls" | "grants";
  readonly index: number;
  readonly place: Place;
  /** The line of the policy, blanks trimmed. */
  readonly line: string;
}

export interface Explanation {
  /** Of the pairs that were looked at. */
  readonly verdict: "allowed" | "partly" | "denied";
  readonly protocol: string;
  readonly port: number;
  readonly pairs: number;
  readonly allowed: number;
  /** False: there are more pairs than are looked at. */
  readonly complete: boolean;
  /** Null for `rule`: the policy has neither acls nor grants, so all may reach all. */
  readonly rules: { rule: RuleRef | null; pairs: number; examples: string[] }[];
  /** Some of the pairs that nothing lets through. */
  readonly denied: string[];
  /** For the first of them. */
  readonly nearest: { rule: RuleRef; misses: string[] }[];
}

export interface ExplainQuestion {
  src: string;
  /** With the port behind a colon, "server:22". */
  dst: string;
  /** "tcp" when absent or "". */
  proto?: string | undefined;
}

/** An end of a connection: a node, or an address that is no node's. */
interface End {
  readonly node: number | null;
  /** Text of the address; null: any of the node's. */
  readonly address: string | null;
  readonly name: string;
}

/** Throws PolicyError when a word means nothing. */
export function explain(compiled: Compiled, question: ExplainQuestion): Explanation {
  const { host, port } = splitTarget(question.dst);
  const protocol = protocolOf(question.proto?.trim() || "tcp");
  const sources = endsOf(question.src, compiled).filter(({ node }) => node !== null);
  if (sources.length === 0)
    throw new PolicyError(`${JSON.stringify(question.src)} is no node: only nodes have a way to start from`);
  const targets = isSelf(host) ? null : endsOf(host, compiled);
  const rules = new Map<Access | null, { pairs: number; examples: string[] }>();
  const denied: { from: End; to: End }[] = [];
  let pairs = 0;
  let allowed = 0;
  let complete = true;
  for (const from of sources) {
    for (const to of targets ?? ownNodes(from, compiled.resolver)) {
      if (to.node === from.node && to.node !== null) continue;
      if (pairs === MAX_PAIRS) {
        complete = false;
        break;
      }
      pairs++;
      const found = reasons(compiled, from, to, port, protocol);
      if (found.size > 0) allowed++;
      else denied.push({ from, to });
      for (const [access, router] of found) {
        const entry = rules.get(access) ?? { pairs: 0, examples: [] };
        rules.set(access, entry);
        entry.pairs++;
        const way =
          router === null ? "" : ` through ${nameOf(compiled.resolver.nodes[compiled.resolver.indexOf(router)!]!)}`;
        if (entry.examples.length < MAX_EXAMPLES) entry.examples.push(`${from.name} -> ${to.name}${way}`);
      }
    }
  }
  if (pairs === 0)
    throw new PolicyError(
      `${JSON.stringify(question.src)} and ${JSON.stringify(host)} are the same node: there is no way between them to ask about`,
    );
  const first = denied[0];
  return {
    verdict: allowed === pairs ? "allowed" : allowed > 0 ? "partly" : "denied",
    protocol: protocolName(protocol),
    port,
    pairs,
    allowed,
    complete,
    rules: [...rules].map(([access, entry]) => ({ rule: access && ruleOf(compiled, access), ...entry })),
    denied: denied.slice(0, MAX_EXAMPLES).map(({ from, to }) => `${from.name} -> ${to.name}`),
    nearest: first ? nearest(compiled, first.from, first.to, port, protocol) : [],
  };
}

function splitTarget(dst: string): { host: string; port: number } {
  let split: ReturnType<typeof splitPorts>;
  try {
    // An IPv6 address in brackets, or a word with a port.
    split = splitPorts(dst.trim());
  } catch (error) {
    throw new PolicyError(
      `${JSON.stringify(dst)} is no target: write one like "server:22" (${(error as Error).message})`,
    );
  }
  const [range] = split.ports;
  if (split.ports.length !== 1 || range!.first !== range!.last)
    throw new PolicyError(`${JSON.stringify(dst)} is no target: ask about a single port, like "server:22"`);
  return { host: split.host, port: range!.first };
}

function protocolOf(text: string): number {
  try {
    return parseProtocol(text) ?? TCP;
  } catch (error) {
    throw new PolicyError((error as Error).message);
  }
}

function isSelf(word: string): boolean {
  return word.trim() === "autogroup:self";
}

function nameOf(node: PolicyNode): string {
  return `${node.name ?? `node ${node.id}`} (${node.ipv4 || node.ipv6})`;
}

function endOf(resolver: Resolver, node: number): End {
  return { node, address: null, name: nameOf(resolver.nodes[node]!) };
}

function ownNodes({ node }: End, resolver: Resolver): End[] {
  const { userId, tags } = resolver.nodes[node!]!;
  if (userId === null || tags.length > 0) return [];
  return resolver.nodesOfUser(userId).map((each) => endOf(resolver, each));
}

/** A word is an address, the name of a node (with or without its domain), or what the policy language says. */
function endsOf(word: string, { resolver, policy }: Compiled): End[] {
  const text = word.trim();
  const n = addressNumber(text);
  if (n !== null) return [addressEnd(text, n, resolver)];
  const label = text.toLowerCase();
  const nodeCalled = (wanted: string) => resolver.nodes.findIndex(({ name }) => name === wanted);
  const named = nodeCalled(label);
  if (named >= 0) return [endOf(resolver, named)];
  let selector: Selector;
  try {
    selector = parseSelector(text, policy);
  } catch (error) {
    // With its domain, where that is no host, mail address or prefix.
    const first = nodeCalled(label.split(".")[0]!);
    if (first >= 0) return [endOf(resolver, first)];
    throw new PolicyError(
      `${JSON.stringify(text)} is no address, node, user, group, tag, host or autogroup that is known here (${(error as Error).message})`,
    );
  }
  const ends = [...resolver.targets(selector)].map((node) => endOf(resolver, node));
  if (selector.kind === "range" || selector.kind === "ipset") {
    // Addresses behind a router: the first of each range stands for it.
    for (const { first, last } of resolver.ranges(selector).ranges) {
      if (resolver.nodesIn({ first, last }).length > 0) continue;
      const sample = first === last ? first : first + 1n;
      ends.push({ node: null, address: textOf(sample), name: textOf(sample) });
    }
  }
  if (isAutogroup(selector, "internet")) ends.push({ node: null, address: "1.1.1.1", name: "the internet (1.1.1.1)" });
  if (ends.length === 0) throw new PolicyError(`${JSON.stringify(text)} stands for no node and no address at present`);
  return ends;
}

function addressEnd(text: string, n: bigint, resolver: Resolver): End {
  const [node] = resolver.nodesIn({ first: n, last: n });
  return node === undefined ? { node: null, address: text, name: text } : { ...endOf(resolver, node), address: text };
}

/** Entries that let a connection through, each with its router (null: straight to the node). */
function reasons(
  compiled: Compiled,
  from: End,
  to: End,
  port: number,
  protocol: number,
): Map<Access | null, number | null> {
  const { resolver } = compiled;
  const found = new Map<Access | null, number | null>();
  // An address of the source must be one that the rule means; a node may use either of its own.
  const families = from.address ? [from.address] : resolver.addressesOf(from.node!);
  const targets = to.address ? [to.address] : resolver.addressesOf(to.node!);
  const only6 = [from.node, to.node].some((node) => node !== null && compiled.withoutIPv4(node));
  for (const source of families) {
    for (const dst of targets) {
      if (source.includes(":") !== dst.includes(":") || (only6 && !source.includes(":"))) continue;
      const question = { src: resolver.nodes[from.node!]!.id, srcAddress: source, dst, port, protocol };
      for (const { access, router } of why(compiled, question)) if (!found.has(access)) found.set(access, router);
    }
  }
  return found;
}

function ruleOf({ policy }: Compiled, { section, index, place }: Access): RuleRef {
  return { section, index, place, line: lineAt(policy.text, place) };
}

/** One line of a text, blanks trimmed and cut where it is very long. */
export function lineAt(text: string, { line }: Place): string {
  const whole = (text.split("\n", line)[line - 1] ?? "").trim();
  return whole.length > 200 ? `${whole.slice(0, 200)}…` : whole;
}

// ---- what came nearest ----

function nearest(compiled: Compiled, from: End, to: End, port: number, protocol: number): Explanation["nearest"] {
  const { policy } = compiled;
  const scored = (policy.accesses ?? []).flatMap((access) => {
    const { misses, score } = missesOf(compiled, access, from, to, port, protocol);
    return score > 0 ? [{ access, misses, score }] : [];
  });
  return scored
    .sort((a, b) => b.score - a.score)
    .slice(0, MAX_NEAREST)
    .map(({ access, misses }) => ({ rule: ruleOf(compiled, access), misses }));
}

function missesOf(
  compiled: Compiled,
  access: Access,
  from: End,
  to: End,
  port: number,
  protocol: number,
): { misses: string[]; score: number } {
  const { resolver, policy } = compiled;
  const misses: string[] = [];
  const holdsSource = access.src.some((selector) => holds(resolver, selector, from));
  const holdsTarget = access.dst.some((selector) =>
    isAutogroup(selector, "self")
      ? ownNodes(from, resolver).some(({ node }) => node === to.node)
      : holds(resolver, selector, to),
  );
  if (!holdsSource && !holdsTarget) return { misses, score: 0 };
  if (!holdsSource) misses.push(`its src does not hold ${from.name}`);
  if (!holdsTarget) misses.push(`its dst does not hold ${to.name}`);
  const { postures } = policy;
  const node = resolver.nodes[from.node!]!;
  if (access.postures.length > 0 && !access.postures.some((name) => meetsPosture(node, postures.get(name) ?? [])))
    misses.push(`${from.name} meets none of its postures (${access.postures.join(", ")})`);
  const fitting = access.openings.filter((opening) =>
    opening.protocol === null ? DEFAULT_PROTOCOLS.has(protocol) : opening.protocol === protocol,
  );
  if (access.openings.length === 0) misses.push("it gives capabilities and opens no port");
  else if (fitting.length === 0)
    misses.push(`its protocol is ${access.openings.map((opening) => protocolName(opening.protocol)).join(", ")}`);
  else {
    const ports = fitting.flatMap(({ dst }) =>
      dst.filter(({ selector }) => !holdsTarget || isAutogroup(selector, "self") || holds(resolver, selector, to)),
    );
    if (!ports.some((each) => opensPort(each.ports, protocol, port)))
      misses.push(`its ports are ${formatPorts(ports.flatMap((each) => each.ports))}`);
  }
  if (access.via.length > 0) misses.push(`it goes through routers with ${access.via.join(", ")}`);
  if (misses.length === 0) misses.push("its addresses are of another family, or no router serves the target");
  return { misses, score: (holdsSource ? 10 : 0) + (holdsTarget ? 10 : 0) - misses.length };
}

function holds(resolver: Resolver, selector: Selector, end: End): boolean {
  if (selector.kind === "any" || isAutogroup(selector, "danger-all")) return true;
  const n = end.address === null ? null : addressNumber(end.address);
  if (isAutogroup(selector, "internet")) return end.node === null && n !== null && INTERNET.has(n);
  const named = resolver.identity(selector);
  if (named) return end.node !== null && named.has(end.node);
  const addresses = n !== null ? [n] : resolver.addressesOf(end.node!).map((text) => addressNumber(text)!);
  return resolver
    .ranges(selector)
    .ranges.some((range: Range) => addresses.some((a) => covers(range, { first: a, last: a })));
}

export function formatPorts(ports: readonly PortRange[]): string {
  const texts = ports.map(({ first, last }) =>
    first === 0 && last === 65535 ? "*" : first === last ? String(first) : `${first}-${last}`,
  );
  return [...new Set(texts)].join(", ") || "none";
}
