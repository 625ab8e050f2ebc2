// Suspension of users, as Tailscale has it: who is suspended cannot sign in, his pre-auth keys open nothing, and his nodes
// reach nobody, not even each other, until he is restored; then all is as it was, without a new login. Tagged nodes are
// nobody's and stay. The model marks the nodes (model.ts: `suspended`), so that every part sees it in their records.
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { UserRecord, UserStatus } from "./model.ts";
import { namesOf } from "./netmap.ts";

/** Why a user may do nothing here, for the user and the client; null when he may. */
export function suspensionProblem(user: UserRecord | undefined): string | null {
  if (user?.status !== "suspended") return null;
  return `the user ${namesOf(user).LoginName} is suspended on this server: ask an administrator (weft users restore -i ${user.id})`;
}

/** Throws CommandError when there is no such user. `by`: who asked for it, for the log. */
export async function setUserStatus(
  { model, journal, log }: ControlContext,
  id: number,
  status: UserStatus,
  by: string,
): Promise<UserRecord> {
  const user = model.users.get(id);
  if (!user) throw new CommandError(404, `there is no user ${id}: weft users list shows those that exist`);
  if (user.status === status) return user;
  const next = { ...user, status };
  await journal.commit({ users: [next] });
  const count = model.nodesOfUser(id).length;
  const nodes = count === 1 ? "1 node" : `${count} nodes`;
  log(
    status === "suspended"
      ? `user ${id} (${namesOf(user).LoginName}) was suspended by ${by}: ${nodes} shut out`
      : `user ${id} (${namesOf(user).LoginName}) was restored by ${by}: ${nodes} let in again`,
  );
  return next;
}
