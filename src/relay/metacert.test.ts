import { expect, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { hex } from "../crypto/keys.ts";
import { metaCertificate } from "./metacert.ts";

test("names the relay's key and version in a well-formed self-signed certificate", () => {
  const key = Uint8Array.from({ length: 32 }, (_, i) => 200 + i);
  const cert = new X509Certificate(metaCertificate(key, Date.UTC(2026, 10, 21)));
  expect(cert.subject).toBe(`CN=derpkey${hex(key)}`);
  expect(cert.issuer).toBe(cert.subject);
  expect(Number.parseInt(cert.serialNumber, 16)).toBe(2);
  expect(new Date(cert.validFrom).toISOString()).toBe("2026-10-22T00:00:00.000Z");
  expect(new Date(cert.validTo).toISOString()).toBe("2026-12-21T00:00:00.000Z");
  expect(cert.verify(cert.publicKey)).toBe(true);
  expect(cert.publicKey.asymmetricKeyType).toBe("ed25519");
  expect(cert.ca).toBe(false);
});
