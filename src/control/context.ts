// What the parts of the control server share. Each part is made once with it, and keeps no second copy of any of this.
import type { PolicyAccess } from "./access.ts";
import type { Choices } from "./chosen.ts";
import type { Journal } from "./journal.ts";
import type { Metrics } from "./metrics.ts";
import type { Millis, Model } from "./model.ts";
import type { TailnetConfig } from "./netmap.ts";
import type { Pings } from "./pings.ts";
import type { PolicyStore } from "./policy-store.ts";
import type { ControlSettings } from "./settings.ts";

export interface ControlContext {
  /** The configuration, with what was chosen over the API in place of it: read it each time, it may be replaced. */
  readonly settings: ControlSettings;
  readonly model: Model;
  readonly journal: Journal;
  /** What the whole tailnet is told: replaced as a whole, never changed in place. */
  readonly config: TailnetConfig;
  /** What the policy in force says; without one, everybody reaches everybody. */
  readonly access: PolicyAccess;
  /** Where the policy comes from. */
  readonly policies: PolicyStore;
  /** Questions to nodes over their map streams. */
  readonly pings: Pings;
  readonly metrics: Metrics;
  /** Everything that cannot be made anew (backup.ts). Throws CommandError while another is being made. */
  backup(): Promise<{ size: number; body: ReadableStream }>;
  /** Whether the store answers. */
  healthy(): Promise<boolean>;
  now(): Millis;
  random(n: number): Uint8Array;
  /** For problems that an operator should know of. Never a secret. */
  log(line: string): void;
  /** For the record: who did what. Never a secret. */
  note(line: string): void;
  /** Replaces what the whole tailnet is told, and tells every open map stream. */
  setConfig(config: TailnetConfig): void;
  /** Chooses settings in place of the configuration's. They hold, for open map streams, too, when it resolves. */
  choose(choices: Partial<Choices>): Promise<void>;
  /** Another answer of the policy may be due: every open map stream looks. */
  poke(): void;
}
