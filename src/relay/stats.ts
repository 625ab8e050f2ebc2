// What the relay counts, by the names of spec/derp-wire.md section 18 (there with the prefix `derp_`).

const DROP_REASONS = ["unknown_dest", "unknown_dest_on_fwd", "gone_disconnected", "queue_head"] as const;
export type DropReason = (typeof DROP_REASONS)[number];
/** Weight of the newest packet in the average queue duration. */
const ALPHA = 0.1;

interface Drops {
  packets: [other: number, disco: number];
  bytes: [other: number, disco: number];
}

export class Counters {
  accepts = 0;
  bytes_received = 0;
  bytes_sent = 0;
  packets_received = 0;
  packets_sent = 0;
  packets_received_disco = 0;
  packets_received_other = 0;
  packets_forwarded_in = 0;
  unknown_frames = 0;
  home_moves_in = 0;
  home_moves_out = 0;
  got_ping = 0;
  sent_pong = 0;
  peer_gone_disconnected_frames = 0;
  peer_gone_not_here_frames = 0;
  sclient_write_timeouts = 0;
  counter_total_dup_client_conns = 0;
  websocket_accepts = 0;
  fast_starts = 0;
  /** Connections that never logged in: refused for being too many, out of time, wrong, or not admitted. */
  logins_busy = 0;
  logins_timed_out = 0;
  logins_malformed = 0;
  logins_refused = 0;
  /** Logged-in connections closed for breaking the protocol. */
  protocol_errors = 0;
  /** Clients that did not answer a ping. */
  clients_vanished = 0;
  average_queue_duration_ms = 0;
  #drops = new Map<DropReason, Drops>(
    DROP_REASONS.map((reason) => [reason, { packets: [0, 0], bytes: [0, 0] }] as const),
  );

  drop(reason: DropReason, disco: boolean, bytes: number): void {
    const drops = this.#drops.get(reason)!;
    const kind = disco ? 1 : 0;
    drops.packets[kind]++;
    drops.bytes[kind] += bytes;
  }

  sent(bytes: number, waitedMs: number): void {
    this.packets_sent++;
    this.bytes_sent += bytes;
    this.average_queue_duration_ms += ALPHA * (waitedMs - this.average_queue_duration_ms);
  }

  /** Flat, with labels in the name as Prometheus writes them: `packets_dropped{reason="queue_head",kind="disco"}`. */
  snapshot(): Record<string, number> {
    const { packets_received_disco, packets_received_other, ...plain } = this;
    const out: Record<string, number> = {};
    for (const [name, value] of Object.entries(plain)) if (typeof value === "number") out[name] = value;
    out['counter_packets_received_kind{kind="disco"}'] = packets_received_disco;
    out['counter_packets_received_kind{kind="other"}'] = packets_received_other;
    for (const [reason, drops] of this.#drops) {
      for (const [i, kind] of ["other", "disco"].entries()) {
        out[`packets_dropped{reason="${reason}",kind="${kind}"}`] = drops.packets[i]!;
        out[`bytes_dropped{reason="${reason}",kind="${kind}"}`] = drops.bytes[i]!;
      }
    }
    return out;
  }
}
