// `weft serve`, Headscale's word for running a server: a box, or the control server alone when the configuration says so.
import { runBox } from "./box.ts";
import { runControl } from "./control.ts";
import { parseFlags } from "./flags.ts";
import { CONTROL_FLAGS, CONTROL_USAGE, configOf, SERVER_FLAGS, SERVER_USAGE, stunOf } from "./serve.ts";

const USAGE = `Usage: bun run weft serve [flags]

Runs \`box\`, or \`control\` when derp.server.enabled is false, or is not said and derp.urls or derp.paths name relays.

${SERVER_USAGE}
  --stun IP:PORT|off   STUN server (default: port 3478 of the listening address)
${CONTROL_USAGE}`;

export const FLAGS = { ...SERVER_FLAGS, ...CONTROL_FLAGS, stun: "string" } as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft serve", argv, FLAGS, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const config = configOf(flags);
  const { urls, paths } = config.settings.derp;
  const hasRelays = urls.length > 0 || paths.length > 0;
  return (config.relay.enabled ?? !hasRelays) ? runBox(config, stunOf(flags, config)) : runControl(config, null);
}
