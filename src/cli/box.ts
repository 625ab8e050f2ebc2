// `bun run box`: control server, relay and STUN in one process, on one TCP port and one UDP port, with one data folder.
import { join } from "node:path";
import { Hono } from "hono";
import { createControl } from "../control/index.ts";
import { randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey } from "../crypto/x25519.ts";
import { loadOrCreateKey } from "../net/keyfile.ts";
import { listen } from "../net/listener.ts";
import { createRelay, startStun } from "../relay/index.ts";
import { parseFlags } from "./flags.ts";
import {
  checkBaseDomain,
  controlSettings,
  DEFAULT_BASE_DOMAIN,
  derpMapOf,
  endWithin,
  logLine,
  parseStun,
  reloadOnHangup,
  SERVER_FLAGS,
  serverSettings,
  showAddress,
  untilSignal,
  withMetaCertificate,
} from "./serve.ts";

const USAGE = `Usage: bun run box [flags]

Control server, relay and STUN in one process.

  --data DIR           data folder, made with mode 0700 (default $WEFT_DATA or /var/lib/weft)
  --listen IP:PORT     where to listen (default 127.0.0.1:8080)
  --url URL            where clients find this server, for example https://weft.example.com
  --stun IP:PORT|off   STUN server (default: port 3478 of the listening address)
  --tls-cert FILE      certificate chain in PEM; with --tls-key the port speaks TLS
  --tls-key FILE       its private key in PEM
  --base-domain NAME   suffix of node names in MagicDNS (default weft.internal)
  --policy FILE        who may reach whom, in HuJSON; read again on SIGHUP (default: all may reach all)
  --policy-mode MODE   file (default), or database: the policy is set by \`weft policy set\` and by the API
  --ephemeral-timeout DURATION
                       ephemeral nodes are deleted after this time offline (default 30m)`;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "bun run box",
    argv,
    {
      ...SERVER_FLAGS,
      stun: "string",
      "base-domain": "string",
      policy: "string",
      "policy-mode": "string",
      "ephemeral-timeout": "duration",
    },
    USAGE,
  );
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const { address, tls, url, dataDir } = serverSettings(flags, "clients");
  const stunAddress = parseStun(flags.stun, address);
  const baseDomain = checkBaseDomain(flags["base-domain"] ?? DEFAULT_BASE_DOMAIN, url);

  // A signal during the start counts as well.
  const signal = untilSignal();
  const cleanups: (() => unknown)[] = [];
  try {
    const control = await createControl({
      dataDir,
      settings: controlSettings(url, baseDomain, derpMapOf(url, stunAddress?.port ?? null), flags),
      onNodeRemoved: (nodeKey) => relay.disconnect(nodeKey),
      log: logLine,
    });
    cleanups.push(() => control.close());
    cleanups.push(reloadOnHangup(control));
    const relay = createRelay({
      privateKey: loadOrCreateKey(join(dataDir, "derp_private.key"), () => generatePrivateKey(randomBytes)),
      verify: (nodeKey) => control.verifyNode(nodeKey),
    });
    cleanups.push(() => relay.close());
    if (stunAddress) {
      const stun = await startStun(stunAddress);
      cleanups.push(() => stun.close());
    }
    const app = new Hono();
    app.route("/", control.app);
    app.route("/", relay.app);
    const listener = await listen({
      ...address,
      ...(tls && { tls: withMetaCertificate(tls, relay.publicKey) }),
      app,
      upgrades: { ...control.upgrades, ...relay.upgrades },
    });
    cleanups.push(() => listener.close());
    const stunText = stunAddress ? `STUN on ${showAddress(stunAddress)}` : "no STUN";
    console.log(`box ready: ${url.origin}, listening on ${showAddress(listener)}, ${stunText}, data in ${dataDir}`);
    await signal;
  } finally {
    await endWithin(cleanups, logLine);
  }
  return 0;
}
