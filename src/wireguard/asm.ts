// Signatures of asm/session.ts and asm/trie.ts.
declare module "../crypto/wasm.ts" {
  interface AsmExports {
    sessionTableSize(maxSessions: number): number;
    sessionTableInit(base: number, maxSessions: number): void;
    sessionTableBase(): number;
    sessionTableSlots(): number;
    sessionAddress(slot: number): number;
    sessionInstall(
      slot: number,
      sendKey: number,
      recvKey: number,
      localIndex: number,
      remoteIndex: number,
      peerSlot: number,
    ): void;
    sessionNeverSeal(slot: number): void;
    sessionWipe(slot: number): void;
    sessionWipeAll(): void;
    sessionPeer(slot: number): number;
    sessionSendCounterLo(slot: number): number;
    sessionSendCounterHi(slot: number): number;
    sessionCanSend(slot: number): number;
    sessionSeal(slot: number, p: number, len: number): number;
    sessionSealRun(slot: number, p: number, n: number, stride: number, len: number): number;
    sessionTakeRun(slot: number, p: number, n: number, stride: number, len: number): number;
    sessionSealPiece(slot: number, p: number, n: number, stride: number, len: number): void;
    sessionOpenPiece(p: number, len: number, segment: number, first: number, count: number, verdicts: number): void;
    sessionOpen(p: number, len: number): number;
    sessionAccept(p: number, len: number, verdict: number): number;

    trieSize(nodes: number): number;
    trieInit(base: number, nodes: number): void;
    trieFree(): number;
    trieInsert(prefix: number, bits: number, family: number, slot: number): number;
    trieRemove(prefix: number, bits: number, family: number): number;
    trieRemoveSlot(slot: number): number;
    trieLookup4(address: number): number;
    trieLookup6(address: number): number;
  }
}

/** `sessionOpen`: the low 24 bits are the session slot, this bit says that it is the first message on the session. */
export const OPEN_FIRST = 1 << 24;
export const OPEN_SLOT_MASK = OPEN_FIRST - 1;

/** Negative results of `sessionOpen`: reasons to drop. */
export const OPEN_TOO_SHORT = -1;
export const OPEN_NOT_TRANSPORT = -2;
export const OPEN_NO_SESSION = -3;
export const OPEN_BAD_TAG = -4;
export const OPEN_REPLAY = -5;
