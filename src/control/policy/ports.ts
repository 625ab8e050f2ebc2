// Ports and protocols as policies write them. The sentences are those of the hosted service where they are known.
import { ALL_PORTS, type PortRange } from "./types.ts";

/** Names of `proto`, and of the part before the colon in `ip` of a grant. */
const PROTOCOLS: Readonly<Record<string, number>> = {
  icmp: 1,
  igmp: 2,
  ipv4: 4,
  "ip-in-ip": 4,
  tcp: 6,
  egp: 8,
  igp: 9,
  udp: 17,
  gre: 47,
  esp: 50,
  ah: 51,
  "ipv6-icmp": 58,
  sctp: 132,
  fc: 133,
};

/** The name of a protocol number; null is what a rule without one means. */
export function protocolName(protocol: number | null): string {
  if (protocol === null) return "tcp, udp and icmp";
  const name = Object.keys(PROTOCOLS).find((each) => PROTOCOLS[each] === protocol);
  return name ?? `protocol ${protocol}`;
}

const WITH_PORTS = new Set([6, 17, 132]);

/** Whether ports mean anything for a protocol; null stands for TCP, UDP and ICMP. */
export function hasPorts(protocol: number | null): boolean {
  return protocol === null || WITH_PORTS.has(protocol);
}

/** Throws a string-message Error; callers add the place. */
export function parseProtocol(text: string): number | null {
  const name = text.toLowerCase();
  if (name === "") return null;
  const known = PROTOCOLS[name];
  if (known !== undefined && Object.hasOwn(PROTOCOLS, name)) return known;
  if (/^(0|[1-9]\d{0,2})$/.test(name) && Number(name) <= 255) return Number(name);
  throw new Error(`proto=${JSON.stringify(text)} is not a known protocol: use a name like "tcp" or a number up to 255`);
}

function parsePort(text: string): number | null {
  return /^\d{1,5}$/.test(text) && Number(text) <= 65535 ? Number(text) : null;
}

/** "22", "80,443", "8000-8100" or "*". */
function parsePorts(text: string): PortRange[] {
  if (text === "*") return [ALL_PORTS];
  return text.split(",").map((part) => {
    const quoted = JSON.stringify(part);
    const dash = part.indexOf("-");
    const first = parsePort(dash < 0 ? part : part.slice(0, dash));
    if (part.indexOf("-", dash + 1) > 0 && dash > 0) throw new Error(`port range ${quoted}: too many dashes(-)`);
    if (first === null) throw new Error(`port range ${quoted}: invalid first integer`);
    const last = dash < 0 ? first : parsePort(part.slice(dash + 1));
    if (last === null) throw new Error(`port range ${quoted}: invalid last integer`);
    if (first === 0) throw new Error(`port range ${quoted}: first port must be >0, or use '*' for wildcard`);
    if (first > last) throw new Error(`port range ${quoted}: first port must be <= last port`);
    return { first, last };
  });
}

/** The part before the last colon, brackets of an IPv6 address removed, and the ports after it. */
export function splitPorts(text: string): { host: string; ports: PortRange[] } {
  const colon = text.lastIndexOf(":");
  if (colon < 0) throw new Error('hostport must contain a colon (":")');
  const ports = parsePorts(text.slice(colon + 1).trim());
  const host = text.slice(0, colon).trim();
  return { host: host.startsWith("[") && host.endsWith("]") ? host.slice(1, -1) : host, ports };
}

/** One entry of a grant's `ip`: "*", "443", "80-90", "tcp:443", "icmp:*". */
export function parseOpening(text: string): { protocol: number | null; ports: PortRange[] } {
  const colon = text.lastIndexOf(":");
  const name = colon < 0 ? "*" : text.slice(0, colon);
  const ports = parsePorts(text.slice(colon + 1));
  if (name === "") throw new Error("empty protocol");
  const protocol = name === "*" ? null : parseProtocol(name);
  if (!hasPorts(protocol) && ports.some((range) => range !== ALL_PORTS)) {
    throw new Error(`${JSON.stringify(text)}: only tcp, udp and sctp have ports, use "${name}:*"`);
  }
  return { protocol, ports };
}

export function includesPort(ports: readonly PortRange[], port: number): boolean {
  return ports.some(({ first, last }) => first <= port && port <= last);
}
