// Users, in /api/v2.
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import type { NodeRecord, UserRecord } from "../model.ts";
import { namesOf, TAGGED_USER_ID, timeText } from "../netmap.ts";
import { setUserStatus } from "../users.ts";
import type { ApiParts } from "./index.ts";
import { type Operation, operation } from "./operation.ts";
import { pageOf } from "./page.ts";
import { empty, nextPageToken, page, role, text } from "./shapes.ts";
import { type ApiUserV2, tailnet, UserV2 } from "./v2-shapes.ts";

/** A user counts as idle who was not seen for so long. */
const IDLE_AFTER = 28 * 24 * 60 * 60_000;

const userParam = z.object({ user: z.string().meta({ examples: ["1"] }) });

export function usersV2(context: ControlContext, { commands }: ApiParts): Operation[] {
  const { model } = context;
  const all = (): ApiUserV2[] => {
    const byUser = Map.groupBy(model.nodes.values(), ({ userId }) => userId ?? TAGGED_USER_ID);
    return [...model.users.values()]
      .sort((a, b) => a.id - b.id)
      .map((user) => userOf(user, byUser.get(user.id) ?? [], context.now()));
  };
  return [
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/users",
      id: "listUsers",
      tag: "Users",
      summary: "Users, or those of a type or role",
      scope: "users:read",
      params: tailnet,
      query: page.extend({ type: text.optional(), role: text.optional() }),
      response: z.object({ users: z.array(UserV2), nextPageToken }),
      handle({ query }) {
        const found = all().filter(
          ({ type, role }) =>
            (query.type === undefined || query.type === "all" || query.type === type) &&
            (query.role === undefined || query.role === "all" || query.role === role),
        );
        const { entries, more } = pageOf(found, ({ id }) => Number(id), query);
        return { users: entries, ...more };
      },
    }),
    operation({
      method: "get",
      path: "/users/{user}",
      id: "getUser",
      tag: "Users",
      summary: "One user",
      scope: "users:read",
      params: userParam,
      response: UserV2,
      handle({ params }) {
        const user = all().find(({ id }) => id === params.user);
        if (!user) throw new CommandError(404, `there is no user ${JSON.stringify(params.user.slice(0, 40))}`);
        return user;
      },
    }),
    operation({
      method: "post",
      path: "/users/{user}/role",
      id: "updateUserRole",
      tag: "Users",
      summary: "Give a user another role",
      scope: "users",
      params: userParam,
      body: z.object({ role }),
      response: empty,
      async handle({ params, body }) {
        await commands.setRole(commands.requireUser(params.user).id, body.role);
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/users/{user}/approve",
      id: "approveUser",
      tag: "Users",
      summary: "Confirm that a user may use the tailnet: nobody waits for approval here",
      scope: "users",
      params: userParam,
      response: empty,
      handle({ params }) {
        commands.requireUser(params.user);
        return {};
      },
    }),
    ...(["suspend", "restore"] as const).map((verb) =>
      operation({
        method: "post",
        path: `/users/{user}/${verb}`,
        id: `${verb}User`,
        tag: "Users",
        summary:
          verb === "suspend"
            ? "Shut a user out, with all devices and auth keys, until restored"
            : "Let a suspended user in again, with all devices and auth keys",
        scope: "users",
        params: userParam,
        response: empty,
        async handle({ params, caller }) {
          const { id } = commands.requireUser(params.user);
          await setUserStatus(context, id, verb === "suspend" ? "suspended" : "active", caller.name);
          return {};
        },
      }),
    ),
    operation({
      method: "post",
      path: "/users/{user}/delete",
      id: "deleteUser",
      tag: "Users",
      summary: "Delete a user, with all devices and auth keys",
      scope: "users",
      params: userParam,
      response: empty,
      async handle({ params }) {
        await commands.destroyUser(commands.requireUser(params.user).id, true);
        return {};
      },
    }),
  ];
}

function userOf(user: UserRecord, nodes: readonly NodeRecord[], now: number): ApiUserV2 {
  const { LoginName, DisplayName } = namesOf(user);
  const isConnected = nodes.some(({ online }) => online);
  const lastSeen = isConnected
    ? now
    : Math.max(user.createdAt, ...nodes.map((node) => node.lastSeen ?? node.createdAt));
  return {
    id: String(user.id),
    displayName: DisplayName,
    loginName: LoginName,
    profilePicUrl: user.profilePicUrl,
    tailnetId: "1",
    created: timeText(user.createdAt),
    type: "member",
    role: user.role,
    status: user.status === "suspended" ? "suspended" : now - lastSeen > IDLE_AFTER ? "idle" : "active",
    deviceCount: nodes.length,
    lastSeen: timeText(lastSeen),
    currentlyConnected: isConnected,
  };
}
