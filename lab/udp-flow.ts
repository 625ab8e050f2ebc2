// A flow of numbered datagrams from one host to another, as programs with segmentation offload send and receive them
// (QUIC does): UDP_SEGMENT on one side, UDP_GRO on the other. child.ts runs both ends.
//
//   datagram   u32 number 0 (little endian), then bytes of a fixed generator, which depend on the number and are compared
//   end        u32 0xffffffff, u32 how many more of these come; sent a few times when all datagrams have left
//   back       u32 the highest number that has arrived, every ACK_BYTES
import { EPOLL_EVENT_SIZE, EPOLLIN, EPOLLOUT, epollAdd, epollCreate, epollWait } from "../ffi/epoll.ts";
import { EAGAIN, EINTR, SysError } from "../ffi/errno.ts";
import { addressOf, buffer, closeFd } from "../ffi/libc.ts";
import {
  CONTROL_ROOM,
  emptyControl,
  IOVEC_SIZE,
  MMSGHDR_LEN,
  MMSGHDR_SIZE,
  MSGHDR_CONTROLLEN,
  MSGHDR_NAMELEN,
  parseControl,
  SOCKADDR_ROOM,
  writeIovec,
  writeMsghdr,
  writeSegmentCmsg,
  writeSockaddr,
  writeTosCmsg,
} from "../ffi/msg.ts";
import { openUdp, recvfrom, recvmmsg, sendmmsg, sendto, UDP_MAX_GSO_BYTES, UDP_MAX_SEGMENTS } from "../ffi/udp.ts";
import { parseIP } from "../src/wire/ip.ts";
import { seededBytes } from "./seeded.ts";

const END = 0xffffffff;
const END_TIMES = 5;
const END_EVERY_MS = 10;
/** Messages of one call. */
const MESSAGES = 16;
const MESSAGE_BYTES = 65536;
/**
 * What is under way at most when the receiver sets the pace: more than both directions of a tunnel need, and as single
 * datagrams fewer than the queue of a TUN device holds.
 */
const WINDOW_BYTES = 512 << 10;
const ACK_BYTES = 64 << 10;
/** What was not confirmed after so long is lost. */
const LOST_MS = 50;
/** What a sender that was held up makes good at once. */
const BURST_BYTES = 256 << 10;
/** For so long nothing comes: the end is lost, or the last of a few. */
const SILENCE_MS = 5000;
const END_SILENCE_MS = 100;

export interface UdpFlowOptions {
  /** Bytes of a datagram, at least 8. */
  size: number;
  /** 0: as fast as they arrive. */
  mbps: number;
  /** How many to send, or for how long. */
  amount: { packets: number } | { seconds: number };
  /** Datagrams in one send, cut by the kernel. 1 (default): none. */
  segments?: number;
  /** ToS byte or traffic class. */
  tos?: number;
}

export interface UdpFlowSent {
  sent: number;
  seconds: number;
}

export interface UdpFlowReceived {
  received: number;
  /** Of datagrams. */
  bytes: number;
  /** From the first to the last. */
  seconds: number;
  /** Came after one with a higher number, or for the second time. */
  late: number;
  /** Another length or other bytes than were sent. */
  wrong: number;
  /** Came from the kernel together with others. */
  merged: number;
  /** Datagrams by ToS byte or traffic class. */
  tos: Record<string, number>;
}

// Datagram `n` holds the bytes from `n & 255` on: of xorshift32, so that none looks like another.
const pattern = seededBytes(MESSAGE_BYTES + 256);

/** An array of message headers, each with a buffer, a control message area and a name. */
function messages(count: number) {
  const room = MMSGHDR_SIZE + IOVEC_SIZE + CONTROL_ROOM + SOCKADDR_ROOM;
  const memory = buffer(count * (room + MESSAGE_BYTES));
  const base = addressOf(memory);
  const iovecs = count * MMSGHDR_SIZE;
  const controls = iovecs + count * IOVEC_SIZE;
  const names = controls + count * CONTROL_ROOM;
  const data = names + count * SOCKADDR_ROOM;
  const view = new DataView(memory.buffer);
  return {
    base,
    view,
    bytes: Buffer.from(memory.buffer),
    dataAt: (i: number) => data + i * MESSAGE_BYTES,
    controlAt: (i: number) => controls + i * CONTROL_ROOM,
    nameAt: (i: number) => names + i * SOCKADDR_ROOM,
    write(i: number, length: number, nameLength: number, controlLength: number) {
      writeIovec(view, iovecs + i * IOVEC_SIZE, base + this.dataAt(i), length);
      writeMsghdr(
        view,
        i * MMSGHDR_SIZE,
        base + this.nameAt(i),
        nameLength,
        base + iovecs + i * IOVEC_SIZE,
        1,
        controlLength === 0 ? 0 : base + this.controlAt(i),
        controlLength,
      );
    },
  };
}

/** Waits until the descriptor is ready, for at most `ms`. */
function waiter(fd: number, events: number) {
  const epoll = epollCreate();
  epollAdd(epoll, fd, events, 0);
  const room = buffer(EPOLL_EVENT_SIZE);
  return {
    wait: (ms: number): boolean => epollWait(epoll, room, 1, ms) > 0,
    [Symbol.dispose]: () => closeFd(epoll),
  };
}

/** Sends a flow. Throws SysError when the kernel refuses a datagram (EMSGSIZE). */
export async function sendUdpFlow(address: string, port: number, options: UdpFlowOptions): Promise<UdpFlowSent> {
  const { size, mbps, amount, tos = 0 } = options;
  const ip = parseIP(address);
  if (!ip) throw new Error(`${JSON.stringify(address)} is not an IP address`);
  const family = ip.length === 4 ? 4 : 6;
  const segments = Math.min(options.segments ?? 1, UDP_MAX_SEGMENTS, Math.floor(UDP_MAX_GSO_BYTES / size));
  const { fd } = openUdp({ family, gro: false });
  using writable = waiter(fd, EPOLLOUT);
  using readable = waiter(fd, EPOLLIN);
  const ack = buffer(4);
  const out = messages(MESSAGES);
  let nameLength = 0;
  for (let i = 0; i < MESSAGES; i++) nameLength = writeSockaddr(out.view, out.nameAt(i), ip, port);
  const prepare = (i: number, count: number) => {
    let control = 0;
    if (count > 1) control += writeSegmentCmsg(out.view, out.controlAt(i), size);
    if (tos !== 0) control += writeTosCmsg(out.view, out.controlAt(i) + control, family, tos);
    out.write(i, count * size, nameLength, control);
  };
  const send = (count: number) => {
    for (let done = 0; done < count; ) {
      const result = sendmmsg(fd, out.base + done * MMSGHDR_SIZE, count - done);
      if (result > 0) done += result;
      else if (result === -EAGAIN) writable.wait(10);
      else if (result !== -EINTR) throw new SysError(-result, `send ${size} bytes to ${address}`);
    }
  };
  try {
    const start = performance.now();
    const elapsed = () => performance.now() - start;
    const total = "packets" in amount ? amount.packets : Number.POSITIVE_INFINITY;
    const end = "seconds" in amount ? amount.seconds * 1000 : Number.POSITIVE_INFINITY;
    let sent = 0;
    let confirmed = 0;
    const confirm = () => {
      while (recvfrom(fd, ack)) confirmed = Math.max(confirmed, new DataView(ack.buffer).getUint32(0, true) + 1);
    };
    for (let now = 0; sent < total && now < end; now = elapsed()) {
      confirm();
      const burst = sent + Math.ceil(BURST_BYTES / size);
      const due =
        mbps === 0
          ? confirmed + Math.floor(WINDOW_BYTES / size)
          : Math.min(burst, Math.ceil((mbps * 125 * now) / size));
      const until = Math.min(due, total);
      while (sent < until) {
        let used = 0;
        for (; used < MESSAGES && sent < until; used++) {
          const count = Math.min(segments, until - sent);
          for (let k = 0; k < count; k++, sent++) {
            const at = out.dataAt(used) + k * size;
            pattern.copy(out.bytes, at, sent & 255, (sent & 255) + size);
            out.view.setUint32(at, sent, true);
          }
          prepare(used, count);
        }
        send(used);
      }
      if (mbps !== 0) await Bun.sleep(1);
      else if (!readable.wait(LOST_MS)) confirmed = sent;
    }
    const seconds = elapsed() / 1000;
    for (let left = END_TIMES - 1; left >= 0; left--) {
      await Bun.sleep(END_EVERY_MS);
      out.view.setUint32(out.dataAt(0), END, true);
      out.view.setUint32(out.dataAt(0) + 4, left, true);
      prepare(0, 1);
      send(1);
    }
    return { sent, seconds };
  } finally {
    closeFd(fd);
  }
}

/** Receives one flow on a free port of `address`, which `listening` is told. */
export function receiveUdpFlow(address: string, listening: (port: number) => void): UdpFlowReceived {
  const { fd, port } = openUdp({ family: address.includes(":") ? 6 : 4, address, tos: true });
  const into = messages(MESSAGES);
  using readable = waiter(fd, EPOLLIN);
  listening(port);
  const result: UdpFlowReceived = { received: 0, bytes: 0, seconds: 0, late: 0, wrong: 0, merged: 0, tos: {} };
  const control = emptyControl();
  let next = 0;
  let first = 0;
  let confirmed = 0;
  const ack = Buffer.alloc(4);
  let size = 0;
  let silence = -1;
  const take = (at: number, length: number): void => {
    const number = length < 8 ? -1 : into.view.getUint32(at, true);
    if (number === END) {
      silence = into.view.getUint32(at + 4, true) === 0 ? 0 : END_SILENCE_MS;
      return;
    }
    silence = SILENCE_MS;
    size ||= length;
    const from = (number & 255) + 4;
    if (length !== size || into.bytes.compare(pattern, from, from + length - 4, at + 4, at + length) !== 0)
      result.wrong++;
    if (number < next) result.late++;
    else next = number + 1;
    result.received++;
    result.bytes += length;
    result.tos[control.tos] = (result.tos[control.tos] ?? 0) + 1;
  };
  try {
    while (silence !== 0) {
      for (let i = 0; i < MESSAGES; i++) into.write(i, MESSAGE_BYTES, SOCKADDR_ROOM, CONTROL_ROOM);
      const n = recvmmsg(fd, into.base, MESSAGES);
      if (n <= 0) {
        if (!readable.wait(silence)) break;
        continue;
      }
      const now = performance.now();
      for (let i = 0; i < n; i++) {
        const header = i * MMSGHDR_SIZE;
        const length = into.view.getUint32(header + MMSGHDR_LEN, true);
        parseControl(into.view, into.controlAt(i), into.view.getUint32(header + MSGHDR_CONTROLLEN, true), control);
        const segment = control.segmentSize || length;
        if (length > segment) result.merged += Math.ceil(length / segment);
        for (let from = 0; from < length; from += segment)
          take(into.dataAt(i) + from, Math.min(segment, length - from));
      }
      first ||= now;
      if (silence === SILENCE_MS) result.seconds = (now - first) / 1000;
      if (result.bytes - confirmed < ACK_BYTES) continue;
      confirmed = result.bytes;
      ack.writeUInt32LE(next - 1);
      const name = into.nameAt(0);
      sendto(fd, into.bytes.subarray(name, name + into.view.getUint32(MSGHDR_NAMELEN, true)), ack);
    }
    return result;
  } finally {
    closeFd(fd);
  }
}
