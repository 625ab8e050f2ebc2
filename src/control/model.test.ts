import { expect, test } from "bun:test";
import fc from "fast-check";
import { type Change, Model, type PreAuthKeyRecord } from "./model.ts";
import { makeNode, makeUser } from "./testing.ts";

function makeKey(id: number, description: string): PreAuthKeyRecord {
  return {
    id,
    prefix: `prefix${id}`,
    hash: "",
    userId: 1,
    reusable: true,
    ephemeral: false,
    used: false,
    tags: [],
    description,
    preauthorized: true,
    expiration: null,
    revokedAt: null,
    createdAt: 0,
  };
}

const id = fc.integer({ min: 1, max: 3 });
const name = fc.constantFrom("a", "b", "c", "d");
const ids = fc.array(id, { maxLength: 2 });
const records = <T>(make: (id: number, name: string) => T) =>
  fc.array(
    fc.tuple(id, name).map(([number, word]) => make(number, word)),
    { maxLength: 4 },
  );

/** Records may stand in it several times, and be set and removed at once. */
const changes: fc.Arbitrary<Change> = fc.record(
  {
    users: records((number, word) =>
      makeUser(number, { name: `${word}${number}`, providerId: word === "d" ? `https://id.test/${number}` : "" }),
    ),
    usersRemoved: ids,
    keys: records(makeKey),
    keysRemoved: ids,
    nodes: records((number, word) =>
      makeNode(number, { givenName: `${word}${number}`, ipv4: `100.64.${word.charCodeAt(0)}.${number}` }),
    ),
    nodesRemoved: ids,
    documents: records((number, word) => ({
      kind: "attributename" as const,
      id: String(number),
      value: word === "d" ? null : word.charCodeAt(0),
    })),
  },
  { requiredKeys: [] },
);

/** All that can be asked of records. */
function stateOf(model: Model) {
  const words = ["a", "b", "c", "d"];
  const names = words.flatMap((word) => [1, 2, 3].map((number) => `${word}${number}`));
  const sorted = <T>(map: ReadonlyMap<number | string, T>) => [...map].sort(([a], [b]) => (a < b ? -1 : 1));
  return {
    users: sorted(model.users),
    keys: sorted(model.keys),
    nodes: model.sortedNodes(),
    documents: sorted(model.documents("attributename")),
    userByName: names.map((each) => model.userByName(each)?.id),
    userByProviderId: [1, 2, 3].map((number) => model.userByProviderId(`https://id.test/${number}`)?.id),
    keyByPrefix: [1, 2, 3].map((number) => model.keyByPrefix(`prefix${number}`)?.description),
    nodeByName: names.map((given) => model.nodeByName(given)?.id),
    nodeByKey: [1, 2, 3].map((number) => model.nodeByKey(makeNode(number).nodeKey)?.id),
    machines: [1, 2, 3].map((number) => model.nodesOfMachine(makeNode(number).machineKey).map((node) => node.id)),
    addresses: names.map((_, i) => model.hasAddress(`100.64.${97 + Math.floor(i / 3)}.${1 + (i % 3)}`)),
  };
}

test("any change is undone by what `apply` says, also one that says two things of a record", () => {
  let seen = 0;
  fc.assert(
    fc.property(fc.array(changes, { maxLength: 3 }), changes, (before, change) => {
      const model = new Model();
      for (const each of before) model.apply(each);
      const state = stateOf(model);
      const { undo } = model.apply(change);
      if (!Bun.deepEquals(stateOf(model), state)) seen++;
      model.apply(undo);
      expect(stateOf(model)).toEqual(state);
    }),
    { numRuns: 500 },
  );
  expect(seen).toBeGreaterThan(100);
});
