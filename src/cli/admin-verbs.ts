// The administrator's verbs in Headscale's words (spec/headscale-features.md, section 3): what each takes, asks the API for,
// and shows.
import type { ApiApiKey, ApiNode, ApiPreAuthKey, ApiUser } from "../control/api/shapes.ts";
import type { ApiKeyV2 } from "../control/api/v2-shapes.ts";
import type { AdminClient } from "./admin-client.ts";
import { type FlagSpec, type Flags, UsageError } from "./flags.ts";
import { showTime, table } from "./output.ts";

/** What a command did: `value` for programs, `text` for people. */
export interface Result {
  value: unknown;
  text: string;
}

/** What a verb works with. */
export interface Session {
  api: AdminClient;
  /** Asks a person at a terminal; throws when the answer is no. */
  confirm(question: string): Promise<void>;
}

type Spec = Record<string, FlagSpec["kind"] | FlagSpec>;

export interface Verb {
  aliases: readonly string[];
  /** What stands behind the verb. */
  usage: string;
  flags: Spec;
  /** How many arguments may stand beside the flags. */
  positional: number;
  run(session: Session, flags: Flags<Spec>): Promise<Result>;
}

export interface Noun {
  aliases: readonly string[];
  verbs: Readonly<Record<string, Verb>>;
}

/** The type of `flags` follows from what the verb takes. */
function verb<const S extends Spec>(
  description: Omit<Verb, "flags" | "run" | "aliases" | "positional"> & {
    aliases?: readonly string[];
    positional?: number;
    flags?: S;
    run(session: Session, flags: Flags<S>): Promise<Result>;
  },
): Verb {
  const { run } = description;
  return {
    aliases: [],
    positional: 0,
    flags: {},
    ...description,
    run: (session, flags) => run(session, flags as Flags<S>),
  };
}

const TEXT = "string";
const identifier = { kind: TEXT, short: "i" } as const;
const user = { kind: TEXT, short: "u" } as const;
const name = { kind: TEXT, short: "n" } as const;
const CREATE = ["c", "new"];
const LIST = ["ls", "show"];
const EXPIRE = ["exp", "e"];
const DELETE = ["remove", "del"];

/** Shuts a user out, or lets one in again. */
function userStatus(command: "suspend" | "restore", done: string): Verb {
  return verb({
    usage: "-i ID | -n NAME",
    positional: 1,
    flags: { identifier, name },
    async run({ api }, flags) {
      const { id } = await wantedUser(api, flags, command);
      const { user } = await api.call<{ user: ApiUser }>("POST", `/v1/user/${id}/${command}`);
      return { value: user, text: `User ${done}` };
    },
  });
}

const users: Record<string, Verb> = {
  create: verb({
    aliases: CREATE,
    usage: "NAME [-d DISPLAY-NAME] [-e EMAIL] [-p PICTURE-URL]",
    positional: 1,
    flags: {
      "display-name": { kind: TEXT, short: "d" },
      email: { kind: TEXT, short: "e" },
      "picture-url": { kind: TEXT, short: "p" },
    },
    async run({ api }, flags) {
      const name = flags._[0];
      if (name === undefined) throw new UsageError("which user? `users create NAME`");
      const body = { name, displayName: flags["display-name"], email: flags.email, pictureUrl: flags["picture-url"] };
      const created = await api.call<{ user: ApiUser }>("POST", "/v1/user", body);
      return { value: created.user, text: "User created" };
    },
  }),
  list: verb({
    aliases: LIST,
    usage: "[-i ID] [-n NAME] [-e EMAIL]",
    flags: { identifier, name, email: { kind: TEXT, short: "e" } },
    async run({ api }, flags) {
      const query = queryOf({ id: flags.identifier, name: flags.name, email: flags.email });
      const { users } = await api.call<{ users: ApiUser[] }>("GET", `/v1/user${query}`);
      const rows = users.map((u) => [
        u.id,
        u.displayName,
        u.name,
        u.email,
        showTime(u.createdAt, ""),
        u.role,
        u.status,
      ]);
      return { value: users, text: table(["ID", "Name", "Username", "Email", "Created", "Role", "Status"], rows) };
    },
  }),
  rename: verb({
    aliases: ["mv"],
    usage: "-i ID | -n NAME -r NEW-NAME",
    flags: { identifier, name, "new-name": { kind: TEXT, short: "r" } },
    async run({ api }, flags) {
      const next = flags["new-name"];
      if (next === undefined) throw new UsageError("which name? `users rename -i ID -r NEW-NAME`");
      const { id } = await wantedUser(api, flags, "rename");
      const path = `/v1/user/${id}/rename/${encodeURIComponent(next)}`;
      const renamed = await api.call<{ user: ApiUser }>("POST", path);
      return { value: renamed.user, text: "User renamed" };
    },
  }),
  "set-role": verb({
    usage: "-i ID | -n NAME | NAME ROLE",
    positional: 2,
    flags: { identifier, name },
    async run({ api }, flags) {
      const words = [...flags._];
      const role = words.pop();
      if (role === undefined) throw new UsageError("which role? `users set-role NAME ROLE`");
      const { id } = await wantedUser(api, { ...flags, _: words }, "set-role");
      const changed = await api.call<{ user: ApiUser }>("POST", `/v1/user/${id}/role`, { role });
      return { value: changed.user, text: `${changed.user.name} is ${changed.user.role} now` };
    },
  }),
  suspend: userStatus("suspend", "suspended"),
  restore: userStatus("restore", "restored"),
  destroy: verb({
    aliases: ["delete"],
    usage: "-i ID | -n NAME",
    positional: 1,
    flags: { identifier, name },
    async run({ api, confirm }, flags) {
      const found = await wantedUser(api, flags, "destroy");
      await confirm(`Destroy the user "${found.name}" (ID ${found.id})?`);
      return { value: await api.call("DELETE", `/v1/user/${found.id}`), text: "User destroyed" };
    },
  }),
};

const preauthkeys: Record<string, Verb> = {
  create: verb({
    aliases: CREATE,
    usage: "[-u USER] [--reusable] [--ephemeral] [--tags tag:a,tag:b] [-e 24h]",
    flags: {
      user,
      reusable: "boolean",
      ephemeral: "boolean",
      tags: "list",
      expiration: { kind: "duration", short: "e" },
    },
    async run({ api }, flags) {
      const owner = flags.user === undefined ? undefined : (await api.findUser(flags.user, true)).id;
      const { preAuthKey } = await api.call<{ preAuthKey: ApiPreAuthKey }>("POST", "/v1/preauthkey", {
        user: owner,
        reusable: flags.reusable ?? false,
        ephemeral: flags.ephemeral ?? false,
        aclTags: flags.tags ?? [],
        expiration: fromNow(flags.expiration ?? 3_600_000),
      });
      return { value: preAuthKey, text: preAuthKey.key };
    },
  }),
  list: verb({
    aliases: LIST,
    usage: "[-u USER]",
    flags: { user },
    async run({ api }, flags) {
      const owner = flags.user === undefined ? undefined : (await api.findUser(flags.user, true)).id;
      const path = `/v1/preauthkey${queryOf({ user: owner })}`;
      const { preAuthKeys } = await api.call<{ preAuthKeys: ApiPreAuthKey[] }>("GET", path);
      const rows = preAuthKeys.map((key) => [
        key.id,
        key.key,
        String(key.reusable),
        String(key.ephemeral),
        String(key.used),
        showTime(key.expiration, "-"),
        showTime(key.createdAt, "-"),
        key.aclTags.length > 0 ? key.aclTags.join(",") : (key.user?.name ?? "-"),
      ]);
      const header = ["ID", "Key/Prefix", "Reusable", "Ephemeral", "Used", "Expiration", "Created", "Owner"];
      return { value: preAuthKeys, text: table(header, rows) };
    },
  }),
  expire: verb({
    aliases: ["revoke", ...EXPIRE],
    usage: "--id ID",
    positional: 1,
    flags: { id: identifier },
    async run({ api }, flags) {
      const wanted = flags.id ?? flags._[0];
      if (wanted === undefined) throw new UsageError("which key? `preauthkeys expire --id ID`");
      const body = /^\d+$/.test(wanted) ? { id: wanted } : { key: wanted };
      return { value: await api.call("POST", "/v1/preauthkey/expire", body), text: "Key expired" };
    },
  }),
  delete: verb({
    aliases: [...DELETE, "rm", "d"],
    usage: "--id ID",
    positional: 1,
    flags: { id: identifier },
    async run({ api, confirm }, flags) {
      const id = wantedId(flags.id ?? flags._[0], "key", "preauthkeys delete --id ID");
      await confirm(`Delete the pre-auth key ${id}? Nodes that joined with it stay.`);
      return { value: await api.call("DELETE", `/v1/preauthkey${queryOf({ id })}`), text: "Key deleted" };
    },
  }),
};

const routes = { kind: "list", short: "r" } as const;

const nodes: Record<string, Verb> = {
  list: verb({
    aliases: LIST,
    usage: "[-u USER]",
    flags: { user },
    async run({ api }, flags) {
      const { nodes } = await api.call<{ nodes: ApiNode[] }>("GET", `/v1/node${queryOf({ user: flags.user })}`);
      return { value: nodes, text: nodesTable(nodes) };
    },
  }),
  "list-routes": verb({
    aliases: ["lsr", "routes"],
    usage: "[-i ID]",
    flags: { identifier },
    async run({ api }, flags) {
      const { nodes } = await api.call<{ nodes: ApiNode[] }>("GET", "/v1/node");
      const id = flags.identifier;
      if (id !== undefined && !nodes.some((node) => node.id === id))
        throw new Error(`there is no node ${id}: \`weft nodes list\` shows those that exist`);
      const shown = nodes.filter((node) =>
        id === undefined ? node.availableRoutes.length + node.approvedRoutes.length > 0 : node.id === id,
      );
      const rows = shown.map((node) => [
        node.id,
        node.givenName,
        node.approvedRoutes.join(", "),
        node.availableRoutes.join(", "),
        node.subnetRoutes.join(", "),
      ]);
      return { value: shown, text: table(["ID", "Hostname", "Approved", "Available", "Serving (Primary)"], rows) };
    },
  }),
  "approve-routes": verb({
    usage: "-i ID -r CIDR,CIDR",
    positional: 1,
    flags: { identifier, routes },
    async run({ api }, flags) {
      const id = wantedNode(flags.identifier ?? flags._[0], "approve-routes");
      if (flags.routes === undefined)
        throw new UsageError('which routes? `nodes approve-routes -i ID -r 10.0.0.0/8`; -r "" takes all away');
      const { node } = await api.call<{ node: ApiNode }>("POST", `/v1/node/${id}/approve_routes`, {
        routes: flags.routes,
      });
      return { value: node, text: "Node updated" };
    },
  }),
  register: verb({
    usage: "-u USER -k AUTH-ID",
    flags: { user, key: { kind: TEXT, short: "k" } },
    run: ({ api }, flags) => register(api, flags.user, flags.key, "nodes register -u USER -k AUTH-ID"),
  }),
  authorize: verb({
    aliases: ["approve"],
    usage: "-i ID [--deny]",
    positional: 1,
    flags: { identifier, deny: "boolean" },
    async run({ api }, flags) {
      const id = wantedNode(flags.identifier ?? flags._[0], "authorize");
      await api.call("POST", `/v2/device/${id}/authorized`, { authorized: !flags.deny });
      const { node } = await api.call<{ node: ApiNode }>("GET", `/v1/node/${id}`);
      return { value: node, text: flags.deny ? "Node shut out" : "Node let in" };
    },
  }),
  tag: verb({
    aliases: ["tags", "t"],
    usage: "-i ID -t tag:a,tag:b",
    positional: 1,
    flags: { identifier, tags: { kind: "list", short: "t" } },
    async run({ api }, flags) {
      const id = wantedNode(flags.identifier ?? flags._[0], "tag");
      if (flags.tags === undefined) throw new UsageError("which tags? `nodes tag -i ID -t tag:a,tag:b`");
      const { node } = await api.call<{ node: ApiNode }>("POST", `/v1/node/${id}/tags`, { tags: flags.tags });
      return { value: node, text: "Node updated" };
    },
  }),
  backfillips: verb({
    usage: "",
    async run({ api, confirm }) {
      await confirm(
        "Give nodes the addresses that they lack by the present prefixes, and take those of other families?",
      );
      const answer = await api.call<{ changes: string[] }>("POST", "/v1/node/backfillips?confirmed=true");
      return { value: answer, text: answer.changes.join("\n") || "Every node has the addresses that it should have" };
    },
  }),
  expire: verb({
    aliases: ["logout", ...EXPIRE],
    usage: "-i ID [-e TIME | --disable]",
    positional: 1,
    flags: { identifier, expiry: { kind: TEXT, short: "e" }, disable: { kind: "boolean", short: "d" } },
    async run({ api }, flags) {
      const id = wantedNode(flags.identifier ?? flags._[0], "expire");
      if (flags.disable && flags.expiry !== undefined)
        throw new UsageError("--disable and --expiry contradict each other: give one of them");
      if (flags.expiry !== undefined && Number.isNaN(Date.parse(flags.expiry)))
        throw new UsageError(
          `--expiry ${JSON.stringify(flags.expiry)} is not a time: write it as 2027-01-31T12:00:00Z`,
        );
      const body = flags.disable
        ? { disableExpiry: true }
        : { expiry: new Date(flags.expiry === undefined ? Date.now() : Date.parse(flags.expiry)).toISOString() };
      const { node } = await api.call<{ node: ApiNode }>("POST", `/v1/node/${id}/expire`, body);
      const isLater = flags.expiry !== undefined && Date.parse(flags.expiry) > Date.now();
      const text = isLater ? "Node expiration updated" : "Node expired";
      return { value: node, text: flags.disable ? "Node expiry disabled" : text };
    },
  }),
  rename: verb({
    usage: "-i ID NEW-NAME",
    positional: 2,
    flags: { identifier },
    async run({ api }, flags) {
      const [first, second] = flags._;
      const id = wantedNode(flags.identifier ?? first, "rename");
      const name = flags.identifier === undefined ? second : first;
      if (name === undefined) throw new UsageError("which name? `nodes rename -i ID NEW-NAME`");
      const path = `/v1/node/${id}/rename/${encodeURIComponent(name)}`;
      const { node } = await api.call<{ node: ApiNode }>("POST", path);
      return { value: node, text: "Node renamed" };
    },
  }),
  delete: verb({
    aliases: DELETE,
    usage: "-i ID",
    positional: 1,
    flags: { identifier },
    async run({ api, confirm }, flags) {
      const id = wantedNode(flags.identifier ?? flags._[0], "delete");
      const { node } = await api.call<{ node: ApiNode }>("GET", `/v1/node/${id}`);
      await confirm(`Delete the node "${node.givenName}" (ID ${node.id})?`);
      await api.call("DELETE", `/v1/node/${id}`);
      return { value: { Result: "Node deleted" }, text: "Node deleted" };
    },
  }),
};

const keyReference = { id: identifier, prefix: { kind: TEXT, short: "p" } } as const;

const apikeys: Record<string, Verb> = {
  create: verb({
    aliases: CREATE,
    usage: "[-e 90d]",
    flags: { expiration: { kind: "duration", short: "e" } },
    async run({ api }, flags) {
      const body = { expiration: fromNow(flags.expiration ?? 90 * 86_400_000) };
      const { apiKey } = await api.call<{ apiKey: string }>("POST", "/v1/apikey", body);
      return { value: apiKey, text: apiKey };
    },
  }),
  list: verb({
    aliases: LIST,
    usage: "",
    async run({ api }) {
      const { apiKeys } = await api.call<{ apiKeys: ApiApiKey[] }>("GET", "/v1/apikey");
      const rows = apiKeys.map((key) => [
        key.id,
        key.prefix,
        showTime(key.expiration, "never"),
        showTime(key.createdAt, "-"),
        showTime(key.lastSeen, "never"),
      ]);
      return { value: apiKeys, text: table(["ID", "Prefix", "Expiration", "Created", "Last seen"], rows) };
    },
  }),
  expire: verb({
    aliases: ["revoke", ...EXPIRE],
    usage: "--id ID | --prefix PREFIX",
    flags: keyReference,
    async run({ api }, flags) {
      const reference = apiKeyReference(flags, "expire");
      return { value: await api.call("POST", "/v1/apikey/expire", reference), text: "Key expired" };
    },
  }),
  delete: verb({
    aliases: DELETE,
    usage: "--id ID | --prefix PREFIX",
    flags: keyReference,
    async run({ api, confirm }, flags) {
      const { id, prefix } = apiKeyReference(flags, "delete");
      await confirm(`Delete the API key ${id ?? prefix}?`);
      const path = `/v1/apikey/${encodeURIComponent(prefix ?? "-")}${queryOf({ id })}`;
      return { value: await api.call("DELETE", path), text: "Key deleted" };
    },
  }),
};

const authId = { "auth-id": TEXT } as const;

const auth: Record<string, Verb> = {
  register: verb({
    usage: "--auth-id ID -u USER",
    flags: { ...authId, user },
    run: ({ api }, flags) => register(api, flags.user, flags["auth-id"], "auth register --auth-id ID --user USER"),
  }),
  approve: verb({
    usage: "--auth-id ID",
    flags: authId,
    run: ({ api }, flags) => verdict(api, "approve", flags["auth-id"], "Login approved"),
  }),
  reject: verb({
    usage: "--auth-id ID",
    flags: authId,
    run: ({ api }, flags) => verdict(api, "reject", flags["auth-id"], "Login refused"),
  }),
};

const KEYS = "/v2/tailnet/-/keys";

const oauthClients: Record<string, Verb> = {
  create: verb({
    aliases: CREATE,
    usage: "-s SCOPE,SCOPE [-t tag:a,tag:b] [-d DESCRIPTION]",
    flags: {
      scope: { kind: "list", short: "s" },
      tag: { kind: "list", short: "t" },
      description: { kind: TEXT, short: "d" },
    },
    async run({ api }, flags) {
      if (!flags.scope?.length)
        throw new UsageError("which scopes? `oauth-clients create --scope devices:core --tag tag:k8s` (docs/api.md)");
      const made = await api.call<ApiKeyV2>("POST", KEYS, {
        keyType: "client",
        scopes: flags.scope,
        tags: flags.tag ?? [],
        description: flags.description ?? "",
      });
      return { value: made, text: `Client ID:     ${made.id}\nClient secret: ${made.key}` };
    },
  }),
  list: verb({
    aliases: LIST,
    usage: "",
    async run({ api }) {
      const { keys } = await api.call<{ keys: ApiKeyV2[] }>("GET", KEYS);
      const clients = keys.filter(({ keyType }) => keyType === "client");
      const rows = clients.map((key) => [
        key.id,
        key.description,
        (key.scopes ?? []).join(","),
        (key.tags ?? []).join(","),
        showTime(key.created, "-"),
      ]);
      return { value: clients, text: table(["ID", "Description", "Scopes", "Tags", "Created"], rows) };
    },
  }),
  delete: verb({
    aliases: DELETE,
    usage: "-i ID",
    positional: 1,
    flags: { id: identifier },
    async run({ api, confirm }, flags) {
      const id = flags.id ?? flags._[0];
      if (id === undefined || /^\d{1,11}$/.test(id)) throw new UsageError("which client? `oauth-clients delete -i ID`");
      await confirm(`Delete the OAuth client ${id}? Its tokens end at once.`);
      await api.call("DELETE", `${KEYS}/${encodeURIComponent(id)}`);
      return { value: { id }, text: "Client deleted" };
    },
  }),
};

const debug: Record<string, Verb> = {
  "create-node": verb({
    usage: "--name NAME -u USER -k AUTH-ID [-r CIDR,CIDR]",
    flags: { name, user, key: { kind: TEXT, short: "k" }, route: { kind: "list", short: "r" } },
    async run({ api }, flags) {
      const { name, user, key } = flags;
      if (name === undefined || user === undefined || key === undefined)
        throw new UsageError(
          "it needs --name, --user and --key: `debug create-node --name NAME --user USER --key AUTH-ID`",
        );
      const body = { name, user, key, routes: flags.route ?? [] };
      const { node } = await api.call<{ node: ApiNode }>("POST", "/v1/debug/node", body);
      return { value: node, text: "Node created: it waits under its key" };
    },
  }),
  ping: verb({
    usage: "-i ID [IP] [-t disco|TSMP|ICMP|peerapi]",
    positional: 1,
    flags: { identifier, type: { kind: TEXT, short: "t" } },
    async run({ api }, flags) {
      const id = wantedId(flags.identifier, "node", "debug ping -i ID");
      const body = { ip: flags._[0], type: flags.type };
      const found = await api.call<{
        latencySeconds: number | null;
        error: string;
        endpoint: string;
        derpRegion: string;
      }>("POST", `/v1/node/${id}/ping`, body);
      const latency = found.latencySeconds === null ? "" : ` in ${(found.latencySeconds * 1000).toFixed(1)} ms`;
      const way = found.endpoint || (found.derpRegion && `relay ${found.derpRegion}`);
      const text = found.error || `Node ${id} answers${latency}${way ? ` via ${way}` : ""}`;
      return { value: found, text };
    },
  }),
  c2n: verb({
    usage: "-i ID PATH",
    positional: 1,
    flags: { identifier },
    async run({ api }, flags) {
      const path = flags._[0];
      if (path === undefined) throw new UsageError("which request? `debug c2n -i ID /debug/health`");
      const id = wantedId(flags.identifier, "node", "debug c2n -i ID PATH");
      const found = await api.call<{ status: number; body: string }>("POST", `/v1/node/${id}/c2n`, { path });
      return { value: found, text: `${found.status}\n${found.body}` };
    },
  }),
};

/** By the words that people type. */
export const NOUNS: Readonly<Record<string, Noun>> = {
  users: { aliases: ["user"], verbs: users },
  nodes: { aliases: ["node"], verbs: nodes },
  preauthkeys: { aliases: ["preauthkey", "authkey", "pre"], verbs: preauthkeys },
  apikeys: { aliases: ["apikey", "api"], verbs: apikeys },
  auth: { aliases: [], verbs: auth },
  "oauth-clients": { aliases: ["oauth-client", "oauthclients", "oauthclient", "oauth"], verbs: oauthClients },
  debug: { aliases: [], verbs: debug },
};

async function register(
  api: AdminClient,
  user: string | undefined,
  authId: string | undefined,
  usage: string,
): Promise<Result> {
  if (user === undefined || authId === undefined) throw new UsageError(`which login, and whose? \`${usage}\``);
  const { id } = await api.findUser(user, true);
  const { node } = await api.call<{ node: ApiNode }>("POST", "/v1/auth/register", { user: id, authId });
  return { value: node, text: `Node ${node.givenName} registered` };
}

async function verdict(api: AdminClient, word: string, authId: string | undefined, text: string): Promise<Result> {
  if (authId === undefined) throw new UsageError(`which login? \`auth ${word} --auth-id ID\``);
  return { value: await api.call("POST", `/v1/auth/${word}`, { authId }), text };
}

async function wantedUser(
  api: AdminClient,
  flags: { identifier?: string; name?: string; _: string[] },
  verb: string,
): Promise<ApiUser> {
  const wanted = flags.identifier ?? flags.name ?? flags._[0];
  if (wanted === undefined) throw new UsageError(`which user? \`users ${verb} -i ID\` or \`users ${verb} -n NAME\``);
  return api.findUser(wanted, flags.identifier === undefined);
}

function wantedId(text: string | undefined, what: string, usage: string): string {
  if (text === undefined) throw new UsageError(`which ${what}? \`${usage}\``);
  if (!/^\d{1,15}$/.test(text))
    throw new UsageError(`${JSON.stringify(text)} is not the ID of a ${what}: \`${usage}\``);
  return text;
}

function wantedNode(text: string | undefined, verb: string): string {
  return wantedId(text, "node", `nodes ${verb} -i ID`);
}

function apiKeyReference({ id, prefix }: { id?: string; prefix?: string }, verb: string) {
  if ((id === undefined) === (prefix === undefined))
    throw new UsageError(`which key? \`apikeys ${verb} --id ID\` or \`apikeys ${verb} --prefix PREFIX\``);
  return id === undefined ? { prefix } : { id: wantedId(id, "key", `apikeys ${verb} --id ID`) };
}

/** `lifetime` in milliseconds. */
function fromNow(lifetime: number): string {
  if (lifetime <= 0) throw new UsageError("--expiration must be a time from now, for example 24h");
  return new Date(Date.now() + lifetime).toISOString();
}

function queryOf(fields: Record<string, string | undefined>): string {
  const given = Object.entries(fields).filter((entry): entry is [string, string] => entry[1] !== undefined);
  return given.length === 0 ? "" : `?${new URLSearchParams(given)}`;
}

function nodesTable(list: ApiNode[]): string {
  const header =
    "ID,Hostname,Name,MachineKey,NodeKey,User,Tags,IP addresses,Ephemeral,Last seen,Expiration,Connected,Expired".split(
      ",",
    );
  const rows = list.map((node) => [
    node.id,
    node.name,
    node.givenName,
    shortKey(node.machineKey),
    shortKey(node.nodeKey),
    node.user.name,
    node.tags.join(","),
    node.ipAddresses.join(", "),
    String(node.ephemeral),
    showTime(node.lastSeen, "-"),
    showTime(node.expiry, "N/A"),
    node.online ? "online" : "offline",
    node.expiry !== null && Date.parse(node.expiry) <= Date.now() ? "yes" : "no",
  ]);
  return table(header, rows);
}

/** "[AbCdE]", as Tailscale's tools abbreviate keys. */
function shortKey(text: string): string {
  const digits = text.slice(text.indexOf(":") + 1);
  return `[${Buffer.from(digits, "hex").toString("base64").slice(0, 5)}]`;
}
