// The smaller endpoints inside Noise (spec/ts2021-control-protocol.md, section 22): who am I, answers to pings, health,
// device attributes, audit log, and whether a feature is there.
import type { Hono } from "hono";
import { ATTRIBUTE_NAME, tellAttributes } from "./attributes.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import { ofGreediest } from "./login.ts";
import type { MachineRequest, MachineRouter } from "./machine.ts";
import type { Millis, NodeRecord } from "./model.ts";
import { timeText } from "./netmap.ts";
import { isExpired } from "./register.ts";
import { BadRequest, type Fields, objectOf, requiredNodeKey, text } from "./requests.ts";

/** What a client did and why, as it told: "DISCONNECT_NODE" with the reason its user gave. */
export interface ClientAuditRecord {
  nodeId: number;
  action: string;
  details: string;
  /** RFC 3339, by the client's clock; "" when it told none. */
  clientTime: string;
  at: Millis;
}

declare module "./model.ts" {
  interface Documents {
    /** By running number. */
    clientaudit: ClientAuditRecord;
  }
}

const MAX_AUDIT = 1000;
const MAX_DETAILS = 2000;
const MAX_ATTRIBUTE = 256;
/** Warnings that are kept of one node. */
const MAX_HEALTH = 32;

/** The node that a request names by its key. Throws BadRequest unless it is this machine's and may use the server. */
export function nodeOf(ctx: ControlContext, fields: Fields, machineKey: string): NodeRecord {
  const node = ctx.model.nodeByKey(requiredNodeKey(fields));
  if (!node || node.machineKey !== machineKey) throw new BadRequest("node not found", 404);
  if (node.suspended) throw new BadRequest("the user of this node is suspended: ask an administrator", 403);
  if (!node.authorized) throw new BadRequest("this node waits for an administrator to let it in", 403);
  if (isExpired(node, ctx.now())) throw new BadRequest("the key of this node has expired: log in again", 403);
  return node;
}

/** What clients say is wrong with them, by node and subsystem. In memory: they say it again when they connect. */
export class ClientHealth {
  private readonly problems = new Map<number, Map<string, string>>();

  set(nodeId: number, subsystem: string, problem: string): void {
    const list = this.problems.get(nodeId) ?? new Map<string, string>();
    list.delete(subsystem);
    if (problem !== "" && list.size < MAX_HEALTH) list.set(subsystem, problem);
    if (list.size > 0) this.problems.set(nodeId, list);
    else this.problems.delete(nodeId);
  }

  /** The node was deleted. */
  forget(nodeId: number): void {
    this.problems.delete(nodeId);
  }

  /** For the debug page: node id -> subsystem -> problem. */
  list(): Record<string, Record<string, string>> {
    return Object.fromEntries([...this.problems].map(([id, list]) => [id, Object.fromEntries(list)]));
  }
}

/** Newest first. */
export function clientAudit(ctx: ControlContext): ClientAuditRecord[] {
  return [...ctx.model.documents("clientaudit")].sort(([a], [b]) => Number(b) - Number(a)).map(([, record]) => record);
}

/** Adds the endpoints; returns what a debug page shows of them. */
export function addFeatures(ctx: ControlContext, machines: MachineRouter, app: Hono): { health: ClientHealth } {
  const health = new ClientHealth();
  const answerPing = (query: string | null, machineKey: string | null, body: Uint8Array): boolean =>
    query !== null && ctx.pings.answer(query, machineKey, body);

  machines
    .on("GET", "/machine/whoami", ({ connection }) => whoAmI(ctx, connection))
    // An answer that comes too late is none of the client's faults.
    .on("HEAD", "/machine/ping-response", ({ query, connection, body }) => {
      answerPing(query.get("id"), connection.machineKey, body);
      return { status: 200 };
    })
    .on("POST", "/machine/ping-response", ({ query, connection, body }) => {
      answerPing(query.get("id"), connection.machineKey, body);
      return { status: 200 };
    })
    .on("POST", "/machine/update-health", (request) => {
      const fields = objectOf(request.body);
      if (!fields.NodeKey) return { status: 204 };
      const node = nodeOf(ctx, fields, request.connection.machineKey);
      health.set(node.id, text(fields, "Subsys", 64), text(fields, "Error", 1000));
      return { status: 204 };
    })
    .on("PATCH", "/machine/set-device-attr", (request) => setAttributes(ctx, request))
    .on("POST", "/machine/audit-log", (request) => audit(ctx, request))
    .on("POST", "/machine/feature/query", (request) => queryFeature(ctx, request));

  // The same for a client that answers outside of Noise: the id alone is the proof.
  app.get("/machine/ping-response", (c) => {
    return c.body(null, answerPing(c.req.query("id") ?? null, null, new Uint8Array()) ? 200 : 404);
  });
  return { health };
}

function whoAmI(ctx: ControlContext, { machineKey, version }: MachineRequest["connection"]) {
  const nodes = ctx.model.nodesOfMachine(machineKey).map((node) => {
    const until = node.expiry === null ? "" : `, key until ${timeText(node.expiry)}`;
    return `node ${node.id}: ${node.givenName}.${ctx.config.baseDomain}, ${[node.ipv4, node.ipv6].filter(Boolean).join(", ")}${until}`;
  });
  const lines = [`${machineKey} (capability version ${version})`, ...nodes];
  return { status: 200, text: `${lines.join("\n")}\n` };
}

async function setAttributes(ctx: ControlContext, { body, connection }: MachineRequest) {
  const fields = objectOf(body);
  const node = nodeOf(ctx, fields, connection.machineKey);
  const update = fields.Update;
  if (typeof update !== "object" || update === null || Array.isArray(update))
    throw new BadRequest("Update is not an object");
  const told: Parameters<typeof tellAttributes>[2] = Object.fromEntries(
    Object.entries(update).map(([name, value]) => {
      if (!ATTRIBUTE_NAME.test(name))
        throw new BadRequest(`"${name.slice(0, 80)}" is no attribute that a node may set: it must be custom:NAME`);
      const isPlain = typeof value === "boolean" || (typeof value === "number" && Number.isFinite(value));
      if (value !== null && !isPlain && !(typeof value === "string" && value.length <= MAX_ATTRIBUTE))
        throw new BadRequest(
          `the value of ${name} is no text of at most ${MAX_ATTRIBUTE} characters, number or boolean`,
        );
      return [name, value];
    }),
  );
  try {
    await tellAttributes(ctx, node, told);
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    throw new BadRequest(error.message, error.status === 403 ? 403 : 400);
  }
  return { json: {} };
}

async function audit(ctx: ControlContext, { body, connection }: MachineRequest) {
  const fields = objectOf(body);
  const node = nodeOf(ctx, fields, connection.machineKey);
  const entries = [...ctx.model.documents("clientaudit")].sort(([a], [b]) => Number(a) - Number(b));
  const value: ClientAuditRecord = {
    nodeId: node.id,
    action: text(fields, "Action", 64),
    details: text(fields, "Details", 65536).slice(0, MAX_DETAILS),
    clientTime: text(fields, "Timestamp", 64),
    at: ctx.now(),
  };
  // Who tells much pushes out his own.
  const surplus = entries.length < MAX_AUDIT ? [] : ofGreediest(entries, ({ nodeId }) => nodeId).slice(0, 1);
  await ctx.journal.commit({
    documents: [
      ...surplus.map(([id]) => ({ kind: "clientaudit" as const, id, value: null })),
      { kind: "clientaudit", id: String(Number(entries.at(-1)?.[0] ?? 0) + 1), value },
    ],
  });
  ctx.log(
    `node ${node.id} (${node.givenName}) tells ${JSON.stringify(value.action)}: ${JSON.stringify(value.details)}`,
  );
  return { status: 200 };
}

function queryFeature(ctx: ControlContext, { body, connection }: MachineRequest) {
  const fields = objectOf(body);
  nodeOf(ctx, fields, connection.machineKey);
  const feature = text(fields, "Feature", 64);
  if (feature === "serve") {
    if (ctx.config.certificates) return { json: { Complete: true } };
    return {
      json: {
        Complete: false,
        Text: "Serve by HTTPS needs certificates, and this control server has no DNS provider for them.\nIts operator can name one (dns.certificates). Serve by plain HTTP and TCP works as it is.\n",
      },
    };
  }
  if (feature === "funnel")
    return {
      json: { Complete: false, Text: "Funnel is not available: this control server runs no public entry points.\n" },
    };
  return {
    json: { Complete: false, Text: `This control server does not know the feature ${JSON.stringify(feature)}.\n` },
  };
}
