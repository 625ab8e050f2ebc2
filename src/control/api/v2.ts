// /api/v2: the part of Tailscale's public API that makes sense for one tailnet (spec/headscale-features.md, section 6), for
// its Go client, the Terraform provider and the Kubernetes operator.
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { Credentials } from "./authenticate.ts";
import type { ApiParts } from "./index.ts";
import { tokenOperation } from "./oauth-token.ts";
import type { MountOptions, Operation } from "./operation.ts";
import { devicesV2 } from "./v2-devices.ts";
import { dnsV2 } from "./v2-dns.ts";
import { keysV2 } from "./v2-keys.ts";
import { policyV2 } from "./v2-policy.ts";

export function operationsV2(context: ControlContext, parts: ApiParts, credentials: Credentials): Operation[] {
  const operations = [
    ...policyV2(context),
    ...devicesV2(context, parts),
    ...keysV2(context, parts),
    ...dnsV2(context),
    tokenOperation(credentials),
  ];
  return operations.map((entry) => ({
    ...entry,
    run(caller, c) {
      const tailnet = c.req.param("tailnet") ?? "-";
      if (tailnet !== "-")
        throw new CommandError(
          404,
          `there is no tailnet ${JSON.stringify(tailnet.slice(0, 40))}: there is one, write "-"`,
        );
      return entry.run(caller, c);
    },
  }));
}

/** `{message, data, status}`; what else an error has to say stands beside these. */
export const renderErrorV2: MountOptions["renderError"] = (c, status, message, data) => {
  const more = Array.isArray(data) ? { data } : data;
  return c.json({ message, ...(more as object | undefined), status }, status as 400);
};
