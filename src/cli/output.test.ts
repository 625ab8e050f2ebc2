import { expect, test } from "bun:test";
import { printable, serialize, table } from "./output.ts";

const ESC = "\u001b";
const HOSTILE = `${ESC}]0;title\u0007${ESC}[2J\u009b31m\u202egnp.exe\u2066\r\n1 | admin\u2028x`;
const DANGEROUS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/;

test("a name with escape sequences, line ends or turned text stays in its cell of a table", () => {
  const lines = table(
    ["ID", "Name"],
    [
      ["1", HOSTILE],
      ["2", "good"],
    ],
  ).split("\n");
  expect(lines).toHaveLength(3);
  expect(lines[1]).toBe("1  | ?]0;title??[2J?31m?gnp.exe???1 | admin?x");
  expect(lines.join("")).not.toMatch(DANGEROUS);
});

test("what a node answers is printed with its lines, and without what drives a terminal", () => {
  expect(printable(`200\n{\t"a": "${ESC}[31m\u202e"}\n日本 é`)).toBe('200\n{\t"a": "?[31m?"}\n日本 é');
});

test("YAML says the same and has nothing that drives a terminal either", () => {
  const value = {
    "k\u202e": [HOSTILE, "plain", "\\x01202e\\x02", "\u00011b5b\u0002", "two\nlines"],
    n: 1,
    none: null,
  };
  const text = serialize(value, "yaml");
  expect(text).not.toMatch(DANGEROUS);
  expect(Bun.YAML.parse(text)).toEqual(value);
  expect(text).toContain("- plain\n");
});

test("JSON says the same and has nothing that drives a terminal either", () => {
  for (const format of ["json", "json-line"] as const) {
    const text = serialize([{ name: HOSTILE }], format);
    expect(text).not.toMatch(DANGEROUS);
    expect(JSON.parse(text)).toEqual([{ name: HOSTILE }]);
  }
});
