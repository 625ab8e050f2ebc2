// Peers that never existed, for the handshake benchmark: who they are follows from their number alone, so that the one
// process which configures a device and the other which speaks for its peers agree.
import { blake2s } from "../../src/crypto/blake2s.ts";
import { x25519, x25519Public } from "../../src/crypto/x25519.ts";
import { tai64n } from "../../src/wire/wireguard.ts";
import { createInitiation, type Identity } from "../../src/wireguard/handshake.ts";

function privateKey(name: string): Uint8Array {
  return blake2s(new TextEncoder().encode(`weft bench ${name}`));
}

export function identity(name: string): Identity {
  const key = privateKey(name);
  return { privateKey: key, publicKey: x25519Public(key) };
}

/** Base64, as wg(8) takes keys. */
export function keyText(key: Uint8Array): string {
  return Buffer.from(key).toString("base64");
}

/** 10.99.1.0 and on: where peer number `i` sends from. */
export function sourceOf(i: number): string {
  return `10.99.${1 + (i >> 8)}.${i & 255}`;
}

/** Initiations of one peer, each newer than the one before. `sender`: index of the first; they count up. */
export function* initiations(peer: Identity, responder: Uint8Array, sender: number): Generator<Uint8Array> {
  const staticShared = x25519(peer.privateKey, responder);
  if (!staticShared) throw new Error("bench: the responder's key is of low order");
  const start = Date.now();
  for (let n = 0; ; n++) {
    const made = createInitiation({
      identity: peer,
      remoteStatic: responder,
      staticShared,
      ephemeralPrivate: privateKey(`ephemeral ${sender + n}`),
      sender: sender + n,
      // Some programs round to 17 ms.
      timestamp: tai64n(BigInt(start + 100 * n) * 1_000_000n),
    });
    if (!made) throw new Error("bench: an initiation could not be made");
    yield made.message;
  }
}
