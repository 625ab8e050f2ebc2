// Capabilities that a grant gives to applications, with official clients: Taildrive, read-only and read-write, and a peer relay
// that carries traffic (spec/headscale-features.md, section 22.7: TestGrantCapDrive, TestGrantCapRelay).
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { ping } from "../lab/measure.ts";
import { Lab } from "../lab/network.ts";
import {
  answers,
  Box,
  cannotUseNamespaces,
  certificate,
  type Member,
  skip,
  Tailscaled,
  tempDir,
  until,
} from "./lib/mesh.ts";
import { missing } from "./lib/peers.ts";

const POLICY = {
  tagOwners: { "tag:files": [], "tag:relay": [], "tag:reader": [], "tag:writer": [] },
  grants: [
    { src: ["*"], dst: ["*"], ip: ["*"] },
    {
      src: ["tag:reader"],
      dst: ["tag:files"],
      app: { "tailscale.com/cap/drive": [{ shares: ["docs"], access: "ro" }] },
    },
    {
      src: ["tag:writer"],
      dst: ["tag:files"],
      app: { "tailscale.com/cap/drive": [{ shares: ["docs"], access: "rw" }] },
    },
    { src: ["tag:reader", "tag:writer"], dst: ["tag:relay"], app: { "tailscale.com/cap/relay": [] } },
  ],
  nodeAttrs: [
    { target: ["tag:files"], attr: ["drive:share"] },
    { target: ["tag:reader", "tag:writer"], attr: ["drive:access"] },
  ],
};

const absent = missing([["tailscaled", "1.102.5"]]);

describe.skipIf(skip(cannotUseNamespaces, absent))("capabilities of grants between official clients", () => {
  const dir = tempDir("grants");
  const documents = join(dir.path, "documents");
  let lab: Lab;
  let box: Box;
  let server: Member;
  let reader: Member;
  let writer: Member;

  /** A request to the Taildrive of a member: status and text. */
  const drive = async (member: Member, path: string, init: RequestInit = {}): Promise<string> => {
    const url = `http://100.100.100.100:8080/${path}`;
    const code = `const r = await fetch(${JSON.stringify(url)}, { ...${JSON.stringify(init)}, signal: AbortSignal.timeout(10_000) }); console.log(r.status + " " + (await r.text()));`;
    const { stdout, stderr } = await member.host.run([process.execPath, "-e", code]);
    return stdout.trim() || stderr;
  };

  beforeAll(async () => {
    mkdirSync(documents);
    writeFileSync(join(documents, "a.txt"), "written by the server");
    const file = join(dir.path, "policy.hujson");
    writeFileSync(file, JSON.stringify(POLICY));
    lab = await Lab.create("grants");
    const boxHost = await lab.host("box");
    const tls = await certificate(dir.path, boxHost.ip4);
    box = await Box.start(boxHost, join(dir.path, "box"), { tls, args: ["--policy", file] });
    const member = async (name: string) =>
      new Tailscaled(await lab.host(name), join(dir.path, name), "1.102.5", { SSL_CERT_FILE: tls.ca });
    [server, reader, writer] = [await member("server"), await member("reader"), await member("writer")];
    await server.up(box.url, await box.key("--tags", "tag:files,tag:relay"));
    await reader.up(box.url, await box.key("--tags", "tag:reader"));
    await writer.up(box.url, await box.key("--tags", "tag:writer"));
  }, 300_000);

  afterAll(async () => {
    await Promise.all([server?.stop(), reader?.stop(), writer?.stop()]);
    await box?.stop();
    await lab?.close();
    dir[Symbol.dispose]();
  }, 300_000);

  test("TestGrantCapDrive: who may read reads, who may write writes, and nobody else does either", async () => {
    await server.run("drive", "share", "docs", documents);
    const share = "weft.internal/server/docs";
    await until("the reader reads", async () => {
      const answer = await drive(reader, `${share}/a.txt`);
      if (answer !== "200 written by the server") throw new Error(answer);
      return true;
    });
    expect(await drive(reader, `${share}/b.txt`, { method: "PUT", body: "by the reader" })).toStartWith("403");
    await until("the writer writes", async () => {
      const answer = await drive(writer, `${share}/b.txt`, { method: "PUT", body: "by the writer" });
      if (!/^20[14]/.test(answer)) throw new Error(answer);
      return true;
    });
    expect(readFileSync(join(documents, "b.txt"), "utf8")).toBe("by the writer");
    expect(await drive(server, `${share}/a.txt`)).not.toStartWith("200");
  }, 300_000);

  test("TestGrantCapRelay: two nodes that cannot reach each other by UDP talk through a third", async () => {
    await server.run("set", "--relay-server-port=40404");
    // Between the two, UDP is cut; each still reaches the relay's host.
    for (const [from, to] of [
      [reader, writer],
      [writer, reader],
    ] as const) {
      for (const address of [to.host.ip4, to.host.ip6].filter(Boolean)) {
        const family = address.includes(":") ? "ip6" : "ip";
        const rules = `add table inet cut; add chain inet cut out { type filter hook output priority 0; }; add rule inet cut out ${family} daddr ${address} meta l4proto udp drop`;
        const result = await from.host.run(["nft", rules]);
        if (result.code !== 0) throw new Error(result.stderr);
      }
    }
    await until(
      "the reader reaches the writer by the peer relay",
      async () => {
        await ping(reader.host, writer.ip4, { count: 2, intervalMs: 50 });
        const peer = (await reader.peer(writer)) as { PeerRelay?: string; CurAddr: string } | null;
        if (!peer?.PeerRelay?.includes(":40404")) throw new Error(`now ${JSON.stringify(peer)}`);
        return true;
      },
      120,
      500,
    );
    await answers(reader.host, writer.ip4);
  }, 300_000);
});
