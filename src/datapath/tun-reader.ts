// Reads packets and superpackets from the TUN into wasm memory. The kernel's ring is emptied first, and then flows take turns:
// a ping or a call does not wait behind the superpackets of a download.
import { EBADFD, EINTR } from "../../ffi/errno.ts";
import { TUN_READ_SIZE, tunRead, VNET_HEADER_SIZE } from "../../ffi/tun.ts";
import type { Asm } from "../crypto/wasm.ts";
import { ASM_DROPS } from "./asm.ts";
import { FairQueue } from "./fair-queue.ts";
import { BufferPool, SMALL_BYTES } from "./pool.ts";
import { DeviceGone } from "./receive.ts";
import type { Transmitter } from "./transmit.ts";

/** Superpackets, and packets, that wait at most. */
const LARGE = 32;
const SMALL = 512;
/** What `txFlow` returns is below. */
const FLOWS = 1024;
/** After so long the caller's other descriptors get their turn. */
const TURN_MS = 0.5;
/** The ring and the time are looked at after so many bytes; each packet counts as COST bytes more. */
const STRIDE = 128 << 10;
const COST = 2048;

export class TunReader {
  readonly #asm: Asm;
  readonly #base: number;
  readonly #fd: number;
  readonly #vnet: number;
  /** The counter of dropped packets. */
  readonly #drops: number;
  readonly #pool: BufferPool;
  readonly #queue = new FairQueue(FLOWS, LARGE + SMALL);
  readonly #length = new Int32Array(LARGE + SMALL);

  /** `base`: address of the memory in the process. */
  constructor(asm: Asm, base: number, tun: { fd: number; vnetHeader: boolean }) {
    this.#asm = asm;
    this.#base = base;
    this.#fd = tun.fd;
    this.#vnet = tun.vnetHeader ? VNET_HEADER_SIZE : 0;
    this.#drops = (asm.exports.dropCounters() >> 2) + ASM_DROPS.indexOf("tun-queue");
    // The vnet header lies right before the packet.
    this.#pool = new BufferPool(asm, LARGE, TUN_READ_SIZE, SMALL);
  }

  /** Packets wait here: `read` must be called again soon. */
  get backlog(): boolean {
    return !this.#queue.empty;
  }

  /** Takes what is there, for about TURN_MS from `now` on. Throws DeviceGone when the TUN has vanished. */
  read(tx: Transmitter, now: number): void {
    for (let time = now; time < now + TURN_MS; time = performance.now()) {
      this.#fill();
      for (let cost = 0; cost < STRIDE; ) {
        const buffer = this.#queue.shift();
        if (buffer < 0) return;
        const p = this.#pool.at(buffer);
        const length = this.#length[buffer]!;
        tx.packet(p, length, this.#vnet === 0 ? 0 : p - this.#vnet, time);
        this.#pool.release(buffer);
        cost += length + COST;
      }
    }
  }

  /** Empties the ring, as far as there is room. */
  #fill(): void {
    const pool = this.#pool;
    const vnet = this.#vnet;
    for (let i = 0; i < LARGE + SMALL && this.#room(); i++) {
      let buffer = pool.takeLarge();
      const p = pool.at(buffer);
      const length = tunRead(this.#fd, this.#base + p - vnet, TUN_READ_SIZE) - vnet;
      if (length <= 0) {
        pool.release(buffer);
        const error = -length - vnet;
        if (error === EBADFD) throw new DeviceGone();
        if (error === EINTR || error <= 0) continue;
        return;
      }
      const flow = this.#asm.exports.txFlow(p, length);
      if (length <= SMALL_BYTES) {
        const large = buffer;
        buffer = pool.shrink(large, length);
        pool.release(large);
      }
      this.#length[buffer] = length;
      this.#queue.push(flow, buffer, length + COST);
    }
  }

  /**
   * Whether there is a buffer for whatever comes. One flow alone may wait in the ring; where several have something
   * waiting, the one that holds most loses its oldest: in the ring all would wait behind it.
   */
  #room(): boolean {
    const pool = this.#pool;
    while (!pool.hasLarge || !pool.hasSmall) {
      if (this.#queue.active < 2) return false;
      const oldest = this.#queue.dropFromLongest();
      if (oldest < 0) return false;
      pool.release(oldest);
      this.#asm.u32[this.#drops]!++;
    }
    return true;
  }
}
