// Which of two confirmed UDP paths to the same peer is better (spec/datapath-wire.md 5.7).
import type { AddrPort } from "../wire/ip.ts";
import { parseAddrPort } from "../wire/ip.ts";
import { isLinkLocal, isLoopback, isPrivate } from "./address.ts";

/** A path that a pong has confirmed. */
export interface Quality {
  /** The address that the ping was sent to. */
  address: AddrPort;
  /** Milliseconds from ping to pong. */
  latency: number;
}

/** True when `a` is worth leaving `b` for. */
export function isBetter(a: Quality, b: Quality): boolean {
  if (a.address === b.address) return false;
  let aPoints = addressPoints(a.address);
  let bPoints = addressPoints(b.address);
  if (a.latency < b.latency) aPoints += Math.floor(100 - (a.latency * 100) / b.latency);
  else if (b.latency < a.latency) bPoints += Math.floor(100 - (b.latency * 100) / a.latency);
  // One point is noise: no reason to move.
  if (aPoints <= 1 && bPoints === 0) return false;
  return aPoints > bPoints;
}

function addressPoints(address: AddrPort): number {
  const ip = parseAddrPort(address)?.ip;
  if (!ip) return 0;
  const near = isLoopback(ip) ? 50 : isLinkLocal(ip) ? 30 : isPrivate(ip) ? 20 : 0;
  return near + (ip.length === 16 ? 10 : 0);
}
