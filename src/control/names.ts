// Names in MagicDNS: what a node calls itself becomes one DNS label, unique in the tailnet.
import type { Effect, Millis, Model, NodeRecord } from "./model.ts";

const MAX_LABEL = 63;
/** Milliseconds between two lines of the log about the name of one node. */
const QUIET = 60_000;

/** "Joe's Mac mini" -> "joes-mac-mini". Lower case, a-z, 0-9 and "-", at most 63; nothing left: "node". */
export function labelOf(hostname: string): string {
  const label = hostname
    .slice(0, 1024)
    .toLowerCase()
    .replace(/['’]/g, "")
    .replace(/[^a-z0-9-]+/g, "-")
    .replace(/^-+/, "")
    .slice(0, MAX_LABEL)
    .replace(/-+$/, "");
  return label === "" ? "node" : label;
}

/** `label`, or with "-1", "-2", … behind it if another node than `self` has it. */
export function uniqueLabel(model: Model, label: string, self?: number): string {
  const isFree = (candidate: string) => {
    const holder = model.nodeByName(candidate);
    return holder === undefined || holder.id === self;
  };
  if (isFree(label)) return label;
  for (let n = 1; ; n++) {
    const suffix = `-${n}`;
    const candidate = label.slice(0, MAX_LABEL - suffix.length).replace(/-+$/, "") + suffix;
    if (isFree(candidate)) return candidate;
  }
}

/** What a node would be called after its host, where another one had that name when it came; null: it has its name. */
export function takenLabelOf({ nameFromHost, hostname, givenName }: NodeRecord): string | null {
  const wanted = labelOf(hostname);
  return nameFromHost && givenName !== wanted && /-\d+$/.test(givenName) ? wanted : null;
}

/** Says, of nodes that come and of those that call themselves otherwise, who wants a name that another one has. */
export class Clashes {
  /** When it was said last, by node. */
  private readonly said = new Map<number, Millis>();

  constructor(
    private readonly model: Model,
    private readonly log: (line: string) => void,
  ) {}

  onApplied({ undo }: Effect, now: Millis): void {
    for (const id of undo.nodesRemoved ?? []) this.look(id, now);
    for (const { id, givenName } of undo.nodes ?? [])
      if (this.model.nodes.get(id)?.givenName !== givenName) this.look(id, now);
  }

  private look(id: number, now: Millis): void {
    const node = this.model.nodes.get(id);
    const label = node && takenLabelOf(node);
    if (!node) this.said.delete(id);
    if (!label || now - (this.said.get(id) ?? Number.NEGATIVE_INFINITY) < QUIET) return;
    this.said.set(id, now);
    const holder = this.model.nodeByName(label);
    this.log(
      `node ${id} calls itself ${JSON.stringify(node.hostname.slice(0, 100))}, but ${holder ? `node ${holder.id} has` : "others have"} the name ${label}: it is ${node.givenName} (weft nodes rename -i ${id} NAME)`,
    );
  }
}

/** Why an administrator's choice cannot be a label; null when it can. */
export function labelProblem(name: string): string | null {
  if (name.length === 0 || name.length > MAX_LABEL) return `the name must have 1 to ${MAX_LABEL} characters`;
  if (!/^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(name))
    return `"${name}" is not a DNS label: use a-z, 0-9 and "-", with a letter or digit at both ends`;
  return null;
}

/** Why a tag is wrong; null when it is right. */
export function tagProblem(tag: string): string | null {
  if (!/^tag:[a-z][a-z0-9-]*$/.test(tag) || tag.length > 100)
    return `"${tag}" is not a tag: write "tag:" and a name of a-z, 0-9 and "-" that starts with a letter`;
  return null;
}

/** Why a name cannot be a user's; null when it can. */
export function userNameProblem(name: string): string | null {
  if (name.length > 128 || !/^[\p{L}][\p{L}\p{N}._-]+(@[\p{L}\p{N}._-]+)?$/u.test(name))
    return `"${name.slice(0, 128)}" is not a user name: at least 2 characters, starting with a letter, then letters, digits, "-", ".", "_" and at most one "@"`;
  return null;
}
