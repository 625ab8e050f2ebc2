import { expect, test } from "bun:test";
import fc from "fast-check";
import { PolicyAccess } from "./access.ts";
import { allocate, backfillAddresses, pickAddress, usable } from "./addresses.ts";
import type { ControlContext } from "./context.ts";
import { type Change, Model, type NodeRecord } from "./model.ts";
import { addressNumber } from "./policy/addresses.ts";
import { parsePolicy } from "./policy/index.ts";
import { makeNode, makeSettings, makeUser } from "./testing.ts";

const V4 = "100.64.0.0/10";
const V6 = "fd7a:115c:a1e0::/48";
const none = () => false;
const zeros = (n: number) => new Uint8Array(n);

function next(prefix: string, last: string, isTaken: (ip: string) => boolean = none) {
  return pickAddress(usable(prefix), { allocation: "sequential", last, random: zeros, isTaken });
}

/** A context around a model, as far as addresses need it. */
function context(
  nodes: NodeRecord[],
  prefixes: Partial<ReturnType<typeof makeSettings>["prefixes"]> = {},
  policy = "",
  random: (n: number) => Uint8Array = zeros,
): ControlContext {
  const model = new Model();
  model.apply({ users: [makeUser(1), makeUser(2)], nodes });
  const settings = makeSettings();
  return {
    model,
    settings: { ...settings, prefixes: { ...settings.prefixes, ...prefixes } },
    access: new PolicyAccess(model, parsePolicy(policy)),
    journal: { commit: async (change: Change) => void model.apply(change) },
    random,
  } as unknown as ControlContext;
}

const owner = { userId: 1, tags: [] };

test("addresses are given in order, reserved ones are left out, freed ones come last", () => {
  expect(next(V4, "")).toBe("100.64.0.1");
  expect(next(V4, "100.64.0.255")).toBe("100.64.1.0");
  expect(next(V4, "100.100.100.99")).toBe("100.100.100.101");
  expect(next(V4, "100.115.91.255")).toBe("100.115.94.0");
  expect(next(V4, "100.127.255.254")).toBe("100.64.0.1");
  expect(next(V4, "100.127.255.253", (ip) => ip !== "100.64.0.7")).toBe("100.64.0.7");
  expect(next(V6, "")).toBe("fd7a:115c:a1e0::1");
  expect(next(V6, "fd7a:115c:a1e0::52")).toBe("fd7a:115c:a1e0::54");
  expect(next(V6, "fd7a:115c:a1e0::9", (ip) => ip === "fd7a:115c:a1e0::a")).toBe("fd7a:115c:a1e0::b");
});

test("a small prefix gives each of its addresses once and then none; an address of another prefix starts anew", () => {
  const given = new Set<string>();
  for (let last = "100.64.0.9"; ; ) {
    const ip = next("100.80.5.0/29", last, (text) => given.has(text));
    if (ip === null) break;
    given.add(ip);
    last = ip;
  }
  expect([...given]).toEqual([1, 2, 3, 4, 5, 6].map((n) => `100.80.5.${n}`));
  expect(next("100.80.5.8/31", "")).toBe("100.80.5.8");
  expect(next("100.80.5.8/32", "")).toBe("100.80.5.8");
  expect(next("100.115.92.0/24", "")).toBeNull();
});

test("whatever the prefix, the way and the dice, an address is free, inside and never a reserved one", () => {
  const prefix = fc.constantFrom(V4, "100.100.100.96/28", "100.115.88.0/21", V6, "fd7a:115c:a1e0::40/123");
  fc.assert(
    fc.property(
      prefix,
      fc.constantFrom("sequential" as const, "random" as const),
      fc.infiniteStream(fc.integer({ min: 0, max: 255 })),
      (space, allocation, dice) => {
        const taken = new Set<string>();
        const random = (n: number) => Uint8Array.from({ length: n }, () => dice.next().value as number);
        let last = "";
        for (let i = 0; i < 40; i++) {
          const ip = pickAddress(usable(space), { allocation, last, random, isTaken: (text) => taken.has(text) });
          if (ip === null) break;
          expect(taken.has(ip)).toBe(false);
          expect(usable(space).has(addressNumber(ip)!)).toBe(true);
          expect(ip).not.toBe("100.100.100.100");
          expect(ip).not.toBe("fd7a:115c:a1e0::53");
          expect(/^100\.115\.9[23]\./.test(ip)).toBe(false);
          taken.add(ip);
          last = ip;
        }
        expect(taken.size).toBeGreaterThanOrEqual(13);
      },
    ),
    { numRuns: 200, seed: 1 },
  );
});

test("a tailnet of one family gives addresses of that family alone, and says when they are used up", () => {
  expect(allocate(context([], { v4: null }), owner)).toEqual({
    ipv4: "",
    ipv6: "fd7a:115c:a1e0::1",
    counters: { lastIPv6: "fd7a:115c:a1e0::1" },
  });
  const full = context([makeNode(1, { ipv4: "100.70.0.0" }), makeNode(2, { ipv4: "100.70.0.1" })], {
    v4: "100.70.0.0/31",
  });
  expect(allocate(full, owner)).toEqual({
    problem: "every address of 100.70.0.0/31 is taken: delete nodes that are not used any more",
  });
});

test("the policy's pool for a node is where its IPv4 address comes from", () => {
  const policy = JSON.stringify({
    tagOwners: { "tag:lab": [] },
    nodeAttrs: [{ target: ["tag:lab"], ipPool: ["100.90.0.0/30", "100.91.0.0/24"] }],
  });
  const ctx = context([makeNode(1, { ipv4: "100.90.0.1" }), makeNode(2, { ipv4: "100.90.0.2" })], {}, policy);
  const lab = { userId: null, tags: ["tag:lab"] };
  expect(allocate(ctx, lab)).toMatchObject({ ipv4: "100.90.0.0", ipv6: "fd7a:115c:a1e0::3" });
  expect(allocate(ctx, owner)).toMatchObject({ ipv4: "100.64.0.1" });
});

test("a backfill gives what a node lacks, takes what the tailnet has no more, and is done once", async () => {
  const nodes = [makeNode(1, { ipv6: "" }), makeNode(2), makeNode(3, { ipv6: "" })];
  const ctx = context(nodes);
  expect(await backfillAddresses(ctx)).toEqual([
    { nodeId: 1, givenName: "host-1", added: ["fd7a:115c:a1e0::1"], removed: [] },
    { nodeId: 3, givenName: "host-3", added: ["fd7a:115c:a1e0::3"], removed: [] },
  ]);
  expect(await backfillAddresses(ctx)).toEqual([]);
  const only4 = context([...ctx.model.nodes.values()], { v6: null });
  expect((await backfillAddresses(only4)).map(({ removed }) => removed)).toEqual([
    ["fd7a:115c:a1e0::1"],
    ["fd7a:115c:a1e0::2"],
    ["fd7a:115c:a1e0::3"],
  ]);
  const small = context([makeNode(1, { ipv4: "" }), makeNode(2, { ipv4: "" })], { v4: "100.70.0.0/32" });
  await expect(backfillAddresses(small)).rejects.toThrow("100.70.0.0/32 has no address left for node 2 (host-2)");
  expect(small.model.nodes.get(1)!.ipv4).toBe("");
});
