// HTTPS certificates for nodes: a node's client runs ACME itself, this server only sets the record of its DNS-01 challenge
// (POST /machine/set-dns) and says so when the record is visible (spec/ts2021-control-protocol.md, section 22).
//
// Where the record is set is a DnsProvider: a name server that takes dynamic updates (RFC 2136), or a program of the operator.
import { execFile } from "node:child_process";
import { createHmac } from "node:crypto";
import { constantTimeEqual } from "../crypto/keys.ts";
import { askNameServer, authorityOf, type Lookup, systemLookup } from "../net/dns-client.ts";
import {
  decodeMessage,
  encodeTxtQuery,
  encodeTxtUpdate,
  isSignedBy,
  RCODES,
  signMessage,
  txtValues,
} from "../wire/dns.ts";
import type { ControlContext } from "./context.ts";
import { nodeOf } from "./features.ts";
import type { MachineRequest, MachineRouter } from "./machine.ts";
import { BadRequest, objectOf, text } from "./requests.ts";
import type { DnsProviderSettings } from "./settings.ts";

/** Seconds: a challenge is asked for at once, and never again. */
const TTL = 30;
/** Milliseconds for one answer of a name server, and between looks whether a record is visible. */
const ANSWER = 10_000;
const LOOK = 1_000;
/** Records that are being set at the same time. */
const MAX_PENDING = 64;

export interface DnsProvider {
  /** Puts one TXT record in the place of all that the name has. Throws with one sentence. */
  setTXT(name: string, value: string, signal: AbortSignal): Promise<void>;
}

type Rfc2136 = DnsProviderSettings & { kind: "rfc2136" };

/** A primary name server that takes dynamic updates, signed or by the sender's address. */
class Rfc2136Provider implements DnsProvider {
  constructor(
    private readonly settings: Rfc2136,
    private readonly random: (n: number) => Uint8Array,
    private readonly now: () => number,
  ) {}

  async setTXT(name: string, value: string, signal: AbortSignal): Promise<void> {
    const { server, zone, tsig } = this.settings;
    const update = encodeTxtUpdate(idOf(this.random), { zone, name, value, ttl: TTL });
    const seconds = () => Math.floor(this.now() / 1000);
    const key = tsig && {
      name: tsig.name,
      algorithm: tsig.algorithm,
      mac: (data: Uint8Array) =>
        new Uint8Array(
          createHmac(tsig.algorithm.slice("hmac-".length), Buffer.from(tsig.secret, "base64")).update(data).digest(),
        ),
    };
    const request = key ? signMessage(update, key, seconds()) : { signed: update, mac: new Uint8Array() };
    const answer = await askNameServer(server, request.signed, signal);
    const { rcode, isResponse } = decode(server, answer);
    if (!isResponse || answer[0] !== update[0] || answer[1] !== update[1])
      throw new Error(`the name server ${server} answered something else than was asked`);
    if (rcode !== 0)
      throw new Error(
        `the name server ${server} refused to change ${name} in the zone ${zone}: ${RCODES[rcode] ?? rcode}`,
      );
    if (key && !isSignedBy(answer, key, request.mac, seconds(), constantTimeEqual))
      throw new Error(`the answer of the name server ${server} is not signed with the key ${key.name}`);
  }
}

/** A program of the operator's, called with name and value; it ends with 0 when the record is set. */
class ExecProvider implements DnsProvider {
  constructor(private readonly command: readonly string[]) {}

  setTXT(name: string, value: string, signal: AbortSignal): Promise<void> {
    const [program, ...args] = this.command as [string, ...string[]];
    return new Promise((resolve, reject) => {
      execFile(program, [...args, name, value], { signal, maxBuffer: 64 * 1024 }, (error, _stdout, stderr) => {
        if (!error) return resolve();
        const why = stderr.trim().split("\n").at(-1)?.slice(0, 300) || error.message.split("\n")[0];
        reject(new Error(`${program} did not set the record ${name}: ${why}`));
      });
    });
  }
}

function idOf(random: (n: number) => Uint8Array): number {
  const [a, b] = random(2);
  return (a! << 8) | b!;
}

function decode(server: string, answer: Uint8Array) {
  try {
    return decodeMessage(answer);
  } catch (error) {
    throw new Error(`the name server ${server} answered something that is no DNS message: ${(error as Error).message}`);
  }
}

/** Resolves when every server shows the value; throws when the signal comes first. */
async function untilVisible(
  servers: readonly string[],
  name: string,
  value: string,
  random: (n: number) => Uint8Array,
  signal: AbortSignal,
): Promise<void> {
  for (const server of servers) {
    for (let last = "it does not show the record"; ; ) {
      try {
        const query = encodeTxtQuery(idOf(random), name);
        const answer = await askNameServer(server, query, AbortSignal.any([signal, AbortSignal.timeout(ANSWER)]));
        if (txtValues(decode(server, answer), name).includes(value)) break;
      } catch (error) {
        last = (error as Error).message;
      }
      if (signal.aborted)
        throw new Error(`the record ${name} was set, but did not appear on ${server} in time: ${last}`);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, LOOK);
        signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
      });
    }
  }
}

/**
 * Resolves when the record can be seen where ACME looks for it: on the servers that the operator named, else on the one that
 * was told to set it, else on those of its zone. Throws when the signal comes first.
 */
export async function untilPublished(
  settings: DnsProviderSettings,
  name: string,
  value: string,
  ctx: Pick<ControlContext, "random" | "log">,
  signal: AbortSignal,
  lookup: Lookup = systemLookup(),
  port?: number,
): Promise<void> {
  const named = settings.resolvers.length > 0 || settings.kind === "exec" ? settings.resolvers : [settings.server];
  if (named.length > 0) return untilVisible(named, name, value, ctx.random, signal);
  const { name: at, servers } = await authorityOf(name, lookup, port);
  if (servers.length === 0)
    ctx.log(
      `nobody knows the name servers of ${at}: that its record can be seen is the word of dns.certificates.command alone; dns.certificates.resolvers can name servers to ask`,
    );
  await untilVisible(servers, at, value, ctx.random, signal);
}

export function createProvider(settings: DnsProviderSettings, ctx: ControlContext): DnsProvider {
  if (settings.kind === "exec") return new ExecProvider(settings.command);
  return new Rfc2136Provider(settings, ctx.random, ctx.now);
}

/** Adds POST /machine/set-dns. `provider` null: nodes get no certificates. */
export function addCertificates(ctx: ControlContext, machines: MachineRouter, provider: DnsProvider | null): void {
  const pending = new Set<number>();

  async function setDns({ body, connection, signal }: MachineRequest) {
    const fields = objectOf(body);
    const node = nodeOf(ctx, fields, connection.machineKey);
    const settings = ctx.settings.dns.certificates;
    if (!provider || !settings)
      throw new BadRequest(
        "this control server has no DNS provider, so nodes get no certificates: its operator can name one (dns.certificates)",
        403,
      );
    const name = `_acme-challenge.${node.givenName}.${ctx.config.baseDomain}`;
    const asked = text(fields, "Name", 254).replace(/\.$/, "").toLowerCase();
    if (asked !== name) throw new BadRequest(`this node may set ${name} alone, not ${JSON.stringify(asked)}`, 403);
    if (text(fields, "Type", 16).toUpperCase() !== "TXT") throw new BadRequest("Type must be TXT");
    const value = text(fields, "Value", 255);
    // As ACME writes them (RFC 8555, section 8.4). Programs get it as an argument, and some are scripts of few quotes.
    if (!/^[A-Za-z0-9_-]+$/.test(value)) throw new BadRequest("Value must be letters, digits, - and _, as ACME has it");
    if (pending.has(node.id) || pending.size >= MAX_PENDING)
      throw new BadRequest("a record of this node is being set already: try again later", 429);
    pending.add(node.id);
    const until = AbortSignal.any([signal, AbortSignal.timeout(settings.timeout)]);
    try {
      await provider.setTXT(name, value, until);
      await untilPublished(settings, name, value, ctx, until);
    } catch (error) {
      ctx.log(`node ${node.id} (${node.givenName}) gets no certificate: ${(error as Error).message}`);
      throw new BadRequest((error as Error).message, 503);
    } finally {
      pending.delete(node.id);
    }
    return { json: {} };
  }

  machines.on("POST", "/machine/set-dns", setDns);
}
