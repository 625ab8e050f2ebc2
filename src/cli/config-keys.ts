// Every key of the configuration file: Headscale's names (spec/headscale-features.md, section 2), and Weft's own, which stand
// last in their groups. A key is also an environment variable: upper case, "." as "_", behind WEFT_ or HEADSCALE_.
import {
  address,
  bool,
  clientVersion,
  domain,
  duration,
  hostName,
  integer,
  ipOf,
  type Kind,
  list,
  logFormat,
  logLevel,
  map,
  mode,
  nameServer,
  oneOf,
  origin,
  prefixOf,
  record,
  resolver,
  roles,
  split,
  sslMode,
  text,
  wait,
  webUrl,
} from "./config-kinds.ts";

export const KEYS = {
  server_url: origin,
  listen_addr: address,
  metrics_listen_addr: address,
  trusted_proxies: list(text),
  allowed_hosts: list(hostName),
  data_dir: text,
  unix_socket: text,
  unix_socket_permission: mode,
  "noise.private_key_path": text,

  "prefixes.v4": prefixOf(4),
  "prefixes.v6": prefixOf(6),
  "prefixes.allocation": oneOf("sequential", "random"),

  "derp.server.enabled": bool,
  "derp.server.region_id": integer(1, 999_999_999),
  "derp.server.region_code": text,
  "derp.server.region_name": text,
  "derp.server.verify_clients": bool,
  "derp.server.stun_listen_addr": address,
  "derp.server.private_key_path": text,
  "derp.server.automatically_add_embedded_derp_region": bool,
  "derp.server.ipv4": ipOf(4),
  "derp.server.ipv6": ipOf(6),
  "derp.urls": list(webUrl),
  "derp.paths": list(text),
  "derp.auto_update_enabled": bool,
  "derp.update_frequency": wait(10_000),

  "node.expiry": duration,
  "node.ephemeral.inactivity_timeout": duration,
  "node.routes.ha.probe_interval": wait(0),
  "node.routes.ha.probe_timeout": wait(0),
  "node.needs_approval": bool,
  "preauth_keys.revoked_retention": duration,

  "database.type": oneOf("sqlite", "sqlite3", "postgres"),
  "database.sqlite.path": text,
  "database.postgres.host": text,
  "database.postgres.port": integer(1, 65_535),
  "database.postgres.name": text,
  "database.postgres.user": text,
  "database.postgres.pass": text,
  "database.postgres.pass_file": text,
  "database.postgres.ssl": sslMode,

  acme_url: webUrl,
  acme_email: text,
  acme_ca_path: text,
  tls_letsencrypt_hostname: hostName,
  tls_letsencrypt_cache_dir: text,
  tls_letsencrypt_challenge_type: oneOf("HTTP-01", "TLS-ALPN-01"),
  tls_letsencrypt_listen: address,
  tls_cert_path: text,
  tls_key_path: text,

  "log.level": logLevel,
  "log.format": logFormat,

  "policy.mode": oneOf("file", "database"),
  "policy.path": text,

  "dns.magic_dns": bool,
  "dns.base_domain": domain,
  "dns.override_local_dns": bool,
  "dns.nameservers.global": list(resolver),
  "dns.nameservers.split": split,
  "dns.search_domains": list(hostName),
  "dns.extra_records": list(record),
  "dns.extra_records_path": text,
  "dns.nameservers.use_with_exit_node": list(resolver),
  "dns.certificates.provider": oneOf("rfc2136", "exec"),
  "dns.certificates.server": nameServer,
  "dns.certificates.zone": domain,
  "dns.certificates.tsig_name": text,
  "dns.certificates.tsig_algorithm": oneOf("hmac-sha256", "hmac-sha384", "hmac-sha512"),
  "dns.certificates.tsig_secret": text,
  "dns.certificates.tsig_secret_file": text,
  "dns.certificates.command": list(text),
  "dns.certificates.resolvers": list(nameServer),
  "dns.certificates.timeout": wait(1_000),

  "logtail.enabled": bool,
  "taildrop.enabled": bool,
  "auto_update.enabled": bool,
  "geoip.path": text,
  "clients.latest_version": clientVersion,
  "clients.urgent_below": clientVersion,
  "clients.update_url": webUrl,

  "cli.address": text,
  "cli.api_key": text,
  "cli.api_key_file": text,
  "cli.timeout": wait(1),
  "cli.insecure": bool,

  "tuning.register_cache_expiration": duration,
  "tuning.register_cache_max_entries": integer(1, 1_000_000),
} satisfies Record<string, Kind<unknown>>;

export type KeyName = keyof typeof KEYS;
export type Values = { [K in KeyName]?: ReturnType<(typeof KEYS)[K]> };

/** Of `oidc`, or of each item where it is a list. */
export const OIDC_KEYS = {
  issuer: webUrl,
  client_id: text,
  client_secret: text,
  client_secret_path: text,
  client_secret_file: text,
  only_start_if_oidc_is_available: bool,
  use_expiry_from_token: bool,
  scope: list(text),
  email_verified_required: bool,
  extra_params: map(text),
  allowed_domains: list(text),
  allowed_users: list(text),
  allowed_groups: list(text),
  "pkce.enabled": bool,
  "pkce.method": oneOf("S256", "plain"),
  id: text,
  name: text,
  groups_claim: text,
  groups_prefixed: bool,
  roles,
} satisfies Record<string, Kind<unknown>>;

export type OidcKeyName = keyof typeof OIDC_KEYS;
export type OidcValues = { [K in OidcKeyName]?: ReturnType<(typeof OIDC_KEYS)[K]> };

/** Never shown, neither in messages nor on the debug page. */
export const SECRETS: readonly string[] = [
  "database.postgres.pass",
  "cli.api_key",
  "client_secret",
  "dns.certificates.tsig_secret",
];

/** Files of the operator's own: they belong to a server, and are in no backup. */
export const FILES: readonly string[] = [
  "tls_cert_path",
  "tls_key_path",
  "acme_ca_path",
  "policy.path",
  "derp.paths",
  "dns.extra_records_path",
  "geoip.path",
  "client_secret_path",
  "client_secret_file",
  "database.postgres.pass_file",
  "dns.certificates.tsig_secret_file",
  "cli.api_key_file",
];

/** Old names that still work. */
export const RENAMED: Record<string, KeyName> = {
  ephemeral_node_inactivity_timeout: "node.ephemeral.inactivity_timeout",
  "database.postgres.password_file": "database.postgres.pass_file",
};

/** Headscale's keys for its own machinery: accepted, told once, without effect. */
export const IGNORED: readonly RegExp[] = [
  /^disable_check_updates$/,
  /^grpc_(listen_addr|allow_insecure)$/,
  /^node_update_check_interval$/,
  /^database\.debug$/,
  /^database\.gorm(\.|$)/,
  /^database\.sqlite\.(write_ahead_log|wal_autocheckpoint)$/,
  /^database\.postgres\.(max_open_conns|max_idle_conns|conn_max_idle_time_secs)$/,
  /^tuning\.(notifier_send_timeout|batch_change_delay|node_mapsession_buffered_chan_size|batcher_workers|node_store_batch_size|node_store_batch_timeout)$/,
];

/** Keys that Headscale has removed, and what to do. */
export const REMOVED: Record<string, string> = {
  acl_policy_path: "write it as policy.path",
  dns_config:
    "its keys are under dns now: nameservers -> dns.nameservers.global, restricted_nameservers -> dns.nameservers.split, domains -> dns.search_domains, and magic_dns, base_domain, override_local_dns, extra_records by their names",
  "dns.use_username_in_magic_dns": "names of nodes never hold the user any more: delete the line",
  "oidc.strip_email_domain":
    "users are known by the provider's id, and in policies by their whole address: delete the line",
  "oidc.map_legacy_users": "users are known by the provider's id: delete the line",
  "oidc.expiry": "write it as node.expiry",
  randomize_client_port: 'it is "randomizeClientPort": true in the policy now',
  private_key_path: "only the Noise key is left: noise.private_key_path",
  ip_prefixes: "write them as prefixes.v4 and prefixes.v6",
  log_level: "write it as log.level",
  db_type: "write it as database.type",
  db_path: "write it as database.sqlite.path",
  db_host: "write it as database.postgres.host",
  db_port: "write it as database.postgres.port",
  db_name: "write it as database.postgres.name",
  db_user: "write it as database.postgres.user",
  db_pass: "write it as database.postgres.pass",
  db_ssl: "write it as database.postgres.ssl",
};
