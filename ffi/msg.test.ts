import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { formatAddrPort } from "../src/wire/ip.ts";
import { IPPROTO_IP, IPPROTO_IPV6, SOL_UDP, UDP_GRO } from "./constants.ts";
import { buffer } from "./libc.ts";
import {
  addrPortAt,
  CONTROL_ROOM,
  emptyControl,
  MSGHDR_CONTROLLEN,
  MSGHDR_NAMELEN,
  parseControl,
  readSockaddr,
  sockaddrOf,
  writeIovec,
  writeMsghdr,
  writePktinfo4Cmsg,
  writePktinfo6Cmsg,
  writeSegmentCmsg,
  writeSockaddr,
  writeTosCmsg,
  writeU64,
} from "./msg.ts";

const view = () => new DataView(new ArrayBuffer(512));
const hex = (v: DataView, at: number, n: number) => Buffer.from(v.buffer, at, n).toString("hex");

describe("message structures", () => {
  test("a pointer above 4 GiB is written whole, without a BigInt", () => {
    const v = view();
    fc.assert(
      fc.property(fc.maxSafeInteger().map(Math.abs), (value) => {
        writeU64(v, 8, value);
        return v.getBigUint64(8, true) === BigInt(value);
      }),
    );
  });

  test("iovec and msghdr are as the kernel reads them", () => {
    const v = view();
    writeIovec(v, 16, 0x7f12_3456_789a, 1280);
    expect(hex(v, 16, 16)).toBe("9a785634127f00000005000000000000");
    for (let i = 0; i < 64; i++) v.setUint8(64 + i, 0xff);
    writeMsghdr(v, 64, 0x1111, 28, 0x2222, 3, 0x3333, 40);
    expect(hex(v, 64, 64)).toBe(
      "1111000000000000" + // name
        "1c00000000000000" + // namelen and padding
        "2222000000000000" + // iov
        "0300000000000000" + // iovlen
        "3333000000000000" + // control
        "2800000000000000" + // controllen
        "0000000000000000" + // flags and padding
        "ffffffffffffffff", // msg_len of the mmsghdr is the kernel's
    );
    expect([v.getUint32(64 + MSGHDR_NAMELEN, true), v.getUint32(64 + MSGHDR_CONTROLLEN, true)]).toEqual([28, 40]);
  });

  test("UDP_SEGMENT control message: the measured bytes", () => {
    const v = view();
    expect(writeSegmentCmsg(v, 0, 1312)).toBe(24);
    expect(hex(v, 0, 24)).toBe(`1200000000000000${"11000000"}${"67000000"}${"2005"}000000000000`);
  });

  test("packet information that is written is what is read back", () => {
    const v = view();
    const control = emptyControl();
    const length4 = writePktinfo4Cmsg(v, 0, 3, 0x0100007f);
    parseControl(v, 0, length4, control);
    expect(control).toEqual({ segmentSize: 0, ifindex: 3, local4: 0x0100007f, local6At: 0, tos: 0 });

    for (let i = 0; i < 16; i++) v.setUint8(400 + i, i + 1);
    const length6 = writePktinfo6Cmsg(v, 64, 9, 400);
    v.setUint32(64 + length6, 20, true);
    v.setUint32(64 + length6 + 4, 0, true);
    v.setInt32(64 + length6 + 8, SOL_UDP, true);
    v.setInt32(64 + length6 + 12, UDP_GRO, true);
    v.setInt32(64 + length6 + 16, 1200, true);
    const tos = writeTosCmsg(v, 64 + length6 + 24, 6, 0xb9);
    parseControl(v, 64, length6 + 24 + tos, control);
    expect(control).toEqual({ segmentSize: 1200, ifindex: 9, local4: 0, local6At: 64 + 16, tos: 0xb9 });
    expect(length6 + 24 + tos).toBeLessThanOrEqual(CONTROL_ROOM);
    expect(hex(v, control.local6At, 16)).toBe("0102030405060708090a0b0c0d0e0f10");
  });

  test("control messages of any content end, within their bounds, and unknown ones are skipped", () => {
    const control = emptyControl();
    const message = fc.record({
      length: fc.oneof(fc.nat(60), fc.nat()),
      level: fc.constantFrom(SOL_UDP, IPPROTO_IP, IPPROTO_IPV6, 1),
      type: fc.constantFrom(UDP_GRO, 8, 50, 2),
    });
    fc.assert(
      fc.property(fc.array(message, { maxLength: 6 }), fc.nat(128), (messages, length) => {
        const v = new DataView(new ArrayBuffer(128));
        let at = 0;
        for (const { length: len, level, type } of messages) {
          if (at + 16 > 128) break;
          v.setUint32(at, len, true);
          v.setInt32(at + 8, level, true);
          v.setInt32(at + 12, type, true);
          at += 8 + ((len % 64) & ~7);
        }
        parseControl(v, 0, length, control);
        return control.local6At === 0 || control.local6At + 20 <= length;
      }),
    );
    const v = view();
    v.setUint32(0, 20, true);
    v.setInt32(8, 1, true);
    v.setInt32(12, 29, true);
    const length = 24 + writePktinfo4Cmsg(v, 24, 5, 77);
    parseControl(v, 0, length, control);
    expect(control).toMatchObject({ ifindex: 5, local4: 77 });
    // Cut within the data; the padding after it may be missing.
    parseControl(v, 0, length - 4, control);
    expect(control).toMatchObject({ ifindex: 5, local4: 77 });
    parseControl(v, 0, length - 5, control);
    expect(control).toMatchObject({ ifindex: 0, local4: 0 });
  });
});

describe("socket addresses", () => {
  test("are the kernel's bytes", () => {
    expect(Buffer.from(sockaddrOf("192.0.2.1:41641")).toString("hex")).toBe("0200a2a9c0000201" + "0000000000000000");
    expect(Buffer.from(sockaddrOf("[2001:db8::1]:1")).toString("hex")).toBe(
      "0a00000100000000" + "20010db8000000000000000000000001" + "00000000",
    );
  });

  test("text to bytes to text is the same", () => {
    const ip = fc.oneof(
      fc.uint8Array({ minLength: 4, maxLength: 4 }),
      // Not IPv4-mapped: those have the text of IPv4.
      fc.uint8Array({ minLength: 16, maxLength: 16 }).filter((bytes) => bytes[0] !== 0),
    );
    fc.assert(
      fc.property(ip, fc.nat(65535), (bytes, port) => {
        const text = formatAddrPort(bytes, port);
        const sockaddr = sockaddrOf(text);
        return addrPortAt(new DataView(sockaddr.buffer), 0) === text;
      }),
    );
  });

  test("the scope of a link-local address is kept", () => {
    const bytes = buffer(32);
    const v = new DataView(bytes.buffer);
    const ip = Uint8Array.from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    expect(writeSockaddr(v, 0, ip, 5, 7)).toBe(28);
    expect(readSockaddr(v, 0)).toEqual({ ip, port: 5, scopeId: 7 });
  });

  test("another family is null, and a wrong text a sentence", () => {
    expect(readSockaddr(view(), 0)).toBeNull();
    expect(() => sockaddrOf("host:1")).toThrow('"host:1" is not an address and port');
  });
});
