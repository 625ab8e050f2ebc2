import { CommandError } from "../errors.ts";
import { PolicyError } from "../policy/index.ts";
import { PolicyStoreError } from "../policy-store.ts";

/** What the policy's own errors mean for an API. `conflict`: of a policy that is another one by now. */
export async function policyErrors<T>(work: () => Promise<T>, { conflict }: { conflict: 409 | 412 }): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof PolicyError)
      throw new CommandError(400, error.describe(), error.failures.length > 0 ? error.failures : undefined);
    if (error instanceof PolicyStoreError)
      throw new CommandError(error.kind === "conflict" ? conflict : 409, error.message);
    throw error;
  }
}
