// What a policy means, worked out a second time: straight from its words, packet by packet, as Tailscale's documentation
// says it. The packet filters, the tests of the policy and `why` must all say the same.
import { expect, test } from "bun:test";
import fc from "fast-check";
import { parseRange } from "./addresses.ts";
import { policies, tailnets } from "./arbitraries.ts";
import { Compiled, checkPolicy, PolicyError, parsePolicy, why } from "./index.ts";
import { admitsLogin } from "./ssh.ts";
import { passes } from "./testing.ts";
import type { PolicyNode, Tailnet } from "./types.ts";

type Policy = {
  [K in "acls" | "grants"]: typeof policies extends fc.Arbitrary<infer P extends Record<K, unknown>> ? P[K] : never;
};

interface Packet {
  from: PolicyNode;
  source: string;
  /** Who gets it: the node with the address, or a router. */
  to: PolicyNode;
  target: string;
  port: number;
  protocol: number;
}

interface Opening {
  protocols: readonly number[];
  first: number;
  last: number;
}

const USERS: Readonly<Record<string, readonly number[]>> = {
  "u1@": [1],
  "u2@example.com": [2],
  "group:g": [1, 3],
  "user:*@example.com": [1, 2],
  "autogroup:member": [1, 2, 3],
};
const LAN = "192.168.1.0/24";
const NOT_INTERNET = [
  "10.0.0.0/8",
  "100.64.0.0/10",
  "169.254.0.0/16",
  "172.16.0.0/12",
  "192.168.0.0/16",
  "224.0.0.0/4",
];
const DEFAULT_PROTOCOLS = [1, 6, 17, 58];

function inside(address: string, prefix: string): boolean {
  const [inner, outer] = [parseRange(address)!, parseRange(prefix)!];
  return outer.first <= inner.first && inner.last <= outer.last;
}

function isInternet(address: string): boolean {
  return address.includes(":") ? inside(address, "2000::/3") : !NOT_INTERNET.some((prefix) => inside(address, prefix));
}

/** Whether an address is among those that a word lists; null: the word is about who somebody is. */
function holdsAddress(word: string, address: string): boolean | null {
  if (word === "lan") return inside(address, LAN);
  if (word === "ipset:s") return inside(address, "10.0.0.0/8") && !inside(address, "10.33.0.0/16");
  return parseRange(word) ? inside(address, word) : null;
}

function isNode(word: string, { tags, userId }: PolicyNode): boolean {
  if (word.startsWith("tag:")) return tags.includes(word);
  if (word === "autogroup:tagged") return tags.length > 0;
  return tags.length === 0 && (USERS[word] ?? []).includes(userId!);
}

function comesFrom(word: string, { from, source }: Packet): boolean {
  if (word === "*" || word === "autogroup:danger-all") return true;
  return holdsAddress(word, source) ?? isNode(word, from);
}

function goesTo(word: string, packet: Packet, src: readonly string[]): boolean {
  const { from, to, target } = packet;
  const own = target === to.ipv4 || target === to.ipv6;
  if (word === "*") return true;
  if (word === "autogroup:internet") return !own && isInternet(target);
  if (word === "autogroup:self") {
    const sameUser = from.tags.length === 0 && to.tags.length === 0 && from.userId === to.userId;
    return own && sameUser && src.some((each) => each === "*" || isNode(each, from));
  }
  return holdsAddress(word, target) ?? (own && isNode(word, to));
}

function opens(openings: readonly Opening[], { port, protocol }: Packet): boolean {
  return openings.some(
    ({ protocols, first, last }) => protocols.includes(protocol) && ((first <= port && port <= last) || protocol === 1),
  );
}

function openingOf(protocols: readonly number[], ports: string): Opening {
  if (ports === "*") return { protocols, first: 0, last: 65535 };
  const [first, last] = ports.split("-").map(Number);
  return { protocols, first: first!, last: last ?? first! };
}

const PROTOCOLS: Readonly<Record<string, readonly number[]>> = {
  "": DEFAULT_PROTOCOLS,
  tcp: [6],
  udp: [17],
  icmp: [1],
};

interface Grant {
  src: readonly string[];
  dst: readonly string[];
  via: readonly string[];
}

function isGranted({ src, dst, via }: Grant, packet: Packet): boolean {
  const own = packet.target === packet.to.ipv4 || packet.target === packet.to.ipv6;
  return dst.some((word) => {
    // A way through routers is for what lies behind them. "*" is both at once, and self knows no way.
    const there = via.length === 0 || word === "autogroup:self" || packet.to.tags.some((tag) => via.includes(tag));
    const behind = via.length === 0 || word === "*" || word === "autogroup:self" || !own;
    return there && behind && src.some((each) => comesFrom(each, packet)) && goesTo(word, packet, src);
  });
}

/** Whether some entry of the policy lets a packet through. */
function allows({ acls, grants }: Policy, packet: Packet): boolean {
  const byAcl = acls.some(({ src, dst, proto }) =>
    dst.some((word) => {
      const colon = word.lastIndexOf(":");
      const openings = word
        .slice(colon + 1)
        .split(",")
        .map((ports) => openingOf(PROTOCOLS[proto]!, ports));
      return (
        src.some((each) => comesFrom(each, packet)) &&
        goesTo(word.slice(0, colon), packet, src) &&
        opens(openings, packet)
      );
    }),
  );
  const byGrant = grants.some(({ src, dst, ip, via }) => {
    const openings = ip.map((each) => {
      const colon = each.indexOf(":");
      return colon < 0
        ? openingOf(DEFAULT_PROTOCOLS, each)
        : openingOf(PROTOCOLS[each.slice(0, colon)]!, each.slice(colon + 1));
    });
    return opens(openings, packet) && isGranted({ src, dst, via }, packet);
  });
  return byAcl || byGrant;
}

const BEHIND = ["10.33.4.7", "10.1.1.1", "192.168.1.9", "fd00:1::9", "9.9.9.9", "8.8.8.8", "127.0.0.1", "2001:db8::1"];

/** Packets that can come to a node: for itself, for its routes, for the internet. */
function packetsTo(to: PolicyNode, { nodes }: Tailnet, kind: Pick<Packet, "port" | "protocol">): Packet[] {
  const subnets = to.routes.filter((route) => !route.endsWith("/0"));
  const isExit = subnets.length < to.routes.length;
  const behind = BEHIND.filter(
    (address) => subnets.some((route) => inside(address, route)) || (isExit && isInternet(address)),
  );
  return [to.ipv4, to.ipv6, ...behind].flatMap((target) =>
    nodes.map((from) => ({ from, source: target.includes(":") ? from.ipv6 : from.ipv4, to, target, ...kind })),
  );
}

const kinds = fc.record({ port: fc.constantFrom(22, 85, 443), protocol: fc.constantFrom(6, 17, 1, 132) });

function compiledOf(policy: object, tailnet: Tailnet): Compiled | null {
  try {
    return new Compiled(parsePolicy(JSON.stringify(policy)), tailnet);
  } catch (error) {
    if (error instanceof PolicyError) return null;
    throw error;
  }
}

test("a packet filter lets in what some entry of the policy allows, and nothing else, and it can be found", () => {
  const seen = { open: 0, shut: 0 };
  fc.assert(
    fc.property(policies, tailnets, kinds, (policy, tailnet, kind) => {
      const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
      if (!compiled) return;
      for (const to of tailnet.nodes) {
        const filter = compiled.packetFilter(to.id);
        for (const packet of packetsTo(to, tailnet, kind)) {
          const { from, source, target, port, protocol } = packet;
          const open = passes(filter, source, target, port, protocol);
          if (open !== allows(policy, packet)) throw new Error(`${JSON.stringify(packet)}: ${open}`);
          // What is open can be found: the node, and what lies behind it.
          if (open && from !== to) expect(compiled.peers(from.id)).toContain(to.id);
          const isSubnet = to.routes.some((route) => !route.endsWith("/0") && inside(target, route));
          if (open && isSubnet) expect(compiled.routersFor(from.id, target)).not.toEqual([]);
          seen[open ? "open" : "shut"]++;
        }
      }
    }),
    { numRuns: 120 },
  );
  expect(Math.min(seen.open, seen.shut)).toBeGreaterThan(100);
});

test("a node is told only of what concerns it: its addresses, its routes, the internet for an exit node", () => {
  fc.assert(
    fc.property(policies, tailnets, (policy, tailnet) => {
      const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
      for (const { id, ipv4, ipv6, routes } of compiled ? tailnet.nodes : []) {
        const mine = [ipv4, ipv6, ...routes].map((text) => parseRange(text)!);
        for (const { SrcIPs, DstPorts } of compiled!.packetFilter(id)) {
          expect(SrcIPs).toEqual([...new Set(SrcIPs)].sort());
          expect(SrcIPs).not.toEqual([]);
          for (const { IP } of DstPorts ?? []) {
            const range = IP === "*" ? mine[0]! : parseRange(IP)!;
            expect(mine.some(({ first, last }) => range.first <= last && first <= range.last)).toBe(true);
          }
        }
      }
    }),
    { numRuns: 100 },
  );
});

test("`why` explains what is open to a node, and nothing else", () => {
  fc.assert(
    fc.property(policies, tailnets, kinds, (policy, tailnet, kind) => {
      const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
      for (const to of compiled ? tailnet.nodes : []) {
        for (const packet of packetsTo(to, tailnet, kind)) {
          const { from, target: dst, port, protocol } = packet;
          if (dst !== to.ipv4 && dst !== to.ipv6) continue;
          const reasons = why(compiled!, { src: from.id, dst, port, protocol });
          expect(reasons.length > 0).toBe(allows(policy, packet));
        }
      }
    }),
    { numRuns: 150 },
  );
});

test("capabilities are given where the grant says, and the other side hears of shares", () => {
  const DRIVE = "tailscale.com/cap/drive";
  const SHARER = "tailscale.com/cap/drive-sharer";
  const seen = { given: 0, withheld: 0 };
  const names = fc.subarray(["example.com/cap/a", DRIVE], { minLength: 1 });
  const withApps = fc.tuple(policies, fc.array(names, { minLength: 3, maxLength: 3 }));
  fc.assert(
    fc.property(withApps, tailnets, ([{ grants, ...policy }, apps], tailnet) => {
      const given = grants
        .map(({ ip: _, ...grant }, i) => ({
          ...grant,
          app: Object.fromEntries(apps[i]!.map((name) => [name, [{ i }]])),
        }))
        .filter(({ dst }) => !dst.includes("autogroup:internet"));
      const compiled = compiledOf({ ...policy, acls: [], ssh: [], grants: given }, tailnet);
      for (const to of compiled ? tailnet.nodes : []) {
        const rules = compiled!.packetFilter(to.id);
        for (const packet of packetsTo(to, tailnet, { port: 0, protocol: 6 })) {
          const { from, source, target } = packet;
          if (target !== to.ipv4 && target !== to.ipv6) continue;
          const got = rules
            .filter(({ SrcIPs }) => SrcIPs?.some((text) => text === "*" || inside(source, text)))
            .flatMap(({ CapGrant }) => CapGrant ?? [])
            .filter(({ Dsts }) => Dsts?.some((prefix) => inside(target, prefix)))
            .flatMap(({ CapMap }) => Object.entries(CapMap!).map(([name, values]) => JSON.stringify([name, values])));
          const back: Packet = { ...packet, from: to, source: target, to: from, target: source };
          const want = given.flatMap((grant) => [
            ...(isGranted(grant, packet) ? Object.entries(grant.app).map((entry) => JSON.stringify(entry)) : []),
            ...(DRIVE in grant.app && grant.dst.some((word) => isShared(word, grant, back))
              ? [JSON.stringify([SHARER, null])]
              : []),
          ]);
          expect([...new Set(got)].sort()).toEqual([...new Set(want)].sort());
          seen[want.length > 0 ? "given" : "withheld"]++;
        }
      }
    }),
    { numRuns: 150 },
  );
  expect(Math.min(seen.given, seen.withheld)).toBeGreaterThan(50);
});

/** Whether a node that a word of dst means tells one of src that it shares. Behind a router is nobody who could be told. */
function isShared(word: string, { src, via }: Grant, back: Packet): boolean {
  const there = via.length === 0 || word === "autogroup:self";
  return there && goesTo(word, back, src) && src.some((each) => comesFrom(each, back));
}

const TESTED = [
  "u1@",
  "group:g",
  "tag:a",
  "tag:b",
  "100.64.0.2",
  "100.64.0.3",
  "fd7a:115c:a1e0::2",
  "fd7a:115c:a1e0::3",
];

test("a test holds when every one of its pairs is open, or none is", () => {
  const seen = { true: 0, false: 0 };
  const subjects = fc.tuple(fc.constantFrom(...TESTED), fc.constantFrom(...TESTED), fc.constantFrom("accept", "deny"));
  fc.assert(
    fc.property(policies, tailnets, subjects, (policy, tailnet, [src, dst, want]) => {
      const shown = (word: string) =>
        tailnet.nodes.flatMap((each) =>
          [each.ipv4, each.ipv6]
            .filter((address) => holdsAddress(word, address) ?? isNode(word, each))
            .map((address) => ({ node: each, address })),
        );
      const [sources, targets] = [shown(src), shown(dst)];
      // Who has no node gets one for the time of the test, which is not known here; and families never meet.
      const hasNodes = (word: string) =>
        (USERS[word] ?? []).every((id) => tailnet.nodes.some((each) => each.tags.length === 0 && each.userId === id));
      const oneFamily = (word: string) => (word.includes("::") ? 6 : word.includes(".") ? 4 : 0);
      if (sources.length === 0 || targets.length === 0 || !hasNodes(src) || !hasNodes(dst)) return;
      if (oneFamily(src) + oneFamily(dst) === 10) return;
      const rest = { ...policy, ssh: [], tests: [] };
      if (!compiledOf(rest, tailnet)) return;
      const pairs = new Map<string, boolean>();
      for (const { node: from, address: source } of sources) {
        for (const { node: to, address: target } of targets) {
          if (source.includes(":") !== target.includes(":")) continue;
          const open = [6, 17].some((protocol) => allows(policy, { from, source, to, target, port: 22, protocol }));
          const pair = `${from.id} ${to.id}`;
          pairs.set(pair, (pairs.get(pair) ?? false) || open);
        }
      }
      const holds = [...pairs.values()].every((open) => open === (want === "accept"));
      let held = true;
      try {
        const port = dst.includes("::") ? `[${dst}]:22` : `${dst}:22`;
        checkPolicy(JSON.stringify({ ...rest, tests: [{ src, [want]: [port] }] }), tailnet);
      } catch (error) {
        if (!(error instanceof PolicyError) || error.message !== "test(s) failed") throw error;
        held = false;
      }
      expect(held).toBe(holds);
      seen[`${held}`]++;
    }),
    { numRuns: 400 },
  );
  expect(Math.min(seen.true, seen.false)).toBeGreaterThan(5);
});

const identities = fc.constantFrom("u1@", "u2@example.com", "group:g", "tag:a", "tag:b", "autogroup:member");
const sshEntries = fc.record({
  action: fc.constantFrom("accept", "check"),
  src: fc.array(identities, { minLength: 1, maxLength: 2 }),
  dst: fc.array(fc.constantFrom("tag:a", "tag:b", "autogroup:tagged", "autogroup:self"), {
    minLength: 1,
    maxLength: 2,
  }),
  users: fc.uniqueArray(fc.constantFrom("root", "autogroup:nonroot", "deploy", "localpart:*@example.com"), {
    minLength: 1,
  }),
});

test("SSH: the first rule that fits decides as the entries say, and check comes before accept", () => {
  const seen = { accept: 0, check: 0, deny: 0 };
  fc.assert(
    fc.property(fc.array(sshEntries, { maxLength: 4 }), tailnets, (ssh, tailnet) => {
      const compiled = compiledOf(
        { groups: { "group:g": ["u1@", "u3@example.org"] }, tagOwners: { "tag:a": [], "tag:b": [] }, ssh },
        tailnet,
      );
      for (const from of compiled ? tailnet.nodes : []) {
        for (const to of tailnet.nodes) {
          const local = from.tags.length === 0 && from.userId !== 3 ? `u${from.userId}` : null;
          const sameUser = from.tags.length === 0 && to.tags.length === 0 && from.userId === to.userId;
          for (const login of ["root", "deploy", "u1", "u2", "u3"]) {
            const fitting = ssh.filter(({ src, dst, users }) => {
              const byPart = users.includes("localpart:*@example.com");
              // Who may be somebody by the part of his address may be so at home, too.
              const home = sameUser && (byPart || dst.includes("autogroup:self"));
              const there = home || dst.some((word) => word !== "autogroup:self" && isNode(word, to));
              const named = users.some((word) => word === login) || (byPart && login === local);
              return (
                src.some((word) => isNode(word, from)) &&
                there &&
                (named || (login !== "root" && users.includes("autogroup:nonroot")))
              );
            });
            const want = fitting.some(({ action }) => action === "check")
              ? "check"
              : fitting.length > 0
                ? "accept"
                : "deny";
            const rule = compiled!
              .sshRules(to.id)
              .find((each) => each.principals.some(({ nodeIP }) => nodeIP === from.ipv6) && admitsLogin(each, login));
            expect(rule ? (rule.action.holdAndDelegate ? "check" : "accept") : "deny").toBe(want);
            expect(compiled!.sshDecision(from.id, to.id, login)?.action ?? "deny").toBe(want);
            seen[want]++;
          }
        }
      }
    }),
    { numRuns: 150 },
  );
  expect(Math.min(seen.accept, seen.check, seen.deny)).toBeGreaterThan(50);
});
