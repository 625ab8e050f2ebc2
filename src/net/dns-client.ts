// One question to one name server, by TCP: every server speaks it, answers of any size fit, and nobody off the way can
// answer in its place (RFC 7766: length u16, message).
import { connect } from "node:net";
import { formatIP, parseAddrPort } from "../wire/ip.ts";

/** Throws with one sentence when there is no answer. `server`: "192.0.2.53:53". */
export function askNameServer(server: string, message: Uint8Array, signal: AbortSignal): Promise<Uint8Array> {
  const address = parseAddrPort(server);
  if (!address) throw new RangeError(`${server} is no address of a name server`);
  return new Promise((resolve, reject) => {
    const socket = connect({ host: formatIP(address.ip), port: address.port });
    let received = Buffer.alloc(0);
    const end = (settle: () => void) => {
      signal.removeEventListener("abort", onAbort);
      socket.destroy();
      settle();
    };
    const fail = (why: string) => end(() => reject(new Error(`the name server ${server} ${why}`)));
    const onAbort = () => fail("did not answer in time");
    if (signal.aborted) return onAbort();
    signal.addEventListener("abort", onAbort);
    socket.on("connect", () => {
      const head = Buffer.alloc(2);
      head.writeUInt16BE(message.length);
      socket.write(Buffer.concat([head, message]));
    });
    socket.on("data", (chunk: Buffer) => {
      received = Buffer.concat([received, chunk]);
      if (received.length < 2) return;
      const length = received.readUInt16BE(0);
      if (received.length >= 2 + length) end(() => resolve(Uint8Array.from(received.subarray(2, 2 + length))));
    });
    socket.on("error", (error) => fail(`cannot be reached: ${error.message}`));
    socket.on("close", () => fail("closed the connection without an answer"));
  });
}
