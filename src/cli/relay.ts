// `bun run relay`: a DERP relay with STUN alone, for a control server that runs elsewhere.
import { join } from "node:path";
import { prepareDataDir } from "../control/datadir.ts";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey } from "../crypto/x25519.ts";
import { loadOrCreateKey } from "../net/keyfile.ts";
import { listen } from "../net/listener.ts";
import { createRelay, startStun } from "../relay/index.ts";
import { parseFlags } from "./flags.ts";
import {
  endWithin,
  logLine,
  parseStun,
  parseUrl,
  SERVER_FLAGS,
  serverSettings,
  showAddress,
  untilSignal,
  withMetaCertificate,
} from "./serve.ts";

const USAGE = `Usage: bun run relay [flags]

A DERP relay with STUN.

  --verify-url URL     control server whose /verify decides who may use the relay (default: every node may)
  --data DIR           data folder, made with mode 0700 (default $WEFT_DATA or /var/lib/weft)
  --listen IP:PORT     where to listen (default 127.0.0.1:8080)
  --url URL            where nodes find this relay, for the warnings at start
  --stun IP:PORT|off   STUN server (default: port 3478 of the listening address)
  --tls-cert FILE      certificate chain in PEM; with --tls-key the port speaks TLS
  --tls-key FILE       its private key in PEM`;

/** Milliseconds for the control server's answer. */
const VERIFY_TIMEOUT = 5_000;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "bun run relay",
    argv,
    {
      ...SERVER_FLAGS,
      stun: "string",
      "verify-url": "string",
    },
    USAGE,
  );
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const { address, tls, url, dataDir } = serverSettings(flags, null);
  const stunAddress = parseStun(flags.stun, address);
  const verifyUrl = flags["verify-url"] === undefined ? null : verifyEndpoint(flags["verify-url"]);
  if (!verifyUrl) console.error("warning: no --verify-url was given: any node of any network may use this relay");

  const signal = untilSignal();
  const cleanups: (() => unknown)[] = [];
  try {
    prepareDataDir(dataDir);
    const relay = createRelay({
      privateKey: loadOrCreateKey(join(dataDir, "derp_private.key"), () => generatePrivateKey(randomBytes)),
      ...(verifyUrl && { verify: (nodeKey, ip) => askControl(verifyUrl, nodeKey, ip) }),
    });
    cleanups.push(() => relay.close());
    if (stunAddress) {
      const stun = await startStun(stunAddress);
      cleanups.push(() => stun.close());
    }
    const listener = await listen({
      ...address,
      ...(tls && { tls: withMetaCertificate(tls, relay.publicKey) }),
      app: relay.app,
      upgrades: relay.upgrades,
    });
    cleanups.push(() => listener.close());
    const stunText = stunAddress ? `STUN on ${showAddress(stunAddress)}` : "no STUN";
    console.log(`relay ready: ${url.origin}, listening on ${showAddress(listener)}, ${stunText}, data in ${dataDir}`);
    await signal;
  } finally {
    await endWithin(cleanups, logLine);
  }
  return 0;
}

/** "https://control.example.com", or the whole URL of the endpoint as derper takes it. */
function verifyEndpoint(text: string): URL {
  return new URL("/verify", parseUrl("verify-url", text.replace(/\/verify\/?$/, "")));
}

async function askControl(url: URL, nodeKey: Uint8Array, ip: string): Promise<boolean> {
  const response = await fetch(url, {
    method: "POST",
    body: JSON.stringify({ NodePublic: formatKey("nodekey", nodeKey), Source: ip }),
    signal: AbortSignal.timeout(VERIFY_TIMEOUT),
    redirect: "error",
  });
  return response.ok && ((await response.json()) as { Allow?: unknown } | null)?.Allow === true;
}
