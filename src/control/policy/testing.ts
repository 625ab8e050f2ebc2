// For tests: a small tailnet, and what a packet filter lets through, read as a client reads it.
import type { FilterRule } from "../../wire/tailcfg.ts";
import { addressNumber, parseRange } from "./addresses.ts";
import { Compiled, parsePolicy } from "./index.ts";
import type { PolicyNode, Tailnet } from "./types.ts";

/** alice has a laptop and a phone, bob a desktop; a tagged server, a router with a subnet, an exit node. */
export const HOME: Tailnet = {
  users: [
    { id: 1, name: "alice", email: "alice@example.com", role: "owner" },
    { id: 2, name: "bob", email: "bob@example.com" },
  ],
  nodes: [
    node(1, { userId: 1 }),
    node(2, { userId: 1 }),
    node(3, { userId: 2 }),
    node(4, { tags: ["tag:server"] }),
    node(5, { tags: ["tag:router"], routes: ["192.168.7.0/24"] }),
    node(6, { tags: ["tag:exit"], routes: ["0.0.0.0/0", "::/0"] }),
  ],
};

export const TAG_OWNERS = { "tag:server": [], "tag:router": [], "tag:exit": [] };

export function node(id: number, rest: Partial<PolicyNode> = {}): PolicyNode {
  const ipv6 = `fd7a:115c:a1e0::${id.toString(16)}`;
  return { id, userId: null, tags: [], ipv4: `100.64.${id >> 8}.${id & 255}`, ipv6, routes: [], ...rest };
}

export function compile(policy: object, tailnet: Tailnet = HOME): Compiled {
  return new Compiled(parsePolicy(JSON.stringify({ tagOwners: TAG_OWNERS, ...policy })), tailnet);
}

/** Whether a node with these rules lets a packet in. `protocol` is TCP when absent. */
export function passes(rules: readonly FilterRule[], src: string, dst: string, port: number, protocol = 6): boolean {
  const inside = (text: string, address: string): boolean => {
    if (text === "*") return true;
    const range = parseRange(text)!;
    const n = addressNumber(address)!;
    return range.first <= n && n <= range.last;
  };
  return rules.some(
    (rule) =>
      (rule.IPProto ?? [1, 6, 17, 58]).includes(protocol) &&
      (rule.SrcIPs ?? []).some((text) => inside(text, src)) &&
      (rule.DstPorts ?? []).some(
        ({ IP, Ports }) =>
          inside(IP, dst) && ([1, 58].includes(protocol) || (Ports.First <= port && port <= Ports.Last)),
      ),
  );
}
