// One question to one name server, by TCP: every server speaks it, answers of any size fit, and nobody off the way can
// answer in its place (RFC 7766: length u16, message). And which name servers to ask, by the system's resolver.
import { Resolver } from "node:dns/promises";
import { connect } from "node:net";
import { formatIP, parseAddrPort } from "../wire/ip.ts";

const MAX_ALIASES = 8;

/** Questions to a resolver; all throw where there is no such record. */
export type Lookup = Pick<Resolver, "resolveCname" | "resolveNs" | "resolve4" | "resolve6">;

/** The system's resolver. */
export function systemLookup(): Lookup {
  return new Resolver({ timeout: 2000, tries: 2 });
}

/**
 * Where a record must be seen: the name that it stands at once aliases have been followed (ACME allows its challenges to be
 * delegated so, RFC 8555 section 8.4), and the name servers of that name's zone, "192.0.2.53:53". None of them when nothing
 * above the name but a top-level domain is known.
 */
export async function authorityOf(
  name: string,
  lookup: Lookup,
  port = 53,
): Promise<{ name: string; servers: readonly string[] }> {
  let at = name;
  for (let i = 0; i < MAX_ALIASES; i++) {
    const [alias] = await lookup.resolveCname(at).catch(() => []);
    if (alias === undefined || alias === at) break;
    at = alias;
  }
  const labels = at.split(".");
  for (let i = 0; i <= labels.length - 2; i++) {
    const hosts = await lookup.resolveNs(labels.slice(i).join(".")).catch(() => []);
    if (hosts.length === 0) continue;
    const addresses = await Promise.all(
      hosts.map(async (host) => {
        const v4 = await lookup.resolve4(host).catch(() => []);
        const v6 = v4.length > 0 ? [] : await lookup.resolve6(host).catch(() => []);
        return [...v4.map((ip) => `${ip}:${port}`), ...v6.map((ip) => `[${ip}]:${port}`)];
      }),
    );
    return { name: at, servers: addresses.flat() };
  }
  return { name: at, servers: [] };
}

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
