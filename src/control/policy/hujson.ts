// HuJSON: JSON with comments and trailing commas. Text becomes a tree whose nodes know their place, with bounds that hold
// before anything is parsed: length, depth, and one value only.
import { createScanner, type Node, type ParseError, parseTree, printParseErrorCode } from "jsonc-parser";
import { type Place, PolicyError } from "./error.ts";

/** Bytes of UTF-8. */
export const MAX_POLICY_BYTES = 1 << 20;
const MAX_DEPTH = 64;

// Of jsonc-parser's SyntaxKind, a const enum that cannot be imported by a module of its own.
const OPEN_BRACE = 1;
const CLOSE_BRACE = 2;
const OPEN_BRACKET = 3;
const CLOSE_BRACKET = 4;
const END = 17;

export function placeAt(text: string, offset: number): Place {
  let line = 1;
  let start = 0;
  for (let i = text.indexOf("\n"); i >= 0 && i < offset; i = text.indexOf("\n", i + 1)) {
    line++;
    start = i + 1;
  }
  return { line, column: offset - start + 1 };
}

/** A value of the document. Objects keep the order of their keys and refuse a key that stands twice. */
export class Value {
  constructor(
    readonly text: string,
    private readonly node: Node,
  ) {}

  /** To be thrown: what is wrong with this value. */
  wrong(message: string): PolicyError {
    return new PolicyError(message, placeAt(this.text, this.node.offset));
  }

  get offset(): number {
    return this.node.offset;
  }

  get isNull(): boolean {
    return this.node.type === "null";
  }

  /** As JSON.parse would give it. */
  plain(): unknown {
    switch (this.node.type) {
      case "object":
        return Object.fromEntries(this.entries("an object").map(([key, value]) => [key, value.plain()]));
      case "array":
        return this.items("a list").map((item) => item.plain());
      default:
        return this.node.value;
    }
  }

  /** Null counts as empty, here and below, as in the hosted service. */
  string(what: string): string {
    if (this.isNull) return "";
    if (this.node.type !== "string") throw this.wrong(`${what} must be a string, not ${kindOf(this.node)}`);
    return this.node.value as string;
  }

  /** A string, or a number as it is written in one. */
  word(what: string): string {
    return this.node.type === "number" ? String(this.node.value) : this.string(what);
  }

  boolean(what: string): boolean {
    if (this.isNull) return false;
    if (this.node.type !== "boolean") throw this.wrong(`${what} must be true or false, not ${kindOf(this.node)}`);
    return this.node.value as boolean;
  }

  items(what: string): Value[] {
    if (this.isNull) return [];
    if (this.node.type !== "array") throw this.wrong(`${what} must be a list, not ${kindOf(this.node)}`);
    return (this.node.children ?? []).map((child) => new Value(this.text, child));
  }

  strings(what: string): { text: string; at: Value }[] {
    return this.items(what).map((at) => ({ text: at.string(`each entry of ${what}`), at }));
  }

  /** Key, value, and the key as a value of its own, for its place. */
  entries(what: string): [key: string, value: Value, at: Value][] {
    if (this.isNull) return [];
    if (this.node.type !== "object") throw this.wrong(`${what} must be an object, not ${kindOf(this.node)}`);
    const seen = new Set<string>();
    return (this.node.children ?? []).map((property) => {
      const [key, value] = property.children as [Node, Node];
      const name = key.value as string;
      const at = new Value(this.text, key);
      if (seen.has(name)) throw at.wrong(`the key "${name}" stands twice in ${what}`);
      seen.add(name);
      return [name, new Value(this.text, value), at];
    });
  }
}

function kindOf(node: Node): string {
  return { object: "an object", array: "a list", property: "a property" }[node.type as string] ?? `a ${node.type}`;
}

const SYNTAX: Readonly<Record<string, string>> = {
  InvalidSymbol: "this is no JSON value",
  InvalidNumberFormat: "this is no JSON number",
  PropertyNameExpected: 'a key in double quotes, or "}", is expected here',
  ValueExpected: "a value is expected here",
  ColonExpected: 'a ":" is expected here',
  CommaExpected: 'a "," is expected here',
  CloseBraceExpected: 'a "}" is expected here',
  CloseBracketExpected: 'a "]" is expected here',
  EndOfFileExpected: "nothing may follow the policy",
  UnexpectedEndOfComment: "this comment has no end",
  UnexpectedEndOfString: "this string has no end",
};

/** Null: the text holds nothing but blanks and comments. */
export function parseHuJSON(text: string): Value | null {
  const bytes = Buffer.byteLength(text);
  if (bytes > MAX_POLICY_BYTES) {
    throw new PolicyError(`the policy has ${bytes} bytes, more than the ${MAX_POLICY_BYTES} that are allowed`);
  }
  // The parser recurses, so depth is bounded first, by its scanner alone.
  const scanner = createScanner(text, true);
  let depth = 0;
  let empty = true;
  for (let token: number = scanner.scan(); token !== END; token = scanner.scan()) {
    empty = false;
    if (token === OPEN_BRACE || token === OPEN_BRACKET) depth++;
    else if (token === CLOSE_BRACE || token === CLOSE_BRACKET) depth--;
    if (depth > MAX_DEPTH) {
      const place = placeAt(text, scanner.getTokenOffset());
      throw new PolicyError(`the policy is nested deeper than ${MAX_DEPTH} levels`, place);
    }
  }
  if (empty) return null;
  const errors: ParseError[] = [];
  const root = parseTree(text, errors, { allowTrailingComma: true });
  const error = errors[0];
  if (error || !root) {
    const code = error ? printParseErrorCode(error.error) : "InvalidSymbol";
    const what = SYNTAX[code] ?? code;
    throw new PolicyError(`the policy is not valid HuJSON: ${what}`, placeAt(text, error?.offset ?? 0));
  }
  return new Value(text, root);
}
