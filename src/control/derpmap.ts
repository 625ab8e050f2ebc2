// The relays that clients are told of: maps from URLs, from files, and the relay of this process, in this order; the later
// one wins region by region, and a region that is null takes an earlier one out (spec/headscale-features.md, section 13).
//
// URLs are asked again now and then, sooner when one failed; files are read again when they change. What failed keeps what
// it said last. A changed map goes to every open map stream.
import { createHash } from "node:crypto";
import { z } from "zod";
import type * as tc from "../wire/tailcfg.ts";
import type { DerpSettings } from "./settings.ts";
import { FileWatch, readSmallFile } from "./watch.ts";

const MAX_BYTES = 4 * 1024 * 1024;
/** Milliseconds for one URL; until the next try after a failure, doubling. */
const FETCH = 10_000;
const FIRST_RETRY = 10_000;
const MAX_RETRY = 15 * 60_000;

const FIELDS = {
  map: ["Regions", "HomeParams", "omitDefaultRegions"],
  region: ["RegionID", "RegionCode", "RegionName", "Latitude", "Longitude", "Avoid", "NoMeasureNoHome", "Nodes"],
  node: [
    ...["Name", "RegionID", "HostName", "CertName", "IPv4", "IPv6", "STUNPort", "STUNOnly", "DERPPort"],
    ...["InsecureForTests", "STUNTestIP", "CanPort80"],
  ],
};

const nodeSchema = z.looseObject({
  Name: z.string().min(1).max(100),
  RegionID: z.int().optional(),
  HostName: z.string().min(1).max(253),
  CertName: z.string().max(300).optional(),
  IPv4: z.string().max(64).optional(),
  IPv6: z.string().max(64).optional(),
  STUNPort: z.int().min(-1).max(65535).optional(),
  DERPPort: z.int().min(0).max(65535).optional(),
  STUNOnly: z.boolean().optional(),
});
const regionSchema = z.looseObject({
  RegionID: z.int().optional(),
  RegionCode: z.string().max(100).optional(),
  RegionName: z.string().max(200).optional(),
  Nodes: z.array(nodeSchema).min(1).max(100),
});
const mapSchema = z.looseObject({
  Regions: z.record(z.string(), regionSchema.nullable()),
});

/** With the spelling of the fields that clients know; files write them in lower case. */
function respelled(value: unknown, fields: readonly string[]): unknown {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [
      fields.find((field) => field.toLowerCase() === key.toLowerCase()) ?? key,
      inner,
    ]),
  );
}

/** Of YAML (if `yaml`) or JSON. Throws with one sentence. */
export function parseDerpMap(text: string, yaml: boolean): tc.DERPMap {
  let value: unknown;
  try {
    value = yaml ? Bun.YAML.parse(text) : JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not ${yaml ? "YAML" : "JSON"}: ${(error as Error).message}`);
  }
  const map = respelled(value, FIELDS.map) as Record<string, unknown>;
  if (typeof map?.Regions === "object" && map.Regions !== null) {
    map.Regions = Object.fromEntries(
      Object.entries(map.Regions).map(([id, inner]) => {
        const region = respelled(inner, FIELDS.region) as Record<string, unknown> | null;
        if (Array.isArray(region?.Nodes)) region.Nodes = region.Nodes.map((node) => respelled(node, FIELDS.node));
        return [id, region];
      }),
    );
  }
  const parsed = mapSchema.safeParse(map);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw new Error(`${issue.path.join(".") || "the map"}: ${issue.message}`);
  }
  const regions = Object.entries(parsed.data.Regions).map(([id, region]): [string, tc.DERPRegion | null] => {
    if (!/^[1-9]\d{0,8}$/.test(id)) throw new Error(`Regions.${id.slice(0, 40)}: the key of a region is its number`);
    if (!region) return [id, null];
    for (const number of [region.RegionID, ...region.Nodes.map((node) => node.RegionID)])
      if (number !== undefined && number !== Number(id))
        throw new Error(`Regions.${id}: RegionID ${number} is not the number of its region`);
    const RegionID = Number(id);
    return [id, { ...region, RegionID, Nodes: region.Nodes.map((node) => ({ ...node, RegionID })) } as tc.DERPRegion];
  });
  return { ...(parsed.data as tc.DERPMap), Regions: Object.fromEntries(regions) };
}

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
