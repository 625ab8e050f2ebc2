// What can be measured between two hosts of a lab. Each measurement runs child.ts on the hosts; times are in milliseconds.
import { readFileSync } from "node:fs";
import type { Host } from "./network.ts";
import type { UdpFlowOptions, UdpFlowReceived, UdpFlowSent } from "./udp-flow.ts";

const CHILD = `${import.meta.dir}/child.ts`;
/** What a measurement may take beyond its own duration. */
const SLACK_MS = 30_000;

export interface PingResult {
  sent: number;
  received: number;
  /** Round trips; 0 when none came back. */
  min: number;
  p50: number;
  p99: number;
  max: number;
}

export interface ThroughputResult {
  /** Megabits of payload per second, as received. */
  mbps: number;
  seconds: number;
  bytes: number;
  tool: "iperf3" | "weft";
}

export interface TransferResult {
  bytes: number;
  seconds: number;
  /** SHA-256, hexadecimal, as the sender and the receiver computed it. */
  sent: string;
  received: string;
  /** All bytes came, and the same ones. */
  ok: boolean;
}

export interface UdpEchoResult {
  sent: number;
  /** Echoes that came back, unaltered, each counted once. */
  received: number;
  /** 0 to 1. */
  loss: number;
}

/** Sends `count` ICMP echo requests to `ip`, one every `intervalMs`, each with `size` bytes of data. */
export async function ping(
  from: Host,
  ip: string,
  options: { count?: number; intervalMs?: number; timeoutMs?: number; size?: number } = {},
): Promise<PingResult> {
  const { count = 10, intervalMs = 100, timeoutMs = 1000, size = 56 } = options;
  const limit = count * intervalMs + timeoutMs + SLACK_MS;
  return await childJson<PingResult>(from, limit, "ping", ip, count, intervalMs, timeoutMs, size);
}

/**
 * One TCP stream from one host to another, by iperf3 where the machine has it, else by Weft's own. `address` is where the
 * receiver is reached (default `to.ip4`): the address inside a tunnel measures the tunnel.
 */
export async function tcpThroughput(
  from: Host,
  to: Host,
  options: { seconds?: number; address?: string; tool?: "iperf3" | "weft" } = {},
): Promise<ThroughputResult> {
  const { seconds = 3, address = to.ip4 } = options;
  const tool = options.tool ?? (Bun.which("iperf3") === null ? "weft" : "iperf3");
  return tool === "iperf3" ? await iperf(from, to, seconds, address) : await ownThroughput(from, to, seconds, address);
}

async function iperf(from: Host, to: Host, seconds: number, address: string): Promise<ThroughputResult> {
  const port = await freePort(to, address);
  const server = to.exec(["iperf3", "-s", "-1", "-B", address, "-p", String(port), "--forceflush"], {
    stderr: "ignore",
  });
  try {
    await firstLineWith(server.stdout, "Server listening");
    const result = await from.run(["iperf3", "-J", "-c", address, "-p", String(port), "-t", String(seconds)], {
      timeoutMs: seconds * 1000 + SLACK_MS,
    });
    const json = parseIperf(result.stdout);
    if (result.code !== 0 || !json?.end?.sum_received) {
      throw new Error(
        `iperf3 from ${from.name} to ${address}: ${json?.error ?? (result.stderr.trim() || `status ${result.code}`)}`,
      );
    }
    const sum = json.end.sum_received;
    return { mbps: sum.bits_per_second / 1e6, seconds: sum.seconds, bytes: sum.bytes, tool: "iperf3" };
  } finally {
    server.kill("SIGKILL");
    await server.exited;
  }
}

interface IperfJson {
  error?: string;
  end?: { sum_received?: { bits_per_second: number; seconds: number; bytes: number } };
}

function parseIperf(text: string): IperfJson | null {
  try {
    return JSON.parse(text) as IperfJson;
  } catch {
    return null;
  }
}

async function ownThroughput(from: Host, to: Host, seconds: number, address: string): Promise<ThroughputResult> {
  return await withServer(to, "tcp-sink", [address, "count"], async (port, result) => {
    await childJson(from, seconds * 1000 + SLACK_MS, "tcp-source", address, port, "seconds", seconds);
    const received = await result<{ bytes: number; seconds: number }>();
    return { ...received, mbps: (received.bytes * 8) / received.seconds / 1e6, tool: "weft" };
  });
}

/** Sends `bytes` deterministic bytes over one TCP connection and compares SHA-256 of what went in and what came out. */
export async function transferHash(
  from: Host,
  to: Host,
  bytes: number,
  options: { address?: string; timeoutMs?: number } = {},
): Promise<TransferResult> {
  const { address = to.ip4, timeoutMs = 120_000 } = options;
  return await withServer(to, "tcp-sink", [address, "hash"], async (port, result) => {
    const sent = await childJson<{ hash: string }>(from, timeoutMs, "tcp-source", address, port, "bytes", bytes);
    const received = await result<{ bytes: number; seconds: number; hash: string }>();
    return {
      bytes: received.bytes,
      seconds: received.seconds,
      sent: sent.hash,
      received: received.hash,
      ok: received.bytes === bytes && received.hash === sent.hash,
    };
  });
}

/** Sends `n` datagrams of `size` bytes (at least 8), a few at a time, to an echo on the other host. */
export async function udpEcho(
  from: Host,
  to: Host,
  n: number,
  size: number,
  options: { address?: string; timeoutMs?: number } = {},
): Promise<UdpEchoResult> {
  const { address = to.ip4, timeoutMs = 1000 } = options;
  return await withServer(to, "udp-echo", [address], async (port) => {
    const { sent, received } = await childJson<{ sent: number; received: number }>(
      from,
      n * timeoutMs + SLACK_MS,
      "udp-source",
      address,
      port,
      n,
      size,
      timeoutMs,
    );
    return { sent, received, loss: sent === 0 ? 0 : 1 - received / sent };
  });
}

/** One flow of numbered datagrams: what was sent, and what of it came. `address` as in `tcpThroughput`. */
export async function udpFlow(
  from: Host,
  to: Host,
  options: UdpFlowOptions & { address?: string },
): Promise<UdpFlowSent & { got: UdpFlowReceived }> {
  const { address = to.ip4, ...flow } = options;
  const limit = SLACK_MS + ("seconds" in flow.amount ? flow.amount.seconds * 1000 : SLACK_MS);
  return await withServer(to, "udp-flow-sink", [address], async (port, result) => {
    const sent = await childJson<UdpFlowSent>(from, limit, "udp-flow", address, port, JSON.stringify(flow));
    return { ...sent, got: await result<UdpFlowReceived>() };
  });
}

/**
 * Resident memory of a process in kB; 0 when it is gone. RssFile of it is the program's code, which the kernel maps as it is
 * used and takes back when it likes.
 */
export function rss(pid: number, field: "VmRSS" | "RssFile" = "VmRSS"): number {
  try {
    return Number(
      new RegExp(`^${field}:\\s+(\\d+) kB$`, "m").exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0,
    );
  } catch {
    return 0;
  }
}

async function freePort(host: Host, address: string): Promise<number> {
  return (await childJson<{ port: number }>(host, SLACK_MS, "free-port", address)).port;
}

/** Runs child.ts to its end and reads the JSON that it prints. */
async function childJson<T>(host: Host, timeoutMs: number, ...args: (string | number)[]): Promise<T> {
  const result = await host.run([process.execPath, CHILD, ...args.map(String)], { timeoutMs });
  if (result.timedOut) throw new Error(`${args[0]} on ${host.name}: no result after ${timeoutMs / 1000} s`);
  if (result.code !== 0) {
    throw new Error(`${args[0]} on ${host.name}: ${result.stderr.trim() || `ended with status ${result.code}`}`);
  }
  return JSON.parse(result.stdout) as T;
}

/** Runs a server of child.ts around `action`. It prints its port on the first line and its result on the second. */
async function withServer<T>(
  host: Host,
  verb: string,
  args: string[],
  action: (port: number, result: <R>() => Promise<R>) => Promise<T>,
): Promise<T> {
  const child = host.exec([process.execPath, CHILD, verb, ...args]);
  const lines = linesOf(child.stdout);
  const next = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error(`${verb} on ${host.name}: ${(await new Response(child.stderr).text()).trim()}`);
    return JSON.parse(value) as unknown;
  };
  try {
    const { port } = (await next()) as { port: number };
    return await action(port, async <R>() => (await withTimeout(next(), SLACK_MS, `${verb} on ${host.name}`)) as R);
  } finally {
    child.kill("SIGKILL");
    await child.exited;
  }
}

async function withTimeout<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: no result after ${ms / 1000} s`)), ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<string, undefined> {
  const decoder = new TextDecoder();
  let pending = "";
  for await (const chunk of stream) {
    pending += decoder.decode(chunk, { stream: true });
    for (let end = pending.indexOf("\n"); end >= 0; end = pending.indexOf("\n")) {
      yield pending.slice(0, end);
      pending = pending.slice(end + 1);
    }
  }
}

async function firstLineWith(stream: ReadableStream<Uint8Array>, text: string): Promise<void> {
  const lines = linesOf(stream);
  for (;;) {
    const { value, done } = await withTimeout(lines.next(), SLACK_MS, `waiting for "${text}"`);
    if (done) throw new Error(`the program ended before it said "${text}"`);
    if (value.includes(text)) return;
  }
}
