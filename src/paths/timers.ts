// Deadlines by key, the earliest first: a binary heap that knows where each key stands, so that a deadline can be moved
// or taken away in O(log n). A key without a deadline costs nothing.

interface Entry<K> {
  key: K;
  at: number;
  reason: string;
}

export class Timers<K> {
  readonly #heap: Entry<K>[] = [];
  readonly #index = new Map<K, number>();

  get size(): number {
    return this.#heap.length;
  }

  /** The earliest deadline. */
  peek(): Readonly<Entry<K>> | null {
    return this.#heap[0] ?? null;
  }

  /** One deadline per key; a new one replaces it, `Infinity` takes it away. */
  set(key: K, at: number, reason: string): void {
    if (at === Number.POSITIVE_INFINITY) {
      this.delete(key);
      return;
    }
    const i = this.#index.get(key);
    if (i === undefined) {
      this.#heap.push({ key, at, reason });
      this.#index.set(key, this.#heap.length - 1);
      this.#up(this.#heap.length - 1);
      return;
    }
    const entry = this.#heap[i]!;
    entry.at = at;
    entry.reason = reason;
    this.#up(i);
    this.#down(this.#index.get(key)!);
  }

  delete(key: K): void {
    const i = this.#index.get(key);
    if (i === undefined) return;
    this.#index.delete(key);
    const last = this.#heap.pop()!;
    if (i === this.#heap.length) return;
    this.#place(last, i);
    this.#up(i);
    this.#down(this.#index.get(last.key)!);
  }

  #place(entry: Entry<K>, i: number): void {
    this.#heap[i] = entry;
    this.#index.set(entry.key, i);
  }

  #up(from: number): void {
    const entry = this.#heap[from]!;
    let i = from;
    while (i > 0) {
      const parent = (i - 1) >> 1;
      if (this.#heap[parent]!.at <= entry.at) break;
      this.#place(this.#heap[parent]!, i);
      i = parent;
    }
    this.#place(entry, i);
  }

  #down(from: number): void {
    const entry = this.#heap[from]!;
    let i = from;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= this.#heap.length) break;
      if (child + 1 < this.#heap.length && this.#heap[child + 1]!.at < this.#heap[child]!.at) child++;
      if (this.#heap[child]!.at >= entry.at) break;
      this.#place(this.#heap[child]!, i);
      i = child;
    }
    this.#place(entry, i);
  }
}
