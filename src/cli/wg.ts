// `bun run wg IFACE`: a WireGuard device in user space, a drop-in for `wireguard-go -f IFACE`. It makes the TUN device and
// serves the configuration socket that wg(8) and wg-quick(8) speak to (src/wire/uapi.ts), until a signal comes, the device
// is deleted or the socket file is removed.
import { type ChildProcess, spawn } from "node:child_process";
import {
  chmodSync,
  closeSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  watch,
} from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { Netlink } from "../../ffi/netlink.ts";
import { releaseProgramCode } from "../../ffi/process.ts";
import { peerCredentials } from "../../ffi/unix.ts";
import type { Datapath, DatapathOptions } from "../datapath/api.ts";
import { MAX_WORKERS, startDatapath } from "../datapath/datapath.ts";
import { EINVAL, formatDump, formatErrno, UapiReader, type UapiRequest } from "../wire/uapi.ts";
import { parseFlags, UsageError } from "./flags.ts";

const RUN = resolve(import.meta.dir, "../../tools/run.ts");
const SOCKET_DIR = "/var/run/wireguard";
const DEFAULT_MTU = 1420;
const MAX_CONNECTIONS = 64;
/** A client that says nothing for so long is let go. */
const IDLE_MS = 60_000;
/** After so long what was only needed to start is given back. */
const SETTLED_MS = 1000;
const START_DEADLINE_MS = 20_000;
/** Set for the process that --background starts: nobody reads its standard error once it is up. */
const BACKGROUND = "WEFT_WG_BACKGROUND";

const usage = `usage: bun run wg [-f] [--mtu N] [--workers N] [--no-tun-tso] [--no-tun-uso] [--no-udp-gso] [--no-udp-gro] IFACE
A WireGuard device in user space, configured by wg(8) and wg-quick(8) through ${SOCKET_DIR}/IFACE.sock.
  -f, --foreground   stay in front (always so; bin/weft-wg goes to the background without it)
  --mtu N            MTU of the device (default ${DEFAULT_MTU})
  --workers N        threads: 1, 2 (default from 3 processors on), up to ${MAX_WORKERS} with helpers for the ciphers
  --no-...           do not use this offload
LOG_LEVEL=silent|error|verbose says what goes to standard error (default error).`;

type Level = "silent" | "error" | "verbose";

interface Log {
  error(text: string): void;
  verbose(text: string): void;
}

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "wg",
    argv,
    {
      foreground: { kind: "boolean", short: "f" },
      background: "boolean",
      mtu: "number",
      workers: "number",
      "no-tun-tso": "boolean",
      "no-tun-uso": "boolean",
      "no-udp-gso": "boolean",
      "no-udp-gro": "boolean",
      help: "boolean",
    },
    usage,
    1,
  );
  if (flags.help) {
    console.log(usage);
    return 0;
  }
  const name = flags._[0];
  if (name === undefined) throw new UsageError(`the name of the device is missing (${usage.split("\n")[0]})`);
  const mtu = flags.mtu ?? DEFAULT_MTU;
  if (!Number.isInteger(mtu) || mtu < 576 || mtu > 65535)
    throw new UsageError(`--mtu takes a number from 576 to 65535, not ${mtu}`);
  const { workers } = flags;
  if (workers !== undefined && !(Number.isInteger(workers) && workers >= 1))
    throw new UsageError(`--workers takes a whole number from 1 on, not ${workers}`);
  if (flags.background) return background(name, argv);
  const offload = {
    tunTso: !flags["no-tun-tso"],
    tunUso: !flags["no-tun-uso"],
    udpGso: !flags["no-udp-gso"],
    udpGro: !flags["no-udp-gro"],
  };
  const log = makeLog(name);
  if (workers !== undefined && workers > MAX_WORKERS)
    log.error(`--workers ${workers}: more than ${MAX_WORKERS} bring nothing, so ${MAX_WORKERS} are used`);
  return serve(name, { mtu, offload, ...(workers !== undefined && { workers }) }, log);
}

function makeLog(name: string): Log {
  const text = process.env.LOG_LEVEL ?? "error";
  const level: Level =
    text === "silent" || text === "verbose" || text === "debug" ? (text === "silent" ? text : "verbose") : "error";
  const write = (word: string, line: string) => {
    if (!process.env[BACKGROUND]) process.stderr.write(`${word}: (${name}) ${line}\n`);
  };
  return {
    error: (line) => level !== "silent" && write("ERROR", line),
    verbose: (line) => level === "verbose" && write("DEBUG", line),
  };
}

type Settings = Pick<DatapathOptions, "mtu" | "offload" | "workers">;

async function serve(name: string, settings: Settings, log: Log): Promise<number> {
  let end!: (status: number) => void;
  const ended = new Promise<number>((resolve) => {
    end = resolve;
  });
  const datapath = await startDatapath(
    { tun: name, port: 0, mode: "wg", ...settings },
    {
      onHandshake: (_peer, ms, initiator) =>
        log.verbose(`handshake in ${ms.toFixed(1)} ms as ${initiator ? "initiator" : "responder"}`),
      onFatal: (reason) => {
        // Who deletes the device wants us to end.
        if (deviceExists(name)) log.error(reason);
        else log.verbose(reason);
        end(deviceExists(name) ? 1 : 0);
      },
    },
  );
  let socket: UapiSocket | null = null;
  const onSignal = () => end(0);
  process.on("SIGINT", onSignal);
  process.on("SIGTERM", onSignal);
  try {
    socket = await UapiSocket.open(join(SOCKET_DIR, `${datapath.tunName}.sock`), datapath, log, () => end(0));
    setTimeout(() => {
      Bun.gc(true);
      releaseProgramCode();
    }, SETTLED_MS).unref();
    log.verbose(`device is up, UDP port ${datapath.port()}, socket ${socket.path}`);
    return await ended;
  } finally {
    process.off("SIGINT", onSignal);
    process.off("SIGTERM", onSignal);
    socket?.close();
    await datapath.close();
  }
}

function deviceExists(name: string): boolean {
  using netlink = new Netlink();
  return netlink.link(name) !== null;
}

/** The configuration socket: a file that only root may open; removing the file ends the device. */
class UapiSocket {
  readonly path: string;
  readonly #server: Server;
  readonly #inode: number;
  readonly #stop: () => void;
  readonly #connections = new Set<Socket>();

  private constructor(path: string, server: Server, connections: Set<Socket>, onRemoved: () => void) {
    this.path = path;
    this.#server = server;
    this.#connections = connections;
    this.#inode = lstatSync(path).ino;
    const check = () => {
      if (!this.#isOurs()) onRemoved();
    };
    const watcher = watch(SOCKET_DIR, check);
    watcher.on("error", check);
    this.#stop = () => watcher.close();
  }

  static async open(path: string, datapath: Datapath, log: Log, onRemoved: () => void): Promise<UapiSocket> {
    mkdirSync(SOCKET_DIR, { recursive: true, mode: 0o700 });
    // The device is ours alone, so a file that is still there belongs to a process that has died.
    rmSync(path, { force: true });
    const connections = new Set<Socket>();
    const server = createServer({ allowHalfOpen: true }, (connection) => {
      connections.add(connection);
      connection.on("close", () => connections.delete(connection));
      answer(connection, datapath, log);
    });
    server.maxConnections = MAX_CONNECTIONS;
    const mask = process.umask(0o077);
    try {
      await new Promise<void>((resolve, reject) => {
        server.once("error", reject);
        server.listen(path, resolve);
      });
    } catch (error) {
      throw new Error(`the configuration socket ${path} cannot be made: ${(error as Error).message}`);
    } finally {
      process.umask(mask);
    }
    chmodSync(path, 0o600);
    return new UapiSocket(path, server, connections, onRemoved);
  }

  #isOurs(): boolean {
    try {
      return lstatSync(this.path).ino === this.#inode;
    } catch {
      return false;
    }
  }

  close(): void {
    this.#stop();
    if (this.#isOurs()) rmSync(this.path, { force: true });
    this.#server.close();
    for (const connection of this.#connections) connection.destroy();
  }
}

/** Answers the requests of one connection, in order. */
function answer(connection: Socket, datapath: Datapath, log: Log): void {
  const reader = new UapiReader();
  let queue: Promise<void> = Promise.resolve();
  const take = (requests: UapiRequest[], last: boolean) => {
    queue = queue.then(async () => {
      for (const request of requests) {
        connection.write(await respond(request, datapath, log));
        if (request.type === "error" && request.fatal) last = true;
      }
      if (last) connection.end();
      else connection.resume();
    });
    queue.catch(() => connection.destroy());
  };
  connection.setTimeout(IDLE_MS, () => connection.destroy());
  connection.on("data", (chunk: Buffer) => {
    // One piece at a time: what a client sends waits in its own socket buffer.
    connection.pause();
    take(reader.push(chunk), false);
  });
  connection.on("end", () => take(reader.end(), true));
  connection.on("error", () => connection.destroy());
}

async function respond(request: UapiRequest, datapath: Datapath, log: Log): Promise<string> {
  if (request.type === "error") {
    log.error(`configuration refused: ${request.reason}`);
    return formatErrno(request.errno);
  }
  try {
    if (request.type === "get") return formatDump(await datapath.dump());
    await datapath.configure(request.update);
    return formatErrno(0);
  } catch (error) {
    log.error(`configuration refused: ${(error as Error).message}`);
    const { errno } = error as { errno?: unknown };
    return formatErrno(typeof errno === "number" ? errno : EINVAL);
  }
}

/** Starts the device in a session of its own; returns once its socket answers. */
async function background(name: string, argv: string[]): Promise<number> {
  const dir = mkdtempSync(join(tmpdir(), "weft-wg-"));
  const errors = join(dir, "stderr");
  const fd = openSync(errors, "w", 0o600);
  try {
    const rest = argv.filter((arg) => !/^--?(background|foreground|f)(=.*)?$/.test(arg));
    const child = spawn(process.execPath, [RUN, "wg", "--foreground", ...rest], {
      cwd: "/",
      detached: true,
      env: { ...process.env, [BACKGROUND]: "1" },
      stdio: ["ignore", "ignore", fd],
    });
    const failed = await started(child, join(SOCKET_DIR, `${name}.sock`));
    if (failed === null) {
      child.unref();
      return 0;
    }
    process.stderr.write(readFileSync(errors, "utf8") || `weft wg: ${failed}\n`);
    return 1;
  } finally {
    closeSync(fd);
    rmSync(dir, { recursive: true, force: true });
  }
}

/** Null when the socket answers, else why it does not. */
async function started(child: ChildProcess, path: string): Promise<string | null> {
  let ended: string | null = null;
  child.on("exit", (status, signal) => {
    ended = `the device ended at once (${signal ?? `status ${status}`})`;
  });
  child.on("error", (error) => {
    ended = `the device cannot be started: ${error.message}`;
  });
  const deadline = Date.now() + START_DEADLINE_MS;
  while (ended === null && Date.now() < deadline) {
    if (child.pid !== undefined && (await answers(path, child.pid))) return null;
    await Bun.sleep(20);
  }
  if (ended !== null) return ended;
  child.kill("SIGTERM");
  return `the device did not answer on ${path} within ${START_DEADLINE_MS / 1000} s`;
}

/** Whether `get` is answered on the socket, by this process and not by another instance. */
function answers(path: string, pid: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path);
    const done = (result: boolean) => {
      socket.destroy();
      resolve(result);
    };
    socket.on("connect", () => {
      if (peerCredentials(socket).pid === pid) socket.write("get=1\n\n");
      else done(false);
    });
    socket.on("data", () => done(true));
    socket.on("close", () => done(false));
    socket.on("error", () => done(false));
    socket.setTimeout(1000, () => done(false));
  });
}
