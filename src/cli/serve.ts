// What box, control and relay share: flags that override the configuration, the listener with its certificate, metrics on a
// listener of their own, reloads on SIGHUP, and an orderly end on a signal.
import { mkdirSync, readFileSync } from "node:fs";
import { isIP } from "node:net";
import { dirname } from "node:path";
import { Hono } from "hono";
import { releaseProgramCode } from "../../ffi/process.ts";
import { AcmeCertificates } from "../net/acme.ts";
import { hostGuard, securityHeaders } from "../net/guards.ts";
import { type Certificate, type Listener, listen, type UpgradeHandler } from "../net/listener.ts";
import { createLogger, type Logger } from "../net/logger.ts";
import { isPrivate } from "../wire/private.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import { loadConfig, type Overrides, type RelayRegion, type ServerConfig } from "./config.ts";
import { type Address, origin, showAddress } from "./config-kinds.ts";
import { UsageError } from "./flags.ts";
import { readTls, TlsWatch, withMetaCertificate } from "./tls.ts";

export const STUN_PORT = 3478;
/** Milliseconds after the start at which memory and code that only the start needed are given back. */
const SETTLED_MS = 2000;
/** 900 to 999 are for custom regions. */
const REGION: RelayRegion = { id: 999, code: "weft", name: "Weft relay", ipv4: null, ipv6: null };

/** What box, control and relay have in common on their command lines. */
export const SERVER_FLAGS = {
  config: { kind: "string", short: "c" },
  data: "string",
  listen: "string",
  url: "string",
  "tls-cert": "string",
  "tls-key": "string",
  "metrics-listen": "string",
  "trusted-proxies": "string",
  "log-level": "string",
  "log-format": "string",
  help: { kind: "boolean", short: "h" },
} as const;

/** And box and control alone. */
export const CONTROL_FLAGS = {
  "base-domain": "string",
  policy: "string",
  "policy-mode": "string",
  "ephemeral-timeout": "string",
} as const;

export const SERVER_USAGE = `  -c, --config FILE    configuration with Headscale's keys (default $WEFT_CONFIG, $HEADSCALE_CONFIG, or
                       /etc/weft/config.yaml if it is there); flags win over environment over file
  --data DIR           data folder, made with mode 0700 (default $WEFT_DATA or /var/lib/weft)
  --listen IP:PORT     where to listen (default 127.0.0.1:8080)
  --url URL            where clients find this server, for example https://weft.example.com
  --tls-cert FILE      certificate chain in PEM; with --tls-key the port speaks TLS
  --tls-key FILE       its private key in PEM
  --metrics-listen IP:PORT
                       metrics for Prometheus and the debug page (default: nowhere)
  --trusted-proxies CIDR,...
                       proxies whose X-Forwarded-For is believed (default: none)
  --log-level LEVEL    disabled, panic, fatal, error, warn, info (default), debug or trace
  --log-format FORMAT  text (default) or json`;

export const CONTROL_USAGE = `  --base-domain NAME   suffix of node names in MagicDNS (default weft.internal)
  --policy FILE        who may reach whom, in HuJSON; read again on SIGHUP (default: all may reach all)
  --policy-mode MODE   file (default), or database: the policy is set by \`weft policy set\` and by the API
  --ephemeral-timeout DURATION
                       ephemeral nodes are deleted after this time offline (default 30m)`;

/** Flags by the keys that they override. */
const FLAG_KEYS = {
  data: "data_dir",
  listen: "listen_addr",
  url: "server_url",
  "tls-cert": "tls_cert_path",
  "tls-key": "tls_key_path",
  "metrics-listen": "metrics_listen_addr",
  "trusted-proxies": "trusted_proxies",
  "log-level": "log.level",
  "log-format": "log.format",
  "base-domain": "dns.base_domain",
  policy: "policy.path",
  "policy-mode": "policy.mode",
  "ephemeral-timeout": "node.ephemeral.inactivity_timeout",
  stun: "derp.server.stun_listen_addr",
} as const;
type ServerFlags = { [F in keyof typeof FLAG_KEYS | "config"]?: string };

/** The configuration with these flags. Throws UsageError. */
export function configOf(flags: ServerFlags): ServerConfig {
  const overrides: Overrides = {};
  for (const [flag, key] of Object.entries(FLAG_KEYS)) {
    const value = flags[flag as keyof typeof FLAG_KEYS];
    // "off" is no address, but the word for none.
    if (value !== undefined && !(flag === "stun" && value === "off")) overrides[key] = { flag: `--${flag}`, value };
  }
  return loadConfig({ config: flags.config, overrides });
}

/** Where STUN is answered: by flag, by configuration, or on the STUN port of the listening address. Null: nowhere. */
export function stunOf(flags: { stun?: string }, config: ServerConfig): Address | null {
  return flags.stun === "off" ? null : (config.relay.stun ?? { host: config.listen.host, port: STUN_PORT });
}

/** A URL of scheme, host and port alone. Throws UsageError. */
export function parseUrl(flag: string, text: string): URL {
  try {
    return origin(text);
  } catch (error) {
    throw new UsageError(`--${flag} ${JSON.stringify(text)} ${(error as Error).message}`);
  }
}

/** The DERP map with the one relay that answers at `url`. `stunPort` null: it has no STUN. */
export function derpMapOf(url: URL, stunPort: number | null, region: RelayRegion = REGION): DERPMap {
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const family = isIP(host);
  const isPlain = url.protocol === "http:";
  const port = url.port ? Number(url.port) : isPlain ? 80 : 443;
  return {
    Regions: {
      [region.id]: {
        RegionID: region.id,
        RegionCode: region.code,
        RegionName: region.name,
        Nodes: [
          {
            Name: `${region.id}a`,
            RegionID: region.id,
            HostName: host,
            ...(family === 4 && { IPv4: host, IPv6: "none" }),
            ...(family === 6 && { IPv4: "none", IPv6: host }),
            ...(region.ipv4 && { IPv4: region.ipv4 }),
            ...(region.ipv6 && { IPv6: region.ipv6 }),
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

/** What to tell an operator who offers plain HTTP on a public name; null when the URL is fine. */
function plainHttpWarning(url: URL): string | null {
  if (url.protocol !== "http:") return null;
  const host = url.hostname.replace(/^\[|\]$/g, "");
  if (host === "localhost" || isPrivate(host)) return null;
  return [
    `${url.origin} is plain HTTP on a public name. Traffic between nodes stays end-to-end encrypted, but whoever sits on the way`,
    "of a connection can answer /key with a key of his own and so pose as this control server to a node that joins (and take its",
    "pre-auth key), can replay a node's login to the relay (and take its place there, so that packets for it are lost), and sees",
    "who talks to whom. Official clients speak nothing but TLS to relays. Set tls_letsencrypt_hostname, or start with",
    `--url https://${url.hostname} --tls-cert FILE --tls-key FILE, or put a TLS proxy in front that passes upgrades on`,
  ].join(" ");
}

/** What a verb makes of its parts for the listener. */
export interface Parts {
  app: Hono;
  upgrades: Record<string, UpgradeHandler>;
  /** The relay's key, for official clients that look for it behind the certificate. */
  relayPublicKey?: Uint8Array;
  /** On the metrics listener. */
  metrics: Hono;
  /** On SIGHUP. */
  reload?: () => void;
  /** For the line that says that all is ready. */
  about: string;
}

/** Paths that programs ask for, by whatever name they know this server; they hold nothing for a browser. */
const MACHINE_PATHS = [
  "/key",
  "/ts2021",
  "/machine",
  "/derp",
  "/verify",
  "/generate_204",
  "/bootstrap-dns",
  "/health",
  "/version",
  "/robots.txt",
  "/api",
];

/**
 * Makes the parts, serves them until a signal and ends them in order. `make` adds to `cleanups` whatever it has started, so
 * that a failure half-way ends it, too. `told`: who is told the URL; null for nobody.
 */
export async function runServer(
  verb: string,
  config: ServerConfig,
  told: string | null,
  make: (log: Logger, cleanups: (() => unknown)[]) => Promise<Parts>,
): Promise<number> {
  const log = createLogger(config.log);
  if (config.isUrlDerived && told !== null)
    log.warn(`no --url was given: ${told} are told ${config.url.origin}, which must reach this server from theirs`);
  const warning = plainHttpWarning(config.url);
  for (const text of [...config.warnings, ...(warning ? [warning] : [])]) log.warn(text);

  // Before anything is made that would have to be undone.
  if (config.tls && "certPath" in config.tls) readTls(config.tls);

  // A signal during the start counts as well.
  const signal = untilSignal();
  const cleanups: (() => unknown)[] = [];
  const reloads: (() => void)[] = [];
  const hangUp = () => {
    for (const reload of reloads) reload();
  };
  process.on("SIGHUP", hangUp);
  cleanups.push(() => process.off("SIGHUP", hangUp));
  try {
    const parts = await make(log, cleanups);
    if (parts.reload) reloads.push(parts.reload);
    const listener = await listenWithTls(config, parts, log, cleanups, reloads);
    if (config.metricsListen) {
      const metricsApp = new Hono();
      metricsApp.use(securityHeaders, hostGuard([config.url.hostname, ...config.allowedHosts], ["/metrics"]));
      metricsApp.route("/", parts.metrics);
      const metrics = await listen({ ...config.metricsListen, app: metricsApp, upgrades: {}, log });
      cleanups.push(() => metrics.close());
      log.info(`metrics on http://${showAddress(metrics)}/metrics`);
    }
    console.log(
      `${verb} ready: ${config.url.origin}, listening on ${showAddress(listener)}${parts.about}, data in ${config.dataDir}`,
    );
    const settled = setTimeout(() => {
      Bun.gc(true);
      releaseProgramCode();
    }, SETTLED_MS);
    cleanups.push(() => clearTimeout(settled));
    await signal;
  } finally {
    await endWithin(cleanups, log);
  }
  return 0;
}

/** The folder of a socket or key that is not in the data folder. */
export function makeFolderOf(path: string): void {
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o750 });
  } catch (error) {
    throw new Error(`the folder of ${path} cannot be made: ${(error as Error).message}`);
  }
}

async function listenWithTls(
  config: ServerConfig,
  parts: Parts,
  log: Logger,
  cleanups: (() => unknown)[],
  reloads: (() => void)[],
): Promise<Listener> {
  const { tls, url, listen: at, trustedProxies } = config;
  const app = new Hono();
  app.use(securityHeaders, hostGuard([url.hostname, ...config.allowedHosts], MACHINE_PATHS));
  app.route("/", parts.app);
  const { relayPublicKey } = parts;
  const dress = (certificate: Certificate) =>
    relayPublicKey ? withMetaCertificate(certificate, relayPublicKey) : certificate;
  const options = { ...at, app, upgrades: parts.upgrades, trustedProxies, log };
  if (tls === null) return kept(await listen(options), cleanups);
  if ("certPath" in tls) {
    const listener = kept(await listen({ ...options, tls: dress(readTls(tls)) }), cleanups);
    const watch = new TlsWatch(tls, (certificate) => listener.setCertificate(dress(certificate)), log);
    cleanups.push(() => watch.close());
    reloads.push(() => watch.reload());
    return listener;
  }
  const acme = new AcmeCertificates({
    ...tls,
    ...(tls.caPath !== null && { ca: readFileSync(tls.caPath, "utf8") }),
    log,
    now: Date.now,
  });
  cleanups.push(() => acme.close());
  const first = await acme.current();
  const listener = kept(
    await listen({ ...options, tls: dress(first), challenge: (name) => acme.challengeFor(name) }),
    cleanups,
  );
  if (tls.challenge === "HTTP-01") kept(await listen({ ...tls.listen, app: acme.app, upgrades: {}, log }), cleanups);
  await acme.start((certificate) => listener.setCertificate(dress(certificate)));
  return listener;
}

function kept(listener: Listener, cleanups: (() => unknown)[]): Listener {
  cleanups.push(() => listener.close());
  return listener;
}

/** Resolves with one of the signals that end a server. */
function untilSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    for (const signal of ["SIGINT", "SIGTERM", "SIGQUIT"] as const) process.once(signal, () => resolve(signal));
  });
}

/** Runs what ends a server, but no longer than 2 s: what is still open then ends with the process. */
async function endWithin(parts: (() => unknown)[], log: Logger): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, 2000);
  });
  const all = Promise.all(
    parts.map(async (part) => {
      try {
        await part();
      } catch (error) {
        log.error(`while stopping: ${(error as Error).message}`);
      }
    }),
  );
  await Promise.race([all, limit]);
  clearTimeout(timer);
}
