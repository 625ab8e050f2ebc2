import { expect, test } from "bun:test";
import fc from "fast-check";
import { identityOf, isRoleProvided, refusalOf, userFrom } from "./oidc.ts";
import type { OidcSettings } from "./settings.ts";
import { makeOidc, makeUser } from "./testing.ts";

const TOKEN = { iss: "https://id.example.com/", sub: "42", exp: 1_900_000_000 };
const SETTINGS = makeOidc();
const identity = (claims: Record<string, unknown>, settings: Partial<OidcSettings> = {}) =>
  identityOf(claims, TOKEN, { ...SETTINGS, ...settings });

test("domains, users and groups: each list that is not empty must be passed, and mail must be verified", () => {
  const alice = { email: "alice@example.com", email_verified: true };
  const eve = { email: "Eve@Example.com", email_verified: "true", groups: "staff" };
  const bob = { email: "bob@other.org", email_verified: true };
  const dora = { email: "dora@example.com", email_verified: "false", groups: ["staff", "ops"] };
  const tricky = { email: "example.com@evil.org", email_verified: true };
  const cases: [Partial<OidcSettings>, Record<string, unknown>, boolean][] = [
    [{}, {}, true],
    [{ allowedDomains: ["example.com"] }, alice, true],
    [{ allowedDomains: ["Example.COM"] }, eve, true],
    [{ allowedDomains: ["example.com"] }, bob, false],
    [{ allowedDomains: ["example.com"] }, tricky, false],
    [{ allowedDomains: ["example.com"] }, dora, false],
    [{ allowedDomains: ["example.com"] }, {}, false],
    [{ allowedDomains: ["example.com"], emailVerifiedRequired: false }, dora, true],
    [{ allowedUsers: ["ALICE@example.com"] }, alice, true],
    [{ allowedUsers: ["alice@example.com"] }, eve, false],
    [{ allowedGroups: ["staff"] }, eve, true],
    [{ allowedGroups: ["ops"] }, dora, true],
    [{ allowedGroups: ["Staff"] }, eve, false],
    [{ allowedGroups: ["staff"] }, alice, false],
    [{ allowedGroups: ["staff"], allowedUsers: ["alice@example.com"] }, eve, false],
    [{ allowedGroups: ["staff"], allowedDomains: ["example.com"] }, eve, true],
  ];
  for (const [settings, claims, passes] of cases)
    expect([settings, claims, refusalOf(identity(claims, settings), { ...SETTINGS, ...settings }) === null]).toEqual([
      settings,
      claims,
      passes,
    ]);
});

test("who it is comes from the token alone, whatever else is claimed; names and pictures only in usable form", () => {
  const claims = {
    iss: "https://evil.org",
    sub: "1",
    name: "A",
    preferred_username: "7 of 9",
    picture: "javascript:x",
  };
  expect(identity(claims)).toEqual({
    providerId: "https://id.example.com/42",
    name: "",
    displayName: "A",
    email: "",
    profilePicUrl: "",
    groups: [],
    policyGroups: [],
    role: null,
    expiry: 1_900_000_000_000,
  });
  expect(identity({ roles: ["b", "a", "a", 7, ""] }, { groupsClaim: "roles" }).groups).toEqual(["a", "b"]);
});

test("a subject has 1 to 255 characters; another is refused in one sentence", () => {
  const of = (sub: string) => identityOf({}, { ...TOKEN, sub }, SETTINGS).providerId;
  expect(of("x".repeat(255))).toHaveLength("https://id.example.com/".length + 255);
  expect(() => of("x".repeat(256))).toThrow("Example names a subject of 256 characters, where 1 to 255 are allowed");
  expect(() => of("")).toThrow("a subject of 0 characters");
});

test("a prefix stands before groups in the policy alone: filters and roles know them as the provider names them", () => {
  const settings = { groupsPrefix: "second/", allowedGroups: ["ops"], roles: { admin: ["ops"] } };
  const who = identity({ groups: ["ops", "oidc/ops"] }, settings);
  expect([refusalOf(who, { ...SETTINGS, ...settings }), who.role]).toEqual([null, "admin"]);
  expect(userFrom(who, undefined, 1, 0).groups).toEqual(["second/oidc/ops", "second/ops"]);
});

test("where groups give roles, the highest counts, at each login; elsewhere a role stays as it was given", () => {
  const roles = { admin: ["ops", "root"], auditor: ["audit"] };
  const roleOf = (groups: unknown) => identity({ groups }, { roles }).role;
  expect([["audit", "ops"], "audit", ["Ops"], undefined].map(roleOf)).toEqual(["admin", "auditor", "member", "member"]);
  const known = makeUser(5, { role: "owner", providerId: "https://id.example.com/42" });
  expect(userFrom(identity({ groups: ["ops"] }), known, 9, 0).role).toBe("owner");
  expect(userFrom(identity({ groups: [] }, { roles }), known, 9, 0).role).toBe("member");
  expect(userFrom(identity({ groups: ["ops"] }), undefined, 9, 0).role).toBe("member");
  const given = (issuer: string) => isRoleProvided(known, [{ ...SETTINGS, issuer, roles }]);
  expect([given("https://id.example.com"), given("https://id.example.com/other")]).toEqual([true, false]);
  expect(isRoleProvided(known, [SETTINGS])).toBe(false);
});

test("a known user keeps id and creation, and gets the rest anew; a new one gets the next id", () => {
  const who = identity({ name: "New", email: "n@example.com", email_verified: true, groups: ["g"] });
  const known = makeUser(5, { name: "old", email: "o@example.com", groups: ["h"], createdAt: 1 });
  expect(userFrom(who, known, 9, 1000)).toMatchObject({
    id: 5,
    createdAt: 1,
    name: "",
    email: "n@example.com",
    groups: ["g"],
  });
  expect(userFrom(who, undefined, 9, 1000)).toMatchObject({ id: 9, createdAt: 1000, provider: "oidc" });
});

test("whatever a provider claims, the identity is bounded and has the right types", () => {
  const names = ["name", "preferred_username", "email", "email_verified", "picture", "groups"];
  const value = fc.oneof(fc.jsonValue(), fc.string({ maxLength: 3000 }), fc.array(fc.string(), { maxLength: 2000 }));
  fc.assert(
    fc.property(fc.dictionary(fc.constantFrom(...names), value), (claims) => {
      const { groups, ...texts } = identity(claims);
      for (const text of Object.values(texts)) if (typeof text === "string") expect(text.length).toBeLessThan(2049);
      expect(groups.length).toBeLessThanOrEqual(1000);
      expect(groups.every((group) => typeof group === "string" && group.length <= 200)).toBe(true);
    }),
    { numRuns: 200, seed: 1 },
  );
});
