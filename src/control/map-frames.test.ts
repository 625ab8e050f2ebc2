import { expect, test } from "bun:test";
import { zstdDecompressSync } from "node:zlib";
import type * as tc from "../wire/tailcfg.ts";
import { encodeFrame, encodeMessage } from "./map-frames.ts";
import { peerNode, selfNode } from "./netmap.ts";
import { makeConfig, makeNode } from "./testing.ts";

const CONFIG = makeConfig();
const records = Array.from({ length: 500 }, (_, i) => makeNode(i + 1, { hostname: `host “${i}”` }));

function netmapOf(viewer: number, nodes = records): tc.MapResponse {
  const others = nodes.filter(({ id }) => id !== viewer);
  return {
    Node: selfNode(nodes.find(({ id }) => id === viewer)!, CONFIG),
    Peers: others.map((node) => peerNode(node, CONFIG)),
    Domain: "net.test",
  };
}

function decode(pieces: Uint8Array[], zstd = true): unknown {
  const bytes = Buffer.concat(pieces);
  expect(bytes.readUInt32LE(0)).toBe(bytes.length - 4);
  const payload = bytes.subarray(4);
  return JSON.parse((zstd ? zstdDecompressSync(payload) : payload).toString());
}

const plain = (message: tc.MapResponse) => JSON.parse(JSON.stringify(message));

test("a message of any size is what it was, in whatever pieces it goes out", () => {
  for (const count of [1, 2, 31, 32, 33, 34, 64, 100, 500]) {
    const message = netmapOf(1, records.slice(0, count));
    expect(decode(encodeMessage(message, true))).toEqual(plain(message));
    expect(decode(encodeMessage(message, false), false)).toEqual(plain(message));
    expect(decode([encodeFrame(message, true)])).toEqual(plain(message));
    const { Peers: PeersChanged, ...delta } = message;
    expect(decode(encodeMessage({ ...delta, PeersChanged: PeersChanged! }, true))).toEqual(
      plain({ ...delta, PeersChanged: PeersChanged! }),
    );
  }
  expect(decode(encodeMessage({ PeersChanged: [peerNode(records[0]!, CONFIG)] }, true))).toEqual(
    plain({ PeersChanged: [peerNode(records[0]!, CONFIG)] }),
  );
  expect(decode(encodeMessage({ KeepAlive: true }, true))).toEqual({ KeepAlive: true });
});

test("two readers share the pieces in which they see the same, and a node that changes costs one piece", () => {
  const shared = (a: Uint8Array[], b: Uint8Array[]) => a.filter((piece) => b.includes(piece)).length;
  const first = encodeMessage(netmapOf(100), true);
  const second = encodeMessage(netmapOf(400), true);
  expect(first.length).toBeGreaterThan(6);
  // Length, the run of the one, the run of the other and the end are their own.
  expect(shared(first, second)).toBeGreaterThanOrEqual(first.length - 4);
  const changed = records.map((node) => (node.id === 250 ? makeNode(250, { endpoints: ["192.0.2.1:1"] }) : node));
  const third = encodeMessage(netmapOf(100, changed), true);
  expect(decode(third)).toEqual(plain(netmapOf(100, changed)));
  expect(shared(first, third)).toBeGreaterThanOrEqual(first.length - 3);
});

test("the same delta is compressed once for all", () => {
  const delta = () => ({ PeersChangedPatch: [{ NodeID: 7, Endpoints: ["192.0.2.1:1"] }] });
  const sizes = [encodeMessage(delta(), true), encodeMessage(delta(), true)].map(([piece]) => piece!.length);
  expect(sizes[0]).toBe(sizes[1]!);
  expect(decode(encodeMessage(delta(), true))).toEqual(delta());
});
