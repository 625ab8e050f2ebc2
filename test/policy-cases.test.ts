// What Tailscale's own control service answered to some hundreds of policies, file by file: the refusal word for word, or
// what it sent to every node of a small tailnet. The folder is named by WEFT_POLICY_CASES (`<category>/<id>.json`).
//
// What a capture cannot tell the engine is read from it: which router of a pair the service had elected (history, not
// policy), and which roles its users had. Lists whose order means nothing are compared as sorted lists, with repeats; the
// order of rules is compared, but for entries that mix autogroup:self with other destinations: there the service itself
// sends now the one part first, now the other.
//
// Some captures were renumbered: the service makes an IPv6 address end in "…37:" and the low half of the IPv4 address, and
// cannot be told another, so an IPv6 address of any other form is a stand-in. A policy of that time that names such an
// address named nobody's. The engine gets addresses of its own there, and its answers are translated back.
import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Compiled } from "../src/control/policy/compile.ts";
import { PolicyError } from "../src/control/policy/error.ts";
import { checkPolicy, parsePolicy } from "../src/control/policy/index.ts";
import type { PolicyNode, PolicyUser, Role, Tailnet } from "../src/control/policy/types.ts";

interface CaptureNode {
  packetFilter: FilterRule[] | null;
  ssh: { principals: unknown[]; [key: string]: unknown }[] | null;
  capMap: Record<string, unknown> | null;
  allowedIPs: string[];
  primaryRoutes?: string[];
  peers: { name: string; allowedIPs: string[]; primaryRoutes?: string[]; capMap?: Record<string, unknown> }[];
}

interface FilterRule {
  SrcIPs: string[];
  DstPorts?: unknown[];
  CapGrant?: { Dsts: string[]; CapMap: unknown }[];
  IPProto?: number[];
}

interface Case {
  policy: string | object;
  tailnet: { settings: { devices_auto_updates_on?: boolean } };
  topology: {
    users: { id: number; name: string; email: string }[];
    nodes: Record<
      string,
      {
        tags: string[];
        user?: string;
        ipv4: string;
        ipv6: string;
        routable_ips: string[] | null;
        approved_routes: string[] | null;
      }
    >;
  };
  accepted: boolean;
  response?: { message: string };
  nodes: Record<string, CaptureNode>;
}

/** Capabilities of the self node that no policy gives, and why the service sends them. */
const HOSTED_ONLY: Readonly<Record<string, string>> = {
  "https://tailscale.com/cap/file-sharing": "the tailnet's switch for Taildrop, not policy",
  "https://tailscale.com/cap/is-admin": "the role of the node's owner in the hosted console",
  "https://tailscale.com/cap/is-owner": "the role of the node's owner in the hosted console",
  "https://tailscale.com/cap/ssh": "Tailscale SSH is part of the tailnet's plan",
  "https://tailscale.com/cap/tailnet-lock": "tailnet lock is part of the tailnet's plan",
  "probe-udp-lifetime": "a roll-out switch of the hosted service",
  "ssh-behavior-v1": "a roll-out switch of the hosted service",
  "ssh-env-vars": "a roll-out switch of the hosted service",
  "store-appc-routes": "a roll-out switch of the hosted service",
  https: "the tailnet's switch for certificates, not policy",
  "https://tailscale.com/cap/data-plane-audit-logs": "the tailnet's switch for flow logs, not policy",
  "tailnet-display-name": "the name of the hosted tailnet",
  "default-auto-update": "the tailnet's setting for updates, not policy; older captures are without it",
};

const ADMIN = "https://tailscale.com/cap/is-admin";
const OWNER = "https://tailscale.com/cap/is-owner";

function sorted(list: readonly unknown[] | null | undefined): string[] {
  return (list ?? []).map((item) => (typeof item === "string" ? item : JSON.stringify(item))).sort();
}

function filterForm(rules: readonly FilterRule[] | null, ordered: boolean): unknown[] {
  const forms = (rules ?? []).map((rule) => ({
    ...rule,
    SrcIPs: sorted(rule.SrcIPs),
    ...(rule.DstPorts && { DstPorts: sorted(rule.DstPorts) }),
    ...(rule.CapGrant && { CapGrant: rule.CapGrant.map((grant) => ({ ...grant, Dsts: sorted(grant.Dsts) })) }),
  }));
  return ordered ? forms : forms.sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1));
}

function policyCapabilities(capMap: Record<string, unknown> | null): Record<string, unknown> {
  return Object.fromEntries(Object.entries(capMap ?? {}).filter(([name]) => !Object.hasOwn(HOSTED_ONLY, name)));
}

function isStandIn(ipv6: string): boolean {
  return !/::[0-9a-f]{0,2}37:[0-9a-f]{1,4}$/.test(ipv6);
}

/** Nobody's in any capture. */
function innerAddress(index: number): string {
  return `fd7a:115c:a1e0:ffff::${(index + 1).toString(16)}`;
}

/** The tailnet of a capture, its names in order of their ids. */
function tailnetOf(capture: Case): { tailnet: Tailnet; names: string[] } {
  const names = Object.keys(capture.topology.nodes);
  const rolesOf = (user: string): Role => {
    const own = names.find((name) => capture.topology.nodes[name]!.user === user);
    const capMap = (own && capture.nodes[own]?.capMap) || {};
    return OWNER in capMap ? "owner" : ADMIN in capMap ? "admin" : "member";
  };
  const users: PolicyUser[] = capture.topology.users.map((user) => ({ ...user, role: rolesOf(user.name) }));
  const owner = users.find(({ role }) => role === "owner") ?? users[0];
  const nodes: PolicyNode[] = names.map((name, index) => {
    const { user, tags, ipv4, ipv6, approved_routes } = capture.topology.nodes[name]!;
    const userId = capture.topology.users.find((each) => each.name === user)?.id ?? null;
    const inner = isStandIn(ipv6) ? innerAddress(index) : ipv6;
    return { id: index + 1, userId, tags, ipv4, ipv6: inner, routes: approved_routes ?? [] };
  });
  const primaries = new Map<string, number>();
  for (const [index, name] of names.entries()) {
    for (const route of capture.nodes[name]?.primaryRoutes ?? []) primaries.set(route, index + 1);
  }
  const domain = owner?.email.split("@")[1];
  return { tailnet: { users, nodes, primaries, ...(domain && { domains: [domain] }) }, names };
}

/** The same tailnet once the policy's own approvals have taken effect. */
function approved(tailnet: Tailnet, names: readonly string[], capture: Case, compiled: Compiled): Tailnet {
  const nodes = tailnet.nodes.map((node, index) => {
    const advertised = capture.topology.nodes[names[index]!]!.routable_ips ?? [];
    return { ...node, routes: [...new Set([...node.routes, ...compiled.autoApproved(node, advertised)])] };
  });
  return { ...tailnet, nodes };
}

function run(capture: Case): void {
  const text = typeof capture.policy === "string" ? capture.policy : JSON.stringify(capture.policy);
  const { tailnet, names } = tailnetOf(capture);
  let refusal: string | null = null;
  try {
    checkPolicy(text, tailnet);
  } catch (error) {
    if (!(error instanceof PolicyError)) throw error;
    refusal = error.message;
  }
  // A refused policy changes nothing: its nodes show what was in force before, which the capture does not name.
  expect(refusal).toBe(capture.accepted ? null : capture.response!.message);
  if (!capture.accepted) return;
  const policy = parsePolicy(text);
  const compiled = new Compiled(policy, approved(tailnet, names, capture, new Compiled(policy, tailnet)));
  const mixed = (policy.accesses ?? []).some(({ dst }) => {
    const self = dst.filter(({ text }) => text === "autogroup:self").length;
    return self > 0 && self < dst.length;
  });
  // Before anything is sorted: addresses that stand in for others sort elsewhere.
  const outward = <T>(value: T): T => {
    let text = JSON.stringify(value);
    for (const [index, name] of names.entries()) {
      text = text.replaceAll(new RegExp(`${innerAddress(index)}(?=["/])`, "g"), capture.topology.nodes[name]!.ipv6);
    }
    return JSON.parse(text) as T;
  };
  const got: Record<string, unknown> = {};
  const want: Record<string, unknown> = {};
  for (const [name, node] of Object.entries(capture.nodes)) {
    const id = names.indexOf(name) + 1;
    const self = outward(compiled.selfView(id));
    want[name] = {
      packetFilter: filterForm(node.packetFilter, !mixed),
      ssh: (node.ssh ?? []).map((rule) => ({ ...rule, principals: sorted(rule.principals) })),
      capMap: policyCapabilities(node.capMap),
      unknownCapabilities: [],
      allowedIPs: sorted(node.allowedIPs),
      primaryRoutes: sorted(node.primaryRoutes),
      peers: node.peers.map((peer) => ({
        name: peer.name,
        allowedIPs: sorted(peer.allowedIPs),
        primaryRoutes: sorted(peer.primaryRoutes),
        capMap: peer.capMap ?? {},
      })),
    };
    got[name] = {
      packetFilter: filterForm(outward(compiled.packetFilter(id)) as FilterRule[], !mixed),
      ssh: outward(compiled.sshRules(id)).map((rule) => ({ ...rule, principals: sorted(rule.principals) })),
      capMap: policyCapabilities(self.capMap),
      unknownCapabilities: Object.keys(self.capMap).filter((key) => !(key in (node.capMap ?? {}))),
      allowedIPs: sorted(self.allowedIPs),
      primaryRoutes: sorted(self.primaryRoutes),
      peers: compiled.peers(id).map((peer) => {
        const view = outward(compiled.peerView(id, peer));
        return {
          name: names[peer - 1]!,
          allowedIPs: sorted(view.allowedIPs),
          primaryRoutes: sorted(view.primaryRoutes),
          capMap: view.capMap,
        };
      }),
    };
  }
  expect(got).toEqual(want);
}

const folder = process.env.WEFT_POLICY_CASES ?? resolve(import.meta.dir, "../../shared/policy-cases");

if (existsSync(folder)) {
  const categories = readdirSync(folder, { withFileTypes: true }).filter((entry) => entry.isDirectory());
  for (const category of categories.map(({ name }) => name).sort()) {
    const files = readdirSync(join(folder, category)).filter((file) => file.endsWith(".json"));
    for (const file of files.sort()) {
      test(`${category}/${file.slice(0, -".json".length)}`, () => {
        run(JSON.parse(readFileSync(join(folder, category, file), "utf8")) as Case);
      });
    }
  }
} else {
  console.error(`SKIP: captured policy results: no folder ${folder} (name one by WEFT_POLICY_CASES)`);
  test.skip("captured policy results", () => {});
}
