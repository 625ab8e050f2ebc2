// The policy of a server that is not running: the store is opened directly. For an operator whose server does not start
// because of its policy, and for questions about a copy of the data.
import { PolicyAccess } from "./access.ts";
import { accessOptions, type ControlOptions, openStore } from "./index.ts";
import { Journal } from "./journal.ts";
import { Model } from "./model.ts";
import { type Policy, PolicyError, parsePolicy } from "./policy/index.ts";
import { loadPolicy, PolicyStore, startProblem } from "./policy-store.ts";

export interface OfflinePolicies {
  policies: PolicyStore;
  /** With the policy that the server would start with. Throws PolicyError when it cannot be used. */
  access(): PolicyAccess;
  close(): Promise<void>;
}

/** Throws with one sentence, also when a server has the data folder open. */
export async function openPoliciesOffline(
  options: Pick<ControlOptions, "dataDir" | "settings">,
): Promise<OfflinePolicies> {
  const store = await openStore(options);
  const model = new Model();
  model.apply(await store.load());
  const journal = new Journal(model, (changes) => store.write(changes), { onApplied() {}, onDurable() {} });
  const { settings } = options;
  const current = loadPolicy(settings.policy, model);
  const open = (policy: Policy) => new PolicyAccess(model, policy, () => {}, accessOptions(settings));
  // What is in force does not matter to a check, and it may be what is wrong.
  const access = open(parsePolicy(""));
  const policies = new PolicyStore(
    { settings, model, journal, access, now: Date.now, log() {}, note() {}, poke() {} },
    current,
  );
  return {
    policies,
    access() {
      try {
        return open(parsePolicy(current.text, () => true));
      } catch (error) {
        throw error instanceof PolicyError ? startProblem(current, error) : error;
      }
    },
    async close() {
      await journal.drained();
      await store.close();
    },
  };
}
