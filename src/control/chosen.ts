// What an administrator has chosen over the API in place of what the configuration says: DNS, and some settings of the tailnet.
// Each choice is a document that remembers what the configuration said when it was made. Whoever spoke last holds: once the
// configuration says something else there, the choice is over.
import type { ControlContext } from "./context.ts";
import type { DocumentChange, Millis, Model } from "./model.ts";
import type { ControlSettings } from "./settings.ts";

/** What can be chosen, by the keys of the configuration. */
export interface Choices {
  "dns.magic_dns": boolean;
  "dns.override_local_dns": boolean;
  "dns.nameservers.global": readonly string[];
  "dns.nameservers.split": Readonly<Record<string, readonly string[]>>;
  "dns.nameservers.use_with_exit_node": readonly string[];
  "dns.search_domains": readonly string[];
  "node.expiry": Millis | null;
  "node.needs_approval": boolean;
  "auto_update.enabled": boolean;
}

export interface ChoiceRecord {
  value: unknown;
  /** What the configuration said of it. */
  configured: unknown;
}

declare module "./model.ts" {
  interface Documents {
    /** By the key of the configuration. */
    choice: ChoiceRecord;
  }
}

function valuesOf({ dns, node, autoUpdate }: ControlSettings): Choices {
  return {
    "dns.magic_dns": dns.magicDns,
    "dns.override_local_dns": dns.overrideLocalDns,
    "dns.nameservers.global": dns.nameservers,
    "dns.nameservers.split": dns.split,
    "dns.nameservers.use_with_exit_node": dns.useWithExitNode,
    "dns.search_domains": dns.searchDomains,
    "node.expiry": node.expiry,
    "node.needs_approval": node.needsApproval,
    "auto_update.enabled": autoUpdate,
  };
}

function withValues(settings: ControlSettings, values: Choices): ControlSettings {
  return {
    ...settings,
    dns: {
      ...settings.dns,
      magicDns: values["dns.magic_dns"],
      overrideLocalDns: values["dns.override_local_dns"],
      nameservers: values["dns.nameservers.global"],
      split: values["dns.nameservers.split"],
      useWithExitNode: values["dns.nameservers.use_with_exit_node"],
      searchDomains: values["dns.search_domains"],
    },
    node: { ...settings.node, expiry: values["node.expiry"], needsApproval: values["node.needs_approval"] },
    autoUpdate: values["auto_update.enabled"],
  };
}

function same(a: unknown, b: unknown): boolean {
  return JSON.stringify(a) === JSON.stringify(b);
}

export class Chosen {
  private readonly values: Choices;

  constructor(
    private readonly configured: ControlSettings,
    private readonly model: Model,
  ) {
    this.values = valuesOf(configured);
  }

  /** What holds: the configuration with the choices. */
  get settings(): ControlSettings {
    const choices = this.list();
    if (choices.length === 0) return this.configured;
    return withValues(this.configured, {
      ...this.values,
      ...Object.fromEntries(choices.map(({ key, value }) => [key, value])),
    });
  }

  /** The choices that hold, by key. */
  list(): ({ key: string } & ChoiceRecord)[] {
    return this.records().filter(({ key, configured }) => this.isCurrent(key, configured));
  }

  /** What is to be stored for these. What is chosen as the configuration has it is no choice. */
  changes(choices: Partial<Choices>): DocumentChange[] {
    return Object.entries(choices).map(([key, value]) => {
      const configured = this.values[key as keyof Choices];
      return { kind: "choice", id: key, value: same(value, configured) ? null : { value, configured } };
    });
  }

  /** Choices that are over: of keys of which the configuration says something else since. Forgets them. */
  async forgetOutdated({ journal, log }: Pick<ControlContext, "journal" | "log">): Promise<void> {
    const outdated = this.records().filter(({ key, configured }) => !this.isCurrent(key, configured));
    if (outdated.length > 0) {
      const keys = outdated.map(({ key }) => key).join(", ");
      log(`the configuration says something new of ${keys}: it holds in place of what was set over the API`);
      await journal.commit({ documents: outdated.map(({ key }) => ({ kind: "choice", id: key, value: null })) });
    }
    const holding = this.list().map(({ key }) => key);
    if (holding.length > 0)
      log(`set over the API, in place of what the configuration says: ${holding.join(", ")} (docs/api.md)`);
  }

  private records(): ({ key: string } & ChoiceRecord)[] {
    return [...this.model.documents("choice")].map(([key, record]) => ({ key, ...record }));
  }

  private isCurrent(key: string, configured: unknown): boolean {
    return Object.hasOwn(this.values, key) && same(configured, this.values[key as keyof Choices]);
  }
}
