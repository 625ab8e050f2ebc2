// What /api/v2 takes and gives, in the shapes of Tailscale's public API (spec/headscale-features.md, section 6), as its
// official Go client and the Terraform provider read them.
import { z } from "zod";
import { role, text } from "./shapes.ts";

export const ErrorV2 = z
  .object({
    message: z.string(),
    data: z
      .array(z.object({ user: z.string().optional(), errors: z.array(z.string()) }))
      .optional()
      .meta({ description: "Tests of a policy that failed." }),
    status: z.int(),
    error: z.string().optional().meta({ description: "Of the token endpoint (RFC 6749, section 5.2)." }),
    error_description: z.string().optional(),
  })
  .meta({ id: "Error" });

/** "" where there is none, as Tailscale gives it. */
const timeOrEmpty = z.union([z.iso.datetime(), z.literal("")]);

/** Only the tailnet of the credential exists here. */
export const tailnet = z.object({ tailnet: z.string().meta({ description: "-", examples: ["-"] }) });
export const deviceParam = z.object({ device: z.string().meta({ description: "Its id.", examples: ["1"] }) });

export const Device = z
  .object({
    addresses: z.array(z.string()),
    id: z.string(),
    nodeId: z.string(),
    user: z.string(),
    name: z.string().meta({ description: "Its whole name in MagicDNS." }),
    hostname: z.string(),
    clientVersion: z.string(),
    updateAvailable: z.boolean(),
    os: z.string(),
    created: timeOrEmpty,
    connectedToControl: z.boolean(),
    lastSeen: z.iso.datetime().optional().meta({ description: "Absent while it is connected." }),
    keyExpiryDisabled: z.boolean(),
    expires: timeOrEmpty,
    authorized: z.boolean(),
    isExternal: z.boolean(),
    isEphemeral: z.boolean(),
    machineKey: z.string(),
    nodeKey: z.string(),
    blocksIncomingConnections: z.boolean(),
    tags: z.array(z.string()).optional(),
    tailnetLockError: z.string(),
    tailnetLockKey: z.string(),
    advertisedRoutes: z.array(z.string()).optional().meta({ description: "With fields=all." }),
    enabledRoutes: z.array(z.string()).optional().meta({ description: "With fields=all." }),
    sshEnabled: z.boolean().optional().meta({ description: "With fields=all." }),
    clientConnectivity: z
      .object({
        endpoints: z.array(z.string()),
        mappingVariesByDestIP: z.boolean(),
        latency: z.record(z.string(), z.object({ latencyMs: z.number(), preferred: z.boolean().optional() })),
        clientSupports: z.object({
          hairPinning: z.boolean(),
          ipv6: z.boolean(),
          pcp: z.boolean(),
          pmp: z.boolean(),
          udp: z.boolean(),
          upnp: z.boolean(),
        }),
      })
      .optional()
      .meta({ description: "With fields=all." }),
    distro: z
      .object({ name: z.string(), version: z.string(), codeName: z.string() })
      .optional()
      .meta({ description: "With fields=all." }),
  })
  .meta({ id: "Device" });
export type ApiDevice = z.infer<typeof Device>;

export const DeviceRoutes = z
  .object({ advertisedRoutes: z.array(z.string()), enabledRoutes: z.array(z.string()) })
  .meta({ id: "DeviceRoutes" });

const attribute = z.union([z.string().max(200), z.number(), z.boolean()]);
export const attributeIn = z.object({
  value: attribute,
  expiry: z.iso.datetime({ offset: true, error: "must be a time as in 2027-01-31T12:00:00Z" }).nullish(),
  comment: z.string().max(200).nullish(),
});
export const DeviceAttributes = z
  .object({ attributes: z.record(z.string(), attribute), expiries: z.record(z.string(), z.iso.datetime()) })
  .meta({ id: "DeviceAttributes" });

export const UserV2 = z
  .object({
    id: z.string(),
    displayName: z.string(),
    loginName: z.string(),
    profilePicUrl: z.string(),
    tailnetId: z.string(),
    created: z.iso.datetime(),
    type: z.enum(["member", "shared"]),
    role,
    status: z.enum(["active", "idle", "suspended", "needs-approval", "over-billing-limit"]),
    deviceCount: z.int(),
    lastSeen: z.iso.datetime(),
    currentlyConnected: z.boolean(),
  })
  .meta({ id: "User" });
export type ApiUserV2 = z.infer<typeof UserV2>;

const create = z.object({
  reusable: z.boolean(),
  ephemeral: z.boolean(),
  preauthorized: z.boolean(),
  tags: z.array(z.string()).nullable(),
});

export const Key = z
  .object({
    id: z.string(),
    keyType: z.enum(["auth", "client"]),
    key: z.string().optional().meta({ description: "The secret; only in the answer that made it." }),
    description: z.string(),
    created: z.iso.datetime(),
    updated: z.iso.datetime().optional(),
    expirySeconds: z.int().optional(),
    expires: z.iso.datetime().optional(),
    revoked: z.iso.datetime().optional(),
    invalid: z.boolean(),
    capabilities: z.object({ devices: z.object({ create }) }).optional(),
    scopes: z.array(z.string()).optional(),
    tags: z.array(z.string()).optional(),
    userId: z.string().optional(),
  })
  .meta({ id: "Key" });
export type ApiKeyV2 = z.infer<typeof Key>;

const tags = z.array(text).max(100).nullish();
export const keyIn = z.object({
  keyType: z.enum(["auth", "client"]).nullish(),
  description: z.string().max(200).nullish(),
  expirySeconds: z
    .int()
    .min(0)
    .max(365 * 24 * 3600)
    .nullish(),
  capabilities: z
    .object({
      devices: z
        .object({
          create: z
            .object({
              reusable: z.boolean().nullish(),
              ephemeral: z.boolean().nullish(),
              preauthorized: z.boolean().nullish(),
              tags,
            })
            .nullish(),
        })
        .nullish(),
    })
    .nullish(),
  scopes: z.array(text).max(100).nullish(),
  tags,
});

const externalPolicy = { aclsExternallyManagedOn: z.boolean(), aclsExternalLink: z.string() };
export const Settings = z
  .object({
    ...externalPolicy,
    devicesApprovalOn: z.boolean(),
    devicesAutoUpdatesOn: z.boolean(),
    devicesKeyDurationDays: z.int(),
    usersApprovalOn: z.boolean(),
    usersRoleAllowedToJoinExternalTailnets: z.enum(["none", "admin", "member"]),
    networkFlowLoggingOn: z.boolean(),
    regionalRoutingOn: z.boolean(),
    postureIdentityCollectionOn: z.boolean(),
    httpsEnabled: z.boolean(),
  })
  .meta({ id: "TailnetSettings" });
/** The Go client sends null where it means nothing. */
export const settingsIn = Settings.partial().extend({
  aclsExternallyManagedOn: externalPolicy.aclsExternallyManagedOn.nullish(),
  aclsExternalLink: externalPolicy.aclsExternalLink.nullish(),
  devicesKeyDurationDays: z.int().min(0).max(3650).nullish().meta({ description: "0: keys do not expire." }),
});
