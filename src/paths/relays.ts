// Which relay connections are wanted (spec/derp-wire.md 19.2): the home's always, another region's while there is
// something to send, until nothing was written for a minute.

const IDLE_MS = 60_000;
const IDLE_CHECK_MS = 15_000;

interface Connection {
  connected: boolean;
  lastWrite: number;
  lastHeard: number;
}

export class RelayConnections {
  home = 0;
  /** When the next look for idle connections is due. */
  checkAt = Number.POSITIVE_INFINITY;
  readonly #wanted = new Map<number, Connection>();
  readonly #emit: (type: "connect" | "disconnect", region: number) => void;

  constructor(emit: (type: "connect" | "disconnect", region: number) => void) {
    this.#emit = emit;
  }

  /** The regions that are, or ought to be, connected. */
  get regions(): number[] {
    return [...this.#wanted.keys()];
  }

  isConnected(region: number): boolean {
    return this.#wanted.get(region)?.connected ?? false;
  }

  heardAt(region: number): number {
    return this.#wanted.get(region)?.lastHeard ?? Number.NEGATIVE_INFINITY;
  }

  /** Something is to be sent over this region now. */
  noteWrite(region: number, now: number): void {
    const known = this.#wanted.get(region);
    if (known) {
      known.lastWrite = now;
      return;
    }
    this.#wanted.set(region, { connected: false, lastWrite: now, lastHeard: Number.NEGATIVE_INFINITY });
    if (region !== this.home && this.checkAt === Number.POSITIVE_INFINITY) this.checkAt = now + IDLE_CHECK_MS;
    this.#emit("connect", region);
  }

  setHome(region: number, now: number): void {
    this.home = region;
    if (region !== 0) this.noteWrite(region, now);
    if (this.checkAt === Number.POSITIVE_INFINITY) this.checkAt = now + IDLE_CHECK_MS;
  }

  setState(region: number, connected: boolean): void {
    const known = this.#wanted.get(region);
    if (known) known.connected = connected;
  }

  noteHeard(region: number, now: number): void {
    const known = this.#wanted.get(region);
    if (!known) return;
    known.lastHeard = now;
    // A frame is the best proof of a connection.
    known.connected = true;
  }

  drop(region: number): void {
    if (this.#wanted.delete(region)) this.#emit("disconnect", region);
  }

  handleTimeout(now: number): void {
    if (now < this.checkAt) return;
    let others = false;
    for (const [region, connection] of this.#wanted) {
      if (region === this.home) continue;
      if (now - connection.lastWrite >= IDLE_MS) this.drop(region);
      else others = true;
    }
    this.checkAt = others ? now + IDLE_CHECK_MS : Number.POSITIVE_INFINITY;
  }
}
