// The seam between the datapath and those who use it: what `bun run wg` (UAPI) and the node daemon say to the Worker,
// and what it says to them. Plain values only: they cross a MessagePort by structured clone.
import type { AddrPort } from "../wire/ip.ts";
import type { FilterRule } from "../wire/tailcfg.ts";
import type { DeviceDump, DeviceUpdate, Key, PeerPath } from "../wireguard/config.ts";

export type { DeviceDump, DeviceUpdate, Key, PeerDump, PeerPath, PeerUpdate } from "../wireguard/config.ts";

/** What the datapath enforces on decrypted packets. Absent filter (plain WireGuard): everything passes. */
export interface FilterConfig {
  rules: FilterRule[];
  /** This node's own addresses and the routes that it serves, as prefixes: inbound to anything else is dropped. */
  local: string[];
}

export interface DatapathOptions {
  /** TUN device name, at most 15 bytes. */
  tun: string;
  mtu: number;
  /** UDP port of the outer sockets; 0 asks the kernel. */
  port: number;
  fwmark?: number;
  /**
   * wg: endpoints follow authenticated packets (roaming), everything but WireGuard is dropped.
   * mesh: paths come by `setPath`, disco and STUN datagrams go to `onDatagram`.
   */
  mode: "wg" | "mesh";
  /** Each offload is probed and falls back by itself; false turns it off at once. Default true. */
  offload?: { tunTso?: boolean; tunUso?: boolean; udpGso?: boolean; udpGro?: boolean };
  /**
   * Threads that carry packets: 1; 2, of which one sends and the other receives; 3 to 6 with helpers for the ciphers of both.
   * More are not used. Default: 2 where the process may run on 3 processors or more, else 1.
   */
  workers?: number;
}

export interface DatapathEvents {
  /** A UDP datagram that is not WireGuard: disco or STUN (mesh mode). `data` is the callee's to keep. */
  onDatagram?(from: AddrPort, data: Uint8Array): void;
  /** A WireGuard message for the relay (mesh mode, path.relay). */
  onRelay?(peer: Key, data: Uint8Array): void;
  /** User data went to this peer; at most once a second per peer. Keepalives and handshakes do not count. */
  onActivity?(peer: Key): void;
  /** A session with this peer came up; `ms` is the time from initiation to session. */
  onHandshake?(peer: Key, ms: number, initiator: boolean): void;
  /** The Worker died or the device vanished: one sentence that says why. The datapath is closed by then. */
  onFatal?(reason: string): void;
}

export interface DatapathStats {
  /** Counts since start. */
  tunRxPackets: number;
  tunTxPackets: number;
  udpRxPackets: number;
  udpTxPackets: number;
  /** Pieces of batches that helpers for the ciphers sealed or opened. */
  helped: number;
  dropped: Record<string, number>;
  /** Which offloads are in use after probing. */
  offload: { tunTso: boolean; tunUso: boolean; udpGso: boolean; udpGro: boolean };
}

/** Handle on the main thread. `startDatapath(options, events)` in datapath.ts resolves once the device is up. */
export interface Datapath {
  readonly tunName: string;
  readonly tunIndex: number;
  /** The bound UDP port. */
  port(): number;
  /** Rejects with one sentence when the update is wrong; then nothing of it has taken effect. */
  configure(update: DeviceUpdate): Promise<void>;
  dump(): Promise<DeviceDump>;
  setPath(peer: Key, path: PeerPath): void;
  /** Null: everything passes. */
  setFilter(filter: FilterConfig | null): Promise<void>;
  /** A WireGuard message that the relay delivered from `peer`. */
  relayIn(peer: Key, data: Uint8Array): void;
  /** Sends from the datapath's own UDP socket (disco, STUN). False when the kernel refused. */
  sendDatagram(to: AddrPort, data: Uint8Array): boolean;
  stats(): Promise<DatapathStats>;
  /** Ends the Worker, closes sockets and the device. */
  close(): Promise<void>;
}
