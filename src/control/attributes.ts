// Attributes of nodes that postures compare, "custom:NAME": set over the API, by an administrator, or by the node itself.
// Those that were set for a time are taken away when it is over.
//
// A name that an administrator has set on some node is the administrators': no node can set it of itself, neither where it
// was set nor elsewhere, or a posture on it would let everybody in who claims it. What nodes had said under it is forgotten.
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Change, DocumentChange, Millis, NodeRecord } from "./model.ts";

export type AttributeValue = string | number | boolean;

declare module "./model.ts" {
  interface Documents {
    /** When attributes end, by their names; by the id of the node. */
    attributeexpiry: Readonly<Record<string, Millis>>;
    /** Names that are the administrators': since when. */
    attributename: Millis;
  }
}

export const ATTRIBUTE_NAME = /^custom:[A-Za-z0-9_]{1,50}$/;
const MAX_ATTRIBUTES = 100;

type Update = Readonly<Record<string, { value: AttributeValue; expiry: Millis | null } | null>>;
type Context = Pick<ControlContext, "model" | "journal" | "now">;

export function expiriesOf({ model }: Pick<Context, "model">, { id }: NodeRecord): Readonly<Record<string, Millis>> {
  return model.documents("attributeexpiry").get(String(id)) ?? {};
}

/** What an administrator sets; null takes one away, and frees the name with the last of them. Throws CommandError. */
export async function setAttribute(
  context: Context,
  node: NodeRecord,
  name: string,
  entry: Update[string],
): Promise<void> {
  const { model, now } = context;
  const isOwned = model.documents("attributename").has(name);
  const others = [...model.nodes.values()].filter((other) => other.id !== node.id && name in other.attributes);
  const change: Change = {};
  if (entry && !isOwned) {
    change.documents = [{ kind: "attributename", id: name, value: now() }];
    change.nodes = others.map((other) => ({ ...other, attributes: without(other.attributes, name) }));
  }
  if (!entry && isOwned && others.length === 0) change.documents = [{ kind: "attributename", id: name, value: null }];
  await changeAttributes(context, node, { [name]: entry ?? null }, change);
}

/** What a node says of itself. Throws CommandError. */
export async function tellAttributes(
  context: Context,
  node: NodeRecord,
  told: Readonly<Record<string, AttributeValue | null>>,
): Promise<void> {
  const owned = Object.keys(told).find((name) => context.model.documents("attributename").has(name));
  if (owned !== undefined)
    throw new CommandError(403, `${owned} is set by administrators: no machine can set it of itself`);
  const entries = Object.entries(told).map(([name, value]) => [name, value === null ? null : { value, expiry: null }]);
  await changeAttributes(context, node, Object.fromEntries(entries));
}

function without<T>(record: Readonly<Record<string, T>>, name: string): Record<string, T> {
  const { [name]: _, ...rest } = record;
  return rest;
}

/** Null takes one away; `expiry` null: it stays. `more`: of the same change. Throws CommandError. */
async function changeAttributes(context: Context, node: NodeRecord, update: Update, more: Change = {}): Promise<void> {
  const attributes = { ...node.attributes };
  const before = expiriesOf(context, node);
  const expiries = { ...before };
  for (const [name, entry] of Object.entries(update)) {
    delete attributes[name];
    delete expiries[name];
    if (entry) attributes[name] = entry.value;
    if (entry?.expiry != null) expiries[name] = entry.expiry;
  }
  if (Object.keys(attributes).length > MAX_ATTRIBUTES)
    throw new CommandError(400, `a node has at most ${MAX_ATTRIBUTES} attributes`);
  const hasExpiries = Object.keys(before).length + Object.keys(expiries).length > 0;
  await context.journal.commit({
    nodes: [...(more.nodes ?? []), { ...node, attributes }],
    documents: [...(more.documents ?? []), ...(hasExpiries ? [expiriesChange(node.id, expiries)] : [])],
  });
}

/** Takes away what is over, and forgets nodes that are gone. */
export async function sweepAttributes(context: Context): Promise<void> {
  const { model, journal, now } = context;
  for (const [id, expiries] of model.documents("attributeexpiry")) {
    const node = model.nodes.get(Number(id));
    const over = Object.entries(expiries).filter(([, expiry]) => expiry <= now());
    if (!node) await journal.commit({ documents: [expiriesChange(Number(id), {})] });
    else if (over.length > 0)
      await changeAttributes(context, node, Object.fromEntries(over.map(([name]) => [name, null])));
  }
}

function expiriesChange(nodeId: number, expiries: Readonly<Record<string, Millis>>): DocumentChange {
  const value = Object.keys(expiries).length > 0 ? expiries : null;
  return { kind: "attributeexpiry", id: String(nodeId), value };
}
