import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { hex } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import {
  CLIENT_LIMITS,
  type ClientInfo,
  ClientLogin,
  decodePeerPresent,
  encodeClosePeer,
  encodeForwardPacket,
  encodeFrame,
  encodeNotePreferred,
  encodePing,
  encodePong,
  encodeSendPacket,
  encodeWatchConns,
  FrameDecoder,
  FrameType,
  MAX_CLIENT_FRAME,
  MAX_PACKET,
  PresentFlag,
} from "../wire/derp.ts";
import { parseIP } from "../wire/ip.ts";
import { type RelayConnection, RelayServer, type RelayServerOptions, type Transport } from "./server.ts";

const RELAY_PRIVATE = new Uint8Array(32).fill(7);
const MESH_KEY = new Uint8Array(32).fill(0x5a);
const PRIVATE = (n: number) => new Uint8Array(32).fill(n);
const PUBLIC = (n: number) => x25519Public(PRIVATE(n));
const bytes = (...values: number[]) => Uint8Array.from(values);

/** A relay on a virtual clock. */
class World {
  now = 1000;
  readonly server: RelayServer;
  constructor(options: Partial<RelayServerOptions> = {}) {
    let counter = 0;
    const random = (n: number) => new Uint8Array(n).fill(counter++);
    this.server = new RelayServer({ privateKey: RELAY_PRIVATE, meshKey: MESH_KEY, random, ...options });
  }

  client(privateKey = 1, options: Partial<ClientInfo> = {}, ip = "192.0.2.1"): Client {
    const client = this.stranger(privateKey, ip);
    client.login(options);
    return client;
  }

  /** Connected, not logged in. */
  stranger(privateKey = 1, ip = "192.0.2.1", notIdeal = false): Client {
    return new Client(this, privateKey, ip, notIdeal);
  }

  /** Lets time pass in steps, as the timer does. */
  pass(ms: number): void {
    const end = this.now + ms;
    while (this.now < end) {
      this.now = Math.min(end, this.now + 500);
      this.server.tick(this.now);
    }
  }

  count(name: string): number {
    const value = this.server.stats()[name];
    if (value === undefined) throw new Error(`there is no counter ${name}`);
    return value;
  }
}

class Client implements Transport {
  readonly key: Uint8Array;
  readonly conn: RelayConnection;
  readonly login1: ClientLogin;
  /** "type:payload in hex" of each frame that came. */
  frames: string[] = [];
  writes = 0;
  /** Size of the memory behind the last write. */
  lastBuffer = 0;
  isBlocked = false;
  isPaused = false;
  isEnded = false;
  readonly #decoder = new FrameDecoder(CLIENT_LIMITS, MAX_CLIENT_FRAME);

  constructor(
    readonly world: World,
    privateKey: number,
    ip: string,
    notIdeal: boolean,
  ) {
    this.key = PUBLIC(privateKey);
    this.login1 = new ClientLogin({ privateKey: PRIVATE(privateKey), publicKey: this.key });
    const conn = world.server.accept(this, { ip, port: 4567 }, world.now, notIdeal);
    if (!conn) throw new Error("refused");
    this.conn = conn;
  }

  clientInfo(options: Partial<ClientInfo> = {}): Uint8Array {
    return this.login1.clientInfo(new Uint8Array(24), options);
  }

  login(options: Partial<ClientInfo> = {}): void {
    this.says(this.clientInfo(options));
  }

  says(...frames: Uint8Array[]): void {
    this.conn.receive(new Uint8Array(Buffer.concat(frames)), this.world.now);
    this.world.server.flush(this.world.now);
  }

  sends(to: Client | Uint8Array, packet: Uint8Array): void {
    this.says(encodeSendPacket(to instanceof Uint8Array ? to : to.key, packet));
  }

  drain(): void {
    this.isBlocked = false;
    this.conn.drained(this.world.now);
  }

  /** What came since the last call, by type. */
  takes(type: number): string[] {
    const prefix = `${type}:`;
    const found = this.frames.filter((frame) => frame.startsWith(prefix)).map((frame) => frame.slice(prefix.length));
    this.frames = this.frames.filter((frame) => !frame.startsWith(prefix));
    return found;
  }

  /** "sender's key: packet" in hex of what was received since the last call. */
  packets(): string[] {
    return this.takes(FrameType.RecvPacket);
  }

  write(data: Uint8Array): boolean {
    this.writes++;
    this.lastBuffer = data.buffer.byteLength;
    this.#decoder.feed(new Uint8Array(data), (type, buf, at, end) => {
      const payload = buf.subarray(at + 5, end);
      if (type === FrameType.ServerKey) this.login1.receiveServerKey(payload);
      this.frames.push(`${type}:${hex(payload)}`);
      return true;
    });
    return !this.isBlocked;
  }
  pause(): void {
    this.isPaused = true;
  }
  resume(): void {
    this.isPaused = false;
  }
  close(): void {
    this.isEnded = true;
  }
}

const disco = (last: number) => {
  const packet = new Uint8Array(62).fill(last);
  packet.set(bytes(0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac));
  return packet;
};
const received = (from: Client, packet: Uint8Array) => hex(from.key) + hex(packet);
const gone = (client: Client | Uint8Array, reason: number) =>
  `${hex(client instanceof Uint8Array ? client : client.key)}0${reason}`;

describe("login", () => {
  test("the relay greets first, answers with ServerInfo, and only then delivers", () => {
    const world = new World();
    const a = world.stranger(1);
    expect(a.frames.map((frame) => frame.split(":")[0])).toEqual(["1"]);
    expect(world.server.size).toBe(0);
    a.login();
    const b = world.client(2);
    b.sends(a, bytes(1));
    expect(a.frames.map((frame) => frame.split(":")[0])).toEqual(["1", "3", "5"]);
    expect(world.count("gauge_clients_total")).toBe(2);
  });

  test("frames pipelined behind ClientInfo count", () => {
    const world = new World();
    const a = world.client(1);
    const b = world.stranger(2);
    b.says(b.clientInfo(), encodeNotePreferred(true), encodeSendPacket(a.key, bytes(5)));
    expect(a.packets()).toEqual([received(b, bytes(5))]);
    expect(world.count("gauge_current_home_connections")).toBe(1);
  });

  test("a wrong box, another first frame, even an unknown one, end the connection without a word", () => {
    const world = new World();
    const wrong: Uint8Array[] = [
      encodeFrame(FrameType.ClientInfo, PUBLIC(1), new Uint8Array(24), new Uint8Array(40)),
      encodeSendPacket(PUBLIC(1), bytes(1)),
      encodeFrame(0xee, bytes(1)),
    ];
    for (const frame of wrong) {
      const a = world.stranger(1);
      a.says(frame);
      expect(a.isEnded).toBe(true);
      expect(a.frames.length).toBe(1);
    }
    expect(world.count("logins_malformed")).toBe(3);
    expect(world.server.size).toBe(0);
    expect(world.count("gauge_half_open")).toBe(0);
  });

  test("who does not log in within 10 s is gone", () => {
    const world = new World();
    const a = world.stranger(1);
    world.pass(9500);
    expect(a.isEnded).toBe(false);
    world.pass(500);
    expect(a.isEnded).toBe(true);
    expect(world.count("logins_timed_out")).toBe(1);
  });

  test("half-open connections are limited in all and per address, where an IPv6 /64 is one address", () => {
    const world = new World({ limits: { halfOpen: 5, halfOpenPerAddress: 2 } });
    world.stranger(1, "192.0.2.1");
    const second = world.stranger(2, "::ffff:192.0.2.1");
    expect(() => world.stranger(3, "192.0.2.1")).toThrow("refused");
    second.login();
    world.stranger(3, "192.0.2.1");
    world.stranger(4, "2001:db8::1");
    world.stranger(5, "2001:db8::2");
    expect(() => world.stranger(6, "2001:db8::ffff")).toThrow("refused");
    world.stranger(6, "2001:db8:0:1::1");
    expect(() => world.stranger(7, "198.51.100.1")).toThrow("refused");
    expect(world.count("logins_busy")).toBe(3);
    world.pass(10_000);
    world.stranger(7, "198.51.100.1");
  });

  test("the verifier decides, with key and source address; what it throws means no", () => {
    const asked: string[] = [];
    const allowed = hex(PUBLIC(1));
    const world = new World({
      verify: (key, ip) => {
        asked.push(`${hex(key)} ${ip}`);
        if (ip === "203.0.113.9") throw new Error("database gone");
        return hex(key) === allowed;
      },
    });
    const a = world.client(1);
    const b = world.client(2);
    const c = world.client(1, {}, "203.0.113.9");
    expect(asked[0]).toBe(`${allowed} 192.0.2.1`);
    expect([a.isEnded, b.isEnded, c.isEnded]).toEqual([false, true, true]);
    expect(b.takes(FrameType.ServerInfo)).toEqual([]);
    expect(world.count("logins_refused")).toBe(2);
    expect(world.server.size).toBe(1);
    // Mesh peers prove themselves by the mesh key.
    expect(world.client(3, { meshKey: hex(MESH_KEY) }).isEnded).toBe(false);
  });

  test("a verifier that takes its time: reading pauses, what was pipelined is handled afterwards", async () => {
    const answers: ((allowed: boolean) => void)[] = [];
    const world = new World({ verify: () => new Promise((resolve) => answers.push(resolve)) });
    const a = world.stranger(1);
    a.says(a.clientInfo(), encodeSendPacket(a.key, bytes(1)));
    a.says(encodeSendPacket(a.key, bytes(2)));
    expect(a.isPaused).toBe(true);
    expect(world.server.size).toBe(0);
    answers[0]!(true);
    await Promise.resolve();
    await Promise.resolve();
    expect(a.isPaused).toBe(false);
    expect(a.packets()).toEqual([received(a, bytes(1)), received(a, bytes(2))]);

    const b = world.stranger(2);
    b.says(b.clientInfo());
    answers[1]!(false);
    await Promise.resolve();
    await Promise.resolve();
    expect(b.isEnded).toBe(true);

    const c = world.stranger(3);
    c.says(c.clientInfo());
    for (let i = 0; i < 40 && !c.isEnded; i++) c.says(new Uint8Array(10_000));
    expect(c.isEnded).toBe(true);

    const d = world.stranger(4);
    d.says(d.clientInfo());
    world.pass(10_000);
    expect(d.isEnded).toBe(true);
    answers[3]!(true);
    await Promise.resolve();
    expect(world.server.size).toBe(1);
  });
});

describe("packets", () => {
  test("arrive unchanged with the sender's key, empty ones and those of 65536 bytes, also at oneself", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.client(2)];
    const large = Uint8Array.from({ length: MAX_PACKET }, (_, i) => i);
    a.sends(b, new Uint8Array(0));
    a.sends(b, large);
    a.sends(a, bytes(9));
    expect(b.packets()).toEqual([received(a, new Uint8Array(0)), received(a, large)]);
    expect(a.packets()).toEqual([received(a, bytes(9))]);
    expect(world.count("bytes_sent")).toBe(MAX_PACKET + 1);
    expect(world.count("packets_received")).toBe(3);
  });

  test("more than 65536 bytes, or less than a key, end the sender's connection only", () => {
    const world = new World();
    const b = world.client(2);
    for (const frame of [encodeSendPacket(b.key, new Uint8Array(MAX_PACKET + 1)), encodeFrame(4, new Uint8Array(31))]) {
      const a = world.client(1);
      a.says(frame);
      expect(a.isEnded).toBe(true);
    }
    expect(b.isEnded).toBe(false);
    expect(b.packets()).toEqual([]);
    expect(world.count("protocol_errors")).toBe(2);
  });

  test("cut anywhere, for several receivers, interleaved with unknown frames: all arrive in order", () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ to: fc.nat(2), size: fc.nat(300) }), { minLength: 1, maxLength: 40 }),
        fc.array(fc.integer({ min: 1, max: 700 }), { minLength: 1, maxLength: 5 }),
        (plan, cuts) => {
          const world = new World();
          const sender = world.client(9);
          const receivers = [world.client(1), world.client(2), world.client(3)];
          const expected: string[][] = [[], [], []];
          const frames: Uint8Array[] = [];
          for (const [i, { to, size }] of plan.entries()) {
            const packet = new Uint8Array(size).fill(i);
            frames.push(encodeSendPacket(receivers[to]!.key, packet));
            if (i % 3 === 0) frames.push(encodeFrame(0x77, packet));
            expected[to]!.push(received(sender, packet));
          }
          const stream = Buffer.concat(frames);
          for (let at = 0, i = 0; at < stream.length; i++) {
            const next = at + cuts[i % cuts.length]!;
            sender.says(stream.subarray(at, next));
            at = next;
          }
          expect(receivers.map((receiver) => receiver.packets())).toEqual(expected);
        },
      ),
      { numRuns: 60 },
    );
  });

  test("a burst for one receiver becomes few writes and loses nothing", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.client(2)];
    b.writes = 0;
    const packets = Array.from({ length: 200 }, (_, i) => encodeSendPacket(b.key, new Uint8Array(100).fill(i)));
    a.says(...packets);
    expect(b.packets().length).toBe(200);
    expect(b.writes).toBeLessThan(10);
  });

  test("to an unknown key are dropped: in silence, but for disco with PeerGone(not here), 3 at once and 1 a second", () => {
    const world = new World();
    const a = world.client(1);
    const nobody = PUBLIC(99);
    a.sends(nobody, new Uint8Array(100));
    expect(a.takes(FrameType.PeerGone)).toEqual([]);
    for (let i = 0; i < 10; i++) a.sends(nobody, disco(i));
    expect(a.takes(FrameType.PeerGone)).toEqual([gone(nobody, 1), gone(nobody, 1), gone(nobody, 1)]);
    world.pass(1000);
    a.sends(nobody, disco(1));
    a.sends(nobody, disco(2));
    expect(a.takes(FrameType.PeerGone)).toEqual([gone(nobody, 1)]);
    expect(world.count('packets_dropped{reason="unknown_dest",kind="other"}')).toBe(1);
    expect(world.count('packets_dropped{reason="unknown_dest",kind="disco"}')).toBe(12);
    expect(world.count('bytes_dropped{reason="unknown_dest",kind="other"}')).toBe(100);
    expect(world.count("peer_gone_not_here_frames")).toBe(4);
  });
});

describe("a receiver that does not read", () => {
  test("keeps the newest 32 packets and 32 disco packets; older ones are dropped and the sender never notices", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.client(2)];
    b.isBlocked = true;
    a.sends(b, bytes(255)); // taken by the transport, which then holds back
    b.packets();
    for (let i = 0; i < 100; i++) {
      a.sends(b, bytes(i));
      a.sends(b, disco(i));
    }
    expect(b.packets()).toEqual([]);
    expect(a.isEnded).toBe(false);
    expect(world.count('packets_dropped{reason="queue_head",kind="other"}')).toBe(68);
    expect(world.count('packets_dropped{reason="queue_head",kind="disco"}')).toBe(68);
    b.drain();
    const newest = Array.from({ length: 32 }, (_, i) => 68 + i);
    expect(b.packets().sort()).toEqual(
      [...newest.map((i) => received(a, disco(i))), ...newest.map((i) => received(a, bytes(i)))].sort(),
    );
  });

  test("is ended after 2 s, a mesh peer after 30 s; what waited counts as dropped", () => {
    const world = new World();
    const [a, b, mesh] = [world.client(1), world.client(2), world.client(3, { meshKey: hex(MESH_KEY) })];
    for (const target of [b, mesh]) {
      target.isBlocked = true;
      a.sends(target, bytes(1));
      a.sends(target, bytes(2));
    }
    world.pass(1500);
    expect(b.isEnded).toBe(false);
    world.pass(500);
    expect([b.isEnded, mesh.isEnded]).toEqual([true, false]);
    expect(world.count("sclient_write_timeouts")).toBe(1);
    expect(world.count('packets_dropped{reason="gone_disconnected",kind="other"}')).toBe(1);
    world.pass(28_000);
    expect(mesh.isEnded).toBe(true);
    expect(a.isEnded).toBe(false);
  });

  test("that drains in time goes on", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.client(2)];
    for (let i = 0; i < 5; i++) {
      b.isBlocked = true;
      a.sends(b, bytes(i));
      world.pass(1500);
      b.drain();
    }
    expect(b.isEnded).toBe(false);
    expect(b.packets().length).toBe(5);
  });

  test("does not keep large chunks alive for the sake of small packets in them", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.client(2)];
    for (const packet of [bytes(1), disco(1)]) {
      b.isBlocked = true;
      a.sends(b, bytes(0));
      a.says(encodeSendPacket(b.key, packet), encodeFrame(0xee, new Uint8Array(4 << 20)));
      b.drain();
      expect(b.packets()).toEqual([received(a, bytes(0)), received(a, packet)]);
      expect(b.lastBuffer).toBeLessThan(1000);
    }
  });
});

describe("PeerGone(disconnected)", () => {
  test("tells those who received from the peer, once, and nobody else", () => {
    const world = new World();
    const [a, b, c] = [world.client(1), world.client(2), world.client(3)];
    a.sends(b, bytes(1));
    c.sends(a, bytes(1)); // c only sent to a
    a.conn.closed(world.now);
    expect(b.takes(FrameType.PeerGone)).toEqual([gone(a, 0)]);
    expect(c.takes(FrameType.PeerGone)).toEqual([]);
    const again = world.client(1);
    again.conn.closed(world.now);
    expect(b.takes(FrameType.PeerGone)).toEqual([]);
    const third = world.client(1);
    third.sends(b, bytes(2));
    third.conn.closed(world.now);
    expect(b.takes(FrameType.PeerGone)).toEqual([gone(a, 0)]);
  });

  test("comes when the last of several connections leaves", () => {
    const world = new World();
    const [a1, b] = [world.client(1), world.client(2)];
    const a2 = world.client(1);
    a1.sends(b, bytes(1));
    a1.conn.closed(world.now);
    expect(b.takes(FrameType.PeerGone)).toEqual([]);
    a2.conn.closed(world.now);
    expect(b.takes(FrameType.PeerGone)).toEqual([gone(a1, 0)]);
  });
});

describe("several connections with one key", () => {
  test("the newest is active; whoever speaks takes over; the others are heard but get no packets", () => {
    const world = new World();
    const b = world.client(2);
    const a1 = world.client(1);
    const a2 = world.client(1);
    b.sends(a1, bytes(1));
    expect([a1.packets().length, a2.packets().length]).toEqual([0, 1]);
    a1.sends(b, bytes(7));
    expect(b.packets()).toEqual([received(a1, bytes(7))]);
    b.sends(a1, bytes(2));
    expect([a1.packets().length, a2.packets().length]).toEqual([1, 0]);
    a2.says(encodeFrame(FrameType.ClientInfo, bytes(0))); // any frame counts, even one that means nothing here
    b.sends(a1, bytes(3));
    expect([a1.packets().length, a2.packets().length]).toEqual([0, 1]);
    expect(world.count("gauge_current_dup_client_keys")).toBe(1);
    expect(world.count("gauge_current_dup_client_conns")).toBe(2);
    expect(world.count("counter_total_dup_client_conns")).toBe(1);
  });

  test("when the active one leaves, the last speaker of the rest is active", () => {
    const world = new World();
    const b = world.client(2);
    const [a1, a2, a3] = [world.client(1), world.client(1), world.client(1)];
    a2.says(encodeNotePreferred(true));
    a1.says(encodeNotePreferred(true));
    a3.says(encodeNotePreferred(true));
    a3.conn.closed(world.now);
    b.sends(a1, bytes(1));
    expect([a1, a2, a3].map((client) => client.packets().length)).toEqual([1, 0, 0]);
    a1.conn.closed(world.now);
    b.sends(a1, bytes(2));
    expect(a2.packets().length).toBe(1);
    expect(world.count("gauge_current_dup_client_keys")).toBe(0);
  });

  test("the inactive one still gets keep-alives", () => {
    const world = new World();
    const [a1, a2] = [world.client(1), world.client(1)];
    world.pass(30_000);
    for (const client of [a1, a2]) client.says(encodePong(new Uint8Array(8)));
    world.pass(36_000);
    expect(a1.takes(FrameType.KeepAlive).length).toBe(1);
    expect(a2.takes(FrameType.KeepAlive).length).toBe(1);
  });
});

describe("mesh", () => {
  const mesh = { meshKey: hex(MESH_KEY) };

  test("its frames end the connection of anyone without the key; a relay without mesh key trusts no key", () => {
    const frames = [
      encodeWatchConns(),
      encodeClosePeer(PUBLIC(1)),
      encodeForwardPacket(PUBLIC(1), PUBLIC(2), bytes(1)),
    ];
    for (const frame of frames) {
      for (const [options, info] of [
        [{}, {}],
        [{}, { meshKey: "00".repeat(32) }],
        [{}, { meshKey: "5a" }],
        [{ meshKey: undefined }, mesh],
        [{ meshKey: new Uint8Array(32) }, { meshKey: "00".repeat(32) }],
      ] as const) {
        const client = new World(options).client(1, info);
        expect(client.isEnded).toBe(false);
        client.says(frame);
        expect(client.isEnded).toBe(true);
      }
    }
  });

  test("a watcher learns who is here, itself included, then who comes and goes", () => {
    const world = new World();
    const a = world.stranger(1, "2001:db8::7", true);
    a.login();
    const watcher = world.client(3, mesh, "192.0.2.9");
    watcher.says(encodeWatchConns());
    const present = (text: string) => decodePeerPresent(Uint8Array.from(Buffer.from(text, "hex")));
    expect(watcher.takes(FrameType.PeerPresent).map(present)).toEqual([
      { key: a.key, ip: parseIP("2001:db8::7")!, port: 4567, flags: PresentFlag.NotIdeal },
      { key: watcher.key, ip: parseIP("192.0.2.9")!, port: 4567, flags: PresentFlag.Mesh },
    ]);
    const b = world.client(2);
    const b2 = world.client(2, { isProber: true });
    expect(watcher.takes(FrameType.PeerPresent).map((text) => present(text).flags)).toEqual([
      PresentFlag.Regular,
      PresentFlag.Prober,
    ]);
    b.conn.closed(world.now);
    expect(watcher.takes(FrameType.PeerGone)).toEqual([]);
    b2.conn.closed(world.now);
    expect(watcher.takes(FrameType.PeerGone)).toEqual([gone(b, 0)]);
    expect(world.count("gauge_watchers")).toBe(1);
    watcher.conn.closed(world.now);
    expect(world.count("gauge_watchers")).toBe(0);
  });

  test("a relay that dialled itself watches nothing", () => {
    const world = new World();
    const self = world.client(7, mesh);
    self.says(encodeWatchConns());
    expect(self.takes(FrameType.PeerPresent)).toEqual([]);
    expect(self.isEnded).toBe(false);
  });

  test("a forwarded packet arrives with its original source, and is never forwarded again", () => {
    const world = new World();
    const [peer, b] = [world.client(3, mesh), world.client(2)];
    const remote = PUBLIC(50);
    const large = Uint8Array.from({ length: MAX_PACKET }, (_, i) => i * 7);
    peer.says(
      encodeForwardPacket(remote, b.key, bytes(1, 2)),
      encodeForwardPacket(remote, b.key, new Uint8Array(0)),
      encodeForwardPacket(remote, b.key, large),
      encodeForwardPacket(remote, PUBLIC(51), disco(1)),
    );
    expect(b.packets()).toEqual([`${hex(remote)}0102`, hex(remote), hex(remote) + hex(large)]);
    expect(peer.takes(FrameType.PeerGone)).toEqual([]);
    expect(world.count("packets_forwarded_in")).toBe(4);
    expect(world.count('packets_dropped{reason="unknown_dest_on_fwd",kind="disco"}')).toBe(1);
  });

  test("ClosePeer ends all connections of a key; so does disconnect()", () => {
    const world = new World();
    const peer = world.client(3, mesh);
    const [a1, a2, b] = [world.client(1), world.client(1), world.client(2)];
    peer.says(encodeClosePeer(a1.key));
    expect([a1.isEnded, a2.isEnded, b.isEnded]).toEqual([true, true, false]);
    expect(world.server.disconnect(b.key)).toBe(1);
    expect(world.server.disconnect(b.key)).toBe(0);
    expect(b.isEnded).toBe(true);
  });
});

describe("small frames", () => {
  test("keep-alives come every 60 to 65 s", () => {
    const world = new World();
    const a = world.client(1, { canAckPings: false });
    world.pass(59_500);
    expect(a.takes(FrameType.KeepAlive)).toEqual([]);
    world.pass(5500);
    expect(a.takes(FrameType.KeepAlive).length).toBe(1);
    world.pass(650_000);
    expect([10, 11]).toContain(a.takes(FrameType.KeepAlive).length);
  });

  test("a silent client that can answer pings is pinged instead, and ended when it does not answer within 30 s", () => {
    const world = new World();
    const [alive, vanished, old] = [world.client(1), world.client(2), world.client(3, { canAckPings: false })];
    vanished.sends(alive, bytes(1));
    for (let i = 0; i < 120; i++) {
      world.pass(5000);
      for (const ping of alive.takes(FrameType.Ping)) alive.says(encodePong(Buffer.from(ping, "hex")));
    }
    expect([alive.isEnded, vanished.isEnded, old.isEnded]).toEqual([false, true, false]);
    expect(vanished.takes(FrameType.Ping).length).toBe(1);
    expect(alive.takes(FrameType.PeerGone)).toEqual([gone(vanished, 0)]);
    expect(world.count("clients_vanished")).toBe(1);
    expect(world.count("unknown_frames")).toBe(0);
  });

  test("a Ping is answered with its first 8 bytes; while one answer waits, more Pings get none", () => {
    const world = new World();
    const a = world.client(1);
    a.says(encodePing(bytes(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)));
    expect(a.takes(FrameType.Pong)).toEqual(["0102030405060708"]);
    a.says(encodePing(new Uint8Array(8).fill(1)), encodePing(new Uint8Array(8).fill(2)));
    expect(a.takes(FrameType.Pong)).toEqual(["01".repeat(8)]);
    expect(world.count("got_ping")).toBe(3);
    expect(world.count("sent_pong")).toBe(2);
    a.says(encodePong(new Uint8Array(8)), encodeFrame(0x60, new Uint8Array(5000)));
    expect(a.isEnded).toBe(false);
    expect(world.count("unknown_frames")).toBe(1);
  });

  test("home moves count when they come later than 5 s after connecting", () => {
    const world = new World();
    const a = world.client(1);
    a.says(encodeNotePreferred(true));
    expect(world.count("gauge_current_home_connections")).toBe(1);
    world.pass(6000);
    a.says(encodeNotePreferred(false), encodeNotePreferred(false), encodeNotePreferred(true));
    expect([world.count("home_moves_in"), world.count("home_moves_out")]).toEqual([1, 1]);
    a.conn.closed(world.now);
    expect(world.count("gauge_current_home_connections")).toBe(0);
  });

  test("wrong lengths end the connection", () => {
    const wrong: [type: number, length: number][] = [
      [FrameType.NotePreferred, 0],
      [FrameType.NotePreferred, 2],
      [FrameType.Ping, 7],
      [FrameType.Ping, 1001],
      [FrameType.WatchConns, 1],
      [FrameType.ClosePeer, 31],
      [FrameType.ForwardPacket, 63],
      [FrameType.ForwardPacket, 64 + MAX_PACKET + 1],
    ];
    for (const [type, length] of wrong) {
      const client = new World().client(1, { meshKey: hex(MESH_KEY) });
      client.says(encodeFrame(type, new Uint8Array(length)));
      expect(client.isEnded).toBe(true);
    }
  });

  test("close() ends all and refuses newcomers", () => {
    const world = new World();
    const [a, b] = [world.client(1), world.stranger(2)];
    world.server.close();
    expect([a.isEnded, b.isEnded]).toEqual([true, true]);
    expect(() => world.stranger(3)).toThrow("refused");
    expect(world.count("gauge_current_connections")).toBe(0);
  });
});

test("whatever logged-in clients and strangers send, the relay stays consistent and others are served", () => {
  const anyFrame = fc.oneof(
    fc
      .tuple(fc.integer({ min: 0, max: 0x16 }), fc.uint8Array({ maxLength: 200 }))
      .map(([type, payload]) => encodeFrame(type, payload)),
    fc.uint8Array({ maxLength: 64 }),
    fc.constantFrom(1, 2).map((n) => encodeSendPacket(PUBLIC(n), bytes(n))),
  );
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.nat(3), anyFrame, fc.nat(3000), fc.boolean()), { maxLength: 60 }), (script) => {
      const world = new World();
      const clients = [
        world.client(1),
        world.client(2, { meshKey: hex(MESH_KEY) }),
        world.stranger(3),
        world.client(1),
      ];
      for (const [who, frame, wait, blocks] of script) {
        clients[who]!.says(frame);
        if (blocks) clients[(who + 1) % 4]!.isBlocked = true;
        else clients[who]!.drain();
        world.pass(wait);
      }
      for (const client of clients) client.conn.closed(world.now);
      const [x, y] = [world.client(5), world.client(6)];
      x.sends(y, bytes(1));
      expect(y.packets()).toEqual([received(x, bytes(1))]);
      expect(world.server.size).toBe(2);
      expect(world.count("gauge_current_connections")).toBe(2);
      expect(world.count("gauge_half_open")).toBe(0);
    }),
    { numRuns: 100 },
  );
});
