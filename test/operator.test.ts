// What operators get wrong: each mistake ends in one clear sentence that names the value, and a status that is not 0. Never a
// stack trace, never a hang, never half a change.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join, resolve } from "node:path";
import { freePort, skip, tempDir } from "./lib/mesh.ts";

const root = resolve(import.meta.dir, "..");
const run = join(root, "tools/run.ts");
const isRoot = process.getuid?.() === 0;

interface Ended {
  code: number;
  stdout: string;
  stderr: string;
}

async function weft(
  args: string[],
  options: { prefix?: string[]; seconds?: number; env?: Record<string, string> } = {},
): Promise<Ended> {
  const child = Bun.spawn([...(options.prefix ?? []), process.execPath, run, ...args], {
    cwd: root,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, ...options.env },
  });
  const timer = setTimeout(() => child.kill("SIGKILL"), (options.seconds ?? 60) * 1000);
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  clearTimeout(timer);
  return { code: child.signalCode ? 1000 : (child.exitCode ?? 1000), stdout, stderr };
}

/** One sentence on standard error, with these words, and nothing on standard output. */
function expectSentence(ended: Ended, ...words: string[]): void {
  expect(ended.stderr).not.toMatch(/^\s+at /m);
  expect(ended.stdout).toBe("");
  const last = ended.stderr.trim().split("\n").at(-1) ?? "";
  for (const word of words) expect(last).toContain(word);
  // 1000 stands for a hang that the test had to end.
  expect(ended.code).not.toBe(1000);
  expect(ended.code).toBeGreaterThan(0);
}

const dir = tempDir("operator");
afterAll(() => dir[Symbol.dispose]());
const path = (name: string) => join(dir.path, name);
/** A listening address that nobody holds just now. */
const free = `127.0.0.1:${await freePort()}`;

describe("an operator's mistake is one sentence:", () => {
  for (const [what, args, words] of [
    ["an unknown command", ["boxx"], ["boxx"]],
    ["an unknown flag of box", ["box", "--lissten", free], ["--lissten", "--listen"]],
    ["a listening address that is none", ["box", "--data", path("d1"), "--listen", "1.2.3:99999"], ["1.2.3:99999"]],
    ["a URL that is none", ["box", "--data", path("d2"), "--listen", free, "--url", "ftp://x"], ["ftp://x"]],
    [
      "a certificate that is not there",
      ["box", "--data", path("d3"), "--listen", free, "--tls-cert", path("no.pem"), "--tls-key", path("no.key")],
      ["no.pem"],
    ],
    ["a data folder that cannot be made", ["box", "--data", "/proc/weft", "--listen", free], ["/proc/weft"]],
    ["an unknown verb of weft", ["weft", "--data", path("d4"), "nods", "list"], ["nods", "nodes"]],
    ["a data folder without a server", ["weft", "--data", path("d5"), "users", "list"], ["d5"]],
    ["an unknown flag of node", ["node", "--auth-kye", "x"], ["--auth-kye", "--auth-key"]],
    ["a port that is none", ["node", "--port", "70000", "--state", "mem:", "--socket", path("n.sock")], ["70000"]],
    [
      "an auth key file that is not there",
      [
        "node",
        "--auth-key",
        `file:${path("nokey")}`,
        "--login-server",
        "http://127.0.0.1:1",
        "--state",
        "mem:",
        "--socket",
        path("n.sock"),
      ],
      ["nokey"],
    ],
    [
      "an interface name that is too long",
      ["wg", "-f", "weft-with-a-much-too-long-name"],
      ["weft-with-a-much-too-long-name"],
    ],
    ["an unknown flag of wg", ["wg", "--mtoo", "1420", "wg0"], ["--mtoo", "--mtu"]],
    ["an unknown part of bench", ["bench", "crypt"], ["crypt"]],
    ["an unknown argument of peers", ["peers", "--lst"], ["--lst"]],
    ["an unknown flag of start", ["start", "--second", "3"], ["--second", "--seconds"]],
  ] as [string, string[], string[]][]) {
    test(what, async () => {
      expectSentence(await weft(args), ...words);
    });
  }

  test("a port in use", async () => {
    const server = createServer().listen(0, "127.0.0.1");
    await new Promise((done) => server.once("listening", done));
    const { port } = server.address() as { port: number };
    try {
      expectSentence(
        await weft(["box", "--data", path("used"), "--listen", `127.0.0.1:${port}`, "--stun", "off"]),
        `${port}`,
        "in use",
      );
    } finally {
      server.close();
    }
  });

  test("a key file that is not a key", async () => {
    mkdirSync(path("badkey"), { mode: 0o700 });
    const first = Bun.spawn(
      [process.execPath, run, "box", "--data", path("badkey"), "--listen", free, "--stun", "off"],
      { cwd: root, stdout: "ignore", stderr: "pipe" },
    );
    await waitFor(() => existsSync(join(path("badkey"), "noise_private.key")) || first.exitCode !== null);
    first.kill();
    await first.exited;
    writeFileSync(join(path("badkey"), "noise_private.key"), "privkey:zz\n");
    expectSentence(
      await weft(["box", "--data", path("badkey"), "--listen", free, "--stun", "off"]),
      "noise_private.key",
    );
  });
});

async function waitFor(check: () => boolean, seconds = 60): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  while (!check()) {
    if (performance.now() > deadline) throw new Error(`waited ${seconds} s in vain`);
    await Bun.sleep(50);
  }
}

describe("a box that runs", () => {
  let box: Bun.Subprocess<"ignore", "pipe", "pipe">;
  const data = path("box");
  let log = "";

  beforeAll(async () => {
    box = Bun.spawn([process.execPath, run, "box", "--data", data, "--listen", free, "--stun", "off"], {
      cwd: root,
      stdout: "pipe",
      stderr: "pipe",
      stdin: "ignore",
    });
    (async () => {
      for await (const chunk of box.stdout) log += new TextDecoder().decode(chunk);
    })();
    await waitFor(() => /ready/.test(log));
  });
  afterAll(async () => {
    box.kill();
    await box.exited;
  });

  test("keeps its folder to itself", () => {
    expect((statSync(data).mode & 0o777).toString(8)).toBe("700");
    const files = readdirSync(data);
    expect(files).toContain("noise_private.key");
    for (const file of files) {
      expect({ file, mode: (statSync(join(data, file)).mode & 0o077).toString(8) }).toEqual({ file, mode: "0" });
    }
  });

  test("refuses a second server on the same folder", async () => {
    expectSentence(await weft(["box", "--data", data, "--listen", free, "--stun", "off"]), data);
  });

  test("answers administration with the result alone on standard output", async () => {
    const user = await weft(["weft", "--data", data, "users", "create", "alice", "-o", "json"]);
    expect(user.code).toBe(0);
    const { id } = JSON.parse(user.stdout) as { id: number | string };
    const key = await weft([
      "weft",
      "--data",
      data,
      "preauthkeys",
      "create",
      "--user",
      `${id}`,
      "--reusable",
      "-e",
      "24h",
      "-o",
      "json",
    ]);
    expect(JSON.parse(key.stdout).key).toMatch(/^\S{20,}$/);
    const plain = await weft(["weft", "preauthkeys", "create", "--user", `${id}`, "--data", data]);
    expect(plain.stdout.trim()).toMatch(/^\S{20,}$/);
    expect((await weft(["weft", "--data", data, "users", "list", "-o", "yaml"])).stdout).toContain("alice");
    expect((await weft(["weft", "--data", data, "users", "list"])).stdout).toContain("alice");
  });

  for (const [what, args, words] of [
    ["a user that exists", ["users", "create", "bob"], ["bob"]],
    ["a user that does not exist", ["preauthkeys", "create", "--user", "999"], ["999"]],
    ["a node that does not exist", ["nodes", "delete", "-i", "4711", "--force"], ["4711"]],
    ["a duration that is none", ["preauthkeys", "create", "--user", "1", "-e", "soon"], ["soon"]],
    ["a tag without its prefix", ["preauthkeys", "create", "--user", "1", "--tags", "web"], ["web", "tag:"]],
    ["a name that no user may have", ["users", "create", "a b\u0007"], ["a b"]],
    ["an output form that is none", ["users", "list", "-o", "xml"], ["xml"]],
  ] as [string, string[], string[]][]) {
    test(`says one sentence for ${what}`, async () => {
      if (what === "a user that exists") await weft(["weft", "--data", data, "users", "create", "bob"]);
      expectSentence(await weft(["weft", "--data", data, ...args]), ...words);
    });
  }

  // INT and TERM end the boxes of other tests.
  test("ends within two seconds of QUIT", async () => {
    box.kill("SIGQUIT");
    await waitFor(() => box.exitCode !== null || box.signalCode !== null, 5);
    expect(box.exitCode).toBe(0);
  });
});

describe("without what the kernel gives", () => {
  if (skip(isRoot ? null : "mount namespaces need root")) test.skip("no /dev/net/tun", () => {});
  else {
    const noTun = ["unshare", "-nm", "sh", "-c", 'mount -t tmpfs t /dev/net && exec "$0" "$@"'];
    const asNobody = ["unshare", "-n", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    for (const [what, prefix, args, words] of [
      ["no /dev/net/tun for wg", noTun, ["wg", "-f", "wgtest0"], ["/dev/net/tun"]],
      [
        "no /dev/net/tun for node",
        noTun,
        [
          "node",
          "--state",
          "mem:",
          "--socket",
          path("x.sock"),
          "--login-server",
          "http://127.0.0.1:1",
          "--auth-key",
          "k",
        ],
        ["/dev/net/tun"],
      ],
      ["no /dev/net/tun for start", noTun, ["start"], ["/dev/net/tun"]],
      ["no root for wg", asNobody, ["wg", "-f", "wgtest0"], []],
      ["no root for start, and a closed /dev/net/tun", asNobody, ["start"], ["/dev/net/tun"]],
    ] as [string, string[], string[], string[]][]) {
      test(what, async () => {
        expectSentence(await weft(args, { prefix }), ...words);
      });
    }
  }
});
