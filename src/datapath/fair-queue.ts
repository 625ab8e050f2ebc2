// Buffers that wait for their turn, in order for each key (a flow, a peer), fair between keys: deficit round robin in which a
// key that comes up anew goes before those that have a backlog (the scheduler of FQ-CoDel, RFC 8290 section 4). Nothing is
// allocated: buffers and keys are numbers, lists run through arrays.

/** Bytes that a key may send in one round. */
const QUANTUM = 65536;
const NONE = -1;
const IDLE = 0;
const NEW = 1;
const OLD = 2;

export class FairQueue {
  /** Keys that have buffers waiting, or had in this round. */
  active = 0;
  // by buffer
  readonly #next: Int32Array;
  readonly #bytes: Int32Array;
  // by key
  readonly #head: Int32Array;
  readonly #tail: Int32Array;
  readonly #waiting: Int32Array;
  readonly #deficit: Int32Array;
  readonly #list: Uint8Array;
  readonly #nextKey: Int32Array;
  // by list
  readonly #first = new Int32Array(3).fill(NONE);
  readonly #last = new Int32Array(3).fill(NONE);

  constructor(keys: number, buffers: number) {
    this.#next = new Int32Array(buffers);
    this.#bytes = new Int32Array(buffers);
    this.#head = new Int32Array(keys).fill(NONE);
    this.#tail = new Int32Array(keys);
    this.#waiting = new Int32Array(keys);
    this.#deficit = new Int32Array(keys);
    this.#list = new Uint8Array(keys);
    this.#nextKey = new Int32Array(keys);
  }

  get empty(): boolean {
    return this.#first[NEW] === NONE && this.#first[OLD] === NONE;
  }

  /** `bytes` are what it costs when its turn comes. */
  push(key: number, buffer: number, bytes: number): void {
    this.#next[buffer] = NONE;
    this.#bytes[buffer] = bytes;
    this.#waiting[key]! += bytes;
    if (this.#head[key] === NONE) this.#head[key] = buffer;
    else this.#next[this.#tail[key]!] = buffer;
    this.#tail[key] = buffer;
    if (this.#list[key] !== IDLE) return;
    this.active++;
    this.#deficit[key] = QUANTUM;
    this.#append(NEW, key);
  }

  /** Whose turn it is; -1: nothing waits. */
  shift(): number {
    for (;;) {
      const list = this.#first[NEW] === NONE ? OLD : NEW;
      const key = this.#first[list]!;
      if (key === NONE) return NONE;
      if (this.#deficit[key]! <= 0) {
        this.#deficit[key]! += QUANTUM;
        this.#remove(list);
        this.#append(OLD, key);
        continue;
      }
      if (this.#head[key] !== NONE) {
        const buffer = this.#pop(key);
        this.#deficit[key]! -= this.#bytes[buffer]!;
        return buffer;
      }
      this.#remove(list);
      // Who has just been served before the others waits one round before that counts as new again.
      if (list === NEW && this.#first[OLD] !== NONE) this.#append(OLD, key);
      else {
        this.#list[key] = IDLE;
        this.active--;
      }
    }
  }

  /** Takes the oldest buffer of the key that holds most. -1: nothing waits. */
  dropFromLongest(): number {
    let longest = NONE;
    for (let list = NEW; list <= OLD; list++) {
      for (let key = this.#first[list]!; key !== NONE; key = this.#nextKey[key]!) {
        if (longest === NONE || this.#waiting[key]! > this.#waiting[longest]!) longest = key;
      }
    }
    return longest === NONE || this.#head[longest] === NONE ? NONE : this.#pop(longest);
  }

  #pop(key: number): number {
    const buffer = this.#head[key]!;
    this.#head[key] = this.#next[buffer]!;
    this.#waiting[key]! -= this.#bytes[buffer]!;
    return buffer;
  }

  #append(list: number, key: number): void {
    this.#list[key] = list;
    this.#nextKey[key] = NONE;
    if (this.#first[list] === NONE) this.#first[list] = key;
    else this.#nextKey[this.#last[list]!] = key;
    this.#last[list] = key;
  }

  #remove(list: number): void {
    this.#first[list] = this.#nextKey[this.#first[list]!]!;
  }
}
