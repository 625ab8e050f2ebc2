// Checking of a configuration before any of it takes effect: text becomes values, or one sentence says what is wrong.
import { type AddrPort, formatAddrPort, type Prefix, parseAddrPort, parsePrefix } from "../wire/ip.ts";
import type { DeviceUpdate, PeerUpdate } from "./config.ts";

export interface PeerChange {
  publicKey: Uint8Array;
  remove: boolean;
  updateOnly: boolean;
  presharedKey: Uint8Array | null;
  endpoint: AddrPort | null;
  persistentKeepalive: number | null;
  replaceAllowedIPs: boolean;
  allowedIPs: { prefix: Prefix; remove: boolean }[];
}

export interface DeviceChange {
  privateKey: Uint8Array | null;
  listenPort: number | null;
  fwmark: number | null;
  replacePeers: boolean;
  peers: PeerChange[];
}

/** Throws a RangeError with one sentence about the first thing that is wrong. */
export function checkUpdate(update: DeviceUpdate): DeviceChange {
  return {
    privateKey: update.privateKey === undefined ? null : checkKey("private key", update.privateKey),
    listenPort: update.listenPort === undefined ? null : checkInteger("listen port", update.listenPort, 0xffff),
    fwmark: update.fwmark === undefined ? null : checkInteger("fwmark", update.fwmark, 0xffff_ffff),
    replacePeers: update.replacePeers ?? false,
    peers: (update.peers ?? []).map(checkPeer),
  };
}

function checkPeer(peer: PeerUpdate): PeerChange {
  return {
    publicKey: checkKey("public key", peer.publicKey),
    remove: peer.remove ?? false,
    updateOnly: peer.updateOnly ?? false,
    presharedKey: peer.presharedKey === undefined ? null : checkKey("preshared key", peer.presharedKey),
    endpoint: peer.endpoint === undefined ? null : checkEndpoint(peer.endpoint),
    persistentKeepalive:
      peer.persistentKeepalive === undefined
        ? null
        : checkInteger("persistent keepalive interval", peer.persistentKeepalive, 0xffff),
    replaceAllowedIPs: peer.replaceAllowedIPs ?? false,
    allowedIPs: (peer.allowedIPs ?? []).map(checkAllowedIP),
  };
}

function checkKey(name: string, key: unknown): Uint8Array {
  if (!(key instanceof Uint8Array)) throw new RangeError(`the ${name} is not a byte array: give 32 bytes`);
  if (key.length !== 32) throw new RangeError(`the ${name} has ${key.length} bytes: give 32`);
  return key.slice();
}

function checkInteger(name: string, value: number, max: number): number {
  if (!Number.isInteger(value) || value < 0 || value > max) {
    throw new RangeError(`the ${name} is ${value}: give a whole number from 0 to ${max}`);
  }
  return value;
}

function checkEndpoint(text: string): AddrPort {
  const parsed = typeof text === "string" ? parseAddrPort(text) : null;
  if (!parsed || parsed.port === 0) {
    throw new RangeError(
      `the endpoint ${JSON.stringify(text)} is no address and port: give 192.0.2.1:51820 or [2001:db8::1]:51820`,
    );
  }
  return formatAddrPort(parsed.ip, parsed.port);
}

function checkAllowedIP(text: string): { prefix: Prefix; remove: boolean } {
  const remove = typeof text === "string" && text.startsWith("-");
  const prefix = typeof text === "string" ? parsePrefix(remove ? text.slice(1) : text) : null;
  if (!prefix) throw new RangeError(`the allowed IP ${JSON.stringify(text)} is no prefix: give 10.0.0.0/8 or fd00::/8`);
  return { prefix, remove };
}
