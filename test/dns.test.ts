// DNS as official clients see it, and certificates for their names: MagicDNS, split DNS and extra records by the client's own
// resolver; `tailscale cert` against a real ACME server (Pebble), whose challenge the box sets on a real name server (BIND).
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../lab/daemon.ts";
import { type Host, Lab } from "../lab/network.ts";
import { Box, cannotUseNamespaces, certificate, shell, skip, Tailscaled, tempDir, until } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";
import { OPERATORS, Secrets, shownBy } from "./lib/secrets.ts";

const QUAD100 = "100.100.100.100";
/** Clients speak DoH to well-known providers only, and know their addresses. */
const PROVIDERS = {
  "dns.nextdns.io": ["45.90.28.0", "45.90.30.0"],
  "dns.quad9.net": ["9.9.9.9", "149.112.112.112"],
};
const SECRET = Buffer.from("a secret of the name server").toString("base64");

const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);
const named = Bun.which("named") ?? (existsSync("/usr/sbin/named") ? "/usr/sbin/named" : null);
const noNamed = named ? null : "named (the Debian package bind9) is absent";
const noPebble = Bun.which("pebble") ? null : "pebble (the Debian package) is absent";

/** A.record of `name` by one name server, sorted; an error code in their place. */
async function resolve(host: Host, name: string, type: "A" | "PTR" | "TXT" = "A", server = QUAD100): Promise<string> {
  const code = `
    import { Resolver } from "node:dns/promises";
    const resolver = new Resolver({ timeout: 1000, tries: 2 });
    resolver.setServers([${JSON.stringify(server)}]);
    try { console.log((await resolver.resolve(${JSON.stringify(name)}, ${JSON.stringify(type)})).flat().sort().join()); }
    catch (error) { console.log(error.code); }`;
  const { stdout, stderr } = await host.run([process.execPath, "-e", code]);
  return stdout.trim() || stderr;
}

describe.skipIf(skip(cannotUseNamespaces, absent))("DNS of official clients", () => {
  const dir = tempDir("dns");
  const file = (name: string) => join(dir.path, name);
  const daemons: Daemon[] = [];
  const secrets = new Secrets();
  let lab: Lab;
  let box: Box;
  let servers: Host;
  let doh: { process: Daemon; ca: string } | null = null;
  let current: Tailscaled;
  let old: Tailscaled;

  const records = (...values: [name: string, value: string][]) =>
    writeFileSync(file("records.json"), JSON.stringify(values.map(([name, value]) => ({ name, type: "A", value }))));
  const resolves = (member: Tailscaled, name: string, wanted: string, type?: "A" | "PTR") =>
    until(`${name} is ${wanted} on ${member.name}`, async () => {
      const found = await resolve(member.host, name, type);
      if (found !== wanted) throw new Error(`now ${found}`);
      return true;
    });
  /** By the system's resolver and the search domain, as programs ask. */
  const resolvesForPrograms = (name: string, wanted: string) =>
    until(`${name} is ${wanted} for programs`, async () => {
      const { stdout } = await current.host.run(["getent", "ahostsv4", name]);
      if (!stdout.includes(wanted)) throw new Error(`now ${stdout}`);
      return true;
    });

  async function renamed(member: Tailscaled, name: string): Promise<void> {
    const nodes = await box.admin<{ id: string; ipAddresses: string[] }[]>("nodes", "list");
    const { id } = nodes.find(({ ipAddresses }) => ipAddresses.includes(member.ip4))!;
    await box.admin("nodes", "rename", "-i", id, name);
  }

  async function startNameServer(): Promise<void> {
    const zone = (name: string, more: string) => `
      zone "${name}" { type primary; file "${file(`${name}.zone`)}"; ${more} };`;
    const head = "$TTL 60\n@ SOA ns hostmaster 1 60 60 600 60\n@ NS ns\n";
    const alias = "_acme-challenge.hooked CNAME hooked.challenges.test.";
    writeFileSync(file("weft.test.zone"), `${head}ns A ${servers.ip4}\n${alias}\n`);
    for (const name of ["challenges.test", "empty"])
      writeFileSync(file(`${name}.zone`), `${head}ns A ${servers.ip4}\n`);
    for (const [name, address] of Object.entries({ corp: 80, public: 81, doh: 82 }))
      writeFileSync(
        file(`${name}.test.zone`),
        `${head}ns A ${servers.ip4}\napp A 192.0.2.${address}\n*.by A 192.0.2.${address}\n_acme-challenge.app CNAME _acme-challenge.current.weft.test.\n`,
      );
    writeFileSync(
      file("named.conf"),
      `options { directory "${dir.path}"; pid-file none; session-keyfile none; dnssec-validation no;
         allow-recursion { ${servers.ip4}; }; listen-on { ${servers.ip4}; }; listen-on-v6 { none; }; };
       key "weft" { algorithm hmac-sha256; secret "${SECRET}"; };
       controls { inet ${servers.ip4} port 953 allow { any; } keys { "weft"; }; };
       ${zone("weft.test", 'allow-update { key "weft"; };')}
       ${zone("challenges.test", "")}
       ${zone("corp.test", "")}
       ${zone("public.test", "")}
       ${zone("doh.test", "")}`,
    );
    daemons.push(new Daemon(servers, [named!, "-g", "-n", "1", "-c", file("named.conf")]));
    await until(
      "the name server answers",
      async () => (await resolve(servers, "app.corp.test", "A", servers.ip4)) === "192.0.2.80",
    );
  }

  /** DoH with the providers' names and addresses, answered by the name server; its log has what was asked, and by whom. */
  async function startDoH(): Promise<{ process: Daemon; ca: string }> {
    mkdirSync(file("doh"));
    const own = await certificate(file("doh"), servers.ip4, ...Object.keys(PROVIDERS));
    for (const address of Object.values(PROVIDERS).flat()) servers.addAddress(`${address}/32`);
    const code = `
      import { createSocket } from "node:dgram";
      Bun.serve({ hostname: "::", port: 443, tls: { cert: Bun.file("${own.cert}"), key: Bun.file("${own.key}") }, async fetch(request, server) {
        console.log(server.requestIP(request).address.replace("::ffff:", ""), request.url);
        const socket = createSocket("udp4");
        const answer = new Promise((done) => socket.once("message", done));
        socket.send(new Uint8Array(await request.arrayBuffer()), 53, "${servers.ip4}");
        return new Response(await answer.finally(() => socket.close()), { headers: { "Content-Type": "application/dns-message" } });
      } });
      console.log("ready");`;
    const process = new Daemon(servers, [globalThis.process.execPath, "-e", code]);
    await until("the DoH server is ready", () => process.output().includes("ready"));
    daemons.push(process);
    return { process, ca: own.ca };
  }

  /** What the box is started with. `certificates`: how it sets the records of challenges. */
  const configure = (certificates: string) =>
    writeFileSync(
      file("config.yaml"),
      `dns:
  base_domain: weft.test
  search_domains: [corp.test]
  extra_records_path: ${file("records.json")}
  nameservers:
    global: ["https://dns.nextdns.io/abc123"]
    split:
      corp.test: [${servers.ip4}]
      doh.test: ["https://dns.quad9.net/dns-query"]
  certificates:
    timeout: 20s${certificates}
`,
    );

  async function startPebble(): Promise<string> {
    mkdirSync(file("acme"));
    const own = await certificate(file("acme"), servers.ip4);
    const pebble = {
      ...{ listenAddress: `${servers.ip4}:14000`, managementListenAddress: `${servers.ip4}:15000` },
      ...{ certificate: own.cert, privateKey: own.key, httpPort: 5002, tlsPort: 5001 },
    };
    writeFileSync(file("pebble.json"), JSON.stringify({ pebble }));
    const env = { PEBBLE_VA_NOSLEEP: "1" };
    daemons.push(
      new Daemon(servers, ["pebble", "-config", file("pebble.json"), "-dnsserver", `${servers.ip4}:53`], env),
    );
    return own.ca;
  }

  beforeAll(async () => {
    lab = await Lab.create("dns");
    const boxHost = await lab.host("box");
    servers = await lab.host("servers");
    const tls = await certificate(dir.path, boxHost.ip4);
    let roots = readFileSync(tls.ca, "utf8");
    if (!noNamed) {
      await startNameServer();
      doh = await startDoH();
      roots += readFileSync(doh.ca, "utf8");
    }
    if (!noPebble) roots += readFileSync(await startPebble(), "utf8");
    writeFileSync(file("roots.pem"), roots);
    writeFileSync(file("secret"), SECRET, { mode: 0o600 });
    records(["wiki.weft.test", "100.64.9.1"], ["metrics.example.org", "100.64.9.2"]);
    configure(`
    provider: rfc2136
    server: ${servers.ip4}
    tsig_name: weft
    tsig_secret_file: ${file("secret")}`);
    box = await Box.start(boxHost, file("box"), {
      tls,
      args: ["--config", file("config.yaml"), "--policy-mode", "database", ...OPERATORS],
    });
    const env = {
      SSL_CERT_FILE: file("roots.pem"),
      TS_DEBUG_ACME_DIRECTORY_URL: `https://${servers.ip4}:14000/dir`,
    };
    current = new Tailscaled(await lab.host("current"), file("current"), "1.102.5", env);
    old = new Tailscaled(await lab.host("old"), file("old"), "1.80.3", env);
    const key = secrets.addKey("pre-auth key", await box.key());
    await Promise.all(
      [current, old].map(async (member) => {
        await member.up(box.url, key);
        const { code, stderr } = await member.host.run(member.cli("set", "--accept-dns=true"));
        if (code !== 0) throw new Error(stderr);
      }),
    );
  }, 300_000);

  afterAll(async () => {
    await Promise.all([current, old].map((member) => member?.stop()));
    for (const daemon of daemons) daemon.kill();
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("names of nodes resolve to their addresses and back, on both clients; names that are none do not", async () => {
    for (const member of [current, old]) {
      await resolves(member, "current.weft.test", current.ip4);
      await resolves(member, "old.weft.test", old.ip4);
      await resolves(member, `${old.ip4.split(".").reverse().join(".")}.in-addr.arpa`, "old.weft.test", "PTR");
      await resolves(member, "nobody.weft.test", "ENOTFOUND");
    }
    await resolvesForPrograms("old", old.ip4);
  }, 300_000);

  test("a renamed node is found by its new name", async () => {
    await renamed(old, "elder");
    await resolves(current, "elder.weft.test", old.ip4);
    await resolves(current, "old.weft.test", "ENOTFOUND");
  }, 300_000);

  test("TestResolveMagicDNSExtraRecordsPath: records follow their file: edits, deletes, re-creates", async () => {
    await resolves(current, "wiki.weft.test", "100.64.9.1");
    await resolves(old, "metrics.example.org", "100.64.9.2");
    records(["wiki.weft.test", "100.64.9.3"]);
    await resolves(current, "wiki.weft.test", "100.64.9.3");
    await resolves(old, "wiki.weft.test", "100.64.9.3");
    rmSync(file("records.json"));
    await until("the box misses the file", () =>
      box.process.output().includes("the extra records before stay in force"),
    );
    await resolves(current, "wiki.weft.test", "100.64.9.3");
    records(["docs.weft.test", "100.64.9.4"]);
    await resolves(current, "docs.weft.test", "100.64.9.4");
    await resolves(current, "wiki.weft.test", "ENOTFOUND");
  }, 300_000);

  test.skipIf(skip(noNamed))(
    "names of a split domain are asked of its own name server",
    async () => {
      for (const member of [current, old]) await resolves(member, "app.corp.test", "192.0.2.80");
      await resolvesForPrograms("app", "192.0.2.80");
    },
    300_000,
  );

  test.skipIf(skip(noNamed))(
    "DoH: a split domain by one provider, all other names by another, which learns of each device what nodeAttrs of the policy let it",
    async () => {
      /** How the provider was asked for a name that nobody has asked for before. */
      let names = 0;
      const asked = async (member: Tailscaled): Promise<string> => {
        const before = doh!.process.output().length;
        await resolves(member, `n${names++}.by.public.test`, "192.0.2.81");
        const line = new RegExp(`^${member.host.ip4} https://dns.nextdns.io/(.*)$`, "m").exec(
          doh!.process.output().slice(before),
        );
        return line?.[1] ?? "not at all";
      };
      const asks = (member: Tailscaled, wanted: string) =>
        until(`${member.name} asks for ${wanted}`, async () => {
          expect(await asked(member)).toBe(wanted);
          return true;
        });
      const device = (member: Tailscaled) => `device_name=${member.name}&device_model=linux&device_ip=${member.ip4}`;
      for (const member of [current, old]) {
        await resolves(member, "app.doh.test", "192.0.2.82");
        expect(doh!.process.output()).toContain(`${member.host.ip4} https://dns.quad9.net/dns-query\n`);
        await asks(member, `abc123?${device(member)}`);
      }
      const nodeAttrs = [
        { target: [current.ip4], attr: ["nextdns:no-device-info"] },
        { target: [old.ip4], attr: ["nextdns:def456"] },
      ];
      const acls = [{ action: "accept", src: ["*"], dst: ["*:*"] }];
      writeFileSync(file("policy.hujson"), JSON.stringify({ acls, nodeAttrs }));
      await box.admin("policy", "set", "-f", file("policy.hujson"));
      await asks(current, "abc123");
      await asks(old, `def456?${device(old)}`);
      const attributes = async (member: Tailscaled) => {
        const { CapMap } = (await member.status())!.Self as unknown as { CapMap: Record<string, unknown> };
        return Object.keys(CapMap).filter((name) => name.startsWith("nextdns:"));
      };
      expect(await Promise.all([attributes(current), attributes(old)])).toEqual([
        ["nextdns:no-device-info"],
        ["nextdns:def456"],
      ]);
    },
    300_000,
  );

  test.skipIf(skip(noNamed))(
    "where a challenge must be seen, by the system's resolver: at the end of its aliases, on the servers of that zone",
    async () => {
      const module = join(import.meta.dir, "../src/net/dns-client.ts");
      // The host's own /etc.
      const code = `
        import { authorityOf, systemLookup } from ${JSON.stringify(module)};
        await Bun.write("/etc/resolv.conf", "nameserver ${servers.ip4}\\n");
        console.log(JSON.stringify(await authorityOf("_acme-challenge.app.corp.test", systemLookup())));`;
      const { stdout, stderr } = await servers.run([process.execPath, "-e", code]);
      expect(stdout.trim() || stderr).toBe(
        JSON.stringify({ name: "_acme-challenge.current.weft.test", servers: [`${servers.ip4}:53`] }),
      );
    },
    300_000,
  );

  /** `tailscale cert` for the node's name. */
  async function getsCertificate(member: Tailscaled, name: string): Promise<void> {
    const [cert, key] = [join(member.dir, "cert.pem"), join(member.dir, "key.pem")];
    const command = member.cli("cert", `--cert-file=${cert}`, `--key-file=${key}`, name);
    const { code, stdout, stderr } = await member.host.run(command, { timeoutMs: 120_000 });
    if (code !== 0) throw new Error(`${stderr}${stdout}; box: ${box.process.output().slice(-800)}`);
    const issued = new X509Certificate(readFileSync(cert));
    expect(issued.subjectAltName).toBe(`DNS:${name}`);
    expect(issued.issuer).toContain("Pebble");
  }

  test.skipIf(skip(noNamed, noPebble))(
    "tailscale cert: the node's certificate, by a record that the box sets",
    async () => {
      await getsCertificate(current, "current.weft.test");
      await getsCertificate(old, "elder.weft.test");
      const refused = await current.host.run(current.cli("cert", "--cert-file=-", "--key-file=-", "elder.weft.test"));
      expect(refused.code).not.toBe(0);
      expect(await resolve(servers, "_acme-challenge.current.weft.test", "TXT", servers.ip4)).not.toBe("ENOTFOUND");
    },
    300_000,
  );

  test.skipIf(skip(noNamed, noPebble))(
    "tailscale cert: by a program that writes the zone of challenges and tells BIND; the box looks for itself when it is there",
    async () => {
      writeFileSync(file("rndc.key"), `key "weft" { algorithm hmac-sha256; secret "${SECRET}"; };\n`, { mode: 0o600 });
      // The record's name is an alias, whose zone has only what is set here.
      writeFileSync(
        file("hook"),
        `#!/bin/sh
set -e
[ -e ${file("noon")} ] || { echo "not before noon" >&2; exit 1; }
name=\${1#_acme-challenge.}
{ cat ${file("empty.zone")}; printf '%s TXT "%s"\\n' "\${name%.weft.test}" "$2"; } > ${file("challenges.test.zone")}
exec rndc -s ${servers.ip4} -k ${file("rndc.key")} reload challenges.test
`,
        { mode: 0o700 },
      );
      configure(`
    provider: exec
    command: [${file("hook")}]`);
      await box.stop();
      // By the system's resolver the box finds who serves that zone.
      await shell(box.host, `echo "nameserver ${servers.ip4}" > /etc/resolv.conf`);
      await box.start();
      await renamed(current, "hooked");
      await until("the client knows", async () => (await current.status())?.Self.DNSName === "hooked.weft.test.");
      await expect(getsCertificate(current, "hooked.weft.test")).rejects.toThrow("not before noon");
      writeFileSync(file("noon"), "");
      await getsCertificate(current, "hooked.weft.test");
      const shown = await resolve(servers, "_acme-challenge.hooked.weft.test", "TXT", servers.ip4);
      expect(shown).toMatch(/^[\w-]{43}$/);
    },
    300_000,
  );

  test("no secret of all this is in the box's log, in its metrics or on its operators' pages", async () => {
    secrets.add("TSIG secret", SECRET);
    secrets.addPrivateKeys("box", box.data);
    secrets.addPrivateKeys("TLS", file("server.key"));
    for (const member of [current, old]) secrets.addPrivateKeys(member.name, member.dir);
    const shown = await shownBy(box);
    expect(secrets.foundIn(shown)).toEqual([]);
    expect(shown.log).toContain("POST /machine/map");
    if (!noNamed && !noPebble) {
      expect(shown.log).toContain("POST /machine/set-dns");
      expect(secrets.names.filter((name) => name.includes("acme-account.key.pem"))).not.toEqual([]);
    }
    expect(Object.keys(shown).length).toBeGreaterThan(20);
    // It would be found.
    const { PublicKey } = (await current.status())!.Self as unknown as { PublicKey: string };
    secrets.add("no secret", PublicKey.slice("nodekey:".length));
    expect(secrets.foundIn(shown)).toContain("no secret in /debug/netmap?node=1{}");
  }, 300_000);
});
