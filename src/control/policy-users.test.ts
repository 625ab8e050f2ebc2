// Who a policy means, while users and tags come and go. Scenarios of spec/headscale-features.md, section 22.1, by their names.
import { expect, test } from "bun:test";
import { PolicyAccess } from "./access.ts";
import { type Change, Model, type UserRecord } from "./model.ts";
import { PolicyError, parsePolicy } from "./policy/index.ts";
import { passes } from "./policy/testing.ts";
import { makeNode, makeUser } from "./testing.ts";

const alice = makeUser(1, { name: "alice", email: "alice@example.com" });
const bob = makeUser(2, { name: "bob", email: "bob@example.com" });
const carol = makeUser(3, { name: "carol" });

/** A tailnet under a policy: node N is user N's, and what changes is known to the policy at once. */
function tailnet(policy: object, users: UserRecord[], anyGroup = false) {
  const model = new Model();
  model.apply({ users, nodes: users.map(({ id }) => makeNode(id, { userId: id })) });
  const lines: string[] = [];
  const claimed = new Set(users.flatMap(({ groups }) => groups.map((group) => `group:${group}`)));
  const parsed = parsePolicy(JSON.stringify(policy), (name) => anyGroup || claimed.has(name));
  const access = new PolicyAccess(model, parsed, (line) => lines.push(line), { anyGroup });
  return {
    access,
    lines,
    change: (change: Change) => access.onApplied(model.apply(change)),
    reaches: (src: number, dst: number, port = 22) => {
      const [from, to] = [model.nodes.get(src)!, model.nodes.get(dst)!];
      const open = passes(access.decide(dst).filter(), from.ipv4, to.ipv4, port);
      // Who may be reached is seen, and sees.
      if (open)
        expect(access.sees(src, dst) && access.circle(src).set.has(dst) && access.circle(dst).set.has(src)).toBe(true);
      return open;
    },
  };
}

const GROUP = {
  groups: { "group:team": ["alice@", "bob@", "nobody@"] },
  acls: [{ action: "accept", src: ["group:team"], dst: ["group:team:22"] }],
};

test("ACLGroupWithUnknownUser: a user who does not exist takes nothing from the others", () => {
  const { reaches, lines } = tailnet(GROUP, [alice, bob, carol]);
  expect([reaches(1, 2), reaches(2, 1)]).toEqual([true, true]);
  expect([reaches(3, 1), reaches(1, 3), reaches(1, 2, 23)]).toEqual([false, false, false]);
  expect(lines).toEqual([]);
});

test("ACLGroupAfterUserDeletion: when a member is deleted the others go on, also under a policy that is set again", () => {
  const { access, change, reaches } = tailnet(GROUP, [alice, bob, carol]);
  change({ nodesRemoved: [2], usersRemoved: [2], nodes: [makeNode(9, { userId: 1 })] });
  expect([reaches(1, 9), reaches(9, 1), reaches(3, 1)]).toEqual([true, true, false]);
  access.replace(`${JSON.stringify(GROUP)} // again`);
  expect([reaches(1, 9), reaches(9, 1), reaches(3, 1)]).toEqual([true, true, false]);
});

test("ACLGroupDeletionExactReproduction: the same with three members, of whom the one in the middle goes", () => {
  const policy = { ...GROUP, groups: { "group:team": ["alice@", "bob@", "carol@"] } };
  const { change, reaches } = tailnet(policy, [alice, bob, carol]);
  expect([reaches(1, 2), reaches(1, 3), reaches(3, 1)]).toEqual([true, true, true]);
  change({ nodesRemoved: [2] });
  change({ usersRemoved: [2] });
  expect([reaches(1, 3), reaches(3, 1)]).toEqual([true, true]);
});

test("ACLDynamicUnknownUserAddition and Removal: an unknown name comes in and goes by a new policy, and nobody loses anything", () => {
  const members = (...names: string[]) => JSON.stringify({ ...GROUP, groups: { "group:team": names } });
  const { access, reaches } = tailnet(GROUP, [alice, bob]);
  for (const names of [
    ["alice@", "bob@"],
    ["alice@", "ghost@", "bob@"],
    ["alice@", "bob@", "x@example.net"],
    ["bob@", "alice@"],
  ]) {
    access.replace(members(...names));
    expect([reaches(1, 2), reaches(2, 1)]).toEqual([true, true]);
  }
});

test("a user who joins a group of the policy later is in it at once", () => {
  const { change, reaches } = tailnet(GROUP, [alice]);
  change({ users: [bob], nodes: [makeNode(2, { userId: 2 })] });
  expect(reaches(1, 2)).toBe(true);
});

test("ACLTagPropagation, TagPropagationPortSpecific: a tag that is changed opens and closes at once, down to the port", () => {
  const policy = {
    tagOwners: { "tag:web": [], "tag:ssh": [] },
    acls: [
      { action: "accept", src: ["alice@"], dst: ["tag:web:80"] },
      { action: "accept", src: ["alice@"], dst: ["tag:ssh:22"] },
    ],
  };
  const { change, reaches } = tailnet(policy, [alice]);
  const tags = (...list: string[]) => change({ nodes: [makeNode(9, { userId: null, tags: list })] });
  tags("tag:web");
  expect([reaches(1, 9, 80), reaches(1, 9, 22)]).toEqual([true, false]);
  tags("tag:ssh");
  expect([reaches(1, 9, 80), reaches(1, 9, 22)]).toEqual([false, true]);
  tags("tag:ssh", "tag:web");
  expect([reaches(1, 9, 80), reaches(1, 9, 22)]).toEqual([true, true]);
});

test("ACLPolicyPropagationOverTime: policies that come and go leave nothing behind", () => {
  const own = { acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] };
  const all = { acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }] };
  const { access, reaches } = tailnet(own, [alice, bob]);
  for (let round = 0; round < 5; round++) {
    access.replace(JSON.stringify(own));
    expect(reaches(1, 2)).toBe(false);
    access.replace(JSON.stringify(all));
    expect(reaches(1, 2)).toBe(true);
    access.replace(JSON.stringify({ acls: [{ action: "accept", src: ["alice@"], dst: ["bob@:22"] }] }));
    expect([reaches(1, 2), reaches(2, 1), reaches(1, 2, 80)]).toEqual([true, false, false]);
  }
});

const CLAIMED = { acls: [{ action: "accept", src: ["group:ops"], dst: ["carol@:22"] }] };

test("a group of the identity provider is one of the policy, as of each login", () => {
  const inOps = { ...bob, groups: ["ops", "/odd name"] };
  const { access, change, reaches } = tailnet(CLAIMED, [alice, inOps, carol]);
  expect([reaches(1, 3), reaches(2, 3)]).toEqual([false, true]);
  change({
    users: [
      { ...alice, groups: ["ops"] },
      { ...inOps, groups: [] },
    ],
  });
  expect([reaches(1, 3), reaches(2, 3)]).toEqual([true, false]);
  // Members that the policy names are in it as well: neither takes from the other.
  access.replace(JSON.stringify({ ...CLAIMED, groups: { "group:ops": ["bob@"] } }));
  expect([reaches(1, 3), reaches(2, 3)]).toEqual([true, true]);
  access.replace(
    JSON.stringify({
      acls: [{ action: "accept", src: ["group:ops"], dst: ["group:ops:22"] }],
      groups: { "group:ops": [] },
    }),
  );
  expect([reaches(1, 3), reaches(1, 2)]).toEqual([false, false]);
});

test("a role opens what the policy gives to it, and closes it again; nobody has one unless it was given", () => {
  const policy = {
    tagOwners: { "tag:web": ["autogroup:network-admin"] },
    acls: [{ action: "accept", src: ["autogroup:admin"], dst: ["autogroup:auditor:22"] }],
  };
  const { access, change, reaches } = tailnet(policy, [alice, bob, carol]);
  const pairs = [1, 2, 3].flatMap((src) => [1, 2, 3].filter((dst) => dst !== src).map((dst) => [src, dst] as const));
  const open = () => pairs.filter(([src, dst]) => reaches(src, dst)).map((pair) => pair.join(">"));
  expect(open()).toEqual([]);
  change({ users: [{ ...alice, role: "admin" }] });
  expect(open()).toEqual([]);
  change({ users: [{ ...carol, role: "auditor" }] });
  expect(open()).toEqual(["1>3"]);
  change({ users: [{ ...bob, role: "owner" }] });
  expect(open()).toEqual(["1>3", "2>3"]);
  change({ users: [alice, { ...bob, role: "network-admin" }] });
  expect(open()).toEqual([]);
  expect([1, 2, 3].map((userId) => access.mayClaim("tag:web", { userId }))).toEqual([false, true, false]);
});

test("a group that neither the policy nor a claim knows is refused; with an identity provider it may come to be", () => {
  const closed = tailnet({ acls: [] }, [{ ...alice, groups: ["ops"] }, carol]);
  expect(() => closed.access.replace(JSON.stringify(CLAIMED))).not.toThrow();
  const unknown = JSON.stringify({ acls: [{ action: "accept", src: ["group:osp"], dst: ["carol@:22"] }] });
  expect(() => closed.access.replace(unknown)).toThrow('group not found: "group:osp"');
  // The last of a group left: what is in force stays in force, and opens nothing.
  closed.change({ users: [alice] });
  expect(closed.reaches(1, 3)).toBe(false);

  const provided = tailnet({ acls: [] }, [bob, carol], true);
  provided.access.replace(JSON.stringify(CLAIMED));
  expect(provided.reaches(2, 3)).toBe(false);
  provided.change({ users: [{ ...bob, groups: ["ops"] }] });
  expect(provided.reaches(2, 3)).toBe(true);
});

test("a name that means two users is refused in a new policy; at the start it is logged, and opens nothing", () => {
  const twin = makeUser(4, {
    name: "alice",
    email: "alice@example.org",
    provider: "oidc",
    providerId: "https://idp.test/4",
  });
  const policy = { acls: [{ action: "accept", src: ["alice@"], dst: ["bob@:22"] }] };
  const { access, lines, reaches } = tailnet(policy, [alice, bob, twin]);
  expect(lines.join()).toContain('"alice@" means 2 users');
  expect([reaches(1, 2), reaches(4, 2)]).toEqual([false, false]);
  expect(() => access.replace(`${JSON.stringify(policy)}//`)).toThrow(PolicyError);
  const word = (src: string) => access.replace(JSON.stringify({ acls: [{ ...policy.acls[0], src: [src] }] }));
  word("alice@example.org");
  expect([reaches(1, 2), reaches(4, 2)]).toEqual([false, true]);
  word("alice@example.com");
  expect([reaches(1, 2), reaches(4, 2)]).toEqual([true, false]);
});

test("the subject of an identity provider means its user alone, before names and mail addresses", () => {
  const one = makeUser(5, { name: "x", email: "svc@example.com" });
  const other = makeUser(6, { name: "y", provider: "oidc", providerId: "svc@example.com" });
  const { reaches } = tailnet({ acls: [{ action: "accept", src: ["svc@example.com"], dst: ["alice@:22"] }] }, [
    alice,
    one,
    other,
  ]);
  expect([reaches(5, 1), reaches(6, 1)]).toEqual([false, true]);
});
