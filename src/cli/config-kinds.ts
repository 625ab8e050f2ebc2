// How one configuration value is read, whether it comes from YAML, from the environment or from a flag (which know text only).
// A reader returns the value, or throws Wrong with what stands behind "KEY VALUE" in the message.
import { isDomain, isResolver } from "../control/dns.ts";
import { ROLES, type Role } from "../control/policy/index.ts";
import { LOG_FORMATS, LOG_LEVELS } from "../net/logger.ts";
import { formatAddrPort, formatIP, formatPrefix, maskPrefix, parseAddrPort, parseIP, parsePrefix } from "../wire/ip.ts";
import { parseDuration } from "./flags.ts";

export class Wrong extends Error {}

export type Kind<T> = (value: unknown) => T;

export interface Address {
  host: string;
  port: number;
}

export const text: Kind<string> = (value) => {
  if (typeof value === "string") return value.trim();
  if (typeof value === "number" && Math.abs(value) > Number.MAX_SAFE_INTEGER)
    throw new Wrong("has more digits than are kept of a number: write it in quotes");
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  throw new Wrong("must be text");
};

export const bool: Kind<boolean> = (value) => {
  if (typeof value === "boolean") return value;
  if (typeof value === "string" && /^(true|false|1|0|t|f)$/i.test(value)) return /^(true|1|t)$/i.test(value);
  throw new Wrong("must be true or false");
};

export const integer =
  (min: number, max: number): Kind<number> =>
  (value) => {
    const number = typeof value === "string" && /^-?\d{1,15}$/.test(value) ? Number(value) : value;
    if (typeof number === "number" && Number.isInteger(number) && number >= min && number <= max) return number;
    throw new Wrong(`must be a whole number from ${min} to ${max}`);
  };

/** Milliseconds. */
export const duration: Kind<number> = (value) => {
  const ms = value === 0 ? 0 : typeof value === "string" ? parseDuration(value.trim()) : null;
  if (ms === null) throw new Wrong("is no duration: write it as 90s, 30m, 24h or 180d");
  return ms;
};

/** Of a timer, which holds 24 days at most: a longer one would fire at once, and again and again. */
export const wait =
  (min: number): Kind<number> =>
  (value) => {
    const ms = duration(value);
    if (ms < min || ms > 24 * 86_400_000) throw new Wrong(`must be from ${min / 1000}s to 24d`);
    return ms;
  };

export const oneOf =
  <const T extends string>(...words: readonly T[]): Kind<T> =>
  (value) => {
    const written = typeof value === "string" ? value.trim().toLowerCase() : null;
    const found = words.find((word) => word.toLowerCase() === written);
    if (found === undefined) throw new Wrong(`must be ${words.slice(0, -1).join(", ")} or ${words.at(-1)}`);
    return found;
  };

/** A list, or text with commas or blanks between (the environment). */
export const list =
  <T>(item: Kind<T>): Kind<T[]> =>
  (value) => {
    if (Array.isArray(value)) return value.map(item);
    if (typeof value !== "string") throw new Wrong("must be a list");
    return value.trim().startsWith("[")
      ? list(item)(fromJson(value, "must be a list"))
      : value
          .split(/[\s,]+/)
          .filter(Boolean)
          .map(item);
  };

/** Keys and values, or JSON of it (the environment). */
export const map =
  <T>(item: Kind<T>): Kind<Record<string, T>> =>
  (value) => {
    const object = typeof value === "string" ? fromJson(value, "must be keys and values (JSON)") : value;
    if (typeof object !== "object" || object === null || Array.isArray(object))
      throw new Wrong("must be keys and values");
    return Object.fromEntries(Object.entries(object).map(([key, entry]) => [key, item(entry)]));
  };

/** Of an official client. */
export const clientVersion: Kind<string> = (value) => {
  const written = text(value);
  if (!/^\d{1,6}\.\d{1,6}\.\d{1,6}$/.test(written)) throw new Wrong('must be a version like "1.102.5"');
  return written;
};

/** Role -> groups of an identity provider. */
export const roles: Kind<Partial<Record<Role, string[]>>> = (value) => {
  const given = map(list(text))(value);
  const known: readonly string[] = ROLES.filter((role) => role !== "member");
  const odd = Object.keys(given).find((role) => !known.includes(role));
  if (odd !== undefined) throw new Wrong(`names the role ${JSON.stringify(odd)}: there are ${known.join(", ")}`);
  return given;
};

function fromJson(value: string, otherwise: string): unknown {
  try {
    return JSON.parse(value);
  } catch {
    throw new Wrong(otherwise);
  }
}

export const record: Kind<{ name: string; type: string; value: string }> = (value) => {
  const fields = map(text)(value);
  const { name = "", type = "", value: content = "", ...more } = fields;
  const [unknown] = Object.keys(more);
  if (unknown !== undefined) throw new Wrong(`has the unknown key "${unknown}": a record has name, type and value`);
  if (name === "" || content === "") throw new Wrong("needs a name and a value");
  return { name, type: type.toUpperCase(), value: content };
};

/**
 * Octal, with or without a leading 0. YAML reads 0770 as the number 770, whose digits are what was meant, and 0o770 as 504;
 * as no owner goes without reading and writing, one of the two has the first digit 6 or 7.
 */
export const mode: Kind<number> = (value) => {
  const written = typeof value === "number" ? [String(value), value.toString(8)] : [];
  const digits = typeof value === "string" ? value.trim() : (written.find((text) => /^[67]/.test(text)) ?? "");
  if (!/^(0o?)?[0-7]{3}$/.test(digits)) throw new Wrong('must be a mode in octal, such as "0770"');
  return Number.parseInt(digits.slice(-3), 8);
};

const SERVICES: Record<string, number> = { http: 80, https: 443 };

/** "192.0.2.1:8080", "[2001:db8::1]:8080", "localhost:8080", and as in Go ":8080", ":http": all addresses. */
export const address: Kind<Address> = (value) => {
  const written = text(value);
  const colon = written.lastIndexOf(":");
  const service = written.slice(colon + 1);
  const port = SERVICES[service] ?? (/^\d{1,5}$/.test(service) ? Number(service) : Number.NaN);
  const name = written.slice(0, Math.max(0, colon));
  const bare = name.startsWith("[") && name.endsWith("]") ? name.slice(1, -1) : name.includes(":") ? "" : name;
  const ip = name === "" ? "::" : name === "localhost" ? "127.0.0.1" : bare;
  const parsed = parseIP(ip);
  if (colon < 0 || !parsed || !(port > 0 && port < 65_536))
    throw new Wrong(
      "is not an address and port: write it as 192.0.2.1:8080 or [2001:db8::1]:8080, or 0.0.0.0:8080 for every IPv4 address",
    );
  return { host: formatIP(parsed), port };
};

export function showAddress({ host, port }: Address): string {
  return formatAddrPort(parseIP(host)!, port);
}

export const ipOf =
  (family: 4 | 6): Kind<string> =>
  (value) => {
    const ip = parseIP(text(value));
    if (ip?.length !== (family === 4 ? 4 : 16)) throw new Wrong(`must be an IPv${family} address`);
    return formatIP(ip);
  };

export const prefixOf =
  (family: 4 | 6): Kind<string> =>
  (value) => {
    const prefix = parsePrefix(text(value));
    if (prefix?.ip.length !== (family === 4 ? 4 : 16))
      throw new Wrong(
        `must be a prefix of IPv${family} addresses, such as ${family === 4 ? "100.64.0.0/10" : "fd7a:115c:a1e0::/48"}`,
      );
    const masked = formatPrefix(maskPrefix(prefix));
    if (masked !== formatPrefix(prefix)) throw new Wrong(`has bits behind its length: write it as ${masked}`);
    return masked;
  };

/** Scheme, host and port alone. */
export const origin: Kind<URL> = (value) => {
  let url: URL;
  try {
    url = new URL(text(value));
  } catch {
    throw new Wrong("is not a URL: write it as https://weft.example.com");
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") throw new Wrong("must start with https:// or http://");
  if (url.pathname !== "/" || url.search || url.hash || url.username)
    throw new Wrong("must be scheme, host and port alone: clients ask for fixed paths at the root");
  return url;
};

export const webUrl: Kind<string> = (value) => {
  const written = text(value);
  if (!URL.canParse(written) || !/^https?:/.test(written)) throw new Wrong("must be an http or https URL");
  return written;
};

export const domain: Kind<string> = (value) => {
  const name = text(value).toLowerCase();
  if (name.length > 180 || !/^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/.test(name))
    throw new Wrong("is not a domain, without a dot at the end, for example weft.internal");
  return name;
};

export const hostName: Kind<string> = (value) => {
  const name = text(value).toLowerCase();
  if (!/^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$/.test(name)) throw new Wrong("is not a host name");
  return name;
};

/** An IP address, or the URL of a DNS-over-HTTPS server. */
export const resolver: Kind<string> = (value) => {
  const written = text(value);
  if (!isResolver(written)) throw new Wrong("must be an IP address or a DNS-over-HTTPS URL");
  return written;
};

/** Resolvers by domain. */
export const split: Kind<Record<string, string[]>> = (value) => {
  const given = map(list(resolver))(value);
  const odd = Object.keys(given).find((name) => !isDomain(name));
  if (odd !== undefined) throw new Wrong(`names ${JSON.stringify(odd)}, which is no domain`);
  return given;
};

/** A name server's address, with its port if that is not 53. */
export const nameServer: Kind<string> = (value) => {
  const written = text(value);
  const ip = parseIP(written);
  if (ip) return formatAddrPort(ip, 53);
  const parsed = parseAddrPort(written);
  if (!parsed || parsed.port === 0)
    throw new Wrong("is no address of a name server: write it as 192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:53");
  return formatAddrPort(parsed.ip, parsed.port);
};

const libpqMode = oneOf("disable", "allow", "prefer", "require", "verify-ca", "verify-full");

/** true, false, or libpq's words. */
export const sslMode: typeof libpqMode = (value) => {
  const written = text(value);
  if (/^(true|1)$/i.test(written)) return "require";
  return /^(false|0)$/i.test(written) ? "disable" : libpqMode(written);
};

export const logLevel = oneOf(...LOG_LEVELS);
export const logFormat = oneOf(...LOG_FORMATS);
