// What a register request means for the tailnet: a change to the model and an answer (spec/ts2021-control-protocol.md,
// section 9; spec/headscale-features.md, section 7). Pure: the caller commits the change and sends the answer once it is
// durable. Planning and applying are one synchronous step, so two requests of one machine never interleave.
//
// A node is known by its node key, and a node key belongs to one machine key for ever: everything that names a node key is
// believed only if the Noise handshake proved that machine key. Rules, first match first:
//   node key of another machine            refused
//   expiry in the past                     logout: expires now; an ephemeral node is deleted
//   known, not expired                     state as it is (an expiry before the present one is taken; a pre-auth key that the
//                                          node was not admitted by, with other tags, retags); no key is used up, so a
//                                          container restarts with one that is used, expired or gone
//   known, expired, pre-auth key           NodeKeyExpired: the client comes back with a new node key
//   pre-auth key                           the key is used; the machine's node of the same owner gets the new node key,
//                                          or else a new node is made
//   anything else                          somebody must sign in (login.ts), then `planLogin`
//
// Which node of its machine a registration takes over (id, addresses, name and routes stay; else a new node is made):
//   key of a user       the user's own; or a tagged one that this very key admitted: its tags stay, an administrator may
//                       have chosen them
//   key with tags       a tagged one, or one of the key's user (any, for a key without a user), which becomes tagged
//   login of a user     the user's own; or a tagged one if the client names its key or it has expired: it becomes the user's
//                       (or gets the tags that were asked for)
// Nodes of other users are never taken over: one machine may have a node for each user who ever joined on it.
import { createHash } from "node:crypto";
import type { RegisterResponse } from "../wire/tailcfg.ts";
import { allocate } from "./addresses.ts";
import type { ControlContext } from "./context.ts";
import {
  type Change,
  type Counters,
  isAdmitted,
  type Millis,
  type Model,
  type NodeRecord,
  type PreAuthKeyRecord,
  type RegisterMethod,
} from "./model.ts";
import { labelOf, uniqueLabel } from "./names.ts";
import { namesOf, profileOf, timeText, userOf } from "./netmap.ts";
import { findKey, keyProblem } from "./preauthkey.ts";
import { BadRequest, homeDerpOf, type RegisterInput } from "./requests.ts";
import { claimProblem, refusedTags, requestedTags } from "./tags.ts";
import { suspensionProblem } from "./users.ts";

export type Registration =
  | {
      kind: "answer";
      /** Null: the tailnet stays as it is. */
      change: Change | null;
      response: RegisterResponse;
      /** What the client presented was made up, for the log: a key that never was, or somebody else's node key. */
      guess?: string;
    }
  | { kind: "login" };

/** Who signed in for a machine. */
export interface SignedIn {
  userId: number;
  method: RegisterMethod;
  /** Of the identity provider's token, in place of the server's default; null: it says nothing. */
  expiry: Millis | null;
}

/** This user cannot have this machine as a node; the message is for the user and the client. */
export class LoginRefused extends Error {
  override name = "LoginRefused";
}

const FOREIGN_KEY = "this node key belongs to another machine: log out and join again to get a new one";

/** `machineKey`: "mkey:…" as the handshake proved it. Throws BadRequest. */
export function planRegister(ctx: ControlContext, input: RegisterInput, machineKey: string): Registration {
  const { model } = ctx;
  const now = ctx.now();
  const known = model.nodeByKey(input.nodeKey);
  if (known && known.machineKey !== machineKey) {
    return {
      ...refuse(FOREIGN_KEY),
      guess: `${machineKey} presented the node key of node ${known.id}, which belongs to another machine: refused`,
    };
  }
  if (input.expiry !== null && input.expiry <= now) return logout(known, now);
  if (known && !isExpired(known, now)) return keep(ctx, known, input, now);
  if (input.authKey === "") return { kind: "login" };
  if (known) return answer(null, { NodeKeyExpired: true, MachineAuthorized: false });
  return admit(ctx, input, machineKey, now);
}

export function isExpired(node: NodeRecord, now: Millis): boolean {
  return node.expiry !== null && node.expiry <= now;
}

function answer(change: Change | null, response: RegisterResponse): Registration & { kind: "answer" } {
  return { kind: "answer", change, response };
}

function refuse(message: string): Registration & { kind: "answer" } {
  return answer(null, { Error: message });
}

function logout(known: NodeRecord | undefined, now: Millis): Registration {
  const response: RegisterResponse = { NodeKeyExpired: true, MachineAuthorized: false };
  if (!known || isExpired(known, now)) return answer(null, response);
  if (known.ephemeral) return answer({ nodesRemoved: [known.id] }, response);
  return answer({ nodes: [{ ...known, expiry: now, expired: true }] }, response);
}

/** The expiry after a request: it may come earlier, never later. */
function sooner(node: NodeRecord, input: RegisterInput, now: Millis): Millis | null {
  if (input.expiry === null || node.tags.length > 0) return node.expiry;
  if (node.expiry !== null && input.expiry > node.expiry)
    throw new BadRequest(
      `the expiry of a node key can be brought forward, not put off: it is ${timeText(node.expiry)}, ${timeText(input.expiry)} was asked for (${timeText(now)} now)`,
    );
  return input.expiry;
}

function keep(ctx: ControlContext, node: NodeRecord, input: RegisterInput, now: Millis): Registration {
  const { model } = ctx;
  const key = input.authKey === "" ? null : findKey(model, input.authKey);
  if (key && key.id !== node.authKeyId && keyProblem(model, key, now) === null && key.tags.length > 0) {
    if (!sameTags(key.tags, node.tags)) {
      const problem = keyTagsProblem(input, key);
      if (problem) return refuse(problem);
      const owner = {
        tags: key.tags,
        userId: null,
        expiry: null,
        authKeyId: key.id,
        registerMethod: "authkey" as const,
        suspended: false,
      };
      const retagged: NodeRecord = { ...node, ...owner };
      return succeed(model, retagged, { keys: [{ ...key, used: true }] });
    }
  }
  const expiry = sooner(node, input, now);
  if (expiry === node.expiry) return answer(null, success(model, node));
  return succeed(model, { ...node, expiry });
}

function admit(ctx: ControlContext, input: RegisterInput, machineKey: string, now: Millis): Registration {
  const { model } = ctx;
  const key = findKey(model, input.authKey);
  if (!key)
    return {
      ...refuse("this server does not know this pre-auth key: check that it was copied whole (weft preauthkeys list)"),
      guess: `${machineKey} presented a pre-auth key that never was: refused`,
    };
  const problem = keyProblem(model, key, now) ?? keyTagsProblem(input, key);
  if (problem) return refuse(problem);
  const existing = candidates(model, input, machineKey).find((node) => mayTakeOver(node, key));
  // Tags that this key gave already may have been changed since by an administrator.
  const tags = existing && existing.authKeyId === key.id && existing.tags.length > 0 ? existing.tags : key.tags;
  const isTagged = tags.length > 0;
  const owner = {
    tags,
    userId: isTagged ? null : key.userId,
    expiry: isTagged ? null : expiryOf(ctx, input, null, now),
    ephemeral: key.ephemeral || input.ephemeral,
    authKeyId: key.id,
    registerMethod: "authkey" as const,
  };
  const planned = place(ctx, input, machineKey, existing, owner, key.preauthorized, now);
  return succeed(model, planned.node, { keys: [{ ...key, used: true }], ...planned.more });
}

function mayTakeOver(node: NodeRecord, key: PreAuthKeyRecord): boolean {
  if (key.tags.length === 0) return node.tags.length === 0 ? node.userId === key.userId : node.authKeyId === key.id;
  return node.tags.length > 0 || key.userId === null || node.userId === key.userId;
}

/**
 * A user signed in for this machine. Throws LoginRefused: the user is suspended, the tags that the client asks for are not
 * this user's to give, the node key is another machine's by now, or there is no address left.
 */
export function planLogin(
  ctx: ControlContext,
  input: RegisterInput,
  machineKey: string,
  login: SignedIn,
): { change: Change; node: NodeRecord } {
  const now = ctx.now();
  const holder = ctx.model.nodeByKey(input.nodeKey);
  // It was nobody's when this login began.
  if (holder && holder.machineKey !== machineKey) throw new LoginRefused(FOREIGN_KEY);
  const tags = requestedTags(input.hostinfo);
  const problem = suspensionProblem(ctx.model.users.get(login.userId)) ?? claimProblem(ctx.access, login.userId, tags);
  if (problem) throw new LoginRefused(problem);
  const isNamed = (node: NodeRecord) => node.nodeKey === input.nodeKey || node.nodeKey === input.oldNodeKey;
  const existing = candidates(ctx.model, input, machineKey).find((node) =>
    node.tags.length > 0 ? isNamed(node) || isExpired(node, now) : node.userId === login.userId,
  );
  const isTagged = tags.length > 0;
  const owner = {
    tags,
    userId: isTagged ? null : login.userId,
    expiry: isTagged ? null : expiryOf(ctx, input, login.expiry, now),
    ephemeral: input.ephemeral,
    // A restart presents that key again, and must not undo what a person has decided since.
    authKeyId: existing?.authKeyId ?? null,
    registerMethod: login.method,
  };
  // The key of an expired node, and now somebody else has signed in with it: the old node is left with a key of nobody.
  const left = holder && holder.id !== existing?.id ? [{ ...holder, nodeKey: keyOfNobody(holder) }] : [];
  const { node, more } = place(ctx, input, machineKey, existing, owner, login.method === "cli", now);
  return { change: { ...more, nodes: [...left, node] }, node };
}

/** Nodes of a machine, in the order in which a registration may take one over. */
function candidates(model: Model, input: RegisterInput, machineKey: string): NodeRecord[] {
  const rank = (node: NodeRecord) =>
    node.nodeKey === input.nodeKey ? 0 : node.nodeKey === input.oldNodeKey ? 1 : node.tags.length === 0 ? 2 : 3;
  return model.nodesOfMachine(machineKey).sort((a, b) => rank(a) - rank(b) || b.id - a.id);
}

type Owner = Pick<NodeRecord, "tags" | "userId" | "expiry" | "ephemeral" | "authKeyId" | "registerMethod">;

/** The machine's node with its new owner and key: one that exists, or a new one. */
function place(
  ctx: ControlContext,
  input: RegisterInput,
  machineKey: string,
  existing: NodeRecord | undefined,
  owner: Owner,
  preauthorized: boolean,
  now: Millis,
): { node: NodeRecord; more: Change } {
  const { model } = ctx;
  const base = { ...owner, nodeKey: input.nodeKey, expired: false, suspended: false };
  if (existing) {
    const authorized = existing.authorized || preauthorized;
    const taken = { ...existing, ...base, authorized, cap: input.version };
    return { node: withHostinfo(model, taken, input.hostinfo), more: {} };
  }
  const others = model.nodesOfMachine(machineKey);
  if (others.length > 0)
    ctx.log(
      `${machineKey} joins once more, with another owner than its ${others.length === 1 ? "node" : "nodes"} ${others.map(({ id }) => id).join(", ")}`,
    );
  const addresses = allocate(ctx, owner);
  if ("problem" in addresses) throw new LoginRefused(addresses.problem);
  const { ipv4, ipv6 } = addresses;
  const id = model.counters.lastNode + 1;
  const counters: Partial<Counters> = { ...addresses.counters, lastNode: id };
  const hostname = input.hostinfo.Hostname ?? "";
  const node: NodeRecord = {
    ...base,
    id,
    machineKey,
    discoKey: "",
    hostname,
    givenName: uniqueLabel(model, labelOf(hostname)),
    nameFromHost: true,
    ipv4,
    ipv6,
    endpoints: [],
    hostinfo: input.hostinfo,
    homeDerp: homeDerpOf(input.hostinfo) ?? 0,
    cap: input.version,
    authorized: preauthorized || !ctx.settings.node.needsApproval,
    approvedRoutes: [],
    attributes: {},
    createdAt: now,
    lastSeen: null,
    online: false,
  };
  if (!node.authorized)
    ctx.log(`node ${id} (${node.givenName}) waits for an administrator: weft nodes authorize -i ${id}`);
  return { node, more: { counters } };
}

/** When a user's node key expires: the token or the server decides, the client may ask for less. */
function expiryOf(ctx: ControlContext, input: RegisterInput, token: Millis | null, now: Millis): Millis | null {
  const standard = ctx.settings.node.expiry;
  const latest = token ?? (standard === null ? null : now + standard);
  if (input.expiry === null || latest === null) return input.expiry ?? latest;
  return Math.min(input.expiry, latest);
}

/** Has the form of a node key; its private half exists nowhere. */
function keyOfNobody(node: NodeRecord): string {
  return `nodekey:${createHash("sha256").update(`${node.id} was ${node.nodeKey}`).digest("hex")}`;
}

/** A client that brings a pre-auth key may ask for the tags that the key gives, and for no others. */
function keyTagsProblem(input: RegisterInput, key: PreAuthKeyRecord): string | null {
  const refused = requestedTags(input.hostinfo).filter((tag) => !key.tags.includes(tag));
  if (refused.length === 0) return null;
  return refusedTags(refused, "join without --advertise-tags and use a pre-auth key that was made with --tags");
}

function sameTags(a: readonly string[], b: readonly string[]): boolean {
  return a.length === b.length && a.every((tag) => b.includes(tag));
}

/** The node with a new Hostinfo: NetInfo that is absent stays as it was, the name follows the host's while it may. */
export function withHostinfo(model: Model, node: NodeRecord, hostinfo: RegisterInput["hostinfo"]): NodeRecord {
  const kept = hostinfo.NetInfo ? {} : { NetInfo: node.hostinfo.NetInfo };
  const next: NodeRecord = {
    ...node,
    hostinfo: { ...hostinfo, ...(kept.NetInfo ? kept : {}) },
    homeDerp: homeDerpOf(hostinfo) ?? node.homeDerp,
  };
  const hostname = hostinfo.Hostname ?? "";
  if (hostname === "" || hostname === node.hostname) return next;
  return {
    ...next,
    hostname,
    givenName: node.nameFromHost ? uniqueLabel(model, labelOf(hostname), node.id) : node.givenName,
  };
}

function succeed(model: Model, node: NodeRecord, more: Change = {}): Registration {
  return answer({ ...more, nodes: [node] }, success(model, node));
}

function success(model: Model, node: NodeRecord): RegisterResponse {
  const userId = userOf(node);
  const profile = profileOf(model, userId);
  const user = model.users.get(userId);
  const names = user ? namesOf(user) : { LoginName: profile?.LoginName ?? "", DisplayName: profile?.DisplayName ?? "" };
  return {
    User: { ID: userId, DisplayName: names.DisplayName },
    Login: { ID: userId, LoginName: names.LoginName, DisplayName: names.DisplayName },
    MachineAuthorized: isAdmitted(node),
    NodeKeyExpired: false,
    AuthURL: "",
    Error: "",
  };
}
