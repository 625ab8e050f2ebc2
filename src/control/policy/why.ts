// Why one node may reach an address and port, or why it may not: the answer to `weft policy why SRC DST:PORT`.
import { addressNumber, INTERNET } from "./addresses.ts";
import type { Compiled } from "./compile.ts";
import { opensPort } from "./ports.ts";
import { holdsAddress, itemsAt, type Rule } from "./rules.ts";
import type { Access } from "./types.ts";

export interface Reason {
  /** Null: the policy has neither `acls` nor `grants`, so everything is allowed. */
  readonly access: Access | null;
  /** The router through which the traffic goes; null: straight to the node. */
  readonly router: number | null;
  /** One sentence. */
  readonly text: string;
}

export interface Question {
  /** Id of the node that asks. */
  src: number;
  /** Which of its addresses; any of the family of `dst`, when absent. */
  srcAddress?: string;
  /** An address: of a node, behind a router, or in the internet. */
  dst: string;
  port: number;
  /** IP protocol number; TCP when absent. */
  protocol?: number;
}

const TCP = 6;
const DEFAULT_PROTOCOLS = new Set([1, 6, 17, 58]);

/** Every entry of the policy that allows it, in the order of the policy; empty when none does. */
export function why(compiled: Compiled, { src, srcAddress, dst, port, protocol = TCP }: Question): Reason[] {
  const { resolver } = compiled;
  const from = resolver.indexOf(src);
  const n = addressNumber(dst);
  if (from === undefined || n === null) return [];
  const range = { first: n, last: n };
  const [owner] = resolver.nodesIn(range);
  const owned = owner !== undefined;
  const candidates = owned ? [owner] : compiled.routersFor(src, dst);
  const reasons: Reason[] = [];
  const seen = new Set<Access>();
  const sources = (srcAddress === undefined ? resolver.addressesOf(from) : [srcAddress]).filter(
    (address) => address.includes(":") === dst.includes(":"),
  );
  const serves = (rule: Rule): boolean =>
    !rule.capabilities &&
    rule.source.nodes.has(from) &&
    sources.some((address) => holdsAddress(rule.source, address)) &&
    (rule.protocol === null ? DEFAULT_PROTOCOLS.has(protocol) : rule.protocol === protocol);
  for (const node of candidates) {
    for (const rule of compiled.rules.filter(serves)) {
      for (const item of itemsAt(rule, node, resolver)) {
        const internet = rule.internet.includes(item);
        // A node's own addresses do not open what lies behind it, and the internet is none of its subnets.
        if (item.text === null && !internet && !owned) continue;
        if (internet && (owned || !INTERNET.has(n))) continue;
        if (item.range && (n < item.range.first || n > item.range.last)) continue;
        if (!opensPort(item.ports, protocol, port) || seen.has(item.access)) continue;
        seen.add(item.access);
        reasons.push(reasonOf(compiled, item.access, owned ? null : resolver.nodes[node]!.id));
      }
    }
  }
  return reasons;
}

function reasonOf(compiled: Compiled, access: Access, router: number | null): Reason {
  const way = router === null ? "" : ` through node ${router}`;
  if (compiled.policy.accesses === null) {
    return {
      access: null,
      router,
      text: `allowed${way}: the policy has neither acls nor grants, so all may reach all`,
    };
  }
  const { section, index, place } = access;
  return { access, router, text: `allowed${way} by ${section}[${index}], line ${place.line}` };
}
