// Guessing costs time: failed attempts (API keys, auth ids, logins, pre-auth keys) are counted per address and in all, and
// whoever failed too often waits, twice as long after each further failure. All of these have 96 random bits or more, so
// callers ask for the wait of wrong ones alone: a right one goes through, whatever others behind its address tried.
// Pure: `now` comes from the caller.
//
//   per address   `free` failures cost nothing, then 1 s, 2 s, 4 s … up to `maxWait`; forgotten after `forgetAfter` of peace
//   in all        more than `totalFailures` within `totalPeriod`: every address waits, but for those that succeeded lately
// An IPv6 host has a whole /64 to pick addresses from, so that is what counts as one address there.
import { formatIP, parseIP, unmap } from "../wire/ip.ts";

export interface AttemptsOptions {
  /** What is guessed, for the log: "API key". */
  what: string;
  /** Times are milliseconds. */
  limits?: Partial<AttemptsLimits>;
  /** Told of each failure that makes an address wait, and once a period when all must. */
  log?: (line: string) => void;
  /** Told of each failure, with `what`: to count them. */
  count?: (what: string) => void;
}

export interface AttemptsLimits {
  free: number;
  firstWait: number;
  maxWait: number;
  forgetAfter: number;
  totalFailures: number;
  totalPeriod: number;
  /** Addresses that are remembered; the ones longest at peace go first. */
  addresses: number;
}

const LIMITS: AttemptsLimits = {
  free: 5,
  firstWait: 1_000,
  maxWait: 15 * 60_000,
  forgetAfter: 60 * 60_000,
  totalFailures: 300,
  totalPeriod: 60_000,
  addresses: 10_000,
};

interface Failures {
  count: number;
  last: number;
  /** Attempts before this time are refused. */
  until: number;
}

export class Attempts {
  readonly #limits: AttemptsLimits;
  /** Both in the order of their last attempt. */
  readonly #failures = new Map<string, Failures>();
  readonly #succeeded = new Set<string>();
  #period = { start: Number.NEGATIVE_INFINITY, failures: 0, isLogged: false };

  constructor(private readonly options: AttemptsOptions) {
    this.#limits = { ...LIMITS, ...options.limits };
  }

  /** Milliseconds that this address must wait before a wrong attempt of it is answered again; 0: it may try. */
  wait(address: string, now: number): number {
    const key = keyOf(address);
    const own = Math.max(0, (this.#failures.get(key)?.until ?? 0) - now);
    if (own > 0 || this.#succeeded.has(key)) return own;
    const { totalFailures, totalPeriod } = this.#limits;
    const rest = this.#period.start + totalPeriod - now;
    return rest > 0 && this.#period.failures >= totalFailures ? rest : 0;
  }

  failed(address: string, now: number): void {
    const { free, firstWait, maxWait, forgetAfter, addresses } = this.#limits;
    const key = keyOf(address);
    const before = this.#failures.get(key);
    const count = before && now - before.last < forgetAfter ? before.count + 1 : 1;
    const wait = count <= free ? 0 : Math.min(maxWait, firstWait * 2 ** Math.min(count - free - 1, 30));
    this.#failures.delete(key);
    this.#failures.set(key, { count, last: now, until: now + wait });
    this.#succeeded.delete(key);
    if (this.#failures.size > addresses) this.#failures.delete(this.#failures.keys().next().value!);
    if (wait > 0)
      this.options.log?.(
        `${key}: ${count} wrong attempts at the ${this.options.what}, the next is refused for ${wait} ms`,
      );
    this.options.count?.(this.options.what);
    this.#count(now);
  }

  succeeded(address: string): void {
    const key = keyOf(address);
    this.#failures.delete(key);
    this.#succeeded.delete(key);
    this.#succeeded.add(key);
    if (this.#succeeded.size > this.#limits.addresses) this.#succeeded.delete(this.#succeeded.values().next().value!);
  }

  #count(now: number): void {
    const { totalFailures, totalPeriod } = this.#limits;
    if (now - this.#period.start >= totalPeriod) this.#period = { start: now, failures: 0, isLogged: false };
    this.#period.failures++;
    if (this.#period.failures < totalFailures || this.#period.isLogged) return;
    this.#period.isLogged = true;
    this.options.log?.(
      `${totalFailures} wrong attempts at the ${this.options.what} from all addresses within ${totalPeriod} ms: until that time is over, wrong ones are answered only to addresses that had a right one before`,
    );
  }
}

function keyOf(address: string): string {
  const ip = parseIP(address);
  if (!ip) return address.slice(0, 45);
  const plain = unmap(ip);
  return plain.length === 4 ? formatIP(plain) : `${formatIP(Uint8Array.from(plain, (b, i) => (i < 8 ? b : 0)))}/64`;
}
