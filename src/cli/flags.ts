// Command-line flags as Go's flag package and tailscaled take them: one or two dashes, `-flag=value` or `-flag value`, booleans
// alone or with `=`. Flags and positional arguments may be mixed; `--` ends the flags. Every mistake is one sentence and status 2.

export type FlagKind = "string" | "number" | "boolean" | "duration" | "list";

export interface FlagSpec {
  kind: FlagKind;
  /** One letter, `-o`. */
  short?: string;
}

/** `-c FILE` where no configuration is read: accepted, because scripts give it to every command, as Headscale's takes it. */
export const IGNORED_CONFIG = { config: { kind: "string", short: "c" } } as const;

type Spec = Record<string, FlagKind | FlagSpec>;
type KindOf<T> = T extends FlagSpec ? T["kind"] : T;
type Value<K> = K extends "string"
  ? string
  : K extends "number" | "duration"
    ? number
    : K extends "boolean"
      ? boolean
      : string[];
/** Flag names as they are written, with "-" kept: `flags["login-server"]`. */
export type Flags<S extends Spec> = { [N in keyof S]?: Value<KindOf<S[N]>> } & { _: string[] };

/** A mistake in what the user typed: `message` is one sentence; tools/run.ts prints it and ends with status 2. */
export class UsageError extends Error {
  readonly exitCode = 2;
}

/**
 * @param positional how many positional arguments are allowed (default none)
 * @throws UsageError unknown flag (with the nearest known one), missing or wrong value, too many arguments
 */
export function parseFlags<const S extends Spec>(
  command: string,
  argv: readonly string[],
  spec: S,
  usage: string,
  positional = 0,
): Flags<S> {
  const out: Record<string, unknown> & { _: string[] } = { _: [] };
  const hint = usage ? ` (see \`${command} --help\`)` : "";
  const fail = (text: string): never => {
    throw new UsageError(`${text}${hint}`);
  };
  for (let i = 0; i < argv.length; i++) {
    const arg = argv[i]!;
    if (arg === "--") {
      out._.push(...argv.slice(i + 1));
      break;
    }
    if (!arg.startsWith("-") || arg === "-") {
      out._.push(arg);
      continue;
    }
    const body = arg.replace(/^--?/, "");
    const equals = body.indexOf("=");
    const typed = equals < 0 ? body : body.slice(0, equals);
    const name = Object.hasOwn(spec, typed)
      ? typed
      : Object.keys(spec).find((n) => (spec[n] as FlagSpec).short === typed);
    if (name === undefined) {
      const near = nearest(typed, Object.keys(spec));
      fail(`unknown flag ${JSON.stringify(arg.split("=")[0])}${near ? `: did you mean --${near}?` : ""}`);
    }
    const entry = spec[name!]!;
    const kind = typeof entry === "string" ? entry : entry.kind;
    if (kind === "boolean") {
      const text = equals < 0 ? "true" : body.slice(equals + 1);
      if (!/^(true|false|1|0|t|f)$/i.test(text)) fail(`--${name} takes true or false, not ${JSON.stringify(text)}`);
      out[name!] = /^(true|1|t)$/i.test(text);
      continue;
    }
    if (equals < 0 && i + 1 >= argv.length) fail(`--${name} needs a value`);
    const text = equals < 0 ? argv[++i]! : body.slice(equals + 1);
    if (kind === "number") {
      if (!/^-?\d+(\.\d+)?$/.test(text)) fail(`--${name} takes a number, not ${JSON.stringify(text)}`);
      out[name!] = Number(text);
    } else if (kind === "duration") {
      const ms = parseDuration(text);
      if (ms === null) fail(`--${name} takes a duration such as 90s, 24h or 7d, not ${JSON.stringify(text)}`);
      out[name!] = ms;
    } else if (kind === "list") {
      const list = (out[name!] as string[] | undefined) ?? [];
      list.push(
        ...text
          .split(",")
          .map((s) => s.trim())
          .filter(Boolean),
      );
      out[name!] = list;
    } else {
      out[name!] = text;
    }
  }
  if (out._.length > positional && !out.help) fail(`unexpected argument ${JSON.stringify(out._[positional])}`);
  return out as Flags<S>;
}

/** "1h30m", "90s", "7d", "500ms", "2w", "1y" in milliseconds; null when it is none. */
export function parseDuration(text: string): number | null {
  if (text === "0") return 0;
  const units: Record<string, number> = {
    ms: 1,
    s: 1000,
    m: 60_000,
    h: 3_600_000,
    d: 86_400_000,
    w: 604_800_000,
    y: 31_536_000_000,
  };
  if (!/^(\d+(\.\d+)?(ms|s|m|h|d|w|y))+$/.test(text)) return null;
  let total = 0;
  for (const [, amount, unit] of text.matchAll(/(\d+(?:\.\d+)?)(ms|s|m|h|d|w|y)/g))
    total += Number(amount) * units[unit!]!;
  return total;
}

/** The known word with the smallest edit distance, if it is near enough to be meant. */
export function nearest(typed: string, known: readonly string[]): string | null {
  let best: string | null = null;
  let bestDistance = Math.max(2, Math.floor(typed.length / 3)) + 1;
  for (const word of known) {
    const d = editDistance(typed, word);
    if (d < bestDistance) {
      best = word;
      bestDistance = d;
    }
  }
  return best;
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
