// IP addresses, prefixes and address:port pairs: text <-> bytes.
//
//   IP         4 or 16 bytes, network order. IPv4-mapped IPv6 is un-mapped by `unmap`.
//   Prefix     address bytes and a length in bits; text "100.64.0.1/32".
//   AddrPort   canonical text "192.0.2.1:41641" or "[2001:db8::1]:41641" (RFC 5952), as Go's netip prints it.
//
// Text is the form that main-thread code passes around and uses as map keys; bytes go to the kernel and to peers.
import ipaddr from "ipaddr.js";

/** 4 or 16 bytes in network order. */
export type IP = Uint8Array;
/** Canonical text, "192.0.2.1:41641" or "[2001:db8::1]:41641". */
export type AddrPort = string;
export interface Prefix {
  ip: IP;
  bits: number;
}

/** Strict: four decimal parts for IPv4 (no octal, no short forms), no zone for IPv6. Null when `text` is not an address. */
export function parseIP(text: string): IP | null {
  if (text.length > 45) return null;
  if (ipaddr.IPv4.isValidFourPartDecimal(text)) return Uint8Array.from(ipaddr.IPv4.parse(text).toByteArray());
  if (!text.includes(":") || text.includes("%") || !ipaddr.IPv6.isValid(text)) return null;
  return Uint8Array.from(ipaddr.IPv6.parse(text).toByteArray());
}

/** RFC 5952 text of 4 or 16 bytes. IPv4-mapped IPv6 prints as "::ffff:a.b.c.d", like netip. */
export function formatIP(ip: IP): string {
  if (ip.length === 4) return `${ip[0]}.${ip[1]}.${ip[2]}.${ip[3]}`;
  if (ip.length !== 16) throw new RangeError(`an IP address has 4 or 16 bytes, not ${ip.length}`);
  if (isMapped(ip)) return `::ffff:${ip[12]}.${ip[13]}.${ip[14]}.${ip[15]}`;
  return new ipaddr.IPv6(Array.from(ip)).toRFC5952String();
}

function isMapped(ip: IP): boolean {
  if (ip.length !== 16 || ip[10] !== 0xff || ip[11] !== 0xff) return false;
  for (let i = 0; i < 10; i++) if (ip[i] !== 0) return false;
  return true;
}

/** IPv4-mapped IPv6 becomes 4 bytes; all else is returned as it is. */
export function unmap(ip: IP): IP {
  return isMapped(ip) ? ip.slice(12) : ip;
}

/** The 16-byte form that disco and DERP put on the wire: IPv4 is mapped. */
export function to16(ip: IP): Uint8Array {
  if (ip.length === 16) return ip;
  const out = new Uint8Array(16);
  out[10] = 0xff;
  out[11] = 0xff;
  out.set(ip, 12);
  return out;
}

/** "10.0.0.0/8", or an address alone, which means all of its bits. Host bits are kept: see `maskPrefix`. Null when wrong. */
export function parsePrefix(text: string): Prefix | null {
  const slash = text.indexOf("/");
  const ip = parseIP(slash < 0 ? text : text.slice(0, slash));
  if (!ip) return null;
  const max = ip.length * 8;
  if (slash < 0) return { ip, bits: max };
  const digits = text.slice(slash + 1);
  if (!/^(0|[1-9]\d{0,2})$/.test(digits)) return null;
  const bits = Number(digits);
  return bits <= max ? { ip, bits } : null;
}

export function formatPrefix(prefix: Prefix): string {
  return `${formatIP(prefix.ip)}/${prefix.bits}`;
}

/** The prefix with all host bits zero. */
export function maskPrefix(prefix: Prefix): Prefix {
  const ip = prefix.ip.slice();
  for (let i = 0; i < ip.length; i++) {
    const keep = Math.min(8, Math.max(0, prefix.bits - i * 8));
    ip[i]! &= (0xff00 >> keep) & 0xff;
  }
  return { ip, bits: prefix.bits };
}

export function prefixContains(prefix: Prefix, ip: IP): boolean {
  if (prefix.ip.length !== ip.length) return false;
  const whole = prefix.bits >> 3;
  for (let i = 0; i < whole; i++) if (prefix.ip[i] !== ip[i]) return false;
  const rest = prefix.bits & 7;
  return rest === 0 || ((prefix.ip[whole]! ^ ip[whole]!) & ((0xff00 >> rest) & 0xff)) === 0;
}

/** "192.0.2.1:41641" or "[2001:db8::1]:41641". Null when wrong. IPv4-mapped IPv6 is un-mapped. */
export function parseAddrPort(text: string): { ip: IP; port: number } | null {
  const colon = text.lastIndexOf(":");
  if (colon < 1) return null;
  const digits = text.slice(colon + 1);
  if (!/^(0|[1-9]\d{0,4})$/.test(digits)) return null;
  const port = Number(digits);
  if (port > 65535) return null;
  let host = text.slice(0, colon);
  const bracketed = host.startsWith("[") && host.endsWith("]");
  if (bracketed) host = host.slice(1, -1);
  const ip = parseIP(host);
  if (!ip || bracketed !== (ip.length === 16)) return null;
  return { ip: unmap(ip), port };
}

export function formatAddrPort(ip: IP, port: number): AddrPort {
  const plain = unmap(ip);
  return plain.length === 4 ? `${formatIP(plain)}:${port}` : `[${formatIP(plain)}]:${port}`;
}

/** -1, 0, 1: IPv4 before IPv6, then bytewise. */
export function compareIP(a: IP, b: IP): number {
  if (a.length !== b.length) return a.length < b.length ? -1 : 1;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i]! < b[i]! ? -1 : 1;
  return 0;
}
