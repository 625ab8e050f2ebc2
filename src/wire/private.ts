// Addresses that no stranger on the Internet can have: loopback, link-local, private and shared (RFC 1918, 4193, 6598).
import { parseIP, parsePrefix, prefixContains, unmap } from "./ip.ts";

const PRIVATE = [
  "10.0.0.0/8",
  "172.16.0.0/12",
  "192.168.0.0/16",
  "127.0.0.0/8",
  "169.254.0.0/16",
  "100.64.0.0/10",
  "fc00::/7",
  "fe80::/10",
  "::1/128",
].map((text) => parsePrefix(text)!);

/** Whether this text is such an address. */
export function isPrivate(address: string): boolean {
  const ip = parseIP(address);
  return ip !== null && PRIVATE.some((prefix) => prefixContains(prefix, unmap(ip)));
}
