// Who is sent a full netmap when all ask at once, as after a restart of the server: so many at a time, in the order in which
// they came. Each is served as fast as its link allows and the rest wait as nothing but an entry in a list, where thousands of
// netmaps that go out side by side would lie half-sent in the memory of both ends.

/** Netmaps on their way. */
const WIDTH = 32;
/** Milliseconds that one has the way for itself. Then it goes on beside the next one: who reads slowly holds up nobody. */
const PATIENCE = 1000;
/** Milliseconds after which others run before the next one begins. */
const SLICE = 10;

export interface Guest {
  /** Its turn has come. */
  begin(): void;
}

export class Turns {
  private readonly waiting = new Set<Guest>();
  private readonly inside = new Map<Guest, ReturnType<typeof setTimeout> | null>();
  private isDue = false;

  constructor(
    private readonly width = WIDTH,
    private readonly patience = PATIENCE,
  ) {}

  /** Calls `begin`, at once if there is room. */
  enter(guest: Guest): void {
    if (this.waiting.size === 0 && this.inside.size < this.width) this.begin(guest);
    else this.waiting.add(guest);
  }

  /** It is served, or has gone away. */
  leave(guest: Guest): void {
    this.waiting.delete(guest);
    const timer = this.inside.get(guest);
    if (timer) clearTimeout(timer);
    // Not at once: where a thousand connections end together, those next in line are among them.
    if (this.inside.delete(guest)) this.letInSoon();
  }

  close(): void {
    this.waiting.clear();
    for (const guest of [...this.inside.keys()]) this.leave(guest);
  }

  private letInSoon(): void {
    if (this.isDue || this.waiting.size === 0) return;
    this.isDue = true;
    setImmediate(() => {
      this.isDue = false;
      this.letIn();
    });
  }

  private letIn(): void {
    const began = performance.now();
    for (const guest of this.waiting) {
      if (this.inside.size >= this.width) return;
      if (performance.now() - began > SLICE) {
        this.letInSoon();
        return;
      }
      this.waiting.delete(guest);
      this.begin(guest);
    }
  }

  private begin(guest: Guest): void {
    this.inside.set(guest, null);
    guest.begin();
    // Otherwise it is served.
    if (this.inside.has(guest))
      this.inside.set(
        guest,
        setTimeout(() => this.leave(guest), this.patience),
      );
  }
}
