// ICMP echo: own measurement of round trips.
//
//   echo, both versions, 8 bytes: type u8 0, code u8 1, checksum u16 2, identifier u16 4, sequence u16 6; then data.
//   Types: IPv4 8 asks, 0 answers; IPv6 128 and 129.
//
// Uses the kernel's ping socket (SOCK_DGRAM, IPPROTO_ICMP or IPPROTO_ICMPV6) where net.ipv4.ping_group_range allows it, else
// a raw one (CAP_NET_RAW). A ping socket sets identifier and checksum itself and delivers only its own answers; a raw IPv4
// socket delivers every ICMP packet with its IP header, and wants the checksum; a raw IPv6 one computes it.
import { type IP, parseIP } from "../src/wire/ip.ts";
import {
  AF_INET,
  AF_INET6,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  MSG_DONTWAIT,
  SOCK_CLOEXEC,
  SOCK_DGRAM,
  SOCK_NONBLOCK,
  SOCK_RAW,
} from "./constants.ts";
import { EINTR, EINVAL } from "./errno.ts";
import { buffer, check, closeFd, libc, orErrno, SysError } from "./libc.ts";
import { SOCKADDR_ROOM, writeSockaddr } from "./msg.ts";

const HEADER_SIZE = 8;
const POLLIN = 1;
const RECEIVE_BYTES = 65536;

/** Internet checksum (RFC 1071) of `bytes`, as the big-endian field value. */
export function internetChecksum(bytes: Uint8Array): number {
  let sum = 0;
  for (let i = 0; i < bytes.length; i += 2) sum += (bytes[i]! << 8) | (bytes[i + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

/** An echo request; the checksum is that of IPv4 (the kernel fills in IPv6's). */
export function echoRequest(family: 4 | 6, identifier: number, sequence: number, data: Uint8Array): Uint8Array {
  const packet = buffer(HEADER_SIZE + data.length);
  const view = new DataView(packet.buffer);
  packet[0] = family === 4 ? 8 : 128;
  view.setUint16(4, identifier, false);
  view.setUint16(6, sequence, false);
  packet.set(data, HEADER_SIZE);
  if (family === 4) view.setUint16(2, internetChecksum(packet), false);
  return packet;
}

/** Identifier and sequence of an echo reply; null when `packet` (without IP header) is not one. */
export function parseEchoReply(family: 4 | 6, packet: Uint8Array): { identifier: number; sequence: number } | null {
  if (packet.length < HEADER_SIZE || packet[0] !== (family === 4 ? 0 : 129) || packet[1] !== 0) return null;
  return { identifier: (packet[4]! << 8) | packet[5]!, sequence: (packet[6]! << 8) | packet[7]! };
}

/** The ICMP part of an IPv4 packet; null when the header does not fit. */
export function stripIpHeader(packet: Uint8Array): Uint8Array | null {
  const length = (packet[0]! & 15) * 4;
  return packet.length > 20 && packet[0]! >> 4 === 4 && length >= 20 && length <= packet.length
    ? packet.subarray(length)
    : null;
}

export class Pinger implements Disposable {
  readonly #fd: number;
  readonly #family: 4 | 6;
  readonly #raw: boolean;
  readonly #identifier: number;
  readonly #to = buffer(SOCKADDR_ROOM);
  readonly #toLength: number;
  readonly #receive = buffer(RECEIVE_BYTES);
  readonly #from = buffer(SOCKADDR_ROOM);
  readonly #target: IP;

  /**
   * A socket for one target, an IP address as text. `identifier` tells this pinger's answers from others' on a raw socket.
   * Throws SysError.
   */
  constructor(target: string, identifier: number, options: { raw?: boolean } = {}) {
    const ip = parseIP(target);
    if (!ip) throw new SysError(EINVAL, "ping", `${JSON.stringify(target)} is not an IP address`);
    this.#target = ip;
    this.#family = ip.length === 4 ? 4 : 6;
    this.#identifier = identifier & 0xffff;
    const { fd, raw } = openSocket(this.#family, options.raw ?? false);
    this.#fd = fd;
    this.#raw = raw;
    this.#toLength = writeSockaddr(new DataView(this.#to.buffer), 0, ip, 0);
  }

  /** Sends one echo request. 0, or minus errno. */
  send(sequence: number, data: Uint8Array): number {
    const packet = echoRequest(this.#family, this.#identifier, sequence, data);
    const sent = orErrno(libc.sendto(this.#fd, packet, packet.length, MSG_DONTWAIT, this.#to, this.#toLength));
    return Math.min(sent, 0);
  }

  /** Waits for at most `timeoutMs` (blocking the thread) and returns the sequence of the next answer, or null. */
  receive(timeoutMs: number): number | null {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const left = deadline - performance.now();
      const ready = orErrno(libc.poll(new Int32Array([this.#fd, POLLIN]), 1, Math.max(0, Math.ceil(left))));
      if (ready < 0 && ready !== -EINTR) throw new SysError(-ready, "wait for an echo reply");
      if (ready === 0) return null;
      const sequence = this.#read();
      if (sequence !== null) return sequence;
      if (performance.now() >= deadline) return null;
    }
  }

  #read(): number | null {
    const room = new Uint32Array([SOCKADDR_ROOM]);
    const length = orErrno(libc.recvfrom(this.#fd, this.#receive, RECEIVE_BYTES, MSG_DONTWAIT, this.#from, room));
    // ICMP errors come back as errno of the socket: this request is lost, the next may not be.
    if (length <= 0) return null;
    const from = this.#from.subarray(this.#family === 4 ? 4 : 8, this.#family === 4 ? 8 : 24);
    if (this.#target.some((byte, i) => byte !== from[i])) return null;
    const packet = this.#receive.subarray(0, length);
    const icmp = this.#raw && this.#family === 4 ? stripIpHeader(packet) : packet;
    const reply = icmp && parseEchoReply(this.#family, icmp);
    if (!reply || (this.#raw && reply.identifier !== this.#identifier)) return null;
    return reply.sequence;
  }

  close(): void {
    closeFd(this.#fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

function openSocket(family: 4 | 6, forceRaw: boolean): { fd: number; raw: boolean } {
  const af = family === 4 ? AF_INET : AF_INET6;
  const protocol = family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
  const flags = SOCK_NONBLOCK | SOCK_CLOEXEC;
  if (!forceRaw) {
    const fd = libc.socket(af, SOCK_DGRAM | flags, protocol);
    if (fd !== -1) return { fd, raw: false };
  }
  return { fd: check(libc.socket(af, SOCK_RAW | flags, protocol), "open an ICMP socket"), raw: true };
}
