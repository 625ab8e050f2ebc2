// The cross-platform WireGuard configuration protocol (wireguard.com/xplatform), as wg(8) speaks it over a unix socket.
//
//   request   "get=1" LF LF, or "set=1" LF key=value LF ... LF: an empty line ends it. Several per connection.
//   answer    key=value LF ... "errno=" number LF LF; 0, or a negative Linux errno as wireguard-go prints it
//   set       device keys first: private_key, listen_port, fwmark, replace_peers; then per peer, opened by public_key:
//             remove, update_only, preshared_key, endpoint, persistent_keepalive_interval, replace_allowed_ips,
//             allowed_ip ("-" before the prefix takes it away), protocol_version
//   get       the same keys, and per peer last_handshake_time_sec, last_handshake_time_nsec, rx_bytes, tx_bytes
//
// Keys are 64 hex digits; booleans are "true" or absent. A `set` is one DeviceUpdate: checked whole before it is applied.
import { hex, unhex } from "../crypto/keys.ts";
import { type AddrPort, formatAddrPort, formatPrefix, maskPrefix, parseAddrPort, parsePrefix } from "./ip.ts";

/** 32 bytes. */
export type Key = Uint8Array;

/** One peer section of a `set`. Absent fields stay as they are. */
export interface PeerUpdate {
  publicKey: Key;
  /** Remove this peer; everything else in the section is ignored. */
  remove?: boolean;
  /** Change the peer only if it exists. */
  updateOnly?: boolean;
  /** 32 zero bytes mean none. */
  presharedKey?: Key;
  endpoint?: AddrPort;
  /** Seconds, 0 to 65535; 0 is off. */
  persistentKeepalive?: number;
  replaceAllowedIPs?: boolean;
  /** "10.0.0.0/8"; with a leading "-" the prefix is taken away. A prefix moves here from whichever peer held it. */
  allowedIPs?: string[];
}

/** A `set`. All of it is checked before any of it takes effect. */
export interface DeviceUpdate {
  /** 32 zero bytes remove the key. */
  privateKey?: Key;
  /** 0 asks the kernel for a port. */
  listenPort?: number;
  /** SO_MARK of outer packets; 0 is none. */
  fwmark?: number;
  replacePeers?: boolean;
  peers?: PeerUpdate[];
}

export interface PeerDump {
  publicKey: Key;
  presharedKey: Key;
  endpoint: AddrPort | null;
  persistentKeepalive: number;
  allowedIPs: string[];
  /** Unix time in milliseconds; 0 is never. */
  lastHandshake: number;
  /** Bytes of WireGuard messages, as wg(8) counts them. */
  rxBytes: number;
  txBytes: number;
}

export interface DeviceDump {
  privateKey: Key;
  listenPort: number;
  fwmark: number;
  peers: PeerDump[];
}

export const EINVAL = 22;
export const EIO = 5;
export const EPROTO = 71;

const MAX_LINE = 1024;
const MAX_REQUEST = 64 << 20;

export type UapiRequest =
  | { type: "get" }
  | { type: "set"; update: DeviceUpdate }
  /** Answer this errno; with `fatal` the rest of the stream cannot be understood: close after the answer. */
  | { type: "error"; errno: number; reason: string; fatal: boolean };

class UapiError extends Error {
  constructor(
    reason: string,
    readonly errno = EINVAL,
  ) {
    super(reason);
  }
}

/** Turns the bytes of one connection into requests. Holds one line of text and one update, both bounded. */
export class UapiReader {
  #line = "";
  #size = 0;
  #request: "none" | "get" | "set" = "none";
  #update: DeviceUpdate = {};
  #peer: PeerUpdate | null = null;
  #error: UapiError | null = null;
  #dead = false;
  readonly #decoder = new TextDecoder("latin1");

  push(chunk: Uint8Array): UapiRequest[] {
    const out: UapiRequest[] = [];
    const text = this.#line + this.#decoder.decode(chunk);
    let from = 0;
    while (!this.#dead) {
      const end = text.indexOf("\n", from);
      if (end < 0) break;
      this.#take(text.slice(from, end), out);
      from = end + 1;
    }
    this.#line = this.#dead ? "" : text.slice(from);
    if (this.#line.length > MAX_LINE) this.#fail(`a line is longer than ${MAX_LINE} bytes`, EIO, out);
    return out;
  }

  /** The peer closed its side: a request without its empty line is complete then. */
  end(): UapiRequest[] {
    const out: UapiRequest[] = [];
    if (this.#dead) return out;
    if (this.#line !== "") this.#take(this.#line, out);
    if (this.#request !== "none" && !this.#dead) this.#take("", out);
    this.#dead = true;
    return out;
  }

  #fail(reason: string, errno: number, out: UapiRequest[]): void {
    this.#dead = true;
    this.#line = "";
    this.#reset();
    out.push({ type: "error", errno, reason, fatal: true });
  }

  #reset(): void {
    this.#request = "none";
    this.#update = {};
    this.#peer = null;
    this.#error = null;
    this.#size = 0;
  }

  #take(line: string, out: UapiRequest[]): void {
    this.#size += line.length + 1;
    if (line.length > MAX_LINE || this.#size > MAX_REQUEST) {
      const [what, most] = line.length > MAX_LINE ? ["line", MAX_LINE] : ["request", MAX_REQUEST];
      this.#fail(`a ${what} is longer than ${most} bytes`, EIO, out);
      return;
    }
    if (this.#request === "none") {
      if (line === "get=1") this.#request = "get";
      else if (line === "set=1") this.#request = "set";
      else this.#fail(`a request begins with ${quote(line)}: get=1 or set=1 is expected`, EINVAL, out);
      return;
    }
    if (line === "") {
      const { errno, message } = this.#error ?? { errno: 0, message: "" };
      if (errno !== 0) out.push({ type: "error", errno, reason: message, fatal: false });
      else if (this.#request === "get") out.push({ type: "get" });
      else out.push({ type: "set", update: this.#update });
      this.#reset();
      return;
    }
    // The rest of a request with an error in it is read and thrown away.
    if (this.#error) return;
    try {
      this.#field(line);
    } catch (error) {
      if (!(error instanceof UapiError)) throw error;
      this.#error = error;
      this.#update = {};
      this.#peer = null;
    }
  }

  #field(line: string): void {
    const equals = line.indexOf("=");
    if (equals < 0) throw new UapiError(`${quote(line)} is not key=value`, EPROTO);
    const key = line.slice(0, equals);
    const value = line.slice(equals + 1);
    if (this.#request === "get") throw new UapiError(`get takes no key such as ${quote(key)}`);
    if (key === "public_key") {
      this.#peer = { publicKey: parseKeyHex(key, value) };
      this.#update.peers ??= [];
      this.#update.peers.push(this.#peer);
      return;
    }
    if (this.#peer) setPeerField(this.#peer, key, value);
    else setDeviceField(this.#update, key, value);
  }
}

function setDeviceField(update: DeviceUpdate, key: string, value: string): void {
  switch (key) {
    case "private_key":
      update.privateKey = parseKeyHex(key, value);
      return;
    case "listen_port":
      update.listenPort = parseNumber(key, value, 65535);
      return;
    case "fwmark":
      update.fwmark = parseNumber(key, value, 0xffffffff);
      return;
    case "replace_peers":
      update.replacePeers = parseTrue(key, value);
      return;
    default:
      throw new UapiError(`${quote(key)} is not a key of a device`);
  }
}

function setPeerField(peer: PeerUpdate, key: string, value: string): void {
  switch (key) {
    case "remove":
      peer.remove = parseTrue(key, value);
      return;
    case "update_only":
      peer.updateOnly = parseTrue(key, value);
      return;
    case "preshared_key":
      peer.presharedKey = parseKeyHex(key, value);
      return;
    case "endpoint": {
      const parsed = parseAddrPort(value);
      if (!parsed) throw new UapiError(`endpoint ${quote(value)} is not an address and port`);
      peer.endpoint = formatAddrPort(parsed.ip, parsed.port);
      return;
    }
    case "persistent_keepalive_interval":
      peer.persistentKeepalive = parseNumber(key, value, 65535);
      return;
    case "replace_allowed_ips":
      peer.replaceAllowedIPs = parseTrue(key, value);
      return;
    case "allowed_ip": {
      const minus = value.startsWith("-") ? "-" : "";
      const prefix = value.includes("/") ? parsePrefix(value.slice(minus.length)) : null;
      if (!prefix) throw new UapiError(`allowed_ip ${quote(value)} is not address/bits`);
      peer.allowedIPs ??= [];
      peer.allowedIPs.push(minus + formatPrefix(maskPrefix(prefix)));
      return;
    }
    case "protocol_version":
      if (value !== "1") throw new UapiError(`protocol_version ${quote(value)} is not 1`);
      return;
    default:
      throw new UapiError(`${quote(key)} is not a key of a peer`);
  }
}

/** Errors are logged: a value never shows whole, it may be a secret. */
function quote(text: string): string {
  return JSON.stringify(text.length > 20 ? `${text.slice(0, 20)}...` : text);
}

function parseKeyHex(name: string, value: string): Key {
  const key = /^[0-9a-fA-F]{64}$/.test(value) ? unhex(value) : null;
  if (!key) throw new UapiError(`${name} is not 64 hex digits`);
  return key;
}

function parseNumber(name: string, value: string, max: number): number {
  const number = /^\d{1,10}$/.test(value) ? Number(value) : Number.NaN;
  if (!(number <= max)) throw new UapiError(`${name} ${quote(value)} is not a number from 0 to ${max}`);
  return number;
}

function parseTrue(name: string, value: string): true {
  if (value !== "true") throw new UapiError(`${name} is ${quote(value)}: true is expected`);
  return true;
}

/** The answer to a `set` or to a request that failed. `errno` is a positive Linux errno, or 0. */
export function formatErrno(errno: number): string {
  return `errno=${errno === 0 ? 0 : -errno}\n\n`;
}

/** The answer to `get`. */
export function formatDump(dump: DeviceDump): string {
  const out: string[] = [];
  if (!isZero(dump.privateKey)) out.push(`private_key=${hex(dump.privateKey)}`);
  if (dump.listenPort !== 0) out.push(`listen_port=${dump.listenPort}`);
  if (dump.fwmark !== 0) out.push(`fwmark=${dump.fwmark}`);
  for (const peer of dump.peers) {
    out.push(`public_key=${hex(peer.publicKey)}`);
    out.push(`preshared_key=${hex(peer.presharedKey)}`);
    out.push("protocol_version=1");
    if (peer.endpoint !== null) out.push(`endpoint=${peer.endpoint}`);
    const seconds = Math.floor(peer.lastHandshake / 1000);
    out.push(`last_handshake_time_sec=${seconds}`);
    out.push(`last_handshake_time_nsec=${Math.floor((peer.lastHandshake - seconds * 1000) * 1e6)}`);
    out.push(`tx_bytes=${peer.txBytes}`);
    out.push(`rx_bytes=${peer.rxBytes}`);
    out.push(`persistent_keepalive_interval=${peer.persistentKeepalive}`);
    for (const prefix of peer.allowedIPs) out.push(`allowed_ip=${prefix}`);
  }
  out.push("errno=0\n\n");
  return out.join("\n");
}

function isZero(key: Uint8Array): boolean {
  let any = 0;
  for (const byte of key) any |= byte;
  return any === 0;
}
