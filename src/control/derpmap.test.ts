import { afterEach, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type * as tc from "../wire/tailcfg.ts";
import { DerpMaps, mergeDerpMaps, withPolicy } from "./derpmap.ts";
import { parseDerpMap } from "./derpmap-parse.ts";
import type { DerpSettings } from "./settings.ts";
import { DERP_MAP, makeSettings, TestServer, until } from "./testing.ts";

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "weft-derp-"));
  cleanups.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

function region(id: number, ...hosts: string[]): tc.DERPRegion {
  return { RegionID: id, Nodes: hosts.map((HostName, i) => ({ Name: `${id}${"abcdef"[i]}`, RegionID: id, HostName })) };
}

function mapOf(...regions: tc.DERPRegion[]): tc.DERPMap {
  return { Regions: Object.fromEntries(regions.map((each) => [each.RegionID, each])) };
}

/** A web server with one map that the test changes. */
async function site(): Promise<{ url: string; body: string; status: number; hits: number }> {
  const state = { url: "", body: "", status: 200, hits: 0 };
  const server = createServer((_request, response) => {
    state.hits++;
    response.writeHead(state.status).end(state.body);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  cleanups.push(() => server.close());
  state.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/map.json`;
  return state;
}

function maps(settings: Partial<DerpSettings>) {
  const seen: tc.DERPMap[] = [];
  const lines: string[] = [];
  const all = new DerpMaps({
    settings: { urls: [], paths: [], refreshEvery: null, embedded: null, ...settings },
    seed: "net.test",
    changed: (map) => void seen.push(map),
    log: (line) => void lines.push(line),
    random: () => 0.5,
    firstRetry: 20,
    lookEvery: 20,
  });
  cleanups.push(() => all.close());
  return { all, seen, lines, regions: () => Object.keys(seen.at(-1)?.Regions ?? {}).map(Number) };
}

const YAML = `
regions:
  900:
    regionid: 900
    regioncode: lab
    regionname: Lab
    nodes:
      - name: 900a
        regionid: 900
        hostname: a.lab.test
        ipv4: 192.0.2.1
        stunport: -1
        derpport: 8443
  3: null
`;

test("a file in YAML with Headscale's spelling says the same as JSON with the protocol's", () => {
  const wanted = {
    Regions: {
      "3": null,
      "900": {
        RegionID: 900,
        RegionCode: "lab",
        RegionName: "Lab",
        Nodes: [
          { Name: "900a", RegionID: 900, HostName: "a.lab.test", IPv4: "192.0.2.1", STUNPort: -1, DERPPort: 8443 },
        ],
      },
    },
  };
  expect(parseDerpMap(YAML, true)).toEqual(wanted);
  expect(parseDerpMap(JSON.stringify(wanted), false)).toEqual(wanted);
});

test("a map that would leave clients without relays is refused with its place", () => {
  const wrong = (map: unknown) => () => parseDerpMap(JSON.stringify(map), false);
  expect(wrong({})).toThrow("Regions");
  expect(wrong([])).toThrow();
  expect(wrong(null)).toThrow();
  expect(wrong({ Regions: { x: region(1, "h") } })).toThrow("the key of a region is its number");
  expect(wrong({ Regions: { "1": { RegionID: 1, Nodes: [] } } })).toThrow("Regions.1.Nodes");
  expect(wrong({ Regions: { "1": { Nodes: [{ Name: "1a" }] } } })).toThrow("Regions.1.Nodes.0.HostName");
  expect(wrong({ Regions: { "2": region(1, "h") } })).toThrow("RegionID 1 is not the number of its region");
  expect(() => parseDerpMap("{", false)).toThrow("it is not JSON");
  expect(() => parseDerpMap("a: [", true)).toThrow("it is not YAML");
});

test("a policy adds, replaces and takes out regions, or all of the server's own; not the last one", () => {
  const own = mapOf(region(1, "one"), region(2, "two"));
  const codes = (policy: tc.DERPMap | null) =>
    Object.values(withPolicy(own, policy, "x").Regions!).map((each) => each?.Nodes?.[0]?.HostName);
  expect(withPolicy(own, null, "x")).toBe(own);
  expect(codes({ Regions: { "1": null, "2": region(2, "other"), "900": region(900, "extra") } })).toEqual([
    "other",
    "extra",
  ]);
  expect(codes({ ...mapOf(region(900, "extra")), omitDefaultRegions: true })).toEqual(["extra"]);
  expect(codes({ Regions: { "1": null, "2": null } })).toEqual(["one", "two"]);
});

test("the derpMap of a policy reaches open map streams, and goes with the policy", async () => {
  await using server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const stream = await (await server.join("a", await server.key({ user: await server.user("alice") }))).stream();
  const regions = () => Object.keys(stream.messages.findLast(({ DERPMap }) => DERPMap)!.DERPMap!.Regions!).join();
  const own = regions();
  const set = (policy: object) => server.admin("PUT", "/policy", { policy: JSON.stringify(policy) });
  await set({ derpMap: { Regions: { "900": region(900, "extra.test") } } });
  await until(() => regions() === `${own},900`, "the region of the policy");
  await set({ derpMap: { OmitDefaultRegions: true, Regions: { "901": region(901, "only.test") } } });
  await until(() => regions() === "901", "the policy's region alone");
  const sent = stream.messages.length;
  await set({ derpMap: { OmitDefaultRegions: true, Regions: { "901": region(901, "only.test") } }, hosts: {} });
  await set({});
  await until(() => regions() === own, "the server's own");
  expect(stream.messages.slice(sent).filter(({ DERPMap }) => DERPMap)).toHaveLength(1);
});

test("a policy that would leave no relay is refused; one that a server starts with is not heeded there, and the log says so", async () => {
  const own = Object.keys(DERP_MAP.Regions!).join(", ");
  const gone = { Regions: Object.fromEntries(Object.keys(DERP_MAP.Regions!).map((id) => [id, null])) };
  const log: string[] = [];
  await using server = await TestServer.start({
    settings: makeSettings({ policy: { mode: "database", path: "" } }),
    log: (line) => log.push(line),
  });
  const put = (path: string, method: string) =>
    server.admin(method, path, { policy: JSON.stringify({ derpMap: gone }) });
  const words = `derpMap: it takes out all relays of this server (region ${own})`;
  await expect(put("/policy", "PUT")).rejects.toThrow(words);
  await expect(put("/policy/check", "POST")).rejects.toThrow(words);
  await server.admin("PUT", "/policy", {
    policy: JSON.stringify({ derpMap: { Regions: { ...gone.Regions, "901": region(901, "x.test") } } }),
  });
  expect(log.filter((line) => line.includes("warning"))).toEqual([]);

  const path = join(folder(), "policy.hujson");
  writeFileSync(path, JSON.stringify({ derpMap: gone }));
  const settings = makeSettings({ policy: { mode: "file", path } });
  await using stubborn = await TestServer.start({ settings, log: (line) => log.push(line) });
  expect(log.filter((line) => line.includes("warning"))).toEqual([expect.stringContaining(words)]);
  const map = await (await stubborn.join("a", await stubborn.key({ user: await stubborn.user("alice") }))).stream();
  expect(Object.keys(map.messages[0]!.DERPMap!.Regions!).join(", ")).toBe(own);
});

test("later maps win region by region, null takes one out, and the order of nodes is the seed's", () => {
  const first = mapOf(region(1, "one"), region(2, "two"), region(3, "three"));
  const second = { Regions: { "2": null, "3": region(3, "other"), "9": null } };
  const merged = mergeDerpMaps([first, second], "net.test");
  expect(merged).toEqual({ Regions: { "1": region(1, "one"), "3": region(3, "other") }, omitDefaultRegions: true });
  const many = mapOf(region(1, "a", "b", "c", "d", "e", "f"));
  const order = (seed: string) =>
    mergeDerpMaps([many], seed)
      .Regions!["1"]!.Nodes!.map(({ HostName }) => HostName)
      .join("");
  expect(order("net.test")).toBe(order("net.test"));
  expect([...order("net.test")].sort().join("")).toBe("abcdef");
  expect(new Set(["a", "b", "c", "d", "e"].map((seed) => order(`${seed}.test`))).size).toBeGreaterThan(2);
});

test("URLs, then files, then the embedded relay; a file that changes is told at once", async () => {
  const web = await site();
  web.body = JSON.stringify(mapOf(region(1, "web"), region(3, "web"), region(999, "web")));
  const path = join(folder(), "derp.yaml");
  writeFileSync(path, YAML);
  const { all, seen, lines, regions } = maps({ urls: [web.url], paths: [path], embedded: mapOf(region(999, "own")) });
  await all.start();
  expect(seen).toHaveLength(1);
  expect(regions()).toEqual([1, 900, 999]);
  expect(seen[0]!.Regions!["999"]!.Nodes![0]!.HostName).toBe("own");
  writeFileSync(path, "regions: {900: 5}");
  await until(() => lines.some((line) => line.includes("what it said before stays")), "the complaint");
  expect(seen).toHaveLength(1);
  writeFileSync(path, YAML.replaceAll("900", "901"));
  await until(() => seen.length === 2, "the new map");
  expect(regions()).toEqual([1, 901, 999]);
});

test("a URL that fails is tried again until it answers, and what it said before stays meanwhile", async () => {
  const web = await site();
  web.status = 503;
  const { all, seen, lines, regions } = maps({
    urls: [web.url],
    refreshEvery: 30,
    embedded: mapOf(region(999, "own")),
  });
  await all.start();
  expect(regions()).toEqual([999]);
  expect(lines.join()).toContain("cannot be fetched: it answered 503");
  web.status = 200;
  web.body = JSON.stringify(mapOf(region(1, "web")));
  await until(() => seen.length === 2, "the first answer");
  expect(regions()).toEqual([1, 999]);
  web.body = "no map";
  const hits = web.hits;
  await until(() => web.hits > hits + 1, "more questions");
  expect(seen).toHaveLength(2);
  web.body = JSON.stringify(mapOf(region(2, "web")));
  await until(() => regions().join() === "2,999", "the second answer");
});

test("without any relay the server does not start, and says what it has tried", async () => {
  const web = await site();
  web.status = 404;
  await expect(maps({ urls: [web.url] }).all.start()).rejects.toThrow(
    `there is no relay for clients: none of ${web.url} has a region`,
  );
  await expect(maps({}).all.start()).rejects.toThrow("no DERP map is configured; use the relay of the box");
});

test("open map streams hear of a new map and of nothing else", async () => {
  const path = join(folder(), "derp.yaml");
  writeFileSync(path, YAML);
  const settings = makeSettings();
  await using server = await TestServer.start({
    settings: { ...settings, derp: { ...settings.derp, embedded: null, paths: [path] } },
  });
  const node = await server.join("a", await server.key({ user: await server.user("alice") }));
  const map = await node.stream();
  expect(Object.keys(map.messages[0]!.DERPMap!.Regions!)).toEqual(["900"]);
  writeFileSync(path, YAML.replaceAll("900", "907"));
  await until(() => map.messages.at(-1)!.DERPMap?.Regions?.["907"], "the new map");
  expect(Object.keys(map.messages.at(-1)!)).toEqual(["DERPMap"]);
});

test("a field of a kind that clients cannot read is refused: it would cost them the whole netmap", () => {
  const node = (more: object) => ({ regions: { "900": { nodes: [{ name: "a", hostname: "a.test", ...more }] } } });
  const region = (more: object) => ({ regions: { "900": { nodes: [{ name: "a", hostname: "a.test" }], ...more } } });
  const wrong: [object, string][] = [
    [node({ canport80: "yes" }), "Regions.900.Nodes.0.CanPort80"],
    [node({ InsecureForTests: 1 }), "Regions.900.Nodes.0.InsecureForTests"],
    [node({ stuntestip: 5 }), "Regions.900.Nodes.0.STUNTestIP"],
    [region({ latitude: "52.5" }), "Regions.900.Latitude"],
    [region({ Longitude: [] }), "Regions.900.Longitude"],
    [region({ avoid: "no" }), "Regions.900.Avoid"],
    [region({ NoMeasureNoHome: 0 }), "Regions.900.NoMeasureNoHome"],
    [{ ...region({}), homeparams: 5 }, "HomeParams"],
    [{ ...region({}), HomeParams: { regionscore: { "900": "much" } } }, "HomeParams.RegionScore.900"],
    [{ ...region({}), HomeParams: { RegionScore: { near: 1 } } }, "HomeParams.RegionScore.near"],
    [{ ...region({}), omitDefaultRegions: "true" }, "omitDefaultRegions"],
  ];
  for (const [map, place] of wrong) expect(() => parseDerpMap(JSON.stringify(map), false)).toThrow(`${place}: `);
  const good = { ...region({ latitude: 52.5, avoid: null }), HomeParams: { RegionScore: { "900": 0.5 } } };
  expect(parseDerpMap(JSON.stringify(good), false)).toMatchObject({
    HomeParams: { RegionScore: { "900": 0.5 } },
    Regions: { "900": { Latitude: 52.5, Avoid: null } },
  });
});
