// A tailnet of hundreds: its netmap goes out as several zstd frames in one message, pieces that clients share. Official clients
// and a Weft node must take it, and what comes after it.
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { Lab } from "../lab/network.ts";
import { Store } from "../src/control/store.ts";
import { makeNode, makeUser } from "../src/control/testing.ts";
import { Box, cannotUseNamespaces, certificate, skip, Tailscaled, tempDir, until, WeftNode } from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

setDefaultTimeout(300_000);

const PEERS = 200;
const absent = missing([
  ["tailscaled", "1.102.5"],
  ["tailscaled", "1.80.3"],
]);

/** A data folder with users and nodes that nobody runs. */
async function populate(folder: string): Promise<void> {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const store = await Store.open({ type: "sqlite", path: join(folder, "weft.sqlite") });
  const nodes = Array.from({ length: PEERS }, (_, i) =>
    makeNode(i + 1, { hostname: `filler-${i + 1}`, givenName: `filler-${i + 1}` }),
  );
  const last = nodes.at(-1)!;
  const counters = { lastUser: 1, lastNode: PEERS, lastIPv4: last.ipv4, lastIPv6: last.ipv6 };
  await store.write([{ users: [makeUser(1)], nodes, counters }]);
  await store.close();
}

test.skipIf(skip(cannotUseNamespaces, absent))(
  "clients of both ages know hundreds of peers, and hear of the next one",
  async () => {
    using dir = tempDir("large");
    await using lab = await Lab.create("large");
    const data = join(dir.path, "box");
    await populate(data);
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    const env = { SSL_CERT_FILE: tls.ca };
    const box = await Box.start(boxHost, data, { tls });
    const key = await box.key();
    const members = [
      new Tailscaled(await lab.host("current"), join(dir.path, "current"), "1.102.5", env),
      new Tailscaled(await lab.host("old"), join(dir.path, "old"), "1.80.3", env),
      new WeftNode(await lab.host("weft"), join(dir.path, "weft"), env),
    ];
    // One after the other: the first has the full netmap of the others before they are there, and hears of them later.
    for (const member of members) await member.up(box.url, key);
    const expected = [
      ...Array.from({ length: PEERS }, (_, i) => `filler-${i + 1}`),
      ...members.map(({ name }) => name),
    ];
    for (const member of members) {
      const names = await until(`${member.name} knows all`, async () => {
        const peers = Object.values((await member.status())?.Peer ?? {}).map(({ DNSName }) => DNSName.split(".")[0]!);
        if (peers.length < expected.length - 1) throw new Error(`it knows ${peers.length}`);
        return peers;
      });
      expect(names.toSorted()).toEqual(expected.filter((name) => name !== member.name).toSorted());
    }
  },
);
