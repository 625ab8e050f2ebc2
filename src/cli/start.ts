// `bun run start`: the main job on one machine. A box (control + relay + STUN) and two nodes, each a host in a network namespace
// of its own, joined with a pre-auth key and talking through real TUN devices; then what was measured, as a table.
import { accessSync, constants, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { Daemon } from "../../lab/daemon.ts";
import { ping, rss, tcpThroughput } from "../../lab/measure.ts";
import { type Host, Lab } from "../../lab/network.ts";
import { parseFlags } from "./flags.ts";
import { table } from "./output.ts";

const run = resolve(import.meta.dir, "../../tools/run.ts");
const INSIDE = "WEFT_START_INSIDE";

const usage = `usage: bun run start [--seconds N] [--json]
Shows the main job: a box and two nodes in network namespaces of this machine, over real TUN devices.
  --seconds N   how long each throughput measurement takes (default 5)
  --json        print the result as JSON`;

interface PathRow {
  path: string;
  via: string;
  ping_p50_ms: number;
  ping_p99_ms: number;
  tcp_mbit_s: number;
}

interface Result {
  handshake_ms: number;
  paths: PathRow[];
  memory_mb: Record<string, number>;
}

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("start", argv, { seconds: "number", json: "boolean", help: "boolean" }, usage);
  if (flags.help) {
    console.log(usage);
    return 0;
  }
  const refusal = privileges();
  if (refusal === "reexec") return reexec(argv);
  if (refusal) {
    console.error(`weft start: ${refusal}`);
    return 1;
  }
  return demo(flags.seconds ?? 5, flags.json ?? false);
}

/** null: go on here. "reexec": go on as root of a user namespace. Else the sentence that says what refuses. */
function privileges(): string | null {
  try {
    accessSync("/dev/net/tun", constants.R_OK | constants.W_OK);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === "ENOENT")
      return "there is no /dev/net/tun: load it with `modprobe tun`, or give the container `--device /dev/net/tun`.";
    return `/dev/net/tun refuses this user (${code}): run as root, or let this user read and write it.`;
  }
  if (process.env[INSIDE] || process.getuid?.() === 0) return null;
  const probe = Bun.spawnSync(["unshare", "-Urnm", "true"], { stdout: "ignore", stderr: "pipe" });
  if (probe.exitCode === 0) return "reexec";
  return `the kernel refuses user namespaces to this user (${`${probe.stderr}`.trim() || "unshare failed"}), though /dev/net/tun is open to it: run as root, or allow unprivileged user namespaces.`;
}

/** Without root: the same command as root of a user namespace with its own network, mounts and /run. */
async function reexec(argv: string[]): Promise<number> {
  const child = Bun.spawn(
    [
      "unshare",
      "-Urnm",
      "sh",
      "-c",
      'mount -t tmpfs weft /run && exec "$0" "$@"',
      process.execPath,
      run,
      "start",
      ...argv,
    ],
    { stdin: "ignore", stdout: "inherit", stderr: "inherit", env: { ...process.env, [INSIDE]: "1" } },
  );
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => child.kill(signal));
  return child.exited;
}

async function demo(seconds: number, json: boolean): Promise<number> {
  const started = performance.now();
  const say = (text: string) =>
    console.error(`[${((performance.now() - started) / 1000).toFixed(1).padStart(5)} s] ${text}`);
  const data = mkdtempSync(join(tmpdir(), "weft-start-"));
  let lab: Lab | undefined;
  let closing: Promise<void> | undefined;
  const close = () => {
    closing ??= (async () => {
      await lab?.close();
      rmSync(data, { recursive: true, force: true });
    })();
    return closing;
  };
  for (const [signal, code] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGHUP", 129],
  ] as const) {
    process.on(signal, () => {
      say(`${signal}: cleaning up`);
      close().finally(() => process.exit(code));
    });
  }
  try {
    say("making three hosts in network namespaces, behind one router");
    lab = await Lab.create("start");
    const [boxHost, a, b] = [await lab.host("box"), await lab.host("alpha"), await lab.host("beta")];

    const url = `http://${boxHost.ip4}:8080`;
    say(`starting the box (control, relay, STUN) at ${url}`);
    const boxData = join(data, "box");
    const box = new Daemon(boxHost, [
      process.execPath,
      run,
      "box",
      "--data",
      boxData,
      "--listen",
      `${boxHost.ip4}:8080`,
      "--url",
      url,
    ]);
    await until("the box answers /key", 20, async () => (await curl(boxHost, `${url}/key?v=140`)) !== null, box);

    const weft = async (...args: string[]) => {
      const result = await boxHost.run([process.execPath, run, "weft", "--data", boxData, ...args]);
      if (result.code !== 0) throw new Error(`weft ${args.join(" ")}: ${result.stderr.trim()}`);
      return result.stdout;
    };
    const user = JSON.parse(await weft("users", "create", "demo", "-o", "json")) as { id: string | number };
    const key = JSON.parse(await weft("preauthkeys", "create", "--user", `${user.id}`, "--reusable", "-o", "json")) as {
      key: string;
    };

    say("starting two nodes and joining them with a pre-auth key");
    const alpha = startNode(a, join(data, "alpha"), url, key.key);
    const beta = startNode(b, join(data, "beta"), url, key.key);
    await until(
      "both nodes see each other",
      30,
      async () => (await alpha.peer(beta)) !== null && (await beta.peer(alpha)) !== null,
      alpha.process,
      beta.process,
    );
    const target = await beta.ip();
    say(`joined: ${await alpha.ip()} and ${target}`);

    const result: Result = { handshake_ms: 0, paths: [], memory_mb: {} };
    const measure = async (path: "direct" | "relay") => {
      await until(`the path is ${path}`, 30, async () => {
        await ping(a, target, { count: 1, intervalMs: 10 });
        const peer = await alpha.peer(beta);
        return peer !== null && (peer.CurAddr !== "") === (path === "direct");
      });
      const peer = (await alpha.peer(beta))!;
      const via = path === "direct" ? peer.CurAddr : `DERP(${peer.Relay})`;
      say(`${path} path via ${via}: 50 pings`);
      const rtt = await ping(a, target, { count: 50, intervalMs: 20 });
      say(`${path} path: TCP for ${seconds} s`);
      const tcp = await tcpThroughput(a, b, { seconds, address: target });
      result.paths.push({ path, via, ping_p50_ms: rtt.p50, ping_p99_ms: rtt.p99, tcp_mbit_s: tcp.mbps });
      return peer;
    };
    const peer = await measure("direct");
    result.handshake_ms = peer.HandshakeMS ?? 0;
    say("blocking UDP at the router: only the relay is left");
    lab.blockUdp();
    await measure("relay");
    result.memory_mb = {
      box: rss(box.pid) / 1024,
      "node alpha": rss(alpha.process.pid) / 1024,
      "node beta": rss(beta.process.pid) / 1024,
    };
    lab.unblockUdp();

    print(result, json);
    return 0;
  } catch (error) {
    console.error(`weft start: ${error instanceof Error ? error.message : error}`);
    return 1;
  } finally {
    say("cleaning up");
    await close();
  }
}

interface PeerStatus {
  CurAddr: string;
  Relay: string;
  /** Milliseconds from the first initiation to the session, Weft's own field. */
  HandshakeMS?: number;
}

interface Node {
  process: Daemon;
  ip(): Promise<string>;
  peer(other: Node): Promise<PeerStatus | null>;
}

function startNode(host: Host, dir: string, url: string, key: string): Node {
  mkdirSync(dir, { recursive: true });
  const socket = join(dir, "weft.sock");
  const flags = [
    "--statedir",
    dir,
    "--socket",
    socket,
    "--login-server",
    url,
    "--auth-key",
    key,
    "--hostname",
    host.name,
  ];
  const child = new Daemon(host, [process.execPath, run, "node", ...flags]);
  const status = async () => {
    const result = await host.run([process.execPath, run, "weft", "--socket", socket, "status", "--json"]);
    return result.code === 0
      ? (JSON.parse(result.stdout) as {
          TailscaleIPs: string[] | null;
          Peer: Record<string, PeerStatus & { TailscaleIPs: string[] }>;
        })
      : null;
  };
  return {
    process: child,
    ip: async () => (await status())?.TailscaleIPs?.[0] ?? "",
    peer: async (other) => {
      const address = await other.ip();
      return (
        Object.values((await status())?.Peer ?? {}).find((p) => address !== "" && p.TailscaleIPs.includes(address)) ??
        null
      );
    },
  };
}

/** Asks from inside the host: nothing of the demonstration is reachable from outside its namespaces. */
async function curl(host: Host, url: string): Promise<string | null> {
  const code = `const r = await fetch(${JSON.stringify(url)}, { signal: AbortSignal.timeout(2000) }); if (!r.ok) process.exit(1); console.log(await r.text());`;
  const result = await host.run([process.execPath, "-e", code]);
  return result.code === 0 ? result.stdout : null;
}

async function until(what: string, seconds: number, done: () => Promise<boolean>, ...alive: Daemon[]): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  for (;;) {
    const dead = alive.find((child) => child.exitCode !== null);
    if (dead) throw new Error(`a process ended while waiting until ${what}: ${dead.lastLine()}`);
    if (await done()) return;
    if (performance.now() > deadline) throw new Error(`waited ${seconds} s in vain until ${what}`);
    await Bun.sleep(100);
  }
}

function print(result: Result, json: boolean): void {
  if (json) {
    console.log(JSON.stringify(result, null, 2));
    return;
  }
  const fixed = (value: number, digits: number) => value.toFixed(digits);
  console.log(
    table(
      ["path", "via", "ping p50", "ping p99", "TCP"],
      result.paths.map((p) => [
        p.path,
        p.via,
        `${fixed(p.ping_p50_ms, 2)} ms`,
        `${fixed(p.ping_p99_ms, 2)} ms`,
        `${fixed(p.tcp_mbit_s, 0)} Mbit/s`,
      ]),
    ),
  );
  const memory = Object.entries(result.memory_mb).map(([name, mb]) => [`memory of ${name}`, `${fixed(mb, 0)} MB`]);
  console.log(
    `\n${table(["measure", "value"], [["WireGuard handshake", `${fixed(result.handshake_ms, 1)} ms`], ...memory])}`,
  );
}
