// The map of docs/architecture.md is a rule: each of these imports must make `bun run check` fail.
import { afterAll, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";

const root = resolve(import.meta.dir, "..");
const probe = `zz-layer-probe-${process.pid}.ts`;
const written: string[] = [];

afterAll(() => {
  for (const file of written) rmSync(file, { force: true });
});

async function lint(folder: string, source: string): Promise<string> {
  const file = join(root, folder, probe);
  written.push(file);
  writeFileSync(file, source);
  try {
    const run = Bun.spawn([join(root, "node_modules/.bin/biome"), "lint", file], {
      cwd: root,
      stdout: "pipe",
      stderr: "pipe",
    });
    const [out, err] = await Promise.all([
      new Response(run.stdout).text(),
      new Response(run.stderr).text(),
      run.exited,
    ]);
    return out + err;
  } finally {
    rmSync(file, { force: true });
  }
}

describe("the linter refuses", () => {
  const wrong: [folder: string, target: string][] = [
    ["src/crypto", "../wire/ip.ts"],
    ["src/wire", "../net/listener.ts"],
    ["src/wire", "node:fs"],
    ["src/wire", "../../ffi/tun.ts"],
    ["src/wireguard", "../datapath/api.ts"],
    ["src/wireguard", "node:net"],
    ["src/paths", "../net/derp-client.ts"],
    ["src/net", "../control/index.ts"],
    ["src/datapath", "../node/daemon.ts"],
    ["src/node", "../control/index.ts"],
    ["src/control", "../relay/index.ts"],
    ["src/relay", "../node/daemon.ts"],
    ["src/control", "bun:ffi"],
    ["src/cli", "bun:ffi"],
    ["lab", "bun:ffi"],
    ["ffi", "../src/net/listener.ts"],
  ];
  for (const [folder, target] of wrong) {
    test(`${target} in ${folder}`, async () => {
      const source = `import { it } from "${target}";\nconsole.log(it);\n`;
      expect(await lint(folder, source)).toContain("noRestrictedImports");
    });
  }

  test("nothing in an import that goes downward", async () => {
    expect(await lint("src/cli", `import { it } from "../net/listener.ts";\nconsole.log(it);\n`)).not.toContain(
      "noRestrictedImports",
    );
  });
});

test("protocols read no clock, start no timer and draw no randomness by themselves", () => {
  const impure =
    /\b(Date\.now|performance\.now|Math\.random|setTimeout|setInterval|setImmediate|getRandomValues|randomBytes|new Date\(\))/;
  const found: string[] = [];
  for (const folder of ["src/wire", "src/wireguard", "src/paths"]) {
    for (const name of readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })) {
      if (!name.endsWith(".ts") || name.endsWith(".test.ts")) continue;
      readFileSync(join(root, folder, name), "utf8")
        .split("\n")
        .forEach((line, i) => {
          if (impure.test(line.replace(/\/\/.*$|^\s*\*.*$/g, "")))
            found.push(`${folder}/${name}:${i + 1} ${line.trim()}`);
        });
    }
  }
  expect(found).toEqual([]);
});
