// Where the model changes: every command is planned against the model, applied to it and written to the store here.
//
// Planning and applying happen in one synchronous step, so commands never interleave. Writing is a group commit: all
// commands of one turn of the event loop share one transaction. When the disk refuses, everything not yet durable is
// undone, newest first, and its callers are told.
import type { Change, Effect, Model } from "./model.ts";
import { UncertainCommit } from "./store-engine.ts";

export interface JournalEvents {
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

  /** Applies at once; resolves when it is durable. */
  commit(change: Change): Promise<void> {
    const effect = this.model.apply(change);
    this.events.onApplied(effect);
    return new Promise((resolve, reject) => {
      this.pending.push({ change, effect, resolve, reject });
      this.flushing ??= this.flush();
    });
  }

  /** Applies what the store does not hold: who is online, who has expired. */
  applyVolatile(change: Change): void {
    this.events.onApplied(this.model.apply(change));
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
      const batch = this.pending;
      this.pending = [];
      try {
        await this.write([...this.owed, ...batch.map(({ change }) => change)]);
        this.owed = [];
        for (const { resolve } of batch) resolve();
      } catch (error) {
        this.undo(batch, error as Error);
      }
    }
    this.flushing = null;
    this.events.onDurable();
  }

  /** Later commands were planned on what is being undone: they go with it. */
  private undo(batch: Pending[], error: Error): void {
    const lost = [...batch, ...this.pending];
    this.pending = [];
    if (error instanceof UncertainCommit) this.owed.push(...batch.map(({ effect }) => effect.undo).reverse());
    for (const { effect } of [...lost].reverse()) this.events.onApplied(this.model.apply(effect.undo));
    const problem = new Error(`the change could not be stored: ${error.message}`);
    for (const { reject } of lost) reject(problem);
  }
}
