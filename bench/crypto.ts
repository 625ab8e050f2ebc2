// `bun run bench crypto`: Weft's primitives beside @noble's and the runtime's, the two in turns, on one thread.
// Columns are medians, with the 25th and 75th percentile; the ratio is that of the medians.
import { createPrivateKey, createPublicKey, diffieHellman } from "node:crypto";
import { chacha20poly1305 } from "@noble/ciphers/chacha.js";
import { xsalsa20poly1305 } from "@noble/ciphers/salsa.js";
import { blake2s as nobleBlake2s } from "@noble/hashes/blake2.js";
import { measure } from "mitata";
import { blake2s } from "../src/crypto/blake2s.ts";
import { boxOpen, boxSeal } from "../src/crypto/box.ts";
import { AEAD_STATE_SIZE, Asm } from "../src/crypto/wasm.ts";
import { x25519, x25519Public } from "../src/crypto/x25519.ts";

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
/** Samples come in this many turns: what disturbs the machine for a while disturbs both. */
const TURNS = 4;

/** Prints the table. Exit status 0. */
export async function main(_argv: string[]): Promise<number> {
  const contests = [...[64, 1420, 16384].flatMap(aead), ...dh(), ...[64, 1024].map(hash), ...[46, 1024].flatMap(box)];
  console.log(`Bun ${Bun.version}, ${process.arch}; microseconds per call: median (25 % .. 75 %)\n`);
  console.log(`${"".padEnd(22)}${"Weft".padEnd(26)}${"".padEnd(11)}${"other".padEnd(42)}ratio`);
  for (const { name, other, bytes, weft, theirs } of contests) {
    const mine: number[] = [];
    const others: number[] = [];
    for (let turn = 0; turn < TURNS; turn++) {
      mine.push(...(await sample(weft)));
      others.push(...(await sample(theirs)));
    }
    const [a, b] = [quartiles(mine), quartiles(others)];
    const rate = bytes ? `${((bytes / a[1]) * 8).toFixed(2)} Gbit/s` : "";
    console.log(
      name.padEnd(22) +
        show(a).padEnd(24) +
        rate.padStart(11) +
        `  ${other} ${show(b)}`.padEnd(44) +
        ratio(b[1] / a[1]),
    );
  }
  return 0;
}

async function sample(run: () => unknown): Promise<number[]> {
  return (await measure(run, { min_cpu_time: 50e6, min_samples: 12, batch_samples: 256 })).samples;
}

function quartiles(samples: number[]): [number, number, number] {
  samples.sort((a, b) => a - b);
  const at = (q: number) => samples[Math.floor((samples.length - 1) * q)]!;
  return [at(0.25), at(0.5), at(0.75)];
}

function show([low, median, high]: [number, number, number]): string {
  const us = (ns: number) => (ns / 1000).toFixed(2);
  return `${us(median)} (${us(low)} .. ${us(high)})`;
}

function ratio(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : 0)}x`;
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

if (import.meta.main) process.exit(await main(process.argv.slice(2)));
