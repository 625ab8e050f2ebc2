// Weft nodes as guests: joined to an official headscale, relayed by an official derper, beside an official client.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { transferHash } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import { startDerper } from "./lib/derper.ts";
import { Headscale } from "./lib/headscale.ts";
import {
  answers,
  cannotUseNamespaces,
  type Member,
  pathIs,
  skip,
  Tailscaled,
  tempDir,
  until,
  WeftNode,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const absent = missing([["headscale"], ["derper", "1.102.5"], ["tailscaled", "1.102.5"]]);

async function reaches(a: Member, b: Member): Promise<void> {
  for (const ip of [b.ip4, b.ip6]) await answers(a.host, ip);
}

if (skip(cannotUseNamespaces, absent)) test.skip("Weft nodes joined to an official headscale", () => {});
else {
  describe("Weft nodes joined to an official headscale 0.28", () => {
    const dir = tempDir("headscale");
    let lab: Lab;
    let members: Member[] = [];

    beforeAll(async () => {
      lab = await Lab.create("headscale");
      const derp = await lab.host("derp");
      const { ca } = await startDerper(derp, dir.path);
      const headscale = await Headscale.start(await lab.host("hs"), dir.path, derp);
      const key = await headscale.key();
      const env = { SSL_CERT_FILE: ca };
      members = [
        new WeftNode(await lab.host("wa"), join(dir.path, "wa"), env),
        new WeftNode(await lab.host("wb"), join(dir.path, "wb"), env),
        new Tailscaled(await lab.host("ta"), join(dir.path, "ta"), "1.102.5", env),
      ];
      await Promise.all(members.map((m) => m.up(headscale.url, key)));
      for (const m of members)
        await until(`${m.name} sees the others`, async () => Object.keys((await m.status())?.Peer ?? {}).length === 2);
    }, 300_000);

    afterAll(async () => {
      await lab?.close();
      dir[Symbol.dispose]();
    });

    test("reach each other and the official client directly", async () => {
      const [wa, wb, ta] = members as [Member, Member, Member];
      await pathIs("direct", wa, wb);
      await pathIs("direct", wa, ta);
      await reaches(wa, wb);
      await reaches(wa, ta);
      await reaches(ta, wb);
    }, 300_000);

    test("are relayed by the official derper when UDP is blocked", async () => {
      const [wa, wb, ta] = members as [Member, Member, Member];
      lab.blockUdp();
      await pathIs("relay", wa, wb);
      await pathIs("relay", wa, ta);
      await reaches(wa, wb);
      await reaches(ta, wa);
      const result = await transferHash(wa.host, wb.host, 10 << 20, { address: wb.ip4 });
      expect(result.ok).toBe(true);
    }, 300_000);
  });
}
