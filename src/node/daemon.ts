// The daemon: state on disk, control client, engine and local API, and the backend state that they make together
// (spec/node-features.md, sections 1, 4 and 8).
//
//   NeedsLogin         no identity, logged out, refused by the server, or the node key has expired
//   NeedsMachineAuth   an administrator must approve this machine
//   Stopped            `down`
//   Starting           on the way; the netmap may be there, but neither a relay nor a peer has answered
//   Running            traffic flows
//
// The device exists as long as the daemon; addresses, routes and peers only while the node is up.
import { chmodSync, mkdirSync } from "node:fs";
import { hostname } from "node:os";
import { dirname } from "node:path";
import { type Lock, lockFile } from "../../ffi/unix.ts";
import { hex, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey, x25519Public } from "../crypto/x25519.ts";
import type { PeerDump } from "../datapath/api.ts";
import { parseServerUrl } from "../net/ts2021-client.ts";
import type { PingResponse } from "../wire/tailcfg.ts";
import { ControlClient, type LoginState } from "./control-client.ts";
import { Engine, type EngineConfig } from "./engine.ts";
import { hostinfo } from "./hostinfo.ts";
import { ApiError, type ApiRequest, LocalApi } from "./local-api.ts";
import { keyExpired, type Netmap } from "./netmap.ts";
import { DEFAULT_PREFS, isHostname, NodeState, type Prefs } from "./state.ts";
import { addressesOf, type BackendState, buildStatus, regionCode, type StatusJson } from "./status.ts";
import { VERSION } from "./version.ts";
import { baseName, filterConfig, findPeer, nodeKeyOf, peerViews, selfAddresses } from "./view.ts";

const NETCHECK_TIMEOUT = 15_000;
const LOGOUT_TIMEOUT = 1500;
/** Peers' keys expire by the clock, without a message. */
const EXPIRY_CHECK_MS = 30_000;

export interface DaemonOptions {
  /** State file, or "mem:". */
  state: string;
  /** Folder to make and to keep to oneself (0700); null: the state file's folder is the caller's matter. */
  stateDir: string | null;
  socket: string;
  tun: string;
  port: number;
  /** Prefs that the command line sets; with ControlURL the node comes up at once. */
  prefs: Partial<Prefs>;
  authKey: string;
  log: (level: "info" | "debug", message: string) => void;
}

/** `LatencySeconds` and the rest as tailscale's PingResult. */
export interface PingResultJson {
  IP: string;
  NodeIP: string;
  NodeName: string;
  Err: string;
  LatencySeconds: number;
  /** Set for a direct answer only. */
  Endpoint: string;
  DERPRegionID: number;
  DERPRegionCode: string;
  IsLocalIP?: boolean;
}

export class Daemon {
  /** Resolves with the reason when the daemon can no longer work. */
  readonly fatal: Promise<string>;
  private die: (reason: string) => void = () => {};
  private readonly discoPrivate = generatePrivateKey(randomBytes);
  private engine: Engine | null = null;
  private api: LocalApi | null = null;
  private control: ControlClient | null = null;
  private controlUrl: URL | null = null;
  private login: LoginState = { kind: "connecting" };
  private netmap: Netmap | null = null;
  private connected = false;
  /** What control should be told once there is a client. */
  private endpoints: { endpoints: string[]; types: number[] } | null = null;
  private netInfo: Parameters<ControlClient["setNetInfo"]>[0] | null = null;
  private applying: Promise<void> | null = null;
  private applyAgain = false;
  private lastState: BackendState = "NoState";
  private expiryCheck: ReturnType<typeof setInterval> | undefined;
  private stopping = false;

  private constructor(
    private readonly options: DaemonOptions,
    private readonly state: NodeState,
    private readonly lock: Lock | null,
  ) {
    this.fatal = new Promise((resolve) => {
      this.die = resolve;
    });
  }

  /** Throws with one sentence; nothing is left behind then. */
  static async start(options: DaemonOptions): Promise<Daemon> {
    const lock = takeState(options);
    try {
      const daemon = new Daemon(options, new NodeState(options.state, randomBytes), lock);
      try {
        await daemon.open();
        return daemon;
      } catch (error) {
        await daemon.close();
        throw error;
      }
    } catch (error) {
      lock?.release();
      throw error;
    }
  }

  private async open(): Promise<void> {
    const { options } = this;
    this.api = await LocalApi.listen(options.socket, (request) => this.handle(request));
    this.engine = await Engine.start(
      { tun: options.tun, port: options.port, discoPrivate: this.discoPrivate },
      {
        onEndpoints: (endpoints, types) => {
          this.endpoints = { endpoints, types };
          this.control?.setEndpoints(endpoints, types);
        },
        onNetInfo: (netInfo) => {
          this.netInfo = netInfo;
          this.control?.setNetInfo(netInfo);
        },
        onLiveness: () => this.noteState(),
        onWayOut: () => this.control?.hurry(),
        onFatal: (reason) => this.die(reason),
        log: options.log,
      },
    );
    options.log("info", `device ${this.engine.tunName}, UDP port ${this.engine.port}, socket ${options.socket}`);
    const given = Object.keys(options.prefs).length > 0 || options.authKey !== "";
    const prefs = { ...this.state.prefs, ...options.prefs, ...(given ? { WantRunning: true, LoggedOut: false } : {}) };
    await this.setPrefs(prefs, options.authKey);
    this.expiryCheck = setInterval(() => this.apply(), EXPIRY_CHECK_MS);
  }

  /** Ends everything within about two seconds; no device, route, rule or socket stays. */
  async close(): Promise<void> {
    if (this.stopping) return;
    this.stopping = true;
    clearInterval(this.expiryCheck);
    this.api?.close();
    // A node that keeps nothing is gone for good: the server need not wait to find out.
    if (this.state.inMemory && this.control) await Promise.race([this.control.logout(), Bun.sleep(LOGOUT_TIMEOUT)]);
    await this.stopControl();
    await this.applying;
    await this.engine?.close();
    this.lock?.release();
  }

  // ---- prefs and the control client ----

  /** Makes these the prefs and acts on them. `authKey`: for a login that they make necessary, "" is none. */
  private async setPrefs(prefs: Prefs, authKey: string): Promise<void> {
    const before = this.state.prefs;
    const url = prefs.ControlURL === "" ? null : parseServerUrl(prefs.ControlURL);
    if (prefs.WantRunning && !url)
      throw new ApiError(400, "no control server is set: give its URL with --login-server https://host");
    // Another server knows nothing of this identity, and should learn nothing of it.
    const moved = before.ControlURL !== "" && prefs.ControlURL !== before.ControlURL;
    if (moved) this.state.setIdentity(null);
    this.state.setPrefs(prefs);
    this.controlUrl = url;
    if (!prefs.WantRunning || moved) await this.stopControl();
    if (prefs.WantRunning && url) {
      if (this.control) {
        this.control.setHostinfo(this.hostinfo());
        if (this.login.kind !== "in") this.netmap = null;
        this.control.retryLogin(authKey);
      } else {
        this.startControl(url, authKey);
      }
    }
    this.apply();
    this.noteState();
  }

  private hostinfo() {
    return hostinfo(this.state.prefs, VERSION, x25519Public(this.state.machinePrivate));
  }

  private startControl(url: URL, authKey: string): void {
    this.login = { kind: "connecting" };
    const control = new ControlClient(
      {
        serverUrl: url.origin,
        machinePrivate: this.state.machinePrivate,
        identity: this.state.identity,
        authKey,
        ephemeral: this.state.inMemory,
        discoPublic: x25519Public(this.discoPrivate),
        hostinfo: this.hostinfo(),
        randomBytes,
        now: Date.now,
      },
      {
        onIdentity: (identity) => {
          this.state.setIdentity(identity);
          this.apply();
        },
        onLogin: (login) => {
          this.login = login;
          if (login.kind === "needs-login" && login.authUrl)
            this.options.log("info", `to log in, visit ${login.authUrl}`);
          else if (login.kind === "needs-login") this.options.log("info", login.error);
          this.apply();
          this.noteState();
        },
        onNetmap: (netmap) => {
          this.netmap = netmap;
          this.apply();
          this.noteState();
        },
        onConnected: (connected) => {
          this.connected = connected;
          this.engine?.setControlAlive(connected);
          if (this.stopping) return;
          this.options.log("info", connected ? `connected to ${url.origin}` : `lost the connection to ${url.origin}`);
        },
        onPing: (type, ip) => this.answerControlPing(type, ip),
        log: this.options.log,
      },
    );
    this.control = control;
    if (this.endpoints) control.setEndpoints(this.endpoints.endpoints, this.endpoints.types);
    if (this.netInfo) control.setNetInfo(this.netInfo);
    control.start();
  }

  private async stopControl(): Promise<void> {
    const control = this.control;
    this.control = null;
    this.netmap = null;
    this.connected = false;
    this.login = { kind: "connecting" };
    await control?.stop();
  }

  // ---- netmap to engine ----

  /** Brings the engine up to date; calls while one runs lead to one more run. */
  private apply(): void {
    if (this.applying) {
      this.applyAgain = true;
      return;
    }
    this.applying = (async () => {
      do {
        this.applyAgain = false;
        const config = this.engineConfig();
        try {
          if (config) await this.engine?.configure(config);
        } catch (error) {
          this.options.log("info", `the engine refused the netmap: ${(error as Error).message}`);
        }
      } while (this.applyAgain && !this.stopping);
      this.applying = null;
    })();
  }

  /** Null while there is nobody to be. */
  private engineConfig(): EngineConfig | null {
    const { identity } = this.state;
    const { netmap, controlUrl } = this;
    if (!identity || !controlUrl) return this.engine?.idleConfig() ?? null;
    const isUp = netmap !== null && this.isAdmitted(netmap);
    return {
      nodePrivate: identity.nodePrivate,
      nodePublic: x25519Public(identity.nodePrivate),
      addresses: isUp ? selfAddresses(netmap) : [],
      peers: isUp ? peerViews(netmap, Date.now()) : [],
      filter: isUp ? filterConfig(netmap) : { rules: [], local: [] },
      derpMap: isUp ? netmap.derpMap : { Regions: {} },
      controlUrl,
    };
  }

  private isAdmitted(netmap: Netmap): boolean {
    const { WantRunning, LoggedOut } = this.state.prefs;
    // A server that is away (connecting) takes nothing from a node that it has let in.
    const refused = this.login.kind === "needs-login";
    return (
      WantRunning &&
      !LoggedOut &&
      !refused &&
      netmap.self.MachineAuthorized !== false &&
      !keyExpired(netmap.self, Date.now())
    );
  }

  private backendState(): BackendState {
    const { prefs, identity } = this.state;
    if (!prefs.WantRunning) return identity?.user && !prefs.LoggedOut ? "Stopped" : "NeedsLogin";
    if (prefs.LoggedOut || this.login.kind === "needs-login") return "NeedsLogin";
    if (!this.netmap) return "Starting";
    // While connecting, an expired key is about to be replaced.
    if (keyExpired(this.netmap.self, Date.now())) return this.login.kind === "in" ? "NeedsLogin" : "Starting";
    if (this.netmap.self.MachineAuthorized === false) return "NeedsMachineAuth";
    const relayless = Object.keys(this.netmap.derpMap.Regions ?? {}).length === 0;
    return this.engine?.live || relayless || this.lastState === "Running" ? "Running" : "Starting";
  }

  private noteState(): void {
    const state = this.backendState();
    if (state === this.lastState || this.stopping) return;
    this.options.log("info", `state ${this.lastState} -> ${state}`);
    this.lastState = state;
  }

  // ---- the local API ----

  private async handle(request: ApiRequest): Promise<unknown> {
    const { method, path, query } = request;
    const needWrite = () => {
      if (!request.canWrite) throw new ApiError(403, "access denied: only root may change this daemon");
    };
    switch (`${method} ${path}`) {
      case "GET status":
      case "POST status":
        return await this.status(query.get("peers") !== "false");
      case "GET prefs":
        return this.state.prefs;
      case "PATCH prefs":
        needWrite();
        await this.setPrefs(maskedPrefs(this.state.prefs, request.body), "");
        return this.state.prefs;
      case "POST start":
        needWrite();
        await this.startLogin(request.body);
        return undefined;
      case "POST logout":
        needWrite();
        await this.logout();
        return undefined;
      case "POST ping":
        return await this.ping(query.get("ip") ?? "", query.get("type") ?? "disco");
      case "GET whois":
        return this.whois(query.get("addr") ?? "");
      case "GET derpmap":
        return this.netmap?.derpMap ?? {};
      case "POST netcheck":
        return await this.netcheck();
      case "POST shutdown":
        needWrite();
        setImmediate(() => this.die("told to shut down"));
        return undefined;
      default:
        throw new ApiError(404, `no such endpoint: ${method} ${path}`);
    }
  }

  private async status(withPeers: boolean): Promise<StatusJson> {
    const { engine, netmap } = this;
    const wireguard = new Map<string, PeerDump>();
    if (engine && withPeers) for (const peer of (await engine.dump()).peers) wireguard.set(hex(peer.publicKey), peer);
    const { login } = this;
    const health = netmap
      ? [...netmap.health, ...[...netmap.displayMessages.values()].map(({ Text }) => Text ?? "")]
      : [];
    if (login.kind === "needs-login" && login.error) health.push(login.error);
    if (login.kind !== "needs-login" && this.control && !this.connected)
      health.push(`not connected to the control server ${this.controlUrl?.origin ?? ""}`);
    return buildStatus(
      {
        version: VERSION,
        state: this.backendState(),
        authUrl: login.kind === "needs-login" ? login.authUrl : "",
        health,
        netmap,
        nodePublic: this.state.identity ? x25519Public(this.state.identity.nodePrivate) : null,
        hostName: this.state.prefs.Hostname || hostname(),
        endpoints: engine?.endpoints ?? [],
        home: engine?.home ?? 0,
        connected: this.connected,
        wireguard,
        path: (key) => engine?.peerStatus(key) ?? null,
        handshakeTime: (key) => engine?.handshakeTime(key) ?? null,
        nodeKeyOf,
        now: Date.now(),
      },
      withPeers,
    );
  }

  /** Body: { AuthKey, UpdatePrefs } with whole or partial prefs. */
  private async startLogin(body: unknown): Promise<void> {
    const { AuthKey, UpdatePrefs } = (body ?? {}) as { AuthKey?: unknown; UpdatePrefs?: unknown };
    const prefs = mergePrefs(this.state.prefs, UpdatePrefs ?? {});
    const authKey = typeof AuthKey === "string" ? AuthKey : "";
    await this.setPrefs({ ...prefs, WantRunning: true, LoggedOut: false }, authKey);
  }

  private async logout(): Promise<void> {
    await this.control?.logout();
    await this.stopControl();
    this.state.setIdentity(null);
    this.state.setPrefs({ ...this.state.prefs, WantRunning: false, LoggedOut: true });
    this.apply();
    this.noteState();
  }

  private async ping(target: string, type: string): Promise<PingResultJson> {
    const result: PingResultJson = {
      IP: target,
      NodeIP: target,
      NodeName: "",
      Err: "",
      LatencySeconds: 0,
      Endpoint: "",
      DERPRegionID: 0,
      DERPRegionCode: "",
    };
    if (type !== "disco") return { ...result, Err: `ping type ${JSON.stringify(type)} is not supported: use disco` };
    const { netmap, engine } = this;
    if (!netmap || !engine) return { ...result, Err: "this node is not connected to a tailnet" };
    if (addressesOf(netmap.self).includes(target))
      return { ...result, NodeName: baseName(netmap.self), Err: `${target} is local Tailscale IP`, IsLocalIP: true };
    const peer = findPeer(netmap, target);
    const key = peer && nodeKeyOf(peer);
    if (!peer || !key) return { ...result, Err: `no peer in the netmap is ${JSON.stringify(target)}` };
    result.NodeIP = addressesOf(peer)[0] ?? target;
    result.NodeName = baseName(peer);
    const pong = await engine.ping(key);
    if (!pong.ok) return { ...result, Err: pong.error };
    result.LatencySeconds = pong.latency / 1000;
    if ("udp" in pong.via) return { ...result, Endpoint: pong.via.udp };
    return { ...result, DERPRegionID: pong.via.region, DERPRegionCode: regionCode(netmap, pong.via.region) };
  }

  private async answerControlPing(type: string, ip: string): Promise<PingResponse> {
    return { Type: type, ...(await this.ping(ip, type.toLowerCase())) };
  }

  private whois(address: string): unknown {
    const { netmap } = this;
    const ip = address.replace(/^\[?([0-9a-f.:]+?)\]?:\d+$/i, (whole, host: string) =>
      whole.startsWith("[") || !host.includes(":") ? host : whole,
    );
    const node = netmap && (addressesOf(netmap.self).includes(ip) ? netmap.self : findPeer(netmap, ip));
    if (!netmap || !node || !addressesOf(node).includes(ip)) throw new ApiError(404, "no match for IP:port");
    return { Node: node, UserProfile: netmap.users.get(node.User ?? 0) ?? null, CapMap: null };
  }

  private async netcheck(): Promise<unknown> {
    const report = await this.engine?.netcheck(NETCHECK_TIMEOUT);
    if (!report) throw new ApiError(503, "the netcheck did not finish: is this node up, with a DERP map?");
    const ns = (latency: ReadonlyMap<number, number>) =>
      Object.fromEntries([...latency].map(([region, ms]) => [String(region), Math.round(ms * 1e6)]));
    return {
      UDP: report.udp,
      IPv6: report.ipv6,
      IPv4: report.ipv4,
      IPv6CanSend: report.ipv6CanSend,
      IPv4CanSend: report.ipv4CanSend,
      OSHasIPv6: report.osHasIPv6,
      MappingVariesByDestIP: report.mappingVaries,
      PreferredDERP: this.engine?.home ?? 0,
      RegionLatency: ns(report.latency),
      RegionV4Latency: ns(report.latency4),
      RegionV6Latency: ns(report.latency6),
      GlobalV4: report.globalV4 ?? "",
      GlobalV6: report.globalV6 ?? "",
    };
  }
}

/** The state is one daemon's alone. Throws with one sentence. */
function takeState({ state, stateDir }: DaemonOptions): Lock | null {
  if (state === "mem:") return null;
  const folder = stateDir ?? dirname(state);
  try {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    if (stateDir) chmodSync(stateDir, 0o700);
  } catch (error) {
    throw new Error(`the state folder ${folder} cannot be made: ${(error as Error).message}`);
  }
  const lock = lockFile(`${state}.lock`);
  if (!lock) throw new Error(`another daemon uses the state file ${state}: stop it, or give this one another --state`);
  return lock;
}

/** MaskedPrefs: a field counts when `<Name>Set` is true. Throws ApiError. */
function maskedPrefs(prefs: Readonly<Prefs>, body: unknown): Prefs {
  if (typeof body !== "object" || body === null) throw new ApiError(400, "MaskedPrefs must be a JSON object");
  const masked = body as Record<string, unknown>;
  const update: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(masked)) if (masked[`${name}Set`] === true) update[name] = value;
  return mergePrefs(prefs, update);
}

/** Throws ApiError for unknown names and wrong types. */
function mergePrefs(prefs: Readonly<Prefs>, update: unknown): Prefs {
  if (typeof update !== "object" || update === null) throw new ApiError(400, "prefs must be a JSON object");
  const merged: Record<string, unknown> = { ...prefs };
  for (const [name, value] of Object.entries(update)) {
    if (name === "Config" || name === "Persist") continue;
    if (!Object.hasOwn(DEFAULT_PREFS, name)) throw new ApiError(400, `no such preference: ${JSON.stringify(name)}`);
    const standard = DEFAULT_PREFS[name as keyof Prefs];
    const fits =
      standard === null
        ? value === null || (Array.isArray(value) && value.every((item) => typeof item === "string"))
        : typeof value === typeof standard;
    if (!fits) throw new ApiError(400, `the preference ${name} has the wrong type`);
    merged[name] = value;
  }
  const { Hostname, ControlURL } = merged as unknown as Prefs;
  if (!isHostname(Hostname))
    throw new ApiError(400, `${JSON.stringify(Hostname)} is no host name: letters, digits and "-", at most 63`);
  if (ControlURL !== "") {
    try {
      parseServerUrl(ControlURL);
    } catch (error) {
      throw new ApiError(400, (error as Error).message);
    }
  }
  return merged as unknown as Prefs;
}
