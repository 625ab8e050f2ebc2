// Times and limits of the protocol (WireGuard paper section 6.1; spec/datapath-wire.md 1.9). Milliseconds.

export const REKEY_AFTER_TIME = 120_000;
export const REJECT_AFTER_TIME = 180_000;
export const REKEY_TIMEOUT = 5_000;
export const KEEPALIVE_TIMEOUT = 10_000;
/** Age up to which a cookie is used, and after which its maker changes the secret behind it. */
export const COOKIE_REFRESH_TIME = 120_000;
/** REKEY_ATTEMPT_TIME (90 s) / REKEY_TIMEOUT. */
export const MAX_HANDSHAKE_ATTEMPTS = 18;
/** Added at random to the retransmission of handshakes, 0 to this. */
export const MAX_JITTER = 333;
/** At least so long between two accepted initiations of a peer. */
export const MIN_INITIATION_INTERVAL = 20;
/** After this long without a new session all keys are wiped. */
export const WIPE_AFTER_TIME = 3 * REJECT_AFTER_TIME;
/** A received packet makes the initiator rekey when the session is older than this. */
export const REKEY_ON_RECEIVE_AFTER_TIME = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
/** REKEY_AFTER_MESSAGES is 2^60: the high 32 bits of the counter reach this. */
export const REKEY_AFTER_MESSAGES_HIGH = 2 ** 28;

/** Packets per peer that wait for a session; the oldest is dropped. */
export const MAX_STAGED_PACKETS = 128;
/** Bytes of all waiting packets together. */
export const MAX_STAGED_BYTES = 32 << 20;
