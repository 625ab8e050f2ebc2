// A datapath in a host of the lab, for tests: its device and sockets in the host's namespace, its Workers in this process.
import { expect } from "bun:test";
import { withNetns } from "../../ffi/netns.ts";
import { ping } from "../../lab/measure.ts";
import type { Host } from "../../lab/network.ts";
import { hex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import type { Datapath, DatapathEvents, DatapathOptions } from "./api.ts";
import { startDatapath } from "./datapath.ts";

export async function until(what: string, check: () => boolean | Promise<boolean>, seconds = 60): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  while (!(await check())) {
    if (performance.now() > deadline) throw new Error(`${what}: not within ${seconds} s`);
    await Bun.sleep(20);
  }
}

export class Node implements AsyncDisposable {
  readonly host: Host;
  readonly privateKey: Uint8Array;
  readonly publicKey: Uint8Array;
  readonly ip4: string;
  readonly ip6: string;
  readonly datagrams: { from: string; data: Uint8Array }[] = [];
  readonly activity: string[] = [];
  readonly handshakes: { ms: number; initiator: boolean }[] = [];
  relayed = 0;
  fatal: string | null = null;
  /** What the relay does with a message for `peer`. */
  onRelay: (peer: Uint8Array, data: Uint8Array) => void = () => {};
  dp!: Datapath;

  constructor(host: Host, number: number) {
    this.host = host;
    this.privateKey = new Uint8Array(32).fill(number);
    this.publicKey = x25519Public(this.privateKey);
    this.ip4 = `100.64.0.${number}`;
    this.ip6 = `fd7a::${number}`;
  }

  static async start(host: Host, number: number, options: Partial<DatapathOptions> = {}, v6 = true): Promise<Node> {
    const node = new Node(host, number);
    const events: DatapathEvents = {
      onDatagram: (from, data) => node.datagrams.push({ from, data }),
      onRelay: (peer, data) => {
        node.relayed++;
        node.onRelay(peer, data);
      },
      onActivity: (peer) => node.activity.push(hex(peer)),
      onHandshake: (_peer, ms, initiator) => node.handshakes.push({ ms, initiator }),
      onFatal: (reason) => {
        node.fatal = reason;
      },
    };
    let started!: Promise<Datapath>;
    withNetns(host.netns, () => {
      started = startDatapath({ tun: `d${number}`, mtu: 1280, port: 0, mode: "mesh", ...options }, events);
    });
    node.dp = await started;
    host.netlink.setLink(node.dp.tunIndex, { up: true });
    host.netlink.addAddress({ link: node.dp.tunIndex, prefix: `${node.ip4}/24` });
    if (v6) host.netlink.addAddress({ link: node.dp.tunIndex, prefix: `${node.ip6}/64` });
    await node.dp.configure({ privateKey: node.privateKey });
    return node;
  }

  async knows(other: Node): Promise<void> {
    const allowedIPs = [`${other.ip4}/32`, `${other.ip6}/128`];
    await this.dp.configure({ peers: [{ publicKey: other.publicKey, replaceAllowedIPs: true, allowedIPs }] });
  }

  get udp(): string {
    return `${this.host.ip4}:${this.dp.port()}`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dp.close();
  }
}

export async function reaches(from: Node, to: Node): Promise<void> {
  for (const ip of [to.ip4, to.ip6]) {
    expect((await ping(from.host, ip, { count: 3, intervalMs: 30, timeoutMs: 30_000 })).received).toBe(3);
  }
}
