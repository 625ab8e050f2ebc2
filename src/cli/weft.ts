// `bun run weft`: the administrator's verbs go to the control server's socket, the others to the node's.
import { ADMIN_COMMANDS, ADMIN_USAGE, adminMain, commandOf, isAdminCommand } from "./admin.ts";
import { nearest, UsageError } from "./flags.ts";

const CLIENT_COMMANDS = ["up", "down", "logout", "status", "ping", "ip", "netcheck", "version"];

const USAGE = `Usage: bun run weft [flags] COMMAND

On the control server (--data DIR or --socket PATH, -o json|json-line|yaml):
${ADMIN_USAGE}

  policy get | set -f FILE | check -f FILE | history | why SRC DST:PORT | try -f FILE

On a node (--socket PATH, default /run/weft/weft.sock):
  up | down | status | ping HOST | ip | netcheck | version

\`weft COMMAND --help\` says more.`;

export async function main(argv: string[]): Promise<number> {
  const command = commandOf(argv);
  if (command === undefined) {
    if (argv.some((arg) => /^(-h|--?help)$/.test(arg))) {
      console.log(USAGE);
      return 0;
    }
    throw new UsageError(`which command? It is one of ${[...ADMIN_COMMANDS, ...CLIENT_COMMANDS, "policy"].join(", ")}`);
  }
  if (isAdminCommand(command)) return adminMain(argv);
  if (command === "policy") return (await import("./policy.ts")).main(argv);
  if (CLIENT_COMMANDS.includes(command)) return (await import("./client.ts")).main(argv);
  const near = nearest(command, [...ADMIN_COMMANDS, ...CLIENT_COMMANDS, "policy"]);
  throw new UsageError(
    `unknown command ${JSON.stringify(command)}${near ? `: did you mean "${near}"?` : ""} (weft --help lists them)`,
  );
}
