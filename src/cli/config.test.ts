import { afterAll, expect, test } from "bun:test";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { type Env, loadConfig, type Overrides, type ServerConfig } from "./config.ts";
import { KEYS } from "./config-keys.ts";
import { UsageError } from "./flags.ts";

const folder = mkdtempSync(join(tmpdir(), "weft-config-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let files = 0;
function write(text: string, name = `c${files++}.yaml`, mode = 0o600): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  chmodSync(path, mode);
  return path;
}

function load(text: string, env: Env = {}, overrides: Overrides = {}): ServerConfig {
  return loadConfig({ config: write(text), env, overrides });
}

/** The mistakes that are reported, without the folder's name. */
function mistakes(text: string, env: Env = {}, overrides: Overrides = {}): string[] {
  try {
    load(text, env, overrides);
  } catch (error) {
    expect(error).toBeInstanceOf(UsageError);
    const lines = (error as Error).message.split("\n  ");
    return (lines.length > 1 ? lines.slice(1) : lines).map((line) => line.replaceAll(/\S*\/c\d+\.yaml/g, "FILE"));
  }
  return [];
}

/** A server of Headscale with most of what its documentation shows. */
const HEADSCALE = `---
server_url: https://headscale.example.com:443
listen_addr: 0.0.0.0:8080
metrics_listen_addr: 127.0.0.1:9090
grpc_listen_addr: 127.0.0.1:50443
grpc_allow_insecure: false
trusted_proxies: [127.0.0.1/32, "10.0.0.0/8"]
noise:
  private_key_path: /var/lib/headscale/noise_private.key
prefixes:
  v4: 100.64.0.0/16
  v6: fd7a:115c:a1e0::/64
  allocation: random
derp:
  server:
    enabled: true
    region_id: 901
    region_code: "hs"
    region_name: "My relay"
    verify_clients: true
    stun_listen_addr: "0.0.0.0:3478"
    private_key_path: /var/lib/headscale/derp_server_private.key
    automatically_add_embedded_derp_region: true
    ipv4: 198.51.100.1
    ipv6: 2001:db8::1
  urls:
    - https://derp.example.com/map
  paths: []
  auto_update_enabled: true
  update_frequency: 3h
disable_check_updates: false
node:
  expiry: 180d
  ephemeral:
    inactivity_timeout: 30m
  routes:
    ha:
      probe_interval: 20s
      probe_timeout: 3s
database:
  type: sqlite
  debug: false
  gorm:
    prepare_stmt: true
    slow_threshold: 1000
  sqlite:
    path: /var/lib/headscale/db.sqlite
    write_ahead_log: true
    wal_autocheckpoint: 1000
acme_url: https://acme-v02.api.letsencrypt.org/directory
acme_email: ""
tls_letsencrypt_hostname: ""
tls_letsencrypt_cache_dir: /var/lib/headscale/cache
tls_letsencrypt_challenge_type: HTTP-01
tls_letsencrypt_listen: ":http"
tls_cert_path: ""
tls_key_path: ""
log:
  level: debug
  format: json
policy:
  mode: file
  path: acl.hujson
dns:
  magic_dns: true
  base_domain: tail.example.com
  override_local_dns: true
  nameservers:
    global:
      - 1.1.1.1
      - https://dns.nextdns.io/abc123
    split:
      foo.example.com: [192.0.2.53]
  search_domains: [example.com]
  extra_records:
    - { name: "grafana.example.com", type: "A", value: "100.64.0.3" }
unix_socket: /var/run/headscale/headscale.sock
unix_socket_permission: "0770"
oidc:
  only_start_if_oidc_is_available: false
  issuer: https://id.example.com
  client_id: weft
  client_secret: geheim
  scope: [openid, groups]
  extra_params:
    domain_hint: example.com
  allowed_groups: [/staff]
  pkce:
    enabled: true
logtail:
  enabled: false
taildrop:
  enabled: false
tuning:
  register_cache_expiration: 5m
  batcher_workers: 2
`;

test("Headscale's file is read as it is", () => {
  const config = load(HEADSCALE);
  expect(config.url.href).toBe("https://headscale.example.com/");
  expect(config).toMatchObject({
    listen: { host: "0.0.0.0", port: 8080 },
    metricsListen: { host: "127.0.0.1", port: 9090 },
    tls: null,
    noiseKeyPath: "/var/lib/headscale/noise_private.key",
    adminSocket: { path: "/var/run/headscale/headscale.sock", mode: 0o770 },
    log: { level: "debug", format: "json" },
    relay: {
      enabled: true,
      region: { id: 901, code: "hs", name: "My relay", ipv4: "198.51.100.1", ipv6: "2001:db8::1" },
      stun: { host: "0.0.0.0", port: 3478 },
      keyPath: "/var/lib/headscale/derp_server_private.key",
    },
  });
  expect(config.trustedProxies).toHaveLength(2);
  expect(config.settings).toMatchObject({
    serverUrl: "https://headscale.example.com",
    baseDomain: "tail.example.com",
    prefixes: { v4: "100.64.0.0/16", v6: "fd7a:115c:a1e0::/64", allocation: "random" },
    node: {
      expiry: 180 * 86_400_000,
      ephemeralTimeout: 1_800_000,
      routes: { probeInterval: 20_000, probeTimeout: 3_000 },
    },
    policy: { mode: "file", path: join(folder, "acl.hujson") },
    dns: {
      overrideLocalDns: true,
      nameservers: ["1.1.1.1", "https://dns.nextdns.io/abc123"],
      split: { "foo.example.com": ["192.0.2.53"] },
      searchDomains: ["example.com"],
      extraRecords: [{ name: "grafana.example.com", type: "A", value: "100.64.0.3" }],
    },
    derp: { urls: ["https://derp.example.com/map"], refreshEvery: 10_800_000 },
    store: { type: "sqlite", path: "/var/lib/headscale/db.sqlite" },
    login: { expiry: 300_000 },
    taildrop: false,
  });
  expect(config.settings.oidc).toEqual([
    {
      id: "oidc",
      name: "id.example.com",
      issuer: "https://id.example.com",
      clientId: "weft",
      clientSecret: "geheim",
      onlyStartIfAvailable: false,
      useExpiryFromToken: false,
      scope: ["openid", "groups"],
      emailVerifiedRequired: true,
      extraParams: { domain_hint: "example.com" },
      allowedDomains: [],
      allowedUsers: [],
      allowedGroups: ["/staff"],
      pkce: "S256",
      groupsClaim: "groups",
      groupsPrefix: "",
      roles: {},
    },
  ]);
});

test("what is only for Headscale's machinery is told in one line, and secrets are shown nowhere", () => {
  const { warnings, shown } = load(HEADSCALE);
  expect(warnings).toHaveLength(1);
  for (const key of ["grpc_listen_addr", "database.gorm", "database.debug", "tuning.batcher_workers"])
    expect(warnings[0]).toContain(key);
  expect(shown["oidc.client_secret"]).toBe("***");
  expect(JSON.stringify(shown)).not.toContain("geheim");
  expect(shown["dns.base_domain"]).toBe("tail.example.com");
});

test("flags win over WEFT_, that over HEADSCALE_, that over the file, that over the default", () => {
  const text = "dns:\n  base_domain: file.example\n";
  const domain = (env: Env, overrides: Overrides = {}, content = text) =>
    load(content, env, overrides).settings.baseDomain;
  const env = { HEADSCALE_DNS_BASE_DOMAIN: "headscale.example", WEFT_DNS_BASE_DOMAIN: "weft.example" };
  expect(domain({}, {}, "")).toBe("weft.internal");
  expect(domain({})).toBe("file.example");
  expect(domain({ HEADSCALE_DNS_BASE_DOMAIN: "headscale.example" })).toBe("headscale.example");
  expect(domain(env)).toBe("weft.example");
  expect(domain(env, { "dns.base_domain": { flag: "--base-domain", value: "flag.example" } })).toBe("flag.example");
});

test("the environment alone is enough: lists, tables, a provider and its secret", () => {
  const config = load("", {
    HEADSCALE_SERVER_URL: "https://weft.example.com",
    HEADSCALE_DNS_NAMESERVERS_GLOBAL: "1.1.1.1 2606:4700:4700::1111,9.9.9.9",
    HEADSCALE_DNS_NAMESERVERS_SPLIT: '{"a.example": ["192.0.2.1"]}',
    HEADSCALE_DNS_EXTRA_RECORDS: '[{"name": "x.example", "type": "A", "value": "192.0.2.2"}]',
    HEADSCALE_UNIX_SOCKET_PERMISSION: "0700",
    HEADSCALE_OIDC_ISSUER: "https://id.example.com",
    HEADSCALE_OIDC_CLIENT_ID: "weft",
    HEADSCALE_OIDC_CLIENT_SECRET: "geheim",
    HEADSCALE_OIDC_PKCE_ENABLED: "true",
    HEADSCALE_PORT: "tcp://10.0.0.1:8080",
    WEFT_DATA: "/srv/weft",
  });
  expect(config.settings.dns.nameservers).toEqual(["1.1.1.1", "2606:4700:4700::1111", "9.9.9.9"]);
  expect(config.settings.dns.split).toEqual({ "a.example": ["192.0.2.1"] });
  expect(config.settings.dns.extraRecords).toEqual([{ name: "x.example", type: "A", value: "192.0.2.2" }]);
  expect(config.settings.oidc).toMatchObject([{ clientSecret: "geheim", pkce: "S256" }]);
  expect(config).toMatchObject({ dataDir: "/srv/weft", adminSocket: { mode: 0o700 }, warnings: [] });
});

test("every wrong key and value is named with its line and the nearest right key, all at once", () => {
  expect(
    mistakes(`server_url: weft.example.com
listen_addr: 8080
dns:
  magic_dnss: true
  # comment
  nameservers:
    global: [one.one.one.one]
magic_dns: true
node:
  expiry: soon
  ephemeral: 30m
prefixes: {v4: 100.64.0.1/10}
oidc:
  issuer: https://id.example.com
  client_id: a
  clientsecret: b
`),
  ).toEqual([
    'FILE:1: server_url "weft.example.com" is not a URL: write it as https://weft.example.com',
    expect.stringContaining("FILE:2: listen_addr 8080 is not an address and port: write it as 192.0.2.1:8080"),
    'FILE:4: unknown key "dns.magic_dnss": did you mean "dns.magic_dns"?',
    'FILE:7: dns.nameservers.global ["one.one.one.one"] must be an IP address or a DNS-over-HTTPS URL',
    'FILE:8: unknown key "magic_dns": did you mean "dns.magic_dns"?',
    'FILE:10: node.expiry "soon" is no duration: write it as 90s, 30m, 24h or 180d',
    "FILE:11: node.ephemeral must be keys and values",
    'FILE:12: prefixes.v4 "100.64.0.1/10" has bits behind its length: write it as 100.64.0.0/10',
    'FILE:16: unknown key "oidc.clientsecret": did you mean "oidc.client_secret"?',
  ]);
  expect(mistakes("", { HEADSCALE_LOG_LEVEL: "loud" })).toEqual([
    'HEADSCALE_LOG_LEVEL "loud" must be disabled, panic, fatal, error, warn, info, debug or trace',
  ]);
  expect(mistakes("", {}, { listen_addr: { flag: "--listen", value: "here" } })[0]).toStartWith(
    '--listen "here" is not an address and port',
  );
});

test("a DNS-over-HTTPS server that clients do not know is warned about: they would resolve nothing by it", () => {
  const { warnings, settings } = load(`dns:
  nameservers:
    global: [https://dns.quad9.net/dns-query, https://doh.example.com/dns-query, 9.9.9.9]
    split:
      corp.example: [https://dns.google.example.com/dns-query]
`);
  expect(warnings).toEqual([
    expect.stringMatching(/:3: dns.nameservers.global https:\/\/doh.example.com.* name its address/),
    expect.stringMatching(/:4: dns.nameservers.split https:\/\/dns.google.example.com/),
  ]);
  expect(settings.dns.nameservers).toHaveLength(3);
});

test("what Headscale has removed is explained", () => {
  const problems = mistakes(`acl_policy_path: /x
dns_config:
  base_domain: x
dns:
  use_username_in_magic_dns: true
randomize_client_port: true
oidc:
  issuer: https://id.example.com
  client_id: a
  expiry: 30d
ip_prefixes: [100.64.0.0/10]
`);
  expect(problems).toEqual([
    "FILE:1: acl_policy_path has been removed: write it as policy.path",
    expect.stringContaining("FILE:2: dns_config has been removed: its keys are under dns now"),
    expect.stringContaining("FILE:5: dns.use_username_in_magic_dns has been removed"),
    expect.stringContaining("FILE:6: randomize_client_port has been removed"),
    expect.stringContaining("FILE:11: ip_prefixes has been removed: write them as prefixes.v4 and prefixes.v6"),
    "FILE:10: oidc.expiry has been removed: write it as node.expiry",
  ]);
});

test("what Headscale has removed does no harm where it is off, as it is in the examples of 0.23 to 0.28", () => {
  const config = load("dns:\n  use_username_in_magic_dns: false\nrandomize_client_port: false\nacl_policy_path: ''\n");
  expect(config.warnings.map((line) => line.replace(/^.*?:(\d)/, "$1"))).toEqual([
    "2: dns.use_username_in_magic_dns has been removed: delete the line",
    "3: randomize_client_port has been removed: delete the line",
    "4: acl_policy_path has been removed: delete the line",
  ]);
});

test("what cannot go together is refused with the place of the one that is wrong", () => {
  const cases: [string, string][] = [
    ["dns: {override_local_dns: true}", "needs dns.nameservers.global"],
    [
      "server_url: https://a.b.example\ndns:\n  base_domain: b.example",
      "FILE:3: dns.base_domain b.example contains a.b.example",
    ],
    ["tls_cert_path: a.pem", "FILE:1: tls_cert_path is alone"],
    ["tls_letsencrypt_hostname: a.example\ntls_cert_path: a\ntls_key_path: b", "exclude each other"],
    ["trusted_proxies: [0.0.0.0/0]", "FILE:1: trusted_proxies cannot be used: trusted proxy 0.0.0.0/0 would believe"],
    ["prefixes:\n  v4:\n  v6:\n", "are both empty"],
    ["node: {ephemeral: {inactivity_timeout: 60s}}", "must be longer than 65s"],
    ["node: {routes: {ha: {probe_interval: 1s}}}", "must be 0 (no probes) or at least 2s"],
    ["node: {routes: {ha: {probe_timeout: 10s}}}", "shorter than node.routes.ha.probe_interval"],
    [
      "dns:\n  extra_records_path: x\n  extra_records: [{name: a, type: A, value: b}]",
      "FILE:2: dns.extra_records_path",
    ],
    ["dns: {extra_records: [{name: a.test, type: CNAME, value: b.test}]}", "clients take the types A and AAAA"],
    ["dns: {certificates: {provider: rfc2136}}", "dns.certificates.server is needed"],
    ["dns: {certificates: {provider: exec}}", "dns.certificates.command is needed"],
    ["dns: {certificates: {server: ns.example}}", "is no address of a name server"],
    ["database: {type: postgres}", "database.postgres.host is needed"],
    ["noise: {private_key_path: /k}\nderp: {server: {private_key_path: /k}}", "must be another file"],
    ["oidc: [{issuer: 'https://a.example', client_id: a}, {issuer: 'https://b.example', client_id: b}]", "is taken"],
    ["oidc:\n  client_id: a", "oidc.issuer is needed"],
    ["oidc:\n  client_secret: a", "oidc.issuer is needed"],
    ["a: 1\na: 2", 'FILE:2: the key "a" is given twice, first on line 1'],
    ["server_url: [", "FILE:1: not YAML"],
    ["- a", "must hold keys and values"],
  ];
  for (const [text, expected] of cases) expect(mistakes(text)[0]).toContain(expected);
});

test("secrets come from files, which others must not be able to read; never shown in a message", () => {
  const file = write("s3cret\n", "secret", 0o640);
  const provider = (more: string) => `oidc:\n  issuer: https://id.example.com\n  client_id: a\n${more}`;
  const text = provider("  client_secret_path: $CREDENTIALS_DIRECTORY/secret");
  expect(load(text, { CREDENTIALS_DIRECTORY: folder }).settings.oidc[0]?.clientSecret).toBe("s3cret");
  expect(mistakes(text)[0]).toContain("names the environment variable CREDENTIALS_DIRECTORY, which is not set");
  expect(load(`cli: {address: a.example, api_key_file: ${file}}`).cli.apiKey).toBe("s3cret");
  const postgres = `database: {type: postgres, postgres: {host: /run, name: a, user: b, ssl: true, pass_file: secret}}`;
  expect(load(postgres).settings.store).toMatchObject({ password: "s3cret", ssl: "require", port: 5432 });
  expect(mistakes(provider(`  client_secret: x\n  client_secret_file: ${file}`))[0]).toContain("is given twice");
  chmodSync(file, 0o644);
  expect(mistakes(postgres)[0]).toContain("everybody on this machine may use it (mode 644): chmod 0640 or less");
  expect(mistakes(provider("  client_secret: {a: s3cret}"))).toEqual(["FILE:4: oidc.client_secret must be text"]);
  const open = write(provider("  client_secret: x"), "open.yaml", 0o644);
  expect(loadConfig({ config: open, env: {} }).warnings[0]).toContain("everybody on this machine may read it");
});

test("what a timer cannot hold is refused: it would fire at once, and again and again", () => {
  for (const key of ["derp: {update_frequency", "dns: {certificates: {timeout"]) {
    const close = key
      .split("{")
      .slice(1)
      .map(() => "}")
      .join("");
    for (const value of ["30d", "0s"])
      expect(mistakes(`${key}: ${value}${close}`)).toEqual([expect.stringMatching(/must be from 10?s to 24d$/)]);
  }
  expect(load("derp: {update_frequency: 24d}").settings.derp.refreshEvery).toBe(24 * 86_400_000);
});

test("what packages of Headscale write without anybody having chosen it is no mistake", () => {
  const config = load(`database: {postgres: {host: null, port: null, password_file: null}}
dns: {base_domain: tailnet, nameservers: {global: [9.9.9.9], split: {}}, extra_records: []}
oidc: {issuer: "", client_id: "", client_secret_path: null, allowed_domains: [], extra_params: {}, pkce: {enabled: false, method: S256}}
policy: {mode: file, path: null}
tls_letsencrypt_hostname: ""
tls_cert_path: null
`);
  expect([config.settings.oidc, config.settings.baseDomain, config.tls]).toEqual([[], "tailnet", null]);
  const named = load("oidc: {pkce: {enabled: true}}", {
    HEADSCALE_OIDC_ISSUER: "https://id.example.com",
    HEADSCALE_OIDC_CLIENT_ID: "a",
  });
  expect(named.settings.oidc).toMatchObject([{ issuer: "https://id.example.com", pkce: "S256" }]);
});

test("several providers stand side by side; a secret of each may come from the environment", () => {
  const text = `oidc:
- id: work
  issuer: https://a.example
  client_id: a
  client_secret: x
- id: home
  name: At home
  issuer: https://b.example
  client_id: b
`;
  const { oidc } = load(text, { WEFT_OIDC_HOME_CLIENT_SECRET: "y" }).settings;
  expect(oidc.map(({ id, name, clientSecret }) => [id, name, clientSecret])).toEqual([
    ["work", "a.example", "x"],
    ["home", "At home", "y"],
  ]);
  expect(mistakes(`${text}  colour: red\n`)).toEqual(['FILE:10: unknown key "oidc.colour"']);
  // None can name a group of another, unless the operator says so; one alone names all.
  const prefixes = (file: string) => load(file).settings.oidc.map(({ groupsPrefix }) => groupsPrefix);
  expect(prefixes(text)).toEqual(["work/", "home/"]);
  expect(prefixes(`${text}  groups_prefixed: false\n`)).toEqual(["work/", ""]);
  expect(prefixes(text.slice(0, text.indexOf("- id: home")))).toEqual([""]);
  expect(mistakes(text.replace("https://b.example", "https://a.example/realms/home/"))).toEqual([
    'FILE:8: oidc.issuer "https://a.example/realms/home/" and "https://a.example/" begin alike: users of one could pass for the other\'s, so keep one of them',
  ]);
  expect(load(text.replace("b.example", "a.example.org")).settings.oidc).toHaveLength(2);
});

test("a file is found by flag, by environment, in a folder that is named, and never in Headscale's by itself", () => {
  const path = write("server_url: https://found.example\n", "config.yaml");
  const found = (config: string | undefined, env: Env) => loadConfig({ config, env }).url.hostname;
  expect(found(path, {})).toBe("found.example");
  expect(found(folder, {})).toBe("found.example");
  expect(found(undefined, { HEADSCALE_CONFIG: path })).toBe("found.example");
  expect(found(undefined, { WEFT_CONFIG: path, HEADSCALE_CONFIG: "/nowhere" })).toBe("found.example");
  expect(() => found("/nowhere/x.yaml", {})).toThrow("the configuration file /nowhere/x.yaml does not exist");
  const json = write('{\n  "server_url": "https://json.example",\n  "dns": {\n    "magic_dn": 1\n  }\n}', "c.json");
  expect(() => found(json, {})).toThrow('c.json:4: unknown key "dns.magic_dn": did you mean "dns.magic_dns"?');
});

test("certificates by ACME have sensible defaults, and give the URL its name", () => {
  const config = load("tls_letsencrypt_hostname: weft.example.com\nlisten_addr: 0.0.0.0:443\ndata_dir: /srv/weft");
  expect(config.url.origin).toBe("https://weft.example.com");
  expect(config.isUrlDerived).toBe(false);
  expect(config.tls).toEqual({
    directoryUrl: "https://acme-v02.api.letsencrypt.org/directory",
    email: "",
    hostname: "weft.example.com",
    cacheDir: "/srv/weft/acme",
    challenge: "HTTP-01",
    listen: { host: "::", port: 80 },
    caPath: null,
  });
  const alpn = (port: number) =>
    load(
      `listen_addr: 0.0.0.0:${port}\ntls_letsencrypt_hostname: weft.example.com\ntls_letsencrypt_challenge_type: TLS-ALPN-01`,
    ).warnings.map((line) => line.replace(/^.*:/, ""));
  expect([alpn(443), alpn(8443)]).toEqual([[], [expect.stringContaining("lead that port to listen_addr")]]);
});

test("the mode of the socket is octal, however YAML reads it", () => {
  const written = ["0770", '"0770"', '"0o770"', "0o770", "770", "0660", "0o660", "0o600"];
  const modes = written.map((text) => load(`unix_socket_permission: ${text}`).adminSocket.mode.toString(8));
  expect(modes).toEqual(["770", "770", "770", "770", "770", "660", "660", "600"]);
  for (const text of ["0999", "rw", "7"])
    expect(mistakes(`unix_socket_permission: ${text}`)[0]).toContain("must be a mode in octal");
});

test("one family of addresses alone, and a typo in the environment", () => {
  expect(load("prefixes: {v4: 100.64.0.0/24}").settings.prefixes).toMatchObject({ v4: "100.64.0.0/24", v6: null });
  expect(load("prefixes: {v4: 10.0.0.0/8, v6: ''}").warnings[0]).toContain("10.0.0.0/8 is outside 100.64.0.0/10");
  expect(load("", { HEADSCALE_LISTEN_ADR: "x" }).warnings).toEqual([
    "the environment variable HEADSCALE_LISTEN_ADR means nothing: did you mean HEADSCALE_LISTEN_ADDR?",
  ]);
  expect(load("ephemeral_node_inactivity_timeout: 2h").settings.node.ephemeralTimeout).toBe(7_200_000);
});

test("whatever stands in a file, the answer is a configuration or a sentence", () => {
  const key = fc.constantFrom(...Object.keys(KEYS), "oidc", "dns", "derp.server", "x");
  const value = fc.oneof(
    fc.string(),
    fc.integer(),
    fc.boolean(),
    fc.constant(null),
    fc.array(fc.string()),
    fc.object(),
  );
  fc.assert(
    fc.property(fc.array(fc.tuple(key, value), { maxLength: 4 }), (entries) => {
      const root: Record<string, unknown> = {};
      for (const [path, leaf] of entries) {
        const steps = path.split(".");
        let at = root;
        for (const step of steps.slice(0, -1)) {
          if (typeof at[step] !== "object" || at[step] === null) at[step] = {};
          at = at[step] as Record<string, unknown>;
        }
        at[steps.at(-1)!] = leaf;
      }
      try {
        loadConfig({ config: write(JSON.stringify(root), "random.json"), env: {} });
      } catch (error) {
        expect(error).toBeInstanceOf(UsageError);
      }
    }),
    { numRuns: 300 },
  );
});

test("what a number cannot hold exactly is to be quoted", () => {
  const provider = (id: string) => `oidc: {issuer: https://id.test, client_secret: x, client_id: ${id}}\n`;
  expect(mistakes(provider("312345678901234567"))).toEqual([
    "FILE:1: oidc.client_id 312345678901234560 has more digits than are kept of a number: write it in quotes",
  ]);
  expect(load(provider('"312345678901234567"')).settings.oidc[0]!.clientId).toBe("312345678901234567");
  expect(load(provider("3123456789")).settings.oidc[0]!.clientId).toBe("3123456789");
  const [secret] = mistakes("database: {postgres: {pass: 90071992547409931234}}\n");
  expect(secret).toContain("write it in quotes");
  expect(secret).not.toContain("9007");
});

test("DNS: types of records in any case, resolvers for domains alone", () => {
  const { dns } = load("dns: {extra_records: [{name: a.test, type: aaaa, value: 'fd00::1'}]}\n").settings;
  expect(dns.extraRecords).toEqual([{ name: "a.test", type: "AAAA", value: "fd00::1" }]);
  expect(mistakes("dns: {nameservers: {split: {corp.test: [192.0.2.1], 'two words': [192.0.2.1]}}}\n")).toEqual([
    'FILE:1: dns.nameservers.split {"corp.test":["192.0.2.1"],"two words":["192.0.2.1"]} names "two words", which is no domain',
  ]);
});

test("a policy file beside a policy in the database is passed over, as by Headscale, and that is said", () => {
  const { settings, warnings, files } = load("policy: {mode: database, path: /etc/headscale/acl.hujson}\n");
  expect(settings.policy).toEqual({ mode: "database", path: "" });
  expect(warnings.map((line) => line.replace(/^\S+: /, ""))).toEqual([
    "policy.path is not read, because policy.mode is database: set a policy by `weft policy set`",
  ]);
  expect(files).toHaveLength(1);
});

test("what is shown has no passwords of URLs and no arguments of programs; files that are the operator's are listed", () => {
  const key = write("secret", "tsig.key");
  const { shown, files, file } = load(`derp: {urls: ["https://joe:hunter2@maps.test/derp"], paths: [a.yaml, b.yaml]}
noise: {private_key_path: n.key}
geoip: {path: /usr/share/countries.csv}
dns: {certificates: {provider: exec, command: [/bin/hook, --token, hunter2], tsig_secret_file: ${key}}}
`);
  expect(JSON.stringify(shown)).not.toContain("hunter2");
  expect(shown).toMatchObject({
    "derp.urls": ["https://***@maps.test/derp"],
    "dns.certificates.command": ["/bin/hook", "***", "***"],
  });
  expect(files).toEqual([file!, join(folder, "a.yaml"), join(folder, "b.yaml"), "/usr/share/countries.csv", key]);
});

test("a long file that is not YAML is refused at once, with a line", () => {
  const [first] = mistakes("- not: this: at: all\n".repeat(40_000));
  expect(first).toMatch(/^FILE:\d+: not YAML/);
  expect(mistakes(`${"# comment\n".repeat(5_000)}dns: {magic_dns: true\n${"# more\n".repeat(5_000)}`)[0]).toMatch(
    /^FILE:500[12]: not YAML/,
  );
}, 20_000);

test("where a file is looked for, and where paths in it lead", () => {
  const place = mkdtempSync(join(folder, "where-"));
  expect(() => loadConfig({ config: place, env: {} })).toThrow("has neither config.yaml nor config.json");
  writeFileSync(join(place, "config.json"), '{"data_dir": "~/weft", "policy": null}');
  expect(loadConfig({ config: place, env: {} }).dataDir).toBe(join(homedir(), "weft"));
  const [one, other] = [write("data_dir: /one"), write("data_dir: /other")];
  expect(loadConfig({ env: { WEFT_CONFIG: one, HEADSCALE_CONFIG: other } }).dataDir).toBe("/one");
  // WEFT_DATA is for whoever has no configuration that says so.
  expect(load("data_dir: /file", { WEFT_DATA: "/env" }).dataDir).toBe("/file");
  expect(load("", { WEFT_DATA: "/env" })).toMatchObject({ dataDir: "/env", warnings: [] });
});

test("a secret inside is warned about where everybody may read the file, not where its group may", () => {
  const secret = "cli: {api_key: hskey-api-x}";
  expect(loadConfig({ config: write(secret, "group.yaml", 0o640), env: {} }).warnings).toEqual([]);
  expect(loadConfig({ config: write(secret, "all.yaml", 0o644), env: {} }).warnings[0]).toContain(
    "holds secrets (cli.api_key)",
  );
});

test("the edges of what is allowed", () => {
  const wrong: [string, string][] = [
    ["server_url: https://weft.internal", "dns.base_domain weft.internal contains weft.internal"],
    ["node: {ephemeral: {inactivity_timeout: 65s}}", "must be longer than 65s"],
    ["server_url: https://joe@weft.test", "must be scheme, host and port alone"],
    ["listen_addr: 'fd7a::1:8080'", "is not an address and port"],
    ["dns: {certificates: {provider: rfc2136, server: '192.0.2.53:0'}}", "is no address of a name server"],
    ["dns: {certificates: {provider: rfc2136, server: 192.0.2.53, tsig_name: weft}}", "belong together"],
    ["dns: {certificates: {provider: rfc2136, server: 192.0.2.53, tsig_secret: eA==}}", "belong together"],
    [`# ${"x".repeat(1 << 20)}`, "is larger than"],
  ];
  for (const [text, expected] of wrong)
    expect([text.slice(0, 80), mistakes(text)[0] ?? ""]).toEqual([
      text.slice(0, 80),
      expect.stringContaining(expected),
    ]);
  expect(load("prefixes: {v4: 100.0.0.0/8}").warnings[0]).toContain("is outside 100.64.0.0/10");
  expect(load("prefixes: {v6: 'fd7a:115c:a1e0::/47'}").warnings[0]).toContain("is outside fd7a:115c:a1e0::/48");
  expect(load("listen_addr: localhost:8080").listen).toEqual({ host: "127.0.0.1", port: 8080 });
  expect(load("node: {expiry: 0, ephemeral: {inactivity_timeout: 66s}}").settings.node).toMatchObject({
    expiry: null,
    ephemeralTimeout: 66_000,
  });
  expect(load("dns:\n").settings.dns.overrideLocalDns).toBe(false);
  expect(load("dns: {nameservers: {global: [192.0.2.53]}}").settings.dns.overrideLocalDns).toBe(true);
  // What is empty in the environment says nothing, what is empty in the file does.
  expect(load("", { WEFT_PREFIXES_V4: "", WEFT_PREFIXES_V6: "" }).settings.prefixes.v4).toBe("100.64.0.0/10");
  expect(load("prefixes: {v4: '', v6: 'fd7a:115c:a1e0::/48'}").settings.prefixes).toMatchObject({ v4: null });
});

test("lines of a block of text are no keys", () => {
  expect(
    mistakes("dns: {}\noidc:\n  name: |\n    server_url: not this one\n    server_url: nor this\n  issuer: x\n")[0],
  ).toStartWith("FILE:6: oidc.issuer");
});
