// `bun run bench report [--from FILE,...]`: puts the results of full runs into docs/performance.md, between two markers: machine,
// versions, commit; the targets beside what was reached; every table. What stands outside of the markers is written by hand.
import { readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { parseFlags, UsageError } from "../src/cli/flags.ts";
import { number, type ReportFile, type Row } from "./lib/report.ts";
import { judge } from "./lib/targets.ts";

const PAGE = resolve(import.meta.dir, "../docs/performance.md");
const BEGIN = "<!-- results: written by `bun run bench report`, do not edit -->";
const END = "<!-- end of results -->";

const usage = `usage: bun run bench report --from FILE[,FILE…]
Writes the results in FILEs (of \`bun run bench all --json FILE\`) into docs/performance.md. Where two files have the same row, the later
file's counts.`;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("bench report", argv, { from: "list", help: "boolean" }, usage);
  if (flags.help) {
    console.log(usage);
    return 0;
  }
  if (!flags.from?.length) throw new UsageError("--from is missing: the file of `bun run bench all --json FILE`");
  const page = readFileSync(PAGE, "utf8");
  const [begin, end] = [page.indexOf(BEGIN), page.indexOf(END)];
  if (begin < 0 || end < begin) throw new Error(`${PAGE} lacks the lines "${BEGIN}" and "${END}": put them back`);
  const text = resultsSection(flags.from.map(readReport));
  writeFileSync(PAGE, `${page.slice(0, begin + BEGIN.length)}\n${text}\n${page.slice(end)}`);
  return 0;
}

function readReport(path: string): ReportFile {
  let file: ReportFile;
  try {
    file = JSON.parse(readFileSync(path, "utf8")) as ReportFile;
  } catch (error) {
    throw new UsageError(`${path} cannot be read as results: ${(error as Error).message}`);
  }
  if (!Array.isArray(file.rows) || typeof file.commit !== "string")
    throw new UsageError(`${path} holds no results: it must be what --json has written`);
  return file;
}

export function resultsSection(files: readonly ReportFile[]): string {
  const rows = merge(files.flatMap((file) => file.rows));
  const distinct = (values: string[]) => [...new Set(values)];
  const pairs = (record: Record<string, string>) =>
    Object.entries(record)
      .map(([name, value]) => `${name} ${value}`)
      .join(", ");
  const notes = distinct(files.flatMap((file) => file.notes));
  return [
    `- Machine: ${distinct(files.map((file) => pairs(file.machine))).join("; ")}`,
    `- Versions: ${pairs(Object.assign({}, ...files.map((file) => file.versions)))}`,
    ...files.map(
      (file) =>
        `- \`bun run bench ${file.command}\` at commit ${file.commit}, ${file.date.slice(0, 16).replace("T", " ")} UTC`,
    ),
    ...notes.map((note) => `- ${note}`),
    "",
    "### Targets",
    "",
    "| what | target | reached | |",
    "|---|---|---|---|",
    ...judge(rows).map(
      ({ what, target, reached, met }) =>
        `| ${what} | ${target} | ${reached} | ${met === null ? "not measured" : met ? "yes" : "**no**"} |`,
    ),
    "",
    ...[...Map.groupBy(rows, (row) => row.part)].flatMap(([part, own]) => [`### ${part}`, "", ...partTables(own)]),
  ]
    .join("\n")
    .trimEnd();
}

/** The last of equal rows counts. */
function merge(rows: Row[]): Row[] {
  const last = new Map<string, Row>();
  for (const row of rows) last.set(JSON.stringify([row.part, row.case, row.metric, row.impl]), row);
  return [...last.values()];
}

/** One table for each set of programs that were measured beside each other: a line for each quantity. */
function partTables(rows: Row[]): string[] {
  const lines = [...Map.groupBy(rows, (row) => JSON.stringify([row.case, row.metric])).values()];
  const programs = (group: Row[]) => group.map((row) => row.impl);
  const tables: { programs: string[]; lines: Row[][] }[] = [];
  for (const [, own] of Map.groupBy(lines, (group) => group[0]!.case)) {
    // The programs of a case, Weft first.
    const all = [...new Set(own.flatMap(programs))].sort((a, b) => Number(b === "weft") - Number(a === "weft"));
    const before = tables.at(-1);
    if (before && JSON.stringify(before.programs) === JSON.stringify(all)) before.lines.push(...own);
    else tables.push({ programs: all, lines: own });
  }
  return tables.flatMap(({ programs: columns, lines: body }) => [
    `| case | what | ${columns.join(" | ")} |`,
    `|---|---|${columns.map(() => "---").join("|")}|`,
    ...body.map((group) => {
      const { case: name, metric, unit } = group[0]!;
      const cells = columns.map((impl) => cell(group.find((row) => row.impl === impl)));
      return `| ${name} | ${metric}, ${unit} | ${cells.join(" | ")} |`;
    }),
    "",
  ]);
}

/** Median (25 % .. 75 %), and Weft's median divided by this one. */
function cell(row: Row | undefined): string {
  if (!row) return "";
  const spread = row.n > 1 ? ` (${number(row.p25)} .. ${number(row.p75)})` : "";
  return `${number(row.median)}${spread}${row.ratio === null ? "" : `; ${number(row.ratio)} ×`}`;
}
