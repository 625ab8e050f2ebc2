// The list of addresses at which this node can be reached, for control and for CallMeMaybe (spec/datapath-wire.md 6.2, 6.3).
//
// In this order, a duplicate keeps its first type: what STUN saw over IPv4 (the main address first, then those that more
// than one server saw), over IPv6 likewise, behind a varying mapping the STUN address with the local port, STUN addresses
// of the last minutes, then the interfaces' addresses; loopback only when there is nothing else.
import type { AddrPort, IP, Prefix } from "../wire/ip.ts";
import { formatAddrPort, parseAddrPort, parseIP, unmap } from "../wire/ip.ts";
import { EndpointType } from "../wire/tailcfg.ts";
import { isLinkLocal, isLoopback, isUnicast, isWithin } from "./address.ts";
import type { NetcheckReport } from "./netcheck.ts";

const MAX_ENDPOINTS = 100;
const REMEMBER_MS = 310_000;
const REMEMBERED_PORTS_PER_IP = 6;
const MAX_REMEMBERED = 64;

export interface EndpointList {
  endpoints: AddrPort[];
  /** Parallel to `endpoints`. */
  types: EndpointType[];
}

export interface LocalAddresses {
  /** Addresses of the interfaces, without this node's own tailnet device. */
  ips: readonly string[];
  port4: number;
  /** Absent: there is no IPv6 socket. */
  port6?: number;
}

/** Public addresses that STUN saw within the last minutes, so that one lost answer does not unpublish them. */
export class RememberedEndpoints {
  readonly #seen = new Map<AddrPort, number>();

  note(address: AddrPort, now: number): void {
    // Deleted first so that the map stays in order of age.
    this.#seen.delete(address);
    this.#seen.set(address, now);
    if (this.#seen.size > MAX_REMEMBERED) this.#seen.delete(this.#seen.keys().next().value!);
  }

  clear(): void {
    this.#seen.clear();
  }

  /** Newest first, at most 6 ports of one IP. */
  list(now: number): AddrPort[] {
    const ports = new Map<string, number>();
    const listed: AddrPort[] = [];
    for (const [address, at] of [...this.#seen].reverse()) {
      if (now - at > REMEMBER_MS) {
        this.#seen.delete(address);
        continue;
      }
      const ip = address.slice(0, address.lastIndexOf(":"));
      const count = (ports.get(ip) ?? 0) + 1;
      ports.set(ip, count);
      if (count <= REMEMBERED_PORTS_PER_IP) listed.push(address);
    }
    return listed;
  }
}

export function buildEndpoints(options: {
  report: NetcheckReport | null;
  remembered: readonly AddrPort[];
  local: LocalAddresses;
  /** The UDP port was configured, not picked by the kernel. */
  fixedPort: boolean;
  /** Never announced: addresses inside a tailnet. */
  exclude: readonly Prefix[];
}): EndpointList {
  const { report, local } = options;
  const found = new Map<AddrPort, EndpointType>();
  const add = (address: AddrPort, type: EndpointType) => {
    if (!found.has(address) && found.size < MAX_ENDPOINTS) found.set(address, type);
  };
  if (report) {
    for (const main of [report.globalV4, report.globalV6]) {
      if (!main) continue;
      add(main, EndpointType.stun);
      for (const [address, count] of report.globals) {
        if (count > 1 && isIPv6(address) === isIPv6(main)) add(address, EndpointType.stun);
      }
    }
    const mapped = report.globalV4 && parseAddrPort(report.globalV4);
    if (report.mappingVaries && options.fixedPort && mapped) {
      add(formatAddrPort(mapped.ip, local.port4), EndpointType.stun4LocalPort);
    }
  }
  for (const address of options.remembered) add(address, EndpointType.stun);
  const loopback: AddrPort[] = [];
  for (const text of local.ips) {
    const parsed = parseIP(text);
    const ip = parsed && unmap(parsed);
    const port = ip?.length === 16 ? local.port6 : local.port4;
    if (!ip || port === undefined || !isUnicast(ip) || isWithin(options.exclude, ip)) continue;
    if (isLoopback(ip)) loopback.push(formatAddrPort(ip, port));
    else if (!isUnroutedLinkLocal(ip)) add(formatAddrPort(ip, port), EndpointType.local);
  }
  if (found.size === 0) for (const address of loopback) add(address, EndpointType.local);
  return { endpoints: [...found.keys()], types: [...found.values()] };
}

/** An IPv6 link-local address means nothing without its zone. */
export function isUnroutedLinkLocal(ip: IP): boolean {
  return ip.length === 16 && isLinkLocal(ip);
}

function isIPv6(address: AddrPort): boolean {
  return address.startsWith("[");
}
