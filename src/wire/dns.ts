// DNS messages as far as a control server needs them: ask for TXT records, and change them (RFC 1035; dynamic update, RFC
// 2136; transaction signatures, RFC 8945). No I/O.
//
//   message   id u16 | flags u16 | four counts u16 | question or zone | answer | authority or update | additional
//   name      labels (length u8, bytes) and a zero, or a pointer (11xxxxxx xxxxxxxx) to an earlier place
//   record    name | type u16 | class u16 | ttl u32 | length u16 | data
//   TXT data  strings (length u8, bytes)
//   TSIG      the last additional record: algorithm name | time u48 | fudge u16 | MAC | original id | error | other
const TXT = 16;
const SOA = 6;
const TSIG = 250;
const CLASS_IN = 1;
const CLASS_ANY = 255;
const OPCODE_UPDATE = 5 << 11;
const RECURSION_DESIRED = 0x0100;
/** Seconds that clocks may differ. */
const FUDGE = 300;
const MAX_RECORDS = 4096;
/** Pointers in one name: each leads further back, but an attacker could chain thousands. */
const MAX_POINTERS = 64;

export const RCODES: readonly string[] = [
  "NOERROR",
  "FORMERR",
  "SERVFAIL",
  "NXDOMAIN",
  "NOTIMP",
  "REFUSED",
  "YXDOMAIN",
  "YXRRSET",
  "NXRRSET",
  "NOTAUTH",
  "NOTZONE",
];

export interface TsigKey {
  /** Name of the key. */
  name: string;
  /** "hmac-sha256" and the like. */
  algorithm: string;
  /** HMAC by that algorithm with the secret. */
  mac(data: Uint8Array): Uint8Array;
}

export interface DnsRecord {
  /** Lower case, without the dot at the end. */
  name: string;
  type: number;
  class: number;
  ttl: number;
  data: Uint8Array;
}

export interface DnsMessage {
  id: number;
  /** Of the answer; see RCODES. */
  rcode: number;
  isResponse: boolean;
  isTruncated: boolean;
  answers: DnsRecord[];
  additional: DnsRecord[];
}

function u16(n: number): Uint8Array {
  return Uint8Array.of(n >> 8, n & 255);
}

function u32(n: number): Uint8Array {
  return Uint8Array.of(n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255);
}

function concat(...parts: readonly Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

/** Uncompressed, in lower case. Throws RangeError when `name` is no DNS name. */
export function encodeName(name: string): Uint8Array {
  const plain = name.replace(/\.$/, "").toLowerCase();
  const labels = plain === "" ? [] : plain.split(".");
  const parts = labels.map((label) => {
    const bytes = new TextEncoder().encode(label);
    if (bytes.length === 0 || bytes.length > 63) throw new RangeError(`"${name}" is no DNS name`);
    return concat(Uint8Array.of(bytes.length), bytes);
  });
  const encoded = concat(...parts, Uint8Array.of(0));
  if (encoded.length > 255) throw new RangeError(`"${name}" is no DNS name: it is longer than 253 characters`);
  return encoded;
}

function header(id: number, flags: number, counts: readonly [number, number, number, number]): Uint8Array {
  return concat(u16(id), u16(flags), ...counts.map(u16));
}

function record(name: string, type: number, klass: number, ttl: number, data: Uint8Array): Uint8Array {
  return concat(encodeName(name), u16(type), u16(klass), u32(ttl), u16(data.length), data);
}

/** Asks for the TXT records of a name. */
export function encodeTxtQuery(id: number, name: string): Uint8Array {
  return concat(header(id, RECURSION_DESIRED, [1, 0, 0, 0]), encodeName(name), u16(TXT), u16(CLASS_IN));
}

/** Puts one TXT record in the place of all that the name has. `value`: at most 255 bytes. */
export function encodeTxtUpdate(
  id: number,
  update: { zone: string; name: string; value: string; ttl: number },
): Uint8Array {
  const value = new TextEncoder().encode(update.value);
  if (value.length > 255) throw new RangeError("a TXT value has at most 255 bytes here");
  return concat(
    header(id, OPCODE_UPDATE, [1, 0, 2, 0]),
    encodeName(update.zone),
    u16(SOA),
    u16(CLASS_IN),
    record(update.name, TXT, CLASS_ANY, 0, new Uint8Array()),
    record(update.name, TXT, CLASS_IN, update.ttl, concat(Uint8Array.of(value.length), value)),
  );
}

/** What is signed of a TSIG record itself. */
function tsigVariables(key: TsigKey, time: Uint8Array, fudge: number, error: number, other: Uint8Array): Uint8Array {
  const parts = [encodeName(key.name), u16(CLASS_ANY), u32(0), encodeName(key.algorithm), time, u16(fudge), u16(error)];
  return concat(...parts, u16(other.length), other);
}

/** A request with its signature, and the MAC that the answer's signature covers. `now`: seconds since 1970. */
export function signMessage(message: Uint8Array, key: TsigKey, now: number): { signed: Uint8Array; mac: Uint8Array } {
  const time = concat(u16(Math.floor(now / 2 ** 32)), u32(now % 2 ** 32));
  const none = new Uint8Array();
  const mac = key.mac(concat(message, tsigVariables(key, time, FUDGE, 0, none)));
  const id = message.subarray(0, 2);
  const data = concat(encodeName(key.algorithm), time, u16(FUDGE), u16(mac.length), mac, id, u16(0), u16(0));
  const signed = concat(message, record(key.name, TSIG, CLASS_ANY, 0, data));
  signed.set(u16(((message[10]! << 8) | message[11]!) + 1), 10);
  return { signed, mac };
}

/** Whether an answer is signed with the key, for this request and at about this time. `equal`: in constant time. */
export function isSignedBy(
  message: Uint8Array,
  key: TsigKey,
  requestMac: Uint8Array,
  now: number,
  equal: (a: Uint8Array, b: Uint8Array) => boolean,
): boolean {
  const reader = new Reader(message);
  try {
    const found = reader.message();
    const last = found.additional.at(-1);
    if (!last || last.type !== TSIG || last.name !== key.name.replace(/\.$/, "").toLowerCase()) return false;
    const data = new Reader(last.data);
    if (data.name() !== key.algorithm) return false;
    const time = data.bytes(6);
    const fudge = data.u16();
    const mac = data.bytes(data.u16());
    const originalId = data.bytes(2);
    const error = data.u16();
    const other = data.bytes(data.u16());
    const seconds = Buffer.from(time).readUIntBE(0, 6);
    if (error !== 0 || Math.abs(seconds - now) > fudge) return false;
    const unsigned = message.slice(0, reader.lastRecordAt);
    unsigned.set(originalId, 0);
    unsigned.set(u16(found.additional.length - 1), 10);
    const covered = concat(u16(requestMac.length), requestMac, unsigned);
    return equal(mac, key.mac(concat(covered, tsigVariables(key, time, fudge, error, other))));
  } catch (error) {
    if (error instanceof RangeError) return false;
    throw error;
  }
}

class Reader {
  private at = 0;
  /** Where the record read last begins. */
  lastRecordAt = 0;

  constructor(private readonly buffer: Uint8Array) {}

  bytes(length: number): Uint8Array {
    const end = this.at + length;
    if (end > this.buffer.length) throw new RangeError("the DNS message is cut off");
    const bytes = this.buffer.subarray(this.at, end);
    this.at = end;
    return bytes;
  }

  u16(): number {
    const [a, b] = this.bytes(2);
    return (a! << 8) | b!;
  }

  u32(): number {
    return this.u16() * 0x10000 + this.u16();
  }

  name(): string {
    const labels: string[] = [];
    let length = 0;
    let end: number | null = null;
    for (let pointers = 0; ; ) {
      const size = this.bytes(1)[0]!;
      if (size === 0) break;
      if ((size & 0xc0) === 0xc0) {
        const target = ((size & 0x3f) << 8) | this.bytes(1)[0]!;
        end ??= this.at;
        if (++pointers > MAX_POINTERS || target >= this.buffer.length) throw new RangeError("a DNS name does not end");
        this.at = target;
        continue;
      }
      if (size > 63) throw new RangeError("a label of a DNS name is too long");
      length += size + 1;
      if (length > 254) throw new RangeError("a DNS name is too long");
      labels.push(Buffer.from(this.bytes(size)).toString("latin1").toLowerCase());
    }
    if (end !== null) this.at = end;
    return labels.join(".");
  }

  private record(): DnsRecord {
    this.lastRecordAt = this.at;
    const name = this.name();
    const [type, klass, ttl] = [this.u16(), this.u16(), this.u32()];
    return { name, type, class: klass, ttl, data: this.bytes(this.u16()) };
  }

  private records(count: number): DnsRecord[] {
    if (count > MAX_RECORDS) throw new RangeError(`a DNS message with ${count} records is not read`);
    return Array.from({ length: count }, () => this.record());
  }

  message(): DnsMessage {
    const [id, flags] = [this.u16(), this.u16()];
    const [questions, answers, authorities, additional] = [this.u16(), this.u16(), this.u16(), this.u16()];
    if (questions > 16) throw new RangeError(`a DNS message with ${questions} questions is not read`);
    for (let i = 0; i < questions; i++) {
      this.name();
      this.bytes(4);
    }
    const found = this.records(answers);
    this.records(authorities);
    return {
      id,
      rcode: flags & 15,
      isResponse: (flags & 0x8000) !== 0,
      isTruncated: (flags & 0x0200) !== 0,
      answers: found,
      additional: this.records(additional),
    };
  }
}

/** Throws RangeError when `bytes` is no DNS message. */
export function decodeMessage(bytes: Uint8Array): DnsMessage {
  return new Reader(bytes).message();
}

/** The values of a name's TXT records in an answer, the strings of each put together. Throws RangeError. */
export function txtValues({ answers }: DnsMessage, name: string): string[] {
  const wanted = name.replace(/\.$/, "").toLowerCase();
  return answers
    .filter((answer) => answer.type === TXT && answer.class === CLASS_IN && answer.name === wanted)
    .map(({ data }) => {
      const reader = new Reader(data);
      let value = "";
      for (let left = data.length; left > 0; ) {
        const size = reader.bytes(1)[0]!;
        value += Buffer.from(reader.bytes(size)).toString("latin1");
        left -= size + 1;
      }
      return value;
    });
}
