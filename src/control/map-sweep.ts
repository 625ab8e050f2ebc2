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
}

export class Sweep {
  /** Who is written to in this sweep, and who in the next. */
  private current = new Set<Reader>();
  private next = new Set<Reader>();
  private state: "idle" | "sweeping" | "resting" = "idle";
  private timer: ReturnType<typeof setTimeout> | null = null;
  private busy = 0;

  /** Something is due for this reader. */
  add(reader: Reader): void {
    this.next.add(reader);
    if (this.state === "idle") this.start();
  }

  remove(reader: Reader): void {
    this.current.delete(reader);
    this.next.delete(reader);
  }

  close(): void {
    if (this.timer) clearTimeout(this.timer);
    this.current.clear();
    this.next.clear();
  }

  private start(): void {
    this.state = "sweeping";
    this.busy = 0;
    // All readers of one change are named before the first of them is written to.
    setImmediate(() => {
      [this.current, this.next] = [this.next, this.current];
      this.slice();
    });
  }

  private slice(): void {
    const began = performance.now();
    for (const reader of this.current) {
      this.current.delete(reader);
      reader.write();
      if (performance.now() - began > SLICE) break;
    }
    this.busy += performance.now() - began;
    if (this.current.size > 0) {
      setImmediate(() => this.slice());
      return;
    }
    this.state = "resting";
    this.timer = setTimeout(
      () => {
        this.state = "idle";
        if (this.next.size > 0) this.start();
      },
      Math.min(REST.max, Math.max(REST.min, this.busy * REST.factor)),
    );
  }
}
