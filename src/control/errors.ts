// What commands of administrators answer when they cannot be done.

export type ErrorStatus = 400 | 401 | 403 | 404 | 409 | 412 | 429 | 501;

/** The command cannot be done; the message says why, in one sentence. */
export class CommandError extends Error {
  override name = "CommandError";
  constructor(
    readonly status: ErrorStatus,
    message: string,
    /** What an API adds to the message: tests of a policy that failed. */
    readonly data: unknown = undefined,
    /** Milliseconds to wait before the next attempt; 0: nothing to wait for. */
    readonly retryAfter = 0,
  ) {
    super(message);
  }
}
