// /api/v1: what Headscale's own API does (spec/headscale-features.md, section 5), for its command line, and for the UIs that
// were written for it.
import type { Context } from "hono";
import { z } from "zod";
import { type Backfilled, backfillAddresses } from "../addresses.ts";
import { apiApiKey } from "../apikeys.ts";
import { apiUser } from "../commands.ts";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import { timeText } from "../netmap.ts";
import type { PolicyVersion } from "../policy-store.ts";
import { approveRoutes } from "../routes.ts";
import { setTags } from "../tags.ts";
import { setUserStatus } from "../users.ts";
import type { ApiParts } from "./index.ts";
import { type Operation, operation, POLICY_BODY } from "./operation.ts";
import { pageOf } from "./page.ts";
import { policyErrors } from "./policy-errors.ts";
import {
  ApiKey,
  empty,
  id,
  idParam,
  Node,
  nextPageToken,
  Policy,
  PreAuthKey,
  page,
  role,
  tagsIn,
  text,
  timeIn,
  toId,
  User,
  userRef,
} from "./shapes.ts";
import { pings } from "./v1-pings.ts";
import { policyQuestions } from "./v1-policy.ts";

const BACKUP_TYPE = "application/vnd.sqlite3";
const nodeAnswer = z.object({ node: Node });
const keyReference = z.object({ id: id.transform(toId).optional(), prefix: text.optional() });
const policyBody = z.object({ policy: z.string() });

export function operationsV1(context: ControlContext, parts: ApiParts): Operation[] {
  return [
    ...users(context, parts),
    ...nodes(context, parts),
    ...pings(context),
    ...preAuthKeys(parts),
    ...apiKeys(parts),
    ...policy(context),
    ...policyQuestions(context),
    ...logins(parts),
    operation({
      method: "post",
      path: "/backup",
      id: "backup",
      tag: "Server",
      summary: "The database and the server's keys in one SQLite file, while the server runs; at the admin socket only",
      response: z.unknown(),
      textResponse: [BACKUP_TYPE],
      async handle({ caller }) {
        if (caller.kind !== "socket")
          throw new CommandError(
            403,
            "a backup holds the keys of this server: it is made on the server itself, by `weft backup FILE`",
          );
        const { size, body } = await context.backup();
        return new Response(body, { headers: { "Content-Type": BACKUP_TYPE, "Content-Length": String(size) } });
      },
    }),
    operation({
      method: "get",
      path: "/health",
      id: "health",
      tag: "Server",
      summary: "Whether the server and its store work",
      response: z.object({ databaseConnectivity: z.boolean() }),
      handle: async () => ({ databaseConnectivity: await context.healthy() }),
    }),
  ];
}

function users(context: ControlContext, { commands }: ApiParts): Operation[] {
  return [
    operation({
      method: "get",
      path: "/user",
      id: "listUsers",
      tag: "Users",
      summary: "Users, or those with this id, name or e-mail address",
      query: page.extend({ id: idParam.shape.id.optional(), name: text.optional(), email: text.optional() }),
      response: z.object({ users: z.array(User), nextPageToken }),
      handle({ query }) {
        const { entries, more } = pageOf(commands.listUsers(query), (user) => user.id, query);
        return { users: entries.map(apiUser), ...more };
      },
    }),
    operation({
      method: "post",
      path: "/user",
      id: "createUser",
      tag: "Users",
      summary: "Make a user",
      body: z.object({
        name: text,
        displayName: text.optional(),
        email: text.optional(),
        pictureUrl: text.optional(),
      }),
      response: z.object({ user: User }),
      handle: async ({ body }) => ({ user: await commands.createUser(body) }),
    }),
    operation({
      method: "post",
      path: "/user/{oldId}/rename/{newName}",
      id: "renameUser",
      tag: "Users",
      summary: "Rename a user",
      params: z.object({ oldId: idParam.shape.id, newName: text }),
      response: z.object({ user: User }),
      handle: async ({ params }) => ({ user: await commands.renameUser(params.oldId, params.newName) }),
    }),
    operation({
      method: "post",
      path: "/user/{id}/role",
      id: "setUserRole",
      tag: "Users",
      summary: "Give a user another role",
      params: idParam,
      body: z.object({ role }),
      response: z.object({ user: User }),
      handle: async ({ params, body }) => ({ user: await commands.setRole(params.id, body.role) }),
    }),
    ...(["suspend", "restore"] as const).map((verb) =>
      operation({
        method: "post",
        path: `/user/{id}/${verb}`,
        id: `${verb}User`,
        tag: "Users",
        summary:
          verb === "suspend"
            ? "Shut a user out, with all nodes and pre-auth keys, until restored"
            : "Let a suspended user in again, with all nodes and pre-auth keys",
        params: idParam,
        response: z.object({ user: User }),
        async handle({ params, caller }) {
          const status = verb === "suspend" ? "suspended" : "active";
          return { user: apiUser(await setUserStatus(context, params.id, status, caller.name)) };
        },
      }),
    ),
    operation({
      method: "delete",
      path: "/user/{id}",
      id: "deleteUser",
      tag: "Users",
      summary: "Delete a user who has no nodes, and its pre-auth keys",
      params: idParam,
      response: empty,
      async handle({ params }) {
        await commands.destroyUser(params.id);
        return {};
      },
    }),
  ];
}

function nodes(context: ControlContext, { commands }: ApiParts): Operation[] {
  return [
    operation({
      method: "get",
      path: "/node",
      id: "listNodes",
      tag: "Nodes",
      summary: "Nodes, or those of a user, by name or id",
      query: page.extend({ user: text.optional() }),
      response: z.object({ nodes: z.array(Node), nextPageToken }),
      handle({ query }) {
        const { entries, more } = pageOf(commands.listNodes(query), (node) => node.id, query);
        return { nodes: entries.map((node) => commands.apiNode(node)), ...more };
      },
    }),
    operation({
      method: "get",
      path: "/node/{id}",
      id: "getNode",
      tag: "Nodes",
      summary: "One node",
      params: idParam,
      response: nodeAnswer,
      handle: ({ params }) => ({ node: commands.apiNode(commands.node(params.id)) }),
    }),
    operation({
      method: "delete",
      path: "/node/{id}",
      id: "deleteNode",
      tag: "Nodes",
      summary: "Delete a node: its peers forget it at once",
      params: idParam,
      response: empty,
      async handle({ params }) {
        await commands.deleteNode(params.id);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/node/{id}/expire",
      id: "expireNode",
      tag: "Nodes",
      summary: "Let a node's key expire, now or at a time, or never",
      params: idParam,
      body: z.object({ expiry: timeIn.nullish(), disableExpiry: z.boolean().nullish() }),
      response: nodeAnswer,
      async handle({ params, body }) {
        const expiry = body.disableExpiry ? null : (body.expiry ?? context.now());
        return { node: commands.apiNode(await commands.expireNode(params.id, expiry)) };
      },
    }),
    operation({
      method: "post",
      path: "/node/{id}/rename/{newName}",
      id: "renameNode",
      tag: "Nodes",
      summary: "Give a node another name in MagicDNS",
      params: idParam.extend({ newName: text }),
      response: nodeAnswer,
      handle: async ({ params }) => ({
        node: commands.apiNode(await commands.renameNode(params.id, params.newName)),
      }),
    }),
    operation({
      method: "post",
      path: "/node/{id}/tags",
      id: "setTags",
      tag: "Nodes",
      summary: "Replace a node's tags: it belongs to them from then on, and its key does not expire",
      params: idParam,
      body: z.object({ tags: tagsIn }),
      response: nodeAnswer,
      handle: async ({ params, body }) => ({ node: commands.apiNode(await setTags(context, params.id, body.tags)) }),
    }),
    operation({
      method: "post",
      path: "/node/{id}/approve_routes",
      id: "setApprovedRoutes",
      tag: "Nodes",
      summary: "Replace the routes that a node may serve",
      params: idParam,
      body: z.object({ routes: z.array(text) }),
      response: nodeAnswer,
      handle: async ({ params, body }) => ({
        node: commands.apiNode(await approveRoutes(context, params.id, body.routes)),
      }),
    }),
    operation({
      method: "post",
      path: "/node/backfillips",
      id: "backfillNodeIPs",
      tag: "Nodes",
      summary: "Give nodes the addresses that they lack since the prefixes were changed",
      query: z.object({ confirmed: z.enum(["true", "false"]).optional() }),
      response: z.object({ changes: z.array(z.string()) }),
      async handle({ query }) {
        if (query.confirmed !== "true")
          throw new CommandError(400, "this changes addresses of nodes: say so with ?confirmed=true");
        return { changes: (await backfillAddresses(context)).flatMap(backfilled) };
      },
    }),
  ];
}

/** What was done to a node's addresses, for people. */
function backfilled({ nodeId, givenName, added, removed }: Backfilled): string[] {
  const node = `node ${nodeId} (${givenName})`;
  return [...added.map((ip) => `${node} got ${ip}`), ...removed.map((ip) => `${node} lost ${ip}`)];
}

function preAuthKeys({ commands }: ApiParts): Operation[] {
  return [
    operation({
      method: "get",
      path: "/preauthkey",
      id: "listPreAuthKeys",
      tag: "Pre-auth keys",
      summary: "Pre-auth keys, or those of a user, by name or id; never the secret",
      query: page.extend({ user: text.optional() }),
      response: z.object({ preAuthKeys: z.array(PreAuthKey), nextPageToken }),
      handle({ query }) {
        const { entries, more } = pageOf(commands.listKeys(query), (key) => key.id, query);
        return { preAuthKeys: entries.map((key) => commands.apiKey(key)), ...more };
      },
    }),
    operation({
      method: "post",
      path: "/preauthkey",
      id: "createPreAuthKey",
      tag: "Pre-auth keys",
      summary: "Make a pre-auth key; the answer holds it whole, this once. Without expiration it is good for an hour",
      body: z.object({
        user: userRef.nullish(),
        reusable: z.boolean().nullish(),
        ephemeral: z.boolean().nullish(),
        expiration: timeIn.nullable().optional().meta({ description: "null: it never expires" }),
        aclTags: tagsIn.nullish(),
      }),
      response: z.object({ preAuthKey: PreAuthKey }),
      async handle({ body }) {
        const { record, text } = await commands.createKey({
          user: body.user ? commands.requireUser(body.user).id : undefined,
          reusable: body.reusable ?? false,
          ephemeral: body.ephemeral ?? false,
          expiration: body.expiration,
          aclTags: body.aclTags ?? [],
        });
        return { preAuthKey: { ...commands.apiKey(record), key: text } };
      },
    }),
    operation({
      method: "post",
      path: "/preauthkey/expire",
      id: "expirePreAuthKey",
      tag: "Pre-auth keys",
      summary: "Let a pre-auth key expire now, by its id or its text",
      body: z.object({ id: id.transform(toId).optional(), key: text.optional() }),
      response: empty,
      async handle({ body }) {
        await commands.expireKey(body.id ?? commands.keyByText(body.key ?? "").id);
        return {};
      },
    }),
    operation({
      method: "delete",
      path: "/preauthkey",
      id: "deletePreAuthKey",
      tag: "Pre-auth keys",
      summary: "Delete a pre-auth key; nodes that joined with it stay",
      query: idParam,
      response: empty,
      async handle({ query }) {
        await commands.deleteKey(query.id);
        return {};
      },
    }),
  ];
}

function apiKeys({ apiKeys: keys }: ApiParts): Operation[] {
  return [
    operation({
      method: "get",
      path: "/apikey",
      id: "listApiKeys",
      tag: "API keys",
      summary: "API keys; never the secret",
      query: page,
      response: z.object({ apiKeys: z.array(ApiKey), nextPageToken }),
      handle({ query }) {
        const { entries, more } = pageOf(keys.list(), (key) => key.id, query);
        return { apiKeys: entries.map(apiApiKey), ...more };
      },
    }),
    operation({
      method: "post",
      path: "/apikey",
      id: "createApiKey",
      tag: "API keys",
      summary: "Make an API key; the answer holds it whole, this once. Without expiration it is good for 90 days",
      body: z.object({ expiration: timeIn.nullable().optional().meta({ description: "null: it never expires" }) }),
      response: z.object({ apiKey: z.string() }),
      handle: async ({ body }) => ({ apiKey: (await keys.create(body.expiration)).text }),
    }),
    operation({
      method: "post",
      path: "/apikey/expire",
      id: "expireApiKey",
      tag: "API keys",
      summary: "Let an API key expire now",
      body: keyReference,
      response: empty,
      async handle({ body }) {
        await keys.expire(body);
        return {};
      },
    }),
    operation({
      method: "delete",
      path: "/apikey/{prefix}",
      id: "deleteApiKey",
      tag: "API keys",
      summary: 'Delete an API key by its prefix, or by ?id= with "-" in place of the prefix',
      params: z.object({ prefix: text }),
      query: z.object({ id: idParam.shape.id.optional() }),
      response: empty,
      async handle({ params, query }) {
        await keys.delete(query.id === undefined ? { prefix: params.prefix } : { id: query.id });
        return {};
      },
    }),
  ];
}

function logins({ commands, logins: waiting }: ApiParts): Operation[] {
  const authId = z.object({ authId: text });
  const register = async (authId: string, user: string) => ({
    node: commands.apiNode(await waiting.complete(authId, commands.requireUser(user).id, "cli")),
  });
  const tag = "Logins";
  return [
    operation({
      method: "post",
      path: "/auth/register",
      id: "authRegister",
      tag,
      summary: "Let the machine in that waits under this id: it becomes a node of the user",
      body: authId.extend({ user: userRef }),
      response: nodeAnswer,
      handle: ({ body }) => register(body.authId, body.user),
    }),
    operation({
      method: "post",
      path: "/node/register",
      id: "registerNode",
      tag,
      summary: "The same, as older command lines and UIs ask for it",
      query: z.object({ user: text, key: text }),
      response: nodeAnswer,
      handle: ({ query }) => register(query.key, query.user),
    }),
    operation({
      method: "post",
      path: "/auth/approve",
      id: "authApprove",
      tag,
      summary: "Let the SSH session in that waits under this id",
      body: authId,
      response: empty,
      async handle({ body }) {
        await waiting.approve(body.authId);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/auth/reject",
      id: "authReject",
      tag,
      summary: "Refuse the machine or SSH session that waits under this id",
      body: authId,
      response: empty,
      async handle({ body }) {
        await waiting.reject(body.authId);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/debug/node",
      id: "debugCreateNode",
      tag,
      summary: "Put a machine that does not exist among those that wait: for tests of a UI",
      body: z.object({ user: userRef, key: text, name: text, routes: z.array(text).max(100).nullish() }),
      response: nodeAnswer,
      handle: async ({ body }) => ({
        node: await commands.pretendLogin(body.key, body.user, body.name, body.routes ?? []),
      }),
    }),
  ];
}

function policy(context: ControlContext): Operation[] {
  const answer = ({ text, updatedAt, etag }: PolicyVersion, c: Context) => {
    c.header("ETag", `"${etag}"`);
    return { policy: text, updatedAt: updatedAt === null ? null : timeText(updatedAt) };
  };
  return [
    operation({
      method: "get",
      path: "/policy",
      id: "getPolicy",
      tag: "Policy",
      summary: "The policy in force, comments and all, with its ETag",
      response: Policy,
      handle: ({ c }) => answer(context.policies.current(), c),
    }),
    operation({
      method: "put",
      path: "/policy",
      id: "setPolicy",
      tag: "Policy",
      summary: 'Put another policy in force; with If-Match only in place of that one ("ts-default": of none)',
      maxBody: POLICY_BODY,
      body: policyBody,
      response: Policy,
      handle: ({ body, caller, c }) =>
        policyErrors(
          async () => {
            const ifMatch = c.req.header("If-Match");
            return answer(await context.policies.set(body.policy, { by: caller.name, ifMatch }), c);
          },
          { conflict: 412 },
        ),
    }),
    operation({
      method: "post",
      path: "/policy/check",
      id: "checkPolicy",
      asks: true,
      tag: "Policy",
      summary: "Whether a policy could be set: its words, the users that it names, and its tests",
      maxBody: POLICY_BODY,
      body: policyBody,
      response: empty,
      handle: ({ body }) =>
        policyErrors(
          async () => {
            context.policies.check(body.policy);
            return {};
          },
          { conflict: 409 },
        ),
    }),
  ];
}
