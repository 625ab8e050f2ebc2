// What the netmap means for the parts of the node: WireGuard peers, paths, packet filter, addresses. Pure.
//
// Only the peers' own addresses become allowed IPs. Subnet and exit routes that a peer serves need `accept-routes` or a
// chosen exit node, which this node does not have yet.
import { isZeroKey, parseKey } from "../crypto/keys.ts";
import type { FilterConfig } from "../datapath/api.ts";
import { formatPrefix, parsePrefix } from "../wire/ip.ts";
import type { Node, PrefixText } from "../wire/tailcfg.ts";
import { filterRules, homeRegion, keyExpired, type Netmap, sortedPeers } from "./netmap.ts";

export interface PeerView {
  node: Node;
  nodeKey: Uint8Array;
  /** Null: the peer speaks no disco, only the relay reaches it. */
  discoKey: Uint8Array | null;
  /** The peer's own addresses, as /32 and /128. */
  allowedIPs: PrefixText[];
  endpoints: string[];
  homeRegion: number;
}

/** The peers that traffic may go to and come from, by id. Expired peers and those without a usable key are left out. */
export function peerViews(netmap: Netmap, now: number): PeerView[] {
  const views: PeerView[] = [];
  const taken = new Set<PrefixText>(selfAddresses(netmap));
  for (const node of sortedPeers(netmap)) {
    const nodeKey = nodeKeyOf(node);
    if (!nodeKey || keyExpired(node, now)) continue;
    // An address belongs to one peer: the first by id keeps it.
    const allowedIPs = ownAddresses(node).filter((address) => !taken.has(address));
    for (const address of allowedIPs) taken.add(address);
    views.push({
      node,
      nodeKey,
      discoKey: realKey("discokey", node.DiscoKey),
      allowedIPs,
      endpoints: node.Endpoints ?? [],
      homeRegion: homeRegion(node),
    });
  }
  return views;
}

/** This node's assigned addresses as /32 and /128. */
export function selfAddresses(netmap: Netmap): PrefixText[] {
  return singleAddresses(netmap.self.Addresses ?? []);
}

export function filterConfig(netmap: Netmap): FilterConfig {
  return { rules: filterRules(netmap), local: selfAddresses(netmap) };
}

/** "host" of "host.net.example."; the whole name when it has no dot. */
export function baseName(node: Node): string {
  return (node.Name ?? "").split(".")[0] ?? "";
}

/** "net.example" of "host.net.example."; "" when there is none. */
export function magicDnsSuffix(netmap: Netmap): string {
  return (netmap.self.Name ?? "").replace(/\.$/, "").split(".").slice(1).join(".");
}

/** The peer that `target` names: an address, a full name, or the first label of one. */
export function findPeer(netmap: Netmap, target: string): Node | null {
  const wanted = target.toLowerCase().replace(/\.$/, "");
  const matches = (node: Node) =>
    (node.Addresses ?? []).some((prefix) => prefix.split("/")[0] === wanted) ||
    (node.Name ?? "").toLowerCase().replace(/\.$/, "") === wanted ||
    baseName(node).toLowerCase() === wanted;
  return sortedPeers(netmap).find(matches) ?? null;
}

/** Null: the node has no usable key. */
export function nodeKeyOf(node: Node): Uint8Array | null {
  return realKey("nodekey", node.Key);
}

/** A node's addresses that its AllowedIPs (absent: all of them) let through. */
function ownAddresses(node: Node): PrefixText[] {
  const addresses = singleAddresses(node.Addresses ?? []);
  if (!node.AllowedIPs) return addresses;
  const allowed = new Set(singleAddresses(node.AllowedIPs));
  return addresses.filter((address) => allowed.has(address));
}

function singleAddresses(prefixes: readonly string[]): PrefixText[] {
  const out: PrefixText[] = [];
  for (const text of prefixes) {
    const prefix = parsePrefix(text);
    if (prefix && prefix.bits === prefix.ip.length * 8) out.push(formatPrefix(prefix));
  }
  return out;
}

/** 32 bytes; null for what is no key, and for the zero key. */
function realKey(kind: "nodekey" | "discokey", text: string | null | undefined): Uint8Array | null {
  const key = text ? parseKey(kind, text) : null;
  return key && !isZeroKey(key) ? key : null;
}
