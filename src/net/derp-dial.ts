// How a node reaches a DERP region: its nodes in order, IPv4 and IPv6 at once, TLS, HTTP upgrade.
//
//   IPv4, IPv6     an address is dialled; absent means DNS of HostName; any other word ("none") turns the family off
//   DERPPort       0 or absent: 443, or 3340 over plain HTTP
//   CertName       absent: the certificate is for HostName; a name: for that name; "sha256-raw:<hex>": exactly that
//                  certificate, made out to HostName and in date, whoever signed it
//
// spec/derp-wire.md sections 6.1, 7.2 and 19.1.
import { X509Certificate } from "node:crypto";
import { createConnection, isIP, type Socket } from "node:net";
import type { Duplex } from "node:stream";
import { checkServerIdentity, TLSSocket } from "node:tls";
import type { DERPNode, DERPRegion } from "../wire/tailcfg.ts";
import { dialUpgrade } from "./upgrade-client.ts";

/** TCP connections to one node must stand within this time. */
const NODE_TIMEOUT_MS = 1500;
const PORT_HTTPS = 443;
/** What relays without TLS listen on by convention. */
const PORT_HTTP = 3340;
const PIN = "sha256-raw:";

export interface DerpDialOptions {
  region: DERPRegion;
  /** Plain HTTP instead of TLS: what is sent can be replayed by whoever sees it. For tests and private networks. */
  insecureHttp?: boolean | undefined;
  tls?: {
    /** Roots to trust instead of the built-in ones, PEM. */
    ca?: string | string[] | undefined;
    /** Take any certificate. */
    insecure?: boolean | undefined;
  };
}

export interface Dialled {
  socket: Duplex;
  /** Bytes behind the 101 head. */
  head: Uint8Array;
  node: DERPNode;
}

export interface DialTarget {
  host: string;
  family: 4 | 6;
}

/** What to dial for a node, one target per family that it has. */
export function dialTargets(node: DERPNode): DialTarget[] {
  const targets: DialTarget[] = [];
  for (const family of [4, 6] as const) {
    const address = family === 4 ? node.IPv4 : node.IPv6;
    const host = address || node.HostName;
    const literal = isIP(host);
    if (address ? literal === family : literal === family || literal === 0) targets.push({ host, family });
  }
  return targets;
}

/** The port of a node's DERP service. */
export function derpPort(node: DERPNode, insecureHttp: boolean): number {
  return node.DERPPort || (insecureHttp ? PORT_HTTP : PORT_HTTPS);
}

/** Connects to the first node of the region that answers. Rejects with the first node's reason as one sentence. */
export async function dialRegion(options: DerpDialOptions, timeout: number, signal: AbortSignal): Promise<Dialled> {
  const nodes = (options.region.Nodes ?? []).filter((node) => !node.STUNOnly);
  const ideal = nodes[0];
  if (!ideal) throw new Error(`DERP region ${options.region.RegionID} has no node to connect to`);
  let first: unknown;
  for (const node of nodes) {
    try {
      return await dialNode(options, node, ideal, timeout, signal);
    } catch (error) {
      first ??= error;
      if (signal.aborted) break;
    }
  }
  throw first;
}

async function dialNode(
  options: DerpDialOptions,
  node: DERPNode,
  ideal: DERPNode,
  timeout: number,
  signal: AbortSignal,
): Promise<Dialled> {
  const insecureHttp = options.insecureHttp === true;
  const port = derpPort(node, insecureHttp);
  const tcp = await connectFirst(dialTargets(node), port, node, signal);
  tcp.setNoDelay(true);
  tcp.setKeepAlive(true, 60_000);
  const host = isIP(node.HostName) === 6 ? `[${node.HostName}]` : node.HostName;
  const pinned = node.CertName?.startsWith(PIN) ? node.CertName.slice(PIN.length).toLowerCase() : null;
  const certName = (!pinned && node.CertName) || node.HostName;
  const verify = !pinned && !options.tls?.insecure && !node.InsecureForTests;
  const { socket, head } = await dialUpgrade({
    url: new URL(`${insecureHttp ? "http" : "https"}://${host}:${port}`),
    method: "GET",
    path: "/derp",
    protocol: "DERP",
    ...(node === ideal ? {} : { headers: { "Ideal-Node": ideal.Name } }),
    timeout,
    signal,
    socket: tcp,
    serverName: node.HostName,
    verifyCertificate: verify,
    tls: {
      ...(options.tls?.ca ? { ca: options.tls.ca } : {}),
      ...(verify ? { checkServerIdentity: (_host, cert) => checkServerIdentity(certName, cert) } : {}),
    },
  });
  if (pinned && socket instanceof TLSSocket) {
    const wrong = checkPin(socket.getPeerCertificate().raw, pinned, node.HostName, new Date());
    if (wrong) {
      socket.destroy();
      throw new Error(`the DERP server ${node.HostName} cannot be trusted: ${wrong}`);
    }
  }
  return { socket, head, node };
}

/** Why this certificate (DER) is not the pinned one; null when it is. */
export function checkPin(der: Uint8Array | undefined, sha256: string, host: string, at: Date): string | null {
  if (!der) return "it presents no certificate";
  const cert = new X509Certificate(der);
  const fingerprint = cert.fingerprint256.replaceAll(":", "").toLowerCase();
  if (fingerprint !== sha256) return `its certificate has SHA-256 ${fingerprint} instead of ${sha256}`;
  if (!(isIP(host) ? cert.checkIP(host) : cert.checkHost(host))) return `its certificate is not made out to ${host}`;
  if (at < new Date(cert.validFrom) || at > new Date(cert.validTo))
    return `its certificate is valid from ${cert.validFrom} to ${cert.validTo} only`;
  return null;
}

/** The TCP connection that stands first. */
function connectFirst(targets: DialTarget[], port: number, node: DERPNode, signal: AbortSignal): Promise<Socket> {
  return new Promise((resolve, reject) => {
    if (targets.length === 0) {
      reject(new Error(`the DERP node ${node.Name} has neither an IPv4 nor an IPv6 address to connect to`));
      return;
    }
    const sockets: Socket[] = [];
    let failed = 0;
    const timer = setTimeout(() => {
      end(null, new Error(`${name} did not accept a TCP connection within ${NODE_TIMEOUT_MS / 1000} s`));
    }, NODE_TIMEOUT_MS);
    const name = `the DERP server ${node.HostName} port ${port}`;
    const onAbort = () => end(null, new Error(`connecting to ${name} was called off`));

    function end(winner: Socket | null, error?: Error): void {
      clearTimeout(timer);
      signal.removeEventListener("abort", onAbort);
      for (const socket of sockets) {
        socket.off("connect", onConnect);
        socket.off("error", onError);
        if (socket === winner) continue;
        // A socket that is being torn down may still report errors.
        socket.on("error", () => {});
        socket.destroy();
      }
      if (winner) resolve(winner);
      else reject(error);
    }
    function onConnect(this: Socket): void {
      end(this);
    }
    function onError(error: Error): void {
      failed++;
      if (failed === targets.length) end(null, new Error(`cannot connect to ${name}: ${error.message || error}`));
    }

    signal.addEventListener("abort", onAbort, { once: true });
    if (signal.aborted) {
      onAbort();
      return;
    }
    for (const { host, family } of targets) {
      const socket = createConnection({ host, port, family });
      sockets.push(socket);
      socket.on("connect", onConnect);
      socket.on("error", onError);
    }
  });
}
