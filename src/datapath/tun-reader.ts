// Reads packets and superpackets from the TUN into wasm memory, one after the other, for the transmitter.
import { EAGAIN, EBADFD } from "../../ffi/errno.ts";
import { TUN_READ_SIZE, tunRead, VNET_HEADER_SIZE } from "../../ffi/tun.ts";
import type { Asm } from "../crypto/wasm.ts";
import { DeviceGone } from "./receive.ts";
import type { Transmitter } from "./transmit.ts";

const READS = 128;

export class TunReader {
  readonly #base: number;
  readonly #fd: number;
  readonly #vnet: number;
  readonly #buffer: number;

  /** `base`: address of the memory in the process. */
  constructor(asm: Asm, base: number, tun: { fd: number; vnetHeader: boolean }) {
    this.#base = base;
    this.#fd = tun.fd;
    this.#vnet = tun.vnetHeader ? VNET_HEADER_SIZE : 0;
    // The packet itself is aligned to 16, its vnet header lies right before it.
    this.#buffer = asm.alloc(TUN_READ_SIZE + 64) + 16;
  }

  /** Takes what is there, within bounds. Throws DeviceGone when the TUN has vanished. */
  read(tx: Transmitter, now: number): void {
    const vnet = this.#vnet;
    const p = this.#buffer;
    for (let i = 0; i < READS; i++) {
      const n = tunRead(this.#fd, this.#base + p - vnet, TUN_READ_SIZE);
      if (n <= vnet) {
        if (n === -EBADFD) throw new DeviceGone();
        if (n === -EAGAIN || n < 0) return;
        continue;
      }
      tx.packet(p, n - vnet, vnet === 0 ? 0 : p - vnet, now);
    }
  }
}
