// From untrusted JSON to the fields of register and map requests that the server uses: each is checked for type, form and
// size here, once. What a field must look like: spec/ts2021-control-protocol.md, sections 9, 10 and 15.
import { parseAddrPort } from "../wire/ip.ts";
import type { Hostinfo } from "../wire/tailcfg.ts";
import type { Millis } from "./model.ts";

/** The request is wrong; the message goes to the client as text with this status. */
export class BadRequest extends Error {
  override name = "BadRequest";
  constructor(
    message: string,
    readonly status: 400 | 403 | 404 | 409 | 413 | 429 | 501 | 503 = 400,
    /** Seconds to wait before the next attempt; 0: as the client likes. */
    readonly retryAfter = 0,
  ) {
    super(message);
  }
}

export interface RegisterInput {
  version: number;
  nodeKey: string;
  /** "" when there is none. */
  oldNodeKey: string;
  /** "" when there is none. */
  authKey: string;
  /** Null: none was asked for. */
  expiry: Millis | null;
  followup: string;
  hostinfo: Hostinfo;
  ephemeral: boolean;
}

export interface MapInput {
  version: number;
  nodeKey: string;
  /** "" when the request says nothing about it. */
  discoKey: string;
  /** Null: the request has none. */
  hostinfo: Hostinfo | null;
  /** Null: the request has none. */
  endpoints: string[] | null;
  stream: boolean;
  omitPeers: boolean;
  readOnly: boolean;
  keepAlive: boolean;
  zstd: boolean;
}

const MAX_ENDPOINTS = 64;
/** Of one node's Hostinfo as JSON: it goes to every peer. Real ones have 1 to 4 KB. */
const MAX_HOSTINFO = 64 * 1024;
const MAX_DEPTH = 32;
/** Capability versions, which the handshake has in 16 bits, and numbers of relays: what the store's columns hold. */
const MAX_VERSION = 0xffff;
const MAX_REGION = 999_999_999;

/** What this server itself reads of a Hostinfo as text. */
const HOSTINFO_TEXTS = ["Hostname", "OS", "OSVersion", "IPNVersion"] as const;

export type Fields = Record<string, unknown>;

/** Go's decoder takes field names in any case; clients write them as the protocol names them. */
export function objectOf(body: Uint8Array): Fields {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(body));
  } catch {
    throw new BadRequest("the request body is not JSON");
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new BadRequest("the request body is not a JSON object");
  return value as Fields;
}

function key(fields: Fields, name: string, prefix: string): string {
  const value = fields[name];
  if (value === undefined || value === null) return "";
  const length = prefix.length + 64;
  if (typeof value !== "string" || value.length !== length || !value.startsWith(prefix))
    throw new BadRequest(`${name} is not a key of the form ${prefix}<64 hex digits>`);
  const digits = value.slice(prefix.length).toLowerCase();
  if (!/^[0-9a-f]+$/.test(digits)) throw new BadRequest(`${name} is not a key of the form ${prefix}<64 hex digits>`);
  return /^0+$/.test(digits) ? "" : prefix + digits;
}

export function requiredNodeKey(fields: Fields): string {
  const nodeKey = key(fields, "NodeKey", "nodekey:");
  if (nodeKey === "") throw new BadRequest("NodeKey is missing or zero");
  return nodeKey;
}

export function integer(fields: Fields, name: string): number {
  const value = fields[name] ?? 0;
  if (!Number.isSafeInteger(value)) throw new BadRequest(`${name} is not a whole number`);
  return value as number;
}

function version(fields: Fields): number {
  const value = integer(fields, "Version");
  if (value < 0 || value > MAX_VERSION) throw new BadRequest(`Version ${value} is no capability version`);
  return value;
}

export function text(fields: Fields, name: string, max: number): string {
  const value = fields[name] ?? "";
  if (typeof value !== "string" || value.length > max)
    throw new BadRequest(`${name} is not a text of at most ${max} characters`);
  return value;
}

function flag(fields: Fields, name: string): boolean {
  const value = fields[name] ?? false;
  if (typeof value !== "boolean") throw new BadRequest(`${name} is neither true nor false`);
  return value;
}

/** Null for the zero time and for absence. */
export function time(fields: Fields, name: string): Millis | null {
  const value = text(fields, name, 64);
  if (value === "") return null;
  const millis = /^\d{4}-\d\d-\d\dT/.test(value) ? Date.parse(value) : Number.NaN;
  if (Number.isNaN(millis)) throw new BadRequest(`${name} is not an RFC 3339 time: ${JSON.stringify(value)}`);
  return value.startsWith("0001-01-01T") ? null : millis;
}

function isShallow(value: unknown, depth: number): boolean {
  if (typeof value !== "object" || value === null) return true;
  return depth > 0 && Object.values(value).every((inner) => isShallow(inner, depth - 1));
}

function hostinfo(fields: Fields): Hostinfo | null {
  const value = fields.Hostinfo;
  if (value === undefined || value === null) return null;
  if (typeof value !== "object" || Array.isArray(value)) throw new BadRequest("Hostinfo is not an object");
  if (!isShallow(value, MAX_DEPTH)) throw new BadRequest(`Hostinfo is nested deeper than ${MAX_DEPTH} levels`);
  if (JSON.stringify(value).length > MAX_HOSTINFO) throw new BadRequest(`Hostinfo exceeds ${MAX_HOSTINFO} bytes`);
  const info = value as Hostinfo;
  for (const name of HOSTINFO_TEXTS) {
    const field = info[name];
    if (field !== undefined && field !== null && typeof field !== "string")
      throw new BadRequest(`Hostinfo.${name} is not a text`);
  }
  const tags = info.RequestTags;
  if (tags !== undefined && tags !== null && !(Array.isArray(tags) && tags.every((tag) => typeof tag === "string")))
    throw new BadRequest("Hostinfo.RequestTags is not a list of texts");
  const netInfo: unknown = info.NetInfo;
  if (netInfo !== undefined && netInfo !== null && (typeof netInfo !== "object" || Array.isArray(netInfo)))
    throw new BadRequest("Hostinfo.NetInfo is not an object");
  return info;
}

/** Home relay that a Hostinfo names; null when it says nothing about the network. */
export function homeDerpOf(info: Hostinfo): number | null {
  if (!info.NetInfo) return null;
  const region = info.NetInfo.PreferredDERP;
  return typeof region === "number" && Number.isInteger(region) && region > 0 && region <= MAX_REGION ? region : 0;
}

/** Worth handing on to peers: an address and port, not IPv6 of one link. Sorted, each once. Null when there is no list. */
function endpoints(fields: Fields): string[] | null {
  const value = fields.Endpoints;
  if (value === undefined || value === null) return null;
  if (!Array.isArray(value)) throw new BadRequest("Endpoints is not a list");
  const usable = new Set<string>();
  for (const item of value.slice(0, MAX_ENDPOINTS)) {
    if (typeof item !== "string" || item.length > 64) throw new BadRequest("Endpoints has an item that is no address");
    const parsed = parseAddrPort(item);
    const isLinkLocal = parsed?.ip.length === 16 && parsed.ip[0] === 0xfe && (parsed.ip[1]! & 0xc0) === 0x80;
    if (parsed && !isLinkLocal && parsed.port > 0) usable.add(item);
  }
  return [...usable].sort();
}

export function parseRegister(body: Uint8Array): RegisterInput {
  const fields = objectOf(body);
  const auth = fields.Auth ?? {};
  if (typeof auth !== "object" || Array.isArray(auth)) throw new BadRequest("Auth is not an object");
  return {
    version: version(fields),
    nodeKey: requiredNodeKey(fields),
    oldNodeKey: key(fields, "OldNodeKey", "nodekey:"),
    authKey: text(auth as Fields, "AuthKey", 1024),
    expiry: time(fields, "Expiry"),
    followup: text(fields, "Followup", 2048),
    hostinfo: hostinfo(fields) ?? {},
    ephemeral: flag(fields, "Ephemeral"),
  };
}

export function parseMap(body: Uint8Array): MapInput {
  const fields = objectOf(body);
  return {
    version: version(fields),
    nodeKey: requiredNodeKey(fields),
    discoKey: key(fields, "DiscoKey", "discokey:"),
    hostinfo: hostinfo(fields),
    endpoints: endpoints(fields),
    stream: flag(fields, "Stream"),
    omitPeers: flag(fields, "OmitPeers"),
    readOnly: flag(fields, "ReadOnly"),
    keepAlive: flag(fields, "KeepAlive"),
    zstd: text(fields, "Compress", 32) === "zstd",
  };
}
