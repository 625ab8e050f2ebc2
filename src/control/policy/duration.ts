// Durations as Go reads and prints them: "12h", "1h30m", "-1m0s".

/** In milliseconds. The micro sign and the Greek letter are two characters. */
const UNITS: Readonly<Record<string, number>> = {
  ns: 1e-6,
  us: 1e-3,
  "\u00b5s": 1e-3,
  "\u03bcs": 1e-3,
  ms: 1,
  s: 1e3,
  m: 6e4,
  h: 3.6e6,
};

/** 64 bits of nanoseconds. */
const MAX_DURATION = 9_223_372_036_854;

/** Milliseconds. Throws an Error with Go's sentence. */
export function parseDuration(text: string): number {
  const wrong = new Error(`time: invalid duration ${JSON.stringify(text)}`);
  const sign = text.startsWith("-") ? -1 : 1;
  let rest = text.replace(/^[-+]/, "");
  if (rest === "0") return 0;
  if (rest === "" || rest.length > 64) throw wrong;
  let total = 0;
  while (rest !== "") {
    const part = /^(\d+(?:\.\d*)?|\.\d+)([^\d.]*)/.exec(rest);
    if (!part) throw wrong;
    if (part[2] === "") throw new Error(`time: missing unit in duration ${JSON.stringify(text)}`);
    const unit = Object.hasOwn(UNITS, part[2]!) ? UNITS[part[2]!] : undefined;
    if (unit === undefined)
      throw new Error(`time: unknown unit ${JSON.stringify(part[2])} in duration ${JSON.stringify(text)}`);
    total += Number(part[1]) * unit;
    if (total > MAX_DURATION) throw wrong;
    rest = rest.slice(part[0].length);
  }
  return sign * total;
}

/** As Go's Duration.String prints whole milliseconds. */
export function formatDuration(millis: number): string {
  if (millis === 0) return "0s";
  const sign = millis < 0 ? "-" : "";
  const total = Math.abs(millis);
  if (total < 1000) return `${sign}${total}ms`;
  const hours = Math.floor(total / 3.6e6);
  const minutes = Math.floor(total / 6e4) % 60;
  const seconds = (total % 6e4) / 1000;
  if (hours > 0) return `${sign}${hours}h${minutes}m${seconds}s`;
  return minutes > 0 ? `${sign}${minutes}m${seconds}s` : `${sign}${seconds}s`;
}
