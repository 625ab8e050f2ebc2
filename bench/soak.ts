// `bun run bench soak [--minutes N]`: WireGuard tunnels under steady traffic for real minutes, across real rekeys: Weft with Weft,
// and Weft with each other implementation that is installed. A correctness run, not a race; CI does not run it.
import { ping, rss } from "../lab/measure.ts";
import { type Host, Lab } from "../lab/network.ts";
import { parseFlags } from "../src/cli/flags.ts";
import { table } from "../src/cli/output.ts";
import { peer } from "../test/lib/peers.ts";
import { type Implementation, WgEnd } from "../test/lib/wg.ts";

const usage = "usage: bun run bench soak [--minutes N] (default 10)";
const PINGS_PER_SECOND = 20;

interface Tunnel {
  title: string;
  a: WgEnd;
  b: WgEnd;
}

export async function main(argv: string[]): Promise<number> {
  const { minutes = 10, help } = parseFlags("bench soak", argv, { minutes: "number", help: "boolean" }, usage);
  if (help) {
    console.log(usage);
    return 0;
  }
  const others = (["wireguard-go", "boringtun", "gotatun"] as const).filter((name) => {
    const there = peer(name === "wireguard-go" ? "wireguard" : name === "boringtun" ? "boringtun-cli" : name) !== null;
    if (!there) console.error(`soak: ${name} is not installed (\`bun run peers\`): left out`);
    return there;
  });
  await using lab = await Lab.create("soak");
  const tunnels: Tunnel[] = [];
  for (const [i, other] of (["weft", ...others] as Implementation[]).entries()) {
    const [a, b] = [await lab.host(`a${i}`), await lab.host(`b${i}`)] as [Host, Host];
    const tunnel = { title: `weft - ${other}`, a: await WgEnd.start(a, 1), b: await WgEnd.start(b, 2, other) };
    await tunnel.a.knows(tunnel.b, { endpoint: tunnel.b.outer4 });
    // Both may initiate: the other side too knows where to send.
    await tunnel.b.knows(tunnel.a, { endpoint: tunnel.a.outer4 });
    tunnels.push(tunnel);
  }
  const rows = await Promise.all(tunnels.map((tunnel) => soak(tunnel, minutes)));
  for (const { a, b } of tunnels) await Promise.all([a.stop(), b.stop()]);
  console.log(
    table(
      ["tunnel", "pings", "lost", "p50", "p99", "max", "handshakes", "RSS start", "RSS end"],
      rows.map((r) => r.cells),
    ),
  );
  const failed = rows.some((row) => row.lost > 0 || row.handshakes < Math.floor((minutes * 60) / 121));
  if (failed) console.error("soak: a packet was lost, or sessions were not renewed every two minutes");
  return failed ? 1 : 0;
}

async function soak(
  { title, a, b }: Tunnel,
  minutes: number,
): Promise<{ cells: string[]; lost: number; handshakes: number }> {
  // The first packets wait for the handshake; they are not part of the count.
  await ping(a.host, b.ip4, { count: 3, intervalMs: 100, timeoutMs: 10_000 });
  const before = rss(a.pid);
  const renewals = countHandshakes(a, minutes * 60);
  const count = minutes * 60 * PINGS_PER_SECOND;
  const [there, back] = await Promise.all([
    ping(a.host, b.ip4, { count, intervalMs: 1000 / PINGS_PER_SECOND, size: 1200 }),
    ping(b.host, a.ip6, { count, intervalMs: 1000 / PINGS_PER_SECOND, size: 200 }),
  ]);
  const handshakes = await renewals;
  const lost = there.sent + back.sent - there.received - back.received;
  const mb = (kb: number) => `${(kb / 1024).toFixed(0)} MB`;
  const ms = (value: number) => `${value.toFixed(2)} ms`;
  return {
    cells: [
      title,
      `${there.sent + back.sent}`,
      `${lost}`,
      ms(there.p50),
      ms(there.p99),
      ms(there.max),
      `${handshakes}`,
      mb(before),
      mb(rss(a.pid)),
    ],
    lost,
    handshakes,
  };
}

/** How often the time of the latest handshake changes, as wg(8) shows it. */
async function countHandshakes(end: WgEnd, seconds: number): Promise<number> {
  const deadline = performance.now() + seconds * 1000;
  let seen = 0;
  let last = "";
  while (performance.now() < deadline) {
    const latest = await end.must(end.wg("show", end.device, "latest-handshakes"));
    if (latest !== last && last !== "") seen++;
    last = latest;
    await Bun.sleep(2000);
  }
  return seen;
}
