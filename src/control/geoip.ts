// The country that a node speaks from, for postures ("ip:country"): by the address of its connection and a table that the
// operator provides, one line for each range (the free tables of DB-IP, "lite", and iptoasn, "ip2country", are such files
// as they come):
//
//   192.0.2.0/24,DE        a prefix and the country's two letters
//   1.0.0.0,1.0.0.255,AU   or first and last address; tabs will do, quotes and more columns are passed over
//
// Of ranges in each other the innermost counts. IPv6 addresses are told apart by their first 52 bits. The file is read
// again when it changes.
import { isIPv4, isIPv6 } from "node:net";
import type { NodeRecord } from "./model.ts";
import { FileWatch, readSmallFile } from "./watch.ts";

export const COUNTRY = "ip:country";

const MAX_BYTES = 128 * 1024 * 1024;
const MAX_RANGES = 4_000_000;
/** Lines that are read before others get their turn: a whole table takes seconds. */
const LINES_PER_TURN = 10_000;

/** An address as a number that compares: the 32 bits of IPv4, or the first 52 of IPv6, which a number holds. */
interface Key {
  isV4: boolean;
  bits: number;
}

/** Null when it is no address. Not by `parseIP`: a table has a million of them. */
function keyOf(text: string): Key | null {
  if (isIPv4(text)) return { isV4: true, bits: text.split(".").reduce((sum, part) => sum * 256 + Number(part), 0) };
  const mapped = /^::ffff:([\d.]+)$/i.exec(text)?.[1];
  if (mapped !== undefined) return keyOf(mapped);
  if (!isIPv6(text) || text.includes("%")) return null;
  const [head = "", tail] = text.split("::") as [string, string?];
  const groups = head === "" ? [] : head.split(":");
  if (tail !== undefined) {
    const behind = tail === "" ? [] : tail.split(":");
    const width = behind.length + (tail.includes(".") ? 1 : 0);
    groups.push(...Array<string>(8 - groups.length - width).fill("0"), ...behind);
  }
  const [a, b, c, d] = groups.slice(0, 4).map((group) => Number.parseInt(group, 16)) as [
    number,
    number,
    number,
    number,
  ];
  return { isV4: false, bits: ((a * 65536 + b) * 65536 + c) * 16 + (d >> 12) };
}

/** Ranges of one family. */
class Ranges {
  private firsts: number[] = [];
  private lasts: number[] = [];
  private countries: string[] = [];
  /** The nearest range before that reaches beyond the start of this one; -1: none. */
  private around = new Int32Array(0);
  private isSorted = true;

  get size(): number {
    return this.firsts.length;
  }

  add(first: number, last: number, country: string): void {
    const i = this.firsts.push(first) - 1;
    this.lasts.push(last);
    this.countries.push(country);
    if (i > 0 && this.compare(i - 1, i) > 0) this.isSorted = false;
  }

  /** No more are added. */
  settle(): void {
    if (!this.isSorted) {
      const order = Array.from(this.firsts.keys()).sort((a, b) => this.compare(a, b));
      const pick = <T>(column: readonly T[]) => order.map((i) => column[i]!);
      this.firsts = pick(this.firsts);
      this.lasts = pick(this.lasts);
      this.countries = pick(this.countries);
    }
    this.around = new Int32Array(this.size);
    const open: number[] = [];
    for (let i = 0; i < this.size; i++) {
      while (open.length > 0 && this.lasts[open.at(-1)!]! < this.firsts[i]!) open.pop();
      this.around[i] = open.at(-1) ?? -1;
      open.push(i);
    }
  }

  find(address: number): string | null {
    let low = 0;
    let high = this.size;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.firsts[middle]! <= address) low = middle + 1;
      else high = middle;
    }
    let i = low - 1;
    while (i >= 0 && this.lasts[i]! < address) i = this.around[i]!;
    return this.countries[i] ?? null;
  }

  /** Wider ones first, where several begin together. */
  private compare(a: number, b: number): number {
    return this.firsts[a]! - this.firsts[b]! || this.lasts[b]! - this.lasts[a]!;
  }
}

export class CountryTable {
  private readonly v4 = new Ranges();
  private readonly v6 = new Ranges();
  /** Each name of a country once. */
  private readonly names = new Map<string, string>();

  /** Throws with one sentence that names the line. */
  static async parse(text: string): Promise<CountryTable> {
    const table = new CountryTable();
    let number = 0;
    for (let at = 0; at < text.length; ) {
      const end = text.indexOf("\n", at);
      const line = text.slice(at, end < 0 ? text.length : end).trim();
      at = end < 0 ? text.length : end + 1;
      number++;
      if (number % LINES_PER_TURN === 0) await new Promise((resolve) => setImmediate(resolve));
      if (line === "" || line.startsWith("#") || table.take(line)) continue;
      // The names of the columns.
      if (number === 1 && /^"?[a-z_ ]+"?[,\t;]/i.test(line)) continue;
      throw new Error(
        `line ${number}: ${JSON.stringify(line.slice(0, 80))} is no line like "192.0.2.0/24,DE" or "1.0.0.0,1.0.0.255,AU"`,
      );
    }
    if (table.size === 0) throw new Error("no line of it names a country");
    if (table.size > MAX_RANGES) throw new Error(`it has more than ${MAX_RANGES} ranges`);
    table.v4.settle();
    table.v6.settle();
    return table;
  }

  get size(): number {
    return this.v4.size + this.v6.size;
  }

  /** Two capital letters; null: the table does not say. */
  country(address: string): string | null {
    const key = keyOf(address);
    return key && (key.isV4 ? this.v4 : this.v6).find(key.bits);
  }

  /** False: the line is none of a table. */
  private take(line: string): boolean {
    const fields = line.replaceAll('"', "").split(/[,\t;]/, 3);
    const [start = "", second = "", third = ""] = fields.map((field) => field.trim());
    const slash = start.indexOf("/");
    const range = slash < 0 ? rangeOf(start, second) : rangeOfPrefix(start.slice(0, slash), start.slice(slash + 1));
    const country = (slash < 0 ? third : second).toUpperCase();
    if (!range) return false;
    // About nobody's country.
    if (["", "-", "ZZ", "NONE"].includes(country)) return true;
    if (!/^[A-Z]{2}$/.test(country)) return false;
    const name = this.names.get(country) ?? country;
    this.names.set(name, name);
    (range.isV4 ? this.v4 : this.v6).add(range.first, range.last, name);
    return true;
  }
}

interface Range {
  isV4: boolean;
  first: number;
  last: number;
}

function rangeOf(first: string, last: string): Range | null {
  const [from, to] = [keyOf(first), keyOf(last)];
  if (!from || !to || from.isV4 !== to.isV4 || from.bits > to.bits) return null;
  return { isV4: from.isV4, first: from.bits, last: to.bits };
}

function rangeOfPrefix(address: string, length: string): Range | null {
  const key = keyOf(address);
  if (!key || !/^\d{1,3}$/.test(length) || Number(length) > (key.isV4 ? 32 : 128)) return null;
  const size = 2 ** Math.max(0, (key.isV4 ? 32 : 52) - Number(length));
  const first = key.bits - (key.bits % size);
  return { isV4: key.isV4, first, last: first + size - 1 };
}

export interface GeoIPOptions {
  /** "" for none: nobody's country is known. */
  path: string;
  /** The table is another one. */
  changed(): void;
  /** Problems; and what went well. */
  log(line: string): void;
  note(line: string): void;
  /** Milliseconds between looks, where the kernel tells nothing. */
  every?: number;
}

export class GeoIP {
  private table: CountryTable | null = null;
  private watch: FileWatch | null = null;
  private reading: Promise<void> = Promise.resolve();

  constructor(private readonly options: GeoIPOptions) {}

  /** Throws with one sentence when the file cannot be used. */
  async start(): Promise<void> {
    const { path, every } = this.options;
    if (path === "") return;
    try {
      await this.read();
    } catch (error) {
      throw new Error(`the table of countries ${path} cannot be used: ${(error as Error).message}`);
    }
    this.watch = new FileWatch(path, () => this.reload(), every);
  }

  close(): void {
    this.watch?.close();
    this.watch = null;
  }

  /** The node with the country of an address, the same where nothing is new. */
  located(node: NodeRecord, address: string): NodeRecord {
    const country = this.table?.country(address) ?? undefined;
    if (node.attributes[COUNTRY] === country) return node;
    const { [COUNTRY]: _, ...others } = node.attributes;
    return { ...node, attributes: { ...others, ...(country !== undefined && { [COUNTRY]: country }) } };
  }

  private async read(): Promise<void> {
    this.table = await CountryTable.parse(readSmallFile(this.options.path, MAX_BYTES));
  }

  /** One reading after the other: the last word is that of the last change. */
  private reload(): void {
    const { path, changed, log, note } = this.options;
    this.reading = this.reading
      .then(() => this.read())
      .then(() => {
        if (!this.watch) return;
        note(`the table of countries ${path} has been read again: ${this.table!.size} ranges`);
        changed();
      })
      .catch((error: Error) =>
        log(`the table of countries ${path} cannot be used, what it said before stays: ${error.message}`),
      );
  }
}
