// A set of node ids as a bitmap in pages: one bit a node instead of some 30 bytes, for every open map stream has one.
const PAGE_BITS = 10;
const PAGE = 1 << PAGE_BITS;

export class IdSet {
  private readonly pages = new Map<number, Uint32Array>();

  has(id: number): boolean {
    const page = this.pages.get(Math.floor(id / PAGE));
    const bit = id % PAGE;
    return page !== undefined && ((page[bit >>> 5]! >>> (bit & 31)) & 1) === 1;
  }

  add(id: number): void {
    const number = Math.floor(id / PAGE);
    let page = this.pages.get(number);
    if (!page) {
      page = new Uint32Array(PAGE / 32);
      this.pages.set(number, page);
    }
    const bit = id % PAGE;
    page[bit >>> 5]! |= 1 << (bit & 31);
  }

  /** Ids that are in one of both only, ascending. */
  difference(other: IdSet): number[] {
    const ids: number[] = [];
    const numbers = new Set([...this.pages.keys(), ...other.pages.keys()]);
    for (const number of [...numbers].sort((a, b) => a - b)) {
      const [a, b] = [this.pages.get(number), other.pages.get(number)];
      for (let i = 0; i < PAGE / 32; i++) {
        for (let word = (a?.[i] ?? 0) ^ (b?.[i] ?? 0); word !== 0; word &= word - 1)
          ids.push(number * PAGE + i * 32 + 31 - Math.clz32(word & -word));
      }
    }
    return ids;
  }

  delete(id: number): void {
    const page = this.pages.get(Math.floor(id / PAGE));
    const bit = id % PAGE;
    if (!page) return;
    page[bit >>> 5]! &= ~(1 << (bit & 31));
    if (page.every((word) => word === 0)) this.pages.delete(Math.floor(id / PAGE));
  }
}
