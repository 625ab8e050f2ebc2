// Devices, in /api/v2.
import { z } from "zod";
import { ZERO_TIME } from "../../wire/tailcfg.ts";
import { attributesOf } from "../access.ts";
import { assignIPv4 } from "../addresses.ts";
import { ATTRIBUTE_NAME, expiriesOf, setAttribute } from "../attributes.ts";
import { clientVersion } from "../client-advice.ts";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { NodeRecord } from "../model.ts";
import { namesOf, timeText } from "../netmap.ts";
import { approveRoutes, routesOf } from "../routes.ts";
import { setTags } from "../tags.ts";
import type { ApiParts } from "./index.ts";
import { type Operation, operation } from "./operation.ts";
import { pageOf } from "./page.ts";
import { empty, nextPageToken, page, tagsIn, text } from "./shapes.ts";
import {
  type ApiDevice,
  attributeIn,
  Device,
  DeviceAttributes,
  DeviceRoutes,
  deviceParam,
  tailnet,
} from "./v2-shapes.ts";

/** Of a node key whose expiry is switched on again where the configuration names none. */
const DEFAULT_EXPIRY = 180 * 24 * 60 * 60_000;

const fields = z.object({ fields: z.enum(["all", "default"]).optional() });

export function devicesV2(context: ControlContext, { commands, oauth }: ApiParts): Operation[] {
  const node = (id: string): NodeRecord => {
    const found = /^\d{1,15}$/.test(id) ? context.model.nodes.get(Number(id)) : undefined;
    if (!found) throw new CommandError(404, `there is no device ${JSON.stringify(id.slice(0, 40))}`);
    return found;
  };
  const device = (record: NodeRecord, all: boolean) => deviceOf(context, record, all);
  const attributes = (record: NodeRecord) => ({
    attributes: attributesOf(record),
    expiries: Object.fromEntries(
      Object.entries(expiriesOf(context, record)).map(([name, expiry]) => [name, timeText(expiry)]),
    ),
  });
  const tag = "Devices";
  return [
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/devices",
      id: "listTailnetDevices",
      tag,
      summary: "Devices; of other parameters, each names a field of a device and the values that it may have",
      scope: "devices:core:read",
      params: tailnet,
      query: page.extend(fields.shape),
      response: z.object({ devices: z.array(Device), nextPageToken }),
      handle({ query, c }) {
        const wanted = filtersOf(c.req.queries());
        const found = context.model
          .sortedNodes()
          .filter((record) => wanted.every((accepts) => accepts(device(record, true))));
        const { entries, more } = pageOf(found, ({ id }) => id, query);
        return { devices: entries.map((record) => device(record, query.fields === "all")), ...more };
      },
    }),
    operation({
      method: "get",
      path: "/device/{device}",
      id: "getDevice",
      tag,
      summary: "One device",
      scope: "devices:core:read",
      params: deviceParam,
      query: fields,
      response: Device,
      handle: ({ params, query }) => device(node(params.device), query.fields === "all"),
    }),
    operation({
      method: "delete",
      path: "/device/{device}",
      id: "deleteDevice",
      tag,
      summary: "Delete a device: its peers forget it at once",
      scope: "devices:core",
      params: deviceParam,
      response: empty,
      async handle({ params }) {
        await commands.deleteNode(node(params.device).id);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/authorized",
      id: "authorizeDevice",
      tag,
      summary: "Let a device in that waits for approval, or shut it out",
      scope: "devices:core",
      params: deviceParam,
      body: z.object({ authorized: z.boolean() }),
      response: empty,
      async handle({ params, body }) {
        await commands.authorizeNode(node(params.device).id, body.authorized);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/expire",
      id: "expireDeviceKey",
      tag,
      summary: "Let a device's key expire now",
      scope: "devices:core",
      params: deviceParam,
      response: empty,
      async handle({ params }) {
        await commands.expireNode(node(params.device).id, context.now());
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/ip",
      id: "setDeviceIp",
      tag,
      summary: "Give a device another IPv4 address of the tailnet's prefix",
      scope: "devices:core",
      params: deviceParam,
      body: z.object({ ipv4: text.meta({ examples: ["100.64.0.77"] }) }),
      response: empty,
      async handle({ params, body }) {
        await assignIPv4(context, node(params.device), body.ipv4);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/name",
      id: "setDeviceName",
      tag,
      summary: "Give a device another name, whole or its first label; without one it is named after its host again",
      scope: "devices:core",
      params: deviceParam,
      body: z.object({ name: text }),
      response: empty,
      async handle({ params, body }) {
        const record = node(params.device);
        const suffix = `.${context.config.baseDomain}`;
        const name = body.name.replace(/\.$/, "");
        const label = name.endsWith(suffix) ? name.slice(0, -suffix.length) : name;
        if (label === "") await commands.nameAfterHost(record.id);
        else await commands.renameNode(record.id, label);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/tags",
      id: "setDeviceTags",
      tag,
      summary: "Replace a device's tags; an empty list changes nothing",
      scope: "devices:core",
      params: deviceParam,
      body: z.object({ tags: tagsIn.nullable() }),
      response: empty,
      async handle({ params, body, caller }) {
        const record = node(params.device);
        const tags = body.tags ?? [];
        if (tags.length === 0) return {};
        if (caller.kind === "oauth") oauth.requireOwned(caller.tags, tags);
        await setTags(context, record.id, tags);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/device/{device}/key",
      id: "updateDeviceKey",
      tag,
      summary: "Switch the expiry of a device's key off, or on again",
      scope: "devices:core",
      params: deviceParam,
      body: z.object({ keyExpiryDisabled: z.boolean() }),
      response: empty,
      async handle({ params, body }) {
        const { id, expiry } = node(params.device);
        const later = context.now() + (context.settings.node.expiry ?? DEFAULT_EXPIRY);
        await commands.expireNode(id, body.keyExpiryDisabled ? null : (expiry ?? later));
        return {};
      },
    }),
    operation({
      method: "get",
      path: "/device/{device}/routes",
      id: "listDeviceRoutes",
      tag,
      summary: "What a device advertises, and what it may serve",
      scope: "devices:routes:read",
      params: deviceParam,
      response: DeviceRoutes,
      handle: ({ params }) => deviceRoutes(context, node(params.device)),
    }),
    operation({
      method: "post",
      path: "/device/{device}/routes",
      id: "setDeviceRoutes",
      tag,
      summary: "Replace what a device may serve, whether or not it advertises it yet",
      scope: "devices:routes",
      params: deviceParam,
      body: z.object({ routes: z.array(text).nullable() }),
      response: DeviceRoutes,
      handle: async ({ params, body }) =>
        deviceRoutes(context, await approveRoutes(context, node(params.device).id, body.routes ?? [])),
    }),
    operation({
      method: "get",
      path: "/device/{device}/attributes",
      id: "getDevicePostureAttributes",
      tag,
      summary: "What postures compare of a device: what was set, and what it says of itself",
      scope: "devices:posture_attributes:read",
      params: deviceParam,
      response: DeviceAttributes,
      handle: ({ params }) => attributes(node(params.device)),
    }),
    operation({
      method: "post",
      path: "/device/{device}/attributes/{attribute}",
      id: "setCustomDevicePostureAttributes",
      tag,
      summary: 'Set an attribute, "custom:NAME", for good or until a time',
      scope: "devices:posture_attributes",
      params: deviceParam.extend({ attribute: attributeName() }),
      body: attributeIn,
      response: DeviceAttributes,
      async handle({ params, body }) {
        const record = node(params.device);
        // Go's client writes the year 1 where it means nothing.
        const expiry = body.expiry && body.expiry !== ZERO_TIME ? Date.parse(body.expiry) : null;
        if (expiry !== null && expiry <= context.now())
          throw new CommandError(400, `the attribute would be over already, at ${timeText(expiry)}`);
        await setAttribute(context, record, params.attribute, { value: body.value, expiry });
        return attributes(commands.node(record.id));
      },
    }),
    operation({
      method: "delete",
      path: "/device/{device}/attributes/{attribute}",
      id: "deleteCustomDevicePostureAttributes",
      tag,
      summary: "Take an attribute away",
      scope: "devices:posture_attributes",
      params: deviceParam.extend({ attribute: attributeName() }),
      response: empty,
      async handle({ params }) {
        await setAttribute(context, node(params.device), params.attribute, null);
        return {};
      },
    }),
  ];
}

function attributeName() {
  return z
    .string()
    .regex(ATTRIBUTE_NAME, 'must be "custom:" and a name of letters, digits and "_"')
    .meta({ examples: ["custom:tier"] });
}

function deviceRoutes(context: ControlContext, record: NodeRecord) {
  const { advertised, approved } = routesOf(context, record);
  return { advertisedRoutes: [...advertised], enabledRoutes: [...approved] };
}

const NO_FILTER = ["fields", "limit", "pageToken"];

/** Throws CommandError for what is no field of a device: a filter that is not heeded would give too much. */
function filtersOf(queries: Record<string, string[]>): ((device: ApiDevice) => boolean)[] {
  return Object.entries(queries)
    .filter(([name]) => !NO_FILTER.includes(name))
    .map(([name, values]) => {
      if (!Object.hasOwn(Device.shape, name))
        throw new CommandError(400, `"${name.slice(0, 40)}" is not a field of devices that could be filtered by`);
      return (device) => {
        const value = device[name as keyof ApiDevice];
        const present = Array.isArray(value) ? value.map(String) : [String(value)];
        return values.some((wanted) => present.includes(wanted));
      };
    });
}

function deviceOf(context: ControlContext, node: NodeRecord, all: boolean): ApiDevice {
  const { hostinfo } = node;
  const owner = node.userId === null ? undefined : context.model.users.get(node.userId);
  const device: ApiDevice = {
    addresses: [node.ipv4, node.ipv6].filter((ip) => ip !== ""),
    id: String(node.id),
    nodeId: String(node.id),
    user: owner ? namesOf(owner).LoginName : "tagged-devices",
    name: `${node.givenName}.${context.config.baseDomain}`,
    hostname: node.hostname,
    clientVersion: word(hostinfo.IPNVersion),
    updateAvailable: clientVersion(node, context.config.clients)?.LatestVersion !== undefined,
    os: word(hostinfo.OS),
    created: timeText(node.createdAt),
    connectedToControl: node.online,
    ...(!node.online && { lastSeen: timeText(node.lastSeen ?? node.createdAt) }),
    keyExpiryDisabled: node.expiry === null,
    expires: node.expiry === null ? ZERO_TIME : timeText(node.expiry),
    authorized: node.authorized,
    isExternal: false,
    isEphemeral: node.ephemeral,
    machineKey: node.machineKey,
    nodeKey: node.nodeKey,
    blocksIncomingConnections: hostinfo.ShieldsUp === true,
    ...(node.tags.length > 0 && { tags: [...node.tags] }),
    tailnetLockError: "",
    tailnetLockKey: "",
  };
  if (!all) return device;
  const net = hostinfo.NetInfo ?? {};
  return {
    ...device,
    ...deviceRoutes(context, node),
    sshEnabled: Array.isArray(hostinfo.sshHostKeys) && hostinfo.sshHostKeys.length > 0,
    clientConnectivity: {
      endpoints: [...node.endpoints],
      mappingVariesByDestIP: net.MappingVariesByDestIP === true,
      latency: latencyOf(node, context),
      clientSupports: {
        // Clients do not look for it any more.
        hairPinning: false,
        ipv6: net.WorkingIPv6 === true,
        pcp: net.PCP === true,
        pmp: net.PMP === true,
        udp: net.WorkingUDP === true,
        upnp: net.UPnP === true,
      },
    },
    ...(hostinfo.Distro && {
      distro: {
        name: word(hostinfo.Distro),
        version: word(hostinfo.DistroVersion),
        codeName: word(hostinfo.DistroCodeName),
      },
    }),
  };
}

/** By name of the region; clients tell seconds by "<region>-v4" and "-v6". */
function latencyOf({ hostinfo, homeDerp }: NodeRecord, { config }: ControlContext) {
  const told: unknown = hostinfo.NetInfo?.DERPLatency;
  const latency: Record<string, { latencyMs: number; preferred?: boolean }> = {};
  for (const [key, seconds] of Object.entries(typeof told === "object" && told !== null ? told : {}).slice(0, 1000)) {
    const region = Number(/^(\d{1,9})-v[46]$/.exec(key)?.[1]);
    if (!Number.isSafeInteger(region) || typeof seconds !== "number" || !Number.isFinite(seconds)) continue;
    const name = config.derpMap.Regions?.[region]?.RegionName ?? String(region);
    const latencyMs = seconds * 1000;
    if (latency[name] && latency[name].latencyMs <= latencyMs) continue;
    latency[name] = { latencyMs, ...(region === homeDerp && { preferred: true }) };
  }
  return latency;
}

/** What a node says of itself may be of any type. */
function word(value: unknown): string {
  return typeof value === "string" ? value : "";
}
