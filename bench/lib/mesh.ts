// Whole daemons in a tailnet of a Weft box: two Weft nodes, two official tailscaled, each pair over a wire of its own.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Host, Lab } from "../../lab/network.ts";
import { Box, type Member, pathIs, Tailscaled, until, WeftNode } from "../../test/lib/mesh.ts";
import { sources } from "../../test/lib/peers.ts";
import type { BenchOptions } from "./options.ts";
import { progress, type Report } from "./report.ts";
import { isThere, wire } from "./tunnels.ts";

/** What tailscaled gives its device, and so what both have here. */
export const MESH_MTU = 1280;

export interface Mesh extends AsyncDisposable {
  pairs: { impl: string; a: Member; b: Member }[];
}

/** The direct path is the pair's own wire: the router between the hosts passes no UDP from one to the other. */
export async function mesh(lab: Lab, options: BenchOptions, report: Report): Promise<Mesh> {
  const dir = mkdtempSync(join(tmpdir(), "weft-bench-"));
  const out: Mesh = {
    pairs: [],
    async [Symbol.asyncDispose]() {
      await Promise.all(this.pairs.flatMap(({ a, b }) => [a.stop(), b.stop()]));
      await box.stop();
      rmSync(dir, { recursive: true, force: true });
    },
  };
  const box = await Box.start(await lab.host("box"), join(dir, "box"));
  const key = await box.key();
  const version = sources.find((source) => source.programs.includes("tailscaled"))!.version;
  const kinds = isThere("tailscaled", options, report) ? (["weft", "tailscaled"] as const) : (["weft"] as const);
  for (const impl of kinds) {
    progress(`${report.part}: ${impl} joins the box`);
    const on = await wire(lab, impl === "weft" ? "node" : "ts", { segment: options.segment, mtu: MESH_MTU });
    lab.blockUdp(on.a, on.b);
    const member = (host: Host): Member => {
      const folder = join(dir, host.name);
      return impl === "weft" ? new WeftNode(host, folder) : new Tailscaled(host, folder, version);
    };
    const [a, b] = [member(on.a), member(on.b)];
    out.pairs.push({ impl, a, b });
    for (const end of [a, b]) await end.up(box.url, key);
    await pathIs("direct", a, b);
    await until("the direct path is the wire", async () => (await a.peer(b))?.CurAddr.startsWith(on.ipB), 30);
  }
  return out;
}
