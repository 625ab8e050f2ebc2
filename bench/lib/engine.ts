// The part of the datapath that runs in wasm, without kernel and thread: one session with itself, so that what one batch seals
// the next call opens. Batches are what the datapath meets at full load: one superpacket of the TUN, one received GRO buffer.
import { once } from "node:events";
import { MessageChannel, Worker } from "node:worker_threads";
import { Asm } from "../../src/crypto/wasm.ts";
import "../../src/datapath/asm.ts";
import { Crew } from "../../src/datapath/crew.ts";
import type { HelperSetup } from "../../src/datapath/messages.ts";
import { ipPacket, TSO4, tcp, USO, udp, vnetHeader } from "../../src/datapath/packets.fixture.ts";
import { parseIP } from "../../src/wire/ip.ts";
import { AllowedIPs } from "../../src/wireguard/allowed-ips.ts";
import { type Session, SessionTable } from "../../src/wireguard/sessions.ts";

export const PEER = "10.0.0.1";
export const LOCAL = "10.0.0.2";
/** What the kernel makes of 64 KB at MTU 1420. */
export const BATCH = 46;

const MTU = 1420;
const HEADER = 16;
const OVERHEAD = 32;
const VNET = 10;

export class Engine {
  readonly asm = Asm.create(256);
  /** Datagrams of a run lie so far apart. */
  readonly stride: number;
  readonly bytes: number;
  /** Length of the IP packets inside. */
  readonly size: number;
  readonly #session: Session;
  readonly #super: number;
  readonly #run: number;
  readonly #sealed: number;
  readonly #state: { at: number; copy: number; bytes: number };
  readonly #superBytes: number;
  readonly #padded: number;

  /** `size`: length of the IP packets inside, headers included. `protocol`: what the superpacket holds. */
  constructor(size: number, protocol: "tcp" | "udp") {
    const { asm } = this;
    const x = asm.exports;
    this.size = size;
    const random = (n: number) => new Uint8Array(n).fill(0x5a);
    const sessions = new SessionTable(asm, random, 8);
    this.#session = sessions.reserve(0);
    const key = () => new Uint8Array(32).fill(7);
    sessions.install(this.#session, { send: key(), receive: key() }, this.#session.localIndex, true, 0);
    // To the peer and from the peer are the same packets here: both addresses are the one peer's.
    const allowed = new AllowedIPs(asm, 64);
    for (const ip of [PEER, LOCAL]) allowed.insert({ ip: parseIP(ip)!, bits: 32 }, 0);

    const headers = 20 + (protocol === "tcp" ? 20 : 8);
    const payload = new Uint8Array(BATCH * (size - headers)).map((_, i) => i * 7);
    const transport = protocol === "tcp" ? tcp({ sport: 40000, dport: 443, payload }) : udp(40000, 443, payload);
    const whole = ipPacket({
      src: parseIP(PEER)!,
      dst: parseIP(LOCAL)!,
      proto: protocol === "tcp" ? 6 : 17,
      transport,
    });
    this.#superBytes = whole.length;
    this.#super = asm.alloc(whole.length + 64) + HEADER;
    asm.u8.set(whole, this.#super);
    asm.u8.set(
      vnetHeader({
        flags: 1,
        type: protocol === "tcp" ? TSO4 : USO,
        headerLength: headers,
        size: size - headers,
        start: 20,
        offset: protocol === "tcp" ? 16 : 6,
      }),
      this.#super - VNET,
    );
    this.#padded = Math.max(size, Math.min((size + 15) & ~15, MTU));
    this.stride = this.#padded + OVERHEAD;
    this.bytes = BATCH * this.stride;
    this.#run = asm.alloc(this.bytes + 256) + 64;
    this.#sealed = asm.alloc(this.bytes + 64);

    this.split();
    this.seal();
    asm.u8.copyWithin(this.#sealed, this.#run, this.#run + this.bytes);
    const at = x.sessionAddress(this.#session.slot);
    const bytes = x.sessionAddress(this.#session.slot + 1) - at;
    this.#state = { at, bytes, copy: asm.alloc(bytes) };
    asm.u8.copyWithin(this.#state.copy, at, at + bytes);
    x.groSetup(1, 1, 1, 0, 0);
    this.restore();
    if (this.open() !== BATCH || x.groFlush() !== 1) throw new Error("bench: what was sealed does not open as it was");
  }

  get #plaintext(): number {
    return this.#run + HEADER;
  }

  checksum(): void {
    this.asm.exports.checksum(this.#super, this.size);
  }

  /** Headers, destination, and one superpacket into BATCH plaintexts. */
  split(): void {
    const x = this.asm.exports;
    if (x.txPrepare(this.#super, this.#superBytes, this.#super - VNET) !== 0)
      throw new Error("bench: the superpacket was refused");
    x.splitWrite(this.#plaintext, 0, BATCH, this.stride, this.#padded, this.#padded);
  }

  seal(): void {
    this.asm.exports.sessionSealRun(this.#session.slot, this.#plaintext, BATCH, this.stride, this.#padded);
  }

  /** A helper for the ciphers, of a thread of its own until it is disposed of. */
  async recruit(): Promise<Crew & AsyncDisposable> {
    const crew = new Crew(this.asm, 1);
    const { memory, words, parts, table } = crew.setup;
    const { port1, port2 } = new MessageChannel();
    const workerData: HelperSetup = { role: "helper", memory, words, table, part: parts[0]!, port: port2 };
    const worker = new Worker(new URL("../../src/datapath/worker.ts", import.meta.url), {
      workerData,
      transferList: [port2],
    });
    await once(port1, "message");
    return Object.assign(crew, {
      async [Symbol.asyncDispose]() {
        port1.close();
        await worker.terminate();
      },
    });
  }

  sealWith(crew: Crew): void {
    crew.seal(this.#session.slot, this.#plaintext, BATCH, this.stride, this.#padded);
    crew.finish();
  }

  /** The ciphers' part of opening. */
  openWith(crew: Crew): void {
    if (crew.open(this.#run, this.bytes, this.stride) === 0) throw new Error("bench: the batch is too small to share");
  }

  /** As if the sealed batch had just been received, on a session that has not seen it. */
  restore(): void {
    const { u8 } = this.asm;
    u8.copyWithin(this.#run, this.#sealed, this.#sealed + this.bytes);
    u8.copyWithin(this.#state.at, this.#state.copy, this.#state.copy + this.#state.bytes);
  }

  /** Opens, checks and coalesces; packets that were good. */
  open(): number {
    const x = this.asm.exports;
    const packets = () => this.asm.u32[(x.rxAccounts() >> 2) + 2]!;
    let good = 0;
    for (let at = 0; at < this.bytes; ) {
      const next = x.rxOpen(this.#run, this.bytes, this.stride, at);
      if (next === at) break;
      at = next;
      good += x.rxAccountCount() > 0 ? packets() : 0;
    }
    return good;
  }

  flush(): void {
    this.asm.exports.groFlush();
  }

  /** The opening alone, session after session, without what comes behind. */
  openOnly(): void {
    for (let i = 0; i < BATCH; i++) {
      if (this.asm.exports.sessionOpen(this.#run + i * this.stride, this.stride) < 0)
        throw new Error("bench: a sealed packet does not open");
    }
  }

  /** The plaintexts again, as the splitter made them. */
  restorePlain(): void {
    this.split();
  }

  /** Hands the plaintexts to the coalescer. */
  coalesce(): void {
    const x = this.asm.exports;
    for (let i = 0; i < BATCH; i++) x.groAdd(this.#plaintext + i * this.stride, this.size);
    x.groFlush();
  }

  /** Which rules are in force: a table as the datapath lays it out, or 0. */
  filter(table: number): void {
    this.asm.exports.filterSet(table);
  }
}
