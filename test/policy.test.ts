// A policy with real traffic: a Weft node and official clients, and what each of them lets in after the box has read a new
// policy file. TCP to two ports, in both directions.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Lab } from "../lab/network.ts";
import {
  Box,
  cannotUseNamespaces,
  certificate,
  type Member,
  skip,
  Tailscaled,
  tempDir,
  until,
  WeftNode,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const PORTS = [7001, 7002];

/** Listens on both ports, at every address, until the lab ends. */
async function listenOn(member: Member): Promise<void> {
  const code = `for (const port of ${JSON.stringify(PORTS)}) Bun.listen({ hostname: "::", port, socket: { data() {} } }); console.log("ready");`;
  const child = member.host.exec([process.execPath, "-e", code]);
  const reader = child.stdout.getReader();
  expect(new TextDecoder().decode((await reader.read()).value)).toBe("ready\n");
}

async function connects(from: Member, ip: string, port: number): Promise<boolean> {
  const code = `const end = (code) => process.exit(code); setTimeout(() => end(1), 1500);
    require("node:net").connect({ host: ${JSON.stringify(ip)}, port: ${port} }, () => end(0)).on("error", () => end(1));`;
  return (await from.host.run([process.execPath, "-e", code])).code === 0;
}

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

describe.skipIf(skip(cannotUseNamespaces, absent))("a policy between a Weft node and official clients", () => {
  const dir = tempDir("policy");
  const file = join(dir.path, "policy.hujson");
  let lab: Lab;
  let box: Box;
  let members: [weft: Member, current: Member, old: Member];

  const reload = async (policy: object): Promise<void> => {
    writeFileSync(file, JSON.stringify(policy));
    const before = box.process.output().length;
    box.process.kill("SIGHUP");
    await until("the policy is in force", async () => box.process.output().slice(before).includes("is in force"));
  };
  const peersAre = (member: Member, names: string[]) =>
    until(`${member.name} sees ${names.join(", ") || "nobody"}`, async () => {
      const status = await member.status();
      const seen = Object.values(status?.Peer ?? {}).flatMap(({ TailscaleIPs }) => TailscaleIPs ?? []);
      const found = members.filter((each) => each !== member && seen.includes(each.ip4)).map(({ name }) => name);
      if (!status || found.join() !== names.join()) throw new Error(`it sees ${found.join(", ") || "nobody"}`);
      return true;
    });

  beforeAll(async () => {
    writeFileSync(file, "// everybody may reach everybody");
    lab = await Lab.create("policy");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy", file] });
    members = [
      new WeftNode(await lab.host("weft"), join(dir.path, "weft"), env),
      new Tailscaled(await lab.host("current"), join(dir.path, "current"), "1.102.5", env),
      new Tailscaled(await lab.host("old"), join(dir.path, "old"), "1.80.3", env),
    ];
    const key = await box.key();
    await Promise.all(members.map((member) => member.up(box.url, key)));
    await Promise.all(members.map(listenOn));
  }, 300_000);

  afterAll(async () => {
    await lab?.close();
    dir[Symbol.dispose]();
  });

  test("without rules everybody reaches everybody", async () => {
    for (const from of members) {
      for (const to of members.filter((each) => each !== from)) {
        await until(`${from.name} reaches ${to.name}`, () => connects(from, to.ip4, PORTS[0]!));
        await until(`${from.name} reaches ${to.name} by IPv6`, () => connects(from, to.ip6, PORTS[1]!));
      }
    }
  }, 300_000);

  test("one port is open in one direction, and nothing else", async () => {
    const [weft, current, old] = members;
    const rule = (src: Member, dst: Member) => ({
      action: "accept",
      src: [src.ip4],
      dst: [`${dst.ip4}:${PORTS[0]}`],
      proto: "tcp",
    });
    await reload({ acls: [rule(weft, current), rule(old, weft)] });
    await peersAre(weft, ["current", "old"]);
    await peersAre(current, ["weft"]);
    await peersAre(old, ["weft"]);
    for (const [from, to] of [
      [weft, current],
      [old, weft],
    ] as const) {
      // Before, all of it was open.
      await until(`${from.name} reaches one port of ${to.name}, and no more`, async () => {
        expect(await connects(from, to.ip4, PORTS[0]!)).toBe(true);
        expect(await connects(from, to.ip4, PORTS[1]!)).toBe(false);
        expect(await connects(from, to.ip6, PORTS[0]!)).toBe(false);
        expect(await connects(to, from.ip4, PORTS[0]!)).toBe(false);
        return true;
      });
    }
  }, 300_000);

  test("a closed policy takes everybody away, an open one brings them back", async () => {
    const [weft, current, old] = members;
    await reload({ acls: [] });
    for (const member of members) await peersAre(member, []);
    expect(await connects(weft, current.ip4, PORTS[0]!)).toBe(false);
    await reload({ acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] });
    await peersAre(weft, ["current", "old"]);
    await until("weft reaches old", () => connects(weft, old.ip6, PORTS[1]!));
    await until("current reaches weft", () => connects(current, weft.ip4, PORTS[0]!));
  }, 300_000);
});

// Each policy says who reaches whom on which port; all pairs are tried, so what is not named must be closed.
describe.skipIf(skip(cannotUseNamespaces, absent))(
  "Headscale's scenarios of policies (section 22.1), in the database",
  () => {
    const dir = tempDir("policy-db");
    const file = join(dir.path, "policy.hujson");
    let lab: Lab;
    let box: Box;
    let members: Record<"alice" | "bob" | "server", Member>;
    const TAGS = { "tag:server": [], "tag:other": [] };
    const [WEB, SSH] = PORTS as [number, number];

    const set = async (policy: object): Promise<void> => {
      writeFileSync(file, JSON.stringify({ tagOwners: TAGS, ...policy }));
      await box.admin("policy", "set", "-f", file);
    };
    const allow = (src: string[], dst: string[], more: object = {}) => ({
      ...more,
      acls: [{ action: "accept", src, dst }],
    });
    /** "alice>server:7001" and so on: these, and no other. */
    const reaches = (...want: string[]) =>
      until(
        `they reach ${want.join(" ") || "nobody"}`,
        async () => {
          const tries = Object.entries(members).flatMap(([src, from]) =>
            Object.entries(members)
              .filter(([dst]) => dst !== src)
              .flatMap(([dst, to]) =>
                PORTS.map(async (port) => ((await connects(from, to.ip4, port)) ? `${src}>${dst}:${port}` : "")),
              ),
          );
          const got = (await Promise.all(tries)).filter(Boolean).sort().join(" ");
          if (got !== [...want].sort().join(" ")) throw new Error(`they reach ${got || "nobody"}`);
          return true;
        },
        90,
      );
    const both = (pair: string) => PORTS.map((port) => `${pair}:${port}`);

    beforeAll(async () => {
      lab = await Lab.create("policydb");
      const boxHost = await lab.host("box");
      const tls = await certificate(dir.path, boxHost.ip4);
      const env = { SSL_CERT_FILE: tls.ca };
      box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy-mode", "database"] });
      await set({});
      const key = async (...args: string[]) => (await box.admin<{ key: string }>("preauthkeys", "create", ...args)).key;
      const user = async (name: string) => `${(await box.admin<{ id: string }>("users", "create", name)).id}`;
      members = {
        alice: new Tailscaled(await lab.host("alice"), join(dir.path, "alice"), "1.102.5", env),
        bob: new Tailscaled(await lab.host("bob"), join(dir.path, "bob"), "1.80.3", env),
        server: new Tailscaled(await lab.host("server"), join(dir.path, "server"), "1.102.5", env),
      };
      await Promise.all([
        members.alice.up(box.url, await key("--user", await user("alice"))),
        members.bob.up(box.url, await key("--user", await user("bob"))),
        members.server.up(box.url, await key("--tags", "tag:server")),
      ]);
      await Promise.all(Object.values(members).map(listenOn));
    }, 300_000);

    afterAll(async () => {
      await Promise.all(Object.values(members ?? {}).map((member) => member.stop()));
      await box?.stop();
      await lab?.close();
      dir[Symbol.dispose]();
    }, 300_000);

    test("ACLAllowUser80Dst, ACLAllowUserDst, ACLAllowStarDst: one user, one port or all, one way", async () => {
      await set(allow(["alice@"], [`bob@:${WEB}`]));
      await reaches(`alice>bob:${WEB}`);
      await set(allow(["alice@"], ["bob@:*"]));
      await reaches(...both("alice>bob"));
      await set(allow(["alice@"], ["*:*"]));
      await reaches(...both("alice>bob"), ...both("alice>server"));
    }, 300_000);

    test("ACLDenyAllPort80: a port that no rule names is closed", async () => {
      await set(allow(["*"], [`*:${SSH}`]));
      await reaches(
        ...["alice>bob", "alice>server", "bob>alice", "bob>server", "server>alice", "server>bob"].map(
          (pair) => `${pair}:${SSH}`,
        ),
      );
    }, 300_000);

    test("ACLNamedHostsCanReach{, BySubnet}, ACLGroupWithUnknownUser, ACLDevice1CanAccessDevice2: hosts, addresses, users, groups and tags name the same machines", async () => {
      const { alice, server } = members;
      const definitions = {
        hosts: { laptop: alice.ip4, machine: `${server.ip4}/32`, everything: "100.64.0.0/10" },
        groups: { "group:people": ["alice@", "nobody@", "gone@example.com"] },
      };
      for (const [src, dst] of [
        ["laptop", "machine"],
        [alice.ip4, server.ip4],
        ["alice@", "tag:server"],
        ["group:people", "machine"],
      ] as const) {
        await set(allow([src], [`${dst}:*`], definitions));
        await reaches(...both("alice>server"));
      }
      await set(allow(["laptop"], [`everything:${WEB}`], definitions));
      await reaches(`alice>bob:${WEB}`, `alice>server:${WEB}`);
    }, 300_000);

    test("ACLAutogroupMember, ACLAutogroupTagged, ACLAutogroupSelf", async () => {
      await set(allow(["autogroup:member"], ["autogroup:member:*"]));
      await reaches(...both("alice>bob"), ...both("bob>alice"));
      await set(allow(["autogroup:member"], ["autogroup:tagged:*"]));
      await reaches(...both("alice>server"), ...both("bob>server"));
      await set(allow(["autogroup:member"], ["autogroup:self:*"]));
      await reaches();
    }, 300_000);

    test("derpMap: clients know of a region of the policy, and no more when the policy is another", async () => {
      const alice = members.alice as Tailscaled;
      const regions = async () => {
        const { stdout } = await alice.host.run(alice.cli("debug", "derp-map"));
        return Object.keys((JSON.parse(stdout) as { Regions: object }).Regions);
      };
      const own = await regions();
      const node = { Name: "950a", RegionID: 950, HostName: "derp.example.com", IPv4: "192.0.2.1" };
      const region = { RegionID: 950, RegionCode: "more", Nodes: [node] };
      await set({ derpMap: { Regions: { "950": region } } });
      await until("the client knows the region", async () => (await regions()).includes("950"));
      expect((await regions()).length).toBe(own.length + 1);
      await set({});
      await until("it is gone", async () => (await regions()).join() === own.join());
    }, 300_000);

    test("a role given by the command line opens what the policy gives to it, and closes it when it is taken", async () => {
      await set(allow(["autogroup:admin"], [`tag:server:${WEB}`]));
      await reaches();
      await box.admin("users", "set-role", "alice", "admin");
      await reaches(`alice>server:${WEB}`);
      await box.admin("users", "set-role", "alice", "member");
      await reaches();
    }, 300_000);

    test("ACLTagPropagation, ACLTagPropagationPortSpecific: a tag that is changed opens and closes at once", async () => {
      await set({
        acls: [
          { action: "accept", src: ["alice@"], dst: [`tag:server:${WEB}`] },
          { action: "accept", src: ["alice@"], dst: [`tag:other:${SSH}`] },
        ],
      });
      await reaches(`alice>server:${WEB}`);
      const nodes = await box.admin<{ id: string; ipAddresses: string[] }[]>("nodes", "list");
      const { id } = nodes.find(({ ipAddresses }) => ipAddresses.includes(members.server.ip4))!;
      await box.admin("nodes", "tag", "-i", id, "-t", "tag:other");
      await reaches(`alice>server:${SSH}`);
      await box.admin("nodes", "tag", "-i", id, "-t", "tag:server");
      await reaches(`alice>server:${WEB}`);
    }, 300_000);

    test("ACLPolicyPropagationOverTime, PolicyUpdateWhileRunningWithCLIInDatabase: policies that come and go, each in force at once", async () => {
      for (let round = 0; round < 3; round++) {
        await set(allow(["autogroup:member"], ["autogroup:self:*"]));
        await reaches();
        await set(allow(["bob@"], ["tag:server:*"]));
        await reaches(...both("bob>server"));
      }
    }, 300_000);

    test("ACLGroup{AfterUserDeletion, DeletionExactReproduction}, ACLDynamicUnknownUser{Addition, Removal}: members who go, and names that are nobody's, take nothing from the others", async () => {
      await box.admin("users", "create", "carol");
      const team = (...names: string[]) =>
        set(allow(["group:team"], [`group:team:${WEB}`], { groups: { "group:team": names } }));
      await team("alice@", "carol@", "bob@");
      await reaches(`alice>bob:${WEB}`, `bob>alice:${WEB}`);
      await box.admin("users", "destroy", "-n", "carol", "--force");
      await reaches(`alice>bob:${WEB}`, `bob>alice:${WEB}`);
      for (const names of [
        ["alice@", "ghost@", "bob@"],
        ["bob@", "alice@"],
      ]) {
        await team(...names);
        await reaches(`alice>bob:${WEB}`, `bob>alice:${WEB}`);
      }
    }, 300_000);
  },
);
