// A control server in a process of its own, to be killed: `bun test/lib/control-child.ts DATA-DIR STORE-SETTINGS-JSON`.
// Prints its port when it is ready; ends with its parent.
import { createControl } from "../../src/control/index.ts";
import { makeSettings } from "../../src/control/testing.ts";
import { listen } from "../../src/net/listener.ts";

const [dataDir, store] = process.argv.slice(2) as [string, string];
const control = await createControl({ dataDir, settings: makeSettings({ store: JSON.parse(store) }) });
const { app, upgrades } = control;
const listener = await listen({ host: "127.0.0.1", port: 0, app, upgrades });
console.log(listener.port);
for await (const _ of Bun.stdin.stream());
process.exit(0);
