import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { parseEvent } from "./netlink.ts";
import {
  MessageBuilder,
  NLMSG_ERROR,
  parseAddress,
  parseAttributes,
  parseErrorText,
  parseLink,
  parseMessages,
  parseRoute,
  parseRule,
} from "./rtnetlink.ts";

describe("netlink messages", () => {
  test("are laid out as the kernel reads them", () => {
    const bytes = new MessageBuilder(16, 5)
      .ifinfo(3, 1, 1)
      .text(3, "wg0")
      .u32(4, 1420)
      .nested(18, () => {})
      .finish(9);
    expect(Buffer.from(bytes).toString("hex")).toBe(
      "34000000" + // length
        "1000" + // type
        "0500" + // flags
        "09000000" + // sequence
        "00000000" + // port id
        "00000000" + // family and type
        "03000000" + // index
        "01000000" + // flags
        "01000000" + // change mask
        "08000300" + // name
        "77673000" +
        "08000400" + // MTU
        "8c050000" +
        "04001280", // nested
    );
  });

  test("of any size grow their buffer, and nested attributes have the length of what they hold", () => {
    const data = new Uint8Array(301).fill(7);
    const message = new MessageBuilder(16, 0).ifinfo(0, 0, 0);
    message.nested(18, () => {
      for (let i = 1; i <= 20; i++) message.bytes(i, data);
    });
    const { messages, whole } = parseMessages(message.finish(1));
    expect(whole).toBe(true);
    const nested = parseAttributes(parseAttributes(messages[0]!.body, 16).get(18)!, 0);
    expect(nested.size).toBe(20);
    expect(nested.get(20)).toEqual(data);
  });

  test("one cut short is left out and reported", () => {
    const whole = new MessageBuilder(32, 0).rt([2, 0, 0, 0, 0, 0, 0, 8], 0).u32(6, 77).finish(1);
    const two = new Uint8Array([...whole, ...whole]);
    expect(parseMessages(two)).toMatchObject({ whole: true, messages: [{ type: 32 }, { type: 32 }] });
    for (let cut = 1; cut < whole.length; cut++) {
      const { messages, whole: all } = parseMessages(two.subarray(0, two.length - cut));
      expect(all).toBe(false);
      expect(messages.map(parseEvent)).toMatchObject([{ kind: "rule", value: { priority: 77, action: "prohibit" } }]);
    }
  });

  test("the kernel's words on an error are found", () => {
    const text = "Nexthop has invalid gateway";
    // nlmsgerr, 20 bytes, then the attribute.
    const body = new Uint8Array(20 + 4 + text.length + 1);
    new DataView(body.buffer).setUint16(20, body.length - 20, true);
    new DataView(body.buffer).setUint16(22, 1, true);
    body.set(new TextEncoder().encode(text), 24);
    expect(parseErrorText({ type: NLMSG_ERROR, flags: 0x200, sequence: 1, body })).toBe(text);
    expect(parseErrorText({ type: NLMSG_ERROR, flags: 0, sequence: 1, body })).toBeUndefined();
  });

  test("bytes of any kind are parsed without a throw, to values within the bytes", () => {
    const attribute = fc
      .tuple(fc.nat(30), fc.uint8Array({ maxLength: 24 }), fc.option(fc.nat(70000)))
      .map(([type, data, lie]) => {
        const out = new Uint8Array((4 + data.length + 3) & ~3);
        const view = new DataView(out.buffer);
        view.setUint16(0, (lie ?? 4 + data.length) & 0xffff, true);
        view.setUint16(2, type, true);
        out.set(data, 4);
        return out;
      });
    const body = fc
      .tuple(fc.constantFrom(0, 2, 10, 7), fc.uint8Array({ minLength: 0, maxLength: 15 }), fc.array(attribute))
      .map(([family, head, attributes]) =>
        Uint8Array.from([family, ...head, ...attributes.flatMap((each) => [...each])]),
      );
    fc.assert(
      fc.property(fc.oneof(body, fc.uint8Array({ maxLength: 200 })), fc.nat(40), (bytes, type) => {
        for (const parse of [parseLink, parseAddress, parseRoute, parseRule]) parse(bytes);
        parseErrorText({ type: 2, flags: 0x200, sequence: 0, body: bytes });
        parseEvent({ type, flags: 0, sequence: 0, body: bytes });
        const { messages } = parseMessages(bytes);
        return messages.reduce((sum, message) => sum + 16 + message.body.length, 0) <= bytes.length;
      }),
      { numRuns: 2000 },
    );
  });
});
