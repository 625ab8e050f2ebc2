// What a client is told beside the tailnet itself: what is wrong with its node that its user or an administrator can mend,
// and whether there is a newer client (spec/ts2021-control-protocol.md, section 12). Pure.
import type * as tc from "../wire/tailcfg.ts";
import { isAdmitted, type Millis, type NodeRecord } from "./model.ts";
import { takenLabelOf } from "./names.ts";
import { advertisedRoutes } from "./routes.ts";
import type { ClientSettings } from "./settings.ts";

/** Clients before it know texts only. */
const DISPLAY_MESSAGES = 117;
/** How long before its key expires a node is warned. */
const EXPIRES_SOON = 7 * 24 * 60 * 60_000;

/** By an id that stays the same while the problem does. */
export type Warnings = ReadonlyMap<string, tc.DisplayMessage>;

export function expiresSoon({ expiry }: NodeRecord, now: Millis): boolean {
  return expiry !== null && expiry - EXPIRES_SOON <= now && now < expiry;
}

/** `isNamed`: others are told of it, because its name is one of DNS. */
export function warningsOf(node: NodeRecord, isNamed: boolean, now: Millis): Warnings {
  const { id, authorized, suspended, approvedRoutes, expiry, givenName } = node;
  const warnings = new Map<string, tc.DisplayMessage>();
  if (suspended)
    warnings.set("weft-user-suspended", {
      Title: "The user of this machine is suspended",
      Text: "It reaches nobody until an administrator restores the user: weft users restore",
      Severity: "high",
      ImpactsConnectivity: true,
    });
  if (!authorized)
    warnings.set("weft-not-authorized", {
      Title: "This machine waits for approval",
      Text: `It reaches nobody until an administrator lets it in: weft nodes authorize -i ${id}`,
      Severity: "high",
      ImpactsConnectivity: true,
    });
  if (!isNamed)
    warnings.set("weft-no-name", {
      Title: "The name of this machine is no DNS name",
      Text: `Other machines are not told of ${JSON.stringify(givenName)} until an administrator renames it: weft nodes rename -i ${id} NAME`,
      Severity: "high",
      ImpactsConnectivity: true,
    });
  const label = takenLabelOf(node);
  if (label)
    warnings.set("weft-name-taken", {
      Title: "Another machine had the name of this one",
      Text: `This machine is ${givenName} here, because another one was ${label} already. To choose another name: weft nodes rename -i ${id} NAME`,
      Severity: "low",
    });
  const waiting = advertisedRoutes(node).filter((route) => !approvedRoutes.includes(route));
  if (isAdmitted(node) && waiting.length > 0) {
    const more = waiting.length > 5 ? ` and ${waiting.length - 5} more` : "";
    warnings.set("weft-routes-unapproved", {
      Title: "Advertised routes wait for approval",
      Text: `Nobody uses the routes ${waiting.slice(0, 5).join(", ")}${more} until an administrator approves them.`,
      Severity: "low",
    });
  }
  if (expiry !== null && expiresSoon(node, now)) {
    const day = new Date(expiry).toISOString().slice(0, 16).replace("T", " ");
    warnings.set("weft-key-expires", {
      Title: "The key of this machine expires soon",
      Text: `It is cut off at ${day} UTC, unless you sign in again before: tailscale up --force-reauth`,
      Severity: "medium",
    });
  }
  return warnings;
}

/** What brings a client from the warnings that it was told to those that hold now; empty when they are the same. */
export function warningChange(told: Warnings, now: Warnings, cap: number): tc.MapResponse {
  const isOld = ([id, message]: [string, tc.DisplayMessage]) => told.get(id)?.Text === message.Text;
  const fresh = [...now].filter((entry) => !isOld(entry));
  const gone = [...told.keys()].filter((id) => !now.has(id));
  if (fresh.length + gone.length === 0) return {};
  if (cap < DISPLAY_MESSAGES) return { Health: [...now.values()].map(({ Text }) => Text ?? "") };
  return { DisplayMessages: Object.fromEntries([...gone.map((id) => [id, null] as const), ...fresh]) };
}

/** What a client is told of newer ones; null: nothing is known of them. Weft's own nodes have versions of their own. */
export function clientVersion({ hostinfo }: NodeRecord, settings: ClientSettings): tc.ClientVersion | null {
  const { latestVersion, urgentBelow, updateUrl } = settings;
  const own = versionOf(hostinfo.IPNVersion ?? "");
  const latest = versionOf(latestVersion);
  if (!own || !latest || hostinfo.App === "weft") return null;
  const urgent = versionOf(urgentBelow);
  const isUrgent = urgent !== null && isBefore(own, urgent);
  if (!isUrgent && !isBefore(own, latest)) return { RunningLatest: true };
  return {
    LatestVersion: latestVersion,
    ...(isUrgent && { UrgentSecurityUpdate: true }),
    ...(updateUrl !== "" && {
      Notify: true,
      NotifyURL: updateUrl,
      NotifyText: `${latestVersion} is there, this is ${own.join(".")}.`,
    }),
  };
}

type Version = readonly [major: number, minor: number, patch: number];

/** "1.80.3", and what clients write behind it: "1.80.3-t1234". Null: none of these. */
function versionOf(text: string): Version | null {
  const [, ...parts] = /^(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?!\d)/.exec(text) ?? [];
  return parts.length === 3 ? (parts.map(Number) as [number, number, number]) : null;
}

function isBefore(a: Version, b: Version): boolean {
  const at = a.findIndex((part, i) => part !== b[i]);
  return at >= 0 && a[at]! < b[at]!;
}
