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
  const text = format === "json" ? JSON.stringify(value, null, "\t") : JSON.stringify(value);
  return text.replace(UNPRINTABLE, (c) =>
    c === "\n" || c === "\t" ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** What drives a terminal, and what turns the direction of text: names of strangers must not change what a person sees. */
const UNPRINTABLE = /[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu;

/** Lines for a terminal, with "?" for what is not for people. */
export function printable(text: string): string {
  return text.replace(UNPRINTABLE, (c) => (c === "\n" || c === "\t" ? c : "?"));
}

/** The same for text that is a part of a line. */
export function printableCell(text: string): string {
  return text.replace(UNPRINTABLE, "?");
}

/** Columns of equal width, separated by " | ". What does not belong into a line is shown as "?". */
export function table(header: string[], rows: string[][]): string {
  const cells = [header, ...rows].map((row) => row.map(printableCell));
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
