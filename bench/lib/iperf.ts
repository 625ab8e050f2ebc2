// Whole-tunnel load by iperf3, with the CPU time that others spent meanwhile.
import type { Host } from "../../lab/network.ts";
import { cpuSeconds, machineSeconds } from "./cpu.ts";

const PORT = 5201;
const SLACK_MS = 20_000;

export interface LoadOptions {
  from: Host;
  to: Host;
  /** Where the receiver is reached. */
  address: string;
  seconds: number;
  /** TCP streams. Default 1. */
  streams?: number;
  /** UDP instead of TCP. `mbps` 0: as fast as the sender can. */
  udp?: { mbps: number; bytes: number };
  /** Seconds between the entries of `intervals`. Default: none. */
  interval?: number;
  /** Processes whose CPU time is counted. */
  pids?: readonly number[];
  /** Another one for loads at the same time on one receiver. */
  port?: number;
}

export interface LoadResult {
  /** Payload that the receiver got, megabits per second. */
  mbps: number;
  megabits: number;
  seconds: number;
  /** CPU seconds of `pids`. */
  cpu: number;
  /** CPU seconds of the whole machine, the load generator's included. */
  machine: number;
  /** Cores that neither `pids` nor iperf3 used: the kernel's own threads, and whoever disturbed the measurement. */
  others: number;
  /** UDP: datagrams that came, and that did not. */
  packets: number;
  lost: number;
  /** Mb/s as the sender saw it, in order of time. */
  intervals: number[];
}

interface Sum {
  bytes: number;
  seconds: number;
  bits_per_second: number;
  packets?: number;
  lost_packets?: number;
}

interface IperfJson {
  error?: string;
  intervals?: { sum: Sum }[];
  end?: {
    sum?: Sum;
    sum_received?: Sum;
    /** Percent of a core. */
    cpu_utilization_percent?: { host_total: number; remote_total: number };
  };
}

/** Throws one sentence when iperf3 fails. */
export async function load(options: LoadOptions): Promise<LoadResult> {
  const { from, to, address, seconds, streams = 1, udp, interval, pids = [], port = PORT } = options;
  const server = to.exec(["iperf3", "-s", "-1", "-B", address, "-p", `${port}`, "--forceflush"], { stderr: "ignore" });
  try {
    await listening(server.stdout);
    const args = [
      "-J",
      "-c",
      address,
      "-p",
      `${port}`,
      "-t",
      `${seconds}`,
      "-P",
      `${streams}`,
      "-i",
      `${interval ?? 0}`,
    ];
    if (udp) args.push("-u", "-b", `${udp.mbps}M`, "-l", `${udp.bytes}`);
    const [cpu, machine] = [cpuSeconds(pids), machineSeconds()];
    const run = await from.run(["iperf3", ...args], { timeoutMs: seconds * 1000 + SLACK_MS });
    const spent = { cpu: cpuSeconds(pids) - cpu, machine: machineSeconds() - machine };
    const json = parse(run.stdout);
    const sum = udp ? json?.end?.sum : json?.end?.sum_received;
    if (run.code !== 0 || !json || !sum) {
      const why = run.timedOut ? "it did not end" : (json?.error ?? (run.stderr.trim() || `status ${run.code}`));
      throw new Error(`iperf3 from ${from.name} to ${address}: ${why}`);
    }
    const lost = sum.lost_packets ?? 0;
    const packets = (sum.packets ?? 0) - lost;
    const { host_total = 0, remote_total = 0 } = json.end?.cpu_utilization_percent ?? {};
    const others = spent.machine / sum.seconds - spent.cpu / sum.seconds - (host_total + remote_total) / 100;
    const megabits = (udp ? packets * udp.bytes * 8 : sum.bytes * 8) / 1e6;
    return {
      mbps: megabits / sum.seconds,
      megabits,
      seconds: sum.seconds,
      ...spent,
      others,
      packets,
      lost,
      intervals: interval ? (json.intervals ?? []).map((i) => i.sum.bits_per_second / 1e6) : [],
    };
  } finally {
    server.kill("SIGKILL");
    await server.exited;
  }
}

function parse(text: string): IperfJson | null {
  try {
    return JSON.parse(text) as IperfJson;
  } catch {
    return null;
  }
}

async function listening(stream: ReadableStream<Uint8Array>): Promise<void> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of stream) {
    text += decoder.decode(chunk, { stream: true });
    if (text.includes("Server listening")) return;
  }
  throw new Error(`iperf3 does not listen: ${text.trim()}`);
}
