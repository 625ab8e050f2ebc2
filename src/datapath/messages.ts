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

/** workerData. Descriptors belong to the main thread, which closes them when the Worker has ended. */
export interface WorkerSetup {
  mode: DatapathOptions["mode"];
  mtu: number;
  tun: { fd: number; vnetHeader: boolean; tso: boolean; uso: boolean };
  sockets: Sockets;
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
  | { type: "ready" }
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
