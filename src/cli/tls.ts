// Where a server's certificate comes from: PEM files, which are read again on SIGHUP and when they change, or ACME.
import { readFileSync, statSync } from "node:fs";
import { markOf } from "../control/watch.ts";
import type { Certificate } from "../net/listener.ts";
import type { Logger } from "../net/logger.ts";
import { metaCertificate } from "../relay/metacert.ts";
import type { TlsFiles } from "./config.ts";

/** Milliseconds between looks at the files. */
const LOOK_EVERY = 10_000;

/** PEM texts. Throws with one sentence. */
export function readTls({ certPath, keyPath }: TlsFiles): Certificate {
  return { cert: readPem("certificate", certPath, "CERTIFICATE"), key: readPem("key", keyPath, "PRIVATE KEY") };
}

function readPem(what: string, file: string, label: string): string {
  let text: string;
  try {
    text = readFileSync(file, "utf8");
    if (what === "key" && (statSync(file).mode & 0o007) !== 0)
      throw new Error("everybody on this machine may use it, chmod 0640 or less");
  } catch (error) {
    throw new Error(`the TLS ${what} ${file} cannot be read: ${(error as Error).message}`);
  }
  if (!text.includes(`${label}-----`)) throw new Error(`the TLS ${what} ${file} holds no PEM ${label.toLowerCase()}`);
  return text;
}

/** Watches the files. `use` throws when a certificate cannot be used: then the one before stays. */
export class TlsWatch {
  private seen: string;
  private readonly timer: ReturnType<typeof setInterval>;

  constructor(
    private readonly files: TlsFiles,
    private readonly use: (certificate: Certificate) => void,
    private readonly log: Logger,
    lookEvery = LOOK_EVERY,
  ) {
    this.seen = this.stamp();
    this.timer = setInterval(() => this.look(), lookEvery);
    this.timer.unref();
  }

  /** Reads the files again, whether they changed or not. */
  reload(): void {
    this.seen = this.stamp();
    try {
      this.use(readTls(this.files));
      this.log.info(`the TLS certificate ${this.files.certPath} is in use`);
    } catch (error) {
      // Between the writing of one file and the other they do not fit: the next look finds both.
      this.seen = "";
      this.log.error(`the TLS certificate stays the one before: ${(error as Error).message}`);
    }
  }

  close(): void {
    clearInterval(this.timer);
  }

  private look(): void {
    if (this.stamp() !== this.seen) this.reload();
  }

  /** Changes with the files, also when a symbolic link leads elsewhere. */
  private stamp(): string {
    return [this.files.certPath, this.files.keyPath].map(markOf).join("\n");
  }
}

/** The relay's key behind the chain: official clients then log in to it without waiting for an HTTP answer. */
export function withMetaCertificate(tls: Certificate, relayPublicKey: Uint8Array): Certificate {
  return { ...tls, cert: `${tls.cert.trimEnd()}\n${metaCertificate(relayPublicKey, Date.now())}` };
}
