// How packets to each peer leave, by peer slot: the outer address as a sockaddr that the kernel reads in place, the local
// address to send from (sticky source), and whether the relay is used as well.
//
//   128 bytes per slot in wasm memory: 0 sockaddr (16 or 28), 32 control message IP_PKTINFO or IPV6_PKTINFO (32 or 40)
//
// Where another thread sends, that one has a copy: it takes over (`adopt`) what this one hands out (`record`).
import {
  CMSG_SPACE_PKTINFO4,
  CMSG_SPACE_PKTINFO6,
  CMSGHDR_SIZE,
  type Control,
  writePktinfo4Cmsg,
  writePktinfo6Cmsg,
  writeSockaddr,
} from "../../ffi/msg.ts";
import type { Asm } from "../crypto/wasm.ts";
import { type AddrPort, parseAddrPort } from "../wire/ip.ts";
import type { Peer } from "../wireguard/peer.ts";

const RECORD = 128;
const CONTROL_AT = 32;
const PATH_BYTES = CONTROL_AT + CMSG_SPACE_PKTINFO6;
export const PATH_RECORD = 4 + PATH_BYTES;

export class PeerPaths {
  readonly #asm: Asm;
  readonly #base: number;
  readonly #mode: "wg" | "mesh" | "copy";
  readonly #text: (AddrPort | null)[] = [];
  /** Bytes of the sockaddr: 16, 28, or 0 when there is no UDP path. */
  readonly nameLength: Uint8Array;
  /** Bytes of the sticky source's control message; 0: none. */
  readonly controlLength: Uint8Array;
  readonly relay: Uint8Array;
  /** GSO messages to this address were too long for its link. */
  readonly noGso: Uint8Array;
  /** Told of each change to what lies here. */
  onChange: (slot: number) => void = () => {};

  /** Mode "copy": addresses come by `adopt` alone. */
  constructor(asm: Asm, mode: "wg" | "mesh" | "copy", maxPeers: number) {
    this.#mode = mode;
    this.#asm = asm;
    this.#base = asm.alloc(maxPeers * RECORD);
    this.nameLength = new Uint8Array(maxPeers);
    this.controlLength = new Uint8Array(maxPeers);
    this.relay = new Uint8Array(maxPeers);
    this.noGso = new Uint8Array(maxPeers);
  }

  /** What lies here for a peer, PATH_RECORD bytes: u8 lengths of sockaddr and control message, u8 relay; the 72 bytes. */
  record(slot: number, into: Uint8Array): void {
    into[0] = this.nameLength[slot]!;
    into[1] = this.controlLength[slot]!;
    into[2] = this.relay[slot]!;
    into.set(this.#asm.u8.subarray(this.name(slot), this.name(slot) + PATH_BYTES), 4);
  }

  /** Takes over a `record` of another thread. */
  adopt(slot: number, record: Uint8Array): void {
    if (!this.#sameName(slot, record)) this.noGso[slot] = 0;
    this.nameLength[slot] = record[0]!;
    this.controlLength[slot] = record[1]!;
    this.relay[slot] = record[2]!;
    this.#asm.u8.set(record.subarray(4, 4 + PATH_BYTES), this.name(slot));
  }

  #sameName(slot: number, record: Uint8Array): boolean {
    if (this.nameLength[slot] !== record[0]) return false;
    const at = this.name(slot);
    for (let i = 0; i < record[0]!; i++) if (this.#asm.u8[at + i] !== record[4 + i]) return false;
    return true;
  }

  /** Offset of the sockaddr. */
  name(slot: number): number {
    return this.#base + slot * RECORD;
  }

  /** Offset of the control message. */
  control(slot: number): number {
    return this.#base + slot * RECORD + CONTROL_AT;
  }

  /** Takes over what the device knows: the endpoint (wg) or the path (mesh). Null: the peer is gone. */
  follow(slot: number, peer: Peer | null): void {
    if (this.#mode === "wg") this.setUdp(slot, peer?.endpoint ?? null);
    else if (this.#mode === "mesh") {
      const relay = peer?.path.relay ? 1 : 0;
      const changed = relay !== this.relay[slot];
      this.relay[slot] = relay;
      this.setUdp(slot, peer?.path.udp ?? null);
      if (changed) this.onChange(slot);
    }
  }

  /** The same address again costs a comparison. */
  setUdp(slot: number, address: AddrPort | null): void {
    if (this.#text[slot] === address) return;
    const parsed = address === null ? null : parseAddrPort(address);
    this.#text[slot] = address;
    this.noGso[slot] = 0;
    this.controlLength[slot] = 0;
    this.nameLength[slot] = parsed ? writeSockaddr(this.#asm.view, this.name(slot), parsed.ip, parsed.port) : 0;
    this.onChange(slot);
  }

  /** Whether the sockaddr at `name` is this peer's. */
  isFrom(slot: number, name: number, nameLength: number): boolean {
    if (this.nameLength[slot] !== nameLength) return false;
    const { u32 } = this.#asm;
    const a = this.name(slot) >> 2;
    const b = name >> 2;
    // family and port, then the address: of IPv6 it begins at 8
    if (u32[a] !== u32[b]) return false;
    if (nameLength === 16) return u32[a + 1] === u32[b + 1];
    for (let i = 2; i < 6; i++) if (u32[a + i] !== u32[b + i]) return false;
    return true;
  }

  /** Answers go out from the local address to which the peer last wrote. */
  setSource(slot: number, control: Control): void {
    const { view } = this.#asm;
    if (control.local4 !== 0 && this.nameLength[slot] === 16) {
      const known = this.controlLength[slot] !== 0 && view.getUint32(this.control(slot) + 20, true) === control.local4;
      if (known) return;
      this.controlLength[slot] = CMSG_SPACE_PKTINFO4;
      writePktinfo4Cmsg(view, this.control(slot), 0, control.local4);
      this.onChange(slot);
    } else if (control.local6At !== 0 && this.nameLength[slot] === 28) {
      const ifindex = isLinkLocal(view, control.local6At) ? control.ifindex : 0;
      if (this.controlLength[slot] !== 0 && this.#isSource6(slot, control.local6At, ifindex)) return;
      this.controlLength[slot] = CMSG_SPACE_PKTINFO6;
      writePktinfo6Cmsg(view, this.control(slot), ifindex, control.local6At);
      this.onChange(slot);
    }
  }

  #isSource6(slot: number, address: number, ifindex: number): boolean {
    const { view } = this.#asm;
    const known = this.control(slot) + CMSGHDR_SIZE;
    for (let i = 0; i < 16; i += 4)
      if (view.getUint32(known + i, true) !== view.getUint32(address + i, true)) return false;
    return view.getUint32(known + 16, true) === ifindex;
  }

  clearSource(slot: number): void {
    if (this.controlLength[slot] === 0) return;
    this.controlLength[slot] = 0;
    this.onChange(slot);
  }

  /** The peer is gone. */
  clear(slot: number): void {
    this.relay[slot] = 0;
    this.setUdp(slot, null);
    this.onChange(slot);
  }
}

function isLinkLocal(view: DataView, at: number): boolean {
  return (view.getUint16(at) & 0xffc0) === 0xfe80;
}
