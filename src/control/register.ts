// What a register request means for the tailnet: a change to the model and an answer (spec/ts2021-control-protocol.md,
// section 9). Pure: the caller commits the change and sends the answer once it is durable.
//
// A node is known by its node key, and a node key belongs to one machine key for ever: everything that names a node key is
// believed only if the Noise handshake proved that machine key. Rules, first match first:
//   node key of another machine            refused
//   expiry in the past                     logout: expires now; an ephemeral node is deleted
//   known, not expired                     state as it is (an expiry before the present one is taken; a valid pre-auth key
//                                          with other tags retags); no pre-auth key is used up, so a container restarts
//   known, expired                         NodeKeyExpired: the client comes back with a new node key
//   new key, valid OldNodeKey, no auth     key rotation: id, addresses and expiry stay
//   new key, pre-auth key                  the key is used; the machine's node of the same owner gets the new node key,
//                                          or else a new node is made
//   anything else                          refused: a login without a pre-auth key is not possible
import type { RegisterResponse } from "../wire/tailcfg.ts";
import { nextIPv4, nextIPv6 } from "./addresses.ts";
import type { Change, Counters, Millis, Model, NodeRecord, PreAuthKeyRecord } from "./model.ts";
import { labelOf, uniqueLabel } from "./names.ts";
import { namesOf, profileOf, timeText, userOf } from "./netmap.ts";
import { findKey, keyProblem } from "./preauthkey.ts";
import { BadRequest, homeDerpOf, type RegisterInput } from "./requests.ts";

export interface Registration {
  /** Null: the tailnet stays as it is. */
  change: Change | null;
  response: RegisterResponse;
}

const NEEDS_KEY =
  "this control server admits nodes by pre-auth key only: make one with `weft preauthkeys create --user ID` and join with --auth-key";

/** `machineKey`: "mkey:…" as the handshake proved it. Throws BadRequest. */
export function planRegister(model: Model, input: RegisterInput, machineKey: string, now: Millis): Registration {
  const known = model.nodeByKey(input.nodeKey);
  if (known && known.machineKey !== machineKey)
    return refuse("this node key belongs to another machine: log out and join again to get a new one");
  if (input.expiry !== null && input.expiry <= now) return logout(known, now);
  if (known) {
    if (isExpired(known, now)) return { change: null, response: { NodeKeyExpired: true, MachineAuthorized: false } };
    return keep(model, known, input, now);
  }
  if (input.authKey !== "") return admit(model, input, machineKey, now);
  const old = input.oldNodeKey === "" ? undefined : model.nodeByKey(input.oldNodeKey);
  if (old && old.machineKey === machineKey && !isExpired(old, now) && input.followup === "")
    return succeed(model, refreshed(model, { ...old, nodeKey: input.nodeKey, expiry: sooner(old, input, now) }, input));
  return refuse(NEEDS_KEY);
}

export function isExpired(node: NodeRecord, now: Millis): boolean {
  return node.expiry !== null && node.expiry <= now;
}

function refuse(message: string): Registration {
  return { change: null, response: { Error: message } };
}

function logout(known: NodeRecord | undefined, now: Millis): Registration {
  const response: RegisterResponse = { NodeKeyExpired: true, MachineAuthorized: false };
  if (!known || isExpired(known, now)) return { change: null, response };
  if (known.ephemeral) return { change: { nodesRemoved: [known.id] }, response };
  return { change: { nodes: [{ ...known, expiry: now, expired: true }] }, response };
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

function keep(model: Model, node: NodeRecord, input: RegisterInput, now: Millis): Registration {
  const key = input.authKey === "" ? null : findKey(model, input.authKey);
  if (key && keyProblem(key, now) === null && key.tags.length > 0 && !sameTags(key.tags, node.tags)) {
    const problem = tagsProblem(input, key);
    if (problem) return refuse(problem);
    const tagged: NodeRecord = { ...node, tags: key.tags, userId: null, expiry: null, authKeyId: key.id };
    return succeed(model, tagged, { keys: [{ ...key, used: true }] });
  }
  const expiry = sooner(node, input, now);
  if (expiry === node.expiry) return { change: null, response: success(model, node) };
  return succeed(model, { ...node, expiry });
}

function admit(model: Model, input: RegisterInput, machineKey: string, now: Millis): Registration {
  const key = findKey(model, input.authKey);
  if (!key)
    return refuse(
      "this server does not know this pre-auth key: check that it was copied whole (weft preauthkeys list)",
    );
  const problem = keyProblem(key, now) ?? tagsProblem(input, key);
  if (problem) return refuse(problem);
  const isTagged = key.tags.length > 0;
  const base = {
    nodeKey: input.nodeKey,
    tags: key.tags,
    userId: isTagged ? null : key.userId,
    expiry: isTagged ? null : input.expiry,
    expired: false,
    ephemeral: key.ephemeral || input.ephemeral,
    authKeyId: key.id,
  };
  const keys = [{ ...key, used: true }];
  const existing = findExisting(model, input, machineKey, key);
  if (existing) return succeed(model, refreshed(model, { ...existing, ...base }, input), { keys });

  const ipv4 = nextIPv4(model.counters.lastIPv4, (ip) => model.hasAddress(ip));
  if (ipv4 === null)
    return refuse("every IPv4 address of 100.64.0.0/10 is taken: delete nodes that are not used any more");
  const ipv6 = nextIPv6(model.counters.lastIPv6, (ip) => model.hasAddress(ip));
  const id = model.counters.lastNode + 1;
  const counters: Partial<Counters> = { lastNode: id, lastIPv4: ipv4, lastIPv6: ipv6 };
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
    registerMethod: "authkey",
    authorized: true,
    approvedRoutes: [],
    attributes: {},
    createdAt: now,
    lastSeen: null,
    online: false,
  };
  return succeed(model, node, { keys, counters });
}

/** The machine's node that this key may take over: the same owner's, or, for a key of tags, any that it has. */
function findExisting(
  model: Model,
  input: RegisterInput,
  machineKey: string,
  key: PreAuthKeyRecord,
): NodeRecord | undefined {
  const candidates = model.nodesOfMachine(machineKey).filter((node) => {
    if (key.tags.length > 0) return node.tags.length > 0 || key.userId === null || node.userId === key.userId;
    return node.tags.length === 0 && node.userId === key.userId;
  });
  return candidates.find((node) => node.nodeKey === input.oldNodeKey) ?? candidates[0];
}

/** Client-requested tags must be among those that the key gives: who may ask for others is a matter of policy. */
function tagsProblem(input: RegisterInput, key: PreAuthKeyRecord): string | null {
  const refused = (input.hostinfo.RequestTags ?? []).filter((tag) => !key.tags.includes(tag));
  if (refused.length === 0) return null;
  return `requested tags [${refused.join(" ").slice(0, 200)}] are invalid or not permitted: join without --advertise-tags and use a pre-auth key that was made with --tags`;
}

function sameTags(a: readonly string[], b: readonly string[]): boolean {
  return a.length === b.length && a.every((tag) => b.includes(tag));
}

/** What a register request tells anew about a node that exists. */
function refreshed(model: Model, node: NodeRecord, input: RegisterInput): NodeRecord {
  const { hostinfo, version } = input;
  return withHostinfo(model, { ...node, cap: version }, hostinfo);
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
  return { change: { ...more, nodes: [node] }, response: success(model, node) };
}

function success(model: Model, node: NodeRecord): RegisterResponse {
  const userId = userOf(node);
  const profile = profileOf(model, userId);
  const user = model.users.get(userId);
  const names = user ? namesOf(user) : { LoginName: profile?.LoginName ?? "", DisplayName: profile?.DisplayName ?? "" };
  return {
    User: { ID: userId, DisplayName: names.DisplayName },
    Login: { ID: userId, LoginName: names.LoginName, DisplayName: names.DisplayName },
    MachineAuthorized: true,
    NodeKeyExpired: false,
    AuthURL: "",
    Error: "",
  };
}
