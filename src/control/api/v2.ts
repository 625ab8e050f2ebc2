// /api/v2: the part of Tailscale's public API that makes sense for one tailnet (spec/headscale-features.md, section 6), for
// its Go client, the Terraform provider and the Kubernetes operator.
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { Credentials } from "./authenticate.ts";
import type { ApiParts } from "./index.ts";
import { tokenOperation } from "./oauth-token.ts";
import type { MountOptions, Operation } from "./operation.ts";
import { contactsV2 } from "./v2-contacts.ts";
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
    ...contactsV2(context),
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

const NO_SERVICES =
  "there are no services with addresses of their own: a node serves under its own name (tailscale serve)";
const NO_STREAMS =
  "logs are not streamed to others: collect this server's log from standard error (--log-format json), and have changes of the tailnet posted by a webhook";

/** Parts of Tailscale's API that are not here, by what follows the tailnet, device or base path: why, and what is in their place. */
const ABSENT: Readonly<Record<string, string>> = {
  services: NO_SERVICES,
  "vip-services": NO_SERVICES,
  logging: NO_STREAMS,
  "aws-external-id": NO_STREAMS,
  posture: "there are no posture integrations: set attributes of devices (device/{id}/attributes/custom:NAME)",
  "device-attributes": "attributes are set device by device: POST device/{id}/attributes/custom:NAME",
  "user-invites":
    "nobody is invited, because this server sends no mail: make users by hand (weft users create), or let an identity provider name them",
  "device-invites": "devices are not shared with other tailnets, because there is one: let the other user join it",
  "acl/preview":
    "what a policy means for somebody is asked in another way: weft policy why SRC DST:PORT, weft policy try -f FILE (/api/v1/policy/why, /api/v1/policy/try)",
};

/** Why a path is not answered; null where there is no more to say than that. */
export function absentV2(path: string): string | null {
  const [, word = "", next = ""] = /^\/api\/v2\/(?:(?:tailnet|device)\/[^/]+\/)?([a-z-]+)(\/[a-z-]+)?/.exec(path) ?? [];
  return [word + next, word].map((key) => (Object.hasOwn(ABSENT, key) ? ABSENT[key]! : null)).find(Boolean) ?? null;
}

/** `{message, data, status}`; what else an error has to say stands beside these. */
export const renderErrorV2: MountOptions["renderError"] = (c, status, message, data) => {
  const more = Array.isArray(data) ? { data } : data;
  return c.json({ message, ...(more as object | undefined), status }, status as 400);
};
