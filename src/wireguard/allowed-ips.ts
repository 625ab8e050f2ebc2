// Allowed IPs: which peer a destination belongs to, and which sources a peer may use (spec/datapath-wire.md 1.10). Lookups
// of packets go to the trie in wasm memory (asm/trie.ts); here are the changes, and the lists for dumps.
import type { Asm } from "../crypto/wasm.ts";
import { formatPrefix, type IP, maskPrefix, type Prefix } from "../wire/ip.ts";
import "./asm.ts";
import type { Sealer } from "./sealer.ts";

interface Entry {
  prefix: Prefix;
  slot: number;
}

export class AllowedIPs {
  readonly capacity: number;
  readonly #asm: Asm;
  /** 16 bytes in wasm memory for the address of a call. */
  readonly #address: number;
  readonly #owner = new Map<string, Entry>();
  readonly #bySlot = new Map<number, Map<string, Prefix>>();
  readonly #sealer: Sealer | null;

  /**
   * Takes the trie of this module instance: one AllowedIPs per Asm. `capacity`: prefixes, all peers together. `sealer`
   * is told of every change.
   */
  constructor(asm: Asm, capacity: number, sealer: Sealer | null = null) {
    this.#asm = asm;
    this.#sealer = sealer;
    this.capacity = capacity;
    this.#address = asm.alloc(16, 16);
    const nodes = 2 * capacity;
    asm.exports.trieInit(asm.alloc(asm.exports.trieSize(nodes), 64), nodes);
  }

  static memoryNeeded(asm: Asm, capacity: number): number {
    return asm.exports.trieSize(2 * capacity) + 16 + 64;
  }

  get size(): number {
    return this.#owner.size;
  }

  /** Key of a prefix in sets: its text without host bits. */
  static key(prefix: Prefix): string {
    return formatPrefix(maskPrefix(prefix));
  }

  has(key: string): boolean {
    return this.#owner.has(key);
  }

  /** The prefix moves to `slot` from whoever held it. Throws when the table is full. */
  insert(prefix: Prefix, slot: number): void {
    const masked = maskPrefix(prefix);
    const key = formatPrefix(masked);
    const old = this.#owner.get(key);
    if (old?.slot === slot) return;
    if (!old && this.#owner.size >= this.capacity) {
      throw new Error(`allowed IP ${key}: the table is full, it holds ${this.capacity} prefixes`);
    }
    if (old) this.#bySlot.get(old.slot)?.delete(key);
    this.#write(masked.ip);
    if (this.#asm.exports.trieInsert(this.#address, masked.bits, family(masked.ip), slot) !== 1) {
      throw new Error(`allowed IP ${key}: the trie refused it`);
    }
    this.#sealer?.allow(masked.ip, masked.bits, slot);
    this.#owner.set(key, { prefix: masked, slot });
    let own = this.#bySlot.get(slot);
    if (!own) {
      own = new Map();
      this.#bySlot.set(slot, own);
    }
    own.set(key, masked);
  }

  /** Takes the prefix from `slot`; nothing happens when another peer holds it. */
  remove(prefix: Prefix, slot: number): void {
    const masked = maskPrefix(prefix);
    const key = formatPrefix(masked);
    if (this.#owner.get(key)?.slot !== slot) return;
    this.#owner.delete(key);
    this.#bySlot.get(slot)?.delete(key);
    this.#write(masked.ip);
    this.#asm.exports.trieRemove(this.#address, masked.bits, family(masked.ip));
    this.#sealer?.disallow(masked.ip, masked.bits);
  }

  removeAll(slot: number): void {
    const own = this.#bySlot.get(slot);
    if (!own) return;
    for (const prefix of [...own.values()]) this.remove(prefix, slot);
    this.#bySlot.delete(slot);
  }

  /** Texts of a peer's prefixes, in the order in which they came. */
  list(slot: number): string[] {
    return [...(this.#bySlot.get(slot)?.keys() ?? [])];
  }

  count(slot: number): number {
    return this.#bySlot.get(slot)?.size ?? 0;
  }

  keys(): Iterable<string> {
    return this.#owner.keys();
  }

  /** Peer slot of the longest prefix that holds `ip`, or -1. */
  lookup(ip: IP): number {
    this.#write(ip);
    return ip.length === 4
      ? this.#asm.exports.trieLookup4(this.#address)
      : this.#asm.exports.trieLookup6(this.#address);
  }

  #write(ip: IP): void {
    this.#asm.u8.set(ip, this.#address);
  }
}

function family(ip: IP): number {
  return ip.length === 4 ? 4 : 6;
}
