// Tunnels to measure: a pair of hosts for each program, joined by one veth of their own, all with the same settings.
//
//     host a  wire 10.98.N.1 ------------------ wire 10.98.N.2  host b
//
// The kernel's settings are the defaults of a fresh network namespace for all. What differs is each program's own doing:
// socket buffers, queue length and queueing discipline of its TUN device, number of threads.

import { setLinkFeatures } from "../../ffi/ethtool.ts";
import { withNetns } from "../../ffi/netns.ts";
import { ping } from "../../lab/measure.ts";
import type { Host, Lab } from "../../lab/network.ts";
import { until } from "../../test/lib/mesh.ts";
import { missing, peer, sources } from "../../test/lib/peers.ts";
import { type Implementation, WgEnd } from "../../test/lib/wg.ts";
import type { BenchOptions, Rival } from "./options.ts";
import type { Report } from "./report.ts";

const WIREGUARD: readonly Implementation[] = ["weft", "wireguard-go", "gotatun", "boringtun"];
const PROGRAM: Partial<Record<Implementation | Rival, string>> = {
  "wireguard-go": "wireguard",
  boringtun: "boringtun-cli",
  gotatun: "gotatun",
  tailscaled: "tailscaled",
};
/** The outer packet's headers: IPv6 40, UDP 8, WireGuard 32. */
const OVERHEAD = 80;
const ETHERNET_MTU = 1500;
/** `ethtool -K … tso off gso off tx-udp-segmentation off gro on`. */
const SINGLE_PACKETS = {
  "tx-tcp-segmentation": false,
  "tx-tcp6-segmentation": false,
  "tx-tcp-ecn-segmentation": false,
  "tx-generic-segmentation": false,
  "tx-udp-segmentation": false,
  "rx-gro": true,
};

/** Why whole tunnels cannot be measured here, or null. */
export const cannotTunnel: string | null =
  process.getuid?.() !== 0
    ? "whole tunnels need root (network namespaces and TUN devices)"
    : ["wg", "iperf3", "taskset"].find((tool) => Bun.which(tool) === null) !== undefined
      ? "whole tunnels need wg (wireguard-tools), iperf3 and taskset (util-linux)"
      : null;

/** Weft, and those of `--against` that are installed. The others are named in the report. */
export function wireguards(options: BenchOptions, report: Report): Implementation[] {
  return WIREGUARD.filter((name) => name === "weft" || isThere(name as Rival, options, report));
}

/** False, and said in the report unless it was not asked for, when a program is not installed. */
export function isThere(name: Rival, options: BenchOptions, report: Report): boolean {
  if (!options.against.includes(name)) return false;
  const program = PROGRAM[name]!;
  const absent = missing([[program]]);
  if (absent) report.note(`${name} is left out: ${absent}`);
  else
    report.versions[name] = sources.find(
      (source) => source.programs.includes(program) && peer(program) !== null,
    )!.version;
  return absent === null;
}

export interface Wire {
  a: Host;
  b: Host;
  ipA: string;
  ipB: string;
}

/** Two hosts, and a veth between them alone. */
export async function wire(lab: Lab, name: string, options: Pick<BenchOptions, "segment" | "mtu">): Promise<Wire> {
  const number = lab.hosts.length + 1;
  const mtu = Math.max(ETHERNET_MTU, (options.mtu ?? 0) + OVERHEAD);
  const [a, b] = [await lab.host(`${name}-a`), await lab.host(`${name}-b`)];
  a.netlink.addLink({ kind: "veth", name: "wire", mtu, peer: { name: "wire", mtu, netnsFd: b.netns } });
  const ips = [`10.98.${number}.1`, `10.98.${number}.2`] as const;
  for (const [i, host] of [a, b].entries()) {
    if (options.segment) withNetns(host.netns, () => setLinkFeatures("wire", SINGLE_PACKETS));
    host.netlink.setLink("wire", { up: true });
    host.netlink.addAddress({ link: "wire", prefix: `${ips[i]}/24` });
  }
  return { a, b, ipA: ips[0], ipB: ips[1] };
}

export interface TunnelOptions {
  mtu: number;
  /** Of `bun run wg`, both ends. */
  flags?: string[];
}

/** Two ends of one program, up and talking. */
export interface Tunnel extends AsyncDisposable {
  impl: string;
  a: WgEnd;
  b: WgEnd;
}

export async function tunnel(on: Wire, implementation: Implementation, options: TunnelOptions): Promise<Tunnel> {
  const flags = implementation === "weft" ? (options.flags ?? []) : [];
  const impl = [implementation, ...flags].join(" ");
  const a = await WgEnd.start(on.a, 1, implementation, flags);
  const b = await WgEnd.start(on.b, 2, implementation, flags);
  for (const end of [a, b]) end.host.netlink.setLink(end.device, { mtu: options.mtu });
  await b.knows(a, { endpoint: `${on.ipA}:${a.port}` });
  await a.knows(b, { endpoint: `${on.ipB}:${b.port}` });
  return {
    impl,
    a,
    b,
    async [Symbol.asyncDispose]() {
      await Promise.all([a.stop(), b.stop()]);
    },
  };
}

/** Throws when nothing comes through. */
export async function talks(from: Host, ip: string, what: string): Promise<void> {
  const { received } = await ping(from, ip, { count: 3, intervalMs: 50, timeoutMs: 10_000 });
  if (received === 0) throw new Error(`${what}: no packet comes through the tunnel to ${ip}`);
}

/**
 * `wg addconf`, and its private key where there is one, with another port each time: gotatun 0.10 now and then refuses a new
 * key, and is without a socket until the next port.
 */
export async function configure(end: WgEnd, peers: string[], privateKey: string | null = null): Promise<void> {
  let port = 40_000;
  await until(`${end.host.name} takes its configuration`, async () => {
    const change = ["listen-port", `${port++}`, "private-key", "/dev/stdin"];
    if (privateKey) await end.must(end.wgIn(privateKey, "set", end.device, ...change));
    await end.must(end.wgIn(peers.join(""), "addconf", end.device, "/dev/stdin"));
    return true;
  });
}
