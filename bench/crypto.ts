// `bun run bench crypto`: Weft's primitives beside OpenSSL's, @noble's and the runtime's, in turns, on one thread.
//
// OpenSSL runs as a process of its own (`openssl speed`), in turns with the others. It encrypts one long stream, where
// Weft and @noble seal packets: nonce, Poly1305 key and tag for each.
import { createPrivateKey, createPublicKey, diffieHellman } from "node:crypto";
import { chacha20poly1305 } from "@noble/ciphers/chacha.js";
import { xsalsa20poly1305 } from "@noble/ciphers/salsa.js";
import { x25519 as nobleX25519 } from "@noble/curves/ed25519.js";
import { blake2s as nobleBlake2s } from "@noble/hashes/blake2.js";
import { blake2s } from "../src/crypto/blake2s.ts";
import { boxOpen, boxSeal } from "../src/crypto/box.ts";
import { AEAD_STATE_SIZE, Asm } from "../src/crypto/wasm.ts";
import { x25519, x25519Public } from "../src/crypto/x25519.ts";
import { packageVersion } from "./lib/machine.ts";
import { race } from "./lib/micro.ts";
import { OPENSSL, opensslAead, opensslVersion } from "./lib/openssl.ts";
import type { BenchOptions } from "./lib/options.ts";
import { progress, type Report } from "./lib/report.ts";

interface Contest {
  name: string;
  /** Bytes per call, for the throughput column. */
  bytes?: number;
  /** OpenSSL takes part. */
  aead?: "seal" | "open";
  impls: { weft: () => unknown } & Record<string, () => unknown>;
}

const SIZES = [64, 300, 1420, 16384];
const TURNS = 4;
const QUICK_OPENSSL = "AEAD seal 1420 B";
const KEY = new Uint8Array(32).fill(7);
const NONCE = new Uint8Array(12);
const NONCE_24 = new Uint8Array(24);

export async function run(options: BenchOptions, report: Report): Promise<void> {
  const contests = [...SIZES.flatMap(aead), ...dh(), ...[64, 1024].map(hash), ...[46, 1024].flatMap(box)];
  const noble = options.against.includes("noble");
  if (noble) {
    for (const name of ["@noble/ciphers", "@noble/curves", "@noble/hashes"])
      report.versions[name] = packageVersion(name);
  }
  const openssl = options.against.includes("openssl") ? opensslVersion() : null;
  if (openssl) report.versions.openssl = openssl;
  else if (options.against.includes("openssl")) report.note("openssl is not installed: left out");

  for (const { name, bytes, aead, impls } of contests) {
    progress(`crypto: ${name}`);
    const add = (impl: string, samples: number[]) => {
      report.add({ case: name, impl, metric: "time per call", unit: "ns" }, ...samples);
      if (bytes === undefined) return;
      report.add({ case: name, impl, metric: "throughput", unit: "GB/s" }, ...samples.map((ns) => bytes / ns));
    };
    const taking = Object.fromEntries(Object.entries(impls).filter(([impl]) => noble || impl !== "noble"));
    // It takes a second for each, too long for --quick but once.
    const besideOpenssl = openssl !== null && aead !== undefined && (!options.quick || name === QUICK_OPENSSL);
    if (!besideOpenssl) {
      for (const [impl, samples] of Object.entries(await race(taking, options))) add(impl, samples);
      continue;
    }
    const turns = options.rounds ?? (options.quick ? 1 : TURNS);
    for (let turn = 0; turn < turns; turn++) {
      for (const [impl, samples] of Object.entries(await race(taking, { ...options, rounds: 2 }))) add(impl, samples);
      for (const program of Object.keys(OPENSSL)) add(program, [await opensslAead(program, bytes!, aead === "open")]);
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
      bytes: size,
      aead: "seal",
      impls: {
        weft: () => x.aeadSeal(packet, size, state, 0, 0),
        noble: () => chacha20poly1305(KEY, NONCE).encrypt(message, output),
      },
    },
    {
      name: `AEAD open ${size} B`,
      bytes: size,
      aead: "open",
      impls: {
        weft: () => {
          // Opening leaves the tag and takes the ciphertext away: bring it back first.
          asm.u8.copyWithin(packet, sealedPacket, sealedPacket + size + 16);
          if (!x.aeadOpen(packet, size, state, 0, 0)) throw new Error("the sealed packet does not open");
        },
        noble: () => chacha20poly1305(KEY, NONCE).decrypt(sealed, output.subarray(0, size)),
      },
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
      impls: {
        weft: () => x25519(KEY, publicKey),
        "node:crypto": () => diffieHellman({ privateKey: theirPrivate, publicKey: theirPublic }),
        noble: () => nobleX25519.getSharedSecret(KEY, publicKey),
      },
    },
  ];
}

function hash(size: number): Contest {
  const message = new Uint8Array(size);
  return {
    name: `BLAKE2s ${size} B`,
    bytes: size,
    impls: { weft: () => blake2s(message), noble: () => nobleBlake2s(message) },
  };
}

function box(size: number): Contest[] {
  const message = new Uint8Array(size);
  const boxed = boxSeal(KEY, NONCE_24, message);
  return [
    {
      name: `NaCl box seal ${size} B`,
      bytes: size,
      impls: {
        weft: () => boxSeal(KEY, NONCE_24, message),
        noble: () => xsalsa20poly1305(KEY, NONCE_24).encrypt(message),
      },
    },
    {
      name: `NaCl box open ${size} B`,
      bytes: size,
      impls: {
        weft: () => boxOpen(KEY, NONCE_24, boxed),
        noble: () => xsalsa20poly1305(KEY, NONCE_24).decrypt(boxed),
      },
    },
  ];
}
