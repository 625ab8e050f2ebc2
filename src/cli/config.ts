// What a server is told to do: flags over environment over file over defaults, every mistake named with its place, all of them
// at once. The file has Headscale's keys (config-keys.ts); a server that is given none runs by its flags and defaults.

import { existsSync, readFileSync, statSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { isKnownToClients, recordProblem } from "../control/dns.ts";
import {
  type ControlSettings,
  type DnsProviderSettings,
  defaultSettings,
  type OidcSettings,
} from "../control/settings.ts";
import { parseTrustedProxies, type TrustedProxies } from "../net/client-address.ts";
import { readSecretFile } from "../net/keyfile.ts";
import type { LogFormat, LogLevel } from "../net/logger.ts";
import { parsePrefix, prefixContains } from "../wire/ip.ts";
import {
  FILES,
  IGNORED,
  KEYS,
  type KeyName,
  OIDC_KEYS,
  type OidcKeyName,
  type OidcValues,
  REMOVED,
  RENAMED,
  SECRETS,
  type Values,
} from "./config-keys.ts";
import { type Address, type Kind, showAddress, Wrong } from "./config-kinds.ts";
import { type KeyPath, parseSource, type Source } from "./config-source.ts";
import { nearest, UsageError } from "./flags.ts";

const DEFAULT_BASE_DOMAIN = "weft.internal";
/** Milliseconds for a record to show on every name server of its zone. */
const DNS_TIMEOUT = 120_000;
const DEFAULT_DATA_DIR = "/var/lib/weft";
const DEFAULT_ACME = "https://acme-v02.api.letsencrypt.org/directory";
/** Where a file is found without being named. Headscale's own folders are read only when they are. */
const DEFAULT_FILES = ["/etc/weft/config.yaml", "/etc/weft/config.json"];
const ENV_PREFIXES = ["WEFT_", "HEADSCALE_"];
/** Shortest time after which an absent ephemeral node may go: a keep-alive and a reconnect fit in. */
const MIN_EPHEMERAL = 65_000;

export type Env = Record<string, string | undefined>;

/** Values of the command line, by key; `flag` is for the messages. */
export type Overrides = { [K in KeyName]?: { flag: string; value: unknown } };

export interface TlsFiles {
  certPath: string;
  keyPath: string;
}

export interface AcmeSettings {
  directoryUrl: string;
  /** "" for none. */
  email: string;
  hostname: string;
  cacheDir: string;
  challenge: "HTTP-01" | "TLS-ALPN-01";
  /** Where HTTP-01 is answered. */
  listen: Address;
  /** PEM file with the roots of an ACME server of one's own; null: the usual ones. */
  caPath: string | null;
}

export interface RelayRegion {
  id: number;
  code: string;
  name: string;
  ipv4: string | null;
  ipv6: string | null;
}

export interface ServerConfig {
  /** The file that was read, or null. */
  file: string | null;
  settings: ControlSettings;
  url: URL;
  /** Nobody named the URL: it was made from the listening address. */
  isUrlDerived: boolean;
  listen: Address;
  metricsListen: Address | null;
  trustedProxies: TrustedProxies;
  /** Names by which browsers may call this server, besides that of `url`. */
  allowedHosts: readonly string[];
  tls: TlsFiles | AcmeSettings | null;
  dataDir: string;
  noiseKeyPath: string;
  adminSocket: { path: string; mode: number };
  relay: {
    /** Null: not said; the verb decides. */
    enabled: boolean | null;
    region: RelayRegion;
    verifyClients: boolean;
    /** Null: not said. */
    stun: Address | null;
    keyPath: string;
    isInMap: boolean;
  };
  log: { level: LogLevel; format: LogFormat };
  /** How the command line reaches a server elsewhere; `address` "" for the socket. */
  cli: { address: string; apiKey: string; timeout: number; insecure: boolean };
  /** Those that were read and that the configuration names, but for keys and state that the server makes itself. */
  files: readonly string[];
  /** What was set, by key, without secrets: for the debug page. */
  shown: Record<string, unknown>;
  /** For the operator, each one sentence. */
  warnings: string[];
}

export interface ConfigInput {
  /** `--config`: a file, or a folder with config.yaml or config.json in it. */
  config?: string | undefined;
  overrides?: Overrides;
  env?: Env;
}

/** Throws UsageError with all that is wrong. */
export function loadConfig(input: ConfigInput = {}): ServerConfig {
  const env = input.env ?? process.env;
  const file = findFile(input.config, env);
  const collected = new Collected(env, file);
  if (file !== null) collected.addFile(file);
  collected.addEnv();
  collected.addOverrides(input.overrides ?? {});
  const config = collected.build();
  if (collected.problems.length > 0) {
    const [only, ...more] = collected.problems;
    throw new UsageError(
      more.length === 0
        ? only!
        : `the configuration has ${more.length + 1} mistakes:\n  ${[only, ...more].join("\n  ")}`,
    );
  }
  return config;
}

/** The file that was asked for, or one of Weft's own places. Null: there is none. */
function findFile(named: string | undefined, env: Env): string | null {
  const asked = named ?? (env.WEFT_CONFIG || env.HEADSCALE_CONFIG || undefined);
  if (asked === undefined) return DEFAULT_FILES.find((path) => existsSync(path)) ?? null;
  const path = expandHome(asked);
  if (!existsSync(path)) throw new UsageError(`the configuration file ${path} does not exist`);
  if (!statSync(path).isDirectory()) return path;
  const inside = ["config.yaml", "config.json"].map((name) => join(path, name)).find((name) => existsSync(name));
  if (inside === undefined) throw new UsageError(`the folder ${path} has neither config.yaml nor config.json`);
  return inside;
}

function expandHome(path: string): string {
  return path.startsWith("~/") ? join(homedir(), path.slice(2)) : path;
}

type AnyKeys = Record<string, Kind<unknown>>;

class Collected {
  readonly problems: string[] = [];
  readonly warnings: string[] = [];
  private readonly values: Values = {};
  private readonly places = new Map<string, string>();
  private readonly providers: { values: OidcValues; at: (key: OidcKeyName) => string }[] = [];
  private readonly ignored: string[] = [];
  private readonly shown: Record<string, unknown> = {};
  private readonly files = new Map<string, string[]>();

  constructor(
    private readonly env: Env,
    private readonly file: string | null,
  ) {}

  // ---- sources ----

  addFile(file: string): void {
    let content: string;
    try {
      content = readFileSync(file, "utf8");
    } catch (error) {
      throw new UsageError(`the configuration file ${file} cannot be read: ${(error as Error).message}`);
    }
    const source = parseSource(file, content);
    const { oidc, ...rest } = source.value;
    this.walk(source, rest, [], KEYS, (key, value, place) => this.take(KEYS, this.values, key, value, place, file));
    this.addProviders(source, oidc, file);
    const isPublic = (statSync(file).mode & 0o007) !== 0;
    const secrets = SECRETS.filter((name) => Object.keys(this.shown).some((key) => key.endsWith(name)));
    if (isPublic && secrets.length > 0)
      this.warnings.push(
        `${file} holds secrets (${secrets.join(", ")}) and everybody on this machine may read it: chmod 0640, or keep them in files of their own`,
      );
  }

  addEnv(): void {
    for (const key of Object.keys(KEYS)) this.takeEnv(KEYS, this.values, key, key);
    const names = new Set(Object.keys(KEYS).map(envName));
    for (const provider of this.providers) {
      const { id } = provider.values;
      for (const key of Object.keys(OIDC_KEYS)) {
        const name = this.providers.length === 1 ? `oidc.${key}` : id === undefined ? null : `oidc.${id}.${key}`;
        if (name !== null) this.takeEnv(OIDC_KEYS, provider.values, key, name);
      }
    }
    if (this.providers.length === 0 && this.readEnv("oidc.issuer")) {
      const provider = { values: {} as OidcValues, at: (key: OidcKeyName) => `oidc.${key}` };
      for (const key of Object.keys(OIDC_KEYS)) this.takeEnv(OIDC_KEYS, provider.values, key, `oidc.${key}`);
      this.providers.push(provider);
    }
    for (const name of Object.keys(this.env)) {
      const prefix = ENV_PREFIXES.find((candidate) => name.startsWith(candidate));
      if (
        !prefix ||
        names.has(name.slice(prefix.length)) ||
        /^(CONFIG|DATA|DEBUG|PEERS|TEST|OIDC)(_|$)/.test(name.slice(prefix.length))
      )
        continue;
      const near = nearest(name.slice(prefix.length), [...names]);
      if (near !== null)
        this.warnings.push(`the environment variable ${name} means nothing: did you mean ${prefix}${near}?`);
    }
    if (this.env.WEFT_DATA && this.values.data_dir === undefined) this.values.data_dir = this.env.WEFT_DATA;
  }

  addOverrides(overrides: Overrides): void {
    for (const [key, override] of Object.entries(overrides))
      if (override.value !== undefined) this.take(KEYS, this.values, key, override.value, override.flag, null);
  }

  /** Goes down to the keys that are known; whatever else there is, is a mistake. */
  private walk(
    source: Source,
    object: Record<string, unknown>,
    above: KeyPath,
    keys: AnyKeys,
    take: (key: string, value: unknown, place: string) => void,
    base = above.length,
  ): void {
    for (const [name, value] of Object.entries(object)) {
      const path = [...above, name];
      const key = path.slice(base).join(".");
      const full = path.filter((step) => typeof step === "string").join(".");
      const place = source.place(path);
      const isGroup = Object.keys(keys).some((known) => known.startsWith(`${key}.`));
      if (Object.hasOwn(REMOVED, full)) {
        // Examples had such keys with the value that changes nothing.
        const isOff = value === false || value === null || value === "";
        const list = isOff ? this.warnings : this.problems;
        list.push(`${place}: ${full} has been removed: ${isOff ? "delete the line" : REMOVED[full]}`);
      } else if (IGNORED.some((pattern) => pattern.test(full))) this.ignored.push(full);
      else if (Object.hasOwn(RENAMED, full)) {
        this.warnings.push(`${place}: ${full} is called ${RENAMED[full]} now`);
        take(RENAMED[full]!, value, `${place}: ${full}`);
      } else if (Object.hasOwn(keys, key)) take(key, value, `${place}: ${full}`);
      else if (isGroup && value === null) continue;
      else if (isGroup && typeof value === "object" && !Array.isArray(value))
        this.walk(source, value as Record<string, unknown>, path, keys, take, base);
      else if (isGroup) this.problems.push(`${place}: ${full} must be keys and values`);
      else {
        const near = nearest(key, Object.keys(keys)) ?? nearestLeaf(name, Object.keys(keys));
        const prefix = full.slice(0, full.length - key.length);
        this.problems.push(`${place}: unknown key "${full}"${near ? `: did you mean "${prefix}${near}"?` : ""}`);
      }
    }
  }

  private addProviders(source: Source, oidc: unknown, file: string): void {
    if (oidc === undefined || oidc === null) return;
    const isList = Array.isArray(oidc);
    for (const [index, entry] of (isList ? oidc : [oidc]).entries()) {
      const above: KeyPath = isList ? ["oidc", index] : ["oidc"];
      if (typeof entry !== "object" || entry === null || Array.isArray(entry)) {
        this.problems.push(`${source.place(above)}: oidc must be keys and values, or a list of such`);
        continue;
      }
      const values: OidcValues = {};
      const at = (key: OidcKeyName) => `${source.place([...above, ...key.split(".")])}: oidc.${key}`;
      this.walk(source, entry as Record<string, unknown>, above, OIDC_KEYS, (key, value, place) =>
        this.take(OIDC_KEYS, values, key, value, place, file, isList ? `oidc.${index}.` : "oidc."),
      );
      // Packages of Headscale write the whole block with nothing in it that would name a provider.
      const says = ["issuer", "client_id", "client_secret", "client_secret_path", "client_secret_file"] as const;
      const isBlank = !isList && !this.readEnv("oidc.issuer") && says.every((key) => values[key] === undefined);
      if (Object.keys(values).length > 0 && !isBlank) this.providers.push({ values, at });
    }
  }

  private readEnv(key: string): { name: string; value: string } | null {
    for (const prefix of ENV_PREFIXES) {
      const name = prefix + envName(key);
      const value = this.env[name];
      if (value) return { name, value };
    }
    return null;
  }

  private takeEnv(keys: AnyKeys, into: object, key: string, name: string): void {
    const found = this.readEnv(name);
    if (found) this.take(keys, into, key, found.value, found.name, null);
  }

  /** Null and "" stand for what was not said. Paths in a file are relative to its folder. */
  private take(
    keys: AnyKeys,
    into: object,
    key: string,
    raw: unknown,
    place: string,
    file: string | null,
    prefix = "",
  ): void {
    const isUnset = raw === null || raw === "";
    if (isUnset && file === null) return;
    this.places.set(prefix + key, place);
    if (isUnset) return;
    const isSecret = SECRETS.includes(key);
    try {
      let value = keys[key]!(raw);
      if (/(_path|_dir|_file|\.path|\.paths|^unix_socket)$/.test(key))
        value = this.asPath(value as string | string[], file);
      (into as Record<string, unknown>)[key] = value;
      this.shown[prefix + key] = shownOf(key, value);
      if (FILES.includes(key)) this.files.set(prefix + key, [value].flat() as string[]);
    } catch (error) {
      if (!(error instanceof Wrong)) throw error;
      this.problems.push(`${place} ${isSecret ? "" : `${show(raw)} `}${error.message}`);
    }
  }

  private asPath(value: string | string[], file: string | null): string | string[] {
    if (Array.isArray(value)) return value.map((path) => this.asPath(path, file) as string);
    const expanded = expandHome(
      value.replace(/\$\{(\w+)\}|\$(\w+)/g, (_all, braced?: string, bare?: string) => {
        const name = braced ?? bare!;
        const found = this.env[name];
        if (!found) throw new Wrong(`names the environment variable ${name}, which is not set`);
        return found;
      }),
    );
    return file === null ? expanded : resolve(dirname(file), expanded);
  }

  // ---- meaning ----

  build(): ServerConfig {
    const v = this.values;
    const dataDir = v.data_dir ?? DEFAULT_DATA_DIR;
    const listen = v.listen_addr ?? { host: "127.0.0.1", port: 8080 };
    const tls = this.tls(dataDir);
    const url = v.server_url ?? this.deriveUrl(listen, tls);
    const noiseKeyPath = v["noise.private_key_path"] ?? join(dataDir, "noise_private.key");
    const keyPath = v["derp.server.private_key_path"] ?? join(dataDir, "derp_private.key");
    if (noiseKeyPath === keyPath)
      this.problem("derp.server.private_key_path", "must be another file than noise.private_key_path");
    if (this.ignored.length > 0)
      this.warnings.push(
        `these keys are for Headscale's own machinery and have no effect here: ${this.ignored.join(", ")}`,
      );
    return {
      file: this.file,
      settings: this.settings(url),
      url,
      isUrlDerived: v.server_url === undefined && !(tls && "hostname" in tls),
      listen,
      metricsListen: v.metrics_listen_addr ?? null,
      trustedProxies: this.trustedProxies(),
      allowedHosts: v.allowed_hosts ?? [],
      tls,
      dataDir,
      noiseKeyPath,
      adminSocket: { path: v.unix_socket ?? join(dataDir, "weft.sock"), mode: v.unix_socket_permission ?? 0o600 },
      relay: {
        enabled: v["derp.server.enabled"] ?? null,
        region: {
          id: v["derp.server.region_id"] ?? 999,
          code: v["derp.server.region_code"] ?? "weft",
          name: v["derp.server.region_name"] ?? "Weft relay",
          ipv4: v["derp.server.ipv4"] ?? null,
          ipv6: v["derp.server.ipv6"] ?? null,
        },
        verifyClients: v["derp.server.verify_clients"] ?? true,
        stun: v["derp.server.stun_listen_addr"] ?? null,
        keyPath,
        isInMap: v["derp.server.automatically_add_embedded_derp_region"] ?? true,
      },
      log: { level: v["log.level"] ?? "info", format: v["log.format"] ?? "text" },
      cli: {
        address: v["cli.address"] ?? "",
        apiKey: this.secret("cli.api_key", v["cli.api_key"], v["cli.api_key_file"]),
        timeout: v["cli.timeout"] ?? 5_000,
        insecure: v["cli.insecure"] ?? false,
      },
      files: [this.file ?? [], ...this.files.values()].flat(),
      shown: this.shown,
      warnings: this.warnings,
    };
  }

  private settings(url: URL): ControlSettings {
    const v = this.values;
    const defaults = defaultSettings(url.origin, v["dns.base_domain"] ?? DEFAULT_BASE_DOMAIN);
    this.checkBaseDomain(defaults.baseDomain, url);
    return {
      ...defaults,
      prefixes: this.prefixes(defaults),
      node: this.node(defaults),
      preAuthKeys: {
        revokedRetention: v["preauth_keys.revoked_retention"] ?? defaults.preAuthKeys.revokedRetention,
      },
      policy: this.policy(),
      dns: this.dns(),
      derp: {
        urls: v["derp.urls"] ?? [],
        paths: v["derp.paths"] ?? [],
        refreshEvery:
          v["derp.auto_update_enabled"] === false ? null : (v["derp.update_frequency"] ?? defaults.derp.refreshEvery),
        embedded: null,
      },
      oidc: this.oidc(),
      login: {
        expiry: v["tuning.register_cache_expiration"] ?? defaults.login.expiry,
        maxPending: v["tuning.register_cache_max_entries"] ?? defaults.login.maxPending,
      },
      store: this.store(),
      taildrop: v["taildrop.enabled"] ?? defaults.taildrop,
      autoUpdate: v["auto_update.enabled"] ?? defaults.autoUpdate,
      logtail: v["logtail.enabled"] ?? defaults.logtail,
      clients: this.clients(),
      geoip: { path: v["geoip.path"] ?? "" },
    };
  }

  private clients(): ControlSettings["clients"] {
    const latestVersion = this.values["clients.latest_version"] ?? "";
    for (const key of ["clients.urgent_below", "clients.update_url"] as const)
      if (this.values[key] !== undefined && latestVersion === "") this.problem(key, "needs clients.latest_version");
    return {
      latestVersion,
      urgentBelow: this.values["clients.urgent_below"] ?? "",
      updateUrl: this.values["clients.update_url"] ?? "",
    };
  }

  private problem(key: KeyName, sentence: string): void {
    this.problems.push(`${this.places.get(key) ?? key} ${sentence}`);
  }

  private deriveUrl(listen: Address, tls: TlsFiles | AcmeSettings | null): URL {
    if (tls && "hostname" in tls) return new URL(`https://${tls.hostname}`);
    const isWildcard = listen.host === "0.0.0.0" || listen.host === "::";
    return new URL(
      `${tls ? "https" : "http"}://${showAddress({ ...listen, host: isWildcard ? "127.0.0.1" : listen.host })}`,
    );
  }

  private checkBaseDomain(domain: string, url: URL): void {
    if (url.hostname !== domain && !url.hostname.endsWith(`.${domain}`)) return;
    this.problem(
      "dns.base_domain",
      `${domain} contains ${url.hostname}, where this server is found: clients could not resolve it any more; choose another domain`,
    );
  }

  private prefixes(defaults: ControlSettings): ControlSettings["prefixes"] {
    const { "prefixes.v4": v4, "prefixes.v6": v6, "prefixes.allocation": allocation } = this.values;
    const isNamed = this.places.has("prefixes.v4") || this.places.has("prefixes.v6");
    if (isNamed && v4 === undefined && v6 === undefined && this.problems.length === 0)
      this.problem("prefixes.v4", "and prefixes.v6 are both empty: nodes need addresses of one family at least");
    for (const [key, given] of [
      ["v4", v4],
      ["v6", v6],
    ] as const) {
      const block = parsePrefix(defaults.prefixes[key]!)!;
      const prefix = given === undefined ? null : parsePrefix(given);
      if (prefix && (prefix.bits < block.bits || !prefixContains(block, prefix.ip)))
        this.warnings.push(
          `${this.places.get(`prefixes.${key}`)} ${given} is outside ${defaults.prefixes[key]}: official clients do not support other addresses`,
        );
    }
    const found = isNamed ? { v4: v4 ?? null, v6: v6 ?? null } : { v4: defaults.prefixes.v4, v6: defaults.prefixes.v6 };
    return { ...found, allocation: allocation ?? "sequential" };
  }

  private node(defaults: ControlSettings): ControlSettings["node"] {
    const v = this.values;
    const ephemeralTimeout = v["node.ephemeral.inactivity_timeout"] ?? defaults.node.ephemeralTimeout;
    const interval = v["node.routes.ha.probe_interval"] ?? defaults.node.routes.probeInterval!;
    const probeTimeout = v["node.routes.ha.probe_timeout"] ?? defaults.node.routes.probeTimeout;
    // Who says so at the prompt wants to see it happen.
    const isFlag = this.places.get("node.ephemeral.inactivity_timeout")?.startsWith("--");
    if (!isFlag && ephemeralTimeout <= MIN_EPHEMERAL)
      this.problem(
        "node.ephemeral.inactivity_timeout",
        "must be longer than 65s: a node that only reconnects would be deleted",
      );
    if (interval !== 0 && interval < 2_000)
      this.problem("node.routes.ha.probe_interval", "must be 0 (no probes) or at least 2s");
    if (interval !== 0 && (probeTimeout < 1_000 || probeTimeout >= interval))
      this.problem(
        "node.routes.ha.probe_timeout",
        "must be at least 1s and shorter than node.routes.ha.probe_interval",
      );
    return {
      expiry: v["node.expiry"] || null,
      ephemeralTimeout,
      needsApproval: v["node.needs_approval"] ?? false,
      routes: { probeInterval: interval || null, probeTimeout },
    };
  }

  private policy(): ControlSettings["policy"] {
    const mode = this.values["policy.mode"] ?? "file";
    const path = this.values["policy.path"] ?? "";
    if (mode === "file" || path === "") return { mode, path };
    this.warnings.push(
      `${this.places.get("policy.path")} is not read, because policy.mode is database: set a policy by \`weft policy set\``,
    );
    this.files.delete("policy.path");
    return { mode, path: "" };
  }

  private dns(): ControlSettings["dns"] {
    const v = this.values;
    const nameservers = v["dns.nameservers.global"] ?? [];
    if (v["dns.override_local_dns"] && nameservers.length === 0)
      this.problem(
        "dns.override_local_dns",
        "needs dns.nameservers.global: there is nothing to replace the local servers",
      );
    for (const key of ["dns.nameservers.global", "dns.nameservers.split"] as const)
      for (const server of Object.values(v[key] ?? {}).flat())
        if (!isKnownToClients(server))
          this.warnings.push(
            `${this.places.get(key)} ${server} is no DNS-over-HTTPS service that official clients know: they resolve nothing by it; name its address in place of the URL`,
          );
    if (v["dns.extra_records"]?.length && v["dns.extra_records_path"])
      this.problem("dns.extra_records_path", "and dns.extra_records exclude each other: keep the records in one place");
    for (const record of v["dns.extra_records"] ?? []) {
      const problem = recordProblem(record);
      if (problem) this.problem("dns.extra_records", `has an ${problem}`);
    }
    return {
      magicDns: v["dns.magic_dns"] ?? true,
      overrideLocalDns: v["dns.override_local_dns"] ?? nameservers.length > 0,
      nameservers,
      split: v["dns.nameservers.split"] ?? {},
      searchDomains: v["dns.search_domains"] ?? [],
      extraRecords: v["dns.extra_records"] ?? [],
      extraRecordsPath: v["dns.extra_records_path"] ?? "",
      useWithExitNode: v["dns.nameservers.use_with_exit_node"] ?? [],
      certificates: this.certificates(),
    };
  }

  private certificates(): DnsProviderSettings | null {
    const v = this.values;
    const provider = v["dns.certificates.provider"];
    if (provider === undefined) return null;
    const common = {
      resolvers: v["dns.certificates.resolvers"] ?? [],
      timeout: v["dns.certificates.timeout"] ?? DNS_TIMEOUT,
    };
    if (provider === "exec") {
      const command = v["dns.certificates.command"] ?? [];
      if (command.length === 0)
        this.problem("dns.certificates.command", "is needed with dns.certificates.provider exec");
      return { kind: "exec", command, ...common };
    }
    const server = v["dns.certificates.server"] ?? "";
    if (server === "") this.problem("dns.certificates.server", "is needed with dns.certificates.provider rfc2136");
    const { "dns.certificates.tsig_secret": inline, "dns.certificates.tsig_secret_file": file } = v;
    const name = v["dns.certificates.tsig_name"] ?? "";
    const secret = this.secret("dns.certificates.tsig_secret", inline, file);
    if ((name === "") !== (secret === ""))
      this.problem("dns.certificates.tsig_name", "and its secret belong together: give both, or neither");
    const algorithm = v["dns.certificates.tsig_algorithm"] ?? "hmac-sha256";
    return {
      kind: "rfc2136",
      server,
      zone: v["dns.certificates.zone"] ?? v["dns.base_domain"] ?? DEFAULT_BASE_DOMAIN,
      tsig: name === "" ? null : { name, algorithm, secret },
      ...common,
    };
  }

  private store(): ControlSettings["store"] {
    const v = this.values;
    if (v["database.type"] !== "postgres") return { type: "sqlite", path: v["database.sqlite.path"] ?? "" };
    for (const key of ["database.postgres.host", "database.postgres.name", "database.postgres.user"] as const)
      if (v[key] === undefined && !this.problems.length) this.problem(key, "is needed with database.type postgres");
    return {
      type: "postgres",
      host: v["database.postgres.host"] ?? "",
      port: v["database.postgres.port"] ?? 5432,
      database: v["database.postgres.name"] ?? "",
      user: v["database.postgres.user"] ?? "",
      password: this.secret("database.postgres.pass", v["database.postgres.pass"], v["database.postgres.pass_file"]),
      ssl: v["database.postgres.ssl"] ?? "disable",
    };
  }

  private oidc(): OidcSettings[] {
    const ids = new Set<string>();
    const issuers: string[] = [];
    return this.providers.map(({ values: v, at }) => {
      const need = (key: OidcKeyName) => {
        if (!v[key] && !this.problems.some((line) => line.startsWith(`${at(key)} `)))
          this.problems.push(`${at(key)} is needed`);
        return (v[key] as string | undefined) ?? "";
      };
      const id = v.id ?? "oidc";
      if (!/^[a-z0-9][a-z0-9-]{0,31}$/.test(id))
        this.problems.push(`${at("id")} ${show(id)} must be of a-z, 0-9 and "-"`);
      if (ids.has(id)) this.problems.push(`${at("id")} ${show(id)} is taken: each provider needs an id of its own`);
      ids.add(id);
      const secretFile = v.client_secret_path ?? v.client_secret_file;
      const clientSecret = this.secret(at("client_secret"), v.client_secret, secretFile);
      const issuer = need("issuer");
      const path = `${issuer.replace(/\/+$/, "")}/`;
      const other = issuers.find((known) => known !== path && (known.startsWith(path) || path.startsWith(known)));
      // A user is known by issuer and subject, written one behind the other.
      if (issuer !== "" && other !== undefined)
        this.problems.push(
          `${at("issuer")} ${show(issuer)} and ${show(other)} begin alike: users of one could pass for the other's, so keep one of them`,
        );
      issuers.push(path);
      return {
        id,
        name: v.name ?? (URL.canParse(issuer) ? new URL(issuer).hostname : id),
        issuer,
        clientId: need("client_id"),
        clientSecret,
        onlyStartIfAvailable: v.only_start_if_oidc_is_available ?? true,
        useExpiryFromToken: v.use_expiry_from_token ?? false,
        scope: v.scope ?? ["openid", "profile", "email"],
        emailVerifiedRequired: v.email_verified_required ?? true,
        extraParams: v.extra_params ?? {},
        allowedDomains: v.allowed_domains ?? [],
        allowedUsers: v.allowed_users ?? [],
        allowedGroups: v.allowed_groups ?? [],
        pkce: v["pkce.enabled"] ? (v["pkce.method"] ?? "S256") : "off",
        groupsClaim: v.groups_claim ?? "groups",
        // An id has no "/": no provider can name a group of another.
        groupsPrefix: (v.groups_prefixed ?? this.providers.length > 1) ? `${id}/` : "",
        roles: v.roles ?? {},
      };
    });
  }

  /** A secret stands in the configuration, or in a file that others cannot read; not in both. "" for none. */
  private secret(place: string, inline: string | undefined, file: string | undefined): string {
    if (file === undefined) return inline ?? "";
    if (inline !== undefined) this.problems.push(`${place} is given twice, as it is and as a file: keep one of them`);
    try {
      return readSecretFile(file);
    } catch (error) {
      this.problems.push(`${place}: ${(error as Error).message}`);
      return "";
    }
  }

  private tls(dataDir: string): TlsFiles | AcmeSettings | null {
    const v = this.values;
    const { tls_cert_path: certPath, tls_key_path: keyPath, tls_letsencrypt_hostname: hostname } = v;
    if ((certPath === undefined) !== (keyPath === undefined)) {
      const given = certPath === undefined ? "tls_key_path" : "tls_cert_path";
      this.problem(given, "is alone: --tls-cert and --tls-key go together, as tls_cert_path and tls_key_path do");
    }
    if (hostname !== undefined) {
      if (certPath !== undefined)
        this.problem(
          "tls_letsencrypt_hostname",
          "and tls_cert_path exclude each other: certificates come from one place",
        );
      if (v.tls_letsencrypt_challenge_type === "TLS-ALPN-01" && v.listen_addr?.port !== 443)
        this.warnings.push(
          `${this.places.get("tls_letsencrypt_challenge_type")} TLS-ALPN-01 is asked for at port 443: lead that port to listen_addr`,
        );
      return {
        directoryUrl: v.acme_url ?? DEFAULT_ACME,
        email: v.acme_email ?? "",
        hostname,
        cacheDir: v.tls_letsencrypt_cache_dir ?? join(dataDir, "acme"),
        challenge: v.tls_letsencrypt_challenge_type ?? "HTTP-01",
        listen: v.tls_letsencrypt_listen ?? { host: "::", port: 80 },
        caPath: v.acme_ca_path ?? null,
      };
    }
    return certPath !== undefined && keyPath !== undefined ? { certPath, keyPath } : null;
  }

  private trustedProxies(): TrustedProxies {
    try {
      return parseTrustedProxies(this.values.trusted_proxies ?? []);
    } catch (error) {
      this.problem("trusted_proxies", `cannot be used: ${(error as Error).message}`);
      return [];
    }
  }
}

/** Without what only the server must know. */
function shownOf(key: string, value: unknown): unknown {
  if (SECRETS.includes(key)) return "***";
  if (value instanceof URL) return value.origin;
  // Its arguments may be credentials of the name server.
  if (key === "dns.certificates.command") return (value as string[]).map((word, i) => (i === 0 ? word : "***"));
  if (Array.isArray(value)) return value.map((item) => shownOf("", item));
  return typeof value === "string" ? value.replace(/:\/\/[^/?#]*@/, "://***@") : value;
}

function envName(key: string): string {
  return key.replaceAll(/[.-]/g, "_").toUpperCase();
}

/** "magic_dns" at the top level is meant as "dns.magic_dns". */
function nearestLeaf(name: string, keys: string[]): string | null {
  const near = nearest(
    name,
    keys.map((key) => key.split(".").at(-1)!),
  );
  return near === null ? null : keys.find((key) => key.split(".").at(-1) === near)!;
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}
