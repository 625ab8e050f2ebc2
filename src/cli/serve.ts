// What box, control and relay share on the command line: where to listen, which URL clients use, TLS, the relay's entry in
// the DERP map, and an orderly end on a signal.
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import { type ControlSettings, defaultSettings } from "../control/settings.ts";
import { metaCertificate } from "../relay/metacert.ts";
import { formatAddrPort, formatIP, parseAddrPort, parseIP, parsePrefix, prefixContains } from "../wire/ip.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import { UsageError } from "./flags.ts";

/** Region of a relay that a Weft operator runs; 900 to 999 are for custom regions. */
const REGION_ID = 999;
export const STUN_PORT = 3478;
const DEFAULT_LISTEN = "127.0.0.1:8080";
export const DEFAULT_BASE_DOMAIN = "weft.internal";

export function defaultDataDir(): string {
  return process.env.WEFT_DATA || "/var/lib/weft";
}

export interface Address {
  host: string;
  port: number;
}

/** "IP:PORT" of a flag. Throws UsageError. */
export function parseListen(flag: string, text: string): Address {
  const parsed = parseAddrPort(text);
  if (!parsed || parsed.port === 0)
    throw new UsageError(
      `--${flag} ${JSON.stringify(text)} is not an address and port: write it as 192.0.2.1:8080 or [2001:db8::1]:8080, or 0.0.0.0:8080 for every IPv4 address`,
    );
  return { host: formatIP(parsed.ip), port: parsed.port };
}

/** `--stun`: "off", "IP:PORT", or absent for the STUN port of the listening address. */
export function parseStun(text: string | undefined, listen: Address): Address | null {
  if (text === "off") return null;
  return text === undefined ? { host: listen.host, port: STUN_PORT } : parseListen("stun", text);
}

/** A URL of scheme, host and port alone. Throws UsageError. */
export function parseUrl(flag: string, text: string): URL {
  let url: URL;
  try {
    url = new URL(text);
  } catch {
    throw new UsageError(`--${flag} ${JSON.stringify(text)} is not a URL: write it as https://weft.example.com`);
  }
  if (url.protocol !== "https:" && url.protocol !== "http:")
    throw new UsageError(`--${flag} ${JSON.stringify(text)} must start with https:// or http://`);
  if (url.pathname !== "/" || url.search || url.hash || url.username)
    throw new UsageError(
      `--${flag} ${JSON.stringify(text)} must be scheme, host and port alone: clients ask for fixed paths at the root`,
    );
  return url;
}

/** The URL to tell clients when none was given. */
export function deriveUrl(listen: Address, tls: boolean): URL {
  const isWildcard = listen.host === "0.0.0.0" || listen.host === "::";
  const host = isWildcard ? "127.0.0.1" : listen.host;
  return new URL(`${tls ? "https" : "http"}://${formatAddrPort(parseIP(host)!, listen.port)}`);
}

/** PEM texts of `--tls-cert` and `--tls-key`. Throws with one sentence. */
export function readTls(certFile?: string, keyFile?: string): { cert: string; key: string } | undefined {
  if (certFile === undefined && keyFile === undefined) return undefined;
  if (certFile === undefined || keyFile === undefined)
    throw new UsageError("--tls-cert and --tls-key go together: give both, or none");
  const read = (flag: string, file: string, label: string) => {
    let text: string;
    try {
      text = readFileSync(file, "utf8");
    } catch (error) {
      throw new Error(`--${flag} ${file} cannot be read: ${(error as Error).message}`);
    }
    if (!text.includes(`${label}-----`)) throw new Error(`--${flag} ${file} holds no PEM ${label.toLowerCase()}`);
    return text;
  };
  return { cert: read("tls-cert", certFile, "CERTIFICATE"), key: read("tls-key", keyFile, "PRIVATE KEY") };
}

/** The DERP map with the one relay that answers at `url`. `stunPort` null: it has no STUN. */
export function derpMapOf(url: URL, stunPort: number | null): DERPMap {
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const family = isIP(host);
  const isPlain = url.protocol === "http:";
  const port = url.port ? Number(url.port) : isPlain ? 80 : 443;
  return {
    Regions: {
      [REGION_ID]: {
        RegionID: REGION_ID,
        RegionCode: "weft",
        RegionName: "Weft relay",
        Nodes: [
          {
            Name: `${REGION_ID}a`,
            RegionID: REGION_ID,
            HostName: host,
            ...(family === 4 && { IPv4: host, IPv6: "none" }),
            ...(family === 6 && { IPv4: "none", IPv6: host }),
            ...(port !== 443 && { DERPPort: port }),
            ...(stunPort !== STUN_PORT && { STUNPort: stunPort ?? -1 }),
            // The protocol's only word for a relay without TLS.
            ...(isPlain && { InsecureForTests: true }),
          },
        ],
      },
    },
    omitDefaultRegions: true,
  };
}

const PRIVATE = [
  "10.0.0.0/8",
  "172.16.0.0/12",
  "192.168.0.0/16",
  "127.0.0.0/8",
  "169.254.0.0/16",
  "100.64.0.0/10",
  "fc00::/7",
  "fe80::/10",
  "::1/128",
].map((text) => parsePrefix(text)!);

/** What to tell an operator who offers plain HTTP on a public name; null when the URL is fine. */
export function plainHttpWarning(url: URL): string | null {
  if (url.protocol !== "http:") return null;
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const ip = parseIP(host);
  if (ip ? PRIVATE.some((prefix) => prefixContains(prefix, ip)) : host === "localhost") return null;
  return [
    `warning: ${url.origin} is plain HTTP on a public name. Traffic between nodes stays end-to-end encrypted, but whoever sits on`,
    "the way of a connection can answer /key with a key of his own and so pose as this control server to a node that joins (and take",
    "its pre-auth key), can replay a node's login to the relay (and take its place there, so that packets for it are lost), and sees",
    "who talks to whom.",
    "Official clients speak nothing but TLS to relays. Get a certificate (for example with certbot or acme.sh) and start with",
    `--url https://${url.hostname} --tls-cert FILE --tls-key FILE, or put a TLS proxy in front that passes upgrades on.`,
  ].join("\n");
}

/** On SIGHUP the policy file is read again; its outcome is logged. Returns the end of it. */
export function reloadOnHangup(control: { policies: { reloadLogged(): void } }): () => void {
  const reload = (): void => control.policies.reloadLogged();
  process.on("SIGHUP", reload);
  return () => void process.off("SIGHUP", reload);
}

/** Throws UsageError when MagicDNS could not work with this suffix. */
export function checkBaseDomain(domain: string, url: URL): string {
  if (
    domain.length > 180 ||
    !/^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/.test(domain)
  )
    throw new UsageError(
      `--base-domain ${JSON.stringify(domain)} is not a domain of at least two lower-case labels, for example weft.internal`,
    );
  if (url.hostname === domain || url.hostname.endsWith(`.${domain}`))
    throw new UsageError(
      `--base-domain ${domain} contains ${url.hostname}, where this server is found: clients could not resolve it any more; choose another domain`,
    );
  return domain;
}

/** The relay's key behind the chain: official clients then log in to it without waiting for an HTTP answer. */
export function withMetaCertificate(tls: { cert: string; key: string }, relayPublicKey: Uint8Array): typeof tls {
  return { ...tls, cert: `${tls.cert.trimEnd()}\n${metaCertificate(relayPublicKey, Date.now())}` };
}

/** What box, control and relay have in common on their command lines. */
export const SERVER_FLAGS = {
  data: "string",
  listen: "string",
  url: "string",
  "tls-cert": "string",
  "tls-key": "string",
  help: { kind: "boolean", short: "h" },
} as const;

export interface ServerSettings {
  address: Address;
  tls: { cert: string; key: string } | undefined;
  url: URL;
  dataDir: string;
}

/** Checks the common flags, and warns of what is dangerous. `told`: who is told the URL; null for nobody. */
export function serverSettings(
  flags: { data?: string; listen?: string; url?: string; "tls-cert"?: string; "tls-key"?: string },
  told: string | null,
): ServerSettings {
  const address = parseListen("listen", flags.listen ?? DEFAULT_LISTEN);
  const tls = readTls(flags["tls-cert"], flags["tls-key"]);
  const url = flags.url === undefined ? deriveUrl(address, tls !== undefined) : parseUrl("url", flags.url);
  if (flags.url === undefined && told !== null)
    console.error(
      `warning: no --url was given: ${told} are told ${url.origin}, which must reach this server from theirs`,
    );
  const warning = plainHttpWarning(url);
  if (warning) console.error(warning);
  return { address, tls, url, dataDir: flags.data ?? defaultDataDir() };
}

/** Resolves with SIGINT or SIGTERM. */
export function untilSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => resolve(signal));
  });
}

/** Runs what ends a server, but no longer than 2 s: what is still open then ends with the process. */
export async function endWithin(parts: (() => unknown)[], log: (line: string) => void): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, 2000);
  });
  const all = Promise.all(
    parts.map(async (part) => {
      try {
        await part();
      } catch (error) {
        log(`while stopping: ${(error as Error).message}`);
      }
    }),
  );
  await Promise.race([all, limit]);
  clearTimeout(timer);
}

/** Settings of the control server from what the flags say, and defaults. */
export function controlSettings(
  url: URL,
  baseDomain: string,
  derpMap: DERPMap,
  flags: { "ephemeral-timeout"?: number; policy?: string; "policy-mode"?: string },
): ControlSettings {
  const settings = defaultSettings(url.origin, baseDomain);
  const ephemeralTimeout = flags["ephemeral-timeout"];
  const mode = flags["policy-mode"] ?? "file";
  if (mode !== "file" && mode !== "database")
    throw new UsageError(
      `--policy-mode ${JSON.stringify(mode)} is no way to keep a policy: it is "file" or "database"`,
    );
  if (mode === "database" && flags.policy !== undefined)
    throw new UsageError(
      "--policy FILE goes with --policy-mode file: set a policy in the database by `weft policy set`",
    );
  return {
    ...settings,
    derp: { ...settings.derp, embedded: derpMap },
    node: { ...settings.node, ...(ephemeralTimeout !== undefined && { ephemeralTimeout }) },
    policy: { mode, path: flags.policy ?? "" },
  };
}

/** Problems of a running server go to standard error. */
export function logLine(line: string): void {
  process.stderr.write(`${new Date().toISOString()} ${line}\n`);
}

export function showAddress({ host, port }: Address): string {
  return formatAddrPort(parseIP(host)!, port);
}
