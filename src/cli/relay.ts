// `bun run relay`: a DERP relay with STUN alone, for a control server that runs elsewhere.
import { prepareDataDir } from "../control/datadir.ts";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey } from "../crypto/x25519.ts";
import { loadOrCreateKey } from "../net/keyfile.ts";
import { createRelay, startStun } from "../relay/index.ts";
import { showAddress } from "./config-kinds.ts";
import { parseFlags } from "./flags.ts";
import { createMetricsApp } from "./metrics.ts";
import { configOf, makeFolderOf, parseUrl, runServer, SERVER_FLAGS, SERVER_USAGE, stunOf } from "./serve.ts";

const USAGE = `Usage: bun run relay [flags]

A DERP relay with STUN.

  --verify-url URL     control server whose /verify decides who may use the relay (default: every node may)
${SERVER_USAGE}
  --stun IP:PORT|off   STUN server (default: port 3478 of the listening address)`;

/** Milliseconds for the control server's answer. */
const VERIFY_TIMEOUT = 5_000;

export async function main(argv: string[]): Promise<number> {
  const spec = { ...SERVER_FLAGS, stun: "string", "verify-url": "string" } as const;
  const flags = parseFlags("bun run relay", argv, spec, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const config = configOf(flags);
  const { dataDir } = config;
  const stunAddress = stunOf(flags, config);
  const verifyUrl = flags["verify-url"] === undefined ? null : verifyEndpoint(flags["verify-url"]);
  return runServer("relay", config, null, async (log, cleanups) => {
    if (!verifyUrl) log.warn("no --verify-url was given: any node of any network may use this relay");
    prepareDataDir(dataDir);
    makeFolderOf(config.relay.keyPath);
    const relay = createRelay({
      privateKey: loadOrCreateKey(config.relay.keyPath, () => generatePrivateKey(randomBytes)),
      ...(verifyUrl && { verify: (nodeKey, ip) => askControl(verifyUrl, nodeKey, ip) }),
    });
    cleanups.push(() => relay.close());
    if (stunAddress) {
      const stun = await startStun(stunAddress);
      cleanups.push(() => stun.close());
    }
    return {
      app: relay.app,
      upgrades: relay.upgrades,
      relayPublicKey: relay.publicKey,
      metrics: createMetricsApp(config, { relay }),
      about: stunAddress ? `, STUN on ${showAddress(stunAddress)}` : ", no STUN",
    };
  });
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
