// What peers see of a node's Hostinfo. The node says what it likes in it, and a client gives up on the whole netmap when one
// field has the wrong form (Go's JSON decoder): so only fields that clients know go out, and only as they must be. What is
// private or would churn stays here: NetInfo, log ids, push tokens, requested tags, the environment.
import { formatPrefix, parsePrefix } from "../wire/ip.ts";
import type { Hostinfo, Service } from "../wire/tailcfg.ts";

const TEXTS = [
  ...["IPNVersion", "OS", "OSVersion", "Distro", "DistroVersion", "DistroCodeName", "App", "Package", "DeviceModel"],
  ...["Hostname", "Machine", "GoArch", "GoArchVar", "GoVersion", "Cloud", "ServicesHash", "ExitNodeID"],
];
const FLAGS = [
  ...["Container", "Desktop", "ShieldsUp", "ShareeNode", "NoLogsNoSupport", "RemoteConfig", "WireIngress"],
  ...["IngressEnabled", "AllowsUpdate", "Userspace", "UserspaceRouter", "AppConnector", "PeerRelay", "StateEncrypted"],
];
const LISTS = ["WoLMACs", "sshHostKeys"];
/** Of one node: what goes beyond is left out. */
const MAX_ITEMS = 1024;

const known = new WeakMap<Hostinfo, Hostinfo>();

/** The same object for the same Hostinfo. */
export function peerHostinfo(hostinfo: Hostinfo): Hostinfo {
  let visible = known.get(hostinfo);
  if (!visible) {
    visible = cleaned(hostinfo);
    known.set(hostinfo, visible);
  }
  return visible;
}

function cleaned(hostinfo: Hostinfo): Hostinfo {
  const out: Hostinfo = {};
  for (const name of TEXTS) if (isText(hostinfo[name]) && hostinfo[name] !== "") out[name] = hostinfo[name];
  for (const name of FLAGS) if (typeof hostinfo[name] === "boolean") out[name] = hostinfo[name];
  for (const name of LISTS) {
    const texts = itemsOf(hostinfo[name]).filter(isText);
    if (texts.length > 0) out[name] = texts;
  }
  const routes = itemsOf(hostinfo.RoutableIPs).flatMap((item) => {
    const prefix = isText(item) ? parsePrefix(item) : null;
    return prefix ? [formatPrefix(prefix)] : [];
  });
  if (routes.length > 0) out.RoutableIPs = routes;
  const services = itemsOf(hostinfo.Services).flatMap(serviceOf);
  if (services.length > 0) out.Services = services;
  const location = locationOf(hostinfo.Location);
  if (location) out.Location = location;
  return out;
}

function isText(value: unknown): value is string {
  return typeof value === "string";
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function itemsOf(value: unknown): unknown[] {
  return Array.isArray(value) ? value.slice(0, MAX_ITEMS) : [];
}

function serviceOf(value: unknown): Service[] {
  if (!isObject(value) || !isText(value.Proto)) return [];
  const { Proto, Port, Description } = value;
  if (!Number.isInteger(Port) || (Port as number) < 0 || (Port as number) > 65_535) return [];
  return [{ Proto, Port: Port as number, ...(isText(Description) && Description !== "" && { Description }) }];
}

function locationOf(value: unknown): Record<string, unknown> | null {
  if (!isObject(value)) return null;
  const texts = ["Country", "CountryCode", "City", "CityCode"].filter((name) => isText(value[name]));
  const numbers = ["Latitude", "Longitude"].filter((name) => Number.isFinite(value[name]));
  if (Number.isInteger(value.Priority) && Math.abs(value.Priority as number) < 2 ** 31) numbers.push("Priority");
  const names = [...texts, ...numbers];
  return names.length > 0 ? Object.fromEntries(names.map((name) => [name, value[name]])) : null;
}
