import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Asm } from "../crypto/wasm.ts";
import { parseIP } from "../wire/ip.ts";
import "./asm.ts";
import {
  checksumsOk,
  concat,
  ipPacket,
  type PacketSpec,
  slowSum,
  TSO4,
  TSO6,
  tcp,
  USO,
  udp,
  vnetHeader,
} from "./packets.fixture.ts";

const asm = Asm.create(128);
const x = asm.exports;
const IN = asm.alloc(65536 + 64) + 16;
const OUT = asm.alloc(1 << 20);
const FIN = 1;
const SYN = 2;
const PSH = 8;
const ACK = 16;
const ECE = 0x40;
const CWR = 0x80;

const a4 = parseIP("10.0.0.1")!;
const b4 = parseIP("10.0.0.2")!;
const a6 = parseIP("fd00::1")!;
const b6 = parseIP("fd00::2")!;

function bytes(length: number, seed = 1): Uint8Array {
  let state = seed;
  return Uint8Array.from({ length }, () => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return state >> 16;
  });
}

/** Splits like the transmitter does; null when it is refused. */
function split(packet: Uint8Array, vnet: Uint8Array | null, pad = 0): Uint8Array[] | null {
  asm.u8.set(packet, IN);
  if (vnet) asm.u8.set(vnet, IN - 10);
  if (!x.parsePacket(IN, packet.length)) return null;
  const n = x.splitPrepare(IN, vnet ? IN - 10 : 0);
  if (n === 0) return null;
  const s = x.splitPtr() >> 2;
  const segment = asm.u32[s + 5]!;
  const last = asm.u32[s + 6]!;
  const stride = segment + pad + 32;
  asm.u8.fill(0xee, OUT, OUT + n * stride);
  x.splitWrite(OUT, 0, n, stride, segment + pad, last + pad);
  return Array.from({ length: n }, (_, i) => {
    const length = i === n - 1 ? last : segment;
    const at = OUT + i * stride;
    expect([...asm.u8.subarray(at + length, at + length + pad)]).toEqual(Array(pad).fill(0));
    return asm.u8.slice(at, at + length);
  });
}

/** Feeds packets to the coalescer; what it would write, each as vnet header and packet. */
function coalesce(
  packets: Uint8Array[],
  setup = { vnet: 1, tcp: 1, udp: 1 },
): { vnet: Uint8Array; packet: Uint8Array; parts: number }[] {
  x.groSetup(setup.vnet, setup.tcp, setup.udp, 0, 0);
  let at = OUT;
  for (const packet of packets) {
    at += 16;
    asm.u8.set(packet, at);
    x.groAdd(at, packet.length);
    at += packet.length;
  }
  const n = x.groFlush();
  const out = [];
  for (let i = 0; i < n; i++) {
    const iov = asm.u32[(x.groPtr() >> 2) + 2 * i]!;
    const parts = asm.u32[(x.groPtr() >> 2) + 2 * i + 1]!;
    const whole = concat(
      ...Array.from({ length: parts }, (_, k) => {
        const base = asm.view.getUint32(iov + 16 * k, true);
        return asm.u8.slice(base, base + asm.view.getUint32(iov + 16 * k + 8, true));
      }),
    );
    const head = setup.vnet ? 10 : 0;
    out.push({ vnet: whole.subarray(0, head), packet: whole.subarray(head), parts });
  }
  return out;
}

function tcpPacket(
  payload: Uint8Array,
  seq: number,
  more: Partial<Parameters<typeof tcp>[0]> & Partial<PacketSpec> = {},
) {
  const { src = a4, dst = b4, tos, ttl, id, fragment, ...rest } = more;
  const spec: PacketSpec = { src, dst, proto: 6, transport: tcp({ sport: 1000, dport: 2000, seq, payload, ...rest }) };
  if (tos !== undefined) spec.tos = tos;
  if (ttl !== undefined) spec.ttl = ttl;
  if (id !== undefined) spec.id = id;
  if (fragment !== undefined) spec.fragment = fragment;
  return ipPacket(spec);
}

describe("checksum", () => {
  test("agrees with RFC 1071 byte by byte, at every alignment and length", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 3000 }), fc.nat(63), (data, shift) => {
        asm.u8.set(data, OUT + shift);
        const sum = x.checksum(OUT + shift, data.length);
        const swapped = ((sum & 0xff) << 8) | (sum >> 8);
        expect(swapped % 0xffff).toBe(slowSum(data) % 0xffff);
      }),
      { numRuns: 300 },
    );
  });

  test("does not overflow on 65535 bytes of 0xff", () => {
    asm.u8.fill(0xff, OUT, OUT + 65535);
    expect(x.checksum(OUT, 65535) % 0xffff).toBe(0xffff00ff % 0xffff);
  });
});

describe("split", () => {
  const payload = bytes(2500);

  test("an IPv4 TCP superpacket becomes three packets; FIN and PSH only on the last, CWR on the first", () => {
    const packet = tcpPacket(payload, 0xfffffff0, {
      id: 0xffff,
      flags: ACK | PSH | FIN | CWR | ECE,
      options: bytes(12),
    });
    const segments = split(
      packet,
      vnetHeader({ flags: 1, type: TSO4 | 0x80, headerLength: 9999, size: 1000, start: 20, offset: 16 }),
      8,
    )!;
    expect(segments.map((s) => s.length)).toEqual([1052, 1052, 552]);
    expect(segments.every(checksumsOk)).toBe(true);
    const views = segments.map((s) => new DataView(s.buffer));
    expect(views.map((v) => v.getUint16(4))).toEqual([0xffff, 0, 1]);
    expect(views.map((v) => v.getUint32(24))).toEqual([0xfffffff0, 984, 1984]);
    expect(segments.map((s) => s[33])).toEqual([ACK | CWR | ECE, ACK | ECE, ACK | ECE | PSH | FIN]);
    expect(concat(...segments.map((s) => s.subarray(52)))).toEqual(payload);
  });

  test("IPv6 TCP and UDP superpackets", () => {
    const six = tcpPacket(payload, 5, { src: a6, dst: b6 });
    const segments = split(six, vnetHeader({ flags: 1, type: TSO6, size: 1200, start: 40, offset: 16 }))!;
    expect(segments.map((s) => s.length)).toEqual([1260, 1260, 160]);
    expect(segments.every(checksumsOk)).toBe(true);

    const datagrams = ipPacket({ src: a4, dst: b4, proto: 17, transport: udp(7, 8, payload) });
    const split4 = split(datagrams, vnetHeader({ flags: 1, type: USO, size: 999, start: 20, offset: 6 }))!;
    expect(split4.map((s) => new DataView(s.buffer).getUint16(24))).toEqual([1007, 1007, 510]);
    expect(split4.every(checksumsOk)).toBe(true);
    expect(concat(...split4.map((s) => s.subarray(28)))).toEqual(payload);
  });

  test("a packet that only needs its checksum gets it from the partial sum that the kernel left", () => {
    const right = tcpPacket(bytes(101), 9);
    const partial = right.slice();
    const pseudo = slowSum(concat(a4, b4, Uint8Array.of(0, 6, 0, 121)));
    partial[36] = pseudo >> 8;
    partial[37] = pseudo & 0xff;
    expect(split(partial, vnetHeader({ flags: 1, start: 20, offset: 16 }))).toEqual([right]);
  });

  test("wrong vnet headers are refused", () => {
    const packet = tcpPacket(payload, 1);
    const good = { flags: 1, type: TSO4, size: 1000, start: 20, offset: 16 };
    expect(split(packet, vnetHeader(good))).not.toBeNull();
    for (const wrong of [
      { type: TSO6 },
      { type: USO },
      { type: 3 },
      { size: 0 },
      { start: 24 },
      { start: 60000 },
      { offset: 6 },
    ])
      expect(split(packet, vnetHeader({ ...good, ...wrong }))).toBeNull();
    expect(split(packet, vnetHeader({ flags: 1, start: 2523, offset: 16 }))).toBeNull();
    expect(split(packet, vnetHeader({ flags: 1, start: 4, offset: 16 }))).toBeNull();
  });

  test("any bytes with any vnet header: refused, or segments that stay within bounds", () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 1, maxLength: 600 }),
        fc.uint8Array({ minLength: 10, maxLength: 10 }),
        fc.constantFrom(0x45, 0x60, 0x4f),
        (data, vnet, first) => {
          data[0] = first;
          if (first !== 0x60 && data.length > 4) new DataView(data.buffer).setUint16(2, data.length);
          else if (data.length > 40) new DataView(data.buffer).setUint16(4, data.length - 40);
          const segments = split(data, vnet);
          if (segments) for (const s of segments) expect(s.length).toBeLessThanOrEqual(data.length);
        },
      ),
      { numRuns: 2000 },
    );
  });
});

describe("coalesce", () => {
  const parts = [bytes(1000, 1), bytes(1000, 2), bytes(400, 3)];
  const flow = (more: Parameters<typeof tcpPacket>[2] = {}) => [
    tcpPacket(parts[0]!, 1, more),
    tcpPacket(parts[1]!, 1001, more),
    tcpPacket(parts[2]!, 2001, { ...more, flags: ACK | PSH }),
  ];

  test("three packets of a flow leave as one, ready for the kernel to cut again", () => {
    for (const [src, dst, type, at] of [
      [a4, b4, TSO4, 20],
      [a6, b6, TSO6, 40],
    ] as const) {
      const out = coalesce(flow({ src, dst }));
      expect(out.length).toBe(1);
      const { vnet, packet, parts: count } = out[0]!;
      expect(count).toBe(3);
      expect(vnet).toEqual(vnetHeader({ flags: 1, type, headerLength: at + 20, size: 1000, start: at, offset: 16 }));
      expect(packet.length).toBe(at + 20 + 2400);
      expect(packet[at + 13]).toBe(ACK | PSH);
      const again = split(packet, vnet)!;
      expect(again.length).toBe(3);
      expect(again.every(checksumsOk)).toBe(true);
      expect(concat(...again.map((s) => s.subarray(at + 20)))).toEqual(concat(...parts));
    }
  });

  test("UDP datagrams of one size, and a shorter one that ends the row", () => {
    const datagram = (payload: Uint8Array) => ipPacket({ src: a4, dst: b4, proto: 17, transport: udp(5, 6, payload) });
    const out = coalesce([...parts.map(datagram), datagram(parts[2]!)]);
    expect(out.map((w) => w.parts)).toEqual([3, 1]);
    expect(out[0]!.vnet).toEqual(
      vnetHeader({ flags: 1, type: USO, headerLength: 28, size: 1000, start: 20, offset: 6 }),
    );
    expect(split(out[0]!.packet, out[0]!.vnet)!.map((s) => s.length)).toEqual([1028, 1028, 428]);
  });

  const apart: [string, Uint8Array[]][] = [
    ["a gap", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1002)]],
    ["the wrong order", [tcpPacket(parts[0]!, 1001), tcpPacket(parts[1]!, 1)]],
    ["another acknowledgement", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { ack: 1 })]],
    ["another window", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { window: 9 })]],
    [
      "other options",
      [tcpPacket(parts[0]!, 1, { options: bytes(12, 1) }), tcpPacket(parts[1]!, 1001, { options: bytes(12, 2) })],
    ],
    ["another ToS", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { tos: 3 })]],
    ["another TTL", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { ttl: 63 })]],
    ["DF cleared", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { fragment: 0 })]],
    ["a fragment", [tcpPacket(parts[0]!, 1, { fragment: 0x2000 }), tcpPacket(parts[1]!, 1001, { fragment: 0x2000 })]],
    ["another port", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { dport: 3 })]],
    ["a larger payload", [tcpPacket(parts[2]!, 1), tcpPacket(parts[1]!, 401)]],
    ["FIN", [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { flags: ACK | FIN })]],
    ["SYN", [tcpPacket(parts[0]!, 1, { flags: SYN | ACK }), tcpPacket(parts[1]!, 1001)]],
    ["PSH on the first", [tcpPacket(parts[0]!, 1, { flags: ACK | PSH }), tcpPacket(parts[1]!, 1001)]],
    ["no payload", [tcpPacket(parts[0]!, 1), tcpPacket(new Uint8Array(0), 1001)]],
  ];
  for (const [what, packets] of apart) {
    test(`${what} keeps packets apart and unchanged`, () => {
      const out = coalesce(packets);
      expect(out.map((w) => w.packet)).toEqual(packets);
      expect(out.every((w) => w.vnet.every((b) => b === 0))).toBe(true);
    });
  }

  test("a packet with a wrong checksum stays alone, whichever it is", () => {
    for (const wrong of [0, 1]) {
      const packets = flow().slice(0, 2);
      packets[wrong]![60]! ^= 1;
      expect(coalesce(packets).map((w) => w.packet)).toEqual(packets);
    }
  });

  test("a short packet, or a FIN in between, ends the item: what follows is not merged across it", () => {
    const short = [tcpPacket(parts[0]!, 1), tcpPacket(parts[2]!, 1001), tcpPacket(parts[1]!, 1401)];
    expect(coalesce(short).map((w) => w.parts)).toEqual([2, 1]);
    const fin = [tcpPacket(parts[0]!, 1), tcpPacket(parts[1]!, 1001, { flags: ACK | FIN }), tcpPacket(parts[1]!, 1001)];
    expect(coalesce(fin).map((w) => w.packet)).toEqual(fin);
  });

  test("two flows that alternate are merged each for itself", () => {
    const other = flow({ sport: 1001 });
    const mixed = flow().flatMap((p, i) => [p, other[i]!]);
    expect(coalesce(mixed).map((w) => w.parts)).toEqual([3, 3]);
  });

  test("turned off, or without vnet header, nothing is merged", () => {
    expect(coalesce(flow(), { vnet: 1, tcp: 0, udp: 1 }).map((w) => w.parts)).toEqual([1, 1, 1]);
    expect(coalesce(flow(), { vnet: 0, tcp: 1, udp: 1 }).map((w) => w.packet)).toEqual(flow());
  });

  test("never more than 128 segments or 65535 bytes", () => {
    const small = Array.from({ length: 300 }, (_, i) => tcpPacket(bytes(10, i), 1 + i * 10));
    expect(coalesce(small).map((w) => w.parts)).toEqual([128, 128, 44]);
    const large = Array.from({ length: 60 }, (_, i) => tcpPacket(bytes(1400, i), 1 + i * 1400));
    for (const { packet } of coalesce(large)) expect(packet.length).toBeLessThanOrEqual(65535);
  });

  test("splitting what was merged gives every flow's bytes back in order", () => {
    const step = fc.record({
      flow: fc.nat(3),
      size: fc.constantFrom(1, 100, 100, 100, 500),
      push: fc.boolean(),
      gap: fc.nat(9),
      corrupt: fc.nat(19),
    });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const next = [1, 2, 3, 4];
        const packets = steps.map(({ flow: f, size, push, gap, corrupt }, i) => {
          if (gap === 0) next[f]! += 7;
          const packet = tcpPacket(bytes(size, i), next[f]!, { sport: f, flags: push ? ACK | PSH : ACK });
          next[f]! += size;
          if (corrupt === 0) packet[packet.length - 1]! ^= 0xff;
          return packet;
        });
        const out = coalesce(packets).flatMap(({ vnet, packet, parts: n }) =>
          n === 1 ? [packet] : split(packet, vnet)!,
        );
        const ofFlow = (list: Uint8Array[], f: number) =>
          list
            .filter((p) => p[21] === f)
            .map((p) => [new DataView(p.buffer, p.byteOffset).getUint32(24), ...p.subarray(40)]);
        for (let f = 0; f < 4; f++) expect(ofFlow(out, f)).toEqual(ofFlow(packets, f));
      }),
      { numRuns: 200 },
    );
  });
});

describe("parse", () => {
  test("any bytes: never beyond the packet, and truncation is refused", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (data) => {
        asm.u8.set(data, IN);
        asm.u8.fill(0xff, IN + data.length, IN + data.length + 300);
        if (!x.parsePacket(IN, data.length)) return;
        const p = x.parsedPtr() >> 2;
        expect(asm.u32[p + 3]!).toBeLessThanOrEqual(data.length);
        expect(asm.u32[p + 2]!).toBeLessThanOrEqual(asm.u32[p + 3]!);
      }),
      { numRuns: 3000 },
    );
    const packet = tcpPacket(bytes(10), 1);
    for (let n = 0; n < packet.length; n++) {
      asm.u8.set(packet, IN);
      expect(x.parsePacket(IN, n)).toBe(0);
    }
  });

  test("IPv6 extension headers are walked, up to eight, and a used-up routing header only", () => {
    const parse = (next: number, body: Uint8Array) => {
      const packet = ipPacket({ src: a6, dst: b6, proto: 250, transport: body });
      packet[6] = next;
      asm.u8.set(packet, IN);
      const ok = x.parsePacket(IN, packet.length);
      return ok ? asm.u32[(x.parsedPtr() >> 2) + 1] : null;
    };
    const segment = tcp({ sport: 1, dport: 2 });
    const options = (next: number) => Uint8Array.of(next, 0, 1, 4, 0, 0, 0, 0);
    expect(parse(0, concat(options(60), options(6), segment))).toBe(6);
    expect(parse(43, concat(Uint8Array.of(6, 0, 0, 0, 0, 0, 0, 0), segment))).toBe(6);
    expect(parse(43, concat(Uint8Array.of(6, 0, 0, 1, 0, 0, 0, 0), segment))).toBeNull();
    expect(parse(44, concat(Uint8Array.of(6, 0, 0, 1, 0, 0, 0, 0), segment))).toBe(6);
    expect(parse(44, concat(Uint8Array.of(6, 0, 0x05, 0, 0, 0, 0, 0), segment))).toBe(256);
    expect(parse(44, concat(Uint8Array.of(6, 0, 0, 8, 0, 0, 0, 0), segment))).toBeNull();
    expect(parse(0, concat(...Array.from({ length: 7 }, () => options(0)), options(6), segment))).toBe(6);
    expect(parse(0, concat(...Array.from({ length: 8 }, () => options(0)), options(6), segment))).toBeNull();
    expect(parse(6, segment.subarray(0, 19))).toBeNull();
  });

  test("IPv4 fragments: a later one is known as such, one that could overwrite the first header is refused", () => {
    const parse = (fragment: number, transport: Uint8Array) => {
      const packet = ipPacket({ src: a4, dst: b4, proto: 6, transport, fragment });
      asm.u8.set(packet, IN);
      return x.parsePacket(IN, packet.length) ? asm.u32[(x.parsedPtr() >> 2) + 1] : null;
    };
    expect(parse(0x2000, tcp({ sport: 1, dport: 2 }))).toBe(6);
    expect(parse(0x2000, bytes(16))).toBeNull();
    expect(parse(100, bytes(16))).toBe(256);
    expect(parse(1, bytes(16))).toBeNull();
  });
});
