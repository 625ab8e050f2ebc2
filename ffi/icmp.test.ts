import { describe, expect, setDefaultTimeout, test } from "bun:test";
import fc from "fast-check";
import { echoRequest, internetChecksum, Pinger, parseEchoReply, stripIpHeader } from "./icmp.ts";
import { noNetns, TestNetns } from "./testing.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

describe("ICMP echo", () => {
  test("the checksum is that of RFC 1071's example, and a packet with its checksum sums to zero", () => {
    expect(internetChecksum(Uint8Array.from([0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]))).toBe(0x220d);
    fc.assert(
      fc.property(fc.nat(65535), fc.nat(65535), fc.uint8Array({ maxLength: 64 }), (id, sequence, data) => {
        return internetChecksum(echoRequest(4, id, sequence, data)) === 0;
      }),
    );
  });

  test("only an echo reply is taken for one", () => {
    const reply = (type: number) => Uint8Array.from([type, 0, 0, 0, 0x12, 0x34, 0x56, 0x78]);
    expect(parseEchoReply(4, reply(0))).toEqual({ identifier: 0x1234, sequence: 0x5678 });
    expect(parseEchoReply(6, reply(129))).toEqual({ identifier: 0x1234, sequence: 0x5678 });
    expect(parseEchoReply(4, reply(8))).toBeNull();
    expect(parseEchoReply(6, reply(0))).toBeNull();
    expect(parseEchoReply(4, reply(0).subarray(1))).toBeNull();
  });

  test("bytes of any kind have a header to strip or not", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 80 }), (bytes) => {
        const rest = stripIpHeader(bytes);
        return rest === null || (bytes.length - rest.length >= 20 && bytes.length - rest.length <= 60);
      }),
    );
    expect(stripIpHeader(Uint8Array.from({ length: 28 }, (_, i) => (i === 0 ? 0x45 : i)))?.[0]).toBe(20);
    expect(stripIpHeader(new Uint8Array(0))).toBeNull();
  });

  for (const target of ["127.0.0.1", "::1"]) {
    for (const raw of [false, true]) {
      test.skipIf(noNetns)(`measures ${target} by a ${raw ? "raw" : "ping"} socket`, () => {
        using netns = new TestNetns();
        using pinger = netns.run(() => new Pinger(target, 0x4711, { raw }));
        using other = netns.run(() => new Pinger(target, 0x4712, { raw }));
        expect(pinger.receive(0)).toBeNull();
        for (const sequence of [0, 1, 65535]) {
          expect(other.send(7, new Uint8Array(8))).toBe(0);
          expect(pinger.send(sequence, new Uint8Array(1200))).toBe(0);
          // Its own answer, not the other's nor its own question, which a raw socket sees as well.
          expect(pinger.receive(2000)).toBe(sequence);
        }
        expect(pinger.receive(20)).toBeNull();
      });
    }
  }

  test.skipIf(noNetns)("says that there is no route, and refuses what is no address", () => {
    using netns = new TestNetns();
    using pinger = netns.run(() => new Pinger("203.0.113.1", 1));
    expect(pinger.send(1, new Uint8Array(0))).toBe(-101);
    expect(() => new Pinger("example.com", 1)).toThrow('ping: "example.com" is not an IP address (EINVAL)');
  });
});
