// `bun test/lib/wasm-client.ts URL AUTH-KEY PAGE`: Tailscale's client for browsers, which reaches control server and relay by
// WebSockets only. It joins, fetches a page of the tailnet and stays. Prints its log, and a line of JSON that begins with "seen "
// for each thing that it was told.
import { peer } from "./peers.ts";

interface Client {
  run(callbacks: Record<string, (value: string) => void>): void;
  login(): void;
  fetch(url: string): Promise<{ status: number; text(): Promise<string> }>;
}
interface GoProgram {
  importObject: WebAssembly.Imports;
  run(instance: WebAssembly.Instance): Promise<void>;
}

const [controlURL = "", authKey = "", page = ""] = process.argv.slice(2);
const say = (what: object) => console.log(`seen ${JSON.stringify(what)}`);

await import(peer("wasm_exec.js")!);
const world = globalThis as unknown as { Go: new () => GoProgram; newIPN(config: object): Client };
const go = new world.Go();
const { instance } = await WebAssembly.instantiate(await Bun.file(peer("wasm")!).arrayBuffer(), go.importObject);
// Its main function has set `newIPN` when it first waits.
void go.run(instance);

const stored = new Map<string, string>();
const stateStorage = {
  setState: (name: string, value: string) => void stored.set(name, value),
  getState: (name: string) => stored.get(name) ?? "",
};
const client = world.newIPN({ controlURL, authKey, hostname: "browser", stateStorage });
client.run({
  notifyState(state) {
    say({ state });
    if (state === "NeedsLogin") client.login();
    if (state === "Running") void fetchPage();
  },
  notifyNetMap(text) {
    const { self, peers } = JSON.parse(text) as { self: { addresses: string[] }; peers: { name: string }[] };
    say({ addresses: self.addresses, peers: peers.map(({ name }) => name) });
  },
  notifyBrowseToURL: (url) => say({ url }),
  notifyPanicRecover: (error) => say({ error }),
});

async function fetchPage(): Promise<void> {
  for (;;) {
    try {
      const answer = await client.fetch(page);
      return say({ status: answer.status, text: await answer.text() });
    } catch {
      await Bun.sleep(200);
    }
  }
}
