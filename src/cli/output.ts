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
  if (format === "yaml") return yaml(value);
  const text = format === "json" ? JSON.stringify(value, null, "\t") : JSON.stringify(value);
  return text.replace(UNPRINTABLE, (c) =>
    c === "\n" || c === "\t" ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Bun's writer leaves 8-bit controls and turned text as they are, so they go through it as something that it escapes. */
function yaml(value: unknown): string {
  const mark = (c: string) => `\u0001${c.charCodeAt(0).toString(16).padStart(4, "0")}\u0002`;
  const marked = (text: string) => text.replace(MARKED, (c) => (c === "\n" || c === "\t" ? c : mark(c)));
  const all = (part: unknown): unknown => {
    if (typeof part === "string") return marked(part);
    if (Array.isArray(part)) return part.map(all);
    if (typeof part !== "object" || part === null) return part;
    return Object.fromEntries(Object.entries(part).map(([key, entry]) => [marked(key), all(entry)]));
  };
  return Bun.YAML.stringify(all(value), null, 2)
    .trimEnd()
    .replace(/\\x01([0-9a-f]{4})\\x02/g, "\\u$1");
}

/** What drives a terminal, and what turns the direction of text: names of strangers must not change what a person sees. */
const UNPRINTABLE = /[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu;

/** And what looks like a mark in YAML that was escaped. */
const MARKED = new RegExp(`\\\\(?=x01)|${UNPRINTABLE.source}`, "gu");

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
