// A lab: hosts in network namespaces, joined by one router, for `bun run start`, end-to-end tests and benches.
//
//            router namespace (forwards IPv4 and IPv6)
//            h1 10.77.1.1/24, fd77:0:0:1::1/64      h2 10.77.2.1/24, fd77:0:0:2::1/64   ...
//             |                                      |
//            eth0 10.77.1.2, fd77:0:0:1::2          eth0 10.77.2.2, fd77:0:0:2::2
//            host 1                                 host 2
//
// Hosts reach each other through the router and nothing else: there is no way out to the machine. A host has its own /run,
// /var/run and /etc (a copy on write), so that daemons meet neither the machine's nor another host's sockets and settings.
//
// Namespaces exist as descriptors only, held by this process and by a guardian (guardian.ts), which ends everything when
// this process dies, also by kill -9. It needs root, or root of a user namespace (`unshare -Urnm`).
import { writeFileSync } from "node:fs";
import { constants } from "node:os";
import { SysError } from "../ffi/errno.ts";
import { closeFd } from "../ffi/libc.ts";
import { Netlink } from "../ffi/netlink.ts";
import { createNetns, withNetns } from "../ffi/netns.ts";
import { killGroup } from "../ffi/process.ts";
import { parsePrefix, prefixContains } from "../src/wire/ip.ts";
import { killProcessesIn, netnsId } from "./namespaces.ts";

const UDP = 17;
const HOSTS_MAX = 250;
/** The kernel takes some milliseconds for an IPv6 address. */
const ADDRESS_DEADLINE_MS = 10_000;
/** Before the main table's rule (32766), after the local one (0). */
const BLOCK_PRIORITY = 1000;

export interface HostOptions {
  /** Own /run, /var/run and /etc. Default true. */
  privateFiles?: boolean;
  /** MTU of eth0 and of the router's end. Default 1500. */
  mtu?: number;
}

export interface ExecOptions {
  env?: Record<string, string | undefined>;
  cwd?: string;
  stdin?: "pipe" | "ignore" | Uint8Array | Blob;
  /** Default "pipe". A pipe that nobody reads stops a talkative child: read it, or say "ignore". */
  stdout?: "pipe" | "ignore" | "inherit" | Bun.BunFile;
  stderr?: "pipe" | "ignore" | "inherit" | Bun.BunFile;
  onExit?: (code: number | null, signal: number | NodeJS.Signals | null) => void;
}

export interface RunResult {
  /** Exit status; 128 + signal when killed by one. */
  code: number;
  stdout: string;
  stderr: string;
  /** It did not end by itself in time. */
  timedOut: boolean;
}

/** A new namespace's descriptor. */
function newNetns(): number {
  try {
    return createNetns();
  } catch (error) {
    if (!(error instanceof SysError && error.code === "EPERM")) throw error;
    const how = "a lab of network namespaces needs root, or a user namespace: run it under `unshare -Urnm`";
    throw new Error(`${error.message}: ${how}`);
  }
}

/** One end of the network, and a place to run programs. */
export class Host {
  readonly name: string;
  readonly ip4: string;
  readonly ip6: string;
  /** The router's address on this host's subnet. */
  readonly gateway4: string;
  readonly gateway6: string;
  /** The subnets, "10.77.1.0/24". */
  readonly subnet4: string;
  readonly subnet6: string;
  /** Descriptor of the network namespace. */
  readonly netns: number;
  /** Serves this host's namespace from here. */
  readonly netlink: Netlink;
  /** Process that holds the private files' mount namespace; 0 without. */
  readonly holderPid: number;
  /** Name of the router's end of the wire. */
  readonly routerLink: string;
  readonly #lab: Lab;

  /** Use `Lab.host`. */
  constructor(lab: Lab, name: string, number: number, netns: number, netlink: Netlink, holderPid: number) {
    this.#lab = lab;
    this.name = name;
    this.netns = netns;
    this.netlink = netlink;
    this.holderPid = holderPid;
    this.routerLink = `h${number}`;
    this.ip4 = `10.77.${number}.2`;
    this.ip6 = `fd77:0:0:${number.toString(16)}::2`;
    this.gateway4 = `10.77.${number}.1`;
    this.gateway6 = `fd77:0:0:${number.toString(16)}::1`;
    this.subnet4 = `10.77.${number}.0/24`;
    this.subnet6 = `fd77:0:0:${number.toString(16)}::/64`;
  }

  /**
   * Starts a program on this host, in a process group of its own (its pid is the program's). It ends with the lab at the
   * latest. The environment is this process's unless `env` says otherwise.
   */
  exec<
    Out extends "pipe" | "ignore" | "inherit" | Bun.BunFile = "pipe",
    Err extends "pipe" | "ignore" | "inherit" | Bun.BunFile = "pipe",
    In extends "pipe" | "ignore" | Uint8Array | Blob = "ignore",
  >(
    command: string[],
    options: ExecOptions & { stdin?: In; stdout?: Out; stderr?: Err } = {},
  ): Bun.Subprocess<In, Out, Err> {
    const { onExit } = options;
    const cwd = options.cwd ?? process.cwd();
    // The mount namespace's root is where nsenter leaves the program: go back by name.
    const enter = [
      "nsenter",
      `--mount=/proc/${this.holderPid}/ns/mnt`,
      "--",
      "sh",
      "-c",
      'cd -- "$0" && exec "$@"',
      cwd,
    ];
    const full = this.holderPid === 0 ? command : [...enter, ...command];
    return withNetns(this.netns, () =>
      Bun.spawn(full, {
        cwd,
        env: options.env ?? process.env,
        stdin: options.stdin ?? ("ignore" as In),
        stdout: options.stdout ?? ("pipe" as Out),
        stderr: options.stderr ?? ("pipe" as Err),
        detached: true,
        ...(onExit && { onExit: (_, code, signal) => onExit(code, signal) }),
      }),
    ) as Bun.Subprocess<In, Out, Err>;
  }

  /** Runs a program to its end. After `timeoutMs` (default 60 s) it is killed with its process group. */
  async run(command: string[], options: ExecOptions & { timeoutMs?: number } = {}): Promise<RunResult> {
    const child = this.exec(command, { ...options, stdout: "pipe", stderr: "pipe" });
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      killGroup(child.pid, constants.signals.SIGKILL);
    }, options.timeoutMs ?? 60_000);
    try {
      const [stdout, stderr] = await Promise.all([
        new Response(child.stdout).text(),
        new Response(child.stderr).text(),
        child.exited,
      ]);
      return { code: child.exitCode ?? 128 + signalNumber(child.signalCode), stdout, stderr, timedOut };
    } finally {
      clearTimeout(timer);
    }
  }

  /** Takes the cable out and puts it in again: the host keeps addresses and routes and loses its carrier. */
  link(state: "up" | "down"): void {
    this.#lab.setWire(this, state === "up");
  }

  /**
   * Adds an address to eth0, "10.77.1.9/24" or, outside of the host's subnets, "192.0.2.7/32", to which the router then
   * has a route.
   */
  addAddress(prefix: string): void {
    this.netlink.addAddress({ link: "eth0", prefix }, { existsOk: true });
    const route = this.#foreignRoute(prefix);
    if (route) this.#lab.router.addRoute(route, { existsOk: true });
  }

  removeAddress(prefix: string): void {
    this.netlink.deleteAddress({ link: "eth0", prefix }, { missingOk: true });
    const route = this.#foreignRoute(prefix);
    if (route) this.#lab.router.deleteRoute(route, { missingOk: true });
  }

  #foreignRoute(prefix: string) {
    const parsed = parsePrefix(prefix);
    const own = parsePrefix(parsed?.ip.length === 4 ? this.subnet4 : this.subnet6);
    if (!parsed || !own || prefixContains(own, parsed.ip)) return null;
    const dst = `${prefix.split("/")[0]}/${parsed.ip.length * 8}`;
    return { dst, via: parsed.ip.length === 4 ? this.ip4 : this.ip6 };
  }
}

function signalNumber(signal: number | NodeJS.Signals | null): number {
  return typeof signal === "string" ? constants.signals[signal] : (signal ?? 0);
}

export class Lab implements AsyncDisposable {
  readonly name: string;
  readonly hosts: Host[] = [];
  /** Serves the router's namespace. */
  readonly router: Netlink;
  readonly routerNetns: number;
  readonly #guardian: Guardian;
  #closed = false;

  /** Throws one sentence when the kernel or the user's rights do not allow it. */
  static async create(name = "lab"): Promise<Lab> {
    const guardian = new Guardian();
    try {
      const netns = newNetns();
      await guardian.hold(netns);
      return new Lab(name, netns, guardian);
    } catch (error) {
      await guardian.close();
      throw error;
    }
  }

  private constructor(name: string, routerNetns: number, guardian: Guardian) {
    this.name = name;
    this.routerNetns = routerNetns;
    this.#guardian = guardian;
    this.router = withNetns(routerNetns, () => new Netlink());
    this.router.setLink("lo", { up: true });
    setSysctl(routerNetns, "net/ipv4/ip_forward", "1");
    setSysctl(routerNetns, "net/ipv6/conf/all/forwarding", "1");
    quietIPv6(routerNetns);
  }

  /** Adds a host, with loopback and eth0 up, addresses of both families, and the default routes. */
  async host(name: string, options: HostOptions = {}): Promise<Host> {
    if (this.#closed) throw new Error(`the lab ${this.name} is closed: make another one`);
    if (this.hosts.some((host) => host.name === name)) throw new Error(`the lab has a host ${name} already`);
    const number = this.hosts.length + 1;
    if (number > HOSTS_MAX) throw new Error(`a lab has at most ${HOSTS_MAX} hosts`);
    const netns = newNetns();
    await this.#guardian.hold(netns);
    const netlink = withNetns(netns, () => new Netlink());
    const holderPid = (options.privateFiles ?? true) ? await startHolder(netns) : 0;
    const host = new Host(this, name, number, netns, netlink, holderPid);
    this.hosts.push(host);
    await this.#connect(host, options.mtu ?? 1500);
    return host;
  }

  async #connect(host: Host, mtu: number): Promise<void> {
    const { netlink, routerLink, netns } = host;
    quietIPv6(netns);
    netlink.setLink("lo", { up: true });
    this.router.addLink({ kind: "veth", name: routerLink, mtu, peer: { name: "eth0", mtu, netnsFd: netns } });
    this.setWire(host, true);
    this.router.addAddress({ link: routerLink, prefix: `${host.gateway4}/24` });
    netlink.setLink("eth0", { up: true });
    netlink.addAddress({ link: "eth0", prefix: `${host.ip4}/24` });
    netlink.addAddress({ link: "eth0", prefix: `${host.ip6}/64` });
    netlink.addRoute({ dst: "0.0.0.0/0", via: host.gateway4 });
    netlink.addRoute({ dst: "::/0", via: host.gateway6, dev: "eth0" });
    const ready = () => netlink.isLocal(host.ip6) && this.router.isLocal(host.gateway6);
    for (const end = performance.now() + ADDRESS_DEADLINE_MS; !ready(); await Bun.sleep(1)) {
      if (performance.now() > end) throw new Error(`the addresses of the lab's host ${host.name} do not come up`);
    }
  }

  /** The router's end of a host's wire: `Host.link`. */
  setWire(host: Host, up: boolean): void {
    this.router.setLink(host.routerLink, { up });
    // IPv6 forgets its addresses when a link goes down.
    if (up) this.router.addAddress({ link: host.routerLink, prefix: `${host.gateway6}/64` }, { existsOk: true });
  }

  /**
   * The router silently drops UDP: all of it, all of one host, or between two; TCP and ICMP still pass. Undone by
   * `unblockUdp` with the same hosts.
   */
  blockUdp(a?: Host, b?: Host): void {
    for (const rule of udpRules(a, b)) this.router.addRule(rule, { existsOk: true });
  }

  unblockUdp(a?: Host, b?: Host): void {
    for (const rule of udpRules(a, b)) this.router.deleteRule(rule, { missingOk: true });
  }

  /** Kills everything that runs on the hosts, and takes the network down. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const fds = [this.routerNetns, ...this.hosts.map((host) => host.netns)];
    await killProcessesIn(new Set(fds.map(netnsId)));
    this.router.close();
    for (const host of this.hosts) host.netlink.close();
    for (const fd of fds) closeFd(fd);
    await this.#guardian.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function udpRules(a?: Host, b?: Host) {
  return ([4, 6] as const).flatMap((family) => {
    const subnet = (host: Host) => (family === 4 ? host.subnet4 : host.subnet6);
    const common = { family, priority: BLOCK_PRIORITY, action: "blackhole", ipProtocol: UDP } as const;
    if (!a) return [common];
    if (!b)
      return [
        { ...common, from: subnet(a) },
        { ...common, to: subnet(a) },
      ];
    return [
      { ...common, from: subnet(a), to: subnet(b) },
      { ...common, from: subnet(b), to: subnet(a) },
    ];
  });
}

function setSysctl(netns: number, path: string, value: string): void {
  try {
    // /proc/sys/net is that of the thread's namespace.
    withNetns(netns, () => writeFileSync(`/proc/sys/${path}`, value));
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new Error(`a lab cannot set ${path} (${reason}): in a container, run it with --privileged`);
  }
}

/**
 * Interfaces to come: link-local addresses work at once, not after a second (without them there is no neighbour discovery),
 * and nothing is sent now and then to find routers, which who counts packets would count.
 */
function quietIPv6(netns: number): void {
  setSysctl(netns, "net/ipv6/conf/default/accept_dad", "0");
  setSysctl(netns, "net/ipv6/conf/default/router_solicitations", "0");
}

// Keeps a mount namespace with private files. The overlay gives each host a writable /etc of its own; where the kernel
// refuses it, a copy does.
const HOLDER = `set -e
mount -t tmpfs -o mode=755 tmpfs /run
[ -L /var/run ] || mount -t tmpfs -o mode=755 tmpfs /var/run
mkdir -p /run/lock /run/.lab/upper /run/.lab/work
if ! mount -t overlay -o lowerdir=/etc,upperdir=/run/.lab/upper,workdir=/run/.lab/work overlay /etc 2>/dev/null; then
  cp -a /etc/. /run/.lab/upper 2>/dev/null || true
  mount --bind /run/.lab/upper /etc
fi
echo ready
exec sleep 2147483647`;

async function startHolder(netns: number): Promise<number> {
  const command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", HOLDER];
  const child = withNetns(netns, () =>
    Bun.spawn(command, { stdin: "ignore", stdout: "pipe", stderr: "pipe", detached: true }),
  );
  child.unref();
  const reader = child.stdout.getReader();
  const { value } = await reader.read();
  if (!value || !new TextDecoder().decode(value).startsWith("ready")) {
    const why = (await new Response(child.stderr).text()).trim();
    throw new Error(`a lab host cannot have private files: ${why || `unshare ended with ${child.exitCode}`}`);
  }
  return child.pid;
}

/** The process that outlives this one: see guardian.ts. */
class Guardian {
  readonly #child = Bun.spawn([process.execPath, `${import.meta.dir}/guardian.ts`], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "inherit",
    detached: true,
  });
  readonly #answers = this.#child.stdout.getReader();

  constructor() {
    this.#child.unref();
  }

  /** Resolves when the guardian holds the namespace too. */
  async hold(netns: number): Promise<void> {
    this.#child.stdin.write(`/proc/${process.pid}/fd/${netns}\n`);
    await this.#child.stdin.flush();
    const { done } = await this.#answers.read();
    if (done) throw new Error(`the lab's guardian ended with ${await this.#child.exited}`);
  }

  async close(): Promise<void> {
    await this.#child.stdin.end();
    await this.#child.exited;
  }
}
