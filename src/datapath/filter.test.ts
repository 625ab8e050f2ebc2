import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Asm } from "../crypto/wasm.ts";
import { compareIP, formatIP, type IP, parseIP, parsePrefix, prefixContains } from "../wire/ip.ts";
import type { FilterRule } from "../wire/tailcfg.ts";
import type { FilterConfig } from "./api.ts";
import "./asm.ts";
import { compileFilter, layOutFilter, mergeRanges, parseRanges } from "./filter.ts";
import { ipPacket, tcp, udp } from "./packets.fixture.ts";

const asm = Asm.create(128);
const x = asm.exports;
const TABLE = asm.alloc(1 << 20);
const PACKET = asm.alloc(4096);

function use(config: FilterConfig): ReturnType<typeof compileFilter> {
  const compiled = compileFilter(config);
  asm.u8.set(layOutFilter(compiled, TABLE), TABLE);
  x.filterSet(TABLE);
  return compiled;
}

/** The verdict of asm: parse, then filter. */
function verdict(direction: "in" | "out", packet: Uint8Array): boolean {
  asm.u8.set(packet, PACKET);
  if (!x.parsePacket(PACKET, packet.length)) return false;
  return (direction === "in" ? x.filterIn() : x.filterOut()) === 1;
}

interface Flow {
  src: string;
  dst: string;
  proto: number;
  sport?: number;
  dport?: number;
  /** TCP flags or ICMP type. */
  flags?: number;
}

const SYN = 2;

function build(flow: Flow): Uint8Array {
  const src = parseIP(flow.src)!;
  const dst = parseIP(flow.dst)!;
  const { proto, sport = 1, dport = 2, flags = SYN } = flow;
  let transport: Uint8Array = new Uint8Array(12);
  if (proto === 6) transport = tcp({ sport, dport, flags });
  else if (proto === 17) transport = udp(sport, dport, new Uint8Array(4));
  else if (proto === 132) new DataView(transport.buffer).setUint32(0, (sport << 16) | dport);
  else if (proto === 1 || proto === 58) transport[0] = flow.flags ?? 0;
  return ipPacket({ src, dst, proto, transport });
}

const sends = (direction: "in" | "out", flow: Flow) => verdict(direction, build(flow));

/** The rules again, slowly, straight from spec/datapath-wire.md 11.2. */
class Reference {
  readonly #config: FilterConfig;
  #flows: string[] = [];

  constructor(config: FilterConfig) {
    this.#config = config;
  }

  check(direction: "in" | "out", flow: Flow): boolean {
    const dst = parseIP(flow.dst)!;
    if (this.#forbidden(dst)) return false;
    const { src, sport = 1, dport = 2, proto } = flow;
    if (direction === "out") {
      if (proto === 17 || proto === 132) this.#remember(`${proto} ${flow.src} ${sport} ${flow.dst} ${dport}`);
      return true;
    }
    if (!this.#config.local.some((text) => prefixContains(parsePrefix(text)!, dst))) return false;
    const v4 = dst.length === 4;
    if ((proto === 1 && v4) || (proto === 58 && !v4)) {
      const type = flow.flags ?? 0;
      if ((v4 ? [0, 3, 11, 12] : [129, 1, 2, 3, 4]).includes(type)) return true;
      return this.#rules(flow, (_rule, _ports) => true);
    }
    if (proto === 6) {
      const flags = flow.flags ?? SYN;
      if (!(flags & SYN) || flags & 0x10) return true;
      return this.#rules(flow, (rule, [first, last]) => names(rule, 6) && dport >= first && dport <= last);
    }
    if (proto === 17 || proto === 132) {
      const reverse = `${proto} ${flow.dst} ${dport} ${src} ${sport}`;
      if (this.#flows.includes(reverse)) {
        this.#remember(reverse);
        return true;
      }
      return this.#rules(flow, (rule, [first, last]) => names(rule, proto) && dport >= first && dport <= last);
    }
    if (proto === 99) return true;
    return this.#rules(flow, (rule, [first, last]) => names(rule, proto) && first === 0 && last === 65535);
  }

  #remember(key: string): void {
    this.#flows = [key, ...this.#flows.filter((k) => k !== key)].slice(0, 512);
  }

  #forbidden(dst: IP): boolean {
    if (dst.length === 4) {
      if (dst[0]! >= 224 && dst[0]! < 240) return true;
      return dst[0] === 169 && dst[1] === 254 && formatIP(dst) !== "169.254.169.254";
    }
    return dst[0] === 0xff || (dst[0] === 0xfe && dst[1]! >= 0x80 && dst[1]! < 0xc0);
  }

  #rules(flow: Flow, accepts: (rule: FilterRule, ports: [number, number]) => boolean): boolean {
    const src = parseIP(flow.src)!;
    const dst = parseIP(flow.dst)!;
    return this.#config.rules.some(
      (rule) =>
        (rule.SrcIPs ?? []).some((text) => covers(text, src)) &&
        (rule.DstPorts ?? []).some(({ IP, Ports }) => covers(IP, dst) && accepts(rule, [Ports.First, Ports.Last])),
    );
  }
}

function names(rule: FilterRule, proto: number): boolean {
  return (rule.IPProto?.length ? rule.IPProto : [6, 17, 1, 58]).includes(proto);
}

function covers(text: string, ip: IP): boolean {
  if (text === "*") return true;
  const [first, last] = text.split("-").map(parseIP);
  if (first && last) {
    return first.length === ip.length && compareIP(first, ip) <= 0 && compareIP(ip, last) <= 0;
  }
  const prefix = parsePrefix(text);
  return prefix !== null && prefixContains(prefix, ip);
}

const allowAll: FilterRule = { SrcIPs: ["*"], DstPorts: [{ IP: "*", Ports: { First: 0, Last: 65535 } }] };
const local = ["100.64.0.1/32", "fd7a::1/128", "10.1.0.0/16"];

describe("filter", () => {
  test("without rules only replies come in", () => {
    x.filterForgetFlows();
    use({ rules: [], local });
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 6 })).toBe(false);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 6, flags: 0x12 })).toBe(true);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 6, flags: 0x10 })).toBe(true);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 1, flags: 8 })).toBe(false);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 1, flags: 0 })).toBe(true);
    const question: Flow = { src: "100.64.0.1", dst: "100.64.0.2", proto: 17, sport: 4000, dport: 53 };
    const answer: Flow = { src: "100.64.0.2", dst: "100.64.0.1", proto: 17, sport: 53, dport: 4000 };
    expect(sends("in", answer)).toBe(false);
    expect(sends("out", question)).toBe(true);
    expect(sends("in", answer)).toBe(true);
    expect(sends("in", { ...answer, dport: 4001 })).toBe(false);
    expect(sends("in", { ...answer, src: "100.64.0.3" })).toBe(false);
  });

  test("a rule opens one port to one source; echo requests follow the addresses alone", () => {
    x.filterForgetFlows();
    use({
      rules: [
        { SrcIPs: ["100.64.0.2"], DstPorts: [{ IP: "100.64.0.1", Ports: { First: 22, Last: 23 } }], IPProto: [6] },
      ],
      local,
    });
    const to = (dport: number, src = "100.64.0.2", proto = 6) => sends("in", { src, dst: "100.64.0.1", proto, dport });
    expect([21, 22, 23, 24].map((port) => to(port))).toEqual([false, true, true, false]);
    expect(to(22, "100.64.0.3")).toBe(false);
    expect(to(22, "100.64.0.2", 17)).toBe(false);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 1, flags: 8 })).toBe(true);
    expect(sends("in", { src: "100.64.0.3", dst: "100.64.0.1", proto: 1, flags: 8 })).toBe(false);
  });

  test("allow-all covers TCP, UDP and ping of both families, only to local destinations, and no other protocol", () => {
    use({ rules: [allowAll], local });
    for (const [src, dst] of [
      ["100.64.0.2", "100.64.0.1"],
      ["fd7a::2", "fd7a::1"],
      ["1.2.3.4", "10.1.2.3"],
    ] as const) {
      for (const proto of [6, 17, dst.includes(":") ? 58 : 1])
        expect(sends("in", { src, dst, proto, flags: proto === 6 ? SYN : 8 })).toBe(true);
      for (const proto of [47, 132]) expect(sends("in", { src, dst, proto })).toBe(false);
      expect(sends("in", { src, dst, proto: 99 })).toBe(true);
    }
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.9", proto: 6 })).toBe(false);
    expect(sends("in", { src: "100.64.0.2", dst: "100.64.0.9", proto: 6, flags: 0x10 })).toBe(false);
  });

  test("other protocols need a rule that names them with all ports", () => {
    const rule = (Last: number): FilterRule => ({
      SrcIPs: ["*"],
      DstPorts: [{ IP: "*", Ports: { First: 0, Last } }],
      IPProto: [47],
    });
    use({ rules: [rule(65535)], local });
    expect(sends("in", { src: "1.1.1.1", dst: "100.64.0.1", proto: 47 })).toBe(true);
    expect(sends("in", { src: "1.1.1.1", dst: "100.64.0.1", proto: 48 })).toBe(false);
    use({ rules: [rule(1000)], local });
    expect(sends("in", { src: "1.1.1.1", dst: "100.64.0.1", proto: 47 })).toBe(false);
  });

  test("multicast and link-local destinations pass in neither direction, the metadata address does", () => {
    use({ rules: [allowAll], local: ["0.0.0.0/0", "::/0"] });
    for (const dst of ["224.0.0.1", "239.255.255.250", "169.254.1.1", "ff02::1", "fe80::1", "febf::1"]) {
      for (const direction of ["in", "out"] as const)
        expect(sends(direction, { src: dst.includes(":") ? "fd7a::2" : "1.1.1.1", dst, proto: 17 })).toBe(false);
    }
    for (const dst of ["169.254.169.254", "240.0.0.1", "fec0::1"]) {
      expect(sends("in", { src: dst.includes(":") ? "fd7a::2" : "1.1.1.1", dst, proto: 17 })).toBe(true);
    }
  });

  test("later fragments pass, first ones are judged by their header, unparsable packets are dropped", () => {
    use({ rules: [], local });
    const src = parseIP("1.1.1.1")!;
    const dst = parseIP("100.64.0.1")!;
    const transport = udp(1, 2, new Uint8Array(40));
    expect(verdict("in", ipPacket({ src, dst, proto: 17, transport, fragment: 100 }))).toBe(true);
    expect(verdict("in", ipPacket({ src, dst, proto: 17, transport, fragment: 0x2000 }))).toBe(false);
    expect(verdict("in", ipPacket({ src, dst, proto: 6, transport: new Uint8Array(8) }))).toBe(false);
  });

  test("flows that one instance lets out are let in by another that was told, also those in use among a thousand newer", () => {
    const sender = Asm.create();
    const out = (i: number) => {
      const packet = build({ src: "100.64.0.1", dst: "100.64.0.2", proto: 17, sport: 1000 + i, dport: 53 });
      const p = sender.exports.heapBase() + 4096;
      sender.u8.set(packet, p);
      sender.exports.parsePacket(p, packet.length);
      expect(sender.exports.filterOut()).toBe(1);
    };
    const tell = () => {
      const n = sender.exports.filterTakeNews();
      for (let i = 0; i < n; i++) {
        const entry = sender.exports.filterNews() + i * 40;
        asm.u8.set(sender.u8.subarray(entry, entry + 40), TABLE + (1 << 19));
        x.filterLearn(TABLE + (1 << 19));
      }
      return n;
    };
    const back = (i: number) =>
      sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 17, sport: 53, dport: 1000 + i });
    sender.exports.filterShareFlows();
    sender.exports.filterSet(sender.exports.heapBase());
    x.filterForgetFlows();
    use({ rules: [], local });
    out(0);
    expect(back(0)).toBe(false);
    expect(tell()).toBe(1);
    expect(back(0)).toBe(true);
    out(0);
    expect(tell()).toBe(0);
    for (let i = 1; i <= 1200; i++) {
      out(i);
      out(-1);
      tell();
    }
    expect(back(-1)).toBe(true);
    expect(back(1200)).toBe(true);
    expect(back(1)).toBe(false);
    // More at once than the list holds: the rest is told when it is used again.
    for (let i = 0; i < 2000; i++) out(5000 + i);
    expect(tell()).toBe(1024);
    expect(back(5000 + 1999)).toBe(false);
    out(5000 + 1999);
    expect(tell()).toBe(1);
    expect(back(5000 + 1999)).toBe(true);
  });

  test("the 512 latest flows are remembered, in the order of their last use, also across new rules", () => {
    x.filterForgetFlows();
    use({ rules: [], local });
    const out = (i: number) =>
      sends("out", { src: "100.64.0.1", dst: "100.64.0.2", proto: 17, sport: 1000 + i, dport: 53 });
    const back = (i: number) =>
      sends("in", { src: "100.64.0.2", dst: "100.64.0.1", proto: 17, sport: 53, dport: 1000 + i });
    for (let i = 0; i < 512; i++) out(i);
    use({ rules: [], local });
    expect(back(0)).toBe(true);
    out(512);
    expect(back(1)).toBe(false);
    expect(back(0)).toBe(true);
    expect(back(512)).toBe(true);
  });

  test("new rules make old verdicts void", () => {
    const flow: Flow = { src: "100.64.0.2", dst: "100.64.0.1", proto: 6, dport: 80 };
    use({ rules: [allowAll], local });
    expect(sends("in", flow)).toBe(true);
    use({ rules: [], local });
    expect(sends("in", flow)).toBe(false);
    x.filterSet(0);
    expect(sends("in", flow)).toBe(true);
  });

  test("bad entries and capabilities are skipped and counted, and match nothing", () => {
    const compiled = use({
      rules: [
        {
          SrcIPs: ["cap:x", "10.0.0.1/8", "nonsense", "5.5.5.5-4.4.4.4", "1.1.1.1-fd7a::1"],
          DstPorts: allowAll.DstPorts!,
        },
        {
          SrcIPs: ["*"],
          DstPorts: [
            { IP: "10.0.0.1/8", Ports: { First: 0, Last: 1 } },
            { IP: "*", Ports: { First: 9, Last: 1 } },
          ],
        },
      ],
      local,
    });
    expect(compiled).toMatchObject({ rules: [], skippedCaps: 1, skippedBad: 6 });
    expect(sends("in", { src: "10.0.0.1", dst: "100.64.0.1", proto: 6 })).toBe(false);
  });

  test("ranges: merged without changing what they cover", () => {
    const entry = fc.tuple(fc.nat(255), fc.nat(255)).map(([a, b]) => `0.0.0.${Math.min(a, b)}-0.0.0.${Math.max(a, b)}`);
    fc.assert(
      fc.property(fc.array(entry, { maxLength: 20 }), (entries) => {
        const merged = mergeRanges(entries.flatMap((e) => parseRanges(e)!));
        for (let i = 1; i < merged.length; i++) expect(compareIP(merged[i - 1]!.last, merged[i]!.first)).toBe(-1);
        for (let n = 0; n < 256; n++) {
          const ip = Uint8Array.of(0, 0, 0, n);
          const inside = merged.some((r) => compareIP(r.first, ip) <= 0 && compareIP(ip, r.last) <= 0);
          expect(inside).toBe(entries.some((e) => covers(e, ip)));
        }
      }),
      { numRuns: 50 },
    );
  });

  test("random rules and packets: the same verdicts as the plain reference", () => {
    const v4 = fc.constantFrom(
      "100.64.0.1",
      "100.64.0.2",
      "100.64.0.3",
      "10.1.0.1",
      "10.1.2.3",
      "9.9.9.9",
      "224.0.0.5",
      "169.254.1.1",
    );
    const v6 = fc.constantFrom("fd7a::1", "fd7a::2", "fd7a:1::3", "fe80::1", "ff02::1", "2001:db8::1");
    const set = fc.constantFrom(
      "*",
      "100.64.0.2",
      "100.64.0.0/30",
      "100.64.0.2-100.64.0.3",
      "10.1.0.0/16",
      "0.0.0.0/0",
      "fd7a::/64",
      "fd7a::2",
      "fd7a::1-fd7a:1::3",
      "::/0",
      "cap:none",
      "10.1.2.3/16",
      "bad",
    );
    const port = fc.constantFrom(0, 1, 53, 80, 443, 65535);
    const ports = fc.oneof(
      fc.constant({ First: 0, Last: 65535 }),
      fc.tuple(port, port).map(([a, b]) => ({ First: a, Last: b })),
    );
    const rule = fc.record({
      SrcIPs: fc.array(set, { maxLength: 3 }),
      DstPorts: fc.array(fc.record({ IP: set, Ports: ports }), { maxLength: 3 }),
      IPProto: fc.array(fc.constantFrom(1, 6, 17, 47, 58, 132), { maxLength: 2 }),
    });
    const flow = fc
      .tuple(
        fc.boolean(),
        v4,
        v4,
        v6,
        v6,
        fc.constantFrom(1, 6, 17, 47, 58, 99, 132),
        port,
        port,
        fc.constantFrom(0, 2, 3, 8, 16, 18, 128, 129),
      )
      .map(
        ([four, s4, d4, s6, d6, proto, sport, dport, flags]): Flow => ({
          src: four ? s4 : s6,
          dst: four ? d4 : d6,
          proto,
          sport,
          dport,
          flags,
        }),
      );
    const steps = fc.array(fc.tuple(fc.constantFrom("in" as const, "in" as const, "out" as const), flow), {
      maxLength: 40,
    });
    // Entries with host bits set are skipped by the compiler; the reference must not apply them either.
    const honest = (text: string) => text !== "10.1.2.3/16" && text !== "bad" && !text.startsWith("cap:");
    fc.assert(
      fc.property(
        fc.oneof(fc.array(rule, { maxLength: 4 }), fc.array(rule, { maxLength: 20 })),
        steps,
        (rules, packets) => {
          x.filterForgetFlows();
          use({ rules, local });
          const cleaned = rules.map((r) => ({
            ...r,
            SrcIPs: r.SrcIPs.filter(honest),
            DstPorts: r.DstPorts.filter((d) => honest(d.IP) && d.Ports.First <= d.Ports.Last),
          }));
          const reference = new Reference({ rules: cleaned, local });
          for (const [direction, f] of packets)
            expect([direction, f, sends(direction, f)]).toEqual([direction, f, reference.check(direction, f)]);
        },
      ),
      { numRuns: 300 },
    );
  });

  test("thousands of rules", () => {
    const rules = Array.from(
      { length: 3000 },
      (_, i): FilterRule => ({
        SrcIPs: [`100.${64 + (i >> 8)}.${i & 255}.7`, "fd7a::99"],
        DstPorts: [{ IP: "100.64.0.1", Ports: { First: i, Last: i } }],
      }),
    );
    use({ rules, local });
    expect(sends("in", { src: "100.75.183.7", dst: "100.64.0.1", proto: 6, dport: 2999 })).toBe(true);
    expect(sends("in", { src: "100.75.183.7", dst: "100.64.0.1", proto: 6, dport: 2998 })).toBe(false);
  });
});
