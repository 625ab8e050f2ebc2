// Why packets were dropped inside the module: u32 counters, read by the host.

const counters: usize = memory.data(64, 16);

export const DROP_TUN_MALFORMED: i32 = 0;
export const DROP_TUN_NO_PEER: i32 = 1;
export const DROP_TUN_FILTER: i32 = 2;
export const DROP_TUN_OFFLOAD: i32 = 3;
export const DROP_RX_NO_SESSION: i32 = 4;
export const DROP_RX_BAD_TAG: i32 = 5;
export const DROP_RX_REPLAY: i32 = 6;
export const DROP_RX_MALFORMED: i32 = 7;
export const DROP_RX_SOURCE: i32 = 8;
export const DROP_RX_FILTER: i32 = 9;
// 10 and 11, what did not fit into the queues of the TUN and of the socket, are counted by the host.
export const DROP_RX_ECN: i32 = 12;

/** Where the counters are, in the order of the names above. */
export function dropCounters(): usize {
  return counters;
}

// @ts-ignore: decorator
@inline
export function countDrop(reason: i32): void {
  const p = counters + (<usize>reason << 2);
  store<u32>(p, load<u32>(p) + 1);
}
