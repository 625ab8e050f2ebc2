// What nobody may read: secrets that a test has used, looked for in everything that a server logs and shows its operators.
import { createPrivateKey } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Box } from "./mesh.ts";

/** The part of a key that nobody may see again; what is before it is its id. */
export const secretPart = (key: string): string => key.slice(key.lastIndexOf("-") + 1);

/** As it is, and as it may stand in a header, a body, a page, an address or a dump of bytes. */
function spellings(secret: string): Set<string> {
  const bytes = Buffer.from(secret);
  const html = secret.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
  return new Set([
    ...[secret, JSON.stringify(secret).slice(1, -1), html],
    ...[encodeURIComponent(secret), new URLSearchParams([["", secret]]).toString().slice(1)],
    ...[bytes.toString("hex"), bytes.toString("base64"), bytes.toString("base64url")],
  ]);
}

/** Private keys in a text, as they may be written elsewhere: of Tailscale's form, and of PEM. */
function privateKeysIn(text: string): string[] {
  const own = [...text.matchAll(/(?:privkey|nlpriv):([0-9a-f]{64})/g)].map((match) => match[1]!);
  const pem = text.match(/-----BEGIN (?:EC |RSA )?PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*-----/g) ?? [];
  const other = pem.flatMap((block) => {
    const { kty, d } = createPrivateKey(block).export({ format: "jwk" });
    const lines = block.split("\n").filter((line) => line !== "" && !line.startsWith("-"));
    // Where the public part is not: the end of a small key, the beginning of a large one.
    const secret = kty === "RSA" ? lines.slice(-3) : lines.slice(0, 2);
    return [d!, Buffer.from(d!, "base64url").toString("hex"), ...secret.filter((line) => line.length > 20)];
  });
  return [...own, ...other];
}

export class Secrets {
  readonly #all = new Map<string, string>();

  get names(): string[] {
    return [...this.#all.keys()];
  }

  /** Returns the secret. One that is short could be found by chance. */
  add(name: string, secret: string): string {
    if (secret.length <= 10) throw new Error(`${name} is not a secret: ${JSON.stringify(secret)}`);
    this.#all.set(name, secret);
    return secret;
  }

  /** A pre-auth key, API key or the like. Returns the key. */
  addKey(name: string, key: string): string {
    this.add(name, secretPart(key));
    return key;
  }

  /** The private keys in a file, or in all files below a folder: of servers, official clients and ACME. Throws when there is none. */
  addPrivateKeys(name: string, path: string): void {
    let count = 0;
    for (const [file, text] of filesBelow(path)) {
      // Official clients keep theirs as base64 of text.
      const inside = (text.match(/[A-Za-z0-9+/]{40,}={0,2}/g) ?? []).map((word) =>
        Buffer.from(word, "base64").toString(),
      );
      for (const key of new Set([text, ...inside].flatMap(privateKeysIn))) this.add(`${name} ${file} ${count++}`, key);
    }
    if (count === 0) throw new Error(`there is no private key in ${path}`);
  }

  /** "SECRET in PLACE" for each that is in a text, which are given by place. */
  foundIn(shown: Record<string, string>): string[] {
    return [...this.#all].flatMap(([name, secret]) =>
      Object.entries(shown)
        .filter(([, text]) => [...spellings(secret)].some((spelling) => text.includes(spelling)))
        .map(([place]) => `${name} in ${place}`),
    );
  }
}

function filesBelow(path: string): [name: string, text: string][] {
  try {
    const entries = readdirSync(path, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
    return entries.map(({ parentPath, name }) => [name, readFileSync(join(parentPath, name), "latin1")]);
  } catch {
    return [["", readFileSync(path, "latin1")]];
  }
}

/** For `Box.start`: everything is logged, and the operators' listener is open. */
export const OPERATORS = ["--metrics-listen", "127.0.0.1:9090", "--log-level", "trace"];

/** What a box started with OPERATORS has logged, and each page of its operators, for people and programs and of each node. */
export async function shownBy(box: Box): Promise<Record<string, string>> {
  const code = `
    const get = async (path, headers = {}) => {
      const response = await fetch("http://127.0.0.1:9090" + path, { headers });
      return [response.status, await response.text()];
    };
    const json = { Accept: "application/json" };
    const list = async (path) => JSON.parse((await get(path, json))[1]);
    const shown = {};
    const see = async (path) => {
      for (const headers of [{}, json]) {
        const [status, text] = await get(path, headers);
        if (status === 200) shown[path + JSON.stringify(headers)] = text;
      }
    };
    await see("/metrics");
    const nodes = await list("/debug/nodes");
    for (const { path } of await list("/debug/")) {
      await see(path);
      for (const { id } of nodes) await see(path + "?node=" + id);
    }
    console.log(JSON.stringify(shown));`;
  const { code: status, stdout, stderr } = await box.host.run([process.execPath, "-e", code]);
  if (status !== 0) throw new Error(`the operators' pages: ${stderr}`);
  return { log: box.log, ...(JSON.parse(stdout) as Record<string, string>) };
}
