// Structured logs: one event a line, as text for people or JSON for programs, on standard error. Every line that is written
// while a request is served carries the request's id and the client's address, without the code in between knowing of it.
//
//   text   2026-11-21T10:00:00.000Z warn the disk is slow ms=812 request=k3v9…
//   json   {"level":"warn","time":"2026-11-21T10:00:00.000Z","msg":"the disk is slow","ms":812,"request":"k3v9…"}
// Secrets do not belong into a line to begin with; what looks like one is cut out all the same.
import { AsyncLocalStorage } from "node:async_hooks";
import pino from "pino";
import { randomBytes } from "../crypto/keys.ts";

/** Headscale's names; pino calls `panic` fatal and `disabled` silent. */
export const LOG_LEVELS = ["disabled", "panic", "fatal", "error", "warn", "info", "debug", "trace"] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];
export const LOG_FORMATS = ["text", "json"] as const;
export type LogFormat = (typeof LOG_FORMATS)[number];

export type Fields = Record<string, unknown>;
type Method = (message: string, fields?: Fields) => void;
export type Logger = Record<Exclude<LogLevel, "disabled" | "panic">, Method>;

export interface LoggerOptions {
  level: LogLevel;
  format: LogFormat;
  /** Default: standard error. */
  write?: (line: string) => void;
}

/** What every line says that is written while a request is served. */
export interface RequestFields {
  request: string;
  /** Address of the client. */
  client: string;
}

const current = new AsyncLocalStorage<RequestFields>();

/** Runs `serve` so that its lines, and those of all that it starts, carry these fields. */
export function whileServing<T>(fields: RequestFields, serve: () => T): T {
  return current.run(fields, serve);
}

/** The id of the request that is being served; "" outside of one. */
export function requestId(): string {
  return current.getStore()?.request ?? "";
}

/** 80 bits, lower-case hex. */
export function newRequestId(): string {
  return Buffer.from(randomBytes(10)).toString("hex");
}

function pinoLevel(level: LogLevel): string {
  if (level === "disabled") return "silent";
  return level === "panic" ? "fatal" : level;
}

export function createLogger(options: LoggerOptions): Logger {
  const write = options.write ?? ((line: string) => void process.stderr.write(line));
  const render = options.format === "json" ? (line: string) => line : asText;
  const sink = pino(
    {
      base: null,
      level: pinoLevel(options.level),
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      mixin: () => current.getStore() ?? {},
    },
    { write: (line: string) => write(withoutSecrets(render(line))) },
  );
  const method =
    (level: keyof Logger): Method =>
    (message, fields) =>
      sink[level](fields ?? {}, message);
  return {
    fatal: method("fatal"),
    error: method("error"),
    warn: method("warn"),
    info: method("info"),
    debug: method("debug"),
    trace: method("trace"),
  };
}

/** Drops everything. */
export const SILENT: Logger = createLogger({ level: "fatal", format: "json", write: () => {} });

function asText(line: string): string {
  const { level, time, msg, ...fields } = JSON.parse(line) as Fields;
  const rest = Object.entries(fields).map(([name, value]) => ` ${name}=${showValue(value)}`);
  return `${time} ${level} ${oneLine(String(msg ?? ""))}${rest.join("")}\n`;
}

function showValue(value: unknown): string {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return /^[^\s"=\\]+$/.test(text) && oneLine(text) === text ? text : oneLine(JSON.stringify(text));
}

/** A name or message of a stranger cannot forge a line of its own, nor colours of the terminal, nor turn what stands beside it. */
function oneLine(text: string): string {
  return text.replace(/[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, (c) =>
    c === "\n" ? "\\n" : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Auth keys, API keys, private keys, bearer tokens: what stands behind their public part becomes "***". */
function withoutSecrets(line: string): string {
  return line
    .replace(/\b((?:hskey|tskey)-[a-z]+-[A-Za-z0-9_]{1,32}-)[A-Za-z0-9_-]+/g, "$1***")
    .replace(/\b(privkey:)[0-9a-f]+/gi, "$1***")
    .replace(/\b((?:Bearer|Basic) )[A-Za-z0-9._~+/=-]+/g, "$1***");
}
