// Simulated nodes that speak the real protocol to a control server: Noise, HTTP/2, registration, map streams. They keep of a
// netmap the ids of the peers, and of a delta what it says of ids and endpoints; equal frames are looked into once.
import { createHash } from "node:crypto";
import { zstdDecompressSync } from "node:zlib";
import { IdSet } from "../../src/control/idset.ts";
import { formatKey, randomBytes } from "../../src/crypto/keys.ts";
import { x25519Public } from "../../src/crypto/x25519.ts";
import { type ControlStream, Ts2021Client } from "../../src/net/ts2021-client.ts";
import type * as tc from "../../src/wire/tailcfg.ts";

/** Capability version that the nodes claim. */
const VERSION = 138;
const MAX_FRAME = 256 << 20;
const MAX_ANSWER = 1 << 20;
const TIMEOUT = 60_000;

/** What a message says, as far as it is counted. */
interface Digest {
  /** Id of the node itself; null: the message does not say. */
  self: number | null;
  /** Ids of a full list; null: this is a delta, or says nothing of peers. */
  full: number[] | null;
  added: number[];
  removed: number[];
  /** "id endpoint", of nodes that changed. */
  endpoints: Set<string>;
}

/** Ids of the nodes in a message, self included: they stand before their StableID. */
function idsIn(json: Buffer): number[] {
  const ids: number[] = [];
  const mark = ',"StableID":';
  for (let at = json.indexOf(mark); at >= 0; at = json.indexOf(mark, at + mark.length)) {
    let from = at;
    while (json[from - 1]! >= 0x30 && json[from - 1]! <= 0x39) from--;
    ids.push(Number(json.toString("latin1", from, at)));
  }
  return ids;
}

const SELF = '"Node":{"ID":';

function digest(json: Buffer): Digest {
  // A full netmap has megabytes, of which only ids count.
  if (json.includes('"Peers":[{')) {
    const self = json.indexOf(SELF) + SELF.length;
    return {
      self: Number.parseInt(json.toString("latin1", self, self + 16), 10),
      full: idsIn(json),
      added: [],
      removed: [],
      endpoints: new Set(),
    };
  }
  const message = JSON.parse(json.toString()) as tc.MapResponse;
  const endpoints = new Set<string>();
  for (const { ID, Endpoints } of message.PeersChanged ?? [])
    for (const e of Endpoints ?? []) endpoints.add(`${ID} ${e}`);
  for (const patch of message.PeersChangedPatch ?? [])
    for (const e of patch?.Endpoints ?? []) endpoints.add(`${patch!.NodeID} ${e}`);
  return {
    self: message.Node?.ID ?? null,
    full: null,
    added: (message.PeersChanged ?? []).map(({ ID }) => ID!),
    removed: message.PeersRemoved ?? [],
    endpoints,
  };
}

/** Most nodes get the same delta: it is looked into once. */
const digests = new Map<string, Digest>();

function digestOf(frame: Uint8Array): Digest {
  const read = () => digest(zstdDecompressSync(frame, { maxOutputLength: MAX_FRAME }));
  if (frame.length > 64 * 1024) return read();
  const key = createHash("sha1").update(frame).digest("base64");
  let known = digests.get(key);
  if (!known) {
    if (digests.size >= 256) digests.delete(digests.keys().next().value!);
    known = read();
    digests.set(key, known);
  }
  return known;
}

/** One endpoint change on its way to the other nodes. */
export interface Change {
  what: string;
  /** Milliseconds, by performance.now(). */
  began: number;
  /** Delays of those that have it, in milliseconds. */
  seen: number[];
}

/** What all nodes share. */
export class Counters {
  bytes = 0;
  messages = 0;
  /** Streams that ended though nobody here ended them. */
  ended = 0;
  /** When the last message came, by performance.now(). */
  lastMessage = 0;
  change: Change | null = null;
}

export class LoadNode {
  id = 0;
  private readonly machinePrivate = randomBytes(32);
  private readonly nodeKey = formatKey("nodekey", x25519Public(randomBytes(32)));
  private readonly discoKey = formatKey("discokey", x25519Public(randomBytes(32)));
  private client: Ts2021Client;
  private stream: ControlStream | null = null;
  private known = new IdSet();
  private count = 0;
  private seenChange: Change | null = null;
  private endpoint: string;

  constructor(
    readonly index: number,
    /** Nodes of a class see each other. */
    readonly classNumber: number,
    private readonly url: string,
    private readonly counters: Counters,
  ) {
    this.endpoint = `203.0.113.${index & 255}:${1024 + index}`;
    this.client = this.dial();
  }

  /** Peers that it knows. */
  get peers(): number {
    return this.count;
  }

  private dial(): Ts2021Client {
    const { url: serverUrl, machinePrivate } = this;
    return new Ts2021Client({ serverUrl, machinePrivate, version: VERSION, randomBytes });
  }

  private hostinfo(): tc.Hostinfo {
    return {
      IPNVersion: "1.102.5",
      OS: "linux",
      OSVersion: "6.12.0",
      Distro: "debian",
      DistroVersion: "13",
      Hostname: `load-${this.index}`,
      GoArch: "amd64",
      Services: [
        { Proto: "peerapi4", Port: 40000 },
        { Proto: "peerapi6", Port: 40000 },
      ],
      NetInfo: { PreferredDERP: 999, WorkingUDP: true },
    };
  }

  private async post(path: string, body: unknown): Promise<Uint8Array> {
    const request = { method: "POST" as const, path, body: JSON.stringify(body) };
    const { status, body: answer } = await this.client.request(request, MAX_ANSWER, TIMEOUT);
    if (status !== 200) throw new Error(`${path} answered ${status}: ${Buffer.from(answer).toString().slice(0, 200)}`);
    return answer;
  }

  async register(authKey: string): Promise<void> {
    const answer = await this.post("/machine/register", {
      Version: VERSION,
      NodeKey: this.nodeKey,
      Auth: { AuthKey: authKey },
      Hostinfo: this.hostinfo(),
    });
    const { Error: problem, MachineAuthorized } = JSON.parse(Buffer.from(answer).toString()) as tc.RegisterResponse;
    if (problem || !MachineAuthorized) throw new Error(`the server refused a node: ${problem || "not authorized"}`);
  }

  private mapRequest(): tc.MapRequest {
    return {
      Version: VERSION,
      Compress: "zstd",
      KeepAlive: true,
      NodeKey: this.nodeKey,
      DiscoKey: this.discoKey,
      Hostinfo: this.hostinfo(),
      Endpoints: ["192.168.0.1:41641", this.endpoint],
      EndpointTypes: [1, 1],
    };
  }

  /** Opens the map stream; resolves with the first netmap. */
  async open(): Promise<void> {
    const body = JSON.stringify({ ...this.mapRequest(), Stream: true });
    const stream = await this.client.stream({ method: "POST", path: "/machine/map", body });
    if (stream.status !== 200) throw new Error(`a map stream was refused with ${stream.status}`);
    this.stream = stream;
    await new Promise<void>((resolve, reject) => {
      this.read(stream, resolve)
        .catch(() => {})
        .then(() => {
          reject(new Error("a map stream ended before its first message"));
          if (this.stream === stream) this.counters.ended++;
        });
    });
  }

  /** Ends the connection, as a machine that goes to sleep. */
  drop(): void {
    this.stream = null;
    this.client.close();
    this.client = this.dial();
  }

  async change(endpoint: string): Promise<void> {
    this.endpoint = endpoint;
    await this.post("/machine/map", { ...this.mapRequest(), OmitPeers: true });
  }

  private async read(stream: ControlStream, onMessage: () => void): Promise<void> {
    let chunks: Uint8Array[] = [];
    let have = 0;
    let want = 4;
    for await (const chunk of stream.chunks) {
      chunks.push(chunk);
      have += chunk.length;
      while (have >= want) {
        const bytes = Buffer.concat(chunks);
        want = 4 + (bytes.length >= 4 ? bytes.readUInt32LE(0) : 0);
        chunks = [bytes];
        if (have < want) break;
        this.take(bytes.subarray(4, want));
        onMessage();
        chunks = [bytes.subarray(want)];
        have -= want;
        want = 4;
      }
    }
  }

  private take(frame: Uint8Array): void {
    const { counters } = this;
    counters.bytes += frame.length + 4;
    const { self, full, added, removed, endpoints } = digestOf(frame);
    if (self !== null) this.id = self;
    counters.messages++;
    counters.lastMessage = performance.now();
    if (full) {
      this.known = new IdSet();
      this.count = 0;
    }
    for (const id of full ?? added) this.learn(id);
    for (const id of removed) this.forget(id);
    const { change } = counters;
    if (change && this.seenChange !== change && endpoints.has(change.what)) {
      this.seenChange = change;
      change.seen.push(counters.lastMessage - change.began);
    }
  }

  private learn(id: number): void {
    if (id === this.id || this.known.has(id)) return;
    this.known.add(id);
    this.count++;
  }

  private forget(id: number): void {
    if (!this.known.has(id)) return;
    this.known.delete(id);
    this.count--;
  }
}
