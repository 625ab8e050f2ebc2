// What measure.ts runs on a host: `bun child.ts VERB ARGS`. Results are JSON on standard output, one object a line; an error is
// one sentence on standard error, and status 1.
//
//   ping IP COUNT INTERVAL_MS TIMEOUT_MS SIZE    {sent, received, min, p50, p99, max}
//   free-port ADDRESS                            {port}
//   tcp-sink ADDRESS hash|count                  {port}, then after one connection {bytes, seconds, hash?}
//   tcp-source ADDRESS PORT bytes|seconds N      {bytes, hash?}: the hash when told the bytes
//   udp-echo ADDRESS                             {port}, then echoes until it is killed
//   udp-source ADDRESS PORT COUNT SIZE TIMEOUT_MS   {sent, received}
//   udp-flow-sink ADDRESS                        {port}, then after one flow UdpFlowReceived
//   udp-flow ADDRESS PORT OPTIONS                UdpFlowSent; OPTIONS: JSON of UdpFlowOptions
import { createHash } from "node:crypto";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { Pinger } from "../ffi/icmp.ts";
import { seededBytes } from "./seeded.ts";
import { receiveUdpFlow, sendUdpFlow, type UdpFlowOptions } from "./udp-flow.ts";

const BLOCK_BYTES = 1 << 20;
/** Datagrams that udp-source has under way at a time: below what a socket's default buffer holds. */
const UDP_WINDOW = 16;

const verbs: Record<string, (...args: string[]) => Promise<void>> = {
  ping: pingVerb,
  "free-port": freePort,
  "tcp-sink": tcpSink,
  "tcp-source": tcpSource,
  "udp-echo": udpEcho,
  "udp-source": udpSource,
  "udp-flow-sink": async (address = "") => print(receiveUdpFlow(address, (port) => print({ port }))),
  "udp-flow": async (address = "", port = "", options = "") =>
    print(await sendUdpFlow(address, Number(port), JSON.parse(options) as UdpFlowOptions)),
};

function print(value: object): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

async function pingVerb(ip = "", count = "", interval = "", timeout = "", size = ""): Promise<void> {
  const total = Number(count);
  const sentAt: number[] = [];
  const trips: number[] = [];
  using pinger = new Pinger(ip, process.pid);
  const data = new Uint8Array(Number(size));
  const take = (until: number): void => {
    for (;;) {
      const sequence = pinger.receive(Math.max(0, until - performance.now()));
      if (sequence === null) return;
      const at = sentAt[sequence];
      if (at !== undefined) trips.push(performance.now() - at);
      delete sentAt[sequence];
      if (trips.length === total) return;
    }
  };
  const start = performance.now();
  for (let i = 0; i < total; i++) {
    sentAt[i] = performance.now();
    pinger.send(i, data);
    const last = i === total - 1;
    take(last ? performance.now() + Number(timeout) : start + (i + 1) * Number(interval));
  }
  trips.sort((a, b) => a - b);
  const at = (share: number) => trips[Math.min(trips.length - 1, Math.floor(share * trips.length))] ?? 0;
  print({ sent: total, received: trips.length, min: at(0), p50: at(0.5), p99: at(0.99), max: at(1) });
}

async function listening(address: string): Promise<ReturnType<typeof createServer>> {
  const server = createServer({ pauseOnConnect: true });
  server.listen(0, address);
  await once(server, "listening");
  return server;
}

async function freePort(address = ""): Promise<void> {
  const server = await listening(address);
  print({ port: (server.address() as AddressInfo).port });
  server.close();
}

async function tcpSink(address = "", mode = ""): Promise<void> {
  const server = await listening(address);
  print({ port: (server.address() as AddressInfo).port });
  const [socket] = (await once(server, "connection")) as [Socket];
  server.close();
  const hash = mode === "hash" ? createHash("sha256") : null;
  let bytes = 0;
  let start = 0;
  socket.on("data", (chunk) => {
    start ||= performance.now();
    bytes += chunk.length;
    hash?.update(chunk);
  });
  socket.resume();
  await once(socket, "end");
  print({ bytes, seconds: (performance.now() - start) / 1000, hash: hash?.digest("hex") });
  socket.end();
}

async function tcpSource(address = "", port = "", unit = "", amount = ""): Promise<void> {
  const socket = connect(Number(port), address);
  await once(socket, "connect");
  const seed = seededBytes(BLOCK_BYTES);
  const byBytes = unit === "bytes";
  const hash = byBytes ? createHash("sha256") : null;
  const end = performance.now() + Number(amount) * 1000;
  let bytes = 0;
  for (let number = 0; byBytes ? bytes < Number(amount) : performance.now() < end; number++) {
    const length = byBytes ? Math.min(BLOCK_BYTES, Number(amount) - bytes) : BLOCK_BYTES;
    const block = Buffer.from(seed.subarray(0, length));
    if (length >= 4) block.writeUInt32LE(number, 0);
    hash?.update(block);
    bytes += length;
    if (!socket.write(block)) await once(socket, "drain");
  }
  socket.end();
  socket.resume();
  await once(socket, "close");
  print({ bytes, hash: hash?.digest("hex") });
}

async function udpEcho(address = ""): Promise<void> {
  const socket = createSocket(address.includes(":") ? "udp6" : "udp4");
  socket.on("message", (data, from) => socket.send(data, from.port, from.address));
  socket.bind(0, address);
  await once(socket, "listening");
  print({ port: socket.address().port });
  await once(socket, "close");
}

async function udpSource(address = "", port = "", count = "", size = "", timeout = ""): Promise<void> {
  const total = Number(count);
  const socket = createSocket(address.includes(":") ? "udp6" : "udp4");
  socket.bind(0);
  await once(socket, "listening");
  const waiting = new Map<number, { payload: Buffer; deadline: number }>();
  let sent = 0;
  let received = 0;
  socket.on("message", (data) => {
    const number = data.length >= 4 ? data.readUInt32LE(0) : -1;
    if (!waiting.get(number)?.payload.equals(data)) return;
    waiting.delete(number);
    received++;
    fill();
  });
  const fill = () => {
    while (waiting.size < UDP_WINDOW && sent < total) {
      const payload = Buffer.alloc(Math.max(8, Number(size)), sent & 0xff);
      payload.writeUInt32LE(sent, 0);
      waiting.set(sent++, { payload, deadline: performance.now() + Number(timeout) });
      socket.send(payload, Number(port), address);
    }
  };
  // A network that is down is loss, not an error of the measurement.
  socket.on("error", () => {});
  fill();
  while (sent < total || waiting.size > 0) {
    await Bun.sleep(2);
    const now = performance.now();
    for (const [number, { deadline }] of waiting) if (deadline <= now) waiting.delete(number);
    fill();
  }
  socket.close();
  print({ sent, received });
}

const [verb = "", ...args] = process.argv.slice(2);
const run = verbs[verb];
if (!run) throw new Error(`no verb ${JSON.stringify(verb)}: one of ${Object.keys(verbs).join(", ")}`);
try {
  await run(...args);
} catch (error) {
  process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
}
