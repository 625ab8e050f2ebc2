// What kind of address a host or a candidate has: which may be announced, which may be pinged, which counts as near.
import type { IP, Prefix } from "../wire/ip.ts";
import { parsePrefix, prefixContains } from "../wire/ip.ts";

const prefixes = (...texts: string[]): Prefix[] => texts.map((text) => parsePrefix(text)!);
const within = (list: readonly Prefix[], ip: IP): boolean => list.some((prefix) => prefixContains(prefix, ip));

const LOOPBACK = prefixes("127.0.0.0/8", "::1/128");
const LINK_LOCAL = prefixes("169.254.0.0/16", "fe80::/10");
/** RFC 1918 and RFC 4193. */
const PRIVATE = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7");
/** No host answers there: "this network", multicast, reserved and broadcast, unspecified. */
const UNUSABLE = prefixes("0.0.0.0/8", "224.0.0.0/3", "::/128", "ff00::/8");

export const isLoopback = (ip: IP): boolean => within(LOOPBACK, ip);
export const isLinkLocal = (ip: IP): boolean => within(LINK_LOCAL, ip);
export const isPrivate = (ip: IP): boolean => within(PRIVATE, ip);
/** False for addresses that no datagram can be sent to. */
export const isUnicast = (ip: IP): boolean => !within(UNUSABLE, ip);
export const isWithin = within;
