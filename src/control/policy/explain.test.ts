import { describe, expect, test } from "bun:test";
import { compare } from "./compare.ts";
import { explain } from "./explain.ts";
import { Compiled, PolicyError, parsePolicy } from "./index.ts";
import { compile, HOME, node, TAG_OWNERS } from "./testing.ts";
import type { Tailnet } from "./types.ts";

const NAMES = ["laptop", "phone", "desktop", "server", "router", "exit"];
const NAMED: Tailnet = { ...HOME, nodes: HOME.nodes.map((each, i) => ({ ...each, name: NAMES[i]! })) };

describe("why, in words of the policy", () => {
  const text = `{
    "tagOwners": { "tag:server": [], "tag:router": [], "tag:exit": [] },
    "groups": { "group:dev": ["alice@"] },
    "hosts": { "office": "192.168.7.0/24" },
    "acls": [
      // developers
      { "action": "accept", "src": ["group:dev"], "dst": ["tag:server:22,443"], "proto": "tcp" },
      { "action": "accept", "src": ["bob@"], "dst": ["tag:server:80"] },
      { "action": "accept", "src": ["alice@"], "dst": ["office:*", "autogroup:self:*"] },
      { "action": "accept", "src": ["100.64.0.3"], "dst": ["100.64.0.1:5000"] },
    ],
  }`;
  const compiled = new Compiled(parsePolicy(text), NAMED);
  const ask = (src: string, dst: string, proto?: string) => explain(compiled, { src, dst, proto });

  test("names the entry with its line of the policy, for names, users, tags and addresses alike", () => {
    for (const src of ["laptop", "laptop.net.test.", "100.64.0.1", "fd7a:115c:a1e0::1"]) {
      for (const dst of ["server:22", "100.64.0.4:22", "[fd7a:115c:a1e0::4]:22", "tag:server:22"]) {
        if (src.includes(".0.") && dst.includes("fd7a")) continue;
        if (src.startsWith("fd7a") && dst.includes("100.")) continue;
        const { verdict, rules } = ask(src, dst);
        expect(verdict).toBe("allowed");
        expect(rules).toHaveLength(1);
        expect(rules[0]!.rule).toEqual({
          section: "acls",
          index: 0,
          place: { line: 7, column: 7 },
          line: '{ "action": "accept", "src": ["group:dev"], "dst": ["tag:server:22,443"], "proto": "tcp" },',
        });
      }
    }
    const users = ask("group:dev", "tag:server:443");
    expect(users).toMatchObject({ verdict: "allowed", pairs: 2, allowed: 2, protocol: "tcp", port: 443 });
    expect(users.rules[0]!.examples).toEqual([
      "laptop (100.64.0.1) -> server (100.64.0.4)",
      "phone (100.64.0.2) -> server (100.64.0.4)",
    ]);
    expect(ask("phone", "autogroup:self:9")).toMatchObject({ verdict: "allowed", pairs: 1 });
    expect(ask("laptop", "office:80").rules[0]!.examples).toEqual([
      "laptop (100.64.0.1) -> 192.168.7.1 through router (100.64.0.5)",
    ]);
  });

  test("a node is not taken for a user, host or prefix that begins with its name", () => {
    const names = ["bob", "office", "100", "10", "alice", "laptop"];
    const nodes = HOME.nodes.map((each, i) => ({ ...each, name: names[i]! }));
    const users = HOME.users.map((user) => ({ ...user, email: `${user.name}.smith@example.com` }));
    const text = `{ "hosts": { "office.berlin": "192.168.7.0/24" }, "acls": [] }`;
    const other = new Compiled(parsePolicy(text), { ...HOME, nodes, users });
    const denied = (src: string, dst: string) => explain(other, { src, dst }).denied;
    expect(denied("bob.smith@example.com", "office.net.test:1")).toEqual(["100 (100.64.0.3) -> office (100.64.0.2)"]);
    expect(denied("bob", "office.berlin:1")).toEqual(["bob (100.64.0.1) -> 192.168.7.1"]);
    expect(denied("bob", "10.0.0.0/8:1")).toEqual(["bob (100.64.0.1) -> 10.0.0.1"]);
  });

  test("says of what nothing allows which entries came nearest, and what they miss", () => {
    const { verdict, denied, nearest } = ask("desktop", "server:22");
    expect(verdict).toBe("denied");
    expect(denied).toEqual(["desktop (100.64.0.3) -> server (100.64.0.4)"]);
    expect(nearest.map(({ rule, misses }) => [rule.index, misses])).toEqual([
      [1, ["its ports are 80"]],
      [0, ["its src does not hold desktop (100.64.0.3)"]],
      [3, ["its dst does not hold server (100.64.0.4)", "its ports are 5000"]],
    ]);
    expect(ask("laptop", "server:22", "udp").nearest[0]!.misses).toEqual(["its protocol is tcp"]);
    // An address means just that one.
    expect(ask("desktop", "[fd7a:115c:a1e0::1]:5000")).toMatchObject({ verdict: "denied" });
    expect(ask("desktop", "laptop:5000")).toMatchObject({ verdict: "allowed" });
  });

  test("the internet by an exit node is not the subnet behind it, and an address that is switched off goes nowhere", () => {
    const nodes = [
      ...HOME.nodes.slice(0, 4),
      node(5, { tags: ["tag:router"], routes: ["192.168.7.0/24", "0.0.0.0/0"] }),
    ];
    const more = { grants: [{ src: ["*"], dst: ["autogroup:internet", "tag:server"], ip: ["*"] }] };
    const attributes = { nodeAttrs: [{ target: ["100.64.0.4"], attr: ["disable-ipv4"] }] };
    const verdict = (dst: string, extra = {}) =>
      explain(compile({ ...more, ...extra }, { ...HOME, nodes }), { src: "100.64.0.3", dst }).verdict;
    expect([verdict("1.1.1.1:53"), verdict("192.168.7.5:22")]).toEqual(["allowed", "denied"]);
    expect([verdict("100.64.0.4:22"), verdict("100.64.0.4:22", attributes)]).toEqual(["allowed", "denied"]);
  });

  test("of what comes nearest the three best, each with all that it misses; what has nothing to do with it is not near", () => {
    const nodes = [
      node(1, { userId: 1, attributes: { "node:os": "linux" } }),
      node(2, { tags: ["tag:server"], userId: 1 }),
      node(3, { tags: ["tag:router"], routes: ["192.168.7.0/24"] }),
    ].map((each, i) => ({ ...each, name: ["laptop", "server", "router"][i]! }));
    const nearest = (grants: object[], dst: string) => {
      const near = compile({ postures: { "posture:mac": ["node:os == 'macos'"] }, grants }, { ...HOME, nodes });
      return explain(near, { src: "laptop", dst }).nearest.map(({ misses }) => misses);
    };
    const grant = (more: object) => ({ src: ["alice@"], dst: ["tag:server"], ip: ["22"], ...more });
    const laptop = "laptop (100.64.0.1)";
    expect(nearest([grant({ srcPosture: ["posture:mac"] })], "server:22")).toEqual([
      [`${laptop} meets none of its postures (posture:mac)`],
    ]);
    expect(nearest([{ ...grant({ app: { "example.com/cap/x": null } }), ip: undefined }], "server:22")).toEqual([
      ["it gives capabilities and opens no port"],
    ]);
    expect(nearest([grant({ src: ["100.64.0.1"] })], "[fd7a:115c:a1e0::2]:22")).toEqual([
      ["its addresses are of another family, or no router serves the target"],
    ]);
    expect(nearest([grant({ dst: ["192.168.7.0/24"], via: ["tag:server"] })], "192.168.7.9:22")).toEqual([
      ["it goes through routers with tag:server"],
    ]);
    expect(nearest([grant({ dst: ["autogroup:internet"] })], "192.168.7.9:22")).toEqual([
      ["its dst does not hold 192.168.7.9"],
    ]);
    const unrelated = { src: ["bob@"], dst: ["tag:router"], ip: ["22"] };
    const ports = ["1", "2", "3", "4"].map((ip) => grant({ ip: [ip] }));
    expect(nearest([unrelated, ...ports, grant({ src: ["bob@"], ip: ["*"] })], "server:22")).toEqual([
      ["its ports are 1"],
      ["its ports are 2"],
      ["its ports are 3"],
    ]);
    expect(nearest([unrelated], "server:22")).toEqual([]);
  });

  test("asks of each thing what it stands for: nodes in a range, the internet, nobody's own nodes", () => {
    const tagged = { ...NAMED, nodes: NAMED.nodes.map((each) => (each.id === 4 ? { ...each, userId: 1 } : each)) };
    const other = new Compiled(parsePolicy(text), tagged);
    expect(() => explain(other, { src: "server", dst: "autogroup:self:22" })).toThrow("the same node");
    expect(ask("laptop", "100.64.0.2/31:22")).toMatchObject({
      pairs: 2,
      denied: ["laptop (100.64.0.1) -> desktop (100.64.0.3)"],
    });
    expect(ask("laptop", "autogroup:internet:443").denied).toEqual(["laptop (100.64.0.1) -> the internet (1.1.1.1)"]);
    expect(() => ask("laptop", "server:22,80")).toThrow("ask about a single port");
    const long = new Compiled(parsePolicy(text.replace('"bob@"', `"bob@"${" ".repeat(300)}`)), NAMED);
    const [entry] = explain(long, { src: "desktop", dst: "server:80" }).rules;
    expect(entry!.rule!.line).toHaveLength(201);
    expect(entry!.rule!.line).toEndWith("…");
  });

  test("counts where only some may", () => {
    expect(ask("autogroup:member", "server:80")).toMatchObject({ verdict: "partly", pairs: 3, allowed: 1 });
  });

  test("explains the policy that has no rules, and refuses what means nothing", () => {
    const open = new Compiled(parsePolicy(""), NAMED);
    expect(explain(open, { src: "desktop", dst: "server:1" })).toMatchObject({
      verdict: "allowed",
      rules: [{ rule: null }],
    });
    const wrong: [string, string, string][] = [
      ["nobody", "server:22", '"nobody" is no address, node, user'],
      ["laptop", "server", "is no target: write one like"],
      ["laptop", "server:22-24", "ask about a single port"],
      ["laptop", "laptop:22", "the same node"],
      ["192.0.2.1", "server:22", "is no node: only nodes"],
      ["laptop", "nobody@:22", "stands for no node"],
    ];
    for (const [src, dst, message] of wrong) {
      expect(() => ask(src, dst)).toThrow(PolicyError);
      expect(() => ask(src, dst)).toThrow(message);
    }
    expect(() => ask("laptop", "server:22", "quic")).toThrow('proto name "quic" not known');
  });

  test("is bounded where there are many pairs", () => {
    const nodes = Array.from({ length: 300 }, (_, i) => node(i + 1, { userId: 1 }));
    const many = new Compiled(parsePolicy(""), { users: HOME.users, nodes });
    expect(explain(many, { src: "*", dst: "*:22" })).toMatchObject({ complete: false, pairs: 2000, allowed: 2000 });
  });
});

describe("try: what a new policy would change", () => {
  const policy = (more: object) => compile(more, NAMED);
  const rows = (before: object, after: object) =>
    compare(policy(before), policy(after)).pairs.map(({ src, dst, pairs, opened, closed }) => ({
      src: src.names.join(" "),
      dst: dst.names.join(" "),
      pairs,
      opened,
      closed,
    }));
  const allow = (src: string[], dst: string[], more: object = {}) => ({
    acls: [{ action: "accept", src, dst, ...more }],
  });

  test("nothing, when it says the same in other words", () => {
    const grants = { grants: [{ src: ["alice@"], dst: ["tag:server"], ip: ["22", "443"] }] };
    expect(compare(policy(allow(["alice@"], ["tag:server:22,443"])), policy(grants))).toMatchObject({
      same: true,
      complete: true,
      pairs: [],
      changes: [],
      peers: { before: 2, after: 2 },
    });
  });

  test("ports that open and close, for each pair and direction", () => {
    expect(
      rows(
        allow(["alice@"], ["tag:server:22"], { proto: "tcp" }),
        allow(["alice@"], ["tag:server:80,8000-8100"], { proto: "tcp" }),
      ),
    ).toEqual([{ src: "laptop phone", dst: "server", pairs: 2, opened: ["tcp 80, 8000-8100"], closed: ["tcp 22"] }]);
    expect(
      rows(
        { acls: [] },
        allow(["100.64.0.3"], ["server4:*"], {}).acls
          ? { hosts: { server4: "100.64.0.4" }, ...allow(["100.64.0.3"], ["server4:*"]) }
          : {},
      ),
    ).toEqual([
      { src: "desktop", dst: "server", pairs: 1, opened: ["icmp (IPv4 only)", "tcp, udp * (IPv4 only)"], closed: [] },
    ]);
    expect(
      rows(allow(["*"], ["tag:server:*"], { proto: "udp" }), allow(["*"], ["tag:server:53"], { proto: "udp" }))[0],
    ).toMatchObject({
      opened: [],
      closed: ["udp 0-52, 54-65535"],
    });
  });

  test("a user's own nodes are compared among themselves", () => {
    expect(rows({ acls: [] }, allow(["autogroup:member"], ["autogroup:self:*"]))).toEqual([
      { src: "laptop phone", dst: "laptop phone", pairs: 2, opened: ["icmp", "tcp, udp *"], closed: [] },
    ]);
  });

  test("routes, exit nodes, capabilities and SSH", () => {
    const routes = rows({ acls: [] }, allow(["bob@"], ["192.168.7.0/24:443", "autogroup:internet:*"]));
    expect(routes).toEqual([
      {
        src: "desktop",
        dst: "route 192.168.7.0/24",
        pairs: 1,
        opened: ["icmp", "route by router", "tcp, udp 443"],
        closed: [],
      },
      { src: "desktop", dst: "the internet", pairs: 1, opened: ["exit node exit", "icmp", "tcp, udp *"], closed: [] },
    ]);
    const app = { grants: [{ src: ["bob@"], dst: ["tag:server"], app: { "example.com/cap/x": [{ a: 1 }] } }] };
    expect(rows({ acls: [] }, app)).toEqual([
      { src: "desktop", dst: "server", pairs: 1, opened: ['capability example.com/cap/x [{"a":1}]'], closed: [] },
    ]);
    const ssh = (action: string, users: string[]) => ({
      acls: [],
      ssh: [{ action, src: ["alice@"], dst: ["tag:server"], users }],
    });
    expect(rows(ssh("accept", ["root"]), ssh("check", ["root", "autogroup:nonroot"]))).toEqual([
      {
        src: "laptop phone",
        dst: "server",
        pairs: 2,
        opened: ["ssh any login but root (check)", "ssh root (check)"],
        closed: ["ssh root (accept)"],
      },
    ]);
  });

  test("of a route what its own router enforces, for addresses that are among the sources", () => {
    const nodes = [
      ...HOME.nodes.slice(0, 4),
      node(5, { tags: ["tag:router"], routes: ["192.168.7.0/24", "0.0.0.0/0", "::/0"] }),
      node(6, { tags: ["tag:exit"], routes: ["192.168.7.0/24"] }),
    ];
    const tailnet = { ...NAMED, nodes: nodes.map((each, i) => ({ ...each, name: NAMES[i]! })) };
    const said = (before: object, after: object) =>
      compare(compile(before, tailnet), compile(after, tailnet))
        .pairs.filter(({ src }) => src.names.join() === "desktop")
        .map(({ dst, opened, closed }) => ({ dst: dst.names.join(), opened, closed }));
    const seen = allow(["bob@"], ["192.168.7.0/24:80"]);
    // The other router is not asked: the first is everybody's who needs no `via`.
    const via = { grants: [{ src: ["bob@"], dst: ["192.168.7.0/24"], ip: ["22"], via: ["tag:exit"] }], ...seen };
    expect(said(seen, via)).toEqual([]);
    // A narrower right that stays is not closed by a wider one, and not opened by it.
    const part = allow(["bob@"], ["192.168.7.9:*", "192.168.7.0/24:443"]);
    expect(said(part, allow(["bob@"], ["192.168.7.0/24:*"]))).toEqual([
      {
        dst: "route 192.168.7.0/24",
        opened: ["tcp, udp 0-442, 444-65535 but not to 192.168.7.9"],
        closed: [],
      },
    ]);
    const internet = (port: string) => allow(["bob@"], [`0.0.0.0/0:${port}`]);
    expect(said(internet("*"), internet("443")).find(({ dst }) => dst.includes("the internet"))?.closed).toEqual([
      "tcp, udp 0-442, 444-65535 (IPv4 only)",
    ]);
    // The internet is not what lies behind a router that is an exit node as well.
    const own = (entry: object) => ({ grants: [{ src: ["bob@"], ip: ["*"], ...entry }], ...seen });
    expect(said(own({ dst: ["tag:server"] }), own({ dst: ["tag:server", "autogroup:internet"] }))).toEqual([
      { dst: "the internet", opened: ["exit node router", "icmp", "tcp, udp *"], closed: [] },
    ]);
  });

  test("capabilities and addresses of the nodes themselves", () => {
    const after = { acls: [], nodeAttrs: [{ target: ["alice@"], attr: ["funnel", "disable-ipv4"] }] };
    const { changes, same } = compare(policy({ acls: [] }), policy(after));
    expect(same).toBe(false);
    expect(changes).toHaveLength(1);
    expect(changes[0]).toMatchObject({
      nodes: { count: 2, names: ["laptop", "phone"] },
      removed: ["its IPv4 address"],
    });
    expect(changes[0]!.added).toContain("funnel");
  });

  test("relays that all nodes are told of", () => {
    const region = (HostName: string) => ({ Nodes: [{ Name: "a", HostName }] });
    const relays = (Regions: object, more: object = {}) => policy({ acls: [], derpMap: { Regions, ...more } });
    const before = relays({ "1": null, "900": region("old.example.com") });
    const after = relays({ "900": region("new.example.com") }, { OmitDefaultRegions: true });
    const { changes } = compare(before, after);
    expect(changes).toMatchObject([
      {
        added: ["none of the server's own relays", "relay region 900 (new.example.com)"],
        removed: ["no relay region 1", "relay region 900 (old.example.com)"],
      },
    ]);
    expect(changes[0]!.nodes.count).toBe(before.resolver.nodes.length);
    expect(compare(before, before).same).toBe(true);
  });

  test("thousands of nodes are compared by what is alike in them, and what is too much is said to be cut", () => {
    const users = Array.from({ length: 50 }, (_, i) => ({ id: i + 1, name: `u${i + 1}`, email: "" }));
    const nodes = Array.from({ length: 3000 }, (_, i) =>
      node(i + 1, { userId: 1 + (i % 50), ipv4: `100.${64 + (i >> 16)}.${(i >> 8) & 255}.${i & 255}` }),
    );
    const big = (more: object) =>
      new Compiled(parsePolicy(JSON.stringify({ tagOwners: TAG_OWNERS, ...more })), { users, nodes });
    const open = big(allow(["*"], ["*:*"]));
    const own = big(allow(["autogroup:member"], ["autogroup:self:*"]));
    const result = compare(open, own);
    expect(result.complete).toBe(true);
    expect(result.peers).toEqual({ before: (3000 * 2999) / 2, after: (50 * 60 * 59) / 2 });
    expect(result.pairs.reduce((sum, row) => sum + row.pairs, 0)).toBe(3000 * 2999 - 50 * 60 * 59);
    expect(result.pairs.every(({ closed }) => closed.join() === "icmp,tcp, udp *")).toBe(true);
    const many = big({
      acls: Array.from({ length: 3000 }, (_, i) => ({
        action: "accept",
        src: [nodes[i]!.ipv4],
        dst: [`${nodes[(i * 7 + 1) % 3000]!.ipv4}:${i + 1}`],
      })),
    });
    expect(compare(big({ acls: [] }), many).complete).toBe(false);
  });

  test("what would take too long is said to be cut, and what is too large is refused", () => {
    const each = (count: number) => {
      const nodes = Array.from({ length: count }, (_, i) => node(i + 1, { userId: 1 }));
      const acls = nodes.map(({ ipv4 }, i) => ({ action: "accept", src: [ipv4], dst: [`*:${i + 1}`] }));
      return new Compiled(parsePolicy(JSON.stringify({ acls })), { users: HOME.users, nodes });
    };
    const many = each(1200);
    expect(compare(many, many)).toMatchObject({ same: false, complete: false, pairs: [] });
    const more = each(1900);
    expect(() => compare(more, more)).toThrow("the policies say too much about 1900 nodes");
  });
});
