// Datagrams on their way out of one UDP socket: an array of mmsghdr in wasm memory that fills up and goes out in one call.
//
// A message is one datagram, or several of one size (the last maybe shorter) that the kernel cuts by UDP_SEGMENT. When the
// kernel refuses a message the rest still goes out; what it refuses because of segmentation is sent again one by one.
import { EPOLLOUT, epollAdd, epollCreate, epollWait } from "../../ffi/epoll.ts";
import { EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE } from "../../ffi/errno.ts";
import { closeFd } from "../../ffi/libc.ts";
import {
  CMSG_SPACE_SEGMENT,
  CONTROL_ROOM,
  IOVEC_SIZE,
  MMSGHDR_SIZE,
  SOCKADDR_ROOM,
  writeIovec,
  writeMsghdr,
  writeSegmentCmsg,
  writeTosCmsg,
} from "../../ffi/msg.ts";
import { sendmmsg, UDP_MAX_GSO_BYTES, UDP_MAX_SEGMENTS } from "../../ffi/udp.ts";
import type { Asm } from "../crypto/wasm.ts";
import type { PeerPaths } from "./peer-paths.ts";

const MESSAGES = 128;
/** How long a full socket buffer may hold up the loop before the batch is dropped. */
const WAIT_MS = 20;

export class Outbox {
  /** UDP_SEGMENT may be used. */
  gso: boolean;
  sentPackets = 0;
  /** Datagrams that the kernel did not take. */
  failed = 0;
  #fd: number;
  readonly #asm: Asm;
  readonly #base: number;
  readonly #paths: PeerPaths;
  readonly #messages: number;
  readonly #iovecs: number;
  readonly #controls: number;
  readonly #names: number;
  readonly #single: number;
  #count = 0;
  readonly #start = new Int32Array(MESSAGES);
  readonly #bytes = new Int32Array(MESSAGES);
  readonly #segment = new Int32Array(MESSAGES);
  readonly #slot = new Int32Array(MESSAGES);
  /** Bytes of the source address's control message. */
  readonly #source = new Int32Array(MESSAGES);
  readonly #name = new Int32Array(MESSAGES);
  readonly #nameLength = new Int32Array(MESSAGES);
  #waiter = -1;
  #waiterEvent: number;

  /** `base`: address of the memory in the process. `fd` -1: this family is not there. */
  constructor(asm: Asm, base: number, fd: number, gso: boolean, paths: PeerPaths) {
    this.#asm = asm;
    this.#base = base;
    this.#fd = fd;
    this.gso = gso;
    this.#paths = paths;
    this.#messages = asm.alloc((MESSAGES + 1) * MMSGHDR_SIZE);
    this.#single = this.#messages + MESSAGES * MMSGHDR_SIZE;
    this.#iovecs = asm.alloc((MESSAGES + 1) * IOVEC_SIZE);
    this.#controls = asm.alloc((MESSAGES + 1) * CONTROL_ROOM);
    this.#names = asm.alloc(MESSAGES * SOCKADDR_ROOM);
    this.#waiterEvent = asm.alloc(16);
  }

  /** Another socket takes over (the port has changed). */
  replace(fd: number, gso: boolean): void {
    this.#count = 0;
    this.#fd = fd;
    this.gso = gso;
    this.close();
  }

  close(): void {
    if (this.#waiter >= 0) closeFd(this.#waiter);
    this.#waiter = -1;
  }

  /**
   * Adds `count` datagrams that lie one behind the other at `start`, each `stride` bytes but the last, which has `last`.
   * The bytes must stay until `flush`. They go to the peer's address; `ecn` is the ECN field of their IP headers.
   */
  add(slot: number, start: number, count: number, stride: number, last: number, ecn = 0): void {
    const gso = this.gso && this.#paths.noGso[slot] === 0;
    const most = gso ? Math.max(1, Math.min(UDP_MAX_SEGMENTS, Math.floor(UDP_MAX_GSO_BYTES / stride))) : 1;
    for (let first = 0; first < count; first += most) {
      const n = Math.min(most, count - first);
      const bytes = first + n === count ? (n - 1) * stride + last : n * stride;
      this.#push(
        slot,
        this.#paths.name(slot),
        this.#paths.nameLength[slot]!,
        start + first * stride,
        bytes,
        n > 1 ? stride : 0,
        ecn,
      );
    }
  }

  /** Adds one datagram to an address that is not a peer's: the sockaddr at `name` is copied. `slot` -1: no sticky source. */
  addTo(slot: number, name: number, nameLength: number, start: number, bytes: number): void {
    if (this.#count === MESSAGES) this.flush();
    const copy = this.#names + this.#count * SOCKADDR_ROOM;
    this.#asm.u8.copyWithin(copy, name, name + nameLength);
    this.#push(slot, copy, nameLength, start, bytes, 0, 0);
  }

  #push(
    slot: number,
    name: number,
    nameLength: number,
    start: number,
    bytes: number,
    segment: number,
    ecn: number,
  ): void {
    if (this.#count === MESSAGES) this.flush();
    const i = this.#count++;
    this.#start[i] = start;
    this.#bytes[i] = bytes;
    this.#segment[i] = segment;
    this.#slot[i] = slot;
    this.#name[i] = name;
    this.#nameLength[i] = nameLength;
    const { view } = this.#asm;
    const control = this.#controls + i * CONTROL_ROOM;
    let controlLength = slot < 0 ? 0 : this.#paths.controlLength[slot]!;
    this.#source[i] = controlLength;
    if (controlLength > 0) {
      const from = this.#paths.control(slot);
      this.#asm.u8.copyWithin(control, from, from + controlLength);
    }
    if (segment > 0) {
      writeSegmentCmsg(view, control + controlLength, segment);
      controlLength += CMSG_SPACE_SEGMENT;
    }
    if (ecn !== 0) controlLength += writeTosCmsg(view, control + controlLength, nameLength === 16 ? 4 : 6, ecn);
    this.#header(
      this.#messages + i * MMSGHDR_SIZE,
      this.#iovecs + i * IOVEC_SIZE,
      name,
      nameLength,
      start,
      bytes,
      control,
      controlLength,
    );
  }

  #header(
    at: number,
    iovec: number,
    name: number,
    nameLength: number,
    start: number,
    bytes: number,
    control: number,
    controlLength: number,
  ): void {
    const { view } = this.#asm;
    const base = this.#base;
    writeIovec(view, iovec, base + start, bytes);
    writeMsghdr(
      view,
      at,
      base + name,
      nameLength,
      base + iovec,
      1,
      controlLength > 0 ? base + control : 0,
      controlLength,
    );
  }

  /** Sends what was added. */
  flush(): void {
    const count = this.#count;
    this.#count = 0;
    if (this.#fd < 0) {
      this.failed += count;
      return;
    }
    let i = 0;
    let waited = 0;
    while (i < count) {
      const result = sendmmsg(this.#fd, this.#base + this.#messages + i * MMSGHDR_SIZE, count - i);
      if (result > 0) {
        for (let k = i; k < i + result; k++) this.sentPackets += this.#packets(k);
        i += result;
      } else if (result === -EAGAIN && waited < WAIT_MS) {
        waited += this.#waitWritable();
      } else if (result === -EAGAIN) {
        for (; i < count; i++) this.failed += this.#packets(i);
      } else if (result !== -EINTR) {
        this.#refused(i, -result);
        i++;
      }
    }
  }

  #packets(i: number): number {
    const segment = this.#segment[i]!;
    return segment === 0 ? 1 : Math.ceil(this.#bytes[i]! / segment);
  }

  #waitWritable(): number {
    if (this.#waiter < 0) {
      this.#waiter = epollCreate();
      epollAdd(this.#waiter, this.#fd, EPOLLOUT, 0);
    }
    return epollWait(this.#waiter, this.#base + this.#waiterEvent, 1, 5) === 0 ? 5 : 1;
  }

  /** The kernel did not take message `i`: again without what it may have disliked, else it is lost. */
  #refused(i: number, code: number): void {
    const slot = this.#slot[i]!;
    const segment = this.#segment[i]!;
    let reason = code;
    if (this.#source[i]! > 0) {
      // The local address may have gone: forget it, whatever the reason given.
      this.#paths.clearSource(slot);
      const result = this.#sendPart(i, this.#start[i]!, this.#bytes[i]!, segment);
      if (result > 0) {
        this.sentPackets += this.#packets(i);
        return;
      }
      reason = -result;
    }
    if (segment === 0 || (reason !== EINVAL && reason !== EIO && reason !== EMSGSIZE)) {
      this.failed += this.#packets(i);
      return;
    }
    // Too long for this peer's link, or not possible on this socket (a device without checksum offload).
    if (reason === EMSGSIZE && slot >= 0) this.#paths.noGso[slot] = 1;
    else this.gso = false;
    const end = this.#start[i]! + this.#bytes[i]!;
    for (let start = this.#start[i]!; start < end; start += segment) {
      if (this.#sendPart(i, start, Math.min(segment, end - start), 0) > 0) this.sentPackets++;
      else this.failed++;
    }
  }

  /** Sends `bytes` at `start` to where message `i` goes, without source address. 1, or minus errno. */
  #sendPart(i: number, start: number, bytes: number, segment: number): number {
    const { view } = this.#asm;
    const control = this.#controls + MESSAGES * CONTROL_ROOM;
    const controlLength = segment > 0 ? writeSegmentCmsg(view, control, segment) : 0;
    const iovec = this.#iovecs + MESSAGES * IOVEC_SIZE;
    this.#header(this.#single, iovec, this.#name[i]!, this.#nameLength[i]!, start, bytes, control, controlLength);
    return sendmmsg(this.#fd, this.#base + this.#single, 1);
  }
}
