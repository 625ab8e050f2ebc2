// Ports and protocols as policies write them. The sentences are those of the hosted service where they are known.
import { ALL_PORTS, type PortRange } from "./types.ts";

/** Names of `proto`, and of the part before the colon in `ip` of a grant. Of two for one number the first is shown. */
const PROTOCOLS: Readonly<Record<string, number>> = {
  icmp: 1,
  icmpv4: 1,
  igmp: 2,
  ipv4: 4,
  "ip-in-ip": 4,
  tcp: 6,
  egp: 8,
  igp: 9,
  udp: 17,
  dccp: 33,
  gre: 47,
  esp: 50,
  ah: 51,
  "ipv6-icmp": 58,
  icmpv6: 58,
  tsmp: 99,
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

/** ICMP of both families: nodes let it in whatever the ports. */
export function isPing(protocol: number | null): boolean {
  return protocol === 1 || protocol === 58;
}

export function hasPorts(protocol: number | null): boolean {
  return protocol === null || WITH_PORTS.has(protocol);
}

/** Whether a client lets a protocol in on some ports: one without ports it lets in when all of them are open. */
export function opensPort(ports: readonly PortRange[], protocol: number, port: number): boolean {
  if (isPing(protocol)) return ports.length > 0;
  return includesPort(hasPorts(protocol) ? ports : allOrNone(ports), port);
}

/** What is left of ports where they mean nothing. */
export function allOrNone(ports: readonly PortRange[]): PortRange[] {
  return ports.filter(({ first, last }) => first === ALL_PORTS.first && last === ALL_PORTS.last);
}

/** Null: none is named, also by the number 0. Throws an Error with the bare sentence; callers add the place. */
export function parseProtocol(text: string): number | null {
  const name = text.toLowerCase();
  if (name === "") return null;
  if (Object.hasOwn(PROTOCOLS, name)) return PROTOCOLS[name]!;
  if (/^\d+$/.test(name) && Number(name) <= 255) return Number(name) || null;
  throw new Error(`proto name ${JSON.stringify(text)} not known; use protocol number 0-255`);
}

function parsePort(text: string): number | null {
  return /^\d+$/.test(text) && Number(text) <= 65535 ? Number(text) : null;
}

/** "22", "8000-8100" or "*". */
function parsePortRange(text: string): PortRange {
  if (text === "*") return ALL_PORTS;
  const quoted = JSON.stringify(text);
  if (text === "") throw new Error(`invalid port list: ${quoted}`);
  const [low, high, ...more] = text.split("-");
  if (more.length > 0) throw new Error(`port range ${quoted}: too many dashes(-)`);
  const first = parsePort(low!);
  if (first === null) throw new Error(`port range ${quoted}: invalid first integer`);
  const last = high === undefined ? first : parsePort(high);
  if (last === null) throw new Error(`port range ${quoted}: invalid last integer`);
  if (first === 0) throw new Error(`port range ${quoted}: first port must be >0, or use '*' for wildcard`);
  // The service says it the wrong way round.
  if (first > last) throw new Error(`port range ${quoted}: first port must be >= last port`);
  return { first, last };
}

/** The part before the last colon, brackets of an IPv6 address removed, and the list of ports after it. */
export function splitPorts(text: string): { host: string; ports: PortRange[] } {
  const colon = text.lastIndexOf(":");
  if (colon < 0) throw new Error('hostport must contain a colon (":")');
  const host = text.slice(0, colon).trim();
  if (host.includes(",")) throw new Error('host cannot contain a comma (",")');
  const list = text.slice(colon + 1).toLowerCase();
  const ports = list.split(",").map(parsePortRange);
  return { host: host.startsWith("[") && host.endsWith("]") ? host.slice(1, -1) : host, ports };
}

/** One entry of a grant's `ip`: "*", "443", "80-90", "tcp:443", "icmp:*". No list: each range is an entry. */
export function parseOpening(text: string): { protocol: number | null; ports: PortRange } {
  if (text === "") throw new Error("empty string");
  const colon = text.lastIndexOf(":");
  const name = colon < 0 ? "*" : text.slice(0, colon);
  if (name.includes(",")) throw new Error('host cannot contain a comma (",")');
  const ports = parsePortRange(text.slice(colon + 1));
  if (name === "") throw new Error("empty protocol");
  return { protocol: name === "*" ? null : parseProtocol(name), ports };
}

export function includesPort(ports: readonly PortRange[], port: number): boolean {
  for (const { first, last } of ports) if (first <= port && port <= last) return true;
  return false;
}
