// The policy engine: HuJSON text and a model of the tailnet in, decisions out. See docs/policy.md.
import { Compiled } from "./compile.ts";
import { parsePolicy } from "./parse.ts";
import { runTests } from "./tests.ts";
import type { Policy, Tailnet } from "./types.ts";

export { Compiled, type PeerView } from "./compile.ts";
export { PolicyError, type TestFailure } from "./error.ts";
export { parsePolicy } from "./parse.ts";
export type { Policy, PolicyNode, PolicyUser, SSHRule, Tailnet } from "./types.ts";

export { type Question, type Reason, why } from "./why.ts";

/** All that can be wrong with a policy for this tailnet, its own tests among it. Throws PolicyError. */
export function checkPolicy(text: string, tailnet: Tailnet): Policy {
  const policy = parsePolicy(text);
  new Compiled(policy, tailnet);
  runTests(policy, tailnet);
  return policy;
}
