// What this server says of itself to anybody: health, version, an icon, and what clients ask before they know anything.
import { Resolver } from "node:dns/promises";
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import { join } from "node:path";
import type { Hono } from "hono";
import manifest from "../../package.json" with { type: "json" };
import type { DERPMap } from "../wire/tailcfg.ts";

export interface ServerInfo {
  /** Whether the store answers. */
  healthy(): Promise<boolean>;
  derpMap(): DERPMap;
  now(): number;
}

/** Names of relays that are looked up, and how long an answer is kept and waited for, in milliseconds. */
const MAX_NAMES = 64;
const KEEP_NAMES = 10 * 60_000;
const NAME_TIMEOUT = 3_000;
/** A mesh of threads, as SVG. */
const ICON = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="none" stroke="#2457d6" stroke-width="2"><path d="M2 5h12M2 11h12M5 2v12M11 2v12"/></svg>`;
const CHALLENGE = /^[A-Za-z0-9.\-_:]{1,64}$/;

/** What a checkout's HEAD names, in hex; "" where there is none, as in a release without .git. `root`: the checkout. */
export function commitOf(root: string): string {
  const read = (name: string): string => {
    try {
      return readFileSync(join(root, ".git", name), "utf8");
    } catch {
      return "";
    }
  };
  const head = read("HEAD").trim();
  const ref = /^ref: (refs\/[\w./-]+)$/.exec(head)?.[1];
  const packed = () =>
    read("packed-refs")
      .split("\n")
      .find((line) => line.endsWith(` ${ref}`))
      ?.slice(0, 40) ?? "";
  const commit = ref ? read(ref).trim() || packed() : head;
  return /^[0-9a-f]{40}$/.test(commit) ? commit : "";
}

export function addServerInfo(app: Hono, info: ServerInfo): void {
  const commit = commitOf(join(import.meta.dir, "../.."));
  app.get("/health", async (c) => {
    const isHealthy = await info.healthy();
    return c.body(`{"status":"${isHealthy ? "pass" : "fail"}"}`, isHealthy ? 200 : 500, {
      "Content-Type": "application/health+json",
    });
  });
  app.get("/version", (c) =>
    c.json({
      // UIs written for Headscale take a number as a version of that, and do without what it lacked; a word is all that is new.
      version: `weft-${manifest.version}`,
      ...(commit !== "" && { commit }),
      bun: Bun.version,
      os: process.platform,
      arch: process.arch,
    }),
  );
  app.get("/favicon.ico", (c) =>
    c.body(ICON, 200, { "Content-Type": "image/svg+xml", "Cache-Control": "public, max-age=86400" }),
  );
  app.get("/robots.txt", (c) => c.text("User-agent: *\nDisallow: /\n"));
  // Is there a captive portal in between? Whatever answers instead does not know the challenge.
  app.all("/generate_204", (c) => {
    const challenge = c.req.header("X-Tailscale-Challenge") ?? "";
    if (CHALLENGE.test(challenge)) c.header("X-Tailscale-Response", `response ${challenge}`);
    c.header("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0");
    return c.body(null, 204);
  });

  let known: { until: number; addresses: Promise<Record<string, string[]>> } | null = null;
  // For clients whose DNS does not work: addresses of the relays, and of nothing else.
  app.get("/bootstrap-dns", async (c) => {
    if (!known || known.until <= info.now())
      known = { until: info.now() + KEEP_NAMES, addresses: lookUp(info.derpMap()) };
    return c.json(await known.addresses);
  });
}

/** Addresses by name of all relays; a name that is not found has none. */
async function lookUp({ Regions }: DERPMap): Promise<Record<string, string[]>> {
  const nodes = Object.values(Regions ?? {}).flatMap((region) => region?.Nodes ?? []);
  const names = [...new Set(nodes.map(({ HostName }) => HostName))].slice(0, MAX_NAMES);
  const resolver = new Resolver({ timeout: NAME_TIMEOUT, tries: 1 });
  const entries = names.map(async (name): Promise<[string, string[]]> => {
    if (isIP(name)) return [name, [name]];
    const answers = await Promise.allSettled([resolver.resolve4(name), resolver.resolve6(name)]);
    return [name, answers.flatMap((answer) => (answer.status === "fulfilled" ? answer.value : []))];
  });
  return Object.fromEntries(await Promise.all(entries));
}
