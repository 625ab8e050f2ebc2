// The targets that Weft was built for, and what a run says about each: ratios of medians in one run.
import { number, type Row } from "./report.ts";

export interface Verdict {
  what: string;
  target: string;
  reached: string;
  /** Null: the run did not measure it. */
  met: boolean | null;
}

type Find = (part: string, of: string, metric: string | RegExp, impl: string) => Row | undefined;

const WHOLE = "WireGuard, MTU 1420";
const SINGLE = "WireGuard, MTU 1420, single packets";
const MESH = "mesh, MTU 1280";
const MESH_SINGLE = "mesh, MTU 1280, single packets";

export function judge(rows: readonly Row[]): Verdict[] {
  const find: Find = (part, of, metric, impl) =>
    rows.find(
      (row) =>
        row.part === part &&
        row.case === of &&
        row.impl === impl &&
        (typeof metric === "string" ? row.metric === metric : metric.test(row.metric)),
    );
  /** Weft divided by others, in each case where both were measured. */
  const ratios = (part: string, pairs: [of: string, rival: string][], metric: string) =>
    pairs.flatMap(([of, rival]) => {
      const [weft, other] = [find(part, of, metric, "weft"), find(part, of, metric, rival)];
      return weft && other && other.median !== 0 ? [{ of, rival, value: weft.median / other.median }] : [];
    });
  const compare = (
    what: string,
    target: string,
    list: { of: string; rival: string; value: number }[],
    good: (value: number) => boolean,
  ): Verdict => ({
    what,
    target,
    reached: list.map(({ of, rival, value }) => `${number(value)} × ${rival} (${of})`).join("; "),
    met: list.length === 0 ? null : list.every(({ value }) => good(value)),
  });
  const absolute = (
    what: string,
    target: string,
    list: (Row | undefined)[],
    good: (value: number) => boolean,
  ): Verdict => {
    const there = list.filter((row) => row !== undefined);
    return {
      what,
      target,
      reached: there
        .map((row) => `${number(row.median)} ${row.unit}${there.length > 1 ? ` (${row.case})` : ""}`)
        .join("; "),
      met: there.length === 0 ? null : there.every((row) => good(row.median)),
    };
  };

  const best: [string, string][] = [
    [WHOLE, "wireguard-go"],
    [SINGLE, "wireguard-go"],
    [MESH, "tailscaled"],
    [MESH_SINGLE, "tailscaled"],
  ];
  const beside = (rival: string): [string, string][] => [
    [WHOLE, rival],
    [SINGLE, rival],
  ];
  const per = "per CPU-second";
  const udp = "200 Mb/s of 1200-byte UDP";
  const fair = "8 peers, one floods, MTU 1420";
  const starts = ["start, MTU 1420", "start, MTU 1420, single packets"];
  const start = (metric: string) => starts.map((of) => find("datapath", of, metric, "weft"));
  const memory = (metric: string | RegExp) => find("memory", "tunnel, MTU 1420", metric, "weft");
  const rules = rows.filter(
    (row) => row.part === "filter" && row.case.endsWith("1000 rules") && row.unit === "%" && row.case.includes("1420"),
  );

  return [
    compare(
      "TCP x1",
      "≥ 1.2 × the best of wireguard-go and tailscaled",
      ratios("datapath", best, "TCP x1"),
      (v) => v >= 1.2,
    ),
    compare(
      "TCP x4",
      "≥ 1.2 × the best of wireguard-go and tailscaled",
      ratios("datapath", best, "TCP x4"),
      (v) => v >= 1.2,
    ),
    ...["TCP x1", "TCP x4"].map((tcp) =>
      compare(
        `${tcp}, Mb per CPU-second of both ends`,
        "≥ 1.3 × the best of them",
        ratios("datapath", best, `${tcp} ${per}`),
        (v) => v >= 1.3,
      ),
    ),
    absolute(
      "cores at 200 Mb/s of 1200-byte UDP, both ends",
      "≤ 0.24",
      [WHOLE, SINGLE].map((of) => find("datapath", of, udp, "weft")),
      (v) => v <= 0.24,
    ),
    compare("the same beside gotatun in this run", "≤ 1 ×", ratios("datapath", beside("gotatun"), udp), (v) => v <= 1),
    ...[64, 300].map((bytes) =>
      compare(
        `${bytes}-byte UDP, packets per CPU-second`,
        "≥ 2 × wireguard-go",
        ratios("datapath", beside("wireguard-go"), `${bytes}-byte UDP ${per}`),
        (v) => v >= 2,
      ),
    ),
    ...["ping p50, idle", "ping p99, idle"].map((metric) =>
      compare(metric, "≤ 1 × boringtun", ratios("datapath", beside("boringtun"), metric), (v) => v <= 1),
    ),
    compare(
      "ping p99 while TCP x4 runs",
      "≤ 0.5 × wireguard-go and boringtun",
      ratios("datapath", [...beside("wireguard-go"), ...beside("boringtun")], "ping p99, during TCP x4"),
      (v) => v <= 0.5,
    ),
    absolute("resident memory, idle", "≤ 45 MB", [memory("idle")], (v) => v <= 45),
    absolute("after TCP x4", "≤ 60 MB", [memory(/^after /)], (v) => v <= 60),
    absolute("growth in the second half of it", "flat: ≤ 1 MB", [memory("growth in the second half")], (v) => v <= 1),
    absolute("with 1,000 peers", "≤ 80 MB", [find("memory", "1000 peers configured", "idle", "weft")], (v) => v <= 80),
    ...crypto(rows),
    compare(
      "handshakes per second as responder, one core",
      "≥ wireguard-go's",
      ratios("handshake", [["400 peers, one core", "wireguard-go"]], "handshakes as responder"),
      (v) => v >= 1,
    ),
    absolute(
      "throughput in the first second",
      "≥ 80 % of full speed",
      start("TCP x1 in the first second, of full speed"),
      (v) => v >= 80,
    ),
    absolute(
      "lost in the first second",
      "no packet",
      start("lost of 100 Mb/s UDP in the first second"),
      (v) => v === 0,
    ),
    absolute("packet filter with 1,000 rules, 1420-byte packets, in wasm", "< 5 %", rules, (v) => v < 5),
    absolute(
      "8 peers, one floods: what the others get of 5 Mb/s",
      "5 Mb/s",
      [find("datapath", fair, "the slowest of the others at 5 Mb/s", "weft")],
      (v) => v >= 4.95,
    ),
    absolute(
      "their ping p99",
      "< 10 ms",
      [find("datapath", fair, "ping p99 of one of the others", "weft")],
      (v) => v < 10,
    ),
  ];
}

/** Throughput of the primitives: rows of one case, whoever took part. */
function crypto(rows: readonly Row[]): Verdict[] {
  const against = (what: string, of: RegExp, rival: RegExp, metric: string, least: number): Verdict => {
    const list = rows.filter(
      (row) =>
        row.part === "crypto" &&
        of.test(row.case) &&
        rival.test(row.impl) &&
        row.metric === metric &&
        row.ratio !== null,
    );
    // Of times the ratio is below 1 where Weft is faster.
    const values = list.map((row) => ({ row, value: row.unit === "ns" ? 1 / row.ratio! : row.ratio! }));
    return {
      what,
      target: `≥ ${least} ×`,
      reached: values.map(({ row, value }) => `${number(value)} × ${row.impl} (${row.case})`).join("; "),
      met: values.length === 0 ? null : values.every(({ value }) => value >= least),
    };
  };
  const aead = /^AEAD (seal|open),? 1420/;
  return [
    against("AEAD at 1420 bytes beside OpenSSL held to 128-bit vectors", aead, /^openssl.*128/i, "throughput", 0.75),
    against("AEAD at 1420 bytes beside @noble/ciphers", aead, /^noble/, "throughput", 15),
    against("X25519 beside node:crypto", /^X25519/, /^node:crypto/, "time per call", 0.7),
  ];
}
