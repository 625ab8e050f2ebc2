// A DERP map as operators write it, in a file, behind a URL or in a policy: Headscale's spelling of the fields or the
// protocol's (spec/headscale-features.md, section 2.3). Pure.
import { z } from "zod";
import type * as tc from "../wire/tailcfg.ts";

const FIELDS = {
  map: ["Regions", "HomeParams", "omitDefaultRegions"],
  home: ["RegionScore"],
  region: ["RegionID", "RegionCode", "RegionName", "Latitude", "Longitude", "Avoid", "NoMeasureNoHome", "Nodes"],
  node: [
    ...["Name", "RegionID", "HostName", "CertName", "IPv4", "IPv6", "STUNPort", "STUNOnly", "DERPPort"],
    ...["InsecureForTests", "STUNTestIP", "CanPort80"],
  ],
};

// Each field that clients know has its kind: of a map with another one they read nothing, nor anything else that comes with it.
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
  InsecureForTests: z.boolean().nullish(),
  STUNTestIP: z.string().max(64).nullish(),
  CanPort80: z.boolean().nullish(),
});
const regionSchema = z.looseObject({
  RegionID: z.int().optional(),
  RegionCode: z.string().max(100).optional(),
  RegionName: z.string().max(200).optional(),
  Latitude: z.number().nullish(),
  Longitude: z.number().nullish(),
  Avoid: z.boolean().nullish(),
  NoMeasureNoHome: z.boolean().nullish(),
  Nodes: z.array(nodeSchema).min(1).max(100),
});
const mapSchema = z.looseObject({
  Regions: z.record(z.string(), regionSchema.nullable()),
  HomeParams: z.looseObject({ RegionScore: z.record(z.string().regex(/^\d{1,9}$/), z.number()).nullish() }).nullish(),
  omitDefaultRegions: z.boolean().nullish(),
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
  return derpMapOf(value);
}

/** Of a value as it was written. Regions that are null take others out. Throws with one sentence. */
export function derpMapOf(value: unknown): tc.DERPMap {
  const map = respelled(value, FIELDS.map) as Record<string, unknown>;
  if (map?.HomeParams) map.HomeParams = respelled(map.HomeParams, FIELDS.home);
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
