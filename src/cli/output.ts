// How commands print results: a table for people, or json, json-line and yaml for programs. Only results go to standard
// output.
import { UsageError } from "./flags.ts";

const FORMATS = ["json", "json-line", "yaml"] as const;
export type Format = (typeof FORMATS)[number] | "table";

/** `--output`. Throws UsageError. */
export function parseFormat(text: string | undefined): Format {
  if (text === undefined || text === "") return "table";
  const format = FORMATS.find((name) => name === text);
  if (!format)
    throw new UsageError(`--output ${JSON.stringify(text)} is not known: it is one of ${FORMATS.join(", ")}`);
  return format;
}

/** `value` as text of a machine format, without the last newline. */
export function serialize(value: unknown, format: Exclude<Format, "table">): string {
  if (format === "yaml") return Bun.YAML.stringify(value, null, 2).trimEnd();
  return format === "json" ? JSON.stringify(value, null, "\t") : JSON.stringify(value);
}

/** Columns of equal width, separated by " | ". Control characters in cells are shown as "?". */
export function table(header: string[], rows: string[][]): string {
  const cells = [header, ...rows].map((row) => row.map((cell) => cell.replace(/\p{Cc}/gu, "?")));
  const widths = header.map((_, column) => Math.max(...cells.map((row) => Bun.stringWidth(row[column] ?? ""))));
  return cells
    .map((row) =>
      row
        .map((cell, column) => cell + " ".repeat(widths[column]! - Bun.stringWidth(cell)))
        .join(" | ")
        .trimEnd(),
    )
    .join("\n");
}

/** "2026-11-21 08:14:43", in the machine's time zone. */
export function showTime(text: string | null, absent: string): string {
  if (text === null) return absent;
  const date = new Date(text);
  const two = (n: number) => String(n).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}
