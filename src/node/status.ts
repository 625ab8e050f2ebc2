// Status JSON as `tailscale status --json` prints it (spec/node-features.md, section 11). Pure.
import { formatKey, hex } from "../crypto/keys.ts";
import type { PeerDump } from "../datapath/api.ts";
import type { Node } from "../wire/tailcfg.ts";
import { ZERO_TIME } from "../wire/tailcfg.ts";
import { homeRegion, keyExpired, type Netmap, sortedPeers } from "./netmap.ts";
import { magicDnsSuffix } from "./view.ts";

/** Numbers of Notify.State, by name. */
const BACKEND_STATES = [
  "NoState",
  "InUseOtherUser",
  "NeedsLogin",
  "NeedsMachineAuth",
  "Stopped",
  "Starting",
  "Running",
] as const;
export type BackendState = (typeof BACKEND_STATES)[number];

export interface PeerStatusJson {
  ID: string;
  NodeID: number;
  PublicKey: string;
  HostName: string;
  DNSName: string;
  OS: string;
  UserID: number;
  TailscaleIPs: string[];
  AllowedIPs: string[];
  Tags?: string[];
  PrimaryRoutes?: string[];
  Addrs: string[] | null;
  /** Direct address in use, "" when there is none. */
  CurAddr: string;
  /** Code of the peer's home relay region. */
  Relay: string;
  PeerRelay: string;
  RxBytes: number;
  TxBytes: number;
  Created: string;
  LastWrite: string;
  LastSeen: string;
  LastHandshake: string;
  /** Milliseconds from the initiation to the latest session; Weft's own field. */
  HandshakeMS?: number;
  Online: boolean;
  ExitNode: boolean;
  ExitNodeOption: boolean;
  Active: boolean;
  PeerAPIURL: string[];
  InNetworkMap: boolean;
  InMagicSock: boolean;
  InEngine: boolean;
  Expired?: boolean;
  KeyExpiry?: string;
}

export interface StatusJson {
  Version: string;
  TUN: boolean;
  BackendState: BackendState;
  HaveNodeKey: boolean;
  AuthURL: string;
  TailscaleIPs: string[] | null;
  Self: PeerStatusJson;
  Health: string[];
  MagicDNSSuffix: string;
  CurrentTailnet: { Name: string; MagicDNSSuffix: string; MagicDNSEnabled: boolean } | null;
  CertDomains: string[] | null;
  Peer: Record<string, PeerStatusJson> | null;
  User: Record<string, { ID: number; LoginName: string; DisplayName: string; ProfilePicURL?: string }> | null;
  ClientVersion: null;
}

export interface StatusInput {
  version: string;
  state: BackendState;
  authUrl: string;
  health: string[];
  netmap: Netmap | null;
  /** Null before there is one. */
  nodePublic: Uint8Array | null;
  hostName: string;
  /** Own endpoints. */
  endpoints: readonly string[];
  /** Own home region. */
  home: number;
  /** The map stream is up. */
  connected: boolean;
  /** Node key in hex -> what the datapath knows. */
  wireguard: ReadonlyMap<string, PeerDump>;
  /** How packets to a peer go now. */
  path: (nodeKey: Uint8Array) => { address: string | null; active: boolean } | null;
  /** Milliseconds; null before the first session. */
  handshakeTime: (nodeKey: Uint8Array) => number | null;
  nodeKeyOf: (node: Node) => Uint8Array | null;
  /** Unix time in milliseconds. */
  now: number;
}

export function buildStatus(input: StatusInput, withPeers: boolean): StatusJson {
  const { netmap } = input;
  const suffix = netmap ? magicDnsSuffix(netmap) : "";
  const self = netmap ? describe(netmap.self, input) : emptyPeer(input);
  self.HostName = input.hostName;
  self.Online = input.connected;
  self.Relay = regionCode(netmap, input.home);
  self.Addrs = [...input.endpoints];
  if (input.nodePublic) self.PublicKey = formatKey("nodekey", input.nodePublic);
  const peers: Record<string, PeerStatusJson> = {};
  const users: NonNullable<StatusJson["User"]> = {};
  const noteUser = (id: number) => {
    const profile = netmap?.users.get(id);
    if (profile)
      users[String(id)] = {
        ID: id,
        LoginName: profile.LoginName ?? "",
        DisplayName: profile.DisplayName ?? "",
        ...(profile.ProfilePicURL ? { ProfilePicURL: profile.ProfilePicURL } : {}),
      };
  };
  if (netmap) {
    noteUser(netmap.self.User ?? 0);
    for (const node of withPeers ? sortedPeers(netmap) : []) {
      peers[node.Key ?? ""] = describe(node, input);
      noteUser(node.User ?? 0);
    }
  }
  return {
    Version: input.version,
    TUN: true,
    BackendState: input.state,
    HaveNodeKey: input.nodePublic !== null,
    AuthURL: input.authUrl,
    TailscaleIPs: netmap ? addressesOf(netmap.self) : null,
    Self: self,
    Health: input.health,
    MagicDNSSuffix: suffix,
    CurrentTailnet: netmap
      ? { Name: netmap.domain || suffix, MagicDNSSuffix: suffix, MagicDNSEnabled: netmap.dns.Proxied === true }
      : null,
    CertDomains: netmap?.dns.CertDomains ?? null,
    Peer: withPeers ? peers : null,
    User: withPeers ? users : null,
    ClientVersion: null,
  };
}

/** "100.64.0.1" of "100.64.0.1/32". */
export function addressesOf(node: Node): string[] {
  return (node.Addresses ?? []).map((prefix) => prefix.split("/")[0]!);
}

export function regionCode(netmap: Netmap | null, region: number): string {
  return netmap?.derpMap.Regions?.[String(region)]?.RegionCode ?? (region ? String(region) : "");
}

function describe(node: Node, input: StatusInput): PeerStatusJson {
  const key = input.nodeKeyOf(node);
  const wireguard = key ? input.wireguard.get(hex(key)) : undefined;
  const path = key ? input.path(key) : null;
  const handshake = wireguard?.lastHandshake ?? 0;
  const handshakeTime = key ? input.handshakeTime(key) : null;
  const exit = (node.AllowedIPs ?? []).some((prefix) => prefix === "0.0.0.0/0" || prefix === "::/0");
  return {
    ...emptyPeer(input),
    ID: node.StableID ?? "",
    NodeID: node.ID,
    PublicKey: node.Key ?? "",
    HostName: node.Hostinfo?.Hostname ?? "",
    DNSName: node.Name ?? "",
    OS: node.Hostinfo?.OS ?? "",
    UserID: node.User ?? 0,
    TailscaleIPs: addressesOf(node),
    AllowedIPs: node.AllowedIPs ?? node.Addresses ?? [],
    ...(node.Tags?.length ? { Tags: node.Tags } : {}),
    ...(node.PrimaryRoutes?.length ? { PrimaryRoutes: node.PrimaryRoutes } : {}),
    Addrs: node.Endpoints?.length ? node.Endpoints : null,
    CurAddr: path?.address ?? "",
    Relay: regionCode(input.netmap, homeRegion(node)),
    RxBytes: wireguard?.rxBytes ?? 0,
    TxBytes: wireguard?.txBytes ?? 0,
    Created: node.Created ?? ZERO_TIME,
    LastSeen: node.LastSeen ?? ZERO_TIME,
    LastHandshake: handshake > 0 ? new Date(handshake).toISOString() : ZERO_TIME,
    ...(handshakeTime !== null && { HandshakeMS: handshakeTime }),
    Online: node.Online === true,
    ExitNodeOption: exit,
    Active: path?.active ?? false,
    InNetworkMap: true,
    InMagicSock: path !== null,
    InEngine: wireguard !== undefined,
    ...(keyExpired(node, input.now) ? { Expired: true } : {}),
    ...(node.KeyExpiry && node.KeyExpiry !== ZERO_TIME ? { KeyExpiry: node.KeyExpiry } : {}),
  };
}

function emptyPeer(input: StatusInput): PeerStatusJson {
  return {
    ID: "",
    NodeID: 0,
    PublicKey: formatKey("nodekey", new Uint8Array(32)),
    HostName: input.hostName,
    DNSName: "",
    OS: "linux",
    UserID: 0,
    TailscaleIPs: [],
    AllowedIPs: [],
    Addrs: null,
    CurAddr: "",
    Relay: "",
    PeerRelay: "",
    RxBytes: 0,
    TxBytes: 0,
    Created: ZERO_TIME,
    LastWrite: ZERO_TIME,
    LastSeen: ZERO_TIME,
    LastHandshake: ZERO_TIME,
    Online: false,
    ExitNode: false,
    ExitNodeOption: false,
    Active: false,
    PeerAPIURL: [],
    InNetworkMap: false,
    InMagicSock: false,
    InEngine: false,
  };
}
