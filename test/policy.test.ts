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
  }, 120_000);

  afterAll(async () => {
    await lab?.close();
    dir[Symbol.dispose]();
  });

  test("without rules everybody reaches everybody", async () => {
    for (const from of members) {
      for (const to of members.filter((each) => each !== from)) {
        await until(`${from.name} reaches ${to.name}`, async () => (await connects(from, to.ip4, PORTS[0]!)) || null);
        expect(await connects(from, to.ip6, PORTS[1]!)).toBe(true);
      }
    }
  }, 120_000);

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
      await until(`${from.name} reaches ${to.name}`, async () => (await connects(from, to.ip4, PORTS[0]!)) || null);
      expect(await connects(from, to.ip4, PORTS[1]!)).toBe(false);
      expect(await connects(from, to.ip6, PORTS[0]!)).toBe(false);
      expect(await connects(to, from.ip4, PORTS[0]!)).toBe(false);
    }
  }, 120_000);

  test("a closed policy takes everybody away, an open one brings them back", async () => {
    const [weft, current, old] = members;
    await reload({ acls: [] });
    for (const member of members) await peersAre(member, []);
    expect(await connects(weft, current.ip4, PORTS[0]!)).toBe(false);
    await reload({ acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] });
    await peersAre(weft, ["current", "old"]);
    await until("weft reaches old", async () => (await connects(weft, old.ip6, PORTS[1]!)) || null);
    await until("current reaches weft", async () => (await connects(current, weft.ip4, PORTS[0]!)) || null);
  }, 120_000);
});
