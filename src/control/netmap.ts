// What a node is told about the tailnet: the first message of a map stream, and the smallest message that brings an open
// one up to date (spec/ts2021-control-protocol.md, sections 12 to 14, 26). Pure: the model goes in, messages come out.
//
// A view remembers which peers its node knows and up to which version of the model; the model says what changed after that.
// So however long a slow reader makes a message wait, nothing waits but a number, and views that are at the same version and
// see the same share one message.
import { createHash } from "node:crypto";
import type * as tc from "../wire/tailcfg.ts";
import { ZERO_TIME } from "../wire/tailcfg.ts";
import { clientVersion, type Warnings, warningChange, warningsOf } from "./client-advice.ts";
import { dnsFor } from "./dns.ts";
import { peerHostinfo } from "./hostinfo.ts";
import { IdSet } from "./idset.ts";
import { isAdmitted, type Model, type NodeRecord, type UserRecord } from "./model.ts";
import type { ClientSettings } from "./settings.ts";

/** Whom tagged nodes belong to, for clients. */
export const TAGGED_USER_ID = 2147455555;
const TAGGED_PROFILE: tc.UserProfile = {
  ID: TAGGED_USER_ID,
  LoginName: "tagged-devices",
  DisplayName: "Tagged Devices",
};

/** What is the same for the whole tailnet. */
export interface TailnetConfig {
  /** Suffix of MagicDNS names, without dots at the ends. */
  baseDomain: string;
  derpMap: tc.DERPMap;
  /** Before what concerns one node alone (dns.ts). */
  dns: tc.DNSConfig;
  /** Nodes can get certificates for their names. */
  certificates: boolean;
  /** Nodes may send each other files. */
  taildrop: boolean;
  /** Whether clients update themselves where their user said nothing. */
  autoUpdate: boolean;
  /** Whether clients may send their logs to their maker. */
  logtail: boolean;
  /** What is known of newer clients. */
  clients: ClientSettings;
}

/** A node as one viewer sees it. */
export interface NodeView {
  /** Addresses and routes, as prefixes. */
  allowedIPs: string[];
  primaryRoutes: string[];
  capMap: tc.CapMap;
}

/** What a policy decides for one node. */
export interface Decision {
  /** Null: its addresses and no more. */
  self: NodeView | null;
  filter(): tc.FilterRule[];
  /** Equal for equal filters. */
  filterDigest: string;
  sshRules: unknown[];
  /** Peers that are more, or less, than a node with its addresses. */
  special: ReadonlyMap<number, NodeView>;
}

/** The nodes that some viewers may know of. Maybe the viewers themselves, too. */
export interface Circle {
  readonly set: IdSet;
  /** Ascending. */
  readonly ids: readonly number[];
}

/** `ids`: ascending. */
export function circleOf(ids: readonly number[]): Circle {
  const set = new IdSet();
  for (const id of ids) set.add(id);
  return { set, ids };
}

/** Who may know of whom, and what follows from it. By ids of nodes, all of them in the model. */
export interface Access {
  /**
   * Grows when `decide` may have another answer for this viewer. A change of nodes concerns few viewers in this way: whom
   * nodes see that did not change, beside those that did, stays as it is.
   */
  epochOf(viewer: number): number;
  /** The epoch since when whom anybody sees follows from the changed nodes alone. */
  readonly era: number;
  sees(viewer: number, peer: number): boolean;
  /** All whom a viewer sees. */
  circle(viewer: number): Circle;
  decide(viewer: number): Decision;
  /**
   * What the role of a node's owner shows in its apps: the same object for the same. As long as no user has a role,
   * everybody is an administrator there, as under Headscale.
   */
  roleCapabilities(node: NodeRecord): tc.CapMap;
}

const selfCapabilities = new WeakMap<TailnetConfig, tc.CapMap>();

/** What every node may do, beside what the policy gives it. */
function capabilitiesOf(config: TailnetConfig): tc.CapMap {
  let capMap = selfCapabilities.get(config);
  if (!capMap) {
    capMap = {
      "https://tailscale.com/cap/ssh": null,
      "default-auto-update": [config.autoUpdate],
      ...(config.taildrop && { "https://tailscale.com/cap/file-sharing": null }),
      ...(config.certificates && { https: null }),
    };
    selfCapabilities.set(config, capMap);
  }
  return capMap;
}

export function timeText(millis: number): string {
  return new Date(millis).toISOString();
}

export function userOf(node: NodeRecord): number {
  return node.userId === null ? TAGGED_USER_ID : node.userId;
}

export function profileOf(model: Model, userId: number): tc.UserProfile | null {
  if (userId === TAGGED_USER_ID) return TAGGED_PROFILE;
  const user = model.users.get(userId);
  return user ? { ID: user.id, ...namesOf(user) } : null;
}

export function namesOf(user: UserRecord): { LoginName: string; DisplayName: string; ProfilePicURL?: string } {
  const loginName = user.email || user.name || user.providerId;
  return {
    LoginName: loginName,
    DisplayName: user.displayName || user.name || loginName,
    ...(user.profilePicUrl && { ProfilePicURL: user.profilePicUrl }),
  };
}

export function addressesOf(node: NodeRecord): string[] {
  return [...(node.ipv4 ? [`${node.ipv4}/32`] : []), ...(node.ipv6 ? [`${node.ipv6}/128`] : [])];
}

function baseNode(node: NodeRecord, config: TailnetConfig): tc.Node {
  const addresses = addressesOf(node);
  return {
    ID: node.id,
    StableID: String(node.id),
    Name: config.baseDomain ? `${node.givenName}.${config.baseDomain}.` : node.givenName,
    User: userOf(node),
    Key: node.nodeKey,
    ...(node.expiry !== null && { KeyExpiry: timeText(node.expiry) }),
    Machine: node.machineKey,
    ...(node.discoKey && { DiscoKey: node.discoKey }),
    Addresses: addresses,
    AllowedIPs: addresses,
    ...(node.endpoints.length > 0 && { Endpoints: [...node.endpoints] }),
    // Clients before capability version 111 read only the legacy form.
    ...(node.homeDerp > 0 && { DERP: `127.3.3.40:${node.homeDerp}`, HomeDERP: node.homeDerp }),
    Created: timeText(node.createdAt),
    Cap: node.cap,
    ...(node.tags.length > 0 && { Tags: [...node.tags] }),
    ...(!node.online && node.lastSeen !== null && { LastSeen: timeText(node.lastSeen) }),
    Online: node.online,
    MachineAuthorized: isAdmitted(node) && !node.expired,
    ...(node.expired && { Expired: true }),
  };
}

const MAX_FQDN = 253;

/** Whether a node's name is one of DNS. Clients give up on a netmap with a peer of another: its peers are not told of it. */
export function hasName({ givenName }: NodeRecord, { baseDomain }: TailnetConfig): boolean {
  return givenName !== "" && givenName.length + 1 + baseDomain.length <= MAX_FQDN;
}

const peerForms = new WeakMap<TailnetConfig, WeakMap<NodeRecord, tc.Node>>();

/** A node as its peers see it. Records are immutable, so the form is built once for all viewers. */
export function peerNode(node: NodeRecord, config: TailnetConfig): tc.Node {
  let forms = peerForms.get(config);
  if (!forms) {
    forms = new WeakMap();
    peerForms.set(config, forms);
  }
  let form = forms.get(node);
  if (!form) {
    form = { ...baseNode(node, config), Hostinfo: peerHostinfo(node.hostinfo) };
    forms.set(node, form);
  }
  return form;
}

/** A node as it sees itself. */
export function selfNode(
  node: NodeRecord,
  config: TailnetConfig,
  view: NodeView | null = null,
  role: tc.CapMap = {},
): tc.Node {
  const form = { ...baseNode(node, config), Hostinfo: node.hostinfo, CapMap: { ...capabilitiesOf(config), ...role } };
  return view ? seenAs(form, view) : form;
}

/** With the addresses, routes and capabilities of a view. */
function seenAs(node: tc.Node, { allowedIPs, primaryRoutes, capMap }: NodeView): tc.Node {
  return {
    ...node,
    Addresses: (node.Addresses ?? []).filter((address) => allowedIPs.includes(address)),
    AllowedIPs: allowedIPs,
    ...(primaryRoutes.length > 0 && { PrimaryRoutes: primaryRoutes }),
    ...(Object.keys(capMap).length > 0 && { CapMap: { ...node.CapMap, ...capMap } }),
  };
}

/** The last word to a node that was deleted: its key is over, so that it asks for a login instead of retrying for ever. */
export function farewell(node: NodeRecord, config: TailnetConfig, now: number): tc.MapResponse {
  return { Node: selfNode({ ...node, expiry: now - 1000, expired: true }, config) };
}

/** Rules are long: what was sent is remembered by its hash. */
function digest(value: unknown): string {
  const text = JSON.stringify(value);
  return text.length < 64 ? text : createHash("sha256").update(text).digest("base64");
}

const forms = new WeakMap<ReadonlyMap<number, NodeView>, ReadonlyMap<number, string>>();

/** Views by id, in a form that can be compared. Many viewers share one map of them. */
function formsOf(special: ReadonlyMap<number, NodeView>): ReadonlyMap<number, string> {
  let found = forms.get(special);
  if (!found) {
    found = new Map([...special].map(([id, view]) => [id, JSON.stringify(view)]));
    forms.set(special, found);
  }
  return found;
}

function patchOf(node: NodeRecord, model: Model, since: number): tc.PeerChange | null {
  const stamps = model.stampsOf(node.id)!;
  const patch: tc.PeerChange = { NodeID: node.id };
  // A new node key comes with all that peers need to reach its holder.
  const rotated = stamps.key > since;
  if (rotated) patch.Key = node.nodeKey;
  if ((rotated || stamps.disco > since) && node.discoKey) patch.DiscoKey = node.discoKey;
  if ((rotated || stamps.endpoints > since) && node.endpoints.length > 0) patch.Endpoints = [...node.endpoints];
  if (rotated || stamps.expiry > since) patch.KeyExpiry = node.expiry === null ? ZERO_TIME : timeText(node.expiry);
  if (stamps.derp > since && node.homeDerp > 0) patch.DERPRegion = node.homeDerp;
  if (stamps.cap > since && node.cap > 0) patch.Cap = node.cap;
  if (stamps.online > since) {
    patch.Online = node.online;
    if (!node.online && node.lastSeen !== null) patch.LastSeen = timeText(node.lastSeen);
  }
  return Object.keys(patch).length > 1 ? patch : null;
}

/** Clients from it on have a node capability for updates. */
const AUTO_UPDATE_CAPABILITY = 131;

/** What a view says of a peer. Digits: a list of them is a key. */
const Turn = { None: 0, Patch: 1, Whole: 2, Removed: 3 } as const;
type Turn = (typeof Turn)[keyof typeof Turn];

/** Messages by what is said of the peers that changed, as long as somebody asks for that list. */
const sharedMessages = new WeakMap<readonly number[], Map<TailnetConfig, Map<string, tc.MapResponse | null>>>();

function sharedBy(ids: readonly number[], config: TailnetConfig): Map<string, tc.MapResponse | null> {
  let byConfig = sharedMessages.get(ids);
  if (!byConfig) {
    byConfig = new Map();
    sharedMessages.set(ids, byConfig);
  }
  let messages = byConfig.get(config);
  if (!messages) {
    messages = new Map();
    byConfig.set(config, messages);
  }
  return messages;
}

/** What one open map stream has been told, and what it has yet to be told. */
export class View {
  private readonly known = new IdSet();
  /** Owners whose profiles were told, as they were then; null for the owner of tagged nodes. */
  private readonly knownUsers = new Map<number, UserRecord | null>();
  /** Version of the model that the last message reflects; 0: no message yet. */
  private sent = 0;
  private decision: Pick<Decision, "self" | "special"> | null = null;
  /** Whether the node had been let in, as of the last message. */
  private isAdmitted = false;
  private epoch = -1;
  /** As of the last message. */
  private toldConfig: TailnetConfig | null = null;
  /** What was told last, of what the policy decides. */
  private told = { self: "", filter: "", ssh: "", special: new Map<number, string>() as ReadonlyMap<number, string> };
  /** The shared object where it was that, else a digest. */
  private toldDns: tc.DNSConfig | string = "";
  private warnings: Warnings = new Map();
  private toldRole: tc.CapMap | null = null;

  constructor(
    readonly nodeId: number,
    private config: TailnetConfig,
    private readonly access: Access,
  ) {}

  /** What the whole tailnet is told is another now: the parts that differ go with the next message. */
  configure(config: TailnetConfig): void {
    this.config = config;
  }

  hasWork(model: Model): boolean {
    return (
      this.sent === 0 ||
      this.config !== this.toldConfig ||
      model.changedSince(this.sent)?.length !== 0 ||
      this.access.epochOf(this.nodeId) !== this.epoch
    );
  }

  /** The next message, which is never to be changed; null when nothing has changed or the node is gone. */
  next(model: Model, now: number): tc.MapResponse | null {
    const self = model.nodes.get(this.nodeId);
    if (!self) return null;
    const message = this.sent === 0 ? this.first(self, model, now) : this.delta(self, model, now);
    this.sent = model.version;
    this.toldConfig = this.config;
    return message;
  }

  private delta(self: NodeRecord, model: Model, now: number): tc.MapResponse | null {
    const ids = model.changedSince(this.sent) ?? this.all();
    const shared = this.sharedDelta(self, model, ids);
    return shared === undefined ? this.ownDelta(self, model, new Set(ids), now) : shared;
  }

  /** Whoever it knows or may know, itself among them. */
  private all(): number[] {
    const { set, ids } = this.access.circle(this.nodeId);
    return [...ids, ...this.known.difference(set), this.nodeId];
  }

  /** The message where only peers changed, and this view is like many others; undefined: it is not. */
  private sharedDelta(self: NodeRecord, model: Model, ids: readonly number[]): tc.MapResponse | null | undefined {
    if (
      this.config !== this.toldConfig ||
      this.access.epochOf(this.nodeId) !== this.epoch ||
      isAdmitted(self) !== this.isAdmitted ||
      model.usersVersion > this.sent
    )
      return undefined;
    let turns = "";
    for (const id of ids) {
      if (id === this.nodeId) return undefined;
      const peer = model.nodes.get(id);
      const turn = this.turnOf(id, peer, self, model);
      if (turn === Turn.Whole) {
        const userId = userOf(peer!);
        if (this.decision!.special.has(id) || this.knownUsers.get(userId) !== (model.users.get(userId) ?? null))
          return undefined;
      }
      turns += turn;
    }
    const messages = sharedBy(ids, this.config);
    let message = messages.get(turns);
    if (message === undefined) {
      message = this.messageOf(ids, (i) => Number(turns[i]) as Turn, model);
      messages.set(turns, message);
    }
    if (message?.PeersChanged) for (const { ID } of message.PeersChanged) this.known.add(ID!);
    if (message?.PeersRemoved) for (const id of message.PeersRemoved) this.known.delete(id);
    return message;
  }

  private turnOf(id: number, peer: NodeRecord | undefined, self: NodeRecord, model: Model): Turn {
    const known = this.known.has(id);
    if (!peer || !this.isShown(peer) || !isAdmitted(self) || !this.access.sees(self.id, id))
      return known ? Turn.Removed : Turn.None;
    return !known || model.stampsOf(id)!.whole > this.sent ? Turn.Whole : Turn.Patch;
  }

  /** What to say of these peers; null: nothing. */
  private messageOf(ids: readonly number[], turnOf: (i: number) => Turn, model: Model): tc.MapResponse | null {
    const changed: tc.Node[] = [];
    const removed: number[] = [];
    const patches: tc.PeerChange[] = [];
    ids.forEach((id, i) => {
      const turn = turnOf(i);
      if (turn === Turn.Removed) removed.push(id);
      else if (turn === Turn.Whole) changed.push(this.peer(model.nodes.get(id)!));
      else if (turn === Turn.Patch) {
        const patch = patchOf(model.nodes.get(id)!, model, this.sent);
        if (patch) patches.push(patch);
      }
    });
    if (changed.length + removed.length + patches.length === 0) return null;
    return {
      ...(changed.length > 0 && { PeersChanged: changed }),
      ...(removed.length > 0 && { PeersRemoved: removed }),
      ...(patches.length > 0 && { PeersChangedPatch: patches }),
    };
  }

  private first(self: NodeRecord, model: Model, now: number): tc.MapResponse {
    const decision = this.decide();
    const newer = clientVersion(self, this.config.clients);
    this.isAdmitted = isAdmitted(self);
    this.toldRole = this.access.roleCapabilities(self);
    const ids = this.isAdmitted ? this.access.circle(self.id).ids.filter((id) => id !== self.id) : [];
    const peers = ids.map((id) => model.nodes.get(id)!).filter((peer) => this.isShown(peer));
    for (const peer of peers) this.known.add(peer.id);
    return {
      Node: this.self(self),
      DERPMap: this.config.derpMap,
      ...(peers.length > 0 && { Peers: peers.map((peer) => this.peer(peer)) }),
      DNSConfig: this.dns(self),
      Domain: this.config.baseDomain,
      CollectServices: false,
      PacketFilters: { base: decision.filter() },
      SSHPolicy: { rules: decision.sshRules },
      UserProfiles: this.newProfiles([self, ...peers], model),
      ControlTime: timeText(now),
      ...(!this.config.logtail && { Debug: { DisableLogTail: true } }),
      ...(self.cap < AUTO_UPDATE_CAPABILITY && { DefaultAutoUpdate: this.config.autoUpdate }),
      ...this.warn(self, now),
      ...(newer && { ClientVersion: newer }),
    };
  }

  /** What the node is told of DNS; remembered. */
  private dns(self: NodeRecord): tc.DNSConfig {
    const dns = dnsFor(this.config, self, this.decision?.self?.capMap ?? {});
    this.toldDns = dns === this.config.dns ? dns : digest(dns);
    return dns;
  }

  /** What is wrong with the node, as far as it was not told. */
  private warn(self: NodeRecord, now: number): tc.MapResponse {
    const told = this.warnings;
    this.warnings = warningsOf(self, hasName(self, this.config), now);
    return warningChange(told, this.warnings, self.cap);
  }

  /** `dirty`: whom to look at; grows. */
  private ownDelta(self: NodeRecord, model: Model, dirty: Set<number>, now: number): tc.MapResponse | null {
    const message: tc.MapResponse = {};
    if (this.config.derpMap !== this.toldConfig?.derpMap) message.DERPMap = this.config.derpMap;
    const whole = this.decideAgain(model, message, dirty);
    const role = this.access.roleCapabilities(self);
    if (role !== this.toldRole || this.config.autoUpdate !== this.toldConfig?.autoUpdate) {
      this.toldRole = role;
      message.Node = this.self(self);
    }
    if (dirty.has(self.id) || this.config !== this.toldConfig || message.Node) {
      const before = this.toldDns;
      const dns = this.dns(self);
      if (this.toldDns !== before) message.DNSConfig = dns;
    }
    if (isAdmitted(self) !== this.isAdmitted) {
      this.isAdmitted = isAdmitted(self);
      for (const id of this.access.circle(self.id).ids) dirty.add(id);
    }
    if (dirty.delete(self.id)) {
      Object.assign(message, this.warn(self, now));
      if (model.stampsOf(self.id)!.self > this.sent) message.Node = this.self(self);
    }
    const ids = [...dirty].sort((a, b) => a - b);
    const turns = ids.map((id) => {
      const turn = this.turnOf(id, model.nodes.get(id), self, model);
      return turn === Turn.Patch && whole.has(id) ? Turn.Whole : turn;
    });
    Object.assign(
      message,
      this.messageOf(ids, (i) => turns[i]!, model),
    );
    const visible = [self];
    ids.forEach((id, i) => {
      if (turns[i] === Turn.Removed) this.known.delete(id);
      if (turns[i] === Turn.Whole) this.known.add(id);
      if (turns[i] === Turn.Whole || turns[i] === Turn.Patch) visible.push(model.nodes.get(id)!);
    });
    const profiles = this.newProfiles(visible, model);
    if (profiles.length > 0) message.UserProfiles = profiles;
    return Object.keys(message).length > 0 ? message : null;
  }

  private isShown(peer: NodeRecord): boolean {
    return isAdmitted(peer) && hasName(peer, this.config);
  }

  private self(node: NodeRecord): tc.Node {
    return selfNode(node, this.config, this.decision?.self, this.access.roleCapabilities(node));
  }

  private peer(node: NodeRecord): tc.Node {
    const form = peerNode(node, this.config);
    const view = this.decision?.special.get(node.id);
    return view ? seenAs(form, view) : form;
  }

  /** Asks the policy, and remembers what it said. */
  private decide(): Decision {
    this.epoch = this.access.epochOf(this.nodeId);
    const decision = this.access.decide(this.nodeId);
    this.decision = { self: decision.self, special: decision.special };
    this.told = {
      self: JSON.stringify(decision.self),
      filter: decision.filterDigest,
      ssh: digest(decision.sshRules),
      special: formsOf(decision.special),
    };
    return decision;
  }

  /** After a change of policy, or of what it depends on: marks peers that come, go or lead elsewhere; those are returned. */
  private decideAgain(model: Model, message: tc.MapResponse, dirty: Set<number>): Set<number> {
    const whole = new Set<number>();
    const last = this.epoch;
    if (this.access.epochOf(this.nodeId) === last) return whole;
    const before = this.told;
    const { filter, sshRules } = this.decide();
    if (this.access.era > last || dirty.has(this.nodeId)) {
      for (const id of this.known.difference(this.access.circle(this.nodeId).set))
        if (id !== this.nodeId) dirty.add(id);
    }
    if (before.special !== this.told.special) {
      for (const id of new Set([...before.special.keys(), ...this.told.special.keys()])) {
        if (before.special.get(id) === this.told.special.get(id) || !model.nodes.has(id)) continue;
        dirty.add(id);
        whole.add(id);
      }
    }
    if (before.self !== this.told.self) message.Node = this.self(model.nodes.get(this.nodeId)!);
    if (before.filter !== this.told.filter) message.PacketFilters = { base: filter() };
    if (before.ssh !== this.told.ssh) message.SSHPolicy = { rules: sshRules };
    return whole;
  }

  /** Profiles of owners that this view has not told of yet, or that are others now. */
  private newProfiles(nodes: NodeRecord[], model: Model): tc.UserProfile[] {
    const profiles: tc.UserProfile[] = [];
    for (const node of nodes) {
      const userId = userOf(node);
      const user = model.users.get(userId) ?? null;
      if (this.knownUsers.get(userId) === user) continue;
      const profile = profileOf(model, userId);
      if (!profile) continue;
      this.knownUsers.set(userId, user);
      profiles.push(profile);
    }
    return profiles.sort((a, b) => a.ID - b.ID);
  }
}
