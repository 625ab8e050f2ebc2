// What clients are told of DNS (spec/ts2021-control-protocol.md, section 17; spec/headscale-features.md, section 12): the
// part that is the same for all nodes, what one node's attributes change in it, and extra records from a file.
import { z } from "zod";
import { formatIP, type IP, maskPrefix, parseIP, parsePrefix } from "../wire/ip.ts";
import type * as tc from "../wire/tailcfg.ts";
import type { NodeRecord } from "./model.ts";
import type { TailnetConfig } from "./netmap.ts";
import type { ControlSettings, ExtraRecord } from "./settings.ts";
import { FileWatch, readSmallFile } from "./watch.ts";

const MAX_RECORDS = 10_000;
const MAX_RECORDS_FILE = 4 * 1024 * 1024;
const NEXTDNS = "https://dns.nextdns.io";

/** Before relays are known and extra records are read. */
export function configOf(settings: ControlSettings): TailnetConfig {
  return {
    baseDomain: settings.baseDomain,
    derpMap: settings.derp.embedded ?? {},
    dns: dnsConfigOf(settings, settings.dns.extraRecords),
    certificates: settings.dns.certificates !== null,
    taildrop: settings.taildrop,
    autoUpdate: settings.autoUpdate,
    logtail: settings.logtail,
    clients: settings.clients,
  };
}

/** Without dots at the ends, in lower case. */
function plainName(name: string): string {
  return name.replace(/^\.+|\.+$/g, "").toLowerCase();
}

/** What one client is told that others are not: see `dnsFor`. */
export function dnsConfigOf(settings: ControlSettings, extra: readonly ExtraRecord[]): tc.DNSConfig {
  const { dns, baseDomain, prefixes } = settings;
  const resolver = (Addr: string): tc.Resolver => ({
    Addr,
    ...(dns.useWithExitNode.includes(Addr) && { UseWithExitNode: true }),
  });
  const resolvers = dns.nameservers.map(resolver);
  const routes: Record<string, tc.Resolver[]> = Object.create(null);
  for (const [suffix, servers] of Object.entries(dns.split)) routes[plainName(suffix)] = servers.map(resolver);
  const records = extra.map(({ name, type, value }) => ({ Name: plainName(name), Type: type, Value: value }));
  if (dns.magicDns) {
    // Empty, not null: clients lose null, and then hand their own resolver's file over to these names.
    for (const zone of reverseZones(prefixes)) routes[zone] = [];
    // Where the client asks its own resolver for most names, it must know that these are not there.
    const isRouted = (name: string) => [baseDomain, ...Object.keys(routes)].some((suffix) => isWithin(name, suffix));
    if (!dns.overrideLocalDns || resolvers.length === 0)
      for (const { Name } of records) if (!isRouted(Name)) routes[Name] = [];
  }
  return {
    ...(resolvers.length > 0 && { [dns.overrideLocalDns ? "Resolvers" : "FallbackResolvers"]: resolvers }),
    Domains: [...(baseDomain ? [baseDomain] : []), ...dns.searchDomains.map(plainName)],
    Proxied: dns.magicDns,
    Routes: { ...routes },
    ...(records.length > 0 && { ExtraRecords: records }),
    // Who uses an exit node's resolver must not read this tailnet's names there.
    ...(baseDomain && { ExitNodeFilteredSet: [`.${baseDomain}`] }),
  };
}

function isWithin(name: string, suffix: string): boolean {
  return suffix !== "" && (name === suffix || name.endsWith(`.${suffix}`));
}

/** The zones of reverse names that cover the tailnet's addresses, cut at the labels of DNS: octets and hex digits. */
export function reverseZones({ v4, v6 }: { v4: string | null; v6: string | null }): string[] {
  const zones: string[] = [];
  for (const text of [v4, v6]) {
    const prefix = text === null ? null : parsePrefix(text);
    if (!prefix) continue;
    const { ip, bits } = maskPrefix(prefix);
    const labelBits = ip.length === 4 ? 8 : 4;
    const labels = Math.min(Math.max(1, Math.ceil(bits / labelBits)), (ip.length * 8) / labelBits);
    const spare = labels * labelBits - bits;
    for (let i = 0; i < 1 << spare; i++) zones.push(reverseName(ip, labels, i));
  }
  return zones;
}

/** `add`: to the last of the labels. */
function reverseName(ip: IP, labels: number, add: number): string {
  const digits =
    ip.length === 4
      ? [...ip].map(String)
      : [...ip].flatMap((byte) => [(byte >> 4).toString(16), (byte & 15).toString(16)]);
  const kept = digits.slice(0, labels);
  const radix = ip.length === 4 ? 10 : 16;
  kept[labels - 1] = (Number.parseInt(kept[labels - 1]!, radix) + add).toString(radix);
  return `${kept.reverse().join(".")}.${ip.length === 4 ? "in-addr" : "ip6"}.arpa`;
}

/** What one node is told. The same object for most: compare by identity first. `capMap`: its attributes by policy. */
export function dnsFor(config: TailnetConfig, node: NodeRecord, capMap: tc.CapMap): tc.DNSConfig {
  let dns = config.dns;
  if (config.certificates) dns = { ...dns, CertDomains: [`${node.givenName}.${config.baseDomain}`] };
  const lists = [
    dns.Resolvers ?? [],
    dns.FallbackResolvers ?? [],
    ...Object.values(dns.Routes ?? {}).map((r) => r ?? []),
  ];
  if (!lists.flat().some(({ Addr }) => isNextDNS(Addr))) return dns;
  const tell = (resolver: tc.Resolver) => ({ ...resolver, Addr: nextDNS(resolver.Addr, node, capMap) });
  return {
    ...dns,
    ...(dns.Resolvers && { Resolvers: dns.Resolvers.map(tell) }),
    ...(dns.FallbackResolvers && { FallbackResolvers: dns.FallbackResolvers.map(tell) }),
    Routes: Object.fromEntries(Object.entries(dns.Routes ?? {}).map(([name, list]) => [name, (list ?? []).map(tell)])),
  };
}

function isNextDNS(address: string): boolean {
  return address === NEXTDNS || address.startsWith(`${NEXTDNS}/`);
}

/** With the profile that the node's attributes name ("nextdns:PROFILE"), and what its console shows of the device. */
function nextDNS(address: string, node: NodeRecord, capMap: tc.CapMap): string {
  if (!isNextDNS(address)) return address;
  const url = new URL(address);
  const attributes = Object.keys(capMap).filter((name) => name.startsWith("nextdns:"));
  const profile = attributes
    .map((name) => name.slice("nextdns:".length))
    .filter((name) => name !== "no-device-info" && /^[A-Za-z0-9._-]{1,64}$/.test(name))
    .sort()[0];
  if (profile !== undefined) url.pathname = `/${profile}`;
  if (!attributes.includes("nextdns:no-device-info")) {
    url.searchParams.set("device_name", node.hostname || node.givenName);
    url.searchParams.set("device_model", node.hostinfo.OS ?? "");
    url.searchParams.set("device_ip", node.ipv4 || node.ipv6);
  }
  return url.toString();
}

const recordsSchema = z
  .array(
    z.strictObject({
      name: z.string().min(1).max(254),
      type: z.string().max(16).default(""),
      value: z.string().max(64),
    }),
  )
  .max(MAX_RECORDS);

/** Whether it is a name of DNS, dots at its ends aside. */
export function isDomain(name: string): boolean {
  const plain = plainName(name);
  return (
    plain.length <= 253 && plain.split(".").every((label) => /^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$/.test(label))
  );
}

/** Whether it is an IP address, or the URL of a DNS-over-HTTPS server. */
export function isResolver(text: string): boolean {
  return parseIP(text) !== null || (/^https?:\/\/\S+$/.test(text) && URL.canParse(text));
}

/** Domains of the DNS-over-HTTPS services whose addresses are built into official clients (seen with 1.102). */
const KNOWN_DOH = [
  ...["cloudflare-dns.com", "dns.google", "quad9.net", "dns.mullvad.net", "nextdns.io", "controld.com"],
  ...["wikimedia-dns.org", "canadianshield.cira.ca"],
];

/** Whether official clients can ask this server: of an https URL that they do not know they say SERVFAIL for every name. */
export function isKnownToClients(resolver: string): boolean {
  if (!resolver.startsWith("https:")) return true;
  const { hostname } = new URL(resolver);
  return KNOWN_DOH.some((domain) => isWithin(hostname, domain));
}

/** Why clients would pass a record over, or null. */
export function recordProblem({ name, type, value }: ExtraRecord): string | null {
  const where = `extra record ${JSON.stringify(name)}`;
  if (!isDomain(name)) return `${where}: this is no DNS name`;
  const wanted = { "": [4, 16], A: [4], AAAA: [16] }[type.toUpperCase()];
  if (!wanted) return `${where}: clients take the types A and AAAA, not ${JSON.stringify(type)}`;
  const ip = parseIP(value);
  if (!ip || !wanted.includes(ip.length))
    return `${where}: ${JSON.stringify(value)} is no address for type ${type || "A or AAAA"}`;
  return null;
}

/** JSON: [{"name": "grafana.net.example", "type": "A", "value": "100.64.0.3"}]. Throws with one sentence. */
export function parseRecords(text: string): ExtraRecord[] {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not JSON: ${(error as Error).message}`);
  }
  const parsed = recordsSchema.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw new Error(`${issue.path.length > 0 ? `record ${issue.path.join(".")}: ` : ""}${issue.message}`);
  }
  for (const record of parsed.data) {
    const problem = recordProblem(record);
    if (problem) throw new Error(problem);
  }
  return parsed.data.map(({ name, type, value }) => ({
    name,
    type: type.toUpperCase(),
    value: formatIP(parseIP(value)!),
  }));
}

export interface ExtraRecordsOptions {
  path: string;
  /** The records of the file, whenever they are others. */
  changed(records: ExtraRecord[]): void;
  /** Problems; and what went well. */
  log(line: string): void;
  note(line: string): void;
  /** Milliseconds between looks, where the kernel tells nothing. */
  every?: number;
}

/** The extra records of a file that may be edited, removed and made anew at any time; while it is wrong or gone, the last ones hold. */
export class ExtraRecordsFile {
  private readonly watch: FileWatch;
  private last: string;

  /** Throws with one sentence when the file cannot be used at the start. */
  constructor(private readonly options: ExtraRecordsOptions) {
    this.last = readSmallFile(options.path, MAX_RECORDS_FILE);
    options.changed(this.parse(this.last));
    this.watch = new FileWatch(options.path, () => this.reload(), options.every);
  }

  close(): void {
    this.watch.close();
  }

  private parse(text: string): ExtraRecord[] {
    try {
      return parseRecords(text);
    } catch (error) {
      throw new Error(`the extra records of ${this.options.path} cannot be used: ${(error as Error).message}`);
    }
  }

  private reload(): void {
    try {
      const text = readSmallFile(this.options.path, MAX_RECORDS_FILE);
      if (text === this.last) return;
      const records = this.parse(text);
      this.last = text;
      this.options.changed(records);
      this.options.note(`${records.length} extra records of ${this.options.path} are in force`);
    } catch (error) {
      this.options.log(`${(error as Error).message}; the extra records before stay in force`);
    }
  }
}
