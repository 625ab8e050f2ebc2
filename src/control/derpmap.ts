// The relays that clients are told of: maps from URLs, from files, and the relay of this process, in this order; the later
// one wins region by region, and a region that is null takes an earlier one out (spec/headscale-features.md, section 13).
//
// URLs are asked again now and then, sooner when one failed; files are read again when they change. What failed keeps what
// it said last. A changed map goes to every open map stream.
import { createHash } from "node:crypto";
import type * as tc from "../wire/tailcfg.ts";
import { parseDerpMap } from "./derpmap-parse.ts";
import type { DerpSettings } from "./settings.ts";
import { FileWatch, readSmallFile } from "./watch.ts";

const MAX_BYTES = 4 * 1024 * 1024;
/** Milliseconds for one URL; until the next try after a failure, doubling. */
const FETCH = 10_000;
const FIRST_RETRY = 10_000;
const MAX_RETRY = 15 * 60_000;

/** Later maps win. Without regions that are null; the nodes of a region in an order that `seed` decides. */
export function mergeDerpMaps(maps: readonly tc.DERPMap[], seed: string): tc.DERPMap {
  const regions = new Map<string, tc.DERPRegion | null>();
  let HomeParams: tc.DERPMap["HomeParams"];
  for (const map of maps) {
    for (const [id, region] of Object.entries(map.Regions ?? {})) regions.set(id, region);
    if (map.HomeParams) HomeParams = map.HomeParams;
  }
  // Clients try the nodes of a region in their order: the same one for all, so that they meet, and another one elsewhere.
  const rank = (node: tc.DERPNode) => createHash("sha256").update(`${seed} ${node.Name}`).digest("hex");
  const shuffled = (region: tc.DERPRegion): tc.DERPRegion => ({
    ...region,
    Nodes: [...(region.Nodes ?? [])].sort((a, b) => (rank(a) < rank(b) ? -1 : 1)),
  });
  const kept = [...regions].flatMap(([id, region]) => (region ? [[id, shuffled(region)] as const] : []));
  return {
    Regions: Object.fromEntries(kept.sort(([a], [b]) => Number(a) - Number(b))),
    ...(HomeParams && { HomeParams }),
    omitDefaultRegions: true,
  };
}

/** With what a policy changes in it: null for nothing. What would leave no relay changes nothing. */
export function withPolicy(own: tc.DERPMap, policy: tc.DERPMap | null, seed: string): tc.DERPMap {
  if (!policy) return own;
  const merged = mergeDerpMaps([...(policy.omitDefaultRegions ? [] : [own]), policy], seed);
  return Object.keys(merged.Regions ?? {}).length > 0 ? merged : own;
}

/** Why the relays of a policy cannot be used with the server's own; null when they can. */
export function relayProblem(own: tc.DERPMap, policy: tc.DERPMap | null): string | null {
  const regions = Object.keys(own.Regions ?? {});
  if (!policy || regions.length === 0 || withPolicy(own, policy, "") !== own) return null;
  return `derpMap: it takes out all relays of this server (region ${regions.join(", ")}) and names none, so clients would have no relay: leave one, or name one of your own`;
}

export interface DerpMapsOptions {
  settings: DerpSettings;
  /** Decides the order of the nodes of a region: the base domain. */
  seed: string;
  /** Called when the map is another one. */
  changed(map: tc.DERPMap): void;
  log(line: string): void;
  /** 0 to 1. */
  random(): number;
  /** Milliseconds until the first retry; between looks at files. */
  firstRetry?: number;
  lookEvery?: number;
}

export class DerpMaps {
  /** What each source said last, by URL or path. */
  private readonly said = new Map<string, tc.DERPMap>();
  private watches: FileWatch[] = [];
  private timer: ReturnType<typeof setTimeout> | null = null;
  private failures = 0;
  private published = "";
  private readonly closed = new AbortController();

  constructor(private readonly options: DerpMapsOptions) {}

  /** Throws with one sentence when a file is wrong, or when no source gives a relay. */
  async start(): Promise<void> {
    const { settings } = this.options;
    for (const path of settings.paths) {
      const problem = this.readFile(path);
      if (problem) throw new Error(problem);
      this.watches.push(new FileWatch(path, () => this.fileChanged(path), this.options.lookEvery));
    }
    await this.refresh();
    if (Object.keys(this.merged().Regions ?? {}).length > 0) return;
    const sources = [...settings.urls, ...settings.paths];
    throw new Error(
      `there is no relay for clients: ${sources.length > 0 ? `none of ${sources.join(", ")} has a region` : "no DERP map is configured"}; use the relay of the box, or name a map (derp.urls, derp.paths)`,
    );
  }

  close(): void {
    this.closed.abort();
    if (this.timer) clearTimeout(this.timer);
    for (const watch of this.watches) watch.close();
    this.watches = [];
  }

  private merged(): tc.DERPMap {
    const { settings, seed } = this.options;
    const said = [...settings.urls, ...settings.paths].flatMap((source) => this.said.get(source) ?? []);
    return mergeDerpMaps([...said, ...(settings.embedded ? [settings.embedded] : [])], seed);
  }

  /** A map without regions would cut all clients off: the one before is better. */
  private publish(): void {
    const map = this.merged();
    const text = JSON.stringify(map);
    if (text === this.published) return;
    if (Object.keys(map.Regions ?? {}).length === 0) {
      if (this.published !== "") this.options.log("no DERP map has a region any more: clients keep the last ones");
      return;
    }
    this.published = text;
    this.options.changed(map);
  }

  /** Returns what is wrong with it, or null. */
  private readFile(path: string): string | null {
    try {
      this.said.set(path, parseDerpMap(readSmallFile(path, MAX_BYTES), !path.endsWith(".json")));
      return null;
    } catch (error) {
      const kept = this.said.has(path) ? "; what it said before stays" : "";
      return `the DERP map ${path} cannot be used: ${(error as Error).message}${kept}`;
    }
  }

  private fileChanged(path: string): void {
    const problem = this.readFile(path);
    if (problem) this.options.log(problem);
    else this.publish();
  }

  private async refresh(): Promise<void> {
    const { settings, log, random, firstRetry = FIRST_RETRY } = this.options;
    const failed = await Promise.all(
      settings.urls.map(async (url) => {
        try {
          this.said.set(url, await fetchDerpMap(url, this.closed.signal));
          return false;
        } catch (error) {
          if (!this.closed.signal.aborted) log(`the DERP map ${url} cannot be fetched: ${(error as Error).message}`);
          return true;
        }
      }),
    );
    if (this.closed.signal.aborted) return;
    this.publish();
    this.failures = failed.includes(true) ? this.failures + 1 : 0;
    const retry = Math.min(firstRetry * 2 ** (this.failures - 1), MAX_RETRY, settings.refreshEvery ?? MAX_RETRY);
    const wait = this.failures > 0 ? retry : settings.urls.length > 0 ? settings.refreshEvery : null;
    if (wait !== null) this.timer = setTimeout(() => this.refresh(), wait * (0.8 + 0.4 * random()));
  }
}

async function fetchDerpMap(url: string, closed: AbortSignal): Promise<tc.DERPMap> {
  const response = await fetch(url, { signal: AbortSignal.any([closed, AbortSignal.timeout(FETCH)]) });
  if (!response.ok) throw new Error(`it answered ${response.status}`);
  let text = "";
  const decoder = new TextDecoder();
  for await (const chunk of response.body ?? []) {
    text += decoder.decode(chunk, { stream: true });
    if (text.length > MAX_BYTES) throw new Error(`it is longer than ${MAX_BYTES} bytes`);
  }
  return parseDerpMap(text, false);
}
