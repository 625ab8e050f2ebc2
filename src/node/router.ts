// Addresses, routes and policy rules of the node, by netlink. What is done and why:
//
//   addresses   the node's own /32 and /128 on the TUN device, MTU 1280, link up
//   routes      one per peer address, in a table of our own (53), so that nothing of the host's main table is touched and
//               everything of ours can be told apart
//   rules       for both families, as tailscaled lays them out, at priorities and in a table beside its own, so that both
//               can run on one host:
//                 5310  fwmark 0x80000/0xff0000  lookup main
//                 5330  fwmark 0x80000/0xff0000  lookup default
//                 5350  fwmark 0x80000/0xff0000  unreachable
//                 5370                           lookup 53
//               The datapath's own sockets carry the mark: their packets never enter the tunnel that they carry
//
// A kernel without policy routing gets the routes in its main table; one without IPv6 gets none for IPv6. Routes and
// addresses vanish with the device, also when the daemon is killed. Rules do not: they stay as long as the table has routes
// (another daemon may have made them), and `cleanUp` takes away what a killed daemon left. Rules that someone else removes
// come back.
import { Netlink, type RuleSpec } from "../../ffi/netlink.ts";
import type { PrefixText } from "../wire/tailcfg.ts";

export const TUNNEL_MTU = 1280;
/** SO_MARK of the datapath's sockets, within the bits of FWMARK_MASK. */
export const FWMARK_BYPASS = 0x80000;
const FWMARK_MASK = 0xff0000;
const TABLE = 53;
const TABLE_MAIN = 254;
const TABLE_DEFAULT = 253;
const FAMILIES = [4, 6] as const;

type Family = (typeof FAMILIES)[number];

export interface RouterConfig {
  /** The node's own addresses. */
  addresses: readonly PrefixText[];
  /** What is reached through the device. */
  routes: readonly PrefixText[];
}

function rules(family: Family): RuleSpec[] {
  const marked = { family, fwmark: FWMARK_BYPASS, fwmask: FWMARK_MASK };
  return [
    { ...marked, priority: 5310, table: TABLE_MAIN },
    { ...marked, priority: 5330, table: TABLE_DEFAULT },
    { ...marked, priority: 5350, action: "unreachable" },
    { family, priority: 5370, table: TABLE },
  ];
}

export class Router implements Disposable {
  private readonly netlink = new Netlink();
  private readonly addresses = new Set<PrefixText>();
  private readonly routes = new Set<PrefixText>();
  private readonly tables = new Map<Family, number>();

  /** Brings the device up. `log` hears of what the kernel refuses. */
  constructor(
    private readonly device: number,
    private readonly log: (message: string) => void,
  ) {
    this.netlink.setLink(device, { up: true, mtu: TUNNEL_MTU });
    this.restoreRules();
  }

  /** Adds the rules that are missing. */
  restoreRules(): void {
    for (const family of FAMILIES)
      if (this.tables.get(family) !== TABLE_MAIN) this.tables.set(family, this.addRules(family));
  }

  /** Makes addresses and routes exactly these. What the kernel refuses is logged and tried again with the next call. */
  configure(config: RouterConfig): void {
    const { netlink, device } = this;
    const wantedAddresses = new Set(config.addresses);
    const wantedRoutes = new Set(config.routes);
    for (const dst of this.routes) {
      if (wantedRoutes.has(dst)) continue;
      this.attempt(`remove the route to ${dst}`, () => netlink.deleteRoute(this.route(dst), { missingOk: true }));
      this.routes.delete(dst);
    }
    // New addresses before the old ones go: without an address of a family the kernel drops the device's routes of it.
    for (const prefix of wantedAddresses) {
      if (this.addresses.has(prefix)) continue;
      const address = { link: device, prefix, noPrefixRoute: true };
      if (this.attempt(`add the address ${prefix}`, () => netlink.addAddress(address, { existsOk: true })))
        this.addresses.add(prefix);
    }
    for (const prefix of this.addresses) {
      if (wantedAddresses.has(prefix)) continue;
      this.attempt(`remove the address ${prefix}`, () =>
        netlink.deleteAddress({ link: device, prefix }, { missingOk: true }),
      );
      this.addresses.delete(prefix);
    }
    for (const dst of wantedRoutes) {
      if (this.routes.has(dst)) continue;
      if (this.attempt(`add the route to ${dst}`, () => netlink.addRoute(this.route(dst), { replace: true })))
        this.routes.add(dst);
    }
  }

  /** Takes everything back. */
  close(): void {
    this.configure({ addresses: [], routes: [] });
    cleanUp(this.netlink);
    this.netlink.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  private route(dst: PrefixText) {
    return { dst, dev: this.device, table: this.tables.get(familyOf(dst)) ?? TABLE };
  }

  /** The table in which this family's routes go. */
  private addRules(family: Family): number {
    try {
      for (const rule of rules(family)) this.netlink.addRule(rule, { existsOk: true });
      return TABLE;
    } catch (error) {
      this.log(`no policy routing for IPv${family}, its routes go to the main table: ${(error as Error).message}`);
      return TABLE_MAIN;
    }
  }

  private attempt(what: string, action: () => void): boolean {
    try {
      action();
      return true;
    } catch (error) {
      this.log(`the kernel refused to ${what}: ${(error as Error).message}`);
      return false;
    }
  }
}

/** Removes the rules that a killed daemon left in this network namespace, unless a living one has routes in the table. */
export function cleanUp(netlink: Netlink): void {
  for (const family of FAMILIES) {
    try {
      if (netlink.routes({ family, table: TABLE }).length > 0) continue;
      for (const rule of rules(family)) netlink.deleteRule(rule, { missingOk: true });
    } catch {
      // The kernel lacks the family or policy routing: then there is nothing of ours either.
    }
  }
}

function familyOf(prefix: PrefixText): Family {
  return prefix.includes(":") ? 6 : 4;
}
