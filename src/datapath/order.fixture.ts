// One of two ends that send numbered datagrams to each other: `bun order.fixture.ts OWN OTHER PORT COUNT SIZE PER_MS`. Says
// "bound" and begins with the first byte of standard input. Prints {received, reordered, duplicates} when all of the other's
// came, or none for some seconds.
const [own = "", other = "", port = "", count = "", size = "", perMs = ""] = process.argv.slice(2);
/** Nothing has come for so long: the rest is lost. */
const SILENCE_MS = 5000;
const total = Number(count);
const seen = new Uint8Array(total);
const result = { received: 0, reordered: 0, duplicates: 0 };
let highest = -1;
let last = performance.now();

const socket = await Bun.udpSocket({
  hostname: own,
  port: Number(port),
  socket: {
    data(_socket, data) {
      last = performance.now();
      const n = data.readUInt32LE(0);
      if (seen[n]) result.duplicates++;
      else result.received++;
      seen[n] = 1;
      if (n < highest) result.reordered++;
      highest = Math.max(highest, n);
    },
  },
});
console.log("bound");
await Bun.stdin.stream().getReader().read();
const data = Buffer.alloc(Number(size));
const start = performance.now();
for (let sent = 0; sent < total; ) {
  const due = Math.min(total, Math.floor((performance.now() - start) * Number(perMs)), sent + 16);
  for (; sent < due; sent++) {
    data.writeUInt32LE(sent, 0);
    socket.send(data, Number(port), other);
  }
  await Bun.sleep(1);
}
last = performance.now();
while (result.received < total && performance.now() - last < SILENCE_MS) await Bun.sleep(10);
console.log(JSON.stringify(result));
socket.close();

export {};
