// Official programs that Weft is tested against: where they are, and what to say when one is not there.
// `bun run peers` (tools/peers.ts) builds them into a cache outside the tree; nothing here builds or downloads.
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join, resolve } from "node:path";

export interface PeerSource {
  name: string;
  version: string;
  /**
   * go: a folder of test/peers with go.mod and go.sum, and maybe a program; `support` are files of the Go installation that go
   * with what was built. cargo: a crate, built with its own lock file.
   */
  from: { go: string; packages: string[]; env?: Record<string, string>; support?: string[] } | { crate: string };
  programs: string[];
}

const peersDir = resolve(import.meta.dir, "../peers");

export const sources: PeerSource[] = [
  {
    name: "tailscale",
    version: "1.102.5",
    from: {
      go: "tailscale-1.102.5",
      packages: ["tailscale.com/cmd/tailscaled", "tailscale.com/cmd/tailscale", "tailscale.com/cmd/derper"],
    },
    programs: ["tailscaled", "tailscale", "derper"],
  },
  {
    name: "tailscale",
    version: "1.80.3",
    from: {
      go: "tailscale-1.80.3",
      packages: ["tailscale.com/cmd/tailscaled", "tailscale.com/cmd/tailscale"],
      env: { GOTOOLCHAIN: "go1.24.9" },
    },
    programs: ["tailscaled", "tailscale"],
  },
  {
    name: "tailscale",
    version: "1.62.1",
    from: {
      go: "tailscale-1.62.1",
      packages: ["tailscale.com/cmd/tailscaled", "tailscale.com/cmd/tailscale"],
      env: { GOTOOLCHAIN: "go1.24.9" },
    },
    programs: ["tailscaled", "tailscale"],
  },
  {
    // The client for browsers.
    name: "tsconnect",
    version: "1.102.5",
    from: {
      go: "tailscale-1.102.5",
      packages: ["tailscale.com/cmd/tsconnect/wasm"],
      env: { GOOS: "js", GOARCH: "wasm" },
      support: ["lib/wasm/wasm_exec.js"],
    },
    programs: ["wasm", "wasm_exec.js"],
  },
  {
    name: "wireguard-go",
    version: "0.0.0-20260522210424-ecfc5a8d5446",
    from: { go: "wireguard-go", packages: ["golang.zx2c4.com/wireguard"] },
    programs: ["wireguard"],
  },
  {
    name: "headscale",
    version: "0.28.0",
    // Its modules are not all in the checksum database; go.sum pins each of them all the same.
    from: { go: "headscale", packages: ["github.com/juanfont/headscale/cmd/headscale"], env: { GOSUMDB: "off" } },
    programs: ["headscale"],
  },
  { name: "tailscale-api", version: "2.9.0", from: { go: "tailscale-api", packages: ["."] }, programs: ["apiclient"] },
  { name: "boringtun", version: "0.7.1", from: { crate: "boringtun-cli" }, programs: ["boringtun-cli"] },
  { name: "gotatun", version: "0.10.2", from: { crate: "gotatun-cli" }, programs: ["gotatun"] },
];

/** WEFT_PEERS, or `weft/peers` in the user's cache folder. */
export function cacheDir(): string {
  return process.env.WEFT_PEERS ?? join(process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache"), "weft", "peers");
}

/** Changes with every input of the build, so that a stale cache is never used. */
export function stamp(source: PeerSource): string {
  const hash = createHash("sha256").update(JSON.stringify(source)).update(process.arch);
  if ("go" in source.from) {
    const folder = join(peersDir, source.from.go);
    for (const file of readdirSync(folder).sort()) hash.update(readFileSync(join(folder, file)));
  }
  return hash.digest("hex").slice(0, 16);
}

export function moduleDir(source: PeerSource): string | null {
  return "go" in source.from ? join(peersDir, source.from.go) : null;
}

export function installDir(source: PeerSource): string {
  return join(cacheDir(), `${source.name}-${source.version}-${stamp(source)}`);
}

/** Path of a program, or null when it is not in the cache. `version` is needed where there are several. */
export function peer(program: string, version?: string): string | null {
  const source = sources.find((s) => s.programs.includes(program) && (!version || s.version === version));
  if (!source) throw new Error(`no source provides ${program} ${version ?? ""}; see test/lib/peers.ts`);
  const path = join(installDir(source), program);
  return existsSync(path) ? path : null;
}

/** What to print beside a skipped test: which of `paths` are absent and how to get them. Null when all are there. */
export function missing(programs: [program: string, version?: string][]): string | null {
  const absent = programs.filter(([program, version]) => peer(program, version) === null).map((p) => p.join(" "));
  return absent.length ? `${absent.join(", ")} not built: \`bun run peers\` installs it` : null;
}
