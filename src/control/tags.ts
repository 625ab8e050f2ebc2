// Tags make a node a role instead of somebody's machine: it belongs to nobody, its key does not expire, and the policy
// names it (spec/headscale-features.md, sections 15 and 22.10).
//
//   by key     a pre-auth key with tags gives them; a client may ask for no others
//   by owner   who signs in may ask for tags (`--advertise-tags`) that the policy's tagOwners give to that user
//   by admin   any tag that the policy knows; never back to none: that takes a login of a user on the machine
import type { PolicyAccess } from "./access.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { NodeRecord } from "./model.ts";
import { tagProblem } from "./names.ts";

/** What clients and administrators are told when tags are not to be had. */
export function refusedTags(tags: readonly string[], what: string): string {
  return `requested tags [${tags.join(" ").slice(0, 200)}] are invalid or not permitted: ${what}`;
}

/** The tags that a client asks for, sorted, each once. */
export function requestedTags(hostinfo: NodeRecord["hostinfo"]): string[] {
  return [...new Set(hostinfo.RequestTags ?? [])].sort();
}

/** Why this user may not have a node with these tags; null when she may. */
export function claimProblem(access: PolicyAccess, userId: number, tags: readonly string[]): string | null {
  const refused = tags.filter((tag) => tagProblem(tag) !== null || !access.mayClaim(tag, { userId }));
  return refused.length === 0
    ? null
    : refusedTags(refused, "the policy's tagOwners do not give them to the user who signed in");
}

/** The node with tags: nobody's, and its key does not expire. */
export function tagged(node: NodeRecord, tags: readonly string[]): NodeRecord {
  return { ...node, tags: [...new Set(tags)].sort(), userId: null, expiry: null, expired: false };
}

/** By an administrator, who needs not own them. Throws CommandError. */
export async function setTags(ctx: ControlContext, nodeId: number, tags: readonly string[]): Promise<NodeRecord> {
  const node = ctx.model.nodes.get(nodeId);
  if (!node) throw new CommandError(404, `there is no node ${nodeId}: weft nodes list shows those that exist`);
  if (tags.length === 0)
    throw new CommandError(
      400,
      "the tags of a node cannot all be taken away: to give it to a user, log in on the machine with --advertise-tags= --force-reauth",
    );
  for (const tag of tags) {
    const problem = tagProblem(tag);
    if (problem) throw new CommandError(400, problem);
  }
  const unknown = tags.filter((tag) => !ctx.access.hasTag(tag));
  if (unknown.length > 0)
    throw new CommandError(400, refusedTags(unknown, "the policy has no such tag in its tagOwners"));
  const next = tagged(node, tags);
  await ctx.journal.commit({ nodes: [next] });
  return next;
}
