// WireGuard devices on hosts of a lab, Weft's and others', driven by wg(8) alone.
import { constants } from "node:os";
import { resolve } from "node:path";
import { killGroup } from "../../ffi/process.ts";
import type { Host, RunResult } from "../../lab/network.ts";
import { until } from "./mesh.ts";
import { peer } from "./peers.ts";

export const WEFT_WG = resolve(import.meta.dir, "../../bin/weft-wg");

export type Implementation = "weft" | "wireguard-go" | "boringtun" | "gotatun";

function command(implementation: Implementation, name: string, flags: string[]): string[] {
  switch (implementation) {
    case "weft":
      return [WEFT_WG, "-f", ...flags, name];
    case "wireguard-go":
      return [peer("wireguard")!, "-f", name];
    case "boringtun":
      return [peer("boringtun-cli")!, "-f", "--disable-drop-privileges", name];
    case "gotatun":
      return [peer("gotatun")!, "-f", "--disable-drop-privileges", name];
  }
}

export interface PeerOptions {
  endpoint?: string;
  keepalive?: number;
  presharedKey?: string;
}

/** One end of a tunnel: 10.200.0.N and fd20::N inside. */
export class WgEnd implements AsyncDisposable {
  readonly host: Host;
  readonly device: string;
  readonly ip4: string;
  readonly ip6: string;
  readonly port: number;
  privateKey = "";
  publicKey = "";
  pid = 0;
  readonly #process: Bun.Subprocess<"ignore", "pipe" | "ignore", Bun.BunFile | "pipe" | "ignore">;

  private constructor(host: Host, number: number, implementation: Implementation, flags: string[], prefix: string[]) {
    this.host = host;
    this.device = `w${process.pid}`;
    this.ip4 = `10.200.0.${number}`;
    this.ip6 = `fd20::${number}`;
    this.port = 51820 + number;
    this.#process = host.exec([...prefix, ...command(implementation, this.device, flags)], {
      stdout: "ignore",
      stderr: "ignore",
      env: { ...process.env, WG_PROCESS_FOREGROUND: "1" },
    });
    this.pid = this.#process.pid;
  }

  /** The device is up, has its key, port and addresses. `prefix`: a command that becomes the program's (taskset, nice). */
  static async start(
    host: Host,
    number: number,
    implementation: Implementation = "weft",
    flags: string[] = [],
    prefix: string[] = [],
  ): Promise<WgEnd> {
    const end = new WgEnd(host, number, implementation, flags, prefix);
    await until(`${implementation} to serve ${end.device}`, async () => (await end.wg("show", end.device)).code === 0);
    end.privateKey = (await end.wg("genkey")).stdout;
    end.publicKey = (await end.wgIn(end.privateKey, "pubkey")).stdout.trim();
    await end.must(
      end.wgIn(end.privateKey, "set", end.device, "private-key", "/dev/stdin", "listen-port", String(end.port)),
    );
    host.netlink.setLink(end.device, { up: true });
    host.netlink.addAddress({ link: end.device, prefix: `${end.ip4}/24` });
    host.netlink.addAddress({ link: end.device, prefix: `${end.ip6}/64` });
    return end;
  }

  wg(...args: string[]): Promise<RunResult> {
    return this.host.run(["wg", ...args], { timeoutMs: 60_000 });
  }

  wgIn(input: string, ...args: string[]): Promise<RunResult> {
    return this.host.run(["wg", ...args], { stdin: new TextEncoder().encode(input), timeoutMs: 60_000 });
  }

  async must(result: Promise<RunResult>): Promise<string> {
    const { code, stderr, stdout } = await result;
    if (code !== 0) throw new Error(`wg on ${this.host.name}: ${stderr}`);
    return stdout;
  }

  /** Adds `other` as a peer, or changes it. */
  async knows(other: WgEnd, options: PeerOptions = {}): Promise<void> {
    const args = ["set", this.device, "peer", other.publicKey, "allowed-ips", `${other.ip4}/32,${other.ip6}/128`];
    if (options.endpoint) args.push("endpoint", options.endpoint);
    if (options.keepalive !== undefined) args.push("persistent-keepalive", String(options.keepalive));
    if (options.presharedKey) args.push("preshared-key", "/dev/stdin");
    await this.must(this.wgIn(options.presharedKey ?? "", ...args));
  }

  /** "10.77.1.2:51821" of the only peer. */
  async endpoint(): Promise<string> {
    return (await this.must(this.wg("show", this.device, "endpoints"))).trim().split("\t")[1] ?? "";
  }

  get outer4(): string {
    return `${this.host.ip4}:${this.port}`;
  }

  get outer6(): string {
    return `[${this.host.ip6}]:${this.port}`;
  }

  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<number> {
    killGroup(this.pid, constants.signals[signal]);
    return await this.#process.exited;
  }

  get exited(): Promise<number> {
    return this.#process.exited;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    killGroup(this.pid, constants.signals.SIGKILL);
    await this.#process.exited;
  }
}
