// A policy after parsing, and the tailnet that it is applied to.
import type * as tc from "../../wire/tailcfg.ts";
import type { Range, RangeSet } from "./addresses.ts";
import type { Place } from "./error.ts";

/** Who or what stands in a src, dst, target or approver list. `text` is as written, blanks trimmed. */
export type Selector = { readonly text: string } & (
  | { readonly kind: "any" }
  /** "name@", "name@domain". */
  | { readonly kind: "user"; readonly token: string }
  /** "user:*@domain". */
  | { readonly kind: "domain"; readonly domain: string }
  | { readonly kind: "group" | "tag" | "autogroup" | "ipset"; readonly name: string }
  /** An address, prefix or range, or the name of a host. */
  | { readonly kind: "range"; readonly range: Range }
);

export interface PortRange {
  readonly first: number;
  readonly last: number;
}

export const ALL_PORTS: PortRange = { first: 0, last: 65535 };

export interface Destination {
  readonly selector: Selector;
  readonly ports: readonly PortRange[];
}

export type CapabilityValues = readonly unknown[] | null;

/** An entry of `grants` or `acls`: both say the same. */
export interface Access {
  readonly section: "grants" | "acls";
  readonly index: number;
  readonly place: Place;
  readonly src: readonly Selector[];
  readonly postures: readonly string[];
  readonly dst: readonly Selector[];
  /** One for each protocol (null: TCP, UDP and both ICMPs), in the order of appearance. Empty: capabilities alone. */
  readonly openings: readonly { readonly protocol: number | null; readonly dst: readonly Destination[] }[];
  readonly capabilities: Readonly<Record<string, CapabilityValues>> | null;
  /** Tags of routers; empty: any way. */
  readonly via: readonly string[];
}

export interface SSHEntry {
  readonly index: number;
  readonly place: Place;
  readonly action: "accept" | "check";
  readonly src: readonly Selector[];
  readonly postures: readonly string[];
  readonly dst: readonly Selector[];
  /** Literal logins, "root" and "autogroup:nonroot" among them. */
  readonly logins: readonly string[];
  /** Of "localpart:*@domain". */
  readonly localDomains: readonly string[];
  /** Milliseconds; 0: at each connection. Null: the default of 12 hours. */
  readonly checkPeriod: number | null;
  readonly acceptEnv: readonly string[];
  readonly recorders: readonly string[];
  readonly enforceRecorder: boolean;
}

export interface NodeAttribute {
  readonly index: number;
  readonly place: Place;
  readonly target: readonly Selector[];
  readonly attributes: readonly string[];
  readonly app: Readonly<Record<string, CapabilityValues>>;
  readonly ipPool: readonly Range[];
}

export interface PolicyTest {
  readonly src: string;
  /** Attributes that the source has for postures. */
  readonly srcPostureAttrs: Readonly<Record<string, string | number | boolean>>;
  readonly accept: readonly string[];
  readonly deny: readonly string[];
  readonly proto: string;
}

export interface SSHTest {
  readonly src: string;
  readonly dst: readonly string[];
  readonly accept: readonly string[];
  readonly check: readonly string[];
  readonly deny: readonly string[];
}

/** One condition of a posture, "node:os == 'macos'". */
export interface Condition {
  readonly attribute: string;
  readonly operator: "==" | "!=" | "<" | "<=" | ">" | ">=" | "IN" | "NOT IN" | "IS SET" | "NOT SET";
  readonly values: readonly (string | number | boolean)[];
}

export interface Policy {
  readonly text: string;
  /** Members are user tokens. */
  readonly groups: ReadonlyMap<string, readonly Selector[]>;
  /** Whether a group that is not defined here may be one of an identity provider. */
  readonly isForeignGroup: (name: string) => boolean;
  readonly hosts: ReadonlyMap<string, Range>;
  readonly tagOwners: ReadonlyMap<string, readonly Selector[]>;
  readonly ipsets: ReadonlyMap<string, RangeSet>;
  readonly postures: ReadonlyMap<string, readonly Condition[]>;
  /** `grants` before `acls`, as the service compiles them. Null: neither stands in the policy, all may reach all. */
  readonly accesses: readonly Access[] | null;
  readonly approvers: {
    readonly routes: readonly { readonly range: Range; readonly approvers: readonly Selector[] }[];
    readonly exitNode: readonly Selector[];
  };
  readonly nodeAttributes: readonly NodeAttribute[];
  readonly ssh: readonly SSHEntry[];
  readonly tests: readonly PolicyTest[];
  readonly sshTests: readonly SSHTest[];
  readonly randomizeClientPort: boolean;
  readonly disableIPv4: boolean;
  readonly oneCGNAT: boolean | null;
  /** Changes to the relays of the server: regions that are null are taken out, `omitDefaultRegions` all of them. */
  readonly derpMap: tc.DERPMap | null;
}

/** The highest first. */
export const ROLES = ["owner", "admin", "it-admin", "network-admin", "billing-admin", "auditor", "member"] as const;
export type Role = (typeof ROLES)[number];

export interface PolicyUser {
  readonly id: number;
  readonly name: string;
  /** "" when unknown. */
  readonly email: string;
  readonly role?: Role;
  /** Groups of the identity provider, "group:…". They add to those of the policy. */
  readonly groups?: readonly string[];
  /** Issuer and subject of an identity provider; a word of the policy that is one means this user alone. */
  readonly providerId?: string;
}

export interface PolicyNode {
  readonly id: number;
  /** For people, in explanations. */
  readonly name?: string;
  /** Null for tagged nodes. */
  readonly userId: number | null;
  readonly tags: readonly string[];
  /** "" when the node has none of this family. */
  readonly ipv4: string;
  readonly ipv6: string;
  /** Routes that the node advertises and that are approved, as canonical prefixes; exit routes among them. */
  readonly routes: readonly string[];
  /** For postures: "node:os", "custom:tier" and so on. */
  readonly attributes?: Readonly<Record<string, string | number | boolean>>;
}

export interface Tailnet {
  readonly users: readonly PolicyUser[];
  readonly nodes: readonly PolicyNode[];
  /** Which node serves a prefix that several have, where the election is over; the lowest id otherwise. */
  readonly primaries?: ReadonlyMap<string, number>;
  /** Where addresses of nodes come from. Absent: Tailscale's ranges. */
  readonly prefixes?: readonly string[];
  /** Mail domains of the tailnet, for "localpart:*@domain". Absent: those of its users. */
  readonly domains?: readonly string[];
  /** Nodes can get certificates. */
  readonly https?: boolean;
}

// SSHPolicy (spec/ts2021-control-protocol.md, section 20).

export interface SSHAction {
  /** Shown to the person at the terminal. */
  message?: string;
  accept?: boolean;
  reject?: boolean;
  allowAgentForwarding?: boolean;
  allowLocalPortForwarding?: boolean;
  allowRemotePortForwarding?: boolean;
  holdAndDelegate?: string;
  recorders?: string[];
  onRecordingFailure?: { RejectSessionWithMessage?: string; TerminateSessionWithMessage?: string };
}

export interface SSHRule {
  principals: { nodeIP: string }[];
  sshUsers: Record<string, string>;
  action: SSHAction;
  acceptEnv?: string[];
}
