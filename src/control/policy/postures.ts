// Device postures: named lists of conditions on a node's attributes, "node:os IN ['macos', 'windows']".
import type { Condition, PolicyNode } from "./types.ts";

type Atom = string | number | boolean;

const OPERATORS = "==|!=|<=|>=|<|>|NOT IN|IN|IS SET|NOT SET";
const CONDITION = new RegExp(`^([a-zA-Z]+:[a-zA-Z0-9_]{1,64})\\s*(${OPERATORS})\\s*(.*)$`, "s");

function parseAtom(text: string): Atom | null {
  if (text === "true" || text === "false") return text === "true";
  if (/^'[^']*'$/.test(text) || /^"[^"]*"$/.test(text)) return text.slice(1, -1);
  if (/^-?\d{1,15}(\.\d{1,15})?$/.test(text)) return Number(text);
  return null;
}

/** Throws an Error with the bare sentence. */
export function parseCondition(text: string): Condition {
  const quoted = JSON.stringify(text);
  const match = CONDITION.exec(text.trim());
  if (!match) throw new Error(`${quoted} is no condition: write one like "node:os == 'linux'"`);
  const operator = match[2] as Condition["operator"];
  const rest = match[3]!.trim();
  const attribute = match[1]!;
  if (operator === "IS SET" || operator === "NOT SET") {
    if (rest !== "") throw new Error(`${quoted}: nothing may follow ${operator}`);
    return { attribute, operator, values: [] };
  }
  let words = [rest];
  if (operator === "IN" || operator === "NOT IN") {
    if (!/^\[.*\]$/s.test(rest)) throw new Error(`${quoted}: ${operator} wants a list like ['a', 'b']`);
    words = rest.slice(1, -1).trim() === "" ? [] : rest.slice(1, -1).split(",");
  }
  const values = words.map((word) => {
    const atom = parseAtom(word.trim());
    if (atom === null)
      throw new Error(`${quoted}: ${JSON.stringify(word.trim())} is no 'string', number, true or false`);
    return atom;
  });
  return { attribute, operator, values };
}

/** Versions compare part by part, so that 1.9 comes before 1.10. */
function compare(a: Atom, b: Atom): number {
  if (typeof a === "number" && typeof b === "number") return a - b;
  const left = String(a).split(/[.-]/);
  const right = String(b).split(/[.-]/);
  for (let i = 0; i < Math.max(left.length, right.length); i++) {
    const x = left[i] ?? "0";
    const y = right[i] ?? "0";
    if (x === y) continue;
    const numeric = /^\d{1,15}$/.test(x) && /^\d{1,15}$/.test(y);
    if (numeric && Number(x) !== Number(y)) return Number(x) - Number(y);
    if (!numeric) return x < y ? -1 : 1;
  }
  return 0;
}

function meets(value: Atom | undefined, { operator, values }: Condition): boolean {
  if (operator === "IS SET") return value !== undefined;
  if (operator === "NOT SET") return value === undefined;
  // An unknown attribute meets nothing, not even "!=".
  if (value === undefined) return false;
  if (operator === "IN") return values.some((other) => other === value);
  if (operator === "NOT IN") return values.every((other) => other !== value);
  const order = compare(value, values[0]!);
  switch (operator) {
    case "==":
      return order === 0;
    case "!=":
      return order !== 0;
    case "<":
      return order < 0;
    case "<=":
      return order <= 0;
    case ">":
      return order > 0;
    case ">=":
      return order >= 0;
  }
}

/** All conditions of a posture must hold. */
export function meetsPosture(node: PolicyNode, conditions: readonly Condition[]): boolean {
  return conditions.every((condition) => meets(node.attributes?.[condition.attribute], condition));
}

/** `meetsPosture` of many nodes: what several have alike is compared once. */
export function postureTest(conditions: readonly Condition[]): (node: PolicyNode) => boolean {
  const known = conditions.map((condition) => ({ condition, met: new Map<Atom | undefined, boolean>() }));
  return ({ attributes }) =>
    known.every(({ condition, met }) => {
      const value = attributes?.[condition.attribute];
      let answer = met.get(value);
      if (answer === undefined) {
        answer = meets(value, condition);
        met.set(value, answer);
      }
      return answer;
    });
}
