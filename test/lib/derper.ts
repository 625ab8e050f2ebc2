// The official DERP server on a host of a test's network.
import { cpSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { Daemon } from "../../lab/daemon.ts";
import type { Host } from "../../lab/network.ts";
import { certificate, stillRuns, until } from "./mesh.ts";
import { peer } from "./peers.ts";

/** Region 900 of a DERP map, with this host's derper as its only node. */
export const derpMapOf = (host: Host): string => `regions:
  900:
    regionid: 900
    regioncode: lab
    regionname: Lab
    nodes:
      - name: 900a
        regionid: 900
        hostname: ${host.ip4}
        ipv4: ${host.ip4}
        stunport: 3478
        derpport: 443
`;

/** The same in the form of Tailscale's public map. */
export const publicMapOf = ({ ip4 }: Host) => ({
  Regions: {
    900: {
      ...{ RegionID: 900, RegionCode: "lab", RegionName: "Lab" },
      Nodes: [{ Name: "900a", RegionID: 900, HostName: ip4, IPv4: ip4, STUNPort: 3478, DERPPort: 443 }],
    },
  },
});

/** Listens on port 443 with a certificate of its own authority, whose file is `ca`. */
export async function startDerper(
  host: Host,
  dir: string,
  ...flags: string[]
): Promise<{ process: Daemon; ca: string }> {
  const certs = join(dir, "certs");
  mkdirSync(certs, { recursive: true });
  const cert = await certificate(certs, host.ip4);
  cpSync(cert.cert, join(certs, `${host.ip4}.crt`));
  cpSync(cert.key, join(certs, `${host.ip4}.key`));
  const tls = ["-certmode", "manual", "-certdir", certs, "-hostname", host.ip4];
  const common = ["-a", ":443", "-http-port", "-1", "-c", join(dir, "derper.key")];
  const process = new Daemon(host, [peer("derper", "1.102.5")!, ...common, ...tls, ...flags]);
  await until("derper listens", async () => {
    await stillRuns("derper", process);
    return /serving on|listening|STUN/i.test(process.output());
  });
  return { process, ca: cert.ca };
}
