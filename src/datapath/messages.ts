// What main thread and Worker say to each other: commands over a MessagePort, packets through two rings.
import type { DatapathOptions, DatapathStats, DeviceDump, DeviceUpdate, Key, PeerPath } from "./api.ts";

/** Descriptors of the outer sockets; -1: that family is not there. */
export interface Sockets {
  fd4: number;
  fd6: number;
  gso4: boolean;
  gso6: boolean;
  gro: boolean;
}

/** The other thread's side of the two Workers that share the work (docs/architecture.md, "More cores"). */
export interface Link {
  /** Records for the sender Worker. */
  toSender: SharedArrayBuffer;
  /** Records for the Worker that has the device. */
  toReceiver: SharedArrayBuffer;
  senderWakeFd: number;
  receiverWakeFd: number;
  /** What the sender has counted (f64, by SENDER_STATS), as of the last fence. */
  stats: SharedArrayBuffer;
}

/** What a Worker that has helpers for its ciphers shares with them (crew.ts). */
export interface CrewSetup {
  memory: WebAssembly.Memory;
  words: SharedArrayBuffer;
  /** A part of the memory for each helper. */
  parts: { start: number; bytes: number }[];
  /** The session table. */
  table: { base: number; slots: number };
}

/** workerData of a helper. */
export interface HelperSetup extends Omit<CrewSetup, "parts"> {
  role: "helper";
  part: CrewSetup["parts"][number];
  port: import("node:worker_threads").MessagePort;
}

/** workerData of the Worker that carries packets from the TUN to the network, when there is one. */
export interface SenderSetup {
  role: "sender";
  /** For its ciphers. */
  helpers: number;
  mtu: number;
  tun: { fd: number; vnetHeader: boolean };
  sockets: Sockets;
  link: Link;
  epollFd: number;
  /** Relayed messages. */
  toMain: SharedArrayBuffer;
  port: import("node:worker_threads").MessagePort;
}

/** workerData. Descriptors belong to the main thread, which closes them when the Worker has ended. */
export interface WorkerSetup {
  role: "device";
  /** For its ciphers. */
  helpers: number;
  /** Null: this Worker does all of the work. */
  link: Link | null;
  mode: DatapathOptions["mode"];
  mtu: number;
  tun: { fd: number; vnetHeader: boolean; tso: boolean; uso: boolean };
  sockets: Sockets;
  epollFd: number;
  wakeFd: number;
  toMain: SharedArrayBuffer;
  toWorker: SharedArrayBuffer;
  port: import("node:worker_threads").MessagePort;
}

/** Main to Worker; with an `id` it is answered. */
export type Command =
  | { id: number; type: "configure"; update: DeviceUpdate; sockets: Sockets | null }
  | { id: number; type: "dump" }
  | { id: number; type: "filter"; filter: import("./api.ts").FilterConfig | null }
  | { id: number; type: "stats" }
  | { type: "path"; peer: Key; path: PeerPath }
  | { type: "mtu"; mtu: number }
  | { type: "close" };

/** Worker to main. */
export type Reply =
  | { type: "ready"; crew: CrewSetup | null }
  | { type: "done"; id: number; value?: DeviceDump | DatapathStats }
  | { type: "failed"; id: number; reason: string }
  | { type: "closed" }
  | { type: "fatal"; reason: string };

// Records of the ring to main.
/** u8 length of the address, u16 port (big endian), address; datagram. */
export const RING_DATAGRAM = 1;
/** 32 bytes peer key; message. */
export const RING_RELAY = 2;
/** 32 bytes peer key. */
export const RING_ACTIVITY = 3;
/** 32 bytes peer key; f64 milliseconds (little endian), u8 initiator. */
export const RING_HANDSHAKE = 4;

// Records of the ring to the Worker.
/** 32 bytes peer key; message. */
export const RING_RELAY_IN = 1;

// Records of the ring to the sender, numbers little endian.
/** u32 session, peer, local index, remote index; 32 bytes key. */
export const LINK_SESSION = 1;
/** u32 session. */
export const LINK_WIPE = 2;
/** u32 peer, i32 session or -1, f64 ms for which it may be used. */
export const LINK_USE = 3;
/** u32 peer. */
export const LINK_DROP = 4;
/** u32 peer, 32 bytes peer key, a record of PeerPaths. */
export const LINK_PATH = 5;
/** u32 peer, u8 prefix length; 4 or 16 bytes address. */
export const LINK_ALLOW = 6;
/** As LINK_ALLOW, peer 0. */
export const LINK_DISALLOW = 7;
/** u32 peer, u32 session. */
export const LINK_KEEPALIVE = 8;
/** u32: 1 while there is a packet filter. */
export const LINK_FILTER = 9;
/** u32. */
export const LINK_MTU = 10;
/** i32 IPv4 and IPv6 descriptor, u32 GSO possible on each. */
export const LINK_SOCKETS = 11;
/** u32 number: everything before it has taken effect when it comes back. */
export const LINK_FENCE = 12;
export const LINK_CLOSE = 13;

// Records of the ring to the receiver.
/** u32 peer, session, packets, bytes of whole messages, high word of the next counter. */
export const LINK_SENT = 1;
/** u32 peer: packets wait for a session. */
export const LINK_WANT = 2;
/** An entry of the list of flows (asm/filter.ts). */
export const LINK_FLOW = 3;
/** u32 peer: the kernel refused the local address. */
export const LINK_SOURCE_GONE = 4;
/** u32 number, back. */
export const LINK_FENCED = 5;

/** The sender's counters, by place in `Link.stats`. */
export const SENDER_STATS = ["packets", "sent", "failed", "unsealed", "lost", "gso", "helped"] as const;
