// `bun run control`: the control server alone. Relays run elsewhere; it tells clients where.
import { readFileSync } from "node:fs";
import { createControl } from "../control/index.ts";
import { listen } from "../net/listener.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import { parseFlags, UsageError } from "./flags.ts";
import {
  checkBaseDomain,
  controlSettings,
  DEFAULT_BASE_DOMAIN,
  derpMapOf,
  endWithin,
  logLine,
  parseUrl,
  reloadOnHangup,
  SERVER_FLAGS,
  STUN_PORT,
  serverSettings,
  showAddress,
  untilSignal,
} from "./serve.ts";

const USAGE = `Usage: bun run control --relay-url URL | --derp-map FILE [flags]

The control server alone. \`bun run box\` has a relay with it.

  --relay-url URL      the relay that clients use (its STUN server on port 3478)
  --derp-map FILE      or: several relays, a DERP map in JSON
  --data DIR           data folder, made with mode 0700 (default $WEFT_DATA or /var/lib/weft)
  --listen IP:PORT     where to listen (default 127.0.0.1:8080)
  --url URL            where clients find this server, for example https://weft.example.com
  --tls-cert FILE      certificate chain in PEM; with --tls-key the port speaks TLS
  --tls-key FILE       its private key in PEM
  --base-domain NAME   suffix of node names in MagicDNS (default weft.internal)
  --policy FILE        who may reach whom, in HuJSON; read again on SIGHUP (default: all may reach all)
  --policy-mode MODE   file (default), or database: the policy is set by \`weft policy set\` and by the API
  --ephemeral-timeout DURATION
                       ephemeral nodes are deleted after this time offline (default 30m)

A relay asks URL/verify whom to admit (\`bun run relay --verify-url\`).`;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "bun run control",
    argv,
    {
      ...SERVER_FLAGS,
      "relay-url": "string",
      "derp-map": "string",
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
  const baseDomain = checkBaseDomain(flags["base-domain"] ?? DEFAULT_BASE_DOMAIN, url);
  const derpMap = chooseDerpMap(flags["relay-url"], flags["derp-map"]);

  const signal = untilSignal();
  const cleanups: (() => unknown)[] = [];
  try {
    const control = await createControl({
      dataDir,
      settings: controlSettings(url, baseDomain, derpMap, flags),
      log: logLine,
    });
    cleanups.push(() => control.close());
    cleanups.push(reloadOnHangup(control));
    const listener = await listen({ ...address, ...(tls && { tls }), app: control.app, upgrades: control.upgrades });
    cleanups.push(() => listener.close());
    console.log(`control ready: ${url.origin}, listening on ${showAddress(listener)}, data in ${dataDir}`);
    await signal;
  } finally {
    await endWithin(cleanups, logLine);
  }
  return 0;
}

function chooseDerpMap(relayUrl: string | undefined, file: string | undefined): DERPMap {
  if ((relayUrl === undefined) === (file === undefined))
    throw new UsageError("clients need a relay: give either --relay-url URL or --derp-map FILE");
  if (relayUrl !== undefined) return derpMapOf(parseUrl("relay-url", relayUrl), STUN_PORT);
  let map: DERPMap | null;
  try {
    map = JSON.parse(readFileSync(file!, "utf8")) as DERPMap | null;
  } catch (error) {
    throw new Error(`--derp-map ${file} cannot be used: ${(error as Error).message}`);
  }
  const regions = Object.entries(map?.Regions ?? {});
  const isWrong = ([id, region]: (typeof regions)[number]) =>
    !region ||
    !/^[1-9]\d{0,8}$/.test(id) ||
    region.RegionID !== Number(id) ||
    !region.Nodes?.every((node) => node.HostName);
  const wrong = regions.find(isWrong);
  if (regions.length === 0 || wrong)
    throw new Error(
      `--derp-map ${file} cannot be used: ${wrong ? `region ${wrong[0]} needs its number as RegionID and Nodes with HostName` : "it has no Regions"}`,
    );
  return { ...map, omitDefaultRegions: true };
}
