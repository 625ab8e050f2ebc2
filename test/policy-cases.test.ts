// What Tailscale's own control service answered to some hundreds of policies, file by file: the refusal word for word, or
// what it sent to every node of a small tailnet. The folder is named by WEFT_POLICY_CASES: each .json file in it, at any
// depth, that holds a policy and an answer is a test, by its path.
//
// What a capture cannot tell the engine is read from it: which router of a pair the service had elected (the lowest id, it
// seems, but captures do not say the ids: their nodes are in the order of their names), which roles its users had, and
// whether the tailnet has certificates. Lists whose order means nothing are compared as sorted lists, with repeats; the
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

interface CapturePeer {
  name: string;
  allowedIPs?: string[];
  primaryRoutes?: string[];
  capMap?: Record<string, unknown>;
}

interface CaptureNode {
  packetFilter?: FilterRule[] | null;
  ssh?: { principals: unknown[]; [key: string]: unknown }[] | null;
  capMap?: Record<string, unknown> | null;
  allowedIPs?: string[];
  primaryRoutes?: string[];
  peers?: CapturePeer[];
}

interface FilterRule {
  SrcIPs: string[];
  DstPorts?: unknown[];
  CapGrant?: { Dsts: string[]; CapMap: unknown }[];
  IPProto?: number[];
}

/** What it does not say is empty. */
interface Capture {
  policy: string | object;
  topology?: {
    users?: { id: number; name: string; email?: string }[];
    nodes?: Record<
      string,
      {
        tags?: string[];
        user?: string;
        ipv4?: string;
        ipv6?: string;
        routable_ips?: string[] | null;
        approved_routes?: string[] | null;
      }
    >;
  };
  accepted: boolean;
  response?: { message: string };
  /** Those that answered in time: of the others nothing is known but what their peers saw. */
  nodes?: Record<string, CaptureNode>;
}

const ADMIN = "https://tailscale.com/cap/is-admin";
const OWNER = "https://tailscale.com/cap/is-owner";

/**
 * Capabilities of the self node that no policy gives, and why the service sends them. Should the engine send one all the
 * same, the service must have sent it, too.
 */
const HOSTED_ONLY: Readonly<Record<string, string>> = {
  "https://tailscale.com/cap/file-sharing": "the tailnet's switch for Taildrop, not policy",
  [ADMIN]: "the role of the node's owner in the hosted console; tagged nodes have it by policy alone",
  [OWNER]: "the role of the node's owner in the hosted console; tagged nodes are the tailnet owner's",
  "https://tailscale.com/cap/ssh": "Tailscale SSH is part of the tailnet's plan",
  "https://tailscale.com/cap/tailnet-lock": "tailnet lock is part of the tailnet's plan",
  "probe-udp-lifetime": "a roll-out switch of the hosted service",
  "ssh-behavior-v1": "a roll-out switch of the hosted service",
  "ssh-env-vars": "a roll-out switch of the hosted service",
  "store-appc-routes": "a roll-out switch of the hosted service",
  https: "the tailnet's switch for certificates, not policy",
  "https://tailscale.com/cap/data-plane-audit-logs": "the tailnet's switch for flow logs, not policy",
  "tailnet-display-name": "the name of the hosted tailnet",
  "tailnet.maxKeyDuration": "the tailnet's setting for the life of keys, not policy",
  "default-auto-update": "the tailnet's setting for updates, not policy; older captures are without it",
};

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

function policyCapabilities(capMap: Record<string, unknown>, tagged: boolean): Record<string, unknown> {
  const byPolicy = (name: string) => !Object.hasOwn(HOSTED_ONLY, name) || (tagged && name === ADMIN);
  return Object.fromEntries(Object.entries(capMap).filter(([name]) => byPolicy(name)));
}

function isStandIn(ipv6: string): boolean {
  return !/::[0-9a-f]{0,2}37:[0-9a-f]{1,4}$/.test(ipv6);
}

/** Nobody's in any capture. */
function innerAddress(index: number): string {
  return `fd7a:115c:a1e0:ffff::${(index + 1).toString(16)}`;
}

/** Which router the service had elected, as the routers say, and as others say of those that say nothing. */
function electionsOf({ nodes = {} }: Capture, names: readonly string[]): Map<string, number> {
  const said = Object.entries(nodes).map(([name, { primaryRoutes }]) => ({ name, primaryRoutes }));
  const silent = Object.values(nodes)
    .flatMap(({ peers = [] }) => peers)
    .filter(({ name }) => !Object.hasOwn(nodes, name));
  const elected = new Map<string, number>();
  for (const { name, primaryRoutes } of [...silent, ...said])
    for (const route of primaryRoutes ?? []) elected.set(route, names.indexOf(name) + 1);
  return elected;
}

/** The tailnet of a capture, and the names of its nodes in order of their ids. */
function tailnetOf(capture: Capture): { tailnet: Tailnet; names: string[] } {
  const { users: accounts = [], nodes: machines = {} } = capture.topology ?? {};
  const names = Object.keys(machines).sort();
  const capMaps = Object.values(capture.nodes ?? {}).map(({ capMap }) => capMap ?? {});
  const rolesOf = (user: string): Role => {
    const own = names
      .filter((name) => machines[name]!.user === user)
      .map((name) => capture.nodes?.[name]?.capMap ?? {});
    return own.some((capMap) => OWNER in capMap) ? "owner" : own.some((capMap) => ADMIN in capMap) ? "admin" : "member";
  };
  const users: PolicyUser[] = accounts.map((user) => ({ ...user, email: user.email ?? "", role: rolesOf(user.name) }));
  const nodes: PolicyNode[] = names.map((name, index) => {
    const { user, tags, ipv4, ipv6, approved_routes } = machines[name]!;
    const userId = accounts.find((each) => each.name === user)?.id ?? null;
    const inner = ipv6 && isStandIn(ipv6) ? innerAddress(index) : (ipv6 ?? "");
    return { id: index + 1, userId, tags: tags ?? [], ipv4: ipv4 ?? "", ipv6: inner, routes: approved_routes ?? [] };
  });
  const owner = users.find(({ role }) => role === "owner") ?? users[0];
  const domain = owner?.email.split("@")[1];
  const tailnet = {
    users,
    nodes,
    primaries: electionsOf(capture, names),
    https: capMaps.some((each) => "https" in each),
  };
  return { tailnet: { ...tailnet, ...(domain && { domains: [domain] }) }, names };
}

/** The same tailnet once the policy's own approvals have taken effect. */
function approved(tailnet: Tailnet, names: readonly string[], capture: Capture, compiled: Compiled): Tailnet {
  const nodes = tailnet.nodes.map((node, index) => {
    const advertised = capture.topology!.nodes![names[index]!]!.routable_ips ?? [];
    return { ...node, routes: [...new Set([...node.routes, ...compiled.autoApproved(node, advertised)])] };
  });
  return { ...tailnet, nodes };
}

function run(capture: Capture): void {
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
      const { ipv6 } = capture.topology!.nodes![name]!;
      if (ipv6) text = text.replaceAll(new RegExp(`${innerAddress(index)}(?=["/])`, "g"), ipv6);
    }
    return JSON.parse(text) as T;
  };
  const peerForm = ({ name, allowedIPs, primaryRoutes, capMap }: CapturePeer) => ({
    name,
    allowedIPs: sorted(allowedIPs),
    primaryRoutes: sorted(primaryRoutes),
    capMap: capMap ?? {},
  });
  const byName = (a: CapturePeer, b: CapturePeer): number => (a.name < b.name ? -1 : 1);
  const got: Record<string, unknown> = {};
  const want: Record<string, unknown> = {};
  for (const [name, node] of Object.entries(capture.nodes ?? {})) {
    const id = names.indexOf(name) + 1;
    const tagged = tailnet.nodes[id - 1]!.tags.length > 0;
    const self = outward(compiled.selfView(id));
    want[name] = {
      packetFilter: filterForm(node.packetFilter ?? null, !mixed),
      ssh: (node.ssh ?? []).map((rule) => ({ ...rule, principals: sorted(rule.principals) })),
      capMap: policyCapabilities(node.capMap ?? {}, tagged),
      unknownCapabilities: [],
      allowedIPs: sorted(node.allowedIPs),
      primaryRoutes: sorted(node.primaryRoutes),
      peers: (node.peers ?? []).map(peerForm).sort(byName),
    };
    got[name] = {
      packetFilter: filterForm(outward(compiled.packetFilter(id)) as FilterRule[], !mixed),
      ssh: outward(compiled.sshRules(id)).map((rule) => ({ ...rule, principals: sorted(rule.principals) })),
      capMap: policyCapabilities(self.capMap, tagged),
      unknownCapabilities: Object.keys(self.capMap).filter((key) => !(key in (node.capMap ?? {}))),
      allowedIPs: sorted(self.allowedIPs),
      primaryRoutes: sorted(self.primaryRoutes),
      peers: compiled
        .peers(id)
        .map((peer) => peerForm({ name: names[peer - 1]!, ...outward(compiled.peerView(id, peer)) }))
        .sort(byName),
    };
  }
  expect(got).toEqual(want);
}

function isCapture(value: unknown): value is Capture {
  return ["policy", "accepted"].every((key) => Object.hasOwn(Object(value), key));
}

const folder = process.env.WEFT_POLICY_CASES ?? resolve(import.meta.dir, "../../shared/policy-cases");

if (existsSync(folder)) {
  const files = readdirSync(folder, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".json"));
  for (const file of files.sort()) {
    const name = file.slice(0, -".json".length);
    try {
      const capture: unknown = JSON.parse(readFileSync(join(folder, file), "utf8"));
      if (isCapture(capture)) test(name, () => run(capture));
      else console.error(`${file} is no capture: it holds no policy and answer`);
    } catch (error) {
      // A file that is cut short costs its own test, not those of the others.
      test(name, () => {
        throw error;
      });
    }
  }
} else {
  console.error(`SKIP: captured policy results: no folder ${folder} (name one by WEFT_POLICY_CASES)`);
  test.skip("captured policy results", () => {});
}
