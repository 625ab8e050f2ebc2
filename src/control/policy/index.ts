// The policy engine: HuJSON text and a model of the tailnet in, decisions out. See docs/policy.md.
import { Compiled } from "./compile.ts";
import { parsePolicy } from "./parse.ts";
import { runTests, stranger } from "./tests.ts";
import type { Policy, Selector, Tailnet } from "./types.ts";

export { type Comparison, compare } from "./compare.ts";
export { Compiled, type PeerView } from "./compile.ts";
export { PolicyError, type TestFailure } from "./error.ts";
export { type ExplainQuestion, type Explanation, explain, lineAt } from "./explain.ts";
export { parsePolicy } from "./parse.ts";
export type { SSHDecision } from "./ssh.ts";
export { runTests } from "./tests.ts";
export {
  type Policy,
  type PolicyNode,
  type PolicyUser,
  ROLES,
  type Role,
  type SSHAction,
  type SSHRule,
  type Tailnet,
} from "./types.ts";
export { type Question, type Reason, why } from "./why.ts";

/** All that can be wrong with a policy for this tailnet, its own tests among it. Throws PolicyError. */
export function checkPolicy(text: string, tailnet: Tailnet): Policy {
  const policy = parsePolicy(text);
  new Compiled(policy, tailnet);
  runTests(policy, tailnet);
  return policy;
}

/** `checkPolicy` without a tailnet: its users are those that the policy names, and it has no nodes. Throws PolicyError. */
export function checkPolicyAlone(text: string): Policy {
  const policy = parsePolicy(text);
  const selectors: Selector[] = [
    ...[...policy.groups.values(), ...policy.tagOwners.values()].flat(),
    ...[...(policy.accesses ?? []), ...policy.ssh].flatMap(({ src, dst }) => [...src, ...dst]),
    ...policy.nodeAttributes.flatMap(({ target }) => target),
    ...policy.approvers.routes.flatMap(({ approvers }) => approvers),
    ...policy.approvers.exitNode,
  ];
  const tokens = new Set(
    selectors.flatMap((selector) => (selector.kind === "user" ? [selector.token.toLowerCase()] : [])),
  );
  const users = [...tokens].map((token, i) => stranger(token, i + 1));
  return checkPolicy(text, { users, nodes: [] });
}
