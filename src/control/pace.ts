// How fast a machine may ask: so many requests at once, so many a second from then on. A node that asks in a loop, by a
// defect or by intent, is told to wait, and costs the others nothing. Pure: `now` comes from the caller.
import type { Millis } from "./model.ts";

export interface PaceLimits {
  /** Requests at once, after some peace. */
  burst: number;
  perSecond: number;
  /** Machines that are remembered; the one that asked longest ago goes first. */
  machines: number;
}

/** A client asks some ten times when it starts, and a few times a minute later. */
const LIMITS: PaceLimits = { burst: 200, perSecond: 20, machines: 20_000 };

interface Bucket {
  left: number;
  at: Millis;
  /** Whether it was logged since the bucket was half full. */
  isLogged: boolean;
}

export class Paces {
  private readonly limits: PaceLimits;
  /** By machine, in the order in which they asked last. */
  private readonly buckets = new Map<string, Bucket>();

  constructor(
    private readonly log: (line: string) => void,
    limits: Partial<PaceLimits> = {},
  ) {
    this.limits = { ...LIMITS, ...limits };
  }

  /** Milliseconds that this machine has to wait with what costs as much as `cost` requests; 0: it is counted, and goes on. */
  take(machine: string, cost: number, now: Millis): number {
    const { burst, perSecond, machines } = this.limits;
    const before = this.buckets.get(machine) ?? { left: burst, at: now, isLogged: false };
    const left = Math.min(burst, before.left + (Math.max(0, now - before.at) * perSecond) / 1000);
    const wait = left >= cost ? 0 : Math.ceil(((cost - left) / perSecond) * 1000);
    const isLogged = wait > 0 || (before.isLogged && left < burst / 2);
    if (wait > 0 && !before.isLogged)
      this.log(`${machine} asks more than ${burst} times at once and ${perSecond} times a second: it has to wait`);
    this.buckets.delete(machine);
    this.buckets.set(machine, { left: wait > 0 ? left : left - cost, at: now, isLogged });
    if (this.buckets.size > machines) this.buckets.delete(this.buckets.keys().next().value!);
    return wait;
  }
}
