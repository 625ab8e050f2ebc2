// Reads packets and superpackets from the TUN into wasm memory, one after the other, for the transmitter.
import { EBADFD, EINTR } from "../../ffi/errno.ts";
import { TUN_READ_SIZE, tunRead, VNET_HEADER_SIZE } from "../../ffi/tun.ts";
import type { Asm } from "../crypto/wasm.ts";
import { DeviceGone } from "./receive.ts";
import type { Transmitter } from "./transmit.ts";

/** After so long the caller's other descriptors get their turn. */
const TURN_MS = 2;
/** The time is looked up after so many bytes; each packet counts as COST bytes more. */
const STRIDE = 64 << 10;
const COST = 2048;

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

  /** Takes what is there, for about TURN_MS from `now` on. Throws DeviceGone when the TUN has vanished. */
  read(tx: Transmitter, now: number): void {
    const vnet = this.#vnet;
    const p = this.#buffer;
    let time = now;
    for (let cost = 0; ; ) {
      const n = tunRead(this.#fd, this.#base + p - vnet, TUN_READ_SIZE);
      if (n <= vnet) {
        if (n === -EBADFD) throw new DeviceGone();
        if (n === -EINTR || n >= 0) continue;
        tx.queue.empty();
        return;
      }
      tx.packet(p, n - vnet, vnet === 0 ? 0 : p - vnet, time);
      cost += n + COST;
      if (cost < STRIDE) continue;
      cost = 0;
      time = performance.now();
      if (time < now + TURN_MS) continue;
      tx.queue.stands(time);
      return;
    }
  }
}
