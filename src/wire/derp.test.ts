import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  CLIENT_LIMITS,
  ClientLogin,
  DerpError,
  decodeHealth,
  decodePeerGone,
  decodePeerPresent,
  decodeRestarting,
  encodeForwardPacket,
  encodeFrame,
  encodeHealth,
  encodeKeepAlive,
  encodeNotePreferred,
  encodePeerGone,
  encodePeerPresent,
  encodePing,
  encodePong,
  encodeRecvPacket,
  encodeRestarting,
  encodeSendPacket,
  encodeServerKey,
  encodeWatchConns,
  FrameDecoder,
  FrameType,
  isDisco,
  MAX_PACKET,
  PresentFlag,
  RELAY_LIMITS,
  ServerLogin,
} from "./derp.ts";
import { parseIP } from "./ip.ts";

const unhex = (text: string) => Uint8Array.from(Buffer.from(text.replaceAll(" ", ""), "hex"));
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const KEY = new Uint8Array(32).fill(0xaa);
const OTHER = new Uint8Array(32).fill(0xbb);

const CLIENT_PRIVATE = new Uint8Array(32).fill(1);
const CLIENT_PUBLIC = unhex("a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209");
const SERVER_PRIVATE = new Uint8Array(32).fill(7);
const SERVER_PUBLIC = unhex("13be4feaeaf204c7fd3358fc9c00721881d174278128227ec674f37f7fe97b6d");
const NONCE = Uint8Array.from({ length: 24 }, (_, i) => i);
const CLIENT_INFO = unhex(
  "0200000068a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209000102030405060708090a0b0c0d0e0f1011121314151617f6f43a092d02dcf21b8c91178bc634f2280a6ddbeb106fc7bf2b4614946171659d54bc7d992f3fcb7378ae22f749c2d0",
);
const SERVER_INFO = unhex(
  "0300000035000102030405060708090a0b0c0d0e0f1011121314151617a86f96d32d68b47c2484e8c240413d6a280a6ddbeb106fc7bf2b4614c5",
);
const body = (frame: Uint8Array) => frame.subarray(5);

interface Got {
  type: number;
  payload: string;
}

function collect(decoder: FrameDecoder, chunks: Uint8Array[]): Got[] {
  const got: Got[] = [];
  for (const chunk of chunks)
    decoder.feed(chunk, (type, buf, at, end) => {
      got.push({ type, payload: hex(buf.subarray(at + 5, end)) });
      return true;
    });
  return got;
}

describe("frames", () => {
  test("are the published vectors", () => {
    const k = hex(KEY);
    expect(hex(encodeKeepAlive())).toBe("0600000000");
    expect(hex(encodeNotePreferred(true))).toBe("070000000101");
    expect(hex(encodeNotePreferred(false))).toBe("070000000100");
    expect(hex(encodeWatchConns())).toBe("1000000000");
    expect(hex(encodePing(unhex("0102030405060708")))).toBe("12000000080102030405060708");
    expect(hex(encodePong(unhex("0102030405060708")))).toBe("13000000080102030405060708");
    expect(hex(encodeServerKey(KEY))).toBe(`010000002844455250f09f9491${k}`);
    expect(hex(encodePeerGone(KEY, 1))).toBe(`0800000021${k}01`);
    const wireguard = new Uint8Array(148).fill(1);
    expect(hex(encodeSendPacket(KEY, wireguard))).toBe(`04000000b4${k}${hex(wireguard)}`);
    expect(hex(encodeRecvPacket(KEY, wireguard))).toBe(`05000000b4${k}${hex(wireguard)}`);
    expect(hex(encodeForwardPacket(KEY, OTHER, Uint8Array.of(9)))).toBe(`0a00000041${k}${hex(OTHER)}09`);
  });

  test("PeerPresent carries IPv4 mapped and 51 bytes; receivers take 32, 50, 51 and more", () => {
    const frame = encodePeerPresent({ key: KEY, ip: parseIP("192.0.2.1")!, port: 0x1234, flags: PresentFlag.Mesh });
    expect(hex(frame)).toBe(`0900000033${hex(KEY)}00000000000000000000ffffc0000201123402`);
    const peer = { key: KEY, ip: parseIP("192.0.2.1")!, port: 0x1234 };
    expect(decodePeerPresent(body(frame))).toEqual({ ...peer, flags: PresentFlag.Mesh });
    expect(decodePeerPresent(body(frame).subarray(0, 50))).toEqual({ ...peer, flags: 0 });
    expect(decodePeerPresent(KEY)).toEqual({ key: KEY, ip: null, port: 0, flags: 0 });
    expect(decodePeerPresent(new Uint8Array([...body(frame), 7, 7])).flags).toBe(PresentFlag.Mesh);
    expect(decodePeerPresent(body(encodePeerPresent({ key: KEY, ip: null, port: 0, flags: 1 }))).ip).toBeNull();
    expect(() => decodePeerPresent(KEY.subarray(1))).toThrow(DerpError);
  });

  test("PeerGone without a reason means disconnected", () => {
    expect(decodePeerGone(KEY)).toEqual({ key: KEY, reason: 0 });
    expect(decodePeerGone(new Uint8Array([...KEY, 1, 99]))).toEqual({ key: KEY, reason: 1 });
    expect(() => decodePeerGone(KEY.subarray(1))).toThrow("31 bytes");
  });

  test("Health and Restarting survive the round trip, and damaged UTF-8 is no error", () => {
    expect(decodeHealth(body(encodeHealth("disk full")))).toBe("disk full");
    expect(decodeHealth(unhex("ff"))).toBe("\ufffd");
    expect(decodeRestarting(body(encodeRestarting({ reconnectIn: 5000, tryFor: 0xffff_ffff })))).toEqual({
      reconnectIn: 5000,
      tryFor: 0xffff_ffff,
    });
    expect(() => decodeRestarting(new Uint8Array(7))).toThrow(DerpError);
  });

  test("disco is what has 62 bytes and its magic", () => {
    const packet = new Uint8Array(62);
    packet.set(unhex("5453f09f92ac"));
    expect(isDisco(packet, 0, 62)).toBe(true);
    expect(isDisco(packet, 0, 61)).toBe(false);
    packet[5] = 0;
    expect(isDisco(packet, 0, 62)).toBe(false);
  });
});

describe("decoder", () => {
  test("gives whole frames of one chunk without copying them", () => {
    const chunk = new Uint8Array([...encodeSendPacket(KEY, Uint8Array.of(1)), ...encodeNotePreferred(true)]);
    const seen: number[] = [];
    new FrameDecoder(RELAY_LIMITS).feed(chunk, (_type, buf, at) => {
      expect(buf).toBe(chunk);
      return seen.push(at) > 0;
    });
    expect(seen).toEqual([0, 38]);
  });

  test("any cutting of the stream gives the same frames, and unknown frames vanish", () => {
    const frame = fc.oneof(
      fc.record({ type: fc.constant(0x04), payload: fc.uint8Array({ minLength: 32, maxLength: 600 }) }),
      fc.record({ type: fc.constant(0x12), payload: fc.uint8Array({ maxLength: 20 }) }),
      fc.record({ type: fc.constant(0x10), payload: fc.constant(new Uint8Array(0)) }),
      fc.record({ type: fc.constantFrom(0x00, 0x0b, 0x14, 0xff), payload: fc.uint8Array({ maxLength: 600 }) }),
    );
    fc.assert(
      fc.property(
        fc.array(frame, { maxLength: 8 }),
        fc.array(fc.integer({ min: 1, max: 90 }), { minLength: 1 }),
        fc.boolean(),
        (frames, cuts, eager) => {
          const stream = Buffer.concat(frames.map((f) => encodeFrame(f.type, f.payload)));
          const decoder = new FrameDecoder(RELAY_LIMITS);
          if (eager) decoder.expectLargeFrames();
          const chunks: Uint8Array[] = [];
          for (let at = 0, i = 0; at < stream.length; i++) {
            const next = at + cuts[i % cuts.length]!;
            chunks.push(stream.subarray(at, next));
            at = next;
          }
          const known = frames.filter((f) => [0x04, 0x10, 0x12].includes(f.type));
          expect(collect(decoder, chunks)).toEqual(known.map((f) => ({ type: f.type, payload: hex(f.payload) })));
        },
      ),
      { numRuns: 200 },
    );
  });

  test("takes a packet of 65536 bytes and refuses the header of a larger one", () => {
    const largest = encodeSendPacket(KEY, new Uint8Array(MAX_PACKET));
    expect(collect(new FrameDecoder(RELAY_LIMITS), [largest]).length).toBe(1);
    const header = unhex("0400010021");
    expect(() => collect(new FrameDecoder(RELAY_LIMITS), [header])).toThrow("0x04 has 65569 bytes");
    expect(() => collect(new FrameDecoder(RELAY_LIMITS), [header.subarray(0, 2), header.subarray(2)])).toThrow(
      DerpError,
    );
  });

  test("skips an unknown frame of 4 GiB without holding it; a client refuses more than 1 MiB", () => {
    const header = unhex("ffffffffff");
    const relay = new FrameDecoder(RELAY_LIMITS);
    expect(collect(relay, [header, new Uint8Array(1 << 20)])).toEqual([]);
    expect(relay.buffered).toBeLessThan(16);
    expect(() => collect(new FrameDecoder(CLIENT_LIMITS, 1 << 20), [unhex("ff00100001")])).toThrow("unknown type 0xff");
  });

  test("holds no more than twice what arrived of a frame that claims to be long", () => {
    const decoder = new FrameDecoder(RELAY_LIMITS);
    const frame = encodeSendPacket(KEY, new Uint8Array(60_000));
    collect(decoder, [frame.subarray(0, 1000)]);
    expect(decoder.buffered).toBeLessThanOrEqual(2000);
    for (let at = 1000; at < 50_000; at += 100) collect(decoder, [frame.subarray(at, at + 100)]);
    expect(decoder.buffered).toBeLessThanOrEqual(frame.length);
  });

  test("stops where the sink says and tells how far it read", () => {
    const chunk = new Uint8Array([...encodeNotePreferred(true), ...encodeWatchConns()]);
    const decoder = new FrameDecoder(RELAY_LIMITS);
    expect(decoder.feed(chunk, () => false)).toBe(6);
    expect(collect(decoder, [chunk.subarray(6)])).toEqual([{ type: FrameType.WatchConns, payload: "" }]);
  });

  test("random bytes end in a DerpError or in nothing", () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 10 }), fc.boolean(), (chunks, client) => {
        const decoder = client ? new FrameDecoder(CLIENT_LIMITS, 1 << 20) : new FrameDecoder(RELAY_LIMITS);
        try {
          collect(decoder, chunks);
        } catch (error) {
          expect(error).toBeInstanceOf(DerpError);
        }
        expect(decoder.buffered).toBeLessThan(8192);
      }),
      { numRuns: 500 },
    );
  });
});

describe("login", () => {
  const server = () => new ServerLogin(SERVER_PRIVATE, SERVER_PUBLIC);
  const client = () => new ClientLogin({ privateKey: CLIENT_PRIVATE, publicKey: CLIENT_PUBLIC });

  test("is the published vector on both sides", () => {
    const relay = server();
    const node = client();
    expect(hex(relay.greeting)).toBe(`010000002844455250f09f9491${hex(SERVER_PUBLIC)}`);
    node.receiveServerKey(body(relay.greeting));
    expect(hex(node.serverKey!)).toBe(hex(SERVER_PUBLIC));
    expect(hex(node.clientInfo(NONCE))).toBe(hex(CLIENT_INFO));
    expect(relay.receiveClientInfo(body(CLIENT_INFO))).toEqual({
      clientKey: CLIENT_PUBLIC,
      info: { version: 2, canAckPings: true, isProber: false },
    });
    expect(hex(relay.serverInfo(NONCE))).toBe(hex(SERVER_INFO));
    expect(node.receiveServerInfo(body(SERVER_INFO))).toEqual({
      version: 2,
      tokenBucketBytesPerSecond: 0,
      tokenBucketBytesBurst: 0,
    });
  });

  test("fast start: a client that knows the relay's key sends ClientInfo before it reads anything", () => {
    const node = new ClientLogin({ privateKey: CLIENT_PRIVATE, publicKey: CLIENT_PUBLIC, serverKey: SERVER_PUBLIC });
    expect(hex(node.clientInfo(NONCE))).toBe(hex(CLIENT_INFO));
    node.receiveServerKey(body(server().greeting));
    expect(() => node.receiveServerKey(body(encodeServerKey(KEY)))).toThrow("another key");
  });

  test("all fields arrive, and a rate without a burst gets one", () => {
    const relay = server();
    const node = client();
    node.receiveServerKey(body(relay.greeting));
    const info = { meshKey: "ab".repeat(32), isProber: true, canAckPings: false, appName: "probe" };
    expect(relay.receiveClientInfo(body(node.clientInfo(NONCE, info))).info).toEqual({ version: 2, ...info });
    const limited = node.receiveServerInfo(body(relay.serverInfo(NONCE, { tokenBucketBytesPerSecond: 1000 })));
    expect(limited.tokenBucketBytesPerSecond).toBe(1000);
    expect(limited.tokenBucketBytesBurst).toBeGreaterThanOrEqual(MAX_PACKET);
  });

  test("a future ServerKey may be longer; a short one or another magic is refused", () => {
    const greeting = server().greeting;
    client().receiveServerKey(new Uint8Array([...body(greeting), 1, 2]));
    expect(() => client().receiveServerKey(body(greeting).subarray(0, 39))).toThrow(DerpError);
    const other = body(greeting).slice();
    other[0] = 0;
    expect(() => client().receiveServerKey(other)).toThrow("magic");
  });

  test("no damaged, foreign or low-order ClientInfo logs in", () => {
    expect(() => server().receiveClientInfo(body(CLIENT_INFO).subarray(0, 55))).toThrow(DerpError);
    for (let at = 0; at < CLIENT_INFO.length - 5; at++) {
      const damaged = body(CLIENT_INFO).slice();
      damaged[at]! ^= 1;
      // The top bit of a Curve25519 key is the only one that does not count; it was not flipped here.
      expect(() => server().receiveClientInfo(damaged)).toThrow(DerpError);
    }
    const zeroKey = body(CLIENT_INFO).slice();
    zeroKey.fill(0, 0, 32);
    expect(() => server().receiveClientInfo(zeroKey)).toThrow("does not open");
    expect(() => client().receiveServerInfo(body(SERVER_INFO))).toThrow("does not open");
  });
});
