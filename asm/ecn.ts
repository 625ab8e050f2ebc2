// Explicit congestion notification of inner packets (RFC 3168) across the tunnel (RFC 6040, normal mode).

/** Not ECN-capable; ECT(1), ECT(0); congestion experienced. */
const ECT1: u32 = 1;
const ECT0: u32 = 2;
export const CE: u32 = 3;

/** The ECN field of the IP packet at `p`. */
// @ts-ignore: decorator
@inline
export function ecnOf(p: usize): u32 {
  return load<u8>(p) >> 4 == 4 ? <u32>load<u8>(p, 1) & 3 : (<u32>load<u8>(p, 1) >> 4) & 3;
}

/** Sets the ECN field. The IPv4 header checksum follows (RFC 1624). */
export function ecnSet(p: usize, ecn: u32): void {
  if (load<u8>(p) >> 4 == 6) {
    store<u8>(p, (load<u8>(p, 1) & 0xcf) | <u8>(ecn << 4), 1);
    return;
  }
  const before = <u32>load<u16>(p);
  store<u8>(p, (load<u8>(p, 1) & 0xfc) | <u8>ecn, 1);
  let sum = (~(<u32>load<u16>(p, 10)) & 0xffff) + (~before & 0xffff) + <u32>load<u16>(p);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  store<u16>(p, <u16>~sum, 10);
}

/** What the decapsulated packet at `p` has to carry, given the outer field. False: it must be dropped (RFC 6040, 4.2). */
export function ecnDecapsulate(p: usize, outer: u32): bool {
  const inner = ecnOf(p);
  if (inner == 0) return outer != CE;
  if (outer == CE && inner != CE) ecnSet(p, CE);
  else if (outer == ECT1 && inner == ECT0) ecnSet(p, ECT1);
  return true;
}
