// Webhooks: what happens to the tailnet, posted to addresses that an administrator names, in the form of Tailscale's (a JSON
// list of events, signed), or as a sentence for chat services. Events are told after they are durable, at least once while
// the receiver is away for minutes; they wait in memory, so those of a server that ends are lost.
import { createHmac } from "node:crypto";
import { hex } from "../crypto/keys.ts";
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Effect, Millis, NodeRecord, UserRecord } from "./model.ts";
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
/** Milliseconds to the next attempt; after the last the events are dropped. */
const RETRIES = [1_000, 5_000, 30_000, 120_000, 600_000];
const DAY = 24 * 60 * 60_000;

interface Waiting {
  events: WebhookEvent[];
  isSending: boolean;
  failures: number;
  timer: ReturnType<typeof setTimeout> | null;
}

/** Whether it was taken. Redirects are not followed: the signature is for this receiver. */
async function post(url: string, body: string, headers: Record<string, string>, signal: AbortSignal): Promise<boolean> {
  const response = await fetch(url, { method: "POST", redirect: "manual", body, headers, signal });
  await response.body?.cancel();
  return response.ok;
}

const sizes = new WeakMap<WebhookEvent, number>();

/** How many of the oldest are too many. */
export function surplusOf(events: readonly WebhookEvent[]): number {
  let size = 0;
  for (let kept = 0; kept < events.length; kept++) {
    const event = events[events.length - 1 - kept]!;
    const own = sizes.get(event) ?? JSON.stringify(event).length;
    sizes.set(event, own);
    size += own;
    if (kept >= MAX_WAITING || size > MAX_WAITING_SIZE) return events.length - kept;
  }
  return 0;
}

export class Webhooks {
  private readonly waiting = new Map<string, Waiting>();
  private candidates: Effect[] = [];
  private isStarted = false;
  private lastPolicy: string;
  private lastLook: Millis;
  private readonly stopping = new AbortController();

  constructor(private readonly context: ControlContext) {
    this.lastPolicy = context.policies.current().text;
    this.lastLook = context.now();
  }

  /** From here on things happen; what was found at the start happened before. */
  start(): void {
    this.isStarted = true;
    this.lastLook = this.context.now();
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
    await this.context.journal.commit({ documents: [{ kind: "webhook", id, value: null }] });
    const waiting = this.waiting.get(id);
    if (waiting?.timer) clearTimeout(waiting.timer);
    this.waiting.delete(id);
  }

  /** Sends an event that says that it is a test. */
  test(id: string): void {
    this.enqueue(this.get(id), [this.event("test", "This is a test event", null)]);
  }

  /** The model changed, and it may yet be undone. */
  onApplied(effect: Effect): void {
    if (this.isStarted && this.context.model.documents("webhook").size > 0) this.candidates.push(effect);
  }

  /** Everything applied so far is durable. */
  onDurable(): void {
    for (const effect of this.candidates.splice(0)) this.tell(this.eventsOf(effect));
  }

  onPolicy(): void {
    const { text, by } = this.context.policies.current();
    const oldPolicy = this.lastPolicy;
    this.lastPolicy = text;
    if (this.list().length === 0 || text === oldPolicy) return;
    this.tell([this.event("policyUpdate", "Tailnet policy file updated", { oldPolicy, newPolicy: text, actor: by })]);
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

  private tell(events: readonly WebhookEvent[]): void {
    if (events.length === 0) return;
    for (const record of this.list()) {
      const wanted = events.filter(
        ({ type }) =>
          record.subscriptions.includes(type as Subscription) ||
          record.subscriptions.includes("categoryTailnetManagement"),
      );
      if (wanted.length > 0) this.enqueue(record, wanted);
    }
  }

  private enqueue({ id }: WebhookRecord, events: readonly WebhookEvent[]): void {
    const waiting = this.waiting.get(id) ?? { events: [], isSending: false, failures: 0, timer: null };
    this.waiting.set(id, waiting);
    waiting.events.push(...events);
    waiting.events.splice(0, surplusOf(waiting.events));
    if (!waiting.isSending && !waiting.timer) this.send(id, waiting);
  }

  private async send(id: string, waiting: Waiting): Promise<void> {
    waiting.isSending = true;
    const record = this.context.model.documents("webhook").get(id);
    const part = waiting.events.slice(0, MAX_EVENTS);
    const taken = record !== undefined && (await this.deliver(record, part));
    waiting.isSending = false;
    // Deleted, or the server ends.
    if (this.waiting.get(id) !== waiting || !record) return;
    const retry = RETRIES[waiting.failures];
    if (!taken && retry !== undefined) {
      waiting.failures++;
      waiting.timer = setTimeout(() => {
        waiting.timer = null;
        this.send(id, waiting);
      }, retry);
      return;
    }
    // The host alone: addresses of chat services are secrets.
    if (!taken)
      this.context.log(`webhook ${id}: ${new URL(record.url).host} takes nothing; ${part.length} events are dropped`);
    waiting.failures = 0;
    // Not by count: while this was under way, the oldest may have been pushed out.
    waiting.events = waiting.events.filter((event) => !part.includes(event));
    if (waiting.events.length > 0) this.send(id, waiting);
    else this.waiting.delete(id);
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
