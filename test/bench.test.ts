// The suite of benchmarks runs: each part once with --quick. Are the numbers finite, is the file as promised? Never how fast.
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { quartiles, Report, type ReportFile, type Row } from "../bench/lib/report.ts";
import { judge } from "../bench/lib/targets.ts";
import { cannotTunnel } from "../bench/lib/tunnels.ts";
import { inTurns } from "../bench/lib/turns.ts";
import { resultsSection } from "../bench/publish.ts";
import { skip, tempDir } from "./lib/mesh.ts";

// Each part takes seconds on a free machine.
setDefaultTimeout(300_000);

const RUN = resolve(import.meta.dir, "../tools/run.ts");

async function bench(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const child = Bun.spawn([process.execPath, RUN, "bench", ...args], {
    env: process.env,
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { code, stdout, stderr };
}

/** Runs one part and checks what holds for all of them. */
async function quick(part: string, ...flags: string[]): Promise<Row[]> {
  return (await quickFile(part, ...flags)).rows;
}

async function quickFile(part: string, ...flags: string[]): Promise<ReportFile> {
  using dir = tempDir("bench");
  const path = join(dir.path, "out.json");
  const { code, stdout, stderr } = await bench(part, "--quick", "--json", path, ...flags);
  if (code !== 0) throw new Error(`bench ${part} ended with ${code}: ${stderr.slice(-2000)}`);
  const file = JSON.parse(readFileSync(path, "utf8")) as ReportFile;
  expect(file.commit).toMatch(/^([0-9a-f]{12}(-dirty)?|unknown)$/);
  expect(file.command).toStartWith(`${part} --quick`);
  expect(file.machine.cores).toMatch(/^\d+$/);
  expect(file.versions.bun).toBe(Bun.version);
  expect(file.rows.length).toBeGreaterThan(0);
  for (const row of file.rows) {
    expect(row.part).toBe(part);
    for (const text of [row.case, row.impl, row.metric, row.unit]) expect(text).toBeString();
    for (const value of [row.median, row.p25, row.p75]) expect([row, Number.isFinite(value)]).toEqual([row, true]);
    expect(row.p25).toBeLessThanOrEqual(row.median);
    expect(row.median).toBeLessThanOrEqual(row.p75);
    expect(row.n).toBeGreaterThan(0);
    expect(row.ratio === null || Number.isFinite(row.ratio)).toBe(true);
    expect(stdout).toContain(row.case);
  }
  expect(file.rows.some((row) => row.impl === "weft")).toBe(true);
  return file;
}

/** Of Weft, by metric. */
function positive(rows: Row[], ...metrics: string[]): void {
  for (const metric of metrics) {
    const row = rows.find((r) => r.impl === "weft" && r.metric === metric);
    expect([metric, (row?.median ?? 0) > 0]).toEqual([metric, true]);
  }
}

test("without a part it lists them; what it does not know is an error in one sentence", async () => {
  const list = await bench();
  expect(list.code).toBe(0);
  for (const part of [
    "crypto",
    "packets",
    "datapath",
    "handshake",
    "memory",
    "filter",
    "control",
    "soak",
    "all",
    "report",
  ])
    expect(list.stdout).toMatch(new RegExp(`^ {2}${part} `, "m"));
  for (const [args, expected] of [
    [["cripto"], /no part "cripto"/],
    [["crypto", "--against", "openvpn"], /"openvpn" is not known/],
    [["datapath", "--mtu", "500"], /--mtu takes 1280 to 9000, not 500/],
    [["crypto", "--rounds", "0"], /--rounds takes a whole number/],
    [["control", "--nodes", "1"], /--nodes takes whole numbers from 2 to 20000, not 1/],
    [["control", "--policy", "open"], /--policy: "open" is not known/],
    [["report"], /--from is missing/],
    [["report", "--from", "/nonexistent"], /cannot be read as results/],
  ] as const) {
    const { code, stdout, stderr } = await bench(...args);
    expect([args, code, stdout, stderr.trim().split("\n").length]).toEqual([args, 2, "", 1]);
    expect(stderr).toMatch(expected);
  }
});

test("rows: quartiles, Weft's share, and no number that is none", () => {
  const report = new Report("x");
  const of = { case: "c", metric: "m", unit: "ns" };
  report.add({ ...of, impl: "other" }, 4, 1, 3, 2, 5);
  report.add({ ...of, impl: "weft" }, 6);
  expect(report.rows()).toEqual([
    { part: "x", ...of, impl: "other", median: 3, p25: 2, p75: 4, n: 5, ratio: 2 },
    { part: "x", ...of, impl: "weft", median: 6, p25: 6, p75: 6, n: 1, ratio: null },
  ]);
  expect(quartiles([1, 2])).toEqual([1.25, 1.5, 1.75]);
  expect(() => report.add({ ...of, impl: "weft" }, Number.NaN)).toThrow("came out as NaN");
});

test("turns: every program in each round, another one first; a rival's failure is noted, Weft's is an error", async () => {
  const report = new Report("x");
  const order: string[] = [];
  await inTurns([{ impl: "weft" }, { impl: "other" }], 2, "case", report, async ({ impl }, round) => {
    order.push(`${impl} ${round}`);
    if (impl === "other") throw new Error(`it broke in round ${round}`);
  });
  expect(order).toEqual(["weft 0", "other 0", "other 1", "weft 1"]);
  expect(report.notes).toEqual([0, 1].map((round) => `other is left out of a round: it broke in round ${round}`));
  const broken = inTurns([{ impl: "weft --workers 2" }], 1, "case", report, () => Promise.reject(new Error("broken")));
  await expect(broken).rejects.toThrow("broken");
});

test("the published results: targets reached, missed and not measured; every number", () => {
  const row = (part: string, name: string, metric: string, impl: string, median: number, ratio: number | null): Row => {
    return { part, case: name, metric, impl, unit: "Mb/s", median, p25: median - 1, p75: median + 1, n: 3, ratio };
  };
  const tunnel = "WireGuard, MTU 1420";
  const rows = [
    row("datapath", tunnel, "TCP x1", "wireguard-go", 1000, 1.5),
    row("datapath", tunnel, "TCP x1", "weft", 1500, null),
    row("datapath", tunnel, "TCP x4", "wireguard-go", 1000, 1.1),
    row("datapath", tunnel, "TCP x4", "weft", 1100, null),
  ];
  const met = (what: string) => judge(rows).find((verdict) => verdict.what === what)?.met;
  expect([met("TCP x1"), met("TCP x4"), met("ping p50, idle")]).toEqual([true, false, null]);

  const file = { commit: "c0ffee", command: "all", date: "2026-01-02T03:04:05Z", machine: { cpu: "abacus" } };
  const older = { ...file, versions: { bun: "0" }, notes: ["one was left out"], rows: [{ ...rows[1]!, median: 1 }] };
  const text = resultsSection([older, { ...file, versions: { bun: "1" }, notes: [], rows }]);
  expect(text).toContain("- Machine: cpu abacus");
  expect(text).toContain("bun 1");
  expect(text).toContain("at commit c0ffee, 2026-01-02 03:04 UTC");
  expect(text).toContain("- one was left out");
  expect(text).toContain("1.50 × wireguard-go (WireGuard, MTU 1420) | yes |");
  expect(text).toContain("1.10 × wireguard-go (WireGuard, MTU 1420) | **no** |");
  expect(text).toMatch(/ping p50, idle \|[^|]*\| {2}\| not measured \|/);
  expect(text).toContain("| WireGuard, MTU 1420 | TCP x1, Mb/s | 1500 (1499 .. 1501) | 1000 (999 .. 1001); 1.50 × |");
});

test("crypto", async () => {
  const rows = await quick("crypto");
  expect(rows.some((row) => row.impl !== "weft" && row.ratio !== null)).toBe(true);
});

test("packets", async () => {
  positive(await quick("packets"), "seal", "open with replay window", "transmit: all of it");
});

test("filter", async () => {
  const rows = await quick("filter");
  expect(rows.some((row) => row.case.endsWith("1000 rules") && row.unit === "%")).toBe(true);
});

test("control: nodes that see all others, and nodes that see their own class", async () => {
  const rows = await quick("control", "--nodes", "60", "--churn", "1", "--policy", "allow-all,self");
  for (const metric of ["join: every node knows every other", "change: reaches a node, median", "join: server CPU"])
    positive(rows, metric, "storm: everybody has a full netmap");
  const ended = rows.filter((row) => row.metric.endsWith("streams that the server ended"));
  expect(ended.map(({ case: name, median }) => [name, median])).toEqual([
    ["60 nodes, allow-all", 0],
    ["60 nodes, self", 0],
  ]);
});

describe.skipIf(skip(cannotTunnel))("whole tunnels", () => {
  test("handshake", async () => {
    const rows = await quick("handshake", "--against", "wireguard-go");
    positive(rows, "handshakes as responder", "handshakes per CPU-second");
  });

  test("memory; a program that is not installed is named and left out", async () => {
    using empty = tempDir("peers");
    const { WEFT_PEERS } = process.env;
    process.env.WEFT_PEERS = empty.path;
    try {
      const { rows, notes } = await quickFile("memory", "--against", "boringtun,openssl");
      positive(rows, "idle", "most at any time");
      expect(rows.every((row) => row.impl === "weft")).toBe(true);
      expect(notes).toEqual(["memory: boringtun is left out: boringtun-cli not built: `bun run peers` installs it"]);
      expect(readdirSync(empty.path)).toEqual([]);
    } finally {
      if (WEFT_PEERS === undefined) delete process.env.WEFT_PEERS;
      else process.env.WEFT_PEERS = WEFT_PEERS;
    }
  });

  test("datapath", async () => {
    const rows = await quick("datapath", "--against", "wireguard-go", "--segment", "--mtu", "1380");
    positive(rows, "ping p50, idle", "TCP x1", "TCP x4 per CPU-second", "200 Mb/s of 1200-byte UDP", "64-byte UDP");
    expect(rows.some((row) => row.case === "WireGuard, MTU 1380, single packets" && row.impl === "raw veth")).toBe(
      true,
    );
    for (const name of ["UDP", "start"])
      expect(rows.some((row) => row.case === `${name}, MTU 1380, single packets`)).toBe(true);
    positive(await quick("datapath", "--only", "mtu"), "TCP x1", "UDP, superpackets per CPU-second");
  });
});
