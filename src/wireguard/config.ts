// Configuration of a WireGuard device as plain values: what the UAPI `set` and `get` say (src/wire/uapi.ts), and the path of
// a peer in a mesh. The values cross a MessagePort by structured clone.
import type { AddrPort } from "../wire/ip.ts";

export type { DeviceDump, DeviceUpdate, Key, PeerDump, PeerUpdate } from "../wire/uapi.ts";

/**
 * How packets to a peer travel now (mesh mode; `src/paths` decides). Both set: the UDP address is not yet trusted, send
 * on both ways and let the replay window drop the copies. Neither: packets are staged.
 */
export interface PeerPath {
  udp?: AddrPort;
  relay?: boolean;
}
