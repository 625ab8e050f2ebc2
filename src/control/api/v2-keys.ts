// Keys and OAuth clients, in /api/v2: "keys" are pre-auth keys (ids are numbers) and OAuth clients (ids are the public parts
// of their secrets).
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { PreAuthKeyRecord } from "../model.ts";
import { timeText } from "../netmap.ts";
import type { OAuthClientRecord } from "../oauth.ts";
import { keyProblem } from "../preauthkey.ts";
import { type Caller, covers, requireScope, type Scope } from "./caller.ts";
import type { ApiParts } from "./index.ts";
import { type Operation, operation } from "./operation.ts";
import { empty, text } from "./shapes.ts";
import { type ApiKeyV2, Key, keyIn, tailnet } from "./v2-shapes.ts";

const DEFAULT_SECONDS = 90 * 24 * 3600;

export function keysV2(context: ControlContext, { commands, oauth }: ApiParts): Operation[] {
  const tag = "Keys";
  const params = tailnet.extend({ key: z.string().meta({ examples: ["1"] }) });

  /** A client may hand on what it may do itself, and no more. */
  const requireWithin = (caller: Caller, scopes: readonly string[], tags: readonly string[]) => {
    if (caller.kind !== "oauth") return;
    const excess = scopes.find((scope) => !covers(caller.scopes, scope as Scope));
    if (excess) throw new CommandError(403, `you do not have the scope "${excess}", so you cannot give it`);
    oauth.requireOwned(caller.tags, tags);
  };

  const createAuthKey = async (body: z.output<typeof keyIn>, caller: Caller): Promise<ApiKeyV2> => {
    requireScope(caller, "auth_keys");
    const wanted = body.capabilities?.devices?.create ?? {};
    const tags = wanted.tags ?? [];
    if (tags.length === 0)
      throw new CommandError(
        400,
        "this key needs tags: neither an API key nor an OAuth client is a user to whom nodes could belong",
      );
    if (caller.kind === "oauth") oauth.requireOwned(caller.tags, tags);
    const { record, text } = await commands.createKey({
      reusable: wanted.reusable ?? false,
      ephemeral: wanted.ephemeral ?? false,
      preauthorized: wanted.preauthorized ?? false,
      aclTags: tags,
      description: body.description ?? "",
      expiration: context.now() + (body.expirySeconds || DEFAULT_SECONDS) * 1000,
    });
    return { ...authKey(record), key: text };
  };

  /** What a client could not have made is not its to take away. */
  const requireRevocable = (caller: Caller, { id, tags }: PreAuthKeyRecord) => {
    if (tags.length === 0 && !covers(caller.scopes, "all"))
      throw new CommandError(403, `key ${id} has no tags, it is a user's: a client revokes keys of its own tags`);
    oauth.requireOwned(caller.tags, tags);
  };

  const clientInput = (body: z.output<typeof keyIn>, caller: Caller) => {
    requireScope(caller, "oauth_keys");
    const input = { scopes: body.scopes ?? [], tags: body.tags ?? [], description: body.description ?? "" };
    requireWithin(caller, input.scopes, input.tags);
    return input;
  };

  const authKey = (record: PreAuthKeyRecord): ApiKeyV2 => ({
    id: String(record.id),
    keyType: "auth",
    description: record.description,
    created: timeText(record.createdAt),
    ...(record.expiration !== null && {
      expirySeconds: Math.max(0, Math.round((record.expiration - record.createdAt) / 1000)),
      expires: timeText(record.expiration),
    }),
    ...(record.revokedAt !== null && { revoked: timeText(record.revokedAt) }),
    invalid: keyProblem(context.model, record, context.now()) !== null,
    capabilities: {
      devices: {
        create: {
          reusable: record.reusable,
          ephemeral: record.ephemeral,
          preauthorized: record.preauthorized,
          tags: [...record.tags],
        },
      },
    },
    ...(record.userId !== null && { userId: String(record.userId) }),
  });

  /** The pre-auth key, or null when the id is not of that kind. */
  const findAuthKey = (id: string) => (/^\d{1,11}$/.test(id) ? (context.model.keys.get(Number(id)) ?? null) : null);
  const absent = (id: string) => new CommandError(404, `there is no key ${JSON.stringify(id.slice(0, 40))}`);

  return [
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/keys",
      id: "listTailnetKeys",
      tag,
      summary: "Pre-auth keys and OAuth clients, as far as the caller may see them; never a secret",
      params: tailnet,
      query: z.object({ all: text.optional() }),
      response: z.object({ keys: z.array(Key) }),
      handle({ caller }) {
        const seesKeys = covers(caller.scopes, "auth_keys:read");
        const seesClients = covers(caller.scopes, "oauth_keys:read");
        if (!seesKeys && !seesClients) requireScope(caller, "auth_keys:read");
        const keys = seesKeys ? commands.listKeys().map(authKey) : [];
        return { keys: [...keys, ...(seesClients ? oauth.list().map(clientKey) : [])] };
      },
    }),
    operation({
      method: "post",
      path: "/tailnet/{tailnet}/keys",
      id: "createKey",
      tag,
      summary:
        "Make a pre-auth key (scope auth_keys) or an OAuth client (oauth_keys); the answer has its secret, this once",
      params: tailnet,
      body: keyIn,
      response: Key,
      async handle({ body, caller }) {
        if ((body.keyType ?? "auth") === "auth") return createAuthKey(body, caller);
        const { record, text } = await oauth.create(clientInput(body, caller));
        return { ...clientKey(record), key: text };
      },
    }),
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/keys/{key}",
      id: "getKey",
      tag,
      summary: "One of them; never its secret",
      params,
      response: Key,
      handle({ params, caller }) {
        const key = findAuthKey(params.key);
        const client = key ? undefined : oauth.get(params.key);
        requireScope(caller, client ? "oauth_keys:read" : "auth_keys:read");
        if (key) return authKey(key);
        if (client) return clientKey(client);
        throw absent(params.key);
      },
    }),
    operation({
      method: "put",
      path: "/tailnet/{tailnet}/keys/{key}",
      id: "setKey",
      tag,
      summary: "Give an OAuth client other scopes, tags and description",
      scope: "oauth_keys",
      params,
      body: keyIn,
      response: Key,
      async handle({ params, body, caller }) {
        const client = oauth.get(params.key);
        if (!client) throw absent(params.key);
        requireWithin(caller, client.scopes, client.tags);
        return clientKey(await oauth.update(params.key, clientInput(body, caller)));
      },
    }),
    operation({
      method: "delete",
      path: "/tailnet/{tailnet}/keys/{key}",
      id: "deleteKey",
      tag,
      summary: "Revoke a pre-auth key, or delete an OAuth client with its tokens",
      params,
      response: empty,
      async handle({ params, caller }) {
        const key = findAuthKey(params.key);
        const client = key ? undefined : oauth.get(params.key);
        requireScope(caller, client ? "oauth_keys" : "auth_keys");
        if (key) {
          if (caller.kind === "oauth") requireRevocable(caller, key);
          await commands.revokeKey(key.id);
        } else if (client) {
          requireWithin(caller, client.scopes, client.tags);
          await oauth.delete(params.key);
        } else throw absent(params.key);
        return {};
      },
    }),
  ];
}

function clientKey(record: OAuthClientRecord): ApiKeyV2 {
  return {
    id: record.prefix,
    keyType: "client",
    description: record.description,
    created: timeText(record.createdAt),
    updated: timeText(record.updatedAt),
    invalid: false,
    scopes: [...record.scopes],
    tags: [...record.tags],
  };
}
