// `bun run bench control`: a control server under N simulated nodes that speak the real protocol. The load is this process, the
// server another one: Weft, an official headscale (--against headscale), or any that runs already (--server URL --key KEY).
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { rss } from "../lab/measure.ts";
import { parseFlags, UsageError } from "../src/cli/flags.ts";
import { peer } from "../test/lib/peers.ts";
import { Counters, LoadNode } from "./lib/control-load.ts";
import { commit, machine } from "./lib/machine.ts";
import { progress, Report, rowsTable, writeReport } from "./lib/report.ts";
import { attempt } from "./lib/turns.ts";

const POLICIES = ["allow-all", "groups", "self", "tags"] as const;
type PolicyName = (typeof POLICIES)[number];

const USAGE = `usage: bun run bench control [--nodes N,…] [flags]
Simulated nodes join a control server, change, reconnect now and then, and reconnect all at once.
  --nodes LIST      how many (default 100); 100,500,1000,2000,5000 shows how cost grows
  --policy LIST     of ${POLICIES.join(", ")} (default allow-all): 50 groups of users, everybody's own nodes, 50 tags
  --against LIST    also an official headscale: headscale (from \`bun run peers\`); allow-all only
  --server URL      drive a server that runs already, with a fresh tailnet, instead of Weft; with
  --key KEY         a reusable pre-auth key, and
  --pid N           its process, for CPU time and memory
  --churn SECONDS   how long 1 % of the nodes reconnect each second (default 10)
  --changes N       endpoint changes to measure (default 20)
  --quick           few of everything: shows that it runs; the numbers mean nothing
  --json FILE       write {commit, machine, versions, rows} to FILE as well`;

/** Users, groups or tags among which the nodes of a policy are spread. */
const CLASSES = 50;
/** Registrations at a time. */
const PARALLEL = 16;
/** Milliseconds until every node must know every other, after all streams are open. */
const meshTimeout = (nodes: number) => 40_000 + 60 * nodes;
const CHANGE_TIMEOUT = 30_000;

interface Server {
  impl: string;
  url: string;
  /** One for each class of nodes. */
  keys: string[];
  /** Null: its CPU time and memory cannot be seen. */
  pid: number | null;
  close(): Promise<void>;
}

interface Settings {
  changes: number;
  /** Milliseconds between changes: at least, and up to as many more. They differ, so as not to fall in step with a server that works by the clock. */
  pause: { min: number; more: number };
  /** Seconds. */
  churn: number;
  /** Milliseconds without a message that count as settled. */
  quiet: number;
}

export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags(
    "bench control",
    argv,
    {
      nodes: "list",
      policy: "list",
      against: "list",
      server: "string",
      key: "string",
      pid: "number",
      churn: "number",
      changes: "number",
      quick: "boolean",
      json: "string",
      help: "boolean",
    },
    USAGE,
  );
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const sizes = (flags.nodes ?? ["100"]).map((text) => whole("--nodes", Number(text), 2, 20_000));
  const policies = (flags.policy ?? ["allow-all"]).map(policyName);
  if ((flags.server === undefined) !== (flags.key === undefined))
    throw new UsageError("--server and --key go together: the URL of a server and a reusable pre-auth key of it");
  const rivals = flags.against ?? [];
  if (rivals.some((name) => name !== "headscale")) throw new UsageError("--against takes headscale alone");
  const settings = {
    changes: whole("--changes", flags.changes ?? (flags.quick ? 3 : 20), 1, 10_000),
    pause: flags.quick ? { min: 20, more: 30 } : { min: 200, more: 1000 },
    quiet: flags.quick ? 200 : 1000,
    churn: whole("--churn", flags.churn ?? (flags.quick ? 2 : 10), 1, 3600),
  };

  const report = new Report("control");
  for (const policy of policies) {
    for (const nodes of sizes) {
      const starts =
        flags.server !== undefined
          ? [async () => running(flags.server!, flags.key!, flags.pid ?? null)]
          : [() => startWeft(policy), ...(policy === "allow-all" ? rivals.map(() => startHeadscale) : [])];
      for (const start of starts) {
        const server = await start();
        progress(`control: ${server.impl}, ${nodes} nodes, ${policy}`);
        try {
          await attempt(report, server.impl, () => new Run(server, nodes, policy, settings, report).all());
        } finally {
          await server.close();
        }
      }
    }
  }
  console.log(rowsTable(report.rows()));
  if (flags.json !== undefined)
    writeReport(flags.json, {
      commit: commit(),
      command: ["control", ...argv]
        .join(" ")
        .replace(/--(json|key)[= ]\S+ ?/g, "")
        .trim(),
      date: new Date().toISOString(),
      machine: machine(),
      versions: { bun: Bun.version },
      notes: report.notes,
      rows: report.rows(),
    });
  return 0;
}

function whole(flag: string, value: number, min: number, max: number): number {
  if (!Number.isInteger(value) || value < min || value > max)
    throw new UsageError(`${flag} takes whole numbers from ${min} to ${max}, not ${value}`);
  return value;
}

function policyName(name: string): PolicyName {
  const found = POLICIES.find((known) => known === name);
  if (!found) throw new UsageError(`--policy: ${JSON.stringify(name)} is not known: ${POLICIES.join(", ")}`);
  return found;
}

/** The policy as HuJSON, and the classes that nodes are spread among. Who sees whom is the same in all but the first. */
function policyOf(name: PolicyName): { text: string; classes: { user: string; tags: string[] }[] } {
  const numbers = Array.from({ length: name === "allow-all" ? 1 : CLASSES }, (_, i) => i);
  const classes = numbers.map((i) => ({ user: `user-${i}`, tags: name === "tags" ? [`tag:t${i}`] : [] }));
  const users = numbers.map((i) => `user-${i}@`);
  const rule = (who: string) => ({ action: "accept", src: [who], dst: [`${who}:*`] });
  const texts: Record<PolicyName, unknown> = {
    "allow-all": null,
    groups: {
      groups: Object.fromEntries(users.map((user, i) => [`group:g${i}`, [user]])),
      acls: users.map((_, i) => rule(`group:g${i}`)),
    },
    self: { acls: [{ action: "accept", src: ["autogroup:member"], dst: ["autogroup:self:*"] }] },
    tags: {
      tagOwners: Object.fromEntries(classes.map(({ tags: [tag] }) => [tag, []])),
      acls: classes.map(({ tags: [tag] }) => rule(tag!)),
    },
  };
  return { text: texts[name] === null ? "" : JSON.stringify(texts[name]), classes };
}

function running(url: string, key: string, pid: number | null): Server {
  return { impl: "server", url, keys: [key], pid, close: async () => {} };
}

async function startWeft(policy: PolicyName): Promise<Server> {
  const folder = mkdtempSync(join(tmpdir(), "weft-bench-control-"));
  const { text, classes } = policyOf(policy);
  const script = resolve(import.meta.dir, "lib/control-server.ts");
  const child = Bun.spawn([process.execPath, script, folder, text, JSON.stringify(classes)], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "inherit",
    // As `bun run box` has it (docs/scale.md).
    env: { ...process.env, BUN_GC_TIMER_DISABLE: "1" },
  });
  const close = async () => {
    child.kill("SIGKILL");
    await child.exited;
    rmSync(folder, { recursive: true, force: true });
  };
  let output = "";
  for await (const chunk of child.stdout as unknown as AsyncIterable<Uint8Array>) {
    output += Buffer.from(chunk).toString();
    if (output.includes("\n")) return { impl: "weft", ...JSON.parse(output), pid: child.pid, close };
  }
  await close();
  throw new Error("the control server did not start");
}

async function startHeadscale(): Promise<Server> {
  const program = peer("headscale");
  if (!program) throw new UsageError("headscale is not there: `bun run peers headscale` builds it");
  const folder = mkdtempSync(join(tmpdir(), "weft-bench-headscale-"));
  const port = await freePort();
  const url = `http://127.0.0.1:${port}`;
  const derp =
    "regions: { 999: { regionid: 999, regioncode: l, regionname: l, nodes: [{ name: 999a, regionid: 999, hostname: relay.invalid }] } }";
  await Bun.write(join(folder, "derp.yaml"), derp);
  const config = join(folder, "config.yaml");
  await Bun.write(
    config,
    `server_url: ${url}
listen_addr: 127.0.0.1:${port}
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:${await freePort()}
unix_socket: ${join(folder, "headscale.sock")}
noise: { private_key_path: ${join(folder, "noise.key")} }
prefixes: { v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48" }
database: { type: sqlite, sqlite: { path: ${join(folder, "db.sqlite")} } }
derp: { server: { enabled: false }, urls: [], paths: [${join(folder, "derp.yaml")}], auto_update_enabled: false }
dns: { magic_dns: true, base_domain: load.internal, override_local_dns: false, nameservers: { global: [] } }
disable_check_updates: true
log: { level: error }
`,
  );
  const child = Bun.spawn([program, "-c", config, "serve"], { stdout: "ignore", stderr: "ignore" });
  const close = async () => {
    child.kill("SIGKILL");
    await child.exited;
    rmSync(folder, { recursive: true, force: true });
  };
  const cli = (...args: string[]) => Bun.spawnSync([program, "-c", config, ...args], { stderr: "ignore" });
  const deadline = performance.now() + 30_000;
  while (!cli("users", "create", "load").success) {
    if (performance.now() > deadline) {
      await close();
      throw new Error("headscale did not start within 30 s");
    }
    await Bun.sleep(200);
  }
  const created = cli("preauthkeys", "create", "-u", "1", "--reusable", "-e", "24h").stdout.toString();
  return { impl: "headscale", url, keys: [created.trim().split("\n").at(-1)!], pid: child.pid, close };
}

function freePort(): Promise<number> {
  return new Promise((done) => {
    const probe = createServer().listen(0, "127.0.0.1", () => {
      const { port } = probe.address() as { port: number };
      probe.close(() => done(port));
    });
  });
}

/** One server with one size and policy. */
class Run {
  private readonly counters = new Counters();
  private readonly nodes: LoadNode[];
  private readonly ofClass: number[];
  private peak = 0;
  private bytesBefore = 0;
  private messagesBefore = 0;
  private cpuBefore = 0;

  constructor(
    private readonly server: Server,
    size: number,
    private readonly policy: PolicyName,
    private readonly settings: Settings,
    private readonly report: Report,
  ) {
    this.nodes = Array.from(
      { length: size },
      (_, i) => new LoadNode(i, i % server.keys.length, server.url, this.counters),
    );
    this.ofClass = server.keys.map((_, c) => this.nodes.filter((node) => node.classNumber === c).length);
  }

  async all(): Promise<void> {
    const watch = setInterval(() => {
      if (this.server.pid !== null) this.peak = Math.max(this.peak, rss(this.server.pid) / 1024);
    }, 50);
    try {
      for (const phase of ["join", "change", "churn", "storm"] as const) {
        progress(`control: ${phase}`);
        await this[phase]();
      }
      if (this.server.pid !== null) this.add("whole run: peak resident memory", "MB", this.peak);
      this.add("whole run: streams that the server ended", "count", this.counters.ended);
    } finally {
      clearInterval(watch);
      for (const node of this.nodes) node.drop();
    }
  }

  private add(metric: string, unit: string, ...values: number[]): void {
    const { impl } = this.server;
    this.report.add({ case: `${this.nodes.length} nodes, ${this.policy}`, impl, metric, unit }, ...values);
  }

  private begin(): number {
    this.bytesBefore = this.counters.bytes;
    this.messagesBefore = this.counters.messages;
    this.cpuBefore = this.server.pid === null ? 0 : cpuMillis(this.server.pid);
    return performance.now();
  }

  /** What the server has spent since `begin`, divided by `per`. */
  private end(phase: string, per = 1): void {
    const suffix = per === 1 ? "" : " each";
    if (this.server.pid !== null)
      this.add(`${phase}: server CPU${suffix}`, "ms", (cpuMillis(this.server.pid) - this.cpuBefore) / per);
    this.add(`${phase}: sent${suffix}`, "MB", (this.counters.bytes - this.bytesBefore) / 1e6 / per);
    this.add(`${phase}: messages${suffix}`, "count", (this.counters.messages - this.messagesBefore) / per);
  }

  private isFull(node: LoadNode): boolean {
    return node.peers >= this.ofClass[node.classNumber]! - 1;
  }

  private async untilFull(): Promise<void> {
    const deadline = performance.now() + meshTimeout(this.nodes.length);
    while (!this.nodes.every((node) => this.isFull(node))) {
      if (performance.now() > deadline) {
        const lacking = this.nodes.filter((node) => !this.isFull(node)).length;
        throw new Error(`${lacking} of ${this.nodes.length} nodes did not come to know all others`);
      }
      await Bun.sleep(5);
    }
  }

  private async untilQuiet(): Promise<void> {
    while (performance.now() - this.counters.lastMessage < this.settings.quiet) await Bun.sleep(20);
  }

  private async join(): Promise<void> {
    const began = this.begin();
    await inParallel(this.nodes, PARALLEL, async (node) => {
      await node.register(this.server.keys[node.classNumber]!);
      await node.open();
    });
    const open = performance.now();
    await this.untilFull();
    const full = performance.now();
    await this.untilQuiet();
    this.add("join: all streams open", "s", (open - began) / 1000);
    this.add("join: every node knows every other", "s", (full - began) / 1000);
    this.end("join");
  }

  private async change(): Promise<void> {
    const { changes, pause } = this.settings;
    const { counters } = this;
    const delays: number[] = [];
    const last: number[] = [];
    this.begin();
    for (let i = 0; i < changes; i++) {
      const node = this.nodes[(i * 7919) % this.nodes.length]!;
      const endpoint = `198.18.${i >> 8}.${i & 255}:${20_000 + i}`;
      const receivers = this.ofClass[node.classNumber]! - 1;
      const change = { what: `${node.id} ${endpoint}`, began: performance.now(), seen: [] as number[] };
      counters.change = change;
      await node.change(endpoint);
      const deadline = performance.now() + CHANGE_TIMEOUT;
      while (change.seen.length < receivers) {
        if (performance.now() > deadline)
          throw new Error(
            `a change reached ${change.seen.length} of ${receivers} nodes within ${CHANGE_TIMEOUT / 1000} s`,
          );
        await Bun.sleep(1);
      }
      delays.push(...change.seen);
      if (change.seen.length > 0) last.push(Math.max(...change.seen));
      await Bun.sleep(pause.min + ((i * 613) % pause.more));
    }
    counters.change = null;
    delays.sort((a, b) => a - b);
    this.add("change: reaches a node, median", "ms", delays[delays.length >> 1]!);
    this.add("change: reaches a node, 99 %", "ms", delays[Math.floor(delays.length * 0.99)]!);
    this.add("change: reaches the last node", "ms", ...last);
    this.end("change", changes);
  }

  private async reconnect(node: LoadNode): Promise<number> {
    const began = performance.now();
    node.drop();
    await node.open();
    return performance.now() - began;
  }

  /** Each second one node in a hundred reconnects. */
  private async churn(): Promise<void> {
    const { churn } = this.settings;
    const each = Math.max(1, Math.round(this.nodes.length / 100));
    const under: Promise<number>[] = [];
    const began = this.begin();
    for (let i = 0; i < churn * each; i++) {
      const due = began + ((i + 1) * 1000) / each;
      await Bun.sleep(Math.max(0, due - performance.now()));
      under.push(this.reconnect(this.nodes[(i * 31) % this.nodes.length]!));
    }
    const times = (await Promise.all(under)).sort((a, b) => a - b);
    this.add("churn: reconnect to full netmap, median", "ms", times[times.length >> 1]!);
    this.add("churn: reconnect to full netmap, 99 %", "ms", times[Math.floor(times.length * 0.99)]!);
    this.end("churn", churn);
    await this.untilFull();
    await this.untilQuiet();
  }

  /** All connections end at once and come back at once: full netmaps, then what else the server has to say. */
  private async storm(): Promise<void> {
    for (const node of this.nodes) node.drop();
    const began = this.begin();
    let open = 0;
    const opening = this.nodes.map(async (node) => {
      await node.open();
      open++;
    });
    const late = Promise.withResolvers<never>();
    const lacking = () => late.reject(new Error(`${this.nodes.length - open} nodes have no netmap`));
    const deadline = setTimeout(lacking, meshTimeout(this.nodes.length));
    await Promise.race([Promise.all(opening), late.promise]).finally(() => clearTimeout(deadline));
    await this.untilFull();
    const full = performance.now();
    await this.untilQuiet();
    this.add("storm: everybody has a full netmap", "s", (full - began) / 1000);
    this.add("storm: backlog after that", "s", Math.max(0, this.counters.lastMessage - full) / 1000);
    this.end("storm");
  }
}

/** Of all threads of a process, those that have ended too: compilers and collectors come and go. In steps of 10 ms. */
function cpuMillis(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]!.split(" ");
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

async function inParallel<T>(items: readonly T[], width: number, action: (item: T) => Promise<void>): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < items.length) await action(items[next++]!);
  };
  await Promise.all(Array.from({ length: width }, worker));
}
