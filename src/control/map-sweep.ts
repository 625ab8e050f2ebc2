// When open map streams are written to. A change that comes alone goes out at once. Bringing all readers up to date is a
// sweep, and after it there is a rest in proportion to what it took: changes that come meanwhile merge, the more the more
// there is to do, and deltas never take more than a third of a processor from requests.

/** Milliseconds after which a sweep lets others run before it goes on. */
const SLICE = 10;
/** The rest after a sweep, as a multiple of what it took, in milliseconds at least and at most. */
const REST = { factor: 2, min: 10, max: 1000 };

export interface Reader {
  /** Writes what is due now. */
  write(): void;
  /** Whether a sweep will come to it. Kept by the sweep; false at first. */
  isDue: boolean;
}

export class Sweep {
  /** Who is written to in this sweep, and who in the next. */
  private current: Reader[] = [];
  private next: Reader[] = [];
  /** How many of `current` have had their turn. */
  private done = 0;
  private state: "idle" | "sweeping" | "resting" = "idle";
  private timer: ReturnType<typeof setTimeout> | null = null;
  private busy = 0;

  /** Something is due for this reader. */
  add(reader: Reader): void {
    if (reader.isDue) return;
    reader.isDue = true;
    this.next.push(reader);
    if (this.state === "idle") this.start();
  }

  remove(reader: Reader): void {
    reader.isDue = false;
  }

  close(): void {
    if (this.timer) clearTimeout(this.timer);
    this.current = [];
    this.next = [];
  }

  private start(): void {
    this.state = "sweeping";
    this.busy = 0;
    this.done = 0;
    // All readers of one change are named before the first of them is written to.
    setImmediate(() => {
      this.current = this.next;
      this.next = [];
      this.slice();
    });
  }

  private slice(): void {
    const began = performance.now();
    while (this.done < this.current.length) {
      const reader = this.current[this.done++]!;
      if (!reader.isDue) continue;
      reader.isDue = false;
      reader.write();
      if (performance.now() - began > SLICE) break;
    }
    this.busy += performance.now() - began;
    if (this.done < this.current.length) {
      setImmediate(() => this.slice());
      return;
    }
    this.current = [];
    this.state = "resting";
    this.timer = setTimeout(
      () => {
        this.state = "idle";
        if (this.next.length > 0) this.start();
      },
      Math.min(REST.max, Math.max(REST.min, this.busy * REST.factor)),
    );
  }
}
