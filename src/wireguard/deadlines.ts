// When must which peer be looked at: a binary heap of deadlines by slot. Timers of a busy peer move with every batch, so a
// deadline that moved later stays in the heap as it is, and is put right only when it comes to the top.

export class Deadlines {
  /** Heap of slots, ordered by `#key`. */
  readonly #heap: number[] = [];
  /** Time under which a slot stands in the heap. */
  readonly #key: number[] = [];
  /** Where a slot stands in the heap; -1: not at all. */
  readonly #place: number[] = [];
  /** The real deadline of a slot: never before its key. */
  readonly #due: number[] = [];

  /** `due` in ms; Infinity: none. */
  set(slot: number, due: number): void {
    this.#due[slot] = due;
    const place = this.#place[slot] ?? -1;
    if (place < 0) {
      if (due === Number.POSITIVE_INFINITY) return;
      this.#key[slot] = due;
      this.#place[slot] = this.#heap.length;
      this.#heap.push(slot);
      this.#up(this.#heap.length - 1);
    } else if (due < this.#key[slot]!) {
      this.#key[slot] = due;
      this.#up(place);
    }
  }

  /** The earliest deadline, or Infinity. */
  next(): number {
    for (;;) {
      const slot = this.#heap[0];
      if (slot === undefined) return Number.POSITIVE_INFINITY;
      const due = this.#due[slot]!;
      if (due === this.#key[slot]) return due;
      if (due === Number.POSITIVE_INFINITY) this.#removeTop();
      else {
        this.#key[slot] = due;
        this.#down(0);
      }
    }
  }

  /** The slot with the earliest deadline, if that is not after `now`; -1: none. It stays until its deadline is set anew. */
  due(now: number): number {
    return this.next() <= now ? (this.#heap[0] ?? -1) : -1;
  }

  #removeTop(): void {
    this.#place[this.#heap[0]!] = -1;
    const last = this.#heap.pop()!;
    if (this.#heap.length === 0) return;
    this.#heap[0] = last;
    this.#place[last] = 0;
    this.#down(0);
  }

  #up(place: number): void {
    const slot = this.#heap[place]!;
    const key = this.#key[slot]!;
    while (place > 0) {
      const parent = (place - 1) >> 1;
      const other = this.#heap[parent]!;
      if (this.#key[other]! <= key) break;
      this.#put(other, place);
      place = parent;
    }
    this.#put(slot, place);
  }

  #down(place: number): void {
    const slot = this.#heap[place]!;
    const key = this.#key[slot]!;
    for (;;) {
      let child = 2 * place + 1;
      if (child >= this.#heap.length) break;
      if (child + 1 < this.#heap.length && this.#key[this.#heap[child + 1]!]! < this.#key[this.#heap[child]!]!) child++;
      const other = this.#heap[child]!;
      if (this.#key[other]! >= key) break;
      this.#put(other, place);
      place = child;
    }
    this.#put(slot, place);
  }

  #put(slot: number, place: number): void {
    this.#heap[place] = slot;
    this.#place[slot] = place;
  }
}
