import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { hex } from "../crypto/keys.ts";
import { type DeviceUpdate, formatDump, formatErrno, UapiReader, type UapiRequest } from "./uapi.ts";

const text = (s: string) => new TextEncoder().encode(s);
const K1 = "11".repeat(32);
const K2 = "22".repeat(32);

function read(input: string): UapiRequest[] {
  const reader = new UapiReader();
  return [...reader.push(text(input)), ...reader.end()];
}

function set(lines: string): DeviceUpdate {
  const [request] = read(`set=1\n${lines}\n`);
  if (request?.type !== "set") throw new Error(`not a set: ${JSON.stringify(request)}`);
  return request.update;
}

const errnoOf = (lines: string) => {
  const [request] = read(`set=1\n${lines}\n`);
  return request?.type === "error" ? request.errno : 0;
};

describe("UAPI", () => {
  test("every key of a set", () => {
    const update = set(
      `private_key=${K1}\nlisten_port=51820\nfwmark=4294967295\nreplace_peers=true\n` +
        `public_key=${K2}\nupdate_only=true\npreshared_key=${K1}\nendpoint=[2001:db8::1]:7\npersistent_keepalive_interval=25\n` +
        `replace_allowed_ips=true\nallowed_ip=10.1.2.3/8\nallowed_ip=-fd00::1/64\nprotocol_version=1\n` +
        `public_key=${K1}\nremove=true\n`,
    );
    expect(hex(update.privateKey!)).toBe(K1);
    expect(update).toMatchObject({ listenPort: 51820, fwmark: 0xffffffff, replacePeers: true });
    const [first, second] = update.peers!;
    expect(first).toMatchObject({
      updateOnly: true,
      endpoint: "[2001:db8::1]:7",
      persistentKeepalive: 25,
      replaceAllowedIPs: true,
      allowedIPs: ["10.0.0.0/8", "-fd00::/64"],
    });
    expect(hex(first!.publicKey) + hex(first!.presharedKey!)).toBe(K2 + K1);
    expect(second).toMatchObject({ remove: true });
  });

  test("several requests on one connection, in any pieces", () => {
    const input = text(`get=1\n\nset=1\nlisten_port=7\n\nset=1\nfoo=1\nlisten_port=9\n\nget=1\n\n`);
    fc.assert(
      fc.property(fc.array(fc.nat(input.length)), (cuts) => {
        const reader = new UapiReader();
        const out: UapiRequest[] = [];
        let from = 0;
        for (const cut of [...cuts.sort((a, b) => a - b), input.length]) {
          out.push(...reader.push(input.subarray(from, cut)));
          from = cut;
        }
        expect(
          out.map((r) => (r.type === "set" ? r.update.listenPort : r.type === "error" ? -r.errno : "get")),
        ).toEqual(["get", 7, -22, "get"]);
      }),
      { numRuns: 50 },
    );
  });

  test("the end of the stream completes a request", () => {
    expect(read("set=1\nlisten_port=7")).toEqual([{ type: "set", update: { listenPort: 7 } }]);
    expect(read("get=1")).toEqual([{ type: "get" }]);
    expect(read("")).toEqual([]);
  });

  test("wrong values are EINVAL, a line without = is EPROTO, as wireguard-go answers", () => {
    const device = [
      "foo=1",
      "private_key=zz",
      "listen_port=65536",
      "listen_port=-1",
      "fwmark=0x10",
      "fwmark=",
      "fwmark=4294967296",
      "replace_peers=false",
      `remove=true`,
    ];
    for (const line of device) expect([line, errnoOf(`${line}\n`)]).toEqual([line, 22]);
    expect(errnoOf("listen_port\n")).toBe(71);
    const peer = [
      "endpoint=foo:5",
      "endpoint=1.2.3.4",
      "endpoint=",
      "endpoint=1.2.3.4:70000",
      "allowed_ip=10.0.0.0/33",
      "allowed_ip=10.0.0.0",
      "allowed_ip=--10.0.0.0/8",
      "persistent_keepalive_interval=65536",
      "persistent_keepalive_interval=off",
      "protocol_version=2",
      "replace_allowed_ips=false",
      "remove=1",
      "update_only=",
      "preshared_key=00",
      "listen_port=1",
      `private_key=${K1}`,
      `public_key=${"g".repeat(64)}`,
    ];
    for (const line of peer) expect([line, errnoOf(`public_key=${K1}\n${line}\n`)]).toEqual([line, 22]);
  });

  test("what is no request ends the stream; an endless line does not grow", () => {
    const reader = new UapiReader();
    expect(reader.push(text("hello\nget=1\n\n"))).toMatchObject([{ type: "error", errno: 22, fatal: true }]);
    expect(reader.push(text("get=1\n\n"))).toEqual([]);
    const long = new UapiReader();
    expect(long.push(text("set=1\n"))).toEqual([]);
    expect(long.push(text("a".repeat(5000)))).toMatchObject([{ type: "error", errno: 5, fatal: true }]);
    expect(long.push(text("a".repeat(5000)))).toEqual([]);
  });

  test("no reason repeats a secret", () => {
    const [request] = read(`set=1\nprivate_key=${"ab".repeat(31)}zz\n\n`);
    expect(JSON.stringify(request)).not.toContain("abababababababababababab");
  });

  test("any bytes: no exception", () => {
    const line = fc.oneof(
      fc.constantFrom("set=1", "get=1", "", `public_key=${K1}`, "listen_port=1", "allowed_ip=0.0.0.0/0", "remove=true"),
      fc.string({ maxLength: 30 }),
    );
    fc.assert(
      fc.property(fc.array(line), (lines) => {
        for (const request of read(lines.join("\n"))) expect(["get", "set", "error"]).toContain(request.type);
      }),
      { numRuns: 500 },
    );
    fc.assert(fc.property(fc.uint8Array(), (bytes) => void new UapiReader().push(bytes)));
  });

  test("get answers with what set takes, and wg's statistics", () => {
    const zero = new Uint8Array(32);
    expect(formatDump({ privateKey: zero, listenPort: 0, fwmark: 0, peers: [] })).toBe("errno=0\n\n");
    const dump = formatDump({
      privateKey: new Uint8Array(32).fill(0x11),
      listenPort: 7,
      fwmark: 8,
      peers: [
        {
          publicKey: new Uint8Array(32).fill(0x22),
          presharedKey: zero,
          endpoint: "1.2.3.4:5",
          persistentKeepalive: 25,
          allowedIPs: ["10.0.0.0/8", "fd00::/64"],
          lastHandshake: 1700000000123,
          rxBytes: 3,
          txBytes: 4,
        },
      ],
    });
    expect(dump).toBe(
      `private_key=${K1}\nlisten_port=7\nfwmark=8\npublic_key=${K2}\npreshared_key=${"00".repeat(32)}\nprotocol_version=1\n` +
        "endpoint=1.2.3.4:5\nlast_handshake_time_sec=1700000000\nlast_handshake_time_nsec=123000000\ntx_bytes=4\nrx_bytes=3\n" +
        "persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/8\nallowed_ip=fd00::/64\nerrno=0\n\n",
    );
    const settable = dump.split("\n").filter((l) => !/^(last_|tx_|rx_|errno|$)/.test(l));
    expect(set(`${settable.join("\n")}\n`)).toMatchObject({ listenPort: 7, fwmark: 8 });
    expect(formatErrno(98)).toBe("errno=-98\n\n");
  });
});
