// Messages of a map stream as bytes: u32le length | payload, the payload being JSON, or zstd frames of it one after the other.
//
// Most of what is sent is the same for many readers, and is made once: a peer's JSON, a delta that goes to everybody, and of
// a full netmap the compressed runs of peers. A run ends behind peers whose id says so, so the lists of two readers that
// differ in a few peers have most runs in common:
//
//   zstd({"Peers":[) | zstd(peer,peer,…,) | zstd(peer,…,) | … | zstd(last peer],"Node":…})
import type * as tc from "../wire/tailcfg.ts";

/** Peers in a message from which on it is put together from runs. */
const MIN_PEERS = 32;
/** One peer in so many ends a run: longer ones compress better, shorter ones are more often the same for two readers. */
const RUN_BITS = 6;
/** Readers that see different peers of a run, or whose own node is in it: so many forms of it are kept. */
const MAX_FORMS = 8;
const MAX_RUN = 4 << RUN_BITS;

const LEVEL = { level: 1 };

function compress(json: string): Uint8Array {
  return Bun.zstdCompressSync(Buffer.from(json), LEVEL);
}

const OPENING = compress('{"Peers":[');

interface Run {
  peers: readonly tc.Node[];
  bytes: Uint8Array;
}

/** Peers are built once and never changed (netmap.ts): so is their JSON. */
const peerJson = new WeakMap<tc.Node, string>();
/** Runs by their first peer. */
const runs = new WeakMap<tc.Node, Run[]>();

function jsonOf(peer: tc.Node): string {
  let json = peerJson.get(peer);
  if (json === undefined) {
    json = JSON.stringify(peer);
    peerJson.set(peer, json);
  }
  return json;
}

function endsRun({ ID: id }: tc.Node): boolean {
  return Math.imul(id, 0x9e3779b1) >>> (32 - RUN_BITS) === 0;
}

/** The compressed run `peers[from..to)`, each peer followed by a comma. */
function runOf(peers: readonly tc.Node[], from: number, to: number): Uint8Array {
  const first = peers[from]!;
  let known = runs.get(first);
  if (!known) {
    known = [];
    runs.set(first, known);
  }
  const found = known.findIndex(
    (run) => run.peers.length === to - from && run.peers.every((peer, i) => peer === peers[from + i]),
  );
  if (found >= 0) {
    const run = known[found]!;
    // What is used stays.
    if (found < known.length - 1) known.push(...known.splice(found, 1));
    return run.bytes;
  }
  let json = "";
  for (let i = from; i < to; i++) json += `${jsonOf(peers[i]!)},`;
  const run = { peers: peers.slice(from, to), bytes: compress(json) };
  if (known.length >= MAX_FORMS) known.shift();
  known.push(run);
  return run.bytes;
}

/** The same delta goes to most readers: what was made last, by its JSON. */
const recent = new Map<string, Uint8Array>();
const MAX_RECENT = 16;
const MAX_RECENT_LENGTH = 256 * 1024;

function compressShared(json: string): Uint8Array {
  if (json.length > MAX_RECENT_LENGTH) return compress(json);
  let bytes = recent.get(json);
  if (!bytes) {
    if (recent.size >= MAX_RECENT) recent.delete(recent.keys().next().value!);
    bytes = compress(json);
    recent.set(json, bytes);
  }
  return bytes;
}

/** JSON of a message. `peers` stand in place of its own. */
function jsonOfMessage(message: tc.MapResponse): string {
  const { Peers, PeersChanged, ...rest } = message;
  if (!Peers && !PeersChanged) return JSON.stringify(message);
  const lists = [
    ...(Peers ? [`"Peers":[${Peers.map(jsonOf).join()}]`] : []),
    ...(PeersChanged ? [`"PeersChanged":[${PeersChanged.map(jsonOf).join()}]`] : []),
  ].join();
  const others = JSON.stringify(rest);
  return others === "{}" ? `{${lists}}` : `{${lists},${others.slice(1)}`;
}

/** What was made of messages about peers alone, which many readers share (netmap.ts). */
const encoded = {
  zstd: new WeakMap<tc.MapResponse, Uint8Array[]>(),
  plain: new WeakMap<tc.MapResponse, Uint8Array[]>(),
};

/** One message in pieces, to be written one after the other. They are shared with other readers: never to be changed. */
export function encodeMessage(message: tc.MapResponse, zstd: boolean): Uint8Array[] {
  if (message.Peers || message.Node) return encode(message, zstd);
  const known = zstd ? encoded.zstd : encoded.plain;
  let pieces = known.get(message);
  if (!pieces) {
    pieces = encode(message, zstd);
    known.set(message, pieces);
  }
  return pieces;
}

function encode(message: tc.MapResponse, zstd: boolean): Uint8Array[] {
  const pieces = payloadOf(message, zstd);
  const length = Buffer.allocUnsafe(4);
  length.writeUInt32LE(pieces.reduce((sum, piece) => sum + piece.length, 0));
  if (pieces.length === 1) return [Buffer.concat([length, pieces[0]!])];
  return [length, ...pieces];
}

/** The same in one piece. */
export function encodeFrame(message: tc.MapResponse, zstd: boolean): Uint8Array {
  return Buffer.concat(encodeMessage(message, zstd));
}

function payloadOf(message: tc.MapResponse, zstd: boolean): Uint8Array[] {
  const { Peers: peers } = message;
  if (!zstd) return [Buffer.from(jsonOfMessage(message))];
  if (!peers || peers.length < MIN_PEERS) return [compressShared(jsonOfMessage(message))];
  const pieces = [OPENING];
  const last = peers.length - 1;
  let from = 0;
  for (let i = 0; i < last; i++) {
    if (!endsRun(peers[i]!) && i + 1 - from < MAX_RUN && i + 1 < last) continue;
    pieces.push(runOf(peers, from, i + 1));
    from = i + 1;
  }
  const { Peers: _, ...rest } = message;
  pieces.push(compress(`${jsonOf(peers[last]!)}],${JSON.stringify(rest).slice(1)}`));
  return pieces;
}
