// Random text never does worse than a PolicyError; random policies keep the promises that hold for all of them.
import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { addressNumber, INTERNET, parseRange } from "./addresses.ts";
import { policies, tailnets } from "./arbitraries.ts";
import { explain } from "./explain.ts";
import { Compiled, checkPolicy, compare, PolicyError, parsePolicy } from "./index.ts";
import { passes } from "./testing.ts";
import type { PolicyNode, Tailnet } from "./types.ts";

/** True when accepted; anything but a PolicyError is a failure. */
function accepted(run: () => unknown): boolean {
  try {
    run();
    return true;
  } catch (error) {
    if (error instanceof PolicyError) return false;
    throw error;
  }
}

const ports = fc.constantFrom(22, 80, 443);

describe("any text", () => {
  test("is a policy or a PolicyError with one sentence", () => {
    const piece = fc.constantFrom(
      "{",
      "}",
      "[",
      "]",
      ",",
      ":",
      '"',
      "/*",
      "//",
      "\n",
      "acls",
      '"acls"',
      '"src"',
      "*",
      "null",
      "1e9",
      '"tag:a"',
      "\u2028",
      '\\"',
    );
    const text = fc.oneof(
      fc.string(),
      fc.array(piece, { maxLength: 30 }).map((parts) => parts.join("")),
      fc.json(),
    );
    fc.assert(
      fc.property(text, (policy) => {
        try {
          parsePolicy(policy);
        } catch (error) {
          expect(error).toBeInstanceOf(PolicyError);
          expect((error as PolicyError).message).not.toContain("\n");
        }
      }),
      { numRuns: 600 },
    );
  });

  test("put in place of any part of a good policy is a policy or a PolicyError", () => {
    const text = (policy: object) => JSON.stringify(policy);
    const cuts = fc.tuple(
      policies.map(text),
      fc.nat(),
      fc.nat(30),
      fc.oneof(fc.string(), fc.constantFrom('"', "[", "{}", "null", "-1")),
    );
    fc.assert(
      fc.property(cuts, tailnets, ([policy, at, length, insert], tailnet) => {
        const start = at % policy.length;
        accepted(() => checkPolicy(policy.slice(0, start) + insert + policy.slice(start + length), tailnet));
      }),
      { numRuns: 400 },
    );
  });
});

function isInside(text: string, address: string): boolean {
  const range = parseRange(text)!;
  const n = addressNumber(address)!;
  return range.first <= n && n <= range.last;
}

/** Whether words like "tcp, udp 22, 80-90 to 10.33.4.0/24" or "tcp * (IPv4 only)" speak of it. */
function speaks(words: string, address: string, port: number, protocol: number): boolean {
  const [, names, ports, to, but, family] =
    /^((?:tcp|udp)(?:, (?:tcp|udp))?) ([\d*, -]+?)(?: to (\S+)| but not to ([^ ]+(?:, [^ ]+)*))?(?: \(IPv([46]) only\))?$/.exec(
      words,
    ) ?? [];
  if (!names?.split(", ").includes(protocol === 6 ? "tcp" : "udp")) return false;
  if (to !== undefined && !isInside(to, address)) return false;
  if (but?.split(", ").some((part) => isInside(part, address))) return false;
  if (family !== undefined && (family === "6") !== address.includes(":")) return false;
  return ports!.split(", ").some((range) => {
    const [first, last = first] = range.split("-");
    return range === "*" || (Number(first) <= port && port <= Number(last));
  });
}

describe("any policy", () => {
  let taken = 0;

  function compiledOf(policy: object, tailnet: Tailnet): Compiled | null {
    let compiled: Compiled | null = null;
    if (
      accepted(() => {
        compiled = new Compiled(parsePolicy(JSON.stringify(policy)), tailnet);
      })
    )
      taken++;
    return compiled;
  }

  test("shows nodes to each other or to neither, and one router for each route", () => {
    fc.assert(
      fc.property(policies, tailnets, (policy, tailnet) => {
        const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
        if (!compiled) return;
        for (const { id } of tailnet.nodes) {
          const peers = compiled.peers(id);
          expect(peers).not.toContain(id);
          for (const peer of peers) expect(compiled.peers(peer)).toContain(id);
          const routes = peers.flatMap((peer) => compiled.peerView(id, peer).primaryRoutes);
          expect(new Set(routes).size).toBe(routes.length);
          compiled.sshRules(id);
        }
      }),
      { numRuns: 300 },
    );
    expect(taken).toBeGreaterThan(50);
  });

  test("means the same in any order of its rules and of the words in them", () => {
    fc.assert(
      fc.property(policies, tailnets, ports, fc.nat(), (policy, tailnet, port, turn) => {
        const turned = <T>(list: readonly T[]): T[] => list.map((_, i) => list[(i + turn) % list.length]!);
        const other = {
          ...policy,
          acls: turned(policy.acls.map((acl) => ({ ...acl, src: turned(acl.src), dst: turned(acl.dst) }))),
          grants: turned(policy.grants.map((grant) => ({ ...grant, src: turned(grant.src), dst: turned(grant.dst) }))),
        };
        const [a, b] = [policy, other].map((each) => compiledOf({ ...each, ssh: [] }, tailnet));
        expect(a === null).toBe(b === null);
        if (!a || !b) return;
        for (const src of tailnet.nodes) {
          expect(a.peers(src.id)).toEqual(b.peers(src.id));
          for (const dst of tailnet.nodes) {
            const [one, two] = [a, b].map((each) => passes(each.packetFilter(dst.id), src.ipv6, dst.ipv6, port, 17));
            expect(one).toBe(two!);
          }
        }
      }),
      { numRuns: 150 },
    );
  });

  /** The nodes that serve an address for `src`, and the route that leads there; null: an address of a node. */
  function wayTo(compiled: Compiled, src: PolicyNode, address: string): { nodes: number[]; route: string | null } {
    const owner = compiled.resolver.nodes.find(({ ipv4, ipv6 }) => ipv4 === address || ipv6 === address);
    if (owner) return { nodes: [owner.id], route: null };
    // An exit node leads to no private addresses.
    const routes = compiled.peers(src.id).flatMap((peer) =>
      compiled
        .peerView(src.id, peer)
        .allowedIPs.filter(
          (prefix) => isInside(prefix, address) && (!prefix.endsWith("/0") || INTERNET.has(addressNumber(address)!)),
        )
        .map((prefix) => ({ peer, prefix, bits: Number(prefix.split("/")[1]) })),
    );
    const longest = Math.max(...routes.map(({ bits }) => bits));
    const taken = routes.filter(({ bits }) => bits === longest);
    return { nodes: taken.map(({ peer }) => peer), route: taken[0]?.prefix ?? null };
  }

  /** Whether clients let a connection through. */
  function reaches(compiled: Compiled, src: PolicyNode, address: string, port: number, protocol: number): boolean {
    const source = address.includes(":") ? src.ipv6 : src.ipv4;
    const { nodes } = wayTo(compiled, src, address);
    return nodes.some((id) => passes(compiled.packetFilter(id), source, address, port, protocol));
  }

  const BEHIND = ["10.33.4.1", "10.9.9.9", "192.168.1.7", "fd00:1::7", "9.9.9.9", "1.1.1.1", "2606:4700::1"];
  /** Addresses of others, and those behind them. */
  const others = (src: PolicyNode, tailnet: Tailnet) =>
    [...tailnet.nodes.filter((node) => node !== src).flatMap(({ ipv4, ipv6 }) => [ipv4, ipv6]), ...BEHIND].filter(
      (address) => !src.routes.some((route) => isInside(route, address)),
    );

  test("lets through what `explain` says, and nothing else", () => {
    const seen = { yes: 0, no: 0, through: 0 };
    fc.assert(
      fc.property(policies, tailnets, (policy, tailnet) => {
        const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
        if (!compiled) return;
        for (const src of tailnet.nodes)
          for (const address of others(src, tailnet))
            for (const protocol of [6, 17, address.includes(":") ? 58 : 1]) {
              const port = [22, 80, 443][(src.id + protocol) % 3]!;
              const asked = { src: address.includes(":") ? src.ipv6 : src.ipv4, dst: `[${address}]:${port}` };
              const { verdict, rules } = explain(compiled, { ...asked, proto: String(protocol) });
              const may = reaches(compiled, src, address, port, protocol);
              expect({ asked, protocol, verdict }).toEqual({ asked, protocol, verdict: may ? "allowed" : "denied" });
              seen[verdict === "allowed" ? "yes" : "no"]++;
              if (rules.some(({ examples }) => examples[0]!.includes(" through "))) seen.through++;
            }
      }),
      { numRuns: 60 },
    );
    expect(Math.min(seen.yes, seen.no, seen.through)).toBeGreaterThan(100);
  });

  test("another policy changes what `compare` says, and nothing else", () => {
    const seen = { opened: 0, closed: 0, behind: 0 };
    fc.assert(
      fc.property(policies, policies, tailnets, (one, two, tailnet) => {
        const [before, after] = [one, two].map((each) => compiledOf({ ...each, ssh: [] }, tailnet));
        if (!before || !after) return;
        const { pairs } = compare(before, after);
        if (pairs.some(({ dst }) => dst.names.length < dst.count)) return;
        for (const src of tailnet.nodes) {
          for (const address of others(src, tailnet)) {
            const owner = tailnet.nodes.find(({ ipv4, ipv6 }) => ipv4 === address || ipv6 === address);
            const ways = [before, after].map((each) => wayTo(each, src, address).route);
            // Two ways that differ are two rows, one of which opens while the other closes.
            if (ways[0] && ways[1] && ways[0] !== ways[1]) continue;
            const route = ways[0] ?? ways[1] ?? "";
            const name = owner ? `node ${owner.id}` : route.endsWith("/0") ? "the internet" : `route ${route}`;
            const rows = pairs.filter(
              (row) => row.src.names.includes(`node ${src.id}`) && row.dst.names.includes(name),
            );
            for (const port of [22, 53, 80, 85, 443, 9999])
              for (const protocol of [6, 17]) {
                const [was, is] = [before, after].map((each) => reaches(each, src, address, port, protocol));
                const said = (kind: "opened" | "closed") =>
                  rows.some((row) => row[kind].some((words) => speaks(words, address, port, protocol)));
                const what = { src: src.id, address, port, protocol };
                expect({ ...what, opened: said("opened"), closed: said("closed") }).toEqual({
                  ...what,
                  opened: Boolean(!was && is),
                  closed: Boolean(was && !is),
                });
                if (was !== is) seen[is ? "opened" : "closed"]++;
                if (was !== is && !owner) seen.behind++;
              }
          }
        }
        expect(compare(before, before)).toMatchObject({ same: true, pairs: [], changes: [] });
      }),
      { numRuns: 60 },
    );
    expect(Math.min(seen.opened, seen.closed, seen.behind)).toBeGreaterThan(50);
  });

  test("has SSH rules only from nodes of its sources", () => {
    fc.assert(
      fc.property(policies, tailnets, (policy, tailnet) => {
        const compiled = compiledOf({ ...policy, acls: [], grants: [] }, tailnet);
        if (!compiled) return;
        const known = new Set(tailnet.nodes.flatMap(({ ipv4, ipv6 }) => [ipv4, ipv6]));
        for (const { id } of tailnet.nodes) {
          const rules = compiled.sshRules(id);
          for (const rule of rules) for (const { nodeIP } of rule.principals) expect(known.has(nodeIP)).toBe(true);
          const kinds = rules.map(({ action }) => (action.holdAndDelegate ? 0 : 1));
          expect(kinds).toEqual([...kinds].sort());
        }
      }),
      { numRuns: 200 },
    );
  });
});
