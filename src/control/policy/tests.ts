// Entries of `tests` and `sshTests`, run against the policy that holds them. Users and tags without a node get one for the
// time of the test, and so do people who are not known yet: a test says the same on an empty tailnet.
import { addressNumber, covers, INTERNET, isIPv6, type Range, textOf } from "./addresses.ts";
import { Bits } from "./bits.ts";
import { Compiled } from "./compile.ts";
import { PolicyError, type TestFailure } from "./error.ts";
import { includesPort, parseProtocol, splitPorts } from "./ports.ts";
import { Resolver } from "./resolve.ts";
import { holdsAddress, type Item, type Rule } from "./rules.ts";
import { parseSelector } from "./selectors.ts";
import { sshVerdict } from "./ssh.ts";
import type { Policy, PolicyNode, PolicyTest, PolicyUser, Selector, SSHTest, Tailnet } from "./types.ts";

const FAILED = "test(s) failed";
/** Rules, and words of bitmaps, that all tests look at together: bounds the time of a check. */
const MAX_STEPS = 20_000_000;
const TCP = 6;
const UDP = 17;
const SCTP = 132;

/** What tests may cost. */
class Budget {
  private steps = 0;

  spend(steps: number): void {
    this.steps += steps;
    if (this.steps > MAX_STEPS)
      throw new PolicyError(
        `the tests take more than ${MAX_STEPS} steps on this tailnet: use fewer, or narrower src and dst in them`,
      );
  }
}

/** Throws PolicyError with "test(s) failed" and what failed. */
export function runTests(policy: Policy, tailnet: Tailnet): void {
  if (policy.tests.length === 0 && policy.sshTests.length === 0) return;
  const all = withStandIns(policy, tailnet);
  const compiled = new Compiled(policy, all);
  const budget = new Budget();
  const failures = [
    ...policy.tests.map((test) => ({ user: test.src, errors: testErrors(test, compiled, all, budget) })),
    ...policy.sshTests.map((test) => ({ user: test.src, errors: sshTestErrors(test, compiled, budget) })),
  ].filter(({ errors }: TestFailure) => errors.length > 0);
  if (failures.length > 0) throw new PolicyError(FAILED, null, failures);
}

/** The policy as it is for devices with other attributes: a test says which ones its source has. */
function withAttributes(test: PolicyTest, compiled: Compiled, tailnet: Tailnet, budget: Budget): Compiled {
  const source = partyOf(test.src.trim(), compiled);
  if (Object.keys(test.srcPostureAttrs).length === 0 || typeof source === "string") return compiled;
  const { resolver, policy } = compiled;
  budget.spend(100 * (resolver.nodes.length + compiled.rules.length));
  const nodes = resolver.nodes.map((node, i) =>
    source.nodes.has(i) ? { ...node, attributes: test.srcPostureAttrs } : node,
  );
  return new Compiled(policy, { ...tailnet, nodes });
}

function selectorOf(word: string, policy: Policy): Selector | string {
  try {
    return parseSelector(word, policy);
  } catch (error) {
    return (error as Error).message;
  }
}

/** Somebody whom a policy names and who is not known: "name@" or a mail address. */
export function stranger(token: string, id: number): PolicyUser {
  return token.endsWith("@") ? { id, name: token.slice(0, -1), email: "" } : { id, name: token, email: token };
}

/** With those whom tests, or groups in them, speak of and who are yet to come. */
function withStrangers(selectors: readonly Selector[], policy: Policy, tailnet: Tailnet): Tailnet {
  const resolver = new Resolver(policy, tailnet);
  const named = selectors.flatMap((each) => (each.kind === "group" ? (policy.groups.get(each.name) ?? []) : [each]));
  const unknown = named.flatMap((each) =>
    each.kind === "user" && resolver.users(each)!.size === 0 ? [each.token.toLowerCase()] : [],
  );
  const lastId = tailnet.users.reduce((top, { id }) => Math.max(top, id), 0);
  const strangers = [...new Set(unknown)].map((token, i) => stranger(token, lastId + 1 + i));
  return { ...tailnet, users: [...tailnet.users, ...strangers] };
}

/** Each user and each tag of the policy's tests that has no node gets one, with addresses that nobody else has. */
function withStandIns(policy: Policy, known: Tailnet): Tailnet {
  const hosts = (words: readonly string[]) => words.map((word) => word.slice(0, Math.max(0, word.lastIndexOf(":"))));
  const words = new Set([
    ...policy.tests.flatMap(({ src, accept, deny }) => [src, ...hosts(accept), ...hosts(deny)]),
    ...policy.sshTests.flatMap(({ src, dst }) => [src, ...dst]),
  ]);
  const selectors = [...words].flatMap((word) => {
    const selector = selectorOf(word, policy);
    return typeof selector === "string" ? [] : [selector];
  });
  const tailnet = withStrangers(selectors, policy, known);
  const users = new Set(tailnet.nodes.filter(({ tags }) => tags.length === 0).map(({ userId }) => userId));
  const tags = new Set(tailnet.nodes.flatMap((node) => node.tags));
  const nodes: PolicyNode[] = [];
  let lastId = tailnet.nodes.reduce((top, { id }) => Math.max(top, id), 0);
  const resolver = new Resolver(policy, tailnet);
  const taken = new Set(tailnet.nodes.flatMap(({ ipv4, ipv6 }) => [ipv4, ipv6]));
  // From the far end of where addresses come from: policies hardly name those.
  function* addressesIn(range: Range | undefined): Generator<string> {
    for (let n = range?.last; n !== undefined && n >= range!.first; n--) if (!taken.has(textOf(n))) yield textOf(n);
  }
  const ipv4 = addressesIn(resolver.own.ranges.findLast((range) => !isIPv6(range)));
  const ipv6 = addressesIn(resolver.own.ranges.findLast(isIPv6));
  const standIn = (node: Pick<PolicyNode, "userId" | "tags">): void => {
    nodes.push({ ...node, id: ++lastId, ipv4: ipv4.next().value ?? "", ipv6: ipv6.next().value ?? "", routes: [] });
  };
  for (const selector of selectors) {
    if (selector.kind === "tag" && !tags.has(selector.name)) {
      tags.add(selector.name);
      standIn({ userId: null, tags: [selector.name] });
    }
    for (const id of resolver.users(selector) ?? []) {
      if (users.has(id)) continue;
      users.add(id);
      standIn({ userId: id, tags: [] });
    }
  }
  return { ...tailnet, nodes: [...tailnet.nodes, ...nodes] };
}

/** Whom a test speaks for, or of: nodes, or an address that is nobody's. */
interface Party {
  readonly nodes: Bits;
  readonly address: Range | null;
}

/** Users, groups, tags, hosts and addresses: words for everybody are none, as in the hosted service. */
function partyOf(word: string, compiled: Compiled): Party | string {
  const { resolver } = compiled;
  const selector = selectorOf(word, compiled.policy);
  if (typeof selector === "string") return selector;
  if (selector.kind === "any" || selector.kind === "autogroup")
    return `user or host is invalid: unknown user or host: ${JSON.stringify(word)}`;
  if (selector.kind === "range") {
    const { range } = selector;
    if (range.first !== range.last || word.includes("/")) return `${JSON.stringify(word)} is no single address`;
    const nodes = resolver.nodesIn(range);
    return { nodes: Bits.of(resolver.nodes.length, nodes), address: range };
  }
  if (selector.kind === "ipset") return `${JSON.stringify(word)} is no single address`;
  const nodes = resolver.targets(selector);
  return nodes.isEmpty ? `${JSON.stringify(word)} stands for nobody` : { nodes, address: null };
}

/** Whether a rule's protocol serves a test's. A test that names none is content with TCP or UDP. */
function opens(rule: number | null, test: number | null): boolean {
  if (rule === null) return test !== SCTP;
  return test === null ? rule === TCP || rule === UDP : rule === test;
}

/** Nodes that a rule lets through by their IPv4 and by their IPv6 address. */
interface Sources {
  readonly v4: Bits;
  readonly v6: Bits;
}

const sources = new WeakMap<Rule, Sources>();

function sourcesOf(rule: Rule, { resolver }: Compiled, budget: Budget): Sources {
  let found = sources.get(rule);
  if (!found) {
    budget.spend(resolver.nodes.length);
    const holding = (isWanted: (address: string) => boolean): Bits =>
      Bits.of(
        resolver.nodes.length,
        [...rule.source.nodes].filter((node) =>
          resolver.addressesOf(node).some((address) => isWanted(address) && holdsAddress(rule.source, address)),
        ),
      );
    found = { v4: holding((address) => !address.includes(":")), v6: holding((address) => address.includes(":")) };
    sources.set(rule, found);
  }
  return found;
}

/** All nodes that may reach `node` or `address`, and whether the address `from` may. */
function reach(
  compiled: Compiled,
  target: { node: number | null; address: Range | null },
  protocol: number | null,
  port: number,
  budget: Budget,
): { nodes: Bits; allows: (from: Range) => boolean } {
  const { resolver } = compiled;
  const addresses = target.address
    ? [target.address]
    : resolver.addressesOf(target.node!).map((text) => ({ first: addressNumber(text)!, last: addressNumber(text)! }));
  const nodes = new Bits(resolver.nodes.length);
  const hits: { rule: Rule; ends: Range[] }[] = [];
  for (const rule of compiled.rules) {
    if (rule.capabilities || !opens(rule.protocol, protocol)) continue;
    // An address that is no node's may lie behind a router, in the internet, or nowhere yet: the rule says so all the same.
    const internet = target.address && INTERNET.covers(target.address) ? rule.internet : [];
    const lists =
      target.node === null
        ? [rule.everywhere, rule.addresses, internet]
        : [rule.targets.has(target.node) ? rule.everywhere : [], rule.items.get(target.node) ?? []];
    const fitting: Item[] = [];
    for (const items of lists) {
      budget.spend(items.length);
      for (const item of items) if (includesPort(item.ports, port)) fitting.push(item);
    }
    const ends = addresses.filter((end) => fitting.some(({ range }) => range === null || covers(range, end)));
    if (ends.length === 0) continue;
    hits.push({ rule, ends });
    const { v4, v6 } = sourcesOf(rule, compiled, budget);
    if (ends.some(isIPv6)) nodes.addAll(v6);
    if (!ends.every(isIPv6)) nodes.addAll(v4);
  }
  const allows = (from: Range): boolean =>
    hits.some(
      ({ rule, ends }) =>
        ends.some((end) => isIPv6(end) === isIPv6(from)) && holdsAddress(rule.source, textOf(from.first)),
    );
  return { nodes, allows };
}

function testErrors(test: PolicyTest, real: Compiled, tailnet: Tailnet, budget: Budget): string[] {
  const compiled = withAttributes(test, real, tailnet, budget);
  const errors: string[] = [];
  let protocol: number | null = null;
  try {
    protocol = parseProtocol(test.proto.trim());
  } catch (error) {
    return [(error as Error).message];
  }
  if (protocol !== null && ![TCP, UDP, SCTP].includes(protocol)) {
    return [`proto ${JSON.stringify(test.proto)}: tests know tcp, udp and sctp`];
  }
  budget.spend(compiled.resolver.nodes.length >>> 3);
  const source = partyOf(test.src.trim(), compiled);
  if (typeof source === "string") return [`src: ${source}`];
  for (const [words, want] of [
    [test.accept, "Accept"],
    [test.deny, "Drop"],
  ] as const) {
    for (const word of words) {
      const why = judge(word.trim(), want, source, protocol, compiled, budget);
      if (why !== null) errors.push(`address ${JSON.stringify(word)}: ${why}`);
    }
  }
  return errors;
}

/** Why one destination of a test is not as it wants; null when it is. */
function judge(
  word: string,
  want: "Accept" | "Drop",
  source: Party,
  protocol: number | null,
  compiled: Compiled,
  budget: Budget,
): string | null {
  const { resolver } = compiled;
  let split: ReturnType<typeof splitPorts>;
  try {
    split = splitPorts(word);
  } catch (error) {
    return (error as Error).message;
  }
  const { host, ports } = split;
  if (ports.length !== 1 || ports[0]!.first !== ports[0]!.last) return "a test wants a single port";
  let all = true;
  let some = false;
  const check = (node: number | null, address: Range | null): void => {
    budget.spend(compiled.rules.length + (resolver.nodes.length >>> 6) + 4);
    const { nodes, allows } = reach(compiled, { node, address }, protocol, ports[0]!.first, budget);
    all &&= source.address ? allows(source.address) : nodes.covers(source.nodes);
    some ||= source.address ? allows(source.address) : nodes.overlaps(source.nodes);
  };
  const target = partyOf(host, compiled);
  if (typeof target === "string") return target;
  if (source.address && target.address && isIPv6(source.address) !== isIPv6(target.address))
    return "an address of one family can not reach one of the other";
  if (target.nodes.isEmpty) check(null, target.address);
  for (const node of target.nodes) check(node, target.address);
  if (want === "Accept" && !all) return "want: Accept, got: Drop";
  if (want === "Drop" && some) return "want: Drop, got: Accept";
  return null;
}

function sshTestErrors(test: SSHTest, compiled: Compiled, budget: Budget): string[] {
  const { resolver } = compiled;
  const wants = [
    ...test.accept.map((login) => ({ login, want: "accept" as const })),
    ...test.check.map((login) => ({ login, want: "check" as const })),
    ...test.deny.map((login) => ({ login, want: "deny" as const })),
  ];
  budget.spend(resolver.nodes.length >>> 3);
  const source = partyOf(test.src.trim(), compiled);
  if (typeof source === "string") return [`src: ${source}`];
  if (source.nodes.isEmpty) return [`src: ${JSON.stringify(test.src)} is no node`];
  const errors = new Set<string>();
  for (const word of test.dst) {
    const target = partyOf(word, compiled);
    if (typeof target === "string") return [`dst: ${target}`];
    if (target.nodes.isEmpty) return [`dst: ${JSON.stringify(word)} is no node`];
    for (const from of source.nodes) {
      for (const node of target.nodes) {
        budget.spend(wants.length * (4 + compiled.policy.ssh.length));
        for (const { login, want } of wants) {
          const got = sshVerdict(resolver, from, node, login);
          if (got !== want)
            errors.add(`user ${JSON.stringify(login)} on ${JSON.stringify(word)}: want: ${want}, got: ${got}`);
        }
      }
    }
  }
  return [...errors];
}
