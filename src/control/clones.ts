// Two machines with the same keys, because a disk or a container was copied, take one node's map stream from each other
// without end, and neither works. That cannot be repaired here, but said: a stream that is still open is taken over by
// another connection now and then when a machine changes networks, and again and again only by a clone.
import type { Millis } from "./model.ts";

/** Take-overs within the period that raise suspicion, and milliseconds. */
const LIMIT = 5;
const PERIOD = 60_000;

interface Seen {
  connection: WeakRef<object>;
  since: Millis;
  takeovers: number;
}

export class Clones {
  private readonly nodes = new Map<number, Seen>();

  /** A node opens its map stream while another of it is open (`replaces`), or not. True: once in a period, too often. */
  isSuspicious(nodeId: number, connection: object, replaces: boolean, now: Millis): boolean {
    const seen = this.nodes.get(nodeId);
    const isTakeover = replaces && seen?.connection.deref() !== connection;
    const isFresh = !seen || now - seen.since > PERIOD;
    const takeovers = (isFresh ? 0 : seen.takeovers) + (isTakeover ? 1 : 0);
    this.nodes.set(nodeId, { connection: new WeakRef(connection), since: isFresh ? now : seen.since, takeovers });
    return isTakeover && takeovers === LIMIT;
  }

  forget(nodeId: number): void {
    this.nodes.delete(nodeId);
  }
}
