// Attributes of nodes that postures compare, "custom:NAME": set over the API, by an administrator, or by the node itself.
// Those that were set for a time are taken away when it is over.
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { DocumentChange, Millis, NodeRecord } from "./model.ts";

export type AttributeValue = string | number | boolean;

declare module "./model.ts" {
  interface Documents {
    /** When attributes end, by their names; by the id of the node. */
    attributeexpiry: Readonly<Record<string, Millis>>;
  }
}

export const ATTRIBUTE_NAME = /^custom:[A-Za-z0-9_]{1,50}$/;
const MAX_ATTRIBUTES = 100;

type Context = Pick<ControlContext, "model" | "journal" | "now">;

export function expiriesOf({ model }: Pick<Context, "model">, { id }: NodeRecord): Readonly<Record<string, Millis>> {
  return model.documents("attributeexpiry").get(String(id)) ?? {};
}

/** Sets these, null takes one away. `expiry` null: it stays. Throws CommandError. */
export async function changeAttributes(
  context: Context,
  node: NodeRecord,
  update: Readonly<Record<string, { value: AttributeValue; expiry: Millis | null } | null>>,
): Promise<void> {
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
    nodes: [{ ...node, attributes }],
    ...(hasExpiries && { documents: [expiriesChange(node.id, expiries)] }),
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
