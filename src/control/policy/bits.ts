// A set of small numbers (indexes of nodes) as a bitmap: unions and intersections of thousands of nodes are a few words.
export class Bits {
  private readonly words: Uint32Array;

  constructor(readonly size: number) {
    this.words = new Uint32Array((size + 31) >>> 5);
  }

  static all(size: number): Bits {
    const bits = new Bits(size);
    for (let i = 0; i < size; i++) bits.add(i);
    return bits;
  }

  static of(size: number, items: Iterable<number>): Bits {
    const bits = new Bits(size);
    for (const item of items) bits.add(item);
    return bits;
  }

  add(i: number): void {
    this.words[i >>> 5]! |= 1 << (i & 31);
  }

  delete(i: number): void {
    this.words[i >>> 5]! &= ~(1 << (i & 31));
  }

  has(i: number): boolean {
    return ((this.words[i >>> 5]! >>> (i & 31)) & 1) === 1;
  }

  addAll(other: Bits): this {
    for (let i = 0; i < this.words.length; i++) this.words[i]! |= other.words[i]!;
    return this;
  }

  overlaps(other: Bits): boolean {
    return this.words.some((word, i) => (word & other.words[i]!) !== 0);
  }

  covers(other: Bits): boolean {
    return this.words.every((word, i) => (other.words[i]! & ~word) === 0);
  }

  /** Whether both hold the same numbers, also when one is for more. */
  equals(other: Bits): boolean {
    const [short, long] = this.size < other.size ? [this, other] : [other, this];
    return long.words.every((word, i) => word === (short.words[i] ?? 0));
  }

  get count(): number {
    let count = 0;
    for (let word of this.words) for (; word !== 0; word &= word - 1) count++;
    return count;
  }

  get isEmpty(): boolean {
    return this.words.every((word) => word === 0);
  }

  *[Symbol.iterator](): Generator<number> {
    for (let i = 0; i < this.words.length; i++) {
      for (let word = this.words[i]!; word !== 0; word &= word - 1) yield i * 32 + 31 - Math.clz32(word & -word);
    }
  }
}
