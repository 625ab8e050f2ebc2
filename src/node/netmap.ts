// The netmap: what the control server has told this node, kept up to date from the messages of one map stream
// (spec/ts2021-control-protocol.md, sections 12 to 18). Pure: the same messages give the same netmap, and applying deltas
// gives what the full map would have given.
//
// Inside a message: self node first, then the peers (complete list, or else removed, changed, seen, online, patch).
// Values of the wrong shape are left out rather than believed; a message never half-applies and then throws.
import type {
  CapMap,
  DERPMap,
  DERPRegion,
  DisplayMessage,
  DNSConfig,
  FilterRule,
  MapResponse,
  Node,
  NodeID,
  PeerChange,
  UserID,
  UserProfile,
} from "../wire/tailcfg.ts";
import { ZERO_TIME } from "../wire/tailcfg.ts";

export interface Netmap {
  self: Node;
  peers: ReadonlyMap<NodeID, Node>;
  derpMap: DERPMap;
  dns: DNSConfig;
  domain: string;
  collectServices: boolean;
  /** Named packet filters; none at all lets nothing in. */
  filters: ReadonlyMap<string, FilterRule[]>;
  users: ReadonlyMap<UserID, UserProfile>;
  health: string[];
  displayMessages: ReadonlyMap<string, DisplayMessage>;
}

/** Which parts a message touched. All false: the netmap is as it was. */
export interface NetmapChange {
  self: boolean;
  peers: boolean;
  derpMap: boolean;
  dns: boolean;
  filters: boolean;
  other: boolean;
}

/** The first message of a stream must carry the self node. */
class NetmapError extends Error {
  override name = "NetmapError";
}

/** Applies the messages of one stream. A new stream begins with a new session. */
export class NetmapSession {
  private map:
    | {
        -readonly [K in keyof Netmap]: Netmap[K] extends ReadonlyMap<infer Id, infer Value>
          ? Map<Id, Value>
          : Netmap[K];
      }
    | null = null;

  /** Null until the first message. The object is live; its parts change with `apply`. */
  get netmap(): Netmap | null {
    return this.map;
  }

  /**
   * `now`: Unix time in milliseconds, for PeerSeenChange. Keep-alives change nothing. Throws NetmapError when the first
   * message has no usable Node.
   */
  apply(message: MapResponse, now: number): NetmapChange {
    const change: NetmapChange = {
      self: false,
      peers: false,
      derpMap: false,
      dns: false,
      filters: false,
      other: false,
    };
    if (message.KeepAlive === true) return change;
    const self = readNode(message.Node);
    if (!this.map) {
      if (!self) throw new NetmapError("the first message of the map stream has no node for this machine");
      this.map = {
        self,
        peers: new Map(),
        derpMap: { Regions: {} },
        dns: {},
        domain: "",
        collectServices: false,
        filters: new Map(),
        users: new Map(),
        health: [],
        displayMessages: new Map(),
      };
      // Whatever an earlier stream said is void now.
      for (const part of Object.keys(change) as (keyof NetmapChange)[]) change[part] = true;
    }
    const map = this.map;
    if (self) {
      map.self = self;
      change.self = true;
    }
    this.applyPeers(message, now, change);
    if (isObject(message.DERPMap)) {
      map.derpMap = mergeDerpMap(map.derpMap, message.DERPMap);
      change.derpMap = true;
    }
    if (isObject(message.DNSConfig)) {
      map.dns = message.DNSConfig;
      change.dns = true;
    }
    this.applyFilters(message, change);
    this.applyRest(message, change);
    return change;
  }

  private applyPeers(message: MapResponse, now: number, change: NetmapChange): void {
    const { peers } = this.map!;
    const complete = readNodes(message.Peers);
    if (complete.length > 0) {
      peers.clear();
      for (const node of complete) peers.set(node.ID, node);
      change.peers = true;
      return;
    }
    for (const id of list(message.PeersRemoved)) if (peers.delete(id as NodeID)) change.peers = true;
    for (const node of readNodes(message.PeersChanged)) {
      peers.set(node.ID, node);
      change.peers = true;
    }
    const edit = (id: NodeID, update: (peer: Node) => Node) => {
      const peer = peers.get(id);
      if (!peer) return;
      peers.set(id, update(peer));
      change.peers = true;
    };
    for (const [id, seen] of entries(message.PeerSeenChange))
      edit(Number(id), (peer) => {
        const { LastSeen: _, ...rest } = peer;
        return seen === true ? { ...rest, LastSeen: new Date(now).toISOString() } : rest;
      });
    for (const [id, online] of entries(message.OnlineChange))
      if (typeof online === "boolean") edit(Number(id), (peer) => ({ ...peer, Online: online }));
    for (const patch of list(message.PeersChangedPatch))
      if (isObject(patch)) edit((patch as PeerChange).NodeID, (peer) => patchPeer(peer, patch as PeerChange));
  }

  private applyFilters(message: MapResponse, change: NetmapChange): void {
    const { filters } = this.map!;
    if (Array.isArray(message.PacketFilter)) {
      filters.set("base", readRules(message.PacketFilter));
      change.filters = true;
    }
    if (!isObject(message.PacketFilters)) return;
    if (message.PacketFilters["*"] === null) filters.clear();
    for (const [name, rules] of entries(message.PacketFilters)) {
      if (rules === null) filters.delete(name);
      else if (Array.isArray(rules)) filters.set(name, readRules(rules));
    }
    change.filters = true;
  }

  private applyRest(message: MapResponse, change: NetmapChange): void {
    const map = this.map!;
    if (typeof message.Domain === "string" && message.Domain !== "") {
      map.domain = message.Domain;
      change.other = true;
    }
    if (typeof message.CollectServices === "boolean") {
      map.collectServices = message.CollectServices;
      change.other = true;
    }
    for (const profile of list(message.UserProfiles))
      if (isObject(profile) && isId((profile as UserProfile).ID)) {
        map.users.set((profile as UserProfile).ID, profile as UserProfile);
        change.other = true;
      }
    if (Array.isArray(message.Health)) {
      map.health = strings(message.Health);
      change.other = true;
    }
    if (isObject(message.DisplayMessages)) {
      if (message.DisplayMessages["*"] === null) map.displayMessages.clear();
      for (const [id, text] of entries(message.DisplayMessages)) {
        if (text === null) map.displayMessages.delete(id);
        else if (isObject(text)) map.displayMessages.set(id, text as DisplayMessage);
      }
      change.other = true;
    }
  }
}

/** All rules in force: the named filters, concatenated in the order of their names. */
export function filterRules(netmap: Netmap): FilterRule[] {
  return [...netmap.filters.entries()].sort(([a], [b]) => (a < b ? -1 : 1)).flatMap(([, rules]) => rules);
}

/** Peers by ascending id: the order of everything that is shown or compared. */
export function sortedPeers(netmap: Netmap): Node[] {
  return [...netmap.peers.values()].sort((a, b) => a.ID - b.ID);
}

/** Home relay region of a node, 0 when unknown. */
export function homeRegion(node: Node): number {
  if (node.HomeDERP) return node.HomeDERP;
  const legacy = /^127\.3\.3\.40:(\d{1,9})$/.exec(node.DERP ?? "");
  return legacy ? Number(legacy[1]) : 0;
}

/** Unix time in milliseconds; null for absent, zero and unreadable times. */
export function timeOf(text: string | null | undefined): number | null {
  if (!text || text === ZERO_TIME) return null;
  const ms = Date.parse(text);
  return Number.isFinite(ms) && ms > 0 ? ms : null;
}

/** Whether a node's key is no longer valid at `now`. */
export function keyExpired(node: Node, now: number): boolean {
  if (node.Expired) return true;
  const expiry = timeOf(node.KeyExpiry);
  return expiry !== null && expiry <= now;
}

function patchPeer(peer: Node, patch: PeerChange): Node {
  const next: Node = { ...peer };
  if (typeof patch.DERPRegion === "number" && patch.DERPRegion !== 0) {
    next.HomeDERP = patch.DERPRegion;
    delete next.DERP;
  }
  if (typeof patch.Cap === "number" && patch.Cap !== 0) next.Cap = patch.Cap;
  if (isObject(patch.CapMap)) next.CapMap = patch.CapMap as CapMap;
  if (Array.isArray(patch.Endpoints) && patch.Endpoints.length > 0) next.Endpoints = strings(patch.Endpoints);
  if (typeof patch.Key === "string") next.Key = patch.Key;
  if (typeof patch.KeySignature === "string") next.KeySignature = patch.KeySignature;
  if (typeof patch.DiscoKey === "string" && !isStaleDiscoKey(peer, patch)) next.DiscoKey = patch.DiscoKey;
  if (typeof patch.Online === "boolean") next.Online = patch.Online;
  if (typeof patch.LastSeen === "string") next.LastSeen = patch.LastSeen;
  if (typeof patch.KeyExpiry === "string") next.KeyExpiry = patch.KeyExpiry;
  return next;
}

/** A key that an offline peer had before we last heard of it says nothing about the key that it has now. */
function isStaleDiscoKey(peer: Node, patch: PeerChange): boolean {
  const told = timeOf(patch.LastSeen);
  const known = timeOf(peer.LastSeen);
  return patch.Online === false && told !== null && known !== null && told < known;
}

function mergeDerpMap(old: DERPMap, next: DERPMap): DERPMap {
  if (!isObject(next.Regions)) return isObject(next.HomeParams) ? { ...old, HomeParams: next.HomeParams } : old;
  const Regions: Record<string, DERPRegion> = {};
  for (const [id, region] of entries(next.Regions)) {
    if (!isObject(region) || !isId((region as DERPRegion).RegionID) || !/^\d+$/.test(id)) continue;
    const nodes = list((region as DERPRegion).Nodes).filter(
      (node) => isObject(node) && typeof (node as { HostName?: unknown }).HostName === "string",
    );
    Regions[id] = { ...(region as DERPRegion), Nodes: nodes as NonNullable<DERPRegion["Nodes"]> };
  }
  return { ...next, Regions };
}

/** Null unless ID and Key are there; lists become lists of strings. */
function readNode(value: unknown): Node | null {
  if (!isObject(value)) return null;
  const node = value as Node;
  if (!isId(node.ID) || typeof node.Key !== "string") return null;
  const out: Node = { ...node, Addresses: strings(node.Addresses), Endpoints: strings(node.Endpoints) };
  if (Array.isArray(node.AllowedIPs)) out.AllowedIPs = strings(node.AllowedIPs);
  else delete out.AllowedIPs;
  if (typeof node.Name !== "string") out.Name = "";
  if (!isObject(node.Hostinfo)) delete out.Hostinfo;
  return out;
}

function readNodes(value: unknown): Node[] {
  return list(value)
    .map(readNode)
    .filter((node) => node !== null);
}

function readRules(rules: unknown[]): FilterRule[] {
  return rules.filter(isObject) as FilterRule[];
}

function isObject(value: unknown): value is object {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isId(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) > 0;
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

function strings(value: unknown): string[] {
  return list(value).filter((item) => typeof item === "string") as string[];
}

function entries(value: unknown): [string, unknown][] {
  return isObject(value) ? Object.entries(value) : [];
}
