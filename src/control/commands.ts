// What an administrator can do to the tailnet. Each command checks against the model, commits, and returns the value as
// the API shows it (spec/headscale-features.md, section 5: camelCase, ids as decimal strings, RFC 3339 times or null).
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Journal } from "./journal.ts";
import type { Millis, Model, NodeRecord, PreAuthKeyRecord, RegisterMethod, UserRecord } from "./model.ts";
import { labelProblem, tagProblem, userNameProblem } from "./names.ts";
import { TAGGED_USER_ID, timeText } from "./netmap.ts";
import { maskedKey, mintKey } from "./preauthkey.ts";
import { isExpired } from "./register.ts";

export interface ApiUser {
  id: string;
  name: string;
  createdAt: string | null;
  displayName: string;
  email: string;
  providerId: string;
  provider: string;
  profilePicUrl: string;
}

export interface ApiPreAuthKey {
  user: ApiUser | null;
  id: string;
  key: string;
  reusable: boolean;
  ephemeral: boolean;
  used: boolean;
  expiration: string | null;
  createdAt: string;
  aclTags: string[];
}

export interface ApiNode {
  id: string;
  machineKey: string;
  nodeKey: string;
  discoKey: string;
  ipAddresses: string[];
  name: string;
  user: ApiUser;
  lastSeen: string | null;
  expiry: string | null;
  preAuthKey: ApiPreAuthKey | null;
  createdAt: string;
  registerMethod: string;
  givenName: string;
  online: boolean;
  approvedRoutes: string[];
  availableRoutes: string[];
  subnetRoutes: string[];
  tags: string[];
  ephemeral: boolean;
}

const REGISTER_METHODS: Record<RegisterMethod, string> = {
  authkey: "REGISTER_METHOD_AUTH_KEY",
  cli: "REGISTER_METHOD_CLI",
  oidc: "REGISTER_METHOD_OIDC",
};
const MAX_NAME = 200;
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
};

export class Commands {
  private readonly model: Model;
  private readonly journal: Journal;

  constructor(private readonly context: ControlContext) {
    this.model = context.model;
    this.journal = context.journal;
  }

  listUsers(filter: { id?: number | undefined; name?: string | undefined; email?: string | undefined }): ApiUser[] {
    return [...this.model.users.values()]
      .filter(
        (user) =>
          (filter.id === undefined || user.id === filter.id) &&
          (filter.name === undefined || user.name === filter.name) &&
          (filter.email === undefined || user.email === filter.email),
      )
      .sort((a, b) => a.id - b.id)
      .map(apiUser);
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
      createdAt: this.context.now(),
    };
    await this.journal.commit({ users: [user], counters: { lastUser: id } });
    return apiUser(user);
  }

  async destroyUser(id: number): Promise<void> {
    const user = this.user(id);
    const owned = this.model.nodesOfUser(id);
    if (owned.length > 0)
      throw new CommandError(
        409,
        `user "${user.name}" still has ${owned.length} ${owned.length === 1 ? "node" : "nodes"}: delete ${owned.length === 1 ? "it" : "them"} first (weft nodes list --user ${id})`,
      );
    const keysRemoved = [...this.model.keys.values()].filter((key) => key.userId === id).map((key) => key.id);
    // Tagged nodes outlive the user whose key admitted them.
    const nodes = [...this.model.nodes.values()]
      .filter((node) => node.authKeyId !== null && keysRemoved.includes(node.authKeyId))
      .map((node) => ({ ...node, authKeyId: null }));
    await this.journal.commit({ nodes, keysRemoved, usersRemoved: [id] });
  }

  listKeys(): ApiPreAuthKey[] {
    return [...this.model.keys.values()].sort((a, b) => a.id - b.id).map((key) => this.apiKey(key));
  }

  async createKey(input: {
    user?: number | undefined;
    reusable?: boolean | undefined;
    ephemeral?: boolean | undefined;
    expiration?: Millis | undefined;
    aclTags?: string[] | undefined;
  }): Promise<ApiPreAuthKey> {
    const tags = [...new Set(input.aclTags ?? [])];
    for (const tag of tags) {
      const problem = tagProblem(tag);
      if (problem) throw new CommandError(400, problem);
    }
    if (input.user === undefined && tags.length === 0)
      throw new CommandError(400, "a pre-auth key needs a user, tags, or both: give --user ID or --tags tag:NAME");
    if (input.user !== undefined) this.user(input.user);
    const now = this.context.now();
    const expiration = input.expiration ?? now + DEFAULT_KEY_LIFETIME;
    if (expiration <= now)
      throw new CommandError(400, `the key would have expired already, at ${timeText(expiration)}`);
    const minted = mintKey(this.context.random(38));
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
      description: "",
      preauthorized: false,
      expiration,
      revokedAt: null,
      createdAt: now,
    };
    await this.journal.commit({ keys: [key], counters: { lastKey: id } });
    return { ...this.apiKey(key), key: minted.text };
  }

  async expireKey(id: number): Promise<void> {
    const key = this.model.keys.get(id);
    if (!key)
      throw new CommandError(404, `there is no pre-auth key ${id}: weft preauthkeys list shows those that exist`);
    const now = this.context.now();
    if (key.expiration !== null && key.expiration <= now) return;
    await this.journal.commit({ keys: [{ ...key, expiration: now }] });
  }

  listNodes(filter: { user?: string | undefined }): ApiNode[] {
    return this.model
      .sortedNodes()
      .filter((node) => filter.user === undefined || this.belongsTo(node, filter.user))
      .map((node) => this.apiNode(node));
  }

  getNode(id: number): ApiNode {
    return this.apiNode(this.node(id));
  }

  async deleteNode(id: number): Promise<void> {
    this.node(id);
    await this.journal.commit({ nodesRemoved: [id] });
  }

  /** `expiry` null: never again. */
  async expireNode(id: number, expiry: Millis | null): Promise<ApiNode> {
    const node = this.node(id);
    const next = { ...node, expiry };
    await this.journal.commit({ nodes: [{ ...next, expired: isExpired(next, this.context.now()) }] });
    return this.getNode(id);
  }

  async renameNode(id: number, name: string): Promise<ApiNode> {
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
    return this.getNode(id);
  }

  private user(id: number): UserRecord {
    const user = this.model.users.get(id);
    if (!user) throw new CommandError(404, `there is no user ${id}: weft users list shows those that exist`);
    return user;
  }

  private node(id: number): NodeRecord {
    const node = this.model.nodes.get(id);
    if (!node) throw new CommandError(404, `there is no node ${id}: weft nodes list shows those that exist`);
    return node;
  }

  private belongsTo(node: NodeRecord, user: string): boolean {
    const owner = node.userId === null ? undefined : this.model.users.get(node.userId);
    return owner !== undefined && (owner.name === user || String(owner.id) === user);
  }

  private apiKey(key: PreAuthKeyRecord): ApiPreAuthKey {
    const user = key.userId === null ? undefined : this.model.users.get(key.userId);
    return {
      user: user ? apiUser(user) : null,
      id: String(key.id),
      key: maskedKey(key),
      reusable: key.reusable,
      ephemeral: key.ephemeral,
      used: key.used,
      expiration: timeOrNull(key.expiration),
      createdAt: timeText(key.createdAt),
      aclTags: [...key.tags],
    };
  }

  private apiNode(node: NodeRecord): ApiNode {
    const user = node.userId === null ? undefined : this.model.users.get(node.userId);
    const key = node.authKeyId === null ? undefined : this.model.keys.get(node.authKeyId);
    const routes = node.hostinfo.RoutableIPs;
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
      approvedRoutes: [],
      availableRoutes: Array.isArray(routes) ? routes.filter((route) => typeof route === "string") : [],
      subnetRoutes: [],
      tags: [...node.tags],
      ephemeral: node.ephemeral,
    };
  }
}

function apiUser(user: UserRecord): ApiUser {
  return {
    id: String(user.id),
    name: user.name,
    createdAt: timeText(user.createdAt),
    displayName: user.displayName,
    email: user.email,
    providerId: user.providerId,
    provider: user.provider,
    profilePicUrl: user.profilePicUrl,
  };
}

function timeOrNull(millis: Millis | null): string | null {
  return millis === null ? null : timeText(millis);
}
