// Logins that wait for a person: a machine that joins without a pre-auth key, or a session that somebody must agree to (SSH
// in check mode, a web client). Each has an
// id that cannot be guessed ("hskey-authreq-<24 hex>"), an address for the browser, and ends with a verdict: by command line,
// API or identity provider. They are documents of the store, so a restart of the server ends none of them.
//
// Strangers start logins, so there are at most `settings.login.maxPending` of them, and 8 of one machine. Where one has to
// go, it is the oldest of the address that has most of them, if possible one that nobody waits for. It leaves as it came:
// the client that asks for it gets a new one.
import { hex } from "../crypto/keys.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Change, DocumentChange, Millis, NodeRecord, RegisterMethod } from "./model.ts";
import { LoginRefused, planLogin } from "./register.ts";
import type { RegisterInput } from "./requests.ts";
import { suspensionProblem } from "./users.ts";

export interface RegisterLogin {
  kind: "register";
  machineKey: string;
  input: RegisterInput;
}

export interface SSHCheckLogin {
  kind: "ssh-check";
  /** Who wants in, where, and as whom. */
  sourceNodeId: number;
  targetNodeId: number;
  localUser: string;
}

export interface WebClientLogin {
  kind: "web-client";
  /** Where the browser is, and whose settings it wants to change. */
  sourceNodeId: number;
  targetNodeId: number;
}

export type LoginRequest = RegisterLogin | SSHCheckLogin | WebClientLogin;

export type Verdict =
  /** `userId` null: an administrator approved it. */
  { approved: true; userId: number | null } | { approved: false; reason: string };

export interface LoginRecord {
  request: LoginRequest;
  /** Whose request started it; "" when unknown. */
  address: string;
  createdAt: Millis;
  /** From then on it is as if it had never been. */
  expiresAt: Millis;
  /** Null: it waits. */
  verdict: Verdict | null;
  /** The client has heard why it was refused; when it asks on, it is given another login. */
  told?: boolean;
}

declare module "./model.ts" {
  interface Documents {
    login: LoginRecord;
  }
}

export interface PendingLogin extends LoginRecord {
  id: string;
}

const WHAT = { "ssh-check": "an SSH session", "web-client": "a session of a web client" } as const;
const ID = /^hskey-authreq-[0-9a-f]{24}$/;
const MAX_PER_MACHINE = 8;
/** Bytes of JSON that a waiting registration may keep of the client's Hostinfo. */
const MAX_HOSTINFO = 8192;
const REJECTED = "an administrator has refused this login";

/** The id in an address that a client was given; null when it is no such address. */
export function loginIdOf(url: string): string | null {
  const id = url.slice(url.lastIndexOf("/") + 1);
  return ID.test(id) ? id : null;
}

export class Logins {
  /** What an approved SSH check changes, in the same transaction. */
  onCheckApproved: (request: SSHCheckLogin, userId: number | null) => Change = () => ({});
  private readonly waiting = new Map<string, Set<(verdict: Verdict | null) => void>>();

  constructor(private readonly ctx: ControlContext) {}

  /** Resolves when it is durable. `address` is that of the client, "" when unknown. */
  async start(request: LoginRequest, address = ""): Promise<{ id: string; url: string }> {
    const { ctx } = this;
    const now = ctx.now();
    const id = `hskey-authreq-${hex(ctx.random(12))}`;
    const record: LoginRecord = {
      request: request.kind === "register" ? { ...request, input: slim(request.input) } : request,
      address,
      createdAt: now,
      expiresAt: now + ctx.settings.login.expiry,
      verdict: null,
    };
    const evicted = this.evictedBy(record, now);
    await this.commit({}, [...evicted.map((old) => [old, null] as const), [id, record]]);
    for (const old of evicted) this.tell(old, null);
    return { id, url: this.url(id, request) };
  }

  url(id: string, { kind }: LoginRequest): string {
    return `${this.ctx.settings.serverUrl}/${kind === "register" ? "register" : "auth"}/${id}`;
  }

  /** One that waits or has ended lately. */
  get(id: string): PendingLogin | null {
    const record = this.records.get(id);
    return record && record.expiresAt > this.ctx.now() ? { id, ...record } : null;
  }

  /** Those that wait, oldest first. */
  list(): PendingLogin[] {
    const now = this.ctx.now();
    return [...this.records]
      .filter(([, record]) => record.verdict === null && record.expiresAt > now)
      .map(([id, record]) => ({ id, ...record }))
      .sort((a, b) => a.createdAt - b.createdAt);
  }

  /** The verdict, as soon as there is one. Null: there will be none, because the login is unknown or over, or by `signal`. */
  wait(id: string, signal: AbortSignal): Promise<Verdict | null> {
    const login = this.get(id);
    if (!login || login.verdict || signal.aborted) return Promise.resolve(login?.verdict ?? null);
    return new Promise((resolve) => {
      const waiters = this.waiting.get(id) ?? new Set();
      this.waiting.set(id, waiters);
      const end = (verdict: Verdict | null) => {
        waiters.delete(end);
        if (waiters.size === 0 && this.waiting.get(id) === waiters) this.waiting.delete(id);
        signal.removeEventListener("abort", onAbort);
        resolve(verdict);
      };
      const onAbort = () => end(null);
      waiters.add(end);
      signal.addEventListener("abort", onAbort);
    });
  }

  /** The machine becomes a node of this user. `expiry`: of the identity provider's token. Throws CommandError. */
  async complete(
    id: string,
    userId: number,
    method: RegisterMethod,
    expiry: Millis | null = null,
  ): Promise<NodeRecord> {
    const { request } = this.pending(id);
    if (request.kind !== "register")
      throw new CommandError(
        400,
        `login ${id} is ${WHAT[request.kind]}, not a machine: weft auth approve --auth-id ${id}`,
      );
    if (!this.ctx.model.users.has(userId))
      throw new CommandError(404, `there is no user ${userId}: weft users list shows those that exist`);
    let planned: ReturnType<typeof planLogin>;
    try {
      planned = planLogin(this.ctx, request.input, request.machineKey, { userId, method, expiry });
    } catch (error) {
      if (!(error instanceof LoginRefused)) throw error;
      await this.end([id], { approved: false, reason: error.message });
      throw new CommandError(400, error.message);
    }
    // The same machine may have asked twice, and its client waits for the other one.
    const same = this.list().filter(
      ({ request: other }) =>
        other.kind === "register" &&
        other.machineKey === request.machineKey &&
        other.input.nodeKey === request.input.nodeKey,
    );
    await this.end(
      same.map((login) => login.id),
      { approved: true, userId },
      planned.change,
    );
    return planned.node;
  }

  /** Lets a session in; `userId` null: by an administrator. Throws CommandError. */
  async approve(id: string, userId: number | null = null): Promise<void> {
    const { request } = this.pending(id);
    if (request.kind === "register")
      throw new CommandError(
        400,
        `login ${id} is a machine that joins: weft auth register --auth-id ${id} --user NAME`,
      );
    const problem = userId === null ? null : suspensionProblem(this.ctx.model.users.get(userId));
    if (problem) throw new CommandError(403, problem);
    const change = request.kind === "ssh-check" ? this.onCheckApproved(request, userId) : {};
    await this.end([id], { approved: true, userId }, change);
  }

  /** Throws CommandError. */
  async reject(id: string, reason = REJECTED): Promise<void> {
    this.pending(id);
    await this.end([id], { approved: false, reason });
  }

  /** The client is about to hear its refusal. */
  async told(id: string): Promise<void> {
    const record = this.records.get(id);
    if (record) await this.commit({}, [[id, { ...record, told: true }]]);
  }

  /** Forgets what has expired. */
  async sweep(): Promise<void> {
    const now = this.ctx.now();
    const expired = [...this.records].filter(([, { expiresAt }]) => expiresAt <= now).map(([id]) => id);
    if (expired.length === 0) return;
    await this.commit(
      {},
      expired.map((id) => [id, null]),
    );
    for (const id of expired) this.tell(id, null);
  }

  private get records(): ReadonlyMap<string, LoginRecord> {
    return this.ctx.model.documents("login");
  }

  private pending(id: string): PendingLogin {
    const login = this.get(id);
    if (!login)
      throw new CommandError(
        404,
        `there is no login ${JSON.stringify(id.slice(0, 60))}, or it has expired: start it again on the machine`,
      );
    if (login.verdict)
      throw new CommandError(409, `login ${id} has been ${login.verdict.approved ? "approved" : "refused"} already`);
    return login;
  }

  private async end(ids: readonly string[], verdict: Verdict, change: Change = {}): Promise<void> {
    await this.commit(
      change,
      ids.map((id) => [id, { ...this.records.get(id)!, verdict }]),
    );
    for (const id of ids) this.tell(id, verdict);
  }

  private commit(change: Change, logins: readonly (readonly [string, LoginRecord | null])[]): Promise<void> {
    const documents = logins.map(([id, value]): DocumentChange => ({ kind: "login", id, value }));
    return this.ctx.journal.commit({ ...change, documents: [...(change.documents ?? []), ...documents] });
  }

  private tell(id: string, verdict: Verdict | null): void {
    for (const end of [...(this.waiting.get(id) ?? [])]) end(verdict);
  }

  /** Those that have to go so that another one finds room. */
  private evictedBy(next: LoginRecord, now: Millis): string[] {
    const all = [...this.records];
    const expired = all.filter(([, { expiresAt }]) => expiresAt <= now).map(([id]) => id);
    const alive = all.filter(([, { expiresAt }]) => expiresAt > now).sort(([, a], [, b]) => a.createdAt - b.createdAt);
    const machine = machineOf(next);
    const own = machine === null ? [] : alive.filter(([, record]) => machineOf(record) === machine);
    if (own.length >= MAX_PER_MACHINE) return [...expired, own[0]![0]];
    if (alive.length < this.ctx.settings.login.maxPending) return expired;
    const greedy = ofGreediest(alive, ({ address }) => address);
    const [victim] = greedy.find(([id]) => !this.waiting.has(id)) ?? greedy[0]!;
    return [...expired, victim];
  }
}

/** Those of the owner who has most of them, in their order: where one has to go, it is one of these. */
export function ofGreediest<T>(all: readonly [string, T][], ownerOf: (value: T) => unknown): [string, T][] {
  const counts = new Map<unknown, number>();
  for (const [, value] of all) counts.set(ownerOf(value), (counts.get(ownerOf(value)) ?? 0) + 1);
  const most = Math.max(...counts.values());
  return all.filter(([, value]) => counts.get(ownerOf(value)) === most);
}

function machineOf({ request }: LoginRecord): string | null {
  return request.kind === "register" ? request.machineKey : null;
}

/** Without secrets, and not larger than need be: the client says it all again as soon as it is in. */
function slim(input: RegisterInput): RegisterInput {
  const { OS, OSVersion, Hostname, IPNVersion, RequestTags, RoutableIPs } = input.hostinfo;
  const whole = {
    ...(OS && { OS }),
    ...(OSVersion && { OSVersion }),
    ...(Hostname && { Hostname }),
    ...(IPNVersion && { IPNVersion }),
    ...(RequestTags && { RequestTags }),
    ...(RoutableIPs && { RoutableIPs }),
  };
  const isSmall = JSON.stringify(whole).length <= MAX_HOSTINFO;
  const hostinfo = isSmall ? whole : { Hostname: Hostname?.slice(0, 256) ?? "", RequestTags: RequestTags ?? [] };
  return { ...input, authKey: "", followup: "", hostinfo };
}
