// rtnetlink messages: bytes <-> values. No system call here; netlink.ts sends and receives them. Native (little) endian.
//
//   nlmsghdr   16 bytes: len u32 0 (with header), type u16 4, flags u16 6, seq u32 8, port id u32 12; the next message at the
//              next multiple of 4
//   rtattr      4 bytes: len u16 0 (with header), type u16 2 (0x8000: nested); data at 4; the next at the next multiple of 4
//   nlmsgerr   20 bytes: minus errno i32 0, header of the request 4; then attributes: 1 text, when the flags have 0x200
//   ifinfomsg  16 bytes: family u8 0, type u16 2, index i32 4, flags u32 8, change mask u32 12
//   ifaddrmsg   8 bytes: family u8 0, prefix length u8 1, flags u8 2, scope u8 3, index u32 4
//   rtmsg      12 bytes: family, dst length, src length, tos, table, protocol, scope, type: u8 0..7, flags u32 8
//   fib_rule_hdr 12 bytes: family, dst length, src length, tos, table, 0, 0, action: u8 0..7, flags u32 8
import { formatIP, formatPrefix, type IP } from "../src/wire/ip.ts";
import { AF_INET, AF_INET6 } from "./constants.ts";
import { buffer } from "./libc.ts";

export const NLMSG_ERROR = 2;
export const NLMSG_DONE = 3;
export const RTM_NEWLINK = 16;
export const RTM_DELLINK = 17;
export const RTM_GETLINK = 18;
export const RTM_NEWADDR = 20;
export const RTM_DELADDR = 21;
export const RTM_GETADDR = 22;
export const RTM_NEWROUTE = 24;
export const RTM_DELROUTE = 25;
export const RTM_GETROUTE = 26;
export const RTM_NEWRULE = 32;
export const RTM_DELRULE = 33;
export const RTM_GETRULE = 34;

export const NLM_F_REQUEST = 1;
export const NLM_F_ACK = 4;
export const NLM_F_DUMP_INTR = 0x10;
export const NLM_F_DUMP = 0x300;
export const NLM_F_REPLACE = 0x100;
export const NLM_F_EXCL = 0x200;
export const NLM_F_CREATE = 0x400;
export const NLM_F_ACK_TLVS = 0x200;

export const NLMSGHDR_SIZE = 16;
export const RTATTR_SIZE = 4;
export const IFINFOMSG_SIZE = 16;
export const IFADDRMSG_SIZE = 8;
export const RTMSG_SIZE = 12;
export const NLA_F_NESTED = 0x8000;
export const NLMSGERR_ATTR_MSG = 1;

export const IFLA_ADDRESS = 1;
export const IFLA_IFNAME = 3;
export const IFLA_MTU = 4;
export const IFLA_LINK = 5;
export const IFLA_MASTER = 10;
export const IFLA_TXQLEN = 13;
export const IFLA_LINKINFO = 18;
export const IFLA_NET_NS_PID = 19;
export const IFLA_NET_NS_FD = 28;
export const IFLA_INFO_KIND = 1;
export const IFLA_INFO_DATA = 2;
export const VETH_INFO_PEER = 1;
export const IFF_UP = 1;
export const IFF_LOOPBACK = 8;
export const IFF_POINTOPOINT = 0x10;
export const IFF_RUNNING = 0x40;

export const IFA_ADDRESS = 1;
export const IFA_LOCAL = 2;
export const IFA_FLAGS = 8;
export const IFA_F_TEMPORARY = 1;
export const IFA_F_NODAD = 2;
export const IFA_F_DEPRECATED = 0x20;
export const IFA_F_TENTATIVE = 0x40;
export const IFA_F_NOPREFIXROUTE = 0x200;

export const RTA_DST = 1;
export const RTA_OIF = 4;
export const RTA_GATEWAY = 5;
export const RTA_PRIORITY = 6;
export const RTA_PREFSRC = 7;
export const RTA_MULTIPATH = 9;
export const RTA_TABLE = 15;
export const RTNH_F_ONLINK = 4;
export const RTM_F_CLONED = 0x200;
export const RTPROT_STATIC = 4;
export const RT_SCOPE_UNIVERSE = 0;
export const RT_SCOPE_LINK = 253;
export const RT_SCOPE_HOST = 254;
export const RT_SCOPE_NOWHERE = 255;
export const RT_TABLE_MAIN = 254;
export const RT_TABLE_LOCAL = 255;

export const FRA_DST = 1;
export const FRA_SRC = 2;
export const FRA_IIFNAME = 3;
export const FRA_PRIORITY = 6;
export const FRA_FWMARK = 10;
export const FRA_SUPPRESS_PREFIXLEN = 14;
export const FRA_TABLE = 15;
export const FRA_FWMASK = 16;
export const FRA_OIFNAME = 17;
export const FRA_IP_PROTO = 22;
export const FRA_SPORT_RANGE = 23;
export const FRA_DPORT_RANGE = 24;
export const FIB_RULE_INVERT = 2;

const ROUTE_TYPES = [
  "unspec",
  "unicast",
  "local",
  "broadcast",
  "anycast",
  "multicast",
  "blackhole",
  "unreachable",
  "prohibit",
  "throw",
] as const;
/** What a route does with a packet; `RTN_*`. */
export type RouteType = (typeof ROUTE_TYPES)[number];

const RULE_ACTIONS = [
  "unspec",
  "lookup",
  "goto",
  "nop",
  "res3",
  "res4",
  "blackhole",
  "unreachable",
  "prohibit",
] as const;
/** What a rule does with a packet that it matches; `FR_ACT_*`. */
export type RuleAction = (typeof RULE_ACTIONS)[number];

export interface Link {
  index: number;
  name: string;
  /** "veth", "bridge", "dummy", "tun" ...; "" for hardware and loopback. */
  kind: string;
  mtu: number;
  /** Administratively up. */
  up: boolean;
  /** Up, and its carrier too. */
  running: boolean;
  loopback: boolean;
  pointToPoint: boolean;
  /** Index of the bridge that it belongs to; 0: none. */
  master: number;
  /** Index of a veth's other end, in that end's namespace; 0: none. */
  peer: number;
  txQueueLength: number;
  /** Hardware address, "02:00:00:00:00:01"; "" when it has none. */
  mac: string;
}

export interface Address {
  /** Interface index. */
  index: number;
  /** Text. */
  ip: string;
  bits: number;
  /** RT_SCOPE_UNIVERSE, RT_SCOPE_LINK or RT_SCOPE_HOST. */
  scope: number;
  /** IPv6 privacy address. */
  temporary: boolean;
  deprecated: boolean;
  /** Duplicate address detection has not finished: not usable yet. */
  tentative: boolean;
}

export interface Route {
  family: 4 | 6;
  /** "10.0.0.0/8"; the default route is "0.0.0.0/0" or "::/0". */
  dst: string;
  type: RouteType;
  table: number;
  /** Next hop; absent: on the link. */
  via?: string;
  /** Interface index of the (first) next hop. */
  index?: number;
  metric: number;
  /** Preferred source address. */
  src?: string;
  onlink: boolean;
  /** RTPROT_*: who made it. */
  protocol: number;
}

export interface Rule {
  family: 4 | 6;
  priority: number;
  action: RuleAction;
  /** For "lookup". */
  table: number;
  fwmark?: number;
  fwmask?: number;
  /** The rule applies to what does NOT match. */
  invert: boolean;
  from?: string;
  to?: string;
  iif?: string;
  oif?: string;
  /** 17 is UDP. */
  ipProtocol?: number;
  /** First and last port. */
  sourcePorts?: [number, number];
  destinationPorts?: [number, number];
  /** Routes with a prefix of this length or shorter do not count. */
  suppressPrefixLength?: number;
}

export function routeTypeNumber(type: RouteType): number {
  return ROUTE_TYPES.indexOf(type);
}

export function ruleActionNumber(action: RuleAction): number {
  return RULE_ACTIONS.indexOf(action);
}

/** Builds one message; `finish` gives its bytes. */
export class MessageBuilder {
  #bytes = buffer(512);
  #view = new DataView(this.#bytes.buffer);
  #length = NLMSGHDR_SIZE;

  constructor(type: number, flags: number) {
    this.#view.setUint16(4, type, true);
    this.#view.setUint16(6, flags, true);
  }

  #room(bytes: number): number {
    const at = this.#length;
    this.#length += (bytes + 3) & ~3;
    if (this.#length > this.#bytes.length) {
      const larger = buffer(this.#length * 2);
      larger.set(this.#bytes);
      this.#bytes = larger;
      this.#view = new DataView(larger.buffer);
    }
    return at;
  }

  /** ifinfomsg. */
  ifinfo(index: number, flags: number, change: number): this {
    const at = this.#room(IFINFOMSG_SIZE);
    this.#view.setInt32(at + 4, index, true);
    this.#view.setUint32(at + 8, flags, true);
    this.#view.setUint32(at + 12, change, true);
    return this;
  }

  /** ifaddrmsg. */
  ifaddr(family: number, bits: number, scope: number, index: number): this {
    const at = this.#room(IFADDRMSG_SIZE);
    this.#bytes.set([family, bits, 0, scope], at);
    this.#view.setUint32(at + 4, index, true);
    return this;
  }

  /** rtmsg and fib_rule_hdr: eight bytes, then the flags. */
  rt(fields: number[], flags: number): this {
    const at = this.#room(RTMSG_SIZE);
    this.#bytes.set(fields, at);
    this.#view.setUint32(at + 8, flags, true);
    return this;
  }

  bytes(type: number, data: Uint8Array): this {
    const at = this.#room(RTATTR_SIZE + data.length);
    this.#view.setUint16(at, RTATTR_SIZE + data.length, true);
    this.#view.setUint16(at + 2, type, true);
    this.#bytes.set(data, at + RTATTR_SIZE);
    return this;
  }

  u8(type: number, value: number): this {
    return this.bytes(type, new Uint8Array([value]));
  }

  u32(type: number, value: number): this {
    const data = new Uint8Array(4);
    new DataView(data.buffer).setUint32(0, value, true);
    return this.bytes(type, data);
  }

  text(type: number, value: string): this {
    return this.bytes(type, new TextEncoder().encode(`${value}\0`));
  }

  /** Two ports, native order. */
  portRange(type: number, range: [number, number]): this {
    const data = new Uint8Array(4);
    const view = new DataView(data.buffer);
    view.setUint16(0, range[0], true);
    view.setUint16(2, range[1], true);
    return this.bytes(type, data);
  }

  /** An attribute that holds what `fill` adds. */
  nested(type: number, fill: () => void): this {
    const at = this.#room(RTATTR_SIZE);
    fill();
    this.#view.setUint16(at, this.#length - at, true);
    this.#view.setUint16(at + 2, type | NLA_F_NESTED, true);
    return this;
  }

  finish(sequence: number): Uint8Array {
    this.#view.setUint32(0, this.#length, true);
    this.#view.setUint32(8, sequence, true);
    return this.#bytes.subarray(0, this.#length);
  }
}

/** One message of a datagram; `body` is what follows its header. */
export interface Message {
  type: number;
  flags: number;
  sequence: number;
  body: Uint8Array;
}

/** The messages of `bytes`. `whole` is false when the last one is cut short: it is left out. */
export function parseMessages(bytes: Uint8Array): { messages: Message[]; whole: boolean } {
  const view = viewOf(bytes);
  const messages: Message[] = [];
  let at = 0;
  while (at + NLMSGHDR_SIZE <= bytes.length) {
    const length = view.getUint32(at, true);
    if (length < NLMSGHDR_SIZE || at + length > bytes.length) return { messages, whole: false };
    messages.push({
      type: view.getUint16(at + 4, true),
      flags: view.getUint16(at + 6, true),
      sequence: view.getUint32(at + 8, true),
      body: bytes.subarray(at + NLMSGHDR_SIZE, at + length),
    });
    at += (length + 3) & ~3;
  }
  return { messages, whole: at >= bytes.length };
}

/** Attributes by type, from `offset` of `body` on; a malformed rest is ignored. The last of a type wins. */
export function parseAttributes(body: Uint8Array, offset: number): Map<number, Uint8Array> {
  const out = new Map<number, Uint8Array>();
  const view = viewOf(body);
  let at = offset;
  while (at + RTATTR_SIZE <= body.length) {
    const length = view.getUint16(at, true);
    if (length < RTATTR_SIZE || at + length > body.length) break;
    out.set(view.getUint16(at + 2, true) & ~NLA_F_NESTED & 0xffff, body.subarray(at + RTATTR_SIZE, at + length));
    at += (length + 3) & ~3;
  }
  return out;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function u32Of(bytes: Uint8Array | undefined): number | undefined {
  return bytes && bytes.length >= 4 ? viewOf(bytes).getUint32(0, true) : undefined;
}

function textOf(bytes: Uint8Array | undefined): string | undefined {
  if (!bytes) return undefined;
  const end = bytes.indexOf(0);
  return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end));
}

function ipOf(bytes: Uint8Array | undefined, family: number): IP | undefined {
  return bytes && bytes.length === (family === AF_INET ? 4 : 16) ? bytes.slice() : undefined;
}

function rangeOf(bytes: Uint8Array | undefined): [number, number] | undefined {
  if (!bytes || bytes.length < 4) return undefined;
  const view = viewOf(bytes);
  return [view.getUint16(0, true), view.getUint16(2, true)];
}

/** Text of an extended error in an NLMSG_ERROR message, if the kernel gave one. */
export function parseErrorText(message: Message): string | undefined {
  if ((message.flags & NLM_F_ACK_TLVS) === 0) return undefined;
  return textOf(parseAttributes(message.body, 4 + NLMSGHDR_SIZE).get(NLMSGERR_ATTR_MSG));
}

/** Body of RTM_NEWLINK or RTM_DELLINK; null when it is not one (another address family's view of a link, or cut short). */
export function parseLink(body: Uint8Array): Link | null {
  if (body.length < IFINFOMSG_SIZE || body[0] !== 0) return null;
  const view = viewOf(body);
  const flags = view.getUint32(8, true);
  const attributes = parseAttributes(body, IFINFOMSG_SIZE);
  const info = attributes.get(IFLA_LINKINFO);
  const mac = attributes.get(IFLA_ADDRESS);
  return {
    index: view.getInt32(4, true),
    name: textOf(attributes.get(IFLA_IFNAME)) ?? "",
    kind: (info && textOf(parseAttributes(info, 0).get(IFLA_INFO_KIND))) ?? "",
    mtu: u32Of(attributes.get(IFLA_MTU)) ?? 0,
    up: (flags & IFF_UP) !== 0,
    running: (flags & IFF_RUNNING) !== 0,
    loopback: (flags & IFF_LOOPBACK) !== 0,
    pointToPoint: (flags & IFF_POINTOPOINT) !== 0,
    master: u32Of(attributes.get(IFLA_MASTER)) ?? 0,
    peer: u32Of(attributes.get(IFLA_LINK)) ?? 0,
    txQueueLength: u32Of(attributes.get(IFLA_TXQLEN)) ?? 0,
    mac: mac ? Array.from(mac, (byte) => byte.toString(16).padStart(2, "0")).join(":") : "",
  };
}

/** Body of RTM_NEWADDR or RTM_DELADDR; null for a family other than IPv4 and IPv6, or cut short. */
export function parseAddress(body: Uint8Array): Address | null {
  if (body.length < IFADDRMSG_SIZE) return null;
  const family = body[0]!;
  if (family !== AF_INET && family !== AF_INET6) return null;
  const attributes = parseAttributes(body, IFADDRMSG_SIZE);
  // On a point-to-point link IFA_ADDRESS is the far end, and IFA_LOCAL the own address.
  const ip = ipOf(attributes.get(IFA_LOCAL) ?? attributes.get(IFA_ADDRESS), family);
  if (!ip) return null;
  const flags = u32Of(attributes.get(IFA_FLAGS)) ?? body[2]!;
  return {
    index: viewOf(body).getUint32(4, true),
    ip: formatIP(ip),
    bits: body[1]!,
    scope: body[3]!,
    temporary: family === AF_INET6 && (flags & IFA_F_TEMPORARY) !== 0,
    deprecated: (flags & IFA_F_DEPRECATED) !== 0,
    tentative: (flags & IFA_F_TENTATIVE) !== 0,
  };
}

function prefixOf(bytes: Uint8Array | undefined, bits: number, family: number): string | undefined {
  const ip = ipOf(bytes, family);
  return ip && formatPrefix({ ip, bits });
}

/** Body of RTM_NEWROUTE or RTM_DELROUTE; null for another family, a cache entry, or cut short. */
export function parseRoute(body: Uint8Array): Route | null {
  if (body.length < RTMSG_SIZE) return null;
  const family = body[0]!;
  if (family !== AF_INET && family !== AF_INET6) return null;
  const flags = viewOf(body).getUint32(8, true);
  if ((flags & RTM_F_CLONED) !== 0) return null;
  const attributes = parseAttributes(body, RTMSG_SIZE);
  const any = family === AF_INET ? "0.0.0.0/0" : "::/0";
  const hop = firstHop(attributes, flags);
  const via = ipOf(hop.gateway, family);
  const src = ipOf(attributes.get(RTA_PREFSRC), family);
  return {
    family: family === AF_INET ? 4 : 6,
    dst: prefixOf(attributes.get(RTA_DST), body[1]!, family) ?? any,
    type: ROUTE_TYPES[body[7]!] ?? "unspec",
    table: u32Of(attributes.get(RTA_TABLE)) ?? body[4]!,
    ...(via && { via: formatIP(via) }),
    ...(hop.index !== undefined && { index: hop.index }),
    metric: u32Of(attributes.get(RTA_PRIORITY)) ?? 0,
    ...(src && { src: formatIP(src) }),
    onlink: (hop.flags & RTNH_F_ONLINK) !== 0,
    protocol: body[5]!,
  };
}

// struct rtnexthop, 8 bytes: len u16 0, flags u8 2, hops u8 3, ifindex i32 4; then attributes.
function firstHop(attributes: Map<number, Uint8Array>, flags: number) {
  const multipath = attributes.get(RTA_MULTIPATH);
  if (!multipath || multipath.length < 8) {
    return { index: u32Of(attributes.get(RTA_OIF)), gateway: attributes.get(RTA_GATEWAY), flags };
  }
  const view = viewOf(multipath);
  const length = Math.min(view.getUint16(0, true), multipath.length);
  const gateway = parseAttributes(multipath.subarray(0, length), 8).get(RTA_GATEWAY);
  return { index: view.getUint32(4, true), gateway, flags: multipath[2]! };
}

/** Body of RTM_NEWRULE or RTM_DELRULE; null for another family, or cut short. */
export function parseRule(body: Uint8Array): Rule | null {
  if (body.length < RTMSG_SIZE) return null;
  const family = body[0]!;
  if (family !== AF_INET && family !== AF_INET6) return null;
  const attributes = parseAttributes(body, RTMSG_SIZE);
  const fwmark = u32Of(attributes.get(FRA_FWMARK));
  const fwmask = u32Of(attributes.get(FRA_FWMASK));
  const from = prefixOf(attributes.get(FRA_SRC), body[2]!, family);
  const to = prefixOf(attributes.get(FRA_DST), body[1]!, family);
  const iif = textOf(attributes.get(FRA_IIFNAME));
  const oif = textOf(attributes.get(FRA_OIFNAME));
  const ipProtocol = attributes.get(FRA_IP_PROTO)?.[0];
  const sourcePorts = rangeOf(attributes.get(FRA_SPORT_RANGE));
  const destinationPorts = rangeOf(attributes.get(FRA_DPORT_RANGE));
  const suppress = u32Of(attributes.get(FRA_SUPPRESS_PREFIXLEN));
  return {
    family: family === AF_INET ? 4 : 6,
    priority: u32Of(attributes.get(FRA_PRIORITY)) ?? 0,
    action: RULE_ACTIONS[body[7]!] ?? "unspec",
    table: u32Of(attributes.get(FRA_TABLE)) ?? body[4]!,
    ...(fwmark !== undefined && { fwmark }),
    ...(fwmask !== undefined && { fwmask }),
    invert: (viewOf(body).getUint32(8, true) & FIB_RULE_INVERT) !== 0,
    ...(from !== undefined && { from }),
    ...(to !== undefined && { to }),
    ...(iif !== undefined && { iif }),
    ...(oif !== undefined && { oif }),
    ...(ipProtocol !== undefined && { ipProtocol }),
    ...(sourcePorts && { sourcePorts }),
    ...(destinationPorts && { destinationPorts }),
    // The kernel reports -1 where none is set.
    ...(suppress !== undefined && suppress !== 0xffffffff && { suppressPrefixLength: suppress }),
  };
}
