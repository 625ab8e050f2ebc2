// /api/v1/policy/…: questions about the policy that Headscale's API does not know: its history, why a connection is let
// through or not, and what another policy would change.
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { timeText } from "../netmap.ts";
import { type Operation, operation, POLICY_BODY } from "./operation.ts";
import { policyErrors } from "./policy-errors.ts";

const place = z.object({ line: z.int(), column: z.int() });
const count = z.int().nonnegative();

export const PolicyHistory = z
  .object({
    versions: z.array(
      z.object({
        version: z.string(),
        updatedAt: z.string().nullable(),
        by: z.string(),
        etag: z.string(),
        policy: z.string(),
      }),
    ),
  })
  .meta({ id: "PolicyHistory" });

const PolicyRule = z
  .object({
    section: z.enum(["acls", "grants"]),
    index: z.int(),
    place,
    line: z.string().meta({ description: "The line of the policy." }),
  })
  .meta({ id: "PolicyRule" });

export const PolicyExplanation = z
  .object({
    verdict: z.enum(["allowed", "partly", "denied"]),
    protocol: z.string(),
    port: z.int(),
    pairs: count,
    allowed: count,
    complete: z.boolean().meta({ description: "False: there are more pairs than were looked at." }),
    rules: z.array(
      z.object({
        rule: PolicyRule.nullable().meta({ description: "Null: the policy has no rules, so all may reach all." }),
        pairs: count,
        examples: z.array(z.string()),
      }),
    ),
    denied: z.array(z.string()),
    nearest: z.array(z.object({ rule: PolicyRule, misses: z.array(z.string()) })),
  })
  .meta({ id: "PolicyExplanation" });

const NodeGroup = z.object({ count, names: z.array(z.string()) }).meta({ id: "PolicyNodeGroup" });

export const PolicyComparison = z
  .object({
    same: z.boolean(),
    complete: z.boolean().meta({ description: "False: not everything was compared, or there is more than is listed." }),
    nodes: count,
    peers: z.object({ before: count, after: count }).meta({ description: "Pairs of nodes that see each other." }),
    pairs: z.array(
      z.object({
        src: NodeGroup,
        dst: NodeGroup,
        pairs: count,
        opened: z.array(z.string()),
        closed: z.array(z.string()),
      }),
    ),
    changes: z.array(z.object({ nodes: NodeGroup, added: z.array(z.string()), removed: z.array(z.string()) })),
  })
  .meta({ id: "PolicyComparison" });

export function policyQuestions({ policies, access }: ControlContext): Operation[] {
  return [
    operation({
      method: "get",
      path: "/policy/history",
      id: "listPolicyVersions",
      tag: "Policy",
      summary: "Versions of the policy that are kept, newest first, with who set them and when",
      response: PolicyHistory,
      handle: () => ({
        versions: policies.history().map(({ version, updatedAt, by, etag, text }) => ({
          version: String(version),
          updatedAt: updatedAt === null ? null : timeText(updatedAt),
          by,
          etag,
          policy: text,
        })),
      }),
    }),
    operation({
      method: "post",
      path: "/policy/why",
      id: "explainPolicy",
      asks: true,
      tag: "Policy",
      summary: "Which rules let a connection through, or come nearest to it",
      body: z.object({
        src: z.string().max(500).meta({ description: "A node, user, group, tag, autogroup or address." }),
        dst: z.string().max(500).meta({ description: 'The same, a host or a route, and a port: "server:22".' }),
        proto: z.string().max(40).optional().meta({ description: '"tcp" when absent.' }),
      }),
      response: PolicyExplanation,
      handle: ({ body }) => policyErrors(async () => access.why(body), { conflict: 409 }),
    }),
    operation({
      method: "post",
      path: "/policy/try",
      id: "tryPolicy",
      asks: true,
      tag: "Policy",
      summary: "What another policy would change, pair by pair; nothing is changed",
      maxBody: POLICY_BODY,
      body: z.object({ policy: z.string() }),
      response: PolicyComparison,
      handle: ({ body }) => policyErrors(async () => access.try(body.policy), { conflict: 409 }),
    }),
  ];
}
