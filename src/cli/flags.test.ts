import { describe, expect, test } from "bun:test";
import { nearest, parseDuration, parseFlags, UsageError } from "./flags.ts";

const spec = {
  state: "string",
  port: "number",
  verbose: "boolean",
  tags: "list",
  output: { kind: "string", short: "o" },
  expiration: { kind: "duration", short: "e" },
} as const;
const parse = (...argv: string[]) => parseFlags("t", argv, spec, "", 2);

describe("flags", () => {
  test("one or two dashes, with = or a following value, mixed with arguments", () => {
    expect(parse("-state=a", "x", "--port", "7", "-o", "json", "y")).toEqual({
      _: ["x", "y"],
      state: "a",
      port: 7,
      output: "json",
    });
  });
  test("booleans stand alone or take =", () => {
    expect(parse("--verbose", "x").verbose).toBe(true);
    expect(parse("--verbose=false").verbose).toBe(false);
  });
  test("lists split at commas and repeat", () => {
    expect(parse("--tags", "tag:a,tag:b", "--tags=tag:c").tags).toEqual(["tag:a", "tag:b", "tag:c"]);
  });
  test("-- ends the flags", () => {
    expect(parse("--", "--port")._).toEqual(["--port"]);
  });
  test("durations", () => {
    expect(parse("-e", "24h").expiration).toBe(86_400_000);
    expect(parseDuration("1h30m")).toBe(5_400_000);
    expect(parseDuration("abc")).toBeNull();
    expect(parseDuration("")).toBeNull();
  });
  for (const [argv, words] of [
    [
      ["--prot", "1"],
      ["--prot", "did you mean --port"],
    ],
    [
      ["--port", "abc"],
      ["--port", "abc"],
    ],
    [["--port"], ["--port needs a value"]],
    [["--verbose=maybe"], ["maybe"]],
    [["a", "b", "c"], ['"c"']],
    [
      ["-e", "soon"],
      ["soon", "24h"],
    ],
  ] as const) {
    test(`${argv.join(" ")} is one sentence`, () => {
      expect(() => parse(...argv)).toThrow(UsageError);
      for (const word of words) expect(() => parse(...argv)).toThrow(word);
    });
  }
  test("the nearest word is only offered when it is near", () => {
    expect(nearest("stae", ["state", "port"])).toBe("state");
    expect(nearest("zzzzzz", ["state", "port"])).toBeNull();
  });
});
