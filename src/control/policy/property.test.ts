// Random text never does worse than a PolicyError; random policies keep the promises that hold for all of them.
import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { policies, tailnets } from "./arbitraries.ts";
import { Compiled, checkPolicy, compare, PolicyError, parsePolicy } from "./index.ts";
import { passes } from "./testing.ts";
import type { Tailnet } from "./types.ts";

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

  test("another policy changes what `compare` says, and nothing else", () => {
    let changed = 0;
    fc.assert(
      fc.property(policies, policies, tailnets, (one, two, tailnet) => {
        const [before, after] = [one, two].map((each) => compiledOf({ ...each, ssh: [] }, tailnet));
        if (!before || !after) return;
        const { pairs } = compare(before, after);
        const nodes = pairs.filter(({ dst }) => !/^(route |the internet)/.test(dst.names[0]!));
        for (const src of tailnet.nodes) {
          for (const dst of tailnet.nodes) {
            if (src === dst) continue;
            const says = nodes.some(
              (row) => row.src.names.includes(`node ${src.id}`) && row.dst.names.includes(`node ${dst.id}`),
            );
            const differs = [22, 53, 80, 85, 443, 9999].some((port) =>
              [6, 17].some((protocol) => {
                const open = (each: Compiled) => passes(each.packetFilter(dst.id), src.ipv4, dst.ipv4, port, protocol);
                return open(before) !== open(after);
              }),
            );
            if (differs) {
              changed++;
              expect(says).toBe(true);
            }
          }
        }
        expect(compare(before, before)).toMatchObject({ same: true, pairs: [], changes: [] });
      }),
      { numRuns: 150 },
    );
    expect(changed).toBeGreaterThan(50);
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
