// Who seals, when that is not the device's own module instance: the thread that carries packets from the TUN to the network
// (docs/architecture.md, "More cores"). It alone holds the keys to send with and counts their nonces; the device tells it
// what it needs to know, in order, and learns from it what was sent (`Device.told`) and wanted (`Device.want`).
import type { IP } from "../wire/ip.ts";

export interface Sealer {
  /** A session came up. `key` is the one to send with: 32 bytes, which the caller wipes after the call. */
  install(session: number, peer: number, localIndex: number, remoteIndex: number, key: Uint8Array): void;
  /** The session's key must be forgotten. */
  wipe(session: number): void;
  /** Data to this peer goes out on this session for the next `ms` milliseconds; -1: there is none. */
  use(peer: number, session: number, ms: number): void;
  /** What waits for a session with this peer is to be dropped. */
  dropStaged(peer: number): void;
  /** The peer is gone; its slot may be another's next. */
  forget(peer: number): void;
  allow(ip: IP, bits: number, peer: number): void;
  disallow(ip: IP, bits: number): void;
}
