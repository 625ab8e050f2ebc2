// For tests: random tailnets and random policies for them.
import fc from "fast-check";
import { node } from "./testing.ts";
import type { Tailnet } from "./types.ts";

const TAGS = ["tag:a", "tag:b"];
const ROUTES = ["10.0.0.0/8", "10.33.0.0/16", "192.168.1.0/24", "fd00:1::/64"];
const EXIT = ["0.0.0.0/0", "::/0"];

/** Users in two domains, with nodes; routers and exit nodes among them. */
export const tailnets = fc
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

/** All kinds of words, in every place where they may stand, and in some where they may not. */
export const policies = fc
  .record({
    acls: fc.array(
      fc.record({
        action: fc.constant("accept"),
        src: few(source),
        dst: few(
          fc
            .tuple(
              fc.oneof({ arbitrary: target, weight: 15 }, fc.constant("0.0.0.0/0")),
              fc.constantFrom("*", "22", "80-90", "22,443"),
            )
            .map(([host, port]) => `${host}:${port}`),
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
