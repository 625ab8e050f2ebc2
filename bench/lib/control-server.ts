// The control server under load, in a process of its own: `bun bench/lib/control-server.ts DATA-DIR POLICY CLASSES`.
// Prints {"url", "keys"} when it is ready: one reusable pre-auth key for each class of nodes. Ends with its parent.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { createControl } from "../../src/control/index.ts";
import { defaultSettings } from "../../src/control/settings.ts";
import { listen } from "../../src/net/listener.ts";

const [dataDir, policy, classes] = process.argv.slice(2) as [string, string, string];
const path = policy === "" ? "" : join(dataDir, "policy.hujson");
if (path !== "") writeFileSync(path, policy);

const settings = defaultSettings("http://127.0.0.1", "load.internal");
const region = { RegionID: 999, Nodes: [{ Name: "999a", RegionID: 999, HostName: "relay.invalid" }] };
const control = await createControl({
  dataDir,
  settings: {
    ...settings,
    policy: { mode: "file", path },
    derp: { ...settings.derp, embedded: { Regions: { "999": region } } },
  },
  log: (line) => console.error(line),
});
const { app, upgrades, adminSocket } = control;
const listener = await listen({ host: "127.0.0.1", port: 0, app, upgrades });

async function ask(what: string, body: unknown): Promise<Record<string, Record<string, string>>> {
  const init = { method: "POST", unix: adminSocket, body: JSON.stringify(body) };
  const answer = await fetch(`http://weft/api/v1/${what}`, init);
  if (!answer.ok) throw new Error(`${what}: ${await answer.text()}`);
  return answer.json() as Promise<Record<string, Record<string, string>>>;
}

const keys: string[] = [];
for (const { user, tags } of JSON.parse(classes) as { user: string; tags: string[] }[]) {
  const created = await ask("user", { name: user });
  const key = await ask("preauthkey", { user: created.user!.id, reusable: true, aclTags: tags });
  keys.push(key.preAuthKey!.key!);
}
console.log(JSON.stringify({ url: `http://127.0.0.1:${listener.port}`, keys }));
for await (const _ of Bun.stdin.stream());
process.exit(0);
