// A configuration file as text: its values, and on which line each key stands, so that a mistake can be named with its place.
// YAML is read by the runtime, which keeps no positions; they are found here by indentation. JSON has them from its parser.
import { findNodeAtLocation, getNodeValue, type ParseError, parseTree, printParseErrorCode } from "jsonc-parser";
import { UsageError } from "./flags.ts";

/** Bytes of a configuration file. */
const MAX_FILE = 1 << 20;
/** Lines of a file that are tried one by one to find a mistake. */
const MAX_TRIED = 1000;

/** Steps from the root: names of keys, and numbers of list items. */
export type KeyPath = readonly (string | number)[];

export interface Source {
  /** An object; {} when the file is empty. */
  value: Record<string, unknown>;
  /** "FILE:LINE", of the nearest part of the path that has a line of its own. */
  place(path: KeyPath): string;
}

/** `file` is for the messages. Throws UsageError with the line of what cannot be read. */
export function parseSource(file: string, text: string): Source {
  if (Buffer.byteLength(text) > MAX_FILE)
    throw new UsageError(`${file} is larger than ${MAX_FILE} bytes: that is no configuration file`);
  const { value, lineOf } = file.endsWith(".json") ? parseJson(file, text) : parseYaml(file, text);
  if (value === null || value === undefined) return { value: {}, place: () => file };
  if (typeof value !== "object" || Array.isArray(value))
    throw new UsageError(`${file} must hold keys and values, such as "server_url: https://weft.example.com"`);
  const place = (path: KeyPath): string => {
    for (let length = path.length; length > 0; length--) {
      const line = lineOf(path.slice(0, length));
      if (line !== null) return `${file}:${line}`;
    }
    return file;
  };
  return { value: value as Record<string, unknown>, place };
}

interface Parsed {
  value: unknown;
  lineOf(path: KeyPath): number | null;
}

function parseJson(file: string, text: string): Parsed {
  const lineAt = (offset: number) => text.slice(0, offset).split("\n").length;
  const errors: ParseError[] = [];
  const tree = parseTree(text, errors, { allowTrailingComma: true });
  const [error] = errors;
  if (error) throw new UsageError(`${file}:${lineAt(error.offset)}: not JSON (${printParseErrorCode(error.error)})`);
  const value: unknown = tree ? getNodeValue(tree) : null;
  return {
    value,
    lineOf: (path) => {
      const node = tree && findNodeAtLocation(tree, [...path]);
      return node ? lineAt((node.parent ?? node).offset) : null;
    },
  };
}

function parseYaml(file: string, text: string): Parsed {
  const lines = text.split(/\r?\n/);
  let value: unknown;
  try {
    value = Bun.YAML.parse(text);
  } catch (error) {
    const reason = (error as Error).message.replace(/^YAML Parse error: /, "");
    throw new UsageError(`${file}:${firstBadLine(lines)}: not YAML (${reason})`);
  }
  const places = new Map<string, number>();
  for (const { path, line } of keysOf(lines)) {
    const name = JSON.stringify(path);
    const before = places.get(name);
    if (before !== undefined && typeof path.at(-1) === "string")
      throw new UsageError(`${file}:${line}: the key "${path.join(".")}" is given twice, first on line ${before}`);
    places.set(name, line);
  }
  return { value, lineOf: (path) => places.get(JSON.stringify(path)) ?? null };
}

/** The parser does not say where. What stands before the trouble can be read, what stands behind it never with it. */
function firstBadLine(lines: string[]): number {
  const isGood = (count: number) => {
    try {
      Bun.YAML.parse(lines.slice(0, count).join("\n"));
      return true;
    } catch {
      return false;
    }
  };
  let good = lines.length - 1;
  if (good > MAX_TRIED) {
    // Something long that is not YAML at all, perhaps: about where it ends to be.
    let bad = lines.length;
    for (good = 0; bad - good > 1; ) {
      const middle = (good + bad) >>> 1;
      if (isGood(middle)) good = middle;
      else bad = middle;
    }
    return good + 1;
  }
  while (good > 0 && !isGood(good)) good--;
  return good + 1;
}

/** Keys and list items of YAML's block style, with the numbers of their lines. What stands in {} or [] has none of its own. */
function* keysOf(lines: string[]): Generator<{ path: KeyPath; line: number }> {
  const open: { indent: number; step: string | number }[] = [];
  const path = () => open.map(({ step }) => step);
  let scalarIndent: number | null = null;
  for (const [number, line] of lines.entries()) {
    if (/^\s*(#|$)/.test(line) || /^(---|\.\.\.|%)/.test(line)) continue;
    let indent = line.search(/\S/);
    if (scalarIndent !== null && indent > scalarIndent) continue;
    scalarIndent = null;
    let rest = line.slice(indent);
    for (let dash = /^-\s+|^-$/.exec(rest); dash; dash = /^-\s+|^-$/.exec(rest)) {
      // A list may stand as far left as the key that it belongs to.
      while (open.length > 0 && open.at(-1)!.indent > indent) open.pop();
      const last = open.at(-1);
      const isNext = last?.indent === indent && typeof last.step === "number";
      if (isNext) open.pop();
      open.push({ indent, step: isNext ? (last.step as number) + 1 : 0 });
      yield { path: path(), line: number + 1 };
      indent += dash[0].length;
      rest = rest.slice(dash[0].length);
    }
    const key = /^(?:"([^"]*)"|'([^']*)'|([^\s"'#&*!|>%@`{[][^#]*?))\s*:(?:\s+(.*))?$/.exec(rest);
    if (!key) continue;
    while (
      open.length > 0 &&
      (open.at(-1)!.indent > indent || (open.at(-1)!.indent === indent && typeof open.at(-1)!.step === "string"))
    )
      open.pop();
    while (open.length > 0 && open.at(-1)!.indent >= indent) open.pop();
    open.push({ indent, step: key[1] ?? key[2] ?? key[3]! });
    yield { path: path(), line: number + 1 };
    if (/^[|>][-+\d]*\s*(#.*)?$/.test(key[4] ?? "")) scalarIndent = indent;
  }
}
