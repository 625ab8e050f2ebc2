// Which address a new node gets: the next of its family in order, those that were never given first.
//
//   IPv4  100.64.0.0/10 without network and broadcast address, 100.100.100.100 (the client's own services)
//         and 100.115.92.0/23 (ChromeOS)
//   IPv6  fd7a:115c:a1e0::/64 without ::0 and ::53 (the client's own services); the rest of the /48 holds blocks with
//         meanings of their own (spec/ts2021-control-protocol.md, section 0.3)
import { formatIP, parseIP } from "../wire/ip.ts";

const V4_FIRST = 0x64400001;
const V4_LAST = 0x647ffffe;
const V4_SERVICE = 0x64646464;
const CHROMEOS_FIRST = 0x64735c00;
const CHROMEOS_LAST = 0x64735dff;

function formatV4(address: number): string {
  return formatIP(Uint8Array.of(address >>> 24, (address >>> 16) & 255, (address >>> 8) & 255, address & 255));
}

/** The first free address after `last` ("" starts at the beginning), wrapping round once. Null: every address is taken. */
export function nextIPv4(last: string, isTaken: (ip: string) => boolean): string | null {
  const bytes = last === "" ? null : parseIP(last);
  const start = bytes ? new DataView(bytes.buffer).getUint32(0) + 1 : V4_FIRST;
  const span = V4_LAST - V4_FIRST + 1;
  for (let i = 0, address = start; i < span; i++, address++) {
    if (address > V4_LAST || address < V4_FIRST) address = V4_FIRST;
    if (address === V4_SERVICE || (address >= CHROMEOS_FIRST && address <= CHROMEOS_LAST)) continue;
    const text = formatV4(address);
    if (!isTaken(text)) return text;
  }
  return null;
}

/** The first free address after `last` ("" starts at the beginning). 2^64 of them do not run out. */
export function nextIPv6(last: string, isTaken: (ip: string) => boolean): string {
  const bytes = parseIP(last === "" ? "fd7a:115c:a1e0::" : last)!;
  const view = new DataView(bytes.buffer);
  for (let host = view.getBigUint64(8) + 1n; ; host++) {
    if (host === 0x53n) continue;
    view.setBigUint64(8, host);
    const text = formatIP(bytes);
    if (!isTaken(text)) return text;
  }
}
