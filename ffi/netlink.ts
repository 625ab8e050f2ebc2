// rtnetlink: links, addresses, routes and policy rules of a network namespace; and their changes as they happen.
//
// A socket belongs for ever to the namespace in which its thread was when it was opened: a Netlink made inside
// `withNetns` serves that namespace from anywhere. Requests are synchronous: the kernel answers within the send, some 80 us
// each. Layouts: rtnetlink.ts.
import { type IP, maskPrefix, type Prefix, parseIP, parsePrefix } from "../src/wire/ip.ts";
import {
  AF_INET,
  AF_INET6,
  AF_NETLINK,
  MSG_DONTWAIT,
  MSG_TRUNC,
  SO_RCVBUF,
  SO_RCVBUFFORCE,
  SOCK_CLOEXEC,
  SOCK_NONBLOCK,
  SOCK_RAW,
  SOL_SOCKET,
} from "./constants.ts";
import { EADDRNOTAVAIL, EAGAIN, EEXIST, EINTR, EINVAL, ENODEV, ENOENT, EOVERFLOW, ESRCH, ETIMEDOUT } from "./errno.ts";
import { buffer, check, closeFd, libc, orErrno, SysError } from "./libc.ts";
import {
  type Address,
  FIB_RULE_INVERT,
  FRA_DPORT_RANGE,
  FRA_DST,
  FRA_FWMARK,
  FRA_FWMASK,
  FRA_IIFNAME,
  FRA_IP_PROTO,
  FRA_OIFNAME,
  FRA_PRIORITY,
  FRA_SPORT_RANGE,
  FRA_SRC,
  FRA_SUPPRESS_PREFIXLEN,
  FRA_TABLE,
  IFA_ADDRESS,
  IFA_F_NODAD,
  IFA_F_NOPREFIXROUTE,
  IFA_FLAGS,
  IFA_LOCAL,
  IFF_UP,
  IFLA_IFNAME,
  IFLA_INFO_DATA,
  IFLA_INFO_KIND,
  IFLA_LINKINFO,
  IFLA_MASTER,
  IFLA_MTU,
  IFLA_NET_NS_FD,
  IFLA_NET_NS_PID,
  IFLA_TXQLEN,
  type Link,
  type Message,
  MessageBuilder,
  NLM_F_ACK,
  NLM_F_CREATE,
  NLM_F_DUMP,
  NLM_F_DUMP_INTR,
  NLM_F_EXCL,
  NLM_F_REPLACE,
  NLM_F_REQUEST,
  NLMSG_DONE,
  NLMSG_ERROR,
  parseAddress,
  parseErrorText,
  parseLink,
  parseMessages,
  parseRoute,
  parseRule,
  type Route,
  type RouteType,
  RT_SCOPE_HOST,
  RT_SCOPE_LINK,
  RT_SCOPE_NOWHERE,
  RT_SCOPE_UNIVERSE,
  RT_TABLE_LOCAL,
  RT_TABLE_MAIN,
  RTA_DST,
  RTA_GATEWAY,
  RTA_OIF,
  RTA_PREFSRC,
  RTA_PRIORITY,
  RTA_TABLE,
  RTM_DELADDR,
  RTM_DELLINK,
  RTM_DELROUTE,
  RTM_DELRULE,
  RTM_GETADDR,
  RTM_GETLINK,
  RTM_GETROUTE,
  RTM_GETRULE,
  RTM_NEWADDR,
  RTM_NEWLINK,
  RTM_NEWROUTE,
  RTM_NEWRULE,
  RTNH_F_ONLINK,
  RTPROT_STATIC,
  type Rule,
  type RuleAction,
  routeTypeNumber,
  ruleActionNumber,
  VETH_INFO_PEER,
} from "./rtnetlink.ts";
import { badInterfaceName } from "./tun.ts";

export type { Address, Link, Route, RouteType, Rule, RuleAction } from "./rtnetlink.ts";

/** Name or interface index. */
export type LinkRef = string | number;

/** Where a link goes: an open namespace, or the one of a process. */
export interface NetnsTarget {
  netnsFd?: number;
  netnsPid?: number;
}

export interface NewLink extends NetnsTarget {
  name: string;
  kind: "veth" | "bridge" | "dummy";
  mtu?: number;
  txQueueLength?: number;
  /** The other end of a veth. */
  peer?: NetnsTarget & { name: string; mtu?: number; txQueueLength?: number };
}

export interface LinkChange extends NetnsTarget {
  up?: boolean;
  mtu?: number;
  /** New name; the link must be down on older kernels. */
  name?: string;
  txQueueLength?: number;
  /** Bridge to join; 0 leaves it. */
  master?: LinkRef;
}

export interface NewAddress {
  link: LinkRef;
  /** "10.0.0.1/24", "fd00::1/64". */
  prefix: string;
  /** No route for the prefix. */
  noPrefixRoute?: boolean;
}

/** A route to add or delete; a field left out of a delete matches anything. */
export interface RouteSpec {
  /** "10.0.0.0/8", "::/0". Host bits are cleared. */
  dst: string;
  /** Default "unicast". */
  type?: RouteType;
  /** Default 254, main. */
  table?: number;
  via?: string;
  dev?: LinkRef;
  metric?: number;
  /** Preferred source address. */
  src?: string;
  /** The next hop is on the link although no route says so. */
  onlink?: boolean;
}

/** A rule to add or delete. `priority` 0 to 2^32 - 1. */
export interface RuleSpec {
  family: 4 | 6;
  priority: number;
  /** Default "lookup". */
  action?: RuleAction;
  /** For "lookup"; default 254, main. */
  table?: number;
  fwmark?: number;
  fwmask?: number;
  invert?: boolean;
  from?: string;
  to?: string;
  iif?: string;
  oif?: string;
  ipProtocol?: number;
  sourcePorts?: [number, number];
  destinationPorts?: [number, number];
  suppressPrefixLength?: number;
}

/** Add: an equal object that exists already is not an error. */
export interface AddOptions {
  existsOk?: boolean;
}
/** Delete: an object that is not there is not an error. */
export interface DeleteOptions {
  missingOk?: boolean;
}

/** An address with what endpoint discovery wants to know of its interface. */
export interface InterfaceAddress extends Address {
  name: string;
  kind: string;
  up: boolean;
  loopback: boolean;
  pointToPoint: boolean;
}

const NETLINK_ROUTE = 0;
const SOL_NETLINK = 270;
const NETLINK_CAP_ACK = 10;
const NETLINK_EXT_ACK = 11;
const SOCKADDR_NL_SIZE = 12;
/** The kernel's dump datagrams have at most 32 KB. */
const RECEIVE_BYTES = 65536;
/** A full internet table is 130 MB; beyond this the dump is given up. */
const DUMP_LIMIT_BYTES = 256 << 20;
const DUMP_RETRIES = 5;
/** Some thousand notifications. */
const MONITOR_BUFFER_BYTES = 1 << 20;
const ANSWER_TIMEOUT_MS = 5000;
const POLLIN = 1;

function openSocket(groups: number, flags: number): number {
  const fd = check(libc.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | flags, NETLINK_ROUTE), "open a netlink socket");
  const address = buffer(SOCKADDR_NL_SIZE);
  const view = new DataView(address.buffer);
  view.setUint16(0, AF_NETLINK, true);
  view.setUint32(8, groups, true);
  try {
    check(libc.bind(fd, address, SOCKADDR_NL_SIZE), "bind a netlink socket");
  } catch (error) {
    closeFd(fd);
    throw error;
  }
  return fd;
}

function prefixOrThrow(text: string): Prefix {
  const prefix = parsePrefix(text);
  if (!prefix)
    throw new SysError(EINVAL, "netlink", `${JSON.stringify(text)} is not a prefix: write 10.0.0.0/8 or fd00::/64`);
  return prefix;
}

function ipOrThrow(text: string, family: 4 | 6): IP {
  const ip = parseIP(text);
  if (ip?.length !== (family === 4 ? 4 : 16)) {
    throw new SysError(EINVAL, "netlink", `${JSON.stringify(text)} is not an IPv${family} address`);
  }
  return ip;
}

function nameOrThrow(name: string): string {
  const bad = name === "" ? "a device name may not be empty" : badInterfaceName(name);
  if (bad !== null) throw new SysError(EINVAL, "netlink", bad);
  return name;
}

function familyOf(ip: IP): 4 | 6 {
  return ip.length === 4 ? 4 : 6;
}

function addressFamily(family: 4 | 6): number {
  return family === 4 ? AF_INET : AF_INET6;
}

export class Netlink implements Disposable {
  readonly #fd: number;
  readonly #receive = buffer(RECEIVE_BYTES);
  #sequence = 1;

  /** Opens a socket in this thread's present namespace. Throws SysError. */
  constructor() {
    this.#fd = openSocket(0, 0);
    // Older kernels refuse them: then errors are numbers without text.
    libc.setsockopt(this.#fd, SOL_NETLINK, NETLINK_EXT_ACK, new Int32Array([1]), 4);
    libc.setsockopt(this.#fd, SOL_NETLINK, NETLINK_CAP_ACK, new Int32Array([1]), 4);
  }

  close(): void {
    closeFd(this.#fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  // Links

  links(): Link[] {
    return this.#dump(RTM_GETLINK, RTM_NEWLINK, (m) => m.ifinfo(0, 0, 0), parseLink, "list the interfaces");
  }

  /** Null when there is none. */
  link(ref: LinkRef): Link | null {
    const message = new MessageBuilder(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK);
    message.ifinfo(typeof ref === "number" ? ref : 0, 0, 0);
    if (typeof ref === "string") message.text(IFLA_IFNAME, nameOrThrow(ref));
    let found: Link | null = null;
    const failed = this.#transact(message, (answer) => {
      if (answer.type === RTM_NEWLINK) found ??= parseLink(answer.body);
    });
    if (failed && failed.errno !== ENODEV)
      throw new SysError(failed.errno, `look up the interface ${ref}`, failed.text);
    return failed ? null : found;
  }

  /** Its index. Throws SysError ENODEV. */
  #index(ref: LinkRef): number {
    if (typeof ref === "number") return ref;
    const link = this.link(ref);
    if (!link) throw new SysError(ENODEV, `look up the interface ${ref}`);
    return link.index;
  }

  addLink(link: NewLink, options: AddOptions = {}): void {
    const message = new MessageBuilder(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL);
    message.ifinfo(0, 0, 0);
    this.#linkAttributes(message, link);
    message.nested(IFLA_LINKINFO, () => {
      message.text(IFLA_INFO_KIND, link.kind);
      const { peer } = link;
      if (!peer) return;
      message.nested(IFLA_INFO_DATA, () => {
        message.nested(VETH_INFO_PEER, () => {
          message.ifinfo(0, 0, 0);
          this.#linkAttributes(message, peer);
        });
      });
    });
    const pair = link.peer ? ` with ${link.peer.name}` : "";
    this.#request(message, `create the ${link.kind} ${link.name}${pair}`, options.existsOk ? [EEXIST] : []);
  }

  #linkAttributes(message: MessageBuilder, link: LinkChange): void {
    if (link.name !== undefined) message.text(IFLA_IFNAME, nameOrThrow(link.name));
    if (link.mtu !== undefined) message.u32(IFLA_MTU, link.mtu);
    if (link.txQueueLength !== undefined) message.u32(IFLA_TXQLEN, link.txQueueLength);
    if (link.master !== undefined) message.u32(IFLA_MASTER, this.#index(link.master));
    if (link.netnsFd !== undefined) message.u32(IFLA_NET_NS_FD, link.netnsFd);
    if (link.netnsPid !== undefined) message.u32(IFLA_NET_NS_PID, link.netnsPid);
  }

  setLink(ref: LinkRef, change: LinkChange): void {
    const message = new MessageBuilder(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK);
    const mask = change.up === undefined ? 0 : IFF_UP;
    message.ifinfo(this.#index(ref), change.up ? IFF_UP : 0, mask);
    this.#linkAttributes(message, change);
    this.#request(message, `change the interface ${ref} (${Object.entries(change).flat().join(" ")})`, []);
  }

  deleteLink(ref: LinkRef, options: DeleteOptions = {}): void {
    const message = new MessageBuilder(RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK);
    message.ifinfo(typeof ref === "number" ? ref : 0, 0, 0);
    if (typeof ref === "string") message.text(IFLA_IFNAME, nameOrThrow(ref));
    this.#request(message, `delete the interface ${ref}`, options.missingOk ? [ENODEV] : []);
  }

  // Addresses

  addresses(link?: LinkRef): Address[] {
    const index = link === undefined ? 0 : this.#index(link);
    const all = this.#dump(RTM_GETADDR, RTM_NEWADDR, (m) => m.ifaddr(0, 0, 0, 0), parseAddress, "list the addresses");
    return index === 0 ? all : all.filter((address) => address.index === index);
  }

  /** Every address with its interface: the raw material of endpoint discovery. */
  interfaceAddresses(): InterfaceAddress[] {
    const links = new Map(this.links().map((link) => [link.index, link]));
    return this.addresses().flatMap((address) => {
      const link = links.get(address.index);
      if (!link) return [];
      const { name, kind, up, loopback, pointToPoint } = link;
      return [{ ...address, name, kind, up, loopback, pointToPoint }];
    });
  }

  /** Packets to `ip` are taken for this namespace's own: the kernel has made the local route. */
  isLocal(ip: string): boolean {
    const dst = `${ip}/${ip.includes(":") ? 128 : 32}`;
    const family = ip.includes(":") ? 6 : 4;
    return this.routes({ family, table: RT_TABLE_LOCAL }).some((route) => route.type === "local" && route.dst === dst);
  }

  /**
   * The address can be bound at once. The kernel finishes an IPv6 one in the background: for some milliseconds more, until
   * `isLocal`, packets to it are dropped.
   */
  addAddress(address: NewAddress, options: AddOptions = {}): void {
    const message = this.#addressMessage(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, address);
    this.#request(message, `add ${address.prefix} to ${address.link}`, options.existsOk ? [EEXIST] : []);
  }

  deleteAddress(address: NewAddress, options: DeleteOptions = {}): void {
    const tolerated = options.missingOk ? [EADDRNOTAVAIL, ENODEV] : [];
    const what = `take ${address.prefix} from ${address.link}`;
    tolerate(tolerated, () => this.#request(this.#addressMessage(RTM_DELADDR, 0, address), what, []));
  }

  #addressMessage(type: number, flags: number, address: NewAddress): MessageBuilder {
    const { ip, bits } = prefixOrThrow(address.prefix);
    const family = familyOf(ip);
    const scope = family === 4 && ip[0] === 127 ? RT_SCOPE_HOST : RT_SCOPE_UNIVERSE;
    const message = new MessageBuilder(type, NLM_F_REQUEST | NLM_F_ACK | flags);
    message.ifaddr(addressFamily(family), bits, scope, this.#index(address.link));
    message.bytes(IFA_LOCAL, ip).bytes(IFA_ADDRESS, ip);
    // Without NODAD an IPv6 address cannot be bound for a second or two. Nobody else has ours.
    message.u32(IFA_FLAGS, (address.noPrefixRoute ? IFA_F_NOPREFIXROUTE : 0) | (family === 6 ? IFA_F_NODAD : 0));
    return message;
  }

  // Routes

  routes(filter: { family?: 4 | 6; table?: number } = {}): Route[] {
    const family = filter.family === undefined ? 0 : addressFamily(filter.family);
    const fields = [family, 0, 0, 0, 0, 0, 0, 0];
    const all = this.#dump(RTM_GETROUTE, RTM_NEWROUTE, (m) => m.rt(fields, 0), parseRoute, "list the routes");
    return filter.table === undefined ? all : all.filter((route) => route.table === filter.table);
  }

  addRoute(route: RouteSpec, options: AddOptions & { replace?: boolean } = {}): void {
    const flags = NLM_F_CREATE | (options.replace ? NLM_F_REPLACE : NLM_F_EXCL);
    const message = this.#routeMessage(RTM_NEWROUTE, flags, route);
    this.#request(message, `add the route ${describeRoute(route)}`, options.existsOk ? [EEXIST] : []);
  }

  deleteRoute(route: RouteSpec, options: DeleteOptions = {}): void {
    const tolerated = options.missingOk ? [ESRCH, ENOENT, ENODEV] : [];
    const what = `delete the route ${describeRoute(route)}`;
    tolerate(tolerated, () => this.#request(this.#routeMessage(RTM_DELROUTE, 0, route), what, []));
  }

  #routeMessage(type: number, flags: number, route: RouteSpec): MessageBuilder {
    const { ip, bits } = maskPrefix(prefixOrThrow(route.dst));
    const family = familyOf(ip);
    const adding = type === RTM_NEWROUTE;
    const table = route.table ?? RT_TABLE_MAIN;
    const kind = routeTypeNumber(route.type ?? (adding ? "unicast" : "unspec"));
    const protocol = adding ? RTPROT_STATIC : 0;
    const message = new MessageBuilder(type, NLM_F_REQUEST | NLM_F_ACK | flags);
    message.rt(
      [addressFamily(family), bits, 0, 0, table < 256 ? table : 0, protocol, routeScope(route, family, adding), kind],
      route.onlink ? RTNH_F_ONLINK : 0,
    );
    message.u32(RTA_TABLE, table);
    if (bits > 0) message.bytes(RTA_DST, ip);
    if (route.via !== undefined) message.bytes(RTA_GATEWAY, ipOrThrow(route.via, family));
    if (route.dev !== undefined) message.u32(RTA_OIF, this.#index(route.dev));
    if (route.metric !== undefined) message.u32(RTA_PRIORITY, route.metric);
    if (route.src !== undefined) message.bytes(RTA_PREFSRC, ipOrThrow(route.src, family));
    return message;
  }

  // Rules

  rules(filter: { family?: 4 | 6 } = {}): Rule[] {
    const families = filter.family === undefined ? [AF_INET, AF_INET6] : [addressFamily(filter.family)];
    return families.flatMap((family) => {
      const fields = [family, 0, 0, 0, 0, 0, 0, 0];
      return this.#dump(RTM_GETRULE, RTM_NEWRULE, (m) => m.rt(fields, 0), parseRule, "list the rules");
    });
  }

  addRule(rule: RuleSpec, options: AddOptions = {}): void {
    const message = ruleMessage(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, rule);
    this.#request(message, `add the rule ${describeRule(rule)}`, options.existsOk ? [EEXIST] : []);
  }

  deleteRule(rule: RuleSpec, options: DeleteOptions = {}): void {
    const message = ruleMessage(RTM_DELRULE, 0, rule);
    this.#request(message, `delete the rule ${describeRule(rule)}`, options.missingOk ? [ENOENT, ESRCH] : []);
  }

  // Transport

  #request(message: MessageBuilder, what: string, tolerated: readonly number[]): void {
    const failed = this.#transact(message, () => {});
    if (failed && !tolerated.includes(failed.errno)) throw new SysError(failed.errno, what, failed.text);
  }

  /** Sends, and hands each answer on until the acknowledgement; what that says if it is an error, else null. */
  #transact(
    message: MessageBuilder,
    each: (answer: Message) => void,
  ): { errno: number; text: string | undefined } | null {
    const sequence = this.#send(message);
    for (;;) {
      for (const answer of this.#next()) {
        if (answer.sequence !== sequence) continue;
        if (answer.type === NLMSG_ERROR) return errorOf(answer);
        each(answer);
      }
    }
  }

  #dump<T>(
    type: number,
    answerType: number,
    head: (message: MessageBuilder) => void,
    parse: (body: Uint8Array) => T | null,
    what: string,
  ): T[] {
    for (let attempt = 1; ; attempt++) {
      const message = new MessageBuilder(type, NLM_F_REQUEST | NLM_F_DUMP);
      head(message);
      const { out, changed } = this.#dumpOnce(message, answerType, parse, what);
      // The table changed under the dump: entries may be missing or doubled.
      if (!changed || attempt === DUMP_RETRIES) return out;
    }
  }

  #dumpOnce<T>(message: MessageBuilder, answerType: number, parse: (body: Uint8Array) => T | null, what: string) {
    const sequence = this.#send(message);
    const out: T[] = [];
    let changed = false;
    let bytes = 0;
    for (;;) {
      for (const answer of this.#next()) {
        if (answer.sequence !== sequence) continue;
        if ((answer.flags & NLM_F_DUMP_INTR) !== 0) changed = true;
        if (answer.type === NLMSG_DONE) return { out, changed };
        if (answer.type === NLMSG_ERROR) {
          const failed = errorOf(answer);
          throw new SysError(failed?.errno ?? EINVAL, what, failed?.text);
        }
        bytes += answer.body.length;
        if (bytes > DUMP_LIMIT_BYTES)
          throw new SysError(EOVERFLOW, what, `more than ${DUMP_LIMIT_BYTES >> 20} MiB of entries`);
        const value = answer.type === answerType ? parse(answer.body) : null;
        if (value !== null) out.push(value);
      }
    }
  }

  #send(message: MessageBuilder): number {
    const sequence = this.#sequence++;
    const bytes = message.finish(sequence);
    check(libc.sendto(this.#fd, bytes, bytes.length, 0, 0, 0), "send a netlink request");
    return sequence;
  }

  /** The messages of the next datagram. */
  #next(): Message[] {
    for (;;) {
      const length = orErrno(libc.recvfrom(this.#fd, this.#receive, RECEIVE_BYTES, MSG_DONTWAIT | MSG_TRUNC, 0, 0));
      if (length > RECEIVE_BYTES) throw new SysError(EOVERFLOW, "read a netlink answer", `it has ${length} bytes`);
      if (length >= 0) return parseMessages(this.#receive.subarray(0, length)).messages;
      if (length === -EINTR) continue;
      if (length !== -EAGAIN) throw new SysError(-length, "read a netlink answer");
      this.#waitForAnswer();
    }
  }

  #waitForAnswer(): void {
    const pollfd = new Int32Array([this.#fd, POLLIN]);
    const ready = orErrno(libc.poll(pollfd, 1, ANSWER_TIMEOUT_MS));
    if (ready === 0) throw new SysError(ETIMEDOUT, "read a netlink answer");
    if (ready < 0 && ready !== -EINTR) throw new SysError(-ready, "read a netlink answer");
  }
}

/** Runs `action`; swallows the errors named: also those of looking up an interface that is gone. */
function tolerate(errnos: readonly number[], action: () => void): void {
  try {
    action();
  } catch (error) {
    if (!(error instanceof SysError && errnos.includes(error.errno))) throw error;
  }
}

function errorOf(answer: Message): { errno: number; text: string | undefined } | null {
  if (answer.body.length < 4) return { errno: EINVAL, text: "the kernel's answer is cut short" };
  const code = new DataView(answer.body.buffer, answer.body.byteOffset).getInt32(0, true);
  return code === 0 ? null : { errno: -code, text: parseErrorText(answer) };
}

function routeScope(route: RouteSpec, family: 4 | 6, adding: boolean): number {
  if (family === 6) return RT_SCOPE_UNIVERSE;
  if (!adding) return RT_SCOPE_NOWHERE;
  if (route.type === "local") return RT_SCOPE_HOST;
  return route.via === undefined && route.dev !== undefined ? RT_SCOPE_LINK : RT_SCOPE_UNIVERSE;
}

function describeRoute(route: RouteSpec): string {
  const parts = [route.type === undefined ? route.dst : `${route.type} ${route.dst}`];
  if (route.via !== undefined) parts.push(`via ${route.via}`);
  if (route.dev !== undefined) parts.push(`dev ${route.dev}`);
  if (route.table !== undefined) parts.push(`table ${route.table}`);
  if (route.metric !== undefined) parts.push(`metric ${route.metric}`);
  return parts.join(" ");
}

function describeRule(rule: RuleSpec): string {
  const { family, ...rest } = rule;
  return `(IPv${family}) ${Object.entries(rest).flat().join(" ")}`;
}

function ruleMessage(type: number, flags: number, rule: RuleSpec): MessageBuilder {
  const from = rule.from === undefined ? null : prefixOrThrow(rule.from);
  const to = rule.to === undefined ? null : prefixOrThrow(rule.to);
  for (const prefix of [from, to]) {
    if (prefix && familyOf(prefix.ip) !== rule.family) {
      throw new SysError(EINVAL, `the rule ${describeRule(rule)}`, `its prefix is not an IPv${rule.family} one`);
    }
  }
  const action = rule.action ?? "lookup";
  const table = action === "lookup" ? (rule.table ?? RT_TABLE_MAIN) : 0;
  const message = new MessageBuilder(type, NLM_F_REQUEST | NLM_F_ACK | flags);
  message.rt(
    [
      addressFamily(rule.family),
      to?.bits ?? 0,
      from?.bits ?? 0,
      0,
      table < 256 ? table : 0,
      0,
      0,
      ruleActionNumber(action),
    ],
    rule.invert ? FIB_RULE_INVERT : 0,
  );
  message.u32(FRA_PRIORITY, rule.priority);
  if (table !== 0) message.u32(FRA_TABLE, table);
  if (from) message.bytes(FRA_SRC, from.ip);
  if (to) message.bytes(FRA_DST, to.ip);
  if (rule.iif !== undefined) message.text(FRA_IIFNAME, nameOrThrow(rule.iif));
  if (rule.oif !== undefined) message.text(FRA_OIFNAME, nameOrThrow(rule.oif));
  if (rule.fwmark !== undefined) message.u32(FRA_FWMARK, rule.fwmark);
  if (rule.fwmask !== undefined) message.u32(FRA_FWMASK, rule.fwmask);
  if (rule.ipProtocol !== undefined) message.u8(FRA_IP_PROTO, rule.ipProtocol);
  if (rule.sourcePorts) message.portRange(FRA_SPORT_RANGE, rule.sourcePorts);
  if (rule.destinationPorts) message.portRange(FRA_DPORT_RANGE, rule.destinationPorts);
  if (rule.suppressPrefixLength !== undefined) message.u32(FRA_SUPPRESS_PREFIXLEN, rule.suppressPrefixLength);
  return message;
}

/** One change. `overflow`: changes were lost (the kernel's queue was full, or a message was cut): list everything anew. */
export type NetlinkEvent =
  | { kind: "link"; change: "new" | "delete"; value: Link }
  | { kind: "address"; change: "new" | "delete"; value: Address }
  | { kind: "route"; change: "new" | "delete"; value: Route }
  | { kind: "rule"; change: "new" | "delete"; value: Rule }
  | { kind: "overflow" };

// RTMGRP_* bits; the last is 1 << (RTNLGRP_IPV6_RULE 19 - 1).
const GROUP_LINK = 1;
const GROUP_IPV4_IFADDR = 0x10;
const GROUP_IPV4_ROUTE = 0x40;
const GROUP_IPV4_RULE = 0x80;
const GROUP_IPV6_IFADDR = 0x100;
const GROUP_IPV6_ROUTE = 0x400;
const GROUP_IPV6_RULE = 0x40000;
const ALL_GROUPS =
  GROUP_LINK |
  GROUP_IPV4_IFADDR |
  GROUP_IPV4_ROUTE |
  GROUP_IPV4_RULE |
  GROUP_IPV6_IFADDR |
  GROUP_IPV6_ROUTE |
  GROUP_IPV6_RULE;

/** Value of one notification, or null when it is none of ours. */
export function parseEvent(message: Message): NetlinkEvent | null {
  // A family's types are NEW, DEL, GET, SET from a multiple of four on.
  const change = (message.type & 3) === 0 ? "new" : (message.type & 3) === 1 ? "delete" : null;
  if (change === null) return null;
  switch (message.type & ~3) {
    case RTM_NEWLINK: {
      const value = parseLink(message.body);
      return value && { kind: "link", change, value };
    }
    case RTM_NEWADDR: {
      const value = parseAddress(message.body);
      return value && { kind: "address", change, value };
    }
    case RTM_NEWROUTE: {
      const value = parseRoute(message.body);
      return value && { kind: "route", change, value };
    }
    case RTM_NEWRULE: {
      const value = parseRule(message.body);
      return value && { kind: "rule", change, value };
    }
    default:
      return null;
  }
}

/**
 * Calls `onEvent` on the event loop for each change in the namespace in which it was made, within about a millisecond. The
 * runtime's own poller watches the socket (as a stream of a pollable descriptor), so that there is no timer and no thread.
 * It keeps the process alive until `close`.
 */
export class NetlinkMonitor implements Disposable {
  readonly #fd: number;
  #reader: ReadableStreamDefaultReader<Uint8Array>;
  #closed = false;
  readonly #onEvent: (event: NetlinkEvent) => void;

  /** Throws SysError when the socket cannot be opened. */
  constructor(onEvent: (event: NetlinkEvent) => void) {
    this.#onEvent = onEvent;
    this.#fd = openMonitorSocket();
    this.#reader = streamOf(this.#fd);
    void this.#run();
  }

  async #run(): Promise<void> {
    while (!this.#closed) {
      try {
        const { value, done } = await this.#reader.read();
        if (this.#closed || done) break;
        this.#deliver(value);
      } catch (error) {
        // ENOBUFS ends the stream, though not the socket: go on with a fresh one. Nothing else is known to happen; if it
        // does, it must not spin.
        if ((error as { code?: string }).code !== "ENOBUFS") await Bun.sleep(1000);
        if (this.#closed) break;
        this.#reader = streamOf(this.#fd);
        this.#onEvent({ kind: "overflow" });
      }
    }
  }

  #deliver(bytes: Uint8Array): void {
    const { messages, whole } = parseMessages(bytes);
    for (const message of messages) {
      const event = parseEvent(message);
      if (event && !this.#closed) this.#onEvent(event);
    }
    if (!whole && !this.#closed) this.#onEvent({ kind: "overflow" });
  }

  /** No event comes after it. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    const fd = this.#fd;
    // The poller must let go of the descriptor before its number can be used again.
    void this.#reader
      .cancel()
      .catch(() => {})
      .finally(() => closeFd(fd));
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

function openMonitorSocket(): number {
  const fd = openSocket(ALL_GROUPS, SOCK_NONBLOCK);
  const room = new Int32Array([MONITOR_BUFFER_BYTES]);
  if (libc.setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, room, 4) !== 0)
    libc.setsockopt(fd, SOL_SOCKET, SO_RCVBUF, room, 4);
  return fd;
}

function streamOf(fd: number): ReadableStreamDefaultReader<Uint8Array> {
  return Bun.file(fd).stream().getReader();
}
