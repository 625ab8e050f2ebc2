import { expect, test } from "bun:test";
import fc from "fast-check";
import type { Hostinfo } from "../wire/tailcfg.ts";
import { peerHostinfo } from "./hostinfo.ts";
import { TestServer, until } from "./testing.ts";

test("peers see what a client of today says of itself, but for what is private or churns", () => {
  const visible = {
    IPNVersion: "1.102.5",
    OS: "linux",
    Hostname: "Joe's Mac mini",
    Container: false,
    Userspace: true,
    RoutableIPs: ["10.1.0.0/16", "::/0"],
    Services: [
      { Proto: "peerapi4", Port: 41234 },
      { Proto: "tcp", Port: 22, Description: "sshd" },
    ],
    sshHostKeys: ["ssh-ed25519 AAAA"],
    Location: { Country: "Canada", CityCode: "yvr", Latitude: 49.7, Priority: 3 },
  };
  const hidden = {
    NetInfo: { PreferredDERP: 1 },
    BackendLogID: "ab",
    FrontendLogID: "cd",
    PushDeviceToken: "ef",
    RequestTags: ["tag:x"],
    Env: "kn",
    Future: { field: true },
  };
  expect(peerHostinfo({ ...visible, ...hidden })).toEqual(visible);
});

test("fields of the wrong form are left out, and so are names that differ in case alone: Go takes them for the same", () => {
  const hostile = {
    OS: 7,
    os: 7,
    Container: "yes",
    RoutableIPs: ["10.0.0.0/33", 5, "10.1.2.3/16", "fe80::%eth0/64"],
    Services: [{ Proto: "tcp", Port: 70_000 }, { Port: 1 }, null, "tcp", { Proto: "udp", Port: 53, Description: [] }],
    sshHostKeys: "key",
    WoLMACs: [1, "aa:bb:cc:dd:ee:ff"],
    Location: { Latitude: "north", Priority: 1e300, City: null },
    TPM: "none",
  };
  expect(peerHostinfo(hostile as unknown as Hostinfo)).toEqual({
    RoutableIPs: ["10.1.2.3/16"],
    Services: [{ Proto: "udp", Port: 53 }],
    WoLMACs: ["aa:bb:cc:dd:ee:ff"],
  });
});

test("whatever a node says, what peers are told has the right types", () => {
  const names = ["OS", "Hostname", "ShieldsUp", "Desktop", "RoutableIPs", "Services", "sshHostKeys", "Location"];
  fc.assert(
    fc.property(fc.dictionary(fc.constantFrom(...names), fc.jsonValue()), (hostinfo) => {
      const { OS, Hostname, ShieldsUp, Desktop, RoutableIPs, Services, sshHostKeys } = peerHostinfo(
        hostinfo as Hostinfo,
      );
      for (const text of [OS, Hostname]) expect(["string", "undefined"]).toContain(typeof text);
      for (const flag of [ShieldsUp, Desktop]) expect(["boolean", "undefined"]).toContain(typeof flag);
      for (const list of [RoutableIPs, sshHostKeys])
        expect((list ?? []).every((item) => typeof item === "string")).toBe(true);
      for (const { Port } of Services ?? []) expect(Number.isInteger(Port)).toBe(true);
    }),
    { numRuns: 500, seed: 1 },
  );
});

test("a node with a hostile name and Hostinfo is a peer like others, with a name of letters", async () => {
  await using server = await TestServer.start();
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const map = await (await server.join("watcher", authKey)).stream();
  const names = [
    "\u0000\u001b[31m",
    "../../etc/passwd",
    "x".repeat(60_000),
    "\ud800",
    "<script>",
    "日本",
    "a.b.c.",
    "-",
  ];
  for (const name of names) {
    const node = server.node(name);
    expect(await node.register({ authKey })).toMatchObject({ Error: "" });
    await node.lite({ Hostinfo: { Hostname: name, OS: "linux", Services: [{ Proto: "tcp", Port: -1 }] } });
  }
  await until(() => map.peers.size === names.length, "all of them");
  for (const peer of map.peers.values()) {
    expect(peer.Name).toMatch(/^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.net\.test\.$/);
    expect(peer.Hostinfo?.Services).toBeUndefined();
  }
  expect(new Set([...map.peers.values()].map(({ Name }) => Name)).size).toBe(names.length);
});
