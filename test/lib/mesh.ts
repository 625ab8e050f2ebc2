// A tailnet for tests: a Weft box, Weft nodes and official tailscaled, each in a host of its own (lab/). Everything here talks to
// real processes; nothing is mocked.
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { Daemon } from "../../lab/daemon.ts";
import { ping } from "../../lab/measure.ts";
import type { Host, Lab } from "../../lab/network.ts";
import { peer } from "./peers.ts";

const run = resolve(import.meta.dir, "../../tools/run.ts");

/** Reason why no namespace test can run here, or null. Printed once by `skipReason`. */
export const cannotUseNamespaces: string | null = process.getuid?.() === 0 ? null : "network namespaces need root";

/** Prints the reason in the form that tools/test.ts gathers, and says whether to skip. */
export function skip(...reasons: (string | null)[]): boolean {
  const reason = reasons.find((r) => r !== null);
  if (reason) console.error(`SKIP: ${reason}`);
  return reason !== undefined;
}

/** Thrown by a check of `until`: what is waited for will never come. */
export class Hopeless extends Error {}

/** Throws `Hopeless` with the last lines of a program that has ended. */
export async function stillRuns(what: string, process: Daemon): Promise<void> {
  if (process.exitCode === null) return;
  // What it has said may not be read yet; a child of its own may hold the pipe.
  await Promise.race([process.silent, Bun.sleep(1000)]);
  throw new Hopeless(`${what} ended with ${process.exitCode}: ${process.output().slice(-1500).trim()}`);
}

/**
 * Polls until `check` is true (or not null) and returns it. Throws what was waited for, and the last failure, at the deadline;
 * `Hopeless` at once.
 */
export async function until<T>(
  what: string,
  check: () => Promise<T> | T,
  seconds = 60,
  every = 100,
): Promise<NonNullable<T>> {
  const deadline = performance.now() + seconds * 1000;
  let last: unknown;
  for (;;) {
    try {
      const value = await check();
      if (value) return value as NonNullable<T>;
      last = undefined;
    } catch (error) {
      if (error instanceof Hopeless) throw error;
      last = error;
    }
    if (performance.now() > deadline)
      throw new Error(
        `waited ${seconds} s in vain until ${what}${last ? ` (${last instanceof Error ? last.message : last})` : ""}`,
      );
    await Bun.sleep(every);
  }
}

/** A folder for one test, removed by `using`. */
export function tempDir(name: string): { path: string } & Disposable {
  const path = mkdtempSync(join(tmpdir(), `weft-${name}-`));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

/**
 * A TCP port of loopback that was free a moment ago, for programs that take no port 0. The kernel gives it to nobody else
 * meanwhile: ports below 32768 are not those of connections.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    const server = createServer();
    const isFree = await new Promise<boolean>((done) => {
      server.once("error", () => done(false));
      server.listen(port, "127.0.0.1", () => done(true));
    });
    await new Promise((done) => server.close(done));
    if (isFree) return port;
  }
}

export interface BoxOptions {
  tls?: { cert: string; key: string };
  port?: number;
  /** More arguments for `bun run box`. */
  args?: string[];
  verb?: "box" | "control";
  /** Added to this process's environment. */
  env?: Record<string, string>;
}

export class Box {
  readonly url: string;
  readonly listen: string;
  process!: Daemon;
  readonly #processes: Daemon[] = [];

  private constructor(
    readonly host: Host,
    readonly data: string,
    readonly options: BoxOptions,
  ) {
    this.listen = `${host.ip4}:${options.port ?? (options.tls ? 8443 : 8080)}`;
    this.url = `${options.tls ? "https" : "http"}://${this.listen}`;
  }

  static async start(host: Host, data: string, options: BoxOptions = {}): Promise<Box> {
    const box = new Box(host, data, options);
    await box.start();
    return box;
  }

  /** `more`: arguments for this time alone. */
  async start(...more: string[]): Promise<void> {
    const tls = this.options.tls ? ["--tls-cert", this.options.tls.cert, "--tls-key", this.options.tls.key] : [];
    const flags = ["--data", this.data, "--listen", this.listen, "--url", this.url, ...tls];
    this.process = new Daemon(
      this.host,
      [process.execPath, run, this.options.verb ?? "box", ...flags, ...(this.options.args ?? []), ...more],
      this.options.env,
      Number.POSITIVE_INFINITY,
    );
    this.#processes.push(this.process);
    await until("the box answers /key", async () => {
      await stillRuns(`weft ${this.options.verb ?? "box"}`, this.process);
      return this.get("/key?v=140");
    });
  }

  /** All that it has said since its first start. */
  get log(): string {
    return this.#processes.map((process) => process.output()).join("");
  }

  /** GET from inside the box's own host; null when there is no 200. */
  async get(path: string): Promise<string | null> {
    const code = `const r = await fetch(${JSON.stringify(this.url + path)}, { tls: { rejectUnauthorized: false }, signal: AbortSignal.timeout(10_000) }); if (!r.ok) process.exit(1); console.log(await r.text());`;
    const result = await this.host.run([process.execPath, "-e", code]);
    return result.code === 0 ? result.stdout : null;
  }

  /** `weft VERB … -o json` on the box's admin socket. */
  async admin<T>(...args: string[]): Promise<T> {
    const result = await this.host.run([process.execPath, run, "weft", "--data", this.data, ...args, "-o", "json"]);
    if (result.code !== 0) throw new Error(`weft ${args.join(" ")} ended with ${result.code}: ${result.stderr.trim()}`);
    return JSON.parse(result.stdout || "null") as T;
  }

  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    this.process.kill(signal);
    await this.process.exited;
  }

  /** A reusable pre-auth key of a fresh user. */
  async key(...args: string[]): Promise<string> {
    const user = await this.admin<{ id: string | number }>("users", "create", `u${crypto.randomUUID().slice(0, 8)}`);
    return (await this.admin<{ key: string }>("preauthkeys", "create", "--user", `${user.id}`, "--reusable", ...args))
      .key;
  }
}

export interface PeerStatus {
  ID: string;
  HostName: string;
  DNSName: string;
  TailscaleIPs: string[] | null;
  CurAddr: string;
  Relay: string;
  Online: boolean;
  LastHandshake: string;
}

export interface Status {
  BackendState: string;
  TailscaleIPs: string[] | null;
  Self: PeerStatus;
  Peer: Record<string, PeerStatus> | null;
}

/** Commands of a shell, of which each must succeed. */
export async function shell(host: Host, commands: string): Promise<void> {
  const { code, stderr } = await host.run(["sh", "-ec", commands]);
  if (code !== 0) throw new Error(`${commands} on ${host.name}: ${stderr}`);
}

/** A member of the tailnet: a Weft node or an official client, asked in the same words. */
export abstract class Member {
  process!: Daemon;
  ip4 = "";
  ip6 = "";

  constructor(
    readonly host: Host,
    readonly dir: string,
    readonly socket: string,
  ) {
    mkdirSync(dir, { recursive: true });
  }

  get name(): string {
    return this.host.name;
  }

  /** The client program with its arguments, `tailscale …` or `weft …`. */
  abstract cli(...args: string[]): string[];
  abstract start(): Promise<void>;
  abstract up(url: string, key: string): Promise<void>;

  /** What the client program printed. Throws with what it says when it fails. */
  async run(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.host.run(this.cli(...args));
    if (code !== 0) throw new Error(`${args.join(" ")} on ${this.name}: ${stderr}${stdout}`);
    return stdout;
  }

  async status(): Promise<Status | null> {
    const result = await this.host.run(this.cli("status", "--json"));
    return result.code === 0 && result.stdout ? (JSON.parse(result.stdout) as Status) : null;
  }

  async running(seconds = 60): Promise<void> {
    const status = await until(
      `${this.name} is Running`,
      async () => {
        await stillRuns(`${this.name}'s daemon`, this.process);
        const s = await this.status();
        if (s?.BackendState !== "Running")
          throw new Error(`state ${s?.BackendState}; log: ${this.process.output().slice(-600)}`);
        return s.TailscaleIPs?.length ? s : null;
      },
      seconds,
      200,
    );
    this.ip4 = status.TailscaleIPs!.find((ip) => !ip.includes(":")) ?? "";
    this.ip6 = status.TailscaleIPs!.find((ip) => ip.includes(":")) ?? "";
  }

  async peer(other: Member): Promise<PeerStatus | null> {
    const status = await this.status();
    return Object.values(status?.Peer ?? {}).find((p) => p.TailscaleIPs?.includes(other.ip4)) ?? null;
  }

  /** direct: a confirmed UDP address; relay: none, but the peer's home is known. */
  async pathTo(other: Member): Promise<"direct" | "relay" | "none"> {
    const p = await this.peer(other);
    return !p ? "none" : p.CurAddr ? "direct" : p.Relay ? "relay" : "none";
  }

  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    this.process.kill(signal);
    await this.process.exited;
  }

  /**
   * After a login that was refused: an official daemon asks again and again, and each refusal that it hears ends whichever `up`
   * runs just then, also one of another login.
   */
  async restart(): Promise<void> {
    await this.stop();
    await this.start();
  }
}

/** All echo requests are answered, however late. */
export async function answers(from: Host, ip: string, count = 5): Promise<void> {
  const { received } = await ping(from, ip, { count, intervalMs: 50, timeoutMs: 30_000 });
  if (received !== count) throw new Error(`${ip} has answered ${received} of ${count} pings of ${from.name}`);
}

export class WeftNode extends Member {
  tun = "weft0";
  private joinFlags: string[] = [];

  constructor(
    host: Host,
    dir: string,
    private readonly env: Record<string, string> = {},
  ) {
    super(host, dir, join(dir, "weft.sock"));
  }

  cli(...args: string[]): string[] {
    return [process.execPath, run, "weft", "--socket", this.socket, ...args];
  }

  async start(): Promise<void> {
    const flags = ["--statedir", this.dir, "--socket", this.socket, "--tun", this.tun];
    this.process = new Daemon(this.host, [process.execPath, run, "node", ...flags, ...this.joinFlags], this.env);
  }

  /** Starts the daemon with the login flags: a Weft node comes up at once. */
  async up(url: string, key: string): Promise<void> {
    this.joinFlags = ["--login-server", url, "--auth-key", key, "--hostname", this.name];
    await this.start();
    await this.running();
  }
}

export class Tailscaled extends Member {
  tun = "tailscale0";
  /** More arguments of the daemon. */
  flags: string[] = [];

  constructor(
    host: Host,
    dir: string,
    readonly version: string,
    private readonly env: Record<string, string> = {},
  ) {
    super(host, dir, join(dir, "ts.sock"));
  }

  cli(...args: string[]): string[] {
    return [peer("tailscale", this.version)!, `--socket=${this.socket}`, ...args];
  }

  async start(): Promise<void> {
    this.process = new Daemon(
      this.host,
      [
        peer("tailscaled", this.version)!,
        `--statedir=${this.dir}`,
        `--socket=${this.socket}`,
        `--tun=${this.tun}`,
        "--no-logs-no-support",
        ...this.flags,
      ],
      { TS_NO_LOGS_NO_SUPPORT: "1", TS_DEBUG_FIREWALL_MODE: "nftables", ...this.env },
    );
    const isAnswering = async () => {
      await stillRuns(`${this.name}'s daemon`, this.process);
      return (await this.status()) !== null;
    };
    await until(`${this.name}'s daemon answers`, isAnswering, 60, 200);
  }

  async up(url: string, key: string): Promise<void> {
    await this.start();
    const result = await this.host.run(
      this.cli(
        "up",
        `--login-server=${url}`,
        `--auth-key=${key}`,
        `--hostname=${this.name}`,
        "--accept-dns=false",
        "--timeout=50s",
      ),
    );
    if (result.code !== 0)
      throw new Error(
        `tailscale up on ${this.name}: ${result.stderr}${result.stdout}; log: ${this.process.output().slice(-1500)}`,
      );
    await this.running();
  }
}

/** Waits, with a packet now and then to keep both sides at it, until each sees the other by this path. */
export async function pathIs(path: "direct" | "relay", a: Member, b: Member): Promise<void> {
  await until(
    `${a.name} and ${b.name} reach each other by a ${path} path`,
    async () => {
      await ping(a.host, b.ip4, { count: 1, intervalMs: 10 });
      const [there, back] = [await a.pathTo(b), await b.pathTo(a)];
      if (there !== path || back !== path) {
        // "none" may be a status that was not to be had, a peer that is not in it, or one without a home.
        const known = [await a.peer(b), await b.peer(a)].map(
          (p) => p && { CurAddr: p.CurAddr, Relay: p.Relay, Online: p.Online },
        );
        throw new Error(`now ${there} / ${back}: ${JSON.stringify(known)}`);
      }
      return true;
    },
    120,
    200,
  );
}

/** A CA and a server certificate for an IP address and maybe names, made by openssl. */
export async function certificate(
  dir: string,
  ip: string,
  ...names: string[]
): Promise<{ ca: string; cert: string; key: string }> {
  const file = (name: string) => join(dir, name);
  const subjects = [`IP:${ip}`, ...names.map((name) => `DNS:${name}`)];
  await Bun.write(file("san"), `subjectAltName=${subjects}\nextendedKeyUsage=serverAuth\n`);
  const ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  for (const args of [
    [
      "req",
      "-x509",
      ...ec,
      "-keyout",
      file("ca.key"),
      "-out",
      file("ca.pem"),
      "-days",
      "2",
      "-subj",
      "/CN=weft test CA",
    ],
    ["req", ...ec, "-keyout", file("server.key"), "-out", file("server.csr"), "-subj", `/CN=${ip}`],
    [
      "x509",
      "-req",
      "-in",
      file("server.csr"),
      "-CA",
      file("ca.pem"),
      "-CAkey",
      file("ca.key"),
      "-CAcreateserial",
      "-out",
      file("server.pem"),
      "-days",
      "2",
      "-extfile",
      file("san"),
    ],
  ]) {
    const result = Bun.spawnSync(["openssl", ...args], { stdout: "pipe", stderr: "pipe" });
    if (result.exitCode !== 0) throw new Error(`openssl ${args[0]}: ${result.stderr}`);
  }
  return { ca: file("ca.pem"), cert: file("server.pem"), key: file("server.key") };
}

export type { Host, Lab };
