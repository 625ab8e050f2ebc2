// Whom a change of some nodes concerns: the nodes whose packet filter, SSH rules or view of themselves may be another in the
// compilation after it. What they see of each other beside the changed nodes is the same before and after.
import type { Compiled } from "./compile.ts";
import type { Rule } from "./rules.ts";
import { sshNeighbours } from "./ssh.ts";

/** Ids of nodes; null: any node, so that all must be asked. `changed`: ids of nodes that came, went or are another. */
export function affectedBy(
  before: Compiled,
  after: Compiled,
  changed: ReadonlySet<number>,
): ReadonlySet<number> | null {
  const found = new Set(changed);
  for (const compiled of [before, after]) {
    const { resolver } = compiled;
    for (const id of changed) {
      const i = resolver.indexOf(id);
      if (i === undefined) continue;
      // Routes lead elsewhere, or the address of a peer is another, for whoever sees it.
      if (resolver.nodes[i]!.routes.length > 0 || compiled.withoutIPv4(i)) return null;
      for (const target of sshNeighbours(resolver, i)) found.add(resolver.nodes[target]!.id);
    }
  }
  const rules = [rulesOf(before), rulesOf(after)] as const;
  for (const [side, compiled] of [before, after].entries()) {
    const { nodes } = compiled.resolver;
    for (const [key, rule] of rules[side]!) {
      if (!rules[1 - side]!.has(key)) for (const i of rule.targets) found.add(nodes[i]!.id);
    }
    // They see the IPv6 address alone of every peer, so each that comes is worth a word.
    for (const i of compiled.onlyIPv6) found.add(nodes[i]!.id);
  }
  return found;
}

const known = new WeakMap<Compiled, ReadonlyMap<string, Rule>>();

/** Rules by what they say and from whom. */
function rulesOf(compiled: Compiled): ReadonlyMap<string, Rule> {
  let found = known.get(compiled);
  if (!found) {
    found = new Map(compiled.rules.map((rule) => [keyOf(rule), rule]));
    known.set(compiled, found);
  }
  return found;
}

function keyOf({ source, protocol, via, capabilities, parts }: Rule): string {
  const words = capabilities ? JSON.stringify(capabilities) : "";
  return `${source.digest} ${protocol} ${via.join()} ${words} ${parts.join("|")}`;
}
