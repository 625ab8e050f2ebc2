// `bun run bench crypto`: Weft's primitives beside @noble's and the runtime's, in turns, on one thread.
import { createPrivateKey, createPublicKey, diffieHellman } from "node:crypto";
import { chacha20poly1305 } from "@noble/ciphers/chacha.js";
import { xsalsa20poly1305 } from "@noble/ciphers/salsa.js";
import { blake2s as nobleBlake2s } from "@noble/hashes/blake2.js";
import { blake2s } from "../src/crypto/blake2s.ts";
import { boxOpen, boxSeal } from "../src/crypto/box.ts";
import { AEAD_STATE_SIZE, Asm } from "../src/crypto/wasm.ts";
import { x25519, x25519Public } from "../src/crypto/x25519.ts";
import { packageVersion } from "./lib/machine.ts";
import { race } from "./lib/micro.ts";
import type { BenchOptions } from "./lib/options.ts";
import { progress, type Report } from "./lib/report.ts";

interface Contest {
  name: string;
  other: string;
  /** Bytes per call, for the throughput column. */
  bytes?: number;
  weft: () => unknown;
  theirs: () => unknown;
}

const KEY = new Uint8Array(32).fill(7);
const NONCE = new Uint8Array(12);
const NONCE_24 = new Uint8Array(24);

export async function run(options: BenchOptions, report: Report): Promise<void> {
  const contests = [...[64, 1420, 16384].flatMap(aead), ...dh(), ...[64, 1024].map(hash), ...[46, 1024].flatMap(box)];
  report.versions["@noble/ciphers"] = packageVersion("@noble/ciphers");
  for (const { name, other, bytes, weft, theirs } of contests) {
    progress(`crypto: ${name}`);
    for (const [impl, samples] of Object.entries(await race({ weft, [other]: theirs }, options))) {
      report.add({ case: name, impl, metric: "time per call", unit: "ns" }, ...samples);
      if (bytes === undefined) continue;
      report.add({ case: name, impl, metric: "throughput", unit: "GB/s" }, ...samples.map((ns) => bytes / ns));
    }
  }
}

/** In place in WASM memory, as the datapath does it; @noble likewise with an output buffer. */
function aead(size: number): Contest[] {
  const asm = Asm.create(64);
  const x = asm.exports;
  const [state, key, packet, sealedPacket] = [
    asm.alloc(AEAD_STATE_SIZE),
    asm.alloc(32),
    asm.alloc(size + 16),
    asm.alloc(size + 16),
  ];
  asm.u8.set(KEY, key);
  x.aeadInit(state, key);
  x.aeadSeal(sealedPacket, size, state, 0, 0);
  const message = new Uint8Array(size);
  const output = new Uint8Array(size + 16);
  const sealed = chacha20poly1305(KEY, NONCE).encrypt(message);
  return [
    {
      name: `AEAD seal ${size} B`,
      other: "noble",
      bytes: size,
      weft: () => x.aeadSeal(packet, size, state, 0, 0),
      theirs: () => chacha20poly1305(KEY, NONCE).encrypt(message, output),
    },
    {
      name: `AEAD open ${size} B`,
      other: "noble",
      bytes: size,
      weft: () => {
        // Opening leaves the tag and takes the ciphertext away: bring it back first.
        asm.u8.copyWithin(packet, sealedPacket, sealedPacket + size + 16);
        if (!x.aeadOpen(packet, size, state, 0, 0)) throw new Error("the sealed packet does not open");
      },
      theirs: () => chacha20poly1305(KEY, NONCE).decrypt(sealed, output.subarray(0, size)),
    },
  ];
}

function dh(): Contest[] {
  const publicKey = x25519Public(KEY);
  // RFC 8410: the fixed heads of an X25519 key in PKCS #8 and in SubjectPublicKeyInfo.
  const theirPrivate = createPrivateKey({
    key: Buffer.concat([Buffer.from("302e020100300506032b656e04220420", "hex"), KEY]),
    format: "der",
    type: "pkcs8",
  });
  const theirPublic = createPublicKey({
    key: Buffer.concat([Buffer.from("302a300506032b656e032100", "hex"), publicKey]),
    format: "der",
    type: "spki",
  });
  return [
    {
      name: "X25519",
      other: "node:crypto",
      weft: () => x25519(KEY, publicKey),
      theirs: () => diffieHellman({ privateKey: theirPrivate, publicKey: theirPublic }),
    },
  ];
}

function hash(size: number): Contest {
  const message = new Uint8Array(size);
  return {
    name: `BLAKE2s ${size} B`,
    other: "noble",
    bytes: size,
    weft: () => blake2s(message),
    theirs: () => nobleBlake2s(message),
  };
}

function box(size: number): Contest[] {
  const message = new Uint8Array(size);
  const boxed = boxSeal(KEY, NONCE_24, message);
  return [
    {
      name: `NaCl box seal ${size} B`,
      other: "noble",
      bytes: size,
      weft: () => boxSeal(KEY, NONCE_24, message),
      theirs: () => xsalsa20poly1305(KEY, NONCE_24).encrypt(message),
    },
    {
      name: `NaCl box open ${size} B`,
      other: "noble",
      bytes: size,
      weft: () => boxOpen(KEY, NONCE_24, boxed),
      theirs: () => xsalsa20poly1305(KEY, NONCE_24).decrypt(boxed),
    },
  ];
}
