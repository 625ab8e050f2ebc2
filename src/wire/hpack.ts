// HPACK, the header compression of HTTP/2 (RFC 7541), as a server needs it: decodes everything, encodes without a table of
// its own. No I/O.
//
//   1xxxxxxx   indexed field                      7-bit prefix: index (section 6.1)
//   01xxxxxx   literal, added to the table        6-bit prefix: index of the name, 0: the name follows (6.2.1)
//   001xxxxx   table size update                  5-bit prefix: size, before the first field of a block (6.3)
//   000nxxxx   literal, not added (n: never)      4-bit prefix: index of the name (6.2.2, 6.2.3)
//   string     Hxxxxxxx                           7-bit prefix: bytes; H: in Huffman code (5.2)
//   integer    prefix bits; all ones: 7 bits more in each byte that follows, lowest first, top bit: another (5.1)
//
// Index 1 to 61 is the static table, 62 and up the dynamic one, newest first. An entry counts name + value + 32 bytes.
import { Buffer } from "node:buffer";

/** Name and value, one character a byte. */
export type HeaderField = readonly [name: string, value: string];

/** The block cannot be decoded, and the tables of both ends differ from here on: the connection is beyond repair. */
export class HpackError extends Error {
  override name = "HpackError";
}

/** The fields of a block are more than was allowed. The table is not up to date any more: the connection must end. */
export class HeaderListTooLarge extends Error {
  override name = "HeaderListTooLarge";
}

/** What a table may hold by default (RFC 9113, section 6.5.2). */
export const DEFAULT_TABLE_SIZE = 4096;
const ENTRY_OVERHEAD = 32;
/** No length or index of a block that fits its bounds is as large. */
const MAX_INTEGER = 1 << 24;

/** Appendix A, from index 1 on. */
const STATIC: readonly HeaderField[] = [
  [":authority", ""],
  [":method", "GET"],
  [":method", "POST"],
  [":path", "/"],
  [":path", "/index.html"],
  [":scheme", "http"],
  [":scheme", "https"],
  ...["200", "204", "206", "304", "400", "404", "500"].map((status): HeaderField => [":status", status]),
  ["accept-charset", ""],
  ["accept-encoding", "gzip, deflate"],
  ...[
    ..."accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control".split(
      " ",
    ),
    ..."content-disposition content-encoding content-language content-length content-location content-range".split(" "),
    ..."content-type cookie date etag expect expires from host if-match if-modified-since if-none-match".split(" "),
    ..."if-range if-unmodified-since last-modified link location max-forwards proxy-authenticate".split(" "),
    ..."proxy-authorization range referer refresh retry-after server set-cookie strict-transport-security".split(" "),
    ..."transfer-encoding user-agent vary via www-authenticate".split(" "),
  ].map((name): HeaderField => [name, ""]),
];

/** Bits of each symbol's code, 0 to 255 and the end-of-string symbol (appendix B). The code is canonical: lengths say all. */
// biome-ignore format: sixteen symbols a line
const CODE_LENGTHS = [
  13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
  28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
  6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
  5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
  13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
  7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
  15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
  6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
  20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
  24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
  22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
  21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
  26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
  19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
  20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
  26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
  30,
];
const END_OF_STRING = 256;
const MAX_CODE = 30;

/** For each length: the first code, and the symbols in the order of their codes. */
const CODES = (() => {
  const byLength: { first: number; symbols: number[] }[] = [];
  let code = 0;
  for (let length = 0; length <= MAX_CODE; length++) {
    const symbols = [...CODE_LENGTHS.keys()].filter((symbol) => CODE_LENGTHS[symbol] === length);
    byLength.push({ first: code, symbols });
    code = (code + symbols.length) * 2;
  }
  return byLength;
})();

function decodeHuffman(bytes: Uint8Array): string {
  const out: number[] = [];
  let code = 0;
  let length = 0;
  for (const byte of bytes)
    for (let bit = 7; bit >= 0; bit--) {
      code = code * 2 + ((byte >> bit) & 1);
      const { first, symbols } = CODES[++length]!;
      const symbol = symbols[code - first];
      if (symbol === undefined) {
        if (length === MAX_CODE) throw new HpackError("HPACK: a string holds a code that no symbol has");
        continue;
      }
      if (symbol === END_OF_STRING) throw new HpackError("HPACK: a string holds the end-of-string symbol");
      out.push(symbol);
      code = 0;
      length = 0;
    }
  // What is left is the beginning of the end-of-string symbol, which is all ones, and less than a byte.
  if (length > 7 || code !== 2 ** length - 1) throw new HpackError("HPACK: a string ends in a wrong padding");
  return latin1(Uint8Array.from(out));
}

function latin1(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("latin1");
}

/** The header blocks of one direction of one connection, in order. */
export class HpackDecoder {
  /** Oldest first. */
  private readonly entries: HeaderField[] = [];
  private size = 0;
  private maxSize: number;
  private block: Uint8Array = new Uint8Array();
  private at = 0;

  /** `limit`: bytes of the dynamic table, as SETTINGS_HEADER_TABLE_SIZE promised. */
  constructor(private readonly limit = DEFAULT_TABLE_SIZE) {
    this.maxSize = limit;
  }

  /** `maxList`: bytes of all fields, each counted as a table entry. Throws HpackError, HeaderListTooLarge; then never again. */
  decode(block: Uint8Array, maxList: number): HeaderField[] {
    this.block = block;
    this.at = 0;
    const fields: HeaderField[] = [];
    let total = 0;
    while (this.at < block.length) {
      const byte = block[this.at]!;
      if ((byte & 0xe0) === 0x20) {
        if (fields.length > 0) throw new HpackError("HPACK: a table size update stands behind a field");
        this.resize(this.integer(5));
        continue;
      }
      const field = this.field(byte);
      total += sizeOf(field);
      if (total > maxList) throw new HeaderListTooLarge(`the header fields of a request exceed ${maxList} bytes`);
      fields.push(field);
    }
    return fields;
  }

  private field(byte: number): HeaderField {
    if (byte & 0x80) return this.entry(this.integer(7));
    const isAdded = (byte & 0x40) !== 0;
    const index = this.integer(isAdded ? 6 : 4);
    const name = index === 0 ? this.string() : this.entry(index)[0];
    const field: HeaderField = [name, this.string()];
    if (isAdded) this.add(field);
    return field;
  }

  private entry(index: number): HeaderField {
    const field =
      index <= STATIC.length ? STATIC[index - 1] : this.entries[this.entries.length - (index - STATIC.length)];
    if (!field) throw new HpackError(`HPACK: no table has an entry ${index}`);
    return field;
  }

  private add(field: HeaderField): void {
    this.entries.push(field);
    this.size += sizeOf(field);
    this.evict();
  }

  private resize(size: number): void {
    if (size > this.limit) throw new HpackError(`HPACK: a table of ${size} bytes is wanted, ${this.limit} are allowed`);
    this.maxSize = size;
    this.evict();
  }

  private evict(): void {
    while (this.size > this.maxSize) this.size -= sizeOf(this.entries.shift()!);
  }

  private integer(prefix: number): number {
    const mask = 2 ** prefix - 1;
    let value = this.next() & mask;
    if (value < mask) return value;
    for (let shift = 0; ; shift += 7) {
      const byte = this.next();
      value += (byte & 0x7f) * 2 ** shift;
      if (value > MAX_INTEGER || shift > 21) throw new HpackError("HPACK: an integer is too large");
      if (byte < 0x80) return value;
    }
  }

  private string(): string {
    const isHuffman = (this.block[this.at] ?? 0) >= 0x80;
    const length = this.integer(7);
    if (length > this.block.length - this.at) throw new HpackError("HPACK: a string goes beyond its block");
    const bytes = this.block.subarray(this.at, this.at + length);
    this.at += length;
    return isHuffman ? decodeHuffman(bytes) : latin1(bytes);
  }

  private next(): number {
    const byte = this.block[this.at++];
    if (byte === undefined) throw new HpackError("HPACK: a block ends within a field");
    return byte;
  }
}

function sizeOf([name, value]: HeaderField): number {
  return name.length + value.length + ENTRY_OVERHEAD;
}

/** A header block that needs no table but the static one: the same fields are always the same bytes. */
export function encodeHeaderBlock(fields: Iterable<HeaderField>): Uint8Array {
  const out: number[] = [];
  for (const [name, value] of fields) {
    const whole = STATIC.findIndex((entry) => entry[0] === name && entry[1] === value) + 1;
    if (whole > 0) {
      putInteger(out, 0x80, 7, whole);
      continue;
    }
    const index = STATIC.findIndex((entry) => entry[0] === name) + 1;
    putInteger(out, 0, 4, index);
    if (index === 0) putString(out, name);
    putString(out, value);
  }
  return Uint8Array.from(out);
}

function putInteger(out: number[], pattern: number, prefix: number, value: number): void {
  const mask = 2 ** prefix - 1;
  if (value < mask) {
    out.push(pattern | value);
    return;
  }
  out.push(pattern | mask);
  let rest = value - mask;
  for (; rest >= 0x80; rest >>>= 7) out.push((rest & 0x7f) | 0x80);
  out.push(rest);
}

function putString(out: number[], text: string): void {
  putInteger(out, 0, 7, text.length);
  for (let i = 0; i < text.length; i++) out.push(text.charCodeAt(i) & 0xff);
}
