import { expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "../control/testing.ts";
import type { Certificate } from "../net/listener.ts";
import { createLogger } from "../net/logger.ts";
import { TlsWatch } from "./tls.ts";

test("files that cannot even be looked at end nothing: the certificate stays, it is said, and the next one comes into use", async () => {
  const folder = mkdtempSync(join(tmpdir(), "weft-tls-"));
  const [tls, away] = [join(folder, "tls"), join(folder, "away")];
  const write = (text: string) => {
    writeFileSync(join(tls, "cert.pem"), `-----BEGIN CERTIFICATE-----${text}`, { mode: 0o600 });
    writeFileSync(join(tls, "key.pem"), "-----BEGIN PRIVATE KEY-----", { mode: 0o600 });
  };
  mkdirSync(tls);
  write("first");
  const lines: string[] = [];
  const used: Certificate[] = [];
  const files = { certPath: join(tls, "cert.pem"), keyPath: join(tls, "key.pem") };
  const log = createLogger({ level: "info", format: "text", write: (line) => lines.push(line) });
  const watch = new TlsWatch(files, (certificate) => used.push(certificate), log, 2);
  try {
    renameSync(tls, away);
    symlinkSync(tls, tls);
    await until(() => lines.some((line) => /stays the one before: .*cannot be read: ELOOP/.test(line)), "the log");
    expect(used).toEqual([]);
    rmSync(tls);
    renameSync(away, tls);
    write("second");
    await until(() => used.some(({ cert }) => cert.endsWith("second")), "the next certificate");
  } finally {
    watch.close();
    rmSync(folder, { recursive: true });
  }
});
