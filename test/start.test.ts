// `bun run start`: the demonstration works as root and without, and leaves nothing behind, however it ends.
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { cannotUseNamespaces, skip, tempDir, until } from "./lib/mesh.ts";

const root = resolve(import.meta.dir, "..");
const run = join(root, "tools/run.ts");

interface Demo {
  child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  log: () => string;
  output: Promise<string>;
  /** Processes that descend from this run, wherever they went: they all carry its mark in their environment. */
  left: () => string[];
}

function start(args: string[], prefix: string[] = []): Demo {
  const mark = `WEFT_TEST_MARK=${crypto.randomUUID()}`;
  const [name, value] = mark.split("=") as [string, string];
  const child = Bun.spawn([...prefix, process.execPath, run, "start", ...args], {
    cwd: root,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, [name]: value },
  });
  let log = "";
  (async () => {
    for await (const chunk of child.stderr) log += new TextDecoder().decode(chunk);
  })();
  const left = () =>
    readdirSync("/proc")
      .filter((pid) => /^\d+$/.test(pid) && pid !== `${process.pid}`)
      .filter((pid) => {
        try {
          return readFileSync(`/proc/${pid}/environ`, "utf8").split("\0").includes(mark);
        } catch {
          return false;
        }
      });
  return { child, log: () => log, output: new Response(child.stdout).text(), left };
}

function expectResult(json: string): void {
  const result = JSON.parse(json) as {
    handshake_ms: number;
    paths: { path: string; tcp_mbit_s: number; ping_p50_ms: number; ping_p99_ms: number }[];
    memory_mb: Record<string, number>;
  };
  expect(result.paths.map((p) => p.path)).toEqual(["direct", "relay"]);
  for (const p of result.paths) {
    expect(p.tcp_mbit_s).toBeGreaterThan(0);
    expect(p.ping_p50_ms).toBeGreaterThan(0);
    expect(p.ping_p99_ms).toBeGreaterThanOrEqual(p.ping_p50_ms);
  }
  expect(result.handshake_ms).toBeGreaterThan(0);
  expect(Object.values(result.memory_mb).every((mb) => mb > 10)).toBe(true);
}

if (skip(cannotUseNamespaces)) test.skip("bun run start", () => {});
else {
  describe("bun run start", () => {
    test("as root: prints both paths and leaves nothing", async () => {
      const demo = start(["--seconds", "1", "--json"]);
      const output = await demo.output;
      if ((await demo.child.exited) !== 0) throw new Error(demo.log());
      expectResult(output);
      expect(demo.left()).toEqual([]);
    }, 300_000);

    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      test(`${signal} in the middle: everything is gone within 5 s`, async () => {
        const demo = start(["--seconds", "30"]);
        await until("it measures", () => demo.log().includes("TCP for"), 120);
        expect(demo.left().length).toBeGreaterThan(3);
        demo.child.kill(signal);
        await until("nothing is left", () => demo.left().length === 0, 5);
        expect(await demo.child.exited).toBe(signal === "SIGINT" ? 130 : 143);
      }, 300_000);
    }

    test("kill -9: everything is gone within 5 s all the same", async () => {
      const demo = start(["--seconds", "30"]);
      await until("the nodes have joined", () => demo.log().includes("joined:"), 120);
      demo.child.kill("SIGKILL");
      await until("nothing is left", () => demo.left().length === 0, 5);
    }, 300_000);

    // An ordinary user, and a /dev/net/tun that is open to all as most distributions have it: both made in a mount namespace.
    const user = [
      "setpriv",
      "--reuid",
      "65534",
      "--regid",
      "65534",
      "--clear-groups",
      "--inh-caps=-all",
      "--bounding-set=-all",
    ];
    const readable =
      Bun.spawnSync([...user, "test", "-r", run]).exitCode === 0 &&
      Bun.spawnSync([...user, "test", "-x", process.execPath]).exitCode === 0;
    const namespaces = Bun.spawnSync([...user, "unshare", "-Urnm", "true"]).exitCode === 0;
    const reason = !namespaces
      ? "this kernel refuses user namespaces to ordinary users"
      : !readable
        ? `an ordinary user may not read ${root}`
        : null;
    if (skip(reason)) test.skip("without root", () => {});
    else {
      test("without root: goes on in a user namespace", async () => {
        using home = tempDir("start-user");
        Bun.spawnSync(["chmod", "777", home.path]);
        const open = [
          "unshare",
          "-m",
          "sh",
          "-c",
          'mknod -m 666 "$0/tun" c 10 200 && mount --bind "$0/tun" /dev/net/tun && exec "$@"',
          home.path,
          ...user,
          "env",
          `HOME=${home.path}`,
          `TMPDIR=${home.path}`,
        ];
        const demo = start(["--seconds", "1", "--json"], open);
        const output = await demo.output;
        if ((await demo.child.exited) !== 0) throw new Error(demo.log());
        expectResult(output);
        expect(demo.left()).toEqual([]);
      }, 300_000);
    }
  });
}
