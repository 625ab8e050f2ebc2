// Allowed IPs: longest-prefix match from address to peer slot, IPv4 and IPv6, as a path-compressed binary trie.
//
// Keys are two u64 in host order, the first address byte on top; an IPv4 key is the top 32 bits of the first word. The
// host gives one block of `trieSize(n)` zeroed bytes for n nodes. Node 0 is "none". A node is
//
//   0   u64 key, high word    8   u64 key, low word (bits behind the prefix are zero)
//   16  u32 child 0           20  u32 child 1 (by the first bit behind the prefix)
//   24  u32 parent            28  i32 peer slot, -1: the node only branches
//   32  u32 prefix length     36  u32 1 in use
//
// A branching node has two children, so p prefixes need fewer than 2 p nodes. Free nodes are chained through child 0.

const NODE: usize = 48;

let nodes: usize = 0;
let capacity: u32 = 0;
let used: u32 = 0;
let fresh: u32 = 1;
let freeList: u32 = 0;
let root4: u32 = 0;
let root6: u32 = 0;

/** Bytes for `n` nodes. */
export function trieSize(n: u32): usize {
  return (<usize>n + 1) * NODE;
}

/** `base`: 8-aligned, `trieSize(n)` zeroed bytes. There is one trie per module instance. */
export function trieInit(base: usize, n: u32): void {
  nodes = base;
  capacity = n;
  used = 0;
  fresh = 1;
  freeList = 0;
  root4 = 0;
  root6 = 0;
}

/** Nodes that are not in use. */
export function trieFree(): u32 {
  return capacity - used;
}

// @ts-ignore: decorator
@inline
function at(node: u32): usize {
  return nodes + <usize>node * NODE;
}

// @ts-ignore: decorator
@inline
function loadBE(p: usize): u64 {
  return bswap<u64>(load<u64>(p));
}

// @ts-ignore: decorator
@inline
function keyHigh(p: usize, family: i32): u64 {
  return family == 4 ? (<u64>bswap<u32>(load<u32>(p))) << 32 : loadBE(p);
}

// @ts-ignore: decorator
@inline
function keyLow(p: usize, family: i32): u64 {
  return family == 4 ? 0 : loadBE(p + 8);
}

/** A word with its first `bits` bits kept; bits may be negative or above 64. */
// @ts-ignore: decorator
@inline
function keep(word: u64, bits: i32): u64 {
  return bits <= 0 ? 0 : bits >= 64 ? word : word & ~((<u64>-1) >> <u64>bits);
}

// @ts-ignore: decorator
@inline
function bitAt(high: u64, low: u64, bit: u32): u32 {
  return bit < 64 ? <u32>((high >> <u64>(63 - bit)) & 1) : <u32>((low >> <u64>(127 - bit)) & 1);
}

/** How many leading bits two keys share, 0 to 128. */
// @ts-ignore: decorator
@inline
function commonBits(high: u64, low: u64, node: usize): u32 {
  const difference = high ^ load<u64>(node);
  return difference != 0 ? <u32>clz<u64>(difference) : 64 + <u32>clz<u64>(low ^ load<u64>(node, 8));
}

/** The caller has seen that a node is free. */
function allocate(high: u64, low: u64, bits: u32, slot: i32): u32 {
  let node = freeList;
  if (node != 0) freeList = load<u32>(at(node), 16);
  else node = fresh++;
  used++;
  const n = at(node);
  store<u64>(n, high);
  store<u64>(n, low, 8);
  store<u64>(n, 0, 16);
  store<u32>(n, 0, 24);
  store<i32>(n, slot, 28);
  store<u32>(n, bits, 32);
  store<u32>(n, 1, 36);
  return node;
}

function release(node: u32): void {
  const n = at(node);
  memory.fill(n, 0, NODE);
  store<u32>(n, freeList, 16);
  freeList = node;
  used--;
}

/** Puts `child` (0: none) where `old` hangs: below `parent`, or at the root when parent is 0. */
function replaceChild(parent: u32, old: u32, child: u32, family: i32): void {
  if (parent == 0) {
    if (family == 4) root4 = child;
    else root6 = child;
  } else {
    const p = at(parent);
    if (load<u32>(p, 16) == old) store<u32>(p, child, 16);
    else store<u32>(p, child, 20);
  }
  if (child != 0) store<u32>(at(child), parent, 24);
}

// @ts-ignore: decorator
@inline
function hang(parent: u32, side: u32, child: u32): void {
  store<u32>(at(parent) + 16 + ((<usize>side) << 2), child);
  store<u32>(at(child), parent, 24);
}

/**
 * Gives a prefix to a peer slot; whoever had it before loses it. `prefix` points at 4 or 16 address bytes; bits behind
 * the prefix are ignored. 1, 0: the table is full and nothing changed, -1: family or length is wrong.
 */
export function trieInsert(prefix: usize, bits: u32, family: i32, slot: i32): i32 {
  if ((family != 4 && family != 6) || bits > <u32>(family == 4 ? 32 : 128) || slot < 0) return -1;
  const high = keep(keyHigh(prefix, family), <i32>bits);
  const low = keep(keyLow(prefix, family), <i32>bits - 64);

  let parent: u32 = 0;
  let node = family == 4 ? root4 : root6;
  let common: u32 = 0;
  while (node != 0) {
    const n = at(node);
    const nodeBits = load<u32>(n, 32);
    common = min(min(commonBits(high, low, n), nodeBits), bits);
    if (common < nodeBits) break;
    if (nodeBits == bits) {
      store<i32>(n, slot, 28);
      return 1;
    }
    parent = node;
    node = load<u32>(n + 16 + ((<usize>bitAt(high, low, nodeBits)) << 2));
  }

  const branch = node != 0 && common < bits;
  if (used + (branch ? 2 : 1) > capacity) return 0;
  const leaf = allocate(high, low, bits, slot);
  if (node == 0) {
    if (parent == 0) replaceChild(0, 0, leaf, family);
    else hang(parent, bitAt(high, low, load<u32>(at(parent), 32)), leaf);
    return 1;
  }
  const n = at(node);
  if (!branch) {
    replaceChild(parent, node, leaf, family);
    hang(leaf, bitAt(load<u64>(n), load<u64>(n, 8), bits), node);
    return 1;
  }
  const fork = allocate(keep(high, <i32>common), keep(low, <i32>common - 64), common, -1);
  replaceChild(parent, node, fork, family);
  const side = bitAt(high, low, common);
  hang(fork, side, leaf);
  hang(fork, 1 - side, node);
  return 1;
}

/** Takes a prefix away; the slot that had it, or -1 when nobody had. */
export function trieRemove(prefix: usize, bits: u32, family: i32): i32 {
  if ((family != 4 && family != 6) || bits > <u32>(family == 4 ? 32 : 128)) return -1;
  const high = keep(keyHigh(prefix, family), <i32>bits);
  const low = keep(keyLow(prefix, family), <i32>bits - 64);
  let node = family == 4 ? root4 : root6;
  while (node != 0) {
    const n = at(node);
    const nodeBits = load<u32>(n, 32);
    if (nodeBits > bits || commonBits(high, low, n) < nodeBits) return -1;
    if (nodeBits == bits) {
      const slot = load<i32>(n, 28);
      if (slot >= 0) forget(node, family);
      return slot;
    }
    node = load<u32>(n + 16 + ((<usize>bitAt(high, low, nodeBits)) << 2));
  }
  return -1;
}

/** Makes a node hold nothing, and takes it and its parent out of the trie where they no longer branch. */
function forget(node: u32, family: i32): void {
  store<i32>(at(node), -1, 28);
  while (node != 0) {
    const n = at(node);
    const child0 = load<u32>(n, 16);
    const child1 = load<u32>(n, 20);
    if (load<i32>(n, 28) >= 0 || (child0 != 0 && child1 != 0)) return;
    const parent = load<u32>(n, 24);
    replaceChild(parent, node, child0 != 0 ? child0 : child1, family);
    release(node);
    node = parent;
  }
}

/** Takes all prefixes of a slot away; how many there were. Looks at every node: for removal of a peer, not for packets. */
export function trieRemoveSlot(slot: i32): u32 {
  let removed: u32 = 0;
  for (let node: u32 = 1; node < fresh; node++) {
    const n = at(node);
    if (!load<u32>(n, 36) || load<i32>(n, 28) != slot) continue;
    let top = node;
    while (load<u32>(at(top), 24) != 0) top = load<u32>(at(top), 24);
    forget(node, top == root4 ? 4 : 6);
    removed++;
  }
  return removed;
}

/** Slot of the longest prefix that holds the IPv4 address at `address`; -1: none. */
export function trieLookup4(address: usize): i32 {
  const high = keyHigh(address, 4);
  let slot = -1;
  let node = root4;
  while (node != 0) {
    const n = at(node);
    const bits = load<u32>(n, 32);
    if (<u32>clz<u64>(high ^ load<u64>(n)) < bits) return slot;
    const here = load<i32>(n, 28);
    if (here >= 0) slot = here;
    if (bits >= 32) return slot;
    node = load<u32>(n + 16 + ((<usize>(high >> <u64>(63 - bits)) & 1) << 2));
  }
  return slot;
}

/** The same for the IPv6 address at `address`. */
export function trieLookup6(address: usize): i32 {
  const high = loadBE(address);
  const low = loadBE(address + 8);
  let slot = -1;
  let node = root6;
  while (node != 0) {
    const n = at(node);
    const bits = load<u32>(n, 32);
    if (commonBits(high, low, n) < bits) return slot;
    const here = load<i32>(n, 28);
    if (here >= 0) slot = here;
    if (bits >= 128) return slot;
    node = load<u32>(n + 16 + ((<usize>bitAt(high, low, bits)) << 2));
  }
  return slot;
}
