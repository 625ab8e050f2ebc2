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
import { usersV2 } from "./v2-users.ts";
import { webhooksV2 } from "./v2-webhooks.ts";

export function operationsV2(context: ControlContext, parts: ApiParts, credentials: Credentials): Operation[] {
  const operations = [
    ...policyV2(context),
    ...devicesV2(context, parts),
    ...usersV2(context, parts),
    ...keysV2(context, parts),
    ...dnsV2(context),
    ...webhooksV2(parts),
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

/** Parts of Tailscale's API that are not here, by the word that follows the tailnet, device or base path; and why. */
const ABSENT: Readonly<Record<string, string>> = {
  contacts: "contacts are whom the hosted service writes to; this server writes to nobody",
  services: "there are no services with addresses of their own: a node serves under its own name",
  "vip-services": "there are no services with addresses of their own: a node serves under its own name",
  logging: "logs are not streamed: this server writes its log to standard error",
  "aws-external-id": "logs are not streamed: this server writes its log to standard error",
  posture: "there are no posture integrations: set attributes of devices (device/{id}/attributes/custom:NAME)",
  "user-invites": "nobody is invited: make users by hand, or let an identity provider name them",
  "device-invites": "devices are not shared with other tailnets: there is one",
};

/** Why a path is not answered; null where there is no more to say than that. */
export function absentV2(path: string): string | null {
  const word = /^\/api\/v2\/(?:(?:tailnet|device)\/[^/]+\/)?([a-z-]+)/.exec(path)?.[1] ?? "";
  return Object.hasOwn(ABSENT, word) ? ABSENT[word]! : null;
}

/** `{message, data, status}`; what else an error has to say stands beside these. */
export const renderErrorV2: MountOptions["renderError"] = (c, status, message, data) => {
  const more = Array.isArray(data) ? { data } : data;
  return c.json({ message, ...(more as object | undefined), status }, status as 400);
};
