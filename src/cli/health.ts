// `weft health`: whether a control server works, for the health checks of containers and supervisors.
import { AdminClient, CONNECTION_FLAGS } from "./admin-client.ts";
import { parseFlags } from "./flags.ts";
import { parseFormat, serialize } from "./output.ts";

const USAGE = `Usage: bun run weft health [flags]

Exit status 0 when the control server and its store work, 1 when not.

  -c, --config FILE  configuration: where the socket is, or the server elsewhere
  --data DIR         data folder of the control server (default $WEFT_DATA or /var/lib/weft)
  --socket PATH      its admin socket (default DIR/weft.sock)
  --address URL      a control server elsewhere, with --api-key KEY
  --timeout 5s       how long to wait for it
  -o json|json-line|yaml`;

export const FLAGS = {
  ...CONNECTION_FLAGS,
  output: { kind: "string", short: "o" },
  help: { kind: "boolean", short: "h" },
} as const;

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("weft health", argv, FLAGS, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const format = parseFormat(flags.output);
  const api = AdminClient.open(flags, process.env, (line) => console.error(line));
  const health = await api.call<{ databaseConnectivity: boolean }>("GET", "/v1/health");
  console.log(
    format === "table" ? (health.databaseConnectivity ? "ok" : "the store does not answer") : serialize(health, format),
  );
  return health.databaseConnectivity ? 0 : 1;
}
