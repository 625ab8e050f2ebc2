// The STUN server: tells a node from which address and port its datagram came. Everything but a node's own request is
// dropped in silence (spec/derp-wire.md section 15).
import { parseIP } from "../wire/ip.ts";
import { encodeStunResponse, isStun, parseStunRequest, STUN_PORT } from "../wire/stun.ts";

export interface StunOptions {
  /** Address to listen on: "0.0.0.0", or "::" for IPv4 and IPv6 together. */
  host: string;
  /** Default 3478; 0 asks the kernel. */
  port?: number;
}

export interface StunServer {
  port: number;
  /** Counts by the names of spec/derp-wire.md section 18. */
  stats(): Record<string, number>;
  close(): void;
}

/** Rejects with one sentence when the address cannot be bound. */
export async function startStun({ host, port = STUN_PORT }: StunOptions): Promise<StunServer> {
  let success = 0;
  let notStun = 0;
  let writeErrors = 0;
  let ipv4 = 0;
  let ipv6 = 0;
  const socket = await bind(host, port, (reply, datagram, fromPort, from) => {
    const txid = parseStunRequest(datagram);
    const ip = txid && parseIP(from.split("%")[0]!);
    if (!txid || !ip) {
      if (!isStun(datagram)) notStun++;
      return;
    }
    const answer = encodeStunResponse(txid, ip, fromPort);
    if (answer.length === 32) ipv4++;
    else ipv6++;
    if (reply(answer, fromPort, from)) success++;
    else writeErrors++;
  });
  return {
    port: socket.port,
    stats: () => ({
      'stun_counter_requests{disposition="success"}': success,
      'stun_counter_requests{disposition="not_stun"}': notStun,
      'stun_counter_requests{disposition="write_error"}': writeErrors,
      'stun_counter_addrfamily{family="ipv4"}': ipv4,
      'stun_counter_addrfamily{family="ipv6"}': ipv6,
    }),
    close: () => socket.close(),
  };
}

type Reply = (answer: Uint8Array, port: number, address: string) => boolean;

async function bind(
  hostname: string,
  port: number,
  onDatagram: (reply: Reply, datagram: Uint8Array, port: number, address: string) => void,
) {
  try {
    return await Bun.udpSocket({
      hostname,
      port,
      socket: {
        data(socket, datagram, fromPort, from) {
          onDatagram((answer, toPort, to) => send(socket, answer, toPort, to), datagram, fromPort, from);
        },
        // An ICMP error for an answer to someone who is gone concerns nobody.
        error() {},
      },
    });
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new Error(
      `cannot listen for STUN on ${hostname} UDP port ${port}: ${why}; choose another with --stun or turn it off`,
    );
  }
}

function send(socket: Bun.udp.Socket<"uint8array" | "buffer">, data: Uint8Array, port: number, to: string): boolean {
  try {
    return socket.send(data, port, to);
  } catch {
    return false;
  }
}
