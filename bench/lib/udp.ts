// UDP through a tunnel as fast as it arrives (lab/udp-flow.ts): what programs like QUIC's do, with segmentation offload or without.
import { udpFlow } from "../../lab/measure.ts";
import type { Host } from "../../lab/network.ts";
import { cpuSeconds } from "./cpu.ts";

/** Datagrams of one superpacket: as many as 64 KB hold. */
export const MOST_SEGMENTS = 64;
/** IPv4 and UDP. */
const HEADERS = 28;

export interface UdpLoadResult {
  /** Payload that the receiver got, megabits per second. */
  mbps: number;
  megabits: number;
  /** CPU seconds of `pids`. */
  cpu: number;
  /** Percent. */
  lost: number;
}

/** Datagrams that fill the MTU. */
export async function udpLoad(options: {
  from: Host;
  to: Host;
  /** IPv4. */
  address: string;
  mtu: number;
  seconds: number;
  segments: number;
  pids: readonly number[];
}): Promise<UdpLoadResult> {
  const { from, to, address, mtu, seconds, segments, pids } = options;
  const cpu = cpuSeconds(pids);
  const amount = { seconds };
  const { sent, got } = await udpFlow(from, to, { address, size: mtu - HEADERS, mbps: 0, segments, amount });
  const megabits = (got.bytes * 8) / 1e6;
  return {
    mbps: megabits / Math.max(got.seconds, Number.MIN_VALUE),
    megabits,
    cpu: cpuSeconds(pids) - cpu,
    lost: (100 * (sent - got.received)) / sent,
  };
}
