// The first bytes of a connection, before its real protocol takes over: an HTTP head, a handshake frame.
import type { Duplex } from "node:stream";

export interface PrefaceOptions<T> {
  /** Looks at all bytes so far. Null: not enough yet. What it throws ends the connection; it must bound the bytes itself. */
  parse: (buffered: Uint8Array) => T | null;
  /** Milliseconds. */
  timeout: number;
  signal?: AbortSignal | undefined;
  /** Bytes that were read before. */
  head?: Uint8Array;
  /** Sentences for what can go wrong. */
  errors: { late: string; closed: string; broken: (reason: string) => string; calledOff: string };
}

/** Resolves with the socket paused and without listeners of ours. When it rejects, the socket is destroyed. */
export function readPreface<T>(socket: Duplex, options: PrefaceOptions<T>): Promise<T> {
  const { parse, timeout, signal, head, errors } = options;
  return new Promise((resolve, reject) => {
    let buffered: Uint8Array = new Uint8Array(0);
    const timer = setTimeout(() => fail(new Error(errors.late)), timeout);
    const onError = (error: Error) => fail(new Error(errors.broken(error.message || String(error))));
    const onClose = () => fail(new Error(errors.closed));
    const onAbort = () => fail(new Error(errors.calledOff));

    function release(): void {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
      socket.off("data", onData);
      socket.off("error", onError);
      socket.off("close", onClose);
      socket.off("end", onClose);
    }

    function fail(error: unknown): void {
      release();
      // A socket that is being torn down may still report errors.
      socket.on("error", () => {});
      socket.destroy();
      reject(error);
    }

    function onData(chunk: Uint8Array): void {
      buffered = Buffer.concat([buffered, chunk]);
      let value: T | null;
      try {
        value = parse(buffered);
      } catch (error) {
        fail(error);
        return;
      }
      if (value === null) return;
      release();
      socket.pause();
      resolve(value);
    }

    socket.on("error", onError);
    socket.on("close", onClose);
    socket.on("end", onClose);
    socket.on("data", onData);
    signal?.addEventListener("abort", onAbort, { once: true });
    socket.resume();
    if (signal?.aborted) onAbort();
    else if (socket.destroyed) onClose();
    else if (head && head.length > 0) onData(head);
  });
}
