import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { boxBeforeNM, boxSeal } from "../crypto/box.ts";
import { hex, unhex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  DISCO_MAX_ADDRESSES,
  type DiscoMessage,
  discoSender,
  encodeCallMeMaybe,
  encodePing,
  encodePong,
  isDisco,
  openDisco,
  parseDiscoMessage,
  sealDisco,
} from "./disco.ts";
import { formatAddrPort } from "./ip.ts";

const bytes = (n: number, from = 0) => Uint8Array.from({ length: n }, (_, i) => (from + i) & 0xff);
const concat = (...parts: (Uint8Array | number[])[]) => Uint8Array.from(parts.flatMap((part) => [...part]));
const u32 = (n: number) => [n >>> 24, (n >>> 16) & 0xff, (n >>> 8) & 0xff, n & 0xff];
const u64 = (n: bigint) => [...u32(Number(n >> 32n)), ...u32(Number(n & 0xffffffffn))];
const mapped = (a: number, b: number, c: number, d: number, port: number) =>
  concat(new Uint8Array(10), [0xff, 0xff, a, b, c, d, port >> 8, port & 0xff]);

// spec/datapath-wire.md 12.2
const senderPrivate = new Uint8Array(32).fill(5);
const recipientPrivate = new Uint8Array(32).fill(6);
const nodeKey = unhex("a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209")!;
const innerPing = `0100000102030405060708090a0b${hex(nodeKey)}`;
const packet =
  "5453f09f92ac50a61409b1ddd0325e9b16b700e719e9772c07000b1bd7786e907c653d20495d000102030405060708090a0b0c0d0e0f1011121314151617cf985ce2f97c0cd05475eae48f06b6d9f36bfa24284fdb3110d922917a6ab79669823ded91e0d7e625c45637873b2e19aac9d3ca409c7ab621341c012d85";

const sharedKey = () => boxBeforeNM(senderPrivate, x25519Public(recipientPrivate))!;

describe("the published vector", () => {
  test("a ping is sealed to the very bytes", () => {
    const message = encodePing({ txid: bytes(12), nodeKey, padding: 0 });
    expect(hex(message)).toBe(innerPing);
    expect(hex(sealDisco(sharedKey(), x25519Public(senderPrivate), bytes(24), message))).toBe(packet);
  });

  test("the recipient opens it with its own half of the key", () => {
    const shared = boxBeforeNM(recipientPrivate, x25519Public(senderPrivate))!;
    const envelope = unhex(packet)!;
    expect(isDisco(envelope)).toBe(true);
    expect(hex(discoSender(envelope))).toBe(hex(x25519Public(senderPrivate)));
    expect(openDisco(shared, envelope)).toEqual({ type: "ping", txid: bytes(12), nodeKey, padding: 0 });
  });

  test("any flipped bit in nonce or box is refused", () => {
    const shared = sharedKey();
    for (let at = 38; at < packet.length / 2; at++) {
      const broken = unhex(packet)!;
      broken[at]! ^= 1 << (at & 7);
      expect(openDisco(shared, broken)).toBeNull();
    }
  });

  test("another recipient cannot open it", () => {
    const other = boxBeforeNM(new Uint8Array(32).fill(7), x25519Public(senderPrivate))!;
    expect(openDisco(other, unhex(packet)!)).toBeNull();
  });
});

describe("messages", () => {
  test("ping with padding, with the node key cut short, and of a very old peer", () => {
    const padded = encodePing({ txid: bytes(12), nodeKey, padding: 100 });
    expect(padded.length).toBe(2 + 12 + 32 + 100);
    expect(parseDiscoMessage(padded)).toEqual({ type: "ping", txid: bytes(12), nodeKey, padding: 100 });
    expect(parseDiscoMessage(padded.subarray(0, 2 + 12 + 31))).toEqual({ type: "ping", txid: bytes(12), padding: 31 });
    expect(parseDiscoMessage(encodePing({ txid: bytes(12), padding: 0 }))).toEqual({
      type: "ping",
      txid: bytes(12),
      padding: 0,
    });
    expect(parseDiscoMessage(padded.subarray(0, 13))).toBeNull();
  });

  test("pong carries IPv4 as mapped and gives it back un-mapped", () => {
    const v4 = encodePong({ txid: bytes(12), source: "192.0.2.1:41641" });
    expect(v4).toEqual(concat([2, 0], bytes(12), mapped(192, 0, 2, 1, 41641)));
    expect(parseDiscoMessage(v4)).toEqual({ type: "pong", txid: bytes(12), source: "192.0.2.1:41641" });
    const v6 = encodePong({ txid: bytes(12), source: "[2001:db8::1]:1" });
    expect(parseDiscoMessage(concat(v6, [1, 2, 3]))).toEqual({
      type: "pong",
      txid: bytes(12),
      source: "[2001:db8::1]:1",
    });
    expect(parseDiscoMessage(v6.subarray(0, v6.length - 1))).toBeNull();
    expect(() => encodePong({ txid: bytes(12), source: "nowhere" })).toThrow("no address and port");
  });

  test("CallMeMaybe lists addresses; of another version or an odd length it is an empty list", () => {
    const addresses = ["192.0.2.1:41641", "[2001:db8::2]:7"];
    const message = encodeCallMeMaybe(addresses);
    expect(message.length).toBe(2 + 36);
    expect(parseDiscoMessage(message)).toEqual({ type: "callMeMaybe", addresses });
    expect(parseDiscoMessage(concat(message, [0]))).toEqual({ type: "callMeMaybe", addresses: [] });
    expect(parseDiscoMessage(message.subarray(0, 2))).toEqual({ type: "callMeMaybe", addresses: [] });
    message[1] = 1;
    expect(parseDiscoMessage(message)).toEqual({ type: "callMeMaybe", addresses: [] });
  });

  test("CallMeMaybe with thousands of addresses is read up to the bound", () => {
    const many = concat([3, 0], new Uint8Array(18 * 3000));
    const parsed = parseDiscoMessage(many);
    expect(parsed?.type === "callMeMaybe" && parsed.addresses.length).toBe(DISCO_MAX_ADDRESSES);
    expect(encodeCallMeMaybe(Array.from({ length: 500 }, () => "192.0.2.1:1")).length).toBe(
      2 + 18 * DISCO_MAX_ADDRESSES,
    );
  });

  test("the three bind messages of a UDP relay", () => {
    const body = concat(u32(0x123456), u32(9), bytes(32, 1), bytes(32, 100), [7, 7]);
    for (const [type, name] of [
      [4, "bind"],
      [5, "bindChallenge"],
      [6, "bindAnswer"],
    ] as const) {
      expect(parseDiscoMessage(concat([type, 0], body))).toEqual({
        type: name,
        vni: 0x123456,
        generation: 9,
        remoteKey: bytes(32, 1),
        challenge: bytes(32, 100),
      });
      expect(parseDiscoMessage(concat([type, 0], body.subarray(0, 71)))).toBeNull();
    }
  });

  test("the allocation messages of a UDP relay", () => {
    const endpoint = concat(
      bytes(32, 1),
      bytes(32, 2),
      bytes(32, 3),
      u64(2n ** 40n),
      u32(77),
      u64(30_000_000_000n),
      u64(1n),
    );
    const addresses = mapped(192, 0, 2, 9, 4000);
    const parsed = {
      serverKey: bytes(32, 1),
      clientKeys: [bytes(32, 2), bytes(32, 3)] as [Uint8Array, Uint8Array],
      lamportId: 2n ** 40n,
      vni: 77,
      bindLifetime: 30_000_000_000n,
      steadyStateLifetime: 1n,
      addresses: ["192.0.2.9:4000"],
    };
    const cases: [Uint8Array, DiscoMessage | null][] = [
      [concat([7, 0], endpoint, addresses), { type: "callMeMaybeVia", endpoint: parsed }],
      [concat([7, 0], endpoint), null],
      [concat([7, 1], endpoint), { type: "callMeMaybeVia", endpoint: null }],
      [
        concat([8, 0], bytes(32, 2), bytes(32, 3), u32(5)),
        { type: "allocateRequest", clientKeys: parsed.clientKeys, generation: 5 },
      ],
      [concat([8, 0], bytes(64)), null],
      [concat([8, 3]), { type: "allocateRequest", clientKeys: null, generation: 0 }],
      [concat([9, 0], u32(6), endpoint, addresses), { type: "allocateResponse", generation: 6, endpoint: parsed }],
      [concat([9, 0], u32(6)), null],
      [concat([9, 2]), { type: "allocateResponse", generation: 0, endpoint: null }],
    ];
    for (const [message, expected] of cases) expect(parseDiscoMessage(message)).toEqual(expected);
  });

  test("unknown types and messages without a header are nothing", () => {
    for (const message of [[], [1], [0, 0, 0], [10, 0, ...bytes(80)], [255, 255]]) {
      expect(parseDiscoMessage(Uint8Array.from(message))).toBeNull();
    }
  });
});

describe("any bytes", () => {
  const address = fc
    .tuple(
      fc.oneof(fc.uint8Array({ minLength: 4, maxLength: 4 }), fc.uint8Array({ minLength: 16, maxLength: 16 })),
      fc.nat(65535),
    )
    .map(([ip, port]) => formatAddrPort(ip, port));
  const txid = fc.uint8Array({ minLength: 12, maxLength: 12 });

  test("what is encoded and sealed comes back", () => {
    fc.assert(
      fc.property(
        txid,
        address,
        fc.array(address, { maxLength: 20 }),
        fc.nat(1400),
        (id, source, addresses, padding) => {
          const shared = sharedKey();
          const through = (message: Uint8Array) =>
            openDisco(shared, sealDisco(shared, x25519Public(senderPrivate), bytes(24), message));
          expect(through(encodePing({ txid: id, nodeKey, padding }))).toEqual({
            type: "ping",
            txid: id,
            nodeKey,
            padding,
          });
          expect(through(encodePong({ txid: id, source }))).toEqual({ type: "pong", txid: id, source });
          expect(through(encodeCallMeMaybe(addresses))).toEqual({ type: "callMeMaybe", addresses });
        },
      ),
      { numRuns: 100, seed: 20 },
    );
  });

  test("no message inside a valid box makes the parser throw", () => {
    const header = fc.tuple(fc.nat(12), fc.nat(1), fc.uint8Array({ maxLength: 300 }));
    fc.assert(
      fc.property(header, ([type, version, body]) => {
        const message = concat([type, version], body);
        const shared = sharedKey();
        const opened = openDisco(
          shared,
          concat(unhex(packet)!.subarray(0, 38), bytes(24), boxSeal(shared, bytes(24), message)),
        );
        expect(opened).toEqual(parseDiscoMessage(message));
      }),
      { numRuns: 500, seed: 20 },
    );
  });

  test("no envelope makes the parser throw, and none opens by chance", () => {
    const shared = sharedKey();
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.boolean(), (data, magic) => {
        if (magic) data.set(unhex("5453f09f92ac")!.subarray(0, data.length));
        expect(openDisco(shared, data)).toBeNull();
      }),
      { numRuns: 1000, seed: 20 },
    );
  });
});
