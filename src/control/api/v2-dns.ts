// DNS of the tailnet, in /api/v2. What is set here holds in place of what the configuration says (chosen.ts).
import { z } from "zod";
import type { Choices } from "../chosen.ts";
import type { ControlContext } from "../context.ts";
import { isDomain, isResolver } from "../dns.ts";
import { CommandError } from "../errors.ts";
import { type Operation, operation } from "./operation.ts";
import { text } from "./shapes.ts";
import { tailnet } from "./v2-shapes.ts";

const MAX_DOMAINS = 1000;

const address = text
  .refine(isResolver, "must be an IP address or the URL of a DNS-over-HTTPS server")
  .meta({ examples: ["9.9.9.9", "2620:fe::fe", "https://dns.example.com/dns-query"] });
const domain = text
  .refine(isDomain, "must be a domain, for example corp.example.com")
  .meta({ examples: ["corp.example.com", "example.org"] });
const addresses = z.array(address).max(100);
const domains = z.array(domain).max(100);

/** Anything by domain. */
function byDomain<T extends z.ZodType>(value: T) {
  return z
    .record(text, value)
    .superRefine((table, { addIssue }) => {
      const names = Object.keys(table);
      if (names.length > MAX_DOMAINS) addIssue(`there may be at most ${MAX_DOMAINS} domains`);
      const wrong = names.find((name) => !isDomain(name));
      if (wrong !== undefined) addIssue(`${JSON.stringify(wrong.slice(0, 100))} is no domain`);
    })
    .meta({ examples: [{}] });
}

// Go's client writes null for a list of nothing, and leaves out what is false.
const nameserversIn = z.object({ dns: addresses.nullable() });
const searchPathsIn = z.object({ searchPaths: domains.nullable() });
const resolversIn = z.array(z.object({ address, useWithExitNode: z.boolean().optional() })).max(100);
const configurationIn = z.object({
  nameservers: resolversIn.nullish(),
  splitDNS: byDomain(resolversIn).nullish(),
  searchPaths: domains.nullish(),
  preferences: z.object({ overrideLocalDNS: z.boolean().optional(), magicDNS: z.boolean().optional() }).nullish(),
});

const preferences = z.object({ magicDNS: z.boolean() });
const nameserversOut = z.object({ dns: z.array(z.string()) });
const searchPathsOut = z.object({ searchPaths: z.array(z.string()) });
const splitOut = z.record(z.string(), z.array(z.string()));
const resolversOut = z.array(z.object({ address: z.string(), useWithExitNode: z.boolean().optional() }));
const configurationOut = z
  .object({
    nameservers: resolversOut,
    splitDNS: z.record(z.string(), resolversOut),
    searchPaths: z.array(z.string()),
    preferences: z.object({ overrideLocalDNS: z.boolean(), magicDNS: z.boolean() }),
  })
  .meta({ id: "DnsConfiguration" });

type Resolvers = z.output<typeof resolversIn>;

export function dnsV2(context: ControlContext): Operation[] {
  const now = () => context.settings.dns;
  const splitNow = () => Object.fromEntries(Object.entries(now().split).map(([name, servers]) => [name, [...servers]]));
  const nameserversNow = () => ({ dns: [...now().nameservers] });
  const preferencesNow = () => ({ magicDNS: now().magicDns });
  const searchPathsNow = () => ({ searchPaths: [...now().searchDomains] });
  const setSplit = async (split: Record<string, readonly string[] | null>) => {
    const kept = Object.entries(split).filter(([, servers]) => servers !== null && servers.length > 0);
    if (kept.length > MAX_DOMAINS) throw new CommandError(400, `there may be at most ${MAX_DOMAINS} domains`);
    await context.choose({ "dns.nameservers.split": Object.fromEntries(kept) as Record<string, readonly string[]> });
    return splitNow();
  };
  // Sorted, because the Terraform provider finds the resolvers of its state by binary search.
  const resolversNow = (servers: readonly string[]) =>
    [...servers]
      .sort()
      .map((address) => ({ address, ...(now().useWithExitNode.includes(address) && { useWithExitNode: true }) }));
  const configurationNow = () => ({
    nameservers: resolversNow(now().nameservers),
    splitDNS: Object.fromEntries(Object.entries(now().split).map(([name, servers]) => [name, resolversNow(servers)])),
    searchPaths: [...now().searchDomains],
    preferences: { overrideLocalDNS: now().overrideLocalDns, magicDNS: now().magicDns },
  });

  const tag = "DNS";
  const read = { method: "get", tag, scope: "dns:read", params: tailnet } as const;
  const write = { method: "post", tag, scope: "dns", params: tailnet } as const;
  return [
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/nameservers",
      id: "listDnsNameservers",
      summary: "Resolvers for all names",
      response: nameserversOut,
      handle: nameserversNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/nameservers",
      id: "setDnsNameservers",
      summary: "Replace the resolvers for all names",
      body: nameserversIn,
      response: nameserversOut.extend(preferences.shape),
      async handle({ body }) {
        await context.choose({ "dns.nameservers.global": body.dns ?? [] });
        return { ...nameserversNow(), ...preferencesNow() };
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/preferences",
      id: "getDnsPreferences",
      summary: "Whether nodes are found by name",
      response: preferences,
      handle: preferencesNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/preferences",
      id: "setDnsPreferences",
      summary: "Choose whether nodes are found by name",
      body: preferences,
      response: preferences,
      async handle({ body }) {
        await context.choose({ "dns.magic_dns": body.magicDNS });
        return preferencesNow();
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/searchpaths",
      id: "listDnsSearchPaths",
      summary: "Search domains",
      response: searchPathsOut,
      handle: searchPathsNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/searchpaths",
      id: "setDnsSearchPaths",
      summary: "Replace the search domains",
      body: searchPathsIn,
      response: searchPathsOut,
      async handle({ body }) {
        await context.choose({ "dns.search_domains": body.searchPaths ?? [] });
        return searchPathsNow();
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "getSplitDns",
      summary: "Resolvers by domain",
      response: splitOut,
      handle: splitNow,
    }),
    operation({
      ...write,
      method: "put",
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "setSplitDns",
      summary: "Replace the resolvers of all domains",
      body: byDomain(addresses.nullable()),
      response: splitOut,
      handle: ({ body }) => setSplit(body),
    }),
    operation({
      ...write,
      method: "patch",
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "updateSplitDns",
      summary: "Replace the resolvers of some domains; null or an empty list takes a domain away",
      body: byDomain(addresses.nullable()),
      response: splitOut,
      handle: ({ body }) => setSplit({ ...now().split, ...body }),
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/configuration",
      id: "getDnsConfiguration",
      summary: "All of it",
      response: configurationOut,
      handle: configurationNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/configuration",
      id: "setDnsConfiguration",
      summary: "Replace all of it; what is left out is empty or false",
      body: configurationIn,
      response: configurationOut,
      async handle({ body }) {
        await context.choose(choicesOf(body));
        return configurationNow();
      },
    }),
  ];
}

function choicesOf({ nameservers, splitDNS, searchPaths, preferences }: z.output<typeof configurationIn>) {
  const listed = Object.entries(splitDNS ?? {}).filter(([, resolvers]) => resolvers.length > 0);
  const addressesOf = (resolvers: Resolvers) => resolvers.map(({ address }) => address);
  const all = [...(nameservers ?? []), ...listed.flatMap(([, resolvers]) => resolvers)];
  const kept = new Set(all.filter(({ useWithExitNode }) => useWithExitNode).map(({ address }) => address));
  const other = all.find(({ address, useWithExitNode }) => kept.has(address) && !useWithExitNode);
  if (other)
    throw new CommandError(
      400,
      `${other.address} is listed with useWithExitNode and without: it holds for an address wherever that is listed`,
    );
  return {
    "dns.nameservers.global": addressesOf(nameservers ?? []),
    "dns.nameservers.split": Object.fromEntries(listed.map(([name, resolvers]) => [name, addressesOf(resolvers)])),
    "dns.nameservers.use_with_exit_node": [...kept],
    "dns.search_domains": searchPaths ?? [],
    "dns.override_local_dns": preferences?.overrideLocalDNS ?? false,
    "dns.magic_dns": preferences?.magicDNS ?? false,
  } satisfies Partial<Choices>;
}
