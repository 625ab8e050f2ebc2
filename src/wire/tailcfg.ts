// The JSON values of the ts2021 control protocol (spec/ts2021-control-protocol.md, sections 2 and 9 to 22).
//
// Both ends were born in Go, so Go's JSON rules hold on the wire:
//   absent, null   a field's zero value, unless the field says otherwise ("Δ absent: unchanged" in a MapResponse).
//                  Hence every field here is optional and may be null: a reader supplies the zero value.
//   time           RFC 3339 with up to nanoseconds; the zero time is "0001-01-01T00:00:00Z" and means "none".
//   []byte         standard base64 with padding.
//   keys           prefix + 64 hex digits ("nodekey:…"); the zero key is the prefix and 64 zeros, never "".
//   ids            numbers up to 2^53-1 (NodeID, UserID); as keys of maps they are decimal strings. StableID is opaque text.
//   opt.Bool       true, false or null; never a string.
//   maps           key order means nothing; unknown fields are ignored.
// The types describe what a well-behaved peer sends. They are no validation: bytes from the network are `unknown` until a
// reader has looked at each field that it uses.

/** "nodekey:" + 64 hex digits. */
export type NodeKeyText = string;
/** "mkey:" + 64 hex digits. */
export type MachineKeyText = string;
/** "discokey:" + 64 hex digits. */
export type DiscoKeyText = string;
/** RFC 3339. */
export type Time = string;
/** "100.64.0.1/32". */
export type PrefixText = string;
/** "192.0.2.1:41641" or "[2001:db8::1]:41641". */
export type AddrPortText = string;
export type NodeID = number;
export type UserID = number;
/** A field that a Go encoder may leave out or send as null. */
type Opt<T> = T | null | undefined;

/** The capability version that Weft's node speaks: semantics up to Tailscale 1.98 (spec section 24). */
export const CAPABILITY_VERSION = 138;
/** The oldest client that Weft's control server takes (Tailscale 1.62). */
export const MIN_CAPABILITY_VERSION = 88;
/** Go's zero time.Time as it stands in JSON. */
export const ZERO_TIME = "0001-01-01T00:00:00Z";
/** `RegisterRequest.Expiry` of a logout: Unix second 123. */
export const LOGOUT_EXPIRY = "1970-01-01T00:02:03Z";

/** Answer of `GET /key?v=N`. */
export interface OverTLSPublicKeyResponse {
  /** "mkey:" + zeros in all servers of today. */
  legacyPublicKey?: Opt<MachineKeyText>;
  publicKey?: Opt<MachineKeyText>;
}

/** First plaintext inside Noise, server to client (section 6). */
export interface EarlyNoise {
  /** "chalpub:" + 64 hex digits. */
  nodeKeyChallenge: string;
}

// ---- register (section 9) ----

export interface RegisterAuth {
  AuthKey?: Opt<string>;
}

export interface RegisterRequest {
  Version?: Opt<number>;
  NodeKey?: Opt<NodeKeyText>;
  /** The key being replaced; zero key when there is none. */
  OldNodeKey?: Opt<NodeKeyText>;
  /** "nlpub:" + 64 hex digits. */
  NLKey?: Opt<string>;
  Auth?: Opt<RegisterAuth>;
  /** Zero: server's default. Past: logout. Future: an earlier expiry is wished. */
  Expiry?: Opt<Time>;
  /** An AuthURL given before: answer when it is decided. */
  Followup?: Opt<string>;
  Hostinfo?: Opt<Hostinfo>;
  Ephemeral?: Opt<boolean>;
  NodeKeySignature?: Opt<string>;
  Timestamp?: Opt<Time>;
  Tailnet?: Opt<string>;
}

export interface User {
  ID: UserID;
  DisplayName?: Opt<string>;
  ProfilePicURL?: Opt<string>;
  Created?: Opt<Time>;
}

export interface Login {
  ID: number;
  Provider?: Opt<string>;
  LoginName?: Opt<string>;
  DisplayName?: Opt<string>;
  ProfilePicURL?: Opt<string>;
}

/** A client looks at Error, NodeKeySignature, NodeKeyExpired and AuthURL, in this order; none of them is success. */
export interface RegisterResponse {
  User?: Opt<User>;
  Login?: Opt<Login>;
  NodeKeyExpired?: Opt<boolean>;
  MachineAuthorized?: Opt<boolean>;
  AuthURL?: Opt<string>;
  NodeKeySignature?: Opt<string>;
  Error?: Opt<string>;
}

// ---- map (sections 10 to 14) ----

/** Elements of MapRequest.EndpointTypes. */
export const EndpointType = {
  unknown: 0,
  local: 1,
  stun: 2,
  portmapped: 3,
  stun4LocalPort: 4,
  explicit: 5,
} as const;
export type EndpointType = (typeof EndpointType)[keyof typeof EndpointType];

/** Stream: long poll. Not Stream and OmitPeers: lite update. Not Stream: one map, then the end. */
export interface MapRequest {
  Version?: Opt<number>;
  /** "zstd" or "". */
  Compress?: Opt<string>;
  KeepAlive?: Opt<boolean>;
  NodeKey?: Opt<NodeKeyText>;
  /** May be the zero key in a stream request: then it says nothing. */
  DiscoKey?: Opt<DiscoKeyText>;
  Stream?: Opt<boolean>;
  /** Without NetInfo: NetInfo is unchanged. */
  Hostinfo?: Opt<Hostinfo>;
  MapSessionHandle?: Opt<string>;
  MapSessionSeq?: Opt<number>;
  Endpoints?: Opt<AddrPortText[]>;
  /** Parallel to Endpoints. */
  EndpointTypes?: Opt<number[]>;
  TKAHead?: Opt<string>;
  ReadOnly?: Opt<boolean>;
  OmitPeers?: Opt<boolean>;
  DebugFlags?: Opt<string[]>;
}

/**
 * One message of a map stream. "Δ" is what absence (or null) means after the first message: "unchanged" for state,
 * "nothing happened" for lists of changes.
 */
export interface MapResponse {
  MapSessionHandle?: Opt<string>;
  Seq?: Opt<number>;
  /** With true only PingRequest, PopBrowserURL, ClientVersion, ControlTime and ControlDialPlan are read. */
  KeepAlive?: Opt<boolean>;
  PingRequest?: Opt<PingRequest>;
  PopBrowserURL?: Opt<string>;
  /** The whole self node. Required in the first message that is no keep-alive. */
  Node?: Opt<Node>;
  DERPMap?: Opt<DERPMap>;
  /** Non-empty: the complete list, all fields of peer changes in this message are ignored. Empty: unchanged. */
  Peers?: Opt<Node[]>;
  PeersChanged?: Opt<Node[]>;
  PeersRemoved?: Opt<NodeID[]>;
  PeersChangedPatch?: Opt<Opt<PeerChange>[]>;
  /** NodeID -> true: seen now; false: unknown. */
  PeerSeenChange?: Opt<Record<string, boolean>>;
  OnlineChange?: Opt<Record<string, boolean>>;
  DNSConfig?: Opt<DNSConfig>;
  Domain?: Opt<string>;
  CollectServices?: Opt<boolean>;
  /** Replaces the named filter "base"; `[]` blocks all. */
  PacketFilter?: Opt<FilterRule[]>;
  /** Name -> rules; null deletes the name; the name "*" with null clears all names first. */
  PacketFilters?: Opt<Record<string, FilterRule[] | null>>;
  UserProfiles?: Opt<UserProfile[]>;
  Health?: Opt<string[]>;
  DisplayMessages?: Opt<Record<string, DisplayMessage | null>>;
  SSHPolicy?: Opt<unknown>;
  ControlTime?: Opt<Time>;
  Debug?: Opt<Debug>;
  ClientVersion?: Opt<ClientVersion>;
  /** Before capability version 131, which has the node capability "default-auto-update" instead. */
  DefaultAutoUpdate?: Opt<boolean>;
}

/** Raw JSON values by capability name; null and [] are the same. */
export type CapMap = Record<string, unknown[] | null>;

export interface Node {
  ID: NodeID;
  StableID?: Opt<string>;
  /** FQDN with a trailing dot: "host.net.example." */
  Name?: Opt<string>;
  User?: Opt<UserID>;
  Sharer?: Opt<UserID>;
  Key?: Opt<NodeKeyText>;
  /** Zero or absent: never. */
  KeyExpiry?: Opt<Time>;
  KeySignature?: Opt<string>;
  Machine?: Opt<MachineKeyText>;
  /** Absent or zero key: the peer speaks no disco. */
  DiscoKey?: Opt<DiscoKeyText>;
  Addresses?: Opt<PrefixText[]>;
  /** Null or absent: the same as Addresses. [] is none. */
  AllowedIPs?: Opt<PrefixText[]>;
  Endpoints?: Opt<AddrPortText[]>;
  /** Legacy home relay, "127.3.3.40:<region>"; counts only while HomeDERP is zero. */
  DERP?: Opt<string>;
  HomeDERP?: Opt<number>;
  Hostinfo?: Opt<Hostinfo>;
  Created?: Opt<Time>;
  Cap?: Opt<number>;
  Tags?: Opt<string[]>;
  PrimaryRoutes?: Opt<PrefixText[]>;
  LastSeen?: Opt<Time>;
  /** Absent: unknown. */
  Online?: Opt<boolean>;
  MachineAuthorized?: Opt<boolean>;
  Capabilities?: Opt<string[]>;
  CapMap?: Opt<CapMap>;
  UnsignedPeerAPIOnly?: Opt<boolean>;
  DataPlaneAuditLogID?: Opt<string>;
  Expired?: Opt<boolean>;
  SelfNodeV4MasqAddrForThisPeer?: Opt<string>;
  SelfNodeV6MasqAddrForThisPeer?: Opt<string>;
  IsWireGuardOnly?: Opt<boolean>;
  IsJailed?: Opt<boolean>;
  ExitNodeDNSResolvers?: Opt<Resolver[]>;
}

/** A patch of one peer: absent and null leave the field, with the exceptions that stand at the fields. */
export interface PeerChange {
  NodeID: NodeID;
  /** 0: unchanged. */
  DERPRegion?: Opt<number>;
  /** 0: unchanged. */
  Cap?: Opt<number>;
  /** Replaces; {} clears. */
  CapMap?: Opt<CapMap>;
  /** Non-empty replaces; empty is unchanged. */
  Endpoints?: Opt<AddrPortText[]>;
  Key?: Opt<NodeKeyText>;
  KeySignature?: Opt<string>;
  DiscoKey?: Opt<DiscoKeyText>;
  Online?: Opt<boolean>;
  LastSeen?: Opt<Time>;
  /** The zero time: never. */
  KeyExpiry?: Opt<Time>;
}

export interface UserProfile {
  ID: UserID;
  LoginName?: Opt<string>;
  DisplayName?: Opt<string>;
  ProfilePicURL?: Opt<string>;
  Groups?: Opt<string[]>;
}

export interface Debug {
  SleepSeconds?: Opt<number>;
  DisableLogTail?: Opt<boolean>;
  Exit?: Opt<number>;
}

export interface ClientVersion {
  RunningLatest?: Opt<boolean>;
  LatestVersion?: Opt<string>;
  UrgentSecurityUpdate?: Opt<boolean>;
  Notify?: Opt<boolean>;
  NotifyURL?: Opt<string>;
  NotifyText?: Opt<string>;
}

export interface DisplayMessage {
  Title?: Opt<string>;
  Text?: Opt<string>;
  /** "high", "medium" or "low". */
  Severity?: Opt<string>;
  ImpactsConnectivity?: Opt<boolean>;
  PrimaryAction?: Opt<{ URL?: Opt<string>; Label?: Opt<string> }>;
}

// ---- host (section 15) ----

export interface Service {
  Proto?: Opt<string>;
  Port?: Opt<number>;
  Description?: Opt<string>;
}

/** Servers keep the whole object as it came and hand it on: newer clients add fields. */
export interface Hostinfo {
  IPNVersion?: Opt<string>;
  FrontendLogID?: Opt<string>;
  BackendLogID?: Opt<string>;
  OS?: Opt<string>;
  OSVersion?: Opt<string>;
  Container?: Opt<boolean>;
  Env?: Opt<string>;
  Distro?: Opt<string>;
  DistroVersion?: Opt<string>;
  DistroCodeName?: Opt<string>;
  App?: Opt<string>;
  Package?: Opt<string>;
  DeviceModel?: Opt<string>;
  Hostname?: Opt<string>;
  ShieldsUp?: Opt<boolean>;
  ShareeNode?: Opt<boolean>;
  NoLogsNoSupport?: Opt<boolean>;
  WireIngress?: Opt<boolean>;
  IngressEnabled?: Opt<boolean>;
  AllowsUpdate?: Opt<boolean>;
  /** The client's keys are encrypted on its disk. */
  StateEncrypted?: Opt<boolean>;
  Machine?: Opt<string>;
  GoArch?: Opt<string>;
  GoVersion?: Opt<string>;
  RoutableIPs?: Opt<PrefixText[]>;
  RequestTags?: Opt<string[]>;
  Services?: Opt<Service[]>;
  NetInfo?: Opt<NetInfo>;
  sshHostKeys?: Opt<string[]>;
  Cloud?: Opt<string>;
  Userspace?: Opt<boolean>;
  UserspaceRouter?: Opt<boolean>;
  ServicesHash?: Opt<string>;
  ExitNodeID?: Opt<string>;
  [key: string]: unknown;
}

export interface NetInfo {
  MappingVariesByDestIP?: Opt<boolean>;
  WorkingIPv6?: Opt<boolean>;
  OSHasIPv6?: Opt<boolean>;
  WorkingUDP?: Opt<boolean>;
  WorkingICMPv4?: Opt<boolean>;
  HavePortMap?: Opt<boolean>;
  UPnP?: Opt<boolean>;
  PMP?: Opt<boolean>;
  PCP?: Opt<boolean>;
  /** Home DERP region, 0 is none. */
  PreferredDERP?: Opt<number>;
  LinkType?: Opt<string>;
  /** "<region>-v4" or "<region>-v6" -> seconds. */
  DERPLatency?: Opt<Record<string, number>>;
  FirewallMode?: Opt<string>;
}

// ---- DERP map (section 16) ----

export interface DERPMap {
  /** Absent or null: the regions stay, only HomeParams changes. A null region is dropped. */
  Regions?: Opt<Record<string, DERPRegion | null>>;
  HomeParams?: Opt<{ RegionScore?: Opt<Record<string, number>> }>;
  omitDefaultRegions?: Opt<boolean>;
}

export interface DERPRegion {
  RegionID: number;
  RegionCode?: Opt<string>;
  RegionName?: Opt<string>;
  Latitude?: Opt<number>;
  Longitude?: Opt<number>;
  Avoid?: Opt<boolean>;
  NoMeasureNoHome?: Opt<boolean>;
  Nodes?: Opt<DERPNode[]>;
}

export interface DERPNode {
  /** Unique, for example "900a". */
  Name: string;
  RegionID: number;
  HostName: string;
  /** SNI name instead of HostName, or "sha256-raw:<hex>" to pin a self-signed certificate. */
  CertName?: Opt<string>;
  /** Address, "none" for no such family, absent for DNS. */
  IPv4?: Opt<string>;
  IPv6?: Opt<string>;
  /** 0 is 3478, -1 is none. */
  STUNPort?: Opt<number>;
  STUNOnly?: Opt<boolean>;
  /** 0 is 443. */
  DERPPort?: Opt<number>;
  /** Plain HTTP or an unverified certificate is fine: tests only. */
  InsecureForTests?: Opt<boolean>;
  STUNTestIP?: Opt<string>;
  CanPort80?: Opt<boolean>;
}

// ---- DNS (section 17) ----

export interface Resolver {
  /** IP, IP:port or a DoH URL. */
  Addr: string;
  BootstrapResolution?: Opt<string[]>;
  UseWithExitNode?: Opt<boolean>;
}

export interface DNSRecord {
  Name: string;
  /** "", "A" or "AAAA". */
  Type?: Opt<string>;
  Value: string;
}

export interface DNSConfig {
  Resolvers?: Opt<Resolver[]>;
  /** Suffix without trailing dot -> resolvers; [] is answered by the client itself. Send [], not null. */
  Routes?: Opt<Record<string, Resolver[] | null>>;
  FallbackResolvers?: Opt<Resolver[]>;
  Domains?: Opt<string[]>;
  /** MagicDNS is on. */
  Proxied?: Opt<boolean>;
  Nameservers?: Opt<string[]>;
  CertDomains?: Opt<string[]>;
  ExtraRecords?: Opt<DNSRecord[]>;
  ExitNodeFilteredSet?: Opt<string[]>;
}

// ---- packet filter (section 18) ----

export interface PortRange {
  First: number;
  Last: number;
}

export interface NetPortRange {
  /** Address, masked prefix, range "a-b" or "*". */
  IP: string;
  Ports: PortRange;
}

export interface CapGrant {
  Dsts?: Opt<PrefixText[]>;
  CapMap?: Opt<CapMap>;
  Caps?: Opt<string[]>;
}

/** Lets traffic into the node that gets the rule, and into the routes that it serves. */
export interface FilterRule {
  /** Address, masked prefix, range "a-b", "*", or "cap:<node capability>". */
  SrcIPs?: Opt<string[]>;
  DstPorts?: Opt<NetPortRange[]>;
  /** IP protocol numbers. Absent or empty: TCP, UDP, ICMPv4 and ICMPv6. */
  IPProto?: Opt<number[]>;
  CapGrant?: Opt<CapGrant[]>;
}

// ---- ping and c2n (section 21) ----

export interface PingRequest {
  /** Unique per request; a repeat of the last one is ignored. */
  URL?: Opt<string>;
  URLIsNoise?: Opt<boolean>;
  Log?: Opt<boolean>;
  /** "" is HEAD URL; "c2n"; or a comma list of "disco", "TSMP", "ICMP", "peerapi". */
  Types?: Opt<string>;
  IP?: Opt<string>;
  /** Base64 of a raw HTTP/1.1 request, for "c2n". */
  Payload?: Opt<string>;
}

/** POSTed to PingRequest.URL. */
export interface PingResponse {
  Type?: Opt<string>;
  IP?: Opt<string>;
  NodeIP?: Opt<string>;
  NodeName?: Opt<string>;
  Err?: Opt<string>;
  LatencySeconds?: Opt<number>;
  Endpoint?: Opt<string>;
  DERPRegionID?: Opt<number>;
  DERPRegionCode?: Opt<string>;
  IsLocalIP?: Opt<boolean>;
}
