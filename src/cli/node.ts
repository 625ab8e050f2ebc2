// `bun run node`: the daemon, with tailscaled's flags.
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Netlink } from "../../ffi/netlink.ts";
import { parseServerUrl } from "../net/ts2021-client.ts";
import { Daemon } from "../node/daemon.ts";
import { isSocketAlive } from "../node/local-api.ts";
import { cleanUp } from "../node/router.ts";
import { isHostname, type Prefs } from "../node/state.ts";
import { VERSION } from "../node/version.ts";
import { parseFlags, UsageError } from "./flags.ts";

export const DEFAULT_SOCKET = "/run/weft/weft.sock";
const DEFAULT_STATE_DIR = "/var/lib/weft/node";
const DEFAULT_TUN = "weft0";
const STATE_FILE = "weft.state";
const CLOSE_TIMEOUT = 2000;

const USAGE = `Usage: bun run node [flags]

The node daemon: joins a tailnet and carries its traffic.

  --login-server URL   control server, for example https://weft.example.com; with it the node comes up at once
  --auth-key KEY       pre-auth key, or file:PATH
  --hostname NAME      name in the tailnet (default: this host's name)
  --state FILE         state file, or mem: for an ephemeral node that keeps nothing
  --statedir DIR       folder for the state file weft.state (default ${DEFAULT_STATE_DIR})
  --socket PATH        socket of the local API (default ${DEFAULT_SOCKET})
  --tun NAME           TUN device (default ${DEFAULT_TUN})
  --port PORT          UDP port; 0 picks a free one (default $PORT or 0)
  --verbose N          1 logs what is only of interest when something goes wrong (default 0)
  --cleanup            remove what a killed daemon has left behind, and end
  --no-logs-no-support accepted for tailscaled's sake: Weft never uploads logs
  --version            print the version`;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "bun run node",
    argv,
    {
      "login-server": "string",
      "auth-key": "string",
      authkey: "string",
      hostname: "string",
      state: "string",
      statedir: "string",
      socket: "string",
      tun: "string",
      port: "number",
      verbose: "number",
      cleanup: "boolean",
      "no-logs-no-support": "boolean",
      version: "boolean",
      help: { kind: "boolean", short: "h" },
    },
    USAGE,
  );
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  if (flags.version) {
    console.log(VERSION);
    return 0;
  }
  const socket = resolve(flags.socket ?? DEFAULT_SOCKET);
  if (flags.cleanup) return await cleanup(socket);

  const port = flags.port ?? Number(process.env.PORT || 0);
  if (!Number.isInteger(port) || port < 0 || port > 65535)
    throw new UsageError(`--port ${port} is no UDP port: give 0 to 65535`);
  const prefs: Partial<Prefs> = {};
  if (flags["login-server"] !== undefined) prefs.ControlURL = parseServerUrl(flags["login-server"]).origin;
  if (flags.hostname !== undefined) prefs.Hostname = checkHostname(flags.hostname);
  const verbose = (flags.verbose ?? 0) > 0;

  const ended = untilSignal();
  const daemon = await Daemon.start({
    ...statePlace(flags.state, flags.statedir),
    socket,
    tun: flags.tun ?? DEFAULT_TUN,
    port,
    prefs,
    authKey: readAuthKey(flags["auth-key"] ?? flags.authkey ?? ""),
    log: (level, message) => {
      if (level === "info" || verbose) console.error(`${new Date().toISOString()} ${message}`);
    },
  });
  console.log(`node ready: socket ${socket}`);
  const reason = await Promise.race([ended, daemon.fatal]);
  const closed = daemon.close().then(() => true);
  if (!(await Promise.race([closed, Bun.sleep(CLOSE_TIMEOUT).then(() => false)])))
    console.error("weft node: some of the clean-up did not end in time");
  if (reason === null || reason === "told to shut down") return 0;
  console.error(`weft node: ${reason}`);
  return 1;
}

/** Where the state lies; `stateDir` null: the folder is not ours to shut. */
export function statePlace(
  state: string | undefined,
  stateDir: string | undefined,
): { state: string; stateDir: string | null } {
  if (state === "mem:") return { state, stateDir: null };
  if (state) return { state: resolve(state), stateDir: stateDir === undefined ? null : resolve(stateDir) };
  const folder = resolve(stateDir ?? DEFAULT_STATE_DIR);
  return { state: join(folder, STATE_FILE), stateDir: folder };
}

/** A key, or file:PATH of one. Throws UsageError. */
export function readAuthKey(text: string): string {
  if (!text.startsWith("file:")) return text;
  const path = text.slice("file:".length);
  let key: string;
  try {
    key = readFileSync(path, "utf8").trim();
  } catch (error) {
    throw new UsageError(`the auth key file ${JSON.stringify(path)} cannot be read: ${(error as Error).message}`);
  }
  if (key === "" || /\s/.test(key))
    throw new UsageError(`the auth key file ${JSON.stringify(path)} holds no single key`);
  return key;
}

/** Throws UsageError. */
export function checkHostname(name: string): string {
  if (!isHostname(name))
    throw new UsageError(`--hostname ${JSON.stringify(name)} is no host name: letters, digits and "-", at most 63`);
  return name;
}

async function cleanup(socket: string): Promise<number> {
  if (await isSocketAlive(socket)) throw new Error(`a daemon is running on ${socket}: stop it, it cleans up by itself`);
  using netlink = new Netlink();
  cleanUp(netlink);
  return 0;
}

/** Null when a signal asks for the end. */
function untilSignal(): Promise<null> {
  return new Promise((end) => {
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => end(null));
  });
}
