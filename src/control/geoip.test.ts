import { afterEach, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { CountryTable } from "./geoip.ts";
import { makeSettings, TestServer, until } from "./testing.ts";

let folder = "";
afterEach(() => folder !== "" && rmSync(folder, { recursive: true, force: true }));

test("tables as they are found: prefixes or ranges, commas or tabs, quotes, more columns, a head, unknown countries", async () => {
  const table = await CountryTable.parse(
    [
      "network,country,asn",
      "# by hand",
      "192.0.2.0/24,de,64500",
      '"198.51.100.0","198.51.100.127","AU"',
      "203.0.113.0\t203.0.113.255\tNZ",
      "100.0.0.0,100.255.255.255,ZZ",
      "2001:db8::/32,FR",
      "2001:db9::,2001:db9:0:ffff:ffff:ffff:ffff:ffff,IT",
      "",
    ].join("\r\n"),
  );
  const of = (...addresses: string[]) => addresses.map((address) => table.country(address));
  expect(of("192.0.2.0", "192.0.2.255", "::ffff:192.0.2.7", "192.0.1.255", "192.0.3.0")).toEqual([
    ...["DE", "DE", "DE"],
    ...[null, null],
  ]);
  expect(of("198.51.100.127", "198.51.100.128", "203.0.113.9", "100.64.0.1")).toEqual(["AU", null, "NZ", null]);
  expect(of("2001:db8::1", "2001:db8:ffff::", "2001:db9::9", "2001:db9:1::", "2001:dba::")).toEqual([
    ...["FR", "FR", "IT"],
    ...[null, null],
  ]);
  expect(of("what", "")).toEqual([null, null]);
});

test("a line that is none is named", async () => {
  const wrong = (line: string) => CountryTable.parse(`192.0.2.0/24,DE\n${line}`).catch((error: Error) => error.message);
  for (const line of [
    "192.0.2.0/24,Germany",
    "192.0.2.9,192.0.2.1,DE",
    "1.2.3.4,2001:db8::,DE",
    "a,b,DE",
    "192.0.2.0/33,DE",
  ])
    expect(await wrong(line)).toContain("line 2: ");
  for (const head of ["10.0.0.0/8,Germany", "::/0,x"])
    expect(CountryTable.parse(`${head}\n192.0.2.0/24,DE`)).rejects.toThrow("line 1: ");
  expect(CountryTable.parse("network,country\n")).rejects.toThrow("no line of it names a country");
  expect(await wrong("10.0.0.0/8,")).toBeInstanceOf(CountryTable);
});

test("of ranges in each other the innermost counts, in any order of lines", async () => {
  const octet = fc.integer({ min: 0, max: 63 });
  const range = fc.record({ first: octet, last: octet, country: fc.constantFrom("AA", "BB", "CC", "DD") });
  await fc.assert(
    fc.asyncProperty(fc.array(range, { maxLength: 12 }), async (list) => {
      const ranges = list.filter(({ first, last }) => first <= last);
      const table = await CountryTable.parse(
        [{ first: 64, last: 64, country: "XX" }, ...ranges]
          .map(({ first, last, country }) => `10.0.0.${first},10.0.0.${last},${country}`)
          .join("\n"),
      );
      for (let i = 0; i < 64; i++) {
        const around = ranges.filter(({ first, last }) => first <= i && i <= last);
        const inner = around.sort((a, b) => b.first - a.first || a.last - b.last)[0];
        const equals = around.filter(({ first, last }) => first === inner!.first && last === inner!.last);
        const found = table.country(`10.0.0.${i}`);
        if (inner) expect(equals.map(({ country }): string | null => country)).toContain(found);
        else expect(found).toBeNull();
      }
    }),
    { numRuns: 200, seed: 1 },
  );
});

test("a posture lets in who speaks from a country; the table is read again, and a wrong one is not taken", async () => {
  folder = mkdtempSync(join(tmpdir(), "weft-geoip-"));
  const path = join(folder, "countries.csv");
  writeFileSync(path, "127.0.0.0/8,DE\n");
  const lines: string[] = [];
  const policy = (country: string) => ({
    policy: JSON.stringify({
      postures: { "posture:home": [`ip:country == '${country}'`] },
      acls: [{ action: "accept", src: ["alice@"], dst: ["tag:web:22"], srcPosture: ["posture:home"] }],
      tagOwners: { "tag:web": [] },
    }),
  });
  const settings = makeSettings({ policy: { mode: "database", path: "" }, geoip: { path } });
  await using server = await TestServer.start({ settings, log: (line) => void lines.push(line) });
  const laptop = await server.join("laptop", await server.key({ user: await server.user("alice") }));
  const web = await server.join("web", await server.key({ aclTags: ["tag:web"] }));
  const maps = [await laptop.stream(), await web.stream()];
  const see = (count: number) => until(() => maps.every(({ peers }) => peers.size === count), `${count} peers`);
  await server.admin("PUT", "/policy", policy("FR"));
  await see(0);
  await server.admin("PUT", "/policy", policy("DE"));
  await see(1);
  writeFileSync(path, "127.0.0.0/8,FR\n127.0.0.1,127.0.0.1,IT");
  await see(0);
  await server.admin("PUT", "/policy", policy("IT"));
  await see(1);
  writeFileSync(path, "127.0.0.0/8,France");
  await until(() => lines.some((line) => line.includes("what it said before stays: line 1")), "the mistake");
  await see(1);
});

test("without a table a policy that asks for the country is refused, and so is what is known of no address", async () => {
  const settings = makeSettings({ policy: { mode: "database", path: "" } });
  await using server = await TestServer.start({ settings });
  const set = (condition: string) =>
    server.admin("PUT", "/policy", { policy: JSON.stringify({ postures: { "posture:x": [condition] }, acls: [] }) });
  expect(set("ip:country == 'DE'")).rejects.toThrow(
    /postures\["posture:x"\]: ip:country cannot be compared.*geoip\.path/,
  );
  expect(set("ip:city == 'Bonn'")).rejects.toThrow("nothing but ip:country is known");
});
