// Signatures of asm/packet.ts, filter.ts, tx.ts, rx.ts and counters.ts.
declare module "../crypto/wasm.ts" {
  interface AsmExports {
    ipLength(p: number, len: number): number;
    parsedPtr(): number;
    parsePacket(p: number, len: number): number;
    checksum(p: number, len: number): number;
    splitPtr(): number;
    splitPrepare(p: number, vnet: number): number;
    splitWrite(out: number, first: number, count: number, stride: number, padded: number, lastPadded: number): void;
    groSetup(vnet: number, tcp: number, udp: number, baseLow: number, baseHigh: number): void;
    groPtr(): number;
    groFull(): number;
    groPending(): number;
    groAdd(p: number, len: number): void;
    groFlush(): number;

    filterSet(pointer: number): void;
    filterIn(): number;
    filterOut(): number;
    filterForgetFlows(): void;
    filterShareFlows(): void;
    filterNews(): number;
    filterTakeNews(): number;
    filterLearn(entry: number): void;

    dropCounters(): number;
    txPrepare(p: number, len: number, vnet: number): number;
    txFlow(p: number, len: number): number;
    rxAccounts(): number;
    rxAccountCount(): number;
    rxPeer(p: number, len: number): number;
    rxEcn(ecn: number): void;
    rxVerdicts(p: number): void;
    rxOpen(p: number, len: number, segment: number, from: number): number;
  }
}

/** Names of the counters at `dropCounters()`, in order (asm/counters.ts). */
export const ASM_DROPS = [
  "tun-malformed",
  "tun-no-peer",
  "tun-filter",
  "tun-offload",
  "rx-no-session",
  "rx-bad-tag",
  "rx-replay",
  "rx-malformed",
  "rx-source",
  "rx-filter",
  "tun-queue",
  "rx-queue",
  "rx-ecn",
] as const;
