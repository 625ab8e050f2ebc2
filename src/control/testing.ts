// For tests: a control server in a folder of its own behind a real port, and nodes that speak the real protocol to it.
import { mkdtempSync, rmSync } from "node:fs";
import { type ClientHttp2Session, type ClientHttp2Stream, connect as http2Connect } from "node:http2";
import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Duplex } from "node:stream";
import { zstdDecompressSync } from "node:zlib";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { type Listener, listen } from "../net/listener.ts";
import { NoiseDuplex } from "../net/noise-duplex.ts";
import { type ControlStream, Ts2021Client } from "../net/ts2021-client.ts";
import { NoiseInitiator, type NoiseKeys, RESPONSE_LENGTH, RecordSealer, readHandshakeReply } from "../wire/noise.ts";
import type * as tc from "../wire/tailcfg.ts";
import type { ApiPreAuthKey, ApiUser } from "./api/shapes.ts";
import { configOf } from "./dns.ts";
import { type Control, type ControlOptions, createControl } from "./index.ts";
import type { NodeRecord, UserRecord } from "./model.ts";
import type { TailnetConfig } from "./netmap.ts";
import { type ControlSettings, defaultSettings, type OidcSettings } from "./settings.ts";

export const DERP_MAP: tc.DERPMap = {
  Regions: { "1": { RegionID: 1, Nodes: [{ Name: "1a", RegionID: 1, HostName: "relay.test" }] } },
};

/** A number as the 64 hexadecimal digits of a key. */
export function digits(n: number): string {
  return n.toString(16).padStart(64, "0");
}

/** A node as the model holds it, offline, of user 1; its keys, names and addresses come from its id. */
export function makeNode(id: number, more: Partial<NodeRecord> = {}): NodeRecord {
  return {
    id,
    machineKey: `mkey:${digits(id)}`,
    nodeKey: `nodekey:${digits(id)}`,
    discoKey: `discokey:${digits(id)}`,
    userId: 1,
    tags: [],
    hostname: `host-${id}`,
    givenName: `host-${id}`,
    nameFromHost: true,
    ipv4: `100.64.0.${id}`,
    ipv6: `fd7a:115c:a1e0::${id.toString(16)}`,
    endpoints: [],
    hostinfo: { OS: "linux" },
    homeDerp: 0,
    cap: 138,
    ephemeral: false,
    registerMethod: "authkey",
    authorized: true,
    approvedRoutes: [],
    attributes: {},
    authKeyId: null,
    expiry: null,
    createdAt: 0,
    lastSeen: null,
    online: false,
    expired: false,
    suspended: false,
    ...more,
  };
}

/** A user as the model holds it, made here. */
export function makeUser(id: number, more: Partial<UserRecord> = {}): UserRecord {
  return {
    id,
    name: `user${id}`,
    displayName: "",
    email: "",
    profilePicUrl: "",
    provider: "",
    providerId: "",
    groups: [],
    role: "member",
    status: "active",
    createdAt: id,
    ...more,
  };
}

/** An identity provider that asks for nothing but a login. */
export function makeOidc(more: Partial<OidcSettings> = {}): OidcSettings {
  return {
    id: "oidc",
    name: "Example",
    issuer: "https://id.example.com",
    clientId: "weft",
    clientSecret: "",
    onlyStartIfAvailable: true,
    useExpiryFromToken: false,
    scope: ["openid", "profile", "email", "groups"],
    emailVerifiedRequired: true,
    extraParams: {},
    allowedDomains: [],
    allowedUsers: [],
    allowedGroups: [],
    pkce: "S256",
    groupsClaim: "groups",
    groupsPrefix: "",
    roles: {},
    ...more,
  };
}

/** Defaults, "net.test" and the relay of DERP_MAP. */
export function makeSettings(more: Partial<ControlSettings> = {}): ControlSettings {
  const settings = defaultSettings("http://control.test", "net.test");
  return { ...settings, derp: { ...settings.derp, embedded: DERP_MAP }, ...more };
}

/** "net.test" and the relay of DERP_MAP, all else as in makeSettings. */
export function makeConfig(more: Partial<TailnetConfig> = {}): TailnetConfig {
  return { ...configOf(makeSettings()), ...more };
}

/** Polls until `check` gives something; throws after `deadline` milliseconds. */
export async function until<T>(check: () => T | null | undefined | false, what: string, deadline = 60_000): Promise<T> {
  const end = performance.now() + deadline;
  for (;;) {
    const value = check();
    if (value) return value;
    if (performance.now() > end) throw new Error(`waited ${deadline} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** A client's netmap: messages applied as the protocol says they must be. */
export class Mirror {
  self: tc.Node | null = null;
  peers = new Map<number, tc.Node>();
  profiles = new Map<number, tc.UserProfile>();
  filters: tc.MapResponse["PacketFilters"] = null;
  dns: tc.DNSConfig | null = null;

  apply(message: tc.MapResponse): void {
    if (message.KeepAlive) return;
    if (!this.self && !message.Node) throw new Error("initial MapResponse lacked node");
    if (message.Node) this.self = message.Node;
    for (const profile of message.UserProfiles ?? []) this.profiles.set(profile.ID, profile);
    if (message.PacketFilters) this.filters = message.PacketFilters;
    if (message.DNSConfig) this.dns = message.DNSConfig;
    if (message.Peers && message.Peers.length > 0) {
      this.peers = new Map(message.Peers.map((peer) => [peer.ID, peer]));
      return;
    }
    for (const id of message.PeersRemoved ?? []) this.peers.delete(id);
    for (const peer of message.PeersChanged ?? []) this.peers.set(peer.ID, peer);
    for (const patch of message.PeersChangedPatch ?? []) if (patch) this.patch(patch);
  }

  private patch(patch: tc.PeerChange): void {
    const old = this.peers.get(patch.NodeID);
    if (!old) throw new Error(`a patch for the unknown peer ${patch.NodeID}`);
    const peer = { ...old };
    if (patch.Key) peer.Key = patch.Key;
    if (patch.DiscoKey) peer.DiscoKey = patch.DiscoKey;
    if (patch.Endpoints && patch.Endpoints.length > 0) peer.Endpoints = patch.Endpoints;
    if (patch.DERPRegion) {
      peer.HomeDERP = patch.DERPRegion;
      peer.DERP = `127.3.3.40:${patch.DERPRegion}`;
    }
    if (patch.Cap) peer.Cap = patch.Cap;
    if (patch.KeyExpiry) {
      delete peer.KeyExpiry;
      if (!patch.KeyExpiry.startsWith("0001-")) peer.KeyExpiry = patch.KeyExpiry;
    }
    if (patch.Online !== undefined && patch.Online !== null) {
      peer.Online = patch.Online;
      if (patch.Online) delete peer.LastSeen;
    }
    if (patch.LastSeen) peer.LastSeen = patch.LastSeen;
    this.peers.set(peer.ID, peer);
  }

  peer(name: string): tc.Node | undefined {
    return [...this.peers.values()].find((peer) => peer.Name?.startsWith(`${name}.`));
  }
}

/** An open map stream as a client reads it. */
export class MapReader extends Mirror {
  readonly messages: tc.MapResponse[] = [];
  readonly frames: Uint8Array[] = [];
  ended = false;

  constructor(
    readonly stream: ControlStream,
    private readonly zstd: boolean,
  ) {
    super();
    this.read().catch(() => {
      this.ended = true;
    });
  }

  private async read(): Promise<void> {
    let buffered = Buffer.alloc(0);
    for await (const chunk of this.stream.chunks) {
      buffered = Buffer.concat([buffered, chunk]);
      while (buffered.length >= 4 && buffered.length >= 4 + buffered.readUInt32LE(0)) {
        const end = 4 + buffered.readUInt32LE(0);
        const frame = buffered.subarray(4, end);
        buffered = buffered.subarray(end);
        const json = this.zstd ? zstdDecompressSync(frame, { maxOutputLength: 1 << 28 }) : frame;
        const message = JSON.parse(json.toString()) as tc.MapResponse;
        this.frames.push(frame);
        this.messages.push(message);
        this.apply(message);
      }
    }
    this.ended = true;
  }
}

export interface RegisterOptions {
  authKey?: string;
  hostname?: string;
  expiry?: string;
  oldNodeKey?: string;
  ephemeral?: boolean;
  tags?: string[];
  version?: number;
  /** The address that a former answer gave: waits for its verdict. */
  followup?: string;
}

export class TestNode {
  machinePrivate = randomBytes(32);
  nodeKey = formatKey("nodekey", x25519Public(randomBytes(32)));
  discoKey = formatKey("discokey", x25519Public(randomBytes(32)));
  readonly client: Ts2021Client;

  constructor(
    readonly url: string,
    readonly hostname: string,
    machinePrivate?: Uint8Array,
  ) {
    if (machinePrivate) this.machinePrivate = machinePrivate;
    this.client = new Ts2021Client({ serverUrl: url, machinePrivate: this.machinePrivate, version: 138, randomBytes });
  }

  async post(path: string, body: unknown): Promise<{ status: number; text: string }> {
    const text = typeof body === "string" ? body : JSON.stringify(body);
    const { status, body: answer } = await this.client.request({ method: "POST", path, body: text }, 1 << 24, 60_000);
    return { status, text: new TextDecoder().decode(answer) };
  }

  async register(options: RegisterOptions = {}): Promise<tc.RegisterResponse> {
    const { status, text } = await this.post("/machine/register", {
      Version: options.version ?? 138,
      NodeKey: this.nodeKey,
      OldNodeKey: options.oldNodeKey ?? formatKey("nodekey", new Uint8Array(32)),
      ...(options.authKey && { Auth: { AuthKey: options.authKey } }),
      Expiry: options.expiry ?? "0001-01-01T00:00:00Z",
      Followup: options.followup ?? "",
      Ephemeral: options.ephemeral ?? false,
      Hostinfo: { OS: "linux", Hostname: options.hostname ?? this.hostname, RequestTags: options.tags ?? null },
    });
    if (status !== 200) throw new Error(`${status}: ${text}`);
    return JSON.parse(text) as tc.RegisterResponse;
  }

  /** A new node key; returns the old one. */
  rotate(): string {
    const old = this.nodeKey;
    this.nodeKey = formatKey("nodekey", x25519Public(randomBytes(32)));
    return old;
  }

  mapRequest(more: tc.MapRequest = {}): tc.MapRequest {
    return {
      Version: 138,
      Compress: "zstd",
      KeepAlive: true,
      NodeKey: this.nodeKey,
      DiscoKey: this.discoKey,
      Hostinfo: { OS: "linux", Hostname: this.hostname },
      ...more,
    };
  }

  lite(more: tc.MapRequest = {}): Promise<{ status: number; text: string }> {
    return this.post("/machine/map", this.mapRequest({ OmitPeers: true, ...more }));
  }

  async stream(more: tc.MapRequest = {}): Promise<MapReader> {
    const request = this.mapRequest({ Stream: true, ...more });
    const stream = await this.client.stream({ method: "POST", path: "/machine/map", body: JSON.stringify(request) });
    if (stream.status !== 200) throw new Error(`map stream refused with ${stream.status}`);
    const reader = new MapReader(stream, request.Compress === "zstd");
    await until(() => reader.self, "the first message");
    return reader;
  }

  close(): void {
    this.client.close();
  }
}

/** TCP through a cable that can be cut: then nothing arrives any more, in neither direction, and nobody is told. */
export class Cable implements AsyncDisposable {
  private isCut = false;
  private readonly sockets: Socket[] = [];

  private constructor(private readonly server: Server) {}

  static async to(port: number): Promise<Cable> {
    const server = createServer();
    const cable = new Cable(server);
    server.on("connection", (near) => {
      const far = connect(port, "127.0.0.1");
      cable.join(near, far);
      cable.join(far, near);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    return cable;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  cut(): void {
    this.isCut = true;
  }

  private join(from: Socket, to: Socket): void {
    this.sockets.push(from);
    from.on("data", (bytes) => {
      if (!this.isCut) to.write(bytes);
    });
    from.on("error", () => {});
    from.on("close", () => {
      if (!this.isCut) to.destroy();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.sockets) socket.destroy();
    await new Promise((resolve) => this.server.close(resolve));
  }
}

/** A client that reaches the control server by WebSocket, as those in browsers do. */
export class WebSocketNode {
  private constructor(
    private readonly socket: WebSocket,
    private readonly session: ClientHttp2Session,
  ) {}

  static async connect(server: { url: string; control: { noisePublicKey: Uint8Array } }): Promise<WebSocketNode> {
    const initiator = new NoiseInitiator({
      version: 138,
      machinePrivate: randomBytes(32),
      ephemeralPrivate: randomBytes(32),
      controlPublic: server.control.noisePublicKey,
    });
    const handshake = encodeURIComponent(Buffer.from(initiator.initiation).toString("base64"));
    const address = `${server.url.replace("http:", "ws:")}/ts2021?X-Tailscale-Handshake=${handshake}`;
    const socket = new WebSocket(address, "tailscale-control-protocol");
    socket.binaryType = "arraybuffer";
    const bytes = new Duplex({
      read() {},
      write: (chunk: Uint8Array<ArrayBuffer>, _encoding, done) => {
        // Boundaries of messages mean nothing: cut in two.
        socket.send(chunk.subarray(0, 1));
        if (chunk.length > 1) socket.send(chunk.subarray(1));
        done();
      },
    });
    socket.onmessage = ({ data }) => bytes.push(Buffer.from(data as ArrayBuffer));
    socket.onclose = () => bytes.destroy();
    await new Promise((resolve, reject) => {
      socket.onopen = resolve;
      socket.onerror = () => reject(new Error("the WebSocket was refused"));
    });
    if (socket.protocol !== "tailscale-control-protocol") throw new Error("the subprotocol was not selected");
    const first = await until(() => bytes.read(RESPONSE_LENGTH) as Buffer | null, "the handshake response");
    const reply = readHandshakeReply(new Uint8Array(first));
    if (!reply || "error" in reply) throw new Error("the handshake was refused");
    const duplex = new NoiseDuplex({ role: "client", socket: bytes, keys: initiator.finish(reply.response) });
    return new WebSocketNode(socket, http2Connect("https://unused", { createConnection: () => duplex }));
  }

  open(path: string, body: unknown): ClientHttp2Stream {
    const stream = this.session.request({ ":method": "POST", ":path": path });
    stream.on("error", () => {});
    stream.end(JSON.stringify(body));
    return stream;
  }

  async request(path: string, body: unknown): Promise<string> {
    const stream = this.open(path, body);
    let text = "";
    for await (const chunk of stream) text += chunk;
    return text;
  }

  close(): void {
    this.session.destroy();
    this.socket.close();
  }
}

/** A control server for one test; `using` ends it. */
export class TestServer implements AsyncDisposable {
  readonly nodes: TestNode[] = [];

  private constructor(
    readonly dataDir: string,
    readonly control: Control,
    readonly listener: Listener,
    readonly url: string,
  ) {}

  static async start(options: Partial<ControlOptions> = {}): Promise<TestServer> {
    const dataDir = options.dataDir ?? mkdtempSync(join(tmpdir(), "weft-control-"));
    const control = await createControl({ settings: makeSettings(), ...options, dataDir }).catch((error: Error) => {
      if (options.dataDir === undefined) rmSync(dataDir, { recursive: true, force: true });
      throw error;
    });
    const { app, upgrades } = control;
    const listener = await listen({ host: "127.0.0.1", port: 0, app, upgrades });
    return new TestServer(dataDir, control, listener, `http://127.0.0.1:${listener.port}`);
  }

  node(hostname: string, machinePrivate?: Uint8Array): TestNode {
    const node = new TestNode(this.url, hostname, machinePrivate);
    this.nodes.push(node);
    return node;
  }

  async admin<T>(method: string, path: string, body?: unknown): Promise<T> {
    const response = await fetch(`http://weft/api/v1${path}`, {
      method,
      unix: this.control.adminSocket,
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(`${response.status} ${(answer as { detail: string }).detail}`);
    return answer as T;
  }

  async user(name: string): Promise<number> {
    return Number((await this.admin<{ user: ApiUser }>("POST", "/user", { name })).user.id);
  }

  /** The text of a new pre-auth key. */
  async key(options: Record<string, unknown>): Promise<string> {
    return (await this.admin<{ preAuthKey: ApiPreAuthKey }>("POST", "/preauthkey", options)).preAuthKey.key;
  }

  /** A registered node. */
  async join(hostname: string, authKey: string): Promise<TestNode> {
    const node = this.node(hostname);
    const response = await node.register({ authKey });
    if (response.Error || !response.MachineAuthorized) throw new Error(`not admitted: ${JSON.stringify(response)}`);
    return node;
  }

  /** Ends the server but keeps its data folder. */
  async stop(): Promise<void> {
    for (const node of this.nodes) node.close();
    await this.control.close();
    await this.listener.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
    rmSync(this.dataDir, { recursive: true, force: true });
  }
}

/** Header lines of an upgrade to Noise. */
export const HANDSHAKE_UPGRADE = "Upgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n";

/** Of a handshake with the server. */
export function initiator(server: TestServer, machinePrivate = randomBytes(32)): NoiseInitiator {
  return new NoiseInitiator({
    version: 138,
    machinePrivate,
    ephemeralPrivate: randomBytes(32),
    controlPublic: server.control.noisePublicKey,
  });
}

/** An HTTP header line. */
export function headerOf(initiation: Uint8Array): string {
  return `X-Tailscale-Handshake: ${Buffer.from(initiation).toString("base64")}\r\n`;
}

/** A client of bytes: what it says is up to the test. */
export class RawClient {
  heard: Buffer = Buffer.alloc(0);
  closed = false;
  private constructor(readonly socket: Socket) {}

  static async connect(server: TestServer): Promise<RawClient> {
    const socket = connect(server.listener.port, "127.0.0.1");
    const client = new RawClient(socket);
    socket.on("data", (chunk: Buffer) => {
      client.heard = Buffer.concat([client.heard, chunk]);
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      client.closed = true;
    });
    await new Promise((resolve) => socket.on("connect", resolve));
    return client;
  }

  /** Sends a request head and waits for the end of the connection. */
  async ask(head: string): Promise<string> {
    this.socket.write(`${head}\r\n`);
    await until(() => this.closed, "the server to close");
    return this.heard.toString("latin1");
  }

  async handshake(server: TestServer, machinePrivate?: Uint8Array): Promise<{ keys: NoiseKeys; sealer: RecordSealer }> {
    const noise = initiator(server, machinePrivate);
    this.socket.write(`POST /ts2021 HTTP/1.1\r\nHost: x\r\n${HANDSHAKE_UPGRADE}${headerOf(noise.initiation)}\r\n`);
    const start = await until(() => {
      const end = this.heard.indexOf("\r\n\r\n");
      return end > 0 && this.heard.length >= end + 4 + RESPONSE_LENGTH && end + 4;
    }, "the handshake response");
    const reply = readHandshakeReply(new Uint8Array(this.heard.subarray(start)));
    if (!reply || "error" in reply) throw new Error("refused");
    const keys = noise.finish(reply.response);
    return { keys, sealer: new RecordSealer(keys.send) };
  }
}
