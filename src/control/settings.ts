// What an operator may choose of the control server, in memory: names, units and defaults follow Headscale's configuration
// keys (spec/headscale-features.md, section 2), times are milliseconds. `cli/config.ts` makes it from YAML, environment and
// flags; nothing here reads a file.
import type { DERPMap } from "../wire/tailcfg.ts";
import type { Millis } from "./model.ts";
import type { Role } from "./policy/types.ts";
import type { PostgresSettings } from "./store-postgres.ts";

/** One identity provider. Several may stand side by side: the login page then asks which. */
export interface OidcSettings {
  /** Part of the callback's path and of the page; unique. "oidc" for the only one. */
  id: string;
  /** What the login page calls it. */
  name: string;
  issuer: string;
  clientId: string;
  clientSecret: string;
  /** False: when the provider does not answer at start, nodes are approved by command line until it does. */
  onlyStartIfAvailable: boolean;
  /** The node key expires with the id token. */
  useExpiryFromToken: boolean;
  scope: readonly string[];
  emailVerifiedRequired: boolean;
  /** Further parameters of the authorization request. */
  extraParams: Readonly<Record<string, string>>;
  /** Each list that is not empty must be passed. */
  allowedDomains: readonly string[];
  allowedUsers: readonly string[];
  allowedGroups: readonly string[];
  pkce: "off" | "S256" | "plain";
  /** Claim that lists the user's groups. */
  groupsClaim: string;
  /** What stands before a group of this provider in the policy: "x/" makes its "admins" `group:x/admins`. */
  groupsPrefix: string;
  /** Groups that give a role, at each login. Empty: administrators give roles. */
  roles: Readonly<Partial<Record<Role, readonly string[]>>>;
}

export interface DnsSettings {
  magicDns: boolean;
  overrideLocalDns: boolean;
  /** IP addresses or DoH URLs. */
  nameservers: readonly string[];
  /** By suffix. */
  split: Readonly<Record<string, readonly string[]>>;
  searchDomains: readonly string[];
  extraRecords: readonly ExtraRecord[];
  /** JSON file with an array of records, read again whenever it changes; "" for none. */
  extraRecordsPath: string;
  /** Those of the nameservers, split ones too, that a client keeps using while an exit node has its traffic. */
  useWithExitNode: readonly string[];
  /** Where the records for the certificates of nodes are set; null: nodes get none. */
  certificates: DnsProviderSettings | null;
}

/** Sets TXT records for ACME's DNS-01 challenge of nodes' names. */
export type DnsProviderSettings = (
  | {
      kind: "rfc2136";
      /** The primary name server, "192.0.2.53:53". */
      server: string;
      /** The zone that holds the names; usually the base domain. */
      zone: string;
      /** `secret` is Base64. Null: the server knows this one by its address. */
      tsig: { name: string; algorithm: "hmac-sha256" | "hmac-sha384" | "hmac-sha512"; secret: string } | null;
    }
  | {
      kind: "exec";
      /** Program and arguments; the name and value of the record follow. */
      command: readonly string[];
    }
) & {
  /** Name servers that must show a record before a node is told that it is there, "192.0.2.53:53". Empty: `server`, or those of the zone. */
  resolvers: readonly string[];
  /** How long that may take. */
  timeout: Millis;
};

export interface ExtraRecord {
  name: string;
  /** "A", "AAAA", and whatever else clients take; "" means by the value. */
  type: string;
  value: string;
}

export interface DerpSettings {
  /** Maps to fetch by HTTP. */
  urls: readonly string[];
  /** Files, YAML or JSON. */
  paths: readonly string[];
  /** Null: never again after the start. */
  refreshEvery: Millis | null;
  /** The region of the relay in this process; null: there is none, or the operator lists it in `paths`. Wins over others. */
  embedded: DERPMap | null;
}

/** Of official clients. */
export interface ClientSettings {
  /** "1.102.5": older ones show that there is an update. "" for nothing known: clients are told nothing. */
  latestVersion: string;
  /** Older ones call the update a matter of security. */
  urgentBelow: string;
  /** Where an update is to be had: with it, desktop clients show a notification. */
  updateUrl: string;
}

export interface ControlSettings {
  /** Where clients find this server: http or https, without a path. */
  serverUrl: string;
  /** MagicDNS suffix, without dots at the ends. */
  baseDomain: string;
  prefixes: {
    /** Null: no addresses of that family. One of both at least. */
    v4: string | null;
    v6: string | null;
    allocation: "sequential" | "random";
  };
  node: {
    /** Of the key of nodes that belong to a user, unless the client asks for another; null: none. */
    expiry: Millis | null;
    ephemeralTimeout: Millis;
    /** New nodes wait for an administrator. */
    needsApproval: boolean;
    routes: {
      /** Null: routers are not probed. */
      probeInterval: Millis | null;
      probeTimeout: Millis;
    };
  };
  preAuthKeys: { revokedRetention: Millis };
  policy: {
    /** "file": from `path`, read again on SIGHUP. "database": by command line and API, with history. */
    mode: "file" | "database";
    /** "" for none: everybody reaches everybody. */
    path: string;
  };
  dns: DnsSettings;
  derp: DerpSettings;
  oidc: readonly OidcSettings[];
  login: {
    /** Of a login that waits for its user. */
    expiry: Millis;
    maxPending: number;
  };
  /** `path` "" for weft.sqlite in the data folder. */
  store: { type: "sqlite"; path: string } | PostgresSettings;
  taildrop: boolean;
  autoUpdate: boolean;
  /** Whether clients may send their logs to their maker. */
  logtail: boolean;
  clients: ClientSettings;
  /** A table of the countries of addresses, for postures ("ip:country"): geoip.ts. `path` "" for none. */
  geoip: { path: string };
}

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;

/** What holds where an operator says nothing. */
export function defaultSettings(serverUrl: string, baseDomain: string): ControlSettings {
  return {
    serverUrl,
    baseDomain,
    prefixes: { v4: "100.64.0.0/10", v6: "fd7a:115c:a1e0::/48", allocation: "sequential" },
    node: {
      expiry: null,
      ephemeralTimeout: 30 * MINUTE,
      needsApproval: false,
      routes: { probeInterval: 10_000, probeTimeout: 5_000 },
    },
    preAuthKeys: { revokedRetention: 168 * HOUR },
    policy: { mode: "file", path: "" },
    dns: {
      magicDns: true,
      overrideLocalDns: false,
      nameservers: [],
      split: {},
      searchDomains: [],
      extraRecords: [],
      extraRecordsPath: "",
      useWithExitNode: [],
      certificates: null,
    },
    derp: { urls: [], paths: [], refreshEvery: 3 * HOUR, embedded: null },
    oidc: [],
    login: { expiry: 15 * MINUTE, maxPending: 1024 },
    store: { type: "sqlite", path: "" },
    taildrop: true,
    autoUpdate: false,
    logtail: false,
    clients: { latestVersion: "", urgentBelow: "", updateUrl: "" },
    geoip: { path: "" },
  };
}
