// `bun run VERB …`: makes the checkout runnable (tools/setup.ts), then runs the verb in this same process.
import { setup } from "./setup.ts";

interface Verb {
  main(argv: string[]): Promise<number>;
}

const verbs: Record<string, () => Promise<Verb>> = {
  start: () => import("../src/cli/start.ts"),
  box: () => import("../src/cli/box.ts"),
  control: () => import("../src/cli/control.ts"),
  relay: () => import("../src/cli/relay.ts"),
  node: () => import("../src/cli/node.ts"),
  wg: () => import("../src/cli/wg.ts"),
  weft: () => import("../src/cli/weft.ts"),
  test: () => import("./test.ts"),
  check: () => import("./check.ts"),
  build: async () => ({ main: async () => 0 }),
  peers: () => import("./peers.ts"),
  bench: () => import("../bench/main.ts"),
};

const [verb = "", ...argv] = process.argv.slice(2);
const load = verbs[verb];
if (!load) {
  console.error(`weft: unknown command ${JSON.stringify(verb)}; known are: ${Object.keys(verbs).join(", ")}.`);
  process.exit(2);
}
try {
  await setup();
  process.exit(await (await load()).main(argv));
} catch (error) {
  // An operator's mistake never ends in a stack trace; WEFT_DEBUG=1 shows it to those who work on Weft.
  const name = verb === "weft" ? "weft" : `weft ${verb}`;
  console.error(`${name}: ${error instanceof Error ? error.message : error}`);
  if (process.env.WEFT_DEBUG) console.error(error);
  process.exit((error as { exitCode?: number })?.exitCode ?? 1);
}
