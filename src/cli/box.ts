// `bun run box`: control server, relay and STUN in one process, on one TCP port and one UDP port, with one data folder.
import { Hono } from "hono";
import { randomBytes } from "../crypto/keys.ts";
import { generatePrivateKey } from "../crypto/x25519.ts";
import { loadOrCreateKey } from "../net/keyfile.ts";
import type { Logger } from "../net/logger.ts";
import { createRelay, startStun } from "../relay/index.ts";
import type { ServerConfig } from "./config.ts";
import { type Address, showAddress } from "./config-kinds.ts";
import { parseFlags } from "./flags.ts";
import { createMetricsApp } from "./metrics.ts";
import { openControl } from "./open-control.ts";
import {
  CONTROL_FLAGS,
  CONTROL_USAGE,
  configOf,
  derpMapOf,
  makeFolderOf,
  type Parts,
  runServer,
  SERVER_FLAGS,
  SERVER_USAGE,
  stunOf,
} from "./serve.ts";

const USAGE = `Usage: bun run box [flags]

Control server, relay and STUN in one process.

${SERVER_USAGE}
  --stun IP:PORT|off   STUN server (default: port 3478 of the listening address)
${CONTROL_USAGE}`;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("bun run box", argv, { ...SERVER_FLAGS, ...CONTROL_FLAGS, stun: "string" }, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const config = configOf(flags);
  return runBox(config, stunOf(flags, config));
}

export function runBox(config: ServerConfig, stun: Address | null): Promise<number> {
  return runServer("box", config, "clients", (log, cleanups) => makeBox(config, stun, log, cleanups));
}

async function makeBox(
  config: ServerConfig,
  stunAddress: Address | null,
  log: Logger,
  cleanups: (() => unknown)[],
): Promise<Parts> {
  const { isInMap, region } = config.relay;
  const control = await openControl(config, {
    embedded: isInMap ? derpMapOf(config.url, stunAddress?.port ?? null, region) : null,
    onNodeRemoved: (nodeKey) => relay.disconnect(nodeKey),
    log,
    cleanups,
  });
  makeFolderOf(config.relay.keyPath);
  const relay = createRelay({
    privateKey: loadOrCreateKey(config.relay.keyPath, () => generatePrivateKey(randomBytes)),
    ...(config.relay.verifyClients && { verify: (nodeKey) => control.verifyNode(nodeKey) }),
  });
  cleanups.push(() => relay.close());
  if (stunAddress) {
    const stun = await startStun(stunAddress);
    cleanups.push(() => stun.close());
  }
  const app = new Hono();
  app.route("/", control.app);
  app.route("/", relay.app);
  return {
    app,
    upgrades: { ...control.upgrades, ...relay.upgrades },
    relayPublicKey: relay.publicKey,
    metrics: createMetricsApp(config, { control, relay }),
    reload: () => control.policies.reloadLogged(),
    about: stunAddress ? `, STUN on ${showAddress(stunAddress)}` : ", no STUN",
  };
}
