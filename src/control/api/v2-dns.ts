// DNS of the tailnet, in /api/v2. It stands in the configuration file, so what is asked for is confirmed when it is so, and
// refused otherwise: a Terraform state that says the same as the file applies.
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { type Operation, operation } from "./operation.ts";
import { text } from "./shapes.ts";
import { requireSame } from "./v2-policy.ts";
import { tailnet } from "./v2-shapes.ts";

const list = z.array(text).max(1000);
const addresses = z.array(text).max(100);
const split = z.record(text, addresses);
const resolver = z.object({ address: z.string(), useWithExitNode: z.boolean().optional() });

export function dnsV2(context: ControlContext): Operation[] {
  const { dns } = context.settings;
  const splitDns = () =>
    Object.fromEntries(Object.entries(dns.split).map(([domain, servers]) => [domain, [...servers]]));
  const tag = "DNS";
  const read = { method: "get", tag, scope: "dns:read", params: tailnet } as const;
  const write = { method: "post", tag, scope: "dns", params: tailnet } as const;

  const nameservers = z.object({ dns: list });
  const nameserversNow = () => ({ dns: [...dns.nameservers] });
  const preferences = z.object({ magicDNS: z.boolean() });
  const preferencesNow = () => ({ magicDNS: dns.magicDns });
  const searchPaths = z.object({ searchPaths: list });
  const searchPathsNow = () => ({ searchPaths: [...dns.searchDomains] });
  const resolvers = (servers: readonly string[]) =>
    servers.map((address) => ({ address, ...(dns.useWithExitNode.includes(address) && { useWithExitNode: true }) }));

  return [
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/nameservers",
      id: "listDnsNameservers",
      summary: "Resolvers for all names",
      response: nameservers,
      handle: nameserversNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/nameservers",
      id: "setDnsNameservers",
      summary: "Confirm the resolvers for all names",
      body: nameservers,
      response: nameservers.extend({ magicDNS: z.boolean() }),
      handle({ body }) {
        requireSame("dns", dns.nameservers, body.dns);
        return { ...nameserversNow(), magicDNS: dns.magicDns };
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
      summary: "Confirm whether nodes are found by name",
      body: preferences,
      response: preferences,
      handle({ body }) {
        requireSame("magicDNS", dns.magicDns, body.magicDNS);
        return preferencesNow();
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/searchpaths",
      id: "listDnsSearchPaths",
      summary: "Search domains",
      response: searchPaths,
      handle: searchPathsNow,
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/dns/searchpaths",
      id: "setDnsSearchPaths",
      summary: "Confirm the search domains",
      body: searchPaths,
      response: searchPaths,
      handle({ body }) {
        requireSame("searchPaths", dns.searchDomains, body.searchPaths);
        return searchPathsNow();
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "getSplitDns",
      summary: "Resolvers by domain",
      response: split,
      handle: splitDns,
    }),
    operation({
      ...write,
      method: "put",
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "setSplitDns",
      summary: "Confirm the resolvers of all domains",
      body: split,
      response: split,
      handle({ body }) {
        const names = new Set([...Object.keys(splitDns()), ...Object.keys(body)]);
        for (const name of names) requireSame(`split-dns ${name}`, splitDns()[name] ?? [], body[name] ?? []);
        return splitDns();
      },
    }),
    operation({
      ...write,
      method: "patch",
      path: "/tailnet/{tailnet}/dns/split-dns",
      id: "updateSplitDns",
      summary: "Confirm the resolvers of some domains",
      body: z.record(text, addresses.nullable()),
      response: split,
      handle({ body }) {
        for (const [name, servers] of Object.entries(body))
          requireSame(`split-dns ${name}`, splitDns()[name] ?? [], servers ?? []);
        return splitDns();
      },
    }),
    operation({
      ...read,
      path: "/tailnet/{tailnet}/dns/configuration",
      id: "getDnsConfiguration",
      summary: "All of it",
      response: z.object({
        nameservers: z.array(resolver),
        splitDNS: z.record(z.string(), z.array(resolver)),
        searchPaths: z.array(z.string()),
        preferences: z.object({ overrideLocalDNS: z.boolean(), magicDNS: z.boolean() }),
      }),
      handle: () => ({
        nameservers: resolvers(dns.nameservers),
        splitDNS: Object.fromEntries(Object.entries(splitDns()).map(([name, servers]) => [name, resolvers(servers)])),
        searchPaths: [...dns.searchDomains],
        preferences: { overrideLocalDNS: dns.overrideLocalDns, magicDNS: dns.magicDns },
      }),
    }),
  ];
}
