// The policy language by example: given these nodes and this policy, then these answers.
import { describe, expect, test } from "bun:test";
import { addressNumber } from "./addresses.ts";
import { Compiled, checkPolicy, PolicyError, parsePolicy, why } from "./index.ts";
import { compile, HOME, node, passes, TAG_OWNERS } from "./testing.ts";
import type { Tailnet } from "./types.ts";

function refusal(run: () => unknown): PolicyError {
  try {
    run();
  } catch (error) {
    if (error instanceof PolicyError) return error;
    throw error;
  }
  throw new Error("the policy was accepted");
}

const ALLOW = { action: "accept", src: ["*"], dst: ["*:*"] };
const GRANT = { src: ["*"], dst: ["*"], ip: ["*"] };
const SSH = { action: "accept", src: ["alice@"], dst: ["tag:server"], users: ["root"] };

describe("HuJSON", () => {
  test("comments, trailing commas and keys of any case are read, fields that begin with # are not", () => {
    const policy = parsePolicy(`{
      // who
      "Groups": { "group:dev": ["alice@example.com", /* and */ "bob@",], },
      "ACLs": [ { "#note": "all", "Action": "accept", "SRC": ["group:dev"], "dst": ["*:22"], }, ],
    }`);
    expect(policy.groups.get("group:dev")?.map(({ text }) => text)).toEqual(["alice@example.com", "bob@"]);
    expect(policy.accesses).toHaveLength(1);
  });

  test.each([
    [
      "a syntax error",
      '{\n  "acls": [}\n}',
      { line: 2, column: 12 },
      /^the policy is not valid HuJSON: a value is expected/,
    ],
    ["an unknown section", '{\n  "acl": []\n}', { line: 2, column: 3 }, /^json: unknown field "acl"$/],
    [
      "an unknown field",
      '{"acls": [\n {"actoin": "accept"}]}',
      { line: 2, column: 3 },
      /^json: unknown field "actoin"$/,
    ],
    [
      "a string for a list",
      '{"acls": [{"action":"accept",\n"src": "*"}]}',
      { line: 2, column: 8 },
      /^src must be a list, not a string$/,
    ],
    [
      "a key that stands twice",
      '{"hosts": {"a": "10.0.0.1",\n"a": "10.0.0.2"}}',
      { line: 2, column: 1 },
      /"a" stands twice/,
    ],
    ["a section that is refused", '{"regionalRouting": {}}', { line: 1, column: 2 }, /^regionalRouting is a service/],
    [
      "an unknown tag",
      '{"acls": [{"action":"accept","src":["*",\n  "tag:x"],"dst":[]}]}',
      { line: 2, column: 3 },
      /^src=tag not found: "tag:x"$/,
    ],
  ])("%s is reported with its place", (_, text, place, message) => {
    const error = refusal(() => parsePolicy(text));
    expect(error.message).toMatch(message);
    expect(error.place).toEqual(place);
    expect(error.describe()).toStartWith(`line ${place.line}, column ${place.column}: `);
  });

  test("an empty file and an empty object allow all, empty acls allow nothing", () => {
    for (const text of ["", "// nothing", "{}"]) {
      const compiled = new Compiled(parsePolicy(text), HOME);
      expect(passes(compiled.packetFilter(4), "100.64.0.1", "100.64.0.4", 22)).toBe(true);
    }
    const closed = new Compiled(parsePolicy('{"acls": []}'), HOME);
    expect(closed.packetFilter(4)).toEqual([]);
    expect(closed.peers(4)).toEqual([]);
  });

  test.each([
    ["size", `{"acls": [${" ".repeat(1 << 20)}]}`, /more than the 1048576 that are allowed/],
    ["depth", `${"[".repeat(10_000)}${"]".repeat(10_000)}`, /nested deeper than 64 levels/],
    [
      "a port list times many addresses",
      explosion(),
      /expands to more than 4000000 sources and destinations at grants\[0\]/,
    ],
  ])("%s is bounded", (_, text, message) => {
    expect(refusal(() => new Compiled(parsePolicy(text), CROWD)).message).toMatch(message);
  });

  describe("what explodes is refused with the entry that did it, whichever section it stands in", () => {
    const many = Array.from({ length: 500 }, (_, i) => ({ id: i + 1, name: `u${i + 1}`, email: "" }));
    const crowd = { users: many, nodes: many.map(({ id }) => node(id, { userId: id })) };
    const times = <T>(count: number, entry: T): T[] => Array.from({ length: count }, () => entry);
    const self = { action: "accept", src: ["autogroup:member"], dst: times(20, "autogroup:self:*") };
    const drive = { src: ["autogroup:member"], dst: ["autogroup:self"], app: { "tailscale.com/cap/drive": [{}] } };
    const ssh = { action: "accept", src: ["autogroup:member"], dst: ["autogroup:member"], users: ["root"] };
    const groups = { "group:all": many.map(({ name }) => `${name}@`) };
    const spots = Array.from({ length: 20_000 }, (_, i) => `10.${i >> 8}.${i & 255}.1`);
    const cases: [object, RegExp][] = [
      [{ acls: times(1000, self) }, /at acls\[\d+\]/],
      [{ grants: times(3000, drive) }, /at grants\[\d+\]/],
      [{ nodeAttrs: times(1000, { target: ["*"], attr: times(20, "x") }) }, /at nodeAttrs\[\d+\]/],
      [{ ipsets: { "ipset:a": spots, "ipset:b": times(10_000, "ipset:a") } }, /more than 2000000 ranges here/],
      [{ ipsets: { "ipset:a": spots.map((spot, i) => `${i % 2 ? "add" : "remove"} ${spot}`) } }, /2000000 ranges here/],
      [
        {
          ipsets: { "ipset:a": ["10.0.0.0/8", ...spots.slice(0, 9_999).map((spot) => `remove ${spot}`)] },
          acls: times(200, 0).map((_, i) => ({ action: "accept", src: ["*"], dst: [`ipset:a:${i + 1}`] })),
        },
        /sources and destinations at acls\[99\]/,
      ],
      [
        {
          groups: { ...groups, ...Object.fromEntries(spots.slice(0, 8200).map((_, i) => [`group:none${i}`, []])) },
          acls: spots
            .slice(0, 8200)
            .map((_, i) => ({ action: "accept", src: ["group:all", `group:none${i}`], dst: ["10.0.0.1:22"] })),
        },
        /sources and destinations at acls\[\d{4}\]/,
      ],
      [{ ssh: times(2000, ssh) }, /more than 500000 sources at ssh\[1000\]/],
      [
        { groups, tests: times(5000, { src: "group:all", accept: ["group:all:22"] }) },
        /the tests take more than 20000000 steps/,
      ],
      [
        {
          acls: spots.slice(0, 5000).map((spot) => ({ action: "accept", src: ["u1@"], dst: [`${spot}:22`] })),
          tests: times(5000, { src: "u1@", accept: ["10.0.1.1:22"] }),
        },
        /the tests take more than 20000000 steps/,
      ],
      [
        {
          groups,
          ssh: times(900, { ...ssh, dst: ["autogroup:self"] }),
          sshTests: times(5000, { src: "group:all", dst: ["group:all"], accept: ["root"] }),
        },
        /the tests take more than 20000000 steps/,
      ],
    ];
    cases.forEach(([policy, message], i) => {
      const sections = Object.keys(policy);
      test(`${sections.join(", ")} (${i + 1})`, () => {
        const error = refusal(() => checkPolicy(JSON.stringify(policy), crowd));
        expect(error.message).toMatch(message);
        if (!sections.some((key) => /tests$/i.test(key))) expect(error.place).not.toBeNull();
      });
    });
  });

  test("conditions that each of thousands of devices would have to be asked are refused", () => {
    const devices = Array.from({ length: 2000 }, (_, i) =>
      node(i + 1, { userId: 1, attributes: { "node:os": "linux" } }),
    );
    const tailnet = { users: [{ id: 1, name: "u1", email: "" }], nodes: devices };
    const postures = Object.fromEntries(
      Array.from({ length: 20 }, (_, i) => [
        `posture:p${i}`,
        Array.from({ length: 1000 }, (_, j) => `node:os != '${i} ${j}'`),
      ]),
    );
    const acls = [{ action: "accept", src: ["*"], dst: ["*:*"], srcPosture: Object.keys(postures) }];
    expect(refusal(() => checkPolicy(JSON.stringify({ postures, acls }), tailnet)).message).toMatch(
      /more than 4000000 sources and destinations at postures\["posture:p\d+"\]/,
    );
    const few = Object.fromEntries(Object.entries(postures).slice(0, 5));
    const srcPosture = Object.keys(few);
    const fine = { postures: few, acls: [{ ...acls[0], srcPosture }] };
    const compiled = new Compiled(parsePolicy(JSON.stringify(fine)), tailnet);
    expect(compiled.packetFilter(1)[0]!.SrcIPs).toHaveLength(4000);
  });

  test("an IP set of thousands of holes costs one step", () => {
    const holes = Array.from({ length: 20_000 }, (_, i) => `remove 10.${i >> 8}.${i & 255}.1`);
    const ipsets = { "ipset:a": ["10.0.0.0/8", ...holes, "10.0.1.1", "10.0.2.1", "remove 10.0.2.1"] };
    const set = parsePolicy(JSON.stringify({ ipsets })).ipsets.get("ipset:a")!;
    const has = (address: string) => set.has(addressNumber(address)!);
    expect(["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.2.1", "10.78.31.1", "11.0.0.0"].map(has)).toEqual([
      ...[false, true, true],
      ...[false, false, false],
    ]);
  });

  test("IP sets that double at each step stay small", () => {
    const ipsets = Object.fromEntries(
      Array.from({ length: 60 }, (_, i) => [
        `ipset:${i}`,
        i === 0 ? ["10.0.0.1"] : [`ipset:${i - 1}`, `ipset:${i - 1}`],
      ]),
    );
    expect(parsePolicy(JSON.stringify({ ipsets })).ipsets.get("ipset:59")!.texts()).toEqual(["10.0.0.1"]);
    const loop = { ipsets: { "ipset:a": ["ipset:b"], "ipset:b": ["ipset:a"] } };
    expect(refusal(() => parsePolicy(JSON.stringify(loop))).message).toMatch(/contains itself/);
  });
});

const CROWD: Tailnet = { users: [], nodes: Array.from({ length: 500 }, (_, i) => node(i + 1, { tags: ["tag:many"] })) };

function explosion(): string {
  const ip = Array.from({ length: 20_000 }, (_, i) => String(i + 1));
  return JSON.stringify({ tagOwners: { "tag:many": [] }, grants: [{ src: ["*"], dst: ["tag:many"], ip }] });
}

describe("packet filters", () => {
  test("a user's nodes reach a tag on one port, in both families, one way", () => {
    const compiled = compile({ acls: [{ action: "accept", src: ["alice@"], dst: ["tag:server:22"] }] });
    expect(compiled.packetFilter(4)).toEqual([
      {
        SrcIPs: ["100.64.0.1", "100.64.0.2", "fd7a:115c:a1e0::1", "fd7a:115c:a1e0::2"],
        DstPorts: [
          { IP: "100.64.0.4", Ports: { First: 22, Last: 22 } },
          { IP: "fd7a:115c:a1e0::4", Ports: { First: 22, Last: 22 } },
        ],
      },
    ]);
    expect(compiled.packetFilter(1)).toEqual([]);
    expect(compiled.peers(1)).toEqual([4]);
    expect(compiled.peers(4)).toEqual([1, 2]);
    expect(compiled.peers(3)).toEqual([]);
  });

  test("autogroup:self is each user's own nodes", () => {
    const compiled = compile({ acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] });
    expect(compiled.peers(1)).toEqual([2]);
    expect(compiled.peers(3)).toEqual([]);
    expect(passes(compiled.packetFilter(2), "100.64.0.1", "100.64.0.2", 80)).toBe(true);
    expect(passes(compiled.packetFilter(3), "100.64.0.1", "100.64.0.3", 80)).toBe(false);
  });

  test("autogroup:danger-all is every address there is, alone and beside others", () => {
    const sources = (...src: string[]) =>
      compile({ grants: [{ src, dst: ["tag:server"], ip: ["22"] }] }).packetFilter(4)[0]!.SrcIPs;
    expect(sources("autogroup:danger-all")).toEqual(["*"]);
    expect(sources("tag:exit", "autogroup:danger-all")).toEqual(["*", "100.64.0.6", "fd7a:115c:a1e0::6"]);
    const compiled = compile({ grants: [{ src: ["autogroup:danger-all"], dst: ["tag:server"], ip: ["22"] }] });
    expect(compiled.peers(4)).toEqual([1, 2, 3, 5, 6]);
    expect(passes(compiled.packetFilter(4), "192.0.2.9", "100.64.0.4", 22)).toBe(true);
  });

  test("an IP set is what was added without what was removed, in order", () => {
    const compiled = compile({
      hosts: { printer: "192.168.7.9" },
      ipsets: { "ipset:lan": ["add 192.168.7.0/28", "remove printer", "add 192.168.7.12"] },
      acls: [{ action: "accept", src: ["alice@"], dst: ["ipset:lan:80"] }],
    });
    expect(compiled.packetFilter(5)[0]!.DstPorts!.map(({ IP }) => IP)).toEqual([
      "192.168.7.0-192.168.7.8",
      "192.168.7.10-192.168.7.15",
    ]);
  });

  test("a posture lets only devices pass that meet it", () => {
    const nodes = [
      node(1, { userId: 1, attributes: { "node:os": "linux", "node:osVersion": "6.10.0" } }),
      node(2, { userId: 1, attributes: { "node:os": "macos" } }),
      node(4, { tags: ["tag:server"] }),
    ];
    const tailnet = { users: HOME.users, nodes };
    const policy = (conditions: string[]) => ({
      postures: { "posture:fine": conditions },
      acls: [{ action: "accept", src: ["autogroup:member"], srcPosture: ["posture:fine"], dst: ["tag:server:22"] }],
    });
    const sources = (...conditions: string[]) =>
      compile(policy(conditions), tailnet)
        .packetFilter(4)
        .flatMap(({ SrcIPs }) => SrcIPs ?? []);
    expect(sources("node:os == 'linux'")).toEqual(["100.64.0.1", "fd7a:115c:a1e0::1"]);
    expect(sources("node:os IN ['macos', 'ios']")).toEqual(["100.64.0.2", "fd7a:115c:a1e0::2"]);
    expect(sources("node:osVersion >= '6.9'")).toEqual(["100.64.0.1", "fd7a:115c:a1e0::1"]);
    expect(sources("node:osVersion NOT SET")).toEqual(["100.64.0.2", "fd7a:115c:a1e0::2"]);
    expect(sources("custom:tier != 'prod'")).toEqual([]);
    expect(refusal(() => compile(policy(["node:os = linux"]), tailnet)).message).toMatch(/is no condition/);
  });

  test("groups of the identity provider add to those of the policy", () => {
    const users = [{ id: 2, name: "bob", email: "", groups: ["group:ops"] }];
    const policy = {
      groups: { "group:ops": [] },
      acls: [{ action: "accept", src: ["group:ops"], dst: ["tag:server:22"] }],
    };
    expect(compile(policy, { ...HOME, users }).peers(4)).toEqual([3]);
  });

  test("a name that means two users is refused", () => {
    const users = [...HOME.users, { id: 3, name: "Alice", email: "other@example.org" }];
    const policy = { acls: [{ action: "accept", src: ["alice@"], dst: ["*:*"] }] };
    expect(refusal(() => compile(policy, { ...HOME, users })).message).toBe(
      '"alice@" means 2 users: write the mail address of one',
    );
  });
});

test("any node is a source also where addresses come from a prefix of one's own", () => {
  const own = { ...HOME, prefixes: ["10.9.0.0/16", "fd00:9::/64"] };
  const policy = parsePolicy('{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}');
  const sources = new Compiled(policy, own).packetFilter(1)[0]!.SrcIPs;
  expect(sources).toEqual(["10.9.0.0/16", "192.168.7.0/24", "fd00:9::/64"]);
});

describe("routes", () => {
  test("a subnet is shown to whom the policy lets in, an exit node to whom it lets out", () => {
    const compiled = compile({
      grants: [
        { src: ["alice@"], dst: ["192.168.7.0/24"], ip: ["*"] },
        { src: ["bob@"], dst: ["autogroup:internet"], ip: ["*"] },
      ],
    });
    expect(compiled.peerView(1, 5)).toEqual({
      allowedIPs: ["100.64.0.5/32", "fd7a:115c:a1e0::5/128", "192.168.7.0/24"],
      primaryRoutes: ["192.168.7.0/24"],
      capMap: {},
    });
    expect(compiled.peerView(3, 6).allowedIPs).toEqual(["100.64.0.6/32", "fd7a:115c:a1e0::6/128", "0.0.0.0/0", "::/0"]);
    expect(compiled.peerView(3, 6).capMap).toEqual({ "suggest-exit-node": null });
    expect(compiled.peers(1)).toEqual([5]);
    expect(compiled.peers(3)).toEqual([6]);
    expect(passes(compiled.packetFilter(6), "100.64.0.3", "9.9.9.9", 443)).toBe(true);
    expect(passes(compiled.packetFilter(6), "100.64.0.3", "192.168.7.1", 443)).toBe(false);
    // An exit node asks its filter for these when it decides whether a peer may use its DNS.
    expect(passes(compiled.packetFilter(6), "100.64.0.3", "0.0.0.0", 53)).toBe(true);
    expect(passes(compiled.packetFilter(6), "fd7a:115c:a1e0::3", "2000::", 53)).toBe(true);
    expect(passes(compiled.packetFilter(6), "100.64.0.1", "0.0.0.0", 53)).toBe(false);
  });

  test("all addresses of a family in an acl are nodes, subnets and the internet; a grant wants better words", () => {
    const compiled = compile({ acls: [{ action: "accept", src: ["bob@"], dst: ["0.0.0.0/0:*"] }] });
    expect(compiled.peers(3)).toEqual([1, 2, 4, 5, 6]);
    for (const [to, target] of [
      [4, "100.64.0.4"],
      [5, "192.168.7.9"],
      [6, "9.9.9.9"],
    ] as const)
      expect(passes(compiled.packetFilter(to), "100.64.0.3", target, 80)).toBe(true);
    expect(passes(compiled.packetFilter(4), "fd7a:115c:a1e0::3", "fd7a:115c:a1e0::4", 80)).toBe(false);
    expect(compiled.peerView(3, 5).primaryRoutes).toEqual(["192.168.7.0/24"]);
    expect(compiled.exitsOf(3)).toEqual([6].map((id) => compiled.resolver.indexOf(id)!));
    expect(compiled.exitsOf(1)).toEqual([]);
    expect(refusal(() => compile({ grants: [{ ...GRANT, dst: ["::/0"] }] })).message).toBe(
      'dst "::/0": to allow all IP addresses, use "*" or "autogroup:internet"',
    );
  });

  test("via sends each group through its own router; the primary serves the rest", () => {
    const routes = ["10.9.0.0/16"];
    const nodes = [
      node(1, { userId: 1 }),
      node(2, { userId: 2 }),
      node(5, { tags: ["tag:router"], routes }),
      node(6, { tags: ["tag:exit"], routes }),
    ];
    const policy = {
      grants: [
        { src: ["alice@"], dst: routes, ip: ["*"], via: ["tag:exit"] },
        { src: ["bob@"], dst: routes, ip: ["*"] },
      ],
    };
    const compiled = compile(policy, { ...HOME, nodes });
    expect(compiled.peerView(1, 6).primaryRoutes).toEqual(routes);
    expect(compiled.peerView(2, 5).primaryRoutes).toEqual(routes);
    expect(compiled.peers(1)).toEqual([6]);
    expect(compiled.selfView(6)).toMatchObject({ primaryRoutes: [] });
    const elected = compile(policy, { ...HOME, nodes, primaries: new Map([["10.9.0.0/16", 6]]) });
    expect(elected.peerView(2, 6).primaryRoutes).toEqual(routes);
  });

  test("routes are approved by the narrowest or wider prefix, exit nodes by their own list", () => {
    const compiled = compile({
      autoApprovers: { routes: { "10.0.0.0/8": ["tag:router"], "0.0.0.0/0": ["bob@"] }, exitNode: ["alice@"] },
    });
    const advertised = ["10.1.0.0/16", "172.16.0.0/12", "0.0.0.0/0", "::/0"];
    expect(compiled.autoApproved({ userId: null, tags: ["tag:router"] }, advertised)).toEqual(["10.1.0.0/16"]);
    expect(compiled.autoApproved({ userId: 1, tags: [] }, advertised)).toEqual(["0.0.0.0/0", "::/0"]);
    expect(compiled.autoApproved({ userId: 2, tags: [] }, advertised)).toEqual(["10.1.0.0/16", "172.16.0.0/12"]);
    expect(compiled.autoApproved({ userId: 1, tags: ["tag:server"] }, advertised)).toEqual([]);
  });
});

describe("capabilities", () => {
  test("nodeAttrs reach their targets, switches all", () => {
    const compiled = compile({
      randomizeClientPort: true,
      nodeAttrs: [
        { target: ["tag:server"], attr: ["funnel"] },
        { target: ["alice@"], attr: ["disable-ipv4"], app: { "example.com/app": [{ a: 1 }] } },
        { target: ["100.64.0.1"], app: { "example.com/app": [{ a: 2 }] } },
      ],
    });
    expect(Object.keys(compiled.capabilities(4))).toEqual([
      "randomize-client-port",
      "funnel",
      "https://tailscale.com/cap/funnel-ports?ports=443,8443,10000",
      "https://tailscale.com/cap/warn-funnel-no-https",
    ]);
    expect(compiled.capabilities(1)["example.com/app"]).toEqual([{ a: 1 }, { a: 2 }]);
    expect(compiled.capabilities(2)["example.com/app"]).toEqual([{ a: 1 }]);
    expect(compiled.selfView(1).allowedIPs).toEqual(["fd7a:115c:a1e0::1/128"]);
    expect(compiled.peerView(3, 1).allowedIPs).toEqual(["fd7a:115c:a1e0::1/128"]);
  });

  test("addresses of new nodes come from the pool of their owner or tag", () => {
    const compiled = compile({ nodeAttrs: [{ target: ["tag:server"], ipPool: ["100.81.0.0/16"] }] });
    expect(compiled.addressPools({ userId: null, tags: ["tag:server"] })).toHaveLength(1);
    expect(compiled.addressPools({ userId: 1, tags: [] })).toEqual([]);
  });
});

describe("tests of the policy", () => {
  const check = (policy: object, tailnet: Tailnet = HOME) =>
    checkPolicy(JSON.stringify({ tagOwners: TAG_OWNERS, ...policy }), tailnet);
  const acls = [{ action: "accept", src: ["alice@"], dst: ["tag:server:22"] }];
  const ssh = [{ action: "check", src: ["alice@"], dst: ["tag:server"], users: ["autogroup:nonroot"] }];

  const FAILED = "test(s) failed";

  test("what holds is accepted, also on a tailnet without nodes", () => {
    const tests = [{ src: "alice@", accept: ["tag:server:22"], deny: ["tag:server:80", "alice@:22"] }];
    const sshTests = [{ src: "alice@", dst: ["tag:server"], check: ["deploy"], deny: ["root"] }];
    expect(() => check({ acls, ssh, tests, sshTests })).not.toThrow();
    expect(() => check({ acls, ssh, tests, sshTests }, { users: HOME.users, nodes: [] })).not.toThrow();
  });

  test("speaks of somebody: `*` and autogroups are no source and no destination", () => {
    const open = { acls: [ALLOW] };
    for (const word of ["*", "autogroup:member", "autogroup:tagged", "autogroup:self", "autogroup:internet"]) {
      const failed = [
        { src: word, accept: ["tag:exit:22"] },
        ...["accept", "deny"].map((want) => ({ src: "alice@", [want]: [`${word}:22`] })),
      ];
      expect(refusal(() => check({ ...open, tests: failed })).failures.map(({ errors }) => errors.length)).toEqual([
        1, 1, 1,
      ]);
    }
  });

  test("speaks for people who are yet to come, by their name or as members of a group", () => {
    const policy = {
      groups: { "group:new": ["alice@", "carol@example.com"], "group:nobody": [] },
      acls: [{ action: "accept", src: ["group:new", "dave@"], dst: ["tag:server:22", "dave@:80"] }],
    };
    const judge = (test: object) => () => check({ ...policy, tests: [test] });
    for (const src of ["carol@example.com", "group:new", "dave@"])
      expect(judge({ src, accept: ["tag:server:22", "dave@:80"], deny: ["tag:server:80"] })).not.toThrow();
    expect(judge({ src: "erin@example.com", deny: ["tag:server:22", "carol@example.com:22"] })).not.toThrow();
    expect(refusal(judge({ src: "erin@example.com", accept: ["tag:server:22"] })).message).toBe(FAILED);
    expect(refusal(judge({ src: "group:nobody", deny: ["tag:server:80"] })).message).toBe(FAILED);
  });

  test("what asks for nothing holds, as long as it says for whom", () => {
    const asks = (src: string) => ({ tests: [{ src }], sshTests: [{ src }, { src, dst: ["tag:server"] }] });
    expect(() => check({ acls, ssh, ...asks("alice@"), sshTests: [{ src: "alice@", deny: ["root"] }] })).not.toThrow();
    expect(() => check({ acls, ssh, ...asks("tag:server") })).not.toThrow();
    expect(refusal(() => check({ acls, ssh, ...asks("tag:nobody") })).failures.length).toBe(3);
  });

  test("a test says which device it imagines where rules ask for postures", () => {
    const policy = {
      postures: { "posture:mac": ["node:os == 'macos'", "node:tsVersion >= '1.90'"] },
      acls: [{ ...acls[0]!, srcPosture: ["posture:mac"] }],
    };
    const mac = { "node:os": "macos", "node:tsVersion": "1.100.1" };
    const test = (srcPostureAttrs: object) => ({ src: "alice@", srcPostureAttrs, accept: ["tag:server:22"] });
    expect(() => check({ ...policy, tests: [test(mac)] })).not.toThrow();
    for (const other of [{ "node:os": "linux" }, { ...mac, "node:tsVersion": "1.9" }, {}])
      expect(refusal(() => check({ ...policy, tests: [test(other)] })).message).toBe("test(s) failed");
    expect(refusal(() => check({ ...policy, tests: [test({ os: "x" })] })).message).toContain('"os" is no attribute');
  });

  test("speaks for users, groups, tags and addresses, not for everybody; and an address for one family", () => {
    const open = { acls: [ALLOW] };
    for (const src of ["alice@", "tag:server", "100.64.0.1", "fd7a:115c:a1e0::1"])
      expect(() => check({ ...open, tests: [{ src, accept: ["tag:exit:22"] }] })).not.toThrow();
    for (const src of ["*", "autogroup:member", "autogroup:tagged", "100.64.0.1/32", ""])
      expect(refusal(() => check({ ...open, tests: [{ src, accept: ["tag:exit:22"] }] })).message).toBe(FAILED);
    for (const deny of ["[2001:db8::1]:80", "[fd7a:115c:a1e0::4]:22"])
      expect(refusal(() => check({ acls, tests: [{ src: "100.64.0.2", deny: [deny] }] })).message).toBe(FAILED);
    expect(() => check({ acls, tests: [{ src: "100.64.0.2", deny: ["192.0.2.1:80"] }] })).not.toThrow();
    const out = { acls: [{ ...ALLOW, src: ["bob@"], dst: ["autogroup:internet:*"] }] };
    const resolvers = ["8.8.8.8:53", "[2001:4860:4860::8888]:53"];
    expect(() => check({ ...out, tests: [{ src: "bob@", accept: resolvers, deny: ["10.0.0.1:53"] }] })).not.toThrow();
    expect(() => check({ ...out, tests: [{ src: "alice@", deny: resolvers }] })).not.toThrow();
  });

  test("what fails is named, test by test", () => {
    const tests = [
      { src: "bob@", accept: ["tag:server:22"] },
      { src: "alice@", deny: ["tag:server:22", "10.0.0.0/8:22"] },
    ];
    const sshTests = [{ src: "alice@", dst: ["tag:server"], accept: ["deploy"] }];
    const error = refusal(() => check({ acls, ssh, tests, sshTests }));
    expect(error.message).toBe("test(s) failed");
    expect(error.failures).toEqual([
      { user: "bob@", errors: ['address "tag:server:22": want: Accept, got: Drop'] },
      {
        user: "alice@",
        errors: [
          'address "tag:server:22": want: Drop, got: Accept',
          'address "10.0.0.0/8:22": "10.0.0.0/8" is no single address',
        ],
      },
      { user: "alice@", errors: ['user "deploy" on "tag:server": want: accept, got: check'] },
    ]);
    expect(error.describe()).toContain('\n  bob@: address "tag:server:22": want: Accept, got: Drop');
  });
});

describe("why", () => {
  const compiled = compile({
    acls: [
      { action: "accept", src: ["alice@"], dst: ["tag:server:22"] },
      { action: "accept", src: ["autogroup:member"], dst: ["tag:server:20-30", "192.168.7.0/24:443"] },
      { action: "accept", src: ["bob@"], dst: ["autogroup:internet:*"] },
    ],
  });

  test("names each entry that allows it, and the router in between", () => {
    const rules = (src: number, dst: string, port: number) =>
      why(compiled, { src, dst, port }).map(({ access, router }) => [access?.index, router]);
    expect(rules(1, "100.64.0.4", 22)).toEqual([
      [0, null],
      [1, null],
    ]);
    expect(rules(3, "fd7a:115c:a1e0::4", 22)).toEqual([[1, null]]);
    expect(rules(3, "192.168.7.20", 443)).toEqual([[1, 5]]);
    expect(rules(3, "9.9.9.9", 53)).toEqual([[2, 6]]);
    expect(why(compiled, { src: 1, dst: "100.64.0.4", port: 22 })[0]!.text).toBe("allowed by acls[0], line 1");
  });

  test("is empty where nothing allows it", () => {
    expect(why(compiled, { src: 3, dst: "100.64.0.4", port: 31 })).toEqual([]);
    expect(why(compiled, { src: 4, dst: "100.64.0.1", port: 22 })).toEqual([]);
    expect(why(compiled, { src: 1, dst: "9.9.9.9", port: 53 })).toEqual([]);
    expect(why(compiled, { src: 1, dst: "100.64.0.4", port: 22, protocol: 132 })).toEqual([]);
    expect(why(compiled, { src: 99, dst: "100.64.0.4", port: 22 })).toEqual([]);
  });

  test("says so when there is no policy at all", () => {
    const [reason] = why(new Compiled(parsePolicy(""), HOME), { src: 1, dst: "100.64.0.4", port: 22 });
    expect(reason!.text).toBe("allowed: the policy has neither acls nor grants, so all may reach all");
  });
});

describe("refusals", () => {
  test.each([
    [
      "a negative port",
      { acls: [{ ...ALLOW, dst: ["tag:server:-1"] }] },
      'dst="tag:server:-1": port range "-1": invalid first integer',
    ],
    [
      "an inverted range",
      { acls: [{ ...ALLOW, dst: ["*:9-8"] }] },
      'dst="*:9-8": port range "9-8": first port must be >= last port',
    ],
    [
      "an unknown protocol",
      { acls: [{ ...ALLOW, proto: "quic" }] },
      'proto name "quic" not known; use protocol number 0-255',
    ],
    [
      "a host as SSH source",
      { hosts: { h: "10.0.0.1" }, ssh: [{ action: "accept", src: ["h"], dst: ["tag:server"], users: ["root"] }] },
      'invalid src "h"',
    ],
    [
      "a tag as source of an SSH check",
      { ssh: [{ action: "check", src: ["tag:server"], dst: ["tag:server"], users: ["root"] }] },
      '"check" action does not support tags in src',
    ],
    ["an unknown tag as SSH source", { ssh: [{ ...SSH, src: ["tag:nobody"] }] }, 'tag not found: "tag:nobody"'],
    ["an unknown tag as SSH destination", { ssh: [{ ...SSH, dst: ["tag:nobody"] }] }, 'tag not found: "tag:nobody"'],
    [
      "all addresses as SSH destination",
      { ssh: [{ ...SSH, dst: ["autogroup:danger-all"] }] },
      'invalid dst "autogroup:danger-all"',
    ],
    [
      "guests as SSH source",
      { ssh: [{ action: "check", src: ["alice@", "autogroup:shared"], dst: ["tag:server"], users: ["root"] }] },
      '"autogroup:shared" is not allowed in src',
    ],
    [
      "all tagged nodes as source of an SSH check",
      { ssh: [{ action: "check", src: ["alice@", "autogroup:tagged"], dst: ["tag:server"], users: ["root"] }] },
      '"check" action does not support tags in src',
    ],
    [
      "the internet as SSH source",
      { ssh: [{ action: "accept", src: ["autogroup:internet"], dst: ["tag:server"], users: ["root"] }] },
      '"autogroup:internet" is not allowed in src',
    ],
    [
      "a list of ports in a grant",
      { grants: [{ ...GRANT, ip: ["22,80"] }] },
      'port range "22,80": invalid first integer',
    ],
    ["a port list without ports", { acls: [{ ...ALLOW, dst: ["*:"] }] }, 'dst="*:": invalid port list: ""'],
    [
      "two destinations in one word",
      { acls: [{ ...ALLOW, dst: ["tag:server,tag:exit:22"] }] },
      'dst="tag:server,tag:exit:22": host cannot contain a comma (",")',
    ],
    [
      "a destination without port",
      { acls: [{ ...ALLOW, dst: ["100.64.0.1"] }] },
      'dst="100.64.0.1": hostport must contain a colon (":")',
    ],
    [
      "a destination with port where none belongs",
      { grants: [{ ...GRANT, dst: ["192.168.0.6:3690"] }] },
      'dst="192.168.0.6:3690": host name must not contain colon (:)',
    ],
    [
      "a capability without a path",
      { grants: [{ ...GRANT, app: { "example.com": [] } }] },
      "capability name must have the form {domain}/{path}",
    ],
    ["an owner of a tag that is nobody", { tagOwners: { "tag:a": ["autogroup:self"] } }, /no user, group or tag$/],
    ["a tag without a name", { tagOwners: { "tag:": [] } }, 'tagOwners["tag:"]: tag names must not be empty'],
    [
      "a foreign domain as approver",
      { autoApprovers: { exitNode: ["user:*@example.net"] } },
      /^example.net is not associated with this Tailnet/,
    ],
    [
      "a domain where everybody may have an account",
      { ssh: [{ ...SSH, users: ["localpart:*@team.org.github"] }] },
      "team.org.github is a shared domain and cannot be used in user:*@<domain> expressions",
    ],
    [
      "a unit that does not exist",
      {
        ssh: [{ action: "check", src: ["alice@"], dst: ["tag:server"], users: ["root"], checkPeriod: "1h 30m" }],
      },
      'time: unknown unit "h " in duration "1h 30m"',
    ],
    [
      "a role as source of an SSH test",
      { sshTests: [{ src: "autogroup:admin", dst: ["tag:server"], deny: ["root"] }] },
      'SSH tests src contains disallowed element "autogroup:admin"',
    ],
    [
      "everybody as destination of an SSH test",
      { sshTests: [{ src: "alice@", dst: ["tag:server", "*"], deny: ["root"] }] },
      'SSH tests dst contains disallowed element "*"',
    ],
    [
      "another user's node by SSH",
      { ssh: [{ action: "accept", src: ["bob@"], dst: ["alice@"], users: ["root"] }] },
      "users in dst are only allowed from the same user",
    ],
    [
      "a user's node by SSH from a tag",
      { ssh: [{ action: "accept", src: ["tag:server"], dst: ["autogroup:member"], users: ["root"] }] },
      "users in dst are only allowed from the same user",
    ],
    [
      "a recursive group of two",
      { groups: { "group:a": ["group:b"], "group:b": ["bob@"] } },
      'groups["group:a"]: "group:b": group members cannot be recursive',
    ],
    ["a group without its prefix", { groups: { dev: [] } }, 'groups["dev"]: group names must start with "group:"'],
    ["a host that is no address", { hosts: { h: "10.0.0.300" } }, 'hosts["h"]: "10.0.0.300" is no IP address or CIDR'],
    [
      "a region without nodes",
      { derpMap: { Regions: { "900": { RegionID: 900, Nodes: [] } } } },
      "derpMap: Regions.900.Nodes: Too small: expected array to have >=1 items",
    ],
    [
      "a derpMap that leaves no relay",
      { derpMap: { OmitDefaultRegions: true, Regions: { "1": null } } },
      "derpMap: OmitDefaultRegions without a region of its own leaves no relay",
    ],
    [
      "an unknown field of derpMap",
      { derpMap: { OmitDefaultRegion: true } },
      'json: unknown field "OmitDefaultRegion"',
    ],
    [
      "an approver of services who is nobody",
      { autoApprovers: { services: { "svc:web": ["*"] } } },
      'autoApprovers.services["svc:web"]: "*" is no user, group or tag',
    ],
    [
      "a service without a name",
      { autoApprovers: { services: { web: [] } } },
      'autoApprovers.services: "web" is no service like "svc:web", or tag',
    ],
    [
      "a posture that is not there",
      { acls: [{ ...ALLOW, srcPosture: ["posture:x"] }] },
      'posture not found: "posture:x"',
    ],
  ])("%s", (_, policy, message) => {
    const said = refusal(() => compile(policy)).message;
    if (typeof message === "string") expect(said).toBe(message);
    else expect(said).toMatch(message);
  });

  test("ports of a protocol without ports are told to the nodes as written, and open nothing but pings", () => {
    const of = (access: object) => {
      const compiled = compile(access);
      const open = (protocol: number) => why(compiled, { src: 1, dst: "100.64.0.4", port: 80, protocol }).length;
      return [compiled.packetFilter(4)[0], open(1), open(47)];
    };
    const rule = (protocol: number) => ({
      SrcIPs: ["100.64.0.1", "100.64.0.2", "fd7a:115c:a1e0::1", "fd7a:115c:a1e0::2"],
      DstPorts: ["100.64.0.4", "fd7a:115c:a1e0::4"].map((IP) => ({ IP, Ports: { First: 80, Last: 80 } })),
      IPProto: [protocol],
    });
    const acl = (proto: string) => ({ acls: [{ action: "accept", src: ["alice@"], dst: ["tag:server:80"], proto }] });
    const grant = (ip: string) => ({ grants: [{ src: ["alice@"], dst: ["tag:server"], ip: [ip] }] });
    for (const access of [acl("icmp"), grant("icmp:80")]) expect(of(access)).toEqual([rule(1), 1, 0]);
    for (const access of [acl("gre"), grant("47:80")]) expect(of(access)).toEqual([rule(47), 0, 0]);
    expect(of({ ...acl("gre"), ...grant("gre:*") }).slice(1)).toEqual([0, 1]);
  });

  test("a period of checks says nothing where none is made, but is read", () => {
    const rules = (rest: object) => compile({ ssh: [{ ...SSH, ...rest }] }).sshRules(4);
    expect(rules({ checkPeriod: "1h" })).toEqual(rules({}));
    expect(rules({}).length).toBe(1);
    expect(() => rules({ checkPeriod: "1 hour" })).toThrow("time: unknown unit");
  });

  test("a protocol may be a number, 0 is none, and null is nothing anywhere", () => {
    const protocolOf = (proto: unknown) => compile({ acls: [{ ...ALLOW, proto }] }).packetFilter(1)[0]!.IPProto;
    expect([6, "06", "TCP", "0", null, ""].map(protocolOf)).toEqual([[6], [6], [6], undefined, undefined, undefined]);
    const nothing = { groups: { "group:a": null }, acls: null, ssh: [{ ...SSH, acceptEnv: null, checkPeriod: null }] };
    expect(compile({ ...nothing, randomizeClientPort: null }).peers(1)).toEqual([]);
  });
});
