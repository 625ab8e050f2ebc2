// Results of the suite: samples become rows, rows a table for people and a file for programs.
import { writeFileSync } from "node:fs";
import { table } from "../../src/cli/output.ts";

/** One measured quantity of one program. */
export interface Row {
  part: string;
  case: string;
  /** "weft", or whom it is measured beside. */
  impl: string;
  metric: string;
  unit: string;
  median: number;
  p25: number;
  p75: number;
  /** Samples behind the median. */
  n: number;
  /** Weft's median divided by this row's, same case and metric; null for Weft's own rows and where Weft has none. */
  ratio: number | null;
}

export interface Quantity {
  case: string;
  impl: string;
  metric: string;
  unit: string;
}

/** What `--json` writes. */
export interface ReportFile {
  /** The checkout's, with "-dirty" when it differs from it. */
  commit: string;
  /** Command line after `bun run bench`. */
  command: string;
  /** RFC 3339. */
  date: string;
  machine: Record<string, string>;
  /** Name to version, of everything that took part. */
  versions: Record<string, string>;
  /** What was left out, and why: one sentence each. */
  notes: string[];
  rows: Row[];
}

/** Gathers the samples of one part. Rows come in the order in which their first samples came. */
export class Report {
  readonly part: string;
  readonly notes: string[] = [];
  readonly versions: Record<string, string> = {};
  readonly #samples = new Map<string, { of: Quantity; values: number[] }>();

  constructor(part: string) {
    this.part = part;
  }

  /** Values that are not finite are refused: a part that measured nothing must not look like one that did. */
  add(of: Quantity, ...values: number[]): void {
    const bad = values.find((value) => !Number.isFinite(value));
    if (bad !== undefined)
      throw new Error(`bench ${this.part}: ${of.impl}, ${of.case}, ${of.metric} came out as ${bad}`);
    const key = JSON.stringify([of.case, of.metric, of.impl]);
    const entry = this.#samples.get(key) ?? { of, values: [] };
    this.#samples.set(key, entry);
    for (const value of values) entry.values.push(value);
  }

  /** Says on stderr what was left out, and keeps it for the file. */
  note(text: string): void {
    if (this.notes.includes(text)) return;
    this.notes.push(text);
    progress(`${this.part}: ${text}`);
  }

  rows(): Row[] {
    const rows = [...this.#samples.values()].map(({ of, values }): Row => {
      const [p25, median, p75] = quartiles(values);
      return { part: this.part, ...of, median, p25, p75, n: values.length, ratio: null };
    });
    for (const row of rows) {
      const weft = rows.find((r) => r.impl === "weft" && r.case === row.case && r.metric === row.metric);
      if (weft && row !== weft && row.median !== 0) row.ratio = weft.median / row.median;
    }
    return rows;
  }
}

/** 25th, 50th and 75th percentile, interpolated. NaN for no samples. */
export function quartiles(samples: readonly number[]): [number, number, number] {
  const sorted = [...samples].sort((a, b) => a - b);
  return [quantile(sorted, 0.25), quantile(sorted, 0.5), quantile(sorted, 0.75)];
}

function quantile(sorted: readonly number[], share: number): number {
  const at = (sorted.length - 1) * share;
  const low = sorted[Math.floor(at)] ?? Number.NaN;
  const high = sorted[Math.ceil(at)] ?? Number.NaN;
  return low + (high - low) * (at - Math.floor(at));
}

/** Programs of one case and metric stand together. */
export function rowsTable(rows: readonly Row[]): string {
  const groups = Map.groupBy(rows, (row) => `${row.case}\0${row.metric}`);
  const cells = [...groups.values()].flatMap((group) =>
    group.map((row, i) => [
      i === 0 ? row.case : "",
      i === 0 ? `${row.metric} (${row.unit})` : "",
      row.impl,
      number(row.median),
      `${number(row.p25)} .. ${number(row.p75)}`,
      `${row.n}`,
      row.ratio === null ? "" : number(row.ratio),
    ]),
  );
  return table(["case", "what", "program", "median", "25 % .. 75 %", "n", "Weft / it"], cells);
}

/** Three significant digits, without an exponent. */
export function number(value: number): string {
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 6));
}

export function writeReport(path: string, file: ReportFile): void {
  writeFileSync(path, `${JSON.stringify(file, null, 1)}\n`);
}

/** Progress goes to standard error: standard output holds results only. */
export function progress(text: string): void {
  process.stderr.write(`bench: ${text}\n`);
}
