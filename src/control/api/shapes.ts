// What /api/v1 takes and gives, in Headscale's shapes (spec/headscale-features.md, section 5): camelCase, ids as decimal
// strings, RFC 3339 times, null where nothing is set. The types of values follow from these schemas, and so does the
// OpenAPI document.
import { z } from "zod";
import { ROLES } from "../policy/index.ts";

const MAX_TEXT = 1000;

/** In answers. */
const idOut = z
  .string()
  .regex(/^\d+$/)
  .meta({ examples: ["1"] });
const timeOut = z.iso.datetime();
const timeOrNull = timeOut.nullable();

/** In requests: a decimal id, as a string or a number. */
export const id = z.union(
  [
    z
      .string()
      .regex(/^\d{1,15}$/)
      .meta({ examples: ["1"] }),
    z.int().nonnegative(),
  ],
  { error: "must be the id, a whole number" },
);
export const toId = (value: string | number): number => Number(value);
export const idParam = z.object({
  id: z
    .string()
    .regex(/^\d{1,15}$/, "must be the id, a whole number")
    .transform(Number),
});

/** A user by id, or by name as older UIs have it. */
export const userRef = z.union([z.string().max(MAX_TEXT), z.int().nonnegative()]).transform(String);

export const timeIn = z.iso
  .datetime({ offset: true, error: "must be a time as in 2027-01-31T12:00:00Z" })
  .transform((text) => Date.parse(text));

export const text = z.string().max(MAX_TEXT);
export const tagsIn = z.array(text).max(100);

/** Of lists that grow: without `limit` the whole list is given, as the UIs written for Headscale expect. */
export const page = z.object({
  limit: z
    .string()
    .regex(/^[1-9]\d{0,4}$/, "must be a number from 1 to 99999")
    .transform(Number)
    .optional()
    .meta({ description: "At most so many entries; the answer's nextPageToken leads to the next ones." }),
  pageToken: z
    .string()
    .regex(/^\d{1,15}$/, "must be the nextPageToken of an answer")
    .transform(Number)
    .optional()
    .meta({ description: "nextPageToken of the answer before." }),
});
export const nextPageToken = z.string().optional().meta({ description: "Present when there are more entries." });

/** What "autogroup:admin" and the like of the policy mean. */
export const role = z.enum(ROLES);

export const User = z
  .object({
    id: idOut,
    name: z.string(),
    createdAt: timeOrNull,
    displayName: z.string(),
    email: z.string(),
    providerId: z.string(),
    provider: z.string(),
    profilePicUrl: z.string(),
    role,
    status: z
      .enum(["active", "suspended"])
      .meta({ description: "Suspended: the user cannot sign in, and his nodes reach nobody." }),
  })
  .meta({ id: "User" });
export type ApiUser = z.infer<typeof User>;

export const PreAuthKey = z
  .object({
    user: User.nullable(),
    id: idOut,
    key: z.string().meta({ description: 'Whole when it is created, else "hskey-auth-<prefix>-***".' }),
    reusable: z.boolean(),
    ephemeral: z.boolean(),
    used: z.boolean(),
    expiration: timeOrNull,
    createdAt: timeOut,
    aclTags: z.array(z.string()),
  })
  .meta({ id: "PreAuthKey" });
export type ApiPreAuthKey = z.infer<typeof PreAuthKey>;

export const ApiKey = z
  .object({
    id: idOut,
    prefix: z.string().meta({ description: "The public start of the key." }),
    expiration: timeOrNull,
    createdAt: timeOut,
    lastSeen: timeOrNull,
  })
  .meta({ id: "ApiKey" });
export type ApiApiKey = z.infer<typeof ApiKey>;

export const Node = z
  .object({
    id: idOut,
    machineKey: z.string(),
    nodeKey: z.string(),
    discoKey: z.string(),
    ipAddresses: z.array(z.string()),
    name: z.string().meta({ description: "What the host calls itself." }),
    user: User.meta({ description: 'Of a tagged node, the pseudo user "tagged-devices".' }),
    lastSeen: timeOrNull,
    expiry: timeOrNull,
    preAuthKey: PreAuthKey.nullable(),
    createdAt: timeOut,
    registerMethod: z.enum([
      "REGISTER_METHOD_UNSPECIFIED",
      "REGISTER_METHOD_AUTH_KEY",
      "REGISTER_METHOD_CLI",
      "REGISTER_METHOD_OIDC",
    ]),
    givenName: z.string().meta({ description: "The name in MagicDNS." }),
    online: z.boolean(),
    approvedRoutes: z.array(z.string()),
    availableRoutes: z.array(z.string()).meta({ description: "What the node advertises." }),
    subnetRoutes: z.array(z.string()).meta({ description: "What it serves now." }),
    tags: z.array(z.string()),
    ephemeral: z.boolean(),
    authorized: z.boolean().meta({ description: "False: it waits for an administrator's approval." }),
  })
  .meta({ id: "Node" });
export type ApiNode = z.infer<typeof Node>;

export const Policy = z.object({ policy: z.string(), updatedAt: timeOrNull }).meta({ id: "Policy" });

export const Problem = z
  .object({
    type: z.string(),
    title: z.string(),
    status: z.int(),
    detail: z.string(),
    code: z.int().meta({ description: "gRPC's number for it, by which older UIs know an error." }),
    message: z.string().meta({ description: "The detail again, under the name by which older UIs look for it." }),
    details: z.array(z.never()),
    errors: z.unknown().optional(),
  })
  .meta({ id: "Problem" });

export const empty = z.object({});
