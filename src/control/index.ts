// The control server: opens the data folder, keeps the tailnet, serves nodes by ts2021 and the administrator by a unix
// socket. Its HTTP routes and upgrades are mounted on a listener by whoever creates it (cli/control.ts, cli/box.ts).
import { join } from "node:path";
import { Hono } from "hono";
import { formatKey, parseKey, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey, x25519Public } from "../crypto/x25519.ts";
import { loadOrCreateKey } from "../net/keyfile.ts";
import type { UpgradeHandler } from "../net/listener.ts";
import { type Logger, newRequestId, whileServing } from "../net/logger.ts";
import { Attempts } from "../net/ratelimit.ts";
import type { Http2Stream } from "../wire/h2.ts";
import type { DERPMap, MapResponse, RegisterResponse } from "../wire/tailcfg.ts";
import { type AccessOptions, PolicyAccess } from "./access.ts";
import { type Admin, startAdmin } from "./admin.ts";
import { type Apis, createApis } from "./api/index.ts";
import { sweepAttributes } from "./attributes.ts";
import { streamBackup } from "./backup.ts";
import { addCertificates, createProvider } from "./certs.ts";
import { Chosen } from "./chosen.ts";
import { expiresSoon } from "./client-advice.ts";
import { Clones } from "./clones.ts";
import type { ControlContext } from "./context.ts";
import { checkSocketPath, prepareDataDir } from "./datadir.ts";
import type { DebugPages } from "./debug.ts";
import { DerpMaps, relayProblem, withPolicy } from "./derpmap.ts";
import { configOf, dnsConfigOf, ExtraRecordsFile } from "./dns.ts";
import { Enrolment } from "./enrol.ts";
import { CommandError } from "./errors.ts";
import { addFeatures, type ClientHealth, clientAudit } from "./features.ts";
import { GeoIP } from "./geoip.ts";
import { addIdTokens } from "./idtoken.ts";
import { Journal } from "./journal.ts";
import { Logins } from "./login.ts";
import { checkVersion, handleMachineRequest, type MachineHandlers, MachineRouter, respond } from "./machine.ts";
import { encodeFrame } from "./map-frames.ts";
import { KEEP_ALIVE, MapStream } from "./map-stream.ts";
import { Sweep } from "./map-sweep.ts";
import { Turns } from "./map-turns.ts";
import { Metrics } from "./metrics.ts";
import { type Effect, isAdmitted, type Millis, Model, type NodeRecord } from "./model.ts";
import { Clashes } from "./names.ts";
import { farewell, hasName, profileOf, type TailnetConfig, userOf, View } from "./netmap.ts";
import { Paces } from "./pace.ts";
import { LoginPages } from "./pages/login.ts";
import { setupPages } from "./pages/setup.ts";
import { Pings } from "./pings.ts";
import { PolicyError, parsePolicy } from "./policy/index.ts";
import { loadPolicy, PolicyStore, type PolicyVersion, startProblem } from "./policy-store.ts";
import { Probes } from "./probes.ts";
import { isExpired, withHostinfo } from "./register.ts";
import { BadRequest, homeDerpOf, type MapInput, parseMap, parseRegister } from "./requests.ts";
import { AutoApprover, routesOf } from "./routes.ts";
import { addServerInfo } from "./server-info.ts";
import type { ControlSettings, ExtraRecord } from "./settings.ts";
import { SSHChecks } from "./sshcheck.ts";
import { Store } from "./store.ts";
import { type Connection, type Liveness, NoiseServer } from "./ts2021.ts";
import { WebClients } from "./webclient.ts";
import { Webhooks } from "./webhooks.ts";

const ADMIN_SOCKET = "weft.sock";
/** Peers of a netmap on the debug page. */
const DEBUG_PEERS = 200;
const NOISE_KEY = "noise_private.key";
/** Milliseconds that a node stays online after its map stream ended: clients reconnect all the time. */
const OFFLINE_GRACE = 10_000;
/** What a full netmap costs, beside requests that cost 1. */
const NETMAP_COST = 5;
/** Milliseconds between looks for expired and abandoned nodes. */
const TICK = 5_000;

export interface ControlOptions {
  /** Made with mode 0700 when absent. One control server at a time. */
  dataDir: string;
  settings: ControlSettings;
  /** Milliseconds that a node stays online after its map stream ended. Default 10 s. */
  offlineGrace?: number;
  /** Milliseconds of silence on a map stream before a keep-alive. Default 50 s, and up to 9 s more at random. */
  keepAlive?: { every: number; jitter: number };
  liveness?: Partial<Liveness>;
  /** Noise connections of all machines. Default 20,000. */
  maxConnections?: number;
  now?: () => Millis;
  /** A node was deleted or its user suspended: its key opens nothing any more, or not for now. */
  onNodeRemoved?: (nodeKey: Uint8Array) => void;
  /** For problems that an operator should know of. */
  log?: (line: string) => void;
  /** For each request of a machine; without it they are not logged. */
  requestLog?: Logger;
  /** Default: noise_private.key in the data folder. */
  noiseKeyPath?: string;
  /** For backups: further keys by name, and files that belong to this server and are in no backup. */
  backup?: { keys: Readonly<Record<string, string>>; elsewhere: readonly string[] };
  /** Default: weft.sock in the data folder, for its owner alone. */
  adminSocket?: { path: string; mode: number };
}

export interface Control {
  /** /key, /health, /verify, /version, /robots.txt. */
  app: Hono;
  upgrades: { "/ts2021": UpgradeHandler };
  noisePublicKey: Uint8Array;
  /** Path of the admin socket. */
  adminSocket: string;
  /** Whether this node key may use the relay: it is registered, has been let in and has not expired. */
  verifyNode(nodeKey: Uint8Array): boolean;
  /** Open Noise connections, HTTP/2 requests in them, and map streams among those. */
  stats(): { connections: number; streams: number; maps: number; nodes: number };
  /** Reads, checks and sets the policy. */
  readonly policies: PolicyStore;
  /** Machines and SSH sessions that wait for a person. */
  readonly logins: Logins;
  /** Questions to nodes. */
  readonly pings: Pings;
  /** What clients say is wrong with them. */
  readonly health: ClientHealth;
  /** What is counted, for Prometheus. */
  readonly metrics: Metrics;
  /** What the debug page shows. */
  debugPages(): DebugPages;
  /** Looks for nodes whose key has expired and for ephemeral nodes that were away too long. Runs by itself, too. */
  tick(): Promise<void>;
  /** Ends the map streams, closes connections and the store. */
  close(): Promise<void>;
}

/** Throws with one sentence when the data folder cannot be used. */
export async function createControl(options: ControlOptions): Promise<Control> {
  prepareDataDir(options.dataDir);
  checkSocketPath(socketOf(options).path);
  const store = await openStore(options);
  try {
    const noiseKey = loadOrCreateKey(noiseKeyPathOf(options), () => generatePrivateKey(randomBytes));
    const model = new Model();
    model.apply(await store.load());
    const policy = loadPolicy(options.settings.policy, model);
    const server = new ControlServer(options, store, model, noiseKey, policy, openPolicy(policy, model, options));
    try {
      await server.start();
    } catch (error) {
      await server.close();
      throw error;
    }
    return server;
  } catch (error) {
    await store.close();
    throw error;
  }
}

function noiseKeyPathOf({ noiseKeyPath, dataDir }: ControlOptions): string {
  return noiseKeyPath ?? join(dataDir, NOISE_KEY);
}

function socketOf({ adminSocket, dataDir }: ControlOptions): { path: string; mode: number } {
  return adminSocket ?? { path: join(dataDir, ADMIN_SOCKET), mode: 0o600 };
}

/** The store of a server that is not running, or that is about to. Throws with one sentence. */
export function openStore({ dataDir, settings, log }: ControlOptions): Promise<Store> {
  const { store } = settings;
  const isDefault = store.type === "sqlite" && store.path === "";
  return Store.open(isDefault ? { type: "sqlite", path: join(dataDir, "weft.sqlite") } : store, {
    log: (line) => log?.(line),
  });
}

export function accessOptions({ oidc, dns, geoip, prefixes: { v4, v6 } }: ControlSettings): AccessOptions {
  const prefixes = [v4, v6].filter((prefix) => prefix !== null);
  return { anyGroup: oidc.length > 0, prefixes, https: dns.certificates !== null, countries: geoip.path !== "" };
}

function openPolicy(policy: PolicyVersion, model: Model, { settings, log }: ControlOptions): PolicyAccess {
  const provided = settings.oidc.length > 0;
  const claimed = new Set([...model.users.values()].flatMap(({ groups }) => groups.map((group) => `group:${group}`)));
  // A stored policy was right when it was set: a group that its last user has left since does not stop the server.
  const isForeign = (group: string): boolean => provided || policy.version > 0 || claimed.has(group);
  try {
    return new PolicyAccess(model, parsePolicy(policy.text, isForeign), log, accessOptions(settings));
  } catch (error) {
    throw error instanceof PolicyError ? startProblem(policy, error) : error;
  }
}

class ControlServer implements Control {
  readonly app = new Hono();
  readonly upgrades: { "/ts2021": UpgradeHandler };
  readonly noisePublicKey: Uint8Array;
  readonly adminSocket: string;
  readonly policies: PolicyStore;
  readonly pings: Pings;
  readonly health: ClientHealth;
  readonly logins: Logins;
  readonly metrics: Metrics;
  private readonly chosen: Chosen;
  private config: TailnetConfig;
  private readonly journal: Journal;
  private readonly context: ControlContext;
  private readonly noise: NoiseServer;
  private readonly enrolment: Enrolment;
  private readonly paces: Paces;
  private readonly clones = new Clones();
  private readonly clashes: Clashes;
  private readonly pages: LoginPages;
  private readonly probes: Probes;
  private readonly derpMaps: DerpMaps;
  private readonly geoip: GeoIP;
  /** Where open map streams come from, by node. */
  private readonly addresses = new Map<number, string>();
  /** As `derpMaps` has it, before the policy. */
  private ownDerpMap: DERPMap;
  private extraRecords: ExtraRecordsFile | null = null;
  private records: readonly ExtraRecord[];
  private readonly machines = new MachineRouter();
  private readonly approver: AutoApprover;
  private readonly sshChecks: SSHChecks;
  private readonly streams = new Map<number, MapStream>();
  private readonly sweep = new Sweep();
  private readonly turns = new Turns();
  private readonly offlineTimers = new Map<number, ReturnType<typeof setTimeout>>();
  /** Nodes that were removed, whose streams end as soon as that is durable. */
  private leaving: NodeRecord[] = [];
  /** Users who were suspended. */
  private suspended: number[] = [];
  private readonly apis: Apis;
  private readonly webhooks: Webhooks;
  private admin: Admin | null = null;
  private ticker: ReturnType<typeof setInterval> | null = null;
  private closing: Promise<void> | null = null;
  private isBackingUp = false;
  private readonly now: () => Millis;
  private readonly startedAt: Millis;
  /** When time was looked at last. */
  private lastTick: Millis;

  constructor(
    private readonly options: ControlOptions,
    private readonly store: Store,
    private readonly model: Model,
    noiseKey: Uint8Array,
    policy: PolicyVersion,
    private readonly access: PolicyAccess,
  ) {
    this.now = options.now ?? Date.now;
    this.startedAt = this.now();
    this.lastTick = this.startedAt;
    this.chosen = new Chosen(options.settings, model);
    this.config = configOf(this.chosen.settings);
    this.ownDerpMap = this.config.derpMap;
    this.records = options.settings.dns.extraRecords;
    this.adminSocket = socketOf(options).path;
    this.noisePublicKey = x25519Public(noiseKey);
    this.metrics = this.createMetrics();
    this.journal = new Journal(model, (changes) => this.metrics.timed(changes, store.write(changes)), {
      companions: (effect) => this.webhooks.companions(effect),
      onApplied: (effect) => this.onApplied(effect),
      onDurable: () => this.onDurable(),
    });
    this.approver = new AutoApprover(model);
    this.clashes = new Clashes(model, (line) => options.log?.(line));
    this.paces = new Paces((line) => options.log?.(line));
    this.noise = new NoiseServer({
      privateKey: noiseKey,
      now: this.now,
      ...(options.liveness && { liveness: options.liveness }),
      ...(options.maxConnections && { maxConnections: options.maxConnections }),
      onRequest: (stream, headers, connection) => {
        const handlers: MachineHandlers = {
          admit: () => this.admit(connection, 1),
          register: async (body, _connection, signal) => {
            const answer = await this.register(body, connection, signal);
            this.metrics.registrations.add(answer.Error ? "refused" : answer.AuthURL ? "waiting" : "ok");
            return answer;
          },
          map: (body) => this.map(body, connection, stream),
          router: this.machines,
        };
        const endpoint = /^\/machine\/(register|map)(\?|$)/.exec(headers.get(":path")!)?.[1];
        this.metrics.machineRequests.add((endpoint ?? "other") as "register" | "map" | "other");
        whileServing({ request: newRequestId(), client: connection.address }, () => {
          const { requestLog } = options;
          const what = `${headers.get(":method")} ${headers.get(":path")!.split("?", 1)[0]} of ${connection.machineKey}`;
          requestLog?.debug(what);
          handleMachineRequest(stream, headers, connection, handlers).catch((error: Error) => {
            if (requestLog) requestLog.error(`${what} failed`, { error: error.stack ?? error.message });
            else options.log?.(`${what} failed: ${error.message}`);
          });
        });
      },
    });
    this.upgrades = { "/ts2021": this.noise.upgrade };
    this.app.use((c, next) => this.metrics.request(c, next));
    this.pings = new Pings({
      serverUrl: options.settings.serverUrl,
      random: randomBytes,
      now: () => performance.now(),
      send: (nodeId, request) => this.streams.get(nodeId)?.ping(request) ?? false,
      owns: (machineKey, nodeId) => model.nodes.get(nodeId)?.machineKey === machineKey,
    });
    const server = this;
    this.context = {
      get settings() {
        return server.chosen.settings;
      },
      model,
      journal: this.journal,
      get config() {
        return server.config;
      },
      access,
      get policies() {
        return server.policies;
      },
      pings: this.pings,
      metrics: this.metrics,
      backup: () => this.backup(),
      healthy: () => store.answers(),
      now: this.now,
      random: randomBytes,
      log: (line) => options.log?.(line),
      note: (line) => options.requestLog?.info(line),
      setConfig: (config) => this.setConfig(config),
      choose: async (choices) => {
        await this.journal.commit({ documents: this.chosen.changes(choices) });
        this.applySettings();
      },
      poke: () => this.poke(),
    };
    this.policies = new PolicyStore(this.context, policy);
    access.relayProblem = (derpMap) => relayProblem(this.ownDerpMap, derpMap);
    this.probes = new Probes(this.context, this.pings);
    this.derpMaps = new DerpMaps({
      settings: options.settings.derp,
      seed: options.settings.baseDomain,
      changed: (derpMap) => {
        this.ownDerpMap = derpMap;
        this.applyDerpMap();
      },
      log: this.context.log,
      random: Math.random,
    });
    this.geoip = new GeoIP({
      path: options.settings.geoip.path,
      changed: () => this.locateAll(),
      log: this.context.log,
      note: this.context.note,
    });
    this.health = addFeatures(this.context, this.machines, this.app).health;
    addIdTokens(this.context, this.machines, this.app);
    const provider = options.settings.dns.certificates;
    addCertificates(this.context, this.machines, provider && createProvider(provider, this.context));
    this.logins = new Logins(this.context);
    this.webhooks = new Webhooks(this.context);
    this.apis = createApis(this.context, this.logins, this.webhooks);
    this.sshChecks = new SSHChecks(this.context, this.logins);
    this.sshChecks.mount(this.machines);
    new WebClients(this.context, this.logins).mount(this.machines);
    this.policies.onChanged = () => {
      this.applyDerpMap();
      this.sweepChecks();
      this.webhooks.onPolicy();
    };
    const attempts = new Attempts({
      what: "pre-auth key",
      log: this.context.log,
      count: (what) => this.metrics.loginFailures.add(what),
    });
    this.enrolment = new Enrolment(this.context, this.logins, attempts);
    this.pages = new LoginPages(this.context, this.logins);
    this.routes();
  }

  async start(): Promise<void> {
    await this.chosen.forgetOutdated(this.context);
    await this.pages.start();
    for (const node of this.model.nodes.values())
      if (!hasName(node, this.config))
        this.context.log(
          `the name of node ${node.id} is no DNS name, so its peers are not told of it: weft nodes rename -i ${node.id} NAME`,
        );
    await this.tick();
    this.webhooks.start();
    this.poke();
    this.readExtraRecords();
    await this.derpMaps.start();
    await this.geoip.start();
    this.probes.step();
    this.admin = await startAdmin(socketOf(this.options), this.apis.local);
    this.ticker = setInterval(() => {
      this.tick().catch((error: Error) => this.options.log?.(error.message));
    }, TICK);
  }

  private readExtraRecords(): void {
    const { extraRecordsPath } = this.options.settings.dns;
    if (extraRecordsPath === "") return;
    this.extraRecords = new ExtraRecordsFile({
      path: extraRecordsPath,
      changed: (records) => {
        this.records = records;
        this.applySettings();
      },
      log: this.context.log,
      note: this.context.note,
    });
  }

  private applySettings(): void {
    const { settings } = this.context;
    this.setConfig({
      ...this.config,
      dns: dnsConfigOf(settings, this.records),
      autoUpdate: settings.autoUpdate,
    });
  }

  private async backup() {
    if (this.isBackingUp) throw new CommandError(409, "another backup is being made: try again in a moment");
    this.isBackingUp = true;
    try {
      const { dataDir, settings, backup } = this.options;
      return await streamBackup(join(dataDir, "backups"), {
        store: this.store,
        keys: { [NOISE_KEY]: noiseKeyPathOf(this.options), ...backup?.keys },
        serverUrl: settings.serverUrl,
        elsewhere: backup?.elsewhere ?? [],
        now: this.now(),
      });
    } finally {
      this.isBackingUp = false;
    }
  }

  verifyNode(nodeKey: Uint8Array): boolean {
    return this.mayUseRelay(this.model.nodeByKey(formatKey("nodekey", nodeKey)));
  }

  stats() {
    return { ...this.noise.stats, maps: this.streams.size, nodes: this.model.nodes.size };
  }

  private createMetrics(): Metrics {
    return new Metrics({
      stats: () => this.stats(),
      nodes: () => {
        const count = { online: 0, offline: 0, expired: 0, unauthorized: 0 };
        for (const node of this.model.nodes.values()) {
          const { expired, online } = node;
          count[!isAdmitted(node) ? "unauthorized" : expired ? "expired" : online ? "online" : "offline"]++;
        }
        return count;
      },
      users: () => this.model.users.size,
      pendingLogins: () => this.logins.list().length,
      waiting: () => this.journal.waiting,
    });
  }

  /** What the debug page shows of this server. */
  debugPages(): DebugPages {
    const { model, context } = this;
    const byId = <T extends { id: number }>(records: Iterable<T>) => [...records].sort((a, b) => a.id - b.id);
    const ofNode = (read: (id: number) => unknown) => (id: number) => (model.nodes.has(id) ? read(id) : undefined);
    const iso = (at: Millis | null) => (at === null ? null : new Date(at).toISOString());
    return {
      overview: {
        title: "Overview",
        read: () => ({
          startedAt: iso(this.startedAt),
          serverUrl: context.settings.serverUrl,
          users: model.users.size,
          ...this.stats(),
          memory: process.memoryUsage(),
        }),
      },
      nodes: {
        title: "Nodes",
        read: () =>
          byId(model.nodes.values()).map((node) => ({
            id: node.id,
            name: node.givenName,
            userId: node.userId,
            tags: node.tags,
            addresses: [node.ipv4, node.ipv6],
            online: node.online,
            expired: node.expired,
            authorized: node.authorized,
            suspended: node.suspended,
            lastSeen: iso(node.lastSeen),
            capabilityVersion: node.cap,
          })),
      },
      policy: { title: "Policy in force", read: () => this.policies.current() },
      routes: {
        title: "Routes",
        read: () =>
          byId(model.nodes.values()).map((node) => ({ id: node.id, name: node.givenName, ...routesOf(context, node) })),
      },
      netmap: { title: "Netmap of a node", ofNode: ofNode((id) => this.netmapOf(id)) },
      filter: { title: "Packet filter of a node", ofNode: ofNode((id) => this.access.decide(id).filter()) },
      ssh: { title: "SSH rules of a node", ofNode: ofNode((id) => this.access.decide(id).sshRules) },
      derp: { title: "DERP map", read: () => this.config.derpMap },
      dns: { title: "DNS for all nodes", read: () => this.config.dns },
      chosen: { title: "Set over the API in place of the configuration", read: () => this.chosen.list() },
      "map-streams": { title: "Map streams", read: () => [...this.streams.values()].map(({ state }) => state) },
      logins: {
        title: "Logins that wait",
        read: () =>
          this.logins.list().map(({ request, address, createdAt, expiresAt }) => ({
            kind: request.kind,
            address,
            createdAt: iso(createdAt),
            expiresAt: iso(expiresAt),
          })),
      },
      health: { title: "What clients say is wrong with them", read: () => this.health.list() },
      "client-audit": { title: "What users said when they disconnected", read: () => clientAudit(context) },
      connections: { title: "Noise connections", read: () => this.noise.list() },
    };
  }

  /** The first message that it would be sent. */
  private netmapOf(id: number): MapResponse | null {
    const message = new View(id, this.config, this.access).next(this.model, this.now());
    const peers = message?.Peers ?? [];
    if (peers.length <= DEBUG_PEERS) return message;
    return { ...message, Peers: peers.slice(0, DEBUG_PEERS) };
  }

  private sweepChecks(): void {
    this.sshChecks.sweep().catch((error: Error) => this.options.log?.(error.message));
  }

  /** The server's own relays, as the policy changes them. */
  private applyDerpMap(): void {
    const problem = relayProblem(this.ownDerpMap, this.access.derpMap);
    if (problem) this.context.log(`warning: the policy's relays are not used: ${problem}`);
    const derpMap = withPolicy(this.ownDerpMap, this.access.derpMap, this.config.baseDomain);
    if (JSON.stringify(derpMap) !== JSON.stringify(this.config.derpMap)) this.setConfig({ ...this.config, derpMap });
  }

  /** The table of countries is another one. */
  private locateAll(): void {
    const nodes = [...this.addresses].flatMap(([id, address]) => {
      const node = this.model.nodes.get(id);
      const next = node && this.geoip.located(node, address);
      return next && next !== node ? [next] : [];
    });
    if (nodes.length > 0) this.journal.commit({ nodes }).catch((error: Error) => this.context.log(error.message));
  }

  private setConfig(config: TailnetConfig): void {
    this.config = config;
    for (const stream of this.streams.values()) stream.configure(config);
    this.poke();
  }

  private poke(): void {
    const nodes = this.approver.take(this.access.approvals);
    if (nodes.length > 0) {
      // Told as soon as it is durable.
      this.journal.commit({ nodes }).catch((error: Error) => this.context.log(error.message));
      return;
    }
    for (const stream of this.streams.values()) stream.poke();
  }

  async tick(): Promise<void> {
    this.probes.step();
    const now = this.now();
    const nodes = [...this.model.nodes.values()];
    const flipped = nodes.filter((node) => node.expired !== isExpired(node, now));
    if (flipped.length > 0)
      this.journal.applyVolatile({ nodes: flipped.map((node) => ({ ...node, expired: isExpired(node, now) })) });
    for (const node of flipped) if (!node.expired) this.context.note(`the key of ${this.nameOf(node)} has expired`);
    const warned = nodes.filter((node) => expiresSoon(node, now) !== expiresSoon(node, this.lastTick));
    this.lastTick = now;
    // As if they had changed: then their streams look again.
    if (warned.length > 0)
      this.journal.applyVolatile({ nodes: warned.map(({ id }) => ({ ...this.model.nodes.get(id)! })) });
    const timeout = this.options.settings.node.ephemeralTimeout;
    // Nobody could be seen while the server was down.
    const isAbandoned = (node: NodeRecord) =>
      node.ephemeral && !node.online && Math.max(node.lastSeen ?? node.createdAt, this.startedAt) + timeout <= now;
    const abandoned = nodes.filter(isAbandoned);
    if (abandoned.length > 0) await this.journal.commit({ nodesRemoved: abandoned.map(({ id }) => id) });
    for (const node of abandoned) this.context.note(`${this.nameOf(node)}, ephemeral, was away too long and is gone`);
    this.webhooks.tick();
    await sweepAttributes(this.context);
    await this.logins.sweep();
    await this.apis.sweep();
    await this.sshChecks.sweep();
  }

  close(): Promise<void> {
    this.closing ??= this.shutDown();
    return this.closing;
  }

  private async shutDown(): Promise<void> {
    if (this.ticker) clearInterval(this.ticker);
    this.probes.stop();
    this.pings.close();
    this.extraRecords?.close();
    this.derpMaps.close();
    this.geoip.close();
    this.webhooks.close();
    await this.admin?.close();
    for (const timer of this.offlineTimers.values()) clearTimeout(timer);
    this.offlineTimers.clear();
    const open = [...this.streams.values()];
    this.streams.clear();
    this.turns.close();
    for (const stream of open) stream.end();
    this.sweep.close();
    const now = this.now();
    const seen = [...this.model.nodes.values()].filter((node) => node.online);
    if (seen.length > 0) {
      await this.journal.commit({ nodes: seen.map((node) => ({ ...node, online: false, lastSeen: now })) }).catch(
        // A disk that refuses must not keep the server from ending: "last seen" is all that is lost.
        (error: Error) => this.options.log?.(error.message),
      );
    }
    await this.journal.drained();
    this.noise.close();
    await this.store.close();
  }

  private routes(): void {
    const publicKey = formatKey("mkey", this.noisePublicKey);
    this.app.get("/key", (c) => {
      const version = c.req.query("v") ?? "";
      if (!/^\d{1,5}$/.test(version) || Number(version) < 39)
        return c.text("add ?v=N with the capability version of the client, 39 or more", 400);
      return c.json({ legacyPublicKey: formatKey("mkey", new Uint8Array(32)), publicKey });
    });
    this.app.route("/", this.apis.remote);
    this.app.route("/", this.pages.app);
    this.app.route("/", setupPages(this.options.settings.serverUrl));
    addServerInfo(this.app, {
      healthy: () => this.store.answers(),
      derpMap: () => this.config.derpMap,
      now: this.now,
    });
    this.app.get("/ts2021", (c) => c.text("this must be a WebSocket, or an upgrade by POST", 400));
    this.app.post("/ts2021", (c) => c.text("this must be an upgrade: some proxy has cut the Upgrade header off", 400));
    this.app.post("/verify", async (c) => {
      const body = await c.req.text();
      if (body.length > 4096) return c.text("the request body is too large", 413);
      return c.json({ Allow: this.allows(body) });
    });
  }

  private mayUseRelay(node: NodeRecord | undefined): boolean {
    return node !== undefined && isAdmitted(node) && !isExpired(node, this.now());
  }

  /** `body`: {"NodePublic":"nodekey:…","Source":"…"}, as DERP servers ask. */
  private allows(body: string): boolean {
    try {
      const nodeKey: unknown = JSON.parse(body)?.NodePublic;
      return typeof nodeKey === "string" && this.mayUseRelay(this.model.nodeByKey(nodeKey));
    } catch {
      return false;
    }
  }

  private async register(body: Uint8Array, connection: Connection, signal: AbortSignal): Promise<RegisterResponse> {
    const input = parseRegister(body);
    checkVersion(input.version);
    const before = this.model.nodeByKey(input.nodeKey);
    const answer = await this.enrolment.register(input, connection, signal);
    const node = this.model.nodeByKey(input.nodeKey);
    if (node && !node.expired && (!before || before.expired)) this.context.note(`${this.nameOf(node)} has joined`);
    else if (before && !before.expired && node?.expired !== false)
      this.context.note(`${this.nameOf(before)} has logged out`);
    return answer;
  }

  /** For the log. */
  private nameOf(node: NodeRecord): string {
    return `node ${node.id} (${node.givenName}) of ${profileOf(this.model, userOf(node))?.LoginName}`;
  }

  private async map(body: Uint8Array, connection: Connection, stream: Http2Stream): Promise<void> {
    const input = parseMap(body);
    checkVersion(input.version);
    const node = this.ownNode(input, connection);
    const isSmall = !input.stream && input.omitPeers && !input.readOnly;
    if (!isSmall) this.admit(connection, NETMAP_COST - 1);
    if (!input.readOnly) {
      const told = input.stream ? withStreamRequest(node, input) : withLiteUpdate(this.model, node, input);
      const next = this.geoip.located(told, connection.address);
      if (next !== node) await this.journal.commit({ nodes: [next] });
      if (!input.stream) this.metrics.endpointUpdates.add("ok");
    }
    if (stream.isClosed) return;
    if (input.stream && !input.readOnly) this.openStream(this.ownNode(input, connection), input, stream, connection);
    else if (isSmall) respond(stream, 200);
    else this.answerOnce(this.ownNode(input, connection), input, stream);
  }

  private admit({ machineKey }: Connection, cost: number): void {
    const wait = this.paces.take(machineKey, cost, performance.now());
    if (wait > 0)
      throw new BadRequest("this machine asks too often: ask again later", 429, Math.max(1, Math.ceil(wait / 1000)));
  }

  private ownNode(input: MapInput, connection: Connection): NodeRecord {
    const node = this.model.nodeByKey(input.nodeKey);
    if (!node || node.machineKey !== connection.machineKey) throw new BadRequest("node not found", 404);
    return node;
  }

  private answerOnce(node: NodeRecord, input: MapInput, stream: Http2Stream): void {
    const message = new View(node.id, this.config, this.access).next(this.model, this.now())!;
    stream.respond(200, { "content-type": "application/octet-stream" }, encodeFrame(message, input.zstd));
  }

  private openStream(node: NodeRecord, input: MapInput, stream: Http2Stream, connection: Connection): void {
    if (this.closing) throw new BadRequest("the server is stopping", 503);
    const nodeId = node.id;
    const former = this.streams.get(nodeId);
    if (this.clones.isSuspicious(nodeId, connection, former !== undefined, this.now()))
      this.context.log(
        `node ${nodeId} (${node.givenName}) is connected again and again by two machines, the last at ${connection.address}, that have the same keys: log out on one of them (a copied disk or container?)`,
      );
    former?.end();
    const timer = this.offlineTimers.get(nodeId);
    if (timer) clearTimeout(timer);
    this.offlineTimers.delete(nodeId);
    if (!node.online) this.journal.applyVolatile({ nodes: [{ ...node, online: true }] });
    const mapStream: MapStream = new MapStream({
      stream,
      view: new View(nodeId, this.config, this.access),
      model: this.model,
      zstd: input.zstd,
      keepAlive: input.keepAlive ? (this.options.keepAlive ?? KEEP_ALIVE) : null,
      sweep: this.sweep,
      turns: this.turns,
      now: this.now,
      random: Math.random,
      onSent: (kind) => {
        this.metrics.mapSent.add(kind);
        if (kind === "full" || kind === "change") this.metrics.mapGenerated.add(kind);
      },
      onClose: () => this.onStreamClosed(nodeId, mapStream),
    });
    this.streams.set(nodeId, mapStream);
    this.addresses.set(nodeId, connection.address);
    this.probes.connected(nodeId);
  }

  private onStreamClosed(nodeId: number, mapStream: MapStream): void {
    const isCurrent = this.streams.get(nodeId) === mapStream;
    this.metrics.mapEnded.add(isCurrent ? "client" : this.streams.has(nodeId) ? "replaced" : "server");
    // A newer stream has taken its place, or the server ends.
    if (!isCurrent) return;
    this.streams.delete(nodeId);
    this.addresses.delete(nodeId);
    this.probes.disconnected(nodeId);
    this.offlineTimers.set(
      nodeId,
      setTimeout(() => this.goOffline(nodeId), this.options.offlineGrace ?? OFFLINE_GRACE),
    );
  }

  private goOffline(nodeId: number): void {
    this.offlineTimers.delete(nodeId);
    const node = this.model.nodes.get(nodeId);
    if (!node?.online) return;
    this.journal
      .commit({ nodes: [{ ...node, online: false, lastSeen: this.now() }] })
      .catch((error: Error) => this.options.log?.(error.message));
  }

  private onApplied(effect: Effect): void {
    this.webhooks.onApplied(effect);
    this.clashes.onApplied(effect, this.now());
    this.leaving.push(...effect.removed);
    for (const { id, status } of effect.undo.users ?? []) if (status === "active") this.suspended.push(id);
    this.access.onApplied(effect);
    this.approver.onApplied(effect);
  }

  private onDurable(): void {
    this.webhooks.onDurable();
    for (const node of this.leaving.splice(0)) {
      // Undone, because the disk refused: it stays.
      if (this.model.nodes.has(node.id)) continue;
      this.streams.get(node.id)?.end(farewell(node, this.config, this.now()));
      this.streams.delete(node.id);
      this.addresses.delete(node.id);
      this.clones.forget(node.id);
      this.health.forget(node.id);
      this.options.onNodeRemoved?.(parseKey("nodekey", node.nodeKey)!);
    }
    for (const id of this.suspended.splice(0)) {
      if (this.model.users.get(id)?.status !== "suspended") continue;
      for (const node of this.model.nodesOfUser(id)) this.options.onNodeRemoved?.(parseKey("nodekey", node.nodeKey)!);
    }
    this.poke();
  }
}

/**
 * Stream requests are read-only: what they say may be older than the last small update. But after a reconnect some clients
 * send no small update, so what is not known at all is taken from here.
 */
function withStreamRequest(node: NodeRecord, input: MapInput): NodeRecord {
  const next = { ...node };
  if (node.discoKey === "" && input.discoKey !== "") next.discoKey = input.discoKey;
  if (node.endpoints.length === 0 && input.endpoints && input.endpoints.length > 0) next.endpoints = input.endpoints;
  if (node.homeDerp === 0 && input.hostinfo) next.homeDerp = homeDerpOf(input.hostinfo) ?? 0;
  next.cap = input.version;
  return unchanged(node, next) ? node : next;
}

function withLiteUpdate(model: Model, node: NodeRecord, input: MapInput): NodeRecord {
  const next: NodeRecord = {
    ...(input.hostinfo ? withHostinfo(model, node, input.hostinfo) : node),
    discoKey: input.discoKey || node.discoKey,
    // The first small update after a start names none; then those that peers know are better than nothing.
    endpoints: input.endpoints ?? node.endpoints,
    cap: input.version,
  };
  return unchanged(node, next) ? node : next;
}

function unchanged(a: NodeRecord, b: NodeRecord): boolean {
  return JSON.stringify(a) === JSON.stringify(b);
}
