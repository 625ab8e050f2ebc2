// Webhooks: what happens to the tailnet, posted to addresses that an administrator names, in the form of Tailscale's (a JSON
// list of events, signed), or as a sentence for chat services. An event is a document that is written in the transaction of
// what it tells, and deleted when its receiver has taken it: each is told at least once, whatever happens to the server,
// unless its receiver takes nothing for a day or too many wait.
import { createHmac } from "node:crypto";
import { hex } from "../crypto/keys.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { DocumentChange, Effect, Millis, NodeRecord, UserRecord } from "./model.ts";
import { namesOf, timeText } from "./netmap.ts";

/** What is told here. */
const EVENTS = [
  "nodeCreated",
  "nodeNeedsApproval",
  "nodeApproved",
  "nodeKeyExpiringInOneDay",
  "nodeKeyExpired",
  "nodeDeleted",
  "policyUpdate",
  "userCreated",
  "userDeleted",
  "userSuspended",
  "userRestored",
  "userRoleUpdated",
] as const;
type EventType = (typeof EVENTS)[number];

/** What may be subscribed to: Tailscale's words. What never happens here is taken, too, for states that name it. */
export const SUBSCRIPTIONS = [
  "categoryTailnetManagement",
  "categoryDeviceMisconfigurations",
  ...EVENTS,
  "userNeedsApproval",
  "userApproved",
  "subnetIPForwardingNotEnabled",
  "exitNodeIPForwardingNotEnabled",
] as const;
export type Subscription = (typeof SUBSCRIPTIONS)[number];

export const PROVIDERS = ["", "slack", "mattermost", "googlechat", "discord"] as const;
export type WebhookProvider = (typeof PROVIDERS)[number];

export interface WebhookRecord {
  id: string;
  url: string;
  provider: WebhookProvider;
  subscriptions: readonly Subscription[];
  /** What events are signed with: kept as it is, because each event needs it. */
  secret: string;
  creator: string;
  createdAt: Millis;
  updatedAt: Millis;
}

declare module "./model.ts" {
  interface Documents {
    /** By id. */
    webhook: WebhookRecord;
    /** By running number: what a webhook has yet to be told. */
    webhookevent: { webhook: string; event: WebhookEvent };
  }
}

export interface WebhookEvent {
  timestamp: string;
  version: 1;
  type: EventType | "test";
  tailnet: string;
  message: string;
  data: Record<string, string> | null;
}

const MAX_WEBHOOKS = 50;
/** Events that wait for one receiver, and characters of them; older ones are dropped. */
const MAX_WAITING = 1000;
const MAX_WAITING_SIZE = 8 * 1024 * 1024;
/** Of one request. */
const MAX_EVENTS = 100;
const TIMEOUT = 10_000;
/** Milliseconds to the next attempt; the last one again and again. */
const RETRIES = [1_000, 5_000, 30_000, 120_000, 600_000, 3_600_000];
/** Failures in a row that an operator should know of. */
const NOTABLE = 4;
const DAY = 24 * 60 * 60_000;
/** Milliseconds that an event is offered. */
const PATIENCE = DAY;

/** An event that waits: its running number, and its characters. */
interface Entry {
  id: number;
  size: number;
}

interface Waiting {
  entries: Entry[];
  isSending: boolean;
  /** Some had to go since the receiver took any. */
  isFull: boolean;
  failures: number;
  timer: ReturnType<typeof setTimeout> | null;
}

/** Whether it was taken. Redirects are not followed: the signature is for this receiver. */
async function post(url: string, body: string, headers: Record<string, string>, signal: AbortSignal): Promise<boolean> {
  const response = await fetch(url, { method: "POST", redirect: "manual", body, headers, signal });
  await response.body?.cancel();
  return response.ok;
}

/** How many of the oldest are too many. */
export function surplusOf(entries: readonly Pick<Entry, "size">[]): number {
  let size = 0;
  for (let kept = 0; kept < entries.length; kept++) {
    size += entries[entries.length - 1 - kept]!.size;
    if (kept >= MAX_WAITING || size > MAX_WAITING_SIZE) return entries.length - kept;
  }
  return 0;
}

export class Webhooks {
  private readonly waiting = new Map<string, Waiting>();
  /** Events that are not durable yet. */
  private fresh: ({ webhook: string } & Entry)[] = [];
  private lastId: number;
  private isStarted = false;
  private lastPolicy: string;
  private lastLook: Millis;
  private readonly stopping = new AbortController();

  constructor(private readonly context: ControlContext) {
    this.lastPolicy = context.policies.current().text;
    this.lastLook = context.now();
    this.lastId = [...context.model.documents("webhookevent").keys()].reduce(
      (last, id) => Math.max(last, Number(id)),
      0,
    );
  }

  /** From here on things happen; what was found at the start happened before. What waited when the server ended goes on. */
  start(): void {
    this.isStarted = true;
    this.lastLook = this.context.now();
    const waiting = [...this.context.model.documents("webhookevent")].map(([id, { webhook, event }]) => ({
      webhook,
      id: Number(id),
      size: sizeOf(event),
    }));
    this.fresh = waiting.sort((a, b) => a.id - b.id);
    this.onDurable();
  }

  /** Oldest first. */
  list(): WebhookRecord[] {
    return [...this.context.model.documents("webhook").values()].sort(
      (a, b) => a.createdAt - b.createdAt || a.id.localeCompare(b.id),
    );
  }

  /** Throws CommandError. */
  get(id: string): WebhookRecord {
    const record = this.context.model.documents("webhook").get(id);
    if (!record) throw new CommandError(404, `there is no webhook ${JSON.stringify(id.slice(0, 40))}`);
    return record;
  }

  async create(input: Pick<WebhookRecord, "url" | "provider" | "subscriptions" | "creator">): Promise<WebhookRecord> {
    if (this.context.model.documents("webhook").size >= MAX_WEBHOOKS)
      throw new CommandError(409, `there are ${MAX_WEBHOOKS} webhooks: delete some first`);
    const now = this.context.now();
    const id = hex(this.context.random(8));
    return this.put({ ...input, id, secret: this.mint(id), createdAt: now, updatedAt: now });
  }

  async update(id: string, subscriptions: readonly Subscription[]): Promise<WebhookRecord> {
    return this.put({ ...this.get(id), subscriptions, updatedAt: this.context.now() });
  }

  async rotate(id: string): Promise<WebhookRecord> {
    return this.put({ ...this.get(id), secret: this.mint(id), updatedAt: this.context.now() });
  }

  async delete(id: string): Promise<void> {
    this.get(id);
    const told = [...this.context.model.documents("webhookevent")].filter(([, { webhook }]) => webhook === id);
    await this.context.journal.commit({
      documents: [{ kind: "webhook", id, value: null }, ...told.map(([event]) => deletionOf(event))],
    });
    const waiting = this.waiting.get(id);
    if (waiting?.timer) clearTimeout(waiting.timer);
    this.waiting.delete(id);
  }

  /** Sends an event that says that it is a test. */
  async test(id: string): Promise<void> {
    const document = this.eventFor(this.get(id), this.event("test", "This is a test event", null));
    await this.context.journal.commit({ documents: [document] });
  }

  /** The events of a change that was just applied, for all who subscribed to them: to be stored with it. */
  companions(effect: Effect): DocumentChange[] {
    if (!this.isStarted || this.context.model.documents("webhook").size === 0) return [];
    const events = this.eventsOf(effect);
    if (isAboutPolicy(effect)) events.push(...this.policyEvents());
    return this.addressed(events);
  }

  /** The model changed, and it may yet be undone. */
  onApplied(effect: Effect): void {
    if (isAboutPolicy(effect)) this.lastPolicy = this.context.policies.current().text;
  }

  /** Everything applied so far is durable. */
  onDurable(): void {
    if (this.fresh.length === 0 || this.stopping.signal.aborted) return;
    // Others were undone, because the disk refused.
    const stored = this.fresh.splice(0).filter((entry) => this.eventOf(entry));
    for (const [webhook, entries] of Map.groupBy(stored, (entry) => entry.webhook)) this.enqueue(webhook, entries);
  }

  /** Another policy is in force; of one from the database the journal has told before. */
  onPolicy(): void {
    const events = this.policyEvents();
    this.lastPolicy = this.context.policies.current().text;
    this.tell(events);
  }

  /** Looks for keys that expire within a day from now on. */
  tick(): void {
    const now = this.context.now();
    const since = this.lastLook;
    this.lastLook = now;
    if (this.list().length === 0) return;
    const soon = [...this.context.model.nodes.values()].filter(
      ({ expiry }) => expiry !== null && expiry > now && expiry - DAY > since && expiry - DAY <= now,
    );
    this.tell(soon.map((node) => this.nodeEvent("nodeKeyExpiringInOneDay", node, "key expires within a day")));
  }

  close(): void {
    this.stopping.abort();
    for (const { timer } of this.waiting.values()) if (timer) clearTimeout(timer);
    this.waiting.clear();
  }

  private eventsOf({ undo, removed }: Effect): WebhookEvent[] {
    const { nodes, users } = this.context.model;
    const events: WebhookEvent[] = [];
    for (const id of undo.nodesRemoved ?? []) {
      const node = nodes.get(id);
      if (!node) continue;
      events.push(this.nodeEvent("nodeCreated", node, "was added"));
      if (!node.authorized) events.push(this.nodeEvent("nodeNeedsApproval", node, "needs approval"));
    }
    for (const before of undo.nodes ?? []) {
      const node = nodes.get(before.id);
      if (node?.authorized && !before.authorized) events.push(this.nodeEvent("nodeApproved", node, "was approved"));
      if (node?.expired && !before.expired) events.push(this.nodeEvent("nodeKeyExpired", node, "key has expired"));
    }
    for (const node of removed)
      if (!nodes.has(node.id)) events.push(this.nodeEvent("nodeDeleted", node, "was deleted"));
    for (const id of undo.usersRemoved ?? []) {
      const user = users.get(id);
      if (user) events.push(this.userEvent("userCreated", user, "was added"));
    }
    for (const before of undo.users ?? []) {
      const user = users.get(before.id);
      if (!user) {
        events.push(this.userEvent("userDeleted", before, "was deleted"));
        continue;
      }
      if (user.role !== before.role) events.push(this.userEvent("userRoleUpdated", user, `is ${user.role} now`));
      if (user.status === before.status) continue;
      if (user.status === "suspended") events.push(this.userEvent("userSuspended", user, "was suspended"));
      else events.push(this.userEvent("userRestored", user, "was restored"));
    }
    return events;
  }

  private nodeEvent(type: EventType, node: NodeRecord, what: string): WebhookEvent {
    const deviceName = `${node.givenName}.${this.context.config.baseDomain}`;
    const owner = node.userId === null ? undefined : this.context.model.users.get(node.userId);
    return this.event(type, `Node ${deviceName} ${what}`, {
      nodeID: String(node.id),
      deviceName,
      managedBy: owner ? namesOf(owner).LoginName : node.tags.join(","),
      ...(node.expiry !== null && { expiration: timeText(node.expiry) }),
    });
  }

  private userEvent(type: EventType, user: UserRecord, what: string): WebhookEvent {
    const name = namesOf(user).LoginName;
    return this.event(type, `User ${name} ${what}`, { user: name, userID: String(user.id), role: user.role });
  }

  private event(type: WebhookEvent["type"], message: string, data: WebhookEvent["data"]): WebhookEvent {
    const { config, now } = this.context;
    return { timestamp: timeText(now()), version: 1, type, tailnet: config.baseDomain, message, data };
  }

  private policyEvents(): WebhookEvent[] {
    const { text, by } = this.context.policies.current();
    if (text === this.lastPolicy) return [];
    const data = { oldPolicy: this.lastPolicy, newPolicy: text, actor: by };
    return [this.event("policyUpdate", "Tailnet policy file updated", data)];
  }

  /** Of what happened without a change of the model. */
  private tell(events: readonly WebhookEvent[]): void {
    const documents = this.addressed(events);
    if (documents.length > 0)
      this.context.journal.commit({ documents }).catch((error: Error) => this.context.log(error.message));
  }

  private addressed(events: readonly WebhookEvent[]): DocumentChange[] {
    if (events.length === 0) return [];
    return this.list().flatMap((record) =>
      events
        .filter(
          ({ type }) =>
            record.subscriptions.includes(type as Subscription) ||
            record.subscriptions.includes("categoryTailnetManagement"),
        )
        .map((event) => this.eventFor(record, event)),
    );
  }

  private eventFor({ id: webhook }: WebhookRecord, event: WebhookEvent): DocumentChange {
    const id = ++this.lastId;
    this.fresh.push({ webhook, id, size: sizeOf(event) });
    return { kind: "webhookevent", id: String(id), value: { webhook, event } };
  }

  private enqueue(webhook: string, entries: readonly Entry[]): void {
    const record = this.context.model.documents("webhook").get(webhook);
    if (!record) {
      this.forget(entries);
      return;
    }
    const waiting = this.waiting.get(webhook) ?? {
      entries: [],
      isSending: false,
      isFull: false,
      failures: 0,
      timer: null,
    };
    this.waiting.set(webhook, waiting);
    waiting.entries.push(...entries);
    const surplus = waiting.entries.splice(0, surplusOf(waiting.entries));
    if (surplus.length > 0 && !waiting.isFull)
      this.context.log(
        `webhook ${webhook}: ${MAX_WAITING} events or ${MAX_WAITING_SIZE >> 20} MiB wait for ${hostOf(record)}: with each further one the oldest is dropped`,
      );
    waiting.isFull ||= surplus.length > 0;
    this.forget(surplus);
    if (!waiting.isSending && !waiting.timer) this.send(webhook, waiting);
  }

  private async send(id: string, waiting: Waiting): Promise<void> {
    waiting.isSending = true;
    const record = this.context.model.documents("webhook").get(id);
    if (record) this.dropOld(record, waiting);
    const part = waiting.entries.slice(0, MAX_EVENTS);
    const events = part.map((entry) => this.eventOf(entry)).filter((event) => event !== undefined);
    const taken = record !== undefined && (events.length === 0 || (await this.deliver(record, events)));
    waiting.isSending = false;
    // Deleted, or the server ends.
    if (this.waiting.get(id) !== waiting || !record) return;
    if (!taken) {
      const retry = RETRIES[waiting.failures] ?? RETRIES.at(-1)!;
      if (++waiting.failures === NOTABLE)
        this.context.log(`webhook ${id}: ${hostOf(record)} takes nothing; each event is offered again for a day`);
      waiting.timer = setTimeout(() => {
        waiting.timer = null;
        this.send(id, waiting);
      }, retry);
      return;
    }
    waiting.failures = 0;
    waiting.isFull = false;
    // Not by count: while this was under way, the oldest may have been pushed out.
    waiting.entries = waiting.entries.filter((entry) => !part.includes(entry));
    this.forget(part);
    if (waiting.entries.length > 0) this.send(id, waiting);
    else this.waiting.delete(id);
  }

  private dropOld(record: WebhookRecord, waiting: Waiting): void {
    const before = timeText(this.context.now() - PATIENCE);
    const isFresh = (entry: Entry) => (this.eventOf(entry)?.timestamp ?? "") > before;
    // They are in the order of their times.
    const firstFresh = waiting.entries.findIndex(isFresh);
    const old = waiting.entries.splice(0, firstFresh < 0 ? waiting.entries.length : firstFresh);
    if (old.length === 0) return;
    const what = old.length === 1 ? "1 event is" : `${old.length} events are`;
    this.context.log(`webhook ${record.id}: ${hostOf(record)} has taken nothing for a day, ${what} dropped`);
    this.forget(old);
  }

  private eventOf({ id }: Entry): WebhookEvent | undefined {
    return this.context.model.documents("webhookevent").get(String(id))?.event;
  }

  private forget(entries: readonly Entry[]): void {
    const documents = entries.filter((entry) => this.eventOf(entry)).map(({ id }) => deletionOf(String(id)));
    if (documents.length > 0)
      this.context.journal.commit({ documents }).catch((error: Error) => this.context.log(error.message));
  }

  private async deliver({ url, provider, secret }: WebhookRecord, events: readonly WebhookEvent[]): Promise<boolean> {
    const text = events.map(({ message }) => message).join("\n");
    const body = JSON.stringify(
      provider === "" ? events : provider === "discord" ? { content: text.slice(0, 2000) } : { text },
    );
    const at = Math.floor(this.context.now() / 1000);
    const signature = createHmac("sha256", secret).update(`${at}.${body}`).digest("hex");
    const headers = { "Content-Type": "application/json", "Tailscale-Webhook-Signature": `t=${at},v1=${signature}` };
    try {
      return await post(url, body, headers, AbortSignal.any([this.stopping.signal, AbortSignal.timeout(TIMEOUT)]));
    } catch {
      return false;
    }
  }

  private mint(id: string): string {
    return `hskey-webhook-${id}-${hex(this.context.random(32))}`;
  }

  private async put(record: WebhookRecord): Promise<WebhookRecord> {
    await this.context.journal.commit({ documents: [{ kind: "webhook", id: record.id, value: record }] });
    return record;
  }
}

function sizeOf(event: WebhookEvent): number {
  return JSON.stringify(event).length;
}

function deletionOf(id: string): DocumentChange {
  return { kind: "webhookevent", id, value: null };
}

function isAboutPolicy({ undo }: Effect): boolean {
  return undo.documents?.some(({ kind }) => kind === "policy") ?? false;
}

/** The host alone: addresses of chat services are secrets. */
function hostOf({ url }: WebhookRecord): string {
  return new URL(url).host;
}
