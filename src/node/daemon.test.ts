// The daemon as a process on a host of its own: what it makes, what it refuses, what it leaves. How it carries traffic is
// shown in test/.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Daemon } from "../../lab/daemon.ts";
import { type Host, Lab, type RunResult } from "../../lab/network.ts";

const isRoot = process.getuid?.() === 0;
if (!isRoot) process.stderr.write("SKIP: the daemon's tests need root\n");
const SOCKET = "/run/weft/weft.sock";
const RUN = [process.execPath, join(import.meta.dir, "../../tools/run.ts")];
const START = [...RUN, "node"];
const CLIENT = [...RUN, "weft"];

let lab: Lab;
let host: Host;
let folder: string;
let state: string;
beforeAll(async () => {
  if (!isRoot) return;
  lab = await Lab.create(`node-${process.pid}`);
  host = await lab.host("h");
  folder = mkdtempSync(join(tmpdir(), "weft-node-"));
  state = join(folder, "weft.state");
});
afterAll(async () => {
  if (!isRoot) return;
  await lab.close();
  rmSync(folder, { recursive: true });
});

async function start(...flags: string[]): Promise<Daemon> {
  const daemon = new Daemon(host, [...START, "--state", state, ...flags]);
  const deadline = Date.now() + 60_000;
  while (!daemon.output().includes("node ready")) {
    if (daemon.exitCode !== null || Date.now() > deadline) throw new Error(`no daemon: ${daemon.output()}`);
    await Bun.sleep(10);
  }
  return daemon;
}
/** Runs a daemon that should end by itself. */
const tryStart = (...flags: string[]): Promise<RunResult> => host.run([...START, ...flags], { timeoutMs: 60_000 });
const client = (...words: string[]) => host.run([...CLIENT, ...words], { timeoutMs: 60_000 });
/** Everything that a daemon could leave on the host. */
const remains = async () => ({
  device: host.netlink.link("weft0") !== null,
  rules: ([4, 6] as const).flatMap((family) => host.netlink.rules({ family })).filter((rule) => rule.table === 53)
    .length,
  socket: (await host.run(["test", "-e", SOCKET])).code === 0,
});
const NOTHING = { device: false, rules: 0, socket: false };

test.skipIf(!isRoot)(
  "a daemon has its device, rules and socket, answers the CLI, and takes all of it back on TERM and on INT",
  async () => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) {
      const daemon = await start();
      expect(await remains()).toEqual({ device: true, rules: 2, socket: true });
      const status = JSON.parse((await client("status", "--json")).stdout);
      expect(status).toMatchObject({ BackendState: "NeedsLogin", HaveNodeKey: false, TUN: true });
      expect(await client("status")).toMatchObject({ code: 1, stdout: "Logged out.\n" });
      daemon.kill(signal);
      expect(await daemon.exited).toBe(0);
      expect(await remains()).toEqual(NOTHING);
    }
  },
  120_000,
);

describe("while a daemon runs", () => {
  let daemon: Daemon;
  beforeAll(async () => {
    if (isRoot) daemon = await start();
  });
  afterAll(async () => {
    if (!isRoot) return;
    daemon.kill();
    await daemon.exited;
  });

  test.skipIf(!isRoot)(
    "a second one on its socket, its state or its device ends in one sentence and harms nothing",
    async () => {
      const other = ["--socket", "/run/other.sock"];
      const cases: [string[], string][] = [
        [["--state", "mem:"], `a daemon is running already on ${SOCKET}`],
        [["--state", state, ...other], `another daemon uses the state file ${state}`],
        [["--state", "mem:", ...other], "weft0"],
        [["--cleanup"], "a daemon is running on"],
      ];
      for (const [flags, sentence] of cases) {
        const { code, stderr, stdout } = await tryStart(...flags);
        expect(code).toBe(1);
        expect(stderr).toContain(sentence);
        expect(stderr.trim().split("\n")).toHaveLength(1);
        expect(stdout).toBe("");
      }
      expect(await remains()).toEqual({ device: true, rules: 2, socket: true });
      expect((await client("status")).stdout).toBe("Logged out.\n");
    },
    120_000,
  );

  test.skipIf(!isRoot)("`up` without a control server says what is missing", async () => {
    const { code, stderr } = await client("up");
    expect(code).toBe(1);
    expect(stderr).toContain("--login-server");
  });
});

test.skipIf(!isRoot)(
  "after kill -9 the next start takes everything over, with the same machine key; --cleanup leaves nothing",
  async () => {
    const machineKey = () => JSON.parse(readFileSync(state, "utf8"))._machinekey;
    const first = await start();
    const key = machineKey();
    first.kill("SIGKILL");
    await first.exited;
    expect(await remains()).toEqual({ device: false, rules: 2, socket: true });
    const second = await start();
    expect(machineKey()).toBe(key);
    expect(await remains()).toEqual({ device: true, rules: 2, socket: true });
    second.kill("SIGKILL");
    await second.exited;
    expect((await tryStart("--cleanup")).code).toBe(0);
    expect((await remains()).rules).toBe(0);
  },
  120_000,
);

test.skipIf(!isRoot)("a damaged state file is refused and kept", async () => {
  const damaged = join(folder, "damaged.state");
  writeFileSync(damaged, "{");
  const { code, stderr } = await tryStart("--state", damaged);
  expect(code).toBe(1);
  expect(stderr).toContain(`${damaged} is damaged`);
  expect(readFileSync(damaged, "utf8")).toBe("{");
});

test.skipIf(!isRoot)(
  "a device that is taken away ends the daemon with a sentence, and without remains",
  async () => {
    const daemon = await start();
    host.netlink.deleteLink("weft0");
    expect(await daemon.exited).toBe(1);
    expect(daemon.lastLine()).toContain("the TUN device was deleted");
    expect(await remains()).toEqual(NOTHING);
  },
  120_000,
);
