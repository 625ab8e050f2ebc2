// The mesh that Weft is for: Weft nodes and official clients through one box, over real TUN devices, direct and by relay.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { transferHash, udpEcho } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  certificate,
  type Member,
  pathIs,
  skip,
  Tailscaled,
  tempDir,
  until,
  WeftNode,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const MB = 1 << 20;
const noOfficial = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

/** Everything that a pair of members must be able to do, whatever the path. */
async function traffic(a: Member, b: Member): Promise<void> {
  for (const [from, to] of [
    [a, b],
    [b, a],
  ] as const) {
    for (const ip of [to.ip4, to.ip6]) {
      await answers(from.host, ip);
    }
  }
  expect(await transferHash(a.host, b.host, 100 * MB, { address: b.ip4 })).toEqual(
    expect.objectContaining({ ok: true, bytes: 100 * MB }),
  );
  expect(await transferHash(b.host, a.host, 10 * MB, { address: a.ip6 })).toEqual(
    expect.objectContaining({ ok: true, bytes: 10 * MB }),
  );
  for (const [from, to, address] of [
    [a, b, b.ip4],
    [b, a, a.ip4],
    [a, b, b.ip6],
  ] as const) {
    const udp = await udpEcho(from.host, to.host, 200, 1100, { address, timeoutMs: 30_000 });
    expect({ address, received: udp.received }).toEqual({ address, received: 200 });
  }
}

function mesh(
  title: string,
  tls: boolean,
  make: (
    lab: Lab,
    dir: string,
    env: Record<string, string>,
  ) => Promise<{ members: Member[]; pairs: [number, number][] }>,
): void {
  describe(title, () => {
    const dir = tempDir("mesh");
    let lab: Lab;
    let members: Member[] = [];
    let pairs: [number, number][] = [];
    const each = async (work: (a: Member, b: Member) => Promise<void>) => {
      for (const [i, j] of pairs) await work(members[i]!, members[j]!);
    };

    beforeAll(async () => {
      lab = await Lab.create("mesh");
      const boxHost = await lab.host("box");
      const cert = tls ? await certificate(dir.path, boxHost.ip4) : null;
      const env: Record<string, string> = cert ? { SSL_CERT_FILE: cert.ca } : { TS_DEBUG_USE_DERP_HTTP: "1" };
      const box = await Box.start(boxHost, join(dir.path, "box"), cert ? { tls: cert } : {});
      ({ members, pairs } = await make(lab, dir.path, env));
      const key = await box.key();
      await Promise.all(members.map((m) => m.up(box.url, key)));
      for (const m of members) {
        await until(
          `${m.name} sees the others`,
          async () => Object.keys((await m.status())?.Peer ?? {}).length === members.length - 1,
        );
      }
    }, 300_000);

    afterAll(async () => {
      await lab?.close();
      dir[Symbol.dispose]();
    });

    test("direct: ping, TCP by hash and UDP, IPv4 and IPv6", async () => {
      await each((a, b) => pathIs("direct", a, b));
      await each(traffic);
    }, 300_000);

    test("UDP blocked: all of it by the relay", async () => {
      lab.blockUdp();
      await each((a, b) => pathIs("relay", a, b));
      await each(traffic);
    }, 300_000);

    test("UDP unblocked: the path goes back to direct", async () => {
      lab.unblockUdp();
      await each((a, b) => pathIs("direct", a, b));
      await each((a, b) => answers(a.host, b.ip4));
    }, 300_000);
  });
}

if (!skip(cannotUseNamespaces)) {
  mesh("two Weft nodes through a box over plain HTTP", false, async (lab, dir) => ({
    members: [new WeftNode(await lab.host("wa"), join(dir, "wa")), new WeftNode(await lab.host("wb"), join(dir, "wb"))],
    pairs: [[0, 1]],
  }));
  if (!skip(noOfficial)) {
    mesh("Weft nodes and official clients through a box over TLS", true, async (lab, dir, env) => ({
      members: [
        new WeftNode(await lab.host("wa"), join(dir, "wa"), env),
        new Tailscaled(await lab.host("tnew"), join(dir, "tnew"), "1.102.5", env),
        new Tailscaled(await lab.host("told"), join(dir, "told"), "1.80.3", env),
        new WeftNode(await lab.host("wb"), join(dir, "wb"), env),
      ],
      pairs: [
        [0, 3],
        [0, 1],
        [0, 2],
        [1, 2],
      ],
    }));
    mesh("official clients through a box over plain HTTP", false, async (lab, dir, env) => ({
      members: [
        new Tailscaled(await lab.host("ta"), join(dir, "ta"), "1.102.5", env),
        new Tailscaled(await lab.host("tb"), join(dir, "tb"), "1.102.5", env),
        new WeftNode(await lab.host("wa"), join(dir, "wa"), env),
      ],
      pairs: [
        [0, 1],
        [2, 0],
      ],
    }));
  } else test.skip("meshes with official clients", () => {});
} else test.skip("meshes over real TUN devices", () => {});
