// Certificates from an ACME server (RFC 8555): asked for at start, kept in a folder with mode 0600, renewed when a third of
// their life is left, and asked for again with growing pauses when that fails. Challenges: HTTP-01 on a plain HTTP listener
// (port 80), or TLS-ALPN-01 (RFC 8737) on the TLS listener itself.
//
// While TLS-ALPN-01 is under way (seconds, every two months or so), whoever connects by the server's name is shown the
// challenge's certificate, refuses it and comes again: what a client wants is known too late in the handshake.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { Agent } from "node:https";
import { join } from "node:path";
import * as x509 from "@peculiar/x509";
import acme from "acme-client";
import { Hono } from "hono";
import { writeAtomically } from "./keyfile.ts";
import { type Certificate, checkCertificate } from "./listener.ts";
import type { Logger } from "./logger.ts";

export interface AcmeOptions {
  directoryUrl: string;
  /** "" for none. */
  email: string;
  hostname: string;
  /** Made with mode 0700. */
  cacheDir: string;
  challenge: "HTTP-01" | "TLS-ALPN-01";
  /** PEM text of roots to trust beside the usual ones, for an ACME server of one's own. */
  ca?: string;
  log: Logger;
  now: () => number;
}

/** Milliseconds between looks whether the certificate is due. */
const LOOK_EVERY = 60 * 60_000;
/** After a failure: one minute, doubled each time, up to six hours (public servers allow five failures an hour). */
const FIRST_RETRY = 60_000;
const MAX_RETRY = 6 * 60 * 60_000;
/** Milliseconds that one order may take, polls of the server's checks included. */
const ORDER_TIMEOUT = 120_000;
const DAY = 86_400_000;
/** id-pe-acmeIdentifier */
const ACME_IDENTIFIER = "1.3.6.1.5.5.7.1.31";

export class AcmeCertificates {
  /** For the HTTP listener: answers challenges, sends everything else to HTTPS. */
  readonly app = new Hono();
  private readonly httpAnswers = new Map<string, string>();
  private readonly alpnAnswers = new Map<string, Certificate>();
  private timer: ReturnType<typeof setTimeout> | null = null;
  private failures = 0;
  /** The newest one; null: not looked for yet, or none. */
  private held: Certificate | null = null;
  private isClosed = false;

  constructor(private readonly options: AcmeOptions) {
    mkdirSync(options.cacheDir, { recursive: true, mode: 0o700 });
    this.app.get("/.well-known/acme-challenge/:token", (c) => {
      const answer = this.httpAnswers.get(c.req.param("token"));
      return answer === undefined ? c.text("no such challenge", 404) : c.text(answer);
    });
    this.app.get("*", (c) => {
      const { pathname, search } = new URL(c.req.url);
      return c.redirect(`https://${options.hostname}${pathname}${search}`, 308);
    });
  }

  /** What to start with: the certificate of the folder, or one that nobody trusts until `start` has got a real one. */
  async current(): Promise<Certificate> {
    return this.newest() ?? (await alpnCertificate(this.options.hostname, "", this.options.now()));
  }

  /** The certificate that answers TLS-ALPN-01 for this name. */
  challengeFor(name: string): Certificate | null {
    return this.alpnAnswers.get(name.toLowerCase()) ?? null;
  }

  /** Gets a certificate if one is due, then looks every hour. A failure is logged; the next attempt comes by itself. */
  async start(use: (certificate: Certificate) => void): Promise<void> {
    const wait = await this.look(use);
    if (this.isClosed) return;
    this.timer = setTimeout(() => void this.start(use), wait);
    this.timer.unref();
  }

  /** One look: renews when due. Milliseconds until the next. */
  async look(use: (certificate: Certificate) => void): Promise<number> {
    if (!this.isDue()) return LOOK_EVERY;
    const { log, hostname } = this.options;
    try {
      const certificate = await this.obtain();
      if (this.isClosed) return LOOK_EVERY;
      use(certificate);
      this.held = certificate;
      this.failures = 0;
      log.info(`a certificate for ${hostname} is in use`, { until: expiryOf(certificate).toISOString() });
      this.keep(certificate);
      return LOOK_EVERY;
    } catch (error) {
      const wait = Math.min(MAX_RETRY, FIRST_RETRY * 2 ** Math.min(this.failures++, 20));
      log.error(
        `no certificate for ${hostname} from ${this.options.directoryUrl}, next attempt in ${wait / 60_000} min`,
        {
          error: (error as Error).message,
        },
      );
      return wait;
    }
  }

  close(): void {
    this.isClosed = true;
    if (this.timer) clearTimeout(this.timer);
  }

  /** A folder that cannot be written costs a new certificate at the next start, not one an hour: servers count them. */
  private keep({ key, cert }: Certificate): void {
    const path = this.file(`${this.options.hostname}.pem`);
    try {
      writeAtomically(path, `${key.trimEnd()}\n${cert}`);
    } catch (error) {
      this.options.log.error(`the certificate cannot be kept in ${path}, so the next start asks for another`, {
        error: (error as Error).message,
      });
    }
  }

  private isDue(): boolean {
    const newest = this.newest();
    if (!newest) return true;
    const { notBefore, notAfter } = acme.crypto.readCertificateInfo(newest.cert);
    return notAfter.getTime() - this.options.now() < (notAfter.getTime() - notBefore.getTime()) / 3;
  }

  private file(name: string): string {
    return join(this.options.cacheDir, name);
  }

  /** Null when there is none that can be used. */
  private newest(): Certificate | null {
    this.held ??= this.kept();
    return this.held;
  }

  private kept(): Certificate | null {
    const path = this.file(`${this.options.hostname}.pem`);
    if (!existsSync(path)) return null;
    try {
      const text = readFileSync(path, "utf8");
      const at = text.indexOf("-----BEGIN CERTIFICATE-----");
      const certificate = { key: text.slice(0, at), cert: text.slice(at) };
      checkCertificate(certificate);
      return certificate;
    } catch (error) {
      this.options.log.warn(`the certificate in ${path} cannot be used, another is asked for`, {
        error: (error as Error).message,
      });
      return null;
    }
  }

  private async accountKey(): Promise<string> {
    const path = this.file("account.key");
    if (!existsSync(path)) writeAtomically(path, String(await acme.crypto.createPrivateEcdsaKey()));
    return readFileSync(path, "utf8");
  }

  private async obtain(): Promise<Certificate> {
    const { directoryUrl, email, hostname, challenge, ca } = this.options;
    // The library has one HTTP client for all; so has the process one ACME server.
    if (ca !== undefined) acme.axios.defaults.httpsAgent = new Agent({ ca });
    const client = new acme.Client({
      directoryUrl,
      accountKey: await this.accountKey(),
      backoffAttempts: 20,
      backoffMin: 500,
      backoffMax: 10_000,
    });
    const [key, csr] = await acme.crypto.createCsr(
      { commonName: hostname, altNames: [hostname] },
      await acme.crypto.createPrivateEcdsaKey(),
    );
    // Servers refuse an update of an account that says nothing new, which is what `auto` sends without an address. Where the
    // account is not known, it makes one.
    if (email === "") await client.createAccount({ onlyReturnExisting: true }).catch(() => {});
    const order = client.auto({
      csr,
      ...(email && { email }),
      termsOfServiceAgreed: true,
      skipChallengeVerification: true,
      challengePriority: [challenge.toLowerCase()],
      challengeCreateFn: async (authorization, { token }, answer) => {
        if (challenge === "HTTP-01") this.httpAnswers.set(token, answer);
        else
          this.alpnAnswers.set(
            authorization.identifier.value,
            await alpnCertificate(hostname, answer, this.options.now()),
          );
      },
      challengeRemoveFn: async (authorization, { token }) => {
        this.httpAnswers.delete(token);
        this.alpnAnswers.delete(authorization.identifier.value);
      },
    });
    let timer: ReturnType<typeof setTimeout> | undefined;
    const limit = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(new Error(`no answer within ${ORDER_TIMEOUT / 1000} s`)), ORDER_TIMEOUT);
    });
    try {
      return { key: String(key), cert: await Promise.race([order, limit]) };
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Self-signed, for the name alone, with the answer's digest (RFC 8737, section 3). */
async function alpnCertificate(hostname: string, answer: string, now: number): Promise<Certificate> {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const keys = (await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"])) as CryptoKeyPair;
  const digest = createHash("sha256").update(answer).digest();
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    name: "CN=ACME challenge",
    keys,
    signingAlgorithm: algorithm,
    notBefore: new Date(now - DAY),
    notAfter: new Date(now + DAY),
    extensions: [
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.SubjectAlternativeNameExtension([{ type: "dns", value: hostname }]),
      // An OCTET STRING of 32 bytes.
      new x509.Extension(ACME_IDENTIFIER, true, Uint8Array.of(0x04, digest.length, ...digest)),
    ],
  });
  const key = Buffer.from(await crypto.subtle.exportKey("pkcs8", keys.privateKey));
  return { cert: certificate.toString("pem"), key: x509.PemConverter.encode(key, "PRIVATE KEY") };
}

function expiryOf({ cert }: Certificate): Date {
  return acme.crypto.readCertificateInfo(cert).notAfter;
}
