// `bun run control`: the control server alone. Relays run elsewhere; it tells clients where.
import { resolve } from "node:path";
import type { Logger } from "../net/logger.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import type { ServerConfig } from "./config.ts";
import { parseFlags, UsageError } from "./flags.ts";
import { createMetricsApp } from "./metrics.ts";
import { openControl } from "./open-control.ts";
import {
  CONTROL_FLAGS,
  CONTROL_USAGE,
  configOf,
  derpMapOf,
  type Parts,
  parseUrl,
  runServer,
  SERVER_FLAGS,
  SERVER_USAGE,
  STUN_PORT,
} from "./serve.ts";

const USAGE = `Usage: bun run control [flags]

The control server alone. \`bun run box\` has a relay with it.

  --relay-url URL      the relay that clients use (its STUN server on port 3478)
  --derp-map FILE      or: several relays, a DERP map in YAML or JSON, read again when it changes; or derp.urls and
                       derp.paths of the configuration
${SERVER_USAGE}
${CONTROL_USAGE}

A relay asks URL/verify whom to admit (\`bun run relay --verify-url\`).`;

export async function main(argv: string[]): Promise<number> {
  const spec = { ...SERVER_FLAGS, ...CONTROL_FLAGS, "relay-url": "string", "derp-map": "string" } as const;
  const flags = parseFlags("bun run control", argv, spec, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const config = configOf(flags);
  const { "relay-url": url, "derp-map": file } = flags;
  if (url !== undefined && file !== undefined)
    throw new UsageError("clients need a relay: give either --relay-url URL or --derp-map FILE");
  const { settings } = config;
  const paths = [...settings.derp.paths, ...(file === undefined ? [] : [resolve(file)])];
  const withFile = { ...config, settings: { ...settings, derp: { ...settings.derp, paths } } };
  return runControl(withFile, url === undefined ? null : derpMapOf(parseUrl("relay-url", url), STUN_PORT));
}

/** `derpMap`: relays beside those of the configuration. */
export function runControl(config: ServerConfig, derpMap: DERPMap | null): Promise<number> {
  const { urls, paths } = config.settings.derp;
  if (derpMap === null && urls.length === 0 && paths.length === 0)
    throw new UsageError(
      "clients need a relay: give either --relay-url URL or --derp-map FILE, or derp.urls or derp.paths in the configuration",
    );
  return runServer("control", config, "clients", (log, cleanups) => makeControl(config, derpMap, log, cleanups));
}

async function makeControl(
  config: ServerConfig,
  derpMap: DERPMap | null,
  log: Logger,
  cleanups: (() => unknown)[],
): Promise<Parts> {
  const control = await openControl(config, { embedded: derpMap, log, cleanups });
  return {
    app: control.app,
    upgrades: control.upgrades,
    metrics: createMetricsApp(config, { control }),
    reload: () => control.policies.reloadLogged(),
    about: "",
  };
}
