// The tailnet in memory: users, pre-auth keys and nodes, with the indexes that requests need.
//
// Records are immutable: a change replaces them. `apply` takes a Change, returns what it did to which nodes and the Change
// that undoes it. The store journals Changes, `netmap.ts` turns the stamps into the smallest message for each open map.
// No I/O, no clock, no randomness: `now` and secrets are handed in.
import type { Hostinfo } from "../wire/tailcfg.ts";
import { peerHostinfo } from "./hostinfo.ts";
import type { Role } from "./policy/types.ts";

/** Milliseconds since 1970. */
export type Millis = number;

export type UserStatus = "active" | "suspended";

export interface UserRecord {
  id: number;
  /** Unique among the users of one provider; "" when an identity provider gave none that is usable. */
  name: string;
  displayName: string;
  email: string;
  profilePicUrl: string;
  /** "" for users made here, "oidc" for those of an identity provider. */
  provider: string;
  /** Issuer and subject of an identity provider, unique; "" for users made here. */
  providerId: string;
  /** Groups that the identity provider named at the last login, without "group:". */
  groups: readonly string[];
  /** Set by an administrator or by the provider's groups; "autogroup:admin" and the like of the policy mean it. */
  role: Role;
  /** Who is suspended cannot sign in, and neither his nodes nor his pre-auth keys are let in. */
  status: UserStatus;
  createdAt: Millis;
}

export interface PreAuthKeyRecord {
  id: number;
  /** Public part of the secret, for look-up: 12 hex digits. */
  prefix: string;
  /** SHA-256 of the secret part, hex. */
  hash: string;
  /** Null: a key of tags alone. */
  userId: number | null;
  reusable: boolean;
  ephemeral: boolean;
  used: boolean;
  tags: readonly string[];
  description: string;
  /** Nodes that join with it need no approval. */
  preauthorized: boolean;
  /** Null: never. */
  expiration: Millis | null;
  /** When it was revoked; null: it was not. */
  revokedAt: Millis | null;
  createdAt: Millis;
}

export type RegisterMethod = "authkey" | "cli" | "oidc";

export interface NodeRecord {
  id: number;
  /** "mkey:…", "nodekey:…", "discokey:…"; the disco key is "" until the node has told it. */
  machineKey: string;
  nodeKey: string;
  discoKey: string;
  /** Null for tagged nodes. */
  userId: number | null;
  tags: readonly string[];
  /** As the node sent it. */
  hostname: string;
  /** The label in MagicDNS, unique in the tailnet. */
  givenName: string;
  /** The label follows the hostname; false once an administrator has renamed the node. */
  nameFromHost: boolean;
  ipv4: string;
  ipv6: string;
  endpoints: readonly string[];
  /** Whole, as the node sent it, NetInfo included. */
  hostinfo: Hostinfo;
  /** DERP region, 0 is none. */
  homeDerp: number;
  /** Capability version. */
  cap: number;
  ephemeral: boolean;
  registerMethod: RegisterMethod;
  /** False: an administrator has yet to let it in; until then it has no peers. */
  authorized: boolean;
  /** Of its advertised routes, those that may serve: masked prefixes, sorted. */
  approvedRoutes: readonly string[];
  /** Device attributes ("custom:…") that postures compare. */
  attributes: Readonly<Record<string, string | number | boolean>>;
  /** The pre-auth key that was used last for it, whatever became of the node since; null: none, or it was deleted. */
  authKeyId: number | null;
  /** Null: never. */
  expiry: Millis | null;
  createdAt: Millis;
  /** When the last map stream ended; null: never connected. */
  lastSeen: Millis | null;
  /** Whether a map stream is open. Not in the store. */
  online: boolean;
  /** Whether `expiry` has passed, as of the last look at the clock. Not in the store. */
  expired: boolean;
  /** Whether its user is suspended: the model sees to it. Not in the store. */
  suspended: boolean;
}

/** Whether a node may know of others, and they of it. */
export function isAdmitted({ authorized, suspended }: NodeRecord): boolean {
  return authorized && !suspended;
}

/** High-water marks, so that ids are never used twice and addresses are reused last. */
export interface Counters {
  lastUser: number;
  lastKey: number;
  lastNode: number;
  /** The address given last; "" before the first. */
  lastIPv4: string;
  lastIPv6: string;
}

/**
 * Small collections that are kept whole in memory and in the store as JSON: each kind belongs to one file of this folder,
 * which extends this interface by declaration merging (`declare module "./model.ts"`) and documents its value.
 */
// biome-ignore lint/suspicious/noEmptyInterface: extended where each kind is used
export interface Documents {}
export type DocumentKind = keyof Documents & string;

/** One document to put (`value`) or to take out (null). */
export type DocumentChange = { [K in DocumentKind]: { kind: K; id: string; value: Documents[K] | null } }[DocumentKind];

/** Ids of nodes to take out, then whole records to put in place of those with the same id, then ids of the rest to take out. */
export interface Change {
  users?: UserRecord[];
  usersRemoved?: number[];
  keys?: PreAuthKeyRecord[];
  keysRemoved?: number[];
  nodes?: NodeRecord[];
  nodesRemoved?: number[];
  documents?: DocumentChange[];
  counters?: Partial<Counters>;
}

/** The model's version at which each part of a node, as its peers see it, changed last. */
export interface Stamps {
  /** Something that a patch cannot say. */
  whole: number;
  key: number;
  disco: number;
  endpoints: number;
  derp: number;
  cap: number;
  expiry: number;
  online: number;
  /** Something that the node itself must be told. */
  self: number;
}

export interface Effect {
  /** Nodes that were added, changed or removed, and those of users that were changed. */
  nodes: number[];
  /** Nodes that were removed. */
  removed: NodeRecord[];
  undo: Change;
}

function sameList(a: readonly string[], b: readonly string[]): boolean {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}

function sameHostinfo(a: Hostinfo, b: Hostinfo): boolean {
  return a === b || JSON.stringify(peerHostinfo(a)) === JSON.stringify(peerHostinfo(b));
}

function stampsAfter(old: NodeRecord, next: NodeRecord, stamps: Stamps, version: number): Stamps {
  const identity =
    old.givenName !== next.givenName ||
    old.userId !== next.userId ||
    !sameList(old.tags, next.tags) ||
    !sameList(old.approvedRoutes, next.approvedRoutes) ||
    old.authorized !== next.authorized ||
    old.suspended !== next.suspended ||
    old.ipv4 !== next.ipv4 ||
    old.ipv6 !== next.ipv6 ||
    old.expired !== next.expired;
  const endpoints = !sameList(old.endpoints, next.endpoints);
  // A patch cannot take endpoints, home relay, disco key or capability version away: zero values mean "unchanged" there.
  const cleared =
    (endpoints && next.endpoints.length === 0) ||
    (old.homeDerp !== next.homeDerp && next.homeDerp === 0) ||
    (old.discoKey !== next.discoKey && next.discoKey === "") ||
    (old.cap !== next.cap && next.cap === 0);
  const key = old.nodeKey !== next.nodeKey;
  const expiry = old.expiry !== next.expiry;
  return {
    whole: identity || cleared || !sameHostinfo(old.hostinfo, next.hostinfo) ? version : stamps.whole,
    key: key ? version : stamps.key,
    disco: old.discoKey !== next.discoKey ? version : stamps.disco,
    endpoints: endpoints ? version : stamps.endpoints,
    derp: old.homeDerp !== next.homeDerp ? version : stamps.derp,
    cap: old.cap !== next.cap ? version : stamps.cap,
    expiry: expiry ? version : stamps.expiry,
    online: old.online !== next.online || old.lastSeen !== next.lastSeen ? version : stamps.online,
    self: identity || key || expiry ? version : stamps.self,
  };
}

function stampsOf(version: number): Stamps {
  return {
    whole: version,
    key: version,
    disco: version,
    endpoints: version,
    derp: version,
    cap: version,
    expiry: version,
    online: version,
    self: version,
  };
}

const NOTHING: readonly number[] = [];
/** Changes that are remembered, at least; and for each node. */
const MIN_LOG = 1024;
const LOG_PER_NODE = 2;

/** Which nodes changed lately. Readers remember a version instead of what they have yet to look at. */
class ChangeLog {
  private ids: number[] = [];
  /** Beside each id: the version of its change. Ascending. */
  private versions: number[] = [];
  /** Changes after it are known. */
  private start = 0;
  private version = 0;
  /** Answers, as of the last change: most readers ask for the same. */
  private readonly answers = new Map<number, readonly number[]>();

  add(ids: readonly number[], version: number, nodes: number): void {
    this.version = version;
    this.answers.clear();
    for (const id of ids) {
      this.ids.push(id);
      this.versions.push(version);
    }
    const max = Math.max(MIN_LOG, nodes * LOG_PER_NODE);
    if (this.ids.length <= 2 * max) return;
    this.start = this.versions[this.ids.length - max - 1]!;
    const from = this.after(this.start);
    this.ids = this.ids.slice(from);
    this.versions = this.versions.slice(from);
  }

  since(version: number): readonly number[] | null {
    if (version === this.version) return NOTHING;
    if (version < this.start) return null;
    let answer = this.answers.get(version);
    if (!answer) {
      answer = [...new Set(this.ids.slice(this.after(version)))].sort((a, b) => a - b);
      this.answers.set(version, answer);
    }
    return answer;
  }

  /** Index of the first change after a version. */
  private after(version: number): number {
    let [low, high] = [0, this.versions.length];
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.versions[middle]! > version) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

function kept<T>(list: T[] | undefined, item: T): T[] {
  if (!list) return [item];
  list.push(item);
  return list;
}

function unindex(index: Map<string, number>, key: string, id: number): void {
  if (index.get(key) === id) index.delete(key);
}

export class Model {
  /** Grows by one with each change. */
  version = 0;
  /** As of the last change of a user. */
  usersVersion = 0;
  readonly users = new Map<number, UserRecord>();
  readonly keys = new Map<number, PreAuthKeyRecord>();
  readonly nodes = new Map<number, NodeRecord>();
  counters: Counters = { lastUser: 0, lastKey: 0, lastNode: 0, lastIPv4: "", lastIPv6: "" };
  private readonly collections = new Map<string, Map<string, unknown>>();
  private readonly stamps = new Map<number, Stamps>();
  private readonly log = new ChangeLog();
  private readonly byNodeKey = new Map<string, number>();
  private readonly byMachine = new Map<string, Set<number>>();
  private readonly byName = new Map<string, number>();
  private readonly byAddress = new Map<string, number>();
  private readonly byPrefix = new Map<string, number>();
  private readonly byUserName = new Map<string, number>();
  private readonly byProviderId = new Map<string, number>();

  nodeByKey(nodeKey: string): NodeRecord | undefined {
    return this.nodes.get(this.byNodeKey.get(nodeKey) ?? 0);
  }

  nodesOfMachine(machineKey: string): NodeRecord[] {
    return [...(this.byMachine.get(machineKey) ?? [])].map((id) => this.nodes.get(id)!);
  }

  nodesOfUser(userId: number): NodeRecord[] {
    return [...this.nodes.values()].filter((node) => node.userId === userId);
  }

  nodeByName(givenName: string): NodeRecord | undefined {
    return this.nodes.get(this.byName.get(givenName) ?? 0);
  }

  hasAddress(ip: string): boolean {
    return this.byAddress.has(ip);
  }

  userByName(name: string): UserRecord | undefined {
    return this.users.get(this.byUserName.get(name) ?? 0);
  }

  keyByPrefix(prefix: string): PreAuthKeyRecord | undefined {
    return this.keys.get(this.byPrefix.get(prefix) ?? 0);
  }

  userByProviderId(providerId: string): UserRecord | undefined {
    return this.users.get(this.byProviderId.get(providerId) ?? 0);
  }

  /** The documents of a kind by id. */
  documents<K extends DocumentKind>(kind: K): ReadonlyMap<string, Documents[K]> {
    return (this.collections.get(kind) ?? new Map()) as ReadonlyMap<string, Documents[K]>;
  }

  stampsOf(nodeId: number): Stamps | undefined {
    return this.stamps.get(nodeId);
  }

  /**
   * Nodes that were added, changed or removed after a version, and those of users that were changed: ascending, and the same
   * list for all who ask at one version. Null: that was too long ago.
   */
  changedSince(version: number): readonly number[] | null {
    return this.log.since(version);
  }

  /** Nodes in order of their ids. */
  sortedNodes(): NodeRecord[] {
    return [...this.nodes.values()].sort((a, b) => a.id - b.id);
  }

  apply(change: Change): Effect {
    this.version++;
    const undo: Change = {};
    const touched: number[] = [];
    const removed: NodeRecord[] = [];
    if (change.counters) {
      // Counters only grow, also when the change that moved them is undone: an id may have been seen.
      this.counters = { ...this.counters, ...change.counters };
    }
    for (const id of change.nodesRemoved ?? []) {
      const node = this.nodes.get(id);
      if (!node) continue;
      this.dropNode(node);
      this.stamps.delete(id);
      undo.nodes = kept(undo.nodes, node);
      touched.push(id);
      removed.push(node);
    }
    for (const user of change.users ?? []) {
      const old = this.users.get(user.id);
      this.putUser(user, undo);
      if (!old) continue;
      for (const node of this.nodesOfUser(user.id)) {
        // Who sees nodes of this user knows its profile.
        touched.push(node.id);
        // What the user's record brings needs no undo of its own.
        if (old.status !== user.status) this.putNode(node, {});
      }
    }
    for (const key of change.keys ?? []) this.putKey(key, undo);
    for (const node of change.nodes ?? []) {
      this.putNode(node, undo);
      touched.push(node.id);
    }
    for (const document of change.documents ?? []) this.putDocument(document, undo);
    for (const id of change.keysRemoved ?? []) {
      const key = this.keys.get(id);
      if (!key) continue;
      this.keys.delete(id);
      this.byPrefix.delete(key.prefix);
      undo.keys = kept(undo.keys, key);
    }
    for (const id of change.usersRemoved ?? []) {
      const user = this.users.get(id);
      if (!user) continue;
      this.users.delete(id);
      this.unindexUser(user);
      undo.users = kept(undo.users, user);
    }
    // A record may stand in a change more than once: the first of its states is put back last.
    for (const list of [undo.users, undo.keys, undo.nodes, undo.documents]) list?.reverse();
    if (undo.users || undo.usersRemoved) this.usersVersion = this.version;
    this.log.add(touched, this.version, this.nodes.size);
    return { nodes: touched, removed, undo };
  }

  private putUser(user: UserRecord, undo: Change): void {
    const old = this.users.get(user.id);
    if (old) {
      this.unindexUser(old);
      undo.users = kept(undo.users, old);
    } else undo.usersRemoved = kept(undo.usersRemoved, user.id);
    this.users.set(user.id, user);
    // A name counts here for users that were made here; those of identity providers are known by their subject.
    if (user.providerId === "") this.byUserName.set(user.name, user.id);
    else this.byProviderId.set(user.providerId, user.id);
  }

  private unindexUser(user: UserRecord): void {
    unindex(this.byUserName, user.name, user.id);
    unindex(this.byProviderId, user.providerId, user.id);
  }

  private putDocument({ kind, id, value }: DocumentChange, undo: Change): void {
    let collection = this.collections.get(kind);
    if (!collection) {
      collection = new Map();
      this.collections.set(kind, collection);
    }
    const old = collection.get(id) ?? null;
    undo.documents = kept(undo.documents, { kind, id, value: old } as DocumentChange);
    if (value === null) collection.delete(id);
    else collection.set(id, value);
  }

  private putKey(key: PreAuthKeyRecord, undo: Change): void {
    const old = this.keys.get(key.id);
    if (old) undo.keys = kept(undo.keys, old);
    else undo.keysRemoved = kept(undo.keysRemoved, key.id);
    this.keys.set(key.id, key);
    this.byPrefix.set(key.prefix, key.id);
  }

  private putNode(given: NodeRecord, undo: Change): void {
    const suspended = given.userId !== null && this.users.get(given.userId)?.status === "suspended";
    const node = given.suspended === suspended ? given : { ...given, suspended };
    const old = this.nodes.get(node.id);
    const stamps = this.stamps.get(node.id);
    if (old && stamps) {
      // Removals come first: what this change has added would be put back by them.
      if (!undo.nodesRemoved?.includes(node.id)) undo.nodes = kept(undo.nodes, old);
      this.stamps.set(node.id, stampsAfter(old, node, stamps, this.version));
      this.dropNode(old);
    } else {
      undo.nodesRemoved = kept(undo.nodesRemoved, node.id);
      this.stamps.set(node.id, stampsOf(this.version));
    }
    this.nodes.set(node.id, node);
    this.byNodeKey.set(node.nodeKey, node.id);
    this.byName.set(node.givenName, node.id);
    if (node.ipv4) this.byAddress.set(node.ipv4, node.id);
    if (node.ipv6) this.byAddress.set(node.ipv6, node.id);
    const siblings = this.byMachine.get(node.machineKey);
    if (siblings) siblings.add(node.id);
    else this.byMachine.set(node.machineKey, new Set([node.id]));
  }

  private dropNode(node: NodeRecord): void {
    this.nodes.delete(node.id);
    // Another node may hold the name or the key by now, when several records change at once.
    unindex(this.byNodeKey, node.nodeKey, node.id);
    unindex(this.byName, node.givenName, node.id);
    unindex(this.byAddress, node.ipv4, node.id);
    unindex(this.byAddress, node.ipv6, node.id);
    const siblings = this.byMachine.get(node.machineKey);
    siblings?.delete(node.id);
    if (siblings?.size === 0) this.byMachine.delete(node.machineKey);
  }
}
