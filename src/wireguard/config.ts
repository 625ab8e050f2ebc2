// Configuration of a WireGuard device as plain values: what the UAPI `set` and `get` say (wireguard.com/xplatform), and the
// path of a peer in a mesh. The values cross a MessagePort by structured clone.
import type { AddrPort } from "../wire/ip.ts";

/** 32 bytes. */
export type Key = Uint8Array;

/** One peer section of a WireGuard UAPI `set`. Absent fields stay as they are. */
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

/** A WireGuard UAPI `set`. All of it is checked before any of it takes effect. */
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

/**
 * How packets to a peer travel now (mesh mode; `src/paths` decides). Both set: the UDP address is not yet trusted, send
 * on both ways and let the replay window drop the copies. Neither: packets are staged.
 */
export interface PeerPath {
  udp?: AddrPort;
  relay?: boolean;
}
