// The meta certificate: tells TLS clients the relay's key before they ask, so that they can log in without waiting for an
// HTTP answer (fast start). It stands behind the real chain in the server's Certificate message, and nobody validates it.
//
//   self-signed Ed25519 X.509 v3, CN "derpkey" + 64 hex digits of the relay's public key, serial = DERP version,
//   valid from 30 days before to 30 days after, basicConstraints present
//
// spec/derp-wire.md section 7.1; DER by X.690, certificate by RFC 5280, Ed25519 by RFC 8410.
import { generateKeyPairSync, sign } from "node:crypto";
import { hex } from "../crypto/keys.ts";
import { DERP_VERSION } from "../wire/derp.ts";

const DAY_MS = 86_400_000;
const SEQUENCE = 0x30;
const SET = 0x31;
const INTEGER = 0x02;
const BIT_STRING = 0x03;
const OCTET_STRING = 0x04;
const OID = 0x06;
const UTF8_STRING = 0x0c;
const UTC_TIME = 0x17;
const BOOLEAN = 0x01;
/** 1.3.101.112 */
const ED25519 = der(SEQUENCE, der(OID, Uint8Array.of(0x2b, 0x65, 0x70)));
/** 2.5.4.3 */
const COMMON_NAME = der(OID, Uint8Array.of(0x55, 0x04, 0x03));
/** 2.5.29.19, critical, empty */
const BASIC_CONSTRAINTS = der(
  SEQUENCE,
  der(OID, Uint8Array.of(0x55, 0x1d, 0x13)),
  der(BOOLEAN, Uint8Array.of(0xff)),
  der(OCTET_STRING, der(SEQUENCE)),
);
const utf8 = new TextEncoder();

/** PEM to put behind the server's own certificates. `now`: Unix time in milliseconds. */
export function metaCertificate(relayPublicKey: Uint8Array, now: number): string {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  const name = der(
    SEQUENCE,
    der(SET, der(SEQUENCE, COMMON_NAME, der(UTF8_STRING, utf8.encode(`derpkey${hex(relayPublicKey)}`)))),
  );
  const signed = der(
    SEQUENCE,
    der(0xa0, der(INTEGER, Uint8Array.of(2))), // version 3
    der(INTEGER, Uint8Array.of(DERP_VERSION)),
    ED25519,
    name,
    der(SEQUENCE, utcTime(now - 30 * DAY_MS), utcTime(now + 30 * DAY_MS)),
    name,
    publicKey.export({ type: "spki", format: "der" }),
    der(0xa3, der(SEQUENCE, BASIC_CONSTRAINTS)),
  );
  const signature = sign(null, signed, privateKey);
  const certificate = der(SEQUENCE, signed, ED25519, der(BIT_STRING, Uint8Array.of(0), signature));
  const lines = certificate.toString("base64").replace(/.{64}(?=.)/g, "$&\n");
  return `-----BEGIN CERTIFICATE-----\n${lines}\n-----END CERTIFICATE-----\n`;
}

function der(tag: number, ...parts: Uint8Array[]): Buffer {
  const body = Buffer.concat(parts);
  const { length } = body;
  const size = length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Buffer.concat([Uint8Array.of(tag, ...size), body]);
}

function utcTime(ms: number): Buffer {
  const digits = new Date(ms).toISOString().replace(/[-:T]|\.\d+/g, "");
  return der(UTC_TIME, utf8.encode(digits.slice(2)));
}
