// Random text never does worse than a PolicyError; random policies keep the promises that hold for all of them.
import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Compiled, checkPolicy, compare, PolicyError, parsePolicy, why } from "./index.ts";
import { node, passes } from "./testing.ts";
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

const TAGS = ["tag:a", "tag:b"];
const ROUTES = ["10.0.0.0/8", "10.33.0.0/16", "192.168.1.0/24", "fd00:1::/64"];
const EXIT = ["0.0.0.0/0", "::/0"];

const tailnets = fc
  .array(
    fc.record({
      owner: fc.constantFrom(1, 2, 3),
      tags: fc.subarray(TAGS),
      routes: fc.subarray(ROUTES),
      exit: fc.boolean(),
    }),
    { minLength: 1, maxLength: 8 },
  )
  .map(
    (nodes): Tailnet => ({
      users: [1, 2, 3].map((id) => ({ id, name: `u${id}`, email: `u${id}@example.${id === 3 ? "org" : "com"}` })),
      nodes: nodes.map(({ owner, tags, routes, exit }, i) =>
        node(i + 1, { userId: tags.length > 0 ? null : owner, tags, routes: [...routes, ...(exit ? EXIT : [])] }),
      ),
    }),
  );

const source = fc.constantFrom(
  "*",
  "u1@",
  "u2@example.com",
  "group:g",
  ...TAGS,
  "autogroup:member",
  "autogroup:tagged",
  "10.33.4.0/24",
  "100.64.0.2",
  "lan",
  "ipset:s",
  "user:*@example.com",
  "autogroup:danger-all",
);
const target = fc.constantFrom(
  "*",
  "u1@",
  "u2@example.com",
  "group:g",
  ...TAGS,
  "autogroup:member",
  "autogroup:tagged",
  "autogroup:self",
  "autogroup:internet",
  "10.33.4.0/24",
  "100.64.0.2",
  "100.64.0.0/29",
  "lan",
  "ipset:s",
  "fd7a:115c:a1e0::3",
  "9.9.9.0/24",
);
const few = <T>(items: fc.Arbitrary<T>) => fc.array(items, { minLength: 1, maxLength: 3 });

const policies = fc
  .record({
    acls: fc.array(
      fc.record({
        action: fc.constant("accept"),
        src: few(source),
        dst: few(
          fc.tuple(target, fc.constantFrom("*", "22", "80-90", "22,443")).map(([host, port]) => `${host}:${port}`),
        ),
        proto: fc.constantFrom("", "tcp", "udp"),
      }),
      { maxLength: 4 },
    ),
    grants: fc.array(
      fc.record({
        src: few(source),
        dst: few(target),
        ip: few(fc.constantFrom("*", "tcp:22", "udp:*", "80-90", "icmp:*")),
        via: fc.subarray(TAGS, { maxLength: 1 }),
      }),
      { maxLength: 3 },
    ),
    ssh: fc.array(
      fc.record({
        action: fc.constantFrom("accept", "check"),
        src: few(source),
        dst: few(target),
        users: few(fc.constantFrom("root", "autogroup:nonroot", "localpart:*@example.com", "deploy")),
      }),
      { maxLength: 2 },
    ),
    tests: fc.array(fc.record({ src: source, accept: few(target.map((host) => `${host}:22`)) }), { maxLength: 1 }),
  })
  .map((policy) => ({
    groups: { "group:g": ["u1@", "u3@example.org"] },
    hosts: { lan: "192.168.1.0/24" },
    ipsets: { "ipset:s": ["10.0.0.0/8", "remove 10.33.0.0/16"] },
    tagOwners: { "tag:a": [], "tag:b": ["tag:a"] },
    ...policy,
  }));

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

  test("lets in what `why` explains, and nothing else", () => {
    fc.assert(
      fc.property(policies, tailnets, ports, fc.constantFrom(6, 17), (policy, tailnet, port, protocol) => {
        const compiled = compiledOf({ ...policy, ssh: [] }, tailnet);
        if (!compiled) return;
        for (const src of tailnet.nodes) {
          for (const dst of tailnet.nodes) {
            if (src === dst) continue;
            const filter = compiled.packetFilter(dst.id);
            const open = passes(filter, src.ipv4, dst.ipv4, port, protocol);
            const reasons = why(compiled, { src: src.id, dst: dst.ipv4, port, protocol });
            // A rule for a node's routes names no address of that node.
            if (open) expect(reasons).not.toEqual([]);
            if (open) expect(compiled.peers(src.id)).toContain(dst.id);
            if (reasons.length > 0 && src.routes.length === 0 && dst.routes.length === 0) expect(open).toBe(true);
          }
        }
      }),
      { numRuns: 200 },
    );
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
