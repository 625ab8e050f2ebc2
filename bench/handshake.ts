// `bun run bench handshake`: handshakes per second as responder. Each program, held to one core, answers the initiations of 400
// peers; the load (handshake-load.ts) has another core. The same initiations for all, in the same order, and a new process for
// each run, as a device takes each initiation once.
import { Lab } from "../lab/network.ts";
import { type Implementation, WgEnd } from "../test/lib/wg.ts";
import { cpuSeconds } from "./lib/cpu.ts";
import { identity, keyText, sourceOf } from "./lib/initiations.ts";
import type { BenchOptions } from "./lib/options.ts";
import { progress, type Report } from "./lib/report.ts";
import { cannotTunnel, configure, wire, wireguards } from "./lib/tunnels.ts";
import { inTurns } from "./lib/turns.ts";

const PEERS = 400;
const RESPONDER = "10.99.0.1";
const ROUNDS = 5;

interface Result {
  answered: number;
  seconds: number;
  cookies: number;
  unanswered: number;
}

export async function run(options: BenchOptions, report: Report): Promise<void> {
  if (cannotTunnel) {
    report.note(`everything is left out: ${cannotTunnel}`);
    return;
  }
  const { quick } = options;
  await using lab = await Lab.create("bench");
  const on = await wire(lab, "handshake", options);
  on.b.netlink.addAddress({ link: "wire", prefix: `${RESPONDER}/16` });
  for (let i = 0; i < PEERS; i++) on.a.netlink.addAddress({ link: "wire", prefix: `${sourceOf(i)}/16` });

  const responder = identity("responder");
  const cores = navigator.hardwareConcurrency;
  if (cores < 2) report.note("there is one core: program and load share it");
  const pin = (core: number) => ["taskset", "-c", `${Math.min(core, cores - 1)}`];
  const [warm, seconds, count] = quick ? [0.2, 0.3, 2000] : [1, 2, 24_000];
  progress(`handshake: ${count} initiations of ${PEERS} peers are made`);
  const child = on.a.exec(
    [
      ...pin(1),
      process.execPath,
      `${import.meta.dir}/handshake-load.ts`,
      keyText(responder.publicKey),
      `${PEERS}`,
      `${count}`,
    ],
    { stdin: "pipe", stderr: "inherit" },
  );
  const answers = lines(child.stdout);
  await answers.next();

  const name = `${PEERS} peers, one core`;
  const contestants = wireguards(options, report).map((impl) => ({ impl }));
  await inTurns(contestants, options.rounds ?? (quick ? 1 : ROUNDS), name, report, async ({ impl }) => {
    await using end = await start(on.b, impl, responder.privateKey, pin(0));
    const port = (await end.must(end.wg("show", end.device, "listen-port"))).trim();
    child.stdin.write(`${RESPONDER} ${port} ${warm} ${seconds}\n`);
    await child.stdin.flush();
    await answers.next();
    const before = cpuSeconds([end.pid]);
    const { value, done } = await answers.next();
    const spent = cpuSeconds([end.pid]) - before;
    if (done) throw new Error("the load has ended");
    const result = JSON.parse(value) as Result;
    if (result.answered === 0 || spent <= 0) throw new Error(`none of ${PEERS} peers was answered`);
    const add = (metric: string, unit: string, amount: number) =>
      report.add({ case: name, impl, metric, unit }, amount);
    add("handshakes as responder", "1/s", result.answered / result.seconds);
    add("handshakes per CPU-second", "1", result.answered / spent);
    add("cores used", "cores", spent / result.seconds);
    add("initiations without an answer", "1/s", result.unanswered / result.seconds);
  });
  await child.stdin.end();
  await child.exited;
}

async function start(
  host: Parameters<typeof WgEnd.start>[0],
  impl: Implementation,
  privateKey: Uint8Array,
  prefix: string[],
): Promise<WgEnd> {
  const end = await WgEnd.start(host, 1, impl, [], prefix);
  const peers = Array.from(
    { length: PEERS },
    (_, i) =>
      `[Peer]\nPublicKey = ${keyText(identity(`peer ${i}`).publicKey)}\nAllowedIPs = 10.100.${i >> 8}.${i & 255}/32\n`,
  );
  await configure(end, peers, keyText(privateKey));
  return end;
}

async function* lines(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of stream) {
    rest += decoder.decode(chunk, { stream: true });
    const whole = rest.split("\n");
    rest = whole.pop() ?? "";
    yield* whole;
  }
}
