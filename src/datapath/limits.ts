// What a datapath holds at most.

export const MAX_PEERS = 8192;
/** All peers together. */
export const MAX_ALLOWED_IPS = 65536;
export const FILTER_BYTES = 8 << 20;
/** Sessions, allowed IPs, filter, buffers: sizes are limits, and the kernel backs only the pages that are touched. */
export const MEMORY_PAGES = (192 << 20) >> 16;
