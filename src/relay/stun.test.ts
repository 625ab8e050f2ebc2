import { expect, test } from "bun:test";
import { networkInterfaces } from "node:os";
import { randomBytes } from "../crypto/keys.ts";
import { formatAddrPort } from "../wire/ip.ts";
import { encodeStunRequest, parseStunResponse } from "../wire/stun.ts";
import { type StunServer, startStun } from "./stun.ts";

const hasIPv6 = Object.values(networkInterfaces()).some((list) => list?.some((entry) => entry.family === "IPv6"));
if (!hasIPv6) console.error("SKIP: STUN over IPv6: this machine has no IPv6 address");

/** Sends the datagrams and returns what comes back until `count` answers are there, or until a last request is answered. */
async function ask(server: StunServer, host: string, datagrams: Uint8Array[]) {
  const answers: Uint8Array[] = [];
  const last = encodeStunRequest(randomBytes(12));
  let isDone = () => {};
  const done = new Promise<void>((resolve) => {
    isDone = resolve;
  });
  const socket = await Bun.udpSocket({
    hostname: host,
    port: 0,
    socket: {
      data(_socket, data) {
        if (Buffer.compare(data.subarray(8, 20), last.subarray(8, 20)) === 0) isDone();
        else answers.push(new Uint8Array(data));
      },
    },
  });
  // UDP on loopback keeps its order, so the answer to the last request tells that there are no more.
  for (const datagram of [...datagrams, last]) socket.send(datagram, server.port, host);
  await done;
  const { port } = socket;
  socket.close();
  return { answers, port };
}

for (const [listenOn, host] of [
  ["127.0.0.1", "127.0.0.1"],
  ["0.0.0.0", "127.0.0.1"],
  ["::", "127.0.0.1"],
  ["::", "::1"],
] as const)
  test.skipIf(listenOn === "::" && !hasIPv6)(
    `on ${listenOn} a node at ${host} learns its address and port`,
    async () => {
      const server = await startStun({ host: listenOn, port: 0 });
      try {
        const txid = randomBytes(12);
        const { answers, port } = await ask(server, host, [encodeStunRequest(txid)]);
        expect(answers.length).toBe(1);
        const found = parseStunResponse(answers[0]!)!;
        expect(found.txid).toEqual(txid);
        expect(formatAddrPort(found.ip, found.port)).toBe(host === "::1" ? `[::1]:${port}` : `127.0.0.1:${port}`);
        expect(answers[0]!.length).toBe(host === "::1" ? 44 : 32);
        const family = host === "::1" ? "ipv6" : "ipv4";
        expect(server.stats()[`stun_counter_addrfamily{family="${family}"}`]).toBe(2);
      } finally {
        server.close();
      }
    },
  );

test("everything but a node's own request gets no answer", async () => {
  const server = await startStun({ host: "127.0.0.1", port: 0 });
  try {
    const damaged = encodeStunRequest(randomBytes(12));
    damaged[39]! ^= 1;
    const generic = damaged.slice(0, 20);
    generic[3] = 0;
    const junk = [damaged, generic, new Uint8Array(0), randomBytes(1), randomBytes(40), randomBytes(1400)];
    const { answers } = await ask(server, "127.0.0.1", junk);
    expect(answers).toEqual([]);
    expect(server.stats()['stun_counter_requests{disposition="success"}']).toBe(1);
    expect(server.stats()['stun_counter_requests{disposition="not_stun"}']).toBeGreaterThanOrEqual(3);
  } finally {
    server.close();
  }
});

test("a port in use is said in one sentence", async () => {
  const server = await startStun({ host: "127.0.0.1", port: 0 });
  try {
    await expect(startStun({ host: "127.0.0.1", port: server.port })).rejects.toThrow(
      `cannot listen for STUN on 127.0.0.1 UDP port ${server.port}`,
    );
  } finally {
    server.close();
  }
});
