// What an administrator can do to the tailnet. Each command checks against the model, commits, and returns the value as
// the API shows it (spec/headscale-features.md, section 5: camelCase, ids as decimal strings, RFC 3339 times or null).
import { formatKey } from "../crypto/keys.ts";
import type { ApiNode, ApiPreAuthKey, ApiUser } from "./api/shapes.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Journal } from "./journal.ts";
import type { LoginRecord, LoginRequest } from "./login.ts";
import type { Millis, Model, NodeRecord, PreAuthKeyRecord, RegisterMethod, UserRecord } from "./model.ts";
import { labelOf, labelProblem, tagProblem, uniqueLabel, userNameProblem } from "./names.ts";
import { TAGGED_USER_ID, timeText } from "./netmap.ts";
import { isRoleProvided } from "./oidc.ts";
import type { Role } from "./policy/index.ts";
import { maskedKey, mintKey } from "./preauthkey.ts";
import { isExpired } from "./register.ts";
import { routesOf } from "./routes.ts";
import { SECRET_BYTES } from "./secret.ts";
import { suspensionProblem } from "./users.ts";

const REGISTER_METHODS: Record<RegisterMethod, ApiNode["registerMethod"]> = {
  authkey: "REGISTER_METHOD_AUTH_KEY",
  cli: "REGISTER_METHOD_CLI",
  oidc: "REGISTER_METHOD_OIDC",
};
const MAX_NAME = 200;
/** Capability version of machines that do not exist. */
const DEBUG_VERSION = 140;
/** An hour, as Headscale's command line has it. */
const DEFAULT_KEY_LIFETIME = 60 * 60_000;
const TAGGED_USER: ApiUser = {
  id: String(TAGGED_USER_ID),
  name: "tagged-devices",
  createdAt: null,
  displayName: "Tagged Devices",
  email: "",
  providerId: "",
  provider: "",
  profilePicUrl: "",
  role: "member",
  status: "active",
};

export class Commands {
  private readonly model: Model;
  private readonly journal: Journal;

  constructor(private readonly context: ControlContext) {
    this.model = context.model;
    this.journal = context.journal;
  }

  /** Those with all of these. */
  /** Id 0 is none. */
  listUsers(filter: { id?: number | undefined; name?: string | undefined; email?: string | undefined }): UserRecord[] {
    return [...this.model.users.values()]
      .filter(
        (user) =>
          (!filter.id || user.id === filter.id) &&
          (filter.name === undefined || shownName(user) === filter.name) &&
          (filter.email === undefined || user.email === filter.email),
      )
      .sort((a, b) => a.id - b.id);
  }

  async createUser(input: {
    name: string;
    displayName?: string | undefined;
    email?: string | undefined;
    pictureUrl?: string | undefined;
  }): Promise<ApiUser> {
    const problem = userNameProblem(input.name);
    if (problem) throw new CommandError(400, problem);
    for (const value of [input.displayName, input.email, input.pictureUrl])
      if (value && value.length > MAX_NAME)
        throw new CommandError(400, `display name, e-mail and picture URL have at most ${MAX_NAME} characters`);
    if (input.email && !/^[^\s@]+@[^\s@]+$/.test(input.email))
      throw new CommandError(400, `${JSON.stringify(input.email)} is no e-mail address`);
    if (input.pictureUrl && !/^https?:$/.test(URL.parse(input.pictureUrl)?.protocol ?? ""))
      throw new CommandError(400, `${JSON.stringify(input.pictureUrl)} is no http or https URL of a picture`);
    if (this.model.userByName(input.name)) throw new CommandError(409, `a user named "${input.name}" already exists`);
    const id = this.model.counters.lastUser + 1;
    const user: UserRecord = {
      id,
      name: input.name,
      displayName: input.displayName ?? "",
      email: input.email ?? "",
      profilePicUrl: input.pictureUrl ?? "",
      provider: "",
      providerId: "",
      groups: [],
      role: "member",
      status: "active",
      createdAt: this.context.now(),
    };
    await this.journal.commit({ users: [user], counters: { lastUser: id } });
    return apiUser(user);
  }

  /** Of a user that was made here: what an identity provider says of its users comes with each login. */
  async renameUser(id: number, name: string): Promise<ApiUser> {
    const user = this.user(id);
    const problem = userNameProblem(name);
    if (problem) throw new CommandError(400, problem);
    if (user.providerId !== "")
      throw new CommandError(400, `user ${id} comes from an identity provider, which gives it its name at each login`);
    const holder = this.model.userByName(name);
    if (holder && holder.id !== id) throw new CommandError(409, `a user named "${name}" already exists`);
    const renamed = { ...user, name };
    await this.journal.commit({ users: [renamed] });
    return apiUser(renamed);
  }

  /** Of everybody but those whose provider gives roles by group. */
  async setRole(id: number, role: Role): Promise<ApiUser> {
    const user = this.user(id);
    if (isRoleProvided(user, this.context.settings.oidc))
      throw new CommandError(
        400,
        `user ${id} has the role that the groups of its identity provider give it at each login (oidc.roles)`,
      );
    const next = { ...user, role };
    if (user.role !== role) await this.journal.commit({ users: [next] });
    return apiUser(next);
  }

  /** `withNodes`: and all nodes; else it is refused as long as the user has some. */
  async destroyUser(id: number, withNodes = false): Promise<void> {
    const user = this.user(id);
    const owned = this.model.nodesOfUser(id);
    if (owned.length > 0 && !withNodes)
      throw new CommandError(
        409,
        `user "${user.name}" still has ${owned.length} ${owned.length === 1 ? "node" : "nodes"}: delete ${owned.length === 1 ? "it" : "them"} first (weft nodes list --user ${id})`,
      );
    const keysRemoved = [...this.model.keys.values()].filter((key) => key.userId === id).map((key) => key.id);
    // Tagged nodes outlive the user whose key admitted them.
    const nodes = [...this.model.nodes.values()]
      .filter((node) => node.userId !== id && node.authKeyId !== null && keysRemoved.includes(node.authKeyId))
      .map((node) => ({ ...node, authKeyId: null }));
    const nodesRemoved = owned.map((node) => node.id);
    await this.journal.commit({ nodes, nodesRemoved, keysRemoved, usersRemoved: [id] });
  }

  /** `user`: id or name; none: those of all users. */
  listKeys(filter: { user?: string | undefined } = {}): PreAuthKeyRecord[] {
    const owner = filter.user === undefined ? undefined : (this.findUser(filter.user)?.id ?? 0);
    return [...this.model.keys.values()]
      .filter((key) => owner === undefined || key.userId === owner)
      .sort((a, b) => a.id - b.id);
  }

  async createKey(input: {
    user?: number | undefined;
    reusable?: boolean | undefined;
    ephemeral?: boolean | undefined;
    /** Null: never. Default: in an hour. */
    expiration?: Millis | null | undefined;
    aclTags?: string[] | undefined;
    description?: string | undefined;
    preauthorized?: boolean | undefined;
  }): Promise<{ record: PreAuthKeyRecord; text: string }> {
    const tags = [...new Set(input.aclTags ?? [])];
    for (const tag of tags) {
      const problem = tagProblem(tag);
      if (problem) throw new CommandError(400, problem);
    }
    if (input.user === undefined && tags.length === 0)
      throw new CommandError(400, "a pre-auth key needs a user, tags, or both: give --user ID or --tags tag:NAME");
    const suspended = input.user === undefined ? null : suspensionProblem(this.user(input.user));
    if (suspended) throw new CommandError(409, suspended);
    const now = this.context.now();
    const expiration = input.expiration === undefined ? now + DEFAULT_KEY_LIFETIME : input.expiration;
    if (expiration !== null && expiration <= now)
      throw new CommandError(400, `the key would have expired already, at ${timeText(expiration)}`);
    const minted = mintKey(this.context.random(SECRET_BYTES));
    const id = this.model.counters.lastKey + 1;
    const key: PreAuthKeyRecord = {
      id,
      prefix: minted.prefix,
      hash: minted.hash,
      userId: input.user ?? null,
      reusable: input.reusable ?? false,
      ephemeral: input.ephemeral ?? false,
      used: false,
      tags,
      description: input.description ?? "",
      preauthorized: input.preauthorized ?? false,
      expiration,
      revokedAt: null,
      createdAt: now,
    };
    await this.journal.commit({ keys: [key], counters: { lastKey: id } });
    return { record: key, text: minted.text };
  }

  async expireKey(id: number): Promise<void> {
    const key = this.key(id);
    const now = this.context.now();
    if (key.expiration !== null && key.expiration <= now) return;
    await this.journal.commit({ keys: [{ ...key, expiration: now }] });
  }

  /** It opens nothing any more, but is still known for a while, as one that was revoked. */
  async revokeKey(id: number): Promise<void> {
    const key = this.key(id);
    if (key.revokedAt === null) await this.journal.commit({ keys: [{ ...key, revokedAt: this.context.now() }] });
  }

  /** Nodes that joined with it stay. */
  async deleteKey(id: number): Promise<void> {
    this.key(id);
    await this.removeKeys([id]);
  }

  /** Forgets keys that were revoked long ago. */
  async sweep(): Promise<void> {
    const before = this.context.now() - this.context.settings.preAuthKeys.revokedRetention;
    const old = [...this.model.keys.values()].filter(({ revokedAt }) => revokedAt !== null && revokedAt <= before);
    if (old.length > 0) await this.removeKeys(old.map(({ id }) => id));
  }

  private removeKeys(ids: readonly number[]): Promise<void> {
    const nodes = [...this.model.nodes.values()]
      .filter((node) => node.authKeyId !== null && ids.includes(node.authKeyId))
      .map((node) => ({ ...node, authKeyId: null }));
    return this.journal.commit({ nodes, keysRemoved: [...ids] });
  }

  /** `user`: id or name; none: all nodes. */
  /** Of a user, who must exist, by id or name. Throws CommandError. */
  listNodes(filter: { user?: string | undefined }): NodeRecord[] {
    const owner = filter.user === undefined ? undefined : this.requireUser(filter.user).id;
    return this.model.sortedNodes().filter((node) => owner === undefined || node.userId === owner);
  }

  async deleteNode(id: number): Promise<void> {
    this.node(id);
    await this.journal.commit({ nodesRemoved: [id] });
  }

  /** `expiry` null: never again. */
  async expireNode(id: number, expiry: Millis | null): Promise<NodeRecord> {
    const node = this.node(id);
    const next = { ...node, expiry };
    await this.journal.commit({ nodes: [{ ...next, expired: isExpired(next, this.context.now()) }] });
    return this.node(id);
  }

  async renameNode(id: number, name: string): Promise<NodeRecord> {
    const node = this.node(id);
    const problem = labelProblem(name);
    if (problem) throw new CommandError(400, problem);
    if (`${name}.${this.context.config.baseDomain}`.length > 253)
      throw new CommandError(
        400,
        `"${name}.${this.context.config.baseDomain}" is longer than the 253 characters of a DNS name`,
      );
    const holder = this.model.nodeByName(name);
    if (holder && holder.id !== id) throw new CommandError(409, `the name "${name}" is taken by node ${holder.id}`);
    await this.journal.commit({ nodes: [{ ...node, givenName: name, nameFromHost: false }] });
    return this.node(id);
  }

  /** Puts a machine that does not exist among those that wait for a login, under `authId`. Gives the node that it would be. */
  async pretendLogin(authId: string, user: string, name: string, routes: readonly string[]): Promise<ApiNode> {
    if (!/^hskey-authreq-[0-9a-f]{24}$/.test(authId))
      throw new CommandError(400, "the key must be a login's id: hskey-authreq- and 24 hexadecimal digits");
    const owner = this.requireUser(user);
    if (this.model.documents("login").size >= this.context.settings.login.maxPending)
      throw new CommandError(409, `${this.context.settings.login.maxPending} logins wait already`);
    const now = this.context.now();
    const machineKey = formatKey("mkey", this.context.random(32));
    const nodeKey = formatKey("nodekey", this.context.random(32));
    const hostinfo = { Hostname: name, OS: "linux", RoutableIPs: [...routes] };
    const input = {
      version: DEBUG_VERSION,
      nodeKey,
      oldNodeKey: "",
      authKey: "",
      expiry: null,
      followup: "",
      hostinfo,
    };
    const request: LoginRequest = { kind: "register", machineKey, input: { ...input, ephemeral: false } };
    const expiresAt = now + this.context.settings.login.expiry;
    const value: LoginRecord = { request, address: "", createdAt: now, expiresAt, verdict: null };
    await this.journal.commit({ documents: [{ kind: "login", id: authId, value }] });
    return {
      id: "0",
      machineKey,
      nodeKey,
      discoKey: "",
      ipAddresses: [],
      name,
      user: apiUser(owner),
      lastSeen: null,
      expiry: null,
      preAuthKey: null,
      createdAt: timeText(now),
      registerMethod: "REGISTER_METHOD_UNSPECIFIED",
      givenName: labelOf(name),
      online: false,
      approvedRoutes: [],
      availableRoutes: [...routes],
      subnetRoutes: [],
      tags: [],
      ephemeral: false,
      authorized: false,
    };
  }

  /** By id or name; by what is shown in its place where one user alone is shown so. */
  findUser(wanted: string): UserRecord | undefined {
    const known = /^\d{1,15}$/.test(wanted) ? this.model.users.get(Number(wanted)) : undefined;
    const named = known ?? this.model.userByName(wanted);
    if (named || wanted === "") return named;
    const shown = this.listUsers({ name: wanted });
    return shown.length === 1 ? shown[0] : undefined;
  }

  /** By id or name. Throws CommandError. */
  requireUser(wanted: string): UserRecord {
    const user = this.findUser(wanted);
    if (!user)
      throw new CommandError(
        404,
        `there is no user ${JSON.stringify(wanted.slice(0, 100))}: weft users list shows those that exist`,
      );
    return user;
  }

  /** By id. Throws CommandError. */
  user(id: number): UserRecord {
    const user = this.model.users.get(id);
    if (!user) throw new CommandError(404, `there is no user ${id}: weft users list shows those that exist`);
    return user;
  }

  /** By id. Throws CommandError. */
  node(id: number): NodeRecord {
    const node = this.model.nodes.get(id);
    if (!node) throw new CommandError(404, `there is no node ${id}: weft nodes list shows those that exist`);
    return node;
  }

  /** By id. Throws CommandError. */
  key(id: number): PreAuthKeyRecord {
    const key = this.model.keys.get(id);
    if (!key)
      throw new CommandError(404, `there is no pre-auth key ${id}: weft preauthkeys list shows those that exist`);
    return key;
  }

  /** By its text, whole or masked as in lists: the public part counts. Throws CommandError. */
  keyByText(text: string): PreAuthKeyRecord {
    const prefix = /^hskey-auth-([\w-]{12})(-|$)/.exec(text)?.[1];
    const key = prefix === undefined ? undefined : this.model.keyByPrefix(prefix);
    if (!key)
      throw new CommandError(404, "there is no such pre-auth key: weft preauthkeys list shows those that exist");
    return key;
  }

  /** False: it stays, but has no peers until it is let in. */
  async authorizeNode(id: number, authorized: boolean): Promise<NodeRecord> {
    const node = this.node(id);
    if (node.authorized !== authorized) await this.journal.commit({ nodes: [{ ...node, authorized }] });
    return this.node(id);
  }

  /** Takes an administrator's choice of name back. */
  async nameAfterHost(id: number): Promise<NodeRecord> {
    const node = this.node(id);
    const givenName = uniqueLabel(this.model, labelOf(node.hostname), id);
    await this.journal.commit({ nodes: [{ ...node, givenName, nameFromHost: true }] });
    return this.node(id);
  }

  apiKey(key: PreAuthKeyRecord): ApiPreAuthKey {
    const user = key.userId === null ? undefined : this.model.users.get(key.userId);
    return {
      user: user ? apiUser(user) : null,
      id: String(key.id),
      key: maskedKey(key),
      reusable: key.reusable,
      ephemeral: key.ephemeral,
      used: key.used,
      // A revoked key is one that expired then, for those who know no more.
      expiration: timeOrNull(key.revokedAt ?? key.expiration),
      createdAt: timeText(key.createdAt),
      aclTags: [...key.tags],
    };
  }

  apiNode(node: NodeRecord): ApiNode {
    const user = node.userId === null ? undefined : this.model.users.get(node.userId);
    const isByKey = node.registerMethod === "authkey" && node.authKeyId !== null;
    const key = isByKey ? this.model.keys.get(node.authKeyId!) : undefined;
    const routes = routesOf(this.context, node);
    return {
      id: String(node.id),
      machineKey: node.machineKey,
      nodeKey: node.nodeKey,
      discoKey: node.discoKey,
      ipAddresses: [node.ipv4, node.ipv6].filter((ip) => ip !== ""),
      name: node.hostname,
      user: user ? apiUser(user) : TAGGED_USER,
      lastSeen: timeOrNull(node.online ? this.context.now() : node.lastSeen),
      expiry: timeOrNull(node.expiry),
      preAuthKey: key ? this.apiKey(key) : null,
      createdAt: timeText(node.createdAt),
      registerMethod: REGISTER_METHODS[node.registerMethod],
      givenName: node.givenName,
      online: node.online,
      approvedRoutes: [...routes.approved],
      availableRoutes: [...routes.advertised],
      subnetRoutes: [...routes.serving],
      tags: [...node.tags],
      ephemeral: node.ephemeral,
      authorized: node.authorized,
    };
  }
}

/** An identity provider may have given no name that is one here. */
function shownName(user: UserRecord): string {
  return user.name || user.email || user.providerId;
}

export function apiUser(user: UserRecord): ApiUser {
  return {
    id: String(user.id),
    name: shownName(user),
    createdAt: timeText(user.createdAt),
    displayName: user.displayName,
    email: user.email,
    providerId: user.providerId,
    provider: user.provider,
    profilePicUrl: user.profilePicUrl,
    role: user.role,
    status: user.status,
  };
}

function timeOrNull(millis: Millis | null): string | null {
  return millis === null ? null : timeText(millis);
}
