// Where the model changes: every command is planned against the model, applied to it and written to the store here.
//
// Planning and applying happen in one synchronous step, so commands never interleave. Writing is a group commit: all
// commands of one turn of the event loop share one transaction. When the disk refuses, everything not yet durable is
// undone, newest first, and its callers are told. A single change that the store refuses fails alone, with what was
// planned on the records that it touched.
import type { Change, DocumentChange, Effect, Model } from "./model.ts";
import { RefusedChange, UncertainCommit } from "./store-engine.ts";

export interface JournalEvents {
  /** What follows from a change that was just applied and is to be stored with it, in one transaction: word of it for others. */
  companions?(effect: Effect): DocumentChange[];
  /** The model changed: `effect.nodes` concern whoever sees them. Called before the change is durable. */
  onApplied(effect: Effect): void;
  /** Everything applied so far is durable: now is the time to speak of it. */
  onDurable(): void;
}

interface Pending {
  change: Change;
  effect: Effect;
  resolve(): void;
  reject(error: Error): void;
}

export class Journal {
  private pending: Pending[] = [];
  private flushing: Promise<void> | null = null;
  /** What undoes changes that were refused here but may be in the database all the same: goes in front of the next write. */
  private owed: Change[] = [];

  constructor(
    private readonly model: Model,
    private readonly write: (changes: Change[]) => Promise<void>,
    private readonly events: JournalEvents,
  ) {}

  /** Commands that are not written yet. */
  get waiting(): number {
    return this.pending.length;
  }

  /** Applies at once; resolves when it is durable. */
  commit(change: Change): Promise<void> {
    const effect = this.model.apply(change);
    let stored = change;
    try {
      const documents = this.events.companions?.(effect) ?? [];
      if (documents.length > 0) {
        const { undo } = this.model.apply({ documents });
        effect.undo = { ...effect.undo, documents: [...undo.documents!, ...(effect.undo.documents ?? [])] };
        stored = { ...change, documents: [...(change.documents ?? []), ...documents] };
      }
      this.events.onApplied(effect);
    } catch (error) {
      // What cannot be told is no change.
      this.events.onApplied(this.model.apply(effect.undo));
      throw error;
    }
    return new Promise((resolve, reject) => {
      this.pending.push({ change: stored, effect, resolve, reject });
      this.flushing ??= this.flush();
    });
  }

  /** Applies what the store does not hold: who is online, who has expired. */
  applyVolatile(change: Change): void {
    const effect = this.model.apply(change);
    const documents = this.events.companions?.(effect) ?? [];
    this.events.onApplied(effect);
    // Word of it is worth a transaction, but nobody waits for that one: a disk that refuses it is told of by the others.
    if (documents.length > 0) this.commit({ documents }).catch(() => {});
    // With a flush under way its own signal follows.
    if (!this.flushing) this.events.onDurable();
  }

  /** Resolves when nothing waits to be written. */
  async drained(): Promise<void> {
    while (this.flushing) await this.flushing;
  }

  private async flush(): Promise<void> {
    while (this.pending.length > 0) {
      // One turn, so that commands that arrive together are written together.
      await new Promise((resolve) => setImmediate(resolve));
      let batch = this.pending;
      this.pending = [];
      while (batch.length > 0) {
        try {
          await this.write([...this.owed, ...batch.map(({ change }) => change)]);
          this.owed = [];
          for (const { resolve } of batch) resolve();
          batch = [];
        } catch (error) {
          batch = this.leftAfter(error as Error, batch);
        }
      }
    }
    this.flushing = null;
    this.events.onDurable();
  }

  /** What of a batch that could not be written is to be tried again. */
  private leftAfter(error: Error, batch: Pending[]): Pending[] {
    const at = error instanceof RefusedChange ? error.index - this.owed.length : -1;
    if (at < 0) {
      this.undo(batch, error);
      return [];
    }
    const refused = this.refuse([...batch, ...this.pending], at, error);
    this.pending = this.pending.filter((entry) => !refused.has(entry));
    return batch.filter((entry) => !refused.has(entry));
  }

  /** Later commands were planned on what is being undone: they go with it. */
  private undo(batch: Pending[], error: Error): void {
    const lost = [...batch, ...this.pending];
    this.pending = [];
    if (error instanceof UncertainCommit) this.owed.push(...batch.map(({ effect }) => effect.undo).reverse());
    for (const entry of lost.toReversed()) this.revert(entry);
    tellLost(lost, error);
  }

  /** Takes the change at `at` out from under those that came after it; those that touch the same records go with it. */
  private refuse(entries: readonly Pending[], at: number, error: Error): Set<Pending> {
    const later = entries.slice(at);
    for (const entry of later.toReversed()) this.revert(entry);
    const touched = new Set<string>();
    const refused = new Set<Pending>();
    for (const entry of later) {
      const records = recordsOf(entry.change);
      if (refused.size > 0 && !records.some((record) => touched.has(record))) {
        entry.effect = this.model.apply(this.asOnline(entry.change));
        this.events.onApplied(entry.effect);
        continue;
      }
      refused.add(entry);
      for (const record of records) touched.add(record);
    }
    tellLost(refused, error);
    return refused;
  }

  private revert({ effect }: Pending): void {
    this.events.onApplied(this.model.apply(this.asOnline(effect.undo)));
  }

  /** Who is online does not depend on what the store holds: it may be another since the change was planned. */
  private asOnline({ nodes, ...change }: Change): Change {
    if (!nodes) return change;
    const present = (id: number, online: boolean) => this.model.nodes.get(id)?.online ?? online;
    return { ...change, nodes: nodes.map((node) => ({ ...node, online: present(node.id, node.online) })) };
  }
}

function tellLost(lost: Iterable<Pending>, error: Error): void {
  const problem = new Error(`the change could not be stored: ${error.message}`);
  for (const { reject } of lost) reject(problem);
}

function recordsOf(change: Change): string[] {
  const { users = [], usersRemoved = [], keys = [], keysRemoved = [], nodes = [], nodesRemoved = [] } = change;
  const ids = (records: readonly { id: number }[]) => records.map(({ id }) => id);
  const name = (kind: string, all: readonly number[]) => all.map((id) => `${kind} ${id}`);
  return [
    ...name("user", [...ids(users), ...usersRemoved]),
    ...name("key", [...ids(keys), ...keysRemoved]),
    ...name("node", [...ids(nodes), ...nodesRemoved]),
    ...(change.documents ?? []).map(({ kind, id }) => `document ${kind} ${id}`),
  ];
}
