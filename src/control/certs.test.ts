import { afterEach, expect, test } from "bun:test";
import { createHmac } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Lookup } from "../net/dns-client.ts";
import { decodeMessage, signMessage, type TsigKey } from "../wire/dns.ts";
import { untilPublished } from "./certs.ts";
import type { DnsProviderSettings } from "./settings.ts";
import { makeSettings, type TestNode, TestServer } from "./testing.ts";

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function start(certificates: DnsProviderSettings, log?: (line: string) => void) {
  const settings = makeSettings();
  const server = await TestServer.start({
    settings: { ...settings, dns: { ...settings.dns, certificates } },
    ...(log && { log }),
  });
  cleanups.push(() => server[Symbol.asyncDispose]());
  return { server, node: await server.join("a", await server.key({ user: await server.user("alice") })) };
}

function setDns(node: TestNode, more: Record<string, string> = {}) {
  const fields = { Name: "_acme-challenge.a.net.test", Type: "TXT", Value: "token", ...more };
  return node.post("/machine/set-dns", { Version: 138, NodeKey: node.nodeKey, ...fields });
}

/** A name server that answers as the test says; null: not at all. */
async function nameServer(answer: (query: Buffer, isUpdate: boolean) => Uint8Array | null): Promise<string> {
  const server = createServer((socket) => {
    socket.on("error", () => {});
    socket.on("data", (bytes: Buffer) => {
      const query = bytes.subarray(2);
      const response = answer(query, ((query[2]! >> 3) & 15) === 5);
      if (!response) return;
      socket.write(Buffer.concat([Buffer.of(response.length >> 8, response.length & 255), response]));
    });
    cleanups.push(() => socket.destroy());
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  cleanups.push(() => server.close());
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** The head of a query as a response, its counts zero. */
function reply(query: Buffer, rcode: number): Uint8Array {
  const out = new Uint8Array(12);
  out.set(query.subarray(0, 2));
  out[2] = query[2]! | 0x80;
  out[3] = rcode;
  return out;
}

function rfc2136(server: string, more: Partial<DnsProviderSettings & { kind: "rfc2136" }> = {}): DnsProviderSettings {
  return { kind: "rfc2136", server, zone: "net.test", tsig: null, resolvers: [], timeout: 1500, ...more };
}

test("a node gets the https capability and its name to certify, and sets the record of that name and no other", async () => {
  const folder = mkdtempSync(join(tmpdir(), "weft-certs-"));
  cleanups.push(() => rmSync(folder, { recursive: true, force: true }));
  const file = join(folder, "set");
  const command = ["sh", "-c", `echo "$0 $1 $2" >> ${file}`, "zone"];
  const resolvers = [await showing("token").server];
  const { node } = await start({ kind: "exec", command, resolvers, timeout: 10_000 });
  const map = await node.stream();
  expect(map.self!.CapMap).toHaveProperty("https");
  expect(map.dns!.CertDomains).toEqual(["a.net.test"]);
  expect(await setDns(node)).toEqual({ status: 200, text: "{}" });
  expect(readFileSync(file, "utf8")).toBe("zone _acme-challenge.a.net.test token\n");
  expect((await setDns(node, { Name: "_acme-challenge.b.net.test" })).text).toContain(
    "may set _acme-challenge.a.net.test alone",
  );
  expect((await setDns(node, { Name: "a.net.test" })).status).toBe(403);
  expect((await setDns(node, { Type: "A" })).status).toBe(400);
  for (const Value of ["a b", "$(id)", "a;b", "a'b", "--file=/etc/passwd", ""])
    expect((await setDns(node, { Value })).status).toBe(400);
  expect((await setDns(node, { Value: "x".repeat(256) })).status).toBe(400);
  expect(readFileSync(file, "utf8").split("\n")).toHaveLength(2);
});

test("a program that fails or hangs is told to the node and to the log", async () => {
  const lines: string[] = [];
  const failing = ["sh", "-c", "echo no such zone >&2; exit 3"];
  const { node } = await start(
    { kind: "exec", command: failing, resolvers: [], timeout: 60_000 },
    (line) => void lines.push(line),
  );
  expect(await setDns(node)).toMatchObject({ status: 503, text: expect.stringContaining("did not set the record") });
  expect(lines.join()).toContain(
    "node 1 (a) gets no certificate: sh did not set the record _acme-challenge.a.net.test: no such zone",
  );
  const hanging = await start({ kind: "exec", command: ["sleep", "60"], resolvers: [], timeout: 50 });
  expect((await setDns(hanging.node)).status).toBe(503);
});

test("a name server that refuses, says nothing or never shows the record: the node hears why", async () => {
  const refusing = await nameServer((query) => reply(query, 5));
  const { node } = await start(rfc2136(refusing));
  expect((await setDns(node)).text).toContain(
    "refused to change _acme-challenge.a.net.test in the zone net.test: REFUSED",
  );
  const silent = await start(rfc2136(await nameServer(() => null), { timeout: 100 }));
  expect((await setDns(silent.node)).text).toContain("did not answer in time");
  const hiding = await start(rfc2136(await nameServer((query) => reply(query, 0)), { timeout: 1500 }));
  expect((await setDns(hiding.node)).text).toContain("was set, but did not appear on");
  const gone = await start(rfc2136("127.0.0.1:1"));
  expect((await setDns(gone.node)).text).toContain("cannot be reached");
});

test("an answer counts only when it is signed with the key, over this very request", async () => {
  const secret = Buffer.from("secret");
  const mac = (data: Uint8Array) => new Uint8Array(createHmac("sha256", secret).update(data).digest());
  const key: TsigKey = { name: "weft", algorithm: "hmac-sha256", mac };
  const tsig = { name: "weft", algorithm: "hmac-sha256" as const, secret: secret.toString("base64") };
  let forge = true;
  const updates: number[] = [];
  const server = await nameServer((query, isUpdate) => {
    const { additional } = decodeMessage(query);
    if (!isUpdate) {
      // The answer has the value: a record whose name points to the question.
      const out = Buffer.concat([
        query,
        Buffer.from([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 1, 0, 6, 5]),
        Buffer.from("token"),
      ]);
      out[2]! |= 0x80;
      out[7] = 1;
      return out;
    }
    updates.push(additional.length);
    if (forge) return reply(query, 0);
    const data = additional[0]!.data;
    // Behind the algorithm's name, time and fudge: the request's MAC.
    const requestMac = data.subarray(13 + 8 + 2, 13 + 8 + 2 + 32);
    const over: TsigKey = { ...key, mac: (bytes) => mac(Buffer.concat([Buffer.of(0, 32), requestMac, bytes])) };
    return signMessage(reply(query, 0), over, Math.floor(Date.now() / 1000)).signed;
  });
  const { node } = await start(rfc2136(server, { tsig, timeout: 5000 }));
  expect((await setDns(node)).text).toContain("is not signed with the key weft");
  forge = false;
  expect(await setDns(node)).toEqual({ status: 200, text: "{}" });
  expect(updates).toEqual([1, 1]);
});

/** A name server that shows these TXT values for any name, once it has been asked so often. */
function showing(value: string, after = 0) {
  const names: string[] = [];
  const server = nameServer((query) => {
    // The first label of the question; the answer's name points to the question.
    names.push(query.subarray(13, 13 + query[12]!).toString());
    if (names.length <= after) return reply(query, 0);
    const data = Buffer.concat([Buffer.of(value.length), Buffer.from(value)]);
    const record = Buffer.concat([Buffer.of(0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 1, 0, data.length), data]);
    const out = Buffer.concat([query, record]);
    out[2]! |= 0x80;
    out[7] = 1;
    return out;
  });
  return { names, server };
}

/** What a resolver knows: "NS example.com" -> values. */
function resolver(known: Record<string, string[]>): Lookup {
  const ask = (type: string) => async (name: string) => {
    const found = known[`${type} ${name}`];
    if (!found) throw new Error("ENOTFOUND");
    return found;
  };
  return {
    resolveCname: ask("CNAME"),
    resolveNs: ask("NS"),
    resolve4: ask("A") as Lookup["resolve4"],
    resolve6: ask("AAAA") as Lookup["resolve6"],
  };
}

test("without named resolvers a program's record must be seen on the servers of its zone, which an alias may move", async () => {
  const { names, server } = showing("token", 1);
  const port = Number((await server).split(":")[1]);
  const name = "_acme-challenge.a.net.test";
  const settings: DnsProviderSettings = { kind: "exec", command: ["true"], resolvers: [], timeout: 5000 };
  const lines: string[] = [];
  const ctx = { random: (n: number) => new Uint8Array(n), log: (line: string) => void lines.push(line) };
  const publish = (known: Record<string, string[]>, value: string, signal: AbortSignal) =>
    untilPublished(settings, name, value, ctx, signal, resolver(known), port);
  const zone = { "NS net.test": ["ns.test"], "NS test": ["root.test"], "A ns.test": ["127.0.0.1"] };
  // It shows the record when it is asked a second time.
  await publish(zone, "token", AbortSignal.timeout(10_000));
  expect(names).toEqual(["_acme-challenge", "_acme-challenge"]);
  await expect(publish(zone, "other", AbortSignal.timeout(50))).rejects.toThrow("did not appear on 127.0.0.1:");

  const moved = { ...zone, [`CNAME ${name}`]: ["challenge.acme.test"], "NS acme.test": ["ns.test"] };
  names.length = 1;
  await publish(moved, "token", AbortSignal.timeout(10_000));
  expect(names.slice(1)).toEqual(["challenge"]);

  names.length = 0;
  await publish({ "NS test": ["root.test"], "A root.test": ["127.0.0.1"] }, "token", AbortSignal.timeout(10_000));
  expect(names).toEqual([]);
  expect(lines.join()).toContain(`nobody knows the name servers of ${name}`);
});
