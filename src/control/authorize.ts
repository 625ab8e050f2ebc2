// Approval of machines: with `settings.node.needsApproval` a new node waits until an administrator lets it in. Until then it
// has no peers and is nobody's peer, the relay does not know it, and its client shows that it waits.
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { NodeRecord } from "./model.ts";

/** Lets a node in, or puts it out again. Throws CommandError. */
export async function authorizeNode(ctx: ControlContext, nodeId: number, authorized: boolean): Promise<NodeRecord> {
  const node = ctx.model.nodes.get(nodeId);
  if (!node) throw new CommandError(404, `there is no node ${nodeId}: weft nodes list shows those that exist`);
  if (node.authorized === authorized) return node;
  const next = { ...node, authorized };
  await ctx.journal.commit({ nodes: [next] });
  return next;
}
