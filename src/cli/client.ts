// The verbs of `weft` that speak to a running node, with the words of the tailscale CLI (spec/node-features.md, sections 9
// and 10): up, down, status, ping, ip, netcheck, version, and logout.
import { request } from "node:http";
import { parseServerUrl } from "../net/ts2021-client.ts";
import type { PingResultJson } from "../node/daemon.ts";
import { LOCAL_API_HOST } from "../node/local-api.ts";
import type { Prefs } from "../node/state.ts";
import type { PeerStatusJson, StatusJson } from "../node/status.ts";
import { VERSION } from "../node/version.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import { IGNORED_CONFIG, parseFlags, UsageError } from "./flags.ts";
import { checkHostname, DEFAULT_SOCKET, readAuthKey } from "./node.ts";
import { parseFormat, printableCell, serialize } from "./output.ts";

const CLIENT_VERBS = ["up", "down", "status", "ping", "ip", "netcheck", "version", "logout"] as const;
type ClientVerb = (typeof CLIENT_VERBS)[number];

const REQUEST_TIMEOUT = 30_000;
const POLL_MS = 100;

/** `argv`: a verb, with flags before and behind it. Exit status: 0 done, 1 not done; what was wrong stands on stderr. */
export async function main(argv: string[]): Promise<number> {
  const at = argv.findIndex(
    (arg, i) => (CLIENT_VERBS as readonly string[]).includes(arg) && !/^--?socket$/.test(argv[i - 1] ?? ""),
  );
  if (at < 0) throw new UsageError(`which command? It is one of ${CLIENT_VERBS.join(", ")}`);
  return await VERBS[argv[at] as ClientVerb](argv.toSpliced(at, 1));
}

const VERBS: Record<ClientVerb, (argv: string[]) => Promise<number>> = {
  up,
  down,
  status,
  ping,
  ip,
  netcheck,
  version,
  logout,
};

// ---- the daemon's socket ----

class DaemonClient {
  constructor(private readonly socket: string) {}

  /** Undefined for an answer without a body. Throws with one sentence. */
  async call<T>(method: string, path: string, body?: unknown): Promise<T> {
    const { status, text } = await this.send(method, path, body);
    if (status === 204) return undefined as T;
    if (status === 200) return JSON.parse(text) as T;
    let message = text;
    try {
      message = (JSON.parse(text) as { error?: string }).error ?? text;
    } catch {
      // Then the text itself is the message.
    }
    if (status === 403) throw new Error(`${message}: run this as root`);
    throw new Error(message || `the daemon answered with status ${status}`);
  }

  status(peers = true): Promise<StatusJson> {
    return this.call("GET", `status${peers ? "" : "?peers=false"}`);
  }

  private send(method: string, path: string, body: unknown): Promise<{ status: number; text: string }> {
    return new Promise((resolve, reject) => {
      const outgoing = request(
        {
          socketPath: this.socket,
          method,
          path: `/localapi/v0/${path}`,
          headers: { Host: LOCAL_API_HOST },
          timeout: REQUEST_TIMEOUT,
        },
        (answer) => {
          const parts: Uint8Array[] = [];
          answer.on("data", (chunk: Uint8Array) => parts.push(chunk));
          answer.on("end", () =>
            resolve({ status: answer.statusCode ?? 0, text: Buffer.concat(parts).toString("utf8") }),
          );
          answer.on("error", reject);
        },
      );
      outgoing.on("timeout", () => outgoing.destroy(new Error(`the daemon on ${this.socket} does not answer`)));
      outgoing.on("error", (error: NodeJS.ErrnoException) => {
        const gone = ["ENOENT", "ECONNREFUSED", "FailedToOpenSocket"].includes(error.code ?? "");
        reject(
          gone
            ? new Error(`no Weft node is running on ${this.socket}: start one with \`bun run node --login-server URL\``)
            : error,
        );
      });
      outgoing.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }
}

const COMMON = { socket: "string", help: { kind: "boolean", short: "h" } } as const;

/** By verb. */
export const FLAGS = {
  up: {
    ...COMMON,
    "login-server": "string",
    "auth-key": "string",
    authkey: "string",
    hostname: "string",
    reset: "boolean",
    "force-reauth": "boolean",
    timeout: "duration",
    json: "boolean",
  },
  down: COMMON,
  logout: COMMON,
  status: { ...COMMON, json: "boolean", active: "boolean", self: "boolean", peers: "boolean", header: "boolean" },
  ping: {
    ...COMMON,
    c: "number",
    timeout: "duration",
    "until-direct": "boolean",
    verbose: "boolean",
  },
  ip: { ...COMMON, "4": "boolean", "6": "boolean", "1": "boolean" },
  netcheck: { ...COMMON, format: "string" },
  version: { ...COMMON, ...IGNORED_CONFIG, daemon: "boolean", json: "boolean", output: { kind: "string", short: "o" } },
} as const;

function connect(flags: { socket?: string }): DaemonClient {
  return new DaemonClient(flags.socket ?? process.env.WEFT_SOCKET ?? DEFAULT_SOCKET);
}

// ---- up, down, logout ----

const UP_USAGE = `Usage: weft up [flags]

Connects this node to its tailnet. Settings that are not named stay as they are.

  --login-server URL   control server
  --auth-key KEY       pre-auth key, or file:PATH
  --hostname NAME      name in the tailnet
  --reset              settings that are not named go back to their defaults
  --force-reauth       leave the control server to which this node is logged in now
  --timeout DURATION   give up after this time (default: wait)
  --json               print the outcome as JSON`;

async function up(argv: string[]): Promise<number> {
  const flags = parseFlags("weft up", argv, FLAGS.up, UP_USAGE);
  if (flags.help) return print(UP_USAGE);
  const daemon = connect(flags);
  const before = await daemon.call<Prefs>("GET", "prefs");
  const { HaveNodeKey, BackendState } = await daemon.status(false);
  const server = flags["login-server"] === undefined ? before.ControlURL : parseServerUrl(flags["login-server"]).origin;
  if (HaveNodeKey && before.ControlURL !== "" && server !== before.ControlURL && !flags["force-reauth"])
    throw new UsageError(
      `this node is logged in to ${before.ControlURL}: add --force-reauth to leave it for ${server}`,
    );
  const prefs: Partial<Prefs> = { ControlURL: server };
  if (flags.hostname !== undefined || flags.reset) prefs.Hostname = checkHostname(flags.hostname ?? "");
  const authKey = readAuthKey(flags["auth-key"] ?? flags.authkey ?? "");
  await daemon.call("POST", "start", { AuthKey: authKey, UpdatePrefs: prefs });
  return await waitUntilRunning(daemon, flags.timeout ?? 0, flags.json ?? false, BackendState);
}

async function waitUntilRunning(daemon: DaemonClient, timeout: number, json: boolean, before: string): Promise<number> {
  const deadline = timeout > 0 ? Date.now() + timeout : Number.POSITIVE_INFINITY;
  let shownUrl = "";
  for (;;) {
    const { BackendState, AuthURL, Health } = await daemon.status(false);
    if (BackendState === "Running") {
      if (json) console.log(JSON.stringify({ BackendState }, null, 2));
      else if (shownUrl || before !== "Running") console.error("Success.");
      return 0;
    }
    if (AuthURL !== "" && AuthURL !== shownUrl) {
      shownUrl = AuthURL;
      if (json) console.log(JSON.stringify({ AuthURL, BackendState }, null, 2));
      else console.error(`\nTo authenticate, visit:\n\n\t${AuthURL}\n`);
    }
    if (BackendState === "NeedsLogin" && AuthURL === "") {
      console.error(Health.at(-1) ?? "the control server does not let this node in");
      return 1;
    }
    if (BackendState === "NeedsMachineAuth" && shownUrl !== "approval") {
      shownUrl = "approval";
      console.error("\nTo approve your machine, ask the administrator of the tailnet.\n");
    }
    if (Date.now() > deadline) {
      console.error(`not connected after ${timeout / 1000} s: ${Health.at(-1) ?? `the state is ${BackendState}`}`);
      return 1;
    }
    await Bun.sleep(POLL_MS);
  }
}

const DOWN_USAGE = `Usage: weft down

Disconnects this node from its tailnet; it stays logged in.`;

async function down(argv: string[]): Promise<number> {
  const flags = parseFlags("weft down", argv, FLAGS.down, DOWN_USAGE);
  if (flags.help) return print(DOWN_USAGE);
  const daemon = connect(flags);
  if (!(await daemon.call<Prefs>("GET", "prefs")).WantRunning) {
    console.error("Weft was already stopped.");
    return 0;
  }
  await daemon.call("PATCH", "prefs", { WantRunning: false, WantRunningSet: true });
  return 0;
}

const LOGOUT_USAGE = `Usage: weft logout

Disconnects this node and ends its login.`;

async function logout(argv: string[]): Promise<number> {
  const flags = parseFlags("weft logout", argv, FLAGS.logout, LOGOUT_USAGE);
  if (flags.help) return print(LOGOUT_USAGE);
  await connect(flags).call("POST", "logout");
  return 0;
}

// ---- status ----

const STATUS_USAGE = `Usage: weft status [flags]

  --json     everything, as JSON
  --active   only peers with an active session
  --self     this node's own line (default true)
  --peers    the peers' lines (default true)
  --header   name the columns`;

async function status(argv: string[]): Promise<number> {
  const flags = parseFlags("weft status", argv, FLAGS.status, STATUS_USAGE);
  if (flags.help) return print(STATUS_USAGE);
  const full = await connect(flags).status(flags.peers ?? true);
  if (flags.json) {
    if (flags.active && full.Peer)
      full.Peer = Object.fromEntries(Object.entries(full.Peer).filter(([, peer]) => peer.Active));
    process.stdout.write(JSON.stringify(full, null, 2));
    return 0;
  }
  const stopped = stoppedText(full);
  if (stopped !== null) return print(stopped, 1);
  const rows = flags.header
    ? [
        ["# IP", "Hostname", "Owner", "OS", "Status"],
        ["# --", "--------", "-----", "--", "------"],
      ]
    : [];
  if (flags.self ?? true) rows.push(statusRow(full, full.Self, true));
  const peers = Object.values(full.Peer ?? {}).sort((a, b) => compareText(sortKey(a), sortKey(b)));
  for (const peer of peers) if (!flags.active || peer.Active) rows.push(statusRow(full, peer, false));
  console.log(formatColumns(rows));
  if (full.Health.length > 0)
    console.log(`\n# Health check:\n${full.Health.map((message) => `#     - ${message}`).join("\n")}`);
  return 0;
}

/** What stands in place of the table while the node is not up; null when it is. */
export function stoppedText({ BackendState, AuthURL, Health }: StatusJson): string | null {
  switch (BackendState) {
    case "Running":
    case "Starting":
      return null;
    case "Stopped":
      return "Weft is stopped.";
    case "NeedsLogin":
      return ["Logged out.", ...(AuthURL ? [`Log in at: ${AuthURL}`] : Health)].join("\n");
    case "NeedsMachineAuth":
      return "Machine is not yet approved by tailnet admin.";
    default:
      return `unexpected state: ${BackendState}`;
  }
}

export function statusRow(full: StatusJson, peer: PeerStatusJson, isSelf: boolean): string[] {
  return [
    peer.TailscaleIPs[0] ?? "",
    hostLabel(full, peer),
    ownerLabel(full.User?.[String(peer.UserID)]?.LoginName ?? ""),
    peer.OS,
    isSelf ? "-" : peerState(peer, Date.now()),
  ];
}

function hostLabel(full: StatusJson, peer: PeerStatusJson): string {
  const name = peer.DNSName.replace(/\.$/, "");
  const suffix = `.${full.MagicDNSSuffix}`;
  if (name !== "" && name.endsWith(suffix)) return name.slice(0, -suffix.length);
  return name !== "" ? name : `("${peer.HostName}")`;
}

function ownerLabel(login: string): string {
  if (login === "") return "-";
  const at = login.indexOf("@");
  return at < 0 ? login : login.slice(0, at + 1);
}

/** The last column of a peer. `now`: Unix time in milliseconds. */
export function peerState(peer: PeerStatusJson, now: number): string {
  const traffic = peer.RxBytes > 0 || peer.TxBytes > 0;
  let text: string;
  if (peer.Active) {
    text = "active; ";
    if (peer.ExitNode) text += "exit node; ";
    else if (peer.ExitNodeOption) text += "offers exit node; ";
    if (peer.CurAddr) text += `direct ${peer.CurAddr}`;
    else if (peer.Relay) text += `relay "${peer.Relay}"`;
    if (!peer.Online) text += offlineText(peer, now, "; ");
  } else {
    if (peer.ExitNode) text = "idle; exit node";
    else if (peer.ExitNodeOption) text = "idle; offers exit node";
    else if (traffic) text = "idle";
    else text = peer.Online ? "-" : "";
    if (!peer.Online) text += offlineText(peer, now, text === "" ? "" : "; ");
  }
  return traffic ? `${text}, tx ${peer.TxBytes} rx ${peer.RxBytes}` : text;
}

function offlineText(peer: PeerStatusJson, now: number, separator: string): string {
  const seen = Date.parse(peer.LastSeen);
  if (!(seen > 0)) return `${separator}offline`;
  const minutes = Math.max(1, Math.floor((now - seen) / 60_000));
  const hours = Math.floor(minutes / 60);
  const age = minutes < 60 ? `${minutes}m` : hours < 24 ? `${hours}h` : `${Math.floor(hours / 24)}d`;
  return `${separator}offline, last seen ${age} ago`;
}

function sortKey(peer: PeerStatusJson): string {
  return `${peer.DNSName}\0${peer.HostName}\0${peer.TailscaleIPs[0] ?? ""}\0${peer.PublicKey}`;
}

function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** What peers call themselves stays in its cell. */
export function formatColumns(table: string[][]): string {
  const rows = table.map((row) => row.map(printableCell));
  const widths: number[] = [];
  for (const row of rows) for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  return rows
    .map((row) => row.map((cell, i) => (i === row.length - 1 ? cell : cell.padEnd(widths[i]!))).join("  "))
    .join("\n");
}

// ---- ping ----

const PING_USAGE = `Usage: weft ping [flags] HOST|IP

Pings a peer over the path that traffic takes, until a direct one answers.

  -c N                 at most this many pings (default 10)
  --timeout DURATION   wait this long for each answer (default 5s)
  --until-direct       stop at the first direct answer (default true)
  --verbose            accepted`;

async function ping(argv: string[]): Promise<number> {
  const flags = parseFlags("weft ping", argv, FLAGS.ping, PING_USAGE, 1);
  if (flags.help) return print(PING_USAGE);
  const [target] = flags._;
  if (target === undefined) throw new UsageError("ping needs a host: weft ping HOST|IP");
  const count = flags.c ?? 10;
  const untilDirect = flags["until-direct"] ?? true;
  const timeout = flags.timeout ?? 5000;
  const daemon = connect(flags);
  let anyReply = false;
  for (let i = 1; count === 0 || i <= count; i++) {
    const asked = daemon.call<PingResultJson>("POST", `ping?type=disco&ip=${encodeURIComponent(target)}`);
    const result = await Promise.race([asked, Bun.sleep(timeout).then(() => null)]);
    if (result === null || result.Err.startsWith("no answer")) {
      console.log(`ping ${JSON.stringify(target)} timed out`);
      asked.catch(() => {});
      continue;
    }
    if (result.Err) {
      if (!result.IsLocalIP) throw new Error(result.Err);
      return print(result.Err);
    }
    anyReply = true;
    console.log(pongText(result));
    if (result.Endpoint && untilDirect) return 0;
    if (i !== count) await Bun.sleep(1000);
  }
  if (!anyReply) {
    console.error("no reply");
    return 1;
  }
  if (!untilDirect) return 0;
  console.error("direct connection not established");
  return 1;
}

export function pongText({ NodeName, NodeIP, Endpoint, DERPRegionCode, LatencySeconds }: PingResultJson): string {
  const via = Endpoint || `DERP(${DERPRegionCode})`;
  return `pong from ${NodeName} (${NodeIP}) via ${via} in ${Math.round(LatencySeconds * 1000)}ms`;
}

// ---- ip ----

const IP_USAGE = `Usage: weft ip [flags] [PEER]

Prints the addresses of this node, or of a peer.

  -4, -6   only IPv4, only IPv6
  -1       only the first`;

async function ip(argv: string[]): Promise<number> {
  const flags = parseFlags("weft ip", argv, FLAGS.ip, IP_USAGE, 1);
  if (flags.help) return print(IP_USAGE);
  if (Number(flags["4"] ?? false) + Number(flags["6"] ?? false) + Number(flags["1"] ?? false) > 1)
    throw new UsageError("-4, -6 and -1 exclude each other");
  const [wanted] = flags._;
  const full = await connect(flags).status(wanted !== undefined);
  let ips = full.TailscaleIPs ?? [];
  if (wanted !== undefined) {
    const peer = [full.Self, ...Object.values(full.Peer ?? {})].find((candidate) => isNamed(full, candidate, wanted));
    if (!peer) throw new Error(`no peer is called ${JSON.stringify(wanted)}`);
    ips = peer.TailscaleIPs;
  }
  if (flags["4"]) ips = ips.filter((address) => !address.includes(":"));
  if (flags["6"]) ips = ips.filter((address) => address.includes(":"));
  if (flags["1"]) ips = ips.slice(0, 1);
  if (ips.length === 0) {
    console.error(full.BackendState === "Running" ? "no such address" : `no addresses yet, state ${full.BackendState}`);
    return 1;
  }
  return print(ips.join("\n"));
}

function isNamed(full: StatusJson, peer: PeerStatusJson, wanted: string): boolean {
  const name = wanted.toLowerCase().replace(/\.$/, "");
  return (
    peer.TailscaleIPs.includes(name) ||
    peer.DNSName.toLowerCase().replace(/\.$/, "") === name ||
    hostLabel(full, peer).toLowerCase() === name
  );
}

// ---- netcheck, version ----

interface NetcheckJson {
  UDP: boolean;
  IPv4: boolean;
  IPv6: boolean;
  OSHasIPv6: boolean;
  MappingVariesByDestIP: boolean | null;
  PreferredDERP: number;
  /** Region -> nanoseconds. */
  RegionLatency: Record<string, number>;
  GlobalV4: string;
  GlobalV6: string;
}

const NETCHECK_USAGE = `Usage: weft netcheck [--format json|json-line]

Looks at the network around this node, through the node's own socket.`;

async function netcheck(argv: string[]): Promise<number> {
  const flags = parseFlags("weft netcheck", argv, FLAGS.netcheck, NETCHECK_USAGE);
  if (flags.help) return print(NETCHECK_USAGE);
  const format = flags.format ?? "";
  if (!["", "json", "json-line"].includes(format))
    throw new UsageError(`--format ${JSON.stringify(format)} is not known: use json or json-line`);
  const daemon = connect(flags);
  const report = await daemon.call<NetcheckJson>("POST", "netcheck");
  if (format !== "") return print(JSON.stringify(report, null, format === "json" ? 2 : undefined));
  return print(netcheckText(report, await daemon.call<DERPMap>("GET", "derpmap"), new Date()));
}

export function netcheckText(report: NetcheckJson, derpMap: DERPMap, now: Date): string {
  const regions = Object.values(derpMap.Regions ?? {}).filter((region) => region !== null);
  const nearest = regions.find(({ RegionID }) => RegionID === report.PreferredDERP);
  const ipv6 = report.IPv6
    ? `yes, ${report.GlobalV6 || "(no addr found)"}`
    : report.OSHasIPv6
      ? "no, but OS has support"
      : "no, unavailable in OS";
  const lines = [
    "",
    "Report:",
    `\t* Time: ${now.toISOString()}`,
    `\t* UDP: ${report.UDP}`,
    `\t* IPv4: ${report.IPv4 ? `yes, ${report.GlobalV4 || "(no addr found)"}` : "(no addr found)"}`,
    `\t* IPv6: ${ipv6}`,
    `\t* MappingVariesByDestIP: ${report.MappingVariesByDestIP ?? ""}`,
    "\t* PortMapping: ",
    `\t* Nearest DERP: ${nearest ? nearest.RegionName || nearest.RegionCode : "unknown (no response to latency probes)"}`,
    "\t* DERP latency:",
  ];
  const latency = (id: number) => report.RegionLatency[String(id)];
  const sorted = regions.sort(
    (a, b) => (latency(a.RegionID) ?? Number.POSITIVE_INFINITY) - (latency(b.RegionID) ?? Number.POSITIVE_INFINITY),
  );
  for (const { RegionID, RegionCode, RegionName } of sorted) {
    const ns = latency(RegionID);
    const shown = ns === undefined ? "" : `${(ns / 1e6).toFixed(1)}ms`;
    lines.push(`\t\t- ${(RegionCode ?? "").padStart(3)}: ${shown.padEnd(7)} (${RegionName ?? ""})`);
  }
  return lines.join("\n");
}

const VERSION_USAGE = `Usage: weft version [--daemon] [--json | -o json|json-line|yaml]`;

async function version(argv: string[]): Promise<number> {
  const flags = parseFlags("weft version", argv, FLAGS.version, VERSION_USAGE);
  if (flags.help) return print(VERSION_USAGE);
  const daemon = flags.daemon ? (await connect(flags).status(false)).Version : null;
  const format = flags.json ? "json" : parseFormat(flags.output);
  if (format !== "table") {
    // As `tailscale version` and as `headscale version` say it.
    const about = {
      short: VERSION,
      long: VERSION,
      version: VERSION,
      ...(daemon === null ? {} : { daemonLong: daemon }),
    };
    return print(serialize(about, format));
  }
  return print(daemon === null ? `${VERSION}\n  bun ${Bun.version}` : `Client: ${VERSION}\nDaemon: ${daemon}`);
}

function print(text: string, exitCode = 0): number {
  console.log(text);
  return exitCode;
}
